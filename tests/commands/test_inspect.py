"""What `ear inspect` says about a path."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_imagenet as small
from PIL import Image

from ear.commands import inspect
from ear.config.compose import compose, presets
from ear.data import sources
from ear.data.manifest import ListedImage
from ear.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ear", "inspect", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def folders(root: Path, side: int, count: int = 8) -> Path:
    for k in range(count):
        path = root / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side + 5, 3), k, np.uint8)).save(path)
    return root


def found(root: Path, seed: int = 0, count: int = 100) -> tuple[sources.Source, inspect.Sampled]:
    source = sources.find(root, val_fraction=0.25)
    return source, inspect.sample(source, count, seed)


def test_archives_are_counted_against_the_whole(tmp_path):
    root = small.write_archives(tmp_path / "imagenet")
    done = run(str(root))
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line[:13].strip(): line[14:] for line in done.stdout.splitlines()[2:]}
    assert f"{root}: ImageNet, official archives" in done.stdout.splitlines()
    assert lines["classes"].startswith("3 of 1,000: n01440764 (tench, Tinca tinca), n01443537 (goldfish,")
    assert lines["training"] == "12 of 1,281,167 images"
    assert lines["validation"] == "6 of 50,000 images"
    assert lines["sample"] == "18 images, 0 unreadable; short side 9 to 9 pixels, median 9"
    contents = [*small.val_images().values(), *(c for part in small.train_images().values() for c in part.values())]
    size = sum(map(len, contents))
    assert lines["size"] == f"{size / 1e6:.3f} MB"


def test_unreadable_images_are_named(tmp_path):
    root = folders(tmp_path, 70)
    (root / "a/2.png").write_text("text")
    (root / "b/1.png").write_bytes((root / "b/1.png").read_bytes()[:60])
    source, sampled = found(root)
    (root / "a/4.png").unlink()  # after it was listed
    sampled = inspect.sample(source, 100, 0)
    assert dict(sampled.unreadable).keys() == {"a/2.png", "a/4.png", "b/1.png"}
    text = inspect.describe("PATH", source, sampled)
    assert "8 images, 3 unreadable; short side 70 to 70 pixels, median 70" in text
    assert "a/2.png: not an image of format JPEG, PNG, WEBP, BMP" in text
    assert "a/4.png: No such file or directory" in text


def test_huge_images_are_named_unread(tmp_path):
    root = folders(tmp_path, 70)
    os.truncate(root / "a/2.png", 1 << 42)  # takes no room: its end is a hole
    _, sampled = found(root)
    assert sampled.unreadable == [("a/2.png", f"has {1 << 42} bytes, but must have at most {1 << 30}")]
    assert len(sampled.short_sides) == 7


def test_a_sample_is_small_and_its_seed_decides(tmp_path):
    root = folders(tmp_path, 8)
    for path in root.glob("*/*"):
        path.write_text("text")  # so that every drawn image is named
    drawn = [found(root, seed, 3)[1].unreadable for seed in (0, 0, 1)]
    assert [len(part) for part in drawn] == [3, 3, 3]
    assert drawn[0] == drawn[1] != drawn[2]
    assert found(root, 0, 0)[1] == inspect.Sampled([], [], [])
    assert "unknown" in inspect.describe("PATH", *found(root, 0, 0))


def test_the_preset_that_fits_is_named(tmp_path):
    assert inspect.fitting(*found(folders(tmp_path / "large", 64))) == ("folder64", "folder64_cpu")
    assert inspect.fitting(*found(folders(tmp_path / "tiny", 8))) == ("digits",)
    thousand = [ListedImage("train", f"n{k:08d}", f"{k}", f"{k}") for k in range(1000)]
    whole = sources.Source("", "folder", tmp_path, thousand)
    fitting = inspect.fitting(whole, inspect.Sampled([], [], []))
    assert fitting == ("imagenet256_base", "imagenet256_large", "imagenet256_huge")
    assert {*fitting, "folder64", "folder64_cpu", "fashion", "digits"} <= set(presets())


@pytest.mark.parametrize(("side", "size"), [(8, 8), (15, 14), (33, 32), (64, 64)])
def test_the_command_that_it_names_works(tmp_path, side, size):
    """Also with a space in the path; small images keep their size, as far as the tokenizer allows."""
    root = folders(tmp_path / "my images", side)
    last = inspect.describe(str(root), *found(root)).splitlines()[-1]
    title, command = last.split(maxsplit=1)
    assert title == "next"
    parameters = compose(shlex.split(command)[2:])
    assert (parameters.data.source, parameters.data.path) == ("folder", str(root))
    assert parameters.data.image_size == size


@pytest.mark.parametrize("name", ["my (2024) images", "josé's #1", "a=b,c", "~x & {y}", "back\\slash\\"])
def test_the_command_that_it_names_works_for_any_path(tmp_path, name):
    root = folders(tmp_path / name, 64)
    command = inspect.describe(str(root), *found(root)).splitlines()[-1].split(maxsplit=1)[1]
    assert compose(shlex.split(command)[2:]).data.path == str(root)


def test_names_that_are_not_utf8_are_shown(tmp_path):
    tree = folders(tmp_path / "images", 8)
    (tree / "a").rename(tree / os.fsdecode(b"caf\xe9"))
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as under a locale such as en_US.UTF-8
    done = subprocess.run(
        [sys.executable, "-m", "ear", "inspect", str(tree)], cwd=ROOT, capture_output=True, text=True, env=strict
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"caf\udce9" in done.stdout


def test_an_override_that_hydra_cannot_read_is_shown_in_quotes():
    with pytest.raises(UserError, match="cannot be read; if it holds special characters, write ") as refused:
        compose(["preset=folder64", "data.path=/josé/x (1)"])
    advice = str(refused.value).rpartition("write ")[2].removesuffix(".")
    assert compose(["preset=folder64", *shlex.split(advice)]).data.path == "/josé/x (1)"


def test_the_command_for_imagenet_names_what_its_user_brings(tmp_path):
    thousand = [ListedImage("train", f"n{k:08d}", f"{k}", f"{k}") for k in range(1000)]
    text = inspect.describe("PATH", sources.Source("", "folder", tmp_path, thousand), inspect.Sampled([], [], []))
    command = text.splitlines()[-1].split(maxsplit=1)[1]
    p = compose(command.split()[2:])
    named = (p.data.path, p.tokenizer.weights, p.reference.statistics)
    assert named == ("PATH", "KL16_CHECKPOINT", "ADM_STATISTICS")


def test_what_is_held_out_is_said(tmp_path):
    source, sampled = found(folders(tmp_path / "images", 8))
    assert not source.has_val
    assert "held out of the training images if data.val_fraction is 0.1" in inspect.describe("PATH", source, sampled)
    assert sources.find(small.write_tree(tmp_path / "tree"), val_fraction=0.1).has_val


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "inspect: there is no file or folder nowhere; "),
        (
            ("pyproject.toml",),
            "inspect: pyproject.toml is a file, but must be a folder or an .npz file; give the folder that contains ",
        ),
        (("ear",), "inspect: there are no images "),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)


def test_help_and_options_explain_themselves():
    assert "the preset that fits" in run("--help").stdout
    assert "Invalid value for '--sample': -1" in run("ear", "--sample", "-1").stderr


def test_arrays_are_described_by_their_headers(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((40, 28, 32, 3), np.uint8), labels=np.arange(40) % 4)
    lines = inspect.run(str(path), samples=5, seed=0).splitlines()
    assert lines[0] == f"{path}: arrays"
    assert lines[1:-1] == [
        "  classes     4: 0, 1, 2, ...",
        "  training    36 images",
        "  validation  4 images, held out of the training images if data.val_fraction is 0.1",
        "  size        0.108 MB",
        "  pixels      28 x 32, colour",
        "  preset      fashion",
    ]
    parameters = compose(shlex.split(lines[-1])[3:])
    assert (parameters.data.source, parameters.data.path) == ("npz", str(path))
    assert parameters.data.image_size == 28
    assert parameters.data.class_names == ()
