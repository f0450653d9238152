"""A model repository for NVIDIA's Triton Inference Server, whose ONNX Runtime backend serves exported files.

::

    REPOSITORY/NAME/config.pbtxt    inputs, outputs, batching
    REPOSITORY/NAME/labels.txt      class names, a line each: line 0 is label 0
    REPOSITORY/NAME/1/model.onnx    version 1
"""

import json
from pathlib import Path

from ..engine.model.files import write_whole
from .metadata import BOOL, FLOAT, INT64, UINT8, Metadata, Signature, signature

__all__ = ["model_path", "write_config"]

_TYPES = {FLOAT: "TYPE_FP32", UINT8: "TYPE_UINT8", INT64: "TYPE_INT64", BOOL: "TYPE_BOOL"}
_BATCH = 8  # the most that the server puts together
_DELAY = 2000  # microseconds that it waits for more


def model_path(repository: Path, name: str) -> Path:
    """Where the model's file belongs."""
    return repository / name / "1" / "model.onnx"


def write_config(repository: Path, name: str, about: Metadata) -> Path:
    """Write what the server wants beside the model's file; requests for pictures of one size are batched.

    Returns:
        The path of ``config.pbtxt``.
    """
    (repository / name).mkdir(parents=True, exist_ok=True)
    names = "".join(f"{' '.join(label.split())}\n" for label in about.config.class_names).encode()
    write_whole(repository / name / "labels.txt", lambda file: file.write(names))
    text = config_text(name, about).encode()
    return write_whole(repository / name / "config.pbtxt", lambda file: file.write(text))


def config_text(name: str, about: Metadata) -> str:
    """``config.pbtxt``: protobuf's text format of the server's ``ModelConfig``."""
    # Full masks are as large as the largest picture of their batch, which may be a stranger's.
    batched = about.static is None and not about.preprocess and about.masks != "full"
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {_BATCH if batched else 0}",
    ]
    for kind, values in zip(("input", "output"), signature(about), strict=True):
        lines += _described(kind, values, batched)
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_DELAY} }}")
    return "\n".join(lines) + "\n"


def _described(kind: str, values: Signature, batched: bool) -> list[str]:
    lines = []
    for name, (number, sizes) in values.items():
        dims = [-1 if size is None else size for size in (sizes[1:] if batched else sizes)]
        shape = f"dims: {dims}" if dims else "dims: [1], reshape: { shape: [] }"  # the server has no scalars
        lines.append(f'{kind} {{ name: "{name}", data_type: {_TYPES[number]}, {shape} }}')
    return lines
