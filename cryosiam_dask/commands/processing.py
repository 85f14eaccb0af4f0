"""Prepare tomograms like CryoSiam's ``processing_invert_scale`` and ``match_pixel_size``.

A tomogram of any format is read in parts, and written as a float32 MRC file with its voxel size and position.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import zarr
from numpy.typing import NDArray
from rich.filesize import decimal

from cryosiam_dask.core.arrays import Computed, regions_of
from cryosiam_dask.core.endings import HDF5_ENDINGS, MRC_ENDINGS, TOMOGRAM_ENDINGS
from cryosiam_dask.core.percentiles import percentiles
from cryosiam_dask.errors import OutputError, TomogramError, not_written, writing
from cryosiam_dask.files.atomic import part_name
from cryosiam_dask.files.folders import visible
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mrc import write_mrc_floats
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.files.zarr import Voxels, is_zarr
from cryosiam_dask.stages.ingest import ingest

_PART = 256  # voxels along each axis that are read at once: 64 MiB of float32


def files(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """List the files to read, each with the file to write.

    Parameters
    ----------
    source
        A tomogram, or a folder of them.
    target
        The file to write or, for a folder, the folder, which is created. Files keep their names; other formats and
        compressed files get the ending ``.mrc``.

    Raises
    ------
    TomogramError
        If the source does not exist, or is a folder without tomograms.
    OutputError
        If the folder cannot be created, or two tomograms would be written to the same file.
    """
    if source.is_file() or is_zarr(source):
        return [(source, target / _name(source) if target.is_dir() and not is_zarr(target) else target)]
    if not source.is_dir():
        raise TomogramError("does not exist", place=source, remedy="Give a tomogram, or a folder of tomograms")
    found = {path: target / _name(path) for path in visible(source) if path.name.endswith(TOMOGRAM_ENDINGS)}
    if not found:
        raise TomogramError("must hold tomograms", place=source, remedy="Give a tomogram, or a folder of tomograms")
    twice = [path for path, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise OutputError(
            "two tomograms must not have the same output", place=twice[0],
            value=" and ".join(str(path) for path, to in found.items() if to == twice[0]),
            remedy="Prepare them one by one",
        )  # fmt: skip
    with writing("must be a folder that can be created", place=target, remedy="Choose another one"):
        target.mkdir(parents=True, exist_ok=True)
    return list(found.items())


def _name(source: Path) -> str:
    """Return the name of the MRC file for a tomogram."""
    if source.suffix in MRC_ENDINGS:
        return source.name
    for ending in (".ome.zarr", ".zarr", ".gz", *HDF5_ENDINGS):
        if source.name.endswith(ending):
            name = source.name.removesuffix(ending)
            return name if Path(name).suffix in MRC_ENDINGS else f"{name}.mrc"
    return f"{source.name}.mrc"


def _as_floats(voxels: Any) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.array(voxels, np.float32)


def _inverted(voxels: Any) -> NDArray[np.float32]:
    return -_as_floats(voxels)


def _scaled(voxels: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Scale intensities so that `low` and `high` become 0 and 1; NaN becomes 0."""
    scaled = (voxels.astype(np.float64) - low) / (high - low)
    return np.nan_to_num(np.clip(scaled, 0, 1), nan=0.0).astype(np.float32)


def invert_scale(
    source: Path, target: Path, *, invert: bool = False, lower: float | None = None, upper: float | None = None
) -> tuple[float, float] | None:
    """Write a tomogram with inverted, scaled or simply converted intensities.

    Parameters
    ----------
    source
        A tomogram of any supported format.
    target
        The MRC file to write, float32, with the voxel size, origin and start of the source; replaced if it exists.
    invert
        Whether to change the sign of the intensities before they are scaled.
    lower, upper
        Percentiles of all (inverted) voxels that become 0 and 1; values beyond are clipped, and NaN becomes 0. If only
        one is given, the other is the minimum or maximum; with neither, nothing is scaled.

    Returns
    -------
    tuple of float or None
        The intensities that became 0 and 1.

    Raises
    ------
    TomogramError
        If the source cannot be read, or both percentiles are the same intensity.
    OutputError
        If the target is the source, or cannot be written.
    """
    header = read_header(source)
    header.require_complete()
    _require_other_file(source, target)
    with _voxels(header, target) as voxels:
        bounds, float32 = None, np.dtype(np.float32)
        result = Computed(voxels, _inverted if invert else _as_floats, float32)
        if lower is not None or upper is not None:
            bounds = _bounds(result, source, 0.0 if lower is None else lower, 100.0 if upper is None else upper)
            result = Computed(result, partial(_scaled, low=bounds[0], high=bounds[1]), float32)
        label = "cryosiam-dask: intensities " + ("inverted" if invert else "kept") + (", scaled" if bounds else "")
        write_mrc_floats(target, result, label=label, **header.placement)
    return bounds


def _bounds(voxels: Computed, place: Path, lower: float, upper: float) -> tuple[float, float]:
    regions = list(regions_of(voxels.shape, (_PART,) * len(voxels.shape)))
    low, high = percentiles(voxels.__getitem__, regions, (lower, upper))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise TomogramError(
            "the two percentiles must be different, finite intensities",
            place=place,
            value=f"{low + 0.0:g} at {lower:g} % and {high + 0.0:g} at {upper:g} %",  # no -0
            remedy="Choose percentiles further apart, or check whether the tomogram is empty",
        )
    return low, high


@contextmanager
def _voxels(header: TomogramHeader, target: Path) -> Iterator[TomogramHeader | Voxels]:
    """Yield an array of the voxels; a compressed file is temporarily unpacked beside the target."""
    if not header.compressed:
        yield header
        return
    store = target.with_name(part_name(f"{target.name}.zarr"))
    try:
        yield ingest(header.path, store, name=None)[0]
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _require_other_file(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve():
        raise OutputError(
            "the output must not replace its own input", place=target, remedy="Choose another file or folder for it"
        )


@dataclass(frozen=True, slots=True)
class Resampling:
    """The result of `match_pixel_size` for a tomogram, and its cost.

    Attributes
    ----------
    header
        Header of the tomogram.
    before
        Voxel size along each axis, in Å.
    shape
        Shape of the result, (z, y, x) or (y, x).
    after
        Voxel size of the result along each axis, in Å: the requested one as closely as whole voxels allow.
    memory_bytes, disk_bytes
        Estimated memory, and temporary disk space beside the output.
    """

    header: TomogramHeader
    before: tuple[float, ...]
    shape: tuple[int, ...]
    after: tuple[float, ...]
    memory_bytes: int
    disk_bytes: int


def plan_resampling(source: Path, voxel_size: float, given: float | None = None) -> Resampling:
    """Plan `match_pixel_size`.

    Parameters
    ----------
    source
        A tomogram of any supported format.
    voxel_size
        Voxel size of the result, in Å.
    given
        Voxel size of the source, in Å, if its header lacks it or is wrong.

    Raises
    ------
    TomogramError
        If the source cannot be read, or its voxel size is not known.
    """
    header = read_header(source)
    header.require_complete()
    sizes = [given or size for size in header.voxel_size_angstrom]
    before = tuple(size for size in sizes if size)
    if len(before) < len(sizes):
        raise TomogramError(
            "the voxel size must be known", place=source, value="none in its header",
            remedy="Give it with --input-pixel-size",
        )  # fmt: skip
    shape = tuple(_new_size(n, size / voxel_size) for n, size in zip(header.shape, before, strict=True))
    after = tuple(n * size / m for n, size, m in zip(header.shape, before, shape, strict=True))
    longest = max(*header.shape, *shape)
    # Two consecutive stores exist at the same time: one is read while the next is written.
    stores = [math.prod((*shape[: axis + 1], *header.shape[axis + 1 :])) for axis in range(len(shape))]
    disk = 8 * max(a + b for a, b in itertools.pairwise([0, *stores]))
    if header.compressed:
        disk += 4 * math.prod(header.shape)
    return Resampling(header, before, shape, after, 5 * 16 * _tile(longest) * longest, disk)


def _new_size(size: int, ratio: float) -> int:
    """Return the new length of an axis, as in CryoSiam: even, but keeping the parity if the axis becomes longer."""
    planned = max(2, round(size * ratio))
    planned += planned % 2
    if ratio == 1:
        return size
    return min(planned, size) if ratio < 1 else max(size, size + (planned - size) // 2 * 2)


def _tile(longest: int) -> int:
    """Return the number of lines to transform at once: 4 million voxels of complex128, 64 MiB."""
    return max(1, (1 << 22) // longest)


def match_pixel_size(found: Resampling, target: Path) -> None:
    """Resample a tomogram to another voxel size by cropping or padding its Fourier transform.

    Frequencies that both grids have are kept; all others are removed or zero. Intensities keep their scale: the result
    has the mean of the source. The axes are transformed one after the other, some lines at a time, each from one
    temporary complex64 store beside the target to the next; the real part of the last store is the result.

    Parameters
    ----------
    found
        From `plan_resampling`.
    target
        The MRC file to write, float32; replaced if it exists.

    Raises
    ------
    TomogramError
        If the source cannot be read, or holds voxels that are not finite.
    OutputError
        If the target is the source or cannot be written, or there is not enough space for the stores beside it.
    """
    header = found.header
    _require_other_file(header.path, target)
    parent = target.absolute().parent
    free = shutil.disk_usage(parent).free if parent.is_dir() else math.inf
    if free < found.disk_bytes:
        raise OutputError(
            "there must be space for intermediate results beside the output",
            place=parent,
            value=f"{decimal(int(free))} where {decimal(found.disk_bytes)} are needed",
            remedy="Free space there, or write to another disk",
        )
    folder = parent / part_name(f"{target.name}.zarr")
    try:
        folder.mkdir()
        with _voxels(header, target) as voxels:
            stage: Any = Computed(voxels, _as_floats, np.dtype(np.float32))
            for axis in range(len(found.shape)):
                shape = (*found.shape[: axis + 1], *header.shape[axis + 1 :])
                store = zarr.create_array(
                    folder / str(axis), shape=shape, chunks=tuple(min(128, n) for n in shape), dtype=np.complex64,
                    compressors=None, fill_value=0,
                )  # fmt: skip
                _resample_axis(stage, store, axis, header.path)
                if axis:
                    shutil.rmtree(folder / str(axis - 1))
                stage = store
            write_mrc_floats(
                target,
                Computed(stage, _real, np.dtype(np.float32)),
                voxel_size_angstrom=found.after,
                origin_angstrom=header.origin_angstrom,
                nstart=[round(n * a / b) for n, a, b in zip(header.nstart, found.before, found.after, strict=True)],
                label="cryosiam-dask: resampled",
            )
    except OSError as error:
        raise not_written(
            error, "the output must be writable", place=target, remedy="Create its folder, or choose another one"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _real(voxels: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(voxels.real, np.float32)


def _resample_axis(source: Any, target: Any, axis: int, place: Path) -> None:
    """Fill `target`, which differs from `source` in the length of one axis."""
    before, after = source.shape[axis], target.shape[axis]
    others = [n for n in range(len(target.shape)) if n != axis]
    # Whole chunks along the other axes, as long as the lines fit into memory.
    lines, step = _tile(max(before, after)), [before] * len(target.shape)
    for n in reversed(others):
        step[n] = min(target.shape[n], max(1, lines if n != others[-1] else min(lines, 128)))
        lines = max(1, lines // step[n])
    for region in regions_of(source.shape, step):
        values = np.asarray(source[region])
        if not np.isfinite(values).all():
            raise TomogramError(
                "all voxels must be finite numbers, because each one affects the whole result", place=place,
                value="NaN or infinity", remedy="Replace them first, for example by the mean",
            )  # fmt: skip
        kept = min(before, after)
        low = kept // 2
        spectrum = scipy.fft.fft(values.astype(np.complex128), axis=axis)
        resampled = np.zeros((*values.shape[:axis], after, *values.shape[axis + 1 :]), np.complex128)
        # Frequencies 0 … up to the middle lie at the beginning, the negative ones at the end.
        for part in (slice(0, kept - low), slice(-low, None) if low else slice(0, 0)):
            where = (*[slice(None)] * axis, part)
            resampled[where] = spectrum[where]
        there = (*region[:axis], slice(0, after), *region[axis + 1 :])
        target[there] = (scipy.fft.ifft(resampled, axis=axis) * (after / before)).astype(np.complex64)
