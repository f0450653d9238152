"""How much memory this process had. Needs no torch."""

import re
import sys
from pathlib import Path

__all__ = ["resident_bytes"]


def resident_bytes() -> int | None:
    """Bytes of memory that the process had at most; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # where `getrusage` would count the process that started this one
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
