"""Images that changed since they were listed, as the flow notices them."""

from pathlib import Path

import numpy as np
import pytest

from ear.config.compose import compose
from ear.data import manifest, sources
from ear.data.images import Encoding
from ear.files.json_files import read_json, write_json
from flows.inputs import changed_images


@pytest.fixture
def listed(tmp_path, monkeypatch) -> Path:
    """An npz file, and its list in data/raw."""
    monkeypatch.chdir(tmp_path)
    save(12)
    source = sources.find("x.npz", val_fraction=0.25)
    digest = sources.unpack(source.arrays, Path("data/raw"))
    encoding = Encoding(pixels=(4, 4), sha256=digest)
    manifest.write_manifest("data/raw", source.images, tree="data/raw", root="data/raw", names={}, encoding=encoding)
    return tmp_path


def save(count: int) -> None:
    np.savez("x.npz", images=np.zeros((count, 4, 4), np.uint8), labels=np.arange(count) % 2)


def changed() -> str:
    return changed_images(compose(["data.source=npz", "data.path=x.npz", "data.val_fraction=0.25"]))


def test_more_images_of_an_array_are_noticed(listed):
    assert changed() == ""
    save(20)
    assert changed().startswith("images of data.path: 8 new")


def test_a_list_of_an_earlier_version_is_left_to_dvc(listed):
    save(20)
    source = read_json("data/raw/source.json")
    write_json(Path("data/raw/source.json"), source | {"format": "ear-raw-2"})
    assert changed() == ""
