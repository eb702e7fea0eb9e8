"""Checkpoints that are written while the training goes on."""

import threading

import pytest
import torch

from ear.files.tensors import read_tensors, write_tensors
from ear.training import checkpoint


@pytest.fixture
def slow(monkeypatch) -> threading.Event:
    """Nothing is written before this event is set."""
    allowed = threading.Event()

    def write(*arguments):
        assert allowed.wait(30)
        write_tensors(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    return allowed


def test_what_is_written_is_the_state_of_its_moment(tmp_path, slow):
    weights, writer = torch.ones(3), checkpoint.Writer()
    writer.save(tmp_path, 8, {"weights": weights}, {"images": 8})
    weights.zero_()  # the training goes on
    assert checkpoint.newest(tmp_path) is None
    slow.set()
    writer.finish()
    assert torch.equal(read_tensors(checkpoint.newest(tmp_path))[0]["weights"], torch.ones(3))


def test_a_kill_before_the_link_leaves_the_checkpoint_that_is_kept(tmp_path, monkeypatch):
    """A training that resumes after this image would not keep it: the interval has been crossed."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "link", killed)
    writer = checkpoint.Writer()
    writer.save(tmp_path, 8, {"weights": torch.ones(3)}, {}, tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    assert torch.equal(read_tensors(checkpoint.at(tmp_path / "kept", 8))[0]["weights"], torch.ones(3))
    assert checkpoint.newest(tmp_path) is None


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, slow):
    writer = checkpoint.Writer()
    writer.save(tmp_path, 8, {"weights": torch.ones(3)}, {})
    threading.Timer(0.2, slow.set).start()
    writer.save(tmp_path, 16, {"weights": torch.ones(3)}, {})
    assert checkpoint.at(tmp_path, 8).exists()
    writer.finish()
    assert checkpoint.newest(tmp_path) == checkpoint.at(tmp_path, 16)


def test_a_checkpoint_that_fails_stops_the_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "checkpoint")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    writer = checkpoint.Writer()
    writer.save(tmp_path, 8, {}, {})
    with pytest.raises(OSError, match="No space left"):
        _for_ever(writer.check)
    writer.check()  # it has been said
    writer.save(tmp_path, 16, {}, {})
    with pytest.raises(OSError, match="No space left"):
        writer.save(tmp_path, 24, {}, {})


def _for_ever(function):
    while True:
        function()
