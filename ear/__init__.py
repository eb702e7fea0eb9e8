"""Quantisation-free autoregressive image generation by maximising strictly proper scores.

    import ear
    model = ear.load("data/finetuned")
    images = ear.generate("data", labels=[3, 7], steps=16, guidance=2.0, temperature=0.9, seed=0)
    edited = ear.inpaint(images, mask, labels=[3, 7])  # redraws the pixels where mask is true
    images = ear.load_pipeline("digits.safetensors").generate(labels=[3, 7])  # what `ear export` wrote

`ear.interop` reads and writes published checkpoints. `ear.UserError` is raised for mistakes that the caller can fix.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ear.errors import UserError
    from ear.model import interop
    from ear.sampling.editing import inpaint
    from ear.sampling.generation import generate, load
    from ear.sampling.portable import Pipeline, load_pipeline

_MODULES = {
    "Pipeline": "ear.sampling.portable",
    "UserError": "ear.errors",
    "generate": "ear.sampling.generation",
    "inpaint": "ear.sampling.editing",
    "load": "ear.sampling.generation",
    "load_pipeline": "ear.sampling.portable",
}


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import ear`, `ear --help` and the light stages free of torch.
    if name == "interop":
        return importlib.import_module("ear.model.interop")
    if name not in _MODULES:
        raise AttributeError(f"module 'ear' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__]


__all__ = ["Pipeline", "UserError", "generate", "inpaint", "interop", "load", "load_pipeline"]
