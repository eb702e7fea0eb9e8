"""ImageNet in its official archives, read in place: headers give the offset of each image in its archive.

Nothing is unpacked, so no member can be written outside a folder; names that point outside are refused all the same.
"""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ear.data.manifest import ListedImage
from ear.data.sources import imagenet
from ear.data.sources.listing import Source, hold_out, in_order, is_image
from ear.display.progress import track
from ear.errors import UserError

_BLOCK = 512  # bytes; headers and contents start at multiples of it
_MOST_EXTRA = 1 << 20  # bytes of a pax header
# Two blocks of zeros end an archive, and more fill its last record of 20 blocks, which is the default of `tar` and the
# form of the official archives. If larger records were allowed, a truncated archive could pass for complete.
_MOST_ZEROS = (20 + 1) * _BLOCK  # bytes; the first of the two may end a record
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A regular file in an archive: its name, the offset of its content and its length, in bytes."""

    name: str
    offset: int
    bytes: int


def find(root: Path, *, val_fraction: float) -> Source:
    """List the images of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in `root`.

    The first archive holds one tar archive per class, WNID.tar. The second holds images; the development kit or
    Kaggle's table gives their classes (`imagenet.find_truth`). Without the second, `val_fraction` of each class is held
    out.

    Raises UserError naming archive and byte or member if an archive is truncated or damaged, a member is a link or has
    a name that points outside, a class has no images or is not ImageNet's, or the classes of the validation images are
    unknown.
    """
    train, val = root / imagenet.TRAIN_ARCHIVE, root / imagenet.VAL_ARCHIVE
    layout, truth = "ImageNet, official archives", imagenet.find_truth(root)
    if not val.exists():
        names = truth.names if truth else {}
        return Source(layout, "folder", root, hold_out(_training(train), val_fraction), names, has_val=False)
    truth = imagenet.require_truth(truth, root, val)  # checked before the long walk
    held_out = [
        ListedImage("val", wnid, f"val/{wnid}/{name}", val.name, member.offset, member.bytes)
        for name, member in _images(members(val))
        for wnid in [imagenet.class_of(name, truth)]
    ]
    if not held_out:
        raise UserError(f"{val} has no images; download it again.")
    images = _training(train)
    if unknown := sorted({image.class_name for image in held_out} - {image.class_name for image in images}):
        raise UserError(f"{val} has class {unknown[0]!r}, which {train} lacks; the two must have the same classes.")
    return Source(layout, "folder", root, in_order(images + held_out), truth.names)


def _training(archive: Path) -> list[ListedImage]:
    """The training images: the archive holds one archive per class."""
    classes = [member for member in members(archive) if member.name.endswith(".tar")]
    if not classes:
        raise UserError(f"{archive} has no archives of classes, such as n01440764.tar; download it again.")
    with ThreadPoolExecutor(8) as pool:  # a network file system takes long for a million reads
        parts = pool.map(lambda member: _class(archive, member), classes)
        return [image for part in track(parts, "listing", len(classes), unit="class") for image in part]


def _class(archive: Path, whole: Member) -> list[ListedImage]:
    """The images of one class, whose archive lies inside the training archive."""
    wnid = PurePosixPath(whole.name).stem
    if not imagenet.are_wnids([wnid]):
        raise UserError(f"{archive}: {whole.name!r} is not named by a WordNet id, such as n01440764.tar; remove it.")
    images = _images(members(archive, inside=whole))
    if not images:
        raise UserError(f"{archive}: {whole.name} has no images; download it again.")
    return [
        ListedImage("train", wnid, f"train/{wnid}/{name}", archive.name, member.offset, member.bytes)
        for name, member in images
    ]


def _images(found: Iterable[Member]) -> list[tuple[str, Member]]:
    """The members that are images, with their file names."""
    named = [(PurePosixPath(member.name).name, member) for member in found]
    return [(name, member) for name, member in named if is_image(name)]


def members(archive: Path, *, inside: Member | None = None) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar archive, or of one that is a member of it; only headers are read.

    Offsets count from the start of the outer archive. Raises UserError naming the archive and the byte at which it is
    truncated or damaged, or the member that is not a regular file or folder or whose name is absolute or has `..`.
    """
    title = f"{archive}: {inside.name}" if inside else f"{archive}"
    with archive.open("rb", buffering=0) as file:
        start, end = (inside.offset, inside.offset + inside.bytes) if inside else (0, os.fstat(file.fileno()).st_size)
        position = start
        while True:
            block = os.pread(file.fileno(), _BLOCK, position)
            if position + _BLOCK > end:
                raise UserError(f"{title} is cut short: it ends at byte {end} without an end mark; download it again.")
            if not any(block):
                _check_end(os.pread(file.fileno(), min(end - position, _MOST_ZEROS), position), title, position, end)
                return
            header = _header(block, title, position)
            content = position + _BLOCK
            if content + header.size > end:
                raise UserError(
                    f"{title} is cut short: {header.name!r} at byte {position} has {header.size} bytes, but "
                    f"the archive ends at byte {end}; download it again."
                )
            if header.type in _PAX:
                _check_extra(os.pread(file.fileno(), min(header.size, _MOST_EXTRA), content), title, position)
            elif header.type in _REGULAR:
                yield Member(header.name, content, header.size)
            position = content + -(-header.size // _BLOCK) * _BLOCK


def _header(block: bytes, title: str, position: int) -> tarfile.TarInfo:
    """Parse and check a header; tarfile itself accepts negative sizes."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = "is not an uncompressed tar archive" if position == 0 else "is damaged"
        raise UserError(f"{title} {what}: no tar header starts at byte {position}; download it again.") from error
    if header.size < 0:
        raise UserError(
            f"{title} is damaged: {header.name!r} at byte {position} has {header.size} bytes; download it again."
        )
    if header.type not in (*_REGULAR, *_PAX, tarfile.DIRTYPE):
        raise UserError(
            f"{title}: {header.name!r} at byte {position} has tar type {header.type!r}, but must be a file or a "
            "folder; pack regular files in the POSIX format (`tar --format=posix`)."
        )
    if PurePosixPath(header.name).is_absolute() or ".." in PurePosixPath(header.name).parts:
        raise UserError(f"{title}: the name {header.name!r} at byte {position} leads out of its folder; remove it.")
    return header


def _check_end(rest: bytes, title: str, position: int, end: int) -> None:
    """Check that zeros are the end mark: a download may have reserved disk space that it never filled."""
    if end - position < 2 * _BLOCK:
        raise UserError(f"{title} is cut short: it ends at byte {end} inside its end mark; download it again.")
    if any(rest) or end - position > _MOST_ZEROS:
        raise UserError(
            f"{title} is damaged: zeros at byte {position} stand where a header should, {end - position} bytes before "
            f"the end; download it again, or pack it anew with `tar -b 20` if it was packed with larger records."
        )


def _check_extra(records: bytes, title: str, position: int) -> None:
    """Refuse a pax header that sets the next member's name or size; times are fine."""
    if found := re.search(rb"(?:^|\n)\d+ (path|size|GNU\.sparse[^=]*)=", records):
        raise UserError(
            f"{title}: the pax header at byte {position} sets {found[1].decode()!r}, which ImageNet's do "
            "not; pack it anew with `tar --format=ustar`."
        )
