"""The files of a trained pipeline, with tiny untrained networks."""

import json
import shutil
from pathlib import Path

from factories import tiny_model

from ear.commands import export
from ear.files.digests import sha256
from ear.latents.statistics import Statistics
from ear.model.files import save_model
from ear.tokenizer.autoencoder import Identity, save_tokenizer

CLASSES = tuple("0123456789")
ROOT = Path(__file__).parents[1]


def publish(data: Path, *, classes=CLASSES, **changes) -> Path:
    """The files that the stages tokenizer and finetune leave: images of 8 pixels, tokens of 2 x 2 pixels."""
    tokenizer = data / "tokenizer/tokenizer.safetensors"
    save_tokenizer(tokenizer, Identity(image_size=8, downsample=2))
    statistics = Statistics(0.1, 0.5, (0.1,) * 12, (0.5,) * 12)
    description = {"statistics": statistics.as_dict(), "tokenizer": sha256(tokenizer), **changes}
    save_model(data / "finetuned/model.safetensors", tiny_model(latent=(12, 4, 4), classes=classes), description)
    return data


def exported(name: str = "whole.safetensors") -> Path:
    """What `ear export` writes into the working directory, which gets trained networks and an evaluation."""
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    publish(Path("data"))
    Path("data/evaluation").mkdir()
    figures = {"fid": 0.25, "fid_equal": None, "class_accuracy": 0.975, "kid": 0.1}
    Path("data/evaluation/metrics.json").write_text(json.dumps(figures))
    sampling = {"steps": 8, "guidance": 2.2, "schedule": "linear", "temperature": 1.0}
    interval = {"guidance_from": 0.0, "guidance_to": 1.0, "model_sha256": sha256("data/finetuned/model.safetensors")}
    protocol = {"metric": "FID-1k", "extractor": {"name": "ear-classifier"}, "sampling": {**sampling, **interval}}
    Path("data/evaluation/protocol.json").write_text(json.dumps(protocol))
    export.run(Path(name))
    return Path(name).resolve()
