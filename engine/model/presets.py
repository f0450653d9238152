"""The conventions of the published model families, each as config values.

Sources: torchvision 0.28 ``models/detection``, Detectron2 ``configs/COCO-InstanceSegmentation`` and
``configs/new_baselines``, MMDetection 2.x ``configs/mask_rcnn``.
"""

from dataclasses import replace

from ...kernels.paste_rule import PasteRule
from .config import (
    AnchorConfig,
    BoxHeadConfig,
    DetectionConfig,
    FPNConfig,
    InputConfig,
    MaskHeadConfig,
    MaskRCNNConfig,
    MobileNetV2Config,
    PoolConfig,
    ResizeConfig,
    ResNetConfig,
    RPNConfig,
)

__all__ = [
    "detectron2",
    "detectron2_c4",
    "detectron2_dc5",
    "mmdet",
    "mmdet_c4",
    "mobilenet",
    "torchvision_v1",
    "torchvision_v2",
]


def torchvision_v1(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """``torchvision.models.detection.maskrcnn_resnet50_fpn``: RGB, legacy RoIAlign, masks pasted at whole pixels."""
    return MaskRCNNConfig(class_names, category_ids, backbone=ResNetConfig(norm_eps=0.0))


def torchvision_v2(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """``maskrcnn_resnet50_fpn_v2``: two RPN convolutions, norms in the FPN and the heads, a convolutional box head."""
    return replace(
        torchvision_v1(class_names, category_ids),
        backbone=ResNetConfig(),
        fpn=FPNConfig(norm=True),
        rpn=RPNConfig(convs=2),
        box_head=BoxHeadConfig(convs=4, fcs=(1024,), norm=True),
        mask_head=MaskHeadConfig(norm=True),
    )


def mobilenet(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """A small network on a MobileNetV2 for small pictures; the bundled model is one."""
    return MaskRCNNConfig(
        class_names,
        category_ids,
        input=InputConfig(resize=ResizeConfig(min_size=320, max_size=512)),
        backbone=MobileNetV2Config(),
        fpn=FPNConfig(channels=128),
        anchors=AnchorConfig(sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))),
        box_head=BoxHeadConfig(fcs=(512, 512)),
        mask_head=MaskHeadConfig(convs=(128, 128, 128, 128), deconv_channels=128),
    )


def detectron2(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """Detectron2's R-CNN FPN baselines: PIL resize, adaptive and aligned RoIAlign, masks pasted continuously.

    The trunk is the MSRA one (stride in the 1x1 convolution, inputs not divided by a standard deviation); X-101 and
    other trunks differ in values that the converter reads from the weights.
    """
    return MaskRCNNConfig(
        class_names,
        category_ids,
        input=InputConfig(
            std=(1.0, 1.0, 1.0),
            resize=ResizeConfig(antialias=True, quantize=True, round_half_up=True, limit_second=True),
        ),
        backbone=ResNetConfig(stride_in_1x1=True),
        anchors=AnchorConfig(round=False, stride_from_size=False),
        rpn=RPNConfig(min_size=0.0),
        pool=PoolConfig(sampling_ratio=0, aligned=True, level_epsilon=1e-8, epsilon_inside_log=True),
        detection=DetectionConfig(min_size=0.0),
        paste=PasteRule.DETECTRON2,
    )


def detectron2_c4(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """Detectron2's C4 baselines: RoIs are pooled from the map of stride 16, and the trunk's last stage sees those."""
    return _c4(detectron2(class_names, category_ids), size_divisible=1)


def detectron2_dc5(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """Detectron2's DC5 baselines: the trunk's last stage is dilated, and its map of stride 16 the only one."""
    config = detectron2(class_names, category_ids)
    return _of_one_map(config, ResNetConfig(stride_in_1x1=True, dilated=True), size_divisible=1)


def mmdet(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """MMDetection's Mask R-CNN, pytorch style: OpenCV resize, stride in the 3x3 convolution, ImageNet statistics."""
    base = detectron2(class_names, category_ids)
    return replace(
        base,
        input=InputConfig(resize=ResizeConfig(quantize=True, round_half_up=True)),
        backbone=ResNetConfig(),
        pool=replace(base.pool, canonical_size=56, canonical_level=2, level_epsilon=1e-6),
    )


def mmdet_c4(class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> MaskRCNNConfig:
    """MMDetection's C4 models, caffe style: BGR input without a deviation, stride in the 1x1 convolution."""
    config = mmdet(class_names, category_ids)
    return _c4(replace(config, input=replace(config.input, std=(1.0, 1.0, 1.0))), config.input.size_divisible)


def _c4(config: MaskRCNNConfig, size_divisible: int) -> MaskRCNNConfig:
    return replace(
        _of_one_map(config, ResNetConfig(stride_in_1x1=True, last_on_rois=True), size_divisible),
        box_head=BoxHeadConfig(resolution=14, fcs=(), average=True),
        mask_head=MaskHeadConfig(convs=()),
    )


def _of_one_map(config: MaskRCNNConfig, trunk: ResNetConfig, size_divisible: int) -> MaskRCNNConfig:
    """Without a feature pyramid: all sizes of anchors on one map, and so more that may become proposals."""
    return replace(
        config,
        input=replace(config.input, size_divisible=size_divisible),
        backbone=trunk,
        fpn=None,
        anchors=replace(config.anchors, sizes=(tuple(size for (size,) in config.anchors.sizes),)),
        rpn=replace(config.rpn, pre_nms=6000),
    )
