"""How a process uses the device and the memory of its machine."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from ear.runtime.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def compute():
    for _ in range(20):
        first = torch.ones(5_000_000)  # 20 MB
        second = first + 1
        del first, second
compute()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_asking_the_system():
    """40 arrays of 4,883 pages: a fault for each page by default, none if the memory was kept."""
    command = [sys.executable, "-c", PROGRAM]
    kept, returned = (int(subprocess.check_output([*command, way])) for way in ("keep", "default"))
    assert kept < 1000
    assert returned > 100_000
