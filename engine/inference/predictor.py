"""The public face: from pictures of any kind to results."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from ...kernels.dispatch import use_triton
from ..model.checkpoints import load_model
from ..model.config import DetectionConfig, ResizeConfig
from ..model.mask_rcnn import MaskRCNN
from .capture import CudaRecorder, GraphRunner, Then, run_eagerly
from .execution import RUN_CAPACITY, Pending, infer, infer_boxes, submit, then_masks
from .graph import optimize
from .pipeline import Decoded
from .predicting import Predicting, limits, with_resize

__all__ = ["Predictor", "load"]


class Predictor(Predicting):
    """A model ready to predict.

    Args:
        model: in evaluation or training mode; it is copied and left as it is.
        device: where to run; by default the GPU if there is one.
        dtype: precision of weights and features: float32, float16 or bfloat16, as torch's or by name. Boxes
            stay in float32.
        score: lowest score of a detection; by default the model's own, 0.05 for the published ones.
        max_detections: per picture; by default the model's own, 100 for the published ones.
        resize: short side in pixels (the long side may grow in proportion), or a whole :class:`ResizeConfig`; by
            default the model's own.
        size_multiple: pictures are padded to a multiple of this, itself one of the model's own, which is 32 for the
            published ones. A coarser one makes fewer sizes of many, for the sake of CUDA graphs. Padding changes
            detections slightly, and what it adds is computed too.
        capture: whether to run as CUDA graphs, one for each padded size, number of pictures and limits: without waiting
            for the host between two kernels. By default on a GPU with Triton's kernels, which such a graph takes.
        capture_cache: how many graphs to keep; the one not used for longest makes room. What there is no room for
            still runs, only slower.
        trim_masks: on a GPU, make masks for the next power of two of what has been found, rather than for
            ``max_detections``. That takes waiting for the device once in the middle of a batch, which stands idle until
            the host has started the rest, and graphs for both parts. On a CPU it is so anyway, and costs nothing.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: MaskRCNN,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        score: float | None = None,
        max_detections: int | None = None,
        resize: int | ResizeConfig | None = None,
        size_multiple: int | None = None,
        capture: bool | None = None,
        capture_cache: int = 8,
        trim_masks: bool = False,
    ) -> None:
        if capture_cache < 1:
            raise ValueError(f"capture_cache: expected at least 1, got {capture_cache}")
        self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = _dtype(dtype)
        self.config = model.config
        if resize is not None:
            self.config = with_resize(self.config, resize)
        if size_multiple is not None:
            own = self.config.input.size_divisible
            if size_multiple < 1 or size_multiple % own:
                raise ValueError(f"size_multiple: expected a multiple of the model's {own}, got {size_multiple}")
            self.config = replace(self.config, input=replace(self.config.input, size_divisible=size_multiple))
        self.config = replace(self.config, detection=limits(self.config, score, max_detections))
        # Where the device makes run lengths, it does so without waiting for the host.
        on_device = self.device.type == "cuda" and use_triton(self.device)
        if capture and not on_device:
            raise ValueError(f"capture: expected a CUDA device with Triton's kernels, got {str(self.device)!r}")
        self.graph = optimize(model, self.device, self.dtype)
        self._run_capacity = RUN_CAPACITY if on_device else None
        self._streams: list[torch.cuda.Stream] = []
        self._trim_masks = trim_masks and self.device.type != "cpu"  # where every stage is cut to what there is
        self._runner: GraphRunner | None = None
        if on_device and capture is not False:
            function, then = self._inference()
            self._runner = GraphRunner(function, CudaRecorder(self.device), capture_cache, then=then)

    def __repr__(self) -> str:
        kind = type(self.config.backbone).__name__.removesuffix("Config")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Predictor({kind}, {self.config.num_classes} classes, {self.device}, {dtype})"

    def _submit(self, pictures: list[Decoded], detection: DetectionConfig) -> Pending:
        """Start one batch of (picture, milliseconds of its decoding)."""
        # An empty runner has a length of 0, as any cache.
        run = partial(run_eagerly, *self._inference()) if self._runner is None else self._runner
        return submit(run, pictures, detection, self.config, self.device)

    def _inference(self) -> tuple[Callable[..., Any], Then | None]:
        """The function that runs, and its second part if there are two. Neither knows this predictor."""
        masks = (self.graph, self.config.paste, self._run_capacity)
        if self._trim_masks:
            return partial(infer_boxes, self.graph), partial(then_masks, *masks)
        return partial(infer, *masks), None

    def _lanes(self) -> Callable[[], AbstractContextManager[Any]]:
        """Where to submit batches, one after the other: on a GPU two streams in turn, so that copies to and from the
        device overlap with computing."""
        if self.device.type != "cuda":
            return nullcontext
        if not self._streams:  # always the same: memory that one has used is cached for it alone
            self._streams = [torch.cuda.Stream(self.device) for _ in range(2)]
        for lane in self._streams:
            lane.wait_stream(torch.cuda.current_stream(self.device))
        turns = cycle(self._streams)
        return lambda: torch.cuda.stream(next(turns))


def load(
    weights: str | Path = "people",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    score: float | None = None,
    max_detections: int | None = None,
    resize: int | ResizeConfig | None = None,
    size_multiple: int | None = None,
    capture: bool | None = None,
    capture_cache: int = 8,
    trim_masks: bool = False,
    **options: Any,
) -> Predictor:
    """Load weights and make them ready to predict.

    Args:
        weights: a checkpoint of this project, torchvision, Detectron2 or MMDetection; the name of a published model
            (``trimask info`` lists them), downloaded once; or ``"people"``, the bundled model.
        device, dtype, score, max_detections, resize, size_multiple, capture, capture_cache, trim_masks: see
            :class:`Predictor`.
        **options: what the keys of a foreign checkpoint cannot say (``min_size``, ``max_size``, ``anchor_sizes``,
            ``aspect_ratios``, ``activation``, ``norm_eps``, ``classes``): see
            :func:`trimask.engine.model.checkpoints.load_model`.

    Raises:
        ValueError: a file that is no checkpoint, keys that do not fit, an unknown name or option.
    """
    model = load_model(weights, **options)
    return Predictor(
        model,
        device=device,
        dtype=dtype,
        score=score,
        max_detections=max_detections,
        resize=resize,
        size_multiple=size_multiple,
        capture=capture,
        capture_cache=capture_cache,
        trim_masks=trim_masks,
    )


def _dtype(wanted: str | torch.dtype) -> torch.dtype:
    """By name or as torch has it."""
    name = str(wanted).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {wanted}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(wanted: str | torch.device) -> torch.device:
    """The device, with its number, if something can be put there."""
    try:
        device = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that torch finds here, got {str(wanted)!r} ({error})") from None
    if device.type == "meta":
        raise ValueError("device: expected one that computes, got 'meta'")
    return device
