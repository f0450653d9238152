"""Every float tolerance of the suite, with its reason. Indices, labels and counts are compared exactly."""

import torch

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def paste_tie(cells: int) -> float:
    """How far from the threshold float32 may still decide a pasted pixel otherwise than float64.

    A pixel reads at a u of at most `cells + 1`, after three roundings in each of two directions; neighbouring
    probabilities differ by at most 1, so the value is off by no more than u is.
    """
    return 6 * EPS[torch.float32] * (cells + 2)


# Two programs, one set of weights and one picture, float32. Rounding differs in the order of sums alone: boxes agree to
# a fraction of a pixel, and a mask differs in the pixels that lie on its very edge.
MATCH_IOU = 0.99
MATCH_SCORE = 1e-3
MATCH_MASK_IOU = 0.98
MATCH_MASK_PIXELS = 2  # instead of the IoU, for masks of a few pixels
# How near to a whole pixel the side of a box may lie, in pixels, for rounding to decide which one torchvision cuts it
# to: boxes of both programs are some 1e-4 apart, and the whole mask moves or grows with the pixel.
CUT_TIE = 1e-3

# Average precision from matched detections: the curve is made of the same detections.
AVERAGE_PRECISION = 1e-3

# The same model in half precision, on some tens of pictures: a proposal more or less moves the figure by tenths of a
# point, either way. A weight or a box computed wrongly costs many points.
HALF_AVERAGE_PRECISION = 1e-2

# Levels of 0..255 by which a decoded picture may be off what was stored.
JPEG_LEVELS = 4  # flat patches, quality 95: two roundings of each of three channels and their chroma
COLOR_LEVELS = 2  # conversions between colour spaces that round to 8 bits on both sides

# A norm folded into its convolution, and sums in another order, relative to the largest value of the tensor.
FOLDED = 1e-4

# The same sums, perhaps by another convolution algorithm: a few roundings of values near 1.
SAME_OPS = {"rtol": 1e-4, "atol": 1e-4}

# The same sums in another order: rounding grows with their length, up to 12544 terms in the box head.
SUMMED_DIFFERENTLY = {"rtol": 1e-4, "atol": 1e-3}


def roi_align_error(feature: torch.Tensor, largest: float) -> float:
    """RoIAlign of a map `[N, C, H, W]` of values up to `largest`, against float64.

    A coordinate of up to max(H, W), rounded once, moves a sample by that much of a pixel's difference. float16 and
    bfloat16 round the weights of a sum and the sum itself besides, each by half an eps.
    """
    half = feature.dtype in (torch.float16, torch.bfloat16)
    place = EPS[torch.float64 if feature.dtype == torch.float64 else torch.float32] * max(feature.shape[2:])
    return (place + half * EPS[feature.dtype]) * largest


# Winograd's transforms cost a few bits of float32, relative to all that could be summed: the largest input times the
# absolute weights of an output (some of which meet only padding). A wrong transform costs all bits.
WINOGRAD = 2e-6

# A loss of torchvision's, relative: the same terms, summed in another order over features that agree to rounding.
LOSS = 1e-5

# Five steps of training in float64 beside torchvision's, and gradients by the norm of their difference: relative.
# Torchvision makes one of its targets in float32.
STEPS = 1e-6

# What rounding in float64 leaves of a gradient that cancels, as that of a bias before a live norm does, relative to
# the longest gradient of all.
NO_GRADIENT = 1e-13

# A loss in bfloat16, whose activations have 8 bits, with gradients and sums in float32: relative.
HALF_LOSS = 1e-2


def decoded_box(dtype: torch.dtype, largest: float) -> float:
    """A decoded coordinate against float64, where nothing on the way to it exceeds `largest`.

    Five roundings by half an eps each, and an exponential that may be an ulp off.
    """
    return 4 * EPS[dtype] * largest


def resized_level(longest: int) -> float:
    """A bilinear level of 0..255 by two programs in float32, of pictures with sides up to `longest`.

    A coordinate is rounded three times, by half an eps of up to `longest`, in each program and on each axis; a level
    changes by at most 255 from a pixel to the next. The weighted sum adds a few roundings of 255.
    """
    return (2 * 2 * 1.5 * longest + 8) * EPS[torch.float32] * 255
