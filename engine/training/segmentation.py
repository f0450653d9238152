"""COCO's segmentations: polygons, compressed and uncompressed run lengths, all turned into run lengths.

Run lengths are read by :mod:`trimask.kernels.cpu.masks`, which refuses bad ones. Polygons are rasterised by
pycocotools, as are those that models are evaluated against.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu.masks import decode_runs, fills_picture

__all__ = ["polygons_of", "runs_of"]

REACH = 16  # in sides of the picture: pycocotools steps along every edge, however far it leads


def runs_of(segmentation: Any, size: tuple[int, int]) -> NDArray[np.int64]:
    """The run lengths of a segmentation: column by column, zeros first.

    Args:
        segmentation: a list of polygons ``[x1, y1, x2, y2, ...]``, or ``{"size": [h, w], "counts": ...}`` with a list
            or COCO's compressed string.
        size: (height, width) of the picture.

    Raises:
        ValueError: anything else, or run lengths of another size.
        ImportError: polygons without pycocotools.
    """
    if not isinstance(segmentation, Mapping):
        return _runs_of_polygons(polygons_of(segmentation, size), size)
    counts, given = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(given, Sequence) or list(given) != list(size):
        raise ValueError(f"segmentation: expected run lengths of size {list(size)}, got {given}")
    if isinstance(counts, (str, bytes)):
        runs = decode_runs(counts)
    elif isinstance(counts, Sequence) and all(isinstance(count, int) and 0 <= count < 2**62 for count in counts):
        runs = np.asarray(counts, np.int64)
    else:
        raise ValueError(f"segmentation: expected counts as a string or a list of integers, got {counts!r:.60}")
    if not fills_picture(runs, size[0] * size[1]):
        raise ValueError(f"segmentation: expected run lengths that sum to {size[0]} x {size[1]}, got {runs.sum()}")
    return runs


def polygons_of(segmentation: Any, size: tuple[int, int]) -> list[NDArray[np.float64]]:
    """The polygons ``[P, 2]`` (x, y) of a list of them; a :class:`ValueError` for anything else."""
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, (str, bytes)) or not segmentation:
        raise ValueError(f"segmentation: expected polygons or run lengths, got {segmentation!r:.60}")
    limit = REACH * max(size)
    polygons = []
    for flat in segmentation:
        try:
            points = np.asarray(flat)
        except ValueError:  # lists of different lengths
            points = np.empty((0, 0))
        if points.dtype.kind not in "iuf" or points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise ValueError(f"segmentation: expected polygons [x1, y1, x2, y2, x3, y3, ...], got {flat!r:.60}")
        points = points.astype(np.float64)
        if not (np.abs(points) <= limit).all():  # nor NaN
            raise ValueError(f"segmentation: expected points within {limit} pixels, got {flat!r:.60}")
        polygons.append(points.reshape(-1, 2))
    return polygons


def _runs_of_polygons(polygons: list[NDArray[np.float64]], size: tuple[int, int]) -> NDArray[np.int64]:
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError("polygons: expected pycocotools, which rasterises them; pip install pycocotools") from None
    parts = mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *size)
    return decode_runs(mask.merge(parts)["counts"])
