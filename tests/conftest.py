"""Fixtures of all tests."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from perceptual_files import generated_files
from repositories import SHARED

# A shell ignores SIGINT in background jobs, and nohup ignores SIGHUP, which programs that tests stop would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of all processes of a test run."""
    if not hasattr(config, "workerinput"):  # not a worker of pytest-xdist
        os.environ[SHARED] = tempfile.mkdtemp(prefix="ear-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Delete it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def _forget_prefect() -> None:
    """Drop Prefect's exit hooks in a forked process: its services are not inherited, so they would fail there.

    After a test has run a flow in this process, a DataLoader worker would otherwise end with exit code 1.
    """
    hooks = threading._threading_atexits
    hooks[:] = [hook for hook in hooks if not hook.func.__module__.startswith("prefect.")]


os.register_at_fork(after_in_child=_forget_prefect)


# `make test` gives each worker one file after the other, in this order.
_FIRST = [
    "test_pipeline.py",
    "test_flows.py",
    "test_doc_commands.py",
    "test_serve.py",
    "test_tokenizer_stages.py",
]  # the longest
# Backward passes on tensors without data start threads of autograd, after which a process cannot fork and train. The
# longest of these first, too.
_LAST = ["test_costs.py", "test_describe.py", "test_folder64.py", "test_scaling.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that workers end together, and those that forbid forking last."""

    def place(item: pytest.Item) -> tuple[int, int]:
        name = item.path.name
        for position, names in ((0, _FIRST), (2, _LAST)):
            if name in names:
                return position, names.index(name)
        return 1, 0

    items.sort(key=place)


@pytest.fixture
def one_thread():
    """Small networks run several times faster on one thread of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a Dask scheduler with as many worker processes on this machine as CLUSTER of the test file says.

    For one file only: idle ones take a tenth of a core.
    """
    from distributed import LocalCluster

    workers = getattr(request.module, "CLUSTER", 1)
    with LocalCluster(n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="session")
def perceptual_folder(tmp_path_factory) -> Path:
    """The two files of the perceptual network, with generated weights."""
    return generated_files(tmp_path_factory.mktemp("perceptual"))
