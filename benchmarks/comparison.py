"""One case with everyone that can do it, and runs of bounded time over many: what is left out is named."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .harness import OURS, Disagreement, Implementations, Row, compare

__all__ = ["NEEDS_A_GPU", "NEEDS_MEMORY", "Comparison", "Planned", "affordable", "bounded"]

NEEDS_A_GPU = "needs a GPU"
NEEDS_MEMORY = "left out: needs {:.0f} GB of memory"
_CALLS = 8  # of each at least: one is checked, one warms up, six are timed
_ROUNDS, _QUICK_ROUNDS = 15, 7  # six are the fewest that have an interval
_SECONDS = 7.0  # of rounds, where there are more than the fewest


@dataclass(frozen=True)
class Comparison:
    """A case and its implementations, as `compare` takes them, made but not yet run.

    Attributes:
        subject, case, implementations, disagreement: see `compare`.
        near, lower, dtype, least_bytes, operations, variable: likewise.
        absent: implementations that cannot take part, by name, and why.
    """

    subject: str
    case: str
    implementations: Implementations
    disagreement: Disagreement
    near: Disagreement | None = None
    lower: Mapping[str, Disagreement] = field(default_factory=dict)
    dtype: str | Mapping[str, str] = "float32"
    absent: Mapping[str, str] = field(default_factory=dict)
    least_bytes: int | None = None
    operations: int | None = None
    variable: Mapping[str, float] | None = None

    def rows(self, threads: int, quick: bool, rounds: int = _ROUNDS, seconds: float = _SECONDS) -> list[Row]:
        """Those that took part, then those that could not."""
        found = compare(
            self.subject,
            self.case,
            self.implementations,
            self.disagreement,
            rounds=_QUICK_ROUNDS if quick else rounds,
            threads=threads,
            dtype=self.dtype,
            near=self.near,
            lower=self.lower,
            seconds=seconds,
            least_bytes=self.least_bytes,
            operations=self.operations,
            variable=self.variable,
        )
        dtypes = dict.fromkeys(self.absent, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return found + [
            Row(self.subject, self.case, name, "cpu", dtypes[name], threads, note=why)
            for name, why in self.absent.items()
        ]

    def differing(self, name: str) -> Disagreement:
        """What an implementation is held to at least."""
        ours = name.startswith(OURS)
        return self.lower.get(name) or (self.disagreement if ours else self.near or self.disagreement)


@dataclass(frozen=True)
class Planned:
    """A case that may be left out.

    Attributes:
        seconds: that one call of every implementation takes together, about.
        rows: measures it.
        calls: of every implementation that it makes, about.
    """

    subject: str
    name: str
    seconds: float
    rows: Callable[[], list[Row]]
    calls: int = _CALLS


def bounded(cases: Iterable[Planned], threads: int, quick: bool, seconds: float) -> Iterator[list[Row]]:
    """The rows of each case that there is time for, in their order; what is left out gets a row that says so.

    Args:
        cases: each with its cost.
        threads: what torch may use.
        quick: few rounds each, whatever they cost.
        seconds: for all of them.
    """
    end = time.monotonic() + seconds
    for case in cases:
        left, wanted = end - time.monotonic(), case.calls * case.seconds
        if quick or wanted <= left:
            yield case.rows()
        else:
            note = f"left out: about {wanted:.0f} s, and {max(left, 0):.0f} s of {seconds:.0f} were left"
            yield [Row(case.subject, case.name, "trimask", "cpu", "", threads, note=note)]


def affordable(size: int) -> str:
    """ "" if so many bytes are at most a quarter of the machine's memory, else what to say."""
    if not hasattr(os, "sysconf"):
        return ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "" if size <= memory / 4 else NEEDS_MEMORY.format(size / 1e9)
