"""A trained pipeline in one safetensors file, for sharing; written by `ear export`.

Its tensors are `model.*` and `tokenizer.*`. Its description contains those of the model and the tokenizer, the metrics,
and the sampling settings they were measured with. On the Hugging Face Hub or in a folder, a model card accompanies it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download

from ear.errors import MissingFileError
from ear.files.atomic import whole_file
from ear.files.reading import reading, require_format
from ear.files.tensors import read_tensors, write_tensors
from ear.latents.statistics import Statistics
from ear.model.files import describe, model_of
from ear.sampling.editing import inpaint_with
from ear.sampling.generation import ImageSampler
from ear.sampling.settings import SamplingOptions, SamplingSettings
from ear.scores.score import DENOISING
from ear.tokenizer.autoencoder import describe_tokenizer, tokenizer_of

FORMAT = "ear-pipeline-1"
FILE, CARD = "pipeline.safetensors", "README.md"
_MODEL, _TOKENIZER = "model.", "tokenizer."
_SINCE = {"denoising_steps": DENOISING.steps, "denoised_limit": DENOISING.limit}  # earlier files lack them
# What `generate` and `inpaint` default to.
_SAMPLING = ("steps", "guidance", "schedule", "guidance_from", "guidance_to", "temperature", *_SINCE)


class Pipeline(ModelHubMixin):
    """A trained generator. `push_to_hub(NAME)` and `from_pretrained(NAME or folder)` are huggingface_hub's.

    sampling: the settings (of section `sample` in params.yaml) that the metrics were measured with. metrics: plain
    values by name.
    """

    def __init__(self, sampler: ImageSampler, *, tokenizer_sha256: str, sampling: Mapping, metrics: Mapping):
        self.sampler, self.tokenizer_sha256 = sampler, tokenizer_sha256
        given = {**_SINCE, **sampling}
        self.sampling, self.metrics = {name: given[name] for name in _SAMPLING}, dict(metrics)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""
        return self.sampler.model.shape.classes

    def settings(self, seed: int = 0, **changes: Unpack[SamplingOptions]) -> SamplingSettings:
        """The sampling behind the metrics, with these changes; in float32 unless they say otherwise."""
        return SamplingSettings(**{**self.sampling, **changes}, seed=seed)

    def generate(
        self,
        labels: Sequence[int | str],  # class numbers or names, one per image
        *,
        seed: int = 0,
        first: int = 0,  # number of the first image
        batch_size: int = 64,
        **changes: Unpack[SamplingOptions],
    ) -> np.ndarray:
        """Generate uint8 images [N, H, W, 3], from number `first` on; image k depends on (seed, k) and its label.

        changes: of the sampling behind the metrics, such as guidance=2.0. Raises as `ear.generate`.
        """
        return self.sampler.generate(labels, self.settings(seed, **changes), batch_size=batch_size, first=first)

    def inpaint(
        self,
        images: np.ndarray,  # uint8 [N, H, W, 3]
        mask: np.ndarray,  # bool [N, H, W], true where pixels are redrawn
        labels: Sequence[int | str],
        *,
        seed: int = 0,
        paste: bool = True,
        batch_size: int = 64,
        **changes: Unpack[SamplingOptions],
    ) -> np.ndarray:
        """Redraw every token that the mask touches => uint8 [N, H, W, 3].

        changes: as those of `generate`. Raises as `ear.inpaint`.
        """
        settings = self.settings(seed, **changes)
        return inpaint_with(self.sampler, images, mask, labels, settings, paste=paste, batch_size=batch_size)

    def save(self, path: str | Path) -> None:
        """Write everything to one file, byte-reproducibly."""
        model, tokenizer = self.sampler.model, self.sampler.tokenizer
        tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"{_TOKENIZER}{name}": tensor for name, tensor in tokenizer.state_dict().items()}
        latents = {"statistics": self.sampler.statistics.as_dict(), "tokenizer": self.tokenizer_sha256}
        description = {
            "format": FORMAT,
            "model": describe(model, latents),
            "tokenizer": describe_tokenizer(tokenizer),
            "sampling": self.sampling,
            "metrics": self.metrics,
        }
        write_tensors(path, tensors, description)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / FILE)
        with whole_file(save_directory / CARD) as partial:
            partial.write_text(self.card())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "Pipeline":
        if (folder := Path(model_id)).is_dir():
            return load_pipeline(folder / FILE, options.get("device", "cpu"))
        names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        given = {name: options[name] for name in names if options.get(name) is not None}
        return load_pipeline(hf_hub_download(model_id, FILE, **given), options.get("device", "cpu"))

    def card(self) -> str:
        """The model card: Markdown with a header that hubs read."""
        shape = self.sampler.model.shape
        side = self.sampler.image_shape[0]
        rows = "\n".join(f"| {name} | {value} |" for name, value in self.metrics.items())
        shown = [name for name in self.sampling if shape.score.name == "hyvarinen" or name not in _SINCE]
        sampling = ", ".join(f"{name} {self.sampling[name]}" for name in shown)
        return f"""---
library_name: ear
tags: [image-generation, class-conditional, autoregressive, {shape.score.name}-score]
pipeline_tag: unconditional-image-generation
---

# An autoregressive image generator with continuous tokens

Class-conditional images of {side} x {side} pixels in {len(shape.classes)} classes, trained by maximising the
{shape.score.name} score with `ear` (EAR, ICML 2025).

```python
import ear

pipeline = ear.load_pipeline("{FILE}")
images = pipeline.generate(labels=[0, 1], seed=0)  # uint8 [2, {side}, {side}, 3]
```

| metric | value |
|---|---|
{rows}

Sampling behind the metrics: {sampling}. FID depends on its features and on the number of images: compare it only with
figures that were measured in the same way.
"""


def load_pipeline(path: str | Path, device: torch.device | str = "cpu") -> Pipeline:
    """Load a file written by `ear export` or `Pipeline.save`, or a folder written by `Pipeline.save_pretrained`.

    Raises MissingFileError; UserError if the file is damaged or holds something else.
    """
    path = Path(path) / FILE if Path(path).is_dir() else path
    if not Path(path).is_file():
        raise MissingFileError(f"{path} does not exist; `ear export FILE` writes a pipeline.")
    tensors, description = read_tensors(path)
    require_format(path, description.get("format"), FORMAT, "write it with `ear export FILE`")
    kind, remedy = "description of a pipeline", "export it again"
    with reading(path, kind, remedy):
        parts = {
            prefix: {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            for prefix in (_MODEL, _TOKENIZER)
        }
        about = description["model"]
        model = model_of(parts[_MODEL], about, path)
        tokenizer = tokenizer_of(parts[_TOKENIZER], description["tokenizer"], path)
        statistics = Statistics.from_dict(about["statistics"])
    sampler = ImageSampler(model, tokenizer, statistics, device)  # outside `reading`: a full GPU is not a bad file
    with reading(path, kind, remedy):
        return Pipeline(
            sampler,
            tokenizer_sha256=about["tokenizer"],
            sampling=description["sampling"],
            metrics=description["metrics"],
        )
