"""Write a tomogram with its labels as an OME-Zarr image (NGFF 0.5 on zarr format 3).

One group holds both, side by side::

    <name>.ome.zarr/
        0, 1, 2 …                         the tomogram; each level has half as many voxels along each axis
        labels/segmentation/0, 1, 2 …     the labels, in the same levels

1. Level 0 is a copy in which the minimum replaces NaN and infinity. A voxel of the next level covers 2 × 2 × 2 voxels
   (fewer at the far edges). In the tomogram it is their mean. In the labels it is the most frequent label or, among
   equally frequent ones, the lowest that is not background, so that thin structures do not vanish. Labels are never
   interpolated.
2. A voxel's position is that of its centre. The centres of level n are shifted inwards by (2ⁿ − 1) / 2 voxels of level
   0; each level has that translation, in Å along z, y and x.
3. The attribute ``omero`` tells viewers to show the central 99 % of a sample's intensities from black to white.
   Otherwise they would show 0 to 1, or the full range.
4. Arrays larger than one shard are sharded, with 2 × 2 × 2 chunks of 128 voxels per file, so that a volume of 4
   gigavoxels has hundreds of files instead of thousands. Sharding needs zarr format 3. Every task writes whole shards.

No whole volume is ever in memory, and the folder appears complete or not at all.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from cryosiam_dask.core.arrays import Region, Sliceable, regions_of
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.core.local_store import AnyDiskStore
from cryosiam_dask.errors import LabelsError, OutputError, writing
from cryosiam_dask.files.atomic import replacing_folder
from cryosiam_dask.model.classes import COLOURS
from cryosiam_dask.stages.intensities import Sample, intensities, sample_array

NGFF = "0.5"
CHUNK, SHARD = 128, 256  # voxels along each axis
COARSEST = 128  # levels are added until the longest axis has no more voxels than this
SEGMENTATION = "segmentation"  # name of the label image
OWN = "cryosiam_dask"  # attribute of the group with our own metadata
_DEPTH = 64  # sections that are computed at once
_COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")

Reduction: TypeAlias = Literal["mean", "mode"]


def most_bytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return an upper bound for the size of a tomogram's image with its labels, in bytes.

    Each level has at most a quarter of the voxels of the previous one.
    """
    return math.ceil(4 / 3 * math.prod(shape) * (1 + dtype.itemsize))


def write_ome_zarr(
    path: str | Path,
    tomogram: Sliceable,
    labels: Sliceable | None = None,
    *,
    class_names: Sequence[str] = (),
    voxel_size_angstrom: Sequence[float | None] | None = None,
    position_angstrom: Sequence[float] | None = None,
    minimum: float = 0.0,
    attributes: Mapping[str, Any] | None = None,
    executor: Executor = SERIAL,
) -> None:
    """Write a tomogram and, if given, its labels as an OME-Zarr image.

    Parameters
    ----------
    path
        For example ``<stem>.ome.zarr``, in an existing folder; replaces an earlier image when it is complete.
    tomogram : (z, y, x) or (y, x)
        Any real dtype.
    labels : (z, y, x) or (y, x), uint8
        Labels with the tomogram's shape.
    class_names
        Names of the labels from 1 on; named labels also get colours.
    voxel_size_angstrom
        Per axis; an unknown size is replaced by the mean of the others. If all are unknown, the image has no unit and
        voxels of size 1.
    position_angstrom
        Position of the centre of the first voxel, per axis.
    minimum
        Replaces voxels that are not finite.
    attributes
        JSON values for the attribute ``cryosiam_dask`` of the group.
    executor
        Runs one task for each shard. A task uses about 300 MB.

    Raises
    ------
    LabelsError
        If the labels have another shape than the tomogram.
    OutputError
        If there are no voxels, or the folder cannot be written; an earlier one is then unchanged.
    """
    path = Path(path)
    shape = tuple(map(int, tomogram.shape))
    if labels is not None and tuple(labels.shape) != shape:
        raise LabelsError(
            f"the labels must have the shape of their tomogram, {shape}",
            place=path,
            value=tuple(labels.shape),
            remedy="Give the tomogram that they were made from",
        )
    if 0 in shape:
        raise OutputError("an image must hold voxels", place=path, value=f"shape {shape}", remedy="Check the tomogram")
    scale, unit = _scale(voxel_size_angstrom, len(shape))
    position = np.array(position_angstrom if position_angstrom is not None and unit else (0.0,) * len(shape))
    levels = _levels(shape)
    describe = partial(_multiscale, levels=levels, scale=scale, position=position, unit=unit)
    remedy = "Free space on the disk, check the permissions, or choose another folder"
    with writing("the output must be writable", place=path, remedy=remedy), replacing_folder(path) as part:
        image = zarr.create_group(AnyDiskStore(part), zarr_format=3)
        dtype = np.dtype(np.uint8) if tomogram.dtype == bool else np.dtype(tomogram.dtype).newbyteorder("=")
        _fill(image, tomogram, levels, dtype, "mean", minimum, executor)
        multiscale = describe(name=path.name.removesuffix(".ome.zarr"), reduction="mean")
        own = json.loads(json.dumps(dict(attributes or {}), default=_plain))
        if labels is not None:
            folder = image.create_group("labels")
            segmentation = folder.create_group(SEGMENTATION)
            _fill(segmentation, labels, levels, np.dtype(np.uint8), "mode", 0, executor)
            described = describe(name=SEGMENTATION, reduction="mode")
            segmentation.attrs["ome"] = {
                "version": NGFF,
                "multiscales": [described],
                "image-label": _image_label(class_names),
            }
            folder.attrs["ome"] = {"version": NGFF, "labels": [SEGMENTATION]}
        ome: dict[str, Any] = {
            "version": NGFF,
            "multiscales": [multiscale],
            "omero": _omero(tomogram, multiscale["name"]),
        }
        image.attrs.update({"ome": ome, OWN: own})


def read_own_attributes(path: Path) -> dict[str, Any]:
    """Read the attribute ``cryosiam_dask`` of an OME-Zarr image; empty if there is none or it cannot be read."""
    try:
        own = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"][OWN]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return own if isinstance(own, dict) else {}


# ------------------------------------------------------------------------------------------------------------- metadata


def _levels(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of all levels; half of an odd number of voxels is rounded up."""
    levels = [shape]
    while max(levels[-1]) > COARSEST:
        levels.append(tuple(-(-size // 2) for size in levels[-1]))
    return levels


def _scale(voxel_size: Sequence[float | None] | None, ndim: int) -> tuple[NDArray[np.float64], str | None]:
    known = [size for size in voxel_size or () if size]
    if not known:
        return np.ones(ndim), None
    return np.array([size or sum(known) / len(known) for size in voxel_size or ()], np.float64), "angstrom"


def _multiscale(
    *,
    name: str,
    reduction: Reduction,
    levels: Sequence[tuple[int, ...]],
    scale: NDArray[np.float64],
    position: NDArray[np.float64],
    unit: str | None,
) -> dict[str, Any]:
    axes = [{"name": axis, "type": "space", **({"unit": unit} if unit else {})} for axis in "zyx"[-len(scale) :]]
    datasets = []
    for level in range(len(levels)):
        # An axis of one voxel is not halved.
        factor = np.array([2**level if size > 1 else 1 for size in levels[0]])
        transforms = [
            {"type": "scale", "scale": (scale * factor).tolist()},
            {"type": "translation", "translation": (position + scale * (factor - 1) / 2).tolist()},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    return {"name": name, "type": reduction, "axes": axes, "datasets": datasets}


def _omero(tomogram: Sliceable, name: str) -> dict[str, Any]:
    """Return the attribute ``omero``, which tells viewers how to show the intensities: one channel, in grey."""
    low, high, lowest, highest = contrast_limits(sample_array(tomogram))
    window = {"min": lowest, "max": highest, "start": low, "end": high}
    channel = {"label": name, "color": "FFFFFF", "active": True, "inverted": False, "window": window}
    return {"channels": [channel], "rdefs": {"model": "greyscale"}}


def contrast_limits(sample: Sample) -> tuple[float, float, float, float]:
    """Return the intensities to show as black and white, and the lowest and highest ones of a sample.

    Black and white differ, even if all voxels are equal or none is finite.

    Parameters
    ----------
    sample
        From `cryosiam_dask.stages.intensities.sample_array` or `sample_file`.
    """
    seen = intensities(sample, -np.inf, np.inf)
    low, high = seen.central or (0.0, 1.0)
    lowest, highest = (low, high) if seen.lowest is None or seen.highest is None else (seen.lowest, seen.highest)
    if low >= high:  # most voxels are equal
        low, high = lowest, highest
    if low >= high:  # all are
        low, high = low - 0.5, low + 0.5
    return low, high, min(lowest, low), max(highest, high)


def _image_label(class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "colors": [
            {"label-value": label, "rgba": [*COLOURS[label - 1], 255]} for label in range(1, len(class_names) + 1)
        ],
        "properties": [{"label-value": label, "class": name} for label, name in enumerate(class_names, 1)],
        "source": {"image": "../../"},
    }


def _plain(value: Any) -> Any:
    """Convert NumPy arrays and numbers, which JSON does not support."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


# --------------------------------------------------------------------------------------------------------------- levels


@dataclass(frozen=True, slots=True)
class _Level:
    """One level: a voxel of `target` covers up to `factor` voxels of `source` along each axis."""

    source: Any
    target: zarr.Array[Any]
    factor: int
    reduction: Reduction
    minimum: float


def _fill(
    group: zarr.Group,
    source: Sliceable,
    levels: Sequence[tuple[int, ...]],
    dtype: np.dtype[Any],
    reduction: Reduction,
    minimum: float,
    executor: Executor,
) -> None:
    before: Any = source
    for n, shape in enumerate(levels):
        chunks = tuple(min(CHUNK, size) for size in shape)
        shards = tuple(SHARD if size > CHUNK else size for size in shape)
        target = group.create_array(
            str(n),
            shape=shape,
            chunks=chunks,
            shards=shards if max(shape) > SHARD else None,
            dtype=dtype,
            fill_value=0,
            compressors=_COMPRESSOR,
            dimension_names=list("zyx"[-len(shape) :]),
        )
        level = _Level(before, target, 2 if n else 1, reduction, minimum)
        regions = regions_of(shape, target.shards or target.chunks)
        executor.map(partial(_make, level), list(regions), name="pyramid")
        before = target


def _make(level: _Level, region: Region) -> None:
    """Compute a region of a level, some sections at a time, and write it in one go."""
    result = np.empty([part.stop - part.start for part in region], level.target.dtype)
    for first in range(0, result.shape[0], _DEPTH):
        sections = slice(first, min(first + _DEPTH, result.shape[0]))
        part = (slice(region[0].start + sections.start, region[0].start + sections.stop), *region[1:])
        covered = tuple(
            slice(p.start * level.factor, min(p.stop * level.factor, size))
            for p, size in zip(part, level.source.shape, strict=True)
        )
        voxels = np.asarray(level.source[covered])
        if level.factor == 1:
            result[sections] = _finite(voxels, level.minimum)
        else:
            result[sections] = (mean_of_pairs if level.reduction == "mean" else mode_of_pairs)(voxels)
    level.target[region] = result


def _finite(voxels: NDArray[Any], minimum: float) -> NDArray[Any]:
    if voxels.dtype.kind != "f":
        return voxels
    finite = np.isfinite(voxels)
    return voxels if finite.all() else np.where(finite, voxels, voxels.dtype.type(minimum))


def _corners(voxels: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the voxels of each 2 × 2 × 2 cube as eight arrays; the last voxel of an odd axis counts twice."""
    padded = np.pad(voxels, [(0, size % 2) for size in voxels.shape], mode="edge")
    return [
        padded[tuple(slice(i, None, 2) for i in corner)] for corner in itertools.product((0, 1), repeat=voxels.ndim)
    ]


def mean_of_pairs(voxels: NDArray[Any]) -> NDArray[Any]:
    """Halve the voxels along each axis by means; means of integers are rounded, halves to even.

    >>> mean_of_pairs(np.array([[1, 2, 9], [3, 6, 9]]))
    array([[3, 9]])
    """
    corners = _corners(voxels)
    total = np.zeros(corners[0].shape, np.float64)
    for corner in corners:
        total += corner
    total /= len(corners)
    return (np.rint(total) if voxels.dtype.kind in "iu" else total).astype(voxels.dtype)


def mode_of_pairs(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve the voxels along each axis by the most frequent label; among equals, by the lowest one other than 0.

    >>> mode_of_pairs(np.array([[0, 3, 0, 0, 1], [3, 0, 0, 2, 2]], np.uint8))
    array([[3, 0, 1]], dtype=uint8)
    """
    corners = _corners(labels)
    seen = np.zeros(256, np.bool_)
    for section in labels:
        seen[section] = True
    present = np.flatnonzero(seen)
    result, most = np.zeros(corners[0].shape, labels.dtype), np.zeros(corners[0].shape, np.uint8)
    if len(present) == 1:
        result[:] = present[0]
        return result
    for label in (*present[present > 0], *present[present == 0]):  # the first of equals stays
        count = np.zeros(result.shape, np.uint8)
        for corner in corners:
            count += corner == label
        more = count > most
        result[more], most[more] = label, count[more]
    return result
