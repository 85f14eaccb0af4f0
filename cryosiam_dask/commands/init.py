"""Write a first `pipeline.yaml` for a folder of tomograms.

Format, shape and voxel size come from the headers, range and contrast from a sample of the voxels; comments explain
them. Facts that no file contains, such as whether the tomograms are denoised, are marked with `MARK`.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosiam_dask.commands.console import counted
from cryosiam_dask.config import read_pipeline
from cryosiam_dask.core.diagnosis import distinct_digits, scaling
from cryosiam_dask.core.endings import TOMOGRAM_ENDINGS
from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, OutputError, Problems, not_there
from cryosiam_dask.files.folders import visible
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.model.published import PUBLISHED, parse
from cryosiam_dask.runs.plan import FAR_OFF
from cryosiam_dask.stages.intensities import Sample, contrast, intensities, sample_file

#: Begins a comment about something that only the user knows.
MARK = "CHECK:"
#: Quantiles of the voxels that CryoSiam's own preparation scales to 0 and 1 (`processing_invert_scale`).
_QUANTILES = (0.001, 0.999)
_SAMPLED = 5  # tomograms whose voxels are sampled, evenly spaced over all of them

_OUTPUTS = ("_preds.h5", "_components.h5", "_labels.mrc")  # and <stem>__<class>.mrc


@dataclass(frozen=True, slots=True)
class Collection:
    """The tomograms of a folder.

    Attributes
    ----------
    folder
        Absolute path of the folder.
    ending
        Ending of the tomograms' names, with its dot.
    headers
        Headers of the readable tomograms, sorted by name.
    problems
        Errors of the unreadable tomograms.
    others
        Number of tomograms with each other ending.
    outputs
        Names of files with `ending` that are outputs of this program.
    scaling
        Intensities that become 0 and 1.
    contrast
        Contrast of the sampled tomograms; ``None`` if it is not clear.
    doubts
        Facts that the user should check.
    """

    folder: Path
    ending: str
    headers: tuple[TomogramHeader, ...]
    problems: tuple[CryosiamDaskError, ...]
    others: dict[str, int]
    outputs: tuple[str, ...]
    scaling: tuple[float, float]
    contrast: str | None
    doubts: tuple[str, ...]


def read_folder(folder: Path, dataset: str | None = None) -> Collection:
    """Read all headers of a folder of tomograms, and sample the voxels of a few.

    Parameters
    ----------
    folder
        Folder of the tomograms.
    dataset
        Dataset of HDF5 files; ``None``: the only one that can be a tomogram.

    Raises
    ------
    ConfigurationError
        If the folder holds no tomogram.
    Problems
        If none of them can be read.
    """
    folder = folder.expanduser().absolute()
    by_ending, outputs = _by_ending(folder)
    if not by_ending:
        _refuse(folder)
    ending = max(by_ending, key=lambda each: (len(by_ending[each]), -TOMOGRAM_ENDINGS.index(each)))
    headers, problems = [], []
    for path in by_ending[ending]:
        try:
            headers.append(read_header(path, dataset=dataset))
        except CryosiamDaskError as error:
            problems.append(error)
    if not headers:
        raise Problems(problems)
    sampled = headers[:: -(-len(headers) // _SAMPLED)]
    samples = [sample_file(header) for header in sampled]
    bounds, doubts = _scaling(samples)
    found = Counter(contrast(sample) for sample in samples)
    known = [each for each in found if each is not None]
    if len(known) == 2:
        doubts.append("some of the tomograms look dark on bright and some bright on dark")
    return Collection(
        folder,
        ending,
        tuple(headers),
        tuple(problems),
        {other: len(paths) for other, paths in by_ending.items() if other != ending},
        tuple(name for name in outputs if name.endswith(ending)),
        bounds,
        known[0] if len(known) == 1 else None,
        tuple(doubts),
    )


def _by_ending(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Find the tomograms in a folder, by ending, and the names of outputs among them."""
    found: dict[str, list[Path]] = {}
    outputs: list[str] = []
    try:
        paths = visible(folder)
    except OSError as error:
        raise ConfigurationError(
            "must be a readable folder",
            place=folder,
            value=error.strerror,
            remedy="Give the folder that holds the tomograms",
        ) from None
    stems = {path.name.removesuffix(ending) for path in paths for ending in (*TOMOGRAM_ENDINGS, *_OUTPUTS)}
    for path in paths:
        ending = next((each for each in TOMOGRAM_ENDINGS if path.name.endswith(each)), None)
        if not ending or path.is_dir() != ending.endswith(".zarr"):
            continue
        stem, mask, _ = path.name.removesuffix(ending).rpartition("__")
        if path.name.endswith(_OUTPUTS) or (mask and stem in stems):
            outputs.append(path.name)
        else:
            found.setdefault(ending, []).append(path)
    return found, outputs


def _refuse(folder: Path) -> None:
    below = [path for path in visible(folder) if path.is_dir() and os.access(path, os.R_OK | os.X_OK)]
    near = next((path for path in below if _by_ending(path)[0]), None)
    raise ConfigurationError(
        "must hold tomograms: files that end with .mrc, .rec, .map, .st or .ali (each also with .gz), .h5 or .hdf5, "
        "or folders that end with .zarr",
        place=folder,
        value=f"none, but some in {near}" if near else "none",
        remedy="Give the folder that holds the tomograms",
    )


def _scaling(samples: Sequence[Sample]) -> tuple[tuple[float, float], list[str]]:
    """Choose the intensities that become 0 and 1 for all tomograms, and list doubts about them."""
    unscaled = [intensities(sample, 0, 1) for sample in samples]
    if not any(scaling(each.below, each.above, each.central, 0, 1) for each in unscaled):
        return (0.0, 1.0), []
    finite = [sample.values[np.isfinite(sample.values)] for sample in samples]
    bounds = np.array([np.quantile(values, _QUANTILES) for values in finite if values.size])
    if not len(bounds) or (bounds[:, 0] == bounds[:, 1]).any():
        return (0.0, 1.0), ["some of the tomograms are empty: all their voxels are equal or not finite"]
    low, high = np.median(bounds, axis=0)
    spans = bounds[:, 1] - bounds[:, 0]
    apart = spans.max() > 2 * spans.min() or np.ptp(bounds[:, 0]) > spans.min()
    doubts = ["the tomograms differ in the range of their intensities: scale them to one range first"] if apart else []
    low, high = map(float, distinct_digits(low, high))
    return (low, high), doubts


def find_models(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Find the checkpoints in some folders, by use: ``lamella`` (one class) or ``semantic``."""
    paths = sorted({path.absolute() for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt")})
    found: dict[str, list[Path]] = {"lamella": [], "semantic": []}
    if not paths:
        return found
    from cryosiam_dask.model.checkpoint import read_checkpoint  # with torch, which takes seconds

    for path in paths:
        try:
            architecture = read_checkpoint(path).architecture
        except CryosiamDaskError:
            continue  # for another task, or damaged
        if not architecture.denoises:
            found["lamella" if architecture.out_channels == 1 else "semantic"].append(path)
    return found


def write_pipeline(
    folder: Path,
    output: Path,
    *,
    lamella: str | None = None,
    semantic: str | None = None,
    dataset: str | None = None,
) -> tuple[Collection, str]:
    """Write a pipeline for the tomograms of a folder.

    Parameters
    ----------
    folder
        Folder of the tomograms.
    output
        The YAML file. Predictions go to ``predictions/lamella`` and ``predictions/semantic`` beside it.
    lamella, semantic
        Values of ``trained_model``. ``None``: the only checkpoint of its kind beside the YAML file or the tomograms,
        or in a folder ``models`` there; without exactly one, CryoSiam's published model.
    dataset
        See `read_folder`.

    Returns
    -------
    tuple
        The tomograms, and the text that was written.

    Raises
    ------
    ConfigurationError, Problems
        See `read_folder`; also if a model does not exist.
    OutputError
        If the file exists or cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise _exists(output)
    models, doubts = {"lamella": _model("lamella", lamella), "semantic": _model("semantic", semantic)}, []
    found = read_folder(folder, dataset)
    base = output.absolute().parent
    if None in models.values():
        near = find_models(each for at in (base, found.folder, found.folder.parent) for each in (at, at / "models"))
        for name, published in (("lamella", "cryosiam_lamella"), ("semantic", "cryosiam_semantic_segmentation")):
            if models[name] is None:
                models[name] = str(near[name][0]) if len(near[name]) == 1 else published
            if len(near[name]) > 1:
                doubts.append(f"which model is meant for {name}: {', '.join(map(str, near[name]))}")
    text = _text(found, output, {name: str(model) for name, model in models.items()}, dataset, doubts)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
        read_pipeline(output)
    except FileExistsError:
        raise _exists(output) from None
    except (OSError, UnicodeError, CryosiamDaskError) as error:
        with suppress(OSError):
            output.unlink()
        if isinstance(error, CryosiamDaskError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "a name that is not UTF-8"
        raise OutputError(
            "the file must be writable", place=output, value=reason, remedy="Choose another one with --output"
        ) from None
    return found, text


def _model(name: str, given: str | None) -> str | None:
    """Return a value of ``trained_model``; paths become absolute, so that they hold in every folder."""
    if given is None:
        return None
    try:
        model = parse(given)
    except ValueError:
        return given  # reported when the file is read
    if not isinstance(model, Path):
        return given
    if not model.expanduser().exists():
        raise ConfigurationError(not_there(model), place=f"option --{name}", remedy="Correct it, or remove it")
    return str(model.expanduser().absolute())


def _exists(output: Path) -> OutputError:
    return OutputError(
        "an existing file is not replaced", place=output, remedy="Choose another one with --output, or remove it"
    )


def summary(found: Collection) -> list[str]:
    """Summarise the tomograms of a folder in lines of text."""
    headers = found.headers
    shapes = Counter(header.shape for header in headers)
    most, count = shapes.most_common(1)[0]
    shape = (
        f"{' × '.join(map(str, most))} voxels (z, y, x)" if len(most) == 3 else f"{most[0]} × {most[1]} pixels (y, x)"
    )
    if len(shapes) > 1:
        shape += f" in {count} of them, {counted(len(shapes) - 1, 'other shape')}"
    kinds = Counter(header.kind for header in headers)
    lines = [
        f"{counted(len(headers), f'{found.ending} tomogram')} in {found.folder}",
        f"{shape}; {', '.join(kinds)}",
        f"voxel size: {_voxel_sizes(headers)}",
        f"contrast: {found.contrast or 'not clear'}",
    ]
    if found.others:
        others = ", ".join(f"{number} {ending}" for ending, number in found.others.items())
        lines.append(f"left out, because file_extension is {found.ending}: {others}")
    if found.outputs:
        more = f" and {len(found.outputs) - 3} more" if len(found.outputs) > 3 else ""
        lines.append(f"left out, because they are outputs: {', '.join(found.outputs[:3])}{more}")
    if found.problems:
        lines.append(f"cannot be read: {len(found.problems)}, such as {found.problems[0]}")
    return lines


def _voxel_sizes(headers: Sequence[TomogramHeader]) -> str:
    sizes = sorted({round(size, 2) for header in headers for size in header.voxel_size_angstrom if size})
    unknown = sum(None in header.voxel_size_angstrom for header in headers)
    known = "" if not sizes else f"{sizes[0]:g} Å" if len(sizes) == 1 else f"{sizes[0]:g} to {sizes[-1]:g} Å"
    if not unknown:
        return known
    return f"{known}, unknown in {unknown}" if known else "unknown"


def _doubts(found: Collection) -> list[str]:
    """List facts that no file contains, or that do not suit the published models."""
    model = PUBLISHED["cryosiam_semantic_segmentation"]
    doubts = [
        "that these tomograms are denoised, like those that the models were trained on; if they are raw, run "
        "denoise-predict first, then init on its results",
        *found.doubts,
    ]
    sizes = [size for header in found.headers for size in header.voxel_size_angstrom if size]
    far = [size for size in sizes if abs(size / model.voxel_size_angstrom - 1) > FAR_OFF]
    if far:
        doubts.append(
            f"the voxel size, {_voxel_sizes(found.headers)}: the published models were made for about "
            f"{model.voxel_size_angstrom:g} Å"
        )
    elif not sizes:
        doubts.append(
            f"the voxel size, which no header gives: the published models were made for about "
            f"{model.voxel_size_angstrom:g} Å"
        )
    if found.contrast is None:
        doubts.append("whether dense matter is bright, as the models expect; if it is dark, set invert: True")
    if found.outputs:
        doubts.append("test_files, which lists the tomograms, because the folder also holds outputs")
    if any(len(header.shape) == 2 for header in found.headers):
        doubts.append("that the models are two-dimensional, because the images are 2-D and spatial_dims is 2")
    return doubts


def _quoted(text: object) -> str:
    doubled = str(text).replace("'", "''")
    return f"'{doubled}'"


def _text(found: Collection, output: Path, models: dict[str, str], dataset: str | None, doubts: list[str]) -> str:
    low, high = found.scaling
    predictions = output.absolute().parent / "predictions"
    images = all(len(header.shape) == 2 for header in found.headers)
    marks = [*_doubts(found), *doubts]
    scaled = "The tomograms are already scaled like this." if found.scaling == (0, 1) else (
        "99.8 % of the sampled voxels lie between them."
    )  # fmt: skip
    # Not False, which would silence the warning of a run.
    invert = "True" if found.contrast == "dark on bright" else "null"
    command = shlex.quote(str(output))
    names = " null  # or a list of names, to start with a few"
    if found.outputs:
        names = "".join(f"\n  - {_quoted(header.path.name)}" for header in found.headers)
    look = f"look {found.contrast}" if found.contrast else "have no clear contrast"
    data = f"""\
  parameters:
    data:
      # Intensities that become 0 and 1. {scaled}
      min: {low:.12g}
      max: {high:.12g}
      # The models expect dense matter bright on dark. These tomograms {look}.
      invert: {invert}
    network:
      spatial_dims: {2 if images else 3}
"""
    lines = [
        "# Made by 'cryosiam-dask init' from the contents of data_folder:",
        *(f"#   {line}" for line in summary(found)),
        "#",
        f"# See what a run would do:  cryosiam-dask plan {command}",
        f"# Run it:                   cryosiam-dask run {command}",
        "# Every key: docs/configuration.md",
        "#",
        *(f"# {MARK} {mark}." for mark in marks),
        "",
        f"data_folder: {_quoted(found.folder)}",
        f"file_extension: {_quoted(found.ending)}",
        f"test_files:{names}",
        *([f"hdf5_dataset: {_quoted(dataset)}"] if dataset else ()),
        "",
        "lamella:",
        "  # The first model finds the lamella.",
        f"  trained_model: {_quoted(models['lamella'])}",
        f"  prediction_folder: {_quoted(predictions / 'lamella')}",
        data.rstrip("\n"),
        "      threshold: 0.9  # lower it, for example to 0.7, if the lamella comes out too small",
        "      postprocessing: True",
        "",
        "semantic:",
        "  # The second model finds the classes inside the lamella.",
        f"  trained_model: {_quoted(models['semantic'])}",
        f"  prediction_folder: {_quoted(predictions / 'semantic')}",
        f"  # {MARK} the names of the labels from 1 on, for tables and pictures, such as [ 'membrane', 'particle' ].",
        "  class_names: null",
        data.rstrip("\n"),
        "      threshold: 0.1  # voxels in which every class is less probable than this are background",
        "      # Remove small components: a number of voxels for each label, the first for the background; -1: none.",
        "      postprocessing_sizes: null",
        "",
    ]
    return "\n".join(lines)
