"""Ranks and collectives over torch.distributed; in a single process every function works and costs nearly nothing.

A launcher (`launch`, torchrun) sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process. torch is
imported inside functions, so a stage that does not compute starts without it.
"""

import contextlib
import contextvars
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from ear.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_alone = contextvars.ContextVar("alone", default=False)
_PATIENCE = timedelta(hours=2)  # rank 0 may write files or train a small model alone for this long
_FAREWELL_SECONDS = 5.0


class FailedElsewhere(Exception):
    """Another rank failed first and has printed why; this rank only exits."""


def launched() -> bool:
    """Whether a launcher started this process."""
    return "WORLD_SIZE" in os.environ


def size() -> int:
    """World size; 1 inside `from_main`, while the other ranks wait."""
    return 1 if _alone.get() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Rank of this process, from 0; 0 without a world size, whatever a shell has left in RANK."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def local_rank() -> int:
    """Rank of this process on its machine, which selects its device; 0 as `rank` is."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Connect all ranks (gloo for CPU tensors, NCCL for CUDA tensors), and disconnect them in any case.

    An exception that leaves the block is re-raised on the rank that failed first. It breaks the connections, so the
    other ranks fail too, with FailedElsewhere. Raises ConnectionError if a rank disappeared without an exception,
    UserError if there is a world size but no address to meet at.
    """
    if size() == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {size()}, but MASTER_ADDR is not set; start the stage with torchrun, or unset WORLD_SIZE."
        )
    import torch
    from torch import distributed

    store, *_ = next(distributed.rendezvous("env://", timeout=_PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, store=store, rank=rank(), world_size=size(), timeout=_PATIENCE)
        distributed.barrier()  # a rank that fails at once would leave others that are still connecting
        yield
    except Exception as error:
        first = _is_first(store)
        _leave()
        _await_others(store)
        if not first:
            raise FailedElsewhere from error
        if _is_lost_connection(error):
            raise ConnectionError(
                f"process {rank()} of {size()} lost the connection to another, which was killed or whose machine "
                "failed; start the stage again to resume it."
            ) from error
        raise
    finally:
        _leave()


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _await_others(store) -> None:
    """On rank 0, which holds the store, wait until every other living rank has asked it who failed first."""
    from torch import distributed

    if not is_main() or distributed.is_torchelastic_launched():  # torchrun's agent holds the store
        return
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while store.add("failed", 0) < size() and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_first(store) -> bool:
    """Whether this rank is the first to fail; call it while the connections still exist."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the process or launcher that held the store is gone
        return False


def _is_lost_connection(error: Exception) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def own_slice(items: Sequence) -> Sequence:
    """This rank's slice of `items` (a range, a list): contiguous; sizes differ by at most 1.

    The slices of all ranks, in order, make up `items`; some are empty if there are fewer items than ranks.
    """
    return items[len(items) * rank() // size() : len(items) * (rank() + 1) // size()]


def barrier() -> None:
    """Wait for all ranks."""
    if size() > 1:
        from torch import distributed

        distributed.barrier()


def total(tensor):
    """The sum of `tensor` over all ranks, with the same bits on each; `tensor` is unchanged."""
    if size() == 1:
        return tensor
    from torch import distributed

    tensor = tensor.clone()
    distributed.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on all."""
    if size() == 1:
        return flag
    import torch

    return bool(total(torch.tensor(int(flag))))


def gathered(tensor):
    """[world size, *tensor.shape]: every rank's `tensor`, in the order of ranks."""
    if size() == 1:
        return tensor[None]
    import torch
    from torch import distributed

    parts = [torch.empty_like(tensor) for _ in range(size())]
    distributed.all_gather(parts, tensor)
    return torch.stack(parts)


def copy_from_main(tensors: Iterable) -> None:
    """Overwrite `tensors` on every rank with their values on rank 0."""
    if size() > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def from_main(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and return its result on all ranks; if it raises, `group` ends all ranks.

    Inside `work`, size() is 1, so it may call code that ranks would otherwise share, such as a small training. The
    result is pickled: return paths, numbers and dictionaries, not large tensors.
    """
    if size() == 1:
        return work()
    from torch import distributed

    result: list[Any] = [None]
    if is_main():
        token = _alone.set(True)
        try:
            result = [work()]
        finally:
            _alone.reset(token)
    distributed.broadcast_object_list(result, src=0)
    return result[0]


def in_turns(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Rank r runs `work` on items r, r + world_size, ...; rank 0 yields all results in order.

    The other ranks yield nothing, but must exhaust the iterator too: that is where they work.
    """
    if size() == 1:
        yield from map(work, items)
        return
    from torch import distributed

    for start in range(0, len(items), size()):
        own = start + rank()
        result = work(items[own]) if own < len(items) else None
        results: list[Any] | None = [None] * size() if is_main() else None
        distributed.gather_object(result, results, dst=0)
        yield from (results or [])[: len(items) - start]


def on_main(results: Iterator, consume: Callable[[Iterator], Result]) -> Result | None:
    """`consume(results)` on rank 0; the other ranks help to produce the results and return None."""
    if is_main():
        return consume(results)
    for _ in results:
        pass
    return None


def launch(module: str, arguments: Sequence[str], processes: int) -> int:
    """Run `python -m module arguments` as `processes` ranks on this machine; returns an exit code.

    If one rank fails, all end within seconds. A signal to this process is passed on to the ranks, which have 30 seconds
    to save their work (set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to change that).
    """
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks print their own errors
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # until each rank sets its own
    try:
        run.main(["--standalone", f"--nproc_per_node={processes}", "-m", module, *arguments])
    except ChildFailedError as error:
        killed = {number: -f.exitcode for number, f in error.failures.items() if f.exitcode < 0}
        for number, by in killed.items():
            if by != signal.SIGTERM:  # sent by the launcher to end the other ranks
                print(f"process {number} of {processes} was ended by {signal.Signals(by).name}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
