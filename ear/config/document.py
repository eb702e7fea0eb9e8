"""Parameters as text: the commented params.yaml, and the JSON schema that editors complete and check it with."""

import json
from typing import Any

from ear.config.parameters import Parameters
from ear.config.scores import Score, owners
from ear.config.sections import Section

SCHEMA_FILE = "params.schema.json"
_COLUMN = 31  # of the comments
_UNTRACKED = "  # not tracked by DVC: changes results by rounding at most, and reruns nothing"


def to_yaml(parameters: Parameters, command: str) -> str:
    """Commented YAML: every key with its description, in the order of the sections."""
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Written by `{command}`; edit freely. DVC reruns the stages that read what you change.",
        "",
    ]
    for name in Parameters.model_fields:
        section = getattr(parameters, name)
        lines.append(f"{name}:{_UNTRACKED if name == 'runtime' else ''}")
        for key, text in descriptions(type(section)).items():
            lines.append(f"  {f'{key}: {_scalar(getattr(section, key))}':<{_COLUMN}} # {text}")
        lines.append("")
    return "\n".join(lines)


def descriptions(section: type[Section]) -> dict[str, str]:
    """Key => what it means, in the section's order; options of scores say which scores they belong to."""
    found = {}
    for key, field in section.model_fields.items():
        text = field.description or ""
        if issubclass(section, Score) and key != "name":
            text = "; ".join(f"{', '.join(names)}: {each}" for each, names in owners(key).items())
        found[key] = text
    return found


def json_schema() -> str:
    """The JSON schema of params.yaml, as text."""
    schema = Parameters.model_json_schema()
    for name, definition in schema["$defs"].items():
        if name == Score.__name__:
            for key, text in descriptions(Score).items():
                definition["properties"][key]["description"] = text
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


def _scalar(value: Any) -> str:
    """A value as YAML that DVC, OmegaConf and PyYAML read alike (a float always has a dot)."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return (mantissa if "." in mantissa else mantissa + ".0") + e + exponent
    return json.dumps(list(value) if isinstance(value, tuple) else value)
