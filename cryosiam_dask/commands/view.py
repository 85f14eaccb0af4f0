"""Show a tomogram with its labels in napari.

1. `layers` prepares everything without napari: arrays that are read lazily, and how they are shown. Each class has a
   layer with its name and the colour that it has in previews. All layers have the same position, in nm.
2. `show` opens napari. Qt, which draws its windows, ends the whole process if it finds no screen, so this is tested in
   another process first.

Large volumes have several levels, each with every second voxel of the previous one: in 3-D napari shows the coarsest. A
compressed file is unpacked into a temporary folder.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import dask.array
import numpy as np

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.arrays import sliced
from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, not_written
from cryosiam_dask.files.hdf5 import open_dataset, uint8_labels, voxel_size_in
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.mask import open_mask
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.files.zarr import ZarrHeader
from cryosiam_dask.model.classes import COLOURS, given_names, named, names_in
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.stages.export import find_source, position_angstrom, require_shape, written_attributes
from cryosiam_dask.stages.ingest import ingest
from cryosiam_dask.stages.intensities import Sample, sample_array, sample_file
from cryosiam_dask.stages.ome_zarr import contrast_limits

_SINGLE = 1 << 28  # voxels of the largest volume with a single level
_COARSEST = 256  # voxels of the longest axis of the coarsest level
_LAYERS = 12  # classes with a layer each; more classes share one
_SECTION = 1 << 24  # maximum of voxels that are read at once from a file without chunks
_LAMELLA = (255, 255, 255)
_INSTALL = "Install it with pip install 'napari[pyqt6]', or the program with its extra 'view'"


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of napari.

    Attributes
    ----------
    kind
        An image, or labels.
    levels
        Dask arrays, (z, y, x) or (y, x), the finest first.
    options
        Keyword arguments for napari's layer.
    colours
        Red, green and blue of each label, 0 to 255.
    contour
        Width of the outline of labels in pixels; with 0 they are filled.
    """

    kind: Literal["image", "labels"]
    levels: Sequence[Any]
    options: dict[str, Any]
    colours: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    contour: int = 0


@dataclass(frozen=True, slots=True)
class _Lazy:
    """An array that is read when dask slices it, also with steps and single indices."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[tuple[slice, ...]], Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any, /) -> Any:
        return sliced(self.read, self.shape, self.dtype, index)


def first_prediction(configuration: Configuration, filename: str | None = None) -> Path:
    """Return the prediction of a tomogram, or the first existing one of the configuration.

    Parameters
    ----------
    configuration
        The YAML file.
    filename
        Name of the tomogram.

    Raises
    ------
    Problems, ConfigurationError
        See `cryosiam_dask.runs.find.find_predictions`.
    """
    if filename is not None:
        return find_predictions(configuration, filename)[0]
    there = find_predictions(configuration.model_copy(update={"test_files": None}))
    wanted = {name.removesuffix(configuration.file_extension) for name in configuration.test_files or ()}
    return next((path for path in there if path.name.removesuffix("_preds.h5") in wanted), there[0])


@contextmanager
def layers(
    configuration: Configuration, prediction: Path, warn: Callable[[str], None] = lambda message: None
) -> Iterator[list[Layer]]:
    """Prepare the layers of a tomogram: itself, its lamella mask if it has one, and its labels.

    Parameters
    ----------
    configuration
        The YAML file.
    prediction
        ``<stem>_preds.h5``.
    warn
        Receives messages about what cannot be shown.

    Raises
    ------
    OutputError, LabelsError
        If the prediction cannot be read, or has another shape than its tomogram.
    TomogramError
        If the tomogram cannot be read.
    """
    stem = prediction.name.removesuffix("_preds.h5")
    labels, attributes = uint8_labels(prediction), written_attributes(configuration, prediction)
    place = _place(attributes, len(labels.shape))
    source = find_source(configuration, stem, attributes)
    found: list[Layer] = []
    with ExitStack() as stack:
        if source is None:
            missing = f"no {stem}{configuration.file_extension} in {configuration.data_folder}"
            again = "; denoise-predict makes it again" * (configuration.denoiser is not None)
            warn(f"{missing}: the labels are shown alone{again}")
        else:
            header = read_header(source, **configuration.reading)
            require_shape(prediction, labels.shape, source, header.shape)
            tomogram, sample = _open(header, configuration, stack)
            options: dict[str, Any] = {"name": stem, "colormap": "gray", "contrast_limits": contrast_limits(sample)[:2]}
            found.append(Layer("image", _levels(tomogram), {**place, **options}))
        mask = configuration.mask_folder and configuration.mask_folder / prediction.name
        if mask and mask.exists():
            try:
                inside = open_mask(mask, labels.shape)
                chunks = open_dataset(mask, "labels").chunks if inside.stored_shape == labels.shape else None
                levels = _levels(_lazy(labels.shape, np.dtype(np.uint8), inside.__getitem__, chunks))
                options = {"name": "lamella", "opacity": 0.5}
                found.append(Layer("labels", levels, {**place, **options}, {1: _LAMELLA}, contour=2))
            except CryosiamDaskError as error:
                warn(f"the lamella is not shown: {error}")
        levels = _levels(_lazy(labels.shape, labels.dtype, labels.__getitem__, labels.chunks))
        yield found + _of_classes(levels, _names(configuration, attributes, levels), place)


def _names(configuration: Configuration, attributes: dict[str, Any], levels: Sequence[Any]) -> tuple[str, ...]:
    names, counted = given_names(configuration) or names_in(attributes), attributes.get("voxels")
    if isinstance(counted, list):
        return named(names, max(len(names), len(counted) - 1))
    return named(names, max(len(names), int(levels[-1].max().compute())))  # a prediction of another program


def _of_classes(levels: Sequence[Any], names: Sequence[str], place: dict[str, Any]) -> list[Layer]:
    """Make a layer for each class, or one for all if there are many."""
    options = {**place, "opacity": 0.5}
    if len(names) <= _LAYERS:
        return [
            Layer(
                "labels",
                [dask.array.where(level == label, level, 0).astype(np.uint8) for level in levels],
                {**options, "name": name},
                {label: COLOURS[label - 1]},
            )
            for label, name in enumerate(names, 1)
        ]
    colours = {label: COLOURS[label - 1] for label in range(1, len(names) + 1)}
    features = {"index": list(range(len(names) + 1)), "class": ["background", *names]}
    return [Layer("labels", levels, {**options, "name": "labels", "features": features}, colours)]


def _place(attributes: dict[str, Any], ndim: int) -> dict[str, Any]:
    """Return position and voxel size of a layer in nm; in voxels if their size is unknown."""
    size, axes = voxel_size_in(attributes, ndim), tuple("zyx"[-ndim:])
    if not size or not all(size):
        return {"axis_labels": axes}
    position = position_angstrom(size, attributes.get("origin_angstrom"), attributes.get("nstart")) or (0.0,) * ndim
    nm = [tuple(float(n or 0) / 10 for n in numbers) for numbers in (size, position)]
    return {"axis_labels": axes, "scale": nm[0], "translate": nm[1], "units": ("nm",) * ndim}


def _open(header: TomogramHeader, configuration: Configuration, stack: ExitStack) -> tuple[Any, Sample]:
    """Open a tomogram, unpacked until `stack` is closed if it is compressed, and take a sample of its voxels."""
    if not header.compressed and not isinstance(header, ZarrHeader):
        chunks = None if math.prod(header.stored_chunks) == 1 else header.stored_chunks
        return _lazy(header.shape, header.dtype, header.__getitem__, chunks), sample_file(header)
    if isinstance(header, ZarrHeader):
        tomogram = header.open()
    else:
        work = configuration.work_folder
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=work if work and work.is_dir() else None))
            tomogram, _ = ingest(header.path, Path(folder) / "tomogram.zarr", **configuration.reading)
        except OSError as error:
            raise not_written(
                error,
                "a compressed tomogram must be unpacked before it is shown",
                place=error.filename or tempfile.gettempdir(),
                remedy="Set work_folder, or the environment variable TMPDIR, to a folder on a disk with more space",
            ) from None
    return _lazy(header.shape, tomogram.dtype, tomogram.__getitem__, tomogram.chunks), sample_array(tomogram)


def _lazy(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    read: Callable[[tuple[slice, ...]], Any],
    chunks: tuple[int, ...] | None,
) -> Any:
    """Make a dask array that reads chunks, or sections if there are none."""
    if chunks is None:
        *others, rows, columns = shape
        chunks = (*(1 for _ in others), max(1, min(rows, _SECTION // columns)), columns)
    return dask.array.from_array(_Lazy(shape, dtype, read), chunks=chunks, asarray=False, name=False)


def _levels(voxels: Any) -> list[Any]:
    levels = [voxels]
    while math.prod(voxels.shape) > _SINGLE and max(levels[-1].shape) > _COARSEST:
        levels.append(levels[-1][(slice(None, None, 2),) * voxels.ndim])
    return levels


# --------------------------------------------------------------------------------------------------------------- napari


def require_napari() -> None:
    """Check that napari is installed.

    Raises
    ------
    ConfigurationError
        If it is not; the remedy is the command that installs it.
    """
    if find_spec("napari") is None:
        raise ConfigurationError("napari must be installed to show tomograms", remedy=_INSTALL)


def require_screen() -> None:
    """Check that Qt finds a screen and can draw on it with OpenGL.

    Raises
    ------
    ConfigurationError
        If it does not, with Qt's message.
    """
    program = """
from qtpy.QtGui import QOpenGLContext
from qtpy.QtWidgets import QApplication
application = QApplication([])
if not QOpenGLContext().create():
    raise SystemExit("no OpenGL")
"""
    tried = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, errors="replace", timeout=120
    )
    if tried.returncode == 0:
        return
    lines = [line.strip() for line in tried.stderr.splitlines() if line.strip()]
    if any("qtbindings" in line.lower() or "qtpy" in line.lower() for line in lines[-1:]):
        raise ConfigurationError("napari needs Qt to draw its windows", value=lines[-1], remedy=_INSTALL)
    if lines[-1:] == ["no OpenGL"]:
        raise ConfigurationError(
            "napari needs OpenGL, which does not work on this screen",
            remedy="Install Mesa's OpenGL libraries, use another machine, or look at the pictures and report.html",
        )
    why = next((line for line in lines if "display" in line.lower() or "platform plugin" in line.lower()), "none")
    raise ConfigurationError(
        "napari needs a screen",
        value=why.removeprefix("qt.qpa.xcb: "),
        remedy="Use a machine with a screen, connect with ssh -X, or look at the pictures and report.html",
    )


def show(found: Sequence[Layer], title: str) -> Any:
    """Show layers in a window of napari; `napari.run` keeps it open.

    Parameters
    ----------
    found
        From `layers`.
    title
        Title of the window.

    Returns
    -------
    napari.Viewer
    """
    import napari
    from napari.utils.colormaps import DirectLabelColormap

    viewer = napari.Viewer(title=title)
    for layer in found:
        options, data = dict(layer.options), list(layer.levels) if len(layer.levels) > 1 else layer.levels[0]
        if layer.kind == "image":
            viewer.add_image(data, multiscale=len(layer.levels) > 1, **options)
            continue
        colours: dict[int | None, Any] = {None: np.zeros(4), 0: np.zeros(4)}
        colours |= {label: np.array([*colour, 255]) / 255 for label, colour in layer.colours.items()}
        options["colormap"] = DirectLabelColormap(color_dict=colours)
        viewer.add_labels(data, multiscale=len(layer.levels) > 1, **options).contour = layer.contour
    # Before napari 0.9 the viewer itself has the scale bar.
    getattr(getattr(viewer, "canvas", None), "overlays", viewer).scale_bar.visible = True
    return viewer


def view(
    configuration: Configuration,
    inform: Callable[[str], None],
    warn: Callable[[str], None],
    *,
    filename: str | None = None,
) -> None:
    """Open a tomogram with its labels in napari, and return when its window is closed.

    Parameters
    ----------
    configuration, filename
        See `first_prediction`.
    inform, warn
        Receive messages about what is opened and what cannot be shown.

    Raises
    ------
    ConfigurationError
        If napari, Qt or a screen is missing, or there is no prediction.
    OutputError, LabelsError, TomogramError
        See `layers`.
    """
    prediction = first_prediction(configuration, filename)
    require_napari()
    stem = prediction.name.removesuffix("_preds.h5")
    with layers(configuration, prediction, warn) as found:
        require_screen()
        names = [str(layer.options["name"]) for layer in found]
        inform(f"{stem} is open in napari: {', '.join(names)}. Close the window to end")
        import napari

        show(found, f"{stem}, cryosiam-dask")
        napari.run()
