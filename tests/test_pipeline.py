"""The pipeline as a user has it: fresh repositories, `dvc repro`, changes, kills. Real stages, tiny sizes."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import one_stage
import processes
import pytest
from browser import browser_page, needs_browser
from photographs import write_class_folders
from PIL import Image
from repositories import (
    BEFORE_TRAINING,
    IDENTITY,
    STAGES,
    TINY,
    change,
    copy,
    digests,
    fresh,
    reproduced,
    run,
    stale,
)

import ear
from ear.commands import report
from ear.display import plots_page
from ear.display.live import read_rows
from ear.files.digests import sha256
from ear.training import checkpoint
from examples import inpaint


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A repository in which all stages have run."""
    return reproduced(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def repository(finished, tmp_path) -> Path:
    """A copy of the finished repository to change."""
    return copy(finished, tmp_path / "copy")


def test_reproducing_again_does_nothing(finished):
    assert "Data and pipelines are up to date." in run("dvc", "repro", cwd=finished)
    assert stale(finished) == set()


def test_everything_promised_is_there(finished):
    data = finished / "data"
    with h5py.File(data / "samples/samples.h5") as file:
        assert file["images"].shape == (40, 8, 8, 3)
        assert np.bincount(file["labels"][:]).tolist() == [4] * 10
        assert int(file["seed"][()]) == 0
        assert file.attrs["format"] == "ear-samples-1"
    with Image.open(data / "samples/grid.png") as grid:
        assert min(grid.size) > 100
    figures = json.loads((data / "evaluation/metrics.json").read_text())
    assert 0 <= figures["class_accuracy"] <= 1
    assert figures["fid"] > figures["fid_floor"] > 0
    protocol = json.loads((data / "evaluation/protocol.json").read_text())
    assert protocol["comparable_with_published"] is False
    assert (protocol["images"], protocol["sampling"]["steps"]) == (40, 4)


def test_git_sees_only_the_lock_and_the_small_metrics(finished):
    changed = run("git", "status", "--porcelain", "--untracked-files=all", cwd=finished).split()
    folders = ("evaluation", "finetuned", "model", "reconstructions", "reference", "tokenizer")
    metrics = [f"data/{folder}/metrics.json" for folder in folders]
    new = {name for name in changed if name not in ("??", "M", "D")}
    assert new <= {*metrics, "dvc.lock"}
    assert "dvc.lock" in new


@pytest.fixture(scope="module")
def plots(finished, tmp_path_factory) -> Path:
    """The folder of `dvc plots show`, as `make setup` leaves it: DVC's own page would load scripts from a network."""
    plots_page.install(finished)
    folder = tmp_path_factory.mktemp("plots")
    run("dvc", "plots", "show", "-o", str(folder), cwd=finished)
    return folder


@needs_browser
def test_plots_are_drawn_once_each_without_a_network(plots):
    with browser_page(1300, 2000) as (page, left):
        page.goto((plots / "index.html").as_uri())
        titles = ["Training loss", "Validation loss", "Learning rate", "Tokenizer"]
        page.wait_for_function(f"document.querySelectorAll('svg.marks').length == {len(titles)}", timeout=60_000)
        lines = "[...document.querySelectorAll('svg.marks')].map(s => s.querySelectorAll('.mark-line path').length)"
        assert min(page.evaluate(lines)) > 0
        assert all(page.get_by_text(title, exact=True).count() == 1 for title in titles)
        pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert (len(pictures), min(pictures) > 0, left) == (2, True, [])


def test_metrics_plots_and_pictures_are_shown(finished, plots):
    shown = json.loads(run("dvc", "metrics", "show", "--json", cwd=finished))[""]["data"]
    assert shown["data/evaluation/metrics.json"]["data"]["fid"] > 0
    assert shown["data/model/metrics.json"]["data"]["images"] == 640
    page = (plots / "index.html").read_text()
    assert '"filename": "work/live' not in page  # only a running training is drawn from there
    for title in ("Training loss", "Validation loss", "Learning rate", "Tokenizer"):
        assert title in page
    assert {"data_samples_grid.png", "data_tokenizer_reconstructions.png"} <= {
        path.name.split("workspace_")[-1] for path in (plots / "static").iterdir()
    }


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def remote(request, tmp_path, monkeypatch) -> Iterator[list[list[str]]]:
    """Commands that name a remote of DVC: a folder, or a bucket of a server on this machine."""
    if request.param == "folder":
        yield [["remote", "add", "-d", "storage", str(tmp_path / "storage")]]
        return
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    account = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in account.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="results")
    yield [
        ["remote", "add", "-d", "storage", "s3://results/digits"],
        ["remote", "modify", "storage", "endpointurl", address],
    ]
    server.stop()


def test_a_colleague_samples_without_raw_images_and_without_training(repository, remote, tmp_path):
    """Push, clone, pull what sampling needs, change the guidance: only sample and evaluate run."""
    for command in remote:
        run("dvc", *command, cwd=repository)
    run("dvc", "push", "-q", cwd=repository)
    run("git", "add", "-A", cwd=repository)
    run("git", *IDENTITY, "commit", "-q", "-m", "results", cwd=repository)
    colleague = tmp_path / "colleague"
    run("git", "clone", "-q", str(repository), str(colleague), cwd=tmp_path)
    run("dvc", "pull", "-q", "tokenizer", "finetune", "reference", "reconstruct", "--allow-missing", cwd=colleague)
    assert not (colleague / "data/raw").exists()
    assert not (colleague / "data/latents").exists()
    images = ear.generate(colleague / "data", labels=[3], steps=4)
    assert np.array_equal(images, ear.generate(repository / "data", labels=[3], steps=4))
    change(colleague, {"sample.guidance": 3.0})
    shown = run("dvc", "repro", "--pull", "--allow-missing", cwd=colleague)
    assert [name for name in STAGES if f"Running stage '{name}'" in shown] == ["sample", "evaluate"]
    protocol = json.loads((colleague / "data/evaluation/protocol.json").read_text())
    assert protocol["sampling"]["guidance"] == 3.0


def test_a_report_of_everything(finished, monkeypatch):
    monkeypatch.chdir(finished)
    said = report.run()
    assert said.startswith("wrote data/report.html")
    assert "missing" not in said
    page = (finished / "data/report.html").read_text()
    for word in ("FID / floor", "train", "Do not compare with published figures", "ear-classifier"):
        assert word in page


def test_the_rows_of_a_finished_training_are_kept_beside_the_pipeline(finished):
    rows = read_rows(finished / "work/live/finished/train/training.tsv")
    assert rows[-1]["images"] == 640
    assert rows[-1]["images_per_second"] > 0
    assert rows[-1]["attraction"] - rows[-1]["repulsion"] == pytest.approx(rows[-1]["loss"], rel=1e-3)
    assert 0 < rows[-1]["context_free_loss"] < rows[-1]["untrained_loss"]
    published = read_rows(finished / "data/model/training.tsv")
    assert [row["loss"] for row in published] == [row["loss"] for row in rows]
    assert (finished / "work/live/train/training.tsv").read_text() == "images\n"
    assert json.loads((finished / "work/times/train.json").read_text())["seconds"] > 0


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("evaluate.neighborhood", 2, {"evaluate"}),
        ("sample.guidance", 2.5, {"sample"}),
        ("sample.denoising_steps", 50, {"sample"}),
        ("finetune.temperature", 0.97, {"finetune"}),
        ("train.learning_rate", 2e-3, {"train", "finetune"}),  # what finetune does not name it takes from train
        ("score.alpha", 1.5, {"train"}),
        ("model.patch_size", 2, {"train"}),
        ("cache.batch_size", 64, {"cache"}),
        ("cache.noise_limit", 0.9, {"cache"}),
        ("model.blocks", "modern", {"train"}),
        ("tokenizer.kl_weight", 1e-5, {"tokenizer"}),
        ("reference.images", 1280, {"reference"}),
        ("prepare.compression", "gzip", {"prepare"}),
        ("data.mirror", True, {"train", "finetune"}),
        ("data.val_fraction", 0.3, {"fetch"}),
        ("data.class_names", [*"abcdefghij"], {"fetch"}),
        ("runtime.workers", 2, set()),
    ],
)
def test_a_parameter_reruns_the_stages_that_read_it(finished, key, value, stages):
    before = (finished / "params.yaml").read_text()
    try:
        change(finished, {key: value})
        assert stale(finished) == stages
    finally:
        (finished / "params.yaml").write_text(before)


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("ear/display/progress.py", set()),
        ("ear/config/sections.py", set()),
        ("ear/commands/describe.py", set()),
        ("ear/scores/energy.py", {"train", "finetune", "sample"}),
        ("ear/evaluation/metrics.py", {"reference", "reconstruct", "evaluate"}),
    ],
)
def test_an_edit_of_code_reruns_the_stages_that_use_its_package(finished, path, stages):
    before = (finished / path).read_text()
    (finished / path).write_text(before + "\n# an edit\n")
    try:
        assert stale(finished) == stages
    finally:
        (finished / path).write_text(before)


def test_pixels_as_tokens_by_one_parameter(repository, monkeypatch):
    monkeypatch.chdir(repository)
    for stage in STAGES[STAGES.index("tokenizer") :]:
        one_stage.run(stage, {**TINY, "tokenizer.name": "identity"})
    assert json.loads((repository / "data/tokenizer/metrics.json").read_text())["psnr"] == 100.0
    stats = json.loads((repository / "data/latents/stats.json").read_text())
    assert stats["shape"] == [12, 4, 4]


FOLDERS = {"train": "data/model", "finetune": "data/finetuned"}


def kill(stage: str) -> None:
    """Delete what a training has made, start it again and kill it after its first checkpoint; in the current folder."""
    scratch = Path("work", stage)
    shutil.rmtree(FOLDERS[stage])
    shutil.rmtree(scratch, ignore_errors=True)  # of a finished one that no later run has cleared
    processes.kill(lambda: one_stage.main(stage), lambda: bool(list(scratch.glob("*/checkpoint-*.safetensors"))))
    assert not Path(FOLDERS[stage]).exists()
    assert checkpoint.newest(next(path for path in scratch.iterdir() if path.is_dir())) is not None


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_a_killed_finetuning_goes_on_to_the_same_bytes(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    whole = contents(repository / FOLDERS["finetune"])
    kill("finetune")
    assert one_stage.main("finetune") == 0
    assert "resuming after" in capsys.readouterr().out
    assert contents(repository / FOLDERS["finetune"]) == whole


def test_a_killed_training_goes_on_to_the_same_bytes_after_an_unrelated_edit_where_the_user_says_so(
    repository, monkeypatch, capsys
):
    """The edit is seen by its digest; the code that runs is this checkout's."""
    monkeypatch.chdir(repository)
    whole = contents(repository / FOLDERS["train"])
    kill("train")
    code = repository / "ear/training/means.py"
    code.write_text(code.read_text() + "\n_UNRELATED = 1\n")
    assert one_stage.main("train") == 1
    assert "ear/training changed since; set runtime.other_code to continue" in capsys.readouterr().err
    change(repository, {"runtime.other_code": "continue"})
    assert one_stage.main("train") == 0
    assert "resuming after" in capsys.readouterr().out
    assert contents(repository / FOLDERS["train"]) == whole
    record = json.loads((repository / "data/lineage/train.json").read_text())
    assert len(record["earlier_code"]) == 1


def test_links_instead_of_pixels_give_the_same_latents_and_features(repository, monkeypatch):
    monkeypatch.chdir(repository)
    outputs = ("data/latents", "data/reconstructions", "data/reference")
    before = {name: contents(repository / name) for name in outputs}
    for stage in BEFORE_TRAINING[1:]:
        one_stage.run(stage, {**TINY, "prepare.compression": "links"})
    with h5py.File(next((repository / "data/prepared").glob("train-*"))) as file:
        assert "images" not in file
    assert {name: contents(repository / name) for name in outputs} == before


def test_a_longer_training_goes_on_from_a_finished_one(repository, tmp_path, monkeypatch, capsys):
    """To the bytes of one that was not interrupted, if the rates allow it."""
    shutil.copytree(repository, tmp_path / "whole", symlinks=True)
    monkeypatch.chdir(tmp_path / "whole")
    one_stage.run("train", {**TINY, "train.schedule": "constant", "train.images": 1280})
    assert "resuming" not in capsys.readouterr().out
    monkeypatch.chdir(repository)
    change(repository, {"train.schedule": "constant"})
    assert one_stage.main("train") == 0
    run("dvc", "commit", "--force", "train", cwd=repository)
    change(repository, {"train.images": 1280})
    assert "resuming after 640 images" in run("dvc", "repro", "train", cwd=repository)
    assert contents(repository / FOLDERS["train"]) == contents(tmp_path / "whole" / FOLDERS["train"])
    shutil.rmtree(tmp_path / "whole")


def test_a_longer_training_says_why_it_begins_anew(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    change(repository, {"train.images": 1280})
    assert one_stage.main("train") == 0
    said = capsys.readouterr().out
    assert "starts anew, since it cannot extend a shorter training: train.schedule is cosine" in said


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/evaluation.md"])
def test_the_python_of_a_page_runs(repository, page, monkeypatch):
    monkeypatch.chdir(repository)
    blocks = re.findall(r"^```python\n(.*?)^```", Path(page).read_text(), re.S | re.M)
    assert blocks
    for block in blocks:
        lines = [line for line in block.splitlines() if ".pth" not in line]  # of published sizes: test_interop.py
        exec("\n".join(lines), names := {})
        assert names.keys() & {"images", "file"}


def test_the_example_of_editing_draws_a_picture(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    monkeypatch.setattr(sys, "argv", ["inpaint", "--output", str(tmp_path / "edited.png")])
    inpaint.main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'edited.png'}\n"
    with Image.open(tmp_path / "edited.png") as picture:
        columns, rows = 6, 8
        assert picture.width / picture.height == pytest.approx(columns / rows, rel=0.05)


def test_python_loads_and_generates(finished):
    model = ear.load(finished / "data/finetuned")
    assert not model.training
    images = ear.generate(finished / "data", labels=[3, "7"], steps=4, guidance=2.0, temperature=0.9, seed=0)
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.uint8
    again = ear.generate(finished / "data", labels=[3], steps=4, guidance=2.0, temperature=0.9, seed=0)
    np.testing.assert_array_equal(again[0], images[0])


@pytest.mark.parametrize(
    ("values", "stage", "words"),
    [
        ({"score.alpha": 2.0}, "train", ["score.alpha is 2.0", "below 2"]),
        ({"sample.guidance": -1.0}, "sample", ["sample.guidance is -1.0", "at least 0"]),
        ({"model.patch_size": 3}, "train", ["model.patch_size is 3", "divide"]),
        ({"train.learning_rate": "fast"}, "train", ["train.learning_rate is 'fast'", "number"]),
        ({"train.learningrate": 1e-3}, "train", ["train.learningrate is not a known key", "learning_rate"]),
    ],
)
def test_mistakes_are_one_line_and_cost_nothing(finished, monkeypatch, capsys, values, stage, words):
    parameters, before = (finished / "params.yaml").read_text(), digests(finished)
    monkeypatch.chdir(finished)
    try:
        change(finished, values)
        assert one_stage.main(stage) == 1
    finally:
        (finished / "params.yaml").write_text(parameters)
    sentence, _ = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"{stage}: params.yaml: ")
    assert all(word in sentence for word in words), sentence
    assert digests(finished) == before


def test_a_model_and_latents_of_another_tokenizer_are_refused(repository, monkeypatch, capsys):
    change(repository, {"tokenizer.images": 16})
    monkeypatch.chdir(repository)
    assert one_stage.main("tokenizer") == 0
    refusals = {"sample": "run the stages cache, train and finetune again", "finetune": "run the train stage again."}
    for stage, words in refusals.items():
        if stage == "finetune":
            assert one_stage.main("cache") == 0
        capsys.readouterr()
        assert one_stage.main(stage) == 1
        assert words in capsys.readouterr().err.splitlines()[0]


@pytest.mark.slow  # the flow without a server; tests/flows/test_inputs.py has what it calls
def test_a_flow_notices_new_images(tmp_path, monkeypatch):
    """DVC does not watch data.path; the flow lists it every time."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    folder = fresh(tmp_path / "repository")
    images = write_class_folders(tmp_path / "images", each=4, classes=2)
    change(folder, {"data.source": "folder", "data.path": str(images)})
    run("dvc", "repro", "fetch", cwd=folder)
    shutil.copy(next(images.rglob("*.jpg")), images / "cat/new.jpg")
    assert "fetch" not in stale(folder)
    said = run(sys.executable, "-m", "flows.pipeline", "--stages", "fetch", cwd=folder)
    assert "pipeline: ran: fetch" in said
    assert "cat/new.jpg" in (folder / "data/raw/manifest.csv").read_text()
