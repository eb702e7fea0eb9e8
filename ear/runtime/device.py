"""Device, threads and precision of a stage."""

import contextlib
import ctypes
import re
from collections.abc import Collection, Iterator

import numpy as np
import torch
import torch.utils.deterministic
from torch import nn

from ear import config
from ear.errors import UserError
from ear.runtime import distributed

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_LARGEST_THRESHOLD = 32 * 2**20  # bytes, that glibc accepts: larger arrays are mapped and returned
# The first key whose words are in the device's name wins.
_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def prepare_device(device: str, threads: int) -> torch.device:
    """Set CPU threads and deterministic kernels where there are some; return this rank's device.

    device: "auto", "cpu" or "cuda". On CUDA, the backward pass of attention stays nondeterministic: PyTorch makes it
    deterministic only in the mode that refuses all operations without such a kernel.

    Raises UserError if CUDA is requested but absent, or has fewer devices than this machine has ranks.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler, for 5 s
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # all is written
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # convolutions use TF32 by default; features and latents need full float32
    number = distributed.local_rank()
    check_devices(device, number + 1)
    if not uses_cuda(device):
        return torch.device("cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory of this process for its next arrays.

    By default, glibc returns it to the system, which clears each page again: a quarter of the time of sampling on CPUs.
    Does nothing with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def uses_cuda(device: str) -> bool:
    """Whether stages compute on CUDA devices, for "auto", "cpu" or "cuda"."""
    return device != "cpu" and torch.cuda.is_available()


def find_device(device: torch.device | str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises UserError if torch has no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for devices that it does not know or find
        raise UserError(f"device is '{device}', which torch does not find here; use 'auto' or 'cpu'.") from error


def for_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the host; for a GPU in page-locked memory, so `to(non_blocking=True)` need not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def data_sheet_peak(device: torch.device) -> float | None:
    """Operations per second in bfloat16 without sparsity by the GPU's data sheet; None for other devices."""
    named = device_name(device)
    return next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", named)), None)


def check_devices(device: str, processes: int) -> None:
    """Raise UserError if CUDA is requested but absent, or has fewer devices than `processes`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but torch finds no CUDA device; set it to auto or cpu.")
    if uses_cuda(device) and processes > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"{processes} processes on this machine need one CUDA device each, but torch finds {count}; set "
            f"runtime.processes to {count}, or runtime.device to cpu."
        )


def check_precision(precision: str, cuda: bool, *, key: str) -> None:
    """Raise UserError naming the parameter `key` if a CPU is to use less than float32."""
    if precision != "float32" and not cuda:
        raise UserError(f"{key} is {precision!r}, which CPUs lack (or emulate, 100 times slower); set it to 'float32'.")


def check_can_compute(parameters: config.Parameters, keys: Collection[str]) -> None:
    """Raise UserError if this machine lacks a device or a precision that stages which read these keys need.

    keys: sections of params.yaml, or SECTION.KEY. Stages that compute read `compute`.
    """
    runtime = parameters.runtime
    if {"compute", "runtime", "runtime.device", "runtime.processes"} & set(keys):
        check_devices(runtime.device, runtime.processes)
    trained = ["tokenizer.precision"] if parameters.tokenizer.name == "kl" else []
    for key in (*trained, "train.precision", "sample.precision", "sample.decoder_precision"):
        if {key, key.partition(".")[0]} & set(keys):
            check_precision(config.value_of(parameters, key), uses_cuda(runtime.device), key=key)


def set_precision(precision: str, device: torch.device, *, key: str) -> None:
    """Enable TF32 matmuls if precision is "tfloat32", else disable them; raises as `check_precision` does."""
    check_precision(precision, device.type == "cuda", key=key)
    torch.set_float32_matmul_precision("high" if precision == "tfloat32" else "highest")


@contextlib.contextmanager
def precise(precision: str, device: torch.device) -> Iterator[None]:
    """Compute with this precision inside the block: float32, tfloat32 (products and convolutions) or bfloat16."""
    if precision not in ("float32", "tfloat32", "bfloat16"):
        raise UserError(f"precision is {precision!r}, but must be 'float32', 'tfloat32' or 'bfloat16'.")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tfloat32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tfloat32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def compile_in_place(module: nn.Module, *, dynamic: bool | None = None) -> None:
    """torch.compile a module with eager mode's dropout masks; with other masks, compiling would change results.

    dynamic: compile once for all sizes of its inputs; None: once more if a size changes.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # tells the compiler, too
    module.compile(options={"fallback_random": True}, dynamic=dynamic)
