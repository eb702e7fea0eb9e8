"""What a parameter file will cost, before any data exists: python -m ear.describe --params params.yaml

Parameters, memory of a training process, compute per image and disk. Times are compute over a rate that you give:
`--teraflops 400` for what a device sustains, not its peak.
"""

import argparse
import sys
from pathlib import Path

from ear import config, records
from ear.costs import Costs, of_pipeline
from ear.latents import STATS
from ear.sources import imagenet

EMBEDDED = {"digits": (10, 1797)}  # classes and images of the sources whose size is known
IMAGENET = (imagenet.CLASSES, imagenet.TRAIN_IMAGES + imagenet.VAL_IMAGES)

Section = tuple[str, dict[str, str]]  # a title, and values by name


def report(costs: Costs, parameters: config.Parameters, *, teraflops: float | None = None) -> str:
    """The costs as text; with the teraFLOP/s that one device sustains, the times of whole stages as well."""
    model, score = costs.shape.model, costs.shape.score["name"]
    lines = [
        f"{parameters.data.image_size} pixels a side -> {costs.tokens} tokens of {costs.token_channels} channels, "
        f"{len(costs.shape.classes)} classes, {costs.images:,} images",
        f"{score} score; {model['attention']} transformer, {model['depth']} blocks of {model['width']} channels; "
        f"head, {model['head_depth']} blocks of {model['head_width']} channels",
    ]
    sample = parameters.sample
    sections = [
        ("parameters", {name: f"{count:,}" for name, count in costs.parameters.items()}),
        *_tokenizer_memory(costs, parameters),
        _memory(costs, parameters),
        ("a training image", {name: operations(count) for name, count in costs.training_flops.items()}),
        (
            f"a generated image ({sample.steps} steps, guidance {sample.guidance:g})",
            {name: operations(count) for name, count in costs.sampling_flops.items()},
        ),
        _stages(costs, parameters, teraflops),
        ("disk", {name: size(count) for name, count in costs.disk.items()}),
    ]
    for title, rows in sections:
        lines += ["", title, *(f"  {name:<28}{value:>14}" for name, value in rows.items())]
    return "\n".join(lines)


def _tokenizer_memory(costs: Costs, parameters: config.Parameters) -> list[Section]:
    """Of the tokenizer's training, where there is one."""
    if not costs.tokenizer_memory:
        return []
    rows = {name: size(count) for name, count in costs.tokenizer_memory.items()}
    rows["all"] = size(sum(costs.tokenizer_memory.values()))
    title = f"memory of the tokenizer's training (float32, {parameters.tokenizer.micro_batch_size} images at once)"
    return [(title, rows)]


def _memory(costs: Costs, parameters: config.Parameters) -> Section:
    """Of one training process."""
    train = parameters.train
    rows = {name: size(count) for name, count in costs.memory.items()}
    every = sum(costs.memory.values())
    rows["all"] = size(every)
    rows["all, with checkpointing"] = size(every - costs.memory["activations"] + costs.checkpointed_activations)
    return f"memory of a training process ({train.precision}, {train.micro_batch_size} images at once)", rows


def _stages(costs: Costs, parameters: config.Parameters, teraflops: float | None) -> Section:
    """Compute of the stages that take long, and their time."""
    training = costs.training_flops["forward and backward"]
    stages = {"tokenizer": (parameters.tokenizer.images, costs.tokenizer_flops)} if costs.tokenizer_memory else {}
    stages |= {
        "cache": (costs.images, costs.encoding_flops),
        "train": (parameters.train.images, training),
        "finetune": (parameters.finetune.images, training),
        "sample": (parameters.sample.count, sum(costs.sampling_flops.values())),
    }
    processes = parameters.runtime.processes
    rows = {}
    for name, (images, each) in stages.items():
        rows[name] = f"{images:>13,} images x {operations(each):>13} = {images * each:.2e} FLOP"
        if teraflops:
            used = 1 if name == "tokenizer" else processes  # it trains in one
            rows[name] += f", {duration(images * each / (teraflops * 1e12 * used))}"
    rate = f"{teraflops:g} TFLOP/s, {processes} processes" if teraflops else "times with --teraflops"
    return f"whole stages ({rate})", rows


def size(count: float) -> str:
    """Bytes for a reader: 261.7 GB."""
    return _scaled(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3})


def operations(count: float) -> str:
    """Floating-point operations for a reader: 529.8 GFLOP."""
    return _scaled(count, {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3})


def duration(seconds: float) -> str:
    """Seconds for a reader: 14.7 days."""
    return _scaled(seconds, {"years": 365.25 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1})


def _scaled(value: float, units: dict[str, float]) -> str:
    """In the largest unit of which there is more than one, else in the smallest."""
    unit = next((unit for unit, amount in units.items() if value > amount), list(units)[-1])
    return f"{value / units[unit]:,.1f} {unit}"


def data_facts(data: config.Data, *, classes: int | None, images: int | None) -> tuple[int, int, str]:
    """(classes, images, where they come from): as given, else of the embedded set or data/latents, else ImageNet's.

    data/latents are those of a user's own folder, and of this image size; others belong to other parameters.
    """
    stats = Path("data/latents", STATS)
    cached = records.read_json(stats) if stats.is_file() else None
    if data.source in EMBEDDED:
        found, origin = EMBEDDED[data.source], data.source
    elif cached and data.source != "imagenet" and cached["image_size"] == data.image_size:
        found, origin = (len(cached["classes"]), sum(cached["rows"].values())), str(stats)
    else:
        found, origin = IMAGENET, "ImageNet's; yours with --classes and --images"
    return classes or found[0], images or found[1], "as given" if classes and images else origin


def main() -> None:
    """Print the description, or one line that says what is wrong, and exit with 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ear.describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    parser.add_argument("--classes", type=int, help="default: those of data/latents, or 1000")
    parser.add_argument("--images", type=int, help="of the data set; default: those of data/latents, or ImageNet's")
    parser.add_argument("--teraflops", type=float, help="10^12 operations per second that a device sustains")
    arguments = parser.parse_args()
    try:
        parameters = config.load(arguments.params)
        for name in ("classes", "images", "teraflops"):
            if (value := getattr(arguments, name)) is not None and value <= 0:
                raise ValueError(f"--{name} is {value}; it must be above 0.")
        classes, images, origin = data_facts(parameters.data, classes=arguments.classes, images=arguments.images)
        costs = of_pipeline(parameters, classes=classes, images=images)
    except (ValueError, OSError) as error:
        print(f"describe: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{arguments.params}; classes and images: {origin}")
    print(report(costs, parameters, teraflops=arguments.teraflops))


if __name__ == "__main__":
    main()
