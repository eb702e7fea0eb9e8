"""The comparison of the scores: its plan, its page, its refusals; slowly, one of real models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.comparison import page, plan
from benchmarks.comparison.compare import check_committed, check_extractor, joined, planned
from benchmarks.comparison.plan import ablation_runs, changes, default_run, rule_runs, run_name
from benchmarks.scores import Candidate
from ear import config
from ear.config import edit
from ear.config.compose import compose
from ear.config.document import to_yaml
from flows import repository

ROOT = Path(__file__).resolve().parents[2]

# The whole pipeline in seconds; the images are those of the digits preset.
TINY = [
    *("tokenizer.block_channels=[8,8]", "tokenizer.images=512", "reference.images=512"),
    *("model.width=32", "model.depth=2", "model.heads=2", "model.head_width=32", "model.head_depth=1"),
    *("train.validate_images=256", "train.warmup_images=64", "finetune.images=64"),
    *("score.codes=16", "score.sampling_steps=5", "compute.threads=1", "runtime.workers=0", "runtime.device=cpu"),
    *("sample.count=40", "sample.batch_size=20", "sample.steps=2", "evaluate.kid_subset_size=20"),
]


@pytest.fixture(scope="module")
def parameters() -> config.Parameters:
    return compose(["preset=digits"])


# --- the plan


def test_equal_runs_have_one_name(parameters):
    rules, ablations = rule_runs(parameters, 640), ablation_runs(parameters, 640)
    energy = rules["energy"][parameters.sample.guidance]
    assert energy == default_run(parameters, 640) == {"train.images": 640}
    assert run_name(energy) == "compare-train.images=640"
    assert run_name(rules["logarithmic, full"][1.0]) == (
        "compare-score.name=logarithmic-score.covariance=full-train.images=640-sample.guidance=1.0"
    )
    all_runs = planned(parameters, {"rules": 640, "ablations": 640})
    names = {run_name(values) for values in all_runs}
    assert len(names) == len({json.dumps(values, sort_keys=True) for values in all_runs})
    assert len(names) < len(all_runs)
    assert planned(parameters, {"rules": 640}) + planned(parameters, {"ablations": 640}) == all_runs
    assert changes({"train.images": parameters.train.images, "score.alpha": 1.5}, parameters) == {"score.alpha": 1.5}
    assert len(ablations) == len(plan.ABLATIONS)


@pytest.mark.parametrize("guidance", [2.2, 1.7])
def test_every_ablation_holds_the_parameters_as_they_are(guidance):
    parameters = compose(["preset=digits", f"sample.guidance={guidance}"])
    for title, runs in ablation_runs(parameters, 640).items():
        assert [values for _, values in runs].count({"train.images": 640}) == 1, title
    guided = ablation_runs(parameters, 640)["Guidance"]
    assert guided[0][0] == {"sample.guidance": 1.0 if guidance == 2.2 else 1.7}


def test_every_run_is_valid(parameters, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(to_yaml(parameters, "test"))
    for values in planned(parameters, {"rules": 640, "ablations": 640}):
        edit.check(path, values)
    with pytest.raises(ValueError, match=r"train\.images is 0 and train\.weights is empty"):
        edit.check(path, default_run(parameters, 0))


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
    assert figures["facts"]["strictly_proper"] is True
    assert figures["facts"]["guidance_extrapolates"] == "predicted noise"
    assert candidate._training.trainer.images == 2 * 3 * parameters.train.global_batch_size
    assert figures["sampling_images_per_second"] > 0
    assert figures["training_images_per_second"] > 0


# --- what is written


def published(folder: Path, **results) -> None:
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    (folder / "scores/results.json").write_text(json.dumps(results))


def test_a_part_made_alone_joins_the_other_of_the_same_commit(tmp_path):
    budget = {"commit": "abc", "finetune_images": 10}
    ablations = {"budget": {**budget, "train_images": {"ablations": 64}}, "ablations": {"Noise": []}}
    assert joined(ablations, tmp_path) == ablations
    rules = {"budget": {**budget, "train_images": {"rules": 128}}, "rules": [{"rule": "energy"}]}
    published(tmp_path, **rules)
    whole = joined(ablations, tmp_path)
    assert whole["rules"] == rules["rules"]
    assert whole["ablations"] == ablations["ablations"]
    assert whole["budget"]["train_images"] == {"rules": 128, "ablations": 64}
    again = {**rules, "rules": [{"rule": "kernel"}]}
    assert joined(again, tmp_path)["rules"] == again["rules"]
    published(tmp_path, **{**rules, "budget": {**rules["budget"], "commit": "abd"}})
    assert joined(ablations, tmp_path) == ablations


def test_a_comparison_needs_a_classifier(parameters):
    check_extractor(parameters)
    reference = parameters.reference.model_copy(update={"extractor": "inception"})
    with pytest.raises(ValueError, match=r"^reference\.extractor is inception, but .* set it to classifier\.$"):
        check_extractor(parameters.model_copy(update={"reference": reference}))


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
    check_committed()
    (tmp_path / "ear/new.py").write_text("")
    with pytest.raises(ValueError, match=r"^ear/new\.py is not as the last commit has it; commit it"):
        check_committed()


@pytest.mark.slow
def test_a_comparison_of_two_rules_goes_on_and_writes_its_page(tmp_path):
    """Two runs at two scales; one experiment is taken away, as a kill would leave it, and made again alone."""
    folder = repository_of(tmp_path)
    program = (
        "import sys; from benchmarks.comparison import compare, plan\n"
        "plan.GUIDANCE = (1.0, 1.5)\n"
        "plan.RULES = {name: plan.RULES[name] for name in ('energy', 'logarithmic, full')}\n"
        "sys.exit(compare.main())"
    )
    command = [sys.executable, "-c", program, "--images", "128", "--only", "rules"]
    environment = {**repository.environment(), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("compare: 4 runs; see docs/scores.md")
    results = json.loads((folder / "docs/scores/results.json").read_text())
    assert [rule["rule"] for rule in results["rules"]] == ["energy", "logarithmic, full"]
    assert [run["guidance"] for run in results["rules"][0]["runs"]] == [1.0, 1.5]
    assert len({run["fid"] for rule in results["rules"] for run in rule["runs"]}) == 4
    assert (folder / "docs/scores.md").read_text() == page.page(results)
    assert Image.open(folder / "docs/scores/logarithmic-full.png").size > (100, 100)
    # Every stage before train ran once; each rule was trained once.
    assert [done.stderr.count(f"python -m stages.{stage}") for stage in ("cache", "train", "sample")] == [1, 2, 4]

    name = results["rules"][1]["runs"][0]["experiment"]
    subprocess.run([*repository.DVC, "exp", "remove", name], cwd=folder, env=environment, check=True)
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [again.stderr.count(f"python -m stages.{stage}") for stage in ("cache", "train", "sample")] == [0, 0, 1]
    rerun = json.loads((folder / "docs/scores/results.json").read_text())
    assert rerun["rules"] == results["rules"]
