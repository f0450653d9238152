"""Which implementation of an op runs: Triton's or plain torch's."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch

__all__ = ["VARIABLE", "current_device", "use_triton"]

VARIABLE = "TRIMASK_KERNELS"


def use_triton(device: torch.device) -> bool:
    """Whether the ops on this device are Triton's.

    The environment variable ``TRIMASK_KERNELS`` decides, read at every call:

    - ``auto``, or unset: on CUDA (from compute capability 7.5 on) and ROCm devices where triton is installed;
    - ``torch``: nowhere;
    - ``triton``: everywhere. On a CPU this takes ``TRITON_INTERPRET=1``, set before triton is imported: for tests.

    Raises:
        ValueError: The variable holds something else.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"{VARIABLE}: expected auto, torch or triton, got {choice!r}")
    return choice == "triton" or (choice == "auto" and device.type == "cuda" and _has_triton(device))


@cache
def _has_triton(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    if torch.version.hip is not None or not torch.cuda.is_available():  # the latter for tensors that are pretence
        return True
    return torch.cuda.get_device_capability(device) >= (7, 5)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: Triton launches there, whatever the tensors' own (triton#2925)."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
