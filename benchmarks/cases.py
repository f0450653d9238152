"""What is measured: inputs of the ops, real and in sweeps, the same for the benchmarks and the tests.

Real ones were recorded by the bundled model on photographs (`recipes/record_cases.py`): the boxes before and after
each suppression, and the masks. A sweep varies one thing about what COCO pictures give. Each case says what it costs,
so that a run of bounded time can leave out the dearest, by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from .inputs import SIZE, STRIDES, class_scores, kinds_of_boxes, proposals, smooth_masks

__all__ = [
    "CLASSES",
    "DENSITIES",
    "RECORDED",
    "DetectionCase",
    "LevelCase",
    "MapCase",
    "MaskCase",
    "NMSCase",
    "Recording",
    "RoIAlignCase",
    "detection_cases",
    "level_cases",
    "map_cases",
    "mask_cases",
    "nms_cases",
    "recording",
    "roi_align_cases",
]

# Photographs of COCO, at the model's own size and at COCO's usual one.
RECORDED = tuple(
    f"{picture} at {side}" for picture in ("000000000127", "000000000471", "000000001268") for side in (320, 800)
)
DENSITIES = ("sparse", "proposals", "crowd")
CLASSES = 80
_FILE = Path(__file__).parent / "recorded.safetensors"
_PADDED = 32  # the network's sides are multiples of it


class Recording(NamedTuple):
    """What the bundled model saw in one picture.

    Attributes:
        size: (height, width) inside the network, before padding.
        original_size: (height, width) of the picture.
        level_boxes: float32 [5, 1000, 4], the best anchors of each level, moved, in the network's frame.
        level_scores: float32 [5, 1000] falling logits; -inf for what is empty, and beyond the anchors that a level has.
        proposals: float32 [R, 4], what suppression leaves of them.
        candidate_boxes: float32 [R, 4], the proposals moved by the box head.
        candidate_scores: float32 [R], probabilities of the one class.
        boxes: float32 [N, 4], the detections in the picture.
        masks: float32 [N, 28, 28], their probabilities.
    """

    size: tuple[int, int]
    original_size: tuple[int, int]
    level_boxes: Tensor
    level_scores: Tensor
    proposals: Tensor
    candidate_boxes: Tensor
    candidate_scores: Tensor
    boxes: Tensor
    masks: Tensor


@lru_cache(1)
def _tensors() -> dict[str, Tensor]:
    return load_file(_FILE)


def recording(name: str) -> Recording:
    """One of `RECORDED`.

    Raises:
        ValueError: another name.
    """
    if name not in RECORDED:
        raise ValueError(f"recording: expected one of {', '.join(RECORDED)}, got {name!r}")
    found = {key.rpartition("/")[2]: tensor for key, tensor in _tensors().items() if key.startswith(f"{name}/")}
    height, width, *original = found.pop("size").tolist()
    boxes = {key: found[key].float() / 16 for key in ("level_boxes", "proposals", "candidate_boxes", "boxes")}
    scores = {key: found[key].float() for key in ("level_scores", "candidate_scores")}
    return Recording((height, width), tuple(original), masks=found["masks"].float() / 255, **boxes, **scores)


@dataclass(frozen=True)
class RoIAlignCase:
    """RoIs of one picture on P2..P5.

    Attributes:
        recorded: whose proposals they are; "" for random ones.
        size: (height, width) inside the network.
        varied: the field that a sweep varies, or "".
    """

    recorded: str = ""
    count: int = 1000
    channels: int = 256
    output: int = 7
    dtype: torch.dtype = torch.float32
    size: tuple[int, int] = (800, 1344)
    sampling_ratio: int = 2
    varied: str = ""

    @property
    def name(self) -> str:
        kind = f"RoIs of {self.recorded}" if self.recorded else "RoIs"
        height, width = self.padded
        return f"{self.count} {kind} x {self.channels} x {self.output} x {self.output}, P2..P5 of {height} x {width}"

    @property
    def padded(self) -> tuple[int, int]:
        height, width = recording(self.recorded).size if self.recorded else self.size
        return -(-height // _PADDED) * _PADDED, -(-width // _PADDED) * _PADDED

    @property
    def operations(self) -> int:
        """Of the definition: each sample is four products and sums."""
        return 8 * self.count * self.channels * self.output**2 * self.sampling_ratio**2

    @property
    def seconds(self) -> float:
        return 1e-7 * self.count * self.channels * self.output**2

    def features(self) -> list[Tensor]:
        """Four levels [1, C, h, w], rows of a channel one after the other."""
        rng = torch.Generator().manual_seed(0)
        height, width = self.padded
        shapes = [(1, self.channels, height // s, width // s) for s in STRIDES]
        return [torch.randn(shape, generator=rng).to(self.dtype) for shape in shapes]

    def boxes(self) -> Tensor:
        """float32 [count, 4]."""
        if self.recorded:
            return recording(self.recorded).proposals[: self.count]
        return proposals(self.count, torch.Generator().manual_seed(0), self.count, 0.1, self.size)


def roi_align_cases(quick: bool) -> Iterator[RoIAlignCase]:
    """Recorded proposals, then sweeps over RoIs, channels, pools and dtypes, the cheapest first."""
    small = RoIAlignCase(count=20, channels=8, size=(160, 192))
    if quick:
        yield from (small, replace(small, output=14, dtype=torch.float16), replace(small, recorded=RECORDED[0]))
        return
    yield RoIAlignCase()
    for name in RECORDED:
        yield RoIAlignCase(name, channels=128 if name.endswith("320") else 256)
    for count in (100, 300, 2000, 5000):
        yield RoIAlignCase(count=count, varied="count")
    for channels in (64, 128, 512):
        yield RoIAlignCase(channels=channels, varied="channels")
    for output in (7, 14, 28):
        yield RoIAlignCase(count=200, output=output, varied="output")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield RoIAlignCase(dtype=dtype)


@dataclass(frozen=True)
class NMSCase:
    """Boxes of one class; `kept` is how many are wanted, the best, or None for all."""

    density: str
    count: int
    kept: int | None = None
    iou_threshold: float = 0.7

    @property
    def name(self) -> str:
        return f"{self.count} boxes, {self.density}, {self.kept or 'all'} kept"

    @property
    def seconds(self) -> float:
        """torchvision compares each survivor with all after it."""
        return 1e-5 * self.count if self.density == "crowd" else 3e-9 * self.count**2

    def boxes(self) -> Tensor:
        """float32 [count, 4]."""
        return kinds_of_boxes(self.count)[self.density]

    def scores(self) -> Tensor:
        """float32 [count]."""
        return torch.rand(self.count, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class MapCase:
    """RoIs of a picture of (height, width) on one map: of stride 16 as of models without a pyramid, or fine.

    Attributes:
        maximum: RoIPool; else RoIAlign with two samples.
        stride: picture pixels per pixel of the map.
    """

    count: int
    maximum: bool
    channels: int = 256
    output: int = 7
    stride: int = 16
    size: tuple[int, int] = (800, 1344)

    @property
    def name(self) -> str:
        height, width = (side // self.stride for side in self.size)
        return f"{self.count} RoIs x {self.channels} x {self.output} x {self.output}, one map of {height} x {width}"

    @property
    def seconds(self) -> float:
        return 4e-8 * self.count * self.channels * self.output**2 + 0.1

    def feature(self) -> Tensor:
        """`[1, C, h, w]`, rows of a channel one after the other."""
        height, width = (side // self.stride for side in self.size)
        return torch.randn(1, self.channels, height, width, generator=torch.Generator().manual_seed(0))

    def boxes(self) -> Tensor:
        """float32 [count, 4]."""
        return proposals(self.count, torch.Generator().manual_seed(0), self.count, 0.1, self.size)


def map_cases(quick: bool) -> Iterator[MapCase]:
    """Few and many RoIs: a map is worth turning to channels_last for many alone."""
    if quick:
        yield from (MapCase(20, maximum, 8, size=(160, 192)) for maximum in (False, True))
        return
    for maximum in (False, True):
        yield from (MapCase(count, maximum) for count in (100, 1000))
        yield from (MapCase(count, maximum, stride=4) for count in (1, 10))


def nms_cases(quick: bool) -> Iterator[NMSCase]:
    """A hundred to a hundred thousand boxes, of which all, most or few survive."""
    counts = (60,) if quick else (100, 1000, 2000, 10_000, 100_000)
    for count in counts:
        for density in DENSITIES:
            yield NMSCase(density, count)
    for count in (60,) if quick else (1000, 2000):
        for density in DENSITIES:
            yield NMSCase(density, count, kept=min(count // 2, 100))


@dataclass(frozen=True)
class LevelCase:
    """Recorded anchors of five levels, each suppressed by itself: what the RPN does."""

    recorded: str
    iou_threshold: float = 0.7
    seconds: float = 0.2

    @property
    def name(self) -> str:
        return f"5 levels of {self.recorded}, each by itself"


def level_cases(quick: bool) -> Iterator[LevelCase]:
    """Of each recording."""
    yield from map(LevelCase, RECORDED[: 1 if quick else None])


@dataclass(frozen=True)
class DetectionCase:
    """Every class of every proposal above a threshold, suppressed within its class: what comes after the box head.

    Attributes:
        recorded: whose candidates they are, of one class; "" for random ones of `CLASSES`.
        count: of random proposals.
    """

    recorded: str = ""
    count: int = 1000
    iou_threshold: float = 0.5
    score_threshold: float = 0.05
    kept: int = 100
    seconds: float = 0.05

    @property
    def name(self) -> str:
        return f"detections of {self.recorded}" if self.recorded else "detections of a random picture"

    def candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 boxes [N, 4] and scores [N], int64 labels [N]."""
        if self.recorded:
            seen = recording(self.recorded)
            return seen.candidate_boxes, seen.candidate_scores, torch.zeros(len(seen.candidate_scores)).long()
        rng = torch.Generator().manual_seed(0)
        objects = proposals(self.count, rng, max(self.count // 8, 1), 0.12, SIZE)
        shift = torch.randn(self.count, CLASSES, 2, generator=rng).mul(2).repeat(1, 1, 2)
        boxes = (objects[:, None] + shift).flatten(0, 1)
        return boxes, class_scores(self.count, CLASSES, rng).flatten(), torch.arange(CLASSES).repeat(self.count)


def detection_cases(quick: bool) -> Iterator[DetectionCase]:
    """Random ones of eighty classes, and of each recording."""
    yield DetectionCase(count=30 if quick else 1000)
    yield from map(DetectionCase, RECORDED[: 1 if quick else None])


@dataclass(frozen=True)
class MaskCase:
    """Masks of one picture.

    Attributes:
        recorded: whose detections they are; "" for random ones.
        count: of random ones.
        size: (height, width) of their picture.
        varied: the field that a sweep varies, or "".
    """

    recorded: str = ""
    count: int = 100
    size: tuple[int, int] = SIZE
    varied: str = ""

    @property
    def name(self) -> str:
        masks, _, (height, width) = self.masks()
        of = f" of {self.recorded}" if self.recorded else ""
        return f"{len(masks)} masks{of}, {height} x {width}"

    @property
    def pixels(self) -> int:
        """Of all masks, were they dense: bytes of theirs as bool."""
        masks, _, (height, width) = self.masks()
        return len(masks) * height * width

    @property
    def seconds(self) -> float:
        return 2.5e-8 * self.pixels

    def masks(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Probabilities float32 [N, 28, 28], boxes [N, 4], and the picture's (height, width)."""
        if self.recorded:
            seen = recording(self.recorded)
            return seen.masks, seen.boxes, seen.original_size
        return *smooth_masks(self.count, self.size), self.size


def mask_cases(quick: bool) -> Iterator[MaskCase]:
    """Recorded detections, then more masks and larger pictures, up to 4000 x 6000."""
    if quick:
        yield from (MaskCase(count=5, size=(80, 133)), MaskCase(RECORDED[1]))
        return
    yield from (MaskCase(), *map(MaskCase, RECORDED[::2]))
    for count in (1, 10, 300):
        yield MaskCase(count=count, varied="count")
    for size in ((480, 640), (2000, 3000)):
        yield MaskCase(count=10, size=size, varied="size")
    for count in (1, 10, 100, 300):
        yield MaskCase(count=count, size=(4000, 6000), varied="count")
