"""The inference copy of a model: norms folded, operations fused, channels_last, in the wanted precision."""

import copy

import torch
from torch import Tensor, nn

from ..model.layers import ConvNorm
from ..model.mask_rcnn import MaskRCNN

__all__ = ["optimize"]


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
        kind = type(layer.activation)
        self.activation, self.limits = {
            type(None): ("none", []),
            nn.ReLU: ("relu", []),
            nn.ReLU6: ("hardtanh", [0.0, 6.0]),
        }[kind]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return operation(x, self.weight, self.bias, *self.geometry, self.activation, self.limits, "")
        then = None if self.activation == "none" else self.activation
        return operation.binary(x, residual, self.weight, self.bias, *self.geometry, "add", 1.0, then, self.limits, "")


def _has_fused_convolution() -> bool:
    """Whether this build of torch has the operation, which its own compiler uses on CPUs too."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


@torch.no_grad()
def optimize(model: MaskRCNN, device: torch.device, dtype: torch.dtype) -> MaskRCNN:
    """A copy of ``model`` for inference on ``device``; the original is left as it is.

    Weights take ``dtype``; anchors, normalisation and all arithmetic on boxes stay in float32.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    fuse = device.type == "cpu" and _has_fused_convolution()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, ConvNorm):
                continue
            if fuse:
                setattr(parent, name, FusedConv(layer).requires_grad_(False))
            else:
                layer.conv, layer.norm = layer.folded().requires_grad_(False), None
    for parameter in model.parameters():
        memory = torch.channels_last if parameter.dim() == 4 else torch.preserve_format
        parameter.data = parameter.data.to(dtype, memory_format=memory)
    return model
