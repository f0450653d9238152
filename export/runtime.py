"""Prediction from an exported file alone: the predictor's face, without torch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.inference.pipeline import Decoded
from ..engine.inference.predicting import Predicting, with_resize
from ..engine.inference.result import Result
from ..engine.model.config import DetectionConfig, MaskRCNNConfig, ResizeConfig
from ..engine.pictures.host import make_batch
from ..kernels.cpu.masks import runs_of_mask
from .backends import open_backend
from .inspection import read_file

__all__ = ["Runtime"]


class Runtime(Predicting):
    """An exported model ready to predict: :meth:`predict` and its results are those of :class:`trimask.Predictor`.

    Args:
        path: what ``trimask export`` wrote.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; by default the GPU if ONNX Runtime finds one. With OpenVINO its own
            names of devices.
        score: lowest score of a detection, not below the file's own.
        max_detections: per picture, not above the file's own.
        resize: another short side in pixels, or policy, than the file's own; not where the file resizes by itself.
        threads: that compute on a CPU; by default as many as there are cores.
        backend: ``"onnxruntime"`` or ``"openvino"``.
        dtype: ``"float32"``; with OpenVINO also ``"bfloat16"``, for processors that have it: about twice as fast. Or
            torch's dtype of that name.
        cache: keep what the runtime makes of the file in the user's cache, for a faster start.
        providers, session_options: as ONNX Runtime's ``InferenceSession`` takes them, in the place of ``device`` and
            ``threads``, for TensorRT or other hardware, memory limits, profiling; nothing is then kept in the cache.

    Attributes:
        path: the file.
        about: the file's :class:`Metadata`.
        provider: what really computes, such as ``"CPUExecutionProvider"``.

    Raises:
        ValueError: another file than ``trimask export`` writes, or an option out of range.
        ImportError: the backend is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | None = None,
        score: float | None = None,
        max_detections: int | None = None,
        resize: int | ResizeConfig | None = None,
        threads: int | None = None,
        backend: str = "onnxruntime",
        dtype: Any = "float32",
        cache: bool = True,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
    ) -> None:
        self.path = Path(path)
        dtype = str(dtype).removeprefix("torch.")  # no torch here to compare with
        self._options: dict[str, Any] = {
            "device": device,
            "score": score,
            "max_detections": max_detections,
            "resize": resize,
            "threads": threads,
            "backend": backend,
            "dtype": dtype,
            "cache": cache,
            "providers": providers,
            "session_options": session_options,
        }
        data, self.about = read_file(self.path)
        self.config = self.about.config
        if backend == "openvino" and self.about.precision == "int8":
            raise ValueError(
                f"{path}: expected onnxruntime for 8 bits, got openvino, which finds nothing in such files"
            )
        if backend == "openvino" and self.about.preprocess:
            raise ValueError(
                f"{path}: expected onnxruntime for a file that resizes pictures, got openvino, which resizes them to "
                "wrong sizes"
            )
        self._backend = open_backend(
            data, self.path, backend, device, threads, cache, dtype, providers, session_options
        )
        self.provider = self._backend.provider
        if resize is not None:
            if self.about.preprocess:
                raise ValueError("resize: expected none, since the file resizes pictures by itself")
            self.config = with_resize(self.config, resize)
        self.config = replace(self.config, detection=self._limits(score, max_detections))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or sent to another process it opens its file again."""
        return partial(type(self), self.path, **self._options), ()

    def __repr__(self) -> str:
        kind = type(self.config.backbone).__name__.removesuffix("Config")
        return f"Runtime({kind}, {self.config.num_classes} classes, {self.provider}, {self.about.precision})"

    def _limits(self, score: float | None, max_detections: int | None) -> DetectionConfig:
        wanted = super()._limits(score, max_detections)
        own = self.about.config.detection
        if wanted.score_threshold < own.score_threshold:
            raise ValueError(f"score: expected at least the file's {own.score_threshold:g}, got {score:g}")
        if wanted.max_detections > own.max_detections:
            raise ValueError(f"max_detections: expected at most the file's {own.max_detections}, got {max_detections}")
        return wanted

    def _submit(self, pictures: list[Decoded], detection: DetectionConfig) -> "_Done":
        start = time.perf_counter()
        arrays = [picture.array for picture, _ in pictures]
        spent = {"preprocess": 0.0, "network": 0.0}
        outputs: list[tuple[dict[str, NDArray[Any]], int]] = []  # for each picture, with its row
        for batch in self._batches(arrays):
            ready = time.perf_counter()
            spent["preprocess"] += ready - start
            found = self._run(batch)
            outputs += [(found, row) for row in range(len(found["boxes"]))]
            start = time.perf_counter()
            spent["network"] += start - ready
        shared = {stage: seconds * 1e3 / len(pictures) for stage, seconds in spent.items()}
        return _Done(pictures, outputs[: len(pictures)], self.config, detection, shared)

    def _run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of one call, if they are what the contract promises: a stranger's file may compute anything."""
        try:
            found = self._backend.run(inputs)
        except Exception as error:  # each program has kinds of its own
            raise RuntimeError(f"{self.path}: {self.provider} failed: {str(error).strip()}") from error
        batch, *rows = found["scores"].shape
        count, labels = found["num_detections"], found["labels"]
        shapes = {"num_detections": (batch,), "boxes": (batch, *rows, 4), "labels": (batch, *rows)}
        fits = batch == (1 if self.about.preprocess else len(inputs["image"]))
        fits = fits and len(rows) == 1 and all(found[name].shape == shape for name, shape in shapes.items())
        fits = fits and ("masks" not in found or found["masks"].shape[:2] == (batch, *rows))
        if fits and count.min() >= 0 and count.max() <= rows[0]:
            there = labels[np.arange(rows[0]) < count[:, None]]
            if ((there >= 0) & (there < self.config.num_classes)).all():
                return found
        raise ValueError(f"{self.path}: expected detections of the contract's shapes and the metadata's classes")

    def _batches(self, pictures: list[NDArray[np.uint8]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The inputs of each call that the pictures take: one, unless the file fixes how many go together."""
        if self.about.preprocess:
            for picture in pictures:
                yield {"picture": picture}
            return
        static = self.about.static
        together = len(pictures) if static is None else static[0]
        for first in range(0, len(pictures), together):
            part = pictures[first : first + together]
            part += [np.zeros((1, 1, 3), np.uint8)] * (together - len(part))
            image, image_sizes, original_sizes = make_batch(part, self.config.input, static and static[1:])
            yield {"image": image, "image_sizes": image_sizes, "original_sizes": original_sizes}


@dataclass(eq=False)
class _Done:
    """A batch that has been computed: the outputs of each picture, and which row of them is its own."""

    pictures: list[Decoded]
    outputs: list[tuple[dict[str, NDArray[Any]], int]]
    config: MaskRCNNConfig
    detection: DetectionConfig
    timings: dict[str, float]

    def results(self) -> list[Result]:
        return [self._result(*each) for each in zip(self.pictures, self.outputs, strict=True)]

    def _result(self, decoded: Decoded, output: tuple[dict[str, NDArray[Any]], int]) -> Result:
        picture, milliseconds = decoded
        found, row = output
        scores = found["scores"][row, : int(found["num_detections"][row])]
        n = min(int((scores > np.float32(self.detection.score_threshold)).sum()), self.detection.max_detections)
        labels = found["labels"][row, :n].copy()
        height, width = picture.size
        masks = found["masks"][row, :n] if "masks" in found else None
        probabilities, runs = masks, None
        if masks is not None and masks.dtype == np.bool_:
            probabilities, runs = None, [runs_of_mask(mask[:height, :width]) for mask in masks]
        return Result(
            boxes=found["boxes"][row, :n].copy(),
            scores=scores[:n].copy(),
            labels=labels,
            size=picture.size,
            names=[self.config.class_names[label] for label in labels],
            category_ids=np.array(self.config.category_ids, np.int64)[labels],
            mask_probabilities=None if probabilities is None else probabilities.copy(),
            mask_runs=runs,
            rule=self.config.paste,
            picture=picture.array,
            path=picture.path,
            timings={"decode": milliseconds, **self.timings},
        )
