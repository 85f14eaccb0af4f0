"""Write predictions to HDF5.

A file is written under a hidden name in the same folder, flushed to disk and then renamed. So a user sees a complete
file or none, and an earlier file is kept until then. Arrays are read and written block by block, so that no whole
volume is ever in memory.

The HDF5 library compresses one chunk after the other, about 50 MB of probabilities per second. Here, chunks are
compressed by a pool of threads, or earlier by the tasks that fill an `exportable_array`, and written directly.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor as Pool
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from numcodecs import Zlib
from numpy.typing import NDArray
from zarr.storage import LocalStore

from cryosiam_dask.core.arrays import Sliceable, regions_of
from cryosiam_dask.files.atomic import Sink, replacing, require_voxels
from cryosiam_dask.files.hdf5 import DISTANCES, INSTANCES, LABELS, PROBABILITIES, REMOVED, reading

#: Shapes of HDF5 chunks by number of axes, for voxels of one byte and for wider ones: up to 1 MiB, HDF5's cache size.
CHUNK = {2: (512, 512), 3: (64, 128, 128)}
CHUNK_OF_WIDER = {2: (256, 256), 3: (64, 64, 64)}
BLOCK_CHUNKS = 4  # chunks along each axis that are in memory at once: 64 MiB
GZIP_LEVEL = 1  # every HDF5 reader knows gzip; higher levels take more time and save little


def exportable_array(group: zarr.Group, name: str, shape: tuple[int, ...]) -> zarr.Array[Any]:
    """Create an array of labels whose chunks are compressed exactly as in the final HDF5 file.

    The tasks that fill it compress in parallel; `write_hdf5` only copies the bytes.

    Parameters
    ----------
    group
        Where to create it.
    name
        Name in the group.
    shape
        (z, y, x) or (y, x).

    Returns
    -------
    zarr.Array
        uint8, all 0.
    """
    # zarr format 3 has no zlib, which HDF5 calls gzip.
    return zarr.create_array(
        group.store_path / name,
        shape=shape,
        chunks=_chunk(shape, 1),
        dtype=np.uint8,
        fill_value=0,
        compressors=Zlib(GZIP_LEVEL),
        zarr_format=2,
        overwrite=True,  # a group of format 3 does not list an array of format 2 that a killed run left
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
    """Write a predictions file, replacing an earlier one atomically.

    Parameters
    ----------
    path
        For example ``<stem>_preds.h5``, in an existing folder.
    labels : (z, y, x) or (y, x), uint8
        Written as the dataset ``labels``.
    attributes
        Written to the file and to ``labels``: numbers, strings, sequences of either, and mappings (as JSON). Values
        that are ``None`` are left out; ``None`` in a sequence of numbers becomes NaN.
    removed : (z, y, x) or (y, x), uint8
        Labels that a size filter set to 0, and 0 elsewhere; written as the dataset ``removed`` if given.
    probabilities, distances : (class, z, y, x) or (class, y, x), float32
        Written as the datasets ``probs`` and ``distances`` if given.

    Raises
    ------
    OutputError
        If there are no voxels, or the file cannot be written; an earlier file is then unchanged.
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


def write_raw_predictions(path: str | Path, predictions: Sliceable, *, attributes: Mapping[str, Any]) -> None:
    """Write all channels of a denoiser's result, replacing an earlier file atomically.

    Parameters
    ----------
    path, attributes
        See `write_hdf5`, also for the errors.
    predictions : (channel, z, y, x) or (channel, y, x), float32
        Written as the dataset ``preds``, as in CryoSiam.
    """
    require_voxels(path, predictions)
    with replacing(Path(path), alone=True) as sink, h5py.File(sink, "w") as file, ThreadPoolExecutor() as pool:
        _describe(file, _write(file, sink, "preds", predictions, np.dtype(np.float32), pool), attributes)


def write_instances_hdf5(path: str | Path, instances: Sliceable, *, attributes: Mapping[str, Any]) -> None:
    """Write a file of instance numbers, replacing an earlier one atomically.

    Parameters
    ----------
    path
        For example ``<stem>_components.h5``, in an existing folder.
    instances : (z, y, x) or (y, x), unsigned integers
        Written as the dataset ``instances``, with the same dtype.
    attributes
        Written to the file and to ``instances``, as in `write_hdf5`.

    Raises
    ------
    OutputError
        If there are no voxels, or the file cannot be written; an earlier file is then unchanged.
    """
    require_voxels(path, instances)
    with replacing(Path(path), alone=True) as sink, h5py.File(sink, "w") as file, ThreadPoolExecutor() as pool:
        _describe(file, _write(file, sink, INSTANCES, instances, np.dtype(instances.dtype), pool), attributes)


def replace_labels(
    path: str | Path, labels: Sliceable, *, attributes: Mapping[str, Any], removed: Sliceable | None = None
) -> None:
    """Replace the datasets ``labels`` and ``removed`` of a predictions file, and keep everything else.

    Parameters
    ----------
    path
        An existing predictions file.
    labels : (z, y, x) or (y, x), uint8
        The new labels, which may be computed from the old ones while they are written.
    removed : (z, y, x) or (y, x), uint8
        Labels that a size filter set to 0, and 0 elsewhere; ``None`` if nothing was removed.
    attributes
        Added to the attributes of the file and of ``labels``, as in `write_hdf5`; existing ones are replaced.

    Raises
    ------
    OutputError
        If the file cannot be read or written; it is then unchanged.
    """
    path = Path(path)
    require_voxels(path, labels)
    with (
        reading(path) as old,
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


def _describe(file: Any, dataset: Any, attributes: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> None:
    stored = {name: _storable(value) for name, value in attributes.items() if value is not None}
    file.attrs.update(stored)
    dataset.attrs.update({**(earlier or {}), **stored})


def _write(file: Any, sink: Sink, name: str, source: Sliceable, dtype: np.dtype[Any], pool: Pool) -> Any:
    """Write a dataset in whole chunks, one class at a time; voxels wider than a byte are shuffled before gzip."""
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
            with suppress(FileNotFoundError):  # a chunk of zeros has no file
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
    """Yield the corner and the file of each chunk of an `exportable_array`; return None for any other array."""
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
    """Pad values to a whole HDF5 chunk, shuffle them if wider than a byte, and compress them with gzip."""
    padded = np.zeros(chunk, values.dtype)
    padded[tuple(slice(0, size) for size in values.shape)] = values
    by_byte = padded.view(np.uint8).reshape(-1, values.dtype.itemsize).T
    return zlib.compress(by_byte.tobytes(), GZIP_LEVEL)


def _storable(value: Any) -> Any:
    """Convert an attribute to a value that HDF5 can store."""
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple) and not any(isinstance(item, str) for item in value):
        return np.array([math.nan if item is None else item for item in value])
    return value
