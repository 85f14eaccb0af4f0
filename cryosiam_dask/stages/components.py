"""Connected components of a chunked label volume, found as if the volume were one array.

A component is a set of voxels of one class that are connected with 6, 18 or 26 neighbours. Each block (one or more
whole chunks) is labelled alone, and then the labels that touch at borders are merged:

1. Pass 1, one task per block: label it. Return for each provisional label its number of voxels, first voxel and class,
   and the labels on the six border planes, compressed.
2. Number the provisional labels of all blocks consecutively; the offsets are the cumulative sum of the counts.
3. Compare the two planes on either side of every border, at every shift within the plane that the connectivity allows
   (1, 5 or 9). Touching voxels of different blocks always face each other across a border, also at edges and corners.
   A pair counts only if both sides have the same class.
4. Merge the pairs with a graph search over the labels that occur in a pair (a few per cent).
5. Number the components 1 .. K by their first voxel in C order, so that the numbers do not depend on the blocks.
6. Pass 2, one task per block: read and label it again (cheaper than storing labels), look up the final numbers, write.

Pass 1 can be part of another task that already holds a block's labels: see `describe_block`. To remove small
components, pass 2 need not label again: pass 1 returns the runs of voxels of all provisional labels that are small
enough.

The caller's memory grows with the volume only through the tables, about 40 bytes per provisional label, and these runs;
a task's memory does not grow. Components are filtered and measured after the merge, as a whole.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial, wraps
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numcodecs import LZ4
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cryosiam_dask.core.arrays import Sliceable, WritableArray
from cryosiam_dask.core.blocks import Blocks, Index
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.errors import DeviceError, LabelsError
from cryosiam_dask.model.device import free_memory, has_gpu, lost_device_reported, out_of_memory_caught, share_memory

R = TypeVar("R")
ArrayModule: TypeAlias = Literal["numpy", "cupy", "auto"]
"""The array library that a task uses; "auto" means cupy in a process with a GPU and numpy in any other."""
_REACH = {6: 1, 18: 2, 26: 3}  # number of axes along which a neighbour may differ
_PROBABILITY_ONE = 1 << 30  # probabilities are summed as integers, so that sums do not depend on the blocks
_PACKED = LZ4()  # border planes are mostly background, and distances between runs are small
# Measurements of a component: how the values of two parts are merged, and dtype and shape of a value.
_COLUMNS: dict[str, tuple[np.ufunc, Any, tuple[int, ...]]] = {
    "voxels": (np.add, np.int64, ()),
    "coordinate_sums": (np.add, np.int64, (3,)),
    "lower": (np.minimum, np.int64, (3,)),
    "upper": (np.maximum, np.int64, (3,)),
    "probability_sum": (np.add, np.int64, ()),
    "probability_max": (np.maximum, np.float32, ()),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """Everything that differs between a CPU and a GPU.

    Attributes
    ----------
    xp
        The array module, numpy or cupy.
    gaussian
        ``gaussian(block, sigma, axis, **options)``: see `scipy.ndimage.gaussian_filter1d`; sums in double precision.
    label
        ``label(block, connectivity) -> (labels, count)``: the components of each class of a C-contiguous (z, y, x)
        block, numbered from 1 by their first voxel in C order, so that CPU and GPU give the same labels.
    to_host
        Copies a device array to a NumPy array; does nothing on the CPU.
    """

    xp: Any
    gaussian: Callable[..., Any]
    label: Callable[[Any, int], tuple[Any, int]]
    to_host: Callable[[Any], NDArray[Any]]


@cache
def backend(array_module: ArrayModule) -> Backend:
    """Return the backend for `array_module`, imported at first use in the process that computes.

    Raises
    ------
    DeviceError
        If cupy or cucim is needed and cannot be imported.
    """
    if array_module == "auto":
        return backend(_own_module(array_module))
    if array_module == "numpy":
        import cc3d
        from scipy import ndimage

        def on_cpu(block: NDArray[Any], connectivity: int) -> tuple[NDArray[Any], int]:
            labels, count = cc3d.connected_components(block, connectivity=connectivity, return_N=True)
            return labels, int(count)

        return Backend(np, ndimage.gaussian_filter1d, on_cpu, np.asarray)
    try:
        import cupy

        with _without_clara():
            from cucim.skimage import measure
        from cupyx.scipy import ndimage
    except ImportError as error:
        raise DeviceError(
            "components on a GPU need cupy and cucim",
            value=error,
            remedy="Install the extra, pip install 'cryosiam-dask[gpu-cu13]', or run on the CPU",
        ) from error

    def on_gpu(block: Any, connectivity: int) -> tuple[Any, int]:
        labels, count = measure.label(block, background=0, connectivity=_REACH[connectivity], return_num=True)
        return labels, int(count)

    def gaussian(block: Any, sigma: float, axis: int, **options: Any) -> Any:
        # Cupy sums in the precision of the block, scipy always in double precision.
        return ndimage.gaussian_filter1d(block.astype(np.float64), sigma, axis, output=block.dtype, **options)

    with lost_device_reported():
        share_memory(cupy)
    return Backend(cupy, gaussian, on_gpu, cupy.asnumpy)


def _own_module(array_module: ArrayModule) -> ArrayModule:
    """Return the array library that this process uses."""
    if array_module != "auto":
        return array_module
    return "cupy" if has_gpu() else "numpy"


@contextmanager
def _without_clara() -> Iterator[None]:
    """Import cucim without its image reader, whose libraries print messages and write cufile.log to this folder."""
    missing = "cucim.clara" not in sys.modules
    if missing:
        sys.modules["cucim.clara"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if missing:
            del sys.modules["cucim.clara"]


def wherever_it_fits(task: Callable[..., R]) -> Callable[..., R]:
    """Decorate a task so that it runs on the CPU if it does not fit into the GPU's memory, even after that is freed.

    Parameters
    ----------
    task
        Takes the keyword `array_module`, or `labelling`, which contains it. It may be called several times.

    Returns
    -------
    Callable
        The task, which raises `LostDeviceError` if this process can no longer use its GPU.
    """

    @wraps(task)
    def run(*arguments: Any, **options: Any) -> R:
        labelling = options.get("labelling")
        if _own_module(labelling.array_module if labelling else options["array_module"]) == "cupy":
            for _ in range(2):
                with out_of_memory_caught():
                    return task(*arguments, **options)
                free_memory()
            warnings.warn("a block that does not fit into the GPU's memory is labelled on the CPU", stacklevel=2)
            on_cpu = {"array_module": "numpy"}
            options |= {"labelling": replace(labelling, **on_cpu)} if labelling else on_cpu
        return task(*arguments, **options)

    return run


@dataclass(frozen=True, slots=True)
class Labelling:
    """How each block is labelled, the same in both passes.

    Attributes
    ----------
    blocks
        The blocks.
    connectivity
        6 (faces), 18 (and edges) or 26 (and corners). In a 2-D image 6 means 4 neighbours, 18 and 26 mean 8.
    classes
        The classes whose components are wanted; None means all but 0, the background.
    n_classes
        Labels must be below it; None accepts any.
    array_module
        See `ArrayModule`.
    sizes
        For each class, index = label: the runs of provisional labels with at most this many voxels are described,
        because their components may have to be removed. If empty, no runs are described.
    """

    blocks: Blocks
    connectivity: int = 26
    classes: tuple[int, ...] | None = None
    n_classes: int | None = None
    array_module: ArrayModule = "numpy"
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.connectivity not in _REACH:
            raise LabelsError(
                "connectivity must be 6, 18 or 26",
                value=self.connectivity,
                remedy="Count the neighbours in 3-D, even for an image",
            )


@dataclass(frozen=True, slots=True)
class Measurements:
    """Measurements of each component, component 1 first.

    Attributes
    ----------
    centroids
        Mean (z, y, x) of the voxel indices, float64, (K, 3).
    lower, upper
        Bounding box in voxels, lower inclusive and upper exclusive, int64, (K, 3).
    touches_border
        Whether a voxel lies on a face of the volume, bool, (K,).
    mean_probability, max_probability
        Probability of the component's class over its voxels (the mean to 1e-9), float64 and float32, (K,); None
        without probabilities.
    """

    centroids: NDArray[np.float64]
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    touches_border: NDArray[np.bool_]
    mean_probability: NDArray[np.float64] | None
    max_probability: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a volume, numbered 1 .. K by their first voxel in C order.

    Attributes
    ----------
    labelling
        How the blocks were labelled.
    offsets
        Number of provisional labels before each block, in C order of the blocks, and the total at the end, int64.
    numbers
        Final number of each provisional label, 0 if it was dropped.
    voxels
        Number of voxels of each component, component 1 first, int64, (K,).
    classes
        Class of each component, in the dtype of the labels, (K,).
    first
        Raster index of the first voxel of each component, int64, (K,).
    measurements
        Measurements; ``None`` unless requested.
    """

    labelling: Labelling
    offsets: NDArray[np.int64]
    numbers: NDArray[Any]
    voxels: NDArray[np.int64]
    classes: NDArray[Any]
    first: NDArray[np.int64]
    measurements: Measurements | None = None

    def __len__(self) -> int:
        return len(self.voxels)

    def per_block(self, values: NDArray[Any]) -> list[tuple[Index, NDArray[Any]]]:
        """Pair each block with its part of `values`, which holds one value for each provisional label."""
        parts = itertools.pairwise(self.offsets.tolist())
        return [
            (index, values[start:stop])
            for index, (start, stop) in zip(self.labelling.blocks.indices, parts, strict=True)
        ]

    def select(self, keep: NDArray[np.bool_]) -> Components:
        """Return only the components where `keep`, (K,), holds, numbered 1 .. K' in the same order."""
        renumber = np.zeros(len(self) + 1, dtype=self.numbers.dtype)
        renumber[1:][keep] = np.arange(1, np.count_nonzero(keep) + 1)
        measured = self.measurements
        if measured is not None:
            measured = Measurements(
                measured.centroids[keep],
                measured.lower[keep],
                measured.upper[keep],
                measured.touches_border[keep],
                None if measured.mean_probability is None else measured.mean_probability[keep],
                None if measured.max_probability is None else measured.max_probability[keep],
            )
        return replace(
            self,
            numbers=renumber[self.numbers],
            voxels=self.voxels[keep],
            classes=self.classes[keep],
            first=self.first[keep],
            measurements=measured,
        )


@dataclass(frozen=True, slots=True)
class Description:
    """The result of pass 1 for a block.

    Attributes
    ----------
    count
        Number of provisional labels.
    columns
        Measurements by name, a row for each provisional label.
    planes
        Low z, high z, low y, high y, low x, high x: compressed uint32 labels; empty without labels.
    runs
        Compressed; see `_small_runs`.
    """

    count: int
    columns: dict[str, NDArray[Any]]
    planes: list[bytes]
    runs: bytes = b""


@dataclass(frozen=True, slots=True)
class Removal:
    """What `remove_small` did, one entry for each class, index = label.

    Attributes
    ----------
    found, removed
        Number of components, and number of removed ones; 0 for a class that is not filtered.
    removed_voxels
        Number of voxels that became background.
    """

    found: tuple[int, ...]
    removed: tuple[int, ...]
    removed_voxels: tuple[int, ...]


def find_components(
    labels: Sliceable,
    *,
    connectivity: int = 26,
    classes: Sequence[int] | None = None,
    n_classes: int | None = None,
    measure: bool = False,
    probabilities: Sliceable | None = None,
    block: Sequence[int] | None = None,
    executor: Executor = SERIAL,
    array_module: ArrayModule = "numpy",
) -> Components:
    """Find the connected components of every class of a label volume (pass 1 and the merge).

    Parameters
    ----------
    labels
        (z, y, x) or (y, x), boolean or integer, 0 is background. A Dask array is computed here and again in
        `write_instances`.
    connectivity
        6, 18 or 26 neighbours; 4, 8 or 8 in a 2-D image.
    classes
        The classes whose components are wanted; all by default.
    n_classes
        Refuse labels from this number on; any label is accepted by default.
    measure
        Whether to fill `Components.measurements`, in the same pass.
    probabilities
        (class, z, y, x) or (class, y, x): measured over each component, in the channel of its class (in channel 0 if
        that is the only one). Read in the same pass; implies `measure`.
    block
        Shape of the block that one task labels; by default one or several whole chunks of `labels`.
    executor, array_module
        What runs the tasks, and the array library that they use.

    Returns
    -------
    Components
        The same for any chunks, block, executor and order of the tasks.

    Raises
    ------
    LabelsError
        If the labels are not integers, are negative or not below `n_classes`, or an argument does not fit the array.
    """
    labelling = Labelling(
        Blocks.of(labels, block), connectivity, None if classes is None else tuple(classes), n_classes, array_module
    )
    _require_integers(labels)
    if probabilities is not None and probabilities.shape[1:] != tuple(labels.shape):
        raise LabelsError(
            f"probabilities must have a class axis and then the shape of the labels, {tuple(labels.shape)}",
            value=tuple(probabilities.shape),
            remedy="Use labels and probabilities of the same prediction, or predict again",
        )
    measure = measure or probabilities is not None
    task = partial(_read_and_describe, labels, labelling, measure=measure, probabilities=probabilities)
    descriptions = executor.map(task, labelling.blocks.indices, name="label")
    return _merged(labelling, descriptions, np.dtype(labels.dtype), measure, probabilities is not None)


@wherever_it_fits
def describe_block(
    labels: NDArray[Any],
    index: Index,
    *,
    labelling: Labelling,
    measure: bool = False,
    probabilities: Sliceable | None = None,
) -> Description:
    """Run pass 1 of one block, given its labels.

    Parameters
    ----------
    labels
        The block, (z, y, x), C-contiguous.
    index, labelling
        Which block this is, and how blocks are labelled.
    measure, probabilities
        See `find_components`.

    Raises
    ------
    LabelsError
        If the labels are negative or not below ``labelling.n_classes``.
    """
    labelled = _label_block(labels, labelling, index)
    if not labelled.count:
        return Description(0, {}, [])
    device = backend(labelling.array_module)
    starts, lengths, run_labels = _runs(labelled, device)
    columns = _columns(starts, lengths, run_labels, labelled.count, labelling.blocks, index, measure)
    columns["class"] = labelled.block.reshape(-1)[columns.pop("local")]
    if probabilities is not None:
        own = _own_probabilities(labelled.block, labelling, index, columns["class"], probabilities)
        columns |= _probability_columns(own, device.to_host(labelled.labels), labelled.count)
    planes = [
        _PACKED.encode(device.to_host(labelled.labels[(slice(None),) * axis + (side,)]).astype(np.uint32))
        for axis in range(3)
        for side in (0, -1)
    ]
    runs = _small_runs(starts, lengths, run_labels, columns, labelling) if labelling.sizes else b""
    return Description(labelled.count, columns, planes, runs)


def _require_integers(labels: Sliceable) -> None:
    if np.dtype(labels.dtype).kind not in "bui":
        raise LabelsError("labels must be integers", value=np.dtype(labels.dtype), remedy="Convert them first")


def write_instances(
    components: Components, labels: Sliceable, output: WritableArray, *, executor: Executor = SERIAL
) -> None:
    """Write the number of each voxel's component, 0 for the background (pass 2).

    Parameters
    ----------
    components
        What `find_components` returned for `labels`, perhaps after `Components.select`.
    labels
        The same array as before.
    output
        An array of integers with the same shape, whose chunks divide the blocks. Every voxel is written.
    executor
        Runs the tasks.

    Raises
    ------
    LabelsError
        If the dtype of the output cannot hold the number of components, or its shape or chunks do not fit.
    """
    blocks = components.labelling.blocks
    blocks.require_whole_chunks(output)
    _require_two_arrays(labels, output)
    if np.dtype(output.dtype).kind not in "ui" or np.iinfo(output.dtype).max < len(components):
        raise LabelsError(
            f"the output's dtype must hold {len(components)} components",
            value=np.dtype(output.dtype),
            remedy=f"Create the output as {instances_dtype(len(components))}",
        )
    task = partial(_write_block, labels=labels, output=output, labelling=components.labelling)
    executor.map(task, components.per_block(components.numbers), name="number")


#: Bytes per voxel of the outputs of `remove_small`: the labels that stay, and the removed ones.
REMOVAL_BYTES = 2


def remove_small(
    labels: Sliceable,
    output: WritableArray,
    sizes: Sequence[int],
    *,
    removed: WritableArray | None = None,
    n_classes: int | None = None,
    connectivity: int = 26,
    labelling: Labelling | None = None,
    described: Mapping[Index, Description] | None = None,
    executor: Executor = SERIAL,
    array_module: ArrayModule = "numpy",
) -> Removal:
    """Copy labels without the components that are too small.

    Parameters
    ----------
    labels
        (z, y, x) or (y, x), 0 is background.
    output
        Another array with the same shape and dtype; its chunks may differ. Every voxel is written.
    sizes
        One entry for each class, index = label: a component stays if it has *more* voxels than that; otherwise it
        becomes background. -1 keeps all components. The entry of the background has no effect.
    removed
        An array like `output` for the removed labels, 0 elsewhere. Every voxel is written.
    n_classes
        Number of classes, the background included; by default the number of sizes.
    connectivity
        See `find_components`; CryoSiam uses 26.
    labelling, described
        From `removal_labelling`, and what `describe_block` returned for some or all of its blocks; the others are
        described here. If given, they replace `n_classes`, `connectivity` and `array_module`, and must have been made
        for `sizes`. To save memory, the descriptions are emptied.
    executor, array_module
        What runs the tasks, and the array library that they use.

    Returns
    -------
    Removal
        What was found and removed in each class.

    Raises
    ------
    LabelsError
        If `sizes` does not have one entry of at least -1 for each class, or the labels hold another class.
    """
    _require_integers(labels)
    for array in (output, removed):
        if array is not None and not np.can_cast(labels.dtype, array.dtype):
            raise LabelsError(
                f"the output must hold labels of {np.dtype(labels.dtype)}",
                value=np.dtype(array.dtype),
                remedy="Create the output with the dtype of the labels",
            )
    _require_two_arrays(labels, output)
    blocks = Blocks.between(labels, output)
    if removed is not None:
        blocks.require_whole_chunks(removed)
    if labelling is None:
        labelling = removal_labelling(
            Blocks.of(labels), sizes, n_classes=n_classes, connectivity=connectivity, array_module=array_module
        )
    elif labelling.sizes != tuple(sizes):
        raise LabelsError(
            "blocks must have been described for the sizes of the removal",
            place="sizes",
            value=f"{list(sizes)} and {list(labelling.sizes)}",
            remedy="Describe them again with the labelling of these sizes",
        )
    found = dict(described or {})
    left = [index for index in labelling.blocks.indices if index not in found]
    task = partial(_read_and_describe, labels, labelling, measure=False, probabilities=None)
    found |= zip(left, executor.map(task, left, name="label") if left else (), strict=True)
    descriptions = [found[index] for index in labelling.blocks.indices]
    components = _merged(labelling, descriptions, np.dtype(labels.dtype), False, False)
    stays = components.voxels > np.asarray(sizes)[components.classes.astype(np.int64)]
    goes = ~np.append(True, stays)[components.numbers]
    runs = _runs_by_block(labelling.blocks, blocks, descriptions, components.per_block(goes))
    write = partial(_write_without, labels=labels, output=output, removed=removed, blocks=blocks)
    executor.map(write, runs, name="remove small")
    n_classes = len(sizes) if labelling.n_classes is None else labelling.n_classes

    def per_class(of: NDArray[np.bool_], weights: NDArray[np.int64] | None = None) -> tuple[int, ...]:
        counted = np.bincount(
            components.classes[of].astype(np.int64), None if weights is None else weights[of], minlength=n_classes
        )
        return tuple(int(count) for count in counted)

    return Removal(per_class(stays | True), per_class(~stays), per_class(~stays, components.voxels))


def removal_labelling(
    blocks: Blocks,
    sizes: Sequence[int],
    *,
    n_classes: int | None = None,
    connectivity: int = 26,
    array_module: ArrayModule = "numpy",
) -> Labelling:
    """Return the labelling for `remove_small`; see there for the parameters and errors."""
    n_classes = len(sizes) if n_classes is None else n_classes
    if len(sizes) != n_classes:
        raise LabelsError(
            f"sizes must have one entry for each of the {n_classes} labels, the background first",
            place="sizes",
            value=f"{len(sizes)} entries, {list(sizes)}",
            remedy="Write -1 to keep all components of a label",
        )
    if any(size < -1 for size in sizes):
        raise LabelsError(
            "a size must be a number of voxels",
            place="sizes",
            value=list(sizes),
            remedy="Write -1 to keep all components of a label",
        )
    # Every component has at least one voxel, so a size of 0 also keeps all.
    classes = tuple(label for label, size in enumerate(sizes) if label and size > 0)
    return Labelling(blocks, connectivity, classes, n_classes, array_module, tuple(sizes))


def largest_component(
    mask: Sliceable,
    *,
    block: Sequence[int] | None = None,
    executor: Executor = SERIAL,
    array_module: ArrayModule = "numpy",
) -> tuple[Components, int]:
    """Return the components of a mask, and the number of the largest one (the first one of several equally large).

    Parameters
    ----------
    mask
        (z, y, x) or (y, x), 0 and 1; voxels are connected with 26 neighbours.
    block, executor, array_module
        See `find_components`.

    Returns
    -------
    tuple of Components and int
        The number is 0 if the mask is empty. `relabel_block` extracts the component in a block.
    """
    components = find_components(mask, block=block, executor=executor, array_module=array_module)
    return components, int(np.argmax(components.voxels)) + 1 if len(components) else 0


def relabel_block(labels: Sliceable, labelling: Labelling, index: Index, values: NDArray[Any]) -> NDArray[Any]:
    """Return block `index` with each voxel's provisional label replaced by its entry in `values`, background by 0.

    Parameters
    ----------
    labels, labelling
        The array given to `find_components`, and `Components.labelling`.
    index, values
        One item of `Components.per_block`.
    """
    blocks = labelling.blocks
    if not values.any():
        return np.zeros(blocks.extent(index), dtype=values.dtype)
    labelled, device = _label_block(blocks.read(labels, index), labelling, index), backend(labelling.array_module)
    return device.to_host(device.xp.asarray(np.append(values.dtype.type(0), values)).take(labelled.labels))


def instances_dtype(count: int) -> np.dtype[Any]:
    """Return the smallest unsigned dtype that holds `count`.

    >>> instances_dtype(255), instances_dtype(256)
    (dtype('uint8'), dtype('uint16'))
    """
    return np.min_scalar_type(count)


def count_labels(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the voxels of each label, up to the highest one.

    >>> count_labels(np.array([0, 3, 3], np.uint8))
    array([1, 0, 0, 2])
    """
    highest = int(labels.max(initial=0))
    if highest > 20:
        return np.bincount(labels.reshape(-1))
    # A few comparisons are many times faster than np.bincount, which converts all voxels to 64-bit integers.
    return np.array([np.count_nonzero(labels == label) for label in range(highest + 1)])


def require_channel(label: int, channels: int) -> None:
    """Check that a label has its own channel of probabilities; a single channel applies to all labels.

    Raises
    ------
    LabelsError
        If the label has no channel.
    """
    if label >= channels > 1:
        raise LabelsError(
            "each label must have its own channel of probabilities",
            value=f"label {label} and {channels} channels",
            remedy="Use labels and probabilities of the same prediction, or predict again",
        )


def _require_two_arrays(labels: Sliceable, output: Sliceable) -> None:
    store = getattr(output, "store_path", None)
    # Compared by name, because two in-memory stores of zarr with the same content compare equal.
    if output is labels or (store is not None and str(store) == str(getattr(labels, "store_path", None))):
        raise LabelsError(
            "the output must not be the array of labels, because that is read twice", remedy="Write to a new array"
        )


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A block on the host; on the device, its voxels of the wanted classes and their labels 1 .. count."""

    block: NDArray[Any]
    wanted: Any = None
    labels: Any = None
    count: int = 0


def _label_block(block: NDArray[Any], labelling: Labelling, index: Index) -> _Labelled:
    """Check and label block `index`."""
    if block.dtype.kind == "b":
        block = block.view(np.uint8)
    if block.size:
        where = f"labels[{', '.join(f'{part.start}:{part.stop}' for part in labelling.blocks.slices(index))}]"
        if block.dtype.kind == "i" and block.min() < 0:
            raise LabelsError(
                "labels must not be negative", place=where, value=block.min(), remedy="Write 0 for the background"
            )
        if labelling.n_classes is not None and block.max() >= labelling.n_classes:
            raise LabelsError(
                f"labels must be below the number of classes, {labelling.n_classes}",
                place=where,
                value=block.max(),
                remedy="Count the background as a class, and give every class its entry",
            )
    wanted = block
    if labelling.classes is not None:
        wanted = np.zeros_like(block)
        for label in labelling.classes:
            np.copyto(wanted, block, where=block == label)
    if not wanted.any():
        return _Labelled(block)
    device = backend(labelling.array_module)
    wanted = device.xp.asarray(wanted)
    return _Labelled(block, wanted, *device.label(wanted, labelling.connectivity))


def _read_and_describe(
    labels: Sliceable, labelling: Labelling, index: Index, *, measure: bool, probabilities: Sliceable | None
) -> Description:
    """Run pass 1 of one block."""
    block = labelling.blocks.read(labels, index)
    return describe_block(block, index, labelling=labelling, measure=measure, probabilities=probabilities)


def _runs(labelled: _Labelled, device: Backend) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return start, length and provisional label of each run of one class along x, in C order.

    All measurements follow from the runs, which are far fewer than the voxels.
    """
    xp, flat = device.xp, labelled.wanted.reshape(-1)
    begins = xp.empty(flat.size, dtype=bool)
    xp.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[:: labelled.wanted.shape[-1]] = True
    starts = xp.flatnonzero(begins)
    lengths = xp.diff(starts, append=flat.size)
    foreground = xp.flatnonzero(flat[starts])
    starts, lengths = starts[foreground], lengths[foreground]
    run_labels = labelled.labels.reshape(-1)[starts].astype(np.int64)
    return device.to_host(starts), device.to_host(lengths), device.to_host(run_labels)


def _small_runs(
    starts: NDArray[Any],
    lengths: NDArray[Any],
    run_labels: NDArray[Any],
    columns: Mapping[str, NDArray[Any]],
    labelling: Labelling,
) -> bytes:
    """Return the runs of labels that may be too small: start, length and provisional label, uint32, compressed.

    A start is stored as its distance, in C order within the block, from the start of the previous run.
    """
    small = columns["voxels"] <= np.asarray(labelling.sizes)[columns["class"].astype(np.int64)]
    kept = small[run_labels - 1]
    starts = np.diff(starts[kept], prepend=0)
    packed: bytes = _PACKED.encode(np.stack([starts, lengths[kept], run_labels[kept]]).astype(np.uint32))
    return packed


def _runs_by_block(
    labelled: Blocks,
    blocks: Blocks,
    descriptions: Sequence[Description],
    goes: Sequence[tuple[Index, NDArray[np.bool_]]],
) -> list[tuple[Index, NDArray[np.uint32], NDArray[np.uint32]]]:
    """Return, for each of `blocks`, the starts and lengths of the runs in it that are to be removed.

    Parameters
    ----------
    labelled
        The blocks that were described.
    blocks
        The blocks that are written.
    descriptions, goes
        For each described block: its description, and its index with whether each provisional label is removed.
    """
    runs: dict[Index, list[NDArray[np.uint32]]] = {index: [np.zeros((2, 0), np.uint32)] for index in blocks.indices}
    edges = blocks.axis_edges
    # Block by block, so that memory holds little more than the result.
    for description, (index, which) in zip(descriptions, goes, strict=True):
        if not which.any():
            continue
        distance, length, label = np.frombuffer(_PACKED.decode(description.runs), np.uint32).reshape(3, -1)
        kept = which[label - 1]
        start, length = np.cumsum(distance, dtype=np.int64)[kept], length[kept]
        region = labelled.slices(index)
        local = np.unravel_index(start, labelled.extent(index))
        z, y, x = (at + part.start for at, part in zip(local, region, strict=True))
        depth, height, width = (
            range(bisect_right(axis, part.start) - 1, bisect_left(axis, part.stop))
            for axis, part in zip(edges, region, strict=True)
        )
        for written in itertools.product(depth, height, width):
            of_z, of_y, of_x = blocks.slices(written)
            low, high = np.maximum(x, of_x.start), np.minimum(x + length, of_x.stop)
            inside = (of_z.start <= z) & (z < of_z.stop) & (of_y.start <= y) & (y < of_y.stop) & (low < high)
            at = (z[inside] - of_z.start, y[inside] - of_y.start, low[inside] - of_x.start)
            starts = np.ravel_multi_index(at, blocks.extent(written))
            runs[written].append(np.stack([starts, (high - low)[inside]]).astype(np.uint32))
    return [(index, *np.concatenate(parts, axis=1)) for index, parts in runs.items()]


def _columns(
    starts: NDArray[Any],
    lengths: NDArray[Any],
    run_labels: NDArray[Any],
    count: int,
    blocks: Blocks,
    index: Index,
    measure: bool,
) -> dict[str, NDArray[Any]]:
    """Return the measurements of each provisional label; row 0 belongs to label 1."""

    def total(weights: NDArray[Any]) -> NDArray[np.int64]:
        # bincount adds in float64: exact, because no sum over a block reaches 2**53.
        return np.bincount(run_labels, weights, minlength=count + 1)[1:].astype(np.int64)

    def extreme(ufunc: np.ufunc, values: NDArray[Any]) -> NDArray[np.int64]:
        result = np.full(count + 1, -1 if ufunc is np.maximum else np.iinfo(np.int64).max)
        ufunc.at(result, run_labels, values)
        return result[1:]

    origin = np.array([part.start for part in blocks.slices(index)])
    local = extreme(np.minimum, starts)
    extent = blocks.extent(index)
    position = np.stack(np.unravel_index(local, extent), axis=1) + origin
    first = (position[:, 0] * blocks.shape[1] + position[:, 1]) * blocks.shape[2] + position[:, 2]
    columns: dict[str, NDArray[Any]] = {"voxels": total(lengths).astype(np.uint32), "first": first, "local": local}
    if measure:
        z, y, x = (part + start for part, start in zip(np.unravel_index(starts, extent), origin, strict=True))
        last_x = x + lengths - 1
        # The x of a run are x .. last_x, of mean (x + last_x) / 2: the product is even.
        columns["coordinate_sums"] = np.stack(
            [total(z * lengths), total(y * lengths), total((x + last_x) * lengths // 2)], axis=1
        )
        columns["lower"] = np.stack([extreme(np.minimum, low) for low in (z, y, x)], axis=1)
        columns["upper"] = np.stack([extreme(np.maximum, high + 1) for high in (z, y, last_x)], axis=1)
    return columns


def _own_probabilities(
    block: NDArray[Any],
    labelling: Labelling,
    index: Index,
    present: NDArray[Any],
    probabilities: Sliceable,
) -> NDArray[np.float32]:
    """Return the probability of each voxel's own class, reading only the channels that are `present`."""
    own = np.zeros(block.shape, dtype=np.float32)
    channels = probabilities.shape[0]
    where = labelling.blocks.slices(index)[3 - labelling.blocks.ndim :]
    for label in np.unique(present).tolist():
        require_channel(label, channels)
        channel = np.asarray(probabilities[(label if channels > 1 else 0, *where)]).reshape(block.shape)
        np.copyto(own, channel, where=block == label)
    return own


def _probability_columns(own: NDArray[np.float32], provisional: NDArray[Any], count: int) -> dict[str, NDArray[Any]]:
    sums = np.zeros(count + 1, dtype=np.int64)
    largest = np.zeros(count + 1, dtype=np.float32)
    np.add.at(sums, provisional, np.rint(own.astype(np.float64) * _PROBABILITY_ONE).astype(np.int64))
    np.maximum.at(largest, provisional, own)
    return {"probability_sum": sums[1:], "probability_max": largest[1:]}


@wherever_it_fits
def _write_block(
    item: tuple[Index, NDArray[Any]], *, labels: Sliceable, output: WritableArray, labelling: Labelling
) -> None:
    """Run pass 2 of one block: `item` is its index and the final number of each of its provisional labels."""
    index, numbers = item
    labelling.blocks.write(output, index, relabel_block(labels, labelling, index, numbers.astype(output.dtype)))


def _write_without(
    item: tuple[Index, NDArray[np.uint32], NDArray[np.uint32]],
    *,
    labels: Sliceable,
    output: WritableArray,
    removed: WritableArray | None,
    blocks: Blocks,
) -> None:
    """Write one block without some voxels; `item` is its index, and the starts and lengths of their runs along x."""
    index, starts, lengths = item
    block = blocks.read(labels, index)
    voxels = np.repeat(starts - np.cumsum(lengths, dtype=np.int64) + lengths, lengths)
    voxels += np.arange(len(voxels))
    gone = block.reshape(-1)[voxels]
    if len(voxels):
        block = block.copy()  # it may be a view of the caller's array
        block.reshape(-1)[voxels] = 0
    blocks.write(output, index, block.astype(output.dtype, copy=False))
    if removed is not None and not len(voxels):
        blocks.write(removed, index, 0)
    elif removed is not None:
        other = np.zeros(block.size, removed.dtype)
        other[voxels] = gone
        blocks.write(removed, index, other.reshape(block.shape))


def _merged(
    labelling: Labelling,
    descriptions: list[Description],
    class_dtype: np.dtype[Any],
    measure: bool,
    with_probabilities: bool,
) -> Components:
    """Merge the blocks: steps 2 to 5 in the module's docstring."""

    offsets = _offsets([description.count for description in descriptions])

    def concatenated(name: str, dtype: Any, shape: tuple[int, ...] = ()) -> NDArray[Any]:
        column = np.empty((offsets[-1], *shape), dtype=dtype)
        # Block by block, so that memory holds little more than one copy of the column.
        for description, start, stop in zip(descriptions, offsets, offsets[1:], strict=False):
            if description.count:
                column[start:stop] = description.columns.pop(name)
        return column

    classes = concatenated("class", class_dtype)
    first = concatenated("first", np.int64)
    nothing = np.zeros((0, 2), dtype=np.int64)
    others, roots = _roots(np.concatenate([nothing, *_touching(labelling, descriptions, offsets, classes)]), first)
    for description in descriptions:
        description.planes.clear()
    # These tables take most of the caller's memory, so each is released as soon as possible.
    is_root = np.ones(len(first), dtype=bool)
    is_root[others] = False
    in_order = np.flatnonzero(is_root)
    first = first[in_order]
    order = np.argsort(first)
    first = first[order]
    in_order = in_order[order]
    del order
    numbers = np.zeros(len(is_root), dtype=instances_dtype(len(in_order)))
    numbers[in_order] = np.arange(1, len(in_order) + 1, dtype=numbers.dtype)
    numbers[others] = numbers[roots]

    def merged(name: str) -> NDArray[Any]:
        merge, dtype, shape = _COLUMNS[name]
        column = concatenated(name, dtype, shape)
        merge.at(column, roots, column[others])
        return column[in_order]

    voxels = merged("voxels")
    measurements = None
    if measure:
        lower, upper = merged("lower"), merged("upper")
        at_border = (lower == 0) | (upper == np.array(labelling.blocks.shape))
        measurements = Measurements(
            centroids=merged("coordinate_sums") / voxels[:, None],
            lower=lower,
            upper=upper,
            # A 2-D image has no border in z.
            touches_border=at_border[:, 3 - labelling.blocks.ndim :].any(axis=1),
            mean_probability=merged("probability_sum") / voxels / _PROBABILITY_ONE if with_probabilities else None,
            max_probability=merged("probability_max") if with_probabilities else None,
        )
    return Components(labelling, offsets, numbers, voxels, classes[in_order], first, measurements)


def _offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    """Return how many provisional labels come before each block, and their total.

    >>> _offsets([3, 0, 2])
    array([0, 3, 3, 5])
    """
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


# The part of a neighbour's plane that lies in the margin, and its place there, by the neighbour's offset along an axis.
_FROM = {-1: slice(-1, None), 0: slice(None), 1: slice(0, 1)}
_TO = {-1: slice(0, 1), 0: slice(1, -1), 1: slice(-1, None)}


def _touching(
    labelling: Labelling, descriptions: list[Description], offsets: NDArray[np.int64], classes: NDArray[Any]
) -> Iterator[NDArray[np.int64]]:
    """Yield, for each plane between two blocks, the pairs of provisional labels that touch across it, (m, 2).

    Labels are numbered through the whole volume from 0. The first label of a pair is before the border. The second is
    behind it, in the block that faces the first or in one beside that along a later axis; pairs along an earlier axis
    are found at the borders of that axis.
    """
    blocks = labelling.blocks
    indices = blocks.indices
    position = {index: place for place, index in enumerate(indices)}
    steps = [
        step for step in itertools.product((-1, 0, 1), repeat=2) if sum(map(abs, step)) < _REACH[labelling.connectivity]
    ]

    @lru_cache(maxsize=4 * max(blocks.counts))
    def plane(index: Index, axis: int, high: bool) -> NDArray[np.uint32]:
        unpacked = _PACKED.decode(descriptions[position[index]].planes[2 * axis + high])
        return np.frombuffer(unpacked, dtype=np.uint32).reshape(np.delete(blocks.extent(index), axis))

    for axis, index in itertools.product(range(3), indices):
        beyond = [i + (a == axis) for a, i in enumerate(index)]
        if beyond[axis] == blocks.counts[axis] or not descriptions[position[index]].count:
            continue
        near = plane(index, axis, True)
        # The plane behind the border with a margin of one voxel; each label is tagged with its block.
        far = np.zeros((near.shape[0] + 2, near.shape[1] + 2), dtype=np.int64)
        far_offsets = np.zeros(9, dtype=np.int64)
        first_axis, second_axis = (a for a in range(3) if a != axis)
        for tag, (a, b) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            neighbour = list(beyond)
            neighbour[first_axis] += a
            neighbour[second_axis] += b
            place = position.get((neighbour[0], neighbour[1], neighbour[2]))
            if (
                (a and first_axis < axis)
                or (b and second_axis < axis)
                or place is None
                or not descriptions[place].count
            ):
                continue
            part = plane(indices[place], axis, False)[_FROM[a], _FROM[b]].astype(np.int64)
            far[_TO[a], _TO[b]] = np.where(part, part | tag << 29, 0)
            far_offsets[tag] = offsets[place]
        where = np.flatnonzero(near)
        rows, columns = np.divmod(where, near.shape[1])
        at = (rows + 1) * far.shape[1] + columns + 1
        ahead = far.reshape(-1)[at + np.array([[a * far.shape[1] + b] for a, b in steps])]
        # One integer holds a pair, label before (29 bits), tag (4), label behind (29), and sorts fast.
        keys = np.unique((near.reshape(-1)[where].astype(np.int64) << 33 | ahead)[ahead > 0])
        before = offsets[position[index]] + (keys >> 33) - 1
        behind = far_offsets[keys >> 29 & 15] + (keys & (1 << 29) - 1) - 1
        same_class = classes[before] == classes[behind]
        yield np.stack([before[same_class], behind[same_class]], axis=1)


def _roots(pairs: NDArray[np.int64], first: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the provisional labels that are merged into another one, and the root that each is merged into.

    The root of connected labels is the one with the first voxel in C order.

    >>> _roots(np.array([[0, 2], [2, 5]]), first=np.array([7, 1, 3, 9, 8, 4]))
    (array([0, 5]), array([2, 2]))
    """
    if not len(pairs):
        return pairs[:, 0], pairs[:, 0]
    nodes, ends = np.unique(pairs, return_inverse=True)
    before, behind = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), dtype=bool), (before, behind)), shape=(len(nodes), len(nodes)))
    groups, group = connected_components(graph, directed=False)
    earliest = np.full(groups, -1)
    in_order = np.argsort(-first[nodes])
    earliest[group[in_order]] = nodes[in_order]  # the last assignment wins, which is that of the first voxel
    roots = earliest[group]
    merged = roots != nodes
    return nodes[merged], roots[merged]
