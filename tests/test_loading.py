"""The loader: the same batches however they are made, and what happens when something breaks."""

import itertools
import multiprocessing
import os
import re
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimask.engine.model.config import InputConfig, ResizeConfig
from trimask.engine.training.augment import Augment, AugmentConfig
from trimask.engine.training.data import CocoDataset, Example, Record
from trimask.engine.training.loading import Batch, Order, collate, loader

from .coco_files import content, write
from .test_augment import example

INPUT = InputConfig(resize=ResizeConfig(min_size=40, max_size=60))
CPU = torch.device("cpu")
AUGMENT = Augment(AugmentConfig(min_sizes=(30, 40, 50), crop=0.5, flip=0.5, color=0.5, grey=0.2, copy_paste=0.5), INPUT)


@pytest.fixture
def dataset(tmp_path: Path, np_rng: np.random.Generator) -> CocoDataset:
    return CocoDataset(write(tmp_path, content(tmp_path, np_rng, pictures=7)), tmp_path)


def take(count: int, *arguments: Any, **options: Any) -> list[Batch]:
    stream = loader(*arguments, **options)
    batches = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return batches


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in ((a.to(CPU), b.to(CPU)) for a, b in zip(first, second, strict=True)):
        assert a.image_ids == b.image_ids
        assert a.paths == b.paths
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.image_sizes, b.image_sizes)
        assert a.targets.masks is not None
        assert b.targets.masks is not None
        assert all(torch.equal(x, y) for x, y in zip(a.targets[:5], b.targets[:5], strict=True))


@pytest.mark.parametrize(("workers", "context"), [(1, "spawn"), (2, "fork")])
def test_workers_change_nothing(dataset: CocoDataset, workers: int, context: str) -> None:
    alone = take(9, dataset, AUGMENT, batch_size=2, seed=3)
    assert_equal(alone, take(9, dataset, AUGMENT, batch_size=2, seed=3, workers=workers, context=context))


def test_resuming_goes_on_where_it_was(dataset: CocoDataset) -> None:
    whole = take(12, dataset, AUGMENT, batch_size=3, seed=4)
    assert_equal(whole[7:], take(5, dataset, AUGMENT, batch_size=3, seed=4, start_iteration=7))
    assert_equal(
        whole[5:], take(7, dataset, AUGMENT, batch_size=3, seed=4, start_iteration=5, workers=2, context="fork")
    )


def test_other_seeds_give_other_batches(dataset: CocoDataset) -> None:
    first, second = (take(4, dataset, AUGMENT, batch_size=2, seed=seed) for seed in (1, 2))
    assert any(
        a.image.shape != b.image.shape or not torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True)
    )


def test_no_epoch_repeats_anothers_choices(tmp_path: Path, np_rng: np.random.Generator) -> None:
    alone = CocoDataset(write(tmp_path, content(tmp_path, np_rng, pictures=1)), tmp_path)
    sums = {round(float(batch.image.double().sum()), 3) for batch in take(9, alone, AUGMENT, batch_size=1)}
    assert len(sums) > 6


def test_ranks_share_the_global_batch(dataset: CocoDataset) -> None:
    whole = take(6, dataset, AUGMENT, batch_size=4, seed=5)
    parts = [take(6, dataset, AUGMENT, batch_size=4, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert batch.image_ids == [x for share in shares for x in share.image_ids]
        for slot in range(4):
            share, at = shares[slot // 2], slot % 2
            height, width = batch.image_sizes[slot].tolist()
            assert share.image_sizes[at].tolist() == [height, width]
            assert torch.equal(share.image[at, :, :height, :width], batch.image[slot, :, :height, :width])
            count = int(batch.targets.count[slot])
            assert int(share.targets.count[at]) == count
            assert torch.equal(share.targets.boxes[at, :count], batch.targets.boxes[slot, :count])


def test_the_callers_random_numbers_are_left_alone(dataset: CocoDataset) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    take(3, dataset, AUGMENT, batch_size=2, workers=1, context="fork")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def records(sizes: list[tuple[int, int]], classes: list[list[int]] | None = None) -> list[Record]:
    classes = classes or [[] for _ in sizes]
    return [
        Record(n, Path(f"{n}.png"), size, [{"category_id": x} for x in present])
        for n, (size, present) in enumerate(zip(sizes, classes, strict=True))
    ]


@pytest.mark.parametrize("grouping", [False, True])
def test_every_epoch_holds_every_picture_once(seed: int, grouping: bool) -> None:
    count, batch = 32, 4
    sizes = [(10, 20) if n % 3 else (20, 10) for n in range(count)]
    order = Order(records(sizes), batch, seed, aspect_grouping=grouping)
    window = np.concatenate([order(n) for n in range(64)])  # eight epochs
    assert Counter(window.tolist()) == dict.fromkeys(range(count), 8)
    if not grouping:
        epochs = window.reshape(8, count)
        assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8


def test_batches_are_wide_or_tall(seed: int) -> None:
    tall = np.random.default_rng(seed).random(101) < 0.4
    order = Order(records([(20, 10) if t else (10, 20) for t in tall]), 6, seed)
    batches = [order(n) for n in range(128)]
    assert sum(len(set(tall[batch])) > 1 for batch in batches) <= 2  # one a window
    assert 0.2 < np.mean([tall[batch].mean() for batch in batches]) < 0.6
    kinds = [bool(tall[batch][0]) for batch in batches[:64]]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 5  # not one kind after the other


def test_rare_classes_are_shown_as_often_as_lvis_asks(seed: int) -> None:
    classes = [[1]] * 98 + [[1, 2]] + [[]]
    order = Order(records([(1, 1)] * 100, classes), 10, seed, aspect_grouping=False, repeat_threshold=0.09)
    assert order.epoch_size == 102  # class 2 is in one of a hundred: sqrt(0.09 / 0.01) = 3 times
    shown = Counter(np.concatenate([order(n) for n in range(102)]).tolist())
    assert shown[98] == 30
    assert all(shown[n] == 10 for n in range(100) if n != 98)
    fractional = Order(records([(1, 1)] * 100, classes), 10, seed, False, repeat_threshold=0.0625)
    assert fractional.epoch_size == 102  # 2.5 times, and a picture more to fill the epoch
    shown = Counter(np.concatenate([fractional(n) for n in range(408)]).tolist())
    assert shown[98] == pytest.approx(2.5 * 40, abs=16)  # twice or three times in each of forty epochs


def test_collate_pads_everything(np_rng: np.random.Generator) -> None:
    examples = [example(np_rng, (40, 33), 3), example(np_rng, (20, 70), 0), example(np_rng, (64, 32), 5)]
    batch = collate(examples, 32).to(CPU)
    assert batch.image.shape == (3, 3, 64, 96)
    assert batch.image.dtype == torch.float32
    assert batch.image_sizes.tolist() == [[40, 33], [20, 70], [64, 32]]
    targets = batch.targets
    assert targets.masks is not None
    assert targets.masks.dtype == torch.uint8
    assert targets.masks.shape == (3, 5, 64, 96)
    assert targets.labels.dtype == targets.count.dtype == torch.int64
    assert targets.count.tolist() == [3, 0, 5]
    assert targets.crowd.tolist() == [[True] + [False] * 4, [False] * 5, [True] + [False] * 4]
    for n, one in enumerate(examples):
        height, width = one.picture.shape[:2]
        rest = batch.image[n].clone()
        assert np.array_equal(rest[:, :height, :width].permute(1, 2, 0).numpy(), one.picture)
        rest[:, :height, :width] = 0
        assert not rest.any()
        assert np.array_equal(targets.masks[n, : len(one), :height, :width].numpy(), one.masks)
        assert int(targets.masks[n].sum()) == one.masks.sum()
        assert np.array_equal(targets.boxes[n, : len(one)].numpy(), one.boxes)
        assert not targets.boxes[n, len(one) :].any()
    assert collate(examples[1:2], 32).targets.boxes.shape == (1, 1, 4)
    assert collate(examples, 32, masks=False).to(CPU).targets.masks is None
    odd = collate(examples, 1)  # a width of 70 is no multiple of 8
    assert odd.packed_masks is not None
    assert odd.packed_masks.shape == (3, 5, 64, 9)
    assert torch.equal(odd.to(CPU).targets.masks, targets.masks[..., :64, :70])


def test_polygons_are_kept_where_asked(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = write(tmp_path, content(tmp_path, np_rng, 4, ("polygon",), crowd=False))
    dataset = CocoDataset(path, tmp_path, polygons=True)
    affine = Augment(AugmentConfig(flip=0.5, min_sizes=(20, 80)), INPUT)
    for batch in take(6, dataset, affine, batch_size=2):
        assert batch.to(CPU).targets.masks is None
        assert batch.targets.polygons is not None
        for n, count in enumerate(batch.targets.count.tolist()):
            assert len(batch.targets.polygons[n]) == count
            for (points,), box in zip(batch.targets.polygons[n], batch.targets.boxes[n], strict=False):
                assert np.concatenate([points.min(0), points.max(0)]) == pytest.approx(box.numpy(), abs=1e-3)
    with pytest.raises(ValueError, match="expected no copy-paste"):
        loader(dataset, AUGMENT, batch_size=2)


def test_run_lengths_have_no_polygons_to_keep(dataset: CocoDataset) -> None:
    dataset.polygons = True
    with pytest.raises(ValueError, match=r"png: expected polygons to keep, got run lengths; use masks"):
        take(4, dataset, Augment(AugmentConfig(), INPUT), batch_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_is_named_once_and_replaced(dataset: CocoDataset, workers: int) -> None:
    bad = dataset.records[2].path
    bad.write_bytes(bad.read_bytes()[:100])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = take(10, dataset, AUGMENT, batch_size=7, workers=workers, context="fork")
    about = [str(warning.message) for warning in caught if "takes its place" in str(warning.message)]
    assert len(about) == 1
    assert str(bad) in about[0]
    ids = [x for batch in batches for x in batch.image_ids]
    assert len(ids) == 70
    assert dataset.records[2].image_id not in ids
    assert ids.count(dataset.records[3].image_id) > 12  # the next one took its place


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_annotation_is_named_once_and_its_picture_stays(
    tmp_path: Path, np_rng: np.random.Generator, workers: int, polygons: bool
) -> None:
    data = content(tmp_path, np_rng, 4, ("polygon",), crowd=False)
    data["annotations"][4]["segmentation"] = []
    dataset = CocoDataset(write(tmp_path, data), tmp_path, polygons=polygons)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"batch_size": 4, "aspect_grouping": False, "workers": workers, "context": "fork"}
        batches = take(6, dataset, Augment(AugmentConfig(), INPUT), **options)
    about = [str(warning.message) for warning in caught if "annotation" in str(warning.message)]
    assert len(about) == 1
    assert re.search(r"1\.png: annotation 29: .*; it is no object to learn$", about[0])
    for batch in batches:
        assert sorted(batch.image_ids) == [5, 15, 25, 35]
        row = batch.image_ids.index(15)
        assert batch.targets.count[row] == 3
        assert batch.targets.crowd[row].tolist() == [False, True, False]


def test_no_more_than_some_faults_are_told(tmp_path: Path, np_rng: np.random.Generator) -> None:
    data = content(tmp_path, np_rng, 12)
    for one in data["annotations"]:
        one["segmentation"] = {}
    dataset = CocoDataset(write(tmp_path, data), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take(6, dataset, Augment(AugmentConfig(), INPUT), batch_size=4)
    about = [str(warning.message) for warning in caught if "annotation" in str(warning.message)]
    assert len(about) == len(set(about)) == 21
    assert ["not shown" in text for text in about] == [False] * 20 + [True]


def test_when_no_picture_can_be_read_it_says_so(dataset: CocoDataset) -> None:
    for record in dataset.records:
        record.path.unlink()
    with pytest.raises(ValueError, match=r"in a row that cannot: .*nothing at.*\.png"):
        take(1, dataset, AUGMENT, batch_size=2)


class Dying(CocoDataset):
    def __getitem__(self, index: int) -> Example:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_worker_is_reported(dataset: CocoDataset) -> None:
    dying = Dying(dataset.annotations, dataset.records[0].path.parent)
    with pytest.raises(RuntimeError, match=r"worker process of the loader died before iteration 5: .*(killed|exited)"):
        take(1, dying, AUGMENT, batch_size=2, workers=1, context="fork", start_iteration=5)


def test_signals_leave_workers_alone(dataset: CocoDataset) -> None:
    """They go to the whole group of processes, and the one that trains saves its state first."""
    stream = loader(dataset, AUGMENT, batch_size=2, workers=1, context="fork")
    next(stream)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(worker.pid or 0), number)
    for _ in range(5):  # more than are read ahead
        next(stream)
    assert worker.is_alive()
    stream.close()  # type: ignore[attr-defined]
    assert not worker.is_alive()


def test_boxes_alone_have_no_masks(dataset: CocoDataset) -> None:
    boxes = CocoDataset(dataset.annotations, dataset.records[0].path.parent, boxes_only=True)
    (batch,) = take(1, boxes, AUGMENT, batch_size=2)
    assert batch.to(CPU).targets.masks is None


def test_a_batch_moves_whole(dataset: CocoDataset) -> None:
    (batch,) = take(1, dataset, AUGMENT, batch_size=2)
    moved = batch.to(torch.device("meta"))
    assert {x.device.type for x in (moved.image, moved.image_sizes, *moved.targets[:5])} == {"meta"}  # type: ignore[union-attr]
    assert moved.image.is_contiguous(memory_format=torch.channels_last)
    assert moved.image_ids == batch.image_ids


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 3, "world_size": 2}, {"batch_size": 2, "world_size": 2, "rank": 2}]
)
def test_arguments_that_do_not_fit_are_refused(dataset: CocoDataset, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch_size, rank, world_size: expected"):
        loader(dataset, AUGMENT, **options)  # type: ignore[arg-type]


def test_no_pictures_are_refused(tmp_path: Path) -> None:
    empty = CocoDataset(write(tmp_path, {"images": [], "annotations": [], "categories": []}), tmp_path)
    with pytest.raises(ValueError, match="at least one picture"):
        loader(empty, AUGMENT, batch_size=1)
