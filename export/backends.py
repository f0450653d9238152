"""Programs that run an ONNX file, behind one face: named arrays in, named arrays out. Needs no torch."""

import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engine.model.files import cache_dir, check_writable

__all__ = ["Backend", "OnnxRuntime", "OpenVino", "open_backend"]

Arrays = dict[str, NDArray[Any]]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Backend(Protocol):
    """A file ready to run.

    Attributes:
        provider: what really computes, in the words of its program.
    """

    provider: str

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs by name."""


def open_backend(
    data: bytes,
    path: Path,
    name: str,
    device: str | None,
    threads: int | None,
    cache: bool,
    dtype: str = "float32",
    providers: Sequence[Any] | None = None,
    session_options: Any = None,
) -> Backend:
    """
    Args:
        data: an ONNX file that holds all its tensors.
        path: for errors.
        name: ``"onnxruntime"`` or ``"openvino"``.
        device, threads, cache, dtype, providers, session_options: as :class:`..runtime.Runtime` takes them.

    Raises:
        ValueError: an option out of range, or a file that the program does not take.
        ImportError: the program is not installed.
    """
    if name not in ("onnxruntime", "openvino"):
        raise ValueError(f'backend: expected "onnxruntime" or "openvino", got {name!r}')
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if dtype not in ("float32", "bfloat16") or (dtype == "bfloat16" and name != "openvino"):
        raise ValueError(f'dtype: expected "float32", or "bfloat16" with openvino, got {dtype!r} with {name}')
    if name == "openvino" and (providers is not None or session_options is not None):
        raise ValueError("providers, session_options: expected with onnxruntime alone, got openvino")
    if providers is not None and device is not None:
        raise ValueError(f"device: expected none beside providers, got {device!r}")
    if session_options is not None and threads is not None:
        raise ValueError(f"threads: expected none beside session_options, got {threads}")
    try:
        if name == "openvino":
            return OpenVino(data, device, threads, cache, {"float32": "f32", "bfloat16": "bf16"}[dtype])
        return OnnxRuntime(data, device, threads, cache, providers, session_options)
    except Exception as error:  # each has kinds of its own
        if isinstance(error, (ImportError, ValueError)) and not isinstance(error, UnicodeError):
            raise
        raise ValueError(f"{path}: {name} does not take this file: {str(error).strip()}") from error


def load_onnxruntime() -> Any:
    """The module.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "Runtime needs ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu for CUDA (never both: they "
            "are one module)"
        ) from error
    return onnxruntime


class OnnxRuntime:
    """A session of ONNX Runtime; arguments as of :func:`open_backend`."""

    def __init__(
        self,
        data: bytes,
        device: str | None,
        threads: int | None,
        cache: bool,
        providers: Sequence[Any] | None,
        session_options: Any,
    ) -> None:
        self._onnxruntime = onnxruntime = load_onnxruntime()
        wanted, number = _provider(device, onnxruntime.get_available_providers())
        if providers is None:
            providers = [(wanted, {"device_id": number}), CPU] if wanted == CUDA else [CPU]
        else:  # whatever they are and do, nothing is known of what they would keep, nor where their memory is
            wanted, cache = CPU, False
        if wanted == CUDA and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries, where pip installed them
        # Falling back from the CPU to the CPU, it would say so on stdout and try a bad file again.
        session = partial(
            onnxruntime.InferenceSession, providers=list(providers), enable_fallback=int(len(providers) > 1)
        )
        if session_options is not None:
            self._session = session(data, session_options)
        elif cache:
            self._session = self._kept_session(session, data, self._kept(data, providers), threads)
        else:
            self._session = session(data, self._options(threads))
        self.provider: str = self._session.get_providers()[0]
        if device is not None and device.startswith("cuda") and self.provider != CUDA:
            warnings.warn(
                f"device: expected {device!r}, but {self.provider} runs: this ONNX Runtime {onnxruntime.__version__} "
                "finds no CUDA (install onnxruntime-gpu, and the CUDA and cuDNN versions it was built for)",
                stacklevel=4,
            )
        self._device = ("cuda", number) if wanted == self.provider == CUDA else ("cpu", 0)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            value = self._onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self._device)
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")  # the runtime sends it there itself
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def _kept_session(self, session: Callable[..., Any], data: bytes, kept: Path, threads: int | None) -> Any:
        """A session, from what an earlier one made of the same file on this kind of machine, if there is that."""
        if kept.is_file():
            with suppress(Exception):  # damaged, or of another build: made anew
                options = self._options(threads)
                options.graph_optimization_level = self._onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                return session(kept.read_bytes(), options)
        part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
        with suppress(Exception):  # nowhere to keep it, or no room: it is optimised every time
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                options = self._options(threads)
                options.optimized_model_filepath = str(part)
                opened = session(data, options)
                with suppress(OSError):
                    os.replace(part, kept)
                return opened
            finally:
                part.unlink(missing_ok=True)
        return session(data, self._options(threads))

    def _options(self, threads: int | None) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        return options

    def _kept(self, data: bytes, providers: Sequence[Any]) -> Path:
        """Where the optimised graph is: it fits this file, this build of the runtime and this kind of processor."""
        build = (self._onnxruntime.__version__, str(providers), platform.machine(), _processor())
        digest = hashlib.sha256(data)
        digest.update(repr(build).encode())
        return cache_dir() / "onnxruntime" / f"{digest.hexdigest()[:32]}.onnx"


class OpenVino:
    """A model compiled by OpenVINO; ``precision`` in its words, other arguments as of :func:`open_backend`."""

    def __init__(self, data: bytes, device: str | None, threads: int | None, cache: bool, precision: str) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError("backend openvino needs its package: pip install openvino") from error
        core = openvino.Core()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}  # by itself it takes bfloat16
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if cache:
            kept = cache_dir() / "openvino"
            with suppress(OSError):  # nowhere to keep it: it is compiled every time
                check_writable(kept / "blob")
                options["CACHE_DIR"] = str(kept)
        target = (device or "CPU").upper()
        self._compiled = core.compile_model(core.read_model(data), target, options)
        devices = self._compiled.get_property("EXECUTION_DEVICES")
        self.provider = f"OpenVINO {devices if isinstance(devices, str) else ','.join(devices)}"

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        found = self._compiled.create_infer_request().infer(dict(inputs))
        return {next(iter(port.names)): np.array(value) for port, value in found.items()}


@cache
def _processor() -> str:
    """What the layout of a graph depends on: a container's name changes, where its processor may not."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return platform.node()


def _provider(device: str | None, available: list[str]) -> tuple[str, int]:
    """The provider to ask for, and the number of its device."""
    if device is None:
        return (CUDA if CUDA in available else CPU), 0
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f'device: expected "cpu", "cuda" or "cuda:1", got {device!r}')
    return (CUDA if kind == "cuda" and CUDA in available else CPU), int(number or 0)
