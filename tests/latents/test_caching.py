"""From prepared images to latents: values, statistics, what is kept between runs, what is refused."""

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from prepared_sets import pixels, write_prepared
from processes import together

from ear.data.images import to_signed, to_uint8
from ear.files.digests import sha256
from ear.files.json_files import read_json
from ear.latents import caching
from ear.latents.caching import Layout
from ear.latents.store import LatentStore
from ear.tokenizer.autoencoder import Identity, Tokenizer, kl_structure, new_kl, save_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES, LENGTHS, VAL = pixels(16), (5, 5, 2), 4
CPU = torch.device("cpu")
SMALL = Layout(file_bytes=6 * 2 * 6 * 4 * 4 * 2, piece_images=3)  # 6 images of `tiny`, 3 of an identity


@pytest.fixture
def base(tmp_path) -> Path:
    write_prepared(tmp_path / "prepared", IMAGES, LENGTHS, VAL)
    return tmp_path


def tiny() -> Tokenizer:
    structure = kl_structure(channels=3, block_channels=[8, 16], layers=1)
    return new_kl(seed=0, image_size=8, structure=structure).eval().requires_grad_(False)


def cache(
    base: Path,
    tokenizer: Tokenizer,
    *,
    fingerprint: str = "ab" * 32,
    batch_size: int = 3,
    layout: Layout = SMALL,
    **options,
) -> Path:
    encoder = caching.Encoder(tokenizer, fingerprint=fingerprint, batch_size=batch_size, device=CPU)
    (base / "scratch").mkdir(exist_ok=True)
    scratch = base / "scratch"
    caching.cache(base / "prepared", base / "latents", encoder=encoder, scratch=scratch, layout=layout, **options)
    return base / "latents"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def rows(folder: Path, split: str, mirrored: bool = False) -> np.ndarray:
    store = LatentStore(folder, split)
    return store.rows(range(len(store)), np.full(len(store), mirrored))[0].numpy()


def test_latents_are_the_tokenizers_of_the_images_and_of_their_mirror_images(base):
    tokenizer = tiny()
    folder = cache(base, tokenizer)
    parts = {"train": IMAGES[:-VAL], "val": IMAGES[-VAL:]}
    for split, images in parts.items():
        signed = to_signed(images)
        for mirrored, view in ((False, signed), (True, signed.flip(-1))):
            expected = tokenizer.encode(view).half().numpy()
            np.testing.assert_allclose(rows(folder, split, mirrored), expected, atol=2e-3)
    assert np.array_equal(LatentStore(folder, "train").labels, np.arange(12) % 3)
    assert LatentStore(folder, "val").classes == ("a", "b", "c")


def test_files_are_few_plain_contiguous_hdf5(base):
    folder = cache(base, tiny(), layout=Layout())
    assert set(contents(folder)) == {"stats.json", "train-00000-of-00001.h5", "val-00000-of-00001.h5"}
    with h5py.File(folder / "train-00000-of-00001.h5") as file:
        assert file["moments"].shape == (12, 2, 6, 4, 4)
        assert file["moments"].dtype == np.float16
        assert file["moments"].chunks is None
        assert file["labels"].dtype == np.int32
        assert dict(file.attrs) == {"format": "ear-latents-1", "tokenizer": "ab" * 32}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_rows_do_not_depend_on_files_and_pieces(base, batch_size):
    tokenizer = Identity(image_size=8, downsample=2)
    whole = rows(cache(base, tokenizer, batch_size=batch_size, layout=Layout()), "train")
    shutil.rmtree(base / "scratch")
    assert np.array_equal(rows(cache(base, tokenizer, batch_size=batch_size), "train"), whole)


def test_a_plan_covers_every_image_once_in_files_of_limited_size():
    pieces = caching.plan("train", 1000, row_bytes=100, batch_size=8, layout=Layout(file_bytes=5000, piece_images=20))
    assert [row for piece in pieces for row in piece.rows] == list(range(1000))
    assert {len(piece.rows) for piece in pieces[:-1]} == {16}  # two batches
    files = {piece.file for piece in pieces}
    assert len(files) == 21  # of 48 images, 4,800 bytes
    assert pieces[0].file == "train-00000-of-00021.h5"
    assert [piece.first for piece in pieces[:4]] == [0, 16, 32, 0]


def test_channels_above_the_noise_limit_are_named_and_only_their_statistics_differ(base, capsys):
    before = contents(cache(base, tiny()))
    assert capsys.readouterr().out.count("noise alone") == 0
    statistics = LatentStore(base / "latents", "train").statistics
    moments = rows(base / "latents", "train").astype(np.float64)
    variance = np.exp(moments[:, 3:]).mean(axis=(0, 2, 3))
    share = variance / np.square(statistics.channel_std)
    first, second, third = np.argsort(share)
    folder = cache(base, tiny(), noise_limit=float((share[first] + share[second]) / 2))
    collapsed = sorted([int(second), int(third)])
    assert LatentStore(folder, "train").statistics == dataclasses.replace(statistics, collapsed=tuple(collapsed))
    assert f"noise alone in channel {collapsed[0]}, {collapsed[1]}; models see" in capsys.readouterr().out
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"stats.json"}


def test_statistics_are_numpys_over_sampled_training_latents(base):
    folder = cache(base, tiny())
    mean, log_variance = np.split(rows(folder, "train").astype(np.float64), 2, axis=1)
    noise = np.random.default_rng(0).standard_normal((4000, *mean.shape))
    sampled = mean + np.exp(0.5 * log_variance) * noise
    statistics = LatentStore(folder, "train").statistics
    assert statistics.mean == pytest.approx(sampled.mean(), abs=2e-3)
    assert statistics.std == pytest.approx(sampled.std(), rel=2e-3)
    np.testing.assert_allclose(statistics.channel_mean, sampled.mean(axis=(0, 1, 3, 4)), atol=5e-3)
    np.testing.assert_allclose(statistics.channel_std, sampled.std(axis=(0, 1, 3, 4)), rtol=5e-3)
    stats = read_json(folder / "stats.json")
    assert stats["rows"] == {"train": 12, "val": 4}
    assert stats["shape"] == [3, 4, 4]
    for part in stats["shards"].values():
        for entry in part:
            assert entry["sha256"] == sha256(folder / entry["file"])


def test_identity_latents_hold_every_pixel(base):
    tokenizer = Identity(image_size=8, downsample=2)
    folder = cache(base, tokenizer)
    for mirrored, images in ((False, IMAGES[:-VAL]), (True, IMAGES[:-VAL, :, ::-1])):
        mean = torch.from_numpy(rows(folder, "train", mirrored)[:, :12]).float()
        assert np.array_equal(to_uint8(tokenizer.decode(mean)), images)


def test_a_run_goes_on_with_missing_and_damaged_pieces_and_ends_in_the_same_bytes(base, monkeypatch):
    whole = contents(cache(base, tiny()))
    shutil.rmtree(base / "latents")
    shutil.rmtree(base / "scratch")
    calls, encode = [], caching.Encoder.moments

    def stopping(encoder, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(encoder, images)

    monkeypatch.setattr(caching.Encoder, "moments", stopping)
    with pytest.raises(KeyboardInterrupt):
        cache(base, tiny())
    assert not (base / "latents").exists()
    first = base / "scratch/train-00000-of-00002.h5"
    inode = first.stat().st_ino
    assert contents(cache(base, tiny())) == whole
    assert (base / "latents" / first.name).stat().st_ino == inode  # not created again
    assert sum(calls[4:]) == 16 - 9

    for damage in (b"damaged", first.read_bytes()[:-1] + b"?", b"?" + first.read_bytes()[1:]):
        first.unlink()  # a name of its own: the published file keeps its bytes
        first.write_bytes(damage)
        assert contents(cache(base, tiny())) == whole


def test_shards_without_images_have_no_latents(base):
    """All of their images were rejected."""
    tokenizer = Identity(image_size=8, downsample=2)
    expected = rows(cache(base, tokenizer), "train")
    shutil.rmtree(base)
    write_prepared(base / "prepared", IMAGES, (0, 5, 0, 7, 0), VAL)
    folder = cache(base, tokenizer)
    assert np.array_equal(rows(folder, "train"), expected)
    assert LatentStore(folder, "train").labels.tolist() == [k % 3 for k in range(12)]


@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_leave_the_bytes_of_one(base, processes):
    """Three files in all, of two pieces each."""
    whole = contents(cache(base, tiny()))
    shutil.rmtree(base / "latents")
    shutil.rmtree(base / "scratch")
    together(lambda: cache(base, tiny()), processes)
    assert contents(base / "latents") == whole


class Exploding(Identity):
    """An identity whose latents of one image are infinite."""

    def __init__(self, bad: np.ndarray, value: float):
        super().__init__(image_size=8, downsample=2)
        self.bad, self.value = to_signed(bad), value

    def encode(self, images):
        moments = super().encode(images)
        moments[(images == self.bad).all(dim=(1, 2, 3)), 0, 0, 0] = self.value
        return moments


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 70_000.0])
def test_latents_beyond_float16_are_refused_and_named(base, value):
    before = contents(cache(base, Identity(image_size=8, downsample=2)))
    shutil.rmtree(base / "scratch")
    with pytest.raises(ValueError, match=r"latents of train image 8 \(.*\) are infinite or NaN"):
        cache(base, Exploding(IMAGES[5 + 3], value))
    assert contents(base / "latents") == before


def test_images_of_another_size_are_refused(base):
    with pytest.raises(ValueError, match="have 8 pixels a side, but the tokenizer was made for 16"):
        cache(base, Identity(image_size=16, downsample=2))
    assert not (base / "latents").exists()


def test_a_cluster_gives_the_same_bytes(base, cluster):
    tokenizer = tiny()
    save_tokenizer(base / "tokenizer.safetensors", tokenizer)
    fingerprint = sha256(base / "tokenizer.safetensors")
    here = contents(cache(base, tokenizer, fingerprint=fingerprint))
    encoder = caching.Encoder(tokenizer, fingerprint=fingerprint, batch_size=3, device=CPU)
    workers = caching.Cluster(cluster, base / "tokenizer.safetensors", threads=1)
    (base / "other").mkdir()
    options = {"cluster": workers, "layout": SMALL}
    caching.cache(base / "prepared", base / "there", encoder=encoder, scratch=base / "other", **options)
    assert contents(base / "there") == here

    changed = dataclasses.replace(encoder, fingerprint="cd" * 32)
    (base / "third").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors is another file on a worker of the cluster"):
        caching.cache(base / "prepared", base / "there", encoder=changed, scratch=base / "third", **options)
    assert contents(base / "there") == here
