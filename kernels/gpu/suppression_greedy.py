"""Greedy suppression of boxes that lie in order of falling score: the kernels.

Boxes come by rank, as `suppression` leaves them: float32 or float64 `[S, 5, 32 * words]`, left, top, right, bottom and
area, and their labels `[S, 32 * words]`. A left side of NaN says that the box is never kept, and a top of NaN that
neither is any box after it.

Whether an IoU, rounded as IEEE 754 says, is above the threshold t takes no division. Let I and U be intersection and
union, and g the gap between t and the next number above. I / U is rounded to more than t where it is above t + g / 2.
(There it never lies: t + g / 2 has an odd last digit, one beyond the 24 of float32, so that its product with U has too
many digits to be I.) So the question is whether I - t * U > U * g / 2. A fused multiply and add rounds the left side
once, and the right side is exact. As rounding is monotone, only a left side that becomes equal to the right one could
mislead. But both are multiples of half the product of the units in the last place of t and U, and the right side is
less than 2**24 of these: as near as that, the left side has no more than 24 digits, and is exact, too. The same holds
for the 53 digits of float64. Nothing may be lost at the small end for this: pairs with a tiny box are scaled by a power
of two. For a threshold that is itself tiny, or huge, the IoU is divided.

No program reads what another thread of it wrote to global memory.
"""

import triton
import triton.language as tl

from .arithmetic import divide

__all__ = ["greedy_kernel", "overlap_kernel", "scan_kernel", "strike_kernel"]


@triton.jit
def _load_boxes(ranked_ptr, pitch, rank, mask):
    """Left, top, right, bottom and area of boxes of a segment."""
    return (
        tl.load(ranked_ptr + rank, mask=mask),
        tl.load(ranked_ptr + pitch + rank, mask=mask),
        tl.load(ranked_ptr + 2 * pitch + rank, mask=mask),
        tl.load(ranked_ptr + 3 * pitch + rank, mask=mask),
        tl.load(ranked_ptr + 4 * pitch + rank, mask=mask),
    )


@triton.jit
def _overlaps(ranked_ptr, labels_ptr, pitch, a, b, b_mask, threshold, half_gap, DIVIDE: tl.constexpr):
    """Which of some boxes overlap each of others: those of its label with an IoU above the threshold.

    Args:
        ranked_ptr, labels_ptr: Of the segment.
        pitch: Ranks of a segment.
        a, b: Ranks, [A] of at most 32 and [B].
        b_mask: Which of b are there, [B]; None for all.
        threshold: A number of the dtype of the boxes.
        half_gap: Half of the gap between it and the next number above.

    Returns:
        int32 [B], a bit for each of a.
    """
    a_x1, a_y1, a_x2, a_y2, a_area = _load_boxes(ranked_ptr, pitch, a, None)
    b_x1, b_y1, b_x2, b_y2, b_area = _load_boxes(ranked_ptr, pitch, b, b_mask)
    real: tl.constexpr = a_area.dtype
    width = tl.minimum(a_x2[:, None], b_x2[None, :]) - tl.maximum(a_x1[:, None], b_x1[None, :])
    height = tl.minimum(a_y2[:, None], b_y2[None, :]) - tl.maximum(a_y1[:, None], b_y1[None, :])
    hit = (width > 0) & (height > 0)
    intersection = width * height
    union = a_area[:, None] + b_area[None, :] - intersection
    threshold = tl.full((), threshold, real)
    half_gap = tl.full((), half_gap, real)
    if DIVIDE:
        # 0 / x needs no division, and an exact one takes its slow branch for it.
        hit = hit & (divide(tl.where(hit, intersection, 1.0), union) > threshold)
    else:
        # Where b is tiny and a is not, all may overflow: the IoU is tiny then, and the comparison false.
        tiny: tl.constexpr = 2.0**-60 if real == tl.float32 else 2.0**-480
        scale = tl.where(b_area < tiny, 2.0**64 if real == tl.float32 else 2.0**512, 1.0).to(real)
        remainder = tl.fma(-(threshold * scale)[None, :], union, intersection * scale[None, :])
        hit = hit & (remainder > (half_gap * scale)[None, :] * union)
    if labels_ptr is not None:
        hit = hit & (tl.load(labels_ptr + a)[:, None] == tl.load(labels_ptr + b, mask=b_mask)[None, :])
    return tl.sum(hit.to(tl.int32) << tl.arange(0, a.shape[0])[:, None], 0)


@triton.jit
def _settle(alive, overlaps, lane):
    """Who is kept of 32 boxes, as the bits of a word.

    A box depends on those before it alone: each round makes at least one more final, and the first that changes nothing
    is the last, mostly the second or third.

    Args:
        alive: [32], whether a box is left by those before the word.
        overlaps: int32 [32], bits of those of the word that overlap a box.
        lane: 0..31.
    """
    earlier = overlaps & ((1 << lane) - 1)
    word = tl.sum(alive.to(tl.int32) << lane, 0)
    previous = ~word
    while word != previous:
        previous = word
        word = tl.sum((alive & ((earlier & previous) == 0)).to(tl.int32) << lane, 0)
    return word


@triton.jit(do_not_specialize=["words", "max_keep", "start", "chunk"])
def overlap_kernel(
    overlaps_ptr,
    ranked_ptr,
    labels_ptr,
    count_ptr,
    words,
    max_keep,
    start,
    chunk,
    threshold: tl.float64,
    half_gap: tl.float64,
    DIVIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """Which boxes of a chunk overlap each of its later ones: bits, int32 [S, chunk, 32 * chunk], the upper triangle.

    Args:
        words: Ranks of a segment, in words of 32, as `start` and `chunk` are.
        start: Of the chunk.
        chunk: Its length; the last one may end before.
        ROWS: Boxes of a program, all against the 32 of a word.
        PART: So many of the 32 at once.
    """
    blocks = tl.cdiv(chunk * 32, ROWS)
    word = tl.program_id(0) % chunk
    first = tl.program_id(0) // chunk % blocks * ROWS
    segment = (tl.program_id(0) // chunk // blocks).to(tl.int64)
    if (word * 32 >= first + ROWS) | (start + word >= words) | (start * 32 + first >= words * 32):
        return
    pitch = words * 32
    ranked_ptr += segment * 5 * pitch
    top = tl.load(ranked_ptr + pitch + start * 32 + first)
    if (tl.load(count_ptr + segment) >= max_keep) | (top != top):
        return
    if labels_ptr is not None:
        labels_ptr += segment * pitch
    row = first + tl.arange(0, ROWS)
    rank = start * 32 + row
    mask = (row < chunk * 32) & (rank < pitch)
    bits = tl.zeros((ROWS,), tl.int32)
    for part in range(0, 32, PART):
        suppressor = (start + word) * 32 + part + tl.arange(0, PART)
        bits |= _overlaps(ranked_ptr, labels_ptr, pitch, suppressor, rank, mask, threshold, half_gap, DIVIDE) << part
    tl.store(overlaps_ptr + (segment * chunk + word) * (chunk * 32) + row, bits, mask=mask)


@triton.jit
def _load_step(ranked_ptr, overlaps_ptr, pitch, width, word, end, number, lane):
    """What the scan needs of a word: left, top, its bits against the words before, and those within it."""
    column = word * 32 + lane
    there = column < end * 32
    left = tl.load(ranked_ptr + column, mask=there)
    top = tl.load(ranked_ptr + pitch + column, mask=there)
    before = tl.load(overlaps_ptr + number * width + column, mask=(number < word) & there, other=0)
    within = tl.load(overlaps_ptr + word * width + column, mask=there)
    return left, top, before, within


@triton.jit(do_not_specialize=["n", "words", "max_keep", "start", "chunk", "width", "list_length"])
def scan_kernel(
    keep_ptr,
    count_ptr,
    kept_ranks_ptr,
    kept_count_ptr,
    order_ptr,
    ranked_ptr,
    overlaps_ptr,
    n,
    words,
    max_keep,
    start,
    chunk,
    width,
    list_length,
    WORDS: tl.constexpr,
):
    """Keep boxes of a chunk by the bits of `overlap_kernel`; one program a segment, 32 boxes a step.

    A box stays if no bit of its column is kept in the words before. What is kept lies in registers, so that all that a
    step loads can be on its way while the one before it is taken.

    Args:
        kept_ranks_ptr, kept_count_ptr: Ranks of those kept in this chunk, [S, list_length], and how many; for what
            comes after the chunk, or None.
        width: 32 * chunk. That it is a multiple of 4 is not told: with one word a thread, a warp holds a row, and in
            a step warps exchange data but once.
        WORDS: A power of two that `chunk` does not exceed.
    """
    segment = tl.program_id(0).to(tl.int64)
    pitch = words * 32
    ranked_ptr += segment * 5 * pitch + start * 32
    overlaps_ptr += segment * chunk * width
    number = tl.arange(0, WORDS)[:, None]
    lane = tl.arange(0, 32)
    found = tl.load(count_ptr + segment)
    total = found
    kept = tl.zeros((WORDS, 32), tl.int32)  # the bits of a word in all of a row
    word = 0
    end = tl.where(found < max_keep, tl.minimum(words - start, chunk), 0)
    left, top, before, within = _load_step(ranked_ptr, overlaps_ptr, pitch, width, word, end, number, lane)
    while word < end:
        next_left, next_top, next_before, next_within = _load_step(
            ranked_ptr, overlaps_ptr, pitch, width, word + 1, end, number, lane
        )
        suppressed = tl.max(((before & kept) != 0).to(tl.int32), 0)
        settled = _settle((left == left) & (suppressed == 0), within, lane)
        kept = tl.where(number == word, settled, kept)
        total += tl.sum((settled >> lane) & 1, 0)
        over = (total >= max_keep) | (tl.max((top != top).to(tl.int32), 0) > 0)
        end = tl.where(over, 0, end)
        word += 1
        left, top, before, within = next_left, next_top, next_before, next_within

    is_kept = (kept >> lane[None, :]) & 1
    in_word = tl.sum(is_kept, 1)
    place = (tl.cumsum(in_word, 0) - in_word)[:, None] + tl.cumsum(is_kept, 1) - is_kept
    rank = (start + number) * 32 + lane[None, :]
    stored = (is_kept != 0) & (found + place < max_keep)
    index = tl.load(order_ptr + segment * n + rank, mask=stored)
    tl.store(keep_ptr + segment * max_keep + found + place, index, mask=stored)
    total = tl.minimum(total, max_keep)
    tl.store(count_ptr + segment, total)
    if kept_ranks_ptr is not None:
        tl.store(kept_ranks_ptr + segment * list_length + place, rank, mask=stored)
        tl.store(kept_count_ptr + segment, total - found)


@triton.jit(do_not_specialize=["n", "words", "max_keep", "start", "list_length"])
def greedy_kernel(
    keep_ptr,
    count_ptr,
    kept_ranks_ptr,
    order_ptr,
    ranked_ptr,
    labels_ptr,
    n,
    words,
    max_keep,
    start,
    list_length,
    threshold: tl.float64,
    half_gap: tl.float64,
    DIVIDE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Keep boxes from a word on, up to the last; one program a segment, 32 boxes a step against all that are kept.

    Args:
        kept_ranks_ptr: Ranks of those kept before, [S, list_length].
        KEPT: A power of two that `max_keep` does not exceed, 32 or more.
    """
    segment = tl.program_id(0).to(tl.int64)
    pitch = words * 32
    ranked_ptr += segment * 5 * pitch
    if labels_ptr is not None:
        labels_ptr += segment * pitch
    lane = tl.arange(0, 32)
    slot = tl.arange(0, KEPT)
    found = tl.load(count_ptr + segment)
    kept = tl.load(kept_ranks_ptr + segment * list_length + slot, mask=slot < found, other=0)
    word = start
    end = tl.where(found < max_keep, words, 0)
    while word < end:
        rank = word * 32 + lane
        left = tl.load(ranked_ptr + rank)
        top = tl.load(ranked_ptr + pitch + rank)
        alive = left == left
        first = 0
        while first < found:
            suppressor = tl.gather(kept, first + lane, 0)
            bits = _overlaps(ranked_ptr, labels_ptr, pitch, suppressor, rank, None, threshold, half_gap, DIVIDE)
            there = tl.sum((first + lane < found).to(tl.int32) << lane, 0)
            alive = alive & ((bits & there) == 0)
            first += 32
        bits = _overlaps(ranked_ptr, labels_ptr, pitch, rank, rank, None, threshold, half_gap, DIVIDE)
        is_kept = (_settle(alive, bits, lane) >> lane) & 1
        place = tl.cumsum(is_kept, 0) - is_kept
        stored = (is_kept != 0) & (found + place < max_keep)
        index = tl.load(order_ptr + segment * n + rank, mask=stored)
        tl.store(keep_ptr + segment * max_keep + found + place, index, mask=stored)
        packed = tl.sum(tl.where(stored[:, None] & (place[:, None] == lane[None, :]), rank[:, None], 0), 0)
        kept = tl.where(slot < found, kept, tl.gather(packed, tl.minimum(tl.maximum(slot - found, 0), 31), 0))
        found = tl.minimum(found + tl.sum(is_kept, 0), max_keep)
        over = (found >= max_keep) | (tl.max((top != top).to(tl.int32), 0) > 0)
        end = tl.where(over, 0, end)
        word += 1
    tl.store(count_ptr + segment, found)


@triton.jit(do_not_specialize=["words", "max_keep", "start", "splits", "list_length"])
def strike_kernel(
    ranked_ptr,
    labels_ptr,
    count_ptr,
    kept_ranks_ptr,
    kept_count_ptr,
    words,
    max_keep,
    start,
    splits,
    list_length,
    threshold: tl.float64,
    half_gap: tl.float64,
    DIVIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """Strike out the boxes from a word on that any of those kept in the chunk before overlaps: their left is NaN then.

    Another program may do so while a box is read here: it is out in either case.

    Args:
        splits: Parts of the list of those kept, SPLIT long, that programs share.
        ROWS: Boxes of a program, against PART of the list at once.
    """
    pitch = words * 32
    blocks = tl.cdiv(pitch - start * 32, ROWS)
    position = tl.program_id(0) % splits * SPLIT
    first = start * 32 + tl.program_id(0) // splits % blocks * ROWS
    segment = (tl.program_id(0) // splits // blocks).to(tl.int64)
    ranked_ptr += segment * 5 * pitch
    if labels_ptr is not None:
        labels_ptr += segment * pitch
    end = tl.minimum(position + SPLIT, tl.load(kept_count_ptr + segment))
    top = tl.load(ranked_ptr + pitch + first)
    if (position >= end) | (tl.load(count_ptr + segment) >= max_keep) | (top != top):
        return
    rank = first + tl.arange(0, ROWS)
    mask = rank < pitch
    lane = tl.arange(0, PART)
    struck = tl.zeros((ROWS,), tl.int32)
    while position < end:
        there = position + lane < end
        kept = tl.load(kept_ranks_ptr + segment * list_length + position + lane, mask=there, other=0)
        bits = _overlaps(ranked_ptr, labels_ptr, pitch, kept, rank, mask, threshold, half_gap, DIVIDE)
        struck = struck | (bits & tl.sum(there.to(tl.int32) << lane, 0))
        position += PART
    nan = tl.full((ROWS,), float("nan"), ranked_ptr.dtype.element_ty)
    tl.store(ranked_ptr + rank, nan, mask=mask & (struck != 0))
