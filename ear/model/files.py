"""Models on disk: weights, shape and description in one safetensors file."""

from pathlib import Path

from pydantic import ValidationError

from ear.errors import UserError
from ear.files.tensors import read_tensors, write_tensors
from ear.files.weights import load_weights
from ear.model.autoregressive import AutoregressiveModel
from ear.model.causal import CausalModel
from ear.model.masked import MaskedModel
from ear.model.shape import Shape

FORMAT = "ear-model-1"
_MODELS: dict[str, type[MaskedModel] | type[CausalModel]] = {"bidirectional": MaskedModel, "causal": CausalModel}


def build_model(shape: Shape) -> AutoregressiveModel:
    """A model of that shape, masked or causal as `shape.model.attention` says; its weights are not initialised."""
    return _MODELS[shape.model.attention](shape)


def save_model(path: str | Path, model: AutoregressiveModel, description: dict) -> None:
    """Write weights, shape and `description` (statistics of the latents, tokenizer)."""
    write_tensors(path, model.state_dict(), {**description, "format": FORMAT, "shape": model.shape.as_dict()})


def load_model(path: str | Path) -> tuple[AutoregressiveModel, dict]:
    """(model in eval mode, description) of a file written by `save_model`.

    Raises MissingFileError; UserError for another format, or tensors that do not fit the shape.
    """
    tensors, description = read_tensors(path)
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {description.get('format')!r}, but must have {FORMAT!r}; give a model file of ear."
        )
    try:
        shape = Shape.from_dict(description["shape"])
    except (ValidationError, KeyError) as error:
        raise UserError(
            f"{path} describes an impossible model ({' '.join(str(error).split())}); train it again."
        ) from error
    model = build_model(shape)
    load_weights(model, tensors, origin=str(path))
    return model.eval(), description
