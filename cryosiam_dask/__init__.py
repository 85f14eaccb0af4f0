"""CryoSiam's lamella and semantic segmentation of cryo-electron tomograms, on chunked arrays with Dask."""

from cryosiam_dask._version import __version__

__all__ = ["__version__"]
