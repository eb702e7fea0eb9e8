"""Reading cached latents back: rows, order, mirroring, other processes, damage."""

import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ear.files.digests import sha256
from ear.files.json_files import read_json, write_json
from ear.latents.batches import latent_batches
from ear.latents.statistics import Statistics, denormalised, normalised
from ear.latents.store import LatentStore
from ear.runtime.randomness import Coins, DataOrder, generator
from ear.tokenizer.posterior import posterior_sample, sums

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS, SHAPE, TOKENIZER = (7, 1, 5), (2, 3, 4), "ab" * 32
ROWS = sum(LENGTHS)
ALL = np.random.default_rng(0).standard_normal((ROWS, 2, 4, 3, 4)).astype(np.float16)
LABELS = np.arange(ROWS) % 3


def shard(path: Path, moments: np.ndarray, labels: np.ndarray, **attributes) -> dict:
    """A shard as plain h5py writes it, and its entry in stats.json."""
    with h5py.File(path, "w") as file:
        file["moments"], file["labels"] = moments, labels.astype(np.int32)
        file.attrs.update({"format": "ear-latents-1", "tokenizer": TOKENIZER} | attributes)
    return {"file": path.name, "rows": len(labels), "bytes": path.stat().st_size, "sha256": sha256(path)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """13 training rows in three files, and three held-out rows."""
    ends = np.cumsum(LENGTHS)
    entries = [
        shard(tmp_path / f"train-{k:05d}-of-00003.h5", ALL[end - length : end], LABELS[end - length : end])
        for k, (length, end) in enumerate(zip(LENGTHS, ends, strict=True))
    ]
    held_out = [shard(tmp_path / "val-00000-of-00001.h5", ALL[:3], LABELS[:3])]
    stats = {
        "format": "ear-latents-1",
        "tokenizer": TOKENIZER,
        "shape": SHAPE,
        "classes": ["a", "b", "c"],
        "statistics": Statistics.of(sums(torch.from_numpy(ALL[:, 0]))).as_dict(),
        "shards": {"train": entries, "val": held_out},
    }
    write_json(tmp_path / "stats.json", stats)
    return tmp_path


def batches(folder: Path, count: int, start: int = 0, size: int = 4, **changes) -> list[tuple]:
    store, positions = LatentStore(folder, "train"), itertools.count(start, size)
    options = {"order": DataOrder(ROWS, 5), "mirror": True, "seed": 9, "workers": 0} | changes
    return list(itertools.islice(latent_batches(store, positions=positions, micro_batch_size=size, **options), count))


def test_what_is_known_without_reading_a_row(folder):
    train, val = (LatentStore(folder, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (13, 3)
    assert train.shape == SHAPE
    assert train.classes == ("a", "b", "c")
    assert train.tokenizer == TOKENIZER
    assert train.labels.dtype == np.int64
    assert np.array_equal(train.labels, LABELS)
    assert val.statistics == train.statistics


@pytest.mark.parametrize("rows", [range(13), [12], [3, 3, 11, 0, 7, 6, 12, 3], [], torch.tensor([8, 2])])
def test_rows_come_in_the_order_asked_for_plain_or_mirrored(folder, rows):
    indices = np.asarray(rows, dtype=np.int64)
    mirrored = indices % 2 == 1
    moments, labels = LatentStore(folder, "train").rows(rows, mirrored)
    assert moments.dtype == torch.float16
    assert np.array_equal(moments, ALL[indices, mirrored.astype(int)])
    assert np.array_equal(labels, LABELS[indices])


@pytest.mark.parametrize("rows", [[-1], [13], [0, 100]])
def test_rows_beyond_the_end_are_refused(folder, rows):
    with pytest.raises(IndexError, match=r"outside 0\.\.12"):
        LatentStore(folder, "train").rows(rows)


def test_statistics_are_kept_as_plain_values():
    total = sums(torch.from_numpy(ALL[:, 0]))
    statistics = Statistics.of(total)
    kept = json.loads(json.dumps(statistics.as_dict()))
    assert (kept["mean"], kept["channel_std"]) == (statistics.mean, list(statistics.channel_std))
    mean, variance = np.split(ALL[:, 0].astype(np.float64), 2, axis=1)
    variance = np.exp(variance)
    assert statistics.mean == pytest.approx(mean.mean())
    assert statistics.std == pytest.approx(np.sqrt(mean.var() + variance.mean()))
    np.testing.assert_allclose(statistics.channel_mean, mean.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(
        statistics.channel_std, np.sqrt(mean.var(axis=(0, 2, 3)) + variance.mean(axis=(0, 2, 3)))
    )


def test_normalised_latents_have_mean_zero_and_deviation_one():
    moments = torch.from_numpy(ALL[:, 0])
    statistics = Statistics.of(sums(moments))
    many = moments.repeat(500, 1, 1, 1)
    noise = torch.randn(len(many), *SHAPE, generator=generator(0))
    latents = normalised(many, noise, statistics)
    assert latents.mean().item() == pytest.approx(0, abs=0.01)
    assert latents.std().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(denormalised(latents, statistics), posterior_sample(many, noise))


def test_channels_of_noise_alone_become_their_mean():
    moments = torch.from_numpy(ALL[:, 0]).clone()
    channels = SHAPE[0]
    moments[:, 0] = 0.25 + 0.1 * torch.randn(moments[:, 0].shape, generator=generator(1))
    moments[:, channels] = 0  # log-variance of channel 0: 99% of its variance are noise
    moments[:, channels + 1 :] = -6
    assert Statistics.of(sums(moments)).collapsed == ()
    statistics = Statistics.of(sums(moments), noise_limit=0.95)
    assert statistics.collapsed == (0,)
    assert Statistics.from_dict(json.loads(json.dumps(statistics.as_dict()))) == statistics
    noise = torch.randn(len(moments), *SHAPE, generator=generator(0))
    latents = normalised(moments, noise, statistics)
    plain = normalised(moments, noise, dataclasses.replace(statistics, collapsed=()))
    assert torch.equal(latents[:, 1:], plain[:, 1:])
    decoded = denormalised(latents, statistics)[:, 0]
    torch.testing.assert_close(decoded, torch.full_like(decoded, statistics.channel_mean[0]))
    assert plain[:, 0].std() > 0.1
    several = normalised(moments, noise.expand(3, *noise.shape), statistics)  # several draws of each target
    assert torch.equal(several[1], latents)


def test_statistics_without_collapsed_channels_are_those_of_earlier_versions():
    stored = Statistics.of(sums(torch.from_numpy(ALL[:, 0]))).as_dict()
    assert list(stored) == ["mean", "std", "channel_mean", "channel_std"]
    assert Statistics.from_dict(stored).collapsed == ()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_a_function_of_seed_and_images_seen(folder, workers):
    order, seed = DataOrder(ROWS, 5), 9
    for number, (moments, labels, position) in enumerate(batches(folder, 8, start=8, workers=workers)):
        assert position == 8 + 4 * number
        indices = order.indices(position, 4)
        mirrored = Coins(seed, "mirror").at(position, 4)
        assert np.array_equal(moments, ALL[indices, mirrored.astype(int)])
        assert np.array_equal(labels, LABELS[indices])


def test_every_epoch_shows_every_row_once(folder):
    seen = np.concatenate([moments.numpy() for moments, _, _ in batches(folder, 3 * ROWS, size=1, mirror=False)])
    epochs = np.split(seen, 3)
    for epoch in epochs:
        assert sorted(row.tobytes() for row in epoch) == sorted(row.tobytes() for row in ALL[:, 0])
    assert not np.array_equal(epochs[0], epochs[1])


def test_half_of_the_images_are_mirrored_where_asked_and_none_elsewhere(folder):
    mirror_images = {row.tobytes() for row in ALL[:, 1]}
    for mirror, expected in ((True, True), (False, False)):
        shown = {row.tobytes() for moments, _, _ in batches(folder, 20, mirror=mirror) for row in moments.numpy()}
        assert bool(shown & mirror_images) is expected


def test_threads_read_the_same(folder):
    store = LatentStore(folder, "train")
    tasks = [np.random.default_rng(k).integers(0, ROWS, 9) for k in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for rows, (moments, labels) in zip(tasks, pool.map(store.rows, tasks), strict=True):
            assert np.array_equal(moments, ALL[rows, 0])
            assert np.array_equal(labels, LABELS[rows])


def test_rows_read_ahead_are_those_of_the_file(folder):
    store = LatentStore(folder, "train")
    store.advise([12, 0, 7], np.array([True, False, True]))
    moments, _ = store.rows([12, 0, 7], np.array([True, False, True]))
    assert np.array_equal(moments, ALL[[12, 0, 7], [1, 0, 1]])


def test_a_finite_sequence_of_positions_ends(folder):
    store = LatentStore(folder, "train")
    for workers in (0, 3):
        found = latent_batches(
            store,
            order=DataOrder(ROWS, 5),
            positions=iter([4, 0]),
            micro_batch_size=2,
            mirror=False,
            seed=1,
            workers=workers,
        )
        assert [position for _, _, position in found] == [4, 0]


def test_missing_things_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere/stats\.json does not exist"):
        LatentStore(folder / "nowhere", "train")
    (folder / "train-00002-of-00003.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002-of-00003\.h5 does not exist; run the cache stage"):
        LatentStore(folder, "train")


def test_truncated_and_damaged_shards_are_named(folder):
    path = folder / "train-00002-of-00003.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"00002-of-00003\.h5 has {len(whole) // 2} bytes, but must have {len(whole)}; run"
    ):
        LatentStore(folder, "train")
    path.write_bytes(b"no HDF5".ljust(len(whole)))
    with pytest.raises(ValueError, match=r"00002-of-00003\.h5 is not a readable file of latents"):
        LatentStore(folder, "train")


@pytest.mark.parametrize(
    ("moments", "labels", "attributes", "message"),
    [
        (ALL[:5], LABELS[:5], {"tokenizer": "cd" * 32}, "has tokenizer 'cdcd.*', but stats.json has 'abab"),
        (ALL[:5], LABELS[:5], {"format": "ear-latents-9"}, "has format 'ear-latents-9'"),
        (ALL[:5].astype(np.float32), LABELS[:5], {}, "holds moments float32"),
        (
            ALL[:5, :, :2],
            LABELS[:5],
            {},
            r"holds moments float16 \(5, 2, 2, 3, 4\) and 5 labels, not float16 \(5,",
        ),
        (ALL[:4], LABELS[:4], {}, r"holds moments float16 \(4,"),
        (ALL[:5], LABELS[:4], {}, ".* and 4 labels"),
    ],
)
def test_foreign_shards_are_named(folder, moments, labels, attributes, message):
    path = folder / "train-00002-of-00003.h5"
    size = shard(path, moments, labels, **attributes)["bytes"]
    stats = read_json(folder / "stats.json")
    stats["shards"]["train"][2]["bytes"] = size
    write_json(folder / "stats.json", stats)
    with pytest.raises(ValueError, match=rf"00002-of-00003\.h5 {message}"):
        LatentStore(folder, "train")


def test_another_format_of_the_whole_folder_is_refused(folder):
    write_json(folder / "stats.json", read_json(folder / "stats.json") | {"format": "ear-latents-9"})
    with pytest.raises(ValueError, match=r"stats\.json has format 'ear-latents-9', but must have 'ear-latents-1'"):
        LatentStore(folder, "train")
