"""The Hyvarinen score averaged over noise levels: MAR's diffusion loss (Li et al., 2024; Nichol & Dhariwal, 2021).

Denoising score matching at every level of a Gaussian diffusion. A small MLP, conditioned on the hidden state, predicts
the noise and a variance between the two bounds of the posterior. Shapes: N tokens, D token channels, W hidden width, h
head width, T training steps, S sampling steps.
"""

import math

import torch
from torch import Tensor, nn

from ear.config.scores import Hyvarinen
from ear.runtime.randomness import Stream, integers, normal
from ear.scores.modulated_mlp import ModulatedMLP
from ear.scores.score import DENOISING, Denoising, HeadSize, Score, TokenLoss

TRAINING_STEPS = 1000  # noise levels
_TIME_CHANNELS = 256
_INIT_SD = 0.02


class Schedule(nn.Module):
    """Tables of a Gaussian diffusion, float32 [T], computed in float64 from its cumulative signal levels."""

    signal: Tensor  # sqrt(alpha_bar): x_t = signal * x_0 + sigma * noise
    sigma: Tensor  # sqrt(1 - alpha_bar)
    log_beta: Tensor
    log_posterior: Tensor  # logarithm of the variance of x_{t-1} given x_t and x_0
    weight_of_data: Tensor  # mean of x_{t-1} = weight_of_data * x_0 + weight_of_noised * x_t
    weight_of_noised: Tensor

    def __init__(self, alpha_bar: Tensor):
        super().__init__()
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        variance = beta * (1 - before) / (1 - alpha_bar)
        self.steps = len(alpha_bar)
        tables = {
            "signal": alpha_bar.sqrt(),
            "sigma": (1 - alpha_bar).sqrt(),
            "log_beta": beta.log(),
            # The posterior variance of the first step is 0, so its logarithm is taken from the second step.
            "log_posterior": torch.cat([variance[1:2] if len(variance) > 1 else beta, variance[1:]]).log(),
            "weight_of_data": beta * before.sqrt() / (1 - alpha_bar),
            "weight_of_noised": (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)


def cosine_alpha_bar(steps: int) -> Tensor:
    """float64 [T]: the cosine schedule, betas capped at 0.999 (Nichol & Dhariwal, 2021, equation 17)."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def respaced(steps: int) -> Tensor:
    """int64 [S]: the training steps that S sampling steps visit, evenly spaced from the first to the last."""
    if steps == 1:
        return torch.tensor([TRAINING_STEPS - 1])
    return torch.tensor([round(i * (TRAINING_STEPS - 1) / (steps - 1)) for i in range(steps)])


class HyvarinenScore(Score):
    """Diffusion loss per token and the ancestral sampler of its head."""

    temperature_scales = "the noise that each denoising step adds"
    guidance_extrapolates = "predicted noise"

    def __init__(self, options: Hyvarinen, size: HeadSize):
        super().__init__()
        self.samples, self.channels = options.samples, size.token_channels
        width = size.width
        self.token_embedding = nn.Linear(size.token_channels, width)
        self.hidden_embedding = nn.Linear(size.hidden_width, width)
        self.time_embedding = nn.Sequential(nn.Linear(_TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.network = ModulatedMLP(width=width, depth=size.depth, out_channels=2 * size.token_channels)
        self.training_schedule = Schedule(cosine_alpha_bar(TRAINING_STEPS))
        self._sampling: dict[tuple[int, torch.device], tuple[Tensor, Schedule]] = {}

    def evaluations_per_token(self, denoising: Denoising = DENOISING) -> int:
        """One for each denoising step."""
        return denoising.steps

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the time embedding from N(0, 0.02^2); the untrained head predicts 0."""
        for layer in self.time_embedding:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=_INIT_SD, generator=generator)
        self.network.zero_initialise()

    def sampling_schedule(self, steps: int, device: torch.device) -> tuple[Tensor, Schedule]:
        """The training steps that sampling visits, int64 [S], and their tables; made once, not for every token."""
        if (steps, device) not in self._sampling:
            with torch.inference_mode(False):  # so that callers with gradients may use them, too
                times = respaced(steps)
                tables = Schedule(cosine_alpha_bar(TRAINING_STEPS)[times])
                self._sampling[steps, device] = times.to(device), tables.to(device)
        return self._sampling[steps, device]

    def predict(self, noised: Tensor, time: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted noise and variance fraction, [N, D].

        noised: [N, D]. time: training steps, [N], or [1] for all rows. embedded: hidden states after
        `hidden_embedding`, [N, h].
        """
        condition = self.time_embedding(_sinusoids(time)) + embedded
        noise, fraction = self.network(self.token_embedding(noised), condition).chunk(2, dim=-1)
        return noise, (fraction + 1) / 2

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, source: Stream) -> TokenLoss:
        """Hidden [N, W], target [N, D] => loss [N]: squared error of the noise, and the bound that trains the variance.

        The bound, in bits per channel, does not train the predicted noise. Its term at the first step (in the
        published code a likelihood of 8-bit pixels) is left out. The training temperature is ignored.
        """
        rows, device = len(target), target.device
        embedded, target = self.hidden_embedding(hidden).repeat(self.samples, 1), target.repeat(self.samples, 1).float()
        time = integers(TRAINING_STEPS, (len(target),), source, device)
        noise = normal(target.shape, source, device)
        schedule = self.training_schedule
        noised = _at(schedule.signal, time) * target + _at(schedule.sigma, time) * noise
        predicted, fraction = self.predict(noised, time, embedded)
        with torch.autocast(device.type, enabled=False):
            error = (noise - predicted).square().mean(-1)
            bound = self._variance_bound(target, noised, time, predicted.detach(), fraction)
            return TokenLoss((error + bound).view(self.samples, rows).mean(0))

    def _variance_bound(
        self, target: Tensor, noised: Tensor, time: Tensor, predicted: Tensor, fraction: Tensor
    ) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per channel [N]; 0 at the first step."""
        schedule = self.training_schedule
        true_mean = _at(schedule.weight_of_data, time) * target + _at(schedule.weight_of_noised, time) * noised
        denoised = (noised - _at(schedule.sigma, time) * predicted) / _at(schedule.signal, time)
        mean = _at(schedule.weight_of_data, time) * denoised + _at(schedule.weight_of_noised, time) * noised
        true_log, model_log = _at(schedule.log_posterior, time), _log_variance(schedule, time, fraction)
        ratio = (true_log - model_log).exp() + (true_mean - mean).square() * (-model_log).exp()
        divergence = 0.5 * (model_log - true_log + ratio - 1)
        return torch.where(time > 0, divergence.mean(-1) / math.log(2), 0.0)

    def sample(
        self,
        hidden: Tensor,
        *,
        source: Stream,
        temperature: float = 1.0,  # multiplies the noise that each step adds
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        denoising: Denoising = DENOISING,
    ) -> Tensor:
        """Hidden [N, W] => tokens [N, D] by ancestral sampling; guidance extrapolates the predicted noise."""
        times, schedule = self.sampling_schedule(denoising.steps, hidden.device)
        x = normal((len(hidden), self.channels), source, hidden.device)
        both = self.hidden_embedding(hidden if unconditional is None else torch.cat([hidden, unconditional]))
        for step in reversed(range(schedule.steps)):
            noise, fraction = self.predict(x if unconditional is None else x.repeat(2, 1), times[step, None], both)
            if unconditional is not None:
                (conditional, null), fraction = noise.chunk(2), fraction.chunk(2)[0]
                noise = null + guidance * (conditional - null)
            mean, log_variance = _step(schedule, x, noise, fraction, step, denoising.limit)
            added = normal(x.shape, source, x.device) if step else torch.zeros_like(x)
            x = mean + temperature * (0.5 * log_variance).exp() * added
        return x


def _step(
    schedule: Schedule, x: Tensor, noise: Tensor, fraction: Tensor, step: int, limit: float
) -> tuple[Tensor, Tensor]:
    """x = x_t, predicted noise and fraction [N, D] => mean and log-variance of x_{t-1}, [N, D] each."""
    time = torch.full((1,), step, device=x.device)  # the same for all rows
    denoised = (x - _at(schedule.sigma, time) * noise) / _at(schedule.signal, time)
    if limit:
        denoised = denoised.clamp(-limit, limit)
    mean = _at(schedule.weight_of_data, time) * denoised + _at(schedule.weight_of_noised, time) * x
    return mean, _log_variance(schedule, time, fraction)


def _at(table: Tensor, time: Tensor) -> Tensor:
    """table [T], time [N] => [N, 1]."""
    return table[time][:, None]


def _log_variance(schedule: Schedule, time: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate log-variances between the posterior's (fraction 0) and beta's (fraction 1)."""
    return fraction * _at(schedule.log_beta, time) + (1 - fraction) * _at(schedule.log_posterior, time)


def _sinusoids(time: Tensor) -> Tensor:
    """time [N] => cosines and sines of 128 frequencies, from 1 to 1/10000 [N, 256]."""
    half = _TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
