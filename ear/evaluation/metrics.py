"""Metrics that compare generated with real images in a feature space.

Frechet distance (Heusel et al. 2017, "GANs trained by a two time-scale update rule"), Inception score (Salimans et al.
2016), kernel distance (Binkowski et al. 2018), improved precision and recall (Kynkaanniemi et al. 2019), as
torch-fidelity defines them (tests compare), and the distance to the nearest training image. N images, D features, K
classes.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_prc

from ear import config
from ear.errors import UserError
from ear.evaluation.reference import Reference, Summary
from ear.evaluation.statistics import Gaussian, Moments

INCEPTION_SPLITS = 10  # parts of the images that the Inception score averages over
FRECHET_METHOD = "float64 sums; eigenvalues of sigma1 sigma2; biased upward where images are few"
_FLOOR_SUBSET = 1000  # images per subset of the floor's kernel distance, at most
_SUBSETS = 100  # subsets of the kernel distance
_ROWS_AT_ONCE = (
    1000  # rows of features converted to float64 at once, and of the distance matrix of precision and recall
)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), equation 6 of Heusel et al."""
    statistics = [{"mu": g.mu.double().numpy(), "sigma": g.sigma.double().numpy()} for g in (first, second)]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: Tensor, *, seed: int) -> tuple[float, float]:
    """(mean, standard deviation) over 10 random splits of exp(E KL(p(y|x) || p(y))), from logits [N, K].

    Needs at least 10 images. The splits are torch-fidelity's, processed one by one to save memory.
    """
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    ends = [k * len(logits) // INCEPTION_SPLITS for k in range(INCEPTION_SPLITS + 1)]
    scores = [
        metric_isc.isc_features_to_metric(logits[order[start:end]], splits=1, shuffle=False)
        for start, end in pairwise(ends)
    ]
    return _spread([score[metric_isc.KEY_METRIC_ISC_MEAN] for score in scores])


def kernel_distance(generated: Tensor, real: Tensor, *, subset_size: int, seed: int) -> tuple[float, float]:
    """(mean, standard deviation) over 100 random subsets of the squared MMD, kernel (x.y / D + 1)^3; inputs [N, D].

    Unbiased, so values slightly below 0 are valid. A subset must not be larger than a set. The subsets are
    torch-fidelity's; only their rows are converted to float64.
    """
    random, distances = np.random.RandomState(seed), []
    for _ in range(_SUBSETS):
        x, y = (
            part[torch.from_numpy(random.choice(len(part), subset_size, replace=False))].double()
            for part in (generated, real)
        )
        distances.append(_squared_mmd(x, y).item())
    return _spread(distances)


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared MMD from x and y, [n, D] each."""
    n, dimension = x.shape
    xx, yy, xy = ((a @ b.T / dimension + 1).pow(3) for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * xy.mean()


def _spread(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values))


def precision_recall(generated: Tensor, real: Tensor, *, neighborhood: int) -> tuple[float, float]:
    """(precision, recall) in [0, 1]: shares of generated and of real images inside the other set's manifold.

    The manifold is the union of balls around all images, each reaching to the `neighborhood`-th nearest neighbour.
    Inputs [N, D], each with more images than `neighborhood`. Distances are float32, like features.
    """
    shares = metric_prc.prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=neighborhood,
        prc_batch_size=_ROWS_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )
    return shares[metric_prc.KEY_METRIC_PRECISION], shares[metric_prc.KEY_METRIC_RECALL]


def nearest_distance(features: Tensor, training: Tensor) -> float:
    """Median distance from an image to its nearest training image, from features [N, D] and [M, D].

    It detects only copies of the training images that are passed in.
    A model that repeats training images is much nearer to them than new real images are (Meehan et al. 2020, "A
    non-parametric test to detect data-copying in generative models").
    """
    parts = [torch.cdist(part, training).amin(dim=1) for part in features.float().split(_ROWS_AT_ONCE)]
    return float(torch.cat(parts).median())


def floor(reference: Reference, held_out: Summary, *, seed: int) -> dict[str, float]:
    """FID and KID between real training images and held-out ones: what a perfect generator of as many images gets.

    Held-out images have the training set's class proportions, but samples are class-balanced. If the classes are
    unequal in size, even a perfect generator therefore stays above the floor.

    nearest: `nearest_distance` of the held-out images.
    """
    size = min(_FLOOR_SUBSET, len(held_out.features), len(reference.features))
    mean, deviation = kernel_distance(held_out.features, reference.features, subset_size=size, seed=seed)
    return {
        "fid": frechet_distance(held_out.gaussian, reference.gaussian),
        "kid": mean,
        "kid_std": deviation,
        "kid_subset_size": size,
        "nearest": nearest_distance(held_out.features, reference.features),
    }


def frechet_distance_at(features: Tensor, reference: Reference, *, images: int) -> float | None:
    """The mean Frechet distance of disjoint blocks of `images` rows of features [N, D]; None if N is smaller.

    A Frechet distance is biased upwards, more so for fewer images, so compare distances only at equal numbers of
    images. To compare with the floor, let `images` be the number of held-out images.
    """
    blocks = [block for block in features.split(images) if len(block) == images]
    distances = []
    for block in blocks:
        moments = Moments()
        moments.add(block)
        distances.append(frechet_distance(moments.gaussian(), reference.gaussian))
    return float(np.mean(distances)) if distances else None


def check_counts(options: config.Evaluate, *, generated: int, real: int) -> None:
    """Raise UserError if there are too few generated or real images for a metric of `compare`.

    `config` already rejects too small a `sample.count` before anything runs; this checks the images that exist.
    """
    kid_subset_size, neighborhood = options.kid_subset_size, options.neighborhood
    fewest = min(generated, real)
    have = f"but there are {generated} generated and {real} real images"
    if generated < INCEPTION_SPLITS:
        raise UserError(
            f"a block has {generated} generated images, but the Inception score averages over {INCEPTION_SPLITS} "
            "splits; raise sample.count, or lower evaluate.repeats."
        )
    if kid_subset_size > fewest:
        raise UserError(f"evaluate.kid_subset_size is {kid_subset_size}, {have}; set it to {fewest} or less.")
    if neighborhood >= fewest:
        raise UserError(f"evaluate.neighborhood is {neighborhood}, {have}; set it below {fewest}.")


def compare(
    features: Tensor,  # of generated images, float32 [N, D]
    logits: Tensor,  # of generated images, float32 [N, K]
    reference: Reference,
    options: config.Evaluate,
    equal_images: int = 0,  # number of images behind the floor; 0: omit fid_equal
) -> dict[str, float]:
    """All metrics by name; `check_counts` says how many images they need.

    fid_equal is the distance at `equal_images` images; it is absent if there are fewer.
    """
    moments = Moments()
    for part in features.split(_ROWS_AT_ONCE):
        moments.add(part)
    score, score_std = inception_score(logits, seed=options.seed)
    kid, kid_std = kernel_distance(features, reference.features, subset_size=options.kid_subset_size, seed=options.seed)
    precision, recall = precision_recall(features, reference.features, neighborhood=options.neighborhood)
    equal = frechet_distance_at(features, reference, images=equal_images) if equal_images else None
    return {
        "fid": frechet_distance(moments.gaussian(), reference.gaussian),
        **({} if equal is None else {"fid_equal": equal}),
        "inception_score": score,
        "inception_score_std": score_std,
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        "nearest": nearest_distance(features, reference.features),
    }


def across(blocks: list[dict[str, float]]) -> dict:
    """Metrics of several blocks => their means and, if there are several, the `range` [smallest, largest] of each."""
    columns = {name: [block[name] for block in blocks] for name in blocks[0]}
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    ranges = {name: [min(values), max(values)] for name, values in columns.items()}
    return means | ({"range": ranges} if len(blocks) > 1 else {})


def reconstruction(batches: Iterable[tuple[Tensor, ...]], reference: Reference) -> dict[str, float]:
    """The effect of the tokenizer alone, from features of reconstructed held-out images, batch by batch.

    rfid: Frechet distance to the held-out images themselves. rfid_train: to the reference, like `fid`. images: their
    number.
    """
    moments = Moments()
    for features, *_ in batches:
        moments.add(features)
    gaussian = moments.gaussian()
    return {
        "rfid": frechet_distance(gaussian, reference.held_out),
        "rfid_train": frechet_distance(gaussian, reference.gaussian),
        "images": moments.count,
    }
