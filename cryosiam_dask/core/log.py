"""A log file for every run, beside its outputs, for users and the people who help them.

``<prediction_folder>/logs/<time>_<command>_<process>.log`` holds versions, settings, devices, every tomogram, every
warning (also those of libraries, here and in the workers) and every error with its traceback, which the terminal does
not show. Every run starts a new file.

* Each line is written immediately, so the log of a killed run holds everything up to its end.
* A file stops growing at `LARGEST` bytes; the last `RESERVED` bytes are kept for warnings and errors.
* A run does not fail if its log cannot be written.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from rich.console import Console

from cryosiam_dask.errors import CryosiamDaskError

FOLDER = "logs"
LARGEST, RESERVED = 16 * 2**20, 2 * 2**20  # bytes of a file, and how many of these only warnings and errors may use
_LONGEST = 2**16  # characters of an entry

LOG = logging.getLogger("cryosiam_dask")
LOG.addHandler(logging.NullHandler())  # a library prints nothing by itself
#: Marks records that the terminal has shown already, so that ``--verbose`` does not repeat them.
SHOWN = {"shown": True}
#: What is logged: our own records, and Python's warnings.
_LOGGERS = (LOG, logging.getLogger("py.warnings"))
# File names may contain control characters that a terminal would obey.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\n"}

P = ParamSpec("P")
R = TypeVar("R")


class LogFile(logging.Handler):
    """Writes records to a new file of limited size.

    Parameters
    ----------
    path
        A file that does not exist.
    largest, reserved
        See `LARGEST` and `RESERVED`.

    Raises
    ------
    OSError
        If the file exists or cannot be created.
    """

    def __init__(self, path: Path, largest: int = LARGEST, reserved: int = RESERVED) -> None:
        super().__init__()
        self.path, self._left, self._reserved, self._full = path, largest, reserved, False
        self._file = path.open("xb", buffering=0)
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        with suppress(Exception):  # the tomograms report a full disk
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
            reserved = 0 if record.levelno >= logging.WARNING else self._reserved
            if len(line) <= self._left - reserved:
                self._left -= self._file.write(line)
            elif not self._full:
                self._full = True
                self._file.write(b"this log is full: only warnings and errors follow, until the file ends\n")

    def close(self) -> None:
        """See `logging.Handler`."""
        self._file.close()
        super().close()


class _Formatter(logging.Formatter):
    """Indents all lines of an entry but the first."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).translate(_CONTROLS).rstrip("\n")
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        return text.replace("\n", "\n    ")


def begin_logs(folders: Iterable[Path], command: str) -> list[Path]:
    """Start a log file in each folder; it is closed when the calling `logged` function ends.

    Parameters
    ----------
    folders
        Existing prediction folders. Files that cannot be created are skipped.
    command
        The running command, which becomes part of the file names.

    Returns
    -------
    list of Path
        The files.
    """
    paths = []
    name = f"{time.strftime('%Y%m%dT%H%M%S')}_{command}_{socket.gethostname()}_{os.getpid()}"
    for folder in dict.fromkeys(folders):
        for again in ("", *(f"_{number}" for number in range(2, 100))):
            try:
                (folder / FOLDER).mkdir(exist_ok=True)
                handler = LogFile(folder / FOLDER / f"{name}{again}.log")
            except FileExistsError:
                continue
            except OSError:
                break
            for logger in _LOGGERS:
                logger.addHandler(handler)
            paths.append(handler.path)
            break
    if paths:
        LOG.setLevel(logging.DEBUG)
        logging.captureWarnings(True)
    return paths


def logged(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that the logs it starts are closed when it returns or fails."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ending():
            return function(*args, **kwargs)

    return call


@contextmanager
def own_handlers() -> Iterator[None]:
    """Close the logs that are started in the ``with`` block when it ends, and no others."""
    before, level = list(LOG.handlers), LOG.level
    try:
        yield
    finally:
        for handler in [handler for handler in LOG.handlers if handler not in before]:
            for logger in _LOGGERS:
                logger.removeHandler(handler)
            handler.close()
            logging.captureWarnings(False)
        LOG.setLevel(level)


@contextmanager
def _ending() -> Iterator[None]:
    before = list(LOG.handlers)
    with own_handlers():
        try:
            yield
        except BaseException as error:
            foreseen = isinstance(error, CryosiamDaskError | KeyboardInterrupt)
            LOG.error("ended by %s", str(error) or type(error).__name__, exc_info=error, extra=SHOWN)
            paths = [handler.path for handler in LOG.handlers if isinstance(handler, LogFile) and handler not in before]
            if paths and not foreseen:
                error.add_note(f"{_NOTE}{paths[-1]}")
            raise


_NOTE = "the traceback is in "


def traceback_file(error: BaseException) -> str | None:
    """Return the log that holds the traceback of an unexpected error, if there is one."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)]
    return notes[-1].removeprefix(_NOTE) if notes else None


def latest_log(folder: Path) -> Path | None:
    """Return the log of the latest run on a prediction folder, if there is one."""
    return max((folder / FOLDER).glob("*.log"), key=lambda path: (path.name.split("_")[0], path.name), default=None)


def print_log(console: Console) -> None:
    """Also print what otherwise is only logged (versions, tracebacks), until the current `own_handlers` ends."""
    handler = logging.Handler()
    handler.setFormatter(_Formatter("%(message)s"))

    def emit(record: logging.LogRecord) -> None:
        if not getattr(record, "shown", False):
            console.print(handler.format(record), markup=False, highlight=False, soft_wrap=True)

    handler.emit = emit  # type: ignore[method-assign]
    for logger in _LOGGERS:
        logger.addHandler(handler)
