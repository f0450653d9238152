"""Recording and replaying, on a recorder that needs no GPU: what is kept, whose results are whose, what is given up."""

import gc
import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from matching import same
from models import SMALL, small_model
from recording import FakeRecorder, fix_shapes, recorded_predictor
from trimask import Predictor
from trimask.engine.inference import capture
from trimask.engine.inference.capture import CudaRecorder, GraphRunner, run_eagerly
from trimask.engine.inference.timing import Stopwatch


class Sums(NamedTuple):
    scaled: Tensor
    nothing: None
    total: Tensor


def sums(x: Tensor, y: Tensor, factor: int, mark: Callable[[str], None]) -> Sums:
    scaled = factor * x + y
    mark("scaling")
    total = scaled.sum().view(1)
    mark("sum")
    return Sums(scaled, None, total)


def runner(recorder: FakeRecorder, **options: int) -> GraphRunner:
    return GraphRunner(sums, recorder, **options)


def call(run: GraphRunner, width: int, value: float, factor: int = 2) -> Sums:
    return run((torch.full((2, width), value), torch.ones(2, width)), (factor,), Stopwatch())


def is_right(got: Sums, width: int, value: float, factor: int = 2) -> bool:
    wanted = torch.full((2, width), factor * value + 1)
    return type(got) is Sums and torch.equal(got.scaled, wanted) and got.total.item() == wanted.sum()


def test_a_replay_gives_what_the_function_gives() -> None:
    recorder = FakeRecorder()
    run = runner(recorder)
    for value in (1.0, 2.0, 3.0):
        assert is_right(call(run, 4, value), 4, value)
    assert recorder.records == 1


def test_shapes_and_options_have_recordings_of_their_own() -> None:
    recorder = FakeRecorder()
    run = runner(recorder)
    for _ in range(2):
        for width, factor in ((4, 2), (5, 2), (4, 3)):
            assert is_right(call(run, width, 1.5, factor), width, 1.5, factor)
    assert recorder.records == len(run) == 3


@pytest.mark.parametrize(
    "switch",
    [
        lambda on: torch.use_deterministic_algorithms(on, warn_only=True),
        lambda on: setattr(torch.backends.cudnn, "allow_tf32", not on),
        lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
        lambda on: setattr(torch.backends.cudnn, "enabled", not on),
        lambda on: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", not on),
        lambda on: os.environ.update(TRIMASK_KERNELS="torch" if on else "auto"),
    ],
    ids=["deterministic", "convolutions", "products", "cudnn", "sums", "kernels"],
)
def test_what_a_program_switches_is_recorded_anew(
    switch: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMASK_KERNELS", "auto")
    recorder = FakeRecorder()
    run = runner(recorder)
    try:
        for on, records in ((False, 1), (True, 2), (False, 2), (True, 2)):
            switch(on)
            assert is_right(call(run, 4, 1.0), 4, 1.0)
            assert recorder.records == records
    finally:
        switch(False)


def test_results_outlive_the_next_call_and_the_inputs_are_left_alone() -> None:
    run = runner(FakeRecorder())
    x = torch.full((2, 4), 1.0)
    first = run((x, torch.ones(2, 4)), (2,), Stopwatch())
    second = call(run, 4, 9.0)
    assert is_right(first, 4, 1.0)
    assert is_right(second, 4, 9.0)
    assert torch.equal(x, torch.full((2, 4), 1.0))
    x.fill_(5)  # the caller's to change
    assert is_right(call(run, 4, 9.0), 4, 9.0)


def test_the_one_not_used_for_longest_goes() -> None:
    recorder = FakeRecorder()
    run = runner(recorder, size=2, patience=0)
    for width, records in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (1, 4), (3, 5)):
        assert is_right(call(run, width, 1.0), width, 1.0)
        assert recorder.records == records, width
        assert len(run) <= 2
    assert recorder.waits == 3  # none goes while the device may be at it


def test_what_has_gone_is_let_go() -> None:
    run = runner(FakeRecorder(), size=1, patience=0)
    call(run, 1, 1.0)
    (slot,) = run._slots.values()
    gone = weakref.ref(slot.recording)
    del slot
    call(run, 2, 1.0)
    gc.collect()
    assert gone() is None


def test_very_many_shapes_are_not_recorded_again_and_again() -> None:
    recorder = FakeRecorder()
    run = runner(recorder, size=4, patience=50)
    for i in range(200):
        width = 1 + i % 20
        assert is_right(call(run, width, i), width, i)
    assert 4 + 2 <= recorder.records <= 4 + 4
    new = recorder.records
    for i in range(60):  # from now on the same one
        assert is_right(call(run, 30, i), 30, i)
    assert recorder.records == new + 1


def test_what_cannot_be_recorded_runs_with_one_warning() -> None:
    recorder = FakeRecorder(RuntimeError("operation not permitted when stream is capturing"))
    run = runner(recorder)
    with pytest.warns(UserWarning, match=r"\(2, 4\), \(2, 4\) run without a CUDA graph.*RuntimeError.*not permitted"):
        assert is_right(call(run, 4, 1.0), 4, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_right(call(run, 4, 2.0), 4, 2.0)
    assert (recorder.records, len(run)) == (1, 0)
    assert [slot.inputs for slot in run._slots.values()] == [()]  # no memory is kept for it
    recorder.trouble = None  # other shapes may be luckier
    assert is_right(call(run, 5, 2.0), 5, 2.0)
    assert len(run) == 1


def test_an_error_of_the_function_itself_is_raised() -> None:
    def broken(x: Tensor, mark: Callable[[str], None]) -> Sums:
        raise ZeroDivisionError("its own")

    run = GraphRunner(broken, FakeRecorder())
    with pytest.warns(UserWarning, match="ZeroDivisionError"), pytest.raises(ZeroDivisionError, match="its own"):
        run((torch.ones(1),), (), Stopwatch())


def test_threads_get_their_own_results() -> None:
    recorder = FakeRecorder()
    run = runner(recorder, size=2, patience=0)
    start = threading.Barrier(4)

    def some(thread: int) -> list[bool]:
        start.wait()
        calls = [(1 + (thread + i) % 3, 100.0 * thread + i) for i in range(25)]
        got = [(call(run, width, value), width, value) for width, value in calls]
        return [is_right(*one) for one in got]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(some, range(4)))


def test_stages_are_those_of_this_call_or_of_none() -> None:
    run = runner(FakeRecorder())
    first, second = Stopwatch(), Stopwatch()
    inputs = torch.ones(2, 4), torch.ones(2, 4)
    for watch in (first, second):
        watch.mark("before")
        run(inputs, (2,), watch)
        watch.mark("copy")
    assert list(second.milliseconds()) == ["before", "scaling", "sum", "copy"]
    assert list(first.milliseconds()) == ["before", "network", "copy"]  # the second replay has taken its marks
    assert second.milliseconds()["copy"] > 0.9  # copies in and out, and the nap of the fake


def test_a_runner_goes_only_when_the_device_is_done() -> None:
    recorder = FakeRecorder()
    run = runner(recorder)
    call(run, 1, 1.0)
    del run
    gc.collect()
    assert recorder.waits == 1


class Some(NamedTuple):
    first: Tensor
    number: Tensor
    whole: Tensor


def some_of(outputs: Sums, factor: int) -> tuple[int, Callable[[Callable[[str], None]], Some]]:
    """As many columns as the total says: twice one, where the inputs are ones and a number of columns."""
    columns = int(outputs.total) % 5 + 1

    def take(mark: Callable[[str], None]) -> Some:
        taken = outputs.scaled[:, :columns] * 10
        mark("taking")
        return Some(taken, outputs.total, outputs.scaled)

    return columns, take


def test_a_second_part_has_recordings_by_what_the_first_has_found() -> None:
    recorder = FakeRecorder()
    run = GraphRunner(sums, recorder, size=1, patience=0, then=some_of)
    keys = set()
    for _ in range(2):
        results = []
        for value in (0.0, 1.0, 2.0, 3.0, 4.0):
            x, watch = torch.full((2, 6), value), Stopwatch()
            watch.mark("before")
            got = run((x, torch.ones(2, 6)), (2,), watch)
            watch.mark("copy")
            assert list(watch.milliseconds()) == ["before", "scaling", "sum", "taking", "copy"]
            keys.add(got.first.shape[1])
            results.append((got, run_eagerly(sums, some_of, (x, torch.ones(2, 6)), (2,), Stopwatch())))
        for got, wanted in results:  # none has been written over
            assert all(map(torch.equal, got, wanted))
    assert recorder.records == 1 + len(keys) > 2
    call(GraphRunner(sums, recorder, then=some_of), 4, 1.0)
    call(run, 5, 1.0)  # another first part: nothing is left of the parts of the old one
    assert sum(len(slot.later) for slot in run._slots.values()) == 1


def test_a_second_part_that_cannot_be_recorded_runs_as_it_is() -> None:
    recorder = FakeRecorder()
    run = GraphRunner(sums, recorder, then=some_of)
    wanted = run((torch.ones(2, 6), torch.ones(2, 6)), (2,), Stopwatch())
    run._slots.popitem()
    recorder.trouble_after = recorder.records + 1
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        got = run((torch.ones(2, 6), torch.ones(2, 6)), (2,), Stopwatch())
    assert all(map(torch.equal, got, wanted))
    assert len(run) == 1


class Pools:
    """A :class:`CudaRecorder` on a device that there is not, which tells the memory pool of each capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[int] = []
        self.slow = False
        numbers = itertools.count(1)
        for name, value in {
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "Event": MagicMock,
            "current_stream": MagicMock,
            "graph": self.graph,
            "graph_pool_handle": lambda: next(numbers),
            "stream": lambda _: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, value in {
            "_RECORDING": SimpleNamespace(submit=lambda *call: SimpleNamespace(result=partial(*call))),  # no thread
            "_capture_stream": MagicMock(),
            "_milliseconds": self.milliseconds,
            "_own_workspace": nullcontext,
            "_watch": lambda: None,
            "current_device": lambda _: nullcontext(),
        }.items():
            monkeypatch.setattr(capture, name, value)
        self.recorder = CudaRecorder(torch.device("cuda", 0))

    def replay(self) -> None:
        pass

    @contextmanager
    def graph(self, graph: object, pool: int, **_: object) -> Iterator[None]:
        self.used.append(pool)
        yield

    def milliseconds(self, enqueue: Callable[[], object]) -> float:
        enqueue()
        return 10.0 if self.slow and enqueue == self.replay else 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="would spoil the state of a device")
def test_recordings_share_a_pool_as_long_as_captures_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, kept, broken = Pools(monkeypatch), [], False

    def function(mark: Callable[[str], None]) -> Sums:
        if broken and len(pools.used) == before + 1:  # in the capture, after the runs ahead of it
            raise ZeroDivisionError
        return Sums(torch.zeros(1), None, torch.zeros(1))

    for outcome in ("good", "good", "slow", "good", "broken", "good", "slow", "good"):
        pools.slow, broken, before = outcome == "slow", outcome == "broken", len(pools.used)
        failure = RuntimeError if pools.slow else ZeroDivisionError
        with pytest.raises(failure) if pools.slow or broken else nullcontext():
            kept.append(pools.recorder.record(function))
    assert len(kept) == 5
    assert pools.used == [1, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would spoil the state of a device")
def test_what_a_failed_capture_made_is_let_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, made = Pools(monkeypatch), []

    def function(mark: Callable[[str], None]) -> Sums:
        total = torch.zeros(1)
        made.append(weakref.ref(total))
        if pools.used:
            raise ZeroDivisionError
        return Sums(total, None, total)

    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) as caught:
            pools.recorder.record(function)
        del caught
        assert [one() for one in made] == [None] * capture.WARMUPS + [None]
    finally:
        gc.enable()


@pytest.fixture
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_shapes(monkeypatch)


def pictures(np_rng: np.random.Generator, number: int) -> list[np.ndarray]:
    sizes = [(90, 120), (64, 200), (130, 70)]
    return [np_rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8) for i in range(number)]


def test_a_recorded_predictor_finds_the_same(np_rng: np.random.Generator, fixed_shapes: None) -> None:
    plain, recorded = Predictor(small_model(), device="cpu"), Predictor(small_model(), device="cpu")
    recorder = recorded_predictor(recorded)
    some = pictures(np_rng, 6)
    for options in ({}, {"max_detections": 5}, {"batch_size": 2}):
        for a, b in zip(recorded.predict(some, **options), plain.predict(some, **options), strict=True):
            assert same(a, b)
            assert a.mask_runs is not None
            assert a.mask_probabilities is None
    assert recorder.records == 3 + 3 + 2  # three padded sizes, twice, and two of pairs
    stages = ["preprocess", "backbone", "proposals", "boxes", "masks", "run lengths", "copy"]
    assert list(recorded.predict(some[0]).timings) == ["decode", *stages]


def test_masks_of_what_has_been_found_alone(np_rng: np.random.Generator, fixed_shapes: None) -> None:
    plain, trimmed, eager = (Predictor(small_model(), device="cpu") for _ in range(3))
    recorder = recorded_predictor(trimmed, trim_masks=True)
    eager._trim_masks = True
    (picture,) = pictures(np_rng, 1)
    scores = plain.predict(picture).scores
    rows, counts = set(), set()
    limits = {float(score) for score in scores[:: len(scores) // 5]} | {0.0}
    for limit in limits:
        wanted = plain.predict(picture, score=limit)
        counts.add(min(1 << max(len(wanted) - 1, 0).bit_length(), 100))
        for predictor in (trimmed, eager):
            got = predictor.predict(picture, score=limit)
            np.testing.assert_array_equal(got.boxes, wanted.boxes)
            np.testing.assert_array_equal(got.labels, wanted.labels)
            assert np.count_nonzero(got.masks ^ wanted.masks) <= 2 * len(got)  # fewer rows are summed otherwise
        rows |= {
            recording.outputs[2].shape[1]
            for slot in trimmed._runner._slots.values()
            for recording in slot.later.values()
        }
    assert rows == counts
    assert len(rows) >= 2
    assert recorder.records == 2 * len(limits)
    assert len(trimmed.predict(np.zeros((90, 120, 3), np.uint8), score=1.0)) == 0


def test_predictors_do_not_share_recordings(np_rng: np.random.Generator, fixed_shapes: None) -> None:
    plain = [Predictor(small_model(seed=seed), device="cpu") for seed in (3, 4)]
    recorded = [Predictor(small_model(seed=seed), device="cpu") for seed in (3, 4)]
    for predictor in recorded:
        recorded_predictor(predictor)
    (picture,) = pictures(np_rng, 1)
    wanted = [predictor.predict(picture) for predictor in plain]
    with ThreadPoolExecutor(2) as pool:
        for i, got in enumerate(pool.map(lambda i: recorded[i % 2].predict(picture), range(8))):
            np.testing.assert_array_equal(got.scores, wanted[i % 2].scores)


def test_a_mask_of_too_many_runs_leaves_its_picture_with_probabilities(np_rng: np.random.Generator) -> None:
    predictor, plain = Predictor(small_model(), device="cpu"), Predictor(small_model(), device="cpu")
    some = pictures(np_rng, 2)
    wanted = plain.predict(some, batch_size=2)
    most = [max(map(len, result.runs)) for result in wanted]
    assert most[0] != most[1]
    predictor._run_capacity = max(most) - 1
    got = predictor.predict(some, batch_size=2)
    assert [result.mask_runs is None for result in got] == [count == max(most) for count in most]
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


def test_boxes_only_take_the_same_way(np_rng: np.random.Generator, fixed_shapes: None) -> None:
    model = small_model(SMALL.__class__(**{**vars(SMALL), "mask_head": None}))
    plain, recorded = Predictor(model, device="cpu"), Predictor(model, device="cpu")
    recorded_predictor(recorded)
    (picture,) = pictures(np_rng, 1)
    a, b = recorded.predict(picture), plain.predict(picture)
    assert len(a) > 0
    np.testing.assert_array_equal(a.boxes, b.boxes)
    assert not a.has_masks


def test_warming_up_records(fixed_shapes: None) -> None:
    predictor = Predictor(small_model(), device="cpu")
    recorder = recorded_predictor(predictor)
    predictor.warmup((90, 120), 2)
    assert recorder.records == 1
    predictor.predict([np.zeros((90, 120, 3), np.uint8)] * 4, batch_size=2)
    assert recorder.records == 1


def test_a_coarser_multiple_needs_fewer_recordings(np_rng: np.random.Generator, fixed_shapes: None) -> None:
    fine = Predictor(small_model(), device="cpu")
    coarse = Predictor(small_model(), device="cpu", size_multiple=192)
    some = pictures(np_rng, 3)
    counts = []
    for predictor in (fine, coarse):
        recorder = recorded_predictor(predictor)
        assert all(len(result) > 0 for result in predictor.predict(some))
        counts.append(recorder.records)
    assert counts == [3, 1]
