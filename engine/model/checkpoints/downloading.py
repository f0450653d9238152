"""Downloading a checkpoint once: into the user's cache, resumed after an interruption, verified by its hash.

A download grows in ``NAME.part``. Its owner holds it under a name of its own, taken by a rename, which only one process
can win: two that want the same file do not write into each other's. What is left of an interrupted download goes back
to ``NAME.part``, or, after a crash, counts as nobody's when it has not grown for a while: then it is copied, since an
owner that only slept would go on writing into it.
"""

import hashlib
import http.client
import os
import re
import secrets
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import cache_dir

__all__ = ["cache_dir", "cached", "download", "file_hash", "progress_bar"]

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4
ABANDONED = 3 * TIMEOUT  # a partial file that has not grown for this long has no owner

Progress = Callable[[int, int | None], None]


def download(url: str, digest: str, folder: Path | None = None, progress: Progress = lambda done, total: None) -> Path:
    """The path of the file at ``url``, downloaded unless it is there.

    Args:
        url: http or https.
        digest: ``algorithm:hex``, the start of the file's hash.
        folder: where to keep it; by default :func:`cache_dir`.
        progress: called with the bytes that are there and the bytes in all, the latter None where the server does not
            say.

    Raises:
        ConnectionError: where the file cannot be had, with what to do when offline.
        ValueError: for another kind of URL, or a file whose hash is not ``digest``; it is deleted.
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"url: expected http or https, got {url!r}")
    folder = folder or cache_dir()
    target = _place(url, folder)
    if _is_whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    algorithm = digest.partition(":")[0]
    part = _claim(target)
    try:
        for attempt in range(ATTEMPTS):
            try:
                resumed = part.stat().st_size > 0
                _fetch(url, part, progress)
                found = f"{algorithm}:{file_hash(part, algorithm)}"
                if found.startswith(digest):
                    _publish(part, target)
                    return target
                part.write_bytes(b"")
            except FileNotFoundError:  # another process took it for abandoned
                if _is_whole(target):
                    return target
                part = _claim(target)
                continue
            except urllib.error.HTTPError as error:
                raise _failure(url, target, f"the server answered {error.code} {error.reason}") from None
            except urllib.error.URLError as error:
                raise _failure(url, target, f"no connection: {error.reason}") from None
            except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
                if attempt == ATTEMPTS - 1:
                    raise _failure(url, target, str(error)) from None
                time.sleep(0.1 * 4**attempt)
                continue
            if not resumed:  # else the server's file may have changed since it was begun: once more from the start
                raise ValueError(f"{url}: expected a file with hash {digest}..., got {found[:80]}; deleted it")
        raise _failure(url, target, "it kept changing")
    finally:
        _release(part, target)


def cached(url: str) -> Path | None:
    """The path of the file at ``url``, if it has been downloaded."""
    target = _place(url, cache_dir())
    return target if _is_whole(target) else None


def _place(url: str, folder: Path) -> Path:
    return folder / url.rpartition("/")[2]


def _is_whole(target: Path) -> bool:
    """Whether the file is there; an empty one is what a crash of the machine left of it."""
    return target.is_file() and target.stat().st_size > 0


def _publish(part: Path, target: Path) -> None:
    with part.open("r+b") as file:  # or a crash of the machine could leave the name without the bytes
        os.fsync(file.fileno())
    os.replace(part, target)


def _claim(target: Path) -> Path:
    """A partial file of our own: one that has no owner, else an empty one."""
    mine = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    orphans = [p for p in target.parent.glob(f"{target.name}.*.part") if time.time() - _modified(p) > ABANDONED]
    try:
        os.rename(target.with_name(f"{target.name}.part"), mine)
        os.utime(mine)  # or the next process would think it abandoned
        return mine
    except OSError:  # not there, or another process was quicker
        pass
    for part in orphans:
        try:
            shutil.copyfile(part, mine)
            part.unlink()
            return mine
        except OSError:  # another process was quicker, or still has it open where that matters
            continue
    mine.touch()
    return mine


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _release(part: Path, target: Path) -> None:
    if not part.exists():
        return
    if part.stat().st_size:
        os.replace(part, target.with_name(f"{target.name}.part"))
    else:
        part.unlink()


def _fetch(url: str, part: Path, progress: Progress) -> None:
    """Append what is missing of the file; an OSError or HTTPException where the connection does not hold."""
    start = part.stat().st_size
    request = urllib.request.Request(url, headers={"User-Agent": "trimask"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing beyond what we have: the hash tells whether that is the file
            return
        raise
    with response, part.open("r+b") as file:
        served = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or served is None or int(served[1]) != start:
            start = 0  # the server sends all of it
        file.truncate(start)
        file.seek(start)
        length = response.headers.get("Content-Length")
        if length and not length.isdecimal():
            raise ConnectionError(f"the server gave a Content-Length of {length[:40]!r}")
        total = start + int(length) if length else None
        done = start
        progress(done, total)
        while data := response.read(CHUNK):
            file.write(data)
            done += len(data)
            progress(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"the connection closed after {done} of {total} bytes")


def _failure(url: str, target: Path, reason: str) -> ConnectionError:
    return ConnectionError(
        f"could not download {url} ({reason}). Without a connection, fetch it elsewhere and put it at {target}, "
        "or give the path of a checkpoint in place of its name"
    )


def file_hash(path: Path, algorithm: str) -> str:
    """The hash of a file's bytes, in hex."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            state.update(data)
    return state.hexdigest()


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """A progress callback that draws a bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
