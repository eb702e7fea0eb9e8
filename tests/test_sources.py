"""Trees of class folders, the digits, and the manifest."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ear import sources


def tree(root: Path, *paths: str) -> Path:
    """Files whose content is their own path: `scan` opens none."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


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
    assert sources.scan(root, val_fraction=0.5) == [
        ("train", "a", "train/a/deep/er/x.WebP"),
        ("train", "a", "train/a/y.bmp"),
        ("train", "b", "train/b/1.png"),
        ("train", "b", "train/b/2.JPEG"),
        ("val", "b", "val/b/3.Jpg"),
    ]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_share_of_each_class_is_held_out_without_val(tmp_path, prefix):
    root = tree(tmp_path, *many(f"{prefix}many", 40), *many(f"{prefix}few", 3), *many(f"{prefix}one", 1))
    found = sources.scan(root, val_fraction=0.1)
    held_out = [image.class_name for image in found if image.split == "val"]
    assert held_out == ["few"] + ["many"] * 4  # at least one, but never the last
    assert len(found) == len(set(found)) == 44
    again = sources.scan(root, val_fraction=0.1)
    assert found == again


def test_the_choice_depends_on_names_alone(tmp_path):
    first, second = tree(tmp_path / "a", *many("c", 30)), tree(tmp_path / "b", *reversed(many("c", 30)))
    found = sources.scan(first, val_fraction=0.3)
    assert found == sources.scan(second, val_fraction=0.3)
    digests = sorted(many("c", 30), key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    assert {image.path for image in found if image.split == "val"} == set(digests[:9])


def test_linked_folders_are_followed(tmp_path):
    tree(tmp_path / "elsewhere", "1.png", "2.png")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").symlink_to(tmp_path / "elsewhere")
    assert [image.path for image in sources.scan(tmp_path / "tree", val_fraction=0.5)] == ["a/1.png", "a/2.png"]


def test_a_link_in_a_circle_is_named(tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="a/again is a link to a folder that it lies in"):
        sources.scan(tmp_path, val_fraction=0.5)


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
        (["a/1.png", "b/1.png"], [], r"every class has a single image, so none can be held out"),
    ],
)
def test_what_is_wrong_with_a_tree_is_said(tmp_path, files, empty, message):
    tree(tmp_path / "tree", *files)
    for path in empty:
        (tmp_path / "tree" / path).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message) as caught:
        sources.scan(tmp_path / "tree", val_fraction=0.5)
    assert str(tmp_path / "tree") in str(caught.value) or "single image" in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; set data.path"):
        sources.scan(tmp_path / "nowhere", val_fraction=0.5)


def listed(folder: Path, root: Path, recorded: str) -> sources.Manifest:
    return sources.write_manifest(folder, sources.scan(root, val_fraction=0.5), tree=root, root=recorded)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    odd = b"b/caf\xe9.png".decode(errors="surrogateescape")  # a name that is not UTF-8
    root = tree(tmp_path / "tree", "a/1.png", 'a/a, "quoted" name.png', "b/3.png", odd)
    written = listed(tmp_path, root, "pictures")
    read = sources.read_manifest(tmp_path)
    assert read == written
    assert read.root == Path("pictures")
    assert read.classes == ("a", "b")
    assert {(row.path, row.label, row.bytes) for row in read.rows} == {
        ("a/1.png", 0, 7),
        ('a/a, "quoted" name.png', 0, 22),
        ("b/3.png", 1, 7),
        (odd, 1, 10),
    }
    assert [len(read.split(name)) for name in ("train", "val")] == [2, 2]


def test_manifests_do_not_say_where_they_were_written(tmp_path):
    contents = []
    for name in ("here", "there"):
        root = tree(tmp_path / name / "tree", "a/1.png", "a/2.png")
        listed(tmp_path / name, root, "data/raw/digits")
        contents.append([(tmp_path / name / file).read_bytes() for file in ("manifest.csv", "source.json")])
    assert contents[0] == contents[1]
    assert contents[0][0].splitlines()[0] == b"split,label,class,path,bytes"
    assert contents[0][0].splitlines()[1] == b"train,0,a,a/1.png,7"


def test_a_manifest_notices_a_changed_file(tmp_path):
    root = tree(tmp_path / "tree", "a/1.png", "a/2.png")
    before = listed(tmp_path / "x", root, "tree")
    (root / "a/1.png").write_text("another content")
    assert listed(tmp_path / "y", root, "tree") != before


def test_what_is_wrong_with_a_manifest_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source\.json"):
        sources.read_manifest(tmp_path)
    listed(tmp_path, tree(tmp_path / "tree", "a/1.png", "a/2.png"), "tree")
    (tmp_path / "manifest.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"manifest\.csv does not start with the columns split,label"):
        sources.read_manifest(tmp_path)
    (tmp_path / "manifest.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv"):
        sources.read_manifest(tmp_path)
    (tmp_path / "source.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="has format 'other', not 'ear-raw-1'"):
        sources.read_manifest(tmp_path)
