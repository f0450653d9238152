"""Detections of the peers' own code, with which ours are compared where it is not installed.

    python tests/record_peers.py mmdetection    # writes tests/recorded_mmdetection.json.gz; needs mmdet, mmcv's ops
    python tests/record_peers.py detectron2

Weights are drawn from the names of the tensors by numpy's legacy generator, whose numbers no version changes.
"""

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matching import Found, differences, of_result
from trimask import Predictor
from trimask.engine.model import presets
from trimask.engine.model.checkpoints import family, load_model
from trimask.engine.model.checkpoints.coco import COCO_CATEGORY_IDS, COCO_NAMES
from trimask.engine.model.checkpoints.detectron2 import DETECTRON2
from trimask.engine.model.checkpoints.mmdet import MMDET
from trimask.engine.model.config import MaskRCNNConfig
from trimask.engine.model.mask_rcnn import MaskRCNN

__all__ = ["KINDS", "PICTURES", "assert_recorded", "photograph", "with_group_norms"]

PICTURES = ("astronaut", "chelsea")  # scikit-image's; one is shrunk, the other grows
OPTIONS = {"min_size": 480, "max_size": 800, "max_detections": 50}
PROPOSALS = 200  # of models without a pyramid, whose last stage takes long for a thousand


def with_group_norms(config: MaskRCNNConfig) -> MaskRCNNConfig:
    """As the peers have them: everywhere but in the RPN, and with four convolutions in the box head."""
    assert config.fpn is not None
    assert config.mask_head is not None
    norms: dict[str, Any] = {"norm": True, "norm_groups": 32}
    return replace(
        config,
        backbone=replace(config.backbone, stride_in_1x1=False, norm_groups=32),  # type: ignore[call-arg]
        fpn=replace(config.fpn, **norms),
        box_head=replace(config.box_head, convs=4, fcs=(1024,), **norms),
        mask_head=replace(config.mask_head, **norms),
    )


def _preset(make: Callable[..., MaskRCNNConfig]) -> MaskRCNNConfig:
    return make(COCO_NAMES, COCO_CATEGORY_IDS)


KINDS = {
    "mmdetection": {
        "pytorch": _preset(presets.mmdet),
        "caffe": _preset(presets.mmdet),
        "C4": _preset(presets.mmdet_c4),
        "group norms": with_group_norms(_preset(presets.mmdet)),
    },
    "detectron2": {
        "C4": _preset(presets.detectron2_c4),
        "DC5": _preset(presets.detectron2_dc5),
        "group norms": with_group_norms(_preset(presets.detectron2)),
    },
}


def recorded(peer: str) -> Path:
    return Path(__file__).with_name(f"recorded_{peer}.json.gz")


def assert_recorded(peer: str, kind: str, folder: Path) -> None:
    """We find in every picture what the peer has found."""
    pytest.importorskip("skimage")
    pytest.importorskip("pycocotools")
    predictor, most = Predictor(loaded(peer, kind, folder), device="cpu"), OPTIONS["max_detections"]
    for name in PICTURES:
        expected = detections(peer, kind, name)
        assert len(expected.scores) == most
        assert expected.masks.any()
        assert differences(of_result(predictor.predict(photograph(name))), expected, capacity=most) == []


def detections(peer: str, kind: str, name: str) -> Found:
    """The peer's own of a picture."""
    from pycocotools import mask

    content = json.loads(gzip.decompress(recorded(peer).read_bytes()))["detections"]
    found, size = content[f"{kind} {name}"], photograph(name).shape[:2]
    masks = [mask.decode({"size": size, "counts": runs.encode()}) for runs in found["masks"]]
    return Found(np.array(found["boxes"]), np.array(found["scores"]), np.array(found["labels"]), np.array(masks, bool))


def photograph(name: str) -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(getattr(data, name)())


def loaded(peer: str, kind: str, folder: Path) -> MaskRCNN:
    """What we make of a file with the tensors that the peer names, which find a hundred things anywhere."""
    config = KINDS[peer][kind]
    state = family.export(MMDET if peer == "mmdetection" else DETECTRON2, MaskRCNN(config))
    drawn = {name: _values(name, tensor) for name, tensor in state.items()}
    if peer == "detectron2" or kind != "pytorch":  # no deviation divides its input
        drawn[next(name for name in drawn if drawn[name].shape == (64, 3, 7, 7))] /= 58
    path = folder / "model.pth"
    content = {"state_dict": drawn, "meta": {"dataset_meta": {"classes": list(COCO_NAMES)}}}
    torch.save(content if peer == "mmdetection" else {"model": drawn}, path)
    style = kind if kind in ("pytorch", "caffe") else None
    model = load_model(path, style=style, **OPTIONS)
    if model.config.fpn is not None:
        return model
    fewer = MaskRCNN(replace(model.config, rpn=replace(model.config.rpn, post_nms=PROPOSALS)))
    fewer.load_state_dict(model.state_dict())
    return fewer.eval()


def _values(name: str, like: torch.Tensor) -> torch.Tensor:
    if not like.is_floating_point():
        return like
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = generator.uniform(0.6, 1.4, like.shape)
    elif name.endswith(("running_mean", "bias")):
        values = generator.normal(0, 0.05, like.shape)
    elif like.dim() == 1:  # the gain of a norm; small at the end of a residual branch, or fifty blocks explode
        last = re.search(r"\.(bn3|gn3|conv3\.norm)\.", name)
        values = generator.uniform(0.8, 1.2, like.shape) * (0.3 if last else 1.0)
    else:
        values = generator.normal(0, _gain(name) * (2 / like[0].numel()) ** 0.5, like.shape)
    return torch.from_numpy(values).float()


def _gain(name: str) -> float:
    if re.search(r"(fc|rpn)_reg|bbox_pred|anchor_deltas", name):
        return 0.3
    if re.search(r"fc_cls|cls_score", name):
        return 1.5
    return 0.06 if re.search(r"lateral", name) else 1.0


def _record(peer: str) -> dict[str, Any]:
    from tempfile import TemporaryDirectory

    from pycocotools import mask

    from trimask.benchmarks.peers import detectron2, mmdetection

    theirs: Any = {"mmdetection": mmdetection, "detectron2": detectron2}[peer]

    def encoded(masks: np.ndarray) -> list[str]:
        runs = mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        return [one["counts"].decode() for one in runs]

    found = {}
    for kind in KINDS[peer]:
        with TemporaryDirectory() as folder:
            twin = theirs.twin(loaded(peer, kind, Path(folder)))
        for name in PICTURES:
            (one,) = theirs.detecting(twin, [photograph(name)])()
            found[f"{kind} {name}"] = {
                "boxes": one.boxes.round(3).tolist(),
                "scores": one.scores.round(5).tolist(),
                "labels": one.labels.tolist(),
                "masks": encoded(one.masks),
            }
    versions = {"torch": version("torch")}
    try:
        versions |= {"mmdet": version("mmdet")} if peer == "mmdetection" else {"detectron2": version("detectron2")}
    except PackageNotFoundError:
        versions[peer] = "a checkout"
    return {"versions": versions, "detections": found}


if __name__ == "__main__":
    (peer,) = sys.argv[1:]
    with gzip.GzipFile(recorded(peer), "wb", mtime=0) as file:
        file.write(json.dumps(_record(peer), default=float).encode())
