"""Non-maximum suppression on the host: exact, with work close to the number of true overlaps.

Greedy suppression needs only the pairs whose IoU exceeds the threshold ``t``, and those are few. ``IoU > t`` in two
dimensions implies it in each one: with boxes sorted by their left side, a partner ``j`` of ``i`` to its right satisfies
``x1_j < x2_i - t * w_i``, a short window found by binary search; where boxes stand in columns, as lines of text do, by
their upper side likewise. The pairs of all windows are expanded at once, filtered by the same bound on the other axis,
and only the rest get an IoU. The surviving pairs, ordered by rank, are then
walked as the definition has it: a box that is still alive suppresses its lower neighbours.

Boxes enter in blocks by falling score, and each block meets only the survivors so far, so that ``max_keep`` ends the
work early and a crowd of overlapping boxes never meets itself as a whole.

numpy rather than torch: its calls cost less, and that is most of the time for a few hundred boxes. Tensors of other
devices are brought to the host, and the result is taken back.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..rounding import not_above

__all__ = ["segmented_nms"]

Floats = NDArray[np.floating]
Indices = NDArray[np.int64]

# One thread of an AMD EPYC (AVX-512), 1000 boxes of which 160 / 600 / 1000 survive: blocks of 256 take 1.1 / 0.9 / 0.4
# ms, of 512 1.0 / 0.6 / 0.3, of 1024 1.4 / 0.4 / 0.2.
_FIRST_BLOCK = 512
# Candidate pairs expanded together: their dozen temporary arrays stay in the second-level cache.
_PAIRS_AT_ONCE = 1 << 16
# The other axis is tried where there are more boxes than the first, with more than one in the second of all pairs: that
# costs a tenth of a millisecond for a thousand, and 20000 lines of text one below the other take 7 ms instead of 3 s.
_FEW, _CROWDED = 256, 8
# Overlaps held at once (8 bytes each); a block with more is halved.
_MAX_OVERLAPS = 1 << 20
# Far above what rounding does to an IoU of boxes whose area is no smaller than this.
_SLACK, _SMALLEST_AREA = 1e-3, 1e-30


def segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    labels: Tensor | None,
    score_threshold: float | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The body of ``trimask::segmented_nms``; the contract stands at :func:`trimask.kernels.segmented_nms`."""
    device = boxes.device
    boxes, scores = boxes.detach().cpu(), scores.detach().cpu()
    # A NaN score fails both comparisons.
    taking_part = scores == scores if score_threshold is None else scores > score_threshold  # [S, N]
    if counts is not None:
        taking_part &= torch.arange(scores.shape[1]) < counts.cpu()[:, None]
    # Nothing below float32: float16 has no room for pixels beyond 2048, nor for their areas.
    all_boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).numpy()
    all_scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    all_labels = None if labels is None else labels.detach().cpu()
    threshold = not_above(iou_threshold, all_boxes.dtype)

    keep = np.full((len(all_boxes), max_keep), -1, dtype=np.int64)
    count = np.zeros(len(all_boxes), dtype=np.int32)
    # 0 / 0 and overflow are meant: they are "no overlap".
    with np.errstate(all="ignore"):
        for segment, live in enumerate(taking_part.numpy()):
            candidates = np.flatnonzero(live)
            corners = np.ascontiguousarray(all_boxes[segment][candidates].T)  # [4, n]
            finite = np.isfinite(corners).all(axis=0)
            if not finite.all():
                candidates, corners = candidates[finite], corners[:, finite]
            if not len(candidates):
                continue
            order = np.argsort(-all_scores[segment].take(candidates), kind="stable")
            candidates, corners = candidates.take(order), corners.take(order, axis=1)
            groups = None
            if all_labels is not None:
                groups = torch.unique(all_labels[segment][candidates], return_inverse=True)[1].numpy()
            kept = candidates.take(_greedy(corners, groups, threshold, max_keep))
            keep[segment, : len(kept)] = kept
            count[segment] = len(kept)
    return torch.from_numpy(keep).to(device), torch.from_numpy(count).to(device)


def _greedy(corners: Floats, groups: Indices | None, threshold: np.floating, max_keep: int) -> Indices:
    """Ranks that survive, ascending and at most ``max_keep``, of boxes ``[4, n]`` in order of falling score."""
    n = corners.shape[1]
    kept = np.arange(0)
    start, first = 0, min(_FIRST_BLOCK, max(64, 2 * max_keep))
    size = first
    while start < n and len(kept) < max_keep:
        block = np.arange(start, min(start + size, n))
        pool = np.concatenate([kept, block])
        overlaps = _overlaps(corners[:, pool], None if groups is None else groups[pool], threshold)
        if overlaps is None:
            size //= 2
            continue
        kept = pool[_survivors(len(pool), *overlaps)]
        start += size
        # As many newcomers as survivors: the survivors are paired again each round, so rounds must be few.
        size = max(first, min(2 * size, len(kept)))
    return kept[:max_keep]


def _overlaps(corners: Floats, groups: Indices | None, threshold: np.floating) -> tuple[Indices, Indices] | None:
    """Pairs of ranks ``(higher, lower)`` in one group with IoU above the threshold, sorted; None where too many."""
    n = corners.shape[1]
    x1, y1, x2, y2 = corners
    width, height = np.maximum(x2 - x1, 0), np.maximum(y2 - y1, 0)
    area = width * height
    # Below, a rounded comparison with this bound must never lose a pair. Products near the smallest floats have too
    # few digits for any slack, and there every two boxes that touch are compared.
    bound = max(float(threshold) - _SLACK, 0.0)
    if area.min(where=area > 0, initial=1.0) < _SMALLEST_AREA:
        bound = 0.0
    order, partners = _windows(x1, x2, width, bound, groups)
    if n > _FEW and _CROWDED * int(partners.sum()) > n * n:
        other, fewer = _windows(y1, y2, height, bound, groups)
        if fewer.sum() < partners.sum():
            order, partners, corners, height = other, fewer, corners[[1, 0, 3, 2]], width
    total = np.cumsum(partners)
    x1, y1, x2, y2 = corners.take(order, axis=1)
    area, least_height = area.take(order), (height * area.dtype.type(bound)).take(order)

    found: list[Indices] = []
    room = max(_MAX_OVERLAPS, n)
    begin, done = 0, 0
    while begin < n:
        end = max(begin + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right")))
        many = partners[begin:end]
        i = np.repeat(np.arange(begin, end), many)
        # i + 1, i + 2, .. of each i: one running number, less where the run of i begins.
        j = np.arange(len(i)) - np.repeat(total[begin:end] - many - done - np.arange(begin + 1, end + 1), many)
        tall = np.minimum(y2.take(i), y2.take(j)) - np.maximum(y1.take(i), y1.take(j))
        likely = np.flatnonzero(tall > least_height.take(i))
        i, j, tall = i.take(likely), j.take(likely), tall.take(likely)
        wide = np.minimum(x2.take(i), x2.take(j)) - np.maximum(x1.take(i), x1.take(j))
        # Negative where the boxes lie apart, and so is the IoU: no area is.
        intersection = wide * tall
        iou = intersection / (area.take(i) + area.take(j) - intersection)
        over = np.flatnonzero(iou > threshold)
        i, j = order.take(i.take(over)), order.take(j.take(over))
        if groups is not None:
            same = groups.take(i) == groups.take(j)
            i, j = i[same], j[same]
        found.append(np.minimum(i, j) << 32 | np.maximum(i, j))
        room -= len(i)
        if room < 0:
            return None
        begin, done = end, int(total[end - 1])
    pairs = np.concatenate(found)
    pairs.sort()
    return pairs >> 32, pairs & 0xFFFFFFFF


def _windows(
    low: Floats, high: Floats, length: Floats, bound: float, groups: Indices | None
) -> tuple[Indices, Indices]:
    """Boxes by where they begin on an axis, and how many of those behind each may overlap it by so much."""
    first, last = low, high - length * low.dtype.type(bound)
    if groups is not None:
        # Each group has a stretch of the axis to itself, unless the boxes reach so far that numbers run out.
        least = float(low.min())
        offset = groups * (2 * (float(high.max()) - least) + 1)
        first, last = offset + (first - least), offset + (last - least)
    order = np.argsort(first)
    partners = np.searchsorted(first[order], last[order], side="right") - np.arange(1, len(order) + 1)
    return order, np.maximum(partners, 0, out=partners)


def _survivors(n: int, higher: Indices, lower: Indices) -> NDArray[np.bool_]:
    """Which of ``n`` boxes are left when each that is alive, from the highest on, suppresses its lower neighbours."""
    alive = np.ones(n, dtype=bool)
    if not len(higher):
        return alive
    cuts = [0, *(np.flatnonzero(higher[1:] != higher[:-1]) + 1).tolist(), len(higher)]
    for rank, begin, end in zip(higher.take(cuts[:-1]).tolist(), cuts, cuts[1:], strict=False):
        if alive[rank]:
            alive[lower[begin:end]] = False
    return alive
