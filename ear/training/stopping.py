"""Signals that ask a training to end: it writes a checkpoint first."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from ear.runtime import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], str]]:
    """Catch the signals that ask a program to end, unless they are ignored, as SIGHUP is under nohup.

    Yields a function that names the signal that any rank has received, or returns ''. All ranks must call it together.
    After the first signal, Ctrl-C ends the program as soon as a checkpoint that is being written is complete.
    """
    received: list[str] = []

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked() -> str:
        if not distributed.any_of(bool(received)):
            return ""
        return received[0] if received else "a signal to another process"

    if threading.current_thread() is not threading.main_thread():  # only the main thread can catch signals
        yield lambda: ""
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, receive)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
