"""Commands on existing predictions, and the report after a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cryosiam_dask.commands.console import counted, inform, open_logs, print_table, warn
from cryosiam_dask.commands.report import REPORT, is_current, link_latest_log, write_report
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.executor import with_retries
from cryosiam_dask.core.log import LOG, logged
from cryosiam_dask.core.machine import cores
from cryosiam_dask.errors import ConfigurationError
from cryosiam_dask.files.folders import left_out
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.find import find_predictions, find_tomograms, unreadable_folder
from cryosiam_dask.runs.fingerprint import removal_of
from cryosiam_dask.runs.ledger import read_outcomes
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.progress import FileReporter, Pace, Reporters, make_reporter
from cryosiam_dask.runs.workers import forwarded_warnings, log_workers
from cryosiam_dask.runs.written import export, list_centers, measure, postprocess
from cryosiam_dask.stages.export import other_formats


@logged
def postprocess_again(
    configuration: Configuration, console: Console, *, filename: str | None = None, workers: int | None = None
) -> list[Outcome]:
    """Apply ``postprocessing_sizes`` to existing predictions, and print the outcomes.

    Parameters
    ----------
    configuration, console, filename, workers
        See `cryosiam_dask.commands.segment.segment`.
    """
    action = partial(postprocess, configuration)
    outcomes = _with_predictions("semantic-postprocess", action, configuration, filename, console, workers, sizes=True)
    report_on(configuration, outcomes, console)
    return outcomes


@logged
def measure_predictions(
    configuration: Configuration, console: Console, *, filename: str | None = None, workers: int | None = None
) -> list[Outcome]:
    """Number and measure the components of existing predictions, and print the outcomes.

    Parameters
    ----------
    configuration, console, filename, workers
        See `cryosiam_dask.commands.segment.segment`.
    """
    action = partial(measure, configuration)
    outcomes = _with_predictions("components", action, configuration, filename, console, workers)
    report_on(configuration, outcomes, console)
    return outcomes


@logged
def export_predictions(
    configuration: Configuration,
    console: Console,
    *,
    formats: Sequence[str] = (),
    per_class: bool = False,
    filename: str | None = None,
    workers: int | None = None,
) -> list[Outcome]:
    """Write existing predictions in other formats, and print the outcomes.

    Parameters
    ----------
    configuration, console, filename, workers
        See `cryosiam_dask.commands.segment.segment`.
    formats
        ``"ome-zarr"``, ``"mrc"``; if empty, those of the key ``output_formats``.
    per_class
        Whether to write one MRC file for each class.

    Raises
    ------
    ConfigurationError
        If neither `formats` nor the key names a format, or `per_class` is given without MRC.
    """
    formats = formats or other_formats(configuration)
    if per_class and "mrc" not in formats:
        raise ConfigurationError(
            "applies to the format mrc only", place="option --per-class", value=list(formats) or None,
            remedy="Add --format mrc",
        )  # fmt: skip
    if not formats:
        raise ConfigurationError(
            "must name a format other than HDF5",
            place="key output_formats",
            value=list(configuration.output_formats),
            remedy="Add 'ome-zarr' or 'mrc' to it, or give --format",
        )
    action = partial(export, configuration, formats=formats, per_class=per_class)
    return _with_predictions("export", action, configuration, filename, console, workers)


@logged
def list_particles(
    configuration: Configuration,
    console: Console,
    *,
    filename: str | None = None,
    min_voxels: int | None = None,
    erode: bool = False,
    form: Literal["relion", "cryosiam"] = "relion",
    workers: int | None = None,
) -> list[Outcome]:
    """Write particle lists of existing predictions, and print the outcomes.

    Parameters
    ----------
    configuration, console, filename, workers
        See `cryosiam_dask.commands.segment.segment`.
    min_voxels, erode, form
        See `cryosiam_dask.runs.written.list_centers`.
    """
    action = partial(list_centers, configuration, min_voxels=min_voxels, erode=erode, form=form)
    return _with_predictions("semantic-to-centers", action, configuration, filename, console, workers)


def _note_left_out(configuration: Configuration, filename: str | None, console: Console) -> None:
    """If all predictions are used, print a note about files that look like predictions but are left out."""
    if filename is None and configuration.test_files is None:
        found = left_out(configuration.prediction_folder, "_preds.h5")
        if found:
            inform(console, f"note: {found}")


def report_again(configuration: Configuration, console: Console) -> None:
    """Write the report of a prediction folder from its contents, and print its path.

    Parameters
    ----------
    configuration, console
        See `cryosiam_dask.commands.segment.segment`.
    """
    try:
        path = write_report(configuration, recorded_outcomes(configuration))
        _note_left_out(configuration, None, console)
    except OSError as error:
        raise unreadable_folder("prediction_folder", configuration.prediction_folder, error) from None
    inform(console, f"report: {path}")


def recorded_outcomes(configuration: Configuration) -> dict[str, dict[str, Any]]:
    """Return the recorded outcomes of earlier runs, without the values that the outputs themselves hold."""
    folder, masks = configuration.prediction_folder, configuration.mask_folder

    def in_output(stem: str, outcome: Mapping[str, Any]) -> set[str]:
        known = {"status"} if outcome.get("status") == "done" else set()
        return known | ({"voxels"} if (folder / f"{stem}_preds.h5").exists() else set())

    recorded = read_outcomes(folder)
    if masks is not None:  # tomograms without a mask never reached this model
        names = {path.name.removesuffix(configuration.file_extension) for path in find_tomograms(configuration)}
        try:
            of_masks = read_outcomes(masks)
        except OSError:  # not readable: no outcomes
            of_masks = {}
        for stem, outcome in of_masks.items():
            if outcome.get("status") == "failed" and stem in names and not (masks / f"{stem}_preds.h5").exists():
                if (folder / f"{stem}_preds.h5").exists():
                    continue
                error = f"it has no lamella mask: {outcome.get('error')}"
                recorded.setdefault(stem, {"status": "failed", "shape": outcome.get("shape"), "error": error})
    result = {}
    for stem, outcome in recorded.items():
        removed = removal_of(configuration, stem) if configuration.denoises else None
        known = set() if removed else in_output(stem, outcome)
        result[stem] = {**(removed or {}), **{name: value for name, value in outcome.items() if name not in known}}
    return result


def report_on(
    configuration: Configuration, outcomes: Sequence[Outcome], console: Console, warnings: Sequence[str] | None = None
) -> None:
    """Write the report after a run, and print its path; the run does not fail if it cannot be written.

    Parameters
    ----------
    configuration, outcomes, console
        Configuration, outcomes and console of the run.
    warnings
        See `cryosiam_dask.commands.report.write_report`.
    """

    def write() -> Path:
        if all(each.status == "skipped" for each in outcomes) and is_current(configuration):
            link_latest_log(configuration)
            return configuration.prediction_folder / REPORT
        recorded = recorded_outcomes(configuration)
        now = {
            # The recorded seconds are those of the prediction, not those of later commands.
            each.stem: {**(known := recorded.get(each.stem, {})), **asdict(each), "seconds": known.get("seconds")}
            for each in outcomes
            if each.status != "skipped"
        }
        return write_report(configuration, {**recorded, **now}, warnings=warnings)

    try:
        inform(console, f"report: {with_retries(write)}")
    except Exception as error:
        warn(console, f"the report could not be written: {error}")
        LOG.debug("the report could not be written", exc_info=error)


def _with_predictions(
    command: str,
    action: Callable[..., list[Outcome]],
    configuration: Configuration,
    filename: str | None,
    console: Console,
    workers: int | None,
    sizes: bool = False,
) -> list[Outcome]:
    """Run an action on existing predictions with CPU workers, and print the outcomes."""
    predictions = find_predictions(configuration, filename, sizes=sizes)
    open_logs(command, [configuration], console)
    _note_left_out(configuration, filename, console)
    count = workers or cores()
    inform(console, f"starting {counted(count, 'worker')}")
    with open_cluster("cpu", count) as client, forwarded_warnings(client):
        log_workers(client, "cpu")
        pace = Pace(len(predictions))
        reporter = Reporters(pace, make_reporter(console, pace), FileReporter(pace))
        try:
            outcomes = action(predictions, reporter, executor=DaskExecutor(client))
        finally:
            reporter.close()
    print_table(console, outcomes)
    return outcomes
