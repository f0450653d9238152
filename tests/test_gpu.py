"""What shows on a GPU alone: graphs, streams, waiting, other devices, sizes beyond 32 bits, agreement with the CPU.

The calls themselves, and what does not need a GPU, are tried on a CPU too.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from matching import differences, of_result
from tolerances import EPS, roi_align_error
from trimask import Predictor, kernels
from trimask.benchmarks.samples import photographs
from trimask.engine.model.checkpoints import load_model
from trimask.kernels import (
    MultiScaleRoIAlign,
    PasteRule,
    batched_nms,
    mask_probabilities,
    masks_to_rle,
    nms,
    paste_masks,
    preprocess,
    proposals,
    pyramid_roi_align,
    roi_align,
    roi_pool,
    segmented_nms,
)
from trimask.kernels.epilogue import conv_relu

STRIDES = (4, 8, 16, 32)
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.float16, torch.bfloat16]
GIGABYTE = 1 << 30

Call = Callable[..., Any]
Made = tuple[Call, list[Tensor]]  # a function of tensors, and the tensors


def _boxes(rng: torch.Generator, *shape: int, side: int) -> Tensor:
    """[*shape, 4] in a picture of side x side pixels, a few of them over its edge."""
    centre = torch.rand(*shape, 2, generator=rng) * side
    half = side * 0.3 * torch.rand(*shape, 2, generator=rng) + 1
    return torch.cat([centre - half, centre + half], -1)


def _levels(rng: torch.Generator, side: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(2, 16, -(-side // s), -(-side // s)) for s in STRIDES]
    return [torch.randn(shape, generator=rng).to(dtype, memory_format=torch.channels_last) for shape in shapes]


def _pyramid(rng: torch.Generator, side: int, dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    def call(*tensors: Tensor) -> Tensor:
        *features, boxes, counts = tensors
        return pyramid_roi_align(features, boxes, STRIDES, 7, counts=counts, **options)

    count, picture = side // 8, 4 * side  # so large that the boxes lie on several levels
    counts = torch.tensor([count, count // 2])
    return call, [*_levels(rng, picture, dtype), _boxes(rng, 2, count, side=picture), counts]


def _single(rng: torch.Generator, side: int, op: Call, **options: Any) -> Made:
    input = torch.randn(2, 16, side, side, generator=rng)
    rois = torch.cat([torch.randint(2, (20, 1), generator=rng), _boxes(rng, 20, side=side)], 1)
    return lambda x, boxes: op(x, boxes, 7, 1.0, **options), [input, rois]


def _lists(rng: torch.Generator, side: int) -> Made:
    names, picture = ["0", "1", "2", "3"], 4 * side
    pool = MultiScaleRoIAlign(names, 7, 2)

    def call(*tensors: Tensor) -> Tensor:
        *features, first, second = tensors
        return pool(dict(zip(names, features, strict=True)), [first, second], [(picture, picture)] * 2)

    return call, [*_levels(rng, picture, torch.float32), *_boxes(rng, 2, side // 8, side=picture)]


def _suppression(rng: torch.Generator, side: int, labelled: bool = False) -> Made:
    boxes, scores = _boxes(rng, 3, side, side=side), torch.rand(3, side, generator=rng)
    if not labelled:
        return lambda b, s: segmented_nms(b, s, 0.5, side // 2), [boxes, scores]
    labels, counts = torch.randint(3, (3, side), generator=rng), torch.tensor([side, side // 2, 0])
    return (
        lambda b, s, of, n: segmented_nms(b, s, 0.5, side, labels=of, counts=n, score_threshold=0.1),
        [boxes, scores, labels, counts],
    )


def _masks(rng: torch.Generator, side: int) -> list[Tensor]:
    return [torch.rand(5, 28, 28, generator=rng), _boxes(rng, 5, side=side)]


def _paste(rng: torch.Generator, side: int, rule: PasteRule, packed: bool) -> Made:
    return lambda p, b: paste_masks(p, b, (side, side + 5), rule=rule, packed=packed), _masks(rng, side)


def _run_lengths(rng: torch.Generator, side: int) -> Made:
    sizes = torch.tensor([[side, side + 5]] * 5)
    return (
        lambda p, b, s: masks_to_rle(p, b, s, rule=PasteRule.TORCHVISION, capacity=2000),
        [*_masks(rng, side), sizes],
    )


def _chosen(rng: torch.Generator, side: int) -> Made:
    logits = torch.randn(side, 5, 28, 28, generator=rng).half()
    return mask_probabilities, [logits, torch.randint(5, (side,), generator=rng)]


def _proposals(rng: torch.Generator, side: int) -> Made:
    anchors = [3 * (side // s) ** 2 for s in (4, 8)]
    indices = [torch.randint(n, (2, side // 2), generator=rng) for n in anchors]
    scores = [torch.rand(index.shape, generator=rng) for index in indices]
    deltas = [torch.randn(2, n, 4, generator=rng).mul(0.2) for n in anchors]
    half = torch.tensor([8.0, 16.0])[:, None, None] * torch.tensor([0.5, 1.0, 2.0])[:, None]  # [2, 3, 1]
    cells, sizes = torch.cat([-half, -half, half, half], 2), torch.tensor([[side, side], [side - 3, side // 2]])

    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        widths = [side // 4, side // 8]
        return proposals(x[:2], x[2:4], x[4:6], x[6], widths, [(4, 4), (8, 8)], x[7], capacity=side, min_size=1.0)

    return call, [*scores, *indices, *deltas, cells, sizes]


def _preprocess(rng: torch.Generator, side: int, **options: bool) -> Made:
    pictures = [torch.randint(256, (side, side + i, 3), generator=rng, dtype=torch.uint8) for i in range(2)]
    size = (side * 2, side + 9)
    return lambda *x: preprocess(x, [size, size], (side * 2, side + 16), **options), pictures


# What gives outputs of a fixed shape: by name of the op, and what is special.
CALLS: dict[str, Callable[[torch.Generator, int], Made]] = {
    "pyramid_roi_align": lambda rng, side: _pyramid(rng, side, sampling_ratio=2, aligned=False),
    "pyramid_roi_align adaptive": lambda rng, side: _pyramid(rng, side, sampling_ratio=0, aligned=True),
    "pyramid_roi_align float16": lambda rng, side: _pyramid(rng, side, torch.float16, sampling_ratio=2, aligned=False),
    "pyramid_roi_align max": lambda rng, side: _pyramid(rng, side, sampling_ratio=2, aligned=True, mode="max"),
    "roi_align": lambda rng, side: _single(rng, side, roi_align, sampling_ratio=2),
    "MultiScaleRoIAlign": _lists,
    "roi_pool": lambda rng, side: _single(rng, side, roi_pool),
    "segmented_nms": _suppression,
    "segmented_nms labels": lambda rng, side: _suppression(rng, side, labelled=True),
    "paste_masks": lambda rng, side: _paste(rng, side, PasteRule.TORCHVISION, packed=False),
    "paste_masks packed": lambda rng, side: _paste(rng, side, PasteRule.DETECTRON2, packed=True),
    "masks_to_rle": _run_lengths,
    "mask_probabilities": _chosen,
    "proposals": _proposals,
    "preprocess": _preprocess,
    "preprocess OpenCV": lambda rng, side: _preprocess(rng, side, quantize=True),
    "preprocess Pillow": lambda rng, side: _preprocess(rng, side, antialias=True, quantize=True),
}
WITH_GRADIENTS = [name for name in CALLS if name.startswith(("pyramid", "roi", "MultiScale"))]
READ_AT_THE_END = {"nms", "batched_nms"}  # return as many indices as there are

each_call = pytest.mark.parametrize("name", CALLS)


def _made(name: str, seed: int, device: str, side: int = 160) -> Made:
    call, tensors = CALLS[name](torch.Generator().manual_seed(seed), side)
    return call, [tensor.to(device) for tensor in tensors]


def _outputs(result: Any) -> list[Tensor]:
    return [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]


def _same(a: Any, b: Any) -> bool:
    first, second = _outputs(a), _outputs(b)
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def _with_gradients(call: Call, tensors: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of its weighted sum with respect to the floating features before the boxes."""
    features = [x.detach().requires_grad_() for x in tensors if x.dim() == 4]
    output = call(*features, *[x for x in tensors if x.dim() != 4])
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return output.detach(), torch.autograd.grad(output, features, weights)


def test_every_op_is_called() -> None:
    others = {"PasteRule", "RoIAlign", "RoIPool"} | {name for name in kernels.__all__ if "runs" in name}  # in numpy
    assert {name.split()[0] for name in CALLS} | READ_AT_THE_END | others == set(kernels.__all__)


@pytest.mark.parametrize("device", DEVICES)
@each_call
def test_a_call_repeats_and_depends_on_its_inputs(name: str, device: str, seed: int) -> None:
    """Without which the tests below would see nothing."""
    call, tensors = _made(name, seed, device)
    others = _made(name, seed + 1, device)[1]
    result = call(*tensors)
    assert _same(result, call(*tensors))
    assert not _same(result, call(*others))


@pytest.mark.gpu
@each_call
def test_a_call_gives_on_a_gpu_what_it_gives_on_a_cpu(name: str, seed: int) -> None:
    call, tensors = _made(name, seed, "cuda")
    expected, got = (_outputs(call(*x)) for x in ([x.cpu() for x in tensors], tensors))
    if name == "masks_to_rle":
        expected, got = ([_filled(*runs, (160, 165))] for runs in (expected, got))
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        if a.is_floating_point():
            a, b = a.double().nan_to_num(), b.cpu().double().nan_to_num()  # scores of -inf are equal
            assert float((a - b).abs().max()) <= _allowed(name, tensors)
        else:  # pixels whose value is the threshold, but for rounding, may go either way
            assert int((a != b.cpu()).sum()) <= 2 * (name.startswith("paste") or name == "masks_to_rle")


def _allowed(name: str, tensors: list[Tensor]) -> float:
    """How far two devices may be apart."""
    if name.startswith(("pyramid", "roi_align", "MultiScale")):
        return 2 * roi_align_error(tensors[0], max(float(x.abs().max()) for x in tensors if x.dim() == 4))
    single = EPS[torch.float32]
    return {
        "roi_pool": 0.0,
        "preprocess": 2 * single * 160 * 255,  # a coordinate rounded otherwise moves a value by a part of 255 levels
        "preprocess OpenCV": 0.0,
        "preprocess Pillow": 0.0,
        "proposals": 4 * single * 1000,  # exponentials off by an ulp, of sides that are at most a few hundred pixels
        "mask_probabilities": 4 * single,
    }[name]


def _filled(runs: Tensor, lengths: Tensor, size: tuple[int, int]) -> Tensor:
    """Run lengths [N, capacity] -> masks [N, W, H]."""
    rows = [np.repeat(np.arange(n) % 2, row[:n]) for row, n in zip(runs.cpu().numpy(), lengths.tolist(), strict=True)]
    return torch.from_numpy(np.stack(rows)).view(-1, size[1], size[0])


@pytest.mark.gpu
@each_call
def test_a_captured_call_equals_an_eager_one(name: str, seed: int) -> None:
    call, static = _made(name, seed, "cuda")
    call(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*static)
    for other in (seed + 1, seed + 2):
        tensors = _made(name, other, "cuda")[1]
        for target, source in zip(static, tensors, strict=True):
            target.copy_(source)
        for output in _outputs(result):
            output.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert _same(result, call(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_captured_gradients_equal_eager_ones(name: str, seed: int) -> None:
    call, tensors = _made(name, seed, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _, expected = _with_gradients(call, tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _, gradients = _with_gradients(call, tensors)
        for gradient in gradients:
            gradient.fill_(1)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(expected, gradients, strict=True):
        assert float((a - b).abs().max()) <= _summed_otherwise(a)


def _summed_otherwise(gradient: Tensor) -> float:
    """Atomic sums of a few hundred terms come in any order, and are rounded once more where they are kept in half."""
    last = 0 if gradient.dtype == torch.float32 else EPS[gradient.dtype]
    return (200 * EPS[torch.float32] + last) * float(gradient.abs().max())


@pytest.mark.gpu
def test_waiting_is_seen(no_waiting: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@pytest.mark.gpu
@each_call
def test_no_call_waits_for_the_device(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    call, tensors = _made(name, seed, "cuda")
    call(*tensors)  # compiles
    request.getfixturevalue("no_waiting")
    call(*tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_no_gradient_waits_for_the_device(
    name: str, deterministic: bool, seed: int, request: pytest.FixtureRequest
) -> None:
    if deterministic:
        if name == "roi_pool":
            pytest.skip("torch's own deterministic sums, which sort")
        request.getfixturevalue("deterministic")
    call, tensors = _made(name, seed, "cuda")
    _with_gradients(call, tensors)  # compiles
    request.getfixturevalue("no_waiting")
    _with_gradients(call, tensors)


@pytest.mark.gpu
@each_call
def test_a_call_runs_on_the_current_stream(name: str, seed: int) -> None:
    call, expected = _made(name, seed, "cuda")
    late = _made(name, seed + 1, "cuda")[1]
    wanted = call(*expected)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 25 ms, in which work on another stream would be done
        for target, source in zip(late, expected, strict=True):
            target.copy_(source)
        result = call(*late)
    torch.cuda.synchronize()
    assert _same(result, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_call
def test_tensors_on_another_device_than_the_current_one(name: str, seed: int) -> None:
    call, tensors = _made(name, seed, "cuda:1")
    torch.cuda.set_device(0)
    result = call(*tensors)
    assert torch.cuda.current_device() == 0
    assert all(output.device == tensors[0].device for output in _outputs(result))
    expected = call(*_made(name, seed, "cuda:0")[1])
    assert _same(tree_map_only(Tensor, Tensor.cpu, result), tree_map_only(Tensor, Tensor.cpu, expected))


@pytest.mark.gpu
@each_call
def test_new_sizes_compile_nothing(name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (160, 161):  # what is a multiple of 16 may be compiled apart, for it is read in wider pieces
        call, tensors = _made(name, seed, "cuda", side)
        call(*tensors)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for side in (144, 177, 208, 333):  # suppression, of as many boxes, takes smaller tiles for 128 boxes and fewer
        call, tensors = _made(name, seed, "cuda", side)
        call(*tensors)
    assert not list(tmp_path.rglob("*.ttir"))


@pytest.mark.gpu
@each_call
def test_calls_leak_nothing(name: str, seed: int) -> None:
    call, tensors = _made(name, seed, "cuda")

    def held() -> int:
        call(*tensors)
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated()

    held()  # constants that are made once
    before = held()
    for _ in range(5):
        held()
    assert held() == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["pyramid_roi_align", "pyramid_roi_align float16", "roi_align"])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype, device: str, seed: int) -> None:
    call, tensors = _made(name, seed, device)
    with torch.autocast(device, dtype):
        result, gradients = _with_gradients(call, tensors)
    wanted, expected = _with_gradients(call, tensors)
    assert result.dtype == wanted.dtype
    assert _same(result, wanted)
    for a, b in zip(expected, gradients, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= _summed_otherwise(a)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_repeat_when_asked_to(name: str, device: str, seed: int, request: pytest.FixtureRequest) -> None:
    call, tensors = _made(name, seed, device)
    _, default = _with_gradients(call, tensors)
    request.getfixturevalue("deterministic")
    _, first = _with_gradients(call, tensors)
    for _ in range(3):
        assert _same(first, _with_gradients(call, tensors)[1])
    for a, b in zip(default, first, strict=True):
        assert float((a - b).abs().max()) <= _summed_otherwise(a)


@pytest.mark.gpu
def test_deterministic_gradients_need_little_memory(deterministic: None, rng: torch.Generator) -> None:
    """torchvision's take H x W samples of every bin: 30 GB here (vision#8168)."""
    features = torch.randn(1, 256, 400, 400, generator=rng).cuda().requires_grad_()  # 164 MB
    boxes = torch.cat([torch.zeros(100, 1), _boxes(rng, 100, side=400)], 1).cuda()
    pooled = roi_align(features, boxes, 7, 1.0, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(pooled, features, torch.ones_like(pooled))
    assert torch.cuda.max_memory_allocated() - before < 4 * features.nbytes


def _needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * GIGABYTE:
        pytest.skip(f"needs {gigabytes} GB of free memory on the device, which has {free / GIGABYTE:.1f}")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_beyond_two_to_the_31_elements(layout: torch.memory_format, rng: torch.Generator) -> None:
    _needs_memory(24)
    images = (1 << 31) // (8 * 512 * 256) + 2
    input = torch.zeros(images, 8, 512, 256, dtype=torch.float16, device="cuda").to(memory_format=layout)
    input[-1] = torch.randn(8, 512, 256, generator=rng)
    boxes = _boxes(rng, 30, side=256).cuda()
    last = torch.full((30, 1), images - 1.0, device="cuda")
    first = torch.zeros_like(last)
    for op in (roi_align, roi_pool):
        pooled = op(input, torch.cat([last, boxes], 1), 7)
        assert pooled.abs().sum() > 0
        assert torch.equal(pooled, op(input[-1:].clone(memory_format=layout), torch.cat([first, boxes], 1), 7))


@pytest.mark.gpu
def test_gradients_beyond_two_to_the_31_elements(rng: torch.Generator) -> None:
    _needs_memory(40)
    images = (1 << 31) // (8 * 512 * 256) + 2
    shape = (images, 8, 512, 256)
    input = torch.zeros(shape, dtype=torch.float16, device="cuda").to(memory_format=torch.channels_last)
    boxes = _boxes(rng, 30, side=256).cuda()
    last = torch.full((30, 1), images - 1.0, device="cuda")
    grads = []
    for x, image in ((input, last), (input[-1:].clone(memory_format=torch.channels_last), torch.zeros_like(last))):
        x.requires_grad_()
        pooled = roi_align(x, torch.cat([image, boxes], 1), 7)
        grads.append(torch.autograd.grad(pooled, x, torch.ones_like(pooled))[0])
    assert float((grads[0][-1] - grads[1][0]).abs().max()) <= _summed_otherwise(grads[1])
    assert not grads[0][:-1].any()


@pytest.mark.gpu
def test_one_map_beyond_two_to_the_31_elements(rng: torch.Generator) -> None:
    """RoIs in its last corner pool what they pool from that corner alone."""
    _needs_memory(24)
    side, corner = 16_500, 256
    input = torch.zeros(1, 8, side, side, dtype=torch.float16, device="cuda").to(memory_format=torch.channels_last)
    part = torch.randn(1, 8, corner, corner, generator=rng).half().cuda()
    input[..., -corner:, -corner:] = part
    boxes = torch.cat([torch.zeros(30, 1), _boxes(rng, 30, side=corner).clamp(1, corner - 2)], 1).cuda()
    shift = torch.tensor([0, *[side - corner] * 4], device="cuda")
    pooled, expected = (roi_align(x, b, 7, 1.0, 2).float() for x, b in ((input, boxes + shift), (part, boxes)))
    error = roi_align_error(input, float(part.abs().max()))
    assert expected.abs().sum() > 0
    assert float((pooled - expected).abs().max()) <= 2 * error


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_masks_beyond_two_to_the_31_pixels(packed: bool, rng: torch.Generator) -> None:
    _needs_memory(6)
    count, side = (2100, 1024) if not packed else (2100, 2900)  # bytes beyond 2^31 in either
    masks = (0.5 + 0.5 * torch.rand(count, 28, 28, generator=rng)).cuda()
    boxes = _boxes(rng, count, side=side).cuda()
    pasted = paste_masks(masks, boxes, (side, side), rule=PasteRule.TORCHVISION, packed=packed)
    assert pasted.numel() > 1 << 31
    for i in (0, count // 2, count - 1):
        alone = paste_masks(masks[i : i + 1], boxes[i : i + 1], (side, side), rule=PasteRule.TORCHVISION, packed=packed)
        assert alone.any()
        assert torch.equal(pasted[i], alone[0])


@pytest.mark.parametrize("device", DEVICES)
def test_run_lengths_of_a_picture_of_almost_two_to_the_31_pixels(device: str, rng: torch.Generator) -> None:
    """A mask in its last corner starts where it starts."""
    height, width = 46_340, 46_340
    masks = torch.ones(1, 28, 28)
    box = torch.tensor([[width - 20.0, height - 10.0, width + 30.0, height + 30.0]])
    runs, lengths = masks_to_rle(
        masks.to(device), box.to(device), (height, width), rule=PasteRule.DETECTRON2, capacity=100
    )
    expected = [(width - 20) * height + height - 10]
    for _ in range(19):
        expected += [10, height - 10]
    assert runs[0, : lengths[0]].tolist() == [*expected, 10]


@pytest.mark.parametrize("device", DEVICES)
def test_more_rois_than_an_axis_of_a_grid(device: str, rng: torch.Generator) -> None:
    """An axis y or z ends at 65535 programs."""
    count = 70_000
    features = [x[:1, :4].to(device) for x in _levels(rng, 64)]
    boxes = _boxes(rng, 1, count, side=64).to(device)
    rois = torch.cat([torch.zeros(count, 1, device=device), boxes[0]], 1)

    def pooled(start: int, end: int) -> list[Tensor]:
        part, own = boxes[:, start:end].contiguous(), rois[start:end]
        options = {"output_size": 2, "sampling_ratio": 2, "aligned": True}
        pyramid = pyramid_roi_align(features, part, STRIDES, **options)
        return [pyramid[0], roi_align(features[0], own, 2), roi_pool(features[0], own, 2)]

    error = roi_align_error(features[0], float(features[0].abs().max()))
    for whole, *parts in zip(pooled(0, count), pooled(0, count // 2), pooled(count // 2, count), strict=True):
        assert float((whole - torch.cat(parts)).abs().max()) <= error
        assert float(whole[-1000:].abs().sum()) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_more_segments_than_an_axis_of_a_grid(device: str, rng: torch.Generator) -> None:
    segments, part = (70_000, 30_000) if device == "cuda" else (700, 300)  # on a CPU they are taken one by one
    boxes, scores = _boxes(rng, segments, 3, side=8).to(device), torch.rand(segments, 3, generator=rng).to(device)
    keep, count = segmented_nms(boxes, scores, 0.1, 2)
    parts = [segmented_nms(b, s, 0.1, 2) for b, s in zip(boxes.split(part), scores.split(part), strict=True)]
    assert torch.equal(keep, torch.cat([kept for kept, _ in parts]))
    assert torch.equal(count, torch.cat([found for _, found in parts]))
    assert set(count.tolist()) == {1, 2}


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 4097, 20_000])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_indices_of_suppression_are_those_of_a_cpu(count: int, threshold: float, rng: torch.Generator) -> None:
    boxes = _boxes(rng, count // 8 + 1, side=1000).repeat(8, 1)[:count]
    boxes = boxes + 4 * torch.randn(boxes.shape, generator=rng)
    scores = (torch.rand(len(boxes), generator=rng) * count).floor() / count  # a third of them tied
    labels = torch.randint(5, (len(boxes),), generator=rng)
    there = [x.cuda() for x in (boxes, scores, labels)]
    assert torch.equal(nms(*there[:2], threshold).cpu(), nms(boxes, scores, threshold))
    assert torch.equal(batched_nms(*there, threshold).cpu(), batched_nms(boxes, scores, labels, threshold))
    for max_keep in (100, 1000):
        got = segmented_nms(*(x[None] for x in there[:2]), threshold, max_keep)
        assert _same([x.cpu() for x in got], segmented_nms(boxes[None], scores[None], threshold, max_keep))


@pytest.mark.gpu
def test_a_model_finds_on_a_gpu_what_it_finds_on_a_cpu() -> None:
    """One that has learned: random weights make of a rounding a thousand times as much."""
    pictures = photographs((240, 320), 3)
    people = load_model("people")
    ours, theirs = (Predictor(people, device=device, score=0.05).predict(pictures) for device in ("cuda", "cpu"))
    assert sum(map(len, theirs)) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert differences(of_result(a), of_result(b)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_a_fused_convolution_reads_nothing_of_where_it_writes(
    side: int, stride: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Its residual of nothing is the memory of its result, times zero: that may hold a NaN."""
    x, weight = torch.randn(1, 64, 40, 40, generator=rng), torch.randn(64, 64, side, side, generator=rng)
    x, weight = (t.to("cuda", dtype, memory_format=torch.channels_last) for t in (x, weight))
    bias = torch.zeros(64, dtype=dtype, device="cuda")
    shape = 1, 64, 40 // stride, 40 // stride
    junk = [torch.full(shape, torch.nan, dtype=dtype, device="cuda") for _ in range(64)]
    del junk
    found = conv_relu(x, weight, bias, stride=(stride, stride), padding=(side // 2, side // 2))
    assert found.shape == shape
    assert found.isfinite().all()
