"""Do two programs find the same detections? Compared as sets, since near ties swap rows."""

from typing import Any, NamedTuple

import numpy as np

from tolerances import CUT_TIE, MATCH_IOU, MATCH_MASK_IOU, MATCH_MASK_PIXELS, MATCH_SCORE

__all__ = ["Found", "differences", "of_result", "of_torchvision", "same"]


class Found(NamedTuple):
    """Detections of one picture: boxes [N, 4], scores [N], labels [N], dense masks bool [N, H, W]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def of_result(result: Any) -> Found:
    return Found(result.boxes, result.scores, result.labels, result.masks)


def of_torchvision(output: dict[str, Any]) -> Found:
    """torchvision's labels start at 1, and it leaves the threshold, > 0.5 in its examples, to the caller."""
    boxes, scores, labels = (output[key].numpy() for key in ("boxes", "scores", "labels"))
    return Found(boxes, scores, labels - 1, (output["masks"][:, 0] > 0.5).numpy())


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    return shared / (np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - shared)


def _same_mask(a: np.ndarray, b: np.ndarray) -> bool:
    different, union = np.count_nonzero(a ^ b), np.count_nonzero(a | b)
    return different <= MATCH_MASK_PIXELS or 1 - different / union > MATCH_MASK_IOU


def _cut_tie(box: np.ndarray, cells: int = 28) -> bool:
    """Whether rounding decides which whole pixels torchvision cuts a box to, once grown by a cell on each side."""
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (cells + 2) / cells
    grown = np.concatenate([middle - half, middle + half])
    return bool(np.abs(grown - grown.round()).min() < CUT_TIE)


def differences(
    ours: Found, theirs: Found, threshold: float = 0.05, capacity: int = 100, *, cut: bool = False
) -> list[str]:
    """What does not match, in words; nothing if the two agree.

    Exempt are detections so close to the score threshold, or to the last of a full hundred, that rounding decides
    whether they are in; and masks of boxes so close to whole pixels, where masks are pasted into those (`cut`).
    """
    cuts = [threshold]
    cuts += [found.scores.min() for found in (ours, theirs) if len(found.scores) == capacity]

    def excused(score: float) -> bool:
        return any(abs(score - cut) < MATCH_SCORE for cut in cuts)

    free = np.ones(len(ours.scores), bool)
    wrong = []
    for i, (box, score, label) in enumerate(zip(theirs.boxes, theirs.scores, theirs.labels, strict=True)):
        near = np.abs(ours.scores - score)
        fits = free & (ours.labels == label) & (near < MATCH_SCORE) & (_iou(box, ours.boxes) > MATCH_IOU)
        tie = cut and _cut_tie(box)
        fits = [j for j in np.flatnonzero(fits) if tie or _same_mask(ours.masks[j], theirs.masks[i])]
        if fits:
            free[min(fits, key=lambda j: near[j])] = False
        elif not excused(score):
            wrong.append(f"missing: label {label}, score {score:.4f}, box {np.round(box, 1)}")
    for j in np.flatnonzero(free):
        if not excused(ours.scores[j]):
            wrong.append(f"extra: label {ours.labels[j]}, score {ours.scores[j]:.4f}, box {np.round(ours.boxes[j], 1)}")
    return wrong


def same(a: Any, b: Any) -> bool:
    """Whether two results hold the same detections bit by bit, at least one."""
    return (
        len(a) > 0
        and np.array_equal(a.boxes, b.boxes)
        and np.array_equal(a.scores, b.scores)
        and np.array_equal(a.labels, b.labels)
        and a.has_masks == b.has_masks
        and (not a.has_masks or a.rle() == b.rle())
    )
