"""Samples of tomograms: which voxels, and what is said of them, against the whole array."""

from __future__ import annotations

import gzip
import math
import tracemalloc
from functools import cache
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cryosiam_dask.core.phantom import make_phantom
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.stages.intensities import (
    SAMPLE_VOXELS,
    Sample,
    contrast,
    intensities,
    sample_array,
    sample_file,
    spread_regions,
)


def write(path: Path, voxels: np.ndarray, order: tuple[int, int, int] = (1, 2, 3)) -> Path:
    with mrcfile.new(path) as mrc:
        mrc.set_data(voxels)
        mrc.header.mapc, mrc.header.mapr, mrc.header.maps = order
    return path


@given(st.data())
def test_pieces_are_whole_disjoint_and_evenly_spread(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    shape = data.draw(st.lists(st.integers(1, 40), min_size=axes, max_size=axes))
    piece = data.draw(st.lists(st.integers(1, 50), min_size=axes, max_size=axes))
    voxels = data.draw(st.integers(1, 5000))
    regions = spread_regions(shape, piece, voxels)
    seen = np.zeros(shape, int)
    for region in regions:
        seen[region] += 1
        for part, edge, size in zip(region, piece, shape, strict=True):
            assert part.start % edge == 0 and part.stop == min(part.start + edge, size)
    assert seen.max() == 1 and regions == sorted(regions, key=lambda region: [part.start for part in region])
    assert len(regions) == 1 or seen.sum() <= voxels
    if math.prod(shape) <= voxels:
        assert seen.all()
    for axis, (edge, size) in enumerate(zip(piece, shape, strict=True)):
        places = sorted({region[axis].start // edge for region in regions})
        count = -(-size // edge)
        gaps = np.diff([-1, *places, count])
        # From end to end no two gaps differ by more than one piece, but for the half ones at the ends.
        assert gaps[1:-1].size == 0 or np.ptp(gaps[1:-1]) <= 1
        assert max(gaps[0], gaps[-1]) <= max(gaps[1:-1], default=count) + 1


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float32])
def test_small_tomograms_are_read_in_full(tmp_path: Path, order: tuple[int, int, int], dtype: type) -> None:
    voxels = np.random.default_rng(0).integers(0, 100, (7, 11, 13)).astype(dtype)
    sample = sample_file(read_header(write(tmp_path / "a.mrc", voxels, order)))
    assert sample.share == 1 and sample.where == "all voxels" and sample.values.dtype == np.float32
    np.testing.assert_array_equal(np.sort(sample.values), np.sort(voxels.ravel()))


def test_a_sample_is_what_lies_in_the_file(tmp_path: Path) -> None:
    """Each voxel holds its section, so that the places of the sample can be told."""
    voxels = np.broadcast_to(np.arange(50, dtype=np.float32)[:, None, None], (50, 300, 200))
    sample = sample_file(read_header(write(tmp_path / "a.mrc", np.array(voxels))), voxels=10**6)
    assert sample.values.size <= 10**6 and sample.share == pytest.approx(sample.values.size / voxels.size)
    sections = np.unique(sample.values)
    assert len(sections) > 5 and sections.mean() == pytest.approx(24.5, abs=1) and "evenly spaced" in sample.where


def test_an_image(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).random((30, 40), np.float32)
    sample = sample_file(read_header(write(tmp_path / "a.mrc", voxels)))
    np.testing.assert_array_equal(np.sort(sample.values), np.sort(voxels.ravel()))


@pytest.mark.parametrize("sections", [5, 40])
def test_of_a_compressed_file_the_beginning_is_read(
    tmp_path: Path, sections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = np.random.default_rng(0).integers(0, 100, (sections, 20, 30)).astype(np.int16)
    path = tmp_path / "a.mrc.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "a.mrc", voxels).read_bytes()))
    monkeypatch.setattr("cryosiam_dask.stages.intensities.SAMPLE_STREAM_BYTES", 10 * 20 * 30 * 2)
    sample = sample_file(read_header(path))
    np.testing.assert_array_equal(sample.values, voxels[:10].ravel())
    assert sample.where == ("all voxels" if sections == 5 else "the first 10 of the 40 sections of the compressed file")
    assert sample.share == min(1, 10 / sections)
    path.write_bytes(path.read_bytes()[:-6])  # without the end of its checksum
    if sections == 5:
        with pytest.raises(TomogramError, match="complete gzip file"):
            sample_file(read_header(path))
    else:
        sample_file(read_header(path))  # it was not read so far


def test_four_gigavoxels_take_no_memory(tmp_path: Path) -> None:
    """A sparse file, which takes no disk either."""
    shape = (1600, 1600, 1600)
    with mrcfile.new_mmap(tmp_path / "large.mrc", shape, mrc_mode=2) as mrc:
        mrc.data[800] = 3
    tracemalloc.start()
    sample = sample_file(read_header(tmp_path / "large.mrc"))
    found = intensities(sample, 0, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 * SAMPLE_VOXELS < sample.values.size <= SAMPLE_VOXELS and peak < 100 * 2**20
    assert (found.lowest, found.median) == (0, 0)


@pytest.mark.parametrize("kind", ["zarr", "sharded", "hdf5", "contiguous"])
def test_stored_arrays(tmp_path: Path, kind: str) -> None:
    voxels = np.random.default_rng(0).random((40, 50, 60), np.float32)
    if kind in ("hdf5", "contiguous"):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("x", data=voxels, chunks=(8, 8, 8) if kind == "hdf5" else None)
            whole, part = sample_array(file["x"]), sample_array(file["x"], 10_000)
    else:
        shards = {"shards": (16, 16, 16)} if kind == "sharded" else {}
        array = zarr.create_array(tmp_path / "a.zarr", data=voxels, chunks=(8, 8, 8), **shards)
        whole, part = sample_array(array), sample_array(array, 10_000)
    np.testing.assert_array_equal(np.sort(whole.values), np.sort(voxels.ravel()))
    assert 1000 < part.values.size <= 10_000 and np.isin(part.values, voxels).all()
    one = sample_array(np.ones((30, 40, 50)), 100)
    assert 0 < one.values.size <= 100


def test_what_is_said_of_a_sample() -> None:
    values = np.concatenate([np.linspace(-1, 2, 3001), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    found = intensities(Sample(values, 0.5, "some"), 0, 1)
    finite = values[np.isfinite(values)]
    assert (found.lowest, found.highest, found.median) == (-1, 2, pytest.approx(0.5))
    assert found.central == pytest.approx(tuple(np.quantile(finite, [0.005, 0.995])))
    assert found.below == np.count_nonzero(finite < 0) / values.size
    assert found.above == np.count_nonzero(finite > 1) / values.size
    assert found.non_finite == pytest.approx(3 / values.size)
    nothing = intensities(Sample(np.full(4, np.nan, np.float32), 1, "all"), 0, 1)
    assert (nothing.lowest, nothing.central, nothing.below, nothing.non_finite) == (None, None, 0, 1)


@pytest.mark.parametrize("chunks", [None, (4, 5, 6)])
def test_samples_of_hdf5_and_zarr_tomograms_are_their_voxels(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    voxels = np.random.default_rng(0).random((7, 11, 13)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("volume", data=voxels, chunks=chunks)
    array = zarr.create_array(tmp_path / "a.zarr", shape=voxels.shape, chunks=chunks or voxels.shape, dtype="f4")
    array[:] = voxels
    for path in (tmp_path / "a.h5", tmp_path / "a.zarr"):
        sample = sample_file(read_header(path))
        assert sample.share == 1 and sample.where == "all voxels"
        np.testing.assert_array_equal(np.sort(sample.values), np.sort(voxels.ravel()))
        few = sample_file(read_header(path), voxels=300)
        assert 0 < few.share < 1 or (path.suffix == ".zarr" and chunks is None)  # a single chunk
        assert few.values.size <= 300 and np.isin(few.values, voxels).all()


@cache
def bright_on_dark() -> np.ndarray:
    """A phantom, the other way round if it is dark on bright."""
    phantom = make_phantom(3)
    inside = phantom.lamella.astype(bool)
    dense, thin = (phantom.tomogram[inside & chosen].mean() for chosen in (phantom.truth > 0, phantom.truth == 0))
    return phantom.tomogram if dense > thin else 1 - phantom.tomogram


def changed(kind: str) -> np.ndarray:
    voxels, rng = bright_on_dark(), np.random.default_rng(0)
    spread = voxels.std()
    if kind == "z-scored":
        return (voxels - voxels.mean()) / spread
    if kind == "int16":
        return (30000 * voxels - 9000).astype(np.int16)
    if kind == "uint8":
        return (255 * voxels).astype(np.uint8)
    if kind == "noisy":
        return voxels + rng.normal(0, 2 * spread, voxels.shape).astype(np.float32)
    if kind == "in a vacuum":
        noise = rng.normal(voxels[:4].mean(), voxels[:4].std(), (300, *voxels.shape[1:])).astype(np.float32)
        noise[110:190] = voxels
        return noise
    if kind == "without a vacuum":
        return voxels[26:54]
    if kind == "gold and hot pixels":
        voxels = voxels.copy()
        for z, y, x in rng.integers(4, np.array(voxels.shape) - 4, (8, 3)):
            voxels[z - 3 : z + 3, y - 3 : y + 3, x - 3 : x + 3] += 10 * spread
        voxels[tuple(rng.integers(0, voxels.shape, (100, 3)).T)] = -50 * spread
        return voxels
    if kind == "padded":
        return np.pad(voxels, ((0, 0), (30, 20), (50, 7)))
    if kind == "with NaN":
        voxels = voxels.copy()
        voxels[::9, ::50, ::50] = np.nan
        return voxels
    return voxels


@pytest.mark.parametrize(
    "kind",
    ["", "z-scored", "int16", "uint8", "noisy", "in a vacuum", "without a vacuum", "gold and hot pixels", "padded",
     "with NaN"],
)  # fmt: skip
def test_contrast_of_a_lamella(kind: str) -> None:
    voxels = changed(kind)
    inverted = voxels.max() - voxels if voxels.dtype == np.uint8 else -voxels
    assert contrast(sample_array(voxels)) == "bright on dark"
    assert contrast(sample_array(inverted)) == "dark on bright"


@pytest.mark.parametrize("kind", ["noise", "hidden by noise", "slope", "constant", "labels", "small", "NaN"])
def test_contrast_that_cannot_be_told(kind: str) -> None:
    rng = np.random.default_rng(0)
    voxels = {
        "noise": lambda: rng.normal(size=(40, 80, 80)),
        "hidden by noise": lambda: bright_on_dark() + rng.normal(0, 5, bright_on_dark().shape),
        "slope": lambda: np.broadcast_to(np.linspace(0, 1, 80), (40, 80, 80)),
        "constant": lambda: np.full((40, 80, 80), 7),
        "labels": lambda: rng.random((40, 80, 80)) < 0.02,
        "small": lambda: bright_on_dark()[30:40, 40:60, 40:60],
        "NaN": lambda: np.full((40, 80, 80), np.nan),
    }[kind]()
    assert contrast(sample_array(voxels.astype(np.float32))) is None


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beside", [5, -5])
def test_the_straight_edge_of_a_hole_does_not_decide_the_contrast(sign: int, beside: float) -> None:
    """A third of it is a brighter or darker hole, whose edge leaves few voxels of a row of tiles on one side."""
    phantom, rng = bright_on_dark()[30:50], np.random.default_rng(0)
    spread = phantom.std()
    voxels = rng.normal(phantom.mean(), 0.3 * spread, (20, 336, 336)).astype(np.float32)
    voxels[:, 120:232, 120:232] = phantom
    voxels[:, : 100 if beside > 0 else 92] += beside * spread
    wrong = "dark on bright" if sign > 0 else "bright on dark"
    assert contrast(sample_array(sign * voxels)) != wrong


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_contrast_is_told_from_a_sample(tmp_path: Path, order: tuple[int, int, int]) -> None:
    """Also where files hold other orders of the axes, are compressed or consist of chunks."""
    voxels = -np.tile(bright_on_dark()[8:72], (1, 3, 3))
    path = write(tmp_path / "a.mrc", voxels, order)
    (tmp_path / "b.mrc.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    zarr.create_array(tmp_path / "c.zarr", data=voxels, chunks=(64, 64, 64))
    for each in (path, tmp_path / "b.mrc.gz", tmp_path / "c.zarr"):
        sample = sample_file(read_header(each), voxels=10**6)
        assert sample.values.size <= 10**6 and sum(part.size for part in sample.parts) == sample.values.size
        assert intensities(sample, 0, 1).contrast == "dark on bright"
