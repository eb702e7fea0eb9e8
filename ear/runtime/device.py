"""Device, threads and precision of a stage."""

import torch
from torch import nn

from ear.errors import UserError
from ear.runtime import distributed


def prepare_device(device: str, threads: int) -> torch.device:
    """Set CPU threads and deterministic kernels; return this rank's device for "auto", "cpu" or "cuda".

    Raises UserError if CUDA is requested but absent, or has fewer devices than this machine has ranks.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # convolutions use TF32 by default; features and latents need full float32
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("runtime.device is 'cuda', but torch finds no CUDA device; set it to auto or cpu.")
    if not available or device == "cpu":
        return torch.device("cpu")
    number, devices = distributed.local_rank(), torch.cuda.device_count()
    if number >= devices:
        raise UserError(
            f"process {number + 1} of this machine finds {devices} CUDA device(s), but each process needs one; set "
            f"runtime.processes to {devices}, or runtime.device to cpu."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def set_precision(precision: str, device: torch.device, *, key: str) -> None:
    """Enable TF32 matmuls if precision is "tfloat32", else disable them.

    Raises UserError naming the parameter `key` if a CPU is to use less than float32.
    """
    if precision != "float32" and device.type == "cpu":
        raise UserError(f"{key} is {precision!r}, which CPUs lack (or emulate, 100 times slower); set it to 'float32'.")
    torch.set_float32_matmul_precision("high" if precision == "tfloat32" else "highest")


def compile_in_place(module: nn.Module) -> None:
    """torch.compile a module with eager mode's dropout masks; with other masks, compiling would change results."""
    module.compile(options={"fallback_random": True})
