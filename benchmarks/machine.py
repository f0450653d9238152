"""What a reader needs to judge figures: the machine, its load, the versions of all that ran, and the commit."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .installed import version

__all__ = ["environment"]

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "pycocotools",
    "faster-coco-eval",
    "detectron2",
    "mmdet",
    "mmcv",
    "conch-triton-kernels",
)


def environment() -> dict[str, Any]:
    """Machine, load, versions of the peers (None: not installed), commit and time."""
    information = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", information.read_text()) if information.is_file() else None
    return {
        "machine": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        **_gpu(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "gpu_architecture": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "driver": (_output(query) or "").partition("\n")[0] or None,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """The commit of the checkout, with "-dirty" where its files differ from it; None outside of one.

    The environment variable ``TRIMASK_COMMIT`` says it for a copy that is no checkout.
    """
    if named := os.environ.get("TRIMASK_COMMIT"):
        return named
    command = ["git", f"--git-dir={_ROOT / '.git'}", f"--work-tree={_ROOT}", "describe", "--always", "--abbrev=40"]
    return _output([*command, "--dirty", "--exclude=*"])


def _output(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
