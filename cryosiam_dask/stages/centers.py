"""Particle lists: the centres of each class's components, for RELION 5, Warp and spreadsheets.

For each class, a tomogram has the files ``<stem>_class<k>_centers.star`` and ``.csv``, and a folder has the files
``class<k>_centers.star`` and ``.csv`` with the particles of all its tomograms, and ``class<k>_relion_import.star``. If
class 2 is named particle, its files are called ``class2_particle…``. As in CryoSiam, each class may be eroded once,
components (26 neighbours) count if they have more than a given number of voxels, and the centre is the mean of the
voxel indices.

Coordinates are in voxels of the segmented tomogram, and 0 is the centre of the first voxel. CryoSiam's viewer, napari
and Warp use the same convention, and so does RELION, where the centre of n voxels is at n / 2. A STAR file has the
columns

================================== =====================================================================================
``rlnCoordinateX``, …              in voxels of the segmented tomogram (Warp: ``--coords_angpix`` is their size)
``rlnCenteredCoordinateXAngst``, … in Å from the centre of the tomogram, independent of binning; RELION 5 prefers them
``rlnPixelSize``                   in Å
``rlnTomoName``                    the tomogram's name without its extension, dots included: ``TS_018_9.96Apx``
``rlnMicrographName``              Warp's name of the tilt series: the same without ``_9.96Apx``, plus ``.tomostar``
================================== =====================================================================================

If the voxel size is unknown, the columns in Å are missing. There are no orientations. The first column is a number,
because a row that begins with ``_``, ``data_`` or ``#`` would not be read as a row; names that begin like that are
quoted. The first line of a tomogram's list identifies the labels that it was made from (see `labels_of`).

`write_cryosiam_centers` writes lists in CryoSiam's own format.

RELION 5 imports ``class<k>_relion_import.star``. It lists, for each tomogram, its ``rlnTomoName`` and the absolute path
of its list, ``rlnTomoImportParticleFile``, so that any RELION project finds it. (RELION also accepts a wildcard, but
if that matches a single file, RELION reads the file as such an index.) Lists that RELION refuses or misplaces are left
out: those without particles, without voxel size, and of images.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.errors import ConfigurationError, LabelsError, OutputError
from cryosiam_dask.files.atomic import write_bytes
from cryosiam_dask.files.folders import visible
from cryosiam_dask.model.classes import file_names
from cryosiam_dask.stages.components import Components, find_components
from cryosiam_dask.stages.measurements import (
    CONNECTIVITY,
    STAR_MARK,
    claimed_collection,
    component_table,
    made_here,
    require_own,
    voxel_size,
    write_table,
)

_LARGEST_CLASS = 255  # labels of classes are bytes
#: File names of the lists of a tomogram, and of all tomograms. No class name looks like the number of another class.
_TOMOGRAM_LIST = re.compile(r"(.+)_(class(\d+)(?:_.+)?)_centers\.(?:csv|star)")
_COLLECTED_LIST = re.compile(r"class\d+(?:_(?!.*class\d).+)?_(?:centers\.(?:csv|star)|relion_import\.star)")
_NOT_COORDINATES = ("tomogram", "class", "class_name", "voxels")  # columns that hold no coordinates
#: Values that a STAR file would misinterpret. `starfile` itself quotes values with spaces.
_TO_QUOTE = re.compile(r"(?!.* )(?:[_#$;\[\]]|(?:data|loop|save|stop|global)_|.*#|[.?]$)", re.IGNORECASE)
#: Stand-ins, which no name contains, for bytes of a path that are not text, which pandas does not accept.
_SURROGATES = {0xDC00 + byte: 0x10FF00 + byte for byte in range(0x80, 0x100)}
_WARPS_PIXEL_SIZE = re.compile(r"_\d+(\.\d+)?Apx$")  # Warp appends it to the name of the tilt series


@dataclass(frozen=True, slots=True)
class Eroded:
    """Labels with each class eroded once, computed when a region is read.

    A voxel stays if its neighbours across all faces have its class. The result equals ``scipy.ndimage.binary_erosion``
    of each class in the whole volume, for any region.

    Parameters
    ----------
    labels
        (z, y, x) or (y, x), integers.
    border
        Whether voxels outside the volume count as of the class (scipy's ``border_value``).
    """

    labels: Sliceable
    border: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the labels."""
        return tuple(self.labels.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the labels."""
        return self.labels.dtype

    @property
    def chunks(self) -> Any:
        """Chunk shape of the labels; ``None`` without chunks."""
        return getattr(self.labels, "chunks", None)

    def __getitem__(self, region: tuple[slice, ...], /) -> NDArray[Any]:
        halo = [(min(part.start, 1), min(n - part.stop, 1)) for part, n in zip(region, self.shape, strict=True)]
        outer = tuple(slice(p.start - low, p.stop + high) for p, (low, high) in zip(region, halo, strict=True))
        width = [(1 - low, 1 - high) for low, high in halo]
        block = np.pad(np.asarray(self.labels[outer]), width, mode="edge" if self.border else "constant")
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
    labels: Sliceable,
    *,
    min_voxels: int | Sequence[int] = 0,
    erode: bool = False,
    classes: Iterable[int] = (),
    class_names: Sequence[str] = (),
    voxel_size_angstrom: Sequence[float | None] | None = None,
    made_from: str = "",
    tilt_series_pattern: str | None = None,
    executor: Executor = SERIAL,
) -> dict[int, int]:
    """Find the centres in a tomogram and write its lists; all earlier ones are replaced.

    Parameters
    ----------
    folder, stem
        Folder of the files, and the tomogram's name.
    labels
        (z, y, x) or (y, x), integers, 0 is background.
    min_voxels
        Components with at most this many voxels (after erosion) are left out; a sequence has a number for each class.
    erode
        Whether to erode each class once.
    classes
        Classes that get a file even if they have no particles.
    class_names
        Names of the classes from 1 on, used in file names; the last classes may be without one.
    voxel_size_angstrom
        Along z, y and x (or y and x); ``None`` where unknown.
    made_from
        Identifies the labels, see `labels_of`.
    tilt_series_pattern
        Regular expression that finds the name of the tilt series in the tomogram's name: its match or, if it has a
        group, the first group.
    executor
        Runs the tasks.

    Returns
    -------
    dict
        The number of particles of each class.

    Raises
    ------
    LabelsError
        If the labels are not integers, are negative, or number instances rather than classes.
    OutputError
        If a file cannot be written or was made by another program, or a STAR file cannot hold the tomogram's name.
    """
    if not stem.isprintable() or "'" in stem or '"' in stem:
        raise OutputError(
            "the name of a tomogram in a STAR file must have printable letters and no quotation marks, which other "
            "programs misread",
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
            remedy="Use the file of labels that the instances were made from",
        )
    series = _tilt_series(stem, tilt_series_pattern)
    selected = components.select(components.voxels > _smallest(min_voxels, components.classes))
    table = center_table(selected, stem, voxel_size_angstrom, class_names=class_names)
    counts = {}
    paths = {label: folder / f"{stem}_{_called(label, class_names)}_centers" for label in sorted(found.union(classes))}
    require_own(*(path.with_name(path.name + ending) for path in paths.values() for ending in (".csv", ".star")))
    for label, path in paths.items():
        own = table[table["class"] == label]
        _write(path, own, {stem: series}, made_from)
        counts[label] = len(own)
    _remove(folder, stem, keep={path.name for path in paths.values()})
    return counts


def _smallest(min_voxels: int | Sequence[int], classes: NDArray[Any]) -> NDArray[np.int64]:
    """Return, for each component, the number of voxels that it must exceed.

    Raises
    ------
    ConfigurationError
        If a class has no number.
    """
    if isinstance(min_voxels, int):
        return np.full(len(classes), min_voxels)
    if len(classes) and classes.max() > len(min_voxels):
        raise ConfigurationError(
            "must have one number for each class", place="key parameters.network.min_voxels",
            value=f"{len(min_voxels)} numbers, but class {classes.max()}", remedy="Add numbers for the other classes",
        )  # fmt: skip
    return np.array([0, *min_voxels])[np.asarray(classes, np.int64)]


def cryosiam_centers(
    stem: str, labels: Sliceable, *, min_voxels: int | Sequence[int] = 100, executor: Executor = SERIAL
) -> Any:
    """Find the particles of a tomogram like CryoSiam's ``semantic_to_centers``.

    Each class is eroded once, with voxels outside the volume counting as inside; components (26 neighbours) count if
    they have more than `min_voxels` voxels.

    Parameters
    ----------
    stem, labels, min_voxels, executor
        See `write_centers`.

    Returns
    -------
    pandas.DataFrame
        The columns of CryoSiam's CSV files after ``class``. ``label`` numbers the components of a class in C order,
        small ones included, so numbers may be missing. ``area`` is the number of voxels after erosion, ``centroid-0`` …
        are z, y and x (y and x of an image) in voxels from 0, and ``tomo`` is the tomogram's name.
    """
    import pandas

    components = find_components(
        Eroded(labels, border=True), connectivity=CONNECTIVITY, measure=True, executor=executor
    )
    assert components.measurements is not None
    numbers = np.zeros(len(components), np.int64)
    for label in np.unique(components.classes):
        of_class = components.classes == label
        numbers[of_class] = np.arange(1, np.count_nonzero(of_class) + 1)
    centroids = components.measurements.centroids[:, -len(labels.shape) :]
    table = pandas.DataFrame(
        {
            "class": np.asarray(components.classes, np.int64),
            "label": numbers,
            "area": components.voxels.astype(np.float64),
            **{f"centroid-{axis}": centroids[:, axis] for axis in range(centroids.shape[1])},
            "tomo": stem,
        }
    )
    return table[components.voxels > _smallest(min_voxels, components.classes)]


def write_cryosiam_centers(
    folder: Path, tables: Mapping[str, Any], classes: int, *, there: Callable[[str], bool] | None = None
) -> dict[int, int]:
    """Write ``labels_<class>.csv`` and ``labels_<class>_particles.star``, as cryosiam_vis reads them.

    Parameters
    ----------
    folder
        Folder of the files.
    tables
        `cryosiam_centers` of each tomogram, by name. Rows of other tomograms in existing files are kept.
    classes
        Number of classes that get files, even without particles.
    there
        Returns whether the prediction of another tomogram still exists; if not, its rows are removed.

    Returns
    -------
    dict
        The number of particles of each class in all tomograms.

    Raises
    ------
    OutputError
        If an existing file is not a list in CryoSiam's format, or a file cannot be written.
    """
    import pandas
    import starfile

    with claimed_collection(folder):
        found = {}
        for label in range(1, classes + 1):
            path = folder / f"labels_{label}.csv"
            parts = [table[table["class"] == label].drop(columns="class") for table in tables.values()]
            if (before := _earlier(path)) is not None:
                others = ~before["tomo"].isin(list(tables)) & before["tomo"].map(there or (lambda _: True)).astype(bool)
                parts.append(before[others])
            filled = [part for part in parts if len(part)]
            found[label] = pandas.concat(filled or parts[:1], ignore_index=True)
            found[label] = found[label].sort_values("tomo", kind="stable", ignore_index=True)
        for label, table in found.items():
            write_bytes(folder / f"labels_{label}.csv", table.to_csv(index=False).encode(errors="surrogateescape"))
            text = starfile.to_string(_cryosiam_star(table))
            write_bytes(folder / f"labels_{label}_particles.star", text.encode(errors="surrogateescape"))
    return {label: len(table) for label, table in found.items()}


def _cryosiam_star(table: Any) -> Any:
    """Convert a list to the columns of CryoSiam's STAR files; an image has no Z, and an empty list no columns."""
    centroids = [name for name in table if name.startswith("centroid-")]
    axes = dict(zip(centroids, "ZYX"[3 - len(centroids) :], strict=True))
    columns = {name: f"rlnCoordinate{axis}" for name, axis in axes.items()}
    columns |= {"label": "rlnLabel", "area": "rlnArea", "tomo": "rlnMicrographName"}
    return table.rename(columns=columns) if len(table) else table[[]]


def _earlier(path: Path) -> Any:
    """Read an existing list in CryoSiam's format; ``None`` if there is none."""
    import pandas

    try:
        table = pandas.read_csv(path, dtype={"tomo": "str"}, keep_default_na=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        table, why = None, str(error)
    if table is None or list(table)[:2] != ["label", "area"] or list(table)[-1] != "tomo":
        raise OutputError(
            "an existing file of this name must be a particle list in CryoSiam's format, so that rows can be added",
            place=path,
            value="other columns" if table is not None else why,
            remedy="Move it elsewhere",
        ) from None
    return table


def _called(label: int, class_names: Sequence[str]) -> str:
    """Return the name of a class in file names: its number, and its name if it has one.

    >>> _called(2, ["membrane", "ER / Golgi"]), _called(2, ["membrane", "class 2"]), _called(2, ["membrane"])
    ('class2_ER_Golgi', 'class2', 'class2')
    """
    if label > len(class_names) or class_names[label - 1] == f"class {label}":
        return f"class{label}"
    name = re.sub(r"class(?=\d)", "class-", file_names(class_names)[label - 1], flags=re.IGNORECASE)
    return f"class{label}_{name}"


def _lists_of(folder: Path, stem: str) -> list[Path]:
    """Return all lists of a tomogram, whatever the names of its classes."""
    return sorted(
        path
        for path in folder.glob(f"{glob.escape(stem)}_class*_centers.*")
        if (match := _TOMOGRAM_LIST.fullmatch(path.name)) and match[1] == stem
    )


def _remove(folder: Path, stem: str, keep: Collection[str]) -> None:
    """Remove the lists of a tomogram except those in `keep` (names without ending)."""
    for path in _lists_of(folder, stem):
        if path.stem not in keep and path.is_file() and made_here(path):
            path.unlink()


def labels_of(prediction: Path, attributes: Mapping[str, Any]) -> str:
    """Return an identifier of a prediction's labels: its fingerprint or, without one, the file's size and time."""
    fingerprint = attributes.get("fingerprint")
    if isinstance(fingerprint, str) and fingerprint:
        return fingerprint
    status = prediction.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _made_from(path: Path) -> str:
    """Return the identifier of the labels that a STAR file was made from (see `labels_of`); empty if unknown."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except OSError:
        return ""
    return first.removeprefix(STAR_MARK).strip() if first.startswith(STAR_MARK) else ""


def remove_outdated_centers(folder: Path, stem: str, made_from: str) -> bool:
    """Remove the lists of a tomogram that were made from other labels.

    Parameters
    ----------
    folder, stem, made_from
        See `write_centers`.

    Returns
    -------
    bool
        Whether there were any.
    """
    found = [path for path in _lists_of(folder, stem) if path.suffix == ".star" and made_here(path)]
    if not found or _made_from(found[0]) == made_from:
        return False
    _remove(folder, stem, keep=())
    return True


def center_table(
    components: Components,
    tomogram: str,
    voxel_size_angstrom: Sequence[float | None] | None = None,
    *,
    class_names: Sequence[str] = (),
) -> Any:
    """Return the centres of components as a pandas.DataFrame.

    Its columns are ``tomogram``, ``class``, ``voxels``, ``z``, ``y``, ``x`` (voxels from 0; no ``z`` for an image);
    for each axis ``…_angstrom`` from the centre of the first voxel and ``…_centered_angstrom`` from the centre of the
    tomogram, n / 2; ``pixel_size_angstrom`` (along x); and ``class_name``. Columns in Å are NaN if the voxel size is
    unknown.

    Parameters
    ----------
    components, tomogram, voxel_size_angstrom, class_names
        See `cryosiam_dask.stages.measurements.component_table`.

    Raises
    ------
    LabelsError
        If the components were not measured.
    """
    measured = component_table(components, tomogram, voxel_size_angstrom, class_names=class_names)
    blocks = components.labelling.blocks
    axes = "zyx"[3 - blocks.ndim :]
    table = measured[["tomogram", "class", "voxels", *axes, *(f"{axis}_angstrom" for axis in axes)]].copy()
    size = voxel_size(blocks.ndim, voxel_size_angstrom)
    for i, axis in enumerate(axes, start=3 - blocks.ndim):
        table[f"{axis}_centered_angstrom"] = (table[axis] - blocks.shape[i] / 2) * size[i]
    table["pixel_size_angstrom"] = size[2]
    table["class_name"] = measured["class_name"]
    return table


def _tilt_series(stem: str, pattern: str | None) -> str:
    """Return the name of a tomogram's tilt series.

    Raises
    ------
    OutputError
        If the pattern does not match its name.
    """
    if pattern is None:
        return _WARPS_PIXEL_SIZE.sub("", stem)
    match = re.search(pattern, stem)
    name = match and (match[1] if match.re.groups else match[0])
    if not name:
        raise OutputError(
            "the key tilt_series_pattern must match the name of every tomogram",
            place=stem,
            value=f"no match of {pattern}",
            remedy="Correct the pattern",
        )
    return name


def collect_centers(
    folder: Path,
    labels_now: Callable[[str], str | None] | None = None,
    *,
    tilt_series_pattern: str | None = None,
) -> list[str]:
    """Join the lists of all tomograms of a folder to one for each class, and write the index that RELION imports.

    Parameters
    ----------
    folder
        Folder of the lists.
    labels_now
        Returns the identifier of a tomogram's current labels (see `labels_of`), or ``None`` if it has none. Lists of
        tomograms without labels are left out, and lists made from other labels are removed. By default all lists count.
    tilt_series_pattern
        See `write_centers`.

    Returns
    -------
    list of str
        The tomograms whose lists were made from other labels.

    Raises
    ------
    OutputError
        If a list cannot be read, or the result cannot be written or would replace a file of another program.
    """
    import pandas

    outdated: dict[str, None] = {}
    with claimed_collection(folder):
        parts: dict[int, list[Any]] = {}
        of_relion: dict[int, list[tuple[str, str]]] = {}
        now: dict[str, str | None] = {}
        series: dict[str, str] = {}
        called: dict[int, str] = {}
        for path in visible(folder, "_centers.csv"):
            match = _TOMOGRAM_LIST.fullmatch(path.name)
            star = path.with_suffix(".star")
            if match and (made_here(star) or made_here(path)):
                if labels_now:
                    stem = match[1]
                    labels = now[stem] if stem in now else now.setdefault(stem, labels_now(stem))
                    found = _made_from(star)
                    if labels is not None and found != labels:
                        outdated[stem] = None
                        # Lists of earlier versions do not identify their labels, so they may be up to date.
                        for each in filter(made_here, (path, star) if found else ()):
                            each.unlink()
                    if found != labels:
                        continue
                try:
                    # As text, so that no digit changes and no name is read as a number or as missing.
                    table = pandas.read_csv(path, dtype="str", keep_default_na=False)
                    coordinates = [name for name in table if name not in _NOT_COORDINATES]
                    table[coordinates].replace("", "nan").astype(float)
                    label = int(match[3])
                    parts.setdefault(label, []).append(table)
                    called[label] = max(called.get(label, ""), match[2], key=len)  # prefer a name to none
                    series |= {name: _tilt_series(name, tilt_series_pattern) for name in table["tomogram"][:1]}
                    if len(table) and "rlnCenteredCoordinateZAngst" in _star(table, series):
                        row = str(path.resolve().with_suffix(".star")).translate(_SURROGATES), table["tomogram"][0]
                        of_relion.setdefault(label, []).append(row)
                except (OSError, ValueError, KeyError) as error:
                    raise OutputError(
                        "the particle list must be readable to be collected",
                        place=path,
                        value=error,
                        remedy="Remove the file and run 'cryosiam-dask semantic-to-centers' again",
                    ) from None
        endings = ("centers.csv", "centers.star", "relion_import.star")
        require_own(*(folder / f"{called[label]}_{ending}" for label in parts for ending in endings))
        wanted = {f"{called[label]}_{ending}" for label in parts for ending in endings[:2]}
        wanted |= {f"{called[label]}_{endings[2]}" for label in of_relion}
        for label, tables in parts.items():
            _write(folder / f"{called[label]}_centers", pandas.concat(tables, ignore_index=True), series)
        for label, rows in of_relion.items():
            index = pandas.DataFrame(rows, columns=["rlnTomoImportParticleFile", "rlnTomoName"])
            _write_star(folder / f"{called[label]}_relion_import.star", index)
        for path in folder.iterdir():
            if path.name not in wanted and _COLLECTED_LIST.fullmatch(path.name) and made_here(path):
                path.unlink()
    return list(outdated)


def _write(path: Path, table: Any, series: Mapping[str, str], made_from: str = "") -> None:
    """Write a list as CSV and STAR, with the tilt series of each tomogram; `path` has no ending."""
    text, star = (path.with_name(f"{path.name}{ending}") for ending in (".csv", ".star"))
    write_table(text, table)
    _write_star(star, _star(table, series), made_from)


def _write_star(path: Path, table: Any, made_from: str = "") -> None:
    import starfile

    quoted = table.map(lambda value: f'"{value}"' if isinstance(value, str) and _TO_QUOTE.match(value) else value)
    text = f"{f'{STAR_MARK} {made_from}'.rstrip()}\n{starfile.to_string(quoted)}"
    write_bytes(path, text.translate({new: old for old, new in _SURROGATES.items()}).encode(errors="surrogateescape"))


def _star(table: Any, series: Mapping[str, str]) -> Any:
    """Convert a list to the columns of a STAR file."""
    import pandas

    axes = [axis for axis in "xyz" if axis in table]
    warp = [series[name] + ".tomostar" for name in table["tomogram"]]
    columns: dict[str, Any] = {f"rlnCoordinate{axis.upper()}": table[axis].to_numpy() for axis in axes}
    angstrom = {f"rlnCenteredCoordinate{axis.upper()}Angst": f"{axis}_centered_angstrom" for axis in axes}
    angstrom["rlnPixelSize"] = "pixel_size_angstrom"
    numbers = {name: table[column].replace("", "nan").astype(float).to_numpy() for name, column in angstrom.items()}
    if not any(np.isnan(values).any() for values in numbers.values()):
        columns |= numbers
    columns |= {"rlnTomoName": table["tomogram"].to_numpy(), "rlnMicrographName": warp}
    star = pandas.DataFrame(columns)
    return star.astype({name: float for name in star if name.startswith("rlnCoordinate")})
