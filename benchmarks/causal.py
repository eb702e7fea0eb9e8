"""Speed-up of causal sampling by the key-value cache.

    python -m benchmarks.causal [--save] [KEY=VALUE ...]

Measures the transformer of a preset with causal attention, untrained, without guidance and without the head, which
costs the same in both cases. Without the cache, each token takes a pass over all earlier slots; with it, over one slot.
"""

import functools
import statistics

import torch

from benchmarks import measure
from benchmarks.models import untrained
from ear.config import Parameters
from ear.config.compose import compose
from ear.model.causal import CausalModel
from ear.model.tokens import pick
from ear.runtime.randomness import generator, stream

_GRIDS = (4, 8, 16)  # tokens along a side


def cached(model: CausalModel, tokens, orders, labels):
    """Hidden states [B, L, W], slot by slot through the caches."""
    caches, slots, rows = model.caches(), model.start(labels, None, orders[:, :1]), []
    for i in range(model.tokens):
        rows.append(model.states(slots, caches)[:, -1:])
        if i + 1 < model.tokens:
            at = orders[:, i : i + 1]
            slots = model.slots(pick(tokens, at), at, orders[:, i + 1 : i + 2])
    return torch.cat(rows, dim=1)


def uncached(model: CausalModel, tokens, orders, labels):
    """The same hidden states, each by a pass over its own and all earlier slots."""
    start, rows = model.start(labels, None, orders[:, :1]), []
    for i in range(model.tokens):
        slots = model.slots(pick(tokens, orders[:, :i]), orders[:, :i], orders[:, 1 : i + 1])
        rows.append(model.states(start.then(slots))[:, -1:])
    return torch.cat(rows, dim=1)


@torch.inference_mode()
def compare(parameters: Parameters, grid: int, images: int, rounds: int) -> dict:
    """Median seconds per image with and without cache, by turns, their ratio, and the largest difference."""
    model = untrained(parameters, side=grid * parameters.model.patch_size)
    assert isinstance(model, CausalModel)
    source = generator(0, "inputs")
    tokens = torch.randn(images, model.tokens, model.shape.token_channels, generator=source)
    inputs = (model, tokens, model.draw_orders(images, stream(0, "orders")), torch.arange(images) % 10)
    ways = {way.__name__: functools.partial(way, *inputs) for way in (cached, uncached)}
    seconds = measure.turns(ways, rounds=rounds)
    difference = (cached(*inputs) - uncached(*inputs)).abs().max()
    return {
        "tokens": model.tokens,
        **{f"{name}_seconds_per_image": statistics.median(each) / images for name, each in seconds.items()},
        **measure.speedup(seconds["cached"], seconds["uncached"]),
        "largest_difference": float(difference),
    }


def main() -> None:
    """Compare on several token grids."""
    parser = measure.arguments(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="preset=NAME and section.key=value")
    parser.add_argument("--images", type=int, default=4, help="images at once (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median is reported (default: 3)")
    arguments = parser.parse_args()
    parameters = compose([*arguments.overrides, "model.attention=causal"])
    torch.set_num_threads(parameters.compute.threads)
    grids = [compare(parameters, grid, arguments.images, arguments.rounds) for grid in _GRIDS]
    sizes = {key: getattr(parameters.model, key) for key in ("width", "depth", "heads", "buffer_size")}
    measure.report("causal", {"model": sizes, "images": arguments.images, "grids": grids}, arguments)


if __name__ == "__main__":
    main()
