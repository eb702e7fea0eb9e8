"""What README.md and docs/ name exists: files, modules, make targets, parameters, presets, Python names."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from repositories import committed

import ear
from ear import config
from ear.commands import cli
from ear.config.compose import presets

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_NO_COMMANDS = ("is",)  # words that follow the name `ear` in prose
TEXT = "\n".join(page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if not target.startswith("https://"):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What links to a page's headings are called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_programs_exist():
    modules = set(re.findall(r"python -m ([\w.]+\w)", TEXT)) - {"benchmarks.NAME"}
    assert {"flows.pipeline", "flows.sweep", "benchmarks.comparison"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module), module


def test_subcommands_exist():
    named = set(re.findall(r"(?:^|`|\s)ear ([a-z]+)(?=[`\s])", TEXT, re.MULTILINE))
    assert {"configure", "inspect", "describe"} <= named <= {*cli.main.commands, *_NO_COMMANDS}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^\s*)make ([a-z-]+)(?=`|\s*#|$)", TEXT, re.MULTILINE))
    assert {"demo", "test", "setup", "lint"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_metrics_to_expect_are_those_of_the_pipeline():
    """README's row in bold, and the figures of the text below it, are in the metrics files that are committed."""
    readme = (ROOT / "README.md").read_text()
    measured, reference = (committed(f"data/{stage}/metrics.json") for stage in ("evaluation", "reference"))
    (heads,) = re.findall(r"^\| `sample.guidance` \|(.*)\|$", readme, re.MULTILINE)
    (row,) = re.findall(r"^\| \*\*[\d.]+\*\* \|(.*)\|$", readme, re.MULTILINE)
    keys, figures = re.findall(r"`(\w+)`", heads), re.findall(r"[\d.]+", row)
    assert len(keys) == 5
    for key, figure in zip(keys, figures, strict=True):
        assert round(measured[key], len(figure.partition(".")[2])) == float(figure), key
    for text in (
        f"gets {100 * reference['val_accuracy']:.1f}% of the real held-out digits right",
        f"**The floor**, {measured['fid_floor']:.3f}, is",
        f"that is {measured['fid_equal']:.3f} / {measured['fid_floor']:.3f}",
        f"is {measured['fid']:.3f}; do not compare it with the floor, which uses {measured['fid_equal_images']}",
        f"**rFID**, {measured['reconstruction']['rfid']:.3f}, is",
    ):
        assert text in re.sub(r"\s+", " ", readme), text


def test_parameters_exist():
    sections = {name: set(field.annotation.model_fields) for name, field in config.Parameters.model_fields.items()}
    for section, key in re.findall(rf"(?<!ear\.)\b({'|'.join(sections)})\.([a-z_]+)(?=[=`\s,:])", TEXT):
        assert key in sections[section] or key in ("py", "md", "json", "h5", "csv", "tsv", "png"), f"{section}.{key}"


def test_presets_exist():
    named = set(re.findall(r"preset=(\w+)", TEXT)) - {"NAME"}
    assert {"folder64", "imagenet256_base"} <= named <= set(presets())


def test_python_names_exist():
    names = set(re.findall(r"\bear\.(\w+)\b(?!/)", TEXT)) - {"errors", "tokenizer", "config", "py", "pth"}
    assert {"load", "generate", "load_pipeline", "interop", "UserError"} <= names
    for name in names:
        assert hasattr(ear, name) or importlib.util.find_spec(f"ear.{name}"), name
    for name in set(re.findall(r"\bear\.interop\.(\w+)", TEXT)):
        assert hasattr(ear.interop, name), name
