"""``trimask profile``: where the time goes, stage by stage."""

import argparse
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..engine.model.files import write_json
from .console import open_console
from .options import (
    Verbs,
    add_checkpoint_options,
    add_model_options,
    add_verb,
    add_weights_option,
    checkpoint_options,
    existing,
    load,
    portrait,
)

if TYPE_CHECKING:
    from ..engine.inference.profiling import Profile

__all__ = ["add", "run"]


def add(verbs: Verbs) -> None:
    profile = add_verb(
        verbs,
        "profile",
        run,
        "measure where the time goes, stage by stage",
        "Writes profile.json, stages.png (needs matplotlib) and trace.json, which https://ui.perfetto.dev opens.\n\n"
        "examples:\n"
        "  trimask profile\n"
        "  trimask profile street.jpg --weights r50.safetensors --device cuda --dtype float16 --batch 8",
    )
    profile.add_argument("picture", nargs="?", help="a picture; by default a portrait that scikit-image brings")
    add_weights_option(profile)
    profile.add_argument(
        "--batch-size",
        "--batch",
        dest="batch",
        type=int,
        default=1,
        metavar="B",
        help="copies of it at a time (%(default)s)",
    )
    profile.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="scale the picture to that first")
    profile.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls (%(default)s)")
    profile.add_argument("--output", "-o", type=Path, default=Path("profile"), help="folder to write to (%(default)s)")
    add_model_options(profile)
    add_checkpoint_options(profile)


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's tracer complains where there is no GPU
    from ..benchmarks.machine import environment
    from ..engine.inference.profiling import draw_chart, profile, write_trace

    if min(options.batch, options.rounds, *options.size or ()) < 1:
        raise ValueError("batch, rounds, size: expected at least 1 each")
    console = open_console()
    picture = existing(options.picture) if options.picture else portrait("profile")
    sources = [_scaled(picture, options.size)] * options.batch
    predictor = load(options, options.weights, **checkpoint_options(options))
    measured = profile(predictor, sources, options.rounds)
    _print_profile(console, measured)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment(), "picture": str(picture), "weights": options.weights}
    facts |= dataclasses.asdict(measured)
    facts |= {"shares": measured.shares, "pictures_per_second": measured.pictures_per_second}
    written = [write_json(options.output / "profile.json", facts, indent=1)]
    try:
        written.append(draw_chart(measured, options.output / "stages.png"))
    except ImportError as error:
        print(f"trimask: no chart: {error}", file=sys.stderr)
    written.append(write_trace(predictor, sources, list(measured.stages), options.output / "trace.json"))
    console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _scaled(picture: Path, size: tuple[int, int] | None) -> bytes:
    """The file's content; at another size as a JPEG."""
    if size is None:
        return picture.read_bytes()
    from PIL import Image

    from ..engine.pictures.reading import read

    out = io.BytesIO()
    Image.fromarray(read(picture).array).resize(size[::-1]).save(out, "JPEG", quality=95)
    return out.getvalue()


def _print_profile(console: Console, measured: "Profile") -> None:
    batch, (height, width), (rows, columns) = len(measured.pictures), measured.pictures[0], measured.network
    console.print(
        f"{measured.predictor}, {batch} x {height} x {width} at {rows} x {columns}, "
        f"{sum(measured.detections)} detections, {measured.rounds} rounds, {measured.threads} threads",
        soft_wrap=True,
    )
    table = Table("ms a call", "p20", "p50", "p80", "share", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rest = {"whole call": measured.call, "Predictor.predict": measured.predict}
    for name, spread in (measured.stages | rest).items():
        share = f"{measured.shares[name]:.1%}" if name in measured.shares else ""
        table.add_row(name, *(f"{x:.2f}" for x in (spread.p20, spread.p50, spread.p80)), share)
    console.print(table)
    memory = "unknown" if measured.memory_bytes is None else f"{measured.memory_bytes / 1e6:.0f} MB"
    console.print(f"first call {measured.first_ms:.0f} ms; {measured.pictures_per_second:.2f} pictures a second")
    console.print(f"peak memory {memory}, {measured.memory_of}")
    for note in measured.notes:
        console.print(f"note: {note}", soft_wrap=True)
