"""The device and the arithmetic that a stage computes with."""

import torch


def prepare(device: str, threads: int) -> torch.device:
    """Set the CPU threads and deterministic kernels; "auto", "cpu" or "cuda" => the device.

    Raises ValueError where CUDA is asked for and absent.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("runtime.device is 'cuda', but torch finds no CUDA device; set it to auto or cpu.")
    return torch.device("cuda" if available and device != "cpu" else "cpu")
