"""How fast a training runs, and what its steps wait for."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Speed:
    """Figures since the last call of `read`, for a training on `device`."""

    def __init__(self, device: torch.device):
        self._device, self._since, self._images, self._waited = device, time.monotonic(), 0, 0.0

    def begin(self, images: int) -> None:
        """Start to count at `images` images."""
        self._since, self._images, self._waited = time.monotonic(), images, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def read(self, images: int) -> dict[str, float]:
        """Images per second, the share of the time spent waiting for data, and the most memory used so far, in GB.

        images: seen by now. Memory is the GPU's, or the process's on a CPU.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        figures = {
            "images_per_second": (images - self._images) / seconds,
            "waiting": self._waited / seconds,
            "memory_gb": peak_memory(self._device) / 1e9,
        }
        self.begin(images)
        return figures


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: on the GPU if `device` is one, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
