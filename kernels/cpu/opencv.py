"""OpenCV's bilinear resize of bytes, to the last bit, in numpy: what models of MMDetection were trained on.

OpenCV rounds weights to 2048ths and multiplies in integers, once across and once down, and drops bits after both
(``resize.cpp``: ``HResizeLinear``, ``VResizeLinear`` with ``FixedPtCast``). A tenth of the pixels of a photograph come
out a level away from those of exact weights.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["resize"]


def resize(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 `[H, W, C]` -> uint8 `[h, w, C]`, as ``cv2.resize(picture, (w, h))``."""
    height, width = picture.shape[:2]
    left, right, u0, u1 = _taps(width, size[1], inside=True)
    above, below, v0, v1 = _taps(height, size[0])
    rows, place = np.unique(np.stack([above, below]), return_inverse=True)  # each row is resized once
    top, bottom = place.reshape(2, -1)
    source = picture[rows].astype(np.int32)
    across = source.take(left, 1)
    across *= u0[:, None]
    across += source.take(right, 1) * u1[:, None]
    across >>= 4
    down, other = across[top], across[bottom]
    for values, weights in ((down, v0), (other, v1)):
        values *= weights[:, None, None]
        values >>= 16
    down += other
    down += 2
    down >>= 2
    return down.astype(np.uint8)


def _taps(extent: int, size: int, inside: bool = False) -> tuple[NDArray[np.int32], ...]:
    """The pixels on either side of each output of an axis, and their weights in 2048ths.

    Beyond the first and the last pixel OpenCV takes the whole of that pixel across, and both its shares down.
    """
    at = ((np.arange(size) + 0.5) * (1 / (size / extent)) - 0.5).astype(np.float32)
    if inside:
        at = at.clip(0, extent - 1)
    low = np.floor(at)
    second = at - low
    pixels = low.astype(np.int32)
    weights = (np.rint(share * np.float32(2048)).astype(np.int32) for share in (1 - second, second))
    return pixels.clip(0, extent - 1), (pixels + 1).clip(0, extent - 1), *weights
