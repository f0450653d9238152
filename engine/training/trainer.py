"""The training loop: end to end, all five losses at once (Mask R-CNN, He et al., 2017, section 3.1).

An update reads the batch, sums the losses, goes back through the model and lets the optimiser step. On a GPU nothing in
it waits for the device: a gradient that is not finite makes the optimiser skip the update there, and the losses are
looked at a few updates late. With several processes each has its part of every batch, and what they learn is what one
process with the whole batch would.

A run is a pure function of its configuration: every random choice depends on the seed, the iteration and the place in
the batch alone. So one that was interrupted goes on from its last state as if nothing had happened.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..inference.predictor import Predictor
from ..model.loss_config import TERMS, LossConfig
from ..model.mask_rcnn import MaskRCNN
from .augment import Augment
from .config import AugmentConfig, TrainConfig
from .data import CocoDataset, Record, read_upright
from .detection import detect
from .distributed import Processes
from .evaluate import KINDS, check_truth, evaluate
from .loading import Batch, loader
from .objective import Objective
from .optimizing import MovingAverage, freeze, learning_rate, make_optimizer, norms, training_mode
from .progress import Progress, unseen
from .readings import Reading, Window
from .reporting import Reporter
from .run_folder import Line, RunFolder
from .starting import Start
from .stopping import Stop, stop_signals

__all__ = ["Outcome", "Trainer"]

LATE = 3  # updates until a GPU's losses are looked at

Watch = Callable[[int, Line | None], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        reason: "finished", "no better for ... evaluations", or the signal that interrupted it.
        interrupted: there was more to do.
        iteration: updates that were made.
        summary: the last evaluation's figures, empty where there was none.
        best: the best value of the figure that decides, and its iteration; None without an evaluation.
        folder: of the run.
    """

    reason: str
    interrupted: bool
    iteration: int
    summary: dict[str, float]
    best: tuple[float, int] | None
    folder: Path

    @property
    def weights(self) -> Path:
        """The best model, or the last where none was evaluated."""
        return self.folder / ("best.safetensors" if self.best else "last.safetensors")


class Trainer:
    """A training run in a folder.

    Args:
        out: the folder of the run.
        start: the model, and which of its tensors came from where. It is trained in place.
        data: what to learn from.
        validation: what to evaluate on; None: nothing, and no best weights.
        config, augment, loss: what to do.
        processes: this one among all.
        resume: go on with the run in the folder, or begin one where there is none.
        watch: called with the number of updates so far: after each with None, and with every line of the metrics.
        progress: wraps what is done with each picture to evaluate on, and their number, to show how far it got.

    Attributes:
        notes: what to tell about the run that is resumed.

    Raises:
        ValueError: arguments that do not fit each other, or the run in the folder.
        FileExistsError: there is a run in the folder, and it is not to be resumed.
    """

    def __init__(
        self,
        out: Path | str,
        start: Start,
        data: CocoDataset,
        validation: CocoDataset | None,
        config: TrainConfig,
        augment: AugmentConfig,
        loss: LossConfig,
        *,
        processes: Processes,
        resume: bool = False,
        watch: Watch = lambda iteration, line: None,
        progress: Progress = unseen,
    ) -> None:
        self.config = config
        self.data = data
        self.validation = validation
        self.processes = processes
        self.watch = watch
        self.progress = progress
        _check(start.model, data, validation, config, processes)
        self.augment = Augment(augment, start.model.config.input)
        self.folder = RunFolder(Path(out), _description(start, data, validation, config, augment, loss), resume)

        model = start.model.to(processes.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        freeze(model, config, start.reused)
        if any(norm.weight.requires_grad and not norm.eps for norm in norms(model)):
            raise ValueError("norm_eps: expected more than 0 for norms that learn, got 0; 1e-5 is usual")
        self.average = MovingAverage(model, config.ema)  # also what is evaluated and saved: plain layers
        if config.norms == "synchronised" and processes.count > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model: MaskRCNN = model
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "float16")
        if config.compile:
            model.backbone.compile()
            model.fpn.compile()
        objective: nn.Module = Objective(model, config, loss, processes)
        if processes.count > 1:
            live = any(x.weight.requires_grad for x in norms(model))  # the others' statistics are the same everywhere
            objective = DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=live)
        self.objective = objective
        self.iteration = 0
        self._window = Window()
        self._since = time.perf_counter(), 0
        self._late: deque[Reading] = deque()
        self._best: tuple[float, int] | None = None
        self._without_better = 0
        self._summary: dict[str, float] = {}
        self._owes_evaluation = False
        self._criterion = (
            None
            if validation is None
            else [_decisive(config, model), sha256(validation.annotations.read_bytes()).hexdigest()]
        )
        self.notes: list[str] = []
        if self.folder.state:
            self._restore(self.folder.state)
        processes.gather(None)  # all have read what the first may now write

    def run(self) -> Outcome:
        """Train until the end.

        Raises:
            FloatingPointError: a loss is not a finite number; names the pictures. What was saved last is kept.
            RuntimeError: a process that reads pictures died.
            FileExistsError: another run is at work in the folder.
            PictureError: a picture to evaluate on that cannot be read, or is of another size.
        """
        first = self.processes.first
        with self.folder.open() if first else nullcontext():
            self.reporter = Reporter(self.folder, first)
            if self.folder.state is None:
                self._read_validation()
            with stop_signals() as stop, _deterministic(self.config.deterministic):
                reason = self._train(stop)
            self._sync_average()
            if first:
                self.reporter.close()
        return Outcome(reason, not self._end(), self.iteration, self._summary, self._best, self.folder.path)

    def _read_validation(self) -> None:
        """See now, rather than after hours, that the pictures to evaluate on can be read."""
        mine = self._share_of_validation()
        with ThreadPoolExecutor(max(self.config.workers, 1)) as pool:
            for _ in self.progress(pool.map(_check_readable, mine), len(mine)):
                pass

    def _train(self, stop: Stop) -> str:
        if self._owes_evaluation:
            self._evaluated()
        with closing(self._batches()) as batches:
            return self._updates(batches, stop)

    def _updates(self, batches: Iterator[Batch], stop: Stop) -> str:
        config = self.config
        training_mode(self.model)
        self._since = time.perf_counter(), self.iteration
        while not self._end():
            self._late.append(self._update(batches, stop))
            self.iteration += 1
            last = self.iteration == config.iterations
            due = [
                last or (every > 0 and self.iteration % every == 0)
                for every in (config.log_every, config.evaluate_every, config.save_every)
            ]
            late = LATE if self.processes.device.type == "cuda" and not any(due) else 0
            stopped = ""
            while len(self._late) > (0 if stopped else late):
                stopped = self._check_losses(self._late.popleft(), stop) or stopped
            if due[0]:
                self._log(self._measured())
            if due[1] or due[2] or stopped:
                self._owes_evaluation = due[1] and self.validation is not None
                self._save()  # first of all: an evaluation may meet anything
                if self._owes_evaluation:
                    self._evaluated()
                self._since = time.perf_counter(), self.iteration
            self.watch(self.iteration, None)
            if stopped:
                return self._end() or stopped
        return self._end()

    def _end(self) -> str:
        """Why nothing is left to do; empty while something is."""
        if self.iteration >= self.config.iterations:
            return "finished"
        if self.config.patience and self._without_better >= self.config.patience:
            return f"no better for {self.config.patience} evaluations"
        return ""

    def _batches(self) -> Generator[Batch, None, None]:
        config = self.config
        self.data.polygons = config.polygons and not self.data.boxes_only  # else nobody reads them
        return loader(
            self.data,
            self.augment,
            batch_size=config.batch // config.accumulate,
            workers=config.workers,
            seed=config.seed,
            rank=self.processes.rank,
            world_size=self.processes.count,
            start_iteration=self.iteration * config.accumulate,
            aspect_grouping=config.aspect_grouping,
            repeat_threshold=config.repeat_threshold,
            pin_memory=self.processes.device.type == "cuda",
        )

    def _update(self, batches: Iterator[Batch], stop: Stop) -> Reading:
        """One update of the weights, started but perhaps not done yet."""
        config, device = self.config, self.processes.device
        rate = learning_rate(config, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: list[Tensor] = []
        paths: list[str] = []
        for part in range(config.accumulate):
            batch = next(batches)
            paths += batch.paths
            whole = part == config.accumulate - 1
            ddp = self.objective if isinstance(self.objective, DistributedDataParallel) and not whole else None
            with ddp.no_sync() if ddp else nullcontext():
                seeds = self._seeds(self.iteration * config.accumulate + part, len(batch.image))
                terms = self.objective(batch.to(device), seeds.to(device, non_blocking=True))
                self.scaler.scale(terms.sum() / config.accumulate).backward()
            sums.append(terms.detach())
        norm = self._step()
        asked = torch.full_like(norm, float(bool(stop)))
        values = self.processes.average(torch.cat([torch.stack(sums).mean(0), torch.stack([norm, asked])]))
        return Reading.of(values, self.iteration, paths)

    def _seeds(self, number: int, pictures: int) -> Tensor:
        """What is sampled in each picture of this process's part of a batch, the first batch being 0; int64 [B]."""
        first = (number * self.processes.count + self.processes.rank) * pictures
        seeds = (self.config.seed << 32) + first + torch.arange(pictures)
        return seeds.pin_memory() if self.processes.device.type == "cuda" else seeds

    def _step(self) -> Tensor:
        """Let the optimiser update the weights where the gradient is finite; the norm of the gradient."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_norm:
            clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.ema:
            self.average.update(self.model, self.iteration)
        return norm.detach().float()

    def _check_losses(self, reading: Reading, stop: Stop) -> str:
        """Take in an update's losses; why to stop, if it is so."""
        *terms, norm, asked = reading.wait()
        if not all(map(math.isfinite, terms)):
            sound = all(bool(x.isfinite().all()) for x in self.model.state_dict().values())  # statistics may be spoilt
            if sound and not self.folder.has_state:  # else an earlier one is the better one to begin with
                self._save()
            shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(TERMS, terms, strict=False))
            paths = [path for part in self.processes.gather(reading.paths) for path in part]
            raise FloatingPointError(
                f"iteration {reading.iteration}: expected finite losses, got {shown}, from {', '.join(paths)}. The "
                f"update was left out, and what was saved last is in {self.folder.path}; a new run from those weights "
                "with a lower learning rate, a longer warm-up or a limit of the gradient's norm may help"
            )
        self._window.add([*terms, norm])
        return (stop.reason or "stopped with another process") if asked else ""

    def _evaluated(self) -> None:
        self._log(self._evaluate())
        self._owes_evaluation = False
        self._save()

    def _evaluate(self) -> Line:
        """Figures of the weights so far, on all processes; keeps the weights where they are the best."""
        assert self.validation is not None
        self._sync_average()
        model = self.average.model
        self.processes.share(model.buffers())  # live norms saw other pictures in each process
        predict = Predictor(model, device=self.processes.device, capture=False).predict
        mine = self._share_of_validation()
        categories = {model.config.category_ids[label]: theirs for theirs, label in self.validation.labels.items()}
        stream = self.progress(detect(predict, mine, categories), len(mine))
        found = {record.image_id: entries for record, entries in zip(mine, stream, strict=True)}
        shares = self.processes.gather(found)
        summary = None
        if self.processes.first:
            by_id = {image: entries for share in shares for image, entries in share.items()}
            ordered = [entry for record in self.validation.records for entry in by_id[record.image_id]]
            evaluation = evaluate(
                ordered,
                self.validation.annotations,
                category_ids=self.validation.category_ids,
                kinds=_kinds(model),
            )
            summary = {name: value for name, value in evaluation.summary.items() if not math.isnan(value)}
        self._summary = summary = self.processes.gather(summary)[0]
        figure = summary[_decisive(self.config, model)]
        if self._best is None or figure > self._best[0]:
            self._best, self._without_better = (figure, self.iteration), 0
            if self.processes.first:
                self.folder.save_model(model, "best", self.iteration)
        else:
            self._without_better += 1
        if self.processes.first:
            self.reporter.draw(predict, self.validation.records[: self.config.samples], self.iteration)
        return {"iteration": self.iteration, **summary}

    def _share_of_validation(self) -> Sequence[Record]:
        records = self.validation.records if self.validation else []
        return records[self.processes.rank :: self.processes.count]

    def _measured(self) -> Line:
        """Means since the last line."""
        began, iteration = self._since
        *terms, norm = self._window.mean()
        line: Line = {"iteration": self.iteration, "loss": sum(terms), **dict(zip(TERMS, terms, strict=False))}
        line |= {"gradient_norm": norm if math.isfinite(norm) else None}
        line |= {"learning_rate": learning_rate(self.config, self.iteration - 1)}
        line |= {"seconds": (time.perf_counter() - began) / (self.iteration - iteration)}
        if self.processes.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self.processes.device) / 2**30
        self._window, self._since = Window(), (time.perf_counter(), self.iteration)
        return line

    def _log(self, line: Line) -> None:
        if self.processes.first:
            self.reporter.log(line)
        self.watch(self.iteration, line)

    def _sync_average(self) -> None:
        if not self.config.ema:
            self.average.copy(self.model)

    def _save(self) -> None:
        if not self.processes.first:
            return
        self._sync_average()
        self.folder.save_model(self.average.model, "last", self.iteration)
        self.folder.save_state(
            {
                "iteration": self.iteration,
                "model": self.model.state_dict(),
                "average": self.average.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "window": asdict(self._window),
                "judge": self._criterion,
                "best": self._best,
                "without_better": self._without_better,
                "summary": self._summary,
                "owes_evaluation": self._owes_evaluation,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._window = Window(**state["window"])
        self._owes_evaluation = state["owes_evaluation"]
        before = state.get("judge", self._criterion)
        if self.validation is None or before == self._criterion:
            self._criterion = before
            self._best = state["best"] and tuple(state["best"])
            self._without_better = state["without_better"]
            self._summary = state["summary"]
        else:
            self._owes_evaluation = True
            self.notes.append("evaluated on other pictures or by another figure than before: the best is sought anew")


def _check(
    model: MaskRCNN,
    data: CocoDataset,
    validation: CocoDataset | None,
    config: TrainConfig,
    processes: Processes,
) -> None:
    for name, dataset in (("data", data), ("validation", validation)):
        if dataset is None:
            continue
        if dataset.class_names != model.config.class_names:
            raise ValueError(
                f"{name}: expected the model's classes, {model.config.class_names}, got {dataset.class_names}"
            )
        if dataset.boxes_only != (model.mask_head is None):
            raise ValueError(f"{name}: expected masks for a model with a mask head, and boxes only for one without")
    if all(annotation.get("iscrowd") for record in data.records for annotation in record.annotations):
        crowds = sum(len(record.annotations) for record in data.records)
        hint = f" but {crowds} marked as crowds (iscrowd), which are never learned" if crowds else ""
        raise ValueError(f"{data.annotations}: expected objects to learn, got none{hint}")
    if model.mask_head and not any(a.get("segmentation") for record in data.records for a in record.annotations):
        raise ValueError(
            f"{data.annotations}: expected masks to learn, got boxes alone: train a model of boxes (--no-masks)"
        )
    if not any(record.path.is_file() for record in data.records):
        raise ValueError(f"{data.annotations}: expected its pictures, found none such as {data.records[0].path}")
    if validation is None:
        if config.evaluate_every:
            raise ValueError("evaluate_every: expected a validation set with it, got none")
    else:  # now, rather than after hours
        lost = [str(record.path) for record in validation.records if not record.path.is_file()]
        if lost:
            raise ValueError(
                f"{validation.annotations}: expected all its pictures, {len(lost)} are missing, such as {lost[0]}"
            )
        nothing = check_truth(validation.annotations, _kinds(model), validation.category_ids)
        if math.isnan(nothing[figure := _decisive(config, model)]):
            raise ValueError(
                f"best: expected a figure of objects in {validation.annotations}, got {figure}, of none there"
            )
    if config.batch % (config.accumulate * processes.count):
        raise ValueError(
            f"batch: expected a multiple of {config.accumulate} parts times {processes.count} processes, "
            f"got {config.batch}"
        )
    if config.norms == "synchronised" and processes.count > 1 and processes.device.type == "cpu":
        raise ValueError(
            "norms: expected frozen or live ones on a CPU, which torch cannot synchronise, got synchronised"
        )


def _check_readable(record: Record) -> None:
    read_upright(record.path, record.size)


def _decisive(config: TrainConfig, model: MaskRCNN) -> str:
    """The figure by which weights are the best."""
    return config.best if model.mask_head is not None else config.best.replace("segm", "bbox")


def _kinds(model: MaskRCNN) -> tuple[str, ...]:
    """What there is of a model to evaluate."""
    return KINDS if model.mask_head is not None else ("bbox",)


def _description(
    start: Start,
    data: CocoDataset,
    validation: CocoDataset | None,
    config: TrainConfig,
    augment: AugmentConfig,
    loss: LossConfig,
) -> dict[str, Any]:
    objects = sum(len(record.annotations) for record in data.records)
    return {
        "source": start.source,
        "annotations": str(data.annotations),
        "validation": str(validation.annotations) if validation else None,
        "train": asdict(config),
        "decisive": {
            "train": config.without_housekeeping(),
            "augment": asdict(augment),
            "loss": asdict(loss),
            "data": {"pictures": len(data), "objects": objects, "category_ids": data.category_ids},
            "model": json.loads(start.model.config.to_json()),
        },
    }


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Have torch refuse what would differ from run to run."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
