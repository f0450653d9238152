"""Candidate kernels against the float64 references: in Triton's interpreter, or on a GPU."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends import BACKENDS, use_backend
from tolerances import roi_align_error
from trimask.kernels.reference import roi_pooling as reference

separable = pytest.importorskip("trimask.benchmarks.candidates.separable_roi_align")
separable_roi_align = separable.separable_roi_align

STRIDES = [4, 8]
OUTPUT_SIZE = (6, 9)  # two bands of 4 x 16, neither of them full


@pytest.fixture(autouse=True, params=BACKENDS[1:])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch, request.module, ["separable_roi_align"])


def pyramid(rng: torch.Generator, dtype: torch.dtype, channels: int = 24) -> list[Tensor]:
    """Two levels of a 64 x 96 picture."""
    shapes = [(2, channels, 64 // s, 96 // s) for s in STRIDES]
    features = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    return [f.to(memory_format=torch.channels_last) for f in features]


def boxes() -> Tensor:
    """[2, 4, 4]: on both levels, across the border, far beyond it, mirrored, of no size, not a number; padding."""
    return torch.tensor(
        [
            [[4.3, 10.1, 85.7, 30.2], [1, 2, 30, 20], [-150.4, 4.2, 250.5, 150.7], [45.5, 40.2, 16.1, 20.9]],
            [[75.2, -10, 101.9, 8.3], [25, 20, 25, 20], [5, 5, math.nan, 15], [0, 0, 68, 20]],
        ]
    )


def assert_near(out: Tensor, expected: Tensor, features: list[Tensor]) -> None:
    largest = max(feature.abs().max().item() for feature in features)
    assert out.dtype == features[0].dtype
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=roi_align_error(features[0], largest))


@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 0), (False, 0), (True, 1), (True, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_separable_roi_align(rng: torch.Generator, dtype: torch.dtype, aligned: bool, ratio: int) -> None:
    features = pyramid(rng, dtype)
    rule: dict[str, Any] = {"sampling_ratio": ratio, "aligned": aligned}
    out = separable_roi_align(features, boxes(), STRIDES, OUTPUT_SIZE, counts=torch.tensor([4, 3]), **rule)
    expected = reference.pyramid_roi_align(
        features, boxes(), STRIDES, OUTPUT_SIZE, counts=[4, 3], coordinates=np.float32, **rule
    )
    assert_near(out, expected, features)
    assert not out[1, 2:].any()


def test_levels_of_separable_roi_align(rng: torch.Generator) -> None:
    """Whatever says which level a box is pooled from."""
    features = pyramid(rng, torch.float32, 4)
    sides = torch.tensor([39.9, 40, 41, 111.9999, 112])
    box = torch.stack([sides * 0, sides * 0, sides, sides], 1).expand(2, 5, 4)
    for rule in ({}, {"canonical_size": 80, "canonical_level": 4}, {"level_epsilon": 1e-6, "epsilon_inside_log": True}):
        rule = {"sampling_ratio": 1, "aligned": True, **rule}
        out = separable_roi_align(features, box, STRIDES, (1, 1), **rule)
        assert_near(out, reference.pyramid_roi_align(features, box, STRIDES, (1, 1), **rule), features)


def test_tiles_of_separable_roi_align(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows wider than a tile, one of them by a single pixel, and several tiles of channels."""
    features = pyramid(rng, torch.float32)
    rule: dict[str, Any] = {"sampling_ratio": 2, "aligned": True}
    expected = reference.pyramid_roi_align(features, boxes(), STRIDES, (2, 3), coordinates=np.float32, **rule)
    monkeypatch.setattr(separable, "_PIXELS", 16)
    monkeypatch.setattr(separable, "_CHANNEL_BYTES", 64)
    assert_near(separable_roi_align(features, boxes(), STRIDES, (2, 3), **rule), expected, features)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features", {"features": [torch.zeros(1, 8, 4, 4)]}),
        ("features", {"features": [torch.zeros(1, 6, 4, 4).to(memory_format=torch.channels_last)]}),
        ("features", {"features": [torch.zeros(1, 8, 4, 4).double().to(memory_format=torch.channels_last)]}),
        ("output_size", {"output_size": (1, 65)}),
    ],
)
def test_what_separable_roi_align_does_not_take(name: str, change: dict[str, Any]) -> None:
    features = [torch.zeros(1, 8, 4, 4).to(memory_format=torch.channels_last)]
    arguments = {"features": features, "boxes": torch.zeros(1, 1, 4), "strides": [4], "output_size": (2, 2)} | change
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        separable_roi_align(**arguments, sampling_ratio=2, aligned=True)
