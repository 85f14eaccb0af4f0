"""Take one tomogram through all stages, and record the outcome.

`segment_tomogram` takes a tomogram through the stages::

    raw.mrc ─ingest─▶ zarr ─predict─▶ denoised ─export─▶ <name>.mrc
    tomogram.mrc ─ingest─▶ zarr ─predict─▶ labels ─lamella─▶ ─remove small─▶ ─export─▶ <stem>_preds.h5
                                                                           └─number─▶ <stem>_components.h5, tables

and repeats them for the next model, which uses the denoised tomogram of the previous one, or its lamella mask and the
same zarr array. An output appears complete or not at all. Each finished block is recorded in the ledger
(`cryosiam_dask.runs.ledger`), from which the next run resumes if this one is killed. `cryosiam_dask.runs.collection`
does this for many tomograms.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import zarr

from cryosiam_dask._version import __version__
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.blocks import Blocks, Index
from cryosiam_dask.core.diagnosis import Intensities
from cryosiam_dask.core.diagnosis import blank as why_blank
from cryosiam_dask.core.executor import (
    RETRY_PAUSES,
    SERIAL,
    Executor,
    Interrupted,
    NamedExecutor,
    retries_exhausted,
    wait,
)
from cryosiam_dask.core.grid import Grid, make_grid
from cryosiam_dask.core.machine import boot_id
from cryosiam_dask.errors import LostClusterError, is_transient
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mrc import MrcHeader, MrcVoxels, require_unchanged, write_mrc, write_mrc_floats
from cryosiam_dask.files.predictions import write_hdf5, write_raw_predictions
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.files.zarr import Voxels, ZarrHeader
from cryosiam_dask.model.predictor import PredictorSpec
from cryosiam_dask.runs.fingerprint import known_identity, read_fingerprint, removal_of, removal_sizes
from cryosiam_dask.runs.outcome import (
    NOTE,
    RESUMABLE,
    Outcome,
    as_numbers,
    failure_of,
    log_warnings,
    outcome_of,
    record,
)
from cryosiam_dask.runs.outputs import (
    all_sizes,
    count_voxels,
    draw_denoised,
    draw_preview,
    keep_for_the_report,
    update_components,
    without_small,
)
from cryosiam_dask.runs.plan import Job, RunPlan, raw_predictions_file
from cryosiam_dask.runs.workspace import (
    Workspace,
    forgetting_damaged,
    open_workspace,
    record_source,
    work_array,
)
from cryosiam_dask.stages.components import ArrayModule, Description, Labelling, removal_labelling
from cryosiam_dask.stages.denoise import Denoised, stretch_of, with_own_moments
from cryosiam_dask.stages.export import MRC_LABEL, Placed, other_formats, remove_outdated_formats, write_other_formats
from cryosiam_dask.stages.ingest import IngestReport, Statistics, compresses, ingest, reads_in_place
from cryosiam_dask.stages.intensities import Sample, intensities, sample_array, sample_file
from cryosiam_dask.stages.lamella import postprocess_lamella
from cryosiam_dask.stages.predict import BlockTimes, StoredPrediction, create_outputs, predict_store, tomogram_chunks
from cryosiam_dask.stages.timeline import write_timeline


def segment_tomogram(
    jobs: Sequence[tuple[RunPlan, Job]],
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    executor: Executor = SERIAL,
    timeline: bool = False,
    inform: Callable[[str], None] = lambda message: None,
    guard: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Segment one tomogram with one model after the other.

    After a transient disk error, finished work is kept and the rest is retried.

    Parameters
    ----------
    jobs
        Plans and jobs of the same tomogram, one for each model, in order.
    device
        The device that the workers run the networks on.
    executor
        Runs the tasks of every stage.
    timeline
        Whether to draw ``<stem>_timeline.png``, which shows when each worker read, computed and wrote each block.
    inform
        Receives messages for the user.
    guard
        Called before anything is recorded or removed; raises `Interrupted` if another run has taken the tomogram over.

    Yields
    ------
    Outcome
        The outcome of each job; there is none after a failed one.

    Raises
    ------
    Interrupted, KeyboardInterrupt
        If the run should stop; finished work is kept.
    """
    run = _Run(*jobs[0], device, executor, timeline, inform, guard)
    yielded = set[str]()
    for pause in (*RETRY_PAUSES, None):
        try:
            for outcome in _run_models(run, jobs):
                if outcome.stage not in yielded:  # a retry yields the finished stages again
                    yielded.add(outcome.stage)
                    yield outcome
            return
        except (Interrupted, LostClusterError):
            raise
        except Exception as error:
            guard()
            if pause is None or not is_transient(error):
                failure = retries_exhausted(error)
                outcome = failure_of(run.job.stem, run.shape, run.began, failure, run.job.output, run.plan.name)
                yield run.record(outcome, resumable=isinstance(error, RESUMABLE))
                return
            inform(f"{error}: trying again in {pause:g} s")
            wait(pause, guard)


@dataclass(slots=True)
class _Run:
    """The current model and job, the shape of their tomogram, and the arguments of `segment_tomogram`."""

    plan: RunPlan
    job: Job
    device: Literal["cpu", "cuda"]
    executor: Executor
    timeline: bool
    inform: Callable[[str], None]
    guard: Callable[[], None]
    began: float = field(default_factory=time.time)
    shape: tuple[int, ...] = ()

    def begin(self, plan: RunPlan, job: Job) -> None:
        """Continue with the next model."""
        self.plan, self.job, self.began = plan, job, time.time()

    @property
    def named(self) -> Executor:
        """The executor for the tasks of the current model."""
        return NamedExecutor(self.executor, self.plan.name) if self.plan.name else self.executor

    def workspace(self) -> AbstractContextManager[Workspace]:
        """Open the work store of the current job."""
        return open_workspace(self.plan.configuration, self.job.stem, self.inform, self.guard)

    def record(self, outcome: Outcome, **options: bool) -> Outcome:
        """Record the outcome of the current job."""
        return record(self.plan, outcome, self.began, self.device, self.executor, **options)

    def done(self, outcome: Outcome) -> Outcome:
        """Record the outcome of a job that is done, unless another run has taken the tomogram over."""
        self.guard()
        log_warnings(outcome)
        return self.record(outcome)


def _run_models(run: _Run, jobs: Sequence[tuple[RunPlan, Job]]) -> Iterator[Outcome]:
    run.plan, run.job = jobs[0]
    if run.job.problem is not None:
        raise run.job.problem
    if _removed_meanwhile(jobs):
        yield from (Outcome(job.stem, "skipped", run.shape, stage=plan.name) for plan, job in jobs)
        return
    with ExitStack() as stack:
        denoised = None
        if run.plan.denoises:
            outcome, denoised = _denoise(run, stack)
            jobs = jobs[1:]
            if not jobs:
                stack.close()
            yield run.done(outcome) if outcome.status == "done" else outcome
        if jobs:
            yield from _run_label_models(run, jobs, denoised)


def _removed_meanwhile(jobs: Sequence[tuple[RunPlan, Job]]) -> bool:
    """Whether another run has finished all models since the plan, and has removed the denoised tomogram."""
    (plan, job), *others = jobs
    if not plan.removes_denoised or plan.overwrite_all or job.output.exists():
        return False
    removed = removal_of(plan.configuration, job.stem)
    return (
        removed is not None
        and removed["fingerprint"] == plan.with_fingerprint(job).fingerprint
        and all(one.done_meanwhile(one.with_fingerprint(other)) for one, other in others)
    )


def _run_label_models(
    run: _Run, jobs: Sequence[tuple[RunPlan, Job]], given: tuple[Denoised, Statistics] | None
) -> Iterator[Outcome]:
    """Run the models that predict labels; `given` is the tomogram if it has just been denoised."""
    last_plan, last = jobs[-1]
    run.plan, run.job = jobs[0]
    header = read_header(last.source, **last_plan.configuration.reading)
    run.plan.require_usable(header)
    run.shape = header.shape
    for note in header.notes if given is None else ():
        run.inform(f"{NOTE}{note}")
    # The last job's workspace is closed last, so it holds the tomogram for all models.
    with open_workspace(last_plan.configuration, last.stem, run.inform, run.guard) as shared:
        grid = make_grid(header.shape, last_plan.patch, halo=last_plan.halo)
        tomogram: Voxels | Denoised
        if given is None:
            tomogram, report = _ingest(shared, last_plan.configuration, last, header, grid, run.executor)
        else:
            tomogram, report = given[0], IngestReport(header, given[1], ())
        # The same sample as before the run, except for a compressed file, of which only the beginning was sampled then.
        sample = sample_array(tomogram) if header.compressed else sample_file(header)
        for plan, job in jobs:
            run.begin(plan, job)
            plan.require_usable(header)
            if job.problem is not None:
                raise job.problem
            run.job = job = plan.with_fingerprint(job)
            if plan.done_meanwhile(job):
                outcome = Outcome(job.stem, "skipped", header.shape, stage=plan.name)
                if plan is not last_plan:
                    yield outcome
                continue
            with nullcontext(shared) if job.stem == last.stem and plan is last_plan else run.workspace() as space:
                record_source(space.ledger, job.source)
                with forgetting_damaged(plan, header.shape, space):
                    result = _run_model(run, tomogram, report, sample, space)
                outcome = replace(result, seconds=time.time() - run.began, stage=plan.name, notes=header.notes)
                if plan is not last_plan:
                    yield run.done(outcome)
    if outcome.status == "done":
        run.done(outcome)
    else:  # skipped: the last outcome remains that of the run that made the output
        run.guard()
        before = shared.ledger.last("outcome") or {"status": "done"}
        shared.ledger.close(**{name: value for name, value in before.items() if name != "what"})
    yield outcome


def _denoise(run: _Run, workspaces: ExitStack) -> tuple[Outcome, tuple[Denoised, Statistics] | None]:
    """Denoise a raw tomogram and write its file; also return the voxels, which are readable until `workspaces` closes.

    They are ``None`` if another run has made the file in the meantime.
    """
    plan, configuration, began = run.plan, run.plan.configuration, time.time()
    header = read_header(run.job.source, **configuration.reading)
    plan.require_usable(header)
    run.shape = header.shape
    for note in header.notes:
        run.inform(f"{NOTE}{note}")
    run.job = job = plan.with_fingerprint(run.job)
    if plan.done_meanwhile(job):
        return Outcome(job.stem, "skipped", header.shape, stage=plan.name), None
    space, executor = workspaces.enter_context(run.workspace()), run.named
    record_source(space.ledger, job.source)
    with forgetting_damaged(plan, header.shape, space):
        grid = make_grid(header.shape, plan.patch, halo=plan.halo)
        tomogram, report = _ingest(space, configuration, job, header, grid, executor)
        spec = _denoising_spec(run, tomogram, space)
        predicted = _predict(run, tomogram, space, spec)
        outputs, blocks = predicted.outputs, predicted.blocks
        if isinstance(tomogram, MrcVoxels):
            require_unchanged(tomogram.header)
        low, high = min(block["lowest"] for block in blocks), max(block["highest"][0] for block in blocks)
        denoised = Denoised(outputs["denoised"], (low, high) if configuration.scale_prediction else None)
        found = intensities(
            sample_array(tomogram) if header.compressed else sample_file(header), *spec.stretch or (0, 1)
        )
        warnings = [*plan.warnings_of(header, found, non_finite=report.statistics.non_finite)]
        if low == high:
            warnings.append(f"the denoised intensities are {low:g} everywhere: check trained_model")
        attributes = _attributes(plan, job, report, warnings)
        raw = raw_predictions_file(configuration.prediction_folder, job.stem)
        if configuration.save_raw_predictions:  # first: the MRC file, written last, marks the outputs complete
            write_raw = partial(
                write_raw_predictions, predictions=replace(denoised, channel=None), attributes=attributes
            )
            executor.map(write_raw, [raw], name="export")
        elif read_fingerprint(raw) is not None:
            raw.unlink()  # made by an earlier run with other settings
        write = partial(write_mrc_floats, voxels=denoised, label=MRC_LABEL + job.fingerprint, **header.placement)
        executor.map(write, [job.output], name="export")
        warnings += draw_denoised(configuration, job.stem, tomogram, denoised, attributes, executor)
    keep_for_the_report(configuration, job.stem)
    outcome = outcome_of(job.stem, attributes, header.shape, (), warnings)
    outcome = replace(outcome, seconds=time.time() - began, stage=plan.name, notes=header.notes)
    ends = (float(denoised.scaled(low)), float(denoised.scaled(high)))
    return outcome, (denoised, Statistics(*ends, None, 0))


def _denoising_spec(run: _Run, tomogram: Voxels, space: Workspace) -> PredictorSpec:
    """Return a denoiser's specification with the scaling of its tomogram: computed once, then read from the ledger."""
    data, spec, executor = run.plan.configuration.parameters.data, run.plan.spec(run.device), run.named
    key = run.job.prediction_fingerprint
    found = space.ledger.last("scaling")
    if found is None or found["key"] != key:
        stretch = stretch_of(tomogram, run.job.source, invert=data.invert is not False, executor=executor)
        own = with_own_moments(
            replace(spec, stretch=stretch), tomogram, mean=data.mean is None, std=data.std is None, executor=executor
        )
        found = {"key": key, "stretch": stretch, "mean": own.mean, "std": own.std}
        if isinstance(tomogram, MrcVoxels):
            require_unchanged(tomogram.header)
        space.ledger.append("scaling", **found)
    low, high = found["stretch"]
    return replace(spec, stretch=(low, high), mean=found["mean"], std=found["std"])


def _ingest(
    space: Workspace, configuration: Configuration, job: Job, header: TomogramHeader, grid: Grid, executor: Executor
) -> tuple[Voxels, IngestReport]:
    """Return the tomogram: the input itself, the copy of an earlier run, or a new copy."""
    chunks = None if header.compressed else tomogram_chunks(grid)
    compress = compresses(header, keep_work=configuration.keep_work)
    copy = not reads_in_place(header, configuration)
    # An earlier run that read the tomogram in place ignored an existing copy, which may be that of another file.
    identity = [known_identity(configuration, job.source, job.stem), configuration.reading, chunks, compress, copy]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    found = space.ledger.last("ingested")
    # After a reboot, data that had not been synced to disk is missing from the copy.
    copied = found is not None and found["boot"] == boot_id() != "" and "tomogram" in space.group
    if found and found["key"] == key and (copied or not copy):
        values = found["statistics"]
        statistics = Statistics(values["min"], values["max"], values["mean"], values["non_finite_voxels"])
        tomogram: Voxels
        if isinstance(header, ZarrHeader):
            tomogram = header.open()
        elif isinstance(header, MrcHeader) and not copy:
            tomogram = MrcVoxels(header)
        else:
            tomogram = work_array(space.group, "tomogram")
        return tomogram, IngestReport(header, statistics, tuple(found["warnings"]))
    tomogram, report = ingest(
        job.source,
        space.group.store,
        chunks=chunks,
        compress=compress,
        copy=copy,
        executor=executor,
        **configuration.reading,
    )
    space.ledger.append(
        "ingested", key=key, boot=boot_id(), statistics=report.statistics.attributes(), warnings=report.warnings
    )
    return tomogram, report


@dataclass(frozen=True, slots=True)
class _Predicted:
    """The results of a prediction.

    Attributes
    ----------
    outputs
        The arrays by name.
    blocks
        The ledger's entry of every block.
    labelling, described
        See `cryosiam_dask.stages.components.remove_small`; `described` holds the blocks that this run has predicted.
        `labelling` is ``None`` if no components are removed.
    """

    outputs: dict[str, zarr.Array[Any]]
    blocks: list[dict[str, Any]]
    labelling: Labelling | None
    described: dict[Index, Description]

    def voxels(self, count: int) -> tuple[int, ...] | None:
        """Return the number of voxels of each label, of at least `count`; ``None`` if it was not recorded."""
        if not all("counts" in block for block in self.blocks):
            return None
        found = np.zeros(256, np.int64)
        for block in self.blocks:
            found[1 : 1 + len(block["counts"])] += np.array(block["counts"], np.int64)
        found[0] = math.prod(self.outputs["labels"].shape) - found.sum()
        return tuple(found[: max(count, int(np.flatnonzero(found)[-1]) + 1)].tolist())


def _predict(run: _Run, tomogram: Voxels | Denoised, space: Workspace, spec: PredictorSpec) -> _Predicted:
    """Predict block by block, except for the blocks that an earlier run recorded."""
    plan, job, work, ledger, done = run.plan, run.job, space.group, space.ledger, set()
    key = job.prediction_fingerprint
    found = ledger.last("blocks")
    resumed = found is not None and found["key"] == key and all(name in work for name in plan.wanted)
    own = plan.configuration.block_size
    if found and resumed and own is not None and found["block_size"] > own:
        run.inform(f"block_size is now {own}: the blocks of {found['block_size']} voxels per axis are predicted again")
        resumed = False
    block_size = found["block_size"] if found and resumed else plan.block_size(tomogram.shape, run.named.workers)
    grid = make_grid(tomogram.shape, plan.patch, block_size, plan.halo)
    if resumed:
        done = {tuple(entry["index"]) for entry in ledger.since("block", "blocks")}
        outputs = {name: work_array(work, name) for name in plan.wanted}
        run.inform(f"{len(done)} of {len(grid.indices())} blocks are already done")
    token = uuid.uuid4().hex
    work.attrs["blocks"] = token
    # List the files: arrays that are copied to HDF5 have zarr format 2, which a group of format 3 does not list.
    for path in space.folder.iterdir():
        if path.name not in ("zarr.json", "tomogram", *(plan.wanted if resumed else ())):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not resumed:
        outputs = create_outputs(work, grid, plan.checkpoint.architecture.out_channels, plan.wanted)
        ledger.append("blocks", key=key, block_size=block_size)
    mask = plan.mask_of(job, tuple(tomogram.shape))
    sizes, labelling = removal_sizes(plan.configuration), None
    if sizes and not plan.configuration.parameters.network.postprocessing:
        array_module: ArrayModule = "auto" if spec.device == "cuda" else "numpy"
        within = Blocks.within([axis.edges for axis in grid.axes])
        labelling = removal_labelling(within, all_sizes(sizes), array_module=array_module)
    prediction = StoredPrediction(spec, grid, tomogram, outputs, mask, labelling, token)
    described = dict[Index, Description]()

    def record_block(index: tuple[int, ...], block: BlockTimes | None) -> None:
        if isinstance(tomogram, MrcVoxels):
            require_unchanged(tomogram.header)  # otherwise this block would be kept if the old file were restored
        highest, inside, counts = (block.highest, block.inside, block.counts) if block else ((), 0, ())
        lowest = {} if block is None or block.lowest is None else {"lowest": block.lowest}
        ledger.append("block", index=index, highest=highest, inside=inside, counts=counts, **lowest)
        described.update(block.described if block else ())

    times = predict_store(prediction, skip=done, done=record_block, executor=run.named)
    if run.timeline and times:
        write_timeline(plan.configuration.prediction_folder / f"{job.stem}_timeline.png", times, job.stem)
    recorded = ledger.since("block", "blocks")
    if labelling is not None:
        for entry in recorded:
            if not any(entry.get("counts", (1,))):  # nothing but background
                region = grid.block(tuple(entry["index"])).region
                described.update((each, Description(0, {}, [])) for each in labelling.blocks.inside(region))
    return _Predicted(outputs, recorded, labelling, described)


def _run_model(
    run: _Run, tomogram: Voxels | Denoised, report: IngestReport, sample: Sample, space: Workspace
) -> Outcome:
    """Take a tomogram through one model, and write its outputs."""
    plan, job, executor, work, header = run.plan, run.job, run.named, space.group, report.header
    configuration, network = plan.configuration, plan.configuration.parameters.network
    array_module: ArrayModule = "auto" if run.device == "cuda" else "numpy"
    predicted = _predict(run, tomogram, space, plan.spec(run.device))
    outputs, blocks = predicted.outputs, predicted.blocks
    if isinstance(tomogram, MrcVoxels):
        require_unchanged(tomogram.header)
    labels, warnings = outputs["labels"], list[str]()
    if network.postprocessing:
        filled = work.create_array(
            "lamella", shape=labels.shape, chunks=labels.chunks, dtype=labels.dtype, fill_value=0,
            compressors=labels.compressors,
        )  # fmt: skip
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
                f"no lamella found: no smoothed probability is above the threshold {plan.threshold:g}. The labels are "
                "those of the network, with rough faces and isolated spots. Lower network.threshold, and check "
                "trained_model"
            )
        labels = filled
    removed, sizes = None, removal_sizes(configuration)
    thick = network.postprocessing and labels.ndim == 3
    counted, thickness = None if network.postprocessing else predicted.voxels(plan.labels), None
    if counted is None:
        counted, thickness = count_voxels(labels, plan.labels, executor, thick and not sizes)
    voxels = counted
    found_voxels = sum(voxels[1:])
    if sizes:
        labels, removed, voxels = without_small(
            labels, voxels, sizes, work, executor, array_module, predicted.labelling, predicted.described
        )
        if thick:
            thickness = count_voxels(labels, plan.labels, executor, thick)[1]
    data, mask = configuration.parameters.data, plan.mask_of(job, header.shape)
    seen = intensities(sample, data.min, data.max)
    inside = None if mask is None else sum(block["inside"] for block in blocks)
    coverage = None if inside is None else float(inside / math.prod(header.shape))
    blank = voxels[0] == math.prod(header.shape)
    found_before = plan.warnings_of(
        header, seen, non_finite=report.statistics.non_finite, mask=mask, coverage=None if blank else coverage
    )
    warnings = [*found_before, *warnings]
    if blank:
        warnings.append(_why_blank(plan, report, seen, found_voxels, blocks, coverage))
    attributes = _attributes(plan, job, report, warnings) | as_numbers(voxels, inside, thickness)
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
        write = partial(write_mrc, labels=labels, label=MRC_LABEL + job.fingerprint, **header.placement)
    executor.map(write, [job.output], name="export")
    warnings += draw_preview(configuration, job.stem, tomogram, labels, mask, attributes, executor)
    formats, folder = other_formats(configuration), configuration.prediction_folder
    warnings += remove_outdated_formats(folder, job.stem, job.fingerprint, keep=formats)
    beside = Placed.of(tomogram, report)
    write_other_formats(folder, job.stem, formats, labels, tomogram=beside, attributes=attributes, executor=executor)
    probabilities = outputs.get("probabilities")
    more, components = update_components(
        configuration, job.stem, labels, probabilities, attributes, work, executor, array_module
    )
    keep_for_the_report(configuration, job.stem)
    return outcome_of(job.stem, attributes, labels.shape, voxels, [*warnings, *more], components)


def _why_blank(
    plan: RunPlan,
    report: IngestReport,
    seen: Intensities,
    found: int,
    blocks: Sequence[Mapping[str, Any]],
    coverage: float | None,
) -> str:
    """Explain why all voxels are background; `found` of them had labels before small components were removed."""
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
        **header.placement,
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
