"""A page to play with a trained generator (`ear playground`): draw images token by token, and redraw parts of them.

Gradio, the extra `playground`, serves it, on loopback unless told otherwise; the page loads nothing from elsewhere.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ear.data.pictures import grid, magnify
from ear.errors import UserError
from ear.sampling.portable import Pipeline, load_pipeline

if TYPE_CHECKING:
    import gradio as gr

_SHOWN = 320  # pixels, about, of the side of a picture
_MOST = 16  # images at once
_STEPS = 64  # at most
_STATES = 12  # moments of a drawing that are shown, at most
_BUTTONS: list[Any] = ["download", "fullscreen"]  # and none to share the picture with Gradio's servers


def run(path: Path | None, *, host: str, port: int, device: str = "cpu") -> None:
    """Serve the page until interrupted; `path` is what `ear export` wrote, default: the networks in data/.

    Raises UserError if Gradio is not installed, the device is absent, or the networks do not exist.
    """
    pipeline = opened(path, device)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        page(pipeline).launch(server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except ImportError as error:
        raise UserError("the playground needs Gradio; pip install -c requirements.txt -e '.[playground]'.") from error
    except OSError as error:
        raise UserError(f"cannot listen on port {port} of {host} ({error}); give another --port or --host.") from error
    print(f"open http://{host}:{port} (Ctrl-C ends it)", flush=True)
    import threading

    threading.Event().wait()


def opened(path: Path | None, device: str = "cpu") -> Pipeline:
    """The pipeline in a file, or that of the folder data/."""
    if path:
        return load_pipeline(path, device)
    from ear.commands.export import DATA, evaluation
    from ear.sampling.generation import MODEL, TOKENIZER, ImageSampler

    sampler = ImageSampler.open(DATA / MODEL, DATA / TOKENIZER, device)
    figures, sampling = evaluation(DATA / MODEL)
    return Pipeline(sampler, tokenizer_sha256="", sampling=sampling, metrics=figures)


def page(pipeline: Pipeline) -> "gr.Blocks":
    """The page: one tab to generate, one to inpaint."""
    import gradio as gr

    defaults, shape = pipeline.settings(), pipeline.sampler.model.shape
    masked = shape.model.attention == "bidirectional"

    def sliders(steps: bool) -> list[Any]:
        choices: list[Any] = [
            gr.Slider(min(1.0, g := defaults.guidance), max(6.0, g), g, step=0.1, label="guidance"),
            gr.Slider(min(0.1, t := defaults.temperature), max(1.5, t), t, step=0.05, label="temperature"),
        ]
        if steps:
            choices.append(gr.Slider(1, max(_STEPS, defaults.steps), defaults.steps, step=1, label="steps"))
        else:
            choices.append(gr.State(defaults.steps))  # a causal model draws one token per step
        return [*choices, gr.Number(0, precision=0, minimum=0, label="seed")]

    def picture(label: str, name: str) -> Any:
        return gr.Image(label=label, format="png", elem_id=name, interactive=False, buttons=_BUTTONS)

    with gr.Blocks(title="ear playground", analytics_enabled=False) as blocks:
        gr.Markdown(f"# Playground\n{describe(pipeline)}")
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                label = gr.Dropdown(list(pipeline.classes), value=pipeline.classes[0], label="class")
                count = gr.Slider(1, _MOST, min(9, _MOST), step=1, label="images")
                options = sliders(masked)
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2):
                shown = picture("images", "generated")
                said = gr.Markdown(elem_id="said")
        button.click(functools.partial(generated, pipeline), [label, count, *options], [shown, said])
        if masked:
            with gr.Tab("Inpaint"), gr.Row():
                with gr.Column(scale=1):
                    painted = gr.ImageEditor(
                        value=first_image(pipeline),
                        label="paint over what is to be redrawn",
                        type="numpy",
                        brush=gr.Brush(default_size=_SHOWN // 8, colors=["#ff0000"], color_mode="fixed"),
                        layers=False,
                        elem_id="painted",
                    )
                    new = gr.Dropdown(list(pipeline.classes), value=pipeline.classes[0], label="class")
                    choices = sliders(True)
                    redraw = gr.Button("Redraw", variant="primary", elem_id="redraw")
                with gr.Column(scale=1):
                    edited = picture("redrawn", "edited")
                    told = gr.Markdown(elem_id="told")
            redraw.click(functools.partial(inpainted, pipeline), [painted, new, *choices], [edited, told])
    return blocks


def describe(pipeline: Pipeline) -> str:
    """One line about the model."""
    shape, side = pipeline.sampler.model.shape, pipeline.sampler.image_shape[0]
    parameters = sum(p.numel() for p in pipeline.sampler.model.parameters())
    figures = ", ".join(f"{name} {value}" for name, value in pipeline.metrics.items())
    return (
        f"{len(shape.classes)} classes of {side} x {side} pixels, {shape.tokens} tokens, {parameters:,} parameters, "
        f"{shape.score.name} score. {figures}"
    )


def generated(
    pipeline: Pipeline, label: str, count: float, guidance: float, temperature: float, steps: float, seed: float | None
) -> Iterator[tuple[np.ndarray | None, str]]:
    """Pictures of the images in the order in which their tokens were drawn, with a line of text."""
    seed = int(seed or 0)  # None: the field is empty
    settings = pipeline.settings(seed, guidance=guidance, temperature=temperature, steps=int(steps))
    labels = pipeline.sampler.labels([label] * int(count))
    try:
        states = pipeline.sampler.step_by_step(labels, settings, first=0, most=_STATES)
    except UserError as error:
        yield None, str(error)
        return
    columns = int(np.ceil(np.sqrt(len(labels))))
    scale = max(1, _SHOWN * 2 // (columns * pipeline.sampler.image_shape[0]))
    for number, images in enumerate(states):
        finished = number + 1 == len(states)
        text = f"{len(labels)} images, seed {seed}" if finished else f"snapshot {number} of {len(states) - 1}"
        yield grid(images, columns, scale=scale), text


def first_image(pipeline: Pipeline) -> np.ndarray:
    """An image to start with, magnified."""
    return _large(pipeline, pipeline.generate([0], seed=0)[0])


def inpainted(
    pipeline: Pipeline,
    painted: dict[str, Any] | None,
    label: str,
    guidance: float,
    temperature: float,
    steps: float,
    seed: float | None,
) -> tuple[np.ndarray | None, str]:
    """The picture with the painted part redrawn, and a line of text."""
    if not painted or painted.get("background") is None:
        return None, "There is no image; upload one."
    image, mask = small(pipeline, painted["background"], painted["layers"])
    if not mask.any():
        return None, "Nothing is painted over; paint over what is to be redrawn."
    how: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "steps": int(steps)}
    try:
        edited = pipeline.inpaint(image[None], mask[None], [label], seed=int(seed or 0), **how)
    except UserError as error:
        return None, str(error)
    return _large(pipeline, edited[0]), f"{mask.mean():.0%} of the image is redrawn as {label}"


def small(pipeline: Pipeline, picture: np.ndarray, layers: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [H, W, 3], bool [H, W]) of the model's size: the picture, and where any layer is painted."""
    from PIL import Image

    height, width, _ = pipeline.sampler.image_shape
    scale = min(picture.shape[0] / height, picture.shape[1] / width)
    top, left = (picture.shape[0] - scale * height) / 2, (picture.shape[1] - scale * width) / 2
    part = (left, top, left + scale * width, top + scale * height)  # the largest centred part of the right shape

    def shrunk(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX, part))

    mask = np.zeros((height, width), bool)
    for layer in layers:
        mask |= shrunk(layer[..., 3]) > 127  # more than half of a pixel
    return shrunk(picture[..., :3]), mask


def _large(pipeline: Pipeline, image: np.ndarray) -> np.ndarray:
    """[H, W, 3] => the same at a size that is good to paint on."""
    return magnify(image[None], max(1, _SHOWN // pipeline.sampler.image_shape[0]))[0]
