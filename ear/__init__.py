"""Quantisation-free autoregressive image generation by maximising strictly proper scores.

    import ear
    model = ear.load("data/finetuned")
    images = ear.generate("data", labels=[3, 7], steps=16, guidance=2.0, temperature=0.9, seed=0)
    edited = ear.inpaint(images, mask, labels=[3, 7])  # redraws the pixels where mask is true

`ear.interop` reads and writes published checkpoints.
"""

import importlib

_HOMES = {
    "load": "ear.generation",
    "generate": "ear.generation",
    "inpaint": "ear.editing",
    "interop": "ear.interop",
}


def __getattr__(name: str):
    # Importing lazily keeps `python -m ear.configure` and the light stages free of torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'ear' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if _HOMES[name] == f"ear.{name}" else getattr(home, name)


__all__ = ["generate", "inpaint", "interop", "load"]
