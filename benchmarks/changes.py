"""What got slower between two runs on the same machine, beyond noise.

Another hour finds a machine in another state, so our time is judged by its ratio to a peer's that was timed in both
runs, in turn with ours: torchvision's where it is there, any other one else. Three rules, the first that applies:

- "interval": both runs have a confidence interval of the ratio to torchvision. Slower where the intervals don't touch
  and the ratio fell by more than the margin.
- "spread": a peer was timed in both. Slower where the ratios that p20 and p80 of ours and of the peer allow don't
  touch, and the ratio of the medians fell by more than twice the margin.
- "alone": no peer. All times are first divided by the median drift of the peers in the whole run, if there are any.
  Slower where p20 to p80 don't touch, and the median rose by as much.

A peer's time is a yardstick and never judged, and no rule judges fewer than 6 rounds, which show nothing of the noise.
Nor is anything judged that used several threads while others took the processors: threads that wait for each other
suffer from that far more than one does, and a ratio shows it.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .harness import FEWEST_ROUNDS, OURS
from .results import PEER, Results, Row

__all__ = ["Change", "Changes", "judge", "require_alike"]

_BUSY = 1.25  # load for each core; a run before this one, with as many threads as cores, leaves no more than 1

Key = tuple[str, str, str, str, str, int]
Case = tuple[str, str, str, str, int]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """Of one of our implementations in one case.

    Attributes:
        row: The new one.
        rule: "interval", "spread" or "alone".
        peer: Whose time it was held against; "" for none.
        speed: New over old, seen from there: 0.5 takes twice as long.
        beyond_noise: Whether the rule says so, of a change in either direction.
    """

    row: Row
    rule: str
    peer: str
    speed: float
    beyond_noise: bool

    @property
    def slower(self) -> bool:
        return self.beyond_noise and self.speed < 1


@dataclass(frozen=True)
class Changes:
    """All of them.

    Attributes:
        judged: What was timed in both runs.
        unjudged: New rows of ours that were timed in too few rounds, or several threads on a busy machine, now or then.
        lost: New rows without a time that have one in the old run: wrong now, or not installed.
        only_old: Rows of the old run that the new one has not; likewise `only_new`.
        drift: The median of how much longer peers took than before; None where none was timed in both.
        warnings: What makes the two less alike than they should be.
    """

    judged: list[Change]
    unjudged: list[Row]
    lost: list[Row]
    only_old: list[Row]
    only_new: list[Row]
    drift: float | None
    warnings: list[str]

    @property
    def slower(self) -> list[Change]:
        return [one for one in self.judged if one.slower]

    @property
    def worse(self) -> bool:
        """Whether something of ours got slower, or wrong."""
        return bool(self.slower or any(row.correct is False for row in self.lost))


def judge(old: Results, new: Results, margin: float) -> Changes:
    """Compare two runs.

    Args:
        old: The earlier one.
        new: The later one.
        margin: Relative change that is taken for noise by the strictest rule.

    Raises:
        ValueError: They are of different machines, devices, threads or dtypes, or name a row twice.
    """
    before, after = _by_key("old", old), _by_key("new", new)
    _require_same_machine(old.environment, new.environment)
    _require_same_settings(before, after)
    both = [key for key in after if key in before]
    timed = {key for key in both if before[key].p50_ms is not None and after[key].p50_ms is not None}
    drifts = [_p50(after[key]) / _p50(before[key]) for key in timed if not _ours(key)]
    drift = statistics.median(drifts) if drifts else None
    ours = [key for key in both if key in timed and _ours(key)]
    busy = _busy(old) or _busy(new)
    unjudged = {
        key
        for key in ours
        if min(before[key].rounds or 0, after[key].rounds or 0) < FEWEST_ROUNDS
        or (busy and after[key].device == "cpu" and after[key].threads > 1)
    }
    return Changes(
        judged=[_judge(key, before, after, timed, drift, margin) for key in ours if key not in unjudged],
        unjudged=[after[key] for key in ours if key in unjudged],
        lost=[after[key] for key in both if before[key].p50_ms is not None and after[key].p50_ms is None],
        only_old=[row for key, row in before.items() if key not in after],
        only_new=[row for key, row in after.items() if key not in before],
        drift=drift,
        warnings=_warnings(old, new),
    )


def require_alike(old: Results, environment: Mapping[str, Any], threads: int) -> None:
    """Before a run that is to be compared is begun.

    Raises:
        ValueError: It would be of another machine, or with another number of threads.
    """
    _require_same_machine(old.environment, environment)
    if old.rows and threads not in (found := sorted({row.threads for row in old.rows})):
        raise ValueError(
            f"compare: expected results with {threads} threads, got them with {', '.join(map(str, found))}"
        )


def _judge(
    key: Key, before: Mapping[Key, Row], after: Mapping[Key, Row], timed: set[Key], drift: float | None, margin: float
) -> Change:
    old, new = before[key], after[key]
    if old.ratio_low is not None and new.ratio_low is not None:
        speed = _ratio(new) / _ratio(old)
        apart = _apart((old.ratio_low, _known(old.ratio_high)), (new.ratio_low, _known(new.ratio_high)))
        return Change(new, "interval", PEER, speed, apart and _beyond(speed, margin))
    peers = [other for other in timed if _case(other) == _case(key) and not _ours(other)]
    if peers:
        peer = min(peers, key=lambda other: (other[2] != PEER, other[2]))
        speed = _p50(after[peer]) / _p50(new) / (_p50(before[peer]) / _p50(old))
        apart = _apart(_allowed(before[peer], old), _allowed(after[peer], new))
        return Change(new, "spread", peer[2], speed, apart and _beyond(speed, 2 * margin))
    scale = drift or 1.0
    speed = scale * _p50(old) / _p50(new)
    was = (scale * _known(old.p20_ms), scale * _known(old.p80_ms))
    apart = _apart(was, (_known(new.p20_ms), _known(new.p80_ms)))
    return Change(new, "alone", "", speed, apart and _beyond(speed, 2 * margin))


def _beyond(speed: float, margin: float) -> bool:
    return max(speed, 1 / speed) > 1 / (1 - margin)


def _apart(a: Bounds, b: Bounds) -> bool:
    return a[1] < b[0] or b[1] < a[0]


def _allowed(peer: Row, ours: Row) -> Bounds:
    """The ratios that the spreads of both allow."""
    return _known(peer.p20_ms) / _known(ours.p80_ms), _known(peer.p80_ms) / _known(ours.p20_ms)


def _by_key(which: str, results: Results) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in results.rows:
        key = (row.subject, row.case, row.implementation, row.device, row.dtype, row.threads)
        if key in found:
            raise ValueError(f"{which} results: expected each row once, got twice {_words(key)}")
        found[key] = row
    return found


def _require_same_machine(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for fact in ("machine", "cores", "gpu"):
        was, now = old.get(fact), new.get(fact)
        if was != now:
            raise ValueError(f"compare: expected results of the same {fact}, got {was!r} and {now!r}")


def _require_same_settings(before: Mapping[Key, Row], after: Mapping[Key, Row]) -> None:
    """What differs in device, dtype or threads alone must not pass for a row that is in one run only."""
    settings: dict[tuple[str, str, str], list[Key]] = {}
    for key in before:
        settings.setdefault(key[:3], []).append(key)
    for key in after:
        others = settings.get(key[:3], [])
        if others and key not in before and not any(other in after for other in others):
            raise ValueError(
                f"compare: expected results of the same device, dtype and threads, got {_words(others[0])} "
                f"and {_words(key)}"
            )


def _busy(results: Results) -> bool:
    load, cores = results.environment.get("load"), results.environment.get("cores")
    return bool(load and cores and load > _BUSY * cores)


def _warnings(old: Results, new: Results) -> list[str]:
    busy = [
        "the machine was busy {}: a load of {:.1f} on {} cores".format(
            when, results.environment["load"], results.environment["cores"]
        )
        for when, results in (("then", old), ("now", new))
        if _busy(results)
    ]
    was, now = old.environment.get("versions") or {}, new.environment.get("versions") or {}
    names = [*was, *(name for name in now if name not in was)]
    return busy + [
        f"{name}: {was.get(name)} then, {now.get(name)} now" for name in names if was.get(name) != now.get(name)
    ]


def _words(key: Key) -> str:
    subject, case, implementation, device, dtype, threads = key
    return f"{subject}: {case}: {implementation} ({device}, {dtype}, {threads} threads)"


def _ours(key: Key) -> bool:
    return key[2].startswith(OURS)


def _case(key: Key) -> Case:
    subject, case, _, *settings = key
    return (subject, case, *settings)  # type: ignore[return-value]


def _p50(row: Row) -> float:
    return _known(row.p50_ms)


def _ratio(row: Row) -> float:
    return _known(row.ratio_to_torchvision)


def _known(figure: float | None) -> float:
    assert figure is not None
    return figure
