"""What is compared, as changes of params.yaml: every score at one budget, and the ablations of the paper.

Each rule is sampled at several guidance scales, since the best scale differs; that needs no further training.
Scales are chosen on images of another sampling seed than those reported. Every model is trained from several seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ear import config
from flows.experiments import experiment_name
from flows.runs import APART

Values = Mapping[str, Any]  # {"section.key": value}

GUIDANCE = (1.0, 1.4, 1.8, 2.5)
RULES: dict[str, Values] = {
    "energy": {"score.name": "energy"},
    "kernel": {"score.name": "kernel"},
    "logarithmic, diagonal": {"score.name": "logarithmic", "score.covariance": "diagonal"},
    "logarithmic, full": {"score.name": "logarithmic", "score.covariance": "full"},
    "hyvarinen": {"score.name": "hyvarinen"},
    "hyvarinen, 10 steps": {"score.name": "hyvarinen", "sample.denoising_steps": 10},
    "categorical": {"score.name": "categorical"},
    "energy, masked": {"score.name": "energy", "model.attention": "bidirectional", "model.order": "random"},
    "energy, causal raster": {"score.name": "energy", "model.attention": "causal", "model.order": "raster"},
}


@dataclass(frozen=True)
class Ablation:
    """One question about the energy score and the changes that answer it."""

    title: str
    text: str
    variants: tuple[Values, ...]


def _each(key: str, *values: Any) -> tuple[Values, ...]:
    return tuple({key: value} for value in values)


ABLATIONS = (
    Ablation(
        "Exponent of the distance",
        "Strictly proper for alpha in (0, 2); at 2 only the mean would be learned, so 2 is refused.",
        ({"score.alpha": 0.75, "score.smoothing": 0.01}, *_each("score.alpha", 1.0, 1.25, 1.5, 1.75)),
    ),
    Ablation(
        "Samples per token",
        "More samples, other pairs of them, or more draws of the target change only the variance of the gradient.",
        (*_each("score.samples", 2, 4, 8), *_each("score.pairs", "disjoint", "antithetic"), {"score.targets": 4}),
    ),
    Ablation(
        "Training temperature",
        "The weight of the repulsion between samples; below 1 the score is not strictly proper and samples move "
        "towards the mode.",
        tuple(
            {"train.temperature": train, "finetune.temperature": finetune}
            for train, finetune in ((1.0, 1.0), (1.0, 0.99), (0.99, 0.99), (0.95, 0.95))
        ),
    ),
    Ablation("Noise", "The distribution that the head turns into tokens.", _each("score.noise", "uniform", "gaussian")),
    Ablation("Width of the noise", "Noise dimensions per token.", _each("score.noise_channels", 8, 32, 128)),
    Ablation("Width of the head", "Width of its residual blocks.", _each("model.head_width", 64, 128, 256)),
    Ablation(
        "Rate of the head",
        "The learning rate of the head's matrices relative to that of all others; published: 0.25.",
        _each("train.head_rate", 0.25, 1.0),
    ),
    Ablation(
        "Blocks",
        "As in ViT, or with RMSNorm, normalised queries and keys, SwiGLU and rotary positions.",
        _each("model.blocks", "vit", "modern"),
    ),
    Ablation(
        "Attention and order",
        "Masked tokens, several per step, or one token after the other.",
        (
            {"model.attention": "bidirectional", "model.order": "random"},
            *({"model.attention": "causal", "model.order": order} for order in ("random", "raster")),
        ),
    ),
    Ablation(
        "Optimiser",
        "Muon for the matrices of the blocks, or AdamW for all, with rates around the best of each.",
        (
            *({"train.optimizer": "muon", "train.learning_rate": rate} for rate in (0.002, 0.004)),
            *({"train.optimizer": "adamw", "train.learning_rate": rate} for rate in (0.001, 0.002)),
        ),
    ),
    Ablation(
        "Size of the embeddings",
        "Standard deviation of embeddings of classes, positions and the mask before training; published: 0.02.",
        _each("train.embedding_sd", 0.02, 0.5),
    ),
    Ablation(
        "Inference temperature",
        "Scales the noise-dependent shifts in the head's blocks; the trained model is the same in all rows.",
        _each("sample.temperature", 0.7, 0.85, 1.0, 1.15),
    ),
    Ablation(
        "Guidance",
        "Scale of the extrapolation from the hidden state without the class to the one with it; one trained model.",
        _each("sample.guidance", *GUIDANCE),
    ),
    Ablation("Steps", "Passes in which the tokens are drawn; one trained model.", _each("sample.steps", 4, 8, 16)),
)
ABLATION_TITLES = tuple(ablation.title for ablation in ABLATIONS)


@dataclass(frozen=True)
class Scope:
    """What is compared: rules, each at these guidance scales, and ablations, from so many training seeds."""

    rules: Sequence[str] = tuple(RULES)
    scales: Sequence[float] = GUIDANCE
    ablations: Sequence[str] = ABLATION_TITLES
    seeds: int = 3


def distinct(rules: Sequence[str], parameters: config.Parameters) -> tuple[str, ...]:
    """The rules without those that equal an earlier one here: energy is masked or causal already."""
    found: dict[str, str] = {}
    for rule in rules:
        found.setdefault(run_name(changes(RULES[rule], parameters)), rule)
    return tuple(found.values())


def default_run(parameters: config.Parameters, budget: Values) -> Values:
    """The energy score with only the budget changed."""
    return changes({"score.name": "energy", **budget}, parameters)


def rule_runs(parameters: config.Parameters, budget: Values, scope: Scope) -> dict[str, dict[float, list[Values]]]:
    """Rule => guidance scale => the changes of params.yaml for each training seed, to choose the scale by.

    budget: the keys that all runs share.
    """
    apart = {"sample.seed": parameters.sample.seed + APART}
    return {
        rule: {scale: _seeded({**rule_at(rule, budget, scale), **apart}, parameters, scope) for scale in scope.scales}
        for rule in scope.rules
    }


def reported_runs(
    parameters: config.Parameters, budget: Values, scope: Scope, scales: Mapping[str, float]
) -> dict[str, list[Values]]:
    """Rule => the changes of params.yaml for each training seed, at the scale chosen for the rule."""
    return {rule: _seeded(rule_at(rule, budget, scale), parameters, scope) for rule, scale in scales.items()}


def rule_at(rule: str, budget: Values, scale: float) -> Values:
    """The keys of a rule with its budget and its guidance scale."""
    return {**RULES[rule], **budget, "sample.guidance": scale}


def ablation_runs(
    parameters: config.Parameters, budget: Values, scope: Scope
) -> dict[str, list[tuple[Values, list[Values]]]]:
    """Ablation => its variants (including params.yaml itself), each with the changes of params.yaml for each seed."""
    default = default_run(parameters, budget)
    found: dict[str, list[tuple[Values, list[Values]]]] = {}
    for ablation in ABLATIONS:
        if ablation.title not in scope.ablations:
            continue
        runs = [(variant, changes({**default, **variant}, parameters)) for variant in ablation.variants]
        if default not in [values for _, values in runs]:
            runs.insert(0, ({key: config.value_of(parameters, key) for key in ablation.variants[0]}, default))
        found[ablation.title] = [(variant, _seeded(values, parameters, scope)) for variant, values in runs]
    return found


def _seeded(values: Values, parameters: config.Parameters, scope: Scope) -> list[Values]:
    """The changes for each of the training seeds, which begin at that of params.yaml."""
    first = parameters.train.seed
    return [changes({**values, "train.seed": seed}, parameters) for seed in range(first, first + scope.seeds)]


def changes(values: Values, parameters: config.Parameters) -> Values:
    """The values that differ from the parameters, so that equal runs have equal changes and one name."""
    return {key: value for key, value in values.items() if value != config.value_of(parameters, key)}


def run_name(values: Values) -> str:
    """The name of a run's DVC experiment."""
    return experiment_name(values, prefix="compare")


def file_name(rule: str) -> str:
    """A rule as part of a path: logarithmic-full."""
    return rule.replace(",", "").replace(" ", "-")
