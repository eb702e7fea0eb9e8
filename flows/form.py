"""The form of Prefect's page for a run of the pipeline: types that only say what a field may hold.

The flow checks its parameters itself, with sentences that name the fix; these types add choices and limits to the page.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import WithJsonSchema

from ear.config import Parameters
from ear.lineage.declaration import declarations

_FIRST = ("sample", "evaluate", "score", "train", "finetune")  # sections that are changed most


def _overrides() -> dict[str, Any]:
    """A JSON schema with every key of params.yaml as `section.key`; each may be left out."""
    schema = Parameters.model_json_schema()
    of = {name: schema["$defs"][entry["$ref"].rpartition("/")[2]] for name, entry in schema["properties"].items()}
    fields = {
        f"{section}.{key}": {**_choices(field), "title": f"{section}.{key}"}
        for section in (*_FIRST, *(name for name in of if name not in _FIRST))
        for key, field in of[section]["properties"].items()
    }
    return {"type": "object", "properties": fields}


def _choices(field: dict[str, Any]) -> dict[str, Any]:
    """Booleans as a choice of two: the page sends a switch that nobody touched as false."""
    if field.get("type") != "boolean":
        return field
    return {"enum": [True, False], **{name: value for name, value in field.items() if name != "type"}}


STAGES = list(declarations(Path(__file__).parents[1]))
Stages = Annotated[tuple[str, ...], WithJsonSchema({"type": "array", "items": {"type": "string", "enum": STAGES}})]
Overrides = Annotated[dict[str, Any] | None, WithJsonSchema(_overrides())]
