"""The ops of `trimask.kernels` on a GPU, and whole models, against what they replace, on inputs as large as COCO's.

`device` says how they are timed. The floor of an op is the time in which the bytes that it must move at least would be
copied: ``floor = least bytes / bandwidth``, with ``bandwidth = 2 * size / time`` of a large copy in the same process;
``times floor = p50 / floor``, and ``least bytes / p50`` is what was achieved. On a CPU the cases run too, to be tried
where there is no GPU.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from . import gpu_boxes, gpu_epilogue, gpu_models, gpu_pixels, gpu_roi, gpu_training
from .device import Bench, Ceilings, DeviceClock, measure_ceilings
from .harness import Clock, Row, WallClock, failed

__all__ = ["SUBJECTS", "require", "run", "start"]

# `check` runs each in a process of its own: a kernel that breaks the device takes no other subject with it.
SUBJECTS: dict[str, Callable[[bool], Iterable[Callable[[Bench], list[Row]]]]] = {
    "roi": gpu_roi.forward_cases,
    "boxes": gpu_boxes.cases,
    "pixels": gpu_pixels.cases,
    "epilogue": gpu_epilogue.cases,
    "gradients": gpu_roi.backward_cases,
    "training": gpu_training.cases,
    "models": gpu_models.cases,
    "compiled": gpu_models.compiled_cases,
    **{dtype: partial(gpu_models.cells, dtype=dtype) for dtype in gpu_models.DTYPES},
}
_SMALL = 64 << 20  # bytes of a copy in a quick run


def require(device: str) -> None:
    """Raise a `ValueError` if a CUDA device is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        build = f"torch {torch.__version__}, built for {torch.version.cuda or torch.version.hip or 'CPUs alone'}"
        raise ValueError(f"device: expected a CUDA device, found none ({build})")


def start(device: str, quick: bool) -> tuple[Clock, Ceilings]:
    """A clock for the device that knows its bandwidth, and all that was measured of it."""
    require(device)
    clock = DeviceClock() if device == "cuda" else WallClock()
    with _stream(clock):
        ceilings = measure_ceilings(clock, *[_SMALL] * quick)
    clock.bandwidth = ceilings.copy_bytes_per_s
    return clock, ceilings


def run(clock: Clock, quick: bool, subjects: Iterable[str], seconds: float = math.inf) -> Iterator[list[Row]]:
    """The rows of each case as soon as it is done; `quick` is small and shows that everything runs, no more.

    After so many `seconds` the models, whose grid is large, begin no further case and say what is left.

    Raises:
        RuntimeError: The device is lost, after a kernel that read or wrote where it must not.
    """
    bench = Bench(clock, quick, time.monotonic() + seconds)
    for subject in subjects:
        for case in SUBJECTS[subject](quick):
            try:
                with _stream(clock):
                    rows = case(bench)
            except Exception as error:
                rows = [failed(subject, _name(case), clock, error)]
            if rows:
                yield rows
            if clock.device == "cuda":
                torch.cuda.synchronize()


def _stream(clock: Clock) -> AbstractContextManager[object]:
    return clock.stream() if isinstance(clock, DeviceClock) else nullcontext()


def _name(case: Callable[[Bench], list[Row]]) -> str:
    """What to call a case that never got to say its name."""
    if isinstance(case, partial):
        return " ".join([_name(case.func), *map(str, case.args), *(f"{k}={v}" for k, v in case.keywords.items())])
    return case.__name__.strip("_")
