"""A recorder without a GPU: what it replays is computed again, and lands in the same tensors as ever."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from trimask import Predictor
from trimask.engine.inference.capture import GraphRunner, Recording
from trimask.engine.inference.execution import RUN_CAPACITY
from trimask.engine.inference.timing import Stopwatch

__all__ = ["FakeRecorder", "fix_shapes", "recorded_predictor"]


class FakeRecorder:
    """Behaves as CUDA graphs do, where that matters.

    Outputs hold nonsense until a replay and belong to the last one. A replay takes a moment, in which another thread
    gets its chance to do wrong. Two turns at once are an error.

    Args:
        trouble: what recording raises.

    Attributes:
        trouble_after: so many recordings succeed.
    """

    def __init__(self, trouble: Exception | None = None) -> None:
        self.trouble = trouble
        self.records = 0
        self.trouble_after: int | None = None
        self.waits = 0
        self._busy = threading.Lock()

    def record(self, function: Callable[[Callable[[str], None]], tuple[Tensor | None, ...]]) -> Recording:
        self.records += 1
        if self.trouble is not None:
            raise self.trouble
        if self.trouble_after is not None and self.records > self.trouble_after:
            raise RuntimeError("no more of them")
        trial = function(lambda stage: None)
        # Never the very tensors, which may be views of another recording's.
        outputs = type(trial)(*[None if x is None else torch.full_like(x, 77) for x in trial])
        watch = Stopwatch()

        @torch.inference_mode()
        def replay() -> None:
            assert self._busy.locked(), "a replay out of turn"
            watch.__init__()
            fresh = function(watch.mark)
            time.sleep(1e-3)
            for target, source in zip(outputs, fresh, strict=True):
                if target is not None:
                    target.copy_(source)

        return Recording(outputs, replay, watch)

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert self._busy.acquire(blocking=False), "two turns at once"
        try:
            yield
        finally:
            self._busy.release()

    def wait(self) -> None:
        self.waits += 1


def fix_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, nothing is cut to the count, which a recorder takes for granted."""
    monkeypatch.setattr("trimask.engine.model.mask_rcnn.live_rows", lambda count, capacity: capacity)


def recorded_predictor(
    predictor: Predictor, size: int = 8, patience: int = 0, trim_masks: bool = False
) -> FakeRecorder:
    """Makes a predictor on a CPU take the way of one on a GPU: recorded, with run lengths from the device."""
    recorder = FakeRecorder()
    predictor._run_capacity = RUN_CAPACITY
    predictor._trim_masks = trim_masks
    function, then = predictor._inference()
    predictor._runner = GraphRunner(function, recorder, size, patience, then)
    return recorder
