"""Options of each score, one class each, and the flat `score` section that holds the keys of all of them.

To add a score, write its class here, add it to `OPTIONS` and to the bases and the `name` of `Score`.
"""

from typing import Literal

from pydantic import Field

from ear.config.sections import MOVED, Lengths, Section
from ear.errors import UserError

Pairs = Literal["all", "disjoint", "antithetic"]


class ScoreOptions(Section):
    """What all scores have: a name."""

    name: str

    def check(self) -> None:
        """Raise UserError if two options contradict each other."""


class SampleBased(ScoreOptions):
    """Options of the scores estimated from samples of a noise-driven head."""

    samples: int = Field(description="samples per token, at least 2", ge=1)
    pairs: Pairs = Field(
        description="pairs of samples that repel each other: all, disjoint (as published) or antithetic (all but those "
        "of opposite noise, z and -z; least variance)"
    )
    targets: int = Field(description="draws of each target from the tokenizer's posterior", ge=1)
    noise: Literal["uniform", "gaussian"] = Field(description="uniform on [-0.5, 0.5) or gaussian")
    noise_channels: int = Field(description="noise dimensions per token", ge=1)

    def check(self) -> None:
        """Raise UserError if `samples` is 1, odd with disjoint or antithetic pairs, or 2 with antithetic ones."""
        if self.samples < 2:
            raise UserError(
                f"score.samples is {self.samples}, but score.name is {self.name}, which compares samples with each "
                "other; set it to at least 2."
            )
        fewest = 4 if self.pairs == "antithetic" else 2
        if self.pairs != "all" and (self.samples % 2 or self.samples < fewest):
            raise UserError(
                f"score.samples is {self.samples}, but with score.pairs {self.pairs} must be even and at least "
                f"{fewest}; change one of them."
            )


class Energy(SampleBased):
    """Options of the energy score."""

    alpha: float = Field(description="exponent of the distance, strictly between 0 and 2", gt=0, lt=2)
    smoothing: float = Field(
        description="distances are smoothed below this length; 1e-6, or 1e-2 for alpha < 1", ge=1e-12
    )


class Kernel(SampleBased):
    """Options of the Gaussian kernel score."""

    bandwidths: Lengths = Field(
        description="widths of the Gaussian kernels, in units of sqrt(token channels)", min_length=1
    )


class Logarithmic(ScoreOptions):
    """Options of the logarithmic score, the likelihood of a Gaussian mixture."""

    components: int = Field(description="Gaussians of the mixture", ge=1)
    covariance: Literal["diagonal", "full"] = Field(description="diagonal or full")
    scale_floor: float = Field(description="smallest standard deviation, in units of the latents'", gt=0)


class Hyvarinen(ScoreOptions):
    """Options of the Hyvarinen score, the diffusion loss."""

    samples: int = Field(description="noise levels per token and step", ge=1)


class Categorical(ScoreOptions):
    """Options of the quantised baseline."""

    codes: int = Field(description="size of the k-means codebook", ge=2)


OPTIONS: dict[str, type[ScoreOptions]] = {
    "energy": Energy,
    "kernel": Kernel,
    "logarithmic": Logarithmic,
    "hyvarinen": Hyvarinen,
    "categorical": Categorical,
}


class Score(Categorical, Hyvarinen, Logarithmic, Kernel, Energy):
    """The flat section: a name, and the options of every score. Options of the other scores have no effect."""

    name: Literal["energy", "kernel", "logarithmic", "hyvarinen", "categorical"] = Field(
        description="energy, kernel, logarithmic (GIVT), hyvarinen (diffusion loss) or categorical (quantised baseline)"
    )

    @property
    def chosen(self) -> ScoreOptions:
        """The options of the score that `name` selects."""
        kind = OPTIONS[self.name]
        return kind(**{key: getattr(self, key) for key in kind.model_fields})

    def check(self) -> None:
        """Check the chosen score's options only."""
        self.chosen.check()


def score_options(content: dict) -> ScoreOptions:
    """Options of one score from plain values, such as those stored with a model.

    Raises UserError for an unknown name, pydantic.ValidationError for wrong keys or values.
    """
    # Models of an earlier version hold keys that have moved to another section.
    content = {key: value for key, value in content.items() if f"score.{key}" not in MOVED}
    name = content.get("name")
    if name not in OPTIONS:
        raise UserError(f"score.name is {name!r}, but must be one of {', '.join(OPTIONS)}.")
    return OPTIONS[name].model_validate(content)


def owners(key: str) -> dict[str, list[str]]:
    """Description of an option => the names of the scores that have it under that description."""
    found: dict[str, list[str]] = {}
    for name, kind in OPTIONS.items():
        if key in kind.model_fields:
            found.setdefault(kind.model_fields[key].description or "", []).append(name)
    return found
