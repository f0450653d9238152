"""What follows a convolution on a GPU, beside torch's own operations, on the maps of a ResNet-50 FPN.

What must move at least: each input read once, the output written once; of a fused convolution also the weights.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.epilogue import add_bias, conv_relu, pool_bias_relu
from .device import Bench
from .harness import Row

__all__ = ["cases"]

Case = Callable[[Bench], list[Row]]
LAST = torch.channels_last


def cases(quick: bool) -> Iterator[Case]:
    """Bias of P2, a lateral of the pyramid, the stem's pooling, and two convolutions of the trunk."""
    yield from (_bias, _lateral, _pooling)
    for inner in (False, True):
        yield partial(_convolution, inner=inner)


def _map(bench: Bench, channels: int, height: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(channels + height)
    batch, shrunk = (1, 8) if bench.quick else (8, 1)
    values = torch.randn(batch, channels, height // shrunk, width // shrunk, generator=rng)
    return bench.put(values.half().contiguous(memory_format=LAST))


def _close(expected: Tensor, got: Tensor, allowed: float = 3.0) -> str:
    """Torch's rounds after each operation."""
    error = float((expected.float() - got.float()).abs().max())
    limit = allowed * torch.finfo(torch.float16).eps * float(expected.float().abs().max())
    return "" if error <= limit else f"off by {error:.1e}, more than {limit:.1e}"


def _compared(
    bench: Bench, case: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor], *inputs: Tensor
) -> list[Row]:
    least = sum(x.nbytes for x in inputs) + ours().nbytes
    calls = {"torch": theirs, "trimask": ours}
    return bench.compare("epilogue", case, calls, _close, dtype="float16", least_bytes=least)


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))


def _bias(bench: Bench) -> list[Row]:
    x = _map(bench, 256, 200, 336)
    bias = x[0, :, 0, 0].clone()
    case = f"bias, {_shape(x)}"
    return _compared(bench, case, lambda: x + bias[:, None, None], lambda: add_bias(x, bias), x)


def _lateral(bench: Bench) -> list[Row]:
    x, above = _map(bench, 256, 200, 336), _map(bench, 256, 100, 168)
    bias = x[0, :, 0, 0].clone()

    def theirs() -> Tensor:
        return (x + bias[:, None, None]) + F.interpolate(above, size=x.shape[2:], mode="nearest")

    case = f"bias and coarser map, {_shape(x)}"
    return _compared(bench, case, theirs, lambda: add_bias(x, bias, above), x, above)


def _pooling(bench: Bench) -> list[Row]:
    x = _map(bench, 64, 400, 672)
    bias = x[0, :, 0, 0].clone()

    def theirs() -> Tensor:
        return F.max_pool2d((x + bias[:, None, None]).relu_(), 3, 2, 1)

    return _compared(bench, f"bias, rectifier and pooling, {_shape(x)}", theirs, lambda: pool_bias_relu(x, bias), x)


def _convolution(bench: Bench, inner: bool) -> list[Row]:
    """Of the second stage: the 3x3, or the 1x1 that the residual is added to."""
    x = _map(bench, 128, 100, 168)
    outputs, kernel = (128, 3) if inner else (512, 1)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, 128, kernel, kernel, generator=rng) * (2 / (128 * kernel**2)) ** 0.5
    weight, bias = bench.put(weight.half().contiguous(memory_format=LAST), torch.randn(outputs, generator=rng).half())
    residual = None if inner else _map(bench, 512, 100, 168)

    def theirs() -> Tensor:
        out = F.conv2d(x, weight, bias, padding=kernel // 2)
        return (out if residual is None else out.add_(residual)).relu_()

    ours = partial(conv_relu, x, weight, bias, residual, padding=(kernel // 2, kernel // 2))
    what = "rectifier" if inner else "residual and rectifier"
    case = f"{kernel} x {kernel} convolution and {what}, {_shape(x)} to {outputs}"
    return _compared(bench, case, theirs, ours, x, weight, *([] if residual is None else [residual]))
