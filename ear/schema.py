"""Parameters as frozen dataclasses: documented fields with limits, strict loading, one clear sentence per mistake.

No field has a default: a key that is absent from params.yaml would be invisible to DVC.
"""

import dataclasses
import difflib
import math
import types
import typing


def option(
    help: str,
    *,
    choices: tuple = (),  # the allowed values, if they are few
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,  # exclusive lower limit
    below: float | None = None,  # exclusive upper limit
):
    """A documented field with limits; `help` becomes the comment in params.yaml."""
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return dataclasses.field(metadata={"help": help, **limits})


def build(schema: type, content: object, *, prefix: str = ""):
    """The dataclass `schema`, whose fields are `option`s or such dataclasses, from a mapping of plain values.

    `prefix` stands before the keys in messages. Raises ValueError where a key is unknown, missing, of the wrong type or
    out of range, and whatever the dataclass itself raises.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} is {content!r}; it must be a section of keys.")
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}."
            raise ValueError(f"{prefix}{key} is not a known key; {hint}")
    missing = [name for name in fields if name not in content]
    if missing:
        raise ValueError(
            f"{prefix}{missing[0]} is missing; add it, or write the file anew with `python -m ear.configure`."
        )
    kinds = typing.get_type_hints(schema)
    values = {}
    for name, item in fields.items():
        kind, value, key = kinds[name], content[name], prefix + name
        if dataclasses.is_dataclass(kind):
            values[name] = build(kind, value, prefix=key + ".")
        else:
            values[name] = _within_limits(_typed(kind, value, key), item.metadata, key)
    return schema(**values)


def _typed(kind, value: object, key: str):
    """The value as `kind`; whole numbers are accepted as floats, nothing else is converted."""
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, types.GenericAlias):  # tuple[int, ...]
        element = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key} is {value!r}; it must be a list such as [32, 64].")
        return tuple(_typed(element, item, f"{key}[{i}]") for i, item in enumerate(value))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{key} is {value!r}; it must be {names[kind]}.")
    return value


def _within_limits(value, limits: typing.Mapping, key: str):
    if isinstance(value, tuple):
        if not value:
            raise ValueError(f"{key} is empty; it must have at least one entry.")
        return tuple(_within_limits(item, limits, f"{key}[{i}]") for i, item in enumerate(value))
    choices = limits["choices"]
    if choices and value not in choices:
        raise ValueError(f"{key} is {value!r}; it must be {' or '.join(map(repr, choices))}.")
    checks = (
        (limits["minimum"], lambda v, x: v >= x, "at least"),
        (limits["maximum"], lambda v, x: v <= x, "at most"),
        (limits["above"], lambda v, x: v > x, "above"),
        (limits["below"], lambda v, x: v < x, "below"),
    )
    failed = any(limit is not None and not holds(value, limit) for limit, holds, _ in checks)
    if failed:
        allowed = " and ".join(f"{words} {limit:g}" for limit, _, words in checks if limit is not None)
        raise ValueError(f"{key} is {value}; it must be {allowed}.")
    return value
