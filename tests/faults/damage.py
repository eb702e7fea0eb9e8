"""Full disks, file-size limits and flipped bytes."""

import contextlib
import os
import random
import re
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.pipelines import assert_same, clear, copy, expected, finish, last_lines, python, template
from tests.repositories import digests, environment, run

_MIB = 1 << 20


def full_disk(case: int) -> dict[str, int]:
    """The repository on a tmpfs that fills up at a seeded size; with more room the run goes on."""
    if os.geteuid():
        return {"not possible: only root can mount a tmpfs": 1}
    with tempfile.TemporaryDirectory() as point, _tmpfs(point):
        folder = Path(point) / "copy"
        shutil.copytree(template(), folder, symlinks=True)
        clear(folder)
        run("dvc", "config", "core.site_cache_dir", str(folder / ".dvc/tmp/site"), cwd=folder)
        used = shutil.disk_usage(point).used
        room = random.Random(f"disk {case}").uniform(0.05, 0.95) * _size_of_a_run()
        _resize(point, used + int(room))
        done = _repro(folder)
        said = done.stdout + done.stderr
        assert done.returncode, "the disk was large enough"
        _check_sentence(said)
        whole = _whole_outputs_are_right(folder)
        _resize(point, 4096 * _MIB)
        finish(folder)
        assert_same(folder)
    return {f"stopped with a sentence, {'one or more' if whole else 'no'} outputs complete": 1}


def _check_sentence(said: str) -> None:
    """The reason is named, by a stage or by DVC and its database, and without a traceback."""
    assert re.search("No space left on device|bytes are free|File too large|disk is full|disk I/O", said), last_lines(
        said
    )
    assert "Traceback" not in said, last_lines(said)


def _size_of_a_run() -> int:
    """Bytes that a run adds to the repository."""
    files = [p for name in ("data", ".dvc/cache", ".dvc/tmp") for p in (template() / name).rglob("*") if p.is_file()]
    return sum({p.stat().st_ino: p.stat().st_size for p in files}.values())


@contextlib.contextmanager
def _tmpfs(point: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)


def _resize(point: str, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", point], check=True)


def _repro(folder: Path, limit: int | None = None) -> subprocess.CompletedProcess:
    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        ["dvc", "repro"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=restrict,
    )


def _whole_outputs_are_right(folder: Path) -> int:
    """Every output that exists has the right bytes; returns how many there are."""
    found = {name: digest for name, digest in digests(folder).items() if ".partial" not in name}
    wrong = [name for name, digest in found.items() if expected().get(name) != digest]
    assert not wrong, f"incomplete or wrong after the fault: {wrong}"
    return len(found)


def file_limit(case: int) -> dict[str, int]:
    """No process may write a file larger than a seeded size; without the limit the run goes on."""
    largest = max(p.stat().st_size for p in (template() / "data").rglob("*") if p.is_file())
    limit = int(2_000 * (0.9 * largest / 2_000) ** random.Random(f"limit {case}").random())
    with copy(empty=True) as folder:
        done = _repro(folder, limit)
        said = done.stdout + done.stderr
        assert done.returncode, f"nothing exceeded {limit} bytes"
        whole = _whole_outputs_are_right(folder)
        if whole:  # else DVC's own files were too large before a stage began
            _check_sentence(said)
        finish(folder)
        assert_same(folder)
    return {f"stopped with a sentence, {'one or more' if whole else 'no'} outputs complete": 1}


def flip(case: int) -> dict[str, int]:
    """One byte of an output, in place, so that DVC's cache is damaged too where it shares the file."""
    with copy() as folder:
        run("dvc", "checkout", "--relink", cwd=folder)  # copying the template has undone the links
        files = sorted(path for path in (folder / "data").rglob("*") if path.is_file() and path.name != ".gitignore")
        kinds = {
            (path.parent.relative_to(folder).parts[:2], path.suffix, path.stem.split("-")[0]): path for path in files
        }
        randomness = random.Random(f"flip {case}")
        order = sorted(kinds.values())
        random.Random("order").shuffle(order)
        path = order[case % len(order)]
        content = bytearray(path.read_bytes())
        content[randomness.randrange(len(content))] ^= 1 << randomness.randrange(8)
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
        with path.open("r+b") as file:
            file.write(content)
        name = str(path.relative_to(folder))
        verify = subprocess.run(
            python("-m", "ear", "verify"), cwd=folder, env=environment(), capture_output=True, text=True
        )
        said = verify.stdout + verify.stderr
        assert verify.returncode == 1, said
        assert name in said, said
        assert "Traceback" not in said, said
        _verify(folder, "--repair")
        finish(folder)
        assert_same(folder)
    return {"named, and made again": 1}


def _verify(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = python("-m", "ear", "verify", *options)
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
