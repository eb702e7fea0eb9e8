"""Digests of the inputs of a stage, computed in the background while it already works on them."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ear.errors import UserError
from ear.files.digests import files_under, sha256

_THREADS = 2  # hashing must not slow the stage; two threads hash 2 to 3 GB/s


def file_digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of every file in `paths` and in its folders, by path."""
    files = [file for path in paths for file in files_under(path)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip([file.as_posix() for file in files], pool.map(sha256, files), strict=True))


class Inputs:
    """The input files of a running stage: hashed in the background, compared with records, watched for changes.

    published: SHA-256 by path, as recorded by the stages that wrote the files; other files have no known digest.
    makers: name of that stage by path. unread: pattern of files to skip, such as data/prepared/train-*.
    """

    def __init__(
        self, paths: Iterable[Path], published: Mapping[str, str], makers: Mapping[str, str], unread: str = ""
    ):
        self._published, self._makers, self._unread = published, makers, unread
        self._roots = list(paths)
        self._before = self._signatures()
        self._pool = ThreadPoolExecutor(_THREADS)
        self._futures: dict[str, Future[str]] = {name: self._pool.submit(sha256, name) for name in self._before}
        self._checked: set[str] = set()

    def _signatures(self) -> dict[str, tuple[int, int, int]]:
        """File => (size in bytes, time of the last change in ns, inode); equal signatures mean equal bytes."""
        files = [file for root in self._roots for file in files_under(root)]
        stats = {file.as_posix(): file.stat() for file in files if not (self._unread and file.match(self._unread))}
        return {name: (found.st_size, found.st_mtime_ns, found.st_ino) for name, found in stats.items()}

    def check(self) -> None:
        """Compare the files hashed so far with their records; those already checked are skipped.

        Raises UserError naming the first file that differs, and the commands that restore it.
        """
        for name, future in self._futures.items():
            if name not in self._checked and future.done():
                self._check(name, future.result())

    def _check(self, name: str, digest: str) -> None:
        self._checked.add(name)
        expected = self._published.get(name)
        if expected not in (None, digest):
            maker = self._makers[name]
            raise UserError(
                f"{name} is not what the {maker} stage wrote: its SHA-256 starts with {digest[:12]}, not "
                f"{expected[:12]}; make it again with `ear verify --repair` and `dvc repro`."
            )

    def digests(self) -> dict[str, str]:
        """SHA-256 by path, after waiting for all of them; raises as `check` does, and if a file changed meanwhile."""
        found = {name: future.result() for name, future in self._futures.items()}
        self.check()
        now = self._signatures()
        changed = sorted(name for name in self._before.keys() | now.keys() if self._before.get(name) != now.get(name))
        if changed:
            raise UserError(f"{changed[0]} changed while the stage read it; run the stage again.")
        return found

    def expected(self, name: str) -> str:
        """The SHA-256 that a file should have: what its stage recorded, else its own; "" if it is no input."""
        if name not in self._futures:
            return ""
        return self._published.get(name) or self._futures[name].result()

    def close(self) -> None:
        """Stop hashing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
