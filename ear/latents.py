"""Cached latents: posterior moments of every image and of its mirror image, read row by row from HDF5 shards.

A shard {train,val}-IIIII-of-NNNNN.h5 holds `moments`, float16 [n, 2, 2C, H, W] (plain and mirrored; see
`ear.posterior`), and `labels`, int32 [n]; its attributes are `format` and `tokenizer`, the SHA-256 of the tokenizer's
file. stats.json holds what is common to all: classes, shape, statistics, and rows, bytes and SHA-256 of every shard.
`ear.caching` writes them.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ear import posterior, randomness, records
from ear.randomness import DataOrder

FORMAT = "ear-latents-1"
STATS = "stats.json"


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of sampled latents: over everything, and per channel."""

    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]

    @classmethod
    def of(cls, moment_sums: Tensor) -> "Statistics":
        """From `posterior.sums` over a data set."""
        mean, std, _ = posterior.spread(moment_sums.sum(dim=1, keepdim=True))
        channel_mean, channel_std, _ = posterior.spread(moment_sums)
        return cls(mean.item(), std.item(), tuple(channel_mean.tolist()), tuple(channel_std.tolist()))

    def as_dict(self) -> dict:
        """Plain values, which `Statistics(**values)` takes back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def normalised(moments: Tensor, noise: Tensor, statistics: Statistics) -> Tensor:
    """Moments [B, 2C, h, w] and standard normal noise [..., B, C, h, w] => latents for the transformer, like the noise.

    (posterior sample - mean) / std with the *global* mean and std: one shift and one scale for all channels keep the
    geometry that the tokenizer gave them. The published recipe, a factor of 0.2325 for KL-16, is the case of mean 0.
    """
    return (posterior.posterior_sample(moments, noise) - statistics.mean) / statistics.std


def denormalised(latents: Tensor, statistics: Statistics) -> Tensor:
    """Latents of the transformer => latents that the tokenizer decodes; the inverse of `normalised`."""
    return latents * statistics.std + statistics.mean


@dataclass(frozen=True)
class _Stored:
    """Where the moments of one shard lie."""

    path: Path
    offset: int  # of the moments' bytes in the file
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The moments as a read-only view of the file's pages."""
        # numpy.memmap would keep a descriptor open per shard; ImageNet's 1251 shards exceed the usual limit of 1024.
        size = self.path.stat().st_size
        content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        view = np.ndarray(self.shape, "<f2", buffer=content, offset=self.offset)
        view.flags.writeable = False
        return view


class LatentStore:
    """The latents of one split, in stored order.

    shape: (C, H, W) of a latent. labels: int64 [N]. classes: names by label. statistics: of the training split,
    whatever split this is. tokenizer: SHA-256 of the tokenizer's file. An object can be pickled and forked: every
    process maps the files for itself when it first reads.

    Raises FileNotFoundError where a file is missing; ValueError where one is of another format, size or tokenizer
    than stats.json says.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        stats = records.read_json(folder / STATS)
        if stats.get("format") != FORMAT:
            raise ValueError(f"{folder / STATS} has format {stats.get('format')!r}, not {FORMAT!r}; run cache again.")
        self.shape: tuple[int, int, int] = tuple(stats["shape"])
        self.classes: tuple[str, ...] = tuple(stats["classes"])
        self.statistics = Statistics(**stats["statistics"])
        self.tokenizer: str = stats["tokenizer"]
        opened = [_open(folder / entry["file"], entry, stats) for entry in stats["shards"][split]]
        self.labels = np.concatenate([labels for _, labels in opened])
        self._stored = [stored for stored, _ in opened]
        self._ends = np.cumsum([stored.shape[0] for stored in self._stored])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # a pickled map would be a copy of its whole file

    def rows(self, indices: Sequence[int] | Tensor, mirrored: Sequence[bool] | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows 0 .. N - 1, in any order, and which of the two images => (float16 [n, 2C, H, W], int64 [n] labels).

        Raises IndexError beyond the rows.
        """
        indices, mirrored = np.asarray(indices, dtype=np.int64), np.asarray(mirrored, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)} latents")
        channels, height, width = self.shape
        out = np.empty((len(indices), 2 * channels, height, width), np.float16)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            rows = indices[places] - (self._ends[shard] - self._stored[shard].shape[0])
            out[places] = self._map(shard)[rows, mirrored[places]]
        return out, self.labels[indices]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = self._stored[shard].map()
        return self._maps[shard]


def _open(path: Path, entry: dict, stats: dict) -> tuple[_Stored, np.ndarray]:
    """(where the moments lie, the labels as int64) of a shard that is what stats.json says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the cache stage again.")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}; run the cache stage again.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_attributes(path, file.attrs, stats)
            moments, labels = file["moments"], file["labels"][:].astype(np.int64)
            channels, height, width = stats["shape"]
            expected = (entry["rows"], 2, 2 * channels, height, width)
            if moments.shape != expected or moments.dtype != np.float16 or len(labels) != entry["rows"]:
                raise ValueError(
                    f"{path} holds moments {moments.dtype} {moments.shape} and {len(labels)} labels, not float16 "
                    f"{expected}; run the cache stage again."
                )
            return _Stored(path, moments.id.get_offset(), moments.shape), labels
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is not a readable HDF5 file of latents ({error}); run cache again.") from error


def _check_attributes(path: Path, attributes, stats: dict) -> None:
    for name, expected in (("format", FORMAT), ("tokenizer", stats["tokenizer"])):
        found = attributes.get(name)
        if found != expected:
            raise ValueError(
                f"{path} has {name} {found!r}, but stats.json belongs to {expected!r}; run the cache stage again."
            )


class _MicroBatches(Dataset):
    """Image position => the micro-batch that starts there."""

    def __init__(self, store: LatentStore, order: DataOrder, size: int, mirror: bool, seed: int):
        self.store, self.order, self.size, self.mirror, self.seed = store, order, size, mirror, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        indices = self.order.indices(position, self.size)
        mirrored = [self.mirror and is_mirrored(self.seed, position + k) for k in range(self.size)]
        moments, labels = self.store.rows(indices, mirrored)
        return torch.from_numpy(moments), torch.from_numpy(labels), position


def is_mirrored(seed: int, position: int) -> bool:
    """Whether the image at `position` of the training is shown mirrored: a fair coin of (seed, position)."""
    return bool(randomness.derive(seed, "mirror", position) & 1)


def latent_batches(
    store: LatentStore,
    *,
    order: DataOrder,
    positions: Iterator[int],  # where micro-batches start, counted in images from the start of training
    micro_batch_size: int,
    mirror: bool,  # show every other image mirrored, by chance
    seed: int,  # of the mirroring
    workers: int,  # processes that read ahead; 0 reads in this one. The batches are the same
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield (float16 moments [B, 2C, H, W], int64 labels [B], position of the first image) of each position."""
    dataset = _MicroBatches(store, order, micro_batch_size, mirror, seed)
    if workers == 0:
        return map(dataset.__getitem__, positions)
    options = {"num_workers": workers, "worker_init_fn": _outlast_sigterm}
    return iter(DataLoader(dataset, sampler=positions, batch_size=None, **options))


def _outlast_sigterm(_) -> None:
    """Go on reading while the training, which a launcher asks to end together with its readers, saves its state."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
