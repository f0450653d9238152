"""``trimask eval``: COCO's average precision of a model on a data set, or of detections from anywhere."""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .. import __version__
from ..engine.model.files import is_exported, write_json
from .console import open_console, progress
from .options import (
    Verbs,
    add_checkpoint_options,
    add_device_options,
    add_verb,
    add_weights_option,
    checkpoint_options,
    load_any,
)
from .predict import check_folder

if TYPE_CHECKING:
    from ..engine.training.detection import Source
    from ..engine.training.evaluate import Evaluation

__all__ = ["add", "run"]

Found = dict[Any, list[dict[str, Any]]]  # the detections of each image id
Detected = tuple[Found, set[int]]  # and the data set's ids of the classes that the model has


def add(verbs: Verbs) -> None:
    evaluate = add_verb(
        verbs,
        "eval",
        run,
        "measure COCO's average precision on a data set",
        "Writes detections.json, metrics.json, curves.png (needs matplotlib) and worst.jpg, the pictures with the\n"
        "lowest F1. Several processes share the work with --processes, or under torchrun.\n\n"
        "examples:\n"
        "  trimask eval --weights detectron2/mask_rcnn_R_50_FPN_3x --data COCO/\n"
        "  trimask eval --weights mine.safetensors --data instances_val.json --images photos/ --workers 4\n"
        "  trimask eval --detections results.json --data instances_val.json",
    )
    add_weights_option(evaluate, exported=True)
    evaluate.add_argument(
        "--detections",
        type=Path,
        metavar="JSON",
        help="to score instead of a model: a COCO results file, or what `trimask predict` wrote",
    )
    evaluate.add_argument(
        "--data",
        type=Path,
        required=True,
        help="COCO annotation file, or a folder with annotations/instances_val2017.json",
    )
    evaluate.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the pictures (in a data set's folder it is found)"
    )
    evaluate.add_argument("--categories", nargs="+", metavar="NAME", help="count these alone (all of the data set)")
    evaluate.add_argument("--kinds", nargs="+", choices=("bbox", "segm"), help="bbox, segm (what the detections have)")
    evaluate.add_argument("--score", type=float, help="lowest score to count (the model's own, as published AP has it)")
    evaluate.add_argument(
        "--max-detections", type=int, metavar="N", help="per picture (the model's own), and of a class in it (100)"
    )
    evaluate.add_argument("--resize", type=int, metavar="PIXELS", help="short side inside the network (the model's)")
    evaluate.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at a time (%(default)s)")
    evaluate.add_argument(
        "--workers", type=int, default=0, metavar="N", help="threads that read pictures (%(default)s)"
    )
    evaluate.add_argument("--processes", type=int, default=1, metavar="N", help="that share the pictures (%(default)s)")
    evaluate.add_argument("--backend", choices=("pycocotools", "faster"), default="pycocotools", help="(%(default)s)")
    evaluate.add_argument("--output", "-o", type=Path, help="folder to write to (evaluation)")
    evaluate.add_argument("--json", action="store_true", help="figures as JSON on stdout; files only with --output")
    add_device_options(evaluate)
    add_checkpoint_options(evaluate)


def run(options: argparse.Namespace) -> int:
    from ..engine.training.detection import chosen_ids, data_set, lacking, sources
    from ..engine.training.evaluate import category_names, evaluate, kinds_in, read_results, read_truth

    limits = [options.batch_size, options.processes, options.threads, options.max_detections]
    if min(limit for limit in limits if limit is not None) < 1:
        raise ValueError("batch-size, processes, threads, max-detections: expected at least 1 each")
    output = options.output or (None if options.json else Path("evaluation"))
    if output:
        check_folder(output)
    annotations, images = data_set(options.data, options.images)
    content = read_truth(annotations)
    names = category_names(content)
    categories = chosen_ids(names, options.categories)
    pictures = sources(content, images) if images else []
    known = None  # the data set's ids of the model's classes, which detections alone do not tell
    if options.detections:
        given = [name for name in ("score", "resize") if getattr(options, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: expected with weights alone, got detections, all of which count")
        found = read_results(options.detections, content)
        if options.categories:
            found = [entry for entry in found if entry["category_id"] in categories]
    elif images is None:
        raise ValueError("images: expected the folder of the pictures (--images DIR), got none")
    else:
        detected = _detected(options, pictures, names)
        if detected is None:
            return 0  # the first process goes on with what all have found
        by_id, known = detected
        found = [x for picture in pictures for x in by_id[picture.image_id] if x["category_id"] in categories]
    evaluation = evaluate(
        found,
        content,
        category_ids=categories,
        max_detections=options.max_detections or 100,
        kinds=options.kinds or kinds_in(found),
        backend=options.backend,
    )
    facts = _facts(options, annotations, len(content["images"]), len(found))
    if known is not None:
        facts["known_categories"] = len(known & categories)
        evaluation.notes.extend(lacking(evaluation.per_class, known))
    facts |= evaluation.to_json()
    written = _write(output, evaluation, facts, pictures, None if options.detections else found) if output else []
    if options.json:
        print(json.dumps(facts))
    else:
        console = open_console()
        _print(console, evaluation, facts)
        console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _detected(
    options: argparse.Namespace, pictures: Sequence["Source"], categories: Mapping[int, str]
) -> Detected | None:
    """What as many processes as there are have found; None in all but the first."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if options.processes > 1:
            raise ValueError(f"processes: expected 1 under torchrun, which starts them, got {options.processes}")
        return _gathered(options, pictures, categories)
    if options.processes == 1:
        return _share(options, pictures, categories, 0, 1)
    count = options.processes
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        shares = [pool.submit(_share, options, pictures, categories, n, count) for n in range(count)]
        return _joined([share.result() for share in shares])
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # of which a signal may not have told
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _joined(shares: Sequence[Detected]) -> Detected:
    return {image: entries for found, _ in shares for image, entries in found.items()}, shares[0][1]


def _gathered(
    options: argparse.Namespace, pictures: Sequence["Source"], categories: Mapping[int, str]
) -> Detected | None:
    """One of the processes that torchrun started: its share, then those of all."""
    import torch

    from ..engine.training.distributed import processes

    with processes(options.device or ("cuda" if torch.cuda.is_available() else "cpu")) as group:
        options.device = str(group.device)
        shares = group.gather(_share(options, pictures, categories, group.rank, group.count))
        return _joined(shares) if group.first else None


def _share(
    options: argparse.Namespace, pictures: Sequence["Source"], categories: Mapping[int, str], rank: int, world: int
) -> Detected:
    """The detections of every world-th batch; batches are the same however many processes there are."""
    from ..engine.training.detection import detect, matched

    limits: dict[str, int | None] = {"max_detections": options.max_detections, "resize": options.resize}
    if options.processes > 1 and options.threads is None:
        options.threads = max(_cores(options.weights) // options.processes, 1)
    predictor = load_any(options, **limits)
    theirs, notes = matched(predictor.config.categories, categories, options.categories)
    mine = [picture for n, picture in enumerate(pictures) if n // options.batch_size % world == rank]
    stream = detect(predictor.predict, mine, theirs, batch_size=options.batch_size, workers=options.workers)
    if rank == 0:
        for note in notes:
            print(f"trimask: {note}", file=sys.stderr)
        stream = progress(stream, len(mine), "detecting")
    return {picture.image_id: entries for picture, entries in zip(mine, stream, strict=True)}, {*theirs.values()}


def _cores(weights: str) -> int:
    """What one process would compute with."""
    if is_exported(weights):
        return os.cpu_count() or 1
    import torch

    return torch.get_num_threads()


def _facts(options: argparse.Namespace, annotations: Path, pictures: int, detections: int) -> dict[str, Any]:
    """What the figures are of."""
    facts: dict[str, Any] = {"trimask": __version__, "data": str(annotations), "pictures": pictures}
    facts |= {"detections": detections, "max_detections": options.max_detections or 100}
    if options.detections:
        return facts | {"source": str(options.detections)}
    names = ("weights", "runtime", "dtype", "device", "score", "resize", "batch_size")
    return facts | {name: getattr(options, name) for name in names} | checkpoint_options(options)


def _write(
    output: Path,
    evaluation: "Evaluation",
    facts: Mapping[str, Any],
    pictures: Sequence["Source"],
    found: list[dict[str, Any]] | None,
) -> list[Path]:
    from ..engine.training.plots import draw_curves, draw_worst

    output.mkdir(parents=True, exist_ok=True)
    written = [write_json(output / "metrics.json", facts, allow_nan=False)]
    if found is not None:
        written.append(write_json(output / "detections.json", found, allow_nan=False))
    try:
        written.append(draw_curves(evaluation, output / "curves.png"))
    except ImportError as error:
        print(f"trimask: no curves: {error}", file=sys.stderr)
    sheet = draw_worst(evaluation, pictures, output / "worst.jpg") if pictures else None
    return written if sheet is None else [*written, sheet]


def _print(console: Console, evaluation: "Evaluation", facts: Mapping[str, Any]) -> None:
    from ..engine.training.evaluate import TITLES

    for note in evaluation.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"{facts['pictures']} pictures, {facts['detections']} detections")
    kinds = list(evaluation.curves)
    table = Table("points", *(TITLES[kind] for kind in kinds), box=None, pad_edge=False)
    for name in (key.partition("_")[2] for key in evaluation.summary if key.startswith(kinds[0])):
        table.add_row(name, *(_points(evaluation.summary[f"{kind}_{name}"]) for kind in kinds))
    classes = Table("class", "objects", box=None, pad_edge=False)
    for kind in kinds:
        for name in ("AP", "AP50"):
            classes.add_column(f"{TITLES[kind]} {name}")
    for row in evaluation.per_class:
        figures = (_points(row[f"{kind}_{name}"]) for kind in kinds for name in ("AP", "AP50"))
        classes.add_row(row["name"], str(row["objects"]), *figures)
    for each in (table, classes):
        for column in each.columns[1:]:
            column.justify = "right"
        console.print(each)


def _points(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{100 * figure:.2f}"
