"""Check the machine and the repository before a long run (`ear doctor`): each finding with what to do about it."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ear import config
from ear.config.parameters import PARAMETERS
from ear.errors import UserError
from ear.runtime.cores import cores

_SPACE = 10e9  # bytes that should be free; `ear describe` counts what a preset needs
_SHARED_MEMORY = 1e9  # bytes that NCCL and worker processes may need
_PINS = Path("requirements.txt")
_SET_UP = "`rm .venv/bin/.ready && make setup` installs the pinned ones"
_CRITICAL = (
    "torch",
    "torchvision",
    "torch-fidelity",
    "diffusers",
    "dvc",
    "prefect",
    "h5py",
    "numpy",
    "pillow",
    "scipy",
)


@dataclass(frozen=True)
class Finding:
    """What was found; with `fix` if it should be otherwise; `serious` if it would stop the pipeline."""

    subject: str
    found: str
    fix: str = ""
    serious: bool = False


def run() -> tuple[list[str], bool]:
    """(a line per finding, whether nothing is serious)."""
    findings = [finding for check in CHECKS for finding in _safely(check)]
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        mark = "FAIL" if finding.serious else "note" if finding.fix else "ok"
        lines.append(f"{mark:<4}  {finding.subject:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<6}{'':<{width}}  -> {finding.fix}")
    return lines, not any(finding.serious for finding in findings)


def _safely(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of a check; if it fails itself, that is one."""
    try:
        return list(check())
    except Exception as error:  # one broken check must not hide the others
        name = check.__name__.replace("_", " ")
        if isinstance(error, ImportError):
            return [Finding(name, f"cannot be imported: {error}", _SET_UP, serious=True)]
        return [Finding(name, f"cannot be checked ({type(error).__name__}: {error})", "report this")]


def python() -> Iterator[Finding]:
    """Python and the machine."""
    good = sys.version_info >= (3, 11)
    fix = "" if good else "install Python 3.11 or newer, then `make setup PYTHON=python3.11`"
    yield Finding("Python", platform.python_version(), fix, serious=not good)
    yield Finding("CPU cores", str(cores()))


def torch_and_gpus() -> Iterator[Finding]:
    """torch, CUDA, NCCL."""
    import torch

    yield Finding("torch", torch.__version__)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "; the driver is missing or too old: `nvidia-smi` says more" if built and _has_nvidia() else ""
        yield Finding("CUDA", f"no device{why}; stages compute on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        text = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        old = properties.major < 8
        fix = "bfloat16 is emulated before compute capability 8.0; set the precisions to float32" if old else ""
        yield Finding(f"GPU {number}", text, fix)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("NCCL", version)


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, which NCCL and worker processes use."""
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        fix = "" if free > _SHARED_MEMORY else "in a container, start it with --shm-size=8g"
        yield Finding("/dev/shm", f"{free / 1e9:.1f} GB free", fix)


def disk() -> Iterator[Finding]:
    """Free space where results go."""
    for name in ("data", "work"):
        place = Path(name).resolve()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        fix = "" if free > _SPACE else "`ear describe` says what params.yaml needs; move DVC's cache: `dvc cache dir`"
        yield Finding(f"disk of {name}/", f"{free / 1e9:.0f} GB free", fix)


def hdf5() -> Iterator[Finding]:
    """Whether HDF5 can write and lock files in data/."""
    import h5py

    folder = Path("data") if Path("data").is_dir() else Path()
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch,
            h5py.File(Path(scratch) / "file.h5", "w") as file,
        ):
            file["x"] = [1]
        yield Finding("HDF5", f"{h5py.version.hdf5_version}, writes and locks files in {folder}/")
    except OSError as error:
        fix = "make it writable; if the file system does not lock, export HDF5_USE_FILE_LOCKING=FALSE"
        yield Finding("HDF5", f"cannot write in {folder}/ ({error})", fix, serious=True)


def dvc() -> Iterator[Finding]:
    """The repository as DVC sees it: git, its lock, how it links files."""
    if not Path("dvc.yaml").is_file():
        yield Finding("repository", "no dvc.yaml here", "run this in the folder that `git clone` made", serious=True)
        return
    if not Path(".git").exists():
        fix = "use `git clone`, since experiments and lineage need git; or `git init && git commit`"
        yield Finding("git", "this folder is no repository", fix)
    cache = Path(_dvc("cache", "dir").strip() or ".dvc/cache")
    (cache / "files/md5").mkdir(parents=True, exist_ok=True)  # where DVC tries its links
    facts = dict(line.split(": ", 1) for line in _dvc("doctor").splitlines() if ": " in line)
    kinds = facts.get("Cache types", "unknown")
    linked = any(kind in kinds for kind in ("reflink", "hardlink"))
    fix = "" if linked else "outputs are stored twice; put DVC's cache on the disk of data/: `dvc cache dir PATH`"
    yield Finding("DVC", f"{importlib.metadata.version('dvc')}; links from its cache: {kinds}", fix)
    yield Finding("remotes of DVC", facts.get("Remotes", "None").lower())


def _dvc(*arguments: str) -> str:
    """What a DVC command prints."""
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout


def parameters() -> Iterator[Finding]:
    """params.yaml, and the files that it names."""
    try:
        found = config.load(PARAMETERS)
    except UserError as error:
        yield Finding(
            "params.yaml", str(error), "correct it; if an earlier version wrote it, run `ear configure --upgrade`", True
        )
        return
    yield Finding("params.yaml", "valid")
    for key, sentence in config.missing_files(found).items():
        yield Finding(key, sentence, "copy the file there before the stage that reads it", serious=True)
    from ear.runtime import device

    try:
        device.check_can_compute(found, list(config.Parameters.model_fields))
    except UserError as error:
        yield Finding("runtime", str(error), "edit params.yaml", serious=True)


def prefect() -> Iterator[Finding]:
    """The server that PREFECT_API_URL names."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        yield Finding("Prefect", f"{importlib.metadata.version('prefect')}; no PREFECT_API_URL: flows start a server")
        return
    try:
        with urllib.request.urlopen(f"{url.removesuffix('/')}/health", timeout=3):
            yield Finding("Prefect", f"a server answers at {url}")
    except urllib.error.HTTPError as error:  # it refuses, so it is there
        yield Finding("Prefect", f"a server answers at {url} (with {error.code})")
    except OSError as error:
        fix = "start it (`prefect server start`), or unset PREFECT_API_URL and use `ear serve`"
        yield Finding("Prefect", f"nothing answers at {url} ({error})", fix, serious=True)


def versions() -> Iterator[Finding]:
    """Installed packages against the pins."""
    if not _PINS.is_file():
        return
    pins = dict(re.findall(r"^([a-zA-Z0-9_.-]+)==(\S+)", _PINS.read_text(), re.M))
    others, missing = [], False
    for name in _CRITICAL:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("packages", f"{name} is missing", _SET_UP, serious=True)
            missing = True
            continue
        if name in pins and installed.partition("+")[0] != pins[name].partition("+")[0]:
            others.append(f"{name} {installed}, pinned {pins[name]}")
    fix = f"results may not match byte for byte; {_SET_UP}"
    if others or not missing:
        yield Finding("packages", "; ".join(others) or "as pinned", fix if others else "")


CHECKS = (python, torch_and_gpus, shared_memory, disk, hdf5, dvc, parameters, prefect, versions)
