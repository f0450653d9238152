"""What weights cannot say: the values that a caller may give beside a checkpoint."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from ..config import AnchorConfig, MaskRCNNConfig, MobileNetV2Config
from .coco import COCO_CATEGORY_IDS, COCO_NAMES, coco_by_id

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Values that override what a family of checkpoints means by default; None leaves it.

    Attributes:
        min_size, max_size: the short side of a picture after scaling, and the limit of the long one.
        pixel_mean, pixel_std: of red, green and blue, in levels of 0..255; torchvision's ``image_mean`` times 255.
        anchor_sizes: square roots of the anchors' areas: one number for each of the pyramid's five levels, or a list
            for each; of a model without a pyramid those of its only map.
        aspect_ratios: height over width of the anchors.
        activation: ``"relu"`` or ``"relu6"``, of a MobileNetV2.
        taps: four blocks of a MobileNetV2 whose maps the pyramid takes, as torchvision's ``features`` numbers them.
        norm_eps: epsilon of every norm.
        norm_groups: of group norms, where the checkpoint has such.
        style: ``"pytorch"`` (RGB input, ImageNet statistics, a bottleneck's stride in the 3x3 convolution), ``"bgr"``
            (the same with BGR input) or ``"caffe"`` (BGR input with unit deviation, stride in the first 1x1), for
            Detectron2 and MMDetection.
        classes: names of the foreground classes, in the order of the scores.
        category_ids: the dataset's id of each class.
        pre_nms, rpn_nms_threshold, proposals: of the RPN: the anchors of a level that go into suppression, the IoU
            above which one suppresses another, and how many proposals of a picture the box head gets; fewer are faster.
        sampling_ratio: samples per bin and axis of RoIAlign; 0 adapts to the RoI.
        score_threshold, nms_threshold, max_detections: of the final selection.

    Raises:
        ValueError: naming the option, for a value that cannot be meant.
    """

    min_size: int | None = None
    max_size: int | None = None
    pixel_mean: Sequence[float] | None = None
    pixel_std: Sequence[float] | None = None
    anchor_sizes: Sequence[float] | Sequence[Sequence[float]] | None = None
    aspect_ratios: Sequence[float] | None = None
    activation: Literal["relu", "relu6"] | None = None
    taps: Sequence[int] | None = None
    norm_eps: float | None = None
    norm_groups: int | None = None
    style: Literal["pytorch", "bgr", "caffe"] | None = None
    classes: Sequence[str] | None = None
    category_ids: Sequence[int] | None = None
    pre_nms: int | None = None
    rpn_nms_threshold: float | None = None
    proposals: int | None = None
    sampling_ratio: int | None = None
    score_threshold: float | None = None
    nms_threshold: float | None = None
    max_detections: int | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Options":
        """Keyword arguments as options; an unknown name is an error."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"unknown options {unknown}: expected, of a checkpoint, some of {known}")
        return cls(**given)

    def __post_init__(self) -> None:
        for name in ("min_size", "max_size", "pre_nms", "proposals", "max_detections", "norm_groups"):
            value = getattr(self, name)
            _check(value is None or (type(value) is int and value > 0), name, "a positive whole number", value)
        ratio = self.sampling_ratio
        _check(
            ratio is None or (type(ratio) is int and ratio >= 0), "sampling_ratio", "a whole number from 0 on", ratio
        )
        for name in ("score_threshold", "nms_threshold", "rpn_nms_threshold"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= 1, name, "a number in 0..1", value)
        for name, low in (("pixel_mean", -math.inf), ("pixel_std", 0.0)):
            value = getattr(self, name)
            good = value is None or (len(value) == 3 and all(low < x < math.inf for x in value))
            _check(good, name, "three numbers" + (" above 0" if low == 0 else ""), value)
        _check(self.norm_eps is None or self.norm_eps >= 0, "norm_eps", "a number of at least 0", self.norm_eps)
        _check(self.activation in (None, "relu", "relu6"), "activation", "'relu' or 'relu6'", self.activation)
        _check(self.style in (None, "pytorch", "bgr", "caffe"), "style", "'pytorch', 'bgr' or 'caffe'", self.style)
        for name, kind, expected in (
            ("classes", str, "a list of names"),
            ("category_ids", int, "a list of integers"),
            ("taps", int, "four numbers of blocks"),
        ):
            value = getattr(self, name)
            good = isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)
            _check(value is None or good, name, expected, value)
        ids = self.category_ids
        _check(ids is None or len(set(ids)) == len(ids), "category_ids", "distinct integers", ids)

    def class_names(self, count: int, found: Sequence[str] | None = None) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Names and ids of ``count`` classes: as given, else as ``found``, else COCO's for its count, else made up."""
        if self.classes is not None:
            names = tuple(self.classes)
            _check(len(names) == count, "classes", f"{count} names, one for each class of the checkpoint", names)
        elif found is not None and len(found) == count:
            names = tuple(found)
        elif count == len(COCO_NAMES):
            names = COCO_NAMES
        elif count == 90:
            names = coco_by_id()
        else:
            names = tuple(f"class_{i}" for i in range(count))
        if self.category_ids is not None:
            ids = tuple(self.category_ids)
            _check(len(ids) == count, "category_ids", f"{count} ids, one for each class of the checkpoint", ids)
            return names, ids
        return names, COCO_CATEGORY_IDS if names == COCO_NAMES else tuple(range(1, count + 1))

    def apply(self, config: MaskRCNNConfig) -> MaskRCNNConfig:
        """The config with every value that is given here, except ``style``, which the families read."""
        if self.classes is not None or self.category_ids is not None:
            names, ids = self.class_names(config.num_classes, config.class_names)
            ids = config.category_ids if self.category_ids is None else ids
            config = replace(config, class_names=names, category_ids=ids)
        resize = _replaced(config.input.resize, min_size=self.min_size, max_size=self.max_size)
        detection = _replaced(
            config.detection,
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )
        backbone = self._norms(config.backbone)
        if self.activation is not None:
            mobile = isinstance(backbone, MobileNetV2Config)
            _check(mobile or self.activation == "relu", "activation", "'relu' for a ResNet", self.activation)
            if isinstance(backbone, MobileNetV2Config):
                backbone = replace(backbone, relu6=self.activation == "relu6")
        if self.taps is not None:
            good = isinstance(backbone, MobileNetV2Config) and len(self.taps) == 4
            _check(good, "taps", "four blocks, of a MobileNetV2", self.taps)
            backbone = replace(backbone, taps=tuple(self.taps))
        return replace(
            config,
            input=_replaced(config.input, resize=resize, mean=_floats(self.pixel_mean), std=_floats(self.pixel_std)),
            backbone=backbone,
            fpn=self._norms(config.fpn),
            box_head=self._norms(config.box_head),
            mask_head=self._norms(config.mask_head),
            anchors=self._anchors(config.anchors),
            rpn=_replaced(
                config.rpn, pre_nms=self.pre_nms, nms_threshold=self.rpn_nms_threshold, post_nms=self.proposals
            ),
            pool=_replaced(config.pool, sampling_ratio=self.sampling_ratio),
            detection=detection,
        )

    def _norms(self, part: Any) -> Any:
        """A part of the model with the norms that are given here; None where there is no such part."""
        if part is None:
            return None
        return _replaced(part, norm_eps=self.norm_eps, norm_groups=self.norm_groups if part.norm_groups else None)

    def _anchors(self, anchors: AnchorConfig) -> AnchorConfig:
        if self.anchor_sizes is not None:
            number = len(anchors.sizes)
            levels = [(size,) if isinstance(size, (int, float)) else tuple(size) for size in self.anchor_sizes]
            if number == 1:
                levels = [tuple(size for level in levels for size in level)]
            even = len(levels) == number and len({len(level) for level in levels}) == 1
            good = even and all(level and min(level) > 0 for level in levels)
            expected = f"positive sizes for each of {number} level(s), equally many on each"
            _check(good, "anchor_sizes", expected, self.anchor_sizes)
            anchors = replace(anchors, sizes=tuple(tuple(float(size) for size in level) for level in levels))
        if self.aspect_ratios is not None:
            numbers = all(isinstance(ratio, Real) for ratio in self.aspect_ratios)
            ratios = tuple(map(float, self.aspect_ratios)) if numbers else ()
            expected = "positive numbers, the same for all levels"
            _check(bool(ratios) and min(ratios) > 0, "aspect_ratios", expected, self.aspect_ratios)
            anchors = replace(anchors, aspect_ratios=ratios)
        return anchors


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def _replaced(config: Any, **values: Any) -> Any:
    return replace(config, **{name: value for name, value in values.items() if value is not None})


def _check(good: bool, name: str, expected: str, came: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {came!r}")
