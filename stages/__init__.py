"""One small program per stage of dvc.yaml; each also runs by itself: `python -m stages.NAME`.

Python runs this file before any other code of a stage, so it records the state of all code files first. Importing
torch takes seconds, and code edited in that time would differ between memory and disk.
"""

from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def edited(code: Iterable[Path]) -> list[Path]:
    """Files of this code, itself files and packages, that were changed, added or deleted since the program started."""
    now, code = _states(), tuple(code)
    changed = (path for path in now.keys() | _AT_START.keys() if now.get(path) != _AT_START.get(path))
    return sorted(path for path in changed if any(path.is_relative_to(part) for part in code))


def _states() -> dict[Path, tuple[int, int, int]]:
    """Path => inode, size and time of the last change, of all files of code."""
    found = {}
    for path in (file for folder in ("ear", "stages") for file in (_ROOT / folder).rglob("*.py")):
        try:
            state = path.stat()
        except FileNotFoundError:  # deleted meanwhile
            continue
        found[path.relative_to(_ROOT)] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return found


_AT_START = _states()
