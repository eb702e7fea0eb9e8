"""SHA-256 digests of files and of code."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(path: Path) -> Iterator[Path]:
    """The file itself, or all files in a folder, in order; nothing if `path` does not exist."""
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())
    elif path.is_file():
        yield path


def code_digest(path: Path) -> str:
    """SHA-256 over the names and contents of a Python file, or of all those in a package."""
    digest = hashlib.sha256()
    for file in files_under(path):
        if file.suffix == ".py":
            digest.update(f"{file.as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def named_digest(path: str | Path) -> str:
    """The first digits of a file's SHA-256 according to its published name (vgg16-397923af.pth), or ''."""
    match = re.search(r"-([0-9a-f]{8,})$", Path(path).stem)
    return match[1] if match else ""
