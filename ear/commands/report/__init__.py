"""One HTML file that shows what a pipeline made (`ear report`): pictures, curves, metrics, and what they rest on.

A part whose stage has not run says so, so the report also helps after a failure. The file holds everything it shows
and loads nothing.
"""

import base64
import datetime
import io
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ear.commands.report import parts
from ear.errors import UserError
from ear.files.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = Path("data/report.html")


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, tables and pictures; or why it is missing."""

    title: str
    text: str = ""
    tables: tuple[parts.Table, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()  # (caption, data URL)
    missing: str = ""


def run(target: Path = REPORT) -> str:
    """Write the report of the files in data/ => a line to print."""
    sections = [
        _section("Metrics", parts.metrics),
        _section("Real and generated images", parts.real_and_generated),
        _section("Nearest training images", parts.nearest),
        _section("Reconstructions by the tokenizer", parts.reconstructions),
        _section("Training", parts.curves),
        _section("Latents", parts.latents),
        _section("Data", parts.data),
        _section("Stages", parts.stages),
        _section("Parameters", parts.parameters),
    ]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ear.commands.report", "."), autoescape=True)
    now = datetime.datetime.now().astimezone().isoformat(" ", timespec="minutes")
    text = environment.get_template("page.html.j2").render(sections=sections, version=_version(), written=now)
    with whole_file(target) as partial:
        partial.write_text(text, "utf-8", "backslashreplace")  # file names need not be UTF-8
    missing = [section.title for section in sections if section.missing]
    return f"wrote {target} ({len(text) / 1e6:.1f} MB)" + (f"; missing: {', '.join(missing)}" if missing else "")


def _section(title: str, make: Callable[[], parts.Part]) -> Section:
    """A part as a section of the page; a part whose files do not exist, or do not fit each other, is missing."""
    try:
        part = make()
    except (UserError, OSError) as error:
        return Section(title, missing=str(error))
    except Exception as error:  # files of several runs side by side can disagree in any way; the other parts are shown
        return Section(title, missing=f"{type(error).__name__}: {error}")
    return Section(title, part.text, part.tables, tuple((name, _url(picture)) for name, picture in part.pictures))


def _url(picture: "bytes | Figure") -> str:
    """A PNG or a figure as a data URL."""
    if not isinstance(picture, bytes):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=90)
        picture = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _version() -> Mapping[str, Any]:
    """The commit of the working tree, and whether files differ from it; empty outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short", "HEAD"), "edited": git("status", "--short", "--", ":!data")}
    except (OSError, subprocess.CalledProcessError):
        return {}
