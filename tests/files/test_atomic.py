"""Files and folders that appear complete or not at all."""

import errno
import os
from pathlib import Path

import pytest

from ear.files.atomic import link, whole_file, whole_folder


def fail_inside(context, work) -> None:
    """Do some work in a `with` block, which then fails."""
    with context as partial:
        work(partial)
        raise RuntimeError("on the way")


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new/file.txt"
    with whole_file(target) as partial:
        partial.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_the_earlier_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError, match="on the way"):
        fail_inside(whole_file(target), lambda partial: partial.write_text("half"))
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_of_a_write_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "file")
    sentence = "a worker process died; run again."  # an OSError that names no file keeps its words
    with pytest.raises(ChildProcessError) as raised, whole_file(tmp_path / "file"):
        raise ChildProcessError(sentence)
    assert str(raised.value) == sentence


def test_a_folder_replaces_the_earlier_one_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with whole_folder(target) as partial:
        (partial / "new").write_text("new")
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(RuntimeError, match="on the way"):
        fail_inside(whole_folder(target), lambda partial: (partial / "third").write_text("half"))
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_link_has_the_content_on_any_disk(tmp_path, monkeypatch, same_disk):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    if not same_disk:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    link(source, target)
    assert target.read_bytes() == b"content"
    assert Path(source).samefile(target) == same_disk
