"""What a user can get wrong.

Every error states the rule that was broken, the value that broke it, the place where the value stands, and the remedy::

    configs/config_semantic.yaml, parameters.network.threshold: must lie between 0 and 1; found 10. Set a probability.

The command line prints these texts as they are; nobody should see a traceback for a bad file, key or checkpoint.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

#: What the kernel says while the server of a network disk is away, restarts or is busy; the same call may succeed soon.
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOBUFS", "ENOLINK", "ENOTCONN", "EREMOTEIO", "ESHUTDOWN", "ESTALE",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)  # some systems lack some of them
}  # fmt: skip


def is_transient(error: BaseException | None) -> bool:
    """Whether an error is one of the disk that may be gone a moment later, or was raised because of one."""
    while error is not None:
        if isinstance(error, CryosiamDaskError):
            return error.transient
        if isinstance(error, OSError):
            # HDF5 tells the number in its text alone when it reads or writes.
            told = re.search(r"\berrno = (\d+)", str(error)) if error.errno is None else None
            if (int(told[1]) if told else error.errno) in _TRANSIENT:
                return True
        error = error.__cause__ or error.__context__
    return False


class CryosiamDaskError(Exception):
    """A rule that a user's input broke.

    Parameters
    ----------
    rule
        What must hold, as a sentence without its full stop.
    place
        Where the value stands: a file, a key of the configuration, a command-line option.
    value
        The offending value; left out of the message when ``None``.
    remedy
        What to do about it, as a sentence without its full stop.

    Attributes
    ----------
    transient
        Whether it was made while an error was handled that may pass (see `is_transient`).
    """

    def __init__(self, rule: str, *, place: object = "", value: object = None, remedy: str = "") -> None:
        super().__init__(rule, place, value, remedy)
        self.rule, self.place, self.value, self.remedy = rule, str(place), value, remedy
        self.transient = is_transient(sys.exception())

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        value = f"; found {self.value}" if self.value is not None else ""
        remedy = f". {self.remedy}" if self.remedy else ""
        text = f"{place}{self.rule}{value}{remedy}"
        return text if text.endswith("?") else f"{text}."

    def __reduce__(self) -> tuple[Callable[..., CryosiamDaskError], tuple[Any, ...]]:
        # Errors travel from the workers to the client: keyword-only arguments need this.
        return _rebuild, (type(self), self.rule, self.place, self.value, self.remedy, self.transient)


def _rebuild(
    cls: type[CryosiamDaskError], rule: str, place: str, value: object, remedy: str, transient: bool
) -> CryosiamDaskError:
    error = cls(rule, place=place, value=value, remedy=remedy)
    error.transient = transient
    return error


class ConfigurationError(CryosiamDaskError):
    """A key, value or path of the configuration cannot be used."""


class CheckpointError(CryosiamDaskError):
    """A checkpoint is unsafe, foreign, incomplete or does not fit its own description."""


class TomogramError(CryosiamDaskError):
    """An input file is not a readable tomogram."""


class MaskError(CryosiamDaskError):
    """A lamella mask is missing, unreadable or holds values other than 0 and 1."""


class LabelsError(CryosiamDaskError):
    """A label volume cannot be labelled, filtered or post-processed as asked."""


class OutputError(CryosiamDaskError):
    """An output cannot be written, or would replace something made otherwise."""


class DiskError(OutputError):
    """A disk is full, read-only or not permitted: whatever else goes there will fail as well."""


class StorageError(CryosiamDaskError):
    """A disk failed several times in a row."""


#: What the kernel calls that.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def not_written(error: OSError, rule: str, *, place: object, remedy: str) -> OutputError:
    """The error to raise where the kernel refused to write.

    Parameters
    ----------
    error
        What it said.
    rule, place, remedy
        See `CryosiamDaskError`.
    """
    kind = DiskError if error.errno in _OF_THE_DISK else OutputError
    return kind(rule, place=place, value=error.strerror or error, remedy=remedy)


def not_there(path: Path) -> str:
    """The rule that a path of a configuration breaks where nothing is there."""
    return f"does not exist: {path}" + ("" if path.is_absolute() else f" (seen from {Path.cwd()})")


def why_unreadable(error: OSError, rule: str) -> tuple[str, str | None]:
    """Rule and value of the error to raise where a file could not be opened that must be there, as `rule` says."""
    return ("does not exist", None) if isinstance(error, FileNotFoundError) else (rule, error.strerror or str(error))


class DeviceError(CryosiamDaskError):
    """The device that was asked for cannot be used."""


class LostDeviceError(DeviceError):
    """A device failed so that its process can use it no more; another process may try again."""


class ClusterError(CryosiamDaskError):
    """The Dask cluster cannot be reached, does not fit, or is gone.

    Attributes
    ----------
    temporary
        Whether it was there, so that the same command goes on once it is there again.
    """

    temporary = False


class LostClusterError(ClusterError):
    """The Dask cluster was there and is gone."""

    temporary = True


class Problems(CryosiamDaskError):
    """Several errors at once, so that a user mends all of them before the next run.

    Parameters
    ----------
    problems
        The single errors, in the order in which they are shown.
    outcomes
        What becomes of the tomograms, where each has an error of its own.
    """

    def __init__(self, problems: Iterable[CryosiamDaskError], outcomes: Iterable[Any] = ()) -> None:
        self.problems, self.outcomes = tuple(problems), tuple(outcomes)
        super().__init__(f"{len(self.problems)} problems")
        self.transient = any(problem.transient for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple[Callable[..., CryosiamDaskError], tuple[Any, ...]]:
        return type(self), (self.problems, self.outcomes)
