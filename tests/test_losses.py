"""The training loss: finite, zero where there is nothing to learn, and going down."""

import pytest
import torch

from models import SMALL, VARIANTS
from trimask import MaskRCNN
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
