"""The preview shows what it was given: checked on analytic volumes, pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from cryosiam_dask.preview import OPACITY, PALETTE, round_length, write_preview


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(int)


def over_grey(label: int, grey: float) -> np.ndarray:
    """The colour of a label over a grey of 0..1."""
    return np.round((1 - OPACITY) * round(grey * 255) + OPACITY * np.array(PALETTE[(label - 1) % len(PALETTE)]))


def count(image: np.ndarray, colour: np.ndarray) -> int:
    return int((np.abs(image - colour).max(axis=2) <= 1).sum())


@pytest.fixture
def volume() -> tuple[np.ndarray, np.ndarray]:
    """A uniform grey volume with a block of label 1 through the middle and a block of label 2 away from it."""
    labels = np.zeros((20, 64, 40), np.uint8)
    labels[5:15, 16:48, 10:30] = 1
    labels[:2, :4, :4] = 2
    return np.full(labels.shape, 0.5, np.float32), labels


def test_each_label_covers_its_area_in_the_three_slices(tmp_path: Path, volume: Any) -> None:
    tomogram, labels = volume
    write_preview(tmp_path / "a.png", tomogram, labels, limits=(0, 1))
    image = picture(tmp_path / "a.png")
    zoom = 10  # 640 pixels for the longest axis of 64 voxels
    assert count(image, over_grey(1, 0.5)) == zoom**2 * (32 * 20 + 10 * 32 + 10 * 20)
    assert count(image, over_grey(2, 0.5)) == 0  # in none of the central slices
    greys = zoom**2 * (64 * 40 + 20 * 64 + 20 * 40) - count(image, over_grey(1, 0.5))
    # All other voxels are grey but for the scale bar and its caption.
    assert 0 <= greys - count(image, np.array([128, 128, 128])) < 200 * 40


def test_the_panels_stand_side_by_side_at_one_scale(tmp_path: Path, volume: Any) -> None:
    tomogram, labels = volume
    write_preview(tmp_path / "a.png", tomogram, labels, limits=(0, 1))
    rows, columns = np.nonzero(np.abs(picture(tmp_path / "a.png") - over_grey(1, 0.5)).max(axis=2) <= 1)
    top_left = (rows.min(), columns.min())
    mask = np.zeros((rows.max() + 1, columns.max() + 1), bool)
    mask[rows, columns] = True
    # x-y: 320 rows of 200 columns; y-z to its right in the same rows; x-z below in the same columns.
    assert mask[top_left[0] : top_left[0] + 320, top_left[1] : top_left[1] + 200].all()
    right = np.flatnonzero(mask[: top_left[0] + 320, top_left[1] + 200 :].any(axis=0))
    assert right.size == 100
    assert mask[top_left[0] : top_left[0] + 320, top_left[1] + 200 + right].all()
    below = np.flatnonzero(mask[top_left[0] + 320 :].any(axis=1))
    assert below.size == 100
    assert mask[top_left[0] + 320 + below, top_left[1] : top_left[1] + 200].all()


def test_the_slices_are_the_right_ones_and_not_mirrored(tmp_path: Path) -> None:
    tomogram = np.full((8, 16, 32), 0.5, np.float32)
    labels = np.zeros(tomogram.shape, np.uint8)
    labels[4, 1, 2] = 1  # only in x-y
    labels[1, 8, 3] = 2  # only in x-z
    labels[2, 3, 16] = 3  # only in y-z
    write_preview(tmp_path / "a.png", tomogram, labels, limits=(0, 1))
    image, zoom = picture(tmp_path / "a.png"), 20
    grey_rows, grey_columns = np.nonzero((image == 128).all(axis=2))
    top, left = grey_rows.min(), grey_columns.min()

    def corner(label: int) -> tuple[int, int]:
        rows, columns = np.nonzero(np.abs(image - over_grey(label, 0.5)).max(axis=2) <= 1)
        assert rows.size == zoom**2
        return int(rows.min()), int(columns.min())

    assert corner(1) == (top + zoom * 1, left + zoom * 2)
    row, column = corner(2)
    assert column == left + zoom * 3
    assert row > top + 16 * zoom + zoom  # the x-z panel is the lower one; z = 1 is its second row
    assert row == grey_rows.max() - 8 * zoom + 1 + zoom
    row, column = corner(3)
    assert row == top + zoom * 3
    assert column > left + 32 * zoom + 2 * zoom


def test_the_lamella_is_outlined_but_not_along_the_edge_of_the_field(tmp_path: Path, volume: Any) -> None:
    tomogram, labels = volume
    lamella = np.zeros_like(labels)
    lamella[4:16] = 1
    write_preview(tmp_path / "without.png", tomogram, labels * 0, limits=(0, 1))
    write_preview(tmp_path / "with.png", tomogram, labels * 0, limits=(0, 1), lamella=lamella)
    without, outlined = picture(tmp_path / "without.png"), picture(tmp_path / "with.png")
    drawn = np.array([128, 128, 128])
    # Two lines of two pixels in each of the panels that show z, none in x-y.
    assert count(without, drawn) - count(outlined, drawn) == 2 * 2 * 10 * (64 + 40)


def test_reads_slices_only(tmp_path: Path) -> None:
    """Stored volumes are never read whole."""

    class Recorder:
        def __init__(self, array: Any) -> None:
            self.array, self.read = array, 0
            self.shape = array.shape

        def __getitem__(self, index: Any) -> Any:
            values = self.array[index]
            self.read += values.size
            return values

    stored = zarr.create_array({}, shape=(30, 1200, 40), chunks=(30, 400, 40), dtype="uint8")
    stored[:] = 7
    tomogram, labels = Recorder(stored), Recorder(stored)
    write_preview(tmp_path / "a.png", tomogram, labels)
    # A stride of 2 brings 1200 voxels below 1000 pixels.
    assert tomogram.read == labels.read == 600 * 20 + 15 * 600 + 15 * 20
    assert max(picture(tmp_path / "a.png").shape) < 1000


def test_an_image_has_one_panel(tmp_path: Path) -> None:
    labels = np.zeros((40, 64), np.uint8)
    labels[10:20, 30:40] = 1
    write_preview(tmp_path / "a.png", np.full(labels.shape, 3, np.int16), labels, limits=(0, 6))
    assert count(picture(tmp_path / "a.png"), over_grey(1, 0.5)) == 100 * 100


def test_legend_and_title_make_room_for_themselves(tmp_path: Path, volume: Any) -> None:
    tomogram, labels = volume
    write_preview(tmp_path / "a.png", tomogram, labels)
    write_preview(tmp_path / "b.png", tomogram, labels, class_names=["", *"abcdefghijklmno"], title="t " * 200)
    plain, full = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    assert full.shape[0] > plain.shape[0] and full.shape[1] > plain.shape[1]
    for colour in PALETTE:
        assert count(full, np.array(colour)) >= 2 * 300  # two swatches each for fifteen classes and seven colours


@pytest.mark.parametrize("voxel_size", [None, 10.0])
def test_scale_bar(tmp_path: Path, voxel_size: float | None) -> None:
    tomogram = np.full((64, 64, 64), 0.5, np.float32)
    write_preview(tmp_path / "a.png", tomogram, tomogram > 1, limits=(0, 1), voxel_size_angstrom=voxel_size)
    image = picture(tmp_path / "a.png")[:, 28 : 28 + 640]  # the column of the x-y panel
    # 64 voxels of 1 nm: the bar is 20 nm or 20 voxels, 200 pixels, 4 of them high, between black edges.
    white = (image == 255).all(axis=2) & np.roll((image != 255).any(axis=2), 1, axis=0).cumsum(axis=0).astype(bool)
    runs = [row for row in white[100:760] if row.sum() == 200]
    assert len(runs) == 4


def test_same_input_same_bytes_and_nothing_left_behind(tmp_path: Path, volume: Any) -> None:
    for name in ("a.png", "b.png"):
        write_preview(tmp_path / name, *volume, class_names=["background", "one"], title="t", voxel_size_angstrom=7.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_constant_and_non_finite_tomograms(tmp_path: Path) -> None:
    tomogram = np.zeros((8, 8, 8), np.float32)
    tomogram[4, 4] = [np.nan, np.inf, -np.inf, 0, 0, 0, 0, 0]
    write_preview(tmp_path / "a.png", tomogram, np.zeros(tomogram.shape, np.uint8))
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(1, 1), (1.99, 1), (2, 2), (4.9, 2), (5, 5), (99, 50), (100, 100), (0.3, 0.2), (12345, 10000)],
)
def test_round_length(longest: float, expected: float) -> None:
    assert round_length(longest) == pytest.approx(expected)
