"""Files and folders that appear complete or not at all, and survive a power failure once they have appeared."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".partial"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    The temporary name is unique, so two writers cannot mix their bytes: the later one replaces the file of the earlier.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        with naming(path):
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` as the `filename` of an OSError that the block raises without one, as reads and writes do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # otherwise the error has a message of its own, which a file name would hide
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it replaces `path`, on failure `path` is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace(source: Path, target: Path) -> None:
    """Move the finished file or folder `source` to `target`, also from another disk.

    An earlier `target` is deleted after the new one is in place. If the machine fails between the two renames of a
    folder, there is no `target`, and the earlier one is `.NAME.ID.partial` beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _swap(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = _beside(target)
        try:
            shutil.copytree(source, near) if source.is_dir() else shutil.copyfile(source, near)
            _sync_all(near)
            _swap(near, target)
        finally:
            remove(near)
        remove(source)


def _swap(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        old = _beside(target)
        target.rename(old)
        try:
            source.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.replace(target)
    _sync(target.parent)


def link(source: Path, target: Path) -> None:
    """Hard-link the finished file `source` to `target`; copy it if they are on different disks, or it cannot be linked.

    Raises OSError if the copy fails too.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        with whole_file(target) as partial:
            shutil.copyfile(source, partial)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed writers left in `folder`; the caller must hold the folder's lock."""
    if folder.is_dir():
        for path in folder.glob(f".*{_UNFINISHED}"):
            remove(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(path: Path) -> None:
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        _sync(entry)
