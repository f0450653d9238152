"""Proposals: the chosen anchors of every level, moved by their deltas, cut to the picture and checked, in one pass.

An anchor is known by its index: anchor ``i`` of a level with A shapes is shape ``i % A`` at cell ``i // A``, cells in
row-major order, and the grid is never built. A box is its anchor with the deltas (dx, dy, dw, dh) of R-CNN (Girshick et
al., 2014, appendix C)::

    x1, x2 = (dx * w + x) -+ .5 * exp(min(dw, limit)) * w        for an anchor of centre x and width w; y likewise

What decides a result, on every device:

- Coordinates are float32 for deltas up to float32, and float64 for float64 ones, whatever the anchors' dtype. Each
  operation is rounded once, in the order written; exponentials may differ by an ulp between devices.
- A box is cut to the picture and dropped if it is narrower or lower than ``min_size``, has no area or is not a number.
  An infinite dw or dh is limited as any large one is.
- An anchor with a NaN or infinite score is dropped, and so is an index that the level does not have.
- What is dropped or missing is a box of zeros with a score of -inf.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu import decoding as _host
from .dispatch import use_triton
from .registration import register

__all__ = ["MAX_LOG_SCALE", "proposals"]

MAX_LOG_SCALE = math.log(1000 / 16)  # a delta never scales a box by more than this


@register("trimask::proposals")
def _proposals(
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
    if use_triton(cells.device):
        from .gpu.decoding import proposals as run
    else:
        run = _host.proposals
    return run(scores, indices, deltas, cells, widths, strides, image_sizes, capacity, min_size, max_log_scale)


@_proposals.register_fake
def _(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cells: Tensor,
    widths: Sequence[int],
    strides: Sequence[int],
    image_sizes: Tensor,
    capacity: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    segments = image_sizes.shape[0] * len(scores)
    coordinates, ranks = (torch.promote_types(x[0].dtype, torch.float32) for x in (deltas, scores))
    return (
        cells.new_empty((segments, capacity, 4), dtype=coordinates),
        cells.new_empty((segments, capacity), dtype=ranks),
    )


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
    min_size: float = 0.0,
    max_log_scale: float = MAX_LOG_SCALE,
) -> tuple[Tensor, Tensor]:
    """Boxes of the chosen anchors, padded to one number of rows: segments as `segmented_nms` takes them.

    Args:
        scores: `[B, k_l]` floating point for each level, of the anchors chosen there.
        indices: int64 `[B, k_l]` for each level, which anchors.
        deltas: `[B, N_l, 4]` floating point for each level, of all its anchors.
        cells: `[L, A, 4]` floating point, xyxy: the shapes of the anchors around the origin, in pixels.
        widths: Cells in a row of each level.
        strides: (down, right) for each level, pixels from a cell to the next.
        image_sizes: Integers `[B, 2]`, height and width to which boxes are cut.
        capacity: Rows of a level, at least every `k_l`.
        min_size: The smallest width and height of a box.
        max_log_scale: Limit of dw and dh.

    Returns:
        boxes: `[B * L, capacity, 4]`, xyxy in pixels; the levels of an image lie together.
        scores: `[B * L, capacity]`, float32 for scores up to float32; -inf where there is no box.

    Gradients do not pass.

    Raises:
        ValueError: For a shape, dtype, device or number that does not fit.
    """
    levels = len(scores)
    if not levels or any(len(x) != levels for x in (indices, deltas, cells, widths, strides)):
        got = [len(x) for x in (scores, indices, deltas, cells, widths, strides)]
        raise ValueError(f"scores, indices, deltas, cells, widths, strides: expected as many levels of each, got {got}")
    if cells.dim() != 3 or cells.shape[2] != 4 or not cells.is_floating_point():
        raise ValueError(f"cells: expected floating point [L, A, 4], got {cells.dtype} {list(cells.shape)}")
    if image_sizes.dim() != 2 or image_sizes.shape[1] != 2 or image_sizes.is_floating_point():
        raise ValueError(f"image_sizes: expected integers [B, 2], got {image_sizes.dtype} {list(image_sizes.shape)}")
    for score, index, delta in zip(scores, indices, deltas, strict=True):
        _check_level(score, index, delta, image_sizes.shape[0])
        if score.dtype != scores[0].dtype or delta.dtype != deltas[0].dtype:
            raise ValueError("scores, deltas: expected the same dtype on every level")
        if index.shape[1] > capacity:
            raise ValueError(f"capacity: expected at least the {index.shape[1]} anchors chosen, got {capacity}")
    for name, tensor in [
        ("image_sizes", image_sizes),
        *zip(["scores", "indices", "deltas"], (scores[0], indices[0], deltas[0]), strict=True),
    ]:
        if tensor.device != cells.device:
            raise ValueError(f"{name}: expected the device of cells, {cells.device}, got {tensor.device}")
    if (
        not cells.shape[1]
        or min(widths) < 1
        or any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in strides)
    ):
        raise ValueError(
            "cells, widths, strides: expected at least one shape, one cell in a row and a pair of strides for each "
            f"level, got cells {list(cells.shape)}, widths {list(widths)}, strides {list(strides)}"
        )
    flat = [side for stride in strides for side in stride]
    return _proposals(
        [x.detach() for x in scores],
        list(indices),
        [x.detach() for x in deltas],
        cells.detach(),
        list(widths),
        flat,
        image_sizes,
        capacity,
        min_size,
        max_log_scale,
    )


def _check_level(score: Tensor, index: Tensor, delta: Tensor, batch: int) -> None:
    if score.dim() != 2 or score.shape[0] != batch or not score.is_floating_point():
        raise ValueError(f"scores: expected floating point [{batch}, k], got {score.dtype} {list(score.shape)}")
    if index.shape != score.shape or index.dtype != torch.int64:
        raise ValueError(f"indices: expected int64 {list(score.shape)}, got {index.dtype} {list(index.shape)}")
    if delta.dim() != 3 or delta.shape[0] != batch or delta.shape[2] != 4 or not delta.is_floating_point():
        raise ValueError(f"deltas: expected floating point [{batch}, N, 4], got {delta.dtype} {list(delta.shape)}")
