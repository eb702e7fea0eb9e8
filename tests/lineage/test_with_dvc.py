"""What DVC promises, on a real repository of two small stages: lineage, reruns, damage, failures."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ear.commands.cli import main
from ear.errors import UserError
from ear.lineage.cache import cached_outputs

ROOT = Path(__file__).parents[2]
DVC = """
stages:
  numbers:
    cmd: python numbers_stage.py
    params: [numbers]
    deps: [numbers_stage.py]
    outs: [data/lineage/numbers.json, data/numbers]
  total:
    cmd: python total_stage.py
    params: [total]
    deps: [data/numbers, total_stage.py]
    outs: [data/lineage/total.json, data/total/total.txt]
    metrics: [{data/total/metrics.json: {cache: false}}]
"""
STAGE = """
import os, sys, yaml
from pathlib import Path
from ear.errors import UserError
from ear.lineage.run import Run

def values():
    return {NAME: yaml.safe_load(Path("params.yaml").read_text())[NAME]}

try:
    with open("ran.txt", "a") as log:
        log.write(NAME + "\\n")
    with Run(NAME, values, files=[path for path in [Path("weights.pth")] if path.exists()]) as run:
        work(run, values()[NAME])
        if hook := os.environ.get("MEANWHILE"):
            exec(hook)
        run.publish()
except UserError as error:
    sys.exit(f"{NAME}: {error}")
"""
NUMBERS = (
    """
NAME = "numbers"
def work(run, count):
    folder = run.output("data/numbers")
    folder.mkdir()
    for k in range(count):
        (folder / f"{k}.txt").write_text(str(k))
"""
    + STAGE
)
TOTAL = (
    """
NAME = "total"
def work(run, scale):
    total = scale * sum(int(path.read_text()) for path in Path("data/numbers").iterdir())
    folder = run.output("data/total")
    folder.mkdir()
    (folder / "total.txt").write_text(str(total))
    (folder / "metrics.json").write_text('{"total": %d}' % total)
"""
    + STAGE
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)


def dvc(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "dvc", *arguments, **environment)


def verify(*options: str) -> Result:
    return CliRunner().invoke(main, ["verify", *options])


def set_parameters(numbers: int = 4, total: int = 1) -> None:
    Path("params.yaml").write_text(f"numbers: {numbers}\ntotal: {total}\n")


def ran() -> list[str]:
    """The stage programs started since the last call."""
    path = Path("ran.txt")
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """The two stages, reproduced once; cache links as in this project."""
    folder = tmp_path_factory.mktemp("template")
    with contextlib.chdir(folder):
        Path("dvc.yaml").write_text(DVC)
        Path("numbers_stage.py").write_text(NUMBERS)
        Path("total_stage.py").write_text(TOTAL)
        ignored = "/data/*\n!/data/total\n/data/total/*\n!/data/total/metrics.json\n/work\n/ran.txt\n"
        Path(".gitignore").write_text(ignored)
        set_parameters()
        run("git", "init", "--quiet")
        assert dvc("init", "--quiet").returncode == 0
        Path(".dvc/config").write_text('[cache]\n    type = "hardlink,symlink,copy"\n')
        done = dvc("repro")
        assert done.returncode == 0, done.stderr
        assert ran() == ["numbers", "total"]
        run("git", "add", "--all")
        run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "first")
    return folder


@pytest.fixture(autouse=True)
def repository(template, tmp_path, monkeypatch) -> Path:
    """A copy of them, in which outputs and DVC's cache share files as before."""
    subprocess.run(["cp", "-a", f"{template}/.", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics() -> dict:
    return json.loads(Path("data/total/metrics.json").read_text())


def test_going_back_to_earlier_parameters_starts_no_program():
    set_parameters(total=10)
    assert dvc("repro").returncode == 0
    assert (ran(), metrics()) == (["total"], {"total": 60})
    set_parameters()
    assert dvc("repro").returncode == 0
    assert (ran(), metrics()) == ([], {"total": 6})
    assert verify().exit_code == 0


def test_an_edit_during_a_stage_is_never_recorded():
    """DVC reads params.yaml after the command, so it would record 7 for outputs made with 5."""
    set_parameters(total=5)
    edit = "Path('params.yaml').write_text('numbers: 4\\ntotal: 7\\n')"
    done = dvc("repro", MEANWHILE=edit)
    assert done.returncode != 0
    assert "total: 5, now 7" in done.stderr
    assert not Path("data/total/total.txt").exists()
    assert dvc("repro").returncode == 0
    assert metrics() == {"total": 42}
    assert verify().exit_code == 0


def flip(path: str) -> None:
    """Change one byte in place, as a failing disk does: DVC's cache shares the file."""
    content = bytearray(Path(path).read_bytes())
    content[0] ^= 1
    with open(path, "r+b") as file:
        file.write(content)


def test_a_flipped_byte_is_named_and_made_again():
    flip("data/numbers/3.txt")
    told = verify()
    assert told.exit_code == 1
    assert "numbers: data/numbers/3.txt is damaged" in told.stdout
    set_parameters(total=2)
    done = dvc("repro")
    assert done.returncode != 0
    assert "data/numbers/3.txt is not what the numbers stage wrote" in done.stderr
    assert "deleted " in verify("--repair").stdout
    done = dvc("repro")
    assert done.returncode == 0, done.stderr
    assert Path("data/numbers/3.txt").read_text() == "3"
    assert metrics() == {"total": 12}
    assert verify().exit_code == 0


@pytest.mark.parametrize("damage", ["a digest", "half a file"])
def test_a_damaged_record_is_named_and_its_good_outputs_stay(damage):
    path = Path("data/lineage/numbers.json")
    content = path.read_text()
    digest = json.loads(content)["outputs"]["data/numbers/3.txt"]
    path.unlink()  # DVC's cache shares the file
    path.write_text(content.replace(digest, digest[::-1]) if damage == "a digest" else content[:40])
    told = verify()
    assert told.exit_code == 1
    assert "numbers: data/lineage/numbers.json is damaged: not what the stage wrote" in told.stdout
    assert "3.txt" not in told.stdout
    assert "deleted data/lineage/numbers.json;" in verify("--repair").stdout
    assert Path("data/numbers/3.txt").read_text() == "3"
    assert dvc("repro").returncode == 0
    assert verify().exit_code == 0


def test_a_damaged_list_of_files_in_the_cache_is_deleted(capsys):
    """As a power failure leaves it: cut short."""
    listing = next(Path(".dvc/cache/files/md5").rglob("*.dir"))
    content = listing.read_bytes()
    listing.unlink()
    listing.write_bytes(content[:20])
    told = verify()
    assert told.exit_code == 1
    assert "numbers: DVC's list of the files in data/numbers is damaged; run `ear verify --repair`, then" in told.stdout
    shutil.rmtree("data/numbers")
    with pytest.raises(UserError, match=r"\.dir is not a readable list of files .*ear verify --repair"):
        cached_outputs("numbers")
    assert f"deleted {listing.absolute()};" in verify("--repair").stdout
    assert dvc("repro").returncode == 0
    assert verify().exit_code == 0


def test_a_file_that_no_stage_wrote_is_named():
    Path("data/numbers/more.txt").write_text("9")
    told = verify()
    assert told.exit_code == 1
    assert "numbers: data/numbers/more.txt was not written by the stage" in told.stdout
    assert "numbers: data/numbers is not what dvc.lock lists" in told.stdout
    assert "deleted" not in verify("--repair").stdout
    assert Path("data/numbers/more.txt").read_text() == "9"  # it may be somebody's notes


def test_a_lock_with_other_parameters_than_the_stage_saw_is_named():
    lock = Path("dvc.lock").read_text()
    assert lock.count("total: 1\n") == 1
    Path("dvc.lock").write_text(lock.replace("total: 1\n", "total: 8\n"))
    told = verify()
    assert told.exit_code == 1
    assert "total: parameters in dvc.lock differ from those that the stage used (total: 1, now 8)" in told.stdout


def test_other_libraries_are_a_note():
    path = Path("data/lineage/total.json")
    content = json.loads(path.read_text())
    content["libraries"]["numpy"] = "0.1"
    path.unlink()
    path.write_text(json.dumps(content))
    assert dvc("commit", "--force", "total").returncode == 0
    said = "note: total ran with different library versions from those installed now (numpy: 0.1, now "
    assert said in verify().stdout


def test_code_that_dvc_lists_but_the_stage_did_not_run_is_a_note():
    with open("total_stage.py", "a") as file:
        file.write("# edited after the last look of the stage\n")
    assert dvc("commit", "--force", "total").returncode == 0
    told = verify()
    assert told.exit_code == 0
    assert "note: dvc.lock lists the current total_stage.py, but total ran with another version" in told.stdout
    assert "numbers ran with" not in told.stdout


def test_a_replaced_file_that_a_parameter_names_is_a_problem():
    """DVC tracks its name alone."""
    Path("weights.pth").write_text("published")
    assert dvc("repro", "--force", "total").returncode == 0
    assert verify().exit_code == 0
    Path("weights.pth").write_text("others")
    told = verify()
    assert told.exit_code == 1
    assert "total: weights.pth differs from the file that the stage read; restore that file, or use this" in told.stdout


def test_a_failed_stage_is_restored_by_the_flow(repository):
    from flows import repository as flow_repository

    set_parameters(total=3)
    assert dvc("repro", MEANWHILE="sys.exit(1)").returncode != 0
    assert not Path("data/total/metrics.json").exists()
    restored = flow_repository.restore("total")
    assert sorted(restored) == ["data/lineage/total.json", "data/total/metrics.json", "data/total/total.txt"]
    assert metrics() == {"total": 6}
    assert verify().exit_code == 0


def test_two_clones_have_equal_locks(tmp_path):
    run("git", "clone", "--quiet", str(tmp_path), str(tmp_path / "clone"))
    os.chdir(tmp_path / "clone")
    Path("dvc.lock").unlink()
    assert dvc("repro").returncode == 0
    assert Path("dvc.lock").read_bytes() == (tmp_path / "dvc.lock").read_bytes()
