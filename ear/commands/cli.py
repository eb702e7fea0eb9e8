"""The command `ear`: its subcommands, options and help. Their modules are imported when they run."""

import io
import sys
from pathlib import Path

import click

from ear.errors import UserError


class _Command(click.Command):
    """A command that prints a user's mistake as one line and exits with 1."""

    def invoke(self, context: click.Context) -> None:
        try:
            super().invoke(context)
        except (UserError, OSError) as error:
            print(f"{context.info_name}: {' '.join(str(error).split())}", file=sys.stderr)
            context.exit(1)


class _ConfigureCommand(_Command):
    """Appends the presets and keys to its help; reading them takes pydantic, which `ear --help` does not need."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from ear.commands.configure import keys

        formatter.write(f"\n{keys()}\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train a quantisation-free autoregressive image generator.

    `ear COMMAND --help` explains a command. The pipeline itself runs with `dvc repro` or `python -m flows.pipeline`.
    """
    for stream in (sys.stdout, sys.stderr):  # names of folders and classes need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@main.command(cls=_ConfigureCommand)
@click.argument("overrides", nargs=-1, metavar="[preset=NAME] [SECTION.KEY=VALUE]...")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True, help="file to write"
)
@click.option("--force", is_flag=True, help="with preset=: replace the file even if it was edited")
@click.option(
    "--upgrade", is_flag=True, help="add new keys to a file of an earlier version, drop removed ones, keep your values"
)
def configure(overrides: tuple[str, ...], output: Path, force: bool, upgrade: bool) -> None:
    """Write params.yaml from a preset and overrides, or change the given keys of an existing one.

    Every key is checked first. NAME_smoke runs the complete pipeline of preset NAME with small networks and short
    trainings, in a minute or two; longer if it reads all of your images. imagenet*_smoke use the digits.
    """
    from ear.commands import configure

    if upgrade:
        print("\n".join(configure.upgrade(list(overrides), output)))
    else:
        print("\n".join(configure.run(list(overrides), output, force=force)))


@main.command(cls=_Command)
@click.pass_context
def doctor(context: click.Context) -> None:
    """Check machine and repository: Python, GPUs, shared memory, disk, locking, DVC, parameters, Prefect, versions.

    Every finding comes with what to do about it. Exits with 1 if something would stop the pipeline.
    """
    from ear.commands import doctor

    lines, well = doctor.run()
    print("\n".join(lines))
    if not well:
        context.exit(1)


@main.command(cls=_Command)
@click.argument("path")
@click.option(
    "--sample", "samples", type=click.IntRange(min=0), default=100, show_default=True, help="images to decode"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="selects the images")
def inspect(path: str, samples: int, seed: int) -> None:
    """Say what a folder of images holds: layout, classes, sizes, unreadable files, the preset that fits.

    PATH holds class folders, ImageNet's tree or archives, or idx files, or is an npz file. Nothing is written.
    """
    from ear.commands import inspect

    print(inspect.run(path, samples=samples, seed=seed))


@main.command(cls=_Command)
@click.option(
    "--params", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True, help="parameter file"
)
@click.option("--classes", type=int, help="number of classes; default: that of the data, if it is known, or ImageNet's")
@click.option("--images", type=int, help="number of images; default: that of the data, if it is known, or ImageNet's")
@click.option("--teraflops", type=float, help="speed that one device sustains, in TFLOP/s; adds times to the stages")
def describe(params: Path, classes: int | None, images: int | None, teraflops: float | None) -> None:
    """Estimate what a parameter file will cost: parameters, memory, compute per image, disk.

    No data needs to exist. Times are compute divided by --teraflops: what a device sustains, not its peak.
    """
    from ear.commands import describe

    print(describe.run(params, classes=classes, images=images, teraflops=teraflops))


@main.command(cls=_Command)
@click.option("--repair", is_flag=True, help="delete damaged files, in DVC's cache too, for `dvc repro` to remake")
@click.pass_context
def verify(context: click.Context, repair: bool) -> None:
    """Check that outputs, their records and dvc.lock agree.

    Reads every output once. data/lineage/STAGE.json says what each stage's outputs were made from: parameters, code,
    inputs, library versions. Exits with 1 if anything disagrees.
    """
    from ear.commands import verify

    lines, well = verify.run(repair=repair)
    print("\n".join(lines))
    if not well:
        context.exit(1)


@main.command(cls=_Command)
@click.argument("stage", required=False, type=click.Choice(["tokenizer", "train", "finetune"]))
@click.option("--every", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="seconds between updates")
@click.option("--once", is_flag=True, help="print the current state and exit")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="images to draw from new checkpoints, on the CPU; with a quick FID if data/reference exists",
)
@click.option(
    "--samples-every", type=click.FloatRange(min=0), default=600.0, show_default=True, help="seconds between samples"
)
def watch(stage: str | None, every: float, once: bool, samples: int, samples_every: float) -> None:
    """Follow a running training from another terminal, until it ends.

    Shows the newest metrics and curves, and saves plots to work/watch. STAGE defaults to the one training now.
    """
    from ear.commands import watch

    watch.show(watch.run(stage, every=every, once=once, samples=samples, samples_every=samples_every))


@main.command(cls=_Command)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("data/report.html"),
    show_default=True,
    help="file to write",
)
def report(output: Path) -> None:
    """Write one HTML file that shows what the pipeline made.

    Metrics and what they depend on, real beside generated images, nearest training images, reconstructions, curves,
    latents, parameters, code. Parts whose stage has not run say so.
    """
    from ear.commands import report

    print(report.run(output))


@main.command(cls=_Command)
@click.option("--port", type=click.IntRange(1, 65535), default=4200, show_default=True)
def serve(port: int) -> None:
    """Serve Prefect's page with the flows pipeline, sweep and compare: start, watch and cancel runs in a browser.

    One program instead of server, worker and deployments; runs take turns.
    """
    import os

    os.execv(sys.executable, [sys.executable, "-m", "flows.serve", "--port", str(port)])


@main.command(cls=_Command)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def playground(file: Path | None, port: int, host: str, device: str) -> None:
    """Serve a page to play with a trained generator: classes, guidance, steps, inpainting with a brush.

    FILE: what `ear export FILE` wrote; default: the networks in data/.
    """
    from ear.commands import playground

    playground.run(file, host=host, port=port, device=device)


@main.command(cls=_Command)
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="of the train or finetune stage, such as one in work/kept: write only a model file with its weights",
)
@click.option(
    "--weights",
    type=click.Choice(["averaged", "averaged_long", "weights"]),
    help="of the checkpoint: averaged (EMA, default), averaged_long (slower EMA), or weights (without averaging)",
)
def export(output: Path, checkpoint: Path | None, weights: str | None) -> None:
    """Write the trained pipeline to one file, for `ear.load_pipeline`: model, tokenizer, classes, sampling, metrics.

    With --checkpoint, write only a model file, for `ear.load` and `ear.generate`.
    """
    from ear.commands import export

    if weights and not checkpoint:
        raise click.UsageError("--weights selects from a checkpoint; give --checkpoint, too")
    print(export.run(output, checkpoint=checkpoint, weights=weights))
