"""Pydantic's validation errors as one sentence: key, value, what is allowed, the fix."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ear.config.sections import MOVED

_KINDS = {  # the kind of error, up to its first underscore
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "a string",
    "tuple": "a list such as [32, 64]",
    "list": "a list such as [tensorboard]",
}
_LIMITS = (("ge", "at least"), ("le", "at most"), ("gt", "above"), ("lt", "below"))


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The sentence for the first error of `model`; unknown keys come first, since a typo also makes a key missing."""
    errors: Sequence[Mapping[str, Any]] = error.errors()
    return _sentence(min(errors, key=lambda found: found["type"] != "extra_forbidden"), model)


def _sentence(found: Mapping[str, Any], model: type[BaseModel]) -> str:
    location, kind, value = found["loc"], found["type"], found["input"]
    key = _key(location)
    if kind == "extra_forbidden":
        return f"{key} is not a known key; {_moved(key) or _hint(location, model)}"
    if kind == "missing":
        return f"{key} is missing; `ear configure --upgrade` adds it."
    if kind == "value_error":
        return str(found["ctx"]["error"])
    if kind in ("too_short", "string_too_short"):
        return f"{key} is empty, but must have at least one {'entry' if kind == 'too_short' else 'character'}."
    return f"{key or 'the file'} is {value!r}, but must be {_allowed(found, location, model)}."


def _key(location: Sequence[str | int]) -> str:
    """("score", "bandwidths", 1) => score.bandwidths[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _moved(key: str) -> str:
    return f"it is called {MOVED[key]} now; `ear configure --upgrade` keeps its value." if key in MOVED else ""


def _hint(location: Sequence[str | int], model: type[BaseModel]) -> str:
    *sections, name = location
    for section in sections:
        model = _annotation(model, section)
    near = difflib.get_close_matches(str(name), model.model_fields, n=1)
    if near:
        return f"did you mean {_key([*sections, near[0]])}?"
    return f"known keys: {', '.join(model.model_fields)}."


def _allowed(found: Mapping[str, Any], location: Sequence[str | int], model: type[BaseModel]) -> str:
    kind = found["type"]
    if kind == "literal_error":
        return found["ctx"]["expected"]
    if kind.startswith(("greater", "less")):
        limits = _limits(location, model)
        return " and ".join(f"{words} {limits[name]:g}" for name, words in _LIMITS if name in limits)
    return _KINDS.get(kind.partition("_")[0], "a section of keys")


def _annotation(model: type[BaseModel], name: str | int) -> Any:
    return model.model_fields[str(name)].annotation


def _limits(location: Sequence[str | int], model: type[BaseModel]) -> dict[str, float]:
    """The limits of a number, by pydantic's names for them."""
    *sections, name = [part for part in location if isinstance(part, str)]
    for section in sections:
        model = _annotation(model, section)
    field = model.model_fields[name]
    metadata: Sequence[Any] = field.metadata
    if isinstance(location[-1], int):  # an entry of a list, whose type has the limits
        metadata = get_args(get_args(field.annotation)[0])[1].metadata
    return {
        limit: getattr(entry, limit)
        for entry in metadata
        for limit, _ in _LIMITS
        if getattr(entry, limit, None) is not None
    }
