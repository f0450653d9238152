"""``python -m trimask.benchmarks ops --threads 1 --json results.json``."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

__all__ = ["main"]

SUBJECTS = ("ops", "models")  # each a module bench_SUBJECT with run(threads, quick), an iterator over lists of rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subject and print its table; 1 if an implementation was wrong, else 0."""
    parser = argparse.ArgumentParser("trimask.benchmarks", description="Speed against the peers, side by side.")
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine there")
    parser.add_argument("--quick", action="store_true", help="small inputs, two rounds: a check, not a measurement")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")

    # OpenMP, MKL and the OpenBLAS under numpy read these when they are loaded, which is below.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    from rich.console import Console

    from .harness import environment, report, write_json

    console = Console()
    rows = []
    for group in import_module(f".bench_{options.subject}", __package__).run(options.threads, options.quick):
        console.print(report(group), "")
        rows += group
    for name, value in environment().items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if options.json:
        write_json(options.json, rows)
    return int(any(row.correct is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
