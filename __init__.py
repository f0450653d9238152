"""trimask: Mask R-CNN inference that is exact, fast and easy to install.

    import trimask

    model = trimask.load("people")                 # bundled; or a path, or a published model's name
    result = model.predict("photo.jpg", score=0.5)
    result.plot().save("overlay.png")

Names are imported on first use, so ``import trimask`` costs nothing and works without torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": ".engine.inference.predictor",
    "Predictor": ".engine.inference.predictor",
    "Result": ".engine.inference.result",
    "to_dataset": ".engine.inference.result",
    "MaskRCNN": ".engine.model.mask_rcnn",
    "MaskRCNNConfig": ".engine.model.config",
    "convert": ".engine.model.checkpoints",
    "train": ".engine.training.train",
    "evaluate_model": ".engine.training.detection",
    "AugmentConfig": ".engine.training.config",
    "LossConfig": ".engine.model.loss_config",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    if name in ("export", "kernels"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
