"""Prefetching: a thread prepares the next item while this one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Part], Read], parts: Iterable[Part]) -> Iterator[Read]:
    """Yield read(part) for each part, one ahead of the caller in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[Read]] = []
        for part in parts:
            waiting.append(pool.submit(read, part))
            if len(waiting) == 2:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
