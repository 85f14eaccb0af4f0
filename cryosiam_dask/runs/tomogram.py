"""One tomogram from file to files, and what became of it.

`segment` takes a tomogram through the stages::

    tomogram.mrc ─ingest─▶ zarr ─predict─▶ labels ─lamella─▶ ─remove small─▶ ─export─▶ <stem>_preds.h5
                                                                           └─number─▶ <stem>_components.h5, tables

and through them again for a second model, which finds the lamella of the first one and the zarr that was made for it.
An output appears complete or not at all. What is done is recorded block by block (`cryosiam_dask.runs.ledger`), and a
run that was killed goes on from there. `cryosiam_dask.runs.collection` does this for many tomograms.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from cryosiam_dask._version import __version__
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.blocks import Blocks
from cryosiam_dask.core.diagnosis import Intensities
from cryosiam_dask.core.diagnosis import blank as why_blank
from cryosiam_dask.core.executor import (
    PAUSES,
    SERIAL,
    Executor,
    GuardedExecutor,
    Interrupted,
    NamedExecutor,
    SharedExecutor,
    TakenOver,
    all_workers,
    lasting,
    patiently,
    wait,
)
from cryosiam_dask.core.grid import Grid, make_grid
from cryosiam_dask.core.local_store import AnyDiskStore
from cryosiam_dask.core.log import LOG, TOLD
from cryosiam_dask.core.processes import boot_id
from cryosiam_dask.errors import (
    ClusterError,
    CryosiamDaskError,
    DeviceError,
    DiskError,
    LostClusterError,
    OutputError,
    StorageError,
    may_pass,
    not_written,
)
from cryosiam_dask.files.atomic import part_name, sweep_parts
from cryosiam_dask.files.claims import Claims, claim_path, open_claims
from cryosiam_dask.files.hdf5 import StoredDataset, dataset_names, open_dataset, open_hdf5, read_attributes
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.identity import is_newer_in_part, newest_chunk, source_content, source_identity
from cryosiam_dask.files.mask import open_mask
from cryosiam_dask.files.mrc import write_mrc
from cryosiam_dask.files.predictions import exportable_array, replace_labels, write_hdf5
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.files.zarr import Voxels, ZarrHeader
from cryosiam_dask.model.classes import counted, given_names, named, shares
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.plan import (
    Job,
    RunPlan,
    components_done,
    known_identity,
    preview_done,
    removal_sizes,
    with_sizes,
)
from cryosiam_dask.runs.plan import find_predictions as find_predictions
from cryosiam_dask.runs.progress import Reporter
from cryosiam_dask.stages.centers import (
    collect_centers,
    cryosiam_centers,
    labels_of,
    remove_outdated_centers,
    write_centers,
    write_cryosiam_centers,
)
from cryosiam_dask.stages.components import ArrayModule, remove_small, require_channel
from cryosiam_dask.stages.export import (
    MRC_LABEL,
    Placed,
    export_prediction,
    formats_done,
    other_formats,
    remove_outdated_formats,
    write_other_formats,
    written_attributes,
)
from cryosiam_dask.stages.ingest import IngestReport, Statistics, ingest
from cryosiam_dask.stages.intensities import Sample, intensities, sample_array, sample_file
from cryosiam_dask.stages.lamella import (
    Thickness,
    count_columns,
    postprocess_lamella,
    stored_thickness,
    thickness_words,
)
from cryosiam_dask.stages.measurements import COLLECTION, collect_tables, remove_outdated, write_components
from cryosiam_dask.stages.predict import BlockTimes, StoredPrediction, create_outputs, predict_store, tomogram_chunks
from cryosiam_dask.stages.preview import preview_file, read_fingerprint, write_preview
from cryosiam_dask.stages.summary import remember
from cryosiam_dask.stages.timeline import write_timeline


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one tomogram.

    Attributes
    ----------
    stem
        Its name.
    status
        ``"done"``, ``"skipped"``, ``"failed"``, or ``"left"`` where the run ended before.
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
    kind
        What kind of error it is: the name of its class.
    stage
        Which of several models, where there are several.
    notes
        What was decided about the file.
    class_names
        Of the labels from 1 on.
    lamella_voxels
        Voxels of the lamella that the labels were looked for in; ``None`` where they were in the whole volume.
    thickness
        Of a lamella along z: ``mean``, ``lowest`` and ``highest`` of all columns (y, x) that hold any of it, and the
        ``unit``, nm or voxels. Empty for other labels.
    components
        How many each class has, by its name, where they were numbered.
    particles
        How many each class has, by its name, where lists of them were written.
    """

    stem: str
    status: Literal["done", "skipped", "failed", "left"]
    shape: tuple[int, ...] = ()
    seconds: float = 0.0
    voxels: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    details: str = field(default="", repr=False)
    kind: str = ""
    stage: str = ""
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    lamella_voxels: int | None = None
    thickness: Mapping[str, float | str] = field(default_factory=dict)
    components: Mapping[str, int] = field(default_factory=dict)
    particles: Mapping[str, int] = field(default_factory=dict)

    def found(self, brief: bool = False) -> list[str]:
        """What was found, in words: a line for each class, and one each for thickness, components and particles.

        `brief` lines tell one share of each class, of the lamella where there is one, and no voxels.
        """
        lines = shares(self.voxels, self.class_names, self.shape, self.lamella_voxels, brief=brief)
        if self.thickness:
            lines.append(thickness_words(self.thickness))
        for what, counts in (("components", self.components), ("particles", self.particles)):
            if counts:
                lines.append(f"{what}: {', '.join(counted(name, f'{n:,}') for name, n in counts.items())}")
        return lines


def segment(
    jobs: Sequence[tuple[RunPlan, Job]],
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    executor: Executor = SERIAL,
    timeline: bool = False,
    say: Callable[[str], None] = lambda message: None,
    guard: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Segment one tomogram with one model after the other.

    An error of the disk that may pass ends nothing: what has been done is kept, and the rest is tried again.

    Parameters
    ----------
    jobs
        What is to be done with the same tomogram, in order.
    device
        What the workers run the networks on.
    executor
        Runs the pieces of every stage.
    timeline
        Whether to draw ``<stem>_timeline.png``, when each worker read, computed and wrote each block.
    say
        Told what a user should know.
    guard
        Called before anything is recorded or removed; raises `Interrupted` where the tomogram is another run's.

    Yields
    ------
    Outcome
        Of each job; a failed one is the last.

    Raises
    ------
    Interrupted, KeyboardInterrupt
        If the run is to end; what has been done stays done.
    """
    at = _At(*jobs[0])
    told = set[str]()
    for pause in (*PAUSES, None):
        try:
            for outcome in _segment_all(jobs, at, device, executor, timeline, say, guard):
                if outcome.stage not in told:  # as those are that were done before a pause
                    told.add(outcome.stage)
                    yield outcome
            return
        except (Interrupted, LostClusterError):
            raise
        except Exception as error:
            guard()
            if pause is None or not may_pass(error):
                outcome = _failed(at.job.stem, at.shape, at.began, lasting(error), at.job.output, at.plan.name)
                yield record(at.plan, outcome, at.began, device, executor, goes_on=isinstance(error, _RESUMABLE))
                return
            say(f"{error}: tried again in {pause:g} s")
            wait(pause, guard)


@dataclass(slots=True)
class _At:
    """What is being done with a tomogram, for the record of what fails."""

    plan: RunPlan
    job: Job
    began: float = field(default_factory=time.time)
    shape: tuple[int, ...] = ()


def _segment_all(
    jobs: Sequence[tuple[RunPlan, Job]],
    at: _At,
    device: Literal["cpu", "cuda"],
    executor: Executor,
    timeline: bool,
    say: Callable[[str], None],
    guard: Callable[[], None],
) -> Iterator[Outcome]:
    last_plan, last = jobs[-1]
    if jobs[0][1].problem is not None:
        raise jobs[0][1].problem
    header = read_header(last.source, **last_plan.configuration.reading)
    jobs[0][0].require_usable(header)
    at.shape = header.shape
    for note in header.notes:
        say(f"{NOTE}{note}")
    # The last job's place outlives the others: that is where the tomogram is kept for all of them.
    with _workspace(last_plan.configuration, last.stem, say, guard) as shared:
        grid = make_grid(header.shape, last_plan.patch, halo=last_plan.halo)
        tomogram, report = _ingested(shared, last_plan.configuration, last, header, grid, executor)
        # The same voxels as before a run, but where these are the beginning of the file.
        sample = sample_array(tomogram) if header.compressed else sample_file(header)
        for plan, job in jobs:
            began = time.time()
            at.plan, at.job, at.began = plan, job, began
            plan.require_usable(header)
            if job.problem is not None:
                raise job.problem
            at.job = job = plan.with_fingerprint(job)
            if plan.made_meanwhile(job):
                outcome = Outcome(job.stem, "skipped", header.shape, stage=plan.name)
                if plan is not last_plan:
                    yield outcome
                continue
            own = (
                nullcontext(shared)
                if job.stem == last.stem and plan is last_plan
                else _workspace(plan.configuration, job.stem, say, guard)
            )
            own_name = NamedExecutor(executor, plan.name) if plan.name else executor
            with own as space:
                _record_source(space.ledger, job.source)
                try:
                    result = _segment(plan, job, tomogram, report, sample, space, device, own_name, timeline, say)
                except (OSError, CryosiamDaskError):
                    raise
                except Exception:  # of what nobody foresaw, damaged intermediate arrays may be the reason
                    _forget_damaged(plan, header.shape, space)
                    raise
                outcome = replace(result, seconds=time.time() - began, stage=plan.name, notes=header.notes)
                if plan is not last_plan:
                    _log_warnings(outcome)
                    guard()
                    yield record(plan, outcome, began, device, executor)
    guard()
    if outcome.status == "done":
        _log_warnings(outcome)
        record(last_plan, outcome, began, device, executor)
    else:  # what became of it when it was made
        before = shared.ledger.last("outcome") or {"status": "done"}
        shared.ledger.close(**{name: value for name, value in before.items() if name != "what"})
    yield outcome


def record(
    plan: RunPlan, outcome: Outcome, began: float, device: str, executor: Executor, *, goes_on: bool = False
) -> Outcome:
    """Write what became of a tomogram to its ledger, with what its pace depends on, as far as the disk lets.

    It takes the place of what was recorded, unless the same command `goes_on` from that.
    """
    values = {name: value for name, value in asdict(outcome).items() if name not in ("stem", "details")}
    values |= {"run": plan.run, "began": began, "ended": time.time()}
    values |= {"model": plan.model, "device": device, "workers": all_workers(executor)}
    with suppress(OSError):
        ledger = Ledger(plan.configuration.prediction_folder, outcome.stem)
        if goes_on or (outcome.status == "failed" and _has_blocks(ledger)):
            ledger.append("outcome", **values)
        else:
            ledger.close(**values)
    return outcome


def failed(plan: RunPlan, job: Job, began: float, error: BaseException) -> Outcome:
    """The outcome of a job that ended with an error which nothing else has handled."""
    return _failed(job.stem, (), began, error, job.output, plan.name)


def _failed(
    stem: str, shape: tuple[int, ...], began: float, error: BaseException, path: Path, stage: str = ""
) -> Outcome:
    """The outcome of a tomogram whose work on the output `path` ended with `error`."""
    raised, details = error, ""
    if isinstance(error, OSError):
        refused = not_written(
            error,
            "work and output folder must be writable and have space left",
            place=error.filename or path.parent,
            remedy="Free space, change the permissions, or set work_folder or prediction_folder to another disk",
        )
        if isinstance(refused, DiskError) or error.errno == errno.EFBIG:  # the latter of large files only
            error = refused
    kind = type(error).__name__
    if isinstance(error, CryosiamDaskError):
        message = str(error)
    else:
        message = f"{path}: unexpected {type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))
    # The user is told without a traceback, which tells a developer of foreseen errors as well where they come from.
    LOG.error("%s: %s", stem, message, exc_info=raised)
    return Outcome(stem, "failed", shape, time.time() - began, error=message, details=details, kind=kind, stage=stage)


def _log_warnings(outcome: Outcome) -> Outcome:
    for warning in outcome.warnings:
        LOG.warning("%s: %s", outcome.stem, warning, extra=TOLD)
    return outcome


@dataclass(frozen=True, slots=True)
class _Space:
    """Where the intermediate arrays of a tomogram are, and the record of what is in them."""

    folder: Path
    group: zarr.Group
    ledger: Ledger


def _ingested(
    space: _Space, configuration: Configuration, job: Job, header: TomogramHeader, grid: Grid, executor: Executor
) -> tuple[Voxels, IngestReport]:
    """The tomogram as zarr: one that is read where it is, the one that an earlier run made, or a new one."""
    chunks = None if header.compressed else tomogram_chunks(grid)
    compress = header.dtype.kind != "f" or configuration.keep_work
    identity = [known_identity(configuration, job.source, job.stem), configuration.reading, chunks, compress]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    found = space.ledger.last("ingested")
    in_place = isinstance(header, ZarrHeader)
    # What the kernel had not yet written is gone with the machine.
    copied = found is not None and found["boot"] == boot_id() != "" and "tomogram" in space.group
    if found and found["key"] == key and (in_place or copied):
        values = found["statistics"]
        statistics = Statistics(values["min"], values["max"], values["mean"], values["non_finite_voxels"])
        tomogram = header.open() if isinstance(header, ZarrHeader) else _array(space.group, "tomogram")
        return tomogram, IngestReport(header, statistics, tuple(found["warnings"]))
    tomogram, report = ingest(
        job.source, space.group.store, chunks=chunks, compress=compress, executor=executor, **configuration.reading
    )
    space.ledger.append(
        "ingested", key=key, boot=boot_id(), statistics=report.statistics.attributes(), warnings=report.warnings
    )
    return tomogram, report


def _predicted(
    plan: RunPlan,
    job: Job,
    tomogram: Voxels,
    space: _Space,
    device: Literal["cpu", "cuda"],
    executor: Executor,
    timeline: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, zarr.Array[Any]], list[dict[str, Any]]]:
    """What the network says, block by block; blocks of an earlier run that are recorded are not predicted again.

    Returns the arrays by name, and what is recorded of every block.
    """
    work, ledger, key, done = space.group, space.ledger, job.prediction_fingerprint, set()
    found = ledger.last("blocks")
    resumed = found is not None and found["key"] == key and all(name in work for name in plan.wanted)
    own = plan.configuration.block_size
    if found and resumed and own is not None and found["block_size"] > own:
        say(f"block_size is {own} now: its blocks, of {found['block_size']} voxels along each axis, are begun anew")
        resumed = False
    block_size = found["block_size"] if found and resumed else plan.block_size(tomogram.shape, executor.workers)
    grid = make_grid(tomogram.shape, plan.patch, block_size, plan.halo)
    if resumed:
        done = {tuple(entry["index"]) for entry in ledger.since("block", "blocks")}
        outputs = {name: _array(work, name) for name in plan.wanted}
        say(f"{len(done)} of {len(grid.indices())} blocks are there already")
    token = uuid.uuid4().hex
    work.attrs["blocks"] = token
    # By the files: arrays that are copied to HDF5 are of zarr's format 2, which a group of format 3 does not list.
    for path in space.folder.iterdir():
        if path.name not in ("zarr.json", "tomogram", *(plan.wanted if resumed else ())):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not resumed:
        outputs = create_outputs(work, grid, plan.checkpoint.architecture.out_channels, plan.wanted)
        ledger.append("blocks", key=key, block_size=block_size)
    mask = plan.mask_of(job, tuple(tomogram.shape))
    prediction = StoredPrediction(plan.spec(device), grid, tomogram, outputs, mask, token)

    def record_block(index: tuple[int, ...], block: BlockTimes | None) -> None:
        highest, inside = (block.highest, block.inside) if block else ((), 0)
        ledger.append("block", index=index, highest=highest, inside=inside)

    times = predict_store(prediction, skip=done, done=record_block, executor=executor)
    if timeline and times:
        write_timeline(plan.configuration.prediction_folder / f"{job.stem}_timeline.png", times, job.stem)
    return outputs, ledger.since("block", "blocks")


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found


def _segment(
    plan: RunPlan,
    job: Job,
    tomogram: Voxels,
    report: IngestReport,
    sample: Sample,
    space: _Space,
    device: Literal["cpu", "cuda"],
    executor: Executor,
    timeline: bool,
    say: Callable[[str], None],
) -> Outcome:
    """One tomogram through one model to its files."""
    configuration, network, header = plan.configuration, plan.configuration.parameters.network, report.header
    array_module: ArrayModule = "cupy" if device == "cuda" else "numpy"
    work = space.group
    outputs, blocks = _predicted(plan, job, tomogram, space, device, executor, timeline, say)
    labels, warnings = outputs["labels"], list[str]()
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
                f"no lamella found in the smoothed probabilities, of which none lies above the threshold "
                f"{plan.threshold:g}: the labels are as the network gave them, with rough faces and single spots. "
                "Lower network.threshold, and check trained_model"
            )
        labels = filled
    removed, sizes = None, removal_sizes(configuration)
    thick = network.postprocessing and labels.ndim == 3
    voxels, thickness = _count_voxels(labels, plan.labels, executor, thick and not sizes)
    found_voxels = sum(voxels[1:])
    if sizes:
        labels, removed, voxels = _without_small(labels, voxels, sizes, work, executor, array_module)
        if thick:
            thickness = _count_voxels(labels, plan.labels, executor, thick)[1]
    data, mask = configuration.parameters.data, plan.mask_of(job, header.shape)
    seen = intensities(sample, data.min, data.max)
    inside = None if mask is None else sum(block["inside"] for block in blocks)
    coverage = None if inside is None else float(inside / math.prod(header.shape))
    blank = voxels[0] == math.prod(header.shape)
    found_before = plan.attention(
        header, seen, non_finite=report.statistics.non_finite, mask=mask, coverage=None if blank else coverage
    )
    warnings = [*found_before, *warnings]
    if blank:
        warnings.append(_why_blank(plan, report, seen, found_voxels, blocks, coverage))
    attributes = _attributes(plan, job, report, warnings) | _numbers(voxels, inside, thickness)
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
    formats, folder = other_formats(configuration), configuration.prediction_folder
    warnings += remove_outdated_formats(folder, job.stem, job.fingerprint, keep=formats)
    beside = Placed.of(tomogram, report)
    write_other_formats(folder, job.stem, formats, labels, tomogram=beside, attributes=attributes, executor=executor)
    probabilities = outputs.get("probabilities")
    more, components = _update_components(
        configuration, job.stem, labels, probabilities, attributes, work, executor, array_module
    )
    _keep_for_the_report(configuration, job.stem)
    return _outcome(job.stem, attributes, labels.shape, voxels, [*warnings, *more], components)


def _numbers(voxels: Sequence[int], inside: int | None, thickness: Thickness | None) -> dict[str, Any]:
    """Attributes of a prediction: the voxels of each label, those of its lamella, and how thick a lamella is."""
    thick = None if thickness is None else (thickness.mean, thickness.lowest, thickness.highest)
    return {"voxels": voxels, "lamella_voxels": inside, "thickness_voxels": thick}


def _outcome(
    stem: str,
    attributes: Mapping[str, Any],
    shape: Sequence[int],
    voxels: Sequence[int] = (),
    warnings: Sequence[str] = (),
    components: Mapping[str, int] | None = None,
) -> Outcome:
    """What became of a tomogram whose prediction has these attributes."""
    inside = attributes.get("lamella_voxels")
    return Outcome(
        stem,
        "done",
        tuple(shape),
        voxels=tuple(voxels),
        warnings=tuple(warnings),
        class_names=_names_in(attributes),
        lamella_voxels=inside if isinstance(inside, int) else None,
        thickness=stored_thickness(attributes) if voxels else {},
        components=components or {},
    )


def _names_in(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that the attributes of a prediction tell."""
    names = attributes.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


#: How what was decided about a file begins, where it is said.
NOTE = "note: "
#: Errors of no tomogram, after which the same command goes on.
_ENDING = (Interrupted, ClusterError, DeviceError)
#: Errors after which a tomogram's intermediate arrays are kept whatever is in them.
_RESUMABLE = (*_ENDING, StorageError)


@contextmanager
def _workspace(
    configuration: Configuration, stem: str, say: Callable[[str], None], guard: Callable[[], None]
) -> Iterator[_Space]:
    """A zarr group for a tomogram's intermediate arrays with its ledger, of an earlier run if they fit together.

    Whatever the tomogram fails of, blocks that have been predicted stay.
    """
    ledger = Ledger(configuration.prediction_folder, stem)
    if ledger.fault:
        say(f"its ledger {ledger.fault}, so that it is begun anew")
    folder, group = _open_store(configuration, stem, ledger)
    try:
        yield _Space(folder, group, ledger)
    except Exception as error:
        if isinstance(error, _RESUMABLE) or may_pass(error) or _has_blocks(ledger):
            count = len(ledger.since("block", "blocks"))
            if count and not isinstance(error, Interrupted):
                say(f"its {count} predicted blocks are kept in {folder}")
        else:
            guard()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not configuration.keep_work:
        guard()
        shutil.rmtree(folder, ignore_errors=True)


def _record_source(ledger: Ledger, source: Path) -> None:
    """Record which file the tomogram is made from, so that a copy of it is known for the same."""
    found, identity = ledger.last("source"), source_identity(source)
    if found is None or found["identity"] != identity:
        content, newest = source_content(source), newest_chunk(source)
        if found is None or found["content"] != content or is_newer_in_part(source, found.get("newest", 0)):
            ledger.append("source", identity=identity, content=content, newest=newest)


def _has_blocks(ledger: Ledger) -> bool:
    return bool(ledger.since("block", "blocks"))


def _open_store(configuration: Configuration, stem: str, ledger: Ledger) -> tuple[Path, zarr.Group]:
    """The folder and zarr group that a ledger speaks of, or an empty one where that is not there."""
    store = ledger.last("store")
    if store:
        folder = _work_root(configuration) / store.get("name", f"{stem}{_WORK}")
        try:
            group = zarr.open_group(AnyDiskStore(folder), mode="r+", zarr_format=3)
            if group.attrs.get("store") == store["token"]:
                return folder, group
        except Exception as error:  # whatever is wrong with it, it is not the one
            if may_pass(error):
                raise
    token = uuid.uuid4().hex
    for name in _work_names(configuration, stem):
        folder = _work_root(configuration) / name
        if not _is_own_store(configuration, folder):
            continue
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        # Renamed when it says whose it is, so that nobody takes it for his own meanwhile.
        part = folder.with_name(part_name(folder.name))
        part.parent.mkdir(parents=True, exist_ok=True)
        attributes = {"store": token, "prediction_folder": str(configuration.prediction_folder.resolve())}
        zarr.create_group(AnyDiskStore(part), attributes=attributes)
        try:
            part.rename(folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue  # another data set has just taken the name
        ledger.append("store", token=token, name=name)
        return folder, zarr.open_group(AnyDiskStore(folder), mode="r+", zarr_format=3)
    raise OutputError(
        "the work store must be this data set's own",
        place=folder,
        value="one of another prediction_folder",
        remedy="Set work_folder to another folder",
    )


_WORK, _SCRATCH = ".work.zarr", ".scratch.zarr"


def has_work_stores(configuration: Configuration) -> bool:
    """Whether there are intermediate arrays of any tomogram."""
    with os.scandir(_work_root(configuration)) as entries:
        return any(entry.name.endswith((_WORK, _SCRATCH)) for entry in entries)


def _work_root(configuration: Configuration) -> Path:
    return configuration.work_folder or configuration.prediction_folder


def _own_name(configuration: Configuration, stem: str) -> str:
    """A name that no tomogram of another prediction folder has."""
    return f"{stem}.{hashlib.sha256(os.fsencode(configuration.prediction_folder.resolve())).hexdigest()[:8]}"


def _work_names(configuration: Configuration, stem: str) -> tuple[str, str]:
    """What a tomogram's work store may be called; the second where another data set has one of the first name."""
    return f"{stem}{_WORK}", f"{_own_name(configuration, stem)}{_WORK}"


def _is_own_store(configuration: Configuration, folder: Path) -> bool:
    """Whether a work store is this prediction folder's, or not there."""
    own = _own_name(configuration, "")
    if folder.parent == configuration.prediction_folder or folder.name.endswith((own + _WORK, own + _SCRATCH)):
        return True
    try:
        told = json.loads((folder / "zarr.json").read_bytes())["attributes"]["prediction_folder"]
    except FileNotFoundError:
        return not folder.exists()
    except (NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    return bool(told == str(configuration.prediction_folder.resolve()))


def work_stores(configuration: Configuration, stem: str) -> list[Path]:
    """Where intermediate arrays of a tomogram are, those that a command on its prediction left included."""
    names = (*_work_names(configuration, stem), f"{_own_name(configuration, stem)}{_SCRATCH}")
    folders = [_work_root(configuration) / name for name in names]
    return [folder for folder in folders if folder.exists() and _is_own_store(configuration, folder)]


def _forget_damaged(plan: RunPlan, shape: tuple[int, ...], space: _Space) -> None:
    """Take back the record of what cannot be read from a work store, so that the next run makes it again."""
    work, ledger, found = space.group, space.ledger, space.ledger.last("blocks")
    if "tomogram" in work:
        tomogram = _array(work, "tomogram")
        blocks = Blocks.of(tomogram)
        if not all(_is_readable(tomogram, blocks.slices(index)[3 - blocks.ndim :]) for index in blocks.indices):
            ledger.append("ingested", key="", boot="")
            LOG.warning("%s: cannot be read, so that it will be made again", tomogram.path)
    if found:
        grid = make_grid(shape, plan.patch, found["block_size"], plan.halo)
        arrays = [_array(work, name) for name in plan.wanted if name in work]
        recorded = ledger.since("block", "blocks")
        whole = [
            entry
            for entry in recorded
            if all(_is_readable(array, grid.block(tuple(entry["index"])).region) for array in arrays)
        ]
        if len(whole) < len(recorded):
            LOG.warning("%d of %d predicted blocks cannot be read", len(recorded) - len(whole), len(recorded))
            ledger.append("blocks", key=found["key"], block_size=found["block_size"])
            for entry in whole:
                ledger.append(**entry)


def _is_readable(array: zarr.Array[Any], region: tuple[slice, ...]) -> bool:
    """Whether a region, of each class where there are several, can be read; a disk that does not answer is no no."""
    for leading in np.ndindex(array.shape[: -len(region)]):
        try:
            array[(*leading, *region)]
        except OSError:
            return True
        except Exception:  # whatever a codec says of bytes that are not its own
            return False
    return True


@contextmanager
def _work_group(configuration: Configuration, stem: str) -> Iterator[zarr.Group]:
    """An empty zarr group for the intermediate arrays of a command on a written prediction, which holds its claim."""
    folder = _work_root(configuration) / f"{_own_name(configuration, stem)}{_SCRATCH}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield zarr.create_group(AnyDiskStore(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _count_voxels(
    labels: zarr.Array[Any], count: int, executor: Executor, thick: bool = False
) -> tuple[tuple[int, ...], Thickness | None]:
    """Voxels of each label, of at least `count` labels, and where it is `thick` the thickness of all together."""
    thickness = None
    if thick:
        voxels, columns = count_columns(labels, executor=executor)
        thickness = Thickness.of(columns)
    else:
        blocks = Blocks.of(labels)
        voxels = np.sum(executor.map(partial(_count_block, labels, blocks), blocks.indices, name="count"), axis=0)
    return tuple(voxels[: max(count, int(np.flatnonzero(voxels)[-1]) + 1)].tolist()), thickness


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


def _why_blank(
    plan: RunPlan,
    report: IngestReport,
    seen: Intensities,
    found: int,
    blocks: Sequence[Mapping[str, Any]],
    coverage: float | None,
) -> str:
    """Why nothing is left of `found` voxels of other labels than the background."""
    masked = plan.configuration.mask_folder is not None
    data, statistics = plan.configuration.parameters.data, report.statistics
    return why_blank(
        lowest=statistics.minimum,
        highest=statistics.maximum,
        clipped=(seen.below, seen.above),
        scale=(data.min, data.max),
        threshold=plan.threshold,
        probabilities=[max(seen) for seen in zip(*(b["highest"] for b in blocks if b["highest"]), strict=True)] or None,
        coverage=coverage,
        checkpoint=plan.configuration.trained_model.name,
        masked=masked,
        removed_voxels=found,
        class_names=plan.class_names,
    )


def _attributes(plan: RunPlan, job: Job, report: IngestReport, warnings: Sequence[str]) -> dict[str, Any]:
    header = report.header
    packages = ("dask", "h5py", "numpy", "scikit-image", "torch", "zarr")
    return {
        "software": f"cryosiam_dask {__version__}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "source": job.source.name,
        "voxel_size_angstrom": header.voxel_size_angstrom,
        "origin_angstrom": header.origin_angstrom,
        "nstart": header.nstart,
        "axes": "zyx"[-len(header.shape) :],
        "class_names": plan.class_names,  # of the labels from 1 on
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
    configuration: Configuration, predictions: Sequence[Path], reporter: Reporter, *, executor: SharedExecutor = SERIAL
) -> list[Outcome]:
    """Apply ``postprocessing_sizes`` to written predictions, without inference.

    It starts from the labels before any removal, so that other sizes can be tried and the same sizes change nothing.

    Parameters
    ----------
    configuration
        The YAML file; of its paths only ``prediction_folder`` and ``work_folder`` are used, and for the pictures and
        where ``output_formats`` asks for the tomograms beside their labels those of the tomogram and its mask.
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

    def act(path: Path, executor: Executor) -> Outcome:
        with _work_group(configuration, _stem(path)) as work:
            return _postprocess_one(configuration, path, sizes, work, executor)

    outcomes = _each(predictions, reporter, act, executor)
    collect(configuration, outcomes)
    return outcomes


def _postprocess_one(
    configuration: Configuration, path: Path, sizes: Sequence[int], work: zarr.Group, executor: Executor
) -> Outcome:
    stem, unfiltered = _stem(path), _read_unfiltered(path, work, executor)
    voxels, _ = _count_voxels(unfiltered, max(2, len(sizes)), executor)
    labels, removed, voxels = _without_small(unfiltered, voxels, sizes, work, executor, "numpy")
    thick = configuration.parameters.network.postprocessing and labels.ndim == 3
    thickness = _count_voxels(labels, len(voxels), executor, thick)[1] if thick else None
    probabilities = _probabilities(path) if configuration.components else None
    if probabilities is not None:  # what the components would fail of, before anything is replaced
        require_channel(int(np.flatnonzero(voxels)[-1]), probabilities.shape[0])
    attributes: dict[str, Any] = {"postprocessing_sizes": sizes, **_numbers(voxels, None, thickness)}
    prediction = read_attributes(path).get("prediction_fingerprint")
    if prediction:
        attributes["fingerprint"] = with_sizes(prediction, sizes)
    write = partial(replace_labels, labels=labels, removed=removed, attributes=attributes)
    executor.map(write, [path], name="export")
    attributes = _written_attributes(configuration, path)
    warnings, components = _update_components(
        configuration, stem, labels, _probabilities(path), attributes, work, executor
    )
    warnings += _draw_again(configuration, stem, labels, attributes, work, executor)
    warnings += _update_formats(configuration, path, work, executor)
    _keep_for_the_report(configuration, stem)
    return _outcome(stem, attributes, unfiltered.shape, voxels, warnings, components)


def measure(
    configuration: Configuration, predictions: Sequence[Path], reporter: Reporter, *, executor: SharedExecutor = SERIAL
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
    """Write predictions that are there already in other formats, without inference.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        As of `postprocess`; ``data_folder`` and ``file_extension`` name the tomograms.
    formats, per_class
        See `cryosiam_dask.stages.export.export_prediction`.

    Returns
    -------
    list of Outcome
        One for each prediction.
    """

    def act(path: Path, executor: Executor) -> Outcome:
        with _work_group(configuration, _stem(path)) as work:
            warnings = export_prediction(
                configuration, path, formats, per_class=per_class, work=work, executor=executor
            )
        return Outcome(_stem(path), "done", open_dataset(path, "labels").shape, warnings=warnings)

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
    """Write lists of the centres of components, of each class of written predictions.

    Parameters
    ----------
    configuration, predictions, reporter, executor
        As of `postprocess`.
    min_voxels
        Components with at most so many voxels are left out; ``None``: as the configuration says.
    erode
        Whether to erode each class once before; in CryoSiam's form it always is.
    form
        For RELION and Warp (`cryosiam_dask.stages.centers.write_centers`), or that of CryoSiam
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
        labels, probabilities = _written_labels(path), _probabilities(path)
        attributes = _written_attributes(configuration, path)
        counts = write_centers(
            folder,
            _stem(path),
            labels,
            min_voxels=smallest or 0,
            erode=erode,
            classes=range(1, max(2, probabilities.shape[0] if probabilities else 2)),
            class_names=_names_in(attributes),
            voxel_size_angstrom=attributes.get("voxel_size_angstrom"),
            made_from=labels_of(path, attributes),
            tilt_series_pattern=configuration.tilt_series_pattern,
            executor=executor,
        )
        names = named(_names_in(attributes), max(counts, default=0))
        particles = {names[label - 1]: n for label, n in counts.items()}
        warnings = tuple(_unknown_voxel_size(attributes))
        return Outcome(_stem(path), "done", labels.shape, warnings=warnings, particles=particles)

    outcomes = _each(predictions, reporter, act, executor)
    _collect_centers(configuration, outcomes, reporter.say)
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
        labels, probabilities = _written_labels(path), _probabilities(path)
        table = cryosiam_centers(_stem(path), labels, min_voxels=min_voxels, executor=executor)
        tables[_stem(path)] = table
        stored = probabilities.shape[0] - 1 if probabilities else 0
        known.append(named(_names_in(_written_attributes(configuration, path)), max(1, stored, *table["class"])))
        return Outcome(_stem(path), "done", labels.shape)

    outcomes = _each(predictions, reporter, act, executor)
    names = max(known, key=len, default=())
    classes = max(1, given - 1) if given else len(names)
    try:
        counts = patiently(
            lambda: write_cryosiam_centers(
                folder, tables, classes, there=lambda stem: (folder / f"{stem}_preds.h5").exists()
            )
        )
        called = named(names, classes)
        reporter.say(f"particles: {', '.join(counted(called[label - 1], f'{n:,}') for label, n in counts.items())}")
    except Exception as error:
        outcomes.append(_failed("labels_….csv", (), time.time(), error, folder))
    return outcomes


def _collect_centers(configuration: Configuration, outcomes: list[Outcome], say: Callable[[str], None]) -> None:
    """Bring the lists of all tomograms up to date."""
    folder = configuration.prediction_folder

    def labels_now(stem: str) -> str | None:
        path = folder / f"{stem}_preds.h5"
        try:
            return labels_of(path, read_attributes(path))
        except (OSError, OutputError) as error:
            if may_pass(error):
                raise
            return None

    pattern = configuration.tilt_series_pattern
    try:
        for stem in patiently(partial(collect_centers, folder, labels_now, tilt_series_pattern=pattern)):
            say(f"{stem}: {_OUTDATED_LISTS}")
    except Exception as error:
        outcomes.append(_failed("class…_centers.csv", (), time.time(), error, folder))


_OUTDATED_LISTS = (
    "its particle lists were those of other labels and do not count any more; 'cryosiam-dask semantic-to-centers' "
    "makes them again"
)


def _each(
    predictions: Sequence[Path],
    reporter: Reporter,
    act: Callable[[Path, Executor], Outcome],
    executor: SharedExecutor,
) -> list[Outcome]:
    """Do something with each written prediction; those that another run works on come later."""
    outcomes: dict[Path, Outcome] = {}
    pending, waiting, told = deque(predictions), set[Path](), set[Path]()
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
            if path not in told:
                reporter.say(f"{_stem(path)}: another run works on it; waiting for that")
                told.add(path)
            waiting.add(path)
            pending.append(path)
            if waiting.issuperset(pending):
                time.sleep(_LOOK)
    return [outcomes[path] for path in predictions]


#: Seconds after which predictions that others work on are looked at again.
_LOOK = 1.0


def _attempt(
    path: Path, reporter: Reporter, work: Callable[[Executor], Outcome], executor: SharedExecutor, claims: Claims
) -> Outcome | None:
    """What became of work on the written prediction `path`; ``None`` where another run works on it."""
    stem, began, claim = _stem(path), time.time(), claim_path(path.parent, _stem(path))

    def guard() -> None:
        if not claims.holds(claim):
            raise TakenOver

    begun = False
    try:
        if not patiently(partial(claims.take, claim)):
            return None
        reporter.begin(stem)
        begun = True
        own = GuardedExecutor(executor.share(stem, 0, partial(reporter.step, stem)), guard)
        outcome = replace(patiently(partial(work, own), guard), seconds=time.time() - began)
        _log_warnings(outcome)
        reporter.end(stem, f"done in {outcome.seconds:.0f} s, {path.parent}")
    except TakenOver:
        return None
    except (Interrupted, LostClusterError):
        raise
    except Exception as error:
        if not begun:  # where the disk takes no claim
            reporter.begin(stem)
        outcome = _failed(stem, (), began, error, path)
        reporter.end(stem, f"FAILED: {outcome.error}")
    finally:
        claims.release(claim)
    return outcome


def measure_one(configuration: Configuration, path: Path, executor: Executor) -> Outcome:
    """Number and measure the components of one written prediction."""
    stem, labels = _stem(path), _written_labels(path)
    with _work_group(configuration, stem) as work:
        attributes, probabilities = _written_attributes(configuration, path), _probabilities(path)
        warnings, components = _update_components(
            configuration, stem, labels, probabilities, attributes, work, executor
        )
        if not attributes.get("fingerprint"):
            warnings += _draw_again(configuration, stem, labels, attributes, work, executor)
    _keep_for_the_report(configuration, stem)
    return _outcome(stem, attributes, labels.shape, (), warnings, components)


def complete(plan: RunPlan, job: Job, executor: Executor) -> Outcome:
    """Make from a written prediction what is wanted beside it and is missing or outdated.

    Returns
    -------
    Outcome
        ``"skipped"`` where another run has made all of it meanwhile.

    Raises
    ------
    Interrupted, LostClusterError
        If the run is to end; what has been done stays done.
    """
    began = time.time()
    try:
        return patiently(partial(_complete, plan, job, executor))
    except (Interrupted, LostClusterError):
        raise
    except Exception as error:
        return _failed(job.stem, (), began, error, job.output, plan.name)


def _complete(plan: RunPlan, job: Job, executor: Executor) -> Outcome:
    configuration, warnings, began = plan.configuration, list[str](), time.time()
    components: Mapping[str, int] = {}
    if not plan.outdated(job):
        return Outcome(job.stem, "skipped", stage=plan.name)
    if not components_done(job.components, job.fingerprint, plan.class_names):
        measured = measure_one(configuration, job.output, executor)
        warnings, components = [*measured.warnings], measured.components
    if not preview_done(configuration, job):
        labels, attributes = _written_labels(job.output), _written_attributes(configuration, job.output)
        with _work_group(configuration, job.stem) as work:
            warnings += _draw_again(configuration, job.stem, labels, attributes, work, executor, missing=True)
    if not formats_done(configuration, job.stem, job.fingerprint, plan.class_names):
        with _work_group(configuration, job.stem) as work:
            warnings += _update_formats(configuration, job.output, work, executor)
    # A run that failed after the labels had been written left its intermediate arrays and what it failed of.
    for folder in () if configuration.keep_work else work_stores(configuration, job.stem):
        shutil.rmtree(folder, ignore_errors=True)
    forget_failure(Ledger(configuration.prediction_folder, job.stem))
    _keep_for_the_report(configuration, job.stem)
    outcome = Outcome(
        job.stem, "done", _written_labels(job.output).shape, time.time() - began, warnings=tuple(warnings),
        stage=plan.name, components=components,
    )  # fmt: skip
    return _log_warnings(outcome)


def forget_failure(ledger: Ledger) -> None:
    """Record that all outputs of a tomogram are there, where it was said to have failed."""
    before = ledger.last("outcome")
    if before and before["status"] == "failed":
        ledger.append(**before | {"status": "done", "error": "", "kind": ""})


def _keep_for_the_report(configuration: Configuration, stem: str) -> None:
    with suppress(Exception):  # the report looks at it again
        remember(configuration, 0, stem)


def _update_formats(configuration: Configuration, path: Path, work: zarr.Group, executor: Executor) -> list[str]:
    """Write new labels in the other formats that are wanted, or remove those of earlier ones."""
    formats, made = other_formats(configuration), tuple[str, ...]()
    warnings: list[str] = []
    try:
        if formats:
            warnings += export_prediction(configuration, path, formats, work=work, executor=executor)
            made = formats
    finally:  # without a tomogram, for example, an OME-Zarr image cannot be made
        fingerprint = read_attributes(path).get("fingerprint")
        warnings += remove_outdated_formats(path.parent, _stem(path), fingerprint, keep=made)
    return warnings


def _written_attributes(configuration: Configuration, path: Path) -> dict[str, Any]:
    """Attributes of a written prediction, with the names that its classes have now."""
    attributes = written_attributes(configuration, path, patient=True)
    names = given_names(configuration)
    return attributes | ({"class_names": list(names)} if names else {})


#: What the file of components says of its tomogram and of the labels that it was made from.
_INHERITED = ("source", "voxel_size_angstrom", "origin_angstrom", "nstart", "axes", "class_names", "fingerprint")


def _update_components(
    configuration: Configuration,
    stem: str,
    labels: Sliceable,
    probabilities: Sliceable | None,
    attributes: Mapping[str, Any],
    work: zarr.Group,
    executor: Executor,
    array_module: ArrayModule = "numpy",
) -> tuple[list[str], dict[str, int]]:
    """Write the components of new labels, or remove those of earlier ones.

    Returns what needs attention, and how many components each class has.
    """
    folder = configuration.prediction_folder
    outdated, warnings = remove_outdated(folder, stem, attributes.get("fingerprint")), list[str]()
    prediction = folder / f"{stem}_preds.h5"
    if prediction.exists() and remove_outdated_centers(folder, stem, labels_of(prediction, attributes)):
        warnings.append(_OUTDATED_LISTS)
    if not configuration.components:
        if outdated:
            warnings.append(
                "its components were those of other labels and have been removed. Set components: True, or run "
                "'cryosiam-dask components', to make them again"
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
    names = named(_names_in(attributes), len(counts))
    return warnings + _unknown_voxel_size(inherited), {name: n for name, n in zip(names, counts, strict=True) if n}


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
    try:
        patiently(draw)
    except _ENDING:
        raise
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
    They are of labels of another program, which draws none, where their tomogram is there.
    """
    path = preview_file(configuration.prediction_folder, stem)
    missing = missing or ("source" in attributes and not attributes.get("fingerprint"))
    wanted = (missing and configuration.preview) or path.exists()
    shows = labels_of(configuration.prediction_folder / f"{stem}_preds.h5", attributes)
    if not wanted or read_fingerprint(path) == shows:
        return []
    attributes = {**attributes, "fingerprint": shows}
    try:
        source = (
            configuration.data_folder / Path(str(attributes["source"])).name
        )  # of a file that anybody may have made
        mask_file = configuration.mask_folder and configuration.mask_folder / f"{stem}_preds.h5"
        mask = open_mask(mask_file, labels.shape) if mask_file and mask_file.exists() else None
        tomogram, _ = ingest(source, work.store, executor=executor, **configuration.reading)
        if tuple(tomogram.shape) != tuple(labels.shape):
            raise OutputError("the tomogram must have the shape of its labels", place=source, value=tomogram.shape)
    except _ENDING:
        raise
    except (KeyError, CryosiamDaskError) as error:
        path.unlink(missing_ok=True)
        return [f"its picture {path.name} cannot be drawn from these labels: {error}"]
    return _draw(configuration, stem, tomogram, labels, mask, attributes, executor)


def _unknown_voxel_size(attributes: Mapping[str, Any]) -> list[str]:
    size = attributes.get("voxel_size_angstrom")
    if size is not None and all(size):
        return []
    remedy = (
        "Set it in the tomogram's header"
        if attributes.get("source")
        else "data_folder holds no tomogram of this name and shape that can be read: correct it or file_extension"
    )
    return [f"the voxel size is unknown: tables hold voxels alone, without Å and nm³. {remedy}"]


def collect(configuration: Configuration, outcomes: list[Outcome]) -> None:
    """Bring the tables and the particle lists of all tomograms up to date, if there are any."""
    folder = configuration.prediction_folder
    path = folder / f"{COLLECTION}.csv"

    def is_there(stem: str) -> bool:
        names = (f"{stem}_preds.h5", f"{stem}{configuration.file_extension.removesuffix('.gz')}", f"{stem}.mrc")
        return any((folder / name).exists() for name in names[: 3 if configuration.save_original_file_extension else 1])

    def collect_these() -> None:
        if configuration.components or path.exists():
            collect_tables(folder, is_there)

    try:
        patiently(collect_these)
    except Exception as error:
        outcomes.append(_failed(path.name, (), time.time(), error, path))
    try:
        listed = any(patiently(lambda: list(folder.glob("class*_centers.csv"))))
    except (OSError, StorageError):
        return
    if listed:
        _collect_centers(configuration, outcomes, lambda message: LOG.info("%s", message))


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
    with open_hdf5(path) as file:
        chunk = file["labels"][region]
        if "removed" in file:
            # In 64 bits, where no sum wraps around to a label that looks right.
            chunk = np.add(chunk, file["removed"][region], dtype=np.int64, casting="same_kind")
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
