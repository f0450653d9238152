"""The command line: ``trimask VERB``, one module for each verb.

Results go to stdout, progress and complaints to stderr. Exit status: 0, all done; 1, something failed (a bad picture
among many does not stop the others); 2, wrong usage; 130, interrupted by Ctrl-C or SIGTERM.
"""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from .. import __version__
from . import benchmark, check_data, convert, demo, evaluate, export, info, predict, profile, train, warmup

__all__ = ["main"]

VERBS = (
    demo,
    predict,
    evaluate,
    check_data,
    train,
    convert,
    export,
    warmup,
    profile,
    benchmark,
    info,
)  # in the order of the help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        with _as_a_command():
            return options.run(options)
    except KeyboardInterrupt:
        print("trimask: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, FloatingPointError) as error:
        # At once, with its newline: of several processes one line must not end in another's.
        sys.stderr.write(f"trimask: {error}{_advice(error)}\n")
        return 1


@contextmanager
def _as_a_command() -> Iterator[None]:
    """SIGTERM, by which schedulers and containers stop what they run, is as Ctrl-C; a warning is a line of its own."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        place = "" if category is UserWarning else f" ({category.__name__} at {filename}:{lineno})"
        sys.stderr.write(f"trimask: {message}{place}\n")

    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if alone else None
    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            if alone:
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _advice(error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError) or error.name != "torch":
        return ""
    return ": pip install torch, which all needs but `trimask predict`, `eval` and `info` with an exported .onnx file"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trimask",
        description="Mask R-CNN: exact, fast, easy to install.",
        epilog="example:\n  trimask predict photo.jpg --output found/\n\n`trimask VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trimask {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return parser
