"""Detect whether a tomogram has changed since it was read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryosiam_dask.files.zarr import ZARR_METADATA


def source_identity(path: str | Path) -> list[Any]:
    """Return JSON values that change whenever a tomogram changes, without reading its voxels.

    For a file, these are its name, size and modification time, and a hash of its beginning. For a folder, they are its
    name, a hash of all metadata files, and a hash of the names, sizes and modification times of all files, because some
    zarr writers replace chunks and others change them in place. This takes one disk access per file: 0.9 s for 97,336
    chunks on a busy machine's local disk (``benchmarks/results/identity-2-cores.json``), more on a network disk.

    Parameters
    ----------
    path
        A file, or the folder of a zarr.
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


#: Number of samples that identify the content of a tomogram, and the bytes of each.
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


def source_content(path: str | Path) -> str:
    """Return a hash of samples of a tomogram's content; a copy, or a file with other times, has the same hash.

    For a file, it covers the size and 256 samples of 64 KiB, the first and the last included, or the whole file if that
    is smaller. For a folder, it covers the names and sizes of all files, all metadata, and the same number of bytes of
    up to 256 other files.

    Parameters
    ----------
    path
        A file, or the folder of a zarr.
    """
    path, found = Path(path), hashlib.sha256()
    if not path.is_dir():
        found.update(str(path.stat().st_size).encode())
        for sample in _samples(path, _SAMPLES):
            found.update(sample)
        return found.hexdigest()
    files = list(_files(path))
    others = [within for within, entry in files if entry.name not in ZARR_METADATA]
    sampled = {others[(len(others) - 1) * i // (_SAMPLES - 1)] for i in range(_SAMPLES)} if others else set()
    for within, entry in files:
        found.update(f"{within} {entry.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        if entry.name in ZARR_METADATA:
            found.update(Path(entry).read_bytes())
        elif within in sampled:
            for sample in _samples(Path(entry), _SAMPLES // len(sampled)):
                found.update(sample)
    return found.hexdigest()


def _samples(path: Path, count: int) -> Iterator[bytes]:
    """Yield `count` evenly spaced samples of a file, or the whole file if that is smaller."""
    with path.open("rb") as file:
        last = file.seek(0, os.SEEK_END) - _SAMPLE_BYTES
        many = min(count, -(-last // _SAMPLE_BYTES) + 1)
        for i in range(max(1, many)):
            file.seek(max(0, last) * i // max(1, many - 1))
            yield file.read(_SAMPLE_BYTES)


def newest_chunk(path: str | Path) -> int:
    """Return when the last chunk of a zarr was written, in nanoseconds since 1970; 0 for a file or without chunks."""
    return max(_times(path), default=0)


def is_newer_in_part(path: str | Path, since: int) -> bool:
    """Whether some chunks of a zarr, but not all, were written after `since`, so that it was changed in place.

    In a copy, all chunks are newer, or none if the copy kept the times (to the second or better).
    """
    times = _times(path)
    return bool(times) and min(times) <= since < max(times)


def _times(path: str | Path) -> list[int]:
    if not Path(path).is_dir():
        return []
    return [entry.stat().st_mtime_ns for _, entry in _files(Path(path)) if entry.name not in ZARR_METADATA]


def _files(folder: Path, within: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files below a folder in order, with their names relative to it."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = f"{within}{entry.name}"
        if entry.is_dir():
            yield from _files(Path(entry), f"{name}/")
        else:
            yield name, entry
