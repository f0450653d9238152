"""What an exported file says about itself: one JSON object under ``trimask`` in its metadata. Needs no torch."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from ..engine.model.config import MaskRCNNConfig, ResizeConfig

__all__ = [
    "CONTRACT",
    "KEY",
    "MASKS",
    "PRECISIONS",
    "Metadata",
    "Signature",
    "contract_text",
    "multiple_of",
    "signature",
]

KEY = "trimask"
CONTRACT = 1  # the version of the inputs and outputs that this version writes, and the newest that it reads
LONGEST = 16384  # pixels of a side inside of the network: no stranger's file makes the host fill its memory

# Name: number of the type in onnx.TensorProto, and sizes, None for what the metadata leave open.
Signature = dict[str, tuple[int, tuple[int | None, ...]]]
FLOAT, UINT8, INT64, BOOL = 1, 2, 7, 9

MASKS = ("roi", "full", "none")
PRECISIONS = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Metadata:
    """Everything that is needed to run a file without its checkpoint.

    Attributes:
        config: the whole model: class names, category ids, normalisation, resize policy, paste rule, and in
            ``detection`` the thresholds and the capacity of this file.
        masks: one of :data:`MASKS`.
        preprocess: whether it takes one picture of any size.
        static: (batch, height, width) of a file of fixed size, or None.
        precision: of the weights, one of :data:`PRECISIONS`.
        version: of the trimask that wrote it.
        source: the weights: ``file`` and ``sha256``, where they came from one.
    """

    config: MaskRCNNConfig
    masks: str = "roi"
    preprocess: bool = False
    static: tuple[int, int, int] | None = None
    precision: str = "float32"
    version: str = "unknown"
    source: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        about = {
            "contract": CONTRACT,
            "trimask": self.version,
            "masks": self.masks,
            "preprocess": self.preprocess,
            "static": self.static,
            "precision": self.precision,
            "source": self.source,
            "config": json.loads(self.config.to_json()),
        }
        return json.dumps(about, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """
        Raises:
            ValueError: naming what does not fit, or a newer contract.
        """
        try:
            about = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"metadata: expected JSON, got {text[:40]!r} ({error})") from None
        if not isinstance(about, dict) or type(about.get("contract")) is not int:
            raise ValueError(f"metadata: expected an object with the contract's version, got {text[:80]!r}")
        if about["contract"] > CONTRACT:
            raise ValueError(
                f"metadata: expected contract {CONTRACT} or older, got {about['contract']}, made by a newer trimask: "
                "upgrade"
            )
        config = _checked(MaskRCNNConfig.from_json(json.dumps(about.get("config"))))
        static, multiple = about.get("static"), multiple_of(config)
        sizes = f"null or a batch and two multiples of {multiple} up to {LONGEST}"
        checks: dict[str, tuple[bool, str]] = {
            "masks": (about.get("masks") in MASKS, f"one of {MASKS}"),
            "preprocess": (isinstance(about.get("preprocess"), bool), "true or false"),
            "static": (static is None or _is_size(static, multiple), sizes),
            "precision": (about.get("precision") in PRECISIONS, f"one of {PRECISIONS}"),
            "source": (isinstance(about.get("source"), dict), "an object"),
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                raise ValueError(f"metadata: expected {expected} as {name}, got {about.get(name)!r}")
        return cls(
            config=config,
            masks=about["masks"],
            preprocess=about["preprocess"],
            static=None if static is None else tuple(static),
            precision=about["precision"],
            version=str(about.get("trimask")),
            source=about["source"],
        )


def multiple_of(config: MaskRCNNConfig) -> int:
    """What heights and widths inside of a file are multiples of: 32 in a feature pyramid, else 1."""
    return math.gcd(32, config.input.size_divisible)


def _is_size(value: Any, multiple: int) -> bool:
    numbers = isinstance(value, list) and len(value) == 3 and all(type(number) is int for number in value)
    return (
        numbers and all(0 < number <= LONGEST for number in value) and not (value[1] % multiple or value[2] % multiple)
    )


def _checked(config: MaskRCNNConfig) -> MaskRCNNConfig:
    """The config, if what the host reads of it is in range."""
    resize, detection = config.input.resize, config.detection
    ranges: dict[str, tuple[float, float, float]] = {
        "input.resize.min_size": (resize.min_size, 1, LONGEST),
        "input.resize.max_size": (resize.max_size, 1, LONGEST),
        "input.size_divisible": (config.input.size_divisible, 1, LONGEST),
        "detection.score_threshold": (detection.score_threshold, 0, 1),
        "detection.nms_threshold": (detection.nms_threshold, 0, 1),
        "detection.max_detections": (detection.max_detections, 1, 1 << 31),
        **{f"category_ids[{i}]": (number, -(1 << 63), (1 << 63) - 1) for i, number in enumerate(config.category_ids)},
    }
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise ValueError(f"config.{name}: expected a number in {least}..{most}, got {value}")
    return config


def signature(about: Metadata) -> tuple[Signature, Signature]:
    """Inputs and outputs of a file, in their order; :func:`contract_text` says what they are."""
    batch, height, width = about.static or (None, None, None)
    inputs: Signature = {
        "image": (FLOAT, (batch, 3, height, width)),
        "image_sizes": (INT64, (batch, 2)),
        "original_sizes": (INT64, (batch, 2)),
    }
    if about.preprocess:
        inputs, batch = {"picture": (UINT8, (None, None, 3))}, 1
    capacity = about.config.detection.max_detections
    outputs: Signature = {
        "num_detections": (INT64, (batch,)),
        "boxes": (FLOAT, (batch, capacity, 4)),
        "scores": (FLOAT, (batch, capacity)),
        "labels": (INT64, (batch, capacity)),
    }
    if about.masks == "full":
        outputs["masks"] = BOOL, (batch, capacity, None, None)
    elif about.masks == "roi":
        cells = about.config.mask_side
        outputs["masks"] = FLOAT, (batch, capacity, cells, cells)
    return inputs, outputs


def _resizing(config: ResizeConfig) -> str:
    """How the model wants its pictures, in words; the maths is that of ``engine/pictures/resize.py``."""
    how = {
        (True, True): "by Pillow's bilinear filter, on uint8",
        (False, True): "by OpenCV's INTER_LINEAR, on uint8",
        (True, False): "bilinear and antialiased, on floats",
        (False, False): "bilinear without antialiasing, on floats",
    }[config.antialias, config.quantize]
    limit = "then, if the long side exceeds {}, both by {} / long side"
    if not config.limit_second:
        limit = "or by {} / long side if that is less"
    scale = f"by {config.min_size} / short side, {limit.format(*[config.max_size] * 2)}"
    sides = "rounded half up" if config.round_half_up else "rounded down"
    return f"The model expects pictures scaled {scale}; new sides {sides}; {how}."


def contract_text(about: Metadata) -> str:
    """The inputs and outputs of a file, in words: its ``doc_string``."""
    config = about.config
    names = ", ".join(config.class_names[:5]) + (", ..." if config.num_classes > 5 else "")
    multiple = multiple_of(config)
    size = f"a multiple of {multiple}" if multiple > 1 else "any"
    size = size if about.static is None else "{1} x {2}; B: {0}".format(*about.static)
    if about.preprocess:
        inputs = "picture: uint8 [H, W, 3], RGB, any size. One picture: B is 1."
    else:
        inputs = (
            f"image: float32 [B, 3, H, W], RGB in 0..255, not normalised, zeros right of and below a picture; H, W: "
            f"{size}. {_resizing(config.input.resize)}\n"
            "image_sizes: int64 [B, 2], (height, width) of each picture within it.\n"
            "original_sizes: int64 [B, 2], (height, width) of each before it was resized."
        )
    masks = {
        "roi": "\nmasks: float32 [B, D, m, m], probabilities over the box of each detection, zero beyond the count.",
        "full": "\nmasks: bool [B, D, max H, max W], in the original pictures.",
        "none": "",
    }[about.masks]
    detection = config.detection
    return (
        f"trimask {about.version}, contract {CONTRACT}: Mask R-CNN, {config.num_classes} classes ({names}).\n\n"
        f"Inputs\n{inputs}\n\n"
        f"Outputs, D = {detection.max_detections}\n"
        "num_detections: int64 [B].\n"
        "boxes: float32 [B, D, 4], x1 y1 x2 y2 in pixels of the original picture, zero beyond the count.\n"
        f"scores: float32 [B, D], falling, above {detection.score_threshold:g}, zero beyond the count.\n"
        f"labels: int64 [B, D], 0 is the first class, -1 beyond the count.{masks}\n\n"
        f"Everything else is in the metadata, as JSON under the key {KEY}."
    )
