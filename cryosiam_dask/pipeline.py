"""A collection of tomograms from files to files, and what became of each.

`run` takes the tomograms of a plan one after the other through the stages::

    tomogram.mrc ─ingest─▶ zarr ─predict─▶ labels ─lamella─▶ ─remove small─▶ ─export─▶ <stem>_preds.h5
                                                                           └─number─▶ <stem>_components.h5, tables

A tomogram that fails is recorded and the others go on. An output appears complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from cryosiam_dask._version import __version__
from cryosiam_dask.centers import collect_centers, write_centers
from cryosiam_dask.components import ArrayModule, Blocks, ChunkedArray, remove_small
from cryosiam_dask.config import Configuration
from cryosiam_dask.errors import (
    ConfigurationError,
    CryosiamDaskError,
    OutputError,
    Problems,
)
from cryosiam_dask.executor import SERIAL, Executor
from cryosiam_dask.grid import block_size_for, make_grid
from cryosiam_dask.labels_to_hdf5 import (
    StoredDataset,
    dataset_names,
    exportable_array,
    open_dataset,
    read_attributes,
    replace_labels,
    write_hdf5,
    write_mrc,
)
from cryosiam_dask.lamella import postprocess_lamella
from cryosiam_dask.mask import open_mask
from cryosiam_dask.measurements import COLLECTION, collect_tables, remove_outdated, write_components
from cryosiam_dask.mrc_to_zarr import IngestReport, TomogramHeader, ingest, read_header
from cryosiam_dask.plan import MRC_LABEL, Job, RunPlan, removal_sizes, with_sizes
from cryosiam_dask.preview import Sliceable, preview_file, read_fingerprint, write_preview
from cryosiam_dask.progress import Reporter
from cryosiam_dask.timeline import write_timeline
from cryosiam_dask.zarr_to_labels import StoredPrediction, create_outputs, predict_store, tomogram_chunks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one tomogram.

    Attributes
    ----------
    stem
        Its name.
    status
        ``"done"``, ``"skipped"`` or ``"failed"``.
    shape
        (z, y, x) in voxels; empty where the file could not be read.
    seconds
        Wall-clock time spent on it.
    voxels
        Voxels of each label.
    warnings
        What needs attention.
    error
        Why it failed.
    details
        The traceback of an error that this program did not foresee.
    """

    stem: str
    status: Literal["done", "skipped", "failed"]
    shape: tuple[int, ...] = ()
    seconds: float = 0.0
    voxels: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    details: str = field(default="", repr=False)


def run(
    plan: RunPlan,
    reporter: Reporter,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    executor: Executor = SERIAL,
    timeline: bool = False,
) -> list[Outcome]:
    """Segment the tomograms of a plan.

    Parameters
    ----------
    plan
        From `plan_run`.
    reporter
        Told what happens.
    device
        What the workers run the network on.
    executor
        Runs the pieces of every stage.
    timeline
        Whether to draw ``<stem>_timeline.png``, when each worker read, computed and wrote each block.

    Returns
    -------
    list of Outcome
        One for each tomogram, those that were done before included. Failures are outcomes, not exceptions.
    """
    make_folders(plan)
    outcomes = [Outcome(job.stem, "skipped") for job in plan.skipped]
    for job in plan.jobs:
        began = time.monotonic()
        reporter.begin(job.stem)
        header: TomogramHeader | None = None
        try:
            header = read_header(job.source)
            for note in header.notes:
                reporter.say(f"{job.stem}: {note}")
            voxels, warnings = _segment(plan, job, header, device, executor, timeline)
            outcome = Outcome(job.stem, "done", header.shape, time.monotonic() - began, voxels, warnings)
            reporter.end(f"done in {outcome.seconds:.0f} s, {job.output}")
        except Exception as error:
            shape = header.shape if header else ()
            outcome = _failed(job.stem, shape, began, error, job.output)
            reporter.end(f"FAILED: {outcome.error}")
        outcomes.append(outcome)
    for job in plan.unmeasured:
        outcomes.append(_attempt(job.output, reporter, partial(_complete, plan.configuration, job.output, executor)))
    _collect(plan.configuration, outcomes)
    return outcomes


def make_folders(plan: RunPlan) -> None:
    """Make the folders that a run writes to.

    Raises
    ------
    OutputError
        If one cannot be made.
    """
    for key in ("prediction_folder", "work_folder"):
        folder: Path | None = getattr(plan.configuration, key)
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                "must be a folder that can be made",
                place=f"key {key}",
                value=f"{folder}: {error.strerror}",
                remedy=f"Set {key} to another folder or change the permissions",
            ) from None


def _failed(stem: str, shape: tuple[int, ...], began: float, error: Exception, path: Path) -> Outcome:
    """The outcome of a tomogram whose work on the output `path` ended with `error`."""
    details = ""
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
    ):
        error = OutputError(
            "work and output folder must be writable and have space left",
            place=error.filename or path.parent,
            value=error.strerror,
            remedy="Free space, change the permissions, or set work_folder or prediction_folder to another disk",
        )
    if isinstance(error, CryosiamDaskError):
        message = str(error)
    else:
        message = f"{path}: unexpected {type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))
    return Outcome(stem, "failed", shape, time.monotonic() - began, error=message, details=details)


def _segment(
    plan: RunPlan,
    job: Job,
    header: TomogramHeader,
    device: Literal["cpu", "cuda"],
    executor: Executor,
    timeline: bool,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """One tomogram from file to file; returns the voxels of each label, and warnings."""
    configuration, network = plan.configuration, plan.configuration.parameters.network
    array_module: ArrayModule = "cupy" if device == "cuda" else "numpy"
    block_size = block_size_for(header.shape, plan.patch, configuration.block_size, executor.workers, plan.halo)
    grid = make_grid(header.shape, plan.patch, block_size, plan.halo)
    mask = None if job.mask is None else open_mask(job.mask, header.shape)
    with _work_group(configuration, job.stem) as work:
        chunks = None if header.compressed else tomogram_chunks(grid)
        compress = header.dtype.kind != "f" or configuration.keep_work
        tomogram, report = ingest(job.source, work.store, chunks=chunks, compress=compress, executor=executor)
        outputs = create_outputs(work, grid, plan.checkpoint.architecture.out_channels, plan.wanted)
        times = predict_store(StoredPrediction(plan.spec(device), grid, tomogram, outputs, mask), executor=executor)
        if timeline and times:
            write_timeline(configuration.prediction_folder / f"{job.stem}_timeline.png", times, job.stem)
        labels, warnings = outputs["labels"], list(report.warnings)
        if network.postprocessing:
            filled = _like(work, "lamella", labels)
            found = postprocess_lamella(
                outputs["probabilities"],
                labels,
                filled,
                threshold=plan.threshold,
                hull="volume" if network.hull_3d else "slices",
                work=work,
                executor=executor,
                array_module=array_module,
            ).found
            if not found:
                warnings.append(
                    f"no lamella found: no smoothed probability lies above the threshold {plan.threshold:g}. "
                    "The labels were left as they are. Lower network.threshold, and check trained_model"
                )
            labels = filled
        voxels, removed, sizes = _count_voxels(labels, plan.labels, executor), None, removal_sizes(configuration)
        if sizes:
            labels, removed, voxels = _without_small(labels, voxels, sizes, work, executor, array_module)
        if voxels[0] == math.prod(header.shape):
            warnings.append(_why_blank(plan, report))
        attributes = _attributes(plan, job, report, warnings) | {"voxels": voxels}
        if job.output.suffix == ".h5":
            internal = outputs if configuration.save_internal_files else {}
            write = partial(
                write_hdf5,
                labels=labels,
                removed=removed,
                probabilities=internal.get("probabilities"),
                distances=internal.get("distances"),
                attributes=attributes,
            )
        else:
            write = partial(
                write_mrc,
                labels=labels,
                voxel_size_angstrom=header.voxel_size_angstrom,
                origin_angstrom=header.origin_angstrom,
                nstart=header.nstart,
                label=MRC_LABEL + job.fingerprint,
            )
        executor.map(write, [job.output], name="export")
        warnings += _draw(configuration, job.stem, tomogram, labels, mask, attributes, executor)
        probabilities = outputs.get("probabilities")
        warnings += _update_components(
            configuration, job.stem, labels, probabilities, attributes, work, executor, array_module
        )
    return voxels, tuple(warnings)


@contextmanager
def _work_group(configuration: Configuration, stem: str) -> Iterator[zarr.Group]:
    """An empty zarr group for a tomogram's intermediate arrays, which no other run uses at the same time."""
    folder = _work_folder(configuration, stem)
    folder.mkdir(parents=True, exist_ok=True)
    complete = False
    with _claimed(folder):
        try:
            for left_over in folder.iterdir():
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield zarr.create_group(str(folder))
            complete = True
        finally:
            if not (complete and configuration.keep_work):
                shutil.rmtree(folder, ignore_errors=True)


def _work_folder(configuration: Configuration, stem: str) -> Path:
    return (configuration.work_folder or configuration.prediction_folder) / f"{stem}.work.zarr"


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs; the kernel lets go of it with the process, however that ends."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(
            "only one run may work on a tomogram at a time",
            place=folder,
            value="a folder in use by another run",
            remedy="Wait for the other run, or use another prediction_folder",
        ) from None
    except OSError:
        pass  # some network disks know no locks
    try:
        yield
    finally:
        os.close(lock)


def remove_left_overs(plan: RunPlan) -> None:
    """Remove what tasks in flight wrote after their tomogram had failed; to be called when the workers are gone."""
    for job in (*plan.jobs, *plan.unmeasured) if not plan.configuration.keep_work else ():
        folder = _work_folder(plan.configuration, job.stem)
        with suppress(OutputError, OSError), _claimed(folder):
            shutil.rmtree(folder)


def _like(work: zarr.Group, name: str, labels: zarr.Array[Any]) -> zarr.Array[Any]:
    return work.create_array(
        name, shape=labels.shape, chunks=labels.chunks, dtype=labels.dtype, fill_value=0, compressors=labels.compressors
    )


def _without_small(
    labels: zarr.Array[Any],
    voxels: tuple[int, ...],
    sizes: Sequence[int],
    work: zarr.Group,
    executor: Executor,
    array_module: ArrayModule,
) -> tuple[zarr.Array[Any], zarr.Array[Any], tuple[int, ...]]:
    """Apply ``postprocessing_sizes``; returns the labels, those that were removed, and the `voxels` of each label.

    What was removed is kept in the output: it gives back the unfiltered labels by addition, so that other sizes can be
    tried without inference, and compresses to next to nothing.
    """
    kept, removed = (exportable_array(work, name, labels.shape) for name in ("filtered", "removed"))
    # One entry for each label that uint8 holds; those without an entry of their own are left alone.
    of_all = [*sizes, *[-1] * (256 - len(sizes))]
    removal = remove_small(labels, kept, of_all, removed=removed, executor=executor, array_module=array_module)
    left = np.array(voxels) - removal.removed_voxels[: len(voxels)]
    left[0] += sum(removal.removed_voxels)
    return kept, removed, tuple(left.tolist())


def _count_voxels(labels: zarr.Array[Any], count: int, executor: Executor) -> tuple[int, ...]:
    """Voxels of each label, of at least `count` labels."""
    blocks = Blocks.of(labels)
    voxels = np.sum(executor.map(partial(_count_block, labels, blocks), blocks.indices, name="count"), axis=0)
    return tuple(voxels[: max(count, int(np.flatnonzero(voxels)[-1]) + 1)].tolist())


def _count_block(labels: zarr.Array[Any], blocks: Blocks, index: tuple[int, int, int]) -> NDArray[np.int64]:
    block = blocks.read(labels, index)
    counts = np.zeros(256, np.int64)
    highest = int(block.max())
    if highest > 20:
        return np.bincount(block.reshape(-1), minlength=256)
    # Comparing a few times is many times faster than np.bincount, which makes 64-bit integers of all voxels.
    for label in range(highest + 1):
        counts[label] = np.count_nonzero(block == label)
    return counts


def _why_blank(plan: RunPlan, report: IngestReport) -> str:
    data, statistics = plan.configuration.parameters.data, report.statistics
    lowest, highest = (math.nan if v is None else v for v in (statistics.minimum, statistics.maximum))
    return (
        f"every voxel is background. Its intensities run from {lowest:g} to {highest:g}, and min {data.min:g} to max "
        f"{data.max:g} is what the network sees: set parameters.data.min and max to the range of the tomogram, verify "
        f"trained_model and lower network.threshold (now {plan.threshold:g})"
        + ("; check that the masks in mask_folder are not empty" if plan.configuration.mask_folder else "")
    )


def _attributes(plan: RunPlan, job: Job, report: IngestReport, warnings: Sequence[str]) -> dict[str, Any]:
    header = report.header
    packages = ("dask", "h5py", "monai", "numpy", "scikit-image", "torch", "zarr")
    return {
        "software": f"cryosiam_dask {__version__}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "source": job.source.name,
        "voxel_size_angstrom": header.voxel_size_angstrom,
        "origin_angstrom": header.origin_angstrom,
        "nstart": header.nstart,
        "axes": "zyx"[-len(header.shape) :],
        "checkpoint": plan.configuration.trained_model.name,
        "checkpoint_sha256": plan.checkpoint.sha256,
        "configuration": plan.configuration.model_dump_json(by_alias=True),
        "threshold": plan.threshold,
        "patch_size": plan.patch,
        "postprocessing_sizes": removal_sizes(plan.configuration),
        "warnings": "\n".join(warnings),
        "prediction_fingerprint": job.prediction_fingerprint,
        "fingerprint": job.fingerprint,
    }


# ------------------------------------------------------------------------------------------------------- after the run


def postprocess(
    configuration: Configuration, predictions: Sequence[Path], reporter: Reporter, *, executor: Executor = SERIAL
) -> list[Outcome]:
    """Apply ``postprocessing_sizes`` to written predictions, without inference.

    It starts from the labels before any removal, so that other sizes can be tried and the same sizes change nothing.

    Parameters
    ----------
    configuration
        The YAML file; of its paths only ``prediction_folder`` and ``work_folder`` are used, and for the pictures those
        of the tomogram and its mask where they are still there.
    predictions
        From `find_predictions`.
    reporter
        Told what happens.
    executor
        Runs the pieces.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """
    sizes = removal_sizes(configuration)
    outcomes = []
    for path in predictions:
        stem, began = _stem(path), time.monotonic()
        reporter.begin(stem)
        shape: tuple[int, ...] = ()
        try:
            with _work_group(configuration, stem) as work:
                unfiltered = _read_unfiltered(path, work, executor)
                shape = unfiltered.shape
                voxels = _count_voxels(unfiltered, max(2, len(sizes)), executor)
                labels, removed, voxels = _without_small(unfiltered, voxels, sizes, work, executor, "numpy")
                attributes: dict[str, Any] = {"postprocessing_sizes": sizes, "voxels": voxels}
                prediction = read_attributes(path).get("prediction_fingerprint")
                if prediction:
                    attributes["fingerprint"] = with_sizes(prediction, sizes)
                write = partial(replace_labels, labels=labels, removed=removed, attributes=attributes)
                executor.map(write, [path], name="export")
                attributes = read_attributes(path)
                warnings = _update_components(
                    configuration, stem, labels, _probabilities(path), attributes, work, executor
                )
                warnings += _draw_again(configuration, stem, labels, attributes, work, executor)
            outcome = Outcome(stem, "done", shape, time.monotonic() - began, voxels, tuple(warnings))
            reporter.end(f"done in {outcome.seconds:.0f} s, {path}")
        except Exception as error:
            outcome = _failed(stem, shape, began, error, path)
            reporter.end(f"FAILED: {outcome.error}")
        outcomes.append(outcome)
    _collect(configuration, outcomes)
    return outcomes


def measure(
    configuration: Configuration, predictions: Sequence[Path], reporter: Reporter, *, executor: Executor = SERIAL
) -> list[Outcome]:
    """Number and measure the components of written predictions, without inference.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        As of `postprocess`.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """
    configuration = configuration.model_copy(update={"components": True})
    outcomes = [_attempt(path, reporter, partial(_measure, configuration, path, executor)) for path in predictions]
    _collect(configuration, outcomes)
    return outcomes


def list_centers(
    configuration: Configuration,
    predictions: Sequence[Path],
    reporter: Reporter,
    *,
    min_voxels: int | None = None,
    erode: bool = False,
    executor: Executor = SERIAL,
) -> list[Outcome]:
    """Write lists of the centres of components, of each class of written predictions.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        As of `postprocess`.
    min_voxels
        Components with at most so many voxels are left out; ``None``: as the configuration says.
    erode
        Whether to erode each class once before.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """
    folder = configuration.prediction_folder
    smallest = configuration.parameters.network.min_voxels if min_voxels is None else min_voxels

    def act(path: Path) -> _Result:
        labels, probabilities, attributes = _written_labels(path), _probabilities(path), read_attributes(path)
        counts = write_centers(
            folder,
            _stem(path),
            labels,
            min_voxels=smallest,
            erode=erode,
            classes=range(1, max(2, probabilities.shape[0] if probabilities else 2)),
            voxel_size_angstrom=attributes.get("voxel_size_angstrom"),
            executor=executor,
        )
        reporter.say(f"particles: {', '.join(f'{n} of class {label}' for label, n in counts.items())}")
        return labels.shape, (), tuple(_unknown_voxel_size(attributes))

    outcomes = [_attempt(path, reporter, partial(act, path)) for path in predictions]
    try:
        collect_centers(folder)
    except Exception as error:
        outcomes.append(_failed("class…_centers.csv", (), time.monotonic(), error, folder))
    return outcomes


_Result: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]  # shape, voxels of each label, warnings


def _attempt(path: Path, reporter: Reporter, work: Callable[[], _Result]) -> Outcome:
    """What became of work on the written prediction `path`."""
    stem, began = _stem(path), time.monotonic()
    reporter.begin(stem)
    try:
        shape, voxels, warnings = work()
        outcome = Outcome(stem, "done", shape, time.monotonic() - began, voxels, warnings)
        reporter.end(f"done in {outcome.seconds:.0f} s, {path.parent}")
    except Exception as error:
        outcome = _failed(stem, (), began, error, path)
        reporter.end(f"FAILED: {outcome.error}")
    return outcome


def _measure(configuration: Configuration, path: Path, executor: Executor) -> _Result:
    stem, labels = _stem(path), _written_labels(path)
    with _work_group(configuration, stem) as work:
        attributes, probabilities = read_attributes(path), _probabilities(path)
        warnings = _update_components(configuration, stem, labels, probabilities, attributes, work, executor)
    return labels.shape, (), tuple(warnings)


def _complete(configuration: Configuration, path: Path, executor: Executor) -> _Result:
    """Make from a written prediction what belongs to it and is missing or outdated."""
    shape, voxels, warnings = _measure(configuration, path, executor)
    stem = _stem(path)
    with _work_group(configuration, stem) as work:
        attributes = read_attributes(path)
        drawn = _draw_again(configuration, stem, _written_labels(path), attributes, work, executor, missing=True)
    return shape, voxels, (*warnings, *drawn)


#: What the file of components says of its tomogram and of the labels that it was made from.
_INHERITED = ("source", "voxel_size_angstrom", "origin_angstrom", "nstart", "axes", "fingerprint")


def _update_components(
    configuration: Configuration,
    stem: str,
    labels: ChunkedArray,
    probabilities: ChunkedArray | None,
    attributes: Mapping[str, Any],
    work: zarr.Group,
    executor: Executor,
    array_module: ArrayModule = "numpy",
) -> list[str]:
    """Write the components of new labels, or remove those of earlier ones; returns what needs attention."""
    folder = configuration.prediction_folder
    outdated = remove_outdated(folder, stem, attributes.get("fingerprint"))
    if not configuration.components:
        if not outdated:
            return []
        return [
            "its components were those of other labels and have been removed. Set components: True, or run "
            "'cryosiam-dask components', to make them again"
        ]
    inherited = {name: attributes[name] for name in _INHERITED if attributes.get(name) is not None}
    inherited["software"] = f"cryosiam_dask {__version__}"
    write_components(
        folder,
        stem,
        labels,
        probabilities=probabilities,
        attributes=inherited,
        work=work,
        executor=executor,
        array_module=array_module,
    )
    return _unknown_voxel_size(inherited)


def _draw(
    configuration: Configuration,
    stem: str,
    tomogram: Sliceable,
    labels: Sliceable,
    mask: Sliceable | None,
    attributes: Mapping[str, Any],
    executor: Executor,
) -> list[str]:
    """Draw a tomogram with its new labels; returns what needs attention. A picture is no reason to fail."""
    path = preview_file(configuration.prediction_folder, stem)
    if not configuration.preview:
        path.unlink(missing_ok=True)  # what it shows are earlier labels
        return []
    try:
        write_preview(
            path,
            tomogram,
            labels,
            voxel_size_angstrom=attributes.get("voxel_size_angstrom"),
            class_names=("", *(configuration.class_names or ())),
            lamella=mask,
            title=stem,
            fingerprint=attributes.get("fingerprint") or "",
            executor=executor,
        )
    except Exception as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return [f"its picture {path.name} could not be drawn: {error}"]
    return []


def _draw_again(
    configuration: Configuration,
    stem: str,
    labels: Sliceable,
    attributes: Mapping[str, Any],
    work: zarr.Group,
    executor: Executor,
    *,
    missing: bool = False,
) -> list[str]:
    """Draw written labels over the tomogram that they were made from, where it is still there; returns warnings.

    A picture that shows these labels is left alone, and so is one that is not there, unless `missing` ones are wanted.
    """
    path = preview_file(configuration.prediction_folder, stem)
    wanted = configuration.preview if missing else path.exists()
    if not wanted or read_fingerprint(path) == attributes.get("fingerprint"):
        return []
    try:
        source = configuration.data_folder / str(attributes["source"])
        mask_file = configuration.mask_folder and configuration.mask_folder / f"{stem}_preds.h5"
        mask = open_mask(mask_file, labels.shape) if mask_file else None
        tomogram, _ = ingest(source, work.store, executor=executor)
        if tuple(tomogram.shape) != tuple(labels.shape):
            raise OutputError("the tomogram must have the shape of its labels", place=source, value=tomogram.shape)
    except (KeyError, CryosiamDaskError) as error:
        path.unlink(missing_ok=True)
        return [f"its picture {path.name} cannot be drawn from these labels: {error}"]
    return _draw(configuration, stem, tomogram, labels, mask, attributes, executor)


def _unknown_voxel_size(attributes: Mapping[str, Any]) -> list[str]:
    size = attributes.get("voxel_size_angstrom")
    if size is not None and all(size):
        return []
    return ["the voxel size is unknown: tables hold voxels alone, without Å and nm³. Set it in the tomogram's header"]


def _collect(configuration: Configuration, outcomes: list[Outcome]) -> None:
    """Bring the tables of all tomograms up to date, if there are any."""
    path = configuration.prediction_folder / f"{COLLECTION}.csv"
    if configuration.components or path.exists():
        try:
            collect_tables(path.parent)
        except Exception as error:
            outcomes.append(_failed(path.name, (), time.monotonic(), error, path))


def find_predictions(configuration: Configuration, filename: str | None = None, *, sizes: bool = False) -> list[Path]:
    """The written predictions of a configuration.

    Parameters
    ----------
    configuration
        The YAML file.
    filename
        Name of a single tomogram; rules over ``test_files``.
    sizes
        Whether ``postprocessing_sizes`` are needed.

    Raises
    ------
    Problems
        If one is missing, or there are none, or the configuration lacks ``postprocessing_sizes``.
    """
    folder, extension = configuration.prediction_folder, configuration.file_extension
    names = (filename,) if filename is not None else configuration.test_files
    if names is None:
        predictions = sorted(folder.glob("*_preds.h5"))
    else:
        predictions = [folder / f"{name.removesuffix(extension)}_preds.h5" for name in names]
    problems: list[CryosiamDaskError] = [
        OutputError(
            "there must be a written prediction of this name",
            place="key prediction_folder",
            value=f"no file {path}",
            remedy="Run semantic-predict first",
        )
        for path in predictions or [folder / "*_preds.h5"]
        if not path.is_file()
    ]
    if sizes and configuration.parameters.network.postprocessing_sizes is None:
        problems.append(
            ConfigurationError(
                "this key is required to remove small components",
                place="key parameters.network.postprocessing_sizes",
                remedy="Add a list with one entry per label, such as [ -1, 5000, -1, -1, -1 ]",
            )
        )
    if problems:
        raise Problems(problems)
    return predictions


def _stem(prediction: Path) -> str:
    return prediction.name.removesuffix("_preds.h5")


def _written_labels(path: Path) -> StoredDataset:
    labels = open_dataset(path, "labels")
    if labels.dtype.kind not in "iu":
        raise OutputError(
            "labels must be whole numbers", place=path, value=labels.dtype, remedy="Run semantic-predict again"
        )
    return labels


def _probabilities(path: Path) -> StoredDataset | None:
    return open_dataset(path, "probs") if "probs" in dataset_names(path) else None


def _read_unfiltered(path: Path, work: zarr.Group, executor: Executor) -> zarr.Array[Any]:
    """Copy the labels of a written prediction, with what was removed from them, to a zarr array."""
    shape = _written_labels(path).shape
    labels = work.create_array("labels", shape=shape, chunks=tuple(min(128, n) for n in shape), dtype=np.uint8)
    executor.map(partial(_read_unfiltered_chunk, path, labels), _corners(labels), name="read")
    return labels


def _read_unfiltered_chunk(path: Path, labels: zarr.Array[Any], corner: tuple[int, ...]) -> None:
    region = _chunk_region(labels, corner)
    with h5py.File(path, "r") as file:
        chunk = file["labels"][region]
        if "removed" in file:
            chunk = chunk + file["removed"][region]
    if chunk.min() < 0 or chunk.max() > 255:
        raise OutputError(
            "labels must lie between 0 and 255",
            place=path,
            value=f"{chunk.min()} to {chunk.max()}",
            remedy="Predict again, or correct the file that was edited",
        )
    labels[region] = chunk


def _corners(array: zarr.Array[Any]) -> list[tuple[int, ...]]:
    return list(product(*(range(0, n, c) for n, c in zip(array.shape, array.chunks, strict=True))))


def _chunk_region(array: zarr.Array[Any], corner: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, array.chunks, array.shape, strict=True))
