"""Side-by-side timing: outputs are compared first, then every implementation runs once a round, in turn.

Interleaving lets a busy machine slow all of them alike, and a ratio is the median of the ratios within the rounds.
What disagrees is never timed; what is not installed is listed. What a call costs is up to a clock: `WallClock` here,
and `DeviceClock` for GPUs.
"""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Protocol, TypeVar

import torch

from .results import PEER, Row

__all__ = [
    "Call",
    "Clock",
    "Disagreement",
    "Implementations",
    "Row",
    "Sampler",
    "Samplers",
    "WallClock",
    "compare",
    "failed",
    "interval",
]

OURS = "trimask"  # how the names of our implementations begin
_SHORTEST_SAMPLE = 2e-3  # seconds; what is shorter is called several times in a row for one sample
FEWEST_ROUNDS = 6  # however long they take: fewer have no interval
_CONFIDENCE = 0.95  # of intervals
_LONGEST_NOTE = 500  # characters
_MAIN = "main"

Call = Callable[[], Any]
Implementations = Mapping[str, Call | Sequence[Call] | None]
Sampler = Callable[[], float]  # takes one sample: seconds a call
Disagreement = Callable[[Any, Any], str]
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Samplers:
    """How one implementation is timed.

    Attributes:
        main: What p20, p50 and p80 are of.
        more: Further samplers, by the field of `Row` that takes their median.
        captured: See `Row`.
    """

    main: Sampler
    more: Mapping[str, Sampler]
    captured: bool | None = None


class Clock(Protocol):
    """Where calls run, and how they are timed.

    Attributes:
        device: For the rows.
        bandwidth: Bytes a second of a large copy on it, read and written; None where it was not measured.
    """

    device: str
    bandwidth: float | None

    def samplers(self, calls: Sequence[Call]) -> Samplers:
        """How to time a function, given as calls that do the same to copies of the input."""
        ...


class WallClock:
    """Time as the host sees it; copies of the input take turns."""

    def __init__(self, device: str = "cpu", bandwidth: float | None = None) -> None:
        self.device, self.bandwidth = device, bandwidth

    def samplers(self, calls: Sequence[Call]) -> Samplers:
        turn = cycle(calls)

        def sample(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                next(turn)()
            return (time.perf_counter() - start) / count

        # The call that was checked and this one are the warm-up.
        count = math.ceil(_SHORTEST_SAMPLE / sample(1))
        return Samplers(lambda: sample(count), {})


def compare(
    subject: str,
    case: str,
    implementations: Implementations,
    disagreement: Disagreement,
    *,
    rounds: int,
    threads: int,
    clock: Clock | None = None,
    dtype: str | Mapping[str, str] = "float32",
    expected: Any = None,
    near: Disagreement | None = None,
    lower: Mapping[str, Disagreement] | None = None,
    least_bytes: int | Mapping[str, int] | None = None,
    operations: int | Mapping[str, int] | None = None,
    variable: Mapping[str, float] | None = None,
    seconds: float = math.inf,
) -> list[Row]:
    """Check, then time, several implementations of one thing.

    Args:
        subject: What is measured, such as "nms".
        case: On what, such as "1000 boxes".
        implementations: Functions without arguments, by name, or for each a list of them that do the same to copies of
            the input; None for what is not installed. The output of the first that runs is what the others are held
            against. Names of our own begin with "trimask".
        disagreement: Of that output and another one: how they differ, in words, or "" where they agree.
        rounds: How many samples of each, at least 2.
        threads: What torch may use. The BLAS of numpy reads its number from the environment, once: see `__main__`.
        clock: Where and how they are timed; by default on the CPU, as the host sees it.
        dtype: For the row; by name where implementations differ.
        expected: What all are held against instead of the first one's output.
        near: Like `disagreement`, what peers are held to where their arithmetic is known to be less exact. How they
            differ is still in their notes.
        lower: Like `disagreement`, what implementations in lower precision are held to, by name.
        least_bytes: See `Row`; by name where implementations differ. Likewise `operations`.
        variable: See `Row`.
        seconds: When this has passed there are fewer rounds, 6 at least.

    Returns:
        A row for each implementation, in the order given.
    """
    clock = clock or WallClock()
    calls = {name: [call] if callable(call) else call for name, call in implementations.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        verdicts = _verdicts(calls, disagreement, near or disagreement, lower or {}, expected)
        timed = {name: clock.samplers(calls[name] or []) for name, verdict in verdicts.items() if verdict.timed}
        samplers = {(name, _MAIN): found.main for name, found in timed.items()}
        samplers |= {(name, field): one for name, found in timed.items() for field, one in found.more.items()}
        samples = _interleave(samplers, rounds, seconds)
    finally:
        torch.set_num_threads(before)
    rows = []
    for name, verdict in verdicts.items():
        of = dtype if isinstance(dtype, str) else dtype[name]
        row = Row(subject, case, name, clock.device, of, threads, correct=verdict.correct, note=verdict.note)
        row = replace(row, variable=dict(variable) if variable else None)
        if own := samples.get((name, _MAIN)):
            deciles = statistics.quantiles(own, n=10, method="inclusive")
            p20, p50, p80 = (1e3 * deciles[i] for i in (1, 4, 7))
            more: dict[str, Any] = {field: 1e3 * statistics.median(samples[name, field]) for field in timed[name].more}
            row = replace(
                row, p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=len(own), captured=timed[name].captured, **more
            )
            if peer := samples.get((PEER, _MAIN)):
                ratios = [p / o for p, o in zip(peer, own, strict=True)]
                low, high = interval(ratios)
                row = replace(row, ratio_to_torchvision=statistics.median(ratios), ratio_low=low, ratio_high=high)
            row = replace(row, least_bytes=_of(least_bytes, name), operations=_of(operations, name))
            row = row.above_floor(clock.bandwidth)
        rows.append(row)
    return rows


def _of(figure: int | Mapping[str, int] | None, name: str) -> int | None:
    return figure.get(name) if isinstance(figure, Mapping) else figure


def interval(samples: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Bounds between which the median lies with a confidence of at least 95 %, whatever the distribution.

    They are the k-th smallest and k-th largest sample, with the largest k for which 2 P(Bin(n, 1/2) < k) <= 5 %: the
    median is outside where fewer than k of n independent samples fall on one side of it. Fewer than 6 samples have
    none: even their whole range may miss the median more often.
    """
    n, missed, k = len(samples), 0.0, 0
    while k < n and missed + 2 * math.comb(n, k) / 2**n <= 1 - _CONFIDENCE:
        missed += 2 * math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        return None, None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[-k]


@dataclass(frozen=True)
class _Verdict:
    correct: bool | None
    note: str = ""
    timed: bool = True


def _verdicts(
    calls: Mapping[str, Sequence[Call] | None],
    disagreement: Disagreement,
    near: Disagreement,
    lower: Mapping[str, Disagreement],
    expected: Any,
) -> dict[str, _Verdict]:
    verdicts: dict[str, _Verdict] = {}
    standard = None  # whose output is what is expected, where nothing else was given
    outputs = 0
    for name, functions in calls.items():
        if functions is None:
            verdicts[name] = _Verdict(None, "not installed", timed=False)
            continue
        ours = name.startswith(OURS)
        try:
            output = functions[0]()
            outputs += 1
            if expected is None:
                expected, standard = output, name
                verdicts[name] = _Verdict(True)
            else:
                note = lower.get(name, disagreement)(expected, output)
                accepted = not note or not (ours or name in lower or near(expected, output))
                verdicts[name] = _Verdict(accepted, note, timed=accepted)
        except Exception as error:
            # A peer need not take every dtype and size; torch and its extensions say so in several ways.
            limit = isinstance(error, (NotImplementedError, torch.OutOfMemoryError)) or "not implemented" in str(error)
            verdicts[name] = _Verdict(None if limit and not ours else False, _in_words(error), timed=False)
    if standard and outputs == 1:
        verdicts[standard] = _Verdict(None, "nothing to compare with")
    return verdicts


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_NOTE]


def _interleave(samplers: Mapping[_Key, Sampler], rounds: int, seconds: float) -> dict[_Key, list[float]]:
    """One sample of each a round; each round begins with another one."""
    samples: dict[_Key, list[float]] = {key: [] for key in samplers}
    keys = list(samplers)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for key in keys:
            samples[key].append(samplers[key]())
        keys = keys[1:] + keys[:1]
    return samples


def failed(subject: str, case: str, clock: Clock, error: Exception) -> Row:
    """The row of a case that could not even be set up."""
    return Row(subject, case, OURS, clock.device, "", torch.get_num_threads(), correct=False, note=_in_words(error))
