"""CUDA graphs: a function of tensors of fixed shapes is recorded once for each set of shapes and then replayed.

One launch takes the place of several hundred, each of which costs the host some microseconds and leaves the device
waiting for it when the batch is small.

What a graph reads and writes has fixed addresses. So inputs are copied in before a replay and outputs are copied out
after it, and the next replay must not begin before that is done: a :class:`GraphRunner` does the three under a lock on
the host, and between two events on the device, whatever the streams of its callers.
"""

import gc
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeVar
from weakref import WeakSet, finalize

import torch
from torch import Tensor

from ...kernels import dispatch
from ...kernels.dispatch import current_device
from ..model.mask_rcnn import no_mark
from .timing import EventStopwatch, Stages, Stopwatch

__all__ = ["WORTH_IT", "CudaRecorder", "GraphRunner", "Recorder", "Recording", "run_eagerly"]

WARMUPS = 2  # the first run compiles kernels, loads them and makes plans; the second finds nothing left to do

REPLAYS = 3  # that are timed, the quickest of which counts
WORTH_IT = 1.25  # times as long as its kernels launched one by one: what a graph may take
NOISE = 0.1  # milliseconds by which two timings of the same may differ

# One capture at a time is all that torch allows in a process. And cuDNN's plans, whose kernels a graph holds, belong to
# the thread that made them and go with it, so this one stays. It is started by the first capture.
_RECORDING = ThreadPoolExecutor(1, "trimask-record")

Mark = Callable[[str], None]
Outputs = TypeVar("Outputs", bound=tuple[Tensor | None, ...])

# From the outputs and options of a function: what decides the shapes of what is left to do, and a function that does
# it, given where to mark its stages.
Then = Callable[..., tuple[Hashable, Callable[[Mark], Any]]]


@dataclass(eq=False)
class Recording:
    """A function recorded with its arguments.

    Attributes:
        outputs: what it returned. Their values are there after a replay, until the next of any recording that shares
            their memory.
        replay: enqueues the work on the current stream, without waiting for anything.
        watch: the marks of the function, of the last replay; None where they cannot be recorded.
        keep: what must live as long as this does.
    """

    outputs: tuple[Tensor | None, ...]
    replay: Callable[[], None]
    watch: Stopwatch | None = None
    keep: Any = None


class Recorder(Protocol):
    """What a :class:`GraphRunner` needs of a device."""

    def record(self, function: Callable[[Mark], tuple[Tensor | None, ...]]) -> Recording:
        """Record a function of nothing but where to mark its stages; it may run several times."""

    def turn(self) -> AbstractContextManager[None]:
        """What the body enqueues on the current stream runs after the bodies before it, on whatever streams."""

    def wait(self) -> None:
        """Until the device has done the last turn's work."""


class CudaRecorder:
    """Records CUDA graphs. The only place that knows how torch does it.

    Args:
        device: a CUDA device, with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _capture_stream(device)
        self.done = torch.cuda.Event()
        self._pool: Any = None
        self._alive: WeakSet[Recording] = WeakSet()  # those in the pool

    def record(self, function: Callable[[Mark], tuple[Tensor | None, ...]]) -> Recording:
        """See :class:`Recorder`. Waits for the device, and for other captures of the process.

        Raises:
            Exception: what the function raises; RuntimeError where it does what a graph cannot hold, or where the graph
                is slower than its kernels one by one.
        """
        caller = torch.cuda.current_stream(self.device)  # which makes the inputs
        return _RECORDING.submit(self._record, function, caller).result()

    @torch.inference_mode()
    def _record(self, function: Callable[[Mark], tuple[Tensor | None, ...]], caller: torch.cuda.Stream) -> Recording:
        with current_device(self.device), _same_stream_after():
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                for _ in range(WARMUPS - 1):
                    function(no_mark)
                one_by_one = _milliseconds(lambda: function(no_mark))
            # All recordings share one pool, so that many graphs need hardly more memory than the largest. That is safe
            # as the replays of a runner never overlap and outputs are copied out before the next begins. A pool whose
            # last graph is gone cannot be entered again, nor one whose last capture failed.
            living = list(self._alive)  # which keeps them alive meanwhile
            pool = self._pool if living else torch.cuda.graph_pool_handle()
            self._alive = WeakSet()
            recording = self._captured(function, pool)
            self._pool, self._alive = pool, WeakSet([*living, recording])
            at_once = self._at_once(recording)
            if _is_slower(at_once, one_by_one):  # or other work came between: once more, for the verdict stands
                with torch.cuda.stream(self.stream):
                    one_by_one = max(one_by_one, _milliseconds(lambda: function(no_mark)))
                at_once = min(at_once, self._at_once(recording))
            if _is_slower(at_once, one_by_one):
                raise RuntimeError(f"a graph takes {at_once:.3g} ms, its kernels one by one {one_by_one:.3g} ms")
            return recording

    def _at_once(self, recording: Recording) -> float:
        with torch.cuda.stream(self.stream), self.turn():
            return min(_milliseconds(recording.replay) for _ in range(REPLAYS))

    def _captured(self, function: Callable[[Mark], tuple[Tensor | None, ...]], pool: Any) -> Recording:
        graph, watch = torch.cuda.CUDAGraph(), None
        outputs: tuple[Tensor | None, ...] = ()
        problem: Exception | None = None
        try:
            # Other threads may allocate and wait meanwhile: only this one's mistakes count.
            capture = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
            with _own_workspace(), _no_collection(), capture:
                watch = _watch()
                try:
                    outputs = function(watch.mark if watch else no_mark)
                except Exception as error:  # the end of the capture would raise in its place, and say less
                    problem = error
        except Exception as error:
            problem = problem or error
        if problem is not None:
            # Before pytorch#180395 a capture that failed left the allocator believing that it still went on.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            try:
                raise problem
            finally:
                del problem  # it knows this frame, which would keep the tensors of the failed capture
        return Recording(outputs, graph.replay, watch, graph)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See :class:`Recorder`."""
        with current_device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            try:
                yield
            finally:
                self.done.record(stream)

    def wait(self) -> None:
        """See :class:`Recorder`."""
        self.done.synchronize()


class GraphRunner:
    """Runs a function through recordings, one for each set of shapes and options.

    Args:
        function: ``function(*inputs, *options, mark)``, with fixed shapes for inputs of fixed shapes, free of waiting;
            gives a named tuple of tensors and None. It is kept, so it should not hold whoever keeps the runner.
        recorder: of the device.
        size: how many recordings to keep; the one not used for longest goes first.
        patience: calls from one recording to the next when there are ``size`` already. Between them what has not been
            recorded runs as it is: pictures of very many sizes would else be recorded again and again, and one
            recording takes as long as dozens of runs.
        then: ``then(outputs, *options)``, for a second part whose shapes depend on what the first has found. It may
            wait for the device to find out; the second part works on the outputs of the first where they lie, and is
            recorded for each key that ``then`` gives. Its outputs are those of the runner.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor | None, ...]],
        recorder: Recorder,
        size: int = 8,
        patience: int = 64,
        then: Then | None = None,
    ) -> None:
        self.function = function
        self.then = then
        self.recorder = recorder
        self.size = size
        self.patience = patience
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()
        self._calls = 0  # since the last recording
        self._lock = threading.Lock()
        # Before the inputs go: the work of results that nobody asked for may still read them.
        finalize(self, recorder.wait).atexit = False

    @torch.inference_mode()
    def __call__(self, inputs: tuple[Tensor, ...], options: tuple[Hashable, ...], watch: Stopwatch) -> Any:
        """What :func:`run_eagerly` gives, in memory of its own.

        Where it cannot be recorded it runs as it is, for these shapes and options, and a warning says why, once.
        Safe from several threads and on several streams.
        """
        # The lock covers the enqueueing alone: who comes next need not wait for the device.
        with self._lock:
            slot = self._slot(inputs, options)
            if slot is not None and slot.recording is not None:
                with self.recorder.turn():
                    for target, source in zip(slot.inputs, inputs, strict=True):
                        target.copy_(source)
                    slot.recording.replay()
                    slot.replays += 1
                    outputs, watches = self._continued(slot, slot.recording, options)
                    outputs = _copied(outputs)
                watch.include(self._stages(slot, watches))
                return outputs
        return run_eagerly(self.function, self.then, inputs, options, watch)

    def __len__(self) -> int:
        """How many recordings there are."""
        with self._lock:
            return sum(slot.recording is not None for slot in self._slots.values())

    def _slot(self, inputs: tuple[Tensor, ...], options: tuple[Hashable, ...]) -> "_Slot | None":
        key = (tuple((x.dtype, x.shape) for x in inputs), options, _switches())
        self._calls += 1
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        if len(self._slots) >= self.size and self._calls < self.patience:
            return None
        self._calls = 0
        slot = _Slot(tuple(torch.empty_like(x).copy_(x) for x in inputs))
        slot.recording = self._recorded(lambda mark: self.function(*slot.inputs, *options, mark), inputs)
        if slot.recording is None:
            slot.inputs = ()  # nobody will read them
        self._slots[key] = slot
        if len(self._slots) > self.size:
            self.recorder.wait()  # no graph goes while it runs
            self._slots.popitem(last=False)
        return slot

    def _recorded(
        self, function: Callable[[Mark], tuple[Tensor | None, ...]], inputs: tuple[Tensor, ...]
    ) -> Recording | None:
        try:
            return self.recorder.record(function)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            warnings.warn(
                f"inputs of shapes {shapes} run without a CUDA graph, as capturing one failed: "
                f"{type(error).__name__}: {error}",
                stacklevel=4,
            )
            return None

    def _continued(
        self, slot: "_Slot", first: Recording, options: tuple[Hashable, ...]
    ) -> tuple[tuple[Tensor | None, ...], list[Stopwatch | None]]:
        """The outputs after the second part, if there is one, and the watches of both."""
        if self.then is None:
            return first.outputs, [first.watch]
        key, function = self.then(first.outputs, *options)
        if key not in slot.later:
            slot.later[key] = self._recorded(function, slot.inputs)
        second = slot.later[key]
        if second is None:
            return function(no_mark), [None]
        second.replay()
        return second.outputs, [first.watch, second.watch]

    def _stages(self, slot: "_Slot", watches: list[Stopwatch | None]) -> Callable[[], Stages | None]:
        """Asks for the stages of the last replay, which are known until the next one of the slot is enqueued."""
        number = slot.replays

        def read() -> Stages | None:
            with self._lock:
                if slot.replays != number:
                    return None
                stages: Stages = {}
                for watch in watches:
                    if watch is None:
                        return None
                    stages |= watch.milliseconds()
                return stages

        return read


def run_eagerly(
    function: Callable[..., Any],
    then: Then | None,
    inputs: tuple[Tensor, ...],
    options: tuple[Hashable, ...],
    watch: Stopwatch,
) -> Any:
    """What a :class:`GraphRunner` of the two does, without recording anything."""
    outputs = function(*inputs, *options, watch.mark)
    return outputs if then is None else then(outputs, *options)[1](watch.mark)


@dataclass(eq=False)
class _Slot:
    """The inputs of a recording, at the addresses that it reads; no recording where there can be none.

    Attributes:
        later: recordings of the second part, by what decides their shapes; they read the outputs of the first.
        replays: how often it has run.
    """

    inputs: tuple[Tensor, ...]
    recording: Recording | None = None
    later: dict[Hashable, Recording | None] = field(default_factory=dict)
    replays: int = 0


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """What any thread enqueues on a stream while it captures becomes part of the graph, instead of being run.

    Torch deals out the same few streams again and again, and hardly anybody takes one with a priority.
    """
    return torch.cuda.Stream(device, priority=-1)


def _switches() -> tuple[Hashable, ...]:
    """What a program may turn on or off at any time, and what has been recorded would not notice."""
    return (
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get(dispatch.VARIABLE),
    )


def _is_slower(at_once: float, one_by_one: float) -> bool:
    return at_once > WORTH_IT * one_by_one + NOISE


def _milliseconds(enqueue: Callable[[], Any]) -> float:
    """Between the start and the end of what is enqueued on the current stream; waits for it."""
    watch = EventStopwatch()
    enqueue()
    watch.mark("all")
    watch.wait()
    return watch.milliseconds()["all"]


def _watch() -> EventStopwatch | None:
    """Events that every replay records again, which ROCm's graphs do not hold (ROCm/rocm-systems#2380)."""
    return None if torch.version.hip else EventStopwatch(external=True)


def _copied(outputs: Outputs) -> Outputs:
    copies = [None if x is None else x.clone() for x in outputs]
    return type(outputs)(*copies)  # type: ignore[arg-type]  # every named tuple takes its fields


@contextmanager
def _own_workspace() -> Iterator[None]:
    """cuBLAS's workspace comes from the graph's own pool.

    Torch keeps one for each stream. Without this a graph would go on writing to that one, which graphs of other runners
    may share (torch deals the same few streams out again), and which whoever clears the workspaces frees.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: what goes may wait for the device first, which spoils the capture of its thread."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _same_stream_after() -> Iterator[None]:
    """A capture that fails leaves its own stream the current one."""
    with torch.cuda.stream(torch.cuda.current_stream()):
        yield
