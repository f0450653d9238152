"""The command line: ``trimask demo | predict | convert | warmup | profile | info``.

Results go to stdout, progress and complaints to stderr. Exit status: 0, all done; 1, something failed (a bad picture
among many does not stop the others); 2, wrong usage; 130, interrupted.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .engine.model.files import write_whole

if TYPE_CHECKING:
    import torch

    from .engine.inference.predictor import Predictor
    from .engine.inference.profiling import Profile
    from .engine.inference.result import Result

__all__ = ["main"]

MODEL_COLUMN = 46  # the longest name of a published model
DTYPES = ("float32", "bfloat16", "float16")
PLAIN = "plain torch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("trimask: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        print(f"trimask: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trimask",
        description="Mask R-CNN: exact, fast, easy to install.",
        epilog="example:\n  trimask predict photo.jpg --output found/\n\n`trimask VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trimask {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    demo = verb(
        "demo",
        _demo,
        "segment a photograph with the bundled model",
        "examples:\n  trimask demo\n  trimask demo holiday.jpg --output found/",
    )
    demo.add_argument("picture", nargs="?", help="a picture of people; by default a portrait that scikit-image brings")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    _add_model_options(demo)

    predict = verb(
        "predict",
        _predict,
        "find objects and their masks in pictures",
        "examples:\n"
        "  trimask predict photo.jpg\n"
        "  trimask predict photos/ more/*.png --weights r50.safetensors --score 0.7 --output found/\n"
        "  trimask predict photos/ --json > found.jsonl",
    )
    predict.add_argument("sources", nargs="+", metavar="PICTURE", help="pictures, folders, or quoted patterns")
    predict.add_argument(
        "--weights", "-w", default="people", help="checkpoint or published name (%(default)s, bundled)"
    )
    predict.add_argument("--output", "-o", type=Path, help="folder for overlays and detections.json (trimask-output)")
    predict.add_argument("--no-overlays", action="store_true", help="write detections.json alone")
    predict.add_argument(
        "--json", action="store_true", help="one JSON object per picture on stdout, no tables; files only with --output"
    )
    predict.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at a time (%(default)s)")
    predict.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="threads that read pictures ahead of the device (%(default)s: one batch after the other)",
    )
    predict.add_argument("--max-detections", type=int, metavar="N", help="per picture (the model's: mostly 100)")
    predict.add_argument("--resize", type=int, metavar="PIXELS", help="short side inside the network (the model's)")
    _add_model_options(predict)
    _add_checkpoint_options(predict)

    convert = verb(
        "convert",
        _convert,
        "turn a checkpoint of torchvision, Detectron2 or MMDetection into safetensors",
        "Architecture and class count are read from the checkpoint's keys; the options say what keys cannot.\n\n"
        "examples:\n"
        "  trimask convert model_final_f10217.pkl r50.safetensors\n"
        "  trimask convert mine.pth mine.safetensors --classes cat dog --min-size 640 --half",
    )
    convert.add_argument("source", help="checkpoint, or the name of a published model")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--half", action="store_true", help="store float16: half the size")
    convert.add_argument("--json", action="store_true", help="report as JSON")
    _add_checkpoint_options(convert)

    warmup = verb(
        "warmup",
        _warmup,
        "compile what a model needs on a GPU, ahead of its first picture",
        "Kernels are compiled once for a machine and kept: `trimask info` says where.\n\n"
        "examples:\n"
        "  trimask warmup r50.safetensors --dtype float16\n"
        "  trimask warmup r50.safetensors --size 1080 1920 --size 480 640 --batch 1 8",
    )
    warmup.add_argument(
        "weights", nargs="?", default="people", help="checkpoint or published name (%(default)s, bundled)"
    )
    warmup.add_argument(
        "--size",
        type=int,
        nargs=2,
        action="append",
        metavar=("H", "W"),
        help="of the pictures (480 640); may be repeated",
    )
    warmup.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="B", help="numbers of pictures at a time (1)"
    )
    _add_device_options(warmup)
    _add_checkpoint_options(warmup)

    profile = verb(
        "profile",
        _profile,
        "measure where the time goes, stage by stage",
        "Writes profile.json, stages.png (needs matplotlib) and trace.json, which https://ui.perfetto.dev opens.\n\n"
        "examples:\n"
        "  trimask profile\n"
        "  trimask profile street.jpg --weights r50.safetensors --device cuda --dtype float16 --batch 8",
    )
    profile.add_argument("picture", nargs="?", help="a picture; by default a portrait that scikit-image brings")
    profile.add_argument(
        "--weights", "-w", default="people", help="checkpoint or published name (%(default)s, bundled)"
    )
    profile.add_argument("--batch", type=int, default=1, metavar="B", help="copies of it at a time (%(default)s)")
    profile.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="scale the picture to that first")
    profile.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls (%(default)s)")
    profile.add_argument("--output", "-o", type=Path, default=Path("profile"), help="folder to write to (%(default)s)")
    _add_model_options(profile)
    _add_checkpoint_options(profile)

    info = verb("info", _info, "show versions, device and kernels in use", "example:\n  trimask info --models")
    info.add_argument("--models", action="store_true", help="list the published models that load by name")
    info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score to report (%(default)s; 0.05 to evaluate)"
    )
    _add_device_options(parser)


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (the GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (%(default)s)")


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a foreign checkpoint's keys cannot say (default: its family's convention)")
    group.add_argument("--min-size", type=int, metavar="PIXELS", help="short side of the resized picture")
    group.add_argument("--max-size", type=int, metavar="PIXELS", help="limit of its long side")
    group.add_argument("--anchor-sizes", type=float, nargs="+", metavar="SIZE", help="one for each of the five levels")
    group.add_argument("--aspect-ratios", type=float, nargs="+", metavar="RATIO", help="of anchors, height over width")
    group.add_argument("--activation", choices=("relu", "relu6"), help="of a MobileNetV2 trunk")
    group.add_argument("--norm-eps", type=float, metavar="EPS", help="epsilon of the trunk's batch norms")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="names of the foreground classes, in order")
    group.add_argument("--style", choices=("pytorch", "caffe"), help="of an MMDetection trunk")


def _checkpoint_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("min_size", "max_size", "anchor_sizes", "aspect_ratios", "activation", "norm_eps", "classes", "style")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _load(options: argparse.Namespace, weights: str, **more: Any) -> "Predictor":
    import torch

    from .engine.inference.predictor import load

    return load(weights, device=options.device, dtype=getattr(torch, options.dtype), score=options.score, **more)


def _demo(options: argparse.Namespace) -> int:
    console = _console()
    if options.picture:
        picture, resize = _existing(options.picture), None
    else:
        # The bundled model learned from whole people in the street: a portrait must be small for it.
        picture, resize = _portrait("demo"), 200
    predictor = _load(options, "people", resize=resize)
    predictor.predict(picture)  # the first call also pays for the allocation of every buffer
    result = predictor.predict(picture)
    options.output.mkdir(parents=True, exist_ok=True)
    _print_result(console, result)
    for what, suffix in (("overlay", "-overlay.png"), ("COCO JSON", ".json")):
        console.print(f"{what:9} {result.save(options.output / (picture.stem + suffix))}", soft_wrap=True)
    return 0


def _existing(picture: str) -> Path:
    if not Path(picture).is_file():
        raise ValueError(f"expected a picture, found no file at {picture!r}")
    return Path(picture)


def _portrait(verb: str) -> Path:
    """Eileen Collins, NASA, public domain: one of scikit-image's sample pictures."""
    try:
        from skimage.data import data_dir
    except ImportError:
        raise ImportError(
            f"{verb}: expected scikit-image, whose sample portrait is the default picture; pip install scikit-image, "
            f"or name a picture: trimask {verb} PICTURE"
        ) from None
    return Path(data_dir) / "astronaut.png"


def _predict(options: argparse.Namespace) -> int:
    from .engine.inference.result import to_dataset
    from .engine.pictures.reading import expand

    console = _console()
    sources = list(expand(options.sources))
    predictor = _load(
        options,
        options.weights,
        max_detections=options.max_detections,
        resize=options.resize,
        **_checkpoint_options(options),
    )
    output = options.output or (None if options.json else Path("trimask-output"))
    if output:
        output.mkdir(parents=True, exist_ok=True)
    names = _unique_names(sources)
    done: list[Result] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # failures are reported here
            stream = predictor.predict(
                sources, batch_size=options.batch_size, workers=options.workers, run_lengths=True, stream=True
            )
            for source, name, result in zip(sources, names, _progress(stream, len(sources)), strict=True):
                done.append(result.without_picture())  # keep what is small
                if result.error is not None:
                    print(f"trimask: {source}: {result.error}", file=sys.stderr)
                elif output and not options.no_overlays:
                    result.save(output / f"{name}.jpg")
                if options.json:
                    print(json.dumps(_record(source, result)), flush=True)
                elif result.error is None:
                    brief = f"{len(done)}/{len(sources)}  " if len(sources) > 3 else ""
                    _print_result(console, result, brief)
    finally:  # what is done stays done, whatever stops the rest
        good = [result for result in done if result.error is None]
        if output and done:
            classes = dict(zip(predictor.config.category_ids, predictor.config.class_names, strict=True))
            written = to_dataset(good, classes, output / "detections.json")
            if not options.json:
                console.print(f"{len(good)} of {len(sources)} pictures; {written}", soft_wrap=True)
    return 0 if len(good) == len(sources) else 1


def _convert(options: argparse.Namespace) -> int:
    import torch

    from .engine.model.checkpoints import convert

    if options.target.suffix != ".safetensors":
        raise ValueError(f"target: expected a .safetensors file, got {options.target}")
    report = convert(
        options.source,
        options.target,
        dtype=torch.float16 if options.half else None,
        **_checkpoint_options(options),
    )
    megabytes = options.target.stat().st_size / 1e6
    if options.json:
        facts = {
            "source": str(report.source),
            "target": str(options.target),
            "family": report.family,
            "architecture": report.architecture,
            "parameters": report.parameters,
            "notes": report.notes,
            "config": json.loads(report.config.to_json()),
        }
        print(json.dumps(facts))
        return 0
    print(f"{report.source.name}: {report.family}, {report.architecture}, {report.parameters / 1e6:.1f} M parameters")
    for note in report.notes:
        print(f"  assumed: {note}")
    print(f"wrote {options.target}, {megabytes:.1f} MB")
    return 0


def _warmup(options: argparse.Namespace) -> int:
    import torch

    from .engine.inference.predictor import load
    from .kernels.dispatch import use_triton

    console = _console()
    predictor = load(
        options.weights, device=options.device, dtype=getattr(torch, options.dtype), **_checkpoint_options(options)
    )
    shapes = [(tuple(size), batch) for size in options.size or [(480, 640)] for batch in options.batch]
    before = _cache()[1]
    total = 0.0
    for done, (size, batch) in enumerate(shapes, start=1):
        seconds = predictor.warmup(size, batch)
        total += seconds
        pictures = f"{batch} picture{'s' * (batch > 1)} of {size[0]} x {size[1]}"
        console.print(f"{done}/{len(shapes)}  {pictures}  {seconds:.1f} s")
    if use_triton(predictor.device):
        folder, after = _cache()
        console.print(
            f"{predictor}: ready in {total:.1f} s; {folder} grew by {(after - before) / 1e6:.1f} MB", soft_wrap=True
        )
    else:
        console.print(f"{predictor}: runs; there is nothing to compile, the kernels are plain torch", soft_wrap=True)
    return 0


def _profile(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's tracer complains where there is no GPU
    from .benchmarks.harness import environment
    from .engine.inference.profiling import draw_chart, profile, write_trace

    if min(options.batch, options.rounds, *options.size or ()) < 1:
        raise ValueError("batch, rounds, size: expected at least 1 each")
    console = _console()
    picture = _existing(options.picture) if options.picture else _portrait("profile")
    sources = [_scaled(picture, options.size)] * options.batch
    predictor = _load(options, options.weights, **_checkpoint_options(options))
    measured = profile(predictor, sources, options.rounds)
    _print_profile(console, measured)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment(), "picture": str(picture), "weights": options.weights}
    facts |= {**dataclasses.asdict(measured), "shares": measured.shares}
    text = json.dumps({**facts, "pictures_per_second": measured.pictures_per_second}, indent=1).encode()
    written = [write_whole(options.output / "profile.json", lambda file: file.write(text))]
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

    from .engine.pictures.reading import read

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


def _info(options: argparse.Namespace) -> int:
    import torch

    from .engine.model.checkpoints import PUBLISHED

    cuda = torch.cuda.is_available()
    kernels, why = _kernels(torch.device("cuda" if cuda else "cpu"))
    folder, size = _cache()
    facts = {
        "trimask": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "pillow", "safetensors", "torchvision")},
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "kernels because": why,
        "C compiler": _c_compiler(),
        "kernel cache": str(folder),
        "kernel cache bytes": size,
    }
    if options.json:
        print(json.dumps({**facts, "models": [dataclasses.asdict(model) for model in PUBLISHED.values()]}))
        return 0
    console = _console()
    joined = {"kernels": f"{kernels} ({why})", "kernel cache": f"{folder}, {size / 1e6:.1f} MB"}
    for name, value in (facts | joined).items():
        if name not in ("kernels because", "kernel cache bytes"):
            console.print(f"{name:12} {value if value is not None else 'not installed'}", soft_wrap=True)
    if kernels != PLAIN and facts["C compiler"] is None:
        console.print("Triton takes a C compiler: install gcc or clang, or set CC")
    if options.models:
        print(f"\n{'name':{MODEL_COLUMN}} box AP  mask AP")
        for model in PUBLISHED.values():
            note = f"not here: {model.unsupported}" if model.unsupported else model.licence
            print(f"{model.name:{MODEL_COLUMN}} {model.box_ap:6}  {model.mask_ap or '':7}  {note}")
    return 0


def _kernels(device: "torch.device") -> tuple[str, str]:
    """What the ops run on a device, and why."""
    from .kernels.dispatch import use_triton

    version = _version("triton")
    choice = os.environ.get("TRIMASK_KERNELS") or "auto"
    asked = f"TRIMASK_KERNELS={choice}"
    if use_triton(device):
        return "Triton" if version is None else f"Triton {version}", asked if choice == "triton" else "a GPU and triton"
    if choice == "torch":
        return PLAIN, asked
    return PLAIN, "no CUDA device" if device.type == "cpu" else "triton is not installed"


def _c_compiler() -> str | None:
    """The compiler that Triton would take."""
    if named := os.environ.get("CC"):
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def _cache() -> tuple[Path, int]:
    """Where Triton keeps what it compiled, and its size in bytes."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be at work there
            size += file.stat().st_size if file.is_file() else 0
    return folder, size


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _console(stderr: bool = False) -> Console:
    """Paths and class names are printed as they are: brackets in them are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _progress(stream: Iterable["Result"], total: int) -> Iterable["Result"]:
    if total < 2:
        yield from stream
        return
    # Never on the terminal that gets the results too, and never in their way when they go to a file.
    console = _console(stderr=True)
    silent = not console.is_terminal or sys.stdout.isatty()
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False, disable=silent
    ) as progress:
        yield from progress.track(stream, total)


def _unique_names(sources: Iterable[Path]) -> list[str]:
    """Names for the overlays, which overwrite neither each other nor a source, on any file system."""
    names: list[str] = []
    taken: set[str] = set()
    for source in sources:
        name, number = f"{source.stem}-overlay", 1
        while name.casefold() in taken:
            number += 1
            name = f"{source.stem}-overlay-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _record(source: Path, result: "Result") -> dict[str, Any]:
    if result.error is not None:
        return {"path": str(source), "error": str(result.error)}
    height, width = result.size
    return {
        "path": str(source),
        "width": width,
        "height": height,
        "detections": [
            {"label": name, **entry} for name, entry in zip(result.names, result.to_coco(str(source)), strict=True)
        ],
        "timings_ms": result.timings,
    }


def _print_result(console: Console, result: "Result", brief: str = "") -> None:
    height, width = result.size
    total = sum(result.timings.values())
    found = ", ".join(f"{count} {name}" for name, count in Counter(result.names).most_common()) or "nothing found"
    console.print(
        f"{brief}{result.path or 'picture'}  {width} x {height}  {found}  {total:.0f} ms",
        soft_wrap=True,
        highlight=False,
    )
    if brief:
        return
    table = Table("label", "score", "box x1 y1 x2 y2", "mask area", box=None, pad_edge=False)
    for row in result.table():
        area = "-" if row["mask_area"] is None else f"{row['mask_area']:,} px"
        table.add_row(row["label"], f"{row['score']:.3f}", "  ".join(f"{side:.0f}" for side in row["box"]), area)
    if len(result):
        console.print(table)
    stages = "  ".join(f"{stage} {spent:.1f}" for stage, spent in result.timings.items())
    console.print(f"ms per stage: {stages}", soft_wrap=True)
