"""The inference graph as a whole: it never waits for a device, exports, repeats, and equals the model it came from."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export

import trimask
from matching import differences, of_result
from models import SMALL, VARIANTS, golden_checkpoint, small_model
from pretence import GPU, NoWaiting, WaitsError, for_gpu, pretend, replace_tensors
from tolerances import MATCH_MASK_PIXELS, SUMMED_DIFFERENTLY
from trimask.engine.inference.graph import fold, optimize, run_lengths
from trimask.engine.inference.layers import ROIS
from trimask.engine.model.checkpoints import load_model
from trimask.engine.model.config import MaskRCNNConfig
from trimask.engine.model.heads import select_detections
from trimask.engine.model.mask_rcnn import MaskRCNN

CPU = torch.device("cpu")
SIZES = torch.tensor([[128, 160], [100, 130]])
RUNS = 50  # what there is room for in a mask
Pair = tuple[trimask.Predictor, trimask.Predictor]

cached_model = cache(small_model)


def batch(rng: torch.Generator, sizes: Tensor = SIZES) -> Tensor:
    height, width = (sizes.amax(0) + 31) // 32 * 32
    return torch.rand(len(sizes), 3, int(height), int(width), generator=rng) * 255


def fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


# On a GPU it never waits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_no_variant_waits_for_a_gpu(
    config: MaskRCNNConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does any make a tensor on the host; and what comes out has the shapes and dtypes of the contract."""
    graph = for_gpu(cached_model(config), dtype, monkeypatch)
    with FakeTensorMode(), torch.no_grad(), NoWaiting():
        replace_tensors(graph, fake)
        sizes = fake(SIZES)
        found = graph(torch.empty(2, 3, 128, 160, device=GPU), sizes, sizes)
        outputs = [*found]
        capacity = config.detection.max_detections
        wanted = [
            ((2, capacity, 4), torch.float32),
            ((2, capacity), torch.float32),
            ((2, capacity), torch.int64),
            ((2, capacity, config.mask_side, config.mask_side), dtype),
            ((2,), torch.int64),
        ]
        if config.mask_head is None:
            assert outputs.pop(3) is None
            wanted.pop(3)
        else:
            outputs += run_lengths(found, sizes, config.paste, RUNS)
            wanted += [((2, capacity, RUNS), torch.int32), ((2, capacity), torch.int32)]
    assert [(tuple(x.shape), x.dtype) for x in outputs] == wanted
    assert all(x.device == GPU for x in outputs)


# Sizes for the interpreter, in which a program costs the same, whatever its size.
TILES = {
    "roi_align": {"_BINS": 64},
    "suppression": {"_RANKS": 4096, "_ROWS": 1024, "_PART": 32},
    "pasting": {"_PROBABILITIES": 1 << 14},
    "rle": {"_PROGRAMS": 1, "_LANES": 128, "_ROWS": 32},
}
TINY = torch.tensor([[64, 64], [45, 60]])


def tiny(config: MaskRCNNConfig) -> MaskRCNNConfig:
    """For the interpreter, which takes milliseconds for a program."""
    rpn = replace(config.rpn, pre_nms=24, post_nms=12)
    return replace(config, rpn=rpn, detection=replace(config.detection, max_detections=5, score_threshold=0.0))


def pixels(runs: Tensor, lengths: Tensor) -> list[np.ndarray]:
    """Each mask's pixels, column by column."""
    assert int(lengths.max()) <= runs.shape[-1]
    return [np.repeat(np.arange(len(mask)) % 2, mask) for mask in runs.flatten(0, 1).numpy()]


@pytest.mark.parametrize("name", ["two linear layers", "class-agnostic"])
def test_the_launchers_wait_for_nothing_and_find_what_torch_finds(
    name: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real kernels, in the interpreter, on a GPU in pretence; beside the same layers with plain torch's ops."""
    for module, constants in TILES.items():
        for constant, value in constants.items():
            monkeypatch.setattr(f"trimask.kernels.gpu.{module}.{constant}", value)
    config = tiny(VARIANTS[name])
    graph = for_gpu(cached_model(config), torch.float32, monkeypatch)
    inputs = batch(rng, TINY), TINY, TINY * 3

    with torch.no_grad():
        expected = graph(*inputs)
    with pretend(monkeypatch) as device:
        replace_tensors(graph, device.to_device)
        image, sizes, originals = map(device.to_device, inputs)
        there = graph(image, sizes, originals)
        found, runs = device.to_host((there, run_lengths(there, originals, config.paste, 5000)))
    assert {x for x in device.launches if x.endswith("_kernel")} >= {
        "_proposals_kernel",
        "_rank_kernel",
        "scan_kernel",
        "_roi_align_kernel",
        "_runs_kernel",
    }
    assert found.labels.shape == (2, 5)  # nobody has counted them to cut the rest off
    live = int(expected.count.max())
    assert live > 0  # in a picture of noise there may be nothing
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.labels[:, :live], expected.labels)
    assert not found.boxes[:, live:].any()
    for one, other in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(one[:, :live], other, **SUMMED_DIFFERENTLY)
    for a, b in zip(pixels(*runs), pixels(*run_lengths(found, inputs[2], config.paste, 5000)), strict=True):
        assert len(a) == len(b)
        assert np.count_nonzero(a != b) <= MATCH_MASK_PIXELS  # probabilities may differ by an ulp


OFFENCES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x[0, 0, 0].tolist(),
    "a slice up to a count": lambda x: x[: (x > 0).sum()],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "set by a mask": lambda x: x.index_put((x > 0,), x.flatten()[:1]),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.flatten().repeat_interleave(x.flatten().long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "to the host": lambda x: x.cpu(),
    "copied to the host": lambda x: torch.zeros(x.shape).copy_(x),
    "from the host": lambda x: torch.tensor([1.0], device=x.device),
    "a number from the host": lambda x: torch.tensor(1.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "an index of the host": lambda x: x[torch.tensor([0, 1])],
    "a list as index": lambda x: x[[0, 1]],
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: x * 2 + x.amax(1, keepdim=True),
    "made there": lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2, device=x.device),
    "an index of the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "a number where a mask is": lambda x: x.masked_fill(x > 0, 1.0),
    "sorted": lambda x: x.flatten().sort(stable=True).indices,
    "a number of the host": lambda x: x * torch.tensor(2.0),
}


def run_with(planted: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch, pretended: bool) -> None:
    """The graph up to its pyramid, with something planted there."""
    pyramid = for_gpu(cached_model(tiny(SMALL)), torch.float32, monkeypatch)
    pyramid.fpn.register_forward_hook(lambda module, inputs, maps: planted(maps[3]) and None)
    image = torch.rand(2, 3, 64, 64) * 255
    if pretended:
        with pretend(monkeypatch) as device:
            replace_tensors(pyramid, device.to_device)
            x = device.to_device(image)
            pyramid.fpn(pyramid.backbone(pyramid.normalize(x, device.to_device(TINY))))
    else:
        with FakeTensorMode(), torch.no_grad(), NoWaiting():
            replace_tensors(pyramid, fake)
            pyramid.fpn(pyramid.backbone(pyramid.normalize(fake(image), fake(TINY))))


@pytest.mark.parametrize("pretended", [False, True], ids=["fake", "pretended"])
@pytest.mark.parametrize("offence", OFFENCES.values(), ids=OFFENCES.keys())
def test_each_offence_is_seen(
    offence: Callable[[Tensor], Any], pretended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WaitsError):
        run_with(offence, monkeypatch, pretended)


@pytest.mark.parametrize("pretended", [False, True], ids=["fake", "pretended"])
def test_what_a_gpu_does_by_itself_is_no_offence(pretended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(lambda x: [harmless(x) for harmless in FREE.values()], monkeypatch, pretended)


def test_little_is_launched_besides_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch costs a GPU microseconds, however small its tensors: one more needs a reason, and a new number here."""
    graph = for_gpu(cached_model(SMALL), torch.float16, monkeypatch)
    stages: dict[str, int] = {}
    with FakeTensorMode(), torch.no_grad(), NoWaiting() as watch:
        replace_tensors(graph, fake)
        graph(
            torch.empty(2, 3, 128, 160, device=GPU),
            fake(SIZES),
            fake(SIZES),
            mark=lambda stage: stages.update({stage: len(watch.launches) - sum(stages.values())}),
        )
    assert stages["proposals"] - 4 * 5 <= 17  # four convolutions and rectifiers on each level
    assert stages["boxes"] - 6 <= 65  # four linear layers, two rectifiers
    assert stages["masks"] <= 10


# torch.export sees it whole.


class Flat(nn.Module):
    """Detections without a mask head hold a None, which no exported program returns."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, image_sizes: Tensor, original_sizes: Tensor) -> list[Tensor]:
        return [x for x in self.model(image, image_sizes, original_sizes) if x is not None]


@pytest.fixture(scope="module", params=["two linear layers", "boxes only"])
def exported(request: pytest.FixtureRequest) -> tuple[MaskRCNN, ExportedProgram]:
    """Of any batch and size, from one of two pictures. With a side of 64 the coarsest map has no second row."""
    model = cached_model(VARIANTS[request.param])
    some = Dim("batch", max=64)
    sides = {2: 32 * Dim("rows", min=3, max=64), 3: 32 * Dim("columns", min=3, max=64)}
    inputs = torch.zeros(2, 3, 128, 160), SIZES, SIZES * 2  # a tensor given twice would become one input
    shapes = {"image": {0: some, **sides}, "image_sizes": {0: some}, "original_sizes": {0: some}}
    with torch.no_grad():
        return model, export(Flat(model), inputs, dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def test_the_exported_program_equals_the_model(
    exported: tuple[MaskRCNN, ExportedProgram], rng: torch.Generator
) -> None:
    """To rounding: its rows are not cut to those that are there, and so its matrices are multiplied otherwise."""
    model, program = exported
    run = program.module()
    for sizes in (SIZES, [[96, 224]], [[180, 96], [96, 96], [17, 1]]):
        sizes = torch.as_tensor(sizes)
        image = batch(rng, sizes)
        for picture in (image, image * torch.nan):  # of the second, nothing is found
            expected = [x for x in model(picture, sizes, sizes * 2) if x is not None]
            found = run(picture, sizes, sizes * 2)
            live = expected[0].shape[1]
            assert torch.equal(found[-1], expected[-1])
            assert (int(found[-1].sum()) > 0) == (picture is image)
            assert torch.equal(found[2][:, :live], expected[2])
            for one, other in zip(found[:-1], expected[:-1], strict=True):
                torch.testing.assert_close(one[:, :live], other, **SUMMED_DIFFERENTLY)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_no_part_of_it_asks_for_gradients(
    config: MaskRCNNConfig, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cached_model(config)
    ours = optimize(model, CPU, torch.float32)
    on_gpu = (for_gpu(model, dtype, monkeypatch) for dtype in (torch.float32, torch.float16))
    for graph in (ours, fold(model, torch.float32), *on_gpu):
        assert [name for name, parameter in graph.named_parameters() if parameter.requires_grad] == []
    assert torch.is_grad_enabled()
    assert not any(x.requires_grad for x in ours(batch(rng), SIZES, SIZES) if x is not None)


# What comes out depends on the pictures alone.


@torch.inference_mode()
def test_a_batch_in_another_order_gives_the_same_bits(rng: torch.Generator) -> None:
    graph = optimize(cached_model(SMALL), CPU, torch.float32)
    sizes = torch.tensor([[128, 160], [100, 130], [128, 70]])
    order = torch.tensor([2, 0, 1])
    image = batch(rng, sizes)
    found, permuted = graph(image, sizes, sizes * 3), graph(image[order], sizes[order], sizes[order] * 3)
    assert len(set(found.count.tolist())) > 1
    for one, other in zip(found, permuted, strict=True):
        assert torch.equal(one[order], other)


@torch.inference_mode()
def test_a_mask_does_not_depend_on_how_many_there_are(rng: torch.Generator) -> None:
    """Not even where they are taken some at a time and one is left over."""
    head = optimize(cached_model(SMALL), CPU, torch.float32).mask_head
    assert head is not None
    features = torch.randn(2 * ROIS + 1, 32, 14, 14, generator=rng).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(len(features)) % 2
    together = head(features, labels)
    for count in (1, 2, ROIS, ROIS + 1):
        assert torch.equal(head(features[:count], labels[:count]), together[:count])
        assert torch.equal(head(features[-count:], labels[-count:]), together[-count:])


@torch.inference_mode()
def test_rois_some_at_a_time_are_pooled_as_all(rng: torch.Generator) -> None:
    """Where a stage of the trunk sees them; and with as many of each picture as there are."""
    graph = optimize(cached_model(VARIANTS["C4"]), CPU, torch.float32)
    assert graph.rois_at_once is not None
    maps = [torch.randn(2, 256, 8, 10, generator=rng).contiguous(memory_format=torch.channels_last)]
    rois = torch.rand(2, 23, 4, generator=rng) * 60
    rois[..., 2:] += rois[..., :2]
    count = torch.tensor([23, 9])
    found = []
    for graph.rois_at_once in (None, 23, 5, 1):
        found.append(graph.pool(maps, rois, count, 14))
        assert found[-1].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found[-1], found[0], **SUMMED_DIFFERENTLY)
    assert torch.equal(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_what_the_network_says_and_nothing_after(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Scores, boxes and their order are those of the same numbers in float32, to the last bit."""
    model = cached_model(SMALL)
    maps = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    logits = [torch.randn(2, 3 * h * w, generator=rng).to(dtype) for h, w in maps]
    deltas = [torch.randn(2, 3 * h * w, 4, generator=rng).to(dtype) / 4 for h, w in maps]
    selected = [
        model.rpn.select([x.to(real) for x in logits], [x.to(real) for x in deltas], maps, (128, 160), SIZES)
        for real in (dtype, torch.float32)
    ]
    (proposals, count), _ = selected
    scores = torch.randn(2, proposals.shape[1], 4, generator=rng).to(dtype)
    moves = torch.randn(2, proposals.shape[1], 3, 4, generator=rng).to(dtype)
    chosen = [
        select_detections(scores.to(real), moves.to(real), proposals, count, SIZES, SMALL.detection)
        for real in (dtype, torch.float32)
    ]
    assert int(chosen[0][3].min()) > 0
    for half, full in (*zip(*selected, strict=True), *zip(*chosen, strict=True)):
        assert half.dtype == full.dtype
        assert torch.equal(half, full)


def test_proposals_beyond_the_count_are_not_there(rng: torch.Generator) -> None:
    """Whatever stands in their rows, and whatever size a box may have."""
    low = torch.rand(2, 20, 2, generator=rng) * 60
    proposals = torch.cat([low, low + torch.rand(2, 20, 2, generator=rng) * 40], -1)
    scores = torch.randn(2, 20, 4, generator=rng)
    moves = torch.randn(2, 20, 3, 4, generator=rng)
    count = torch.tensor([20, 12])
    scores[1, 12:, :3] += 10  # the best, if they were there
    everything = replace(SMALL.detection, min_size=0.0, score_threshold=0.0, nms_threshold=1.0)
    padded = select_detections(scores, moves, proposals, count, SIZES, everything)
    cut = select_detections(scores[1:, :12], moves[1:, :12], proposals[1:, :12], count[1:], SIZES[1:], everything)
    assert padded[3].tolist() == [20 * 3, 12 * 3]
    for one, other in zip(padded, cut, strict=True):
        assert torch.equal(one[1], other[0])


# Folded and fused layers find what the plain ones find.


@pytest.fixture(scope="module")
def people() -> Pair:
    return pair(load_model("people"))


@pytest.fixture(scope="module")
def resnet50(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(load_model(golden_checkpoint(golden, tmp_path_factory.mktemp("weights"))), resize=128)


def pair(model: MaskRCNN, resize: int | None = None) -> Pair:
    """A predictor as it is, and one whose graph is the model itself.

    Masks are pasted at the box's own coordinates: to whole pixels, a rounding may move one by a row.
    """
    lean, plain = (trimask.Predictor(model, device="cpu", resize=resize) for _ in range(2))
    plain.graph = model.eval()
    for predictor in (lean, plain):
        predictor.config = replace(predictor.config, paste=replace(predictor.config.paste, integer_boxes=False))
    return lean, plain


def chosen(folder: Path, number: int) -> list[Path]:
    """Some pictures, spread over a folder; as many as TRIMASK_TEST_PICTURES says, where it is set."""
    paths = sorted(folder.iterdir())
    number = min(int(os.environ.get("TRIMASK_TEST_PICTURES", number)), len(paths))
    return [paths[i * len(paths) // number] for i in range(number)]


def assert_same_detections(predictors: Pair, pictures: Sequence[Path | np.ndarray]) -> None:
    lean, plain = predictors
    wrong, total = {}, 0
    for i, picture in enumerate(pictures):
        expected = plain.predict(picture)
        total += len(expected)
        if different := differences(of_result(lean.predict(picture)), of_result(expected)):
            wrong[picture.name if isinstance(picture, Path) else i] = different
    assert wrong == {}
    assert total >= len(pictures)


def test_the_people_model_on_pictures_that_come_with_packages(people: Pair) -> None:
    data = pytest.importorskip("skimage.data")
    portrait = Path(pytest.importorskip("matplotlib").get_data_path()) / "sample_data" / "grace_hopper.jpg"
    assert_same_detections(people, [data.astronaut(), data.coffee(), data.chelsea(), portrait])


def test_the_people_model_on_photographs(people: Pair, shared_data: Path) -> None:
    assert_same_detections(people, chosen(shared_data / "coco_open" / "images", 4))


def test_a_resnet50_on_photographs(resnet50: Pair, shared_data: Path) -> None:
    """Its random weights find a hundred things in each, of whatever class."""
    assert_same_detections(resnet50, chosen(shared_data / "coco_open" / "images", 2))


def test_a_batch_gives_what_its_pictures_give_one_by_one(people: Pair) -> None:
    """At equal padded size. Not to the last bit: another number of rows is multiplied in another order."""
    astronaut = pytest.importorskip("skimage.data").astronaut()
    crops = [astronaut[:300, :400], astronaut[:300, 40:450], astronaut[100:400, :405]]  # all padded to 320 x 448
    for together, picture in zip(people[0].predict(crops, batch_size=3), crops, strict=True):
        assert len(together) > 0
        assert differences(of_result(together), of_result(people[0].predict(picture))) == []
