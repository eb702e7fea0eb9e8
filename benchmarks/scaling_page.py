"""The tables of docs/scaling.md, from the saved results of benchmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ear.commands.describe import IMAGENET, duration, operations, size
from ear.errors import UserError

NEEDED = ("scaling", "listing", "latents", "prepare")  # benchmarks
BILLION = 1_000_000_000
FRECHET_FEATURES = 2048
_SETS = ("bytes per image", "ImageNet", "10^9 images")


@dataclass(frozen=True)
class Work:
    """The repeated work of one stage."""

    stage: str
    unit: str
    seconds: float  # of one core, per unit
    flop: float | None  # per unit; None if a GPU does not do this work
    units: tuple[int, int]  # for ImageNet, for a billion images
    precision: str = "float32"  # on a GPU
    precise: float = 0.0  # of the operations, those in float32 in any case


def works(figures: dict, listing_seconds: float) -> list[Work]:
    """The stages, in the order in which they run."""
    seconds, flop, count, precision = (figures[key] for key in ("cpu_seconds", "flop", "images", "precision"))
    every = (IMAGENET[1], BILLION)
    trained, generated, tokenized = (count["train"], BILLION), (count["sample"],) * 2, (count["tokenizer"],) * 2
    drawn, features_of = seconds["draw"] + seconds["decode"], (seconds["features"], flop["features"])
    return [
        Work("fetch", "a file listed", listing_seconds, None, every),
        Work("prepare", "a photograph decoded, cropped, stored", seconds["prepare"], None, every),
        Work("reference", "Inception's features of an image", *features_of, every),
        Work(
            "tokenizer",
            "KL-16: a step on an image",
            seconds["tokenizer"],
            flop["tokenizer"],
            tokenized,
            precision["tokenizer"],
        ),
        Work("cache", "an image and its mirror image encoded", seconds["cache"], flop["cache"], every),
        Work(
            "train, finetune", "an image forward and back", seconds["train"], flop["train"], trained, precision["train"]
        ),
        Work(
            "sample",
            "an image drawn and decoded",
            drawn,
            flop["sample"],
            generated,
            precision["sample"],
            flop["decode"],
        ),
        Work("evaluate", "Inception's features of an image", *features_of, generated),
    ]


def tables(saved: Mapping[str, dict]) -> dict[str, str]:
    """The document's tables by name, from the saved results of the benchmarks in `NEEDED`."""
    machine, figures, listed = saved["scaling"]["machine"], saved["scaling"]["figures"], saved["listing"]["figures"]
    find, write_out = (listed["seconds"]["tree"][part]["cpu"] for part in ("find", "write_manifest"))
    stages = works(figures, (find + write_out) / listed["files"])
    stored, assumed = figures["bytes"], figures["assumed"]
    disk = {"data/raw/manifest.csv": listed["manifest_bytes_per_image"]}
    disk |= {name: stored[name] for name in ("data/prepared", "data/latents")}
    memory = {
        "fetch, prepare; with links, later stages per process: the listed images": stored["manifest row in memory"],
        "train, per process: the permutation of an epoch": 8,
        "train, per process: the labels": 8,
    }
    facts = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}; torch {machine['torch']}; "
    facts += f"medians of {figures['repeats']}."
    return {
        "costs": f"{facts}\n\n{_cost_table(stages, figures['cpu_seconds'])}",
        "times": _time_table(stages, gpus=assumed["gpus"], teraflops=assumed["teraflops"]),
        "disk": _table(("written", *_SETS), [(name, *_grown(each)) for name, each in disk.items()]),
        "memory": _table(("held", *_SETS), [(name, *_grown(each)) for name, each in memory.items()]),
        "growth": _growth_table(figures["growth"], saved["latents"]["figures"], saved["prepare"]["figures"]),
    }


def _grown(each: float) -> tuple[str, str, str]:
    return f"{each:,.0f}", size(each * IMAGENET[1]), size(each * BILLION)


def _cost_table(stages: list[Work], seconds: dict) -> str:
    rows = []
    for work in stages:
        counted = (operations(work.flop), f"{work.flop / work.seconds / 1e9:.0f}") if work.flop else ("", "")
        rows.append((work.stage, work.unit, f"{work.seconds:.3g}", *counted))
    rows += [
        ("train", "a permutation of 10^6 images, every epoch", f"{seconds['order of a million']:.2g}", "", ""),
        (
            "evaluate",
            f"a Frechet distance in {FRECHET_FEATURES} features",
            f"{seconds['Frechet distance']:.2g}",
            "",
            "",
        ),
    ]
    return _table(("stage", "unit of work", "CPU seconds", "operations", "GFLOP/s"), rows)


def _time_table(stages: list[Work], *, gpus: int, teraflops: Mapping[str, float]) -> str:
    rows = []
    for work in stages:
        cells = [work.stage, work.precision if work.flop else ""]
        for units in work.units:
            on_gpus = duration(units * _gpu_seconds(work, teraflops) / gpus) if work.flop else ""
            cells += [f"{units:,}", duration(units * work.seconds), on_gpus]
        rows.append(tuple(cells))
    fast = f"{gpus} GPUs"
    return _table(
        ("stage", "on GPUs", "ImageNet: units", "one core", fast, "10^9 images: units", "one core", fast), rows
    )


def _gpu_seconds(work: Work, teraflops: Mapping[str, float]) -> float:
    """Of one GPU, for one unit."""
    assert work.flop is not None
    return (work.flop - work.precise) / (teraflops[work.precision] * 1e12) + work.precise / (
        teraflops["float32"] * 1e12
    )


def _growth_table(sizes: dict, latents: dict, prepared: dict) -> str:
    """What is measured again with something doubled, against what it was before."""
    base, batch, tokens = (sizes[name] for name in ("digits", "batch doubled", "tokens four times"))
    *_, smaller, larger = latents["growth"]
    processes = [prepared[f"processes_{count}"]["files"]["images_per_second"] for count in (1, 2)]
    rows = f"rows of latents, {smaller['rows']:,} => {larger['rows']:,}"
    more = f"tokens of an image, {base['tokens']} => {tokens['tokens']}"
    lines = [
        (rows, "rows/s of the training's iterator", smaller["rows per second"], larger["rows per second"]),
        (rows, "seconds to open them", smaller["opening seconds"], larger["opening seconds"]),
        ("micro-batch, 64 => 128", "training, ms per image", 1e3 * base["training"], 1e3 * batch["training"]),
        (more, "training, ms per image", 1e3 * base["training"], 1e3 * tokens["training"]),
        (more, "sampling, ms per image", 1e3 * base["sampling"], 1e3 * tokens["sampling"]),
        ("processes of prepare, 1 => 2", "images/s", *processes),
    ]
    return _table(("grown", "measured", "before", "after", "factor"), [_change(*line) for line in lines])


def _change(grown: str, what: str, before: float, after: float) -> tuple[str, ...]:
    numbers = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (before, after))
    return grown, what, *numbers, f"{after / before:.2f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows))


def fill(document: str, tables: dict[str, str]) -> str:
    """Put each table between the marks `<!-- NAME -->` and `<!-- end -->` of the document.

    Raises UserError for a table without marks.
    """
    for name, table in tables.items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, after = document.partition(mark)
        _, closed, after = after.partition(end)
        if not (found and closed):
            raise UserError(f"the document has no lines <!-- {name} --> and <!-- end -->; add them where it belongs.")
        document = f"{before}{mark}{table}\n{end}{after}"
    return document
