"""The pooling ops as modules with the arguments of torchvision's, to put in their place in a model that is there."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .roi_pooling import check_features, flat_roi_align, level_thresholds, pair, roi_align, roi_pool, split_boxes

__all__ = ["MultiScaleRoIAlign", "RoIAlign", "RoIPool"]


class RoIAlign(nn.Module):
    """:func:`.roi_align`, as ``torchvision.ops.RoIAlign``."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class RoIPool(nn.Module):
    """:func:`.roi_pool`, as ``torchvision.ops.RoIPool``."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign over a feature pyramid of lists of boxes, as ``torchvision.ops.MultiScaleRoIAlign``.

    Args:
        featmap_names: which of the maps to pool from, the finest first.
        output_size: bins, (height, width) or one number for both.
        sampling_ratio: samples per bin and axis; ceil(bin size) of them if not positive.
        canonical_scale: side in pixels of a box that belongs on the canonical level.
        canonical_level: number of that level.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size, self.sampling_ratio = output_size, sampling_ratio
        self.canonical_scale, self.canonical_level = canonical_scale, canonical_level

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """
        Args:
            x: maps `[B, C, H_l, W_l]` by name; in their order, the finest first.
            boxes: `[L, 4]` xyxy in pixels for each image.
            image_shapes: (height, width) of each image in the batch, without its padding.

        Returns:
            `[K, C, h, w]`, contiguous, K boxes in all; differentiable with respect to the maps.

        Raises:
            ValueError: no map of those names, or maps, boxes and shapes that do not fit each other.
        """
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"x: expected maps named {', '.join(self.featmap_names)}, got {', '.join(x) or 'none'}")
        check_features(features)
        if not image_shapes or len(boxes) != len(image_shapes):
            raise ValueError(
                f"boxes, image_shapes: expected one each for every image, got {len(boxes)} and {len(image_shapes)}"
            )
        # The powers of two that come closest to the sizes, for maps are rounded up: of both sides, where torchvision
        # looks at the height alone, at the first call, and keeps what it has found.
        sides = max(height for height, _ in image_shapes) + max(width for _, width in image_shapes)
        strides = [2.0 ** round(math.log2(sides / (feature.shape[2] + feature.shape[3]))) for feature in features]
        if sorted(strides) != strides:
            raise ValueError(f"x: expected the finest map first, got strides {strides}")
        # A map of another stride plays the part of the one that torchvision expects in its place.
        octaves = [strides[0] * 2**level for level in range(len(strides))]
        thresholds = level_thresholds(octaves, self.canonical_scale, self.canonical_level)
        corners, images = split_boxes(boxes, features[0])
        scales = [1 / stride for stride in strides]
        return flat_roi_align(
            features, corners, images, scales, thresholds, pair(self.output_size), self.sampling_ratio, False, "avg"
        )

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )
