"""File name endings of tomograms. The content of a file decides which format it has."""

from __future__ import annotations

MRC_ENDINGS = (".mrc", ".rec", ".map", ".st", ".mrcs", ".ali", ".preali")
HDF5_ENDINGS = (".h5", ".hdf5", ".hdf", ".he5")
TOMOGRAM_ENDINGS = (
    ".ome.zarr", ".zarr", *(f"{ending}{packed}" for ending in MRC_ENDINGS for packed in ("", ".gz")), *HDF5_ENDINGS
)  # fmt: skip


def denoised_ending(ending: str) -> str:
    """Return the ending of the MRC files that denoising writes for tomograms with this `ending`.

    Examples
    --------
    >>> denoised_ending(".rec.gz"), denoised_ending(".ome.zarr"), denoised_ending("_bin4.mrc")
    ('.rec', '.mrc', '_bin4.mrc')
    """
    plain = ending.removesuffix(".gz")
    return plain if plain.endswith(MRC_ENDINGS) else ".mrc"
