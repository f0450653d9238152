"""The training loss: finite, zero where there is nothing to learn, going down, and equal to its definitions."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import trimask.engine.model.losses as losses_module
from models import SMALL, VARIANTS, small_model
from pretence import GPU, NoWaiting, WaitsError, replace_tensors
from tolerances import HALF_LOSS, LOSS, NO_GRADIENT, STEPS
from trimask import MaskRCNN, MaskRCNNConfig
from trimask.benchmarks.bench_training import TERMS, same_samples
from trimask.benchmarks.peers import torchvision as torchvision_peer
from trimask.engine.model import boxes as B
from trimask.engine.model.anchors import Anchors
from trimask.engine.model.checkpoints import family, load_model
from trimask.engine.model.checkpoints.torchvision import TORCHVISION
from trimask.engine.model.losses import LossConfig, Targets, losses
from trimask.engine.training.evaluate import evaluate
from trimask.kernels import PasteRule, paste_masks
from trimask.kernels.cpu.masks import encode_runs, runs_of_mask

SIZE = torch.tensor([[96, 128]])
EVERYTHING = 10**7  # samples: so many that none is left out at random
ALL = LossConfig(rpn_samples=EVERYTHING, roi_samples=EVERYTHING, pre_nms=20, post_nms=30)


def objects(
    *pictures: Sequence[tuple[int, int, int, int]], size: tuple[int, int] = (96, 128), label: int = 1
) -> Targets:
    """Rectangles (x1, y1, x2, y2), filled."""
    rows = max(1, *map(len, pictures))
    boxes, masks = torch.zeros(len(pictures), rows, 4), torch.zeros(len(pictures), rows, *size, dtype=torch.uint8)
    for b, corners in enumerate(pictures):
        for g, (x1, y1, x2, y2) in enumerate(corners):
            boxes[b, g] = torch.tensor([x1, y1, x2, y2])
            masks[b, g, y1:y2, x1:x2] = 1
    count = torch.tensor([len(corners) for corners in pictures])
    labels = torch.where(torch.arange(rows) < count[:, None], label, 0)
    return Targets(boxes, labels, torch.zeros(len(pictures), rows, dtype=torch.bool), count, masks)


SQUARE = (30, 20, 70, 60)


def picture(targets: Targets) -> Tensor:
    return 60 + 150 * targets.masks.amax(1, keepdim=True).expand(-1, 3, -1, -1).float()


@pytest.mark.parametrize("pictures", [([SQUARE], []), ([], []), ([], [SQUARE, (5, 5, 40, 80)])], ids=str)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_has_a_finite_gradient(config, pictures) -> None:
    """As data-parallel training wants it, whatever is in the pictures."""
    model = MaskRCNN(config).train()
    targets = objects(*pictures)
    terms = losses(model, picture(targets), SIZE.repeat(2, 1), targets)
    assert list(terms) == ["rpn_cls", "rpn_box", "cls", "box"] + ["mask"] * (config.mask_head is not None)
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.rpn.objectness.weight.grad.abs().sum() > 0


def test_without_objects_only_classification_is_left() -> None:
    targets = objects([], [])
    terms = losses(MaskRCNN(SMALL).train(), picture(targets), SIZE.repeat(2, 1), targets)
    assert terms["rpn_box"] == terms["box"] == terms["mask"] == 0
    assert terms["rpn_cls"] > 0
    assert terms["cls"] > 0


SHAPES = {  # by class: of the middles of pixels, in a picture of 96 x 128
    0: lambda x, y: (x - 32) ** 2 + (y - 34) ** 2 <= 26**2,
    1: lambda x, y: ((x - 95).abs() <= 28) & ((y - 28).abs() <= 18),
    2: lambda x, y: (y >= 52) & (y <= 92) & ((x - 84).abs() <= 0.8 * (y - 52)),
}


def test_a_picture_is_learned_by_heart() -> None:
    """All of it: boxes, classes and masks, so that the average precision of its masks is nearly 1."""
    pytest.importorskip("pycocotools")
    x, y = torch.arange(128) + 0.5, torch.arange(96)[:, None] + 0.5
    masks = torch.stack([inside(x, y) for inside in SHAPES.values()])  # [3, 96, 128]
    boxes = torch.stack([_box(mask) for mask in masks])
    colours = torch.tensor([[220.0, 40, 40], [40, 200, 60], [60, 60, 230]])
    image = (90 * ~masks.any(0) + (masks[:, None] * colours[..., None, None]).sum(0))[None]  # [1, 3, 96, 128]
    labels, crowd = torch.tensor([list(SHAPES)]), torch.zeros(1, 3, dtype=torch.bool)
    targets = Targets(boxes[None], labels, crowd, torch.tensor([3]), masks[None].byte())

    torch.manual_seed(0)
    model = MaskRCNN(replace(SMALL, pool=replace(SMALL.pool, aligned=True))).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps = 400  # at 250 another order of sums may leave a mask at an IoU of 0.93
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    config = replace(LossConfig.DETECTRON2, pre_nms=100, post_nms=60, roi_samples=48)
    for step in range(steps):
        terms = losses(model, image, SIZE, targets, config, seeds=torch.tensor([step]))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        found = model.eval()(image, SIZE, SIZE)
    n = int(found.count)
    drawn = paste_masks(found.mask_logits[0, :n].sigmoid(), found.boxes[0, :n], (96, 128), rule=PasteRule.DETECTRON2)
    scored = zip(drawn, found.labels[0, :n].tolist(), found.scores[0, :n].tolist(), strict=True)
    detections = [{**_entry(mask, label), "score": score} for mask, label, score in scored]
    truth = {
        "images": [{"id": 1, "height": 96, "width": 128}],
        "categories": [{"id": label, "name": str(label)} for label in SHAPES],
        "annotations": [
            {**_entry(mask, label), "id": label + 1, "iscrowd": 0, "area": float(mask.sum())}
            for label, mask in enumerate(masks)
        ],
    }
    assert evaluate(detections, truth, kinds=("segm",)).summary["segm_AP"] > 0.95


def _box(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def _entry(mask: Tensor, label: int) -> dict[str, Any]:
    runs = {"size": list(mask.shape), "counts": encode_runs(runs_of_mask(mask.numpy()))}
    return {"image_id": 1, "category_id": label, "segmentation": runs}


def photograph(
    rng: torch.Generator, size: tuple[int, int], counts: Sequence[int]
) -> tuple[Tensor, Targets, list[dict[str, Any]]]:
    """Noise with objects in it, for both programs."""
    height, width = size
    pictures = []
    for count in counts:
        low = torch.rand(count, 2, generator=rng) * torch.tensor([0.6 * width, 0.55 * height])
        high = low + 20 + torch.rand(count, 2, generator=rng) * torch.tensor([0.3 * width, 0.35 * height])
        pictures.append(torch.cat([low, high], 1).round().int().tolist())
    targets = objects(*pictures, size=size, label=0)
    targets.masks[:, :, ::3] = 0  # no plain rectangles
    theirs = [
        {"boxes": boxes[:n], "labels": labels[:n] + 1, "masks": masks[:n]}
        for boxes, labels, masks, n in zip(targets.boxes, targets.labels, targets.masks, counts, strict=True)
    ]
    return torch.rand(len(counts), 3, *size, generator=rng), targets, theirs


COUNTS = (3, 2)  # objects of two pictures
# So few that chance decides among the foreground, too.
DRAWN = {"rpn_samples": 64, "rpn_positive": 0.1, "roi_samples": 48, "roi_positive": 0.05}
SAMPLED = replace(LossConfig.TORCHVISION, pre_nms=100, post_nms=60, **DRAWN)


def torchvision_pair(size: tuple[int, int], config: LossConfig, dtype: torch.dtype) -> tuple[MaskRCNN, Any, Tensor]:
    """The bundled model, torchvision's with the same weights and samples, and the seeds of two pictures."""
    pytest.importorskip("torchvision")
    model = load_model("people")
    twin = torchvision_peer.twin(model).train().to(dtype).requires_grad_(True)
    twin.transform._skip_resize = True
    seeds = torch.tensor([5, 6])
    same_samples(twin, config, seeds, COUNTS)
    model = model.to(dtype)
    for module in model.modules():  # torchvision's frozen norms have no parameters
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    for name in ("mean", "std"):  # torchvision's have all their digits in float64, too
        getattr(model, name).copy_(torch.tensor(getattr(model.config.input, name), dtype=dtype).view(3, 1, 1))
        setattr(twin.transform, f"image_{name}", [x / 255 for x in getattr(model.config.input, name)])
    return model, twin, seeds


@pytest.mark.parametrize(
    "samples", [{"rpn_samples": EVERYTHING, "roi_samples": EVERYTHING}, DRAWN], ids=["all", "some"]
)
def test_every_term_equals_torchvision(samples: dict[str, Any], rng: torch.Generator) -> None:
    """In float32, as it is trained."""
    size = (224, 288)
    config = replace(LossConfig.TORCHVISION, pre_nms=300, post_nms=300, **samples)
    model, twin, seeds = torchvision_pair(size, config, torch.float32)
    image, targets, theirs = photograph(rng, size, COUNTS)
    expected = twin(list(image), theirs)
    found = losses(model, image * 255, torch.tensor([size] * 2), targets, config, seeds=seeds)
    for ours, name in TERMS.items():
        torch.testing.assert_close(found[ours], expected[name], rtol=LOSS, atol=0)


@pytest.mark.parametrize("norms", ["frozen", "live"])
def test_every_gradient_equals_torchvision_step_by_step(norms: str, rng: torch.Generator) -> None:
    """In float64: in float32 a few rectifiers in a million round to the other side of zero, and change gradients by
    a thousandth.
    """
    size = (64, 96)
    model, twin, seeds = torchvision_pair(size, SAMPLED, torch.float64)
    if norms == "live":
        thaw(model, twin)
    image, targets, theirs = photograph(rng, size, COUNTS)
    image, targets = image.double(), targets._replace(boxes=targets.boxes.double())
    theirs = [{**target, "boxes": target["boxes"].double()} for target in theirs]
    optimizers = [
        torch.optim.SGD((x for x in m.parameters() if x.requires_grad), lr=1e-3, momentum=0.9) for m in (model, twin)
    ]
    for step in range(5):
        seeds += 1
        expected = twin(list(image), theirs)
        found = losses(model, image * 255, torch.tensor([size] * 2), targets, SAMPLED, seeds=seeds)
        for ours, name in TERMS.items():  # torchvision's own terms are not all in float64
            torch.testing.assert_close(found[ours].double(), expected[name].double(), rtol=STEPS, atol=0)
        for terms, optimizer in ((found, optimizers[0]), (expected, optimizers[1])):
            optimizer.zero_grad()
            sum(terms.values()).backward()
        if step == 0:
            assert_same_gradients(model, twin)
        for optimizer in optimizers:
            optimizer.step()


def thaw(model: MaskRCNN, twin: torch.nn.Module) -> None:
    """Norms that take their statistics from the batch, on both sides."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(True)
    for name, module in list(twin.named_modules()):
        if type(module).__name__ == "FrozenBatchNorm2d":
            norm = torch.nn.BatchNorm2d(len(module.weight), eps=module.eps).to(module.weight)
            norm.load_state_dict(module.state_dict(), strict=False)
            twin.set_submodule(name, norm)


def assert_same_gradients(model: MaskRCNN, twin: torch.nn.Module) -> None:
    gradients = copy.deepcopy(model)
    for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    found = family.export(TORCHVISION, gradients)  # under torchvision's names, in its layout
    wanted = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert len(wanted) > 50
    longest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= STEPS * gradient.norm() + NO_GRADIENT * longest, name


def reference(
    model: MaskRCNN, image: Tensor, image_sizes: Tensor, targets: Targets, config: LossConfig
) -> dict[str, Tensor]:
    """The loss of all anchors and RoIs, written down picture by picture and box by box."""
    roi_align = pytest.importorskip("torchvision").ops.roi_align
    padded = (image.shape[2], image.shape[3])
    pyramid = model.fpn(model.backbone(model.normalize(image, image_sizes)))
    logits, deltas = model.rpn(pyramid)
    sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
    limits = replace(model.config.rpn, pre_nms=config.pre_nms, post_nms=config.post_nms)
    proposals, count = model.rpn.select(logits, deltas, sizes, padded, image_sizes, config=limits)
    anchors = [box for level, size in enumerate(sizes) for box in model.rpn.anchors.grid(level, size, padded).tolist()]
    sums = dict.fromkeys(TERMS, 0.0)
    sampled = {"rpn": 0, "roi": 0, "mask": 0}
    for b in range(len(image)):
        rows = range(int(targets.count[b]))
        boxes = {g: targets.boxes[b, g].tolist() for g in rows if not targets.crowd[b, g]}
        crowds = [targets.boxes[b, g].tolist() for g in rows if targets.crowd[b, g]]
        score, delta = torch.cat(logits, 1)[b], torch.cat(deltas, 1)[b]
        best = {g: max(overlap(box, anchor) for anchor in anchors) for g, box in boxes.items()}
        for i, anchor in enumerate(anchors):
            ious = {g: overlap(box, anchor) for g, box in boxes.items()}
            nearest = max(ious, key=ious.get, default=None)
            iou = ious.get(nearest, 0.0)
            favourite = any(ious[g] == best[g] > 0 for g in ious)
            if iou >= config.rpn_foreground or favourite:
                sums["rpn_cls"] += F.softplus(-score[i])
                sums["rpn_box"] += distance(delta[i], offsets(boxes[nearest], anchor, 1, 1), config.rpn_beta)
            elif iou < config.rpn_background and not in_a_crowd(anchor, crowds, config):
                sums["rpn_cls"] += F.softplus(score[i])
            else:
                continue
            sampled["rpn"] += 1

        rois = proposals[b, : count[b]].tolist() + list(boxes.values()) * config.add_objects
        pooled = model.pool(
            [x[b : b + 1] for x in pyramid], torch.tensor([rois], dtype=image.dtype), torch.tensor([len(rois)]), 7
        )
        classes, moves = model.box_head(pooled[0])
        for i, roi in enumerate(rois):
            ious = {g: overlap(box, roi) for g, box in boxes.items()}
            nearest = max(ious, key=ious.get, default=None)
            if nearest is None or ious[nearest] < config.roi_foreground:
                if not in_a_crowd(roi, crowds, config):
                    sampled["roi"] += 1
                    sums["cls"] -= classes[i].log_softmax(0)[-1]
                continue
            sampled["roi"] += 1
            label = int(targets.labels[b, nearest])
            sums["cls"] -= classes[i].log_softmax(0)[label]
            sums["box"] += distance(moves[i, label], offsets(boxes[nearest], roi, 10, 5), config.roi_beta)
            sampled["mask"] += 1
            pick = torch.tensor([[0, *roi]], dtype=image.dtype)
            features = model.pool([x[b : b + 1] for x in pyramid], pick[:, None, 1:], torch.tensor([1]), 14)[0]
            own = model.mask_head(features, torch.tensor([label]))[0]
            mask = targets.masks[b, nearest][None, None].to(image)
            truth = roi_align(mask, pick, 28, aligned=config.mask_aligned)[0, 0]
            if config.mask_threshold is not None:
                truth = (truth >= config.mask_threshold).to(truth)
            sums["mask"] += (truth * F.softplus(-own) + (1 - truth) * F.softplus(own)).mean()
    rpn = sampled["rpn"] if config.rpn_mean else config.rpn_samples * len(image)
    divisors = {"rpn_cls": rpn, "rpn_box": rpn, "cls": sampled["roi"], "box": sampled["roi"], "mask": sampled["mask"]}
    return {name: value / max(divisors[name], 1) for name, value in sums.items()}


def overlap(a: list[float], b: list[float]) -> float:
    shared = shared_area(a, b)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def shared_area(a: list[float], b: list[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def in_a_crowd(box: list[float], crowds: list[list[float]], config: LossConfig) -> bool:
    area = (box[2] - box[0]) * (box[3] - box[1])
    threshold = config.crowd_threshold
    return threshold is not None and any(shared_area(box, crowd) / area > threshold for crowd in crowds)


def offsets(target: list[float], box: list[float], near: float, far: float) -> Tensor:
    found = []
    for axis in (0, 1):
        size, wanted = box[axis + 2] - box[axis], target[axis + 2] - target[axis]
        found.append(
            (near * (target[axis] + target[axis + 2] - box[axis] - box[axis + 2]) / 2 / size, far, wanted / size)
        )
    logs = [far * math.log(ratio) for _, far, ratio in found]
    return torch.tensor([found[0][0], found[1][0], *logs], dtype=torch.float64)


def distance(found: Tensor, wanted: Tensor, beta: float) -> Tensor:
    far = (found - wanted).abs()
    return sum(x - beta / 2 if x >= beta else x * x / (2 * beta) for x in far)


CONVENTIONS = {
    "torchvision": LossConfig.TORCHVISION,
    "Detectron2": LossConfig.DETECTRON2,
    "crowds ignored": LossConfig(),
    "without the objects' boxes": replace(
        LossConfig.DETECTRON2, add_objects=False, crowd_threshold=0.3, roi_foreground=0.1
    ),
}


@pytest.mark.parametrize("config", CONVENTIONS.values(), ids=CONVENTIONS.keys())
def test_every_convention_equals_its_definition(config: LossConfig, rng: torch.Generator) -> None:
    size = (64, 96)
    config = replace(config, rpn_samples=5000, roi_samples=5000, roi_positive=0.5, pre_nms=20, post_nms=30)
    if config.mask_threshold is not None:
        # RoIs cut at the picture's edge have whole sides, and cells that are covered by half but for rounding.
        config = replace(config, mask_threshold=0.47)
    anchors = replace(SMALL.anchors, round=False, stride_from_size=False)
    model = small_model(replace(SMALL, anchors=anchors, rpn=replace(SMALL.rpn, min_size=1.0))).double()
    image, targets, _ = photograph(rng, size, (3, 2))
    image = 255 * image.double()
    targets = targets._replace(
        boxes=targets.boxes.double(),
        labels=torch.tensor([[0, 2, 1], [1, 0, 0]]),
        crowd=torch.tensor([[False, False, True], [True, False, False]]),
    )
    sizes = torch.tensor([size, (60, 80)])
    expected = reference(model, image, sizes, targets, config)
    found = losses(model, image, sizes, targets, config)
    assert found["mask"] > 0
    for name, value in found.items():
        torch.testing.assert_close(value, torch.as_tensor(expected[name]).to(value), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_nothing_depends_on_what_is_cut_off(
    config: MaskRCNNConfig, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes the padding too; here a CPU does. Of many pictures, objects and RoIs most rows are padding."""
    model = small_model(config).double()
    _, targets, _ = photograph(rng, (64, 96), (5, 0, 1))
    targets = targets._replace(boxes=targets.boxes.double())
    image, sizes = picture(targets).double(), torch.tensor([[64, 96], [64, 80], [50, 96]])
    parameters = list(model.parameters())

    def run() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        terms = losses(model, image, sizes, targets, ALL)
        return terms, torch.autograd.grad(sum(terms.values()), parameters)

    expected = run()
    monkeypatch.setattr("trimask.engine.model.trimming.may_trim", lambda device: False)
    monkeypatch.setattr("trimask.engine.model.mask_targets.may_trim", lambda device: False)
    found = run()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_polygons_of_whole_pixels_equal_their_masks(rng: torch.Generator) -> None:
    """Where RoIs are the objects themselves: rectangles, whose edges fall on those of cells."""
    pytest.importorskip("pycocotools")
    model = small_model().double()
    targets = objects([SQUARE, (5, 5, 33, 61)], [(10, 20, 66, 76)])
    targets = targets._replace(boxes=targets.boxes.double())
    image, sizes = picture(targets).double(), SIZE.repeat(2, 1)
    config = replace(LossConfig.DETECTRON2, post_nms=0)
    corners = [[[(x1, y1), (x2, y1), (x2, y2), (x1, y2)] for x1, y1, x2, y2 in rows] for rows in targets.boxes.tolist()]
    polygons = [[[np.array(points)] for points in rows] for rows in corners]
    seeds = torch.arange(2)
    expected = losses(model, image, sizes, targets, config, seeds=seeds)
    found = losses(model, image, sizes, targets._replace(masks=None, polygons=polygons), config, seeds=seeds)
    assert expected["mask"] > 0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_crowds_are_neither_objects_nor_background(rng: torch.Generator) -> None:
    """With nothing but a crowd over the whole picture, there is nothing to learn."""
    model = small_model()
    targets = objects([(0, 0, 128, 96)])
    crowd = targets._replace(crowd=torch.tensor([[True]]))
    anchors = replace(SMALL.anchors, sizes=((8.0,), (8.0,), (8.0,), (8.0,), (8.0,)))  # none reaches out of it by much
    model.rpn.anchors = Anchors(anchors, SMALL.strides)
    image = picture(targets)
    ignored = losses(model, image, SIZE, crowd, LossConfig(crowd_threshold=0.05))
    assert all(term == 0 for term in ignored.values())
    unmarked = losses(model, image, SIZE, crowd, LossConfig.TORCHVISION)
    assert unmarked["cls"] > 0
    assert unmarked["box"] == unmarked["mask"] == 0
    assert losses(model, image, SIZE, targets, LossConfig())["box"] > 0


def test_boxes_without_extent_and_padding_are_no_objects(rng: torch.Generator) -> None:
    model = small_model().double()
    one = objects([SQUARE])
    boxes = torch.tensor([[SQUARE, (10, 10, 10, 50), (5, 5, 90, 90)]]).double()
    masks = torch.cat([one.masks, torch.ones(1, 2, 96, 128, dtype=torch.uint8)], 1)
    three = Targets(boxes, torch.tensor([[1, 0, 2]]), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([2]), masks)
    image = picture(one).double()
    expected = losses(model, image, SIZE, one._replace(boxes=one.boxes.double()), ALL)
    torch.testing.assert_close(losses(model, image, SIZE, three, ALL), expected, rtol=1e-12, atol=0)


FEW = LossConfig(rpn_samples=16, roi_samples=16, pre_nms=50, post_nms=50)  # of which chance decides


def test_without_seeds_the_global_generator_decides() -> None:
    model, targets = small_model(), objects([SQUARE, (5, 5, 40, 80)])

    def run(seed: int) -> float:
        torch.manual_seed(seed)
        return float(sum(losses(model, picture(targets), SIZE, targets, FEW).values()).detach())

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("rpn_mean", [True, False])
def test_two_processes_learn_what_one_does(rpn_mean: bool, rng: torch.Generator) -> None:
    """Halves of a batch, with the mean counts of both: the mean of their gradients is that of the whole."""
    model = small_model().double()
    config = LossConfig(rpn_samples=1500, roi_samples=24, roi_positive=0.1, pre_nms=20, post_nms=20, rpn_mean=rpn_mean)
    targets = objects([SQUARE, (5, 5, 40, 80), (60, 10, 100, 90)], [SQUARE], [(0, 0, 128, 96)], [(0, 0, 30, 30)])
    crowd = torch.zeros(4, 3, dtype=torch.bool)
    crowd[2, 0] = True  # so that there are fewer of everything
    targets = targets._replace(boxes=targets.boxes.double(), crowd=crowd)
    image, sizes = picture(targets).double(), torch.tensor([[96, 128], [96, 100], [80, 128], [96, 128]])
    seeds = torch.randint(2**62, (4,), generator=rng)

    def run(part: slice, average: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, ...]:
        rows = Targets(*(None if x is None else x[part] for x in targets))
        terms = losses(model, image[part], sizes[part], rows, config, seeds=seeds[part], average=average)
        return *terms.values(), *torch.autograd.grad(sum(terms.values()), tuple(model.parameters()))

    halves = slice(0, 2), slice(2, 4)
    counts: list[Tensor] = []
    alone = [run(half, lambda x: counts.append(x) or x) for half in halves]
    assert len(counts) == 2  # called once by each
    mean = (counts[0] + counts[1]) / 2
    assert (counts[0] != counts[1]).all()
    together = [run(half, lambda _: mean) for half in halves]
    whole = run(slice(0, 4), None)
    for parts, total in zip(zip(*together, strict=True), whole, strict=True):
        torch.testing.assert_close((parts[0] + parts[1]) / 2, total, rtol=1e-9, atol=1e-12)
    assert not torch.isclose((alone[0][4] + alone[1][4]) / 2, whole[4])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_picture_of_nan_gives_a_loss_of_nan(config: MaskRCNNConfig) -> None:
    """And no error: whoever trains looks at the loss."""
    targets = objects([SQUARE], [])
    image = picture(targets)
    image[0, 0, 3, 5] = torch.nan
    terms = losses(MaskRCNN(config).train(), image, SIZE.repeat(2, 1), targets)
    assert sum(terms.values()).isnan()
    sum(terms.values()).backward()


def test_bfloat16_by_autocast_agrees_in_float32(rng: torch.Generator) -> None:
    size = (224, 288)
    model = load_model("people")
    config = replace(ALL, pre_nms=300, post_nms=300)
    image, targets, _ = photograph(rng, size, COUNTS)
    sizes = torch.tensor([size] * 2)
    expected = losses(model, image * 255, sizes, targets, config)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model, image * 255, sizes, targets, config)
    assert {term.dtype for term in found.values()} == {torch.float32}
    torch.testing.assert_close(sum(found.values()), sum(expected.values()), rtol=HALF_LOSS, atol=0)


WRONG = {
    "boxes: expected [1, 1, 4], got [2, 1, 4]": {"boxes": torch.zeros(2, 1, 4)},
    "boxes: expected [1, 1, 4], got [1, 0, 4]": {"boxes": torch.zeros(1, 0, 4)},
    "boxes: expected [1, 1, 4], got [4]": {"boxes": torch.zeros(4)},
    "labels: expected [1, 1], got [1]": {"labels": torch.zeros(1)},
    "count: expected [1], got []": {"count": torch.tensor(1)},
    "masks: expected [1, 1, 96, 128], got [1, 1, 28, 28]": {"masks": torch.zeros(1, 1, 28, 28)},
    "expected masks or polygons for a model with a mask head, got neither": {"masks": None},
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_targets_that_do_not_fit(message: str, change: dict[str, Any]) -> None:
    targets = objects([SQUARE])
    with pytest.raises(ValueError, match=re.escape(message)):
        losses(MaskRCNN(SMALL), picture(targets), SIZE, targets._replace(**change))


@pytest.mark.parametrize("seeds", [torch.zeros(2, dtype=torch.int64), torch.zeros(1)], ids=["length", "dtype"])
def test_seeds_that_do_not_fit(seeds: Tensor) -> None:
    targets = objects([SQUARE])
    with pytest.raises(ValueError, match=re.escape("seeds: expected int64 [1], got")):
        losses(MaskRCNN(SMALL), picture(targets), SIZE, targets, seeds=seeds)


# On a GPU it never waits.


def step(model: MaskRCNN, image: Tensor, sizes: Tensor, targets: Targets, seeds: Tensor) -> dict[str, Tensor]:
    config = LossConfig(pre_nms=50, post_nms=50, roi_samples=32)
    return losses(model, image, sizes, targets, config, seeds=seeds, average=lambda counts: counts * 2)


def step_in_pretence(config: MaskRCNNConfig) -> None:
    """The loss on a fake GPU: nothing goes from host to device or back, and no shape asks for a value."""
    targets = objects([SQUARE, (5, 5, 40, 80)], [])
    model, inputs = small_model(config), (picture(targets), SIZE.repeat(2, 1), torch.arange(2), *targets[:5])
    with FakeTensorMode(), NoWaiting():
        replace_tensors(model, lambda x: fake(x).requires_grad_(x.requires_grad))
        image, sizes, seeds, *rest = map(fake, inputs)
        terms = step(model, image, sizes, Targets(*rest), seeds)
    assert all(term.device == GPU and term.shape == () for term in terms.values())


def fake(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)


def step_and_backward(config: MaskRCNNConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient of a CPU that is taken for a GPU. (Autograd has no queue for a GPU that is not there.)"""
    for module in ("trimming", "mask_targets"):
        monkeypatch.setattr(f"trimask.engine.model.{module}.may_trim", lambda device: False)
    monkeypatch.setattr("trimask.engine.model.layers._trains_by_winograd", lambda x, weight: False)
    targets = objects([SQUARE, (5, 5, 40, 80)], [])
    model, image, sizes = small_model(config), picture(targets), SIZE.repeat(2, 1)
    with NoWaiting(torch.device("cpu")):
        terms = step(model, image, sizes, targets, torch.arange(2))
        sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_no_variant_waits_for_a_gpu(config: MaskRCNNConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step_in_pretence(config)
    step_and_backward(config, monkeypatch)


PLANTED = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
}


@pytest.mark.parametrize("offence", PLANTED.values(), ids=PLANTED.keys())
def test_waiting_is_seen(offence: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(targets: Tensor, boxes: Tensor, weights: tuple[float, float], encode: Any = B.encode) -> Tensor:
        offence(boxes)
        return encode(targets, boxes, weights)

    with monkeypatch.context() as patch:
        patch.setattr(B, "encode", encode)
        with pytest.raises(WaitsError):
            step_in_pretence(SMALL)
        with pytest.raises(WaitsError):
            step_and_backward(SMALL, patch)

    box_loss = losses_module._box_loss

    def with_hook(deltas: Tensor, *args: Any) -> Tensor:
        deltas.register_hook(lambda grad: offence(grad) and None)
        return box_loss(deltas, *args)

    monkeypatch.setattr(losses_module, "_box_loss", with_hook)
    with pytest.raises(WaitsError):
        step_and_backward(SMALL, monkeypatch)


def test_proposals_in_training_are_of_each_level_or_of_the_only_map() -> None:
    """As in Detectron2, whose models without a pyramid choose from 12000 anchors, all of one map."""
    assert [LossConfig().anchors_before_nms(levels) for levels in (5, 1)] == [2000, 12000]
    assert [LossConfig(pre_nms=7).anchors_before_nms(levels) for levels in (5, 1)] == [7, 7]
