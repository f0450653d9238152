"""Do two implementations find the same objects? Compared as sets: near ties swap rows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AUTOCAST",
    "BFLOAT16",
    "EXACT",
    "FLOAT16",
    "INT8",
    "Found",
    "Tolerance",
    "differences",
    "disagreement",
    "nearness",
    "summary",
]

_SCORE, _IOU, _MASK_IOU, _MASK_PIXELS = 1e-3, 0.99, 0.98, 2
_TIES = 50  # one detection in so many may differ: random weights leave IoUs that rounding moves across a threshold


class Found(NamedTuple):
    """The detections in one picture: boxes [N, 4], scores [N] falling, labels [N], masks bool [N, H, W] or None."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_] | None


class Tolerance(NamedTuple):
    """What passes as the same in lower precision; None for exactly the same objects.

    Attributes:
        score: how far scores of the same rank may be apart.
        share: how many of the detections must be found again, with the same label and an IoU above one half.
    """

    score: float
    share: float


# Random weights find a hundred objects of nearly equal scores, which no training has made sure of. On photographs at
# 448 x 608 and 96 x 128, float16 moved scores by up to 0.014 and found 98 % again, bfloat16 0.028 and 90 %.
EXACT: Tolerance | None = None
FLOAT16 = Tolerance(0.04, 0.9)
BFLOAT16 = Tolerance(0.08, 0.8)
# Under autocast torchvision's boxes are in lower precision too: a peer that is as far off is named and timed.
AUTOCAST = Tolerance(0.5, 0.5)
# Eight bits may turn a doubtful object into a sure one; what that costs, average precision says.
INT8 = Tolerance(1.0, 0.5)


def _ious(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU of boxes [N, 4] and [M, 4]: [N, M]."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clip(1e-9)


def _same_mask(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> bool:
    different = np.count_nonzero(a ^ b)
    return bool(different <= max(_MASK_PIXELS, (1 - _MASK_IOU) * np.count_nonzero(a | b)))


def differences(theirs: Found, ours: Found, threshold: float = 0.05, capacity: int = 100) -> int:
    """How many detections of either have no equal in the other.

    Exempt are those so close to the threshold, or to the last of a full hundred, that rounding decides about them.
    """
    cuts = [threshold, *(found.scores.min() for found in (theirs, ours) if len(found.scores) >= capacity)]
    fits = np.abs(theirs.scores[:, None] - ours.scores[None]) < _SCORE
    fits &= (theirs.labels[:, None] == ours.labels[None]) & (_ious(theirs.boxes, ours.boxes) > _IOU)
    free = np.ones(len(ours.scores), bool)
    lost = []
    for i, row in enumerate(fits):
        for j in np.flatnonzero(row & free):
            if theirs.masks is None or ours.masks is None or _same_mask(theirs.masks[i], ours.masks[j]):
                free[j] = False
                break
        else:
            lost.append(theirs.scores[i])
    alone = [*lost, *ours.scores[free]]
    return sum(not any(abs(score - cut) < _SCORE for cut in cuts) for score in alone)


def _closeness(theirs: Found, ours: Found) -> tuple[float, float]:
    """How far scores of the same rank are apart at most, and the share of ``theirs`` that ``ours`` finds again."""
    if not len(theirs.scores) or not len(ours.scores):
        return 0.0, float(len(theirs.scores) == len(ours.scores))
    common = min(len(theirs.scores), len(ours.scores))
    apart = float(np.abs(np.sort(theirs.scores)[::-1][:common] - np.sort(ours.scores)[::-1][:common]).max())
    again = (_ious(theirs.boxes, ours.boxes) > 0.5) & (theirs.labels[:, None] == ours.labels[None])
    return apart, float(again.any(1).mean())


def disagreement(theirs: list[Found], ours: list[Found], tolerance: Tolerance | None = EXACT) -> str:
    """How the detections in the same pictures differ, in words; "" where they are the same."""
    if len(theirs) != len(ours):
        return f"{len(ours)} pictures instead of {len(theirs)}"
    if not any(len(found.scores) for found in theirs):
        return "no detection to compare"
    if any((a.masks is None) != (b.masks is None) for a, b in zip(theirs, ours, strict=True)):
        return "masks on one side alone"
    if tolerance is None:
        wrong = sum(map(differences, theirs, ours))
        total = sum(len(found.scores) for found in theirs)
        return f"{wrong} detections of {total} have no equal" if wrong > total // _TIES else ""
    apart, share = summary(theirs, ours)
    fine = apart <= tolerance.score and share >= tolerance.share
    return "" if fine else f"scores {apart:.4f} apart, {share:.0%} found again"


def summary(theirs: list[Found], ours: list[Found]) -> tuple[float, float]:
    """:func:`_closeness` over several pictures: the largest distance, and the share of all detections."""
    pairs = [_closeness(a, b) for a, b in zip(theirs, ours, strict=True)]
    weights = [max(len(found.scores), 1) for found in theirs]
    return max(apart for apart, _ in pairs), float(np.average([share for _, share in pairs], weights=weights))


def nearness(exact: list[Found], rounded: list[Found]) -> str:
    """How near lower precision comes to float32, in words."""
    apart, share = summary(exact, rounded)
    return f"scores at most {apart:.4f} from float32's, {share:.0%} found again"
