"""The version that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cryosiam-dask")
except PackageNotFoundError:  # the sources alone
    __version__ = "0+unknown"
