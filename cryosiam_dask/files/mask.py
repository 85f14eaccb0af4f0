"""Read the lamella mask of a tomogram, block by block.

A mask is the dataset ``labels`` of an HDF5 file, with the values 0 and 1. If its shape differs from the tomogram's, it
is resized. The result equals, voxel for voxel,
``skimage.transform.resize(mask.astype("int8"), shape, mode="constant", preserve_range=True).astype("int8")`` of the
whole mask, as in CryoSiam. The final cast truncates, so a single rounding error below 1 puts a voxel outside.
Therefore every sum here adds the same numbers in the same order. For a block:

1. Voxel k of an axis of n voxels is at (k + 0.5) · (m / n) − 0.5 on the mask's axis of m voxels.
2. The voxels of the mask around these positions are read. If an axis shrinks, a margin is read as well, for skimage's
   Gaussian: sigma (m / n − 1) / 2, truncated at 4 sigma, zeros outside the mask.
3. Linear interpolation, zeros outside the mask. The positions are shifted to the region that was read; this shift by
   whole voxels is exact in floating point.

A block whose part of the mask exceeds a fixed memory budget is halved until it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.errors import MaskError
from cryosiam_dask.files.hdf5 import open_hdf5

WORKING_BYTES = 64 * 2**20  # memory budget
DATASET = "labels"
_SAMPLE = 64  # voxels along each axis


@dataclass(frozen=True, slots=True)
class Mask:
    """A lamella mask for a tomogram of `shape`.

    Attributes
    ----------
    path
        The HDF5 file.
    shape
        The tomogram's: (z, y, x) or (y, x).
    stored_shape
        Shape of the mask in the file; if it is not `shape`, the mask is resized when it is read.
    full
        Whether a mask of another shape is 1 everywhere, which it also is after resizing.
    """

    path: Path
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    full: bool = False

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """Dtype of the voxels: 0 outside, 1 inside."""
        return np.dtype(np.uint8)

    def __getitem__(self, region: Region) -> NDArray[np.uint8]:
        """Read a region; see `read_mask`."""
        return read_mask(self, region)


def open_mask(path: str | Path, shape: tuple[int, ...]) -> Mask:
    """Open a lamella mask and check that it fits a tomogram of `shape`.

    Parameters
    ----------
    path
        An HDF5 file with the dataset ``labels``, such as ``<stem>_preds.h5`` of a lamella prediction.
    shape
        The tomogram's: (z, y, x) or (y, x).

    Returns
    -------
    Mask
        A plain value for `read_mask`; it can be sent to other processes.

    Raises
    ------
    MaskError
        If the file is missing or is not HDF5, has no numeric dataset ``labels`` with as many axes as the tomogram, or
        holds values other than 0 and 1. The values are checked here if the shapes differ, else by `read_mask`.
    """
    path = Path(path)
    with _open(path) as labels:
        stored_shape = _stored_shape(labels, path, shape)
        if stored_shape == shape:
            return Mask(path, shape, stored_shape)
        whole = tuple(slice(0, size) for size in stored_shape)
        full = True
        for part in _parts(whole, lambda part: 4 * _volume(part)):  # 4 bytes per voxel in `_binary`
            full &= bool(_binary(labels, part, path).all())
    return Mask(path, shape, stored_shape, full)


def look_at_mask(path: Path, shape: tuple[int, ...]) -> None:
    """Check a lamella mask like `open_mask`, but only a few of its voxels.

    Raises
    ------
    MaskError
        See `open_mask`.
    """
    with _open(path) as labels:
        stored = _stored_shape(labels, path, shape)
        require_aspect(Mask(path, shape, stored))
        # A chunk in the middle, where a file that is not a mask is most likely to have other values.
        chunk = labels.chunks or (_SAMPLE,) * len(stored)
        middle = [n // 2 // c * c for n, c in zip(stored, chunk, strict=True)]
        _binary(
            labels,
            tuple(slice(m, min(m + max(c, _SAMPLE), n)) for m, c, n in zip(middle, chunk, stored, strict=True)),
            path,
        )


def require_aspect(mask: Mask) -> None:
    """Check that a mask has the tomogram's proportions, up to rounding to whole voxels.

    Raises
    ------
    MaskError
        If it does not; if another order of the axes would fit, the remedy names it.
    """
    stored, shape = mask.stored_shape, mask.shape
    if _proportional(stored, shape):
        return
    fitting = [order for order in permutations(range(len(shape))) if _proportional([stored[i] for i in order], shape)]
    names = "zyx"[-len(shape) :]
    found = ", ".join(names[fitting[0].index(axis)] for axis in range(len(shape))) if fitting else ""
    raise MaskError(
        "the mask must have the tomogram's proportions, because resizing would otherwise distort it",
        place=f"{mask.path}, dataset {DATASET}",
        value=f"{_times(stored)} voxels ({', '.join(names)}) for a tomogram of {_times(shape)}",
        remedy=(
            f"Its axes seem to be in the order {found}: write it again as numpy.transpose(labels, {fitting[0]})"
            if fitting
            else "It belongs to another tomogram, or was cropped differently: predict this tomogram's lamella again"
        ),
    )


def _proportional(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one shape is a multiple of the other, rounded up or down to whole voxels."""

    def rounded(small: Sequence[int], large: Sequence[int]) -> bool:
        ratios = [((s - 1) / n, (s + 1) / n) for s, n in zip(small, large, strict=True)]
        return max(low for low, _ in ratios) <= min(high for _, high in ratios)

    # Rounding matters most in the shape with fewer voxels.
    return rounded(one, other) if math.prod(one) <= math.prod(other) else rounded(other, one)


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _stored_shape(labels: Any, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    if labels.ndim != len(shape) or labels.dtype.kind not in "biuf" or 0 in labels.shape:
        raise MaskError(
            f"the mask must be a volume of numbers with {len(shape)} axes, like the tomogram",
            place=f"{path}, dataset {DATASET}",
            value=f"shape {labels.shape}, dtype {labels.dtype}",
            remedy="Predict the lamella of this tomogram again",
        )
    return tuple(int(size) for size in labels.shape)


def read_mask(mask: Mask, region: Region) -> NDArray[np.uint8]:
    """Read a mask in a region of the tomogram.

    Parameters
    ----------
    mask
        From `open_mask`.
    region
        One slice with start and stop for each axis of the tomogram.

    Returns
    -------
    numpy.ndarray, (z, y, x) or (y, x), uint8
        1 inside the lamella, 0 outside.

    Raises
    ------
    MaskError
        If the file cannot be read or holds values other than 0 and 1.
    """
    if mask.full:
        return np.ones(tuple(s.stop - s.start for s in region), np.uint8)
    with _open(mask.path) as labels:
        if mask.stored_shape == mask.shape:
            return _binary(labels, region, mask.path)
        resized = np.zeros(tuple(s.stop - s.start for s in region), np.uint8)
        for part in _parts(region, lambda part: _working_bytes(mask, part)):
            where = tuple(slice(p.start - r.start, p.stop - r.start) for p, r in zip(part, region, strict=True))
            resized[where] = _resized(labels, mask, part)
    return resized


def read_stored(
    mask: Mask, choose: Callable[[tuple[int, ...], tuple[int, ...]], Iterable[Region]]
) -> Iterator[tuple[Region, NDArray[np.uint8]]]:
    """Read regions of a mask as it is stored, without resizing it.

    Parameters
    ----------
    mask
        From `open_mask`.
    choose
        ``choose(shape, chunk)`` returns the regions to read.

    Yields
    ------
    region, values : (z, y, x) or (y, x), uint8
        The region, and 1 inside the lamella, 0 outside.

    Raises
    ------
    MaskError
        If the file cannot be read or holds values other than 0 and 1.
    """
    with _open(mask.path) as labels:
        chunk = labels.chunks or tuple(min(128, size) for size in mask.stored_shape)
        for region in choose(mask.stored_shape, tuple(map(int, chunk))):
            yield region, _binary(labels, region, mask.path)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open the dataset of a mask, and turn every error of HDF5 in the ``with`` block into a `MaskError`."""
    try:
        with open_hdf5(path, rdcc_nbytes=WORKING_BYTES) as file:
            labels = file.get(DATASET)
            if not isinstance(labels, h5py.Dataset):
                raise MaskError(
                    f"a lamella mask must hold the dataset {DATASET}",
                    place=path,
                    value=", ".join(file) or "an empty file",
                    remedy="Point mask_folder to the output of a lamella prediction",
                )
            yield labels
    except FileNotFoundError as error:
        raise MaskError(
            "the lamella mask does not exist",
            place=path,
            remedy="Run the lamella prediction first, or correct mask_folder",
        ) from error
    except (OSError, RuntimeError) as error:
        raise MaskError(
            "the lamella mask must be a readable HDF5 file",
            place=path,
            value=error,
            remedy="Predict the lamella of this tomogram again",
        ) from error


def _binary(labels: Any, region: Region, path: Path) -> NDArray[np.uint8]:
    stored = labels[region]
    foreign = stored[(stored != 0) & (stored != 1)]
    if foreign.size:
        raise MaskError(
            "a lamella mask must hold only 0 (outside) and 1 (inside)",
            place=f"{path}, dataset {DATASET}",
            value=foreign[0],
            remedy="Point mask_folder to the output of a lamella prediction, not of a semantic one",
        )
    return np.asarray(stored, np.uint8)


def _parts(region: Region, cost: Callable[[Region], int]) -> Iterator[Region]:
    """Halve a region along its widest axis until each part fits the memory budget (or is a single voxel)."""
    widths = [s.stop - s.start for s in region]
    width = max(widths)
    if width <= 1 or cost(region) <= WORKING_BYTES:
        yield region
        return
    axis = widths.index(width)
    middle = region[axis].start + width // 2
    for half in (slice(region[axis].start, middle), slice(middle, region[axis].stop)):
        yield from _parts((*region[:axis], half, *region[axis + 1 :]), cost)


def _volume(region: Region) -> int:
    return math.prod(s.stop - s.start for s in region)


def _sigmas(mask: Mask) -> list[float]:
    """Return the anti-aliasing Gaussian's sigma per axis, in voxels of the mask; 0 if the axis does not shrink."""
    return [max(0.0, (m / n - 1) / 2) for m, n in zip(mask.stored_shape, mask.shape, strict=True)]


def _positions(mask: Mask, region: Region) -> list[NDArray[np.float64]]:
    """Return the positions of a region's voxels on each axis of the stored mask."""
    return [
        (np.arange(s.start, s.stop, dtype=np.float64) + 0.5) * (m / n) - 0.5
        for s, m, n in zip(region, mask.stored_shape, mask.shape, strict=True)
    ]


def _support(mask: Mask, region: Region) -> Region:
    """Return the region of the stored mask on which a region of the tomogram depends."""
    support = []
    for axis, sigma, m in zip(_positions(mask, region), _sigmas(mask), mask.stored_shape, strict=True):
        radius = int(4.0 * sigma + 0.5)  # as SciPy rounds it
        first, last = math.floor(axis[0]) - radius, math.floor(axis[-1]) + 1 + radius
        support.append(slice(max(first, 0), min(last + 1, m)))
    return tuple(support)


def _working_bytes(mask: Mask, region: Region) -> int:
    """Return the bytes for resizing: float64 copies of the stored region, positions and values of the voxels."""
    return 8 * (3 * _volume(_support(mask, region)) + (len(region) + 1) * _volume(region))


def _resized(labels: Any, mask: Mask, region: Region) -> NDArray[np.uint8]:
    support = _support(mask, region)
    stored = _binary(labels, support, mask.path)
    if not stored.any():  # a shortcut, because most of a volume is far from its lamella
        return np.zeros(tuple(s.stop - s.start for s in region), np.uint8)
    values = stored.astype(np.float64)
    sigmas = _sigmas(mask)
    if any(sigmas):
        values = ndimage.gaussian_filter(values, sigmas, mode="grid-constant")
    positions = [axis - s.start for axis, s in zip(_positions(mask, region), support, strict=True)]
    coordinates = np.stack(np.meshgrid(*positions, indexing="ij"))
    interpolated = ndimage.map_coordinates(values, coordinates, order=1, mode="grid-constant")
    return np.asarray(interpolated, np.uint8)
