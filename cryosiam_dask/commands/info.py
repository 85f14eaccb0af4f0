"""Describe a file: a tomogram, a zarr store, a predictions or components file, or a checkpoint.

The content determines the kind. A file whose name and content disagree is refused. If the content is unknown, the name
determines the kind, so that the error describes the damage. Nothing in a file is executed, and little more than the
metadata of arrays is read.
"""

from __future__ import annotations

import errno
import json
import math
import warnings as library_warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h5py
import numpy as np
import zarr
from pydantic_core import to_jsonable_python

from cryosiam_dask.core.diagnosis import Intensities, percent, scaling, to_write
from cryosiam_dask.core.endings import HDF5_ENDINGS, MRC_ENDINGS
from cryosiam_dask.errors import CryosiamDaskError, OutputError, TomogramError
from cryosiam_dask.files.folders import require_there, unusable
from cryosiam_dask.files.hdf5 import INSTANCES, LABELS, PROBABILITIES, hdf5_datasets, open_hdf5, read_attributes
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mrc import MrcHeader
from cryosiam_dask.files.signatures import OTHERS, PACKED
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.stages.intensities import intensities, sample_file

Kind: TypeAlias = Literal["tomogram", "zarr", "HDF5", "checkpoint"]

COUNTED_VOXELS = 1 << 28  # labels of larger volumes are not counted, because that takes many seconds
_ZARR = ("zarr.json", ".zarray", ".zgroup")
#: First bytes of a file, its description, and its kind.
_MAGIC: tuple[tuple[bytes, str, Kind | None], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "HDF5"),
    (b"PK\x03\x04", "a zip archive, as torch writes checkpoints", "checkpoint"),
    (b"\x80\x02", "a pickle, as old versions of torch write checkpoints", "checkpoint"),
    (b"\x1f\x8b", "a gzip file", "tomogram"),
    (b"\0\5\x16\7", "macOS metadata of the file with the same name without ._", None),
    *((start, what, None) for start, what in OTHERS.items()),
)
_BY_NAME: Mapping[str, Kind] = {
    **dict.fromkeys((*MRC_ENDINGS, ".gz"), "tomogram"),
    **dict.fromkeys(HDF5_ENDINGS, "HDF5"),
    **dict.fromkeys((".ckpt", ".pt", ".pth"), "checkpoint"),
}
_WHAT = "must be a tomogram (MRC, HDF5, zarr or OME-Zarr), a file of predictions or components, or a checkpoint"
_KINDS: Mapping[Kind, str] = {
    "tomogram": "a tomogram", "zarr": "a zarr store", "HDF5": "an HDF5 file", "checkpoint": "a checkpoint",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """An array in a file.

    Attributes
    ----------
    name
        Path of the array in the file.
    shape
        Shape as stored; this program writes (z, y, x), after a class axis if there is one.
    dtype
        Dtype of the elements.
    chunks
        Shape of the chunks; empty if the array is contiguous.
    compression
        Name of the codec, or ``""``.
    stored_bytes
        Size in the file; ``None`` if unknown.
    voxels
        Number of voxels of each label, if they were counted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...] = ()
    compression: str = ""
    stored_bytes: int | None = None
    voxels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Information:
    """Description of a file.

    Attributes
    ----------
    path
        The file or folder.
    kind
        Kind of file, in words.
    facts
        Metadata: numbers, text, and lists and mappings of them.
    parts
        The arrays in the file.
    notes, warnings
        Decisions about the file, and warnings.
    """

    path: Path
    kind: str
    facts: Mapping[str, Any]
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the same as JSON values, with null for NaN and infinity."""
        values: dict[str, Any] = to_jsonable_python(self, bytes_mode="hex", inf_nan_mode="null", fallback=str)
        return values


def inspect(path: str | Path) -> Information:
    """Describe a file.

    Parameters
    ----------
    path
        A tomogram (MRC, also gzip-compressed, or HDF5), a zarr store, a predictions or components file, or a
        checkpoint.

    Raises
    ------
    TomogramError, OutputError, CheckpointError
        If it is missing, damaged, of an unknown kind, or of another kind than its name implies.
    """
    path = Path(path)
    readers: Mapping[Kind, Callable[[Path], Information]] = {
        "tomogram": _tomogram, "zarr": _zarr, "HDF5": _hdf5, "checkpoint": _checkpoint,
    }  # fmt: skip
    return readers[_kind(path)](path)


def _kind(path: Path) -> Kind:
    """Determine the kind of a file by its content or, if that is unknown, by its name."""
    try:
        if path.is_dir():
            if any((path / name).is_file() for name in _ZARR):
                return "zarr"
            raise TomogramError(
                "a folder must be a zarr store",
                place=path,
                value=f"none of {', '.join(_ZARR)} in it",
                remedy="Give a file, or the folder of the zarr store itself",
            )
        with path.open("rb") as file:
            beginning = file.read(212)
    except OSError as error:
        require_there(path)
        why = unusable(path) if path.is_symlink() and error.errno == errno.ENOENT else error.strerror
        raise TomogramError(
            "must be a readable file", place=path, value=why, remedy="Check path and permissions"
        ) from None
    if not beginning:
        raise TomogramError("a file must not be empty", place=path, value="0 bytes", remedy="Copy or make it again")
    claimed = _BY_NAME.get(path.suffix.lower())
    found: tuple[str, Kind | None] | None = next(
        (entry[1:] for entry in _MAGIC if beginning.startswith(entry[0])), None
    )
    if found is not None and beginning.startswith(b"PK") and claimed != "checkpoint" and not _holds_a_pickle(path):
        found = "a zip archive", None
    if found is None and beginning[208:211] == b"MAP":
        found = "an MRC file", "tomogram"
    if found is None and h5py.is_hdf5(path):  # after a user block
        found = "an HDF5 file", "HDF5"
    if found is not None and found[1] is None:
        packed = found[0].split()[1] in PACKED
        raise TomogramError(
            _WHAT,
            place=path,
            value=found[0],
            remedy="Decompress it" if packed else "Convert it to MRC, if it holds a tomogram",
        )
    if found is not None and claimed is not None and found[1] != claimed:
        raise TomogramError(
            f"a file whose name ends with {path.suffix} must be {_KINDS[claimed]}",
            place=path,
            value=found[0],
            remedy="Rename it, if its content is right",
        )
    kind = found[1] if found else claimed
    if kind is None:
        raise TomogramError(
            _WHAT, place=path, value=f"bytes that begin with {beginning[:8]!r}", remedy="Check the path"
        )
    return kind


def _holds_a_pickle(path: Path) -> bool:
    """Whether a zip archive is a torch checkpoint, or too damaged to be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return True


# ---------------------------------------------------------------------------------------------------------- tomograms


def _tomogram(path: Path) -> Information:
    header = read_header(path)
    facts, notes, warnings = _tomogram_facts(header)
    kind = "MRC tomogram" if isinstance(header, MrcHeader) else f"tomogram, {header.kind}"
    return Information(path, kind, facts, notes=(*header.notes, *notes), warnings=(*header.warnings, *warnings))


def _tomogram_facts(header: TomogramHeader) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return facts from a header and a sample of the voxels, notes on how to use it with the models, and warnings."""
    found = intensities(sample_file(header), 0, 1)
    facts: dict[str, Any] = {
        "shape": list(header.shape),
        "axes": "zyx"[-len(header.shape) :],
        "dtype": str(header.dtype),
    }
    if isinstance(header, MrcHeader):
        facts |= {"mode": header.mode, "file_dtype": str(header.file_dtype), "compressed": header.compressed}
    facts |= {
        "bytes": header.file_bytes,
        "voxel_size_angstrom": list(header.voxel_size_angstrom),
        "origin_angstrom": list(header.origin_angstrom),
        "nstart": list(header.nstart),
        **_intensity_facts(found),
    }
    warnings = []
    if found.non_finite:
        warnings.append(f"{percent(found.non_finite)} of the sampled voxels are NaN or infinite")
    outside = scaling(found.below, found.above, found.central, 0, 1)
    lines = to_write(found.central if outside else None, found.contrast)
    notes = [f"for the models of CryoSiam, set {_listed(lines)} below parameters.data"] if lines else []
    return facts, notes, warnings


def _listed(lines: Sequence[str]) -> str:
    *others, last = (f"'{line}'" for line in lines)
    return f"{', '.join(others)} and {last}" if others else last


def _intensity_facts(found: Intensities) -> dict[str, Any]:
    return {
        "intensities_of": found.where,
        "lowest_intensity": found.lowest,
        "highest_intensity": found.highest,
        "median_intensity": found.median,
        "central_99_percent": None if found.central is None else list(found.central),
        "contrast": found.contrast,
    }


# --------------------------------------------------------------------------------------------------------------- zarr


def _zarr(path: Path) -> Information:
    with (
        _damage_reported(path, "the zarr store must be readable"),
        library_warnings.catch_warnings(record=True) as caught,
    ):
        library_warnings.simplefilter("always")
        opened = zarr.open(str(path), mode="r")
        # Opening the arrays one by one shows which of them are broken.
        arrays = [opened] if isinstance(opened, zarr.Array) else [a for _, a in opened.members(max_depth=8)]
        parts = tuple(_zarr_part(array) for array in arrays if isinstance(array, zarr.Array))
        attributes = dict(opened.attrs)
    facts: dict[str, Any] = {"zarr_format": opened.metadata.zarr_format, **_ome(attributes), **attributes}
    facts.pop("ome", None), facts.pop("multiscales", None)
    warnings = [str(warning) for warning in facts.pop("warnings", None) or ()]
    warnings += dict.fromkeys(" ".join(str(each.message).split()) for each in caught)
    if "source_bytes" in facts and "statistics" not in facts:
        warnings.append("the conversion that made it was not completed: some voxels are missing")
    notes = tuple(map(str, facts.pop("notes", None) or ()))
    try:
        header = read_header(path)
        of_tomogram, found, seen = _tomogram_facts(header)
        facts, warnings = {**of_tomogram, **facts}, list(dict.fromkeys([*warnings, *header.warnings, *seen]))
        notes += tuple(found)
    except TomogramError as error:
        if "ngff_version" in facts or arrays == [opened]:  # other groups may hold something else
            warnings.append(f"cannot be read as a tomogram: {error}")
    kind = "OME-Zarr image" if "ngff_version" in facts else "zarr array" if arrays == [opened] else "zarr group"
    return Information(path, kind, facts, parts, notes, tuple(warnings))


def _zarr_part(array: zarr.Array[Any]) -> Part:
    chunks = array.chunks if array.shards is None else array.shards
    compression = ", ".join(type(codec).__name__ for codec in array.compressors)
    return Part(array.path or "/", array.shape, str(array.dtype), chunks, compression)


def _ome(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Read axes and the voxel size of each level from OME-Zarr attributes."""
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if not isinstance(images, list) or not images or not isinstance(images[0], Mapping):
        return {}
    axes = [axis for axis in images[0].get("axes", ()) if isinstance(axis, Mapping)]
    facts: dict[str, Any] = {
        "ngff_version": ome.get("version", images[0].get("version")),
        "axes": [f"{axis.get('name')} ({axis.get('unit', 'no unit')})" for axis in axes],
    }
    for level in images[0].get("datasets", ()):
        transformations = level.get("coordinateTransformations", ()) if isinstance(level, Mapping) else ()
        for transformation in transformations:
            if transformation.get("type") in ("scale", "translation"):
                kind = transformation["type"]
                facts[f"{kind}_of_level_{level.get('path')}"] = transformation.get(kind)
    return facts


@contextmanager
def _damage_reported(path: Path, rule: str) -> Iterator[None]:
    """Turn any library's error on a damaged file into an `OutputError`."""
    try:
        yield
    except CryosiamDaskError:
        raise
    except Exception as error:
        raise OutputError(
            rule,
            place=path,
            value=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="The file is damaged or incomplete: copy or make it again",
        ) from None


# --------------------------------------------------------------------------------------------------------------- HDF5


def _hdf5(path: Path) -> Information:
    with _damage_reported(path, "must be readable HDF5"):
        with open_hdf5(path) as file:
            parts = [_hdf5_part(name, dataset) for name, dataset in hdf5_datasets(file)]
        attributes = read_attributes(path)
    unpacked = {name: _unpacked(value) for name, value in attributes.items()}
    # Short facts first, the configuration last.
    facts = dict(sorted(unpacked.items(), key=lambda item: isinstance(item[1], Mapping)))
    stored = facts.pop("warnings", None)
    warnings = stored.splitlines() if isinstance(stored, str) else []
    notes: list[str] = []
    shapes = {part.name: part.shape for part in parts}
    kind = "HDF5 file"
    if LABELS in shapes:
        kind = "predictions"
        for name, shape in shapes.items():
            if "/" not in name and shape not in (shapes[LABELS], (*shape[:1], *shapes[LABELS])):
                warnings.append(f"the dataset '{name}' has another shape than the labels")
        if PROBABILITIES in shapes:
            facts["classes"] = shapes[PROBABILITIES][0] if shapes[PROBABILITIES] else None
    elif INSTANCES in shapes:
        kind = "components"
    elif (header := _hdf5_tomogram(path)) is not None:
        of_tomogram, notes, seen = _tomogram_facts(header)
        facts, kind, warnings = {**of_tomogram, **facts}, "HDF5 tomogram", [*warnings, *header.warnings, *seen]
    else:
        warnings.append(f"holds neither '{LABELS}' nor '{INSTANCES}': it is not an output of this program or CryoSiam")
    return Information(path, kind, facts, tuple(parts), tuple(notes), tuple(warnings))


def _hdf5_tomogram(path: Path) -> TomogramHeader | None:
    try:
        return read_header(path)
    except TomogramError:
        return None


def _hdf5_part(name: str, dataset: Any) -> Part:
    voxels: tuple[int, ...] = ()
    if name.rpartition("/")[2] in (LABELS, "removed") and dataset.dtype == np.uint8 and dataset.size <= COUNTED_VOXELS:
        counts = np.zeros(256, np.int64)
        for region in dataset.iter_chunks() if dataset.chunks else [...]:
            counts += np.bincount(dataset[region].reshape(-1), minlength=256)
        voxels = tuple(counts[: int(np.flatnonzero(counts)[-1]) + 1].tolist()) if counts.any() else ()
    return Part(
        name,
        tuple(dataset.shape or ()),
        str(dataset.dtype),
        tuple(dataset.chunks or ()),
        dataset.compression or "",
        int(dataset.id.get_storage_size()),
        voxels,
    )


def _unpacked(value: Any) -> Any:
    """Return an attribute, with JSON text decoded to a mapping."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


# --------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoint(path: Path) -> Information:
    from cryosiam_dask.model.checkpoint import read_checkpoint, read_settings  # with torch, which takes seconds

    checkpoint, settings = read_checkpoint(path), read_settings(path)
    architecture = checkpoint.architecture
    facts = {
        "sha256": checkpoint.sha256,
        "bytes": path.stat().st_size,
        "classes": architecture.out_channels,
        "patch_size": list(checkpoint.patch_size),
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.state.values()),
        "has_distance_head": architecture.has_distance_head,
        "architecture": asdict(architecture),
        "training": settings,
    }
    return Information(path, "CryoSiam checkpoint", facts)
