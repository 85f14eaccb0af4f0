"""Make the files that depend on a tomogram's labels: components, other formats, previews, tables of all tomograms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cryosiam_dask._version import __version__
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.blocks import Blocks, Index
from cryosiam_dask.core.executor import Executor, with_retries
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import CryosiamDaskError, OutputError, StorageError, TomogramError, is_transient
from cryosiam_dask.files.hdf5 import read_attributes
from cryosiam_dask.files.mask import open_mask
from cryosiam_dask.files.predictions import exportable_array
from cryosiam_dask.model.classes import given_names, named, names_in
from cryosiam_dask.runs.outcome import ENDING, Outcome, failure_of
from cryosiam_dask.stages.centers import collect_centers, labels_of, remove_outdated_centers
from cryosiam_dask.stages.components import ArrayModule, Description, Labelling, count_labels, remove_small
from cryosiam_dask.stages.export import export_prediction, other_formats, remove_outdated_formats, written_attributes
from cryosiam_dask.stages.ingest import ingest
from cryosiam_dask.stages.lamella import Thickness, count_columns
from cryosiam_dask.stages.measurements import COLLECTION, collect_tables, remove_outdated, write_components
from cryosiam_dask.stages.preview import preview_file, read_fingerprint, write_denoised_preview, write_preview
from cryosiam_dask.stages.summary import summary_of


def all_sizes(sizes: Sequence[int]) -> list[int]:
    """Return ``postprocessing_sizes`` with an entry for each value of uint8: other labels are not filtered."""
    return [*sizes, *[-1] * (256 - len(sizes))]


def without_small(
    labels: zarr.Array[Any],
    voxels: tuple[int, ...],
    sizes: Sequence[int],
    work: zarr.Group,
    executor: Executor,
    array_module: ArrayModule,
    labelling: Labelling | None = None,
    described: Mapping[Index, Description] | None = None,
) -> tuple[zarr.Array[Any], zarr.Array[Any], tuple[int, ...]]:
    """Apply ``postprocessing_sizes``; return the labels, the removed labels, and the number of `voxels` of each label.

    The output also keeps the removed labels, which compress well: the sum of both are the unfiltered labels, so that
    other sizes can be tried without inference. `labelling` and `described` are those of `remove_small`.
    """
    kept, removed = (exportable_array(work, name, labels.shape) for name in ("filtered", "removed"))
    removal = remove_small(
        labels,
        kept,
        all_sizes(sizes),
        removed=removed,
        labelling=labelling,
        described=described,
        executor=executor,
        array_module=array_module,
    )
    left = np.array(voxels) - removal.removed_voxels[: len(voxels)]
    left[0] += sum(removal.removed_voxels)
    return kept, removed, tuple(left.tolist())


def count_voxels(
    labels: zarr.Array[Any], count: int, executor: Executor, thick: bool = False
) -> tuple[tuple[int, ...], Thickness | None]:
    """Count the voxels of each label, for at least `count` labels; if `thick`, also measure their common thickness."""
    thickness = None
    if thick:
        voxels, columns = count_columns(labels, executor=executor)
        thickness = Thickness.of(columns)
    else:
        blocks = Blocks.of(labels)
        voxels = np.sum(executor.map(partial(_count_block, labels, blocks), blocks.indices, name="count"), axis=0)
    return tuple(voxels[: max(count, int(np.flatnonzero(voxels)[-1]) + 1)].tolist()), thickness


def _count_block(labels: zarr.Array[Any], blocks: Blocks, index: tuple[int, int, int]) -> NDArray[np.int64]:
    counts = count_labels(blocks.read(labels, index))
    return np.pad(counts, (0, 256 - len(counts)))


def update_center_lists(configuration: Configuration, outcomes: list[Outcome], inform: Callable[[str], None]) -> None:
    """Update the particle lists of all tomograms."""
    folder = configuration.prediction_folder

    def labels_now(stem: str) -> str | None:
        path = folder / f"{stem}_preds.h5"
        try:
            return labels_of(path, read_attributes(path))
        except (OSError, OutputError) as error:
            if is_transient(error):
                raise
            return None

    pattern = configuration.tilt_series_pattern
    try:
        for stem in with_retries(partial(collect_centers, folder, labels_now, tilt_series_pattern=pattern)):
            inform(f"{stem}: {_OUTDATED_LISTS}")
    except Exception as error:
        outcomes.append(failure_of("class…_centers.csv", (), time.time(), error, folder))


_OUTDATED_LISTS = (
    "its particle lists belong to earlier labels and are no longer used; 'cryosiam-dask semantic-to-centers' makes "
    "them again"
)


def keep_for_the_report(configuration: Configuration, stem: str) -> None:
    with suppress(Exception):  # the report will read the outputs again
        summary_of(configuration, 0, stem)


def update_formats(configuration: Configuration, path: Path, work: zarr.Group, executor: Executor) -> list[str]:
    """Write labels in the other formats that are wanted, and remove those of earlier labels."""
    formats, made = other_formats(configuration), tuple[str, ...]()
    warnings: list[str] = []
    try:
        if formats:
            warnings += export_prediction(configuration, path, formats, work=work, executor=executor)
            made = formats
    finally:  # even if a format cannot be written, such as OME-Zarr without the tomogram
        fingerprint = read_attributes(path).get("fingerprint")
        warnings += remove_outdated_formats(path.parent, stem_of(path), fingerprint, keep=made)
    return warnings


def attributes_written(configuration: Configuration, path: Path) -> dict[str, Any]:
    """Return the attributes of a prediction, with the class names of the configuration."""
    attributes = written_attributes(configuration, path, patient=True)
    names = given_names(configuration)
    return attributes | ({"class_names": list(names)} if names else {})


#: Attributes that the components file copies from the predictions file.
_INHERITED = ("source", "voxel_size_angstrom", "origin_angstrom", "nstart", "axes", "class_names", "fingerprint")


def update_components(
    configuration: Configuration,
    stem: str,
    labels: Sliceable,
    probabilities: Sliceable | None,
    attributes: Mapping[str, Any],
    work: zarr.Group,
    executor: Executor,
    array_module: ArrayModule = "numpy",
) -> tuple[list[str], dict[str, int]]:
    """Write the components of new labels, or remove those of earlier labels.

    Returns warnings and the number of components of each class.
    """
    folder = configuration.prediction_folder
    outdated, warnings = remove_outdated(folder, stem, attributes.get("fingerprint")), list[str]()
    prediction = folder / f"{stem}_preds.h5"
    if prediction.exists() and remove_outdated_centers(folder, stem, labels_of(prediction, attributes)):
        warnings.append(_OUTDATED_LISTS)
    if not configuration.components:
        if outdated:
            warnings.append(
                "its components belonged to earlier labels and have been removed. Set components: True or run "
                "'cryosiam-dask components' to make them again"
            )
        return warnings, {}
    inherited = {name: attributes[name] for name in _INHERITED if attributes.get(name) is not None}
    inherited["software"] = f"cryosiam_dask {__version__}"
    components = write_components(
        folder,
        stem,
        labels,
        probabilities=probabilities,
        attributes=inherited,
        work=work,
        executor=executor,
        array_module=array_module,
    )
    counts = np.bincount(components.classes, minlength=1)[1:].tolist()
    names = named(names_in(attributes), len(counts))
    return warnings + unknown_voxel_size(inherited), {name: n for name, n in zip(names, counts, strict=True) if n}


def draw_preview(
    configuration: Configuration,
    stem: str,
    tomogram: Sliceable,
    labels: Sliceable,
    mask: Sliceable | None,
    attributes: Mapping[str, Any],
    executor: Executor,
) -> list[str]:
    """Draw a tomogram with its new labels and return warnings; if the picture cannot be drawn, that is a warning."""
    path = preview_file(configuration.prediction_folder, stem)
    if not configuration.preview:
        path.unlink(missing_ok=True)  # it shows earlier labels
        return []
    draw = partial(
        write_preview,
        path,
        tomogram,
        labels,
        voxel_size_angstrom=attributes.get("voxel_size_angstrom"),
        class_names=("", *(attributes.get("class_names") or ())),
        lamella=mask,
        lamella_voxels=attributes.get("lamella_voxels"),
        as_lamella=configuration.parameters.network.postprocessing,
        title=stem,
        fingerprint=attributes.get("fingerprint") or "",
        executor=executor,
    )
    return _drawn(path, draw)


def _drawn(path: Path, draw: Callable[[], None]) -> list[str]:
    try:
        with_retries(draw)
    except ENDING:
        raise
    except Exception as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return [f"its picture {path.name} could not be drawn: {error}"]
    return []


def draw_denoised(
    configuration: Configuration,
    stem: str,
    tomogram: Sliceable,
    denoised: Sliceable,
    attributes: Mapping[str, Any],
    executor: Executor,
) -> list[str]:
    """Draw a raw tomogram beside the denoised one and return warnings; if it cannot be drawn, that is a warning."""
    path = preview_file(configuration.prediction_folder, stem)
    if not configuration.preview:
        path.unlink(missing_ok=True)
        return []
    draw = partial(
        write_denoised_preview,
        path,
        tomogram,
        denoised,
        voxel_size_angstrom=attributes.get("voxel_size_angstrom"),
        title=stem,
        fingerprint=attributes.get("fingerprint") or "",
        executor=executor,
    )
    return _drawn(path, draw)


def draw_preview_again(
    configuration: Configuration,
    stem: str,
    labels: Sliceable,
    attributes: Mapping[str, Any],
    work: zarr.Group,
    executor: Executor,
    *,
    missing: bool = False,
) -> list[str]:
    """Draw existing labels over the tomogram that they were made from, if it still exists; return warnings.

    A preview that already shows these labels is kept. A preview that does not exist is only drawn if `missing`, or if
    the labels are those of another program, which draws none.
    """
    path = preview_file(configuration.prediction_folder, stem)
    missing = missing or ("source" in attributes and not attributes.get("fingerprint"))
    wanted = (missing and configuration.preview) or path.exists()
    shows = labels_of(configuration.prediction_folder / f"{stem}_preds.h5", attributes)
    if not wanted or read_fingerprint(path) == shows:
        return []
    attributes = {**attributes, "fingerprint": shows}
    try:
        # Only the name, because the path in the file may come from a stranger.
        source = configuration.data_folder / Path(str(attributes["source"])).name
        mask_file = configuration.mask_folder and configuration.mask_folder / f"{stem}_preds.h5"
        mask = open_mask(mask_file, labels.shape) if mask_file and mask_file.exists() else None
        if configuration.denoiser and not source.exists():
            raise TomogramError("does not exist", place=source, remedy="Make it again with denoise-predict")
        tomogram, _ = ingest(source, work.store, executor=executor, **configuration.reading)
        if tuple(tomogram.shape) != tuple(labels.shape):
            raise OutputError("the tomogram must have the shape of its labels", place=source, value=tomogram.shape)
    except ENDING:
        raise
    except (KeyError, CryosiamDaskError) as error:
        path.unlink(missing_ok=True)
        return [f"its picture {path.name} cannot be drawn from these labels: {error}"]
    return draw_preview(configuration, stem, tomogram, labels, mask, attributes, executor)


def unknown_voxel_size(attributes: Mapping[str, Any]) -> list[str]:
    size = attributes.get("voxel_size_angstrom")
    if size is not None and all(size):
        return []
    remedy = (
        "Set it in the tomogram's header"
        if attributes.get("source")
        else "data_folder holds no readable tomogram of this name and shape: correct it or file_extension"
    )
    return [f"the voxel size is unknown: tables hold only voxels, without Å and nm³. {remedy}"]


def collect(configuration: Configuration, outcomes: list[Outcome]) -> None:
    """Update the tables and particle lists of all tomograms, if there are any."""
    folder = configuration.prediction_folder
    path = folder / f"{COLLECTION}.csv"

    def is_there(stem: str) -> bool:
        names = (f"{stem}_preds.h5", f"{stem}{configuration.file_extension.removesuffix('.gz')}", f"{stem}.mrc")
        return any((folder / name).exists() for name in names[: 3 if configuration.save_original_file_extension else 1])

    def collect_these() -> None:
        if configuration.components or path.exists():
            collect_tables(folder, is_there)

    try:
        with_retries(collect_these)
    except Exception as error:
        outcomes.append(failure_of(path.name, (), time.time(), error, path))
    try:
        listed = any(with_retries(lambda: list(folder.glob("class*_centers.csv"))))
    except (OSError, StorageError):
        return
    if listed:
        update_center_lists(configuration, outcomes, lambda message: LOG.info("%s", message))


def stem_of(prediction: Path) -> str:
    return prediction.name.removesuffix("_preds.h5")
