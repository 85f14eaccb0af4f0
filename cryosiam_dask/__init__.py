"""CryoSiam's lamella and semantic segmentation of cryo-electron tomograms, on chunked arrays with Dask.

The stages are functions on Dask arrays and zarr stores and can be used one by one::

    import dask.array as da
    import cryosiam_dask

    cryosiam_dask.convert("TS_01.mrc", "TS_01.zarr")
    spec = cryosiam_dask.predictor_spec("cryosiam_semantic_segmentation.ckpt")
    labels = cryosiam_dask.predict(da.from_zarr("TS_01.zarr"), spec)["labels"]

They are imported when they are first used: torch alone takes seconds.
"""

from importlib import import_module
from typing import Any

from cryosiam_dask._version import __version__

_HOMES = {
    "config": ("read_configuration",),
    "runs.plan": ("plan_run",),
    "runs.collection": ("run",),
    "runs.written": ("export", "list_centers", "measure", "postprocess"),
    "files.tomogram": ("read_header",),
    "stages.ingest": ("convert", "ingest"),
    "model.checkpoint": ("read_checkpoint",),
    "model.predictor": ("PredictorSpec", "predictor_spec"),
    "core.grid": ("make_grid",),
    "stages.predict": ("StoredPrediction", "create_outputs", "labels_of", "predict", "predict_store"),
    "files.mask": ("open_mask", "read_mask"),
    "stages.lamella": ("postprocess_lamella",),
    "stages.components": ("find_components", "remove_small", "write_instances"),
    "stages.centers": ("center_table", "write_centers"),
    "stages.measurements": ("component_table", "write_components"),
    "files.hdf5": ("read_attributes",),
    "files.mrc": ("write_mrc",),
    "files.predictions": ("write_hdf5",),
    "stages.ome_zarr": ("write_ome_zarr",),
    "model.classes": ("class_names",),
    "stages.preview": ("write_preview",),
    "runs.cluster": ("open_cluster",),
    "runs.dask_executor": ("DaskExecutor",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
