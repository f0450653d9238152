"""What happens to one batch on its device, and how it becomes results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.dispatch import current_device
from ...kernels.paste_rule import PasteRule
from ..model.config import DetectionConfig, MaskRCNNConfig
from ..model.mask_rcnn import Detections, MaskRCNN
from ..pictures.preprocess import make_batch
from ..pictures.reading import Picture
from .graph import run_lengths
from .result import Result
from .timing import Stopwatch, stopwatch

__all__ = ["RUN_CAPACITY", "Found", "Pending", "infer", "infer_boxes", "submit", "then_masks"]

# Runs of a mask that there is room for on the device: an object 2000 pixels wide has two a column. A picture with
# a mask that needs more gets probabilities, from which the host makes the runs.
RUN_CAPACITY = 4096


class Found(NamedTuple):
    """The fields of :class:`Detections`, and the run lengths of the masks where a device makes them.

    Attributes:
        runs: int32 [B, D, capacity], or None.
        lengths: int32 [B, D], how many runs each mask has, of which only ``capacity`` are kept; or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_logits: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in Detections
    runs: Tensor | None
    lengths: Tensor | None

    def to_host(self) -> "Found":
        """The same on the host: from a GPU on its way there, enqueued on the current stream."""
        return Found._make(None if x is None else _to_host(x) for x in self)


def infer(
    graph: MaskRCNN,
    rule: PasteRule,
    capacity: int | None,
    image: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    detection: DetectionConfig,
    mark: Callable[[str], None],
) -> Found:
    """The network, and the run lengths of its masks where there is a ``capacity`` for them."""
    found = graph(image, image_sizes, original_sizes, detection=detection, mark=mark)
    return _with_runs(found, original_sizes, rule, capacity, mark)


class Boxed(NamedTuple):
    """Detections without masks, and what those take.

    Attributes:
        p2, p3, p4, p5: the pyramid; the first alone where it has but one level.
        boxes: in the network's frame [B, D, 4].
        original_boxes, scores, labels, count: as in :class:`Detections`.
        original_sizes: int64 [B, 2].
    """

    p2: Tensor
    p3: Tensor | None
    p4: Tensor | None
    p5: Tensor | None
    boxes: Tensor
    original_boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]
    original_sizes: Tensor


def infer_boxes(
    graph: MaskRCNN,
    image: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    detection: DetectionConfig,
    mark: Callable[[str], None],
) -> Boxed:
    """The network up to its boxes."""
    pyramid, boxes, found = graph.find_boxes(image, image_sizes, original_sizes, detection=detection, mark=mark)
    levels = *pyramid[:4], *[None] * (4 - len(pyramid))
    return Boxed._make([*levels, boxes, found.boxes, found.scores, found.labels, found.count, original_sizes])


def then_masks(
    graph: MaskRCNN, rule: PasteRule, capacity: int | None, boxed: Boxed, detection: DetectionConfig
) -> tuple[int, Callable[[Callable[[str], None]], Found]]:
    """How many detections to make masks for, which waits for the device, and what makes them.

    That many is the next power of two: few sizes, so that each can be recorded.
    """
    most = int(boxed.count.max())
    rows = min(1 << max(most - 1, 0).bit_length(), boxed.labels.shape[1])
    return rows, partial(_masks, graph, rule, capacity, boxed, rows)


def _masks(
    graph: MaskRCNN, rule: PasteRule, capacity: int | None, boxed: Boxed, rows: int, mark: Callable[[str], None]
) -> Found:
    boxes, original, scores, labels = (
        x[:, :rows] for x in (boxed.boxes, boxed.original_boxes, boxed.scores, boxed.labels)
    )
    found = Detections(original, scores, labels, None, boxed.count)
    if graph.mask_head is not None:
        pyramid = [x for x in boxed[:4] if x is not None]
        found = found._replace(mask_logits=graph.find_masks(pyramid, boxes, labels, boxed.count))
        mark("masks")
    return _with_runs(found, boxed.original_sizes, rule, capacity, mark)


def _with_runs(
    found: Detections, original_sizes: Tensor, rule: PasteRule, capacity: int | None, mark: Callable[[str], None]
) -> Found:
    if capacity is None or found.mask_logits is None:
        return Found._make([*found, None, None])
    runs, lengths = run_lengths(found, original_sizes, rule, capacity)
    mark("run lengths")
    return Found._make([*found, runs, lengths])


@torch.inference_mode()
def submit(
    run: Callable[[tuple[Tensor, ...], tuple[Any, ...], Stopwatch], Found],
    pictures: list[tuple[Picture, float]],
    limits: DetectionConfig,
    config: MaskRCNNConfig,
    device: torch.device,
) -> "Pending":
    """Start one batch. On a GPU everything is enqueued on the current stream and nothing is waited for.

    Args:
        run: :func:`infer`, or :func:`infer_boxes` and :func:`then_masks`, eagerly or by a :class:`GraphRunner`.
        pictures: each with the milliseconds of its decoding.
    """
    with current_device(device):
        watch = stopwatch(device)
        batch = make_batch([picture.array for picture, _ in pictures], config.input, device)
        watch.mark("preprocess")
        # A graph is recorded by another thread, which does not know this one's autocast: without one, both are alike.
        with torch.autocast(device.type, enabled=False):
            found = run(batch, (limits,), watch).to_host()
        watch.mark("copy")
    return Pending(found, pictures, config, watch)


@dataclass(eq=False)
class Pending:
    """A batch on its way."""

    found: Found
    pictures: list[tuple[Picture, float]]
    config: MaskRCNNConfig
    watch: Stopwatch

    @torch.inference_mode()
    def results(self) -> list[Result]:
        """Wait for the batch and make a result of each of its pictures."""
        self.watch.wait()
        shared = {stage: spent / len(self.pictures) for stage, spent in self.watch.milliseconds().items()}
        return [self._result(i, picture, {"decode": ms, **shared}) for i, (picture, ms) in enumerate(self.pictures)]

    def _result(self, i: int, picture: Picture, timings: dict[str, float]) -> Result:
        found, n = self.found, int(self.found.count[i])
        labels = _rows(found.labels, i, n)
        runs = _whole_runs(found, i, n)
        probabilities = None
        if runs is None and found.mask_logits is not None:
            probabilities = found.mask_logits[i, :n].float().sigmoid().numpy()
        return Result(
            boxes=_rows(found.boxes, i, n),
            scores=_rows(found.scores, i, n),
            labels=labels,
            size=picture.size,
            names=[self.config.class_names[label] for label in labels],
            category_ids=np.array(self.config.category_ids, np.int64)[labels],
            mask_probabilities=probabilities,
            mask_runs=runs,
            rule=self.config.paste,
            picture=picture.array,
            path=picture.path,
            timings=timings,
        )


def _to_host(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _rows(x: Tensor, i: int, n: int) -> Any:
    """The first rows of one picture, in an array that does not hold the whole batch's memory."""
    return x[i, :n].numpy().copy()


def _whole_runs(found: Found, i: int, n: int) -> list[Any] | None:
    """The run lengths of a picture's masks, if the device made them and there was room for all."""
    if found.runs is None or found.lengths is None:
        return None
    lengths = found.lengths[i, :n].tolist()
    # A mask has at least one run; the device gives it none where it cannot count the picture's pixels.
    if not all(0 < length <= found.runs.shape[2] for length in lengths):
        return None
    return [runs[:length].astype(np.int64) for runs, length in zip(found.runs[i].numpy(), lengths, strict=False)]
