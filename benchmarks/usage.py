"""What a call takes beside its time: launches, memory, and how its stages share the time."""

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..engine.inference.timing import stopwatch
from .device import Bench

__all__ = ["slower_in_a_graph", "usage"]

_ROUNDS = 7
_NAMED = 3  # kernels that take longer in a graph
_LONGEST_NAME = 60


def usage(
    bench: Bench,
    call: Callable[[], Any],
    pictures: int,
    staged: Callable[..., Any] | None = None,
    profiled: bool = True,
) -> dict[str, Any]:
    """Fields of a `Row`: on a GPU `launches` and `peak_bytes`, and `stages_ms` of what can be staged.

    Args:
        bench: where the call runs.
        call: one call.
        pictures: that it handles.
        staged: the same with a keyword ``mark``, which it calls with the name of each stage that is done.
        profiled: count launches, which takes a second or two where there are thousands.
    """
    fields: dict[str, Any] = {"stages_ms": _stages(bench, staged)} if staged else {}
    if bench.clock.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # weights and inputs, also those of other cases
        call()
        torch.cuda.synchronize()
        fields["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        if profiled:
            fields["launches"] = _launches(call, pictures)
    return fields


def _stages(bench: Bench, call: Callable[..., Any]) -> dict[str, float]:
    """Medians of a few calls, launched kernel by kernel."""
    samples = []
    for _ in range(2 if bench.quick else _ROUNDS):
        watch = stopwatch(torch.device(bench.clock.device))
        call(mark=watch.mark)
        watch.wait()
        samples.append(watch.milliseconds())
    return {name: statistics.median(one[name] for one in samples) for name in samples[0]}


def _launches(call: Callable[[], Any], pictures: int) -> float | None:
    """Kernels for each picture, copies and fills not counted; None where the profiler sees none."""
    kernels = [event for event in _on_device(call) if not event.name.startswith(("Memcpy", "Memset"))]
    return len(kernels) / pictures or None


def _on_device(call: Callable[[], Any]) -> list[Any]:
    """What the profiler sees on the GPU: kernels, copies and fills."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def slower_in_a_graph(call: Callable[[], Any]) -> str:
    """Which kernels, copies and fills take longer in a CUDA graph than launched one by one, in words."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:  # for lack of memory, where the measured one is still there
        return f"not recorded again: {error}"
    graph.replay()
    spent = []
    for run in (call, graph.replay):
        spent.append(Counter[str]())
        for event in _on_device(run):
            spent[-1][event.name] += event.time_range.elapsed_us() / 1e3
    more = {name: ms - spent[0][name] for name, ms in spent[1].items()}
    worst = sorted(more, key=lambda name: more[name], reverse=True)[:_NAMED]
    named = (f"{name[:_LONGEST_NAME]} {spent[1][name]:.2f} ms, one by one {spent[0][name]:.2f}" for name in worst)
    return "in the graph " + "; ".join(named)
