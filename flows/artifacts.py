"""What a flow shows on Prefect's pages: tables of metrics, and the picture of the samples."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GRID = Path("data/samples/grid.png")
_LARGEST_PICTURE = 1 << 20  # bytes; a larger one would make the page that shows it slow


def metric_rows(files: Mapping[str, Mapping]) -> list[dict]:
    """Metrics files (path => content) => one row per number: file, dotted name, value."""

    def flat(prefix: str, values: Mapping) -> Iterable[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(f"{prefix}{name}.", value)
            else:
                yield prefix + name, value

    return [
        {"file": path, "metric": name, "value": value} for path, data in files.items() for name, value in flat("", data)
    ]


def picture(path: Path) -> str:
    """Markdown that embeds the picture if it is small, or else names its path."""
    content = path.read_bytes()
    if len(content) > _LARGEST_PICTURE:
        return f"`{path}` has {len(content) / 1e6:.1f} MB; open it there."
    return f"![{path}](data:image/png;base64,{base64.b64encode(content).decode()})"
