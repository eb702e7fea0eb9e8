"""Trees of class folders and the digits."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ear.data import sources


def tree(root: Path, *paths: str) -> Path:
    """Files whose content is their own path: none is opened."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def scan(root: Path, *, val_fraction: float) -> list[tuple[str, str, str]]:
    """(split, class, path) of what is found."""
    images = sources.find(root, val_fraction=val_fraction).images
    assert all(image.file == image.path and image.offset is None and image.bytes is None for image in images)
    return [image[:3] for image in images]


def many(name: str, count: int) -> list[str]:
    return [f"{name}/{k:03d}.jpg" for k in range(count)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    sources.write_digits(folder, val_fraction=0.2)
    return folder


def test_digits_hold_the_values_of_their_source(digits):
    source, seen = load_digits(), set()
    for path in digits.glob("*/*/*.png"):
        with Image.open(path) as image:
            assert image.mode == "L"
            k, pixels = int(path.stem), np.asarray(image)
        assert np.array_equal(pixels, np.rint(source.images[k] * 255 / 16))
        assert int(path.parent.name) == source.target[k]
        seen.add(k)
    assert seen == set(range(1797))


def test_a_fifth_of_every_digit_is_held_out(digits):
    for label in range(10):
        count = {split: len(list((digits / split / str(label)).iterdir())) for split in ("train", "val")}
        assert count["val"] == round(0.2 * sum(count.values()))


def test_digits_are_the_same_files_everywhere(digits, tmp_path):
    sources.write_digits(tmp_path / "b", val_fraction=0.2)
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.glob("*/*/*")} for root in (digits, tmp_path / "b")
    ]
    assert contents[0] == contents[1]


def test_train_and_val_are_listed_by_class_and_path(tmp_path):
    root = tree(
        tmp_path,
        "train/b/2.JPEG",
        "train/b/1.png",
        "train/a/deep/er/x.WebP",
        "train/a/y.bmp",
        "train/a/notes.txt",
        "train/a/._y.jpg",
        "train/.hidden/z.jpg",
        "val/b/3.Jpg",
        "README.md",
    )
    assert scan(root, val_fraction=0.5) == [
        ("train", "a", "train/a/deep/er/x.WebP"),
        ("train", "a", "train/a/y.bmp"),
        ("train", "b", "train/b/1.png"),
        ("train", "b", "train/b/2.JPEG"),
        ("val", "b", "val/b/3.Jpg"),
    ]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_share_of_each_class_is_held_out_without_val(tmp_path, prefix):
    root = tree(tmp_path, *many(f"{prefix}many", 40), *many(f"{prefix}few", 3), *many(f"{prefix}one", 1))
    found = scan(root, val_fraction=0.1)
    held_out = [class_name for split, class_name, _ in found if split == "val"]
    assert held_out == ["few"] + ["many"] * 4  # at least one, but never the last
    assert len(found) == len(set(found)) == 44
    again = scan(root, val_fraction=0.1)
    assert found == again


def test_the_choice_depends_on_names_alone(tmp_path):
    first, second = tree(tmp_path / "a", *many("c", 30)), tree(tmp_path / "b", *reversed(many("c", 30)))
    found = scan(first, val_fraction=0.3)
    assert found == scan(second, val_fraction=0.3)
    digests = sorted(many("c", 30), key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    assert {path for split, _, path in found if split == "val"} == set(digests[:9])


def test_linked_folders_are_followed(tmp_path):
    tree(tmp_path / "elsewhere", "1.png", "2.png")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").symlink_to(tmp_path / "elsewhere")
    assert [path for _, _, path in scan(tmp_path / "tree", val_fraction=0.5)] == ["a/1.png", "a/2.png"]


def test_a_link_in_a_circle_is_named(tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="a/again is a link to a folder that it lies in"):
        scan(tmp_path, val_fraction=0.5)


@pytest.mark.parametrize(
    ("files", "empty", "message"),
    [
        ([], ["."], r"has no class folders; put the images of each class into a folder"),
        (["1.png", "2.png"], [], r"holds 2 images outside of class folders, such as 1\.png"),
        (["a/1.png", "2.png"], [], r"holds 1 images outside of class folders, such as 2\.png"),
        (["train/1.png"], [], r"train holds 1 images outside of class folders"),
        (["a/1.txt"], ["b"], r"there are no images \(\.jpeg, .*\) in the class folders"),
        (["a/1.png"], ["b"], r"class folder .*/b has no images .*; fill it or remove it"),
        (["train/a/1.png", "val/a/2.png"], ["val/b"], r"class folder .*val/b has no images"),
        (["train/a/1.png", "val/a/2.png", "val/b/3.png"], [], r"val has class 'b', which .*train lacks"),
        (["train/a/1.png"], ["val"], r"val has no class folders"),
        (["val/a/1.png"], [], r"has val but no train"),
        (["train/a/1.png", "validation/a/2.png"], [], r"has validation but no val; rename it to val"),
        (["train/a/1.png", "Test/a/2.png"], [], r"has Test but no val; rename it to val"),
        (["Train/a/1.png", "Test/a/2.png"], [], r"has Train but no train; name the folder of training images train"),
        (["training/a/1.png", "testing/a/2.png"], [], r"has training but no train; name the folder"),
        (["Train/a/1.png", "Train/b/2.png"], [], r"has Train but no train; name the folder"),
        (["a/1.png", "b/1.png"], [], r"every class has a single image, so none can be held out"),
    ],
)
def test_what_is_wrong_with_a_tree_is_said(tmp_path, files, empty, message):
    tree(tmp_path / "tree", *files)
    for path in empty:
        (tmp_path / "tree" / path).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message) as caught:
        scan(tmp_path / "tree", val_fraction=0.5)
    assert str(tmp_path / "tree") in str(caught.value) or "single image" in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere; set data.path"):
        scan(tmp_path / "nowhere", val_fraction=0.5)
