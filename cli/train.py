"""``trimask train``: a model for your own pictures."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..engine.model import presets
from ..engine.model.loss_config import TERMS, LossConfig
from ..engine.training.config import AugmentConfig, TrainConfig
from .console import open_console, progress
from .fields import add_fields, read_fields
from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.model.mask_rcnn import MaskRCNN
    from ..engine.training.trainer import Outcome

__all__ = ["add", "run"]

AUGMENT = AugmentConfig(flip=0.5)  # what the command begins with
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
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run, such as runs/NAME")
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
    import torch

    from ..engine.inference.predictor import Predictor
    from ..engine.model.checkpoints.options import Options
    from ..engine.training.data import CocoDataset
    from ..engine.training.distributed import processes
    from ..engine.training.starting import start
    from ..engine.training.trainer import Trainer

    config = read_fields(options, TrainConfig())
    augment = read_fields(options, AUGMENT, "augment")
    loss = read_fields(options, CONVENTIONS[options.loss], "loss")
    data = CocoDataset(options.train, options.images)
    begun = start(
        options.weights,
        data.class_names,
        data.category_ids,
        config=getattr(presets, options.preset)(data.class_names, data.category_ids) if options.preset else None,
        changes=_changes(options),
        options=Options.of(checkpoint_options(options)),
        seed=config.seed,
    )
    data.boxes_only = begun.model.mask_head is None
    validation = None
    if options.val:
        validation = CocoDataset(
            options.val,
            options.val_images or options.images,
            like=data,
            boxes_only=data.boxes_only,
        )
    with processes(options.device or ("cuda" if torch.cuda.is_available() else "cpu")) as group:
        if config.precision == "float16" and group.device.type == "cpu":
            raise ValueError(
                "precision: expected bfloat16 or float32 on a CPU, which float16 makes far slower, got float16"
            )
        console = open_console(stderr=True)
        console.quiet = not group.first
        for note in begun.notes:
            console.print(note, soft_wrap=True)

        def predictor(model: "MaskRCNN") -> Callable[..., Any]:
            predict = Predictor(model, device=group.device, capture=False).predict

            def shown(source: Any, **more: Any) -> Any:
                found = predict(source, **more)
                return progress(found, len(source), "evaluating") if more.get("stream") and group.first else found

            return shown

        with _shown(console, config.iterations) as watch:
            trainer = Trainer(
                options.out,
                begun,
                data,
                validation,
                config,
                augment,
                loss,
                processes=group,
                predictor=predictor,
                resume=options.resume,
                watch=watch,
            )
            console.print(
                f"{len(data)} pictures to learn from, {len(validation) if validation else 'none'} to evaluate on, "
                f"classes: {', '.join(data.class_names)}; iteration {trainer.iteration} of {config.iterations}, "
                f"{config.optimizer} at a rate of {config.peak_rate():.2g}",
                soft_wrap=True,
            )
            outcome = trainer.run()
        if group.first:
            _print(outcome, options.out)
    return 130 if outcome.interrupted else 0


def _changes(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Values of the model's config to change."""
    changes: list[tuple[str, Any]] = [("mask_head", None)] if options.no_masks else []
    for text in options.set:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"set: expected NAME=VALUE, got {text!r}")
        try:
            changes.append((name, json.loads(value)))
        except json.JSONDecodeError:
            changes.append((name, value))
    return changes


@contextmanager
def _shown(console: "Console", total: int) -> Iterator[Callable[[int, dict[str, Any] | None], None]]:
    """A line for each of the metrics', and on a terminal a bar with the time that is left."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal)
    task = bar.add_task("training", total=total)

    def watch(iteration: int, line: dict[str, Any] | None) -> None:
        bar.update(task, completed=iteration)
        if line:
            console.print(_text(line), soft_wrap=True)

    with bar:
        yield watch


def _text(line: dict[str, Any]) -> str:
    def shown(names: Sequence[str], factor: int = 1) -> str:
        return "  ".join(f"{name} {factor * line[name]:.3f}" for name in names if name in line)

    if "loss" not in line:
        return f"{line['iteration']:>6}  {shown(('bbox_AP', 'bbox_AP50', 'segm_AP', 'segm_AP50'), 100)}"
    terms = shown(TERMS)
    return (
        f"{line['iteration']:>6}  loss {line['loss']:.3f}  ({terms})  rate {line['learning_rate']:.2g}  "
        f"{line['seconds']:.2f} s"
    )


def _print(outcome: "Outcome", out: Path) -> None:
    console = open_console()
    console.print(f"{outcome.reason} after {outcome.iteration} iterations: {out}", soft_wrap=True)
    if outcome.best:
        console.print(f"best {100 * outcome.best[0]:.2f} at iteration {outcome.best[1]}", soft_wrap=True)
