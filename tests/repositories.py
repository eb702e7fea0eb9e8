"""Repositories of this project in a temporary folder, with parameters that make every stage take seconds."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from omegaconf import OmegaConf

from ear.files.digests import sha256

ROOT = Path(__file__).resolve().parent.parent
BEFORE_TRAINING = ["fetch", "prepare", "reference", "tokenizer", "reconstruct", "cache"]
STAGES = [*BEFORE_TRAINING, "train", "finetune", "sample", "evaluate"]
SHARED = "EAR_TESTS_SHARED"  # in the environment: a folder of all processes of a test run (conftest.py)
IDENTITY = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")  # git's options for a commit
TINY = {
    "compute.threads": 1,
    "tokenizer.block_channels": [8, 16],
    "tokenizer.images": 640,
    "model.width": 32,
    "model.depth": 2,
    "model.head_width": 32,
    "model.head_depth": 1,
    "train.images": 640,
    "train.warmup_images": 64,
    "train.validate_images": 320,
    "runtime.checkpoint_images": 64,
    "finetune.images": 128,
    "sample.count": 40,
    "sample.steps": 4,
    "sample.batch_size": 16,
    "reference.images": 640,
    "evaluate.kid_subset_size": 20,
    "runtime.workers": 0,
}


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Without PYTHONPATH the repository's own code runs, as in a user's clone.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return clean | {"PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(path: str) -> dict:
    """A JSON file of the project's last commit: a run of the pipeline in the checkout has other figures."""
    return json.loads(run("git", "show", f"HEAD:{path}", cwd=ROOT))


def fresh(folder: Path) -> Path:
    """A repository of the project's files as they are now, with tiny parameters, committed."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    change(folder, TINY)
    run("git", "init", "-q", cwd=folder)
    run("dvc", "config", "core.site_cache_dir", str(folder / ".dvc/tmp/site"), cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", *IDENTITY, "commit", "-q", "-m", "tiny", cwd=folder)
    return folder


def reproduced(folder: Path) -> Path:
    """A fresh repository in which `dvc repro` has run all stages: once in this test run, of which others are copies."""
    first = Path(os.environ[SHARED]) / "reproduced"
    done = first.with_suffix(".done")
    with FileLock(first.with_suffix(".busy")):
        if not done.exists():
            shutil.rmtree(first, ignore_errors=True)  # of an attempt that failed
            run("dvc", "repro", cwd=fresh(first))
            done.touch()
    return copy(first, folder)


def copy(repository: Path, folder: Path) -> Path:
    """A copy in `folder`, an empty one. It shares files that git and DVC never write again, so unlink a file of data/
    before writing into it: DVC links outputs to its cache.
    """

    def linked_or_copied(source: str, target: str) -> None:
        if any(part in source for part in (".git/objects/", ".dvc/cache/")):
            with contextlib.suppress(OSError):  # another disk
                os.link(source, target)
                return
        shutil.copy2(source, target)

    options = {"symlinks": True, "dirs_exist_ok": True, "ignore": shutil.ignore_patterns("site")}  # DVC's own state
    shutil.copytree(repository, folder, copy_function=linked_or_copied, **options)
    (folder / ".dvc/config.local").write_text(f"[core]\n    site_cache_dir = {folder / '.dvc/tmp/site'}\n")
    return folder


def change(folder: Path, values: dict) -> None:
    content = OmegaConf.load(folder / "params.yaml")
    for key, value in values.items():
        OmegaConf.update(content, key, value)
    OmegaConf.save(content, folder / "params.yaml")


def stale(folder: Path) -> set[str]:
    """The stages that are out of date themselves; what follows them runs once their outputs have changed."""
    from dvc.repo import Repo

    # What `dvc status` asks, without the seconds that a program takes to start; its names are relative to the folder.
    with contextlib.chdir(folder), Repo() as repository:
        return set(repository.status())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every output except the report, which contains the time of writing."""
    files = [path for path in sorted((folder / "data").rglob("*")) if path.is_file() and path.name != "report.html"]
    return {str(path.relative_to(folder)): sha256(path) for path in files}
