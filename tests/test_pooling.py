"""RoIPool from a pyramid: each RoI from its own map."""

import pytest
import torch

from trimask.engine.model.config import PoolConfig
from trimask.engine.model.pooling import pool


def test_roi_pool_takes_the_map_that_fits(rng: torch.Generator) -> None:
    ops = pytest.importorskip("torchvision").ops
    maps = [torch.randn(2, 4, 256 // stride, 512 // stride, generator=rng) for stride in (4, 8, 16, 32)]
    side = torch.tensor([20.0, 111, 112, 200, 224, 230, 447, 448, 60])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), side, side], -1).expand(2, -1, -1)
    levels = [0, 0, 1, 1, 2, 2, 2, 3]
    found = pool(maps, (4, 8, 16, 32), boxes, torch.tensor([8, 3]), 7, PoolConfig(quantized=True))
    assert found.shape == (2, 9, 4, 7, 7)
    for b, count in enumerate((8, 3)):
        for r in range(count):
            expected = ops.roi_pool(maps[levels[r]][b : b + 1], [boxes[b, r : r + 1]], 7, 1 / 2 ** (levels[r] + 2))
            assert torch.equal(found[b, r], expected[0])
        assert not found[b, count:].any()
