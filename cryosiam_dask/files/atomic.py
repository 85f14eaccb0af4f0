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

#: Seconds after which a file that was to take another's place is nobody's any more.
ABANDONED_SECONDS = 3600.0


def part_name(name: str) -> str:
    """A hidden name under which a file or folder `name` grows, which tells the process that writes it."""
    return f".{name}.{_machine()}-{os.getpid()}-{next(_PARTS)}.part"


def sweep_parts(folder: Path, *, own: bool = False) -> None:
    """Remove what processes that were killed left of the outputs that they wrote.

    What a process of this machine writes is its own while it lives; what one of another machine does, until it has not
    changed for an hour. Where a folder was about to take the place of an earlier one, that one is put back.

    Parameters
    ----------
    folder
        Of the outputs.
    own
        Whether to remove what this process left as well, as it does where its workers ended amid a folder.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, told) for entry in entries if (told := _PART.match(entry.name))]
    for name, told in found:
        with suppress(OSError):
            path, target = folder / name, folder / told["name"]
            if told["machine"] == _machine():
                process = int(told["process"])
                if is_running(process) and not (own and process == os.getpid()):
                    continue
            elif time.time() - path.lstat().st_mtime < ABANDONED_SECONDS:
                continue
            if told["kind"] == "old" and not target.exists():
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
    """Give a hidden folder that takes the place of `target` when the block has ended well.

    An earlier folder stays as it is until then. The one that is given does not exist yet; it vanishes if the block
    ends otherwise. See `cryosiam_dask.files.atomic.sweep_parts` for what is left by a process that was killed. Where a
    link stands in the place of `target`, it is what that leads to.
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
    """Write a small file, replacing an earlier one at once when it is complete.

    Raises
    ------
    OutputError
        If the file cannot be written; an earlier file is then untouched.
    """
    with replacing(Path(path)) as sink:
        sink.write(content)


def require_voxels(path: str | Path, source: Sliceable) -> None:
    """Refuse to write an array without voxels, which neither HDF5 chunks nor MRC files can hold.

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
    """A file that keeps the first error of the operating system and from then on swallows what is written.

    HDF5 cannot close a file that it cannot write: on a full disk it keeps the file open for good, cannot create one of
    that name again, and crashes the process when it ends. So it is not told; whoever writes calls `check` and gives up.
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
    """Open a hidden file that takes the place of `path` when the block has ended well, and vanishes otherwise.

    Of several processes that write the same file at the same time, each completes its own, and the last one's stays.
    See `cryosiam_dask.files.atomic.sweep_parts` for what is left by a process that was killed.

    Parameters
    ----------
    path
        The file.
    alone
        Whether nobody else may have written it meanwhile: as one may that was given the work of a process that hung,
        and whose file is the later one.

    Raises
    ------
    OutputError
        If it cannot be written; an earlier file is then untouched.
    """
    path = real(path)
    before = _identity(path)
    part = path.with_name(part_name(path.name))
    try:
        with Sink(part, "w+") as sink:
            try:
                yield sink
            finally:
                sink.check()  # in place of whatever HDF5 has made of it
            os.fsync(sink.fileno())
        if alone and _identity(path) != before:
            raise OutputError(
                "only one process may write an output at a time",
                place=path,
                value="a later one of another process",
                remedy="Nothing is to be done: that one stays",
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
