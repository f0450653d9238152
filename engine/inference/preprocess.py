"""From uint8 pictures to the batch that the network takes."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..model.config import InputConfig, ResizeConfig
from .resize import padded_size, resized_size

__all__ = ["make_batch", "resize_picture"]


def resize_picture(picture: NDArray[np.uint8], config: ResizeConfig) -> Tensor:
    """One picture, uint8 RGB [H, W, 3] -> float32 [3, h, w] in 0..255, in channels_last memory.

    torchvision resizes floats without antialiasing; Detectron2 lets PIL resize the uint8 picture; OpenCV's resize
    (MMDetection) is bilinear without antialiasing, rounded to whole levels.
    """
    height, width = resized_size(picture.shape[:2], config)
    if config.antialias and config.quantize and picture.shape[:2] != (height, width):
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    # A copy where the array is read-only: torch could write through it.
    source = torch.from_numpy(picture if picture.flags.writeable else picture.copy())
    x = source.permute(2, 0, 1)[None].float()
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=config.antialias)
        x = x.round_().clamp_(0, 255) if config.quantize else x
    return x[0]


def make_batch(
    pictures: list[NDArray[np.uint8]], config: InputConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of any sizes -> the model's input: ``image``, ``image_sizes``, ``original_sizes``.

    Args:
        pictures: uint8 RGB [H, W, 3] each.

    Returns:
        float32 [B, 3, H, W] padded with zeros, in channels_last memory; int64 [B, 2] and [B, 2].
    """
    resized = [resize_picture(picture, config.resize) for picture in pictures]
    sizes = [(x.shape[1], x.shape[2]) for x in resized]
    height, width = padded_size(sizes, config.size_divisible)
    image = torch.zeros(len(resized), height, width, 3).permute(0, 3, 1, 2)
    for target, x in zip(image, resized, strict=True):
        target[:, : x.shape[1], : x.shape[2]] = x
    originals = [picture.shape[:2] for picture in pictures]
    return image.to(device), torch.tensor(sizes, device=device), torch.tensor(originals, device=device)
