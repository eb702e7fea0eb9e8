"""Weights from elsewhere: pickled checkpoints read as plain tensors, and strict loading by name."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ear.errors import MissingFileError, UserError
from ear.files.reading import is_system_error

if TYPE_CHECKING:
    import torch
    from torch import nn

    Network = TypeVar("Network", bound=nn.Module)


def read_pickled(path: str | Path) -> object:
    """Read a file that `torch.save` wrote, onto the CPU; it may hold only tensors and plain containers.

    Training programs also save their command line, an argparse.Namespace: reading one runs no code either.

    Raises MissingFileError; UserError if it is no such file, or would run code when unpickled.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; give the path of a file with published weights.")
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for other files; all mean the same to the user
        if is_system_error(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as plain weights ({reason}); it is damaged or another kind of file; get it again."
        ) from error


def tensors_by_name(content: object, *, origin: str) -> dict:
    """Return `content`, unpickled from `origin`, if it is a dict of str to Tensor; raises UserError otherwise."""
    import torch

    if not isinstance(content, dict):
        raise UserError(
            f"{origin} is a {type(content).__name__}, but must be a dict of tensors by name; get the file again."
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise UserError(f"{origin} maps {name!r} to a {kind}, but must map names to tensors; get the file again.")
    return content


def built_with(
    build: "Callable[[], Network]",
    tensors: "dict[str, torch.Tensor]",
    origin: str,  # of the tensors, for messages
    *,
    layers: int,  # that the description in the file asks for
    description: object,  # nested plain values that `build` uses
) -> "Network":
    """The module that `build` returns, with these weights; raises as `load_weights` does.

    Guards against descriptions with huge sizes: if the square of a number in `description` exceeds the number of values
    in `tensors`, names and shapes are first compared on the meta device, without allocating. Other files skip this,
    since the imports of the meta device take two seconds.
    """
    if layers > len(tensors):
        raise UserError(f"{origin} describes {layers} layers, but has {len(tensors)} tensors; it is damaged.")
    values = sum(tensor.numel() for tensor in tensors.values())
    if any(number**2 > values for number in _numbers(description)):
        import torch

        with torch.device("meta"):
            check_weights(build().state_dict(), tensors, origin)
    module = build()
    load_weights(module, tensors, origin)
    return module


def _numbers(content: object) -> Iterator[float]:
    """All numbers in nested plain values."""
    if isinstance(content, int | float):
        yield content
    elif isinstance(content, Mapping):
        yield from _numbers([*content.values()])
    elif isinstance(content, list | tuple):
        for entry in content:
            yield from _numbers(entry)


def load_weights(module: "nn.Module", tensors: "dict[str, torch.Tensor]", origin: str = "the checkpoint") -> None:
    """Load tensors by name, strictly; raises UserError naming one that is missing, extra or of another shape."""
    check_weights(module.state_dict(), tensors, origin)
    module.load_state_dict(tensors, strict=True)


def check_weights(
    expected: "dict[str, torch.Tensor]", tensors: "dict[str, torch.Tensor]", origin: str = "the checkpoint"
) -> None:
    """Raise UserError naming a tensor that is missing, extra or of another shape than the expected one."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model lacks"
        raise UserError(
            f"{origin} {what}; it belongs to a model of another structure; train again or use its own checkpoint."
        )
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{origin} holds {name} with shape {list(tensors[name].shape)}, the model needs {list(tensor.shape)}; "
                "it belongs to a model of another size."
            )
