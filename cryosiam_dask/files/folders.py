"""Folders: what in them counts, and those that appear complete or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from cryosiam_dask.errors import OutputError, TomogramError, is_transient


def unusable(path: Path) -> str:
    """Why something in a folder can be no tomogram and no output, in words; empty if it can.

    Hidden names are of files that are still growing, or ``._TS_01.mrc``, which macOS puts beside every file on a disk
    that is not its own.
    """
    if path.name.startswith("."):
        return "which macOS puts beside another file" if path.name.startswith("._") else "a hidden name"
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            return f"a link that leads nowhere: {path.readlink()}"
        return "" if is_transient(error) else str(error.strerror)  # whoever opens it tries again
    return ""


def require_there(path: Path) -> None:
    """Refuse the path of a tomogram or another file at which nothing is, not even a link.

    Raises
    ------
    TomogramError
        If so.
    """
    if not path.exists() and not path.is_symlink():
        raise TomogramError("does not exist", place=path, remedy="Check the path")


def visible(folder: Path, ending: str = "") -> list[Path]:
    """What a folder holds whose name ends so and that is not `unusable`, sorted."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not unusable(path))


def left_out(folder: Path, ending: str, why: Callable[[Path], str] = unusable) -> str:
    """What a folder holds whose name ends so and that does not count, with the reasons; empty if there is nothing.

    Parameters
    ----------
    folder, ending
        As of `visible`; capitals count, so that what would fit but for them is among it.
    why
        Tells why something does not count.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(ending):
            reason = why(path)
        else:
            reason = f"it must end with {ending}" if path.name.lower().endswith(ending.lower()) else ""
        if reason:
            found.append(f"{path.name} ({reason})")
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"left out of {folder}: {', '.join(found[:8])}{more}" if found else ""


def real(path: Path) -> Path:
    """Where an output is written: where a link leads that stands in its place, such as to a larger disk.

    Raises
    ------
    OutputError
        If a link leads nowhere.
    """
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))
    if found.is_symlink() or not found.parent.is_dir():
        raise OutputError(
            "an output must not be a link that leads nowhere",
            place=path,
            value=path.readlink(),
            remedy="Remove the link, or mount the disk that it leads to",
        )
    return found


def without_predictions(folder: Path) -> OutputError:
    """The error to raise where there is nothing to report."""
    return OutputError(
        "there must be predictions to report",
        place="key prediction_folder",
        value=f"no file {folder / '*_preds.h5'}",
        remedy="Run semantic-predict first",
    )
