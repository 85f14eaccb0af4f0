"""A summary of a tomogram's outputs, read once and kept beside its ledger."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.blocks import Blocks
from cryosiam_dask.core.endings import denoised_ending
from cryosiam_dask.errors import CryosiamDaskError
from cryosiam_dask.files.claims import FOLDER
from cryosiam_dask.files.hdf5 import open_dataset, read_attributes, uint8_labels, voxel_size_in
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.model.classes import names_in
from cryosiam_dask.stages.export import written_attributes
from cryosiam_dask.stages.lamella import Thickness, count_columns, stored_thickness
from cryosiam_dask.stages.measurements import Sizes, component_files, component_sizes
from cryosiam_dask.stages.preview import preview_file, read_fingerprint, thumbnails


@dataclass(slots=True)
class Summary:
    """What is known about a tomogram.

    Attributes
    ----------
    name
        Name of the tomogram.
    status
        ``"done"``, ``"skipped"``, ``"failed"``, or ``"missing"`` without an output.
    shape
        (z, y, x) or (y, x) in voxels; empty if unknown.
    voxel_size_angstrom
        Along each axis; ``None`` where unknown.
    voxels
        Number of voxels of each label, from 0; empty if unknown.
    lamella
        Share of the volume within the mask.
    thickness
        Thickness of the lamella, see `cryosiam_dask.stages.lamella.Thickness.described`; empty if unknown.
    sizes
        Sizes of the components of each class, if they were measured.
    seconds
        Duration of the prediction in seconds.
    warnings, notes, error
        Warnings, decisions about the file, and why it failed.
    class_names
        Names of the labels from 1 on, according to the output.
    pictures
        The thumbnail in several sizes, WebP, the largest first.
    """

    name: str
    status: str = "missing"
    shape: tuple[int, ...] = ()
    voxel_size_angstrom: tuple[float | None, ...] = ()
    voxels: tuple[int, ...] = ()
    lamella: float | None = None
    thickness: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[int, Sizes] | None = None
    seconds: float | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""
    class_names: tuple[str, ...] = ()
    pictures: tuple[bytes, ...] = field(default=(), repr=False)

    def share(self, label: int, of_lamella: bool) -> float | None:
        """Return the share of a label, of the volume or of the lamella."""
        total = sum(self.voxels) * (self.lamella or 0 if of_lamella else 1)
        return self.voxels[label] / total if total and label < len(self.voxels) else 0.0 if total else None

    def voxel_nm3(self) -> float | None:
        """Return the volume of a voxel in nm³; ``None`` if unknown."""
        sizes = [size for size in self.voxel_size_angstrom if size]
        return math.prod(sizes) / 1000 if len(sizes) == 3 else None


def is_mrc(configuration: Configuration) -> bool:
    """Whether the outputs are MRC files with the names of their tomograms, instead of HDF5 files."""
    return configuration.denoises or configuration.save_original_file_extension


def summary_of(configuration: Configuration, picture_bytes: int, name: str) -> Summary:
    """Return the cached summary of a tomogram's outputs or, if they have changed, read them and cache the summary.

    Parameters
    ----------
    configuration
        The YAML file that the predictions were made with.
    picture_bytes
        Maximum size of the thumbnail; if all sizes exceed it, the smallest one is used.
    name
        Name of the tomogram.
    """
    note = configuration.prediction_folder / FOLDER / KEPT / f"{name}.json"
    keys = configuration.model_dump_json(include=_SOURCE_KEYS)
    made_of = json.dumps([_KEPT_VERSION, configuration.denoises, keys, _files(configuration, name)])
    with suppress(OSError, ValueError, TypeError, KeyError), note.open("rb") as file:
        facts = json.loads(file.readline())
        if facts.pop("made_of") == made_of:
            lengths = facts.pop("pictures")  # the smallest first, so that the others need not be read
            if facts["sizes"] is not None:
                facts["sizes"] = {int(label): Sizes(*sizes) for label, sizes in facts["sizes"].items()}
            tomogram = Summary(name, "done", **facts)
            number = max(1, sum(length <= picture_bytes for length in lengths))
            content = file.read(sum(lengths[:number]))
            tomogram.pictures = (content[-lengths[number - 1] :],) if lengths else ()
            return tomogram
    tomogram = _read_summary(configuration, name)
    if tomogram.status == "done":
        facts = {field: getattr(tomogram, field) for field in _FACTS}
        if tomogram.sizes is not None:
            facts["sizes"] = {label: [s.count, s.median, s.largest] for label, s in tomogram.sizes.items()}
        pictures = tomogram.pictures[::-1]
        facts |= {"made_of": made_of, "pictures": [len(picture) for picture in pictures]}
        part = note.with_name(f".{uuid.uuid4().hex}")
        with suppress(OSError):  # a full disk, or a folder without permission
            note.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(b"\n".join((json.dumps(facts).encode(), b"".join(pictures))))
                part.replace(note)
            finally:
                part.unlink(missing_ok=True)
    fitting = [picture for picture in tomogram.pictures if len(picture) <= picture_bytes]
    tomogram.pictures = tuple(fitting[:1] or tomogram.pictures[-1:])
    return tomogram


KEPT = "report"  # subfolder of the ledgers' folder
_KEPT_VERSION = 2
_FACTS = ("shape", "voxel_size_angstrom", "voxels", "lamella", "thickness", "sizes", "warnings", "class_names")
#: Keys that determine which files a summary is read from.
_SOURCE_KEYS = {
    "data_folder", "mask_folder", "file_extension", "ome_zarr_level", "hdf5_dataset", "save_original_file_extension",
}  # fmt: skip


def _files(configuration: Configuration, name: str) -> list[tuple[int, int] | None]:
    """Return sizes and times of the files that a summary is read from."""
    folder, masks = configuration.prediction_folder, configuration.mask_folder
    paths = [
        folder / f"{name}_preds.h5",
        component_files(folder, name)[2],
        preview_file(folder, name),
        configuration.data_folder / f"{name}{configuration.file_extension}",
        *([masks / f"{name}_preds.h5"] if masks else []),
        *([folder / f"{name}{denoised_ending(configuration.file_extension)}"] if is_mrc(configuration) else []),
    ]
    return list(map(_size_and_time, paths))


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read_summary(configuration: Configuration, name: str) -> Summary:
    """Read the outputs of a tomogram."""
    folder, tomogram = configuration.prediction_folder, Summary(name)
    path = folder / f"{name}_preds.h5"
    fingerprint, thickness = None, dict[str, Any]()
    try:
        component_files(folder, name)[2].exists()  # the longest name
    except OSError:  # it is too long for the disk, so the tomogram has failed
        return tomogram
    try:
        if path.exists() and not configuration.denoises:
            attributes = written_attributes(configuration, path)
            fingerprint = attributes.get("fingerprint")
            tomogram.shape = open_dataset(path, "labels").shape
            tomogram.voxels, thickness = _voxels(path, attributes, configuration.parameters.network.postprocessing)
            tomogram.voxel_size_angstrom = tuple(voxel_size_in(attributes, len(tomogram.shape)) or ())
            tomogram.warnings = tuple(str(attributes.get("warnings") or "").splitlines())
            tomogram.class_names = names_in(attributes)
            tomogram.status = "done"
        elif is_mrc(configuration):
            header = read_header(folder / f"{name}{denoised_ending(configuration.file_extension)}")
            tomogram.shape, tomogram.voxel_size_angstrom = header.shape, header.voxel_size_angstrom
            tomogram.status = "done"
        tomogram.sizes = component_sizes(folder, name)
    except CryosiamDaskError as error:
        if path.exists():
            tomogram.status, tomogram.error = "failed", str(error)
    tomogram.lamella, of_mask = _lamella(configuration, tomogram)
    tomogram.thickness = thickness or of_mask
    preview = preview_file(folder, name)
    if fingerprint is None or read_fingerprint(preview) == fingerprint:  # otherwise it shows other labels
        tomogram.pictures = thumbnails(preview)
    return tomogram


def _voxels(
    path: Path, attributes: Mapping[str, Any], as_lamella: bool
) -> tuple[tuple[int, ...], dict[str, float | str]]:
    """Return the voxels of each label of a prediction, and the thickness of a lamella; count them if necessary.

    Files of earlier versions have only the voxels. Their thickness stays unknown, because counting takes seconds.
    """
    known, thickness = attributes.get("voxels"), stored_thickness(attributes)
    as_lamella = as_lamella and len(open_dataset(path, "labels").shape) == 3
    if isinstance(known, list) and all(isinstance(n, int) for n in known):
        return tuple(known), thickness if as_lamella else {}
    checked = uint8_labels(path, "biu")
    if as_lamella:
        counts, columns = count_columns(checked)
        found = Thickness.of(columns)
        thickness = found.described(voxel_size_in(attributes, 3)) if found else {}
    else:
        blocks, counts = Blocks.of(checked), np.zeros(256, np.int64)
        for index in blocks.indices:
            counts += np.bincount(blocks.read(checked, index).reshape(-1), minlength=256)
    return tuple(counts[: int(np.flatnonzero(counts)[-1]) + 1].tolist()), thickness


def _lamella(configuration: Configuration, tomogram: Summary) -> tuple[float | None, dict[str, float | str]]:
    """Return the share of a tomogram within its mask, and the thickness of the mask."""
    path = configuration.mask_folder and configuration.mask_folder / f"{tomogram.name}_preds.h5"
    try:
        if not path or not path.exists():
            return None, {}
        attributes = read_attributes(path)
        if open_dataset(path, "labels").shape == tomogram.shape:  # CryoSiam's own masks have no voxel size
            attributes.setdefault("voxel_size_angstrom", list(tomogram.voxel_size_angstrom))
        (outside, *inside), thickness = _voxels(path, attributes, True)
    except (OSError, CryosiamDaskError):
        return None, {}  # the tomogram of an unreadable mask has failed anyway
    return sum(inside) / max(1, outside + sum(inside)), thickness
