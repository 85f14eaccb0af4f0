"""Plan a run: check everything that it needs, and report all problems together.

Nothing is written. A tomogram is skipped if the fingerprint in its output shows that it was made from the same input,
checkpoint and settings. An output made from others is a problem, unless the user allows the program to replace it.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryosiam_dask.config import STAGES, Configuration
from cryosiam_dask.core.diagnosis import beyond_lamella, contrast, contrast_of_raw, scaling, shared_warnings
from cryosiam_dask.core.executor import with_retries
from cryosiam_dask.core.grid import DEFAULT_BLOCK_SIZE, Grid, block_size_for, make_grid
from cryosiam_dask.core.machine import cores, memory_of_machine
from cryosiam_dask.errors import (
    CheckpointError,
    ConfigurationError,
    CryosiamDaskError,
    MaskError,
    OutputError,
    Problems,
    TomogramError,
    is_transient,
)
from cryosiam_dask.model.architecture import default_threshold, peak_bytes, required_divisor, required_halo
from cryosiam_dask.model.classes import class_names
from cryosiam_dask.model.published import PUBLISHED, locate
from cryosiam_dask.runs.find import (
    all_tomograms,
    check_prediction_folder,
    denoised_file,
    find_masks,
    find_tomograms,
    left_out_tomograms,
    made_of,
    missing_mask,
    not_readable,
    refused_names,
    shown,
)
from cryosiam_dask.runs.fingerprint import (
    components_done,
    fingerprint_of,
    identity_of,
    made_otherwise,
    read_fingerprint,
    removal_of,
    removal_sizes,
    settings_of,
    with_sizes,
)

# Imported where it is used, because it takes seconds and wrong paths should be reported immediately.
if TYPE_CHECKING:
    from cryosiam_dask.core.diagnosis import Intensities
    from cryosiam_dask.files.header import TomogramHeader
    from cryosiam_dask.files.mask import Mask
    from cryosiam_dask.model.checkpoint import Checkpoint
    from cryosiam_dask.model.predictor import PredictorSpec


_PROCESS_BYTES = 700 * 2**20  # memory of one process: Python with its libraries
#: Share of the memory that a plan may use, because estimates are rough and other programs use some of it.
USABLE = 0.8
_GPU = "a worker's GPU"


@dataclass(frozen=True, slots=True)
class Job:
    """One tomogram of a run.

    Attributes
    ----------
    source
        The tomogram file.
    stem
        Its name without the extension, from which the outputs are named.
    output
        The predictions file.
    mask
        The lamella mask's file, or ``None``.
    components
        The components file, or ``None``.
    prediction_fingerprint
        Hash of everything that the labels depend on before small components are removed.
    fingerprint
        Hash of everything that the output depends on. Both hashes are empty while an input is pending.
    found
        Identity of the output that existed before the run, or ``None``; see `identity_of`.
    problem
        Why this tomogram cannot be segmented although others can.
    shape
        Shape of the tomogram, (z, y, x); empty if its header was not read.
    raw
        The tomogram that the same run denoises to make `source`; ``None`` if `source` exists.
    """

    source: Path
    stem: str
    output: Path
    mask: Path | None
    components: Path | None
    prediction_fingerprint: str
    fingerprint: str
    found: tuple[int, ...] | None = None
    problem: CryosiamDaskError | None = None
    shape: tuple[int, ...] = ()
    raw: Path | None = None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do.

    Attributes
    ----------
    configuration, checkpoint
        The configuration, and its checkpoint without weights.
    patch
        Patch shape in voxels, (z, y, x) or (y, x).
    threshold
        Probability threshold.
    jobs
        Tomograms to segment.
    incomplete
        Tomograms whose output is up to date, but whose components, other formats or preview are not.
    skipped
        Tomograms whose outputs are all up to date.
    notes
        Messages for the user.
    refused
        Tomograms whose names cannot be used for outputs, in printable form, each with its error.
    overwrite
        Whether outputs made from other inputs or settings may be replaced.
    overwrite_all
        Whether all outputs are made again, including those that are up to date.
    name
        Name of the model if there are several, otherwise empty.
    run
        Id of the run in the ledgers.
    shapes
        Known distinct shapes of the tomograms of `jobs`; see `with_shapes`.
    room
        Memory that a worker has for two blocks, in bytes; ``None`` if unknown.
    """

    configuration: Configuration
    checkpoint: Checkpoint
    patch: tuple[int, ...]
    threshold: float
    jobs: tuple[Job, ...]
    incomplete: tuple[Job, ...]
    skipped: tuple[Job, ...]
    notes: tuple[str, ...]
    refused: tuple[tuple[str, TomogramError], ...] = ()
    overwrite: bool = False
    overwrite_all: bool = False
    name: str = ""
    run: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    room: int | None = None

    @property
    def labels(self) -> int:
        """Number of labels of the model, including the background; 1 for a denoiser."""
        return 1 if self.denoises else max(2, self.checkpoint.architecture.out_channels)

    @property
    def denoises(self) -> bool:
        """Whether the model denoises."""
        return self.configuration.denoises

    @property
    def removes_denoised(self) -> bool:
        """Whether the denoised tomograms are removed when all models of the pipeline are done with them."""
        return bool(self.name) and self.denoises and not self.configuration.keep_denoised

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels from 1 on."""
        return class_names(self.configuration, self.labels - 1)

    @property
    def model(self) -> list[Any]:
        """Everything that the duration of a patch depends on, except the device."""
        precision = self.configuration.hyper_parameters.precision
        return [self.checkpoint.sha256, list(self.patch), self.halo, precision]

    @property
    def wanted(self) -> tuple[str, ...]:
        """Outputs of the network that are needed: keys of `cryosiam_dask.stages.predict.OUTPUTS`."""
        if self.denoises:
            return ("denoised",)
        internal = self.configuration.save_internal_files
        wanted = ["labels"]
        if internal or self.configuration.parameters.network.postprocessing:
            wanted.append("probabilities")
        if internal and self.checkpoint.architecture.has_distance_head:
            wanted.append("distances")
        return tuple(wanted)

    @property
    def halo(self) -> int:
        """Voxels at each side of a patch that are discarded; 0 for CryoSiam's patches."""
        return self.configuration.parameters.data.halo or 0

    @property
    def network_bytes(self) -> int:
        """Estimated memory that the network needs for one patch on a worker's device, in bytes."""
        return peak_bytes(self.checkpoint.architecture, self.patch)

    @property
    def block_bytes(self) -> int:
        """Memory of a worker for two blocks, in bytes: one is predicted while another is read or written."""
        return max(self._bytes_of(self.blocks(shape)) for shape in self._shapes)

    @property
    def least_bytes_per_worker(self) -> int:
        """Like `bytes_per_worker`, but with the smallest possible blocks."""
        return replace(self, room=0).bytes_per_worker

    @property
    def bytes_per_worker(self) -> int:
        """Estimated memory that a CPU worker needs for process, blocks and network, in bytes."""
        return _PROCESS_BYTES + self.block_bytes + self.network_bytes

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes or ((2**30,) * len(self.patch),)

    @property
    def bytes_per_voxel(self) -> int:
        """Bytes per voxel of the network's `wanted` outputs, in memory and, uncompressed, in the work store."""
        classes = self.checkpoint.architecture.out_channels
        return sum(1 if name == "labels" else 4 * classes for name in self.wanted)

    def _bytes_of(self, grid: Grid) -> int:
        return 2 * (math.prod(grid.largest_window) * 4 + math.prod(grid.largest_block) * self.bytes_per_voxel)

    def blocks(self, shape: tuple[int, ...], workers: int = 1) -> Grid:
        """Divide a tomogram of `shape`, (z, y, x), into blocks.

        Their size is that of the configuration or, by default, the largest one that fits into memory and gives each of
        the `workers` at least two blocks, if the tomogram is large enough.
        """
        return make_grid(shape, self.patch, self.block_size(shape, workers), self.halo)

    def block_size(self, shape: tuple[int, ...], workers: int = 1) -> int:
        """Return the block edge that `blocks` aims for, in voxels."""
        own = self.configuration.block_size
        if own is not None or self.room is None:
            return block_size_for(shape, self.patch, own or DEFAULT_BLOCK_SIZE, workers, self.halo)
        return self._largest_block_size(shape, self.room, workers)

    def _largest_block_size(self, shape: tuple[int, ...], room: int, workers: int = 1) -> int:
        return block_size_for(
            shape, self.patch, DEFAULT_BLOCK_SIZE, workers, self.halo, lambda grid: self._bytes_of(grid) <= room
        )

    def with_shapes(self) -> RunPlan:
        """Return the plan with the shapes of its tomograms, and with the problems of single tomograms."""
        from cryosiam_dask.files.mask import look_at_mask

        shapes, jobs = set(), []
        for job in self.jobs:
            problem, shape = job.problem, job.shape
            if problem is None:
                try:
                    header = self.header(job)
                    self.require_usable(header)
                    shapes.add(shape := header.shape)
                    if job.mask is not None and job.fingerprint:
                        look_at_mask(job.mask, header.shape)
                except (TomogramError, MaskError) as error:
                    problem = None if is_transient(error) else error
            jobs.append(replace(job, problem=problem, shape=shape))
        return replace(self, jobs=tuple(jobs), shapes=tuple(sorted(shapes)))

    def header(self, job: Job) -> TomogramHeader:
        """Read the header of a job's tomogram or, if it must be denoised first, of the raw one.

        Raises
        ------
        TomogramError
            If it cannot be read.
        """
        from cryosiam_dask.files.tomogram import read_header

        denoiser = self.configuration.denoiser
        if job.raw is not None and denoiser is not None:
            return read_header(job.raw, **denoiser.reading)
        return read_header(job.source, **self.configuration.reading)

    def mask_of(self, job: Job, shape: tuple[int, ...]) -> Mask | None:
        """Open the mask of a job for its tomogram of `shape`, (z, y, x).

        Raises
        ------
        MaskError
            If it cannot be used.
        """
        from cryosiam_dask.files.mask import open_mask, require_aspect

        if job.mask is None:
            return None
        mask = open_mask(job.mask, shape)
        require_aspect(mask)
        return mask

    def warnings_of(
        self,
        header: TomogramHeader,
        found: Intensities | None,
        *,
        non_finite: int | None = None,
        mask: Mask | None = None,
        coverage: float | None = None,
    ) -> tuple[str, ...]:
        """Return warnings about a tomogram and its mask; they are the same before a run and after it.

        Parameters
        ----------
        header
            Header of the tomogram.
        found
            How the intensities fit ``parameters.data.min`` and ``max``; ``None`` if they cannot be read.
        non_finite
            Number of voxels that are NaN or infinite, if they were counted.
        mask
            Lamella mask, if there is one.
        coverage
            Share of the tomogram inside the mask, 0 to 1; ``None`` if unknown.
        """
        warnings = [*header.warnings, *voxel_size_warnings(self.configuration, header)]
        if found is not None:
            warnings += self.intensity_warnings(header, found)
            if non_finite or (non_finite is None and found.non_finite):
                many = "some" if non_finite is None else str(non_finite)
                counted_as = "background" if self.denoises else "the minimum"
                warnings.append(f"{many} voxels are NaN or infinite; they are treated as {counted_as}")
        if mask is not None and mask.stored_shape != mask.shape:
            stored, shape = (" × ".join(map(str, each)) for each in (mask.stored_shape, mask.shape))
            warnings.append(f"its mask {mask.path} has {stored} voxels and is resized to {shape}")
        if mask is not None and coverage == 0:
            warnings.append(f"its mask {mask.path} is empty: every voxel will be background")
        elif mask is not None and coverage is not None:
            warnings += beyond_lamella(self.checkpoint.architecture.out_channels, coverage)
        return tuple(warnings)

    def intensity_warnings(self, header: TomogramHeader, found: Intensities) -> list[str]:
        """Return warnings if the model cannot see the contrast of a tomogram, or sees it inverted."""
        data = self.configuration.parameters.data
        # The beginning of a compressed file may differ from the rest.
        partly = header.compressed and found.share < 1
        judged = f" (judging by {found.where})" if partly else ""
        if self.denoises:
            flat = found.central is not None and found.central[0] == found.central[1]
            of_range = scaling(0, 0, found.central, 0, 1) if flat else ()
            sentences = (*of_range, *contrast_of_raw(found.contrast, data.invert))
        else:
            of_range = scaling(found.below, found.above, found.central, data.min, data.max)
            sentences = (*of_range, *contrast(found.contrast, data.invert, self.configuration.denoiser is not None))
        return [f"{sentence}{judged}" for sentence in sentences]

    def shared_warnings(self, found: Sequence[Intensities]) -> tuple[list[tuple[str, int]], set[str]]:
        """Return warnings about several tomograms together; see `cryosiam_dask.core.diagnosis.shared_warnings`."""
        if self.denoises:
            return [], set()
        data = self.configuration.parameters.data
        return shared_warnings(found, data.min, data.max, data.invert, self.configuration.denoiser is not None)

    def require_usable(self, header: TomogramHeader) -> None:
        """Check that a tomogram is complete and has as many axes as the model's patches.

        Raises
        ------
        TomogramError
            If the tomogram cannot be segmented with this model.
        """
        header.require_complete()
        if len(header.shape) != len(self.patch):
            raise TomogramError(
                f"the patch must have as many axes as the tomogram, which has {len(header.shape)}",
                place=header.path,
                value=f"shape {header.shape} and patch_size {list(self.patch)}",
                remedy="Use a model for 2-D images or for 3-D tomograms, whichever this is, or leave it out with "
                "test_files",
            )

    def with_memory(self, host: int, device: int | None = None) -> RunPlan:
        """Return the plan for workers with the given memory.

        Parameters
        ----------
        host
            Main memory that a worker may use, in bytes.
        device
            Memory of its GPU, in bytes; ``None`` if the network runs on the CPU.
        """
        return replace(self, room=min(self._rooms(host, device).values()))

    def require_memory(self, host: int, device: int | None = None) -> None:
        """Check that the plan fits into the memory of a worker; see `with_memory`.

        Raises
        ------
        ConfigurationError
            If it does not. The remedy is a block size or, if none fits, a patch size that fits.
        """
        if not self.jobs:
            return
        for where, room in self._rooms(host, device).items():
            needed = replace(self, room=room).block_bytes
            if needed > room:
                total = device if device is not None and where == _GPU else host
                raise ConfigurationError(
                    f"two blocks and the network must fit into the memory of {where}",
                    place="keys block_size and parameters.data.patch_size",
                    value=f"about {_gb(needed + total - room)} for patch_size {list(self.patch)} and block_size "
                    f"{self._block_size_in(room)}, of {_gb(total)}",
                    remedy=self._remedy(host, device),
                )

    def warnings(self, workers: int | None, memory: int | None) -> tuple[str, ...]:
        """Return warnings about the run as a whole; they are the same before the run and after it.

        Parameters
        ----------
        workers
            Number of CPU workers on this machine; ``None`` if there are none.
        memory
            Memory of the machine, in bytes; ``None`` if unknown.
        """
        if not self.jobs:
            return ()
        warnings = list[str]()
        if self.configuration.mask_folder is None and not self.denoises:
            warnings += beyond_lamella(self.checkpoint.architecture.out_channels, None)
        if self.patch != self.checkpoint.patch_size:
            warnings.append(
                f"patch_size is {list(self.patch)}, but the model was trained with "
                f"{_edge(self.checkpoint.patch_size)}: CryoSiam always uses the latter, which often gives better "
                "results. Remove patch_size to use it"
            )
        needed = (workers or 0) * self.bytes_per_worker
        if memory is not None and needed > memory:
            fitting = max(1, memory // self.bytes_per_worker)
            lower = "" if self.configuration.block_size is None else ", lower block_size"
            warnings.append(
                f"{workers} workers on CPUs need about {_gb(needed)}, but this machine has {_gb(memory)}. Set "
                f"--workers to {fitting}{lower}, or use GPUs"
            )
        return tuple(warnings)

    def _rooms(self, host: int, device: int | None) -> dict[str, int]:
        """Return the bytes left for two blocks, by the memory that holds them."""
        if device is None:
            return {"a worker": host - _PROCESS_BYTES - self.network_bytes}
        batch = self.configuration.hyper_parameters.batch_size
        network = peak_bytes(self.checkpoint.architecture, self.patch, batch)
        # `block_bytes` is that of two blocks, but a worker with a GPU has three in flight: see `runs.dask_executor`.
        return {_GPU: int(USABLE * device) - network, "a worker": (host - _PROCESS_BYTES) * 2 // 3}

    def _block_size_in(self, room: int) -> int:
        return self.configuration.block_size or min(self._largest_block_size(shape, room) for shape in self._shapes)

    def _remedy(self, host: int, device: int | None) -> str:
        """Name the setting with which `require_memory` passes."""
        keys = self.configuration.model_copy(update={"block_size": None})
        plan = replace(self, configuration=keys)
        room = min(plan._rooms(host, device).values())
        if replace(plan, room=room).block_bytes <= room:
            return f"Set block_size to {plan._block_size_in(room)}, or to null to let the program choose"
        leave = "" if self.configuration.block_size is None else ", and block_size to null"
        divisor = required_divisor(self.checkpoint.architecture)
        for edge in range(max(self.patch) - divisor, max(2 * self.halo, divisor - 1), -divisor):
            patch = tuple(min(size, edge) for size in self.patch)
            smaller = replace(plan, patch=patch)
            room = min(smaller._rooms(host, device).values())
            if replace(smaller, room=room).block_bytes <= room:
                return (
                    f"Set patch_size to {list(patch)}{leave}, which changes the labels slightly, or use "
                    f"{'a GPU' if device is not None else 'a machine'} with more memory"
                )
        return "Use a machine with more memory"

    def with_fingerprint(self, job: Job) -> Job:
        """Return the job with fingerprints of its current tomogram and mask, which may have been pending before."""
        settings = settings_of(self.configuration, self.checkpoint, self.patch, self.threshold)
        prediction = fingerprint_of(self.configuration, job.source, job.stem, job.mask, settings)
        sizes = removal_sizes(self.configuration)
        return replace(job, prediction_fingerprint=prediction, fingerprint=with_sizes(prediction, sizes))

    def done_meanwhile(self, job: Job) -> bool:
        """Whether the output of a job turns out to be up to date, now that the job's fingerprint is known.

        Another run may have made it since the plan, or an earlier run with the same mask.

        Raises
        ------
        OutputError
            If an output exists that was made from other inputs or settings, and may not be replaced.
        """
        now = identity_of(job.output)
        if now is None or (now == job.found and self.overwrite_all):
            return False
        fits = read_fingerprint(job.output) == job.fingerprint
        if fits and not self.outdated(job):
            return True
        if self.overwrite or fits:
            return False
        raise made_otherwise(job.output)

    def outdated(self, job: Job) -> str:
        """Return a clause that names what is outdated besides the output of a job; empty if nothing is."""
        from cryosiam_dask.stages.export import formats_done

        names, missing = self.class_names, []
        if not components_done(job.components, job.fingerprint, names):
            missing.append("its components")
        if not formats_done(self.configuration, job.stem, job.fingerprint, names):
            missing.append("its other formats")
        if not preview_done(self.configuration, job):
            missing.append("its picture")
        if not raw_predictions_done(self.configuration, job):
            missing.append("its raw predictions")
        return f"{' and '.join(missing)} {'is' if missing == ['its picture'] else 'are'} not" if missing else ""

    def spec(self, device: Literal["cpu", "cuda"]) -> PredictorSpec:
        """Return the specification with which workers run the network on `device`."""
        from cryosiam_dask.model.predictor import PredictorSpec

        data = self.configuration.parameters.data
        return PredictorSpec(
            checkpoint=str(self.checkpoint.path),
            sha256=self.checkpoint.sha256,
            device=device,
            patch=self.patch,
            classes=self.checkpoint.architecture.out_channels,
            batch_size=self.configuration.hyper_parameters.batch_size,
            minimum=data.max if data.invert and not self.denoises else data.min,
            maximum=data.min if data.invert and not self.denoises else data.max,
            mean=0.0 if data.mean is None else data.mean,
            std=1.0 if data.std is None else data.std,
            threshold=self.threshold,
            halo=self.halo,
            precision=self.configuration.hyper_parameters.precision,
        )


def plan_run(
    configuration: Configuration,
    *,
    filename: str | None = None,
    overwrite: bool = False,
    overwrite_all: bool = False,
    name: str = "",
    pending_inputs: Collection[str] = (),
) -> RunPlan:
    """Plan a run, checking everything that it needs, without writing anything.

    Parameters
    ----------
    configuration
        The YAML file.
    filename
        Name of a single tomogram in the data folder; takes precedence over ``test_files``.
    overwrite
        Whether outputs made from other inputs or settings may be replaced.
    overwrite_all
        Whether all outputs are made again, including those that are up to date.
    name
        Name of the model if there are several.
    pending_inputs
        Tomograms (stems) that an earlier model of the same run denoises or makes masks for.

    Raises
    ------
    Problems
        If there are problems, with all of them together.
    ConfigurationError
        If a folder cannot be read.
    """
    run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{socket.gethostname()}-{os.getpid()}"
    try:
        overwrite |= overwrite_all
        plan = with_retries(partial(_plan_run, configuration, filename, overwrite, overwrite_all, name, pending_inputs))
        return replace(plan, overwrite=overwrite, overwrite_all=overwrite_all, name=name, run=run)
    except OSError as error:
        raise ConfigurationError(
            "every path of a configuration must be readable",
            place=error.filename or "the configuration",
            value=error.strerror,
            remedy="Change its permissions, or the key that names it",
        ) from None


def _plan_run(
    configuration: Configuration,
    filename: str | None,
    overwrite: bool,
    overwrite_all: bool,
    name: str,
    pending_inputs: Collection[str],
) -> RunPlan:
    from cryosiam_dask.model.checkpoint import look_at_checkpoint
    from cryosiam_dask.stages.export import foreign_formats, format_path, formats_done, other_formats

    problems: list[CryosiamDaskError] = []
    sources = all_tomograms(configuration, filename, problems)
    refused = refused_names(configuration, sources)
    sources = [source for source in sources if source not in refused]
    if refused and not sources:
        problems += refused.values()
    masks = find_masks(configuration, sources, pending_inputs, problems)
    check_prediction_folder(configuration, problems)
    notes = [f"the key {key} has no effect here" for key in configuration.unused]
    if filename is None and name in ("", STAGES[0]):  # the models of a pipeline share their tomograms
        notes += left_out_tomograms(configuration)
    checkpoint: Checkpoint | None = None
    patch: tuple[int, ...] = ()
    threshold = 0.0
    try:
        checkpoint = look_at_checkpoint(locate(configuration.trained_model))
        patch = _check_network(configuration, checkpoint, problems, notes)
        given = 0.0 if configuration.denoises else configuration.parameters.network.threshold
        threshold = default_threshold(checkpoint.architecture.out_channels) if given is None else given
    except CheckpointError as error:
        problems.append(error)
    if checkpoint is None or problems:
        raise Problems(problems)
    jobs, incomplete, skipped = [], [], []
    outputs: dict[Path, Path] = {}
    settings = settings_of(configuration, checkpoint, patch, threshold)
    raw = made_of(configuration, filename)
    for source, mask in zip(sources, masks, strict=True):
        stem = source.name.removesuffix(configuration.file_extension)
        output = _output_path(configuration, source, stem)
        pending = (mask is not None or source in raw) and stem in pending_inputs
        gone = source in raw and not pending and not source.exists()
        prediction = ""
        problem: CryosiamDaskError | None = None
        try:
            if mask is not None and not pending and not mask.is_file():
                raise missing_mask(source, mask)
            if gone and removal_of(configuration.denoiser, stem) is None:
                raise _must_be_denoised(source, raw[source])
            if not pending:
                prediction = fingerprint_of(configuration, source, stem, mask, settings)
        except (MaskError, TomogramError) as error:
            problem = error
        except OSError as error:
            problem = None if is_transient(error) else not_readable(source, mask, error)
        fingerprint = with_sizes(prediction, removal_sizes(configuration)) if prediction else ""
        components = configuration.prediction_folder / f"{stem}_components.h5" if configuration.components else None
        job = Job(source, stem, output, mask, components, prediction, fingerprint, identity_of(output), problem)
        job = replace(job, raw=raw.get(source) if pending or (gone and problem is None) else None)
        removed = removal_of(configuration, stem) if name and configuration.denoises and not output.exists() else None
        formats = other_formats(configuration)
        others = [format_path(configuration.prediction_folder, stem, name) for name in formats]
        foreign = [] if overwrite else foreign_formats(configuration.prediction_folder, stem, formats)
        inputs = {path.resolve() for path in (source, mask) if path}
        if inputs & {path.resolve() for path in (output, *others)}:
            remedy = "Set prediction_folder to a folder other than data_folder and mask_folder"
            problems.append(OutputError("an output must not replace its own input", place=output, remedy=remedy))
        elif output in outputs:
            rule, value = "two tomograms must not have the same output", f"{outputs[output]} and {source}"
            remedy = "Segment them separately, each with its own prediction_folder"
            problems.append(OutputError(rule, place=output, value=value, remedy=remedy))
        elif problem is not None:
            jobs.append(job)
        elif foreign:
            problems += [made_otherwise(path) for path in foreign]
        elif removed is not None and not overwrite_all and raw_predictions_done(configuration, job):
            if removed["fingerprint"] == job.fingerprint:
                skipped.append(job)  # unless another model needs it: see `with_denoising`
            elif overwrite:
                jobs.append(job)
            else:
                problems.append(made_otherwise(output))
        elif not output.exists() or overwrite_all or pending:
            jobs.append(job)
        elif read_fingerprint(output) == job.fingerprint:
            names = class_names(configuration, max(2, checkpoint.architecture.out_channels) - 1)
            measured = components_done(components, fingerprint, names) and raw_predictions_done(configuration, job)
            if measured and formats_done(configuration, stem, fingerprint, names) and preview_done(configuration, job):
                skipped.append(job)
            elif output.suffix == ".h5":
                incomplete.append(job)
            else:
                jobs.append(job)
        elif overwrite:
            jobs.append(job)
        else:
            problems.append(made_otherwise(output))
        outputs[output] = source
    if not name:  # without the other models, nothing denoises them
        jobs = [
            job if job.raw is None else replace(job, problem=_must_be_denoised(job.source, job.raw), raw=None)
            for job in jobs
        ]
    failing = [job.problem for job in jobs if job.problem is not None]
    if len(failing) == len(sources):
        problems += [*refused.values(), *failing]
    if problems:
        raise Problems(problems)
    return RunPlan(
        configuration, checkpoint, patch, threshold, tuple(jobs), tuple(incomplete), tuple(skipped), tuple(notes),
        tuple((shown(source.name.removesuffix(configuration.file_extension)), why) for source, why in refused.items()),
    )  # fmt: skip


def _must_be_denoised(source: Path, raw: Path) -> TomogramError:
    return TomogramError(
        f"{raw.name} must be denoised first",
        place=source,
        value="no such file",
        remedy="Run 'cryosiam-dask denoise-predict' or 'cryosiam-dask run' with this file",
    )


def up_to_date(job: Job) -> str:
    """Return why a tomogram is skipped, as a participle clause."""
    gone = "" if job.output.exists() else ", and removed because all models are done with it"
    return f"made from the same input, checkpoint and settings{gone}"


def with_denoising(plans: Sequence[RunPlan]) -> list[RunPlan]:
    """Return the plans of a pipeline, with jobs for denoised tomograms that were removed and are needed again.

    A model whose mask is pending reads the file of a tomogram that is already denoised.
    """
    if not plans or not plans[0].denoises:
        return list(plans)
    first, *others = plans
    if first.removes_denoised:
        needed = {job.raw for plan in others for job in plan.jobs}
        again = [job for job in first.skipped if job.source in needed and not job.output.exists()]
        jobs = tuple(sorted((*first.jobs, *again), key=lambda job: job.source))
        first = replace(first, jobs=jobs, skipped=tuple(job for job in first.skipped if job not in again))
    made = {job.source for job in first.jobs}
    return [
        first,
        *(
            replace(plan, jobs=tuple(job if job.raw in made else replace(job, raw=None) for job in plan.jobs))
            for plan in others
        ),
    ]


def on_this_machine(plans: Sequence[RunPlan], workers: int | None) -> tuple[list[RunPlan], int]:
    """Return the plans for CPU workers that share the memory of this machine, and the number of workers.

    Parameters
    ----------
    plans
        Plans of all models of a run.
    workers
        Requested number of workers; ``None``: as many as cores and memory allow.

    Raises
    ------
    Problems
        If not even one worker has enough memory.
    """
    memory = memory_of_machine()
    plans = [plan.with_shapes() for plan in plans]
    require_memory(plans, memory)
    # Small blocks cost little time, but an idle core costs much.
    allowed = min(int(USABLE * memory / plan.least_bytes_per_worker) for plan in plans)
    count = workers or max(1, min(cores(), allowed))
    return [plan.with_memory(int(USABLE * memory / count)) for plan in plans], count


def require_memory(plans: Sequence[RunPlan], host: int, device: int | None = None) -> None:
    """Check that all plans fit into the memory of a worker; see `RunPlan.require_memory`.

    Raises
    ------
    Problems
        If they do not, with the errors of all models.
    """
    problems = []
    for plan in plans:
        try:
            plan.require_memory(host, device)
        except ConfigurationError as error:
            problems.append(error)
    if problems:
        raise Problems(problems)


def memory_to_use(plans: Sequence[RunPlan], host: int, devices: Collection[int]) -> int | None:
    """Return the memory of the smallest GPU that plans fit in, in bytes; or of the largest one if they fit in none.

    Parameters
    ----------
    plans, host
        See `require_memory`.
    devices
        Memory of each GPU; if there is none, ``None`` is returned.
    """
    for device in sorted(devices):
        with suppress(Problems):
            require_memory(plans, host, device)
            return device
    return max(devices, default=None)


def masks_made_before(plans: Sequence[RunPlan], configuration: Configuration, filename: str | None = None) -> set[str]:
    """Return the tomograms (stems) whose masks the previous model makes in the same run, for `plan_run`.

    Parameters
    ----------
    plans
        Plans of the previous models; empty if the last one could not be planned, so that any mask may be pending.
    configuration, filename
        See `plan_run`.
    """
    if plans:
        return {job.stem for job in plans[-1].jobs}
    return {
        source.name.removesuffix(configuration.file_extension) for source in find_tomograms(configuration, filename)
    }


def _check_network(
    configuration: Configuration, checkpoint: Checkpoint, problems: list[CryosiamDaskError], notes: list[str]
) -> tuple[int, ...]:
    """Compare the configuration with the checkpoint; return the patch shape to use."""
    architecture, network = checkpoint.architecture, configuration.parameters.network
    data = configuration.parameters.data

    def refuse(key: str, rule: str, value: object, remedy: str) -> None:
        problems.append(ConfigurationError(rule, place=f"key {key}", value=value, remedy=remedy))

    if architecture.denoises != configuration.denoises:
        kind, purpose = ("a denoiser", "segments") if architecture.denoises else ("a model that segments", "denoises")
        command = "denoise-predict" if architecture.denoises else "semantic-predict, without scale_prediction"
        refuse(
            "trained_model", f"must be the checkpoint of a model that {purpose}",
            f"{configuration.trained_model}, {kind}",
            f"Set trained_model to another checkpoint, or use the command {command}",
        )  # fmt: skip
        return checkpoint.patch_size
    if not configuration.denoises and (data.mean is None or data.std is None):
        refuse(
            f"parameters.data.{'mean' if data.mean is None else 'std'}",
            "must be a number, because only a denoiser uses the tomogram's own", "null",
            "Set mean to 0 and std to 1, or to the values of the model's training",
        )  # fmt: skip
    for key, value in (("spatial_dims", architecture.spatial_dims), ("in_channels", architecture.in_channels)):
        if (given := getattr(network, key)) != value:
            rule = f"must agree with the checkpoint {configuration.trained_model}, which has {value}"
            remedy = f"Set it to {value}, or trained_model to another checkpoint"
            refuse(f"parameters.network.{key}", rule, given, remedy)
    wanted = data.patch_size
    # "auto" depends on the device: see `cryosiam_dask.commands.segment`.
    patch = checkpoint.patch_size if wanted in (None, "auto") else tuple(map(int, wanted))
    divisor = required_divisor(architecture)
    if len(patch) != architecture.spatial_dims or any(p % divisor for p in patch):
        rounded = [max(divisor, p // divisor * divisor) for p in (*patch, *patch[-1:] * 3)][: architecture.spatial_dims]
        rule = f"must be {architecture.spatial_dims} multiples of {divisor}, the stride of its coarsest level"
        refuse("parameters.data.patch_size", rule, list(patch), f"Set it to {rounded}")
    halo, needed = data.halo, required_halo(architecture)
    if halo is not None and not needed <= halo < min(patch) / 2:
        refuse(
            "parameters.data.halo",
            f"must be at least {needed}, the halo that this network needs, and less than half of patch_size "
            f"{list(patch)}",
            halo,
            f"Set it to {max(needed, min(patch) // 8)}"
            if 2 * needed < min(patch)
            else f"Set patch_size to {(2 * needed // divisor + 1) * divisor} or more along each axis",
        )
    if configuration.save_internal_files and not architecture.has_distance_head:
        notes.append(f"{configuration.trained_model} has no distance head: only probs are saved, not distances")
    if network.postprocessing and architecture.spatial_dims == 2:
        refuse(
            "parameters.network.postprocessing", "lamella post-processing needs a model for 3-D tomograms",
            f"True with a model for {architecture.spatial_dims}-D images", "Set it to False",
        )  # fmt: skip
    sizes, labels = network.postprocessing_sizes, max(2, architecture.out_channels)
    names = configuration.class_names
    if names is not None and len(names) != labels - 1:
        refuse(
            "class_names", f"must name the model's labels from 1 on, which are {labels - 1}",
            f"{len(names)} name{'s' * (len(names) != 1)}, {list(names)}",
            "Remove the background, label 0" if len(names) == labels else "Correct it, or set it to null",
        )  # fmt: skip
    if sizes is not None and any(size >= 0 for size in sizes[labels:]):
        rule = f"must have one entry for each of the model's {labels} labels, background included"
        remedy = "Remove the entries of labels that do not exist"
        refuse("parameters.network.postprocessing_sizes", rule, list(sizes), remedy)
    elif sizes is not None and len(sizes) < labels:
        notes.append(
            f"postprocessing_sizes has {len(sizes)} entries for the {labels} labels 0 to {labels - 1}: "
            f"labels from {len(sizes)} on are not filtered"
        )
    return patch


#: Relative difference from the voxel size of a model's training that causes a warning.
FAR_OFF = 0.2


def voxel_size_warnings(configuration: Configuration, header: TomogramHeader) -> tuple[str, ...]:
    """Return a warning if a tomogram's voxel size is far from that of the model's training, if that is published."""
    model = PUBLISHED.get(configuration.trained_model.name.removesuffix(".ckpt"))
    far = [
        size
        for size in header.voxel_size_angstrom
        if model is not None and size and abs(size / model.voxel_size_angstrom - 1) > FAR_OFF
    ]
    if model is None or not far:
        return ()
    return (
        f"its voxel size is {far[0]:.4g} Å, but this model was trained with about {model.voxel_size_angstrom:g} Å: "
        f"'cryosiam-dask match-pixel-size --pixel-size {model.voxel_size_angstrom:g}' resamples tomograms",
    )


def _output_path(configuration: Configuration, source: Path, stem: str) -> Path:
    from cryosiam_dask.core.endings import MRC_ENDINGS

    if configuration.denoises:
        return denoised_file(configuration, source)
    if configuration.save_original_file_extension and not configuration.save_internal_files:
        name = source.name.removesuffix(".gz")
        return configuration.prediction_folder / (name if Path(name).suffix in MRC_ENDINGS else f"{stem}.mrc")
    return configuration.prediction_folder / f"{stem}_preds.h5"


def raw_predictions_done(configuration: Configuration, job: Job) -> bool:
    """Whether the HDF5 file of a denoiser's result, if wanted, belongs to the denoised tomogram."""
    if not (configuration.denoises and configuration.save_raw_predictions):
        return True
    return read_fingerprint(raw_predictions_file(configuration.prediction_folder, job.stem)) == job.fingerprint


def raw_predictions_file(folder: Path, stem: str) -> Path:
    """Return the path of the HDF5 file with all channels of a denoiser's result, named as in CryoSiam."""
    return folder / f"{stem}_preds.h5"


def preview_done(configuration: Configuration, job: Job) -> bool:
    """Whether a tomogram's preview, if wanted, shows its output. The network never runs again for a preview alone."""
    from cryosiam_dask.stages.preview import preview_file, read_fingerprint

    if not configuration.preview or job.output.suffix != ".h5":
        return True
    return read_fingerprint(preview_file(configuration.prediction_folder, job.stem)) == job.fingerprint


def _edge(patch: Sequence[int]) -> str:
    return str(patch[0]) if len(set(patch)) == 1 else str(list(patch))


def _gb(count: float) -> str:
    return f"{count / 1e9:.{0 if count >= 1e10 else 1}f} GB"
