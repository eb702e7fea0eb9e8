"""Every score behind the one interface: propriety, closed forms, and a head that learns a conditional mixture."""

import math
from typing import get_args

import factories
import pytest
import torch
import toy
from factories import tiny_model
from toy import head

from ear import config, scores
from ear.config import Score
from ear.config.compose import compose
from ear.config.scores import OPTIONS, score_options
from ear.errors import UserError
from ear.runtime.randomness import generator, image_streams, stream
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.scores import hyvarinen, logarithmic
from ear.scores.kernel import KernelScore
from ear.scores.logarithmic import Mixture, guided
from ear.scores.score import Denoising

DOUBLE = torch.float64
TOY = {  # options beside those of factories.score_options
    "kernel": {"samples": 4},
    "logarithmic": {"components": 4},
    "hyvarinen": {"samples": 4},
    "categorical": {"codes": 64},
}


@pytest.mark.parametrize("name", [name for name in scores.SCORES if name != "energy"])  # which is in test_energy.py
def test_head_recovers_a_conditional_mixture(one_thread, name):
    steps = 1000 if name == "hyvarinen" else 600
    trained = toy.fit(head(name, **TOY.get(name, {})), steps=steps)
    for condition in (-1.0, 1.0):
        figures = toy.judge(trained, condition, count=2000)
        assert figures.squared_energy_distance < 0.02, figures
        assert figures.weight_error < 0.06, figures
    if name == "logarithmic":  # calibration: the central 80% of its samples holds 80% of the truth
        assert 0.74 < toy.coverage(trained, 1.0) < 0.86


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_one_gaussian_cannot_but_a_mixture_can(one_thread, covariance):
    """The toy problem discriminates: a single Gaussian misses it."""
    one = toy.fit(head("logarithmic", components=1, covariance=covariance), steps=300)
    assert toy.judge(one, 1.0).squared_energy_distance > 0.03


@pytest.mark.parametrize("name", scores.SCORES)
def test_every_score_serves_model_and_sampler(name):
    model = tiny_model(name=name, samples=2)
    latents = torch.randn(64, 3, 4, 4, generator=generator(0))
    model.score.learn(latents.permute(0, 2, 3, 1).reshape(-1, 3), seed=0)
    labels = torch.arange(64) % 3
    loss = model.loss(latents, labels, temperature=1.0, source=stream(1)).value
    loss.backward()
    assert loss.isfinite()
    assert sum(p.grad.abs().sum() for p in model.score.parameters() if p.grad is not None) > 0
    settings = SamplingSettings(steps=3, guidance=2.0, temperature=0.9)
    together = sample(model, labels[:4], settings, source=image_streams(3, range(4)))
    apart = sample(model, labels[2:4], settings, source=image_streams(3, [2, 3]))
    torch.testing.assert_close(together[2:], apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", scores.SCORES)
def test_network_evaluations_are_counted(name):
    """evaluations_per_token is what a hook on the head's last layer counts."""
    score, denoising = head(name), Denoising(steps=7)
    last = score.projection if hasattr(score, "projection") else score.network.output
    calls = []
    last.register_forward_hook(lambda *_: calls.append(1))
    score.sample(torch.zeros(3, toy.HIDDEN), source=stream(0), denoising=denoising)
    assert len(calls) == score.evaluations_per_token(denoising) == (7 if name == "hyvarinen" else 1)


@pytest.mark.parametrize("name", scores.SCORES)
def test_facts_for_whoever_compares_scores(name):
    score = head(name, targets=3)
    assert all(score.facts()[fact] for fact in ("temperature_scales", "guidance_extrapolates"))
    assert score.targets == (3 if name in ("energy", "kernel") else 1)


def test_every_score_has_options_a_class_and_a_place_in_the_flat_section():
    """What to touch for a new score: its class and entry (ear.scores), its options and the section's bases and name
    (ear.config.scores), its defaults (conf/config.yaml). Then `ear configure` writes params.yaml anew."""
    names = list(scores.SCORES)
    assert list(OPTIONS) == names, "ear.config.scores.OPTIONS and ear.scores.SCORES must have the same names"
    choices = get_args(Score.model_fields["name"].annotation)
    assert list(choices) == names, "the `name` of ear.config.scores.Score must list every score"
    for name, kind in OPTIONS.items():
        absent = kind.model_fields.keys() - Score.model_fields.keys()
        assert not absent, f"make {kind.__name__} a base of ear.config.scores.Score: it lacks {absent}"
        assert isinstance(compose([f"score.name={name}"]).score.chosen, kind), "give its defaults in conf/config.yaml"


def test_unknown_score_lists_the_known_ones():
    with pytest.raises(UserError, match="'brier', but must be one of energy, kernel, logarithmic, hyvarinen, categor"):
        score_options({"name": "brier"})


# Kernel score


def test_kernel_distance_is_bounded_and_its_expectation_is_the_closed_form():
    """1 - E exp(-x^2 / 2s^2) for x ~ N(0, v)."""
    score = head("kernel", token_channels=1, bandwidths=(0.5, 1.0))
    assert isinstance(score, KernelScore)
    far = score.distance(torch.zeros(1, 1), torch.full((1, 1), 1e4))
    assert far.item() == 1.0

    def expected(v):
        return sum(1 - (1 + v / s**2) ** -0.5 for s in (0.5, 1.0)) / 2

    x, y = torch.randn(2, 100_000, 1, generator=generator(0))
    assert abs(score.distance(x, y).mean() - expected(2.0)) < 0.005


# Logarithmic score


def random_mixture(full: bool, n=5, k=3, d=4) -> Mixture:
    source = generator(0, "mixture", full)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=DOUBLE)  # noqa: E731 - a shorthand
    if full:
        factors = draw(n, k, d, d).tril(-1) + torch.diag_embed(draw(n, k, d).abs() + 0.3)
    else:
        factors = draw(n, k, d).abs() + 0.3
    return Mixture(draw(n, k), draw(n, k, d), factors)


@pytest.mark.parametrize("full", [False, True])
def test_mixture_density_against_torch(full):
    m = random_mixture(full)
    y = torch.randn(5, 4, generator=generator(1), dtype=DOUBLE)
    covariance = {"scale_tril": m.factors if full else torch.diag_embed(m.factors)}
    parts = torch.distributions.MultivariateNormal(m.means, **covariance)
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=m.logits), parts)
    assert torch.allclose(m.log_density(y[:, None])[:, 0], expected.log_prob(y), atol=1e-10)
    points = torch.randn(5, 3, 4, generator=generator(2), dtype=DOUBLE)
    separate = torch.stack([expected.log_prob(points[:, k]) for k in range(3)], dim=1)
    assert torch.allclose(m.log_density(points), separate, atol=1e-10)


def test_density_integrates_to_one():
    score = head("logarithmic", token_channels=1, components=3)
    grid = torch.linspace(-30, 30, 60_001)[:, None]
    density = score.mixture(torch.randn(1, toy.HIDDEN, generator=generator(0))).log_density(grid[None])[0].exp()
    assert abs(torch.trapezoid(density.double(), grid[:, 0].double()) - 1) < 1e-4


def test_expected_log_score_is_the_cross_entropy():
    sigma = torch.arange(0.3, 3, 0.001, dtype=DOUBLE)
    expected = sigma.log() + 1 / (2 * sigma**2)  # cross-entropy of N(0, sigma^2) for data N(0, 1), up to a constant
    y = torch.randn(200_000, 1, generator=generator(0), dtype=DOUBLE)
    for value, exact in zip(sigma[::900], expected[::900], strict=True):
        forecast = Mixture(torch.zeros(1, 1, dtype=DOUBLE), torch.zeros(1, 1, 1, dtype=DOUBLE), value.view(1, 1, 1))
        estimate = -forecast.log_density(y[None]).mean() - 0.5 * math.log(2 * math.pi)
        assert abs(estimate - exact) < 0.03 * (1 + 1 / value**2)


def test_components_start_different_so_that_they_can_part(one_thread):
    trained = toy.fit(head("logarithmic", components=4), steps=200)
    assert trained.mixture(toy.hidden(torch.ones(1))).means.std(dim=1).max() > 0.1


def test_full_covariance_learns_a_negative_correlation(one_thread):
    score = head("logarithmic", components=1, covariance="full")
    optimizer = torch.optim.Adam(score.parameters(), lr=0.02)
    source, noise, state = generator(0, "correlated"), stream(0, "correlated"), torch.ones(256, toy.HIDDEN)
    for _ in range(300):
        x = torch.randn(256, 2, generator=source)
        target = torch.stack([x[:, 0], -0.8 * x[:, 0] + 0.6 * x[:, 1]], dim=-1)
        optimizer.zero_grad()
        score.loss(state, target, temperature=1.0, source=noise).value.mean().backward()
        optimizer.step()
    with torch.no_grad():
        drawn = score.sample(torch.ones(4000, toy.HIDDEN), source=noise)
    assert abs(torch.corrcoef(drawn.T)[0, 1] + 0.8) < 0.05


def fixed(score, **parameters):
    """The score with a head that says the same of every hidden state: its last layer's biases."""
    with torch.no_grad():
        score.projection.weight.zero_()
        score.projection.bias.copy_(torch.cat([torch.as_tensor(values) for values in parameters.values()]))
    return score


def test_temperature_scales_the_standard_deviations():
    score = fixed(head("logarithmic", components=1), logit=[0.0], mean=[3.0, -1.0], scale=[0.0, 1.5])
    hidden = torch.zeros(20_000, toy.HIDDEN)
    scales = torch.tensor([1.0, 2.0])  # square plus of 0 and 1.5
    for temperature in (1.0, 0.5):
        drawn = score.sample(hidden, source=stream(0), temperature=temperature)
        assert (drawn.mean(0) - torch.tensor([3.0, -1.0])).abs().max() < 0.05
        assert (drawn.std(0) / scales - temperature).abs().max() < 0.02
    assert torch.equal(score.sample(hidden[:1], source=stream(0), temperature=0.0), torch.tensor([[3.0, -1.0]]))


def test_codes_near_temperature_zero_and_nan_for_nan_states():
    score = head("categorical", codes=3)
    score.codebook.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    with torch.no_grad():
        score.projection.bias.copy_(torch.tensor([-1e30, 5.0, 4.9]))
    hidden = torch.zeros(50, toy.HIDDEN)
    for temperature in (0.0, 1e-40):
        assert (score.sample(hidden, source=stream(0), temperature=temperature) == 2).all()
    assert score.sample(hidden, source=stream(0)).unique().tolist() == [2.0, 3.0]
    for name in ("categorical", "logarithmic"):
        assert head(name).sample(hidden * torch.nan, source=stream(0)).isnan().all()


def two_gaussians(weights, means, scales, *, full: bool, tokens: int) -> Mixture:
    """One-dimensional mixtures, the same for all tokens."""
    logits, means, scales = (torch.tensor(values).expand(tokens, -1) for values in (weights, means, scales))
    return Mixture(logits.log(), means[..., None], scales[..., None, None] if full else scales[..., None])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.5, 2.5])
def test_guided_tokens_follow_the_product_of_powers(scale, full):
    """Against moments on a grid of p_c^scale p_u^(1 - scale), p_c and p_u being mixtures that overlap."""

    def mixtures(tokens: int) -> tuple[Mixture, Mixture]:
        conditional = two_gaussians([0.3, 0.7], [-1.0, 0.7], [0.6, 0.5], full=full, tokens=tokens)
        return conditional, two_gaussians([0.5, 0.5], [-0.8, 0.3], [0.9, 1.0], full=full, tokens=tokens)

    c, u = mixtures(1)
    grid = torch.linspace(-6, 6, 40_000)[:, None]
    log = (scale * c.log_density(grid[None]) + (1 - scale) * u.log_density(grid[None]))[0].double()
    weight, grid = log.softmax(0), grid[:, 0].double()
    mean = (weight * grid).sum()
    sd = (weight * (grid - mean) ** 2).sum().sqrt()
    drawn = guided(*mixtures(40_000), scale=scale, source=stream(0)).double()
    assert abs(drawn.mean() - mean) < 0.03
    assert abs(drawn.std() - sd) < 0.03


@pytest.mark.parametrize("full", [False, True])
def test_blocks_of_candidates_do_not_change_what_is_drawn(full, monkeypatch):
    c = random_mixture(full)
    u = Mixture(c.logits, c.means + 0.5, c.factors)
    at_once = guided(c, u, scale=2.0, source=stream(0))
    monkeypatch.setattr(logarithmic, "_CPU_BLOCK", 7 * c.factors.numel())  # 64 candidates in blocks of 7
    assert torch.equal(guided(c, u, scale=2.0, source=stream(0)), at_once)
    assert not torch.equal(at_once, c.draw(stream(0)))


def test_guidance_leads_away_from_the_unconditional_prediction():
    """Through the head, whose component's mean is where the hidden state says."""
    score = head("logarithmic", components=1, token_channels=4)
    with torch.no_grad():
        score.projection.weight.zero_()
        score.projection.bias.zero_()
        score.projection.weight[1:5, 0] = 0.5
    here, null = torch.zeros(2, 20_000, toy.HIDDEN)
    here[:, 0] = 1.0
    for scale, least in ((1.0, 0.0), (1.4, 0.15), (3.0, 0.6)):
        drawn = score.sample(here, source=stream(0), unconditional=null, guidance=scale)
        assert least < drawn.mean() - 0.5 + 0.02
        assert drawn.mean() < 0.5 * scale + 0.02  # what the formula says is never exceeded
    halved = score.sample(here, source=stream(0), unconditional=null, guidance=3.0, temperature=0.5)
    assert halved.std() < 0.55


def test_guidance_that_is_no_density_stays_inside_the_condition():
    """The quotient of Gaussians has no integral where the unconditional one is narrower."""
    c = two_gaussians([1.0], [0.7], [2.0], full=False, tokens=10_000)
    u = two_gaussians([1.0], [-0.4], [0.1], full=False, tokens=10_000)
    drawn = guided(c, u, scale=3.0, source=stream(0))
    assert (drawn - 0.7).abs().max() < 6 * 2.0
    assert (drawn + 0.4).abs().min() > 0.1  # away from what the condition makes less likely


# Hyvarinen score


def test_cosine_schedule_and_posterior_tables():
    alpha_bar = hyvarinen.cosine_alpha_bar(1000)
    assert alpha_bar[-1].item() == pytest.approx(2.4e-9, rel=0.05)
    schedule = hyvarinen.Schedule(alpha_bar)
    # The posterior mean of a fixed point is the point: x_0 = x_t = 0 aside, weights keep the signal level.
    before = torch.cat([torch.ones(1, dtype=DOUBLE), alpha_bar[:-1]])
    assert torch.allclose(
        schedule.weight_of_data + schedule.weight_of_noised * schedule.signal, before.sqrt().float(), atol=1e-6
    )


def test_respaced_steps_span_the_training_steps():
    assert hyvarinen.respaced(100)[[0, 1, -1]].tolist() == [0, 10, 999]
    assert hyvarinen.respaced(1000).tolist() == list(range(1000))
    assert hyvarinen.respaced(1).tolist() == [999]


def test_params_yaml_knows_how_many_steps_there_are():
    content = compose(["sample.denoising_steps=1000"]).model_dump()
    assert config.parse(content).sample.denoising_steps == hyvarinen.TRAINING_STEPS
    content["sample"]["denoising_steps"] += 1
    with pytest.raises(ValueError, match=r"sample\.denoising_steps is 1001, but must be .* at most 1000"):
        config.parse(content)
    with pytest.raises(ValueError, match=r"^denoising_steps is 1001, but must be at least 1 and at most 1000\.$"):
        SamplingSettings(denoising_steps=1001)


def test_the_clamp_keeps_an_imperfect_head_in_range():
    untrained = head("hyvarinen")
    hidden = torch.randn(500, toy.HIDDEN, generator=generator(0, "hidden"))
    clamped, free = (
        untrained.sample(hidden, source=stream(0), denoising=Denoising(limit=limit)).abs().max() for limit in (3.0, 0.0)
    )
    assert clamped < 3.5
    assert free > 10


def test_options_of_a_model_that_had_its_sampling_among_them_are_read():
    stored = {"name": "hyvarinen", "samples": 4, "sampling_steps": 50, "denoised_limit": 5.0}
    assert score_options(stored) == score_options({"name": "hyvarinen", "samples": 4})


class ExactGaussian(hyvarinen.HyvarinenScore):
    """Predicts the noise of N(0.7, 0.4^2) exactly, and the optimal variance."""

    def predict(self, noised, time, embedded):
        level = hyvarinen.cosine_alpha_bar(hyvarinen.TRAINING_STEPS)[time].float()[:, None]
        variance = level * 0.16 + 1 - level
        noise = (noised - level.sqrt() * 0.7) * (1 - level).sqrt() / variance
        return noise, self.fraction(time)

    def fraction(self, time):
        """Between the logarithms of posterior variance and beta: the exact variance of x_{t-1} given x_t."""
        times, s = self.sampling_schedule(100, time.device)
        step = int((times == time[0]).nonzero()[0])
        level = (s.signal[step] ** 2).item()
        of_data, remaining = s.weight_of_data[step].item(), 1 - level
        given = 0.16 * remaining / (level * 0.16 + remaining)  # variance of x_0 given x_t
        log = math.log(max(math.exp(s.log_posterior[step].item()) + of_data**2 * given, 1e-30))
        low, high = s.log_posterior[step].item(), s.log_beta[step].item()
        return torch.full((len(time), 1), (log - low) / (high - low) if high > low else 0.0)


def test_ancestral_sampler_with_the_exact_score_and_variance():
    size = scores.HeadSize(hidden_width=4, token_channels=1, width=8, depth=1)
    sampler = ExactGaussian(factories.score_options("hyvarinen", samples=2), size)
    drawn = sampler.sample(torch.zeros(100_000, 4), source=stream(0), denoising=Denoising(steps=100))
    assert abs(drawn.mean() - 0.7) < 0.014
    assert abs(drawn.std() / 0.4 - 1) < 0.02


class ConstantNoise(hyvarinen.HyvarinenScore):
    """Predicts as noise the first number of the hidden state."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        torch.nn.init.eye_(self.hidden_embedding.weight)
        torch.nn.init.zeros_(self.hidden_embedding.bias)

    def predict(self, noised, time, embedded):
        return embedded[:, :1].expand_as(noised), torch.zeros_like(noised)


def test_diffusion_guidance_extrapolates_the_predicted_noise_and_temperature_scales_the_added():
    size = scores.HeadSize(hidden_width=4, token_channels=2, width=8, depth=1)
    head = ConstantNoise(factories.score_options("hyvarinen", samples=1), size)

    def draw(hidden: torch.Tensor, **options) -> torch.Tensor:
        return head.sample(hidden, source=stream(0), denoising=Denoising(steps=10, limit=0.0), **options)

    one, two, four = (torch.full((5, 4), value) for value in (1.0, 2.0, 4.0))
    torch.testing.assert_close(draw(two, unconditional=one, guidance=3.0), draw(four))  # 1 + 3 (2 - 1) = 4

    drawn = {t: draw(one, temperature=t) for t in (0.0, 0.5, 1.0)}
    # The steps are affine in what they add, and the constant noise makes their sum so too.
    torch.testing.assert_close(drawn[0.5], (drawn[0.0] + drawn[1.0]) / 2, rtol=1e-3, atol=1e-3)
    assert (drawn[1.0] - drawn[0.0]).abs().max() > 0.1


# Categorical score


def test_codebook_is_learned_and_tokens_are_represented_by_it():
    score = head("categorical", codes=4)
    centres = torch.tensor([[0.0, 0.0], [0.0, 5.0], [5.0, 0.0], [5.0, 5.0]])
    tokens = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=generator(0))
    score.learn(tokens, seed=0)
    assert torch.cdist(centres, score.codebook).min(dim=1).values.max() < 0.1
    represented = score.represent(tokens)
    assert (represented - tokens).norm(dim=-1).max() < 0.6
    assert len(represented.unique(dim=0)) == 4
    with pytest.raises(ValueError, match=r"score\.codes is 4, but must be at most 3 \(number of tokens\)"):
        score.learn(tokens[:3], seed=0)


def numbered_codes(probabilities):
    """A head that draws code k, whose first channel is k, with these probabilities."""
    score = fixed(head("categorical", codes=len(probabilities)), logits=probabilities.log())
    score.codebook[:, 0] = torch.arange(len(probabilities))
    return score


def test_categorical_sampling_follows_its_probabilities():
    probabilities = torch.tensor([0.2, 0.3, 0.5])
    score, hidden = numbered_codes(probabilities), torch.zeros(20_000, toy.HIDDEN)
    drawn = score.sample(hidden, source=stream(0))[:, 0].long()
    assert (torch.bincount(drawn, minlength=3) / 20_000 - probabilities).abs().max() < 0.02
    assert (score.sample(hidden[:5], source=stream(0), temperature=0.0)[:, 0] == 2).all()


def test_categorical_guidance_extrapolates_the_logits():
    score = numbered_codes(torch.tensor([0.2, 0.3, 0.5]))
    score.projection.weight.data[:, 0] = torch.tensor([1.0, 0.0, -1.0])
    here, null = torch.zeros(2, 20_000, toy.HIDDEN)
    here[:, 0] = 1.0
    drawn = score.sample(here, source=stream(0), unconditional=null, guidance=2.5)[:, 0].long()
    logits = 2.5 * score.logits(here[:1])[0] - 1.5 * score.logits(null[:1])[0]
    assert (torch.bincount(drawn, minlength=3) / 20_000 - logits.softmax(-1)).abs().max() < 0.02
