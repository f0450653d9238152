"""End to end on a CPU: from a decoded photograph to boolean masks, beside torchvision with the same weights.

Both sides resize, detect, and threshold their pasted masks; torchvision gets its float tensor ready made.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..engine.inference.predictor import Predictor
from ..engine.model.checkpoints import family, load_model
from ..engine.model.checkpoints.torchvision import TORCHVISION
from ..engine.model.config import MaskRCNNConfig, MobileNetV2Config
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.model.presets import torchvision_v1
from .harness import Row, compare, optional

__all__ = ["run"]

SCORE_TOLERANCE, MASK_TOLERANCE = 1e-3, 0.02


def run(threads: int, quick: bool) -> Iterator[list[Row]]:
    """The bundled model and ResNet-50 FPN, on scikit-image's portrait of an astronaut."""
    data = optional("skimage.data")
    if data is None:
        raise ImportError("models: expected scikit-image, whose sample portrait is the input; pip install scikit-image")
    portrait = np.ascontiguousarray(data.astronaut()[::2, ::2] if quick else data.astronaut())
    landscape = np.ascontiguousarray(data.coffee()[::2, ::2] if quick else data.coffee())
    rounds = 2 if quick else 15
    yield _pair("people, MobileNetV2 FPN, 512 x 512 at 320", load_model("people"), portrait, rounds, threads)
    if not quick:
        model = resnet50()
        for limit in (100, 10):
            case = f"ResNet-50 FPN, 400 x 600 at 800 x 1200, {limit} detections"
            yield _pair(case, model, landscape, 5, threads, max_detections=limit)


def resnet50() -> MaskRCNN:
    """torchvision's v1 architecture with random weights that find a hundred objects."""
    torch.manual_seed(0)
    names = tuple(f"class {i}" for i in range(1, 91))
    model = MaskRCNN(torchvision_v1(names, tuple(range(1, 91)))).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gain = 0.06 if "lateral" in name else 0.3 if "deltas" in name else 1.5 if "classes" in name else 1.0
            torch.nn.init.normal_(parameter, std=gain * (2 / parameter[0].numel()) ** 0.5)
        elif name.endswith("conv3.norm.weight"):
            torch.nn.init.constant_(parameter, 0.3)
    return model


def _pair(
    case: str, model: MaskRCNN, picture: np.ndarray, rounds: int, threads: int, max_detections: int = 100
) -> list[Row]:
    predictor = Predictor(model, device="cpu", max_detections=max_detections)

    def ours() -> dict[str, np.ndarray]:
        result = predictor.predict(picture)
        return {"scores": result.scores, "boxes": result.boxes, "masks": result.masks}

    implementations = {"torchvision": _torchvision(model, predictor.config, picture), "trimask": ours}
    return compare("models", case, implementations, _disagreement, rounds=rounds, threads=threads)


def _torchvision(
    source: MaskRCNN, config: MaskRCNNConfig, picture: np.ndarray
) -> Callable[[], dict[str, np.ndarray]] | None:
    torchvision = optional("torchvision")
    if torchvision is None:
        return None
    model = _twin(torchvision, source, config)
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255

    @torch.inference_mode()
    def theirs() -> dict[str, np.ndarray]:
        (found,) = model([image])
        masks = found["masks"][:, 0] > 0.5
        return {"scores": found["scores"].numpy(), "boxes": found["boxes"].numpy(), "masks": masks.numpy()}

    return theirs


def _twin(torchvision: Any, source: MaskRCNN, config: MaskRCNNConfig) -> torch.nn.Module:
    """torchvision's own model with the weights of ``source`` and the limits of ``config``."""
    detection = torchvision.models.detection
    limits = {
        "min_size": config.input.resize.min_size,
        "max_size": config.input.resize.max_size,
        "box_score_thresh": config.detection.score_threshold,
        "box_detections_per_img": config.detection.max_detections,
    }
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    classes = config.num_classes + 1
    if isinstance(config.backbone, MobileNetV2Config):
        trunk = torchvision.models.mobilenet_v2(weights=None, norm_layer=frozen).features
        for module in trunk.modules():  # ReLU, where the config says so
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU6) and not config.backbone.relu6:
                    setattr(module, name, torch.nn.ReLU(inplace=True))
        levels = {str(tap): str(i) for i, tap in enumerate(config.backbone.taps)}
        channels = config.fpn.channels
        backbone = detection.backbone_utils.BackboneWithFPN(trunk, levels, [24, 32, 96, 320], channels)
        assert config.mask_head is not None
        model = detection.MaskRCNN(
            backbone,
            rpn_anchor_generator=detection.rpn.AnchorGenerator(
                config.anchors.sizes, (config.anchors.aspect_ratios,) * len(config.anchors.sizes)
            ),
            box_head=detection.faster_rcnn.TwoMLPHead(channels * 49, config.box_head.fcs[0]),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(config.box_head.fcs[-1], classes),
            mask_head=detection.mask_rcnn.MaskRCNNHeads(channels, config.mask_head.convs, 1),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(channels, config.mask_head.deconv_channels, classes),
            **limits,
        )
    else:
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=frozen
        )
        model = detection.MaskRCNN(backbone, classes, **limits)
    detection._utils.overwrite_eps(model, config.backbone.norm_eps)
    model.load_state_dict(family.export(TORCHVISION, source))
    return model.eval()


def _disagreement(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> str:
    """How two sets of detections differ, in words; near ties may swap rows."""
    if len(theirs["scores"]) != len(ours["scores"]):
        return f"{len(theirs['scores'])} detections and {len(ours['scores'])}"
    if not len(ours["scores"]):
        return "no detection to compare"
    difference = np.abs(theirs["scores"] - ours["scores"]).max()
    if difference > SCORE_TOLERANCE:
        return f"scores differ by {difference:.2g}"
    areas = [np.sort(found["masks"].sum((1, 2))) for found in (theirs, ours)]
    difference = np.abs(areas[0] - areas[1]).sum() / areas[0].sum()
    return f"mask areas differ by {difference:.2%}" if difference > MASK_TOLERANCE else ""
