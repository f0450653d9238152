"""Non-maximum suppression in Triton, all launched at once: no shape depends on data, and nothing waits for the device.

torch sorts the scores, stable; `_rank_kernel` brings the boxes into that order and marks those that take no part. Then:

- The head, the first ranks: `overlap_kernel` finds all pairs that overlap, with the whole GPU, as bits;
  `scan_kernel`, with a program a segment, goes through them.
- The tail, if there are more ranks, in one of two ways. Where few boxes are to be kept, as of detections, the head has
  mostly found them, or the last score above its threshold, and `greedy_kernel` has nothing to do; otherwise it goes on,
  a program a segment. Where many are, chunk follows chunk: `strike_kernel` strikes out all later boxes that those kept
  in a chunk overlap, and the next chunk is treated as the head was. Memory is linear in the number of boxes.

Once a segment has `max_keep` boxes, or its scores fall below their threshold, what is launched for it ends at once.
"""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from ..rounding import not_above
from .arithmetic import is_finite
from .sizes import cdiv, next_power_of_2
from .suppression_greedy import greedy_kernel, overlap_kernel, scan_kernel, strike_kernel

__all__ = ["segmented_nms"]

# By reasoning; no others were tried on a GPU.
_RANKS = 256
# Boxes of a program against a word of 32, of which 16 at once: two a thread share what is loaded of the 16, and 100
# registers hold all. Of float64, and with labels of int64, half as many.
_ROWS, _PART = 256, 16
# Ranks of the head. For up to _FEW boxes to keep it need not be long; else it is what the registers of the scan hold.
_FEW, _SHORT, _LONG = 256, 1024, 4096
# Bytes of the bits of all segments; where that is not enough, the head is shorter.
_MEMORY = 1 << 27
# Kept boxes of a program of the strike.
_SPLIT = 512
_WARPS = 4


@triton.jit(do_not_specialize=["n", "words", "max_keep"])
def _rank_kernel(
    ranked_ptr,
    ranked_labels_ptr,
    keep_ptr,
    count_ptr,
    order_ptr,
    sorted_scores_ptr,
    boxes_ptr,
    labels_ptr,
    counts_ptr,
    n,
    words,
    max_keep,
    stride_segment,
    stride_box,
    stride_side,
    stride_label_segment,
    stride_label,
    stride_count,
    score_threshold: tl.float64,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Boxes by rank as `suppression_greedy` expects them; and the outputs, with nothing kept yet.

    Scores fall, but NaN may come first or last: it is a box of no part, but no sign that the rest has none.
    """
    pitch = words * 32
    blocks = tl.cdiv(tl.maximum(pitch, max_keep), BLOCK)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    rank = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(keep_ptr + segment * max_keep + rank, tl.full((BLOCK,), -1, tl.int64), mask=rank < max_keep)
    tl.store(count_ptr + segment, 0, mask=block == 0)

    over = rank >= n
    index = tl.load(order_ptr + segment * n + rank, mask=rank < n, other=0)
    score = tl.load(sorted_scores_ptr + segment * n + rank, mask=rank < n, other=float("nan")).to(tl.float64)
    live = score == score
    if HAS_THRESHOLD:
        least = tl.full((), score_threshold, tl.float64)
        over = over | (score <= least)
        live = score > least
    if counts_ptr is not None:
        live = live & (index < tl.load(counts_ptr + segment * stride_count))
    box_ptr = boxes_ptr + segment * stride_segment + index * stride_box
    real: tl.constexpr = ranked_ptr.dtype.element_ty
    x1 = tl.load(box_ptr, mask=live, other=0.0).to(real)
    y1 = tl.load(box_ptr + stride_side, mask=live, other=0.0).to(real)
    x2 = tl.load(box_ptr + 2 * stride_side, mask=live, other=0.0).to(real)
    y2 = tl.load(box_ptr + 3 * stride_side, mask=live, other=0.0).to(real)
    live = live & is_finite(x1) & is_finite(y1) & is_finite(x2) & is_finite(y2)

    nan = float("nan")
    ranked_ptr += segment * 5 * pitch + rank
    mask = rank < pitch
    tl.store(ranked_ptr, tl.where(live, x1, nan), mask=mask)
    tl.store(ranked_ptr + pitch, tl.where(over, nan, tl.where(live, y1, 0.0)), mask=mask)
    tl.store(ranked_ptr + 2 * pitch, x2, mask=mask)
    tl.store(ranked_ptr + 3 * pitch, y2, mask=mask)
    tl.store(ranked_ptr + 4 * pitch, (x2 - x1) * (y2 - y1), mask=mask)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + segment * stride_label_segment + index * stride_label, mask=live, other=0)
        tl.store(ranked_labels_ptr + segment * pitch + rank, label.to(ranked_labels_ptr.dtype.element_ty), mask=mask)


def segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    labels: Tensor | None,
    score_threshold: float | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The body of `trimask::segmented_nms`; the contract stands at `trimask.kernels.segmented_nms`."""
    segments, n = scores.shape
    new = partial(torch.empty, device=boxes.device)
    keep, count = new((segments, max_keep), dtype=torch.int64), new(segments, dtype=torch.int32)
    if not (segments and n and max_keep):
        return keep.fill_(-1), count.zero_()
    real = torch.promote_types(boxes.dtype, torch.float32)
    words = cdiv(n, 32)
    few = max_keep <= _FEW
    chunk = _chunk(segments, words, _SHORT if few else _LONG)
    ranked = new((segments, 5, words * 32), dtype=real)
    ranked_labels = None if labels is None else new((segments, words * 32), dtype=_comparable(labels.dtype))
    overlaps = new((segments, chunk, chunk * 32), dtype=torch.int32)
    tail = chunk < words
    list_length = max_keep if few else chunk * 32
    kept_ranks = new((segments, list_length), dtype=torch.int32) if tail else None
    kept_count = new(segments, dtype=torch.int32) if tail else None

    outputs: dict[str, Any] = {"keep_ptr": keep, "count_ptr": count, "max_keep": max_keep}
    pairs = {"labels_ptr": ranked_labels, **_threshold_arguments(iou_threshold, real)}
    widest = max(real.itemsize, 0 if ranked_labels is None else ranked_labels.itemsize)
    rows = min(_ROWS * 4 // widest, next_power_of_2(chunk * 32))
    tile: dict[str, Any] = {"ROWS": rows, "PART": _PART}
    options: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}
    with current_device(boxes.device):
        sorted_scores, order = torch.sort(scores.contiguous(), dim=1, descending=True, stable=True)
        _rank_kernel[(segments * cdiv(max(words * 32, max_keep), _RANKS),)](
            **outputs,
            ranked_ptr=ranked,
            ranked_labels_ptr=ranked_labels,
            order_ptr=order,
            sorted_scores_ptr=sorted_scores,
            boxes_ptr=boxes,
            labels_ptr=labels,
            counts_ptr=counts,
            n=n,
            words=words,
            stride_segment=boxes.stride(0),
            stride_box=boxes.stride(1),
            stride_side=boxes.stride(2),
            stride_label_segment=0 if labels is None else labels.stride(0),
            stride_label=0 if labels is None else labels.stride(1),
            stride_count=0 if counts is None else counts.stride(0),
            score_threshold=0.0 if score_threshold is None else _rounded(score_threshold, scores.dtype),
            HAS_THRESHOLD=score_threshold is not None,
            BLOCK=_RANKS,
            **options,
        )
        for start in range(0, chunk if few else words, chunk):
            overlap_kernel[(segments * cdiv(chunk * 32, rows) * chunk,)](
                **pairs,
                **tile,
                overlaps_ptr=overlaps,
                ranked_ptr=ranked,
                count_ptr=count,
                words=words,
                max_keep=max_keep,
                start=start,
                chunk=chunk,
                **options,
            )
            scan_kernel[(segments,)](
                **outputs,
                kept_ranks_ptr=kept_ranks,
                kept_count_ptr=kept_count,
                order_ptr=order,
                ranked_ptr=ranked,
                overlaps_ptr=overlaps,
                n=n,
                words=words,
                start=start,
                chunk=chunk,
                width=chunk * 32,
                list_length=list_length,
                WORDS=max(32, next_power_of_2(chunk)),
                **{**options, "num_warps": _WARPS if chunk <= 64 else 4 * _WARPS},
            )
            later = words - start - chunk
            if later > 0 and not few:
                splits = cdiv(chunk * 32, _SPLIT)
                strike_kernel[(segments * cdiv(later * 32, rows) * splits,)](
                    **pairs,
                    **tile,
                    ranked_ptr=ranked,
                    count_ptr=count,
                    kept_ranks_ptr=kept_ranks,
                    kept_count_ptr=kept_count,
                    words=words,
                    max_keep=max_keep,
                    start=start + chunk,
                    splits=splits,
                    list_length=list_length,
                    SPLIT=_SPLIT,
                    **options,
                )
        if tail and few:
            greedy_kernel[(segments,)](
                **outputs,
                **pairs,
                kept_ranks_ptr=kept_ranks,
                order_ptr=order,
                ranked_ptr=ranked,
                n=n,
                words=words,
                start=chunk,
                list_length=list_length,
                KEPT=max(32, next_power_of_2(max_keep)),
                **options,
            )
    return keep, count


def _chunk(segments: int, words: int, longest: int) -> int:
    """Words of the head and of every later chunk, so that a bit for each pair of ranks fits in memory."""
    affordable = int((_MEMORY / (segments * 128)) ** 0.5)  # w words by 32 * w ranks, of 4 bytes
    return min(words, longest // 32, max(affordable, 1))


def _comparable(dtype: torch.dtype) -> torch.dtype:
    """The dtype that labels of another are equal in exactly where they are in their own."""
    if dtype.is_floating_point:
        return torch.promote_types(dtype, torch.float32)
    return torch.int64 if dtype.itemsize == 8 else torch.int32


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number in the dtype of the tensor that it is compared with, as torch does it."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).double().numpy())


@cache
def _threshold_arguments(iou_threshold: float, dtype: torch.dtype) -> dict[str, Any]:
    """The threshold, rounded down to the dtype of the boxes, as the kernels take it."""
    real: Any = np.float64 if dtype == torch.float64 else np.float32
    threshold = not_above(iou_threshold, real)
    divide = not 2.0**-20 <= threshold <= 2.0**20
    half_gap = 0.0 if divide else float(np.nextafter(threshold, real(np.inf)) - threshold) / 2
    return {"threshold": float(threshold), "half_gap": half_gap, "DIVIDE": divide}
