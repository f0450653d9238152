"""Arithmetic on boxes: xyxy, continuous coordinates, float32 or better."""

import math

import torch
from torch import Tensor

from ...kernels.decoding import MAX_LOG_SCALE

__all__ = ["area", "clip", "decode", "encode", "intersection", "iou", "is_valid"]


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, float]) -> Tensor:
    """Boxes moved and scaled by the deltas (dx, dy, dw, dh) of R-CNN (Girshick et al., 2014, appendix C).

    Args:
        deltas: [..., 4], any float dtype.
        boxes: [..., 4], broadcast against ``deltas``.
        weights: dx and dy are divided by the first, dw and dh by the second.

    Returns:
        [..., 4], float32 (float64 if the boxes are).
    """
    deltas = deltas.to(boxes.dtype)
    low, high = boxes[..., :2], boxes[..., 2:]
    size = high - low
    centre = low + 0.5 * size
    shift, scale = deltas[..., :2] / weights[0], deltas[..., 2:] / weights[1]
    centre = shift * size + centre
    half = 0.5 * (scale.clamp(max=MAX_LOG_SCALE).exp() * size)
    return torch.cat([centre - half, centre + half], -1)


def encode(targets: Tensor, boxes: Tensor, weights: tuple[float, float]) -> Tensor:
    """The deltas that take ``boxes`` to ``targets``, both [..., 4]: the inverse of :func:`decode`."""
    size = boxes[..., 2:] - boxes[..., :2]
    target_size = targets[..., 2:] - targets[..., :2]
    shift = (targets[..., :2] + 0.5 * target_size - boxes[..., :2] - 0.5 * size) / size
    return torch.cat([shift * weights[0], (target_size / size).log() * weights[1]], -1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, ..., 4] cut to their picture; ``sizes`` is [B, 2] as (height, width)."""
    limit = sizes.flip(1).to(boxes.dtype).repeat(1, 2)  # [B, 4]
    limit = limit.view(sizes.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limit)


def is_valid(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Which boxes [..., 4] are finite and at least ``min_size`` on both sides; [...] bool."""
    size = boxes[..., 2:] - boxes[..., :2]  # of a side that is not finite, NaN or infinite
    return ((size >= min_size) & (size < math.inf)).all(-1)


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """The area that every pair shares: [..., N, 4], [..., M, 4] -> [..., N, M]."""
    # [..., N, 1] and [..., 1, M] each; coordinate by coordinate, torch has long rows
    left, top, right, bottom = a[..., None].unbind(-2)
    to_left, to_top, to_right, to_bottom = b[..., None, :, :].unbind(-1)
    width = torch.minimum(right, to_right) - torch.maximum(left, to_left)
    height = torch.minimum(bottom, to_bottom) - torch.maximum(top, to_top)
    return width.clamp_(min=0) * height.clamp_(min=0)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair: [..., N, 4], [..., M, 4] -> [..., N, M]."""
    shared = intersection(a, b)
    return shared / (area(a)[..., None] + area(b)[..., None, :] - shared)
