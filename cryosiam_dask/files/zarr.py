"""Read tomograms in zarr and OME-Zarr."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.files.header import (
    ANGSTROM,
    MOST_MISSING,
    TomogramHeader,
    ends_abruptly,
    no_numbers,
    own_attributes,
    plausible_sizes,
    space,
    space_axes,
    unknown_sizes,
)
from cryosiam_dask.files.mrc import MrcVoxels

ZARR_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
LARGEST_CHUNK = 2 * 2**30  # bytes; larger chunks are refused, because a chunk is decoded as a whole
LARGE_CHUNK = 256 * 2**20  # bytes; larger chunks cause a warning


@dataclass(frozen=True, slots=True)
class ArrayView:
    """A zarr array seen as (z, y, x) or (y, x), whatever the order of its axes; other axes have length 1.

    Attributes
    ----------
    array
        The stored array.
    axes
        The axes of the array that are z, y and x (or y and x).
    """

    array: zarr.Array[Any]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in voxels."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes, 2 or 3."""
        return len(self.axes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored voxels."""
        return np.dtype(self.array.dtype)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunk shape in voxels."""
        return tuple(self.array.chunks[axis] for axis in self.axes)

    @property
    def attrs(self) -> Any:
        """Attributes of the array."""
        return self.array.attrs

    def __getitem__(self, region: Any, /) -> np.ndarray[Any, Any]:
        given = region if isinstance(region, tuple) else (region,)
        parts = (*given, *[slice(None)] * (self.ndim - len(given)))
        index: list[Any] = [0] * self.array.ndim
        for axis, part in zip(self.axes, parts, strict=True):
            index[axis] = part
        kept = [axis for axis, part in zip(self.axes, parts, strict=True) if isinstance(part, slice)]
        return np.asarray(self.array[tuple(index)]).transpose([sorted(kept).index(axis) for axis in kept])


Voxels: TypeAlias = zarr.Array[Any] | ArrayView | MrcVoxels


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrHeader(TomogramHeader):
    """A tomogram in a zarr array, which is read in place.

    Attributes
    ----------
    array_path
        Folder of the array.
    axes
        The axes of the array that are z, y and x (or y and x).
    array_dtype
        Dtype of the stored voxels.
    statistics
        ``min``, ``max``, ``mean`` and ``non_finite_voxels`` from the attributes of the array; empty without them.
    """

    array_path: Path
    axes: tuple[int, ...]
    array_dtype: np.dtype[Any]
    statistics: Mapping[str, Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the voxels, in native byte order."""
        return self.array_dtype.newbyteorder("=")

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """Chunk shape in voxels."""
        return self.open().chunks

    def open(self) -> Voxels:
        """Open the voxels: the array itself if its axes are z, y, x, otherwise a view of it."""
        array = _open_array(self.array_path)
        return array if self.axes == tuple(range(array.ndim)) else ArrayView(array, self.axes)

    def read(self, region: Region) -> np.ndarray[Any, Any]:
        """Read a region; see `TomogramHeader.read`."""
        return read_region(self.open(), region, self.path)


def read_region(voxels: Voxels, region: Region, place: Path) -> np.ndarray[Any, Any]:
    """Read a region of a stored zarr array.

    Raises
    ------
    TomogramError
        If a chunk is damaged.
    """
    try:
        return np.asarray(voxels[region])
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise TomogramError(
            "the chunks of a zarr array must be readable",
            place=place,
            value=f"{type(error).__name__}: {error}",
            remedy="Copy the folder again: a chunk is damaged, or needs a codec that is not installed",
        ) from error


def is_zarr(path: Path) -> bool:
    """Whether a folder holds a zarr array or group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def read_zarr_header(path: Path, *, level: int = 0) -> ZarrHeader:
    """Read the header of a zarr array, an OME-Zarr image, or a group that holds one array.

    Parameters
    ----------
    path
        Its folder.
    level
        Level of an OME-Zarr image; 0 is full resolution.

    Raises
    ------
    TomogramError
        If it cannot be read, does not have that level, or does not hold exactly one volume of numbers.
    """
    metadata = _metadata(path)
    image, within = _find_image(path, metadata)
    if image is not None:
        return _read_level(path, path / within, image, level)
    if _is_array(metadata):
        found = path
    else:
        axes = {child: space(below["shape"]) for child, below in _children(path) if _is_array(below)}
        arrays = [child for child in axes if axes[child] == 3] or [child for child in axes if axes[child] == 2]
        if len(arrays) != 1:
            raise TomogramError(
                "a zarr group must be an OME-Zarr image or hold exactly one array that can be a tomogram",
                place=path,
                value=f"the arrays {', '.join(child.name for child in arrays[:8])}" if arrays else "none",
                remedy="Leave only the wanted array in the group" if arrays else "Check that it was copied as a whole",
            )
        (found,) = arrays
    if level:
        raise _no_level(path, level, "a single array, not an OME-Zarr image")
    return _array_header(path, found)


def _metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a node in either zarr format, ``attributes`` included; empty if there are none."""
    try:
        if (path / "zarr.json").is_file():
            return dict(json.loads((path / "zarr.json").read_text(encoding="utf-8")))
        result: dict[str, Any] = {}
        for name in (".zgroup", ".zarray"):
            if (path / name).is_file():
                result |= json.loads((path / name).read_text(encoding="utf-8"))
        if result and (path / ".zattrs").is_file():
            result["attributes"] = json.loads((path / ".zattrs").read_text(encoding="utf-8"))
        return result
    except (OSError, ValueError, TypeError) as error:
        raise TomogramError(
            "the metadata of a zarr must be readable JSON",
            place=path,
            value=error,
            remedy="Copy the folder again: it is incomplete or damaged",
        ) from error


def _is_array(metadata: Mapping[str, Any]) -> bool:
    return "shape" in metadata


def _children(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for child in sorted(path.iterdir()):
        if child.is_dir() and is_zarr(child):
            yield child, _metadata(child)


def _find_image(path: Path, metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """Return the multiscale image of a group, or of its first child, as Bio-Formats writes it, and its path."""
    for within, node in (("", metadata), ("0", {} if _is_array(metadata) else _metadata(path / "0"))):
        attributes = node.get("attributes")
        ome = attributes.get("ome", attributes) if isinstance(attributes, dict) else None
        images = ome.get("multiscales") if isinstance(ome, dict) else None
        if isinstance(ome, dict) and isinstance(images, list) and images and isinstance(images[0], dict):
            return {"version": ome.get("version"), **images[0]}, within
    return None, ""


def _read_level(path: Path, group: Path, image: Mapping[str, Any], level: int) -> ZarrHeader:
    datasets = image.get("datasets")
    listed: list[Any] = datasets if isinstance(datasets, list) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in listed):
        raise TomogramError(
            "an OME-Zarr image must list its levels",
            place=path,
            value=f"datasets {datasets}",
            remedy="Write its metadata again",
        )
    if level >= len(listed):
        raise _no_level(path, level, f"{len(listed)} levels, 0 to {len(listed) - 1}")
    folder = group / listed[level]["path"]
    if not folder.resolve().is_relative_to(group.resolve()) or not _is_array(_metadata(folder)):
        there = [str(n) for n, d in enumerate(listed) if _is_array(_metadata(group / d["path"]))]
        raise TomogramError(
            f"level {level} of an OME-Zarr image must be an array in its folder",
            place=path,
            value=f"no array {listed[level]['path']!r}; the levels that exist are {', '.join(there) or 'none'}",
            remedy="Copy the missing level" + (", or set ome_zarr_level to one that exists" if there else ""),
        )
    ndim = len(_metadata(folder)["shape"])
    of_level, of_image = (each.get("coordinateTransformations") for each in (listed[level], image))
    axes = image.get("axes")
    if isinstance(image.get("coordinateSystems"), list):
        # From version 0.6 on, the image's transformations lead to other coordinate systems, not to its own.
        axes, of_image = _axes_of_system(image["coordinateSystems"], of_level) or axes, None
    names, units = _ome_axes(axes, ndim, path)
    scale, translation = np.ones(ndim), np.zeros(ndim)
    warnings: list[str] = []
    scaled = False
    for transforms in (of_level, of_image):
        for transform in _single_transforms(transforms):
            factor, shift = _transform(transform, ndim)
            if factor is None or shift is None:
                warnings.append(f"a coordinate transformation is not understood: {transform}")
                scaled = False
                break
            scaled |= isinstance(transform, dict) and transform.get("type") == "scale"
            scale, translation = scale * factor, translation * factor + shift
            units = [unit or own for unit, own in zip(units, _units_of(transform, ndim), strict=True)]
    angstrom = np.array([ANGSTROM.get(unit.lower(), math.nan) if unit else math.nan for unit in units])
    version = image.get("version") or "of unknown version"
    header = _array_header(
        path,
        folder,
        names=names,
        kind=f"OME-Zarr {version}, level {level}",
        # Without a scale, 1 is only the default.
        voxel_size=scale * angstrom if scaled else np.full(ndim, math.nan),
        origin=translation * angstrom,
        warnings=warnings,
    )
    without = [names[axis] for axis in header.axes if not angstrom[axis] > 0]
    if scaled and without:
        values = ", ".join(f"{value:g}" for value in scale[list(header.axes)])
        warning = f"the unit of the axes {', '.join(without)} is missing or not a length; the scale is {values}"
        header = replace(header, warnings=(warning, *header.warnings))
    return header


def _ome_axes(axes: Any, ndim: int, path: Path) -> tuple[list[str], list[str | None]]:
    """Return names and units of an image's axes; versions before 0.3 list none, which means t, c, z, y, x."""
    if axes is None:
        return list("tczyx")[-ndim:], [None] * ndim
    names: list[str] = []
    units: list[str | None] = []
    for axis in axes if isinstance(axes, list) else ():
        entry = axis if isinstance(axis, dict) else {"name": axis}
        names.append(str(entry.get("name", "")).lower())
        units.append(entry["unit"] if isinstance(entry.get("unit"), str) else None)
    if len(names) != ndim:
        raise TomogramError(
            f"an OME-Zarr image must list as many axes as its arrays have, {ndim}",
            place=path,
            value=f"axes {', '.join(names) or axes}",
            remedy="Write its metadata again",
        )
    return names, units


def _axes_of_system(systems: list[Any], transforms: Any) -> Any:
    """Return the axes of the coordinate system that a level is transformed to (NGFF 0.6), else of the first system."""
    last = transforms[-1] if isinstance(transforms, list) and transforms else None
    wanted = last.get("output") if isinstance(last, dict) else None
    wanted = wanted.get("name") if isinstance(wanted, dict) else wanted
    known = [system for system in systems if isinstance(system, dict)]
    found = next((system for system in known if system.get("name") == wanted), next(iter(known), {}))
    return found.get("axes")


def _single_transforms(transforms: Any) -> Iterator[Any]:
    """Yield the transformations of a list, including those inside sequences (NGFF 0.6)."""
    for transform in transforms if isinstance(transforms, list) else ():
        if isinstance(transform, dict) and transform.get("type") == "sequence":
            yield from _single_transforms(transform.get("transformations"))
        else:
            yield transform


def _units_of(transform: Any, ndim: int) -> list[str | None]:
    """Return the units, one for each axis, that some writers put into a transformation instead of the axes."""
    given = transform.get("unit", transform.get("units")) if isinstance(transform, dict) else None
    listed = given if isinstance(given, list) and len(given) == ndim else [given] * ndim
    return [unit if isinstance(unit, str) else None for unit in listed]


def _transform(transform: Any, ndim: int) -> tuple[Any, Any]:
    """Return factor and shift of a coordinate transformation; None if it is not supported."""
    kind = transform.get("type") if isinstance(transform, dict) else None
    if kind == "identity":
        return np.ones(ndim), np.zeros(ndim)
    values = transform.get(kind) if kind in ("scale", "translation") else None
    if not isinstance(values, list) or len(values) != ndim or not all(isinstance(v, int | float) for v in values):
        return None, None
    numbers = np.array(values, np.float64)
    return (numbers, np.zeros(ndim)) if kind == "scale" else (np.ones(ndim), numbers)


def _no_level(path: Path, level: int, found: str) -> TomogramError:
    return TomogramError(
        f"level {level}, which ome_zarr_level names, must exist", place=path, value=found, remedy="Lower ome_zarr_level"
    )


def _array_header(
    path: Path,
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    kind: str | None = None,
    voxel_size: np.ndarray[Any, Any] | None = None,
    origin: np.ndarray[Any, Any] | None = None,
    warnings: Sequence[str] = (),
) -> ZarrHeader:
    """Return the header of the array in `folder`; names and sizes that are not given come from its attributes."""
    metadata = _metadata(folder)
    array = _open_array(folder)
    attributes = metadata.get("attributes") or {}
    found = list(warnings)
    if names is None:
        named = metadata.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS") or attributes.get("axes")
        named = [str(name).lower() for name in named] if isinstance(named, list) else []
        names = named if len(named) == array.ndim and {"y", "x"} <= set(named) else None
    axes = space_axes(array.shape, names, folder if folder == path else path)
    if np.dtype(array.dtype).kind not in "biuf":
        raise no_numbers(path, array.dtype)
    # Arrays that this program wrote have their sizes in the attributes.
    size = [math.nan] * len(axes) if voxel_size is None else [float(voxel_size[axis]) for axis in axes]
    position = [0.0] * len(axes) if origin is None else [float(np.nan_to_num(origin[axis])) for axis in axes]
    nstart = (0,) * len(axes)
    if voxel_size is None:
        size, position, nstart = own_attributes(attributes, len(axes))
    sizes, doubts = plausible_sizes(size)
    chunk_bytes = math.prod(array.chunks) * np.dtype(array.dtype).itemsize
    if chunk_bytes > LARGEST_CHUNK:
        raise TomogramError(
            f"a chunk must hold at most {LARGEST_CHUNK / 2**30:g} GiB, because it is read as a whole",
            place=path,
            value=f"chunks of {tuple(array.chunks)} voxels, {chunk_bytes / 2**30:.1f} GiB",
            remedy="Store it again in chunks of about 128 voxels along each axis",
        )
    if chunk_bytes > LARGE_CHUNK:
        found.append(
            f"chunks of {chunk_bytes / 2**20:.0f} MiB are decoded as a whole, several at the same time, which takes "
            "memory in every worker. 'cryosiam-dask convert' makes a copy with smaller chunks"
        )
    missing, incomplete = _missing_chunks(array, folder)
    found += missing
    shape = tuple(int(array.shape[axis]) for axis in axes)
    statistics = attributes.get("statistics")
    complete = isinstance(statistics, dict) and {"min", "max", "mean", "non_finite_voxels"} <= set(statistics)
    return ZarrHeader(
        path=path,
        kind=kind or f"zarr format {metadata.get('zarr_format')}",
        shape=shape,
        file_bytes=math.prod(shape) * np.dtype(array.dtype).itemsize,
        modified=max((folder / name).stat().st_mtime for name in ZARR_METADATA if (folder / name).exists()),
        voxel_size_angstrom=sizes,
        origin_angstrom=tuple(position),
        nstart=nstart,
        notes=(),
        warnings=(*found, *doubts, *unknown_sizes(sizes)),
        incomplete=incomplete,
        array_path=folder,
        axes=axes,
        array_dtype=np.dtype(array.dtype),
        statistics=statistics if complete and isinstance(statistics, dict) else {},
    )


def _missing_chunks(array: zarr.Array[Any], folder: Path) -> tuple[list[str], str]:
    """Return a warning if chunks (or shards) have no file, and `TomogramHeader.incomplete`.

    zarr reads such chunks as the fill value. Writers leave out chunks that hold nothing else, whereas an interrupted
    copy lacks arbitrary chunks. An empty region seldom ends exactly at a chunk border, so if a chunk was left out
    because it is empty, its neighbours have the fill value next to it. If no chunk exists, or more than `MOST_MISSING`
    are missing and some neighbours are not empty at the border, the tomogram is incomplete.
    """
    stored = array.shards or array.chunks
    counts = [-(-n // p) for n, p in zip(array.shape, stored, strict=True)]
    there = {Path(at, name).relative_to(folder).as_posix() for at, _, names in os.walk(folder) for name in names}
    all_of_them = list(np.ndindex(*counts))
    missing = {index for index in all_of_them if array.metadata.encode_chunk_key(index) not in there}
    if not missing:
        return [], ""
    share = len(missing) / len(all_of_them)
    abrupt = any(ends_abruptly(array, array.fill_value, stored, counts, missing))
    what = (
        f"{len(missing)} of {len(all_of_them)} {'shards' if array.shards else 'chunks'} ({100 * share:.1f} %) are "
        f"missing and read as {array.fill_value}"
    )
    if share == 1:
        likely = "nothing has been written, or only empty chunks"
    elif abrupt:
        likely = "their neighbours are not empty, so the copy may be incomplete"
    else:
        likely = "their neighbours are empty too, so the writer seems to have left out empty chunks"
    return [f"{what}: {likely}"], what if share == 1 or (abrupt and share > MOST_MISSING) else ""


def _open_array(folder: Path) -> zarr.Array[Any]:
    metadata = _metadata(folder)
    codecs = [metadata.get(name) for name in ("codecs", "filters", "compressor")]
    if "pickle" in json.dumps(codecs):
        raise TomogramError(
            "the chunks of a zarr array must not be pickled, because reading them could run any code",
            place=folder,
            value="the codec pickle",
            remedy="Write it with another codec, such as blosc",
        )
    try:
        array = zarr.open_array(str(folder), mode="r")
    except Exception as error:  # zarr raises errors of many types for wrong metadata
        raise TomogramError(
            "the zarr array must be readable",
            place=folder,
            value=f"{type(error).__name__}: {error}",
            remedy="Copy the folder again: it is incomplete or damaged, or needs a codec that is not installed",
        ) from error
    return array
