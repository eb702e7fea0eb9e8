"""Settings of sampling, passed as one object from the sample stage or `ear.generate` to the sampler."""

from dataclasses import asdict, dataclass, fields
from typing import TypedDict

import numpy as np
from pydantic import ValidationError

from ear import config
from ear.config.checks import check_interval
from ear.config.problems import first_problem
from ear.errors import UserError
from ear.scores.score import DENOISING, Denoising


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
        try:
            values = {name: v.item() if isinstance(v, np.generic) else v for name, v in asdict(self).items()}
            options = config.Sample.model_validate({"count": 1, "batch_size": 1, **values})
        except ValidationError as error:
            raise UserError(first_problem(error, config.Sample)) from error
        check_interval(options)

    @classmethod
    def of(cls, options: config.Sample) -> "SamplingSettings":
        """The settings in section `sample` of params.yaml."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @property
    def denoising(self) -> Denoising:
        """The settings of a diffusion head."""
        return Denoising(self.denoising_steps, self.denoised_limit)
