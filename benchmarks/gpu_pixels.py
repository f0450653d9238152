"""What works on whole pictures on a GPU: pasted masks, their run lengths, preprocessing.

What must move at least: the output, for the masks and boxes are small beside it; for preprocessing also the pictures.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cpu.masks import mask_of_runs
from ..kernels.paste_rule import PasteRule
from ..kernels.pasting import paste_masks
from ..kernels.resizing import preprocess
from ..kernels.rle import masks_to_rle
from .bench_ops import torchvision_paste
from .device import Bench, plain_torch
from .harness import Row
from .inputs import SIZE, smooth_masks
from .installed import optional

__all__ = ["cases"]

roi_heads = optional("torchvision.models.detection.roi_heads")
coco = optional("pycocotools.mask")

Case = Callable[[Bench], list[Row]]
CAPACITY = 4096  # runs of a mask
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_CHUNK = 1 << 30  # bytes of float32 masks at a time, as Detectron2 limits them


def cases(quick: bool) -> Iterator[Case]:
    """Fewer where they are small and would be the same."""
    for count in (100, 1, 300)[: 2 if quick else None]:
        yield partial(_paste, count=count, rule=PasteRule.TORCHVISION)
        yield partial(_paste, count=count, rule=PasteRule.DETECTRON2)
    for count in (100, 300)[: 1 if quick else None]:
        yield partial(_run_lengths, count=count)
    for batch in (1, 8):
        for antialias in (False, True):
            yield partial(_preprocess, batch=batch, antialias=antialias)


def _masks(bench: Bench, count: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    count, size = (min(count, 8), (80, 133)) if bench.quick else (count, SIZE)
    masks, boxes = bench.put(*smooth_masks(count, size))
    return masks, boxes, size


def _paste(bench: Bench, count: int, rule: PasteRule) -> list[Row]:
    masks, boxes, size = _masks(bench, count)
    peers: dict[str, Any] = {"Detectron2's way": partial(detectron2_paste, masks, boxes, size)}
    if rule == PasteRule.TORCHVISION:
        peers = {"torchvision": partial(torchvision_paste, masks, boxes, size) if roi_heads else None}
    ours = partial(paste_masks, masks, boxes, size, rule=rule)
    implementations = {
        **peers,
        "trimask": ours,
        "trimask, packed": partial(ours, packed=True),
        "trimask, plain torch": plain_torch(ours),
    }

    def disagreement(expected: Tensor, got: Tensor) -> str:
        return _differing(expected, got if got.dtype == torch.bool else _unpacked(got, size[1]))

    area = len(masks) * size[0]
    least: dict[str, int] = dict.fromkeys(implementations, area * size[1])
    least["trimask, packed"] = area * ((size[1] + 7) // 8)
    name = "torchvision's" if rule == PasteRule.TORCHVISION else "Detectron2's"
    case = f"{len(masks)} masks to {size[0]} x {size[1]}, {name} rule"
    return bench.compare("paste_masks", case, implementations, disagreement, least_bytes=least)


def _run_lengths(bench: Bench, count: int) -> list[Row]:
    """Ours stay on the device; the peers' masks go to the host, where run lengths are made."""
    masks, boxes, size = _masks(bench, count)
    ours = partial(masks_to_rle, masks, boxes, size, rule=PasteRule.TORCHVISION, capacity=CAPACITY)

    def to_host() -> Tensor:
        return torchvision_paste(masks, boxes, size).cpu()

    def to_strings() -> list[dict[str, Any]]:
        return coco.encode(np.asfortranarray(to_host().permute(1, 2, 0).numpy(), dtype=np.uint8))

    implementations = {
        "torchvision": to_host if roi_heads else None,
        "torchvision, pycocotools": to_strings if roi_heads and coco else None,
        "trimask": ours,
        "trimask, plain torch": plain_torch(ours),
    }

    def dense(output: Any) -> Tensor:
        if isinstance(output, list):
            return torch.from_numpy(coco.decode(output)).permute(2, 0, 1).bool()
        return output if isinstance(output, Tensor) else _filled(output, size)

    def disagreement(expected: Any, got: Any) -> str:
        return _differing(dense(expected), dense(got))

    case = f"{len(masks)} masks of {size[0]} x {size[1]}; torchvision's: pasted and copied to the host"
    return bench.compare("masks_to_rle", case, implementations, disagreement)


def _preprocess(bench: Bench, batch: int, antialias: bool) -> list[Row]:
    """COCO pictures of 480 x 640 on the device already; the peer resizes, normalises and pads one by one."""
    source, size = ((48, 64), (80, 107)) if bench.quick else ((480, 640), (800, 1067))
    padded = (size[0], (size[1] + 31) // 32 * 32)
    rng = torch.Generator().manual_seed(0)
    pictures = [bench.put(torch.randint(256, (*source, 3), generator=rng, dtype=torch.uint8)) for _ in range(batch)]
    mean, std = bench.put(*(torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)))

    def by_torch() -> Tensor:
        out = torch.zeros(batch, 3, *padded, device=mean.device)
        for target, picture in zip(out, pictures, strict=True):
            x = picture.permute(2, 0, 1)[None].float()
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=antialias)[0]
            target[:, : size[0], : size[1]] = (x - mean) / std
        return out.contiguous(memory_format=torch.channels_last)

    ours = partial(preprocess, pictures, [size] * batch, padded, antialias=antialias, mean=MEAN, std=STD)
    implementations: dict[str, Any] = {
        "torch, one by one": by_torch,
        "trimask": ours,
        "trimask, float16": partial(ours, dtype=torch.float16),
        "trimask, plain torch": plain_torch(ours),
    }

    def disagreement(expected: Tensor, got: Tensor) -> str:
        error = float((expected - got.float()).abs().max())
        # Values up to 3: 255 levels, weights of eight or so roundings, and half precision's own.
        limit = 1e-3 if got.dtype == torch.float32 else 4e-3
        return "" if error <= limit else f"off by {error:.1e}"

    pixels = batch * 3 * padded[0] * padded[1]
    least: dict[str, int] = dict.fromkeys(implementations, batch * 3 * source[0] * source[1] + 4 * pixels)
    least["trimask, float16"] -= 2 * pixels
    how = "antialiased" if antialias else "bilinear"
    case = f"{batch} x {source[0]} x {source[1]} to {size[0]} x {size[1]}, {how}"
    return bench.compare("preprocess", case, implementations, disagreement, least_bytes=least)


def detectron2_paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste as Detectron2 does on a GPU: sample every mask at every pixel of the picture, so many at a time."""
    height, width = size
    chunk = max(1, _CHUNK // (4 * height * width))
    pasted = torch.empty(len(masks), height, width, dtype=torch.bool, device=masks.device)
    y, x = (torch.arange(side, device=masks.device) + 0.5 for side in size)
    for i in range(0, len(masks), chunk):
        x1, y1, x2, y2 = boxes[i : i + chunk].T[..., None]  # [chunk, 1] each
        across, down = 2 * (x - x1) / (x2 - x1) - 1, 2 * (y - y1) / (y2 - y1) - 1
        shape = (len(x1), height, width)
        grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], 3)
        sampled = F.grid_sample(masks[i : i + chunk, None], grid, align_corners=False)[:, 0]
        pasted[i : i + chunk] = sampled >= PasteRule.DETECTRON2.threshold
    return pasted


def _differing(expected: Tensor, got: Tensor) -> str:
    worst = int((expected.cpu() != got.cpu()).sum((1, 2)).max())
    # A pixel whose value is the threshold, but for rounding, may go either way.
    return "" if worst <= 2 else f"{worst} pixels of a mask differ"


def _unpacked(bits: Tensor, width: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=-1, bitorder="little")[..., :width]).bool()


def _filled(output: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    """Run lengths [N, capacity], how many -> masks [N, H, W]."""
    runs, lengths = output[0].cpu().numpy(), output[1].tolist()
    return torch.from_numpy(np.stack([mask_of_runs(row[:n], size) for row, n in zip(runs, lengths, strict=True)]))
