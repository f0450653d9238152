"""Packages that may be missing. Needs no torch."""

import importlib
import importlib.metadata
from typing import Any

__all__ = ["optional", "version"]


def optional(module: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def version(package: str) -> str | None:
    """Of an installed package, or one that can be imported all the same; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(optional(package), "__version__", None)
