"""``trimask train``: a model for your own pictures."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..engine.model import presets
from ..engine.model.loss_config import LossConfig
from ..engine.training.config import AUGMENT, TrainConfig
from .console import open_console, progress
from .fields import add_fields, read_fields
from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options
from .predict import check_folder

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add", "run"]

CONVENTIONS = {"trimask": LossConfig(), "torchvision": LossConfig.TORCHVISION, "detectron2": LossConfig.DETECTRON2}


def add(verbs: Verbs) -> None:
    train = add_verb(
        verbs,
        "train",
        run,
        "train a model on pictures of your own",
        "Writes config.json, metrics.jsonl, curves.png, samples/, best.safetensors and last.safetensors into the\n"
        "folder of the run. An interrupted run ends with status 130 and goes on with the same command and --resume.\n\n"
        "examples:\n"
        "  trimask train --train train.json --val val.json --images photos/ --weights people --out runs/mine\n"
        "  torchrun --nproc-per-node 4 -m trimask train --train train.json --images photos/ --out runs/mine ...",
    )
    train.add_argument("--train", type=Path, required=True, metavar="JSON", help="COCO annotations to learn from")
    train.add_argument("--val", type=Path, metavar="JSON", help="COCO annotations to evaluate on")
    train.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    train.add_argument("--val-images", type=Path, metavar="DIR", help="folder of those to evaluate on (--images)")
    train.add_argument(
        "--out",
        "--output",
        "-o",
        dest="out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the run, such as runs/NAME",
    )
    train.add_argument(
        "--weights",
        "-w",
        help="start from: a checkpoint or published name, whose classes of the same names are kept; an ImageNet "
        "classifier of torchvision or timm, whose trunk is kept (nothing: from scratch)",
    )
    train.add_argument("--preset", choices=presets.__all__, help="architecture (that of the weights)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value in the model's config, such as mask_head.class_agnostic=true; may be repeated",
    )
    train.add_argument("--no-masks", action="store_true", help="boxes only")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    train.add_argument("--device", help="cpu, cuda, cuda:1 ... (the GPU if there is one)")
    add_fields(train, TrainConfig(), "training")
    add_fields(train, AUGMENT, "augmentation", "augment")
    losses = train.add_argument_group("losses")
    losses.add_argument("--loss", choices=CONVENTIONS, default="trimask", help="whose conventions (%(default)s)")
    add_fields(train, LossConfig(), "single values of the losses", "loss")
    add_checkpoint_options(train)


def run(options: argparse.Namespace) -> int:
    from ..engine.training.train import train

    config = read_fields(options, TrainConfig())
    check_folder(options.out, "out")
    first = int(os.environ.get("RANK", "0")) == 0  # of those that torchrun has started
    console = open_console(stderr=True)
    console.quiet = not first
    with _shown(console, config.iterations) as watch:
        outcome = train(
            options.train,
            options.images,
            options.out,
            validation=options.val,
            validation_images=options.val_images,
            weights=options.weights,
            preset=options.preset,
            changes=_changes(options),
            masks=not options.no_masks,
            device=options.device,
            resume=options.resume,
            augment=read_fields(options, AUGMENT, "augment"),
            loss=read_fields(options, CONVENTIONS[options.loss], "loss"),
            options=checkpoint_options(options),
            say=partial(console.print, soft_wrap=True),
            watch=watch,
            progress=partial(progress, what="pictures to evaluate on"),
            **vars(config),
        )
    if first:
        console = open_console()
        console.print(f"{outcome.reason} after {outcome.iteration} iterations: {outcome.folder}", soft_wrap=True)
        if outcome.best:
            console.print(f"best {100 * outcome.best[0]:.2f} at iteration {outcome.best[1]}", soft_wrap=True)
    return 130 if outcome.interrupted else 0


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Values of the model's config to change."""
    changes = {}
    for text in options.set:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"set: expected NAME=VALUE, got {text!r}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return changes


@contextmanager
def _shown(console: "Console", total: int) -> Iterator[Callable[[int, dict[str, Any] | None], None]]:
    """On a terminal a bar with the time that is left."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal)
    task = bar.add_task("training", total=total)

    def watch(iteration: int, line: dict[str, Any] | None) -> None:
        bar.update(task, completed=iteration)

    with bar:
        yield watch
