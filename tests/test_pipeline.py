"""Throughput: order, how far the source is read ahead, bad pictures, errors, threads that end, overlap."""

import gc
import itertools
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import small_model
from recording import fix_shapes, recorded_predictor
from trimask import Predictor
from trimask.engine.inference.pipeline import Pipeline
from trimask.engine.pictures.reading import PictureError

WORKERS = [0, 1, 3]
each_number_of_workers = pytest.mark.parametrize("workers", WORKERS)


class Line:
    """A pipeline of numbers: the steps say what they did, and take a moment where they are told to."""

    def __init__(self, workers: int, batch_size: int = 2, naps: tuple[float, float, float] = (0, 0, 0)) -> None:
        self.naps = naps
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.lanes = 0
        self.device = threading.Lock()
        self.pipeline: Pipeline[Any, Any] = Pipeline(
            self.read,
            self.submit,
            self.finish,
            lambda item, error: f"{item}: {error}",
            batch_size=batch_size,
            workers=workers,
            lanes=self.lane,
        )

    def run(self, items: Any) -> Iterator[Any]:
        return self.pipeline.run(items)

    def read(self, item: int) -> Any:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.naps[0] * (1 + item % 3))  # later ones are done earlier
        if item % 10 == 7:
            raise PictureError("a bad picture")
        return item

    def lane(self) -> Any:
        self.lanes += 1
        return nullcontext()

    def submit(self, decoded: list[tuple[int, float]]) -> list[int]:
        assert all(spent >= 0 for _, spent in decoded)
        self.threads.add(threading.current_thread().name)
        assert self.device.acquire(blocking=False), "two batches are being submitted"
        time.sleep(self.naps[1])
        self.batches.append([item for item, _ in decoded])
        self.device.release()
        return [item for item, _ in decoded]

    def finish(self, handle: list[int]) -> list[int]:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.naps[2] * (1 + handle[0] % 3))
        return [item * 10 for item in handle]


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("trimask-")]


@each_number_of_workers
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 1, 5, 23])
@pytest.mark.filterwarnings("ignore:a bad picture")
def test_results_come_in_order(workers: int, batch_size: int, number: int) -> None:
    line = Line(workers, batch_size, naps=(1e-3, 1e-3, 1e-3))
    wanted = [f"{i}: a bad picture" if i % 10 == 7 else i * 10 for i in range(number)]
    assert list(line.run(range(number))) == wanted
    assert list(itertools.chain(*line.batches)) == [i for i in range(number) if i % 10 != 7]
    assert line.lanes == len(line.batches)
    assert ours() == []


def test_without_workers_everything_happens_here() -> None:
    line = Line(0)
    list(line.run(range(5)))
    assert line.threads == {threading.current_thread().name}


def test_the_steps_have_threads_of_their_own() -> None:
    line = Line(2, naps=(2e-3, 0, 2e-3))
    list(line.run(range(6)))
    assert {name.rsplit("_", 1)[0] for name in line.threads} == {"trimask-decode", "trimask-device", "trimask-results"}
    assert threading.current_thread().name not in line.threads


@each_number_of_workers
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_endless_source_is_read_no_further_ahead_than_the_bound(workers: int, batch_size: int) -> None:
    line, taken = Line(workers, batch_size), itertools.count()
    results = line.run(iter(taken.__next__, 7))  # 7 never comes: it is the one that stops
    bound = (3 + -(-workers // batch_size) if workers else 1) * batch_size
    for handed_out in range(1, 7):
        assert next(results) == (handed_out - 1) * 10
        time.sleep(5e-3)  # for anything that reads on by itself
        in_hand = -(-handed_out // batch_size) * batch_size
        assert int(repr(taken)[6:-1]) <= in_hand - batch_size + bound
    results.close()


def test_a_slow_caller_fills_no_memory() -> None:
    """What has been decoded and not been handed out is bounded too."""
    alive, most = [0], [0]

    class Counted:
        def __init__(self) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    pipeline: Pipeline[Any, Any] = Pipeline(
        lambda item: Counted(),  # type: ignore[arg-type,return-value]
        lambda decoded: [one for one, _ in decoded],
        list,
        lambda item, error: None,
        batch_size=2,
        workers=2,
        lanes=nullcontext,
    )
    for number, _ in enumerate(pipeline.run(itertools.count())):
        time.sleep(1e-3)
        if number == 60:
            break
    assert most[0] <= 2 * (pipeline.depth + 2)


@each_number_of_workers
def test_bad_pictures_warn_in_the_callers_thread(workers: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = list(Line(workers, 3).run([6, 7, 17, 27, 37, 8]))  # one batch of none but bad ones
    assert results == [60, *(f"{i}: a bad picture" for i in (7, 17, 27, 37)), 80]
    assert len(caught) == 4


@each_number_of_workers
@pytest.mark.parametrize("number", [0, 5, 6])
def test_an_error_of_the_source_comes_after_what_came_before_it(workers: int, number: int) -> None:
    def source() -> Iterator[int]:
        yield from range(number)
        raise KeyError("the source")

    got, results = [], Line(workers).run(source())
    for _ in range(number):
        got.append(next(results))
    with pytest.raises(KeyError, match="the source"):
        next(results)
    assert got == [10 * i for i in range(number)]
    assert ours() == []


@each_number_of_workers
@pytest.mark.parametrize("step", ["read", "submit", "finish"])
def test_an_error_of_a_step_is_raised_and_ends_the_threads(workers: int, step: str) -> None:
    line = Line(workers)

    def broken(argument: Any) -> Any:
        raise ZeroDivisionError(step)

    setattr(line.pipeline, step, broken)
    with pytest.raises(ZeroDivisionError, match=step):
        list(line.run(itertools.count()))
    assert ours() == []


@pytest.mark.parametrize("how", ["close", "forget", "break"])
def test_an_abandoned_stream_ends_its_threads(how: str) -> None:
    results = Line(3, naps=(1e-3, 1e-3, 1e-3)).run(itertools.count(20))
    next(results)
    assert ours()
    if how == "close":
        results.close()
    elif how == "break":
        for _ in results:
            break
    del results
    gc.collect()
    assert ours() == []


def test_a_stream_never_begun_has_no_threads_and_reads_nothing() -> None:
    taken = itertools.count()
    results = Line(3).run(taken)
    assert ours() == []
    assert repr(taken) == "count(0)"
    results.close()


def test_the_steps_overlap() -> None:
    """Five of ten milliseconds each in three steps: one after the other takes 150 ms and more."""
    begin = time.perf_counter()
    list(Line(5, 1, naps=(5e-3, 1e-2, 5e-3)).run([0, 3, 6, 9, 12, 15, 18, 21, 24, 30]))
    alone = time.perf_counter()
    list(Line(0, 1, naps=(5e-3, 1e-2, 5e-3)).run([0, 3, 6, 9, 12, 15, 18, 21, 24, 30]))
    both = time.perf_counter() - begin
    assert alone - begin < 0.95 * (both - (alone - begin))


# With a model.


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small_model(), device="cpu")


@pytest.fixture
def folder(tmp_path: Path, np_rng: np.random.Generator) -> Path:
    for i in range(7):
        size = ((90, 120), (64, 200), (130, 70))[i % 3]
        Image.fromarray(np_rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("recorded", [False, True])
def test_workers_change_no_result(
    folder: Path, batch_size: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(small_model(), device="cpu")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"4\.png"):
        wanted = predictor.predict(folder, batch_size=batch_size)
    if recorded:
        fix_shapes(monkeypatch)
        recorded_predictor(predictor, size=2)
    with pytest.warns(UserWarning, match=r"4\.png"):
        got = predictor.predict(folder, batch_size=batch_size, workers=2, run_lengths=True)
    assert [result.path.name for result in got] == [f"{i}.png" for i in range(7)]
    for a, b in zip(got, wanted, strict=True):
        assert (a.error is None) == (b.error is None) == (len(a) > 0)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
        np.testing.assert_array_equal(a.labels, b.labels)
        if not recorded and len(a):
            assert a.rle() == b.rle()


def test_run_lengths_are_made_where_they_are_asked_for(predictor: Predictor, folder: Path) -> None:
    for options in ({}, {"workers": 2}):
        assert all("runs" in vars(result) for result in predictor.predict(folder, run_lengths=True, **options))
        assert not any("runs" in vars(result) for result in predictor.predict(folder, **options))


def test_timings_are_those_of_a_call_without_workers(predictor: Predictor, folder: Path) -> None:
    for result in predictor.predict(folder, workers=2):
        assert list(result.timings) == ["decode", "preprocess", "backbone", "proposals", "boxes", "masks", "copy"]


def test_workers_out_of_range_are_named(predictor: Predictor, folder: Path) -> None:
    with pytest.raises(ValueError, match="workers: expected a whole number of at least 0, got -1"):
        predictor.predict(folder, workers=-1)
