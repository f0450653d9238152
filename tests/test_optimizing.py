"""The learning rate by hand, groups of parameters, updates that are skipped, and the moving average."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from runs import SIX, TINY, begin
from trimask.engine.training.config import TrainConfig
from trimask.engine.training.optimizing import MovingAverage, freeze, learning_rate, make_optimizer, training_mode

TEN = TrainConfig(iterations=100, batch=4, optimizer="sgd", learning_rate=0.4, warmup=10)  # 0.1 for this batch


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TEN, {0: 1e-4, 5: 0.1 * (0.001 + 0.999 / 2), 10: 0.1, 69: 0.1, 70: 0.01, 89: 0.01, 90: 0.001, 99: 0.001}),
        (replace(TEN, steps=(0.5,), warmup=0), {0: 0.1, 49: 0.1, 50: 0.01, 99: 0.01}),
        (replace(TEN, schedule="cosine"), {0: 1e-4, 25: 0.0853553390593, 50: 0.05, 75: 0.0146446609407}),
        (replace(TEN, schedule="cosine"), {99: 0.1 * 0.00024671981713, 100: 0.0}),
        (replace(TEN, schedule="constant"), {0: 1e-4, 10: 0.1, 99: 0.1}),
        (replace(TEN, batch=32), {50: 0.8}),
        (replace(TEN, optimizer="adamw", learning_rate=0.004), {0: 2e-6, 50: 0.002}),
        (replace(TEN, learning_rate=None, warmup=None), {0: 5e-6, 9: 0.005 * (0.001 + 0.999 * 0.9), 10: 0.005}),
        (TrainConfig(iterations=5000, batch=4), {0: 2.5e-7, 50: 0.25e-3 * (0.001 + 0.999 / 2), 100: 0.25e-3}),
    ],
    ids=[
        "steps",
        "one step",
        "cosine",
        "end of a cosine",
        "constant",
        "a larger batch",
        "AdamW",
        "SGD's own",
        "AdamW's own",
    ],
)
def test_learning_rate(config: TrainConfig, expected: dict[int, float]) -> None:
    found = {iteration: learning_rate(config, iteration) for iteration in expected}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay(kind: str) -> None:
    model = begin().model
    optimizer = make_optimizer(model, replace(SIX, optimizer=kind, learning_rate=1e-3, weight_decay=0.3, momentum=0.8))
    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    own = make_optimizer(model, replace(SIX, optimizer=kind, learning_rate=1e-3, weight_decay=None)).param_groups[0][
        "weight_decay"
    ]
    assert own == {"sgd": 1e-4, "adamw": 0.05}[kind]
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.dim() > 1 for p in decaying["params"])
    assert all(p.dim() == 1 for p in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    assert (decaying["betas"][0] if kind == "adamw" else decaying["momentum"]) == 0.8


@pytest.mark.parametrize("late", [0, 2], ids=["the first", "a later one"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_skipped_update_leaves_no_trace(kind: str, late: int) -> None:
    """As if it had not been: also in the momentum, which torch's SGD leaves undefined where the first is skipped."""

    def trained(bad: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3)
        optimizer = make_optimizer(layer, replace(SIX, optimizer=kind, learning_rate=1e-3, weight_decay=0.1))
        generator = torch.Generator().manual_seed(1)
        rubbish = [torch.full((4, 3, 3, 3), 1e30) for _ in range(50)]
        del rubbish  # what a buffer that nobody fills would hold
        step = 0
        while step < 4:
            skipped = bad == step
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            for p in layer.parameters():
                p.grad = torch.full_like(p, torch.inf) if skipped else torch.randn(p.shape, generator=generator)
            optimizer.found_inf = torch.tensor(float(skipped))  # type: ignore[attr-defined]
            optimizer.step()
            bad = None if skipped else bad
            step += not skipped
        return [p.detach() for p in layer.parameters()]

    for found, expected in zip(trained(late), trained(None), strict=True):
        assert torch.equal(found, expected)


def test_zeroed_momentum_is_plain_sgd() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(3, 2), nn.Linear(3, 2)
    layers[1].load_state_dict(layers[0].state_dict())
    ours = make_optimizer(layers[0], replace(SIX, weight_decay=0.0))
    plain = torch.optim.SGD(layers[1].parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for group in ours.param_groups:
            group["lr"] = 0.1
        for mine, theirs in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            mine.grad = torch.randn(mine.shape)
            theirs.grad = mine.grad.clone()
        ours.step()
        plain.step()
    for mine, theirs in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_moving_average_by_hand() -> None:
    model = begin().model
    average = MovingAverage(model, 0.3)
    name = "box_head.classes.weight"
    expected = model.state_dict()[name].double()
    with torch.no_grad():
        for iteration, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.3, 0.3)):
            assert decay <= 4 / 13
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).num_batches_tracked += 1
            average.update(model, iteration)
            decay = min(decay, 0.3)
            expected = decay * expected + (1 - decay) * model.state_dict()[name].double()
    torch.testing.assert_close(average.model.state_dict()[name].double(), expected, atol=1e-5, rtol=1e-5)
    counters = [x for key, x in average.model.state_dict().items() if key.endswith("num_batches_tracked")]
    assert max(counters) == 6
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    average.copy(model)
    assert all(torch.equal(x, average.model.state_dict()[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("stages", range(4))
def test_frozen_stages_of_a_resnet(stages: int) -> None:
    model = begin().model
    freeze(model, replace(SIX, frozen_stages=stages, norms="live"), model.state_dict())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = ["backbone.stem", *(f"backbone.stages.{n}" for n in range(4))][:stages]
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(tuple(parts) or "nothing")}


def test_frozen_stages_of_a_mobilenet() -> None:
    from trimask.engine.model.config import MobileNetV2Config

    model = begin(replace(TINY, backbone=MobileNetV2Config())).model
    freeze(model, replace(SIX, frozen_stages=3, norms="live"), model.state_dict())
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if "blocks." in name and not p.requires_grad}
    assert frozen == {"1", "2", "3", "4", "5", "6"}
    assert not next(model.backbone.stem.parameters()).requires_grad


def test_what_begins_at_random_is_not_frozen() -> None:
    model = begin().model
    known = [name for name in model.state_dict() if not name.startswith("backbone.stages.0")]
    freeze(model, replace(SIX, frozen_stages=1), known)
    with pytest.raises(ValueError, match=r"frozen_stages: expected 0 .* backbone\.stages\.0\.0"):
        freeze(model, replace(SIX, frozen_stages=2), known)


def test_a_rate_of_sgd_is_refused_for_adamw() -> None:
    with pytest.raises(ValueError, match=r"learning_rate: expected at most 0\.005 for AdamW .*, got 0\.02"):
        TrainConfig(learning_rate=0.02)
    assert TrainConfig(learning_rate=0.02, optimizer="sgd").peak_rate() == pytest.approx(0.0025)


def test_norms_that_came_with_the_weights_keep_their_statistics() -> None:
    model = begin().model
    norms = {name: x for name, x in model.named_modules() if isinstance(x, nn.BatchNorm2d)}
    known, *others = norms
    freeze(model, SIX, (f"{known}.running_var",))
    training_mode(model)
    assert {name for name, x in norms.items() if not x.training} == {known}
    assert {name for name, x in norms.items() if not x.weight.requires_grad} == {known}
    assert all(norms[name].training for name in others)
    assert model.training
