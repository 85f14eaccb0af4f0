"""Instances of a segmentation and their measurements: a file of instance numbers, and tables.

A tomogram has ``<stem>_components.h5`` (dataset ``instances``), ``<stem>_components.csv`` and ``.parquet``. All
tomograms of a folder have ``components.csv`` and ``components.parquet``. A table has one row per component:

============================================== =========================================================================
``tomogram``, ``class``, ``class_name``        names, and the class as a number
``label``                                      the number in ``instances``
``voxels``, ``volume_nm3``                     size
``z``, ``y``, ``x``                            centroid: mean of the voxel indices, which count from 0
``z_angstrom``, ``y_angstrom``, ``x_angstrom`` the same from the centre of the first voxel, in Å
``z_min``, ``z_max``, ``y_min``, …             bounding box in voxels, its upper end exclusive
``mean_probability``, ``max_probability``      of the component's own class; empty without probabilities
``touches_border``                             whether the volume may cut it
============================================== =========================================================================

Values that depend on an unknown voxel size are empty. An image is a volume of one slice without z in Å and volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.errors import LabelsError, OutputError, not_ours
from cryosiam_dask.files.atomic import replacing, require_voxels, write_bytes
from cryosiam_dask.files.claims import collection_claim, open_claims
from cryosiam_dask.files.folders import visible
from cryosiam_dask.files.hdf5 import INSTANCES, dataset_names, read_attributes
from cryosiam_dask.files.predictions import write_instances_hdf5
from cryosiam_dask.model.classes import named
from cryosiam_dask.stages.components import ArrayModule, Components, find_components, instances_dtype, write_instances

CONNECTIVITY = 26
#: Maximum bytes of an instance number, per voxel of the work store and of ``<stem>_components.h5``.
INSTANCE_BYTES = 4
COLLECTION = "components"  # name of the tables of all tomograms
STAR_MARK = "# cryosiam_dask"  # first characters of this program's STAR files
_COMMON_COLUMNS = {"tomogram", "class", "voxels"}  # of all tables and CSV lists of this program


def component_files(folder: Path, stem: str) -> tuple[Path, Path, Path]:
    """Return the paths of a tomogram's components: HDF5, CSV, Parquet."""
    return (
        folder / f"{stem}_components.h5",
        folder / f"{stem}_components.csv",
        folder / f"{stem}_components.parquet",
    )


def write_components(
    folder: Path,
    stem: str,
    labels: Sliceable,
    *,
    work: zarr.Group,
    attributes: Mapping[str, Any],
    probabilities: Sliceable | None = None,
    executor: Executor = SERIAL,
    array_module: ArrayModule = "numpy",
) -> Components:
    """Find, number and measure the components of a tomogram, and write their three files.

    The HDF5 file is written last, so its fingerprint is also that of the tables.

    Parameters
    ----------
    folder, stem
        Folder of the files, and the tomogram's name.
    labels
        (z, y, x) or (y, x), integers, 0 is background.
    work
        Group for the temporary array ``instances``.
    attributes
        Attributes of the HDF5 file, as in `cryosiam_dask.files.predictions.write_hdf5`; the tables also use
        ``voxel_size_angstrom`` and ``class_names``.
    probabilities
        (class, z, y, x) or (class, y, x).
    executor, array_module
        What runs the tasks, and the array library that they use.

    Raises
    ------
    LabelsError
        If the labels are not integers, are negative, or have another shape than the probabilities.
    OutputError
        If there are no voxels, or a file cannot be written.
    """
    hdf5, *tables = component_files(folder, stem)
    require_own(hdf5, *tables)
    require_voxels(hdf5, labels)
    components = find_components(
        labels,
        connectivity=CONNECTIVITY,
        measure=True,
        probabilities=probabilities,
        executor=executor,
        array_module=array_module,
    )
    blocks = components.labelling.blocks
    instances = work.create_array(
        "instances",
        shape=labels.shape,
        chunks=tuple(map(min, blocks.block, blocks.shape))[3 - blocks.ndim :],
        dtype=instances_dtype(len(components)),
        fill_value=0,
        overwrite=True,
    )
    write_instances(components, labels, instances, executor=executor)
    table = component_table(
        components, stem, attributes.get("voxel_size_angstrom"), class_names=attributes.get("class_names")
    )
    for path in tables:
        write_table(path, table)
    write = partial(write_instances_hdf5, instances=instances, attributes={**attributes, "connectivity": CONNECTIVITY})
    executor.map(write, [hdf5], name="export")
    return components


def remove_outdated(folder: Path, stem: str, fingerprint: str | None) -> bool:
    """Remove the components of a tomogram unless they were made from the labels with this fingerprint.

    Files of other programs are kept.

    Returns
    -------
    bool
        Whether anything was removed.
    """
    files = component_files(folder, stem)
    try:
        if fingerprint and read_attributes(files[0]).get("fingerprint") == fingerprint:
            return False
    except OutputError:
        pass  # missing or damaged
    found = [path for path in files if made_here(path)]
    for path in found:
        path.unlink()
    return bool(found)


def made_here(path: Path) -> bool:
    """Whether this program made a table, a list or a file of components, judging by its content."""
    try:
        if path.suffix == ".h5":
            return INSTANCES in dataset_names(path)
        if path.suffix == ".parquet":
            from pyarrow import parquet  # type: ignore[import-untyped]

            return set(parquet.read_schema(path).names) >= _COMMON_COLUMNS
        with path.open(encoding="utf-8", errors="replace") as file:
            beginning = file.read(4096)
    except (OSError, ValueError, OutputError):
        return False
    if path.suffix == ".csv":
        return set(beginning.partition("\n")[0].split(",")) >= _COMMON_COLUMNS
    # Earlier versions wrote no mark, but put the tomogram's name first.
    return beginning.startswith(STAR_MARK) or (
        beginning.startswith("# Created by") and "_rlnTomoName #1\n" in beginning
    )


def require_own(*paths: Path) -> None:
    """Check that no file of another program would be replaced.

    Raises
    ------
    OutputError
        If there is such a file.
    """
    for path in paths:
        if path.exists() and not made_here(path):
            raise not_ours(path)


def component_table(
    components: Components,
    tomogram: str,
    voxel_size_angstrom: Sequence[float | None] | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> Any:
    """Return the measurements of each component as a pandas.DataFrame; the module's docstring lists the columns.

    Parameters
    ----------
    components
        From `cryosiam_dask.stages.components.find_components` with ``measure=True``.
    tomogram
        Name of the tomogram.
    voxel_size_angstrom
        Along z, y and x (or y and x); ``None`` where unknown.
    class_names
        Names of the classes from 1 on; a class without a name is called ``"class 1"`` and so on.

    Raises
    ------
    LabelsError
        If the components were not measured.
    """
    import pandas

    measured, count = components.measurements, len(components)
    if measured is None:
        raise LabelsError("a table needs measurements", remedy="Call find_components with measure=True")
    names = named(class_names, int(components.classes.max(initial=0)))
    size = voxel_size(components.labelling.blocks.ndim, voxel_size_angstrom)
    columns: dict[str, Any] = {
        "tomogram": pandas.Series([tomogram] * count, dtype="str"),
        "class": components.classes.astype(np.int64),
        "class_name": pandas.Series([names[label - 1] for label in components.classes.tolist()], dtype="str"),
        "label": np.arange(1, count + 1),
        "voxels": components.voxels,
        "volume_nm3": components.voxels * (size.prod() / 1000),
    }
    columns |= dict(zip("zyx", measured.centroids.T, strict=True))
    columns |= {f"{axis}_angstrom": measured.centroids[:, i] * size[i] for i, axis in enumerate("zyx")}
    for i, axis in enumerate("zyx"):
        columns |= {f"{axis}_min": measured.lower[:, i], f"{axis}_max": measured.upper[:, i]}
    for name, values in (("mean", measured.mean_probability), ("max", measured.max_probability)):
        columns[f"{name}_probability"] = np.full(count, np.nan) if values is None else values.astype(np.float64)
    columns["touches_border"] = measured.touches_border
    return pandas.DataFrame(columns)


def voxel_size(ndim: int, voxel_size_angstrom: Sequence[float | None] | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the voxel size along z, y and x in Å, with NaN for unknown sizes and for z of an image."""
    known = [np.nan if not size else float(size) for size in voxel_size_angstrom or ()]
    return np.array([np.nan] * (3 - ndim) + known) if len(known) == ndim else np.full(3, np.nan)


def write_table(path: Path, table: Any) -> None:
    """Write a pandas.DataFrame as CSV or Parquet, depending on the ending of `path`, replacing a file atomically.

    Raises
    ------
    OutputError
        If the file cannot be written; an earlier file is then unchanged.
    """
    write_bytes(
        path, table.to_parquet(index=False) if path.suffix == ".parquet" else table.to_csv(index=False).encode()
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Number of components of a class, and their median and largest size in voxels."""

    count: int
    median: float
    largest: int


def component_sizes(folder: Path, stem: str) -> dict[int, Sizes] | None:
    """Return the sizes of the components of each class that has any; ``None`` if they were not measured.

    Raises
    ------
    OutputError
        If the table cannot be read.
    """
    import pandas

    path = component_files(folder, stem)[2]
    if not path.exists():
        return None
    voxels = _parquet(path, partial(pandas.read_parquet, columns=["class", "voxels"])).groupby("class")["voxels"]
    rows = voxels.agg(["size", "median", "max"]).itertuples()
    return {int(label): Sizes(int(count), float(median), int(largest)) for label, count, median, largest in rows}


def collect_tables(folder: Path, is_there: Callable[[str], bool] = lambda stem: True) -> None:
    """Join the tables of all tomograms of a folder as ``components.csv`` and ``components.parquet``.

    If there are no tables, both are removed.

    Parameters
    ----------
    folder
        Folder of the tables.
    is_there
        Returns whether a tomogram (stem) still has a prediction; tables of other tomograms are left out, but kept.

    Raises
    ------
    OutputError
        If a table cannot be read, or the result cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    ending = "_components.parquet"
    text_file, table_file = (folder / f"{COLLECTION}{ending}" for ending in (".csv", ".parquet"))
    with claimed_collection(folder):
        schemas = {
            path: _parquet(path, parquet.read_schema)
            for path in visible(folder, ending)
            if is_there(path.name.removesuffix(ending))
        }
        paths = [path for path, found in schemas.items() if set(found.names) >= _COMMON_COLUMNS]
        if not paths:
            for path in filter(made_here, (text_file, table_file)):
                path.unlink()
            return
        require_own(text_file, table_file)
        schema = pyarrow.unify_schemas([schemas[path] for path in paths], promote_options="permissive")
        # One table at a time, because a collection has millions of components.
        with replacing(text_file) as text, replacing(table_file) as sink, parquet.ParquetWriter(sink, schema) as writer:
            for path in paths:
                found = _parquet(path, parquet.read_table)
                columns = {
                    field.name: found[field.name].cast(field.type)
                    if field.name in found.column_names
                    else pyarrow.nulls(len(found), field.type)
                    for field in schema
                }
                table = pyarrow.table(columns, schema=schema)
                writer.write_table(table)
                text.write(table.to_pandas().to_csv(index=False, header=path == paths[0]).encode())


def _parquet(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors for damaged files derive from these
        raise OutputError(
            "the table of components must be readable",
            place=path,
            value=error,
            remedy="Remove the file and run 'cryosiam-dask components' again",
        ) from None


@contextmanager
def claimed_collection(folder: Path) -> Iterator[None]:
    """Hold the claim on the tables and lists of all tomograms of `folder`; wait while another run holds it."""
    with open_claims() as claims, claims.held(collection_claim(folder)):
        yield
