"""A GPU in pretence, on which everything that would wait for a real one, or feed it from the host, is refused.

`NoWaiting` watches each operation on tensors of a device "cuda". They may be torch's fake ones, which have shapes and
no values, or those of `Pretended`: a device whose memory is the host's, on which torch computes as on a CPU and the
launchers of the Triton kernels run as on a GPU, in its interpreter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from trimask import MaskRCNN
from trimask.benchmarks.counting import computes
from trimask.engine.inference.graph import optimize

__all__ = ["GPU", "NoWaiting", "Pretended", "WaitsError", "for_gpu", "pretend", "replace_tensors"]

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten

_COPIES = {_aten._to_copy, _aten.copy_}
# Where a tensor of bool means: as many elements as there are true ones.
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_UNTAGGED = {_aten.masked_scatter, _aten.masked_scatter_}  # though they read as many elements as a mask has
_NEW = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided}  # memory that holds nothing yet


class WaitsError(AssertionError):
    """An operation that makes host and device wait for each other."""


class NoWaiting(TorchDispatchMode):
    """Refuses what a stream capture would, and counts what would be launched.

    Whoever uses it turns gradients off by `no_grad`: in inference mode, composite operations hide their parts.

    Args:
        device: the GPU; a CPU can be taken for one, where nothing goes between host and device.

    Attributes:
        launches: names of the operations that start a kernel, in their order.
    """

    def __init__(self, device: torch.device = GPU) -> None:
        super().__init__()
        self.device = device
        self.launches: list[str] = []

    def is_there(self, x: Tensor) -> bool:
        return x.device.type == self.device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        out = self.compute(func, args, kwargs)
        results = _tensors(out)
        if any(map(self.is_there, _tensors((args, kwargs)))) and not all(map(self.is_there, results)):
            raise WaitsError(f"{func}: from the device to the host")
        if any(map(self.is_there, results)) and self.is_launched(func):
            self.launches.append(str(func))
        return out

    def is_launched(self, func: Any) -> bool:
        """Whether the operation starts a kernel: views and new memory do not."""
        return computes(func)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise a `WaitsError` for an operation that waits, or that moves memory between host and device."""
        inputs = _tensors((args, kwargs))
        places = {x.device.type for x in inputs} | ({kwargs["device"].type} if kwargs.get("device") else set())
        if func.overloadpacket in _COPIES and len(places) > 1:
            raise WaitsError(f"{func}: between host and device")
        if not any(map(self.is_there, inputs)):
            return
        tags = set(func.tags)
        if func.overloadpacket in _INDEXING:
            if any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])):
                raise WaitsError(f"{func}: as many elements as a mask has")
            tags -= {torch.Tag.dynamic_output_shape}
        if tags & {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} or func.overloadpacket in _UNTAGGED:
            raise WaitsError(f"{func}: depends on values")
        if any(x.dim() for x in inputs if not self.is_there(x)):  # a number from the host is an argument of the kernel
            raise WaitsError(f"{func}: with a tensor of the host")


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


class _OnGPU(Tensor):
    """A tensor that says it is on the GPU; its memory is the host's."""

    memory: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: Tensor) -> "_OnGPU":
        return Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=GPU,
        )

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def tolist(self) -> Any:
        raise WaitsError("tolist: from the device to the host")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise WaitsError(f"{func}: outside of the pretence")


class Pretended(NoWaiting):
    """The GPU that computes: see `pretend`."""

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "trimask":  # the body of one of our ops: what it does is watched, too
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        target = kwargs.get("device")
        if not (target.type == GPU.type if target else any(map(self.is_there, _tensors((args, kwargs))))):
            return func(*args, **kwargs)
        if target:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        same = {id(x.memory): x for x in _tensors((args, kwargs)) if isinstance(x, _OnGPU)}
        args, kwargs = tree_map_only(_OnGPU, lambda x: x.memory, (args, kwargs))
        out = func(*args, **kwargs)
        if func.overloadpacket in _NEW:
            _poison(out)
        return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else _OnGPU(x), out)

    def is_launched(self, func: Any) -> bool:
        return func.namespace != "trimask" and super().is_launched(func)  # their kernels are counted instead

    def to_device(self, x: Tensor) -> Tensor:
        return _OnGPU(x)

    def to_host(self, found: Any) -> Any:
        """What lies on the device, as ordinary tensors."""
        return tree_map_only(_OnGPU, lambda x: x.memory, found)


def _poison(out: Any) -> None:
    """Memory that nobody has written yet holds the worst."""
    if isinstance(out, Tensor) and out.dtype != torch.bool:
        out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)


@contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """A GPU named "cuda:0", with the launchers of `trimask.kernels.gpu` and no way to wait for it."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is there, and its kernels are compiled")
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_there(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = tree_map_only(_OnGPU, lambda x: x.memory, (args, kwargs))
        device.launches.append(self.fn.__name__)
        with _disable_current_modes():
            launch(self, *args, **kwargs)

    torch._C._ensureCUDADeviceGuardSet()  # as for fake tensors: without CUDA, to make a device current does nothing
    device = Pretended()
    with monkeypatch.context() as patch:
        patch.delenv("TRIMASK_KERNELS", raising=False)
        patch.setattr(GridExecutor, "__call__", launch_there)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device="cuda") copies where no mode sees it
        try:
            with torch.no_grad(), device:
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def replace_tensors(module: nn.Module, new: Callable[[Tensor], Tensor]) -> nn.Module:
    """Put other tensors in the place of all parameters and buffers."""
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                part._parameters.pop(name, None)
                part._buffers.pop(name, None)
                part._buffers[name] = new(tensor)
    return module


def for_gpu(model: MaskRCNN, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> MaskRCNN:
    """The inference graph with the layers that a GPU gets, its tensors still on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(MaskRCNN, "to", lambda self, device: self)
        return optimize(model, GPU, dtype)
