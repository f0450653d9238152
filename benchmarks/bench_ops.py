"""The ops of `trimask.kernels` on a CPU against what they replace, on inputs of the size that COCO pictures give."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..kernels.cpu.masks import encode_runs
from ..kernels.paste_rule import PasteRule
from ..kernels.pasting import paste_masks
from ..kernels.rle import masks_to_rle
from ..kernels.roi_pooling import pyramid_roi_align
from ..kernels.suppression import nms, segmented_nms
from .harness import Row, compare, optional
from .inputs import SIZE, STRIDES, kinds_of_boxes, proposals, smooth_masks

__all__ = ["run"]

ops = optional("torchvision.ops")
roi_heads = optional("torchvision.models.detection.roi_heads")
coco = optional("pycocotools.mask")


def run(threads: int, quick: bool) -> Iterator[list[Row]]:
    """The rows of each case as soon as it is done; `quick` is small and shows that everything runs, no more."""
    yield _roi_align(threads, quick)
    for count in (150,) if quick else (100, 1000, 2000):
        for kind, boxes in kinds_of_boxes(count).items():
            for max_keep in sorted({count, 100}, reverse=True):
                yield _nms(kind, boxes, max_keep, threads, quick)
    yield _paste(threads, quick)
    yield _run_lengths(threads, quick)


def _roi_align(threads: int, quick: bool) -> list[Row]:
    rng = torch.Generator().manual_seed(0)
    height, width, channels, count = (160, 192, 16, 50) if quick else (800, 1344, 256, 1000)
    planar = [torch.randn(1, channels, height // s, width // s, generator=rng) for s in STRIDES]
    last = [feature.to(memory_format=torch.channels_last) for feature in planar]
    boxes = proposals(count, rng, count, 0.1, (height, width))
    # The bound that the tests hold float32 to, of float64.
    tolerance = torch.finfo(torch.float32).eps * width / STRIDES[0] * max(float(f.abs().max()) for f in planar)

    def trimask(features: list[Tensor]) -> Tensor:
        return pyramid_roi_align(features, boxes[None], STRIDES, 7, sampling_ratio=2, aligned=False)[0]

    def torchvision() -> Tensor:
        pool = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        return pool({str(level): feature for level, feature in enumerate(planar)}, [boxes], [(height, width)])

    def disagreement(expected: Tensor, got: Tensor) -> str:
        error = float((expected - got).abs().max())
        return "" if error <= tolerance else f"off by {error:.1e}, more than {tolerance:.1e}"

    implementations = {
        "torchvision": torchvision if ops else None,
        "trimask, NCHW": lambda: trimask(planar),
        "trimask, channels_last": lambda: trimask(last),
    }
    case = f"{count} RoIs x {channels} x 7 x 7, P2..P5 of {height} x {width}"
    return compare("roi_align", case, implementations, disagreement, rounds=7 if quick else 9, threads=threads)


def _nms(kind: str, boxes: Tensor, max_keep: int, threads: int, quick: bool) -> list[Row]:
    count = len(boxes)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1))

    def trimask() -> Tensor:
        if max_keep == count:
            return nms(boxes, scores, 0.7)
        keep, found = segmented_nms(boxes[None], scores[None], 0.7, max_keep)
        return keep[0, : found.item()]

    def disagreement(expected: Tensor, got: Tensor) -> str:
        return "" if torch.equal(expected, got) else f"other indices: {len(got)} kept instead of {len(expected)}"

    implementations = {
        "torchvision": (lambda: ops.nms(boxes, scores, 0.7)[:max_keep]) if ops else None,
        "trimask": trimask,
    }
    case = f"{count} {kind}, {len(nms(boxes, scores, 0.7))} survive, {'all' if max_keep == count else max_keep} kept"
    return compare("nms", case, implementations, disagreement, rounds=7 if quick else 31, threads=threads)


def _masks(quick: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Masks `[N, 28, 28]`, their boxes, and the picture's height and width."""
    count, size = (10, (80, 133)) if quick else (100, SIZE)
    return *smooth_masks(count, size), size


def torchvision_paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return roi_heads.paste_masks_in_image(masks[:, None], boxes, size)[:, 0] > 0.5


def _paste(threads: int, quick: bool) -> list[Row]:
    masks, boxes, size = _masks(quick)

    def disagreement(expected: Tensor, got: Tensor) -> str:
        worst = int((expected != got).sum((1, 2)).max())
        # A pixel whose value is the threshold, but for rounding, may go either way.
        return "" if worst <= 2 else f"{worst} pixels of a mask differ"

    implementations = {
        "torchvision": (lambda: torchvision_paste(masks, boxes, size)) if roi_heads else None,
        "trimask": lambda: paste_masks(masks, boxes, size, rule=PasteRule.TORCHVISION),
    }
    case = f"{len(masks)} masks to {size[0]} x {size[1]}"
    return compare("paste_masks", case, implementations, disagreement, rounds=7 if quick else 9, threads=threads)


def _run_lengths(threads: int, quick: bool) -> list[Row]:
    masks, boxes, size = _masks(quick)
    dense = paste_masks(masks, boxes, size, rule=PasteRule.TORCHVISION).byte().numpy()  # [N, H, W], rows first
    columns_first = np.asfortranarray(dense.transpose(1, 2, 0))  # [H, W, N], as pycocotools wants them

    def pycocotools() -> list[bytes]:
        return [coco.encode(np.asfortranarray(mask))["counts"] for mask in dense]

    def trimask() -> list[bytes]:
        runs, lengths = masks_to_rle(masks, boxes, size, rule=PasteRule.TORCHVISION, capacity=4096)
        return [encode_runs(row[:n]).encode() for row, n in zip(runs.numpy(), lengths.tolist(), strict=True)]

    def torchvision() -> list[bytes]:
        pasted = torchvision_paste(masks, boxes, size).permute(1, 2, 0).numpy()
        return [rle["counts"] for rle in coco.encode(pasted.astype("uint8", order="F"))]

    def disagreement(expected: list[bytes], got: list[bytes]) -> str:
        differing = sum(a != b for a, b in zip(expected, got, strict=True))
        return f"{differing} of {len(expected)} strings differ" if differing else ""

    implementations = {
        "pycocotools, dense masks": pycocotools if coco else None,
        "pycocotools, columns first": (lambda: [r["counts"] for r in coco.encode(columns_first)]) if coco else None,
        "torchvision": torchvision if coco and roi_heads else None,
        "trimask": trimask,
    }
    case = f"{len(masks)} masks of {size[0]} x {size[1]} to COCO strings; torchvision's by pycocotools"
    return compare("masks_to_rle", case, implementations, disagreement, rounds=7 if quick else 9, threads=threads)
