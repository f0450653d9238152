"""A step of training on a GPU beside torchvision's with the same weights: losses, gradients, an update by SGD.

Both see the same pictures, objects and samples, as on a CPU (`bench_training`). Steps are timed as a training loop runs
them, kernel by kernel and not as a graph, each waiting for nothing but what it asks for itself. Ours is channels_last;
torchvision's is measured both as it comes and so. bfloat16 is held against float32; torchvision's anchors are
then rounded too, to multiples of 8 pixels at 1024, so that other anchors are matched.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .bench_training import Case as Batch
from .bench_training import make_steps, relative_disagreement
from .device import Bench, DeviceClock, precision, waits
from .harness import Row
from .usage import usage

__all__ = ["cases"]

Case = Callable[[Bench], list[Row]]
# See bench_training; of terms, relative. In bfloat16 other proposals survive, of which others are sampled: on an H200
# the box term of two pictures moved by 18 %.
TOLERANCES = {"float32": 1e-2, "tf32": 5e-2, "bfloat16": 0.25}
PEERS = 10.0  # torchvision's own in lower precision: a loss, and finite
BATCHES = (
    ("tf32", Batch("ResNet-50 FPN, 2 x 800 x 1344", "50", (800, 1344), 2)),
    ("bfloat16", Batch("ResNet-50 FPN, 2 x 800 x 1344", "50", (800, 1344), 2)),
    ("bfloat16", Batch("ResNet-50 FPN, 8 x 800 x 1344", "50", (800, 1344), 8)),
    ("float32", Batch("people, MobileNetV2 FPN, 8 x 320 x 512", "people", (320, 512), 8)),
)
_QUICK: dict[str, Any] = {"name": "people, MobileNetV2 FPN, 2 x 96 x 128", "size": (96, 128), "batch": 2}


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-50 at the size of COCO, and the bundled model."""
    for dtype, batch in BATCHES[3:] if quick else BATCHES:
        yield partial(_step, dtype=dtype, batch=replace(batch, **_QUICK) if quick else batch)


def _step(bench: Bench, dtype: str, batch: Batch) -> list[Row]:
    device = torch.device(bench.clock.device)
    if isinstance(bench.clock, DeviceClock):
        bench = replace(bench, clock=DeviceClock(bench.clock.bandwidth, graphs=False))
    with precision(tf32=dtype == "tf32", tuned=False):
        steps: dict[str, Any] = dict(make_steps(batch, device, torch.bfloat16 if dtype == "bfloat16" else None))
        expected = None
        if dtype == "bfloat16":
            with precision(tf32=False, tuned=False):
                exact = make_steps(batch, device, None)
                expected = (exact["torchvision"] or exact["trimask"])()  # type: ignore[misc]
                del exact
        differing = partial(relative_disagreement, tolerance=TOLERANCES[dtype])
        near = partial(relative_disagreement, tolerance=PEERS)
        rows = bench.compare("training", batch.name, steps, differing, near=near, expected=expected, dtype=dtype)
        for i, (row, step) in enumerate(zip(rows, steps.values(), strict=True)):
            if row.p50_ms is None:
                continue
            note = "waits for the device" if device.type == "cuda" and waits(step) else ""
            fields = usage(bench, step, batch.batch)
            rows[i] = row.noted(note, **fields)
    return rows
