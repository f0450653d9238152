"""Greedy non-maximum suppression as it is defined: one box at a time against every other."""

import torch
from torch import Tensor

__all__ = ["iou", "segmented_nms"]


def iou(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU of one box ``[4]`` with each of ``[N, 4]``, as ``[N]``; NaN where both are empty."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0)
    intersection = sides[:, 0] * sides[:, 1]
    area = (box[2] - box[0]) * (box[3] - box[1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return intersection / (area + areas - intersection)


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
    """See :func:`trimask.kernels.segmented_nms`. IoUs are those of the boxes' dtype, compared in float64."""
    segments, _ = scores.shape
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    keep = torch.full((segments, max_keep), -1, dtype=torch.int64)
    count = torch.zeros(segments, dtype=torch.int32)
    for s in range(segments):
        alive = boxes[s].isfinite().all(dim=1) & ~scores[s].isnan()
        if score_threshold is not None:
            alive &= scores[s] > score_threshold
        if counts is not None:
            alive[int(counts[s].clamp(min=0)) :] = False
        # NaN sorts first, but is not alive.
        for i in scores[s].argsort(descending=True, stable=True).tolist():
            if not alive[i] or count[s] == max_keep:
                continue
            keep[s, count[s]] = i
            count[s] += 1
            suppressed = iou(boxes[s, i], boxes[s]).double() > iou_threshold
            if labels is not None:
                suppressed &= labels[s] == labels[s, i]
            alive &= ~suppressed
    return keep, count
