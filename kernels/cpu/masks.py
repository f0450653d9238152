"""Pasted masks and COCO run lengths on the host, in numpy alone: no torch is imported here.

Bilinear resampling is separable, so the pixels under a box are `Ay @ mask @ Ax^T` with the weights
`relu(1 - |u - k|)` of a pixel that reads at u on cell k (`PasteRule` defines u). Only the visible part of a box is
computed, in bands of rows of bounded size; all else is zero. Run lengths come from the same crops, so that no dense
mask is ever made for them.

Run lengths are COCO's: the pixels in column-major order, counts of zeros and of ones in turn, zeros first
(cocodataset/cocoapi, common/maskApi.h). Their string form equals that of pycocotools byte for byte.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..paste_rule import PasteRule

__all__ = [
    "area_of_runs",
    "box_of_runs",
    "check_shapes",
    "decode_runs",
    "encode_runs",
    "fills_picture",
    "mask_of_runs",
    "paste_crops",
    "paste_masks",
    "paste_to_runs",
    "runs_of_mask",
]

_BAND = 1 << 16  # values computed at a time: 256 KiB of float32, which stays in a second-level cache
_CHARACTERS = 12  # of five bits each: enough for counts up to 2^59, and safe to shift in int64


def paste_masks(
    probabilities: ArrayLike, boxes: ArrayLike, size: tuple[int, int], *, rule: PasteRule, packed: bool = False
) -> NDArray[np.bool_] | NDArray[np.uint8]:
    """Paste square masks into empty pictures.

    Args:
        probabilities: `[N, m, m]`, computed in float64 if they are float64, else in float32. A value that is not
            finite counts as 0.
        boxes: `[N, 4]`, continuous xyxy in pixels. A box that is not finite or has no positive width and height
            gives an empty mask.
        size: Height and width of the picture.
        rule: Which pixels belong to a mask.
        packed: Whether eight pixels share a byte: bit k (of value 2^k) of byte j is column 8 j + k.

    Returns:
        bool `[N, H, W]`, or uint8 `[N, H, ceil(W / 8)]`.

    Raises:
        ValueError: For a shape or a size that does not fit.
    """
    masks = np.asarray(probabilities)
    height, width = _sizes(size, 1)[0].tolist()
    shape = (len(masks), height, -(-width // 8) if packed else width)
    out = np.zeros(shape, np.uint8 if packed else np.bool_)  # pages that no crop touches are never written
    for picture, (crop, y, x) in zip(out, paste_crops(masks, boxes, size, rule=rule), strict=True):
        pixels: NDArray = crop
        if packed:
            aligned = np.zeros((len(crop), x % 8 + crop.shape[1]), np.bool_)
            aligned[:, x % 8 :] = crop
            pixels, x = np.packbits(aligned, axis=1, bitorder="little"), x // 8
        picture[y : y + len(pixels), x : x + pixels.shape[1]] = pixels
    return out


def paste_to_runs(probabilities: ArrayLike, boxes: ArrayLike, size: ArrayLike, *, rule: PasteRule) -> list[NDArray]:
    """The run lengths of pasted masks: `runs_of_mask` of each mask of `paste_masks`, without making those.

    Args:
        probabilities: `[N, m, m]`, as in `paste_masks`.
        boxes: `[N, 4]`, as in `paste_masks`.
        size: Height and width of the picture, or `[N, 2]` of them, one a mask.
        rule: Which pixels belong to a mask.

    Returns:
        N arrays of int64 counts.

    Raises:
        ValueError: As `paste_masks`.
    """
    masks = np.asarray(probabilities)
    sizes = _sizes(size, len(masks))
    crops = paste_crops(masks, boxes, sizes, rule=rule)
    return [_runs(crop, y, x, h, w) for (crop, y, x), (h, w) in zip(crops, sizes.tolist(), strict=True)]


def paste_crops(
    probabilities: ArrayLike, boxes: ArrayLike, size: ArrayLike, *, rule: PasteRule
) -> Iterator[tuple[NDArray[np.bool_], int, int]]:
    """The part of each picture that can differ from zero, one mask after the other; arguments as in `paste_to_runs`.

    Yields:
        N times the pixels under a box, bool `[h, w]`, with the row and the column of the first of them.
    """
    masks, boxes = np.asarray(probabilities), np.asarray(boxes)
    check_shapes(masks, boxes)
    dtype = np.dtype(np.float64 if masks.dtype == np.float64 else np.float32)
    masks = masks.astype(dtype, copy=False)
    masks = np.where(np.isfinite(masks), masks, dtype.type(0))
    cells = masks.shape[1]
    origin, extent, first, last = _regions(boxes, cells, _sizes(size, len(masks)), rule, dtype)
    compare = np.greater_equal if rule.inclusive else np.greater
    for n, ((x1, y1), (x2, y2)) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        across = _weights(x1, x2, origin[n, 0], extent[n, 0], cells, rule.padding)  # [w, m]
        down = _weights(y1, y2, origin[n, 1], extent[n, 1], cells, rule.padding)  # [h, m]
        columns = masks[n] @ across.T  # [m, w]
        crop = np.empty((y2 - y1, x2 - x1), np.bool_)
        rows = max(_BAND // max(x2 - x1, 1), 1)
        for top in range(0, y2 - y1, rows):
            compare(down[top : top + rows] @ columns, dtype.type(rule.threshold), out=crop[top : top + rows])
        yield crop, y1, x1


def runs_of_mask(mask: ArrayLike) -> NDArray[np.int64]:
    """The counts of a dense mask `[H, W]`."""
    pixels = np.asarray(mask).astype(np.bool_, copy=False)
    if pixels.ndim != 2:
        raise ValueError(f"mask: expected [H, W], got {list(pixels.shape)}")
    return _runs(pixels, 0, 0, *pixels.shape)


def mask_of_runs(counts: ArrayLike, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The dense mask `[H, W]` of its counts, in Fortran order.

    Raises:
        ValueError: Where a count is negative, or their sum is not the number of pixels.
    """
    height, width = _sizes(size, 1)[0].tolist()
    runs = np.asarray(counts, np.int64)
    if not fills_picture(runs, height * width):
        raise ValueError(f"counts: expected run lengths that sum to {height} x {width}, got a sum of {runs.sum()}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def fills_picture(counts: NDArray[np.int64], pixels: int) -> bool:
    """Whether counts are runs of that many pixels: none negative, and their true sum, not what int64 wraps to."""
    totals = counts.cumsum()  # the first total to leave int64 comes out negative
    return bool((counts >= 0).all() and (totals >= 0).all() and counts.sum() == pixels)


def encode_runs(counts: ArrayLike) -> str:
    """COCO's compressed string of counts.

    From the fourth on, a count is written as its difference to the count two before it. A number is cut into groups
    of five bits in two's complement, lowest first, as few as keep its sign; a sixth bit says that more follow, and 48
    makes it a printable character. Every run counts, an empty one too: of what `masks_to_rle` gives, pass the
    first ``lengths`` of a row.

    Raises:
        ValueError: For counts that are no whole numbers, or negative.
    """
    given = np.asarray(counts)
    runs = given.astype(np.int64)
    if runs.ndim != 1 or (runs != given).any() or (runs < 0).any():
        raise ValueError(f"counts: expected whole numbers of at least 0 in a row, got {counts!r:.80}")
    values = runs.copy()
    values[3:] -= runs[1:-2]
    group = np.arange(_CHARACTERS)
    needed = np.searchsorted(16 << 5 * group, values ^ (values >> 63), side="right")[:, None]  # last group of each
    group = group[: needed.max(initial=0) + 1]
    codes = (values[:, None] >> 5 * group & 31) + np.where(group < needed, 80, 48)  # [K, groups]
    return codes.astype(np.uint8)[group <= needed].tobytes().decode("ascii")


def decode_runs(string: str | bytes) -> NDArray[np.int64]:
    """The counts of COCO's compressed string.

    Raises:
        ValueError: For a string that no counts give.
    """
    text = string.encode() if isinstance(string, str) else bytes(string)
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    starts = np.append(0, ends + 1)
    lengths = np.diff(starts)
    if starts[-1] != len(codes) or (codes < 0).any() or (codes > 63).any() or (lengths > _CHARACTERS).any():
        raise ValueError(f"string: expected COCO's compressed run lengths, got {text[:40]!r}")
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts[:-1], lengths))
    values = np.add.reduceat((codes & 31) << shift, starts[:-1]) - ((codes[ends] & 16) << (shift[ends] + 1))  # signed
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    if (values < 0).any():
        raise ValueError(f"string: expected COCO's compressed run lengths, got {text[:40]!r} with a negative count")
    return values


def area_of_runs(counts: ArrayLike) -> int:
    """How many pixels are in the mask."""
    return int(np.asarray(counts, np.int64)[1::2].sum())


def box_of_runs(counts: ArrayLike, height: int) -> tuple[int, int, int, int]:
    """COCO's box around the mask in a picture of that height: x, y, width, height in pixels, zeros if it is empty."""
    runs = np.asarray(counts, np.int64)
    ones = runs[1::2]
    first = runs.cumsum()[0 : 2 * len(ones) : 2][ones > 0]
    if not len(first):
        return 0, 0, 0, 0
    last = first + ones[ones > 0] - 1
    (x1, top), (x2, bottom) = np.divmod(first, height), np.divmod(last, height)
    whole = (x1 != x2).any()  # a run over the end of a column touches the bottom and the top
    y1, y2 = (0, height - 1) if whole else (top.min(), bottom.max())
    return int(x1[0]), int(y1), int(x2[-1] - x1[0] + 1), int(y2 - y1 + 1)


def check_shapes(probabilities: Any, boxes: Any) -> None:
    """Raise a `ValueError` for arrays, or tensors, that are not `[N, m, m]` and `[N, 4]`."""
    masks = tuple(probabilities.shape)
    if len(masks) != 3 or masks[1] != masks[2] or masks[1] < 1:
        raise ValueError(f"probabilities: expected [N, m, m] with m of at least 1, got {list(masks)}")
    if tuple(boxes.shape) != (masks[0], 4):
        raise ValueError(f"boxes: expected [{masks[0]}, 4], one a mask, got {list(boxes.shape)}")


def _sizes(size: ArrayLike, count: int) -> NDArray[np.int64]:
    """Height and width of each picture, `[count, 2]`."""
    sizes = np.asarray(size, np.int64)
    if sizes.shape not in ((2,), (count, 2)) or (sizes < 0).any():
        raise ValueError(f"size: expected a height and a width of at least 0, or [{count}, 2] of them, got {size!r}")
    return np.broadcast_to(sizes, (count, 2))


@np.errstate(over="ignore", invalid="ignore")
def _regions(
    boxes: NDArray, cells: int, sizes: NDArray[np.int64], rule: PasteRule, dtype: np.dtype
) -> tuple[NDArray, NDArray, NDArray[np.int64], NDArray[np.int64]]:
    """Where padded masks begin and how far they reach, their first visible pixel and the one behind the last.

    Each is `[N, 2]`, x before y.
    """
    boxes = boxes.astype(dtype)
    low, high = boxes[:, :2], boxes[:, 2:]
    ordered = high > low
    if rule.padding:  # in this order of operations whole pixels come out as torchvision's do
        centre, half = (low + high) * 0.5, (high - low) * 0.5 * ((cells + 2 * rule.padding) / cells)
        low, high = centre - half, centre + half
    if rule.integer_boxes:
        low, high = np.trunc(low), np.trunc(high) + 1
    extent = high - low
    valid = (ordered & (extent > 0) & (extent < np.inf)).all(1, keepdims=True)
    cell = extent / (cells + 2 * rule.padding)
    ends = sizes[:, ::-1]
    first = np.floor(low + cell * (rule.padding - 0.5) - 0.5)  # half a cell before the mask its weight is 0
    last = np.ceil(low + cell * (rule.padding + cells + 0.5) + 0.5)
    first = np.clip(np.where(valid, first, 0), 0, ends).astype(np.int64)
    last = np.clip(np.where(valid, last, 0), first, ends).astype(np.int64)
    return low, extent, first, last


@np.errstate(over="ignore", invalid="ignore")
def _weights(first: int, last: int, origin: np.floating, extent: np.floating, cells: int, padding: int) -> NDArray:
    """What each pixel from first up to last takes from each cell: `[pixels, m]`."""
    dtype = origin.dtype.type
    at = (np.arange(first, last, dtype=dtype) + dtype(0.5) - origin) / extent * dtype(cells + 2 * padding)
    weights = np.abs((at - dtype(0.5 + padding))[:, None] - np.arange(cells, dtype=dtype))
    return np.maximum(1 - weights, 0, out=weights)


def _runs(crop: NDArray[np.bool_], y: int, x: int, height: int, width: int) -> NDArray[np.int64]:
    """The counts of a picture that is zero outside of a crop."""
    rows, columns = crop.shape
    framed = np.zeros((rows + 2, columns), np.bool_)
    framed[1:-1] = crop
    if rows == height and rows:  # columns touch: what precedes one is the end of the column before
        framed[0, 1:] = crop[-1, :-1]
        framed[-1] = crop[-1]
    row, column = np.divmod(np.flatnonzero(framed[1:] != framed[:-1]), max(columns, 1))
    changes = np.sort((column + x) * height + row + y)
    changes = changes[: np.searchsorted(changes, height * width)]  # a mask that ends with 1 has no zeros behind
    return np.diff(changes, prepend=0, append=height * width)
