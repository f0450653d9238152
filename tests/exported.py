"""Exported files of the tests: each costs seconds, so what differs in its ends alone is made of the same network."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from models import SMALL, small_model
from trimask.engine.model.config import MaskRCNNConfig
from trimask.engine.model.files import write_whole
from trimask.export.metadata import Metadata
from trimask.export.onnx import finish, network
from trimask.kernels import PasteRule

__all__ = ["CONFIG", "write"]

# Masks are pasted at the box's own coordinates: to whole pixels, a rounding may move one by a row.
CONFIG = replace(SMALL, paste=replace(PasteRule.TORCHVISION, integer_boxes=False))


@cache
def _network(config: MaskRCNNConfig) -> bytes:
    about = Metadata(config)
    return ir.to_proto(network(small_model(config), about)).SerializeToString()


def write(
    path: Path,
    config: MaskRCNNConfig = CONFIG,
    opset: int = 20,
    change: Callable[[Any], Any] = lambda network: network,
    **about: Any,
) -> Path:
    """A file of the network of :data:`CONFIG`.

    Args:
        config: another in what surrounds the network alone.
        change: of the network.
        about: fields of the metadata.
    """
    import onnx

    core = change(ir.from_proto(onnx.load_from_string(_network(CONFIG))))
    data = finish(core, Metadata(config, **about), opset).SerializeToString()
    return write_whole(path, lambda file: file.write(data))
