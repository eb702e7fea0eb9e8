"""Figures that compare generated with real images in a feature space.

Frechet distance (Heusel et al. 2017, "GANs trained by a two time-scale update rule"), Inception score (Salimans et al.
2016), kernel distance (Binkowski et al. 2018) and improved precision and recall (Kynkaanniemi et al. 2019), from
features extracted elsewhere, as torch-fidelity defines them (tests compare). N is a number of images, D of features, K
of classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_prc

from ear.records import read_tensors, sha256, write_tensors

REFERENCE_ROWS = 10_000  # real images behind precision, recall and kernel distance, as in ADM's ImageNet reference
FRECHET_METHOD = "float64 sums; eigenvalues of sigma1 sigma2; biased upward where images are few"
_SPLITS = 10  # of the Inception score
_SUBSETS = 100  # of the kernel distance
_FLOOR_SUBSET = 1000  # images per subset of the floor's kernel distance, at most
_ROWS_AT_ONCE = 1000  # of features in float64, and of the distance matrix of precision and recall


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features."""

    mu: Tensor  # float64 [D]
    sigma: Tensor  # float64 [D, D], unbiased


class Moments:
    """Sums of features in float64, batch by batch, so that no set has to fit in memory."""

    def __init__(self):
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._outer: Tensor | float = 0.0

    def add(self, features: Tensor) -> None:
        """Count in float [n, D]; equal batches in equal order give equal bits."""
        rows = features.double()
        self.count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._outer = self._outer + rows.T @ rows

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all that was added; raises ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"a covariance of features needs at least 2 images, and there are {self.count}; add more.")
        mu = self._sum / self.count
        return Gaussian(mu, (self._outer - self.count * torch.outer(mu, mu)) / (self.count - 1))


@dataclass(frozen=True)
class Reference:
    """What is kept of the real images: statistics of all of them, features of some, and a description."""

    gaussian: Gaussian
    features: Tensor  # float32 [rows, D], for the kernel distance, precision and recall
    held_out: Gaussian  # of the held-out real images, which reconstructions of these are compared with
    description: dict

    def save(self, path: str | Path) -> None:
        """Write tensors mu, sigma, features, held_out_mu and held_out_sigma, and the description."""
        held_out = {f"held_out_{name}": tensor for name, tensor in vars(self.held_out).items()}
        write_tensors(path, {**vars(self.gaussian), "features": self.features, **held_out}, self.description)

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read what `save` wrote; raises FileNotFoundError or ValueError."""
        tensors, description = read_tensors(path)
        names = ("mu", "sigma", "features", "held_out_mu", "held_out_sigma")
        if tensors.keys() != set(names):
            raise ValueError(f"{path} holds {sorted(tensors)}, not {', '.join(names)}; run the reference stage again.")
        mu, sigma, features, *held_out = (tensors[name] for name in names)
        return cls(Gaussian(mu, sigma), features, Gaussian(*held_out), description)

    def check(self, *, extractor_sha256: str, image_size: int, classes: list[str]) -> None:
        """Raise ValueError unless generated images of this size and these classes can be compared with it."""
        ours = self.description
        if extractor_sha256 != ours["extractor_sha256"]:
            raise ValueError(
                f"the reference features were made by extractor {ours['extractor_sha256'][:12]}, not by the present "
                f"one, {extractor_sha256[:12]}; run the reference stage again."
            )
        if image_size != ours["image_size"]:
            raise ValueError(
                f"the generated images have {image_size} pixels a side, but the reference images {ours['image_size']}; "
                "run the stages again from prepare on."
            )
        if classes != ours["classes"]:
            raise ValueError(
                f"the generated images have {len(classes)} classes ({', '.join(classes[:3])}, ...), but the reference "
                f"images {len(ours['classes'])} ({', '.join(ours['classes'][:3])}, ...); run the stages again from "
                "prepare on."
            )


@dataclass(frozen=True)
class Summary:
    """What one pass over a set of images leaves."""

    gaussian: Gaussian  # of all of them
    features: Tensor  # float32 [rows, D], of some at even distances
    accuracy: float  # share of images whose largest logit is that of their label


def evenly(images: int, rows: int) -> Tensor:
    """Numbers of `rows` of the images (of all, if there are no more) at even distances, int64."""
    rows = min(rows, images)
    return torch.arange(rows) * images // rows


def summarise(batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, images: int, rows: int) -> Summary:
    """One pass over (features [n, D], logits [n, K], labels [n]) of all `images`; at most `rows` features are kept."""
    chosen = evenly(images, rows)
    moments, kept, hits = Moments(), [], 0.0
    for features, logits, labels in batches:
        first, last = torch.searchsorted(chosen, torch.tensor([moments.count, moments.count + len(features)]))
        kept.append(features[chosen[first:last] - moments.count])
        hits += class_accuracy(logits, labels) * len(labels)
        moments.add(features)
    assert moments.count == images, f"{moments.count} features for {images} images"
    return Summary(moments.gaussian(), torch.cat(kept), hits / images)


def read_statistics(path: str | Path, *, dimension: int) -> tuple[Gaussian, str]:
    """(mean and covariance, SHA-256) of an npz file with mu [D] and sigma [D, D], as published for ImageNet with ADM.

    Raises FileNotFoundError, or ValueError where the file is no such npz or D is not `dimension`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"reference.statistics is {str(path)!r}, which does not exist; give the path of an npz, or set "
            "reference.statistics to '' to use the training images."
        )
    arrays = _open_npz(path)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}, only {sorted(arrays)}; statistics hold mu and sigma.")
    shapes = {"mu": (dimension,), "sigma": (dimension, dimension)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {list(arrays[name].shape)}, but the extractor has {dimension} features, "
                f"which needs {list(shape)}; use statistics of the same extractor."
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} holds infinite or NaN values; get the file again.")
    tensors = {name: torch.from_numpy(arrays[name].astype(np.float64)) for name in shapes}
    return Gaussian(**tensors), sha256(path)


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays mu and sigma where present (an npz may also hold thousands of images, which stay on disk)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in ("mu", "sigma")}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, BadZipFile) as error:
        raise ValueError(f"{path} is not a readable npz file ({error}); get the file again.") from error


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), equation 6 of Heusel et al."""
    statistics = [{"mu": g.mu.double().numpy(), "sigma": g.sigma.double().numpy()} for g in (first, second)]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: Tensor, *, seed: int) -> tuple[float, float]:
    """(mean, standard deviation) over 10 random splits of exp(E KL(p(y|x) || p(y))), from logits [N, K].

    Needs at least 10 images. The splits are torch-fidelity's, taken one by one to save memory.
    """
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    ends = [k * len(logits) // _SPLITS for k in range(_SPLITS + 1)]
    scores = [
        metric_isc.isc_features_to_metric(logits[order[start:end]], splits=1, shuffle=False)
        for start, end in pairwise(ends)
    ]
    return _spread([score[metric_isc.KEY_METRIC_ISC_MEAN] for score in scores])


def kernel_distance(generated: Tensor, real: Tensor, *, subset_size: int, seed: int) -> tuple[float, float]:
    """(mean, standard deviation) over 100 random subsets of the squared MMD, kernel (x.y / D + 1)^3; [N, D] each.

    Unbiased, so that values slightly below 0 are valid. A subset must not be larger than a set. The subsets are
    torch-fidelity's; only their rows are widened to float64.
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
    """The unbiased estimate from x and y, [n, D] each."""
    n, dimension = x.shape
    xx, yy, xy = ((a @ b.T / dimension + 1).pow(3) for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * xy.mean()


def _spread(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values))


def precision_recall(generated: Tensor, real: Tensor, *, neighborhood: int) -> tuple[float, float]:
    """(precision, recall) in [0, 1]: the shares of generated and of real images within the other set's manifold.

    The manifold is the union of balls that reach to each image's `neighborhood`-th nearest neighbour; [N, D] each.
    Each set needs more images than `neighborhood`. Distances are float32, as features are.
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


def floor(reference: Reference, held_out: Summary, *, seed: int) -> dict[str, float]:
    """fid and kid between real images and real held-out ones: what a perfect generator of as many images would get."""
    size = min(_FLOOR_SUBSET, len(held_out.features), len(reference.features))
    mean, deviation = kernel_distance(held_out.features, reference.features, subset_size=size, seed=seed)
    return {
        "fid": frechet_distance(held_out.gaussian, reference.gaussian),
        "kid": mean,
        "kid_std": deviation,
        "kid_subset_size": size,
    }


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share in [0, 1] of images whose largest logit [N, K] is that of their label [N]."""
    return (logits.argmax(1) == labels).double().mean().item()


def check_counts(*, generated: int, real: int, kid_subset_size: int, neighborhood: int) -> None:
    """Raise ValueError where there are too few generated or real images for a figure of `compare`."""
    fewest = min(generated, real)
    have = f"but there are {generated} generated and {real} real images"
    if generated < _SPLITS:
        raise ValueError(
            f"there are {generated} generated images, but the Inception score averages over {_SPLITS} splits; raise "
            f"sample.count to {_SPLITS} or more."
        )
    if kid_subset_size > fewest:
        raise ValueError(f"evaluate.kid_subset_size is {kid_subset_size}, {have}; set it to {fewest} or less.")
    if neighborhood >= fewest:
        raise ValueError(f"evaluate.neighborhood is {neighborhood}, {have}; set it below {fewest}.")


def compare(
    features: Tensor,  # of generated images, float32 [N, D]
    logits: Tensor,  # of generated images, float32 [N, K]
    reference: Reference,
    *,
    kid_subset_size: int,
    neighborhood: int,
    seed: int,
) -> dict[str, float]:
    """All figures by name; `check_counts` says what they need."""
    moments = Moments()
    for part in features.split(_ROWS_AT_ONCE):
        moments.add(part)
    score, score_std = inception_score(logits, seed=seed)
    kid, kid_std = kernel_distance(features, reference.features, subset_size=kid_subset_size, seed=seed)
    precision, recall = precision_recall(features, reference.features, neighborhood=neighborhood)
    return {
        "fid": frechet_distance(moments.gaussian(), reference.gaussian),
        "inception_score": score,
        "inception_score_std": score_std,
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
    }


def across(blocks: list[dict[str, float]]) -> dict:
    """Figures of seed blocks => their means and, where there are several blocks, the `range` of each, [least, most]."""
    columns = {name: [block[name] for block in blocks] for name in blocks[0]}
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    ranges = {name: [min(values), max(values)] for name, values in columns.items()}
    return means | ({"range": ranges} if len(blocks) > 1 else {})


def reconstruction(batches: Iterable[tuple[Tensor, ...]], reference: Reference) -> dict[str, float]:
    """What the tokenizer alone does to held-out images, from the features of their reconstructions, batch by batch.

    rfid: Frechet distance to the held-out images themselves. rfid_train: to the reference, as `fid` is measured.
    images: how many there are.
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
