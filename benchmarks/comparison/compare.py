"""Train every score on the same latents at the same budget, and variants of the energy score; write a page of each.

    python -m benchmarks.comparison --threads 1 -j 2
    python -m benchmarks.comparison --only rules --rules energy hyvarinen --guidance 2.5 4 --output docs/fashion

Every model is trained from several seeds. Each rule's guidance scale is the one with the lowest mean FID / floor, on
images that are not reported. Each run is a DVC experiment on the current commit (see flows.experiments): the workspace
is not changed, shared stages run once, and a stopped comparison resumes as long as the commit is the same. The pages
are scores.md and ablations.md; folders of the same names hold their data (results.json), params.yaml as it was, and
pictures. They are written after all runs have succeeded; rates are measured at the end. Ablations that the page has
already stay there if params.yaml itself still gives the same figures.

Models of this size gain little from a second thread: one thread each, and as many runs at a time as there are cores,
take the least time. The number of threads changes results slightly (rounding).
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import State, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from benchmarks.comparison import page
from benchmarks.comparison.figure import quality_against_time
from benchmarks.comparison.plan import (
    ABLATION_TITLES,
    GUIDANCE,
    RULES,
    Scope,
    Values,
    ablation_runs,
    default_run,
    distinct,
    file_name,
    reported_runs,
    rule_runs,
    run_name,
)
from ear import config
from ear.config.parameters import PARAMETERS
from ear.errors import UserError
from ear.files.atomic import whole_file
from ear.files.json_files import read_json, write_json
from flows import command, experiments, repository
from flows.artifacts import GRID, only_shown
from flows.devices import devices, hold
from flows.experiments import Snapshot
from flows.metrics import EVALUATION
from flows.program import report
from flows.repository import RepositoryError
from flows.runs import quiet_snapshot, run_all

Part = Literal["rules", "ablations"]
Budget = Mapping[Part, Values]  # the keys that all runs of a part share
PAGES: dict[Part, str] = {"rules": "scores", "ablations": "ablations"}

# The training images of the digits preset, and less than half of them.
IMAGES: dict[Part, int] = {"rules": 51_200, "ablations": 22_400}
REFERENCE = "data/reference/metrics.json"
RESULTS = "results.json"  # beside each page
# Results may differ from the commit that the page names; parameters are kept beside it.
_MAY_DIFFER = ("dvc.lock", "data/", "docs/", "benchmarks/results/", str(PARAMETERS))


@flow(name="compare")
def compare(
    images: int = IMAGES["rules"],
    ablation_images: int = IMAGES["ablations"],
    seeds: int = Scope.seeds,
    rules: Sequence[str] = tuple(RULES),
    guidance: Sequence[float] = GUIDANCE,
    ablations: Sequence[str] = ABLATION_TITLES,
    only: Part | None = None,
    threads: int | None = None,
    jobs: int = 1,
    output: str = "docs",
) -> State:
    """Train all rules and ablations, and write the page.

    Args:
        images: training images of each rule's model.
        ablation_images: training images of each model of the ablations.
        seeds: trainings of each model, from `train.seed` on.
        rules: names of plan.RULES; the others are compared with the first.
        guidance: the scales that each rule is tried at.
        ablations: titles in plan.ABLATIONS.
        only: the rules, or the ablations of the energy score; none means both, a page of each.
        threads: `compute.threads` of every run; none: that of params.yaml.
        jobs: runs at a time, each on its own GPU, or on its own `threads` cores.
        output: folder for the pages and their folders.
    """
    whole: dict[Part, int] = {"rules": images, "ablations": ablation_images}
    try:
        check_committed()
        snapshot = quiet_snapshot()
        parameters = snapshot.parameters({})
        threads = threads or parameters.compute.threads
        budget: Budget = {
            part: {"train.images": count, "compute.threads": threads}
            for part, count in whole.items()
            if only in (None, part)
        }
        check_extractor(parameters)
        check_count(parameters)
        scope = checked_scope(rules, guidance, ablations, seeds, parameters)
        runs = planned(parameters, budget, scope)
        for values in runs:
            snapshot.parameters(values)
        run_without_failure(runs, snapshot, jobs)
        if "rules" in budget:
            report_rules(snapshot, parameters, budget["rules"], scope, jobs, Path(output))
        if "ablations" in budget:
            results = ablations_of(snapshot, parameters, budget["ablations"], scope)
            earlier = Path(output) / PAGES["ablations"] / RESULTS
            publish("ablations", snapshot, with_earlier(results, earlier), Path(output))
    except (UserError, RepositoryError) as error:
        return Failed(message=str(error))
    return Completed(message=f"{len(runs)} runs; see {' and '.join(f'{output}/{PAGES[part]}.md' for part in budget)}")


def check_committed() -> None:
    """Raise UserError if code differs from the last commit, since the page names the commit."""
    edited = [path for path in experiments.edited() if not path.startswith(_MAY_DIFFER)]
    if edited:
        raise UserError(f"{edited[0]} differs from the last commit, which the page would name; commit it first.")


def checked_scope(
    rules: Sequence[str],
    guidance: Sequence[float],
    ablations: Sequence[str],
    seeds: int,
    parameters: config.Parameters,
) -> Scope:
    """What is compared, each model once. Raises UserError for an unknown name, or if there is nothing to compare."""
    for kind, names, known in (("rules", rules, RULES), ("ablations", ablations, ABLATION_TITLES)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{unknown[0]!r} is not among the {kind}; name some of {', '.join(map(repr, known))}.")
    if not rules or not guidance or not ablations or seeds < 1:
        raise UserError(
            f"{len(rules)} rules, {len(guidance)} scales, {len(ablations)} ablations and {seeds} seeds, but at least "
            "1 of each is needed."
        )
    return Scope(distinct(rules, parameters), tuple(dict.fromkeys(guidance)), ablations, seeds)


def check_extractor(parameters: config.Parameters) -> None:
    """Raise UserError if no classifier can tell the class of a generated image."""
    if parameters.reference.extractor != "classifier":
        raise UserError(
            f"reference.extractor is {parameters.reference.extractor}, but the comparison reports class accuracy; set "
            "it to classifier."
        )


def check_count(parameters: config.Parameters) -> None:
    """Raise UserError if fewer images are generated than held out: FID / floor needs as many."""
    held_out = read_json(REFERENCE)["val_images"] if Path(REFERENCE).is_file() else 0
    if parameters.sample.count < held_out:
        raise UserError(
            f"sample.count is {parameters.sample.count}, but {held_out} images are held out, and the comparison needs "
            f"FID at equal numbers; set it to {held_out} or more."
        )


def planned(parameters: config.Parameters, budget: Budget, scope: Scope) -> list[Values]:
    """The changes of params.yaml for all runs of the parts in `budget`; runs that share a training are adjacent.

    The reported runs of each rule are not included: the runs planned here choose their guidance scale.
    """
    runs: list[Values] = []
    if "rules" in budget:
        for scales in rule_runs(parameters, budget["rules"], scope).values():
            runs += [values for of_one_seed in zip(*scales.values(), strict=True) for values in of_one_seed]
    if "ablations" in budget:
        variants = ablation_runs(parameters, budget["ablations"], scope).values()
        runs += [values for each in variants for _, of_one_variant in each for values in of_one_variant]
    return runs


def run_without_failure(runs: Sequence[Values], snapshot: Snapshot, jobs: int) -> None:
    """Run the experiments, `jobs` at a time; what ran before is restored. Raises UserError if some failed."""
    named = {run_name(values): values for values in runs}
    errors = {name: str(state.message) for name, state in run_all(named, snapshot, jobs) if not state.is_completed()}
    if errors:
        name, message = next(iter(errors.items()))
        raise UserError(f"{len(errors)} of {len(named)} runs failed ({name}: {message}); nothing was written")


def report_rules(
    snapshot: Snapshot, parameters: config.Parameters, budget: Values, scope: Scope, jobs: int, folder: Path
) -> None:
    """Run each rule at its best guidance scale, which is known only now, measure rates, and write the page."""
    reported = reported_runs(parameters, budget, scope, chosen_scales(snapshot, parameters, budget, scope))
    run_without_failure([values for each in reported.values() for values in each], snapshot, jobs)
    rates = measure_rates(snapshot, scope.rules, budget["compute.threads"], parameters)
    publish_scores(snapshot, scores_of(snapshot, parameters, budget, scope, rates), folder)


def chosen_scales(snapshot: Snapshot, parameters: config.Parameters, budget: Values, scope: Scope) -> dict[str, float]:
    """Rule => the guidance scale with its lowest mean FID / floor over the training seeds."""
    return {
        rule: page.best({scale: outcomes(snapshot, runs) for scale, runs in scales.items()})
        for rule, scales in rule_runs(parameters, budget, scope).items()
    }


@task(task_run_name="measure rates", cache_policy=NO_CACHE)
def measure_rates(
    snapshot: Snapshot, rules: Sequence[str], threads: int, parameters: config.Parameters
) -> dict[str, Any]:
    """Time training and sampling of the rules in one run, with no other run of this repository beside it.

    Returns the report of benchmarks.scores. Raises UserError.
    """
    lines: list[str] = []
    among, say = devices(parameters), get_run_logger().info
    with tempfile.TemporaryDirectory() as folder, hold(len(among), among, say):
        params = Path(folder) / PARAMETERS
        params.write_text(snapshot.text(str(PARAMETERS)))
        program = [sys.executable, "-m", "benchmarks.scores", "--params", str(params), "--save", "--results", folder]
        program += ["--threads", str(threads), "--rules", *rules]
        if command.stream(program, line=lines.append, environment=repository.environment()):
            raise UserError(f"benchmarks.scores failed: {lines[-1] if lines else 'it said nothing'}.")
        return read_json(Path(folder) / "scores.json")


def scores_of(
    snapshot: Snapshot, parameters: config.Parameters, budget: Values, scope: Scope, rates: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the page of the scores shows. rates: the report of benchmarks.scores."""
    scales = chosen_scales(snapshot, parameters, budget, scope)
    reported = reported_runs(parameters, budget, scope, scales)
    return conditions(snapshot, parameters, budget, scope, reported[scope.rules[0]][0]) | {
        "benchmarks": {"heads": read_json("benchmarks/results/heads.json"), "scores": rates},
        "rules": [
            {
                "rule": rule,
                "guidance": scales[rule],
                "runs": outcomes(snapshot, reported[rule]),
                "choice": [{"guidance": scale, "runs": outcomes(snapshot, runs)} for scale, runs in tried.items()],
            }
            for rule, tried in rule_runs(parameters, budget, scope).items()
        ],
    }


def ablations_of(snapshot: Snapshot, parameters: config.Parameters, budget: Values, scope: Scope) -> dict[str, Any]:
    """Everything that the page of the ablations shows."""
    default = default_run(parameters, budget)
    return conditions(snapshot, parameters, budget, scope, default) | {
        "commits": dict.fromkeys(scope.ablations, snapshot.commit),
        "benchmarks": {"variance": read_json("benchmarks/results/variance.json")},
        "ablations": {
            title: [
                {"values": dict(variant), "default": runs[0] == default, "runs": outcomes(snapshot, runs)}
                for variant, runs in variants
            ]
            for title, variants in ablation_runs(parameters, budget, scope).items()
        },
    }


def with_earlier(results: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Add the other ablations of the file at `path` to the results; warn if they cannot share a page."""
    if not path.is_file():
        return results
    earlier = read_json(path)
    of_one = dict.fromkeys(earlier["ablations"], earlier["budget"]["commit"])  # older files name no others
    whole = page.joined(results, {"commits": of_one, **earlier})
    if lost := earlier["ablations"].keys() - whole["ablations"].keys():
        get_run_logger().warning(f"{path}: {', '.join(sorted(lost))} are of another budget or model, and not kept.")
    return whole


def conditions(
    snapshot: Snapshot, parameters: config.Parameters, budget: Values, scope: Scope, run: Values
) -> dict[str, Any]:
    """What all runs of a page share: code, parameters and budget, and, read from one of them, the real images."""
    figures, real = (json.loads(experiments.read(snapshot, run_name(run), path)) for path in (EVALUATION, REFERENCE))
    return {
        "budget": {
            "commit": snapshot.commit,
            "train_images": budget["train.images"],
            "finetune_images": parameters.finetune.images,
            "threads": budget["compute.threads"],
            "seeds": scope.seeds,
        },
        "parameters": parameters.model_dump(mode="json"),
        "floor": figures["fid_floor"],
        "equal_images": figures["fid_equal_images"],
        "held_out_accuracy": real["val_accuracy"],
    }


def outcomes(snapshot: Snapshot, runs: Sequence[Values]) -> list[dict[str, Any]]:
    """`outcome` of the runs of all seeds."""
    return [outcome(snapshot, values) for values in runs]


def outcome(snapshot: Snapshot, values: Values) -> dict[str, Any]:
    """The metrics of one run, with the name of its experiment."""
    name = run_name(values)
    figures = json.loads(experiments.read(snapshot, name, EVALUATION))
    return {"experiment": name, **{key: figures[key] for key in page.FIGURES}}


def publish_scores(snapshot: Snapshot, results: Mapping[str, Any], folder: Path) -> None:
    """Write the page of the scores, its pictures and its data."""
    pictures = folder / PAGES["rules"]
    for rule in results["rules"]:
        grid = pictures / f"{file_name(rule['rule'])}.png"
        experiments.fetch(snapshot, rule["runs"][0]["experiment"], str(GRID), grid)
    with whole_file(pictures / "time.png") as partial:
        quality_against_time(results).savefig(partial, format="png", dpi=120)
    publish("rules", snapshot, results, folder)


def publish(part: Part, snapshot: Snapshot, results: Mapping[str, Any], folder: Path) -> None:
    """Write a page, its data and the parameters of the snapshot."""
    name = PAGES[part]
    write_json(folder / name / RESULTS, results)
    with whole_file(folder / name / "params.yaml") as partial:
        partial.write_text(snapshot.text(str(PARAMETERS)))
    text = page.page(name, results)
    with whole_file(folder / f"{name}.md") as partial:
        partial.write_text(text)
    with only_shown():
        create_markdown_artifact(key=name, markdown=text, description=page.TITLES[name])


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for part, count in IMAGES.items():
        option = "--images" if part == "rules" else "--ablation-images"
        parser.add_argument(option, type=int, default=count, help=f"training images per model of the {part} ({count})")
    parser.add_argument("--seeds", type=int, default=Scope.seeds, help=f"trainings of each model ({Scope.seeds})")
    parser.add_argument(
        "--rules", nargs="+", choices=RULES, default=[*RULES], metavar="RULE", help=f"of {', '.join(map(repr, RULES))}"
    )
    parser.add_argument(
        "--guidance", nargs="+", type=float, default=[*GUIDANCE], metavar="SCALE", help=f"scales to try ({GUIDANCE})"
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        choices=ABLATION_TITLES,
        default=[*ABLATION_TITLES],
        metavar="TITLE",
        help="headings of ablations.md",
    )
    parser.add_argument("--only", choices=("rules", "ablations"), help="default: both")
    parser.add_argument("--threads", type=int, help="compute.threads of every run (default: that of params.yaml)")
    parser.add_argument(
        "-j", "--jobs", type=int, default=1, help="runs at a time, one per GPU or per THREADS cores (default: 1)"
    )
    parser.add_argument("--output", default="docs", help="folder for the pages (default: docs)")
    arguments = parser.parse_args()
    return report("compare", lambda: compare(**vars(arguments), return_state=True))
