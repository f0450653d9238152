"""The public face: every kind of source, batches with a bad item, options, threads."""

import gc
import io
import os
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trimask
from matching import same
from models import SMALL, small_model
from trimask import Predictor, Result
from trimask.engine.model.config import ResizeConfig
from trimask.engine.pictures.reading import PictureError


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small_model(), device="cpu")


@pytest.fixture
def picture(np_rng: np.random.Generator) -> np.ndarray:
    return np_rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, np_rng: np.random.Generator) -> Path:
    for i, size in enumerate([(90, 120), (64, 200), (130, 70)], start=1):
        Image.fromarray(np_rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_every_kind_of_source_gives_the_same(predictor: Predictor, picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    expected = predictor.predict(picture)
    sources = {
        "str": str(path),
        "path": path,
        "bytes": path.read_bytes(),
        "PIL": Image.fromarray(picture),
        "tensor": torch.from_numpy(picture).permute(2, 0, 1),
        "float tensor": torch.from_numpy(picture).permute(2, 0, 1).float() / 255,
        "strided": np.asfortranarray(picture),
        "read-only": np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.shape),
    }
    for kind, source in sources.items():
        result = predictor.predict(source)
        assert isinstance(result, Result), kind
        assert same(result, expected), kind
    assert same(predictor.predict(picture[..., ::-1], channel_order="bgr"), expected)
    assert same(predictor(picture), expected)


def test_a_result_says_what_it_is(predictor: Predictor, picture: np.ndarray) -> None:
    result = predictor.predict(picture)
    assert result.size == (90, 120)
    assert result.masks.shape == (len(result), 90, 120)
    assert set(result.names) <= {"cat", "dog", "bird"}
    ids = dict(zip(SMALL.class_names, SMALL.category_ids, strict=True))
    assert [ids[name] for name in result.names] == result.category_ids.tolist()
    assert list(result.timings) == ["decode", "preprocess", "backbone", "proposals", "boxes", "masks", "copy"]
    assert all(spent >= 0 for spent in result.timings.values())


def test_several_sources_give_several_results(predictor: Predictor, folder: Path) -> None:
    alone = [predictor.predict(folder / f"{i}.png") for i in (1, 2, 3)]
    for source in (folder, str(folder / "*.png"), [folder / "1.png", folder / "2.png", folder / "3.png"]):
        results = predictor.predict(source)
        assert isinstance(results, list)
        assert [result.path.name for result in results] == ["1.png", "2.png", "3.png"]
        assert all(same(a, b) for a, b in zip(results, alone, strict=True))
    assert isinstance(predictor.predict([folder / "1.png"]), list)


def test_one_batch_array_gives_several_results(predictor: Predictor, picture: np.ndarray) -> None:
    results = predictor.predict(np.stack([picture, picture]))
    assert len(results) == 2
    assert same(results[0], predictor.predict(picture))


def test_a_stream_reads_no_further_than_a_batch(predictor: Predictor, picture: np.ndarray) -> None:
    taken = []

    def pictures() -> Iterator[np.ndarray]:
        for i in range(100):
            taken.append(i)
            yield picture

    results = predictor.predict(pictures(), stream=True, batch_size=2)
    assert taken == []
    next(results)
    assert len(taken) == 2
    next(results)
    assert len(taken) == 2
    next(results)
    assert len(taken) == 4


def test_batches_keep_order_and_number(predictor: Predictor, folder: Path) -> None:
    for size in (1, 2, 3, 5):
        results = predictor.predict(folder, batch_size=size)
        assert [result.path.name for result in results] == ["1.png", "2.png", "3.png"]
        assert [result.size for result in results] == [(90, 120), (64, 200), (130, 70)]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_bad_picture_harms_no_other(predictor: Predictor, folder: Path, batch_size: int) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    sources = [folder / "1.png", folder / "2.png", folder / "missing.png", folder / "3.png", np.zeros((3, 3), complex)]
    with pytest.warns(UserWarning, match="expected") as warned:
        results = predictor.predict(sources, batch_size=batch_size)
    assert [result.error is None for result in results] == [True, False, False, True, False]
    assert len(warned) == 3
    assert "2.png" in str(results[1].error)
    assert "missing.png" in str(results[2].error)
    for result in results:  # without asking which are bad
        assert len(result.masks) == len(result.rle()) == len(result.polygons()) == len(result)
    assert len(results[1]) == 0
    with pytest.raises(ValueError, match=r"picture: .*2\.png"):
        results[1].plot()
    assert len(results[0]) > 0
    assert len(results[3]) > 0


class Broken:
    """An upload that breaks off."""

    def read(self) -> bytes:
        raise EOFError("after 12 bytes")


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


@pytest.mark.parametrize(
    "bad",
    [closed(), Broken(), torch.eye(4).to_sparse(), torch.zeros(3, 4, 4, device="meta")],
    ids=["closed", "broken", "sparse", "meta"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_harms_no_other(predictor: Predictor, picture: np.ndarray, bad: Any, workers: int) -> None:
    with pytest.raises(PictureError):
        predictor.predict(bad)
    with pytest.warns(UserWarning, match="expected"):
        first, second, third = predictor.predict([picture, bad, picture], workers=workers, batch_size=3)
    assert isinstance(second.error, PictureError)
    assert len(first) > 0
    assert same(first, third)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["array", "tensor", "nested", "bytes", "pil"])
def test_a_generator_may_fill_one_buffer_again(predictor: Predictor, workers: int, batch_size: int, kind: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 80, 3), dtype=np.uint8)

    def frames() -> Iterator[Any]:
        if kind == "bytes":
            for picture in pictures:
                Image.fromarray(picture).save(file := io.BytesIO(), "BMP")
                content[:] = file.getvalue()
                yield content
            return
        if kind == "pil":
            shown = Image.new("RGB", (80, 64))
            for picture in pictures:
                shown.paste(Image.fromarray(picture))
                yield shown
            return
        buffer = torch.empty(3, 64, 80, dtype=torch.uint8) if kind == "tensor" else np.empty((64, 80, 3), np.uint8)
        for picture in pictures:
            buffer[...] = torch.as_tensor(picture).permute(2, 0, 1) if kind == "tensor" else picture
            yield [buffer] if kind == "nested" else buffer

    content = bytearray()
    results = list(predictor.predict(frames(), stream=True, workers=workers, batch_size=batch_size))
    assert np.array_equal([result.picture for result in results], pictures)
    for result, expected in zip(results, predictor.predict(pictures, batch_size=batch_size), strict=True):
        assert same(result, expected)


@pytest.mark.parametrize("stream", [False, True])
def test_warnings_point_at_whoever_takes_the_results(predictor: Predictor, tmp_path: Path, stream: bool) -> None:
    with pytest.warns(UserWarning, match="nowhere") as caught:
        list(predictor.predict([tmp_path / "nowhere.png"], stream=stream))
    assert caught[0].filename == __file__


def test_a_broken_link_in_a_folder_is_told_of(predictor: Predictor, folder: Path) -> None:
    (folder / "4.png").symlink_to(folder / "gone.png")
    (folder / "5.png").symlink_to(folder)  # a folder
    for source in (folder, str(folder / "*.png")):
        with pytest.warns(UserWarning, match=r"4\.png") as caught:
            assert [result.error is None for result in predictor.predict(source)] == [True, True, True, False]
        assert len(caught) == 1


def test_a_single_bad_picture_raises(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        predictor.predict(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(PictureError, match=r"text\.png"):
        predictor.predict(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        predictor.predict(tmp_path / "*.jpg")


def test_limits_of_a_call_and_of_the_predictor(predictor: Predictor, picture: np.ndarray) -> None:
    everything = predictor.predict(picture)
    middle = float(np.unique(everything.scores)[-3])  # scores may be equal
    higher = predictor.predict(picture, score=middle)
    assert 2 <= len(higher) < len(everything)
    assert same(higher, everything.filter(score=np.nextafter(np.float32(middle), np.float32(1))))
    assert same(predictor.predict(picture, max_detections=3), everything[:3])
    strict = Predictor(small_model(), device="cpu", score=middle, max_detections=2)
    assert same(strict.predict(picture), higher[:2])


def test_resize_changes_the_network_frame_alone(picture: np.ndarray) -> None:
    for resize in (96, ResizeConfig(96, 144)):
        result = Predictor(small_model(), device="cpu", resize=resize).predict(picture)
        assert result.size == (90, 120)
        assert same(result, Predictor(small_model(), device="cpu", resize=96).predict(picture))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_tiny_and_extreme_pictures(predictor: Predictor, size: tuple[int, int]) -> None:
    result = predictor.predict(np.full((*size, 3), 128, np.uint8))
    assert result.size == size
    assert result.masks.shape == (len(result), *size)


def test_exif_orientation_is_applied(predictor: Predictor, picture: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.ascontiguousarray(np.rot90(picture))).save(tmp_path / "turned.png", exif=exif)
    assert same(predictor.predict(tmp_path / "turned.png"), predictor.predict(picture))


def test_the_input_is_not_changed(predictor: Predictor, picture: np.ndarray) -> None:
    copy = picture.copy()
    predictor.predict(picture).plot()
    assert np.array_equal(picture, copy)


def test_predictors_in_threads_do_not_disturb_each_other(picture: np.ndarray) -> None:
    predictors = [Predictor(small_model(seed=seed), device="cpu") for seed in (3, 4)]
    expected = [predictor.predict(picture) for predictor in predictors]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: predictors[i % 2].predict(picture), range(12)))
    for i, result in enumerate(results):
        np.testing.assert_allclose(result.scores, expected[i % 2].scores, rtol=1e-5)


def test_bfloat16_predicts(picture: np.ndarray) -> None:
    result = Predictor(small_model(), device="cpu", dtype=torch.bfloat16).predict(picture)
    assert len(result) > 0
    assert result.mask_probabilities.dtype == np.float32


@pytest.mark.parametrize("nothing", [None, 5, {"image": 1}])
def test_what_is_no_picture_raises(predictor: Predictor, nothing: object) -> None:
    with pytest.raises(PictureError, match="expected a path"):
        predictor.predict(nothing)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_keeps_exact_anchors(dtype: torch.dtype, picture: np.ndarray) -> None:
    exact, half = Predictor(small_model(), device="cpu"), Predictor(small_model().to(dtype), device="cpu", dtype=dtype)
    assert torch.equal(half.graph.rpn.anchors.cells, exact.graph.rpn.anchors.cells)
    assert torch.equal(half.graph.mean, exact.graph.mean)
    assert len(half.predict(picture)) > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16, got torch.float64"),
        ({"dtype": "int8"}, "dtype: expected float32, float16 or bfloat16, got int8"),
        ({"score": 1.5}, r"score: expected a number in 0\.\.1, got 1\.5"),
        ({"score": float("nan")}, "score: expected"),
        ({"max_detections": 0}, "max_detections: expected a whole number of at least 1, got 0"),
        ({"max_detections": 2.5}, "max_detections: expected a whole number of at least 1, got 2.5"),
        ({"score": "0.5"}, "score: expected a number in 0..1, got '0.5'"),
        ({"device": "meta"}, "device: expected one that computes, got 'meta'"),
        ({"resize": 0}, "resize: expected a short side of at least 1 pixel, got 0"),
        ({"resize": (480, 640)}, r"resize: expected a short side in whole pixels or a ResizeConfig, got \(480, 640\)"),
        ({"resize": "480"}, "resize: expected a short side in whole pixels or a ResizeConfig, got '480'"),
        ({"size_multiple": 48}, "size_multiple: expected a multiple of the model's 32, got 48"),
        ({"size_multiple": 0}, "size_multiple: expected a multiple of the model's 32, got 0"),
        ({"capture": True}, "capture: expected a CUDA device with Triton's kernels, got 'cpu'"),
        ({"capture_cache": 0}, "capture_cache: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Predictor(small_model(), **{"device": "cpu", **options})


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_dtype_may_be_named(name: str) -> None:
    expected = getattr(torch, name)
    for dtype in (name, expected):
        predictor = Predictor(small_model(), device="cpu", dtype=dtype)
        assert predictor.dtype == predictor.graph.box_head.fcs[0].weight.dtype == expected


def test_a_coarser_multiple_pads_further(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(small_model(), device="cpu", size_multiple=96)
    shapes, graph = [], predictor.graph
    monkeypatch.setattr(
        predictor, "graph", lambda image, *x, **y: shapes.append(image.shape[2:]) or graph(image, *x, **y)
    )
    assert len(predictor.predict(picture)) > 0
    assert len(predictor.predict(np.ascontiguousarray(picture.swapaxes(0, 1)))) > 0
    assert shapes == [(192, 192), (192, 192)]  # 128 x 170, and the other way round


def test_nothing_is_recorded_on_a_cpu(predictor: Predictor, picture: np.ndarray) -> None:
    """Where masks are made when they are asked for, and only as many as there are."""
    assert Predictor(small_model(), device="cpu", capture=False)._runner is predictor._runner is None
    result = predictor.predict(picture)
    assert result.mask_runs is None
    assert len(result.mask_probabilities) == len(result)


def test_a_result_keeps_no_batch_alive(predictor: Predictor, picture: np.ndarray) -> None:
    for result in predictor.predict([picture, picture], batch_size=2):
        for array in (result.boxes, result.scores, result.labels):
            owner = array
            while isinstance(owner, np.ndarray) and owner.base is not None:
                owner = owner.base
            assert isinstance(owner, np.ndarray), "the batch's own tensor"
            assert owner.nbytes == array.nbytes


def test_memory_stays_as_it_is(predictor: Predictor, np_rng: np.random.Generator) -> None:
    """Calls on pictures of any size, one by one, in batches and through workers, leave nothing behind."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("needs /proc")

    def megabytes() -> float:
        gc.collect()
        return int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def some(number: int) -> None:
        sizes = np_rng.integers(20, 300, (number, 2))
        pictures = (np_rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)
        for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 2, "workers": 2}):
            for result in predictor.predict(islice(pictures, number // 3), stream=True, **options):
                _ = result.runs
                results.append(weakref.ref(result))

    results: list[weakref.ref] = []
    some(30)
    before = megabytes()
    some(60)
    assert megabytes() - before < 40
    assert len(results) == 90
    assert not any(result() for result in results)  # however small


def test_batch_size_out_of_range_is_named(predictor: Predictor, picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got 0"):
        predictor.predict([picture], batch_size=0)


def test_the_bundled_model_loads_by_default_and_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = trimask.load(device="cpu")
    assert predictor.config.class_names == ("person",)
    assert "1 classes, cpu" in repr(predictor)


def test_an_exported_file_is_for_the_runtime(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.onnx: expected a checkpoint, .* trimask\.export\.Runtime"):
        trimask.load(tmp_path / "model.onnx")


def test_a_program_may_have_another_default_dtype(picture: np.ndarray) -> None:
    expected = trimask.load("people", device="cpu", score=0.0).predict(picture)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = trimask.load("people", device="cpu", score=0.0).predict(picture)
    finally:
        torch.set_default_dtype(before)
    assert same(found, expected)


def test_unknown_weights_are_named() -> None:
    with pytest.raises(ValueError, match="peple"):
        trimask.load("peple")


def test_warmup_predicts_blank_pictures(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    monkeypatch.setattr(predictor, "graph", lambda image, sizes, originals, **_: batches.append(originals) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what the model raises
        predictor.warmup((30, 40), 2)
    assert batches[0].tolist() == [[30, 40], [30, 40]]
    monkeypatch.undo()
    assert predictor.warmup((30, 40), 2) > 0
    for size, batch in (((0, 40), 1), ((30, 40), 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            predictor.warmup(size, batch)
