"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.machine import boot_id, is_running, process_namespace
from cryosiam_dask.errors import OutputError, not_written
from cryosiam_dask.files.folders import real

#: Seconds without a change after which a temporary file of another machine counts as abandoned.
ABANDONED_SECONDS = 3600.0


def part_name(name: str) -> str:
    """Return a hidden temporary name for `name` that identifies the writing process."""
    return f".{name}.{_machine()}-{os.getpid()}-{next(_PARTS)}.part"


def sweep_parts(folder: Path, *, own: bool = False) -> None:
    """Remove temporary outputs that killed processes left behind.

    Those of running processes on this machine are kept, as are those of other machines that changed within the last
    hour. If a process was killed while it replaced a folder, the earlier folder is restored.

    Parameters
    ----------
    folder
        The folder of the outputs.
    own
        Whether to remove those of this process too, for example after its workers have died.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, match) for entry in entries if (match := _PART.match(entry.name))]
    for name, match in found:
        with suppress(OSError):
            path, target = folder / name, folder / match["name"]
            if match["machine"] == _machine():
                process = int(match["process"])
                if is_running(process) and not (own and process == os.getpid()):
                    continue
            elif time.time() - path.lstat().st_mtime < ABANDONED_SECONDS:
                continue
            if match["kind"] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


_PARTS = itertools.count()
_PART = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-\d+\.(?P<kind>part|old)$", re.DOTALL)


@cache
def _machine() -> str:
    return f"{zlib.crc32(f'{socket.gethostname()} {boot_id()} {process_namespace()}'.encode()):08x}"


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield the path of a hidden folder, yet to be created, that replaces `target` if the ``with`` block succeeds.

    If the block fails, the folder is removed and `target` is unchanged; see `sweep_parts` for killed processes. If
    `target` is a link, the folder that it points to is replaced.
    """
    target = real(target)
    part = target.with_name(part_name(target.name))
    old = part.with_suffix(".old")
    try:
        yield part
        if target.exists():
            target.replace(old)
        try:
            part.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a small file, replacing an earlier one atomically.

    Raises
    ------
    OutputError
        If the file cannot be written; an earlier file is then unchanged.
    """
    with replacing(Path(path)) as sink:
        sink.write(content)


def require_voxels(path: str | Path, source: Sliceable) -> None:
    """Check that an array has voxels; HDF5 chunks and MRC files cannot store an empty one.

    Raises
    ------
    OutputError
        If an axis has length 0.
    """
    if 0 in source.shape:
        raise OutputError(
            "a file must hold voxels",
            place=path,
            value=f"shape {tuple(source.shape)}",
            remedy="Check the tomogram that the labels were made from",
        )


class Sink(io.FileIO):
    """A file that keeps the first error of the operating system and ignores all later writes.

    HDF5 cannot close a file that it cannot write: on a full disk it keeps the file open forever, cannot create another
    one with that name, and crashes the process at exit. So HDF5 does not see the error; the writer calls `check`.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextmanager
def replacing(path: Path, *, alone: bool = False) -> Iterator[Sink]:
    """Open a hidden file that replaces `path` if the ``with`` block succeeds, and is removed otherwise.

    If several processes write the same file at the same time, the last one to finish wins. See `sweep_parts` for
    killed processes.

    Parameters
    ----------
    path
        The file.
    alone
        Whether to fail if another process has replaced `path` in the meantime, because this process hung and its task
        was retried elsewhere; the other file is then kept.

    Raises
    ------
    OutputError
        If the file cannot be written; an earlier file is then unchanged.
    """
    path = real(path)
    before = _identity(path)
    part = path.with_name(part_name(path.name))
    try:
        with Sink(part, "w+") as sink:
            try:
                yield sink
            finally:
                sink.check()  # raises the real error instead of HDF5's
            os.fsync(sink.fileno())
        if alone and _identity(path) != before:
            raise OutputError(
                "only one process may write an output at a time",
                place=path,
                value="a newer file from another process",
                remedy="There is nothing to do: the newer file is kept",
            )
        part.replace(path)
    except OSError as error:
        remedy = {
            errno.ENOSPC: "Free space on the disk, or choose another folder",
            errno.EDQUOT: "Free space in your quota, or choose another folder",
            errno.EFBIG: "The file system or a limit (ulimit -f) does not allow files of this size",
            errno.ENOENT: "Create the folder first",
        }.get(error.errno or 0, "Check the folder and its permissions, or choose another one")
        raise not_written(error, "the output must be writable", place=path, remedy=remedy) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
