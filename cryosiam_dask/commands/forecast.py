"""Forecast what a run will read, compute and write, and how much time, memory and disk space it will need.

Nothing is written. `forecast` takes a plan (see `cryosiam_dask.runs.plan`); a run of several models has one forecast
per model. For every tomogram that the plan does not skip, it

1. reads the header and a sample of the intensities (see `cryosiam_dask.stages.intensities`), as wrong scaling is
   the most common cause of a blank segmentation;
2. reads its mask or, if all masks together are large, evenly spaced chunks of it;
3. divides it into blocks, and adds up the disk space of its work store and outputs.

No GPU is used. Errors about a tomogram become its problems, and the forecast continues with the next one.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic_core import to_jsonable_python
from rich.filesize import decimal

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.diagnosis import Intensities
from cryosiam_dask.core.grid import Grid, make_grid
from cryosiam_dask.errors import CryosiamDaskError, DeviceError, TomogramError
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mask import Mask, read_stored
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.runs.find import find_tomograms
from cryosiam_dask.runs.fingerprint import removal_sizes
from cryosiam_dask.runs.ledger import read_outcomes
from cryosiam_dask.runs.plan import Job, RunPlan, up_to_date
from cryosiam_dask.stages.components import REMOVAL_BYTES
from cryosiam_dask.stages.export import format_path, most_bytes_of_formats, other_formats
from cryosiam_dask.stages.ingest import compresses, copy_bytes
from cryosiam_dask.stages.intensities import intensities, sample_file, spread_regions
from cryosiam_dask.stages.lamella import WORK_BYTES
from cryosiam_dask.stages.measurements import INSTANCE_BYTES, component_files
from cryosiam_dask.stages.preview import most_bytes, preview_file

MASK_VOXELS = 1 << 31  # maximum voxels to read from all masks together, which takes a few seconds
_LEAST_MASK_VOXELS = 1 << 26  # minimum voxels to read from each mask


@dataclass(frozen=True, slots=True)
class Masking:
    """The effect of a lamella mask on a tomogram.

    Attributes
    ----------
    path
        The file.
    stored_shape
        Shape of the mask, (z, y, x); the mask is resized if the tomogram has another shape.
    coverage
        Share of the tomogram inside the mask, 0 to 1.
    blocks_ruled_out
        Number of blocks that need no prediction.
    exact
        Whether both numbers are exact; they are not if the mask is resized, or if only some chunks of it were read.
    """

    path: Path
    stored_shape: tuple[int, ...]
    coverage: float
    blocks_ruled_out: int
    exact: bool


@dataclass(frozen=True, slots=True)
class TomogramForecast:
    """Forecast of one tomogram.

    Attributes
    ----------
    stem, source
        Name and file of the tomogram.
    action
        ``"segment"``; ``"measure"`` if the labels are up to date but other outputs are missing; ``"skip"``;
        ``"refuse"`` if there are problems.
    reason
        Why it is skipped, or which outputs are missing.
    shape
        (z, y, x) in voxels; empty if the file was not or cannot be read.
    dtype
        Dtype of the voxels.
    voxel_size_angstrom
        Voxel size along the axes of `shape`, in Å; ``None`` where the header does not give it.
    file_bytes
        Size of the file on disk.
    compressed
        Whether the file is gzip-compressed.
    intensities
        How the intensities fit ``parameters.data.min`` and ``max``.
    mask
        The effect of the lamella mask, if there is one.
    mask_to_come
        Whether an earlier model of the same run makes the mask.
    denoised_first
        Whether the run itself makes the tomogram, by denoising a raw one.
    blocks, patches
        Number of blocks and patches without a mask.
    block_shape
        Shape of the largest block, in voxels.
    work_bytes, output_bytes
        Maximum disk space of the work store, which is temporary, and of the outputs. Labels compress to a small
        fraction of this; probabilities hardly compress.
    certain_work_bytes, certain_output_bytes
        The part of both that does not depend on compression.
    removed_bytes
        The part of the outputs that is removed once all models are done.
    outputs
        Files that will be written.
    preview
        The preview, included in `output_bytes`; ``None`` if there will be none.
    notes, warnings
        Decisions about the file, and warnings.
    problems
        Why the tomogram cannot be segmented.
    """

    stem: str
    source: Path
    action: Literal["segment", "measure", "skip", "refuse"]
    reason: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    voxel_size_angstrom: tuple[float | None, ...] = ()
    file_bytes: int = 0
    compressed: bool = False
    intensities: Intensities | None = None
    mask: Masking | None = None
    mask_to_come: bool = False
    denoised_first: bool = False
    blocks: int = 0
    patches: int = 0
    block_shape: tuple[int, ...] = ()
    work_bytes: int = 0
    output_bytes: int = 0
    certain_work_bytes: int = 0
    certain_output_bytes: int = 0
    removed_bytes: int = 0
    outputs: tuple[Path, ...] = ()
    preview: Path | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that a run writes to.

    Attributes
    ----------
    folders
        The run's folders on this file system.
    free_bytes
        Free space. A quota may allow less.
    needed_bytes
        Maximum space that the run needs.
    certain_bytes
        The part of it that does not depend on compression.
    """

    folders: tuple[Path, ...]
    free_bytes: int
    needed_bytes: int
    certain_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of a run with one model.

    Attributes
    ----------
    model
        ``trained_model``: a path, or a location on the Hub.
    checkpoint, checkpoint_sha256
        The model's file, and its hash.
    classes
        Channels of the model's probabilities.
    patch, halo
        Patch shape and halo in voxels; a halo of 0 stands for a quarter of the patch.
    precision
        Precision of the network's multiplications.
    threshold
        Probability threshold.
    scaling
        Intensities that become 0 and 1; the first one is larger if they are inverted.
    tomograms
        One forecast for each tomogram.
    workers
        Number of worker processes on the CPUs of this machine.
    bytes_per_worker
        Memory of a worker that runs the network on the CPU.
    block_bytes
        The part of `bytes_per_worker` for two blocks; a worker with a GPU holds three blocks, so it needs half as much
        again.
    network_bytes
        The part of `bytes_per_worker` for the network; a worker with a GPU needs this on the GPU for each patch of a
        batch.
    batch_size
        Patches that a GPU predicts at once.
    memory_bytes
        Memory of this machine; ``None`` if not given.
    disks
        File systems that the run writes to.
    notes, warnings, problems
        Notes, warnings and errors about the run as a whole, not about single tomograms.
    shared
        Beginnings of warnings about single tomograms that `warnings` gives once for all of them.
    seconds
        Estimated duration of the run; ``None`` if no pace is known.
    pace
        How the pace was determined, in words.
    denoises
        Whether the model denoises; if so, it has neither classes nor a threshold.
    """

    model: str
    checkpoint: Path
    checkpoint_sha256: str
    classes: int
    patch: tuple[int, ...]
    halo: int
    precision: str
    threshold: float
    scaling: tuple[float, float]
    tomograms: tuple[TomogramForecast, ...]
    workers: int
    bytes_per_worker: int
    block_bytes: int
    network_bytes: int
    batch_size: int
    memory_bytes: int | None
    disks: tuple[Disk, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    seconds: float | None = None
    pace: str = ""
    denoises: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the same as JSON values, in the units of the attributes."""
        values = to_jsonable_python(self, inf_nan_mode="null", fallback=str)
        return {**values, "problems": list(self.all_problems)}

    @property
    def status(self) -> int:
        """Expected exit status of the run: 2 if no tomogram can be segmented, 1 if only some can, otherwise 0."""
        refused = [tomogram.action == "refuse" for tomogram in self.tomograms]
        return 2 if self.problems or all(refused) else int(any(refused))

    @property
    def all_problems(self) -> tuple[str, ...]:
        """All problems of the run and of its tomograms."""
        return (*self.problems, *(problem for tomogram in self.tomograms for problem in tomogram.problems))


@dataclass(frozen=True, slots=True)
class PipelineForecast:
    """Forecast of a run with several models.

    Attributes
    ----------
    stages
        One forecast for each model, by name, in order; their `disks` are empty, because the models share them.
    disks
        As in `Forecast`; a tomogram is converted once for all models.
    warnings, problems
        Warnings and problems about the disks.
    """

    stages: Mapping[str, Forecast]
    disks: tuple[Disk, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Estimated duration of the run; ``None`` if the pace of a model is not known."""
        each = [stage.seconds for stage in self.stages.values()]
        return None if None in each else sum(seconds for seconds in each if seconds is not None)

    def as_json(self) -> dict[str, Any]:
        """Return the same as JSON values; see `Forecast`."""
        values = to_jsonable_python(self, inf_nan_mode="null", fallback=str)
        stages = {name: stage.as_json() for name, stage in self.stages.items()}
        return {**values, "seconds": self.seconds, "stages": stages, "problems": list(self.all_problems)}

    @property
    def status(self) -> int:
        """See `Forecast`; no model can segment a tomogram that the first model refuses."""
        first = next(iter(self.stages.values()))
        return 2 if self.problems or first.status == 2 else max(stage.status > 0 for stage in self.stages.values())

    @property
    def all_problems(self) -> tuple[str, ...]:
        """All problems of the run and of its tomograms, each once."""
        of_stages = [problem for stage in self.stages.values() for problem in stage.all_problems]
        return tuple(dict.fromkeys((*self.problems, *of_stages)))


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed of a model.

    Attributes
    ----------
    patches_per_second
        Patches per second of all workers together.
    source
        How it was determined, in words.
    """

    patches_per_second: float
    source: str


def pace_of_runs(plan: RunPlan, device: str, workers: int | None) -> Pace | None:
    """Return the pace of the latest run that finished a tomogram with this model and kind of device, or ``None``.

    Parameters
    ----------
    plan
        The plan for the model.
    device
        ``"cpu"`` or ``"cuda"``.
    workers
        Number of workers of the planned run; ``None``: as many as in the latest run.
    """
    done = [
        outcome
        for outcome in read_outcomes(plan.configuration.prediction_folder).values()
        if outcome.get("status") == "done" and outcome.get("model") == plan.model and outcome.get("device") == device
    ]
    if not done:
        return None
    latest = [outcome for outcome in done if outcome["run"] == max(each["run"] for each in done)]
    seconds, until = 0.0, -math.inf
    for began, ended in sorted((outcome["began"], outcome["ended"]) for outcome in latest):  # they may overlap
        seconds += max(0.0, ended - max(began, until))
        until = max(until, ended)
    patches = sum(plan.blocks(tuple(outcome["shape"])).patch_count for outcome in latest)
    had = max(1, *(outcome["workers"] for outcome in latest), 0)
    return Pace(
        patches / max(seconds, 1e-3) * (workers or had) / had,
        f"as fast as in the latest run, {len(latest)} tomogram{'s' * (len(latest) != 1)} on {had} {device} "
        f"worker{'s' * (had != 1)}",
    )


#: Duration of a trial in seconds.
TRIAL_SECONDS = 5.0


def pace_of_trial(plan: RunPlan, device: Literal["cpu", "cuda"], workers: int | None) -> Pace | None:
    """Measure the pace of the model on this machine: predict patches of one planned tomogram, without writing anything.

    Parameters
    ----------
    plan
        The plan for the model; without a tomogram to segment, ``None`` is returned.
    device
        Where to run the network.
    workers
        Number of processes. Only one GPU is measured; ``None`` then stands for all GPUs.

    Raises
    ------
    DeviceError, CheckpointError
        If the model cannot run there.
    """
    from cryosiam_dask.model.predictor import count_of_gpus, measured_pace
    from cryosiam_dask.stages.predict import read_window

    job = next((job for job in plan.jobs if job.problem is None), None)
    if job is None:
        return None
    spec = plan.spec(device)
    header = read_header(job.source, **plan.configuration.reading)
    grid = make_grid(header.shape, plan.patch, max(plan.patch), plan.halo)
    block = grid.block(list(grid.indices())[len(grid.indices()) // 2])
    # Reading a compressed file up to its middle would take longer than the trial.
    empty = np.zeros(block.window_shape, np.float32)
    window = empty if header.compressed else read_window(header, block, grid, spec)
    count = workers or 1 if device == "cpu" else 1
    one = partial(measured_pace, spec, window, block.patches, block.shape)
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            pace = sum(pool.map(one, [TRIAL_SECONDS] * count))
    except BrokenProcessPool:
        raise DeviceError(
            "a process must survive the prediction of a block", place="--trial", value="a process that died",
            remedy="It probably ran out of memory: use fewer --workers, or a smaller patch_size",
        ) from None  # fmt: skip
    all_of = workers or count_of_gpus() if device == "cuda" else count
    return Pace(pace / count * all_of, f"as fast as in a trial of {TRIAL_SECONDS:.0f} s on {device} just now")


def forecast_pipeline(
    plans: Sequence[RunPlan],
    *,
    workers: int = 1,
    concurrent: int = 1,
    memory_bytes: int | None = None,
    paces: Sequence[Pace | None] = (),
) -> PipelineForecast:
    """Forecast a run of several models on the same tomograms.

    Parameters
    ----------
    plans
        From `cryosiam_dask.runs.plan.plan_run`, each with the name of its model.
    workers, concurrent, memory_bytes
        See `forecast`.
    paces
        The pace of each model, ``None`` if not known.
    """
    sampled: dict[Any, Intensities] = {}
    stages: dict[str, Forecast] = {}
    needs: list[_Need] = []
    last = {job.stem for job in plans[-1].jobs}
    for plan, pace in zip_longest(plans, paces):
        kept = last if plan is not plans[-1] else ()  # the last model's work stores hold these tomograms
        stages[plan.name] = found = _forecast_model(plan, workers, memory_bytes, pace, sampled, kept)
        needs += _needs(plan, found.tomograms, concurrent)
    disks = _disks(needs)
    return PipelineForecast(stages, disks, *_check_disks(disks))


def forecast(
    plan: RunPlan,
    *,
    workers: int = 1,
    concurrent: int = 1,
    memory_bytes: int | None = None,
    pace: Pace | None = None,
) -> Forecast:
    """Forecast a run of one model, reading as little as possible.

    Parameters
    ----------
    plan
        From `cryosiam_dask.runs.plan.plan_run`.
    workers
        Number of worker processes; with more workers, small tomograms have smaller blocks.
    concurrent
        Number of tomograms in progress at the same time.
    memory_bytes
        Memory of the machine.
    pace
        Pace of the model, if known.
    """
    found = _forecast_model(plan, workers, memory_bytes, pace, {})
    disks = _disks(_needs(plan, found.tomograms, concurrent))
    warnings, problems = _check_disks(disks)
    return replace(found, disks=disks, warnings=(*found.warnings, *warnings), problems=problems)


def _forecast_model(
    plan: RunPlan,
    workers: int,
    memory_bytes: int | None,
    pace: Pace | None,
    sampled: dict[Any, Intensities],
    converted: Collection[str] = (),
) -> Forecast:
    """Forecast one model, without disks.

    The voxels of the `converted` tomograms are in another model's work store. Intensities `sampled` for one model are
    reused for the others.
    """
    configuration = plan.configuration
    voxels = max(_LEAST_MASK_VOXELS, MASK_VOXELS // max(1, len(plan.jobs)))
    tomograms = [
        *(_tomogram(plan, job, workers, voxels, job.stem in converted, sampled) for job in plan.jobs),
        *(_forecast_incomplete(plan, job) for job in plan.incomplete),
        *(
            TomogramForecast(
                job.stem,
                job.source,
                "skip",
                up_to_date(job),
                outputs=_outputs(plan, job),
            )
            for job in plan.skipped
        ),
        *(TomogramForecast(stem, Path(error.place), "refuse", problems=(str(error),)) for stem, error in plan.refused),
    ]
    tomograms.sort(key=lambda tomogram: tomogram.source)
    notes = list(plan.notes)
    found = [t.intensities for t in tomograms if t.intensities is not None]
    shared, replaced = plan.shared_warnings(found)
    of_all = [f"{count} of {len(found)} tomograms: {sentence}" for sentence, count in shared]
    warnings = (*plan.warnings(workers, memory_bytes), *of_all)
    patches = sum(t.patches for t in tomograms if t.action == "segment")
    data = configuration.parameters.data
    if configuration.parameters.data.patch_size == "auto":
        notes.append(
            "patch_size auto: the run will choose the largest patch that fits into the device's memory. This plan "
            f"assumes the checkpoint's patch, {list(plan.patch)}"
        )
    return Forecast(
        model=str(configuration.trained_model),
        checkpoint=plan.checkpoint.path,
        checkpoint_sha256=plan.checkpoint.sha256,
        classes=plan.checkpoint.architecture.out_channels,
        patch=plan.patch,
        halo=plan.halo,
        precision=configuration.hyper_parameters.precision,
        threshold=plan.threshold,
        scaling=(data.max, data.min) if data.invert else (data.min, data.max),
        tomograms=tuple(tomograms),
        workers=workers,
        bytes_per_worker=plan.bytes_per_worker,
        block_bytes=plan.block_bytes,
        network_bytes=plan.network_bytes,
        batch_size=configuration.hyper_parameters.batch_size,
        memory_bytes=memory_bytes,
        disks=(),
        notes=tuple(notes),
        warnings=warnings,
        shared=tuple(sorted(replaced)),
        seconds=None if pace is None else patches / pace.patches_per_second,
        pace="" if pace is None else pace.source,
        denoises=plan.denoises,
    )


def disk_warnings(plans: Sequence[RunPlan]) -> tuple[str, ...]:
    """Return warnings about the disks of a run.

    Parameters
    ----------
    plans
        The plans for the models of the run, in order.
    """
    needs: list[_Need] = []
    last = {job.stem for job in plans[-1].jobs}
    for plan in plans:
        tomograms = []
        for job in plan.jobs:
            with suppress(CryosiamDaskError):  # the tomogram fails later
                header = plan.header(job)
                kept = plan is not plans[-1] and job.stem in last
                room: dict[str, Any] = dict(_disk_bytes(plan, job, header, kept))
                tomograms.append(TomogramForecast(job.stem, job.source, "segment", **room))
        tomograms += [_forecast_incomplete(plan, job) for job in plan.incomplete]
        needs += _needs(plan, tomograms, USUALLY_AT_ONCE)
    warnings, problems = _check_disks(_disks(needs))
    return (*problems, *warnings)


def _check_disks(disks: Iterable[Disk]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return warnings and problems about disks."""
    warnings, problems = list[str](), list[str]()
    for disk in disks:
        where = " and ".join(map(str, disk.folders))
        if disk.certain_bytes > disk.free_bytes:
            problems.append(
                f"{where}: there must be {decimal(disk.certain_bytes)} of free disk space; found "
                f"{decimal(disk.free_bytes)}. Free space, or set work_folder or prediction_folder to another disk."
            )
        elif disk.needed_bytes > disk.free_bytes:
            warnings.append(
                f"{where}: up to {decimal(disk.needed_bytes)} may be needed, but {decimal(disk.free_bytes)} are free. "
                "Labels compress to a small fraction of this; probabilities hardly compress"
            )
    return tuple(warnings), tuple(problems)


def unreadable(configuration: Configuration, filename: str | None = None) -> list[CryosiamDaskError]:
    """Return the errors in the headers of a configuration's tomograms, also if no run can be planned."""
    problems: list[CryosiamDaskError] = []
    for source in find_tomograms(configuration, filename):
        if configuration.denoiser and not source.exists():
            continue  # a run makes it first
        try:
            read_header(source, **configuration.reading)
        except TomogramError as error:
            problems.append(error)
    return problems


def masking(mask: Mask, grid: Grid, voxels: int = MASK_VOXELS) -> Masking:
    """Measure the share of a tomogram and of its blocks inside a mask.

    Parameters
    ----------
    mask
        From `cryosiam_dask.files.mask.open_mask`.
    grid
        The blocks of the tomogram.
    voxels
        Maximum number of voxels to read; of larger masks, evenly spaced chunks are read.

    Raises
    ------
    MaskError
        If it cannot be read or holds values other than 0 and 1.
    """
    ratios = [m / n for m, n in zip(mask.stored_shape, mask.shape, strict=True)]
    # Edges of the blocks in voxels of the stored mask.
    edges = [[round(edge * ratio) for edge in axis.edges] for axis, ratio in zip(grid.axes, ratios, strict=True)]
    seen, inside_of = np.zeros(grid.block_counts, bool), np.zeros(grid.block_counts, bool)
    read = inside = 0
    for region, values in read_stored(mask, partial(spread_regions, voxels=voxels)):
        read, inside = read + values.size, inside + int(np.count_nonzero(values))
        for parts in product(*map(_cut, region, edges)):
            block = tuple(index for index, _ in parts)
            part = values[
                tuple(slice(p.start - r.start, p.stop - r.start) for r, (_, p) in zip(region, parts, strict=True))
            ]
            seen[block] = True
            inside_of[block] |= bool(part.any())
    ruled_out = round(seen.size * np.count_nonzero(seen & ~inside_of) / np.count_nonzero(seen))
    exact = mask.stored_shape == mask.shape and read == math.prod(mask.shape)
    return Masking(mask.path, mask.stored_shape, inside / read, ruled_out, exact)


def _cut(part: slice, edges: list[int]) -> Iterable[tuple[int, slice]]:
    """Cut a range of an axis at the edges of blocks; yield the parts with the index of their block."""
    for index, (start, stop) in enumerate(pairwise(edges)):
        if max(part.start, start) < min(part.stop, stop):
            yield index, slice(max(part.start, start), min(part.stop, stop))


def _tomogram(
    plan: RunPlan,
    job: Job,
    workers: int,
    mask_voxels: int,
    converted: bool,
    sampled: dict[Any, Intensities],
) -> TomogramForecast:
    header: TomogramHeader | None = None
    pending = not job.fingerprint and job.problem is None and not plan.denoises
    known: dict[str, Any] = {"outputs": _outputs(plan, job), "denoised_first": job.raw is not None}
    known["mask_to_come"] = pending and job.mask is not None
    known["preview"] = _preview(plan, job)
    opened: Mask | None = None
    problems: list[str] = [] if job.problem is None else [str(job.problem)]
    data = plan.configuration.parameters.data
    try:
        header = plan.header(job)
        known |= _of_header(header)
        plan.require_usable(header)
        grid = plan.blocks(header.shape, workers)
        known |= {"blocks": math.prod(grid.block_counts), "patches": grid.patch_count}
        known["block_shape"] = tuple(max(b - a for a, b in pairwise(axis.edges)) for axis in grid.axes)
        known |= _disk_bytes(plan, job, header, converted)
    except CryosiamDaskError as error:
        if not isinstance(job.problem, TomogramError):  # otherwise already in the list
            problems.append(str(error))
    try:
        if header is not None and job.raw is None:
            key = (job.source, data.min, data.max)
            known["intensities"] = sampled.get(key) or intensities(sample_file(header), data.min, data.max)
            sampled[key] = known["intensities"]
            if plan.denoises:  # the denoiser's min and max do not refer to the intensities in the file
                known["intensities"] = replace(known["intensities"], below=0.0, above=0.0)
    except CryosiamDaskError as error:
        problems.append(str(error))
    try:
        if header is not None and job.mask is not None and job.problem is None and not pending and "blocks" in known:
            opened = plan.mask_of(job, header.shape)
            assert opened is not None
            known["mask"] = masking(opened, grid, mask_voxels)
    except CryosiamDaskError as error:
        problems.append(str(error))
    warnings: tuple[str, ...] = ()
    if header is not None:
        mask = known.get("mask")
        # A mask counts as empty only if all of it was read.
        coverage = mask.coverage if mask and (mask.exact or mask.coverage) else None
        warnings = plan.warnings_of(header, known.get("intensities"), mask=opened, coverage=coverage)
    return TomogramForecast(
        job.stem,
        job.source,
        "refuse" if problems else "segment",
        warnings=warnings,
        problems=tuple(dict.fromkeys(problems)),
        **known,
    )


def _forecast_incomplete(plan: RunPlan, job: Job) -> TomogramForecast:
    """Forecast a tomogram whose labels are up to date."""
    reason = f"{job.output} is up to date, {plan.outdated(job)}"
    try:
        header = read_header(job.source, **plan.configuration.reading)
    except CryosiamDaskError:  # only the labels are read
        return TomogramForecast(job.stem, job.source, "measure", reason, outputs=_outputs(plan, job)[1:])
    instances, outputs, _ = _other_bytes(plan, job, header)
    return TomogramForecast(
        job.stem,
        job.source,
        "measure",
        reason,
        work_bytes=instances,
        output_bytes=outputs,
        outputs=_outputs(plan, job)[1:],
        preview=_preview(plan, job),
        **_of_header(header),
    )


def _of_header(header: TomogramHeader) -> dict[str, Any]:
    return {
        "shape": header.shape,
        "dtype": str(header.dtype),
        "voxel_size_angstrom": header.voxel_size_angstrom,
        "file_bytes": header.file_bytes,
        "compressed": header.compressed,
        "notes": header.notes,
    }


def _outputs(plan: RunPlan, job: Job) -> tuple[Path, ...]:
    folder = plan.configuration.prediction_folder
    components = component_files(folder, job.stem) if job.components else ()
    return job.output, *components, *(format_path(folder, job.stem, f) for f in other_formats(plan.configuration))


def _preview(plan: RunPlan, job: Job) -> Path | None:
    return preview_file(plan.configuration.prediction_folder, job.stem) if plan.configuration.preview else None


def _other_bytes(plan: RunPlan, job: Job, header: TomogramHeader) -> tuple[int, int, int]:
    """Return the bytes of the components, of all outputs except the labels, and how many of the latter are certain."""
    instances = INSTANCE_BYTES * math.prod(header.shape) if job.components else 0
    formats, certain = most_bytes_of_formats(other_formats(plan.configuration), header)
    preview = most_bytes(header.shape, header.voxel_size_angstrom) if plan.configuration.preview else 0
    return instances, instances + formats + preview, certain


def _disk_bytes(plan: RunPlan, job: Job, header: TomogramHeader, converted: bool) -> dict[str, int]:
    """Add up the disk space of a tomogram's work store and outputs."""
    configuration, voxels = plan.configuration, math.prod(header.shape)
    # Only one of several models stores the tomogram, and none does if a denoiser of the same run writes it.
    copy = copy_bytes(header, configuration) if plan.denoises or not (converted or job.raw) else 0
    removal = REMOVAL_BYTES if removal_sizes(configuration) else 0
    lamella = WORK_BYTES if configuration.parameters.network.postprocessing else 0
    instances, others, certain_others = _other_bytes(plan, job, header)
    # Bytes per voxel of the network's outputs, of the result, and of what is kept in addition.
    network, result = plan.bytes_per_voxel, 4 if plan.denoises else 1
    is_mrc = job.output.suffix != ".h5"
    kept = 0 if is_mrc else removal // 2
    if configuration.save_raw_predictions if plan.denoises else configuration.save_internal_files:
        kept += network if plan.denoises else network - result
    return {
        "work_bytes": copy + voxels * (network + removal + lamella) + instances,
        "certain_work_bytes": 0 if compresses(header, keep_work=configuration.keep_work) else copy,
        "output_bytes": voxels * (result + kept) + others,
        "certain_output_bytes": voxels * result * is_mrc + certain_others,
        "removed_bytes": voxels * result * plan.removes_denoised,
    }


#: Usual number of work stores at the same time: one tomogram is read, one is predicted and one is exported. There
#: may be more of small tomograms for a while; see `cryosiam_dask.runs.collection`.
USUALLY_AT_ONCE = 3

_Need: TypeAlias = tuple[Path, int, int]  # folder, maximum and certain bytes


def _needs(plan: RunPlan, tomograms: Iterable[TomogramForecast], concurrent: int) -> list[_Need]:
    """Return the disk space needed in each folder."""
    configuration, done = plan.configuration, [t for t in tomograms if t.action in ("segment", "measure")]
    # Work stores are removed when their tomogram is done, unless keep_work is set. Only one is certain to exist.
    kept = len(done) if configuration.keep_work else 0
    work, certain_work = (
        sum(sorted((getattr(t, name) for t in done), reverse=True)[: kept or at_once])
        for name, at_once in (("work_bytes", concurrent), ("certain_work_bytes", 1))
    )
    removed = sorted((t.removed_bytes for t in done), reverse=True)
    return [
        (
            configuration.prediction_folder,
            sum(t.output_bytes for t in done) - sum(removed[concurrent:]),
            sum(t.certain_output_bytes for t in done) - sum(removed[1:]),
        ),
        (configuration.work_folder or configuration.prediction_folder, work, certain_work),
    ]


def _disks(needs: Iterable[_Need]) -> tuple[Disk, ...]:
    """Add up the needed space of each file system, and look up its free space."""
    disks: dict[int, Disk] = {}
    for folder, needed, certain in needs:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        disk = disks.get(existing.stat().st_dev, Disk((), shutil.disk_usage(existing).free, 0, 0))
        disks[existing.stat().st_dev] = Disk(
            disk.folders if folder in disk.folders else (*disk.folders, folder),
            disk.free_bytes,
            disk.needed_bytes + needed,
            disk.certain_bytes + certain,
        )
    return tuple(disks.values())
