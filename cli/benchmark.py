"""``trimask benchmark``: how fast it is here, beside what else could be taken."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..engine.model.files import is_exported
from .console import open_console
from .options import DTYPES, Verbs, add_checkpoint_options, add_verb, checkpoint_options, existing

if TYPE_CHECKING:
    from ..benchmarks.changes import Changes
    from ..benchmarks.results import Results, Row

__all__ = ["add", "run"]

BACKENDS = ("torch", "compiled", "onnxruntime", "openvino")
PAGE = Path("benchmark.html")
MARGIN = 20.0  # percent; on a busy machine two runs of the same code differed by up to 18, in ops of 0.2 ms


def add(verbs: Verbs) -> None:
    benchmark = add_verb(
        verbs,
        "benchmark",
        run,
        "measure speed beside torchvision and other programs",
        "Without weights: the bundled model and the ops. Outputs are compared before anything is timed. The exit\n"
        "status is 1 if one was wrong, or slower than in the file of --compare. docs/performance.md says what is\n"
        "measured how.\n\n"
        "examples:\n"
        "  trimask benchmark --quick\n"
        "  trimask benchmark r50.safetensors --sizes 480x640 1080x1920 --batches 1 4 --json now.json\n"
        "  trimask benchmark --json new.json --compare old.json\n"
        "  trimask benchmark --read new.json --compare old.json --html page.html     (measures nothing)",
    )
    benchmark.add_argument(
        "weights", nargs="*", metavar="WEIGHTS", help="checkpoints, published names, exported .onnx files"
    )
    benchmark.add_argument(
        "--sizes", nargs="+", type=_size, metavar="HxW", help="of the pictures (480x640 and 1080x1920; quick: 480x640)"
    )
    benchmark.add_argument("--batches", nargs="+", type=int, metavar="B", help="pictures at a time (1 4; quick: 1)")
    benchmark.add_argument("--pictures", nargs="+", default=(), metavar="PICTURE", help="to find objects in (samples)")
    benchmark.add_argument("--device", help="cpu, cuda, cuda:1 ... (the GPU if there is one)")
    benchmark.add_argument("--dtype", choices=DTYPES, help="precision (float32; an exported file's own)")
    benchmark.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="that run the weights (all of them)"
    )
    benchmark.add_argument("--threads", type=int, metavar="N", help="CPU threads (as many as there are processors)")
    benchmark.add_argument("--quick", action="store_true", help="a few minutes: small ops, few rounds, no compiler")
    benchmark.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each case")
    benchmark.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts of the results")
    benchmark.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="what got slower; status 1 if something did"
    )
    benchmark.add_argument(
        "--margin", type=float, default=MARGIN, metavar="PERCENT", help="change that is taken for noise (%(default)g)"
    )
    benchmark.add_argument("--read", type=Path, metavar="FILE", help="take these results, and measure nothing")
    benchmark.add_argument(
        "--report",
        nargs="*",
        type=Path,
        metavar="FILE",
        help=f"measure nothing: write the page of these result files to --html ({PAGE}); without FILE of the committed "
        "ones, from which the tables of README.md and docs/ are rewritten, too",
    )
    add_checkpoint_options(benchmark)


def run(options: argparse.Namespace) -> int:
    from ..benchmarks.threads import available, limit_threads

    _check(options)
    if options.report is not None:
        _write_page(options.report or _committed(), options.html or PAGE)
        return 0 if options.report else _rewrite_tables()
    threads = options.threads or available()
    limit_threads(threads)  # before torch is loaded, below

    from ..benchmarks.changes import judge, require_alike
    from ..benchmarks.machine import environment
    from ..benchmarks.results import read_results, write_json

    old = read_results(options.compare) if options.compare else None
    console = open_console()
    if options.read:
        results, status = _read(options.read, console)
    else:
        _choose_gpu(options.device)
        if old:
            require_alike(old, environment(), threads)  # before it takes minutes
        results, status = _measure(options, threads, console)
    if options.html:
        files = [file for file in (options.json, options.read) if file]
        if not files:  # the page is of files
            files = [options.html.with_suffix(".json")]
            write_json(files[0], results.rows, {"environment": results.environment, "ceilings": results.ceilings})
        _write_page(files[:1], options.html)
    if old:
        compared = judge(old, results, options.margin / 100)
        _print(console, compared, options.compare, options.margin)
        status |= int(compared.worse)
    return status


def _choose_gpu(device: str | None) -> None:
    """Make ``cuda:1`` the one that everything runs on."""
    import torch

    from ..benchmarks.bench_gpu import require

    chosen = torch.device(device or "cpu")
    if chosen.type == "cuda" and chosen.index is not None:
        require("cuda")
        torch.cuda.set_device(chosen)


def _check(options: argparse.Namespace) -> None:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {options.threads}")
    if min(options.batches or [1]) < 1:
        raise ValueError(f"batches: expected at least 1 each, got {min(options.batches)}")
    options.pictures = tuple(map(existing, options.pictures))
    if not 0 < options.margin < 50:
        raise ValueError(f"margin: expected more than 0 and less than 50 percent, got {options.margin:g}")
    if options.read and (options.weights or options.json or options.quick):
        raise ValueError("read: expected neither weights nor --json nor --quick with it, which measures nothing")
    if options.report is not None and (options.weights or options.read or options.json or options.compare):
        raise ValueError("report: expected neither weights nor --read, --json or --compare with it")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(int(found[1]), int(found[2])) < 1:
        raise argparse.ArgumentTypeError(f"expected height x width, such as 480x640, got {text!r}")
    return int(found[1]), int(found[2])


def _read(file: Path, console: Console) -> "tuple[Results, int]":
    from ..benchmarks.grouping import side_by_side
    from ..benchmarks.results import read_results
    from ..benchmarks.table import report

    results = read_results(file)
    for comparison in side_by_side(results.rows):
        console.print(report(comparison.rows), "")
    return results, int(any(row.correct is False for row in results.rows))


def _measure(options: argparse.Namespace, threads: int, console: Console) -> "tuple[Results, int]":
    import torch

    from ..benchmarks.installed import version
    from ..benchmarks.measuring import measure
    from ..benchmarks.results import Results

    torch.set_num_threads(threads)
    start = time.monotonic()

    def say(what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        print(f"{minutes}:{seconds:02}  {what}", file=sys.stderr, flush=True)

    for name in ("torch", "torchvision", "onnxruntime", "openvino", "pycocotools"):
        installed = version(name) or (version(f"{name}-gpu") if name == "onnxruntime" else None)
        console.print(f"{name:12} {installed or 'not installed'}")
    console.print()
    facts: dict[str, Any] = {}
    rows, status = measure(_groups(options, threads, facts, say), facts, options.json, console)
    say(f"{len(rows)} rows measured")
    return Results(facts["environment"], facts["ceilings"], rows), status


def _groups(
    options: argparse.Namespace, threads: int, facts: dict[str, Any], say: Callable[[str], None]
) -> "Iterator[list[Row]]":
    """The ops where no weights are named, then each model."""
    import torch

    from ..benchmarks.bench_gpu import require
    from ..benchmarks.measuring import ops, with_ceilings

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require(torch.device(device).type)
    say(f"what this {'CPU' if device == 'cpu' else 'GPU'} does at best")
    clock = with_ceilings(device, options.quick, facts)
    if not options.weights:
        say("the ops")
        yield from ops(clock, threads, options.quick)
    for weights in options.weights or ["people"]:
        yield from _model(options, weights, threads, device, say)


def _model(
    options: argparse.Namespace, weights: str, threads: int, device: str, say: Callable[[str], None]
) -> "Iterator[list[Row]]":
    from ..benchmarks.bench_weights import Work, run

    sizes = options.sizes or [(480, 640), (1080, 1920)][: 1 if options.quick else 2]
    batches = options.batches or [1, 4][: 1 if options.quick else 2]
    work = Work(
        weights,
        tuple(sizes),
        tuple(batches),
        device,
        options.dtype or _own_dtype(weights),
        tuple(options.backends),
        options.pictures,
        threads,
        options.quick,
        checkpoint_options(options),
    )
    yield from run(work, say)


def _own_dtype(weights: str) -> str:
    if not is_exported(weights):
        return "float32"
    from ..export.inspection import read_file

    return read_file(Path(weights))[1].precision


def _committed() -> list[Path]:
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"report: expected result files after it, since there are none in {folder}")
    return files


def _write_page(files: list[Path], target: Path) -> None:
    from ..benchmarks.page import write_page

    write_page(files, target)
    print(f"wrote {target}")


def _rewrite_tables() -> int:
    """In a checkout; an installed package has no documents."""
    from ..benchmarks.tables import documents, rewrite

    if documents():
        changed = rewrite()
        print("\n".join(f"rewrote the tables of {document}" for document in changed) or "no table changed")
    return 0


def _print(console: Console, compared: "Changes", old: Path, margin: float) -> None:
    for warning in compared.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    changed = [one for one in compared.judged if one.beyond_noise]
    if changed:
        table = Table("", "case", "speed", "held against", box=None, pad_edge=False)
        for one in sorted(changed, key=lambda one: one.speed):
            row = one.row
            against = f"{one.peer or 'nothing'}, by rule {one.rule!r}"
            table.add_row(
                "SLOWER" if one.slower else "faster",
                f"{row.subject}: {row.case}: {row.implementation}",
                f"{one.speed:.2f}x",
                against,
            )
        console.print(table)
    for row in compared.unjudged:
        console.print(
            f"not judged (few rounds, or threads on a busy machine): {row.subject}: {row.case}: {row.implementation}",
            soft_wrap=True,
        )
    for row in compared.lost:
        word = "WRONG" if row.correct is False else "not timed"
        console.print(f"{word} now: {row.subject}: {row.case}: {row.implementation}: {row.note}", soft_wrap=True)
    for where, rows in ((f"only in {old}", compared.only_old), ("only in this run", compared.only_new)):
        for row in rows:
            console.print(f"{where}: {row.subject}: {row.case}: {row.implementation}", soft_wrap=True)
    rules = [one.rule for one in compared.judged]
    used = ", ".join(f"{rules.count(rule)} by {rule!r}" for rule in ("interval", "spread", "alone") if rule in rules)
    drift = "no peer in both" if compared.drift is None else f"peers took {compared.drift:.2f}x as long as then"
    console.print(
        f"{len(compared.slower)} of {len(rules)} slower than in {old} beyond noise ({used or 'none in both'}; margin "
        f"{margin:g} %; {drift})",
        soft_wrap=True,
    )
