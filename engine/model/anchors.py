"""Anchor boxes of the region proposal network."""

import torch
from torch import Tensor, nn

from .config import AnchorConfig
from .fpn import STRIDES

__all__ = ["Anchors"]


class Anchors(nn.Module):
    """Anchors by index, without ever building the grid.

    Anchor ``i`` of a level is shape ``i % A`` at cell ``i // A`` in row-major order; shapes are ordered by aspect
    ratio, then by size.
    """

    cells: Tensor

    def __init__(self, config: AnchorConfig) -> None:
        super().__init__()
        self.stride_from_size = config.stride_from_size
        ratios = torch.tensor(config.aspect_ratios).sqrt()
        cells = []
        for sizes in config.sizes:
            heights = (ratios[:, None] * torch.tensor(sizes)).flatten()
            widths = ((1 / ratios)[:, None] * torch.tensor(sizes)).flatten()
            cells.append(torch.stack([-widths, -heights, widths, heights], 1) / 2)
        corners = torch.stack(cells)  # [levels, A, 4]
        self.register_buffer("cells", corners.round() if config.round else corners, persistent=False)

    def at(self, level: int, index: Tensor, feature_size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
        """The anchors [..., 4] of ``index`` [...] on a level, in pixels of the padded picture.

        Args:
            feature_size: (height, width) of the level's map.
            padded_size: (height, width) of the network's input.
        """
        columns = feature_size[1]
        per_cell = self.cells.shape[1]
        down, right = self.stride(level, feature_size, padded_size)
        cell = index // per_cell
        shift = torch.stack([cell % columns * right, cell // columns * down], -1).repeat(*[1] * index.dim(), 2)
        return self.cells[level][index % per_cell] + shift

    def stride(self, level: int, feature_size: tuple[int, int], padded_size: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the padded picture (down, right) from a cell of a level to the next; see :meth:`at`."""
        if not self.stride_from_size:
            return STRIDES[level], STRIDES[level]
        return padded_size[0] // feature_size[0], padded_size[1] // feature_size[1]
