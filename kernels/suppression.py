"""Greedy non-maximum suppression over padded segments, and the two drop-in functions built on it.

A box is kept unless its IoU with a kept box of a higher score exceeds the threshold. Segments (an image and a level, an
image and a class, or an image with labels) stay apart by construction; no box is moved by a per-class offset, which is
inexact and overflows in float16 (pytorch/vision#3371).

What decides a result, on every device:

- Order is by falling score, and among equal scores by rising index.
- ``IoU = intersection / (area_a + area_b - intersection)`` in float32 for float16, bfloat16 and float32 boxes, in
  float64 for float64 ones, each operation rounded once (IEEE). It is compared as if in float64, as torchvision does on
  a CPU: with the threshold rounded *down* to the boxes' dtype, ``>`` gives the same. So in float32 an IoU of exactly
  .1, .2, .3, .4, .6 or .8 is suppressed at that threshold, because the nearest float32 lies above the decimal, and
  .5, .7 or .9 is kept.
- Empty boxes overlap nothing (0 / 0 is not above any threshold), not even their duplicates; inverted ones neither.
- A box with a NaN score, or with a coordinate that is not finite, is never kept and suppresses nothing. Infinite
  scores are ordinary: +inf comes first, -inf last.
"""

from typing import Any

import torch
from torch import Tensor

from .cpu import suppression as _host
from .dispatch import use_triton
from .registration import register

__all__ = ["batched_nms", "nms", "segmented_nms"]


@register("trimask::segmented_nms")
def _segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    labels: Tensor | None = None,
    score_threshold: float | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if use_triton(boxes.device):
        from .gpu.suppression import segmented_nms as run
    else:
        run = _host.segmented_nms
    return run(boxes, scores, iou_threshold, max_keep, labels, score_threshold, counts)


@_segmented_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int, *_: Any) -> tuple[Tensor, Tensor]:
    segments = boxes.shape[0]
    return (
        boxes.new_empty((segments, max_keep), dtype=torch.int64),
        boxes.new_empty((segments,), dtype=torch.int32),
    )


def segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    *,
    labels: Tensor | None = None,
    score_threshold: float | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Suppress overlapping boxes within each segment; output of fixed shape.

    Args:
        boxes: ``[S, N, 4]`` floating point, xyxy in any unit, any sign.
        scores: ``[S, N]`` floating point, of any dtype from 16 bits on.
        iou_threshold: a box is suppressed by a kept one where their IoU is strictly above this; not negative.
        max_keep: capacity of the output for each segment; the work ends when it is reached.
        labels: ``[S, N]`` of any dtype; boxes suppress each other only within equal labels.
        score_threshold: only scores strictly above it take part (compared in the dtype of ``scores``).
        counts: ``[S]`` integers; only the first ``counts[s]`` boxes of a segment are there, the rest is padding.

    Returns:
        ``keep`` int64 ``[S, max_keep]``, indices into N by falling score, then -1; ``count`` int32 ``[S]``, how many.

    Raises:
        ValueError: a shape, dtype, device or number is not as above.
    """
    if boxes.ndim != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes: expected [S, N, 4], got {list(boxes.shape)}")
    _check_floating(boxes, scores, iou_threshold)
    segments = boxes.shape[0]
    _check_shape("scores", scores, boxes.shape[:2], boxes)
    if labels is not None:
        _check_shape("labels", labels, boxes.shape[:2], boxes)
    if counts is not None:
        _check_shape("counts", counts, (segments,), boxes)
    if max_keep < 0:
        raise ValueError(f"max_keep: expected 0 or more, got {max_keep}")
    return _segmented_nms(boxes, scores, iou_threshold, max_keep, labels, score_threshold, counts)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Drop-in for ``torchvision.ops.nms``.

    Args:
        boxes: ``[N, 4]`` floating point, xyxy.
        scores: ``[N]`` floating point.
        iou_threshold: a box is suppressed by a kept one where their IoU is strictly above this; not negative.

    Returns:
        Indices of the kept boxes, int64, by falling score and then rising index. Equal to torchvision's on a CPU,
        except that boxes with a NaN score or non-finite coordinates are dropped.

    Raises:
        ValueError: a shape, dtype, device or number is not as above.
    """
    return _all_kept(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Drop-in for ``torchvision.ops.batched_nms``: suppression within each category of ``idxs``, ``[N]`` of any dtype.

    Equal to running :func:`nms` for each category and merging by score: there is no coordinate offset to lose digits.
    Arguments, result and errors are otherwise those of :func:`nms`, but boxes may also be ``[0]``, as in torchvision.
    """
    if boxes.shape == (0,):
        boxes = boxes.reshape(0, 4)
    return _all_kept(boxes, scores, idxs, iou_threshold)


def _all_kept(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes: expected [N, 4], got {list(boxes.shape)}")
    _check_floating(boxes, scores, iou_threshold)
    n = boxes.shape[0]
    _check_shape("scores", scores, (n,), boxes)
    if idxs is not None:
        _check_shape("idxs", idxs, (n,), boxes)
        idxs = idxs[None]
    if torch.compiler.is_compiling() and _is_zero(n):  # which the compiler cannot take any further
        return boxes.new_empty(0, dtype=torch.int64)
    keep, count = _segmented_nms(boxes[None], scores[None], iou_threshold, n, idxs)
    return keep[0, : count.item()]


def _is_zero(n: int) -> bool:
    """Whether a size is known to be zero; one that depends on data, as after another suppression, is not asked."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(n == 0))


def _check_floating(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{name}: expected a floating point dtype of at least 16 bits, got {tensor.dtype}")
    if not iou_threshold >= 0:
        raise ValueError(f"iou_threshold: expected 0 or more, got {iou_threshold}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], boxes: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {list(shape)} beside boxes {list(boxes.shape)}, got {list(tensor.shape)}")
    if tensor.device != boxes.device:
        raise ValueError(f"{name}: expected the device of boxes, {boxes.device}, got {tensor.device}")
