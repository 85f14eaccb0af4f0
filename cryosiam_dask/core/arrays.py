"""Regions of arrays, and arrays that are read a region at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

#: A slice for each axis, in the order of the array's axes.
Region: TypeAlias = tuple[slice, ...]


class Sliceable(Protocol):
    """An array that is read a region at a time: zarr, Dask, HDF5, NumPy or anything that slices like them.

    If it has `chunks`, these are the unit of reading and writing.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, region: Any, /) -> Any: ...


class WritableArray(Sliceable, Protocol):
    """An array that blocks are written to."""

    def __setitem__(self, key: Any, value: Any, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Computed:
    """An array whose regions are computed, each time they are read, from the same regions of another array.

    Attributes
    ----------
    source
        The other array, with the same shape and chunks.
    compute
        Called with a region of `source`, returns that region of this array; picklable if the array is sent to workers.
    dtype
        Dtype of what `compute` returns.
    """

    source: Sliceable
    compute: Callable[[Any], Any]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `source`."""
        return tuple(self.source.shape)

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Chunk shape of `source`; ``None`` without chunks."""
        return getattr(self.source, "chunks", None)

    def __getitem__(self, region: Any, /) -> Any:
        return self.compute(self.source[region])


def regions_of(shape: Sequence[int], step: Sequence[int]) -> Iterator[Region]:
    """Divide an array of `shape` into regions of `step`, smaller at the far edges, in C order."""
    edges = (
        [slice(start, min(start + width, size)) for start in range(0, size, width)]
        for size, width in zip(shape, step, strict=True)
    )
    return itertools.product(*edges)
