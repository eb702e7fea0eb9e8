"""Files that may hold anything: what a damaged one raises becomes one sentence."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from ear.errors import UserError

_SYSTEM = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}  # not of the content


def of_the_system(error: Exception) -> bool:
    """Whether an error of reading a file says nothing about its content."""
    return isinstance(error, OSError) and error.errno in _SYSTEM


@contextlib.contextmanager
def reading(path: str | Path, kind: str, remedy: str) -> Iterator[None]:
    """Raise UserError, `PATH is not a readable KIND (reason); REMEDY.`, for whatever the body raises but UserError.

    Damaged bytes make libraries raise errors of many types, and sizes that lie end in MemoryError. What only the system
    refuses is passed on: the file may be good.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if of_the_system(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a readable {kind} ({reason}); {remedy}.") from error
