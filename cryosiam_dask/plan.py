"""Before a run: everything that it needs is looked at, and all that stands in its way is reported at once.

Nothing is written. A tomogram whose output was made from the same input, checkpoint and settings is skipped; a
fingerprint in the output tells. One made otherwise stands in the way until the user allows it to be replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mrcfile

from cryosiam_dask.checkpoint import Checkpoint, read_checkpoint
from cryosiam_dask.config import Configuration
from cryosiam_dask.errors import (
    CheckpointError,
    ConfigurationError,
    CryosiamDaskError,
    MaskError,
    OutputError,
    Problems,
)
from cryosiam_dask.grid import make_grid
from cryosiam_dask.labels_to_hdf5 import read_attributes
from cryosiam_dask.network import peak_bytes, required_divisor, required_halo
from cryosiam_dask.predictor import PredictorSpec, default_threshold
from cryosiam_dask.preview import preview_file, read_fingerprint

#: Raised whenever a change of the code changes a result, so that outputs of before are not taken for done.
NUMBERS_VERSION = 2

MRC_LABEL = "cryosiam_dask "  # before the fingerprint, in the only place of an MRC header that takes text
_PROCESS_BYTES = 700 * 2**20  # Python with its libraries, one process


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
        Hash of everything that the output depends on.
    """

    source: Path
    stem: str
    output: Path
    mask: Path | None
    components: Path | None
    prediction_fingerprint: str
    fingerprint: str


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
        Tomograms whose output was made so, but not their components or their picture.
    skipped
        Tomograms all of whose outputs were made from the same input, checkpoint and settings.
    notes
        What a user should know before the run.
    """

    configuration: Configuration
    checkpoint: Checkpoint
    patch: tuple[int, ...]
    threshold: float
    jobs: tuple[Job, ...]
    unmeasured: tuple[Job, ...]
    skipped: tuple[Job, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> int:
        """Number of labels that the model can give, background included."""
        return max(2, self.checkpoint.architecture.out_channels)

    @property
    def wanted(self) -> tuple[str, ...]:
        """What the network is asked for: keys of `cryosiam_dask.zarr_to_labels.OUTPUTS`."""
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
        endless = make_grid((2**30,) * len(self.patch), self.patch, self.configuration.block_size, self.halo)
        classes = self.checkpoint.architecture.out_channels
        per_voxel = sum(1 if name == "labels" else 4 * classes for name in self.wanted)
        window = math.prod(endless.largest_window) * 4
        return 2 * (window + math.prod(endless.largest_block) * per_voxel)

    @property
    def bytes_per_worker(self) -> int:
        """Memory that a CPU worker needs, estimated from patch, block and network, in bytes."""
        return _PROCESS_BYTES + self.block_bytes + self.network_bytes

    def spec(self, device: Literal["cpu", "cuda"]) -> PredictorSpec:
        """How a worker is to run the network on `device`."""
        data = self.configuration.parameters.data
        return PredictorSpec(
            checkpoint=str(self.configuration.trained_model),
            sha256=self.checkpoint.sha256,
            device=device,
            patch=self.patch,
            classes=self.checkpoint.architecture.out_channels,
            batch_size=self.configuration.hyper_parameters.batch_size,
            minimum=data.min,
            maximum=data.max,
            mean=data.mean,
            std=data.std,
            threshold=self.threshold,
            halo=self.halo,
            precision=self.configuration.hyper_parameters.precision,
        )


def plan_run(configuration: Configuration, *, filename: str | None = None, overwrite: bool = False) -> RunPlan:
    """Look at everything that a run needs, without writing anything.

    Parameters
    ----------
    configuration
        The YAML file.
    filename
        Name of a single tomogram in the data folder; rules over ``test_files``.
    overwrite
        Whether outputs made from other inputs or settings may be replaced.

    Raises
    ------
    Problems
        Everything that stands in the way, at once.
    ConfigurationError
        If a folder cannot even be looked into.
    """
    try:
        return _plan_run(configuration, filename, overwrite)
    except OSError as error:
        raise ConfigurationError(
            "what a configuration names must be readable",
            place=error.filename or "the configuration",
            value=error.strerror,
            remedy="Change the permissions, or the key that names it",
        ) from None


def _plan_run(configuration: Configuration, filename: str | None, overwrite: bool) -> RunPlan:
    problems: list[CryosiamDaskError] = []
    sources = _find_tomograms(configuration, filename, problems)
    masks = _find_masks(configuration, sources, problems)
    _check_prediction_folder(configuration, problems)
    notes = [f"the key {key} has no effect here" for key in configuration.unused]
    checkpoint: Checkpoint | None = None
    patch: tuple[int, ...] = ()
    threshold = 0.0
    try:
        checkpoint = read_checkpoint(configuration.trained_model)
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
        prediction = _fingerprint(source, mask, settings)
        fingerprint = with_sizes(prediction, removal_sizes(configuration))
        components = configuration.prediction_folder / f"{stem}_components.h5" if configuration.components else None
        job = Job(source, stem, output, mask, components, prediction, fingerprint)
        if output.resolve() in {path.resolve() for path in (source, mask) if path}:
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
        elif not output.exists() or overwrite:
            jobs.append(job)
        elif _read_fingerprint(output) == job.fingerprint:
            if _components_done(job) and _preview_done(configuration, job):
                skipped.append(job)
            elif output.suffix == ".h5":
                unmeasured.append(job)
            else:
                jobs.append(job)
        else:
            problems.append(
                OutputError(
                    "this output was made from another input, checkpoint or other settings",
                    place=output,
                    remedy="Replace it with --overwrite, or set another prediction_folder",
                )
            )
        outputs[output] = source
    if problems:
        raise Problems(problems)
    return RunPlan(
        configuration, checkpoint, patch, threshold, tuple(jobs), tuple(unmeasured), tuple(skipped), tuple(notes)
    )


def _find_tomograms(
    configuration: Configuration, filename: str | None, problems: list[CryosiamDaskError]
) -> list[Path]:
    folder, extension = configuration.data_folder, configuration.file_extension
    if not folder.is_dir():
        problems.append(_missing("data_folder", folder, "folder"))
        return []
    if filename is not None or configuration.test_files is not None:
        place = "--filename" if filename is not None else "key test_files"
        names = (filename,) if filename is not None else configuration.test_files or ()
        sources = []
        for name in names:
            if not (folder / name).is_file() and (folder / f"{name}{extension}").is_file():
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
            elif not (folder / name).is_file():
                problems.append(
                    ConfigurationError(
                        f"the tomogram must be a file in data_folder, which is {folder}",
                        place=place,
                        value=name,
                        remedy="Check the name",
                    )
                )
            else:
                sources.append(folder / name)
        if not names:
            problems.append(
                ConfigurationError("must name at least one tomogram, or be null", place=place, remedy="Set it to null")
            )
        return list(dict.fromkeys(sources))
    sources = sorted(path for path in folder.iterdir() if path.name.endswith(extension) and path.is_file())
    if not sources:
        found = sorted({"".join(path.suffixes[-1:]) for path in folder.iterdir() if path.is_file()} - {""})
        problems.append(
            ConfigurationError(
                f"there must be at least one file whose name ends with file_extension, which is {extension}",
                place=f"key data_folder, {folder}",
                value=f"files ending with {', '.join(found[:8])}" if found else "no file at all",
                remedy="Check data_folder and file_extension",
            )
        )
    return sources


def _find_masks(
    configuration: Configuration, sources: Sequence[Path], problems: list[CryosiamDaskError]
) -> list[Path | None]:
    folder = configuration.mask_folder
    if folder is None:
        return [None] * len(sources)
    if not folder.is_dir():
        problems.append(_missing("mask_folder", folder, "folder"))
        return [None] * len(sources)
    masks = [folder / f"{s.name.removesuffix(configuration.file_extension)}_preds.h5" for s in sources]
    for source, mask in zip(sources, masks, strict=True):
        if not mask.is_file():
            problems.append(
                MaskError(
                    f"there must be a lamella mask for {source.name}",
                    place="key mask_folder",
                    value=f"no file {mask}",
                    remedy="Run the lamella prediction for it, or leave it out with test_files",
                )
            )
    return list(masks)


def _missing(key: str, path: Path, kind: str) -> ConfigurationError:
    beside = f" (relative to {Path.cwd()})" if not path.is_absolute() else ""
    return ConfigurationError(
        f"there must be a {kind} of this name", place=f"key {key}", value=f"no {kind} {path}{beside}",
        remedy=f"Correct {key}",
    )  # fmt: skip


def _check_prediction_folder(configuration: Configuration, problems: list[CryosiamDaskError]) -> None:
    for key in ("prediction_folder", "work_folder"):
        path = getattr(configuration, key)
        if path is None:
            continue
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            problems.append(
                OutputError(
                    "must be a folder that can be written to, or one that can be made",
                    place=f"key {key}",
                    value=f"{path} ({existing} is {'read-only' if existing.is_dir() else 'a file'})",
                    remedy=f"Set {key} to another folder or change its permissions",
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
    # Only who knows the device can choose: see `cryosiam_dask.runner`.
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
    if configuration.save_original_file_extension and not configuration.save_internal_files:
        return configuration.prediction_folder / source.name.removesuffix(".gz")
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
    }


def removal_sizes(configuration: Configuration) -> list[int]:
    """``postprocessing_sizes`` without trailing entries that do nothing; empty if none does anything."""
    sizes = list(configuration.parameters.network.postprocessing_sizes or ())
    while sizes and sizes[-1] == -1:
        sizes.pop()
    return sizes


def _fingerprint(source: Path, mask: Path | None, settings: Mapping[str, Any]) -> str:
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in (source, mask) if path]
    return hashlib.sha256(json.dumps([files, settings], sort_keys=True).encode()).hexdigest()


def _read_fingerprint(output: Path) -> str | None:
    """The fingerprint of an output; ``None`` for a file of another program or one that cannot be read."""
    try:
        if output.suffix == ".h5":
            return read_attributes(output).get("fingerprint")
        with mrcfile.open(output, header_only=True) as mrc:
            label = bytes(mrc.header.label[0]).decode("ascii", "replace")
            return label.removeprefix(MRC_LABEL).strip() if label.startswith(MRC_LABEL) else None
    except (OutputError, OSError, ValueError):
        return None


def _components_done(job: Job) -> bool:
    """Whether a tomogram's components, where they are wanted, are those of its output."""
    if job.components is None:
        return True
    tables = [job.components.with_suffix(ending) for ending in (".csv", ".parquet")]
    return all(path.is_file() for path in tables) and _read_fingerprint(job.components) == job.fingerprint


def _preview_done(configuration: Configuration, job: Job) -> bool:
    """Whether a tomogram's picture, where it is wanted, shows its output; no network runs again for a picture alone."""
    if not configuration.preview or job.output.suffix != ".h5":
        return True
    return read_fingerprint(preview_file(configuration.prediction_folder, job.stem)) == job.fingerprint


def with_sizes(prediction_fingerprint: str, sizes: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([prediction_fingerprint, list(sizes)]).encode()).hexdigest()
