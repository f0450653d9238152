"""Export to ONNX: one file of standard operators, with everything that is needed to run it."""

import logging
import operator
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from .. import __version__
from ..engine.inference.predicting import limits
from ..engine.model.checkpoints import load_model, locate
from ..engine.model.checkpoints.downloading import file_hash
from ..engine.model.config import DetectionConfig, MaskRCNNConfig
from ..engine.model.files import check_writable, write_whole
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.pictures.reading import listed
from ..kernels.cpu.decoding import proposals
from .graph import ExportGraph
from .metadata import KEY, MASKS, Metadata, contract_text, multiple_of, signature

try:
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import (
        ClearMetadataAndDocStringPass,
        NameFixPass,
        RemoveUnusedOpsetsPass,
        TopologicalSortPass,
    )
    from onnxscript.version_converter import convert_version

    from .stages import add_pasting, add_preprocessing
    from .translation import translations
except ImportError as missing:
    raise ImportError(f"export needs onnx and onnxscript ({missing}): pip install onnx onnxscript") from None

__all__ = ["OPSETS", "Exported", "finish", "network", "to_onnx"]

# RoIAlign knows half pixels from 16 on and the exporter starts at 18; ONNX Runtime has no RoIAlign(22) for CPUs.
OPSETS = (18, 19, 20, 21)

# Where sizes are free, the pictures that the exporter traces have this one; nothing of it is left in the file.
_TRACED = (2, 128, 160)
_SHORTEST, _LONGEST = 96, 2688  # pixels that a side may have where it is free
_BATCH = 64


@dataclass(frozen=True)
class Exported:
    """What came out.

    Attributes:
        path: the file.
        about: its metadata.
        opset: of its operators.
        operators: how many there are of each.
        megabytes: size of the file, in 10^6 bytes.
        seconds: that it took.
    """

    path: Path
    about: Metadata
    opset: int
    operators: dict[str, int]
    megabytes: float
    seconds: float

    @property
    def nodes(self) -> int:
        return sum(self.operators.values())


def to_onnx(
    weights: MaskRCNN | str | Path,
    path: str | Path,
    *,
    opset: int = 20,
    masks: str = "roi",
    preprocess: bool = False,
    static: Sequence[int] | None = None,
    half: bool = False,
    int8: Any = None,
    score: float | None = None,
    nms: float | None = None,
    max_detections: int | None = None,
    **options: Any,
) -> Exported:
    """Write a model as an ONNX file; ``docs/export.md`` says what goes in and comes out.

    Args:
        weights: a model, or what :func:`trimask.load` takes.
        path: the ``.onnx`` file; one of that name is replaced, whole or not at all.
        opset: version of the operators, one of :data:`OPSETS`.
        masks: ``"roi"``: probabilities over each box; ``"full"``: pixels in the original pictures; ``"none"``.
        preprocess: take one picture, uint8 [H, W, 3] of any size, and resize and pad it in the graph.
        static: (batch, height, width) to fix, the last two multiples of 32 (any, without a feature pyramid): no shape
            but those inside of suppression depends on the data, as TensorRT likes it.
        half: weights and features in float16; boxes, scores and RoIAlign stay in float32.
        int8: pictures, in any form that :meth:`Predictor.predict` takes, on which to measure the ranges of activations:
            convolutions and linear layers of trunk, pyramid and heads then compute in 8 bits.
        score, nms, max_detections: other thresholds and another capacity than the model's own. A
            :class:`Runtime` can raise the score and lower the capacity again, not the reverse.
        **options: what the keys of a foreign checkpoint cannot say, as in :func:`trimask.load`.

    Raises:
        ValueError: options that are out of range or do not go together.
        ImportError: onnx or onnxscript is missing.
    """
    start = time.perf_counter()
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path: expected a .onnx file, got {path}")
    if opset not in OPSETS:
        raise ValueError(f"opset: expected one of {OPSETS}, got {opset}")
    if masks not in MASKS:
        raise ValueError(f"masks: expected one of {MASKS}, got {masks!r}")
    if static is not None and (preprocess or masks == "full"):
        raise ValueError("static: expected neither preprocess nor full masks, whose sizes are those of pictures")
    if half and int8 is not None:
        raise ValueError("half, int8: expected one of them at most")
    if isinstance(int8, (str, Path, Sequence)):  # what is no generator is looked at before the work
        int8 = listed(int8)
    check_writable(path)
    model, source = _open(weights, options)
    config = replace(model.config, detection=_limits(model.config, score, nms, max_detections))
    about = Metadata(
        config=config,
        masks="none" if model.mask_head is None else masks,
        preprocess=preprocess,
        static=None if static is None else _checked_size(static, multiple_of(config)),
        precision="float16" if half else "float32" if int8 is None else "int8",
        version=__version__,
        source=source,
    )
    core = network(model, about)
    if int8 is not None:
        from .quantization import quantize

        core = quantize(core, about.config.input, int8, about.static)
    exported = finish(core, about, opset)
    data = exported.SerializeToString()
    write_whole(path, lambda file: file.write(data))
    operators = Counter(node.op_type for node in exported.graph.node)
    return Exported(path, about, opset, dict(operators), len(data) / 1e6, time.perf_counter() - start)


def finish(core: "ir.Model", about: Metadata, opset: int) -> "onnx.ModelProto":
    """The network with what the metadata says to stand before and behind it, in the opset wanted, checked.

    Args:
        core: what :func:`network` gives; it is changed.
    """
    if about.masks == "full":
        add_pasting(core, about.config.paste)
    if about.preprocess:
        add_preprocessing(core, about.config.input)
    TopologicalSortPass()(core)
    convert_version(core, opset)
    ClearMetadataAndDocStringPass()(core)  # the exporter notes lines of source code and paths of this machine
    NameFixPass()(core)
    RemoveUnusedOpsetsPass()(core)  # the quantiser leaves one
    core.metadata_props.clear()
    core.metadata_props[KEY] = about.to_json()
    core.doc_string = contract_text(about)
    core.producer_name, core.producer_version = "trimask", about.version
    proto = ir.to_proto(core)
    proto.graph.name = "mask_rcnn"
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)  # for the oldest runtimes that can
    onnx.checker.check_model(proto, full_check=True)
    return proto


def network(model: MaskRCNN, about: Metadata) -> "ir.Model":
    """The network alone, from a resized batch to masks over the boxes, in the oldest opset."""
    dtype = torch.float16 if about.precision == "float16" else torch.float32
    fixed = about.static is not None
    graph = ExportGraph(model, about.config.detection, dtype, masks=about.masks != "none", compact=not fixed)
    inputs, outputs = signature(replace(about, preprocess=False))
    batch, height, width = about.static or _TRACED
    image = torch.zeros(batch, 3, height, width)
    sizes = torch.tensor([[height, width]]).repeat(batch, 1)
    shapes = None if fixed else _free_sizes(multiple_of(about.config))
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            graph,
            (image, sizes, sizes * 2),
            dynamic_shapes=shapes,
            strict=False,
            # Until then a pooling asked whether its size is odd, of which nothing depends, and refused any other.
            prefer_deferred_runtime_asserts_over_guards=torch.__version__ < "2.13",
        )
        program = program.run_decompositions({torch.ops.trimask.proposals.default: proposals})
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSETS[0],
            custom_translation_table=translations(),
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert exported is not None
    if not fixed:
        _name_sizes(exported.model)
    return exported.model


def _free_sizes(multiple: int) -> dict[str, dict[int, Any]]:
    batch = Dim("batch", max=_BATCH)
    least, most = _SHORTEST // multiple, _LONGEST // multiple
    sides = {2: multiple * Dim("rows", min=least, max=most), 3: multiple * Dim("columns", min=least, max=most)}
    return {"image": {0: batch, **sides}, "image_sizes": {0: batch}, "original_sizes": {0: batch}}


def _name_sizes(model: "ir.Model") -> None:
    """Give the free sizes of the inputs names that say what they are, wherever they stand."""
    image = model.graph.inputs[0].shape
    assert image is not None
    names = {str(image[0]): "batch", str(image[2]): "height", str(image[3]): "width"}
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(side), side) for side in value.shape])


def _checked_size(static: Sequence[int], multiple: int) -> tuple[int, int, int]:
    numbers = list(map(operator.index, static))
    if len(numbers) != 3 or min(numbers) < 1 or numbers[1] % multiple or numbers[2] % multiple:
        raise ValueError(
            f"static: expected a batch, and a height and width that are multiples of {multiple}, got {static}"
        )
    return numbers[0], numbers[1], numbers[2]


def _open(weights: MaskRCNN | str | Path, options: dict[str, Any]) -> tuple[MaskRCNN, dict[str, str]]:
    """A model, and where its weights come from."""
    if isinstance(weights, MaskRCNN):
        if options:
            raise ValueError(f"options: expected none beside a model, got {sorted(options)}")
        return weights, {}
    if not isinstance(weights, (str, Path)):
        raise ValueError(
            f"weights: expected a MaskRCNN, a file or a name, got {type(weights).__name__}; a Predictor has folded its "
            "weights: give what it was loaded from, and the same options"
        )
    file = locate(weights)
    return load_model(file, **options), {"file": file.name, "sha256": file_hash(file, "sha256")}


def _limits(
    config: MaskRCNNConfig, score: float | None, nms: float | None, max_detections: int | None
) -> DetectionConfig:
    detection = limits(config, score, max_detections)
    if nms is None:
        return detection
    if not 0 <= nms <= 1:
        raise ValueError(f"nms: expected a number in 0..1, got {nms}")
    return replace(detection, nms_threshold=float(nms))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own working."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
