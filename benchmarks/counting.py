"""What a call does, counted rather than timed: operations, memory and multiplications, the same on every run.

An operation is one that torch dispatches and that computes: views and new memory cost nothing. One of our own ops is
one operation, whatever its body does; `within_ops` counts the bodies' operations instead. Multiplications inside of
our own ops are not counted.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ..kernels import epilogue  # registers an op that is counted below

__all__ = ["Counts", "computes", "counting"]

_aten = torch.ops.aten
# What costs a device nothing: an address, or nothing at all. Views are told by their schema.
_FREE = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.lift_fresh, _aten._unsafe_view}
_FREE |= {torch.ops.prim.device}


def computes(func: Any) -> bool:
    """Whether the operation does something: views and new memory do not."""
    is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
    return not is_view and func.overloadpacket not in _FREE


@dataclass
class Counts:
    """Of one call.

    Attributes:
        operations: how often each ran, by stage; a stage is named when it is done.
        flops: of convolutions and matrix products, 2 for a product and its sum.
        bytes: of all memory that results took.
        peak_bytes: of results alive at once, at most.
    """

    operations: dict[str, Counter[str]] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    peak_bytes: int = 0

    def mark(self, stage: str) -> None:
        """What ran since the last stage was of this one."""
        self.operations[stage] = self.operations.pop("", Counter())


@contextmanager
def counting(*, within_ops: bool = False) -> Iterator[Counts]:
    """Count what runs in there, on real tensors or on torch's fake ones; gradients are counted where they are computed.

    Args:
        within_ops: go into the bodies of our own ops, on a CPU.
    """
    counts = Counts()
    with FlopCounterMode(display=False, custom_mapping=_fused()) as flops, _Counting(counts, within_ops):
        yield counts
    counts.flops = flops.get_total_flops()
    if left := counts.operations.pop("", None):
        counts.operations["rest" if counts.operations else "all"] = left


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts, within_ops: bool) -> None:
        super().__init__()
        self.counts, self.within_ops = counts, within_ops
        self.alive: set[int] = set()  # addresses of storages
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        if self.within_ops and func.namespace == "trimask":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        out = func(*args, **kwargs)
        if computes(func):
            self.counts.operations.setdefault("", Counter())[str(func.overloadpacket)] += 1
        for x in _tensors(out):
            storage = x.untyped_storage()
            if storage._cdata not in before | self.alive:
                self.add(storage)
        return out

    def add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.alive.add(address)
        self.size += size
        self.counts.bytes += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.size)
        weakref.finalize(storage, self.drop, address, size)

    def drop(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.size -= size


def _tensors(tree: Any) -> list[Tensor]:
    """Those whose memory can be asked for: not the weights that oneDNN has laid out."""
    return [x for x in tree_iter(tree) if isinstance(x, Tensor) and x.layout == torch.strided]


def _fused() -> dict[Any, Callable[..., int]]:
    """How many operations fused layers are, oneDNN's and our own, which torch does not count."""

    def convolution(x: Any, second: Any, third: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        weight = third if third is not None and len(third) == 4 else second  # with a residual, that is the second
        return conv_flop_count(x, weight, out_shape)

    def added(residual: Any, x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    layers: dict[str, Callable[..., int]] = {
        "_convolution_pointwise": convolution,
        "_convolution_pointwise_": added,
        "_linear_pointwise": linear,
    }
    found = {getattr(torch.ops.mkldnn, name): of for name, of in layers.items() if hasattr(torch.ops.mkldnn, name)}
    return {**found, epilogue.CONV_RELU: convolution}
