"""Images that are not stored but decoded again from their raw files whenever they are read.

A shard of links holds the location of each image (rows, as JSON) and the SHA-256 of its raw bytes. This is for data
sets too large to store twice; in exchange, every pass decodes the images again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ear.data.images import Encoding, center_crop
from ear.data.manifest import Contents, Row
from ear.errors import UserError
from ear.runtime.cores import cores

_THREADS = min(cores(), 16)  # Pillow releases Python's lock
_AGAIN = "list the images again with `dvc repro --single-item --force fetch`."


def decoded(content: bytes, row: Row, *, encoding: Encoding, image_size: int) -> np.ndarray:
    """The image of a row, uint8 [S, S, 3], from its raw bytes; raises ValueError, or UserError, with the reason."""
    if len(content) != row.bytes:
        raise UserError(f"has {len(content)} bytes, but had {row.bytes} when it was listed")
    return center_crop(encoding.decode(content), image_size)


def write(file: h5py.File, rows: Sequence[Row], digests: Sequence[bytes], *, root: str, encoding: Encoding) -> None:
    """Store links to the images of `rows` in an open shard. root: of their files; relative to the repository's root."""
    text = json.dumps([(row.path, row.bytes, row.file, row.offset) for row in rows])  # ASCII: odd names are escaped
    file.attrs["root"], file.attrs["encoding"] = root, json.dumps(dataclasses.asdict(encoding))
    file["rows"] = np.frombuffer(text.encode(), np.uint8)
    file["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(len(rows), 32)


@dataclass(frozen=True)
class Links:
    """The images of one shard of links."""

    root: Path
    encoding: Encoding
    image_size: int
    rows: tuple[Row, ...]
    digests: np.ndarray  # uint8 [n, 32]

    @classmethod
    def read_from(cls, file: h5py.File, labels: np.ndarray, repository: Path) -> "Links":
        """Read what `write` stored."""
        listed = json.loads(bytes(file["rows"][:]))
        rows = (Row("", int(label), *values) for label, values in zip(labels, listed, strict=True))
        root = repository / str(file.attrs["root"])
        encoding = Encoding.of(json.loads(file.attrs["encoding"]))
        return cls(root, encoding, int(file.attrs["image_size"]), tuple(rows), file["digests"][:])

    def read(self, rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        """out[places[k]] = image rows[k], for all k; raises UserError if an image is not what it was."""

        def one(task: Any) -> None:
            row, place = task
            out[place] = self._image(contents, row)

        with Contents(self.root) as contents, ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(one, zip(rows.tolist(), places.tolist(), strict=True)):
                pass

    def _image(self, contents: Contents, number: int) -> np.ndarray:
        row = self.rows[number]
        try:
            content = contents.read(row)
            if hashlib.sha256(content).digest() != self.digests[number].tobytes():
                raise UserError("is not the image that the prepare stage has read")
            return decoded(content, row, encoding=self.encoding, image_size=self.image_size)
        except UserError as error:
            raise UserError(f"{self.root / row.path} {error}; {_AGAIN}") from error
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{self.root / row.file}: {error.strerror}; {_AGAIN}") from error
