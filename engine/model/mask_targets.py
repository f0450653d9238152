"""What the mask head is to draw: each RoI's own object, cut to the RoI and scaled to the head's resolution."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import roi_align
from ...kernels.cpu.mask_cropping import crop_masks
from .trimming import may_trim

__all__ = ["from_masks", "from_polygons"]


def from_masks(
    masks: Tensor, objects: Tensor, rois: Tensor, wanted: Tensor, side: int, *, aligned: bool, threshold: float | None
) -> Tensor:
    """Cut by adaptive RoIAlign.

    Args:
        masks: uint8 0/1 [B, G, H, W].
        objects: int64 [B, F], each RoI's object.
        rois: [B, F, 4].
        wanted: bool [B, F]; other rows mean nothing.
        side: m.
        aligned: pixels are squares, whose centres lie at .5; otherwise points at whole numbers.
        threshold: a cell is 1 from this share of the mask on, else 0; None keeps the share.

    Returns:
        [B, F, m, m] in the dtype of the RoIs.
    """
    if may_trim(masks.device):
        first = torch.arange(len(masks))[:, None] * masks.shape[1]
        images = torch.where(wanted, first + objects, -1).flatten()
        truth = crop_masks(masks.flatten(0, 1), rois.flatten(0, 1), images, side, aligned).unflatten(0, wanted.shape)
    else:
        picks = torch.cat([objects[..., None].to(rois.dtype), rois], -1)  # [B, F, 5]
        cells = [  # by picture: masks as numbers take four times their memory
            roi_align(mask[:, None].to(rois.dtype), pick, side, aligned=aligned)[:, 0]
            for mask, pick in zip(masks, picks, strict=True)
        ]
        truth = torch.stack(cells)
    return truth if threshold is None else (truth >= threshold).to(truth.dtype)


def from_polygons(
    polygons: Sequence[Sequence[Sequence[NDArray[np.floating]]]],
    objects: Tensor,
    rois: Tensor,
    wanted: Tensor,
    side: int,
) -> Tensor:
    """Scaled to the RoI and filled there, by COCO's own rules: on the host, which waits for the RoIs.

    Args:
        polygons: by picture and object, each [P, 2] as (x, y).
        objects: int64 [B, F], each RoI's object.
        rois: [B, F, 4].
        wanted: bool [B, F]; other rows stay zero.
        side: m.

    Returns:
        0/1 [B, F, m, m], in the dtype and on the device of the RoIs.

    Raises:
        ImportError: without pycocotools.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError("polygons as mask targets need pycocotools: pip install pycocotools") from error
    corners, indices = rois.cpu().numpy(), objects.cpu().numpy()
    truth = np.zeros((*corners.shape[:2], side, side), np.float32)
    for b, f in np.argwhere(wanted.cpu().numpy()):
        low, high = corners[b, f, :2], corners[b, f, 2:]
        scale = side / np.maximum(high - low, 0.1)
        parts = [
            ((np.asarray(part, np.float64).reshape(-1, 2) - low) * scale).ravel() for part in polygons[b][indices[b, f]]
        ]
        if parts:
            truth[b, f] = coco.decode(coco.merge(coco.frPyObjects(parts, side, side)))
    return torch.from_numpy(truth).to(rois)
