"""The list of raw images: written, read, and the bytes that it leads to."""

import os
from pathlib import Path

import pytest

from ear.data import manifest, sources
from ear.data.images import Encoding
from ear.data.manifest import ListedImage, Row
from ear.errors import UserError


def tree(root: Path, *paths: str) -> Path:
    """Files whose content is their own path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def listed(folder: Path, root: Path, recorded: str) -> manifest.Manifest:
    images = sources.find(root, val_fraction=0.5).images
    return manifest.write_manifest(folder, images, tree=root, root=recorded, names={"a": "an a"}, encoding=Encoding())


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    odd = b"b/caf\xe9.png".decode(errors="surrogateescape")  # a name that is not UTF-8
    root = tree(tmp_path / "tree", "a/1.png", 'a/a, "quoted" name.png', "b/3.png", odd)
    written = listed(tmp_path, root, "pictures")
    read = manifest.read_manifest(tmp_path)
    assert read == written
    assert read.root == Path("pictures")
    assert read.classes == ("a", "b")
    assert read.names == ("an a", "b")
    assert read.encoding == Encoding()
    assert read.archives == {}
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
    assert contents[0][0].splitlines()[0] == b"split,label,class,path,bytes,file,offset"
    assert contents[0][0].splitlines()[1] == b"train,0,a,a/1.png,7,,"


def test_a_manifest_notices_a_changed_file(tmp_path):
    root = tree(tmp_path / "tree", "a/1.png", "a/2.png")
    before = listed(tmp_path / "x", root, "tree")
    (root / "a/1.png").write_text("another content")
    assert listed(tmp_path / "y", root, "tree") != before


def test_what_is_wrong_with_a_manifest_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source\.json"):
        manifest.read_manifest(tmp_path)
    listed(tmp_path, tree(tmp_path / "tree", "a/1.png", "a/2.png"), "tree")
    (tmp_path / "manifest.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"manifest\.csv does not start with the columns split,label"):
        manifest.read_manifest(tmp_path)
    columns = "split,label,class,path,bytes,file,offset\n"
    for content, said in (("", "lists no image"), ("train,0,a,1.p", "is not a readable list of images")):
        (tmp_path / "manifest.csv").write_text(columns + content)
        with pytest.raises(UserError, match=rf"manifest\.csv {said}.*; run fetch again"):
            manifest.read_manifest(tmp_path)
    (tmp_path / "manifest.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv"):
        manifest.read_manifest(tmp_path)
    (tmp_path / "source.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="has format 'other', but must have 'ear-raw-3'"):
        manifest.read_manifest(tmp_path)


def test_members_of_archives_are_listed_and_read(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/all.bin").write_bytes(b"0123456789")
    tree(tmp_path / "tree", "b/1.png")
    found = [
        ListedImage("train", "a", "train/a/x.jpg", "all.bin", 3, 4),
        ListedImage("train", "a", "train/a/y.jpg", "all.bin", 0, 2),
        ListedImage("val", "b", "val/b/1.png", "b/1.png"),
    ]
    root = tmp_path / "tree"
    written = manifest.write_manifest(tmp_path, found, tree=root, root=root, names={}, encoding=Encoding(upright=False))
    assert manifest.read_manifest(tmp_path) == written
    assert written.archives == {"all.bin": 10}
    assert written.rows[0] == Row("train", 0, "train/a/x.jpg", 4, "all.bin", 3)
    with manifest.Contents(root) as contents:
        assert [contents.read(row) for row in written.rows] == [b"3456", b"01", b"b/1.png"]
        assert contents.read(written.rows[0]._replace(offset=8)) == b"89"
    assert "train,0,a,train/a/y.jpg,2,all.bin,0" in (tmp_path / "manifest.csv").read_text().splitlines()


@pytest.mark.parametrize(
    "name", ["a\rb.png", "a\nb.png", 'a",b.png', "a;\u00e9\u2028.png", os.fsdecode(b"\xff\xfe.png")]
)
def test_odd_file_names_survive(tmp_path, name):
    (tmp_path / "tree/c").mkdir(parents=True)
    (tmp_path / "tree/c" / name).write_bytes(b"x")
    images = [ListedImage("train", "c", f"c/{name}", f"c/{name}")]
    manifest.write_manifest(
        tmp_path, images, tree=tmp_path / "tree", root=tmp_path / "tree", names={}, encoding=Encoding()
    )
    assert [row.path for row in manifest.read_manifest(tmp_path).rows] == [f"c/{name}"]


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with manifest.Contents(tmp_path) as contents:
        for name in ("pipe.png", "zero.png"):
            with pytest.raises(UserError, match="is not a plain file"):
                contents.read(ListedImage("train", "c", name, name))


def test_changes_are_counted_without_reading_an_image(tmp_path):
    images = tree(tmp_path / "images", *(f"{name}/{k}.png" for name in "ab" for k in range(3)))
    before = listed(tmp_path, images, recorded=str(images))

    def changes() -> str:
        return manifest.changes(before, sources.find(images, val_fraction=0.5).images, images)

    assert changes() == ""
    (images / "a/new.png").write_bytes(b"")
    (images / "b/1.png").write_bytes(b"longer than before")
    assert "1 new" in changes()
    assert "changed" in changes()
    (images / "a/new.png").unlink()
    assert changes() == "1 changed"
    (images / "b/1.png").unlink()
    assert "1 removed" in changes()
