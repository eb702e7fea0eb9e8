"""Reconstructions of images by a tokenizer, and the metrics that describe a trained tokenizer."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ear.data.images import to_signed, to_uint8
from ear.data.prepared import PreparedImages
from ear.runtime import randomness
from ear.runtime.randomness import Stream
from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import Tokenizer

_HIGHEST_PSNR = 100.0


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """float64 [B]: peak signal-to-noise ratio in dB of uint8 images [B, H, W, 3], at most 100 dB.

    10 log10(255^2 / mean squared error), with the mean over pixels and colours of one image. The limit keeps equal
    images finite; only images of more than 226 pixels a side can reach it otherwise.
    """
    assert images.dtype == others.dtype == torch.uint8
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(255.0**2 / error)).clamp(max=_HIGHEST_PSNR)


@torch.inference_mode()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Encode and decode uint8 images [B, H, W, 3] through the posterior mean => uint8 [B, H, W, 3]."""
    return to_uint8(tokenizer.decode(posterior.split(tokenizer.encode(to_signed(images)))[0]))


class Reconstructions:
    """Reconstructions of prepared images through the posterior mean, computed on reading; see `LabelledImages`."""

    def __init__(self, originals: PreparedImages, tokenizer: Tokenizer, device: torch.device):
        self._originals, self._tokenizer, self._device = originals, tokenizer.to(device).eval(), device
        self.labels = originals.labels

    def __len__(self) -> int:
        return len(self._originals)

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3]."""
        originals = torch.from_numpy(self._originals.images(rows)).to(self._device)
        return reconstruct(self._tokenizer, originals).cpu().numpy()


@torch.inference_mode()
def describe(tokenizer: Tokenizer, batches: Iterable[Tensor], source: Stream) -> tuple[dict, list[dict]]:
    """Metrics over all images of `batches` (uint8 [B, H, W, 3] on its device), and a row per latent channel.

    psnr: mean over images, in dB, through the posterior mean; psnr_sampled: through a posterior sample. kl: nats per
    image. latent_std: of sampled latents, over all channels. posterior_ratio: posterior standard deviation over
    latent_std, from 0 (deterministic) to 1 (no information about the image). Rows: channel, mean, std, posterior_std.
    """
    count, totals = 0, torch.zeros(3, dtype=torch.float64)
    moment_sums = torch.zeros((), dtype=torch.float64)  # float64 [4, C] after the first batch
    for images in batches:
        moments = tokenizer.encode(to_signed(images))
        mean, _ = posterior.split(moments)
        noise = randomness.normal(mean.shape, source, mean.device)
        decoded = [to_uint8(tokenizer.decode(x)) for x in (mean, posterior.posterior_sample(moments, noise))]
        per_image = [*(psnr(images, other) for other in decoded), posterior.kl_divergence(moments).double()]
        totals += torch.stack([values.sum() for values in per_image]).cpu()
        moment_sums = moment_sums + posterior.sums(moments)
        count += len(images)
    means = dict(zip(("psnr", "psnr_sampled", "kl"), (totals / count).tolist(), strict=True))
    _, std, within = (x.item() for x in posterior.spread(moment_sums.sum(dim=1, keepdim=True)))
    channels = zip(*(x.tolist() for x in posterior.spread(moment_sums)), strict=True)
    rows = [{"channel": k, "mean": m, "std": s, "posterior_std": p} for k, (m, s, p) in enumerate(channels)]
    return means | {"latent_std": std, "posterior_ratio": within / std}, rows
