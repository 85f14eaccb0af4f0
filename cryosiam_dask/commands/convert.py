"""Convert a tomogram to zarr or OME-Zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cryosiam_dask.commands.console import inform, warn
from cryosiam_dask.core.machine import cores
from cryosiam_dask.errors import OutputError
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.stages.export import convert_to_ome_zarr
from cryosiam_dask.stages.ingest import convert, require_free


def convert_file(
    source: Path,
    target: Path,
    console: Console,
    *,
    level: int = 0,
    dataset: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Convert one tomogram to zarr, and print its shape and intensities.

    Parameters
    ----------
    source, level, dataset, overwrite
        See `cryosiam_dask.stages.ingest.convert`.
    target
        ``*.ome.zarr`` for an OME-Zarr image, ``*.zarr`` for a single array.
    console, workers
        See `cryosiam_dask.commands.segment.segment`.

    Returns
    -------
    dict
        JSON values: those of `cryosiam_dask.files.header.TomogramHeader.attributes`, ``statistics``,
        ``shape`` (z, y, x), ``dtype``, ``target``.
    """
    if not target.name.lower().endswith(".zarr"):
        name = target.stem.removesuffix(".zarr").removesuffix(".ome")
        raise OutputError(
            "the name of a converted tomogram must end with .zarr",
            place=target,
            remedy=f"Use {name}.zarr, or {name}.ome.zarr for an image with several levels",
        )
    header = read_header(source, level=level, dataset=dataset)  # fails before workers start
    header.require_complete()
    require_free(target, overwrite=overwrite)
    make = convert_to_ome_zarr if target.name.lower().endswith(".ome.zarr") else convert
    with open_cluster("cpu", 1 if header.compressed else workers or cores()) as client:
        executor = DaskExecutor(client)
        report = make(source, target, level=level, dataset=dataset, executor=executor, overwrite=overwrite)
    statistics = report.statistics
    inform(console, f"{target}: {' × '.join(map(str, header.shape))} (z, y, x), {header.dtype}")
    if statistics.minimum is not None:
        inform(console, f"intensities {statistics.minimum:g} to {statistics.maximum:g}, mean {statistics.mean:g}")
    for note in header.notes:
        inform(console, f"note: {note}")
    for warning in report.warnings:
        warn(console, warning)
    return {
        "target": str(target),
        "shape": list(header.shape),
        "dtype": str(header.dtype),
        **header.attributes(),
        "warnings": list(report.warnings),
        "statistics": statistics.attributes(),
    }
