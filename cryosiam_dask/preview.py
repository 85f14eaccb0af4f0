"""A picture of a segmentation: three slices through the middle, with the labels over the greys, and all labels along z.

The panels share one scale and stand as in a workshop drawing, the rows of a line being the same y::

    x–y   y–z        labels along z
    x–z   legend

1. What is read at once is a tile of a slice or a block of the labels, each by a task of its own, and what a task
   returns is of the picture's size: a volume of any size on disk will do.
2. Greys are averaged over cells of whole voxels until they are less than twice as fine as the picture, and resampled.
   Labels and lamella are never mixed: a pixel shows the voxel at its centre.
3. Along z a class shows wherever a single voxel of it lies in the column, the brighter the more there are. Numbers of
   classes say nothing about what matters more, so it is not the highest that is seen where several lie in a column, but
   the one that covers the least of the whole picture: nothing small is hidden.
"""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from cryosiam_dask.classes import COLOURS, named
from cryosiam_dask.components import Blocks, Index
from cryosiam_dask.executor import SERIAL, Executor
from cryosiam_dask.folders import real
from cryosiam_dask.ledger import part_name

PALETTE = COLOURS  # label 1 has the first
OPACITY = 0.5

_ENLARGE_TO, _LONGEST, _WIDEST = 640, 800, 2000  # pixels of an axis when enlarged, at most, and of all panels abreast
_MARGIN, _GAP, _CAPTION, _LINE = 28, 18, 24, 26
_PAPER, _INK, _FAINT, _LAMELLA, _DARK = (255, 255, 255), (30, 30, 36), (110, 110, 120), (255, 255, 255), (18, 18, 22)
_DIMMEST = 0.55  # of a colour where a class is thinnest along z
_LONGEST_NAME = 40
_ANISOTROPIC = 1.05  # voxels longer than this along one axis than along another are drawn so
#: Fonts with more than ASCII that systems have, for names that the font which comes with Pillow cannot write.
_OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf")
_PANELS, _FINGERPRINT, _THUMBNAIL = "panels", "fingerprint", "thumbnail"  # texts within the PNG file
_THUMBNAIL_BYTES = 24_000


class Sliceable(Protocol):
    """A numpy, zarr or HDF5 array, or anything else that gives a region for a tuple of slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Plane:
    """One slice: where it lies in the volume and on the sheet.

    Attributes
    ----------
    caption
        Printed above.
    axes
        Of the volume, (z, y, x), along the rows and the columns of the picture.
    position
        Voxel along the third axis.
    column, row
        Place on the sheet.
    """

    caption: str
    axes: tuple[int, int]
    position: int
    column: int
    row: int

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
    """From the voxels of a volume to the pixels of the picture, everything in (z, y, x).

    Attributes
    ----------
    shape
        Voxels.
    pixels
        Of the picture.
    cells
        Voxels whose greys are averaged.
    """

    shape: Index
    pixels: Index
    cells: Index

    @classmethod
    def of(cls, shape: Index, spacing: tuple[float, float, float], volume: bool) -> _Scale:
        """Fit a volume (or an image) whose voxels have the edges `spacing`, the shortest 1, on a sheet."""
        z, y, x = (n * s for n, s in zip(shape, spacing, strict=True))
        longest, width = max(y, x, z if volume else 0), 2 * x + z if volume else x
        zoom: float = max(1, round(_ENLARGE_TO / longest))
        if zoom * longest > _LONGEST or zoom * width > _WIDEST:
            zoom = min(_LONGEST / longest, _WIDEST / width)
            zoom = math.floor(zoom) if zoom >= 1 else zoom  # whole pixels for a voxel, as long as there are enough
        pixels = tuple(max(1, round(n * s * zoom)) for n, s in zip(shape, spacing, strict=True))
        cells = tuple(max(1, n // p) for n, p in zip(shape, pixels, strict=True))
        return cls(shape, (pixels[0], pixels[1], pixels[2]), (cells[0], cells[1], cells[2]))

    def binned(self, axis: int) -> int:
        """Length of an axis of averaged greys."""
        return -(-self.shape[axis] // self.cells[axis])

    def voxels_of_cells(self, axis: int) -> list[int]:
        """How many voxels each cell has along an axis; the last one may have fewer."""
        n, cell = self.shape[axis], self.cells[axis]
        return [min(first + cell, n) - first for first in range(0, n, cell)]

    def bins(self, axis: int) -> int:
        """Along an axis as many as there are voxels, but no more than pixels."""
        return min(self.shape[axis], self.pixels[axis])

    def columns_of_bins(self, axis: int) -> NDArray[np.int64]:
        """How many voxels fall into each bin along an axis."""
        return np.bincount(np.arange(self.shape[axis]) * self.bins(axis) // self.shape[axis])

    def voxels(self, axis: int) -> NDArray[np.int64]:
        """The voxel at the centre of each pixel."""
        n, pixels = self.shape[axis], self.pixels[axis]
        return (2 * np.arange(pixels) + 1) * n // (2 * pixels)


def preview_file(folder: Path, stem: str) -> Path:
    """Where the preview of a tomogram lies."""
    return folder / f"{stem}_preview.png"


def most_bytes(shape: Sequence[int], voxel_size_angstrom: Sequence[float | None] | None = None) -> int:
    """What the preview of a volume takes on the disk at most.

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
    panels = 2 * y * x + z * (y + x) if volume else y * x
    return 3 * panels + 500_000  # colours, and the rest of the sheet, which is white but for words


def write_preview(
    path: Path,
    tomogram: Sliceable,
    labels: Sliceable,
    *,
    voxel_size_angstrom: float | Sequence[float | None] | None = None,
    class_names: Sequence[str] = (),
    lamella: Sliceable | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
    fingerprint: str = "",
    executor: Executor = SERIAL,
) -> None:
    """Write a PNG of the central slices of a tomogram with its labels in colour, and of all labels along z.

    Parameters
    ----------
    path
        The PNG; it appears complete or not at all.
    tomogram, labels
        (z, y, x), or (y, x) for an image; of the same shape.
    voxel_size_angstrom
        Edge of a voxel in Å, or its edges along each axis, for the scale bar and the panels' proportions; ``None``,
        also for a single axis, gives a bar in voxels.
    class_names
        What each label is called; label 0 is not drawn. Labels without a name are numbered.
    lamella
        A mask of the same shape, drawn as an outline.
    limits
        Intensities shown as black and white; by default the 0.5 and 99.5 percentiles of the slices.
    title
        Printed above the slices, for example the tomogram's name.
    fingerprint
        Kept in the file, to tell which labels it shows: see `read_fingerprint`.
    executor
        Runs the pieces; what it is to read must then be something that can be sent to other processes.

    Raises
    ------
    LabelsError
        If there are neither two nor three axes.
    OSError
        If the file cannot be written.
    """
    blocks = Blocks.of(labels)  # type: ignore[arg-type]  # of the dtype nothing is asked
    shape, volume = blocks.shape, blocks.ndim == 3
    size = _voxel_size(voxel_size_angstrom, blocks.ndim)
    scale = _Scale.of(shape, _spacing(size), volume)
    planes = _planes(shape, volume)
    greys, colours, masks = _read_slices(tomogram, labels, lamella, planes, scale, blocks.ndim, executor)
    low, high = limits or map(float, np.percentile(np.concatenate([g.ravel() for g in greys]), (0.5, 99.5)))
    thickness = _thickness(labels, blocks, scale, executor)

    panels = []
    for plane, grey, colour, mask in zip(planes, greys, colours, masks, strict=True):
        rows, columns = (scale.pixels[axis] for axis in plane.axes)
        panel = _overlay((grey - low) / max(high - low, 1e-6), colour, (columns, rows))
        if lamella is not None:
            panel[_outline(mask)] = _LAMELLA
        panels.append(_Panel(plane.caption, plane.column, plane.row, Image.fromarray(panel)))
    if volume:
        picture = Image.fromarray(_along_z(thickness, scale))
        panels.append(_Panel("all labels along z, brighter where thicker", 2, 0, picture))

    count = max(len(class_names), 1 + max(thickness, default=0))
    names = named(class_names[1:], count - 1)
    shares = [float(thickness[n].sum()) / math.prod(shape) if n in thickness else 0.0 for n in range(count)]
    legend = _legend(names, shares[1:], lamella is not None, scale.pixels[0] if volume else scale.pixels[1])
    sheet, boxes = _lay_out(panels, legend, title, _subtitle(shape[3 - blocks.ndim :], size))
    in_x = scale.pixels[2] / shape[2]
    _draw_scale_bar(ImageDraw.Draw(sheet), boxes[0], in_x, size[-1] if size else None)

    texts = PngInfo()
    texts.add_itxt("Title", title)
    texts.add_text(_PANELS, json.dumps(boxes))
    texts.add_text(_FINGERPRINT, fingerprint)
    # Of a volume the x–y slice is the first and the labels along z are the last panel, of the same size.
    parts = [panel.picture for panel in (panels[0], panels[-1])[: len(panels)]]
    together = Image.new("RGB", (sum(part.width for part in parts), parts[0].height))
    for number, part in enumerate(parts):
        together.paste(part, (number * part.width, 0))
    texts.add_text(_THUMBNAIL, base64.b64encode(_small(together, _THUMBNAIL_BYTES)).decode())
    path = real(path)
    partial_file = path.with_name(part_name(path.name))
    try:
        # A sixth larger than by default, in half the time.
        sheet.save(partial_file, format="PNG", pnginfo=texts, compress_level=3)
        partial_file.replace(path)
    finally:
        partial_file.unlink(missing_ok=True)


def read_fingerprint(path: Path) -> str | None:
    """Return the fingerprint that a preview was written with, ``None`` where there is no such picture."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return str(picture.info.get(_FINGERPRINT, ""))
    except _UNREADABLE:
        return None


def thumbnail(path: Path, most_bytes: int) -> bytes | None:
    """Return the x–y slice of a preview, and the labels along z beside it, as a small WebP picture.

    Parameters
    ----------
    path
        From `write_preview`.
    most_bytes
        The picture is made smaller until it takes no more, as far as 48 pixels.

    Returns
    -------
    bytes or None
        ``None`` where there is no readable preview.
    """
    found = thumbnails(path)
    return next((each for each in found if len(each) <= most_bytes), found[-1] if found else None)


def thumbnails(path: Path) -> tuple[bytes, ...]:
    """Return the thumbnail of a preview in all its sizes, the largest first; none of one that cannot be read.

    Parameters
    ----------
    path
        From `write_preview`.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:  # its texts stand before its pixels, which are not read
            content = base64.b64decode(str(picture.info[_THUMBNAIL]), validate=True)
        with Image.open(BytesIO(content), formats=["WEBP"]) as small:
            image = small.convert("RGB")
    except (*_UNREADABLE, KeyError):
        return ()
    return (content, *(_as_webp(image, height) for height in _HEIGHTS if height < image.height))


_HEIGHTS = (220, 180, 140, 100, 70, 48)  # of thumbnails, in pixels


def _small(picture: Image.Image, most_bytes: int) -> bytes:
    """A picture as WebP, made smaller until it takes no more than so many bytes, as far as 48 pixels."""
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


#: What Pillow raises of a file that is missing, no picture, damaged, or too large to be one of ours.
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


# --------------------------------------------------------------------------------------------------------------- voxels


def _voxel_size(size: float | Sequence[float | None] | None, ndim: int) -> tuple[float, ...] | None:
    """Edges of a voxel in Å along each axis, ``None`` if one is unknown."""
    sizes = tuple(size) if isinstance(size, Sequence) else (size,) * ndim
    known = tuple(float(s) for s in sizes if s)
    return known if len(known) == ndim else None


def _spacing(size: tuple[float, ...] | None) -> tuple[float, float, float]:
    """Edges of a voxel along z, y and x by the shortest one; slight differences are not worth a blurred picture."""
    if size is None or max(size) <= _ANISOTROPIC * min(size):
        return 1.0, 1.0, 1.0
    z, y, x = (*(min(size),) * (3 - len(size)), *size)
    return z / min(size), y / min(size), x / min(size)


def _planes(shape: Index, volume: bool) -> list[_Plane]:
    """The slices through the middle; an image is its own only slice."""
    if not volume:
        return [_Plane("x-y", (1, 2), 0, 0, 0)]
    z, y, x = (s // 2 for s in shape)
    return [
        _Plane(f"x-y at z = {z}", (1, 2), z, 0, 0),
        _Plane(f"y-z at x = {x}", (1, 0), x, 1, 0),
        _Plane(f"x-z at y = {y}", (0, 2), y, 0, 1),
    ]


def _read_slices(
    tomogram: Sliceable,
    labels: Sliceable,
    lamella: Sliceable | None,
    planes: Sequence[_Plane],
    scale: _Scale,
    ndim: int,
    executor: Executor,
) -> tuple[list[NDArray[np.float32]], list[NDArray[Any]], list[NDArray[np.bool_]]]:
    """Averaged greys, and labels and lamella by pixel, of each slice."""
    greys, colours, masks = [], [], []
    for plane in planes:
        rows, columns = plane.axes
        greys.append(np.zeros((scale.binned(rows), scale.binned(columns)), np.float32))
        colours.append(np.zeros((scale.pixels[rows], scale.pixels[columns]), np.int64))
        masks.append(np.zeros(colours[-1].shape, bool))
    blocks = Blocks.of(tomogram)  # type: ignore[arg-type]
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
    """The part of a block that lies in a slice."""
    z, y, x = (
        slice(plane.position, plane.position + 1) if axis == plane.across else part for axis, part in enumerate(block)
    )
    return z, y, x


def _cells(tile: _Tile, axis: int, scale: _Scale) -> NDArray[np.int64]:
    """The cells that a tile has voxels of."""
    part = tile.region[axis]
    return np.arange(part.start // scale.cells[axis], (part.stop - 1) // scale.cells[axis] + 1)


def _pixels(tile: _Tile, axis: int, scale: _Scale) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pixels whose centres lie in a tile, and the voxels of the tile that they show."""
    voxels = scale.voxels(axis)
    part = tile.region[axis]
    pixels = np.flatnonzero((voxels >= part.start) & (voxels < part.stop))
    return pixels, voxels[pixels] - part.start


def _read_tile(
    tomogram: Sliceable,
    labels: Sliceable,
    lamella: Sliceable | None,
    planes: Sequence[_Plane],
    scale: _Scale,
    ndim: int,
    tile: _Tile,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.bool_]]:
    """Sums of greys in cells, labels and lamella by pixel, as rows and columns of the picture."""
    plane = planes[tile.plane]
    rows, columns = plane.axes

    def read(array: Sliceable) -> NDArray[Any]:
        part = np.asarray(array[tile.region[3 - ndim :]]).reshape([s.stop - s.start for s in tile.region])
        flat = part.squeeze(plane.across)
        return flat if rows < columns else flat.T

    with np.errstate(over="ignore", invalid="ignore"):
        grey = read(tomogram).astype(np.float32)
    # Sums of what is left cannot overflow.
    grey = np.clip(np.nan_to_num(grey, nan=0, posinf=0, neginf=0), -1e30, 1e30)
    for axis, of_volume in enumerate(plane.axes):
        first = tile.region[of_volume].start
        starts = np.maximum(_cells(tile, of_volume, scale) * scale.cells[of_volume] - first, 0)
        grey = np.add.reduceat(grey, starts, axis=axis)
    pixels = np.ix_(_pixels(tile, rows, scale)[1], _pixels(tile, columns, scale)[1])
    shown = read(labels)[pixels]
    # A mask may have to be interpolated as it is read, so nothing is asked of it in vain.
    inside = np.zeros(shown.shape, bool) if lamella is None or not shown.size else read(lamella)[pixels] > 0
    return grey, shown, inside


def _thickness(labels: Sliceable, blocks: Blocks, scale: _Scale, executor: Executor) -> dict[int, NDArray[np.int64]]:
    """Voxels of each class along z, in bins of y and x that are no finer than the voxels and the picture."""
    columns = [(y, x) for z, y, x in blocks.indices if z == 0]
    parts = executor.map(partial(_thickness_of_column, labels, blocks, scale), columns, name="project")
    shape = (scale.bins(1), scale.bins(2))
    found: dict[int, NDArray[np.int64]] = {}
    for (y, x), counts in zip(columns, parts, strict=True):
        _, rows, cols = blocks.slices((0, y, x))
        where = np.ix_(_bins(rows, 1, scale)[0], _bins(cols, 2, scale)[0])
        for label, count in counts.items():
            found.setdefault(label, np.zeros(shape, np.int64))[where] += count
    return found


def _bins(part: slice, axis: int, scale: _Scale) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bins that voxels of `part` fall into, and where in `part` each begins."""
    n, bins = scale.shape[axis], scale.bins(axis)
    numbers = np.arange(part.start * bins // n, (part.stop - 1) * bins // n + 1)
    return numbers, np.maximum(-(-numbers * n // bins) - part.start, 0)


def _thickness_of_column(
    labels: Sliceable, blocks: Blocks, scale: _Scale, column: tuple[int, int]
) -> dict[int, NDArray[np.int64]]:
    """The same for the blocks above each other, one after the other."""
    counts: dict[int, NDArray[np.int64]] = {}
    for z in range(blocks.counts[0]):
        block = blocks.read(labels, (z, *column))  # type: ignore[arg-type]
        highest = int(block.max())
        for label in range(1, highest + 1) if highest <= 20 else np.unique(block[block > 0]).tolist():
            of_class = block == label
            if not of_class.any():
                continue
            voxels = counts.setdefault(label, np.zeros(block.shape[1:], np.int64))
            for first in range(0, len(block), 255):  # sums of single bytes are many times faster
                voxels += of_class[first : first + 255].view(np.uint8).sum(axis=0, dtype=np.uint8)
    _, rows, cols = blocks.slices((0, *column))
    for label, voxels in counts.items():
        binned = np.add.reduceat(voxels, _bins(rows, 1, scale)[1], axis=0)
        counts[label] = np.add.reduceat(binned, _bins(cols, 2, scale)[1], axis=1)
    return counts


# ------------------------------------------------------------------------------------------------------------- pictures


def _overlay(grey: NDArray[np.float32], labels: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Labels in colour over greys of 0..1; (rows, columns, 3) of `size` (width, height)."""
    finer = grey.shape[1] > size[0] or grey.shape[0] > size[1]
    filter = Image.Resampling.LANCZOS if finer else Image.Resampling.BICUBIC
    shades = Image.fromarray((np.clip(grey, 0, 1) * 255).round().astype(np.uint8)).resize(size, filter)
    picture = np.repeat(np.asarray(shades, np.float32)[:, :, None], 3, axis=2)
    tints = _tints()[(labels - 1) % len(PALETTE)]
    mixed = np.where(labels[:, :, None] > 0, (1 - OPACITY) * picture + OPACITY * tints, picture)
    return mixed.round().astype(np.uint8)


def _tints() -> NDArray[np.float32]:
    return np.array(PALETTE, np.float32)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The inner rim of a mask, two pixels wide; not drawn along the edges of the picture."""
    inner: NDArray[np.bool_] = ndimage.binary_erosion(mask, iterations=2, border_value=1)
    return mask & ~inner


def _along_z(thickness: Mapping[int, NDArray[np.int64]], scale: _Scale) -> NDArray[np.uint8]:
    """Each class in its colour wherever there is any of it, what covers least on top; (rows, columns, 3)."""
    rows, columns = (scale.voxels(axis) * scale.bins(axis) // scale.shape[axis] for axis in (1, 2))
    picture = np.full((scale.pixels[1], scale.pixels[2], 3), _DARK, np.float32)
    columns_of_bins = np.outer(scale.columns_of_bins(1), scale.columns_of_bins(2))
    for label in sorted(thickness, key=lambda label: (-np.count_nonzero(thickness[label]), label)):
        voxels = thickness[label] / columns_of_bins
        # A few columns may be thicker by far than all others: a membrane seen from its edge.
        thickest = float(np.percentile(voxels[voxels > 0], 98))
        light = _DIMMEST + (1 - _DIMMEST) * np.sqrt(np.minimum(voxels / thickest, 1))
        shown = (voxels > 0)[np.ix_(rows, columns)]
        colour = light[np.ix_(rows, columns)][:, :, None] * _tints()[(label - 1) % len(PALETTE)]
        picture = np.where(shown[:, :, None], colour, picture)
    return picture.round().astype(np.uint8)


def _subtitle(shape: Sequence[int], size: tuple[float, ...] | None) -> str:
    # Pillow's own font has little beyond ASCII: neither Å nor ×.
    if size is None:
        unit = "unknown size"
    else:
        edges = list(dict.fromkeys(_number(s / 10) for s in size))
        unit = f"{' x '.join(_number(s / 10) for s in size) if len(edges) > 1 else edges[0]} nm"
    return f"{' x '.join(map(str, shape))} voxels of {unit}"


def _lay_out(
    panels: Sequence[_Panel], legend: Image.Image, title: str, subtitle: str
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Put panels and legend on a sheet; also return the (left, top, right, bottom) of each panel."""
    heading = _LINE * 2 + 10 if title else _LINE + 4
    columns, rows = 1 + max(panel.column for panel in panels), 1 + max(panel.row for panel in panels)
    widths, heights = [0] * columns, [0] * rows
    for panel in panels:
        widths[panel.column] = max(widths[panel.column], panel.picture.width, math.ceil(_length(panel.caption, 15)))
        heights[panel.row] = max(heights[panel.row], panel.picture.height)
    # An image alone has its legend beside it; a volume has it in the corner and what is free to its right.
    heights[-1] = max(heights[-1], legend.height)
    lefts = [_MARGIN]
    for width in widths:
        lefts.append(lefts[-1] + width + _GAP)
    tops = [_MARGIN + heading + _CAPTION]
    for height in heights[:-1]:
        tops.append(tops[-1] + height + _GAP + _CAPTION)
    headline_width = math.ceil(max(_length(title, 22), _length(subtitle, 15)))
    right = max(lefts[-1] - _GAP if columns > 1 else 0, lefts[1] + legend.width, _MARGIN + headline_width)
    sheet = Image.new("RGB", (right + _MARGIN, tops[-1] + heights[-1] + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        _write(pen, (_MARGIN, _MARGIN - 6), title, _INK, 22)
    _write(pen, (_MARGIN, _MARGIN + heading - _LINE - 6), subtitle, _FAINT, 15)
    boxes = []
    for panel in panels:
        at = (lefts[panel.column], tops[panel.row])
        _write(pen, (at[0], at[1] - 5), panel.caption, _INK, 15, anchor="ls")
        sheet.paste(panel.picture, at)
        boxes.append((*at, at[0] + panel.picture.width, at[1] + panel.picture.height))
    if legend.width > 1:
        _write(pen, (lefts[1], tops[-1] - 5), "share of the volume" if rows > 1 else "share", _INK, 15, anchor="ls")
    sheet.paste(legend, (lefts[1], tops[-1]))
    return sheet, boxes


def _legend(names: Sequence[str], shares: Sequence[float], with_lamella: bool, height: int) -> Image.Image:
    """One line for each label, with its share of the volume, and one for the lamella's outline."""
    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..." for name in names]
    lines = len(names) + with_lamella
    depth = max(8, height // _LINE)  # of a column of lines
    of_name = math.ceil(max((_length(name, 16) for name in (*names, "lamella")), default=0))
    width = 34 + of_name + 14 + math.ceil(_length("<0.01 %", 15)) + _GAP
    picture = Image.new("RGB", (width * max(1, -(-lines // depth)), max(1, min(lines, depth) * _LINE)), _PAPER)
    pen = ImageDraw.Draw(picture)
    for n in range(lines):
        left, top = n // depth * width, n % depth * _LINE
        if n == len(names):
            pen.rectangle((left, top + 3, left + 21, top + 20), (90, 90, 90))
            pen.line((left, top + 11, left + 21, top + 11), _LAMELLA, 2)
            _write(pen, (left + 32, top + 12), "lamella", _INK, 16, anchor="lm")
            continue
        pen.rectangle((left, top + 3, left + 21, top + 20), PALETTE[n % len(PALETTE)])
        _write(pen, (left + 32, top + 12), names[n], _INK, 16, anchor="lm")
        _write(pen, (left + width - _GAP, top + 12), percentage(shares[n]), _FAINT, 15, anchor="rm")
    return picture


def _draw_scale_bar(
    pen: ImageDraw.ImageDraw,
    panel: tuple[int, int, int, int],
    pixels_per_voxel: float,
    voxel_size_angstrom: float | None,
) -> None:
    """A bar of a round length, at most a third of the panel's width, in its lower left corner."""
    unit, size = ("nm", voxel_size_angstrom / 10) if voxel_size_angstrom else ("voxels", 1.0)
    left, bottom = panel[0] + 14, panel[3] - 16
    length = round_length((panel[2] - panel[0]) / 3 / pixels_per_voxel * size)
    pixels = max(1, round(length / size * pixels_per_voxel))
    pen.rectangle((left - 2, bottom - 6, left + pixels + 1, bottom + 1), (0, 0, 0))
    pen.rectangle((left, bottom - 4, left + pixels - 1, bottom - 1), (255, 255, 255))
    text = f"{_number(length)} {unit}"
    middle = left + max(pixels, _length(text, 17)) / 2
    at = (middle, bottom - 11)
    _write(pen, at, text, (255, 255, 255), 17, anchor="ms", stroke_width=2, stroke_fill=(0, 0, 0))


def round_length(longest: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that does not exceed `longest`."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(n for n in (1 * power, 2 * power, 5 * power) if n <= longest * (1 + 1e-9)))


def percentage(share: float) -> str:
    """A share in per cent with as many digits as say something; a trace of something is never 0."""
    if 0 < share < 5e-5:
        return "<0.01 %"
    return f"{100 * share:.0f} %" if share in (0, 1) or share >= 0.1 else f"{100 * share:.2g} %"


def _number(value: float) -> str:
    """A number with no more digits than it needs."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


# ----------------------------------------------------------------------------------------------------------------- text


def _write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, ink: Any, size: int, **options: Any) -> None:
    text, font = _printable(text, size)
    pen.text(at, text, ink, font, **options)


def _length(text: str, size: int) -> float:
    text, font = _printable(text, size)
    return float(font.getlength(text))


def _printable(text: str, size: int) -> tuple[str, Any]:
    """A text and a font that has its letters: Pillow's own, one of the system's, or else other letters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    own = ImageFont.load_default(size)
    if text.isascii():
        return text, own
    for name in _OTHER_FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        missing = bytes(font.getmask("\uffff"))
        if all(bytes(font.getmask(letter)) != missing for letter in set(text)):
            return text, font
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letters).encode("ascii", "replace").decode(), own
