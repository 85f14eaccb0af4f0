"""Exact percentiles of a volume of any size, in two passes and constant memory.

The bits of float32 numbers, read as integers with the negative ones reversed, sort like the numbers themselves. The
first pass makes a histogram of the upper 16 bits, which shows the bin of each wanted order statistic. The second pass
makes a histogram of the lower 16 bits within these bins. The results are the order statistics themselves, not the edges
of bins, so they do not depend on how the volume is divided into regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.core.executor import SERIAL, Executor

_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)


def percentiles(
    read: Callable[[Region], NDArray[Any]],
    regions: Sequence[Region],
    percents: Sequence[float],
    *,
    executor: Executor = SERIAL,
) -> list[float]:
    """Return percentiles of a volume, ignoring NaN; they equal `numpy.percentile` of the float32 array.

    Parameters
    ----------
    read
        Returns a region of the volume, in any real dtype. Must be picklable if `executor` uses other processes.
    regions
        Regions that cover every voxel exactly once. A task holds one region and its float32 copy in memory.
    percents
        From 0 to 100.
    executor
        Runs one task for each region, in two passes.

    Returns
    -------
    list of float
        Interpolated linearly between neighbouring order statistics; NaN if all voxels are NaN.

    Examples
    --------
    >>> volume = np.array([3, 1, 2, 5, 4, np.nan])
    >>> percentiles(lambda region: volume[region], [(slice(0, 3),), (slice(3, 6),)], (0, 50, 87.5, 100))
    [1.0, 3.0, 4.5, 5.0]
    """
    upper = np.sum(executor.map(partial(_upper_halves, read=read), regions, name="percentiles"), axis=0)
    ends = np.cumsum(upper)
    count = int(ends[-1])
    if count == 0:
        return [float("nan")] * len(percents)
    exact = [(count - 1) * percent / 100 for percent in percents]
    ranks = sorted({rank for at in exact for rank in (int(at), min(int(at) + 1, count - 1))})
    halves = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    wanted = sorted(set(halves))
    count_lower = partial(_lower_halves, read=read, wanted=wanted)
    lower = np.sum(executor.map(count_lower, regions, name="percentiles"), axis=0)
    value = {}
    for rank, half in zip(ranks, halves, strict=True):
        before = int(ends[half] - upper[half])
        rest = int(np.searchsorted(np.cumsum(lower[wanted.index(half)]), rank - before, side="right"))
        value[rank] = _number(half << 16 | rest)
    found = []
    for at in exact:
        low, high = value[int(at)], value[min(int(at) + 1, count - 1)]
        found.append(low if low == high else low + (at - int(at)) * (high - low))
    return found


def _keys(voxels: NDArray[Any]) -> NDArray[np.uint32]:
    """Return integers that sort like the voxels, without NaN."""
    with np.errstate(over="ignore"):  # too large numbers become infinite, as in the network's scaling
        numbers = np.ascontiguousarray(voxels, np.float32).reshape(-1)
    bits = numbers[~np.isnan(numbers)].view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _number(key: int) -> float:
    bits = np.array([key], np.uint32)
    bits = np.where(bits & _SIGN, bits ^ _SIGN, ~bits)
    return float(bits.view(np.float32)[0])


def _upper_halves(region: Region, *, read: Callable[[Region], NDArray[Any]]) -> NDArray[np.int64]:
    return np.bincount(_keys(read(region)) >> 16, minlength=_HALF)


def _lower_halves(
    region: Region, *, read: Callable[[Region], NDArray[Any]], wanted: Sequence[int]
) -> NDArray[np.int64]:
    keys = _keys(read(region))
    upper = keys >> 16
    return np.stack([np.bincount(keys[upper == half] & (_HALF - 1), minlength=_HALF) for half in wanted])
