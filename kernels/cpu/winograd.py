"""3x3 convolution of float32 maps by Winograd's minimal filtering, F(4x4, 3x3): 4 times fewer multiplications.

A tile of 6 x 6 inputs gives 4 x 4 outputs (Lavin and Gray, 2016)::

    Y = A^T [ (G g G^T) * (B^T d B) ] A

summed over channels between the two transforms, where it is 36 matrix products. The transforms are products too, with
Kronecker squares of A and B. The matrices come from the Cook-Toom construction at the points 0, 1, -1, 1/2, -2 and
infinity, which Barabasz et al. (2020) found to lose the least accuracy: with 256 channels the largest error is 1.3e-5
of outputs up to 5, where a direct convolution's is 1e-5.

On an x86 the products are one grouped convolution of oneDNN, whose weights are laid out once for all calls: a batch of
products in the BLAS lays them out anew for each few tiles.

Against oneDNN's direct convolution, on one thread of an EPYC with AVX-512, it has 1.4 times the speed for 128 channels
at 100 x 168, 2.0 for 256 at 200 x 336, 2.2 for 512 at 25 x 42, 1.5 for 100 RoIs of 256 at 14 x 14, and none to gain for
64 channels.
"""

import platform
from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["differentiable_conv", "prepare_weight", "tiles_at_a_time", "weight_gradient", "winograd_conv", "worth_it"]

POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
OUT, IN = 4, 6  # sides of a tile of outputs, and of the inputs that they need
TILES = 84  # at a time and thread: 3 MB of transformed inputs at 256 channels
THREADS = 4  # more share the same tiles, or small maps would be mostly padding
# How many outputs may be computed for each that is wanted, in tiles that hang over and rows of padding, until a direct
# convolution is faster: by channels, of which there must be so many.
WORTH = {256: 2.0, 128: 1.5}


def _cook_toom() -> tuple[Tensor, Tensor, Tensor]:
    """A^T [4, 6], G [6, 3] and B^T [6, 6], float64."""
    kind: Any = {"dtype": torch.float64, "device": "cpu"}  # whatever the defaults are at import
    a, g, b = (torch.zeros(rows, columns, **kind) for rows, columns in ((OUT, IN), (IN, 3), (IN, IN)))

    def product(points: list[float]) -> Tensor:
        """Coefficients of the polynomial with these roots, lowest first."""
        result = torch.ones(1, **kind)
        for point in points:
            result = F.pad(result, (1, 0)) - point * F.pad(result, (0, 1))
        return result

    for j, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        a[:, j] = torch.tensor([point**i for i in range(OUT)], **kind)
        scale = torch.tensor([point - other for other in others], **kind).prod()
        g[j] = torch.tensor([point**i for i in range(3)], **kind) / scale
        b[j, : IN - 1] = product(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = product(list(POINTS))
    return a, g, b


with torch.inference_mode(False):  # constants that autograd can save, even if a model is running at import
    _A, _G, _B = _cook_toom()
    _INPUT = torch.kron(_B, _B).float()  # [36, 36]
    _OUTPUT = torch.kron(_A, _A).float()  # [16, 36]

_GEOMETRY = ((0, 0), (1, 1), (1, 1), IN * IN)  # of 36 products as one convolution: padding, stride, dilation, groups


def tiles_at_a_time() -> int:
    """A constant: what oneDNN has laid out for one number of tiles it would lay out anew, slowly, for another."""
    return TILES * min(torch.get_num_threads(), THREADS)


def worth_it(images: int, height: int, width: int, channels: int) -> bool:
    """Whether it is faster than oneDNN's direct convolution, of maps with so many channels at least."""
    tiles = images * -(-height // OUT) * -(-width // OUT)
    step = tiles_at_a_time()
    computed = -(-tiles // step) * step * OUT * OUT
    most = next((most for least, most in WORTH.items() if channels >= least), 0)
    return computed <= most * images * height * width


def prepare_weight(weight: Tensor) -> Tensor:
    """The weight [O, C, 3, 3] of a convolution, ready for :func:`winograd_conv` with as many threads as there are now.

    Returns:
        float32 [36, O, C], or a tensor that only oneDNN can read.
    """
    return _laid_out(_transformed_weight(weight.double()).float())


def _transformed_weight(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] as [36, O, C]."""
    rows = weight.permute(2, 3, 0, 1)  # [3, 3, O, C]
    g = torch.kron(_G, _G).to(weight)  # [36, 9]
    return torch.mm(g, rows.reshape(9, -1)).view(IN * IN, *rows.shape[2:])


@lru_cache(1)
def _has_grouped_products() -> bool:
    """Elsewhere oneDNN's grouped convolutions may be its slowest."""
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def _laid_out(weight: Tensor) -> Tensor:
    if not _has_grouped_products():
        return weight
    products, outputs, inputs = weight.shape
    grouped = weight.reshape(products * outputs, inputs, 1, 1)
    shape = (1, products * inputs, tiles_at_a_time(), 1)
    return torch.ops.mkldnn._reorder_convolution_weight(grouped, *_GEOMETRY, shape)


def _products(u: Tensor, weight: Tensor) -> Tensor:
    """[T, 36, C] by what :func:`_laid_out` made of [36, O, C]: [T, 36, O]."""
    if weight.layout == torch.strided:
        m = u.new_empty(*u.shape[:2], weight.shape[1])
        torch.bmm(u.transpose(0, 1), weight.transpose(1, 2), out=m.transpose(0, 1))
        return m
    x = u.view(1, len(u), 1, -1).permute(0, 3, 1, 2)  # [1, 36 C, T, 1]
    m = torch.ops.mkldnn._convolution_pointwise(x, weight, None, *_GEOMETRY, "none", [], "")
    return m.permute(0, 2, 3, 1).view(*u.shape[:2], -1)


class _Tiles(NamedTuple):
    """Some tiles of maps: pixels are numbered through all rows and images."""

    inputs: Tensor  # int32 [T * 36]: pixels of a tile's inputs; of those outside, the nearest
    outside: Tensor  # int64: which of these are
    outputs: Tensor  # int64 [K]: pixels of the tiles' outputs, without those outside
    kept: Tensor  # int64 [K]: where these are among all T * 16


@lru_cache(16)
def _tiled(images: int, height: int, width: int, step: int) -> tuple[_Tiles, ...]:
    """The tiles of maps, ``step`` at a time; the last ones are filled up with tiles outside."""
    with torch.inference_mode(False), torch.device("cpu"):
        rows, columns = -(-height // OUT), -(-width // OUT)
        tiles = images * rows * columns
        tile = torch.arange(-(-tiles // step) * step)
        image = tile // (rows * columns)
        y = (OUT * (tile // columns % rows) - 1)[:, None] + torch.arange(IN)  # [tiles, 6]
        x = (OUT * (tile % columns) - 1)[:, None] + torch.arange(IN)
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
        inside &= (tile < tiles)[:, None, None]
        start = image.clamp(max=images - 1)[:, None, None] * height
        pixels = (start + y.clamp(0, height - 1)[:, :, None]) * width + x.clamp(0, width - 1)[:, None]  # [tiles, 6, 6]
        middle = slice(1, 1 + OUT)  # of the inputs: the outputs
        result = []
        for i in range(0, len(tile), step):
            some = slice(i, i + step)
            kept = inside[some, middle, middle].flatten().nonzero()[:, 0]
            outputs = pixels[some, middle, middle].flatten()[kept]
            outside = (~inside[some]).flatten().nonzero()[:, 0]
            result.append(_Tiles(pixels[some].flatten().int(), outside, outputs, kept))
        return tuple(result)


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    low: float,
    high: float,
    *,
    overwrite: bool = False,
    then: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Convolution with stride 1 and "same" padding, then a clamp; autocast changes nothing.

    A new map of tens of megabytes costs as much as a transform, because the system finds its memory page by page and
    no cache holds it; hence the two options.

    Args:
        x: float32 [N, C, H, W], best in channels_last memory.
        weight: what :func:`prepare_weight` gave.
        bias: float32 [O].
        low, high: limits of the outputs: 0 and infinity make a rectifier, two infinities nothing.
        overwrite: the result may take the place of ``x``, if it has as many channels.
        then: weight float32 [P, O] and bias [P] of a linear layer of each pixel, whose outputs are the result.

    Returns:
        float32 [N, O, H, W], or P for O, in channels_last memory.
    """
    with torch.autocast(x.device.type, enabled=False):
        images, channels, height, width = x.shape
        outputs, step = len(bias), tiles_at_a_time()
        made = outputs if then is None else len(then[1])
        # Tiles around a tile need what it would overwrite: those until one behind the tile below it.
        late = -(-(-(-width // OUT) + 1) // step) if overwrite and made == channels else 0
        if late:
            result = x = x.contiguous(memory_format=torch.channels_last)
        else:
            result = torch.empty((images, made, height, width), dtype=x.dtype, memory_format=torch.channels_last)
        rows, found = x.permute(0, 2, 3, 1).reshape(-1, channels), result.permute(0, 2, 3, 1).view(-1, made)
        d, u = x.new_empty(2, step, IN * IN, channels)
        ring = x.new_empty(max(late, 1), step, OUT * OUT, outputs)

        def write(tiles: _Tiles, y: Tensor) -> None:
            pixels = y.view(-1, outputs)
            if then is not None:
                pixels = _linear(pixels, *then)
            whole = len(tiles.kept) == len(pixels)
            found.index_copy_(0, tiles.outputs, pixels if whole else pixels.index_select(0, tiles.kept))

        waiting: deque[tuple[_Tiles, Tensor]] = deque()
        for i, tiles in enumerate(_tiled(images, height, width, step)):
            _transformed(rows, tiles, d, u)
            if late and len(waiting) == late:
                write(*waiting.popleft())
            y = ring[i % len(ring)]
            torch.baddbmm(bias.expand_as(y), _OUTPUT.expand(step, -1, -1), _products(u, weight), out=y)
            waiting.append((tiles, y.clamp_(low, high)))
            if not late:
                write(*waiting.popleft())
        for tiles, y in waiting:
            write(tiles, y)
        return result


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _has_grouped_products():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _transformed(rows: Tensor, tiles: _Tiles, d: Tensor, u: Tensor) -> Tensor:
    """``u`` [T, 36, C], the transformed inputs of tiles of ``rows`` [N H W, C]; ``d`` is scratch of its shape."""
    pixels = d.view(-1, d.shape[2])
    torch.index_select(rows, 0, tiles.inputs, out=pixels)
    pixels.index_fill_(0, tiles.outside, 0)
    return torch.bmm(_INPUT.expand(len(d), -1, -1), d, out=u)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight from those of the outputs of :func:`winograd_conv`, without its clamp.

    With D for the transformed inputs of a tile and E = A dY A^T, it is G^T [sum of D^T * E over the tiles] G.

    Args:
        x: float32 [N, C, H, W], best in channels_last memory.
        grad: float32 [N, O, H, W], likewise.

    Returns:
        float32 [O, C, 3, 3].
    """
    with torch.autocast(x.device.type, enabled=False):
        images, channels, height, width = x.shape
        outputs, step = grad.shape[1], tiles_at_a_time()
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        grads = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
        d, u = x.new_empty(2, step, IN * IN, channels)
        total = x.new_zeros(IN * IN, outputs, channels)
        for tiles in _tiled(images, height, width, step):
            g = grads.index_select(0, tiles.outputs)
            if len(g) < step * OUT * OUT:  # nothing comes from what hangs over
                g = g.new_zeros(step * OUT * OUT, outputs).index_copy_(0, tiles.kept, g)
            e = torch.bmm(_OUTPUT.t().expand(step, -1, -1), g.view(step, OUT * OUT, outputs))  # [T, 36, O]
            total.baddbmm_(e.permute(1, 2, 0), _transformed(rows, tiles, d, u).transpose(0, 1))
        g = torch.kron(_G, _G).float()  # [36, 9]
        return torch.mm(g.t(), total.view(IN * IN, -1)).view(3, 3, outputs, channels).permute(2, 3, 0, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return winograd_conv(x, _laid_out(_transformed_weight(weight)), bias, -torch.inf, torch.inf)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:  # the same convolution with the weight turned about, from outputs to inputs
            turned = _laid_out(_transformed_weight(weight.flip(2, 3).transpose(0, 1)))
            grads[0] = winograd_conv(grad, turned, grad.new_zeros(weight.shape[1]), -torch.inf, torch.inf)
        if ctx.needs_input_grad[1]:
            grads[1] = weight_gradient(x, grad)
        if ctx.needs_input_grad[2]:
            grads[2] = grad.sum((0, 2, 3))
        return tuple(grads)


def differentiable_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As :func:`winograd_conv` without limits, of a weight [O, C, 3, 3]; with gradients of all three, by Winograd too.

    A step of training takes 0.6 of the time of oneDNN's direct convolution for 2 x 128 channels at 80 x 128, 0.5 for
    256, both ways together; one thread of an EPYC with AVX-512.
    """
    return _Convolution.apply(x, weight, bias)
