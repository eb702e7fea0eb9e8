"""Cost of each stage per image at ImageNet's size, extrapolated to ImageNet and to a billion images.

    python -m benchmarks.scaling [--save] [--write docs/scaling.md]

Runs each stage's work once at a small scale, with the sizes of preset imagenet256_base in float32 and untrained
weights. Times are CPU seconds of one core (one thread), medians of --repeats runs; other work on the machine hardly
affects them. --write fills the document's tables from benchmarks/results/: from the results of --save, and from earlier
ones of the benchmarks listing, latents and prepare. With --saved, nothing is measured.
"""

import dataclasses
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks import measure, scaling_page
from benchmarks.models import Training, untrained
from benchmarks.prepare import pictures, store, write
from benchmarks.scaling_page import FRECHET_FEATURES
from ear.commands import costs
from ear.commands.describe import IMAGENET
from ear.config import Parameters
from ear.config.compose import compose
from ear.data import preparation
from ear.data.images import Encoding
from ear.data.manifest import ListedImage, read_manifest, write_manifest
from ear.data.preparation import Layout
from ear.evaluation import metrics
from ear.evaluation.extractors import INCEPTION, Extractor
from ear.evaluation.statistics import Moments
from ear.files.json_files import read_json
from ear.latents.caching import Encoder
from ear.model.autoregressive import AutoregressiveModel
from ear.runtime import randomness
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.tokenizer.autoencoder import KL, kl_structure, new_kl
from ear.tokenizer.loss import AutoencoderLoss

PRESET = "imagenet256_base"
GPUS = 8  # of the assumed machine
# What each of them is assumed to sustain, in 10^12 operations per second: two fifths of an H100's data sheet (989 in
# bfloat16, 67 in float32).
TERAFLOPS = {"bfloat16": 400, "float32": 27}
_CPU = torch.device("cpu")
_PICTURES = 64  # decoded and stored in one run
_STEPS = 2  # sampling steps per run; every step is one transformer pass
_INCEPTION_IMAGES = 8
_ORDERED = 10_000_000  # rows for which the order of an epoch is drawn
_LISTED = 20_000  # images of a manifest that is read
_DRAWN = 64  # images drawn at once by the small model


class Timer:
    """Median CPU seconds of this process over repeated calls; the first call is not counted."""

    def __init__(self, repeats: int):
        self.repeats = repeats

    def __call__(self, work: Callable[[], object]) -> float:
        """CPU seconds of one call of `work`."""
        work()
        seconds = []
        for _ in range(self.repeats):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        return statistics.median(seconds)


def prepare_seconds(timer: Timer) -> float:
    """Decode, crop and store one photograph of ImageNet's usual size."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder), pictures(_PICTURES))["files"]
        (shard,) = preparation.plan(manifest, "train", Layout(256, _PICTURES, "none"))
        return timer(lambda: store(shard)) / _PICTURES


def tokenizer_seconds(timer: Timer, tokenizer: KL) -> dict[str, float]:
    """KL-16 on one image: encode it and its mirror image, decode, and a training step without optimiser."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    encoder = Encoder(tokenizer.eval(), "", 1, _CPU)
    latents = torch.randn(1, tokenizer.latent_channels, 16, 16, generator=randomness.generator(0))
    loss = AutoencoderLoss(kl_weight=1e-6)
    images = torch.rand(1, 3, 256, 256, generator=randomness.generator(1)) * 2 - 1

    def decode() -> None:
        with torch.inference_mode():
            tokenizer.decode(latents)

    return {
        "cache": timer(lambda: encoder.moments(pixels)),
        "decode": timer(decode),
        "tokenizer": timer(lambda: loss(tokenizer.train(), images, latents).loss.backward()),
    }


def model_seconds(timer: Timer, model: AutoregressiveModel, parameters: Parameters) -> dict[str, float]:
    """One image: forward and backward pass of training; sampling with guidance, without the decoder."""
    latents = torch.randn(1, *model.shape.latent, generator=randomness.generator(0))
    labels, options = torch.zeros(1, dtype=torch.long), parameters.sample
    few = dataclasses.replace(SamplingSettings.of(options), steps=1, precision="float32")
    more = dataclasses.replace(few, steps=1 + _STEPS)

    def train() -> None:
        model.train().loss(latents, labels, temperature=1.0, source=randomness.stream(0, "loss")).value.backward()

    def draw(settings: SamplingSettings) -> None:
        sample(model.eval(), labels.tolist(), settings, source=randomness.stream(0))

    # The head runs once per token, the transformer once per step.
    first = timer(lambda: draw(few))
    step = (timer(lambda: draw(more)) - first) / _STEPS
    return {"train": timer(train), "draw": first + (options.steps - 1) * step}


def untrained_inception() -> FeatureExtractorInceptionV3:
    """The Inception extractor with torch's initial weights."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    with tempfile.NamedTemporaryFile(suffix=".pth") as empty:
        torch.save({}, empty.name)
        layers = ["2048", "logits_unbiased"]
        return Untrained(INCEPTION, layers, feature_extractor_weights_path=empty.name)


def evaluation_figures(timer: Timer) -> dict:
    """Inception's features of one image, and the Frechet distance between two sets."""
    pixels = np.random.default_rng(0).integers(0, 256, (_INCEPTION_IMAGES, 256, 256, 3), dtype=np.uint8)
    module = untrained_inception()
    extractor = Extractor(module, INCEPTION, "", tuple(module.features_list), _CPU)
    seconds = timer(lambda: extractor(pixels)) / _INCEPTION_IMAGES
    first, second = (Moments() for _ in range(2))
    for number, moments in enumerate((first, second)):
        moments.add(torch.randn(2 * FRECHET_FEATURES, FRECHET_FEATURES, generator=randomness.generator(number)))
    distance = timer(lambda: metrics.frechet_distance(first.gaussian(), second.gaussian()))
    with FlopCounterMode(display=False) as counter:
        extractor(pixels[:1])
    return {"cpu_seconds": {"features": seconds, "Frechet distance": distance}, "flop": counter.get_total_flops()}


def order_seconds(timer: Timer) -> float:
    """Seconds to draw the order of one epoch, per million rows."""
    return timer(lambda: randomness.DataOrder(_ORDERED, 0).indices(0, 1)) / (_ORDERED / 1e6)


def manifest_row_bytes() -> float:
    """Memory per listed image in a stage that has read the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"train/n{k % 1000:08d}/n{k % 1000:08d}_{k}.JPEG" for k in range(_LISTED)]
        found = [ListedImage("train", path.split("/")[1], path, path, bytes=110_000) for path in paths]
        write_manifest(folder, found, tree="", root="", names={}, encoding=Encoding(upright=False))
        tracemalloc.start()
        manifest = read_manifest(folder)
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return used / len(manifest.rows)


def growth() -> dict[str, dict[str, float]]:
    """Wall seconds per image to train and sample the digits model: as is, with a larger batch, with more tokens."""
    return {
        "digits": _sizes([], side=4),
        "batch doubled": _sizes(["train.micro_batch_size=128", "train.global_batch_size=128"], side=4),
        "tokens four times": _sizes([], side=8),
    }


def _sizes(changes: list[str], *, side: int) -> dict[str, float]:
    """Seconds per image of the digits model with some parameters changed, on a latent grid of that side."""
    parameters = compose(["preset=digits", *changes])
    model = untrained(parameters, side=side)
    training, settings = Training(model, parameters, _CPU), SamplingSettings.of(parameters.sample)
    labels = [number % 10 for number in range(_DRAWN)]

    def draw() -> None:
        sample(model, labels, settings, source=randomness.image_streams(0, range(_DRAWN)))

    step = measure.median_seconds(training.step, repeats=9) / parameters.train.global_batch_size
    model.eval()
    return {"tokens": model.tokens, "training": step, "sampling": measure.median_seconds(draw) / _DRAWN}


def measured(timer: Timer, parameters: Parameters) -> dict:
    """CPU seconds, operations and bytes per unit of work (an image unless stated otherwise)."""
    kl16 = kl_structure(channels=16, block_channels=parameters.tokenizer.block_channels, layers=2)
    tokenizer = new_kl(seed=0, image_size=256, structure=kl16)
    encode, decode = costs.tokenizer_flops(tokenizer)
    counted = costs.pipeline_costs(parameters, classes=IMAGENET[0], images=IMAGENET[1])
    evaluation = evaluation_figures(timer)
    return {
        "cpu_seconds": {
            "prepare": prepare_seconds(timer),
            **tokenizer_seconds(timer, tokenizer),
            **model_seconds(timer, untrained(parameters), parameters),
            **evaluation["cpu_seconds"],
            "order of a million": order_seconds(timer),
        },
        "flop": {
            "tokenizer": 3 * (encode + decode),
            "cache": 2 * encode,
            "train": counted.training_flops["forward and backward"],
            "sample": sum(counted.sampling_flops.values()),
            "decode": counted.sampling_flops["decoder"],
            "features": evaluation["flop"],
        },
        "bytes": {
            "manifest row in memory": manifest_row_bytes(),
            **{name: counted.disk[name] / counted.images for name in ("data/prepared", "data/latents")},
        },
        "images": {
            "tokenizer": parameters.tokenizer.images,
            "train": parameters.train.images + parameters.finetune.images,
            "sample": parameters.sample.count,
        },
        "repeats": timer.repeats,
        "precision": {
            "tokenizer": parameters.tokenizer.precision,
            "train": parameters.train.precision,
            "sample": parameters.sample.precision,
        },
        "growth": growth(),
        "assumed": {"gpus": GPUS, "teraflops": TERAFLOPS},
    }


def main() -> None:
    """Measure, unless saved results are used, and fill the document."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="fill the tables of this document")
    parser.add_argument("--saved", action="store_true", help="do not measure; take what --save has kept")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the median is reported (default: 3)")
    arguments = parser.parse_args()
    if arguments.write and not (arguments.saved or arguments.save):
        parser.error("--write fills the document from saved results; give --save, too, or --saved")
    if not arguments.saved:
        torch.set_num_threads(1)
        parameters = compose([f"preset={PRESET}", "data.path=/images", "tokenizer.weights=/kl16.ckpt"])  # not read
        measure.report("scaling", measured(Timer(arguments.repeats), parameters), arguments)
    if arguments.write:
        saved = {name: read_json(measure.RESULTS / f"{name}.json") for name in scaling_page.NEEDED}
        arguments.write.write_text(scaling_page.fill(arguments.write.read_text(), scaling_page.tables(saved)))


if __name__ == "__main__":
    main()
