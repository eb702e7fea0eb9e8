"""The model against numbers of the published implementation (tests/golden/README.md says what each tensor is)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ear.model import interop
from ear.model.autoregressive import AutoregressiveModel
from ear.model.tokens import patchify, unpatchify
from ear.model.training import parameter_groups
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.scores.energy import energy_loss

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = json.loads((GOLDEN / "ear_config.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ear_outputs.safetensors")


@pytest.fixture
def model() -> AutoregressiveModel:
    return interop.load_published(
        load_file(GOLDEN / "ear_weights.safetensors"), heads=CONFIG["num_heads"], buffer_size=CONFIG["buffer_size"]
    )


class Replay:
    """A source that hands out recorded noise rows in order."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows + 0.5  # recorded as uniform noise in [-0.5, 0.5)

    def bits(self, shape, device):
        drawn, self.rows = self.rows[: shape[0]], self.rows[shape[0] :]
        assert drawn.shape == tuple(shape)
        return ((drawn * 2.0**24).long() << 8).to(torch.int32)  # what `uniform` turns into these numbers


def masked_mean(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.flatten()
    return (per_token * weights).sum() / weights.sum()


def losses(model: AutoregressiveModel, golden: dict, *, alpha: float, temperature: float) -> torch.Tensor:
    mask = golden["mask"].bool()
    hidden = model.hidden(golden["tokens"], mask, golden["labels"]).flatten(0, 1)
    noise = golden["loss_noise"].unflatten(0, (2, -1))
    samples = model.score.generate(hidden, noise)
    targets = golden["tokens"].flatten(0, 1)[None]
    return energy_loss(samples, targets, alpha=alpha, temperature=temperature)


def test_tokens_are_patches_of_the_latents(model, golden):
    tokens = patchify(golden["latents"], CONFIG["patch_size"])
    assert torch.equal(tokens, golden["tokens"])
    assert torch.equal(unpatchify(tokens, 1, model.shape.latent), golden["latents"])


@torch.no_grad()
def test_hidden_states(model, golden):
    mask = golden["mask"].bool()
    conditional = model.hidden(golden["tokens"], mask, golden["labels"])
    null = torch.ones(len(conditional), dtype=torch.bool)
    unconditional = model.hidden(golden["tokens"], mask, golden["labels"], null)
    torch.testing.assert_close(conditional, golden["hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(unconditional, golden["hidden_uncond"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_generator_samples_of_the_loss(model, golden):
    noise = golden["loss_noise"].unflatten(0, (2, -1))
    samples = model.score.generate(golden["hidden"].flatten(0, 1), noise).flatten(0, 1)
    torch.testing.assert_close(samples, golden["loss_samples"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("alpha", CONFIG["alphas"])
@pytest.mark.parametrize("temperature", CONFIG["train_temperatures"])
def test_scores_and_losses(model, golden, alpha, temperature):
    per_token = losses(model, golden, alpha=alpha, temperature=temperature)
    key = f"alpha={alpha}/train_temperature={temperature}"
    torch.testing.assert_close(-per_token, golden[f"score/{key}"], atol=1e-5, rtol=0)
    expected = golden[f"loss/{key}"].squeeze()
    torch.testing.assert_close(masked_mean(per_token, golden["mask"]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_head_at_inference_temperatures(model, golden, temperature):
    drawn = model.score.generate(golden["hidden"].flatten(0, 1), golden["head_noise"], temperature)
    expected = golden[f"head_sample/infer_temperature={temperature}"]
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


def test_gradients(model, golden):
    losses_ = losses(model, golden, alpha=1.0, temperature=1.0)
    masked_mean(losses_, golden["mask"]).backward()
    expected = load_file(GOLDEN / "ear_grads.safetensors")
    parameters = dict(model.named_parameters())
    compared = set()
    for name, gradient in expected.items():
        ours = parameters[interop.our_name(name)].grad
        ours = torch.zeros_like(gradient) if ours is None else ours
        error = (ours - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-4 or gradient.norm() < 1e-7, (name, float(error))
        compared.add(interop.our_name(name))
    assert compared == set(parameters)


@pytest.mark.parametrize("index", range(len(CONFIG["traces"])))
def test_sampling_traces(model, golden, index):
    trace = CONFIG["traces"][index]
    prefix = next(k for k in sorted(golden) if k.startswith("trace/") and k.endswith("/orders") and matches(k, trace))
    prefix = prefix.removesuffix("orders")
    latents = sample(
        model,
        golden["labels"],
        SamplingSettings(
            steps=CONFIG["num_iter"],
            guidance=trace["cfg"],
            schedule=trace["schedule"],
            temperature=trace["infer_temperature"],
        ),
        source=Replay(golden[prefix + "noise"]),
        orders=golden[prefix + "orders"],
    )
    torch.testing.assert_close(latents, golden[prefix + "latents"], atol=1e-5, rtol=0)


def matches(key: str, trace: dict) -> bool:
    return all(str(value) in key for value in trace.values())


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_sizes(size):
    golden = json.loads((GOLDEN / f"ear_{size}_parameters.json").read_text())
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in golden["parameters"].items()}
        model = interop.load_published(tensors)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == golden["n_parameters"]
    named = {id(p): name for name, p in parameters.items()}
    groups = parameter_groups(model, weight_decay=0.02, head_rate=0.25)
    ours = [{named[id(p)] for p in group.parameters} for group in groups]
    expected = [{interop.our_name(n) for n in golden["groups"][key]} for key in ("no_decay", "head", "decay")]
    assert ours == expected
    assert [(g.weight_decay, g.rate) for g in groups] == [(0.0, 1.0), (0.0, 0.25), (0.02, 1.0)]


def test_published_file_round_trip(model, tmp_path):
    interop.save_published(model, tmp_path / "checkpoint-last.pth")
    again = interop.load_published(
        tmp_path / "checkpoint-last.pth", heads=CONFIG["num_heads"], buffer_size=CONFIG["buffer_size"]
    )
    published = load_file(GOLDEN / "ear_weights.safetensors")
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)["model_ema"]
    assert content.keys() == published.keys()
    assert all(torch.equal(content[name], published[name]) for name in published)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
