"""Non-maximum suppression on a GPU beside torchvision's and conch's, and the decoding of proposals.

The oracle of the suppression is torchvision's on the CPU, level by level and class by class; ours is held to it index
by index. Peers may differ in one box of a hundred: torchvision's GPU kernel fuses products and sums, and its
`batched_nms` moves the boxes of each class far away, where float32 is coarse.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.decoding import proposals as decode_proposals
from ..kernels.suppression import nms, segmented_nms
from .cases import CLASSES, DetectionCase
from .device import Bench, plain_torch
from .harness import Row
from .inputs import SIZE, kinds_of_boxes, proposals
from .installed import optional

__all__ = ["cases"]

ops = optional("torchvision.ops")
conch = optional("conch.ops.vision.nms")

Case = Callable[[Bench], list[Row]]
IOU, SCORE, KEPT = 0.7, 0.05, 100
MOST_FOR_A_MATRIX = 10_000  # conch's boxes: it holds all pairs at once, 400 MB
MOST_FOR_A_CPU = 10_000  # boxes of which the oracle is fast enough; beyond, ours too is held to one box of a thousand


def cases(quick: bool) -> Iterator[Case]:
    """Fewer where they are small and would be the same."""
    for count in (1000, 2000)[: 1 if quick else None]:
        for batch in (1, 8):
            yield partial(_levels, count=count, batch=batch)
    yield _detections
    for count in (1000, 10_000, 100_000)[: 1 if quick else None]:
        for kind in ("sparse", "proposals", "crowd"):
            yield partial(_nms, count=count, kind=kind)
    for batch in (1, 8):
        yield partial(_decoding, batch=batch)


def _levels(bench: Bench, count: int, batch: int) -> list[Row]:
    """The proposals of five levels, each a segment."""
    count = min(count, 60) if bench.quick else count
    segments = 5 * batch
    rng = torch.Generator().manual_seed(0)
    boxes = torch.stack([proposals(count, rng, max(count // 8, 1), 0.12, SIZE) for _ in range(segments)])
    scores = torch.rand(segments, count, generator=rng)
    expected = [kept[:1000] for kept in map(_exactly, boxes, scores)] if ops else None
    boxes, scores = bench.put(boxes, scores)
    level = torch.arange(segments, device=boxes.device).repeat_interleave(count)

    def torchvision() -> Tensor:
        return ops.batched_nms(boxes.flatten(0, 1), scores.flatten(), level, IOU)

    def by_level(output: Any) -> list[Tensor]:
        if isinstance(output, Tensor):
            output = output.cpu()
            return [output[output // count == s][:1000] % count for s in range(segments)]
        return _trimmed(output)

    ours = partial(segmented_nms, boxes, scores, IOU, 1000)
    implementations = {
        "torchvision": torchvision if ops else None,
        "trimask": ours,
        "trimask, plain torch": plain_torch(ours),
    }
    case = f"{segments} levels of {count} proposals, at most 1000 kept of each"
    return _compare(bench, case, implementations, expected, by_level)


def _detections(bench: Bench) -> list[Row]:
    """Every class of every proposal above a threshold; the best hundred that survive within their class."""
    count = 30 if bench.quick else 1000
    boxes, scores, labels = DetectionCase(count=count).candidates()
    expected = [_exactly_by_class(boxes, scores, labels)] if ops else None
    boxes, scores, labels = bench.put(boxes, scores, labels)

    def torchvision() -> Tensor:
        candidates = (scores > SCORE).nonzero()[:, 0]
        kept = ops.batched_nms(boxes[candidates], scores[candidates], labels[candidates], 0.5)
        return candidates[kept[:KEPT]]

    ours = partial(segmented_nms, boxes[None], scores[None], 0.5, KEPT, labels=labels[None], score_threshold=SCORE)
    implementations = {
        "torchvision": torchvision if ops else None,
        "trimask": ours,
        "trimask, plain torch": plain_torch(ours),
    }
    above = int((scores > SCORE).sum())
    case = f"detections: {count} proposals x {CLASSES} classes, {above} above {SCORE}, {KEPT} kept"
    return _compare(bench, case, implementations, expected, _single)


def _nms(bench: Bench, count: int, kind: str) -> list[Row]:
    """The drop-in, which reads at the end how many are left, and the same with outputs of a fixed shape."""
    count = min(count, 150) if bench.quick else count
    boxes = kinds_of_boxes(count)[kind]
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1))
    exact = count <= MOST_FOR_A_CPU
    expected = [_exactly(boxes, scores)] if ops and exact else None
    boxes, scores = bench.put(boxes, scores)
    ours = partial(nms, boxes, scores, IOU)
    implementations: dict[str, Any] = {
        "torchvision": partial(ops.nms, boxes, scores, IOU) if ops else None,
        "conch": partial(conch.nms, boxes, scores, IOU) if conch else None,
        "trimask": ours,
        "trimask, fixed shape": partial(segmented_nms, boxes[None], scores[None], IOU, count),
    }
    if conch and count > MOST_FOR_A_MATRIX:
        implementations["conch"] = _all_pairs
    if exact:  # it takes seconds beyond
        implementations["trimask, plain torch"] = plain_torch(ours)
    case = f"{count} boxes, {kind}, {len(nms(boxes, scores, IOU))} survive"
    return _compare(bench, case, implementations, expected, _single, allowed=0 if exact else 0.001)


def _all_pairs() -> Tensor:
    raise NotImplementedError("left out: it would hold all pairs at once")


def _decoding(bench: Bench, batch: int) -> list[Row]:
    """The best thousand anchors of each of five levels of 800 x 1344."""
    shapes = [(25, 42), (13, 21)] if bench.quick else [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    strides = [4, 8, 16, 32, 64][-len(shapes) :]
    rng = torch.Generator().manual_seed(0)
    scores, indices, deltas = [], [], []
    for height, width in shapes:
        anchors = 3 * height * width
        logits, chosen = torch.randn(batch, anchors, generator=rng).topk(min(1000, anchors))
        scores.append(logits)
        indices.append(chosen)
        deltas.append(torch.randn(batch, anchors, 4, generator=rng).mul(0.2))
    cells = torch.stack([torch.tensor([[-w, -h, w, h] for w, h in _halves(8.0 * s)]) for s in strides])
    sizes = torch.tensor([SIZE] * batch)
    device = bench.clock.device
    cells, sizes = bench.put(cells, sizes)
    scores, indices, deltas = ([x.to(device) for x in levels] for levels in (scores, indices, deltas))
    ours = partial(
        decode_proposals,
        scores,
        indices,
        deltas,
        cells,
        [width for _, width in shapes],
        [(stride, stride) for stride in strides],
        sizes,
        capacity=1000,
    )

    def differing(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str:
        if not torch.equal(expected[1], got[1]):
            return f"{int((expected[1] != got[1]).sum())} scores differ"
        error = float((expected[0] - got[0]).abs().max())
        # The exponential may differ by an ulp, in boxes of up to a few thousand pixels before they are cut.
        return "" if error <= 1e-2 else f"boxes are off by {error:.1e} pixels"

    case = f"{batch} x {len(shapes)} levels of at most 1000 anchors"
    implementations: dict[str, Any] = {"trimask": ours, "trimask, plain torch": plain_torch(ours)}
    return bench.compare("proposals", case, implementations, differing)


def _halves(side: float) -> list[tuple[float, float]]:
    """Half the width and height of anchors of one area and aspect ratios 1/2, 1 and 2."""
    return [(side / 2 * ratio**-0.5, side / 2 * ratio**0.5) for ratio in (0.5, 1.0, 2.0)]


def _compare(
    bench: Bench,
    case: str,
    implementations: dict[str, Any],
    expected: list[Tensor] | None,
    normal: Callable[[Any], list[Tensor]],
    allowed: float = 0,
) -> list[Row]:
    """Compare indices, brought to a list of them for each segment by `normal`."""

    def differing(expected: Any, got: Any, allowed: float = allowed) -> str:
        want, have = (x if isinstance(x, list) else normal(x) for x in (expected, got))
        wrong = 0
        for a, b in zip(want, have, strict=True):
            if allowed:  # a box more or less moves all after it
                wrong += len(set(a.tolist()) ^ set(b.tolist()))
            elif not torch.equal(a, b):
                wrong += max(1, len(set(a.tolist()) ^ set(b.tolist())))
        total = sum(map(len, want))
        return "" if wrong <= allowed * total else f"{wrong} of {total} boxes differ"

    near = partial(differing, allowed=0.01)
    return bench.compare("nms", case, implementations, differing, near=near, expected=expected)


def _single(output: Any) -> list[Tensor]:
    return [output.cpu()] if isinstance(output, Tensor) else _trimmed(output)


def _trimmed(output: tuple[Tensor, Tensor]) -> list[Tensor]:
    keep, found = output
    return [row[:n] for row, n in zip(keep.cpu(), found.tolist(), strict=True)]


def _exactly(boxes: Tensor, scores: Tensor) -> Tensor:
    return ops.nms(boxes, scores, IOU)


def _exactly_by_class(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    kept = []
    for label in range(CLASSES):
        of = ((labels == label) & (scores > SCORE)).nonzero()[:, 0]
        kept.append(of[ops.nms(boxes[of], scores[of], 0.5)])
    index = torch.cat(kept)
    return index[scores[index].argsort(descending=True, stable=True)[:KEPT]]
