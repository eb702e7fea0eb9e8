"""Settings of sampling, passed as one object from the sample stage or `ear.generate` to the sampler."""

from dataclasses import dataclass, fields
from typing import TypedDict, get_args

from ear import config
from ear.errors import UserError
from ear.scores.hyvarinen import TRAINING_STEPS
from ear.scores.score import DENOISING, Denoising

_ALLOWED = {
    name: get_args(config.Sample.model_fields[name].annotation)
    for name in ("schedule", "precision", "decoder_precision")
}


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingSettings` but for the seed, as keyword arguments."""

    steps: int
    guidance: float
    schedule: str
    guidance_from: float
    guidance_to: float
    temperature: float
    denoising_steps: int
    denoised_limit: float
    precision: str
    decoder_precision: str


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of sampling. Raises UserError for values that section `sample` of params.yaml would refuse, too."""

    steps: int = 16  # unmasking steps; ignored by causal models (one step per token)
    guidance: float = 1.0  # classifier-free guidance scale; 1: off
    schedule: str = "linear"  # guidance over the steps: linear or constant
    guidance_from: float = 0.0  # guidance acts while more than this share of the tokens is known after the step
    guidance_to: float = 1.0  # and not more than this share
    temperature: float = 1.0  # inference temperature of the score
    denoising_steps: int = DENOISING.steps  # hyvarinen: denoising steps per token
    denoised_limit: float = DENOISING.limit  # hyvarinen: clamp of predicted tokens, in standard deviations; 0: off
    seed: int = 0  # image k is drawn from the random stream (seed, k)
    precision: str = "float32"  # of the model; bfloat16 is autocast
    decoder_precision: str = "float32"  # of the tokenizer's decoder

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, but must be at least 1.")
        if not 1 <= self.denoising_steps <= TRAINING_STEPS:
            raise UserError(f"denoising_steps is {self.denoising_steps}, but must be from 1 to {TRAINING_STEPS}.")
        for name in ("guidance", "temperature", "denoised_limit"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 0.")
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be {' or '.join(map(repr, allowed))}.")
        if not 0 <= self.guidance_from < self.guidance_to <= 1:
            raise UserError(
                f"guidance_from is {self.guidance_from} and guidance_to {self.guidance_to}, but they must be shares of "
                "the tokens, from 0 to 1, the first one smaller."
            )

    @classmethod
    def of(cls, options: config.Sample) -> "SamplingSettings":
        """The settings in section `sample` of params.yaml."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @property
    def denoising(self) -> Denoising:
        """The settings of a diffusion head."""
        return Denoising(self.denoising_steps, self.denoised_limit)
