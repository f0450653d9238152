"""Resized, normalised, padded pictures by dense matrices, one for each axis, in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["preprocess", "resize"]


def resize(picture: Tensor, size: tuple[int, int], *, antialias: bool, quantize: bool) -> Tensor:
    """uint8 `[H, W, 3]` -> float64 `[h, w, 3]`, as `trimask.kernels.preprocess` describes it.

    Where that follows OpenCV, this rounds exact values, from which OpenCV's are less than a level away.
    """
    down, across = (_matrix(extent, n, antialias) for extent, n in zip(picture.shape[:2], size, strict=True))
    if antialias and quantize:
        levels = picture.long()
        for matrix, places in ((across, "xw,hwc->hxc"), (down, "yh,hxc->yxc")):
            weights = (matrix * 2**22 + 0.5).floor().long()
            levels = (torch.einsum(places, weights, levels) + 2**21 >> 22).clamp(max=255)
        return levels.double()
    values = torch.einsum("yh,hxc->yxc", down, torch.einsum("xw,hwc->hxc", across, picture.double()))
    return values.round() if quantize else values


def preprocess(
    pictures: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    *,
    antialias: bool,
    quantize: bool,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """RGB `[H, W, 3]` each -> float64 `[B, 3, height, width]`."""
    batch = torch.zeros(len(pictures), *padded_size, 3, dtype=torch.float64)
    for target, picture, (h, w) in zip(batch, pictures, sizes, strict=True):
        values = resize(picture, (h, w), antialias=antialias, quantize=quantize)
        target[:h, :w] = (values - torch.tensor(mean)) / torch.tensor(std)
    return batch.permute(0, 3, 1, 2)


def _matrix(extent: int, size: int, antialias: bool) -> Tensor:
    """Weights `[size, extent]` of the pixels in each output of an axis."""
    scale = extent / size
    wide = max(scale, 1.0) if antialias else 1.0
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    if not antialias:
        centre = centre.clamp(0.5, extent - 0.5)
    pixel = torch.arange(extent) + 0.5
    weights = (1 - (pixel - centre[:, None]).abs() / wide).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
