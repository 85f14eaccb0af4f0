"""File types, recognized by their first bytes."""

from __future__ import annotations

from pathlib import Path

#: First bytes of files that are neither tomograms nor checkpoints, nor outputs of this program.
OTHERS = {
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"II+\0": "a TIFF image",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"(\xb5/\xfd": "a zstd file",
}
#: File types that are found under the name of a tomogram, by their first bytes.
_NAMES = {start: what.split()[1] for start, what in OTHERS.items()} | {
    b"PK\3\4": "ZIP", b"\x89HDF": "HDF5", b"<": "HTML or XML", b"version https://git-lfs": "Git LFS pointer",
}  # fmt: skip
PACKED = ("bzip2", "xz", "zstd", "ZIP")


def name_of(path: Path) -> str:
    """Return the type of a file that is not a tomogram, such as ``"TIFF"``; empty if it is unknown."""
    with path.open("rb") as file:
        first = file.read(32).lstrip()
    return next((name for start, name in _NAMES.items() if first.startswith(start)), "")


def resemblance_of(path: Path) -> str:
    """Return a part of an error message that describes the beginning of such a file; empty if it is unknown."""
    return f", which begin like {name}" if (name := name_of(path)) else ""
