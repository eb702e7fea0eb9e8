"""Many processes that work as one, over torch.distributed; correct, and nearly free, in a single process.

A launcher (`launch`, torchrun, srun) says who each process is in RANK, WORLD_SIZE and LOCAL_RANK; without them there is
one process. torch is imported where it is needed: a stage that does not compute starts without it.
"""

import contextlib
import contextvars
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

Result = TypeVar("Result")
_alone = contextvars.ContextVar("alone", default=False)
_PATIENCE = timedelta(hours=2)  # the main process may write or train a small model alone for so long
_FAREWELL_SECONDS = 5.0


class FailedElsewhere(Exception):
    """Another process failed first and has said why; this one only has to end."""


def launched() -> bool:
    """Whether a launcher started this process."""
    return "WORLD_SIZE" in os.environ


def size() -> int:
    """Number of processes that work together: 1 within `from_main`, where the others wait."""
    return 1 if _alone.get() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its machine: which of the machine's devices it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Connect all processes, gloo for CPU tensors and NCCL for CUDA ones, and disconnect them whatever happens.

    An exception that leaves the block is re-raised in the process that failed first; it breaks the connections, so that
    the others fail too, with FailedElsewhere. Raises ConnectionError where one was lost without a word.
    """
    if size() == 1:
        yield
        return
    import torch
    from torch import distributed

    store, *_ = next(distributed.rendezvous("env://", timeout=_PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, store=store, rank=rank(), world_size=size(), timeout=_PATIENCE)
        distributed.barrier()  # one that failed at once would leave others behind that are still connecting
        yield
    except Exception as error:
        first = _is_first(store)
        _leave()
        _await_others(store)
        if not first:
            raise FailedElsewhere from error
        if _is_lost_connection(error):
            raise ConnectionError(
                f"process {rank()} of {size()} lost another one, which was killed or whose machine went away; start "
                "the stage again, it goes on from what it has saved."
            ) from error
        raise
    finally:
        _leave()


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _await_others(store) -> None:
    """Keep the main process until the others, as far as they live, have asked the store that it holds."""
    from torch import distributed

    if not is_main() or distributed.is_torchelastic_launched():  # whose agent holds the store
        return
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while store.add("failed", 0) < size() and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_first(store) -> bool:
    """Whether no other process has failed before; to be asked while the group's connections still stand."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store went down with the process or the launcher that kept it
        return False


def _is_lost_connection(error: Exception) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def own_slice(items: Sequence) -> Sequence:
    """This process's part of `items` (a range, a list): contiguous, in order, sizes that differ by 1 at most.

    The parts of all processes, in the order of ranks, are the whole; some are empty where there are too few items.
    """
    return items[len(items) * rank() // size() : len(items) * (rank() + 1) // size()]


def barrier() -> None:
    """Wait for all processes."""
    if size() > 1:
        from torch import distributed

        distributed.barrier()


def total(tensor):
    """The sum of `tensor` over all processes, the same bits on each; `tensor` stays as it is."""
    if size() == 1:
        return tensor
    from torch import distributed

    tensor = tensor.clone()
    distributed.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process: a decision that all take alike."""
    if size() == 1:
        return flag
    import torch

    return bool(total(torch.tensor(int(flag))))


def gathered(tensor):
    """[processes, *tensor.shape]: every process's `tensor`, in the order of ranks."""
    if size() == 1:
        return tensor[None]
    import torch
    from torch import distributed

    parts = [torch.empty_like(tensor) for _ in range(size())]
    distributed.all_gather(parts, tensor)
    return torch.stack(parts)


def copy_from_main(tensors: Iterable) -> None:
    """Give `tensors` in every process the values that they have in the main one, in place."""
    if size() > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def from_main(work: Callable[[], Result]) -> Result:
    """What `work()` gives in the main process, for all; where it raises, `group` ends them all.

    Whatever it calls finds one process, and can be what would otherwise be shared, such as a small training. The result
    travels as a pickle between our own processes: paths, numbers and dictionaries, not large tensors.
    """
    if size() == 1:
        return work()
    from torch import distributed

    result = [None]
    if is_main():
        token = _alone.set(True)
        try:
            result = [work()]
        finally:
            _alone.reset(token)
    distributed.broadcast_object_list(result, src=0)
    return result[0]


def in_turns(items: Sequence, work: Callable[[object], Result]) -> Iterator[Result]:
    """`work(item)` of every item, one item per process at a time: all results in order, in the main process alone.

    In the others the iterator yields nothing, but has to be exhausted all the same: that is where they work.
    """
    if size() == 1:
        yield from map(work, items)
        return
    from torch import distributed

    for start in range(0, len(items), size()):
        own = start + rank()
        result = work(items[own]) if own < len(items) else None
        results = [None] * size() if is_main() else None
        distributed.gather_object(result, results, dst=0)
        yield from (results or [])[: len(items) - start]


def on_main(results: Iterator, consume: Callable[[Iterator], Result]) -> Result | None:
    """`consume(results)` in the main process; the others take part in making the results, and get None."""
    if is_main():
        return consume(results)
    for _ in results:
        pass
    return None


def launch(module: str, arguments: Sequence[str], processes: int) -> int:
    """Run `python -m module arguments` as `processes` processes on this machine; returns the exit code of the whole.

    All end within seconds of the first that fails. A signal that ends this process is passed on to them; they have
    30 seconds to save their work (TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes that).
    """
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # until each sets its own number of threads
    try:
        run.main(["--standalone", f"--nproc_per_node={processes}", "-m", module, *arguments])
    except ChildFailedError as error:
        killed = {number: -f.exitcode for number, f in error.failures.items() if f.exitcode < 0}
        for number, by in killed.items():
            if by != signal.SIGTERM:  # which is how the rest is ended
                print(f"process {number} of {processes} was ended by {signal.Signals(by).name}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
