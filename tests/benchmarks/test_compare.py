"""The comparison of the scores: its plan, its page, its refusals; slowly, one of real models."""

import copy
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from prefect.logging import disable_run_logger

from benchmarks.comparison import page, plan
from benchmarks.comparison.compare import (
    check_committed,
    check_count,
    check_extractor,
    checked_scope,
    planned,
    with_earlier,
)
from benchmarks.comparison.figure import quality_against_time
from benchmarks.comparison.plan import (
    ABLATION_TITLES,
    Scope,
    ablation_runs,
    changes,
    default_run,
    reported_runs,
    rule_runs,
    run_name,
)
from benchmarks.scores import Candidate
from ear import config
from ear.config import edit
from ear.config.compose import compose
from ear.config.document import to_yaml
from ear.errors import UserError
from flows import repository

ROOT = Path(__file__).resolve().parents[2]

# The whole pipeline in seconds; the images are those of the digits preset.
TINY = [
    *("tokenizer.block_channels=[8,8]", "tokenizer.images=512", "reference.images=512"),
    *("model.width=32", "model.depth=2", "model.heads=2", "model.head_width=32", "model.head_depth=1"),
    *("train.validate_images=256", "train.warmup_images=64", "finetune.images=64"),
    *("score.codes=16", "sample.denoising_steps=5", "compute.threads=1", "runtime.workers=0", "runtime.device=cpu"),
    *("sample.count=360", "sample.batch_size=20", "sample.steps=2", "evaluate.kid_subset_size=20"),
]


BUDGET = {"train.images": 640}
TWO_SEEDS = Scope(seeds=2)


@pytest.fixture(scope="module")
def parameters() -> config.Parameters:
    return compose(["preset=digits", "train.warmup_images=64"])


# --- the plan


def test_equal_runs_have_one_name(parameters):
    scales = dict.fromkeys(plan.RULES, parameters.sample.guidance)
    reported, ablations = (
        reported_runs(parameters, BUDGET, TWO_SEEDS, scales),
        ablation_runs(parameters, BUDGET, TWO_SEEDS),
    )
    first, second = reported["energy"]
    assert first == default_run(parameters, BUDGET) == {"train.images": 640}
    assert second == {"train.images": 640, "train.seed": 1}
    assert run_name(first) == "compare-train.images=640"
    assert run_name(rule_runs(parameters, BUDGET, Scope(seeds=1))["logarithmic, full"][1.0][0]) == (
        "compare-score.name=logarithmic-score.covariance=full-train.images=640-sample.guidance=1.0-sample.seed=1000000"
    )
    all_runs = planned(parameters, {"rules": BUDGET, "ablations": BUDGET}, TWO_SEEDS)
    names = {run_name(values) for values in all_runs}
    assert len(names) == len({json.dumps(values, sort_keys=True) for values in all_runs})
    assert len(names) < len(all_runs)
    assert (
        planned(parameters, {"rules": BUDGET}, TWO_SEEDS) + planned(parameters, {"ablations": BUDGET}, TWO_SEEDS)
        == all_runs
    )
    assert changes({"train.images": parameters.train.images, "score.alpha": 1.5}, parameters) == {"score.alpha": 1.5}
    assert len(ablations) == len(plan.ABLATIONS)


@pytest.mark.parametrize("guidance", [1.8, 1.7])
def test_every_ablation_holds_the_parameters_as_they_are(guidance):
    parameters = compose(["preset=digits", f"sample.guidance={guidance}"])
    for title, variants in ablation_runs(parameters, BUDGET, TWO_SEEDS).items():
        assert [runs[0] for _, runs in variants].count({"train.images": 640}) == 1, title
    guided = ablation_runs(parameters, BUDGET, TWO_SEEDS)["Guidance"]
    assert guided[0][0] == {"sample.guidance": 1.0 if guidance == 1.8 else 1.7}


def test_some_ablations(parameters):
    scope = checked_scope(["energy"], [2.0], ["Rate of the head", "Noise"], 1, parameters)
    found = planned(parameters, {"ablations": {"train.images": 640}}, scope)
    assert [{key: value for key, value in run.items() if key != "train.images"} for run in found] == [
        {},
        {"score.noise": "gaussian"},
        {},
        {"train.head_rate": 1.0},
    ]


def test_some_rules_at_some_scales(parameters):
    scope = checked_scope(["hyvarinen", "energy"], [2.0, 4.0], ABLATION_TITLES, 2, parameters)
    found = planned(parameters, {"rules": BUDGET}, scope)
    assert [(run.get("score.name", "energy"), run["sample.guidance"], run.get("train.seed", 0)) for run in found] == [
        *(("hyvarinen", scale, seed) for seed in (0, 1) for scale in (2.0, 4.0)),
        *(("energy", scale, seed) for seed in (0, 1) for scale in (2.0, 4.0)),
    ]
    with pytest.raises(UserError, match=r"^'Depth' is not among the ablations; name some of 'Exponent of the "):
        checked_scope(["energy"], [2.0], ["Noise", "Depth"], 2, parameters)
    with pytest.raises(UserError, match="1 rules, 1 scales, 0 ablations and 2 seeds, but at least 1 of each is needed"):
        checked_scope(["energy"], [2.0], [], 2, parameters)
    with pytest.raises(UserError, match=r"^'givt' is not among the rules; name some of 'energy', 'kernel', "):
        checked_scope(["energy", "givt"], [2.0], ABLATION_TITLES, 2, parameters)
    for rules, scales, seeds in (([], [2.0], 1), (["energy"], [], 1), (["energy"], [2.0], 0)):
        with pytest.raises(UserError, match="at least 1 of each is needed"):
            checked_scope(rules, scales, ABLATION_TITLES, seeds, parameters)


def test_a_model_has_one_row(parameters):
    causal = compose(["preset=digits", "model.attention=causal", "model.order=raster"])
    every = [*plan.RULES, "energy"]
    assert sorted({*plan.RULES} - {*checked_scope(every, [2.0], ABLATION_TITLES, 1, parameters).rules}) == [
        "energy, masked"
    ]
    assert sorted({*plan.RULES} - {*checked_scope(every, [2.0], ABLATION_TITLES, 1, causal).rules}) == [
        "energy, causal raster"
    ]
    assert checked_scope(["energy, masked", "energy"], [2.0], ABLATION_TITLES, 1, parameters).rules == (
        "energy, masked",
    )


def test_every_run_is_valid(parameters, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(to_yaml(parameters, "test"))
    default = parameters.model_dump(mode="json")
    for values in planned(parameters, {"rules": BUDGET, "ablations": BUDGET}, TWO_SEEDS):
        changed = copy.deepcopy(default)
        for key, value in values.items():
            section, _, name = key.partition(".")
            assert name in changed[section]
            changed[section][name] = value
        config.parse(changed)
    with pytest.raises(ValueError, match=r"train\.images is 0 and train\.weights is empty"):
        edit.check(path, default_run(parameters, {"train.images": 0}))


def test_a_scale_is_never_chosen_on_reported_images(parameters):
    scales = dict.fromkeys(plan.RULES, 1.5)
    tried = [runs for each in rule_runs(parameters, BUDGET, Scope()).values() for runs in each.values()]
    reported = list(reported_runs(parameters, BUDGET, Scope(), scales).values())
    assert {values["sample.seed"] for runs in tried for values in runs} == {1_000_000}
    assert not [values for runs in reported for values in runs if "sample.seed" in values]
    assert all([values.get("train.seed", 0) for values in runs] == [0, 1, 2] for runs in tried + reported)


def test_runs_of_one_training_are_neighbours(parameters):
    """So that the training is in DVC's cache, and still the newest, when the next scale is sampled."""
    trained = [rule for rule in plan.RULES if rule != "hyvarinen, 10 steps"]  # which samples another rule's models
    keys = [
        json.dumps({key: value for key, value in values.items() if not key.startswith("sample.")})
        for values in planned(
            parameters, {"rules": BUDGET}, checked_scope(trained, [1.0, 1.4], ABLATION_TITLES, 3, parameters)
        )
    ]
    assert len([1 for before, after in itertools.pairwise(keys) if before != after]) + 1 == len(set(keys)) == 21


def test_rules_name_files():
    names = [plan.file_name(rule) for rule in plan.RULES]
    assert "logarithmic-full" in names
    assert len(set(names)) == len(names)
    assert not [name for name in names if set(name) & set(" ,/")]


# --- rates


def test_a_candidate_is_timed(one_thread):
    parameters = compose(["preset=digits", *TINY, "score.name=hyvarinen"])
    candidate = Candidate(parameters, torch.device("cpu"))
    for _ in range(2):
        candidate.turn()
    figures = candidate.figures()
    assert figures["parameters"] == sum(p.numel() for p in candidate.model.parameters())
    assert figures["evaluations_per_image"] == {"transformer": 2, "head": 16 * 5}
    assert figures["facts"]["guidance_extrapolates"] == "predicted noise"
    assert candidate._training.trainer.images == 2 * 3 * parameters.train.global_batch_size
    assert figures["sampling_images_per_second"] > 0
    assert figures["training_images_per_second"] > 0


# --- what is written


def test_a_comparison_needs_a_classifier(parameters):
    check_extractor(parameters)
    reference = parameters.reference.model_copy(update={"extractor": "inception"})
    with pytest.raises(ValueError, match=r"^reference\.extractor is inception, but .* set it to classifier\.$"):
        check_extractor(parameters.model_copy(update={"reference": reference}))


def runs(*ratios: float) -> list[dict]:
    return [
        {"fid_ratio": ratio, "fid": 0.1, "class_accuracy": 0.9, "precision": 0.8, "recall": 0.7, "nearest_ratio": 1.0}
        for ratio in ratios
    ]


def test_the_figure_has_a_point_with_its_spread_for_each_rule():
    rates = {"energy": {"sampling_images_per_second": 200.0}, "hyvarinen": {"sampling_images_per_second": 50.0}}
    figure = quality_against_time(
        {
            "benchmarks": {"scores": {"figures": {"rules": rates}}},
            "rules": [{"rule": "energy", "runs": runs(3.0, 5.0)}, {"rule": "hyvarinen", "runs": runs(2.0)}],
        }
    )
    axes = figure.axes[0]
    assert axes.get_legend_handles_labels()[1] == ["energy", "hyvarinen"]
    points = [[*container.lines[0].get_xydata()[0]] for container in axes.containers]
    assert points == [[5.0, 4.0], [20.0, 2.0]]
    low, high = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((4 - 2**0.5, 4 + 2**0.5))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("docs/**/results.json")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_published_pages_are_made_from_their_results(path):
    folder = path.parent
    assert folder.with_suffix(".md").read_text() == page.page(folder.name, json.loads(path.read_text()))


def test_differences_are_of_pairs_of_seeds():
    """Seeds differ by more than the rules; what is common to both is not counted as their difference."""
    assert page._difference(runs(3.0, 5.0, 7.0), runs(2.0, 4.1, 5.9)) == "+1.00 ± 0.06"
    assert page._difference(runs(3.0, 5.0, 7.0), runs(2.0, 6.0, 7.0)) == "+0.00 ± 0.58, tie"
    assert page._difference(runs(3.0), runs(2.0)) == "+1.00"
    assert page._difference(runs(3.0, 5.0), runs(3.0, 5.0)) == ""
    assert page._figures(runs(3.0, 5.0)) == [
        "4.00 ± 1.41",
        "0.100 ± 0.000",
        "0.900 ± 0.000",
        "0.800 ± 0.000",
        "0.700 ± 0.000",
        "1.000 ± 0.000",
    ]
    assert page.best({1.0: runs(3.0, 5.0), 1.5: runs(2.0, 5.9), 2.2: runs(1.0, 9.0)}) == 1.5


def test_the_page_of_ablations_marks_what_params_yaml_says(parameters):
    found = {
        title: [
            {
                "values": variant,
                "default": of_variant[0] == default_run(parameters, BUDGET),
                "runs": runs(2.0 + k, 3.0 + k),
            }
            for k, (variant, of_variant) in enumerate(variants)
        ]
        for title, variants in ablation_runs(parameters, BUDGET, TWO_SEEDS).items()
    }
    text = page.page(
        "ablations",
        {
            "budget": {
                "commit": "0123456789abcdef",
                "train_images": 640,
                "finetune_images": 9600,
                "threads": 1,
                "seeds": 2,
            },
            "parameters": parameters.model_dump(mode="json"),
            "floor": 0.09,
            "equal_images": 359,
            "held_out_accuracy": 0.986,
            "benchmarks": {"variance": json.loads((ROOT / "benchmarks/results/variance.json").read_text())},
            "commits": dict.fromkeys(found, "0123456789abcdef") | dict.fromkeys(("Noise", "Steps"), "fedcba9876543210"),
            "ablations": found,
        },
    )
    assert "with earlier code, which gave the same figures in bold: Noise, Steps (`fedcba9876`). Unless" in text
    assert text.startswith("# Ablations of the energy score\n")
    assert "commit `0123456789`" in text
    assert [line for line in text.splitlines() if line.startswith("## ")][:-1] == [f"## {title}" for title in found]
    assert "| **`score.alpha` 1.0** | 3.50 ± 0.71 |" in text
    assert "| `score.alpha` 1.25 | 4.50 ± 0.71 | 0.100 ± 0.000 |" in text
    assert text.count("| +1.00 ± 0.00 |") == len(
        [variants for variants in found.values() if not variants[-1]["default"]]
    )
    assert text.count("Variance of the gradient") == 1


def ablation_results(commit: str, bold: float, **ablations: float) -> dict:
    """FID / floor of the row in bold, and of one other row of each ablation."""
    tables = {
        title: [
            {"values": {}, "default": True, "runs": runs(bold)},
            {"values": {}, "default": False, "runs": runs(other)},
        ]
        for title, other in ablations.items()
    }
    budget = {"commit": commit, "train_images": 640}
    return {"budget": budget, "floor": 0.09, "commits": dict.fromkeys(tables, commit), "ablations": tables}


def test_ablations_are_added_to_those_of_the_same_model():
    now = ablation_results("b", 3.0, Noise=4.0, Steps=5.0)
    both = page.joined(now, ablation_results("a", 3.0, Noise=6.0, Guidance=2.0))
    assert both["commits"] == {"Noise": "b", "Steps": "b", "Guidance": "a"}
    assert {title: rows[1]["runs"][0]["fid_ratio"] for title, rows in both["ablations"].items()} == {
        "Noise": 4.0,
        "Steps": 5.0,
        "Guidance": 2.0,
    }
    assert both["budget"]["commit"] == "b"
    other_budget = ablation_results("a", 3.0, Guidance=2.0)
    other_budget["budget"]["train_images"] = 1280
    other_floor = {**ablation_results("a", 3.0, Guidance=2.0), "floor": 0.1}
    for earlier in (ablation_results("a", 3.1, Guidance=2.0), other_floor, other_budget):
        assert page.joined(now, earlier) == now


def test_a_file_of_earlier_ablations(tmp_path):
    """None for the first page; an older one names no commits; one of another model is left out."""
    path, now = tmp_path / "results.json", ablation_results("b", 3.0, Noise=4.0)
    assert with_earlier(now, path) == now
    older = ablation_results("a", 3.0, Guidance=2.0)
    del older["commits"]
    path.write_text(json.dumps(older))
    assert with_earlier(now, path)["commits"] == {"Guidance": "a", "Noise": "b"}
    path.write_text(json.dumps(ablation_results("a", 3.1, Guidance=2.0)))
    with disable_run_logger():
        assert with_earlier(now, path) == now


def test_a_comparison_needs_as_many_images_as_are_held_out(parameters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_count(parameters)  # nothing is known yet
    (tmp_path / "data/reference").mkdir(parents=True)
    (tmp_path / "data/reference/metrics.json").write_text(json.dumps({"val_images": parameters.sample.count}))
    check_count(parameters)
    (tmp_path / "data/reference/metrics.json").write_text(json.dumps({"val_images": 1001}))
    with pytest.raises(ValueError, match=r"^sample\.count is 1000, but 1001 .* to 1001 or more\.$"):
        check_count(parameters)


# --- real runs


def repository_of(folder: Path) -> Path:
    """The project as it stands here, with tiny parameters, committed in a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for path in filter(None, listed.stdout.split("\0")):
        if (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
    (folder / "params.yaml").write_text(to_yaml(compose(["preset=digits", *TINY]), "test"))
    git(folder, "init", "-q")
    git(folder, "config", "user.email", "tests@localhost")
    git(folder, "config", "user.name", "tests")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "tiny")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_code_that_is_not_committed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(repository_of(tmp_path))
    (tmp_path / "docs").mkdir(exist_ok=True)
    (tmp_path / "docs/scores.md").write_text("a result")
    (tmp_path / "params.yaml").write_text("kept beside the page")
    check_committed()
    (tmp_path / "ear/new.py").write_text("")
    with pytest.raises(
        ValueError, match=r"^ear/new\.py differs from the last commit, which the page would name; commit it"
    ):
        check_committed()


@pytest.mark.slow
def test_a_comparison_of_two_rules_goes_on_and_writes_its_page(tmp_path):
    """Two runs at two scales; one experiment is taken away, as a kill would leave it, and made again alone."""
    folder = repository_of(tmp_path)
    options = ["--images", "128", "--seeds", "2", "--only", "rules", "-j", "2", "--guidance", "1", "1.5"]
    command = [sys.executable, "-m", "benchmarks.comparison", "--rules", "energy", "logarithmic, full", *options]
    environment = {**repository.environment(), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("compare: 8 runs; see docs/scores.md")
    results = json.loads((folder / "docs/scores/results.json").read_text())
    assert [rule["rule"] for rule in results["rules"]] == ["energy", "logarithmic, full"]
    assert [scale["guidance"] for scale in results["rules"][0]["choice"]] == [1.0, 1.5]
    assert all(rule["guidance"] in (1.0, 1.5) for rule in results["rules"])
    tried = [run["fid"] for rule in results["rules"] for scale in rule["choice"] for run in scale["runs"]]
    reported = [run["fid"] for rule in results["rules"] for run in rule["runs"]]
    assert len(set(tried + reported)) == 8 + 4
    assert (folder / "docs/scores.md").read_text() == page.page("scores", results)
    assert Image.open(folder / "docs/scores/logarithmic-full.png").size > (100, 100)
    assert Image.open(folder / "docs/scores/time.png").size == (864, 528)
    assert (folder / "docs/scores/params.yaml").read_bytes() == (folder / "params.yaml").read_bytes()
    # Each rule was trained once for each seed. Two jobs may start the stages before it at one time: one does the work.
    started = {name: done.stderr.count(f"python -m stages.{name}") for name in ("cache", "train", "sample")}
    assert started["cache"] in (1, 2)
    assert (started["train"], started["sample"]) == (4, 12)

    name = results["rules"][1]["runs"][0]["experiment"]
    subprocess.run([*repository.DVC, "exp", "remove", name], cwd=folder, env=environment, check=True)
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    # DVC's run cache has its stages; only the experiment itself is made again.
    assert [again.stderr.count(f"python -m stages.{stage}") for stage in ("cache", "train", "sample")] == [0, 0, 0]
    rerun = json.loads((folder / "docs/scores/results.json").read_text())
    assert rerun["rules"] == results["rules"]
