"""Print messages and tables of outcomes, and start the logs."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.diagnosis import merged_warnings
from cryosiam_dask.core.log import LOG, SHOWN, begin_logs
from cryosiam_dask.core.machine import cores, memory_of_machine
from cryosiam_dask.model.classes import are_images
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.workers import versions


def inform(console: Console, message: str) -> None:
    """Print a line without markup or wrapping, and log it."""
    LOG.info("%s", message, extra=SHOWN)
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, message: str) -> None:
    """Print a warning, even on a quiet console, and log it."""
    LOG.warning("%s", message, extra=SHOWN)
    print_always(console, f"warning: {message}")


def print_always(console: Console, message: str) -> None:
    """Print a line without markup or wrapping, even on a quiet console."""
    quiet, console.quiet = console.quiet, False
    console.print(message, markup=False, highlight=False, soft_wrap=True)
    console.quiet = quiet


#: Packages whose versions are logged too, because results, speed or files depend on them.
_PACKAGES = (
    "connected-components-3d", "cucim-cu12", "cucim-cu13", "cupy-cuda12x", "cupy-cuda13x", "dask-cuda", "h5py",
    "mrcfile", "numcodecs", "pillow", "scikit-image", "scipy",
)  # fmt: skip


def open_logs(command: str, configurations: Sequence[Configuration], console: Console) -> None:
    """Start the log files of a run, and log the command, versions, machine and settings."""
    paths = begin_logs([configuration.prediction_folder for configuration in configurations], command)
    found = versions()
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    LOG.debug("command: %s", shlex.join(sys.argv))
    LOG.debug("in %s on %s, process %d", Path.cwd(), socket.gethostname(), os.getpid())
    LOG.debug("versions: %s", ", ".join(f"{name} {number}" for name, number in found.items()))
    LOG.debug("machine: %s, %d cores, %.1f GB for the workers", platform.platform(), cores(), memory_of_machine() / 1e9)
    for configuration in configurations:
        LOG.debug("settings of %s: %s", configuration.place, configuration.model_dump_json(by_alias=True, indent=1))
    for path in paths:
        inform(console, f"log: {path}")
    if len(paths) < len(configurations):
        warn(console, "no log file could be created beside the outputs")


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


_FULL_WIDTH = 125  # terminal columns that a full table needs


def print_table(console: Console, outcomes: Sequence[Outcome], shown: Collection[tuple[str, str]] = ()) -> None:
    """Print the outcome of every tomogram, then the warnings that were not `shown` before the run."""
    several = any(outcome.stage for outcome in outcomes)
    wide = console if console.is_terminal else Console(emoji=False, file=console.file, width=160, quiet=console.quiet)
    brief = wide.width < _FULL_WIDTH
    axes = "y, x" if are_images(outcome.shape for outcome in outcomes) else "z, y, x"
    model, shape = ("model",) if several else (), () if brief else (f"shape ({axes})",)
    found = [escape("\n".join(outcome.found(brief))) for outcome in outcomes]
    last = ("found",) if any(found) else ()
    table = Table(Column("tomogram", overflow="fold"), *model, "status", *shape, "seconds", *last)
    for outcome, what in zip(outcomes, found, strict=True):
        table.add_row(
            escape(outcome.stem),
            *((outcome.stage,) if several else ()),
            outcome.status,
            *(() if brief else (" × ".join(map(str, outcome.shape)),)),
            f"{outcome.seconds:.1f}" if outcome.seconds else "",
            *((what,) if last else ()),
        )
    wide.print(table)
    warnings = ((outcome.stem, warning) for outcome in outcomes for warning in outcome.warnings)
    for stems, warning in merged_warnings(pair for pair in warnings if pair not in shown):
        print_always(console, f"warning, {stems}: {warning}")
    for outcome in outcomes:
        if outcome.error:
            print_always(console, f"failed, {outcome.stem}: {outcome.error}")
            if outcome.details and os.environ.get("CRYOSIAM_DASK_DEBUG"):
                print_always(console, outcome.details)
