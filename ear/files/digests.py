"""SHA-256 digests of files."""

import hashlib
import re
from pathlib import Path


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named_digest(path: str | Path) -> str:
    """The first digits of a file's SHA-256 according to its published name (vgg16-397923af.pth), or ''."""
    match = re.search(r"-([0-9a-f]{8,})$", Path(path).stem)
    return match[1] if match else ""
