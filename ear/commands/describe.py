"""What a parameter file will cost, before any data exists: `ear describe`.

Parameters, memory of a training process, compute per image, disk. Times are compute divided by --teraflops, which
should be what a device sustains, not its peak.
"""

from pathlib import Path

from ear import config
from ear.commands.costs import Costs, pipeline_costs
from ear.data import sources
from ear.data.sources import imagenet
from ear.errors import UserError
from ear.files.json_files import read_json
from ear.latents.store import STATS

EMBEDDED = {"digits": (10, 1797)}  # classes and images of the built-in sources
IMAGENET = (imagenet.CLASSES, imagenet.TRAIN_IMAGES + imagenet.VAL_IMAGES)

Section = tuple[str, dict[str, str]]  # title, and values by name


def report(costs: Costs, parameters: config.Parameters, *, teraflops: float | None = None) -> str:
    """The costs as text; given the teraFLOP/s that one device sustains, also the times of the long stages."""
    model, score = costs.shape.model, costs.shape.score.name
    lines = [
        f"{parameters.data.image_size} pixels a side -> {costs.shape.tokens} tokens of {costs.shape.token_channels} "
        f"channels, {len(costs.shape.classes)} classes, {costs.images:,} images",
        f"{score} score; {model.attention} transformer, {model.depth} blocks of {model.width} channels; "
        f"head, {model.head_depth} blocks of {model.head_width} channels",
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
    """Memory of the tokenizer's training; empty if it is not trained."""
    if not costs.tokenizer_memory:
        return []
    rows = {name: size(count) for name, count in costs.tokenizer_memory.items()}
    rows["all"] = size(sum(costs.tokenizer_memory.values()))
    images = parameters.tokenizer.micro_batch_size
    title = f"memory of the tokenizer's training (counted in float32, {images} images at once)"
    return [(title, rows)]


def _memory(costs: Costs, parameters: config.Parameters) -> Section:
    """Memory of one training process."""
    train = parameters.train
    rows = {name: size(count) for name, count in costs.memory.items()}
    total = sum(costs.memory.values())
    rows["all"] = size(total)
    rows["all, with checkpointing"] = size(total - costs.memory["activations"] + costs.checkpointed_activations)
    return f"memory of a training process ({train.precision}, {train.micro_batch_size} images at once)", rows


def _stages(costs: Costs, parameters: config.Parameters, teraflops: float | None) -> Section:
    """Compute and time of the long stages."""
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
            rows[name] += f", {duration(images * each / (teraflops * 1e12 * processes))}"
    rate = f"{teraflops:g} TFLOP/s, {processes} processes" if teraflops else "times with --teraflops"
    return f"stages ({rate})", rows


def size(count: float) -> str:
    """Format bytes: 261.7 GB."""
    return _scaled(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3})


def operations(count: float) -> str:
    """Format floating-point operations: 529.8 GFLOP."""
    return _scaled(count, {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3})


def duration(seconds: float) -> str:
    """Format seconds: 14.7 days."""
    return _scaled(seconds, {"years": 365.25 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1})


def _scaled(value: float, units: dict[str, float]) -> str:
    """Format in the largest unit of which there is more than one, or else in the smallest."""
    unit = next((unit for unit, amount in units.items() if value > amount), list(units)[-1])
    return f"{value / units[unit]:,.1f} {unit}"


def data_facts(data: config.Data, *, classes: int | None, images: int | None) -> tuple[int, int, str]:
    """(classes, images, their origin): as given, or those of the built-in set, arrays, data/latents or ImageNet.

    data/latents are used only for a user's own images of the same size; otherwise they belong to other parameters.
    """
    stats = Path("data/latents", STATS)
    cached = read_json(stats) if stats.is_file() else None
    if data.source in EMBEDDED:
        known, origin = EMBEDDED[data.source], str(data.source)
    elif data.source in ("idx", "npz") and Path(data.path).exists():
        found = sources.find(data.path, val_fraction=data.val_fraction)
        known, origin = (len(found.classes), len(found.images)), data.path
    elif cached and data.source != "imagenet" and cached["image_size"] == data.image_size:
        known, origin = (len(cached["classes"]), sum(cached["rows"].values())), str(stats)
    else:
        known, origin = IMAGENET, "ImageNet's (give yours with --classes and --images)"
    given = [name for name, value in (("classes", classes), ("images", images)) if value]
    if given:
        origin = "as given" if len(given) == 2 else f"{given[0]} as given, otherwise {origin}"
    return classes or known[0], images or known[1], origin


def run(params: Path, *, classes: int | None, images: int | None, teraflops: float | None) -> str:
    """The description as text; raises UserError for wrong parameters or options."""
    parameters = config.load(params)
    for name, value in {"classes": classes, "images": images, "teraflops": teraflops}.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} is {value}, but must be above 0.")
    counted_classes, counted_images, origin = data_facts(parameters.data, classes=classes, images=images)
    costs = pipeline_costs(parameters, classes=counted_classes, images=counted_images)
    return f"{params}; classes and images: {origin}\n" + report(costs, parameters, teraflops=teraflops)
