"""A GPU's mistakes, found without one: fake tensors have devices and shapes, but no values that the host could read.

Tensors on different devices raise where they meet, and so does every read by the host, which would make it wait.
"""

import pytest
import torch
from factories import tiny_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ear.latents.statistics import Statistics
from ear.model.training import BatchLoss, block_matrices, parameter_groups
from ear.runtime.randomness import image_streams, stream
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.training.optimizer import MuonAdamW

GPU = torch.device("cuda")
SCORES = ["energy", "kernel", "logarithmic", "hyvarinen", "categorical"]


@pytest.fixture(autouse=True)
def fake_gpu():
    # The first backward pass starts one thread per kind of device; with fake ones among them, later tests cannot fork.
    torch.ones((), requires_grad=True).backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(**options):
    with torch.device(GPU):
        return tiny_model(**options)


def test_a_read_by_the_host_is_noticed():
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device=GPU).sum().item()


def test_two_devices_are_noticed():
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=GPU) + torch.ones(3)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", SCORES)
def test_the_training_loss_stays_on_the_gpu(name, attention):
    model = on_gpu(name=name, attention=attention).train()
    channels, h, w = model.shape.latent
    loss = BatchLoss(Statistics(0.0, 1.0, (0.0,), (1.0,)), seed=1, precision="float32", device=GPU)
    moments = torch.zeros(4, 2 * channels, h, w, dtype=torch.float16)
    assert loss(model, moments, torch.zeros(4, dtype=torch.long), 64, temperature=0.9).value.device.type == "cuda"


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", SCORES)
def test_sampling_stays_on_the_gpu(name, guidance, attention):
    model = on_gpu(name=name, attention=attention, latent=(3, 2, 2)).eval()  # few tokens: guided mixtures draw slowly
    settings = SamplingSettings(steps=3, guidance=guidance, denoising_steps=5)
    latents = sample(model, [0, 1, 0], settings, source=image_streams(0, range(3)))
    assert (latents.shape, latents.device.type) == ((3, *model.shape.latent), "cuda")


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_modern_blocks_stay_on_the_gpu(attention):
    model = on_gpu(blocks="modern", attention=attention)
    loss = model.train().loss(
        torch.zeros(4, *model.shape.latent, device=GPU),
        torch.zeros(4, dtype=torch.long, device=GPU),
        temperature=1.0,
        source=stream(0),
    )
    assert loss.value.device.type == "cuda"
    settings = SamplingSettings(steps=3, guidance=2.0)
    assert sample(model.eval(), [0, 1, 0], settings, source=image_streams(0, range(3))).device.type == "cuda"


def test_a_step_of_muon_stays_on_the_gpu():
    model = on_gpu()
    groups = parameter_groups(model, weight_decay=0.02, head_rate=0.25)
    optimizer = MuonAdamW(groups, block_matrices(model), learning_rate=0.01, beta1=0.9, beta2=0.95)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.zeros((), device=GPU)
    for _ in range(2):  # the second one has averages to keep or clear
        optimizer.step()
    averages = [optimizer.state[matrix]["momentum_buffer"] for matrix in block_matrices(model)]
    assert {(average.device.type, average.dim()) for average in averages} == {("cuda", 2)}
