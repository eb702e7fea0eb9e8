"""Write params.yaml from a preset and overrides: `ear configure preset=NAME section.key=value ...`.

Presets are the files of conf/preset/; NAME_smoke is the laptop-size form of NAME, which runs the complete pipeline in a
minute or two. Without a preset, values of an existing file change and its other lines stay. Parameters are checked
before a file is touched, and files are replaced atomically.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from ear import config
from ear.config import edit
from ear.config.compose import compose, describe_preset, presets
from ear.config.document import SCHEMA_FILE, descriptions, json_schema, to_yaml
from ear.config.sections import MOVED
from ear.errors import UserError
from ear.files.atomic import whole_file
from ear.lineage.record import difference

_WRITTEN = r"^# Written by `ear configure (.*)`; edit freely"


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


def upgrade(overrides: list[str], output: Path) -> list[str]:
    """Add new keys to a file of an earlier version and drop removed ones => lines that say what was added and removed.

    Keeps the values of keys that still exist, then applies `overrides`. New keys get the values of the preset named in
    `overrides`, or else in the file, or else of digits. The user's own comments are lost.
    Raises UserError, and leaves the file unchanged, if it has no sections, or a value is no longer allowed.
    """
    old = config.read(output)
    if not isinstance(old, dict) or not all(isinstance(keys, dict) for keys in old.values()):
        raise UserError(f"{output} holds no sections of keys; write it with `ear configure preset=digits --force`.")
    written = re.search(_WRITTEN, output.read_text(), re.M)
    named = re.findall(r"\bpreset=(\w+)", " ".join([written[1] if written else "", *overrides]))
    preset = f"preset={named[-1] if named else 'digits'}"
    # Some presets cannot be composed without paths; the file's own then replace these placeholders.
    paths = ["data.path=/", *(["tokenizer.weights=/"] if old.get("tokenizer", {}).get("weights") else [])]
    merged, added, removed = _merged(compose([preset, *paths]).model_dump(mode="json"), old)
    for key, value in edit.values_of(text for text in overrides if not text.startswith("preset=")).items():
        section, _, name = key.partition(".")
        merged.setdefault(section, {})[name] = value
    parameters = config.parse(merged, origin=str(output))
    with whole_file(output) as partial:
        partial.write_text(to_yaml(parameters, written[0].split("`")[1] if written else _command([preset])))
    with whole_file(output.parent / SCHEMA_FILE) as partial:
        partial.write_text(json_schema())
    lines = [f"added {key}: {value}" for key, value in added.items()] + [f"removed {key}" for key in removed]
    return lines or [f"{output} is up to date already"]


def _merged(fresh: dict, old: dict) -> tuple[dict, dict[str, Any], list[str]]:
    """(fresh sections with the old values, new keys with their values, old keys that exist no more)."""
    old = _moved(old)
    merged = {
        section: {key: (old.get(section) or {}).get(key, value) for key, value in keys.items()}
        for section, keys in fresh.items()
    }
    known = {f"{section}.{key}" for section, keys in fresh.items() for key in keys}
    had = {f"{section}.{key}" for section, keys in old.items() if isinstance(keys, dict) for key in keys}
    added = {key: merged[key.partition(".")[0]][key.partition(".")[2]] for key in sorted(known - had)}
    return merged, added, sorted(had - known)


def _moved(old: dict) -> dict:
    """The sections of an earlier version with values under the present names of their keys."""
    sections = {section: dict(keys) for section, keys in old.items() if keys}
    for before, now in MOVED.items():
        (section, key), (new_section, new_key) = before.split("."), now.split(".")
        if key in sections.get(section, {}):
            sections.setdefault(new_section, {}).setdefault(new_key, sections[section].pop(key))
    return sections


def _command(overrides: list[str]) -> str:
    return f"ear configure {shlex.join(overrides or ['preset=digits'])}"


def _check_unedited(path: Path) -> None:
    """Raise UserError if the file differs from what the command in its header would write."""
    written = re.search(_WRITTEN, path.read_text(errors="replace"), re.M)
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
