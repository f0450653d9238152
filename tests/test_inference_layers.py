"""Layers of the inference copy on a CPU against what they take the place of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimask.engine.inference.layers import (
    Channels,
    FusedConv,
    PooledConv,
    PredictedConv,
    WinogradConv,
    has_onednn,
)
from trimask.engine.model.layers import ConvNorm

pytestmark = pytest.mark.skipif(not has_onednn(torch.float32), reason="needs a torch with oneDNN")


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 47), (64, 64), (127, 96), (130, 65), (131, 65), (256, 64)])
@pytest.mark.parametrize("images", [1, 2])
@torch.inference_mode()
def test_a_stem_in_bands_is_the_stem(size: tuple[int, int], images: int, rng: torch.Generator) -> None:
    layer = ConvNorm(3, 64, 7, stride=2, activation=nn.ReLU())
    x = torch.randn(images, 3, *size, generator=rng).contiguous(memory_format=torch.channels_last)
    between = FusedConv(layer.folded(), layer.activation)(x)
    found = PooledConv(FusedConv(layer.folded(), layer.activation))(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, F.max_pool2d(between, 3, 2, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 112), (5, 7)], ids=["winograd", "direct"])
@torch.inference_mode()
def test_predictors_side_by_side(size: tuple[int, int], rng: torch.Generator) -> None:
    layer = ConvNorm(128, 128, 3, activation=nn.ReLU())
    scores, deltas = nn.Conv2d(128, 3, 1), nn.Conv2d(128, 12, 1)
    x = torch.randn(1, 128, *size, generator=rng).contiguous(memory_format=torch.channels_last)
    conv = WinogradConv(layer)
    assert conv.worth_it(x) == (size == (96, 112))
    found = PredictedConv(conv, (scores, deltas))(x)
    for part, expected in ((Channels(0, 3), scores), (Channels(3, 15), deltas)):
        torch.testing.assert_close(part(found), expected(layer(x)), rtol=0, atol=1e-5)
