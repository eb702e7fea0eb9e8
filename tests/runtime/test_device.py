"""How a process uses the device and the memory of its machine."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, torch
from ear.runtime.device import keep_freed_memory
class State(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = State
if sys.argv[1] == "keep":
    keep_freed_memory()
first = torch.ones(5_000_000)  # 20 MB
second = first + 1
mapped = mallinfo().hblkhd
del first, second
print(mapped, mallinfo().fordblks)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's allocator")
def test_freed_memory_is_kept():
    """Two arrays of 20 MB: by default each is mapped, and returned; else both are on the heap, and stay."""
    command = [sys.executable, "-c", PROGRAM]
    kept, default = ([int(n) for n in subprocess.check_output([*command, way]).split()] for way in ("keep", "default"))
    assert kept[0] < 20_000_000
    assert kept[1] > 40_000_000
    assert default[0] > 40_000_000
    assert default[1] < 20_000_000
