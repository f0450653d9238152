"""The same cases for every implementation of the ops: plain torch, Triton's interpreter, a GPU.

A test module asks for it with

    @pytest.fixture(autouse=True, params=BACKENDS)
    def _backend(request, monkeypatch):
        use_backend(request.param, monkeypatch, request.module, ("nms", "batched_nms"), {suppression: {"_BLOCK": 256}})

and marks with `pytest.mark.host` what concerns plain torch alone.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["BACKENDS", "use_backend"]

if torch.cuda.is_available():
    _triton = pytest.param("cuda", marks=pytest.mark.gpu)
elif find_spec("triton"):
    _triton = pytest.param("interpreter")
else:
    _triton = pytest.param("interpreter", marks=pytest.mark.skip(reason="needs triton"))

BACKENDS = [pytest.param("torch"), _triton]


def use_backend(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    names: Iterable[str],
    tiles: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Make the functions `names` of a test module run on a backend.

    Args:
        tiles: Sizes for the interpreter, by module of `trimask.kernels.gpu` and constant: a program there costs the
            same, whatever its size, so that few large ones are fast.
    """
    if backend == "interpreter":
        monkeypatch.setenv("TRIMASK_KERNELS", "triton")
        for gpu_module, constants in (tiles or {}).items():
            for constant, value in constants.items():
                monkeypatch.setattr(f"trimask.kernels.gpu.{gpu_module}.{constant}", value)
    elif backend == "cuda":
        for name in names:
            monkeypatch.setattr(module, name, _on_gpu(getattr(module, name)))
    else:
        monkeypatch.setenv("TRIMASK_KERNELS", "torch")


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with what lies on the CPU sent to the GPU and the result fetched back."""

    def there(tensor: Tensor) -> Tensor:
        return tensor.cuda() if tensor.device.type == "cpu" else tensor

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, there, (args, kwargs))
        return tree_map_only(Tensor, Tensor.cpu, function(*args, **kwargs))

    return run
