"""Optimiser, learning rate, what is frozen, and the moving average of the weights."""

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from ..model.backbone import MobileNetV2
from ..model.mask_rcnn import MaskRCNN
from .config import TrainConfig

__all__ = ["MovingAverage", "freeze", "learning_rate", "make_optimizer", "norms", "training_mode"]

WARMUP_FACTOR = 1e-3


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW, fused: it takes a ``found_inf`` from the device and skips that update there."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.decay()}, {"params": vectors, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(config.momentum, 0.999), fused=True)
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    if config.momentum:  # else torch leaves them as memory happens to be where the first update is skipped
        for p in (*matrices, *vectors):
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """The rate of an update, the first being 0; a function of the iteration alone, so that a run can go on."""
    rate, warmup = config.peak_rate(), config.warmup_iterations()
    if iteration < warmup:
        rate *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / warmup
    if config.schedule == "step":
        return rate * 0.1 ** sum(iteration >= step * config.iterations for step in config.steps)
    if config.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
    return rate


def freeze(model: MaskRCNN, config: TrainConfig, reused: Iterable[str]) -> None:
    """Stop the gradients of the trunk's first stages, and of the norms that came with the weights, if so configured."""
    trunk = model.backbone
    if isinstance(trunk, MobileNetV2):
        stages: list[list[nn.Module]] = [[]]
        for number, block in trunk.blocks.items():
            stages[-1].append(block)
            if number in trunk.taps:
                stages.append([])
    else:
        stages = [list(stage.children()) for stage in trunk.stages]
    parts: list[list[nn.Module]] = [[trunk.stem], *stages]
    known = set(reused)
    if config.frozen_stages > len(parts):
        raise ValueError(f"frozen_stages: expected at most the trunk's {len(parts)}, got {config.frozen_stages}")
    for layers in parts[: config.frozen_stages]:
        for part in layers:
            part.requires_grad_(False)
    random = [name for name, p in model.named_parameters() if not p.requires_grad and name not in known]
    if random:
        raise ValueError(f"frozen_stages: expected 0 where a trunk begins at random, as {random[0]} does")
    if config.norms == "frozen":
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and f"{name}.running_var" in known:
                module.requires_grad_(False)


def training_mode(model: MaskRCNN) -> None:
    """Training mode, but for the norms whose gradients are stopped: they keep their statistics."""
    model.train()
    for norm in norms(model):
        if not norm.weight.requires_grad:
            norm.eval()


def norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model, synchronised or not."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class MovingAverage:
    """An average of the weights over the last updates; it follows quickly at first.

    Attributes:
        model: in evaluation mode, with averaged weights.
    """

    def __init__(self, model: MaskRCNN, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    def update(self, model: MaskRCNN, iteration: int) -> None:
        """Take in the weights after the update ``iteration``, the first being 0."""
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        share = 1 - min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_([ours for ours, _ in floats], [theirs for _, theirs in floats], share)
        for ours, theirs in pairs:
            if not ours.is_floating_point():  # counters of the norms
                ours.copy_(theirs)

    def copy(self, model: MaskRCNN) -> None:
        """Take the weights as they are."""
        self.model.load_state_dict(model.state_dict())
