"""Errors that a user can cause and fix.

Every error names the rule, the place, the value that breaks the rule, and the remedy::

    configs/config_semantic.yaml, parameters.network.threshold: must lie between 0 and 1; found 10. Set a probability.

The command line prints this text and no traceback.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Errors of the operating system while a file server is unreachable, restarting or busy; a retry may succeed.
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
    """Whether an error is, or was caused by, a disk error that may go away by itself."""
    while error is not None:
        if isinstance(error, CryosiamDaskError):
            return error.transient
        if isinstance(error, OSError):
            # HDF5 gives the error number only in the text of its error.
            number = re.search(r"\berrno = (\d+)", str(error)) if error.errno is None else None
            if (int(number[1]) if number else error.errno) in _TRANSIENT:
                return True
        error = error.__cause__ or error.__context__
    return False


class CryosiamDaskError(Exception):
    """An input, a setting or a resource breaks a rule.

    Parameters
    ----------
    rule
        What must hold, as a sentence without its full stop.
    place
        A file, a key of the configuration or a command-line option.
    value
        The value that breaks the rule; ``None`` leaves it out of the message.
    remedy
        What to do, as a sentence without its full stop.

    Attributes
    ----------
    transient
        Whether a retry may succeed: the error was raised while a transient disk error was handled (see
        `is_transient`), or because a GPU ran out of memory.
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
        # Workers send errors to the client, and exceptions are pickled without their keyword-only arguments.
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
    """A checkpoint is unsafe, foreign or incomplete, or does not match its own description."""


class TomogramError(CryosiamDaskError):
    """An input file is not a readable tomogram."""


class MaskError(CryosiamDaskError):
    """A lamella mask is missing, unreadable or holds values other than 0 and 1."""


class LabelsError(CryosiamDaskError):
    """Labels cannot be filtered, measured or split into components as requested."""


class OutputError(CryosiamDaskError):
    """An output cannot be written, or would replace one that was made with other settings."""


class DiskError(OutputError):
    """A disk is full, read-only or without permission, so every other output on it will fail too."""


class StorageError(CryosiamDaskError):
    """A disk still fails after all retries."""


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def not_written(error: OSError, rule: str, *, place: object, remedy: str) -> OutputError:
    """Return the error to raise if the operating system refused to write.

    Parameters
    ----------
    error
        The error of the operating system.
    rule, place, remedy
        See `CryosiamDaskError`.
    """
    kind = DiskError if error.errno in _DISK_ERRORS else OutputError
    return kind(rule, place=place, value=error.strerror or error, remedy=remedy)


@contextmanager
def writing(rule: str, *, place: object, remedy: str) -> Iterator[None]:
    """Raise `not_written` if the operating system refuses to write in the ``with`` block."""
    try:
        yield
    except OSError as error:
        raise not_written(error, rule, place=place, remedy=remedy) from error


def not_ours(path: Path, what: str = "an output") -> OutputError:
    """Return the error to raise if `what` would replace a file that this program did not make."""
    return OutputError(
        f"{what} must not replace a file that this program did not make", place=path, remedy="Move it away"
    )


def not_there(path: Path) -> str:
    """Return the rule for a path in a configuration that does not exist."""
    return f"does not exist: {path}" + ("" if path.is_absolute() else f" (relative to {Path.cwd()})")


def why_unreadable(error: OSError, rule: str) -> tuple[str, str | None]:
    """Return rule and value of the error to raise if a required file could not be opened."""
    return ("does not exist", None) if isinstance(error, FileNotFoundError) else (rule, error.strerror or str(error))


class DeviceError(CryosiamDaskError):
    """The requested device cannot be used."""


class LostDeviceError(DeviceError):
    """This process can no longer use its device, but another process may."""


def may_be_done_elsewhere(error: object) -> bool:
    """Whether an object is the error of a device that is broken or lacks memory, so that another one may succeed."""
    return isinstance(error, LostDeviceError) or (isinstance(error, DeviceError) and error.transient)


class ClusterError(CryosiamDaskError):
    """The Dask cluster cannot be reached, is not suitable, or was lost.

    Attributes
    ----------
    temporary
        Whether the cluster was lost during the run, so that the same command can resume when it is back.
    """

    temporary = False


class LostClusterError(ClusterError):
    """The connection to the Dask cluster was lost during the run."""

    temporary = True


class Problems(CryosiamDaskError):
    """Several errors, reported together so that a user can correct all of them before the next run.

    Parameters
    ----------
    problems
        The errors, in the order in which they are shown.
    outcomes
        Outcomes of the tomograms, if each has an error of its own.
    """

    def __init__(self, problems: Iterable[CryosiamDaskError], outcomes: Iterable[Any] = ()) -> None:
        self.problems, self.outcomes = tuple(problems), tuple(outcomes)
        super().__init__(f"{len(self.problems)} problems")
        self.transient = any(problem.transient for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple[Callable[..., CryosiamDaskError], tuple[Any, ...]]:
        return type(self), (self.problems, self.outcomes)
