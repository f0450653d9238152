"""A peer's model under `torch.compile`, which may take minutes or fail: it gets so many seconds."""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch

from .device import Bench
from .harness import WallClock

__all__ = ["COMPILING", "WARM_UP", "compiled_backbone", "compiled_peers", "time_limit"]

COMPILING = 300.0  # seconds at most, where nothing else is said
WARM_UP = 3  # calls: the shapes of the second one differ, and the third runs what was compiled for them


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a `TimeoutError` in there when the time is up.

    In the main thread of a process on Unix; elsewhere there is no limit.
    """
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not able or math.isinf(seconds):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not compiled within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_peers(
    model: Any, make: Callable[[Any], Callable[[], Any]], bench: Bench
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The backbone compiled, then the whole model, each after its compilation.

    Args:
        model: torchvision's; it is left as it is.
        make: a call of a model on the pictures.
        bench: says how much time there is; in a quick run nothing is compiled.

    Yields:
        A name, and a call; one that raises `NotImplementedError` where the compiler failed or took too long.
    """
    compiler: Any = (lambda module: module) if bench.quick else torch.compile
    for name in ("backbone compiled", "compiled"):
        peer: Any = copy.copy(model)
        peer._modules = dict(model._modules)
        if name == "backbone compiled":
            peer.backbone = compiler(model.backbone)
        else:
            peer = compiler(model)
        try:
            with time_limit(bench.left() / 2):
                call = make(peer)
                for _ in range(WARM_UP):
                    call()
        except Exception as error:  # a compiler fails in many ways, and none of them is a wrong result
            torch._dynamo.reset()
            yield f"torchvision, {name}", partial(_fail, f"{type(error).__name__}: {error}"[:300])
        else:
            yield f"torchvision, {name}", call


def compiled_backbone(model: Any, make: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any]:
    """The first of `compiled_peers`, in `COMPILING` seconds at most."""
    _, call = next(compiled_peers(model, make, Bench(WallClock(), False, time.monotonic() + 2 * COMPILING)))
    return call


def _fail(reason: str) -> None:
    raise NotImplementedError(f"torch.compile: {reason}")
