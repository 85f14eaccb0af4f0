"""Write labels in formats other than HDF5: OME-Zarr and MRC.

``<stem>.ome.zarr`` (see `cryosiam_dask.stages.ome_zarr`) holds the tomogram and its labels, ``<stem>_labels.mrc`` the
labels, and ``<stem>__<class>.mrc`` 1 for voxels of a class and 0 elsewhere. Each file has the fingerprint of the
prediction that it was made from. A missing or outdated file is made from the written prediction, without inference.

Voxel size and position are those of the prediction. Viewers place an MRC file by its origin or, if that is 0, by its
start times the voxel size. An OME-Zarr image has only a translation, which puts it at the same place.
"""

from __future__ import annotations

import glob
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import zarr

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.arrays import Computed, Region, Sliceable, regions_of
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.errors import CryosiamDaskError, LabelsError, OutputError, TomogramError, is_transient, not_ours
from cryosiam_dask.files.folders import real
from cryosiam_dask.files.hdf5 import open_dataset, read_attributes, uint8_labels, voxel_size_in
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mrc import write_mrc
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.model.classes import file_names, given_names, named
from cryosiam_dask.stages.ingest import IngestReport, converting_to, ingest
from cryosiam_dask.stages.ome_zarr import SEGMENTATION, most_bytes, read_own_attributes, write_ome_zarr

#: Marks before the fingerprint in the label of an MRC header, for labels and for the mask of a class.
MRC_LABEL, MASK_LABEL = "cryosiam_dask ", "cryosiam_dask mask "
_ENDINGS = {"ome-zarr": ".ome.zarr", "mrc": "_labels.mrc"}
#: Attributes of the prediction that an OME-Zarr image keeps.
_CARRIED = (
    "software", "source", "checkpoint", "checkpoint_sha256", "threshold", "patch_size", "postprocessing_sizes",
    "voxel_size_angstrom", "origin_angstrom", "nstart", "class_names", "fingerprint",
)  # fmt: skip


def format_path(folder: Path, stem: str, name: str) -> Path:
    """Return the path of a tomogram in one of the other formats."""
    return folder / f"{stem}{_ENDINGS[name]}"


def mask_paths(folder: Path, stem: str, class_names: Sequence[str]) -> list[Path]:
    """Return the paths of the masks of a tomogram's classes, with `cryosiam_dask.model.classes.file_names`."""
    return [folder / f"{stem}__{name}.mrc" for name in file_names(class_names)]


def _masks(folder: Path, stem: str) -> dict[Path, str]:
    """Return the masks of classes that this program wrote for a tomogram, with their fingerprints."""
    paths = [path for path in folder.glob(f"{glob.escape(stem)}__*.mrc") if path.stem.rpartition("__")[0] == stem]
    found = {path: read_mrc_fingerprint(path, MASK_LABEL) for path in paths}
    return {path: fingerprint for path, fingerprint in found.items() if fingerprint is not None}


def other_formats(configuration: Configuration) -> tuple[str, ...]:
    """Return the formats in ``output_formats`` other than HDF5, each once."""
    return tuple(name for name in _ENDINGS if name in configuration.output_formats)


def most_bytes_of_formats(formats: Sequence[str], header: TomogramHeader) -> tuple[int, int]:
    """Return an upper bound for the size of a tomogram's other formats in bytes, and how much of it is certain."""
    mrc = math.prod(header.shape) if "mrc" in formats else 0
    return mrc + (most_bytes(header.shape, header.dtype) if "ome-zarr" in formats else 0), mrc


@dataclass(frozen=True, slots=True)
class Placed:
    """A tomogram that is written beside its labels.

    Attributes
    ----------
    voxels
        (z, y, x) or (y, x).
    minimum
        The lowest finite voxel, which replaces those that are not finite.
    """

    voxels: Sliceable
    minimum: float

    @classmethod
    def of(cls, voxels: Any, report: IngestReport) -> Placed:
        """Use the results of `cryosiam_dask.stages.ingest.ingest`."""
        return cls(voxels, report.statistics.minimum or 0.0)


def write_other_formats(
    folder: Path,
    stem: str,
    formats: Sequence[str],
    labels: Sliceable,
    *,
    tomogram: Placed | None,
    attributes: Mapping[str, Any],
    executor: Executor = SERIAL,
) -> None:
    """Write labels in formats other than HDF5; each appears complete or not at all.

    Parameters
    ----------
    folder, stem
        Folder of the files, and the tomogram's name.
    formats
        ``"ome-zarr"``, ``"mrc"``.
    labels
        (z, y, x) or (y, x), uint8.
    tomogram
        The tomogram; needed only for ``"ome-zarr"``.
    attributes
        Known attributes of the predictions file: ``voxel_size_angstrom``, ``origin_angstrom``, ``nstart``,
        ``class_names``, ``fingerprint`` and others.
    executor
        Runs the tasks.

    Raises
    ------
    LabelsError
        If labels and tomogram differ in shape.
    OutputError
        If a file cannot be written; an earlier one is then unchanged.
    """
    placement = placement_in(attributes)
    for name in formats:
        path = format_path(folder, stem, name)
        if name == "mrc":
            label = MRC_LABEL + attributes.get("fingerprint", "")
            write = partial(write_mrc, labels=labels, label=label, **placement)
            executor.map(write, [path], name="export")
        elif tomogram is not None:
            write_ome_zarr(
                path,
                tomogram.voxels,
                labels,
                class_names=attributes.get("class_names") or (),
                voxel_size_angstrom=placement["voxel_size_angstrom"],
                position_angstrom=position_angstrom(**placement),
                minimum=tomogram.minimum,
                attributes={key: attributes[key] for key in _CARRIED if attributes.get(key) is not None},
                executor=executor,
            )


def write_masks(
    folder: Path, stem: str, labels: Sliceable, *, attributes: Mapping[str, Any], executor: Executor = SERIAL
) -> None:
    """Write an MRC file for each class, 1 for its voxels and 0 elsewhere, and remove those of other classes.

    Parameters
    ----------
    folder, stem, labels, attributes, executor
        See `write_other_formats`; ``class_names`` must name all labels.

    Raises
    ------
    OutputError
        If a file cannot be written, or if one would replace a file that this program did not make; then none is
        written.
    """
    paths = mask_paths(folder, stem, attributes["class_names"])
    for path in paths:
        if path.exists() and read_mrc_fingerprint(path, MASK_LABEL) is None:
            raise not_ours(path, "an export")
    write = partial(_write_mask, labels, attributes)
    executor.map(write, list(enumerate(paths, 1)), name="export")
    for path in set(_masks(folder, stem)).difference(paths):
        path.unlink()


def _write_mask(labels: Sliceable, attributes: Mapping[str, Any], each: tuple[int, Path]) -> None:
    label, path = each
    text = MASK_LABEL + attributes.get("fingerprint", "")
    mask = Computed(labels, partial(_mask_of, label), np.dtype(np.uint8))
    write_mrc(path, mask, label=text, **placement_in(attributes))


def _mask_of(label: int, labels: Any) -> Any:
    """Return 1 where labels are of a class, and 0 elsewhere."""
    return (np.asarray(labels) == label).astype(np.uint8)


def placement_in(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return voxel size and position from attributes, as `write_mrc` and `position_angstrom` take them."""
    return {name: attributes.get(name) for name in ("voxel_size_angstrom", "origin_angstrom", "nstart")}


def position_angstrom(
    voxel_size_angstrom: Sequence[float | None] | None,
    origin_angstrom: Sequence[float] | None,
    nstart: Sequence[int] | None,
) -> tuple[float, ...] | None:
    """Return where viewers of MRC files place the first voxel: the origin or, if that is 0, start times voxel size.

    >>> position_angstrom((10, 10, 10), (0, 0, 0), (0, -3, 2))
    (0.0, -30.0, 20.0)
    """
    if origin_angstrom is not None and any(origin_angstrom):
        return tuple(map(float, origin_angstrom))
    if voxel_size_angstrom is None or nstart is None:
        return None
    return tuple(float(start) * (size or 0.0) for start, size in zip(nstart, voxel_size_angstrom, strict=True))


# ------------------------------------------------------------------------------------------------------ existing files


def formats_done(configuration: Configuration, stem: str, fingerprint: str, names: Sequence[str]) -> bool:
    """Whether all wanted formats were made from the prediction with this fingerprint, with these class names."""
    return all(
        _fingerprint(name, format_path(configuration.prediction_folder, stem, name), names) == fingerprint
        for name in other_formats(configuration)
    )


def _fingerprint(name: str, path: Path, names: Sequence[str] | None = None) -> str | None:
    """Return a file's fingerprint, "" without one; ``None`` if another program made it or its class names differ."""
    if name == "mrc":
        return read_mrc_fingerprint(path)
    own = read_own_attributes(path)
    if not own or not (path / "labels" / SEGMENTATION).is_dir():  # a converted tomogram has no labels
        return None
    if names is not None and own.get("class_names") != list(names):
        return None
    return str(own.get("fingerprint", ""))


def foreign_formats(folder: Path, stem: str, formats: Sequence[str]) -> list[Path]:
    """Return existing files at the paths of other formats that this program did not make from a prediction.

    Parameters
    ----------
    folder, stem, formats
        See `write_other_formats`.
    """
    paths = {name: format_path(folder, stem, name) for name in formats}
    return [path for name, path in paths.items() if path.exists() and _fingerprint(name, path) is None]


def read_mrc_fingerprint(path: Path, mark: str = MRC_LABEL) -> str | None:
    """Return the fingerprint after `mark` in an MRC file's header; ``None`` for other and unreadable files."""
    try:
        with mrcfile.open(path, header_only=True) as mrc:
            label = bytes(mrc.header.label[0]).decode("ascii", "replace")
    except (OSError, ValueError):
        return None
    return label.removeprefix(mark).strip() if label.startswith(mark) else None


def remove_outdated_formats(folder: Path, stem: str, fingerprint: str | None, keep: Sequence[str] = ()) -> list[str]:
    """Remove files that were made from a prediction with another fingerprint.

    Parameters
    ----------
    folder, stem, fingerprint
        Folder and tomogram of the files, and the fingerprint that they should have.
    keep
        Formats to keep, because they will be replaced.

    Returns
    -------
    list of str
        Warnings.
    """
    removed = []
    for path in (format_path(folder, stem, name) for name in _ENDINGS if name not in keep):
        name = "ome-zarr" if path.is_dir() else "mrc"
        if path.exists() and _fingerprint(name, path) not in (None, fingerprint):
            shutil.rmtree(real(path)) if path.is_dir() else path.unlink()
            removed.append(
                f"{path.name} had outdated labels, so it was removed; "
                f"'cryosiam-dask export --format {name}' writes it again"
            )
    masks = [path for path, found in _masks(folder, stem).items() if found != fingerprint]
    for path in masks:
        path.unlink()
    if masks:
        removed.append(
            f"the masks {', '.join(sorted(path.name for path in masks))} had outdated labels, so they were removed; "
            "'cryosiam-dask export --format mrc --per-class' writes them again"
        )
    return removed


# ------------------------------------------------------------------------------------- exports of written predictions


def export_prediction(
    configuration: Configuration,
    prediction: Path,
    formats: Sequence[str],
    *,
    per_class: bool = False,
    work: zarr.Group,
    executor: Executor = SERIAL,
) -> tuple[str, ...]:
    """Write a predictions file, of this program or of CryoSiam, in other formats.

    Parameters
    ----------
    configuration
        Its ``data_folder`` and ``file_extension`` locate the tomograms, and its ``class_names`` name the labels.
    prediction
        ``<stem>_preds.h5``.
    formats
        ``"ome-zarr"``, ``"mrc"``.
    per_class
        Whether to write one MRC file for each class.
    work
        Group for a temporary copy of the tomogram, unless the tomogram is zarr.
    executor
        Runs the tasks.

    Returns
    -------
    tuple of str
        Warnings.

    Raises
    ------
    OutputError
        If the prediction cannot be read, the tomogram for an OME-Zarr image is missing, or a file cannot be written.
    TomogramError
        If the tomogram cannot be read.
    LabelsError
        If labels and tomogram differ in shape, or the labels are not integers from 0 to 255.
    """
    stem = prediction.name.removesuffix("_preds.h5")
    whole = [name for name in formats if name != "mrc" or not per_class]
    for path in foreign_formats(prediction.parent, stem, whole):
        raise not_ours(path, "an export")
    labels, attributes = uint8_labels(prediction), written_attributes(configuration, prediction, patient=True)
    source = find_source(configuration, stem, attributes)
    tomogram, warnings = None, list[str]()
    if source is not None and ("ome-zarr" in formats or not attributes.get("voxel_size_angstrom")):
        header = read_header(source, **configuration.reading)
        require_shape(prediction, labels.shape, source, header.shape)
    if "ome-zarr" in formats:
        if source is None:
            raise OutputError(
                "the tomogram must exist, because an OME-Zarr image holds it together with its labels",
                place=prediction,
                value=f"no {stem}{configuration.file_extension} in {configuration.data_folder}",
                remedy=(
                    "Make it again with denoise-predict"
                    if configuration.denoiser
                    else "Correct data_folder and file_extension"
                )
                + ", or request only 'mrc'",
            )
        voxels, report = ingest(source, work.store, executor=executor, **configuration.reading)
        tomogram = Placed.of(voxels, report)
        warnings += report.warnings
    stored = attributes.get("class_names") or ()
    count = max(len(stored), _highest(labels, executor))
    attributes["class_names"] = list(named(given_names(configuration) or stored, count))
    folder = prediction.parent
    write_other_formats(folder, stem, whole, labels, tomogram=tomogram, attributes=attributes, executor=executor)
    if len(whole) < len(formats):
        write_masks(folder, stem, labels, attributes=attributes, executor=executor)
    return tuple(warnings)


def written_attributes(configuration: Configuration, prediction: Path, *, patient: bool = False) -> dict[str, Any]:
    """Return the attributes of a predictions file, completed from the header of its tomogram.

    CryoSiam's own files have no attributes, and this program's files lack the voxel size if the header had none.

    Parameters
    ----------
    configuration
        Its ``data_folder`` and ``file_extension`` locate the tomograms.
    prediction
        ``<stem>_preds.h5``.
    patient
        Whether to raise transient errors of the tomogram's disk instead of returning fewer attributes.

    Returns
    -------
    dict
        See `cryosiam_dask.files.hdf5.read_attributes`. A tomogram that is missing, unreadable or of another shape than
        the labels adds nothing.

    Raises
    ------
    OutputError
        If the predictions file cannot be read.
    OSError, TomogramError
        If `patient`, and the disk of the tomogram does not respond.
    """
    attributes = read_attributes(prediction)
    shape = open_dataset(prediction, "labels").shape
    size = voxel_size_in(attributes, len(shape))
    if size and all(size):
        return attributes
    attributes = {name: value for name, value in attributes.items() if size or name != "voxel_size_angstrom"}
    try:
        source = find_source(configuration, prediction.name.removesuffix("_preds.h5"), attributes)
        if source is None:
            return attributes
        header = read_header(source, **configuration.reading)
    except (OSError, CryosiamDaskError) as error:
        if patient and is_transient(error):
            raise
        return attributes
    if header.shape != shape:
        return attributes
    known = header.attributes()
    if size and not all(known["voxel_size_angstrom"]):
        known["voxel_size_angstrom"] = size
    names = ("voxel_size_angstrom", "origin_angstrom", "nstart", "axes", "source")
    return {**attributes, **{name: known[name] for name in names if name == names[0] or name not in attributes}}


def find_source(configuration: Configuration, stem: str, attributes: Mapping[str, Any]) -> Path | None:
    """Return the tomogram that a prediction with these attributes was made from; ``None`` if it is missing.

    Raises
    ------
    TomogramError
        If ``data_folder`` cannot be read.
    """
    names = [f"{stem}{configuration.file_extension}"]
    if isinstance(attributes.get("source"), str):
        names.append(Path(attributes["source"]).name)
    try:
        return next((path for name in names if (path := configuration.data_folder / name).exists()), None)
    except OSError as error:
        raise TomogramError(
            "data_folder must be a readable folder",
            place=configuration.data_folder,
            value=error.strerror,
            remedy="Change its permissions",
        ) from None


def require_shape(prediction: Path, labels: tuple[int, ...], source: Path, tomogram: tuple[int, ...]) -> None:
    """Check that labels have the shape of their tomogram.

    Raises
    ------
    LabelsError
        If they do not.
    """
    if labels != tomogram:
        raise LabelsError(
            f"the labels must have the shape of their tomogram {source}, {tomogram}",
            place=prediction,
            value=labels,
            remedy="Set data_folder and file_extension (or ome_zarr_level) to the tomogram that they were made from",
        )


def _highest(labels: Sliceable, executor: Executor) -> int:
    regions = list(regions_of(labels.shape, (64, 512, *labels.shape[2:])))
    return max(executor.map(partial(_highest_in, labels), regions, name="count"))


def _highest_in(labels: Sliceable, region: Region) -> int:
    return int(np.max(labels[region]))


# --------------------------------------------------------------------------------------------------------- conversion


def convert_to_ome_zarr(
    source: str | Path,
    target: str | Path,
    *,
    level: int = 0,
    dataset: str | None = None,
    overwrite: bool = False,
    executor: Executor = SERIAL,
) -> IngestReport:
    """Convert a tomogram to an OME-Zarr image of several levels.

    Parameters
    ----------
    source, level, dataset, overwrite, executor
        See `cryosiam_dask.stages.ingest.convert`.
    target
        Folder of the image, for example ``tomogram.ome.zarr``.

    Returns
    -------
    IngestReport
        See `cryosiam_dask.stages.ingest.ingest`.

    Raises
    ------
    TomogramError
        If the file cannot be read.
    OutputError
        If the target exists or cannot be written.
    """
    target = Path(target)
    header = read_header(source, level=level, dataset=dataset)
    work = target.with_name(f".{target.name}.work")
    try:
        with converting_to(target, overwrite=overwrite):
            voxels, report = ingest(source, work, level=level, dataset=dataset, executor=executor)
            write_ome_zarr(
                target,
                voxels,
                voxel_size_angstrom=header.voxel_size_angstrom,
                position_angstrom=position_angstrom(**header.placement),
                minimum=report.statistics.minimum or 0.0,
                attributes={**header.attributes(), "statistics": report.statistics.attributes()},
                executor=executor,
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report
