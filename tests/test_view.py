"""What napari is told to show: the voxels, names, colours and places of the files, read where they are looked at."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cryosiam_dask.commands import view
from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.errors import ConfigurationError, LabelsError
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.predictions import write_hdf5
from cryosiam_dask.model.classes import COLOURS
from cryosiam_dask.stages.ingest import convert
from cryosiam_dask.stages.intensities import sample_file

SHAPE = (12, 20, 16)
SIZE, ORIGIN = (20.0, 10.0, 10.0), (-30.0, 5.0, 7.0)


def voxels(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(50, 10, shape).astype(np.float32)


def make_labels(shape: tuple[int, ...] = SHAPE, highest: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, highest + 1, shape).astype(np.uint8)


def configure(folder: Path, **changes: Any) -> Configuration:
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def predict(folder: Path, stem: str, labels: np.ndarray, **attributes: Any) -> None:
    attributes = {"voxels": np.bincount(labels.ravel()).tolist(), "class_names": ["membrane", "actin"], **attributes}
    write_hdf5(folder / "out" / f"{stem}_preds.h5", labels, attributes=attributes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tomogram in an MRC file and its labels, at the same place."""
    for name in ("data", "out", "masks"):
        (tmp_path / name).mkdir()
    with mrcfile.new(tmp_path / "data" / "TS_1.mrc") as mrc:
        mrc.set_data(voxels())
        mrc.voxel_size = SIZE[::-1]
        mrc.header.origin = ORIGIN[::-1]
    predict(tmp_path, "TS_1", make_labels(), voxel_size_angstrom=SIZE, origin_angstrom=ORIGIN, nstart=(0, 0, 0))
    return tmp_path


def gathered(configuration: Configuration, filename: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Layers by their names, with their voxels computed, and what was said."""
    said: list[str] = []
    with view.layers(configuration, view.first_prediction(configuration, filename), said.append) as layers:
        return {
            layer.options["name"]: (layer, [np.asarray(level.compute(scheduler="sync")) for level in layer.levels])
            for layer in layers
        }, said


def test_layers_are_the_tomogram_its_lamella_and_its_classes(folder: Path) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9] = 1
    write_hdf5(folder / "masks" / "TS_1_preds.h5", mask, attributes={})
    found, said = gathered(configure(folder, mask_folder=str(folder / "masks")))
    assert list(found) == ["TS_1", "lamella", "membrane", "actin"] and said == []
    tomogram, labels = voxels(), make_labels()
    expected = [tomogram, mask, np.where(labels == 1, 1, 0), np.where(labels == 2, 2, 0)]
    for (layer, levels), whole in zip(found.values(), expected, strict=True):
        assert layer.kind == ("image" if whole is tomogram else "labels")
        np.testing.assert_array_equal(levels[0], whole)
        assert len(levels) == 1 and layer.options["units"] == ("nm", "nm", "nm")
        assert layer.options["scale"] == (2, 1, 1) and layer.options["translate"] == pytest.approx((-3, 0.5, 0.7))
    limits = np.quantile(tomogram, (0.005, 0.995))
    assert found["TS_1"][0].options["contrast_limits"] == pytest.approx(limits, rel=1e-5)
    assert [layer.colours for layer, _ in found.values()][2:] == [{1: COLOURS[0]}, {2: COLOURS[1]}]
    assert [layer.contour for layer, _ in found.values()] == [0, 2, 0, 0]


def as_gzip(folder: Path) -> str:
    with gzip.open(folder / "data" / "TS_1.mrc.gz", "wb") as file:
        file.write((folder / "data" / "TS_1.mrc").read_bytes())
    return ".mrc.gz"


def as_zarr(folder: Path) -> str:
    convert(folder / "data" / "TS_1.mrc", folder / "data" / "TS_1.zarr", chunks=(5, 7, 9))
    return ".zarr"


def as_hdf5(folder: Path) -> str:
    with h5py.File(folder / "data" / "TS_1.h5", "w") as file:
        file["volume"] = voxels()
    return ".h5"


@pytest.mark.parametrize("make", [as_gzip, as_zarr, as_hdf5])
def test_tomograms_of_any_format(folder: Path, make: Any) -> None:
    found, _ = gathered(configure(folder, file_extension=make(folder)))
    np.testing.assert_array_equal(found["TS_1"][1][0], voxels())
    assert not list(folder.rglob("*.view*"))


def test_images_unknown_voxel_sizes_and_labels_of_other_programs(folder: Path) -> None:
    with mrcfile.new(folder / "data" / "TS_1.mrc", overwrite=True) as mrc:
        mrc.set_data(voxels((20, 16)))
    with h5py.File(folder / "out" / "TS_1_preds.h5", "w") as file:
        file["labels"] = make_labels((20, 16), 3).astype(np.int64)
    found, _ = gathered(configure(folder, class_names=["membrane"]))
    assert list(found) == ["TS_1", "membrane", "class 2", "class 3"]
    layer, levels = found["class 3"]
    assert "scale" not in layer.options and layer.options["axis_labels"] == ("y", "x")
    np.testing.assert_array_equal(levels[0] == 3, make_labels((20, 16), 3) == 3)


def test_many_classes_share_a_layer(folder: Path) -> None:
    predict(folder, "TS_1", make_labels(highest=40))
    found, _ = gathered(configure(folder))
    layer, levels = found["labels"]
    np.testing.assert_array_equal(levels[0], make_labels(highest=40))
    assert layer.options["features"]["class"][:4] == ["background", "membrane", "actin", "class 3"]
    assert layer.colours[40] == COLOURS[39] and len(found) == 2


def test_what_is_missing_is_said_and_the_rest_is_shown(folder: Path) -> None:
    write_hdf5(folder / "masks" / "TS_1_preds.h5", np.full(SHAPE, 5, np.uint8), attributes={})
    write_hdf5(folder / "masks" / "TS_1_preds.h5", np.ones((3, 3), np.uint8), attributes={})
    (folder / "data" / "TS_1.mrc").unlink()
    found, said = gathered(configure(folder, mask_folder=str(folder / "masks")))
    assert list(found) == ["membrane", "actin"] and len(said) == 2
    assert "the labels are shown alone" in said[0] and "the lamella is not shown" in said[1]
    with mrcfile.new(folder / "data" / "TS_1.mrc") as mrc:
        mrc.set_data(voxels((2, 3, 4)))
    with pytest.raises(LabelsError, match="must have the shape"):
        gathered(configure(folder))


def test_the_first_that_is_done_is_opened(folder: Path) -> None:
    for name in ("TS_2", "TS_3"):
        shutil.copy(folder / "data" / "TS_1.mrc", folder / "data" / f"{name}.mrc")
    predict(folder, "TS_3", make_labels())
    for files, filename, expected in (
        (None, None, "TS_1"),
        (["TS_2.mrc", "TS_3.mrc"], None, "TS_3"),
        (None, "TS_3.mrc", "TS_3"),
    ):
        found = view.first_prediction(configure(folder, test_files=files), filename)
        assert found.name == f"{expected}_preds.h5"


def test_large_volumes_have_levels_and_are_read_a_piece_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_SINGLE", 1000)
    monkeypatch.setattr(view, "_COARSEST", 6)
    read: list[int] = []
    original = TomogramHeader.__getitem__

    def recorded(header: TomogramHeader, region: Any) -> Any:
        part = original(header, region)
        read.append(part.size)
        return part

    def sampled(header: TomogramHeader) -> Any:
        found = sample_file(header)
        read.clear()  # a sample is larger than a layer's piece
        return found

    monkeypatch.setattr(TomogramHeader, "__getitem__", recorded)
    monkeypatch.setattr(view, "sample_file", sampled)
    found, _ = gathered(configure(folder))
    assert max(read) <= 20 * 16
    for name, whole in (("TS_1", voxels()), ("actin", np.where(make_labels() == 2, 2, 0))):
        levels = found[name][1]
        assert [level.shape for level in levels] == [SHAPE, (6, 10, 8), (3, 5, 4)]
        for n, level in enumerate(levels):
            np.testing.assert_array_equal(level, whole[:: 2**n, :: 2**n, :: 2**n])


@given(data=st.data())
def test_parts_are_those_of_the_whole(data: st.DataObject) -> None:
    whole = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    lazy = view._Lazy(whole.shape, whole.dtype, whole.__getitem__)

    def index(n: int) -> Any:
        steps = st.sampled_from([None, 1, 2, 3, -1, -2])
        ends = st.none() | st.integers(-n, n)
        return data.draw(st.integers(-n, n - 1) | st.builds(slice, ends, ends, steps))

    wanted = tuple(index(n) for n in whole.shape[: data.draw(st.integers(1, 3))])
    np.testing.assert_array_equal(lazy[wanted], whole[wanted])


# --------------------------------------------------------------------------------------------------------------- napari


def test_without_napari_it_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'napari\[pyqt6\]'"):
        view.view(configure(folder), print, print)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("qt.qpa.xcb: could not connect to display :7\nqt.qpa.plugin: Could not load\n", "connect to display :7"),
        ("qtpy.QtBindingsNotFoundError: No Qt bindings could be found\n", "needs Qt"),
        ("QOpenGLWidget is not supported on this platform.\nno OpenGL\n", "OpenGL, which does not work"),
    ],
)
def test_without_a_screen_nothing_is_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: str
) -> None:
    program = tmp_path / "python"
    (tmp_path / "said").write_text(said)
    program.write_text(f"#!/bin/sh\ncat '{tmp_path}/said' >&2\nkill -ABRT $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(view.sys, "executable", str(program))
    with pytest.raises(ConfigurationError, match=expected):
        view.require_screen()


@pytest.mark.skipif(find_spec("napari") is None, reason="napari is not installed: pip install -e .[view]")
def test_napari_shows_the_layers(folder: Path) -> None:
    configure(folder)
    program = f"""
from pathlib import Path
from cryosiam_dask.commands import view
from cryosiam_dask.config import read_configuration
configuration = read_configuration(Path({str(folder)!r}) / "config.yaml")
view.require_screen()
with view.layers(configuration, view.first_prediction(configuration)) as found:
    viewer = view.show(found, "TS_1")
    for layer in viewer.layers:
        print(layer.name, *layer.scale, *(str(unit) for unit in layer.units), layer.visible)
    print(viewer.layers["actin"].get_color(2), tuple(viewer.layers["TS_1"].contrast_limits))
    viewer.close()
"""
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"{name} 2.0 1.0 1.0 {'nanometer ' * 3}True" for name in ("TS_1", "membrane", "actin")]
