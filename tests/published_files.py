"""Files that others publish, in their formats, with generated weights: a KL-16 autoencoder and Inception."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ear.evaluation.extractors import INCEPTION

GOLDEN = Path(__file__).parent / "golden"


def write_kl16(path: Path) -> Path:
    """The golden autoencoder; tests/golden/README.md says how its weights are made."""
    shapes = json.loads((GOLDEN / "kl16_parameters.json").read_text())
    torch.save({"model": {name: kl16_weight(name, shape) for name, shape in shapes.items()}, "epoch": 49}, path)
    return path


def kl16_weight(name: str, shape: list[int]) -> torch.Tensor:
    """A weight of the golden autoencoder."""
    source = np.random.RandomState(zlib.crc32(f"kl16/{name}".encode()) & 0x7FFFFFFF)
    normal = source.standard_normal(shape)
    if len(shape) > 1:
        normal = normal / np.sqrt(np.prod(shape[1:]))
    else:
        normal = 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal
    return torch.from_numpy(normal.astype(np.float32))


def write_inception(path: Path) -> Path:
    """Inception weights of torch's initial values, whose features are spread so that they differ between images."""
    empty = path.with_name("empty.pth")
    torch.save({}, empty)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        module = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(empty))
    empty.unlink()
    weights = module.state_dict()
    torch.save({name: 3 * value if "conv.weight" in name else value for name, value in weights.items()}, path)
    return path
