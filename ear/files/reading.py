"""Reading files that may be damaged: whatever goes wrong becomes one UserError."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from ear.errors import UserError

_SYSTEM = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}  # not of the content


def is_system_error(error: Exception) -> bool:
    """Whether an error of reading a file says nothing about its content."""
    return isinstance(error, OSError) and error.errno in _SYSTEM


def require_format(path: str | Path, found: object, expected: str, remedy: str) -> None:
    """Raise UserError, `PATH has format FOUND, but must have EXPECTED; REMEDY.`, if these differ."""
    if found != expected:
        raise UserError(f"{path} has format {found!r}, but must have {expected!r}; {remedy}.")


@contextlib.contextmanager
def reading(path: str | Path, kind: str, remedy: str) -> Iterator[None]:
    """Raise UserError, `PATH is not a readable KIND (reason); REMEDY.`, for whatever the body raises but UserError.

    Damaged bytes make libraries raise errors of many types, and wrong sizes end in MemoryError. OSErrors of the system,
    such as EACCES and EIO, pass through: the file may be good.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_system_error(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a readable {kind} ({reason}); {remedy}.") from error
