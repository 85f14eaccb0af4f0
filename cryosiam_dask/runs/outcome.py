"""What became of a tomogram."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryosiam_dask.core.executor import (
    Executor,
    Interrupted,
    all_workers,
)
from cryosiam_dask.core.log import LOG, SHOWN
from cryosiam_dask.errors import (
    ClusterError,
    CryosiamDaskError,
    DeviceError,
    DiskError,
    StorageError,
    not_written,
)
from cryosiam_dask.model.classes import counted, shares
from cryosiam_dask.runs.find import find_predictions as find_predictions
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.plan import Job, RunPlan
from cryosiam_dask.stages.lamella import (
    Thickness,
    stored_thickness,
    thickness_words,
)


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
        Warnings.
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
        if goes_on or (outcome.status == "failed" and has_blocks(ledger)):
            ledger.append("outcome", **values)
        else:
            ledger.close(**values)
    return outcome


def failed(plan: RunPlan, job: Job, began: float, error: BaseException) -> Outcome:
    """The outcome of a job that ended with an error which nothing else has handled."""
    return failure_of(job.stem, (), began, error, job.output, plan.name)


def failure_of(
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


def log_warnings(outcome: Outcome) -> Outcome:
    for warning in outcome.warnings:
        LOG.warning("%s: %s", outcome.stem, warning, extra=SHOWN)
    return outcome


def as_numbers(voxels: Sequence[int], inside: int | None, thickness: Thickness | None) -> dict[str, Any]:
    """Attributes of a prediction: the voxels of each label, those of its lamella, and how thick a lamella is."""
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
    """What became of a tomogram whose prediction has these attributes."""
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


def names_in(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that the attributes of a prediction tell."""
    names = attributes.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


#: How what was decided about a file begins, where it is said.
NOTE = "note: "
#: Errors of no tomogram, after which the same command goes on.
ENDING = (Interrupted, ClusterError, DeviceError)
#: Errors after which a tomogram's intermediate arrays are kept whatever is in them.
RESUMABLE = (*ENDING, StorageError)


def has_blocks(ledger: Ledger) -> bool:
    return bool(ledger.since("block", "blocks"))
