"""Choose the files of a folder that are used, and follow links."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from cryosiam_dask.errors import OutputError, TomogramError, is_transient


def unusable(path: Path) -> str:
    """Return why a path in a folder can be neither a tomogram nor an output; empty if it can.

    Hidden files are temporary, or metadata such as ``._TS_01.mrc`` that macOS writes to foreign disks.
    """
    if path.name.startswith("."):
        return "macOS metadata of another file" if path.name.startswith("._") else "a hidden file"
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            return f"a broken link to {path.readlink()}"
        return "" if is_transient(error) else str(error.strerror)  # opening the file will be retried
    return ""


def require_there(path: Path) -> None:
    """Check that a file, a folder or a link exists.

    Raises
    ------
    TomogramError
        If nothing is there.
    """
    if not path.exists() and not path.is_symlink():
        raise TomogramError("does not exist", place=path, remedy="Check the path")


def visible(folder: Path, ending: str = "") -> list[Path]:
    """Return the sorted paths of a folder whose names end with `ending` and that are not `unusable`."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not unusable(path))


def left_out(folder: Path, ending: str, why: Callable[[Path], str] = unusable) -> str:
    """Describe which files of a folder are skipped, and why; empty if there are none.

    Parameters
    ----------
    folder, ending
        See `visible`. Files whose names end with `ending` in other upper and lower case are skipped too.
    why
        Returns why a path is skipped, or an empty string.
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
    """Resolve an output that is a link, for example to a larger disk.

    Raises
    ------
    OutputError
        If the link is broken.
    """
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))
    if found.is_symlink() or not found.parent.is_dir():
        raise OutputError(
            "an output must not be a broken link",
            place=path,
            value=path.readlink(),
            remedy="Remove the link, or mount the disk that it points to",
        )
    return found


def without_predictions(folder: Path) -> OutputError:
    """Return the error to raise if there is nothing to report."""
    return OutputError(
        "there must be predictions to report",
        place="key prediction_folder",
        value=f"no file {folder / '*_preds.h5'}",
        remedy="Run semantic-predict first",
    )
