"""Batches without end for training.

Every random choice is a pure function of (seed, iteration, slot in the global batch): a run that resumes at an
iteration, has another number of worker processes, or shares the global batch among ranks sees the very same pictures.
So a worker makes whole batches, and all that it is told is the iteration.
"""

import atexit
import itertools
import math
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..model.losses import Targets
from ..pictures.resize import padded_size
from .augment import Augment
from .data import Example, Record

__all__ = ["Batch", "Examples", "Order", "collate", "loader"]

ATTEMPTS = 64  # pictures in a row that cannot be read: then it is not the pictures
WARNINGS = 20  # of annotations and pictures that cannot be read
WINDOW = 64  # batches among which pictures of one orientation find each other
_EXAMPLE, _EPOCH, _WINDOW = range(3)  # what a random choice is about


class Batch(NamedTuple):
    """What a training step takes.

    Attributes:
        image: float32 [B, 3, H, W] RGB in 0..255, padded with zeros, in channels_last memory.
        image_sizes: int64 [B, 2], height and width without the padding.
        targets: without masks until :meth:`to`.
        packed_masks: uint8 [B, G, H, ceil(W / 8)], eight pixels a byte, the first in its highest bit: those of sixteen
            pictures with twenty objects each would else take a third of a gigabyte on their way from a worker and to a
            GPU. None without masks, and once they are in the targets.
        image_ids, paths: of each picture.
    """

    image: Tensor
    image_sizes: Tensor
    targets: Targets
    packed_masks: Tensor | None
    image_ids: list[int]
    paths: list[str]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, masks and all; pinned memory goes there without waiting."""

        def move(x: Any) -> Any:
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        targets = Targets(*map(move, self.targets))
        if self.packed_masks is not None:
            targets = targets._replace(masks=_unpacked(move(self.packed_masks), self.image.shape[3]))
        image, sizes = move(self.image), move(self.image_sizes)
        return self._replace(image=image, image_sizes=sizes, targets=targets, packed_masks=None)


class Examples(Protocol):
    """What a dataset has to offer; :class:`.data.CocoDataset` does."""

    @property
    def records(self) -> list[Record]: ...

    @property
    def boxes_only(self) -> bool: ...

    @property
    def polygons(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def loader(
    dataset: Examples,
    augment: Augment,
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_iteration: int = 0,
    aspect_grouping: bool = True,
    repeat_threshold: float = 0.0,
    pin_memory: bool = False,
    context: str | None = None,
) -> Generator[Batch, None, None]:
    """The batches of one rank, without end; targets have polygons instead of masks where the dataset gives them.

    Args:
        batch_size: of all ranks together; rank r gets the r-th part of each global batch.
        workers: processes that read ahead, with one thread each; 0 reads in this process.
        start_iteration: where to go on, counted from 0.
        aspect_grouping: batches of wide or of tall pictures, which need less padding; only one batch in 64 is mixed.
        repeat_threshold: repeat-factor sampling (LVIS, Gupta et al., 2019): a class in less than this share of the
            pictures is shown more often, by sqrt(threshold / share).
        pin_memory: batches in page-locked memory.
        context: how workers start: "fork", "spawn" or "forkserver"; by default as Python does.

    Yields:
        Batches, until it is closed. A picture that cannot be read is warned about once, by name, and the next one takes
        its place; an annotation that cannot be read leaves its picture in, and a region to ignore.

    Raises:
        ValueError: arguments that do not fit; an object without polygons where they are asked for; too many pictures in
            a row that cannot be read.
        RuntimeError: a worker process died.
    """
    if not len(dataset):
        raise ValueError("dataset: expected at least one picture, got none")
    if batch_size < 1 or world_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            "batch_size, rank, world_size: expected a batch that ranks share evenly and a rank of them, "
            f"got {batch_size}, {rank}, {world_size}"
        )
    if dataset.polygons and augment.config.copy_paste:
        raise ValueError("polygons: expected no copy-paste with them, as covered objects have masks only")
    order = Order(dataset.records, batch_size, seed, aspect_grouping, repeat_threshold)
    part = batch_size // world_size
    batches = _Batches(dataset, augment, order, seed, range(rank * part, (rank + 1) * part))
    return _iterate(batches, workers, start_iteration, pin_memory, context)


def _iterate(
    batches: "_Batches", workers: int, iteration: int, pin_memory: bool, context: str | None
) -> Generator[Batch, None, None]:
    stream = DataLoader(
        batches,
        batch_size=None,
        sampler=itertools.count(iteration),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_without_signals,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # else it draws from torch's own, which training shares
    )
    warned: set[str] = set()
    results = iter(stream)
    # Workers outlive a SIGTERM, with which Python ends them at exit, and then waits: they must be told before.
    end = getattr(results, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        for result in results:
            if isinstance(result, Exception):
                raise result
            batch, faults = result
            for fault in faults:
                if fault not in warned and len(warned) <= WARNINGS:
                    more = len(warned) == WARNINGS
                    warned.add(fault)
                    warnings.warn(f"{fault}{'; more are not shown' if more else ''}", stacklevel=2)
            yield batch
            iteration += 1
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # what torch says of a process that is gone
            raise
        raise RuntimeError(
            f"a worker process of the loader died before iteration {iteration}: {error}; if memory ran out, fewer "
            "workers, a smaller batch or more shared memory (/dev/shm) help"
        ) from error
    finally:
        end()
        atexit.unregister(end)


def _without_signals(worker: int) -> None:
    """Ctrl-C, or a SIGTERM to the group of processes, is for the one that trains, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item


class _Batches(Dataset):
    """One rank's batch of each iteration, and the faults met on the way."""

    def __init__(self, dataset: Examples, augment: Augment, order: "Order", seed: int, slots: range) -> None:
        self.dataset = dataset
        self.augment = augment
        self.order = order
        self.seed = seed
        self.slots = slots

    def __getitem__(self, iteration: int) -> tuple[Batch, list[str]] | Exception:
        """The batch, or what went wrong: raised in a worker it would come with pages of torch's."""
        try:
            return self._made(iteration)
        except Exception as error:
            return error

    def _made(self, iteration: int) -> tuple[Batch, list[str]]:
        faults: list[str] = []
        indices = self.order(iteration)
        examples = []
        for slot in self.slots:
            generator = _generator(self.seed, _EXAMPLE, iteration, slot)
            example = self._read(int(indices[slot]), faults)
            examples.append(self.augment(example, generator, self._partner(generator, faults)))
        polygons = self.dataset.polygons
        masks = not (self.dataset.boxes_only or polygons)
        batch = collate(examples, self.augment.input.size_divisible, masks=masks, polygons=polygons)
        return batch, faults

    def _partner(self, generator: np.random.Generator, faults: list[str]) -> Callable[[], Example]:
        return lambda: self._read(int(generator.integers(len(self.dataset))), faults)

    def _read(self, index: int, faults: list[str]) -> Example:
        """The example at an index, or the next one that can be read."""
        failed: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                example = self.dataset[(index + attempt) % len(self.dataset)]
            except (OSError, ValueError) as error:
                failed = error
                faults.append(f"{error}; another picture takes its place")
            else:
                faults.extend(f"{fault}; it is no object to learn" for fault in example.faults)
                return example
        raise ValueError(f"expected pictures that can be read, got {ATTEMPTS} in a row that cannot: {failed}")


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class Order:
    """Which pictures are in the global batch of each iteration.

    Epochs, each shuffled anew, follow each other in one long row that is cut into batches; with repeat-factor sampling
    an epoch holds a picture as often as its rarest class asks, in the mean. Aspect grouping then sorts each
    window of batches into wide and tall pictures and shuffles the batches.
    """

    def __init__(
        self,
        records: Sequence[Record],
        batch_size: int,
        seed: int,
        aspect_grouping: bool = True,
        repeat_threshold: float = 0.0,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.tall = np.array([r.size[0] > r.size[1] for r in records]) if aspect_grouping else None
        repeats = _repeat_factors(records, repeat_threshold)
        self.epoch_size = math.ceil(repeats.sum() - 1e-6)
        self._ends = repeats.cumsum() * (self.epoch_size / repeats.sum())
        self._ends[-1] = self.epoch_size
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        self._window: tuple[int, NDArray[np.int64]] | None = None

    def __call__(self, iteration: int) -> NDArray[np.int64]:
        """Indices into the dataset, [batch_size]."""
        if self.tall is None:
            return self._row(iteration * self.batch_size, self.batch_size)
        number, batch = divmod(iteration, WINDOW)
        if self._window is None or self._window[0] != number:
            generator = _generator(self.seed, _WINDOW, number)
            size = WINDOW * self.batch_size
            row = self._row(number * size, size)
            row = row[np.argsort(self.tall[row], kind="stable")].reshape(WINDOW, self.batch_size)
            self._window = number, generator.permutation(row)
        return self._window[1][batch]

    def _row(self, start: int, size: int) -> NDArray[np.int64]:
        """Part of the long row of epochs."""
        first, last = start // self.epoch_size, (start + size - 1) // self.epoch_size
        row = np.concatenate([self._shuffled(epoch) for epoch in range(first, last + 1)])
        return row[start - first * self.epoch_size :][:size]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = _generator(self.seed, _EPOCH, epoch)
            # Systematic sampling: a picture is taken once for each whole number that its part of the line holds.
            copies = np.diff(np.floor(self._ends + generator.random()).astype(np.int64), prepend=0)
            self._epoch = epoch, generator.permutation(np.repeat(np.arange(len(copies)), copies))
        return self._epoch[1]


def _repeat_factors(records: Sequence[Record], threshold: float) -> NDArray[np.float64]:
    """How often each picture is shown in an epoch, at least once: as often as its rarest class asks."""
    classes = [{annotation["category_id"] for annotation in record.annotations} for record in records]
    share = {x: count / len(records) for x, count in Counter(itertools.chain(*classes)).items()}
    return np.array([max([1.0, *(math.sqrt(threshold / share[x]) for x in present)]) for present in classes])


def collate(examples: Sequence[Example], size_divisible: int, *, masks: bool = True, polygons: bool = False) -> Batch:
    """Examples in the network's frame as one padded batch.

    Raises:
        ValueError: an example without polygons where they are asked for.
    """
    sizes = [example.picture.shape[:2] for example in examples]
    padded = padded_size(sizes, size_divisible)
    rows = max(1, *map(len, examples))  # G
    image = np.zeros((len(examples), *padded, 3), np.float32)
    boxes = np.zeros((len(examples), rows, 4), np.float32)
    labels, crowd = np.zeros((len(examples), rows), np.int64), np.zeros((len(examples), rows), np.bool_)
    packed = np.zeros((len(examples), rows, padded[0], -(-padded[1] // 8)), np.uint8) if masks else None
    for n, (example, (height, width)) in enumerate(zip(examples, sizes, strict=True)):
        image[n, :height, :width] = example.picture
        boxes[n, : len(example)] = example.boxes
        labels[n, : len(example)] = example.labels
        crowd[n, : len(example)] = example.crowd
        if packed is not None:
            packed[n, : len(example), :height, : -(-width // 8)] = np.packbits(example.masks, axis=-1)
        if polygons and example.polygons is None:
            raise ValueError(f"{example.path}: expected polygons to keep, got run lengths; use masks")
    targets = Targets(
        torch.from_numpy(boxes),
        torch.from_numpy(labels),
        torch.from_numpy(crowd),
        torch.tensor([len(example) for example in examples]),
        None,
        [example.polygons or [] for example in examples] if polygons else None,
    )
    return Batch(
        torch.from_numpy(image).permute(0, 3, 1, 2),
        torch.tensor(sizes),
        targets,
        None if packed is None else torch.from_numpy(packed),
        [example.image_id for example in examples],
        [str(example.path) for example in examples],
    )


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """uint8 0/1 [..., W] of eight pixels a byte."""
    shifts = 7 - torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts).bitwise_and_(1).flatten(-2)[..., :width].contiguous()
