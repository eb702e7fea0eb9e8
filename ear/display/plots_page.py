"""The page of `dvc plots show` with its scripts inside, for use without a network: `python -m ear.display.plots_page`.

DVC's own page loads Vega from a content delivery network. `make setup` writes this one to .dvc/plots.html and names it
in .dvc/config.local; both are untracked.
"""

import subprocess
import sys
from pathlib import Path

from ear.files.atomic import whole_file

VEGA_LITE = "v6.4"  # the newest of vl-convert; its Vega is the only one that it has
# {refresh_tag} and {plot_divs} are DVC's; its third placeholder, the scripts, is what this page replaces.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
{refresh_tag}
<meta charset="utf-8">
<title>Plots</title>
<style>
body { margin: 2rem auto; max-width: 75rem; font-family: system-ui, sans-serif; color: #222; }
</style>
<script>SCRIPTS</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    """The template for DVC's option plots.html_template."""
    import vl_convert

    scripts = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    return _PAGE.replace("SCRIPTS", scripts.replace("</script", r"<\/script"))


def install(repository: Path) -> None:
    """Write the page, and name it in the local configuration of a repository's DVC."""
    with whole_file(repository / ".dvc/plots.html") as partial:
        partial.write_text(page(), encoding="utf-8")
    command = ["config", "--local", "plots.html_template", "plots.html"]
    subprocess.run([sys.executable, "-m", "dvc", *command], cwd=repository, check=True)


if __name__ == "__main__":
    install(Path())
