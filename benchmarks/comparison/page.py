"""The pages of a comparison from their results: tables are made here, the text around them is in *.md.j2.

`compare` collects the results. Both pages: budget, parameters, floor, equal_images, held_out_accuracy, benchmarks.
Scores: rules. Ablations: ablations.
"""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.comparison.plan import ABLATIONS, file_name

FIGURES = ("fid_ratio", "fid", "class_accuracy", "precision", "recall", "nearest_ratio")  # of one run
_HEADS = ["FID / floor", "FID", "class accuracy", "precision", "recall", "nearest"]
_GRIDS_PER_ROW = 3
TITLES = {"scores": "Scores side by side", "ablations": "Ablations of the energy score"}


def page(name: str, results: Mapping[str, Any]) -> str:
    """The complete document of that name, a key of TITLES."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    tables = {"scores": _scores, "ablations": _ablations}[name](results)
    shared = ("budget", "floor", "equal_images", "held_out_accuracy")
    return environment.get_template(f"{name}.md.j2").render(
        title=TITLES[name],
        sampling=results["parameters"]["sample"],
        data=results["parameters"]["data"],
        **{key: results[key] for key in shared},
        **tables,
    )


def joined(results: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Add the ablations that only the earlier results have, if both can share a page; else return `results`.

    They can if budget, floor and the rows in bold are equal, since all differences are taken from those rows. The page
    names the commit of each ablation: later code may have changed something that only an ablation uses.
    """
    if _in_bold(results) != _in_bold(earlier):
        return dict(results)
    return {**results, **{key: {**earlier[key], **results[key]} for key in ("ablations", "commits")}}


def _in_bold(results: Mapping) -> tuple[Any, ...]:
    bold = next(each["runs"] for variants in results["ablations"].values() for each in variants if each["default"])
    return {**results["budget"], "commit": ""}, results["floor"], bold


def best(runs: Mapping[float, Sequence[Mapping]]) -> float:
    """The key whose runs have the lowest mean FID / floor; the first one if several have it."""
    return min(runs, key=lambda key: _mean(runs[key], "fid_ratio"))


def _scores(results: Mapping) -> dict[str, Any]:
    """The tables about all rules, and the cells of their grids."""
    rules, benchmarks = results["rules"], results["benchmarks"]
    measured = benchmarks["scores"]["figures"]["rules"]
    scales = [scale["guidance"] for scale in rules[0]["choice"]]
    chosen = {"guidance": [f"{scale:g}" for scale in scales], "rules": [rule["rule"] for rule in rules]}
    return {
        "best": _best_table(rules),
        "guidance": _guidance_table(rules),
        "at_the_edge": [rule["rule"] for rule in rules if rule["guidance"] in (min(scales), max(scales))],
        "command": _command("rules", "images", results["budget"], chosen),
        "facts": _facts_table(measured),
        "costs": _costs_table(measured),
        "grids": _grids(rules),
        "rates": _rates(benchmarks["scores"]),
        "heads": _heads(benchmarks["heads"]["figures"]),
    }


def _best_table(rules: list[Mapping]) -> str:
    first = rules[0]  # which the others are compared with
    rows = [
        [rule["rule"], f"{rule['guidance']:g}", *_figures(rule["runs"]), _difference(rule["runs"], first["runs"])]
        for rule in rules
    ]
    return table(["score", "guidance", *_HEADS, f"FID / floor minus that of {first['rule']}"], rows)


def _guidance_table(rules: list[Mapping]) -> str:
    scales = [scale["guidance"] for scale in rules[0]["choice"]]
    rows = [
        [
            rule["rule"],
            *(
                f"{_mean(scale['runs'], 'fid_ratio'):.2f} ({_mean(scale['runs'], 'class_accuracy'):.3f})"
                for scale in rule["choice"]
            ),
        ]
        for rule in rules
    ]
    return table(["score", *(f"guidance {scale:g}" for scale in scales)], rows)


def _facts_table(measured: Mapping) -> str:
    rows = []
    for rule, row in measured.items():
        facts = row["facts"]
        rows.append([rule, facts["temperature_scales"], facts["guidance_extrapolates"]])
    return table(["score", "the inference temperature scales", "guidance extrapolates the"], rows)


def _costs_table(measured: Mapping) -> str:
    rows = [
        [
            rule,
            f"{row['parameters']:,.0f}",
            f"{row['training_images_per_second']:.0f}",
            f"{row['sampling_images_per_second']:.0f}",
            *(f"{row['evaluations_per_image'][network]:,.0f}" for network in ("transformer", "head")),
        ]
        for rule, row in measured.items()
    ]
    head = ["score", "parameters", "training images/s", "sampling images/s", "transformer passes", "head evaluations"]
    return table(head, rows)


def _rates(benchmark: Mapping) -> dict[str, Any]:
    """Under which conditions the rates were measured."""
    machine, sampling = benchmark["machine"], benchmark["figures"]["sampling"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    device = cpu if sampling["device"] == "cpu" else f"{sampling['device']} ({cpu})"
    return {**sampling, "device": device, "load": machine["load"]}


def _heads(figures: Mapping) -> dict[str, Any]:
    """The head of the energy score against that of the diffusion loss."""
    steps = figures["digits"]["evaluations_per_token"]["hyvarinen"]
    return {"steps": steps, **{size: f"{figures[size]['hyvarinen_over_energy']:.0f}" for size in ("digits", "base")}}


def _grids(rules: list[Mapping]) -> list[list[dict[str, Any]]]:
    cells = [{"rule": rule["rule"], "file": file_name(rule["rule"]), "guidance": rule["guidance"]} for rule in rules]
    return [cells[i : i + _GRIDS_PER_ROW] for i in range(0, len(cells), _GRIDS_PER_ROW)]


def _ablations(results: Mapping) -> dict[str, Any]:
    """Each ablation with its table."""
    parts = []
    for ablation in ABLATIONS:
        if ablation.title not in results["ablations"]:
            continue
        variants = results["ablations"][ablation.title]
        default = next(each["runs"] for each in variants if each["default"])
        rows = [_ablation_row(each["values"], each["runs"], default) for each in variants]
        pairs = any("score.pairs" in each["values"] for each in variants)
        parts.append(
            {
                "title": ablation.title,
                "text": ablation.text,
                "table": table([ablation.title, *_HEADS, "minus the bold"], rows),
                "variance": _variance_table(results["benchmarks"]["variance"]["figures"]) if pairs else "",
            }
        )
    chosen = {"ablations": [part["title"] for part in parts]}
    command = _command("ablations", "ablation-images", results["budget"], chosen)
    return {"ablations": parts, "commits": _of_commits(results), "command": command}


def _of_commits(results: Mapping) -> str:
    """Which code the ablations are of: one commit, or some of another one each."""
    last = results["budget"]["commit"]
    titles: dict[str, list[str]] = {}
    for ablation in ABLATIONS:
        if ablation.title in results["commits"]:
            titles.setdefault(results["commits"][ablation.title], []).append(ablation.title)
    others = [f"{', '.join(of_it)} (`{commit[:10]}`)" for commit, of_it in titles.items() if commit != last]
    text = f"The code is that of commit `{last[:10]}`."
    if not others:
        return text
    earlier = "Some ablations were run with earlier code, which gave the same figures in bold"
    return f"{text} {earlier}: {'; '.join(others)}."


def _command(part: str, images: str, budget: Mapping[str, Any], chosen: Mapping[str, Sequence[str]]) -> str:
    """The command that makes a page again, two models at a time."""
    counts = {images: budget["train_images"], "seeds": budget["seeds"], "threads": budget["threads"], "jobs": 2}
    options = [f"--{name} {value}" for name, value in counts.items()]
    options += [f"--{name} {shlex.join(values)}" for name, values in chosen.items()]
    return f"python -m benchmarks.comparison --only {part} {' '.join(options)}"


def _variance_table(figures: Mapping) -> str:
    """Rows of `benchmarks.variance`: each way to pair samples, relative to disjoint pairs of as many samples."""
    rows, names = [], []
    for count, measured in figures.items():
        forecast, weights = measured["perfect_forecast"], measured["head_weights"]
        names = [name.replace("_", " ") for name in forecast["disjoint"]]
        for pairs in (key for key in weights if key != "disjoint"):
            ratios = [forecast[pairs][key] / value for key, value in forecast["disjoint"].items()]
            ratios.append(weights[pairs] / weights["disjoint"])
            rows.append([pairs, count.removeprefix("m="), *(f"{ratio:.3f}" for ratio in ratios)])
    return table(["`score.pairs`", "`score.samples`", *names, "head weights"], rows)


def _ablation_row(values: Mapping, runs: Sequence[Mapping], default: Sequence[Mapping]) -> list[str]:
    name = ", ".join(f"`{key}` {value}" for key, value in values.items())
    return [f"**{name}**" if runs == default else name, *_figures(runs), _difference(runs, default)]


def _figures(runs: Sequence[Mapping]) -> list[str]:
    """Mean and standard deviation of each figure over the runs of several seeds."""
    digits = {"fid_ratio": 2}
    return [_spread([run[name] for run in runs], digits.get(name, 3)) for name in FIGURES]


def _difference(runs: Sequence[Mapping], other: Sequence[Mapping]) -> str:
    """Mean difference of FID / floor from the other runs of the same seeds, and its standard error; "tie" within it."""
    if runs == other:
        return ""
    pairs = zip(runs, other, strict=True)
    differences = [run["fid_ratio"] - reference["fid_ratio"] for run, reference in pairs]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    tie = abs(round(mean, 2)) <= round(error, 2)  # as the page shows them
    return f"{mean:+.2f} ± {error:.2f}{', tie' if tie else ''}"


def _mean(runs: Sequence[Mapping], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; of one value, the value."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column left-aligned, the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
