"""ONNX export, and prediction from an exported file without torch.

    trimask.export.to_onnx("people", "people.onnx")
    trimask.export.Runtime("people.onnx").predict("photo.jpg")

Names are imported on first use: the runtime needs numpy, Pillow and ONNX Runtime, the exporter torch and onnx.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Exported": ".onnx",
    "Metadata": ".metadata",
    "Runtime": ".runtime",
    "to_onnx": ".onnx",
    "translations": ".translation",
    "verify": ".verification",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
