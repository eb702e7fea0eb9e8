"""Write what others need (`ear export`): the whole pipeline in one file, or a model file from a checkpoint."""

from pathlib import Path
from typing import Any

from ear import config
from ear.errors import MissingFileError
from ear.files.digests import sha256
from ear.files.json_files import read_json
from ear.model.files import load_model, save_model

DATA = Path("data")
# Keys of data/evaluation/metrics.json for the model card.
_METRICS = ("fid", "fid_equal", "fid_floor", "class_accuracy", "inception_score", "precision", "recall")


def run(output: Path, *, checkpoint: Path | None = None, weights: str | None = None) -> str:
    """Write `output` => a line to print.

    checkpoint: write only a model file, with one set of its weights. Raises UserError, OSError.
    """
    if checkpoint is None:
        return whole(output)
    model, description = load_model(checkpoint, weights)
    latents = {key: description[key] for key in ("statistics", "tokenizer")}
    save_model(output, model, latents)
    return f"wrote {output}: {sum(p.numel() for p in model.parameters()):,} parameters"


def whole(output: Path) -> str:
    """Write model, tokenizer, statistics, classes, sampling and metrics as one file."""
    from ear.sampling.generation import MODEL, TOKENIZER, ImageSampler
    from ear.sampling.portable import Pipeline

    sampler = ImageSampler.open(DATA / MODEL, DATA / TOKENIZER)
    figures, sampling = evaluation(DATA / MODEL)
    pipeline = Pipeline(sampler, tokenizer_sha256=sha256(DATA / TOKENIZER), sampling=sampling, metrics=figures)
    pipeline.save(output)
    note = "" if figures else ", without metrics: the evaluation of this model has not run"
    return f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB{note}); `ear.load_pipeline({str(output)!r})` loads it"


def evaluation(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics of the model, the sampling settings behind them); ({}, sampling of params.yaml) if it has no evaluation.

    FID is named after its number of images, such as FID-50k.
    """
    try:
        figures, how = read_json(DATA / "evaluation/metrics.json"), read_json(DATA / "evaluation/protocol.json")
    except MissingFileError:
        return {}, config.load().sample.model_dump()
    if how["sampling"]["model_sha256"] != sha256(model):
        return {}, config.load().sample.model_dump()
    found = {name: figures[name] for name in _METRICS if figures.get(name) is not None}
    return {how["metric"]: found.pop("fid"), **found, "extractor": how["extractor"]["name"]}, how["sampling"]
