"""``python -m trimask.benchmarks ops --threads 1 --json results.json``."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .threads import limit_threads

__all__ = ["main"]

SUBJECTS = {
    "ops": "the ops on a CPU",
    "models": "whole models on a CPU",
    "training": "a step of training on a CPU",
    "export": "exported files in the runtimes for a CPU",
    "gpu": "the ops and whole models on a GPU",
    "check": "the tests that need a GPU, then the ops and models on it, into one file",
    "tables": "measure nothing: rewrite the tables of the documents of a checkout from its files of results",
}
# Of what is measured on a GPU.
PRECISIONS = ("float16", "float32", "bfloat16", "tf32")  # of the grid of models, to measure one by itself
PARTS = ("roi", "boxes", "pixels", "epilogue", "gradients", "training", "models", "compiled")
GPU_MINUTES = 8.5


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
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds: a check, not a measurement")
    parser.add_argument(
        "--minutes",
        type=float,
        help="leave out what does not fit, by name (as long as the subject mostly takes); check: stop then (8.5)",
    )
    group = parser.add_argument_group("export")
    group.add_argument("--data", type=Path, metavar="FILE", help="COCO annotations to measure the people model's AP on")
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of their pictures")
    group.add_argument("--calibrate", type=Path, nargs="+", metavar="PICTURE", help="for 8 bits (samples)")
    group = parser.add_argument_group("gpu, check")
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try them without a GPU")
    parts = ("tests", *PARTS)
    group.add_argument(
        "--only",
        nargs="+",
        choices=(*parts, *PRECISIONS),
        default=parts,
        help="these parts alone (gpu: without tests), or the models' cells in a precision",
    )
    group.add_argument("--commit", help="of sources that are no checkout; by default $TRIMASK_COMMIT")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if (options.data is None) != (options.images is None):
        parser.error("--data, --images: expected both of them or neither")

    limit_threads(options.threads)  # before torch is loaded, below
    if options.minutes is None and options.subject in ("gpu", "check"):
        options.minutes = GPU_MINUTES
    if options.commit:
        os.environ["TRIMASK_COMMIT"] = options.commit
    try:
        if options.subject == "check":
            from .check import check

            return check(options.device, options.quick, options.only, options.json, 60 * options.minutes)
        if options.subject == "tables":
            from .tables import rewrite

            print("\n".join(map(str, rewrite())) or "no table changed")
            return 0
        return _measure(options)
    except ValueError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from .measuring import measure

    torch.set_num_threads(options.threads)
    facts: dict[str, Any] = {}
    _, status = measure(_groups(options, facts), facts, options.json, Console())
    return status


def _groups(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Any]:
    """The rows of each case; what was measured of the device goes into the facts."""
    from .measuring import above_floors, with_ceilings

    bench = import_module(f".bench_{options.subject}", __package__)
    if options.subject == "gpu":
        clock = with_ceilings(options.device, options.quick, facts)
        facts["finished"] = False
        parts = [part for part in (*PARTS, *PRECISIONS) if part in options.only]
        yield from bench.run(clock, options.quick, parts, 60 * options.minutes)
        facts["finished"] = True
        return
    clock = with_ceilings("cpu", options.quick, facts)
    more: dict[str, Any] = {} if options.minutes is None else {"minutes": options.minutes}
    if options.subject == "export":
        more["data"] = bench.Data(options.data, options.images, options.calibrate or ())
    yield from above_floors(bench.run(options.threads, options.quick, **more), clock)


if __name__ == "__main__":
    sys.exit(main())
