"""The project's own checkpoint: safetensors with the whole config in the header, so that loading guesses nothing.

The header has one entry, ``trimask``: a JSON object with the format's version, the config and the provenance. (One
entry, because safetensors writes several in random order, and a file should be the same bytes whenever it is made.)
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..config import MaskRCNNConfig, ResNetConfig
from ..files import write_whole
from ..mask_rcnn import MaskRCNN
from .mapping import differences
from .reading import Contents

__all__ = ["FORMAT", "blank_model", "from_contents", "header", "naming", "outline", "save", "weights"]

KEY = "trimask"
FORMAT = 1  # what this version writes, and the newest that it reads

# Few numbers that decide scores and boxes directly: in float16 they cost the bundled model 0.2 AP, all others 0.01.
PREDICTORS = ("rpn.objectness", "rpn.deltas", "box_head.classes", "box_head.deltas")


def weights(model: MaskRCNN) -> dict[str, Tensor]:
    """The tensors that make a model; counters of the norms, which only training reads, are not among them."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def save(
    model: MaskRCNN, path: str | Path, provenance: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a model; the file appears whole or not at all, and the same model gives the same bytes.

    Args:
        model: in any dtype, on any device.
        path: where to; what is there is replaced.
        provenance: where the weights come from, kept in the header.
        dtype: ``torch.float16`` halves the file: matrices and kernels are rounded to it, vectors (biases, norms) and
            the predictors stay float32. None writes float32.

    Raises:
        ValueError: for another dtype, or a weight that float16 cannot hold.
    """
    if dtype not in (None, torch.float32, torch.float16):
        raise ValueError(f"dtype: expected torch.float16, torch.float32 or None, got {dtype}")
    tensors = {}
    for name, tensor in weights(model).items():
        half = dtype == torch.float16 and tensor.dim() > 1 and not name.startswith(PREDICTORS)
        wanted = torch.float16 if half else torch.float32
        tensors[name] = tensor.detach().to("cpu", wanted).contiguous()
        if tensor.isfinite().all() and not tensors[name].isfinite().all():
            raise ValueError(f"dtype: {name} has values up to {tensor.abs().max():.3g}, too large for float16")
    about = {
        "format": FORMAT,
        "config": json.loads(model.config.to_json()),
        "provenance": dict(sorted((provenance or {}).items())),
    }
    path = Path(path)
    # `save_file` of safetensors would make a file that its owner alone can read.
    write_whole(path, lambda file: file.write(to_bytes(tensors, {KEY: json.dumps(about, separators=(",", ":"))})))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever the contents of a file make us raise becomes a ValueError with its path."""
    try:
        yield
    except (MemoryError, OSError):  # of this machine
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path}: expected the checkpoint of a model, got a broken one ({reason})") from error


def header(contents: Contents) -> dict[str, Any] | None:
    """The header of one of our files: ``format``, ``config`` and ``provenance``; None for any other file."""
    if KEY not in contents.metadata:
        return None
    try:
        about = json.loads(contents.metadata[KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in the header, got {contents.metadata[KEY][:40]!r} ({error})") from None
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise ValueError(f"expected a header with a format, got {str(about)[:80]}")
    if about["format"] > FORMAT:
        raise ValueError(f"expected format {FORMAT} or older, got {about['format']}, made by a newer trimask: upgrade")
    provenance = about.get("provenance")
    if not isinstance(provenance, dict) or not all(isinstance(value, str) for value in provenance.values()):
        raise ValueError(f"expected the provenance as names and texts, got {str(provenance)[:80]}")
    return about


def from_contents(
    contents: Contents, about: Mapping[str, Any], adapt: Callable[[MaskRCNNConfig], MaskRCNNConfig]
) -> MaskRCNN:
    """The model of a file of ours, whose :func:`header` is ``about``; ``adapt`` may change values of its config."""
    config = adapt(MaskRCNNConfig.from_json(json.dumps(about.get("config"))))
    problems = differences(
        {name: tensor.shape for name, tensor in outline(config, len(contents.tensors)).items()},
        {name: tensor.shape for name, tensor in contents.tensors.items()},
    )
    if problems:
        raise ValueError("the tensors do not fit the config: " + "; ".join(problems))
    if whole := [name for name, tensor in contents.tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"expected floating-point weights, got {contents.tensors[whole[0]].dtype} in {whole[0]}")
    model = blank_model(config)
    model.load_state_dict(contents.tensors, strict=False)
    return model.eval()


class without_init(torch.overrides.TorchFunctionMode):
    """Makes the random initialisers of torch.nn.init do nothing: the values are about to be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def outline(config: MaskRCNNConfig, limit: int) -> dict[str, Tensor]:
    """The weights of a model without their memory.

    Raises:
        ValueError: for a config with more layers than ``limit``, the number of tensors that there are for them.
    """
    layers = sum(config.backbone.blocks) if isinstance(config.backbone, ResNetConfig) else 0
    layers += config.rpn.convs + config.box_head.convs
    if layers > limit:
        raise ValueError(f"expected the tensors of {layers} layers or more, got {limit} tensors")
    with torch.device("meta"):
        return weights(blank_model(config))


def blank_model(config: MaskRCNNConfig) -> MaskRCNN:
    """A model whose weights mean nothing yet."""
    with without_init():
        return MaskRCNN(config)
