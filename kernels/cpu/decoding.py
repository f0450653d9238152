"""Proposals in plain torch: right on any device, and free of host syncs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["proposals"]


def proposals(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cells: Tensor,
    widths: Sequence[int],
    strides: Sequence[int],
    image_sizes: Tensor,
    capacity: int,
    min_size: float,
    max_log_scale: float,
) -> tuple[Tensor, Tensor]:
    """The body of `trimask::proposals`; the contract stands at `trimask.kernels.proposals`.

    Args:
        strides: (down, right) of each level in a row.
    """
    dtype = torch.promote_types(deltas[0].dtype, torch.float32)
    cells = cells.to(dtype)
    per_cell = cells.shape[1]
    level_scores, level_anchors, level_deltas = [], [], []
    for level, (score, index, delta) in enumerate(zip(scores, indices, deltas, strict=True)):
        there = (index >= 0) & (index < delta.shape[1])
        score = score.to(torch.promote_types(score.dtype, torch.float32)).masked_fill(~there, -torch.inf)
        index = index.masked_fill(~there, 0)  # [B, k]
        cell = index // per_cell
        down, right = strides[2 * level : 2 * level + 2]
        corner = torch.stack([cell % widths[level] * right, cell // widths[level] * down], -1)
        anchor = cells[level][index % per_cell] + corner.repeat(1, 1, 2)
        delta = delta.gather(1, index[..., None].expand(-1, -1, 4)).to(dtype)
        missing = capacity - index.shape[1]  # every level gets the same number of rows
        level_scores.append(F.pad(score, (0, missing), value=-torch.inf))
        level_anchors.append(F.pad(anchor, (0, 0, 0, missing)))
        level_deltas.append(F.pad(delta, (0, 0, 0, missing)))
    anchors, moves, ranks = (torch.stack(parts, 1) for parts in (level_anchors, level_deltas, level_scores))
    boxes = _clip(_decode(anchors, moves, max_log_scale), image_sizes)  # [B, L, capacity, 4]
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    # What is cut to the picture is finite or NaN, and a NaN fails the comparisons.
    usable = (width >= min_size) & (height >= min_size) & (width * height > 0) & ranks.isfinite()
    boxes, ranks = boxes.masked_fill(~usable[..., None], 0), ranks.masked_fill(~usable, -torch.inf)
    return boxes.flatten(0, 1), ranks.flatten(0, 1)


def _decode(anchors: Tensor, deltas: Tensor, max_log_scale: float) -> Tensor:
    low, high = anchors[..., :2], anchors[..., 2:]
    size = high - low
    centre = deltas[..., :2] * size + (low + 0.5 * size)
    half = 0.5 * (deltas[..., 2:].clamp(max=max_log_scale).exp() * size)
    return torch.cat([centre - half, centre + half], -1)


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes `[B, L, k, 4]` cut to their picture; `sizes` is `[B, 2]` as (height, width)."""
    limit = sizes.flip(1).to(boxes.dtype).repeat(1, 2)[:, None, None]
    return torch.minimum(boxes.clamp(min=0), limit)
