"""The training loss: finite, zero where there is nothing to learn, and going down."""

import pytest
import torch

import trimask.engine.model.losses as losses_module
from models import SMALL, VARIANTS
from tolerances import LOSS
from trimask import MaskRCNN
from trimask.benchmarks.networks import torchvision_twin
from trimask.engine.model.checkpoints import load_model
from trimask.engine.model.losses import Target, losses

SIZE = torch.tensor([[96, 128]])


def square(size: int = 40, label: int = 1) -> Target:
    mask = torch.zeros(1, 96, 128)
    mask[0, 20 : 20 + size, 30 : 30 + size] = 1
    return Target(torch.tensor([[30.0, 20, 30 + size, 20 + size]]), torch.tensor([label]), mask)


EMPTY = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 96, 128))


def picture(target: Target) -> torch.Tensor:
    return 60 + 150 * target.masks.sum(0).clamp(max=1).expand(1, 3, -1, -1)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_terms_and_gradients_are_finite(config) -> None:
    model = MaskRCNN(config).train()
    image = torch.cat([picture(square()), picture(EMPTY)])
    terms = losses(model, image, SIZE.repeat(2, 1), [square(), EMPTY])
    expected = {"rpn_cls", "rpn_box", "cls", "box"} | ({"mask"} if config.mask_head else set())
    assert set(terms) == expected
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.rpn.objectness.weight.grad.abs().sum() > 0


def test_without_objects_only_classification_is_left() -> None:
    model = MaskRCNN(SMALL).train()
    terms = losses(model, picture(EMPTY), SIZE, [EMPTY])
    assert terms["rpn_box"] == terms["box"] == terms["mask"] == 0
    assert terms["rpn_cls"] > 0
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_picture_can_be_learned() -> None:
    torch.manual_seed(0)
    model = MaskRCNN(SMALL).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = []
    for _ in range(30):
        loss = sum(losses(model, picture(square()), SIZE, [square()]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


def test_targets_must_be_one_per_picture() -> None:
    with pytest.raises(ValueError, match="targets: expected one for each of 1 pictures, got 0"):
        losses(MaskRCNN(SMALL), picture(EMPTY), SIZE, [])


@torch.no_grad()
def test_every_term_equals_torchvision(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model on pictures of noise with boxes; all anchors and RoIs are sampled, so that none is random."""
    torchvision = pytest.importorskip("torchvision")
    model = load_model("people")
    twin = torchvision_twin(torchvision, model, model.config).train()
    everything = 10**7
    for module, name in ((losses_module, "RPN_SAMPLES"), (losses_module, "ROI_SAMPLES")):
        monkeypatch.setattr(module, name, everything)
    for sampler in (twin.rpn.fg_bg_sampler, twin.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = everything
    twin.rpn._pre_nms_top_n = twin.rpn._post_nms_top_n = {"training": 1000}
    twin.transform.min_size, twin.transform.max_size = (320,), everything

    image, targets, theirs = torch.rand(2, 3, 320, 416, generator=rng), [], []
    for count in (3, 2):
        low = torch.rand(count, 2, generator=rng) * torch.tensor([250.0, 180.0])
        size = 30 + torch.rand(count, 2, generator=rng) * torch.tensor([120.0, 110.0])
        boxes, masks = torch.cat([low, low + size], 1), torch.zeros(count, 320, 416)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y1:y2, x1 + 4 : x2] = 1
        targets.append(Target(boxes, torch.zeros(count, dtype=torch.int64), masks))
        theirs.append({"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "masks": masks.byte()})

    expected = twin(list(image), theirs)
    found = losses(model, image * 255, torch.tensor([[320, 416]] * 2), targets)
    names = {
        "rpn_cls": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "cls": "loss_classifier",
        "box": "loss_box_reg",
        "mask": "loss_mask",
    }
    for ours, name in names.items():
        torch.testing.assert_close(found[ours], expected[name], rtol=LOSS, atol=0)
