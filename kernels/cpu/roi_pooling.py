"""RoIAlign and RoIPool in plain torch: right on any device, tuned for the CPU.

A bilinear sample is a weighted sum of pixels, a bin averages its samples, and the weights separate into rows and
columns: ``bin[i, j] = sum_y sum_x Ay[i, y] * Ax[j, x] * F[y, x]``. With channels last, a pixel is a row of a matrix and
a bin a weighted *bag* of rows, which `embedding_bag` sums in float32 for features up to float32. The pixels of a bin
along one axis, with their weights, are its *taps*; a bag is the product of the taps of both axes. For float16 and
bfloat16 features the weights of a bag are rounded to their dtype; coordinates and sums are float32.

The gradient is the same sum transposed: with the taps sorted by pixel, each pixel is a bag of bins. Nothing is added
atomically and the order is fixed, so on a CPU every result here is the same on every run.

RoIs are taken level by level, those with the most samples first, in chunks whose temporaries are bounded.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling import Sampling

__all__ = ["plan", "roi_align", "roi_align_backward", "roi_pool", "roi_pool_backward", "taps"]

# Bytes of temporaries; a single RoI may need more: an average for each pixel of one plane, a maximum for each sample
# of a line and channel. Forward,
# small chunks pay for their calls: at 0.5, 2, 4 and 16 MiB, 1000 RoIs of 7 x 7 x 256 take 83, 59, 58 and 55 ms of a
# Zen 4 core, and 200 of 7 x 7 x 128 take 9.2, 4.6, 4.1 and 8.5. Backward, each chunk adds whole planes.
_FORWARD_BYTES = 4 << 20
_BACKWARD_BYTES = 128 << 20
_TAP_BYTES = 12
_SORTED_TAP_BYTES = 40
_MAX_VALUE_BYTES = 64  # of each value: the indices that scatter its gradient
_CANDIDATE_BYTES = 16  # of each value that a maximum is of, with what numbers it


@dataclass(frozen=True)
class _Chunk:
    """RoIs of one level; pairs are (x, y), lengths in pixels of that level."""

    level: int
    rows: Tensor  # [k] int64, which RoIs
    images: Tensor  # [k] int64
    start: Tensor  # [k, 2]
    bins: Tensor  # [k, 2] size of a bin
    samples: Tensor  # [k, 2] of a bin
    taps: int  # of a bin, in both directions, at most


_Taps = tuple[Tensor, Tensor]  # pixel indices and weights, both [k, bins, T]
_Read = Callable[[Tensor], tuple[Tensor, Tensor]]  # of indices of pixels: rows with them, and the indices in these


def roi_align(
    features: Sequence[Tensor], boxes: Tensor, images: Tensor, sampling: Sampling, channels_last: bool
) -> Tensor:
    """Pool each RoI from one level of a pyramid.

    Args:
        features: `[N, C, H_l, W_l]` for each level. Where they are not channels_last, few RoIs have the pixels copied
            that they read, many have all.
        boxes: `[K, 4]` xyxy in pixels of the picture.
        images: `[K]`, which image; RoIs of images outside 0..N-1 give zeros, as those that are not finite do.
        sampling: Where the samples lie, and what is made of them.
        channels_last: The layout wanted.

    Returns:
        `[K, h, w, C]` if `channels_last`, else `[K, C, h, w]`, contiguous, in the features' dtype.
    """
    c = features[0].shape[1]
    h, w = sampling.output_size
    k = len(boxes)
    out = features[0].new_empty((k, h * w, c) if channels_last else (k, c, h * w))
    if out.numel():
        size = out.element_size() if sampling.mode == "avg" else _CANDIDATE_BYTES
        shapes = [feature.shape for feature in features]
        chunks, invalid = plan(boxes, images, shapes, out.dtype, sampling, c * size, _TAP_BYTES, _FORWARD_BYTES)
        for level, group in groupby(chunks, attrgetter("level")):
            of_level = list(group)
            read = _reader(features[level], h * w * sum(chunk.taps * len(chunk.rows) for chunk in of_level))
            for chunk in of_level:
                y, x = taps(chunk, shapes[level], sampling)
                if sampling.mode == "avg":
                    values = _weighted_sum(read, y, x)
                else:
                    values, _ = _sampled_max(read, chunk, y, x, numbered=False)
                values = values.view(-1, h * w, c)
                # A bin with no sample in the picture is zero, even where its taps of weight 0 met a NaN.
                seen = (y[1].any(-1)[:, :, None] & x[1].any(-1)[:, None]).flatten(1)  # [k, h * w]
                if not seen.all():
                    values = values.masked_fill_(~seen[..., None], 0.0)
                out.index_copy_(0, chunk.rows, values if channels_last else values.transpose(1, 2))
        out.index_fill_(0, invalid, 0.0)
    return out.view((k, h, w, c) if channels_last else (k, c, h, w))


def roi_align_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    shapes: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[Tensor]:
    """Gradients of `roi_align` with respect to the features.

    Args:
        grad: `[K, C, h, w]`, best in channels_last memory.
        features: As given to `roi_align` for "max"; not looked at for "avg".
        boxes: `[K, 4]`.
        images: `[K]`.
        shapes: (N, C, H_l, W_l) of each level.
        sampling: As given to `roi_align`.

    Returns:
        `[N, H_l, W_l, C]` for each level, contiguous, in the dtype of `grad`; summed in float32 at least.
    """
    k, c, h, w = grad.shape
    planes: dict[int, Tensor] = {}
    if grad.numel():
        rows = grad.permute(0, 2, 3, 1).reshape(k * h * w, c).to(_wide(grad.dtype))
        average = sampling.mode == "avg"
        size, tap = (0, _SORTED_TAP_BYTES) if average else (c * _MAX_VALUE_BYTES, _TAP_BYTES)
        budget = _BACKWARD_BYTES if average else _FORWARD_BYTES
        chunks, _ = plan(boxes, images, shapes, rows.dtype, sampling, size, tap, budget)
        for level, group in groupby(chunks, attrgetter("level")):
            if average:
                plane = _average_gradient(rows, group, shapes[level], sampling)
            else:
                plane = _max_gradient(rows, list(group), features[level], sampling)
            planes[level] = plane.to(grad.dtype)
    return [
        planes[level].view(n, h, w, c) if level in planes else grad.new_zeros(n, h, w, c)
        for level, (n, c, h, w) in enumerate(shapes)
    ]


def _average_gradient(rows: Tensor, chunks: Iterable[_Chunk], shape: Sequence[int], sampling: Sampling) -> Tensor:
    """Of one level, `[N * H * W, C]`, from the gradients of all bins, `[K * h * w, C]`."""
    n, _, height, width = shape
    parts = (
        _transposed_sum(rows, _bins(chunk, sampling), *taps(chunk, shape, sampling), n * height * width)
        for chunk in chunks
    )
    return reduce(Tensor.add_, parts)


def _max_gradient(rows: Tensor, chunks: Sequence[_Chunk], feature: Tensor, sampling: Sampling) -> Tensor:
    """Of one level, `[N * H * W, C]`, from the gradients of all bins, `[K * h * w, C]`."""
    n, c, h, w = feature.shape
    plane = rows.new_zeros(n * h * w, c)
    bins = sampling.output_size[0] * sampling.output_size[1]
    read = _reader(feature, bins * sum(chunk.taps * len(chunk.rows) for chunk in chunks))
    for chunk in chunks:
        y, x = taps(chunk, feature.shape, sampling)
        _, numbers = _sampled_max(read, chunk, y, x, numbered=True)
        _scatter_corners(plane, rows[_bins(chunk, sampling)], numbers, y, x)
    return plane


def _bins(chunk: _Chunk, sampling: Sampling) -> Tensor:
    """Which of all bins are those of the chunk, `[k, h * w]`."""
    count = sampling.output_size[0] * sampling.output_size[1]
    return chunk.rows[:, None] * count + torch.arange(count, device=chunk.rows.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates, weights and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pixels(feature: Tensor) -> Tensor:
    """Its pixels as rows, `[N * H * W, C]`; a view if it is channels_last."""
    n, c, h, w = feature.shape
    pixels = feature.detach().permute(0, 2, 3, 1)
    if not pixels.is_contiguous():
        pixels = feature.new_empty(n, h * w, c)
        for image, rows in zip(feature.detach(), pixels, strict=True):
            # Torch transposes matrices, and nothing of more dimensions, by blocks: 2.5 times faster where H * W is 2^n.
            rows.copy_(image.flatten(1).t())
    return pixels.view(-1, c)


def _reader(feature: Tensor, wanted: int) -> _Read:
    """What gives pixels of a map as rows, `[P, C]`: all, or where few are wanted of NCHW memory, these alone."""
    n, _, h, w = feature.shape
    if 4 * wanted >= n * h * w or feature.is_contiguous(memory_format=torch.channels_last):
        pixels = _pixels(feature)
        return lambda index: (pixels, index)
    planes = feature.detach().flatten(2)

    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        places, index = index.unique(return_inverse=True)
        places = places.long()
        image = torch.div(places, h * w, rounding_mode="floor")
        return planes[image, :, places - image * (h * w)], index

    return read


def plan(
    boxes: Tensor,
    images: Tensor,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    sampling: Sampling,
    bin_bytes: int,
    tap_bytes: int,
    budget: int,
) -> tuple[list[_Chunk], Tensor]:
    """Chunks of RoIs whose bins and taps fit in a budget of bytes, and the RoIs that are zero."""
    h, w = sampling.output_size
    sides = boxes.float()[:, 2:] - boxes.float()[:, :2]
    thresholds = torch.tensor(sampling.thresholds, dtype=torch.float32, device=boxes.device)
    levels = torch.bucketize(sides.prod(1).clamp(min=0).sqrt(), thresholds[1:], right=True)

    # Each operation in the order of the reference implementations: rounding decides samples at the very border.
    boxes = boxes.to(_wide(dtype))
    scale = torch.tensor(sampling.scales, dtype=boxes.dtype, device=boxes.device)[levels]
    corners = boxes * scale[:, None] - (0.5 if sampling.aligned else 0.0)
    start = corners[:, :2]
    size = corners[:, 2:] - start
    if not sampling.aligned:
        size = size.clamp(min=1.0)
    bins = size / torch.tensor([w, h], dtype=boxes.dtype, device=boxes.device)
    samples = bins.ceil() if sampling.adaptive else torch.full_like(bins, sampling.sampling_ratio)

    finite = corners.abs().sum(1).isfinite()
    valid = finite & (samples > 0).all(1) & (images >= 0) & (images < shapes[0][0])
    levels = torch.where(valid, levels, len(shapes))
    most = max(_most_samples(extent) for shape in shapes for extent in shape[2:])
    steps = torch.where(valid, samples.amax(1), 0.0).clamp(max=most).int()
    order = (levels * (most + 1) - steps).argsort(stable=True)

    chunks = []
    sorted_steps = steps[order].tolist()
    begin = 0
    for level, count in enumerate(torch.bincount(levels, minlength=len(shapes)).tolist()[: len(shapes)]):
        end = begin + count
        while begin < end:
            step = sorted_steps[begin]
            taps = step + 1 if sampling.adaptive else 2 * step
            value_bytes = bin_bytes * (step if sampling.mode == "max" else 1)  # a line of samples at a time
            bytes_ = h * w * (value_bytes + tap_bytes * taps * taps) + (h + w) * _TAP_BYTES * step * taps
            rows = order[begin : min(end, begin + max(1, budget // bytes_))]
            chunks.append(_Chunk(level, rows, images[rows].long(), start[rows], bins[rows], samples[rows], taps * taps))
            begin += len(rows)
    return chunks, order[begin:]


def _most_samples(extent: int) -> int:
    """How many samples of a bin can matter: adaptive ones are over half a pixel apart; a few more for rounding."""
    return 2 * extent + 5


def taps(chunk: _Chunk, shape: Sequence[int], sampling: Sampling) -> tuple[_Taps, _Taps]:
    """Taps of the lines, as indices of their first pixel among the pixels of the level, and of the columns.

    A sample has two taps; where an average is of dense samples, they are merged into one tap a pixel.
    """
    n, _, height, width = shape
    h, w = sampling.output_size
    dtype, device = chunk.start.dtype, chunk.start.device
    limits = (_most_samples(width), _most_samples(height))
    if sampling.adaptive:
        steps_x, steps_y = (int(min(pair)) for pair in zip(chunk.samples.amax(0).tolist(), limits, strict=True))
    else:
        steps_x = steps_y = sampling.sampling_ratio
    steps = max(steps_x, steps_y)

    # Both axes at once: [k, 2, bins, samples], x first.
    start, size, samples = (t[:, :, None, None] for t in (chunk.start, chunk.bins, chunk.samples))
    extent = torch.tensor([width, height], dtype=dtype, device=device)[:, None, None]
    edge = start + torch.arange(max(h, w), dtype=dtype, device=device)[:, None] * size
    step = torch.arange(steps, dtype=dtype, device=device)
    if sampling.adaptive:
        # A RoI far larger than the picture has more samples than are looked at: start where the picture does.
        skipped = ((-1 - edge) * samples / size - 1.5).floor()
        looked_at = torch.tensor([steps_x, steps_y], dtype=dtype, device=device)[:, None, None]
        step = step + torch.minimum(skipped, samples - looked_at).clamp(min=0)
    position = edge + (step + 0.5) * size / samples
    inside = (position >= -1) & (position <= extent)
    if sampling.adaptive:
        inside &= step < samples
    position = torch.minimum(position.clamp(min=0), extent - 1)
    low = position.floor()

    if sampling.adaptive and sampling.mode == "avg":
        index = low[..., :1] + torch.arange(steps + 1, dtype=dtype, device=device)
        near = 1 - (index[..., None] - position[..., None, :]).abs()  # [k, 2, bins, T, samples]
        weight = (near.clamp(min=0) * (inside / samples)[..., None, :]).sum(-1)
        # Taps beyond the last sample weigh nothing, and must not meet a NaN that is none of the bin's either.
        last = torch.where(inside, low, 0).amax(-1, keepdim=True) + 1
        index = torch.minimum(index, torch.minimum(last, extent - 1)).int()
        taps_x, taps_y = min(steps_x + 1, width), min(steps_y + 1, height)
    else:
        # Samples outside weigh nothing, and must not meet a NaN that is none of the bin's: they take another's place.
        low = torch.where(inside, low, low.gather(-1, inside.to(torch.uint8).argmax(-1, keepdim=True)))
        share = inside / samples if sampling.mode == "avg" else inside.to(dtype)
        upper = (position - low) * share
        index = torch.stack((low, torch.minimum(low + 1, extent - 1)), -1).flatten(3).int()
        weight = torch.stack((share - upper, upper), -1).flatten(3)
        taps_x, taps_y = 2 * steps_x, 2 * steps_y
    index_dtype = torch.int32 if n * height * width < 2**31 else torch.int64
    line = index[:, 1, :h, :taps_y].to(index_dtype) * width
    line = line + (chunk.images * (height * width)).to(index_dtype)[:, None, None]
    return (line, weight[:, 1, :h, :taps_y]), (index[:, 0, :w, :taps_x], weight[:, 0, :w, :taps_x])


def _bags(y: _Taps, x: _Taps) -> tuple[Tensor, Tensor]:
    """Pixels and weights of every bin, both `[k * h * w, Ty * Tx]`."""
    ty, tx = y[0].shape[2], x[0].shape[2]
    # The taps of an axis are spread over the bag before they meet: torch is slow where the last dimension is short.
    yi, yw = (t[..., None].expand(-1, -1, -1, tx).flatten(2)[:, :, None] for t in y)  # [k, h, 1, Ty * Tx]
    xi, xw = (t[:, :, None].expand(-1, -1, ty, -1).flatten(2)[:, None] for t in x)  # [k, 1, w, Ty * Tx]
    return (yi + xi).flatten(0, 2), (yw * xw).flatten(0, 2)


def _weighted_sum(read: _Read, y: _Taps, x: _Taps) -> Tensor:
    """Every bin, `[k * h * w, C]`."""
    index, weight = _bags(y, x)
    pixels, index = read(index)
    return F.embedding_bag(index, pixels, per_sample_weights=weight.to(pixels.dtype), mode="sum")


def _transposed_sum(rows: Tensor, bins: Tensor, y: _Taps, x: _Taps, count: int) -> Tensor:
    """Every pixel's sum over the bins that read it, `[count, C]`; `bins` says which of the rows are the bins of k."""
    index, weight = _bags(y, x)
    dtype = torch.int32 if max(len(rows), index.numel()) < 2**31 else torch.int64
    readers = bins.to(dtype).view(-1, 1).expand(index.shape).reshape(-1)
    index, order = index.flatten().sort(stable=True)
    ends = torch.bincount(index, minlength=count).cumsum(0)
    return F.embedding_bag(
        readers[order],
        rows,
        F.pad(ends, (1, 0)).to(dtype),
        per_sample_weights=weight.flatten()[order],
        mode="sum",
        include_last_offset=True,
    )


def _largest(blocks: Iterable[Tensor], numbered: bool) -> tuple[Tensor, Tensor]:
    """The largest of candidates that come in blocks `[k, bins, S, C]`, NaN if one is, `[k, bins, C]`.

    With it, where it is to be numbered, its number among all of them, int32; the first among equals, or NaNs.
    """
    best, numbers, before = None, torch.empty(0), 0
    for block in blocks:
        value = number = block.amax(2)
        if numbered:  # torch's max with indices takes as long for each candidate as all of this
            there = block == value[:, :, None]
            if value.isnan().any():
                there |= block.isnan()
            after = before + block.shape[2]
            order = torch.arange(before, after, dtype=torch.int32, device=block.device)[:, None]
            number = torch.where(there, order, after).amin(2)
            before = after
        if best is None:
            best, numbers = value, number
            continue
        larger = torch.maximum(best, value)
        if numbered:
            numbers = torch.where((larger != best) & (best == best), number, numbers)
        best = larger
    assert best is not None
    return best, numbers


def _sampled_max(read: _Read, chunk: _Chunk, y: _Taps, x: _Taps, numbered: bool) -> tuple[Tensor, Tensor]:
    """The largest sample of each bin and its number in row-major order, both `[k, h * w, C]`."""
    k, h, w = len(chunk.rows), y[0].shape[1], x[0].shape[1]
    steps = x[0].shape[2] // 2
    samples_x, samples_y = chunk.samples[:, :, None, None].unbind(1)  # [k, 1, 1]
    columns = x[0].reshape(k, w * steps, 2), x[1].reshape(k, w * steps, 2)

    def lines() -> Iterator[Tensor]:
        # Where some are passed over, those looked at reach beyond the picture too, so the zeros there are not missed.
        for i in range(y[0].shape[2] // 2):
            line = y[0][..., 2 * i : 2 * i + 2], y[1][..., 2 * i : 2 * i + 2]
            values = _weighted_sum(read, line, columns).view(k, h * w, steps, -1)
            seen = (line[1].any(-1)[:, :, None] & columns[1].any(-1)[:, None]).view(k, h * w, steps)
            if not seen.all():
                values.masked_fill_(~seen[..., None], 0.0)
            there = (i < samples_y) & (torch.arange(steps, device=values.device) < samples_x)  # [k, 1, steps]
            yield values if there.all() else values.masked_fill_(~there[..., None], -torch.inf)

    return _largest(lines(), numbered)


def _scatter_corners(plane: Tensor, grad: Tensor, numbers: Tensor, y: _Taps, x: _Taps) -> None:
    """Add the gradient of each bin, `[k, h * w, C]`, to the corners of its largest sample in `[N * H * W, C]`."""
    chosen = _of_number(numbers, x[0].shape[2] // 2)
    channel = torch.arange(plane.shape[1], device=plane.device)
    for i in range(2):
        for j in range(2):
            line, column = _choose(y[0][..., i::2], x[0][..., j::2], chosen)
            weight_y, weight_x = _choose(y[1][..., i::2], x[1][..., j::2], chosen)
            index = (line + column).long() * plane.shape[1] + channel
            plane.view(-1).scatter_add_(0, index.flatten(), (weight_y * weight_x * grad).flatten())


def _of_number(numbers: Tensor, steps_x: int) -> tuple[Tensor, Tensor]:
    """The steps along y and x of numbers in row-major order, int64."""
    y = torch.div(numbers, steps_x, rounding_mode="floor")
    return y.long(), (numbers - y * steps_x).long()


def _choose(y: Tensor, x: Tensor, chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of what the bins have for each step along y, `[k, h, Sy]`, and x, `[k, w, Sx]`, that of the steps chosen."""
    h, w = y.shape[1], x.shape[1]
    y = y[:, :, None].expand(-1, -1, w, -1).flatten(1, 2)  # [k, h * w, Sy]
    x = x[:, None].expand(-1, h, -1, -1).flatten(1, 2)  # [k, h * w, Sx]
    return y.gather(2, chosen[0]), x.gather(2, chosen[1])  # [k, h * w, C]


def roi_pool(
    feature: Tensor, boxes: Tensor, images: Tensor, scale: float, output_size: Sequence[int], numbered: bool
) -> tuple[Tensor, Tensor]:
    """The largest pixel of each bin, with box corners and bin edges rounded to pixels (Fast R-CNN).

    Args:
        feature: `[N, C, H, W]`.
        boxes: `[K, 4]` xyxy in pixels of the picture.
        images: `[K]`, which image; RoIs of images outside 0..N-1 give zeros, as those that are not finite do.
        scale: Feature pixels per picture pixel.
        output_size: Bins, height and width.
        numbered: Whether the rows are wanted, without which they are empty.

    Returns:
        values `[K, C, h, w]`, and the rows int64 `[K, C, h, w]` that they have among the pixels `[N * H * W]`; 0 and -1
        for an empty bin. Both contiguous.
    """
    n, c, height, width = feature.shape
    h, w = output_size
    k = len(boxes)
    out = feature.new_empty(k, c, h * w)
    argmax = torch.empty(out.shape if numbered else (0, c, h * w), dtype=torch.int64, device=out.device)
    if out.numel():
        corners = boxes.to(_wide(feature.dtype)) * scale
        valid = corners.abs().sum(1).isfinite() & (images >= 0) & (images < n)
        corners = torch.where(valid[:, None], _round_half_away(corners), 0.0)
        size = (corners[:, 2:] - corners[:, :2] + 1).clamp(min=1.0)
        edges = []
        for axis, bins, extent in ((1, h, height), (0, w, width)):
            start = corners[:, axis, None]
            step = size[:, axis, None] / size.new_full((), bins)  # by a number, CUDA multiplies with its inverse
            number = torch.arange(bins, dtype=size.dtype, device=size.device)
            edges.append(((number * step).floor() + start).clamp(0, extent).long())  # [k, bins]
            edges.append((((number + 1) * step).ceil() + start).clamp(0, extent).long())
        top, bottom, left, right = edges
        empty = (top >= bottom)[:, :, None] | (left >= right)[:, None, :] | ~valid[:, None, None]
        empty = empty.flatten(1)[..., None]  # [k, h * w, 1]
        first_line = torch.where(valid, images, 0).long()[:, None, None] * height

        steps = torch.stack([(bottom - top).amax(1), (right - left).amax(1)], 1).clamp(min=1)  # [k, 2]
        read = _reader(feature, h * w * int(steps.prod(1).sum()))
        line_bytes = h * w * c * _CANDIDATE_BYTES
        order = steps.amax(1).argsort(descending=True, stable=True)
        while len(order):
            most_y, most_x = steps[order[0]].tolist()
            part = max(1, _FORWARD_BYTES // (line_bytes * most_y * most_x))
            rows, order = order[:part], order[part:]
            steps_y, steps_x = steps[rows].amax(0).tolist()
            # Past the end of a bin its last pixel is read again, which changes no maximum.
            line = top[rows, :, None] + torch.arange(steps_y, device=out.device)
            line = torch.minimum(line, (bottom[rows, :, None] - 1).clamp(min=0)) + first_line[rows]  # [k, h, steps_y]
            column = left[rows, :, None] + torch.arange(steps_x, device=out.device)
            column = torch.minimum(column, (right[rows, :, None] - 1).clamp(min=0))  # [k, w, steps_x]
            line *= width
            lines = max(1, _FORWARD_BYTES // (len(rows) * line_bytes * steps_x))
            values, numbers = _largest((_window(read, part, column) for part in line.split(lines, 2)), numbered)
            out.index_copy_(0, rows, values.masked_fill_(empty[rows], 0.0).transpose(1, 2))
            if numbered:
                chosen_line, chosen_column = _choose(line, column, _of_number(numbers, steps_x))
                rows_of_max = (chosen_line + chosen_column).masked_fill_(empty[rows], -1)
                argmax.index_copy_(0, rows, rows_of_max.transpose(1, 2))
    return out.view(k, c, h, w), argmax.view(len(argmax), c, h, w)


def _window(read: _Read, lines: Tensor, columns: Tensor) -> Tensor:
    """The pixels of every bin, `[k, h * w, Sy * Sx, C]`, in lines `[k, h, Sy]` and columns `[k, w, Sx]`."""
    index = (lines[:, :, None, :, None] + columns[:, None, :, None]).flatten(3).flatten(1, 2)
    pixels, places = read(index)
    return pixels.index_select(0, places.flatten()).view(*index.shape, pixels.shape[1])


def _round_half_away(x: Tensor) -> Tensor:
    """C's `round`; torch's rounds halves to even."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0.0)


def roi_pool_backward(grad: Tensor, argmax: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of `roi_pool` with respect to the feature.

    Args:
        grad: `[K, C, h, w]`.
        argmax: As returned by `roi_pool`.
        shape: (N, C, H, W) of the feature.

    Returns:
        `[N, H, W, C]`, contiguous, in the dtype of `grad`; summed in float32 at least.
    """
    n, c, height, width = shape
    total = torch.zeros(n * height * width * c, dtype=_wide(grad.dtype), device=grad.device)
    channel = torch.arange(c, device=grad.device)[:, None, None]
    rows = max(1, _BACKWARD_BYTES // (_MAX_VALUE_BYTES * max(1, grad[:1].numel())))
    for part, codes in zip(grad.split(rows), argmax.split(rows), strict=True):
        values = part.to(total.dtype).masked_fill(codes < 0, 0.0)
        total.scatter_add_(0, (codes.clamp(min=0) * c + channel).flatten(), values.flatten())
    return total.to(grad.dtype).view(n, height, width, c)
