"""Predict labels: the network's sliding window, block by block.

A block (see `cryosiam_dask.core.grid`) is read with the halo that its patches need, its patches are predicted in
batches, and the cores of the patches are joined to the block's labels, probabilities and distances. `predict_window`
does that for the voxels of one block. Two functions call it for a whole volume:

* `predict_store` for stored volumes: every task reads its own block with its halo from the zarr store and writes whole
  chunks of the outputs. Only the block's index is sent to a worker. The command line uses this way.
* `predict` for any Dask array: a graph of `dask.array.map_overlap`, in which Dask moves the halos.

Both give the same bytes; ``benchmarks/bench_halo.py`` compares their cost.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
from distributed import get_worker
from zarr.codecs import BloscCodec
from zarr.storage import LocalStore

from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.blocks import Index
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.core.grid import DEFAULT_BLOCK_SIZE, Block, Grid, make_grid, wrapped_segments
from cryosiam_dask.errors import OutputError
from cryosiam_dask.files.mask import Mask, read_mask
from cryosiam_dask.model.predictor import PredictorSpec, load_predictor, normalise
from cryosiam_dask.stages.components import Description, Labelling, count_labels, describe_block

Array = npt.NDArray[Any]

#: Outputs of a network, and their dtypes.
OUTPUTS: Mapping[str, type] = {
    "labels": np.uint8,
    "probabilities": np.float32,
    "distances": np.float32,
    "denoised": np.float32,
}


def predict_window(
    spec: PredictorSpec, voxels: Array, block: Block, wanted: Sequence[str], mask: Array | None = None
) -> tuple[dict[str, Array], tuple[float, float]]:
    """Predict one block.

    Parameters
    ----------
    spec
        The network and how it is run.
    voxels
        The block's normalised window, ``block.window_shape`` (z, y, x), float32.
    block
        The patches to predict, and the regions of their cores.
    wanted
        Keys of `OUTPUTS`, and ``"highest"``; see `cryosiam_dask.model.predictor.Predictor.predict_block`.
    mask
        ``block.shape`` (z, y, x), 0 or 1; every output is multiplied by it. Patches whose core lies outside the mask
        are not predicted.

    Returns
    -------
    dict
        Those of ``labels`` (z, y, x), ``probabilities`` and ``distances`` (class, z, y, x) that were wanted, and
        ``highest`` (class,), the highest probabilities in the cores of all predicted patches, also outside the mask.
        For a denoiser, ``denoised`` (channel, z, y, x).
    tuple of float
        When the device started and finished, in seconds since 1970.
    """
    patches = [p for p in block.patches if mask is None or mask[p.target].any()]
    result, computed = load_predictor(spec).predict_block(voxels, patches, block.shape, wanted)
    if mask is not None:
        for name, values in result.items():
            if name != "highest":
                values *= mask  # in place, because a second copy of many classes would take too much memory
    return result, computed


def _all_classes(region: tuple[slice, ...]) -> Any:
    """Return the index of a region in an array that may have a class axis before (z, y, x)."""
    return (..., *region)


_SLAB = 64  # sections


def tomogram_chunks(grid: Grid) -> tuple[int, ...]:
    """Return the best chunk shape for a tomogram; with CryoSiam's patches most windows end at chunk borders.

    Parameters
    ----------
    grid
        The patches that will read the tomogram.
    """
    strides = [a.axis.stride if a.axis.exact else _SLAB for a in grid.axes]
    chunk = [s * max(1, round(_SLAB / s)) for s in strides]
    chunk[-1] *= 4  # opening a chunk costs about as much as reading that many voxels
    return tuple(min(n, c) for n, c in zip(grid.shape, chunk, strict=True))


@dataclass(frozen=True, slots=True)
class StoredPrediction:
    """What a tomogram's prediction reads and writes; sent to the workers.

    Attributes
    ----------
    spec
        The network and how it is run.
    grid
        Patches and blocks.
    tomogram
        Stored intensities, (z, y, x).
    outputs
        Arrays to fill by name, with chunks of ``grid.chunks`` over their last axes; zero where nothing is written.
    mask
        The lamella, or ``None``.
    labelling
        How to find the components of the labels; its blocks divide those of `grid`. Each block is labelled as soon as
        it is predicted, so that nothing has to be read again. ``None``: components are not found.
    token
        Attribute ``blocks`` of the outputs' group, if it has one. A task writes nothing if it has changed, because a
        task of a killed run may still be running when the next run has started.
    """

    spec: PredictorSpec
    grid: Grid
    tomogram: Sliceable
    outputs: Mapping[str, zarr.Array[Any]]
    mask: Mask | None = None
    labelling: Labelling | None = None
    token: str | None = None


def create_outputs(
    group: zarr.Group, grid: Grid, classes: int, wanted: Sequence[str], overwrite: bool = False
) -> dict[str, zarr.Array[Any]]:
    """Create the arrays that a prediction fills.

    Parameters
    ----------
    group
        Group of the arrays, whose names are those in `wanted`.
    grid
        Determines shape and chunks.
    classes
        Length of the class axis of ``probabilities`` and ``distances``.
    wanted
        Keys of `OUTPUTS`.
    overwrite
        Whether to replace existing arrays.
    """
    outputs = {}
    for name in wanted:
        leading = () if name == "labels" else (classes,)
        outputs[name] = group.create_array(
            name,
            shape=leading + grid.shape,
            chunks=(1,) * len(leading) + grid.chunks,
            dtype=OUTPUTS[name],
            fill_value=0,
            compressors=BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),  # written once and read a few times
            overwrite=overwrite,
        )
    return outputs


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """When a block was processed, as (start, end) in seconds since 1970, and what was found in it.

    Attributes
    ----------
    worker
        Address of the process, because process numbers are unique only on one host.
    read
        Reading and normalising its voxels.
    compute
        The network, on the device.
    write
        Compressing and writing its results.
    highest
        The highest probability of each class in any core that was predicted; or the highest denoised intensity.
    lowest
        The lowest denoised intensity.
    inside
        Number of voxels of the block inside the mask; all if there is no mask.
    counts
        Number of voxels of each label from 1 on.
    described
        The blocks of `StoredPrediction.labelling` in this block, with what was found in them.
    """

    worker: str
    read: tuple[float, float]
    compute: tuple[float, float]
    write: tuple[float, float]
    highest: tuple[float, ...] = ()
    lowest: float | None = None
    inside: int = 0
    counts: tuple[int, ...] = ()
    described: tuple[tuple[Index, Description], ...] = ()


def predict_store(
    prediction: StoredPrediction,
    *,
    skip: Collection[tuple[int, ...]] = (),
    done: Callable[[tuple[int, ...], BlockTimes | None], None] = lambda index, block: None,
    executor: Executor = SERIAL,
) -> list[BlockTimes]:
    """Predict a stored tomogram.

    Parameters
    ----------
    prediction
        What to read and where to write.
    skip
        Indices of blocks whose results already exist.
    done
        Called with the index of every block whose results are on disk, and with its `BlockTimes`, or ``None`` if the
        mask excludes the block.
    executor
        Runs one task for each block.

    Returns
    -------
    list of BlockTimes
        One for each predicted block; blocks that the mask excludes have none.
    """
    left = [index for index in prediction.grid.indices() if index not in skip]
    blocks = partial(predict_stored_block, prediction)
    times = executor.map(blocks, left, name="predict", overlap=True, done=done)
    return [block for block in times if block]


def _own_address() -> str:
    try:
        return str(get_worker().address)
    except ValueError:  # no worker
        return f"{socket.gethostname()}:{os.getpid()}"


def predict_stored_block(prediction: StoredPrediction, index: tuple[int, ...]) -> BlockTimes | None:
    """Read, predict and write one block; return None if the mask excludes it."""
    grid = prediction.grid
    block = grid.block(index)
    mask = None if prediction.mask is None else read_mask(prediction.mask, block.region)
    if mask is not None and not mask.any():
        return None  # the outputs are zero already
    began = time.time()
    voxels = read_window(prediction.tomogram, block, grid, prediction.spec)
    read = time.time()
    denoises = "denoised" in prediction.outputs
    wanted = (*prediction.outputs, *(() if denoises else ("highest",)))
    result, computed = predict_window(prediction.spec, voxels, block, wanted, mask)
    highest = (float(result["denoised"].max()),) if denoises else tuple(result.pop("highest").tolist())
    lowest = float(result["denoised"].min()) if denoises else None
    inside = math.prod(block.shape) if mask is None else int(np.count_nonzero(mask))
    del voxels  # another task may be reading the next block
    counts = tuple(count_labels(result["labels"])[1:].tolist()) if "labels" in result else ()
    described = tuple(_describe(result["labels"], block, prediction.labelling)) if prediction.labelling else ()
    writing = time.time()
    if prediction.token is not None:
        store = next(iter(prediction.outputs.values())).store
        if zarr.open_group(store, mode="r", zarr_format=3).attrs.get("blocks") != prediction.token:
            raise OutputError("only one run may write a block", place=store, remedy="Let the later run finish")
    for name, values in result.items():
        prediction.outputs[name][_all_classes(block.region)] = values
        _force_to_disk(prediction.outputs[name], block.region)
    written = (writing, time.time())
    return BlockTimes(_own_address(), (began, read), computed, written, highest, lowest, inside, counts, described)


def _describe(labels: Array, block: Block, labelling: Labelling) -> Iterator[tuple[Index, Description]]:
    """Yield the index and description of each block of a labelling in `block`, whose labels are (z, y, x) or (y, x)."""
    for index in labelling.blocks.inside(block.region):
        where = labelling.blocks.slices(index)[-labels.ndim :]
        part = labels[
            tuple(slice(s.start - r.start, s.stop - r.start) for s, r in zip(where, block.region, strict=True))
        ]
        yield index, describe_block(part.reshape(labelling.blocks.extent(index)), index, labelling=labelling)


def _force_to_disk(array: zarr.Array[Any], region: tuple[slice, ...]) -> None:
    """Wait until the chunks of a region are on the disk, so that a recorded block survives a loss of power."""
    store = array.store_path.store
    if not isinstance(store, LocalStore):
        return
    leading = [range(n) for n in array.cdata_shape[: -len(region)]]
    inside = [range(s.start // c, -(-s.stop // c)) for s, c in zip(region, array.chunks[-len(region) :], strict=True)]
    for chunk in product(*leading, *inside):
        path = Path(store.root, array.path, array.metadata.encode_chunk_key(chunk))
        with suppress(FileNotFoundError):  # chunks of zeros have no file
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _slab(chunks: Any) -> int:
    """Return the number of sections to read at once: whole chunks, so that each chunk is decoded only once."""
    chunk = chunks[0] if chunks and isinstance(chunks[0], int) else _SLAB
    return min(chunk * max(1, _SLAB // chunk), 4 * _SLAB)


def read_window(tomogram: Any, block: Block, grid: Grid, spec: PredictorSpec) -> npt.NDArray[np.float32]:
    """Read the window of a block.

    Parameters
    ----------
    tomogram
        Stored intensities, (z, y, x); anything that slices like an array.
    block, grid
        The block and its grid.
    spec
        How intensities are scaled.

    Returns
    -------
    ndarray
        ``block.window_shape`` (z, y, x), float32: normalised, then padded with zeros and wrapped around past the end.
    """
    depth = _slab(getattr(tomogram, "chunks", None))
    segments = [
        wrapped_segments(start, stop, a.axis.size, a.axis.padded)
        for (start, stop), a in zip(block.window, grid.axes, strict=True)
    ]
    covered = all(
        sum(t.stop - t.start for _, t in axis) == n for axis, n in zip(segments, block.window_shape, strict=True)
    )
    voxels = (np.empty if covered else np.zeros)(block.window_shape, np.float32)
    for pieces in product(*segments):
        source, target = zip(*pieces, strict=True)
        # Some chunks at a time, because a whole window would be in memory three times.
        for first in range(source[0].start // depth * depth, source[0].stop, depth):
            slab = slice(max(first, source[0].start), min(first + depth, source[0].stop))
            at = target[0].start + slab.start - source[0].start
            part = voxels[(slice(at, at + slab.stop - slab.start), *target[1:])]
            found = np.asarray(tomogram[(slab, *source[1:])])
            if part.flags.c_contiguous:
                normalise(found, spec, out=part)
            else:
                part[...] = normalise(found, spec)
    return voxels


def predict(
    tomogram: da.Array,
    spec: PredictorSpec,
    *,
    outputs: Sequence[str] = ("labels",),
    mask: da.Array | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> dict[str, da.Array]:
    """Predict any Dask array of intensities, lazily.

    Parameters
    ----------
    tomogram
        Intensities, (z, y, x) or (y, x), any chunks and any real dtype.
    spec
        The network and how it is run.
    outputs
        Which of ``"labels"``, ``"probabilities"`` and ``"distances"``. Labels alone are the cheapest to move.
    mask
        Shape of the tomogram, 0 or 1; every output is multiplied by it.
    block_size
        Wanted edge of the blocks in voxels; it does not change the results.

    Returns
    -------
    dict
        ``labels`` uint8 (z, y, x); ``probabilities`` and ``distances`` float32 (class, z, y, x).

    Raises
    ------
    ConfigurationError
        If patch and tomogram differ in their number of axes.
    """
    grid = make_grid(tomogram.shape, spec.patch, block_size, spec.halo)
    axes = [a.axis for a in grid.axes]
    window = tomogram.map_blocks(partial(normalise, spec=spec), dtype=np.float32)
    window = da.pad(window, [(0, axis.padded - axis.size) for axis in axes])
    window = da.pad(window, [(0, axis.extent - axis.padded) for axis in axes], mode="wrap")
    window = window.rechunk(tuple(tuple(np.diff([*a.edges[:-1], a.axis.extent])) for a in grid.axes))
    regions = tuple(tuple(int(n) for n in np.diff(a.edges)) for a in grid.axes)

    def overlap(names: tuple[str, ...], stacked: bool) -> da.Array:
        return da.map_overlap(
            partial(_predict_chunk, grid=grid, spec=spec, names=names, stacked=stacked),
            window,
            # CryoSiam's first patch ends one halo behind its core, other first patches two halos.
            depth={
                i: (a.axis.halo, a.axis.halo if a.axis.exact or a.cores > 1 else 2 * a.axis.halo)
                for i, a in enumerate(grid.axes)
            },
            boundary="none",
            trim=False,
            allow_rechunk=False,
            new_axis=0 if stacked else None,
            chunks=((len(names) * spec.classes,), *regions) if stacked else regions,
            dtype=np.float32 if stacked else np.uint8,
            meta=np.zeros((0,) * (len(axes) + stacked), np.float32 if stacked else np.uint8),
            token="predict",
        )

    fields = tuple(name for name in outputs if name != "labels")
    result = {}
    if fields:
        # One evaluation of the network suffices, because labels follow from the probabilities.
        names = tuple(dict.fromkeys(("probabilities", *fields))) if "labels" in outputs else fields
        stack = overlap(names, stacked=True)
        result = {name: stack[i * spec.classes : (i + 1) * spec.classes] for i, name in enumerate(names)}
        if "labels" in outputs:
            probabilities = result["probabilities"].rechunk({0: -1})
            result["labels"] = probabilities.map_blocks(
                partial(labels_of, threshold=spec.threshold), drop_axis=0, dtype=np.uint8
            )
    elif "labels" in outputs:
        result["labels"] = overlap(("labels",), stacked=False)
    if mask is not None:
        result = {name: values * mask.astype(values.dtype) for name, values in result.items()}
    return {name: result[name] for name in outputs}


def _predict_chunk(
    voxels: Array, *, grid: Grid, spec: PredictorSpec, names: tuple[str, ...], stacked: bool, block_info: Any = None
) -> Array:
    """Call `predict_window` for one chunk of a `map_overlap` graph; Dask passes its location."""
    location = block_info[None]["chunk-location"][1 if stacked else 0 :]
    block = grid.block(tuple(location))
    voxels = voxels[tuple(slice(0, n) for n in block.window_shape)]
    result, _ = predict_window(spec, voxels, block, names)
    return np.concatenate([result[name] for name in names]) if stacked else result["labels"]


def labels_of(probabilities: Array, threshold: float) -> npt.NDArray[np.uint8]:
    """Return the labels that follow from probabilities.

    Parameters
    ----------
    probabilities
        (class, z, y, x), float32.
    threshold
        One class: a voxel above it is 1. Several classes: values below it count as 0, and the class with the largest
        value wins (the first one of equals); where no class reaches the threshold, the label is 0.
    """
    limit = np.float32(threshold)
    labels: Array
    if len(probabilities) == 1:
        labels = probabilities[0] > limit
    else:
        labels = np.where(probabilities < limit, np.float32(0), probabilities).argmax(0)
    return labels.astype(np.uint8)
