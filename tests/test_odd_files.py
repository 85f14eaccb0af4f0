"""Files as other programs write them, and as they should not be: alone, and in a collection with the real program."""

from __future__ import annotations

import bz2
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
import zarr
from numcodecs import Blosc

from cryosiam_dask.commands.info import inspect
from cryosiam_dask.errors import CryosiamDaskError, TomogramError
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.stages.ingest import convert
from support import checkpoints
from support.command import invoke
from support.inputs import write_tomogram

VOXELS = np.random.default_rng(0).random((12, 20, 16), np.float32)


def mrc(path: Path, extended: bytes = b"", kind: bytes = b"") -> Path:
    """As microscopes and programs write it: with a header of their own behind that of 1024 bytes."""
    with mrcfile.new(path) as file:
        file.set_data(VOXELS)
        file.voxel_size = 10
        if extended:
            file.set_extended_header(np.frombuffer(extended, "V1"))
            file.header.exttyp = kind
    return path


def portal(path: Path, *, levels: tuple[int, ...] = (0, 1), unit: str = "angstrom", scale: float = 10) -> Path:
    """As the CryoET Data Portal publishes tomograms: NGFF 0.4, a file for each chunk in folders, blosc."""
    group = zarr.create_group(path, zarr_format=2)
    datasets = []
    for level in (0, 1):
        values = VOXELS[:: 2**level, :: 2**level, :: 2**level]
        if level in levels:
            array = group.create_array(
                str(level), shape=values.shape, chunks=(6, 8, 8), dtype="f4", compressors=Blosc("lz4"),
                chunk_key_encoding={"name": "v2", "separator": "/"},
            )  # fmt: skip
            array[:] = values
        transformations = [{"type": "scale", "scale": [scale * 2**level] * 3}]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    axes = [{"name": name, "type": "space", "unit": unit} for name in "zyx"]
    group.attrs["multiscales"] = [{
        "axes": axes, "datasets": datasets, "name": "/", "version": "0.4",
        "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}],
    }]  # fmt: skip
    return path


def hdf5(path: Path, name: str, values: np.ndarray = VOXELS, attributes: dict[str, Any] | None = None) -> Path:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(name, data=values, chunks=True, compression="gzip", shuffle=True)
        dataset.attrs.update(attributes or {})
    return path


READABLE: dict[str, tuple[Callable[[Path], Path], float | None]] = {
    **{
        f"extended header {kind}": (lambda f, kind=kind, size=size: mrc(f / "a.st", b"\xc3" * size, kind.encode()), 10)
        for kind, size in (("SERI", 1024), ("FEI1", 12 * 768), ("FEI2", 12 * 888), ("AGAR", 512), ("CCP4", 80))
    },  # type: ignore[dict-item]
    "ending in capitals": (lambda f: mrc(f / "a.MRC"), 10),
    "aligned stack": (lambda f: mrc(f / "a.ali"), 10),
    "HDF5 in capitals": (lambda f: hdf5(f / "a.H5", "data"), None),
    "HDF5-EOS": (lambda f: hdf5(f / "a.he5", "data"), None),
    "HDF5 deep within, big-endian": (lambda f: hdf5(f / "a.hdf", "exchange/run 1/data", VOXELS.astype(">f4")), None),
    "ilastik, channels last": (
        lambda f: hdf5(f / "a.h5", "exported_data", VOXELS[..., None], {"element_size_um": [0.001] * 3}), 10),
    "CryoET Data Portal": (lambda f: portal(f / "a.zarr"), 10),
    "nanometres": (lambda f: portal(f / "a.zarr", unit="nanometer", scale=1), 10),
}  # fmt: skip


@pytest.mark.parametrize("kind", READABLE)
def test_files_of_other_programs(tmp_path: Path, kind: str) -> None:
    make, size = READABLE[kind]
    path = make(tmp_path)
    report = convert(path, tmp_path / "out.zarr")
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "out.zarr", mode="r")[:], VOXELS)
    assert report.header.voxel_size_angstrom == (size and pytest.approx(size),) * 3
    told = ("voxel size along z, y, x is unknown",) if size is None else ()
    assert report.warnings == told
    found = inspect(path)  # what looks into files says the same
    assert (found.facts["shape"], found.warnings) == ([12, 20, 16], told)


def _truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:3000])
    return path


def _damaged_chunk(path: Path) -> Path:
    (path / "0" / "0" / "0" / "0").write_bytes(b"garbage")
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


#: What is wrong, and words of `convert` and of `info`, which warns where there is more in a folder than a tomogram.
UNREADABLE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "bzip2": (lambda f: _written(f / "a.mrc.bz2", bz2.compress(mrc(f / "b.mrc").read_bytes())),
        "begin like bzip2. Decompress it", "found a bzip2 file. Decompress it"),
    "HTML of a failed download": (lambda f: _written(f / "a.mrc", b"<!DOCTYPE html>" + b" " * 2000),
        "begin like HTML or XML", "begin like HTML or XML"),
    "gzip of noise": (lambda f: _written(f / "a.mrc.gz", b"\x1f\x8b\x08" + VOXELS.tobytes()[:500]),
        "must be a complete gzip file", "must be a complete gzip file"),
    "HDF5 cut short": (lambda f: _truncated(hdf5(f / "a.h5", "data")), "the HDF5 file must be readable",
        "damaged or incomplete: copy or make it again"),
    "a level that is missing": (lambda f: portal(f / "a.zarr", levels=(1,)), "the levels that exist are 1",
        "cannot be read as a tomogram: "),
    "a damaged chunk": (lambda f: _damaged_chunk(portal(f / "a.zarr")), "chunks of a zarr array must be readable",
        "cannot be read as a tomogram: "),
    "an empty folder": (lambda f: (f / "a.zarr").mkdir() or f / "a.zarr", "found none", "none of zarr.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_said_by_all(tmp_path: Path, kind: str) -> None:
    make, of_convert, of_info = UNREADABLE[kind]
    path = make(tmp_path)
    with pytest.raises(TomogramError, match=re.escape(of_convert)):
        convert(path, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    try:
        said = "\n".join(inspect(path).warnings)
    except CryosiamDaskError as error:
        said = str(error)
    assert of_info in said


def test_a_level_beyond_the_last(tmp_path: Path) -> None:
    with pytest.raises(TomogramError, match=r"level 2, which ome_zarr_level names, must exist; found 2 levels, 0 to 1"):
        read_header(portal(tmp_path / "a.zarr"), level=2)


NAMES = ["TS Ωμ–ünïcode 東京", "with space.v1.2_9.96Apx", "-dash #1 100%25?", "<b>&'quote\"", "dots..zarr.mrc"]


def test_a_collection_of_odd_names_and_bad_files(tmp_path: Path) -> None:
    """The whole path: what is well named or not is done, and what is bad is said, by every command."""
    (tmp_path / "data of Müller").mkdir()
    data, out = tmp_path / "data of Müller", tmp_path / "out put"
    for seed, name in enumerate(NAMES):
        write_tomogram(data / f"{name}.mrc", seed)
    (data / "bad html.mrc").write_bytes(b"<html>" * 500)
    hdf5(data / "really hdf5.mrc", "volume")
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    values = {"data_folder": str(data), "prediction_folder": str(out), "trained_model": "model.ckpt",
              "components": True}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    config = "--config-file=config.yaml"
    output = invoke("plan", config, folder=tmp_path, status=1)
    assert output.count("error: ") == 1 and f"error: {data / 'bad html.mrc'}: " in output and not out.exists()
    assert "warning, really hdf5: the name ends with .mrc, but the content is HDF5" in output
    output = invoke("semantic-predict", config, folder=tmp_path, status=1)
    assert output.count("\nfailed, ") == 1 and "failed, bad html: " in output
    done = [*NAMES, "really hdf5"]
    for name in done:
        assert (out / f"{name}_preds.h5").is_file() and (out / f"{name}_preview.png").is_file()
    page = (out / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == len(done) and "<bdi>&lt;b&gt;&amp;&#39;quote&#34;</bdi>" in page
    # Labels of another shape than their tomogram: those of one are put in the place of another's.
    shutil.copy(out / f"{NAMES[0]}_preds.h5", out / "really hdf5_preds.h5")
    output = invoke("export", config, "--format=ome-zarr", "--format=mrc", "--json", folder=tmp_path, status=1)
    document = json.loads(output[output.index('{\n  "tomograms"') : output.rindex("}") + 1])
    found = {each["stem"]: each for each in document["tomograms"]}
    assert {name for name, each in found.items() if each["status"] == "done"} == set(NAMES)
    assert "the labels must have the shape of their tomogram" in found["really hdf5"]["error"]
    for name in NAMES:
        with h5py.File(out / f"{name}_preds.h5") as file, mrcfile.open(out / f"{name}_labels.mrc") as labels:
            np.testing.assert_array_equal(labels.data, file["labels"][:])
            image = zarr.open_group(out / f"{name}.ome.zarr", mode="r")
            np.testing.assert_array_equal(image["labels/segmentation/0"][:], file["labels"][:])
        with mrcfile.open(data / f"{name}.mrc") as tomogram:
            np.testing.assert_array_equal(image["0"][:], tomogram.data)
