"""Copy tomogram files (MRC and its relatives, HDF5, zarr) to chunked zarr arrays.

1. `read_header` recognizes the format, decides what is ambiguous in the header (byte order, signedness, axis order,
   voxel size), and refuses what cannot be read. It reads hardly any voxels, so that hundreds of files can be checked
   before a run.
2. `ingest` creates a zarr array with its metadata. Tasks fill whole chunks of it, and the statistics of the voxels are
   added at the end, so an array without the attribute ``statistics`` is incomplete. A zarr tomogram is not copied;
   tasks only read its voxels for the statistics.
3. `convert` always copies, to a path of its own, which appears complete or not at all.

Arrays are always (z, y, x), or (y, x) for an image; voxel sizes and positions have the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import StoreLike

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.arrays import Region, regions_of
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.core.local_store import AnyDiskStore
from cryosiam_dask.errors import OutputError, writing
from cryosiam_dask.files.atomic import replacing_folder
from cryosiam_dask.files.header import TomogramHeader, native
from cryosiam_dask.files.mrc import STREAM_BYTES, MrcHeader, MrcVoxels, in_place, read_layers, require_unchanged
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.files.zarr import Voxels, ZarrHeader, is_zarr, read_region

CHUNK = 128  # voxels along each axis
TASK_BYTES = 64 * 2**20  # bytes that a task reads and writes at once
COMPRESSOR = BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle")  # the work store is written once and read twice


@dataclass(frozen=True, slots=True)
class Statistics:
    """Minimum, maximum and mean of the finite voxels (``None`` if there are none), and the number of the others."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    non_finite: int

    def attributes(self) -> dict[str, float | int | None]:
        """Return the statistics as JSON values."""
        return {"min": self.minimum, "max": self.maximum, "mean": self.mean, "non_finite_voxels": self.non_finite}


def reads_in_place(header: TomogramHeader, configuration: Configuration) -> bool:
    """Whether a run reads a tomogram from its own file instead of a copy.

    A `work_folder` may be on a faster disk, and `keep_work` asks for a copy.
    """
    stays = configuration.keep_work or configuration.work_folder is not None
    return isinstance(header, ZarrHeader) or (in_place(header) and not stays)


def copy_bytes(header: TomogramHeader, configuration: Configuration) -> int:
    """Return the size of the copy that `ingest` makes for a run, without compression, in bytes."""
    return 0 if reads_in_place(header, configuration) else header.dtype.itemsize * math.prod(header.shape)


def compresses(header: TomogramHeader, *, keep_work: bool) -> bool:
    """Whether the copy of a tomogram is compressed; floats hardly shrink, so they are only if the copy is kept."""
    return header.dtype.kind != "f" or keep_work


@dataclass(frozen=True, slots=True)
class IngestReport:
    """Header, statistics and all warnings of an ingested tomogram."""

    header: TomogramHeader
    statistics: Statistics
    warnings: tuple[str, ...]


def ingest(
    source: str | Path,
    store: StoreLike,
    *,
    name: str | None = "tomogram",
    chunks: Sequence[int] | None = None,
    compress: bool = True,
    level: int = 0,
    dataset: str | None = None,
    unsigned: bool | None = None,
    copy: bool = True,
    executor: Executor = SERIAL,
) -> tuple[Voxels, IngestReport]:
    """Copy the voxels of a tomogram file to a new zarr array, or open the zarr array that already holds them.

    Parameters
    ----------
    source, level, dataset, unsigned
        The file; see `read_header`. A zarr is read in place, and nothing is written.
    store
        Path or zarr store of the new array, or anything else that zarr accepts. Tasks in other processes must be able
        to open it.
    name
        Path of the array within the store; ``None`` makes it the store's root. An existing array is replaced.
    chunks
        Shape of a chunk in voxels. By default 128 along each axis, or less for a compressed file with large sections,
        which is read sequentially, one layer of chunks at a time.
    compress
        Whether to compress the voxels. Floats hardly shrink, and are read faster uncompressed.
    copy
        Whether to copy an MRC file that could be read in place; see `cryosiam_dask.files.mrc.in_place`.
    executor
        Runs one task for each row of chunks, or a single one for a compressed file. A task uses about 200 MB.

    Returns
    -------
    array : zarr.Array, (z, y, x) or (y, x)
        Stored voxels, non-finite ones included: int8, uint8, int16, uint16 or float32 for an MRC file, else the dtype
        of the file. Its attributes are those of `TomogramHeader.attributes` and ``statistics``. A source that is zarr
        is returned read-only, as it is or as a `cryosiam_dask.files.zarr.ArrayView`; an MRC file that is not copied is
        returned as `cryosiam_dask.files.mrc.MrcVoxels`.
    report : IngestReport
        The header, the statistics and all warnings.

    Raises
    ------
    TomogramError
        If the file cannot be read; a bad header is refused before anything is written.
    OutputError
        If the store cannot be written.
    """
    header = read_header(source, level=level, dataset=dataset, unsigned=unsigned)
    if isinstance(header, ZarrHeader):
        voxels = header.open()
        statistics = _stored_statistics(header) or _statistics(voxels, header.path, executor)
    elif isinstance(header, MrcHeader) and in_place(header) and not copy:
        voxels = MrcVoxels(header)
        statistics = _statistics(voxels, header.path, executor)
        require_unchanged(header)
    else:
        voxels, statistics = _fill(header, store, name, chunks, compress, executor)
    return voxels, _report(header, statistics)


def _report(header: TomogramHeader, statistics: Statistics) -> IngestReport:
    warnings = header.warnings
    if statistics.non_finite:
        warnings += (f"{statistics.non_finite} voxels are NaN or infinite; they are treated as the minimum",)
    return IngestReport(header, statistics, warnings)


def _fill(
    header: TomogramHeader,
    store: StoreLike,
    name: str | None,
    chunks: Sequence[int] | None,
    compress: bool,
    executor: Executor,
) -> tuple[zarr.Array[Any], Statistics]:
    if isinstance(store, str | Path):
        store = AnyDiskStore(store)
    remedy = "Free space on the disk, check the permissions, or choose another place"
    with writing("the converted tomogram must be writable", place=getattr(store, "root", store), remedy=remedy):
        array = zarr.create_array(
            store,
            name=name,
            shape=header.shape,
            chunks=_chunks(header) if chunks is None else tuple(chunks),
            dtype=header.dtype,
            compressors=COMPRESSOR if compress else None,
            fill_value=0,
            dimension_names=list("zyx"[-len(header.shape) :]),
            attributes=header.attributes(),
            overwrite=True,
        )
        parts: Iterable[_Part]
        if isinstance(header, MrcHeader) and header.compressed:
            (parts,) = executor.map(partial(_stream, array=array), [header], name="ingest")
        else:
            copied = executor.map(partial(_copy_row, header=header, array=array), _rows(header, array), name="ingest")
            parts = [part for row in copied for part in row]
        statistics = _merge(parts)
        if not isinstance(header, ZarrHeader):
            require_unchanged(header)  # otherwise the voxels may come from two files, or an incomplete one
        array.update_attributes({"statistics": statistics.attributes()})
    return array, statistics


def _stored_statistics(header: ZarrHeader) -> Statistics | None:
    """Return the statistics in the attributes of a zarr array."""
    own = header.statistics
    return Statistics(own["min"], own["max"], own["mean"], own["non_finite_voxels"]) if own else None


def _statistics(voxels: Voxels, path: Path, executor: Executor) -> Statistics:
    """Return the statistics of all voxels of a file that is read in place."""
    # Whole chunks, about as many bytes as a task copies at once.
    step = list(voxels.chunks)
    for axis in reversed(range(len(step))):
        room = TASK_BYTES // (math.prod(step) * voxels.dtype.itemsize)
        step[axis] *= max(1, min(room, -(-voxels.shape[axis] // step[axis])))
    look = partial(_look, voxels=voxels, path=path)
    return _merge(executor.map(look, list(regions_of(voxels.shape, step)), name="ingest"))


def _look(region: Region, *, voxels: Voxels, path: Path) -> _Part:
    return part_of(voxels[region] if isinstance(voxels, MrcVoxels) else read_region(voxels, region, path))


def convert(
    source: str | Path,
    target: str | Path,
    *,
    chunks: Sequence[int] | None = None,
    level: int = 0,
    dataset: str | None = None,
    executor: Executor = SERIAL,
    overwrite: bool = False,
) -> IngestReport:
    """Convert a tomogram file to a zarr v3 array at a path of its own.

    The array is written under a hidden name beside the target and renamed when it is complete.

    Parameters
    ----------
    source, level, dataset
        See `read_header`.
    chunks, executor
        See `ingest`.
    target
        Folder of the new array, for example ``tomogram.zarr``; open it with ``zarr.open_array``.
    overwrite
        Whether an existing zarr array or group may be replaced.

    Returns
    -------
    IngestReport
        See `ingest`.

    Raises
    ------
    TomogramError
        If the file cannot be read.
    OutputError
        If the target exists or cannot be written.
    """
    target = Path(target)
    header = read_header(source, level=level, dataset=dataset)
    with converting_to(target, overwrite=overwrite), replacing_folder(target) as part:
        _, statistics = _fill(header, part, None, chunks, True, executor)
    return _report(header, statistics)


@contextmanager
def converting_to(target: Path, *, overwrite: bool) -> Iterator[None]:
    """Convert to `target` within the ``with`` block, if `require_free` allows it; all errors name `target`.

    Raises
    ------
    OutputError
        If the target exists or cannot be written.
    """
    require_free(target, overwrite=overwrite)
    try:
        with writing("the converted tomogram must be writable", place=target, remedy="Choose another place"):
            yield
    except OutputError as error:
        raise type(error)(error.rule, place=target, value=error.value, remedy=error.remedy) from error


def require_free(target: Path, *, overwrite: bool) -> None:
    """Check that a conversion may write to `target`.

    Raises
    ------
    OutputError
        If something exists there that is not zarr or may not be replaced.
    """
    ours = is_zarr(target)
    if (target.exists() or target.is_symlink()) and not (ours and overwrite):
        raise OutputError(
            "the converted tomogram must not replace anything" if ours else "only zarr data can be replaced",
            place=target,
            value="an existing file or folder",
            remedy="Choose another name" + (", or allow it with --overwrite" if ours else ""),
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Statistics of a region: extremes, sum and number of its finite voxels, and the number of the others."""

    minimum: float
    maximum: float
    total: float
    finite: int
    non_finite: int


def part_of(voxels: np.ndarray[Any, Any]) -> _Part:
    size = voxels.size
    if voxels.dtype.kind == "f":
        finite = np.isfinite(voxels)
        if not finite.all():
            voxels = voxels[finite]
    if not voxels.size:
        return _Part(math.inf, -math.inf, 0.0, 0, size)
    total = float(voxels.sum(dtype=np.float64))
    return _Part(float(voxels.min()), float(voxels.max()), total, voxels.size, size - voxels.size)


def _merge(parts: Iterable[_Part]) -> Statistics:
    parts = list(parts)
    finite = sum(part.finite for part in parts)
    non_finite = sum(part.non_finite for part in parts)
    if not finite:
        return Statistics(None, None, None, non_finite)
    return Statistics(
        minimum=min(part.minimum for part in parts),
        maximum=max(part.maximum for part in parts),
        mean=math.fsum(part.total for part in parts) / finite,
        non_finite=non_finite,
    )


def _chunks(header: TomogramHeader) -> tuple[int, ...]:
    chunks = [min(CHUNK, size) for size in header.shape]
    if isinstance(header, MrcHeader) and header.compressed:
        sections = header.axes.index(0)
        section_bytes = header.voxel_bytes // header.shape[sections]
        while chunks[sections] > 1 and chunks[sections] * section_bytes > STREAM_BYTES:
            chunks[sections] = (chunks[sections] + 1) // 2
    return tuple(chunks)


def _rows(header: TomogramHeader, array: zarr.Array[Any]) -> list[Region]:
    """Divide an array into the regions that tasks copy: rows of chunks, several if they share a chunk of the file."""
    step = list(array.chunks)
    for axis in range(len(step) - 1):
        stored = min(header.stored_chunks[axis], array.shape[axis])
        fits = TASK_BYTES // (math.prod(step[:-1]) * array.shape[-1] * header.dtype.itemsize)
        step[axis] *= max(1, min(fits, -(-stored // step[axis])))
    return list(regions_of(array.shape, (*step[:-1], array.shape[-1])))


def _copy_row(row: Region, *, header: TomogramHeader, array: zarr.Array[Any]) -> list[_Part]:
    """Copy a region of whole chunks, a few chunks of its last axis at a time."""
    column_bytes = math.prod(s.stop - s.start for s in row[:-1]) * array.chunks[-1] * header.dtype.itemsize
    width = max(1, TASK_BYTES // column_bytes) * array.chunks[-1]
    parts = []
    for first in range(0, array.shape[-1], width):
        region: Region = (*row[:-1], slice(first, min(first + width, array.shape[-1])))
        voxels = native(header.read(region), array.dtype)
        array[region] = voxels
        parts.append(part_of(voxels))
    return parts


def _stream(header: MrcHeader, *, array: zarr.Array[Any]) -> list[_Part]:
    """Copy a compressed file sequentially, one layer of chunks at a time."""
    sections = header.axes.index(0)  # the axis of the array along which the file's sections lie
    file_shape = header.file_shape
    section_bytes = header.voxel_bytes // file_shape[0]
    parts = []
    for first, layer in read_layers(header, array.chunks[sections], section_bytes):
        count = len(layer) // section_bytes
        voxels = np.frombuffer(layer, header.file_dtype).reshape(count, *file_shape[1:]).transpose(header.axes)
        region = tuple(
            slice(first, first + count) if axis == sections else slice(None) for axis in range(len(header.shape))
        )
        voxels = native(voxels, array.dtype)
        array[region] = voxels
        parts.append(part_of(voxels))
    return parts
