"""Checkpoints that their authors publish, by short names.

The names of the files carry the start of a hash: of SHA-256 in torchvision and MMDetection, of MD5 in Detectron2 (its
MODEL_ZOO.md says so). AP is what the authors report on COCO val2017, or the data set in the name, box and mask.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        options: what its keys cannot say and its family does not mean by default; fields of :class:`.options.Options`.
    """

    name: str
    url: str
    digest: str
    box_ap: float | None
    mask_ap: float | None
    licence: str
    unsupported: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def _torchvision(
    name: str, file: str, box_ap: float, mask_ap: float | None, unsupported: str | None = None
) -> Published:
    url = f"https://download.pytorch.org/models/{file}.pth"
    licence = "BSD-3-Clause; see torchvision's note on pretrained models"
    digest = f"sha256:{file.rpartition('-')[2]}"
    return Published(f"torchvision/{name}", url, digest, box_ap, mask_ap, licence, unsupported)


def _detectron2(path: str, box_ap: float | None, mask_ap: float, **options: Any) -> Published:
    group, name, *_ = path.split("/")
    if group in ("Cityscapes", LVIS):  # whose configs are named as COCO's
        name = f"{group.partition('-')[0]}/{name}"
    url = f"https://dl.fbaipublicfiles.com/detectron2/{path}.pkl"
    digest = f"md5:{path.rpartition('_')[2]}"
    return Published(f"detectron2/{name}", url, digest, box_ap, mask_ap, "CC BY-SA 3.0", options=options)


def _mmdet(
    name: str, end: str, box_ap: float, mask_ap: float | None, folder: str = "mask_rcnn", **options: Any
) -> Published:
    url = f"https://download.openmmlab.com/mmdetection/v2.0/{folder}/{name}/{name}_{end}.pth"
    digest = f"sha256:{end.rpartition('-')[2]}"
    return Published(f"mmdet/{name}", url, digest, box_ap, mask_ap, "Apache-2.0", options=options)


COCO, LSJ, MISC = "COCO-InstanceSegmentation/mask_rcnn", "new_baselines/mask_rcnn", "Misc"
LVIS = "LVISv0.5-InstanceSegmentation"
LVIS_TEST = {"score_threshold": 0.0001, "max_detections": 300}
CITYSCAPES = {
    "classes": ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    "category_ids": (24, 25, 26, 27, 28, 31, 32, 33),
    "min_size": 1024,
    "max_size": 2048,
}
PUBLISHED = {
    entry.name: entry
    for entry in (
        _torchvision("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_coco-bf2d0c1e", 37.9, 34.6),
        _torchvision("maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2_coco-73cbd019", 47.4, 41.8),
        _torchvision(
            "keypointrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn_coco-fc266e95", 54.6, None, "keypoints are not here"
        ),
        _detectron2(f"{COCO}_R_50_C4_1x/137259246/model_final_9243eb", 36.8, 32.2),
        _detectron2(f"{COCO}_R_50_C4_3x/137849525/model_final_4ce675", 39.8, 34.4),
        _detectron2(f"{COCO}_R_101_C4_3x/138363239/model_final_a2914c", 42.6, 36.7),
        _detectron2(f"{COCO}_R_50_DC5_1x/137260150/model_final_4f86c3", 38.3, 34.2),
        _detectron2(f"{COCO}_R_50_DC5_3x/137849551/model_final_84107b", 40.0, 35.9),
        _detectron2(f"{COCO}_R_101_DC5_3x/138363294/model_final_0464b7", 41.9, 37.3),
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
        _detectron2(f"{MISC}/mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e", 42.6, 38.6),
        _detectron2(f"{MISC}/mask_rcnn_R_50_FPN_3x_syncbn/169527823/model_final_3b3c51", 41.9, 37.8),
        _detectron2(f"{MISC}/scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85", 39.9, 36.6),
        _detectron2(f"{MISC}/scratch_mask_rcnn_R_50_FPN_9x_gn/183808979/model_final_da7b4c", 43.7, 39.6, style="bgr"),
        _detectron2(
            f"{MISC}/scratch_mask_rcnn_R_50_FPN_9x_syncbn/184226666/model_final_5ce33e", 43.6, 39.3, style="bgr"
        ),
        _detectron2("Cityscapes/mask_rcnn_R_50_FPN/142423278/model_final_af9cf5", None, 36.5, **CITYSCAPES),
        _detectron2(f"{LVIS}/mask_rcnn_R_50_FPN_1x/144219072/model_final_571f7c", 23.6, 24.4, **LVIS_TEST),
        _detectron2(f"{LVIS}/mask_rcnn_R_101_FPN_1x/144219035/model_final_824ab5", 25.6, 25.9, **LVIS_TEST),
        _detectron2(f"{LVIS}/mask_rcnn_X_101_32x8d_FPN_1x/144219108/model_final_5e3439", 26.7, 27.1, **LVIS_TEST),
        _mmdet(
            "mask_rcnn_r50_caffe_fpn_1x_coco",
            "bbox_mAP-0.38__segm_mAP-0.344_20200504_231812-0ebd1859",
            38.0,
            34.4,
            style="caffe",
        ),
        _mmdet("mask_rcnn_r50_fpn_1x_coco", "20200205-d4b0c5d6", 38.2, 34.7),
        _mmdet("mask_rcnn_r50_fpn_fp16_1x_coco", "20200205-59faf7e4", 38.1, 34.7, folder="fp16"),
        _mmdet("mask_rcnn_r50_fpn_2x_coco", "bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40", 39.2, 35.4),
        _mmdet("mask_rcnn_r101_caffe_fpn_1x_coco", "20200601_095758-805e06c1", 40.4, 36.4, style="caffe"),
        _mmdet("mask_rcnn_r101_fpn_1x_coco", "20200204-1efe0ed5", 40.0, 36.1),
        _mmdet("mask_rcnn_r101_fpn_2x_coco", "bbox_mAP-0.408__segm_mAP-0.366_20200505_071027-14b391c7", 40.8, 36.6),
        _mmdet("mask_rcnn_x101_32x4d_fpn_1x_coco", "20200205-478d0b67", 41.9, 37.5),
        _mmdet(
            "mask_rcnn_x101_32x4d_fpn_2x_coco", "bbox_mAP-0.422__segm_mAP-0.378_20200506_004702-faef898c", 42.2, 37.8
        ),
        _mmdet("mask_rcnn_x101_64x4d_fpn_1x_coco", "20200201-9352eb0d", 42.8, 38.4),
        _mmdet("mask_rcnn_x101_64x4d_fpn_2x_coco", "20200509_224208-39d6f70c", 42.7, 38.1),
        _mmdet("mask_rcnn_x101_32x8d_fpn_1x_coco", "20220630_173841-0aaf329e", 42.8, 38.3),
        _mmdet(
            "mask_rcnn_r50_caffe_fpn_mstrain-poly_2x_coco",
            "bbox_mAP-0.403__segm_mAP-0.365_20200504_231822-a75c98ce",
            40.3,
            36.5,
            style="caffe",
        ),
        _mmdet(
            "mask_rcnn_r50_caffe_fpn_mstrain-poly_3x_coco",
            "bbox_mAP-0.408__segm_mAP-0.37_20200504_163245-42aa3d00",
            40.8,
            37.0,
            style="caffe",
        ),
        _mmdet("mask_rcnn_r50_fpn_mstrain-poly_3x_coco", "20210524_201154-21b550bb", 40.9, 37.1),
        _mmdet("mask_rcnn_r101_fpn_mstrain-poly_3x_coco", "20210524_200244-5675c317", 42.7, 38.5),
        _mmdet("mask_rcnn_r101_caffe_fpn_mstrain-poly_3x_coco", "20210526_132339-3c33ce02", 42.9, 38.5, style="caffe"),
        _mmdet("mask_rcnn_x101_32x4d_fpn_mstrain-poly_3x_coco", "20210524_201410-abcd7859", 43.6, 39.0),
        _mmdet("mask_rcnn_x101_32x8d_fpn_mstrain-poly_1x_coco", "20220630_170346-b4637974", 43.4, 39.0),
        _mmdet("mask_rcnn_x101_32x8d_fpn_mstrain-poly_3x_coco", "20210607_161042-8bd2c639", 44.3, None),
        _mmdet("mask_rcnn_x101_64x4d_fpn_mstrain-poly_3x_coco", "20210526_120447-c376f129", 44.5, 39.7),
        _mmdet("mask_rcnn_r50_fpn_gn-all_2x_coco", "20200206-8eee02a6", 40.2, 36.4, folder="gn"),
        _mmdet("mask_rcnn_r50_fpn_gn-all_3x_coco", "20200214-8b23b1e5", 40.5, 36.7, folder="gn"),
        _mmdet("mask_rcnn_r101_fpn_gn-all_2x_coco", "20200205-d96b1b50", 41.9, 37.6, folder="gn"),
        _mmdet("mask_rcnn_r101_fpn_gn-all_3x_coco", "20200513_181609-0df864f4", 42.1, 38.0, folder="gn"),
        _mmdet(
            "mask_rcnn_r50_fpn_gn-all_contrib_2x_coco", "20200207-20d3e849", 40.0, 36.1, folder="gn", style="pytorch"
        ),
        _mmdet(
            "mask_rcnn_r50_fpn_gn-all_contrib_3x_coco", "20200225-542aefbc", 40.1, 36.2, folder="gn", style="pytorch"
        ),
    )
}


def find(name: str) -> Published:
    """The published checkpoint of this name.

    Raises:
        ValueError: for an unknown name, with those that come close; or an architecture that is not here.
    """
    if name not in PUBLISHED:
        names = [*(known for known, entry in PUBLISHED.items() if not entry.unsupported), "people"]
        close = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names
        raise ValueError(f"{name!r}: expected an existing file or a published name, such as {', '.join(close)}")
    entry = PUBLISHED[name]
    if entry.unsupported:
        raise ValueError(f"{name!r} cannot be loaded: {entry.unsupported}")
    return entry
