"""The training loss of a KL autoencoder."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import Tokenizer
from ear.tokenizer.perceptual import Perceptual


@dataclass(frozen=True)
class Terms:
    """Loss terms of one batch; all but `figures` carry an autograd graph."""

    loss: Tensor
    reconstruction: Tensor  # the terms that compare images
    decoded: Tensor  # [B, 3, H, W]
    figures: dict[str, Tensor]  # for the log


@dataclass(frozen=True)
class AutoencoderLoss:
    """The loss of latent diffusion's autoencoders (Rombach et al. 2022, appendix G), without the critic.

    Per image: (sum |x - decoded| + kl_weight * KL) / P + perceptual_weight * LPIPS, with the sum over the P = 3 H W
    pixel values and KL in nats over all latent dimensions; then the mean over images. Dividing by P makes
    `reconstruction` the mean absolute error and keeps the published meaning of `kl_weight` (1e-6).
    """

    kl_weight: float
    perceptual: Perceptual | None = None
    perceptual_weight: float = 0.0

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures."""
        return ("reconstruction", "kl", *(["perceptual"] if self.perceptual is not None else []))

    def __call__(
        self,
        tokenizer: Tokenizer,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
        noise: Tensor,  # standard normal [B, C, h, w], for the posterior sample that is decoded
        *,
        inside: Callable[[], AbstractContextManager] = nullcontext,  # precision of the tokenizer's passes
    ) -> Terms:
        """Figures: `reconstruction` (mean absolute error), `perceptual` if used, `kl` in nats per image."""
        with inside():
            moments = tokenizer.encode(images).float()
        latents = posterior.posterior_sample(moments, noise)
        with inside():
            decoded = tokenizer.decode(latents).float()
        reconstruction = (images - decoded).abs().mean()
        kl = posterior.kl_divergence(moments).mean()
        figures = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(images, decoded).mean()
            reconstruction = reconstruction + self.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        loss = reconstruction + self.kl_weight * kl / images[0].numel()
        return Terms(loss, reconstruction, decoded, figures)
