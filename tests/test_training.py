import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ear import checkpoint
from ear.ema import Average, decay_at
from ear.optimizer import Group, adamw, schedule, set_rate
from ear.randomness import generator
from ear.training import Trainer, write_table

ROOT = Path(__file__).parent.parent


def trainer(*, micro=4, rate=lambda images: 1.0, target=0.0, **options) -> Trainer:
    """A linear map trained towards `target` on noise that is a function of the position."""
    module = nn.Linear(3, 2)
    nn.init.normal_(module.weight, generator=generator(0, "weights"))
    nn.init.zeros_(module.bias)

    def loss(batch, position):
        assert batch == position
        rows = torch.cat([torch.randn(1, 3, generator=generator(1, "rows", position + i)) for i in range(micro)])
        error = (module(rows) - target).square().mean()
        return error, {"twice": 2 * error.detach()}

    optimizer = adamw([Group(list(module.parameters()), 0.0)], learning_rate=0.05, beta1=0.9, beta2=0.95)
    settings = {"ema_decay": 0.9, "clip_norm": 1e6, "global_batch_size": 8, "micro_batch_size": micro}
    return Trainer(module, optimizer=optimizer, loss=loss, rate=rate, **{**settings, **options})


def positions(micro):
    return lambda start: itertools.count(start, micro)


def fit(t: Trainer, folder, total=400, micro=4, **options):
    settings = {"total_images": total, "folder": folder, "checkpoint_images": 64}
    t.fit(positions(micro), **{**settings, **options})
    return t


def tensors_of(t: Trainer) -> dict:
    return t.state()[0]


def assert_same(a: Trainer, b: Trainer):
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert repr(a.history) == repr(b.history)  # the order of the columns, too


def test_training_reduces_the_loss_and_logs_means(tmp_path):
    t = fit(trainer(), tmp_path)
    rows = t.history.training
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert [row["images"] for row in rows] == [64, 128, 192, 256, 320, 384, 400]
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


def test_accumulation_equals_one_pass(tmp_path):
    one, two = fit(trainer(micro=8), tmp_path / "a", micro=8), fit(trainer(micro=4), tmp_path / "b")
    torch.testing.assert_close(one.module.weight, two.module.weight, atol=1e-5, rtol=1e-5)


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


def test_nan_stops_before_the_weights_are_harmed(tmp_path):
    t = trainer()
    clean = t.loss

    def poisoned(batch, position):
        loss, figures = clean(batch, position)
        return loss * (float("nan") if position == 84 else 1.0), figures

    t.loss = poisoned
    reference = fit(trainer(), tmp_path / "clean", total=80)
    with pytest.raises(ValueError, match="in the step from image 80"):
        fit(t, tmp_path / "poisoned")
    assert torch.equal(t.module.weight, reference.module.weight)
    tensors, description = checkpoint.newest(tmp_path / "poisoned")
    assert description["images"] == 64
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_validation_runs_at_its_interval_and_at_the_end(tmp_path):
    seen = []
    t = trainer()
    t2 = fit(t, tmp_path, validate=lambda: seen.append(t.images) or {"loss": float(t.images)}, validate_images=100)
    assert seen == [104, 200, 304, 400]
    assert t2.history.validation[-1] == {"images": 400, "loss": 400.0}


def test_killed_process_resumes_to_the_same_bytes(tmp_path):
    """SIGKILL in the middle, started again: the final checkpoint equals the uninterrupted one's bytes."""
    program = textwrap.dedent("""
        import sys, time, torch
        torch.set_num_threads(1)
        sys.path.insert(0, "tests")
        from pathlib import Path
        from test_training import trainer, fit
        t = trainer()
        loss = t.loss
        def slow(batch, position):
            time.sleep(float(sys.argv[2]))
            return loss(batch, position)
        t.loss = slow
        fit(t, Path(sys.argv[1]))
    """)
    command = [sys.executable, "-c", program]
    subprocess.run([*command, str(tmp_path / "whole"), "0"], check=True, cwd=ROOT)
    child = subprocess.Popen([*command, str(tmp_path / "killed"), "0.02"], cwd=ROOT)
    while not list((tmp_path / "killed").glob("checkpoint-*.safetensors")):
        assert child.poll() is None
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    subprocess.run([*command, str(tmp_path / "killed"), "0"], check=True, cwd=ROOT)
    name = "checkpoint-000000000400.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_checkpoint_of_another_model_is_named(tmp_path):
    t, other = trainer(), nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"weight with shape \[2, 3\], the model needs \[5, 3\]"):
        checkpoint.load_weights(other, t.module.state_dict(), origin="file")
    with pytest.raises(ValueError, match="file lacks bias"):
        checkpoint.load_weights(other, {"weight": torch.zeros(5, 3)}, origin="file")
    with pytest.raises(ValueError, match="file has extra, which the model lacks"):
        checkpoint.load_weights(other, {**other.state_dict(), "extra": torch.zeros(1)}, origin="file")


def test_average_warms_up_and_follows():
    assert [decay_at(step, 0.9) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]
    layer = nn.Linear(2, 2)
    average = Average(layer)
    with torch.no_grad():
        layer.weight += 1.0
    before = average.module.weight.clone()
    average.update(layer, 0.75)
    torch.testing.assert_close(average.module.weight, before + 0.25)
    assert not any(p.requires_grad for p in average.parameters())


def test_later_phase_goes_on_averaging_slowly(tmp_path):
    late = trainer(earlier_images=8000)
    start = late.average.module.weight.clone()
    late.step([0, 4])
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


def test_tables_are_tab_separated_with_a_header(tmp_path):
    write_table(tmp_path / "t.tsv", [{"images": 8, "loss": 1 / 3}, {"images": 16, "loss": 2e-9}])
    assert (tmp_path / "t.tsv").read_text() == "images\tloss\n8\t0.333333\n16\t2e-09\n"
