"""A request to stop, by a signal, that a training run heeds between two updates."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stop", "stop_signals"]


class Stop:
    """Whether to stop, and why."""

    def __init__(self) -> None:
        self.reason = ""
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads pictures inherited this; it ends when the run does
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and the first Ctrl-C ask for a stop; a second Ctrl-C interrupts at once. In the main thread only."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
