"""How a process uses the device and the memory of its machine."""

import ctypes
import subprocess
import sys

import pytest
import torch

from ear.config.compose import compose
from ear.errors import UserError
from ear.runtime.device import check_can_compute

PROGRAM = """
import ctypes, torch
from ear.runtime.device import keep_freed_memory
class State(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = State
def look():
    first = torch.ones(5_000_000)  # 20 MB
    second = first + 1
    mapped = mallinfo().hblkhd
    del first, second
    print(mapped, mallinfo().fordblks)
look()
keep_freed_memory()
look()
"""


def test_only_what_the_keys_ask_for_must_be_there():
    """A stage that only reads images needs no GPU, whatever the others of its preset need."""
    parameters = compose(["preset=folder64", "data.path=/images", "runtime.device=cpu"])
    check_can_compute(parameters, ["data.image_size", "prepare"])
    check_can_compute(parameters, ["compute", "tokenizer"])  # float32
    for key in ("train", "train.precision"):
        with pytest.raises(UserError, match=r"^train\.precision is 'bfloat16', which CPUs lack"):
            check_can_compute(parameters, [key])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_refused_for_stages_that_compute():
    parameters = compose(["preset=digits", "runtime.device=cuda"])
    check_can_compute(parameters, ["prepare"])
    with pytest.raises(UserError, match=r"^runtime\.device is 'cuda', but torch finds no CUDA device"):
        check_can_compute(parameters, ["compute", "sample"])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's allocator")
def test_freed_memory_is_kept():
    """Two arrays of 20 MB: by default each is mapped, and returned; else both are on the heap, and stay."""
    said = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True)
    default, kept = ([int(number) for number in line.split()] for line in said.splitlines())
    assert kept[0] < 20_000_000
    assert kept[1] > 40_000_000
    assert default[0] > 40_000_000
    assert default[1] < 20_000_000
