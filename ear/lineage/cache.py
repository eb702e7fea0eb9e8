"""DVC's cache: where it keeps the bytes of outputs that dvc.lock lists."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ear.errors import UserError
from ear.files.reading import reading
from ear.lineage.declaration import locked


def cache_folder() -> Path:
    """The folder of DVC's cache; raises UserError outside a DVC repository."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`dvc cache dir` failed: {' '.join(done.stderr.split())}")
    return Path(done.stdout.strip())


def stored(digest: str, cache: Path) -> Path:
    """Where the cache keeps the file, or the list of a folder, with this MD5 of dvc.lock."""
    return cache / "files/md5" / digest[:2] / digest[2:]


def listed_files(entry: Mapping[str, Any], cache: Path) -> Iterator[tuple[str, str]]:
    """(file, MD5) of every file that a stage's entry in dvc.lock lists as an output, those in folders included.

    Raises UserError if the cache's list of a folder is damaged.
    """
    for output in entry.get("outs", []):
        path, digest = output["path"], output["md5"]
        if not digest.endswith(".dir"):
            yield path, digest
        elif (listing := stored(digest, cache)).is_file():
            with reading(listing, "list of files", "delete damaged files with `ear verify --repair`"):
                files = [(f"{path}/{file['relpath']}", file["md5"]) for file in json.loads(listing.read_text())]
            yield from files


def cached_outputs(stage: str) -> dict[str, Path]:
    """Output file => its copy in the cache, for those of the stage's entry in dvc.lock that the cache holds."""
    entry = locked().get(stage)
    if not entry:
        return {}
    cache = cache_folder()
    found = {path: stored(digest, cache) for path, digest in listed_files(entry, cache)}
    return {path: file for path, file in found.items() if file.is_file()}
