"""Gradients summed over ranks while the backward pass still runs.

DistributedDataParallel does this too, but regroups its buckets after the first step. With three or more ranks, sums in
other buckets round differently, so a resumed run would differ from an uninterrupted one. Here the buckets never change.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ear.runtime import distributed
from ear.runtime.sharding import is_sharded

_BUCKET_BYTES = 32 * 2**20  # large enough for full bandwidth, small enough to start early


class SharedGradients:
    """The gradients of `parameters`. With several ranks, they are views of flat buckets that are summed over ranks.

    In a single process, or if the parameters are shards (FSDP sums their gradients), there are no buckets to sum.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, bucket_bytes: int = _BUCKET_BYTES):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.buckets: list[Tensor] = []
        self._members: list[int] = []  # number of parameters in each bucket
        self._missing: list[int] = []  # number of gradients per bucket that have not arrived yet, inside `summed`
        self._sums: list = []  # running all-reduces, in the order of the buckets
        if distributed.size() > 1 and not is_sharded(self.parameters):
            for group in _groups(self.parameters[::-1], bucket_bytes):  # the last layer's gradients arrive first
                self._store(group)

    def _store(self, group: list[nn.Parameter]) -> None:
        """Make the gradients of `group` views of a new bucket, and register hooks for their arrival."""
        number, sizes = len(self.buckets), [p.numel() for p in group]
        bucket = torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device)
        for parameter, part in zip(group, bucket.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _: self._arrived(number))
        self.buckets.append(bucket)
        self._members.append(len(group))

    def clear(self) -> None:
        """Reset the gradients before a step."""
        for bucket in self.buckets:
            bucket.zero_()
        if not self.buckets:
            for parameter in self.parameters:
                parameter.grad = None

    @contextlib.contextmanager
    def summed(self) -> Iterator[None]:
        """Wrap the last backward pass of a step: at the end of the block, every gradient is the sum over all ranks."""
        self._missing = list(self._members)
        yield
        self._start(len(self.buckets))  # also buckets with a parameter that the loss does not use
        for running in self._sums:
            running.wait()
        self._missing, self._sums = [], []

    def _arrived(self, number: int) -> None:
        if not self._missing:
            return  # an earlier backward pass of the step
        self._missing[number] -= 1
        complete = next((k for k, missing in enumerate(self._missing) if missing), len(self.buckets))
        self._start(complete)

    def _start(self, count: int) -> None:
        """Start summing the first `count` buckets; all ranks start them in the same order."""
        for bucket in self.buckets[len(self._sums) : count]:
            self._sums.append(torch.distributed.all_reduce(bucket, async_op=True))


def _groups(parameters: list[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, about `limit` bytes together."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and (parameter.dtype != group[0].dtype or sum(p.nbytes for p in group) >= limit):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group
