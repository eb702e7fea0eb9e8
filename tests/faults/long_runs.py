"""A long training: memory and open files stay flat."""

import os
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.faults.hostile import in_child
from tests.faults.pipelines import template

STEPS = (1_000, 10_000)  # by case
_WARM_UP = 200  # steps, until caches and allocators have their size
_GROWTH = 20_000_000  # bytes


def memory(case: int) -> dict[str, int]:
    """`STEPS[case]` training steps with reading threads, checkpoints and validation."""
    return in_child(_memory, case)


def _memory(case: int) -> Counter:
    from ear import config
    from ear.latents.store import LatentStore
    from ear.model.files import build_model
    from ear.model.shape import Shape
    from ear.model.training import Phase, PhaseSettings
    from ear.runtime import randomness
    from ear.runtime.device import prepare_device

    data = template() / "data"
    parameters = config.load(template() / "params.yaml")
    runtime = parameters.runtime.model_copy(update={"workers": 2, "checkpoint_images": 64 * 100})
    device = prepare_device("cpu", 1)
    store = LatentStore(data / "latents", "train")
    shape = Shape(store.shape, store.classes, parameters.model, parameters.score.chosen)
    model = build_model(shape).initialise(randomness.generator(0, "weights"))
    batch = parameters.train.global_batch_size
    images = batch * STEPS[case]
    measured: dict[int, tuple[int, int]] = {}
    process = psutil.Process()

    with TemporaryDirectory() as folder:
        phase = Phase(
            model,
            PhaseSettings(
                name="train", images=images, learning_rate=1e-3, schedule="constant", warmup_images=0, temperature=1.0
            ),
            parameters.train.model_copy(update={"validate_images": batch * 100}),
            store=store,
            held_out=LatentStore(data / "latents", "val"),
            mirror=False,
            device=device,
            runtime=runtime,
        )
        step = phase.trainer.step

        def measured_step(batches) -> None:
            step(batches)
            steps = phase.trainer.images // batch
            if steps % 100 == 0:
                measured[steps] = (process.memory_info().rss, len(os.listdir("/proc/self/fd")))

        phase.trainer.step = measured_step
        phase.run(Path(folder), Path(folder) / "kept")
    first = measured[_WARM_UP]
    last = measured[STEPS[case]]
    assert last[0] - first[0] < _GROWTH, f"{(last[0] - first[0]) / 1e6:.1f} MB more after {max(measured)} steps"
    assert last[1] <= first[1], f"{last[1] - first[1]} more open files"
    return Counter({f"{STEPS[case]:,} steps: flat": 1})
