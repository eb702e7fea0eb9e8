"""Principal components of image patches, in closed form."""

import torch

from ear.data.images import to_signed
from ear.data.prepared import PreparedImages
from ear.errors import UserError
from ear.tokenizer.autoencoder import PCA

_IMAGES = 20_000  # at most, the first of the training images, which are stored shuffled
_BATCH = 1 << 20  # pixels at once
_SMALLEST = 1e-9  # share of the largest eigenvalue, below which a variance is rounding error


def fit_pca(images: PreparedImages, *, downsample: int, channels: int, whitening: float) -> PCA:
    """The first `channels` principal components of all patches of `downsample` pixels a side.

    Component k is scaled by its standard deviation to the power of -whitening: with 0, distances between latents are
    those between pixels; with 1, all channels have the same variance. Raises UserError if the patches have fewer
    components: grey images have downsample^2.
    """
    size = 3 * downsample**2
    count, total, products = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    used, step = min(len(images), _IMAGES), max(1, _BATCH // images.image_size**2)
    for start in range(0, used, step):
        batch = to_signed(images.images(range(start, min(start + step, used))))
        patches = torch.nn.functional.pixel_unshuffle(batch, downsample).movedim(1, -1).reshape(-1, size).double()
        count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    variances, vectors = variances.flip(0), vectors.flip(1).T
    rank = int((variances > _SMALLEST * variances[0]).sum())
    if channels > rank:
        raise UserError(
            f"tokenizer.channels is {channels}, but patches of {downsample} pixels a side of the training images have "
            f"{rank} components; lower it."
        )
    chosen = vectors[:channels]
    signs = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()  # a component has no sign of its own
    tokenizer = PCA(image_size=images.image_size, downsample=downsample, channels=channels)
    tokenizer.mean.copy_(mean)
    tokenizer.components.copy_(chosen * signs)
    tokenizer.scale.copy_(variances[:channels].pow(-whitening / 2))
    return tokenizer
