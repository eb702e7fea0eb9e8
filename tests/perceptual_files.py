"""Generated weights of the perceptual network, in the two published files."""

from pathlib import Path

import torch

from ear.runtime.randomness import generator

_WIDTHS = ((64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256))
_WIDTHS += ((512, 512),) * 5
_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions among torchvision's layers


def generated_files(folder: Path) -> Path:
    """Write vgg16-397923af.pth (without its classifier) and weights-vgg16-lpips.pth; returns the folder."""
    source = generator(0, "perceptual")
    vgg, channel_weights = {}, {}
    for place, (out, into) in zip(_PLACES, _WIDTHS, strict=True):
        vgg[f"features.{place}.weight"] = torch.randn(out, into, 3, 3, generator=source) * (2 / (9 * into)) ** 0.5
        vgg[f"features.{place}.bias"] = 0.1 * torch.randn(out, generator=source)
    for number, width in enumerate((64, 128, 256, 512, 512)):
        channel_weights[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=source)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vgg, folder / "vgg16-397923af.pth")
    torch.save(channel_weights, folder / "weights-vgg16-lpips.pth")
    return folder
