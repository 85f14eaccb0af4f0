"""OME-Zarr images: what is written, validated by the field's own model of the format, and where viewers put it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ome_zarr_models import open_ome_zarr
from ome_zarr_models.v05 import Image, ImageLabel, Labels
from skimage.measure import block_reduce

from cryosiam_dask.errors import LabelsError, OutputError
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.model.classes import COLOURS
from cryosiam_dask.stages import ome_zarr
from cryosiam_dask.stages.intensities import sample_array
from cryosiam_dask.stages.ome_zarr import (
    contrast_limits,
    mean_of_pairs,
    mode_of_pairs,
    read_own_attributes,
    write_ome_zarr,
)

NAMES = ("Membran µ", "actin")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens to large volumes, with small ones."""
    for name, value in {"CHUNK": 4, "SHARD": 8, "COARSEST": 5, "_DEPTH": 3}.items():
        monkeypatch.setattr(ome_zarr, name, value)


def pair(shape: tuple[int, ...] = (11, 18, 23), dtype: str = "f4") -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return (random.random(shape) * 200).astype(dtype), random.integers(0, 3, shape).astype(np.uint8)


def voxels_of_levels(path: Path) -> list[np.ndarray]:
    image = zarr.open_group(path, mode="r")
    return [image[d["path"]][:] for d in image.attrs["ome"]["multiscales"][0]["datasets"]]


def placement(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scale and translation of each level, as ome-zarr-models reads them."""
    image = open_ome_zarr(zarr.open_group(path, mode="r"))
    return [
        (np.array(scale.scale), np.array(translation.translation))
        for dataset in image.attributes.ome.multiscales[0].datasets
        for scale, translation in [dataset.coordinateTransformations]
    ]


# --------------------------------------------------------------------------------------------------------------- levels


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=3, max_side=7), elements=st.integers(0, 4)))
def test_the_label_of_a_level_is_the_most_frequent_of_what_it_covers(labels: np.ndarray) -> None:
    result = mode_of_pairs(labels)
    assert result.shape == tuple(-(-n // 2) for n in labels.shape) and result.dtype == np.uint8
    for index in np.ndindex(result.shape):
        counts = Counter(labels[tuple(slice(2 * i, 2 * i + 2) for i in index)].ravel().tolist())
        best = [label for label, count in counts.items() if count == max(counts.values())]
        assert result[index] == min((label for label in best if label), default=0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["u1", "i1", "i2", "u2", "f4", "f8"]),
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=7),
    st.integers(0, 9),
)
def test_the_voxel_of_a_level_is_the_mean_of_what_it_covers(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    voxels = (np.random.default_rng(seed).random(shape) * 250 - 120 * (dtype[0] != "u")).astype(dtype)
    result = mean_of_pairs(voxels)
    assert result.dtype == voxels.dtype
    if all(n % 2 == 0 for n in shape):
        expected = block_reduce(voxels.astype(np.float64), 2, np.mean)
        np.testing.assert_allclose(result, np.rint(expected) if dtype[0] != "f" else expected, rtol=1e-6)
    for index in np.ndindex(result.shape):
        covered = voxels[tuple(slice(2 * i, 2 * i + 2) for i in index)]
        assert abs(float(result[index]) - covered.mean(dtype=np.float64)) <= (0.5 if dtype[0] != "f" else 1e-4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(11, 18, 23), (8, 8, 16), (1, 17, 9), (33, 3, 5), (5, 5, 5), (21, 14)])
def test_any_chunking_gives_the_levels_of_the_whole(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tomogram, labels = pair(shape)
    write_ome_zarr(tmp_path / "x.ome.zarr", tomogram, labels, class_names=NAMES)
    expected: tuple[list[np.ndarray], list[np.ndarray]] = ([tomogram], [labels])
    while max(expected[0][-1].shape) > 5:
        expected[0].append(mean_of_pairs(expected[0][-1]))
        expected[1].append(mode_of_pairs(expected[1][-1]))
    folders = (tmp_path / "x.ome.zarr", tmp_path / "x.ome.zarr" / "labels" / "segmentation")
    for folder, wanted in zip(folders, expected, strict=True):
        found = voxels_of_levels(folder)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", "f2", ">f4", "f8", "bool"])
def test_voxels_keep_their_dtype(tmp_path: Path, dtype: str) -> None:
    tomogram, labels = pair(dtype=dtype)
    write_ome_zarr(tmp_path / "x.ome.zarr", tomogram, labels)
    (found,) = voxels_of_levels(tmp_path / "x.ome.zarr")
    assert found.dtype == (np.uint8 if dtype == "bool" else tomogram.dtype.newbyteorder("="))
    np.testing.assert_array_equal(found, tomogram)


@pytest.mark.usefixtures("small_chunks")
def test_what_is_not_finite_becomes_the_minimum_and_does_not_spread(tmp_path: Path) -> None:
    tomogram, _ = pair()
    tomogram[3, 4, 5:8] = np.nan, np.inf, -np.inf
    write_ome_zarr(tmp_path / "x.ome.zarr", tomogram, minimum=-7)
    levels = voxels_of_levels(tmp_path / "x.ome.zarr")
    np.testing.assert_array_equal(levels[0], np.where(np.isfinite(tomogram), tomogram, -7))
    assert all(np.isfinite(level).all() for level in levels)


# ---------------------------------------------------------------------------------------------- what viewers make of it


@pytest.mark.parametrize("dtype", ["f4", "i2", "u1"])
def test_viewers_are_told_what_to_show_as_black_and_white(tmp_path: Path, dtype: str) -> None:
    tomogram = np.random.default_rng(0).normal(100, 10, (20, 40, 50)).astype(dtype)
    tomogram[0, 0, :2] = 0, 127  # a few voxels far from all others
    if dtype == "f4":
        tomogram[1, 0, :2] = np.nan, -np.inf
    write_ome_zarr(tmp_path / "x.ome.zarr", tomogram)
    (channel,) = zarr.open_group(tmp_path / "x.ome.zarr", mode="r").attrs["ome"]["omero"]["channels"]
    finite = tomogram[np.isfinite(tomogram)]
    assert [channel["window"][end] for end in ("start", "end")] == pytest.approx(np.quantile(finite, (0.005, 0.995)))
    assert [channel["window"][end] for end in ("min", "max")] == [0, finite.max()] and channel["color"] == "FFFFFF"


@pytest.mark.parametrize("values", [np.full((4, 5, 6), 7.0), np.full((4, 5, 6), np.nan), np.zeros((5, 6), bool)])
def test_black_and_white_always_differ(values: np.ndarray) -> None:
    low, high, lowest, highest = contrast_limits(sample_array(values))
    assert lowest <= low < high <= highest


@pytest.mark.usefixtures("small_chunks")
def test_the_model_of_the_format_accepts_it(tmp_path: Path) -> None:
    tomogram, labels = pair()
    size, position = (10.5, 9.96, 9.96), (100.0, -20.0, 3.0)
    write_ome_zarr(
        tmp_path / "TS 1.5 µ.ome.zarr", tomogram, labels, class_names=NAMES, voxel_size_angstrom=size,
        position_angstrom=position, attributes={"nstart": np.array([1, 2]), "source": "x.mrc"},
    )  # fmt: skip
    group = zarr.open_group(tmp_path / "TS 1.5 µ.ome.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    image = open_ome_zarr(group)
    assert isinstance(image, Image)
    multiscale = image.attributes.ome.multiscales[0]
    assert (multiscale.name, multiscale.type) == ("TS 1.5 µ", "mean")
    assert [(axis.name, axis.type, axis.unit) for axis in multiscale.axes] == [(a, "space", "angstrom") for a in "zyx"]
    assert isinstance(open_ome_zarr(group["labels"]), Labels)
    assert open_ome_zarr(group["labels"]).attributes.ome.labels == ["segmentation"]
    label = open_ome_zarr(group["labels/segmentation"])
    assert isinstance(label, ImageLabel)
    described = label.attributes.ome.image_label
    assert [c.model_dump()["rgba"] for c in described.colors] == [(*COLOURS[0], 255), (*COLOURS[1], 255)]
    assert [(p.label_value, p.model_extra["class"]) for p in described.properties] == [(1, "Membran µ"), (2, "actin")]
    assert described.source.image == "../../"
    assert label.attributes.ome.multiscales[0].datasets == multiscale.datasets  # side by side at every level
    assert read_own_attributes(tmp_path / "TS 1.5 µ.ome.zarr") == {"nstart": [1, 2], "source": "x.mrc"}
    header = read_header(tmp_path / "TS 1.5 µ.ome.zarr")  # and it can be segmented in its turn
    assert (header.voxel_size_angstrom, header.origin_angstrom) == (size, position)


@pytest.mark.usefixtures("small_chunks")
def test_a_bright_cube_stays_where_it_is_at_every_level(tmp_path: Path) -> None:
    """Its centre in Å, from the scale and translation of each level: a cube of whole coarse voxels must not move."""
    tomogram, labels = np.zeros((16, 32, 32), np.float32), np.zeros((16, 32, 32), np.uint8)
    cube = (slice(8, 16), slice(16, 24), slice(0, 8))
    tomogram[cube] = labels[cube] = 1
    size, position = np.array([12.0, 10.0, 8.0]), np.array([-50.0, 0.0, 1000.0])
    expected = position + size * [11.5, 19.5, 3.5]
    path = tmp_path / "x.ome.zarr"
    write_ome_zarr(path, tomogram, labels, voxel_size_angstrom=size.tolist(), position_angstrom=position.tolist())
    for folder in (path, path / "labels" / "segmentation"):
        levels, places = voxels_of_levels(folder), placement(folder)
        assert len(levels) == len(places) == 4
        for voxels, (scale, translation) in zip(levels, places, strict=True):
            centre = np.argwhere(voxels > 0).mean(axis=0)
            np.testing.assert_allclose(translation + scale * centre, expected)


def test_voxel_sizes_that_are_unknown(tmp_path: Path) -> None:
    tomogram, _ = pair()
    write_ome_zarr(tmp_path / "a.ome.zarr", tomogram, voxel_size_angstrom=(None, 10, 14), position_angstrom=(1, 2, 3))
    ((scale, translation),) = placement(tmp_path / "a.ome.zarr")
    assert (scale.tolist(), translation.tolist()) == ([12, 10, 14], [1, 2, 3])
    write_ome_zarr(tmp_path / "b.ome.zarr", tomogram, voxel_size_angstrom=(None,) * 3, position_angstrom=(1, 2, 3))
    ((scale, translation),) = placement(tmp_path / "b.ome.zarr")
    assert (scale.tolist(), translation.tolist()) == ([1, 1, 1], [0, 0, 0])
    image = open_ome_zarr(zarr.open_group(tmp_path / "b.ome.zarr", mode="r"))
    assert {axis.unit for axis in image.attributes.ome.multiscales[0].axes} == {None}


@pytest.mark.usefixtures("small_chunks")
def test_an_axis_of_one_voxel_is_not_scaled(tmp_path: Path) -> None:
    write_ome_zarr(tmp_path / "x.ome.zarr", np.zeros((1, 16, 16), np.int8), voxel_size_angstrom=(10, 10, 10))
    assert [scale.tolist() for scale, _ in placement(tmp_path / "x.ome.zarr")] == [
        [10, 10, 10],
        [10, 20, 20],
        [10, 40, 40],
    ]


def test_chunks_and_shards(tmp_path: Path) -> None:
    tomogram = zarr.create_array({}, shape=(40, 300, 520), chunks=(40, 300, 520), dtype="u1", fill_value=3)
    write_ome_zarr(tmp_path / "x.ome.zarr", tomogram)
    group = zarr.open_group(tmp_path / "x.ome.zarr", mode="r")
    arrays = [group[str(n)] for n in range(4)]
    assert [array.shape for array in arrays] == [(40, 300, 520), (20, 150, 260), (10, 75, 130), (5, 38, 65)]
    assert [array.shards for array in arrays] == [(40, 256, 256), (20, 256, 256), None, None]
    assert [array.chunks for array in arrays] == [(40, 128, 128), (20, 128, 128), (10, 75, 128), (5, 38, 65)]
    assert sum(file.is_file() for file in (tmp_path / "x.ome.zarr" / "0" / "c").rglob("*")) == 6


@pytest.mark.skipif(
    find_spec("napari_ome_zarr") is None, reason="needs napari's reader: pip install -c constraints.txt napari-ome-zarr"
)
def test_napari_opens_it_in_its_place(tmp_path: Path) -> None:
    """With napari's own reader, which needs no screen; in a process of its own, as it warns of its libraries."""
    tomogram, labels = pair()
    path = tmp_path / "x.ome.zarr"
    write_ome_zarr(
        path, tomogram, labels, class_names=NAMES, voxel_size_angstrom=(12, 10, 8), position_angstrom=(1, 2, 3)
    )
    code = f"""
import json, numpy as np
from napari_ome_zarr import napari_get_reader

def place(layer):  # of its first and last voxel, as napari puts layers
    corners = np.array([[0, 0, 0], np.array(layer[0][0].shape) - 1]) * layer[1]["scale"] + layer[1].get("translate", 0)
    matrix = np.asarray(layer[1]["affine"].affine_matrix)
    return (corners @ matrix[:3, :3].T + matrix[:3, 3]).tolist()

layers = image, label = napari_get_reader({str(path)!r})({str(path)!r})
np.savez({str(tmp_path / "read.npz")!r}, image=np.asarray(image[0][0]), label=np.asarray(label[0][0]))
kept = [[layer[2], list(layer[1]["scale"]), place(layer)] for layer in layers]
print("\\n" + json.dumps([*kept, list(label[1]["colormap"][2]), label[1]["properties"]["class"]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *layers, colour, names = json.loads(done.stdout.splitlines()[-1])
    assert [(kind, scale) for kind, scale, _ in layers] == [("image", [12, 10, 8]), ("labels", [12, 10, 8])]
    # Version 0.10 of the reader leaves translations out, of the image and of its labels alike.
    first, last = np.array(layers[0][2])
    assert layers[0][2] == layers[1][2] and first.tolist() in ([0, 0, 0], [1, 2, 3])
    np.testing.assert_allclose(last - first, (np.array(tomogram.shape) - 1) * (12, 10, 8))
    np.testing.assert_allclose(colour, [*np.array(COLOURS[1]) / 255, 1])
    assert names == list(NAMES)
    with np.load(tmp_path / "read.npz") as read:
        np.testing.assert_array_equal(read["image"], tomogram)
        np.testing.assert_array_equal(read["label"], labels)


# ----------------------------------------------------------------------------------------------- faults, and executors


class Failing:
    """Fails at the n-th pass over the volume."""

    workers = 1

    def __init__(self, left: int) -> None:
        self.left = left

    def map(self, function: Callable[[Any], Any], items: Any, *, name: str, overlap: bool = False) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return [function(item) for item in items]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("passes", [0, 1, 4])
def test_a_failure_leaves_the_earlier_folder(tmp_path: Path, passes: int) -> None:
    tomogram, labels = pair()
    path = tmp_path / "x.ome.zarr"
    with pytest.raises(OutputError, match="must be writable; found No space left on device"):
        write_ome_zarr(path, tomogram, labels, executor=Failing(passes))
    assert not list(tmp_path.iterdir())
    write_ome_zarr(path, tomogram, labels, attributes={"run": 1})
    with pytest.raises(OutputError):
        write_ome_zarr(path, tomogram + 1, labels, executor=Failing(passes))
    np.testing.assert_array_equal(voxels_of_levels(path)[0], tomogram)
    assert read_own_attributes(path) == {"run": 1}
    write_ome_zarr(path, tomogram + 1, labels)
    np.testing.assert_array_equal(voxels_of_levels(path)[0], tomogram + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ome.zarr"]


def test_labels_of_another_shape_and_empty_volumes(tmp_path: Path) -> None:
    tomogram, labels = pair()
    with pytest.raises(LabelsError, match=r"the shape of their tomogram, \(11, 18, 23\); found \(11, 18, 22\)"):
        write_ome_zarr(tmp_path / "x.ome.zarr", tomogram, labels[..., 1:])
    with pytest.raises(OutputError, match="an image must hold voxels"):
        write_ome_zarr(tmp_path / "x.ome.zarr", tomogram[:0])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_chunks")
def test_tasks_travel_and_may_run_twice(tmp_path: Path) -> None:
    class Travelling:
        workers = 1

        def map(self, function: Any, items: Any, *, name: str, overlap: bool = False) -> Any:
            function, items = pickle.loads(pickle.dumps((function, items)))
            [function(item) for item in items]
            return [function(item) for item in reversed(items)][::-1]

    tomogram, labels = pair()
    write_ome_zarr(tmp_path / "a.ome.zarr", tomogram, labels, executor=Travelling())
    write_ome_zarr(tmp_path / "b.ome.zarr", tomogram, labels)
    for one, other in zip(*(sorted((tmp_path / n).rglob("*")) for n in ("a.ome.zarr", "b.ome.zarr")), strict=True):
        assert one.is_dir() or one.name == "zarr.json" or one.read_bytes() == other.read_bytes()


def test_attributes_of_others(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "x.zarr")
    assert read_own_attributes(tmp_path / "x.zarr") == read_own_attributes(tmp_path) == {}
