"""From uint8 pictures to the batch that the network takes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import preprocess
from ...kernels.dispatch import use_triton
from ..model.config import InputConfig, ResizeConfig
from .resize import padded_size, resized_size

__all__ = ["make_batch", "resize_picture"]


def resize_picture(picture: NDArray[np.uint8], config: ResizeConfig, size: tuple[int, int] | None = None) -> Tensor:
    """One picture, uint8 RGB [H, W, 3] -> float32 [3, h, w] in 0..255, in channels_last memory.

    The size (h, w) is the config's, unless another is given.

    torchvision resizes floats without antialiasing; Detectron2 has Pillow resize the uint8 picture, antialiased;
    MMDetection has OpenCV do it, without antialiasing and in fixed-point arithmetic.
    """
    size = size or resized_size(picture.shape[:2], config)
    return _resize([picture], [size], size, config, torch.device("cpu"))[0]


def make_batch(
    pictures: list[NDArray[np.uint8]], config: InputConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of any sizes -> the model's input: ``image``, ``image_sizes``, ``original_sizes``.

    Args:
        pictures: uint8 RGB [H, W, 3] each.

    Returns:
        float32 [B, 3, H, W] padded with zeros, in channels_last memory; int64 [B, 2] and [B, 2].
    """
    originals = [picture.shape[:2] for picture in pictures]
    sizes = [resized_size(size, config.resize) for size in originals]
    image = _resize(pictures, sizes, padded_size(sizes, config.size_divisible), config.resize, device)
    image_sizes, original_sizes = _send(torch.tensor([sizes, originals]), device)
    return image, image_sizes, original_sizes


def _resize(
    pictures: list[NDArray[np.uint8]],
    sizes: list[tuple[int, int]],
    padded: tuple[int, int],
    config: ResizeConfig,
    device: torch.device,
) -> Tensor:
    # A copy where the array is read-only: torch could write through it.
    sources = [torch.from_numpy(x if x.flags.writeable else x.copy()) for x in pictures]
    if use_triton(device):  # else the host resizes, where PIL is
        sources = [_send(source, device) for source in sources]
    batch = preprocess(sources, sizes, padded, antialias=config.antialias, quantize=config.quantize)
    return batch.to(device)


def _send(x: Tensor, device: torch.device) -> Tensor:
    """To a GPU without waiting for it, from memory that it reads by itself."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
