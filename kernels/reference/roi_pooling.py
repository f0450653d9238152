"""RoIAlign and RoIPool as their definitions read: one RoI, one bin, one sample at a time, summed in float64."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["level_of", "pyramid_roi_align", "roi_align", "roi_pool"]


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
    coordinates: type[np.floating] = np.float64,
) -> Tensor:
    """RoIAlign of `[N, C, H, W]` by boxes `[K, 5]` -> float64 `[K, C, h, w]`, differentiable.

    `coordinates` is the precision in which samples are placed. At the border of the map a sample is or is not there,
    and adaptive sampling has one sample more or less, by a rounding: float32 shows what float32 ought to give.
    """
    planes = input.double()
    out = [_pool(planes, box, output_size, spatial_scale, sampling_ratio, aligned, mode, coordinates) for box in boxes]
    return torch.stack(out) if out else planes.new_zeros(0, input.shape[1], *output_size)


def _pool(
    planes: Tensor,
    box: Tensor,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mode: str,
    real: type[np.floating],
) -> Tensor:
    """One RoI, `[C, h, w]`."""
    n, c = planes.shape[:2]
    h, w = output_size
    image = float(box[0])
    if not box.isfinite().all() or not 0 <= image < n:
        return planes.new_zeros(c, h, w)
    half = real(0.5 if aligned else 0)
    x1, y1, x2, y2 = (real(float(side)) * real(spatial_scale) - half for side in box[1:])
    roi_width, roi_height = x2 - x1, y2 - y1
    if not aligned:
        roi_width, roi_height = max(roi_width, real(1)), max(roi_height, real(1))
    bin_height, bin_width = roi_height / real(h), roi_width / real(w)
    bins = []
    for i in range(h):
        for j in range(w):
            samples = [
                _bilinear(planes[int(image)], y, x)
                for y in _positions(y1, bin_height, i, sampling_ratio, real)
                for x in _positions(x1, bin_width, j, sampling_ratio, real)
            ]
            if not samples:
                bins.append(planes.new_zeros(c))
            else:
                stacked = torch.stack(samples)
                bins.append(stacked.mean(0) if mode == "avg" else stacked.max(0).values)
    return torch.stack(bins, -1).view(c, h, w)


def _positions(
    start: np.floating, size: np.floating, number: int, sampling_ratio: int, real: type[np.floating]
) -> Iterator[np.floating]:
    """Where the samples of a bin lie along one axis."""
    count = sampling_ratio if sampling_ratio > 0 else math.ceil(size)
    for step in range(count):
        yield start + real(number) * size + real(step + 0.5) * size / real(count)


def _bilinear(plane: Tensor, y: np.floating, x: np.floating) -> Tensor:
    """The value at one point of `[C, H, W]`, in pixel indices, `[C]`."""
    height, width = plane.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(plane.shape[0])
    down, across = min(max(float(y), 0.0), height - 1.0), min(max(float(x), 0.0), width - 1.0)
    top, left = math.floor(down), math.floor(across)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[:, top, left] * (left + 1 - across) + plane[:, top, right] * (across - left)
    lower = plane[:, bottom, left] * (left + 1 - across) + plane[:, bottom, right] * (across - left)
    return upper * (top + 1 - down) + lower * (down - top)


def level_of(
    box: Sequence[float],
    levels: int,
    first_level: int,
    canonical_size: float = 224,
    canonical_level: float = 4,
    level_epsilon: float = 1e-6,
    epsilon_inside_log: bool = False,
) -> int:
    """Equation 1 of the FPN paper for one box, counted from the first level."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    if not area > 0:
        return 0
    quotient = math.sqrt(area) / canonical_size
    if epsilon_inside_log:
        level = canonical_level + math.log2(quotient + level_epsilon)
    else:
        level = canonical_level + math.log2(quotient) + level_epsilon
    return min(max(math.floor(level) - first_level, 0), levels - 1)


def pyramid_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[float],
    output_size: Sequence[int],
    *,
    sampling_ratio: int,
    aligned: bool,
    mode: str = "avg",
    canonical_size: float = 224,
    canonical_level: float = 4,
    level_epsilon: float = 1e-6,
    epsilon_inside_log: bool = False,
    counts: Sequence[int] | None = None,
    coordinates: type[np.floating] = np.float64,
) -> Tensor:
    """RoIAlign of boxes `[B, R, 4]`, each on the level that fits its size -> float64 `[B, R, C, h, w]`."""
    rule = (canonical_size, canonical_level, level_epsilon, epsilon_inside_log)
    out = []
    for b, rows in enumerate(boxes.tolist()):
        for r, row in enumerate(rows):
            level = level_of(row, len(features), round(math.log2(strides[0])), *rule)
            missing = counts is not None and r >= counts[b]
            box = torch.tensor([[-1 if missing else b, *row]], dtype=torch.float64)
            scale = 1 / strides[level]
            out.append(
                roi_align(
                    features[level],
                    box,
                    output_size,
                    scale,
                    sampling_ratio,
                    aligned,
                    mode=mode,
                    coordinates=coordinates,
                )
            )
    shape = (*boxes.shape[:2], features[0].shape[1], *output_size)
    return torch.cat(out).view(shape) if out else features[0].double().new_zeros(shape)


def roi_pool(
    input: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    *,
    coordinates: type[np.floating] = np.float64,
) -> Tensor:
    """RoIPool of `[N, C, H, W]` by boxes `[K, 5]` -> float64 `[K, C, h, w]`, differentiable."""
    planes = input.double()
    n, c, height, width = planes.shape
    h, w = output_size
    out = planes.new_zeros(0, c, h, w)
    for box in boxes:
        image = float(box[0])
        bins = [planes.new_zeros(c)] * (h * w)
        if box.isfinite().all() and 0 <= image < n:
            real = coordinates
            x1, y1, x2, y2 = (_round(real(float(side)) * real(spatial_scale)) for side in box[1:])
            lines = [_pixels(y1, real(max(y2 - y1 + 1, 1)) / real(h), i, height) for i in range(h)]
            columns = [_pixels(x1, real(max(x2 - x1 + 1, 1)) / real(w), j, width) for j in range(w)]
            for i, (top, bottom) in enumerate(lines):
                for j, (left, right) in enumerate(columns):
                    if top < bottom and left < right:
                        bins[i * w + j] = planes[int(image), :, top:bottom, left:right].flatten(1).max(1).values
        out = torch.cat([out, torch.stack(bins, -1).view(1, c, h, w)])
    return out


def _round(x: np.floating) -> int:
    """To the nearest integer, halves away from zero."""
    nearest = math.floor(abs(float(x)) + 0.5)
    return nearest if x > 0 else -nearest


def _pixels(start: int, size: np.floating, number: int, extent: int) -> tuple[int, int]:
    """First pixel of a bin along one axis, and the one after its last."""
    real = type(size)
    begin = start + math.floor(real(number) * size)
    end = start + math.ceil(real(number + 1) * size)
    return min(max(begin, 0), extent), min(max(end, 0), extent)
