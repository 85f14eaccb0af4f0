"""Read HDF5 files: tomograms and predictions."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cryosiam_dask.core.arrays import Computed, Region
from cryosiam_dask.errors import LabelsError, OutputError, TomogramError
from cryosiam_dask.files.header import (
    MOST_MISSING,
    TomogramHeader,
    ends_abruptly,
    own_attributes,
    plausible_sizes,
    space,
    space_axes,
    unknown_sizes,
)

LABELS, PROBABILITIES, DISTANCES = "labels", "probs", "distances"  # CryoSiam's names, which viewers look for
INSTANCES = "instances"
REMOVED = "removed"  # labels that a size filter set to 0; `labels + removed` are the unfiltered labels
_AGAIN = "Run semantic-predict again"


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A dataset of an HDF5 file that can be sent to other processes; each read opens the file.

    Attributes
    ----------
    path, name
        The file and the dataset.
    shape, dtype, chunks
        As stored; `chunks` is ``None`` if the dataset is contiguous.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None

    def __getitem__(self, region: Any, /) -> Any:
        try:
            with reading(self.path) as file:
                return file[self.name][region]
        except (OSError, KeyError) as error:
            raise OutputError(
                f"the dataset '{self.name}' must be readable", place=self.path, value=error, remedy=_AGAIN
            ) from error


def as_uint8(labels: np.ndarray[Any, Any], place: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert labels of an integer dtype that were read from `place`.

    Raises
    ------
    LabelsError
        If they do not lie between 0 and 255.
    """
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise LabelsError(
            "labels must lie between 0 and 255", place=place, value=f"{labels.min()} to {labels.max()}",
            remedy="Predict again, or correct the file if it was edited",
        )  # fmt: skip
    return labels.astype(np.uint8)


def open_labels(prediction: Path, kinds: str = "iu") -> StoredDataset:
    """Open the labels of any program's predictions file.

    Parameters
    ----------
    prediction
        ``<stem>_preds.h5``.
    kinds
        Kinds of dtypes that are accepted.

    Raises
    ------
    LabelsError
        If they have another dtype.
    """
    labels = open_dataset(prediction, LABELS)
    if labels.dtype.kind not in kinds:
        raise LabelsError(
            "labels must be whole numbers", place=prediction, value=labels.dtype, remedy="Run semantic-predict again"
        )
    return labels


def uint8_labels(prediction: Path, kinds: str = "iu") -> Computed:
    """Like `open_labels`, but converted to uint8 when a region is read; see `as_uint8`."""
    return Computed(open_labels(prediction, kinds), partial(as_uint8, place=prediction), np.dtype(np.uint8))


def open_hdf5(path: str | Path, **options: Any) -> Any:
    """Open an HDF5 file for reading, even on a disk without file locks.

    Parameters
    ----------
    path
        The file.
    options
        Other options of `h5py.File`.

    Raises
    ------
    OSError
        If it is not a readable HDF5 file.
    """
    return h5py.File(path, "r", locking="best-effort", **options)


def open_dataset(path: str | Path, name: str) -> StoredDataset:
    """Open a dataset of a predictions file and check its shape against the other datasets.

    Raises
    ------
    OutputError
        If the file is not a readable HDF5 file, has no such dataset, or its datasets do not belong to one volume.
    """
    path = Path(path)
    try:
        with open_hdf5(path) as file:
            stored = file[name]
            dataset = StoredDataset(path, name, tuple(map(int, stored.shape)), stored.dtype, stored.chunks)
            removed = file[REMOVED].dtype if REMOVED in file else np.dtype(np.uint8)
            shapes = {other: tuple(file[other].shape) for other in (LABELS, REMOVED, PROBABILITIES) if other in file}
    except (OSError, KeyError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EACCES:
            raise _not_permitted(path) from None
        raise OutputError(
            f"a prediction must be an HDF5 file with a dataset '{name}'", place=path, remedy=_AGAIN
        ) from None
    if 0 in dataset.shape:
        raise OutputError(f"the dataset '{name}' must hold voxels", place=path, value=dataset.shape, remedy=_AGAIN)
    if removed.kind not in "iu":
        raise OutputError(f"the dataset '{REMOVED}' must hold integer labels", place=path, value=removed, remedy=_AGAIN)
    of_labels = shapes.get(LABELS)
    for other, axes, rule in ((REMOVED, 0, "have"), (PROBABILITIES, 1, "have a class axis and then")):
        if of_labels and other in shapes and shapes[other][axes:] != of_labels:
            raise OutputError(
                f"the dataset '{other}' must {rule} the shape of the labels, {of_labels}",
                place=path,
                value=shapes[other],
                remedy=_AGAIN,
            )
    return dataset


def dataset_names(path: str | Path) -> set[str]:
    """Return the names of the datasets of a predictions file.

    Raises
    ------
    OutputError
        If it is not a readable HDF5 file.
    """
    with reading(Path(path)) as file:
        return set(file)


def read_attributes(path: str | Path) -> dict[str, Any]:
    """Read the attributes of a predictions file as plain Python values.

    Parameters
    ----------
    path
        An HDF5 file.

    Returns
    -------
    dict
        Numbers, strings, and lists of either, with ``None`` for NaN; mappings are JSON text. Empty for a file without
        attributes, such as CryoSiam's own.

    Raises
    ------
    OutputError
        If it is not a readable HDF5 file.
    """
    with reading(Path(path)) as file:
        return {name: _plain(value) for name, value in file.attrs.items()}


def voxel_size_in(attributes: Mapping[str, Any], ndim: int) -> Sequence[float | None] | None:
    """Return the voxel size in attributes; ``None`` without one, or if another program uses the name differently."""
    size = attributes.get("voxel_size_angstrom")
    fits = isinstance(size, list | tuple) and len(size) == ndim and all(isinstance(v, float | int | None) for v in size)
    return size if fits else None


def _not_permitted(path: Path) -> OutputError:
    return OutputError(
        "a prediction must be readable", place=path, value=os.strerror(errno.EACCES), remedy="Change its permissions"
    )


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    try:
        file = open_hdf5(path)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise _not_permitted(path) from error
        raise OutputError(
            "an existing predictions file must be readable HDF5",
            place=path,
            value=error,
            remedy="Remove the file and predict again",
        ) from error
    with file:
        yield file


def _plain(value: Any) -> Any:
    """Convert an attribute to plain Python values."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Hdf5Header(TomogramHeader):
    """A tomogram in a dataset of an HDF5 file.

    Attributes
    ----------
    dataset
        Name of the dataset.
    axes
        The axes of the dataset that are z, y and x (or y and x); the others have length 1.
    stored_shape, stored_dtype, dataset_chunks
        Shape, dtype and chunk shape of the dataset; `dataset_chunks` is ``None`` if it is contiguous.
    """

    dataset: str
    axes: tuple[int, ...]
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype[Any]
    dataset_chunks: tuple[int, ...] | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the voxels when they are read: native byte order; half precision becomes float32."""
        return np.dtype(np.float32) if self.stored_dtype == np.float16 else self.stored_dtype.newbyteorder("=")

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """Chunk shape of the dataset along `axes`, in voxels; all 1 without chunks."""
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


def is_hdf5(path: Path) -> bool:
    """Whether the content of a file is HDF5."""
    return bool(h5py.is_hdf5(path))


def read_hdf5_header(path: Path, *, dataset: str | None = None) -> Hdf5Header:
    """Read the header of a tomogram in an HDF5 file.

    Parameters
    ----------
    path
        The file.
    dataset
        Name of the dataset. If ``None``, the only 3-D dataset or, without one, the only 2-D dataset.

    Raises
    ------
    TomogramError
        If the file cannot be read or has no such dataset.
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
    axes = space_axes(shape, names, path)
    notes, decided = [f"dataset {name}" + (f" of {linked}" if linked else "")], ""
    if names is not None and list(axes) != sorted(axes):
        notes.append(f"stored with the axes {', '.join(names)}: transposed to {', '.join('zyx'[-len(axes) :])}")
        decided = f"axes {', '.join(names)}"
    size, position, nstart = own_attributes(attributes, len(axes))
    # Fiji's HDF5 plugin and ilastik write this attribute, (z, y, x).
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
    """Find missing chunks, sources and external voxels of a dataset; return warnings and `incomplete`."""
    lost, total = False, math.prod(found.shape)
    if found.is_virtual:
        there, gone = 0, set()
        for source in found.virtual_sources():
            if _is_there(path, source.file_name, source.dset_name):
                try:
                    there += source.vspace.get_select_npoints()
                except RuntimeError:  # an unlimited selection
                    there = total
            else:
                gone.add(f"{source.file_name}, {source.dset_name}")
        share, lost = 1 - there / total, bool(gone)
        many = f"sources of a virtual dataset ({'; '.join(sorted(gone)[:3])})" if gone else "parts of a virtual dataset"
    elif found.chunks:
        counts = [-(-n // c) for n, c in zip(found.shape, found.chunks, strict=True)]
        stored = set[tuple[int, ...]]()
        # HDF5 continues the iteration while the callback returns None.
        found.id.chunk_iter(
            lambda chunk: stored.add(tuple(o // c for o, c in zip(chunk.chunk_offset, found.chunks, strict=True)))
        )
        missing = set(np.ndindex(*counts)) - stored
        share, many = len(missing) / math.prod(counts), f"{len(missing)} of {math.prod(counts)} chunks"
        if missing and stored:
            lost = any(ends_abruptly(found, found.fillvalue, found.chunks, counts, missing))
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
    what = f"{many}, {100 * share:.1f} % of the whole, are missing and read as {found.fillvalue}"
    return [what], what if share >= 1 or (lost and share > MOST_MISSING) else ""


def _is_there(path: Path, file_name: str, dataset: str) -> bool:
    # HDF5 looks beside the file first.
    for file in [path] if file_name == "." else [path.parent / file_name, Path(file_name)]:
        with suppress(OSError, RuntimeError), open_hdf5(file) as source:
            return dataset in source
    return False


def _hdf5_axes(found: Any) -> list[str] | None:
    """Return the names of a dataset's axes (ilastik's tags, HDF5's labels or scales), if y and x are among them."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        tags = json.loads(found.attrs["axistags"])
        tagged = [str(axis["key"]).lower() for axis in tags["axes"]]
        if len(tagged) == found.ndim:
            return _if_space(tagged)
    # Velox stores the frames of an image along the last axis, according to HyperSpy's reader.
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
    """Return the voxel size that EMAN2 and IMOD write beside a dataset, under this program's name for it."""
    size = [attributes.get(f"EMAN.apix_{axis}") for axis in "zyx"]
    return {"voxel_size_angstrom": [float(np.ravel(v)[0]) for v in size]} if None not in size else {}


def hdf5_datasets(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield every dataset of an HDF5 file once, however many links lead to it.

    Soft and external links are followed; broken ones are skipped.

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
        # Hard links come first, so that a dataset is listed under its own name.
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
    """Whether a node is a dataset of numbers with two or three spatial axes."""
    return bool(
        isinstance(node, h5py.Dataset)
        and node.dtype.kind in "iuf"
        and node.shape
        and 0 not in node.shape
        and space(node.shape) in (2, 3)
    )


def _find_dataset(file: Any, wanted: str | None, path: Path) -> str:
    volumes: dict[int, list[str]] = {2: [], 3: []}
    described: list[str] = []
    if wanted is not None and wanted.strip("/"):
        with suppress(KeyError, OSError):  # a broken link
            if _is_volume(file[wanted.strip("/")]):
                return wanted.strip("/")
    for name, node in hdf5_datasets(file):
        described.append(f"{name} ({node.dtype}, {' × '.join(map(str, node.shape or ()))})")
        # Velox stores the JSON metadata of an image as a 2-D array of bytes beside it.
        of_velox = name.endswith("/Metadata") and "Data" in node.parent
        if _is_volume(node) and not of_velox:
            volumes[space(node.shape)].append(name)
    listed = ", ".join(described[:8]) + (" …" if len(described) > 8 else "") or "no dataset"
    if wanted is not None:
        raise TomogramError(
            f"the dataset '{wanted}', which hdf5_dataset names, must be a volume of numbers",
            place=path,
            value=listed,
            remedy="Correct hdf5_dataset, or the option --dataset",
        )
    candidates = volumes[3] or volumes[2]
    if len(candidates) != 1:
        raise TomogramError(
            "an HDF5 tomogram must hold exactly one volume or image, unless hdf5_dataset names one",
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
        remedy="Copy the file again: it is truncated or damaged, or needs an HDF5 filter that is not installed",
    )
