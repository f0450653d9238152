"""Maps turned to channels_last: every bit stays, in every layout, and torch does what is not dense NCHW."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from backends import BACKENDS

turning = pytest.importorskip("trimask.kernels.gpu.turning")

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
DTYPES = [*INTEGERS, torch.float64]


@pytest.fixture(autouse=True, params=BACKENDS[1:])
def device(request: pytest.FixtureRequest) -> str:
    return "cuda" if request.param == "cuda" else "cpu"


def bits(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, device: str) -> Tensor:
    """Any bits, those of NaNs with a payload among them."""
    integer = INTEGERS.get(dtype, torch.int64)
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, shape, generator=rng, dtype=integer).to(device).view(dtype)


def assert_turned(sources: list[Tensor]) -> list[Tensor]:
    turned = turning.to_channels_last(sources)
    assert len(turned) == len(sources)
    for source, target in zip(sources, turned, strict=True):
        integer = INTEGERS.get(source.dtype, torch.int64)
        assert target.shape == source.shape
        assert target.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(target.contiguous().view(integer), source.contiguous().view(integer))
    return turned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "c", "sizes"),
    [
        (2, 70, [(9, 11), (16, 16), (3, 200), (1, 2)]),  # rows that 16 bytes divide, and that they do not
        (3, 64, [(8, 16)]),
        (1, 3, [(13, 17), (1, 1), (7, 1)]),
        (2, 130, [(1, 257)]),
    ],
)
def test_every_bit_stays(
    n: int, c: int, sizes: list[tuple[int, int]], dtype: torch.dtype, rng: torch.Generator, device: str
) -> None:
    assert_turned([bits((n, c, *size), dtype, rng, device) for size in sizes])


@pytest.mark.parametrize(("c", "size"), [(1, (5, 9)), (4, (1, 1)), (0, (3, 4))])
def test_what_is_channels_last_already_is_not_copied(c: int, size: tuple[int, int], device: str) -> None:
    """So is a map of one channel, or of one pixel, whatever it is called; and one without channels has nothing."""
    source = torch.rand(2, c, *size, device=device)
    (turned,) = turning.to_channels_last([source])
    assert turned.shape == source.shape
    assert turned.data_ptr() == source.data_ptr()
    last = torch.rand(2, 5, 3, 4, device=device).to(memory_format=torch.channels_last)
    assert turning.to_channels_last([last])[0] is last


def test_what_is_not_dense_is_left_to_torch(rng: torch.Generator, device: str) -> None:
    """Beside dense levels, whose order stays; the kernel never sees the others."""
    dense = [bits((2, 6, 5, 8), torch.float32, rng, device), bits((2, 6, 3, 4), torch.float32, rng, device)]
    wide = bits((2, 6, 5, 16), torch.float32, rng, device)
    others = [wide[..., ::2], wide.transpose(2, 3), wide[:, :, 1:], wide[:1].expand(2, -1, -1, -1)]
    with mock.patch.object(turning, "_turned", wraps=turning._turned) as seen:
        assert_turned([dense[0], *others, dense[1], dense[0].to(memory_format=torch.channels_last)])
    (levels,) = seen.call_args.args
    assert [x.data_ptr() for x in levels] == [x.data_ptr() for x in dense]


def test_maps_that_begin_anywhere(rng: torch.Generator, device: str) -> None:
    """A map that begins between multiples of 16 bytes has no wide loads."""
    whole = bits((1, 6, 4, 8), torch.float16, rng, device).flatten()
    shifted = whole[3 : 3 + 5 * 32].view(1, 5, 4, 8)
    assert shifted.data_ptr() % 16
    assert_turned([shifted])


@pytest.mark.gpu
def test_a_map_beyond_two_to_the_31_values() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free memory on the device")
    source = torch.zeros(1, 8, 16_500, 16_500, dtype=torch.float16, device="cuda")
    source[0, :, -1, -1] = torch.arange(8, device="cuda")
    source[0, :, 0, 5] = 1
    (turned,) = turning.to_channels_last([source])
    assert turned.stride() == (source.numel(), 1, 8 * 16_500, 8)
    assert turned[0, :, -1, -1].tolist() == list(range(8))
    assert turned[0, :, 0, 5].tolist() == [1] * 8
    assert float(turned.sum(dtype=torch.float32)) == 8 + sum(range(8))
