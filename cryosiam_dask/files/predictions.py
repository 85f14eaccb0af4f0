"""Labels to the files that users keep: HDF5, and MRC where it is asked for.

Every file grows under a hidden name of its own, ``.<name>.….part``, in the same folder, is flushed to the disk and then
renamed: a user sees a complete file or none, and an earlier one stays as it is until that moment. Arrays are read and
written block by block; nothing the size of a volume is ever in memory.

HDF5 chunks are compressed here, by a pool of threads, or before by those who filled an `exportable_array`, and handed
over ready-made: the HDF5 library compresses one after the other, 50 MB of probabilities a second.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor as Pool
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from mrcfile.constants import IMAGE_STACK_SPACEGROUP, MAP_ID, VOLUME_SPACEGROUP
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import machine_stamp_from_byte_order, mode_from_dtype
from numcodecs import Zlib
from numpy.typing import NDArray
from zarr.storage import LocalStore

from cryosiam_dask.core.arrays import Region, Sliceable, regions_of
from cryosiam_dask.errors import OutputError, not_written
from cryosiam_dask.files.folders import real
from cryosiam_dask.runs.ledger import part_name

LABELS, PROBABILITIES, DISTANCES = "labels", "probs", "distances"  # the names that viewers open
INSTANCES = "instances"
REMOVED = "removed"  # labels of the voxels that a size filter took away; with them `labels` are the unfiltered ones
#: Voxels of an HDF5 chunk by its axes, of one byte each and of more: up to 1 MiB, which is what HDF5's cache holds.
CHUNK = {2: (512, 512), 3: (64, 128, 128)}
CHUNK_OF_WIDER = {2: (256, 256), 3: (64, 64, 64)}
BLOCK_CHUNKS = 4  # chunks along each axis that are in memory at once: 64 MiB
GZIP_LEVEL = 1  # every HDF5 reader has gzip; higher levels cost time and gain little
_AGAIN = "Run semantic-predict again"
MRC_BLOCK = 128  # sections and rows of an MRC file that are in memory at once


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A dataset of an HDF5 file that can be sent to other processes: the file is opened whenever a region is read.

    Attributes
    ----------
    path, name
        The file and the dataset.
    shape, dtype, chunks
        As stored; no chunks where the dataset is contiguous.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None

    def __getitem__(self, region: Any, /) -> Any:
        try:
            with _reading(self.path) as file:
                return file[self.name][region]
        except (OSError, KeyError) as error:
            raise OutputError(
                f"the dataset '{self.name}' must be readable", place=self.path, value=error, remedy=_AGAIN
            ) from error


def open_hdf5(path: str | Path, **options: Any) -> Any:
    """Open an HDF5 file to read it, also on a disk that knows no locks.

    Parameters
    ----------
    path
        The file.
    options
        Others of `h5py.File`.

    Raises
    ------
    OSError
        If it is no readable HDF5 file.
    """
    return h5py.File(path, "r", locking="best-effort", **options)


def open_dataset(path: str | Path, name: str) -> StoredDataset:
    """Look at a dataset of a predictions file.

    Raises
    ------
    OutputError
        If the file is no readable HDF5 file, holds no such dataset with voxels in it, or its datasets are not of one
        volume.
    """
    path = Path(path)
    try:
        with open_hdf5(path) as file:
            stored = file[name]
            dataset = StoredDataset(path, name, tuple(map(int, stored.shape)), stored.dtype, stored.chunks)
            removed = file[REMOVED].dtype if REMOVED in file else np.dtype(np.uint8)
            shapes = {other: tuple(file[other].shape) for other in (LABELS, REMOVED, PROBABILITIES) if other in file}
    except (OSError, KeyError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EACCES:
            raise _not_permitted(path) from None
        raise OutputError(
            f"a prediction must be an HDF5 file with a dataset '{name}'", place=path, remedy=_AGAIN
        ) from None
    if 0 in dataset.shape:
        raise OutputError(f"the dataset '{name}' must hold voxels", place=path, value=dataset.shape, remedy=_AGAIN)
    if removed.kind not in "iu":
        raise OutputError(
            f"the dataset '{REMOVED}' must hold labels, whole numbers", place=path, value=removed, remedy=_AGAIN
        )
    of_labels = shapes.get(LABELS)
    for other, axes, rule in ((REMOVED, 0, "have"), (PROBABILITIES, 1, "have a class axis and then")):
        if of_labels and other in shapes and shapes[other][axes:] != of_labels:
            raise OutputError(
                f"the dataset '{other}' must {rule} the shape of the labels, {of_labels}",
                place=path,
                value=shapes[other],
                remedy=_AGAIN,
            )
    return dataset


def exportable_array(group: zarr.Group, name: str, shape: tuple[int, ...]) -> zarr.Array[Any]:
    """Create an array of labels whose compressed chunks are those of the HDF5 file that it will be written to.

    Whoever fills it compresses it, many at a time; `write_hdf5` has but to copy the bytes.

    Parameters
    ----------
    group
        Where to create it.
    name
        Its name there.
    shape
        (z, y, x) or (y, x).

    Returns
    -------
    zarr.Array
        uint8, all 0.
    """
    # zarr's own format 3 has no zlib, which is what HDF5 calls gzip.
    return zarr.create_array(
        group.store_path / name,
        shape=shape,
        chunks=_chunk(shape, 1),
        dtype=np.uint8,
        fill_value=0,
        compressors=Zlib(GZIP_LEVEL),
        zarr_format=2,
        overwrite=True,  # one of a run that was killed is no member of a group of format 3, and so not seen there
    )


def write_hdf5(
    path: str | Path,
    labels: Sliceable,
    *,
    attributes: Mapping[str, Any],
    removed: Sliceable | None = None,
    probabilities: Sliceable | None = None,
    distances: Sliceable | None = None,
) -> None:
    """Write a predictions file, replacing an earlier one at once when it is complete.

    Parameters
    ----------
    path
        For example ``<stem>_preds.h5``, in a folder that exists.
    labels : (z, y, x) or (y, x), uint8
        Written as the dataset ``labels``.
    attributes
        Written to the file and to ``labels``: numbers, strings, sequences of either, mappings (as JSON). ``None`` is
        left out, and is NaN within a sequence of numbers, such as a voxel size known along two axes only.
    removed : (z, y, x) or (y, x), uint8
        Labels that a size filter set to 0, and 0 elsewhere; written as the dataset ``removed`` where given.
    probabilities, distances : (class, z, y, x) or (class, y, x), float32
        Written as the datasets ``probs`` and ``distances`` where given.

    Raises
    ------
    OutputError
        If there are no voxels, or the file cannot be written; an earlier file is then untouched.
    """
    path = Path(path)
    require_voxels(path, labels)
    with replacing(path, alone=True) as sink, h5py.File(sink, "w") as file, ThreadPoolExecutor() as pool:
        _describe(file, _write(file, sink, LABELS, labels, np.dtype(np.uint8), pool), attributes)
        if removed is not None:
            _write(file, sink, REMOVED, removed, np.dtype(np.uint8), pool)
        for name, source in ((PROBABILITIES, probabilities), (DISTANCES, distances)):
            if source is not None:
                _write(file, sink, name, source, np.dtype(np.float32), pool)


def write_instances_hdf5(path: str | Path, instances: Sliceable, *, attributes: Mapping[str, Any]) -> None:
    """Write a file of instance numbers, replacing an earlier one at once when it is complete.

    Parameters
    ----------
    path
        For example ``<stem>_components.h5``, in a folder that exists.
    instances : (z, y, x) or (y, x), unsigned integers
        Written as the dataset ``instances``, in their own dtype.
    attributes
        Written to the file and to ``instances``, as in `write_hdf5`.

    Raises
    ------
    OutputError
        If there are no voxels, or the file cannot be written; an earlier file is then untouched.
    """
    require_voxels(path, instances)
    with replacing(Path(path), alone=True) as sink, h5py.File(sink, "w") as file, ThreadPoolExecutor() as pool:
        _describe(file, _write(file, sink, INSTANCES, instances, np.dtype(instances.dtype), pool), attributes)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a small file, replacing an earlier one at once when it is complete.

    Raises
    ------
    OutputError
        If the file cannot be written; an earlier file is then untouched.
    """
    with replacing(Path(path)) as sink:
        sink.write(content)


def replace_labels(
    path: str | Path, labels: Sliceable, *, attributes: Mapping[str, Any], removed: Sliceable | None = None
) -> None:
    """Replace the labels of a predictions file and what was removed from them, and keep all else that it holds.

    Parameters
    ----------
    path
        An existing predictions file.
    labels : (z, y, x) or (y, x), uint8
        The new labels; they may be computed from the old ones while these are replaced.
    removed : (z, y, x) or (y, x), uint8
        Labels that a size filter set to 0, and 0 elsewhere; ``None`` where nothing was removed.
    attributes
        Added to those of the file and of ``labels``, or put in their place; as in `write_hdf5`.

    Raises
    ------
    OutputError
        If the file cannot be read or written; it is then untouched.
    """
    path = Path(path)
    require_voxels(path, labels)
    with (
        _reading(path) as old,
        replacing(path, alone=True) as sink,
        h5py.File(sink, "w") as file,
        ThreadPoolExecutor() as pool,
    ):
        for name in old:
            if name not in (LABELS, REMOVED):
                old.copy(name, file)
        file.attrs.update(old.attrs)
        earlier = dict(old[LABELS].attrs) if LABELS in old else {}
        _describe(file, _write(file, sink, LABELS, labels, np.dtype(np.uint8), pool), attributes, earlier)
        if removed is not None:
            _write(file, sink, REMOVED, removed, np.dtype(np.uint8), pool)


def require_voxels(path: str | Path, source: Sliceable) -> None:
    """Refuse to write an array without voxels, which neither HDF5 chunks nor MRC files can hold.

    Raises
    ------
    OutputError
        If an axis has length 0.
    """
    if 0 in source.shape:
        raise OutputError(
            "a file must hold voxels",
            place=path,
            value=f"shape {tuple(source.shape)}",
            remedy="Check the tomogram that the labels were made from",
        )


def dataset_names(path: str | Path) -> set[str]:
    """Names of what a predictions file holds.

    Raises
    ------
    OutputError
        If the file is no readable HDF5 file.
    """
    with _reading(Path(path)) as file:
        return set(file)


def read_attributes(path: str | Path) -> dict[str, Any]:
    """Read the attributes of a predictions file as plain Python values.

    Parameters
    ----------
    path
        An HDF5 file.

    Returns
    -------
    dict
        Numbers, strings, and lists of either, with ``None`` for NaN; mappings come back as the JSON text that was
        written. Empty for a file without attributes, such as CryoSiam's own.

    Raises
    ------
    OutputError
        If the file is no readable HDF5 file.
    """
    with _reading(Path(path)) as file:
        return {name: _plain(value) for name, value in file.attrs.items()}


def write_mrc(
    path: str | Path,
    labels: Sliceable,
    *,
    voxel_size_angstrom: Sequence[float | None] | None = None,
    origin_angstrom: Sequence[float] | None = None,
    nstart: Sequence[int] | None = None,
    label: str = "",
) -> None:
    """Write labels as an MRC file, replacing an earlier one at once when it is complete.

    Parameters
    ----------
    path
        The file, in a folder that exists. It is never compressed.
    labels : (z, y, x) or (y, x), uint8
        Written as int8 (mode 0) where all are below 128, as uint16 (mode 6) otherwise.
    voxel_size_angstrom
        Along z, y and x (or y and x); ``None`` where it is unknown.
    origin_angstrom, nstart
        Position of the volume in Å and in voxels, in the same order.
    label
        A line for the header, at most 80 ASCII characters.

    Raises
    ------
    OutputError
        If there are no voxels, or the file cannot be written; an earlier file is then untouched.
    """
    require_voxels(path, labels)
    shape = labels.shape
    # Whole rows, so that what is in memory makes one run of bytes in each section.
    regions = list(regions_of(shape, (*[MRC_BLOCK] * (len(shape) - 1), shape[-1])))
    counts = np.zeros(256, np.int64)
    for region in regions:
        counts += np.bincount(_uint8(labels[region]).ravel(), minlength=256)
    values = np.flatnonzero(counts)
    dtype = np.dtype(np.int8 if values[-1] < 128 else "<u2")

    header = _mrc_header(shape, dtype, voxel_size_angstrom, origin_angstrom, nstart, label)
    mean = values @ counts[values] / math.prod(shape)
    header["dmin"], header["dmax"], header["dmean"] = values[0], values[-1], mean
    header["rms"] = math.sqrt((values - mean) ** 2 @ counts[values] / math.prod(shape))
    with replacing(Path(path), alone=True) as sink:
        sink.write(header.tobytes())
        for region in regions:
            _write_rows(sink, region, _uint8(labels[region]).astype(dtype), shape)


def write_mrc_floats(
    path: str | Path,
    voxels: Sliceable,
    *,
    voxel_size_angstrom: Sequence[float | None] | None = None,
    origin_angstrom: Sequence[float] | None = None,
    nstart: Sequence[int] | None = None,
    label: str = "",
) -> None:
    """Write intensities as an MRC file of mode 2 (float32), replacing an earlier one at once when it is complete.

    Parameters
    ----------
    path, voxel_size_angstrom, origin_angstrom, nstart, label
        See `write_mrc`, also for what is raised.
    voxels : (z, y, x) or (y, x), real numbers
        Each is read once, some rows of a few sections at a time.
    """
    require_voxels(path, voxels)
    shape, dtype = voxels.shape, np.dtype("<f4")
    header = _mrc_header(shape, dtype, voxel_size_angstrom, origin_angstrom, nstart, label)
    low, high, total, squares, count = math.inf, -math.inf, 0.0, 0.0, 0
    with replacing(Path(path), alone=True) as sink:
        for region in regions_of(shape, (*[MRC_BLOCK] * (len(shape) - 1), shape[-1])):
            block = np.asarray(voxels[region], dtype)
            _write_rows(sink, region, block, shape)
            if (finite := block[np.isfinite(block)].astype(np.float64)).size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                total, squares, count = (
                    total + float(finite.sum()),
                    squares + float(finite @ finite),
                    count + finite.size,
                )
        if count:  # as of an unknown map otherwise
            mean = total / count
            header["dmin"], header["dmax"], header["dmean"] = low, high, mean
            header["rms"] = math.sqrt(max(0.0, squares / count - mean**2))
        sink.seek(0)
        sink.write(header.tobytes())
        sink.check()


def _mrc_header(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    voxel_size_angstrom: Sequence[float | None] | None,
    origin_angstrom: Sequence[float] | None,
    nstart: Sequence[int] | None,
    label: str,
) -> Any:
    """The header of an MRC file without its statistics."""
    header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    header["mode"] = mode_from_dtype(dtype)
    header["ispg"] = VOLUME_SPACEGROUP if len(shape) == 3 else IMAGE_STACK_SPACEGROUP
    header["cellb"] = (90, 90, 90)
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["map"], header["nversion"] = MAP_ID, 20141
    header["machst"] = machine_stamp_from_byte_order("<")
    header["nz"] = header["mz"] = 1  # of an image
    for axis, size in zip("xyz", reversed(shape), strict=False):
        header[f"n{axis}"] = header[f"m{axis}"] = size
    for axis, size, voxel in zip("xyz", reversed(shape), reversed(voxel_size_angstrom or ()), strict=False):
        header["cella"][axis] = size * (voxel or 0)
    for axis, position in zip("xyz", reversed(origin_angstrom or ()), strict=False):
        header["origin"][axis] = position
    for axis, start in zip("xyz", reversed(nstart or ()), strict=False):
        header[f"n{axis}start"] = start
    header["nlabl"] = bool(label)
    header["label"][0] = label.encode("ascii", "replace")[:80]
    return header


def _write_rows(sink: _Sink, region: Region, block: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Write a region of whole rows where it belongs behind the header."""
    sections = block.reshape(-1, *block.shape[-2:])
    first = region[0].start if len(shape) == 3 else 0
    for z, rows in enumerate(sections, first):
        sink.seek(HEADER_DTYPE.itemsize + (z * shape[-2] + region[-2].start) * shape[-1] * block.dtype.itemsize)
        sink.write(rows.tobytes())
    sink.check()


# --------------------------------------------------------------------------------------------------------------- files


class _Sink(io.FileIO):
    """A file that keeps the first error of the operating system and from then on swallows what is written.

    HDF5 cannot close a file that it cannot write: on a full disk it keeps the file open for good, cannot create one of
    that name again, and crashes the process when it ends. So it is not told; whoever writes calls `check` and gives up.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextmanager
def replacing(path: Path, *, alone: bool = False) -> Iterator[_Sink]:
    """Open a hidden file that takes the place of `path` when the block has ended well, and vanishes otherwise.

    Of several processes that write the same file at the same time, each completes its own, and the last one's stays.
    See `cryosiam_dask.runs.ledger.sweep_parts` for what is left by a process that was killed.

    Parameters
    ----------
    path
        The file.
    alone
        Whether nobody else may have written it meanwhile: as one may that was given the work of a process that hung,
        and whose file is the later one.

    Raises
    ------
    OutputError
        If it cannot be written; an earlier file is then untouched.
    """
    path = real(path)
    before = _identity(path)
    part = path.with_name(part_name(path.name))
    try:
        with _Sink(part, "w+") as sink:
            try:
                yield sink
            finally:
                sink.check()  # in place of whatever HDF5 has made of it
            os.fsync(sink.fileno())
        if alone and _identity(path) != before:
            raise OutputError(
                "only one process may write an output at a time",
                place=path,
                value="a later one of another process",
                remedy="Nothing is to be done: that one stays",
            )
        part.replace(path)
    except OSError as error:
        remedy = {
            errno.ENOSPC: "Free space on the disk, or choose another folder",
            errno.EDQUOT: "Free space in your quota, or choose another folder",
            errno.EFBIG: "The file system or a limit (ulimit -f) does not allow files of this size",
            errno.ENOENT: "Create the folder first",
        }.get(error.errno or 0, "Check the folder and its permissions, or choose another one")
        raise not_written(error, "the output must be writable", place=path, remedy=remedy) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _not_permitted(path: Path) -> OutputError:
    return OutputError(
        "a prediction must be readable", place=path, value=os.strerror(errno.EACCES), remedy="Change its permissions"
    )


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        file = open_hdf5(path)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise _not_permitted(path) from error
        raise OutputError(
            "an existing predictions file must be readable HDF5",
            place=path,
            value=error,
            remedy="Remove the file and predict again",
        ) from error
    with file:
        yield file


# ------------------------------------------------------------------------------------------------- datasets, attributes


def _describe(file: Any, dataset: Any, attributes: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> None:
    stored = {name: _storable(value) for name, value in attributes.items() if value is not None}
    file.attrs.update(stored)
    dataset.attrs.update({**(earlier or {}), **stored})


def _write(file: Any, sink: _Sink, name: str, source: Sliceable, dtype: np.dtype[Any], pool: Pool) -> Any:
    """Write a dataset in whole chunks of space, one class at a time; more than a byte is shuffled first."""
    classes = (1,) if dtype.kind == "f" else ()
    space = source.shape[len(classes) :]
    chunk = (*classes, *_chunk(space, dtype.itemsize))
    dataset = file.create_dataset(
        name,
        source.shape,
        dtype,
        chunks=chunk,
        compression="gzip",
        compression_opts=GZIP_LEVEL,
        shuffle=dtype.itemsize > 1,
    )
    files = _chunk_files(source, chunk, dtype)
    if files is not None:
        for corner, file in files:
            with suppress(FileNotFoundError):  # of a chunk that holds nothing but 0
                dataset.id.write_direct_chunk(corner, file.read_bytes())
            sink.check()
        return dataset
    encode = partial(_encode, chunk=chunk)
    for region in regions_of(source.shape, (*classes, *(BLOCK_CHUNKS * size for size in chunk[len(classes) :]))):
        block = np.asarray(source[region]).astype(dtype, casting="safe", copy=False)
        parts = list(regions_of(block.shape, chunk))
        for part, encoded in zip(parts, pool.map(encode, (block[part] for part in parts)), strict=True):
            dataset.id.write_direct_chunk(tuple(r.start + p.start for r, p in zip(region, part, strict=True)), encoded)
        sink.check()
    return dataset


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    chunk = (CHUNK if itemsize == 1 else CHUNK_OF_WIDER)[len(shape)]
    return tuple(min(edge, size) for edge, size in zip(chunk, shape, strict=True))


def _chunk_files(
    source: Any, chunk: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[tuple[tuple[int, ...], Path]] | None:
    """The files that hold the chunks of an `exportable_array`, each with its corner; None for any other array."""
    if (
        not isinstance(source, zarr.Array)
        or not isinstance(source.store, LocalStore)
        or source.metadata.zarr_format != 2
        or (source.chunks, source.dtype, source.compressors) != (chunk, dtype, (Zlib(GZIP_LEVEL),))
    ):
        return None
    folder, counts = (
        Path(source.store.root) / source.path,
        (-(-n // c) for n, c in zip(source.shape, chunk, strict=True)),
    )
    return (
        (tuple(i * c for i, c in zip(index, chunk, strict=True)), folder / ".".join(map(str, index)))
        for index in itertools.product(*map(range, counts))
    )


def _encode(values: NDArray[Any], *, chunk: tuple[int, ...]) -> bytes:
    """Bytes of an HDF5 chunk after the filters shuffle (of anything wider than a byte) and gzip; rims are padded."""
    padded = np.zeros(chunk, values.dtype)
    padded[tuple(slice(0, size) for size in values.shape)] = values
    by_byte = padded.view(np.uint8).reshape(-1, values.dtype.itemsize).T
    return zlib.compress(by_byte.tobytes(), GZIP_LEVEL)


def _uint8(values: Any) -> NDArray[np.uint8]:
    return np.asarray(values).astype(np.uint8, casting="safe", copy=False)


def _storable(value: Any) -> Any:
    """The HDF5 form of an attribute."""
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple) and not any(isinstance(item, str) for item in value):
        return np.array([math.nan if item is None else item for item in value])
    return value


def _plain(value: Any) -> Any:
    """The Python form of an attribute."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if isinstance(value, float) and math.isnan(value) else value
