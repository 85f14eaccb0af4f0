"""Tomograms of any format: recognize the format and read the header."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cryosiam_dask.core.endings import HDF5_ENDINGS
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.files.hdf5 import is_hdf5, read_hdf5_header
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mrc import read_mrc_header, unreadable
from cryosiam_dask.files.signatures import resemblance_of
from cryosiam_dask.files.zarr import is_zarr, read_zarr_header


def read_header(
    path: str | Path, *, level: int = 0, dataset: str | None = None, unsigned: bool | None = None
) -> TomogramHeader:
    """Read the header of a tomogram and decide what is ambiguous in it.

    Parameters
    ----------
    path
        An MRC or REC file (``.mrc``, ``.rec``, ``.map``, ``.st``, each also ``.gz``), an HDF5 file, or the folder of a
        zarr array or OME-Zarr image. The content decides which format it has, and whether it is compressed.
    level
        Level of an OME-Zarr image; 0 is full resolution.
    dataset
        Dataset of an HDF5 file. If ``None``, the only one that can be a tomogram.
    unsigned
        Whether the bytes of an MRC file of mode 0 are unsigned. If ``None``, the header decides or, if it does not
        tell, the voxels.

    Returns
    -------
    TomogramHeader
        Its `warnings` describe what looks wrong with the file.

    Raises
    ------
    TomogramError
        If the file cannot be opened, has another format, is shorter than its header states, or holds something that is
        not supported (4-bit and RGB voxels, stacks of volumes). The length of a compressed file is not checked here.
    """
    path = Path(path)
    try:
        if path.is_dir() and (is_zarr(path) or path.suffix == ".zarr"):
            return read_zarr_header(path, level=level)
        if path.is_file() and is_hdf5(path):
            return _as_named(read_hdf5_header(path, dataset=dataset), "HDF5", path.suffix.lower() in HDF5_ENDINGS)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        header = read_mrc_header(path, unsigned)
    except TomogramError as error:
        if path.suffix.lower() not in HDF5_ENDINGS or not path.is_file():
            raise
        raise TomogramError(
            f"a file whose name ends with {path.suffix} must be an HDF5 file",
            place=path,
            value=f"{path.stat().st_size} bytes of another format{resemblance_of(path)}",
            remedy="Copy it again if it is damaged, or give it the ending of its format",
        ) from error
    return _as_named(header, "MRC", path.suffix.lower() not in (*HDF5_ENDINGS, ".zarr"))


def _as_named(header: TomogramHeader, kind: str, agrees: bool) -> TomogramHeader:
    """Add a warning if the name of a file does not agree with its content."""
    if agrees:
        return header
    warning = f"the name ends with {header.path.suffix}, but the content is {kind}; it is read as {kind}"
    return replace(header, warnings=(*header.warnings, warning))
