"""Time on a CUDA device, and what the device can do at best.

A function is captured in a CUDA graph of many calls, each on the next copy of the input, where its case has copies, and
with the outputs of all alive, so that no cache holds either; the replay of the graph is timed between two events. What
the host does is not in it. A function that waits for the device cannot be captured: it is timed call by call, the host
included.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .harness import Call, Clock, Disagreement, Implementations, Row, Sampler, Samplers, compare

__all__ = [
    "Bench",
    "Ceilings",
    "DeviceClock",
    "copies",
    "has_bfloat16",
    "measure_ceilings",
    "plain_torch",
    "precision",
    "waits",
]

_SAMPLE = 2e-3  # seconds of calls in a sample, where they are short
_MOST_CALLS = 200  # in a sample
_CACHES = 3  # the copies of the input are this many times as large as the L2 cache
_MOST_COPIES = 16
_LARGE = 2 << 30  # bytes of a copy that measures the bandwidth: far above any cache
_LARGE_ON_CPU = 256 << 20
_SIDE, _SIDE_ON_CPU = 8192, 1024  # of matrices whose product shows what the device computes at best
_QUICK = 4  # times shorter in a quick run
_ROUNDS = 21
_SECONDS = 3.0  # for a case; by default
_LONGEST_CASE = 25.0  # seconds, of a whole model: its making, its warm-up, and the same of its peers


class DeviceClock:
    """Time on the current CUDA device. Functions are made, checked and timed within `stream`.

    Args:
        bandwidth: see `Clock`.
        graphs: capture what can be captured; else everything is timed call by call, the host included.
    """

    device = "cuda"

    def __init__(self, bandwidth: float | None = None, graphs: bool = True) -> None:
        self.bandwidth = bandwidth
        self.graphs = graphs

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream other than the default one, where nothing can be captured.

        It is for whole cases: a gradient runs on the stream that its forward pass ran on.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def samplers(self, calls: Sequence[Call]) -> Samplers:
        # The call that was checked and these are the warm-up.
        once = _between_events(_Eager(calls, len(calls)), len(calls))()
        count = math.ceil(min(max(_SAMPLE / once, 1), _MOST_CALLS) / len(calls)) * len(calls)
        eager = _Eager(calls, count)
        cold, warm = None, None
        if self.graphs and not waits(calls[0]):
            cold = _capture(calls, count)
            warm = _capture(calls[:1], count) if len(calls) > 1 else None
        if cold is None:  # call by call already, and mostly long: nothing is timed twice
            again = {"warm_ms": _between_events(_Eager(calls[:1], count), count)} if len(calls) > 1 else {}
            return Samplers(_between_events(eager, count), again, False)
        return Samplers(
            _between_events(cold, count),
            ({"warm_ms": _between_events(warm, count)} if warm else {}) | {"call_ms": lambda: _wall(eager) / count},
            True,
        )


class _Eager:
    """Calls in turn, with the latest output of each alive."""

    def __init__(self, calls: Sequence[Call], count: int) -> None:
        self.calls, self.count = calls, count

    def __call__(self) -> None:
        outputs: deque[Any] = deque(maxlen=len(self.calls))
        for call in islice(cycle(self.calls), self.count):
            outputs.append(call())


def _capture(calls: Sequence[Call], count: int) -> Call | None:
    """The same as a graph; None if something in it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            _Eager(calls, count)()
    except RuntimeError:
        return None
    graph.replay()  # the first one also uploads it
    torch.cuda.synchronize()
    return graph.replay


def waits(call: Call) -> bool:
    """Whether torch waits for the device in there.

    Asked before a capture, because one that fails leaves the allocator of torch < 2.12 believing in it
    (pytorch#180395).
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _between_events(calls: Call, count: int) -> Sampler:
    """Seconds for each of the `count` calls that `calls` makes, by the device's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        start.record()
        calls()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return sample


def _wall(calls: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def copies(size: int) -> int:
    """How many copies of an input of `size` bytes no L2 cache holds; 1 where that would be too many."""
    cache = torch.cuda.get_device_properties().L2_cache_size if torch.cuda.is_available() else 0
    wanted = max(1, math.ceil(_CACHES * cache / size))
    return wanted if wanted <= _MOST_COPIES else 1


@dataclass(frozen=True)
class Ceilings:
    """What was measured of a device.

    Attributes:
        copy_bytes_per_s: Bytes read plus bytes written in a second by a large copy, ``2 * size / time``.
        fill_bytes_per_s: Bytes written in a second where nothing is read, ``size / time``.
        launch_ms: A kernel that does next to nothing, among others of its kind in a graph; on a CPU the call of an op.
        matrix_flops_per_s: Operations a second of a product of large square matrices, two for each multiply-add, by
            dtype; "tf32" is float32 that may round to it.
    """

    copy_bytes_per_s: float
    fill_bytes_per_s: float
    launch_ms: float
    matrix_flops_per_s: dict[str, float]


def measure_ceilings(clock: Clock, size: int | None = None) -> Ceilings:
    """Measure with the threads that torch may use now.

    Args:
        clock: Of the device.
        size: Bytes of the tensors that are copied, where a quarter of a GPU's free memory is not less; by default far
            above what caches hold. Small ones, for a quick run, also make for small matrices.
    """
    cuda = clock.device == "cuda"
    large = _LARGE if cuda else _LARGE_ON_CPU
    side = (_SIDE if cuda else _SIDE_ON_CPU) // (1 if size is None or size >= large else _QUICK)
    size = min(size or large, torch.cuda.mem_get_info()[0] // 4) if cuda else size or large
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=clock.device)

    def median(call: Call) -> float:
        call()
        sampler = clock.samplers([call]).main
        return statistics.median(sampler() for _ in range(_ROUNDS))

    size = source.nbytes
    # The driver's own copy, which torch uses, is not always as fast as a kernel's.
    copying = min(median(lambda: target.copy_(source)), median(lambda: torch.neg(source, out=target)))
    return Ceilings(
        copy_bytes_per_s=2 * size / copying,
        fill_bytes_per_s=size / median(target.zero_),
        launch_ms=1e3 * median(lambda: one.add_(1)),
        matrix_flops_per_s={
            dtype: 2 * side**3 / seconds for dtype, seconds in _products(clock.device, side, median).items()
        },
    )


def has_bfloat16() -> bool:
    """Whether the processor multiplies in it; elsewhere it is emulated, and slow."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _products(device: str, side: int, median: Callable[[Call], float]) -> dict[str, float]:
    """Seconds of a product of square matrices, in every precision that the device is made for."""
    dtypes = {"float32": torch.float32}
    if device == "cuda":
        dtypes |= {"tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    elif has_bfloat16():
        dtypes |= {"bfloat16": torch.bfloat16}
    found = {}
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for name, dtype in dtypes.items():
            matmul.allow_tf32 = name == "tf32"
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            found[name] = median(partial(torch.mm, a, b, out=out))
    finally:
        matmul.allow_tf32 = before
    return found


@dataclass(frozen=True)
class Bench:
    """Where the cases of a benchmark run, and how large they are.

    Attributes:
        quick: Small inputs and few rounds: a check, not a measurement.
        deadline: By `time.monotonic`; what need not be complete begins nothing when it is near.
    """

    clock: Clock
    quick: bool
    deadline: float = math.inf

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def late(self, seconds: float = _LONGEST_CASE) -> bool:
        """Whether there is no time for a case that takes so long."""
        return self.left() < seconds

    def put(self, *tensors: Tensor) -> Any:
        """The tensors on the device; just the one, if there is one."""
        there = [tensor.to(self.clock.device) for tensor in tensors]
        return there if len(there) > 1 else there[0]

    def copies(self, size: int) -> int:
        """How many copies of an input of `size` bytes are taken in turn; two on a CPU, to see that it works."""
        return copies(size) if self.clock.device == "cuda" else 2

    def compare(
        self, subject: str, case: str, implementations: Implementations, disagreement: Disagreement, **more: Any
    ) -> list[Row]:
        """`harness.compare` on the device, for a few seconds at most."""
        limits: dict[str, Any] = {"rounds": _ROUNDS, "seconds": _SECONDS}
        limits |= more | ({"rounds": 7 if self.clock.device == "cuda" else 2} if self.quick else {})
        return compare(
            subject,
            case,
            implementations,
            disagreement,
            threads=torch.get_num_threads(),
            clock=self.clock,
            **limits,
        )


def plain_torch(function: Call) -> Call:
    """The function with the ops in plain torch."""

    def call() -> Any:
        with mock.patch.dict(os.environ, TRIMASK_KERNELS="torch"):
            return function()

    return call


@contextmanager
def precision(*, tf32: bool, tuned: bool) -> Iterator[None]:
    """Whether float32 convolutions may round to TF32 (as torch lets them; products never), and cuDNN try algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = tf32, tuned, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before
