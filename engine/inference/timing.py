"""How long each stage of a prediction took, on the host's clock or on the device's."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

__all__ = ["EventStopwatch", "Stopwatch", "stopwatch"]

Stages = dict[str, float]


class Stopwatch:
    """Milliseconds between marks, by the host's clock: right where the host computes, or waits for who does."""

    def __init__(self) -> None:
        self._ticks: list[tuple[str, Any]] = [("", self._tick())]
        self._inner: Callable[[], Stages | None] | None = None

    def mark(self, stage: str) -> None:
        """The end of a stage, which began at the mark before, or when the watch was made."""
        self._ticks.append((stage, self._tick()))

    def include(self, inner: Callable[[], Stages | None]) -> None:
        """The end of the stage ``network``, of which another watch knows the parts.

        Args:
            inner: asked when the work is done; None where the parts are no longer known.
        """
        self.mark("network")
        self._inner = inner

    def wait(self) -> None:
        """Until the last mark has been reached."""

    def milliseconds(self) -> Stages:
        """The stages in order, once :meth:`wait` has returned. What an included watch did not see counts as copies."""
        spent = {stage: self._between(a, b) for (_, a), (stage, b) in pairwise(self._ticks)}
        parts = self._inner() if self._inner else None
        if not parts:
            return spent
        spent["copy"] = spent.get("copy", 0.0) + max(spent["network"] - sum(parts.values()), 0.0)
        stages: Stages = {}
        for stage, duration in spent.items():
            stages |= parts if stage == "network" else {stage: duration}
        return stages

    def _tick(self) -> Any:
        return time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        return (end - start) * 1e3


class EventStopwatch(Stopwatch):
    """Milliseconds between marks on the current stream, which nobody waits for until they are asked for.

    Args:
        external: for marks inside a CUDA graph: each replay reaches them again, and they tell of the last one.
    """

    def __init__(self, *, external: bool = False) -> None:
        # Without the argument where it is not wanted: ROCm's builds do not take it as true.
        self._options = {"enable_timing": True} | ({"external": True} if external else {})
        super().__init__()

    def wait(self) -> None:
        self._ticks[-1][1].synchronize()  # no other thread is kept from running meanwhile

    def _tick(self) -> torch.cuda.Event:
        event = torch.cuda.Event(**self._options)
        event.record()
        return event

    def _between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)


def stopwatch(device: torch.device) -> Stopwatch:
    """The watch for work on a device; on a GPU it starts on the current stream of the current device."""
    return EventStopwatch() if device.type == "cuda" else Stopwatch()
