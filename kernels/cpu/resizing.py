"""Pictures made ready for a network by torch's interpolation, Pillow's and OpenCV's: made for the CPU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import opencv, pillow
from .bilinear import taps

__all__ = ["preprocess"]

# Times as many pixels as are wanted, from which on it is quicker to pick those that count than to make floats of all: a
# photograph of 12 megapixels takes 4 ms instead of 61 to become one of 320 x 427, and 37 instead of 69 for 800 x 1067.
MANY = 8


def preprocess(
    pictures: Sequence[Tensor],
    sizes: Sequence[int],
    height: int,
    width: int,
    antialias: bool,
    quantize: bool,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The body of `trimask::preprocess`; the contract stands at `trimask.kernels.preprocess`.

    Args:
        pictures: uint8 `[H_i, W_i, 3]`.
        sizes: (height, width) of each after it is resized, in a row.
        height, width: Of the batch.
        flip: Whether the channels come in the opposite order.
    """
    batch = pictures[0].new_zeros((len(pictures), height, width, 3), dtype=dtype).permute(0, 3, 1, 2)
    for target, picture, h, w in zip(batch, pictures, sizes[::2], sizes[1::2], strict=True):
        x = _resize(picture.flip(2) if flip else picture, (h, w), antialias, quantize)  # float32 [3, h, w]
        if any(mean) or any(s != 1 for s in std):
            x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
        target[:, :h, :w] = x
    return batch


def _resize(picture: Tensor, size: tuple[int, int], antialias: bool, quantize: bool) -> Tensor:
    if quantize and picture.shape[:2] != size:
        resize = pillow.resize if antialias else opencv.resize
        picture = torch.from_numpy(resize(picture.numpy(force=True), size)).to(picture.device)
    if not antialias and picture[..., 0].numel() > MANY * size[0] * size[1]:
        return _gathered(picture, size)
    x = picture.permute(2, 0, 1)[None].float()
    return (x if x.shape[-2:] == size else _interpolate(x, size, antialias))[0]


def _gathered(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolated without a filter, from the four pixels of each output alone."""
    (*rows, below), (*columns, beside) = (
        [torch.from_numpy(x).to(picture.device) for x in taps(length, wanted)]
        for length, wanted in zip(picture.shape, size, strict=False)
    )
    beside, below = beside[:, None], below[:, None, None]
    lines = []
    for index in rows:
        line = picture.index_select(0, index)
        left, right = (line.index_select(1, index).float() for index in columns)  # [h, w, 3]
        lines.append(left.mul_(1 - beside).addcmul_(right, beside))
    return lines[0].mul_(1 - below).addcmul_(lines[1], below).permute(2, 0, 1)


def _interpolate(x: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    height, width = size
    if antialias and width == 1:
        # torch mixes up the rows of a single column when it filters them on a CPU, at least from 2.10 to 2.15.
        column = F.interpolate(x, (x.shape[2], 1), mode="bilinear", align_corners=False, antialias=True)
        return _interpolate(column.repeat(1, 1, 1, 2), (height, 2), antialias)[..., :1]
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=antialias)
