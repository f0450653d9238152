"""What may stand before and behind the network in the same file: resizing a picture, and pasting masks into it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..engine.model.config import InputConfig, ResizeConfig
from ..kernels.paste_rule import PasteRule

__all__ = ["add_pasting", "add_preprocessing"]


class _Operators:
    """``op.Add(x, 1.0)`` makes a node; numbers and arrays become constants."""

    def __init__(self) -> None:
        self.tape = Tape()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def make(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            values = [self._value(x) for x in inputs]
            if outputs > 1:
                return self.tape.op_multi_out(name, values, attributes, num_outputs=outputs)
            return self.tape.op(name, values, attributes)

        return make

    def _value(self, x: Any) -> ir.Value | None:
        if x is None or isinstance(x, ir.Value):
            return x
        return self.tape.op("Constant", [], {"value": ir.tensor(np.asarray(x))})


def _integers(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def add_preprocessing(model: ir.Model, config: InputConfig) -> None:
    """Give a model of a dynamic size one input instead of three: ``picture``, uint8 [H, W, 3]."""
    op = _Operators()
    picture = _value("picture", ir.DataType.UINT8, ["picture_height", "picture_width", 3])
    size = op.Slice(op.Shape(picture), _integers(0), _integers(2))  # [2]
    new = _resized_size(op, size, config.resize)
    x = op.Cast(op.Unsqueeze(op.Transpose(picture, perm=[2, 0, 1]), _integers(0)), to=ir.DataType.FLOAT)
    x = _resize(op, x, size, new, config.resize)
    padding = op.Mod(op.Neg(new), np.int64(config.size_divisible))
    x = op.Pad(x, op.Concat(_integers(0, 0, 0, 0, 0, 0), padding, axis=0), np.float32(0))
    made = x, op.Unsqueeze(new, _integers(0)), op.Unsqueeze(size, _integers(0))
    graph = model.graph
    graph.insert_before(graph[0], op.tape.nodes)
    for old, value in zip(list(graph.inputs), made, strict=True):
        for node, index in list(old.uses()):
            node.replace_input_with(index, value)
        value.type, value.shape = old.type, old.shape
    graph.inputs.clear()
    graph.inputs.append(picture)
    for output in graph.outputs:
        assert output.shape is not None
        output.shape = ir.Shape([1, *output.shape[1:]])


def _resized_size(op: Any, size: ir.Value, config: ResizeConfig) -> ir.Value:
    """:func:`..engine.pictures.resize.resized_size`, in float64 as there."""
    sides = op.Cast(size, to=ir.DataType.DOUBLE)
    short = op.ReduceMin(sides, keepdims=1)
    shortest, longest = np.float64(config.min_size), np.float64(config.max_size)
    if config.limit_second:
        sides = op.Where(op.Equal(sides, short), shortest, op.Mul(op.Div(shortest, short), sides))
        most = op.ReduceMax(sides, keepdims=1)
        sides = op.Where(op.Greater(most, longest), op.Mul(sides, op.Div(longest, most)), sides)
    else:
        sides = op.Mul(sides, op.Min(op.Div(shortest, short), op.Div(longest, op.ReduceMax(sides, keepdims=1))))
    if config.round_half_up:
        sides = op.Add(sides, np.float64(0.5))
    return op.Max(op.Cast(op.Floor(sides), to=ir.DataType.INT64), np.int64(1))


def _resize(op: Any, x: ir.Value, size: ir.Value, new: ir.Value, config: ResizeConfig) -> ir.Value:
    """A picture [1, 3, h, w] of levels 0..255, to the new size; see :mod:`..kernels.resizing`."""

    def scaled(x: ir.Value, to: ir.Value) -> ir.Value:
        shape = op.Concat(_integers(1, 3), to, axis=0)
        return op.Resize(
            x,
            None,
            None,
            shape,
            mode="linear",
            coordinate_transformation_mode="half_pixel",
            antialias=int(config.antialias),
            # What of a filter is beyond the edge does not count: as torch, Pillow
            exclude_outside=int(config.antialias),
        )

    if not config.quantize:
        return scaled(x, new)
    if not config.antialias:
        return _resize_as_opencv(op, x, size, new)
    # Pillow rounds after each axis, halves up.
    height, width = op.Split(new, axis=0, num_outputs=2, outputs=2)
    for to in (op.Concat(op.Slice(size, _integers(0), _integers(1)), width, axis=0), op.Concat(height, width, axis=0)):
        x = op.Clip(op.Floor(op.Add(scaled(x, to), np.float32(0.5))), np.float32(0), np.float32(255))
    return x


def _resize_as_opencv(op: Any, x: ir.Value, size: ir.Value, new: ir.Value) -> ir.Value:
    """:mod:`..kernels.cpu.opencv`, with division for its shifts."""
    left, right, u0, u1 = _opencv_taps(op, size, new, 1)
    top, bottom, v0, v1 = _opencv_taps(op, size, new, 0)
    levels = op.Cast(x, to=ir.DataType.INT32)
    across = op.Add(op.Mul(op.Gather(levels, left, axis=3), u0), op.Mul(op.Gather(levels, right, axis=3), u1))
    across = op.Div(across, np.int32(1 << 4))
    above, below = (
        op.Mul(op.Gather(across, i, axis=2), op.Unsqueeze(v, _integers(1))) for i, v in ((top, v0), (bottom, v1))
    )
    above, below = (op.Div(x, np.int32(1 << 16)) for x in (above, below))
    return op.Cast(op.Div(op.Add(op.Add(above, below), np.int32(2)), np.int32(1 << 2)), to=ir.DataType.FLOAT)


def _opencv_taps(op: Any, size: ir.Value, new: ir.Value, axis: int) -> tuple[ir.Value, ...]:
    """Two pixels, int64, and two weights, int32, of each output of an axis."""
    before, after = (op.Gather(x, np.int64(axis)) for x in (size, new))
    last = op.Sub(before, np.int64(1))
    zoom = op.Div(*(op.Cast(x, to=ir.DataType.DOUBLE) for x in (after, before)))
    middle = op.Add(op.Cast(op.Range(np.int64(0), after, np.int64(1)), to=ir.DataType.DOUBLE), np.float64(0.5))
    at = op.Sub(op.Mul(middle, op.Div(np.float64(1), zoom)), np.float64(0.5))
    at = op.Cast(at, to=ir.DataType.FLOAT)
    if axis == 1:
        at = op.Clip(at, np.float32(0), op.Cast(last, to=ir.DataType.FLOAT))
    low = op.Floor(at)
    second = op.Sub(at, low)
    weights = (op.Round(op.Mul(x, np.float32(2048))) for x in (op.Sub(np.float32(1), second), second))
    pixel = op.Cast(low, to=ir.DataType.INT64)
    pixels = (op.Clip(x, np.int64(0), last) for x in (pixel, op.Add(pixel, np.int64(1))))
    return *pixels, *(op.Cast(x, to=ir.DataType.INT32) for x in weights)


def add_pasting(model: ir.Model, rule: PasteRule) -> None:
    """Turn the output ``masks`` [B, D, m, m] into bool [B, D, H, W], the size of the largest original picture.

    Bilinear resampling as two products of matrices, ``Ay @ mask @ Ax^T``; :mod:`..kernels.cpu.masks` has the same
    arithmetic in the same order. Only what has been found is pasted.
    """
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    boxes, labels, masks, originals = (values[name] for name in ("boxes", "labels", "masks", "original_sizes"))
    cells = masks.shape[-1]  # type: ignore[index]
    assert isinstance(cells, int)
    op = _Operators()
    rows = op.Transpose(op.NonZero(op.Reshape(op.GreaterOrEqual(labels, np.int64(0)), _integers(-1))), perm=[1, 0])
    picture = op.Div(rows, op.Shape(labels, start=1, end=2))  # [n, 1]
    sizes = op.Cast(op.GatherND(originals, picture), to=ir.DataType.FLOAT)  # [n, 2]
    corners = op.GatherND(op.Reshape(boxes, _integers(-1, 4)), rows)  # [n, 4]
    small = op.GatherND(op.Reshape(masks, _integers(-1, cells, cells)), rows)  # [n, m, m]

    low, high = op.Split(corners, axis=1, num_outputs=2, outputs=2)
    if rule.padding:
        half = np.float32(0.5)
        grown = np.float32((cells + 2 * rule.padding) / cells)
        centre, extent = op.Mul(op.Add(low, high), half), op.Mul(op.Mul(op.Sub(high, low), half), grown)
        low, high = op.Sub(centre, extent), op.Add(centre, extent)
    if rule.integer_boxes:  # towards zero, both ends included
        low, high = (op.Cast(op.Cast(x, to=ir.DataType.INT64), to=ir.DataType.FLOAT) for x in (low, high))
        high = op.Add(high, np.float32(1))
    extent = op.Sub(high, low)  # [n, 2], x before y

    largest = op.ReduceMax(originals, _integers(0), keepdims=0)  # [2]

    def weights(axis: int) -> ir.Value:
        """What each pixel of the picture takes from each cell: [n, pixels, m]."""
        pixels = op.Range(np.int64(0), op.Gather(largest, np.int64(axis)), np.int64(1))
        pixels = op.Cast(pixels, to=ir.DataType.FLOAT)
        origin, length = (op.Gather(x, _integers(1 - axis), axis=1) for x in (low, extent))  # [n, 1]
        at = op.Div(op.Sub(op.Add(pixels, np.float32(0.5)), origin), length)
        at = op.Sub(op.Mul(at, np.float32(cells + 2 * rule.padding)), np.float32(0.5 + rule.padding))  # [n, pixels]
        away = op.Abs(op.Sub(op.Unsqueeze(at, _integers(2)), np.arange(cells, dtype=np.float32)))
        taken = op.Max(op.Sub(np.float32(1), away), np.float32(0))
        inside = op.Less(pixels, op.Gather(sizes, _integers(axis), axis=1))  # [n, pixels]
        return op.Mul(taken, op.Unsqueeze(op.Cast(inside, to=ir.DataType.FLOAT), _integers(2)))

    columns = op.MatMul(small, op.Transpose(weights(1), perm=[0, 2, 1]))  # [n, m, W]
    compare = op.GreaterOrEqual if rule.inclusive else op.Greater
    pasted = compare(op.MatMul(weights(0), columns), np.float32(rule.threshold))  # [n, H, W]

    count = op.Reshape(op.ReduceProd(op.Shape(labels), keepdims=1), _integers(1))
    nothing = op.Expand(np.array(False), op.Concat(count, largest, axis=0))
    whole = op.Reshape(
        op.ScatterND(nothing, rows, pasted), op.Concat(op.Shape(labels), largest, axis=0)
    )  # [B, D, H, W]
    graph.extend(op.tape.nodes)
    masks.name = "mask_probabilities"
    whole.name, whole.type = "masks", ir.TensorType(ir.DataType.BOOL)
    whole.shape = ir.Shape([*labels.shape, "picture_height", "picture_width"])  # type: ignore[misc]
    graph.outputs[list(graph.outputs).index(masks)] = whole


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
