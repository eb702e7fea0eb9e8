"""From raw images to prepared shards: bytes, rejections, what is kept between runs."""

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import small_imagenet as small
from PIL import Image

from ear.data import manifest as manifests
from ear.data import preparation, sources
from ear.data.images import Encoding, center_crop
from ear.data.manifest import Manifest, write_manifest
from ear.data.prepared import PreparedImages
from ear.files.digests import sha256

TRUNCATED = "image file is truncated"


def picture(seed: int, height: int = 9, width: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes of ten images."""
    for k in range(20):
        path = tmp_path / "tree" / "ab"[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path)
    return tmp_path / "tree"


def spoil(tree: Path) -> dict[str, str]:
    """Make three images unreadable; the start of the reason by path."""
    (tree / "a/00.png").write_text("I am a text")
    content = io.BytesIO()
    picture(1, 64, 64).save(content, "JPEG")
    (tree / "b/01.png").unlink()
    (tree / "b/01.jpg").write_bytes(content.getvalue()[:1000])
    (tree / "b/19.png").write_bytes(b"")
    return {"a/00.png": "not an image", "b/01.jpg": TRUNCATED, "b/19.png": "not an image"}


def listed(tree: Path) -> Manifest:
    """What fetch lists of a tree of class folders."""
    images = sources.find(tree, val_fraction=0.2).images
    return write_manifest(tree.parent / "raw", images, tree=tree, root=tree, names={"a": "an a"}, encoding=Encoding())


def prepare(tree: Path, manifest: Manifest | None = None, **changes) -> Path:
    """List and prepare beside the tree; returns the target."""
    base = tree.parent
    layout = {"image_size": 8, "shard_size": 4, "compression": "none"}
    options = {
        "scratch": base / "scratch",
        "target": base / "prepared",
        "rejected_list": base / "logs/rejected.csv",
        "max_rejected": 0,
        "workers": 0,
        **{key: value for key, value in changes.items() if key not in layout},
    }
    options["layout"] = preparation.Layout(**{**layout, **{key: changes[key] for key in layout if key in changes}})
    options["scratch"].mkdir(exist_ok=True)
    preparation.prepare(manifest or listed(tree), **options)
    return options["target"]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def test_every_image_is_stored_once_with_its_label(tree):
    target = prepare(tree)
    found = {}
    for split, count in (("train", 16), ("val", 4)):
        stored = PreparedImages(target, split)
        assert len(stored) == count
        assert stored.classes == ("a", "b")
        for image, label in zip(stored.images(range(count)), stored.labels, strict=True):
            found[image.tobytes()] = int(label)
    assert found == {center_crop(picture(k), 8).tobytes(): k % 2 for k in range(20)}


def test_stored_order_mixes_the_classes_and_is_not_the_listed_one(tree):
    labels = PreparedImages(prepare(tree), "train").labels.tolist()
    assert sorted(labels) == [0] * 8 + [1] * 8
    assert sum(a != b for a, b in pairwise(labels)) >= 4
    assert labels != sorted(labels)


def test_the_index_describes_the_files(tree):
    target = prepare(tree)
    index = json.loads((target / "index.json").read_text())
    shards = [shard for split in ("train", "val") for shard in index["shards"][split]]
    names = [f"train-{k:05d}-of-00004.h5" for k in range(4)] + ["val-00000-of-00001.h5"]
    assert shards == [{"file": n, "rows": 4, "sha256": sha256(target / n)} for n in names]
    assert (index["format"], index["image_size"]) == ("ear-prepared-1", 8)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        [*names, "classes.json", "index.json", "rejected.csv"]
    )
    assert json.loads((target / "classes.json").read_text()) == {"classes": ["a", "b"], "names": ["an a", "b"]}
    assert (target / "rejected.csv").read_text() == "path,reason\n"


@pytest.mark.parametrize("compression", ["none", "gzip", "links"])
def test_any_number_of_workers_and_a_cluster_give_the_same_bytes(tree, cluster, compression):
    spoil(tree)
    results = []
    for k, where in enumerate(({"workers": 0}, {"workers": 1}, {"workers": 2}, {"cluster": cluster})):
        base = tree.parent / f"{k}"
        base.mkdir()
        target = prepare(tree, compression=compression, max_rejected=3, scratch=base / "s", target=base / "t", **where)
        results.append(digests(target))
    assert results[0] == results[1] == results[2] == results[3]


@pytest.mark.parametrize("compression", ["gzip", "links"])
def test_no_way_of_storing_changes_an_image(tree, compression):
    plain, packed = prepare(tree), prepare(tree, compression=compression, target=tree.parent / "packed")
    for split in ("train", "val"):
        a, b = PreparedImages(plain, split), PreparedImages(packed, split)
        assert np.array_equal(a.images(range(len(a))), b.images(range(len(b))))
        assert np.array_equal(a.labels, b.labels)


def test_links_hold_no_pixels_and_a_relative_root_stays_relative(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    images = sources.find(tree, val_fraction=0.2).images
    manifest = write_manifest(tree.parent / "raw", images, tree=tree, root="tree", names={}, encoding=Encoding())
    folder = prepare(tree, manifest, compression="links", target=tree.parent / "data/prepared")
    with h5py.File(folder / "train-00000-of-00004.h5") as file:
        assert set(file) == {"digests", "labels", "rows"}
        assert file.attrs["root"] == "tree"
    monkeypatch.chdir("/")
    assert PreparedImages(folder, "train").images([3, 15]).shape == (2, 8, 8, 3)


def test_a_linked_image_that_changed_or_is_gone_is_named(tree):
    folder = prepare(tree, compression="links")
    stored, (path, *_) = PreparedImages(folder, "train"), sorted(tree.glob("a/*.png"))
    content = path.read_bytes()
    number = next(k for k, row in enumerate(r for s in stored._stored for r in s.rows) if row.path == "a/00.png")
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=r"tree/a/00\.png is not the image that the prepare stage has read; list"):
        stored.images([number])
    path.unlink()
    with pytest.raises(ValueError, match=r"tree/a/00\.png: No such file or directory; list the images again"):
        stored.images([number])
    path.write_bytes(content)
    assert np.array_equal(stored.images([number])[0], center_crop(picture(0), 8))


def test_every_unreadable_image_is_named_and_nothing_published(tree):
    before = digests(prepare(tree))
    reasons = spoil(tree)
    with pytest.raises(ValueError, match=r"^3 images cannot be read, and prepare.max_rejected allows 2: ") as caught:
        prepare(tree, max_rejected=2)
    for path, reason in reasons.items():
        assert f"{path}: {reason}" in str(caught.value)
    assert digests(tree.parent / "prepared") == before
    with (tree.parent / "logs/rejected.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == sorted(reasons)


def test_allowed_rejections_are_left_out_and_recorded(tree):
    reasons = spoil(tree)
    target = prepare(tree, max_rejected=3)
    with (target / "rejected.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(reasons)
    assert all(row["reason"].startswith(reasons[row["path"]]) for row in rows)
    stored = [PreparedImages(target, split) for split in ("train", "val")]
    kept = {image.tobytes() for part in stored for image in part.images(range(len(part)))}
    assert kept == {center_crop(picture(k), 8).tobytes() for k in range(20) if k not in (0, 1, 19)}


@pytest.mark.parametrize("compression", ["none", "gzip", "links"])
def test_a_shard_whose_images_are_all_rejected_is_empty_and_readable(tree, compression):
    whole = PreparedImages(prepare(tree), "train")
    images = whole.images(range(16))
    paths = [row.path for row in listed(tree).split("train")]
    (tree / paths[0]).write_bytes(b"")
    target = prepare(tree, max_rejected=1, shard_size=1, compression=compression)
    found = PreparedImages(target, "train")
    entries = json.loads((target / "index.json").read_text())["shards"]["train"]
    assert sorted(entry["rows"] for entry in entries) == [0] + [1] * 15
    missing = [entry["rows"] for entry in entries].index(0)
    kept = np.delete(np.arange(16), missing)
    assert np.array_equal(found.images(range(15)), images[kept])
    assert np.array_equal(found.labels, whole.labels[kept])


def test_a_long_list_of_rejections_is_cut_short(tree):
    for k in range(30):
        (tree / f"a/bad{k:02d}.png").write_text("text")
    with pytest.raises(
        ValueError, match=r"30 images cannot be read.*bad19\.png: not an image.*; and 10 more"
    ) as caught:
        prepare(tree)
    assert "bad20" not in str(caught.value)
    assert len((tree.parent / "logs/rejected.csv").read_text().splitlines()) == 31


def test_a_class_or_a_split_with_nothing_left_is_named(tree):
    for path in (tree / "b").iterdir():
        path.write_text("text")
    with pytest.raises(ValueError, match="class 'b' has no readable training image"):
        prepare(tree, max_rejected=100)
    for path in (tree / "a").iterdir():
        path.write_text("text")
    with pytest.raises(ValueError, match="split train has no readable image"):
        prepare(tree, max_rejected=100)


def test_an_image_changed_since_it_was_listed_is_rejected(tree):
    manifest = listed(tree)
    picture(99, 20, 20).save(tree / "a/02.png")
    every = dataclasses.replace(manifest, rows=[row._replace(split="train") for row in manifest.rows])
    shard = preparation.plan(every, "train", preparation.Layout(8, 99, "none"))[0]
    summary = preparation.write_shard(shard, tree.parent)
    assert summary["rows"] == 19
    ((path, reason),) = summary["rejected"]
    assert path == "a/02.png"
    assert reason.endswith("when it was listed")


def test_a_source_that_is_gone_is_said_at_once(tree):
    with pytest.raises(ValueError, match=r"the folder of the images, .*gone, is gone; set data.path"):
        prepare(tree, dataclasses.replace(listed(tree), root=tree.parent / "gone"))


def test_a_disk_that_is_too_small_is_said_at_once(tree):
    with pytest.raises(ValueError, match=r"the prepared images need 6\d{4,}\.\d GB, but .* left; free some space"):
        prepare(tree, image_size=1_000_000)
    assert not (tree.parent / "prepared").exists()


def inodes(scratch: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in scratch.glob("*.h5")}


def test_finished_shards_are_kept_and_only_what_changed_is_redone(tree):
    scratch = tree.parent / "scratch"
    prepare(tree)
    before = inodes(scratch)
    prepare(tree)
    assert inodes(scratch) == before
    picture(50, 30, 30).save(tree / "a/02.png")
    target = prepare(tree)
    assert sum(before[name] != inode for name, inode in inodes(scratch).items()) == 1
    fresh = prepare(tree, scratch=tree.parent / "fresh", target=tree.parent / "other")
    assert digests(target) == digests(fresh)


def test_shards_of_another_decoder_are_redone(tree, monkeypatch):
    scratch = tree.parent / "scratch"
    target = digests(prepare(tree))
    before, version = inodes(scratch), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "pillow" else version(name))
    assert digests(prepare(tree)) == target
    assert all(inode != before[name] for name, inode in inodes(scratch).items())


def test_a_damaged_scratch_file_is_not_trusted(tree):
    before = digests(prepare(tree))
    shards = sorted((tree.parent / "scratch").glob("*.h5"))
    os.truncate(shards[0], 1000)
    shards[1].unlink()
    (tree.parent / "scratch/leftover-of-another-run.h5").write_text("")
    assert digests(prepare(tree)) == before
    assert not (tree.parent / "scratch/leftover-of-another-run.h5").exists()


def test_a_rejected_image_that_can_be_read_again_is_taken_in(tree):
    good = (tree / "a/00.png").read_bytes()
    (tree / "a/00.png").write_bytes(bytes(len(good)))  # of the same size: the manifest stays the same
    with pytest.raises(ValueError, match="1 images cannot be read"):
        prepare(tree)
    (tree / "a/00.png").write_bytes(good)
    target = prepare(tree)
    assert digests(target) == digests(prepare(tree, scratch=tree.parent / "fresh", target=tree.parent / "other"))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_the_target_may_lie_on_another_disk(tree):
    before = digests(prepare(tree))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        target = prepare(tree, target=Path(folder, "prepared"))
        assert target.stat().st_dev != tree.stat().st_dev
        assert digests(target) == before


@pytest.mark.parametrize("layout", [small.write_flat_tree, small.write_kaggle, small.write_archives])
def test_every_layout_of_imagenet_gives_the_same_bytes(tmp_path, layout):
    def prepared(root: Path) -> dict[str, str]:
        source = sources.find(root, val_fraction=0.2)
        manifest = write_manifest(
            root.parent / "raw",
            source.images,
            tree=source.root,
            root=source.root,
            names=small.NAMES,
            encoding=Encoding(upright=False),
        )
        return digests(prepare(root, manifest, scratch=root.parent / "s", target=root.parent / "t"))

    assert prepared(small.write_tree(tmp_path / "a/tree")) == prepared(layout(tmp_path / "b/other"))


def test_an_archive_changed_since_it_was_listed_is_refused(tmp_path):
    root = small.write_archives(tmp_path / "imagenet")
    source = sources.find(root, val_fraction=0.2)
    manifest = write_manifest(
        tmp_path / "raw", source.images, tree=root, root=root, names={}, encoding=Encoding(upright=False)
    )
    size = (root / "ILSVRC2012_img_val.tar").stat().st_size
    os.truncate(root / "ILSVRC2012_img_val.tar", size - 1024)
    with pytest.raises(ValueError, match=rf"img_val\.tar has {size - 1024} bytes, but had {size} when it was listed"):
        prepare(root, manifest)


def test_bombs_are_rejected_by_name(tree, monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    (tree / "a/bomb.png").write_bytes(bomb.getvalue())
    monkeypatch.setattr(manifests, "_MOST_BYTES", max(4000, len(bomb.getvalue())))
    (tree / "b/huge.png").write_bytes(bytes(manifests._MOST_BYTES + 1))
    with pytest.raises(ValueError, match="2 images cannot be read") as caught:
        prepare(tree)
    assert "a/bomb.png: possibly a decompression bomb" in str(caught.value)
    assert f"b/huge.png: has {manifests._MOST_BYTES + 1} bytes" in str(caught.value)


def test_rotation_is_as_the_manifest_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for k in range(2):
        (tmp_path / "tree/a").mkdir(parents=True, exist_ok=True)
        picture(k, 8, 12).save(tmp_path / f"tree/a/{k}.png", exif=exif)
    manifest = listed(tmp_path / "tree")
    turned = PreparedImages(prepare(tmp_path / "tree", manifest), "train").images([0])
    ignored = dataclasses.replace(manifest, encoding=Encoding(upright=False))
    left = PreparedImages(prepare(tmp_path / "tree", ignored, scratch=tmp_path / "s"), "train").images([0])
    assert not np.array_equal(turned, left)
    assert np.array_equal(turned[:, ::-1, ::-1], left)


def test_the_odd_files_of_imagenet_are_read_for_what_they_are(tmp_path):
    """A PNG that is called JPEG, a JPEG in CMYK, a JPEG with a damaged EXIF block."""
    colour = Image.new("RGB", (12, 9), (255, 0, 0))
    folder = tmp_path / "tree/train/n02105855"
    folder.mkdir(parents=True)
    colour.save(folder / "n02105855_2933.JPEG", "PNG")
    Image.new("CMYK", (12, 9), (0, 255, 255, 0)).save(folder / "n02105855_1.JPEG", quality=100)
    colour.save(folder / "n02105855_2.JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", quality=100)
    manifest = listed(tmp_path / "tree")
    target = prepare(tmp_path / "tree", manifest)
    assert (target / "rejected.csv").read_text() == "path,reason\n"
    stored = [PreparedImages(target, split) for split in ("train", "val")]
    pixels = np.concatenate([part.images(range(len(part))) for part in stored]).astype(int)
    assert pixels.shape == (3, 8, 8, 3)
    assert abs(pixels - [255, 0, 0]).max() <= 2
