"""Follow a running training from another terminal (`ear watch`): curves, and samples of its newest checkpoint."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ear.display import curves
from ear.display.live import ABOUT, FOLDER, TRAINING, VALIDATION, read_rows
from ear.errors import UserError
from ear.files.atomic import whole_file
from ear.files.json_files import read_json
from ear.lineage.run import unfinished

PICTURES = Path("work/watch")
STAGES = ("tokenizer", "train", "finetune")
_IDLE = 300.0  # seconds without a new row, after which the text says so
_SEED = 2_000_000  # of the samples: not those that the sample stage draws
_HEIGHT, _WIDTH, _MARGIN = 15, 90, 20  # of the curve in the terminal, in characters


def run(stage: str | None, *, every: float, once: bool, samples: int, samples_every: float) -> Iterator[str]:
    """Yield texts to print until the training ends, one per update; write plots to work/watch.

    If no training has begun, the first text says so; the next one follows when one begins.

    stage: default, the one training now. once: yield one text and stop. samples: images to draw from each new
    checkpoint, at most every `samples_every` seconds; 0: none.
    Raises UserError if nothing trains and `once` is set.
    """
    shown, images = "", -1  # the stage that was shown last, and the images of its last row
    drawn, waiting = _Samples(samples, samples_every), False
    while True:
        current = stage or newest()
        if shown and current != shown and not rows_of(shown):
            yield f"{shown} has ended; its rows are in {FOLDER / 'finished' / shown}"
            shown, drawn.text = "", ""
            if not current:
                return
        rows = rows_of(current) if current else []
        if once and not rows:
            what = f"{current} is not training" if current else "no stage is training"
            raise UserError(f"{what}; start `dvc repro`, and try again.")
        if stage and shown and not rows:
            yield f"{stage} has ended; its rows are in {FOLDER / 'finished' / stage}"
            return
        if not rows and not shown and not waiting:
            waiting = True
            yield f"waiting for {stage or 'a training'} to begin"
        if current and rows and (drawn.renew(current) or (current, rows[-1]["images"]) != (shown, images)):
            with contextlib.suppress(OSError, UserError):  # it has ended at this moment: the next look says so
                yield "\n".join(filter(None, [text(current, rows), drawn.text]))
                draw(current, rows)
            shown, images = current, rows[-1]["images"]
        if once:
            return
        time.sleep(every)


class _Samples:
    """Images of the newest checkpoint of a training."""

    def __init__(self, count: int, every: float):
        self.count, self.every = count, every  # images; seconds between two checkpoints at least
        self.text = ""  # where they are, or why there are none
        self._checkpoint: Path | None = None
        self._due = 0.0  # on the monotonic clock

    def renew(self, stage: str) -> bool:
        """Draw images if there is a new checkpoint and it is time => whether it did."""
        checkpoint = newest_checkpoint(stage) if stage in ("train", "finetune") else None
        if not self.count or checkpoint in (None, self._checkpoint) or time.monotonic() < self._due:
            return False
        assert checkpoint is not None
        self._checkpoint, self._due = checkpoint, time.monotonic() + self.every
        self.text = sampled_or_why(checkpoint, self.count)
        return True


def rows_of(stage: str) -> list[dict[str, Any]]:
    """The rows of a stage's training that runs, or was stopped; [] if it has ended."""
    try:
        return read_rows(FOLDER / stage / TRAINING)
    except OSError:  # moved at this moment
        return []


def newest() -> str | None:
    """The stage with the newest row, or None."""
    running = {stage: _changed(FOLDER / stage / TRAINING) for stage in STAGES if rows_of(stage)}
    return max(running, key=running.__getitem__) if running else None


def newest_checkpoint(stage: str | None) -> Path | None:
    """Latest checkpoint of the stage's current training; None if there is none yet."""
    try:
        key = read_json(FOLDER / str(stage) / ABOUT)["key"]
    except (OSError, KeyError):  # not begun, or moved at this moment
        return None
    return max((unfinished(str(stage)) / key).glob("checkpoint-*.safetensors"), default=None)


def _changed(path: Path) -> float:
    """When a file changed last; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def sampled_or_why(checkpoint: Path, count: int) -> str:
    """What `draw_samples` says, or why it could not."""
    try:
        return draw_samples(checkpoint, count)
    except (OSError, UserError) as error:  # replaced by a newer one meanwhile, or too early to draw anything
        return f"no samples of {checkpoint.name}: {error}"


def text(stage: str, rows: list[dict[str, Any]]) -> str:
    """The newest row in words, and the curve of the loss."""
    about, row = read_json(FOLDER / stage / ABOUT), rows[-1]
    speed, left = row.get("images_per_second") or 0.0, about["total_images"] - row["images"]
    lines = [
        f"{stage}: {row['images']:,} of {about['total_images']:,} images, {speed:,.1f} img/s, "
        f"{_time(left, speed)} left, {about['parameters']:,} parameters on {about['device']}",
        ", ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None and name != "images"),
    ]
    idle = time.time() - _changed(FOLDER / stage / TRAINING)
    if idle > _IDLE:
        lines.append(
            f"no new row for {_duration(idle)}: unless its steps take that long, it was stopped; start it again"
        )
    if validation := read_rows(FOLDER / stage / VALIDATION):
        held_out = ", ".join(f"{name} {value:.4g}" for name, value in validation[-1].items() if name != "images")
        lines.append(f"held out, after {validation[-1]['images']:,} images: {held_out}")
    return "\n".join([*lines, plot(rows), f"pictures: {PICTURES}"])


def _time(images: int, speed: float) -> str:
    return _duration(images / speed) if speed > 0 else "?"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def plot(rows: list[dict[str, Any]]) -> str:
    """The loss over images, as characters as wide as the terminal."""
    from uniplot import plot_to_string

    images, losses = [row["images"] for row in rows], [row["loss"] for row in rows]
    width = min(shutil.get_terminal_size().columns - _MARGIN, _WIDTH)
    drawn = plot_to_string(losses, images, width=width, height=_HEIGHT, lines=True, title="loss over images")
    return drawn if isinstance(drawn, str) else "\n".join(drawn)


def draw(stage: str, rows: list[dict[str, Any]]) -> None:
    """Write work/watch/STAGE.png: all curves so far."""
    picture = curves.figure(rows, read_rows(FOLDER / stage / VALIDATION), title=f"{stage}, running")
    with whole_file(PICTURES / f"{stage}.png") as partial:
        picture.savefig(partial, format="png", dpi=100)


def draw_samples(checkpoint: Path, count: int) -> str:
    """Draw images from a checkpoint with the sampling of params.yaml, write work/watch/samples.png => a line to print.

    If data/reference exists, the line has a quick FID. It uses few images: compare it only within this training.
    """
    from ear import config
    from ear.data.pictures import grid, save_png
    from ear.sampling.generation import TOKENIZER, ImageSampler, balanced_labels
    from ear.sampling.settings import SamplingSettings

    options = config.load().sample
    sampler = ImageSampler.open(checkpoint, Path("data") / TOKENIZER)
    labels = balanced_labels(count, len(sampler.model.shape.classes))
    on_cpu = {"seed": _SEED, "precision": "float32", "decoder_precision": "float32"}
    settings = SamplingSettings.of(options.model_copy(update=on_cpu))
    images = sampler.images(labels, settings, first=0)
    save_png(PICTURES / "samples.png", grid(images[:100], min(len(sampler.model.shape.classes), 10)))
    line = f"{PICTURES / 'samples.png'}: {count} images of {checkpoint.name}"
    figures = quick_figures(images, labels)
    return line + "".join(f", {name} {value:.4g}" for name, value in figures.items())


def quick_figures(images: Any, labels: list[int]) -> Mapping[str, float]:
    """FID of some images against the training images, and class accuracy by a classifier; {} without a reference."""
    import torch

    from ear.evaluation.extractors import CLASSIFIER, open_extractor
    from ear.evaluation.metrics import frechet_distance
    from ear.evaluation.reference import Reference
    from ear.evaluation.statistics import Moments, class_accuracy

    reference, extractor = (Path("data/reference") / name for name in ("features.safetensors", "extractor.safetensors"))
    if len(images) < 2 or not reference.is_file() or not extractor.is_file():
        return {}
    opened, moments = open_extractor(extractor, torch.device("cpu")), Moments()
    features, logits = opened(images)
    moments.add(features)
    figures = {f"FID-{len(images)}": frechet_distance(moments.gaussian(), Reference.load(reference).gaussian)}
    if opened.name == CLASSIFIER:
        figures["class accuracy"] = class_accuracy(logits, torch.tensor(labels))
    return figures


def show(texts: Iterator[str]) -> None:
    """Print texts; on a terminal, each replaces the one before."""
    for shown in texts:
        if sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(shown, flush=True)
