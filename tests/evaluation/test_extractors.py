"""The classifier, both extractors under torch-fidelity, and the way of images from HDF5 to features."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from factories import section
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ear.data.images import to_signed
from ear.evaluation import extractors, metrics
from ear.evaluation.classifier import Classifier, load_classifier, save_classifier, shifted
from ear.evaluation.extraction import Batch, extract, gather
from ear.evaluation.extractors import open_extractor, save_inception
from ear.evaluation.reference import Reference
from ear.evaluation.statistics import Moments, class_accuracy
from ear.files.digests import sha256
from ear.files.tensors import write_tensors
from ear.runtime.randomness import stream

torch.set_num_threads(1)
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, 3), dtype=np.uint8)


class InMemory:
    """A source of images whose labels alternate."""

    def __init__(self, images: np.ndarray):
        self._images, self.labels = images, np.arange(len(images)) % 2

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: range) -> np.ndarray:
        return self._images[rows.start : rows.stop]


def features_of(images: np.ndarray, extractor, batch_size: int, folder: Path) -> Batch:
    source = InMemory(images)
    batches = extract(source, extractor=extractor, batch_size=batch_size, title="samples", folder=folder)
    return gather(batches, len(images))


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(2, 8).initialise(generator()).eval()


@pytest.fixture
def extractor(classifier, tmp_path):
    save_classifier(tmp_path / "extractor.safetensors", classifier, classes=["a", "b"])
    return open_extractor(tmp_path / "extractor.safetensors", CPU)


def test_damaged_features_are_extracted_again(extractor, tmp_path):
    images = pictures(6)
    whole = features_of(images, extractor, 2, tmp_path / "kept")
    first = min((tmp_path / "kept").rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:50])
    again = features_of(images, extractor, 2, tmp_path / "kept")
    assert torch.equal(again.features, whole.features)


@pytest.mark.parametrize("size", [4, 5, 16, 64])
def test_classifier_takes_any_size_from_4_on(size):
    found, logits = Classifier(7, size).initialise(generator())(torch.zeros(3, 3, size, size))
    assert found.shape == (3, 64)
    assert logits.shape == (3, 7)


def test_classifier_sees_each_image_alone(classifier):
    images = to_signed(pictures(6))
    together, alone = classifier(images)[0], torch.cat([classifier(image)[0] for image in images.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_weights_depend_on_the_generator_alone():
    first, second, other = (Classifier(3, 8).initialise(generator(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_shifts_move_whole_images_by_a_pixel_and_repeat_edges():
    images = torch.rand(64, 3, 8, 8, generator=generator())
    moved = shifted(images, stream(1))
    assert torch.equal(moved, shifted(images, stream(1)))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    crops = torch.stack([padded[:, :, r : r + 8, c : c + 8] for r in range(3) for c in range(3)])
    matches = (crops == moved).all(4).all(3).all(2)  # [9, N]
    assert matches.any(0).all()
    assert matches.any(1).all()  # each of the nine shifts occurs


def test_classifier_learns(classifier):
    bright = torch.rand(32, 3, 8, 8, generator=generator())
    images = torch.cat([bright - 1, bright])
    labels = torch.arange(64) // 32
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for step in range(20):
        optimizer.zero_grad()
        classifier.loss(images, labels, stream(step)).backward()
        optimizer.step()
    assert class_accuracy(classifier(images)[1], labels) == 1


def test_extractor_gives_the_classifiers_values(classifier, extractor):
    images = pictures(5)
    found, logits = extractor(images)
    expected = classifier(to_signed(images))
    torch.testing.assert_close((found, logits), expected)
    assert extractor.name == "ear-classifier"
    assert extractor.dimension == 64
    assert not extractor.published


def test_extractor_refuses_another_size(extractor):
    with pytest.raises(ValueError, match="images are 16 x 16 pixels, but ear-classifier was trained on 8 x 8"):
        extractor(pictures(2, size=16))


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index]).movedim(-1, 0)


def test_torch_fidelity_agrees_from_images_to_figures(extractor, tmp_path):
    """Its own whole path, with our extractor by name, gives our figures."""
    generated, real = pictures(40), pictures(50, seed=1) // 2
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(generated),
        input2=Pictures(real),
        feature_extractor="ear-classifier",
        feature_extractor_weights_path=str(tmp_path / "extractor.safetensors"),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=20,
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    ours = features_of(generated, extractor, 16, tmp_path / "passes")
    found, _ = extractor(real)
    moments = Moments()
    moments.add(found)
    figures = metrics.compare(
        ours.features,
        ours.logits,
        Reference(moments.gaussian(), found, moments.gaussian(), {}),
        section("evaluate", kid_subset_size=20, neighborhood=3, seed=2020),
    )
    assert figures["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert figures["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert figures["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert (figures["precision"], figures["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_images_come_in_order_whatever_the_batch(extractor, tmp_path):
    images = pictures(10)
    small, large = (features_of(images, extractor, size, tmp_path / f"{size}") for size in (3, 10))
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(large.features, extractor(images)[0])
    assert small.labels.tolist() == [0, 1] * 5


def test_a_killed_pass_looks_at_the_missing_images_alone(extractor, tmp_path):
    images, looked, forward = pictures(10), [], extractor.module.forward

    def stopping(batch):
        looked.append(len(batch))
        if len(looked) == 3:
            raise KeyboardInterrupt
        return forward(batch)

    whole = features_of(images, extractor, 3, tmp_path / "whole")
    extractor.module.forward = stopping
    with pytest.raises(KeyboardInterrupt):
        features_of(images, extractor, 3, tmp_path / "killed")
    again = features_of(images, extractor, 3, tmp_path / "killed")
    assert looked == [3, 3, 3, 3, 1]
    assert all(torch.equal(*parts) for parts in zip(again, whole, strict=True))


def test_features_of_another_extractor_are_not_taken_for_its_own(extractor, tmp_path):
    before = features_of(pictures(4), extractor, 4, tmp_path)
    save_classifier(tmp_path / "other", Classifier(2, 8).initialise(generator(1)), classes=["a", "b"])
    after = features_of(pictures(4), open_extractor(tmp_path / "other", CPU), 4, tmp_path)
    assert not torch.equal(before.features, after.features)


def test_an_empty_set_of_images_is_refused(extractor, tmp_path):
    with pytest.raises(ValueError, match="samples: there are no images"):
        features_of(pictures(0), extractor, 3, tmp_path)


def test_non_finite_features_name_the_image(extractor, tmp_path):
    extractor.module.classifier.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="samples: the features of image 0 are infinite or NaN"):
        features_of(pictures(6), extractor, 4, tmp_path)


def test_files_that_describe_no_extractor_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, {"name": "other"})
    with pytest.raises(ValueError, match="describes no feature extractor"):
        open_extractor(path, CPU)
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(path)
    description = {"name": "ear-classifier", "classes": ["a"], "image_size": 8}
    write_tensors(path, {"a": torch.zeros(1)}, description)
    with pytest.raises(ValueError, match="classifier of another structure"):
        load_classifier(path)


def test_absent_inception_weights_are_one_clear_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"reference\.weights is 'nowhere\.pth', which does not exist"):
        save_inception(tmp_path / "extractor.safetensors", weights="nowhere.pth")


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(.*name it in reference.weights"):
        extractors.inception_weights("")


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_weights_that_run_code_are_refused(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Harmful()}, path)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as plain weights"):
        extractors.inception_weights(str(path))
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as plain weights"):
        extractors.inception_weights(str(path))
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_network_are_refused(tmp_path):
    path, description = tmp_path / "weights.pth", tmp_path / "extractor.safetensors"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match=r"weights\.pth is a list, but must be a dict of tensors by name"):
        save_inception(description, weights=str(path))
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    save_inception(description, weights=str(path))
    with pytest.raises(
        ValueError, match=r"weights\.pth holds other tensors than inception-v3-compat has; give weights-"
    ):
        open_extractor(description, CPU)


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A weights file of the right names and shapes, with torch's initial values."""
    empty, path = tmp_path / "empty.pth", tmp_path / "weights.pth"
    torch.save({}, empty)
    torch.manual_seed(0)
    with monkeypatch.context() as context:
        context.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(empty))
    torch.save(module.state_dict(), path)
    return path


def test_inception_from_a_file_in_the_format_of_old_torch(tmp_path, inception_weights):
    """torch before 1.6 did not write zip archives, and the published weights may be that old."""
    description, old = tmp_path / "extractor.safetensors", tmp_path / "old.pth"
    content = torch.load(inception_weights, weights_only=True)
    torch.save(content, old, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(old)
    save_inception(description, weights=str(old))
    module = open_extractor(description, CPU).module
    assert torch.equal(module.state_dict()["fc.weight"], content["fc.weight"])


def test_inception_from_a_file(tmp_path, inception_weights):
    description = tmp_path / "extractor.safetensors"
    save_inception(description, weights=str(inception_weights))
    extractor = open_extractor(description, CPU)
    found, logits = extractor(pictures(2, size=16))
    assert found.shape == (2, extractor.dimension) == (2, 2048)
    assert logits.shape == (2, 1008)
    assert found.isfinite().all()
    assert extractor.sha256 == sha256(inception_weights)
    assert not extractor.published  # right form, other values
    content = torch.load(inception_weights, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in content.items()}, inception_weights)
    with pytest.raises(ValueError, match="has changed since the reference stage used it"):
        open_extractor(description, CPU)
