import pytest
import torch
from factories import tiny_model

from ear.model.masking import masked_after
from ear.runtime.randomness import image_streams, stream
from ear.sampling.guidance import scale_at
from ear.sampling.sampler import network_evaluations, sample
from ear.sampling.settings import SamplingSettings

LABELS = torch.tensor([0, 1, 2, 0, 1])


def draw(model, labels=LABELS, first=0, **options):
    settings = {"steps": 5, "guidance": 2.0, "schedule": "linear", "temperature": 0.8}
    source = image_streams(7, range(first, first + len(labels)))
    return sample(model, labels, SamplingSettings(**{**settings, **options}), source=source)


def test_image_k_is_the_same_in_any_batch():
    model = tiny_model()
    together = draw(model)
    apart = torch.cat([draw(model, LABELS[:2]), draw(model, LABELS[2:], first=2)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[3])  # the same class, another stream


def test_guidance_needs_a_null_class_that_was_trained():
    model = tiny_model()
    model.label_dropout = 0.0
    assert draw(model, guidance=1.0).isfinite().all()
    with pytest.raises(ValueError, match=r"^guidance is 2, but the model was trained with model\.label_dropout 0"):
        draw(model, guidance=2.0)


def test_guidance_one_is_no_guidance():
    model = tiny_model()
    unguided = draw(model, guidance=1.0)
    model.null_class.data += 1.0
    torch.testing.assert_close(draw(model, guidance=1.0), unguided)
    assert not torch.allclose(draw(model, guidance=2.0), unguided)


@pytest.mark.parametrize("steps", [1, 4, 16, 40])
def test_every_token_is_drawn_whatever_the_steps(steps):
    latents = draw(tiny_model(), steps=steps)
    assert latents.shape == (5, 3, 4, 4)
    assert latents.isfinite().all()
    assert (latents.abs() > 0).all()  # a token never revealed would have stayed 0


@pytest.mark.parametrize("steps", [1, 4, 16, 40])
@pytest.mark.parametrize("name", ["energy", "hyvarinen"])
def test_network_evaluations_are_those_made(steps, name):
    model, settings = tiny_model(name=name), SamplingSettings(steps=steps, denoising_steps=3)
    passes, rows = [], []
    model.transformer.register_forward_hook(lambda *_: passes.append(1))
    model.score.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    draw(model, steps=steps, guidance=1.0, denoising_steps=3)
    expected = {"transformer": len(passes), "head": sum(rows) // len(LABELS)}
    assert network_evaluations(model, settings) == expected


def test_one_token_is_one_pass():
    assert tiny_model(patch_size=4).passes(16) == 1


@pytest.mark.parametrize("patch", [1, 2])
def test_patches(patch):
    assert draw(tiny_model(patch_size=patch)).shape == (5, 3, 4, 4)


def test_one_generator_serves_all_images():
    model = tiny_model()
    settings = SamplingSettings(steps=3, guidance=1.0)
    first = sample(model, LABELS, settings, source=stream(0))
    assert torch.equal(first, sample(model, LABELS, settings, source=stream(0)))


def test_guidance_schedules():
    assert scale_at("constant", 3.0, tokens=256, masked=255) == 3.0
    assert scale_at("linear", 3.0, tokens=256, masked=255) == pytest.approx(1 + 2 / 256)
    assert scale_at("linear", 3.0, tokens=256, masked=0) == pytest.approx(1 + 2 * 255 / 256)
    assert scale_at("linear", 1.0, tokens=256, masked=100) == 1.0


def test_guidance_acts_inside_its_interval_only():
    def scale(masked: int) -> float:
        return scale_at("constant", 3.0, tokens=100, masked=masked, interval=(0.25, 0.5))

    assert [scale(masked) for masked in (99, 75, 74, 50, 49, 0)] == [1, 1, 3, 3, 1, 1]


@pytest.mark.parametrize("name", ["energy", "hyvarinen", "logarithmic"])
def test_steps_outside_the_interval_compute_half_of_the_rows(name):
    model, rows = tiny_model(name=name), []
    every = draw(model, guidance=2.0, steps=8)
    model.transformer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    known = [(16 - left) / 16 for left in masked_after(16, 8)]
    some = draw(model, guidance=2.0, steps=8, guidance_from=known[2], guidance_to=known[5])
    assert rows[1:] == [5, 5, 10, 10, 10, 5, 5]  # the first step has one row per class
    assert not torch.allclose(some, every)
    last = draw(model, guidance=2.0, steps=8, guidance_from=0.999999)
    assert not torch.allclose(last, draw(model, guidance=1.0, steps=8))
    with torch.no_grad():
        model.null_class[0, 0] += 3  # seen in the last step alone
    moved = (draw(model, guidance=2.0, steps=8, guidance_from=0.999999) - last).abs().amax(dim=1).flatten(1) > 1e-6
    assert 0 < moved.sum() <= 5 * masked_after(16, 8)[-2]  # a mixture may choose the same candidate


def test_a_causal_model_without_guided_steps_draws_as_without_guidance():
    model = tiny_model(attention="causal")
    torch.testing.assert_close(draw(model, guidance=3.0, guidance_to=1e-9), draw(model, guidance=1.0))


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((0.5, 0.5), r"guidance_from is 0\.5, but must be below sample\.guidance_to, 0\.5"),
        ((0.6, 0.2), r"guidance_from is 0\.6, but must be below sample\.guidance_to, 0\.2"),
        ((-0.1, 1.0), r"^guidance_from is -0\.1, but must be at least 0 and below 1"),
        ((0.0, 1.1), r"^guidance_to is 1\.1, but must be at most 1 and above 0"),
    ],
)
def test_an_empty_interval_is_refused(interval, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(guidance_from=interval[0], guidance_to=interval[1])


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["energy", "kernel", "logarithmic", "hyvarinen", "categorical"])
def test_images_of_the_gpu_are_those_of_the_cpu(name, attention):
    model = tiny_model(name=name, attention=attention)
    expected = draw(model)
    drawn = draw(model.to("cuda"), LABELS.to("cuda"))
    torch.testing.assert_close(drawn.cpu(), expected, rtol=1e-2, atol=1e-3)
