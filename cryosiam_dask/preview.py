"""A picture of a segmentation: three slices through the middle, with the labels over the greys.

Only the slices are read, so a volume of any size on disk will do; slices longer than 1000 voxels are thinned by a
stride. The panels share one scale and stand as in a workshop drawing::

    x–y   y–z        the rows of x–y and y–z are the same y,
    x–z   legend     the columns of x–y and x–z are the same x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from cryosiam_dask.classes import OKABE_ITO

PALETTE = OKABE_ITO  # label 1 has the first, and after the last they begin again
OPACITY = 0.5

_LONGEST, _ENLARGE_TO = 1000, 640
_MARGIN, _GAP, _CAPTION, _LINE = 28, 18, 24, 26
_PAPER, _INK, _FAINT, _LAMELLA = (255, 255, 255), (30, 30, 36), (110, 110, 120), (255, 255, 255)


class Sliceable(Protocol):
    """A numpy, zarr or HDF5 array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Plane:
    """One slice: how to read it, and where it stands (0: row or column of the sheet)."""

    caption: str
    index: tuple[int | slice, ...]
    transposed: bool
    column: int
    row: int

    def read(self, array: Sliceable) -> NDArray[Any]:
        """The slice as rows and columns of the picture."""
        values = np.asarray(array[self.index])
        return values.T if self.transposed else values


def write_preview(
    path: Path,
    tomogram: Sliceable,
    labels: Sliceable,
    *,
    voxel_size_angstrom: float | None = None,
    class_names: Sequence[str] = (),
    lamella: Sliceable | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Write a PNG of the central slices of a tomogram with its labels in colour.

    Parameters
    ----------
    path
        The PNG; it appears complete or not at all.
    tomogram, labels
        (z, y, x), or (y, x) for an image; of the same shape.
    voxel_size_angstrom
        Edge of a voxel in Å, for the scale bar; ``None`` gives a bar in voxels.
    class_names
        What each label is called; label 0 is not drawn. Labels without a name are numbered.
    lamella
        A mask of the same shape, drawn as an outline.
    limits
        Intensities shown as black and white; by default the 0.5 and 99.5 percentiles of the slices.
    title
        Printed above the slices, for example the tomogram's name.
    """
    shape = tuple(tomogram.shape)
    stride = -(-max(shape) // _LONGEST)
    zoom = max(1, round(_ENLARGE_TO / max(shape)))
    planes = _planes(shape, stride)
    greys = [np.nan_to_num(plane.read(tomogram).astype(np.float32), posinf=0, neginf=0) for plane in planes]
    low, high = limits or map(float, np.percentile(np.concatenate([g.ravel() for g in greys]), (0.5, 99.5)))
    colours = [plane.read(labels) for plane in planes]
    n_labels = max(len(class_names), 1 + max(int(c.max()) for c in colours))
    names = [*class_names, *(f"label {n}" for n in range(len(class_names), n_labels))]

    panels = []
    for plane, grey, colour in zip(planes, greys, colours, strict=True):
        panel = _overlay((grey - low) / max(high - low, 1e-6), colour, zoom)
        if lamella is not None:
            panel[_outline(plane.read(lamella) > 0, zoom)] = _LAMELLA
        panels.append(Image.fromarray(panel))
    # Pillow's own font has little beyond ASCII: neither Å nor ×.
    unit = f"{_number(voxel_size_angstrom / 10)} nm" if voxel_size_angstrom else "unknown size"
    subtitle = f"{' x '.join(map(str, shape))} voxels of {unit}"
    sheet, first = _lay_out(planes, panels, _legend(names[1:], lamella is not None), title, subtitle)
    _draw_scale_bar(ImageDraw.Draw(sheet), first, zoom / stride, voxel_size_angstrom)
    partial = path.with_name(f".{path.name}.partial")
    sheet.save(partial, format="PNG", optimize=True)
    partial.replace(path)


def _planes(shape: tuple[int, ...], stride: int) -> list[_Plane]:
    """The slices through the middle; an image is its own only slice."""
    every = slice(None, None, stride)
    if len(shape) == 2:
        return [_Plane("x-y", (every, every), False, 0, 0)]
    z, y, x = (s // 2 for s in shape)
    return [
        _Plane(f"x-y at z = {z}", (z, every, every), False, 0, 0),
        _Plane(f"y-z at x = {x}", (every, every, x), True, 1, 0),
        _Plane(f"x-z at y = {y}", (every, y, every), False, 0, 1),
    ]


def _overlay(grey: NDArray[np.float32], labels: NDArray[Any], zoom: int) -> NDArray[np.uint8]:
    """Labels in colour over greys of 0..1, enlarged; (rows, columns, 3)."""
    size = (grey.shape[1] * zoom, grey.shape[0] * zoom)
    shades = Image.fromarray((np.clip(grey, 0, 1) * 255).round().astype(np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    picture = np.repeat(np.asarray(shades, np.float32)[:, :, None], 3, axis=2)
    label = labels.repeat(zoom, axis=0).repeat(zoom, axis=1)  # labels are never interpolated
    tints = np.array(PALETTE, np.float32)[(label.astype(np.int64) - 1) % len(PALETTE)]
    mixed = np.where(label[:, :, None] > 0, (1 - OPACITY) * picture + OPACITY * tints, picture)
    return mixed.round().astype(np.uint8)


def _outline(mask: NDArray[np.bool_], zoom: int) -> NDArray[np.bool_]:
    """The inner rim of a mask, two pixels wide, enlarged; not drawn along the edges of the picture."""
    large = mask.repeat(zoom, axis=0).repeat(zoom, axis=1)
    inner: NDArray[np.bool_] = ndimage.binary_erosion(large, iterations=2, border_value=1)
    return large & ~inner


def _lay_out(
    planes: list[_Plane], panels: list[Image.Image], legend: Image.Image, title: str, subtitle: str
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Put panels and legend on a sheet; also return the first panel's (left, top, right, bottom)."""
    heading = _LINE * 2 + 10 if title else _LINE + 4
    # An image alone has its legend beside it; a volume has it in the free corner.
    corner = (1, max(plane.row for plane in planes))
    sizes = {(plane.column, plane.row): panel.size for plane, panel in zip(planes, panels, strict=True)}
    sizes[corner] = legend.size
    widths = [max((w for (column, _), (w, _) in sizes.items() if column == c), default=0) for c in (0, 1)]
    heights = [max((h for (_, row), (_, h) in sizes.items() if row == r), default=0) for r in range(corner[1] + 1)]
    lefts = (_MARGIN, _MARGIN + widths[0] + _GAP)
    tops = [_MARGIN + heading + _CAPTION]
    tops += [tops[0] + heights[0] + _GAP + _CAPTION] * (len(heights) - 1)
    headline_width = int(max(_font(22).getlength(title), _font(15).getlength(subtitle)))
    width = max(lefts[1] + widths[1], _MARGIN + headline_width) + _MARGIN
    sheet = Image.new("RGB", (width, tops[-1] + heights[-1] + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_MARGIN, _MARGIN - 6), title, _INK, _font(22))
    pen.text((_MARGIN, _MARGIN + heading - _LINE - 6), subtitle, _FAINT, _font(15))
    for plane, panel in zip(planes, panels, strict=True):
        at = (lefts[plane.column], tops[plane.row])
        pen.text((at[0], at[1] - 5), plane.caption, _INK, _font(15), anchor="ls")
        sheet.paste(panel, at)
    sheet.paste(legend, (lefts[1], tops[corner[1]]))
    return sheet, (lefts[0], tops[0], lefts[0] + panels[0].width, tops[0] + panels[0].height)


def _legend(names: Sequence[str], with_lamella: bool) -> Image.Image:
    """One line for each label, and one for the lamella's outline."""
    lines = len(names) + with_lamella
    width = 34 + int(max((_font(16).getlength(name) for name in (*names, "lamella")), default=0)) + 2
    picture = Image.new("RGB", (width, max(1, lines * _LINE)), _PAPER)
    pen = ImageDraw.Draw(picture)
    for n, name in enumerate(names):
        pen.rectangle((0, n * _LINE + 3, 21, n * _LINE + 20), PALETTE[n % len(PALETTE)])
        pen.text((32, n * _LINE + 12), name, _INK, _font(16), anchor="lm")
    if with_lamella:
        top = len(names) * _LINE
        pen.rectangle((0, top + 3, 21, top + 20), (90, 90, 90))
        pen.line((0, top + 11, 21, top + 11), _LAMELLA, 2)
        pen.text((32, top + 12), "lamella", _INK, _font(16), anchor="lm")
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
    pixels = round(length / size * pixels_per_voxel)
    pen.rectangle((left - 2, bottom - 6, left + pixels + 1, bottom + 1), (0, 0, 0))
    pen.rectangle((left, bottom - 4, left + pixels - 1, bottom - 1), (255, 255, 255))
    text = f"{_number(length)} {unit}"
    pen.text(
        (left + pixels / 2, bottom - 11),
        text,
        (255, 255, 255),
        _font(17),
        anchor="ms",
        stroke_width=2,
        stroke_fill=(0, 0, 0),
    )


def round_length(longest: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that does not exceed `longest`."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(n for n in (1 * power, 2 * power, 5 * power) if n <= longest * (1 + 1e-9)))


def _number(value: float) -> str:
    """A number with no more digits than it needs."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _font(size: int) -> Any:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)
