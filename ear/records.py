"""Files that appear whole or not at all: atomic files and folders, JSON, digests, published weights, safetensors.

Formats are byte-reproducible: JSON keys in the order given, which is kept by reading and writing again; one metadata
key in safetensors (several are written in random order).
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_DESCRIPTION = "ear"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it replaces `path`, on failure `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Move the finished folder `source` to `target`; what stood there goes only once the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Give the finished file a second name, or a copy on another disk: the first one stays until all is in place."""
    try:
        os.link(source, target)
    except OSError:
        with whole_file(target) as partial:
            shutil.copyfile(source, partial)


def write_json(path: str | Path, content: object) -> None:
    """Write readable JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def rounded(figures: object) -> object:
    """The same nested content with floats to six significant digits: beyond them, thread counts of BLAS show."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.6g}") if isinstance(figures, float) else figures


def read_json(path: str | Path) -> dict:
    """Read JSON; raises FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and run its stage again.") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: str | Path, tensors: dict, description: dict) -> None:
    """Write tensors by name with a JSON description, byte-reproducibly."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(contiguous, partial, metadata={_DESCRIPTION: json.dumps(description)})


def read_tensors(path: str | Path) -> tuple[dict, dict]:
    """(tensors by name, description) of a file written by `write_tensors`; raises FileNotFoundError or ValueError."""
    with _opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _description(file)  # noqa: SIM118 - not a dict


def read_description(path: str | Path) -> dict:
    """The description alone; raises as `read_tensors` does, also for a file that was cut short."""
    with _opened(Path(path)) as file:
        return _description(file)


def _description(file) -> dict:
    return json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); run its stage again.") from error


def downloaded(url: str, *, otherwise: str) -> Path:
    """The file of `url` in torch's hub folder, downloaded where it is not there yet and checked by `named_digest`.

    Raises FileNotFoundError, whose sentence ends in `otherwise`, what the user can do, where it cannot be downloaded;
    ValueError where the file there is another one than its name says.
    """
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    digest = named_digest(path)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # the last one for another digest
            raise FileNotFoundError(f"{path.name} cannot be downloaded ({error}); {otherwise}.") from error
    if not sha256(path).startswith(digest):
        raise ValueError(f"{path} is damaged: its SHA-256 does not start with {digest}; delete it and run this again.")
    return path


def named_digest(path: str | Path) -> str:
    """The first digits of a published file's SHA-256, as its name tells them (vgg16-397923af.pth), or ''."""
    match = re.search(r"-([0-9a-f]{8,})$", Path(path).stem)
    return match[1] if match else ""


def tensors_by_name(content: object, *, origin: str) -> dict:
    """`content`, unpickled from `origin`, where it is a dict of str to Tensor; raises ValueError where it is not."""
    import torch

    if not isinstance(content, dict):
        raise ValueError(f"{origin} is a {type(content).__name__}, not a dict of tensors by name; get the file anew.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{origin} maps {name!r} to a {kind}, but must map names to tensors; get the file anew.")
    return content


def read_pickled(path: str | Path) -> object:
    """What `torch.save` wrote, on the CPU: tensors and plain containers alone.

    Raises FileNotFoundError; ValueError for a file that is none, or that would run code when unpickled.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a file with published weights.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign files; all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as plain weights ({reason}); it is damaged or no such file, get it anew."
        ) from error
