"""Whether a peer can run weights: what it can be told, and what it has built in."""

from dataclasses import fields, replace

from ...engine.model.config import DEPTHS, MaskRCNNConfig, MobileNetV2Config, ResNetConfig

__all__ = ["depth", "unlike_preset"]

_DEPTHS = {blocks: int(name) for name, blocks in DEPTHS[True].items()}


def depth(trunk: ResNetConfig | MobileNetV2Config) -> int | None:
    """By which peers name a ResNet of bottlenecks; None for another trunk."""
    return _DEPTHS.get(trunk.blocks) if isinstance(trunk, ResNetConfig) and trunk.bottleneck else None


def unlike_preset(config: MaskRCNNConfig, preset: MaskRCNNConfig) -> list[str]:
    """The parts of a config that a preset with the same free values has otherwise.

    Free is what every peer can be told: sizes of pictures and of anchors, counts and thresholds; and, of the trunk and
    of a normalisation, all.
    """
    if config.strides != preset.strides:  # the rest of one would not even fit the other
        return ["fpn"]
    resize, rpn, limits = config.input.resize, config.rpn, config.detection
    scaled = replace(preset.input.resize, min_size=resize.min_size, max_size=resize.max_size)
    like = replace(
        preset,
        input=replace(config.input, resize=scaled),
        backbone=config.backbone,
        anchors=replace(preset.anchors, sizes=config.anchors.sizes, aspect_ratios=config.anchors.aspect_ratios),
        rpn=replace(preset.rpn, pre_nms=rpn.pre_nms, post_nms=rpn.post_nms, nms_threshold=rpn.nms_threshold),
        detection=replace(
            preset.detection,
            score_threshold=limits.score_threshold,
            nms_threshold=limits.nms_threshold,
            max_detections=limits.max_detections,
        ),
    )
    return [one.name for one in fields(config) if getattr(config, one.name) != getattr(like, one.name)]
