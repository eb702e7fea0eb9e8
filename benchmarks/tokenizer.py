"""What KL-16 costs per image: encoding for the cache (plain and mirrored) and decoding after sampling.

    python -m benchmarks.tokenizer --size 256 --save

Structure as published, weights random; float32. Operations are counted (one multiplication and addition are two);
CPU seconds do not depend on what else the machine does, wall seconds do. The peak of the process's memory is that of
all before: batches grow.
"""

import resource
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import arguments, median_seconds, report
from ear.autoencoder import KL, kl_structure, new_kl
from ear.caching import Encoder

BATCHES = (1, 4)  # images at once


def published() -> KL:
    """KL-16 with random weights, in eval mode."""
    structure = kl_structure(channels=16, block_channels=[128, 128, 256, 256, 512], layers=2)
    return new_kl(seed=0, image_size=256, structure=structure).eval().requires_grad_(False)


def operations(function) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def cost(function, count: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Per image, of a function that works on `count` images."""

    def work() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    before = time.process_time()
    seconds = median_seconds(work, repeats)
    spent = (time.process_time() - before) / (repeats + 1)
    return {"seconds": seconds / count, "cpu seconds": spent / count, "gflop": operations(function) / count / 1e9}


def measure(size: int, device: torch.device, repeats: int) -> dict:
    """Figures by batch size."""
    tokenizer, figures = published().to(device), {"size": size, "threads": torch.get_num_threads()}
    encoder = Encoder(tokenizer, fingerprint="", batch_size=max(BATCHES), device=device)
    source = np.random.default_rng(0)
    for count in BATCHES:
        images = source.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        latents = torch.randn(count, 16, size // 16, size // 16, device=device)
        with torch.inference_mode():
            figures[f"batch {count}"] = {
                "encode both mirror images": cost(
                    lambda images=images: encoder.moments(images), count, device, repeats
                ),
                "decode": cost(lambda latents=latents: tokenizer.decode(latents), count, device, repeats),
                "peak memory of the process, gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
            if device.type == "cuda":
                figures[f"batch {count}"]["peak memory of the gpu, gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def main() -> None:
    """Measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median counts (default: 3)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report("tokenizer", measure(options.size, device, options.repeats), save=options.save)


if __name__ == "__main__":
    main()
