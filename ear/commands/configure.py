"""Write params.yaml from a preset and overrides: `ear configure preset=NAME section.key=value ...`.

Presets are the files of conf/preset/; NAME_smoke is the laptop-size form of NAME, which runs the complete pipeline in a
minute or two. Without a preset, values of an existing file change and its other lines stay. Parameters are checked
before a file is touched, and files are replaced atomically.
"""

import re
import shlex
from pathlib import Path

from ear import config
from ear.config import edit
from ear.config.compose import compose, describe_preset, presets
from ear.config.document import SCHEMA_FILE, descriptions, json_schema, to_yaml
from ear.errors import UserError
from ear.files.atomic import whole_file
from ear.lineage.record import difference


def run(overrides: list[str], output: Path, *, force: bool = False) -> list[str]:
    """Write the parameter file and, beside it, its JSON schema => lines to print.

    Raises UserError for a wrong override, or if a preset would replace a file that was edited, unless `force` is set.
    """
    preset = any(text.startswith("preset=") for text in overrides)
    if output.is_file() and not preset:
        values = edit.values_of(overrides)
        edit.apply(output, values)
        parameters, done = config.load(output), f"changed {', '.join(values) or 'nothing'} in {output}"
    else:
        parameters, done = compose(overrides), f"wrote {output}"
        if output.is_file() and not force:
            _check_unedited(output)
        with whole_file(output) as partial:
            partial.write_text(to_yaml(parameters, _command(overrides)))
    with whole_file(output.parent / SCHEMA_FILE) as partial:
        partial.write_text(json_schema())
    notes = config.missing_files(parameters).values()
    return [done, *(f"note: {sentence}" for sentence in notes)]


def _command(overrides: list[str]) -> str:
    return f"ear configure {shlex.join(overrides or ['preset=digits'])}"


def _check_unedited(path: Path) -> None:
    """Raise UserError if the file does not hold what the command that it names would write."""
    written = re.search(r"^# Written by `ear configure (.*)`; edit freely", path.read_text(errors="replace"), re.M)
    try:
        before = compose(shlex.split(written[1])).model_dump(mode="json") if written else {}
        edits = difference(before, config.load(path).model_dump(mode="json")) if written else "it names no preset"
    except ValueError as error:  # UserError, or a quotation mark without its other half
        edits = str(error)
    if edits:
        raise UserError(
            f"{path} has been edited ({edits}); add --force to replace it, or omit preset= to change only the "
            "given keys."
        )


def keys() -> str:
    """All presets and keys with their descriptions, for the help."""
    lines = ["Presets:", *(f"  {name:<28} {describe_preset(name)}" for name in presets()), "", "Keys:"]
    for section, field in config.Parameters.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, config.Section)
        lines += [f"  {f'{section}.{key}':<28} {text}" for key, text in descriptions(kind).items()]
    return "\n".join(lines)
