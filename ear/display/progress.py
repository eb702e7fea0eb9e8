"""Progress of long work: a bar on a terminal, lines with rates in a log; only rank 0 prints."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts `total` units of work; use it as a context manager and call `advance`."""

    def __init__(self, title: str, total: int, *, unit: str = "img", start: int = 0):
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self._start, self._begun, self._last_line = start, time.monotonic(), time.monotonic()
        self._note = ""
        # Only rank 0 prints. RANK without WORLD_SIZE is ignored: it may be left over in the shell.
        self._silent = ("WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0") or total == 0
        show_bar = sys.stderr.isatty() and not self._silent
        self._bar = tqdm(total=total, initial=start, desc=title, unit=unit) if show_bar else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def advance(self, count: int, note: str = "") -> None:
        """Report `count` more finished units; `note` (such as the loss) is shown beside the rate."""
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._bar is not None:
            self._bar.write(text)
        elif not self._silent:
            print(text, flush=True)

    def _line(self) -> None:
        if self._silent:
            return
        self._last_line = time.monotonic()
        rate = (self.done - self._start) / max(self._last_line - self._begun, 1e-9)
        missing = max(self.total - self.done, 0)
        left = "0" if not missing else f"{missing / rate:.0f}" if rate > 0 else "?"
        note = f"  {self._note}" if self._note else ""
        print(
            f"{self.title}: {self.done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s  {left} s left{note}",
            flush=True,
        )


def track(items: Iterable[Item], title: str, total: int, *, unit: str = "img") -> Iterator[Item]:
    """Yield the items, counting them."""
    with Progress(title, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance(1)
