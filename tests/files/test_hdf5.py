"""Rows of several shards, numbered through."""

import h5py
import numpy as np
import pytest

from ear.files.hdf5 import Rows, fixed_place


@pytest.mark.parametrize("counts", [[5], [3, 4], [1, 0, 6], [0, 2, 2, 0, 9]])
def test_every_row_is_found_in_its_shard(counts):
    rows = Rows(counts)
    assert len(rows) == sum(counts)
    expected = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    indices = np.random.RandomState(0).randint(0, len(rows), 50)
    found = {}
    for shard, places, within in rows.locate(indices):
        found |= {int(place): (shard, int(row)) for place, row in zip(places, within, strict=True)}
    assert [found[k] for k in range(50)] == [expected[k] for k in indices]


@pytest.mark.parametrize("indices", [[-1], [0, 7]])
def test_rows_outside_are_refused(indices):
    with pytest.raises(IndexError, match=r"outside 0\.\.6"):
        list(Rows([3, 4]).locate(indices))


def test_no_rows_are_in_no_shard():
    assert list(Rows([3, 4]).locate([])) == []


def test_a_fixed_place_can_be_filled_from_outside(tmp_path):
    path, values = tmp_path / "file.h5", np.arange(12, dtype=np.uint8).reshape(3, 4)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("values", (3, 4), np.uint8, dcpl=fixed_place())
        file.flush()
        offset = data.id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(values.tobytes())
    with h5py.File(path) as file:
        assert np.array_equal(file["values"][:], values)
