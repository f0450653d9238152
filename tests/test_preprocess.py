"""Sizes, resizing and padding, against torchvision, Detectron2's arithmetic and PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from trimask.engine.model.config import InputConfig, ResizeConfig
from trimask.engine.model.presets import detectron2
from trimask.engine.pictures.preprocess import make_batch, resize_picture
from trimask.engine.pictures.resize import padded_size, resized_size

TORCHVISION = ResizeConfig()
DETECTRON2 = detectron2(("cat",), (1,)).input.resize


def detectron2_size(h: int, w: int, size: int, limit: int) -> tuple[int, int]:
    """The published recipe, step by step in exact fractions where it can be."""
    scale = size / min(h, w)
    new_h, new_w = (size, scale * w) if h < w else (scale * h, size)
    if max(new_h, new_w) > limit:
        shrink = limit / max(new_h, new_w)
        new_h, new_w = new_h * shrink, new_w * shrink
    return int(new_h + 0.5), int(new_w + 0.5)


def test_sizes_equal_torchvision_for_every_short_side() -> None:
    transform = pytest.importorskip("torchvision").models.detection.transform.GeneralizedRCNNTransform(
        800, 1333, [0.0] * 3, [1.0] * 3
    )
    sizes = [(short, long) for short in range(1, 1200, 37) for long in (short, short + 7, 2 * short + 1)]
    sizes += [(161, 161), (161, 240), (1333, 800), (4000, 6000)]
    for size in sizes:
        if 800 * max(size) / min(size) > 3e4:
            continue
        out, _ = transform.resize(torch.zeros(1, *size), None)
        assert resized_size(size, TORCHVISION) == tuple(out.shape[1:]), size
    assert resized_size((161, 161), TORCHVISION) == (799, 799)


def test_sizes_equal_detectron2(np_rng: np.random.Generator) -> None:
    second_scale_matters = [[744, 444], [682, 407], [860, 470]]
    for h, w in second_scale_matters + np_rng.integers(1, 3000, (500, 2)).tolist():
        expected = detectron2_size(h, w, 800, 1333)
        assert resized_size((h, w), DETECTRON2) == (max(expected[0], 1), max(expected[1], 1)), (h, w)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("config", [TORCHVISION, DETECTRON2])
def test_extreme_pictures_keep_a_pixel(size: tuple[int, int], config: ResizeConfig) -> None:
    assert min(resized_size(size, config)) >= 1
    picture = np.full((*size, 3), 200, np.uint8)
    assert resize_picture(picture, config).shape == (3, *resized_size(size, config))


def test_padding_is_the_next_multiple() -> None:
    assert padded_size([(32, 33), (1, 64)], 32) == (32, 64)
    assert padded_size([(1, 1)], 32) == (32, 32)


def test_torchvision_resize_to_rounding(np_rng: np.random.Generator) -> None:
    transform = pytest.importorskip("torchvision").models.detection.transform.GeneralizedRCNNTransform(
        96, 160, [0.0] * 3, [1.0] * 3
    )
    for size in ((50, 70), (300, 200), (96, 96)):
        picture = np_rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        expected, _ = transform.resize(torch.from_numpy(picture).permute(2, 0, 1).float() / 255, None)
        found = resize_picture(picture, ResizeConfig(96, 160))
        torch.testing.assert_close(found / 255, expected, rtol=0, atol=1e-6)


def test_detectron2_resize_is_pil(np_rng: np.random.Generator) -> None:
    picture = np_rng.integers(0, 256, (300, 200, 3), dtype=np.uint8)
    config = ResizeConfig(96, 160, antialias=True, quantize=True, round_half_up=True)
    height, width = resized_size((300, 200), config)
    expected = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    assert np.array_equal(resize_picture(picture, config).permute(1, 2, 0).numpy(), expected)


def test_mmdetection_resize_is_opencv_s_and_not_antialiased() -> None:
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, ::3] = 255
    config = ResizeConfig(32, 32, quantize=True, round_half_up=True)
    found = resize_picture(stripes, config)
    assert torch.equal(found, found.round())
    assert found.max() == 0  # samples fall between the stripes; a filter would have mixed them in


def test_a_batch_is_padded_and_the_pictures_are_left_alone(np_rng: np.random.Generator) -> None:
    pictures = [np_rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 80), (90, 64))]
    for picture in pictures:
        picture.flags.writeable = False
    copies = [picture.copy() for picture in pictures]
    config = InputConfig(resize=ResizeConfig(64, 100))
    image, sizes, originals = make_batch(pictures, config, torch.device("cpu"))
    assert image.shape == (2, 3, 96, 96)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert sizes.tolist() == [[64, 85], [90, 64]]
    assert originals.tolist() == [[60, 80], [90, 64]]
    assert image[0, :, 64:].abs().sum() == 0
    assert image[0, :, :, 85:].abs().sum() == 0
    assert all(np.array_equal(a, b) for a, b in zip(pictures, copies, strict=True))
