"""Before a run: everything that it needs is looked at, and all that stands in its way is reported at once.

Nothing is written. A tomogram whose output was made from the same input, checkpoint and settings is skipped; a
fingerprint in the output tells. One made otherwise stands in the way until the user allows it to be replaced.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import os
import socket
import time
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryosiam_dask.config import STAGES, Configuration
from cryosiam_dask.core.diagnosis import alike, beyond_lamella, contrast, scaling
from cryosiam_dask.core.executor import patiently
from cryosiam_dask.core.grid import DEFAULT_BLOCK_SIZE, Grid, block_size_for, make_grid
from cryosiam_dask.errors import (
    CheckpointError,
    ConfigurationError,
    CryosiamDaskError,
    MaskError,
    OutputError,
    Problems,
    TomogramError,
    may_pass,
    not_there,
)
from cryosiam_dask.files.folders import left_out, unusable, visible
from cryosiam_dask.model.architecture import default_threshold, peak_bytes, required_divisor, required_halo
from cryosiam_dask.model.classes import class_names, named
from cryosiam_dask.model.published import locate
from cryosiam_dask.runs.ledger import read_entries

# What reads files is imported where it is used: a path that is wrong is to be told at once.
if TYPE_CHECKING:
    from cryosiam_dask.core.diagnosis import Intensities
    from cryosiam_dask.files.header import TomogramHeader
    from cryosiam_dask.files.mask import Mask
    from cryosiam_dask.model.checkpoint import Checkpoint
    from cryosiam_dask.model.predictor import PredictorSpec

#: Raised whenever a change of the code changes a result, so that outputs of before are not taken for done.
NUMBERS_VERSION = 2

_PROCESS_BYTES = 700 * 2**20  # Python with its libraries, one process
#: Share of a memory that is planned with: estimates are rough, and others use some of it.
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
        Its name without the extension; names the outputs.
    output
        The file that the run makes.
    mask
        The lamella mask's file, or ``None``.
    components
        The instances that the run makes besides, or ``None``.
    prediction_fingerprint
        Hash of everything that the labels depend on before small components are removed.
    fingerprint
        Hash of everything that the output depends on. Both are empty while the mask is still to be made.
    found
        What tells the output that was there before the run from a later one, or ``None``.
    problem
        Why this tomogram cannot be done; others can.
    shape
        Of the tomogram, (z, y, x); empty where it was not looked at.
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


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do.

    Attributes
    ----------
    configuration, checkpoint
        As read.
    patch
        Patch shape in voxels, (z, y, x) or (y, x).
    threshold
        Probability threshold.
    jobs
        Tomograms to segment.
    unmeasured
        Tomograms whose output was made so, but not their components, other formats or picture.
    skipped
        Tomograms all of whose outputs were made from the same input, checkpoint and settings.
    notes
        What a user should know before the run.
    refused
        Tomograms of whose names no output can be called, as they are shown, and why; each fails alone.
    overwrite
        Whether outputs made from other inputs or settings may be replaced.
    overwrite_all
        Whether all outputs are made again.
    name
        Which of several models this is, where there are several.
    run
        Names the run in the ledgers.
    shapes
        Of the tomograms of `jobs`, each once, as far as they are known: see `looked_into`.
    room
        Bytes that a worker has for its two blocks; ``None`` where it is not known.
    """

    configuration: Configuration
    checkpoint: Checkpoint
    patch: tuple[int, ...]
    threshold: float
    jobs: tuple[Job, ...]
    unmeasured: tuple[Job, ...]
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
        """Number of labels that the model can give, background included."""
        return max(2, self.checkpoint.architecture.out_channels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels from 1 on."""
        return class_names(self.configuration, self.labels - 1)

    @property
    def model(self) -> list[Any]:
        """What the time for a patch depends on, beside the device."""
        precision = self.configuration.hyper_parameters.precision
        return [self.checkpoint.sha256, list(self.patch), self.halo, precision]

    @property
    def wanted(self) -> tuple[str, ...]:
        """What the network is asked for: keys of `cryosiam_dask.stages.predict.OUTPUTS`."""
        internal = self.configuration.save_internal_files
        wanted = ["labels"]
        if internal or self.configuration.parameters.network.postprocessing:
            wanted.append("probabilities")
        if internal and self.checkpoint.architecture.has_distance_head:
            wanted.append("distances")
        return tuple(wanted)

    @property
    def halo(self) -> int:
        """Voxels at each side of a patch that are not kept, 0 for CryoSiam's patches."""
        return self.configuration.parameters.data.halo or 0

    @property
    def network_bytes(self) -> int:
        """Memory that the network needs for a patch on a worker's device, estimated, in bytes."""
        return peak_bytes(self.checkpoint.architecture, self.patch)

    @property
    def block_bytes(self) -> int:
        """Memory of a worker for the two blocks that it holds: one computes while another is read or written."""
        return max(self._bytes_of(self.blocks(shape)) for shape in self._shapes)

    @property
    def least_bytes_per_worker(self) -> int:
        """As `bytes_per_worker`, with the smallest blocks that may be taken."""
        return replace(self, room=0).bytes_per_worker

    @property
    def bytes_per_worker(self) -> int:
        """Memory that a CPU worker needs, estimated from patch, block and network, in bytes."""
        return _PROCESS_BYTES + self.block_bytes + self.network_bytes

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes or ((2**30,) * len(self.patch),)

    def _bytes_of(self, grid: Grid) -> int:
        classes = self.checkpoint.architecture.out_channels
        per_voxel = sum(1 if name == "labels" else 4 * classes for name in self.wanted)
        return 2 * (math.prod(grid.largest_window) * 4 + math.prod(grid.largest_block) * per_voxel)

    def blocks(self, shape: tuple[int, ...], workers: int = 1) -> Grid:
        """The blocks of a tomogram of `shape`, (z, y, x): as large as the configuration says or, where it says nothing,
        as the memory allows, and at least two for each of the `workers` where there are so many."""
        return make_grid(shape, self.patch, self.block_size(shape, workers), self.halo)

    def block_size(self, shape: tuple[int, ...], workers: int = 1) -> int:
        """The block edge that `blocks` aims for, in voxels."""
        own = self.configuration.block_size
        if own is not None or self.room is None:
            return block_size_for(shape, self.patch, own or DEFAULT_BLOCK_SIZE, workers, self.halo)
        return self._fitting(shape, self.room, workers)

    def _fitting(self, shape: tuple[int, ...], room: int, workers: int = 1) -> int:
        return block_size_for(
            shape, self.patch, DEFAULT_BLOCK_SIZE, workers, self.halo, lambda grid: self._bytes_of(grid) <= room
        )

    def looked_into(self) -> RunPlan:
        """The plan with the shapes of its tomograms, and what stands in the way of single ones."""
        from cryosiam_dask.files.mask import look_at_mask
        from cryosiam_dask.files.tomogram import read_header

        shapes, jobs = set(), []
        for job in self.jobs:
            problem, shape = job.problem, job.shape
            if problem is None:
                try:
                    header = read_header(job.source, **self.configuration.reading)
                    self.require_usable(header)
                    shapes.add(shape := header.shape)
                    if job.mask is not None and job.fingerprint:
                        look_at_mask(job.mask, header.shape)
                except (TomogramError, MaskError) as error:
                    problem = None if may_pass(error) else error
            jobs.append(replace(job, problem=problem, shape=shape))
        return replace(self, jobs=tuple(jobs), shapes=tuple(sorted(shapes)))

    def mask_of(self, job: Job, shape: tuple[int, ...]) -> Mask | None:
        """The mask of a job for its tomogram of `shape`, (z, y, x).

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

    def attention(
        self,
        header: TomogramHeader,
        found: Intensities | None,
        *,
        non_finite: int | None = None,
        mask: Mask | None = None,
        coverage: float | None = None,
    ) -> tuple[str, ...]:
        """What needs attention in a tomogram and its mask: the same before a run and after it.

        Parameters
        ----------
        header
            Of the tomogram.
        found
            How its intensities fall into ``parameters.data.min`` and ``max``; ``None`` where they cannot be read.
        non_finite
            Voxels that are NaN or infinite, where they have been counted.
        mask
            Its mask, if there is one.
        coverage
            Share of the tomogram inside the mask, 0 to 1; ``None`` where it is not known.
        """
        warnings = list(header.warnings)
        if found is not None:
            warnings += self.attention_to_intensities(header, found)
            if non_finite or (non_finite is None and found.non_finite):
                many = "some" if non_finite is None else str(non_finite)
                warnings.append(f"{many} voxels are NaN or infinite; they are treated as the minimum")
        if mask is not None and mask.stored_shape != mask.shape:
            stored, shape = (" × ".join(map(str, each)) for each in (mask.stored_shape, mask.shape))
            warnings.append(f"its mask {mask.path} has {stored} voxels and is resized to {shape}")
        if mask is not None and coverage == 0:
            warnings.append(f"its mask {mask.path} is empty: every voxel will be background")
        elif mask is not None and coverage is not None:
            warnings += beyond_lamella(self.checkpoint.architecture.out_channels, coverage)
        return tuple(warnings)

    def attention_to_intensities(self, header: TomogramHeader, found: Intensities) -> list[str]:
        """The part of `attention` that says whether the model can see anything, and rightly."""
        data = self.configuration.parameters.data
        # What lies at the beginning need not be like the rest.
        partly = header.compressed and found.share < 1
        judged = f" (judged by {found.where}, which is read from its beginning only)" if partly else ""
        sentences = scaling(found.below, found.above, found.central, data.min, data.max)
        return [f"{sentence}{judged}" for sentence in (*sentences, *contrast(found.contrast, data.invert))]

    def attention_to_all(self, found: Sequence[Intensities]) -> tuple[list[tuple[str, int]], set[str]]:
        """What needs attention in the intensities of several tomograms; see `cryosiam_dask.core.diagnosis.alike`."""
        data = self.configuration.parameters.data
        return alike(found, data.min, data.max, data.invert)

    def require_usable(self, header: TomogramHeader) -> None:
        """Refuse an image where the model is for tomograms, the other way round, and what is mostly missing.

        Raises
        ------
        TomogramError
            With what is wrong.
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
        """The plan for workers with so much memory each.

        Parameters
        ----------
        host
            Bytes that a worker may use.
        device
            Bytes of its GPU; ``None`` where the network runs on the CPU.
        """
        return replace(self, room=min(self._rooms(host, device).values()))

    def require_memory(self, host: int, device: int | None = None) -> None:
        """Refuse what no worker has the memory for; see `with_memory`.

        Raises
        ------
        ConfigurationError
            With the block size or else the patch size that fits.
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
                    f"{self._taken(room)}, of {_gb(total)}",
                    remedy=self._remedy(host, device),
                )

    def warnings(self, workers: int | None, memory: int | None) -> tuple[str, ...]:
        """What needs attention in the run as a whole, and not in single tomograms: the same before it and after it.

        Parameters
        ----------
        workers
            On the CPUs of this machine; ``None`` where there are none.
        memory
            Of the machine, in bytes; ``None`` where it is not known.
        """
        if not self.jobs:
            return ()
        warnings = list[str]()
        if self.configuration.mask_folder is None:
            warnings += beyond_lamella(self.checkpoint.architecture.out_channels, None)
        if self.patch != self.checkpoint.patch_size:
            warnings.append(
                f"patch_size is {list(self.patch)}, the model was trained with {_edge(self.checkpoint.patch_size)}: "
                "CryoSiam always takes the latter, and results are often better with it. Leave patch_size out for that"
            )
        needed = (workers or 0) * self.bytes_per_worker
        if memory is not None and needed > memory:
            fitting = max(1, memory // self.bytes_per_worker)
            lower = "" if self.configuration.block_size is None else ", lower block_size"
            warnings.append(
                f"{workers} workers on CPUs need about {_gb(needed)}, and this machine has {_gb(memory)}. Set "
                f"--workers to {fitting}{lower}, or run it on GPUs"
            )
        return tuple(warnings)

    def _rooms(self, host: int, device: int | None) -> dict[str, int]:
        """What is left for blocks beside the network, by where it is."""
        if device is None:
            return {"a worker": host - _PROCESS_BYTES - self.network_bytes}
        batch = self.configuration.hyper_parameters.batch_size
        network = peak_bytes(self.checkpoint.architecture, self.patch, batch)
        return {_GPU: int(USABLE * device) - network, "a worker": host - _PROCESS_BYTES}

    def _taken(self, room: int) -> int:
        return self.configuration.block_size or min(self._fitting(shape, room) for shape in self._shapes)

    def _remedy(self, host: int, device: int | None) -> str:
        """What to set so that `require_memory` is content."""
        keys = self.configuration.model_copy(update={"block_size": None})
        plan = replace(self, configuration=keys)
        room = min(plan._rooms(host, device).values())
        if replace(plan, room=room).block_bytes <= room:
            return f"Set block_size to {plan._taken(room)}, or to null, which finds what fits"
        leave = "" if self.configuration.block_size is None else ", and block_size to null"
        divisor = required_divisor(self.checkpoint.architecture)
        for edge in range(max(self.patch) - divisor, max(2 * self.halo, divisor - 1), -divisor):
            patch = tuple(min(size, edge) for size in self.patch)
            smaller = replace(plan, patch=patch)
            room = min(smaller._rooms(host, device).values())
            if replace(smaller, room=room).block_bytes <= room:
                return (
                    f"Set patch_size to {list(patch)}{leave}, which changes the labels a little, or use "
                    f"{'a GPU' if device is not None else 'a machine'} with more memory"
                )
        return "Use a machine with more memory"

    def with_fingerprint(self, job: Job) -> Job:
        """The job with its fingerprints, of the tomogram and the mask as they are now: a mask may have been to come."""
        settings = _settings(self.configuration, self.checkpoint, self.patch, self.threshold)
        prediction = _fingerprint(self.configuration, job.source, job.stem, job.mask, settings)
        sizes = removal_sizes(self.configuration)
        return replace(job, prediction_fingerprint=prediction, fingerprint=with_sizes(prediction, sizes))

    def made_meanwhile(self, job: Job) -> bool:
        """Whether the output of a job, its fingerprint known, was made while it waited: by another run, or with the
        mask that turned out to be the same.

        Raises
        ------
        OutputError
            If there is one that was made otherwise, and may not be replaced.
        """
        now = _identity(job.output)
        if now is None or (now == job.found and self.overwrite_all):
            return False
        fits = _read_fingerprint(job.output) == job.fingerprint
        if fits and not self.outdated(job):
            return True
        if self.overwrite or fits:
            return False
        raise _made_otherwise(job.output)

    def outdated(self, job: Job) -> str:
        """What is wanted beside the output of a job and was not made from it, as a sentence; empty if nothing."""
        from cryosiam_dask.stages.export import formats_done

        names, missing = self.class_names, []
        if not components_done(job.components, job.fingerprint, names):
            missing.append("its components")
        if not formats_done(self.configuration, job.stem, job.fingerprint, names):
            missing.append("its other formats")
        if not preview_done(self.configuration, job):
            missing.append("its picture")
        return f"{' and '.join(missing)} {'is' if missing == ['its picture'] else 'are'} not" if missing else ""

    def spec(self, device: Literal["cpu", "cuda"]) -> PredictorSpec:
        """How a worker is to run the network on `device`."""
        from cryosiam_dask.model.predictor import PredictorSpec

        data = self.configuration.parameters.data
        return PredictorSpec(
            checkpoint=str(self.checkpoint.path),
            sha256=self.checkpoint.sha256,
            device=device,
            patch=self.patch,
            classes=self.checkpoint.architecture.out_channels,
            batch_size=self.configuration.hyper_parameters.batch_size,
            minimum=data.max if data.invert else data.min,
            maximum=data.min if data.invert else data.max,
            mean=data.mean,
            std=data.std,
            threshold=self.threshold,
            halo=self.halo,
            precision=self.configuration.hyper_parameters.precision,
        )


def require_paths(configurations: Mapping[str, Configuration], filename: str | None = None) -> None:
    """Refuse paths that are wrong, before anything is loaded that takes longer than looking at them.

    Parameters
    ----------
    configurations
        Of each model, in their order; see `cryosiam_dask.config.read_models`.
    filename
        See `plan_run`, which finds the same, and more.

    Raises
    ------
    Problems
        With all of them.
    """
    from cryosiam_dask.model.checkpoint import open_checkpoint

    problems: list[CryosiamDaskError] = []
    for number, configuration in enumerate(configurations.values()):
        try:
            sources = _find_tomograms(configuration, filename, problems)
            if number == 0:  # later ones take the masks that the first makes
                _find_masks(configuration, sources, (), problems)
            _check_prediction_folder(configuration, problems)
            if isinstance(configuration.trained_model, Path):
                open_checkpoint(configuration.trained_model).close()
        except CheckpointError as error:
            problems.append(error)
        except OSError:  # which may pass: `plan_run` is patient
            pass
    if problems:
        raise Problems({str(problem): problem for problem in problems}.values())  # models share their tomograms


def plan_run(
    configuration: Configuration,
    *,
    filename: str | None = None,
    overwrite: bool = False,
    overwrite_all: bool = False,
    name: str = "",
    masks_to_come: Collection[str] = (),
) -> RunPlan:
    """Look at everything that a run needs, without writing anything.

    Parameters
    ----------
    configuration
        The YAML file.
    filename
        Name of a single tomogram in the data folder; rules over ``test_files``.
    overwrite
        Whether outputs made from other inputs or settings may be replaced.
    overwrite_all
        Whether all outputs are made again, also those made from the same.
    name
        Of the model, where there are several.
    masks_to_come
        Tomograms (stems) whose masks the same run makes before.

    Raises
    ------
    Problems
        Everything that stands in the way, at once.
    ConfigurationError
        If a folder cannot even be looked into.
    """
    run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{socket.gethostname()}-{os.getpid()}"
    try:
        overwrite |= overwrite_all
        plan = patiently(partial(_plan_run, configuration, filename, overwrite, overwrite_all, name, masks_to_come))
        return replace(plan, overwrite=overwrite, overwrite_all=overwrite_all, name=name, run=run)
    except OSError as error:
        raise ConfigurationError(
            "what a configuration names must be readable",
            place=error.filename or "the configuration",
            value=error.strerror,
            remedy="Change the permissions, or the key that names it",
        ) from None


def _plan_run(
    configuration: Configuration,
    filename: str | None,
    overwrite: bool,
    overwrite_all: bool,
    name: str,
    masks_to_come: Collection[str],
) -> RunPlan:
    from cryosiam_dask.model.checkpoint import look_at_checkpoint
    from cryosiam_dask.stages.export import foreign_formats, format_path, formats_done, other_formats

    problems: list[CryosiamDaskError] = []
    sources = _find_tomograms(configuration, filename, problems)
    refused = refused_names(configuration, sources)
    sources = [source for source in sources if source not in refused]
    if refused and not sources:
        problems += refused.values()
    masks = _find_masks(configuration, sources, masks_to_come, problems)
    _check_prediction_folder(configuration, problems)
    notes = [f"the key {key} has no effect here" for key in configuration.unused]
    if filename is None and name in ("", STAGES[0]):  # models of a pipeline have their tomograms in common
        notes += left_out_tomograms(configuration)
    checkpoint: Checkpoint | None = None
    patch: tuple[int, ...] = ()
    threshold = 0.0
    try:
        checkpoint = look_at_checkpoint(locate(configuration.trained_model))
        patch = _check_network(configuration, checkpoint, problems, notes)
        given = configuration.parameters.network.threshold
        threshold = default_threshold(checkpoint.architecture.out_channels) if given is None else given
    except CheckpointError as error:
        problems.append(error)
    if checkpoint is None or problems:
        raise Problems(problems)
    jobs, unmeasured, skipped = [], [], []
    outputs: dict[Path, Path] = {}
    settings = _settings(configuration, checkpoint, patch, threshold)
    for source, mask in zip(sources, masks, strict=True):
        stem = source.name.removesuffix(configuration.file_extension)
        output = _output_path(configuration, source, stem)
        to_come = mask is not None and stem in masks_to_come
        prediction = ""
        problem: CryosiamDaskError | None = None
        try:
            if mask is not None and not to_come and not mask.is_file():
                raise _missing_mask(source, mask)
            if not to_come:
                prediction = _fingerprint(configuration, source, stem, mask, settings)
        except MaskError as error:
            problem = error
        except OSError as error:
            problem = None if may_pass(error) else _not_readable(source, mask, error)
        fingerprint = with_sizes(prediction, removal_sizes(configuration)) if prediction else ""
        components = configuration.prediction_folder / f"{stem}_components.h5" if configuration.components else None
        job = Job(source, stem, output, mask, components, prediction, fingerprint, _identity(output), problem)
        formats = other_formats(configuration)
        others = [format_path(configuration.prediction_folder, stem, name) for name in formats]
        foreign = [] if overwrite else foreign_formats(configuration.prediction_folder, stem, formats)
        inputs = {path.resolve() for path in (source, mask) if path}
        if inputs & {path.resolve() for path in (output, *others)}:
            problems.append(
                OutputError(
                    "an output must not replace its own input",
                    place=output,
                    remedy="Set prediction_folder to another folder than data_folder and mask_folder",
                )
            )
        elif output in outputs:
            problems.append(
                OutputError(
                    "two tomograms must not have the same output",
                    place=output,
                    value=f"{outputs[output]} and {source}",
                    remedy="Segment them with another prediction_folder each",
                )
            )
        elif problem is not None:
            jobs.append(job)
        elif foreign:
            problems += [_made_otherwise(path) for path in foreign]
        elif not output.exists() or overwrite_all or to_come:
            jobs.append(job)
        elif _read_fingerprint(output) == job.fingerprint:
            names = class_names(configuration, max(2, checkpoint.architecture.out_channels) - 1)
            measured = components_done(components, fingerprint, names)
            if measured and formats_done(configuration, stem, fingerprint, names) and preview_done(configuration, job):
                skipped.append(job)
            elif output.suffix == ".h5":
                unmeasured.append(job)
            else:
                jobs.append(job)
        elif overwrite:
            jobs.append(job)
        else:
            problems.append(_made_otherwise(output))
        outputs[output] = source
    hopeless = [job.problem for job in jobs if job.problem is not None]
    if len(hopeless) == len(sources):
        problems += [*refused.values(), *hopeless]
    if problems:
        raise Problems(problems)
    return RunPlan(
        configuration, checkpoint, patch, threshold, tuple(jobs), tuple(unmeasured), tuple(skipped), tuple(notes),
        tuple((shown(source.name.removesuffix(configuration.file_extension)), why) for source, why in refused.items()),
    )  # fmt: skip


#: Bytes by which the names of what is made of a tomogram, or lies beside it meanwhile, are longer than its own.
_LONGER = 60


def refused_names(configuration: Configuration, sources: Sequence[Path]) -> dict[Path, TomogramError]:
    """Those of some tomograms of whose names no output can be called, and why.

    Names are text in every table, list and page; a disk says how long they may be, and may take upper and lower case
    for the same.
    """
    folder = next((each for each in _upwards(configuration.prediction_folder) if each.is_dir()), Path("/"))
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX") - _LONGER
    except (OSError, ValueError, AttributeError):
        longest = 255 - _LONGER
    ignores_case = _ignores_case(folder)
    found: dict[Path, TomogramError] = {}
    taken: dict[str, Path] = {}
    for source in sources:
        stem, rule = source.name.removesuffix(configuration.file_extension), ""
        same = taken.setdefault(unicodedata.normalize("NFC", stem).casefold(), source) if ignores_case else source
        if shown(stem) != stem:
            rule = "its name must be UTF-8 text without tabs or other control characters: lists and tables contain it"
        elif len(os.fsencode(stem)) > longest:
            rule = (
                f"its name must have at most {longest} bytes without its extension: the names of its outputs are longer"
            )
        elif same != source:
            rule = f"its outputs would be those of {same.name}: {folder} takes upper and lower case for the same"
        if rule:
            found[source] = TomogramError(rule, place=shown(str(source)), remedy="Rename it, or make a link to it")
    return found


def shown(name: str) -> str:
    """A file name as text: bytes that are none, and control characters, as Python writes them."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if unicodedata.category(c) not in ("Cc", "Zl", "Zp") else ascii(c)[1:-1] for c in text)


def _upwards(folder: Path) -> tuple[Path, ...]:
    whole = folder.absolute()
    return whole, *whole.parents


def _ignores_case(folder: Path) -> bool:
    """Whether a disk takes upper and lower case for the same, asked without writing."""
    for each in _upwards(folder):
        if each.name.swapcase() != each.name:
            other = each.with_name(each.name.swapcase())
            return other.exists() and each.samefile(other)
    return False


def on_this_machine(plans: Sequence[RunPlan], workers: int | None) -> tuple[list[RunPlan], int]:
    """The plans for CPU workers of this machine, with its memory shared among them, and how many these are.

    Parameters
    ----------
    plans
        Of all models of a run.
    workers
        How many are wanted; ``None``: as many as cores and memory allow.

    Raises
    ------
    Problems
        If not even one worker has enough memory.
    """
    memory = memory_of_machine()
    plans = [plan.looked_into() for plan in plans]
    require_memory(plans, memory)
    # Small blocks are little slower, an idle core is.
    allowed = min(int(USABLE * memory / plan.least_bytes_per_worker) for plan in plans)
    count = workers or max(1, min(cores(), allowed))
    return [plan.with_memory(int(USABLE * memory / count)) for plan in plans], count


def require_memory(plans: Sequence[RunPlan], host: int, device: int | None = None) -> None:
    """Refuse what no worker has the memory for; see `RunPlan.require_memory`.

    Raises
    ------
    Problems
        Of every model.
    """
    problems = []
    for plan in plans:
        try:
            plan.require_memory(host, device)
        except ConfigurationError as error:
            problems.append(error)
    if problems:
        raise Problems(problems)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of_machine() -> int:
    """Bytes of memory that all workers together may use."""
    from distributed.system import MEMORY_LIMIT  # what control groups and limits leave

    return int(MEMORY_LIMIT)


def masks_of(plans: Sequence[RunPlan], configuration: Configuration, filename: str | None = None) -> set[str]:
    """The tomograms (stems) whose masks the model before makes in the same run, for `plan_run`.

    Parameters
    ----------
    plans
        Of the models before; empty if that of the one before could not be made, so that all masks may come.
    configuration, filename
        See `plan_run`.
    """
    if plans:
        return {job.stem for job in plans[-1].jobs}
    return {
        source.name.removesuffix(configuration.file_extension) for source in find_tomograms(configuration, filename)
    }


def find_sources(configuration: Configuration) -> list[Path]:
    """The tomogram files of a configuration.

    Raises
    ------
    Problems
        If there are none, or one that is named is missing.
    """
    problems: list[CryosiamDaskError] = []
    sources = _find_tomograms(configuration, None, problems)
    if problems:
        raise Problems(problems)
    return sources


def find_tomograms(configuration: Configuration, filename: str | None = None) -> list[Path]:
    """The tomograms of a configuration, as far as they are there; see `plan_run` for what is not."""
    return _find_tomograms(configuration, filename, [])


def _find_tomograms(
    configuration: Configuration, filename: str | None, problems: list[CryosiamDaskError]
) -> list[Path]:
    try:
        return _tomograms(configuration, filename, problems)
    except OSError as error:
        if may_pass(error):
            raise
        problems.append(unreadable_folder("data_folder", configuration.data_folder, error))
        return []


def name_in_data_folder(configuration: Configuration, name: str, place: str) -> str:
    """The name in `data_folder` of what a user calls a tomogram: its path from there, or from the current folder.

    Raises
    ------
    ConfigurationError
        If it is the path of something elsewhere.
    """
    folder, path = configuration.data_folder, Path(name)
    if path.name == name:
        return name
    for parent in ((folder / path).parent, path.parent):
        if parent.is_dir() and parent.resolve().is_relative_to(folder.resolve()):
            return str(parent.resolve().relative_to(folder.resolve()) / path.name)
    raise ConfigurationError(
        f"the tomogram must be a file in data_folder, which is {folder}",
        place=place,
        value=name,
        remedy="Name a file there, or change data_folder",
    )


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
    ConfigurationError
        If the folder cannot be looked into.
    """
    try:
        return patiently(partial(_find_predictions, configuration, filename, sizes))
    except OSError as error:
        raise unreadable_folder("prediction_folder", configuration.prediction_folder, error) from None


def _find_predictions(configuration: Configuration, filename: str | None, sizes: bool) -> list[Path]:
    folder, extension = configuration.prediction_folder, configuration.file_extension
    names = (filename,) if filename is not None else configuration.test_files
    if names is None:
        predictions = visible(folder, "_preds.h5") if folder.is_dir() else []
    else:
        place = "--filename" if filename is not None else "key test_files"
        names = tuple(Path(name_in_data_folder(configuration, name, place)).name for name in names)
        predictions = [folder / f"{name.removesuffix(extension)}_preds.h5" for name in names]
    problems: list[CryosiamDaskError] = [
        OutputError(
            not_there(path), place="key prediction_folder", remedy="Run semantic-predict first, or correct the name"
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


def unreadable_folder(key: str, folder: Path, error: OSError) -> ConfigurationError:
    """The error to raise where the kernel did not let a folder be looked into."""
    return ConfigurationError(
        "must be a folder that can be looked into",
        place=f"key {key}",
        value=f"{error.filename or folder}: {error.strerror}",
        remedy=f"Change the permissions of the folder, or {key}",
    )


def _tomograms(configuration: Configuration, filename: str | None, problems: list[CryosiamDaskError]) -> list[Path]:
    folder, extension = configuration.data_folder, configuration.file_extension
    if not folder.is_dir():
        problems.append(_missing("data_folder", folder, "folder"))
        return []
    if filename is not None or configuration.test_files is not None:
        place = "--filename" if filename is not None else "key test_files"
        names = (filename,) if filename is not None else configuration.test_files or ()
        sources = []
        for name in names:
            try:
                name = name_in_data_folder(configuration, name, place)
            except ConfigurationError as error:
                problems.append(error)
                continue
            if not _is_tomogram(folder / name) and _is_tomogram(folder / f"{name}{extension}"):
                name += extension
            if not name.endswith(extension):
                problems.append(
                    ConfigurationError(
                        f"the names of tomograms must end with file_extension, which is {extension}",
                        place=place,
                        value=name,
                        remedy="Change the name or file_extension",
                    )
                )
            elif why := _why_no_tomogram(folder / name):
                near = difflib.get_close_matches(name, [path.name for path in folder.iterdir()], 1, 0.7)
                problems.append(
                    ConfigurationError(
                        f"the tomogram must be a file in data_folder, which is {folder}",
                        place=place,
                        value=f"{name} ({why})",
                        remedy=f"Did you mean {near[0]}?" if near and near[0] != name else "Check the name",
                    )
                )
            else:
                sources.append(folder / name)
        if not names:
            problems.append(
                ConfigurationError("must name at least one tomogram, or be null", place=place, remedy="Set it to null")
            )
        return list(dict.fromkeys(sources))
    sources = sorted(path for path in folder.iterdir() if path.name.endswith(extension) and _is_tomogram(path))
    if folder.resolve() == configuration.prediction_folder.resolve():
        sources = [path for path in sources if not _is_output(path)]
    if not sources:
        found = sorted({"".join(path.suffixes[-1:]) for path in folder.iterdir() if _is_tomogram(path)} - {""})
        others = "; ".join(left_out_tomograms(configuration))
        problems.append(
            ConfigurationError(
                f"there must be at least one file whose name ends with file_extension, which is {extension}",
                place=f"key data_folder, {folder}",
                value=others or (f"files ending with {', '.join(found[:8])}" if found else "no file at all"),
                remedy="Check data_folder and file_extension",
            )
        )
    return sources


def left_out_tomograms(configuration: Configuration) -> list[str]:
    """What `data_folder` holds that could be taken for a tomogram and is none, as a sentence, if there is anything."""
    folder = configuration.data_folder
    with suppress(OSError):
        if configuration.test_files is None and folder.is_dir():
            found = left_out(folder, configuration.file_extension, _why_no_tomogram)
            return [found] if found else []
    return []


def _is_tomogram(path: Path) -> bool:
    return not _why_no_tomogram(path)


def _why_no_tomogram(path: Path) -> str:
    """Why this can be no tomogram, which any file can, and the folder of a zarr; empty if it can. One that lacks its
    metadata fails later, with its name."""
    why = unusable(path)
    try:
        if why or path.is_file():
            return why
        from cryosiam_dask.files.zarr import is_zarr

        return "" if path.is_dir() and (path.suffix == ".zarr" or is_zarr(path)) else "no file"
    except OSError as error:
        return "" if may_pass(error) else str(error.strerror)


def _is_output(path: Path) -> bool:
    """Whether this is one of the files that a run leaves in a folder that may also be that of the tomograms."""
    if path.name.endswith(("_preds.h5", "_components.h5", ".work.zarr")):
        return True
    from cryosiam_dask.stages.export import read_mrc_fingerprint
    from cryosiam_dask.stages.ome_zarr import SEGMENTATION, read_own_attributes

    if path.name.endswith("_labels.mrc"):
        return read_mrc_fingerprint(path) is not None
    return (path / "labels" / SEGMENTATION).is_dir() and bool(read_own_attributes(path))


def _find_masks(
    configuration: Configuration,
    sources: Sequence[Path],
    to_come: Collection[str],
    problems: list[CryosiamDaskError],
) -> list[Path | None]:
    folder = configuration.mask_folder
    if folder is None:
        return [None] * len(sources)
    if not folder.is_dir() and not to_come:
        problems.append(_missing("mask_folder", folder, "folder"))
        return [None] * len(sources)
    masks = [folder / f"{s.name.removesuffix(configuration.file_extension)}_preds.h5" for s in sources]
    missing = [
        _missing_mask(source, mask)
        for source, mask in zip(sources, masks, strict=True)
        if not mask.is_file() and mask.name.removesuffix("_preds.h5") not in to_come
    ]
    if len(missing) == len(sources):  # otherwise those of others fail alone
        problems += missing if len(missing) <= _FEW else [_without_masks(folder, masks[0], len(missing))]
    return list(masks)


_FEW = 3  # of which each is named


def _without_masks(folder: Path, first: Path, count: int) -> MaskError:
    return MaskError(
        f"holds no lamella mask of any of the {count} tomograms, such as {first.name}",
        place=f"key mask_folder, {folder}",
        remedy="Run the lamella prediction first, or correct mask_folder",
    )


def _missing_mask(source: Path, mask: Path) -> MaskError:
    return MaskError(
        f"there must be a lamella mask for {source.name}",
        place="key mask_folder",
        value=f"no file {mask}",
        remedy="Run the lamella prediction first, or leave it out with test_files",
    )


def _not_readable(source: Path, mask: Path | None, error: OSError) -> CryosiamDaskError:
    of_mask = mask is not None and str(error.filename) == str(mask)
    return (MaskError if of_mask else TomogramError)(
        f"the {'lamella mask' if of_mask else 'tomogram'} must be readable",
        place=error.filename or source,
        value=error.strerror or error,
        remedy="Change its permissions, copy it again, or leave it out with test_files",
    )


def _missing(key: str, path: Path, kind: str) -> ConfigurationError:
    rule = f"must be a {kind}, and {path} is none" if path.exists() else not_there(path)
    remedy = f"Run the lamella prediction first, or correct {key}" if key == "mask_folder" else f"Correct {key}"
    return ConfigurationError(rule, place=f"key {key}", remedy=remedy)


def _check_prediction_folder(configuration: Configuration, problems: list[CryosiamDaskError]) -> None:
    for key in ("prediction_folder", "work_folder"):
        path = getattr(configuration, key)
        if path is None:
            continue
        existing = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            what = "read-only" if existing.is_dir() else "a file" if existing.exists() else "a link that leads nowhere"
            problems.append(
                OutputError(
                    "must be a folder that can be written to, or one that can be made",
                    place=f"key {key}",
                    value=f"{path} ({existing} is {what})",
                    remedy=f"Set {key} to another folder, change its permissions, or mount the disk that it is on",
                )
            )


def _check_network(
    configuration: Configuration, checkpoint: Checkpoint, problems: list[CryosiamDaskError], notes: list[str]
) -> tuple[int, ...]:
    """Compare the configuration with the checkpoint; returns the patch that rules."""
    architecture, network = checkpoint.architecture, configuration.parameters.network
    for key, value in (("spatial_dims", architecture.spatial_dims), ("in_channels", architecture.in_channels)):
        if getattr(network, key) != value:
            problems.append(
                ConfigurationError(
                    f"must agree with the checkpoint {configuration.trained_model}, which has {value}",
                    place=f"key parameters.network.{key}",
                    value=getattr(network, key),
                    remedy=f"Set it to {value}, or trained_model to another checkpoint",
                )
            )
    given = configuration.parameters.data.patch_size
    # Only who knows the device can choose: see `cryosiam_dask.commands.segment`.
    patch = checkpoint.patch_size if given in (None, "auto") else tuple(map(int, given))
    divisor = required_divisor(architecture)
    if len(patch) != architecture.spatial_dims or any(p % divisor for p in patch):
        rounded = [max(divisor, p // divisor * divisor) for p in (*patch, *patch[-1:] * 3)][: architecture.spatial_dims]
        problems.append(
            ConfigurationError(
                f"must be {architecture.spatial_dims} multiples of {divisor}, the stride of its coarsest level",
                place="key parameters.data.patch_size",
                value=list(patch),
                remedy=f"Set it to {rounded}",
            )
        )
    halo, needed = configuration.parameters.data.halo, required_halo(architecture)
    if halo is not None and not needed <= halo < min(patch) / 2:
        problems.append(
            ConfigurationError(
                f"must be at least {needed}, which this network needs around a core, and less than half of patch_size "
                f"{list(patch)}",
                place="key parameters.data.halo",
                value=halo,
                remedy=f"Set it to {max(needed, min(patch) // 8)}"
                if 2 * needed < min(patch)
                else f"Set patch_size to {(2 * needed // divisor + 1) * divisor} or more along each axis",
            )
        )
    if configuration.save_internal_files and not architecture.has_distance_head:
        notes.append(f"{configuration.trained_model} has no distance head: probs are saved, distances are not")
    if network.postprocessing and architecture.spatial_dims == 2:
        problems.append(
            ConfigurationError(
                "lamella post-processing needs a model of 3-D tomograms",
                place="key parameters.network.postprocessing",
                value=f"True, and a model of {architecture.spatial_dims}-D images",
                remedy="Set it to False",
            )
        )
    sizes, labels = network.postprocessing_sizes, max(2, architecture.out_channels)
    names = configuration.class_names
    if names is not None and len(names) != labels - 1:
        problems.append(
            ConfigurationError(
                f"must name the model's labels from 1 on, which are {labels - 1}",
                place="key class_names",
                value=f"{len(names)} name{'s' * (len(names) != 1)}, {list(names)}",
                remedy="Leave out the background, label 0" if len(names) == labels else "Correct it, or set it to null",
            )
        )
    if sizes is not None and any(size >= 0 for size in sizes[labels:]):
        problems.append(
            ConfigurationError(
                f"must have one entry for each of the model's {labels} labels, background included",
                place="key parameters.network.postprocessing_sizes",
                value=list(sizes),
                remedy="Remove the entries of labels that do not exist",
            )
        )
    elif sizes is not None and len(sizes) < labels:
        notes.append(
            f"postprocessing_sizes has {len(sizes)} entries for the {labels} labels 0 to {labels - 1}: "
            f"the labels from {len(sizes)} on are left alone"
        )
    return patch


def _output_path(configuration: Configuration, source: Path, stem: str) -> Path:
    from cryosiam_dask.files.mrc import MRC_ENDINGS

    if configuration.save_original_file_extension and not configuration.save_internal_files:
        name = source.name.removesuffix(".gz")
        return configuration.prediction_folder / (name if Path(name).suffix in MRC_ENDINGS else f"{stem}.mrc")
    return configuration.prediction_folder / f"{stem}_preds.h5"


def _settings(
    configuration: Configuration, checkpoint: Checkpoint, patch: tuple[int, ...], threshold: float
) -> dict[str, Any]:
    """What the numbers of an output depend on, besides its input."""
    network, data = configuration.parameters.network, configuration.parameters.data
    return {
        "numbers_version": NUMBERS_VERSION,
        "checkpoint_sha256": checkpoint.sha256,
        "patch_size": list(patch),
        "halo": data.halo,
        "precision": configuration.hyper_parameters.precision,
        "scaling": [data.min, data.max, data.mean, data.std],
        "threshold": threshold,
        "hull": ("volume" if network.hull_3d else "slices") if network.postprocessing else None,
        "save_internal_files": configuration.save_internal_files,
        # Only where they are set, so that outputs of before stay what they are.
        **({"invert": True} if data.invert else {}),
        **{name: value for name, value in configuration.reading.items() if value or value is False},
    }


def removal_sizes(configuration: Configuration) -> list[int]:
    """``postprocessing_sizes`` without trailing entries that do nothing; empty if none does anything."""
    sizes = list(configuration.parameters.network.postprocessing_sizes or ())
    while sizes and sizes[-1] == -1:
        sizes.pop()
    return sizes


def known_identity(configuration: Configuration, source: Path, stem: str) -> list[Any]:
    """What tells a tomogram from another one or a later one: as it was recorded, where its times alone have changed.

    Parameters
    ----------
    configuration
        Whose ``prediction_folder`` holds the record.
    source, stem
        The tomogram and its name.
    """
    from cryosiam_dask.files.identity import is_newer_in_part, source_content, source_identity

    identity = source_identity(source)
    entries, _ = read_entries(configuration.prediction_folder, stem)
    found = next((entry for entry in reversed(entries) if entry["what"] == "source"), None)
    if (
        found
        and found["identity"] != identity
        and not is_newer_in_part(source, found.get("newest", 0))
        and found["content"] == source_content(source)
    ):
        return list(found["identity"])
    return identity


def _fingerprint(
    configuration: Configuration, source: Path, stem: str, mask: Path | None, settings: Mapping[str, Any]
) -> str:
    from cryosiam_dask.files.tomogram import read_header

    files = [known_identity(configuration, source, stem), _mask_identity(mask) if mask else None]
    decided = ""
    if not source.is_dir():
        try:
            decided = read_header(source, **configuration.reading).decided
        except TomogramError as error:  # such a tomogram fails alone, later
            if may_pass(error) and isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
    # Only where there is something, so that outputs of before stay what they are.
    settings = {**settings, **({"decided": decided} if decided else {})}
    return hashlib.sha256(json.dumps([files, settings], sort_keys=True).encode()).hexdigest()


def _made_otherwise(output: Path) -> OutputError:
    if not os.access(output, os.R_OK):
        return OutputError(
            "an output that is there must be readable",
            place=output,
            value=os.strerror(errno.EACCES),
            remedy="Change its permissions, or set another prediction_folder",
        )
    return OutputError(
        "this output was made from another input, checkpoint or other settings",
        place=output,
        remedy="Replace it with --overwrite, or set another prediction_folder",
    )


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _mask_identity(path: Path) -> list[Any]:
    """By its content, which is the same whenever it is made; compressed, it is small."""
    with path.open("rb") as file:
        return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]


def _read_fingerprint(output: Path) -> str | None:
    """The fingerprint of an output; ``None`` for a file of another program or one that cannot be read."""
    from cryosiam_dask.files.hdf5 import read_attributes
    from cryosiam_dask.stages.export import read_mrc_fingerprint

    try:
        if output.suffix == ".h5":
            return read_attributes(output).get("fingerprint")
        return read_mrc_fingerprint(output)
    except OutputError:
        return None


def components_done(path: Path | None, fingerprint: str, names: Sequence[str]) -> bool:
    """Whether a tomogram's components, where they are wanted, are those of its output, with the names that are wanted.

    Parameters
    ----------
    path
        Their HDF5 file, or ``None``.
    fingerprint
        Of the output.
    names
        Of the labels from 1 on.
    """
    from cryosiam_dask.files.hdf5 import read_attributes

    if path is None:
        return True
    tables = [path.with_suffix(ending) for ending in (".csv", ".parquet")]
    if not all(table.is_file() for table in tables) or _read_fingerprint(path) != fingerprint:
        return False
    return named(read_attributes(path).get("class_names"), len(names)) == tuple(names)


def preview_done(configuration: Configuration, job: Job) -> bool:
    """Whether a tomogram's picture, where it is wanted, shows its output; no network runs again for a picture alone."""
    from cryosiam_dask.stages.preview import preview_file, read_fingerprint

    if not configuration.preview or job.output.suffix != ".h5":
        return True
    return read_fingerprint(preview_file(configuration.prediction_folder, job.stem)) == job.fingerprint


def with_sizes(prediction_fingerprint: str, sizes: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([prediction_fingerprint, list(sizes)]).encode()).hexdigest()


def _edge(patch: Sequence[int]) -> str:
    return str(patch[0]) if len(set(patch)) == 1 else str(list(patch))


def _gb(count: float) -> str:
    return f"{count / 1e9:.{0 if count >= 1e10 else 1}f} GB"
