"""Checkpoints that their authors publish, by short names.

The names of the files carry the start of a hash: of SHA-256 in torchvision and MMDetection, of MD5 in Detectron2 (its
MODEL_ZOO.md says so). AP is what the authors report on COCO val2017, box and mask.
"""

import difflib
from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published", "find"]


@dataclass(frozen=True)
class Published:
    """A checkpoint on its authors' server.

    Attributes:
        name: ``family/config``, the authors' own name of the config.
        url: of the file.
        digest: ``algorithm:hex``, the start of the file's hash.
        box_ap, mask_ap: COCO AP in percent.
        licence: of the weights.
        unsupported: why it cannot be loaded, if it cannot.
    """

    name: str
    url: str
    digest: str
    box_ap: float
    mask_ap: float | None
    licence: str
    unsupported: str | None = None


def _torchvision(
    name: str, file: str, box_ap: float, mask_ap: float | None, unsupported: str | None = None
) -> Published:
    url = f"https://download.pytorch.org/models/{file}.pth"
    licence = "BSD-3-Clause; see torchvision's note on pretrained models"
    digest = f"sha256:{file.rpartition('-')[2]}"
    return Published(f"torchvision/{name}", url, digest, box_ap, mask_ap, licence, unsupported)


def _detectron2(path: str, box_ap: float, mask_ap: float, unsupported: str | None = None) -> Published:
    _, name, _, file = path.split("/")
    url = f"https://dl.fbaipublicfiles.com/detectron2/{path}.pkl"
    digest = f"md5:{file.rpartition('_')[2]}"
    return Published(f"detectron2/{name}", url, digest, box_ap, mask_ap, "CC BY-SA 3.0", unsupported)


def _mmdet(name: str, date: str, box_ap: float, mask_ap: float) -> Published:
    url = f"https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/{name}/{name}_{date}.pth"
    return Published(f"mmdet/{name}", url, f"sha256:{date.rpartition('-')[2]}", box_ap, mask_ap, "Apache-2.0")


COCO, LSJ = "COCO-InstanceSegmentation/mask_rcnn", "new_baselines/mask_rcnn"
PUBLISHED = {
    entry.name: entry
    for entry in (
        _torchvision("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_coco-bf2d0c1e", 37.9, 34.6),
        _torchvision("maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2_coco-73cbd019", 47.4, 41.8),
        _torchvision(
            "keypointrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn_coco-fc266e95", 54.6, None, "keypoints are not here"
        ),
        _detectron2(f"{COCO}_R_50_FPN_1x/137260431/model_final_a54504", 38.6, 35.2),
        _detectron2(f"{COCO}_R_50_FPN_3x/137849600/model_final_f10217", 41.0, 37.2),
        _detectron2(f"{COCO}_R_101_FPN_3x/138205316/model_final_a3ec72", 42.9, 38.6),
        _detectron2(f"{COCO}_X_101_32x8d_FPN_3x/139653917/model_final_2d9806", 44.3, 39.5),
        _detectron2(f"{LSJ}_R_50_FPN_100ep_LSJ/42047764/model_final_bb69de", 44.6, 40.3),
        _detectron2(f"{LSJ}_R_50_FPN_200ep_LSJ/42047638/model_final_89a8d3", 46.3, 41.7),
        _detectron2(f"{LSJ}_R_50_FPN_400ep_LSJ/42019571/model_final_14d201", 47.4, 42.5),
        _detectron2(f"{LSJ}_R_101_FPN_100ep_LSJ/42025812/model_final_4f7b58", 46.4, 41.6),
        _detectron2(f"{LSJ}_R_101_FPN_200ep_LSJ/42131867/model_final_0bb7ae", 48.0, 43.1),
        _detectron2(f"{LSJ}_R_101_FPN_400ep_LSJ/42073830/model_final_f96b26", 48.9, 43.7),
        _detectron2(
            f"{COCO}_R_50_C4_3x/137849525/model_final_4ce675", 39.8, 34.4, "it has no feature pyramid (a C4 model)"
        ),
        _mmdet("mask_rcnn_r50_fpn_1x_coco", "20200205-d4b0c5d6", 38.2, 34.7),
        _mmdet("mask_rcnn_r50_fpn_mstrain-poly_3x_coco", "20210524_201154-21b550bb", 40.9, 37.1),
        _mmdet("mask_rcnn_r101_fpn_mstrain-poly_3x_coco", "20210524_200244-5675c317", 42.7, 38.5),
    )
}


def find(name: str) -> Published:
    """The published checkpoint of this name.

    Raises:
        ValueError: for an unknown name, with those that come close; or an architecture that is not here.
    """
    if name not in PUBLISHED:
        names = [*PUBLISHED, "people"]
        close = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names
        raise ValueError(f"{name!r}: expected an existing file or a published name, such as {', '.join(close)}")
    entry = PUBLISHED[name]
    if entry.unsupported:
        raise ValueError(f"{name!r} cannot be loaded: {entry.unsupported}")
    return entry
