"""What the predictors of every runtime share: pictures of any kind in, results out. Needs no torch."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..model.config import DetectionConfig, MaskRCNNConfig, ResizeConfig
from ..pictures.reading import expand, is_picture, read
from .pipeline import Decoded, Pipeline
from .result import Result

__all__ = ["Handle", "Predicting", "limits", "with_resize"]


class Handle(Protocol):
    """A batch on its way."""

    def results(self) -> list[Result]:
        """Wait for it; one result for each picture."""


class Predicting(ABC):
    """Something that predicts; ``config`` says what."""

    config: MaskRCNNConfig

    def predict(
        self,
        source: Any,
        *,
        batch_size: int = 1,
        stream: bool = False,
        workers: int = 0,
        run_lengths: bool = False,
        score: float | None = None,
        max_detections: int | None = None,
        channel_order: str = "rgb",
    ) -> Any:
        """Detect objects and their masks.

        Args:
            source: a path, the bytes of a picture file or an open one, a PIL picture, an array (``[H, W, 3]`` or
                ``[H, W]``; uint8, uint16, or floats in 0..1) or a tensor (``[3, H, W]`` too); or a folder, a pattern
                such as ``"photos/*.jpg"``, or a list or generator of any of these. docs/predicting.md says it all.
            batch_size: pictures that go through the network together. Those of a batch are padded to a common size,
                which changes detections slightly, as it does in every implementation; 1 keeps them independent.
            stream: yield results one by one, reading no further ahead than a batch. Each result keeps its picture to
                draw on: for thousands of pictures stream, and let go of the results or take ``without_picture()``.
            workers: threads that decode pictures while the device computes, and as many that make results: for
                throughput. The source is then read ahead by up to ``3 * batch_size + workers`` pictures, rounded up to
                batches, so a live camera had better stay with 0: each batch on its own, in the caller's thread.
            run_lengths: have the run lengths of the masks made with the results, by the workers, rather than when they
                are asked for.
            score, max_detections: other limits than the predictor's.
            channel_order: ``"bgr"`` for arrays and tensors in OpenCV's order.

        Returns:
            A :class:`Result` for a single picture, a list of them for several, a generator with ``stream``.

        Raises:
            PictureError, OSError: a single picture that cannot be read. Among several a bad one is warned about, its
                result is empty and says why in ``error``, and the others are not harmed.
            Exception: what a generator raises, after the results of what came before.
        """
        _check("batch_size", batch_size, 1)
        _check("workers", workers, 0)
        detection = self._limits(score, max_detections)
        finish = partial(_finish, run_lengths=run_lengths)
        if not stream and _is_single(source):
            (item,) = expand(source)
            start = time.perf_counter()
            picture = read(item, channel_order)
            return finish(self._submit([(picture, (time.perf_counter() - start) * 1e3)], detection))[0]
        pipeline = Pipeline(
            partial(read, channel_order=channel_order),
            partial(self._submit, detection=detection),
            finish,
            partial(_failure, masks=self.config.mask_head is not None),
            batch_size=batch_size,
            workers=workers,
            lanes=self._lanes() if workers else nullcontext,
        )
        if stream:
            return pipeline.run(expand(source))
        return list(pipeline.run(expand(source), stacklevel=4))

    __call__ = predict

    def warmup(self, size: tuple[int, int] = (480, 640), batch_size: int = 1) -> float:
        """Predict blank pictures, so that the first real ones wait for no compilation and no capture.

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

    @abstractmethod
    def _submit(self, pictures: list[Decoded], detection: DetectionConfig) -> Handle:
        """Start one batch of (picture, milliseconds of its decoding)."""

    def _limits(self, score: float | None, max_detections: int | None) -> DetectionConfig:
        """The limits of a call."""
        return limits(self.config, score, max_detections)

    def _lanes(self) -> Callable[[], AbstractContextManager[Any]]:
        """Where to submit batches, one after the other."""
        return nullcontext


def limits(config: MaskRCNNConfig, score: float | None, max_detections: int | None) -> DetectionConfig:
    """Its limits, with another score threshold and capacity where they are given; no more room than can be filled."""
    detection = config.detection
    if score is not None:
        if not isinstance(score, Real) or not 0 <= score <= 1:
            raise ValueError(f"score: expected a number in 0..1, got {score!r}")
        detection = replace(detection, score_threshold=float(score))
    if max_detections is not None:
        _check("max_detections", max_detections, 1)
        most = config.rpn.post_nms * len(config.class_names)
        detection = replace(detection, max_detections=min(int(max_detections), most))
    return detection


def _check(name: str, number: int, least: int) -> None:
    if not isinstance(number, Integral) or number < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}")


def with_resize(config: MaskRCNNConfig, wanted: int | ResizeConfig) -> MaskRCNNConfig:
    """The config with another resize policy, or another short side, with which the long one grows in proportion."""
    if not isinstance(wanted, ResizeConfig):
        if not isinstance(wanted, Integral):
            raise ValueError(f"resize: expected a short side in whole pixels or a ResizeConfig, got {wanted!r}")
        if wanted < 1:
            raise ValueError(f"resize: expected a short side of at least 1 pixel, got {wanted}")
        old = config.input.resize
        wanted = replace(old, min_size=wanted, max_size=round(old.max_size * wanted / old.min_size))
    return replace(config, input=replace(config.input, resize=wanted))


def _finish(pending: Handle, run_lengths: bool) -> list[Result]:
    results = pending.results()
    for result in results:
        if run_lengths and result.has_masks:
            _ = result.runs  # kept there
    return results


def _is_single(source: Any) -> bool:
    """Whether the answer is one result: a file, or a picture in memory, rather than something that holds several."""
    if isinstance(source, (str, os.PathLike)):
        return not (os.path.isdir(source) or (set("*?[") & set(os.fspath(source)) and not os.path.exists(source)))
    # What holds no pictures at all is single too: reading it says what was expected.
    return is_picture(source) or isinstance(source, Mapping) or not isinstance(source, Iterable)


def _failure(item: Any, error: Exception, masks: bool) -> Result:
    """As of a picture without objects, so that whoever goes through many results need not ask."""
    path = Path(item) if isinstance(item, (str, os.PathLike)) else None
    empty = np.zeros((0, 4), np.float32)
    labels = empty[:, 0].astype(np.int64)
    return Result(empty, empty[:, 0], labels, (0, 0), mask_runs=[] if masks else None, path=path, error=error)
