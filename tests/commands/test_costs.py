"""Counts on tensors without data against torch's own on real ones, and against the published figures."""

import dataclasses

import pytest
import torch
from factories import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ear.commands import costs
from ear.config.compose import compose
from ear.model import flops
from ear.model.files import build_model
from ear.runtime.randomness import stream
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.tokenizer.autoencoder import kl_structure, new_kl
from ear.tokenizer.critic import PatchCritic
from ear.tokenizer.loss import AutoencoderLoss
from ear.tokenizer.perceptual import Perceptual

PATHS = ("data.path=/images", "tokenizer.weights=/kl16.ckpt")  # of nothing
KINDS = [{"name": name} for name in ("energy", "kernel", "logarithmic", "categorical")]
KINDS += [{"name": "hyvarinen"}, {"attention": "causal"}, {"name": "energy", "targets": 3}]
KINDS += [{"blocks": "modern", "attention": attention} for attention in ("bidirectional", "causal")]


def deeper(*, depth=3, dropout=0.1, **options):
    """An initialised model in training mode in which every token is predicted, and its shape."""
    shape = tiny_model(**options).shape
    options = shape.model.model_copy(update={"depth": depth, "dropout": dropout, "mask_ratio_min": 1.0})
    shape = dataclasses.replace(shape, model=options)
    return build_model(shape).initialise(torch.Generator()).train(), shape


def loss(model, images):
    generator = torch.Generator().manual_seed(0)
    shape = (model.score.targets, images, *model.shape.latent)
    latents, labels = torch.randn(shape, generator=generator).squeeze(0), torch.zeros(images).long()
    return model.loss(latents, labels, temperature=1.0, source=stream(0)).value


def saved(model, images):
    """Every tensor that autograd saves in a real forward pass, but for weights, by storage."""
    weights, kept = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(model, images)
    assert result.requires_grad
    return {at: tensor for at, tensor in kept.items() if at not in weights}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("base", 205_608_720), ("large", 474_755_088), ("huge", 937_314_576)],
)
def test_parameters_of_the_published_models(name, parameters):
    preset = compose([f"preset=imagenet256_{name}", *PATHS])
    tokenizer = costs.build_tokenizer(preset)
    assert sum(p.numel() for p in tokenizer.parameters()) == 66_456_019
    counts = costs.count_parameters(costs.model_shape(preset, tokenizer, classes=1000))
    assert counts["all"] == parameters
    assert counts["transformer"] + counts["head"] + counts["embeddings"] == parameters


def test_compute_of_the_published_base_model():
    preset = compose(["preset=imagenet256_base", *PATHS])
    shape = costs.model_shape(preset, costs.build_tokenizer(preset), classes=1000)
    assert shape.latent == (16, 16, 16)
    assert flops.mean_predicted(shape) == pytest.approx(222.46, abs=1)  # of 256
    training, sampling = flops.training_flops(shape), costs.sampling_flops(shape, SamplingSettings.of(preset.sample))
    # 116.3e9 with all positions in the last block, of which training needs 222 of 320, sampling those it reveals.
    assert training["forward, transformer"] == pytest.approx(115.0e9, rel=1e-3)
    assert training["forward, head"] == pytest.approx(4 * 222 * 68.8e6, rel=0.02)  # four samples per token
    assert sampling["transformer"] == pytest.approx(0.966 * 64 * 2 * 116.3e9, rel=1e-3)
    assert sampling["head"] == pytest.approx(256 * 68.8e6, rel=0.06)


@pytest.mark.parametrize("options", KINDS)
def test_operations_are_those_of_the_real_model(options, one_thread):
    model, shape = deeper(**options)
    found = flops.training_flops(shape)
    with FlopCounterMode(display=False) as forward:
        result = loss(model, 1)
    with FlopCounterMode(display=False) as backward:
        result.backward()
    assert found["forward, transformer"] + found["forward, head"] == forward.get_total_flops()
    assert found["forward and backward"] == forward.get_total_flops() + backward.get_total_flops()

    check_sampling(model, shape, SamplingSettings(steps=5, guidance=2.0, denoising_steps=3))


def check_sampling(model, shape, settings):
    with FlopCounterMode(display=False) as drawn:
        sample(model.eval(), torch.zeros(1).long(), settings, source=stream(0))
    assert sum(costs.sampling_flops(shape, settings).values()) == drawn.get_total_flops()


@pytest.mark.parametrize(
    "settings",
    [{"steps": 1}, {"steps": 40}, {"steps": 5, "guidance": 1.0}, {"steps": 6, "guidance_from": 0.5}],
    ids=str,
)
def test_operations_of_any_number_of_sampling_steps(settings, one_thread):
    model, shape = deeper()
    assert shape.tokens == 16
    check_sampling(model, shape, SamplingSettings(**({"guidance": 2.0} | settings)))


@pytest.mark.parametrize(("patch", "tokens"), [(4, 1), (2, 4)])
def test_operations_of_sampling_few_tokens(patch, tokens, one_thread):
    model, shape = deeper(patch_size=patch)
    assert shape.tokens == tokens
    check_sampling(model, shape, SamplingSettings(steps=8, guidance=2.0))


@pytest.mark.parametrize("options", KINDS)
def test_activations_are_what_the_real_model_saves(options, one_thread):
    model, shape = deeper(dropout=0.0, **options)
    plain, _ = costs.activation_bytes(shape, images=5, precision="float32")
    assert plain == sum(tensor.untyped_storage().nbytes() for tensor in saved(model, 5).values())


def test_activations_of_the_autoencoder_are_what_the_real_one_saves(one_thread):
    options = compose(["preset=digits", "tokenizer.micro_batch_size=4"]).tokenizer
    structure = kl_structure(channels=4, block_channels=[8, 16], layers=1)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for weight in (0.0, 0.5):
        options = options.model_copy(update={"perceptual_weight": weight, "adversarial_weight": weight})
        tokenizer = new_kl(seed=0, image_size=32, structure=structure).train()
        perceptual, critic = Perceptual(), PatchCritic().requires_grad_(False)
        weights = {p.data_ptr() for m in (tokenizer, perceptual, critic) for p in (*m.parameters(), *m.buffers())}
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        loss = AutoencoderLoss(options.kl_weight, perceptual if weight else None, weight)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = loss(tokenizer, images, torch.randn(4, 4, 16, 16))
            judged = critic(terms.decoded) if weight else None
        assert (judged is not None) == (weight > 0)
        expected = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
        memory = costs.tokenizer_memory(tokenizer, options)
        assert memory["activations"] == pytest.approx(expected, rel=0.01)
        assert memory["weights"] == 4 * sum(p.numel() for p in tokenizer.parameters())


@pytest.mark.parametrize("blocks", ["vit", "modern"])
def test_dropout_adds_its_masks_as_cuda_keeps_them(blocks):
    """Tensors without data may lie on a device that is absent; attention's own mask is not kept by fused kernels."""
    _, shape = deeper(depth=2, blocks=blocks)
    masks = {}

    def keep(tensor):
        if tensor.dtype == torch.bool and tensor.dim() == 3 and tensor.shape[-1] > 1:
            masks[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(), torch.device("cuda"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model = build_model(shape).train()
        model.transformer(torch.empty(5, model.buffer + model.tokens, shape.model.width))
    without = dataclasses.replace(shape, model=shape.model.model_copy(update={"dropout": 0.0}))
    with_, bare = (costs.activation_bytes(s, images=5, precision="float32")[0] for s in (shape, without))
    assert with_ - bare == sum(tensor.numel() for tensor in masks.values()) > 0


def test_muon_keeps_one_number_for_a_matrix_of_a_block():
    shape = costs.model_shape(compose(["preset=digits"]), costs.build_tokenizer(compose(["preset=digits"])), classes=10)
    both = {name: costs.moments_bytes(shape, name) for name in ("adamw", "muon")}
    assert both["adamw"] == 8 * costs.count_parameters(shape)["all"]
    in_blocks = 4 * (3 + 1 + 4 + 4) * 128**2 + 3 * (2 + 3) * 128**2
    assert both["adamw"] - both["muon"] == 4 * in_blocks


def test_sharding_divides_what_a_process_holds():
    together, apart = (
        compose(["preset=folder64", "data.path=/", "runtime.processes=4", f"runtime.sharded={sharded}"])
        for sharded in ("false", "true")
    )
    shape = costs.model_shape(together, costs.build_tokenizer(together), classes=10)
    whole, part = (costs.training_memory(parameters, shape)[0] for parameters in (together, apart))
    assert part["activations"] == whole["activations"]
    assert {name: whole[name] / part[name] for name in part if name != "activations"} == dict.fromkeys(
        ("weights", "gradients", "optimizer moments", "averaged weights"), pytest.approx(4, rel=1e-6)
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_disk_has_the_pixels_of_arrays_and_the_moments_of_the_optimiser(optimizer):
    parameters = compose(["preset=fashion", f"train.optimizer={optimizer}"])
    shape = costs.model_shape(parameters, costs.build_tokenizer(parameters), classes=10)
    weights = 4 * costs.count_parameters(shape)["all"]
    disk = costs.disk_bytes(parameters, shape, images=70_000, weights=weights)
    assert disk["data/raw"] == 70_000 * 3 * 28**2
    state = 3 * weights + costs.moments_bytes(shape, optimizer)  # weights and two EMAs
    assert (disk["data/model"], disk["work, while a phase trains"]) == (weights + state, 3 * state)


def test_activations_shrink_with_precision_and_checkpointing():
    _, shape = deeper(depth=8)
    plain, checkpointed = costs.activation_bytes(shape, images=16, precision="float32")
    half, _ = costs.activation_bytes(shape, images=16, precision="bfloat16")
    assert checkpointed < plain / 2
    assert half < plain
    twice, thrice = (costs.activation_bytes(shape, images=n, precision="float32")[0] for n in (32, 48))
    assert thrice - twice == twice - plain
    assert 1.99 * plain < twice <= 2 * plain  # the head's joined weights do not grow with the images
