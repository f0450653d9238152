"""Detectron2's own model with the same weights, where it is installed.

Of its package the Python part is enough: RoIAlign and suppression are torchvision's there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.model.checkpoints import family
from ...engine.model.checkpoints.detectron2 import DETECTRON2, preset_of
from ...engine.model.checkpoints.mapping import Layout
from ...engine.model.config import MaskRCNNConfig, ResNetConfig
from ...engine.model.mask_rcnn import MaskRCNN
from ..installed import optional
from ..matching import Found
from .likeness import depth, unlike_preset

__all__ = ["detecting", "twin", "unlike"]


def unlike(config: MaskRCNNConfig) -> str:
    """The parts of a config that Detectron2's models have otherwise, in words; "" where it can run the weights."""
    parts = unlike_preset(config, preset_of(Layout.of(config))(config.class_names, config.category_ids))
    if depth(config.backbone) is None:
        parts.append("backbone")
    return ", ".join(parts)


def twin(source: MaskRCNN) -> torch.nn.Module:
    """Detectron2's model with the weights and the config of ``source``, in which nothing may be `unlike`.

    What resizes its pictures is its attribute ``shortest_edge``.
    """
    config, trunk = source.config, source.config.backbone
    mask = config.mask_head
    assert isinstance(trunk, ResNetConfig)
    assert mask is not None
    settings = optional("detectron2.config").get_cfg()
    model = settings.MODEL
    model.DEVICE, model.MASK_ON = "cpu", True
    model.PIXEL_MEAN, model.PIXEL_STD = list(config.input.mean[::-1]), list(config.input.std[::-1])  # BGR
    model.RESNETS.DEPTH, model.RESNETS.RES5_DILATION = depth(trunk), 2 if trunk.dilated else 1
    model.RESNETS.NUM_GROUPS, model.RESNETS.WIDTH_PER_GROUP = trunk.groups, trunk.group_width
    model.RESNETS.STRIDE_IN_1X1 = trunk.stride_in_1x1
    model.ANCHOR_GENERATOR.SIZES = [list(sizes) for sizes in config.anchors.sizes]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(config.anchors.aspect_ratios)]
    # What is left of Detectron2's defaults is a C4 model.
    if config.fpn is not None:
        model.BACKBONE.NAME = "build_resnet_fpn_backbone"
        model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    elif trunk.dilated:
        model.RESNETS.OUT_FEATURES = model.RPN.IN_FEATURES = ["res5"]
    if not trunk.last_on_rois:
        model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES = "StandardROIHeads", model.RPN.IN_FEATURES[:4]
        model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", len(config.box_head.fcs)
        model.ROI_BOX_HEAD.NUM_CONV = config.box_head.convs
    parts: list[tuple[Any, Any]] = [(model.RESNETS, trunk), (model.FPN, config.fpn)]
    for part, norms in (*parts, (model.ROI_BOX_HEAD, config.box_head), (model.ROI_MASK_HEAD, mask)):
        if norms is not None and norms.norm_groups:
            part.NORM = "GN"
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = config.rpn.pre_nms, config.rpn.post_nms
    model.RPN.NMS_THRESH = config.rpn.nms_threshold
    model.ROI_HEADS.NUM_CLASSES = config.num_classes
    model.ROI_HEADS.SCORE_THRESH_TEST = config.detection.score_threshold
    model.ROI_HEADS.NMS_THRESH_TEST = config.detection.nms_threshold
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = config.box_head.resolution
    model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", len(mask.convs)
    model.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    settings.TEST.DETECTIONS_PER_IMAGE = config.detection.max_detections
    made: Any = optional("detectron2.modeling").build_model(settings)
    made.load_state_dict(family.export(DETECTRON2, source, bgr=True))
    resize = config.input.resize
    made.shortest_edge = optional("detectron2.data.transforms").ResizeShortestEdge(
        [resize.min_size] * 2, resize.max_size
    )
    ready: torch.nn.Module = made.eval()
    return ready


def detecting(
    twin: Any, pictures: Sequence[NDArray[np.uint8]], device: str = "cpu", autocast: torch.dtype | None = None
) -> Callable[[], list[Found]]:
    """A call of Detectron2's model on RGB pictures, resized as its `DefaultPredictor` does.

    Args:
        autocast: lower precision, of what autocast lowers.
    """

    @torch.inference_mode()
    def call() -> list[Found]:
        inputs = []
        for picture in pictures:
            bgr = picture[:, :, ::-1]
            resized = twin.shortest_edge.get_transform(bgr).apply_image(bgr)
            image = torch.from_numpy(resized.astype(np.float32).transpose(2, 0, 1).copy()).to(device)
            inputs.append({"image": image, "height": picture.shape[0], "width": picture.shape[1]})
        with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
            found = [one["instances"].to("cpu") for one in twin(inputs)]
        return [
            Found(
                one.pred_boxes.tensor.float().numpy(),
                one.scores.float().numpy(),
                one.pred_classes.numpy(),
                one.pred_masks.numpy(),
            )
            for one in found
        ]

    return call
