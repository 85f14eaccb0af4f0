"""File types, recognized by their first bytes."""

from __future__ import annotations

from pathlib import Path

#: First bytes of other file types that are found under a tomogram's name.
_SIGNATURES = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"PK\3\4": "ZIP",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"\x89HDF": "HDF5",
    b"%PDF": "PDF",
    b"<": "HTML or XML",
    b"version https://git-lfs": "Git LFS pointer",
}
PACKED = ("bzip2 does", "xz does", "zstd does", "ZIP does")


def resemblance_of(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(32).lstrip()
    return next((f", which begin as {kind} does" for start, kind in _SIGNATURES.items() if first.startswith(start)), "")
