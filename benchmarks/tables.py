"""The Markdown tables of the documentation, from the committed files of results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``. NAME is one of `TABLES`, whose lines are chosen
below, or the name of a file in `benchmarks/results` without its suffix, and perhaps a subject: all rows of it. A file
that is not there yet is named in its place. ``trimask benchmark --report`` rewrites them, and
``python -m trimask.benchmarks tables`` by themselves.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..engine.model.files import write_whole
from .charts.scales import figure, times
from .grouping import SideBySide, beside, missing, side_by_side, verdict
from .results import PEER, Results, Row, read_results

__all__ = ["TABLES", "Line", "Pick", "documents", "rewrite", "rewritten"]

ROOT = Path(__file__).resolve().parents[1]
_File = tuple[Path, Results]
_Column = Callable[[SideBySide, Row], str]
_PACKAGES = {  # by what begins the name of a row
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "detectron2": "detectron2",
    "mmdetection": "mmdet",
    "conch": "conch-triton-kernels",
}
_BLOCK = re.compile(r"(<!-- table: (\S+)(?: ([\w ]+))? -->\n).*?(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True)
class Pick:
    """Two rows of one case: ours, and what it is held against.

    Attributes:
        file: the name of a file of results, without its suffix.
        case: a pattern as of `fnmatch`, which one case of the subject fits.
        dtype: of ours, where there are several; None takes any.
    """

    file: str
    subject: str
    case: str
    ours: str = "trimask"
    peer: str = PEER
    dtype: str | None = None


@dataclass(frozen=True)
class Line:
    """A line of a table: what the work is, ``{note}`` for the note of our row, and one or several picks."""

    work: str
    picks: tuple[Pick, ...]


def _line(work: str, *picks: Pick) -> Line:
    return Line(work, picks)


def _op(subject: str, case: str, **names: str) -> Pick:
    return Pick("cpu-epyc-ops-1-thread", subject, case, **names)


def _xeon_op(subject: str, case: str, **names: str) -> Pick:
    return Pick("cpu-xeon-ops-1-thread", subject, case, **names)


def _model(case: str, **names: str) -> Pick:
    return Pick("cpu-epyc-models-1-thread", "models", case, **names)


def _xeon(case: str, **names: str) -> Pick:
    return Pick("cpu-xeon-models-1-thread", "models", case, **names)


def _gpu(subject: str, case: str, **names: str) -> Pick:
    return Pick("gpu-nvidia-h200-ops", subject, case, **names)


def _whole_gpu(subject: str, case: str, dtype: str, host: str = "models") -> Pick:
    return Pick(f"gpu-nvidia-h200-{host}", subject, case, dtype=dtype)


_FAST = "faster-host"  # where launches cost torchvision less
_PYRAMID = "1000 RoIs x 256 x 7 x 7, *"
_MASKS = "100 masks* 800 x 1333*"
TABLES: dict[str, tuple[Line, ...]] = {
    "cpu": (
        _line("End to end, bundled model, 512 x 512", _model("people, * 512 x 512 at 320")),
        _line("End to end, ResNet-50 FPN at 800 x 1331", _model("ResNet-50 FPN, 360 x 599 at 800 x 1331, *")),
        _line(
            "the same in bfloat16: {note}",
            _model("ResNet-50 FPN, 360 x 599 at 800 x 1331, *", ours="trimask, bfloat16"),
        ),
        *(
            _line(
                f"End to end, ResNet-50 FPN of {peer}'s kind at 800 x 1331",
                Pick("cpu-epyc-peers-1-thread", "models", f"*{peer}'s kind*", peer=peer),
            )
            for peer in ("Detectron2", "MMDetection")
        ),
        _line(
            "RoIAlign over a pyramid, 1000 x 256 x 7 x 7; channels_last / NCHW input",
            _op("roi_align", _PYRAMID, ours="trimask, channels_last", dtype="float32"),
            _op("roi_align", _PYRAMID, ours="trimask, NCHW", dtype="float32"),
        ),
        _line(
            "NMS of 100 / 1000 / 2000 proposals",
            *(_op("nms", f"{count} *proposals, *all kept*") for count in (100, 1000, 2000)),
        ),
        _line(
            "NMS of 1000 / 2000 boxes on the same few objects",
            *(_op("nms", f"{count} *crowd, *all kept*") for count in (1000, 2000)),
        ),
        _line("Paste 100 masks to 800 x 1333", _op("paste_masks", "100 masks* 800 x 1333")),
        _line("COCO run lengths of them", _op("masks_to_rle", _MASKS, peer="pycocotools, dense masks")),
        _line(
            "the same, beside dense masks that are column-major already",
            _op("masks_to_rle", _MASKS, peer="pycocotools, columns first"),
        ),
        *(
            _line(
                f"{name} of one map of 50 x 84 x 256, 100 / 1000 RoIs (Xeon)",
                _xeon_op(subject, "100 RoIs*one map*", ours="trimask, NCHW"),
                _xeon_op(subject, "1000 RoIs*one map*", ours="trimask, NCHW"),
            )
            for name, subject in (("RoIAlign", "roi_align"), ("RoIPool", "roi_pool"))
        ),
        *(
            _line(
                f"{name} of one map of 200 x 336 x 256, 1 / 10 RoIs (Xeon)",
                _xeon_op(subject, "1 RoIs*one map*", ours="trimask, NCHW"),
                _xeon_op(subject, "10 RoIs*one map*", ours="trimask, NCHW"),
            )
            for name, subject in (("RoIAlign", "roi_align"), ("RoIPool", "roi_pool"))
        ),
        _line("End to end on a Xeon with AMX, bundled model, 512 x 512", _xeon("people, * 512 x 512 at 320")),
        _line(
            "End to end on a Xeon with AMX, ResNet-50 FPN at 800 x 1331",
            _xeon("ResNet-50 FPN, 360 x 599 at 800 x 1331, *"),
        ),
        _line(
            "the same in bfloat16: {note}",
            _xeon("ResNet-50 FPN, 360 x 599 at 800 x 1331, *", ours="trimask, bfloat16"),
        ),
    ),
    "gpu": (
        *(
            _line(
                f"{start}; batch 1 / 8",
                _whole_gpu("models", f"ResNet-{depth} FPN, 1 x {size}{more}", dtype, host),
                _whole_gpu("models", f"ResNet-{depth} FPN, 8 x {size}{more}", dtype, host),
            )
            for start, depth, dtype, size, more, host in (
                ("Picture to run lengths, ResNet-50 FPN, float16, 800 x 1344", 50, "float16", "800 x 1344", "", _FAST),
                ("the same on a slower host", 50, "float16", "800 x 1344", "", "models"),
                ("there, 640 x 640", 50, "float16", "640 x 640", "", "models"),
                ("there, ResNet-101", 101, "float16", "800 x 1344", "", "models"),
                ("there, ResNet-50, boxes alone", 50, "float16", "800 x 1344", ", boxes alone", "models"),
                ("there, float32, boxes alone", 50, "float32", "800 x 1344", ", boxes alone", "models"),
            )
        ),
        *(
            _line(
                start,
                _whole_gpu("training", "ResNet-50 FPN, 2 x 800 x 1344", "tf32", host),
                _whole_gpu("training", "ResNet-50 FPN, 8 x 800 x 1344", "bfloat16", host),
            )
            for start, host in (
                ("Training step, ResNet-50 FPN, 800 x 1344; 2 in TF32 / 8 in bfloat16", _FAST),
                ("the same on the slower host", "models"),
            )
        ),
        _line(
            "RoIAlign over a pyramid, 1000 x 256 x 7 x 7, float16; 2 samples / adaptive",
            _gpu("roi_align", f"{_PYRAMID}sampling ratio 2", ours="trimask, channels_last", dtype="float16"),
            _gpu("roi_align", f"{_PYRAMID}adaptive, aligned", ours="trimask, channels_last", dtype="float16"),
        ),
        _line(
            "the same, float32, channels_last / NCHW input",
            _gpu("roi_align", f"{_PYRAMID}sampling ratio 2", ours="trimask, channels_last", dtype="float32"),
            _gpu("roi_align", f"{_PYRAMID}sampling ratio 2", ours="trimask, NCHW", dtype="float32"),
        ),
        _line(
            "its gradient, float32; 2 samples / adaptive",
            _gpu("roi_align_backward", "*sampling ratio 2", dtype="float32"),
            _gpu("roi_align_backward", "*adaptive, aligned", dtype="float32"),
        ),
        _line("`roi_align` of one NCHW map, 1000 x 256 x 7 x 7", _gpu("roi_align", "drop-in, *")),
        _line("`roi_pool` of one NCHW map, 1000 x 256 x 7 x 7", _gpu("roi_pool", "*")),
        _line(
            "NMS of 5 levels of 2000 proposals / of 1000 x 80 class scores",
            _gpu("nms", "5 levels of 2000 proposals, *"),
            _gpu("nms", "detections: *"),
        ),
        _line(
            "`nms` of 1000 boxes on the same few objects / of 10000 proposals",
            _gpu("nms", "1000 boxes, crowd, *"),
            _gpu("nms", "10000 boxes, proposals, *"),
        ),
        _line(
            "the same beside conch's",
            _gpu("nms", "1000 boxes, crowd, *", peer="conch"),
            _gpu("nms", "10000 boxes, proposals, *", peer="conch"),
        ),
        _line("Paste 100 masks to 800 x 1333", _gpu("paste_masks", "100 masks to 800 x 1333, torchvision's rule")),
        _line("COCO run lengths of them", _gpu("masks_to_rle", _MASKS)),
    ),
}


def rewrite(root: Path = ROOT) -> list[Path]:
    """Rewrite the tables of the documents of a checkout.

    Returns:
        The documents that changed.

    Raises:
        ValueError: a table or a row of it is not there; it is named.
    """
    changed = []
    for document in documents(root):
        before = document.read_text(encoding="utf-8")
        after = rewritten(before, root / "benchmarks" / "results")
        if after != before:
            changed.append(_write(document, after))
    return changed


def documents(root: Path = ROOT) -> list[Path]:
    """The Markdown files of a checkout that may have tables; none where there is no checkout."""
    return [file for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if file.is_file()]


def _write(path: Path, text: str) -> Path:
    return write_whole(path, lambda file: file.write(text.encode()))


def rewritten(text: str, folder: Path) -> str:
    """A document with its tables made from the files of a folder."""
    results: dict[Path, Results] = {}

    def read(name: str) -> _File:
        file = folder / f"{name}.json"
        if file not in results:
            results[file] = read_results(file)
        return file, results[file]

    def block(match: re.Match[str]) -> str:
        start, name, subject, end = match.groups()
        chosen = TABLES.get(name)
        if not chosen and not (folder / f"{name}.json").is_file():
            return f"{start}Not measured yet: there is no `benchmarks/results/{name}.json`.\n\n{end}"
        lines = _chosen(chosen, read) if chosen else _whole(read(name), subject)
        return f"{start}{lines}\n{end}"

    return _BLOCK.sub(block, text)


def _chosen(lines: Sequence[Line], read: Callable[[str], _File]) -> str:
    """The chosen lines, and where they were measured."""
    body = []
    for line in lines:
        pairs = [(pick, *_rows(read(pick.file), pick)) for pick in line.picks]
        peers = " / ".join(_time(peer) for _, _, peer in pairs)
        times = " / ".join(_time(ours) for _, ours, _ in pairs)
        ratios = " / ".join(_ratio(ours, peer) for _, ours, peer in pairs)
        work = line.work.format(note=pairs[0][1].note)
        body.append((work, f"{line.picks[0].peer} {peers}", times, ratios))
    files = [read(name) for name in dict.fromkeys(pick.file for line in lines for pick in line.picks)]
    return f"{_markdown(('Work', 'peer, ms', 'trimask, ms', 'ratio'), body)}\n\n{_origin(files)}\n"


def _rows(source: _File, pick: Pick) -> tuple[Row, Row]:
    """Ours and the peer's, which must have been timed."""
    file, results = source
    of_subject = [one for one in side_by_side(results.rows) if one.subject == pick.subject]
    found = []
    for comparison in of_subject:
        rows = {row.implementation: row for row in comparison.rows}
        fits = fnmatchcase(comparison.case, pick.case) and pick.dtype in (None, comparison.dtype)
        if fits and pick.ours in rows and pick.peer in rows:
            found.append((rows[pick.ours], rows[pick.peer]))
    if len(found) != 1:
        cases = "; ".join(f"{one.case} ({one.dtype})" for one in of_subject)
        raise ValueError(f"{file}: expected one case that fits {pick}, got {len(found)} of: {cases or 'none'}")
    ours, peer = found[0]
    if peer.p50_ms is None:
        raise ValueError(f"{file}: {peer.case}: expected a time of {pick.peer}, got {peer.note!r}")
    return ours, peer


def _time(row: Row) -> str:
    return "**WRONG**" if verdict(row) == "wrong" else figure(row.p50_ms) if row.p50_ms else "not timed"


def _ratio(ours: Row, peer: Row) -> str:
    """The median of the rounds' ratios where there is one, else that of the medians; losses are bold."""
    if ours.p50_ms is None or peer.p50_ms is None:
        return "-"
    ratio = ours.ratio_to_torchvision if peer.implementation == PEER else None
    return _times(ratio or peer.p50_ms / ours.p50_ms, beside(ours, peer))


def _times(ratio: float, other: str = "") -> str:
    """With the words for lower precision."""
    text = f"{ratio:.1f}x" if 1.05 <= ratio < 9.95 else times(ratio)
    return " ".join(filter(None, [f"**{text}**" if ratio < 1 else text, other]))


def _whole(source: _File, subject: str | None) -> str:
    """Every row of a file; what has no time in several cases for the same reason is told once, below."""
    file, results = source
    found = [one for one in side_by_side(results.rows) if subject in (None, one.subject)]
    if not found:
        raise ValueError(f"{file}: expected rows of {subject or 'any subject'}, got none")
    absent = missing(row for one in found for row in one.rows)
    shown = [(one, row) for one in found for row in one.rows if absent[row.implementation, row.note] < 2 or row.p50_ms]
    columns = {
        **({"op": lambda one, row: row.subject} if len({one.subject for one in found}) > 1 else {}),
        **_COLUMNS,
        **{name: of for name, of in _MORE.items() if any(of(one, row) for one, row in shown)},
        "note": lambda one, row: row.note,
    }
    body = [[of(one, row) for of in columns.values()] for one, row in shown]
    repeated = [
        f"{name} ({count} cases: {why or 'no reason given'})" for (name, why), count in absent.items() if count > 1
    ]
    below = f"Not timed: {'; '.join(repeated)}.\n\n" if repeated else ""
    return f"{_markdown(list(columns), body)}\n\n{below}{_origin([source])}\n"


def _spread(one: SideBySide, row: Row) -> str:
    if verdict(row) == "wrong":
        return "**WRONG**"
    return " / ".join(figure(x) for x in (row.p20_ms, row.p50_ms, row.p80_ms) if x is not None)


def _its_ratio(one: SideBySide, row: Row) -> str:
    ratio = row.ratio_to_torchvision
    return _times(ratio, beside(row, one.peer)) if ratio and verdict(row) != "wrong" else ""


def _number(name: str, divisor: float = 1.0, form: Callable[[float], str] = figure) -> _Column:
    def column(one: SideBySide, row: Row) -> str:
        value = getattr(row, name)
        return "" if value is None else form(value / divisor)

    return column


_COLUMNS: dict[str, _Column] = {
    "case": lambda one, row: row.case,
    "implementation": lambda one, row: row.implementation,
    "dtype": lambda one, row: row.dtype,
    "p20 / p50 / p80, ms": _spread,
    "ratio": _its_ratio,
}
_MORE: dict[str, _Column] = {  # where a row has it
    "first call, ms": _number("first_ms"),
    "peak, MB": _number("peak_bytes", 1e6),
    "box AP": _number("box_ap", form="{:.4f}".format),
    "mask AP": _number("mask_ap", form="{:.4f}".format),
}


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text of ours may have asterisks; what was raised may have anything."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _origin(sources: Sequence[_File]) -> str:
    """Where, with what and when: once each."""

    files = [results for _, results in sources]

    def said(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value))

    machines = said([one.environment.get("gpu") or one.environment.get("machine") for one in files])
    threads = said([row.threads for one in files for row in one.rows if row.device == "cpu"])
    ran = {row.implementation.partition(",")[0].replace(" ", "").lower() for one in files for row in one.rows}
    shown = {"torch", "torchvision", "pycocotools"} | {package for name, package in _PACKAGES.items() if name in ran}
    versions = said(
        [
            f"{name} {version}"
            for one in files
            for name, version in (one.environment.get("versions") or {}).items()
            if version and name in shown
        ]
    )
    commits = said([str(one.environment.get("commit") or "")[:7] for one in files])
    threads = f", {threads} thread{'' if threads == '1' else 's'}" if threads else ""
    names = ", ".join(f"`{file.name}`" for file, _ in sources)
    return f"p50; {machines}{threads}; {versions}; commit {commits}; from {names}."
