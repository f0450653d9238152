"""Region proposal network (Ren et al., 2015) on the levels of a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels import proposals, segmented_nms
from .anchors import Anchors
from .config import AnchorConfig, RPNConfig
from .layers import ConvNorm, relu

__all__ = ["BOX_WEIGHTS", "RPN"]

BOX_WEIGHTS = (1.0, 1.0)


class RPN(nn.Module):
    """The head that scores and moves anchors, and the choice of proposals."""

    def __init__(self, channels: int, config: RPNConfig, anchors: AnchorConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.anchors = Anchors(anchors, strides)
        self.convs = nn.Sequential(*[ConvNorm(channels, channels, 3, activation=relu()) for _ in range(config.convs)])
        self.objectness = nn.Conv2d(channels, anchors.per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors.per_cell, 1)
        for layer in (self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pyramid of [B, C, H, W] -> per level, logits [B, H*W*A] and deltas [B, H*W*A, 4]."""
        logits, deltas = [], []
        for x in pyramid:
            x = self.convs(x)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
        return logits, deltas

    def select(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        feature_sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
        image_sizes: Tensor,
        *,
        config: RPNConfig | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose proposals: the best anchors of each level, suppressed within it; then the best of all levels.

        Logits order exactly as probabilities do, without the ties of a saturated float32 sigmoid.

        Args:
            logits, deltas: what :meth:`forward` gives.
            feature_sizes: (height, width) per level.
            padded_size: (height, width) of the network's input.
            image_sizes: int64 [B, 2], valid (height, width); proposals are clipped to it.
            config: other limits than the model's.

        Returns:
            boxes float32 [B, post_nms, 4] by falling score, zeros beyond the count, and the count int64 [B].
        """
        config, batch = config or self.config, image_sizes.shape[0]
        chosen = [score.topk(min(config.pre_nms, score.shape[1])) for score in logits]  # [B, k] each
        # Every (picture, level) is a segment of the suppression: [B * levels, pre_nms, 4] and [B * levels, pre_nms].
        boxes, scores = proposals(
            [score for score, _ in chosen],
            [index for _, index in chosen],
            deltas,
            self.anchors.cells,
            [columns for _, columns in feature_sizes],
            [self.anchors.stride(level, size, padded_size) for level, size in enumerate(feature_sizes)],
            image_sizes,
            capacity=config.pre_nms,
            min_size=config.min_size,
        )
        keep, _ = segmented_nms(
            boxes, scores, config.nms_threshold, min(config.pre_nms, config.post_nms), score_threshold=-torch.inf
        )
        row = keep.clamp(min=0)
        scores = scores.gather(1, row).masked_fill_(keep < 0, -torch.inf).view(batch, -1)
        boxes = boxes.gather(1, row[..., None].expand(-1, -1, 4)).view(batch, -1, 4)
        best, index = scores.topk(min(config.post_nms, scores.shape[1]))
        there = best > -torch.inf
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * there[..., None]
        return boxes, there.sum(1)
