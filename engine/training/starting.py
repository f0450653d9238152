"""The model that training starts from: another model with its heads made anew, a trunk, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model import presets
from ..model.checkpoints import Options, Trunk, load_model_or_trunk
from ..model.config import InputConfig, MaskRCNNConfig, MobileNetV2Config, ResNetConfig
from ..model.mask_rcnn import MaskRCNN

__all__ = ["Start", "start"]

NORM_EPS = 1e-5  # torch's own


@dataclass(frozen=True)
class Start:
    """A model to train and where its tensors are from.

    Attributes:
        model: in training mode, on the CPU.
        source: what was read.
        reused: names of the tensors that came from there.
        partial: names of those of which only rows did, each of a class or of the background.
        fresh: names of the tensors that begin at random.
        unused: names in the file that have no place here.
        notes: lines to print.
    """

    model: MaskRCNN
    source: str
    reused: tuple[str, ...]
    partial: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def start(
    weights: str | Path | None,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    config: MaskRCNNConfig | None = None,
    changes: Sequence[tuple[str, Any]] = (),
    options: Options | None = None,
    seed: int = 0,
) -> Start:
    """Make the model for a data set's classes.

    Args:
        weights: a Mask R-CNN checkpoint of any family, or its published name: all is kept but the rows of classes that
            it does not know by name; an ImageNet classifier: the trunk is kept; None: nothing is.
        class_names, category_ids: of the data set, in the order of the labels.
        config: another architecture than that of the weights; what fits is kept.
        changes: single values of the config, by dotted name, such as ``("mask_head.class_agnostic", True)``.
        options: what a checkpoint's keys cannot say, and sizes and anchors to train with.
        seed: of what begins at random.

    Raises:
        ValueError: a file that cannot be read or does not fit.
    """
    names, ids = tuple(class_names), tuple(category_ids)
    options = options or Options()
    state: dict[str, Tensor] = {}
    old_classes: tuple[str, ...] = ()
    source = "nothing: all begins at random"
    unused: tuple[str, ...] = ()
    base = config
    if weights is not None:
        found = load_model_or_trunk(weights, **vars(options))
        if isinstance(found, Trunk):
            source, state, unused = f"the trunk of {Path(weights).name}", found.state, found.unused
            mobile = isinstance(found.config, MobileNetV2Config)
            base = base or (presets.mobilenet if mobile else presets.torchvision_v1)(names, ids)
            base = _on_trunk(base, found.config)
        else:
            source, state, old_classes = str(weights), found.state_dict(), found.config.class_names
            base = base or found.config
    here = replace(options, classes=None, category_ids=None)  # these are about the checkpoint
    base = here.apply(base or presets.torchvision_v1(names, ids))
    base = replace(base, class_names=names, category_ids=ids)
    if not state and not base.backbone.norm_eps:  # torchvision's first models: only norms that never learn do without
        base = replace(base, backbone=replace(base.backbone, norm_eps=NORM_EPS))
    for name, value in changes:
        base = base.with_value(name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskRCNN(base)
        _initialize(model)
    return _filled(model.train(), source, state, old_classes, unused)


def _on_trunk(config: MaskRCNNConfig, trunk: ResNetConfig | MobileNetV2Config) -> MaskRCNNConfig:
    """A model of this kind around the trunk of a classifier, which learned from pictures normalised as ImageNet's."""
    planned = config.backbone
    if isinstance(planned, ResNetConfig) and config.fpn is None:
        if not isinstance(trunk, ResNetConfig):
            raise ValueError("weights: expected a ResNet for a model without a feature pyramid, got a MobileNetV2")
        trunk = replace(trunk, dilated=planned.dilated, last_on_rois=planned.last_on_rois)
    usual = InputConfig()
    return replace(config, backbone=trunk, input=replace(config.input, mean=usual.mean, std=usual.std))


def _initialize(model: MaskRCNN) -> None:
    """As torchvision and Detectron2 agree: convolutions of the pyramid and linear layers by Xavier, masks by He.

    The masks' last layer starts near zero, as in Detectron2: by He's rule its single class would start a loss of 6.
    """
    layers: list[nn.Module] = [*model.fpn.modules(), *model.box_head.fcs]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if model.mask_head is None:
        return
    for layer in model.mask_head.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.normal_(model.mask_head.logits.weight, std=0.001)


def _filled(
    model: MaskRCNN, source: str, state: dict[str, Tensor], old_classes: tuple[str, ...], unused: tuple[str, ...]
) -> Start:
    own = model.state_dict()
    reused: list[str] = []
    partial: list[str] = []
    fresh: list[str] = []
    notes = [f"starting from {source}"]
    unlike: dict[str, list[str]] = {}
    classes = model.config.class_names
    rows = {label: old_classes.index(name) for label, name in enumerate(classes) if name in old_classes}
    for name, tensor in own.items():
        found = state.get(name)
        if found is None:
            fresh.append(name)
            continue
        per_class, background = _rows(name, model) if old_classes != classes else (0, 0)
        expected = (per_class * len(old_classes) + background, *tensor.shape[1:]) if per_class else tensor.shape
        if found.shape != expected:
            fresh.append(name)
            unlike.setdefault(name.split(".")[0], []).append(f"{name}: {list(found.shape)} and {list(tensor.shape)}")
        elif not per_class:
            tensor.copy_(found)
            reused.append(name)
        else:
            for new, old in rows.items():
                tensor[new * per_class : (new + 1) * per_class] = found[old * per_class : (old + 1) * per_class]
            if background:
                tensor[-1] = found[-1]
            (partial if rows or background else fresh).append(name)
    left = tuple(name for name in state if name not in own)
    for part, shapes in unlike.items():
        more = f", and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        notes.append(f"{part}: of another shape there than here, so random, {shapes[0]}{more}")
    if old_classes and old_classes != classes:
        kept = [classes[label] for label in rows]
        added = [name for name in classes if name not in kept]
        notes.append(f"classes kept: {', '.join(kept) or 'none'}; new: {', '.join(added) or 'none'}")
    groups = sorted({name.split(".")[0] for name in fresh})
    counts = [f"{len(reused)} tensors reused"]
    counts += [f"{len(partial)} by rows"] if partial else []
    counts += [f"{len(fresh)} begin at random: {', '.join(groups)}"] if fresh else []
    notes.append(", ".join(counts))
    return Start(model, source, tuple(reused), tuple(partial), tuple(fresh), (*unused, *left), tuple(notes))


def _rows(name: str, model: MaskRCNN) -> tuple[int, int]:
    """How many rows each class has in a tensor, 0 where it is not about classes; and the background after them."""
    config = model.config
    if name.startswith("box_head.classes."):
        return 1, 1
    if name.startswith("box_head.deltas.") and not config.box_head.class_agnostic:
        return 4, 0
    if name.startswith("mask_head.logits.") and config.mask_head and not config.mask_head.class_agnostic:
        return 1, int(config.mask_head.softmax)
    return 0, 0
