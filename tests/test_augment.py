"""Augmentations: what moves together, what is cut, covered and dropped, and that none of it is inference's batch."""

import colorsys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.engine.model.config import InputConfig, ResizeConfig
from trimask.engine.pictures.preprocess import make_batch
from trimask.engine.training.augment import (
    Augment,
    AugmentConfig,
    clipped,
    extent,
    flipped,
    paste,
    recolor,
    resized_masks,
)
from trimask.engine.training.data import Example
from trimask.engine.training.loading import collate

from .coco_files import ellipse

RESIZES = {
    "torchvision": ResizeConfig(min_size=50, max_size=80),
    "detectron2": ResizeConfig(50, 80, antialias=True, quantize=True, round_half_up=True, limit_second=True),
    "mmdet": ResizeConfig(50, 80, quantize=True, round_half_up=True),
}
INPUT = InputConfig(resize=RESIZES["torchvision"])


def example(rng: np.random.Generator, size: tuple[int, int] = (60, 90), count: int = 4, boxy: bool = False) -> Example:
    masks = np.array([ellipse(size, rng) for _ in range(count)], bool).reshape(count, *size)
    boxes = np.array([extent(mask) for mask in masks], np.float32).reshape(-1, 4)
    if boxy:
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = True
    corners = [[np.array([[a, b], [c, b], [c, d], [a, d]], np.float64)] for a, b, c, d in boxes.tolist()]
    picture = rng.integers(0, 256, (*size, 3), np.uint8)
    crowd = np.arange(count) == 0
    return Example(picture, boxes, np.arange(count), masks, crowd, 7, Path("7.png"), corners)


def rectangles(size: tuple[int, int], *boxes: tuple[int, int, int, int], value: int = 0) -> Example:
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    count, picture = len(boxes), np.full((*size, 3), value, np.float32)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return Example(picture, corners, np.arange(count), masks, np.zeros(count, bool), 1, Path("1.png"))


@pytest.mark.parametrize("name", RESIZES)
@pytest.mark.parametrize("size", [(60, 90), (90, 61), (50, 50), (20, 200), (1, 3)])
def test_with_all_off_the_batch_is_that_of_inference(
    np_rng: np.random.Generator, name: str, size: tuple[int, int]
) -> None:
    config = InputConfig(resize=RESIZES[name])
    picture = np_rng.integers(0, 256, (*size, 3), np.uint8)
    source = replace(example(np_rng, count=0), picture=picture, masks=np.zeros((0, *size), bool))
    result = Augment(AugmentConfig(), config)(source, np_rng)
    image, image_sizes, _ = make_batch([picture], config, torch.device("cpu"))
    batch = collate([result], config.size_divisible)
    assert torch.equal(batch.image, image)
    assert torch.equal(batch.image_sizes, image_sizes)
    assert batch.image.is_contiguous(memory_format=torch.channels_last)


CONFIGS = {
    "off": AugmentConfig(),
    "flip": AugmentConfig(flip=1),
    "sizes": AugmentConfig(min_sizes=(30, 45, 64), max_size=100),
    "jitter": AugmentConfig(jitter=(0.1, 2.0), jitter_size=(70, 60)),
    "crop": AugmentConfig(crop=1, crop_range=(0.3, 0.9)),
    "paste": AugmentConfig(copy_paste=1),
    "all": AugmentConfig(jitter=(0.3, 2.0), jitter_size=(64, 64), crop=0.5, flip=0.5, color=1, grey=0.5, copy_paste=1),
}


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_boxes_follow_masks(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = example(rng, boxy=True)
    copies = source.picture.copy(), source.masks.copy(), source.boxes.copy()
    result = Augment(CONFIGS[name], INPUT)(source, rng, lambda: example(rng, (80, 70), boxy=True))
    height, width = result.picture.shape[:2]
    assert result.masks.shape == (len(result), height, width)
    assert result.masks.any((1, 2)).all()
    extents = np.array([extent(mask) for mask in result.masks]).reshape(-1, 4)
    # A pixel of the mask stands for its centre: the box of what is scaled may reach less than a pixel farther.
    growth = max(1.0, height / 60, width / 60)
    assert np.abs(result.boxes - extents).max(initial=0) <= growth
    assert (result.boxes >= 0).all()
    assert (result.boxes[:, 2:] <= [width, height]).all()
    assert (result.picture.dtype, result.boxes.dtype) == (np.float32, np.float32)
    assert result.picture.min() >= 0
    assert result.picture.max() <= 255 * (
        1 + 2 * np.finfo(np.float32).eps
    )  # the rounded weights of a sample sum to that
    assert all(np.array_equal(a, b) for a, b in zip(copies, (source.picture, source.masks, source.boxes), strict=True))
    if result.polygons is not None:
        for (corners,), box in zip(result.polygons, result.boxes, strict=True):
            low, high = corners.min(0), corners.max(0)
            assert np.abs(np.concatenate([low, high]) - box).max() <= growth


@pytest.mark.parametrize("name", CONFIGS)
def test_the_generator_alone_decides(np_rng: np.random.Generator, name: str) -> None:
    source, other = example(np_rng), example(np_rng, (70, 70))
    augment = Augment(CONFIGS[name], INPUT)
    first, again = (augment(source, np.random.default_rng(5), lambda: other) for _ in range(2))
    assert np.array_equal(first.picture, again.picture)
    assert np.array_equal(first.masks, again.masks)
    assert np.array_equal(first.boxes, again.boxes)


def test_polygons_end_where_the_picture_does() -> None:
    star = np.array([(-4, 5), (5, -4), (14, 5), (5, 14)], float)  # its corners reach over all four sides
    corners = clipped(star, np.array([10, 10]))
    assert {tuple(corner) for corner in corners} == {(0, 1), (1, 0), (9, 0), (10, 1), (10, 9), (9, 10), (1, 10), (0, 9)}
    assert np.array_equal(clipped(star + 20, np.array([50, 50])), star + 20)
    assert not len(clipped(star + 20, np.array([10, 10])))


def test_flipping_twice_changes_nothing(np_rng: np.random.Generator) -> None:
    source = example(np_rng)
    once, twice = flipped(source), flipped(flipped(source))
    assert np.array_equal(once.picture, source.picture[:, ::-1])
    assert [list(extent(mask)) for mask in once.masks] == once.boxes.tolist()
    for name in ("picture", "boxes", "masks", "polygons"):
        assert np.array_equal(getattr(twice, name), getattr(source, name))
    assert not np.array_equal(once.masks, source.masks)


def test_jitter_gives_one_size_filled_with_the_mean(np_rng: np.random.Generator) -> None:
    augment = Augment(AugmentConfig(jitter=(0.25, 0.25), jitter_size=(64, 96)), INPUT)
    result = augment(example(np_rng, (60, 90)), np_rng)
    assert result.picture.shape == (64, 96, 3)
    assert (result.picture[16:] == np.float32(INPUT.mean)).all()
    assert (result.picture[:, 24:] == np.float32(INPUT.mean)).all()
    assert not result.masks[:, 16:].any()
    larger = Augment(AugmentConfig(jitter=(2.0, 2.0), jitter_size=(64, 96)), INPUT)(example(np_rng, (60, 90)), np_rng)
    assert larger.picture.shape == (64, 96, 3)
    assert (larger.picture != np.float32(INPUT.mean)).any(2).all()


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_masks_are_resized_at_the_pixels_centres(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 31, 23)) < 0.2
    masks[2] = False
    y1, x1 = int(rng.integers(0, 30)), int(rng.integers(0, 22))
    y2, x2 = int(rng.integers(y1, 31)) + 1, int(rng.integers(x1, 23)) + 1
    out, shares = resized_masks(masks, (y1, x1, y2, x2), (height, width))
    part = torch.from_numpy(masks[:, y1:y2, x1:x2])
    expected = torch.nn.functional.interpolate(part[None].double(), (height, width), mode="nearest-exact")[0]
    # Where a centre lies exactly between two pixels, torch's rounding in float32 may take either.
    rows, columns = ((np.arange(n) + 0.5) * (m / n) for n, m in ((height, y2 - y1), (width, x2 - x1)))
    clear = np.ix_(abs(rows - rows.round()) > 1e-4, abs(columns - columns.round()) > 1e-4)
    assert np.array_equal(out[:, clear[0], clear[1]], expected.bool().numpy()[:, clear[0], clear[1]])
    visible = masks[:, y1:y2, x1:x2].sum((1, 2))
    assert shares[:2] == pytest.approx(visible[:2] / masks[:2].sum((1, 2)))


def test_what_is_pasted_covers_what_is_below() -> None:
    below = rectangles((100, 100), (10, 10, 60, 60), (70, 70, 90, 90), (40, 40, 58, 58))
    above = rectangles((100, 100), (30, 5, 95, 65), value=200)
    above.labels[:] = 9

    class Always(np.random.Generator):
        def random(self, size: int | None = None) -> np.ndarray:  # type: ignore[override]
            return np.zeros(size or 1)

    result = paste(below, above, Always(np.random.PCG64(0)))
    assert result.labels.tolist() == [0, 1, 9]  # the third is covered
    assert result.boxes.tolist() == [[10, 10, 30, 60], [70, 70, 90, 90], [30, 5, 95, 65]]
    assert result.boxes.dtype == np.float32
    assert result.masks.sum(0).max() == 1
    assert (result.picture == 200 * above.masks[0][..., None]).all()
    assert (below.picture == 0).all()
    assert result.polygons is None


def test_crowds_are_not_pasted_and_partners_of_other_sizes_are_cut(np_rng: np.random.Generator) -> None:
    below = rectangles((50, 60))
    above = rectangles((90, 40), (5, 5, 35, 80), (0, 0, 10, 10), (0, 60, 40, 90), value=9)
    above.crowd[1] = True
    sizes = set()
    for _ in range(40):
        result = paste(below, above, np_rng)
        assert result.picture.shape == (50, 60, 3)
        assert set(result.labels.tolist()) <= {0}  # the second is a crowd, the third outside
        sizes.add(len(result))
        if len(result):
            assert result.boxes.tolist() == [[5, 5, 35, 50]]
            assert not result.masks[:, :, 40:].any()
    assert sizes == {0, 1}


def test_crowds_stay_crowds_when_covered() -> None:
    below, above = rectangles((50, 50), (0, 0, 40, 40)), rectangles((50, 50), (20, 0, 50, 50), value=9)
    below.crowd[0] = True
    results = [paste(below, above, np.random.default_rng(seed)) for seed in range(20)]
    pasted = next(result for result in results if len(result) == 2)
    assert pasted.crowd.tolist() == [True, False]
    assert pasted.boxes[0].tolist() == [0, 0, 20, 40]


def test_remnants_go_unless_they_are_large(np_rng: np.random.Generator) -> None:
    config = ResizeConfig(min_size=400, max_size=400)
    small, large = rectangles((40, 40), (0, 0, 40, 2)), rectangles((400, 400), (0, 0, 400, 400))
    small.picture = small.picture.astype(np.uint8)
    large.picture = large.picture.astype(np.uint8)
    keep = Augment(AugmentConfig(crop=1, crop_range=(0.25, 0.25)), InputConfig(resize=config))
    kept = [len(keep(large, np_rng)) for _ in range(5)]  # a sixteenth of it, which fills the picture
    assert kept == [1] * 5
    drop = Augment(AugmentConfig(crop=1, crop_range=(0.05, 0.05)), InputConfig(resize=ResizeConfig(10, 10)))
    assert {len(drop(small, np.random.default_rng(n))) for n in range(30)} == {0}


@pytest.mark.parametrize("brightness", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("contrast", [0.3, 1.0, 1.5])
def test_brightness_contrast_and_saturation_are_torchvisions(
    np_rng: np.random.Generator, brightness: float, contrast: float
) -> None:
    picture = np_rng.uniform(100, 140, (20, 30, 3)).astype(np.float32)  # where nothing is clipped on the way
    expected = torch.from_numpy(picture).permute(2, 0, 1) / 255
    expected = tv.adjust_saturation(expected, 0.6)
    expected = tv.adjust_contrast(tv.adjust_brightness(expected, brightness), contrast)
    result = recolor(picture, brightness, contrast, saturation=0.6)
    # torchvision's luma has weights of three digits that sum to 0.9999
    assert result == pytest.approx(255 * expected.permute(1, 2, 0).numpy(), abs=0.1)


def test_recolor_turns_hue_and_takes_colour_away(np_rng: np.random.Generator) -> None:
    picture = np_rng.uniform(100, 140, (20, 30, 3)).astype(np.float32)
    assert recolor(picture) == pytest.approx(picture, abs=1e-3)
    assert recolor(picture, hue=1) == pytest.approx(picture, abs=1e-3)
    assert recolor(recolor(picture, hue=0.2), hue=-0.2) == pytest.approx(picture, abs=1e-3)
    grey = recolor(picture, saturation=0)
    assert np.ptp(grey, axis=2).max() < 1e-3
    red = recolor(np.full((1, 1, 3), (160, 100, 100), np.float32), hue=1 / 3)[0, 0] / 255
    assert colorsys.rgb_to_hsv(*red.tolist())[0] == pytest.approx(1 / 3, abs=0.08)


def test_values_out_of_range_are_refused() -> None:
    for wrong in (
        {"flip": 1.5},
        {"jitter": (2.0, 0.1)},
        {"jitter": (0.0, 1.0)},
        {"crop_range": (0.5, 1.5)},
        {"min_sizes": (0,)},
        {"jitter": (0.5, 1.0), "min_sizes": (640,)},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            AugmentConfig(**wrong)
