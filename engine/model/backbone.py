"""Trunks: ResNet, ResNeXt, MobileNetV2. Each gives a feature map for every stage that sees the picture.

There are four, at strides 4, 8, 16 and 32, but for those ResNets that do without a feature pyramid.
"""

from torch import Tensor, nn

from .config import MobileNetV2Config, ResNetConfig
from .layers import ConvNorm, norms_of, relu

__all__ = ["BasicBlock", "Bottleneck", "MobileNetV2", "ResNet", "build_backbone"]

EXPANSION = 4  # output over inner channels of a bottleneck

# Expansion, output channels, repeats, first stride (Sandler et al., table 2).
MOBILENET_V2_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, config: ResNetConfig) -> None:
        super().__init__()
        norm = norms_of(config)
        self.conv1 = ConvNorm(inputs, outputs, 3, stride=stride, dilation=dilation, **norm, activation=relu())
        self.conv2 = ConvNorm(outputs, outputs, 3, dilation=dilation, **norm, activation=relu())
        plain = stride == 1 and inputs == outputs
        self.shortcut = None if plain else ConvNorm(inputs, outputs, 1, stride=stride, **norm)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.conv1(x), residual)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; ``stride_in_1x1`` says which of the first two has the stride."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, dilation: int, config: ResNetConfig) -> None:
        super().__init__()
        norm = norms_of(config)
        filters = {"dilation": dilation, "groups": config.groups}
        stride1, stride3 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(inputs, width, 1, stride=stride1, **norm, activation=relu())
        self.conv2 = ConvNorm(width, width, 3, stride=stride3, **filters, **norm, activation=relu())
        self.conv3 = ConvNorm(width, outputs, 1, **norm, activation=relu())
        plain = stride == 1 and inputs == outputs
        self.shortcut = None if plain else ConvNorm(inputs, outputs, 1, stride=stride, **norm)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x)), residual)


class ResNet(nn.Module):
    """ResNet or ResNeXt; ``channels`` are those of the maps."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        norm = norms_of(config)
        self.stem: nn.Module = ConvNorm(3, 64, 7, stride=2, **norm, activation=relu())
        self.pool: nn.Module = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        self.channels: tuple[int, ...] = ()
        inputs = 64
        for i, count in enumerate(config.blocks):
            planes = 64 * 2**i
            outputs = planes * EXPANSION if config.bottleneck else planes
            width = planes * config.group_width // 64 * config.groups
            dilation = 2 if config.dilated and i == 3 else 1
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 and dilation == 1 else 1
                stage.append(
                    Bottleneck(inputs, width, outputs, stride, dilation, config)
                    if config.bottleneck
                    else BasicBlock(inputs, outputs, stride, dilation, config)
                )
                inputs = outputs
            self.stages.append(stage)
            self.channels += (outputs,)
        self.roi_channels = self.channels[-1]  # of what `on_rois` gives
        self.on_picture = 3 if config.last_on_rois else 4  # stages
        self.channels = self.channels[: self.on_picture]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.pool(self.stem(x))
        maps = []
        for stage in self.stages[: self.on_picture]:
            x = stage(x)
            maps.append(x)
        return maps

    def on_rois(self, features: Tensor) -> Tensor:
        """What the stages that do not see the picture make of pooled features [N, C, 14, 14]: [N, 2C, 7, 7]."""
        for stage in self.stages[self.on_picture :]:
            features = stage(features)
        return features


class InvertedResidual(nn.Module):
    """Expand with a 1x1, filter each channel with a 3x3, project with a linear 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, config: MobileNetV2Config) -> None:
        super().__init__()
        eps, inner = config.norm_eps, inputs * expansion

        def activation() -> nn.Module:
            return nn.ReLU6(inplace=True) if config.relu6 else relu()

        self.expand = None if expansion == 1 else ConvNorm(inputs, inner, 1, norm_eps=eps, activation=activation())
        self.depthwise = ConvNorm(inner, inner, 3, stride=stride, groups=inner, norm_eps=eps, activation=activation())
        self.project = ConvNorm(inner, outputs, 1, norm_eps=eps)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else self.expand(x)
        return self.project(self.depthwise(inner), x if self.residual else None)


class MobileNetV2(nn.Module):
    """MobileNetV2 up to the last tap; ``channels`` are those of the taps."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        activation: nn.Module = nn.ReLU6(inplace=True) if config.relu6 else relu()
        self.stem = ConvNorm(3, 32, 3, stride=2, norm_eps=config.norm_eps, activation=activation)
        # Block i of the paper is features[i] of torchvision; 0 there is the stem.
        self.blocks = nn.ModuleDict()
        self.taps = {str(tap) for tap in config.taps}
        self.channels: tuple[int, ...] = ()
        inputs = 32
        layout = [
            (expansion, outputs, stride if i == 0 else 1)
            for expansion, outputs, repeats, stride in MOBILENET_V2_BLOCKS
            for i in range(repeats)
        ]
        if len(config.taps) != 4 or not all(0 < tap <= len(layout) for tap in config.taps):
            raise ValueError(f"backbone.taps: expected four block numbers in 1..{len(layout)}, got {config.taps}")
        for number, (expansion, outputs, stride) in enumerate(layout[: max(config.taps)], start=1):
            self.blocks[str(number)] = InvertedResidual(inputs, outputs, stride, expansion, config)
            self.channels += (outputs,) if number in config.taps else ()
            inputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for number, block in self.blocks.items():
            x = block(x)
            if number in self.taps:
                maps.append(x)
        return maps


def build_backbone(config: ResNetConfig | MobileNetV2Config) -> ResNet | MobileNetV2:
    return ResNet(config) if isinstance(config, ResNetConfig) else MobileNetV2(config)
