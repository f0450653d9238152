"""Whole models on a GPU beside torchvision's with the same weights: from pictures to masks, all on the device.

Ours: a resized picture in, run lengths of the masks out; the p50 is of one CUDA graph, `call_ms` of the same launched
kernel by kernel. torchvision's reads results back while it runs and cannot be captured; it takes pictures of the size
that it would resize them to, and gives dense masks, which stay on the device. Every output is checked before it is
timed: as the same set of detections in float32, by scores and how many are found again in lower precision.

The corners of the grid come first; the other cells have fewer rounds, torchvision in their own precision alone, and no
count of launches. What there was no time for is named.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.inference.capture import WORTH_IT
from ..engine.inference.graph import optimize, run_lengths
from ..engine.model.checkpoints import load_model
from ..engine.model.mask_rcnn import Detections, MaskRCNN
from ..kernels.cpu.masks import mask_of_runs
from .compiling import compiled_peers
from .device import Bench, precision
from .harness import Row
from .installed import optional
from .matching import AUTOCAST, BFLOAT16, EXACT, FLOAT16, Found, Tolerance, disagreement, summary
from .networks import random_resnet, without_masks
from .peers import torchvision as peers_torchvision
from .samples import photographs
from .usage import slower_in_a_graph, usage

__all__ = ["DTYPES", "Point", "cases", "cells", "compiled_cases", "grid"]

torchvision = optional("torchvision")

Case = Callable[[Bench], list[Row]]
CAPACITY = 16384  # runs of a mask: random weights draw noise
DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,  # float32 whose convolutions round to TF32, torch's default
}  # in the order of the grid
TOLERANCES: dict[str, Tolerance | None] = {
    "float32": EXACT,
    "tf32": FLOAT16,  # as many bits
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
}
SIZES = ((800, 1344), (640, 640), (448, 608))
BATCHES = (1, 8, 2, 4)
DEPTHS = (50, 101)
_DEFAULT = "torchvision, tf32"  # as it runs where nobody asks for lower precision
_COMPILING = 60.0  # seconds without which the compiler is not begun with
CORNERS = 13  # points of the grid before what takes long
_ROUNDS, _SECONDS = 9, 2.5  # of the others


@dataclass(frozen=True)
class Point:
    """One cell of the grid.

    Attributes:
        tuned: cuDNN tries its algorithms (`torch.backends.cudnn.benchmark`), for both sides.
        limits: proposals and detections for each picture.
    """

    depth: int = 50
    dtype: str = "float16"
    size: tuple[int, int] = SIZES[0]
    batch: int = 1
    masks: bool = True
    tuned: bool = False
    limits: tuple[int, int] = (1000, 100)

    def __str__(self) -> str:
        more = ["boxes alone"] * (not self.masks) + ["cuDNN tuned"] * self.tuned
        return ", ".join([f"ResNet-{self.depth} FPN, {self.batch} x {self.size[0]} x {self.size[1]}", *more])


_SMALL = Point(size=(64, 96), limits=(50, 20))


def grid(quick: bool) -> list[Point]:
    """Every cell once, those that say most first."""
    if quick:
        return [replace(_SMALL, dtype="float32", batch=2), replace(_SMALL, dtype="bfloat16", masks=False)]
    corners = [
        Point(),
        Point(batch=8),
        Point(dtype="float32"),
        Point(dtype="bfloat16"),
        Point(depth=101),
        Point(dtype="tf32"),
        Point(size=SIZES[2]),
        Point(masks=False),
        Point(size=SIZES[1]),
        Point(dtype="float32", batch=8),
        Point(depth=101, batch=8),
        Point(tuned=True),
        Point(batch=8, tuned=True),
    ]
    rest = [
        Point(depth, dtype, size, batch, masks)
        for dtype, masks, depth, size, batch in product(DTYPES, (True, False), DEPTHS, SIZES, BATCHES)
    ]
    return list(dict.fromkeys([*corners, *rest]))


def cases(quick: bool) -> Iterator[Case]:
    """The corners, the precision on real pictures, then the rest of the grid while there is time."""
    points = grid(quick)
    left: list[str] = []
    for point in points[:CORNERS]:
        yield partial(_point, point=point, left=left)
    yield partial(_precision, left=left)
    for point in points[CORNERS:]:
        yield partial(_point, point=point, left=left, corner=False)
    yield partial(_unmeasured, left=left)


def cells(quick: bool, dtype: str) -> Iterator[Case]:
    """Those of the grid in one precision, what has most pixels first."""
    left: list[str] = []
    for point in grid(quick):
        if point.dtype == dtype and not point.tuned:
            yield partial(_point, point=point, left=left, corner=False)
    yield partial(_unmeasured, left=left)


def compiled_cases(quick: bool) -> Iterator[Case]:
    """torch.compile on torchvision's model, which takes minutes."""
    left: list[str] = []
    yield partial(_compiled, left=left)
    yield partial(_unmeasured, left=left)


def _unmeasured(bench: Bench, left: list[str]) -> list[Row]:
    """The row of what there was no time for."""
    if not left:
        return []
    case = f"{len(left)} more, from {left[0]} on"
    threads = torch.get_num_threads()
    return [Row("models", case, "trimask", bench.clock.device, "", threads, note="not measured: no time was left")]


@cache
def _network(depth: int, masks: bool, limits: tuple[int, int]) -> MaskRCNN:
    model = random_resnet(depth, *limits)
    return model if masks else without_masks(model)


@cache
def _lean(depth: int, masks: bool, limits: tuple[int, int], device: str, dtype: torch.dtype) -> MaskRCNN:
    return optimize(_network(depth, masks, limits), torch.device(device), dtype)


@cache
def _twin(depth: int, masks: bool, limits: tuple[int, int], device: str) -> Any:
    model: Any = peers_torchvision.twin(_network(depth, True, limits))
    if not masks:
        heads = model.roi_heads
        heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
    return model.to(device)


def _peer(point: Point, device: str) -> Any:
    """torchvision's model, which leaves pictures of the point's size as they are."""
    model = _twin(point.depth, point.masks, point.limits, device)
    model.transform.min_size, model.transform.max_size = (min(point.size),), max(point.size)
    return model


def _pictures(bench: Bench, size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    """float32 in 0..255 [B, 3, H, W] in channels_last memory, and the sizes [B, 2], on the device."""
    arrays = photographs(size, batch)
    images = torch.stack([torch.from_numpy(array) for array in arrays]).permute(0, 3, 1, 2).float()
    image, sizes = bench.put(images.contiguous(memory_format=torch.channels_last), torch.tensor([size] * batch))
    return image, sizes


def _ours(graph: MaskRCNN, image: Tensor, sizes: Tensor, mark: Callable[[str], None] | None = None) -> Any:
    """Detections, and the run lengths of their masks."""
    with torch.inference_mode():
        found = graph(image, sizes, sizes, **({"mark": mark} if mark else {}))
        if found.mask_logits is None:
            return found, None
        runs = run_lengths(found, sizes, graph.config.paste, CAPACITY)
        if mark:
            mark("run lengths")
        return found, runs


def _theirs(model: Any, images: list[Tensor], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """torchvision's detections, with bool masks; in lower precision by autocast."""
    with torch.inference_mode(), torch.autocast(images[0].device.type, dtype, enabled=dtype != torch.float32):
        found = model(images)
        return [{**one, "masks": one["masks"][:, 0] > 0.5} if "masks" in one else one for one in found]


def _normal(output: Any, size: tuple[int, int], masks: bool = True) -> list[Found]:
    """Either's output on the host; its masks, half a gigabyte in a batch, only where they are compared."""
    if isinstance(output, list):
        if output and isinstance(output[0], Found):
            return output
        return [peers_torchvision.found(one, one["masks"] if masks and "masks" in one else None) for one in output]
    found, runs = output
    return [_unpadded(found, runs if masks else None, i, size) for i in range(len(found.count))]


def _unpadded(found: Detections, runs: tuple[Tensor, Tensor] | None, i: int, size: tuple[int, int]) -> Found:
    n = int(found.count[i])
    boxes, scores, labels = (x[i, :n].cpu().numpy() for x in (found.boxes, found.scores, found.labels))
    masks = None
    if runs is not None:
        values, lengths = (x[i, :n].cpu().numpy() for x in runs)
        if (most := lengths.max(initial=0)) > CAPACITY:
            raise ValueError(f"run lengths: expected at most {CAPACITY} of a mask, got {most}")
        dense = [mask_of_runs(row[:length].astype(np.int64), size) for row, length in zip(values, lengths, strict=True)]
        masks = np.stack(dense) if dense else np.zeros((0, *size), bool)
    return Found(boxes, scores, labels, masks)


def _point(bench: Bench, point: Point, left: list[str], corner: bool = True) -> list[Row]:
    if bench.late():
        left.append(f"{point} in {point.dtype}")
        return []
    device, dtype = bench.clock.device, DTYPES[point.dtype]
    with precision(tf32=point.dtype != "float32", tuned=point.tuned):
        image, sizes = _pictures(bench, point.size, point.batch)
        images = [one.contiguous() for one in image / 255]
        graph = _lean(point.depth, point.masks, point.limits, device, dtype)
        implementations: dict[str, Any] = {"torchvision": None, "trimask": partial(_ours, graph, image, sizes)}
        if torchvision:
            twin = _peer(point, device)
            implementations["torchvision"] = partial(_theirs, twin, images, dtype)
            if corner and dtype != torch.float32:
                implementations[_DEFAULT] = partial(_theirs, twin, images, torch.float32)
        expected = _expected(twin, images, point) if torchvision else None
        limits = {} if corner else {"rounds": _ROUNDS, "seconds": _SECONDS}
        rows = _compare(bench, "models", str(point), implementations, point, expected, **limits)
        ours = implementations["trimask"]
        for i, (row, call) in enumerate(zip(rows, implementations.values(), strict=True)):
            if row.p50_ms is None:
                continue
            fields = usage(bench, call, point.batch, staged=call if call is ours else None, profiled=corner)
            if row.captured and row.call_ms and row.p50_ms > WORTH_IT * row.call_ms:
                row = row.noted(slower_in_a_graph(call))
            rows[i] = replace(row, **fields)
        return rows


def _expected(twin: Any, images: list[Tensor], point: Point) -> list[Found] | None:
    """What float32 finds, which lower precision is held against."""
    if TOLERANCES[point.dtype] is EXACT:
        return None
    with precision(tf32=False, tuned=False):
        return _normal(_theirs(twin, images, torch.float32), point.size, masks=False)


def _compare(
    bench: Bench,
    subject: str,
    case: str,
    implementations: dict[str, Any],
    point: Point,
    expected: list[Found] | None,
    **limits: float,
) -> list[Row]:
    """Compare detections by what the point's precision allows."""
    tolerance = TOLERANCES[point.dtype]

    def differing(a: Any, b: Any, tolerance: Tolerance | None = tolerance) -> str:
        exact = tolerance is EXACT
        return disagreement(_normal(a, point.size, exact), _normal(b, point.size, exact), tolerance)

    near = differing if tolerance is EXACT else partial(differing, tolerance=AUTOCAST)
    rows = bench.compare(
        subject, case, implementations, differing, near=near, expected=expected, dtype=point.dtype, **limits
    )
    return [replace(row, dtype="tf32") if row.implementation == _DEFAULT else row for row in rows]


def _precision(bench: Bench, left: list[str]) -> list[Row]:
    """What lower precision does to the detections in real pictures, by the bundled model and a random one."""
    if bench.late():
        left.append("the detections in lower precision")
        return []
    rows: list[Row] = []
    size, count = (_SMALL.size, 1) if bench.quick else ((448, 608), 5)
    limits = (_SMALL if bench.quick else Point()).limits
    models = {"ResNet-50 FPN": _network(50, True, limits)} | ({} if bench.quick else {"people": load_model("people")})
    for name, model in models.items():
        image, sizes = _pictures(bench, size, count)
        found = {}
        for dtype in ("float32", "bfloat16") if bench.quick else ("float32", "tf32", "float16", "bfloat16"):
            with precision(tf32=dtype == "tf32", tuned=False):
                graph = optimize(model, torch.device(bench.clock.device), DTYPES[dtype])
                found[dtype] = _normal(_ours(graph, image, sizes), size)
            total = sum(len(one.scores) for one in found["float32"])
            apart, share = summary(found["float32"], found[dtype])
            tolerance = TOLERANCES[dtype] or FLOAT16
            rows.append(
                Row(
                    "models precision",
                    f"{name}, {count} photographs of {size[0]} x {size[1]}, {total} detections in float32",
                    "trimask",
                    bench.clock.device,
                    dtype,
                    torch.get_num_threads(),
                    correct=apart <= tolerance.score and share >= tolerance.share,
                    note=f"{dtype}: scores at most {apart:.4f} apart, {share:.1%} found again",
                )
            )
    return rows


def _compiled(bench: Bench, left: list[str]) -> list[Row]:
    """torchvision's backbone and its whole model, as far as there is time."""
    point = replace(_SMALL, dtype="float32") if bench.quick else Point()
    if torchvision is None:
        return []
    if bench.late(_COMPILING):
        left.append("torch.compile")
        return []
    device, dtype = bench.clock.device, DTYPES[point.dtype]
    image, sizes = _pictures(bench, point.size, point.batch)
    images = [one.contiguous() for one in image / 255]
    twin = _peer(point, device)
    implementations: dict[str, Any] = {
        "torchvision": partial(_theirs, twin, images, dtype),
        "trimask": partial(_ours, _lean(point.depth, point.masks, point.limits, device, dtype), image, sizes),
    }
    start = time.monotonic()
    implementations |= dict(compiled_peers(twin, lambda peer: partial(_theirs, peer, images, dtype), bench))
    how = "a quick run compiles nothing" if bench.quick else f"both compiled in {time.monotonic() - start:.0f} s"
    rows = _compare(bench, "models compiled", str(point), implementations, point, _expected(twin, images, point))
    return [row.noted(how) for row in rows]
