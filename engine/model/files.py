"""Files that are there as a whole or not at all. Needs no torch."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["write_whole"]


def write_whole(path: Path, put: Callable[[IO[bytes]], Any]) -> Path:
    """Let ``put`` write a neighbour of ``path``, and move that into its place at the end.

    A reader or a crash never meets half a file; where ``put`` fails, what was there before stays.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path
