"""Others' Mask R-CNN with the same weights, where their package is installed.

A module each, with the same three functions: ``unlike(config)`` names what of a config the peer has otherwise, ``twin``
makes its model with the weights of ours, and ``detecting`` a call of it from decoded pictures to masks on the host.
"""

from importlib import import_module
from typing import Any

__all__ = ["PEERS", "peer"]

# By name, and what must be there: MMDetection's models import mmcv's compiled ops.
PEERS = {"torchvision": "torchvision", "Detectron2": "detectron2.modeling", "MMDetection": "mmdet.models"}


def peer(name: str) -> Any:
    """The module of one of `PEERS`; None where its package cannot be imported."""
    try:
        import_module(PEERS[name])
    except (ImportError, AssertionError):  # MMDetection asserts mmcv's version
        return None
    return import_module(f".{name.lower()}", __name__)
