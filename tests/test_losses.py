"""The training loss: finite, zero where there is nothing to learn, going down, and equal to the peers'."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import SMALL, VARIANTS
from tolerances import LOSS, LOSS_GRADIENT
from trimask import MaskRCNN
from trimask.benchmarks.networks import torchvision_twin
from trimask.engine.model.checkpoints import family, load_model
from trimask.engine.model.checkpoints.torchvision import TORCHVISION
from trimask.engine.model.losses import LossConfig, Targets, losses

SIZE = torch.tensor([[96, 128]])
EVERYTHING = 10**7  # samples: so many that none is left out at random


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


def test_a_picture_can_be_learned() -> None:
    torch.manual_seed(0)
    model = MaskRCNN(SMALL).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    targets = objects([SQUARE])
    history = []
    for _ in range(30):
        loss = sum(losses(model, picture(targets), SIZE, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


NAMES = {
    "rpn_cls": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "cls": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}


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


def test_every_term_and_gradient_equals_torchvision(rng: torch.Generator) -> None:
    """The bundled model on pictures of noise with boxes; all anchors and RoIs are sampled, so that none is random."""
    torchvision = pytest.importorskip("torchvision")
    model = load_model("people")
    twin = torchvision_twin(torchvision, model, model.config).train()
    for sampler in (twin.rpn.fg_bg_sampler, twin.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = EVERYTHING
    twin.rpn._pre_nms_top_n = twin.rpn._post_nms_top_n = {"training": 300}
    twin.transform.min_size, twin.transform.max_size = (224,), EVERYTHING
    config = replace(LossConfig.TORCHVISION, rpn_samples=EVERYTHING, roi_samples=EVERYTHING, pre_nms=300, post_nms=300)
    image, targets, theirs = photograph(rng, (224, 288), (3, 2))
    expected = twin(list(image), theirs)
    found = losses(model, image * 255, torch.tensor([[224, 288]] * 2), targets, config)
    for ours, name in NAMES.items():
        torch.testing.assert_close(found[ours], expected[name], rtol=LOSS, atol=0)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    wanted = {name: parameter.grad for name, parameter in twin.named_parameters()}
    gradients = as_torchvision(model)
    assert len(wanted) > 50
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= LOSS_GRADIENT * gradient.norm(), name


def as_torchvision(model: MaskRCNN) -> dict[str, Tensor]:
    """The gradients of all parameters under torchvision's names, in its layout."""
    gradients = copy.deepcopy(model)
    for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = source.grad
    return family.export(TORCHVISION, gradients)
