"""Fixtures of all tests."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small networks run several times faster on one thread of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
