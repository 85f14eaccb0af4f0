"""Particle lists: the centres of each class's components, for RELION 5, Warp and spreadsheets.

For each class of a tomogram ``<stem>_class<k>_centers.star`` and ``.csv``, and for each class of all tomograms of a
folder ``class<k>_centers.star`` and ``.csv``, and ``class<k>_relion_import.star``. As in CryoSiam, the mask of a class
may be eroded once, its components (26 neighbours) count if they have more than so many voxels, and the centre is the
mean of the voxel indices.

Coordinates count voxels of the segmented tomogram from 0, the centre of the first voxel: what CryoSiam's viewer, napari
and Warp do, and RELION, whose tomogram of n voxels has its centre at n / 2. A STAR file has the columns

================================== =====================================================================================
``rlnCoordinateX``, …              in voxels of the segmented tomogram (Warp: ``--coords_angpix`` is their size)
``rlnCenteredCoordinateXAngst``, … in Å from the centre of the tomogram, which RELION 5 prefers: true at any binning
``rlnPixelSize``                   in Å
``rlnTomoName``                    the tomogram's name without its extension, dots included: ``TS_018_9.96Apx``
``rlnMicrographName``              Warp's name of the tilt series: the same without its ``_9.96Apx``, and ``.tomostar``
================================== =====================================================================================

without those in Å where the voxel size is unknown. Orientations are left to those programs. A number comes first, since
a line that begins with ``_``, ``data_`` or ``#`` is none of a list; a name that begins so is quoted.

``class<k>_relion_import.star`` is what RELION 5 imports: for each tomogram its ``rlnTomoName`` and the absolute path of
its list, ``rlnTomoImportParticleFile``, so that any RELION project finds it. (RELION also takes a wildcard, but takes
the file for such an index where the wildcard finds no more than one.) It leaves out the lists that RELION refuses or
puts in the wrong places: those without particles, without voxel size, and of images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryosiam_dask.components import ChunkedArray, Components, find_components
from cryosiam_dask.errors import LabelsError, OutputError
from cryosiam_dask.executor import SERIAL, Executor
from cryosiam_dask.labels_to_hdf5 import write_bytes
from cryosiam_dask.measurements import CONNECTIVITY, component_table, holding, voxel_size, write_table

_LARGEST_CLASS = 255  # labels of classes are bytes
_OF_A_TOMOGRAM = re.compile(r"(.+)_class(\d+)_centers\.(?:csv|star)")
_OF_ALL = re.compile(r"class(\d+)_(?:centers\.(?:csv|star)|relion_import\.star)")
#: Values that would be taken for something else in a STAR file. Those with spaces `starfile` quotes by itself.
_TO_QUOTE = re.compile(r"(?!.* )(?:[_#$;\[\]]|(?:data|loop|save|stop|global)_|.*#|[.?]$)", re.IGNORECASE)
_WARPS_PIXEL_SIZE = re.compile(r"_\d+(\.\d+)?Apx$")  # which Warp appends to the name of a tilt series' tomogram


@dataclass(frozen=True, slots=True)
class Eroded:
    """Labels of which each class is eroded once, computed when a region is read.

    A voxel stays if its neighbours across all faces are of its class; outside the volume there is none. That is
    ``scipy.ndimage.binary_erosion`` of each class in the whole volume, wherever a region begins and ends.

    Parameters
    ----------
    labels
        (z, y, x) or (y, x), integers.
    """

    labels: ChunkedArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the labels."""
        return tuple(self.labels.shape)

    @property
    def dtype(self) -> Any:
        """Of the labels."""
        return self.labels.dtype

    @property
    def chunks(self) -> Any:
        """Of the labels."""
        return getattr(self.labels, "chunks", None)

    def __getitem__(self, region: tuple[slice, ...], /) -> NDArray[Any]:
        halo = [(min(part.start, 1), min(n - part.stop, 1)) for part, n in zip(region, self.shape, strict=True)]
        outer = tuple(slice(p.start - low, p.stop + high) for p, (low, high) in zip(region, halo, strict=True))
        block = np.pad(np.asarray(self.labels[outer]), [(1 - low, 1 - high) for low, high in halo])
        inside = (slice(1, -1),) * block.ndim
        inner = block[inside]
        stays = inner != 0
        for axis in range(block.ndim):
            for side in (slice(None, -2), slice(2, None)):
                stays &= block[(*inside[:axis], side, *inside[axis + 1 :])] == inner
        return np.where(stays, inner, np.zeros((), inner.dtype))


def write_centers(
    folder: Path,
    stem: str,
    labels: ChunkedArray,
    *,
    min_voxels: int = 0,
    erode: bool = False,
    classes: Iterable[int] = (),
    voxel_size_angstrom: Sequence[float | None] | None = None,
    executor: Executor = SERIAL,
) -> dict[int, int]:
    """Find the centres in a tomogram and write its lists, in place of all earlier ones.

    Parameters
    ----------
    folder, stem
        Where the files go, and the tomogram's name.
    labels
        (z, y, x) or (y, x), integers, 0 is background.
    min_voxels
        Components with at most so many voxels (after erosion) are left out.
    erode
        Whether to erode each class once.
    classes
        Classes that get a file even if there is nothing of them.
    voxel_size_angstrom
        Along z, y and x (or y and x); ``None`` where it is unknown.
    executor
        Runs the pieces.

    Returns
    -------
    dict
        The number of particles of each class.

    Raises
    ------
    LabelsError
        If the labels are not integers, negative, or numbers of instances rather than classes.
    OutputError
        If a file cannot be written, or no STAR file can hold the tomogram's name.
    """
    if not stem.isprintable() or "'" in stem or '"' in stem:
        raise OutputError(
            "a tomogram in a STAR file must have a name of printable letters without quotation marks, which the "
            "programs that read it take for others",
            place=folder,
            value=repr(stem),
            remedy="Rename the tomogram and its prediction",
        )
    components = find_components(
        Eroded(labels) if erode else labels, connectivity=CONNECTIVITY, measure=True, executor=executor
    )
    found = {int(label) for label in np.unique(components.classes)}
    if max(found, default=0) > _LARGEST_CLASS:
        raise LabelsError(
            f"particle lists need labels that are classes, from 0 to {_LARGEST_CLASS}",
            place=stem,
            value=f"{len(found)} different labels, up to {max(found)}: instances, one number for each component",
            remedy="Take the file of labels that the instances were made from",
        )
    table = center_table(components.select(components.voxels > min_voxels), stem, voxel_size_angstrom)
    counts = {}
    for label in sorted(found.union(classes)):
        own = table[table["class"] == label]
        _write(folder / f"{stem}_class{label}_centers", own)
        counts[label] = len(own)
    for path in folder.iterdir():
        match = _OF_A_TOMOGRAM.fullmatch(path.name)
        if match and match[1] == stem and int(match[2]) not in counts:
            path.unlink()
    return counts


def center_table(
    components: Components, tomogram: str, voxel_size_angstrom: Sequence[float | None] | None = None
) -> Any:
    """Return the centres of components as a pandas.DataFrame.

    Its columns are ``tomogram``, ``class``, ``voxels``, ``z``, ``y``, ``x`` (voxels from 0, without ``z`` for an image)
    and for each axis ``…_angstrom`` from the centre of the first voxel, ``…_centered_angstrom`` from the centre of the
    tomogram, n / 2, and at the end ``pixel_size_angstrom`` (along x); NaN where the voxel size is unknown.

    Parameters
    ----------
    components, tomogram, voxel_size_angstrom
        As of `cryosiam_dask.measurements.component_table`.

    Raises
    ------
    LabelsError
        If nothing was measured.
    """
    measured = component_table(components, tomogram, voxel_size_angstrom)
    blocks = components.labelling.blocks
    axes = "zyx"[3 - blocks.ndim :]
    table = measured[["tomogram", "class", "voxels", *axes, *(f"{axis}_angstrom" for axis in axes)]].copy()
    size = voxel_size(blocks.ndim, voxel_size_angstrom)
    for i, axis in enumerate(axes, start=3 - blocks.ndim):
        table[f"{axis}_centered_angstrom"] = (table[axis] - blocks.shape[i] / 2) * size[i]
    table["pixel_size_angstrom"] = size[2]
    return table


def collect_centers(folder: Path) -> None:
    """Put the lists of all tomograms of a folder together, one for each class, and write what RELION imports.

    Raises
    ------
    OutputError
        If a list cannot be read, or the result cannot be written.
    """
    import pandas

    with holding(folder):
        parts: dict[int, list[Any]] = {}
        of_relion: dict[int, list[tuple[str, str]]] = {}
        for path in sorted(folder.glob("*_centers.csv")):
            match = _OF_A_TOMOGRAM.fullmatch(path.name)
            if match:
                try:
                    # As text, so that no digit changes on the way and no name is taken for a number or for nothing.
                    table = pandas.read_csv(path, dtype="str", keep_default_na=False)
                    coordinates = [name for name in table if name not in ("tomogram", "class", "voxels")]
                    table[coordinates].replace("", "nan").astype(float)
                    parts.setdefault(int(match[2]), []).append(table)
                    if len(table) and "rlnCenteredCoordinateZAngst" in _star(table):
                        row = str(path.resolve().with_suffix(".star")), table["tomogram"][0]
                        of_relion.setdefault(int(match[2]), []).append(row)
                except (OSError, ValueError, KeyError) as error:
                    raise OutputError(
                        "the particle list must be readable to be collected",
                        place=path,
                        value=error,
                        remedy="Remove the file and run 'cryosiam-dask semantic-to-centers' again",
                    ) from None
        for label, tables in parts.items():
            _write(folder / f"class{label}_centers", pandas.concat(tables, ignore_index=True))
        for label, rows in of_relion.items():
            index = pandas.DataFrame(rows, columns=["rlnTomoImportParticleFile", "rlnTomoName"])
            _write_star(folder / f"class{label}_relion_import.star", index)
        for path in folder.iterdir():
            match = _OF_ALL.fullmatch(path.name)
            if match and int(match[1]) not in (of_relion if path.name.endswith("_relion_import.star") else parts):
                path.unlink()


def _write(path: Path, table: Any) -> None:
    """Write both forms of a list; `path` is without ending."""
    write_table(path.with_name(f"{path.name}.csv"), table)
    _write_star(path.with_name(f"{path.name}.star"), _star(table))


def _write_star(path: Path, table: Any) -> None:
    import starfile

    quoted = table.map(lambda value: f'"{value}"' if isinstance(value, str) and _TO_QUOTE.match(value) else value)
    write_bytes(path, starfile.to_string(quoted).encode())


def _star(table: Any) -> Any:
    """The same list in the columns of a STAR file."""
    import pandas

    axes = [axis for axis in "xyz" if axis in table]
    warp = [_WARPS_PIXEL_SIZE.sub("", name) + ".tomostar" for name in table["tomogram"]]
    columns: dict[str, Any] = {f"rlnCoordinate{axis.upper()}": table[axis].to_numpy() for axis in axes}
    angstrom = {f"rlnCenteredCoordinate{axis.upper()}Angst": f"{axis}_centered_angstrom" for axis in axes}
    angstrom["rlnPixelSize"] = "pixel_size_angstrom"
    numbers = {name: table[column].replace("", "nan").astype(float).to_numpy() for name, column in angstrom.items()}
    if not any(np.isnan(values).any() for values in numbers.values()):
        columns |= numbers
    columns |= {"rlnTomoName": table["tomogram"].to_numpy(), "rlnMicrographName": warp}
    star = pandas.DataFrame(columns)
    return star.astype({name: float for name in star if name.startswith("rlnCoordinate")})
