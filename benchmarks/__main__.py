"""``python -m trimask.benchmarks ops --threads 1 --json results.json``."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["main"]

SUBJECTS = {
    "ops": "the ops on a CPU",
    "models": "whole models on a CPU",
    "training": "a step of training on a CPU",
    "gpu": "the ops and whole models on a GPU",
    "check": "the tests that need a GPU, then the ops and models on it, into one file",
    "page": "measure nothing: write a page of HTML about files of results",
    "tables": "measure nothing: rewrite the tables of the documents of a checkout from its files of results",
}
PARTS = ("roi", "boxes", "pixels", "gradients", "models")  # of what is measured on a GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subject and print its table, or write what was measured; 1 if an implementation was wrong, else 0."""
    parser = argparse.ArgumentParser(
        "trimask.benchmarks",
        description="Speed against the peers, side by side.",
        epilog="\n".join(f"{name:8} {text}" for name, text in SUBJECTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine there")
    parser.add_argument("--quick", action="store_true", help="small inputs, two rounds: a check, not a measurement")
    group = parser.add_argument_group("page")
    group.add_argument("--files", nargs="+", type=Path, metavar="FILE", help="by default all that were committed")
    group.add_argument("--html", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")
    group = parser.add_argument_group("gpu, check")
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try them without a GPU")
    parts = ("tests", *PARTS)
    group.add_argument("--only", nargs="+", choices=parts, default=parts, help="these parts alone; gpu: without tests")
    stop = "check: stop after so many; gpu: let the models begin nothing new when they are near (%(default)s)"
    group.add_argument("--minutes", type=float, default=8.5, help=stop)
    group.add_argument("--commit", help="of sources that are no checkout; by default $TRIMASK_COMMIT")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")

    # OpenMP, MKL and the OpenBLAS under numpy read these when they are loaded, which is below.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    if options.commit:
        os.environ["TRIMASK_COMMIT"] = options.commit
    try:
        if options.subject == "check":
            from .check import check

            return check(options.device, options.quick, options.only, options.json, 60 * options.minutes)
        if options.subject == "page":
            from .page import write_page

            files = options.files or sorted(Path(__file__).with_name("results").glob("*.json"))
            print(write_page(files, options.html))
            return 0
        if options.subject == "tables":
            from .tables import rewrite

            print("\n".join(map(str, rewrite())) or "no table changed")
            return 0
        return _measure(options)
    except ValueError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .harness import environment, report, write_json

    console = Console()
    facts: dict[str, Any] = {"environment": environment()}
    rows: list[Any] = []
    for group in _groups(options, facts):
        console.print(report(group), "")
        rows += group
        if options.json:  # each time, so that a run that is stopped leaves what it has
            write_json(options.json, rows, facts)
    for name, value in facts["environment"].items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if options.json:
        write_json(options.json, rows, facts)
    return int(any(row.correct is False for row in rows))


def _groups(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Any]:
    """The rows of each case; what was measured of a GPU goes into the facts."""
    bench = import_module(f".bench_{options.subject}", __package__)
    if options.subject != "gpu":
        yield from bench.run(options.threads, options.quick)
        return
    clock, ceilings = bench.start(options.device, options.quick)
    facts |= {"ceilings": asdict(ceilings), "finished": False}
    yield from bench.run(clock, options.quick, [part for part in PARTS if part in options.only], 60 * options.minutes)
    facts["finished"] = True


if __name__ == "__main__":
    sys.exit(main())
