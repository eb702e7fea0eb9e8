"""The energy score: identities of the estimator, strict propriety on analytic distributions, the head it trains."""

import itertools
import math

import pytest
import torch
import toy
from factories import score_options

from ear.runtime.randomness import generator, stream
from ear.scores.energy import EnergyScore, distance, energy_loss
from ear.scores.score import HeadSize

DOUBLE = torch.float64


def draws(*shape, seed=0, name="draws"):
    return torch.randn(*shape, generator=generator(seed, name), dtype=DOUBLE)


def published(x1, x2, y, *, alpha, temperature):
    """|x1 - y|^a + |x2 - y|^a - temperature |x1 - x2|^a."""
    norm = lambda v: v.norm(dim=-1).pow(alpha)  # noqa: E731 - a formula, not a function
    return norm(x1 - y) + norm(x2 - y) - temperature * norm(x1 - x2)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 1.75])
@pytest.mark.parametrize("temperature", [1.0, 0.99])
def test_disjoint_pairs_give_the_mean_of_published_losses(alpha, temperature):
    x, y = draws(4, 200, 16), draws(1, 200, 16, name="y")
    ours = energy_loss(x, y, alpha=alpha, temperature=temperature, smoothing=0.0, pairs="disjoint")
    both = [published(*pair, y[0], alpha=alpha, temperature=temperature) for pair in (x[:2], x[2:])]
    assert torch.allclose(ours, sum(both) / 2, atol=1e-10)
    assert not torch.allclose(ours, energy_loss(x, y, alpha=alpha, temperature=temperature, smoothing=0.0))


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 1.75])
@pytest.mark.parametrize("temperature", [1.0, 0.99])
def test_two_samples_give_the_published_loss(alpha, temperature):
    x, y = draws(2, 1000, 16), draws(1, 1000, 16, name="y")
    ours = energy_loss(x, y, alpha=alpha, temperature=temperature, smoothing=0.0)
    assert torch.allclose(ours, published(*x, y[0], alpha=alpha, temperature=temperature), atol=1e-10)


def test_more_samples_average_all_pairs():
    x, y = draws(4, 50, 3), draws(2, 50, 3, name="y")
    pairs = [published(a, b, t, alpha=1.0, temperature=0.9) for a, b in itertools.combinations(x, 2) for t in y]
    expected = torch.stack(pairs).mean(dim=0)
    assert torch.allclose(energy_loss(x, y, alpha=1.0, temperature=0.9, smoothing=0.0), expected, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.7])
@pytest.mark.parametrize(("m", "k"), [(2, 1), (4, 1), (3, 2)])
def test_gradient_against_central_differences(alpha, m, k):
    x, y = draws(m, 3, 4).requires_grad_(), draws(k, 3, 4, name="y")
    loss = lambda v: energy_loss(v, y, alpha=alpha, temperature=0.95)  # noqa: E731 - handed to gradcheck
    assert torch.autograd.gradcheck(lambda v: loss(v).sum(), (x,), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_closed_form_gradient():
    x, y = draws(2, 64, 16).requires_grad_(), draws(1, 64, 16, name="y")
    energy_loss(x, y, alpha=1.0, temperature=0.9, smoothing=1e-9).sum().backward()
    unit = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731 - a formula
    expected = unit(x[0] - y[0]) - 0.9 * unit(x[0] - x[1])
    assert torch.allclose(x.grad[0], expected.detach(), atol=1e-12)


def test_one_dimension_is_twice_the_crps():
    """CRPS of N(0, 1) at y has the closed form y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi)."""
    for y in torch.linspace(-3, 3, 13, dtype=DOUBLE):
        x = draws(2, 100_000, 1, name=f"crps{y:.2f}")
        loss = energy_loss(x, y.expand(1, 100_000, 1), alpha=1.0)
        density = math.exp(-(float(y) ** 2) / 2) / math.sqrt(2 * math.pi)
        crps = y * (2 * torch.special.ndtr(y) - 1) + 2 * density - 1 / math.sqrt(math.pi)
        assert abs(loss.mean() - 2 * crps) < 4.5 * loss.std() / math.sqrt(100_000)


def expected_gaussian_loss(sigma, *, alpha, temperature=1.0):
    """Expected loss of the forecast N(0, sigma^2 I) for data N(0, I), up to a factor: E|N(0, v I)|^a ~ v^(a/2)."""
    return 2 * (1 + sigma**2) ** (alpha / 2) - temperature * (2 * sigma**2) ** (alpha / 2)


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (1.0, 0.9), (0.5, 1.0), (1.5, 0.99), (1.9, 1.0)])
def test_estimate_agrees_with_the_exact_expectation(alpha, temperature):
    """The formula above is not taken on faith: sampled losses meet it, up to the constant E|N(0, I)|^alpha."""
    constant = 2 ** (alpha / 2) * math.gamma(8 + alpha / 2) / math.gamma(8)  # E|N(0, I_16)|^alpha
    for sigma in (0.5, 1.0, 2.0):
        x, y = sigma * draws(4, 50_000, 16), draws(1, 50_000, 16, name="y")
        loss = energy_loss(x, y, alpha=alpha, temperature=temperature)
        exact = constant * expected_gaussian_loss(
            torch.tensor(sigma, dtype=DOUBLE), alpha=alpha, temperature=temperature
        )
        assert abs(loss.mean() - exact) < 4.5 * loss.std() / math.sqrt(50_000)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_unbiased_where_keeping_the_diagonal_is_not(m):
    """At the truth the expected gradient by scale is zero; pairing samples with themselves biases it."""
    scale = torch.ones(4000, 1, dtype=DOUBLE, requires_grad=True)
    x, y = scale * draws(m, 4000, 16), draws(1, 4000, 16, name="y")
    energy_loss(x, y, alpha=1.0).sum().backward()
    unbiased = scale.grad[:, 0]
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(4000)
    scale.grad = None
    x = scale * draws(m, 4000, 16)
    energy_loss(x, y, alpha=1.0, temperature=(m - 1) / m).sum().backward()
    biased = scale.grad[:, 0]
    assert biased.mean() > 10 * biased.std() / math.sqrt(4000)


def test_all_pairs_have_less_gradient_variance_than_disjoint_ones():
    scale = torch.ones(8000, 1, dtype=DOUBLE, requires_grad=True)
    x, y = scale * draws(4, 8000, 16), draws(1, 1, 16, name="y")  # the variance given y
    (all_pairs,) = torch.autograd.grad(energy_loss(x, y, alpha=1.0).sum(), scale, retain_graph=True)
    (pairs,) = torch.autograd.grad(energy_loss(x, y, alpha=1.0, pairs="disjoint").sum(), scale)
    assert all_pairs.var() < 0.7 * pairs.var()


@pytest.mark.parametrize("m", [4, 6, 8])
def test_antithetic_samples_do_not_repel_each_other(m):
    x, y = draws(m, 50, 3), draws(1, 50, 3, name="y")
    chosen = [(i, j) for i, j in itertools.combinations(range(m), 2) if j != i + m // 2]
    norm = lambda v: v.norm(dim=-1)  # noqa: E731 - a formula
    expected = 2 * norm(x - y).mean(dim=0) - sum(norm(x[i] - x[j]) for i, j in chosen) / len(chosen)
    assert torch.allclose(energy_loss(x, y, alpha=1.0, smoothing=0.0, pairs="antithetic"), expected, atol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.5), (1.0, 1.0), (1.0, 2.0), (1.5, 1.0)])
def test_antithetic_noise_keeps_the_expectation_and_lowers_the_variance(alpha, sigma):
    """Of the loss, against its exact expectation, and of the gradient with respect to the location, given y."""
    half, y = draws(2, 50_000, 16), draws(1, 50_000, 16, name="y")
    x = sigma * torch.cat([half, -half])
    loss = energy_loss(x, y, alpha=alpha, pairs="antithetic")
    constant = 2 ** (alpha / 2) * math.gamma(8 + alpha / 2) / math.gamma(8)
    exact = constant * expected_gaussian_loss(torch.tensor(sigma, dtype=DOUBLE), alpha=alpha)
    assert abs(loss.mean() - exact) < 4.5 * loss.std() / math.sqrt(50_000)

    def variance(noise, pairs):
        location = torch.zeros(50_000, 16, dtype=DOUBLE, requires_grad=True)
        loss = energy_loss(location + sigma * noise, y[:, :1], alpha=alpha, pairs=pairs)
        return torch.autograd.grad(loss.sum(), location)[0].var(dim=0).sum()

    assert variance(torch.cat([half, -half]), "antithetic") < 0.4 * variance(draws(4, 50_000, 16, name="other"), "all")


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_a_head_draws_antithetic_noise_in_training_only(noise):
    score = head(samples=4, pairs="antithetic", noise=noise)
    with torch.no_grad():
        score.network.output.weight.normal_(generator=generator(5))
    hidden, y = torch.randn(64, 8, generator=generator(1)), torch.randn(64, 2, generator=generator(2))
    half = score.draw_noise((2, 64), stream(3), hidden.device)
    samples = score.generate(hidden, torch.cat([half, -half]))
    expected = energy_loss(samples, y[None], alpha=1.0, pairs="antithetic")
    assert torch.equal(score.loss(hidden, y, temperature=1.0, source=stream(3)).value, expected)
    drawn = score.sample(hidden, source=stream(3))
    assert torch.equal(drawn, score.generate(hidden, score.draw_noise((64,), stream(3), hidden.device)))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_equivariance_under_rotation_shift_and_scale(alpha):
    rotation = torch.linalg.qr(draws(16, 16, name="rotation")).Q
    x, y = draws(3, 200, 16), draws(1, 200, 16, name="y")
    move = lambda v: 2.5 * v @ rotation.T + 1.0  # noqa: E731 - a formula
    before = energy_loss(x, y, alpha=alpha, smoothing=0.0)
    after = energy_loss(move(x), move(y), alpha=alpha, smoothing=0.0)
    assert torch.allclose(after, 2.5**alpha * before, rtol=1e-11)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0, 1.25, 1.5, 1.99])
def test_finite_where_samples_coincide(alpha):
    x = torch.zeros(4, 16).expand(2, 4, 16).clone().requires_grad_()
    loss = energy_loss(x, torch.zeros(1, 4, 16), alpha=alpha)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()


def test_distances_are_float32_under_autocast():
    near = torch.tensor([[1.0, 2.0]])
    far = near + 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = energy_loss(torch.stack([near, far]), near[None], alpha=1.0)
        direct = distance(near.bfloat16(), far.bfloat16(), alpha=1.0, smoothing=1e-6)
    assert loss.dtype == direct.dtype == torch.float32
    assert abs(loss.item()) < 1e-5  # |far - near| - |near - far|, exact only in float32


def head(*, token_channels: int = 2, **options) -> EnergyScore:
    """An untrained head; options are not checked, so that alpha can be 2."""
    changed = score_options("energy").model_copy(update={"noise_channels": 16, **options})
    size = HeadSize(hidden_width=8, token_channels=token_channels, width=32, depth=2)
    score = EnergyScore(changed, size)
    for module in score.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight, generator=generator(0, "head"))
            torch.nn.init.zeros_(module.bias)
    score.initialise(generator(0, "head"))
    return score


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.9])
def test_untrained_head_gives_zero_twice_the_distance_and_finite_gradients(alpha):
    score = head(token_channels=16, alpha=alpha, smoothing=1e-2 if alpha < 1 else 1e-6)
    hidden, y = torch.randn(64, 8, generator=generator(1)), torch.randn(64, 16, generator=generator(2))
    loss = score.loss(hidden, y, temperature=1.0, source=stream(3)).value
    loss.mean().backward()
    smoothed = (y.square().sum(-1) + score.smoothing**2).pow(alpha / 2) - score.smoothing**alpha
    assert torch.allclose(loss, 2 * smoothed, rtol=1e-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in score.parameters())
    assert score.network.output.bias.grad.abs().sum() > 0


def test_noise_kinds():
    shape, device = (4000,), torch.device("cpu")
    uniform = head().draw_noise(shape, stream(0), device)
    gaussian = head(noise="gaussian").draw_noise(shape, stream(0), device)
    assert uniform.shape == gaussian.shape == (4000, 16)
    assert -0.5 <= uniform.min() < -0.49
    assert 0.49 < uniform.max() < 0.5
    assert abs(gaussian.std() - 1) < 0.02


def test_inference_temperature_scales_the_shift_of_blocks_only():
    score = head()
    with torch.no_grad():
        score.network.output.weight.normal_(generator=generator(5))
        for block in score.network.blocks:
            block.modulation.bias.fill_(0.5)  # a constant shift, scale and gate
    hidden, noise = torch.randn(3, 8, generator=generator(1)), torch.rand(3, 16, generator=generator(2))
    full, none = score.generate(hidden, noise, 1.0), score.generate(hidden, noise, 0.0)
    assert not torch.allclose(full, none)
    with torch.no_grad():
        for block in score.network.blocks:
            block.modulation.bias[:32] = 0.0  # the shift's part
    assert torch.allclose(score.generate(hidden, noise, 1.0), none)


def test_guidance_extrapolates_the_hidden_state():
    score = head()
    with torch.no_grad():
        score.network.output.weight.normal_(generator=generator(5))
    conditional, null = torch.randn(2, 3, 8, generator=generator(1))
    guided = score.sample(conditional, source=stream(9), unconditional=null, guidance=3.0)
    by_hand = score.sample(3.0 * conditional - 2.0 * null, source=stream(9))
    assert torch.equal(guided, by_hand)


# A head alone learns a conditional mixture (tests/toy.py).


@pytest.fixture(scope="module")
def trained() -> EnergyScore:
    """With two samples per token, as published."""
    torch.set_num_threads(1)  # before `one_thread`, which is a fixture of single tests
    return toy.fit(head())


def test_head_recovers_a_conditional_mixture(one_thread, trained):
    for condition in (-1.0, 1.0):
        figures = toy.judge(trained, condition)
        assert figures.squared_energy_distance < 0.015
        assert figures.weight_error < 0.06


def test_alpha_two_collapses_to_the_mean(one_thread):
    """What strict propriety buys: the squared distance, refused by the schema, learns the conditional mean alone."""
    trained = toy.fit(head(alpha=2.0), steps=300)
    assert max(toy.judge(trained, condition).squared_energy_distance for condition in (-1.0, 1.0)) > 0.3


def test_low_training_temperature_narrows_the_forecast(one_thread, trained):
    """Training temperature below 1 is improper: it sharpens."""
    sharp = toy.fit(head(), temperature=0.8)
    assert toy.judge(sharp, 1.0).spread < 0.95 * toy.judge(trained, 1.0).spread


def test_intervals_of_a_trained_head_cover_as_they_should(one_thread, trained):
    """Calibration: the central 80% of its samples holds 80% of the truth, along the line of the modes."""
    assert 0.74 < toy.coverage(trained, 1.0) < 0.86


def test_a_trained_head_repels_half_as_much_as_it_attracts(one_thread, trained):
    """At the optimum E d(x, y) = E d(x, x') = E d(y, y'): attraction counts it twice."""
    conditions = torch.ones(4096)
    truth = toy.mixture(conditions, generator(1, "y"))
    loss = trained.loss(toy.hidden(conditions), truth, temperature=1.0, source=stream(2))
    attraction, repulsion = loss.parts["attraction"].mean(), loss.parts["repulsion"].mean()
    torch.testing.assert_close(loss.value.mean(), attraction - repulsion)
    assert (repulsion / attraction).item() == pytest.approx(0.5, rel=0.05)
