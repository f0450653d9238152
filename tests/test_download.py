"""Downloading from a server on loopback: whole, resumed, refused, verified, and by two at once."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trimask.engine.model.checkpoints import downloading as module
from trimask.engine.model.checkpoints.downloading import cache_dir, download, progress_bar

BODY = bytes(range(256)) * 1500  # 384000 bytes
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()[:8]


class Server(ThreadingHTTPServer):
    """Serves one body, as well or as badly as a test asks for.

    Attributes:
        ranges: whether it honours Range.
        length: what it gives as Content-Length, if not the length.
        cuts: bytes after which to cut each of the next connections.
        statuses: what to answer instead.
        asked: the Range header of every request.
    """

    body = BODY
    ranges = True
    length: str | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/model-12345678.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        body, start = self.server.body, 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", self.server.length or str(len(body) - start))
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_waiting_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_and_then_not_again(server: Server, tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    folder = tmp_path / "deep" / "cache"
    path = download(server.url, DIGEST, folder, lambda done, total: steps.append((done, total)))
    assert path == folder / "model-12345678.pth"
    assert path.read_bytes() == BODY
    assert names(folder) == [path.name]
    assert steps[0] == (0, len(BODY))
    assert steps[-1] == (len(BODY), len(BODY))
    assert steps == sorted(steps)
    assert download(server.url, DIGEST, folder) == path
    assert server.asked == [None]


def test_a_cut_connection_is_resumed_at_once(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000, 2000]
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-", "bytes=3000-"]


def test_what_was_left_is_resumed_later(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000] * module.ATTEMPTS
    with pytest.raises(ConnectionError, match=rf"connection closed after 4000 of {len(BODY)} bytes"):
        download(server.url, DIGEST, tmp_path)
    assert names(tmp_path) == ["model-12345678.pth.part"]
    server.asked.clear()
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked == ["bytes=4000-"]
    assert names(tmp_path) == ["model-12345678.pth"]


def test_an_interrupt_keeps_what_there_is(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url, DIGEST, tmp_path, interrupt)
    assert names(tmp_path) == ["model-12345678.pth.part"]
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked[1] is not None


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [1000]
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-"]


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 5])
def test_nothing_left_to_send(length: int, server: Server, tmp_path: Path) -> None:
    """All of it was there but for the last rename; or more than all of it."""
    part = tmp_path / "model-12345678.pth.part"
    part.write_bytes((BODY + b"extra")[:length])
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked == [f"bytes={length}-"] + [None] * (length > len(BODY))


def test_a_part_of_another_version_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model-12345678.pth.part").write_bytes(b"of yesterday's file")
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked == ["bytes=19-", None]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_hash(algorithm: str, server: Server, tmp_path: Path) -> None:
    found = hashlib.new(algorithm, BODY).hexdigest()
    with pytest.raises(
        ValueError, match=rf"expected a file with hash {algorithm}:0123456\.\.\., got {algorithm}:{found}"
    ):
        download(server.url, f"{algorithm}:0123456", tmp_path)
    assert names(tmp_path) == []
    assert download(server.url, f"{algorithm}:{found[:6]}", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_server_that_refuses(status: int, server: Server, tmp_path: Path) -> None:
    server.statuses = [status]
    with pytest.raises(ConnectionError, match=f"could not download {server.url}.*answered {status}") as caught:
        download(server.url, DIGEST, tmp_path)
    assert str(tmp_path / "model-12345678.pth") in str(caught.value)
    assert names(tmp_path) == []
    assert len(server.asked) == 1


def test_offline(server: Server, tmp_path: Path) -> None:
    url = server.url
    server.server_close()
    (tmp_path / "model-12345678.pth.part").write_bytes(b"begun")
    with pytest.raises(ConnectionError, match=r"no connection.*put it at .*model-12345678\.pth.*path of a checkpoint"):
        download(url, DIGEST, tmp_path)
    assert (tmp_path / "model-12345678.pth.part").read_bytes() == b"begun"


def test_two_at_once_do_not_write_into_each_other(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model-12345678.pth.part").write_bytes(BODY[:5000])
    both = threading.Barrier(2)
    found: list[Path] = []

    def fetch() -> None:
        waited = False

        def meet(done: int, total: int | None) -> None:
            nonlocal waited
            if not waited:
                waited = True
                both.wait(10)

        found.append(download(server.url, DIGEST, tmp_path, meet))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == BODY for path in found] == [True, True]
    assert names(tmp_path) == ["model-12345678.pth"]
    assert sorted(server.asked, key=str) == [None, "bytes=5000-"]


@pytest.mark.parametrize("age", [0.0, 2 * module.ABANDONED])
def test_the_part_of_a_process_that_died(age: float, server: Server, tmp_path: Path) -> None:
    """It is taken over once it has not grown for a while; until then it may have an owner."""
    orphan = tmp_path / "model-12345678.pth.0123abcd.part"
    orphan.write_bytes(BODY[:700])
    os.utime(orphan, (time.time() - age,) * 2)
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
    assert server.asked == (["bytes=700-"] if age else [None])
    assert orphan.exists() == (not age)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "model.pth"])
def test_other_urls(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="url: expected http or https"):
        download(url, DIGEST, tmp_path)


def test_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    monkeypatch.setenv("TRIMASK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "home"
    assert download(server.url, DIGEST).parent == tmp_path / "home"
    monkeypatch.delenv("TRIMASK_HOME")
    assert cache_dir() == tmp_path / "xdg" / "trimask"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, folder in (("linux", ".cache/trimask"), ("darwin", "Library/Caches/trimask")):
        monkeypatch.setattr(module.sys, "platform", platform)
        assert cache_dir() == tmp_path / folder
    monkeypatch.setattr(module.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_dir() == tmp_path / "local" / "trimask" / "cache"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_bar(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: terminal)
    with progress_bar("some/model") as progress:
        progress(10, None)
        progress(20, 40)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("some/model" in err) == terminal


def test_the_owner_of_a_part_that_wakes_up_spoils_nothing(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "model-12345678.pth.0011aabb.part"
    with part.open("wb") as owner:
        owner.write(BODY[:1000])
        owner.flush()
        os.utime(part, (0, 0))
        path = download(server.url, DIGEST, tmp_path)
        owner.seek(500)
        owner.write(b"\0" * 1000)
    assert path.read_bytes() == BODY
    assert server.asked == ["bytes=1000-"]
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("published", [False, True])
def test_a_part_that_was_taken_away(published: bool, server: Server, tmp_path: Path) -> None:
    """By another process, which may or may not have finished the file meanwhile."""
    target = tmp_path / "model-12345678.pth"
    taken: list[Path] = []

    def take(done: int, total: int | None) -> None:
        if done and not taken:
            taken.extend(tmp_path.glob("*.part"))
            taken[0].unlink()
            if published:
                target.write_bytes(BODY)

    assert download(server.url, DIGEST, tmp_path, take) == target
    assert target.read_bytes() == BODY
    assert len(server.asked) == 2 - published
    assert names(tmp_path) == [target.name]


def test_a_length_that_is_none(server: Server, tmp_path: Path) -> None:
    server.length = "many"
    with pytest.raises(ConnectionError, match="Content-Length of 'many'"):
        download(server.url, DIGEST, tmp_path)


def test_an_empty_file_in_the_cache_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model-12345678.pth").touch()
    assert download(server.url, DIGEST, tmp_path).read_bytes() == BODY
