"""What shows of prediction on a GPU alone: recorded graphs, streams, waiting, memory.

What a recorder's user does right or wrong shows without a GPU too: see `test_capture.py`.
"""

import gc
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from matching import differences, of_result, same
from models import SMALL, VARIANTS, small_model
from trimask import Predictor, Result
from trimask.engine.inference import capture
from trimask.engine.inference.capture import CudaRecorder, GraphRunner
from trimask.engine.inference.timing import Stopwatch
from trimask.engine.model.config import MaskRCNNConfig

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:.*without a CUDA graph")]

STAGES = ["decode", "preprocess", "backbone", "proposals", "boxes", "masks", "run lengths", "copy"]
SIZES = [(90, 120), (64, 200), (130, 70)]
LONG = 50_000_000  # cycles of the device: some 25 ms


@pytest.fixture(autouse=True)
def _graphs_whatever_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among other processes on the same device a timing says little."""
    monkeypatch.setattr(capture, "NOISE", math.inf)


def pictures(np_rng: np.random.Generator, number: int) -> list[np.ndarray]:
    return [np_rng.integers(0, 256, (*SIZES[i % 3], 3), dtype=np.uint8) for i in range(number)]


def predictor(capture: bool = True, config: MaskRCNNConfig = SMALL, **options: Any) -> Predictor:
    return Predictor(small_model(config), device="cuda", capture=capture, **options)


def all_same(a: list[Result], b: list[Result]) -> bool:
    """Bit by bit; in some pictures there may be nothing."""
    return (
        len(a) == len(b)
        and any(map(len, b))
        and all(same(x, y) or len(x) == len(y) == 0 for x, y in zip(a, b, strict=True))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_recorded_call_equals_an_eager_one(dtype: torch.dtype, batch_size: int, np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 6)
    recorded, eager = (predictor(capture, dtype=dtype) for capture in (True, False))
    for options in ({}, {"max_detections": 5}):
        wanted = eager.predict(some, batch_size=batch_size, **options)
        for _ in range(2):
            assert all_same(recorded.predict(some, batch_size=batch_size, **options), wanted)
    assert len(recorded._runner) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_recorded_call_equals_an_eager_one_for_every_kind_of_model(
    config: MaskRCNNConfig, dtype: torch.dtype, np_rng: np.random.Generator
) -> None:
    some = pictures(np_rng, 3)
    wanted = predictor(False, config, dtype=dtype).predict(some)
    recorded = predictor(True, config, dtype=dtype)
    for _ in range(2):
        assert all_same(recorded.predict(some), wanted)
    assert len(recorded._runner) == 3


@pytest.mark.parametrize("capture", [False, True])
def test_an_autocast_of_the_caller_changes_nothing(capture: bool, np_rng: np.random.Generator) -> None:
    some, ours = pictures(np_rng, 2), predictor(capture)
    wanted = ours.predict(some)
    with torch.autocast("cuda", torch.float16):
        assert all_same(ours.predict(some), wanted)
        assert all_same(predictor(capture).predict(some), wanted)


@pytest.mark.parametrize("capture", [False, True])
def test_masks_of_what_has_been_found_alone(capture: bool, np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 3)
    whole, trimmed = predictor(False), predictor(capture, trim_masks=True)
    for limits in ({}, {"score": 0.5}, {"score": 0.9}, {"score": 1.0}):
        for _ in range(2):
            pairs = zip(trimmed.predict(some, **limits), whole.predict(some, **limits), strict=True)
            for ours, theirs in pairs:
                assert differences(of_result(ours), of_result(theirs)) == []


def test_graphs_are_the_default(np_rng: np.random.Generator) -> None:
    default = Predictor(small_model(), device="cuda")
    default.predict(pictures(np_rng, 1)[0])
    assert len(default._runner) == 1


@pytest.mark.parametrize("capture", [False, True])
def test_no_call_waits_for_the_device(
    capture: bool, np_rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    some = pictures(np_rng, 3)
    ours = predictor(capture)
    ours.predict(some)  # compiles and records
    request.getfixturevalue("no_waiting")
    results = ours.predict(some)
    assert all(len(result) > 0 for result in results)


@pytest.mark.parametrize("capture", [False, True])
def test_submitting_returns_before_the_device_is_done(capture: bool, np_rng: np.random.Generator) -> None:
    some = [(read, 0.0) for read in map(_picture, pictures(np_rng, 1))]
    ours = predictor(capture)
    limits = ours.config.detection
    wanted = ours._submit(some, limits).results()
    torch.cuda.synchronize()
    torch.cuda._sleep(4 * LONG)
    behind = torch.cuda.Event()
    behind.record()
    pending = ours._submit(some, limits)
    assert not behind.query()
    assert all_same(pending.results(), wanted)


def _picture(array: np.ndarray) -> Any:
    from trimask.engine.pictures.reading import Picture

    return Picture(array)


def test_stages_are_timed_inside_the_graph(np_rng: np.random.Generator) -> None:
    (picture,) = pictures(np_rng, 1)
    for ours in (predictor(True), predictor(False)):
        ours.predict(picture)
        timings = ours.predict(picture).timings
        if torch.version.hip and ours._runner is not None:
            assert list(timings) == ["decode", "preprocess", "network", "copy"]
        else:
            assert list(timings) == STAGES
        assert all(spent >= 0 for spent in timings.values())
        assert timings.get("backbone", 1) > 0


def test_threads_get_their_own_results(np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 6)
    ours = predictor(capture_cache=2)
    wanted = predictor(False).predict(some)
    start = threading.Barrier(2)

    def work(thread: int) -> list[Result]:
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            return [ours.predict(some[(i + thread) % 6]) for i in range(30)]

    with ThreadPoolExecutor(2) as pool:
        for thread, results in enumerate(pool.map(work, range(2))):
            assert all(same(result, wanted[(i + thread) % 6]) for i, result in enumerate(results))


def test_streams_take_turns(np_rng: np.random.Generator) -> None:
    """The first call is held up on its stream, the second is not, and both use the same graph."""
    first, second = ([(_picture(x), 0.0)] for x in pictures(np_rng, 4)[::3])
    ours = predictor()
    limits = ours.config.detection
    wanted = [ours._submit(batch, limits).results() for batch in (first, second)]
    assert len(ours._runner) == 1
    torch.cuda.synchronize()
    for _ in range(3):
        pendings = []
        for batch, held_up in ((first, LONG), (second, 0)):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(held_up)
                pendings.append(ours._submit(batch, limits))
        for pending, results in zip(reversed(pendings), reversed(wanted), strict=True):
            assert all_same(pending.results(), results)


def test_two_predictors_at_once(np_rng: np.random.Generator) -> None:
    """Each captures while the other replays, allocates and waits."""
    some = pictures(np_rng, 6)
    models = [small_model(seed=seed) for seed in (3, 4)]
    wanted = [Predictor(model, device="cuda", capture=False).predict(some) for model in models]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            fresh = [Predictor(model, device="cuda") for model in models]
            for got, expected in zip(pool.map(lambda p: p.predict(some), fresh), wanted, strict=True):
                assert all_same(got, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_graphs_come_and_go(size: int, np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 3)
    wanted = predictor(False).predict(some)
    ours = predictor(capture_cache=size)
    ours._runner.patience = 0
    for _ in range(5):
        assert all_same(ours.predict(some), wanted)
        assert len(ours._runner) == size


def test_results_survive_the_next_calls(np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 6)
    ours = predictor()
    first = ours.predict(some[0])
    kept = [array.copy() for array in (first.boxes, first.scores, first.labels, *first.runs)]
    for picture in some:
        ours.predict(picture)
    for array, copy in zip((first.boxes, first.scores, first.labels, *first.runs), kept, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_workers_change_no_result(batch_size: int, np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 13)
    ours = predictor()
    wanted = ours.predict(some, batch_size=batch_size)
    for _ in range(3):
        assert all_same(ours.predict(some, batch_size=batch_size, workers=3), wanted)
    on_device = (torch.from_numpy(x).permute(2, 0, 1).cuda() for x in some)
    assert all_same(ours.predict(on_device, batch_size=batch_size, workers=3), wanted)


def test_an_abandoned_stream_harms_nobody(np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 13)
    wanted = predictor(False).predict(some)
    for _ in range(5):
        ours = predictor()
        stream = ours.predict(some, stream=True, workers=3)
        assert same(next(stream), wanted[0])
        stream.close()
        del ours, stream
        gc.collect()
    assert all_same(predictor().predict(some), wanted)


def test_memory_stays_as_it_is_over_calls_of_any_size(np_rng: np.random.Generator) -> None:
    ours = predictor(capture_cache=4)

    def some(number: int) -> None:
        for size in np_rng.integers(20, 300, (number, 2)):
            ours.predict(np_rng.integers(0, 256, (*size, 3), dtype=np.uint8))

    some(100)
    gc.collect()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    some(200)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - allocated < 32 << 20  # the inputs and outputs of other graphs
    assert torch.cuda.memory_reserved() - reserved < 256 << 20


class Sum(NamedTuple):
    total: Tensor


def test_what_waits_runs_without_a_graph_and_spoils_no_other() -> None:
    waits = [True]

    def function(x: Tensor, mark: Callable[[str], None]) -> Sum:
        return Sum(x.sum() + (x.sum().item() if waits[0] else 0))

    run = GraphRunner(function, CudaRecorder(torch.device("cuda", torch.cuda.current_device())))

    def total(width: int) -> float:
        return float(run((torch.ones(width, device="cuda"),), (), Stopwatch()).total)

    waits[0] = False
    assert total(3) == 3
    waits[0], stream = True, torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="run without a CUDA graph"):
        assert total(4) == 8
    assert torch.cuda.current_stream() == stream
    assert total(4) == 8
    waits[0] = False
    for _ in range(2):
        assert (total(3), total(4), total(5), total(6)) == (3, 4, 5, 6)
    assert len(run) == 3


def test_a_graph_slower_than_its_kernels_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = GraphRunner(
        lambda x, mark: Sum(x.sum()), CudaRecorder(torch.device("cuda", torch.cuda.current_device())), size=2
    )

    def milliseconds(enqueue: Callable[[], Any]) -> float:
        enqueue()
        return 10.0 if isinstance(getattr(enqueue, "__self__", None), torch.cuda.CUDAGraph) else 1.0

    with monkeypatch.context() as patch:
        patch.setattr(capture, "NOISE", 0.1)
        patch.setattr(capture, "_milliseconds", milliseconds)
        with pytest.warns(UserWarning, match="a graph takes 10 ms, its kernels one by one 1 ms"):
            assert float(run((torch.ones(3, device="cuda"),), (), Stopwatch()).total) == 3
    assert len(run) == 0
    for width in (3, 4):
        assert float(run((torch.ones(width, device="cuda"),), (), Stopwatch()).total) == width
    assert len(run) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_outlives_the_thread_that_asked_for_it(dtype: torch.dtype, np_rng: np.random.Generator) -> None:
    some = pictures(np_rng, 3)
    ours, eager = (predictor(capture, dtype=dtype) for capture in (True, False))
    wanted = eager.predict(some)
    thread = threading.Thread(target=ours.predict, args=(some,))
    thread.start()
    thread.join()
    gc.collect()
    torch.cuda.empty_cache()
    for _ in range(3):
        assert all_same(ours.predict(some), wanted)


@pytest.mark.parametrize("capture", [False, True])
def test_memory_stays_as_it_is_over_calls_with_workers(capture: bool, np_rng: np.random.Generator) -> None:
    ours, some = predictor(capture), pictures(np_rng, 6)
    for _ in range(3):
        ours.predict(some, workers=2)
    gc.collect()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(20):
        ours.predict(some, workers=2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == reserved


def test_a_product_of_matrices_on_another_stream_is_not_disturbed() -> None:
    """A graph has cuBLAS's workspace to itself: work on the stream that it was captured on does not reach it."""
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    a = torch.randn(512, 8192, device="cuda")
    run = GraphRunner(lambda x, mark: Sum(x @ a.T), recorder)
    x = torch.randn(8, 8192, device="cuda")
    wanted = run((x,), (), Stopwatch()).total
    for _ in range(20):
        with torch.cuda.stream(recorder.stream):
            for _ in range(5):
                _ = (x + 1) @ a.T
        assert torch.equal(run((x,), (), Stopwatch()).total, wanted)
