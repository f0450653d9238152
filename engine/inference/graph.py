"""The inference copy of a model: norms folded, operations fused, channels_last, in the wanted precision."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels import mask_probabilities, masks_to_rle
from ...kernels.cpu.winograd import transform_weight, winograd_conv
from ...kernels.paste_rule import PasteRule
from ..model.anchors import Anchors
from ..model.layers import ConvNorm
from ..model.mask_rcnn import Detections, MaskRCNN

__all__ = ["fold", "optimize", "run_lengths"]


class FusedConv(nn.Module):
    """A :class:`ConvNorm` on a CPU as one oneDNN primitive: convolution, bias, residual and activation.

    On a trunk this saves a third of the time against convolution, addition and rectifier one by one: each of those
    passes over a large map that no cache holds.
    """

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.folded()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.activation, self.limits = {
            type(None): ("none", []),
            nn.ReLU: ("relu", []),
            nn.ReLU6: ("hardtanh", [0.0, 6.0]),
        }[type(layer.activation)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return operation(x, self.weight, self.bias, *self.geometry, self.activation, self.limits, "")
        then = None if self.activation == "none" else self.activation
        return operation.binary(x, residual, self.weight, self.bias, *self.geometry, "add", 1.0, then, self.limits, "")


class WinogradConv(nn.Module):
    """A :class:`ConvNorm` of a 3x3 convolution on a CPU, with 4 times fewer multiplications."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.folded()
        assert conv.bias is not None
        self.weight, self.bias = nn.Parameter(transform_weight(conv.weight)), conv.bias
        self.limits = {
            type(None): (-torch.inf, torch.inf),
            nn.ReLU: (0.0, torch.inf),
            nn.ReLU6: (0.0, 6.0),
        }[type(layer.activation)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return winograd_conv(x, self.weight, self.bias, *self.limits)
        x = winograd_conv(x, self.weight, self.bias, -torch.inf, torch.inf)
        return x.add_(residual).clamp_(*self.limits)


class FusedLinear(nn.Module):
    """A linear layer on a CPU by oneDNN: 1.1 times the speed of the default BLAS for the box head's thousand RoIs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has the operations, which its own compiler uses, for this dtype on this processor."""
    wanted = ("_convolution_pointwise", "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in wanted)):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _lean(layer: ConvNorm, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """What takes the layer's place."""
    if device.type == "cpu":
        if dtype == torch.float32 and layer.suits_winograd:
            return WinogradConv(layer)
        if _has_onednn(dtype):
            return FusedConv(layer)
    return _folded(layer)


def _folded(layer: ConvNorm) -> nn.Module:
    layer.conv, layer.norm = layer.folded(), None
    return layer


def _exact_copy(model: MaskRCNN) -> MaskRCNN:
    """A float32 copy in evaluation mode; the original is left as it is."""
    model = copy.deepcopy(model).eval().requires_grad_(False).float()
    # A model in half precision has rounded these too.
    model.rpn.anchors = Anchors(model.config.anchors)
    for values, exact in ((model.mean, model.config.input.mean), (model.std, model.config.input.std)):
        values.copy_(torch.tensor(exact).view(3, 1, 1))
    return model


def _replace_convolutions(model: MaskRCNN, lean: Callable[[ConvNorm], nn.Module]) -> MaskRCNN:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ConvNorm):
                setattr(parent, name, lean(layer).requires_grad_(False))
    return model


@torch.no_grad()
def fold(model: MaskRCNN, dtype: torch.dtype) -> MaskRCNN:
    """A copy of ``model`` on the CPU of plain layers alone, norms folded, weights in ``dtype``: to be exported."""
    model = _replace_convolutions(_exact_copy(model).cpu(), _folded)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def optimize(model: MaskRCNN, device: torch.device, dtype: torch.dtype) -> MaskRCNN:
    """A copy of ``model`` for inference on ``device``; the original is left as it is.

    Weights take ``dtype``; anchors, normalisation and all arithmetic on boxes stay in float32.
    """
    model = _replace_convolutions(_exact_copy(model), lambda layer: _lean(layer, device, dtype))
    if device.type == "cpu" and _has_onednn(dtype):
        model.box_head.fcs = nn.ModuleList(FusedLinear(layer) for layer in model.box_head.fcs)
    for parameter in model.parameters():
        memory = torch.channels_last if parameter.dim() == 4 else torch.preserve_format
        parameter.data = parameter.data.to(dtype, memory_format=memory)
    return model.to(device)  # last: folding takes float64, which not every device has


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
