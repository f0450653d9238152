"""A step of training on a CPU, beside torchvision's with the same weights: losses, their gradients, an update by SGD.

Both learn all weights but those of the norms, and draw the same samples of anchors and RoIs, so that the terms of
their losses must agree. The pictures come ready made; torchvision does not resize them again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.model.losses import LossConfig, Targets, losses
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.model.matching import ANCHORS, OBJECTS, PROPOSALS, random_keys
from .comparison import Comparison, Planned, bounded
from .harness import Row
from .networks import named
from .peers import peer
from .samples import photographs

__all__ = [
    "QUICK",
    "TERMS",
    "Case",
    "SeededSampler",
    "comparison",
    "learning",
    "make_steps",
    "relative_disagreement",
    "run",
    "same_samples",
    "torchvision_step",
    "trimask_step",
]

CPU = torch.device("cpu")
MINUTES = 10.0
TERMS = {  # of torchvision's losses
    "rpn_cls": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "cls": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}
# Of each term, relative. In float32 a proposal that rounding lets in moves those behind it to other rows, of which
# other samples are drawn, at random as before; in float64 the terms agree to rounding.
TOLERANCE = 1e-2
OBJECTS_EACH = 8  # in a picture

Step = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A model ("people", or a ResNet's depth) and its batch; seconds as in `Planned`."""

    name: str
    model: str
    size: tuple[int, int]
    batch: int
    seconds: float = 1.0


CASES = (
    Case("people, MobileNetV2 FPN, 2 x 320 x 512", "people", (320, 512), 2, 3.5),
    Case("ResNet-50 FPN, 1 x 640 x 800", "50", (640, 800), 1, 15.0),
)

QUICK = replace(CASES[0], name="people, MobileNetV2 FPN, 2 x 128 x 160", size=(128, 160))


def run(threads: int, quick: bool, minutes: float = MINUTES) -> Iterator[list[Row]]:
    """The bundled model and ResNet-50 FPN, on photographs with ellipses in them."""

    def rows(case: Case) -> list[Row]:
        return comparison(case).rows(threads, quick, rounds=10 if case.model == "people" else 7, seconds=math.inf)

    chosen = (QUICK,) if quick else CASES
    planned = (Planned("training", case.name, case.seconds, partial(rows, case), calls=12) for case in chosen)
    yield from bounded(planned, threads, quick, 60 * minutes)


class SeededSampler:
    """In the place of torchvision's sampler: it draws what `losses` draws from the same seeds.

    Args:
        seeds: int64 [B].
        first: `ANCHORS` or `PROPOSALS`.
        objects: how many of the last rows of each picture are objects.
    """

    def __init__(self, seeds: Tensor, total: int, positive: float, first: int, objects: Sequence[int]) -> None:
        self.seeds, self.total, self.positives = seeds, total, int(total * positive)
        self.first, self.objects = first, objects

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels [N] of each picture, 0 for background and below for neither -> masks of the chosen, uint8 [N]."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for seed, label, last in zip(self.seeds.split(1), labels, self.objects, strict=True):
            keys = torch.cat(random_keys(seed, (self.first, len(label) - last), (OBJECTS, last)), 1)[0]
            order = keys.argsort(descending=True)
            foreground = order[label[order] >= 1][: self.positives]
            background = order[label[order] == 0][: self.total - len(foreground)]
            for masks, rows in zip(chosen, (foreground, background), strict=True):
                masks.append(torch.zeros_like(label, dtype=torch.uint8).index_fill_(0, rows, 1))
        return chosen


def same_samples(twin: Any, config: LossConfig, seeds: Tensor, objects: Sequence[int]) -> None:
    """Let torchvision's model train with the proposals and samples of ``config`` and the seeds of the pictures.

    Args:
        objects: of each picture.
    """
    before = config.anchors_before_nms(len(twin.rpn.anchor_generator.sizes))
    twin.rpn._pre_nms_top_n, twin.rpn._post_nms_top_n = {"training": before}, {"training": config.post_nms}
    nothing = [0] * len(objects)
    twin.rpn.fg_bg_sampler = SeededSampler(seeds, config.rpn_samples, config.rpn_positive, ANCHORS, nothing)
    twin.roi_heads.fg_bg_sampler = SeededSampler(seeds, config.roi_samples, config.roi_positive, PROPOSALS, objects)


def make_steps(case: Case, device: torch.device = CPU, autocast: torch.dtype | None = None) -> dict[str, Step | None]:
    """A step of torchvision's training and one of ours, which give the terms of the loss.

    Args:
        device: where they run; on a GPU torchvision's also with its weights in channels_last memory.
        autocast: the lower precision of what autocast lowers.
    """
    steps = {"torchvision": torchvision_step(case, device, autocast)}
    if device.type == "cuda":
        steps["torchvision, channels_last"] = torchvision_step(case, device, autocast, torch.channels_last)
    return steps | {"trimask": trimask_step(case, device, autocast)}


def _batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Targets]:
    """Pictures float32 [B, 3, H, W] in 0..255, the seeds of their samples int64 [B], and their objects."""
    image = torch.stack([torch.from_numpy(x) for x in photographs(case.size, case.batch)]).permute(0, 3, 1, 2).float()
    image = image.to(device, memory_format=torch.channels_last)
    return image, torch.arange(case.batch).to(device), _ellipses(case, device)


def trimask_step(case: Case, device: torch.device = CPU, autocast: torch.dtype | None = None) -> Step:
    """Our step, ready to be called: it gives the terms of the loss."""
    image, seeds, targets = _batch(case, device)
    sizes = torch.tensor([case.size] * case.batch).to(device)
    model = learning(named(case.model)).to(device)
    ours = partial(losses, model, image, sizes, targets, LossConfig.TORCHVISION, seeds=seeds)
    return _step(model, ours, device, autocast)


def torchvision_step(
    case: Case,
    device: torch.device = CPU,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Step | None:
    """The same with torchvision's model; None where it is not installed."""
    theirs = peer("torchvision")
    if theirs is None:
        return None
    (image, seeds, targets), source = _batch(case, device), named(case.model)
    assert targets.masks is not None
    twin: Any = theirs.twin(source).train().requires_grad_(True)
    twin.transform._skip_resize = True
    same_samples(twin, LossConfig.TORCHVISION, seeds, [OBJECTS_EACH] * case.batch)
    twin = twin.to(device, memory_format=memory_format)
    images = list((image / 255).contiguous())
    objects = [
        {"boxes": boxes, "labels": labels + 1, "masks": masks}
        for boxes, labels, masks in zip(targets.boxes, targets.labels, targets.masks, strict=True)
    ]

    def terms() -> dict[str, Tensor]:
        found = twin(images, objects)
        return {name: found[term] for name, term in TERMS.items()}

    return _step(twin, terms, device, autocast)


def comparison(case: Case) -> Comparison:
    """Both steps, on a CPU."""
    return Comparison("training", case.name, make_steps(case), relative_disagreement)


def learning(model: MaskRCNN) -> MaskRCNN:
    """All but the norms, which keep their statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False).eval()
    return model.to(memory_format=torch.channels_last)


def _step(
    model: nn.Module, terms: Callable[[], dict[str, Tensor]], device: torch.device, autocast: torch.dtype | None
) -> Step:
    """At a learning rate of 0: each call does the same work."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=device.type == "cuda" or None)

    def step() -> dict[str, Tensor]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = terms()
        optimizer.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        return {name: term.detach() for name, term in found.items()}

    return step


def _ellipses(case: Case, device: torch.device) -> Targets:
    rng = torch.Generator().manual_seed(0)
    height, width = case.size
    extent = torch.tensor([width, height])
    shape = (case.batch, OBJECTS_EACH, 2)
    sides = (extent * (0.1 + 0.4 * torch.rand(shape, generator=rng))).round()  # [B, G, 2]
    low = ((extent - sides) * torch.rand(shape, generator=rng)).round()
    middle, radius = (low + sides / 2)[..., None, None], (sides / 2)[..., None, None]
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    masks = ((x - middle[:, :, 0]) / radius[:, :, 0]) ** 2 + ((y - middle[:, :, 1]) / radius[:, :, 1]) ** 2 <= 1
    none = torch.zeros(shape[:2], dtype=torch.int64)
    count = torch.full((case.batch,), OBJECTS_EACH)
    parts = (torch.cat([low, low + sides], -1), none, none.bool(), count, masks.byte())
    return Targets(*(x.to(device) for x in parts))  # type: ignore[arg-type]


def relative_disagreement(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float = TOLERANCE) -> str:
    """The term that is furthest apart, where that is more than ``tolerance`` of it; "" where none is."""
    values = {name: (float(term), float(found[name])) for name, term in expected.items()}
    apart = {name: abs(b / a - 1) for name, (a, b) in values.items()}
    worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    return "" if apart[worst] <= tolerance else f"{worst} {values[worst][1]:.6f} instead of {values[worst][0]:.6f}"
