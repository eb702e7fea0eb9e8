"""LPIPS, the perceptual distance of Zhang et al. 2018, as a differentiable loss.

The values equal torch-fidelity's. Its own module cannot be used for training: it can only be built by downloading, and
its gradient is NaN wherever all features of a position are 0. The weights are the same two files: torchvision's VGG16
and the learned channel weights.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ear.errors import MissingFileError
from ear.files.downloads import downloaded
from ear.files.weights import load_weights, read_pickled, tensors_by_name

_CONVOLUTIONS = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)  # widths of VGG16's layers, per level
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's colours, for images in [-1, 1]
_TINY = 1e-20  # added to a squared norm: no change in float32, but a finite gradient at 0
_ELSEWHERE = (
    "put it and the other file of LPIPS into a folder that tokenizer.perceptual_folder names, or set "
    "tokenizer.perceptual_weight to 0"
)


class Perceptual(nn.Module):
    """LPIPS with VGG16, frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList()
        width = 3
        for number, widths in enumerate(_CONVOLUTIONS):
            level = nn.Sequential(*([nn.MaxPool2d(2)] if number else []))
            for wider in widths:
                level.extend([nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()])
                width = wider
            self.levels.append(level)
        self.channel_weights = nn.ParameterList(torch.zeros(widths[-1]) for widths in _CONVOLUTIONS)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], at least 16 pixels a side => distances [B]; 0 for equal images."""
        both = (torch.cat([images, others]) - self.mean) / self.std
        distance = both.new_zeros(len(images))
        for level, weights in zip(self.levels, self.channel_weights, strict=True):
            both = level(both)
            first, second = (both * (both.square().sum(dim=1, keepdim=True) + _TINY).rsqrt()).chunk(2)
            distance = distance + torch.einsum("bchw,c->bhw", (first - second).square(), weights).mean(dim=(1, 2))
        return distance


def files(folder: str | Path = "") -> list[Path]:
    """Paths of the two weights files, downloaded if needed; raises MissingFileError or UserError."""
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS
    from torchvision.models import VGG16_Weights

    return [_file(url, folder) for url in (VGG16_Weights.IMAGENET1K_V1.url, URL_VGG16_LPIPS)]


def load_perceptual(folder: str | Path = "") -> Perceptual:
    """Read vgg16-397923af.pth and weights-vgg16-lpips.pth from `folder`.

    Without a folder, use torch's own copies, downloaded if absent. Raises MissingFileError or UserError naming the file
    that is missing, cannot be downloaded, is damaged, or holds other tensors.
    """
    vgg, channel_weights = (tensors_by_name(read_pickled(path), origin=str(path)) for path in files(folder))
    network = Perceptual()
    names = _published_names(network)
    tensors = {ours: vgg[theirs] for ours, theirs in names.items() if theirs in vgg}
    for number in range(len(_CONVOLUTIONS)):
        name = f"lin{number}.model.1.weight"
        if name in channel_weights:
            tensors[f"channel_weights.{number}"] = channel_weights[name].flatten()
    load_weights(network, tensors, origin=f"the perceptual network in {folder or torch.hub.get_dir()}")
    return network


def _published_names(network: Perceptual) -> dict[str, str]:
    """Names of this module's tensors => torchvision's names, which number the layers of all levels consecutively."""
    names, start = {}, 0
    for number, level in enumerate(network.levels):
        for place, kind in (name.split(".") for name in level.state_dict()):
            names[f"levels.{number}.{place}.{kind}"] = f"features.{start + int(place)}.{kind}"
        start += len(list(level.children()))
    return names


def _file(url: str, folder: str | Path) -> Path:
    path = Path(folder) / url.rpartition("/")[2] if folder else downloaded(url, otherwise=_ELSEWHERE)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; put it there, or set tokenizer.perceptual_folder to ''.")
    return path
