"""What is said of files: of those that this program knows, and of those that only claim to be."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import torch
import zarr

from cryosiam_dask.commands.info import inspect
from cryosiam_dask.errors import CryosiamDaskError
from cryosiam_dask.files.predictions import write_hdf5, write_instances_hdf5
from cryosiam_dask.model.checkpoint import read_checkpoint, read_settings
from cryosiam_dask.stages.ingest import convert
from support import checkpoints, golden

VOXELS = np.random.default_rng(0).integers(-50, 50, (6, 7, 8)).astype(np.int16)


def write_tomogram(path: Path, voxels: np.ndarray = VOXELS) -> Path:
    with mrcfile.new(path) as mrc:
        mrc.set_data(voxels)
        mrc.voxel_size = 9.96
        mrc.header.origin = (10, 20, 30)
        mrc.nstart = (1, 2, 3)
    return path


def plain(path: Path) -> dict[str, Any]:
    """What is said, as JSON that any reader takes."""
    values = inspect(path).as_json()
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values
    return values


@pytest.mark.parametrize("name", ["TS_1.mrc", "TS_1.rec", "TS_1.mrc.gz", "a name with ümlauts and dots 9.96.mrc", "TS"])
def test_tomograms(tmp_path: Path, name: str) -> None:
    path = write_tomogram(tmp_path / "x.mrc").rename(tmp_path / name)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = plain(path)
    assert found["kind"] == "MRC tomogram" and found["path"] == str(path)
    facts = found["facts"]
    assert (facts["shape"], facts["axes"], facts["dtype"], facts["mode"]) == ([6, 7, 8], "zyx", "int16", 1)
    assert facts["voxel_size_angstrom"] == pytest.approx([9.96] * 3)
    assert (facts["origin_angstrom"], facts["nstart"]) == ([30, 20, 10], [3, 2, 1])
    assert facts["compressed"] == name.endswith(".gz") and facts["intensities_of"] == "all voxels"
    assert (facts["lowest_intensity"], facts["highest_intensity"]) == (VOXELS.min(), VOXELS.max())
    assert facts["central_99_percent"] == pytest.approx(np.quantile(VOXELS, [0.005, 0.995]).tolist())


@pytest.mark.parametrize("ending", [".mrc", ".zarr", ".h5"])
def test_what_suits_a_tomogram_to_the_models(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    bright = rng.normal(0, 0.1, (32, 48, 48)) + (rng.random((32, 48, 48)) < 0.01)
    for name, voxels, contrast, lines in (
        ("bright", 0.4 + 0.3 * bright, "bright on dark", []),
        ("dark", -bright, "dark on bright", ["min", "max", "invert"]),
        ("noise", 40 * rng.normal(0, 1, bright.shape), None, ["min", "max"]),
    ):
        path = tmp_path / (name + ending)
        if ending == ".mrc":
            write_tomogram(path, voxels.astype(np.float32))
        elif ending == ".zarr":
            zarr.create_array(path, data=voxels.astype(np.float32), chunks=(32, 48, 48))
        else:
            with h5py.File(path, "w") as file:
                file["volume"] = voxels.astype(np.float32)
        found = plain(path)
        assert found["facts"]["contrast"] == contrast
        notes = " ".join(found["notes"])
        assert [line.split(":")[0] for line in re.findall("'([^']+)'", notes)] == lines, notes


def test_what_is_odd_about_a_tomogram(tmp_path: Path) -> None:
    voxels = np.full((4, 5, 6), np.nan, np.float32)
    with pytest.warns(RuntimeWarning, match="NaN"):
        path = write_tomogram(tmp_path / "a.mrc", voxels)
    with path.open("ab") as file:
        file.write(b"more")
    found = plain(path)
    assert found["warnings"] == ["4 bytes after the voxels are ignored",
                                 "100 % of the sampled voxels are NaN or infinite"]  # fmt: skip
    assert found["facts"]["lowest_intensity"] is None


def test_predictions(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (6, 7, 8)).astype(np.uint8)
    write_hdf5(
        tmp_path / "TS_preds.h5",
        labels,
        attributes={"voxel_size_angstrom": [None, 9.5, 9.5], "configuration": json.dumps({"a": {"b": 1}}),
                    "warnings": "one\ntwo", "versions": {"zarr": "3"}},
        probabilities=np.zeros((3, 6, 7, 8), np.float32),
    )  # fmt: skip
    found = plain(tmp_path / "TS_preds.h5")
    assert found["kind"] == "predictions" and found["warnings"] == ["one", "two"]
    assert found["facts"] == {
        "voxel_size_angstrom": [None, 9.5, 9.5], "configuration": {"a": {"b": 1}}, "versions": {"zarr": "3"},
        "classes": 3,
    }  # fmt: skip
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["labels"]["voxels"] == np.bincount(labels.ravel()).tolist()
    assert (parts["labels"]["shape"], parts["labels"]["dtype"]) == ([6, 7, 8], "uint8")
    assert parts["labels"]["compression"] == "gzip" and parts["labels"]["stored_bytes"] > 0
    assert (parts["probs"]["shape"], parts["probs"]["voxels"]) == ([3, 6, 7, 8], [])


def test_files_of_other_programs(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a_preds.h5", "w") as file:
        file["labels"] = np.zeros((4, 4, 4), np.int64)
        file["probs"] = np.zeros((2, 4, 4, 5), np.float32)
        file["group/deep"] = 5
        file["gone"] = h5py.ExternalLink("nowhere.h5", "x")
    found = plain(tmp_path / "a_preds.h5")
    assert found["warnings"] == ["the dataset 'probs' has another shape than the labels"]
    assert {part["name"] for part in found["parts"]} == {"labels", "probs", "group/deep"}
    with h5py.File(tmp_path / "b.h5", "w", userblock_size=512) as file:
        file["x"] = [1, 2]
        file.attrs["nothing"] = h5py.Empty("f")
    assert "it is not an output of" in plain(tmp_path / "b.h5")["warnings"][0]


def test_components(tmp_path: Path) -> None:
    write_instances_hdf5(tmp_path / "a_components.h5", np.ones((4, 4, 4), np.uint16), attributes={"connectivity": 26})
    found = plain(tmp_path / "a_components.h5")
    assert (found["kind"], found["facts"]) == ("components", {"connectivity": 26})


def test_hdf5_and_zarr_tomograms(tmp_path: Path) -> None:
    convert(write_tomogram(tmp_path / "a.mrc"), tmp_path / "a.zarr")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volume"] = VOXELS
    for name, kind in (("a.h5", "HDF5 tomogram"), ("a.zarr", "zarr array")):
        found = plain(tmp_path / name)
        facts = found["facts"]
        assert (found["kind"], facts["shape"], facts["dtype"]) == (kind, list(VOXELS.shape), str(VOXELS.dtype))
        assert (facts["lowest_intensity"], facts["highest_intensity"]) == (VOXELS.min(), VOXELS.max())
        assert not any("it is not an output of" in warning for warning in found["warnings"])


def test_zarr_stores(tmp_path: Path) -> None:
    convert(write_tomogram(tmp_path / "a.mrc"), tmp_path / "a.zarr")
    found = plain(tmp_path / "a.zarr")
    assert found["kind"] == "zarr array" and found["facts"]["zarr_format"] == 3
    assert found["facts"]["origin_angstrom"] == [30, 20, 10]
    (part,) = found["parts"]
    assert (part["name"], part["shape"], part["dtype"], part["compression"]) == (
        "/", [6, 7, 8], "int16", "BloscCodec"
    )  # fmt: skip
    group = zarr.create_group(tmp_path / "g.zarr", attributes={"mean": float("nan")})
    group.create_array("x/y", shape=(4, 4), chunks=(2, 2), shards=(4, 4), dtype="u1")
    found = plain(tmp_path / "g.zarr")
    assert found["kind"] == "zarr group" and found["facts"]["mean"] is None
    assert [(part["name"], part["chunks"]) for part in found["parts"]] == [("x/y", [4, 4])] and not found["warnings"]
    (tmp_path / "g.zarr" / "thumbs").mkdir()
    assert any("thumbs" in warning for warning in plain(tmp_path / "g.zarr")["warnings"])
    del zarr.open_array(tmp_path / "a.zarr").attrs["statistics"]
    assert any("was not completed" in warning for warning in plain(tmp_path / "a.zarr")["warnings"])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path: Path, version: str) -> None:
    image = {
        "version": version,
        "axes": [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"],
        "datasets": [
            {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [9.5 * 2**i] * 3}]}
            for i in range(2)
        ],
    }
    attributes: dict[str, Any] = {"multiscales": [image]}
    if version == "0.5":
        attributes = {"ome": {"version": version, "multiscales": [image]}}
    group = zarr.create_group(tmp_path / "a.zarr", attributes=attributes, zarr_format=2 if version == "0.4" else 3)
    for i in range(2):
        group.create_array(str(i), shape=(8 // 2**i,) * 3, chunks=(4, 4, 4), dtype="f4")
    found = plain(tmp_path / "a.zarr")
    assert (found["kind"], found["facts"]["ngff_version"]) == ("OME-Zarr image", version)
    assert found["facts"]["axes"] == ["z (angstrom)", "y (angstrom)", "x (angstrom)"]
    assert found["facts"]["scale_of_level_1"] == [19.0] * 3
    assert sorted((part["name"], part["shape"]) for part in found["parts"]) == [("0", [8] * 3), ("1", [4] * 3)]


def test_checkpoints() -> None:
    path = golden.FOLDER / "lamella_then_semantic" / "semantic.ckpt"
    checkpoint, found = read_checkpoint(path), plain(path)
    facts = found["facts"]
    assert found["kind"] == "CryoSiam checkpoint"
    assert (facts["sha256"], facts["patch_size"]) == (checkpoint.sha256, list(checkpoint.patch_size))
    assert facts["classes"] == checkpoint.architecture.out_channels
    assert facts["architecture"]["decoder"] == checkpoint.architecture.decoder
    assert set(facts["architecture"]) == set(asdict(checkpoint.architecture))
    assert facts["parameters"] == sum(tensor.numel() for tensor in checkpoint.state.values())
    assert facts["training"]["hyper_parameters"]["config"]["parameters"]["network"]["spatial_dims"] == 3


def test_only_plain_data_of_a_checkpoint_is_shown(tmp_path: Path) -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    wide: Any = "leaf"
    for _ in range(10):
        wide = [wide] * 10  # ten thousand million leaves, in a file of some bytes

    def edit(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["more"] = {
            "tensor": torch.zeros(3), "path": Path("x"), ("t",): 1,
            "endless": endless, "wide": wide, "loss": float("nan"),
        }  # fmt: skip

    path = checkpoints.write(tmp_path / "a.ckpt", edit=edit)
    more = plain(path)["facts"]["training"]["hyper_parameters"]["more"]
    assert set(more) == {"endless", "wide", "loss"} and more["loss"] is None and more["endless"][0] == 1
    assert read_settings(path)["epoch"] == 3


class _Runs:
    """A pickle of this runs something when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("proof that it ran"),)


def _damaged_zarr(folder: Path) -> Path:
    zarr.create_array(folder / "a.zarr", shape=(4, 4), dtype="u1")
    (folder / "a.zarr" / "zarr.json").write_text('{"zarr_format": 3')
    return folder / "a.zarr"


def _lacking_zarr(folder: Path) -> Path:
    zarr.create_array(folder / "a.zarr", shape=(4, 4), dtype="u1")
    (folder / "a.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array", "attributes": {}}')
    return folder / "a.zarr"


def _hdf5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["labels"] = np.zeros((9, 9, 9), np.uint8)
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _numpy_archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=[1])
    return file.getvalue()


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "nowhere.mrc", "does not exist. Check the path"),
    "a folder": (lambda f: f, "a folder must be a zarr store; found none of zarr.json"),
    "empty": (lambda f: _written(f / "a.mrc", b""), "must not be empty; found 0 bytes"),
    "text": (lambda f: _written(f / "notes.txt", b"some words"), "found bytes that begin with b'some wor'"),
    "text called tomogram": (lambda f: _written(f / "a.mrc", b"words" * 500), "or not an MRC file"),
    "text called prediction": (lambda f: _written(f / "a_preds.h5", b"words" * 500), "must be readable HDF5"),
    "text called checkpoint": (lambda f: _written(f / "a.ckpt", b"words" * 500), "written by torch.save"),
    "HDF5 called tomogram": (lambda f: _hdf5(f / "a.mrc"),
        "whose name ends with .mrc must be a tomogram; found an HDF5 file. Rename it"),
    "tomogram called prediction": (lambda f: write_tomogram(f / "a.mrc").rename(f / "a_preds.h5"),
        "ends with .h5 must be an HDF5 file; found an MRC file"),
    "tomogram called checkpoint": (lambda f: write_tomogram(f / "a.mrc").rename(f / "a.ckpt"),
        "ends with .ckpt must be a checkpoint; found an MRC file"),
    "checkpoint called tomogram": (lambda f: checkpoints.write(f / "a.mrc"), "must be a tomogram; found a zip archive"),
    "TIFF called tomogram": (lambda f: _written(f / "a.mrc", b"II*\0" + b"\0" * 2000), "a TIFF image. Convert it"),
    "compressed text": (lambda f: _written(f / "a.mrc.gz", gzip.compress(b"words" * 500)), "or not an MRC file"),
    "truncated gzip": (lambda f: _written(f / "a.mrc.gz", gzip.compress(b"words" * 5000)[:30]), "complete gzip file"),
    "truncated tomogram": (lambda f: _written(f / "a.mrc", write_tomogram(f / "b.mrc").read_bytes()[:-5]), "truncated"),
    "truncated HDF5": (lambda f: _written(f / "a.h5", _hdf5(f / "b.h5").read_bytes()[:900]), "must be readable HDF5"),
    "archive of NumPy": (lambda f: _written(f / "a.npz", _numpy_archive()), "found a zip archive"),
    "damaged zarr": (_damaged_zarr, "the zarr store must be readable; found "),
    "incomplete zarr": (_lacking_zarr, "the zarr store must be readable; found "),
    "a pickle that runs something": (lambda f: _written(f / "a.ckpt", pickle.dumps(_Runs(), protocol=2)), "a.ckpt"),
    "a checkpoint that runs something": (
        lambda f: checkpoints.write(f / "a.ckpt", edit=lambda content: content.update(epoch=_Runs())), "would call"),
    "a loop of links": (lambda f: (f / "loop.mrc").symlink_to(f / "loop.mrc") or f / "loop.mrc", "levels of symbolic"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_is_refused_in_words(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = BAD[kind]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with pytest.raises(CryosiamDaskError) as caught:
        inspect(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "proof that it ran").exists()


def test_large_labels_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryosiam_dask.commands.info.COUNTED_VOXELS", 700)
    assert plain(_hdf5(tmp_path / "a.h5"))["parts"][0]["voxels"] == []

    monkeypatch.setattr("cryosiam_dask.commands.info.COUNTED_VOXELS", 729)
    assert plain(tmp_path / "a.h5")["parts"][0]["voxels"] == [729]
