"""Thresholds in the precision of what is compared with them."""

from typing import Any

import numpy as np

__all__ = ["not_above"]


def not_above(threshold: float, dtype: Any) -> Any:
    """The largest number of a numpy dtype that is not above the threshold: ``x > threshold`` says the same with it."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        rounded = kind(threshold)
    return rounded if float(rounded) <= threshold else np.nextafter(rounded, kind(-np.inf))
