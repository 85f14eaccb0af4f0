"""Post-process, measure and export existing predictions, and list their particle centres, without inference."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.arrays import Region, regions_of
from cryosiam_dask.core.executor import (
    SERIAL,
    Executor,
    GuardedExecutor,
    Interrupted,
    SharedExecutor,
    TakenOver,
    with_retries,
)
from cryosiam_dask.errors import LostClusterError
from cryosiam_dask.files.atomic import sweep_parts
from cryosiam_dask.files.claims import Claims, claim_path, open_claims
from cryosiam_dask.files.hdf5 import (
    StoredDataset,
    as_uint8,
    dataset_names,
    open_dataset,
    open_hdf5,
    open_labels,
    read_attributes,
)
from cryosiam_dask.files.predictions import replace_labels
from cryosiam_dask.model.classes import counted, named, names_in
from cryosiam_dask.runs.fingerprint import components_done, removal_sizes, with_sizes
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.outcome import Outcome, as_numbers, failure_of, log_warnings, outcome_of
from cryosiam_dask.runs.outputs import (
    attributes_written,
    collect,
    count_voxels,
    draw_preview_again,
    keep_for_the_report,
    stem_of,
    unknown_voxel_size,
    update_center_lists,
    update_components,
    update_formats,
    without_small,
)
from cryosiam_dask.runs.plan import Job, RunPlan, preview_done
from cryosiam_dask.runs.progress import Reporter
from cryosiam_dask.runs.workspace import forget_failure, work_group, work_stores
from cryosiam_dask.stages.centers import cryosiam_centers, labels_of, write_centers, write_cryosiam_centers
from cryosiam_dask.stages.components import require_channel
from cryosiam_dask.stages.export import export_prediction, formats_done


def postprocess(
    configuration: Configuration, predictions: Sequence[Path], reporter: Reporter, *, executor: SharedExecutor = SERIAL
) -> list[Outcome]:
    """Apply ``postprocessing_sizes`` to existing predictions, without inference.

    The sizes are applied to the labels before any removal, so that other sizes can be tried; the same sizes change
    nothing.

    Parameters
    ----------
    configuration
        The YAML file. Tomograms and masks are only read for previews and for ``output_formats`` that contain the
        tomogram.
    predictions
        From `cryosiam_dask.runs.find.find_predictions`.
    reporter
        Receives the progress.
    executor
        Runs the tasks.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """
    sizes = removal_sizes(configuration)

    def act(path: Path, executor: Executor) -> Outcome:
        with work_group(configuration, stem_of(path)) as work:
            return _postprocess_one(configuration, path, sizes, work, executor)

    outcomes = _each(predictions, reporter, act, executor)
    collect(configuration, outcomes)
    return outcomes


def _postprocess_one(
    configuration: Configuration, path: Path, sizes: Sequence[int], work: zarr.Group, executor: Executor
) -> Outcome:
    stem, unfiltered = stem_of(path), _read_unfiltered(path, work, executor)
    voxels, _ = count_voxels(unfiltered, max(2, len(sizes)), executor)
    labels, removed, voxels = without_small(unfiltered, voxels, sizes, work, executor, "numpy")
    thick = configuration.parameters.network.postprocessing and labels.ndim == 3
    thickness = count_voxels(labels, len(voxels), executor, thick)[1] if thick else None
    probabilities = probabilities_of(path) if configuration.components else None
    if probabilities is not None:  # checked before anything is replaced
        require_channel(int(np.flatnonzero(voxels)[-1]), probabilities.shape[0])
    attributes: dict[str, Any] = {"postprocessing_sizes": sizes, **as_numbers(voxels, None, thickness)}
    prediction = read_attributes(path).get("prediction_fingerprint")
    if prediction:
        attributes["fingerprint"] = with_sizes(prediction, sizes)
    write = partial(replace_labels, labels=labels, removed=removed, attributes=attributes)
    executor.map(write, [path], name="export")
    attributes = attributes_written(configuration, path)
    warnings, components = update_components(
        configuration, stem, labels, probabilities_of(path), attributes, work, executor
    )
    warnings += draw_preview_again(configuration, stem, labels, attributes, work, executor)
    warnings += update_formats(configuration, path, work, executor)
    keep_for_the_report(configuration, stem)
    return outcome_of(stem, attributes, unfiltered.shape, voxels, warnings, components)


def measure(
    configuration: Configuration, predictions: Sequence[Path], reporter: Reporter, *, executor: SharedExecutor = SERIAL
) -> list[Outcome]:
    """Number and measure the components of existing predictions, without inference.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        See `postprocess`.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """
    configuration = configuration.model_copy(update={"components": True})
    outcomes = _each(predictions, reporter, partial(measure_one, configuration), executor)
    collect(configuration, outcomes)
    return outcomes


def export(
    configuration: Configuration,
    predictions: Sequence[Path],
    reporter: Reporter,
    *,
    formats: Sequence[str],
    per_class: bool = False,
    executor: SharedExecutor = SERIAL,
) -> list[Outcome]:
    """Write existing predictions in other formats, without inference.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        See `postprocess`; ``data_folder`` and ``file_extension`` locate the tomograms.
    formats, per_class
        See `cryosiam_dask.stages.export.export_prediction`.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """

    def act(path: Path, executor: Executor) -> Outcome:
        with work_group(configuration, stem_of(path)) as work:
            warnings = export_prediction(
                configuration, path, formats, per_class=per_class, work=work, executor=executor
            )
        return Outcome(stem_of(path), "done", open_dataset(path, "labels").shape, warnings=warnings)

    return _each(predictions, reporter, act, executor)


def list_centers(
    configuration: Configuration,
    predictions: Sequence[Path],
    reporter: Reporter,
    *,
    min_voxels: int | None = None,
    erode: bool = False,
    form: Literal["relion", "cryosiam"] = "relion",
    executor: SharedExecutor = SERIAL,
) -> list[Outcome]:
    """Write lists of the component centres of each class of existing predictions.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        See `postprocess`.
    min_voxels
        Components with at most this many voxels are left out; ``None``: as in the configuration.
    erode
        Whether to erode each class once first; always done for CryoSiam's format.
    form
        ``"relion"`` for RELION and Warp (`cryosiam_dask.stages.centers.write_centers`), or ``"cryosiam"``
        (`write_cryosiam_centers`).

    Returns
    -------
    list of Outcome
        One for each prediction.
    """
    folder, network = configuration.prediction_folder, configuration.parameters.network
    smallest = network.min_voxels if min_voxels is None else min_voxels
    if form == "cryosiam":
        return _list_as_cryosiam(configuration, predictions, reporter, 100 if smallest is None else smallest, executor)

    def act(path: Path, executor: Executor) -> Outcome:
        labels, probabilities = open_labels(path), probabilities_of(path)
        attributes = attributes_written(configuration, path)
        counts = write_centers(
            folder,
            stem_of(path),
            labels,
            min_voxels=smallest or 0,
            erode=erode,
            classes=range(1, max(2, probabilities.shape[0] if probabilities else 2)),
            class_names=names_in(attributes),
            voxel_size_angstrom=attributes.get("voxel_size_angstrom"),
            made_from=labels_of(path, attributes),
            tilt_series_pattern=configuration.tilt_series_pattern,
            executor=executor,
        )
        names = named(names_in(attributes), max(counts, default=0))
        particles = {names[label - 1]: n for label, n in counts.items()}
        warnings = tuple(unknown_voxel_size(attributes))
        return Outcome(stem_of(path), "done", labels.shape, warnings=warnings, particles=particles)

    outcomes = _each(predictions, reporter, act, executor)
    update_center_lists(configuration, outcomes, reporter.inform)
    return outcomes


def _list_as_cryosiam(
    configuration: Configuration,
    predictions: Sequence[Path],
    reporter: Reporter,
    min_voxels: int | Sequence[int],
    executor: SharedExecutor,
) -> list[Outcome]:
    folder, given = configuration.prediction_folder, configuration.parameters.network.out_channels
    tables: dict[str, Any] = {}
    known: list[Sequence[str]] = []  # names of the classes of each prediction

    def act(path: Path, executor: Executor) -> Outcome:
        labels, probabilities = open_labels(path), probabilities_of(path)
        table = cryosiam_centers(stem_of(path), labels, min_voxels=min_voxels, executor=executor)
        tables[stem_of(path)] = table
        stored = probabilities.shape[0] - 1 if probabilities else 0
        known.append(named(names_in(attributes_written(configuration, path)), max(1, stored, *table["class"])))
        return Outcome(stem_of(path), "done", labels.shape)

    outcomes = _each(predictions, reporter, act, executor)
    names = max(known, key=len, default=())
    classes = max(1, given - 1) if given else len(names)
    try:
        counts = with_retries(
            lambda: write_cryosiam_centers(
                folder, tables, classes, there=lambda stem: (folder / f"{stem}_preds.h5").exists()
            )
        )
        called = named(names, classes)
        reporter.inform(f"particles: {', '.join(counted(called[label - 1], f'{n:,}') for label, n in counts.items())}")
    except Exception as error:
        outcomes.append(failure_of("labels_….csv", (), time.time(), error, folder))
    return outcomes


def _each(
    predictions: Sequence[Path],
    reporter: Reporter,
    act: Callable[[Path, Executor], Outcome],
    executor: SharedExecutor,
) -> list[Outcome]:
    """Apply `act` to each prediction; predictions that another run works on come last."""
    outcomes: dict[Path, Outcome] = {}
    pending, waiting, announced = deque(predictions), set[Path](), set[Path]()
    for folder in {path.parent for path in predictions}:
        with suppress(OSError):
            sweep_parts(folder)
    with open_claims() as claims:
        while pending:
            path = pending.popleft()
            outcome = _attempt(path, reporter, partial(act, path), executor, claims)
            if outcome is not None:
                outcomes[path] = outcome
                waiting.clear()
                continue
            if path not in announced:
                reporter.inform(f"{stem_of(path)}: another run is working on it; waiting")
                announced.add(path)
            waiting.add(path)
            pending.append(path)
            if waiting.issuperset(pending):
                time.sleep(_CLAIM_PAUSE)
    return [outcomes[path] for path in predictions]


#: Seconds between two attempts to claim predictions that other runs hold.
_CLAIM_PAUSE = 1.0


def _attempt(
    path: Path, reporter: Reporter, work: Callable[[Executor], Outcome], executor: SharedExecutor, claims: Claims
) -> Outcome | None:
    """Run `work` on the prediction `path`; return ``None`` if another run works on it."""
    stem, began, claim = stem_of(path), time.time(), claim_path(path.parent, stem_of(path))

    def guard() -> None:
        if not claims.holds(claim):
            raise TakenOver

    begun = False
    try:
        if not with_retries(partial(claims.take, claim)):
            return None
        reporter.begin(stem)
        begun = True
        own = GuardedExecutor(executor.share(stem, 0, partial(reporter.step, stem)), guard)
        outcome = replace(with_retries(partial(work, own), guard), seconds=time.time() - began)
        log_warnings(outcome)
        reporter.end(stem, f"done in {outcome.seconds:.0f} s, {path.parent}")
    except TakenOver:
        return None
    except (Interrupted, LostClusterError):
        raise
    except Exception as error:
        if not begun:  # the claim could not be written
            reporter.begin(stem)
        outcome = failure_of(stem, (), began, error, path)
        reporter.end(stem, f"FAILED: {outcome.error}")
    finally:
        claims.release(claim)
    return outcome


def measure_one(configuration: Configuration, path: Path, executor: Executor) -> Outcome:
    """Number and measure the components of one existing prediction."""
    stem, labels = stem_of(path), open_labels(path)
    with work_group(configuration, stem) as work:
        attributes, probabilities = attributes_written(configuration, path), probabilities_of(path)
        warnings, components = update_components(configuration, stem, labels, probabilities, attributes, work, executor)
        if not attributes.get("fingerprint"):
            warnings += draw_preview_again(configuration, stem, labels, attributes, work, executor)
    keep_for_the_report(configuration, stem)
    return outcome_of(stem, attributes, labels.shape, (), warnings, components)


def complete(plan: RunPlan, job: Job, executor: Executor) -> Outcome:
    """Make the missing or outdated files that belong to an existing prediction.

    Returns
    -------
    Outcome
        ``"skipped"`` if another run has made everything in the meantime.

    Raises
    ------
    Interrupted, LostClusterError
        If the run should stop; finished work is kept.
    """
    began = time.time()
    try:
        return with_retries(partial(_complete, plan, job, executor))
    except (Interrupted, LostClusterError):
        raise
    except Exception as error:
        return failure_of(job.stem, (), began, error, job.output, plan.name)


def _complete(plan: RunPlan, job: Job, executor: Executor) -> Outcome:
    configuration, warnings, began = plan.configuration, list[str](), time.time()
    components: Mapping[str, int] = {}
    if not plan.outdated(job):
        return Outcome(job.stem, "skipped", stage=plan.name)
    if not components_done(job.components, job.fingerprint, plan.class_names):
        measured = measure_one(configuration, job.output, executor)
        warnings, components = [*measured.warnings], measured.components
    if not preview_done(configuration, job):
        labels, attributes = open_labels(job.output), attributes_written(configuration, job.output)
        with work_group(configuration, job.stem) as work:
            warnings += draw_preview_again(configuration, job.stem, labels, attributes, work, executor, missing=True)
    if not formats_done(configuration, job.stem, job.fingerprint, plan.class_names):
        with work_group(configuration, job.stem) as work:
            warnings += update_formats(configuration, job.output, work, executor)
    # A run that failed after writing the labels has left its work store and a recorded failure behind.
    for folder in () if configuration.keep_work else work_stores(configuration, job.stem):
        shutil.rmtree(folder, ignore_errors=True)
    forget_failure(Ledger(configuration.prediction_folder, job.stem))
    keep_for_the_report(configuration, job.stem)
    attributes = attributes_written(configuration, job.output)
    voxels = [int(count) for count in attributes.get("voxels", ())]
    outcome = outcome_of(job.stem, attributes, open_labels(job.output).shape, voxels, warnings, components)
    return log_warnings(replace(outcome, seconds=time.time() - began, stage=plan.name))


def probabilities_of(path: Path) -> StoredDataset | None:
    return open_dataset(path, "probs") if "probs" in dataset_names(path) else None


def _read_unfiltered(path: Path, work: zarr.Group, executor: Executor) -> zarr.Array[Any]:
    """Copy the labels of a prediction, including the removed ones, to a zarr array."""
    shape = open_labels(path).shape
    labels = work.create_array("labels", shape=shape, chunks=tuple(min(128, n) for n in shape), dtype=np.uint8)
    regions = list(regions_of(shape, labels.chunks))
    executor.map(partial(_read_unfiltered_chunk, path, labels), regions, name="read")
    return labels


def _read_unfiltered_chunk(path: Path, labels: zarr.Array[Any], region: Region) -> None:
    with open_hdf5(path) as file:
        chunk = file["labels"][region]
        if "removed" in file:
            # In 64 bits, because a sum in 8 bits could wrap around to a valid label.
            chunk = np.add(chunk, file["removed"][region], dtype=np.int64, casting="same_kind")
    labels[region] = as_uint8(chunk, path)
