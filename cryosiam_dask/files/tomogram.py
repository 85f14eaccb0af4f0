"""What a tomogram is, whatever file it is stored in; and those stored as arrays: zarr, OME-Zarr and HDF5.

A `TomogramHeader` tells shape, voxel size and position of a tomogram, and reads its voxels region by region, always as
(z, y, x) or (y, x). `cryosiam_dask.stages.ingest` has the one of MRC files and decides which one a path asks for.

* **zarr**, format 2 or 3: an array, or a group with one array that can be a tomogram.
* **OME-Zarr**, NGFF 0.4 (zarr 2, as the CryoET Data Portal publishes) and 0.5 (zarr 3), also older drafts: any level of
  the multiscale image. Its scale and translation, converted to Å, give voxel size and origin.
* **HDF5**: the dataset that is named, or the only one that can be a tomogram.

Axes of other kinds (time, channel) may be there with length 1. Nothing in a file is executed: zarr arrays that would be
unpickled are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import zarr

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.files.predictions import open_hdf5

HDF5_ENDINGS = (".h5", ".hdf5", ".hdf", ".he5")
ZARR_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
LARGEST_CHUNK = 2 * 2**30  # bytes; a chunk is decoded as a whole
LARGE_CHUNK = 256 * 2**20

#: Å of the units that axes of an OME-Zarr image may have: UDUNITS-2 as the specification asks for, and what is met.
ANGSTROM: Mapping[str, float] = {
    **dict.fromkeys(("angstrom", "ångström", "angstroms", "å", "a"), 1.0),
    **dict.fromkeys(("picometer", "picometre", "pm"), 0.01),
    **dict.fromkeys(("nanometer", "nanometre", "nanometers", "nm"), 10.0),
    **dict.fromkeys(("micrometer", "micrometre", "micron", "um", "µm", "μm"), 1e4),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), 1e7),
    **dict.fromkeys(("meter", "metre", "m"), 1e10),
}
_PLAUSIBLE_ANGSTROM = (0.01, 1000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TomogramHeader(ABC):
    """What a tomogram file holds, after every decision that its header asks for.

    Attributes
    ----------
    path
        The file, or the folder of a zarr.
    kind
        What it is, in words: ``"MRC mode 2"``, ``"OME-Zarr 0.4, level 0"``.
    shape
        (z, y, x), or (y, x) for a single image, in voxels.
    file_bytes, modified
        Size in bytes and modification time (seconds since 1970) of the file as it lies on the disk; of a zarr, its
        voxels without compression, and its metadata.
    voxel_size_angstrom
        Per axis of `shape`; ``None`` where the header does not know it.
    origin_angstrom, nstart
        Position of the volume in Å and in voxels, per axis of `shape`.
    notes
        What was decided, for the log.
    warnings
        What looks wrong with the file and may need attention.
    compressed
        Whether the file can only be read from its beginning to its end.
    incomplete
        Why so much of it is missing that it is not to be segmented; empty if it is not.
    decided
        How its voxels are read, in words, where versions of before read them otherwise: outputs of those are not of it.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    file_bytes: int
    modified: float
    voxel_size_angstrom: tuple[float | None, ...]
    origin_angstrom: tuple[float, ...]
    nstart: tuple[int, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    compressed: bool = False
    incomplete: str = ""
    decided: str = ""

    def require_complete(self) -> None:
        """Refuse what lacks too much: see `incomplete`.

        Raises
        ------
        TomogramError
            With what is missing.
        """
        if self.incomplete:
            raise TomogramError(
                f"no more than {MOST_MISSING:.0%} of a tomogram may be missing, unless it seems to be empty there",
                place=self.path,
                value=self.incomplete,
                remedy="The copy is incomplete: copy it again, or write it with all its chunks",
            )

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of the voxels as they are read, in native byte order."""

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """What the file holds in one piece, voxels along each axis of `shape`; 1 where it does not matter."""
        return (1,) * len(self.shape)

    @abstractmethod
    def read(self, region: Region) -> np.ndarray[Any, Any]:
        """Read a region of a file that is not `compressed`, as (z, y, x) or (y, x), in any byte order.

        Raises
        ------
        TomogramError
            If it cannot be read.
        """

    def attributes(self) -> dict[str, Any]:
        """Attributes of the zarr array: axes, sizes in Å, and where the voxels come from (JSON values only)."""
        return {
            "axes": list("zyx"[-len(self.shape) :]),
            "voxel_size_angstrom": list(self.voxel_size_angstrom),
            "origin_angstrom": list(self.origin_angstrom),
            "nstart": list(self.nstart),
            "source": self.path.name,
            "source_bytes": self.file_bytes,
            "source_modified": self.modified,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class ArrayView:
    """An array of zarr as (z, y, x) or (y, x), whatever the order of its axes and with others of length 1 among them.

    Attributes
    ----------
    array
        As stored.
    axes
        Which of its axes are z, y and x (or y and x).
    """

    array: zarr.Array[Any]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """In voxels."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes, 2 or 3."""
        return len(self.axes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the voxels as stored."""
        return np.dtype(self.array.dtype)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Voxels of a chunk."""
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


Voxels: TypeAlias = zarr.Array[Any] | ArrayView


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrHeader(TomogramHeader):
    """A tomogram in a zarr array, which is read where it is.

    Attributes
    ----------
    array_path
        Folder of the array.
    axes
        Which of its axes are z, y and x (or y and x).
    statistics
        What the array says of its own voxels: ``min``, ``max``, ``mean``, ``non_finite_voxels``; empty if nothing.
    """

    array_path: Path
    axes: tuple[int, ...]
    array_dtype: np.dtype[Any]
    statistics: Mapping[str, Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the voxels, in native byte order."""
        return self.array_dtype.newbyteorder("=")

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """Voxels of a chunk."""
        return self.open().chunks

    def open(self) -> Voxels:
        """The voxels: the array itself where its axes are z, y, x, a view of it otherwise."""
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
            remedy="A chunk is damaged or was written with a codec that is not installed: copy the folder again",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Hdf5Header(TomogramHeader):
    """A tomogram in a dataset of an HDF5 file.

    Attributes
    ----------
    dataset
        Its name.
    axes
        Which of its axes are z, y and x (or y and x); others have length 1.
    stored_shape
        All of them.
    """

    dataset: str
    axes: tuple[int, ...]
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype[Any]
    dataset_chunks: tuple[int, ...] | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the voxels, in native byte order, no half precision."""
        return np.dtype(np.float32) if self.stored_dtype == np.float16 else self.stored_dtype.newbyteorder("=")

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """Voxels of a chunk of the dataset."""
        chunks = self.dataset_chunks
        return tuple(chunks[axis] for axis in self.axes) if chunks else (1,) * len(self.shape)

    def read(self, region: Region) -> np.ndarray[Any, Any]:
        """Read a region; see `TomogramHeader.read`."""
        index: list[Any] = [0] * len(self.stored_shape)
        for axis, part in zip(self.axes, region, strict=True):
            index[axis] = part
        try:
            with open_hdf5(self.path) as file:
                voxels = np.asarray(file[self.dataset][tuple(index)])
                return voxels.transpose([sorted(self.axes).index(axis) for axis in self.axes])
        except (OSError, KeyError) as error:
            raise _no_hdf5(self.path, error) from error


# ----------------------------------------------------------------------------------------------------------- which file


def is_zarr(path: Path) -> bool:
    """Whether a folder holds a zarr array or group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def source_identity(path: str | Path) -> list[Any]:
    """What changes whenever a tomogram does, without reading its voxels: JSON values.

    Parameters
    ----------
    path
        A file: its name, size and modification time, and a hash of its beginning. A folder: its name, a hash of all
        metadata files, and one of the names, sizes and modification times of all files, since some writers of zarr
        replace chunks and others change them in place. That asks the disk once for each: 0.9 s for 97,336 chunks on the
        local disk of a busy machine (``benchmarks/results/identity-2-cores.json``), longer on that of a network.
    """
    path = Path(path)
    if not path.is_dir():
        status = path.stat()
        with path.open("rb") as file:
            beginning = hashlib.sha256(file.read(1024)).hexdigest()
        return [path.name, status.st_size, status.st_mtime_ns, beginning]
    metadata, entries = hashlib.sha256(), hashlib.sha256()
    for within, entry in _files(path):
        name = within.encode("utf-8", "surrogateescape")
        if entry.name in ZARR_METADATA:
            metadata.update(name + Path(entry).read_bytes())
        status = entry.stat()
        entries.update(name + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return [path.name, metadata.hexdigest(), entries.hexdigest()]


#: Places at which a tomogram is looked at to tell whether it is the same, and bytes that are read at each.
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


def source_content(path: str | Path) -> str:
    """A hash of what a tomogram holds, by samples: the same for a copy, and for a file whose times alone have changed.

    Parameters
    ----------
    path
        A file: its size and 64 KiB at each of 256 places, the first and the last included, or the whole where that is
        no more. A folder: the names and sizes of all files, its metadata, and as much of 256 of the others, or of all
        where these are fewer.
    """
    path, found = Path(path), hashlib.sha256()
    if not path.is_dir():
        found.update(str(path.stat().st_size).encode())
        for piece in _pieces(path, _SAMPLES):
            found.update(piece)
        return found.hexdigest()
    files = list(_files(path))
    others = [within for within, entry in files if entry.name not in ZARR_METADATA]
    sampled = {others[(len(others) - 1) * i // (_SAMPLES - 1)] for i in range(_SAMPLES)} if others else set()
    for within, entry in files:
        found.update(f"{within} {entry.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        if entry.name in ZARR_METADATA:
            found.update(Path(entry).read_bytes())
        elif within in sampled:
            for piece in _pieces(Path(entry), _SAMPLES // len(sampled)):
                found.update(piece)
    return found.hexdigest()


def _pieces(path: Path, places: int) -> Iterator[bytes]:
    """What a file holds at so many places, evenly spread, or the whole where that is no more."""
    with path.open("rb") as file:
        last = file.seek(0, os.SEEK_END) - _SAMPLE_BYTES
        many = min(places, -(-last // _SAMPLE_BYTES) + 1)
        for i in range(max(1, many)):
            file.seek(max(0, last) * i // max(1, many - 1))
            yield file.read(_SAMPLE_BYTES)


def newest_chunk(path: str | Path) -> int:
    """When the last chunk of a zarr was written, in nanoseconds since the epoch; 0 of a file, or without chunks."""
    return max(_times(path), default=0)


def is_newer_in_part(path: str | Path, since: int) -> bool:
    """Whether some chunks of a zarr were written after a time and others not: it was changed in place.

    All those of a copy are newer, or none where the times were kept, whole seconds of them or better.
    """
    times = _times(path)
    return bool(times) and min(times) <= since < max(times)


def _times(path: str | Path) -> list[int]:
    if not Path(path).is_dir():
        return []
    return [entry.stat().st_mtime_ns for _, entry in _files(Path(path)) if entry.name not in ZARR_METADATA]


def _files(folder: Path, within: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below a folder, with their names relative to it, in order."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = f"{within}{entry.name}"
        if entry.is_dir():
            yield from _files(Path(entry), f"{name}/")
        else:
            yield name, entry


# ----------------------------------------------------------------------------------------------------------------- zarr


def read_zarr_header(path: Path, *, level: int = 0) -> ZarrHeader:
    """Look at a zarr array, an OME-Zarr image, or a group that holds one array.

    Parameters
    ----------
    path
        Its folder.
    level
        Which level of an OME-Zarr image; 0 is full resolution.

    Raises
    ------
    TomogramError
        If it cannot be read, does not have that level, or holds no single volume of numbers.
    """
    metadata = _metadata(path)
    image, within = _find_image(path, metadata)
    if image is not None:
        return _read_level(path, path / within, image, level)
    if _is_array(metadata):
        found = path
    else:
        axes = {child: _space(below["shape"]) for child, below in _children(path) if _is_array(below)}
        arrays = [child for child in axes if axes[child] == 3] or [child for child in axes if axes[child] == 2]
        if len(arrays) != 1:
            raise TomogramError(
                "a zarr group must be an OME-Zarr image or hold exactly one array that can be a tomogram",
                place=path,
                value=f"the arrays {', '.join(child.name for child in arrays[:8])}" if arrays else "none",
                remedy="Leave only the one that is meant in the group"
                if arrays
                else "Check that it was copied as a whole",
            )
        (found,) = arrays
    if level:
        raise _no_level(path, level, "a single array, which is no OME-Zarr image")
    return _array_header(path, found)


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a node, both formats alike: those of the array, and ``attributes``; empty if there is none."""
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
            remedy="The folder is incomplete or damaged: copy it again",
        ) from error


def _is_array(metadata: Mapping[str, Any]) -> bool:
    return "shape" in metadata


def _children(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for child in sorted(path.iterdir()):
        if child.is_dir() and is_zarr(child):
            yield child, _metadata(child)


def _find_image(path: Path, metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The multiscale image of a group, or of its first child (as Bio-Formats writes it), and where it is."""
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
            value=f"no array {listed[level]['path']!r}; those of the levels {', '.join(there) or 'none'} are there",
            remedy="Copy the missing level" + (", or set ome_zarr_level to one that is there" if there else ""),
        )
    ndim = len(_metadata(folder)["shape"])
    of_level, of_image = (each.get("coordinateTransformations") for each in (listed[level], image))
    axes = image.get("axes")
    if isinstance(image.get("coordinateSystems"), list):
        # From 0.6 on those of the image lead on to other coordinate systems than its own, in which it lies.
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
        # The scale of an image without one is 1 by default, which says nothing.
        voxel_size=scale * angstrom if scaled else np.full(ndim, math.nan),
        origin=translation * angstrom,
        warnings=warnings,
    )
    without = [names[axis] for axis in header.axes if not angstrom[axis] > 0]
    if scaled and without:
        values = ", ".join(f"{value:g}" for value in scale[list(header.axes)])
        warning = f"the unit of the axes {', '.join(without)} is missing or none of length; the scale is {values}"
        header = replace(header, warnings=(warning, *header.warnings))
    return header


def _ome_axes(axes: Any, ndim: int, path: Path) -> tuple[list[str], list[str | None]]:
    """Names and units of an image's axes; drafts before 0.3 have none, which means t, c, z, y, x."""
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
            f"the axes of an OME-Zarr image must be those of its arrays, which have {ndim}",
            place=path,
            value=f"axes {', '.join(names) or axes}",
            remedy="Write its metadata again",
        )
    return names, units


def _axes_of_system(systems: list[Any], transforms: Any) -> Any:
    """The axes of the coordinate system that a level's transformations lead to (NGFF 0.6), or else of the first one."""
    last = transforms[-1] if isinstance(transforms, list) and transforms else None
    wanted = last.get("output") if isinstance(last, dict) else None
    wanted = wanted.get("name") if isinstance(wanted, dict) else wanted
    known = [system for system in systems if isinstance(system, dict)]
    found = next((system for system in known if system.get("name") == wanted), next(iter(known), {}))
    return found.get("axes")


def _single_transforms(transforms: Any) -> Iterator[Any]:
    """The transformations of a list, those of sequences (NGFF 0.6) one after the other."""
    for transform in transforms if isinstance(transforms, list) else ():
        if isinstance(transform, dict) and transform.get("type") == "sequence":
            yield from _single_transforms(transform.get("transformations"))
        else:
            yield transform


def _units_of(transform: Any, ndim: int) -> list[str | None]:
    """Units that some writers put into a transformation instead of the axes: one, or one for each axis."""
    given = transform.get("unit", transform.get("units")) if isinstance(transform, dict) else None
    listed = given if isinstance(given, list) and len(given) == ndim else [given] * ndim
    return [unit if isinstance(unit, str) else None for unit in listed]


def _transform(transform: Any, ndim: int) -> tuple[Any, Any]:
    """Factor and shift of a coordinate transformation; None if it is none that is known."""
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
        f"there must be a level {level}, which ome_zarr_level asks for",
        place=path,
        value=found,
        remedy="Lower ome_zarr_level",
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
    """The header of the array in `folder`; sizes and names per axis of the array, or as its attributes tell."""
    metadata = _metadata(folder)
    array = _open_array(folder)
    attributes = metadata.get("attributes") or {}
    found = list(warnings)
    if names is None:
        named = metadata.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS") or attributes.get("axes")
        named = [str(name).lower() for name in named] if isinstance(named, list) else []
        names = named if len(named) == array.ndim and {"y", "x"} <= set(named) else None
    axes = _space_axes(array.shape, names, folder if folder == path else path)
    if np.dtype(array.dtype).kind not in "biuf":
        raise _no_numbers(path, array.dtype)
    # Of ours the attributes tell sizes, per axis of the volume.
    size = [math.nan] * len(axes) if voxel_size is None else [float(voxel_size[axis]) for axis in axes]
    position = [0.0] * len(axes) if origin is None else [float(np.nan_to_num(origin[axis])) for axis in axes]
    nstart = (0,) * len(axes)
    if voxel_size is None:
        size, position, nstart = _own_attributes(attributes, len(axes))
    sizes, doubts = plausible_sizes(size)
    chunk_bytes = math.prod(array.chunks) * np.dtype(array.dtype).itemsize
    if chunk_bytes > LARGEST_CHUNK:
        raise TomogramError(
            f"a chunk must hold at most {LARGEST_CHUNK / 2**30:g} GiB, as it is read as a whole",
            place=path,
            value=f"chunks of {tuple(array.chunks)} voxels, {chunk_bytes / 2**30:.1f} GiB",
            remedy="Store it again in chunks of 128 voxels or so along each axis",
        )
    if chunk_bytes > LARGE_CHUNK:
        found.append(
            f"chunks of {chunk_bytes / 2**20:.0f} MiB are decoded as a whole, several at once: every worker needs "
            "memory for them. 'cryosiam-dask convert' makes a copy in smaller ones"
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
    """A warning where chunks (or shards of them) have no file, which zarr reads as the fill value; and what is missing
    if none is there, or more than `MOST_MISSING` are not and others end abruptly beside them.

    Writers leave out chunks that hold nothing else, and a copy that was broken off lacks any. Beside empty chunks lie
    empty voxels as a rule, as what is empty seldom ends where a chunk does.
    """
    piece = array.shards or array.chunks
    counts = [-(-n // p) for n, p in zip(array.shape, piece, strict=True)]
    there = {Path(at, name).relative_to(folder).as_posix() for at, _, names in os.walk(folder) for name in names}
    all_of_them = list(np.ndindex(*counts))
    missing = {index for index in all_of_them if array.metadata.encode_chunk_key(index) not in there}
    if not missing:
        return [], ""
    share = len(missing) / len(all_of_them)
    abrupt = any(_ends_abruptly(array, array.fill_value, piece, counts, missing))
    what = (
        f"{len(missing)} of {len(all_of_them)} {'shards' if array.shards else 'chunks'} ({100 * share:.1f} %) are not "
        f"there and read as {array.fill_value}"
    )
    if share == 1:
        said = "nothing has been written, or nothing but empty chunks"
    elif abrupt:
        said = "what lies beside them is not empty, so that the copy may be incomplete"
    else:
        said = "what lies beside them is empty as well, so that the writer seems to have left out empty ones"
    return [f"{what}: {said}"], what if share == 1 or (abrupt and share > MOST_MISSING) else ""


#: Share of chunks that may be missing where those beside them are not empty.
MOST_MISSING = 0.5
_LOOK_BESIDE = 8  # chunks, evenly spread


def _ends_abruptly(
    array: Any, fill_value: Any, piece: Sequence[int], counts: Sequence[int], missing: set[tuple[int, ...]]
) -> Iterator[bool]:
    """Of some missing chunks whether the voxels next to them, of one that is there, are other than the fill value."""
    beside = []
    for index in sorted(missing):
        for axis, step in product(range(len(counts)), (-1, 1)):
            other = tuple(n + step * (i == axis) for i, n in enumerate(index))
            if 0 <= other[axis] < counts[axis] and other not in missing:
                beside.append((other, axis, step))
                break
    for other, axis, step in beside[:: max(1, len(beside) // _LOOK_BESIDE)]:
        region = [slice(n * p, min((n + 1) * p, size)) for n, p, size in zip(other, piece, array.shape, strict=True)]
        face = region[axis].stop - 1 if step < 0 else region[axis].start
        region[axis] = slice(face, face + 1)
        with suppress(Exception):  # damaged chunks are told of when all are read
            voxels = np.asarray(array[tuple(region)])
            fill = np.asarray(fill_value, voxels.dtype)
            yield not bool(np.all((voxels == fill) | ((voxels != voxels) & (fill != fill))))


def _own_attributes(attributes: Mapping[str, Any], ndim: int) -> tuple[list[float], list[float], tuple[int, ...]]:
    """Voxel size and origin in Å and start, from attributes as this program writes them."""

    def numbers(name: str, default: float) -> list[float]:
        values = attributes.get(name)
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if not isinstance(values, list) or len(values) != ndim:
            return [default] * ndim
        known = [float(v) if isinstance(v, int | float) else default for v in values]
        return [v if math.isfinite(v) else default for v in known]

    start = tuple(int(v) for v in numbers("nstart", 0))
    return numbers("voxel_size_angstrom", math.nan), numbers("origin_angstrom", 0), start


def _open_array(folder: Path) -> zarr.Array[Any]:
    metadata = _metadata(folder)
    codecs = [metadata.get(name) for name in ("codecs", "filters", "compressor")]
    if "pickle" in json.dumps(codecs):
        raise TomogramError(
            "the chunks of a zarr array must not be pickled: reading them could run any code",
            place=folder,
            value="the codec pickle",
            remedy="Write it with another codec, such as blosc",
        )
    try:
        array = zarr.open_array(str(folder), mode="r")
    except Exception as error:  # of metadata that are wrong, zarr raises anything
        raise TomogramError(
            "the zarr array must be readable",
            place=folder,
            value=f"{type(error).__name__}: {error}",
            remedy="The folder is incomplete or damaged, or needs a codec that is not installed",
        ) from error
    return array


# ----------------------------------------------------------------------------------------------------------------- HDF5


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, by its content."""
    return bool(h5py.is_hdf5(path))


def read_hdf5_header(path: Path, *, dataset: str | None = None) -> Hdf5Header:
    """Look at a tomogram in an HDF5 file.

    Parameters
    ----------
    path
        The file.
    dataset
        Name of the dataset; ``None``: the only one of three axes, or else the only one of two.

    Raises
    ------
    TomogramError
        If it cannot be read, or holds no such dataset.
    """
    status = path.stat()
    try:
        with open_hdf5(path) as file:
            name = _find_dataset(file, dataset, path)
            found = file[name]
            attributes = {**dict(file.attrs), **_eman(found.parent.attrs), **dict(found.attrs)}
            shape, dtype, chunks = tuple(map(int, found.shape)), found.dtype, found.chunks
            names = _hdf5_axes(found)
            missing, incomplete = _missing_in_hdf5(found, Path(found.file.filename))
            linked = found.file.filename if found.file.filename != file.filename else ""
    except (OSError, RuntimeError, TypeError) as error:
        raise _no_hdf5(path, error) from error
    axes = _space_axes(shape, names, path)
    notes, decided = [f"dataset {name}" + (f" of {linked}" if linked else "")], ""
    if names is not None and list(axes) != sorted(axes):
        notes.append(f"stored with the axes {', '.join(names)}: transposed to {', '.join('zyx'[-len(axes) :])}")
        decided = f"axes {', '.join(names)}"
    size, position, nstart = _own_attributes(attributes, len(axes))
    # As Fiji's HDF5 plugin and ilastik write it, (z, y, x).
    micrometres = np.ravel(attributes.get("element_size_um", ()))
    if all(map(math.isnan, size)) and len(micrometres) == len(axes) and micrometres.dtype.kind in "iuf":
        size = [float(v) * 1e4 for v in micrometres]
    sizes, doubts = plausible_sizes(size)
    return Hdf5Header(
        path=path,
        kind=f"HDF5, dataset {name}",
        shape=tuple(shape[axis] for axis in axes),
        file_bytes=status.st_size,
        modified=status.st_mtime,
        voxel_size_angstrom=sizes,
        origin_angstrom=tuple(position),
        nstart=nstart,
        notes=tuple(notes),
        warnings=(*missing, *doubts, *unknown_sizes(sizes)),
        incomplete=incomplete,
        decided=decided,
        dataset=name,
        axes=axes,
        stored_shape=shape,
        stored_dtype=dtype,
        dataset_chunks=chunks,
    )


def _missing_in_hdf5(found: Any, path: Path) -> tuple[list[str], str]:
    """As `_missing_chunks`, of an HDF5 dataset: of chunks, and of voxels and sources that are not there."""
    lost, total = False, math.prod(found.shape)
    if found.is_virtual:
        there, gone = 0, set()
        for source in found.virtual_sources():
            if _is_there(path, source.file_name, source.dset_name):
                try:
                    there += source.vspace.get_select_npoints()
                except RuntimeError:  # as many as its source has
                    there = total
            else:
                gone.add(f"{source.file_name}, {source.dset_name}")
        share, lost = 1 - there / total, bool(gone)
        many = f"sources of a virtual dataset ({'; '.join(sorted(gone)[:3])})" if gone else "parts of a virtual dataset"
    elif found.chunks:
        counts = [-(-n // c) for n, c in zip(found.shape, found.chunks, strict=True)]
        stored = set[tuple[int, ...]]()
        # HDF5 goes on as long as the call returns nothing.
        found.id.chunk_iter(
            lambda chunk: stored.add(tuple(o // c for o, c in zip(chunk.chunk_offset, found.chunks, strict=True)))
        )
        missing = set(np.ndindex(*counts)) - stored
        share, many = len(missing) / math.prod(counts), f"{len(missing)} of {math.prod(counts)} chunks"
        if missing and stored:
            lost = any(_ends_abruptly(found, found.fillvalue, found.chunks, counts, missing))
    elif found.external:
        there = 0
        for name, offset, size in found.external:
            with suppress(OSError):
                there += max(0, min(Path(name).stat().st_size - offset, size))
        share, lost, many = 1 - there / (total * found.dtype.itemsize), True, "voxels in other files"
    else:
        share, many = float(not found.id.get_storage_size()), "voxels"
    if share <= 0:
        return [], ""
    what = f"{many}, {100 * share:.1f} % of the whole, are not there and read as {found.fillvalue}"
    return [what], what if share >= 1 or (lost and share > MOST_MISSING) else ""


def _is_there(path: Path, file_name: str, dataset: str) -> bool:
    # HDF5 looks beside the file first.
    for file in [path] if file_name == "." else [path.parent / file_name, Path(file_name)]:
        with suppress(OSError, RuntimeError), open_hdf5(file) as source:
            return dataset in source
    return False


def _hdf5_axes(found: Any) -> list[str] | None:
    """What the axes of a dataset are called, if it says which are y and x: ilastik's tags, labels or scales."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        tags = json.loads(found.attrs["axistags"])
        tagged = [str(axis["key"]).lower() for axis in tags["axes"]]
        if len(tagged) == found.ndim:
            return _if_space(tagged)
    # Velox puts the frames of an image last (HyperSpy's reader says so).
    if found.ndim == 3 and re.fullmatch(r"/Data/Image/[0-9a-f]+/Data", found.name or ""):
        return ["y", "x", "z" if found.shape[2] > 1 else "t"]
    names = []
    for dimension in found.dims:
        name = str(dimension.label)
        if not name and len(dimension):
            name = str(dimension[0].name or "").rpartition("/")[2]
        names.append(name.strip().lower())
    return _if_space(names)


def _if_space(names: list[str]) -> list[str] | None:
    space = [name for name in names if name in ("z", "y", "x")]
    return names if {"y", "x"} <= set(space) and len(set(space)) == len(space) else None


def _eman(attributes: Any) -> dict[str, Any]:
    """The voxel size that EMAN2 and IMOD write beside a dataset, in our words."""
    size = [attributes.get(f"EMAN.apix_{axis}") for axis in "zyx"]
    return {"voxel_size_angstrom": [float(np.ravel(v)[0]) for v in size]} if None not in size else {}


def hdf5_datasets(group: Any) -> Iterator[tuple[str, Any]]:
    """The datasets of an HDF5 file with their names, each once, whatever links lead to it.

    Soft links and those to other files are followed; one that leads nowhere is passed over.

    Parameters
    ----------
    group
        The open file.

    Yields
    ------
    tuple of str and h5py.Dataset
    """
    seen = set[Any]()

    def walk(group: Any, within: str) -> Iterator[tuple[str, Any]]:
        # What lies here comes before what is linked to, so that a dataset has its own name.
        hard = [name for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]
        for name in (*hard, *(name for name in group if name not in set(hard))):
            try:
                node = group[name]
            except (KeyError, OSError):
                continue
            information = h5py.h5o.get_info(node.id)
            key = (node.file.filename, information.fileno, information.addr)
            if key in seen:
                continue
            seen.add(key)
            if isinstance(node, h5py.Dataset):
                yield f"{within}{name}", node
            elif isinstance(node, h5py.Group):
                yield from walk(node, f"{within}{name}/")

    return walk(group, "")


def _is_volume(node: Any) -> bool:
    """Whether this is a dataset that can be a tomogram: numbers along two or three axes in space."""
    return bool(
        isinstance(node, h5py.Dataset)
        and node.dtype.kind in "iuf"
        and node.shape
        and 0 not in node.shape
        and _space(node.shape) in (2, 3)
    )


def _find_dataset(file: Any, wanted: str | None, path: Path) -> str:
    volumes: dict[int, list[str]] = {2: [], 3: []}
    described: list[str] = []
    if wanted is not None and wanted.strip("/"):
        with suppress(KeyError, OSError):  # of a link that leads nowhere
            if _is_volume(file[wanted.strip("/")]):
                return wanted.strip("/")
    for name, node in hdf5_datasets(file):
        described.append(f"{name} ({node.dtype}, {' × '.join(map(str, node.shape or ()))})")
        # Velox writes the metadata of an image beside it, as bytes of JSON in columns.
        of_velox = name.endswith("/Metadata") and "Data" in node.parent
        if _is_volume(node) and not of_velox:
            volumes[_space(node.shape)].append(name)
    listed = ", ".join(described[:8]) + (" …" if len(described) > 8 else "") or "no dataset"
    if wanted is not None:
        raise TomogramError(
            f"the dataset '{wanted}', which hdf5_dataset asks for, must be a volume of numbers",
            place=path,
            value=listed,
            remedy="Correct hdf5_dataset, or the option --dataset",
        )
    candidates = volumes[3] or volumes[2]
    if len(candidates) != 1:
        raise TomogramError(
            "an HDF5 tomogram must have one dataset that can be a tomogram, or hdf5_dataset must say which",
            place=path,
            value=listed,
            remedy="Set hdf5_dataset, or the option --dataset, to its name"
            if candidates
            else "Check that this is the right file",
        )
    return candidates[0]


def _no_hdf5(path: Path, error: Exception) -> TomogramError:
    return TomogramError(
        "the HDF5 file must be readable",
        place=path,
        value=error,
        remedy="The file is truncated or damaged, or needs a filter that is not installed: copy it again",
    )


# --------------------------------------------------------------------------------------------------------- shared rules


def _space(shape: Sequence[int]) -> int:
    """Number of axes in space, where those before the last three count if they are longer than 1."""
    if len(_long(shape)) == 3:
        return 3
    extra = sum(size != 1 for size in shape[:-3])
    return min(len(shape), 3) + extra if 0 not in shape else 0


def _long(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes that are longer than 1: three of them are a volume's, even if a channel is the last axis."""
    return tuple(axis for axis, size in enumerate(shape) if size > 1)


def _space_axes(shape: Sequence[int], names: Sequence[str] | None, place: Path) -> tuple[int, ...]:
    """Which axes are z, y and x, or y and x: those of these names, or else the last ones."""
    if names is None:
        axes = _long(shape) if len(_long(shape)) == 3 else tuple(range(max(0, len(shape) - 3), len(shape)))
        names = ["…"] * len(shape)
    else:
        axes = tuple(names.index(axis) for axis in "zyx" if axis in names)
    others = [(names[axis], size) for axis, size in enumerate(shape) if axis not in axes and size != 1]
    if others or not 2 <= len(axes) <= 3 or 0 in shape:
        raise TomogramError(
            "must hold one volume or image, with axes of other kinds only if they have length 1",
            place=place,
            value=f"shape {tuple(shape)}" + (f", axis {others[0][0]} of length {others[0][1]}" if others else ""),
            remedy="Write each volume to a file of its own",
        )
    return axes


def _no_numbers(path: Path, dtype: object) -> TomogramError:
    return TomogramError(
        "voxels must be real numbers", place=path, value=f"dtype {dtype}", remedy="Convert them to float32"
    )


def plausible_sizes(
    sizes: Sequence[float], details: Sequence[str] = ("", "", "")
) -> tuple[tuple[float | None, ...], tuple[str, ...]]:
    """Voxel sizes as they can be, and what is to be said of the others.

    Parameters
    ----------
    sizes
        Along z, y and x (or y and x) in Å, as written.
    details
        What each was made of, for the warning.

    Returns
    -------
    sizes
        ``None`` where unset or implausible. 0 and exactly 1 are what programs write that do not know the size.
    warnings
        One for each that is implausible.
    """
    known = sorted(size for size in sizes if size > 0 and size != 1 and math.isfinite(size))
    median = known[len(known) // 2] if len(known) == 3 else None
    result: list[float | None] = []
    warnings = []
    for axis, size, detail in zip("zyx"[-len(sizes) :], sizes, details, strict=False):
        if size not in known:
            result.append(None)
        elif _PLAUSIBLE_ANGSTROM[0] <= size <= _PLAUSIBLE_ANGSTROM[1] and (
            median is None or median / 10 <= size <= median * 10
        ):
            result.append(size)
        else:
            warnings.append(f"voxel size along {axis} reads as {size:g} Å{detail}, which is implausible")
            result.append(None)
    return tuple(result), tuple(warnings)


def unknown_sizes(voxel_size: Sequence[float | None]) -> list[str]:
    """A warning where voxel sizes are unknown."""
    unknown = [axis for axis, size in zip("zyx"[-len(voxel_size) :], voxel_size, strict=True) if size is None]
    return [f"voxel size along {', '.join(unknown)} is unknown"] if unknown else []
