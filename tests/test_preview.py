"""The preview shows what it was given: checked on analytic volumes, pixel by pixel."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cryosiam_dask.files.hdf5 import open_dataset
from cryosiam_dask.files.mask import open_mask
from cryosiam_dask.files.predictions import write_hdf5
from cryosiam_dask.model.classes import percentage
from cryosiam_dask.stages import preview
from cryosiam_dask.stages.preview import (
    OPACITY,
    PALETTE,
    preview_file,
    read_fingerprint,
    round_length,
    thumbnails,
    write_denoised_preview,
    write_preview,
)


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(np.int16)


def over_grey(label: int, grey: float) -> np.ndarray:
    """The colour of a label over a grey of 0..1."""
    return np.round((1 - OPACITY) * round(grey * 255) + OPACITY * np.array(PALETTE[(label - 1) % len(PALETTE)]))


def count(image: np.ndarray, colour: np.ndarray) -> int:
    return int(np.logical_and.reduce([np.abs(image[..., i] - colour[i]) <= 1 for i in range(3)]).sum())


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
    # Of the slices across z and y there is a bare one beside it.
    greys = zoom**2 * (2 * 64 * 40 + 20 * 64 + 2 * 20 * 40) - count(image, over_grey(1, 0.5))
    # All other voxels are grey but for the scale bar and its caption.
    assert 0 <= greys - count(image, np.array([128, 128, 128])) < 2 * 200 * 40


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
    grey_rows, _ = np.nonzero((image == 128).all(axis=2))
    with Image.open(tmp_path / "a.png") as stored:
        left, top, *_ = json.loads(stored.info["panels"])[0]

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


def test_reads_slices_and_blocks_only(tmp_path: Path) -> None:
    """Stored volumes are never read whole: of a tomogram three slices, of the labels a block at a time."""

    class Recorder:
        def __init__(self, array: Any) -> None:
            self.array, self.read, self.most = array, 0, 0
            self.shape, self.chunks, self.dtype = array.shape, array.chunks, array.dtype

        def __getitem__(self, index: Any) -> Any:
            values = self.array[index]
            self.read, self.most = self.read + values.size, max(self.most, values.size)
            return values

    stored = zarr.create_array({}, shape=(300, 1200, 40), chunks=(300, 400, 40), dtype="uint8")
    stored[:] = 7
    tomogram, labels = Recorder(stored), Recorder(stored)
    write_preview(tmp_path / "a.png", tomogram, labels)
    slices = 1200 * 40 + 300 * 1200 + 300 * 40
    assert (tomogram.read, tomogram.most) == (slices, 300 * 400)
    assert (labels.read, labels.most) == (slices + 300 * 1200 * 40, 300 * 400 * 40)
    # 1200 voxels are shown on 800 pixels.
    assert max(picture(tmp_path / "a.png").shape) < 1300
    stored = zarr.create_array({}, shape=(30, 1200, 40), chunks=(30, 400, 40), dtype="uint8")
    write_preview(tmp_path / "a.png", stored, stored)
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
    for colour in PALETTE[:15]:
        assert count(full, np.array(colour)) >= 22 * 18  # a swatch for each of fifteen classes


@pytest.mark.parametrize("voxel_size", [None, 10.0])
def test_scale_bar(tmp_path: Path, voxel_size: float | None) -> None:
    tomogram = np.full((64, 64, 64), 0.5, np.float32)
    write_preview(tmp_path / "a.png", tomogram, tomogram > 1, limits=(0, 1), voxel_size_angstrom=voxel_size)
    image = picture(tmp_path / "a.png")[:, 28 : 28 + 576]  # the column of the bare x-y panel
    # 64 voxels of 1 nm: the bar is 20 nm or 20 voxels, 180 pixels, 4 of them high, between black edges.
    white = (image == 255).all(axis=2) & np.roll((image != 255).any(axis=2), 1, axis=0).cumsum(axis=0).astype(bool)
    runs = [row for row in white[100:700] if row.sum() == 180]
    assert len(runs) == 4


def test_same_input_same_bytes_and_nothing_left_behind(tmp_path: Path, volume: Any) -> None:
    for name in ("a.png", "b.png"):
        write_preview(tmp_path / name, *volume, class_names=["background", "one"], title="t", voxel_size_angstrom=7.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_constant_and_non_finite_tomograms(tmp_path: Path) -> None:
    tomogram = np.zeros((8, 8, 8), np.float32)
    tomogram[4, 4] = [np.nan, np.inf, -np.inf, 3e38, -3e38, 3e38, 0, 0]
    write_preview(tmp_path / "a.png", tomogram, np.zeros(tomogram.shape, np.uint8))
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(1, 1), (1.99, 1), (2, 2), (4.9, 2), (5, 5), (99, 50), (100, 100), (0.3, 0.2), (12345, 10000)],
)
def test_round_length(longest: float, expected: float) -> None:
    assert round_length(longest) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.0321, "3.2 %"), (0.0004, "0.04 %"), (1e-9, "<0.01 %")],
)
def test_percentage(share: float, expected: str) -> None:
    assert percentage(share) == expected


# --------------------------------------------------------------------------------------------------- all labels along z


def panel_boxes(path: Path) -> list[list[int]]:
    with Image.open(path) as image:
        return json.loads(image.info["panels"])


def panels(path: Path) -> list[np.ndarray]:
    """The panels of a preview, by the places that are written into the file."""
    with Image.open(path) as image:
        return [np.asarray(image.crop(box)).astype(int) for box in panel_boxes(path)]


def test_along_z_every_class_shows_and_the_smallest_is_on_top(tmp_path: Path) -> None:
    labels = np.zeros((20, 64, 64), np.uint8)
    labels[3:12, 8:40, 8:40] = 2  # 32 x 32 columns, below and above
    labels[12:14, 20:30, 20:60] = 5  # 10 x 40 columns, hidden from above by nothing
    labels[1, 24, 24] = 1  # a single voxel behind both
    write_preview(tmp_path / "a.png", np.zeros(labels.shape), labels, limits=(0, 1))
    *_, along = panels(tmp_path / "a.png")
    assert along.shape == (640, 640, 3)
    shown = np.zeros((64, 64), int)
    shown[8:40, 8:40], shown[20:30, 20:60], shown[24, 24] = 2, 5, 1
    for label in (1, 2, 5):  # each is everywhere as thick as it ever is: in its full colour
        found = np.abs(along - np.array(PALETTE[label - 1])).max(axis=2) <= 1
        np.testing.assert_array_equal(found, (shown == label).repeat(10, 0).repeat(10, 1))


def test_along_z_is_brighter_where_thicker(tmp_path: Path) -> None:
    labels = np.zeros((64, 64, 64), np.uint8)
    for n in range(64):
        labels[: n + 1, :, n] = 1
    write_preview(tmp_path / "a.png", labels, labels)
    *_, along = panels(tmp_path / "a.png")
    light = along.sum(axis=2)
    assert (np.diff(light, axis=0) == 0).all() and (np.diff(light, axis=1) >= 0).all()
    assert light[0, -1] - 1 <= sum(PALETTE[0]) <= light[0, -1] + 1 and light[0, 0] > 0.5 * light[0, -1]
    assert (np.abs(along / light[:, :, None] - np.array(PALETTE[0]) / sum(PALETTE[0])) < 0.01).all()  # one hue


def test_along_z_is_even_where_the_labels_are(tmp_path: Path) -> None:
    """Whatever the pixels are to the voxels."""
    labels = np.zeros((3, 1000, 900), np.uint8)
    labels[:2, :, :700], labels[1, :, 700:] = 2, 2
    write_preview(tmp_path / "a.png", labels, labels)
    *_, along = panels(tmp_path / "a.png")
    assert along.shape == (800, 720, 3)
    assert (along[:, :559] == PALETTE[1]).all() and np.ptp(along[:, 561:], axis=(0, 1)).max() == 0
    assert along[0, 700].sum() < along[0, 0].sum()


def test_along_z_no_voxel_is_too_small_for_a_large_volume(tmp_path: Path) -> None:
    labels = np.zeros((2, 1700, 1500), np.uint8)
    spots = np.random.default_rng(0).integers(0, (1, 1700, 1500), (40, 3))
    labels[tuple(spots.T)] = 3
    write_preview(tmp_path / "a.png", labels, labels)
    *_, along = panels(tmp_path / "a.png")
    assert along.shape[:2] == (800, 706)
    expected = np.zeros((800, 706), bool)
    expected[spots[:, 1] * 800 // 1700, spots[:, 2] * 706 // 1500] = True
    np.testing.assert_array_equal((along != along[~expected][0]).any(axis=2), expected)
    hue = along[expected] / along[expected].sum(axis=1, keepdims=True) - np.array(PALETTE[2]) / sum(PALETTE[2])
    assert np.abs(hue).max() < 0.01


@given(data=st.data())
def test_thickness_is_that_of_the_whole_volume(data: st.DataObject) -> None:
    """Whatever the blocks and the bins are."""
    shape = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
    chunks = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
    pixels = data.draw(st.tuples(*[st.integers(1, 60)] * 3))
    seed, highest = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3, 200]))
    labels = np.random.default_rng(seed).integers(0, highest + 1, shape).astype(np.uint8)
    labels[labels % 3 == 2] = 0
    mask = labels > 1
    blocks, scale = preview.Blocks.of(labels, chunks), preview._Scale(shape, pixels, (1, 1, 1))
    along = preview._along_z(labels, mask, blocks, scale, preview.SERIAL)
    found = along.of_label
    bins = [min(n, p) for n, p in zip(shape, pixels, strict=True)]
    _, y, x = np.indices(shape)
    for label in range(1, highest + 1):
        expected = np.zeros(bins[1:], int)
        np.add.at(expected, (y[labels == label] * bins[1] // shape[1], x[labels == label] * bins[2] // shape[2]), 1)
        np.testing.assert_array_equal(found.get(label, np.zeros(bins[1:])), expected)
    for axis, profile in enumerate(along.profiles):
        others = tuple({0, 1, 2} - {axis})
        np.testing.assert_array_equal(profile, np.count_nonzero(labels, axis=others))
    columns = np.count_nonzero(labels, axis=0)
    np.testing.assert_array_equal(along.columns, np.bincount(columns.ravel(), minlength=shape[0] + 1))
    assert along.inside == mask.sum()


# ----------------------------------------------------------------------------------------------- bare, lamella, truth


def test_the_raw_tomogram_stands_beside_the_denoised_one(tmp_path: Path, volume: Any) -> None:
    denoised, labels = volume
    raw = np.broadcast_to(np.arange(40, dtype=np.int16), labels.shape)  # brighter from left to right
    write_preview(tmp_path / "a.png", denoised, labels, truth=labels, raw=raw, limits=(0, 1))
    of_xy, _, of_xz, bare_xy, bare_xz, true_xy, true_xz, raw_xy, raw_xz, _ = panels(tmp_path / "a.png")
    for each, bare, drawn, true in ((raw_xy, bare_xy, of_xy, true_xy), (raw_xz, bare_xz, of_xz, true_xz)):
        assert each.shape == bare.shape == drawn.shape == true.shape
        assert np.array_equal(drawn[:-80], true[:-80])  # but for the scale bar
        grey = each[0, :, 0]
        assert (np.diff(grey) >= 0).all() and grey[0] == 0 and grey[-1] == 255
    boxes = panel_boxes(tmp_path / "a.png")
    assert [boxes[n][0] for n in (7, 3, 0, 5)] == sorted({box[0] for box in boxes})[:4]  # from left to right


def test_no_paper_is_left_below_a_denoised_preview(tmp_path: Path, volume: Any) -> None:
    tomogram, _ = volume
    write_denoised_preview(tmp_path / "a.png", tomogram, tomogram)
    paper = (picture(tmp_path / "a.png") == 255).all(axis=(1, 2))
    boxes = panel_boxes(tmp_path / "a.png")
    bottom = max(box[3] for box in boxes)
    assert len(boxes) == 4 and paper[bottom:].all() and len(paper) - bottom == boxes[0][0]  # as wide as at the left


def test_a_bare_slice_stands_beside_the_labels_and_the_truth_beside_both(tmp_path: Path, volume: Any) -> None:
    tomogram, labels = volume
    truth = np.roll(labels, 4, axis=2)
    write_preview(tmp_path / "a.png", tomogram, labels, truth=truth, limits=(0, 1))
    of_xy, _, of_xz, bare_xy, bare_xz, truth_xy, truth_xz, _ = panels(tmp_path / "a.png")
    boxes = panel_boxes(tmp_path / "a.png")
    assert [boxes[n][1] for n in (3, 5)] == [boxes[0][1]] * 2  # in one row, from left to right
    assert boxes[3][0] < boxes[0][0] < boxes[5][0]
    for bare, drawn, true, area in ((bare_xy, of_xy, truth_xy, 32 * 20), (bare_xz, of_xz, truth_xz, 10 * 20)):
        assert bare.shape == drawn.shape == true.shape
        assert count(bare, over_grey(1, 0.5)) == 0
        zoom = drawn.shape[1] // 40
        assert count(drawn, over_grey(1, 0.5)) == count(true, over_grey(1, 0.5)) == zoom**2 * area
    np.testing.assert_array_equal(np.roll(of_xz, 4 * zoom, axis=1), truth_xz)


def wedge() -> np.ndarray:
    """A lamella of 20 to 51 voxels along z, of which a corner is missing."""
    z, y, x = np.indices((64, 32, 48))
    return ((z >= 8) & (z < 28 + y) & ~((y < 4) & (x < 4))).astype(np.uint8)


def test_a_lamella_is_drawn_as_an_outline_and_a_map_of_its_thickness(tmp_path: Path) -> None:
    labels = wedge()
    grey = np.full(labels.shape, 0.5, np.float32)
    write_preview(tmp_path / "a.png", grey, labels, limits=(0, 1), as_lamella=True, voxel_size_angstrom=10)
    _, of_yz, _, _, bare_xz, thickness = panels(tmp_path / "a.png")
    zoom = thickness.shape[0] // 32
    orange = count(of_yz, np.array(PALETTE[0]))
    assert 2 * 4 * 32 * zoom <= orange < 0.2 * of_yz.shape[0] * of_yz.shape[1]  # a line at either face, no area
    assert count(of_yz, over_grey(1, 0.5)) == 0 and count(bare_xz, np.array(PALETTE[0])) == 0
    columns = thickness.reshape(32, zoom, 48, zoom, 3)
    assert (np.ptp(columns, axis=(1, 3)) == 0).all()
    columns = columns[:, 0, :, 0]
    assert (columns[:4, :4] == 18).any() and (columns[:4, :4].max() < 30)  # nothing there
    assert (np.ptp(columns[4:], axis=1) == 0).all()  # equally thick along x
    light = columns[4:, 0] @ np.array([0.21, 0.72, 0.07])
    assert (np.diff(light)[1:-1] > 0).all()  # the lighter the thicker


def test_a_flat_lamella_looks_flat(tmp_path: Path) -> None:
    labels = np.zeros((60, 32, 32), np.uint8)
    labels[5:55], labels[5, ::2] = 1, 0  # 49 or 50 voxels
    write_preview(tmp_path / "a.png", labels, labels, as_lamella=True)
    *_, thickness = panels(tmp_path / "a.png")
    assert 0 < np.ptp(thickness, axis=(0, 1)).max() < 30


def test_slices_go_where_the_labels_are(volume: Any) -> None:
    """Through the middle, unless there is next to nothing there."""
    _, labels = volume

    def positions(labels: np.ndarray) -> list[int]:
        profiles = tuple(np.count_nonzero(labels, axis=axes) for axes in ((1, 2), (0, 2), (0, 1)))
        return [plane.position for plane in preview._planes(labels.shape, True, profiles)]

    assert positions(labels) == positions(labels * 0) == [10, 20, 32]
    moved = np.zeros_like(labels)
    moved[13:18, 2:9, 30:] = 1
    assert positions(moved) == [13, 30, 8]  # the nearest of equals


def test_what_was_cut_out_of_a_tomogram_tells_its_slices(
    tmp_path: Path, volume: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(preview, "_write", lambda pen, at, text, *rest, **options: written.append(text))
    write_preview(tmp_path / "a.png", *volume, first=(100, 200, 300), voxel_size_angstrom=14.2, lamella=volume[1])
    assert {"x–y at z = 110", "y–z at x = 320", "x–z at y = 232", "share of the lamella"} <= set(written)
    assert "20 × 64 × 40 voxels of 14.2 Å (1.42 nm), from voxel (100, 200, 300) on" in written
    assert "100 %" in written and "0.5 %" in written  # of 6,432 voxels 6,400 and 32


def test_our_own_font_has_the_signs_of_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_OTHER_FONTS", ())
    for text in ("80 × 112 × 112 voxels of 14 Å", "x–y", "Träger µm ± α°"):
        assert preview._printable(text, 20)[0] == text


# ------------------------------------------------------------------------------------------------- volumes of any shape


class Pool:
    """An executor of threads."""

    workers = 4

    def map(self, function: Any, items: Any, *, name: str, overlap: bool = False) -> list[Any]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, items))


def test_same_picture_from_any_store_with_any_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tomogram, labels = rng.random((30, 900, 500), np.float32), rng.integers(0, 4, (30, 900, 500)).astype(np.uint8)
    lamella = (np.indices(labels.shape)[1] < 800).astype(np.uint8)
    write_preview(tmp_path / "numpy.png", tomogram, labels, lamella=lamella)
    stored = zarr.create_array(tmp_path / "a.zarr", shape=labels.shape, chunks=(7, 130, 100), dtype="f4")
    stored[:] = tomogram
    write_hdf5(tmp_path / "a.h5", labels, attributes={})
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["labels"] = lamella
    mask = open_mask(tmp_path / "mask.h5", labels.shape)
    write_preview(
        tmp_path / "stored.png", stored, open_dataset(tmp_path / "a.h5", "labels"), lamella=mask, executor=Pool()
    )
    # Sums of greys in another order differ in their last digit, which may tip a rounding.
    difference = np.abs(picture(tmp_path / "numpy.png") - picture(tmp_path / "stored.png"))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def test_large_slices_are_averaged_and_their_labels_are_not(tmp_path: Path) -> None:
    _, y, x = np.indices((4, 2000, 1600), np.int32)
    labels = (x >= 800).astype(np.uint8) * 2
    write_preview(tmp_path / "a.png", (y + x) % 2, labels, limits=(0, 1))
    first = panels(tmp_path / "a.png")[0]
    assert first.shape == (800, 640, 3)
    half = first[:700]  # without the scale bar
    assert np.abs(half[:, :319] - 127).max() <= 2  # a chequerboard of voxels is grey
    assert np.abs(half[:, 321:] - over_grey(2, 0.5)).max() <= 2  # and no colour but that of the label


def test_voxels_longer_along_z_are_drawn_so(tmp_path: Path) -> None:
    labels = np.zeros((10, 32, 64), np.uint8)
    write_preview(tmp_path / "a.png", labels, labels, voxel_size_angstrom=(30.0, 10.0, 10.01))
    shapes = [p.shape[:2] for p in panels(tmp_path / "a.png")]
    assert shapes == [(320, 641), (320, 300), (300, 641), (320, 641), (300, 641), (320, 641)]
    write_preview(tmp_path / "a.png", labels, labels, voxel_size_angstrom=(None, 10.0, 10.0))
    shapes = [p.shape[:2] for p in panels(tmp_path / "a.png")]
    assert shapes == [(320, 640), (320, 100), (100, 640), (320, 640), (100, 640), (320, 640)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1), (1, 2500), (3, 1, 2500), (2500, 1, 3), (2, 2, 2), (1, 300, 300)])
def test_every_shape_has_a_picture(tmp_path: Path, shape: tuple[int, ...]) -> None:
    labels = np.ones(shape, np.uint8)
    write_preview(
        tmp_path / "a.png", labels, labels, lamella=labels, voxel_size_angstrom=10, title="t", class_names=["", "one"]
    )
    assert 150 < max(picture(tmp_path / "a.png").shape) < 2800
    assert len(panels(tmp_path / "a.png")) == (6 if len(shape) == 3 else 2)


def test_labels_of_other_programs(tmp_path: Path) -> None:
    labels = np.zeros((8, 16, 16), np.int64)
    labels[:, 4:8, 4:8] = 300
    write_preview(tmp_path / "a.png", np.zeros(labels.shape, ">i2"), labels)
    assert count(panels(tmp_path / "a.png")[-1], np.array(PALETTE[299 % 255])) == 16 * 40**2


# ------------------------------------------------------------------------------------------------------ names and files


@pytest.mark.parametrize("fonts", [(), preview._OTHER_FONTS])
def test_names_of_all_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fonts: Any, volume: Any) -> None:
    monkeypatch.setattr(preview, "_OTHER_FONTS", fonts)
    names = ["", "Träger °", "膜 \x00\n‮", "n" * 300]
    path = preview_file(tmp_path, "Träger_日本語 .1")
    write_preview(path, *volume, class_names=names, title="Träger_日本語 .1")
    assert path.name == "Träger_日本語 .1_preview.png"
    with Image.open(path) as image:
        assert image.info["Title"] == "Träger_日本語 .1"
        assert image.width < 2000  # the long name is cut


def test_letters_that_no_font_has_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_OTHER_FONTS", ())
    assert preview._printable("Träger 日\n", 15)[0] == "Trager ??"


def test_fingerprint_and_thumbnail(tmp_path: Path, volume: Any) -> None:
    tomogram, labels = volume
    write_preview(tmp_path / "a.png", tomogram, labels, fingerprint="abc", limits=(0, 1))
    assert read_fingerprint(tmp_path / "a.png") == "abc"
    for most in (100_000, 900):
        content = next(each for each in thumbnails(tmp_path / "a.png") if len(each) <= most)
        with Image.open(BytesIO(content)) as small:
            assert small.format == "WEBP"
            assert small.width == pytest.approx(2 * small.height * 40 / 64, abs=2)  # x–y, and beside it along z
            assert np.abs(np.asarray(small)[small.height // 2, small.width // 4] - over_grey(1, 0.5)).max() < 12
            assert np.abs(np.asarray(small)[small.height // 2, small.width * 3 // 4] - PALETTE[0]).max() < 12
    write_preview(tmp_path / "b.png", tomogram[0], labels[8], fingerprint="abc", limits=(0, 1))
    with Image.open(BytesIO(thumbnails(tmp_path / "b.png")[0])) as small:
        assert small.width == pytest.approx(small.height * 40 / 64, abs=1)


def test_no_thumbnail_of_what_is_no_preview(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (50, 50)).save(tmp_path / "other.png")
    write_preview(tmp_path / "cut.png", np.random.default_rng(0).random((30, 30, 30)), np.zeros((30, 30, 30), np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2_000])
    for name in ("missing.png", "text.png", "other.png", "cut.png"):
        assert thumbnails(tmp_path / name) == ()
    assert read_fingerprint(tmp_path / "missing.png") is None and read_fingerprint(tmp_path / "text.png") is None


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path, volume: Any) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        write_preview(tmp_path / "a.png", *volume)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
