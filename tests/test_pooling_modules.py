"""The modules in the place of torchvision's."""

from collections import OrderedDict
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from trimask.kernels import MultiScaleRoIAlign, RoIAlign, RoIPool, roi_align, roi_pool

ops = pytest.importorskip("torchvision.ops")


def boxes_of(rng: torch.Generator, count: int, height: int, width: int) -> Tensor:
    low = torch.rand(count, 2, generator=rng) * torch.tensor([width, height]) * 0.7
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=rng) ** 3 * 300], 1)


interpreted = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton's interpreter"
)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("counts", [(7, 30), (0, 5), (0, 0)])
@pytest.mark.parametrize("names", [("0", "1", "2", "3"), ("1",)])
def test_a_pyramid_as_torchvision_pools_it(
    rng: torch.Generator, counts: tuple[int, int], names: tuple, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMASK_KERNELS", kernels)
    part = 4 if kernels == "triton" else 1  # the interpreter takes minutes for as much
    full = [(480, 640), (512, 600)]  # of pictures that are padded to 512 x 640
    shapes = [(height // part, width // part) for height, width in full]
    maps = OrderedDict(
        (str(n), torch.randn(2, 8, 512 // s // part, 640 // s // part, generator=rng, requires_grad=True))
        for n, s in enumerate((4, 8, 16, 32))
    )
    maps["pool"] = torch.randn(2, 8, 8, 10, generator=rng)
    boxes = [boxes_of(rng, -(-count // part), *size) / part for count, size in zip(counts, full, strict=True)]
    scale = 224 // part
    for size, ratio in ((3, 2), ((2, 3), 0)) if part > 1 else ((7, 2), ((3, 5), 0)):
        theirs = ops.MultiScaleRoIAlign(list(names), size, ratio, canonical_scale=scale)(maps, boxes, shapes)
        ours = MultiScaleRoIAlign(names, size, ratio, canonical_scale=scale)(maps, boxes, shapes)
        assert ours.is_contiguous()
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
    with pytest.raises(ValueError, match="boxes, image_shapes: expected one each for every image, got 1 and 2"):
        pool(x, [torch.zeros(1, 4)], [(32, 32)] * 2)
    with pytest.raises(ValueError, match="boxes, image_shapes: expected one each for every image, got 0 and 0"):
        pool(x, [], [])
    two = {"0": torch.zeros(1, 3, 8, 8), "1": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"x: expected the finest map first, got strides \[8.0, 4.0\]"):
        MultiScaleRoIAlign(["0", "1"], 7, 2)(two, [torch.zeros(1, 4)], [(64, 64)])


def test_a_thin_picture_has_the_strides_of_any_other(rng: torch.Generator) -> None:
    """Torchvision looks at the height alone, but keeps what the first picture has told."""
    ours, theirs = (kind(["0", "1", "2", "3"], 3, 2) for kind in (MultiScaleRoIAlign, ops.MultiScaleRoIAlign))
    for height, width in ((128, 160), (20, 416), (416, 20), (40, 64), (33, 1333)):
        maps = {
            str(level): torch.randn(1, 4, -(-height // side), -(-width // side), generator=rng)
            for level, side in enumerate((4, 8, 16, 32))
        }
        boxes = [boxes_of(rng, 20, height, width)]
        expected = theirs(maps, boxes, [(height, width)])
        torch.testing.assert_close(ours(maps, boxes, [(height, width)]), expected, atol=1e-5, rtol=1e-5)


class Pyramid(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = MultiScaleRoIAlign(["0", "1"], 3, 2, canonical_scale=40, canonical_level=3)

    def forward(self, fine: Tensor, coarse: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self.pool({"0": fine, "1": coarse}, [first, second], [(96, 128), (90, 100)])


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_any_number_of_boxes_in_kept_programs(rng: torch.Generator) -> None:
    maps = torch.randn(2, 3, 24, 32, generator=rng), torch.randn(2, 3, 12, 16, generator=rng)
    example = *maps, boxes_of(rng, 5, 96, 128), boxes_of(rng, 3, 90, 100)
    n, m = torch.export.Dim("n"), torch.export.Dim("m")
    exported = torch.export.export(Pyramid(), example, dynamic_shapes=(None, None, {0: n}, {0: m})).module()
    traced = torch.jit.trace(Pyramid(), example)
    for counts in ((8, 3), (2, 6)):
        given = *maps, *(boxes_of(rng, count, 90, 100) for count in counts)
        expected = Pyramid()(*given)
        assert len(expected) == sum(counts)
        assert torch.equal(exported(*given), expected)
        assert torch.equal(traced(*given), expected)


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
