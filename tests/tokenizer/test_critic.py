"""The patch critic: its judgement, its adaptive weight, its start, its state."""

import pytest
import torch
from factories import section
from torch import nn

from ear.runtime.randomness import generator
from ear.tokenizer.critic import CriticTraining, PatchCritic, adaptive_weight, hinge_loss

pytestmark = pytest.mark.usefixtures("one_thread")
START = 8


def training(**changes) -> CriticTraining:
    network = PatchCritic().initialise(generator(0, "critic"))
    sizes = {"batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3}
    loss = {"adversarial_weight": 0.5, "adversarial_start": START}
    options = section("tokenizer", **{**sizes, **loss, **changes})
    return CriticTraining(network, options, rate=lambda images: 1.0)


def images(*names: object) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=generator(1, *names)) * 2 - 1


class Decoder(nn.Module):
    """A stand-in for the decoder: blurs real images and ends in a 1 x 1 convolution, its last layer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(3, 3, 1, bias=False)
        self.last.weight.data = 0.5 * torch.eye(3)[:, :, None, None]

    def forward(self, real: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.avg_pool2d(real, 3, stride=1, padding=1))


def judged(critic: CriticTraining, position: int, decoder: Decoder | None = None) -> tuple[torch.Tensor, dict]:
    decoder, real = decoder or Decoder(), images(position)
    decoded = decoder(real)
    return critic(real, decoded, (real - decoded).abs().mean(), decoder.last.weight, position)


def learned(critic: CriticTraining, position: int) -> tuple[torch.Tensor, dict]:
    """`judged`, and the critic's step behind it."""
    result = judged(critic, position)
    critic.step(position)
    return result


def test_logits_stand_for_patches():
    """Each is moved by the pixels of its patch of 70 x 70 alone (Isola et al. 2017) where none is normalised away."""
    network = PatchCritic()
    assert network(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert network(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    plain = nn.Sequential(*(m for m in network.layers if not isinstance(m, nn.GroupNorm)))
    picture = torch.zeros(1, 3, 256, 256, requires_grad=True)
    plain(picture)[0, 0, 15, 15].backward()
    touched = picture.grad[0].abs().sum(0).nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [70, 70]


def test_judgement_of_an_image_does_not_depend_on_the_batch():
    network, batch = training().network, torch.cat([images(0), images(1)])
    torch.testing.assert_close(network(batch)[:1], network(batch[:1]))


def test_hinge_loss_counts_what_is_not_yet_told_apart():
    assert hinge_loss(torch.tensor([3.0]), torch.tensor([-3.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert hinge_loss(torch.tensor([-1.0, 1.0]), torch.tensor([1.0])) == 0.5 * (1 + 2)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_and_limited():
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction, adversarial = layer.square().sum(), (layer * torch.tensor([0.6, 0.8])).sum()
    assert float(adaptive_weight(reconstruction, adversarial, layer)) == pytest.approx(10, rel=1e-5)
    assert float(adaptive_weight(reconstruction, 1e-3 * adversarial, layer)) == 100
    assert float(adaptive_weight(reconstruction, 0 * adversarial, layer)) == 100


def test_critic_learns_to_tell_images_from_blurred_ones():
    critic = training()
    losses = [float(learned(critic, position)[1]["critic_loss"]) for position in range(4, 64, 2)]
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert losses[-1] < 0.3
    _, figures = judged(critic, 64)
    assert float(figures["critic_real"]) > 0.5 > -0.5 > float(figures["critic_fake"])


def test_critic_is_idle_then_learns_then_contributes_to_the_loss():
    critic = training()
    before = [p.clone() for p in critic.network.parameters()]
    term, idle = learned(critic, 0)
    assert term == 0
    assert set(map(float, idle.values())) == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, critic.network.parameters(), strict=True))

    term, learning = learned(critic, START // 2)
    assert term == 0
    assert learning["critic_loss"] > 0
    assert learning["adversarial_weight"] == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, critic.network.parameters(), strict=True))

    decoder = Decoder()
    term, heard = judged(critic, START, decoder)
    assert term.item() == pytest.approx((heard["adversarial_weight"] * heard["adversarial"]).item())
    assert idle.keys() == learning.keys() == heard.keys()
    term.backward()
    assert decoder.last.weight.grad.norm() > 0
    assert all(p.grad is None or not p.requires_grad for p in critic.network.parameters())


def test_diverged_critic_spoils_the_gradient_that_the_trainer_guards():
    critic, decoder = training(), Decoder()
    critic.network.layers[0].bias.data[0] = float("nan")
    term, _ = judged(critic, START // 2, decoder)
    term.backward()
    assert decoder.last.weight.grad.isnan().all()


def test_both_gradients_are_equally_strong_at_the_last_layer():
    critic, decoder, real = training(adversarial_weight=1.0, adversarial_start=0), Decoder(), images(0)
    decoded = decoder(real)
    reconstruction = (real - decoded).abs().mean()
    term, _ = critic(real, decoded, reconstruction, decoder.last.weight, 0)
    norms = [torch.autograd.grad(x, decoder.last.weight, retain_graph=True)[0].norm() for x in (reconstruction, term)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-3)


def test_micro_batches_teach_a_critic_what_their_batch_does():
    real, decoder = torch.cat([images(0), images(1)]), Decoder()
    critics = [training(batch_size=4), training(batch_size=4)]
    for critic, size in zip(critics, (4, 1), strict=True):
        figures = []
        for at in range(0, 4, size):
            part = real[at : at + size]
            decoded = decoder(part)
            loss = (part - decoded).abs().mean()
            figures.append(critic(part, decoded, loss, decoder.last.weight, START // 2 + at)[1]["critic_loss"])
        critic.gradients = [p.grad.clone() for p in critic.network.parameters()]
        critic.mean = torch.stack(figures).mean()
        critic.step(START // 2)
    torch.testing.assert_close(critics[0].gradients, critics[1].gradients, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(critics[0].mean, critics[1].mean)
    assert all(p.grad is None for critic in critics for p in critic.network.parameters())


def test_its_state_brings_it_back_exactly():
    first = training()
    for position in range(4, 12, 2):
        learned(first, position)
    second = training()
    second.restore(first.state() | {"weights.other": torch.zeros(1)})
    for critic in (first, second):
        learned(critic, 12)
    a, b = first.state(), second.state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("critic.optimizer.exp_avg.") for name in a)
    with pytest.raises(ValueError, match="lacks layers"):
        second.restore({})
