"""A run of a stage in a small repository of its own: what it publishes, refuses, keeps and deletes."""

import json
import shutil
import threading
import time
from pathlib import Path

import processes
import pytest
from filelock import FileLock

from ear.errors import UserError
from ear.files.digests import sha256
from ear.lineage import run as run_module
from ear.lineage.declaration import declarations
from ear.lineage.digests import file_digests
from ear.lineage.record import Record
from ear.lineage.run import Run, clear_finished

DVC = """
stages:
  first:
    cmd: python first.py
    deps: [first.py]
    outs: [data/lineage/first.json, data/numbers]
  second:
    cmd: python second.py
    params: [second]
    deps: [data/numbers, second.py, package]
    outs: [data/lineage/second.json, data/sum.txt]
    metrics: [{data/metrics.json: {cache: false}}]
"""


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(DVC)
    Path("first.py").write_text("one = 1\n")
    Path("second.py").write_text("two = 2\n")
    Path("package").mkdir()
    Path("package/inner.py").write_text("three = 3\n")
    first()
    return tmp_path


def first() -> None:
    with Run("first", dict) as run:
        folder = run.output("data/numbers")
        folder.mkdir()
        for k in range(3):
            (folder / f"{k}.txt").write_text(str(k))
        run.publish()


class Second:
    """The second stage, stopped between its work and its publication."""

    def __init__(self, **options):
        self.values = {"second": {"scale": 2}}
        self.options = options

    def __call__(self, meanwhile=lambda: None) -> Path:
        with Run("second", lambda: json.loads(json.dumps(self.values)), **self.options) as run:
            scratch = run.scratch(self.values, ["data/numbers/0.txt"])
            kept = scratch / "kept.txt"
            kept.write_text("begun" if not kept.exists() else "continued")
            run.output("data/sum.txt").write_text("6")
            run.output("data/metrics.json").write_text("{}")
            meanwhile()
            run.publish()
        return scratch


def scratches() -> list[Path]:
    return [path for path in Path("work/second").iterdir() if path.is_dir()]


def test_the_record_names_parameters_code_inputs_and_outputs():
    Second()()
    record = Record.read(Path("data/lineage/second.json"))
    assert record.parameters == {"second": {"scale": 2}}
    assert record.code.keys() == {"second.py", "package"}
    assert record.inputs == {f"data/numbers/{k}.txt": sha256(f"data/numbers/{k}.txt") for k in range(3)}
    assert record.outputs == {name: sha256(name) for name in ("data/sum.txt", "data/metrics.json")}
    assert record.inputs == Record.read(Path("data/lineage/first.json")).outputs
    assert not Path("work/second/outputs").exists()


def test_two_runs_leave_equal_bytes():
    Second()()
    before = Path("data/lineage/second.json").read_bytes()
    Second()()
    assert Path("data/lineage/second.json").read_bytes() == before


def test_an_edit_before_the_run_counts_as_one_during_it():
    """While libraries are imported, say: the caller works with the parameters that it has read."""
    second = Second(began={"second": {"scale": 1}})
    with pytest.raises(UserError, match=r"second\.scale: 1, now 2"):
        second()
    assert not Path("data/sum.txt").exists()


def edit_parameters(second: Second) -> None:
    second.values["second"]["scale"] = 7


def edit_package(_: Second) -> None:
    Path("package/inner.py").write_text("three = 4\n")


@pytest.mark.parametrize(
    ("edit", "said"), [(edit_parameters, r"second\.scale: 2, now 7"), (edit_package, r"\(package\)")]
)
def test_an_edit_during_the_run_publishes_nothing_and_keeps_the_progress(edit, said):
    second = Second()
    with pytest.raises(UserError, match=said):
        second(lambda: edit(second))
    assert not Path("data/sum.txt").exists()
    assert [(path / "kept.txt").read_text() for path in scratches()] == ["begun"]
    assert not list(Path("work/second").glob("*.published.json"))  # it counts as unfinished


def test_an_edit_while_outputs_are_hashed_publishes_nothing(monkeypatch):
    """Digests of large outputs take minutes."""

    def edited_meanwhile(paths):
        found = file_digests(paths)
        edit_package(second)
        return found

    second = Second()
    monkeypatch.setattr(run_module, "file_digests", edited_meanwhile)
    with pytest.raises(UserError, match=r"code changed while the stage ran \(package\)"):
        second()
    assert not Path("data/sum.txt").exists()


def test_undoing_the_edit_publishes_what_was_kept():
    second = Second()
    with pytest.raises(UserError):
        second(lambda: edit_package(second))
    Path("package/inner.py").write_text("three = 3\n")
    assert (second() / "kept.txt").read_text() == "continued"
    assert Path("data/sum.txt").read_text() == "6"


def test_an_input_that_changes_during_the_run_is_named():
    with pytest.raises(UserError, match=r"data/numbers/1\.txt changed while the stage read it"):
        Second()(lambda: Path("data/numbers/1.txt").write_text("9"))
    assert not Path("data/sum.txt").exists()


def test_an_input_that_appears_during_the_run_is_named():
    with pytest.raises(UserError, match=r"data/numbers/new\.txt changed"):
        Second()(lambda: Path("data/numbers/new.txt").write_text("9"))


def test_a_damaged_input_is_named_with_the_remedy():
    path = Path("data/numbers/2.txt")
    path.write_bytes(b"3")
    with pytest.raises(UserError, match=r"data/numbers/2\.txt is not what the first stage wrote.*ear verify --repair"):
        Second()()
    assert not Path("data/sum.txt").exists()


def test_a_damaged_record_stops_only_the_stages_that_need_it():
    Second()()
    Path("data/lineage/second.json").write_text("{")
    first()
    Second()()
    Path("data/lineage/first.json").write_text("{")
    with pytest.raises(UserError, match=r"data/lineage/first\.json"):
        Second()()


def test_an_input_that_is_not_read_is_neither_checked_nor_recorded():
    Path("data/numbers/2.txt").write_bytes(b"3")
    Second(unread="data/numbers/2*")()
    assert Record.read(Path("data/lineage/second.json")).inputs.keys() == {"data/numbers/0.txt", "data/numbers/1.txt"}


def test_digests_that_the_stage_has_computed_are_taken_over():
    with Run("second", dict) as run:
        run.output("data/sum.txt").write_text("6")
        run.output("data/metrics.json").write_text("{}")
        run.computed("data", {"all": [{"file": "sum.txt", "sha256": "abc"}]})
        run.publish()
    assert Record.read(Path("data/lineage/second.json")).outputs["data/sum.txt"] == "abc"


def test_a_damaged_input_is_found_before_the_end():
    Path("data/numbers/2.txt").write_bytes(b"3")
    with Run("second", dict) as run:
        for future in run._inputs._futures.values():
            future.result()
        with pytest.raises(UserError, match="is not what the first stage wrote"):
            run.check()


def interrupt(second: Second) -> None:
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second(stop)


def test_work_begun_under_other_code_is_neither_continued_nor_deleted():
    interrupt(Second())
    edit_package(Second())
    with pytest.raises(UserError, match=r"package changed since; set runtime\.other_code to continue"):
        Second()()
    assert [(path / "kept.txt").read_text() for path in scratches()] == ["begun"]
    Path("package/inner.py").write_text("three = 3\n")
    assert (Second()() / "kept.txt").read_text() == "continued"
    assert Record.read(Path("data/lineage/second.json")).earlier_code == ()


def test_work_continued_under_other_code_says_so():
    interrupt(Second())
    edit_package(Second())
    assert (Second(other_code="continue")() / "kept.txt").read_text() == "continued"
    record = Record.read(Path("data/lineage/second.json"))
    (earlier,) = record.earlier_code
    assert earlier["package"] != record.code["package"]
    assert earlier["second.py"] == record.code["second.py"]


def test_work_begun_with_other_libraries_is_neither_continued_nor_hidden(monkeypatch):
    installed = run_module.versions()
    monkeypatch.setattr(run_module, "versions", lambda: {**installed, "torch": "1.0"})
    interrupt(Second())
    monkeypatch.setattr(run_module, "versions", lambda: installed)
    with pytest.raises(UserError, match=r"torch \(was 1\.0\) changed since; set runtime\.other_code to continue"):
        Second()()
    Second(other_code="continue")()
    record = Record.read(Path("data/lineage/second.json"))
    (earlier,) = record.earlier_code
    assert (earlier["torch"], record.libraries["torch"]) == ("1.0", installed["torch"])


def test_restarting_drops_the_work_of_other_code():
    interrupt(Second())
    edit_package(Second())
    assert (Second(other_code="restart")() / "kept.txt").read_text() == "begun"
    assert Record.read(Path("data/lineage/second.json")).earlier_code == ()


def test_the_work_of_other_parameters_is_kept():
    interrupt(Second())
    other = Second()
    other.values["second"]["scale"] = 3
    other()
    assert len(scratches()) == 2
    assert (Second()() / "kept.txt").read_text() == "continued"


def test_scratch_goes_once_dvc_lock_lists_the_record():
    Second()()
    clear_finished(declarations().values())
    assert len(scratches()) == 1
    md5 = run_module._md5(Path("data/lineage/second.json"))
    Path("dvc.lock").write_text(f"stages: {{second: {{outs: [{{path: data/lineage/second.json, md5: {md5}}}]}}}}\n")
    clear_finished(declarations().values())
    assert scratches() == []


def test_finished_work_is_not_mentioned(capsys):
    Second()()
    other = Second()
    other.values["second"]["scale"] = 3
    other()
    assert "unfinished" not in capsys.readouterr().out


def test_unfinished_work_of_other_parameters_is_mentioned(capsys):
    interrupt(Second())
    (folder,) = scratches()
    other = Second()
    other.values["second"]["scale"] = 3
    other()
    assert f"unfinished work of other parameters or inputs (0.00 GB) is kept in {folder}" in capsys.readouterr().out


def test_work_of_another_copy_is_not_called_unfinished(capsys):
    interrupt(Second())
    (folder,) = scratches()
    other = Second()
    other.values["second"]["scale"] = 3
    with run_module._lock_of(folder).acquire(blocking=False):
        other()
    assert "unfinished" not in capsys.readouterr().out


def test_copies_of_the_repository_share_unfinished_work(tmp_path, monkeypatch):
    """One that was stopped is continued in another; two at once take turns."""
    shutil.copytree(tmp_path, tmp_path / "copy")
    monkeypatch.setenv(run_module.SHARED_WORK, str(tmp_path / "shared"))
    interrupt(Second())
    monkeypatch.chdir("copy")
    assert (Second()() / "kept.txt").read_text() == "continued"
    assert [path.name for path in Path("work/second").iterdir()] == ["lock"]


def test_a_run_waits_for_another_copy_at_the_same_work(tmp_path, monkeypatch, capsys):
    held, ended = threading.Event(), []

    def other_copy(folder: Path):
        with FileLock(tmp_path / "work/locks" / f"second-{folder.name}"):
            held.set()
            time.sleep(0.5)
            ended.append(True)

    with Run("second", dict) as run:
        folder = run.scratch({}, [])
    threading.Thread(target=other_copy, args=[folder]).start()
    held.wait()
    with Run("second", dict) as run:
        assert run.scratch({}, []) == folder
        assert ended == [True]
    assert f"another copy of the repository works in {folder}; waiting" in capsys.readouterr().out


def test_ranks_wait_together_for_another_copy_at_the_same_work(tmp_path, monkeypatch, capfd):
    """They wait in short turns, since a collective that waits for hours would time out."""
    monkeypatch.setattr(run_module, "_TURN_SECONDS", 0.2)
    with Run("second", dict) as run:
        folder = run.scratch({}, [])

    hold, waited = Run._hold, tmp_path / "waited"

    def watched(run: Run, folder: Path, seconds: float) -> bool:
        held = hold(run, folder, seconds)
        if seconds and not held:
            waited.touch()
        return held

    def work() -> Path:
        with Run("second", dict) as run:
            return run.scratch({}, [])

    def release() -> None:
        while not waited.exists():
            time.sleep(0.05)
        lock.release()

    monkeypatch.setattr(Run, "_hold", watched)
    lock = FileLock(tmp_path / "work/locks" / f"second-{folder.name}", thread_local=False)
    lock.acquire()
    threading.Thread(target=release).start()
    assert processes.together(work) == [folder, folder]
    assert capfd.readouterr().out.count(f"works in {folder}; waiting until it ends") == 1


def test_files_from_outside_the_repository_are_recorded_by_name(tmp_path):
    outside = tmp_path / "cache/weights.pth"
    outside.parent.mkdir()
    outside.write_text("published")
    with Run("second", dict) as run:
        run.scratch({}, [outside, "data/numbers/0.txt"])
        for output in ("data/sum.txt", "data/metrics.json"):
            run.output(output).write_text("{}")
        run.publish()
    inputs = Record.read(Path("data/lineage/second.json")).inputs
    assert inputs.keys() == {"data/numbers/0.txt", "data/numbers/1.txt", "data/numbers/2.txt", "weights.pth"}
    assert inputs["weights.pth"] == sha256(outside)


def test_a_result_is_not_extended_where_dvc_names_no_cache():
    lock = {"stages": {"second": {"cmd": "python second.py", "outs": [{"path": "data/sum.txt", "md5": "0" * 32}]}}}
    Path("dvc.lock").write_text(json.dumps(lock))
    with Run("second", lambda: {"second": {"scale": 2}}) as run:
        found, reason = run.shorter("second.scale", "data/sum.txt")
    assert found is None
    assert reason.startswith("`dvc cache dir` failed")


def test_a_second_run_of_the_stage_is_refused():
    with (
        Run("second", dict),
        pytest.raises(UserError, match="another second stage runs in this folder"),
        Run("second", dict),
    ):
        pass


def test_a_stage_that_writes_nothing_fails():
    with Run("second", dict) as run, pytest.raises(RuntimeError, match=r"has not written data/sum\.txt"):
        run.publish()


@pytest.mark.parametrize(
    "content", [b"stages: {a: [", b"<<<<<<< HEAD\nstages:\n", b"[1, 2]", b"stages:\n", b"stages:\n  a:\n", b"\xff"]
)
def test_a_damaged_lock_is_one_sentence(content):
    Path("dvc.lock").write_bytes(content)
    with pytest.raises(UserError, match=r"dvc\.lock is not a readable list of stages .*git checkout HEAD dvc\.lock"):
        Second()()


def test_a_linked_output_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Path("data/sum.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data/sum\.txt is a symbolic link.*dvc cache dir"), Run("second", dict):
        pass


def test_what_a_killed_writer_left_is_removed():
    interrupt(Second())
    (folder,) = scratches()
    kept = Path("work/kept", f"second-{folder.name}")
    kept.mkdir(parents=True)
    for place in (folder, kept):
        (place / ".kept.txt.0123456789ab.partial").write_text("half")
    Second()()
    assert [path.name for path in folder.iterdir()] == ["kept.txt"]
    assert list(kept.iterdir()) == []
