"""Exported files in ONNX Runtime and OpenVINO, ready to be called.

Needs no torch and loads none, so that `fresh` measures the memory that a program without torch would take.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..engine.inference.predicting import Predicting
from ..export.runtime import Runtime
from .matching import Found
from .samples import photographs

__all__ = ["detecting", "open_runtime", "runtime_call"]

Pictures = Sequence[NDArray[np.uint8]]


def detecting(predictor: Predicting, pictures: Pictures) -> Callable[[], list[Found]]:
    """A call that finds objects in the pictures, all at once, with their masks pasted on the host."""

    def call() -> list[Found]:
        results = predictor.predict(list(pictures), batch_size=len(pictures))
        return [Found(x.boxes, x.scores, x.labels, x.masks if x.has_masks else None) for x in results]

    return call


def open_runtime(file: str, backend: str, dtype: str, device: str | None, threads: int) -> Runtime:
    """A runtime for an exported file, which keeps nothing in the user's cache.

    Args:
        dtype: what to compute in: "bfloat16" of OpenVINO, else the file's own precision.
    """
    asked = dtype if dtype == "bfloat16" else "float32"
    return Runtime(file, device=device, threads=threads, backend=backend, dtype=asked, cache=False)


def runtime_call(
    file: str,
    backend: str,
    dtype: str,
    device: str | None,
    threads: int,
    size: Sequence[int],
    batch: int,
    pictures: Sequence[str] = (),
) -> Callable[[], list[Found]]:
    """:func:`detecting` in samples, or in files scaled to (height, width): for `fresh`."""
    runtime = open_runtime(file, backend, dtype, device, threads)
    return detecting(runtime, photographs((size[0], size[1]), batch, pictures))
