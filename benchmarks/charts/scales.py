"""Axes: where a value stands, which values are named, and how figures are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Linear",
    "LogScale",
    "around",
    "figure",
    "milliseconds",
    "per_second",
    "percent",
    "short",
    "ticks_within",
    "times",
]

_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from `low` to `high`, both above 0."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """How far along, 0 to 100."""
        return 100 * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values, at most so many."""
        return ticks_within(self.low, self.high, most)


@dataclass(frozen=True)
class Linear:
    """A linear axis from 0 to `high`."""

    high: float

    def at(self, value: float) -> float:
        """How far along, 0 to 100."""
        return 100 * value / self.high if self.high else 0.0


def around(values: Sequence[float], least: float = 1.0, *, padding: float = 1.0) -> LogScale:
    """The axis from a round value below all of them to one above.

    Args:
        values: all above 0.
        least: how many times the low end the high end is at least, rounded up.
        padding: factor that is free at each end.
    """
    low, high = min(values) / padding, max(values) * padding
    if high / low < least:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(least), middle * math.sqrt(least)
    return LogScale(_round(low, up=False), _round(high, up=True))


def _round(value: float, up: bool) -> float:
    exponent = math.floor(math.log10(value))
    candidates = [step * 10.0**power for power in (exponent - 1, exponent, exponent + 1) for step in _STEPS]
    if up:
        return min(x for x in candidates if x >= value * (1 - 1e-9))
    return max(x for x in candidates if x <= value * (1 + 1e-9))


def ticks_within(low: float, high: float, most: int) -> list[float]:
    """Round values from low to high, at most so many: steps of 1, 2, 5, then of 1, 3, then powers of ten."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    inside = [low * (1 - 1e-9), high * (1 + 1e-9)]
    for steps, every in ((_STEPS, 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
        found = [step * 10.0**power for power in powers if power % every == 0 for step in steps]
        found = [value for value in found if inside[0] <= value <= inside[1]]
        if len(found) <= most:
            return found
    return found[:most]


def figure(value: float) -> str:
    """Three digits that count: 0.0391, 2.5, 375, 7426."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """A time with its unit; "-" for None."""
    return "-" if value is None else f"{figure(value)} ms"


def short(value: float) -> str:
    """For an axis: 0.5, 20, 100k, 2M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """12 %, 0.8 %."""
    return f"{100 * share:.0f} %" if share >= 0.0095 or not share else f"{100 * share:.1g} %"


def per_second(value: float, unit: str) -> str:
    """1.9 TB/s, 660 GFLOP/s."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}/s"
    return f"{value:.3g} {unit}/s"


def times(ratio: float) -> str:
    """0.0064x, 0.17x, 2.88x, 39x."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.2f}x" if ratio >= 0.0995 else f"{ratio:.2g}x"
