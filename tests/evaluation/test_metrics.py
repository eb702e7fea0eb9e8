"""Every figure against a formula written out here in numpy."""

import numpy as np
import pytest
import torch
from factories import section

from ear.config import checks
from ear.evaluation import metrics
from ear.evaluation.reference import Reference, Summary, read_statistics, summarise
from ear.evaluation.statistics import Gaussian, Moments, class_accuracy
from ear.files.digests import sha256

torch.set_num_threads(1)


def cloud(rows: int, dimension: int = 8, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Correlated normal rows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(99))
    return torch.randn(rows, dimension, generator=generator) @ mixing + shift


def gaussian(features: torch.Tensor) -> Gaussian:
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def reference(features: torch.Tensor, **changes) -> Reference:
    source = {"name": "data/prepared", "images": 20, "statistics_sha256": None}
    description = source | {"extractor_sha256": "a" * 64, "image_size": 16, "classes": ["0", "1"]}
    return Reference(gaussian(features), features, gaussian(features), description | changes)


def test_moments_in_batches_are_numpys_mean_and_covariance():
    features = cloud(100)
    moments = Moments()
    for batch in features.split(32):
        moments.add(batch)
    ours = moments.gaussian()
    np.testing.assert_allclose(ours.mu, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.sigma, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)
    assert ours.sigma.dtype == torch.float64


def test_moments_of_one_image_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, and there are 1"):
        gaussian(cloud(1))


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


@pytest.mark.parametrize("rows", [500, 6])  # 6 rows: singular covariances
def test_frechet_distance_equals_the_symmetric_form(rows):
    a, b = gaussian(cloud(rows)), gaussian(cloud(rows, seed=1, shift=0.3) * 1.4)
    half = root(a.sigma.numpy())
    cross = np.linalg.eigvalsh(half @ b.sigma.numpy() @ half).clip(0)
    expected = float(((a.mu - b.mu) ** 2).sum() + a.sigma.trace() + b.sigma.trace() - 2 * np.sqrt(cross).sum())
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    one = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    other = Gaussian(torch.full((3,), 2.0).double(), 9 * torch.eye(3).double())
    assert metrics.frechet_distance(one, other) == pytest.approx(3 * (2**2 + (3 - 1) ** 2))
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_params_yaml_knows_the_splits_of_the_inception_score():
    assert checks._INCEPTION_SPLITS == metrics.INCEPTION_SPLITS


def test_inception_score_equals_its_formula():
    logits = 3 * cloud(100, dimension=5)
    shuffled = logits.double()[np.random.RandomState(7).permutation(100)]
    scores = []
    for part in shuffled.softmax(1).numpy().reshape(10, 10, 5):
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    mean, deviation = metrics.inception_score(logits, seed=7)
    assert (mean, deviation) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert metrics.inception_score(torch.zeros(50, 4), seed=0) == pytest.approx((1, 0))


def test_kernel_distance_equals_the_unbiased_formula():
    x, y = cloud(40), cloud(40, seed=1, shift=0.5)

    def kernel(a, b):
        return (a.double().numpy() @ b.double().numpy().T / 8 + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (40 * 39) for k in (kernel(x, x), kernel(y, y))]
    mean, deviation = metrics.kernel_distance(x, y, subset_size=40, seed=0)
    assert mean == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)  # every subset is the whole set


def test_kernel_distance_depends_on_the_seed_alone():
    x, y = cloud(60), cloud(50, seed=1)
    first = metrics.kernel_distance(x, y, subset_size=20, seed=3)
    assert first == metrics.kernel_distance(x, y, subset_size=20, seed=3)
    assert first != metrics.kernel_distance(x, y, subset_size=20, seed=4)


def share_within(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    inner = np.linalg.norm(centres[:, None] - centres, axis=-1)
    radii = np.sort(inner, axis=1)[:, k]
    outer = np.linalg.norm(points[:, None] - centres, axis=-1)
    return (outer <= radii).any(1).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(k):
    generated, real = 0.5 * cloud(70), cloud(90, seed=1)
    expected = share_within(generated.numpy(), real.numpy(), k), share_within(real.numpy(), generated.numpy(), k)
    assert metrics.precision_recall(generated, real, neighborhood=k) == pytest.approx(expected)
    assert expected[0] > expected[1]  # a shrunken cloud is precise and misses the rim


def test_precision_and_recall_of_far_and_of_equal_sets():
    real = cloud(30)
    assert metrics.precision_recall(real + 1000, real, neighborhood=3) == (0, 0)
    assert metrics.precision_recall(real, real, neighborhood=3) == (1, 1)


def test_the_nearest_distance_is_the_brute_force_median_and_small_for_copies():
    generated, training = cloud(2500), cloud(300, seed=1)
    distances = np.linalg.norm(generated.numpy()[:, None] - training.numpy(), axis=-1).min(1)
    expected = np.sort(distances)[(len(distances) - 1) // 2]
    assert metrics.nearest_distance(generated, training) == pytest.approx(expected, rel=1e-4)
    copies = training[torch.arange(200) % 300] + 0.01 * cloud(200, seed=2)
    assert metrics.nearest_distance(copies, training) < 0.1 * expected


def test_class_accuracy():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 0.0], [0.0, 1.0]])
    assert class_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75


@pytest.mark.parametrize("batch", [7, 100])
def test_summary_keeps_rows_at_even_distances(batch):
    features = torch.arange(100.0)[:, None] + torch.tensor([0.0, 0.5])
    logits, labels = torch.eye(2)[torch.arange(100) % 2], torch.zeros(100, dtype=torch.long)
    batches = zip(features.split(batch), logits.split(batch), labels.split(batch), strict=True)
    summary = summarise(batches, images=100, rows=8)
    assert summary.features[:, 0].tolist() == [0, 12, 25, 37, 50, 62, 75, 87]
    assert summary.accuracy == pytest.approx(0.5)
    torch.testing.assert_close(summary.gaussian.mu, torch.tensor([49.5, 50.0]).double())


def test_summary_keeps_all_of_a_small_set():
    features = cloud(5)
    summary = summarise([(features, torch.zeros(5, 2), torch.ones(5))], images=5, rows=100)
    assert torch.equal(summary.features, features)


def test_compare_gives_every_figure_and_repeats_itself():
    generated, real = cloud(100), cloud(120, seed=1)
    settings = section("evaluate", kid_subset_size=50, neighborhood=3, seed=1)
    figures = metrics.compare(generated, generated, reference(real), settings)
    assert figures["fid"] == metrics.frechet_distance(gaussian(generated), gaussian(real))
    assert list(figures) == [
        "fid",
        "inception_score",
        "inception_score_std",
        "kid",
        "kid_std",
        "precision",
        "recall",
        "nearest",
    ]
    assert figures == metrics.compare(generated, generated, reference(real), settings)


def check(*, generated: int, real: int, **options) -> None:
    metrics.check_counts(section("evaluate", **options), generated=generated, real=real)


def test_floor_is_small_for_one_distribution_and_uses_subsets_that_fit():
    real, held_out = cloud(400), cloud(150, seed=1)
    summary = Summary(gaussian(held_out), held_out, 0.9)
    floor = metrics.floor(reference(real), summary, seed=0)
    assert floor["kid_subset_size"] == 150
    assert floor["nearest"] == metrics.nearest_distance(held_out, real)
    assert 0 < floor["fid"] < 0.05 * metrics.frechet_distance(gaussian(real + 2), gaussian(held_out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"generated": 9},
            "a block has 9 generated images, but the Inception score .* raise sample.count, or lower evaluate.repeats",
        ),
        ({"kid_subset_size": 21}, "evaluate.kid_subset_size is 21, .* 30 generated and 20 real images; set it to 20"),
        ({"neighborhood": 20}, "evaluate.neighborhood is 20, .* set it below 20"),
    ],
)
def test_too_few_images_are_named(changes, message):
    counts = {"generated": 30, "real": 20, "kid_subset_size": 20, "neighborhood": 3}
    check(**counts)
    with pytest.raises(ValueError, match=message):
        check(**(counts | changes))


def test_reference_survives_the_disk_byte_for_byte(tmp_path):
    written = reference(cloud(20))
    for name in ("a", "b"):
        written.save(tmp_path / name)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    read = Reference.load(tmp_path / "a")
    assert torch.equal(read.features, written.features)
    assert torch.equal(read.gaussian.sigma, written.gaussian.sigma)
    assert torch.equal(read.held_out.mu, written.held_out.mu)
    assert read.description == written.description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extractor_sha256": "b" * 64}, "made by extractor aaaaaaaaaaaa, not by the present one, bbbbbbbbbbbb"),
        ({"image_size": 32}, "32 pixels a side, but the reference images 16"),
        ({"classes": ["0"]}, r"1 classes \(0, ...\), but the reference images 2"),
    ],
)
def test_reference_refuses_what_it_cannot_be_compared_with(changes, message):
    fitting = {"extractor_sha256": "a" * 64, "image_size": 16, "classes": ["0", "1"]}
    reference(cloud(20)).check("the generated images", **fitting)
    with pytest.raises(ValueError, match=message):
        reference(cloud(20)).check("the generated images", **(fitting | changes))


def test_published_statistics_are_read(tmp_path):
    mu, sigma = np.arange(3.0, dtype=np.float32), np.eye(3)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    statistics, digest = read_statistics(tmp_path / "adm.npz", dimension=3)
    assert digest == sha256(tmp_path / "adm.npz")
    assert statistics.mu.tolist() == [0, 1, 2]
    assert statistics.mu.dtype == statistics.sigma.dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "has no array 'sigma'"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, r"mu has shape \[2\], but the extractor has 3 features"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, r"sigma has shape \[3, 2\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu holds infinite or NaN values"),
        ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "mu holds <U1, not numbers"),
        ({"mu": np.array([None] * 3), "sigma": np.eye(3)}, "not a readable npz"),  # would need pickle
    ],
)
def test_wrong_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / "wrong.npz", dimension=3)


def test_absent_and_broken_statistics_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"reference\.statistics is .* does not exist"):
        read_statistics(tmp_path / "absent.npz", dimension=3)
    for content in (b"not a zip", b""):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable npz"):
            read_statistics(tmp_path / "broken.npz", dimension=3)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not a readable npz"):
        read_statistics(tmp_path / "array.npy", dimension=3)


def test_figures_across_blocks_are_means_with_their_range():
    blocks = [{"fid": 2.0, "recall": 0.5}, {"fid": 4.0, "recall": 0.25}, {"fid": 3.0, "recall": 0.75}]
    assert metrics.across(blocks) == {"fid": 3.0, "recall": 0.5, "range": {"fid": [2.0, 4.0], "recall": [0.25, 0.75]}}
    assert metrics.across(blocks[:1]) == blocks[0]


def test_reconstructions_are_compared_with_their_originals_and_with_the_reference():
    train, held_out = cloud(400), cloud(300, seed=1)
    pair = Reference(gaussian(train), train, gaussian(held_out), {})
    exact = metrics.reconstruction([(part,) for part in held_out.split(64)], pair)
    assert exact["rfid"] == pytest.approx(0, abs=1e-9)
    assert exact["rfid_train"] == pytest.approx(metrics.frechet_distance(gaussian(held_out), gaussian(train)))
    shifted = metrics.reconstruction([(held_out + 1,)], pair)
    assert shifted["rfid"] == pytest.approx(8)  # |mu1 - mu2|^2 in 8 dimensions


def test_distances_at_equal_numbers_average_over_whole_blocks():
    rows = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.add(torch.randn(500, 4, generator=torch.Generator().manual_seed(1)))
    reference = Reference(moments.gaussian(), rows, moments.gaussian(), {})
    blocks = [metrics.frechet_distance_at(part, reference, images=30) for part in (rows[:30], rows[30:60])]
    assert metrics.frechet_distance_at(rows, reference, images=30) == pytest.approx(sum(blocks) / 2)  # 10 rows are left
    assert metrics.frechet_distance_at(rows, reference, images=70) < sum(blocks) / 2  # more images, less bias
    assert metrics.frechet_distance_at(rows, reference, images=71) is None
