"""Write params.yaml from a preset and overrides: `ear configure preset=NAME section.key=value ...`.

Presets are the files of conf/preset/; NAME_smoke is the laptop-size form of NAME, which runs the complete pipeline in a
minute or two. Parameters are checked before a file is touched, and files are replaced atomically.
"""

from pathlib import Path

from ear import config
from ear.config.compose import compose, describe_preset, presets
from ear.config.document import SCHEMA_FILE, descriptions, json_schema, to_yaml
from ear.files.atomic import whole_file


def run(overrides: list[str], output: Path) -> list[str]:
    """Write the parameter file and, beside it, its JSON schema => lines to print. Raises UserError."""
    parameters = compose(overrides)
    command = " ".join(["ear configure", *(overrides or ["preset=digits"])])
    with whole_file(output) as partial:
        partial.write_text(to_yaml(parameters, command))
    with whole_file(output.parent / SCHEMA_FILE) as partial:
        partial.write_text(json_schema())
    notes = config.missing_files(parameters).values()
    return [f"wrote {output}", *(f"note: {sentence}" for sentence in notes)]


def keys() -> str:
    """All presets and keys with their descriptions, for the help."""
    lines = ["Presets:", *(f"  {name:<28} {describe_preset(name)}" for name in presets()), "", "Keys:"]
    for section, field in config.Parameters.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, config.Section)
        lines += [f"  {f'{section}.{key}':<28} {text}" for key, text in descriptions(kind).items()]
    return "\n".join(lines)
