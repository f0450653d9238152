"""RoIAlign and RoIPool on a GPU, forward and backward, beside torchvision's.

What must move at least: forward, the pixels under the RoIs and the output; backward, the gradient of the output and
those of all levels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..kernels.dispatch import use_triton
from ..kernels.roi_pooling import pyramid_roi_align, roi_align, roi_pool
from .device import Bench, plain_torch
from .harness import Row
from .inputs import STRIDES, dtype_name, levels_of, pixels_under, proposals
from .installed import optional

__all__ = ["backward_cases", "forward_cases"]

ops = optional("torchvision.ops")

Case = Callable[[Bench], list[Row]]
HALF = torch.float16
SAMPLINGS = ((False, 2), (True, 0))  # (aligned, sampling ratio) of torchvision's and Detectron2's models


def forward_cases(quick: bool) -> Iterator[Case]:
    """The box head's RoIs in every dtype, then the mask head's, a batch, and the other ops."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for aligned, ratio in SAMPLINGS:
            yield partial(_forward, dtype=dtype, aligned=aligned, ratio=ratio)
    for aligned, ratio in SAMPLINGS:
        yield partial(_forward, dtype=HALF, aligned=aligned, ratio=ratio, count=100, output=14)
        yield partial(_forward, dtype=HALF, aligned=aligned, ratio=ratio, batch=8)
    yield partial(_forward, dtype=HALF, aligned=False, ratio=2, mode="max")
    for dtype in (HALF, torch.float32):
        yield partial(_turning, dtype=dtype)
    yield _drop_in
    yield _pool


def backward_cases(quick: bool) -> Iterator[Case]:
    """The box head's RoIs, as training pools them."""
    for dtype in (torch.float32, torch.float16):
        for aligned, ratio in SAMPLINGS:
            yield partial(_backward, dtype=dtype, aligned=aligned, ratio=ratio)


def _forward(
    bench: Bench,
    dtype: torch.dtype,
    aligned: bool,
    ratio: int,
    count: int = 1000,
    output: int = 7,
    batch: int = 1,
    mode: str = "avg",
) -> list[Row]:
    size, channels = ((160, 192), 16) if bench.quick else ((800, 1344), 256)
    boxes = _boxes(bench, batch, count, size)
    bytes_of_one = batch * channels * sum(size[0] * size[1] // s**2 for s in STRIDES) * dtype.itemsize
    planar = [_pyramid(bench, batch, channels, size, dtype, seed) for seed in range(bench.copies(bytes_of_one))]
    last = [[level.to(memory_format=torch.channels_last) for level in features] for features in planar]
    largest = max(float(level.abs().max()) for level in planar[0])

    def ours(features: list[Tensor]) -> Tensor:
        pooled = pyramid_roi_align(features, boxes, STRIDES, output, sampling_ratio=ratio, aligned=aligned, mode=mode)
        return pooled.flatten(0, 1)

    peers: dict[str, Any] = {}
    if mode == "avg":
        peers = _torchvision_forward(planar, boxes, size, output, ratio, aligned)
    implementations = {
        **peers,
        "trimask, channels_last": [partial(ours, features) for features in last],
        "trimask, NCHW": [partial(ours, features) for features in planar],
        "trimask, plain torch": [plain_torch(partial(ours, features)) for features in last],
    }
    if mode == "avg" and dtype != torch.float32 and use_triton(boxes.device):  # elsewhere there is no other kernel
        implementations["trimask, channels_last, bin by bin"] = [_bin_by_bin(partial(ours, x)) for x in last]

    def disagreement(expected: Any, got: Any) -> str:
        return _off(_in_order(expected), _in_order(got), _tolerance(size[1], largest, dtype))

    def near(expected: Any, got: Any) -> str:
        """Coordinates in half precision are off by up to a quarter of a pixel, which moves every value."""
        error = float((_in_order(expected).float() - _in_order(got).float()).abs().mean())
        return "" if error <= 0.1 else f"off by {error:.1e} on average"

    pixels = pixels_under(boxes.cpu(), size)
    least = (pixels + batch * len(boxes[0]) * output**2) * channels * dtype.itemsize
    rois = f"{_times(batch)}{len(boxes[0])} RoIs x {channels} x {output} x {output}"
    kind = f"{'' if mode == 'avg' else mode + ', '}{_sampling(aligned, ratio)}"
    case = f"{rois}, P2..P5 of {size[0]} x {size[1]}, {kind}"
    return bench.compare(
        "roi_align", case, implementations, disagreement, near=near, dtype=dtype_name(dtype), least_bytes=least
    )


def _backward(bench: Bench, dtype: torch.dtype, aligned: bool, ratio: int, count: int = 1000) -> list[Row]:
    size, channels = ((160, 192), 16) if bench.quick else ((800, 1344), 256)
    boxes = _boxes(bench, 1, count, size)
    features = [level.requires_grad_() for level in _pyramid(bench, 1, channels, size, dtype, 0)]
    last = [level.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for level in features]
    device = bench.clock.device
    rng = torch.Generator(device).manual_seed(1)
    shape = (len(boxes[0]), channels, 7, 7)
    grad_bytes = math.prod(shape) * dtype.itemsize
    grads = [
        torch.randn(shape, generator=rng, device=device).to(dtype, memory_format=torch.channels_last)
        for _ in range(bench.copies(grad_bytes))
    ]
    pooled = pyramid_roi_align(last, boxes, STRIDES, 7, sampling_ratio=ratio, aligned=aligned).flatten(0, 1)

    def ours(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, last, grad, retain_graph=True)

    implementations: dict[str, Any] = {"torchvision": None}
    if ops:
        theirs = _torchvision_pool(boxes, size, 7, ratio, aligned)(features)
        implementations["torchvision"] = [
            partial(torch.autograd.grad, theirs, features, grad.contiguous(), retain_graph=True) for grad in grads
        ]
    implementations["trimask"] = [partial(ours, grad) for grad in grads]
    implementations["trimask, deterministic"] = [_deterministic(partial(ours, grad)) for grad in grads]
    implementations["trimask, plain torch"] = [plain_torch(partial(ours, grad)) for grad in grads]

    def disagreement(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str:
        for level, (a, b) in enumerate(zip(expected, got, strict=True)):
            # The same sums in another order; half precision rounds each weight and each sum.
            part = 1e-4 + (dtype != torch.float32) * 4 * torch.finfo(dtype).eps
            if words := _off(a, b, part * float(a.abs().max())):
                return f"P{level + 2}: {words}"
        return ""

    case = f"{len(boxes[0])} RoIs x {channels} x 7 x 7 to P2..P5 of {size[0]} x {size[1]}, {_sampling(aligned, ratio)}"
    least = grad_bytes + sum(level.nbytes for level in features)
    return bench.compare(
        "roi_align_backward", case, implementations, disagreement, dtype=dtype_name(dtype), least_bytes=least
    )


def _turning(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """All levels turned from NCHW to channels_last memory; torch copies them one by one."""
    size, channels = ((160, 192), 16) if bench.quick else ((800, 1344), 256)
    nbytes = channels * sum(size[0] * size[1] // s**2 for s in STRIDES) * dtype.itemsize
    pyramids = [_pyramid(bench, 1, channels, size, dtype, seed) for seed in range(bench.copies(nbytes))]

    def copied(features: list[Tensor]) -> list[Tensor]:
        return [feature.contiguous(memory_format=torch.channels_last) for feature in features]

    implementations: dict[str, Any] = {"torch": [partial(copied, features) for features in pyramids]}
    if use_triton(pyramids[0][0].device):
        from ..kernels.gpu.turning import to_channels_last

        implementations["trimask"] = [partial(to_channels_last, features) for features in pyramids]

    def differing(expected: list[Tensor], got: list[Tensor]) -> str:
        wrong = [
            f"P{level + 2}" for level, pair in enumerate(zip(expected, got, strict=True)) if not torch.equal(*pair)
        ]
        return f"{', '.join(wrong)} differ" if wrong else ""

    case = f"{channels} channels, P2..P5 of {size[0]} x {size[1]}, NCHW to channels_last"
    return bench.compare("turning", case, implementations, differing, dtype=dtype_name(dtype), least_bytes=2 * nbytes)


def _drop_in(bench: Bench) -> list[Row]:
    """All RoIs on one level, the signature of torchvision."""
    size, channels, count = ((160, 192), 16, 50) if bench.quick else ((800, 1344), 256, 1000)
    boxes = list(_boxes(bench, 1, count, size))
    levels = [_pyramid(bench, 1, channels, size, torch.float32, seed)[0] for seed in range(2)]
    largest = float(levels[0].abs().max())
    implementations = {
        "torchvision": [partial(ops.roi_align, x, boxes, 7, 0.25, 2) for x in levels] if ops else None,
        "trimask": [partial(roi_align, x, boxes, 7, 0.25, 2) for x in levels],
        "trimask, plain torch": [plain_torch(partial(roi_align, x, boxes, 7, 0.25, 2)) for x in levels],
    }
    disagreement = partial(_off, tolerance=_tolerance(size[1], largest, torch.float32))
    case = f"drop-in, {count} RoIs x {channels} x 7 x 7, P2 of {size[0]} x {size[1]}, sampling ratio 2"
    return bench.compare("roi_align", case, implementations, disagreement)


def _pool(bench: Bench) -> list[Row]:
    size, channels, count = ((160, 192), 16, 50) if bench.quick else ((800, 1344), 256, 1000)
    boxes = list(_boxes(bench, 1, count, size))
    levels = [_pyramid(bench, 1, channels, size, torch.float32, seed)[0] for seed in range(2)]
    implementations = {
        "torchvision": [partial(ops.roi_pool, x, boxes, 7, 0.25) for x in levels] if ops else None,
        "trimask": [partial(roi_pool, x, boxes, 7, 0.25) for x in levels],
        "trimask, plain torch": [plain_torch(partial(roi_pool, x, boxes, 7, 0.25)) for x in levels],
    }
    # On a GPU torchvision fuses products and sums, so that a bin may end a pixel earlier or later.
    expected = ops.roi_pool(levels[0].cpu(), [box.cpu() for box in boxes], 7, 0.25) if ops else None

    def differing(expected: Tensor, got: Tensor, allowed: float = 0.0) -> str:
        count = int((expected != got.cpu()).sum())
        return "" if count <= allowed * expected.numel() else f"{count} of {expected.numel()} values differ"

    case = f"{count} RoIs x {channels} x 7 x 7, P2 of {size[0]} x {size[1]}"
    return bench.compare(
        "roi_pool", case, implementations, differing, near=partial(differing, allowed=0.01), expected=expected
    )


def _torchvision_forward(
    planar: list[list[Tensor]], boxes: Tensor, size: tuple[int, int], output: int, ratio: int, aligned: bool
) -> dict[str, Any]:
    """What a user would call; the same without looking for the levels; and its kernel in half precision."""
    dtype = planar[0][0].dtype
    names = ["torchvision", "torchvision, levels known"]
    if dtype != torch.float32:
        names.append(f"torchvision, {dtype_name(dtype)} throughout")
    if not ops:
        return dict.fromkeys(names)
    pool = _torchvision_pool(boxes, size, output, ratio, aligned)
    calls: list[Any] = [[partial(pool, features) for features in planar]]
    for exact in (True, False)[: len(names) - 1]:
        known = _torchvision_levels(boxes, dtype, output, ratio, aligned, exact)
        calls.append([partial(known, features) for features in planar])
    return dict(zip(names, calls, strict=True))


def _torchvision_pool(
    boxes: Tensor, size: tuple[int, int], output: int, ratio: int, aligned: bool
) -> Callable[[list[Tensor]], Tensor]:
    """torchvision's pooler, or where that cannot align its RoIAlign level by level as Detectron2 calls it.

    Half precision goes through float32 and back, as torchvision's autocast does.
    """
    pooler = ops.MultiScaleRoIAlign([str(level) for level in range(len(STRIDES))], output, ratio)
    lists, sizes = list(boxes), [size] * len(boxes)
    rois, level_of = _rois(boxes), levels_of(boxes.flatten(0, 1))

    def by_level(features: list[Tensor]) -> Tensor:
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], output, output)
        for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
            of = (level_of == level).nonzero()[:, 0]
            pooled[of] = ops.roi_align(feature, rois[of], output, 1 / stride, ratio, aligned)
        return pooled

    def pool(features: list[Tensor]) -> Tensor:
        exact = [feature.float() for feature in features]
        if aligned:
            return by_level(exact).to(features[0].dtype)
        named = {str(level): feature for level, feature in enumerate(exact)}
        return pooler(named, lists, sizes).to(features[0].dtype)

    return pool


def _torchvision_levels(
    boxes: Tensor, dtype: torch.dtype, output: int, ratio: int, aligned: bool, exact: bool
) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """Four calls of torchvision's RoIAlign on RoIs sorted by level beforehand; and where each RoI's row went."""
    rois, level_of = _rois(boxes), levels_of(boxes.flatten(0, 1))
    order = level_of.argsort(stable=True)
    sorted_rois = rois[order].to(torch.float32 if exact else dtype)
    parts = sorted_rois.split(level_of.bincount(minlength=len(STRIDES)).tolist())
    place = order.argsort()

    def pool(features: list[Tensor]) -> tuple[Tensor, Tensor]:
        pooled = [
            ops.roi_align(feature.float() if exact else feature, part, output, 1 / stride, ratio, aligned)
            for feature, part, stride in zip(features, parts, STRIDES, strict=True)
        ]
        return torch.cat(pooled).to(dtype), place

    return pool


def _bin_by_bin(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The function where the separable kernel never takes over."""

    def call() -> Tensor:
        with mock.patch("trimask.kernels.gpu.roi_align.is_faster", return_value=False):
            return function()

    return call


def _in_order(pooled: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return pooled if isinstance(pooled, Tensor) else pooled[0][pooled[1]]


def _deterministic(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function under torch's deterministic algorithms, without their fill of new memory, which is for debugging."""

    settings: Any = torch.utils.deterministic

    def call() -> Any:
        fill = settings.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
        try:
            return function()
        finally:
            torch.use_deterministic_algorithms(False)
            settings.fill_uninitialized_memory = fill

    return call


def _boxes(bench: Bench, batch: int, count: int, size: tuple[int, int]) -> Tensor:
    """[batch, count, 4], or fewer of them in a quick run."""
    count = min(count, 50) if bench.quick else count
    rng = torch.Generator().manual_seed(0)
    return bench.put(torch.stack([proposals(count, rng, count, 0.1, size) for _ in range(batch)]))


def _pyramid(
    bench: Bench, batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Levels [batch, channels, H / stride, W / stride]."""
    device = bench.clock.device
    rng = torch.Generator(device).manual_seed(seed)
    shapes = [(batch, channels, size[0] // s, size[1] // s) for s in STRIDES]
    return [torch.randn(shape, generator=rng, device=device).to(dtype) for shape in shapes]


def _rois(boxes: Tensor) -> Tensor:
    """Boxes [B, R, 4] -> [B * R, 5], the image first."""
    image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    return torch.cat([image[:, None].to(boxes.dtype), boxes.flatten(0, 1)], 1)


def _tolerance(width: int, largest: float, dtype: torch.dtype) -> float:
    """Twice what one side may be off from float64: a coordinate of up to `width` / 4, and half precision's rounding."""
    place = torch.finfo(torch.float32).eps * width / STRIDES[0]
    return 2 * (place + (dtype != torch.float32) * torch.finfo(dtype).eps) * largest


def _off(expected: Tensor, got: Tensor, tolerance: float) -> str:
    error = float((expected.float() - got.float()).abs().max())
    return "" if error <= tolerance else f"off by {error:.1e}, more than {tolerance:.1e}"


def _sampling(aligned: bool, ratio: int) -> str:
    return (f"sampling ratio {ratio}" if ratio else "adaptive") + (", aligned" if aligned else "")


def _times(batch: int) -> str:
    return "" if batch == 1 else f"{batch} x "
