"""The rows that a running training leaves on disk, and trackers."""

import os
import sys
import time
import types
from pathlib import Path

import pytest

from ear.display import live
from ear.display.live import TRAINING, VALIDATION, Live, read_rows
from ear.display.trackers import Start, opened

ROW = {"images": 64, "loss": 1.5, "rate": 0.001}


def test_rows_grow_and_a_resumed_training_drops_those_that_it_will_write_again(tmp_path):
    shown = Live(tmp_path, key="a", more=lambda row: {"double": 2 * row["loss"]})
    shown.begin(0, {"total_images": 192})
    for images in (64, 128, 192):
        shown.training({**ROW, "images": images})
    shown.validation({"images": 192, "loss": 2.0})
    assert [row["images"] for row in read_rows(tmp_path / TRAINING)] == [64, 128, 192]
    assert read_rows(tmp_path / TRAINING)[0] == {**ROW, "double": 3.0}
    Live(tmp_path, key="a").begin(192, {}, (128, 0))  # the checkpoint of image 192 was written before its rows
    assert [row["images"] for row in read_rows(tmp_path / TRAINING)] == [64, 128]
    assert read_rows(tmp_path / VALIDATION) == []
    Live(tmp_path, key="b").begin(192, {}, (192, 192))  # another training
    assert read_rows(tmp_path / TRAINING) == []


def test_a_disk_that_refuses_rows_is_told_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "live").write_text("a file where the folder would be")
    shown = Live(tmp_path / "live/train")
    shown.begin(0, {})
    shown.training(ROW)
    shown.validation({"images": 64, "loss": 2.0})
    said = capsys.readouterr().out
    assert said.startswith(f"note: {tmp_path}/live/train cannot be written (")
    assert said.count("note: ") == 1


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    shown = Live(tmp_path)
    shown.begin(0, {})
    shown.training(ROW)
    with (tmp_path / TRAINING).open("a") as file:
        file.write("128\t1.2")
    assert read_rows(tmp_path / TRAINING) == [ROW]


def test_figures_that_appear_or_are_missing(tmp_path):
    shown = Live(tmp_path)
    shown.begin(0, {})
    shown.training(ROW)
    shown.training({**ROW, "images": 128, "mfu": None})
    shown.training({**ROW, "images": 192, "mfu": 0.5})
    rows = read_rows(tmp_path / TRAINING)
    assert [row["mfu"] for row in rows] == [None, None, 0.5]


def test_other_ranks_show_nothing_but_start_to_count_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    shown = Live(more=lambda row: asked.append(row) or {})
    shown.begin(0, {})
    shown.training(ROW)
    shown.close()
    assert asked == [ROW]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_training_leaves_empty_tables_and_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for loss in (1.5, 2.5):
        shown = Live(live.FOLDER / "train")
        shown.begin(0, {})
        began = time.time() - 1
        shown.training({**ROW, "loss": loss})
        live.archive("train", began)
    assert read_rows(live.FOLDER / "finished" / "train" / TRAINING) == [{**ROW, "loss": 2.5}]
    assert (live.FOLDER / "train" / TRAINING).read_text() == "images\n"
    live.archive("fetch", 0.0)  # which trains nothing
    assert not (live.FOLDER / "fetch").exists()
    Live(live.FOLDER / "train").begin(0, {})
    live.archive("train", time.time() + 60)  # given up before this run of the stage, which trained nothing
    assert read_rows(live.FOLDER / "finished" / "train" / TRAINING) == [{**ROW, "loss": 2.5}]
    assert not (live.FOLDER / "train" / live.ABOUT).exists()


def logged(tmp_path, *names: str) -> None:
    """Two sittings of one training; the first was killed after a row that its checkpoint does not know."""
    for done, rows in ((0, (64, 128)), (64, (128, 192))):

        def start(images: int):
            return opened(
                names, Start("train-1", tmp_path, tmp_path / "work", {"train": {"rate": 0.1}, "mirror": True}, images)
            )

        shown = Live(tmp_path / "live", key="1", trackers=start)
        shown.begin(done, {}, (done, done))
        for images in rows:
            shown.training({**ROW, "images": images, "mfu": None})
            shown.validation({"images": images, "loss": 2.0})
        shown.close()


def test_tensorboard_has_every_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("work/tensorboard/train-1").Reload()
    assert [(e.step, e.value) for e in events.Scalars("training/loss")] == [(64, 1.5), (128, 1.5), (192, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(64, 2.0), (128, 2.0), (192, 2.0)]
    assert "training/mfu" not in events.Tags()["scalars"]


def test_mlflow_has_every_row_in_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logged(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ear").experiment_id])
    assert (run.info.run_name, run.data.params) == ("train-1", {"train.rate": "0.1", "mirror": "True"})
    steps = {m.step for m in client.get_metric_history(run.info.run_id, "training/loss")}
    assert steps == {64, 128, 192}


def test_wandb_offline_keeps_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path, "wandb")
    runs = {path.name.rsplit("-", 1)[1] for path in Path("work/wandb").glob("offline-run-*")}
    assert len(runs) == 1
    assert "note: " not in capsys.readouterr().out  # of a row that could not be logged


@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path, monkeypatch, capsys, moment):
    class Run:
        id = "1"

        def define_metric(self, *_, **__):
            pass

        def log(self, figures):
            if moment == "log":
                raise ConnectionError("no route")

        def finish(self):
            if moment == "close":
                raise ConnectionError("no route")

    def start(**options):
        assert os.environ["WANDB_MODE"] == "offline"  # nothing leaves the machine by default
        if moment == "start":
            raise ConnectionError("no route")
        return Run()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=start))
    (tracker,) = opened(["wandb"], Start("train-1", tmp_path, tmp_path / "work", {}, 0))
    tracker.log("training", ROW)
    tracker.log("training", ROW)
    tracker.close()
    told = capsys.readouterr().out
    assert told == "note: wandb has failed and is off for the rest of this training (ConnectionError: no route)\n"
    assert read_rows(tmp_path / TRAINING) == []
