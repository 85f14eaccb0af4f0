"""Tomograms that are stored as zarr, OME-Zarr or HDF5: what is read of them, where it lies, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Pickle
from zarr.storage import MemoryStore

from cryosiam_dask.errors import TomogramError
from cryosiam_dask.files.identity import is_newer_in_part, newest_chunk, source_content, source_identity
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.files.zarr import ArrayView
from cryosiam_dask.stages.ingest import Statistics, convert, ingest

NGFF = [("0.4", 2), ("0.5", 3)]
SHAPE = (12, 15, 17)


def volume(shape: tuple[int, ...] = SHAPE, dtype: str = "f4") -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 200).astype(dtype)


def axis(name: str, unit: str | None = "angstrom") -> dict[str, Any]:
    kind = {"t": "time", "c": "channel"}.get(name, "space")
    return {"name": name, "type": kind} | ({"unit": unit} if unit and kind == "space" else {})


def ome(
    path: Path,
    levels: list[np.ndarray],
    *,
    version: str = "0.4",
    axes: list[Any] | None = None,
    transforms: list[list[dict[str, Any]]] | None = None,
    **more: Any,
) -> Path:
    """An OME-Zarr image as others write it, by zarr alone."""
    zarr_format = 2 if version < "0.5" else 3
    ndim = levels[0].ndim
    group = zarr.create_group(path, zarr_format=zarr_format)
    for n, level in enumerate(levels):
        array = group.create_array(str(n), shape=level.shape, chunks=(5,) * ndim, dtype=level.dtype)
        array[:] = level
    if transforms is None:
        transforms = [[{"type": "scale", "scale": [7.84 * 2**n] * ndim}] for n in range(len(levels))]
    image: dict[str, Any] = {
        "axes": [axis(name) for name in "tczyx"[-ndim:]] if axes is None else axes,
        "datasets": [{"path": str(n), "coordinateTransformations": t} for n, t in enumerate(transforms)],
        **more,
    }
    if version < "0.5":
        group.attrs["multiscales"] = [{"version": version, **image}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [image]}
    return path


def hdf5(path: Path, datasets: dict[str, Any], **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values, **options)
    return path


# ------------------------------------------------------------------------------------------------------------ OME-Zarr


@pytest.mark.parametrize(("version", "zarr_format"), NGFF)
def test_any_level_of_an_ome_zarr_image(tmp_path: Path, version: str, zarr_format: int) -> None:
    """As the CryoET Data Portal publishes tomograms: three levels, ångström, no translation."""
    levels = [volume(), volume()[::2, ::2, ::2], volume()[::4, ::4, ::4]]
    path = ome(tmp_path / "TS_026.zarr", levels, version=version)
    for n, level in enumerate(levels):
        array, report = ingest(path, MemoryStore(), level=n)
        np.testing.assert_array_equal(array[:], level)
        assert array.metadata.zarr_format == zarr_format
        header = report.header
        assert (header.shape, header.dtype, header.kind) == (level.shape, np.float32, f"OME-Zarr {version}, level {n}")
        assert header.voxel_size_angstrom == pytest.approx((7.84 * 2**n,) * 3)
        assert (header.origin_angstrom, header.nstart, report.warnings) == ((0, 0, 0), (0, 0, 0), ())
        json.dumps(header.attributes())


def test_a_stored_zarr_is_read_where_it_is(tmp_path: Path) -> None:
    path = ome(tmp_path / "x.ome.zarr", [volume()])
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    array, _ = ingest(path, tmp_path / "work.zarr")
    assert not (tmp_path / "work.zarr").exists()
    assert Path(array.store.root) == path / "0" and array.read_only
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    travelled = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(travelled[3:5, :, 2:9], volume()[3:5, :, 2:9])


@pytest.mark.parametrize(
    ("unit", "factor"), [("angstrom", 1), ("nanometer", 10), ("micrometer", 1e4), ("picometer", 0.01), ("Å", 1)]
)
def test_units_scales_and_translations_become_angstrom(tmp_path: Path, unit: str, factor: float) -> None:
    """Those of the level are applied first, then those of the image."""
    of_level = [{"type": "scale", "scale": [2, 3, 4]}, {"type": "translation", "translation": [10, 20, -30]}]
    of_image = [{"type": "scale", "scale": [1.5, 1.5, 1.5]}, {"type": "translation", "translation": [1, 0, 0]}]
    of_level[0]["scale"] = [s / factor for s in of_level[0]["scale"]]
    path = ome(
        tmp_path / "x.zarr", [volume()], axes=[axis(name, unit) for name in "zyx"], transforms=[of_level],
        coordinateTransformations=of_image,
    )  # fmt: skip
    header = read_header(path)
    assert header.voxel_size_angstrom == pytest.approx((3, 4.5, 6))
    assert header.origin_angstrom == pytest.approx((16 * factor, 30 * factor, -45 * factor))


@pytest.mark.parametrize(
    ("transform", "unit", "warning"),
    [
        ([{"type": "scale", "scale": [9, 9, 9]}], None, "the unit of the axes z, y, x is missing or not a length"),
        ([{"type": "scale", "scale": [9, 9, 9]}], "second", "the unit of the axes z, y, x is missing"),
        ([{"type": "scale", "scale": [1, 1, 1]}], "angstrom", "voxel size along z, y, x is unknown"),
        ([{"type": "identity"}], "angstrom", "voxel size along z, y, x is unknown"),
        ([], "angstrom", "voxel size along z, y, x is unknown"),
        ([{"type": "scale", "path": "scales"}], "angstrom", "a coordinate transformation is not understood"),
        ([{"type": "scale", "scale": [9, "9", 9]}], "angstrom", "a coordinate transformation is not understood"),
        ([{"type": "scale", "scale": [9e4, 9e4, 9e4]}], "angstrom", "voxel size along z reads as 90000 Å, which is"),
    ],
)
def test_voxel_sizes_that_are_not_known(tmp_path: Path, transform: Any, unit: str | None, warning: str) -> None:
    axes = [axis(name, unit) for name in "zyx"]
    header = read_header(ome(tmp_path / "x.zarr", [volume()], axes=axes, transforms=[transform]))
    assert header.voxel_size_angstrom == (None, None, None)
    assert header.warnings[0].startswith(warning)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations("zyx"),
    extra=st.sampled_from(["", "c", "tc"]),
    region=st.tuples(*[st.tuples(st.integers(0, 5), st.integers(1, 7))] * 3),
    flat=st.sampled_from([None, 0, 1, 2]),
)
def test_axes_in_any_order_with_others_of_length_one(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], extra: str, region: Any, flat: int | None
) -> None:
    whole = volume()
    stored = whole.transpose(["zyx".index(name) for name in order]).reshape((1,) * len(extra) + tuple(
        SHAPE["zyx".index(name)] for name in order
    ))  # fmt: skip
    path = tmp_path_factory.mktemp("axes") / "x.zarr"
    scales = {"z": 30.0, "y": 20.0, "x": 10.0, "t": 5.0, "c": 1.0}
    names = [*extra, *order]
    transform = [{"type": "scale", "scale": [scales[name] for name in names]}]
    ome(path, [stored], axes=[axis(name) for name in names], transforms=[transform])
    view, report = ingest(path, MemoryStore())
    assert report.header.voxel_size_angstrom == (30, 20, 10)
    assert view.shape == report.header.shape == SHAPE and view.chunks == (5, 5, 5) and view.ndim == 3
    assert view.dtype == np.float32
    part: list[Any] = [slice(start, start + length) for start, length in region]
    if flat is not None:
        part[flat] = part[flat].start
    np.testing.assert_array_equal(view[tuple(part)], whole[tuple(part)])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(view))[2:4], whole[2:4])
    assert report.statistics.mean == pytest.approx(whole.mean(dtype=np.float64), rel=1e-6)
    if names != ["z", "y", "x"]:
        assert isinstance(view, ArrayView)


def test_images_in_older_drafts_and_in_a_group_of_bioformats(tmp_path: Path) -> None:
    path = ome(tmp_path / "old.zarr", [volume()[None, None]], version="0.3", axes=list("tczyx"), transforms=[[]])
    np.testing.assert_array_equal(ingest(path, MemoryStore())[0][:], volume())
    ome(tmp_path / "series.zarr" / "0", [volume()])
    zarr.open_group(tmp_path / "series.zarr", zarr_format=2, mode="a").attrs["bioformats2raw.layout"] = 3
    array, report = ingest(tmp_path / "series.zarr", MemoryStore())
    np.testing.assert_array_equal(array[:], volume())
    assert report.header.voxel_size_angstrom == pytest.approx((7.84,) * 3)


@pytest.mark.parametrize(("version", "zarr_format"), NGFF)
def test_missing_levels(tmp_path: Path, version: str, zarr_format: int) -> None:
    path = ome(tmp_path / "x.zarr", [volume(), volume()[::2], volume()[::4]], version=version)
    shutil.rmtree(path / "0")
    with pytest.raises(TomogramError, match=r"level 0 .* found no array '0'; the levels that exist are 1, 2\. Copy"):
        read_header(path)
    assert read_header(path, level=1).shape == (6, 15, 17)  # what is there can be read
    with pytest.raises(
        TomogramError, match=r"level 3, which ome_zarr_level names, must exist; found 3 levels, 0 to 2\. Lower"
    ):
        read_header(path, level=3)
    for n in (1, 2):
        shutil.rmtree(path / str(n))
    with pytest.raises(TomogramError, match=r"the levels that exist are none\. Copy the missing level"):
        read_header(path, level=2)


# ---------------------------------------------------------------------------------------------------------- plain zarr


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "u1", "i2", ">u2", "f2", "f8", "bool"])
def test_arrays(tmp_path: Path, zarr_format: int, dtype: str) -> None:
    data = volume(dtype=dtype)
    # The metadata of format 3 know no byte order; its codec does, and zarr warns of what it drops.
    stored = data if zarr_format == 2 else data.astype(data.dtype.newbyteorder("<"))
    zarr.create_array(tmp_path / "x.zarr", data=stored, chunks=(5, 6, 7), zarr_format=zarr_format)
    array, report = ingest(tmp_path / "x.zarr", MemoryStore())
    np.testing.assert_array_equal(array[:], data)
    assert report.header.dtype == data.dtype.newbyteorder("=") and report.header.dtype.isnative
    assert report.statistics.maximum == data.max()
    assert report.warnings == ("voxel size along z, y, x is unknown",)


def test_arrays_of_a_conversion_tell_all_again(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "x.mrc", volume()) as file:
        file.voxel_size, file.nstart = 9.96, (4, 5, -6)
        file.header.origin = (1.0, -2.0, 3.0)
    made = convert(tmp_path / "x.mrc", tmp_path / "x.zarr")
    (tmp_path / "x.zarr" / "c").rename(tmp_path / "chunks")  # its statistics are not computed again
    array, report = ingest(tmp_path / "x.zarr", MemoryStore())
    (tmp_path / "chunks").rename(tmp_path / "x.zarr" / "c")
    assert report.statistics == made.statistics
    assert report.header.voxel_size_angstrom == made.header.voxel_size_angstrom
    assert (report.header.origin_angstrom, report.header.nstart) == ((3, -2, 1), (-6, 5, 4))
    np.testing.assert_array_equal(array[:], volume())


def test_a_group_with_one_array_and_names_of_axes(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "x.zarr")
    group.create_array("tomogram", shape=SHAPE[::-1], dtype="f4", dimension_names=("x", "y", "z"))[:] = volume().T
    group.create_array("times", shape=(3,), dtype="f4")
    np.testing.assert_array_equal(ingest(tmp_path / "x.zarr", MemoryStore())[0][:], volume())
    group.create_array("labels", shape=SHAPE, dtype="u1")
    with pytest.raises(
        TomogramError, match="exactly one array that can be a tomogram; found the arrays labels, tomogr"
    ):
        read_header(tmp_path / "x.zarr")
    with pytest.raises(TomogramError, match="level 1, which ome_zarr_level names, must exist; found a single array"):
        read_header(tmp_path / "x.zarr" / "tomogram", level=1)


def test_images_and_missing_chunks(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "x.zarr", shape=(20, 30), chunks=(10, 10), dtype="f4", fill_value=7)
    array[:10] = 3  # the other chunks are not there, which means the fill value
    read, report = ingest(tmp_path / "x.zarr", MemoryStore())
    assert report.header.shape == (20, 30) and report.header.attributes()["axes"] == ["y", "x"]
    assert report.statistics == Statistics(3, 7, 5, 0)
    assert (read[10:] == 7).all()


@pytest.mark.parametrize("piece", [1, 700, 2**20])
def test_statistics_of_what_is_read_in_place(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryosiam_dask.stages.ingest.TASK_BYTES", piece)
    data = volume()
    data[0, 0, :3] = np.nan, np.inf, -np.inf
    zarr.create_array(tmp_path / "x.zarr", data=data, chunks=(5, 4, 3))
    _, report = ingest(tmp_path / "x.zarr", MemoryStore())
    finite = data[np.isfinite(data)]
    assert report.statistics.non_finite == 3
    assert (report.statistics.minimum, report.statistics.maximum) == (finite.min(), finite.max())
    assert report.statistics.mean == pytest.approx(finite.mean(dtype=np.float64))
    assert "3 voxels are NaN or infinite; they are treated as the minimum" in report.warnings


def test_sharded_arrays(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "x.zarr", data=volume(), chunks=(3, 4, 5), shards=(6, 8, 20))
    array, report = ingest(tmp_path / "x.zarr", MemoryStore())
    np.testing.assert_array_equal(array[:], volume())
    assert report.statistics.maximum == volume().max()


class Trap:
    """Running this when it is unpickled leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def refused(path: Path) -> str:
    with pytest.raises(TomogramError) as error:
        ingest(path, MemoryStore())
    assert str(error.value).startswith(f"{path}")
    return str(error.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    zarr.create_array(path, data=volume((4, 4, 4)), chunks=(4, 4, 4), zarr_format=2, compressors=None)
    metadata = json.loads((path / ".zarray").read_text())
    for key, value in (("filters", [Pickle().get_config()]), ("compressor", Pickle().get_config())):
        (path / ".zarray").write_text(json.dumps(metadata | {key: value}))
        for chunk in path.glob("0*"):
            chunk.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        assert "must not be pickled, because reading them could run any code" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_zarr_that_cannot_be_read(tmp_path: Path) -> None:
    def array(**options: Any) -> Path:
        shutil.rmtree(tmp_path / "x.zarr", ignore_errors=True)
        zarr.create_array(tmp_path / "x.zarr", **{"shape": SHAPE, "dtype": "f4", "chunks": (5, 5, 5), **options})
        return tmp_path / "x.zarr"

    path = array()
    (path / "zarr.json").write_text("{ not JSON")
    assert "the metadata of a zarr must be readable JSON" in refused(path)
    (path / "zarr.json").write_text(json.dumps({"shape": [1, 2, 3], "node_type": "array"}))
    assert "the zarr array must be readable; found" in refused(path)
    path = array()
    zarr.open_array(path)[:] = volume()
    next(path.glob("c/1/1/1")).write_bytes(b"damage")
    assert "the chunks of a zarr array must be readable" in refused(path)
    assert "shape (2, 12, 15, 17), axis … of length 2" in refused(array(shape=(2, *SHAPE), chunks=(1, 5, 5, 5)))
    assert "must hold one volume or image" in refused(array(shape=(5,), chunks=(5,)))
    assert "voxels must be real numbers; found dtype complex64" in refused(array(dtype="c8"))
    assert (
        "a chunk must hold at most 2 GiB, because it is read as a whole; found chunks of (1000, 1000, 1000) voxels"
        in (refused(array(shape=(1000,) * 3, chunks=(1000,) * 3)))
    )
    warnings = read_header(array(shape=(500,) * 3, chunks=(500,) * 3)).warnings
    assert "chunks of 477 MiB are decoded as a whole" in warnings[0]
    empty = tmp_path / "empty.zarr"
    zarr.create_group(empty)
    assert "or hold exactly one array that can be a tomogram; found none. Check that it was copied" in refused(empty)
    (tmp_path / "folder.zarr").mkdir()
    assert "or hold exactly one array" in refused(tmp_path / "folder.zarr")
    path = ome(tmp_path / "channels.zarr", [volume((2, *SHAPE))])
    assert "all other axes must have length 1; found shape (2, 12, 15, 17), axis c of length 2" in (refused(path))
    path = ome(tmp_path / "axes.zarr", [volume()], axes=[axis("y"), axis("x")])
    assert "must list as many axes as its arrays have, 3; found axes y, x" in refused(path)
    zarr.open_group(path).attrs["multiscales"] = [{"datasets": "0"}]
    assert "an OME-Zarr image must list its levels; found datasets 0" in refused(path)
    path = ome(tmp_path / "outside.zarr", [volume()])
    zarr.open_group(path).attrs["multiscales"] = [{"datasets": [{"path": "../axes.zarr/0"}]}]
    assert "must be an array in its folder; found no array '../axes.zarr/0'" in refused(path)


# ---------------------------------------------------------------------------------------------------------------- HDF5


@pytest.mark.parametrize("chunks", [None, (1, 15, 17), (12, 4, 4), (5, 5, 5)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "u1", ">i2", "f2", "f8"])
def test_hdf5_is_ingested(tmp_path: Path, dtype: str, chunks: Any) -> None:
    data = volume(dtype=dtype)
    path = hdf5(tmp_path / "x.h5", {"entry/data": data}, chunks=chunks)
    array, report = ingest(path, tmp_path / "work.zarr", chunks=(4, 4, 8))
    np.testing.assert_array_equal(array[:], data)
    assert array.chunks == (4, 4, 8) and array.dtype.isnative
    assert array.dtype == (np.float32 if dtype == "f2" else np.dtype(dtype).newbyteorder("="))
    assert report.header.kind == "HDF5, dataset entry/data" and report.header.notes == ("dataset entry/data",)
    assert report.statistics.mean == pytest.approx(data.mean(dtype=np.float64), rel=1e-6)
    assert array.attrs["statistics"] == report.statistics.attributes()


def test_which_dataset(tmp_path: Path) -> None:
    some = {"volume": volume(), "profile": np.zeros(9), "slice": volume()[0], "names": np.array([b"a", b"b"])}
    path = hdf5(tmp_path / "x.h5", some)
    assert read_header(path).kind == "HDF5, dataset volume"
    assert read_header(path, dataset="/slice").shape == (15, 17)
    path = hdf5(tmp_path / "y.h5", {"raw": volume(), "denoised": volume()[None] + 1})
    message = (
        r"unless hdf5_dataset names one; found denoised \(float32, 1 × 12 × 15 × 17\), raw \(float32, 12 × 15 × 17\)"
    )
    with pytest.raises(TomogramError, match=message):
        read_header(path)
    np.testing.assert_array_equal(ingest(path, MemoryStore(), dataset="denoised")[0][:], volume() + 1)
    with pytest.raises(TomogramError, match=r"the dataset 'preds', which hdf5_dataset names.*Correct hdf5_dataset"):
        read_header(path, dataset="preds")
    assert read_header(hdf5(tmp_path / "2d.h5", {"image": volume()[0]})).shape == (15, 17)
    for content in ({}, {"stack": volume((2, 3, 4, 5))}, {"text": np.array([[[b"a"]]])}, {"line": np.zeros(5)}):
        with pytest.raises(TomogramError, match="must hold exactly one volume or image"):
            read_header(hdf5(tmp_path / "none.h5", content))


def test_voxel_sizes_in_hdf5(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", {"MDF/images/0/image": volume()})
    assert read_header(path).voxel_size_angstrom == (None, None, None)
    with h5py.File(path, "a") as file:
        file["MDF/images/0/image"].attrs["element_size_um"] = np.array([3e-3, 2e-3, 1.5e-3])
    assert read_header(path).voxel_size_angstrom == pytest.approx((30, 20, 15))
    with h5py.File(path, "a") as file:
        file["MDF/images/0"].attrs.update({"EMAN.apix_x": 5.0, "EMAN.apix_y": 6.0, "EMAN.apix_z": 7.0})
    assert read_header(path).voxel_size_angstrom == (7, 6, 5)
    with h5py.File(path, "a") as file:
        file["MDF/images/0/image"].attrs["voxel_size_angstrom"] = [9.0, np.nan, 8.0]
        file.attrs["origin_angstrom"], file.attrs["nstart"] = [1.0, 2.0, 3.0], [4, 5, 6]
    header = read_header(path)
    assert (header.voxel_size_angstrom, header.origin_angstrom, header.nstart) == ((9, None, 8), (1, 2, 3), (4, 5, 6))
    json.dumps(header.attributes())


def test_truncated_hdf5(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", {"volume": volume()})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(TomogramError, match=r"the HDF5 file must be readable; found .*truncated"):
        read_header(path)


# ------------------------------------------------------------------------------------ what a name says, and what is so


def test_the_content_tells_what_a_file_is(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.mrc", {"volume": volume()})
    array, report = ingest(path, MemoryStore())
    np.testing.assert_array_equal(array[:], volume())
    assert report.warnings[-1] == "the name ends with .mrc, but the content is HDF5; it is read as HDF5"
    with mrcfile.new(tmp_path / "y.h5", volume(), overwrite=True):
        pass
    array, report = ingest(tmp_path / "y.h5", MemoryStore())
    np.testing.assert_array_equal(array[:], volume())
    assert report.warnings[-1] == "the name ends with .h5, but the content is MRC; it is read as MRC"
    for name, content, message in (
        (
            "a.h5",
            b"tomogram" * 1000,
            r"ends with \.h5 must be an HDF5 file; found 8000 bytes of another format\. Copy it again",
        ),
        ("b.h5", b"", "must be an HDF5 file; found 0 bytes"),
        (
            "c.h5",
            b"PK\3\4" + bytes(2000),
            "must be an HDF5 file; found 2004 bytes of another format, which begin like ZIP",
        ),
        (
            "d.mrc",
            b"II*\0" + bytes(range(256)) * 9,
            "in a file of 2308 bytes, which begin like TIFF. Remove the file",
        ),
        ("e.rec", b"<!DOCTYPE html><title>403</title>" * 99, "which begin like HTML or XML"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TomogramError, match=message):
            read_header(tmp_path / name)


def test_datasets_behind_links_are_found_once(tmp_path: Path) -> None:
    """Soft links, second names, those to another file, and circles; one that leads nowhere is passed over."""
    with h5py.File(tmp_path / "real.h5", "w") as file:
        file["entry/instrument/data"] = volume()
        file["a_hard"] = file["entry/instrument/data"]
        file["soft"] = h5py.SoftLink("/entry/instrument/data")
        file["nowhere"] = h5py.SoftLink("/gone")
        file["entry/circle"] = file["entry"]
        file["another/circle"] = h5py.SoftLink("/entry")
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file["data_000001"] = h5py.ExternalLink("real.h5", "/entry/instrument/data")
        file["elsewhere"] = h5py.ExternalLink("gone.h5", "/x")
    for path, datasets in (
        (
            tmp_path / "real.h5",
            (None, "soft", "/soft", "a_hard", "entry/circle/instrument/data", "another/circle/instrument/data"),
        ),
        (tmp_path / "master.h5", (None, "data_000001")),
    ):
        for dataset in datasets:
            header = read_header(path, dataset=dataset)
            np.testing.assert_array_equal(header.read((slice(None),) * 3), volume())
    assert read_header(tmp_path / "master.h5").notes == (f"dataset data_000001 of {tmp_path / 'real.h5'}",)
    for dataset in ("nowhere", "elsewhere", "entry", "/"):
        with pytest.raises(TomogramError, match="must be a volume of numbers"):
            read_header(tmp_path / "real.h5", dataset=dataset)


def test_images_of_velox_are_told_from_their_metadata(tmp_path: Path) -> None:
    frames = volume()
    with h5py.File(tmp_path / "x.emd", "w") as file:
        image = file.create_group("Data/Image/0f3a")
        image["Data"] = np.moveaxis(frames, 0, -1)
        image["Metadata"] = np.zeros((30000, len(frames)), np.uint8)
        image["FrameLookupTable"] = np.zeros(len(frames), np.int32)
    header = read_header(tmp_path / "x.emd")
    assert header.shape == frames.shape and header.dataset == "Data/Image/0f3a/Data"  # type: ignore[attr-defined]
    np.testing.assert_array_equal(header.read((slice(None),) * 3), frames)
    with h5py.File(tmp_path / "y.emd", "w") as file:
        image = file.create_group("Data/Image/0f3a")
        image["Data"], image["Metadata"] = frames[0][..., None], np.zeros((30000, 1), np.uint8)
    assert read_header(tmp_path / "y.emd").shape == frames.shape[1:]


@pytest.mark.parametrize("given", ["nanometer", ["nanometer"] * 3])
@pytest.mark.parametrize("key", ["unit", "units"])
def test_units_may_stand_in_the_transformation(tmp_path: Path, key: str, given: Any) -> None:
    transform = {"type": "scale", "scale": [2, 3, 4], key: given}
    path = ome(tmp_path / "x.zarr", [volume()], axes=[axis(name, None) for name in "zyx"], transforms=[[transform]])
    assert read_header(path).voxel_size_angstrom == pytest.approx((20, 30, 40))
    path = ome(
        tmp_path / "y.zarr", [volume()], axes=[axis(name, "angstrom") for name in "zyx"], transforms=[[transform]]
    )
    assert read_header(path).voxel_size_angstrom == pytest.approx((2, 3, 4))  # those of the axes come first


def test_coordinate_systems_of_ngff_0_6(tmp_path: Path) -> None:
    steps = [{"type": "scale", "scale": [1, 2, 3]}, {"type": "translation", "translation": [4, 5, 6]}]
    transform = {"type": "sequence", "transformations": steps, "input": "0", "output": "physical"}
    systems = [
        {"name": "world", "axes": [axis(name, "meter") for name in "zyx"]},
        {"name": "physical", "axes": [axis(name, "nanometer") for name in "zyx"]},
    ]
    to_world = {"type": "scale", "scale": [9, 9, 9], "input": "physical", "output": "world"}
    path = ome(tmp_path / "x.zarr", [volume()], version="0.6", transforms=[[transform]], coordinateSystems=systems,
               coordinateTransformations=[to_world])  # fmt: skip
    group = zarr.open_group(path)
    image = group.attrs["ome"]["multiscales"][0]  # type: ignore[index, call-overload]
    del image["axes"]
    group.attrs["ome"] = {"version": "0.6", "multiscales": [image]}
    header = read_header(path)
    assert header.voxel_size_angstrom == pytest.approx((10, 20, 30)) and not header.warnings
    assert header.origin_angstrom == pytest.approx((40, 50, 60))


@pytest.mark.parametrize("name", ["Tomographié №5.ome.zarr", "TS 01 bin4.v2.zarr", "TS_018_9.96Apx.zarr", "トモ.zarr"])
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    path = ome(tmp_path / name, [volume()])
    np.testing.assert_array_equal(ingest(path, MemoryStore())[0][:], volume())
    assert source_identity(path) == source_identity(path)
    path = hdf5(tmp_path / (name + ".h5"), {"volume": volume()})
    convert(path, tmp_path / "out" / (name + ".zarr"))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "out" / (name + ".zarr"), mode="r")[:], volume())


@pytest.mark.parametrize(("version", "zarr_format"), NGFF)
def test_identity_changes_with_metadata_and_chunks(tmp_path: Path, version: str, zarr_format: int) -> None:
    path = ome(tmp_path / "x.zarr", [volume()], version=version)
    seen = [source_identity(path)]
    assert source_identity(path) == seen[0] and json.loads(json.dumps(seen[0])) == seen[0]

    def changed() -> None:
        seen.append(source_identity(path))
        assert seen.count(seen[-1]) == 1

    time.sleep(0.01)  # beyond the clock of the file system
    zarr.open_array(path / "0")[:5, :5, :5] = 1
    changed()
    zarr.open_group(path).attrs["note"] = "other"
    changed()
    chunk = next(file for file in (path / "0").rglob("*") if file.is_file() and "zar" not in file.name)
    time.sleep(0.01)
    chunk.unlink()
    changed()
    path.rename(tmp_path / "y.zarr")
    assert source_identity(tmp_path / "y.zarr")[1:] == seen[-1][1:] and source_identity(tmp_path / "y.zarr") != seen[-1]


def test_chunks_that_are_changed_in_place_are_another_input(tmp_path: Path) -> None:
    """Some writers replace chunk files, others write into them: neither the folder nor the size need change."""
    path = ome(tmp_path / "x.zarr", [volume()])
    seen = [source_identity(path)]
    chunk = next(file for file in (path / "0").rglob("*") if file.is_file() and "zar" not in file.name)
    times = chunk.parent.stat()
    with chunk.open("r+b") as file:
        file.write(bytes(1))
    os.utime(chunk, ns=(5, 7))
    assert chunk.parent.stat().st_mtime_ns == times.st_mtime_ns
    seen.append(source_identity(path))
    with chunk.open("r+b") as file:
        file.truncate(3)
    os.utime(chunk, ns=(5, 7))
    seen.append(source_identity(path))
    assert len(set(map(str, seen))) == 3


def test_content_is_that_of_a_copy_and_of_nothing_else(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(whole)
    (tmp_path / "b").write_bytes(whole)
    assert source_content(tmp_path / "a") == source_content(tmp_path / "b")
    for other in (
        whole[:-1],
        whole + b"1",
        b"x" + whole[1:],
        whole[:-1] + b"x",
        b"",
        whole[:9999] + b"xy" + whole[10001:],
    ):
        (tmp_path / "b").write_bytes(other)
        assert source_content(tmp_path / "a") != source_content(tmp_path / "b")
    path = ome(tmp_path / "x.zarr", [volume()])
    shutil.copytree(path, tmp_path / "y.zarr", copy_function=shutil.copy)
    assert source_content(path) == source_content(tmp_path / "y.zarr")
    zarr.open_array(tmp_path / "y.zarr" / "0")[:5, :5, :5] = 1
    assert source_content(path) != source_content(tmp_path / "y.zarr")
    assert not is_newer_in_part(path, newest_chunk(path)) and not is_newer_in_part(path, newest_chunk(path) - 10**12)
    now = newest_chunk(path) + 1
    os.utime(path / "0" / ".zarray", ns=(now, now))  # what it holds is compared as a whole
    assert not is_newer_in_part(path, now - 1) and newest_chunk(path) == now - 1
    os.utime(path / "0" / "0.0.0", ns=(now, now))
    assert is_newer_in_part(path, now - 1) and newest_chunk(path) == now


def test_identity_of_a_file_is_what_it_was(tmp_path: Path) -> None:
    """Outputs that were made before are not made again: name, size, time of the last change, and the beginning."""
    (tmp_path / "x.mrc").write_bytes(b"123")
    os.utime(tmp_path / "x.mrc", ns=(5, 7))
    assert source_identity(tmp_path / "x.mrc") == ["x.mrc", 3, 7, hashlib.sha256(b"123").hexdigest()]


def tagged(dataset: Any, names: str) -> None:
    dataset.attrs["axistags"] = json.dumps({"axes": [{"key": name, "typeFlags": 2} for name in names]})


def labelled(dataset: Any, names: str) -> None:
    for dimension, name in zip(dataset.dims, names, strict=True):
        dimension.label = name.upper()


def scaled(dataset: Any, names: str) -> None:
    for axis, name in enumerate(names):
        scale = dataset.parent.create_dataset(name, data=np.arange(dataset.shape[axis]))
        scale.make_scale(name)
        dataset.dims[axis].attach_scale(scale)


@pytest.mark.parametrize("names", ["zyx", "xyz", "yxz", "xyzc", "cxyz"])
@pytest.mark.parametrize("name_axes", [tagged, labelled, scaled])
def test_named_axes_of_hdf5_are_brought_into_order(tmp_path: Path, names: str, name_axes: Any) -> None:
    volume = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    stored = volume.transpose(["zyx".index(name) for name in names if name != "c"])
    if "c" in names:
        stored = np.expand_dims(stored, names.index("c"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        name_axes(file.create_dataset("data", data=stored, chunks=True), names)
    header = read_header(tmp_path / "a.h5")
    assert header.shape == volume.shape
    np.testing.assert_array_equal(header.read((slice(0, 4), slice(0, 5), slice(0, 6))), volume)
    np.testing.assert_array_equal(header.read((slice(1, 3), slice(2, 5), slice(0, 4))), volume[1:3, 2:5, :4])
    assert any("transposed to z, y, x" in note for note in header.notes) == (names != "zyx")


def test_names_of_hdf5_axes_that_say_nothing_are_left_alone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("data", data=np.zeros((4, 5, 6), np.float32))
        labelled(dataset, "abc")
        dataset.attrs["axistags"] = "no JSON"
    assert read_header(tmp_path / "a.h5").shape == (4, 5, 6)


def stored_part(path: Path, lost: Any, **options: Any) -> Path:
    """Noise of 4 × 4 × 4 chunks without those of which `lost` says so."""
    array = zarr.create_array(str(path), shape=(32, 32, 32), chunks=(8, 8, 8), dtype="f4", **options)
    array[:] = np.random.default_rng(0).random((32, 32, 32), np.float32)
    for index in np.ndindex(4, 4, 4):
        if lost(index):
            (path / array.metadata.encode_chunk_key(index)).unlink()
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_chunks_that_are_missing_are_counted(tmp_path: Path, version: Any) -> None:
    options = {"zarr_format": version}
    assert not any(
        "are missing" in w for w in read_header(stored_part(tmp_path / "a.zarr", lambda i: 0, **options)).warnings
    )
    header = read_header(stored_part(tmp_path / "b.zarr", lambda i: i[0] == 3, **options))
    assert any(
        w.startswith("16 of 64 chunks (25.0 %) are missing and read as 0.0: ") and "may be incomplete" in w
        for w in header.warnings
    )
    for name, lost in (("c", lambda i: i[0] > 0), ("d", lambda i: True)):
        header = read_header(stored_part(tmp_path / f"{name}.zarr", lost, **options))
        with pytest.raises(TomogramError, match=r"at most 50% .* of 64 chunks .* are missing.*Copy it again"):
            header.require_complete()


def test_chunks_that_the_writer_left_out_are_said_and_used(tmp_path: Path) -> None:
    volume = np.zeros((32, 32, 32), np.float32)
    volume[4:12, 4:12, 4:12] = 1
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=volume.shape, chunks=(8, 8, 8), dtype="f4", fill_value=0)
    array[:] = volume
    (warning,) = [w for w in read_header(tmp_path / "a.zarr").warnings if "are missing" in w]
    assert warning.startswith("56 of 64 chunks (87.5 %)") and "left out empty chunks" in warning
    read_header(tmp_path / "a.zarr").require_complete()
    voxels, _ = ingest(tmp_path / "a.zarr", MemoryStore())
    np.testing.assert_array_equal(voxels[:], volume)


def test_shards_that_are_missing_are_counted(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(32,) * 3, chunks=(8,) * 3, shards=(16,) * 3, dtype="f4")
    array[:] = np.random.default_rng(0).random((32,) * 3, np.float32)
    (tmp_path / "a.zarr" / "c" / "1" / "1" / "1").unlink()
    assert any(w.startswith("1 of 8 shards (12.5 %)") for w in read_header(tmp_path / "a.zarr").warnings)


def test_parts_of_hdf5_that_are_missing_are_counted(tmp_path: Path) -> None:
    data = np.ones((4, 8, 8), np.float32)
    for number in range(4):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["data"] = data
    layout = h5py.VirtualLayout((16, 8, 8), "f4")
    for number in range(4):
        layout[4 * number : 4 * number + 4] = h5py.VirtualSource(f"{number}.h5", "data", data.shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("data", layout, fillvalue=0)
    assert not any("are missing" in w for w in read_header(tmp_path / "a.h5").warnings)
    (tmp_path / "1.h5").unlink()
    (warning,) = [w for w in read_header(tmp_path / "a.h5").warnings if "are missing" in w]
    assert warning == "sources of a virtual dataset (1.h5, data), 25.0 % of the whole, are missing and read as 0.0"
    for number in (0, 2):
        (tmp_path / f"{number}.h5").unlink()
    with pytest.raises(TomogramError, match=r"75.0 % of the whole.*Copy it again"):
        read_header(tmp_path / "a.h5").require_complete()
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("data", (16, 8, 8), "f4", chunks=(4, 8, 8))[:8] = 1
    assert any(w.startswith("2 of 4 chunks, 50.0 %") for w in read_header(tmp_path / "b.h5").warnings)


def test_parts_of_hdf5_that_were_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(make: Callable[[h5py.File], Any]) -> tuple[list[str], bool]:
        (tmp_path / "sub").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "sub" / "a.h5", "w") as file:
            make(file)
        header = read_header(tmp_path / "sub" / "a.h5")
        return [w for w in header.warnings if "are missing" in w], bool(header.incomplete)

    def chunks(file: h5py.File, value: float) -> None:
        file.create_dataset("data", (16, 8, 8), "f4", chunks=(2, 8, 8))[:4] = value

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((16, 8, 8), "f4")
        layout[:4] = h5py.VirtualSource("0.h5", "data", (4, 8, 8))
        file.create_virtual_dataset("data", layout)

    ending = "are missing and read as 0.0"
    assert said(partial(chunks, value=1)) == ([f"6 of 8 chunks, 75.0 % of the whole, {ending}"], True)
    assert said(partial(chunks, value=0)) == ([f"6 of 8 chunks, 75.0 % of the whole, {ending}"], False)
    never = said(lambda file: file.create_dataset("data", (16, 8, 8), "f4"))
    assert never == ([f"voxels, 100.0 % of the whole, {ending}"], True)

    def unlimited(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((16, 8, 8), "f4", maxshape=(None, 8, 8))
        source = h5py.VirtualSource("1.h5", "data", (16, 8, 8), maxshape=(None, 8, 8))
        layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
        file.create_virtual_dataset("data", layout)

    def external(file: h5py.File) -> None:
        file.create_dataset("data", (16, 8, 8), "f4", external=[("x.raw", 4, h5py.h5f.UNLIMITED)])

    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["data"] = np.ones((4, 8, 8), np.float32)
    monkeypatch.chdir(tmp_path)  # where HDF5 looks as well
    with h5py.File(tmp_path / "1.h5", "w") as file:
        file.create_dataset("data", (16, 8, 8), "f4", maxshape=(None, 8, 8))[:] = 1
    (tmp_path / "x.raw").write_bytes(bytes(4 + 1024))
    assert said(virtual) == ([f"parts of a virtual dataset, 75.0 % of the whole, {ending}"], False)
