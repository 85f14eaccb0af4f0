"""Draw a segmentation: slices without and with the labels, and all labels along z.

The panels have the same scale and are aligned as in a technical drawing::

    x–y bare   x–y with labels   y–z with labels   labels along z
    x–z bare   x–z with labels   legend

If they are given, the raw tomogram is to the left of the bare slices, and the true labels are to the right of the
others.

A lamella is drawn as an outline, and the panel along z shows its thickness instead of labels.

1. A task reads a tile of a slice, or a block of the labels, and returns no more than the size of the picture, so the
   volume on disk may have any size.
2. The slices go through the middle of the volume. A slice with hardly any labels is replaced by the slice with most
   labels.
3. Greys are averaged over cells of whole voxels until they are less than twice as fine as the picture, then resampled.
   Labels and lamella are never averaged: a pixel shows the voxel at its centre.
4. Along z, a class is visible wherever a column contains any voxel of it, and brighter the more there are. If a column
   contains several classes, the one that covers the smallest part of the picture is shown, so nothing small is hidden.
"""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from cryosiam_dask.core.arrays import Sliceable
from cryosiam_dask.core.blocks import Blocks, Index
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.files.atomic import part_name
from cryosiam_dask.files.folders import real
from cryosiam_dask.model.classes import COLOURS, named, percentage
from cryosiam_dask.stages.lamella import Thickness, thickness_words

PALETTE = COLOURS  # label 1 has the first
OPACITY = 0.5

_ENLARGE_TO, _LONGEST, _WIDEST = 640, 800, 2400  # pixels of an enlarged axis, of the longest axis, of a row of panels
_MARGIN, _GAP, _CAPTION, _LINE, _SWATCH = 28, 20, 32, 32, 26
_TITLE_SIZE, _SIZE = 30, 21  # of letters, in pixels
_PAPER, _INK, _FAINT, _LAMELLA, _DARK = (255, 255, 255), (30, 30, 36), (110, 110, 120), (255, 255, 255), (18, 18, 22)
_DIMMEST = 0.55  # of a colour where a class is thinnest along z
#: From thin to thick, evenly spaced: viridis of S. van der Walt and N. Smith, readable with any colour blindness.
_THICKNESS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip
_LEAST_RANGE = 0.3  # smallest range of the colours of a thickness map, relative to the thickness
_EMPTY = 0.1  # the middle slice counts as empty below this share of the labels in the slice with most labels
_LONGEST_NAME, _OUTLINE = 40, "outline of the lamella"
_LABELS = ("labels", "prediction")  # captions without and with the truth beside them
_ANISOTROPIC = 1.05  # ratio of voxel edges from which on the picture is stretched
_OWN_FONT = Path(__file__).parents[1] / "data" / "fonts" / "DejaVuSans.ttf"  # the letters of Latin, Greek and Cyrillic
#: Fonts of the system, for names with characters that our own font lacks.
_OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf")
_PANELS, _FINGERPRINT, _THUMBNAIL = "panels", "fingerprint", "thumbnail"  # texts within the PNG file
_THUMBNAIL_BYTES = 24_000


@dataclass(frozen=True, slots=True)
class _Plane:
    """One slice.

    Attributes
    ----------
    axes
        Axes of the volume, (z, y, x), that are the rows and the columns of the picture.
    position
        Voxel along the third axis.
    """

    axes: tuple[int, int]
    position: int

    @property
    def across(self) -> int:
        """The axis that the slice is perpendicular to."""
        return 3 - sum(self.axes)


@dataclass(frozen=True, slots=True)
class _Panel:
    """A picture on the sheet, with its place there."""

    caption: str
    column: int
    row: int
    picture: Image.Image


@dataclass(frozen=True, slots=True)
class _Tile:
    """A part of a slice that one task reads; `region` is (z, y, x)."""

    plane: int
    region: tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Convert voxels of a volume to pixels of the picture, everything in (z, y, x).

    Attributes
    ----------
    shape
        Shape of the volume in voxels.
    pixels
        Size of the picture in pixels.
    cells
        Size of the cells whose greys are averaged, in voxels.
    """

    shape: Index
    pixels: Index
    cells: Index

    @classmethod
    def of(cls, shape: Index, spacing: tuple[float, float, float], volume: bool, abreast: int = 2) -> _Scale:
        """Fit a volume (or an image) on a sheet; `spacing` are its voxel edges, the shortest of which is 1.

        `abreast` is the number of x–y slices side by side.
        """
        z, y, x = (n * s for n, s in zip(shape, spacing, strict=True))
        longest, width = max(y, x, z if volume else 0), abreast * x
        if volume:
            width += z + x
        elif _stacked(shape):
            width = x
        zoom: float = max(1, round(_ENLARGE_TO / longest))
        if zoom * longest > _LONGEST or zoom * width > _WIDEST:
            zoom = min(_LONGEST / longest, _WIDEST / width)
            zoom = math.floor(zoom) if zoom >= 1 else zoom  # whole pixels per voxel, if there are enough
        pixels = tuple(max(1, round(n * s * zoom)) for n, s in zip(shape, spacing, strict=True))
        cells = tuple(max(1, n // p) for n, p in zip(shape, pixels, strict=True))
        return cls(shape, (pixels[0], pixels[1], pixels[2]), (cells[0], cells[1], cells[2]))

    def binned(self, axis: int) -> int:
        """Return the length of an axis of averaged greys."""
        return -(-self.shape[axis] // self.cells[axis])

    def voxels_of_cells(self, axis: int) -> list[int]:
        """Return the voxels of each cell along an axis; the last one may have fewer."""
        n, cell = self.shape[axis], self.cells[axis]
        return [min(first + cell, n) - first for first in range(0, n, cell)]

    def bins(self, axis: int) -> int:
        """Return the number of bins along an axis: one per voxel, but no more than pixels."""
        return min(self.shape[axis], self.pixels[axis])

    def columns_of_bins(self, axis: int) -> NDArray[np.int64]:
        """Return the number of voxels in each bin along an axis."""
        return np.bincount(np.arange(self.shape[axis]) * self.bins(axis) // self.shape[axis])

    def voxels(self, axis: int) -> NDArray[np.int64]:
        """Return the voxel at the centre of each pixel."""
        n, pixels = self.shape[axis], self.pixels[axis]
        return (2 * np.arange(pixels) + 1) * n // (2 * pixels)


def preview_file(folder: Path, stem: str) -> Path:
    """Return the path of a tomogram's preview."""
    return folder / f"{stem}_preview.png"


def most_bytes(shape: Sequence[int], voxel_size_angstrom: Sequence[float | None] | None = None) -> int:
    """Return an upper bound for the size of a preview on the disk, in bytes.

    Parameters
    ----------
    shape
        (z, y, x) or (y, x) in voxels.
    voxel_size_angstrom
        Along each axis.
    """
    volume = len(shape) == 3
    z, y, x = (1,) * (3 - len(shape)) + tuple(shape)
    pixels = _Scale.of((z, y, x), _spacing(_voxel_size(voxel_size_angstrom, len(shape))), volume).pixels
    z, y, x = pixels
    panels = 3 * y * x + z * (y + 2 * x) if volume else 2 * y * x
    return 3 * panels + 500_000  # three bytes per pixel, and the rest of the sheet, which is mostly white


def write_preview(
    path: Path,
    tomogram: Sliceable,
    labels: Sliceable,
    *,
    voxel_size_angstrom: float | Sequence[float | None] | None = None,
    class_names: Sequence[str] = (),
    lamella: Sliceable | None = None,
    lamella_voxels: int | None = None,
    as_lamella: bool = False,
    truth: Sliceable | None = None,
    raw: Sliceable | None = None,
    first: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
    fingerprint: str = "",
    executor: Executor = SERIAL,
) -> None:
    """Write a PNG of slices of a tomogram, bare and with its labels in colour, and of all labels along z.

    Parameters
    ----------
    path
        The PNG; it appears complete or not at all.
    tomogram, labels
        (z, y, x), or (y, x) for an image; of the same shape.
    voxel_size_angstrom
        Edge of a voxel in Å, or its edges along each axis, for the scale bar and the panels' proportions; with
        ``None``, even for a single axis, the bar is in voxels.
    class_names
        Names of the labels; label 0 is not drawn. Labels without a name are numbered.
    lamella
        A mask of the same shape, drawn as an outline. The legend shows shares of the mask, or else of the volume.
    lamella_voxels
        Number of voxels of the mask; counted if not given.
    as_lamella
        Whether the labels are a lamella: they are drawn as an outline, and along z their thickness, in nm.
    truth
        The true labels, of the same shape, drawn beside the others.
    raw
        The raw tomogram, of the same shape, drawn beside the denoised one in its own range of intensities.
    first
        If the volume was cut out of a larger tomogram, the voxel (z, y, x) or (y, x) of that tomogram where the volume
        begins. Captions then count from the beginning of the tomogram.
    limits
        Intensities shown as black and white; by default the 0.5 and 99.5 percentiles of the slices.
    title
        Printed above the slices, for example the tomogram's name.
    fingerprint
        Stored in the file, to identify the labels that it shows; see `read_fingerprint`.
    executor
        Runs the tasks; if it uses other processes, the arrays must be picklable.

    Raises
    ------
    LabelsError
        If there are neither two nor three axes.
    OSError
        If the file cannot be written.
    """
    blocks = Blocks.of(labels)
    shape, volume = blocks.shape, blocks.ndim == 3
    size = _voxel_size(voxel_size_angstrom, blocks.ndim)
    scale = _Scale.of(shape, _spacing(size), volume, abreast=2 + sum(each is not None for each in (truth, raw)))
    counted = None if lamella_voxels is not None else lamella
    along = _along_z(labels, counted, blocks, scale, executor)
    planes = _planes(shape, volume, along.profiles)
    read = partial(_read_slices, tomogram, planes=planes, scale=scale, ndim=blocks.ndim, executor=executor)
    greys, colours, masks = read(labels=labels, lamella=lamella)
    low, high = limits or map(float, np.percentile(np.concatenate([g.ravel() for g in greys]), (0.5, 99.5)))
    true = read(labels=truth, lamella=None)[1] if truth is not None else None

    start = (*(0,) * (3 - len(first or ())), *(first or (0, 0, 0)))
    bare, drawn, right = [], [], []
    left = 0 if raw is None else 1  # column of the bare slices
    for number, (plane, grey, colour, mask) in enumerate(zip(planes, greys, colours, masks, strict=True)):
        shades = _shades(
            (grey - low) / max(high - low, 1e-6), (scale.pixels[plane.axes[1]], scale.pixels[plane.axes[0]])
        )
        where = _where(plane, start) if volume else "x–y"
        picture = Image.fromarray(_overlay(shades, colour, mask if lamella is not None else None, as_lamella))
        if plane.axes == (1, 0):  # beside the x–y slice, with the same rows
            drawn.append(_Panel(where, left + (3 if truth is not None else 2), 0, picture))
            continue
        down = int(plane.axes == (0, 2))
        bare.append(_Panel(where if raw is None else "denoised", left, down, Image.fromarray(shades)))
        drawn.append(_Panel(_OUTLINE if as_lamella else _LABELS[true is not None], left + 1, down, picture))
        if true is not None:
            expected = _overlay(shades, true[number], mask if lamella is not None else None, as_lamella)
            right.append(_Panel("truth", left + 2, down, Image.fromarray(expected)))
    panels = [*drawn, *bare, *right]
    if raw is not None:
        seen = [plane for plane in planes if plane.axes != (1, 0)]
        for down, picture in enumerate(_pictures(raw, seen, scale, blocks.ndim, executor)):
            where = f", {_where(seen[down], start)}" if volume else ""
            panels.append(_Panel(f"raw{where}", 0, down, picture))
    if not volume and _stacked(shape):
        panels = [replace(panel, column=0, row=panel.column) for panel in panels]
    colour_bar = None
    if volume and as_lamella:
        thickness, colour_bar = _thickness_map(along, scale, size[0] if size else None)
        caption = f"thickness along z, {'nm' if size else 'voxels'}" if colour_bar else "no lamella"
        panels.append(_Panel(caption, drawn[1].column + 1, 0, thickness))
    elif volume:
        picture = Image.fromarray(_along_z_picture(along.of_label, scale))
        caption = "labels along z, brighter where thicker" if along.of_label else "no labels"
        panels.append(_Panel(caption, drawn[1].column + 1, 0, picture))

    count = max(len(class_names), 1 + max(along.of_label, default=0))
    names = named(class_names[1:], count - 1)
    inside = along.inside if lamella_voxels is None else lamella_voxels
    whole = inside if lamella is not None and inside else math.prod(shape)
    shares = [float(along.of_label[n].sum()) / whole if n in along.of_label else 0.0 for n in range(count)]
    room = scale.pixels[0] if volume else scale.pixels[1]
    legend = _legend(names, shares[1:], lamella is not None, room, colour_bar)
    heading = "" if not names else f"share of the {'lamella' if whole == inside else 'volume' if volume else 'image'}"
    at = (drawn[1].column, 1) if volume else (1 + max(panel.column for panel in panels), 0)
    subtitle = _subtitle(shape[3 - blocks.ndim :], size, first)
    sheet, boxes = _lay_out(panels, legend, at, heading, title, subtitle)
    in_x = scale.pixels[2] / shape[2]
    for box in (boxes[0], boxes[len(drawn)]):  # of the x–y slice, with and without the labels
        _draw_scale_bar(ImageDraw.Draw(sheet), box, in_x, size[-1] if size else None)

    # For a volume, the first panel is the x–y slice and the last one the view along z, of the same size.
    small = [panel.picture for panel in ((panels[0], panels[-1]) if volume else panels[:1])]
    _save(path, sheet, boxes, small, title, fingerprint)


def write_denoised_preview(
    path: Path,
    tomogram: Sliceable,
    denoised: Sliceable,
    *,
    voxel_size_angstrom: float | Sequence[float | None] | None = None,
    title: str = "",
    fingerprint: str = "",
    executor: Executor = SERIAL,
) -> None:
    """Write a PNG of slices of a raw tomogram and, beside each, of the denoised one.

    Parameters
    ----------
    path, voxel_size_angstrom, title, fingerprint, executor
        See `write_preview`, also for the errors.
    tomogram, denoised
        (z, y, x), or (y, x) for an image; of the same shape. Each has its own range of intensities from black to white.
    """
    blocks = Blocks.of(denoised)
    shape, volume = blocks.shape, blocks.ndim == 3
    size = _voxel_size(voxel_size_angstrom, blocks.ndim)
    scale = _Scale.of(shape, _spacing(size), volume, abreast=2)
    planes = [plane for plane in _planes(shape, volume, [np.zeros(n, np.int64) for n in shape]) if plane.axes != (1, 0)]
    panels = []
    for column, (name, voxels) in enumerate((("raw", tomogram), ("denoised", denoised))):
        for row, picture in enumerate(_pictures(voxels, planes, scale, blocks.ndim, executor)):
            where = f", {_where(planes[row], (0, 0, 0))}" if volume else ""
            panels.append(_Panel(f"{name}{where}", column, row, picture))
    if not volume and _stacked(shape):
        panels = [replace(panel, column=0, row=panel.column) for panel in panels]
    subtitle = _subtitle(shape[3 - blocks.ndim :], size, None)
    sheet, boxes = _lay_out(panels, Image.new("RGB", (0, 0)), (0, 0), "", title, subtitle)
    for box in (boxes[0], boxes[len(planes)]):
        _draw_scale_bar(ImageDraw.Draw(sheet), box, scale.pixels[2] / shape[2], size[-1] if size else None)
    _save(path, sheet, boxes, [panels[0].picture, panels[len(planes)].picture], title, fingerprint)


def _pictures(
    tomogram: Sliceable, planes: Sequence[_Plane], scale: _Scale, ndim: int, executor: Executor
) -> list[Image.Image]:
    """Draw slices without labels, from black to white between the percentiles of them all."""
    greys, _, _ = _read_slices(tomogram, None, None, planes, scale, ndim, executor)
    low, high = map(float, np.percentile(np.concatenate([g.ravel() for g in greys]), (0.5, 99.5)))
    sizes = [(scale.pixels[plane.axes[1]], scale.pixels[plane.axes[0]]) for plane in planes]
    return [
        Image.fromarray(_shades((grey - low) / max(high - low, 1e-12), size))
        for grey, size in zip(greys, sizes, strict=True)
    ]


def _save(
    path: Path,
    sheet: Image.Image,
    boxes: Sequence[tuple[int, int, int, int]],
    small: Sequence[Image.Image],
    title: str,
    fingerprint: str,
) -> None:
    """Write a sheet with a fingerprint and a thumbnail of the `small` pictures, which have the same height."""
    texts = PngInfo()
    texts.add_itxt("Title", title)
    texts.add_text(_PANELS, json.dumps(boxes))
    texts.add_text(_FINGERPRINT, fingerprint)
    together = Image.new("RGB", (sum(part.width for part in small), small[0].height))
    for number, part in enumerate(small):
        together.paste(part, (number * part.width, 0))
    texts.add_text(_THUMBNAIL, base64.b64encode(_small(together, _THUMBNAIL_BYTES)).decode())
    path = real(path)
    partial_file = path.with_name(part_name(path.name))
    try:
        # A sixth larger than with the default level, in half the time.
        sheet.save(partial_file, format="PNG", pnginfo=texts, compress_level=3)
        partial_file.replace(path)
    finally:
        partial_file.unlink(missing_ok=True)


def read_fingerprint(path: Path) -> str | None:
    """Return the fingerprint that a preview was written with; ``None`` if there is no such picture."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return str(picture.info.get(_FINGERPRINT, ""))
    except _UNREADABLE:
        return None


def thumbnails(path: Path) -> tuple[bytes, ...]:
    """Return the thumbnail of a preview in all its sizes, the largest first; empty if it cannot be read.

    Parameters
    ----------
    path
        From `write_preview`.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:  # the texts come before the pixels, which are not read
            content = base64.b64decode(str(picture.info[_THUMBNAIL]), validate=True)
        with Image.open(BytesIO(content), formats=["WEBP"]) as small:
            image = small.convert("RGB")
    except (*_UNREADABLE, KeyError):
        return ()
    return (content, *(_as_webp(image, height) for height in _HEIGHTS if height < image.height))


_HEIGHTS = (220, 180, 140, 100, 70, 48)  # of thumbnails, in pixels


def _small(picture: Image.Image, most_bytes: int) -> bytes:
    """Encode a picture as WebP, reduced to as few as 48 pixels until it takes no more than `most_bytes`."""
    for height in _HEIGHTS:
        content = _as_webp(picture, height)
        if len(content) <= most_bytes:
            break
    return content


def _as_webp(picture: Image.Image, height: int) -> bytes:
    smaller = picture.copy()
    smaller.thumbnail((4 * height, height), Image.Resampling.BOX)
    sink = BytesIO()
    smaller.save(sink, format="WEBP", quality=60)
    return sink.getvalue()


#: Pillow's errors for a file that is missing, not a picture, damaged, or too large to be one of ours.
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


# --------------------------------------------------------------------------------------------------------------- voxels


def _voxel_size(size: float | Sequence[float | None] | None, ndim: int) -> tuple[float, ...] | None:
    """Return the edges of a voxel in Å along each axis; ``None`` if one is unknown."""
    sizes = tuple(size) if isinstance(size, Sequence) else (size,) * ndim
    known = tuple(float(s) for s in sizes if s)
    return known if len(known) == ndim else None


def _spacing(size: tuple[float, ...] | None) -> tuple[float, float, float]:
    """Return the edges of a voxel along z, y and x relative to the shortest; slight differences are ignored."""
    if size is None or max(size) <= _ANISOTROPIC * min(size):
        return 1.0, 1.0, 1.0
    z, y, x = (*(min(size),) * (3 - len(size)), *size)
    return z / min(size), y / min(size), x / min(size)


def _stacked(shape: Index) -> bool:
    """Whether the panels of an image are placed above each other."""
    return shape[2] > 1.6 * shape[1]


def _planes(shape: Index, volume: bool, profiles: Sequence[NDArray[np.int64]]) -> list[_Plane]:
    """Choose the slices by their numbers of labelled voxels along z, y and x; an image is its only slice."""
    if not volume:
        return [_Plane((1, 2), 0)]
    positions = []
    for n, profile in zip(shape, profiles, strict=True):
        middle, most = n // 2, int(profile.max())
        if profile[middle] < _EMPTY * most:
            richest = np.flatnonzero(profile == most)
            middle = int(richest[np.argmin(abs(richest - middle))])
        positions.append(middle)
    z, y, x = positions
    return [_Plane((1, 2), z), _Plane((1, 0), x), _Plane((0, 2), y)]


def _where(plane: _Plane, first: Sequence[int]) -> str:
    """Return the caption of a slice."""
    return {
        (1, 2): f"x–y at z = {plane.position + first[0]}",
        (1, 0): f"y–z at x = {plane.position + first[2]}",
        (0, 2): f"x–z at y = {plane.position + first[1]}",
    }[plane.axes]


def _read_slices(
    tomogram: Sliceable,
    labels: Sliceable | None,
    lamella: Sliceable | None,
    planes: Sequence[_Plane],
    scale: _Scale,
    ndim: int,
    executor: Executor,
) -> tuple[list[NDArray[np.float32]], list[NDArray[Any]], list[NDArray[np.bool_]]]:
    """Return, for each slice, the averaged greys, and the labels and the lamella of each pixel."""
    greys, colours, masks = [], [], []
    for plane in planes:
        rows, columns = plane.axes
        greys.append(np.zeros((scale.binned(rows), scale.binned(columns)), np.float32))
        colours.append(np.zeros((scale.pixels[rows], scale.pixels[columns]), np.int64))
        masks.append(np.zeros(colours[-1].shape, bool))
    blocks = Blocks.of(tomogram)
    tiles = [
        _Tile(number, _thin(blocks.slices(index), plane))
        for number, plane in enumerate(planes)
        for index in blocks.indices
        if index[plane.across] == plane.position // blocks.block[plane.across]
    ]
    read = partial(_read_tile, tomogram, labels, lamella, planes, scale, ndim)
    for tile, (grey, colour, mask) in zip(tiles, executor.map(read, tiles, name="picture"), strict=True):
        rows, columns = planes[tile.plane].axes
        cells = np.ix_(_cells(tile, rows, scale), _cells(tile, columns, scale))
        greys[tile.plane][cells] += grey
        pixels = np.ix_(_pixels(tile, rows, scale)[0], _pixels(tile, columns, scale)[0])
        colours[tile.plane][pixels] = colour
        masks[tile.plane][pixels] = mask
    for plane, grey in zip(planes, greys, strict=True):
        rows, columns = plane.axes
        grey /= np.outer(scale.voxels_of_cells(rows), scale.voxels_of_cells(columns))
    return greys, colours, masks


def _thin(block: tuple[slice, slice, slice], plane: _Plane) -> tuple[slice, slice, slice]:
    """Return the part of a block that lies in a slice."""
    z, y, x = (
        slice(plane.position, plane.position + 1) if axis == plane.across else part for axis, part in enumerate(block)
    )
    return z, y, x


def _cells(tile: _Tile, axis: int, scale: _Scale) -> NDArray[np.int64]:
    """Return the cells that a tile overlaps."""
    part = tile.region[axis]
    return np.arange(part.start // scale.cells[axis], (part.stop - 1) // scale.cells[axis] + 1)


def _pixels(tile: _Tile, axis: int, scale: _Scale) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels whose centres lie in a tile, and the voxels of the tile that they show."""
    voxels = scale.voxels(axis)
    part = tile.region[axis]
    pixels = np.flatnonzero((voxels >= part.start) & (voxels < part.stop))
    return pixels, voxels[pixels] - part.start


def _read_tile(
    tomogram: Sliceable,
    labels: Sliceable | None,
    lamella: Sliceable | None,
    planes: Sequence[_Plane],
    scale: _Scale,
    ndim: int,
    tile: _Tile,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.bool_]]:
    """Return sums of greys in cells, and labels and lamella of each pixel, as (rows, columns) of the picture."""
    plane = planes[tile.plane]
    rows, columns = plane.axes

    def read(array: Sliceable) -> NDArray[Any]:
        part = np.asarray(array[tile.region[3 - ndim :]]).reshape([s.stop - s.start for s in tile.region])
        flat = part.squeeze(plane.across)
        return flat if rows < columns else flat.T

    with np.errstate(over="ignore", invalid="ignore"):
        grey = read(tomogram).astype(np.float32)
    # Clipped, so that sums cannot overflow.
    grey = np.clip(np.nan_to_num(grey, nan=0, posinf=0, neginf=0), -1e30, 1e30)
    for axis, of_volume in enumerate(plane.axes):
        first = tile.region[of_volume].start
        starts = np.maximum(_cells(tile, of_volume, scale) * scale.cells[of_volume] - first, 0)
        grey = np.add.reduceat(grey, starts, axis=axis)
    pixels = np.ix_(_pixels(tile, rows, scale)[1], _pixels(tile, columns, scale)[1])
    shown = np.zeros((pixels[0].size, pixels[1].size), np.uint8) if labels is None else read(labels)[pixels]
    # Reading a mask may need interpolation, so it is read only where it is shown.
    inside = np.zeros(shown.shape, bool) if lamella is None or not shown.size else read(lamella)[pixels] > 0
    return grey, shown, inside


@dataclass(frozen=True, slots=True)
class _Along:
    """Counts along z, of a whole volume or of some of its columns.

    Attributes
    ----------
    of_label
        Number of voxels of each label in bins of y and x, which are no finer than the voxels and the picture.
    profiles
        Number of labelled voxels for each z, each y and each x.
    columns
        Number of columns (y, x) with 0, 1, 2 … labelled voxels.
    inside
        Number of voxels of the mask, if it is counted.
    """

    of_label: dict[int, NDArray[np.int64]]
    profiles: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    columns: NDArray[np.int64]
    inside: int


def _along_z(labels: Sliceable, lamella: Sliceable | None, blocks: Blocks, scale: _Scale, executor: Executor) -> _Along:
    """Count the labels along z."""
    columns = [(y, x) for z, y, x in blocks.indices if z == 0]
    parts = executor.map(partial(_along_column, labels, lamella, blocks, scale), columns, name="project")
    shape = (scale.bins(1), scale.bins(2))
    found: dict[int, NDArray[np.int64]] = {}
    profiles = tuple(np.zeros(n, np.int64) for n in blocks.shape)
    thicknesses, inside = np.zeros(blocks.shape[0] + 1, np.int64), 0
    for (y, x), part in zip(columns, parts, strict=True):
        _, rows, cols = blocks.slices((0, y, x))
        where = np.ix_(_bins(rows, 1, scale)[0], _bins(cols, 2, scale)[0])
        for label, count in part.of_label.items():
            found.setdefault(label, np.zeros(shape, np.int64))[where] += count
        for profile, own, region in zip(profiles, part.profiles, (slice(None), rows, cols), strict=True):
            profile[region] += own
        thicknesses += part.columns
        inside += part.inside
    return _Along(found, (profiles[0], profiles[1], profiles[2]), thicknesses, inside)


def _bins(part: slice, axis: int, scale: _Scale) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bins of the voxels of `part`, and where in `part` each bin begins."""
    n, bins = scale.shape[axis], scale.bins(axis)
    numbers = np.arange(part.start * bins // n, (part.stop - 1) * bins // n + 1)
    return numbers, np.maximum(-(-numbers * n // bins) - part.start, 0)


def _along_column(
    labels: Sliceable, lamella: Sliceable | None, blocks: Blocks, scale: _Scale, column: tuple[int, int]
) -> _Along:
    """Count the labels along z in one column of blocks."""
    _, rows, cols = blocks.slices((0, *column))
    counts: dict[int, NDArray[np.int64]] = {}
    of_z, inside = np.zeros(blocks.shape[0], np.int64), 0
    for z in range(blocks.counts[0]):
        block = blocks.read(labels, (z, *column))
        of_z[blocks.slices((z, *column))[0]] = np.count_nonzero(block, axis=(1, 2))
        if lamella is not None:
            inside += int(np.count_nonzero(blocks.read(lamella, (z, *column))))
        highest = int(block.max())
        for label in range(1, highest + 1) if highest <= 20 else np.unique(block[block > 0]).tolist():
            of_class = block == label
            if not of_class.any():
                continue
            voxels = counts.setdefault(label, np.zeros(block.shape[1:], np.int64))
            for first in range(0, len(block), 255):  # sums in single bytes are many times faster
                voxels += of_class[first : first + 255].view(np.uint8).sum(axis=0, dtype=np.uint8)
    together = sum(counts.values(), np.zeros((rows.stop - rows.start, cols.stop - cols.start), np.int64))
    columns = np.bincount(together.ravel(), minlength=blocks.shape[0] + 1)
    for label, voxels in counts.items():
        binned = np.add.reduceat(voxels, _bins(rows, 1, scale)[1], axis=0)
        counts[label] = np.add.reduceat(binned, _bins(cols, 2, scale)[1], axis=1)
    return _Along(counts, (of_z, together.sum(axis=1), together.sum(axis=0)), columns, inside)


# ------------------------------------------------------------------------------------------------------------- pictures


def _shades(grey: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert greys of 0..1 to a picture of `size` (width, height); (rows, columns, 3)."""
    finer = grey.shape[1] > size[0] or grey.shape[0] > size[1]
    filter = Image.Resampling.LANCZOS if finer else Image.Resampling.BICUBIC
    shades = Image.fromarray((np.clip(grey, 0, 1) * 255).round().astype(np.uint8)).resize(size, filter)
    return np.repeat(np.asarray(shades)[:, :, None], 3, axis=2)


def _overlay(
    shades: NDArray[np.uint8], labels: NDArray[Any], lamella: NDArray[np.bool_] | None, as_lamella: bool
) -> NDArray[np.uint8]:
    """Draw coloured labels, or only their outline, and the outline of the lamella on greys; (rows, columns, 3)."""
    tints = _tints()[(labels - 1) % len(PALETTE)]
    if as_lamella:
        picture = np.where(_outline(labels > 0, 4)[:, :, None], tints, shades)
    else:
        picture = np.where(labels[:, :, None] > 0, (1 - OPACITY) * shades + OPACITY * tints, shades)
    if lamella is not None:
        picture[_outline(lamella)] = _LAMELLA
    return picture.round().astype(np.uint8)


def _tints() -> NDArray[np.float32]:
    return np.array(PALETTE, np.float32)


def _outline(mask: NDArray[np.bool_], width: int = 2) -> NDArray[np.bool_]:
    """Return the inner edge of a mask, `width` pixels wide, but not along the edges of the picture."""
    inner: NDArray[np.bool_] = ndimage.binary_erosion(mask, iterations=width, border_value=1)
    return mask & ~inner


def _along_z_picture(thickness: Mapping[int, NDArray[np.int64]], scale: _Scale) -> NDArray[np.uint8]:
    """Draw each class in its colour wherever it occurs, the least frequent class on top; (rows, columns, 3)."""
    rows, columns = (scale.voxels(axis) * scale.bins(axis) // scale.shape[axis] for axis in (1, 2))
    picture = np.full((scale.pixels[1], scale.pixels[2], 3), _DARK, np.float32)
    columns_of_bins = np.outer(scale.columns_of_bins(1), scale.columns_of_bins(2))
    for label in sorted(thickness, key=lambda label: (-np.count_nonzero(thickness[label]), label)):
        voxels = thickness[label] / columns_of_bins
        # A few columns may be far thicker than all others, such as a membrane seen edge-on.
        thickest = float(np.percentile(voxels[voxels > 0], 98))
        light = _DIMMEST + (1 - _DIMMEST) * np.sqrt(np.minimum(voxels / thickest, 1))
        shown = (voxels > 0)[np.ix_(rows, columns)]
        colour = light[np.ix_(rows, columns)][:, :, None] * _tints()[(label - 1) % len(PALETTE)]
        picture = np.where(shown[:, :, None], colour, picture)
    return picture.round().astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _ColourBar:
    """The key of a thickness map: `low` and `high` label its ends, `words` give the mean and the range."""

    low: str
    high: str
    words: str


def _thickness_map(along: _Along, scale: _Scale, edge: float | None) -> tuple[Image.Image, _ColourBar | None]:
    """Draw the number of labelled voxels along z; return the picture and its key. `edge` is that of a voxel, in Å."""
    thickness = Thickness.of(along.columns)
    picture = np.full((scale.pixels[1], scale.pixels[2], 3), _DARK, np.float32)
    if thickness is None:
        return Image.fromarray(picture.astype(np.uint8)), None
    rows, columns = (scale.voxels(axis) * scale.bins(axis) // scale.shape[axis] for axis in (1, 2))
    voxels = sum(along.of_label.values()) / np.outer(scale.columns_of_bins(1), scale.columns_of_bins(2))
    # A few thin columns at the rim would leave no colours for all the others.
    low, high = (float(n) for n in np.percentile(voxels[voxels > 0], (2, 98)))
    # An even lamella should look even: rounding to whole voxels must not span all colours.
    wider = max(0.0, _LEAST_RANGE * (low + high) / 2 - (high - low)) / 2
    low, high = low - wider, high + wider
    shown = voxels[np.ix_(rows, columns)]
    level = np.clip((shown - low) / (high - low), 0, 1)
    steps = np.linspace(0, 1, len(_THICKNESS))
    colours = np.stack([np.interp(level, steps, channel) for channel in np.array(_THICKNESS).T], axis=2)
    picture = np.where((shown > 0)[:, :, None], colours, picture)
    ends = [f"{n * edge / 10 if edge else n:.3g}" for n in (low, high)]
    words = thickness_words(thickness.described((edge,)))
    return Image.fromarray(picture.round().astype(np.uint8)), _ColourBar(ends[0], ends[1], words)


def _subtitle(shape: Sequence[int], size: tuple[float, ...] | None, first: Sequence[int] | None) -> str:
    if size is None:
        unit = "unknown size"
    else:
        angstrom, nm = (list(dict.fromkeys(_number(s / by) for s in size)) for by in (1, 10))
        if len(angstrom) > 1:
            angstrom, nm = ([_number(s / by) for s in size] for by in (1, 10))
        unit = f"{' × '.join(angstrom)} Å ({' × '.join(nm)} nm)"
    begins = f", from voxel ({', '.join(map(str, first))}) on" if first and any(first) else ""
    return f"{' × '.join(map(str, shape))} voxels of {unit}{begins}"


def _lay_out(
    panels: Sequence[_Panel],
    legend: Image.Image,
    place: tuple[int, int],
    heading: str,
    title: str,
    subtitle: str,
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Place panels and legend on a sheet; also return the (left, top, right, bottom) of each panel.

    The legend is at `place` (column, row) and may use all the space to its right.
    """
    top = _LINE * 2 + 14 if title else _LINE + 4
    columns = 1 + max(place[0], *(panel.column for panel in panels))
    rows = 1 + max(place[1], *(panel.row for panel in panels))
    widths, heights = [0] * columns, [0] * rows
    for panel in panels:
        widths[panel.column] = max(widths[panel.column], panel.picture.width, math.ceil(_length(panel.caption, _SIZE)))
        heights[panel.row] = max(heights[panel.row], panel.picture.height)
    heights[place[1]] = max(heights[place[1]], legend.height)
    lefts = [_MARGIN]
    for width in widths:
        lefts.append(lefts[-1] + width + _GAP)
    tops = [_MARGIN + top + _CAPTION]
    for height in heights[:-1]:
        tops.append(tops[-1] + height + _GAP + _CAPTION)
    headline_width = math.ceil(max(_length(title, _TITLE_SIZE), _length(subtitle, _SIZE)))
    of_legend = max(legend.width, math.ceil(_length(heading, _SIZE)))
    right = max(lefts[-1] - _GAP, lefts[place[0]] + of_legend, _MARGIN + headline_width)
    sheet = Image.new("RGB", (right + _MARGIN, tops[-1] + heights[-1] + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        _write(pen, (_MARGIN, _MARGIN - 8), title, _INK, _TITLE_SIZE)
    _write(pen, (_MARGIN, _MARGIN + top - _LINE - 4), subtitle, _FAINT, _SIZE)
    boxes = []
    for panel in panels:
        at = (lefts[panel.column], tops[panel.row])
        _write(pen, (at[0], at[1] - 8), panel.caption, _INK, _SIZE, anchor="ls")
        sheet.paste(panel.picture, at)
        boxes.append((*at, at[0] + panel.picture.width, at[1] + panel.picture.height))
    _write(pen, (lefts[place[0]], tops[place[1]] - 8), heading, _INK, _SIZE, anchor="ls")
    sheet.paste(legend, (lefts[place[0]], tops[place[1]]))
    return sheet, boxes


def _legend(
    names: Sequence[str], shares: Sequence[float], with_lamella: bool, height: int, colour_bar: _ColourBar | None
) -> Image.Image:
    """Draw a line for each label with its share, one for the lamella's outline, and the key of a thickness map."""
    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
    lines = len(names) + with_lamella
    depth = max(8, height // _LINE)  # of a column of lines
    of_name = math.ceil(max((_length(name, _SIZE) for name in (*names, *[_OUTLINE] * with_lamella)), default=0))
    width = _SWATCH + 12 + of_name + 16 + math.ceil(_length("<0.01 %", _SIZE)) + _GAP
    size = (width * max(1, -(-lines // depth)), max(1, min(lines, depth) * _LINE))
    below = size[1] + 14
    if colour_bar is not None:
        size = (max(size[0], math.ceil(_length(colour_bar.words, _SIZE))), below + 4 * _LINE)
    picture = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(picture)
    for n in range(lines):
        left, top = n // depth * width, n % depth * _LINE
        box, middle = (left, top + 4, left + _SWATCH, top + 25), top + 15
        if n == len(names):
            pen.rectangle(box, (90, 90, 90))
            pen.line((left, middle, left + _SWATCH, middle), _LAMELLA, 2)
            _write(pen, (left + _SWATCH + 12, middle), _OUTLINE, _INK, _SIZE, anchor="lm")
            continue
        pen.rectangle(box, PALETTE[n % len(PALETTE)])
        _write(pen, (left + _SWATCH + 12, middle), names[n], _INK, _SIZE, anchor="lm")
        _write(pen, (left + width - _GAP, middle), percentage(shares[n]), _FAINT, _SIZE, anchor="rm")
    if colour_bar is not None:
        _write(pen, (0, below + 15), colour_bar.words, _INK, _SIZE, anchor="lm")
        long = min(size[0], 420)
        steps, level = np.linspace(0, 1, len(_THICKNESS)), np.linspace(0, 1, long)
        colours = np.stack([np.interp(level, steps, channel) for channel in np.array(_THICKNESS).T], axis=1)
        bar = np.repeat(colours.round().astype(np.uint8)[None], 20, axis=0)
        picture.paste(Image.fromarray(bar), (0, below + _LINE + 4))
        at = below + 2 * _LINE + 10
        _write(pen, (0, at), colour_bar.low, _INK, _SIZE, anchor="lm")
        _write(pen, (long, at), colour_bar.high, _INK, _SIZE, anchor="rm")
    return picture


def _draw_scale_bar(
    pen: ImageDraw.ImageDraw,
    panel: tuple[int, int, int, int],
    pixels_per_voxel: float,
    voxel_size_angstrom: float | None,
) -> None:
    """Draw a bar of a round length, at most a third of the panel's width, in the lower left corner."""
    unit, size = ("nm", voxel_size_angstrom / 10) if voxel_size_angstrom else ("voxels", 1.0)
    left, bottom = panel[0] + 14, panel[3] - 16
    length = round_length((panel[2] - panel[0]) / 3 / pixels_per_voxel * size)
    pixels = max(1, round(length / size * pixels_per_voxel))
    pen.rectangle((left - 2, bottom - 6, left + pixels + 1, bottom + 1), (0, 0, 0))
    pen.rectangle((left, bottom - 4, left + pixels - 1, bottom - 1), (255, 255, 255))
    text = f"{_number(length)} {unit}"
    middle = left + max(pixels, _length(text, _SIZE)) / 2
    at = (middle, bottom - 12)
    _write(pen, at, text, (255, 255, 255), _SIZE, anchor="ms", stroke_width=2, stroke_fill=(0, 0, 0))


def round_length(longest: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that does not exceed `longest`."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(n for n in (1 * power, 2 * power, 5 * power) if n <= longest * (1 + 1e-9)))


def _number(value: float) -> str:
    """Format a number with four significant digits or fewer."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


# ----------------------------------------------------------------------------------------------------------------- text


def _write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, ink: Any, size: int, **options: Any) -> None:
    text, font = _printable(text, size)
    pen.text(at, text, ink, font, **options)


def _length(text: str, size: int) -> float:
    text, font = _printable(text, size)
    return float(font.getlength(text))


def _printable(text: str, size: int) -> tuple[str, Any]:
    """Return a text and a font with its characters: our own font, else a system font, else an ASCII text."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    own = _font(str(_OWN_FONT), size)
    for name in (str(_OWN_FONT), *_OTHER_FONTS):
        font = _font(name, size)
        if font is None:
            continue
        missing = bytes(font.getmask("\uffff"))
        if text.isascii() or all(bytes(font.getmask(letter)) != missing for letter in set(text)):
            return text, font
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letters).encode("ascii", "replace").decode(), own


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Any:
    """Load a font by its file or name; ``None`` if there is no such font."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
