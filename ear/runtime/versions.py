"""Versions of the libraries that can change a number or a byte."""

import importlib.metadata

_DECISIVE = ("pillow", "h5py", "numpy", "scipy", "torch", "torchvision", "torch-fidelity", "diffusers", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of the installed packages that can change a result, and of the JPEG decoder inside Pillow."""
    from PIL import features

    found = {name: _version(name) for name in (*_DECISIVE, "ear")}
    return {name: version for name, version in found.items() if version} | {
        "libjpeg-turbo": features.version("libjpeg_turbo") or "none"
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
