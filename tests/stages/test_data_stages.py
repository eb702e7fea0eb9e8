"""The fetch and the prepare stage as a user runs them, in a repository of their own; killed ones are programs."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import one_stage
import pytest
import small_imagenet as small
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from ear.data import manifest, sources
from ear.data.images import Encoding, center_crop
from ear.data.prepared import PreparedImages
from ear.files.digests import sha256
from ear.files.json_files import read_json

ROOT = Path(__file__).parents[2]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """data/raw as fetch writes it for the embedded digits."""
    folder = tmp_path_factory.mktemp("digits")
    sources.write_digits(folder / "digits", val_fraction=0.2)
    images = sources.find(folder / "digits", val_fraction=0.2).images
    manifest.write_manifest(
        folder, images, tree=folder / "digits", root="data/raw/digits", names={}, encoding=Encoding()
    )
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
        with contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()) as errors:
            return one_stage.main(stage), errors.getvalue()

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
    assert not (repository.path / "work/prepare/outputs").exists()


def test_fetch_errors_are_one_line_and_keep_the_old_list(repository, digits):
    raw = shutil.copytree(digits, repository.path / "data/raw")
    before = digests(raw)
    (repository.path / "tree/a").mkdir(parents=True)
    picture(0).save(repository.path / "tree/a/0.png")
    (repository.path / "tree/empty").mkdir()
    for path, message in (
        ("tree", "class folder tree/empty has no images"),
        ("nowhere", "data.path is 'nowhere', which does not exist"),
        ("data/raw/digits", "is 'data/raw/digits', inside data/, where stages replace whole folders"),
    ):
        repository.set(data__source="folder", data__path=path)
        code, errors = repository.run("fetch")
        assert code == 1
        assert message in one_line(errors, "fetch")
        assert digests(raw) == before


def test_fetch_says_which_file_a_later_stage_will_miss(repository):
    repository.set(reference__extractor="inception", reference__statistics="weights/adm.npz")
    code, errors = repository.run("fetch")
    assert code == 1
    assert one_line(errors, "fetch") == (
        "fetch: reference.statistics is 'weights/adm.npz', which does not exist; provide it, or set it to '' to use "
        "the training images."
    )
    assert not (repository.path / "data/raw").exists()
    (repository.path / "weights").mkdir()
    (repository.path / "weights/adm.npz").touch()
    repository.set(tokenizer__weights="weights/kl16.ckpt")  # which tokenizer.name=kl does not read
    assert repository.run("fetch") == (0, "")


def test_imagenet_goes_through_in_its_archives(repository):
    root = small.write_archives(repository.path / "imagenet")
    repository.set(data__source="folder", data__path="imagenet", data__image_size=8)
    assert [repository.run(stage) for stage in ("fetch", "prepare")] == [(0, ""), (0, "")]
    classes = read_json(repository.prepared / "classes.json")
    assert classes == {"classes": list(small.WNIDS), "names": list(small.NAMES.values())}
    val = PreparedImages(repository.prepared, "val")
    expected = {(number % 3, pixels(content)) for number, content in enumerate(small.val_images().values(), 1)}
    assert {(int(label), image.tobytes()) for label, image in zip(val.labels, val.images(range(6)), strict=True)} == (
        expected
    )

    before = digests(repository.path / "data/raw")
    repository.set(data__source="imagenet")
    code, errors = repository.run("fetch")
    assert code == 1
    assert "data.source is imagenet, but imagenet has 3 classes" in one_line(errors, "fetch")
    os.truncate(root / "ILSVRC2012_img_train.tar", 5000)
    assert "ILSVRC2012_img_train.tar is cut short: 'n01440764.tar'" in one_line(repository.run("fetch")[1], "fetch")
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "nothing says their classes; put ILSVRC2012_devkit" in one_line(repository.run("fetch")[1], "fetch")
    assert digests(repository.path / "data/raw") == before


def test_arrays_go_through_with_names_for_their_classes(repository):
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 2
    np.savez(repository.path / "x.npz", images=images, labels=labels)
    repository.set(data__source="npz", data__path="x.npz", data__image_size=8, data__class_names=["cats"])
    code, errors = repository.run("fetch")
    assert code == 1
    assert "data.class_names has 1 names, but x.npz has 2 classes; name each of them" in one_line(errors, "fetch")
    repository.set(data__class_names=["cats", "dogs"])
    assert [repository.run(stage) for stage in ("fetch", "prepare")] == [(0, ""), (0, "")]
    assert read_json(repository.prepared / "classes.json") == {"classes": ["cats", "dogs"], "names": ["cats", "dogs"]}
    val = PreparedImages(repository.prepared, "val")
    assert np.bincount(val.labels).tolist() == [4, 4]
    held = {
        (int(label), image[..., 0].tobytes()) for label, image in zip(val.labels, val.images(range(8)), strict=True)
    }
    assert held < {(int(label), image.tobytes()) for label, image in zip(labels, images, strict=True)}
    np.savez(repository.path / "x.npz", images=255 - images, labels=labels)  # other pixels, and nothing else
    shutil.rmtree(repository.prepared)
    assert [repository.run(stage) for stage in ("fetch", "prepare")] == [(0, ""), (0, "")]
    assert held.isdisjoint(
        {(int(k), image[..., 0].tobytes()) for k, image in zip(val.labels, val.images(range(8)), strict=True)}
    )
    before = digests(repository.path / "data/raw")
    repository.set(data__class_names=["cats", "cats"])
    assert "data.class_names has 'cats' twice; give every class a name of its own." in repository.run("fetch")[1]
    repository.set(data__source="folder", data__class_names=[])
    assert "data.source is folder, but x.npz holds arrays; set data.source to npz." in repository.run("fetch")[1]
    assert digests(repository.path / "data/raw") == before


def pixels(content: bytes) -> bytes:
    """What is stored of an image at 8 x 8, by the crop that the golden files fix."""
    return center_crop(Image.open(io.BytesIO(content)), 8).tobytes()


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
    assert "a/0.png: not an image of format JPEG, PNG, WEBP, BMP; b/1.png: " in sentence
    assert "work/logs/prepare-rejected.csv" in sentence
    assert len((repository.path / "work/logs/prepare-rejected.csv").read_text().splitlines()) == 3
    assert digests(repository.prepared) == before

    repository.set(prepare__max_rejected=2)
    assert repository.run("prepare")[0] == 0
    assert len((repository.prepared / "rejected.csv").read_text().splitlines()) == 3


def test_a_full_disk_is_one_line(repository, digits):
    """A limit on the size of files stands in for the disk: the same error at the same place."""
    shutil.copytree(digits, repository.path / "data/raw")
    repository.set(prepare__compression="gzip")
    # The limit would also break the file of a coverage run.
    command = f"unset COVERAGE_PROCESS_START; ulimit -f 40 && exec {sys.executable} -m stages.prepare"
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
    assert "a worker process died" in sentence
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
