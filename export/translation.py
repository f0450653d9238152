"""The project's ops in standard ONNX operators, opset 18: the exporter raises that to the version wanted.

Equal to the ops in every bit that ONNX Runtime's kernels allow: its suppression compares IoUs in float32 and breaks
ties by index, its RoIAlign samples where torchvision's does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import opset18

from ..kernels.rounding import not_above
from . import graph  # noqa: F401  registers the ops, its own and the kernels'

__all__ = ["translations"]

op: Any = opset18  # whose own types are those of eager evaluation

FLOAT, INT32, INT64 = 1, 6, 7  # onnx.TensorProto's numbers


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The project's ops for ``torch.onnx.export(..., dynamo=True, custom_translation_table=translations())``.

    They are what `nms`, `batched_nms`, `segmented_nms`, `roi_align` and `pyramid_roi_align` of :mod:`trimask.kernels`
    become in a model of your own, and two of torch's that the exporter lacks. `segmented_nms` may keep no more than
    there are boxes. ONNX's suppression takes any two corners for a box, so boxes need x1 <= x2 and y1 <= y2;
    coordinates and scores must be finite.
    """
    return {
        torch.ops.aten.remainder.Scalar: _remainder,
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.trimask.segmented_nms.default: _segmented_nms,
        torch.ops.trimask.roi_align.default: _single_roi_align,
        torch.ops.trimask.flat_roi_align.default: _flat_roi_align,
        torch.ops.trimask.pyramid_roi_align.default: _pyramid_roi_align,
        torch.ops.trimask.pool_live.default: _pool_live,
    }


def _remainder(x: Any, divisor: Any) -> Any:
    """Of integers. The exporter's own takes no divisor that depends on the size of the picture."""
    return op.Mod(x, op.CastLike(divisor, x))


def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """Of small integers, along the last axis. Not every runtime leaves equal elements in order, so none are equal."""
    assert dim in (-1, len(x.shape) - 1)
    length = op.Shape(x, start=-1)
    place = op.Range(op.Constant(value_int=0), op.Squeeze(length), op.Constant(value_int=1))
    place = op.Sub(op.Sub(length, op.Constant(value_int=1)), place) if descending else place
    _, index = op.TopK(
        op.Add(op.Mul(op.Cast(x, to=INT64), length), place), length, axis=-1, largest=int(descending), sorted=1
    )
    return op.GatherElements(x, index, axis=-1), index


def _segmented_nms(
    boxes: Any,
    scores: Any,
    iou_threshold: float,
    max_keep: int,
    labels: Any = None,
    score_threshold: float | None = None,
    counts: Any = None,
) -> tuple[Any, Any]:
    # A number of boxes that is free comes as a value of the graph.
    most = (
        op.Constant(value_ints=[max_keep])
        if isinstance(max_keep, int)
        else op.Reshape(max_keep, op.Constant(value_ints=[1]))
    )
    rows = op.Gather(op.Shape(scores), op.Constant(value_int=1))
    boxes, scores = _as_float(boxes), _as_float(scores)
    nothing = op.Constant(value_float=-math.inf)
    if counts is not None:
        index = op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1))
        there = op.Less(index, op.Unsqueeze(op.Cast(counts, to=INT64), op.Constant(value_ints=[1])))  # [S, N]
        scores = op.Where(there, scores, nothing)
    by_class = op.Unsqueeze(scores, op.Constant(value_ints=[1]))  # [S, classes, N]
    if labels is not None:
        labels = _as_float(labels) if labels.dtype.is_floating_point() else op.Cast(labels, to=INT64)
        different, _, _, _ = op.Unique(labels)
        kinds = op.Unsqueeze(different, op.Constant(value_ints=[0, 2]))
        by_class = op.Where(op.Equal(op.Unsqueeze(labels, op.Constant(value_ints=[1])), kinds), by_class, nothing)
    selected = op.NonMaxSuppression(
        boxes,
        by_class,
        most,
        op.Constant(value_floats=[float(not_above(iou_threshold, np.float32))]),
        op.Constant(value_floats=[-math.inf if score_threshold is None else score_threshold]),
    )  # [n, 3]: segment, class, box
    place = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    values = op.GatherND(scores, place)
    kept = op.ScatterND(op.Expand(nothing, op.Shape(scores)), place, values)
    best, index = op.TopK(kept, most)
    there = op.Greater(best, nothing)
    count = op.ReduceSum(op.Cast(there, to=INT32), op.Constant(value_ints=[1]), keepdims=0)
    return op.Where(there, index, op.Constant(value_int=-1)), count


def _as_float(x: Any) -> Any:
    return x if x.dtype == FLOAT else op.Cast(x, to=FLOAT)


def _single_roi_align(
    input: Any,
    boxes: Any,
    images: Any,
    scale: float,
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Any:
    rois, images = _as_float(boxes), op.Cast(images, to=INT64)
    return op.CastLike(_roi_align(input, rois, images, scale, output_size, sampling_ratio, aligned, mode), input)


def _flat_roi_align(
    features: Sequence[Any],
    boxes: Any,
    images: Any,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Any:
    rule = (output_size, sampling_ratio, aligned, mode)
    if len(features) == 1:
        return _single_roi_align(features[0], boxes, images, scales[0], *rule)
    rois, images = _as_float(boxes), op.Cast(images, to=INT64)
    pooled = _from_own_level(features, rois, images, _levels(rois, thresholds), scales, *rule)
    return op.CastLike(pooled, features[0])


def _pool_live(
    features: Sequence[Any],
    boxes: Any,
    counts: Any,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Any, Any]:
    rois, images, level = _rois(boxes, counts, thresholds)
    parts, rows = [], []
    for i, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        row = op.Reshape(op.NonZero(op.Equal(level, op.Constant(value_int=i))), op.Constant(value_ints=[-1]))
        own = op.Gather(rois, row), op.Gather(images, row)
        parts.append(_roi_align(feature, *own, scale, output_size, sampling_ratio, aligned, "avg"))
        rows.append(row)
    return op.CastLike(op.Concat(*parts, axis=0), features[0]), op.Concat(*rows, axis=0)


def _pyramid_roi_align(
    features: Sequence[Any],
    boxes: Any,
    counts: Any,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Any:
    rois, images, level = _rois(boxes, counts, thresholds)
    pooled = _from_own_level(features, rois, images, level, scales, output_size, sampling_ratio, aligned, mode)
    shape = op.Concat(op.Shape(boxes, start=0, end=2), op.Shape(pooled, start=1, end=4), axis=0)
    return op.CastLike(op.Reshape(pooled, shape), features[0])


def _from_own_level(
    features: Sequence[Any],
    rois: Any,
    images: Any,
    level: Any,
    scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Any:
    """Every RoI from every level, empty where it does not belong: no shape depends on the data."""
    zero = op.Constant(value_float=0.0)
    parts = []
    for i, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        here = op.Equal(level, op.Constant(value_int=i))  # [B * R]
        own = op.Where(op.Unsqueeze(here, op.Constant(value_ints=[1])), rois, zero)
        part = _roi_align(feature, own, images, scale, output_size, sampling_ratio, aligned, mode)
        parts.append(op.Where(op.Unsqueeze(here, op.Constant(value_ints=[1, 2, 3])), part, zero))
    return op.Sum(*parts)


def _rois(boxes: Any, counts: Any, thresholds: Sequence[float]) -> tuple[Any, Any, Any]:
    """Boxes `[B * R, 4]`, the image of each, and its level, -1 for padding."""
    shape = op.Shape(boxes, start=0, end=2)
    first, step = op.Constant(value_int=0), op.Constant(value_int=1)
    number = op.Unsqueeze(op.Range(first, op.Gather(shape, first), step), op.Constant(value_ints=[1]))  # [B, 1]
    rois = op.Reshape(_as_float(boxes), op.Constant(value_ints=[-1, 4]))
    images = op.Reshape(op.Expand(number, shape), op.Constant(value_ints=[-1]))
    level = op.Mul(images, op.Constant(value_int=0))
    if len(thresholds) > 1:
        level = _levels(rois, thresholds)
    if counts is not None:
        index = op.Range(first, op.Gather(shape, step), step)
        there = op.Less(index, op.Unsqueeze(op.Cast(counts, to=INT64), op.Constant(value_ints=[1])))
        level = op.Where(op.Reshape(there, op.Constant(value_ints=[-1])), level, op.Constant(value_int=-1))
    return rois, images, level


def _levels(rois: Any, thresholds: Sequence[float]) -> Any:
    low, high = op.Split(rois, axis=1, num_outputs=2)
    sides = op.Max(op.Sub(high, low), op.Constant(value_float=0.0))
    root = op.Sqrt(op.ReduceProd(sides, op.Constant(value_ints=[1]), keepdims=1))  # [B * R, 1]
    above = op.GreaterOrEqual(root, op.Constant(value_floats=list(thresholds[1:])))
    return op.ReduceSum(op.Cast(above, to=INT64), op.Constant(value_ints=[1]), keepdims=0)


def _roi_align(
    feature: Any,
    rois: Any,
    images: Any,
    scale: float,
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Any:
    if mode != "avg":  # ONNX Runtime's own is another, and says so
        raise NotImplementedError(f'roi_align: expected mode "avg", which alone is exported, got {mode!r}')
    return op.RoiAlign(
        op.Cast(feature, to=FLOAT),  # half precision would round the coordinates too
        rois,
        images,
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        mode=mode,
        output_height=output_size[0],
        output_width=output_size[1],
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=scale,
    )
