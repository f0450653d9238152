"""What the mask head is to draw, against torchvision's RoIAlign and against areas known beforehand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trimask.engine.model.mask_targets import from_masks, from_polygons


def drawn(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks of blobs, and for RoIs of all sizes, some off the picture, their objects and whether they are wanted."""
    masks = (torch.nn.functional.avg_pool2d(torch.rand(2, 3, 68, 100, generator=rng), 5, 1) > 0.5).byte()
    low = torch.rand(2, 40, 2, generator=rng) * 80 - 10
    boxes = torch.cat([low, low + torch.rand(2, 40, 2, generator=rng) ** 3 * 90], -1)
    return masks, torch.randint(3, (2, 40), generator=rng), boxes, torch.rand(2, 40, generator=rng) < 0.8


@pytest.mark.parametrize("trim", [True, False], ids=["from bytes", "by RoIAlign"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_cut_as_by_torchvision(
    threshold: float | None, aligned: bool, trim: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    roi_align = pytest.importorskip("torchvision").ops.roi_align
    monkeypatch.setattr("trimask.engine.model.mask_targets.may_trim", lambda device: trim)
    masks, objects, boxes, wanted = drawn(rng)
    boxes = boxes.double()
    found = from_masks(masks, objects, boxes, wanted, 14, aligned=aligned, threshold=threshold)
    assert found.dtype == torch.float64
    for b, f in wanted.nonzero().tolist():
        mask = masks[b, objects[b, f]][None, None].double()
        share = roi_align(mask, [boxes[b, f : f + 1]], 14, aligned=aligned)[0, 0]
        if threshold is None:
            torch.testing.assert_close(found[b, f], share, rtol=0, atol=1e-9)
        else:
            clear = (share - threshold).abs() > 1e-9  # a tie may fall either way
            assert torch.equal(found[b, f][clear], (share >= threshold).double()[clear])


def test_a_polygon_is_scaled_to_its_roi() -> None:
    pytest.importorskip("pycocotools")
    square = np.array([[20.0, 10], [40, 10], [40, 50], [20, 50]])
    corner = np.array([[20.0, 10], [40, 10], [20, 50]])
    boxes = torch.tensor([[[20.0, 10, 40, 50], [10, 10, 50, 50], [30, 0, 70, 40], [20, 10, 40, 50]]])
    objects, wanted = torch.tensor([[0, 0, 0, 1]]), torch.ones(1, 4, dtype=torch.bool)
    found = from_polygons([[[square], [corner]]], objects, boxes, wanted, 28)
    expected = torch.zeros(3, 28, 28)
    expected[0] = 1
    expected[1, :, 7:21] = 1
    expected[2, 7:, :7] = 1
    assert torch.equal(found[0, :3], expected)
    cells = torch.arange(28)
    diagonal = cells + cells[:, None]
    assert found[0, 3][diagonal < 26].all()  # half of it, but for the cells on the diagonal
    assert not found[0, 3][diagonal > 28].any()


def test_an_object_may_have_several_polygons_or_none() -> None:
    pytest.importorskip("pycocotools")
    left, right = (np.array([[x, 0.0], [x + 10, 0], [x + 10, 28], [x, 28]]) for x in (0.0, 18.0))
    boxes = torch.tensor([[[0.0, 0, 28, 28]] * 3], dtype=torch.float64)
    wanted = torch.tensor([[True, True, False]])
    found = from_polygons([[[left, right], []]], torch.tensor([[0, 1, 0]]), boxes, wanted, 28)
    assert found.dtype == torch.float64
    assert found[0, 0, 3].tolist() == [1] * 10 + [0] * 8 + [1] * 10
    assert not found[0, 1:].any()
