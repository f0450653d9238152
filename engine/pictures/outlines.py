"""From the run lengths of a mask to its pixels where it is, and to its outlines, without the dense mask.

The work grows with the length of the outline, not with the area; only `crop_of_runs` writes pixels.
"""

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu.masks import box_of_runs

__all__ = ["crop_of_runs", "outlines_of_runs", "simplify"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Polygon = NDArray[np.float64]


def _strips(counts: Ints, height: int) -> tuple[Ints, Ints, Ints]:
    """A mask's vertical strips of one pixel's width: column, first row, and the row behind the last."""
    edges = counts.cumsum()
    changes, times = np.unique(edges[:-1], return_counts=True)
    changes = changes[times % 2 == 1]  # counts of nothing change nothing
    if len(changes) % 2:
        changes = np.append(changes, edges[-1])
    first, last = changes[0::2], changes[1::2] - 1
    spans = last // height - first // height + 1  # columns that a run passes through
    column = np.repeat(first // height, spans) + np.arange(spans.sum()) - np.repeat(spans.cumsum() - spans, spans)
    top = np.maximum(np.repeat(first, spans), column * height) - column * height
    bottom = np.minimum(np.repeat(last + 1, spans), (column + 1) * height) - column * height
    return column, top, bottom


def crop_of_runs(counts: Ints, height: int) -> tuple[Bools, int, int]:
    """The pixels `[h, w]` under the smallest box around a mask, and that box's first row and column."""
    x, y, w, h = box_of_runs(counts, height)
    column, top, bottom = _strips(counts, height)
    bounds = np.stack([top, bottom], 1) + ((column - x) * h - y)[:, None]
    lengths = np.diff(bounds.ravel(), prepend=0, append=w * h)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(w, h).T, y, x


def outlines_of_runs(counts: Ints, height: int) -> list[Polygon]:
    """The outer outlines of a mask, corner by corner, clockwise on the screen.

    Every strip of the mask has two horizontal sides, each with a left and a right end. Where a right end meets the left
    end of a side of the same kind, upper or lower, the outline goes straight on; all other ends are corners. In every
    column of the lattice they pair up, the first with the second and so on, to the outlines' vertical sides, in every
    row to the horizontal ones: following the two in turn walks an outline.
    """
    column, top, bottom = _strips(counts, height)
    if not len(column):
        return []
    x = np.concatenate([column, column + 1, column, column + 1])
    y = np.concatenate([top, top, bottom, bottom])
    upper = np.arange(len(x)) < 2 * len(column)
    # Where pixels touch at a corner only, an upper and a lower end meet: the lower one belongs to the pixel above, and
    # comes first in its column, so that each pixel keeps to its own outline.
    order = np.lexsort((upper, y, x))
    x, y, upper = x[order], y[order], upper[order]
    same = (x[1:] == x[:-1]) & (y[1:] == y[:-1]) & (upper[1:] == upper[:-1])
    corner = ~(np.append(same, False) | np.append(False, same))
    x, y, upper, left = x[corner], y[corner], upper[corner], (order // len(column) % 2 == 0)[corner]
    by_row = np.lexsort((left, x, y))
    across = np.empty(len(x), np.int64)
    across[by_row[0::2]], across[by_row[1::2]] = by_row[1::2], by_row[0::2]
    sideways, outer = across.tolist(), (upper & left).tolist()
    points = np.stack([x, y], 1).astype(np.float64)
    seen = bytearray(len(x))
    rings = []
    for start in range(len(x)):
        if seen[start]:
            continue
        ring, here = [], start
        while not seen[here]:
            there = sideways[here]
            ring += [here, there]
            seen[here] = seen[there] = 1
            here = there ^ 1  # its partner in the column
        if outer[start]:  # the topmost of its leftmost corners has the mask below it; a hole's has it above
            rings.append(points[ring])
    return rings


def simplify(ring: Polygon, tolerance: float) -> Polygon:
    """The ring with the fewest corners that Douglas and Peucker's method finds within the tolerance, at least three."""
    if tolerance == 0 or len(ring) <= 4:
        return ring
    closed = np.concatenate([ring, ring[:1]])
    far = int(np.square(ring - ring[0]).sum(1).argmax())
    kept = {0, far}
    spans = [(0, far), (far, len(ring))]
    while spans:
        a, b = spans.pop()
        if b - a < 2:
            continue
        side, offsets = closed[b] - closed[a], closed[a + 1 : b] - closed[a]
        along = np.clip(offsets @ side / max(side @ side, 1e-12), 0, 1)
        distances = np.square(offsets - along[:, None] * side).sum(1)
        worst = int(distances.argmax())
        if distances[worst] > tolerance**2:
            middle = a + 1 + worst
            kept.add(middle)
            spans += [(a, middle), (middle, b)]
    return ring[sorted(kept)] if len(kept) > 2 else ring
