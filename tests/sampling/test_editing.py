"""Editing: what is kept, what is drawn, and that each image is on its own; with pixels as latents."""

import numpy as np
import pytest
import torch
from factories import tiny_model

import ear
from ear import scores
from ear.files.digests import sha256
from ear.model.files import save_model
from ear.model.masking import masked_before_known, random_orders
from ear.model.tokens import patchify
from ear.runtime.randomness import generator, image_streams, stream
from ear.sampling.editing import masked_tokens
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.tokenizer.autoencoder import Identity, save_tokenizer

OPTIONS = {"steps": 3, "guidance": 2.0, "seed": 4}


def write_pipeline(folder, **options):
    """A tokenizer and a model of 8 x 8 images: 4 x 4 tokens of 2 x 2 pixels."""
    tokenizer = folder / "tokenizer/tokenizer.safetensors"
    save_tokenizer(tokenizer, Identity(image_size=8, downsample=2))
    statistics = {"mean": 0.1, "std": 0.5, "channel_mean": [0.1] * 12, "channel_std": [0.5] * 12}
    model = tiny_model(latent=(12, 4, 4), **options)
    if options.get("name") == "categorical":
        model.score.codebook.normal_(generator=generator(0, "codes"))
    save_model(
        folder / "finetuned/model.safetensors", model, {"statistics": statistics, "tokenizer": sha256(tokenizer)}
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("data"))


def inputs(count=4):
    """Images, and masks of 1, 1, 2, .. pixels per image in distant tokens."""
    images = torch.randint(0, 256, (count, 8, 8, 3), generator=generator(0, "images")).to(torch.uint8).numpy()
    mask = np.zeros((count, 8, 8), dtype=bool)
    mask[:, 3, 3] = True
    mask[2:, 6, 1] = True
    return images, mask


def test_tokens_that_a_masked_pixel_touches_are_drawn():
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[0, 1, 2] = mask[0, 7, 7] = True
    assert masked_tokens(mask, 2).nonzero()[1].tolist() == [1, 15]
    assert masked_tokens(mask, 4).nonzero()[1].tolist() == [0, 3]


@pytest.mark.parametrize("name", scores.SCORES)
def test_known_pixels_stay_and_masked_ones_are_drawn(tmp_path, name):
    images, mask = inputs()
    edited = ear.inpaint(images, mask, [0, 1, 2, "a"], data=write_pipeline(tmp_path, name=name), **OPTIONS)
    assert edited.shape == images.shape
    assert edited.dtype == np.uint8
    assert np.array_equal(edited[~mask], images[~mask])
    assert (edited[mask] != images[mask]).any(axis=-1).all()


def test_without_pasting_known_tokens_are_as_the_tokenizer_decodes_them(data):
    images, mask = inputs()
    edited = ear.inpaint(images, mask, [0, 1, 2, 0], data=data, paste=False, **OPTIONS)
    drawn = masked_tokens(mask, 2).reshape(4, 4, 4).repeat(2, axis=1).repeat(2, axis=2)
    assert np.array_equal(edited[~drawn], images[~drawn])  # the identity decodes to the pixels themselves
    changed = (edited != images).any(axis=-1)
    assert changed[drawn & ~mask].any()  # tokens are drawn whole


def test_a_model_can_be_named(data, tmp_path):
    images, mask = inputs()
    other = write_pipeline(tmp_path, seed=1) / "finetuned/model.safetensors"
    named = ear.inpaint(images, mask, [0] * 4, data=data, model=data / "finetuned/model.safetensors", **OPTIONS)
    assert np.array_equal(named, ear.inpaint(images, mask, [0] * 4, data=data, **OPTIONS))
    assert not np.array_equal(named, ear.inpaint(images, mask, [0] * 4, data=data, model=other, **OPTIONS))


def test_an_image_depends_on_itself_and_its_number_alone(data):
    images, mask = inputs()
    labels = [0, 1, 2, 0]
    together = ear.inpaint(images, mask, labels, data=data, **OPTIONS)
    alone = ear.inpaint(images, mask, labels, data=data, batch_size=1, **OPTIONS)
    assert np.abs(alone.astype(int) - together).max() <= 1
    others = images.copy()
    others[[0, 1, 3]] = 255 - others[[0, 1, 3]]
    mask[0] = True  # another group of equal counts
    again = ear.inpaint(others, mask, labels, data=data, **OPTIONS)
    assert np.abs(again[2].astype(int) - together[2]).max() <= 1
    other_label = ear.inpaint(images, mask, [0, 1, 1, 0], data=data, **OPTIONS)
    assert not np.array_equal(other_label[2], together[2])


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_sampling_keeps_known_tokens(steps):
    model, labels = tiny_model(), torch.tensor([0, 1, 2])
    known = torch.randn(3, 3, 4, 4, generator=generator(0))
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask.scatter_(1, random_orders(3, 16, stream(1))[:, :6], True)
    drawn = sample(model, labels, SamplingSettings(steps=steps, guidance=2.0), source=stream(2), known=known, mask=mask)
    kept = (patchify(drawn, 1) == patchify(known, 1)).all(-1)
    assert torch.equal(kept, ~mask)


def test_with_nothing_known_it_is_generation():
    model, labels = tiny_model(), torch.tensor([0, 1, 2])
    settings = SamplingSettings(steps=4, guidance=2.0)
    everything = {"known": torch.ones(3, 3, 4, 4), "mask": torch.ones(3, 16, dtype=torch.bool)}
    generated = sample(model, labels, settings, source=image_streams(3, range(3)))
    assert torch.equal(sample(model, labels, settings, source=image_streams(3, range(3)), **everything), generated)


def test_orders_start_with_the_masked_tokens():
    orders = torch.tensor([[3, 0, 2, 1], [1, 2, 3, 0]])
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    moved, count = masked_before_known(orders, mask)
    assert moved.tolist() == [[0, 1, 3, 2], [2, 3, 1, 0]]
    assert count == 2
    mask[0, 2] = True
    with pytest.raises(ValueError, match="2 to 3 masked tokens"):
        masked_before_known(orders, mask)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, m, n: (i[:, :6], m, n), r"images are uint8 \(4, 6, 8, 3\), but must be uint8 \(4, 8, 8, 3\)"),
        (lambda i, m, n: (i / 255, m, n), r"images are float64"),
        (lambda i, m, n: (i, m.astype(int), n), r"mask is int64 \(4, 8, 8\), but must be bool"),
        (lambda i, m, n: (i, m[:2], n), r"mask is bool \(2, 8, 8\)"),
        (lambda i, m, n: (i, m & (np.arange(4) != 1)[:, None, None], n), "mask 1 is false everywhere"),
        (lambda i, m, n: (i, m, [0, 1, 2, "x"]), "label 'x' is none of the model's 3 classes"),
        (lambda i, m, n: (i, m, [0, 1]), "for 2 labels"),
        (lambda i, m, n: ([*i], [[True]], n), r"mask is bool \(1, 1\)"),
        (lambda i, m, n: (i[:0], m[:0], []), "labels is empty"),
    ],
)
def test_mistakes_are_one_sentence(data, change, words):
    images, mask, labels = change(*inputs(), [0, 1, 2, 0])
    with pytest.raises(ValueError, match=words) as caught:
        ear.inpaint(images, mask, labels, data=data)
    assert "\n" not in str(caught.value)


def test_a_causal_model_cannot_edit(tmp_path):
    images, mask = inputs()
    with pytest.raises(ValueError, match=r"model\.attention is 'causal'"):
        ear.inpaint(images, mask, [0, 1, 2, 0], data=write_pipeline(tmp_path, attention="causal"))
