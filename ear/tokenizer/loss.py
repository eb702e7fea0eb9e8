"""The loss that a KL autoencoder is trained on."""

from dataclasses import dataclass

from torch import Tensor

from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import Tokenizer
from ear.tokenizer.perceptual import Perceptual


@dataclass(frozen=True)
class Terms:
    """What training makes of one batch; all but `figures` carry their graph."""

    loss: Tensor
    reconstruction: Tensor  # the part of the loss that compares images
    decoded: Tensor  # [B, 3, H, W]
    figures: dict[str, Tensor]  # to log


@dataclass(frozen=True)
class AutoencoderLoss:
    """The loss of latent diffusion's autoencoders (Rombach et al. 2022, appendix G), without critic.

    Per image, (sum |x - decoded| + kl_weight * KL) / P + perceptual_weight * LPIPS, where the sum runs over the
    P = 3 H W pixel values and KL is in nats over all latent dimensions; the mean over images. Dividing by P makes
    `reconstruction` the mean absolute error and leaves the published meaning of `kl_weight` (1e-6) as it is.
    """

    kl_weight: float
    perceptual: Perceptual | None = None
    perceptual_weight: float = 0.0

    def __call__(
        self,
        tokenizer: Tokenizer,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
        noise: Tensor,  # [B, C, h, w], standard normal, of the posterior sample that is decoded
    ) -> Terms:
        """Figures: the mean absolute error `reconstruction`, `perceptual` where it is used, `kl` in nats per image."""
        moments = tokenizer.encode(images)
        decoded = tokenizer.decode(posterior.posterior_sample(moments, noise))
        reconstruction = (images - decoded).abs().mean()
        kl = posterior.kl_divergence(moments).mean()
        figures = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(images, decoded).mean()
            reconstruction = reconstruction + self.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        loss = reconstruction + self.kl_weight * kl / images[0].numel()
        return Terms(loss, reconstruction, decoded, figures)
