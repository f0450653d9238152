"""Anchor boxes of the region proposal network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import AnchorConfig

__all__ = ["Anchors"]


class Anchors(nn.Module):
    """Anchors by level and index; only training needs them all at once.

    Anchor ``i`` of a level is shape ``i % A`` at cell ``i // A`` in row-major order; shapes are ordered by aspect
    ratio, then by size.
    """

    cells: Tensor

    def __init__(self, config: AnchorConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.stride_from_size = config.stride_from_size
        ratios = torch.tensor(config.aspect_ratios, dtype=torch.float32).sqrt()
        cells = []
        for sizes in config.sizes:
            side = torch.tensor(sizes, dtype=torch.float32)
            heights, widths = (ratios[:, None] * side).flatten(), ((1 / ratios)[:, None] * side).flatten()
            cells.append(torch.stack([-widths, -heights, widths, heights], 1) / 2)
        corners = torch.stack(cells)  # [levels, A, 4]
        self.register_buffer("cells", corners.round() if config.round else corners, persistent=False)

    def grid(self, level: int, feature_size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
        """The anchors of a level [N, 4], in pixels of the padded picture.

        Args:
            feature_size: (height, width) of the level's map.
            padded_size: (height, width) of the network's input.
        """
        rows, columns = feature_size
        down, right = self.stride(level, feature_size, padded_size)
        y = torch.arange(0, rows * down, down, device=self.cells.device)[:, None].expand(-1, columns)
        x = torch.arange(0, columns * right, right, device=self.cells.device).expand(rows, -1)
        shift = torch.stack([x, y, x, y], -1)  # [h, w, 4]
        return (self.cells[level] + shift[:, :, None]).flatten(0, 2)

    def stride(self, level: int, feature_size: tuple[int, int], padded_size: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the padded picture (down, right) from a cell of a level to the next; see :meth:`grid`."""
        if not self.stride_from_size:
            return self.strides[level], self.strides[level]
        return padded_size[0] // feature_size[0], padded_size[1] // feature_size[1]
