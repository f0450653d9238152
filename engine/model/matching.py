"""Which object a box is to learn, and which boxes of many take part (Faster R-CNN, Ren et al., 2015, section 3.1.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import boxes as B

__all__ = ["ANCHORS", "BACKGROUND", "IGNORED", "OBJECTS", "PROPOSALS", "Sample", "match", "random_keys", "sample"]

BACKGROUND, IGNORED = -1, -2
ANCHORS, PROPOSALS, OBJECTS = 0, 1 << 30, 2 << 30  # from where on :func:`random_keys` counts the rows of each
KEYS = 1 << 32  # of the random choice: how many there are
_ALL = KEYS - 1  # bits of one


def match(
    boxes: Tensor,
    objects: Tensor,
    real: Tensor,
    crowd: Tensor,
    *,
    foreground: float,
    background: float,
    allow_low_quality_matches: bool,
    crowd_threshold: float | None,
) -> Tensor:
    """For each box of a picture the index of its object, :data:`BACKGROUND` or :data:`IGNORED`; int64 [B, N].

    Args:
        boxes: [B, N, 4].
        objects: [B, G, 4].
        real: bool [B, G], objects that can be learned; other rows match nothing.
        crowd: bool [B, G], rows that are regions to ignore.
        foreground: IoU from which on a box takes the object that it overlaps most.
        background: IoU below which it is background.
        allow_low_quality_matches: a box that an object overlaps most, if at all, is foreground whatever their IoU; it
            takes the object that *it* overlaps most.
        crowd_threshold: a box of the background is ignored, where more than this share of its area lies in a crowd's
            box; None counts it as background.
    """
    shared, area = B.intersection(objects, boxes), B.area(boxes)[:, None]  # [B, G, N], [B, 1, N]
    overlap = shared / (B.area(objects)[..., None] + area - shared)
    overlap.masked_fill_(~real[..., None], -1.0)
    best, nearest = overlap.max(1)
    found = torch.where(best >= foreground, nearest, torch.where(best < background, BACKGROUND, IGNORED))
    if allow_low_quality_matches:
        most = overlap.amax(2, keepdim=True)
        found = torch.where(((overlap == most) & (most > 0)).any(1), nearest, found)
    if crowd_threshold is not None:
        covered = (shared / area).masked_fill_(~crowd[..., None], 0.0).amax(1) > crowd_threshold
        found = torch.where(covered & (found == BACKGROUND), IGNORED, found)
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


def random_keys(seeds: Tensor, *kinds: tuple[int, int]) -> list[Tensor]:
    """Random keys for rows of pictures, by which to choose among them: for each kind int64 [B, rows], 0 to `KEYS` - 1.

    A key is a function of its picture's seed and its row alone, the same on every device, whatever else is in the
    batch. No two rows of a picture have the same. Kinds are drawn at once, in as many operations as one.

    Args:
        seeds: int64 [B].
        kinds: (first, rows): the number of the first row, and how many. Rows of other kinds have other numbers, and so
            other keys.
    """
    seed = _mix(_mix(seeds & _ALL) ^ (seeds >> 32 & _ALL))[:, None]
    row = torch.cat([torch.arange(first, first + rows, device=seeds.device) for first, rows in kinds])
    return list(_mix(_mix(row + seed & _ALL) ^ seed).split([rows for _, rows in kinds], 1))


def _mix(x: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits in which each bit depends on all others (Wellons' hash-prospector).

    Its factors are below 2**31, so that no product leaves int64.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _ALL
    x = (x ^ (x >> 15)) * 0x735A2D97 & _ALL
    return x ^ (x >> 15)


def sample(matches: Tensor, total: int, positives: int, keys: Tensor) -> Sample:
    """At random ``positives`` boxes of the foreground or fewer, and of the background up to ``total`` in all.

    The largest keys win: no shape depends on how many there are of either.

    Args:
        matches: int64 [B, N] of :func:`match`.
        total: S, cut to N.
        positives: no more than ``total``.
        keys: [B, N] of :func:`random_keys`.
    """
    capacity = matches.shape[1]
    best, index = torch.where(matches >= 0, keys, -1).topk(min(positives, capacity), 1)
    keys = torch.where(matches == BACKGROUND, keys, -1)
    ahead = best + KEYS  # of all background
    keys = keys.scatter(1, index, torch.where(best >= 0, ahead, keys.gather(1, index)))
    best, index = keys.topk(min(total, capacity), 1)
    return Sample(index, best >= KEYS, best >= 0)
