"""Pillow's resize, which filters in whole levels."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["resize"]


def resize(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture [H, W, 3] at another (height, width), bilinear and antialiased."""
    height, width = size
    image = Image.fromarray(np.ascontiguousarray(picture))
    # One axis at a time: from Pillow 13 on the order of both depends on the size (python-pillow/Pillow#9549).
    image = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
