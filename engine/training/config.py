"""What a training run does, as frozen values; they are stored beside the weights. Needs no torch."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

__all__ = ["AUGMENT", "AugmentConfig", "TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Iterations are updates of the weights; the batch is that of all processes together.

    Attributes:
        iterations: updates of the weights.
        batch: pictures per update, over all processes.
        accumulate: parts that each batch is computed in, one after the other, to save memory.
        workers: processes that read and augment pictures, per training process; 0: none.
        seed: of every random choice.
        optimizer: "sgd" or "adamw", which learns more in few iterations.
        learning_rate: for a batch of ``reference_batch`` pictures; in proportion to the batch it is scaled for SGD, in
            proportion to its square root for AdamW. None: 0.02 of SGD, 0.0005 of AdamW.
        reference_batch: see ``learning_rate``.
        momentum: of SGD; AdamW's first beta.
        weight_decay: of convolutions and matrices; norms and biases have none. None: 0.0001 of SGD, 0.05 of AdamW.
        warmup: iterations in which the learning rate rises from a thousandth. None: 100, or a tenth of all where that
            is less.
        schedule: after it: "step" multiplies by a tenth at each of ``steps``; "cosine" falls to 0; "constant".
        steps: of the schedule, in shares of the iterations.
        clip_norm: largest norm of the gradient; 0: no clipping.
        ema: decay of the moving average of the weights, which is then what is evaluated and kept; 0: none.
        frozen_stages: parts of the trunk that stay as they are: 1 the stem, 2 the first stage too, and so on.
        norms: "frozen" keeps the batch norms that came with the weights as they are; "live" trains all of them;
            "synchronised" shares their statistics among the processes.
        precision: of the trunk and heads: "float32", "bfloat16" or "float16"; losses and weights are float32.
        channels_last: memory format of the pictures and features.
        compile: compile the trunk and the pyramid; costs a minute, and again for each picture size.
        deterministic: bitwise the same run again, on a GPU too, where it costs speed.
        aspect_grouping: batches hold pictures that are all wide or all high.
        polygons: masks to learn are drawn from polygons for each region, as Detectron2 does by default, rather than cut
            from masks of pixels by RoIAlign.
        repeat_threshold: classes on fewer than this share of the pictures are shown more often; 0: none.
        log_every: iterations between lines of the metrics.
        evaluate_every, save_every: iterations between evaluations and between saved states; 0: at the end.
        samples: pictures of the validation set that are drawn at each evaluation.
        patience: stop after this many evaluations without a better one, with ``evaluate_every``; 0: never.
        best: the figure that decides which weights are the best; boxes' instead of masks' where there are none.
    """

    iterations: int = 1000
    batch: int = 2
    accumulate: int = 1
    workers: int = 2
    seed: int = 0
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float | None = None
    reference_batch: int = 16
    momentum: float = 0.9
    weight_decay: float | None = None
    warmup: int | None = None
    schedule: Literal["step", "cosine", "constant"] = "step"
    steps: tuple[float, ...] = (0.7, 0.9)
    clip_norm: float = 0.0
    ema: float = 0.0
    frozen_stages: int = 0
    norms: Literal["frozen", "live", "synchronised"] = "frozen"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    aspect_grouping: bool = True
    polygons: bool = False
    repeat_threshold: float = 0.0
    log_every: int = 20
    evaluate_every: int = 0
    save_every: int = 500
    samples: int = 4
    patience: int = 0
    best: str = "segm_AP"

    def __post_init__(self) -> None:
        def check(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("iterations", "batch", "accumulate", "reference_batch", "log_every"):
            check(getattr(self, name) >= 1, name, "at least 1")
        counts = ("workers", "warmup", "frozen_stages", "evaluate_every", "save_every", "samples", "patience")
        for name in ("learning_rate", "weight_decay", "clip_norm", "repeat_threshold", *counts):
            check(getattr(self, name) is None or getattr(self, name) >= 0, name, "at least 0")
        for name in ("momentum", "ema"):
            check(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        check(0 <= self.seed < 2**31, "seed", "an integer in [0, 2**31)")
        figures = r"(bbox|segm)_(AP(50|75|s|m|l)?|AR(1|10|100|s|m|l))"
        check(re.fullmatch(figures, self.best) is not None, "best", "an evaluation's figure such as segm_AP")
        if self.optimizer == "adamw" and self.learning_rate is not None:
            check(self.learning_rate <= 5e-3, "learning_rate", "at most 0.005 for AdamW (0.02 and its like are SGD's)")
        check(self.batch % self.accumulate == 0, "batch", f"a multiple of accumulate, {self.accumulate}")
        every = "0 unless evaluate_every is set, as the end alone is evaluated"
        check(not self.patience or self.evaluate_every > 0, "patience", every)
        check(all(0 < step < 1 for step in self.steps), "steps", "shares of the iterations, between 0 and 1")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check(getattr(self, name) in get_args(hint), name, f"one of {get_args(hint)}")

    def peak_rate(self) -> float:
        """The learning rate after the warm-up."""
        larger = self.batch / self.reference_batch
        if self.optimizer == "sgd":
            return (0.02 if self.learning_rate is None else self.learning_rate) * larger
        return (5e-4 if self.learning_rate is None else self.learning_rate) * larger**0.5

    def decay(self) -> float:
        """The weight decay."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 1e-4 if self.optimizer == "sgd" else 0.05

    def warmup_iterations(self) -> int:
        """For how many iterations the learning rate rises."""
        return min(100, self.iterations // 10) if self.warmup is None else self.warmup

    def without_housekeeping(self) -> dict[str, object]:
        """The values that decide what is learned: a run goes on only with the same ones."""
        housekeeping = {"workers", "log_every", "evaluate_every", "save_every", "samples", "patience", "best"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in housekeeping}


@dataclass(frozen=True)
class AugmentConfig:
    """What is changed at random; by default nothing.

    Attributes:
        min_sizes: short sides to choose from, instead of the one in the model's config: (640, 672, ..., 800).
        max_size: limit of the long side, instead of the model's.
        jitter: large-scale jitter: the picture is scaled to ``jitter_size`` times a factor from this range, (0.1, 2.0)
            in the papers, then cropped at random and padded on the right and below to exactly that size.
        jitter_size: height and width.
        crop: probability of a random crop.
        crop_range: its height and its width, each as a share of the picture's.
        flip: probability of mirroring left and right.
        color: probability that brightness, contrast, saturation and hue change.
        brightness, contrast, saturation: each is scaled by a factor from 1 - x to 1 + x.
        hue: it turns by up to this share of the circle, either way.
        grey: probability of turning it to greyscale.
        copy_paste: probability that objects of another picture are pasted, each with an even chance.
    """

    min_sizes: tuple[int, ...] = ()
    max_size: int | None = None
    jitter: tuple[float, float] | None = None
    jitter_size: tuple[int, int] = (1024, 1024)
    crop: float = 0.0
    crop_range: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.0
    color: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.05
    grey: float = 0.0
    copy_paste: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop", "flip", "color", "brightness", "contrast", "saturation", "hue", "grey", "copy_paste"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, got {getattr(self, name)}")
        for name, bounds, most in (("jitter", self.jitter, 100), ("crop_range", self.crop_range, 1)):
            if bounds is not None and not 0 < bounds[0] <= bounds[1] <= most:
                raise ValueError(f"{name}: expected two rising numbers above 0 and up to {most}, got {bounds}")
        sizes = {"min_sizes": self.min_sizes, "max_size": (self.max_size or 1,), "jitter_size": self.jitter_size}
        for name, values in sizes.items():
            if not all(value >= 1 for value in values):
                raise ValueError(f"{name}: expected at least 1, got {values}")
        if self.jitter and (self.min_sizes or self.max_size):
            raise ValueError("jitter: expected no min_sizes or max_size with it, which it replaces")


AUGMENT = AugmentConfig(flip=0.5)  # what training begins with
