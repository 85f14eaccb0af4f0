"""Read and write MRC files."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import mrcfile.utils
import numpy as np
from mrcfile.constants import IMAGE_STACK_SPACEGROUP, MAP_ID, VOLUME_SPACEGROUP
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import machine_stamp_from_byte_order, mode_from_dtype
from numpy.typing import NDArray

from cryosiam_dask.core.arrays import Region, Sliceable, regions_of, sliced
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.files.atomic import Sink, replacing, require_voxels
from cryosiam_dask.files.header import TomogramHeader, native, plausible_sizes, unknown_sizes
from cryosiam_dask.files.signatures import PACKED, name_of, resemblance_of

MRC_BLOCK = 128  # sections and rows that are in memory at once


def write_mrc(
    path: str | Path,
    labels: Sliceable,
    *,
    voxel_size_angstrom: Sequence[float | None] | None = None,
    origin_angstrom: Sequence[float] | None = None,
    nstart: Sequence[int] | None = None,
    label: str = "",
) -> None:
    """Write labels as an MRC file, replacing an earlier one atomically.

    Parameters
    ----------
    path
        The file, in an existing folder. It is never compressed.
    labels : (z, y, x) or (y, x), uint8
        Written as int8 (mode 0) if all are below 128, otherwise as uint16 (mode 6).
    voxel_size_angstrom
        Along z, y and x (or y and x); ``None`` where unknown.
    origin_angstrom, nstart
        Position of the volume in Å and in voxels, in the same order.
    label
        A line for the header, at most 80 ASCII characters.

    Raises
    ------
    OutputError
        If there are no voxels, or the file cannot be written; an earlier file is then unchanged.
    """
    require_voxels(path, labels)
    shape = labels.shape
    # Whole rows, so that a region is contiguous within each section of the file.
    regions = list(regions_of(shape, (*[MRC_BLOCK] * (len(shape) - 1), shape[-1])))
    counts = np.zeros(256, np.int64)
    for region in regions:
        counts += np.bincount(_uint8(labels[region]).ravel(), minlength=256)
    values = np.flatnonzero(counts)
    dtype = np.dtype(np.int8 if values[-1] < 128 else "<u2")

    header = _mrc_header(shape, dtype, label, voxel_size_angstrom, origin_angstrom, nstart)
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
    label: str = "",
    **placement: Any,
) -> None:
    """Write intensities as an MRC file of mode 2 (float32), replacing an earlier one atomically.

    Parameters
    ----------
    path, label, placement
        See `write_mrc`, also for the errors.
    voxels : (z, y, x) or (y, x), real numbers
        Each voxel is read once.
    """
    require_voxels(path, voxels)
    shape, dtype = voxels.shape, np.dtype("<f4")
    header = _mrc_header(shape, dtype, label, **placement)
    low, high, total, squares, count = math.inf, -math.inf, 0.0, 0.0, 0
    with replacing(Path(path), alone=True) as sink:
        for region in regions_of(shape, (*[MRC_BLOCK] * (len(shape) - 1), shape[-1])):
            block = np.asarray(voxels[region], dtype)
            _write_rows(sink, region, block, shape)
            if (finite := block[np.isfinite(block)].astype(np.float64)).size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                total, squares = total + float(finite.sum()), squares + float(finite @ finite)
                count += finite.size
        if count:  # otherwise the statistics stay 0, which means unknown
            mean = total / count
            header["dmin"], header["dmax"], header["dmean"] = low, high, mean
            header["rms"] = math.sqrt(max(0.0, squares / count - mean**2))
        sink.seek(0)
        sink.write(header.tobytes())
        sink.check()


def _mrc_header(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    label: str,
    voxel_size_angstrom: Sequence[float | None] | None = None,
    origin_angstrom: Sequence[float] | None = None,
    nstart: Sequence[int] | None = None,
) -> Any:
    """Return the header of an MRC file without statistics."""
    header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    header["mode"] = mode_from_dtype(dtype)
    header["ispg"] = VOLUME_SPACEGROUP if len(shape) == 3 else IMAGE_STACK_SPACEGROUP
    header["cellb"] = (90, 90, 90)
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["map"], header["nversion"] = MAP_ID, 20141
    header["machst"] = machine_stamp_from_byte_order("<")
    header["nz"] = header["mz"] = 1  # for an image
    for axis, size in zip("xyz", reversed(shape), strict=False):
        header[f"n{axis}"] = header[f"m{axis}"] = size
    for axis, size, voxel in zip("xyz", reversed(shape), reversed(voxel_size_angstrom or ()), strict=False):
        header["cella"][axis] = size * (voxel or 0)
    if len(shape) == 2 and voxel_size_angstrom:
        header["cella"]["z"] = voxel_size_angstrom[-1] or 0  # an image is as thick as its pixels are wide
    for axis, position in zip("xyz", reversed(origin_angstrom or ()), strict=False):
        header["origin"][axis] = position
    for axis, start in zip("xyz", reversed(nstart or ()), strict=False):
        header[f"n{axis}start"] = start
    header["nlabl"] = bool(label)
    header["label"][0] = label.encode("ascii", "replace")[:80]
    return header


def _write_rows(sink: Sink, region: Region, block: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Write a region of whole rows to its place in the file."""
    sections = block.reshape(-1, *block.shape[-2:])
    first = region[0].start if len(shape) == 3 else 0
    for z, rows in enumerate(sections, first):
        sink.seek(HEADER_DTYPE.itemsize + (z * shape[-2] + region[-2].start) * shape[-1] * block.dtype.itemsize)
        sink.write(rows.tobytes())
    sink.check()


def _uint8(values: Any) -> NDArray[np.uint8]:
    return np.asarray(values).astype(np.uint8, casting="safe", copy=False)


STREAM_BYTES = 128 * 2**20  # memory for sections of a compressed file, which can only be read sequentially
_GZIP_MAGIC = b"\x1f\x8b\x08"
_LARGEST_AXIS = 65535  # byte-swapped sizes are always larger than this, real ones never
_IMOD_STAMP = 1146047817


@dataclass(frozen=True, slots=True, kw_only=True)
class MrcHeader(TomogramHeader):
    """The header of an MRC file, with every ambiguity decided.

    Attributes
    ----------
    mode
        The MRC mode: 0, 1, 2, 4, 6 or 12.
    file_dtype
        Dtype of the voxels in the file, with their byte order, signed or unsigned.
    axes
        The axes of the file's (section, row, column) array that are z, y and x; usually (0, 1, 2).
    offset
        Position of the first voxel in the file, in bytes.
    compressed
        Whether the file is gzip-compressed.
    """

    mode: int
    file_dtype: np.dtype[Any]
    axes: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the voxels when they are read: native byte order; half precision and complex become float32."""
        if self.file_dtype.kind in "fc":
            return np.dtype(np.float32)
        return self.file_dtype.newbyteorder("=")

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the array in the file, (section, row, column)."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(len(self.shape)))

    @property
    def voxel_bytes(self) -> int:
        """Size of all voxels in the file, uncompressed."""
        return math.prod(self.shape) * self.file_dtype.itemsize

    def read(self, region: Region) -> np.ndarray[Any, Any]:
        """Read a region; see `TomogramHeader.read`."""
        return read_region_of(self, region)

    def attributes(self) -> dict[str, Any]:
        """See `TomogramHeader.attributes`; also holds the mode."""
        return {**TomogramHeader.attributes(self), "mode": self.mode}


def read_mrc_header(path: Path, unsigned: bool | None) -> MrcHeader:
    try:
        status = path.stat()
        with path.open("rb") as file:
            compressed = file.read(3) == _GZIP_MAGIC
        with open_file(path, compressed=compressed) as file:
            raw = file.read(HEADER_DTYPE.itemsize)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged_gzip(path, error) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) < HEADER_DTYPE.itemsize:
        raise TomogramError(
            f"an MRC file begins with a header of {HEADER_DTYPE.itemsize} bytes",
            place=path,
            value=f"{len(raw)} bytes",
            remedy="Copy the file again or remove it from the folder: it is empty or truncated",
        )

    notes: list[str] = []
    warnings: list[str] = []
    header, byte_order = _in_byte_order(raw, path, status.st_size, warnings)
    offset = HEADER_DTYPE.itemsize + _extended_bytes(header, path, compressed, status.st_size, warnings)
    file_dtype, decided = _voxel_dtype(header, byte_order, path, offset, compressed, unsigned, notes, warnings)
    if mrcfile.utils.spacegroup_is_volume_stack(header["ispg"]):
        raise TomogramError(
            "an MRC file must hold one volume, not a stack of volumes",
            place=path,
            value=f"space group {header['ispg']} (a 4-D stack), {header['nz']} sections",
            remedy="Write each volume to a file of its own",
        )

    # Sizes and starts in the header are those of columns, rows and sections; cell and origin are those of x, y and z.
    order = tuple(int(header[name]) for name in ("maps", "mapr", "mapc"))
    if sorted(order) != [1, 2, 3]:
        warnings.append(f"axis order (MAPS, MAPR, MAPC) = {order} is invalid; read as 3, 2, 1")
        order = (3, 2, 1)
    axes: tuple[int, ...] = tuple(order.index(axis) for axis in (3, 2, 1))
    file_shape = tuple(int(header[name]) for name in ("nz", "ny", "nx"))
    file_start = tuple(int(header[name]) for name in ("nzstart", "nystart", "nxstart"))
    shape = tuple(file_shape[axis] for axis in axes)
    nstart = tuple(file_start[axis] for axis in axes)
    if axes != (0, 1, 2):
        stored = ", ".join("xyz"[axis - 1] for axis in order)
        notes.append(f"stored with the axes {stored} (sections, rows, columns): transposed to z, y, x")
    voxel_size = _voxel_size(header, warnings)
    origin = tuple(float(header["origin"][axis]) for axis in "zyx")
    if not all(map(math.isfinite, origin)):
        warnings.append(f"origin {origin} is not finite; read as 0")
        origin = (0.0, 0.0, 0.0)
    if header["ispg"] == IMAGE_STACK_SPACEGROUP and file_shape[0] == 1 and axes[0] == 0:  # a single image
        shape, nstart, voxel_size, origin = shape[1:], nstart[1:], voxel_size[1:], origin[1:]
        axes = tuple(axis - 1 for axis in axes[1:])

    warnings += unknown_sizes(voxel_size)

    result = MrcHeader(
        path=path,
        kind=f"MRC mode {header['mode']}",
        shape=shape,
        mode=int(header["mode"]),
        file_dtype=file_dtype,
        axes=axes,
        offset=offset,
        compressed=compressed,
        file_bytes=status.st_size,
        modified=status.st_mtime,
        voxel_size_angstrom=voxel_size,
        origin_angstrom=origin,
        nstart=nstart,
        notes=tuple(notes),
        decided=decided,
        warnings=tuple(warnings),
    )
    missing = result.offset + result.voxel_bytes - status.st_size
    if compressed or missing == 0:
        return result
    if missing > 0:
        raise _too_short(result, status.st_size)
    return replace(result, warnings=(*result.warnings, f"{-missing} bytes after the voxels are ignored"))


def open_file(path: Path, *, compressed: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if compressed else path.open("rb"))


def _in_byte_order(raw: bytes, path: Path, file_bytes: int, warnings: list[str]) -> tuple[Any, str]:
    """Interpret the header in the byte order of its machine stamp or, if that makes no sense, in the other one."""
    header = np.frombuffer(raw, HEADER_DTYPE)[0]
    if bytes(header["map"])[:3] != MAP_ID[:3]:
        warnings.append("no MAP identifier in the header")
    stamp = mrcfile.utils.pretty_machine_stamp(header["machst"])
    orders = "<>"
    try:
        if mrcfile.utils.byte_order_from_machine_stamp(header["machst"]) == ">":
            orders = "><"
        known = True
    except ValueError:
        known = False
    # A negative length of the extended header makes a byte order unlikely; it is accepted if no other one makes sense.
    for least, order in itertools.product((0, -(2**31)), orders):
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        sizes = [int(header[name]) for name in ("nx", "ny", "nz")]
        # Modes and sizes are small numbers, and huge ones in the wrong byte order.
        if (
            all(1 <= size <= _LARGEST_AXIS for size in sizes)
            and 0 <= header["mode"] < 256
            and header["nsymbt"] >= least
        ):
            if not known or order != orders[0]:
                read = "little" if order == "<" else "big"
                warnings.append(f"machine stamp {stamp} is unknown or wrong; read as {read}-endian")
            return header, order
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(orders[0]))[0]
    remedy = "Remove the file from the folder or write it again: it is damaged, or not an MRC file"
    if name_of(path) in PACKED:
        remedy = "Decompress it: gzip is the only compression that is read"
    raise TomogramError(
        f"an MRC header must have three sizes from 1 to {_LARGEST_AXIS} and a mode",
        place=path,
        value=f"sizes {tuple(int(header[name]) for name in ('nx', 'ny', 'nz'))}, mode {header['mode']} "
        f"in a file of {file_bytes} bytes{resemblance_of(path)}",
        remedy=remedy,
    )


def _extended_bytes(header: Any, path: Path, compressed: bool, file_bytes: int, warnings: list[str]) -> int:
    """Return the length of the extended header: as the header states, but 0 if the voxels fill the file."""
    counted = int(header["nsymbt"])
    try:
        itemsize = mrcfile.utils.dtype_from_mode(header["mode"]).itemsize
    except ValueError:  # `_voxel_dtype` raises the error
        return max(0, counted)
    whole = HEADER_DTYPE.itemsize + math.prod(int(header[name]) for name in ("nx", "ny", "nz")) * itemsize
    if compressed and counted:
        with path.open("rb") as file:  # gzip ends with the size of what it holds, modulo 2³²
            file.seek(-4, os.SEEK_END)
            fills = int.from_bytes(file.read(4), "little") == whole % 2**32
    else:
        fills = file_bytes == whole
    if counted and fills:
        warnings.append(
            f"the header announces an extended header of {counted} bytes (nsymbt) that is not in the file; this is "
            "ignored, because all voxels are there"
        )
        return 0
    if counted < 0:
        raise TomogramError(
            "the length of the extended header (nsymbt) must not be negative",
            place=path,
            value=counted,
            remedy="Copy the file or write it again: its header is damaged",
        )
    return counted


def _voxel_dtype(
    header: Any,
    byte_order: str,
    path: Path,
    offset: int,
    compressed: bool,
    unsigned: bool | None,
    notes: list[str],
    warnings: list[str],
) -> tuple[np.dtype[Any], str]:
    """Return the dtype of the voxels in the file, and `TomogramHeader.decided`; mode 0 may be signed or unsigned."""
    mode = int(header["mode"])
    extra = np.frombuffer(header["extra2"].tobytes(), byte_order + "i4")
    stamp, flags = int(extra[10]), int(extra[11])  # bytes 152 and 156 of the file, after 112 bytes of header
    half_bytes = mode == 101 or (mode == 0 and stamp == _IMOD_STAMP and bool(flags & 16))
    try:
        if half_bytes:
            raise ValueError
        dtype: np.dtype[Any] = mrcfile.utils.dtype_from_mode(mode).newbyteorder(byte_order)
    except ValueError:
        raise TomogramError(
            "the MRC mode must be 0, 1, 2, 4, 6 or 12",
            place=path,
            value=f"mode {mode}" + (" with 4-bit voxels" if half_bytes else ""),
            remedy="Convert the file, for example with IMOD: newstack -mode 2 IN OUT",
        ) from None
    if mode == 4:
        warnings.append("complex voxels: only their real part is used")
    if mode != 0:
        return dtype, ""
    decided = ""
    lowest, highest = float(header["dmin"]), float(header["dmax"])
    if unsigned is not None:
        signed, why = not unsigned, f"because mrc_unsigned is {unsigned}"
    elif stamp == _IMOD_STAMP:
        signed, why = bool(flags & 1), "because of IMOD's flags"
    elif highest > 127:
        signed, why = False, f"because the header's maximum is {highest:g} > 127"
    else:
        signed, why = True, "as in the standard: neither IMOD's flags nor the header's maximum contradict it"
        found = _some_bytes(path, offset, compressed)
        looks_unsigned = _look_unsigned(found)
        # In MRC2014 a maximum below the minimum means that there are no statistics; older programs leave zeros.
        if (not lowest <= highest or lowest == highest == 0) and (found > 127).any():
            if looks_unsigned is not None:
                signed, why = not looks_unsigned, "judging by its voxels: the header has no statistics"
                decided = "" if signed else "unsigned bytes"
            reading = "signed" if signed else "unsigned"
            look = "" if looks_unsigned is None else ", judging by its voxels"
            warnings.append(
                f"mode 0 without statistics in the header is read as {reading} bytes{look}. Set mrc_unsigned "
                f"to {signed} if that is wrong, to {not signed} if it is right"
            )
        elif looks_unsigned:
            warnings.append(
                f"mode 0 is read as signed bytes, because of the header's statistics ({lowest:g} to {highest:g}), but "
                "the voxels look unsigned. If they are, bright voxels are read as dark ones: set mrc_unsigned to True"
            )
    notes.append(f"mode 0 read as {'signed' if signed else 'unsigned'} bytes, {why}")
    return np.dtype(np.int8 if signed else np.uint8), decided


def _some_bytes(path: Path, offset: int, compressed: bool) -> np.ndarray[Any, Any]:
    """Return a sample of a file's bytes, or the beginning of a compressed file. Damage is reported when all is read."""
    parts: list[bytes] = []
    with suppress(OSError, EOFError, zlib.error), open_file(path, compressed=compressed) as file:
        if compressed:
            file.seek(offset)
            parts.append(file.read(_SAMPLES * _SAMPLE_BYTES))
        else:
            rest = max(0, path.stat().st_size - offset - _SAMPLE_BYTES)
            for number in range(_SAMPLES):
                file.seek(offset + rest * number // (_SAMPLES - 1))
                parts.append(file.read(_SAMPLE_BYTES))
    return np.frombuffer(b"".join(parts), np.uint8)


_SAMPLES, _SAMPLE_BYTES = 64, 1 << 15


def _look_unsigned(found: np.ndarray[Any, Any]) -> bool | None:
    """Whether bytes look like unsigned numbers; ``None`` if that cannot be decided.

    The two interpretations cut the circle of the 256 byte values at different places: unsigned numbers between 255 and
    0, signed ones between 127 and -128. Next to the right cut there are few voxels, at least on one side. The values
    directly at a cut do not count, because clipped voxels accumulate there.
    """
    counts = np.bincount(found, minlength=256)
    of_unsigned = min(counts[1:16].sum(), counts[240:255].sum())  # around 255 | 0
    of_signed = min(counts[112:127].sum(), counts[129:144].sum())  # around 127 | -128
    if abs(int(of_unsigned) - int(of_signed)) > 3 * math.sqrt(of_unsigned + of_signed):
        return bool(of_unsigned < of_signed)
    if (of_unsigned and of_signed) or not counts[128:].any():
        return None
    # Neither cut has voxels on both sides: a mask with two values, or numbers that are all above or all below 127.
    return bool(counts[0] and counts[255] and not counts[1:255].any()) or not counts[:128].any()


def _voxel_size(header: Any, warnings: list[str]) -> tuple[float | None, ...]:
    """Return cell / samples along z, y and x in Å; ``None`` where unset or, with a warning, implausible."""
    cells = [float(header["cella"][axis]) for axis in "zyx"]
    samples = [int(header[name]) for name in ("mz", "my", "mx")]
    sizes = [cell / count if count > 0 else math.nan for cell, count in zip(cells, samples, strict=True)]
    details = [f" (cell {cell:g} Å, {count} samples)" for cell, count in zip(cells, samples, strict=True)]
    result, implausible = plausible_sizes(sizes, details)
    warnings += implausible
    found = list(result)
    for axis, name in enumerate(("nz", "ny", "nx")):
        others = [size for other, size in enumerate(sizes) if other != axis and size > 0]
        # With one sample, the cell may be that of a whole stack of images.
        if found[axis] and samples[axis] == 1 < header[name] and not all(0.9 < sizes[axis] / s < 1.1 for s in others):
            warnings.append(f"the header does not give the voxel size along {'zyx'[axis]}{details[axis]}")
            found[axis] = None
    return tuple(found)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)  # HDF5 and gzip have no errno


def unreadable(path: Path, error: OSError) -> TomogramError:
    if isinstance(error, FileNotFoundError) and not path.is_symlink():
        return TomogramError("does not exist", place=path, remedy="Check the path")
    return TomogramError(
        "the tomogram must be a readable file", place=path, value=_reason(error), remedy="Check path and permissions"
    )


def _too_short(header: MrcHeader, found: int) -> TomogramError:
    size = " × ".join(map(str, header.shape))
    return TomogramError(
        f"{size} voxels of mode {header.mode} need {header.offset + header.voxel_bytes} bytes with the header",
        place=header.path,
        value=f"{found} bytes",
        remedy="Copy the file or write it again: it is truncated",
    )


def _damaged_gzip(path: Path, error: Exception) -> TomogramError:
    return TomogramError(
        "a compressed tomogram must be a complete gzip file",
        place=path,
        value=str(error),
        remedy="Copy the file or compress it again: it is truncated or damaged",
    )


def read_beginning(header: MrcHeader, largest: int = STREAM_BYTES) -> np.ndarray[Any, Any]:
    """Read the first sections of a compressed file.

    Parameters
    ----------
    header
        From `read_header`.
    largest
        Maximum uncompressed bytes of the sections; at least one section is read.

    Returns
    -------
    ndarray, (z, y, x) or (y, x), ``header.dtype``
        The sections, along the axis ``header.axes.index(0)``.

    Raises
    ------
    TomogramError
        If the part of the file that was read is unreadable, damaged or too short.
    """
    section_bytes = header.voxel_bytes // header.file_shape[0]
    count = min(header.file_shape[0], max(1, largest // section_bytes))
    layers = read_layers(header, count, section_bytes)
    _, layer = next(layers)
    if count == header.file_shape[0]:
        next(layers, None)  # checks the checksum at the end of the file
    voxels = np.frombuffer(layer, header.file_dtype).reshape(count, *header.file_shape[1:])
    return native(voxels.transpose(header.axes), header.dtype)


def read_region_of(header: MrcHeader, region: Region) -> np.ndarray[Any, Any]:
    """Read a region of an uncompressed file, as (z, y, x).

    Whole rows are read and then cropped. A memory map would make that unnecessary, but its pages count as memory of the
    process, and a file that shrinks in the meantime would kill the process.
    """
    stored = [region[header.axes.index(axis)] for axis in range(len(region))]  # (section, row, column) or (row, column)
    sections = range(stored[0].start, stored[0].stop) if len(stored) == 3 else range(1)
    rows, columns = stored[-2:]
    height, width = header.file_shape[-2:]
    voxels = np.empty((len(sections), rows.stop - rows.start, columns.stop - columns.start), header.file_dtype)
    whole = np.empty((rows.stop - rows.start, width), header.file_dtype)
    try:
        with header.path.open("rb") as file:
            for voxels_of_section, section in zip(voxels, sections, strict=True):
                file.seek(header.offset + (section * height + rows.start) * width * header.file_dtype.itemsize)
                run: Any = voxels_of_section if voxels_of_section.shape == whole.shape else whole
                if file.readinto(run.view(np.uint8)) < run.nbytes:  # truncated since its header was read
                    raise _too_short(header, header.path.stat().st_size)
                if run is whole:
                    voxels_of_section[:] = whole[:, columns]
    except OSError as error:
        raise unreadable(header.path, error) from error
    return voxels.reshape([s.stop - s.start for s in stored]).transpose(header.axes)


@dataclass(frozen=True, slots=True)
class MrcVoxels:
    """The voxels of an uncompressed MRC file as an array that is read a region at a time, and can be sent to workers.

    Attributes
    ----------
    header
        Header of the file; see `in_place`.
    """

    header: MrcHeader

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x) or (y, x)."""
        return self.header.shape

    @property
    def ndim(self) -> int:
        """Number of axes, 2 or 3."""
        return len(self.header.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the voxels when they are read."""
        return self.header.dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of the regions that are read fastest: whole rows of a section."""
        *sections, rows, columns = self.header.shape
        return (*(1 for _ in sections), min(rows, 512), columns)

    def __getitem__(self, region: Any, /) -> np.ndarray[Any, Any]:
        return sliced(self.header.__getitem__, self.shape, self.dtype, region)


def require_unchanged(header: TomogramHeader) -> None:
    """Check that a file (not a zarr) has not changed since its header was read.

    Raises
    ------
    TomogramError
        If it has been removed, replaced or written to.
    """
    try:
        with header.path.open("rb") as file:  # opened, because a network disk may report an outdated time before
            found = os.fstat(file.fileno())
    except OSError as error:
        raise unreadable(header.path, error) from error
    if (found.st_size, found.st_mtime) != (header.file_bytes, header.modified):
        raise TomogramError(
            "a tomogram must not change while it is segmented",
            place=header.path,
            value="a size or time that differs from the start",
            remedy="Repeat the command: unless only the time has changed, the tomogram starts from the beginning",
        )


def in_place(header: TomogramHeader) -> bool:
    """Whether a tomogram can be read in place fast enough: an uncompressed MRC file with sections along z."""
    return isinstance(header, MrcHeader) and not header.compressed and header.axes == tuple(range(len(header.shape)))


def read_layers(header: MrcHeader, depth: int, section_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (first section, bytes of up to `depth` sections) of a compressed file."""
    read = 0
    try:
        with open_file(header.path, compressed=True) as file:
            read = len(file.read(header.offset))
            for first in range(0, header.file_shape[0], depth):
                wanted = min(depth, header.file_shape[0] - first) * section_bytes
                layer = file.read(wanted)
                read += len(layer)
                if len(layer) < wanted:
                    raise _too_short(header, read)
                yield first, layer
            while file.read(2**20):  # the checksum is at the end of the stream
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged_gzip(header.path, error) from error
    except OSError as error:
        raise unreadable(header.path, error) from error
