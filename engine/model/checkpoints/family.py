"""From a family's state dict to a model: rename, infer, check every name and shape, transform, load.

A :class:`Family` holds all that is particular to torchvision, Detectron2 or MMDetection; this file is what they share.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config import MaskRCNNConfig
from ..mask_rcnn import MaskRCNN
from .architecture import Shapes, count_classes, infer
from .mapping import KeyMap, Layout, Rule, Transform, differences, transforms
from .native import blank_model, outline, weights
from .options import Options
from .reading import Contents

__all__ = ["COUNTERS", "Conventions", "Family", "export", "load"]

COUNTERS = r".*\.num_batches_tracked"  # of batch norms in training


@dataclass(frozen=True)
class Conventions:
    """What a checkpoint means besides its tensors.

    Attributes:
        config: the family's preset, adapted to what the checkpoint shows; its architecture is inferred afterwards.
        bgr: the first convolution expects blue first.
        notes: assumptions that the user may want to override.
    """

    config: MaskRCNNConfig
    bgr: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One world of checkpoints.

    Attributes:
        name: for messages and provenance.
        marks: a name that fits this belongs to the family.
        unsupported: names that fit a pattern are of an architecture that is not here, which the text says.
        ignored: names that say nothing about the network.
        old_names: today's name of a layer and a former one, as rules from the one to the other.
        background_first: the first class is the background; otherwise the last.
        sizes_first: the anchors of a cell are ordered by size, then by aspect ratio; otherwise the reverse.
        layout: what decides the names, from the names.
        rules: the names of the layers under a layout.
        conventions: what the checkpoint means, from its class names, category ids, tensors and the options.
    """

    name: str
    marks: str
    unsupported: tuple[tuple[str, str], ...]
    background_first: bool
    layout: Callable[[Iterable[str]], Layout]
    rules: Callable[[Layout], Sequence[Rule]]
    conventions: Callable[[tuple[str, ...], tuple[int, ...], Mapping[str, Tensor], Options], Conventions]
    sizes_first: bool = False
    ignored: str = COUNTERS
    old_names: tuple[Rule, ...] = ()

    def transforms(self, config: MaskRCNNConfig, bgr: bool) -> dict[str, Transform]:
        """What happens to the tensors of a model, by our names."""
        return transforms(config, bgr=bgr, background_first=self.background_first, sizes_first=self.sizes_first)


def load(family: Family, contents: Contents, options: Options) -> tuple[MaskRCNN, list[str]]:
    """Build the model of a checkpoint.

    Returns:
        the model in evaluation mode, and notes about what was assumed.

    Raises:
        ValueError: for an architecture that is not here, and listing by name what is missing, unused or mis-shaped.
    """
    for pattern, architecture in family.unsupported:
        if name := next((name for name in contents.tensors if re.match(pattern, name)), None):
            raise ValueError(f"{architecture} is not supported; the checkpoint has {name!r}")
    modern = KeyMap(family.old_names)
    everything: dict[str, Tensor] = {}
    for old, tensor in contents.tensors.items():
        name = modern.to_native(old) or old
        if name in everything:
            raise ValueError(f"expected one tensor {name!r}, got it under its old and its new name")
        everything[name] = tensor
    state = {name: tensor for name, tensor in everything.items() if not re.fullmatch(family.ignored, name)}

    keys = KeyMap(family.rules(family.layout(state)))
    ours = {keys.to_native(name): tensor.shape for name, tensor in state.items()}
    shapes = Shapes({name: shape for name, shape in ours.items() if name is not None}, keys.to_foreign)
    names, ids = options.class_names(count_classes(shapes), contents.classes)
    conventions = family.conventions(names, ids, everything, options)
    config = options.apply(infer(conventions.config, shapes))
    _check_anchors(config, shapes["rpn.objectness.weight"][0])

    changes = family.transforms(config, conventions.bgr)
    meta = outline(config, len(state))
    expected = {name: tensor.shape for name, tensor in _renamed(meta, keys, changes).items()}
    problems = differences(expected, {name: tensor.shape for name, tensor in state.items()})
    if problems:
        raise ValueError(f"the tensors do not fit a {family.name} model: " + "; ".join(problems))
    if whole := [name for name in expected if not state[name].is_floating_point()]:
        raise ValueError(f"expected floating-point weights, got {state[whole[0]].dtype} in {whole[0]}")
    values = {}
    for name in meta:
        foreign = keys.to_foreign(name)
        assert foreign is not None
        values[name] = changes[name].to_native(state[foreign]) if name in changes else state[foreign]
    model = blank_model(config)
    model.load_state_dict(values, strict=False)  # counters of the norms are not stored
    notes = list(conventions.notes)
    if options.classes is None and contents.classes is None and len(names) in (80, 90):
        notes.append(f"{len(names)} classes are taken to be COCO's; say otherwise with classes")
    if options.classes is None and contents.classes is not None and len(contents.classes) != len(names):
        stored = f"the file names {len(contents.classes)} classes and its weights have {len(names)}"
        notes.append(f"{stored}: its names are not used, but {names[0]!r} and so on; give classes")
    if contents.ignored:
        notes.append(f"left out objects that are no weights: {', '.join(contents.ignored)}")
    return model.eval(), notes


def export(family: Family, model: MaskRCNN, *, bgr: bool = False) -> dict[str, Tensor]:
    """The state dict that the family would give this network; rows of a leading background come back as zeros.

    Raises:
        ValueError: for a model of which the family has no such kind.
    """
    pool, masks = model.config.pool, model.config.mask_head
    if pool.maximum or pool.quantized or (masks is not None and masks.softmax):
        raise ValueError(f"{family.name} has neither RoIPool, nor a maximum over RoIAlign's samples, nor softmax masks")
    changes = family.transforms(model.config, bgr)
    return _renamed(weights(model), KeyMap(family.rules(Layout.of(model.config))), changes)


def _renamed(state: Mapping[str, Tensor], keys: KeyMap, changes: Mapping[str, Transform]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        foreign = keys.to_foreign(name)
        if foreign is None:
            raise ValueError(f"this family of checkpoints has no place for {name!r}")
        found[foreign] = changes[name].to_foreign(tensor) if name in changes else tensor
    return found


def _check_anchors(config: MaskRCNNConfig, per_cell: int) -> None:
    if per_cell != config.anchors.per_cell:
        sizes, ratios = len(config.anchors.sizes[0]), len(config.anchors.aspect_ratios)
        raise ValueError(
            f"anchor_sizes, aspect_ratios: the checkpoint has {per_cell} anchors per cell, but {sizes} size(s) on a "
            f"level x {ratios} aspect ratios make {sizes * ratios}; give the aspect_ratios or the anchor_sizes it was "
            "trained with"
        )
