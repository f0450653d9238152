"""Where the time of a call goes: stage by stage over several rounds, as figures, as a chart and as a trace.

A call is decoding, preprocessing, the network, run lengths of the masks and the copy to the host, one after the other,
without a CUDA graph, in which stages could not be told apart. On a GPU the stages lie between events on the device's
own clock, so that nothing waits but for the results at the end; where the host is slower than the device, the gaps
between its launches count for the stage that they are in.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.files import write_whole
from ..model.mask_rcnn import no_mark
from ..pictures.charts import new_figure
from ..pictures.preprocess import make_batch
from ..pictures.reading import read
from .execution import infer
from .memory import resident_bytes
from .predictor import Predictor
from .timing import stopwatch

__all__ = ["Profile", "Spread", "draw_chart", "profile", "write_trace"]

Mark = Callable[[str], None]
FEWEST_RUNS = 4096  # room for a mask: smooth ones have two runs for each of their columns
RUNS_A_COLUMN = 4
COLOURS = {"picture": "#9aa5b1", "network": "#3b6fb6", "results": "#d98c3f"}  # of the chart
GROUPS = {"decode": "picture", "preprocess": "picture", "run lengths": "results", "copy": "results"}


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a call: a fifth of the rounds took less than p20, a half less than p50."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Spread":
        if len(milliseconds) == 1:
            return cls(*[milliseconds[0]] * 3)
        deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7])


@dataclass(frozen=True)
class Profile:
    """What was measured of a predictor; times are of a call with the whole batch.

    Attributes:
        pictures: (height, width) of each picture of the batch.
        network: (height, width) that they were resized and padded to.
        detections: in each picture.
        first_ms: the first call: kernels are compiled or loaded, buffers allocated.
        stages: by name, in their order.
        call: the stages and what lies between them, by the host's clock.
        predict: `Predictor.predict` on the same pictures: what a program sees. It makes no run lengths before they are
            asked for, and may run in a CUDA graph.
        memory_bytes: at most at any time; None where the system does not tell.
        memory_of: whose: what torch allocated on the device during the rounds, or the whole process since its start.
        notes: what a reader should know.
    """

    predictor: str
    device: str
    dtype: str
    threads: int
    rounds: int
    pictures: list[tuple[int, int]]
    network: tuple[int, int]
    detections: list[int]
    first_ms: float
    stages: dict[str, Spread]
    call: Spread
    predict: Spread
    memory_bytes: int | None
    memory_of: str
    notes: list[str]

    @property
    def shares(self) -> dict[str, float]:
        """Of the sum of the stages' medians."""
        total = sum(stage.p50 for stage in self.stages.values())
        return {name: stage.p50 / total for name, stage in self.stages.items()}

    @property
    def pictures_per_second(self) -> float:
        """By `Predictor.predict`, one batch after the other."""
        return 1e3 * len(self.pictures) / self.predict.p50


@dataclass(frozen=True)
class _Call:
    pictures: list[tuple[int, int]]
    network: tuple[int, int]
    detections: list[int]
    cut: int  # masks with more runs than there was room for


@torch.inference_mode()
def _call(predictor: Predictor, sources: Sequence[Any], mark: Mark) -> _Call:
    """From encoded pictures to boxes, scores, labels and run lengths on the host."""
    arrays = [read(source).array for source in sources]
    mark("decode")
    inputs = make_batch(arrays, predictor.config.input, predictor.device)
    mark("preprocess")
    capacity = max(FEWEST_RUNS, RUNS_A_COLUMN * max(array.shape[1] for array in arrays))
    config, device = predictor.config, predictor.device
    found = infer(predictor.graph, config.paste, capacity, *inputs, config.detection, mark).to_host()
    mark("copy")
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    cut = 0 if found.lengths is None else int((found.lengths > capacity).sum())
    height, width = inputs[0].shape[2:]
    return _Call([array.shape[:2] for array in arrays], (height, width), found.count.tolist(), cut)


def profile(predictor: Predictor, sources: Sequence[Any], rounds: int = 20) -> Profile:
    """Measure a predictor that has not been used yet.

    Args:
        predictor: its first call is timed too, so let it be fresh.
        sources: the pictures of a batch, as `Predictor.predict` takes them; encoded ones (paths or bytes) show what
            decoding costs.
        rounds: how many calls of each kind are timed, at least 1.

    Raises:
        ValueError: no picture or round.
    """
    if not sources:
        raise ValueError("sources: expected at least one picture, got none")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    cuda = predictor.device.type == "cuda"

    def predict() -> None:
        predictor.predict(list(sources), batch_size=len(sources))

    with torch.cuda.device(predictor.device) if cuda else nullcontext():
        first_ms = _wall(lambda: _call(predictor, sources, no_mark))
        predict()  # its own first call, which may capture a graph
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        stages: list[dict[str, float]] = []
        calls: list[float] = []
        predictions: list[float] = []
        found = _Call([], (0, 0), [], 0)
        for _ in range(rounds):
            watch = stopwatch(predictor.device)
            start = time.perf_counter()
            found = _call(predictor, sources, watch.mark)  # ends with the copy, for which the host waits
            calls.append(1e3 * (time.perf_counter() - start))
            stages.append(watch.milliseconds())
            predictions.append(_wall(predict))
        memory = torch.cuda.max_memory_allocated() if cuda else resident_bytes()
    return Profile(
        predictor=repr(predictor),
        device=torch.cuda.get_device_name(predictor.device) if cuda else str(predictor.device),
        dtype=str(predictor.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rounds=rounds,
        pictures=found.pictures,
        network=found.network,
        detections=found.detections,
        first_ms=first_ms,
        stages={name: Spread.of([one[name] for one in stages]) for name in stages[0]},
        call=Spread.of(calls),
        predict=Spread.of(predictions),
        memory_bytes=memory,
        memory_of="allocated on the device" if cuda else "resident in the whole process, since its start",
        notes=list(_notes(found)),
    )


def _notes(found: _Call) -> Iterator[str]:
    if not any(found.detections):
        yield "nothing was found: masks and run lengths cost more where there are objects"
    if found.cut:
        yield f"{found.cut} masks have more runs than there was room for"


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class _Ranges:
    """The stages of a call as named ranges of torch's profiler, given their names in order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = iter(names)
        self._open()

    def _open(self) -> None:
        name = next(self.names, None)
        self.range = None if name is None else torch.profiler.record_function(name)
        if self.range:
            self.range.__enter__()

    def mark(self, stage: str) -> None:
        assert self.range is not None
        assert self.range.name == stage
        self.range.__exit__(None, None, None)
        self._open()


def write_trace(predictor: Predictor, sources: Sequence[Any], stages: Sequence[str], path: Path) -> Path:
    """Write what torch's profiler sees of one call, for https://ui.perfetto.dev or chrome://tracing.

    Args:
        predictor: one that is warm, as after :func:`profile`.
        sources: the pictures of a batch.
        stages: the names in the order of :attr:`Profile.stages`; they are ranges in the trace.
        path: the JSON file; one of that name is replaced.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if predictor.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        _call(predictor, sources, _Ranges(stages).mark)
    return write_whole(path, lambda file: profiler.export_chrome_trace(file.name))


def draw_chart(measured: Profile, path: Path) -> Path:
    """Draw a bar for each stage: its median and share, and a line from p20 to p80.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("the chart needs", 9, 1.9 + 0.42 * len(measured.stages))
    from matplotlib.patches import Patch

    axes = figure.add_subplot()
    longest = max(spread.p80 for spread in measured.stages.values())
    for row, (name, spread) in enumerate(measured.stages.items()):
        group = GROUPS.get(name, "network")
        axes.barh(row, spread.p50, height=0.66, color=COLOURS[group])
        axes.plot([spread.p20, spread.p80], [row, row], color="#222222", linewidth=1.2, solid_capstyle="butt")
        text = f"{_rounded(spread.p50)} ms   {100 * measured.shares[name]:.1f} %"
        axes.text(spread.p80 + 0.012 * longest, row, text, va="center", fontsize=10)
    axes.set_yticks(range(len(measured.stages)), list(measured.stages), fontsize=10.5)
    axes.invert_yaxis()  # the first stage on top
    axes.set_xlim(0, 1.25 * longest)  # room for the labels
    axes.set_xlabel("ms a call: bar p50, line p20 to p80")
    axes.legend(
        [Patch(color=colour) for colour in COLOURS.values()], COLOURS, loc="lower right", frameon=False, fontsize=9.5
    )
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    title = f"{measured.predictor}: {_rounded(measured.call.p50)} ms a call"
    axes.set_title(title, loc="left", pad=22, fontsize=12, fontweight="bold")
    subtitle = (
        f"{measured.device}, batch {len(measured.pictures)} at {measured.network[0]} x {measured.network[1]}, "
        f"{sum(measured.detections)} detections, {measured.rounds} rounds"
    )
    axes.annotate(subtitle, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9.5, color="#555555")
    return write_whole(path, lambda file: figure.savefig(file, format="png"))


def _rounded(milliseconds: float) -> str:
    """Three digits that count, down to microseconds."""
    digits = 2 - math.floor(math.log10(max(milliseconds, 1e-3)))
    return f"{milliseconds:.{min(max(digits, 0), 3)}f}"
