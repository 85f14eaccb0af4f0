"""Headers of tomograms: what all formats have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.errors import TomogramError


def native(voxels: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(voxels.real, dtype=dtype)


#: Units of OME-Zarr axes in Å: those of UDUNITS-2, which the specification requires, and others that files have.
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
    """The header of a tomogram, with every ambiguity decided.

    Attributes
    ----------
    path
        The file, or the folder of a zarr.
    kind
        Kind of file, in words: ``"MRC mode 2"``, ``"OME-Zarr 0.4, level 0"``.
    shape
        (z, y, x), or (y, x) for a single image, in voxels.
    file_bytes, modified
        Size in bytes and modification time (seconds since 1970) of the file on disk; for zarr, the uncompressed size
        of the voxels and the modification time of the metadata.
    voxel_size_angstrom
        Voxel size along each axis of `shape`, in Å; ``None`` where unknown.
    origin_angstrom, nstart
        Position of the volume in Å and in voxels, along each axis of `shape`.
    notes
        Decisions about an ambiguous header, for the log.
    warnings
        What looks wrong with the file.
    compressed
        Whether the file can only be read sequentially.
    incomplete
        What is missing, if too much is missing to segment the tomogram; otherwise empty.
    decided
        How the voxels are read, if earlier versions read them differently; outputs of those are then out of date.
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
        """Check that not too much of the tomogram is missing (see `incomplete`).

        Raises
        ------
        TomogramError
            If too much is missing.
        """
        if self.incomplete:
            raise TomogramError(
                f"at most {MOST_MISSING:.0%} of a tomogram may be missing, unless the missing part seems to be empty",
                place=self.path,
                value=self.incomplete,
                remedy="Copy it again, because this copy is incomplete, or write it with all its chunks",
            )

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the voxels when they are read, in native byte order."""

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """Shape of the chunks that are read as a whole, in voxels along the axes of `shape`; all 1 without chunks."""
        return (1,) * len(self.shape)

    @abstractmethod
    def read(self, region: Region) -> np.ndarray[Any, Any]:
        """Read a region of a file that is not `compressed`, as (z, y, x) or (y, x), in any byte order.

        Raises
        ------
        TomogramError
            If it cannot be read.
        """

    def __getitem__(self, region: Region, /) -> np.ndarray[Any, Any]:
        """Like `read`, in `dtype` and native byte order, so that the file can be sliced like an array."""
        return native(self.read(region), self.dtype)

    @property
    def placement(self) -> dict[str, Any]:
        """Voxel size and position, as `cryosiam_dask.files.mrc.write_mrc` takes them."""
        return {
            "voxel_size_angstrom": self.voxel_size_angstrom,
            "origin_angstrom": self.origin_angstrom,
            "nstart": self.nstart,
        }

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the zarr array as JSON values: axes, sizes in Å, and the source."""
        return {
            "axes": list("zyx"[-len(self.shape) :]),
            **{name: list(values) for name, values in self.placement.items()},
            "source": self.path.name,
            "source_bytes": self.file_bytes,
            "source_modified": self.modified,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


#: Maximum share of chunks that may be missing if their neighbours are not empty.
MOST_MISSING = 0.5
_NEIGHBOURS = 8  # number of neighbouring chunks that are read


def ends_abruptly(
    array: Any, fill_value: Any, chunk: Sequence[int], counts: Sequence[int], missing: set[tuple[int, ...]]
) -> Iterator[bool]:
    """Yield, for some missing chunks, whether the adjacent voxels of an existing chunk differ from the fill value."""
    beside = []
    for index in sorted(missing):
        for axis, step in product(range(len(counts)), (-1, 1)):
            other = tuple(n + step * (i == axis) for i, n in enumerate(index))
            if 0 <= other[axis] < counts[axis] and other not in missing:
                beside.append((other, axis, step))
                break
    for other, axis, step in beside[:: max(1, len(beside) // _NEIGHBOURS)]:
        region = [slice(n * c, min((n + 1) * c, size)) for n, c, size in zip(other, chunk, array.shape, strict=True)]
        face = region[axis].stop - 1 if step < 0 else region[axis].start
        region[axis] = slice(face, face + 1)
        with suppress(Exception):  # damaged chunks are reported when all chunks are read
            voxels = np.asarray(array[tuple(region)])
            fill = np.asarray(fill_value, voxels.dtype)
            yield not bool(np.all((voxels == fill) | ((voxels != voxels) & (fill != fill))))


def own_attributes(attributes: Mapping[str, Any], ndim: int) -> tuple[list[float], list[float], tuple[int, ...]]:
    """Return voxel size (Å), origin (Å) and start from attributes that this program wrote."""

    def numbers(name: str, default: float) -> list[float]:
        values = attributes.get(name)
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if not isinstance(values, list) or len(values) != ndim:
            return [default] * ndim
        known = [float(v) if isinstance(v, int | float) else default for v in values]
        return [v if math.isfinite(v) else default for v in known]

    start = tuple(int(v) for v in numbers("nstart", 0))
    return numbers("voxel_size_angstrom", math.nan), numbers("origin_angstrom", 0), start


def space(shape: Sequence[int]) -> int:
    """Return the number of spatial axes; axes before the last three count if they are longer than 1."""
    if len(_long(shape)) == 3:
        return 3
    extra = sum(size != 1 for size in shape[:-3])
    return min(len(shape), 3) + extra if 0 not in shape else 0


def _long(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes longer than 1; three of them form a volume, even if the last axis is a channel."""
    return tuple(axis for axis, size in enumerate(shape) if size > 1)


def space_axes(shape: Sequence[int], names: Sequence[str] | None, place: Path) -> tuple[int, ...]:
    """Return which axes are z, y and x, or y and x: those with these names, else the last ones."""
    if names is None:
        axes = _long(shape) if len(_long(shape)) == 3 else tuple(range(max(0, len(shape) - 3), len(shape)))
        names = ["…"] * len(shape)
    else:
        axes = tuple(names.index(axis) for axis in "zyx" if axis in names)
    others = [(names[axis], size) for axis, size in enumerate(shape) if axis not in axes and size != 1]
    if others or not 2 <= len(axes) <= 3 or 0 in shape:
        raise TomogramError(
            "must hold one volume or image; all other axes must have length 1",
            place=place,
            value=f"shape {tuple(shape)}" + (f", axis {others[0][0]} of length {others[0][1]}" if others else ""),
            remedy="Write each volume to a file of its own",
        )
    return axes


def no_numbers(path: Path, dtype: object) -> TomogramError:
    return TomogramError(
        "voxels must be real numbers", place=path, value=f"dtype {dtype}", remedy="Convert them to float32"
    )


def plausible_sizes(
    sizes: Sequence[float], details: Sequence[str] = ("", "", "")
) -> tuple[tuple[float | None, ...], tuple[str, ...]]:
    """Return the plausible voxel sizes, and warnings about the others.

    Parameters
    ----------
    sizes
        Along z, y and x (or y and x) in Å, as stored.
    details
        How each size was computed, for the warning.

    Returns
    -------
    sizes
        ``None`` where unset or implausible. Programs that do not know the size write 0 or exactly 1.
    warnings
        One for each implausible size.
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
    """Return a warning if voxel sizes are unknown."""
    unknown = [axis for axis, size in zip("zyx"[-len(voxel_size) :], voxel_size, strict=True) if size is None]
    return [f"voxel size along {', '.join(unknown)} is unknown"] if unknown else []
