"""What a Mask R-CNN is: frozen values, one dataclass per component.

Every difference between the worlds of torchvision, Detectron2 and MMDetection is a value in one of these classes;
:mod:`.presets` sets them. The modules read values and never ask where a checkpoint came from.

A config is built by calling constructors, goes to JSON and back without loss (:meth:`MaskRCNNConfig.to_json`), and
travels inside every checkpoint that the project writes.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...kernels.paste_rule import PasteRule

__all__ = [
    "DEPTHS",
    "AnchorConfig",
    "BoxHeadConfig",
    "DetectionConfig",
    "FPNConfig",
    "InputConfig",
    "MaskHeadConfig",
    "MaskRCNNConfig",
    "MobileNetV2Config",
    "PoolConfig",
    "RPNConfig",
    "ResNetConfig",
    "ResizeConfig",
    "describe",
    "describe_trunk",
]


DEPTHS = {  # blocks per stage of the ResNets that there are; the key says whether they are bottlenecks
    False: {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3)},
    True: {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)},
}


@dataclass(frozen=True)
class ResizeConfig:
    """How a picture is scaled before the network sees it.

    Attributes:
        min_size: the short side after scaling, in pixels.
        max_size: the long side is scaled down further where it would exceed this.
        antialias: widen the bilinear filter when shrinking, as PIL does; torchvision and OpenCV do not.
        quantize: scale in whole grey levels: by PIL's arithmetic where ``antialias`` is set, else by OpenCV's.
        round_half_up: new side = floor(size * scale + 0.5); otherwise floor(size * scale), which rounding can leave
            one pixel short of ``min_size`` (161 gives 799), exactly as in torchvision.
        limit_second: scale to ``min_size`` first, then scale the unrounded sides down to ``max_size``, as Detectron2
            does; otherwise by the smaller of the two scales at once. One size in eight thousand differs by a pixel.
    """

    min_size: int = 800
    max_size: int = 1333
    antialias: bool = False
    quantize: bool = False
    round_half_up: bool = False
    limit_second: bool = False


@dataclass(frozen=True)
class InputConfig:
    """Normalisation of RGB values in 0..255; checkpoints trained on BGR are flipped when they are converted."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    size_divisible: int = 32
    resize: ResizeConfig = ResizeConfig()


@dataclass(frozen=True)
class ResNetConfig:
    """ResNet and ResNeXt (He et al., 2016; Xie et al., 2017).

    Attributes:
        blocks: residual blocks in each of the four stages.
        bottleneck: 1x1-3x3-1x1 blocks; otherwise two 3x3 (ResNet-18 and 34).
        groups, group_width: of the 3x3 convolutions (ResNeXt-50-32x4d: 32 and 4; plain: 1 and 64).
        stride_in_1x1: a stage halves the resolution in its first 1x1 convolution (the original MSRA models, caffe
            style) rather than in the 3x3.
        norm_eps: epsilon of the norms.
        norm_groups: of group norms in the place of batch norms; 0 for none.
        dilated: the last stage keeps the resolution, and spreads its 3x3 convolutions over every other pixel (DC5).
        last_on_rois: the last stage sees what is pooled for a region rather than the picture (C4); both heads share
            its weights.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64
    stride_in_1x1: bool = False
    norm_eps: float = 1e-5
    norm_groups: int = 0
    dilated: bool = False
    last_on_rois: bool = False

    @property
    def stride(self) -> int:
        """Pixels of the picture per pixel of the coarsest map."""
        return 16 if self.dilated or self.last_on_rois else 32


@dataclass(frozen=True)
class MobileNetV2Config:
    """MobileNetV2 (Sandler et al., 2018).

    Attributes:
        taps: indices of the inverted-residual blocks, in torchvision's ``features`` numbering, whose outputs feed the
            FPN: the last block at each of the strides 4, 8, 16, 32.
        relu6: clip activations at 6, as the published ImageNet weights expect.
        norm_eps: epsilon of the batch norms.
    """

    taps: tuple[int, ...] = (3, 6, 13, 17)
    relu6: bool = True
    norm_eps: float = 1e-5

    stride: ClassVar[int] = 32  # as of a ResNet
    last_on_rois: ClassVar[bool] = False
    norm_groups: ClassVar[int] = 0


@dataclass(frozen=True)
class FPNConfig:
    """Feature pyramid (Lin et al., 2017): four levels and a fifth by subsampling, for the RPN alone."""

    channels: int = 256
    norm: bool = False
    norm_eps: float = 1e-5
    norm_groups: int = 0


@dataclass(frozen=True)
class AnchorConfig:
    """Anchor boxes.

    Attributes:
        sizes: square root of the anchors' area, per level; several sizes on a level are allowed.
        aspect_ratios: height over width, shared by the levels.
        round: round the cell's corners to whole pixels, as torchvision does.
        stride_from_size: stride = padded picture size // feature size (torchvision; 61 rather than 64 on the coarsest
            level of an 800 pixel high input); otherwise the level's nominal stride.
    """

    sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    round: bool = True
    stride_from_size: bool = True

    @property
    def per_cell(self) -> int:
        return len(self.sizes[0]) * len(self.aspect_ratios)


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (Ren et al., 2015) and the selection of its proposals.

    Attributes:
        convs: 3x3 convolutions before the two predictors.
        pre_nms, post_nms: anchors kept per level before, and proposals per picture after, suppression.
        nms_threshold: IoU above which a proposal suppresses another of its level.
        min_size: shortest side of a proposal, in pixels of the resized picture; empty boxes never pass.
    """

    convs: int = 1
    pre_nms: int = 1000
    post_nms: int = 1000
    nms_threshold: float = 0.7
    min_size: float = 0.001


@dataclass(frozen=True)
class PoolConfig:
    """RoIAlign, or what went before it, and the choice of a pyramid level (FPN paper, equation 1).

    Attributes:
        maximum: of the samples in a bin, rather than their average.
        quantized: RoIPool (Fast R-CNN): the largest pixel of a bin, its edges rounded to whole pixels, so that the
            maximum, the samples and the alignment have no meaning.
        sampling_ratio: samples per bin and axis; 0 adapts to the RoI.
        aligned: shift by half a pixel, so that continuous coordinates are meant.
        canonical_size, canonical_level: a RoI of this size is pooled from this level.
        level_epsilon, epsilon_inside_log: floor(level + log2(size / canonical) + eps), or eps added to the ratio.
    """

    maximum: bool = False
    quantized: bool = False
    sampling_ratio: int = 2
    aligned: bool = False
    canonical_size: int = 224
    canonical_level: int = 4
    level_epsilon: float = 1e-6
    epsilon_inside_log: bool = False


@dataclass(frozen=True)
class BoxHeadConfig:
    """Box head: ``convs`` 3x3 convolutions, then the linear layers ``fcs`` by width, then the two predictors.

    The linear layer after pooling takes its input in (row, column, channel) order: that of channels_last memory.

    Attributes:
        average: the mean of each channel comes before the linear layers, in the place of all its pixels.
    """

    resolution: int = 7
    convs: int = 0
    conv_channels: int = 256
    fcs: tuple[int, ...] = (1024, 1024)
    norm: bool = False
    norm_eps: float = 1e-5
    norm_groups: int = 0
    class_agnostic: bool = False
    average: bool = False


@dataclass(frozen=True)
class MaskHeadConfig:
    """Mask head: 3x3 convolutions by width, a 2x upsampling of ``deconv_channels``, and a 1x1 predictor.

    Attributes:
        softmax: the classes and the background compete for each pixel, as in FCN; otherwise each class has a mask of
            its own, by a sigmoid.
    """

    resolution: int = 14
    convs: tuple[int, ...] = (256, 256, 256, 256)
    deconv_channels: int = 256
    norm: bool = False
    norm_eps: float = 1e-5
    norm_groups: int = 0
    class_agnostic: bool = False
    softmax: bool = False


@dataclass(frozen=True)
class DetectionConfig:
    """Selection of the final detections.

    Attributes:
        score_threshold: a (proposal, class) pair takes part above this probability.
        nms_threshold: IoU above which a detection suppresses another of its class.
        max_detections: per picture, by falling score.
        min_size: shortest side, in pixels of the resized picture, before suppression.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    min_size: float = 0.01


@dataclass(frozen=True)
class MaskRCNNConfig:
    """The whole model. ``mask_head=None`` makes it Faster R-CNN, ``fpn=None`` one of the trunk's last map alone.

    Attributes:
        class_names: of the foreground classes, label 0 first.
        category_ids: the dataset's id of each class, for results that go back to it (COCO's ids have gaps).
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    input: InputConfig = InputConfig()
    backbone: ResNetConfig | MobileNetV2Config = field(default_factory=ResNetConfig)
    fpn: FPNConfig | None = FPNConfig()
    anchors: AnchorConfig = AnchorConfig()
    rpn: RPNConfig = RPNConfig()
    pool: PoolConfig = PoolConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig | None = MaskHeadConfig()
    detection: DetectionConfig = DetectionConfig()
    paste: PasteRule = PasteRule.TORCHVISION

    def __post_init__(self) -> None:
        if not self.class_names or len(self.class_names) != len(self.category_ids):
            raise ValueError(
                "class_names and category_ids: expected one id for each of at least one class, "
                f"got {len(self.class_names)} names and {len(self.category_ids)} ids"
            )
        per_level = [len(sizes) for sizes in self.anchors.sizes]
        if len(per_level) != len(self.strides) or len(set(per_level)) != 1:
            raise ValueError(
                f"anchors.sizes: expected {len(self.strides)} level(s) with the same number of sizes each, "
                f"got {per_level}"
            )
        if self.fpn is not None and self.backbone.stride != 32:
            raise ValueError(
                "fpn: expected None beside backbone.dilated and .last_on_rois, which leave no fourth level"
            )

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return len(self.class_names)

    @property
    def categories(self) -> dict[int, str]:
        """The name of each category id."""
        return dict(zip(self.category_ids, self.class_names, strict=True))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the picture per pixel of each map that has anchors, finest first."""
        if self.fpn is not None:
            return 4, 8, 16, 32, 64
        return (self.backbone.stride,)

    @property
    def mask_side(self) -> int | None:
        """Of the masks that the mask head makes; None without one."""
        if self.mask_head is None:
            return None
        return self.mask_head.resolution * (1 if self.backbone.last_on_rois else 2)

    def to_json(self) -> str:
        return json.dumps(_to_plain(self), indent=None, separators=(",", ":"))

    def with_value(self, name: str, value: Any) -> "MaskRCNNConfig":
        """The config with one value changed, by its dotted name: ``with_value("rpn.post_nms", 300)``.

        Raises:
            ValueError: naming the field that does not exist, or does not take such a value.
        """
        plain = _to_plain(self)
        parts = name.split(".")
        inner = plain
        for part in parts[:-1]:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or parts[-1] not in inner or parts[-1] == "type":
            raise ValueError(f"config.{name}: expected the name of a value, such as rpn.post_nms; there is none")
        inner[parts[-1]] = _to_plain(value)
        return _from_plain(type(self), plain, "config")

    @classmethod
    def from_json(cls, text: str) -> "MaskRCNNConfig":
        """Rebuild a config; a :class:`ValueError` names the field that is unknown, missing or of the wrong type."""
        try:
            plain = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"config: expected JSON, got {text[:40]!r}... ({error})") from None
        return _from_plain(cls, plain, "config")


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``; ``where`` is its dotted name, for errors."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        name = value.get("type") if isinstance(value, dict) else type(value).__name__
        options = {option.__name__: option for option in typing.get_args(kind)}
        if name not in options:
            raise ValueError(f"{where}: expected one of {sorted(options)}, got {name!r}")
        kind = options[name]
    if kind is types.NoneType:
        return None
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        unknown = sorted(set(value) - set(names) - {"type"})
        if unknown:
            raise ValueError(f"{where}: unknown fields {unknown}; written by a newer version?")
        try:
            return kind(**{n: _from_plain(hints[n], value[n], f"{where}.{n}") for n in names if n in value})  # type: ignore[operator]
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(args) != len(value)):
            raise ValueError(f"{where}: expected a list of {len(args)} values, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and type(value) is int and abs(value) < 1 << 1023:  # beyond is no float
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r:.80}")
    return value


def describe(config: MaskRCNNConfig) -> str:
    """A line such as ``Mask R-CNN, ResNet-50 FPN, 80 classes``."""
    trunk = describe_trunk(config.backbone) + (" FPN" if config.fpn else "")
    parts = (config.backbone, config.fpn, config.box_head, config.mask_head)
    trunk += " with group norms" if any(part and part.norm_groups for part in parts) else ""
    kind = "Mask R-CNN" if config.mask_head else "Faster R-CNN"
    plural = "es" if config.num_classes > 1 else ""
    return f"{kind}, {trunk}, {config.num_classes} class{plural}"


def describe_trunk(trunk: ResNetConfig | MobileNetV2Config) -> str:
    """Such as ``ResNet-50 C4``."""
    if isinstance(trunk, MobileNetV2Config):
        return "MobileNetV2"
    depth = next((name for name, blocks in DEPTHS[trunk.bottleneck].items() if blocks == trunk.blocks), "?")
    groups, width = trunk.groups, trunk.group_width
    name = f"ResNet-{depth}" if groups == 1 else f"ResNeXt-{depth}-{groups}x{width}d"
    name += "" if groups > 1 or width == 64 else f" (width {width})"
    return name + (" C4" if trunk.last_on_rois else " DC5" if trunk.dilated else "")
