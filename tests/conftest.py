"""What every test shares: a printed seed, the optional pictures, a quiet and strict torch."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_report_header() -> str:
    return f"seed: {_SEED} (set TRIMASK_TEST_SEED to repeat)"


# In the environment, where the processes that share the tests find it.
_SEED = int(os.environ.setdefault("TRIMASK_TEST_SEED", str(int.from_bytes(os.urandom(3), "little"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is about plain torch runs on no other backend, and what needs a GPU is skipped without one."""
    items[:] = [item for item in items if not item.get_closest_marker("host") or _on_torch(item)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _on_torch(item: pytest.Item) -> bool:
    case = getattr(item, "callspec", None)
    return case is None or case.params.get("_backend", "torch") == "torch"


@pytest.fixture
def seed() -> int:
    """A fresh seed per run, printed in the header."""
    return _SEED


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def np_rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """OpenMP threads that share a core with another process wait for each other at every operation."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _strict_torch() -> None:
    torch.manual_seed(_SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Torch raises where it would wait for the GPU, other than for an event."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The optional folder of photographs, annotations and trained weights beside the checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the optional pictures in {folder}")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The optional folder of recorded outputs of the peers beside the checkout."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"needs the optional recorded outputs in {folder}")
    return folder
