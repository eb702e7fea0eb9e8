"""Models on disk: weights, shape and description in one safetensors file."""

from pathlib import Path

from ear.errors import UserError
from ear.files.reading import reading, require_format
from ear.files.tensors import read_description, read_part, write_tensors
from ear.files.weights import built_with
from ear.model.autoregressive import AutoregressiveModel
from ear.model.causal import CausalModel
from ear.model.masked import MaskedModel
from ear.model.shape import Shape

FORMAT = "ear-model-1"
FILE = "model.safetensors"  # in the folder of a training stage
_CHOICES = ("averaged", "averaged_long", "weights")  # sets of weights in a checkpoint
_MODELS: dict[str, type[MaskedModel] | type[CausalModel]] = {"bidirectional": MaskedModel, "causal": CausalModel}


def build_model(shape: Shape) -> AutoregressiveModel:
    """A model of that shape, masked or causal as `shape.model.attention` says; its weights are not initialised."""
    return _MODELS[shape.model.attention](shape)


def describe(model: AutoregressiveModel, latents: dict) -> dict:
    """The metadata stored with the weights of a model; `latents`: their statistics, and their tokenizer."""
    return {**latents, "format": FORMAT, "shape": model.shape.as_dict()}


def save_model(path: str | Path, model: AutoregressiveModel, latents: dict) -> None:
    """Write weights with `describe(model, latents)`."""
    write_tensors(path, model.state_dict(), describe(model, latents))


def load_model(path: str | Path, weights: str | None = None) -> tuple[AutoregressiveModel, dict]:
    """Load (model in eval mode, description) from a file of `save_model` or from a training checkpoint.

    path: the file, or the folder that a training stage wrote.
    weights: only for a checkpoint, the set to load: averaged (EMA, default), averaged_long (the slower EMA) or weights
    (without averaging).
    Raises MissingFileError; UserError for another format, other `weights`, or tensors that do not fit the shape.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    description, part = read_description(path), ""
    if about := description.get("about"):
        description, part = about, f"{weights or _CHOICES[0]}."
        if weights not in (None, *_CHOICES):
            raise UserError(f"weights is {weights!r}, but must be {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}.")
    elif weights is not None:
        raise UserError(f"{path} is not a training checkpoint, so it has only one set of weights; omit `weights`.")
    _check_format(path, description)
    return model_of(read_part(path, part), description, path), description


def load_shape(path: str | Path) -> tuple[Shape, dict]:
    """(shape, description) of a file written by `save_model`, without its weights; raises as `load_model` does."""
    description = read_description(path)
    _check_format(path, description)
    with reading(path, "description of a model", "train it again"):
        return Shape.from_dict(description["shape"]), description


def _check_format(path: str | Path, description: dict) -> None:
    remedy = "give a model file of ear, or a checkpoint of the train or finetune stage"
    require_format(path, description.get("format"), FORMAT, remedy)


def model_of(tensors: dict, description: dict, origin: str | Path) -> AutoregressiveModel:
    """Build a model, in eval mode, from its tensors and its `describe` metadata; errors name their file, `origin`.

    Raises UserError if the description or a tensor is not what a model needs.
    """
    with reading(origin, "description of a model", "train it again"):
        shape, stored = Shape.from_dict(description["shape"]), description["shape"]
        layers = shape.model.depth
        model = built_with(lambda: build_model(shape), tensors, str(origin), layers=layers, description=stored)
    return model.eval()
