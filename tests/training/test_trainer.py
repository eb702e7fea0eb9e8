"""Checks that a training ends in the same state however it is divided, stopped, killed and resumed."""

import os
import signal
import time

import pytest
import torch
from processes import kill, together
from torch import nn

from ear.config.checks import check_shares
from ear.errors import UserError
from ear.files.tensors import read_tensors
from ear.files.weights import load_weights
from ear.runtime import distributed
from ear.runtime.randomness import generator
from ear.training import checkpoint
from ear.training.ema import Average, decay_at
from ear.training.gradients import SharedGradients
from ear.training.means import Means
from ear.training.optimizer import Group, MuonAdamW, adamw, orthogonalised, schedule, set_rate
from ear.training.trainer import Saving, Trainer, Validation

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(*, micro=4, rate=lambda images: 1.0, target=0.0, muon=False, **options) -> Trainer:
    """A linear map trained towards `target` on noise that is a function of the position; muon: for its matrix."""
    module = nn.Linear(3, 2)
    nn.init.normal_(module.weight, generator=generator(0, "weights"))
    nn.init.zeros_(module.bias)

    def loss(batch, position):
        assert batch == position
        rows = torch.cat([torch.randn(1, 3, generator=generator(1, "rows", position + i)) for i in range(micro)])
        error = (module(rows) - target).square().mean()
        return error, {"twice": 2 * error.detach()}

    groups, rates = [Group(list(module.parameters()), 0.0)], {"learning_rate": 0.05, "beta1": 0.9, "beta2": 0.95}
    optimizer = MuonAdamW(groups, [module.weight], **rates) if muon else adamw(groups, **rates)
    settings = {"clip_norm": 1e6, "global_batch_size": 8, "micro_batch_size": micro}
    averages = {"average": Average(module, 0.9)}
    return Trainer(module, optimizer=optimizer, averages=averages, loss=loss, rate=rate, **{**settings, **options})


def fit(t: Trainer, folder, total=400, saving=None, **options):
    """Train on batches that are their own positions."""
    saving = Saving(folder=folder, interval=64, **saving or {})
    t.fit(lambda positions: positions, total_images=total, saving=saving, **options)
    return t


def assert_same(a: Trainer, b: Trainer):
    first, second = a.state(), b.state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert repr(a.history) == repr(b.history)  # the order of the columns, too


def test_training_reduces_the_loss_and_logs_means(tmp_path):
    t = fit(trainer(), tmp_path)
    rows = t.history.training
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert [row["images"] for row in rows] == [200, 400]
    assert all(row["twice"] == pytest.approx(2 * row["loss"]) for row in rows)
    assert rows[0].keys() == {"images", "loss", "twice", "gradient_norm", "rate"}


def test_stopped_and_resumed_ends_in_the_same_state(tmp_path):
    whole = fit(trainer(), tmp_path / "whole")
    interrupted = trainer()
    loss = interrupted.loss

    def interrupt(batch, position):
        if position == 212:  # between two checkpoints
            raise KeyboardInterrupt
        return loss(batch, position)

    interrupted.loss = interrupt
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, tmp_path / "parts")
    assert_same(whole, fit(trainer(), tmp_path / "parts"))


def test_a_finished_training_goes_on_to_the_state_of_a_longer_one(tmp_path):
    options = {"validation": Validation(measure=lambda: {"loss": 1.0}, interval=96)}
    whole = fit(trainer(), tmp_path / "whole", **options)
    short = fit(trainer(), tmp_path / "parts", total=232, **options)
    assert [row["images"] for row in short.history.training] == [200, 232]
    assert [row["images"] for row in short.history.validation] == [96, 192, 232]
    assert_same(whole, fit(trainer(), tmp_path / "parts", **options))


def test_checkpoints_are_kept_at_their_interval_and_change_nothing(tmp_path):
    whole = fit(trainer(), tmp_path / "whole")
    saving = {"keep_interval": 100, "kept": tmp_path / "kept", "about": {"shape": "small"}}
    kept = fit(trainer(), tmp_path / "parts", saving=saving)
    assert_same(whole, kept)
    names = [f"checkpoint-{images:012d}.safetensors" for images in (104, 200, 304, 400)]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == names
    tensors, description = read_tensors(tmp_path / "kept" / names[1])
    assert (description["images"], description["about"]) == (200, {"shape": "small"})
    assert tensors["average.weight"].shape == (2, 3)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [names[2].replace("304", "384"), names[3]]


def test_accumulation_equals_one_pass(tmp_path):
    one, two = fit(trainer(micro=8), tmp_path / "a"), fit(trainer(micro=4), tmp_path / "b")
    torch.testing.assert_close(one.module.weight, two.module.weight, atol=1e-5, rtol=1e-5)
    # AdamW hides a wrong scale of the gradients; their norm, which clipping acts on, does not.
    norms = [[row["gradient_norm"] for row in t.history.training] for t in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_each_step_takes_the_rate_of_the_images_seen_before_it(tmp_path):
    rate = schedule("cosine", total_images=400, warmup_images=80)
    t, taken = trainer(rate=rate), []
    step = t.optimizer.step
    t.optimizer.step = lambda: (taken.append(t.optimizer.param_groups[0]["lr"]), step())
    fit(t, tmp_path)
    assert taken == pytest.approx([0.05 * rate(images) for images in range(0, 400, 8)])
    assert t.history.training[-1]["rate"] == pytest.approx(0.05 * rate(392))


def test_damaged_newest_checkpoint_falls_back(tmp_path, capsys):
    whole = fit(trainer(), tmp_path / "whole")
    fit(trainer(), tmp_path / "parts", total=256)
    newest = sorted((tmp_path / "parts").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert_same(whole, fit(trainer(), tmp_path / "parts"))
    assert "Falling back" in capsys.readouterr().out


def test_only_two_checkpoints_are_kept(tmp_path):
    fit(trainer(), tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "checkpoint-000000000384.safetensors",
        "checkpoint-000000000400.safetensors",
    ]


@pytest.mark.parametrize("muon", [False, True])
def test_nan_stops_before_the_weights_are_harmed(tmp_path, muon):
    t = trainer(muon=muon)
    clean = t.loss

    def poisoned(batch, position):
        loss, figures = clean(batch, position)
        return loss * (float("nan") if position == 84 else 1.0), figures

    t.loss = poisoned
    reference = fit(trainer(muon=muon), tmp_path / "clean", total=80)
    with pytest.raises(ValueError, match="in the step that starts at image 80"):
        fit(t, tmp_path / "poisoned")
    assert torch.equal(t.module.weight, reference.module.weight)
    tensors, description = read_tensors(checkpoint.newest(tmp_path / "poisoned"))
    assert description["images"] == 64
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_validation_runs_at_its_interval_and_at_the_end(tmp_path):
    seen = []
    t = trainer()

    def measure() -> dict[str, float]:
        seen.append(t.images)
        return {"loss": float(t.images)}

    t2 = fit(t, tmp_path, validation=Validation(measure=measure, interval=100))
    assert seen == [104, 200, 304, 400]
    assert t2.history.validation[-1] == {"images": 400, "loss": 400.0}


@pytest.mark.parametrize("muon", [False, True])
def test_killed_process_resumes_to_the_same_bytes(tmp_path, muon):
    """SIGKILL in the middle, started again: the final checkpoint equals the uninterrupted one's bytes."""

    def slow():
        t = trainer(muon=muon)
        loss = t.loss
        t.loss = lambda batch, position: time.sleep(0.01) or loss(batch, position)
        fit(t, tmp_path / "killed")

    fit(trainer(muon=muon), tmp_path / "whole")
    kill(slow, lambda: bool(list((tmp_path / "killed").glob("checkpoint-*.safetensors"))))
    assert checkpoint.newest(tmp_path / "killed").name < "checkpoint-000000000400.safetensors"
    fit(trainer(muon=muon), tmp_path / "killed")
    name = "checkpoint-000000000400.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_checkpoint_of_another_model_is_named(tmp_path):
    t, other = trainer(), nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"weight with shape \[2, 3\], the model needs \[5, 3\]"):
        load_weights(other, t.module.state_dict(), origin="file")
    with pytest.raises(ValueError, match="file lacks bias"):
        load_weights(other, {"weight": torch.zeros(5, 3)}, origin="file")
    with pytest.raises(ValueError, match="file has extra, which the model lacks"):
        load_weights(other, {**other.state_dict(), "extra": torch.zeros(1)}, origin="file")


def test_average_warms_up_and_follows():
    assert [decay_at(step, 0.9) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]
    layer = nn.Linear(2, 2)
    average = Average(layer, 0.75)
    with torch.no_grad():
        layer.weight += 1.0
    before = average.module.weight.clone()
    average.update(layer, 1000)
    torch.testing.assert_close(average.module.weight, before + 0.25)
    assert not any(p.requires_grad for p in average.parameters())


def test_later_phase_goes_on_averaging_slowly(tmp_path):
    late = trainer(earlier_images=8000)
    start = late.average.module.weight.clone()
    late.step(iter([0, 4]))
    torch.testing.assert_close(late.average.module.weight, torch.lerp(start, late.module.weight, 0.1))


def test_rates():
    warm = schedule("constant", total_images=100, warmup_images=10)
    assert [warm(i) for i in (0, 5, 10, 100)] == [0.0, 0.5, 1.0, 1.0]
    cosine = schedule("cosine", total_images=110, warmup_images=10)
    assert [cosine(i) for i in (5, 10, 60, 110)] == [0.5, 1.0, pytest.approx(0.5), 0.0]
    with pytest.raises(ValueError, match="warmup_images is 200, more than the 100"):
        schedule("constant", total_images=100, warmup_images=200)


def test_groups_keep_their_relative_rates():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [Group([a], 0.0), Group([b], 0.02, rate=0.25), Group([], 0.1)]
    optimizer = adamw(groups, learning_rate=1.0, beta1=0.9, beta2=0.95)
    set_rate(optimizer, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.0), (0.125, 0.02)]


def test_muon_moves_a_matrix_alike_in_all_directions():
    """Its update is nearly orthogonal and of the length that AdamW's has; vectors are AdamW's; both decay."""
    source = generator(0, "gradients")
    matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in [(8, 4), (4,)])
    groups = [Group([matrix, vector], weight_decay=0.5, rate=0.5)]
    optimizer = MuonAdamW(groups, [matrix], learning_rate=0.2, beta1=0.9, beta2=0.95)
    set_rate(optimizer, 0.1)
    matrix.grad, vector.grad = torch.randn(8, 4, generator=source), torch.tensor([1.0, -1.0, 5.0, -5.0])
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    rate = 0.2 * 0.5 * 0.1
    torch.testing.assert_close(vector, (1 - rate * 0.5) - rate * vector.grad.sign())
    update = (matrix.detach() - (1 - rate * 0.5)) / -rate
    assert torch.linalg.svdvals(matrix.grad).max() > 2.5 * torch.linalg.svdvals(matrix.grad).min()
    values = torch.linalg.svdvals(update) / (0.2 * 8**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (update * matrix.grad).sum() > 0
    kept = (matrix, vector, optimizer.state[matrix]["momentum_buffer"])
    before = [tensor.detach().clone() for tensor in kept]
    matrix.grad, optimizer.found_inf = torch.full((8, 4), float("nan")), torch.ones(())
    optimizer.step()
    assert all(torch.equal(tensor, old) for tensor, old in zip(kept, before, strict=True))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_muon_steps_as_torch_has_it(shape):
    """torch.optim.Muon rounds to bfloat16 on every device, so they agree to its precision."""
    source = generator(0, "gradients")
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    vector = nn.Parameter(torch.ones(1))  # AdamW's
    optimizer = MuonAdamW([Group([ours, vector], 0.5)], [ours], learning_rate=0.1, beta1=0.9, beta2=0.95)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer.found_inf, vector.grad = torch.zeros(()), torch.zeros(1)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=source)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.004)
    assert (ours - 1).abs().max() > 0.15
    averages = (
        state[matrix]["momentum_buffer"] for state, matrix in ((optimizer.state, ours), (reference.state, theirs))
    )
    torch.testing.assert_close(*averages)


def test_orthogonalised_matrices_keep_their_singular_vectors():
    source = generator(0, "matrix")
    matrix = torch.randn(6, 4, generator=source)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalised(matrix) @ right.T
    torch.testing.assert_close(found, torch.diag(found.diagonal()), rtol=0, atol=1e-5)
    assert values.max() / values.min() > 2
    assert 0.65 < found.diagonal().min() < found.diagonal().max() < 1.25
    torch.testing.assert_close(orthogonalised(matrix.T), orthogonalised(matrix).T)
    torch.testing.assert_close(orthogonalised(1000 * matrix), orthogonalised(matrix))
    assert torch.equal(orthogonalised(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("muon", [False, True])
def test_the_moments_of_another_optimiser_are_refused(tmp_path, muon):
    tensors = fit(trainer(muon=muon), tmp_path, total=8).state()
    missing = "exp_avg" if muon else "momentum_buffer"
    with pytest.raises(UserError, match=rf"lacks optimizer\.{missing}\.weight; if train\.optimizer has changed, run"):
        trainer(muon=not muon).restore(tensors, images=8)


def test_moments_of_another_shape_are_named(tmp_path):
    tensors = fit(trainer(), tmp_path, total=8).state()
    tensors["optimizer.exp_avg.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"optimizer\.exp_avg\.weight has shape \[3, 3\], but its parameter \[2, 3\]"):
        trainer().restore(tensors, images=8)


def test_processes_that_cannot_share_a_global_batch_are_told_the_remedy():
    check_shares(64, 16, 4)
    with pytest.raises(ValueError, match="global_batch_size is 64, but must be a multiple of 3"):
        check_shares(64, 16, 3)
    with pytest.raises(ValueError, match=r"but must divide 32, the images per process .* set it to 16 or"):
        check_shares(64, 24, 2)
    with pytest.raises(ValueError, match="set it to 32 or another divisor of 32"):
        check_shares(64, 64, 2)


def results(t: Trainer) -> tuple[dict, list]:
    """State and logs as plain values, which travel between processes."""
    return {name: tensor.tolist() for name, tensor in t.state().items()}, t.history.training


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_the_batches_of_one(tmp_path, processes):
    """Micro-batches of 2 images, 4 in a global batch: any number of processes ends within float error of one."""
    state, rows = results(fit(trainer(micro=2), tmp_path / "one"))
    all_results = together(lambda: results(fit(trainer(micro=2), tmp_path / "many")), processes)
    assert all(result == all_results[0] for result in all_results), "the processes differ"
    for name, values in all_results[0][0].items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(state[name]), rtol=1e-4, atol=1e-6)
    for row, expected in zip(all_results[0][1], rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_each_position_is_seen_by_one_process(tmp_path):
    def seen():
        t, positions = trainer(micro=2), []
        loss = t.loss
        t.loss = lambda batch, position: positions.append(position) or loss(batch, position)
        fit(t, tmp_path, total=24)
        return positions

    first, second = together(seen)
    assert first == [0, 2, 8, 10, 16, 18]
    assert second == [4, 6, 12, 14, 20, 22]


def interrupt_at(t: Trainer, position: int, action) -> Trainer:
    """Have `action()` happen in the forward pass at `position`."""
    loss = t.loss

    def interrupted(batch, at):
        if at == position:
            action()
        return loss(batch, at)

    t.loss = interrupted
    return t


def fail():
    raise ValueError("image 212 is broken")


@pytest.mark.parametrize("later", [3, 1])
def test_checkpoint_of_three_processes_serves_any_number(tmp_path, later):
    """Three stop and continue in the same bits; one process continues from their checkpoint within float error."""
    options = {"micro": 2, "global_batch_size": 12}
    whole = together(lambda: results(fit(trainer(**options), tmp_path / "whole")), 3)[0]
    stopped = together(lambda: fit(interrupt_at(trainer(**options), 212, fail), tmp_path / "parts"), 3)
    assert sorted(type(error).__name__ for error in stopped) == ["FailedElsewhere", "FailedElsewhere", "ValueError"]
    state, rows = together(lambda: results(fit(trainer(**options), tmp_path / "parts")), later)[0]
    if later == 3:
        assert (state, rows) == whole
    for name, values in whole[0].items():
        torch.testing.assert_close(torch.tensor(state[name]), torch.tensor(values), rtol=1e-4, atol=1e-6)
    for row, expected in zip(rows, whole[1], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_restart_after_the_last_checkpoint_logs_the_rate_of_the_last_step(tmp_path):
    """A kill during the last validation: the steps that are not logged yet have another rate than the first."""

    def killed():
        raise RuntimeError

    rate = schedule("cosine", total_images=232, warmup_images=16)
    nothing = Validation(measure=dict, interval=0)
    whole = fit(trainer(rate=rate), tmp_path / "whole", total=232, validation=nothing)
    with pytest.raises(RuntimeError):
        fit(trainer(rate=rate), tmp_path / "parts", total=232, validation=Validation(measure=killed, interval=0))
    assert checkpoint.newest(tmp_path / "parts").name == "checkpoint-000000000232.safetensors"
    assert_same(whole, fit(trainer(rate=rate), tmp_path / "parts", total=232, validation=nothing))
    assert [row["images"] for row in whole.history.training] == [200, 232]
    assert whole.history.training[-1]["rate"] == 0.05 * rate(224) < 0.001


def terminate(number: int = signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_and_the_rerun_ends_in_the_same_state(tmp_path, name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    whole = fit(trainer(), tmp_path / "whole")
    with pytest.raises(InterruptedError, match=f"training was stopped by {name} after 216 images"):
        fit(interrupt_at(trainer(), 212, lambda: terminate(number)), tmp_path / "parts")
    assert checkpoint.newest(tmp_path / "parts").name == "checkpoint-000000000216.safetensors"
    assert signal.getsignal(number) is before
    assert_same(whole, fit(trainer(), tmp_path / "parts"))


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup: a closed terminal does not stop the training."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = fit(interrupt_at(trainer(), 212, lambda: terminate(signal.SIGHUP)), tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.images == 400


def test_sigterm_to_one_process_stops_all_after_the_same_step(tmp_path):
    def work():
        t = trainer()
        try:
            fit(interrupt_at(t, 212, terminate), tmp_path)  # a position of the second process
        except InterruptedError:
            return t.images
        return None

    assert together(work) == [216, 216]


def test_nan_in_one_process_stops_all_before_harm(tmp_path):
    def work():
        t = trainer()
        loss = t.loss
        t.loss = lambda batch, at: (loss(batch, at)[0] * (float("nan") if at == 84 else 1.0), {})
        try:
            fit(t, tmp_path)
        except ValueError as error:
            return str(error), t.module.weight.tolist()
        return None

    (message, weight), other = together(work)
    assert "in the step that starts at image 80" in message
    assert other == (message, weight)
    assert torch.tensor(weight).isfinite().all()


def test_gradients_are_summed_in_fixed_buckets():
    """More buckets than one, an unused parameter, and earlier passes that are not summed."""

    def work():
        layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        for parameter in layers.parameters():
            nn.init.constant_(parameter, 0.1)
        gradients = SharedGradients(layers.parameters(), bucket_bytes=64)
        for scale in (1.0, 10.0):  # the second step forgets the first
            gradients.clear()
            x = torch.full((1, 4), scale * (distributed.rank() + 1.0))
            (layers[1](layers[0](x)).sum()).backward()
            before = layers[0].bias.grad.tolist()
            with gradients.summed():
                (layers[1](layers[0](x)).sum()).backward()
        return len(gradients.buckets), before, layers[0].weight.grad.tolist(), layers[2].weight.grad.abs().sum().item()

    for buckets, before, weight, unused in together(work):
        assert buckets > 2
        assert before == pytest.approx([0.4] * 4)
        assert weight == [pytest.approx([2 * 0.4 * (10 + 20)] * 4)] * 4
        assert unused == 0.0


def test_means_go_on_exactly():
    whole, first, second = Means(), Means(), Means()
    values = torch.rand(10, generator=generator(0, "values"))
    for value in values:
        whole.add({"loss": value}, 1.0)
        whole.steps += 1
    for value in values[:4]:
        first.add({"loss": value}, 1.0)
        first.steps += 1
    second.restore(*first.state())
    for value in values[4:]:
        second.add({"loss": value}, 1.0)
        second.steps += 1
    assert second.read() == whole.read()
    assert second.steps == 0
