"""The cases that `compiled` compiles: each op as the model, and those who borrow it, call it."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import (
    PasteRule,
    mask_probabilities,
    masks_to_rle,
    paste_masks,
    preprocess,
    proposals,
    pyramid_roi_align,
    roi_align,
    roi_pool,
    segmented_nms,
)
from ..kernels.epilogue import add_bias, pool_bias_relu
from ..kernels.roi_pooling import level_thresholds
from ..kernels.sampling import Sampling
from .inputs import STRIDES

__all__ = ["CASES"]

Case = Callable[[], object]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MODES = {"2 samples": (2, "avg"), "adaptive": (0, "avg"), "max of 2": (2, "max")}
ROWS = 16


def _pyramid(dtype: torch.dtype, planar: bool = False) -> list[Tensor]:
    layout = torch.contiguous_format if planar else torch.channels_last
    return [torch.zeros(2, 256, 128 // s, 160 // s, dtype=dtype).to(memory_format=layout) for s in STRIDES]


def _pooled(dtype: torch.dtype, ratio: int, mode: str, planar: bool = False) -> Case:
    return lambda: pyramid_roi_align(
        _pyramid(dtype, planar),
        torch.zeros(2, ROWS, 4),
        STRIDES,
        7,
        sampling_ratio=ratio,
        aligned=ratio == 0,
        mode=mode,
        counts=torch.ones(2, dtype=torch.int64),
    )


def _separable(dtype: torch.dtype, ratio: int, size: int) -> Case:
    """By its launcher, for the op takes this form on Hopper alone."""

    def run() -> None:
        from ..kernels.gpu.roi_align_separable import separable_roi_align

        scales = [1 / stride for stride in STRIDES]
        sampling = Sampling(scales, level_thresholds(STRIDES), (size, size), ratio, ratio == 0, "avg")
        out = torch.zeros(2 * ROWS, size, size, 256, dtype=dtype)
        counts = torch.ones(2, dtype=torch.int64)
        separable_roi_align(_pyramid(dtype), torch.zeros(2, ROWS, 4), counts, sampling, out)

    return run


def _pooled_backward(
    dtype: torch.dtype, ratio: int, mode: str, deterministic: bool = False, levels: int = len(STRIDES)
) -> Case:
    def run() -> None:
        features, strides = _pyramid(dtype)[:levels], STRIDES[:levels]
        grad = torch.zeros(2 * ROWS, 7, 7, 256, dtype=dtype).permute(0, 3, 1, 2)
        torch.use_deterministic_algorithms(deterministic)
        try:
            torch.ops.trimask.roi_align_backward(
                grad,
                features if mode == "max" else [],
                torch.zeros(2, ROWS, 4),
                None,
                [side for feature in features for side in feature.shape],
                [1 / stride for stride in strides],
                level_thresholds(strides),
                ratio,
                ratio == 0,
                mode,
                torch.ones(2, dtype=torch.int64),
            )
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def _single(op: Callable[..., Tensor], **rule: int) -> Case:
    """A drop-in on planar features."""
    return lambda: op(torch.zeros(1, 256, 32, 48), [torch.zeros(8, 4)], 7, 0.25, **rule)


def _roi_pool_backward() -> object:
    shape = (8, 256, 7, 7)
    return torch.ops.trimask.roi_pool_backward(
        torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), [1, 256, 32, 48]
    )


def _nms(n: int, max_keep: int, dtype: torch.dtype = torch.float32, labels: torch.dtype | None = None) -> Case:
    return lambda: segmented_nms(
        torch.zeros(2, n, 4, dtype=dtype),
        torch.zeros(2, n),
        0.5,
        max_keep,
        labels=None if labels is None else torch.zeros(2, n, dtype=labels),
        score_threshold=None if labels is None else 0.05,
    )


def _masks(op: Callable[..., object], dtype: torch.dtype = torch.float32, **options: object) -> Case:
    return lambda: op(torch.zeros(4, 28, 28, dtype=dtype), torch.zeros(4, 4), (80, 133), **options)


def _proposals(dtype: torch.dtype) -> Case:
    return lambda: proposals(
        [torch.zeros(2, 16)] * 5,
        [torch.zeros(2, 16, dtype=torch.int64)] * 5,
        [torch.zeros(2, 64, 4, dtype=dtype)] * 5,
        torch.zeros(5, 3, 4),
        [16, 8, 4, 2, 1],
        [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)],
        torch.full((2, 2), 64),
        capacity=16,
    )


def _preprocess(antialias: bool, quantize: bool, dtype: torch.dtype) -> Case:
    picture = torch.zeros(48, 64, 3, dtype=torch.uint8)
    options = {"antialias": antialias, "quantize": quantize, "mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0)}
    return lambda: preprocess([picture] * 2, [(30, 40)] * 2, (32, 64), dtype=dtype, **options)


_TORCHVISION, _DETECTRON2 = PasteRule.TORCHVISION, PasteRule.DETECTRON2


def _level(size: tuple[int, int] = (32, 40)) -> Tensor:
    return torch.zeros(2, 64, *size, dtype=torch.float16).to(memory_format=torch.channels_last)


def _epilogue(residual: tuple[int, int] | None) -> Case:
    bias = torch.zeros(64, dtype=torch.float16)
    return lambda: add_bias(_level(), bias, None if residual is None else _level(residual), relu=True)


CASES: dict[str, Case] = {
    **{f"RoIAlign, {d}, {m}": _pooled(DTYPES[d], *MODES[m]) for d in DTYPES for m in MODES},
    **{f"RoIAlign, {d}, 2 samples, NCHW": _pooled(DTYPES[d], 2, "avg", planar=True) for d in ("fp16", "fp32")},
    "RoIAlign, separable, fp16, 7 x 7, adaptive": _separable(torch.float16, 0, 7),
    "RoIAlign, separable, bf16, 14 x 14, 2 samples": _separable(torch.bfloat16, 2, 14),
    "RoIAlign drop-in, fp32": _single(roi_align, sampling_ratio=2),
    **{f"RoIAlign backward, {d}, {m}": _pooled_backward(DTYPES[d], *MODES[m]) for d in DTYPES for m in MODES},
    **{
        f"RoIAlign backward, fp32, {m}, deterministic": _pooled_backward(torch.float32, *MODES[m], deterministic=True)
        for m in MODES
    },
    "RoIAlign backward, fp32, max of 2, one level": _pooled_backward(torch.float32, *MODES["max of 2"], levels=1),
    "RoIPool, fp32": _single(roi_pool),
    "RoIPool backward, fp32": _roi_pool_backward,
    "NMS of proposals": _nms(2000, 1000),
    "NMS of detections, int64 labels": _nms(5000, 100, labels=torch.int64),
    "NMS, int32 labels": _nms(2000, 1000, labels=torch.int32),
    "NMS in chunks": _nms(9000, 9000),
    "NMS, fp64": _nms(9000, 9000, dtype=torch.float64),
    "Paste, torchvision's rule": _masks(paste_masks, rule=_TORCHVISION),
    "Paste, Detectron2's rule": _masks(paste_masks, rule=_DETECTRON2),
    "Paste, bits": _masks(paste_masks, rule=_TORCHVISION, packed=True),
    "Paste, fp64": _masks(paste_masks, torch.float64, rule=_TORCHVISION),
    "Run lengths": _masks(masks_to_rle, rule=_TORCHVISION, capacity=256),
    "Run lengths, fp64": _masks(masks_to_rle, torch.float64, rule=_DETECTRON2, capacity=256),
    "Probabilities of a class, fp16": lambda: mask_probabilities(
        torch.zeros(4, 80, 28, 28, dtype=torch.float16), torch.zeros(4, dtype=torch.int64)
    ),
    "Proposals, fp16": _proposals(torch.float16),
    "Proposals, fp32": _proposals(torch.float32),
    "Bias, fp16": _epilogue(None),
    "Bias and residual, fp16": _epilogue((32, 40)),
    "Bias and coarser map, fp16": _epilogue((16, 20)),
    "Bias, rectifier and pooling, fp16": lambda: pool_bias_relu(_level(), torch.zeros(64, dtype=torch.float16)),
    "Preprocess, bilinear on floats": _preprocess(False, False, torch.float32),
    "Preprocess, as OpenCV": _preprocess(False, True, torch.float32),
    "Preprocess, as PIL": _preprocess(True, True, torch.float16),
    "Preprocess, antialiased on floats": _preprocess(True, False, torch.float32),
}
