"""The parts of a report, each read from the files of one or two stages. They raise UserError if these are missing."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ear.data import pictures
from ear.data.prepared import PreparedImages
from ear.display import curves as diagrams
from ear.display.live import FOLDER, TRAINING, VALIDATION, read_rows
from ear.errors import MissingFileError
from ear.files.json_files import read_json
from ear.lineage.declaration import declarations
from ear.lineage.record import Record
from ear.sampling.samples import GeneratedImages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = Path("data")
_CLASSES = 10  # at most, in pictures
_PER_CLASS = 8  # images of a class, real and generated
_NEAREST = 10  # generated images whose nearest training images are shown
_SEARCHED = 20_000  # training images, at most, that are searched
_COMPARED = 200  # images, at most, whose distances are compared
_BYTES = 200e6  # of images, at most, that are in memory at once
_LATENTS = 2_000  # images behind the histograms


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Part:
    """What a section shows; pictures are PNGs or figures, with captions."""

    text: str = ""
    tables: tuple[Table, ...] = ()
    pictures: "tuple[tuple[str, bytes | Figure], ...]" = ()


def metrics() -> Part:
    """Metrics beside what they depend on."""
    figures, how = read_json(DATA / "evaluation/metrics.json"), read_json(DATA / "evaluation/protocol.json")
    cost = figures["reconstruction"]
    rows = [
        (how["metric"], figures["fid"], "Frechet distance to the reference; lower is better"),
        (
            f"FID at {figures['fid_equal_images']} images",
            figures.get("fid_equal"),
            "with as many generated images as there are held-out real ones",
        ),
        (
            "floor",
            figures["fid_floor"],
            "the same distance of the held-out real images: what a perfect model would be expected to reach",
        ),
        ("FID / floor", figures["fid_ratio"], "at equal numbers of images"),
        ("rFID", cost["rfid"], "of reconstructions by the tokenizer alone, against the held-out images themselves"),
        ("class accuracy", figures.get("class_accuracy"), "share of generated images classified as their own class"),
        ("Inception score", figures["inception_score"], "higher is better"),
        ("KID", figures["kid"], "unbiased, so slightly negative values are possible"),
        ("precision", figures["precision"], "generated images within the manifold of real ones"),
        ("recall", figures["recall"], "real images within the manifold of generated ones"),
        (
            "nearest / held-out",
            figures["nearest_ratio"],
            "distance to the nearest training image, relative to that of held-out images; far below 1: copies",
        ),
    ]
    table = Table(("metric", "value", "meaning"), tuple((name, _number(v), why) for name, v, why in rows))
    depends = Table(("depends on", "value"), tuple(_flat(how)))
    verdict = (
        "Comparable with published figures."
        if how["comparable_with_published"]
        else f"Do not compare with published figures: {'; '.join(how['why'])}."
    )
    return Part(verdict, (table, depends))


def real_and_generated() -> Part:
    """Training images beside generated ones, class by class."""
    made, real = GeneratedImages(DATA / "samples/samples.h5"), PreparedImages(DATA / "prepared", "train")
    shown = []
    for label, name in enumerate(real.classes[:_CLASSES]):
        rows = []
        for images in (real, made):
            chosen = np.flatnonzero(np.asarray(images.labels) == label)[:_PER_CLASS]
            none = np.empty((0, *images.images(range(1)).shape[1:]), np.uint8)
            rows.append(np.concatenate([none, *(images.images(range(k, k + 1)) for k in chosen.tolist())]))
        if not max(map(len, rows)):
            continue
        short = max(len(part) for part in rows)
        padded = [np.concatenate([p, np.full((short - len(p), *p.shape[1:]), 255, np.uint8)]) for p in rows]
        shown.append((f"{name}: real, then generated", _png(pictures.grid(np.concatenate(padded), short))))
    more = len(real.classes) - len(shown)
    return Part(f"{more} further classes are not shown." if more > 0 else "", pictures=tuple(shown))


def nearest() -> Part:
    """Generated images with the nearest training images, in pixels; their distances beside those of held-out images."""
    made, real = GeneratedImages(DATA / "samples/samples.h5"), PreparedImages(DATA / "prepared", "train")
    held_out = PreparedImages(DATA / "prepared", "val")
    count = min(len(real), _SEARCHED)
    few, apart = (source.images(range(min(len(source), _COMPARED))) for source in (made, held_out))
    distances, places = _nearest(np.concatenate([few, apart]), real, count)
    distances, others = np.split(distances, [len(few)])
    shown = np.linspace(0, len(few) - 1, min(_NEAREST, len(few))).astype(int)
    rows = np.concatenate([few[shown], real.images(places[shown])])
    quantiles = (0.01, 0.1, 0.5)
    table = Table(
        ("distance to the nearest training image, per pixel", *(f"{q:.0%} quantile" for q in quantiles)),
        (
            ("generated images", *(_number(float(np.quantile(distances, q))) for q in quantiles)),
            ("held-out real images", *(_number(float(np.quantile(others, q))) for q in quantiles)),
        ),
    )
    text = f"Searched {count:,} training images. Generated images much nearer to them than held-out ones may be copies."
    return Part(
        text, (table,), (("generated above, nearest training image below", _png(pictures.grid(rows, len(shown)))),)
    )


def _nearest(images: np.ndarray, source: PreparedImages, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(root mean square distance to the nearest of the first `count` of `source`, its number), both [N].

    Pixels are in [0, 1]; the source is read part by part.
    """
    a = images.reshape(len(images), -1).astype(np.float32) / 255
    best, places = np.full(len(a), np.inf, np.float32), np.zeros(len(a), np.int64)
    part = max(1, int(_BYTES / (4 * a.shape[1])))
    for start in range(0, count, part):
        b = source.images(np.arange(start, min(start + part, count))).reshape(-1, a.shape[1]).astype(np.float32) / 255
        squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
        nearer = squared.min(1) < best
        places[nearer] = start + squared.argmin(1)[nearer]
        best = np.minimum(best, squared.min(1))
    return np.sqrt(np.maximum(best, 0) / a.shape[1]), places


def reconstructions() -> Part:
    """Held-out images and what the tokenizer makes of them."""
    path = DATA / "tokenizer/reconstructions.png"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the tokenizer stage (`dvc repro tokenizer`).")
    figures = read_json(DATA / "tokenizer/metrics.json")
    text = f"PSNR {figures['psnr']:.2f} dB from the posterior mean, {figures['psnr_sampled']:.2f} dB from a sample."
    return Part(text, pictures=(("originals above, reconstructions below", path.read_bytes()),))


def curves() -> Part:
    """Training curves of each stage: those of its results or, without results, of its running or stopped training.

    The rows of the last training that finished here have more columns than the results. They are drawn instead if both
    have the same losses, so belong to the same training.
    """
    drawn = []
    for stage, folder in (("tokenizer", "tokenizer"), ("train", "model"), ("finetune", "finetuned")):
        live, finished, result = FOLDER / stage, FOLDER / "finished" / stage, DATA / folder
        same = _losses(finished) == _losses(result)
        found = finished if same and _losses(result) else result if _losses(result) else live
        rows, held_out = read_rows(found / TRAINING), read_rows(found / VALIDATION)
        if rows:
            note = " (running or stopped)" if found == live else ""
            drawn.append((f"{stage}{note}", diagrams.figure(rows, held_out, title=stage)))
    if not drawn:
        raise MissingFileError("no training has written a log yet; run the tokenizer or the train stage.")
    return Part(pictures=tuple(drawn))


def _losses(folder: Path) -> list[float | None]:
    return [row.get("loss") for row in read_rows(folder / TRAINING)]


def latents() -> Part:
    """Histograms of normalised latents by channel, against the normal distribution."""
    if not (DATA / "latents").is_dir():  # before torch is imported, which takes seconds
        raise MissingFileError(f"{DATA / 'latents'} does not exist; run the cache stage.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ear.latents.statistics import normalised
    from ear.latents.store import LatentStore
    from ear.runtime import randomness

    store = LatentStore(DATA / "latents", "train")
    rows = np.arange(min(len(store), _LATENTS))
    import torch

    moments, _ = store.rows(torch.from_numpy(rows))
    noise = randomness.normal((len(rows), *store.shape), randomness.stream(0, "report"))
    values = normalised(moments, noise, store.statistics).numpy()
    picture = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    for channel in range(min(values.shape[1], 16)):
        axes.hist(
            values[:, channel].ravel(), bins=100, range=(-5, 5), histtype="step", density=True, label=f"{channel}"
        )
    x = np.linspace(-5, 5, 200)
    axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "k--", label="normal")
    axes.legend(fontsize=7, ncols=2)
    shape = " x ".join(map(str, store.shape))
    text = f"{len(store):,} training images, latents of {shape}; one draw from each of {len(rows):,} posteriors."
    if store.statistics.collapsed:
        text += f" Noise alone, and so replaced by its mean: channel {', '.join(map(str, store.statistics.collapsed))}."
    return Part(text, pictures=(("normalised latents", picture),))


def data() -> Part:
    """How many images there are, and of which classes."""
    splits = {split: PreparedImages(DATA / "prepared", split) for split in ("train", "val")}
    classes = splits["train"].classes
    with (DATA / "prepared/rejected.csv").open(newline="", errors="surrogateescape") as file:
        rejected = sum(1 for _ in csv.reader(file)) - 1  # names may hold line breaks
    rows = [
        (name, *(str(int((images.labels == label).sum())) for images in splits.values()))
        for label, name in enumerate(classes[:_CLASSES])
    ]
    if len(classes) > _CLASSES:
        rows.append((f"{len(classes) - _CLASSES} more classes", "", ""))
    rows.append(("all", *(f"{len(images):,}" for images in splits.values())))
    size = splits["train"].image_size
    text = f"Images of {size} x {size} pixels in {len(classes)} classes; unreadable and left out: {rejected}."
    return Part(text, (Table(("class", "train", "held out"), tuple(rows)),))


def stages() -> Part:
    """What every stage's outputs were made from, and how long it took when it last ran here."""
    rows: list[tuple[str, ...]] = []
    libraries: dict[str, str] = {}
    for name, entry in declarations().items():
        if not entry.record.is_file():
            rows.append((name, "has not run", "", ""))
            continue
        record = Record.read(entry.record)
        libraries |= record.libraries
        seconds = seconds_of(name)
        code = str(hash_of(record.code))
        changed = "yes" if record.earlier_code else ""
        rows.append((name, f"{seconds:,.1f} s" if seconds is not None else "never", code, changed))
    table = Table(("stage", "last run here", "code", "begun under other code or libraries"), tuple(rows))
    return Part(tables=(table, Table(("library", "version"), tuple(sorted(libraries.items())))))


def seconds_of(stage: str) -> float | None:
    """How long a stage took when it last ran in this folder; None if it never has."""
    path = Path("work/times") / f"{stage}.json"
    return read_json(path)["seconds"] if path.is_file() else None


def hash_of(digests: Mapping[str, str]) -> str:
    """One short digest of several."""
    import hashlib

    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:12]


def parameters() -> Part:
    """params.yaml as it is now."""
    from ear import config

    return Part(tables=(Table(("key", "value"), tuple(_flat(config.load().model_dump(mode="json")))),))


def _flat(values: Mapping[str, Any], prefix: str = ""):
    """Rows (dotted name, value) of nested values; digests are shortened."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value[:12] if name.endswith("sha256") and value else _number(value)
            yield f"{prefix}{name}", text


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
