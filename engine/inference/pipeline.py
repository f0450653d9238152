"""From many pictures to many results, in order: decoding, the device and the making of results overlap.

::

    source -> [decode: K threads] -> [device: 1 thread] -> [results: K threads] -> caller

The caller's own thread takes from the source and hands out results. Batches wait for each other in one queue of
bounded length, so that a source without end is read no further ahead than that.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from math import ceil
from typing import Any, Generic, TypeVar

from ..pictures.reading import Picture, PictureError

__all__ = ["Pipeline"]

Handle = TypeVar("Handle")
Item = TypeVar("Item")

# Batches past decoding: one that the device computes, one that it has got already, one that becomes results.
IN_FLIGHT = 3

Decoded = tuple[Picture, float]  # with the milliseconds that it took


class Pipeline(Generic[Handle, Item]):
    """Three steps for every batch of a source.

    Args:
        read: a picture from an item of the source; PictureError and OSError concern that picture alone.
        submit: starts a batch of pictures on the device.
        finish: waits for it; one result for each picture.
        failure: the result of an item that cannot be read.
        batch_size: pictures at a time.
        workers: threads that decode, and as many that make results; with none, each batch goes through all steps before
            the next is taken from the source, in the caller's thread.
        lanes: each ``submit`` happens in the context of the next one of these: streams that overlap.
    """

    def __init__(
        self,
        read: Callable[[Any], Picture],
        submit: Callable[[list[Decoded]], Handle],
        finish: Callable[[Handle], list[Item]],
        failure: Callable[[Any, Exception], Item],
        *,
        batch_size: int,
        workers: int,
        lanes: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.read = read
        self.submit = submit
        self.finish = finish
        self.failure = failure
        self.batch_size = batch_size
        self.workers = workers
        self.lanes = lanes

    @property
    def depth(self) -> int:
        """Batches that have been taken from the source and not handed out: enough to keep every worker decoding."""
        return IN_FLIGHT + ceil(self.workers / self.batch_size) if self.workers else 1

    def run(self, items: Iterable[Any], stacklevel: int = 3) -> Iterator[Item]:
        """Results in the order of the items. Threads start with the first and end with the last, or when it is closed.

        Args:
            items: the source.
            stacklevel: of warnings about items that cannot be read; 3 is where the results are taken.

        Raises:
            Exception: what the source raises, after the results of what came before; what a step raises.
        """
        items = iter(items)
        queue: deque[tuple[list[Any], Future[list[Item | Exception]]]] = deque()
        trouble: Exception | None = None
        decoders, device, finishers = self._threads()
        try:
            while True:
                while trouble is None and len(queue) < self.depth:
                    chunk: list[Any] = []
                    try:
                        chunk.extend(islice(items, self.batch_size))
                    except Exception as error:  # what came before it is in the chunk
                        trouble = error
                    if not chunk:
                        break
                    queue.append((chunk, self._start(chunk, decoders, device, finishers)))
                if not queue:
                    break
                chunk, outcome = queue.popleft()
                yield from self._handed_out(chunk, outcome.result(), stacklevel)
            if trouble is not None:
                raise trouble
        finally:
            for pool in (decoders, device, finishers):  # in the order in which they wait for each other
                pool.shutdown(wait=True, cancel_futures=True)

    def _threads(self) -> tuple[Executor, Executor, Executor]:
        if not self.workers:
            return _Here(), _Here(), _Here()
        return (
            ThreadPoolExecutor(self.workers, "trimask-decode"),
            ThreadPoolExecutor(1, "trimask-device"),
            ThreadPoolExecutor(self.workers, "trimask-results"),
        )

    def _start(self, chunk: list[Any], decoders: Executor, device: Executor, finishers: Executor) -> Any:
        # What lies on a GPU was made on the caller's stream, of which other threads know nothing.
        decoded = [(_Here() if getattr(x, "is_cuda", False) else decoders).submit(self._decode, x) for x in chunk]
        handle = device.submit(self._on_device, decoded)
        outcome: Future[list[Item | Exception]] = Future()

        def finish(done: Future[Any]) -> None:
            """Called where the device's step ended, so that no thread is kept waiting for it."""
            try:
                finishers.submit(self._finish, done, outcome)
            except RuntimeError:  # nobody wants it any more: the threads have been told to stop
                outcome.cancel()

        handle.add_done_callback(finish)
        return outcome

    def _decode(self, item: Any) -> Decoded | Exception:
        start = time.perf_counter()
        try:
            return self.read(item), (time.perf_counter() - start) * 1e3
        except (PictureError, OSError) as error:
            return error

    def _on_device(self, decoded: list[Future[Decoded | Exception]]) -> tuple[list[Any], Handle | None]:
        read = [future.result() for future in decoded]
        pictures = [x for x in read if not isinstance(x, Exception)]
        if not pictures:
            return read, None
        with self.lanes():
            return read, self.submit(pictures)

    def _finish(self, done: Future[Any], outcome: Future[list[Item | Exception]]) -> None:
        try:
            read, handle = done.result()
            results = iter(() if handle is None else self.finish(handle))
            outcome.set_result([x if isinstance(x, Exception) else next(results) for x in read])
        except BaseException as error:
            outcome.set_exception(error)

    def _handed_out(self, chunk: list[Any], results: list[Item | Exception], stacklevel: int) -> Iterator[Item]:
        for item, result in zip(chunk, results, strict=True):
            if isinstance(result, Exception):
                warnings.warn(str(result), stacklevel=stacklevel)
                result = self.failure(item, result)
            yield result


class _Here(Executor):
    """Runs at once, in the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future
