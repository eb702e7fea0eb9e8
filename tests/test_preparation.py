"""From raw images to prepared shards, by the library and by the stage programs themselves."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from ear import preparation, records, sources
from ear.images import center_crop
from ear.prepared import PreparedImages

ROOT = Path(__file__).parent.parent
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


def prepare(tree: Path, **changes) -> Path:
    """Scan and prepare beside the tree; returns the target."""
    base = tree.parent
    found = sources.scan(tree, val_fraction=0.2)
    manifest = sources.write_manifest(base / "raw", found, tree=tree, root=tree)
    options = {
        "root": tree,
        "classes": manifest.classes,
        "scratch": base / "scratch",
        "target": base / "prepared",
        "rejected_list": base / "logs/rejected.csv",
        "image_size": 8,
        "shard_size": 4,
        "compression": "none",
        "max_rejected": 0,
        "workers": 0,
    }
    options.update(changes)
    options["scratch"].mkdir(exist_ok=True)
    preparation.prepare({split: items(manifest, split) for split in ("train", "val")}, **options)
    return options["target"]


def items(manifest: sources.Manifest, split: str) -> list[preparation.Item]:
    return [preparation.Item(row.path, row.label, row.bytes) for row in manifest.split(split)]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): records.sha256(path) for path in files}


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
    assert shards == [{"file": n, "rows": 4, "sha256": records.sha256(target / n)} for n in names]
    assert (index["format"], index["image_size"]) == ("ear-prepared-1", 8)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        [*names, "classes.json", "index.json", "rejected.csv"]
    )
    assert json.loads((target / "classes.json").read_text()) == {"classes": ["a", "b"]}
    assert (target / "rejected.csv").read_text() == "path,reason\n"


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_any_number_of_workers_gives_the_same_bytes(tree, compression):
    spoil(tree)
    results = []
    for workers in (0, 1, 2):
        base = tree.parent / f"{workers}"
        base.mkdir()
        target = prepare(
            tree, compression=compression, workers=workers, max_rejected=3, scratch=base / "s", target=base / "t"
        )
        results.append(digests(target))
    assert results[0] == results[1] == results[2]


def test_compression_is_lossless(tree):
    plain, packed = prepare(tree), prepare(tree, compression="gzip", target=tree.parent / "packed")
    for split in ("train", "val"):
        a, b = PreparedImages(plain, split), PreparedImages(packed, split)
        assert np.array_equal(a.images(range(len(a))), b.images(range(len(b))))
        assert np.array_equal(a.labels, b.labels)


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
    manifest = sources.write_manifest(tree.parent / "raw", sources.scan(tree, val_fraction=0.2), tree=tree, root=tree)
    picture(99, 20, 20).save(tree / "a/02.png")
    shard = preparation.plan(
        "train",
        items(manifest, "train") + items(manifest, "val"),
        root=tree,
        image_size=8,
        shard_size=99,
        compression="none",
    )[0]
    summary = preparation.write_shard(shard, tree.parent)
    assert summary["rows"] == 19
    ((path, reason),) = summary["rejected"]
    assert path == "a/02.png"
    assert reason.endswith("when it was listed")


def test_a_source_that_is_gone_is_said_at_once(tree):
    with pytest.raises(ValueError, match=r"the folder of the images, .*gone, is gone; set data.path"):
        prepare(tree, root=tree.parent / "gone")


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


# The stage programs.


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """data/raw as fetch writes it for the embedded digits."""
    folder = tmp_path_factory.mktemp("digits")
    sources.write_digits(folder / "digits", val_fraction=0.2)
    found = sources.scan(folder / "digits", val_fraction=0.2)
    sources.write_manifest(folder, found, tree=folder / "digits", root="data/raw/digits")
    return folder


@pytest.fixture
def repository(tmp_path) -> SimpleNamespace:
    """A folder that stages run in, with parameters that can be set."""
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def set_(**changes) -> None:
        content = OmegaConf.load(tmp_path / "params.yaml")
        for key, value in changes.items():
            OmegaConf.update(content, key.replace("__", "."), value)
        OmegaConf.save(content, tmp_path / "params.yaml")

    def start(stage: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"stages.{stage}"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    def run(stage: str) -> tuple[int, str]:
        process = start(stage)
        errors = process.communicate(timeout=60)[1]
        return process.returncode, errors

    set_(runtime__workers=0)
    return SimpleNamespace(path=tmp_path, set=set_, start=start, run=run, prepared=tmp_path / "data/prepared")


def one_line(errors: str, stage: str) -> str:
    """The sentence of a failed stage, which must stand alone."""
    sentence, details, *rest = errors.splitlines()
    assert sentence.startswith(f"{stage}: ")
    assert details == f"(details: work/logs/{stage}.log)"
    assert not rest
    return sentence


def test_the_digits_arrive_with_their_pixels(repository, digits):
    repository.set(data__image_size=8)
    assert repository.run("fetch") == (0, "")
    assert digests(repository.path / "data/raw") == digests(digits)
    assert repository.run("prepare") == (0, "")
    source = load_digits()
    expected = {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in source.images}
    found = [PreparedImages(repository.prepared, split) for split in ("train", "val")]
    assert [len(part) for part in found] == [1438, 359]
    images = np.concatenate([part.images(range(len(part))) for part in found])
    assert (images == images[..., :1]).all()
    assert {image[..., 0].tobytes() for image in images} == expected
    labels = np.concatenate([part.labels for part in found])
    assert np.array_equal(np.bincount(labels), np.bincount(source.target))
    assert not (repository.path / "work/prepare").exists()


def test_fetch_errors_are_one_line_and_keep_the_old_list(repository, digits):
    raw = shutil.copytree(digits, repository.path / "data/raw")
    before = digests(raw)
    (repository.path / "tree/a").mkdir(parents=True)
    picture(0).save(repository.path / "tree/a/0.png")
    (repository.path / "tree/empty").mkdir()
    for path, message in (
        ("tree", "class folder tree/empty has no images"),
        ("nowhere", "there is no folder nowhere"),
        ("data/raw/digits", "is 'data/raw/digits', inside data/, where stages replace whole folders"),
    ):
        repository.set(data__source="folder", data__path=path)
        code, errors = repository.run("fetch")
        assert code == 1
        assert message in one_line(errors, "fetch")
        assert digests(raw) == before


def test_prepare_errors_are_one_line_and_keep_the_old_images(repository):
    tree = repository.path / "tree"
    for k in range(8):
        (tree / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        picture(k).save(tree / "ab"[k % 2] / f"{k}.png")
    repository.set(data__source="folder", data__path="tree")
    assert [repository.run(stage)[0] for stage in ("fetch", "prepare")] == [0, 0]
    before = digests(repository.prepared)

    (tree / "a/0.png").write_text("I am a text")
    (tree / "b/1.png").write_bytes((tree / "b/1.png").read_bytes()[:-40])
    assert repository.run("fetch")[0] == 0
    code, errors = repository.run("prepare")
    sentence = one_line(errors, "prepare")
    assert code == 1
    assert "2 images cannot be read" in sentence
    assert "a/0.png: not an image of a known format; b/1.png: " in sentence
    assert "work/logs/prepare-rejected.csv" in sentence
    assert len((repository.path / "work/logs/prepare-rejected.csv").read_text().splitlines()) == 3
    assert digests(repository.prepared) == before

    (repository.path / "data/.prepared.partial").write_text("in the way")
    code, errors = repository.run("prepare")
    assert code == 1
    assert "data/.prepared.partial: File exists" in one_line(errors, "prepare")
    assert digests(repository.prepared) == before
    (repository.path / "data/.prepared.partial").unlink()

    repository.set(prepare__max_rejected=2)
    assert repository.run("prepare")[0] == 0
    assert len((repository.prepared / "rejected.csv").read_text().splitlines()) == 3


def test_a_full_disk_is_one_line(repository, digits):
    """A limit on the size of files stands in for the disk: the same error at the same place."""
    shutil.copytree(digits, repository.path / "data/raw")
    repository.set(prepare__compression="gzip")
    command = f"ulimit -f 40 && exec {sys.executable} -m stages.prepare"
    done = subprocess.run(["bash", "-c", command], cwd=repository.path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "File too large" in one_line(done.stderr, "prepare")
    assert not repository.prepared.exists()


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(repository, digits):
    scratch = repository.path / "work/prepare"

    def finished() -> dict[str, int]:
        notes = [path for path in scratch.glob("*/*.h5.json") if path.with_suffix("").exists()]
        return {path.stem: path.with_suffix("").stat().st_ino for path in notes}

    repository.set(prepare__shard_size=8, runtime__workers=2)
    shutil.copytree(digits, repository.path / "data/raw")

    process = repository.start("prepare")  # a worker dies
    wait_until(lambda: len(finished()) > 10)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    sentence = one_line(process.communicate(timeout=60)[1], "prepare")
    assert process.returncode == 1
    assert "a process that decodes images died" in sentence
    first = finished()

    process = repository.start("prepare")  # the whole program is killed
    wait_until(lambda: len(finished()) > len(first) + 10)
    workers = workers_of(process)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    second = finished()
    assert first.items() <= second.items()
    assert 20 < len(second) < 226
    assert not repository.prepared.exists()

    assert repository.run("prepare") == (0, "")
    result = digests(repository.prepared)
    published = {path.name: path.stat().st_ino for path in repository.prepared.glob("*.h5")}
    assert second.items() <= published.items()  # not written again
    assert len(published) == 225

    repository.set(runtime__workers=0)
    assert repository.run("prepare") == (0, "")
    assert digests(repository.prepared) == result
