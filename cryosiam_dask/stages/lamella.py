"""Turn lamella probabilities into a clean lamella mask, on chunked arrays.

1. Smooth the probability with a Gaussian, one axis after the other, and compare it with the threshold, block by block.
   Every block is read with the halo of the Gaussian, so that each voxel is a sum of the same numbers in the same order
   as in the whole array.
2. Find the largest 26-connected component (`cryosiam_dask.stages.components`).
3. Reduce the component to the corners of its convex hull in each z-slice; all corners are at the ends of its rows.
4. Fill, block by block, the hull of each slice, or the hull of the whole component.

Hulls are those of scikit-image: a voxel contributes the centres of its faces, half a voxel away from its own centre,
and belongs to a hull if its centre lies inside or on the surface. So all coordinates are halves of integers. Doubled,
they and the half-spaces are integers, and whether a centre lies on the surface is decided without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from cryosiam_dask.core.arrays import Sliceable, WritableArray
from cryosiam_dask.core.blocks import Blocks, Index
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.errors import LabelsError
from cryosiam_dask.stages.components import (
    ArrayModule,
    Labelling,
    backend,
    largest_component,
    relabel_block,
    wherever_it_fits,
)

SIGMA = (10.0, 5.0, 5.0)
"""Standard deviation of the Gaussian in voxels, (z, y, x)."""

TRUNCATE = 4.0
"""Radius of the Gaussian in standard deviations."""

_SMOOTHED_VOXELS = 1 << 23  # voxels of a block to smooth; at this size, the halo is half of the work

Corners: TypeAlias = NDArray[np.int64]  # (n, axes): voxels whose convex hull is wanted


@dataclass(frozen=True, slots=True)
class Thickness:
    """Thickness of a lamella in voxels, over the columns (y, x) that contain any of it.

    It is measured along z, not perpendicular to the faces: in a lamella that is tilted by α, it is 1 / cos α times
    the distance of the faces.

    Attributes
    ----------
    mean, lowest, highest
        Number of voxels of the lamella in a column.
    """

    mean: float
    lowest: int
    highest: int

    @classmethod
    def of(cls, columns: Sequence[int] | NDArray[np.int64]) -> Thickness | None:
        """Compute the thickness from the numbers of columns with 0, 1, 2 … voxels; return ``None`` without a lamella.

        >>> Thickness.of([7, 0, 1, 3])
        Thickness(mean=2.75, lowest=2, highest=3)
        """
        counts = np.asarray(columns, np.int64).copy()
        counts[0] = 0
        held = np.flatnonzero(counts)
        if not held.size:
            return None
        return cls(float(held @ counts[held] / counts.sum()), int(held[0]), int(held[-1]))

    def described(self, voxel_size_angstrom: Sequence[float | None] | None) -> dict[str, float | str]:
        """Convert to nm; if the voxel size along z (the first of three) is unknown, the unit is voxels.

        >>> Thickness(50, 7, 57).described((14, 14, 14))
        {'mean': 70.0, 'lowest': 9.8, 'highest': 79.8, 'unit': 'nm'}
        """
        edge = voxel_size_angstrom[0] if voxel_size_angstrom else None
        numbers = (voxels * edge / 10 if edge else voxels for voxels in (self.mean, self.lowest, self.highest))
        return {**dict(zip(("mean", "lowest", "highest"), numbers, strict=True)), "unit": "nm" if edge else "voxels"}


def thickness_words(described: Mapping[str, float | str]) -> str:
    """Write a thickness from `Thickness.described` in words.

    >>> thickness_words(Thickness(50, 7, 57).described(None))
    'mean thickness 50 voxels (7 to 57)'
    """
    mean, lowest, highest = (f"{described[key]:.3g}" for key in ("mean", "lowest", "highest"))
    return f"mean thickness {mean} {described['unit']} ({lowest} to {highest})"


def stored_thickness(attributes: Mapping[str, Any]) -> dict[str, float | str]:
    """Return the thickness in the attributes of a prediction, like `Thickness.described`; empty if there is none."""
    stored, size = attributes.get("thickness_voxels"), attributes.get("voxel_size_angstrom")
    if not isinstance(stored, list | tuple) or len(stored) != 3 or not all(isinstance(n, int | float) for n in stored):
        return {}
    known = isinstance(size, list | tuple) and len(size) == 3 and isinstance(size[0], int | float)
    return Thickness(stored[0], int(stored[1]), int(stored[2])).described(size if known else None)


def count_columns(labels: Sliceable, *, executor: Executor = SERIAL) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the voxels of each label, and the columns along z by their number of labelled voxels.

    Parameters
    ----------
    labels
        (z, y, x), integers from 0 to 255, 0 is background. They are read once, a block at a time.
    executor
        Runs one task for each column of blocks.

    Returns
    -------
    voxels : (256,)
        Number of voxels of each label.
    columns : (z + 1,)
        Number of columns (y, x) with 0, 1, 2 … voxels that are not background; see `Thickness.of`.
    """
    blocks = Blocks.of(labels)
    where = [(y, x) for z, y, x in blocks.indices if z == 0]
    voxels, columns = np.zeros(256, np.int64), np.zeros(blocks.shape[0] + 1, np.int64)
    for of_labels, of_columns in executor.map(partial(_count_in_columns, labels, blocks), where, name="count"):
        voxels += of_labels
        columns += of_columns
    return voxels, columns


def _count_in_columns(
    labels: Sliceable, blocks: Blocks, column: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    _, y, x = blocks.extent((0, *column))
    voxels, held = np.zeros(256, np.int64), np.zeros((y, x), np.int64)
    for z in range(blocks.counts[0]):
        block = blocks.read(labels, (z, *column))
        for label in range(int(block.max()) + 1):
            voxels[label] += np.count_nonzero(block == label)
        held += np.count_nonzero(block, axis=0)
    return voxels, np.bincount(held.reshape(-1), minlength=blocks.shape[0] + 1)


@dataclass(frozen=True, slots=True)
class HalfSpaces:
    """A convex body in doubled voxel coordinates: exactly the points p with ``normals @ p <= offsets``.

    Attributes
    ----------
    normals
        (facets, axes), int64, pointing outwards.
    offsets
        (facets,), int64.
    """

    normals: NDArray[np.int64]
    offsets: NDArray[np.int64]


#: Bytes per voxel that `postprocess_lamella` adds to the work store: the thresholded probability, and its output.
WORK_BYTES = 2


@dataclass(frozen=True, slots=True)
class LamellaReport:
    """Result of the post-processing.

    Attributes
    ----------
    found
        False if no smoothed probability exceeds the threshold; the labels were then copied unchanged.
    component_voxels
        Number of voxels of the largest component of the thresholded, smoothed probability.
    z_slices
        Range of slices that the component touches, its end exclusive.
    voxels
        Number of voxels of the output that are not 0.
    """

    found: bool
    component_voxels: int
    z_slices: tuple[int, int]
    voxels: int


def postprocess_lamella(
    probabilities: Sliceable,
    labels: Sliceable,
    output: WritableArray,
    *,
    threshold: float,
    hull: Literal["slices", "volume"],
    work: Any,
    executor: Executor = SERIAL,
    array_module: ArrayModule = "numpy",
) -> LamellaReport:
    """Replace thresholded labels by the convex hull of the lamella.

    Parameters
    ----------
    probabilities
        (z, y, x), or (class, z, y, x) whose class 0 is used; float32, already multiplied by the mask if there is one.
    labels
        (z, y, x), the thresholded labels.
    output
        (z, y, x) with the dtype of the labels, not the same array; its chunks may differ. Every voxel is written.
    threshold
        Smoothed probabilities above it are lamella.
    hull
        "slices": the 2-D hull of the component in each z-slice that it touches; other slices keep their labels.
        "volume": only the 3-D hull of the component.
    work
        A zarr group for the array ``lamella_above_threshold``, one byte per voxel, which is not removed here.
    executor, array_module
        What runs the tasks, and the array library that they use.

    Returns
    -------
    LamellaReport

    Raises
    ------
    LabelsError
        If an array is not 3-D or the shapes differ.
    """
    shape = tuple(labels.shape)
    if len(shape) != 3 or tuple(probabilities.shape[-3:]) != shape or len(probabilities.shape) not in (3, 4):
        raise LabelsError(
            "lamella post-processing needs (z, y, x) labels, and probabilities of the same shape for each class",
            value=f"labels {shape}, probabilities {tuple(probabilities.shape)}",
            remedy="Set parameters.network.postprocessing to False for 2-D images",
        )
    filled = Blocks.between(labels, output)
    smoothed = Blocks.of(labels, voxels=_SMOOTHED_VOXELS)
    above = work.create_array(
        "lamella_above_threshold",
        shape=shape,
        chunks=tuple(max(1, min(edge, size)) for edge, size in zip(smoothed.block, shape, strict=True)),
        dtype="uint8",
        overwrite=True,
    )
    task = partial(
        _threshold_block,
        probabilities=probabilities,
        output=above,
        blocks=smoothed,
        threshold=np.float32(threshold),
        array_module=array_module,
    )
    executor.map(task, smoothed.indices, name="smooth")

    components, number = largest_component(above, block=smoothed.block, executor=executor, array_module=array_module)
    copied = partial(_fill_block, labels=labels, output=output, blocks=filled)
    if not number:
        voxels = executor.map(copied, [(index, None) for index in filled.indices], name="copy labels")
        return LamellaReport(found=False, component_voxels=0, z_slices=(0, 0), voxels=sum(voxels))

    layers: list[list[tuple[Index, NDArray[np.bool_]]]] = [[] for _ in range(smoothed.counts[0])]
    for index, inside in components.per_block(components.numbers == number):
        layers[index[0]].append((index, inside))
    corners = executor.map(
        partial(_layer_corners, above=above, labelling=components.labelling), layers, name="find hulls"
    )
    slices = [slice_corners for layer in corners for slice_corners in layer]
    touched = [z for z, slice_corners in enumerate(slices) if len(slice_corners)]

    items: list[tuple[Index, list[Corners] | HalfSpaces | None]]
    if hull == "slices":
        items = [(index, slices[filled.slices(index)[0]]) for index in filled.indices]
    else:
        body = half_spaces(np.concatenate([np.insert(slices[z], 0, z, axis=1) for z in touched]))
        items = [(index, body) for index in filled.indices]
    voxels = executor.map(copied, items, name="fill hulls")
    return LamellaReport(
        found=True,
        component_voxels=int(components.voxels[number - 1]),
        z_slices=(touched[0], touched[-1] + 1),
        voxels=sum(voxels),
    )


# ---- the tasks ----


@wherever_it_fits
def _threshold_block(
    index: Index,
    *,
    probabilities: Sliceable,
    output: WritableArray,
    blocks: Blocks,
    threshold: np.float32,
    array_module: ArrayModule,
) -> None:
    """Smooth one block and write 1 where it exceeds the threshold."""
    device = backend(array_module)
    core = blocks.slices(index)
    window = []
    for part, size, sigma in zip(core, blocks.shape, SIGMA, strict=True):
        halo = int(TRUNCATE * sigma + 0.5)
        # The filter itself pads the volume with zeros.
        window.append(slice(max(0, part.start - halo), min(size, part.stop + halo)))
    channel = (0,) * (len(probabilities.shape) - 3)
    smooth = device.xp.asarray(np.asarray(probabilities[(*channel, *window)], dtype=np.float32))
    if not smooth.any():
        blocks.write(output, index, 0)
        return
    for axis, (part, seen, sigma) in enumerate(zip(core, window, SIGMA, strict=True)):
        smooth = device.gaussian(smooth, sigma, axis, mode="constant", truncate=TRUNCATE)
        kept = slice(part.start - seen.start, part.stop - seen.start)
        smooth = smooth[(slice(None),) * axis + (kept,)]
    blocks.write(output, index, device.to_host((smooth > threshold).astype(np.uint8)))


@wherever_it_fits
def _layer_corners(
    layer: Sequence[tuple[Index, NDArray[np.bool_]]], *, above: Sliceable, labelling: Labelling
) -> list[Corners]:
    """Return the corners, (y, x), of the component's hull in each z-slice of one layer of blocks.

    `layer` holds, for each block, its index and which of its provisional labels belong to the component.
    """
    blocks = labelling.blocks
    depth, height = blocks.extent(layer[0][0])[0], blocks.shape[1]
    left = np.full((depth, height), np.iinfo(np.int32).max, dtype=np.int32)
    right = np.full((depth, height), -1, dtype=np.int32)
    for index, inside in layer:
        if not inside.any():
            continue
        component = relabel_block(above, labelling, index, inside)
        _, rows, columns = blocks.slices(index)
        some = component.any(axis=2)
        first = np.where(some, columns.start + component.argmax(axis=2), np.iinfo(np.int32).max)
        last = np.where(some, columns.stop - 1 - component[:, :, ::-1].argmax(axis=2), -1)
        left[:, rows] = np.minimum(left[:, rows], first)
        right[:, rows] = np.maximum(right[:, rows], last)
    return [_corners(left[z], right[z]) for z in range(depth)]


def _corners(left: NDArray[np.int32], right: NDArray[np.int32]) -> Corners:
    """Return the voxels, (y, x), at the corners of the hull of the rows [left, right]; a right of -1 means none."""
    rows = np.flatnonzero(right >= 0)
    if not len(rows):
        return np.zeros((0, 2), dtype=np.int64)
    ends = np.concatenate([np.stack([rows, left[rows]], axis=1), np.stack([rows, right[rows]], axis=1)])
    ends = np.unique(ends, axis=0)
    # The centres of the faces give even one voxel a volume, and every corner stays a corner.
    hull = ConvexHull(_face_centres(ends))
    return np.unique(ends[hull.vertices // 4], axis=0)


def _fill_block(
    item: tuple[Index, list[Corners] | HalfSpaces | None],
    *,
    labels: Sliceable,
    output: WritableArray,
    blocks: Blocks,
) -> int:
    """Write one block and return how many of its voxels are not 0.

    `item` is its index and what to fill: the hull corners of each of its slices (slices without corners keep their
    labels), the body that replaces the labels, or None.
    """
    index, hull = item
    z, y, x = blocks.slices(index)
    rows = np.arange(y.start, y.stop)
    if isinstance(hull, HalfSpaces):
        lines = np.stack(np.meshgrid(np.arange(z.start, z.stop), rows, indexing="ij"), axis=-1).reshape(-1, 2)
        block = _inside(_cutting(hull, (z, y, x)), lines, x).reshape(blocks.extent(index)).astype(output.dtype)
    else:
        block = blocks.read(labels, index).copy()
        for z_slice, corners in enumerate(hull or []):
            if len(corners):
                block[z_slice] = _inside(half_spaces(corners), rows[:, None], x)
    blocks.write(output, index, block)
    return int(np.count_nonzero(block))


# ---- hulls ----


def _face_centres(voxels: NDArray[Any]) -> NDArray[np.int64]:
    """Return the centres of the faces of each voxel in doubled coordinates, 2 * axes points per voxel, in order.

    >>> _face_centres(np.array([[3, 5]])).tolist()
    [[5, 10], [7, 10], [6, 9], [6, 11]]
    """
    steps = np.repeat(np.eye(voxels.shape[1], dtype=np.int64), 2, axis=0)
    steps[::2] *= -1
    return (2 * voxels.astype(np.int64)[:, None] + steps).reshape(-1, voxels.shape[1])


def half_spaces(voxels: Corners) -> HalfSpaces:
    """Return the convex hull of the face centres of voxels.

    Parameters
    ----------
    voxels
        (n, axes), int64, 2-D or 3-D; one voxel is enough.

    Examples
    --------
    >>> body = half_spaces(np.array([[0, 0]]))
    >>> sorted(zip(body.normals.tolist(), body.offsets.tolist()))
    [([-1, -1], 1), ([-1, 1], 1), ([1, -1], 1), ([1, 1], 1)]
    """
    points = _face_centres(voxels)
    hull = ConvexHull(points)
    facets = points[hull.simplices]  # (facets, axes corners, axes)
    if voxels.shape[1] == 2:
        along = facets[:, 1] - facets[:, 0]
        normals = np.stack([along[:, 1], -along[:, 0]], axis=1)
    else:
        normals = np.cross(facets[:, 1] - facets[:, 0], facets[:, 2] - facets[:, 0])
    # Qhull's normals tell which side is outside, but they are rounded.
    normals[(normals * hull.equations[:, :-1]).sum(axis=1) < 0] *= -1
    offsets = (normals * facets[:, 0]).sum(axis=1)
    return HalfSpaces(normals, offsets)


def _cutting(body: HalfSpaces, region: tuple[slice, ...]) -> HalfSpaces:
    """Return the half-spaces that cut a region or, if one excludes the whole region, only that one."""
    first, last = (2 * np.array(ends) for ends in zip(*((part.start, part.stop - 1) for part in region), strict=True))
    nearest = (body.normals * np.where(body.normals > 0, first, last)).sum(axis=1)
    farthest = (body.normals * np.where(body.normals > 0, last, first)).sum(axis=1)
    kept = farthest > body.offsets
    if (nearest > body.offsets).any():
        kept = np.arange(len(nearest)) == np.argmax(nearest - body.offsets)
    return HalfSpaces(body.normals[kept], body.offsets[kept])


def _inside(body: HalfSpaces, lines: NDArray[np.int64], x: slice) -> NDArray[np.bool_]:
    """Return which voxels of each line, in the range `x`, are inside `body`: (lines, x).

    `lines` holds the leading coordinates, (y,) or (z, y). The part of a line inside the body is one interval, so each
    facet is evaluated once per line, not once per voxel.
    """
    low = np.full(len(lines), x.start)
    high = np.full(len(lines), x.stop - 1)
    for normal, offset in zip(body.normals, body.offsets, strict=True):
        if (low > high).all():
            break
        room = offset - 2 * (lines @ normal[:-1])  # 2 * normal[-1] * x must not exceed it
        slope = 2 * int(normal[-1])
        if slope > 0:
            np.minimum(high, room // slope, out=high)
        elif slope < 0:
            np.maximum(low, -(room // -slope), out=low)
        else:
            high[room < 0] = -1
    across = np.arange(x.start, x.stop)
    return (across >= low[:, None]) & (across <= high[:, None])
