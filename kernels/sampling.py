"""Where RoIAlign samples: what its implementations share."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Where the samples of RoIs lie, and what is made of them.

    Attributes:
        scales: Feature pixels per picture pixel, for each level.
        thresholds: The sqrt(area) of a box from which on each level is taken; rising, from 0.
        output_size: Bins, height and width.
        sampling_ratio: Samples per bin and axis; ceil(bin size) of them where it is not positive.
        aligned: Pixel centres lie at half-integers and RoIs keep their size; else at integers, and sides are >= 1.
        mode: "avg" or "max" of the samples of a bin.
    """

    scales: Sequence[float]
    thresholds: Sequence[float]
    output_size: Sequence[int]
    sampling_ratio: int
    aligned: bool
    mode: str

    @property
    def adaptive(self) -> bool:
        return self.sampling_ratio <= 0
