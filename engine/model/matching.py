"""Which object a box is to learn, and which boxes of many take part (Faster R-CNN, Ren et al., 2015, section 3.1.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import boxes as B

__all__ = ["BACKGROUND", "NEITHER", "Sample", "match", "sample"]

BACKGROUND, NEITHER = -1, -2


def match(
    boxes: Tensor,
    objects: Tensor,
    real: Tensor,
    crowd: Tensor,
    *,
    foreground: float,
    background: float,
    favourites: bool,
    crowd_threshold: float | None,
) -> Tensor:
    """For each box of one picture the index of its object, :data:`BACKGROUND` or :data:`NEITHER`; int64 [N].

    Args:
        boxes: [N, 4].
        objects: [G, 4].
        real: bool [G], objects that can be learned; other rows match nothing.
        crowd: bool [G], rows that are regions to ignore.
        foreground: IoU from which on a box takes the object that it overlaps most.
        background: IoU below which it is background.
        favourites: a box that an object overlaps most, if at all, is foreground whatever their IoU; it takes the
            object that *it* overlaps most.
        crowd_threshold: a box of the background is neither, where more than this share of its area lies in a crowd's
            box; None counts it as background.
    """
    shared, area = B.intersection(objects, boxes), B.area(boxes)  # [G, N], [N]
    overlap = shared / (B.area(objects)[:, None] + area - shared)
    overlap.masked_fill_(~real[:, None], -1.0)
    best, nearest = overlap.max(0)
    found = torch.where(best >= foreground, nearest, torch.where(best < background, BACKGROUND, NEITHER))
    if favourites:
        most = overlap.amax(1, keepdim=True)
        found = torch.where(((overlap == most) & (most > 0)).any(0), nearest, found)
    if crowd_threshold is not None:
        covered = (shared / area).masked_fill_(~crowd[:, None], 0.0).amax(0) > crowd_threshold
        found = torch.where(covered & (found == BACKGROUND), NEITHER, found)
    return found


class Sample(NamedTuple):
    """Boxes to learn from, in rows: the foreground first, then the background, then rows that are not there.

    Attributes:
        index: int64 [B, S], which of the candidates.
        foreground: bool [B, S].
        there: bool [B, S].
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody misses
    foreground: Tensor
    there: Tensor


def sample(matches: Tensor, total: int, positives: int, generator: torch.Generator | None) -> Sample:
    """At random ``positives`` boxes of the foreground or fewer, and of the background up to ``total`` in all.

    Every box draws a key, and the largest keys win: no shape depends on how many there are of either.

    Args:
        matches: int64 [B, N] of :func:`match`.
        total: S, cut to N.
        positives: no more than ``total``.
        generator: on the device of the matches.
    """
    capacity = matches.shape[1]
    key = torch.rand(matches.shape, generator=generator, device=matches.device)
    best, index = torch.where(matches >= 0, key, -1.0).topk(min(positives, capacity), 1)
    key = torch.where(matches == BACKGROUND, key, -1.0)
    key = key.scatter(1, index, torch.where(best >= 0, best + 2, key.gather(1, index)))  # ahead of all background
    best, index = key.topk(min(total, capacity), 1)
    return Sample(index, best >= 1, best >= 0)
