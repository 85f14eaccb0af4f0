"""Tomogram files (MRC and its relatives, HDF5, zarr) to chunked zarr arrays.

1. `read_header` tells by its content what a file is. Of MRC it reads the 1024-byte header, decides what the file really
   holds (byte order, signedness, axis order, voxel size) and refuses what cannot be read. It touches no voxel, so it is
   cheap enough to check hundreds of files before a run. The headers of others are in `cryosiam_dask.files.tomogram`.
2. `ingest` creates a zarr array with all its metadata, lets every task of an executor fill whole chunks of it, and adds
   the statistics of the voxels at the end: an array without the attribute ``statistics`` is not complete. What is
   stored as zarr already is not copied: every task only looks at voxels for the statistics.
3. `convert` always copies, to a path of its own, which appears complete or not at all.

Arrays are always (z, y, x), or (y, x) for an image; triples of voxel sizes and positions are in the same order.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import mrcfile.utils
import numpy as np
import zarr
from mrcfile.constants import IMAGE_STACK_SPACEGROUP, MAP_ID
from mrcfile.dtypes import HEADER_DTYPE
from zarr.codecs import BloscCodec
from zarr.storage import StoreLike

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.core.local_store import AnyDiskStore
from cryosiam_dask.errors import OutputError, TomogramError, not_written
from cryosiam_dask.files.folders import replacing_folder
from cryosiam_dask.files.tomogram import (
    HDF5_ENDINGS,
    TomogramHeader,
    Voxels,
    ZarrHeader,
    is_hdf5,
    is_zarr,
    plausible_sizes,
    read_hdf5_header,
    read_region,
    read_zarr_header,
    unknown_sizes,
)

CHUNK = 128  # voxels along each axis
PIECE_BYTES = 64 * 2**20  # what a task reads and writes at once
STREAM_BYTES = 128 * 2**20  # what a compressed file, which can only be read in order, may hold in memory
COMPRESSOR = BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle")  # the work store is written once and read twice

_GZIP_MAGIC = b"\x1f\x8b\x08"
_LARGEST_AXIS = 65535  # byte-swapped sizes are always larger than this, real ones never
_IMOD_STAMP = 1146047817
#: Of names of MRC files.
MRC_ENDINGS = (".mrc", ".rec", ".map", ".st", ".mrcs", ".ali", ".preali")
#: Of all names that a tomogram may have; what it is, is told by its content.
TOMOGRAM_ENDINGS = (
    ".ome.zarr", ".zarr", *(f"{ending}{packed}" for ending in MRC_ENDINGS for packed in ("", ".gz")), *HDF5_ENDINGS
)  # fmt: skip
#: Files of other kinds that carry a tomogram's name, by their first bytes.
_SIGNATURES = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"PK\3\4": "ZIP",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"\x89HDF": "HDF5",
    b"%PDF": "PDF",
    b"<": "HTML or XML",
    b"version https://git-lfs": "Git LFS pointer",
}
_PACKED = ("bzip2 does", "xz does", "zstd does", "ZIP does")


@dataclass(frozen=True, slots=True, kw_only=True)
class MrcHeader(TomogramHeader):
    """What an MRC file holds.

    Attributes
    ----------
    mode
        The MRC mode: 0, 1, 2, 4, 6 or 12.
    file_dtype
        Of the voxels in the file, with byte order and the signedness decided on.
    axes
        Which axis of the file's (section, row, column) array is z, y and x; (0, 1, 2) as a rule.
    offset
        Where the voxels begin, in bytes.
    compressed
        Whether the file is gzip-compressed.
    """

    mode: int
    file_dtype: np.dtype[Any]
    axes: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the voxels in the zarr array: native byte order, complex voxels as their real part, no half precision."""
        if self.file_dtype.kind in "fc":
            return np.dtype(np.float32)
        return self.file_dtype.newbyteorder("=")

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the array in the file, before its axes are brought into order."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(len(self.shape)))

    @property
    def voxel_bytes(self) -> int:
        """Size of all voxels in the file, uncompressed."""
        return math.prod(self.shape) * self.file_dtype.itemsize

    def read(self, region: Region) -> np.ndarray[Any, Any]:
        """Read a region; see `TomogramHeader.read`."""
        return _read(self, region)

    def attributes(self) -> dict[str, Any]:
        """Also the mode; see `TomogramHeader.attributes`."""
        return {**TomogramHeader.attributes(self), "mode": self.mode}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Minimum, maximum and mean of the finite voxels (``None`` without any) and the number of the others."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    non_finite: int

    def attributes(self) -> dict[str, float | int | None]:
        """The same as JSON values."""
        return {"min": self.minimum, "max": self.maximum, "mean": self.mean, "non_finite_voxels": self.non_finite}


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What `ingest` found; `warnings` are those of the header and of the voxels."""

    header: TomogramHeader
    statistics: Statistics
    warnings: tuple[str, ...]


def stem(path: str | Path) -> str:
    """Name of a tomogram: the file name without ``.gz`` and then without its last extension.

    Examples
    --------
    >>> stem("/data/x.mrc.d/TS_018_9.96Apx.mrc.gz")
    'TS_018_9.96Apx'
    """
    name = Path(path).name
    return Path(name.removesuffix(".gz")).stem


# ---------------------------------------------------------------------------------------------------------- the header


def read_header(
    path: str | Path, *, level: int = 0, dataset: str | None = None, unsigned: bool | None = None
) -> TomogramHeader:
    """Read and judge the header of a tomogram.

    Parameters
    ----------
    path
        An MRC or REC file (``.mrc``, ``.rec``, ``.map``, ``.st``, each also ``.gz``), an HDF5 file, or the folder of a
        zarr array or OME-Zarr image. Which it is, and whether it is compressed, is told by its content.
    level
        Which level of an OME-Zarr image; 0 is full resolution.
    dataset
        Which dataset of an HDF5 file; ``None``: the only one that can be a tomogram.
    unsigned
        Whether the bytes of an MRC file of mode 0 are unsigned; ``None``: as the file says, or else its voxels.

    Returns
    -------
    TomogramHeader
        With all decisions taken; odd but readable headers leave a warning in it.

    Raises
    ------
    TomogramError
        If the file cannot be opened, is none of these, is shorter than its header says, or is of a kind that is not
        supported (4-bit and RGB voxels, stacks of volumes). A compressed file's length is known only when it is read.
    """
    path = Path(path)
    try:
        if path.is_dir() and (is_zarr(path) or path.suffix == ".zarr"):
            return read_zarr_header(path, level=level)
        if path.is_file() and is_hdf5(path):
            return _as_named(read_hdf5_header(path, dataset=dataset), "HDF5", path.suffix.lower() in HDF5_ENDINGS)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        header = _read_mrc_header(path, unsigned)
    except TomogramError as error:
        if path.suffix.lower() not in HDF5_ENDINGS or not path.is_file():
            raise
        raise TomogramError(
            f"a file whose name ends with {path.suffix} must be an HDF5 file",
            place=path,
            value=f"{path.stat().st_size} bytes of another kind{_resemblance(path)}",
            remedy="The file is damaged or of another kind: copy it again, or give it its own ending",
        ) from error
    return _as_named(header, "MRC", path.suffix.lower() not in (*HDF5_ENDINGS, ".zarr"))


def _as_named(header: TomogramHeader, kind: str, agrees: bool) -> TomogramHeader:
    """Warn of a file whose name says another kind than its content."""
    if agrees:
        return header
    warning = f"the name ends with {header.path.suffix}, but the content is {kind} and is read as such"
    return replace(header, warnings=(*header.warnings, warning))


def _resemblance(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(32).lstrip()
    return next((f", which begin as {kind} does" for start, kind in _SIGNATURES.items() if first.startswith(start)), "")


def _read_mrc_header(path: Path, unsigned: bool | None) -> MrcHeader:
    try:
        status = path.stat()
        with path.open("rb") as file:
            compressed = file.read(3) == _GZIP_MAGIC
        with _open(path, compressed=compressed) as file:
            raw = file.read(HEADER_DTYPE.itemsize)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged_gzip(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(raw) < HEADER_DTYPE.itemsize:
        raise TomogramError(
            f"an MRC file begins with a header of {HEADER_DTYPE.itemsize} bytes",
            place=path,
            value=f"{len(raw)} bytes",
            remedy="The file is empty or truncated: copy it again or take it out of the folder",
        )

    notes: list[str] = []
    warnings: list[str] = []
    header, byte_order = _in_byte_order(raw, path, status.st_size, warnings)
    offset = HEADER_DTYPE.itemsize + _extended_bytes(header, path, compressed, status.st_size, warnings)
    file_dtype, decided = _voxel_dtype(header, byte_order, path, offset, compressed, unsigned, notes, warnings)
    if mrcfile.utils.spacegroup_is_volume_stack(header["ispg"]):
        raise TomogramError(
            "must hold one volume, not a stack of volumes",
            place=path,
            value=f"space group {header['ispg']} (a 4-D stack), {header['nz']} sections",
            remedy="Write each volume to a file of its own",
        )

    # The header speaks of columns, rows and sections (nx, ny, nz and nxstart ...) or of x, y and z (cell and origin).
    order = tuple(int(header[name]) for name in ("maps", "mapr", "mapc"))
    if sorted(order) != [1, 2, 3]:
        warnings.append(f"axis order (MAPS, MAPR, MAPC) = {order} is no order; taken as 3, 2, 1")
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
        warnings.append(f"origin {origin} is not finite; taken as 0")
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


def _open(path: Path, *, compressed: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if compressed else path.open("rb"))


def _in_byte_order(raw: bytes, path: Path, file_bytes: int, warnings: list[str]) -> tuple[Any, str]:
    """Interpret the header in the byte order of its machine stamp, or in the one in which it makes sense."""
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
    # A negative length of the extended header speaks against an order, but not where the other one makes no sense.
    for least, order in itertools.product((0, -(2**31)), orders):
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        sizes = [int(header[name]) for name in ("nx", "ny", "nz")]
        # Modes are small numbers: in the wrong byte order they are huge, as the sizes are.
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
    resemblance = _resemblance(path)
    remedy = "This is no MRC file, or a damaged one: take it out of the folder or write it again"
    if resemblance.endswith(_PACKED):
        remedy = "Decompress it: of compressed files only those of gzip are read"
    raise TomogramError(
        f"an MRC header gives three sizes from 1 to {_LARGEST_AXIS} and a mode",
        place=path,
        value=f"sizes {tuple(int(header[name]) for name in ('nx', 'ny', 'nz'))}, mode {header['mode']} "
        f"in a file of {file_bytes} bytes{resemblance}",
        remedy=remedy,
    )


def _extended_bytes(header: Any, path: Path, compressed: bool, file_bytes: int, warnings: list[str]) -> int:
    """Bytes between the header and the voxels: as many as the header counts, none where the voxels fill the file."""
    counted = int(header["nsymbt"])
    try:
        itemsize = mrcfile.utils.dtype_from_mode(header["mode"]).itemsize
    except ValueError:  # which is said next
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
            f"the header counts an extended header of {counted} bytes (nsymbt) that is not in the file; the voxels, "
            "which are all there, are read"
        )
        return 0
    if counted < 0:
        raise TomogramError(
            "the length of the extended header (nsymbt) must not be negative",
            place=path,
            value=counted,
            remedy="The header is damaged: copy the file or write it again",
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
    """Dtype of the voxels in the file; mode 0 is signed or unsigned. Also `TomogramHeader.decided`."""
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
        signed, why = not unsigned, f"as mrc_unsigned: {unsigned} says"
    elif stamp == _IMOD_STAMP:
        signed, why = bool(flags & 1), "as IMOD's flags say"
    elif highest > 127:
        signed, why = False, f"because the header's maximum is {highest:g} > 127"
    else:
        signed, why = True, "as the standard says: neither IMOD's flags nor the header's maximum tells otherwise"
        found = _some_bytes(path, offset, compressed)
        looks_unsigned = _look_unsigned(found)
        # MRC2014: a maximum below the minimum says that nobody looked; programs of before leave zeros.
        if (not lowest <= highest or lowest == highest == 0) and (found > 127).any():
            if looks_unsigned is not None:
                signed, why = not looks_unsigned, "as its voxels look: the header has no statistics of them"
                decided = "" if signed else "unsigned bytes"
            reading = "signed" if signed else "unsigned"
            look = "" if looks_unsigned is None else ", as its voxels look"
            warnings.append(
                f"mode 0 without statistics in the header is read as {reading} bytes{look}. Set mrc_unsigned "
                f"to {signed} if that is wrong, to {not signed} if it is right"
            )
        elif looks_unsigned:
            warnings.append(
                f"mode 0 is read as signed bytes, as the header's statistics say ({lowest:g} to {highest:g}), but the "
                "voxels look like unsigned ones: bright ones may be taken for dark ones. Set mrc_unsigned to True if so"
            )
    notes.append(f"mode 0 read as {'signed' if signed else 'unsigned'} bytes, {why}")
    return np.dtype(np.int8 if signed else np.uint8), decided


def _some_bytes(path: Path, offset: int, compressed: bool) -> np.ndarray[Any, Any]:
    """Bytes from all over a file, or from the beginning of a compressed one; whoever reads all says what is damaged."""
    parts: list[bytes] = []
    with suppress(OSError, EOFError, zlib.error), _open(path, compressed=compressed) as file:
        if compressed:
            file.seek(offset)
            parts.append(file.read(_LOOK_PIECES * _LOOK_BYTES))
        else:
            rest = max(0, path.stat().st_size - offset - _LOOK_BYTES)
            for number in range(_LOOK_PIECES):
                file.seek(offset + rest * number // (_LOOK_PIECES - 1))
                parts.append(file.read(_LOOK_BYTES))
    return np.frombuffer(b"".join(parts), np.uint8)


_LOOK_PIECES, _LOOK_BYTES = 64, 1 << 15


def _look_unsigned(found: np.ndarray[Any, Any]) -> bool | None:
    """Whether bytes look like unsigned numbers; ``None`` where nothing tells.

    On the circle of the 256 bytes the right reading is cut open where few voxels are, or at one end of them: the wrong
    one has many voxels on both sides of the cut. What was clipped heaps up beside the right cut, and is not counted.
    """
    counts = np.bincount(found, minlength=256)
    of_unsigned = min(counts[1:16].sum(), counts[240:255].sum())  # around 255 | 0
    of_signed = min(counts[112:127].sum(), counts[129:144].sum())  # around 127 | -128
    if abs(int(of_unsigned) - int(of_signed)) > 3 * math.sqrt(of_unsigned + of_signed):
        return bool(of_unsigned < of_signed)
    if (of_unsigned and of_signed) or not counts[128:].any():
        return None
    # Nothing is on both sides of either cut: two values of a mask, or all on one side of zero, which nobody writes.
    return bool(counts[0] and counts[255] and not counts[1:255].any()) or not counts[:128].any()


def _voxel_size(header: Any, warnings: list[str]) -> tuple[float | None, ...]:
    """Cell divided by samples along z, y and x in Å; ``None`` where unset, and, with a warning, where implausible."""
    cells = [float(header["cella"][axis]) for axis in "zyx"]
    samples = [int(header[name]) for name in ("mz", "my", "mx")]
    sizes = [cell / count if count > 0 else math.nan for cell, count in zip(cells, samples, strict=True)]
    details = [f" (cell {cell:g} Å, {count} samples)" for cell, count in zip(cells, samples, strict=True)]
    result, implausible = plausible_sizes(sizes, details)
    warnings += implausible
    found = list(result)
    for axis, name in enumerate(("nz", "ny", "nx")):
        others = [size for other, size in enumerate(sizes) if other != axis and size > 0]
        # One sample stands for an image, of which there may be many: the cell is then that of all of them.
        if found[axis] and samples[axis] == 1 < header[name] and not all(0.9 < sizes[axis] / s < 1.1 for s in others):
            warnings.append(f"voxel size along {'zyx'[axis]} is not told by the header{details[axis]}")
            found[axis] = None
    return tuple(found)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)  # HDF5 and gzip have words of their own


def _unreadable(path: Path, error: OSError) -> TomogramError:
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
        remedy="The file is truncated: copy it or write it again",
    )


def _damaged_gzip(path: Path, error: Exception) -> TomogramError:
    return TomogramError(
        "a compressed tomogram must be a complete gzip file",
        place=path,
        value=str(error),
        remedy="The file is truncated or damaged: copy it or compress it again",
    )


# ---------------------------------------------------------------------------------------------------------- the voxels


def ingest(
    source: str | Path,
    store: StoreLike,
    *,
    name: str | None = "tomogram",
    chunks: Sequence[int] | None = None,
    compress: bool = True,
    level: int = 0,
    dataset: str | None = None,
    unsigned: bool | None = None,
    executor: Executor = SERIAL,
) -> tuple[Voxels, IngestReport]:
    """Fill a new zarr array with the voxels of a tomogram file, or open the one in which they are stored already.

    Parameters
    ----------
    source, level, dataset, unsigned
        The file; see `read_header`. A zarr is read where it is, and nothing is written.
    store
        Where the array goes: a path, a zarr store, or anything else that zarr takes for one. Tasks that run in other
        processes must be able to reach it.
    name
        Path of the array within the store; ``None`` makes it the store's root. An array of that name is replaced.
    chunks
        Voxels of a chunk along each axis; 128 as a rule, fewer along the sections of a compressed file of large
        sections, which is read in order and a chunk's depth at a time.
    compress
        Whether to compress the voxels. Floats hardly shrink, and are read faster without.
    executor
        Runs one task for each row of chunks, or a single one for a compressed file. A task holds about 200 MB.

    Returns
    -------
    array : zarr.Array, (z, y, x) or (y, x)
        int8, uint8, int16, uint16 or float32 voxels of an MRC file, and the dtype of any other, as stored and
        non-finite ones included. Its attributes are those of `TomogramHeader.attributes` and ``statistics``. A source
        that is zarr is given as it is, read-only, or as an `cryosiam_dask.files.tomogram.ArrayView`.
    report : IngestReport
        The header, the statistics and all warnings.

    Raises
    ------
    TomogramError
        If the file cannot be read; a header that tells so is refused before anything is written.
    OutputError
        If the store cannot be written.
    """
    header = read_header(source, level=level, dataset=dataset, unsigned=unsigned)
    if isinstance(header, ZarrHeader):
        voxels = header.open()
        statistics = _stored_statistics(header, voxels, executor)
    else:
        voxels, statistics = _fill(header, store, name, chunks, compress, executor)
    return voxels, _report(header, statistics)


def _report(header: TomogramHeader, statistics: Statistics) -> IngestReport:
    warnings = header.warnings
    if statistics.non_finite:
        warnings += (f"{statistics.non_finite} voxels are NaN or infinite; they are treated as the minimum",)
    return IngestReport(header, statistics, warnings)


def _fill(
    header: TomogramHeader,
    store: StoreLike,
    name: str | None,
    chunks: Sequence[int] | None,
    compress: bool,
    executor: Executor,
) -> tuple[zarr.Array[Any], Statistics]:
    if isinstance(store, str | Path):
        store = AnyDiskStore(store)
    try:
        array = zarr.create_array(
            store,
            name=name,
            shape=header.shape,
            chunks=_chunks(header) if chunks is None else tuple(chunks),
            dtype=header.dtype,
            compressors=COMPRESSOR if compress else None,
            fill_value=0,
            dimension_names=list("zyx"[-len(header.shape) :]),
            attributes=header.attributes(),
            overwrite=True,
        )
        parts: Iterable[_Part]
        if isinstance(header, MrcHeader) and header.compressed:
            (parts,) = executor.map(partial(_stream, array=array), [header], name="ingest")
        else:
            copied = executor.map(partial(_copy_row, header=header, array=array), _rows(header, array), name="ingest")
            parts = itertools.chain.from_iterable(copied)
        statistics = _merge(parts)
        array.update_attributes({"statistics": statistics.attributes()})
    except OSError as error:
        raise not_written(
            error,
            "the converted tomogram must be writable",
            place=getattr(store, "root", store),
            remedy="Free space on the disk, check the permissions, or choose another place",
        ) from error
    return array, statistics


def _stored_statistics(header: ZarrHeader, voxels: Voxels, executor: Executor) -> Statistics:
    """Statistics of a zarr array: its own where it carries them, and otherwise of a look at all voxels."""
    own = header.statistics
    if own:
        return Statistics(own["min"], own["max"], own["mean"], own["non_finite_voxels"])
    # Whole chunks, about as much at once as a task copies.
    step = list(voxels.chunks)
    for axis in reversed(range(len(step))):
        room = PIECE_BYTES // (math.prod(step) * header.dtype.itemsize)
        step[axis] *= max(1, min(room, -(-header.shape[axis] // step[axis])))
    starts = list(itertools.product(*(range(0, n, s) for n, s in zip(header.shape, step, strict=True))))
    look = partial(_look, voxels=voxels, step=tuple(step), path=header.path)
    return _merge(executor.map(look, starts, name="ingest"))


def _look(start: tuple[int, ...], *, voxels: Voxels, step: tuple[int, ...], path: Path) -> _Part:
    region = tuple(slice(a, min(a + s, n)) for a, s, n in zip(start, step, voxels.shape, strict=True))
    return _part(read_region(voxels, region, path))


def convert(
    source: str | Path,
    target: str | Path,
    *,
    chunks: Sequence[int] | None = None,
    level: int = 0,
    dataset: str | None = None,
    executor: Executor = SERIAL,
    overwrite: bool = False,
) -> IngestReport:
    """Convert a tomogram file to a zarr v3 array at a path of its own.

    The array grows under a hidden name beside the target and is renamed when it is complete.

    Parameters
    ----------
    source, level, dataset
        See `read_header`.
    chunks, executor
        See `ingest`.
    target
        Folder of the new array, for example ``tomogram.zarr``; open it with ``zarr.open_array``.
    overwrite
        Whether a zarr array or group that is there already may be replaced.

    Returns
    -------
    IngestReport
        See `ingest`.

    Raises
    ------
    TomogramError
        If the file cannot be read.
    OutputError
        If the target exists or cannot be written.
    """
    target = Path(target)
    header = read_header(source, level=level, dataset=dataset)
    require_free(target, overwrite=overwrite)
    try:
        with replacing_folder(target) as part:
            _, statistics = _fill(header, part, None, chunks, True, executor)
    except OutputError as error:
        raise type(error)(error.rule, place=target, value=error.value, remedy=error.remedy) from error
    except OSError as error:
        raise not_written(
            error, "the converted tomogram must be writable", place=target, remedy="Choose another place"
        ) from error
    return _report(header, statistics)


def require_free(target: Path, *, overwrite: bool) -> None:
    """Check that a conversion may write to `target`.

    Raises
    ------
    OutputError
        If something is there that is no zarr, or that may not be replaced.
    """
    ours = is_zarr(target)
    if (target.exists() or target.is_symlink()) and not (ours and overwrite):
        raise OutputError(
            "the converted tomogram must not replace anything" if ours else "only zarr data can be replaced",
            place=target,
            value="an existing file or folder",
            remedy="Choose another name" + (", or allow it with --overwrite" if ours else ""),
        )


def read_part(header: TomogramHeader, region: Region) -> np.ndarray[Any, Any]:
    """Read a region of a file that is not compressed.

    Parameters
    ----------
    header
        From `read_header`.
    region
        A slice with start and stop for each axis of ``header.shape``. Of an MRC file whole rows are read, and cut.

    Returns
    -------
    ndarray, (z, y, x) or (y, x), ``header.dtype``

    Raises
    ------
    TomogramError
        If the file cannot be read.
    """
    return _native(header.read(region), header.dtype)


def read_beginning(header: MrcHeader, largest: int = STREAM_BYTES) -> np.ndarray[Any, Any]:
    """Read the first sections of a compressed file.

    Parameters
    ----------
    header
        From `read_header`.
    largest
        Uncompressed bytes that all sections together may have; one section is read even if it has more.

    Returns
    -------
    ndarray, (z, y, x) or (y, x), ``header.dtype``
        As many of the file's sections as that gives; they lie along the axis ``header.axes.index(0)``.

    Raises
    ------
    TomogramError
        If the file cannot be read, or, as far as it was read, is damaged or too short.
    """
    section_bytes = header.voxel_bytes // header.file_shape[0]
    count = min(header.file_shape[0], max(1, largest // section_bytes))
    layers = _layers(header, count, section_bytes)
    _, layer = next(layers)
    if count == header.file_shape[0]:
        next(layers, None)  # reads to the end, where the checksum is
    voxels = np.frombuffer(layer, header.file_dtype).reshape(count, *header.file_shape[1:])
    return _native(voxels.transpose(header.axes), header.dtype)


@dataclass(frozen=True, slots=True)
class _Part:
    """Statistics of a piece: extremes and sum of its `finite` voxels, and how many more it has."""

    minimum: float
    maximum: float
    total: float
    finite: int
    non_finite: int


def _part(voxels: np.ndarray[Any, Any]) -> _Part:
    size = voxels.size
    if voxels.dtype.kind == "f":
        finite = np.isfinite(voxels)
        if not finite.all():
            voxels = voxels[finite]
    if not voxels.size:
        return _Part(math.inf, -math.inf, 0.0, 0, size)
    total = float(voxels.sum(dtype=np.float64))
    return _Part(float(voxels.min()), float(voxels.max()), total, voxels.size, size - voxels.size)


def _merge(parts: Iterable[_Part]) -> Statistics:
    parts = list(parts)
    finite = sum(part.finite for part in parts)
    non_finite = sum(part.non_finite for part in parts)
    if not finite:
        return Statistics(None, None, None, non_finite)
    return Statistics(
        minimum=min(part.minimum for part in parts),
        maximum=max(part.maximum for part in parts),
        mean=math.fsum(part.total for part in parts) / finite,
        non_finite=non_finite,
    )


def _chunks(header: TomogramHeader) -> tuple[int, ...]:
    chunks = [min(CHUNK, size) for size in header.shape]
    if isinstance(header, MrcHeader) and header.compressed:
        sections = header.axes.index(0)
        section_bytes = header.voxel_bytes // header.shape[sections]
        while chunks[sections] > 1 and chunks[sections] * section_bytes > STREAM_BYTES:
            chunks[sections] = (chunks[sections] + 1) // 2
    return tuple(chunks)


def _native(voxels: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(voxels.real, dtype=dtype)


def _rows(header: TomogramHeader, array: zarr.Array[Any]) -> list[Region]:
    """Divide an array into what a task copies: rows of chunks, side by side where the file holds them in one piece."""
    step = list(array.chunks)
    for axis in range(len(step) - 1):
        stored = min(header.stored_chunks[axis], array.shape[axis])
        fits = PIECE_BYTES // (math.prod(step[:-1]) * array.shape[-1] * header.dtype.itemsize)
        step[axis] *= max(1, min(fits, -(-stored // step[axis])))
    edges = [
        [slice(a, min(a + width, n)) for a in range(0, n, width)]
        for n, width in zip(array.shape[:-1], step, strict=False)
    ]
    return [(*part, slice(0, array.shape[-1])) for part in itertools.product(*edges)]


def _copy_row(row: Region, *, header: TomogramHeader, array: zarr.Array[Any]) -> list[_Part]:
    """Copy a region of whole chunks, a few chunks of its last axis at a time."""
    column_bytes = math.prod(s.stop - s.start for s in row[:-1]) * array.chunks[-1] * header.dtype.itemsize
    width = max(1, PIECE_BYTES // column_bytes) * array.chunks[-1]
    parts = []
    for first in range(0, array.shape[-1], width):
        region: Region = (*row[:-1], slice(first, min(first + width, array.shape[-1])))
        voxels = _native(header.read(region), array.dtype)
        array[region] = voxels
        parts.append(_part(voxels))
    return parts


def _read(header: MrcHeader, region: Region) -> np.ndarray[Any, Any]:
    """Read a region of an uncompressed file, as (z, y, x).

    Whole rows are read and cut. A memory map would need no cutting, but its pages count as the process's memory, and a
    file that shrinks meanwhile would kill the process.
    """
    stored = [region[header.axes.index(axis)] for axis in range(len(region))]  # (section, row, column) or (row, column)
    sections = range(stored[0].start, stored[0].stop) if len(stored) == 3 else range(1)
    rows, columns = stored[-2:]
    height, width = header.file_shape[-2:]
    voxels = np.empty((len(sections), rows.stop - rows.start, columns.stop - columns.start), header.file_dtype)
    try:
        with header.path.open("rb") as file:
            for voxels_of_section, section in zip(voxels, sections, strict=True):
                file.seek(header.offset + (section * height + rows.start) * width * header.file_dtype.itemsize)
                run = np.fromfile(file, header.file_dtype, (rows.stop - rows.start) * width)
                if run.size < (rows.stop - rows.start) * width:  # cut short since its header was read
                    raise _too_short(header, header.path.stat().st_size)
                voxels_of_section[:] = run.reshape(-1, width)[:, columns]
    except OSError as error:
        raise _unreadable(header.path, error) from error
    return voxels.reshape([s.stop - s.start for s in stored]).transpose(header.axes)


def _stream(header: MrcHeader, *, array: zarr.Array[Any]) -> list[_Part]:
    """Copy a compressed file from its beginning to its end, one layer of chunks at a time."""
    sections = header.axes.index(0)  # the axis of the array along which the file goes on
    file_shape = header.file_shape
    section_bytes = header.voxel_bytes // file_shape[0]
    parts = []
    for first, layer in _layers(header, array.chunks[sections], section_bytes):
        count = len(layer) // section_bytes
        voxels = np.frombuffer(layer, header.file_dtype).reshape(count, *file_shape[1:]).transpose(header.axes)
        region = tuple(
            slice(first, first + count) if axis == sections else slice(None) for axis in range(len(header.shape))
        )
        voxels = _native(voxels, array.dtype)
        array[region] = voxels
        parts.append(_part(voxels))
    return parts


def _layers(header: MrcHeader, depth: int, section_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (first section, bytes of up to `depth` sections) of a compressed file."""
    read = 0
    try:
        with _open(header.path, compressed=True) as file:
            read = len(file.read(header.offset))
            for first in range(0, header.file_shape[0], depth):
                wanted = min(depth, header.file_shape[0] - first) * section_bytes
                layer = file.read(wanted)
                read += len(layer)
                if len(layer) < wanted:
                    raise _too_short(header, read)
                yield first, layer
            while file.read(2**20):  # only the end of the stream tells whether its checksum is right
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged_gzip(header.path, error) from error
    except OSError as error:
        raise _unreadable(header.path, error) from error
