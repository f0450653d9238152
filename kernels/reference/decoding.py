"""Proposals, one anchor at a time, in float64."""

from collections.abc import Sequence
from math import exp, inf, isfinite, isnan

import torch
from torch import Tensor

__all__ = ["proposals"]


def proposals(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cells: Tensor,
    widths: Sequence[int],
    strides: Sequence[tuple[int, int]],
    image_sizes: Tensor,
    *,
    capacity: int,
    min_size: float,
    max_log_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `trimask.kernels.proposals`; the whole grid of anchors is built here."""
    batch, levels = len(image_sizes), len(scores)
    boxes = torch.zeros(batch, levels, capacity, 4, dtype=torch.float64)
    out_scores = torch.full((batch, levels, capacity), -inf, dtype=torch.float64)
    for level in range(levels):
        down, right = strides[level]
        rows = deltas[level].shape[1] // (widths[level] * cells.shape[1])
        grid = [
            (x1 + column * right, y1 + row * down, x2 + column * right, y2 + row * down)
            for row in range(rows)
            for column in range(widths[level])
            for x1, y1, x2, y2 in cells[level].tolist()
        ]
        for image in range(batch):
            height, width = image_sizes[image].tolist()
            chosen = zip(scores[level][image].tolist(), indices[level][image].tolist(), strict=True)
            for row, (score, index) in enumerate(chosen):
                if not isfinite(score) or not 0 <= index < len(grid):
                    continue
                x1, y1, x2, y2 = grid[index]
                dx, dy, dw, dh = deltas[level][image, index].tolist()
                x1, x2 = _axis(x1, x2, dx, dw, width, max_log_scale)
                y1, y2 = _axis(y1, y2, dy, dh, height, max_log_scale)
                if x2 - x1 >= min_size and y2 - y1 >= min_size and (x2 - x1) * (y2 - y1) > 0:
                    boxes[image, level, row] = torch.tensor([x1, y1, x2, y2], dtype=torch.float64)
                    out_scores[image, level, row] = score
    return boxes.flatten(0, 1), out_scores.flatten(0, 1)


def _axis(low: float, high: float, shift: float, log_scale: float, limit: float, max_log_scale: float) -> tuple:
    """The sides of a box; two NaN if one is."""
    centre = (low + high) / 2 + shift * (high - low)
    half = exp(min(log_scale, max_log_scale)) * (high - low) / 2
    sides = centre - half, centre + half
    if isnan(log_scale) or any(map(isnan, sides)):
        return torch.nan, torch.nan
    return tuple(min(max(side, 0.0), limit) for side in sides)
