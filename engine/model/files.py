"""Files that are there as a whole or not at all, and where to keep them. Needs no torch."""

import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["cache_dir", "check_writable", "is_exported", "write_json", "write_whole"]


def write_whole(path: Path, put: Callable[[IO[bytes]], Any]) -> Path:
    """Let ``put`` write a neighbour of ``path``, and move that into its place at the end.

    A reader or a crash never meets half a file; where ``put`` fails, what was there before stays.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to write it to, found none at {str(path.parent)!r}")
    part = path.with_name(f".{secrets.token_hex(8)}.part")  # short: a file's name may be as long as names get
    try:
        with part.open("xb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of a full disk
            error.filename = str(path)
        raise
    return path


def write_json(path: Path, content: Any, **options: Any) -> Path:
    """A JSON file by :func:`write_whole`; ``options`` are those of ``json.dumps``."""
    text = json.dumps(content, **options).encode()
    return write_whole(path, lambda file: file.write(text))


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written, and see that it takes one, ahead of the work for it.

    Raises:
        OSError: it does not; names the path.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, found a folder of that name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: expected a folder that can be written to ({error.strerror})") from error


def is_exported(name: str | Path) -> bool:
    """Whether a name is that of a file that `trimask export` wrote; all else is a checkpoint or a published name."""
    return str(name).lower().endswith(".onnx")


def cache_dir() -> Path:
    """Where downloads are kept: ``$TRIMASK_HOME``, or ``trimask`` in the platform's folder for caches."""
    if home := os.environ.get("TRIMASK_HOME"):
        return Path(home).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "trimask"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "trimask" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "trimask"
