"""Check free space before long work."""

import shutil
from pathlib import Path

from ear.errors import UserError


def require_space(folder: Path, size: int, *, what: str, fix: str) -> None:
    """Raise UserError if the disk of `folder` has fewer than `size` bytes free; the message has `what` and `fix`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{what} need {size / 1e9:.1f} GB, but {folder.resolve()} has {free / 1e9:.1f} GB left; {fix}.")
