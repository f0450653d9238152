"""The GPU ops of Mask R-CNN and their twins in plain torch; they know nothing of the model.

Names are imported on first use, so that the parts that need numpy alone work without torch. No module here is named
like a function of it: once imported, the module would hide the function.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "MultiScaleRoIAlign": ".modules",
    "PasteRule": ".paste_rule",
    "RoIAlign": ".modules",
    "RoIPool": ".modules",
    "area_of_runs": ".cpu.masks",
    "batched_nms": ".suppression",
    "box_of_runs": ".cpu.masks",
    "decode_runs": ".cpu.masks",
    "encode_runs": ".cpu.masks",
    "mask_of_runs": ".cpu.masks",
    "mask_probabilities": ".pasting",
    "masks_to_rle": ".rle",
    "nms": ".suppression",
    "paste_masks": ".pasting",
    "preprocess": ".resizing",
    "proposals": ".decoding",
    "pyramid_roi_align": ".roi_pooling",
    "roi_align": ".roi_pooling",
    "roi_pool": ".roi_pooling",
    "runs_of_mask": ".cpu.masks",
    "segmented_nms": ".suppression",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
