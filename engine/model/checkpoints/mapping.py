"""Key maps: the names of one model family on one side, ours on the other, and what happens to a few of the tensors.

A :class:`Rule` maps the name of a layer both ways; ``{i}`` stands for a number, ``{i+2}`` for that number plus two::

    Rule("backbone.stages.{i}.{j}.conv{k}.conv", "backbone.bottom_up.res{i+2}.{j}.conv{k}")

The last part of a name (``weight``, ``running_mean``) is the same on both sides. A :class:`Transform` says how the
tensor itself changes, and how it changes back.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MaskRCNNConfig, MobileNetV2Config

__all__ = [
    "KeyMap",
    "Layout",
    "Rule",
    "Transform",
    "conv_norm",
    "differences",
    "mobilenet_rules",
    "resnet_rules",
    "stage_rules",
    "transforms",
]

SLOT = re.compile(r"\{(\w)(?:\+(\d+))?\}")


class _Pattern:
    """A name with numbers in it, read and written."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.offsets = {name: int(offset or 0) for name, offset in SLOT.findall(text)}
        literal = SLOT.split(text)[::3]
        slots = (rf"(?P<{name}>0|[1-9]\d*)" for name in self.offsets)
        joined = re.escape(literal[0]) + "".join(s + re.escape(t) for s, t in zip(slots, literal[1:], strict=True))
        self.regex = re.compile(joined)

    def parse(self, name: str) -> dict[str, int] | None:
        match = self.regex.fullmatch(name)
        values = {slot: int(text) - self.offsets[slot] for slot, text in match.groupdict().items()} if match else None
        return values if values is not None and all(value >= 0 for value in values.values()) else None

    def format(self, values: Mapping[str, int]) -> str:
        return SLOT.sub(lambda m: str(values[m[1]] + int(m[2] or 0)), self.text)


class Rule:
    """The name of a layer in our model, and in a family's."""

    def __init__(self, native: str, foreign: str) -> None:
        self.native, self.foreign = _Pattern(native), _Pattern(foreign)


class KeyMap:
    """Rules in order; the first that fits a name decides."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def to_native(self, name: str) -> str | None:
        """Our name of a family's tensor; None where no rule fits."""
        return self._map(name, [(rule.foreign, rule.native) for rule in self.rules])

    def to_foreign(self, name: str) -> str | None:
        return self._map(name, [(rule.native, rule.foreign) for rule in self.rules])

    @staticmethod
    def _map(name: str, pairs: Iterable[tuple[_Pattern, _Pattern]]) -> str | None:
        layer, _, leaf = name.rpartition(".")
        for source, target in pairs:
            values = source.parse(layer)
            if values is not None:
                return f"{target.format(values)}.{leaf}"
        return None


def conv_norm(native: str, conv: str, norm: str) -> tuple[Rule, Rule]:
    """The two layers of a :class:`~trimask.engine.model.layers.ConvNorm`."""
    return Rule(f"{native}.conv", conv), Rule(f"{native}.norm", norm)


def resnet_rules(prefix: str, norm: str = "bn") -> tuple[Rule, ...]:
    """A ResNet with torchvision's names, which MMDetection uses too; ``norm`` begins those of norms."""
    return (
        *conv_norm("backbone.stem", f"{prefix}conv1", f"{prefix}{norm}1"),
        *stage_rules("{i}", f"{prefix}layer{{i+1}}", norm),
    )


def stage_rules(number: str, prefix: str, norm: str = "bn") -> tuple[Rule, ...]:
    """A stage of it, or all of them."""
    ours, theirs = f"backbone.stages.{number}.{{j}}", f"{prefix}.{{j}}"
    return (
        *conv_norm(f"{ours}.conv{{k}}", f"{theirs}.conv{{k}}", f"{theirs}.{norm}{{k}}"),
        *conv_norm(f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1"),
    )


def mobilenet_rules(prefix: str) -> tuple[Rule, ...]:
    """A MobileNetV2 with torchvision's names."""
    block = f"{prefix}{{i}}.conv"
    return (
        *conv_norm("backbone.stem", f"{prefix}0.0", f"{prefix}0.1"),
        # The first block does not expand, so that its layers are numbered one less.
        *conv_norm("backbone.blocks.1.depthwise", f"{prefix}1.conv.0.0", f"{prefix}1.conv.0.1"),
        *conv_norm("backbone.blocks.1.project", f"{prefix}1.conv.1", f"{prefix}1.conv.2"),
        *conv_norm("backbone.blocks.{i}.expand", f"{block}.0.0", f"{block}.0.1"),
        *conv_norm("backbone.blocks.{i}.depthwise", f"{block}.1.0", f"{block}.1.1"),
        *conv_norm("backbone.blocks.{i}.project", f"{block}.2", f"{block}.3"),
    )


class Layout(NamedTuple):
    """What decides how a family names its layers."""

    mobilenet: bool = False
    pyramid: bool = True
    last_on_rois: bool = False
    group_norms: bool = False
    rpn_convs: int = 1
    box_convs: int = 0

    @classmethod
    def of(cls, config: MaskRCNNConfig) -> "Layout":
        trunk = config.backbone
        return cls(
            mobilenet=isinstance(trunk, MobileNetV2Config),
            pyramid=config.fpn is not None,
            last_on_rois=trunk.last_on_rois,
            group_norms=trunk.norm_groups > 0,
            rpn_convs=config.rpn.convs,
            box_convs=config.box_head.convs,
        )


@dataclass(frozen=True)
class Transform:
    """A change of a tensor, and its inverse."""

    to_native: Callable[[Tensor], Tensor]
    to_foreign: Callable[[Tensor], Tensor]


REVERSED_CHANNELS = Transform(lambda x: x.flip(1), lambda x: x.flip(1))
BACKGROUND_LAST = Transform(lambda x: x.roll(-1, 0), lambda x: x.roll(1, 0))


def _without_first_rows(count: int) -> Transform:
    """Rows of the background, which no result ever reads; they come back as zeros."""
    return Transform(lambda x: x[count:], lambda x: torch.cat([x.new_zeros(count, *x.shape[1:]), x]))


def _channels_last_columns(resolution: int) -> Transform:
    """Columns in (channel, row, column) order to (row, column, channel)."""
    grid = (resolution, resolution)
    return Transform(
        lambda x: x.unflatten(1, (-1, *grid)).permute(0, 2, 3, 1).flatten(1),
        lambda x: x.unflatten(1, (*grid, -1)).permute(0, 3, 1, 2).flatten(1),
    )


def _ratios_first(sizes: int, ratios: int) -> Transform:
    """Rows of a cell's anchors, for each size all ratios, to for each ratio all sizes."""
    return Transform(
        lambda x: x.unflatten(0, (sizes, ratios, -1)).transpose(0, 1).flatten(0, 2),
        lambda x: x.unflatten(0, (ratios, sizes, -1)).transpose(0, 1).flatten(0, 2),
    )


def transforms(config: MaskRCNNConfig, *, bgr: bool, background_first: bool, sizes_first: bool) -> dict[str, Transform]:
    """What happens to the tensors of a family, by our names; all others pass as they are."""
    found = {}
    if not config.box_head.average:  # which has no order of pixels
        found["box_head.fcs.0.weight"] = _channels_last_columns(config.box_head.resolution)
    if sizes_first:
        sizes, ratios = len(config.anchors.sizes[0]), len(config.anchors.aspect_ratios)
        for layer, leaf in itertools.product(("objectness", "deltas"), ("weight", "bias")):
            found[f"rpn.{layer}.{leaf}"] = _ratios_first(sizes, ratios)
    if bgr:
        found["backbone.stem.conv.weight"] = REVERSED_CHANNELS
    if background_first:
        for leaf in ("weight", "bias"):
            found[f"box_head.classes.{leaf}"] = BACKGROUND_LAST
            found[f"box_head.deltas.{leaf}"] = _without_first_rows(4)
            found[f"mask_head.logits.{leaf}"] = _without_first_rows(1)
    return found


def differences(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> list[str]:
    """Names that are missing, unused or of another shape: a line for each kind that there is, bounded in length."""
    shared = expected.keys() & found.keys()
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unused": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name])}, expected {list(expected[name])}"
            for name in sorted(shared)
            if found[name] != expected[name]
        ],
    }
    return [f"{kind} ({len(names)}): {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str], limit: int = 8) -> str:
    more = len(names) - limit
    return "; ".join(names[:limit]) + (f"; and {more} more" if more > 0 else "")
