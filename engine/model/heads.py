"""The box head and the mask head of Mask R-CNN, on RoI features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import segmented_nms
from . import boxes as B
from .config import BoxHeadConfig, DetectionConfig, MaskHeadConfig
from .layers import ConvNorm, norms_of, relu

__all__ = ["BOX_WEIGHTS", "BoxHead", "MaskHead", "candidates", "select_detections"]

BOX_WEIGHTS = (10.0, 5.0)


class BoxHead(nn.Module):
    """RoI features -> class logits, background last, and box deltas."""

    def __init__(self, channels: int, num_classes: int, config: BoxHeadConfig) -> None:
        super().__init__()
        norm = norms_of(config)
        self.convs = nn.Sequential()
        for _ in range(config.convs):
            self.convs.append(ConvNorm(channels, config.conv_channels, 3, **norm, activation=relu()))
            channels = config.conv_channels
        self.average = config.average
        self.fcs = nn.ModuleList()
        width = channels if config.average else channels * config.resolution**2
        for outputs in config.fcs:
            self.fcs.append(nn.Linear(width, outputs))
            width = outputs
        self.classes = nn.Linear(width, num_classes + 1)
        self.deltas = nn.Linear(width, 4 * (1 if config.class_agnostic else num_classes))
        for layer, std in ((self.classes, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, C, 7, 7], best in channels_last memory -> logits [N, K + 1] and deltas [N, K or 1, 4]."""
        x = self.convs(features).permute(0, 2, 3, 1)
        x = x.mean((1, 2)) if self.average else x.flatten(1)  # no copy when channels_last
        for layer in self.fcs:
            x = F.relu(layer(x), inplace=True)
        deltas = self.deltas(x)
        return self.classes(x), deltas.unflatten(1, (-1, 4))


class RectifiedDeconv(nn.ConvTranspose2d):
    """A transposed convolution, then a rectifier."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.relu(super().forward(x), inplace=True)


class MaskHead(nn.Module):
    """RoI features -> a mask of the wanted class alone, at twice the resolution."""

    def __init__(self, channels: int, num_classes: int, config: MaskHeadConfig) -> None:
        super().__init__()
        norm = norms_of(config)
        self.class_agnostic, self.softmax = config.class_agnostic, config.softmax
        self.convs = nn.Sequential()
        for outputs in config.convs:
            self.convs.append(ConvNorm(channels, outputs, 3, **norm, activation=relu()))
            channels = outputs
        self.deconv: nn.Module = RectifiedDeconv(channels, config.deconv_channels, 2, 2)
        masks = 1 if config.class_agnostic else num_classes
        self.logits = nn.Conv2d(config.deconv_channels, masks + 1 if config.softmax else masks, 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features [N, C, 14, 14] and labels int64 [N] -> mask logits [N, 28, 28], whose sigmoids are probabilities."""
        chosen = self.channel(labels)
        x = self._upsampled(features)
        if self.softmax:  # sigmoid(logit) = p of the class, against all that it competes with
            scores = self.logits(x).float()
            own = torch.arange(scores.shape[1], device=labels.device) == chosen[:, None]  # [N, K + 1]
            rest = scores.masked_fill(own[..., None, None], -torch.inf)
            top = rest.amax(1, keepdim=True)  # torch's logsumexp cannot be exported for as many RoIs as there are
            rest = (rest - top).exp().sum(1).log() + top[:, 0]
            return (_channels(scores, chosen) - rest).to(x.dtype)
        weight = self.logits.weight.flatten(1)[chosen]  # [N, C]
        bias = self.logits.bias[chosen]  # type: ignore[index]
        # The last 1x1 convolution, for one class per RoI: [N, 784, C] @ [N, C, 1].
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        logits = torch.baddbmm(bias[:, None, None], pixels, weight[..., None])
        return logits[..., 0].unflatten(1, x.shape[-2:])

    def log_probabilities(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each RoI's class and of the background, both [N, 28, 28] in float32 or better; of a softmax alone."""
        scores = self.logits(self._upsampled(features))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(1)
        return _channels(scores, self.channel(labels)), scores[:, -1]

    def _upsampled(self, features: Tensor) -> Tensor:
        return self.deconv(self.convs(features))  # [N, C, 28, 28]

    def channel(self, labels: Tensor) -> Tensor:
        """Which mask is that of a class."""
        return torch.zeros_like(labels) if self.class_agnostic else labels


def _channels(x: Tensor, chosen: Tensor) -> Tensor:
    """One channel of each: [N, K, h, w] and [N] -> [N, h, w]."""
    return x.gather(1, chosen[:, None, None, None].expand(-1, 1, *x.shape[2:]))[:, 0]


def candidates(
    logits: Tensor, deltas: Tensor, proposals: Tensor, image_sizes: Tensor, config: DetectionConfig
) -> tuple[Tensor, Tensor]:
    """What may become a detection: every (proposal, class); arguments as in :func:`select_detections`.

    Returns:
        boxes float32 [B, R, K or 1, 4], clipped, in the network's frame, and scores float32 [B, R, K], -1 where the
        box is too small or not finite.
    """
    classes = logits.shape[2] - 1
    scores = logits.softmax(-1, dtype=torch.float32)[..., :classes]  # [B, R, K]
    boxes = B.clip(B.decode(deltas, proposals[:, :, None], BOX_WEIGHTS), image_sizes)  # [B, R, K or 1, 4]
    return boxes, torch.where(B.is_valid(boxes, config.min_size), scores, -1.0)


def select_detections(
    logits: Tensor, deltas: Tensor, proposals: Tensor, count: Tensor, image_sizes: Tensor, config: DetectionConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose detections: score every (proposal, class), suppress within each class, keep the best.

    Args:
        logits: [B, R, K + 1], background last.
        deltas: [B, R, K or 1, 4].
        proposals: float32 [B, R, 4]; rows from ``count`` [B] on are padding.
        image_sizes: int64 [B, 2], valid (height, width).

    Returns:
        boxes float32 [B, D, 4] in the network's frame, scores float32 [B, D] falling, labels int64 [B, D], count
        int32 [B]; D = ``config.max_detections``. Rows beyond the count are zero, their labels too.
    """
    boxes, scores = candidates(logits, deltas, proposals, image_sizes, config)
    batch, rows, classes = scores.shape
    boxes, scores = boxes.expand(-1, -1, classes, -1).reshape(batch, -1, 4), scores.flatten(1)  # [B, R * K(, 4)]
    labels = torch.arange(classes, dtype=torch.int32, device=count.device).repeat(rows).expand(batch, -1)
    keep, found = segmented_nms(
        boxes,
        scores,
        config.nms_threshold,
        config.max_detections,
        labels=labels,
        score_threshold=config.score_threshold,
        counts=count * classes,
    )
    row = keep.clamp(min=0)
    kept = keep >= 0
    boxes = boxes.gather(1, row[..., None].expand(-1, -1, 4)) * kept[..., None]
    return boxes, scores.gather(1, row) * kept, row % classes * kept, found
