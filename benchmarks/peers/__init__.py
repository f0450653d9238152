"""Others' Mask R-CNN with the same weights, where their package is installed.

A module each, with the same three functions: ``unlike(config)`` names what of a config the peer has otherwise, ``twin``
makes its model with the weights of ours, and ``detecting`` a call of it from decoded pictures to masks on the host.
"""

from importlib import import_module
from typing import Any

from ..installed import optional

__all__ = ["PEERS", "peer"]

PEERS = {"torchvision": "torchvision", "Detectron2": "detectron2", "MMDetection": "mmdet"}  # and their packages


def peer(name: str) -> Any:
    """The module of one of `PEERS`; None where its package is not installed."""
    if optional(PEERS[name]) is None:
        return None
    return import_module(f".{name.lower()}", __name__)
