"""Training of an autoencoder: what one step is made of."""

import numpy as np
import pytest
import torch
from factories import section
from prepared_sets import pixels, write_prepared
from processes import together

from ear.data.prepared import PreparedImages
from ear.runtime import distributed, randomness
from ear.tokenizer.autoencoder import kl_structure, new_kl
from ear.tokenizer.loss import AutoencoderLoss
from ear.tokenizer.training import AutoencoderTraining, Objective

pytestmark = pytest.mark.usefixtures("one_thread")
STRUCTURE = kl_structure(channels=3, block_channels=[8, 16], layers=1)


def training(folder, *, size: int = 8, **options) -> AutoencoderTraining:
    write_prepared(folder, pixels(20, size=size), (16,), 4)
    return AutoencoderTraining(
        new_kl(seed=0, image_size=size, structure=STRUCTURE),
        section("tokenizer", learning_rate=1e-3, ema_decay=0.9, batch_size=8, **options),
        images=PreparedImages(folder, "train"),
        held_out=PreparedImages(folder, "val"),
        objective=Objective(AutoencoderLoss(1e-6), seed=0, device=torch.device("cpu")),
    )


def test_a_step_is_the_mean_over_its_micro_batches(tmp_path):
    trained = training(tmp_path / "prepared", images=8, micro_batch_size=4)
    tokenizer = new_kl(seed=0, image_size=8, structure=STRUCTURE)
    rows = randomness.DataOrder(16, 0).indices(0, 8).numpy()

    def pixels_at(at: int) -> torch.Tensor:
        return trained.objective.signed(torch.from_numpy(trained.images.images(rows[at : at + 4])))

    losses = [trained.objective.terms(tokenizer, pixels_at(at), "training", at).loss for at in (0, 4)]
    sum(loss / 2 for loss in losses).backward()
    norm = torch.stack([p.grad.norm() for p in tokenizer.parameters()]).norm()
    _, history = trained.run(tmp_path / "checkpoints")
    (step,) = history.training
    assert step["loss"] == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=1e-5)
    assert step["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_critic_takes_one_step_for_all_micro_batches(tmp_path, monkeypatch):
    options = {"adversarial_weight": 0.5, "adversarial_start": 8, "images": 24, "micro_batch_size": 4}
    trained = training(tmp_path / "prepared", size=24, **options)
    steps, step = [], trained.critic.step
    monkeypatch.setattr(trained.critic, "step", lambda position: (steps.append(position), step(position)))
    _, history = trained.run(tmp_path / "checkpoints")
    assert steps == [0, 8, 16]
    counted = {int(state["step"]) for state in trained.critic.optimizer.state.values()}
    assert counted == {2}  # it learns from image 4 on, and so from the second step on
    assert history.training[-1]["adversarial_weight"] > 0


@pytest.mark.parametrize("critic", [False, True])
def test_two_processes_train_the_same_tokenizer(tmp_path, critic):
    options = {"adversarial_weight": 0.5, "adversarial_start": 8} if critic else {}
    size = 24 if critic else 8

    def trained(name: str) -> tuple:
        each = training(tmp_path / f"{name}{distributed.rank()}", size=size, images=24, micro_batch_size=4, **options)
        tokenizer, history = each.run(tmp_path / name)
        return [p.detach().numpy() for p in tokenizer.parameters()], history

    (alone, history), (first, second) = trained("one"), together(lambda: trained("two"))
    for mine, its, other in zip(alone, first[0], second[0], strict=True):
        np.testing.assert_allclose(its, mine, atol=2e-5)
        assert np.array_equal(its, other)
    for row, expected in zip(first[1].validation, history.validation, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_micro_batches_that_processes_cannot_share_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    with pytest.raises(ValueError, match=r"tokenizer\.micro_batch_size is 4, but must divide 2, .*; set it to 2"):
        training(tmp_path / "prepared", images=8, micro_batch_size=4)


def test_bfloat16_follows_float32_and_leaves_loss_and_gradients_in_float32(tmp_path):
    trained = training(tmp_path / "prepared", images=8, micro_batch_size=4)
    images = trained.objective.signed(torch.from_numpy(pixels(4)))
    found = {}
    for precision in ("float32", "bfloat16"):
        trained.objective.precision = precision
        trained.tokenizer.zero_grad()
        terms = trained.objective.terms(trained.tokenizer, images, "training", 0)
        terms.loss.backward()
        assert terms.loss.dtype == terms.decoded.dtype == torch.float32
        norm = torch.stack([p.grad.norm() for p in trained.tokenizer.parameters()]).norm()
        found[precision] = terms.loss.item(), norm.item()
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.03)
    assert found["bfloat16"] != found["float32"]
