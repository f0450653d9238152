"""One page of HTML about files of results: it needs no network and no script.

write_page([Path("benchmarks/results/cpu-epyc-ops-1-thread.json")], Path("report.html"))
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar
from xml.etree.ElementTree import Element

from ..engine.model.files import write_whole
from .charts.bars import ratios, stages
from .charts.lines import growth
from .charts.markup import Child, node, render
from .charts.plots import scrolling, style_of
from .charts.roofline import Kernel, bandwidth, kernels, roofline
from .charts.scales import figure, per_second, times
from .grouping import SideBySide, Sweep, beside, is_ours, missing, side_by_side, sweeps, verdict
from .results import Results, Row, read_results

__all__ = ["write_page"]

_Item = TypeVar("_Item")

_STYLE = Path(__file__).with_name("charts") / "page.css"
_MANY = 24  # cases of a subject, above which it is folded up
_VERDICTS = {"faster": "faster", "even": "even", "slower": "slower", "wrong": "WRONG"}
_METHOD = (
    "Outputs are compared before anything is timed: what is wrong gets no time. All implementations of a case run in "
    "turn, round by round, so that a busy machine slows all alike. A ratio is the median over the rounds of "
    "torchvision's time over the implementation's: above 1 is faster, below 1 is slower. Where an implementation "
    "computes in lower precision than torchvision did, the ratio says beside what. Times are medians (p50), with a "
    "fifth of the samples below p20 and a fifth above p80. Even is what the confidence interval of the ratio cannot "
    "tell from torchvision."
)
_CLOCKS = {
    "cpu": "On the CPU, time is what the host sees.",
    "cuda": "On the GPU, time is the device's own, of calls in a CUDA graph, of RoIAlign over inputs that no cache "
    "holds; what cannot be captured is timed call by call, the host included, as are the whole models of "
    "`trimask benchmark`.",
}
# Columns of the full tables: name, field, divisor.
_COLUMNS = (
    ("p20 ms", "p20_ms", 1.0),
    ("p50 ms", "p50_ms", 1.0),
    ("p80 ms", "p80_ms", 1.0),
    ("x torchvision", "ratio_to_torchvision", 1.0),
    ("from", "ratio_low", 1.0),
    ("to", "ratio_high", 1.0),
    ("warm ms", "warm_ms", 1.0),
    ("call by call ms", "call_ms", 1.0),
    ("first call ms", "first_ms", 1.0),
    ("floor ms", "floor_ms", 1.0),
    ("x floor", "times_floor", 1.0),
    ("peak MB", "peak_bytes", 1e6),
    ("kernel launches a picture", "launches", 1.0),
    ("must move MB", "least_bytes", 1e6),
    ("GFLOP", "operations", 1e9),
    ("box AP", "box_ap", 1.0),
    ("mask AP", "mask_ap", 1.0),
)


def write_page(files: Sequence[Path], target: Path) -> Path:
    """Write the page about files of results, in their order.

    Returns:
        `target`.

    Raises:
        ValueError: there is no file, or one is no file of results; it is named.
    """
    if not files:
        raise ValueError("files: expected at least one file of results, got none")
    text = render(_page({file: read_results(file) for file in files}))
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, lambda file: file.write(text.encode()))


def _page(found: Mapping[Path, Results]) -> Element:
    links = (node("li", node("a", file.stem, href=f"#file-{i}")) for i, file in enumerate(found))
    sections = (_section(file.stem, results, f"file-{i}") for i, (file, results) in enumerate(found.items()))
    return node(
        "html",
        node(
            "head",
            node("meta", charset="utf-8"),
            node("meta", name="viewport", content="width=device-width, initial-scale=1"),
            node("meta", name="color-scheme", content="light dark"),
            node("title", "trimask: speed beside its peers"),
            node("style", _STYLE.read_text(encoding="utf-8")),
        ),
        node(
            "body",
            node(
                "header",
                node("h1", "trimask: speed beside its peers"),
                node("p", _METHOD),
                node("nav", node("ul", *links), aria_label="files of results"),
            ),
            node("main", *sections),
        ),
        lang="en",
    )


def _section(name: str, results: Results, anchor: str) -> Element:
    found = side_by_side(results.rows)
    grown = sweeps(found)
    parts = [
        ("Beside torchvision", _ratio_figures(found)),
        ("Latency against batch", _sweep_figures([one for one in grown if one.variable == "batch"])),
        ("Cost as the work grows", _sweep_figures([one for one in grown if one.variable != "batch"])),
        ("Beside the machine's ceilings", _ceiling_figures(results)),
        ("Where the time goes", _stage_figures(results.rows)),
        ("All figures", _tables(found)),
    ]
    shown = [(title, children, f"{anchor}-{i}") for i, (title, children) in enumerate(parts) if children]
    links = (node("li", node("a", title, href=f"#{place}")) for title, _, place in shown)
    return node(
        "section",
        node("h2", name),
        _head(results),
        _summary(found),
        node("nav", node("ul", *links), aria_label=name) if shown else node("p", "The file has no rows."),
        *(node("section", node("h3", title), *children, id=place) for title, children, place in shown),
        id=anchor,
    )


def _head(results: Results) -> Element:
    """The machine, the versions, the method."""
    facts, ceilings = results.environment, results.ceilings or {}
    tests = results.more.get("tests") or {}
    versions = facts.get("versions") or {}
    devices = list(dict.fromkeys(str(row.device) for row in results.rows if row.device))
    threads = sorted({row.threads for row in results.rows if row.threads})
    plural = "" if threads == [1] else "s"
    absent = [name for name, version in versions.items() if not version]
    present = [f"{name} {version}" for name, version in versions.items() if version]
    peaks = ceilings.get("matrix_flops_per_s") or {}
    measured = [
        f"copy {per_second(ceilings['copy_bytes_per_s'], 'B')}" if ceilings.get("copy_bytes_per_s") else "",
        f"fill {per_second(ceilings['fill_bytes_per_s'], 'B')}" if ceilings.get("fill_bytes_per_s") else "",
        f"launch {figure(1e3 * ceilings['launch_ms'])} µs" if ceilings.get("launch_ms") else "",
        *(f"{dtype} products {per_second(peak, 'FLOP')}" for dtype, peak in peaks.items()),
    ]
    lines = {
        "Machine": _joined(facts.get("machine"), f"{facts['cores']} cores" if facts.get("cores") else None),
        "GPU": _joined(facts.get("gpu"), f"driver {facts['driver']}" if facts.get("driver") else None),
        "Device": _joined(*devices, f"{', '.join(map(str, threads))} thread{plural}" if threads else None),
        "Versions": _joined(f"Python {facts['python']}" if facts.get("python") else None, *present),
        "Not installed": _joined(*absent),
        "System": _joined(facts.get("system"), f"load {facts['load']:.2g}" if facts.get("load") is not None else None),
        "Commit": _joined(facts.get("commit")),
        "Measured": _joined(facts.get("time")),
        "Ceilings": _joined(*measured),
        "Note": _joined(facts.get("note")),
        "Tests of the kernels": _joined(
            *(f"{tests[one]} {one}" for one in ("passed", "failed", "skipped") if one in tests)
        ),
        "Unfinished": _joined(*(results.more.get("unfinished") or [])),
    }
    cells = (part for name, text in lines.items() if text for part in (node("dt", name), node("dd", text)))
    clocks = " ".join(_CLOCKS[device] for device in devices if device in _CLOCKS)
    return node("div", node("dl", *cells), node("p", clocks) if clocks else None, class_="head")


def _joined(*texts: object, between: str = ", ") -> str:
    return between.join(str(text) for text in texts if text)


def _summary(found: Sequence[SideBySide]) -> Element | None:
    """How often each of our implementations won and lost, then what lost, what was wrong and what is missing."""
    counts: dict[str, Counter[str]] = {}
    listed: dict[str, list[str]] = {"slower": [], "wrong": []}
    for comparison in found:
        for row in comparison.rows:
            outcome = verdict(row)
            if is_ours(row):
                lower = beside(row, comparison.peer)
                counts.setdefault(_joined(row.implementation, lower, between=" "), Counter())[outcome] += 1
            if outcome in listed and (is_ours(row) or outcome == "wrong"):
                listed[outcome].append(_in_words(comparison, row))
    absent = missing(row for comparison in found for row in comparison.rows)
    listed["missing"] = [
        f"{_joined(name, note)}: {count} case{'s' * (count > 1)}" for (name, note), count in absent.items()
    ]
    if not found:
        return None
    head = node("tr", node("th", "Cases, beside torchvision", scope="col"), *(_th(name) for name in _VERDICTS.values()))
    body = [
        node("tr", node("th", name, scope="row"), *(_count(kind, count[kind]) for kind in _VERDICTS))
        for name, count in counts.items()
        if any(count[kind] for kind in _VERDICTS)
    ]
    table = node("table", node("thead", head), node("tbody", *body), class_="counts")
    titles = {"slower": "Slower than torchvision", "wrong": "WRONG", "missing": "Not timed"}
    lists = [
        node(
            "details",
            node("summary", f"{titles[kind]}: {sum(absent.values()) if kind == 'missing' else len(texts)}"),
            node("ul", *(node("li", text) for text in texts)),
            open="open" if kind == "wrong" else None,
            class_=kind,
        )
        for kind, texts in listed.items()
        if texts
    ]
    return node("div", scrolling(table, "How often each was faster and slower") if body else None, *lists)


def _count(kind: str, count: int) -> Element:
    return node("td", str(count), class_=kind if count else "none")


def _in_words(comparison: SideBySide, row: Row) -> str:
    lost = row.ratio_to_torchvision if verdict(row) == "slower" else None
    ratio = _joined(times(lost), beside(row, comparison.peer), between=" ") if lost else ""
    name = f"{comparison.subject}: {_joined(comparison.case, comparison.dtype)}: {row.implementation}"
    return f"{name}: {_joined(ratio, row.note)}".removesuffix(": ")


def _ratio_figures(found: Sequence[SideBySide]) -> list[Element]:
    return [
        _folded(f"{subject}, {len(group)} {'case' if len(group) == 1 else 'cases'}", ratios(subject, group), len(group))
        for subject, group in _by_subject(found, lambda comparison: comparison.subject)
    ]


def _by_subject(items: Iterable[_Item], key: Callable[[_Item], str]) -> Iterable[tuple[str, list[_Item]]]:
    groups: dict[str, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


def _folded(title: str, content: Element, size: int) -> Element:
    return node("details", node("summary", title), content, open="open" if size <= _MANY else None)


def _sweep_figures(found: Sequence[Sweep]) -> list[Element]:
    figures = []
    for subject, group in _by_subject(found, lambda sweep: sweep.subject):
        styles = style_of(name for sweep in group for name in sweep.lines)
        charts = node("div", *(growth(sweep, styles) for sweep in group), class_="many")
        figures.append(_folded(f"{subject}, {len(group)} chart{'s' * (len(group) > 1)}", charts, len(group)))
    return figures


def _ceiling_figures(results: Results) -> list[Element]:
    ceilings = results.ceilings or {}
    copy = ceilings.get("copy_bytes_per_s")
    found = kernels(results.rows, ceilings)
    if not found or not copy:
        return []
    roof = roofline(found, ceilings)
    alone: list[Kernel] = [kernel for kernel in found if not kernel.flops_per_s]
    bars = [
        _folded(f"{subject}: bytes that must move", bandwidth(subject, group, copy), len(group))
        for subject, group in _by_subject(alone, lambda kernel: kernel.row.subject)
    ]
    return [*([roof] if roof is not None else []), *bars]


def _stage_figures(rows: Sequence[Row]) -> list[Element]:
    staged = [row for row in rows if row.stages_ms]
    return [_folded(f"{len(staged)} calls", stages(staged), len(staged))] if staged else []


def _tables(found: Sequence[SideBySide]) -> list[Element]:
    return [
        node(
            "details",
            node("summary", f"{subject}, {sum(len(one.rows) for one in group)} rows"),
            _table(subject, group),
        )
        for subject, group in _by_subject(found, lambda one: one.subject)
    ]


def _table(subject: str, found: Sequence[SideBySide]) -> Element:
    rows = [row for one in found for row in one.rows]
    columns = [column for column in _COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    names = ("implementation", "dtype", *(name for name, _, _ in columns), "note")
    head = node("tr", *(_th(name) for name in names))
    bodies = []
    for case, group in groupby(found, key=lambda one: one.case):
        title = node("tr", node("th", node("span", case), colspan=len(names), scope="colgroup", class_="case"))
        bodies.append(node("tbody", title, *(_table_row(row, one, columns) for one in group for row in one.rows)))
    return scrolling(node("table", node("thead", head), *bodies), f"{subject}: all figures")


def _table_row(row: Row, comparison: SideBySide, columns: Sequence[tuple[str, str, float]]) -> Element:
    outcome = verdict(row)
    cells: list[Child] = []
    for _, field, divisor in columns:
        value = getattr(row, field)
        lost = field == "ratio_to_torchvision" and is_ours(row) and outcome == "slower"
        text = "" if value is None else figure(value / divisor)
        cells.append(node("td", f"▼ {text}" if lost else text, class_="slower" if lost else None))
    dtype = _joined(row.dtype, beside(row, comparison.peer), between=" ")
    note = _joined("WRONG" if outcome == "wrong" else None, row.note)
    name = node("th", row.implementation, scope="row")
    return node("tr", name, node("td", dtype), *cells, node("td", note, class_="note"), class_=outcome)


def _th(name: str) -> Element:
    return node("th", name, scope="col")
