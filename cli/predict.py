"""``trimask predict``: objects and their masks in pictures."""

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.model.files import is_exported
from .console import open_console, print_result, progress
from .options import (
    Verbs,
    add_checkpoint_options,
    add_model_options,
    add_verb,
    add_weights_option,
    load_any,
)

if TYPE_CHECKING:
    from ..engine.inference.result import Result

__all__ = ["add", "check_folder", "run"]


def add(verbs: Verbs) -> None:
    predict = add_verb(
        verbs,
        "predict",
        run,
        "find objects and their masks in pictures",
        "examples:\n"
        "  trimask predict photo.jpg\n"
        "  trimask predict photos/ more/*.png --weights r50.safetensors --score 0.7 --output found/\n"
        "  trimask predict model.onnx photos/                 (no torch needed)\n"
        "  trimask predict photos/ --json > found.jsonl",
    )
    predict.add_argument("sources", nargs="+", metavar="PICTURE", help="pictures, folders, or quoted patterns")
    add_weights_option(predict, exported=True)
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
    add_model_options(predict)
    add_checkpoint_options(predict)


def run(options: argparse.Namespace) -> int:
    from ..engine.inference.result import to_dataset
    from ..engine.pictures.reading import expand

    console = open_console()
    models = [source for source in options.sources[1:] if is_exported(source)]
    if models:
        raise ValueError(f"expected a model before the pictures and once, got {models[0]} after {options.sources[0]}")
    if is_exported(options.sources[0]):  # no picture: the model
        if options.weights != "people":
            raise ValueError(f"expected one model, got {options.sources[0]} and --weights {options.weights}")
        options.weights = options.sources.pop(0)
        if not options.sources:
            raise ValueError(f"expected pictures after {options.weights}, got none")
    output = options.output or (None if options.json else Path("trimask-output"))
    if output:
        check_folder(output)
    sources = list(expand(options.sources))
    if output:  # which may be the folder of the pictures, with overlays that an earlier call has left among them
        asked = {Path(source) for source in options.sources}
        sources = [x for x in sources if not _is_overlay(Path(x), output) or Path(x) in asked]
        if not sources:
            raise ValueError(f"expected pictures, got nothing in {output} but the overlays of an earlier call")
    predictor = load_any(options, max_detections=options.max_detections, resize=options.resize)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    names = _unique_names(sources)
    done: list[Result] = []
    failed = 0  # overlays
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # failures are reported here
            stream = predictor.predict(
                sources, batch_size=options.batch_size, workers=options.workers, run_lengths=True, stream=True
            )
            for source, name, result in zip(sources, names, progress(stream, len(sources), "predicting"), strict=True):
                done.append(result.without_picture())  # keep what is small
                if result.error is not None:
                    print(f"trimask: {result.error}", file=sys.stderr)  # which names the picture
                elif output and not options.no_overlays:
                    try:
                        result.save(output / name)
                    except OSError as error:
                        failed += 1
                        print(f"trimask: {source}: no overlay: {error}", file=sys.stderr)
                if options.json:
                    print(json.dumps(_record(source, result)), flush=True)
                elif result.error is None:
                    brief = f"{len(done)}/{len(sources)}  " if len(sources) > 3 else ""
                    print_result(console, result, brief)
    finally:  # what is done stays done, whatever stops the rest
        good = [result for result in done if result.error is None]
        if output and good:
            written = to_dataset(good, predictor.config.categories, output / "detections.json")
            if not options.json:
                console.print(f"{len(good)} of {len(sources)} pictures; {written}", soft_wrap=True)
    return 0 if len(good) == len(sources) and not failed else 1


def check_folder(output: Path, name: str = "output") -> None:
    """See, before the work, that no file stands where results are to go."""
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{name}: expected a folder, got the file {path}")


def _unique_names(sources: Sequence[Path | str]) -> list[str]:
    """Names for the overlays, which overwrite neither each other nor a source, on any file system."""
    names: list[str] = []
    taken = {Path(source).name.casefold() for source in sources}  # which may be in the folder of the overlays
    numbers: Counter[str] = Counter()
    for source in sources:
        stem = Path(source).stem
        while True:
            numbers[stem.casefold()] += 1
            number = numbers[stem.casefold()]
            name = f"{stem}-overlay.jpg" if number == 1 else f"{stem}-overlay-{number}.jpg"
            if name.casefold() not in taken:
                break
        taken.add(name.casefold())
        names.append(name)
    return names


def _is_overlay(source: Path, output: Path) -> bool:
    """Whether it is one, by its name and what is noted in it, and lies where they are written."""
    if not re.search(r"-overlay(-\d+)?\.jpg$", source.name) or source.parent.resolve() != output.resolve():
        return False
    from PIL import Image

    from ..engine.inference.result import OVERLAY

    try:
        with Image.open(source, formats=["JPEG"]) as picture:
            return picture.info.get("comment") == OVERLAY
    except OSError:
        return False


def _record(source: Path | str, result: "Result") -> dict[str, Any]:
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
