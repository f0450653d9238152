"""The public face: from pictures of any kind to results."""

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.checkpoints import load_model
from ..model.config import DetectionConfig, ResizeConfig
from ..model.mask_rcnn import Detections, MaskRCNN
from .graph import optimize
from .pictures import Picture, PictureError, expand, read
from .preprocess import make_batch
from .result import Result

__all__ = ["Predictor", "load"]


class Predictor:
    """A model ready to predict.

    Args:
        model: in evaluation or training mode; it is copied and left as it is.
        device: where to run; by default the GPU if there is one.
        dtype: precision of weights and features: float32, float16 or bfloat16. Boxes stay in float32.
        score: lowest score of a detection; by default the model's own, 0.05 for the published ones.
        max_detections: per picture; by default the model's own, 100 for the published ones.
        resize: short side in pixels (the long side may grow in proportion), or a whole :class:`ResizeConfig`; by
            default the model's own.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: MaskRCNN,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        score: float | None = None,
        max_detections: int | None = None,
        resize: int | ResizeConfig | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
        self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self.config = model.config
        if resize is not None:
            self.config = replace(
                self.config, input=replace(self.config.input, resize=_resize(resize, self.config.input.resize))
            )
        self.config = replace(self.config, detection=_limits(self.config.detection, score, max_detections))
        self.graph = optimize(model, self.device, dtype)

    def __repr__(self) -> str:
        kind = type(self.config.backbone).__name__.removesuffix("Config")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Predictor({kind}, {self.config.num_classes} classes, {self.device}, {dtype})"

    def predict(
        self,
        source: Any,
        *,
        batch_size: int = 1,
        stream: bool = False,
        score: float | None = None,
        max_detections: int | None = None,
        channel_order: str = "rgb",
    ) -> Any:
        """Detect objects and their masks.

        Args:
            source: a path, PIL picture, array ([H, W, 3] uint8, and what :mod:`.pictures` lists) or tensor; or a
                folder, a pattern such as ``"photos/*.jpg"``, or a list or generator of any of these.
            batch_size: pictures that go through the network together. Those of a batch are padded to a common size,
                which changes detections slightly, as it does in every implementation; 1 keeps them independent.
            stream: yield results one by one, reading no further ahead than a batch. Each result keeps its picture to
                draw on: for thousands of pictures stream, and let go of the results or take ``without_picture()``.
            score, max_detections: other limits than the predictor's.
            channel_order: ``"bgr"`` for arrays and tensors in OpenCV's order.

        Returns:
            A :class:`Result` for a single picture, a list of them for several, a generator with ``stream``.

        Raises:
            PictureError, OSError: a single picture that cannot be read. Among several a bad one is warned about, its
                result is empty and says why in ``error``, and the others are not harmed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        limits = _limits(self.config.detection, score, max_detections)
        if not stream and _is_single(source):
            (item,) = expand(source)
            start = time.perf_counter()
            return self._run([(read(item, channel_order), _milliseconds(start))], limits)[0]
        results = self._stream(expand(source), batch_size, limits, channel_order)
        return results if stream else list(results)

    __call__ = predict

    def warmup(self, size: tuple[int, int] = (480, 640), batch_size: int = 1) -> float:
        """Predict blank pictures, so that the first real ones wait for no compilation.

        Args:
            size: height and width of the pictures.
            batch_size: pictures at a time.

        Returns:
            Seconds that it took.

        Raises:
            ValueError: a size or number below 1.
        """
        if min(*size, batch_size) < 1:
            raise ValueError(f"size, batch_size: expected at least 1, got {tuple(size)} and {batch_size}")
        start = time.perf_counter()
        self.predict([np.zeros((*size, 3), np.uint8)] * batch_size, batch_size=batch_size)
        return time.perf_counter() - start

    def _stream(
        self, items: Iterator[Any], batch_size: int, limits: DetectionConfig, channel_order: str
    ) -> Iterator[Result]:
        while chunk := list(islice(items, batch_size)):
            results: list[Result | None] = [None] * len(chunk)
            pictures = {}
            for i, item in enumerate(chunk):
                start = time.perf_counter()
                try:
                    pictures[i] = (read(item, channel_order), _milliseconds(start))
                except (PictureError, OSError) as error:
                    warnings.warn(str(error), stacklevel=3)
                    results[i] = _failure(item, error)
            if pictures:
                for i, result in zip(pictures, self._run(list(pictures.values()), limits), strict=True):
                    results[i] = result
            yield from (result for result in results if result is not None)

    @torch.inference_mode()
    def _run(self, pictures: list[tuple[Picture, float]], limits: DetectionConfig) -> list[Result]:
        """Results of one batch of (picture, milliseconds of its decoding)."""
        watch = _Stopwatch(self.device)
        batch = make_batch([picture.array for picture, _ in pictures], self.config.input, self.device)
        watch.mark("preprocess")
        detections = _to_host(self.graph(*batch, detection=limits, mark=watch.mark))
        watch.mark("copy")
        shared = {stage: spent / len(pictures) for stage, spent in watch.stages.items()}
        return [
            self._result(detections, i, picture, {"decode": decode, **shared})
            for i, (picture, decode) in enumerate(pictures)
        ]

    def _result(self, detections: Detections, i: int, picture: Picture, timings: dict[str, float]) -> Result:
        n = int(detections.count[i])
        labels = detections.labels[i, :n].numpy()
        masks = detections.mask_logits
        return Result(
            boxes=detections.boxes[i, :n].numpy(),
            scores=detections.scores[i, :n].numpy(),
            labels=labels,
            size=picture.size,
            names=[self.config.class_names[label] for label in labels],
            category_ids=np.array(self.config.category_ids, np.int64)[labels],
            mask_probabilities=None if masks is None else masks[i, :n].float().sigmoid().numpy(),
            rule=self.config.paste,
            picture=picture.array,
            path=picture.path,
            timings=timings,
        )


def load(
    weights: str | Path = "people",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    score: float | None = None,
    max_detections: int | None = None,
    resize: int | ResizeConfig | None = None,
    **options: Any,
) -> Predictor:
    """Load weights and make them ready to predict.

    Args:
        weights: a checkpoint of this project, torchvision, Detectron2 or MMDetection; the name of a published model
            (``trimask info`` lists them), downloaded once; or ``"people"``, the bundled model.
        device, dtype, score, max_detections, resize: see :class:`Predictor`.
        **options: what the keys of a foreign checkpoint cannot say (``min_size``, ``max_size``, ``anchor_sizes``,
            ``aspect_ratios``, ``activation``, ``norm_eps``, ``classes``): see
            :func:`trimask.engine.model.checkpoints.load_model`.

    Raises:
        ValueError: a file that is no checkpoint, keys that do not fit, an unknown name or option.
    """
    model = load_model(weights, **options)
    return Predictor(model, device=device, dtype=dtype, score=score, max_detections=max_detections, resize=resize)


class _Stopwatch:
    """Milliseconds between marks. On a GPU a mark waits for the device, so that stages can be told apart."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: dict[str, float] = {}
        self.last = time.perf_counter()

    def mark(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.stages[stage] = (now - self.last) * 1e3
        self.last = now


def _milliseconds(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _to_host(found: Detections) -> Detections:
    masks = None if found.mask_logits is None else found.mask_logits.cpu()
    return Detections(found.boxes.cpu(), found.scores.cpu(), found.labels.cpu(), masks, found.count.cpu())


def _is_single(source: Any) -> bool:
    """Whether the answer is one result: a file, or a picture in memory, rather than something that holds several."""
    if isinstance(source, (str, os.PathLike)):
        return not (os.path.isdir(source) or (set("*?[") & set(os.fspath(source)) and not os.path.exists(source)))
    if isinstance(source, (np.ndarray, Tensor)):
        return source.ndim != 4
    # What holds no pictures at all is single too: reading it says what was expected.
    return isinstance(source, (Picture, Image.Image, bytes, bytearray, memoryview, Mapping)) or not isinstance(
        source, Iterable
    )


def _failure(item: Any, error: Exception) -> Result:
    path = Path(item) if isinstance(item, (str, os.PathLike)) else None
    empty = np.zeros((0, 4), np.float32)
    return Result(empty, empty[:, 0], empty[:, 0].astype(np.int64), (0, 0), path=path, error=error)


def _limits(config: DetectionConfig, score: float | None, max_detections: int | None) -> DetectionConfig:
    if score is not None:
        if not 0 <= score <= 1:
            raise ValueError(f"score: expected a number in 0..1, got {score}")
        config = replace(config, score_threshold=float(score))
    if max_detections is not None:
        if max_detections < 1:
            raise ValueError(f"max_detections: expected at least 1, got {max_detections}")
        config = replace(config, max_detections=int(max_detections))
    return config


def _device(wanted: str | torch.device) -> torch.device:
    """The device, with its number, if something can be put there."""
    try:
        device = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that torch finds here, got {str(wanted)!r} ({error})") from None
    if device.type == "meta":
        raise ValueError("device: expected one that computes, got 'meta'")
    return device


def _resize(wanted: int | ResizeConfig, config: ResizeConfig) -> ResizeConfig:
    if isinstance(wanted, ResizeConfig):
        return wanted
    if wanted < 1:
        raise ValueError(f"resize: expected a short side of at least 1 pixel, got {wanted}")
    return replace(config, min_size=wanted, max_size=round(config.max_size * wanted / config.min_size))
