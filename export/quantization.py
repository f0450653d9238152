"""8-bit integers: ranges of activations measured on pictures, then convolutions and linear layers of trunk, pyramid
and heads between QuantizeLinear and DequantizeLinear, which runtimes fuse into integer arithmetic.

What decides scores and boxes directly, the predictors, stays in float32, as does all that is done to boxes.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ..engine.model.config import InputConfig
from ..engine.pictures.host import make_batch
from ..engine.pictures.reading import expand, read

__all__ = ["quantize"]

PREDICTORS = ("rpn.objectness", "rpn.deltas", "classes.weight", "deltas.weight", "mask_head.logits")


def quantize(
    core: ir.Model, config: InputConfig, pictures: Any, static: tuple[int, int, int] | None = None
) -> ir.Model:
    """The network with quantised layers.

    Args:
        core: what :func:`..onnx.network` gives.
        config: how pictures are resized.
        pictures: to calibrate on, in any form that ``expand`` takes; some tens of the kind that the model is for.
        static: the fixed batch, height and width of the network, if it has them.

    Raises:
        ValueError: no picture.
        ImportError: ONNX Runtime is not installed.
    """
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ImportError(f"int8 needs onnxruntime ({error}): pip install onnxruntime") from None
    sources = list(expand(pictures))
    if not sources:
        raise ValueError("int8: expected pictures to calibrate on, got none")
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "done"))
        ir.save(core, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        with np.errstate(invalid="ignore"):  # ranges of what is not quantised may be infinite
            quantize_static(
                prepared,
                done,
                _Reader(sources, config, static),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=list(_layers(onnx.load(prepared).graph)),
            )
        return ir.from_proto(onnx.load(done))


class _Reader:
    """Pictures as the calibration asks for them."""

    def __init__(self, sources: Iterable[Any], config: InputConfig, static: tuple[int, int, int] | None) -> None:
        self._batches = self._all(sources, config, static)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)

    @staticmethod
    def _all(
        sources: Iterable[Any], config: InputConfig, static: tuple[int, int, int] | None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        for source in sources:
            pictures = [read(source).array] * (1 if static is None else static[0])
            batch = make_batch(pictures, config, static and static[1:])
            yield dict(zip(("image", "image_sizes", "original_sizes"), batch, strict=True))


def _layers(graph: onnx.GraphProto) -> Iterator[str]:
    """Nodes to quantise: layers, and the sums and pools between them, so that 8 bits go from one to the next."""
    makers = {output: node for node in graph.node for output in node.output}

    def inside(name: str) -> bool:
        return name in makers and makers[name].op_type in ("Conv", "Relu", "Clip", "MaxPool", "Resize", "Add")

    for node in graph.node:
        layer = node.op_type in ("Conv", "ConvTranspose", "Gemm")
        if layer and any(part in name for part in PREDICTORS for name in node.input):
            continue
        summed = node.op_type == "Add" and all(map(inside, node.input))
        moved = node.op_type in ("MaxPool", "Resize") and inside(node.input[0])
        if layer or summed or moved:
            yield node.name
