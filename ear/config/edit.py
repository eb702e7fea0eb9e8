"""Change values in params.yaml: checked before the file is touched, comments kept, the file replaced atomically."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from ear.config.parameters import Parameters, load
from ear.config.parameters import parse as parse_parameters
from ear.errors import UserError
from ear.files.atomic import whole_file


def values_of(texts: Iterable[str]) -> dict[str, Any]:
    """["section.key=value", ...] => {"section.key": value}, with values read as DVC reads YAML. Raises UserError."""
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"{text!r} sets nothing; write SECTION.KEY=VALUE, such as sample.guidance=2.0.")
        try:
            values[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise UserError(f"{key}: {value!r} is not a YAML value; quote it.") from error
    return values


def apply(path: str | Path, values: Mapping[str, Any]) -> None:
    """Set {"section.key": value} in the parameter file at `path`, if the result is valid.

    Raises UserError or MissingFileError with one sentence, and leaves the file unchanged.
    """
    before = load(path)
    content = _edited(Path(path).read_text(), values)
    if _parsed(content) == before:
        return
    text = io.StringIO()
    _yaml().dump(content, text)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue())


def check(path: str | Path, values: Mapping[str, Any]) -> Parameters:
    """The parameters of the file at `path` with {"section.key": value} set; the file is not changed.

    Raises UserError or MissingFileError with one sentence.
    """
    load(path)  # errors of the file itself come first
    return check_text(Path(path).read_text(), values)


def check_text(text: str, values: Mapping[str, Any]) -> Parameters:
    """As `check`, of the text of a parameter file."""
    return _parsed(_edited(text, values))


def _edited(text: str, values: Mapping[str, Any]) -> CommentedMap:
    content = _yaml().load(text)
    for key, value in values.items():
        _set(content, key, value)
    return content


def _parsed(content: CommentedMap) -> Parameters:
    return parse_parameters(_plain(content), origin="overrides")


def _yaml() -> YAML:
    """A reader and writer that keeps comments, quotes and lines."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    return yaml


def _set(content: dict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise UserError(f"overrides: {key} is not a known key; {'.'.join(sections[:depth])} is a single value.")
    content[name] = _styled(value)


def _styled(value: Any) -> Any:
    """A value in the style of params.yaml: texts in double quotes, lists on one line."""
    if isinstance(value, str):
        return DoubleQuotedScalarString(value)
    if isinstance(value, list | tuple):
        items = CommentedSeq(map(_styled, value))
        items.fa.set_flow_style()
        return items
    return value


def _plain(node: Any) -> Any:
    """Convert ruamel's scalars and containers to plain types."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node
