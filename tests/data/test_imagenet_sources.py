"""ImageNet as people have it: one list of images from every layout, and what is wrong with archives and tables."""

import shutil
import tarfile
from pathlib import Path

import pytest
import small_imagenet as small

from ear.data import manifest, sources
from ear.data.images import Encoding
from ear.data.sources import archives

LAYOUTS = {
    "tree": (small.write_tree, "ImageNet, unpacked"),
    "flat": (small.write_flat_tree, "ImageNet, unpacked"),
    "kaggle": (small.write_kaggle, "ImageNet, unpacked"),
    "archives": (small.write_archives, "ImageNet, official archives"),
}
TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def find(root: Path) -> sources.Source:
    return sources.find(root, val_fraction=0.25)


def listed(root: Path, folder: Path) -> manifest.Manifest:
    source = find(root)
    return manifest.write_manifest(
        folder, source.images, tree=source.root, root=source.root, names=source.names, encoding=Encoding(upright=False)
    )


@pytest.fixture
def packed(tmp_path) -> Path:
    return small.write_archives(tmp_path / "imagenet")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_with_their_bytes(tmp_path, layout):
    write, title = LAYOUTS[layout]
    source = find(write(tmp_path / "imagenet"))
    assert source.layout == title
    assert source.classes == list(small.WNIDS)
    listing = listed(tmp_path / "imagenet", tmp_path / "raw")
    with manifest.Contents(listing.root) as contents:
        found = {(row.split, row.label, row.path): contents.read(row) for row in listing.rows}
    expected = {
        ("train", label, f"train/{wnid}/{name}"): content
        for label, (wnid, files) in enumerate(small.train_images().items())
        for name, content in files.items()
    }
    for number, (name, content) in enumerate(small.val_images().items(), 1):
        label = number % 3
        expected["val", label, f"val/{small.WNIDS[label]}/{name}"] = content
    assert found == expected
    assert [len(content) for content in found.values()] == [row.bytes for row in listing.rows]
    assert manifest.read_manifest(tmp_path / "raw") == listing
    if layout != "tree":
        assert listing.names == tuple(small.NAMES.values())


def test_archives_without_validation_images_hold_out_what_a_tree_would(tmp_path, packed):
    tree = small.write_tree(tmp_path / "tree")
    shutil.rmtree(tree / "val")
    (packed / VAL).unlink()
    splits = [{image.path: image.split for image in find(root).images} for root in (tree, packed)]
    assert splits[0] == splits[1]
    assert sorted(splits[0].values()) == ["train"] * 9 + ["val"] * 3


def test_the_folder_inside_of_kaggles_layout_may_be_named(tmp_path):
    root = small.write_kaggle(tmp_path / "imagenet")
    assert find(root / "ILSVRC/Data/CLS-LOC") == find(root)


@pytest.mark.parametrize("layout", ["flat", "kaggle", "archives"])
def test_a_missing_validation_truth_is_one_sentence(tmp_path, layout):
    root = LAYOUTS[layout][0](tmp_path / "imagenet")
    shutil.rmtree(root / "ILSVRC2012_devkit_t12", ignore_errors=True)
    for name in (KIT, "LOC_val_solution.csv"):
        (root / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"nothing says their classes; put ILSVRC2012_devkit_t12\.tar\.gz or Kaggle's"):
        find(root)


def test_only_a_whole_imagenet_is_imagenet(tmp_path, packed):
    with pytest.raises(
        ValueError, match=r"has 3 classes \(such as 'n01440764'\), not the 1000 of .* data.source=folder\."
    ):
        sources.check_kind(find(packed), "imagenet")
    thousand = [
        manifest.ListedImage("train", f"{prefix}{k:08d}", f"{k}.jpg", f"{k}.jpg")
        for prefix in "nx"
        for k in range(1000)
    ]
    sources.check_kind(sources.Source("", "folder", tmp_path, thousand[:1000]), "imagenet")
    with pytest.raises(ValueError, match="has 1000 classes"):
        sources.check_kind(sources.Source("", "folder", tmp_path, thousand[1:1001]), "imagenet")


def test_a_training_folder_comes_before_archives(packed):
    small.write_tree(packed)
    assert find(packed).layout == "ImageNet, unpacked"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("a,b\n1,2\n", "does not have the columns ImageId,PredictionString"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001,cat 1 2 3 4\n", "says class 'cat' for ILSVRC2012_val_0"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001\n", "says class '' for ILSVRC2012_val_0"),
        (
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 1 2 3 4\n",
            r"does not say the class of validation image ILSVRC2012_val_00000002\.JPEG",
        ),
    ],
)
def test_what_is_wrong_with_kaggles_table_is_said(tmp_path, table, message):
    root = small.write_kaggle(tmp_path)
    (root / "LOC_val_solution.csv").write_text(table)
    with pytest.raises(ValueError, match=message) as caught:
        find(root)
    assert str(root / "LOC_val_solution.csv") in str(caught.value)


def test_validation_classes_that_training_lacks_are_named(tmp_path, packed):
    tree = small.write_flat_tree(tmp_path / "tree")
    shutil.rmtree(tree / "train/n02119789")
    files = small.train_images()
    del files["n02119789"]
    (packed / TRAIN).write_bytes(small.tar({f"{wnid}.tar": small.tar(part) for wnid, part in files.items()}))
    for root in (tree, packed):
        with pytest.raises(ValueError, match=r"val\S* has class 'n02119789', which .*train\S* lacks"):
            find(root)


def damaged(kit: bytes) -> dict[str, bytes]:
    files = {f"data/{name}": content for name, content in small.kit().items()}
    meta, truth = files
    return {
        "cut": kit[:-40],
        "empty": b"",
        "no table": small.tar({meta: files[meta]}, mode="w:gz"),
        "strange numbers": small.tar(files | {truth: b"77\n"}, mode="w:gz"),
        "no mat file": small.tar(files | {meta: b"MATLAB 5.0 MAT-file" + bytes(200)}, mode="w:gz"),
    }


@pytest.mark.parametrize("damage", ["cut", "empty", "no table", "strange numbers", "no mat file"])
def test_a_damaged_development_kit_is_one_sentence(packed, damage):
    kit = packed / KIT
    kit.write_bytes(damaged(kit.read_bytes())[damage])
    with pytest.raises(ValueError, match=r"ILSVRC2012_devkit_t12\.tar\.gz (is|has) .*; download it again\.$") as caught:
        find(packed)
    assert "\n" not in str(caught.value)


def test_an_archive_cut_anywhere_is_named_with_the_byte(packed):
    for name in (TRAIN, VAL):
        whole = (packed / name).read_bytes()
        end = 512 * (len(whole.rstrip(b"\0")) // 512 + 1)  # where the end mark starts
        for size in (*range(0, end, 4096), 100, 512, 513, end - 512, end, end + 512):
            (packed / name).write_bytes(whole[:size])
            with pytest.raises(
                ValueError, match=rf"{name}.* is cut short: .* ends at byte {size}\b.*download it again"
            ):
                find(packed)
        (packed / name).write_bytes(whole)
        assert len(find(packed).images) == 18


def test_a_class_archive_cut_inside_a_whole_one_is_named(packed):
    inner = small.tar(small.train_images()["n01443537"])
    (packed / TRAIN).write_bytes(small.tar({"n01443537.tar": inner[:1000], "n01440764.tar": inner}))
    with pytest.raises(ValueError, match=rf"{TRAIN}: n01443537\.tar is cut short: 'n01443537_0.JPEG' at byte 512 has"):
        find(packed)


def test_zeros_of_an_interrupted_download_are_no_end(packed):
    photographs = {name: small.jpeg(k, 96, 96) for k, name in enumerate(small.val_images())}
    (packed / VAL).write_bytes(small.tar(photographs))
    second = list(archives.members(packed / TRAIN))[1]
    for name, inside in ((TRAIN, None), (VAL, None), (TRAIN, second)):
        whole, members = (packed / name).read_bytes(), list(archives.members(packed / name, inside=inside))
        start, end = members[2].offset - 512, members[-1].offset if inside else len(whole)  # from the third header on
        (packed / name).write_bytes(whole[:start] + bytes(end - start) + whole[end:])
        with pytest.raises(ValueError, match=rf"{name}.* is damaged: zeros at byte {start} stand where a header"):
            find(packed)
        (packed / name).write_bytes(whole)
    assert len(find(packed).images) == 18


@pytest.mark.parametrize(("padding", "good"), [(1024, True), (21 * 512, True), (22 * 512, False), (1 << 20, False)])
def test_an_archive_may_end_in_one_record_of_zeros(packed, padding, good):
    content = (packed / VAL).read_bytes()
    end = 512 * (len(content.rstrip(b"\0")) // 512 + 1)
    (packed / VAL).write_bytes(content[:end] + bytes(padding))
    if good:
        assert len(find(packed).images) == 18
    else:
        with pytest.raises(ValueError, match=rf"zeros at byte {end} stand .* {padding} bytes before the end; download"):
            find(packed)


def test_a_damaged_header_is_named_with_the_byte(packed):
    content = bytearray((packed / VAL).read_bytes())
    with tarfile.open(packed / VAL) as archive:
        third = archive.getmembers()[2]
    content[third.offset + 3] ^= 1
    (packed / VAL).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{VAL} is damaged: no tar header starts at byte {third.offset}"):
        find(packed)
    (packed / VAL).write_bytes(small.tar(small.val_images(), mode="w:gz"))
    with pytest.raises(ValueError, match=rf"{VAL} is not an uncompressed tar archive: no tar header starts at byte 0"):
        find(packed)


def special(name: str, kind: bytes, **values) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for key, value in values.items():
        setattr(member, key, value)
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (special("/etc/passwd.JPEG", tarfile.REGTYPE), "the name '/etc/passwd.JPEG' at byte 0 leads out of its folder"),
        (
            special("a/../../b.JPEG", tarfile.REGTYPE),
            r"the name 'a/\.\./\.\./b.JPEG' at byte 0 leads out of its folder",
        ),
        (
            special("a.JPEG", tarfile.SYMTYPE, linkname="/etc/passwd"),
            r"'a\.JPEG' at byte 0 has tar type b'2', but must be a file or a",
        ),
        (
            special("a.JPEG", tarfile.LNKTYPE, linkname="b.JPEG"),
            r"'a\.JPEG' at byte 0 has tar type b'1', but must be a file or a",
        ),
        (special("a.JPEG", tarfile.CHRTYPE), r"'a\.JPEG' at byte 0 has tar type b'3', but must be a file or a"),
        (special("a.JPEG", tarfile.FIFOTYPE), r"'a\.JPEG' at byte 0 has tar type b'6', but must be a file or a"),
        (special("a.JPEG", tarfile.REGTYPE, size=-1024), "'a.JPEG' at byte 0 has -1024 bytes"),
        (special("a.JPEG", tarfile.REGTYPE, size=1 << 60), "'a.JPEG' at byte 0 has 1152921504606846976 bytes, but the"),
    ],
)
@pytest.mark.parametrize("where", ["val", "class"])
def test_a_hostile_member_is_refused_by_name(packed, member, message, where):
    header = member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    if where == "val":
        (packed / VAL).write_bytes(header)
    else:
        (packed / TRAIN).write_bytes(small.tar({"n01440764.tar": header}))
        message = message.replace("byte 0", "byte 512")
    with pytest.raises(ValueError, match=message):
        find(packed)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"cats.tar": b""}, "'cats.tar' is not named by a WordNet id, such as n01440764.tar"),
        ({"n01440764.tar": small.tar({"a.txt": b""})}, r"n01440764\.tar has no images"),
        ({"n01440764/1.JPEG": b""}, "has no archives of classes, such as n01440764.tar"),
        (
            {"n01440764.tar": small.tar({"a/1.JPEG": b"1", "b/1.JPEG": b"2"})},
            r"there are two images train/n01440764/1\.JPEG",
        ),
    ],
)
def test_what_is_wrong_with_the_training_archive_is_said(packed, classes, message):
    (packed / TRAIN).write_bytes(small.tar(classes))
    (packed / VAL).unlink()
    with pytest.raises(ValueError, match=message):
        find(packed)


def test_folders_times_and_other_files_are_passed_over(packed):
    files = {f"./val/{name}": content for name, content in small.val_images().items()}
    folder = special("val", tarfile.DIRTYPE)
    times = special("val/notes.txt", tarfile.REGTYPE, mtime=1338537600.25)  # a pax header in front
    (packed / VAL).write_bytes(small.tar(files, form=tarfile.PAX_FORMAT, folder=folder, times=times))
    assert [name for name in find(packed).images if name.split == "val"] != []
    assert len(find(packed).images) == 18


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_a_header_has_no_room_for_are_refused(packed, form):
    (packed / VAL).write_bytes(small.tar({f"{'long' * 70}.JPEG": b"1"}, form=form))
    with pytest.raises(ValueError, match=r"header at byte 0 sets 'path'|'\./\./@LongLink' at byte 0 has tar type b'L'"):
        find(packed)


def test_offsets_agree_with_the_standard_library(packed):
    with tarfile.open(packed / TRAIN) as outer:
        for whole in archives.members(packed / TRAIN):
            with tarfile.open(fileobj=outer.extractfile(whole.name)) as inner:
                expected = {member.name: whole.offset + member.offset_data for member in inner}
            assert {m.name: m.offset for m in archives.members(packed / TRAIN, inside=whole)} == expected


def test_validation_images_without_their_training_archive_are_not_enough(packed):
    (packed / TRAIN).unlink()
    with pytest.raises(ValueError, match=rf"has {VAL} but no {TRAIN}; put it there too"):
        find(packed)
