"""Bilinear interpolation without a filter: which two pixels each output lies between. Needs no torch."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["taps"]


def taps(length: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Along an axis of ``length`` pixels of which ``wanted`` are made, as `torch.nn.functional.interpolate` has it.

    Returns:
        For each output the pixel below and the one above, int64, and the share of the latter, float32.
    """
    scale = np.float32(length) / np.float32(wanted)
    # Rounded once, as by processors that multiply and add at a time.
    at = np.maximum((np.arange(wanted) + 0.5) * np.float64(scale) - 0.5, 0).astype(np.float32)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), at - low.astype(np.float32)
