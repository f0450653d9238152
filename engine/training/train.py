"""Training in one call: the data, the model to start from, and the loop, put together."""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..model import presets
from ..model.checkpoints.options import Options
from ..model.loss_config import TERMS, LossConfig
from .config import AUGMENT, AugmentConfig, TrainConfig
from .data import CocoDataset
from .distributed import processes
from .progress import Progress, unseen
from .run_folder import Line
from .starting import start
from .trainer import Outcome, Trainer

__all__ = ["train"]


def train(
    annotations: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    validation: Path | str | None = None,
    validation_images: Path | str | None = None,
    weights: Path | str | None = None,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    masks: bool = True,
    device: str | torch.device | None = None,
    resume: bool = False,
    augment: AugmentConfig = AUGMENT,
    loss: LossConfig | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    watch: Callable[[int, Line | None], None] = lambda iteration, line: None,
    progress: Progress = unseen,
    **settings: Any,
) -> Outcome:
    """Train a model on a data set in COCO's format; ``trimask train`` is this function.

    Under ``torchrun``, or in a process group that the caller has made, the processes share the work, and the first
    one says and writes what there is. A group of the caller's keeps its timeout, which the others spend waiting while
    the first draws and writes, and each of its processes its device.

    Args:
        annotations: what to learn from, a COCO JSON file.
        images: the folder that its file names start from.
        out: the folder of the run, such as ``runs/mine``: weights, metrics, curves and sample predictions.
        validation: what to evaluate on, a COCO JSON file; None: nothing.
        validation_images: the folder of its pictures, if it is another one.
        weights: a Mask R-CNN checkpoint of any family or a published name, whose classes of the same names are kept; an
            ImageNet classifier, whose trunk is kept; None: begin at random, which takes very many pictures.
        preset: another architecture than that of the weights, a name in :mod:`trimask.engine.model.presets`.
        changes: other values in the model's config by dotted name, such as ``{"mask_head.class_agnostic": True}``.
        masks: False: boxes only.
        device: by default the GPU if there is one.
        resume: go on with the run in ``out``, or begin one where there is none.
        augment: what is changed at random in the pictures.
        loss: its conventions and weights; :attr:`.LossConfig.TORCHVISION` and ``DETECTRON2`` are others.
        options: of the checkpoint, as :func:`trimask.load` takes them, such as ``{"min_size": 480}``.
        say: takes what there is to read, a line at a time; by default it goes to stderr.
        watch: called with the number of updates so far: after each with None, and with every line of the metrics.
        progress: wraps what is done with each picture to evaluate on, and their number, to show how far it got.
        **settings: the fields of :class:`.TrainConfig`: ``iterations``, ``batch``, ``learning_rate``, ``workers`` ...

    Returns:
        How the run ended; ``outcome.weights`` is the file of the best model.

    Raises:
        TypeError: an unknown setting.
        ValueError: arguments that do not fit each other, the data, or the run in the folder.
        FileExistsError: there is a run in the folder, and it is not to be resumed, or it is at work.
        PictureError: a picture to evaluate on cannot be read, or is of another size than its annotations say.
        FloatingPointError: a loss is not a finite number; names the pictures. What was saved last is kept.
        RuntimeError: a process that reads pictures died.
    """
    config = TrainConfig(**settings)
    data = CocoDataset(annotations, images)
    names, ids = data.class_names, data.category_ids
    if preset is not None and preset not in presets.__all__:
        raise ValueError(f"preset: expected one of {', '.join(presets.__all__)}, got {preset!r}")
    begun = start(
        weights,
        names,
        ids,
        config=getattr(presets, preset)(names, ids) if preset else None,
        changes=[*([] if masks else [("mask_head", None)]), *(changes or {}).items()],
        options=Options.of(dict(options or {})),
        seed=config.seed,
    )
    data.boxes_only = begun.model.mask_head is None
    held_out = None
    if validation is not None:
        held_out = CocoDataset(validation, validation_images or images, like=data, boxes_only=data.boxes_only)
    with processes(device or ("cuda" if torch.cuda.is_available() else "cpu")) as group:
        if config.precision == "float16" and group.device.type == "cpu":
            raise ValueError(
                "precision: expected bfloat16 or float32 on a CPU, which float16 makes far slower, got float16"
            )

        def watched(iteration: int, line: Line | None) -> None:
            if group.first:
                watch(iteration, line)
                if line:
                    say(_text(line))

        trainer = Trainer(
            out,
            begun,
            data,
            held_out,
            config,
            augment,
            loss or LossConfig(),
            processes=group,
            resume=resume,
            watch=watched,
            progress=progress if group.first else unseen,
        )
        if group.first:
            objects = {entry["category_id"] for record in data.records for entry in record.annotations}
            without = [name for name, number in zip(names, ids, strict=True) if number not in objects]
            for note in [*begun.notes, *trainer.notes]:
                say(note)
            missing = [record.path for record in data.records if not record.path.is_file()]
            if missing:
                say(f"{len(missing)} pictures are missing, such as {missing[0]}; others take their places")
            learned = {record.path for record in data.records}
            if known := sum(record.path in learned for record in (held_out.records if held_out else ())):
                say(f"{known} of the pictures to evaluate on are among those to learn from: figures will be too good")
            if without:
                say(f"classes without objects to learn: {', '.join(without)}")
            say(
                f"{len(data) - len(missing)} pictures to learn from, "
                f"{len(held_out) if held_out else 'none'} to evaluate on, "
                f"classes: {', '.join(names)}; iteration {trainer.iteration} of {config.iterations}, "
                f"{config.optimizer} at a rate of {config.peak_rate():.2g}"
            )
        return trainer.run()


def _text(line: Line) -> str:
    """A line of the metrics for people."""

    def shown(names: Iterable[str], factor: int = 1) -> str:
        return "  ".join(f"{name} {factor * line[name]:.3f}" for name in names if name in line)

    if "loss" not in line:
        return f"{line['iteration']:>6}  {shown(('bbox_AP', 'bbox_AP50', 'segm_AP', 'segm_AP50'), 100)}"
    return (
        f"{line['iteration']:>6}  loss {line['loss']:.3f}  ({shown(TERMS)})  rate {line['learning_rate']:.2g}  "
        f"{line['seconds']:.2f} s"
    )
