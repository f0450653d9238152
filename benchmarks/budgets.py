"""``python -m trimask.benchmarks.budgets``: what a picture may cost, in counts that no noise moves.

Beside each budget stands what is counted now; the status is 1 where one is exceeded, and ``--update`` writes the counts
as new budgets, to be committed with the reason. Counted are operations by stage, kernels that a GPU would launch (on
torch's fake tensors: no GPU is needed), multiplications, and memory; the inputs and weights are always the same.

With the minor version of torch that the budgets were counted with, not one operation more passes. Another version may
take a composite operation apart in another way: `TOLERANCES` says how much passes there. On a CPU, budgets are of
processors that oneDNN knows.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..engine.inference.graph import optimize, run_lengths
from ..engine.inference.predictor import Predictor
from ..engine.model.checkpoints import load_model
from ..engine.model.files import write_whole
from ..engine.model.losses import LossConfig, Targets, losses
from ..engine.model.mask_rcnn import MaskRCNN, no_mark
from ..engine.model.presets import torchvision_v1
from ..engine.pictures.preprocess import make_batch
from ..kernels import pyramid_roi_align
from . import bench_training, cases
from .counting import Counts, counting
from .inputs import STRIDES

__all__ = ["FILE", "PICTURE", "SUBJECTS", "TOLERANCES", "Tolerance", "exceeded", "main", "read", "tolerance_for"]

FILE = Path(__file__).parent / "budgets.json"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.jpg"
_GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Tolerance:
    """How much more than its budget passes, as a share of it: of the operations of a stage, and of all else."""

    operations: float
    amounts: float


# With the version of torch of the budgets, and with others. Amounts may move by an alignment or a proposal.
TOLERANCES = (Tolerance(0.0, 0.002), Tolerance(0.05, 0.05))


def _people_cpu() -> Counts:
    """The bundled model on the demo's picture, from array to mask logits.

    It finds more than are wanted: rounding does not decide how many masks there are.
    """
    predictor = Predictor(load_model("people"), device="cpu", max_detections=20)
    picture = np.asarray(Image.open(PICTURE).convert("RGB"))
    predictor.predict(picture)  # weights are laid out at the first call
    with torch.no_grad(), counting() as counts:
        batch = make_batch([picture], predictor.config.input, predictor.device)
        counts.mark("preprocess")
        found = predictor.graph(*batch, detection=predictor.config.detection, mark=counts.mark)
    if (number := int(found.count)) != 20:
        raise ValueError(f"{PICTURE.name}: expected the bundled model to find 20 people or more, got {number}")
    return counts


def _on_fake_gpu(model: MaskRCNN, size: tuple[int, int]) -> Counts:
    """One picture in float16, from batch to run lengths: an operation is a launch."""
    with mock.patch.object(MaskRCNN, "to", lambda self, device: self):
        graph = optimize(model, _GPU, torch.float16)
    with FakeTensorMode(), torch.no_grad():
        _replace_tensors(graph)
        sizes = torch.empty(1, 2, dtype=torch.int64, device=_GPU)
        image = torch.empty(1, 3, *size, device=_GPU).to(memory_format=torch.channels_last)
        with counting() as counts:
            found = graph(image, sizes, sizes, mark=counts.mark)
            run_lengths(found, sizes, graph.config.paste, 4096)
            counts.mark("run lengths")
    return counts


def _replace_tensors(module: nn.Module) -> None:
    for part in module.modules():
        for name, x in [*part._parameters.items(), *part._buffers.items()]:
            if x is not None:
                part._parameters.pop(name, None)
                part._buffers[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_GPU)


def _resnet50_gpu() -> Counts:
    with torch.device("meta"):
        model = MaskRCNN(torchvision_v1(tuple(map(str, range(90))), tuple(range(90)))).eval()
    return _on_fake_gpu(model, (800, 1344))


def _people_gpu() -> Counts:
    return _on_fake_gpu(load_model("people"), (320, 512))


def _training() -> Counts:
    """A step of the bundled model on two small pictures: losses, gradients, update."""
    step = bench_training.trimask_step(bench_training.Case("", "people", (128, 160), 2))
    step()  # the optimizer makes its state
    with counting() as counts:
        step()
    return counts


def _resnet50_training() -> Counts:
    """The losses of eight pictures and their gradients, in the fixed shapes of a GPU: an operation is a launch or more.

    On torch's device without memory, and without the launches of an operation's own parts.
    """
    batch, objects, size = 8, 8, (800, 1344)
    with torch.device("meta"):
        model = MaskRCNN(torchvision_v1(tuple(map(str, range(90))), tuple(range(90)))).train()
        image = torch.empty(batch, 3, *size, memory_format=torch.channels_last)
        sizes = torch.empty(batch, 2, dtype=torch.int64)
        seeds, count = torch.empty(2, batch, dtype=torch.int64)
        labels = torch.empty(batch, objects, dtype=torch.int64)
        masks = torch.empty(batch, objects, *size, dtype=torch.uint8)
        targets = Targets(torch.empty(batch, objects, 4), labels, labels.bool(), count, masks)
    bench_training.learning(model)

    def step(mark: Callable[[str], None] = no_mark) -> None:
        model.zero_grad()
        terms = losses(model, image, sizes, targets, LossConfig.TORCHVISION, seeds=seeds)
        mark("losses")
        torch.stack(list(terms.values())).sum().backward()
        mark("gradients")

    step()  # what is constant is computed once
    with counting() as counts:
        step(counts.mark)
    return counts


def _roi_align() -> Counts:
    """The op's body on a CPU, on recorded proposals. The bodies in numpy are not torch's to count."""
    seen = cases.recording(cases.RECORDED[0])
    planar = cases.RoIAlignCase(channels=8, size=(320, 448)).features()
    features = [x.to(memory_format=torch.channels_last) for x in planar]
    with torch.no_grad(), counting(within_ops=True) as counts:
        pyramid_roi_align(features, seen.proposals[None, :100], STRIDES, 7, sampling_ratio=2, aligned=False)
    return counts


SUBJECTS: dict[str, Callable[[], Counts]] = {
    "people, CPU": _people_cpu,
    "people, launches of a GPU": _people_gpu,
    "ResNet-50 FPN, launches of a GPU": _resnet50_gpu,
    "people, a step of training": _training,
    "ResNet-50 FPN, a step of training on a GPU": _resnet50_training,
    "RoIAlign of 100 proposals, CPU": _roi_align,
}


def read(path: Path) -> tuple[str, dict[str, Counts]]:
    """The version of torch that the budgets were counted with, and they."""
    content = json.loads(path.read_text())
    budgets = {}
    for name, fields in content["budgets"].items():
        stages = {stage: Counter(operations) for stage, operations in fields.pop("operations").items()}
        budgets[name] = Counts(stages, **fields)
    return content["torch"], budgets


def exceeded(budget: Counts, found: Counts, tolerance: Tolerance) -> list[str]:
    """What costs more than it may, in words.

    A stage that was not there is over its budget of nothing.
    """
    over = []
    for stage, operations in found.operations.items():
        allowed = budget.operations.get(stage, Counter())
        if operations.total() > allowed.total() * (1 + tolerance.operations):
            more = ", ".join(f"{name} {n:+d}" for name, n in (operations - allowed).items())
            over.append(f"{stage}: {operations.total()} operations instead of {allowed.total()} ({more})")
    for name in ("flops", "bytes", "peak_bytes"):
        mine, limit = getattr(found, name), getattr(budget, name)
        if mine > limit * (1 + tolerance.amounts):
            over.append(f"{name}: {mine} instead of {limit} ({mine / max(limit, 1) - 1:+.1%})")
    return over


def tolerance_for(torch_version: str) -> Tolerance:
    """Of budgets that were counted with this version, here."""
    return TOLERANCES[_minor(torch_version) != _minor(torch.__version__)]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def main(arguments: list[str] | None = None) -> int:
    """Print the counts beside their budgets."""
    parser = argparse.ArgumentParser("trimask.benchmarks.budgets", description="What a picture costs, in counts.")
    parser.add_argument("--update", action="store_true", help=f"write the counts to {FILE.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    version, budgets = read(FILE) if FILE.is_file() else (torch.__version__, {})
    found = {name: count() for name, count in SUBJECTS.items()}
    over = []
    for name, counts in found.items():
        budget = budgets.get(name, Counts())
        print(name)
        for stage, operations in counts.operations.items():
            allowed = budget.operations.get(stage, Counter()).total()
            print(f"  {stage:24}{operations.total():>10} operations, budget {allowed}")
        for field, unit, scale in (("flops", "GFLOP", 1e9), ("bytes", "MB", 1e6), ("peak_bytes", "MB at once", 1e6)):
            print(
                f"  {'':24}{getattr(counts, field) / scale:10.3f} {unit}, budget {getattr(budget, field) / scale:.3f}"
            )
        over += [f"{name}: {line}" for line in exceeded(budget, counts, tolerance_for(version))]
    if options.update:
        content = {name: vars(counts) for name, counts in found.items()}
        text = json.dumps({"torch": torch.__version__.partition("+")[0], "budgets": content}, indent=1)
        write_whole(FILE, lambda file: file.write(f"{text}\n".encode()))
        return 0
    print("\n".join(f"OVER {line}" for line in over))
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
