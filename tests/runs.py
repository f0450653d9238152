"""Training runs that take a second: tiny models, drawn pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coco_files import content, write
from models import SMALL
from trimask import MaskRCNN, MaskRCNNConfig
from trimask.engine.model.config import FPNConfig, InputConfig, MaskHeadConfig, ResizeConfig, ResNetConfig
from trimask.engine.model.loss_config import LossConfig
from trimask.engine.training.config import AugmentConfig, TrainConfig
from trimask.engine.training.data import CocoDataset
from trimask.engine.training.distributed import Processes
from trimask.engine.training.starting import Start
from trimask.engine.training.trainer import Trainer

TINY = replace(
    SMALL,
    class_names=("three", "seven", "ninety"),
    category_ids=(3, 7, 90),
    input=InputConfig(resize=ResizeConfig(min_size=48, max_size=64)),
    detection=replace(SMALL.detection, score_threshold=0.0),
    backbone=ResNetConfig((1, 1, 1, 1), groups=2, group_width=4),
    fpn=FPNConfig(channels=16),
    rpn=replace(SMALL.rpn, pre_nms=50, post_nms=20),
    box_head=replace(SMALL.box_head, fcs=(32,)),
    mask_head=MaskHeadConfig(convs=(16,), deconv_channels=16),
)
LOSS = LossConfig(rpn_samples=32, roi_samples=16, pre_nms=50, post_nms=20)
SIX = TrainConfig(
    iterations=6,
    batch=2,
    workers=0,
    seed=5,
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=1e-4,
    warmup=2,
    log_every=2,
    save_every=0,
    samples=1,
)
ALONE = Processes(0, 1, torch.device("cpu"))


def drawn(folder: Path, seed: int = 0, pictures: int = 5, **options: Any) -> CocoDataset:
    folder.mkdir(parents=True, exist_ok=True)
    return CocoDataset(write(folder, content(folder, np.random.default_rng(seed), pictures, **options)), folder)


def begin(config: MaskRCNNConfig = TINY, seed: int = 0, norms_known: bool = True) -> Start:
    """A model with random weights, whose norms count as learned unless said otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskRCNN(config).train()
    names = tuple(model.state_dict())
    return Start(model, "a test", names if norms_known else (), (), () if norms_known else names, (), ())


def trainer(out: Path, data: CocoDataset, config: TrainConfig = SIX, **options: Any) -> Trainer:
    """A trainer; ``options`` replace what it is made of."""
    made: dict[str, Any] = {
        "start": begin(),
        "validation": None,
        "augment": AugmentConfig(flip=0.5, crop=0.3),
        "loss": LOSS,
        "processes": ALONE,
    } | options
    return Trainer(out, data=data, config=config, **made)


def final(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert list(first) == list(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics, without what the clock says."""
    found = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]
