"""The inference copy of a model: norms folded, operations fused, channels_last, in the wanted precision."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels import mask_probabilities, masks_to_rle
from ...kernels.dispatch import use_triton
from ...kernels.paste_rule import PasteRule
from ..model.anchors import Anchors
from ..model.backbone import BasicBlock, Bottleneck, ResNet
from ..model.fpn import FPN
from ..model.layers import ConvNorm
from ..model.mask_rcnn import Detections, MaskRCNN
from .layers import (
    BiasedConv,
    BiasedPool,
    Channels,
    FusedConv,
    FusedLinear,
    FusedMaskHead,
    PixelMaskHead,
    PooledConv,
    PredictedConv,
    Unchanged,
    WinogradConv,
    folded,
    has_onednn,
    lean,
)

__all__ = ["fold", "optimize", "run_lengths"]

ROIS_AT_ONCE = 32  # for a trunk's last stage: 26 MB of pixels; a thousand at once take 0.8 GB, and no less time


def _exact_copy(model: MaskRCNN) -> MaskRCNN:
    """A float32 copy in evaluation mode; the original is left as it is."""
    model = copy.deepcopy(model).eval().float()
    # A model in half precision has rounded these too.
    model.rpn.anchors = Anchors(model.config.anchors, model.config.strides)
    for values, exact in ((model.mean, model.config.input.mean), (model.std, model.config.input.std)):
        values.copy_(torch.tensor(exact).view(3, 1, 1))
    return model


def _replace_convolutions(model: MaskRCNN, made: Callable[[ConvNorm], nn.Module]) -> MaskRCNN:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ConvNorm):
                setattr(parent, name, made(layer))
    return model


def _fuse_for_triton(model: MaskRCNN, device: torch.device, dtype: torch.dtype) -> None:
    """What several layers share on a GPU."""
    if isinstance(model.fpn, FPN) and all(isinstance(layer, BiasedConv) for layer in model.fpn.lateral):
        model.fpn.enlarge = Unchanged()
    if model.mask_head is not None and not model.mask_head.softmax:
        model.mask_head = PixelMaskHead(model.mask_head, device, dtype)  # type: ignore[assignment]
    for block in model.backbone.modules():
        # A shortcut's bias goes to the layer that adds it, which has one of its own.
        shortcut, last = getattr(block, "shortcut", None), getattr(block, "conv3", getattr(block, "conv2", None))
        if isinstance(shortcut, BiasedConv) and last is not None:
            last.bias = nn.Parameter(last.bias + shortcut.bias)
            block.shortcut = shortcut.conv
    if isinstance(model.backbone, ResNet) and isinstance(model.backbone.stem, BiasedConv):
        model.backbone.pool = BiasedPool(model.backbone.stem.bias)
        model.backbone.stem = model.backbone.stem.conv


def _fuse_for_onednn(model: MaskRCNN) -> None:
    """What layers alone cannot do on a CPU."""
    rpn = model.rpn
    rpn.convs[-1] = PredictedConv(rpn.convs[-1], (rpn.objectness, rpn.deltas))
    scores = rpn.objectness.out_channels
    rpn.deltas = Channels(scores, scores + rpn.deltas.out_channels)  # type: ignore[assignment]
    rpn.objectness = Channels(0, scores)  # type: ignore[assignment]
    model.box_head.fcs = nn.ModuleList(FusedLinear(layer) for layer in model.box_head.fcs)
    if model.mask_head is not None and not model.mask_head.softmax:
        model.mask_head = FusedMaskHead(model.mask_head)  # type: ignore[assignment]
    # Nobody else reads a coarser map once it is enlarged, nor a merged one once it is smoothed, nor, within a stage of
    # a ResNet, what a block begins with.
    overwriting: list[nn.Module] = [*model.fpn.lateral, *model.fpn.output] if isinstance(model.fpn, FPN) else []
    if isinstance(model.backbone, ResNet):
        if isinstance(model.backbone.stem, FusedConv):
            model.backbone.stem, model.backbone.pool = PooledConv(model.backbone.stem), nn.Identity()
        model.rois_at_once = ROIS_AT_ONCE
        blocks = [block for block in model.backbone.modules() if isinstance(block, (BasicBlock, Bottleneck))]
        overwriting += [block.conv3 if isinstance(block, Bottleneck) else block.conv2 for block in blocks]
    for layer in overwriting:
        if isinstance(layer, (FusedConv, WinogradConv)):
            layer.overwrites = True


@torch.no_grad()
def fold(model: MaskRCNN, dtype: torch.dtype) -> MaskRCNN:
    """A copy of ``model`` on the CPU of plain layers alone, norms folded, weights in ``dtype``: to be exported."""
    model = _replace_convolutions(_exact_copy(model).cpu(), folded)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


@torch.no_grad()
def optimize(model: MaskRCNN, device: torch.device, dtype: torch.dtype) -> MaskRCNN:
    """A copy of ``model`` for inference on ``device``; the original is left as it is.

    Weights take ``dtype``; anchors, normalisation and all arithmetic on boxes stay in float32.
    """
    model = _replace_convolutions(_exact_copy(model), lambda layer: lean(layer, device, dtype))
    if device.type == "cpu" and has_onednn(dtype):
        _fuse_for_onednn(model)
    elif use_triton(device):
        _fuse_for_triton(model, device, dtype)
    for parameter in model.parameters():
        memory = torch.channels_last if parameter.dim() == 4 else torch.preserve_format
        parameter.data = parameter.data.to(dtype, memory_format=memory)
    # Last: folding takes float64, which not every device has, and makes parameters anew.
    return model.to(device).requires_grad_(False)


def run_lengths(found: Detections, original_sizes: Tensor, rule: PasteRule, capacity: int) -> tuple[Tensor, Tensor]:
    """The masks in their pictures, as COCO run lengths, on the device.

    Args:
        found: with masks, capacity D.
        original_sizes: int64 [B, 2], (height, width) of the pictures.
        rule: which pixels belong to a mask.
        capacity: how many runs of a mask there is room for.

    Returns:
        runs int32 [B, D, capacity], and int32 [B, D], how many each mask has; where that is more than there is room
        for, the first ones are there.
    """
    assert found.mask_logits is not None
    batch, rows = found.labels.shape
    probabilities = mask_probabilities(found.mask_logits.flatten(0, 1))  # [B * D, m, m]
    sizes = original_sizes.repeat_interleave(rows, 0)  # [B * D, 2]
    runs, lengths = masks_to_rle(probabilities, found.boxes.flatten(0, 1), sizes, rule=rule, capacity=capacity)
    return runs.unflatten(0, (batch, rows)), lengths.unflatten(0, (batch, rows))
