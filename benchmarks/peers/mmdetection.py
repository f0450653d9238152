"""MMDetection's own model with the same weights. Of mmcv it needs the compiled ops."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.model.checkpoints import family
from ...engine.model.checkpoints.mapping import Layout
from ...engine.model.checkpoints.mmdet import MMDET, preset_of
from ...engine.model.config import MaskRCNNConfig, ResNetConfig
from ...engine.model.mask_rcnn import MaskRCNN
from ..installed import optional
from ..matching import Found
from .likeness import depth, unlike_preset

__all__ = ["detecting", "twin", "unlike"]

_CONFIGS = ".mim/configs"  # beside the package's code
_FPN = "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
_C4 = "mask_rcnn/mask-rcnn_r50-caffe-c4_1x_coco.py"
_GROUP_NORMS = "gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py"


def unlike(config: MaskRCNNConfig) -> str:
    """The parts of a config that MMDetection's models have otherwise, in words; "" where it can run the weights."""
    parts = unlike_preset(config, preset_of(Layout.of(config))(config.class_names, config.category_ids))
    if depth(config.backbone) is None:
        parts.append("backbone")
    if config.fpn is not None and any(len(sizes) != 1 for sizes in config.anchors.sizes):
        parts.append("anchors")
    return ", ".join(parts)


def twin(source: MaskRCNN) -> torch.nn.Module:
    """MMDetection's model with the weights and the config of ``source``, in which nothing may be `unlike`.

    Its test pipeline, which reads and resizes a picture, is its attribute ``pipeline``.
    """
    config, trunk = source.config, source.config.backbone
    assert isinstance(trunk, ResNetConfig)
    optional("mmdet.utils").register_all_modules(init_default_scope=True)
    folder = Path(optional("mmdet").__file__).parent
    file = _C4 if trunk.last_on_rois else _GROUP_NORMS if trunk.norm_groups else _FPN
    settings = optional("mmengine.config").Config.fromfile(folder / _CONFIGS / file)
    model, limits = settings.model, config.detection
    model.data_preprocessor.update(mean=list(config.input.mean), std=list(config.input.std), bgr_to_rgb=True)
    model.backbone.update(depth=depth(trunk), style="caffe" if trunk.stride_in_1x1 else "pytorch")
    model.backbone.init_cfg = None
    if trunk.groups > 1:
        model.backbone.update(type="ResNeXt", groups=trunk.groups, base_width=trunk.group_width)
    anchors = model.rpn_head.anchor_generator
    anchors.update(base_sizes=[1.0], scales=list(config.anchors.sizes[0]), ratios=list(config.anchors.aspect_ratios))
    if config.fpn is not None:
        anchors.update(base_sizes=[size for (size,) in config.anchors.sizes], scales=[1.0])
    model.roi_head.bbox_head.num_classes = model.roi_head.mask_head.num_classes = config.num_classes
    proposals, detections = model.test_cfg.rpn, model.test_cfg.rcnn
    proposals.update(nms_pre=config.rpn.pre_nms, max_per_img=config.rpn.post_nms)
    proposals.nms.iou_threshold = config.rpn.nms_threshold
    detections.update(score_thr=limits.score_threshold, max_per_img=limits.max_detections)
    detections.nms.iou_threshold = limits.nms_threshold
    made: Any = optional("mmdet.registry").MODELS.build(model)
    made.load_state_dict(family.export(MMDET, source))
    resize = config.input.resize
    made.pipeline = optional("mmcv.transforms").Compose(
        [
            {"type": "mmdet.LoadImageFromNDArray"},
            {"type": "mmdet.Resize", "scale": (resize.max_size, resize.min_size), "keep_ratio": True},
            {"type": "mmdet.PackDetInputs", "meta_keys": ("ori_shape", "img_shape", "scale_factor")},
        ]
    )
    ready: torch.nn.Module = made.eval()
    return ready


def detecting(
    twin: Any, pictures: Sequence[NDArray[np.uint8]], device: str = "cpu", autocast: torch.dtype | None = None
) -> Callable[[], list[Found]]:
    """A call of MMDetection's model on RGB pictures, resized by its own test pipeline.

    Args:
        autocast: lower precision, of what autocast lowers.
    """

    @torch.inference_mode()
    def call() -> list[Found]:
        packed = [twin.pipeline({"img": np.ascontiguousarray(picture[:, :, ::-1])}) for picture in pictures]
        batch = {key: [one[key] for one in packed] for key in ("inputs", "data_samples")}
        with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
            found = [one.pred_instances.cpu() for one in twin.test_step(batch)]
        return [
            Found(
                one.bboxes.float().numpy(),
                one.scores.float().numpy(),
                one.labels.numpy(),
                np.asarray(one.masks),
            )
            for one in found
        ]

    return call
