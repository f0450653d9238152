"""The layers of the inference copy of a model: what takes the place of convolutions on each kind of device."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cpu.winograd import prepare_weight, tiles_at_a_time, winograd_conv, worth_it
from ...kernels.dispatch import use_triton
from ...kernels.epilogue import add_bias, conv_relu, has_conv_relu, pool_bias_relu
from ..model.heads import MaskHead
from ..model.layers import ConvNorm, relu

__all__ = [
    "BiasedConv",
    "BiasedPool",
    "Channels",
    "FusedConv",
    "FusedLinear",
    "FusedMaskHead",
    "PixelMaskHead",
    "PooledConv",
    "PredictedConv",
    "Unchanged",
    "WinogradConv",
    "folded",
    "has_onednn",
    "lean",
]

ROIS = 8  # at a time in a mask head: 6 MB of pixels
POOLED_ROWS = 16  # at a time in a stem: of a picture 1344 wide, 6 MB before they are pooled


class FusedConv(nn.Module):
    """A convolution on a CPU as one oneDNN primitive, with bias, residual and activation.

    On a trunk this saves a third of the time against convolution, addition and rectifier one by one: each of those
    passes over a large map that no cache holds. So does a new map, whose memory the system must find page by page:
    with ``overwrites`` the result takes the residual's place.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry: Any = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.activation, self.limits = {
            type(None): ("none", []),
            nn.ReLU: ("relu", []),
            nn.ReLU6: ("hardtanh", [0.0, 6.0]),
        }[type(activation)]
        self.overwrites = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            operation = torch.ops.mkldnn._convolution_pointwise
            return operation(x, self.weight, self.bias, *self.geometry, self.activation, self.limits, "")
        then = None if self.activation == "none" else self.activation
        options = (self.weight, self.bias, *self.geometry, "add", 1.0, then, self.limits, "")
        if self.overwrites:
            return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *options)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *options)


class RectifiedConv(nn.Module):
    """A :class:`ConvNorm` with a rectifier on an NVIDIA GPU as one kernel of cuDNN."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.folded()
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry: Any = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_relu(x, self.weight, self.bias, residual, **self.geometry)


class BiasedConv(nn.Module):
    """A :class:`ConvNorm` on a GPU as a convolution and one kernel for the rest; a smaller residual is enlarged."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        self.conv = layer.folded()
        assert self.conv.bias is not None
        self.bias, self.conv.bias = self.conv.bias, None
        self.relu = layer.activation is not None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return add_bias(self.conv(x), self.bias, residual, relu=self.relu)


class GroupNormConv(nn.Module):
    """A :class:`ConvNorm` with a group norm, which depends on the picture and so stays a step of its own."""

    def __init__(self, layer: ConvNorm, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.activation = layer.norm, layer.activation
        layer.norm = layer.activation = None
        self.conv = lean(layer, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        assert isinstance(self.norm, nn.GroupNorm)
        x = _group_norm(x, self.norm) if x.device.type == "cpu" and x.dtype == torch.float32 else self.norm(x)
        if residual is not None:
            x += residual
        return x if self.activation is None else self.activation(x)


def _group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Of a channels_last map, whose squares torch's own sums in float32, at the cost of three digits and more."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, h * w, C]
    mean = pixels.mean(1)
    var = (pixels - mean[:, None]).square_().mean(1)
    # Of channels, and from those of groups, [N, G, C / G], and few.
    mean, var = (each.double().unflatten(1, (norm.num_groups, -1)) for each in (mean, var))
    middle = mean.mean(2, keepdim=True)
    spread = var.mean(2, keepdim=True) + (mean - middle).square().mean(2, keepdim=True)
    weight, bias = (each.double().unflatten(0, (norm.num_groups, -1)) for each in (norm.weight, norm.bias))
    scale = weight * (spread + norm.eps).rsqrt()
    shift = bias - middle * scale
    scale, shift = (each.flatten(1).float()[..., None, None] for each in (scale, shift))
    return torch.addcmul(shift, x, scale)


class BiasedPool(nn.Module):
    """What follows the first convolution of a ResNet on a GPU, as one kernel."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return pool_bias_relu(x, self.bias)


class Unchanged(nn.Module):
    """Leaves a coarse map to the layer that adds it."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return x


class WinogradConv(nn.Module):
    """A :class:`ConvNorm` of a 3x3 convolution on a CPU; of large maps, with 4 times fewer multiplications."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        self.direct = FusedConv(layer.folded(), layer.activation)
        self.channels = min(layer.conv.in_channels, layer.conv.out_channels)
        self.limits = {
            type(None): (-torch.inf, torch.inf),
            nn.ReLU: (0.0, torch.inf),
            nn.ReLU6: (0.0, 6.0),
        }[type(layer.activation)]
        self.overwrites = False  # what it is given, where it adds no residual
        self._prepared: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.worth_it(x):
            return self.direct(x, residual)
        if residual is None:
            return self.winograd(x, overwrite=self.overwrites)
        x = winograd_conv(x, self._weight(), self.direct.bias, -torch.inf, torch.inf)
        return x.add_(residual).clamp_(*self.limits)

    def worth_it(self, x: Tensor) -> bool:
        images, _, height, width = x.shape
        return worth_it(images, height, width, self.channels)

    def winograd(self, x: Tensor, **options: Any) -> Tensor:
        return winograd_conv(x, self._weight(), self.direct.bias, *self.limits, **options)

    def _weight(self) -> Tensor:
        """Four times as large as the convolution's own, so made when there is a map that wants it."""
        tiles = tiles_at_a_time()
        if self._prepared is None or self._prepared[0] != tiles:
            self._prepared = (tiles, prepare_weight(self.direct.weight))
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # oneDNN's tensors can be neither copied nor pickled


class PredictedConv(nn.Module):
    """A convolution on a CPU and the 1x1 predictors of its pixels, side by side in the channels of one map.

    Winograd's convolution gives them its pixels while they are in the cache, and writes no map of its own.
    """

    def __init__(self, conv: nn.Module, predictors: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.conv = conv
        merged = nn.Conv2d(predictors[0].in_channels, sum(layer.out_channels for layer in predictors), 1)
        merged.weight.data, merged.bias.data = (  # type: ignore[union-attr]
            torch.cat([getattr(layer, name) for layer in predictors]) for name in ("weight", "bias")
        )
        self.predict = FusedConv(merged)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, WinogradConv) and self.conv.worth_it(x):
            return self.conv.winograd(x, then=(self.predict.weight.flatten(1), self.predict.bias))
        return self.predict(self.conv(x))


class Channels(nn.Module):
    """Some channels of a map."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.chosen = slice(start, stop)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.chosen]


class PooledConv(nn.Module):
    """A ResNet's first convolution on a CPU, 7x7 with stride 2, and the pooling behind it, 3x3 with stride 2.

    Some rows at a time, so that the map between them, the largest of all, stays in the cache.
    """

    def __init__(self, conv: FusedConv) -> None:
        super().__init__()
        self.conv = conv
        (_, across), *rest = conv.geometry
        conv.geometry = ((0, across), *rest)  # the rows outside are given to it

    def forward(self, x: Tensor) -> Tensor:
        height = -(-x.shape[2] // 2)  # of the map between
        rows = range(-(-height // 2))
        bands = [rows[i : i + POOLED_ROWS] for i in rows[::POOLED_ROWS]]
        return torch.cat([torch.cat([self._band(image, band, height) for band in bands], 2) for image in x.split(1)])

    def _band(self, image: Tensor, band: range, height: int) -> Tensor:
        first, behind = 2 * band.start - 1, 2 * band.stop  # of the map between: of each three rows, one is shared
        top, bottom = max(first, 0), min(behind, height)
        between = self.conv(_rows(image, 2 * top - 3, 2 * bottom + 2, 0.0))
        return F.max_pool2d(_rows(between, first - top, behind - top, -torch.inf), 3, 2, (0, 1))


def _rows(x: Tensor, start: int, stop: int, outside: float) -> Tensor:
    """Rows of a map [N, C, H, W], of which some may be outside."""
    found = x[:, :, max(start, 0) : stop]
    above, below = max(-start, 0), max(stop - x.shape[2], 0)
    return F.pad(found, (0, 0, above, below), value=outside) if above or below else found


class FusedLinear(nn.Module):
    """A linear layer on a CPU by oneDNN: 1.1 times the speed of the default BLAS for the box head's thousand RoIs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PixelMaskHead(nn.Module):
    """A :class:`MaskHead` on a GPU whose deconvolution makes of each pixel four, side by side in the channels.

    As a 1x1 convolution, which cuDNN fuses as any other; and nothing is turned around but the logits.
    """

    def __init__(self, head: MaskHead, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.convs, self.logits, self.channel = head.convs, head.logits, head.channel
        self.pixels = lean(_four_pixels(head.deconv), device, dtype)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        chosen = self.channel(labels)
        weight, bias = self.logits.weight.flatten(1)[chosen], self.logits.bias[chosen]  # type: ignore[index]
        x = self.pixels(self.convs(features)).permute(0, 2, 3, 1)  # [N, h, w, 4 * O]
        pixels = x.reshape(len(x), -1, weight.shape[1])  # no copy when channels_last
        logits = torch.baddbmm(bias[:, None, None], pixels, weight[..., None])
        return _in_rows(logits, x.shape[1], x.shape[2])


class FusedMaskHead(nn.Module):
    """The same on a CPU, where each of the four pixels becomes one logit while it is in the cache."""

    def __init__(self, head: MaskHead) -> None:
        super().__init__()
        self.convs, self.logits, self.channel = head.convs, head.logits, head.channel
        pixels = _four_pixels(head.deconv).conv
        assert pixels.bias is not None
        self.weight, self.bias = nn.Parameter(pixels.weight.flatten(1)), pixels.bias

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        chosen = self.channel(labels)
        weight, bias = self.logits.weight.flatten(1)[chosen], self.logits.bias[chosen]  # type: ignore[index]
        x = self.convs(features).permute(0, 2, 3, 1)  # [N, h, w, C]
        n, height, width, _ = x.shape
        logits = x.new_empty(n, height * width * 4)
        for i in range(0, n, ROIS):
            rows = x[i : i + ROIS].flatten(0, 2)
            pixels = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "relu", [], "")
            # One by one: what a product of a batch rounds to depends on how many are in it.
            for k, roi in enumerate(pixels.view(-1, logits.shape[1], weight.shape[1]), i):
                torch.mv(roi, weight[k], out=logits[k])
        return _in_rows(logits.add_(bias[:, None]), height, width)


def _four_pixels(deconv: nn.Module) -> ConvNorm:
    """A transposed convolution and its rectifier as a 1x1 convolution, since kernel and stride are 2.

    Side by side in the channels are the four pixels of a square, row by row: 2 * 2 * O.
    """
    assert isinstance(deconv, nn.ConvTranspose2d)
    assert deconv.bias is not None
    layer = ConvNorm(deconv.in_channels, 4 * deconv.out_channels, 1, activation=relu())
    layer.conv.weight = nn.Parameter(deconv.weight.permute(2, 3, 1, 0).flatten(0, 2)[..., None, None])
    layer.conv.bias = nn.Parameter(deconv.bias.repeat(4))
    return layer


def _in_rows(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits of squares of four pixels, in any shape of N * h * w * 2 * 2 -> [N, 2h, 2w]."""
    return logits.reshape(-1, height, width, 2, 2).transpose(2, 3).reshape(-1, 2 * height, 2 * width)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has the operations, which its own compiler uses, for this dtype on this processor."""
    wanted = ("_convolution_pointwise", "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in wanted)):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def lean(layer: ConvNorm, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """What takes the layer's place."""
    if isinstance(layer.norm, nn.GroupNorm):
        return GroupNormConv(layer, device, dtype)
    if device.type == "cpu" and has_onednn(dtype):
        if dtype == torch.float32 and layer.suits_winograd:
            return WinogradConv(layer)
        return FusedConv(layer.folded(), layer.activation)
    if device.type == "cuda" and type(layer.activation) in (nn.ReLU, type(None)):
        # Of 3 channels, as the stem has, cuDNN's fused kernels are far slower than its others (pytorch#68506).
        plain = layer.conv.groups == 1 and layer.conv.in_channels % 8 == 0
        if layer.activation is not None and plain and has_conv_relu(device, dtype):
            return RectifiedConv(layer)
        if use_triton(device):
            return BiasedConv(layer)
    return folded(layer)


def folded(layer: ConvNorm) -> nn.Module:
    """The layer with its batch norm in the convolution."""
    if not isinstance(layer.norm, nn.GroupNorm):
        layer.conv, layer.norm = layer.folded(), None
    return layer
