"""Regions of arrays, and arrays that are read a region at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


def sliced(read: Callable[[Region], NDArray[Any]], shape: Sequence[int], dtype: Any, index: Any) -> NDArray[Any]:
    """Index an array of `shape` and `dtype` with slices and integers, reading a single region of it.

    Parameters
    ----------
    read
        Returns a region, whose slices have a start, a stop and no step.
    shape, dtype
        Shape and dtype of the array.
    index
        A slice or an integer, or a tuple of these for the first axes.

    Examples
    --------
    >>> import numpy as np
    >>> array = np.arange(12).reshape(3, 4)
    >>> sliced(array.__getitem__, array.shape, array.dtype, (1, slice(None, None, -2)))
    array([7, 5])
    """
    import numpy as np  # here, because errors in a configuration are reported before numpy is loaded

    given = index if isinstance(index, tuple) else (index,)
    given = (*given, *[slice(None)] * (len(shape) - len(given)))
    parts = [
        range(size)[part] if isinstance(part, slice) else range(range(size)[part], range(size)[part] + 1)
        for size, part in zip(shape, given, strict=True)
    ]
    if not all(parts):  # dask reads an empty region to learn the dtype
        return np.zeros([len(p) for p, part in zip(parts, given, strict=True) if isinstance(part, slice)], dtype)
    voxels = np.asarray(read(tuple(slice(min(p[0], p[-1]), max(p[0], p[-1]) + 1) for p in parts)))
    kept = (slice(None, None, p.step) if isinstance(part, slice) else 0 for p, part in zip(parts, given, strict=True))
    return voxels[tuple(kept)]


def regions_of(shape: Sequence[int], step: Sequence[int]) -> Iterator[Region]:
    """Divide an array of `shape` into regions of `step`, smaller at the far edges, in C order."""
    edges = (
        [slice(start, min(start + width, size)) for start in range(0, size, width)]
        for size, width in zip(shape, step, strict=True)
    )
    return itertools.product(*edges)
