"""The modules in the place of torchvision's."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from trimask.kernels import MultiScaleRoIAlign, RoIAlign, RoIPool, roi_align, roi_pool

ops = pytest.importorskip("torchvision.ops")


def boxes_of(rng: torch.Generator, count: int, height: int, width: int) -> Tensor:
    low = torch.rand(count, 2, generator=rng) * torch.tensor([width, height]) * 0.7
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=rng) ** 3 * 300], 1)


@pytest.mark.parametrize("counts", [(7, 30), (0, 5), (0, 0)])
@pytest.mark.parametrize("names", [("0", "1", "2", "3"), ("1",)])
def test_a_pyramid_as_torchvision_pools_it(rng: torch.Generator, counts: tuple[int, int], names: tuple) -> None:
    shapes = [(480, 640), (512, 600)]  # of pictures that are padded to 512 x 640
    maps = OrderedDict(
        (str(n), torch.randn(2, 8, 512 // s, 640 // s, generator=rng, requires_grad=True))
        for n, s in enumerate((4, 8, 16, 32))
    )
    maps["pool"] = torch.randn(2, 8, 8, 10, generator=rng)
    boxes = [boxes_of(rng, count, *shape) for count, shape in zip(counts, shapes, strict=True)]
    for size, ratio in ((7, 2), ((3, 5), 0)):
        theirs = ops.MultiScaleRoIAlign(list(names), size, ratio)(maps, boxes, shapes)
        ours = MultiScaleRoIAlign(names, size, ratio)(maps, boxes, shapes)
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
        if sum(counts):
            weights = torch.randn(ours.shape, generator=rng)
            inputs = [maps[name] for name in names]
            for a, b in zip(
                *(torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (ours, theirs)),
                strict=True,
            ):
                torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-5, rtol=1e-5)


def test_one_map(rng: torch.Generator) -> None:
    x, boxes = torch.randn(2, 4, 20, 30, generator=rng), [boxes_of(rng, n, 80, 120) for n in (3, 4)]
    assert torch.equal(RoIAlign((2, 3), 0.25, 2, aligned=True)(x, boxes), roi_align(x, boxes, (2, 3), 0.25, 2, True))
    assert torch.equal(RoIPool(3, 0.25)(x, boxes), roi_pool(x, boxes, 3, 0.25))
    assert repr(RoIPool(3, 0.25)) == repr(ops.RoIPool(3, 0.25))
    text = "RoIAlign(output_size=3, spatial_scale=0.25, sampling_ratio=2, aligned=False)"
    assert repr(RoIAlign(3, 0.25, 2)) == repr(ops.RoIAlign(3, 0.25, 2)) == text


def test_wrong_arguments_are_named() -> None:
    pool, x = MultiScaleRoIAlign(["0"], 7, 2), {"0": torch.zeros(2, 3, 8, 8)}
    with pytest.raises(ValueError, match="x: expected maps named 0, got p2"):
        pool({"p2": x["0"]}, [torch.zeros(1, 4)] * 2, [(32, 32)] * 2)
    with pytest.raises(ValueError, match="boxes, image_shapes: expected one each for 2 images, got 1 and 2"):
        pool(x, [torch.zeros(1, 4)], [(32, 32)] * 2)


def test_a_model_of_torchvision_finds_the_same_with_them(rng: torch.Generator) -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=96, max_size=128, box_score_thresh=0.0)
    model.eval()
    pictures = [torch.rand(3, 80, 100, generator=rng), torch.rand(3, 90, 70, generator=rng)]
    with torch.no_grad():
        before = model(pictures)
        for name in ("box_roi_pool", "mask_roi_pool"):
            pool = getattr(model.roi_heads, name)
            setattr(
                model.roi_heads, name, MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
            )
        after = model(pictures)
    for a, b in zip(before, after, strict=True):
        assert len(a["boxes"]) > 0
        for name in ("boxes", "scores", "masks"):
            torch.testing.assert_close(b[name], a[name], atol=1e-3, rtol=1e-4)
