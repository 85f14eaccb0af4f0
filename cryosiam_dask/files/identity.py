"""Whether a tomogram is still the one that was read before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryosiam_dask.files.zarr import ZARR_METADATA


def source_identity(path: str | Path) -> list[Any]:
    """What changes whenever a tomogram does, without reading its voxels: JSON values.

    Parameters
    ----------
    path
        A file: its name, size and modification time, and a hash of its beginning. A folder: its name, a hash of all
        metadata files, and one of the names, sizes and modification times of all files, since some writers of zarr
        replace chunks and others change them in place. That asks the disk once for each: 0.9 s for 97,336 chunks on the
        local disk of a busy machine (``benchmarks/results/identity-2-cores.json``), longer on that of a network.
    """
    path = Path(path)
    if not path.is_dir():
        status = path.stat()
        with path.open("rb") as file:
            beginning = hashlib.sha256(file.read(1024)).hexdigest()
        return [path.name, status.st_size, status.st_mtime_ns, beginning]
    metadata, entries = hashlib.sha256(), hashlib.sha256()
    for within, entry in _files(path):
        name = within.encode("utf-8", "surrogateescape")
        if entry.name in ZARR_METADATA:
            metadata.update(name + Path(entry).read_bytes())
        status = entry.stat()
        entries.update(name + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return [path.name, metadata.hexdigest(), entries.hexdigest()]


#: Places at which a tomogram is looked at to tell whether it is the same, and bytes that are read at each.
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


def source_content(path: str | Path) -> str:
    """A hash of what a tomogram holds, by samples: the same for a copy, and for a file whose times alone have changed.

    Parameters
    ----------
    path
        A file: its size and 64 KiB at each of 256 places, the first and the last included, or the whole where that is
        no more. A folder: the names and sizes of all files, its metadata, and as much of 256 of the others, or of all
        where these are fewer.
    """
    path, found = Path(path), hashlib.sha256()
    if not path.is_dir():
        found.update(str(path.stat().st_size).encode())
        for piece in _pieces(path, _SAMPLES):
            found.update(piece)
        return found.hexdigest()
    files = list(_files(path))
    others = [within for within, entry in files if entry.name not in ZARR_METADATA]
    sampled = {others[(len(others) - 1) * i // (_SAMPLES - 1)] for i in range(_SAMPLES)} if others else set()
    for within, entry in files:
        found.update(f"{within} {entry.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        if entry.name in ZARR_METADATA:
            found.update(Path(entry).read_bytes())
        elif within in sampled:
            for piece in _pieces(Path(entry), _SAMPLES // len(sampled)):
                found.update(piece)
    return found.hexdigest()


def _pieces(path: Path, places: int) -> Iterator[bytes]:
    """What a file holds at so many places, evenly spread, or the whole where that is no more."""
    with path.open("rb") as file:
        last = file.seek(0, os.SEEK_END) - _SAMPLE_BYTES
        many = min(places, -(-last // _SAMPLE_BYTES) + 1)
        for i in range(max(1, many)):
            file.seek(max(0, last) * i // max(1, many - 1))
            yield file.read(_SAMPLE_BYTES)


def newest_chunk(path: str | Path) -> int:
    """When the last chunk of a zarr was written, in nanoseconds since the epoch; 0 of a file, or without chunks."""
    return max(_times(path), default=0)


def is_newer_in_part(path: str | Path, since: int) -> bool:
    """Whether some chunks of a zarr were written after a time and others not: it was changed in place.

    All those of a copy are newer, or none where the times were kept, whole seconds of them or better.
    """
    times = _times(path)
    return bool(times) and min(times) <= since < max(times)


def _times(path: str | Path) -> list[int]:
    if not Path(path).is_dir():
        return []
    return [entry.stat().st_mtime_ns for _, entry in _files(Path(path)) if entry.name not in ZARR_METADATA]


def _files(folder: Path, within: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below a folder, with their names relative to it, in order."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = f"{within}{entry.name}"
        if entry.is_dir():
            yield from _files(Path(entry), f"{name}/")
        else:
            yield name, entry
