"""``trimask train``: a model for your own pictures."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .console import open_console, progress
from .fields import add_fields, read_fields
from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.model.config import MaskRCNNConfig
    from ..engine.model.losses import LossConfig
    from ..engine.model.mask_rcnn import MaskRCNN
    from ..engine.training.trainer import Outcome

__all__ = ["add", "run"]

PRESETS = ("torchvision_v1", "torchvision_v2", "detectron2", "mmdet", "mobilenet")
CONVENTIONS = ("trimask", "torchvision", "detectron2")


def add(verbs: Verbs) -> None:
    from ..engine.model.losses import LossConfig
    from ..engine.training.augment import AugmentConfig
    from ..engine.training.config import TrainConfig

    train = add_verb(
        verbs,
        "train",
        run,
        "train a model on pictures of your own",
        "Writes config.json, metrics.jsonl, curves.png, samples/, best.safetensors and last.safetensors into the\n"
        "folder of the run. An interrupted run goes on with the same command and --resume.\n\n"
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
    train.add_argument("--preset", choices=PRESETS, help="architecture (that of the weights)")
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
    add_fields(train, AugmentConfig(flip=0.5), "augmentation", "augment")
    losses = train.add_argument_group("losses")
    losses.add_argument("--loss", choices=CONVENTIONS, default="trimask", help="whose conventions (%(default)s)")
    add_fields(train, LossConfig(), "single values of the losses", "loss")
    add_checkpoint_options(train)


def run(options: argparse.Namespace) -> int:
    import torch

    from ..engine.inference.predictor import Predictor
    from ..engine.training.augment import AugmentConfig
    from ..engine.training.config import TrainConfig
    from ..engine.training.data import CocoDataset
    from ..engine.training.distributed import processes
    from ..engine.training.starting import start
    from ..engine.training.trainer import Trainer

    config = read_fields(options, TrainConfig())
    augment = read_fields(options, AugmentConfig(flip=0.5), "augment")
    loss = read_fields(options, _conventions(options.loss), "loss")
    data = CocoDataset(options.train, options.images)
    begun = start(
        options.weights,
        data.class_names,
        data.category_ids,
        config=_preset(options.preset, data),
        changes=_changes(options),
        options=_options(options),
        seed=config.seed,
    )
    boxes_only = begun.model.mask_head is None
    data = CocoDataset(options.train, options.images, boxes_only=boxes_only)
    validation = None
    if options.val:
        validation = CocoDataset(
            options.val, options.val_images or options.images, category_ids=data.category_ids, boxes_only=boxes_only
        )
    with processes(options.device or ("cuda" if torch.cuda.is_available() else "cpu")) as group:
        console = open_console(stderr=True)
        console.quiet = not group.first

        def predictor(model: "MaskRCNN") -> Callable[..., Any]:
            predict = Predictor(model, device=group.device, capture=False).predict

            def shown(source: Any, **more: Any) -> Any:
                found = predict(source, **more)
                return progress(found, len(source), "evaluating") if more.get("stream") and group.first else found

            return shown

        with _Shown(console, config.iterations) as watch:
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
            for note in begun.notes:
                console.print(note, soft_wrap=True)
            console.print(
                f"{len(data)} pictures to learn from, {len(validation) if validation else 'none'} to evaluate on, "
                f"classes: {', '.join(data.class_names)}; iteration {trainer.iteration} of {config.iterations}",
                soft_wrap=True,
            )
            outcome = trainer.run()
        if group.first:
            _print(outcome, options.out)
    return 0
