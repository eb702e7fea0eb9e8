"""Cost of KL-16 per image: encoding for the cache (with mirror image), and decoding after sampling.

    python -m benchmarks.tokenizer --size 256 --save

Published structure, random weights, float32. Operations are counted without computing (a multiplication and an addition
are two). CPU seconds hardly depend on other work on the machine; wall seconds do.
"""

import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import arguments, device_of, median_seconds, report
from ear.latents.caching import Encoder
from ear.tokenizer.autoencoder import KL, kl_structure, new_kl

STRUCTURE = kl_structure(channels=16, block_channels=[128, 128, 256, 256, 512], layers=2)


def gigaflop(size: int) -> dict[str, float]:
    """Operations per image, from shapes alone."""
    with torch.device("meta"), torch.inference_mode():
        tokenizer, figures = KL(image_size=size, structure=STRUCTURE), {}
        images, latents = torch.empty(1, 3, size, size), torch.empty(1, 16, size // 16, size // 16)
        works = {
            "encode both": lambda: [tokenizer.encode(images) for _ in range(2)],
            "decode": lambda: tokenizer.decode(latents),
        }
        for name, work in works.items():
            with FlopCounterMode(display=False) as counter:
                work()
            figures[name] = counter.get_total_flops() / 1e9
    return figures


def cost(work: Callable[[], object], count: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds per image of a function that works on `count` images."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    before = time.process_time()
    seconds = median_seconds(finished, repeats)
    spent = (time.process_time() - before) / (repeats + 1)
    return {"seconds": seconds / count, "cpu seconds": spent / count}


@torch.inference_mode()
def measure(size: int, count: int, device: torch.device, repeats: int) -> dict:
    """Cost per image in batches of `count`, and peak memory."""
    tokenizer = new_kl(seed=0, image_size=size, structure=STRUCTURE).eval().requires_grad_(False).to(device)
    encoder = Encoder(tokenizer, fingerprint="", batch_size=count, device=device)
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    latents = torch.randn(count, 16, size // 16, size // 16, device=device)
    figures = {
        "size": size,
        "batch": count,
        "threads": torch.get_num_threads(),
        "gflop per image": gigaflop(size),
        "encode both": cost(lambda: encoder.moments(images), count, device, repeats),
        "decode": cost(lambda: tokenizer.decode(latents), count, device, repeats),
        "peak memory of the process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    if device.type == "cuda":
        figures["peak memory of the GPU, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def main() -> None:
    """Measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timings; the median is reported (default: 3)")
    options = parser.parse_args()
    device = device_of("auto")
    report("tokenizer", measure(options.size, options.batch, device, options.repeats), options)


if __name__ == "__main__":
    main()
