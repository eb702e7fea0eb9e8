"""All of params.yaml as one object: read, checked, or refused in one sentence."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from ear.config import checks
from ear.config.problems import first_problem
from ear.config.scores import Score
from ear.config.sections import (
    Cache,
    Compute,
    Data,
    Evaluate,
    Finetune,
    Model,
    Prepare,
    Reference,
    Runtime,
    Sample,
    Section,
    Tokenizer,
    Train,
)
from ear.errors import MissingFileError, UserError
from ear.files.reading import reading

PARAMETERS = Path("params.yaml")  # of a repository


class Parameters(Section):
    """All sections. Construction fails if two values contradict each other."""

    data: Data
    prepare: Prepare
    compute: Compute
    tokenizer: Tokenizer
    cache: Cache
    model: Model
    score: Score
    train: Train
    finetune: Finetune
    sample: Sample
    reference: Reference
    evaluate: Evaluate
    runtime: Runtime

    @model_validator(mode="after")
    def _check_agreement(self) -> "Parameters":
        checks.check_tokenizer(self.data, self.tokenizer)
        checks.check_model(self.data, self.tokenizer, self.model)
        checks.check_train(self.train, self.runtime)
        self.score.check()
        checks.check_data(self.data)
        checks.check_guidance(self.model, self.sample)
        checks.check_interval(self.sample)
        checks.check_evaluation(self.sample, self.reference, self.evaluate)
        return self


def parse(content: object, *, origin: str = "parameters") -> Parameters:
    """Nested plain values => Parameters.

    Raises UserError, which starts with `origin`: a key is unknown, missing, of the wrong type, out of range or
    contradicts another.
    """
    try:
        return Parameters.model_validate(content)
    except ValidationError as error:
        raise UserError(" ".join(f"{origin}: {first_problem(error, Parameters)}".split())) from error


def load(path: str | Path = PARAMETERS) -> Parameters:
    """Read and check a parameter file.

    Raises as `read` and `parse` do.
    """
    return parse(read(path), origin=str(path))


def value_of(parameters: Parameters, key: str) -> Any:
    """The value of a section or of "section.key"."""
    section, _, name = key.partition(".")
    found = getattr(parameters, section)
    return getattr(found, name) if name else found


def read(path: str | Path) -> Any:
    """The content of a parameter file, unchecked; raises MissingFileError if there is none, UserError if no YAML."""
    # OmegaConf reads numbers as DVC does; PyYAML would read 1e-4 as a string.
    from omegaconf import OmegaConf

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; write it with `ear configure preset=digits`.")
    with reading(path, "YAML file", "correct it, or write it with `ear configure preset=digits --force`"):
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


@dataclass(frozen=True)
class _Named:
    """A file or folder that a parameter names."""

    stage: str  # that reads it
    path: str
    used: bool  # with the other parameters as they are
    otherwise: str  # what to do without it


# Files read from folders that may hold others (by ear.tokenizer.importing and ear.tokenizer.perceptual).
_READ = {
    "tokenizer.weights": ("config.json", "diffusion_pytorch_model.safetensors"),
    "tokenizer.perceptual_folder": ("vgg16-397923af.pth", "weights-vgg16-lpips.pth"),
}


def _named(parameters: Parameters) -> dict[str, _Named]:
    tokenizer, reference = parameters.tokenizer, parameters.reference
    imported = tokenizer.name in ("published", "diffusers")
    perceptual = tokenizer.name == "kl" and tokenizer.perceptual_weight > 0
    inception = reference.extractor == "inception"
    pictures = parameters.data.source != "digits"
    folder = tokenizer.perceptual_folder
    return {
        "data.path": _Named("fetch", parameters.data.path, pictures, "name the folder or file of your images"),
        "tokenizer.weights": _Named(
            "tokenizer", tokenizer.weights, imported, "set tokenizer.name to kl to train an autoencoder"
        ),
        "tokenizer.perceptual_folder": _Named("tokenizer", folder, perceptual, "set it to '' to download its files"),
        "train.weights": _Named("train", parameters.train.weights, True, "set it to '' to train from new weights"),
        "reference.weights": _Named("reference", reference.weights, inception, "set it to '' to download the file"),
        "reference.statistics": _Named(
            "reference", reference.statistics, inception, "set it to '' to use the training images"
        ),
    }


def missing_files(parameters: Parameters, stages: Container[str] | None = None) -> dict[str, str]:
    """Key => one sentence with the fix, for every file or folder that is named, needed and absent.

    stages: those that would read the files; default: all.
    """
    return {
        key: f"{key} is {named.path!r}, which does not exist; provide it, or {named.otherwise}."
        for key, named in _named(parameters).items()
        if named.used and named.path and not Path(named.path).exists() and (stages is None or named.stage in stages)
    }


def check_files(parameters: Parameters, stages: Container[str] | None = None) -> None:
    """Raise MissingFileError for the first of `missing_files`; UserError if the images are in data/."""
    for sentence in missing_files(parameters, stages).values():
        raise MissingFileError(sentence)
    path = Path(parameters.data.path)
    if parameters.data.source != "digits" and path.resolve().is_relative_to(Path("data").resolve()):
        raise UserError(
            f"data.path is {str(path)!r}, inside data/, where stages replace whole folders; move the images elsewhere."
        )


def named_paths(parameters: Parameters) -> dict[str, Path]:
    """Key => the file or folder that it names, for all that are needed."""
    return {key: Path(named.path) for key, named in _named(parameters).items() if named.used and named.path}


def named_files(parameters: Parameters, stage: str) -> list[Path]:
    """Files, other than images, that parameters name and the stage reads; for a folder, the files read from it."""
    named = {
        key: Path(named.path)
        for key, named in _named(parameters).items()
        if named.stage == stage and named.used and named.path and key != "data.path"
    }
    return [
        file
        for key, path in named.items()
        for file in ([path / name for name in _READ[key]] if key in _READ and path.is_dir() else [path])
    ]
