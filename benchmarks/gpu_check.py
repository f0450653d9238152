"""``python benchmarks/gpu_check.py --json results.json``: `check`, from a checkout that nobody installed.

Needs torch, triton, numpy, pillow, safetensors, rich and pytest; torchvision for the comparison. Arguments are those of
``python -m trimask.benchmarks check --help``.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        # The checkout is the package: a link gives it the package's name.
        Path(folder, "trimask").symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "trimask.benchmarks", "check", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
