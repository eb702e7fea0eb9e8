"""docs/scores.md from the results of a comparison: the text around the tables stands here, every figure in the results.

`flows.compare` collects the results: budget, floor, held_out_accuracy, sampling, benchmarks, rules, ablations; the last
two are absent where they were not asked for.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flows.comparison import ABLATIONS, file_name

FIGURES = ("fid", "class_accuracy", "precision", "recall")  # of one run
_GRID_WIDTH, _GRIDS_PER_ROW = 240, 3  # pixels on the page


def page(results: Mapping[str, Any]) -> str:
    """The whole document."""
    parts = [_introduction(results)]
    if "rules" in results:
        parts += [
            _rules(results),
            _guidance(results["rules"]),
            _facts(results["benchmarks"]),
            _costs(results["benchmarks"]),
            _grids(results["rules"]),
        ]
    if "ablations" in results:
        parts.append(_ablations(results))
    return "\n\n".join([*parts, _reading(results)]) + "\n"


def best(runs: Iterable[Mapping]) -> Mapping:
    """The run with the lowest FID, the first of equals."""
    return min(runs, key=lambda run: run["fid"])


def _introduction(results: Mapping) -> str:
    budget = results["budget"]
    return f"""# Scores side by side

*Written by `python -m flows.compare`; run it again rather than editing this page.*

One transformer, one set of cached latents, one budget for all models of a table: {_budget(budget)} images in training,
and {budget["finetune_images"]:,} in the second phase; code and `params.yaml` are those of commit
`{budget["commit"][:10]}`. A rule is chosen by its own keys alone (`score.name`, `score.covariance`, `model.attention`,
`model.order`); nothing else was tuned for it but the guidance scale."""


def _budget(budget: Mapping) -> str:
    """Training images by part: 64,000 (scores) and 22,400 (ablations)."""
    names = {"rules": "scores", "ablations": "ablations"}
    return " and ".join(f"{count:,} ({names[part]})" for part, count in budget["train_images"].items())


def _rules(results: Mapping) -> str:
    rows = []
    for rule in results["rules"]:
        run = best(rule["runs"])
        ratio = f"{run['fid'] / results['floor']:.2f}"
        rows.append([rule["rule"], f"{run['guidance']:g}", *_figures(run), ratio])
    head = ["score", "guidance", "FID", "class accuracy", "precision", "recall", "FID / floor"]
    return "## The scores\n\nEach at the guidance scale with its lowest FID.\n\n" + table(head, rows)


def _guidance(rules: list[Mapping]) -> str:
    scales = [run["guidance"] for run in rules[0]["runs"]]
    rows = [
        [rule["rule"], *(f"{run['fid']:.4g} ({run['class_accuracy']:.3f})" for run in rule["runs"])] for rule in rules
    ]
    head = ["score", *(f"guidance {scale:g}" for scale in scales)]
    return "FID (class accuracy) by guidance scale:\n\n" + table(head, rows)


def _facts(benchmarks: Mapping) -> str:
    rows = []
    for rule, row in benchmarks["scores"]["figures"]["rules"].items():
        facts = row["facts"]
        proper = "yes" if facts["strictly_proper"] else "no"
        rows.append([rule, proper, facts["temperature_scales"], facts["guidance_extrapolates"]])
    head = ["score", "strictly proper", "the inference temperature scales", "guidance extrapolates the"]
    return f"""## What they are

Strictly proper over the tokens that the head can draw (the categorical one draws those of its codebook alone), at
training temperature 1.

{table(head, rows)}"""


def _costs(benchmarks: Mapping) -> str:
    figures, machine = benchmarks["scores"]["figures"], benchmarks["scores"]["machine"]
    sampling = figures["sampling"]
    rows = [
        [
            rule,
            f"{row['parameters']:,.0f}",
            f"{row['training_images_per_second']:.0f}",
            f"{row['sampling_images_per_second']:.0f}",
            *(f"{row['evaluations_per_image'][network]:,.0f}" for network in ("transformer", "head")),
        ]
        for rule, row in figures["rules"].items()
    ]
    head = ["score", "parameters", "training images/s", "sampling images/s", "transformer passes", "head evaluations"]
    device = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    return f"""## What they cost

Passes and evaluations are per image, without guidance; guidance doubles what the transformer does. Rates are medians
of turns that the rules took one after another (`python -m benchmarks.scores`), at guidance {sampling["guidance"]:g},
{sampling["steps"]} steps and {sampling["batch_size"]} images at once, without the tokenizer's decoder, on {device}.
{_load(machine)}

{table(head, rows)}

{_heads(benchmarks["heads"]["figures"])}"""


def _heads(figures: Mapping) -> str:
    """The energy score against the diffusion loss, head against head."""
    steps = figures["digits"]["evaluations_per_token"]["hyvarinen"]
    digits, base = (f"{figures[size]['hyvarinen_over_energy']:.0f}" for size in ("digits", "base"))
    return f"""In the head alone, drawing a token by {steps} steps of the diffusion loss takes {digits} times as long as
by the energy score at the size used here, and {base} times at the size of the published base model
(`python -m benchmarks.heads`)."""


def _load(machine: Mapping) -> str:
    """A warning where other work was running."""
    if machine["load"] <= machine["cores"]:
        return "The machine had nothing else to do."
    return (
        f"Other work shared the machine ({machine['load']:g} processes wanted its {machine['cores']} cores at the "
        "end): compare these rates with each other only."
    )


def _grids(rules: list[Mapping]) -> str:
    cells = [
        f'<td align="center"><img src="scores/{file_name(rule["rule"])}.png" width="{_GRID_WIDTH}"><br>'
        f"{rule['rule']}, guidance {best(rule['runs'])['guidance']:g}</td>"
        for rule in rules
    ]
    rows = [cells[i : i + _GRIDS_PER_ROW] for i in range(0, len(cells), _GRIDS_PER_ROW)]
    body = "\n".join("<tr>\n" + "\n".join(row) + "\n</tr>" for row in rows)
    return f"## What they draw\n\nThe first images of each rule; a column is a class.\n\n<table>\n{body}\n</table>"


def _ablations(results: Mapping) -> str:
    sampling = results["sampling"]
    parts = [
        f"""## Ablations of the energy score

One change at a time from `params.yaml` at the same budget (guidance {sampling["guidance"]:g}, temperature
{sampling["temperature"]:g}, {sampling["steps"]} steps where not said otherwise). The row in bold is `params.yaml`."""
    ]
    for ablation in ABLATIONS:
        rows = [_ablation_row(row) for row in results["ablations"][ablation.title]]
        head = [ablation.title, "FID", "class accuracy", "precision", "recall"]
        parts.append(f"### {ablation.title}\n\n{ablation.text}\n\n{table(head, rows)}")
        if "score.pairs" in {key for row in results["ablations"][ablation.title] for key in row["values"]}:
            parts.append(_variance(results["benchmarks"]["variance"]["figures"]))
    return "\n\n".join(parts)


def _variance(figures: Mapping) -> str:
    """What all pairs of the samples save."""
    rows = []
    for name, of in figures.items():
        ratios = [*of["perfect_forecast"]["ratio"].values(), of["head_weights"]["ratio"]]
        rows.append([name.removeprefix("m="), *(f"{ratio:.3f}" for ratio in ratios)])
    names = [name.replace("_", " ") for name in next(iter(figures.values()))["perfect_forecast"]["ratio"]]
    return f"""Variance of the gradient with all pairs of m samples, over that with disjoint pairs of the same samples
(`python -m benchmarks.variance`): by location and scale of a perfect forecast, and by the weights of a trained head.

{table(["m", *names, "head weights"], rows)}"""


def _ablation_row(row: Mapping) -> list[str]:
    name = ", ".join(f"`{key}` {value}" for key, value in row["values"].items())
    return [f"**{name}**" if row["default"] else name, *_figures(row)]


def _figures(run: Mapping) -> list[str]:
    return [f"{run['fid']:.4g}", *(f"{run[name]:.3f}" for name in FIGURES[1:])]


def _reading(results: Mapping) -> str:
    chance = " (the ablation of that name shows how large it is)" if "ablations" in results else ""
    return f"""## How to read the figures

FID, precision and recall are measured in the features of a classifier trained on the real training images, which is
right for {results["held_out_accuracy"]:.3f} of the real held-out ones; class accuracy is the share of generated images
that it takes for the class they were drawn for. The FID between real held-out and real training images, the floor, is
{results["floor"]:.4g}; what lies below it is nearer to the training images than unseen real ones are, as a model that
remembers some of them would be. Each model was trained once and drew {results["sampling"]["count"]:,} images, so small
differences are chance{chance}. No figure here compares with published ones.

    python -m flows.compare                # all of it; goes on where it was stopped
    python -m flows.compare --only rules   # the scores without the ablations
    dvc exp show                           # the experiments behind the tables; `dvc exp apply NAME` brings one back"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
