"""The trained digits model that ships with the repository."""

from pathlib import Path

import numpy as np
from repositories import committed

import ear

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/digits.safetensors"


def test_it_is_small_and_has_the_metrics_of_the_committed_evaluation():
    assert MODEL.stat().st_size < 10e6
    metrics, figures = ear.load_pipeline(MODEL).metrics, committed("data/evaluation/metrics.json")
    assert metrics["FID-1k"] == figures["fid"]
    assert metrics["class_accuracy"] == figures["class_accuracy"]


def test_it_draws_digits():
    """A real digit of the class is nearer to its images, on average, than any other class's mean."""
    from sklearn.datasets import load_digits

    real = load_digits()
    means = np.stack([real.images[real.target == k].mean(0) for k in range(10)]) * 255 / 16
    pipeline = ear.load_pipeline(MODEL)
    labels = [k for k in range(10) for _ in range(8)]
    images = pipeline.generate(labels, seed=1)[..., 0].astype(float)
    nearest = ((images[:, None] - means[None]) ** 2).mean((2, 3)).argmin(1)
    assert (nearest == np.array(labels)).mean() > 0.75
