"""The outcome of a tomogram: done, skipped, failed or left, with its numbers, warnings and errors."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryosiam_dask.core.executor import Executor, Interrupted, all_workers
from cryosiam_dask.core.log import LOG, SHOWN
from cryosiam_dask.errors import ClusterError, CryosiamDaskError, DeviceError, DiskError, StorageError, not_written
from cryosiam_dask.model.classes import counted, names_in, shares
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.plan import Job, RunPlan
from cryosiam_dask.stages.lamella import Thickness, stored_thickness, thickness_words


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one tomogram.

    Attributes
    ----------
    stem
        Name of the tomogram.
    status
        ``"done"``, ``"skipped"``, ``"failed"``, or ``"left"`` if the run stopped earlier.
    shape
        (z, y, x) in voxels; empty if the file could not be read.
    seconds
        Duration in seconds.
    voxels
        Number of voxels of each label.
    warnings
        Warnings about the tomogram and its result.
    error
        Why it failed.
    details
        Traceback of an unexpected error.
    kind
        Name of the error's class.
    stage
        Name of the model if there are several, otherwise empty.
    notes
        Decisions about the file.
    class_names
        Names of the labels from 1 on.
    lamella_voxels
        Number of voxels inside the lamella mask; ``None`` if there was none.
    thickness
        Thickness of a lamella along z: ``mean``, ``lowest`` and ``highest`` over all columns (y, x) that contain it,
        and their ``unit``, nm or voxels. Empty for other labels.
    components
        Number of components by class name, if they were numbered.
    particles
        Number of particles by class name, if lists of them were written.
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
        """Describe what was found: a line for each class, and one each for thickness, components and particles.

        If `brief`, the lines give only the share of each class (of the lamella, if there is a mask), without voxels.
        """
        lines = shares(self.voxels, self.class_names, self.shape, self.lamella_voxels, brief=brief)
        if self.thickness:
            lines.append(thickness_words(self.thickness))
        for what, counts in (("components", self.components), ("particles", self.particles)):
            if counts:
                lines.append(f"{what}: {', '.join(counted(name, f'{n:,}') for name, n in counts.items())}")
        return lines


def record(
    plan: RunPlan, outcome: Outcome, began: float, device: str, executor: Executor, *, resumable: bool = False
) -> Outcome:
    """Write the outcome of a tomogram to its ledger, with what its pace depends on, if the disk allows it.

    The outcome replaces all earlier entries, unless a repeated command resumes from them (`resumable`).
    """
    values = {name: value for name, value in asdict(outcome).items() if name not in ("stem", "details")}
    values |= {"run": plan.run, "began": began, "ended": time.time()}
    values |= {"model": plan.model, "device": device, "workers": all_workers(executor)}
    with suppress(OSError):
        ledger = Ledger(plan.configuration.prediction_folder, outcome.stem)
        if resumable or (outcome.status == "failed" and has_blocks(ledger)):
            ledger.append("outcome", **values)
        else:
            ledger.close(**values)
    return outcome


def failed(plan: RunPlan, job: Job, began: float, error: BaseException) -> Outcome:
    """Return the outcome of a job that ended with an unhandled error."""
    return failure_of(job.stem, (), began, error, job.output, plan.name)


def failure_of(
    stem: str, shape: tuple[int, ...], began: float, error: BaseException, path: Path, stage: str = ""
) -> Outcome:
    """Return the outcome of a tomogram that failed with `error` while the output `path` was made."""
    raised, details = error, ""
    if isinstance(error, OSError):
        refused = not_written(
            error,
            "work and output folder must be writable and have free space",
            place=error.filename or path.parent,
            remedy="Free space, change the permissions, or set work_folder or prediction_folder to another disk",
        )
        if isinstance(refused, DiskError) or error.errno == errno.EFBIG:  # too large a file concerns one tomogram
            error = refused
    kind = type(error).__name__
    if isinstance(error, CryosiamDaskError):
        message = str(error)
    else:
        message = f"{path}: unexpected {type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))
    # The log has the traceback of every error; the terminal shows none.
    LOG.error("%s: %s", stem, message, exc_info=raised)
    return Outcome(stem, "failed", shape, time.time() - began, error=message, details=details, kind=kind, stage=stage)


def log_warnings(outcome: Outcome) -> Outcome:
    for warning in outcome.warnings:
        LOG.warning("%s: %s", outcome.stem, warning, extra=SHOWN)
    return outcome


def as_numbers(voxels: Sequence[int], inside: int | None, thickness: Thickness | None) -> dict[str, Any]:
    """Return attributes of a prediction: voxels of each label and inside the mask, and the thickness of a lamella."""
    thick = None if thickness is None else (thickness.mean, thickness.lowest, thickness.highest)
    return {"voxels": voxels, "lamella_voxels": inside, "thickness_voxels": thick}


def outcome_of(
    stem: str,
    attributes: Mapping[str, Any],
    shape: Sequence[int],
    voxels: Sequence[int] = (),
    warnings: Sequence[str] = (),
    components: Mapping[str, int] | None = None,
) -> Outcome:
    """Return the outcome of a tomogram whose prediction has these attributes."""
    inside = attributes.get("lamella_voxels")
    return Outcome(
        stem,
        "done",
        tuple(shape),
        voxels=tuple(voxels),
        warnings=tuple(warnings),
        class_names=names_in(attributes),
        lamella_voxels=inside if isinstance(inside, int) else None,
        thickness=stored_thickness(attributes) if voxels else {},
        components=components or {},
    )


#: Prefix of messages about decisions on a file.
NOTE = "note: "
#: Errors that end a run; the same command then resumes.
ENDING = (Interrupted, ClusterError, DeviceError)
#: Errors after which a tomogram's work store is always kept.
RESUMABLE = (*ENDING, StorageError)


def has_blocks(ledger: Ledger) -> bool:
    return bool(ledger.since("block", "blocks"))
