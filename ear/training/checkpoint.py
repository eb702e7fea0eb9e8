"""Training state on disk: weights, EMAs, optimiser and progress, in safetensors (nothing is unpickled)."""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from ear.errors import UserError
from ear.files.atomic import link
from ear.files.tensors import read_description, write_tensors
from ear.files.weights import check_weights
from ear.runtime import distributed
from ear.runtime.sharding import host_copies, own_part
from ear.training.optimizer import moment_names

_KEPT = 2  # checkpoints: the newest, and one to fall back to


def pack(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of a training state by name: MODULE.* for each module, optimizer.KEY.PARAMETER for the first one."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in _trained(modules).named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def unpack(tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `pack`, in place.

    Raises UserError naming a tensor that is missing or of another shape, or a weight that no module has.
    """
    for prefix, module in modules.items():
        ours, whole = module.state_dict(), _under(tensors, f"{prefix}.")
        check_weights(ours, whole)
        module.load_state_dict({name: own_part(tensor, ours[name]) for name, tensor in whole.items()})
    moments = _under(tensors, "optimizer.")
    for name, parameter in _trained(modules).named_parameters():
        state = _of_parameter(moments, name)
        if moments and (missing := moment_names(optimizer, parameter) - state.keys()):
            raise UserError(
                f"the training state lacks optimizer.{min(missing)}.{name}; if train.optimizer has changed, run the "
                "train stage again, else use an earlier checkpoint, or start again."
            )
        for key, value in state.items():
            if value.dim() and value.shape != parameter.shape:
                raise UserError(
                    f"the training state's optimizer.{key}.{name} has shape {list(value.shape)}, but its parameter "
                    f"{list(parameter.shape)}; use another checkpoint, or start again."
                )
        optimizer.state[parameter] = {
            key: own_part(value, parameter) if value.dim() else value.to(parameter.device).clone()
            for key, value in state.items()
        }


def _trained(modules: dict[str, nn.Module]) -> nn.Module:
    return next(iter(modules.values()))


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _of_parameter(moments: dict[str, torch.Tensor], parameter: str) -> dict[str, torch.Tensor]:
    keys = {name.partition(".")[0] for name in moments}
    return {key: moments[f"{key}.{parameter}"] for key in sorted(keys) if f"{key}.{parameter}" in moments}


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, from a copy in the host's memory.

    Training continues meanwhile; only copying interrupts it for a moment.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future | None = None

    def save(
        self, folder: Path, images: int, tensors: dict[str, torch.Tensor], description: dict, kept: Path | None = None
    ) -> None:
        """Begin to write the state after `images` images, complete or not at all; then delete all but the newest two.

        Rank 0 writes; all ranks must call it together to gather shards. kept: a second folder, in which nothing is
        deleted; while both folders have the checkpoint, they share one copy on the disk if it can be linked. Waits for
        the previous checkpoint, and raises its error if it failed.
        """
        self.finish()
        copies = host_copies(tensors)
        if distributed.is_main():
            self._running = self._pool.submit(_save, folder, images, copies, description, kept)

    def check(self) -> None:
        """Raise the error that has stopped a checkpoint, if one has; does not wait."""
        if self._running and self._running.done():
            self.finish()

    def finish(self) -> None:
        """Wait until everything is written; raises the error that has stopped it."""
        running, self._running = self._running, None
        if running:
            running.result()


def _save(folder: Path, images: int, tensors: dict[str, torch.Tensor], description: dict, kept: Path | None) -> None:
    if kept:  # first: a run killed in between would resume after `images`, and never write to `kept`
        kept.mkdir(parents=True, exist_ok=True)
        write_tensors(at(kept, images), tensors, description)
        at(folder, images).unlink(missing_ok=True)
        link(at(kept, images), at(folder, images))
    else:
        write_tensors(at(folder, images), tensors, description)
    for path in _by_progress(folder)[:-_KEPT]:
        path.unlink()


def newest(folder: Path) -> Path | None:
    """Newest readable checkpoint, or None; skips damaged ones with a warning."""
    for path in reversed(_by_progress(folder)):
        try:
            read_description(path)
        except UserError as error:
            print(f"{error} Falling back to the checkpoint before it.", flush=True)
        else:
            return path
    return None


def at(folder: Path, images: int) -> Path:
    """The checkpoint after `images` images."""
    return folder / f"checkpoint-{images:012d}.safetensors"


def _by_progress(folder: Path) -> list[Path]:
    numbered = ((re.fullmatch(r"checkpoint-(\d+)\.safetensors", path.name), path) for path in folder.glob("*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]
