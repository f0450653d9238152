"""Every preset through its checkpoint and its exported file: do both find the same, in any batch and size?

    python recipes/verify_exports.py --out runs/exports                 # or --only "torchvision v2" people

Weights are random, but for those of the bundled model, drawn so that they find a hundred objects in every picture. They
are written in the format of their family and loaded from there. Each is exported once; then ONNX Runtime and torch see
five photographs of different sizes, noise and a blank one by one and in batches of three and two, as
:func:`trimask.export.verify` has it, and a batch in which nothing can be found. The status is 1 where anything differs.
A quarter of an hour on one core; the table goes to stdout, in Markdown.
"""

import argparse
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from trimask.benchmarks.networks import drawn, without_masks
from trimask.benchmarks.samples import photographs
from trimask.engine.model import presets
from trimask.engine.model.checkpoints import family, load_model
from trimask.engine.model.checkpoints.detectron2 import DETECTRON2
from trimask.engine.model.checkpoints.mmdet import MMDET
from trimask.engine.model.checkpoints.torchvision import TORCHVISION
from trimask.engine.model.config import MaskRCNNConfig
from trimask.engine.model.mask_rcnn import MaskRCNN
from trimask.export import to_onnx, verify
from trimask.export.verification import Tolerance

SIZES = ((480, 640), (640, 480), (400, 400), (300, 520), (500, 260))  # height, width
CLASSES = tuple(f"class {i}" for i in range(1, 81)), tuple(range(1, 81))
SIDE = 480  # short side inside of the network: of the published 800, a third of the time
TOLERANCE = Tolerance(share=0.99)  # random weights leave overlaps that rounding moves across a threshold

Saved = tuple[Path | str, dict[str, int]]  # a checkpoint, and what its keys cannot say


def scaled(config: MaskRCNNConfig) -> MaskRCNN:
    """Random weights that find things, whatever deviation the config divides pixels by."""
    model = drawn(config)
    stem: Any = model.backbone.stem
    stem.conv.weight.data *= np.mean(config.input.std) / 58  # what it sees is of another scale without a deviation
    return model


def torchvision(config: MaskRCNNConfig, folder: Path, *, masks: bool = True) -> Saved:
    model = scaled(config) if masks else without_masks(scaled(config))
    torch.save(family.export(TORCHVISION, model), folder / "weights.pth")
    return folder / "weights.pth", {"min_size": SIDE}


def detectron2(folder: Path) -> Saved:
    state = family.export(DETECTRON2, scaled(presets.detectron2(*CLASSES)), bgr=True)
    arrays = {name: tensor.detach().numpy() for name, tensor in state.items()}
    (folder / "weights.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "trimask"}))
    return folder / "weights.pkl", {"min_size": SIDE}


def mmdetection(folder: Path) -> Saved:
    state = family.export(MMDET, scaled(presets.mmdet(*CLASSES)))
    torch.save({"state_dict": state, "meta": {"CLASSES": CLASSES[0]}}, folder / "weights.pth")
    return folder / "weights.pth", {"min_size": SIDE}


PRESETS: dict[str, Callable[[Path], Saved]] = {
    "torchvision v1": lambda folder: torchvision(presets.torchvision_v1(*CLASSES), folder),
    "torchvision v2": lambda folder: torchvision(presets.torchvision_v2(*CLASSES), folder),
    "Detectron2": detectron2,
    "MMDetection": mmdetection,
    "boxes only": lambda folder: torchvision(presets.torchvision_v1(*CLASSES), folder, masks=False),
    "people": lambda folder: ("people", {}),
}


def nothing_found(path: Path) -> bool:
    """Of a batch whose pixels are no numbers, nothing may come out."""
    alone = onnxruntime.SessionOptions()
    alone.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, alone, providers=["CPUExecutionProvider"])
    sizes = np.array([[96, 160], [64, 100]])
    batch = {"image": np.full((2, 3, 96, 160), np.nan, np.float32), "image_sizes": sizes, "original_sizes": 3 * sizes}
    count, boxes, scores, labels, *masks = session.run(None, batch)
    return not any(x.any() for x in (count, boxes, scores, labels + 1, *masks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/exports"))
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=list(PRESETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [photographs(size, 2)[i % 2] for i, size in enumerate(SIZES)]
    columns = "preset", "nodes", "MB", "detections matched", "not", "boxes, px", "scores", "masks, px", "empty batch"
    print("|", " | ".join(columns), "|\n|", " | ".join(["---"] * len(columns)), "|", flush=True)
    good = True
    for name in options.only:
        folder = options.out / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        weights, more = PRESETS[name](folder)
        exported = to_onnx(weights, folder / "model.onnx", **more)
        report = verify(exported.path, load_model(weights, **more), pictures, tolerance=TOLERANCE, threads=1)
        found, empty = report.total, nothing_found(exported.path)
        cells = [name, exported.nodes, f"{exported.megabytes:.0f}", found.matched, found.alone]
        cells += [f"{found.box:.0e}", f"{found.score:.0e}", found.pixels, "nothing found" if empty else "NOT EMPTY"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        for check in report.checks:
            print(f"{name}: {check.what}: {check.outcome}", "" if check.good else "NOT EQUAL", file=sys.stderr)
        good = good and report.good and empty
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
