"""The intensities of a tomogram, from a sample that costs as little for four gigavoxels as for four million.

A tomogram lies in pieces that are read at once: chunks, or some rows of a section. `evenly_spread` chooses pieces that
are evenly spread along each axis and hold no more than so many voxels together; a tomogram with no more than that is
read in full. A compressed file can only be read from its beginning, so the sample is its first sections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cryosiam_dask.mrc_to_zarr import MrcHeader, read_beginning, read_part
from cryosiam_dask.tomogram_files import TomogramHeader

SAMPLE_VOXELS = 1 << 22  # 16 MiB of float32, a fraction of a second
SAMPLE_STREAM_BYTES = 64 * 2**20  # of a compressed file, uncompressed
_ROWS_VOXELS = 1 << 14  # read at once from a file that has no chunks
_CENTRAL = (0.005, 0.995)  # quantiles between which the central 99 % lie

Region: TypeAlias = tuple[slice, ...]


class Array(Protocol):
    """A zarr array, an HDF5 dataset, or whatever else has a shape and NumPy's slicing."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, region: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """Some voxels of a tomogram.

    Attributes
    ----------
    values
        Their intensities, one axis, float32.
    share
        Of the tomogram's voxels, 0 to 1.
    where
        Which voxels these are, in words.
    """

    values: NDArray[np.float32]
    share: float
    where: str


@dataclass(frozen=True, slots=True)
class Intensities:
    """How the intensities of a tomogram fall into [min, max], as far as a sample tells.

    Attributes
    ----------
    share, where
        As of `Sample`.
    lowest, highest, median
        Of the finite voxels; ``None`` without any.
    central
        Between which intensities the central 99 % of the finite voxels lie; ``None`` without any.
    below, above
        Shares of the voxels that lie below min and above max, where they are clipped; 0 to 1.
    non_finite
        Share of the voxels that are NaN or infinite.
    """

    share: float
    where: str
    lowest: float | None
    highest: float | None
    median: float | None
    central: tuple[float, float] | None
    below: float
    above: float
    non_finite: float


def evenly_spread(shape: Sequence[int], piece: Sequence[int], voxels: int) -> list[Region]:
    """Choose pieces of an array that are evenly spread along each axis.

    Parameters
    ----------
    shape, piece
        Of the array and of its pieces, which begin at multiples of their own shape.
    voxels
        How many voxels all pieces together may have; one piece is taken even if it has more.

    Returns
    -------
    list of tuple of slice
        In C order; all pieces where they hold no more voxels.

    Examples
    --------
    >>> evenly_spread((10, 4), (2, 4), voxels=16)
    [(slice(2, 4, None), slice(0, 4, None)), (slice(6, 8, None), slice(0, 4, None))]
    """
    counts = [-(-size // edge) for size, edge in zip(shape, piece, strict=True)]
    chosen = list(counts)
    if math.prod(shape) > voxels:
        while math.prod(chosen) > 1 and math.prod(chosen) * math.prod(piece) > voxels:
            axis = chosen.index(max(chosen))
            chosen[axis] = chosen[axis] * 9 // 10
    starts = [
        # The middles of so many equal parts of the axis.
        [(2 * i + 1) * count // (2 * number) * edge for i in range(number)]
        for count, number, edge in zip(counts, chosen, piece, strict=True)
    ]
    return [
        tuple(slice(a, min(a + edge, size)) for a, edge, size in zip(corner, piece, shape, strict=True))
        for corner in product(*starts)
    ]


def sample_file(header: TomogramHeader, voxels: int = SAMPLE_VOXELS) -> Sample:
    """Take a sample of a tomogram file.

    Parameters
    ----------
    header
        From `cryosiam_dask.mrc_to_zarr.read_header`.
    voxels
        How many to take at most, of a file that is not compressed.

    Raises
    ------
    TomogramError
        If the file cannot be read, or is shorter than its header says.
    """
    if isinstance(header, MrcHeader) and header.compressed:
        beginning = read_beginning(header, SAMPLE_STREAM_BYTES)
        sections = header.axes.index(0)
        read, there = beginning.shape[sections], header.shape[sections]
        where = "all voxels" if read == there else f"the first {read} of the {there} sections of the compressed file"
        stride = -(-beginning.size // voxels)
        return Sample(_float32(beginning.reshape(-1)[::stride]), read / there, where)
    piece = header.stored_chunks
    if math.prod(piece) == 1:  # rows of it
        axes = header.axes if isinstance(header, MrcHeader) else range(len(header.shape))
        rows, columns = [header.shape[list(axes).index(axis)] for axis in range(len(header.shape))][-2:]
        in_file = (1, min(rows, max(1, _ROWS_VOXELS // columns)), columns)[-len(header.shape) :]
        piece = tuple(in_file[axis] for axis in axes)
    return _sample_pieces(header.shape, piece, voxels, partial(read_part, header))


def sample_array(array: Array, voxels: int = SAMPLE_VOXELS) -> Sample:
    """Take a sample of a stored array: chunks of it, if it has any.

    Parameters
    ----------
    array
        (z, y, x) or (y, x), real numbers.
    voxels
        How many to take at most, but for chunks that have more.
    """
    chunks = getattr(array, "chunks", None)
    if chunks is None:
        *others, columns = array.shape
        chunks = (*([1] * len(others)), columns)
    return _sample_pieces(array.shape, chunks, voxels, array.__getitem__)


def _sample_pieces(
    shape: Sequence[int], piece: Sequence[int], voxels: int, read: Callable[[Region], NDArray[Any]]
) -> Sample:
    regions = evenly_spread(shape, piece, voxels)
    parts = []
    for region in regions:  # a piece of more voxels than wanted gives up some of them
        part = np.asarray(read(region)).reshape(-1)
        parts.append(part[:: max(1, -(-part.size * len(regions) // max(voxels, 1)))])
    return _sample(shape, regions, parts)


def intensities(sample: Sample, minimum: float, maximum: float) -> Intensities:
    """Say how the intensities of a sample fall into [`minimum`, `maximum`]."""
    finite = sample.values[np.isfinite(sample.values)]
    count = max(1, sample.values.size)
    quantiles: list[Any] = [None] * 3
    if finite.size:
        quantiles = np.quantile(finite, (_CENTRAL[0], 0.5, _CENTRAL[1])).tolist()
    return Intensities(
        share=sample.share,
        where=sample.where,
        lowest=float(finite.min()) if finite.size else None,
        highest=float(finite.max()) if finite.size else None,
        median=quantiles[1],
        central=(quantiles[0], quantiles[2]) if finite.size else None,
        below=int(np.count_nonzero(finite < minimum)) / count,
        above=int(np.count_nonzero(finite > maximum)) / count,
        non_finite=1 - finite.size / count,
    )


def _sample(shape: Sequence[int], regions: Sequence[Region], parts: Sequence[NDArray[Any]]) -> Sample:
    read = sum(math.prod(s.stop - s.start for s in region) for region in regions)
    share = read / math.prod(shape)
    where = "all voxels" if read == math.prod(shape) else f"{len(regions)} evenly spread pieces of it"
    return Sample(_float32(np.concatenate([part.reshape(-1) for part in parts])), share, where)


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinite then, and counted as such, as the network's scaling does it
        return values.astype(np.float32)
