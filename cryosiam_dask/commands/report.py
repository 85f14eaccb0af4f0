"""Write the report: one self-contained page, `report.html`, about all tomograms of a prediction folder.

1. Attributes, sizes of components and a thumbnail of the preview are read from the outputs of each tomogram. They are
   cached in the folder ``.ledger/report`` (`summary_of`) until an output changes.
2. Seconds, warnings and failures of the run are added.
3. The share and thickness of the lamella and the share of each class are compared between tomograms. An outlier lies
   more than 3.5 robust standard deviations (1.4826 times the median absolute deviation) from the median, and by more
   than a quarter of the median. Shares of classes are those of the lamella, if all tomograms have one.
4. A template renders the page. Names, warnings and errors come from strangers: the template escapes all of them, and
   the page only allows its own script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from cryosiam_dask._version import __version__
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.endings import denoised_ending
from cryosiam_dask.core.log import FOLDER as LOGS
from cryosiam_dask.core.log import latest_log
from cryosiam_dask.files.atomic import write_bytes
from cryosiam_dask.files.claims import FOLDER
from cryosiam_dask.files.folders import visible, without_predictions
from cryosiam_dask.model.classes import COLOURS, are_images, given_names, hexadecimal, named, percentage
from cryosiam_dask.stages.measurements import claimed_collection
from cryosiam_dask.stages.preview import preview_file
from cryosiam_dask.stages.summary import KEPT, Summary, summary_of

REPORT = "report.html"
PICTURES_BYTES = 11 * 10**6  # of all thumbnails together, so that a page stays below 20 MB
_DEVIATIONS, _EFFECT, _FEWEST = 3.5, 0.25, 5  # thresholds of an outlier, and minimum number of tomograms for one
_BARS, _WIDTH, _HEIGHT, _BELOW = 24, 264, 76, 30  # of a histogram: maximum number of bars, and lengths in pixels


def write_report(
    configuration: Configuration,
    outcomes: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    warnings: Sequence[str] | None = None,
) -> Path:
    """Write the report of a prediction folder, atomically replacing an earlier one.

    Parameters
    ----------
    configuration
        The YAML file that the predictions were made with.
    outcomes
        Attributes of `cryosiam_dask.runs.outcome.Outcome` by name of the tomogram. Failed tomograms without an output
        are listed too.
    warnings
        Warnings about the run as a whole; ``None``: those of the latest run that had any.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    OutputError
        If there is nothing to report, or the report cannot be written.
    """
    folder, outcomes = configuration.prediction_folder, outcomes or {}
    path, state = folder / REPORT, _state(configuration)
    names = sorted(_names(configuration) | set(outcomes), key=_natural)
    if not names:
        raise without_predictions(folder)
    look_at = partial(summary_of, configuration, PICTURES_BYTES // len(names))
    with claimed_collection(folder):  # several jobs may end at the same time
        tomograms = [_with_outcome(look_at(name), outcomes.get(name, {})) for name in names]
        warnings = _kept_warnings(folder, warnings)
        write_bytes(path, _page(configuration, tomograms, warnings, state).encode("utf-8", "replace"))
    return path


def _kept_warnings(folder: Path, warnings: Sequence[str] | None) -> Sequence[str]:
    """Keep the warnings about a run as a whole for later reports, or read those that were kept."""
    note = folder / FOLDER / KEPT / ".run.json"  # no tomogram has this name
    with suppress(OSError, ValueError):
        if warnings is None:
            return [str(sentence) for sentence in json.loads(note.read_bytes())]
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(warnings))
    return warnings or ()


def _state(configuration: Configuration) -> str:
    """Hash everything that the page depends on: settings, and names, sizes and times of files."""
    found = hashlib.sha256(f"{__version__} {configuration.model_dump_json()}".encode("utf-8", "surrogateescape"))
    folder = configuration.prediction_folder
    for each in (folder, folder / FOLDER, configuration.mask_folder, configuration.data_folder):
        with suppress(OSError):  # it may not exist
            for name, size, modified in sorted(_entries(each)) if each is not None else []:
                if each != folder or not (name.startswith(".") or name in (REPORT, LOGS)):
                    found.update(os.fsencode(name) + b"\0%d %d\0" % (size, modified))
    return found.hexdigest()


def _entries(folder: Path) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                status = entry.stat()
                yield entry.name, status.st_size, status.st_mtime_ns


def is_current(configuration: Configuration) -> bool:
    """Whether the report was written with these settings and from the files that exist now."""
    try:
        with (configuration.prediction_folder / REPORT).open("rb") as file:
            return f'<meta name="state" content="{_state(configuration)}">'.encode() in file.read(2000)
    except OSError:
        return False


def link_latest_log(configuration: Configuration) -> None:
    """Update the link to the latest log in a report that `is_current` otherwise."""
    path = configuration.prediction_folder / REPORT
    page, link = path.read_bytes(), _latest_log(configuration)
    if link is not None:
        linked = re.sub(rb'<a href="logs/[^"]*">', lambda _: b'<a href="%s">' % link.encode(), page, count=1)
        if linked != page:
            write_bytes(path, linked)


def _latest_log(configuration: Configuration) -> str | None:
    """Return the address of the latest log, relative to the report."""
    log = latest_log(configuration.prediction_folder)
    return None if log is None else quote(os.fsencode(f"{log.parent.name}/{log.name}"))


def _names(configuration: Configuration) -> set[str]:
    """Return the names of tomograms with outputs in the prediction folder."""
    folder = configuration.prediction_folder
    if not folder.is_dir():
        return set()
    ending = denoised_ending(configuration.file_extension)
    if configuration.denoises:
        return {path.name.removesuffix(ending) for path in visible(folder, ending)}
    names = {path.name.removesuffix("_preds.h5") for path in visible(folder, "_preds.h5")}
    if configuration.save_original_file_extension:
        found = {path.stem for path in visible(folder, ending)}
        # Without the masks of single classes.
        found = {name for name in found if name.rpartition("__")[0] not in found | names}
        names |= {
            name for name in found if name.removesuffix("_labels") not in found - {name}
        }  # labels in another format
    return names


def _with_outcome(tomogram: Summary, outcome: Mapping[str, Any]) -> Summary:
    """Add the outcome of the run to the summary of the outputs."""
    tomogram.status = outcome.get("status") or tomogram.status
    tomogram.shape = tuple(outcome.get("shape") or tomogram.shape)
    tomogram.voxel_size_angstrom = tomogram.voxel_size_angstrom or tuple(outcome.get("voxel_size_angstrom") or ())
    tomogram.voxels = tuple(outcome.get("voxels") or tomogram.voxels)
    tomogram.seconds = outcome.get("seconds") or None
    tomogram.warnings = tuple(dict.fromkeys((*(outcome.get("warnings") or ()), *tomogram.warnings)))
    tomogram.notes = tuple(outcome.get("notes") or ())
    tomogram.error = outcome.get("error") or tomogram.error
    return tomogram


@dataclass(frozen=True, slots=True)
class _Cell:
    """A number of one tomogram; without a `value` it is sorted last."""

    text: str
    value: float | None
    outlier: str = ""


@dataclass(frozen=True, slots=True)
class _Column:
    """A number of all tomograms.

    Attributes
    ----------
    title
        Title of the column.
    group
        Number of the class; 0 if it belongs to none.
    cells
        One for each tomogram.
    histogram
        Title of the histogram and name of the value in outliers; empty for a column without either.
    detail
        Whether the column can be hidden.
    words
        Formats a value.
    """

    title: str
    group: int
    cells: Sequence[_Cell]
    histogram: str = ""
    detail: bool = False
    words: Callable[[float], str] = percentage

    @property
    def median(self) -> float | None:
        values = [cell.value for cell in self.cells if cell.value is not None]
        return float(np.median(values)) if values else None


def _page(configuration: Configuration, tomograms: Sequence[Summary], warnings: Sequence[str], state: str) -> str:
    count = max((len(t.voxels) for t in tomograms), default=0) - 1
    count = max(count, len(configuration.class_names or ()), max((max(t.sizes or [0]) for t in tomograms), default=0))
    given = given_names(configuration) or next((t.class_names for t in tomograms if t.class_names), ())
    names = named(given, count)
    of_lamella = all(t.lamella for t in tomograms if t.voxels) and any(t.lamella for t in tomograms)
    columns = _columns(tomograms, names, of_lamella)
    rows = [_row(number, tomogram, columns, configuration) for number, tomogram in enumerate(tomograms)]
    environment = Environment(
        loader=PackageLoader("cryosiam_dask", "data/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates = files("cryosiam_dask") / "data" / "templates"
    style, script = (templates.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    shares_of = "lamella" if of_lamella else "image" if are_images(t.shape for t in tomograms) else "volume"
    return environment.get_template("report.html").render(
        title="/".join(configuration.data_folder.resolve().parts[-2:]).lstrip("/"),
        folder=str(configuration.prediction_folder),
        model=configuration.trained_model.name.removesuffix(".ckpt"),
        software=f"cryosiam-dask {__version__}",
        log=_latest_log(configuration),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        state=state,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        classes=[(name, hexadecimal(COLOURS[n % len(COLOURS)])) for n, name in enumerate(names)],
        columns=columns,
        groups=_groups(columns),
        details=any(column.detail for column in columns),
        rows=rows,
        counts=_counts(tomograms, rows),
        warnings=warnings,
        histograms=[_histogram(column, rows) for column in columns if column.histogram and _has_histogram(column)],
        deviations=_DEVIATIONS,
        shares_of="" if configuration.denoises else shares_of,
    )


def _has_histogram(column: _Column) -> bool:
    """Whether there are enough values for a histogram, not all of them 0."""
    values = [cell.value for cell in column.cells if cell.value is not None]
    return len(values) >= _FEWEST and any(values)


def _columns(tomograms: Sequence[Summary], names: Sequence[str], of_lamella: bool) -> list[_Column]:
    shapes = [_Cell(" × ".join(map(str, t.shape)), math.prod(t.shape) if t.shape else None) for t in tomograms]
    columns = [
        _Column(f"shape ({'y, x' if are_images(t.shape for t in tomograms) else 'z, y, x'})", 0, shapes),
        _Column("voxel, Å (nm)", 0, [_voxel_size(t) for t in tomograms]),
    ]
    if any(t.lamella is not None for t in tomograms):
        columns.append(_Column("lamella", 0, _shares([t.lamella for t in tomograms]), histogram="lamella"))
    if any(t.thickness for t in tomograms):
        columns.append(_thicknesses(tomograms))
    measured = any(t.sizes is not None for t in tomograms)
    # One unit for the whole column, so that it can be sorted.
    physical = all(t.voxel_nm3() for t in tomograms if t.sizes is not None)
    for label, name in enumerate(names, 1):
        shares = _shares([t.share(label, of_lamella) for t in tomograms])
        columns.append(_Column("share", label, shares, histogram=name))
        if measured:
            columns.append(_Column("number", label, [_number_of(t, label) for t in tomograms], detail=True))
            for title, what in (("median size", "median"), ("largest", "largest")):
                unit = "nm³" if physical else "voxels"
                cells = [_size(t, label, what, physical) for t in tomograms]
                columns.append(_Column(f"{title}, {unit}", label, cells, detail=True))
    if any(t.seconds is not None for t in tomograms):
        columns.append(_Column("time", 0, [_Cell(_duration(t.seconds), t.seconds) for t in tomograms]))
    return columns


def _voxel_size(tomogram: Summary) -> _Cell:
    sizes = tomogram.voxel_size_angstrom
    if not sizes:
        return _Cell("", None)
    angstrom, nm = ([f"{size / by:.4g}" if size else "?" for size in sizes] for by in (1, 10))
    if len(set(angstrom)) == 1:
        angstrom, nm = angstrom[:1], nm[:1]
    text = f"{' × '.join(angstrom)} ({' × '.join(nm)})" if any(sizes) else "?"
    return _Cell(text, min((size for size in sizes if size), default=None))


def _thicknesses(tomograms: Sequence[Summary]) -> _Column:
    """Return the column of mean thickness and its range, in one unit."""
    units = [t.thickness.get("unit") for t in tomograms]
    unit = "nm" if "nm" in units else "voxels"
    means = [t.thickness["mean"] if u == unit else None for t, u in zip(tomograms, units, strict=True)]
    cells = [
        _Cell(
            f"{t.thickness['mean']:.3g} ({t.thickness['lowest']:.3g}\u00a0to\u00a0{t.thickness['highest']:.3g})"
            + ("" if mean is not None else " voxels")
            if t.thickness
            else "",
            mean,
            outlier,
        )
        for t, mean, outlier in zip(tomograms, means, outliers(means), strict=True)
    ]
    return _Column(f"thickness, {unit}", 0, cells, histogram="thickness", words=lambda value: f"{value:.3g} {unit}")


def _shares(shares: Sequence[float | None]) -> list[_Cell]:
    return [
        _Cell("" if share is None else percentage(share), share, outlier)
        for share, outlier in zip(shares, outliers(shares), strict=True)
    ]


def _number_of(tomogram: Summary, label: int) -> _Cell:
    if tomogram.sizes is None:
        return _Cell("", None)
    sizes = tomogram.sizes.get(label)
    return _Cell(f"{sizes.count:,}" if sizes else "0", sizes.count if sizes else 0)


def _size(tomogram: Summary, label: int, what: str, physical: bool) -> _Cell:
    sizes = (tomogram.sizes or {}).get(label)
    if not sizes:
        return _Cell("", None)
    size = float(getattr(sizes, what)) * (tomogram.voxel_nm3() or 1 if physical else 1)
    return _Cell(f"{size:,.0f}" if size >= 100 else f"{size:.3g}", size)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def outliers(values: Sequence[float | None]) -> list[str]:
    """Mark values that lie far from the median as ``"high"`` or ``"low"``, others with an empty string.

    A value is far if it differs from the median by more than 3.5 robust standard deviations (1.4826 times the median
    absolute deviation), and by more than a quarter of the median, so that 4 % is not far from 4.2 % if all values are
    similar. If more than half of the values are equal, 1.2533 times the mean absolute deviation is used instead. Fewer
    than 5 values have no outliers.

    >>> outliers([1, 1.1, 0.9, 1.05, 0.95, 8, None])
    ['', '', '', '', '', 'high', '']
    """
    known = np.array([value for value in values if value is not None], np.float64)
    if len(known) < _FEWEST:
        return [""] * len(values)
    median = float(np.median(known))
    distances = np.abs(known - median)
    # Both estimate the standard deviation of a normal distribution.
    deviation = 1.4826 * float(np.median(distances)) or 1.2533 * float(distances.mean())
    far = max(_DEVIATIONS * deviation, _EFFECT * abs(median)) * (1 + 1e-9)
    return ["" if v is None or abs(v - median) <= far else "high" if v > median else "low" for v in values]


def _row(number: int, tomogram: Summary, columns: Sequence[_Column], configuration: Configuration) -> dict[str, Any]:
    """Return the template's values for a tomogram."""
    cells = [column.cells[number] for column in columns]
    far = [
        f"{column.histogram} unusually {cell.outlier}: {column.words(cell.value)} "
        f"(median {column.words(column.median)})".replace(" %", "\u00a0%")
        for column, cell in zip(columns, cells, strict=True)
        if cell.outlier and cell.value is not None and column.median is not None
    ]
    preview = preview_file(configuration.prediction_folder, tomogram.name).name
    picture = next(iter(tomogram.pictures), None)
    return {
        "id": f"t{number + 1}",
        "name": tomogram.name,
        "status": tomogram.status,
        "cells": list(zip(columns, cells, strict=True)),
        "outliers": far,
        "remarks": {"warning": tomogram.warnings, "note": tomogram.notes},
        "error": tomogram.error,
        "severity": len(far) + 100 * len(tomogram.warnings) + 10_000 * bool(tomogram.error),
        "look": bool(far or tomogram.warnings or tomogram.error or tomogram.status in ("failed", "missing")),
        "preview": quote(os.fsencode(preview)) if picture else None,
        "picture": f"data:image/webp;base64,{base64.b64encode(picture).decode()}" if picture else None,
    }


def _groups(columns: Sequence[_Column]) -> list[tuple[int, int, int]]:
    """Group neighbouring columns of a class: its number, the number of columns, and that without details."""
    groups: list[tuple[int, int, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            _, wide, narrow = groups.pop()
        else:
            wide = narrow = 0
        groups.append((column.group, wide + 1, narrow + (not column.detail)))
    return groups


def _counts(tomograms: Sequence[Summary], rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """Return the numbers above the table, each with its label and CSS class."""
    done = sum(t.status in ("done", "skipped") for t in tomograms)
    failed = sum(t.status == "failed" for t in tomograms)
    warned = sum(bool(t.warnings) for t in tomograms)
    far = sum(bool(row["outliers"]) for row in rows)
    return [
        (len(tomograms), "tomogram" if len(tomograms) == 1 else "tomograms", ""),
        (done, "done", "good"),
        (failed, "failed", "bad" if failed else ""),
        (warned, "with warnings", "care" if warned else ""),
        (far, "outlier" if far == 1 else "outliers", "far" if far else ""),
    ]


def _histogram(column: _Column, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the geometry of a histogram in pixels, and its texts."""
    values = np.array([cell.value for cell in column.cells if cell.value is not None], np.float64)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    low = 0.0 if low < 0.4 * high else low  # an axis from 0 is easier to read
    if high <= low:
        low, high = max(0.0, low - 0.01), high + 0.01
    count = int(np.clip(1.7 * math.sqrt(len(values)), 8, _BARS))
    counts, edges = np.histogram(values, count, (low, high))
    inside = [cell for cell in column.cells if cell.value is not None and not cell.outlier]
    far = [
        (_across(cell.value, low, high), row["id"], row["name"], column.words(cell.value))
        for row, cell in zip(rows, column.cells, strict=True)
        if cell.outlier and cell.value is not None
    ]
    median = column.median
    step = _WIDTH / count
    usual = (min(c.value or 0 for c in inside), max(c.value or 0 for c in inside)) if inside else None
    words = f"{column.histogram}: {len(values)} tomograms"
    if median is not None and usual:
        words += f", median {column.words(median)}, without outliers from {column.words(usual[0])} to "
        words += f"{column.words(usual[1])}, {len(far)} outlier{'' if len(far) == 1 else 's'}"
    return {
        "title": column.histogram,
        "group": column.group,
        "words": words,
        "bars": [
            {
                "x": f"{i * step + 0.75:.2f}",
                "width": f"{step - 1.5:.2f}",
                "height": f"{max(2.0, _HEIGHT * n / counts.max()):.2f}",
                "y": f"{_HEIGHT - max(2.0, _HEIGHT * n / counts.max()):.2f}",
                "words": f"{column.words(float(edges[i]))} to {column.words(float(edges[i + 1]))}: {n}",
            }
            for i, n in enumerate(counts.tolist())
            if n
        ],
        "outliers": [(f"{x:.2f}", row, name, text) for x, row, name, text in far],
        "median": None if median is None else (f"{_across(median, low, high):.2f}", column.words(median)),
        "low": column.words(low),
        "high": column.words(high),
        "width": _WIDTH,
        "height": _HEIGHT,
        "total": _HEIGHT + _BELOW,
    }


def _across(value: float, low: float, high: float) -> float:
    return _WIDTH * (value - low) / (high - low)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts TS_2 before TS_10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part.lower()) for part in re.split(r"(\d+)", name)]
