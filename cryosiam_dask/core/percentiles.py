"""Exact percentiles of a volume of any size, in two passes and constant memory.

The bits of float32 numbers, read as whole numbers with the negative ones turned around, are in the order of the
numbers. The first pass counts how many voxels have each of the 65,536 values of the upper half of these bits, which
says in which one each wanted order statistic lies; the second counts the lower halves there. What comes out are the
order statistics themselves, not the edges of bins, so the result does not depend on how the volume is cut into pieces.
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
    """Percentiles of all voxels of a volume, NaN left out, as `numpy.percentile` has them of the array as float32.

    Parameters
    ----------
    read
        Gives a region of the volume, in any real dtype. Must be picklable where `executor` has processes of its own.
    regions
        Parts that make up the volume, each voxel in one of them. A task holds one part, and as much again as float32.
    percents
        From 0 to 100.
    executor
        Runs two passes over the parts.

    Returns
    -------
    list of float
        Linear between neighbouring order statistics; NaN where all voxels are NaN.

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
    """Whole numbers in the order of the voxels that are not NaN."""
    with np.errstate(over="ignore"):  # infinite then, as the network's scaling has it
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
