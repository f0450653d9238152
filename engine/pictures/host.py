"""From uint8 pictures to the network's batch in numpy and Pillow, for runtimes without torch.

The twin of :mod:`.preprocess`, whose op :mod:`..kernels.resizing` says what decides a pixel. Whole
levels are equal to the bit; floats agree to a few units in the last place, as torch's own do between processors.
"""

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu import opencv, pillow
from ...kernels.cpu.bilinear import taps
from ..model.config import InputConfig, ResizeConfig
from .resize import padded_size, resized_size

__all__ = ["make_batch"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def make_batch(
    pictures: list[Bytes], config: InputConfig, fixed: tuple[int, int] | None = None
) -> tuple[Floats, Ints, Ints]:
    """Pictures of any sizes -> the model's input: ``image``, ``image_sizes``, ``original_sizes``.

    Args:
        pictures: uint8 RGB [H, W, 3] each.
        fixed: (height, width) of the batch, in which a picture that the config makes larger is shrunk to fit.

    Returns:
        float32 [B, 3, H, W] in 0..255, padded with zeros; int64 [B, 2] and [B, 2].
    """
    originals = [picture.shape[:2] for picture in pictures]
    sizes = [resized_size(size, config.resize) for size in originals]
    if fixed is not None:
        sizes = [_within(size, fixed) for size in sizes]
    height, width = fixed or padded_size(sizes, config.size_divisible)
    batch = np.zeros((len(pictures), 3, height, width), np.float32)
    for target, picture, (h, w) in zip(batch, pictures, sizes, strict=True):
        target[:, :h, :w] = _resize(picture, (h, w), config.resize).transpose(2, 0, 1)
    return batch, np.array(sizes, np.int64), np.array(originals, np.int64)


def _resize(picture: Bytes, size: tuple[int, int], config: ResizeConfig) -> Floats | Bytes:
    """One picture, uint8 RGB [H, W, 3] -> levels 0..255 [h, w, 3]: uint8 where they are whole, else float32."""
    if picture.shape[:2] == size:
        return picture
    height, width = size
    if config.antialias and config.quantize:
        return pillow.resize(picture, size)
    if config.quantize:
        return opencv.resize(picture, size)
    resample = _filtered if config.antialias else _interpolated
    return resample(resample(picture, height).swapaxes(0, 1), width).swapaxes(0, 1)


def _within(size: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    scale = min(limit[0] / size[0], limit[1] / size[1], 1.0)
    return min(max(int(size[0] * scale), 1), limit[0]), min(max(int(size[1] * scale), 1), limit[1])


def _interpolated(x: Floats | Bytes, length: int) -> Floats:
    """Bilinear along the first axis, between the two neighbours."""
    low, high, share = taps(x.shape[0], length)
    share = share.reshape(-1, *[1] * (x.ndim - 1))
    return (1 - share) * x[low] + share * x[high]


def _filtered(x: Floats | Bytes, length: int) -> Floats:
    """Along the first axis by a triangle as wide as the scale, at least a pixel to either side."""
    scale = x.shape[0] / length
    support = max(scale, 1.0)
    centre = scale * (np.arange(length)[:, None] + 0.5)
    away = np.abs(np.arange(x.shape[0]) + 0.5 - centre) / support
    weights = np.maximum(1 - away, 0)  # [length, rows]
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return (weights @ x.reshape(x.shape[0], -1)).reshape(length, *x.shape[1:])
