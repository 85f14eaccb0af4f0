"""Sample the intensities of a tomogram, as fast for four gigavoxels as for four megavoxels.

The sample consists of chunks or, in a file without chunks, of some rows of a section. `spread_regions` spaces them
evenly along each axis and limits the number of voxels; a small tomogram is read completely. A compressed file can only
be read sequentially, so its sample is its first sections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryosiam_dask.core.arrays import Region, Sliceable
from cryosiam_dask.core.diagnosis import Contrast, Intensities
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mrc import MrcHeader, read_beginning

SAMPLE_VOXELS = 1 << 22  # 16 MiB of float32, a fraction of a second
SAMPLE_STREAM_BYTES = 64 * 2**20  # uncompressed bytes to read from a compressed file
_ROWS_VOXELS = 1 << 14  # read at once from a file without chunks
_CENTRAL = (0.005, 0.995)  # quantiles of the central 99 %


# See `contrast`.
_BIN, _BINS = 3, 8  # voxels, and bins along either edge of a tile
_TAIL = 4  # number of bins, of the 64 in a tile, that count as its brightest and as its darkest
_REPEATED = 0.25  # share of a tile's voxels
_ASYMMETRY, _STANDARD_ERRORS, _TILES = 0.05, 8.0, 32
_MEDIAN = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """Some voxels of a tomogram.

    Attributes
    ----------
    values
        Intensities of the voxels, one axis, float32.
    share
        Share of the tomogram's voxels, 0 to 1.
    where
        Which voxels they are, in words.
    parts
        The same voxels as contiguous regions, each (z, y, x) or (y, x).
    """

    values: NDArray[np.float32]
    share: float
    where: str
    parts: tuple[NDArray[np.float32], ...] = ()


def spread_regions(shape: Sequence[int], chunk: Sequence[int], voxels: int) -> list[Region]:
    """Choose chunks of an array that are evenly spaced along each axis.

    Parameters
    ----------
    shape, chunk
        Shapes of the array and of its chunks.
    voxels
        Maximum number of voxels of all chosen chunks together; at least one chunk is chosen.

    Returns
    -------
    list of tuple of slice
        Regions of the chunks in C order; all chunks if the array has no more voxels than that.

    Examples
    --------
    >>> spread_regions((10, 4), (2, 4), voxels=16)
    [(slice(2, 4, None), slice(0, 4, None)), (slice(6, 8, None), slice(0, 4, None))]
    """
    counts = [-(-size // edge) for size, edge in zip(shape, chunk, strict=True)]
    chosen = list(counts)
    if math.prod(shape) > voxels:
        while math.prod(chosen) > 1 and math.prod(chosen) * math.prod(chunk) > voxels:
            axis = chosen.index(max(chosen))
            chosen[axis] = chosen[axis] * 9 // 10
    starts = [
        # The middles of `number` equal parts of the axis.
        [(2 * i + 1) * count // (2 * number) * edge for i in range(number)]
        for count, number, edge in zip(counts, chosen, chunk, strict=True)
    ]
    return [
        tuple(slice(a, min(a + edge, size)) for a, edge, size in zip(corner, chunk, shape, strict=True))
        for corner in product(*starts)
    ]


def sample_file(header: TomogramHeader, voxels: int = SAMPLE_VOXELS) -> Sample:
    """Take a sample of a tomogram file.

    Parameters
    ----------
    header
        From `cryosiam_dask.files.tomogram.read_header`.
    voxels
        Maximum number of voxels to take from an uncompressed file.

    Raises
    ------
    TomogramError
        If the file cannot be read, or is shorter than its header states.
    """
    if isinstance(header, MrcHeader) and header.compressed:
        beginning = read_beginning(header, SAMPLE_STREAM_BYTES)
        sections = header.axes.index(0)
        read, there = beginning.shape[sections], header.shape[sections]
        where = "all voxels" if read == there else f"the first {read} of the {there} sections of the compressed file"
        return _sample([_thinned(beginning, voxels)], read / there, where)
    chunk = header.stored_chunks
    if math.prod(chunk) == 1:  # no chunks: some rows
        axes = header.axes if isinstance(header, MrcHeader) else range(len(header.shape))
        rows, columns = [header.shape[list(axes).index(axis)] for axis in range(len(header.shape))][-2:]
        in_file = (1, min(rows, max(_BIN * _BINS, _ROWS_VOXELS // columns)), columns)[-len(header.shape) :]
        chunk = tuple(in_file[axis] for axis in axes)
    return _sample_chunks(header.shape, chunk, voxels, header.__getitem__)


def sample_array(array: Sliceable, voxels: int = SAMPLE_VOXELS) -> Sample:
    """Take a sample of a stored array: some of its chunks, or rows if it has none.

    Parameters
    ----------
    array
        (z, y, x) or (y, x), real numbers.
    voxels
        Maximum number of voxels to take.
    """
    chunks = getattr(array, "chunks", None)
    if chunks is None:
        *others, columns = array.shape
        chunks = (*([1] * len(others)), columns)
    return _sample_chunks(array.shape, chunks, voxels, array.__getitem__)


def _sample_chunks(
    shape: Sequence[int], chunk: Sequence[int], voxels: int, read: Callable[[Region], NDArray[Any]]
) -> Sample:
    whole = math.prod(shape) <= voxels
    regions = spread_regions(shape, shape if whole else chunk, voxels)
    # Chunks with more voxels than wanted are thinned out.
    parts = [_thinned(np.asarray(read(region)), max(1, voxels // len(regions))) for region in regions]
    taken = sum(math.prod(s.stop - s.start for s in region) for region in regions)
    where = "all voxels" if whole else f"{len(regions)} evenly spaced parts of it"
    return _sample(parts, taken / math.prod(shape), where)


def _thinned(part: NDArray[Any], voxels: int) -> NDArray[Any]:
    """Take every n-th section of a part, then every n-th row and column, until at most `voxels` voxels are left."""
    for axis in range(part.ndim):
        step = min(part.shape[axis], -(-part.size // voxels))
        part = part[(slice(None),) * axis + (slice(None, None, step),)]
    return part


def intensities(sample: Sample, minimum: float, maximum: float) -> Intensities:
    """Describe the intensities of a sample relative to [`minimum`, `maximum`]."""
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
        contrast=contrast(sample),
    )


def contrast(sample: Sample) -> Contrast | None:
    """Estimate whether dense matter is bright or dark.

    Membranes, filaments and complexes are denser than the space between them and fill less than half of a volume. So
    in a small area, the densest voxels differ more from the median than the least dense ones do.

    1. Voxels are averaged 3 × 3 in a section, to reduce noise, and grouped into tiles of 24 × 24 voxels. Within a tile,
       slow changes, such as from a lamella to vacuum, do not matter.
    2. The asymmetry of a tile is (bright + dark - 2 median) / (bright - dark), from -1 to 1, where bright and dark are
       the means of its brightest and darkest sixteenth.
    3. The weight of a tile is bright - dark, so that the lamella outweighs vacuum, but at most the 0.9 quantile, so
       that gold beads do not outweigh the lamella. Tiles in which a quarter of the voxels have the same extreme value
       (padding, labels) are ignored.

    Parameters
    ----------
    sample
        A sample with its `parts`.

    Returns
    -------
    Literal or None
        ``None`` if the mean asymmetry is below 0.05 or below eight of its standard errors, if there are fewer than 32
        tiles, or if the weighted median is not above 0.02 with the same sign (the straight edge of a hole may dominate
        the mean, but not the median). In phantoms with noise, a missing wedge, gold, ice, fringes or vacuum the
        asymmetry is 0.07 to 0.4, more than twelve standard errors, and has the right sign. If noise hides everything it
        is below 0.02, and for pure noise below six standard errors.

    Examples
    --------
    >>> beads = np.zeros((32, 48, 48), np.float32)
    >>> beads[:, ::11, ::7] = 1
    >>> beads += np.random.default_rng(0).normal(0, 0.1, beads.shape)
    >>> contrast(Sample(beads.ravel(), 1, "all voxels", (beads,)))
    'bright on dark'
    >>> contrast(Sample(beads.ravel(), 1, "all voxels", (-beads,)))
    'dark on bright'
    """
    found = [_asymmetries(part) for part in sample.parts]
    if not found:
        return None
    asymmetries, spans = (np.concatenate(each) for each in zip(*found, strict=True))
    if len(spans) < _TILES:
        return None
    weights = np.minimum(spans, np.quantile(spans, 0.9)) / spans.max()
    mean = np.average(asymmetries, weights=weights)
    error = np.linalg.norm(weights * (asymmetries - mean)) / weights.sum()
    order = np.argsort(asymmetries)
    heavier = np.cumsum(weights[order])
    median = asymmetries[order][np.searchsorted(heavier, heavier[-1] / 2)]
    if abs(mean) < max(_ASYMMETRY, _STANDARD_ERRORS * error) or median * np.sign(mean) < _MEDIAN:
        return None
    return "bright on dark" if mean > 0 else "dark on bright"


def _asymmetries(part: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return asymmetry and bright - dark of each tile of a part, without the ignored tiles."""
    sections = np.moveaxis(part, np.argmin(part.shape), 0) if part.ndim == 3 else part.reshape(-1, *part.shape[-2:])
    edge = _BIN * _BINS
    count, rows, columns = len(sections), sections.shape[1] // edge, sections.shape[2] // edge
    whole = sections[:, : rows * edge, : columns * edge]
    tiles = whole.reshape(count, rows, _BINS, _BIN, columns, _BINS, _BIN).transpose(0, 1, 4, 2, 5, 3, 6)
    tiles = tiles.reshape(-1, _BINS**2, _BIN**2)
    finite = np.isfinite(tiles).all((1, 2))
    repeated = [
        (tiles == extreme(tiles, axis=(1, 2), keepdims=True)).mean((1, 2)) for extreme in (np.min, np.max) if tiles.size
    ]
    tiles = tiles[finite & np.all([share < _REPEATED for share in repeated], axis=0)]
    bins = np.sort(tiles.mean(2, dtype=np.float64))
    dark, bright, median = bins[:, :_TAIL].mean(1), bins[:, -_TAIL:].mean(1), np.median(bins, 1)
    spans = bright - dark
    counting = spans > 0
    return ((bright + dark - 2 * median)[counting] / spans[counting]), spans[counting]


def _sample(parts: Sequence[NDArray[Any]], share: float, where: str) -> Sample:
    values = _float32(np.concatenate([part.reshape(-1) for part in parts]))
    ends = np.cumsum([part.size for part in parts])
    views = np.split(values, ends[:-1])
    shapes = [part.shape for part in parts]
    return Sample(values, share, where, tuple(v.reshape(s) for v, s in zip(views, shapes, strict=True)))


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # too large numbers become infinite, as in the network's scaling
        return values.astype(np.float32)
