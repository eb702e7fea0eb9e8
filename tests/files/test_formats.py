"""JSON, tables and tensors: readable, byte-reproducible, damaged files named."""

import errno
import resource
import signal
import subprocess
import sys

import processes
import pytest
import torch

from ear.errors import MissingFileError, UserError
from ear.files.digests import named_digest, sha256
from ear.files.json_files import read_json, rounded, write_json
from ear.files.reading import reading
from ear.files.tables import write_table
from ear.files.tensors import read_description, read_tensors, write_tensors


def test_json_keeps_the_order_of_keys(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"b": 1, "a": [1.5, None]})
    assert path.read_text() == '{\n "b": 1,\n "a": [\n  1.5,\n  null\n ]\n}\n'
    assert list(read_json(path)) == ["b", "a"]


def test_damaged_and_absent_json_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"absent\.json does not exist; run the stage"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"half\.json is not a readable JSON file"):
        read_json(tmp_path / "half.json")


def test_what_the_system_refuses_is_no_damage(tmp_path):
    """Its advice would be to delete a file that may be good."""
    with pytest.raises(OSError, match="Too many open files"), reading(tmp_path, "JSON file", "delete it"):
        raise OSError(errno.EMFILE, "Too many open files")
    damaged = pytest.raises(UserError, match=r"is not a readable JSON file \(truncated\); delete it\.")
    with damaged, reading(tmp_path, "JSON file", "delete it"):
        raise OSError("truncated")


def test_rounding_keeps_six_digits_in_nested_content():
    assert rounded({"a": [1 / 3, 2], "b": "text", "c": {"d": 123456789.0}}) == {
        "a": [0.333333, 2],
        "b": "text",
        "c": {"d": 123457000.0},
    }


def test_a_table_has_one_header_and_six_digits(tmp_path):
    write_table(tmp_path / "log.tsv", [{"images": 64, "loss": 1 / 3}, {"images": 128, "loss": 2e-9}])
    assert (tmp_path / "log.tsv").read_text() == "images\tloss\n64\t0.333333\n128\t2e-09\n"
    write_table(tmp_path / "empty.tsv", [])
    assert (tmp_path / "empty.tsv").read_text() == "images\n"


def test_tensors_have_the_same_bytes_in_every_process(tmp_path):
    program = (
        "import sys, torch\n"
        "from ear.files.tensors import write_tensors\n"
        "write_tensors(sys.argv[1], {'b': torch.arange(3), 'a': torch.ones(2, 2)}, {'x': 1, 'y': [2], 'z': 'text'})\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "first")], check=True)
    description = {"x": 1, "y": [2], "z": "text"}
    write_tensors(tmp_path / "second", {"b": torch.arange(3), "a": torch.ones(2, 2)}, description)
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")
    tensors, read = read_tensors(tmp_path / "first")
    assert read == read_description(tmp_path / "first") == description
    assert torch.equal(tensors["b"], torch.arange(3))


def test_a_file_that_was_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.safetensors"
    write_tensors(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cut\.safetensors is not a readable safetensors file"):
        read_description(path)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """In a process of its own, whose files may have 1,000 bytes: safetensors itself raises no OSError."""
    path = tmp_path / "large.safetensors"

    def write() -> tuple[str, str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError) as error:  # noqa: PT011 - its message is looked at below
            write_tensors(path, {"a": torch.zeros(10_000)}, {})
        return error.value.filename, error.value.strerror

    assert processes.together(write, 1) == [(str(path), "File too large")]
    assert list(tmp_path.iterdir()) == []


def test_published_names_tell_their_digest():
    assert named_digest("vgg16-397923af.pth") == "397923af"
    assert named_digest("weights.pth") == ""
