"""Detections of MMDetection's own code, which `test_parity_mmdetection.py` compares with where it is not installed.

    python tests/record_mmdetection.py    # writes tests/recorded_mmdetection.json.gz; needs mmdet, mmcv's compiled ops

Weights are drawn from the names of the tensors by numpy's legacy generator, whose numbers no version changes.
"""

import gzip
import json
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["OPTIONS", "PICTURES", "RECORDED", "STYLES", "checkpoint", "photograph"]

RECORDED = Path(__file__).with_name("recorded_mmdetection.json.gz")
STYLES = ("pytorch", "caffe")
PICTURES = ("astronaut", "coffee", "chelsea")  # scikit-image's; one is shrunk, the others grow
OPTIONS = {"min_size": 480, "max_size": 800, "max_detections": 50}


def photograph(name: str) -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(getattr(data, name)())


def checkpoint(style: str, folder: Path) -> Path:
    """A file with the tensors of ResNet-50 FPN as MMDetection names them, which find a hundred things anywhere."""
    from trimask.engine.model import presets
    from trimask.engine.model.checkpoints import family
    from trimask.engine.model.checkpoints.coco import COCO_CATEGORY_IDS, COCO_NAMES
    from trimask.engine.model.checkpoints.mmdet import MMDET
    from trimask.engine.model.mask_rcnn import MaskRCNN

    state = family.export(MMDET, MaskRCNN(presets.mmdet(COCO_NAMES, COCO_CATEGORY_IDS)))
    drawn = {name: _values(name, tensor) for name, tensor in state.items()}
    if style == "caffe":  # no deviation divides its input
        drawn["backbone.conv1.weight"] /= 58
    path = folder / f"mmdetection_{style}.pth"
    torch.save({"state_dict": drawn, "meta": {"dataset_meta": {"classes": list(COCO_NAMES)}}}, path)
    return path


def _values(name: str, like: torch.Tensor) -> torch.Tensor:
    if not like.is_floating_point():
        return like
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = generator.uniform(0.6, 1.4, like.shape)
    elif name.endswith(("running_mean", "bias")):
        values = generator.normal(0, 0.05, like.shape)
    elif like.dim() == 1:  # the gain of a norm; small at the end of a residual branch, or fifty blocks explode
        values = generator.uniform(0.8, 1.2, like.shape) * (0.3 if ".bn3." in name else 1.0)
    else:
        gain = 0.3 if "fc_reg" in name else 1.5 if "fc_cls" in name else 0.06 if "lateral_convs" in name else 1.0
        values = generator.normal(0, gain * (2 / like[0].numel()) ** 0.5, like.shape)
    return torch.from_numpy(values).float()


def _record() -> dict[str, Any]:
    from tempfile import TemporaryDirectory

    from pycocotools import mask

    from trimask.benchmarks.peers import mmdetection
    from trimask.engine.model.checkpoints import load_model

    def encoded(masks: np.ndarray) -> list[str]:
        runs = mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        return [one["counts"].decode() for one in runs]

    found = {}
    with TemporaryDirectory() as folder:
        for style in STYLES:
            twin = mmdetection.twin(load_model(checkpoint(style, Path(folder)), style=style, **OPTIONS))
            for name in PICTURES:
                (one,) = mmdetection.detecting(twin, [photograph(name)])()
                found[f"{style} {name}"] = {
                    "boxes": one.boxes.round(3).tolist(),
                    "scores": one.scores.round(5).tolist(),
                    "labels": one.labels.tolist(),
                    "masks": encoded(one.masks),
                }
    return {"versions": {name: version(name) for name in ("mmdet", "torch")}, "detections": found}


if __name__ == "__main__":
    with gzip.GzipFile(RECORDED, "wb", mtime=0) as file:
        file.write(json.dumps(_record(), default=float).encode())
