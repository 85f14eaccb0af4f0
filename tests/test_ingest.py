"""Tomogram files of every kind that is met, made byte by byte, and what must arrive in the zarr array."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from mrcfile.dtypes import HEADER_DTYPE
from zarr.storage import MemoryStore

from cryosiam_dask.core.executor import SerialExecutor
from cryosiam_dask.errors import OutputError, TomogramError
from cryosiam_dask.files.mrc import MrcVoxels, read_mrc_header
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.stages import ingest as ingest_module
from cryosiam_dask.stages.ingest import convert, ingest

MODES = {0: "i1", 1: "i2", 2: "f4", 4: "c8", 6: "u2", 12: "f2"}
IMOD_STAMP = 1146047817


def mrc_bytes(
    data: np.ndarray,  # (section, row, column)
    *,
    byte_order: str = "<",
    extended: bytes = b"",
    imod_flags: int | None = None,
    voxel: float = 10.0,
    **fields: Any,
) -> bytes:
    """An MRC file of mode `fields['mode']` (or that of the data), little-endian and valid unless told otherwise."""
    header = np.zeros((), HEADER_DTYPE.newbyteorder(byte_order))
    modes = {np.dtype(code): mode for mode, code in MODES.items()} | {np.dtype("u1"): 0}
    nz, ny, nx = (1,) * (3 - data.ndim) + data.shape
    defaults: dict[str, Any] = {
        "nx": nx,
        "ny": ny,
        "nz": nz,
        "mode": modes[data.dtype.newbyteorder("=")],
        "mx": nx,
        "my": ny,
        "mz": nz,
        "cella": (nx * voxel, ny * voxel, nz * voxel),
        "mapc": 1,
        "mapr": 2,
        "maps": 3,
        "dmax": -1,
        "ispg": 1 if data.ndim == 3 else 0,
        "nsymbt": len(extended),
        "map": b"MAP ",
        "machst": (0x44, 0x44, 0, 0) if byte_order == "<" else (0x11, 0x11, 0, 0),
    }
    for name, value in (defaults | fields).items():
        header[name] = value
    raw = bytearray(header.tobytes())
    if imod_flags is not None:
        raw[152:160] = np.array([IMOD_STAMP, imod_flags], byte_order + "i4").tobytes()
    return bytes(raw) + extended + data.astype(data.dtype.newbyteorder(byte_order)).tobytes()


def volume(shape: tuple[int, ...] = (5, 6, 7), dtype: str = "i2") -> np.ndarray:
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "c":
        return (random.normal(size=shape) + 1j * random.normal(size=shape)).astype(dtype)
    return (random.normal(size=shape) * 40 + 60).clip(0, 120).astype(dtype)


def read(path: Path, **options: Any) -> tuple[zarr.Array, ingest_module.IngestReport]:
    return ingest(path, MemoryStore(), **options)


def write(path: Path, data: np.ndarray, **fields: Any) -> Path:
    path.write_bytes(mrc_bytes(data, **fields))
    return path


@pytest.mark.parametrize(
    "region",
    [np.s_[2], np.s_[-1, 1:3], np.s_[::2, np.int64(3), 1:6:3], np.s_[1:3, -4:], np.s_[::-1, 4:1:-2], np.s_[:, 5:2]],
)
def test_a_file_that_is_read_where_it_is_slices_like_an_array(tmp_path: Path, region: Any) -> None:
    voxels = np.random.default_rng(0).random((6, 7, 8), np.float32)
    (tmp_path / "x.mrc").write_bytes(mrc_bytes(voxels))
    np.testing.assert_array_equal(MrcVoxels(read_mrc_header(tmp_path / "x.mrc", None))[region], voxels[region])


@pytest.mark.parametrize("copy", [False, True])
def test_a_file_that_changes_while_it_is_read_is_no_tomogram(tmp_path: Path, copy: bool) -> None:
    path, store = write(tmp_path / "x.mrc", volume()), MemoryStore()

    class Writing(SerialExecutor):
        def map(self, *arguments: Any, **options: Any) -> list[Any]:
            found = super().map(*arguments, **options)
            write(path, volume((5, 6, 8)))
            return found

    with pytest.raises(TomogramError, match="must not change"):
        ingest(path, store, copy=copy, executor=Writing())
    assert not copy or "statistics" not in zarr.open_array(store, path="tomogram").attrs


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("counted", [49920, -1])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_an_extended_header_that_is_counted_and_not_there(
    tmp_path: Path, counted: int, compressed: bool, byte_order: str
) -> None:
    """As other programs leave it that copy a header and not what follows it."""
    content = mrc_bytes(volume(), byte_order=byte_order, nsymbt=counted)
    path = tmp_path / ("x.mrc.gz" if compressed else "x.mrc")
    path.write_bytes(gzip.compress(content) if compressed else content)
    stored, report = read(path)
    np.testing.assert_array_equal(stored[:], volume())
    (warning,) = (warning for warning in report.warnings if "nsymbt" in warning)
    assert f"an extended header of {counted} bytes (nsymbt) that is not in the file" in warning
    path.write_bytes(gzip.compress(content[:-1]) if compressed else content[:-1])
    message = "(nsymbt) must not be negative; found -1." if counted < 0 else "truncated"
    with pytest.raises(TomogramError, match=re.escape(message)):
        read(path)


# --------------------------------------------------------------------------------------------------- voxels and layout


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    chunks=st.tuples(*[st.integers(1, 5)] * 3),
    axes=st.permutations([1, 2, 3]),
    byte_order=st.sampled_from("<>"),
    extended=st.sampled_from([0, 1, 160, 1024]),
    compressed=st.booleans(),
    piece=st.sampled_from([1, 100, 2**20]),
)
def test_any_mode_order_layout_and_chunking(
    tmp_path_factory: pytest.TempPathFactory,
    mode: int,
    shape: tuple[int, int, int],
    chunks: tuple[int, int, int],
    axes: list[int],
    byte_order: str,
    extended: int,
    compressed: bool,
    piece: int,
) -> None:
    data = volume(shape, MODES[mode])
    names = dict(zip(("mapc", "mapr", "maps"), axes, strict=True))
    raw = mrc_bytes(data, byte_order=byte_order, extended=b"\xff" * extended, **names)
    path = tmp_path_factory.getbasetemp() / "any.mrc"
    path.write_bytes(gzip.compress(raw, 1) if compressed else raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "TASK_BYTES", piece)
        array, report = read(path, chunks=[min(c, 9) for c in chunks])

    columns, rows, sections = axes
    expected = data.real.transpose([(sections, rows, columns).index(axis) for axis in (3, 2, 1)])
    assert array.dtype == {"c8": np.float32, "f2": np.float32}.get(MODES[mode], np.dtype(MODES[mode]))
    assert array.dtype.isnative
    np.testing.assert_array_equal(array[:], expected)
    assert report.statistics.minimum == expected.min()
    assert report.statistics.maximum == expected.max()
    assert report.statistics.mean == pytest.approx(float(expected.mean(dtype=np.float64)), rel=1e-6, abs=1e-6)
    assert report.statistics.non_finite == 0


@pytest.mark.parametrize("dtype", ["i1", "i2", "f4", "u2", "f2"])
def test_files_of_mrcfile(tmp_path: Path, dtype: str) -> None:
    data = volume((9, 10, 11), dtype)
    with mrcfile.new(tmp_path / "x.mrc", data) as file:
        file.voxel_size = (9.96, 9.96, 10.5)
        file.header.origin = (1.0, -2.0, 3.0)
        file.nstart = (4, 5, -6)
    array, report = read(tmp_path / "x.mrc")
    np.testing.assert_array_equal(array[:], data)
    assert report.header.voxel_size_angstrom == pytest.approx((10.5, 9.96, 9.96))
    assert report.header.origin_angstrom == (3.0, -2.0, 1.0)
    assert report.header.nstart == (-6, 5, 4)
    assert report.warnings == ()


def test_attributes(tmp_path: Path) -> None:
    path = write(tmp_path / "TS_018_9.96Apx.mrc", volume(), nxstart=3, cella=(70, 66, 0), origin=(1, 2, 3))
    array, _ = read(path)
    attributes = json.loads(json.dumps(dict(array.attrs)))
    statistics = attributes.pop("statistics")
    assert attributes == {
        "axes": ["z", "y", "x"],
        "voxel_size_angstrom": [None, 11.0, 10.0],
        "origin_angstrom": [3.0, 2.0, 1.0],
        "nstart": [0, 0, 3],
        "source": "TS_018_9.96Apx.mrc",
        "source_bytes": path.stat().st_size,
        "source_modified": path.stat().st_mtime,
        "mode": 1,
        "notes": [],
        "warnings": ["voxel size along z is unknown"],
    }
    assert set(statistics) == {"min", "max", "mean", "non_finite_voxels"}
    assert array.metadata.dimension_names == ("z", "y", "x")
    assert array.metadata.zarr_format == 3


def test_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mrc", np.zeros((3, 300, 200), np.int8))
    assert read(path)[0].chunks == (3, 128, 128)
    assert read(path, chunks=(2, 64, 200))[0].chunks == (2, 64, 200)


def test_large_sections_of_compressed_files_get_thin_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "STREAM_BYTES", 1000)  # three sections of 300 bytes
    data = volume((20, 10, 30), "i1")
    path = tmp_path / "x.mrc.gz"
    path.write_bytes(gzip.compress(mrc_bytes(data, mapc=3, maps=1)))
    array, _ = read(path)
    assert array.chunks == (30, 10, 3)
    np.testing.assert_array_equal(array[:], data.transpose(2, 1, 0))


# --------------------------------------------------------------------------------------------------------------- traps


@pytest.mark.parametrize(
    ("fields", "signed", "reason"),
    [
        ({"imod_flags": 0}, False, "because of IMOD's flags"),
        ({"imod_flags": 1}, True, "because of IMOD's flags"),
        ({"imod_flags": 1, "dmax": 200}, True, "because of IMOD's flags"),
        ({"imod_flags": 0, "byte_order": ">"}, False, "because of IMOD's flags"),
        ({"dmin": 141, "dmax": 163}, False, "because the header's maximum is 163 > 127"),
        ({"dmin": 0, "dmax": 127}, True, "as in the standard"),
        ({"dmin": 0, "dmax": -1}, True, "as in the standard"),
        ({"dmin": np.nan, "dmax": np.nan}, True, "as in the standard"),
    ],
)
def test_signedness_of_bytes(tmp_path: Path, fields: dict[str, Any], signed: bool, reason: str) -> None:
    data = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    array, report = read(write(tmp_path / "x.mrc", data, **fields))
    np.testing.assert_array_equal(array[:], data.view(np.int8) if signed else data)
    (note,) = report.header.notes
    assert note.startswith(f"mode 0 read as {'signed' if signed else 'unsigned'} bytes, {reason}")


@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("stamp", [(0, 0, 0, 0), (0x44, 0x44, 0, 0), (0x11, 0x11, 0, 0), (0x44, 0x41, 0, 0)])
@pytest.mark.parametrize("identifier", [b"MAP ", b"MAP\0", b"\0\0\x91E"])
def test_missing_identifier_and_wrong_stamp(
    tmp_path: Path, byte_order: str, stamp: tuple[int, ...], identifier: bytes
) -> None:
    data = volume((4, 5, 300), "i2")
    array, report = read(write(tmp_path / "x.rec", data, byte_order=byte_order, machst=stamp, map=identifier))
    np.testing.assert_array_equal(array[:], data)
    expected = [] if identifier.startswith(b"MAP") else ["no MAP identifier in the header"]
    if {0x44: "<", 0x11: ">"}.get(stamp[0]) != byte_order:
        endian = "little" if byte_order == "<" else "big"
        written = " ".join(f"0x{byte:02x}" for byte in stamp)
        expected.append(f"machine stamp {written} is unknown or wrong; read as {endian}-endian")
    assert list(report.warnings) == expected


def test_axis_order_moves_sizes_but_not_the_cell(tmp_path: Path) -> None:
    """Columns run along z, rows along x, sections along y, as in EMD-3001."""
    data = volume((4, 5, 6), "f4")
    fields = {"mapc": 3, "mapr": 1, "maps": 2, "mx": 10, "my": 20, "mz": 30, "cella": (50, 120, 210)}
    fields |= {"nxstart": 7, "nystart": 8, "nzstart": 9, "origin": (1, 2, 3)}
    array, report = read(write(tmp_path / "x.map", data, **fields))
    assert array.shape == (6, 4, 5)
    for z, y, x in itertools.product(range(6), range(4), range(5)):
        assert array[z, y, x] == data[y, x, z]
    header = report.header
    assert header.voxel_size_angstrom == (7, 6, 5)
    assert header.origin_angstrom == (3, 2, 1)
    assert header.nstart == (7, 9, 8)
    assert header.notes == ("stored with the axes y, x, z (sections, rows, columns): transposed to z, y, x",)


@pytest.mark.parametrize("order", [(0, 0, 0), (1, 1, 2), (1, 2, 4)])
def test_impossible_axis_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    data = volume()
    path = write(tmp_path / "x.mrc", data, mapc=order[0], mapr=order[1], maps=order[2])
    array, report = read(path)
    np.testing.assert_array_equal(array[:], data)
    assert report.warnings[0].startswith("axis order (MAPS, MAPR, MAPC) = ")


def test_single_images(tmp_path: Path) -> None:
    data = volume((1, 6, 7))
    array, report = read(write(tmp_path / "x.mrc", data, ispg=0, cella=(70, 60, 0), nystart=2))
    np.testing.assert_array_equal(array[:], data[0])
    assert array.attrs["axes"] == ["y", "x"]
    assert array.metadata.dimension_names == ("y", "x")
    assert (report.header.voxel_size_angstrom, report.header.nstart) == ((10, 10), (2, 0))
    array, _ = read(write(tmp_path / "x.mrc", data, ispg=0, mapc=2, mapr=1))
    np.testing.assert_array_equal(array[:], data[0].T)
    array, _ = read(write(tmp_path / "x.mrc", data, ispg=1))  # a volume of one section
    np.testing.assert_array_equal(array[:], data)


def test_sections_of_space_group_0_are_a_volume(tmp_path: Path) -> None:
    """Many programs write tomograms as stacks of images, with mz = 1 or not."""
    data = volume()
    for mz in (1, 5):
        array, report = read(write(tmp_path / "x.rec", data, ispg=0, mz=mz, cella=(70, 60, 10 * mz)))
        np.testing.assert_array_equal(array[:], data)
        assert report.header.voxel_size_angstrom == (10, 10, 10)


@pytest.mark.parametrize(
    ("fields", "expected", "warning"),
    [
        ({}, (10, 10, 10), None),
        ({"mx": 14}, (10, 10, 5), None),  # cell / mx, not / nx
        ({"cella": (70, 61, 49)}, (9.8, 61 / 6, 10), None),  # slight anisotropy is normal
        ({"mx": 0, "my": 0, "mz": 0}, (None, None, None), "voxel size along z, y, x is unknown"),
        ({"cella": (0, 0, 0)}, (None, None, None), "voxel size along z, y, x is unknown"),
        ({"cella": (7, 6, 5)}, (None, None, None), "voxel size along z, y, x is unknown"),
        ({"cella": (70, -60, np.inf)}, (None, None, 10), "voxel size along z, y is unknown"),
        ({"mz": 1, "cella": (70, 60, 3881)}, (None, 10, 10), "voxel size along z reads as 3881 Å"),
        (
            {"mz": 1, "cella": (70, 60, 500)},
            (None, 10, 10),
            "voxel size along z reads as 500 Å (cell 500 Å, 1 samples)",
        ),
        ({"mz": 1, "cella": (70, 60, 10)}, (10, 10, 10), None),
        (
            {"mz": 1, "cella": (70, 60, 50)},
            (None, 10, 10),
            "the header does not give the voxel size along z (cell 50 Å",
        ),
    ],
)
def test_voxel_size(
    tmp_path: Path, fields: dict[str, Any], expected: tuple[float | None, ...], warning: str | None
) -> None:
    header = read_header(write(tmp_path / "x.mrc", volume(), **fields))
    for found, size in zip(header.voxel_size_angstrom, expected, strict=True):
        assert found == (None if size is None else pytest.approx(size))
    assert header.warnings[:1] == () if warning is None else header.warnings[0].startswith(warning)


def test_origin_that_is_no_number(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "x.mrc", volume(), origin=(1, np.nan, 2)))
    assert header.origin_angstrom == (0, 0, 0)
    assert "is not finite; read as 0" in header.warnings[0]


def test_non_finite_voxels_are_stored_and_counted(tmp_path: Path) -> None:
    data = volume((4, 5, 6), "f4")
    data[0, 0, :3] = np.nan, np.inf, -np.inf
    array, report = read(write(tmp_path / "x.mrc", data), chunks=(2, 2, 2))
    np.testing.assert_array_equal(array[:], data)
    finite = data[np.isfinite(data)]
    assert report.statistics.non_finite == array.attrs["statistics"]["non_finite_voxels"] == 3
    assert (report.statistics.minimum, report.statistics.maximum) == (finite.min(), finite.max())
    assert report.statistics.mean == pytest.approx(finite.mean())
    assert report.warnings == ("3 voxels are NaN or infinite; they are treated as the minimum",)

    array, report = read(write(tmp_path / "x.mrc", np.full((2, 3, 4), np.nan, np.float32)))
    assert report.statistics == ingest_module.Statistics(None, None, None, 24)
    assert array.attrs["statistics"]["mean"] is None


def test_bytes_after_the_voxels(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mrc", volume())
    path.write_bytes(path.read_bytes() + b"\0" * 17)
    assert read_header(path).warnings == ("17 bytes after the voxels are ignored",)


def test_complex_voxels_warn(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "x.mrc", volume(dtype="c8"))).warnings == (
        "complex voxels: only their real part is used",
    )


# ------------------------------------------------------------------------------------------------------------ refusals


def refusals() -> dict[str, tuple[bytes, str]]:
    """File contents and what the error must say; the first line of each is also what `read_header` finds alone."""
    whole = mrc_bytes(volume())
    random = np.random.default_rng(3).integers(0, 256, 5000).astype(np.uint8).tobytes()
    four_bits = mrc_bytes(volume(dtype="i1"), imod_flags=16)
    return {
        "empty": (
            b"",
            "begins with a header of 1024 bytes; found 0 bytes. Copy the file again or remove",
        ),
        "short": (whole[:1000], "begins with a header of 1024 bytes; found 1000 bytes"),
        "no voxels": (whole[:1024], "5 × 6 × 7 voxels of mode 1 need 1444 bytes with the header; found 1024 bytes"),
        "one byte": (
            whole[:-1],
            "need 1444 bytes with the header; found 1443 bytes. Copy the file or write it again: it is truncated",
        ),
        "in extended": (mrc_bytes(volume(), extended=b"e" * 99)[:1100], "need 1543 bytes with the header; found 1100"),
        "placeholder": (
            bytes(4096),
            "three sizes from 1 to 65535 and a mode; found sizes (0, 0, 0), mode 0 in a file of",
        ),
        "noise": (
            random,
            "in a file of 5000 bytes. Remove the file from the folder or write it again",
        ),
        "text": (b"tomogram " * 300, "three sizes from 1 to 65535"),
        "negative": (mrc_bytes(volume(), ny=-6), "found sizes (7, -6, 5), mode 1"),
        "4-bit": (
            mrc_bytes(volume(), mode=101),
            "must be 0, 1, 2, 4, 6 or 12; found mode 101 with 4-bit voxels. Convert",
        ),
        "4-bit bytes": (four_bits, "found mode 0 with 4-bit voxels"),
        "complex integers": (mrc_bytes(volume(), mode=3), "found mode 3. Convert the file, for example with IMOD"),
        "colour": (mrc_bytes(volume(), mode=16), "found mode 16"),
        "unknown": (mrc_bytes(volume(), mode=7, byte_order=">"), "found mode 7"),
        "stack": (
            mrc_bytes(volume(), ispg=401),
            "not a stack of volumes; found space group 401 (a 4-D stack), 5 sections",
        ),
    }


@pytest.mark.parametrize("kind", refusals())
def test_refusals(tmp_path: Path, kind: str) -> None:
    content, message = refusals()[kind]
    path = tmp_path / "x.mrc"
    path.write_bytes(content)
    with pytest.raises(TomogramError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    with pytest.raises(TomogramError):
        convert(path, tmp_path / "x.zarr")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mrc"]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TomogramError, match=r"does not exist\. Check the path"):
        read_header(tmp_path / "x.mrc")
    with pytest.raises(TomogramError, match="a readable file; found Is a directory"):
        read_header(tmp_path)


@pytest.mark.parametrize("kept", [5, 30, 400, -9, -1])
def test_damaged_compressed_files(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.mrc.gz"
    random = np.random.default_rng(0).integers(0, 1000, (5, 6, 70)).astype(np.int16)
    path.write_bytes(gzip.compress(mrc_bytes(random))[:kept])
    with pytest.raises(
        TomogramError, match=r"must be a complete gzip file; found .*\. Copy the file or compress it again"
    ):
        convert(path, tmp_path / "x.zarr")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mrc.gz"]


def test_compressed_files_with_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.mrc.gz"
    raw = bytearray(gzip.compress(mrc_bytes(volume()), 0))  # stored, not deflated: only the checksum can tell
    raw[-200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(TomogramError, match="must be a complete gzip file; found CRC check failed"):
        convert(path, tmp_path / "x.zarr")


def test_compressed_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "x.mrc.gz"
    path.write_bytes(gzip.compress(mrc_bytes(volume())[:1300]))
    read_header(path)
    with pytest.raises(TomogramError, match=r"need 1444 bytes with the header; found 1300 bytes"):
        convert(path, tmp_path / "x.zarr")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mrc.gz"]


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mrc", volume())

    class Cutting:
        def map(self, function: Any, items: Any, *, name: str) -> Any:
            path.write_bytes(path.read_bytes()[:1100])
            return [function(item) for item in items]

    with pytest.raises(TomogramError, match="need 1444 bytes with the header; found 1100 bytes"):
        convert(path, tmp_path / "x.zarr", executor=Cutting())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mrc"]


# ------------------------------------------------------------------------------------------------------------- outputs


def test_convert_makes_an_array_that_zarr_opens(tmp_path: Path) -> None:
    data = volume((20, 30, 40), "f4")
    report = convert(write(tmp_path / "x.mrc", data), tmp_path / "out" / "x.zarr", chunks=(8, 8, 8))
    array = zarr.open_array(tmp_path / "out" / "x.zarr", mode="r")
    np.testing.assert_array_equal(array[:], data)
    assert array.attrs["statistics"] == report.statistics.attributes()
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["x.zarr"]


def test_convert_replaces_zarr_only_and_only_when_told(tmp_path: Path) -> None:
    path, target = write(tmp_path / "x.mrc", volume()), tmp_path / "x.zarr"
    convert(path, target)
    with pytest.raises(OutputError, match=r"x\.zarr: .* must not replace anything.*allow it with --overwrite"):
        convert(path, target)
    write(path, volume() + 1)
    convert(path, target, overwrite=True)
    np.testing.assert_array_equal(zarr.open_array(target, mode="r")[:], volume() + 1)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="only zarr data can be replaced"):
        convert(path, precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years"
    path.write_bytes(b"")
    with pytest.raises(TomogramError):
        convert(path, target, overwrite=True)  # a failure leaves the old array
    np.testing.assert_array_equal(zarr.open_array(target, mode="r")[:], volume() + 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["precious", "x.mrc", "x.zarr"]


def test_leftovers_of_a_killed_conversion_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mrc", volume())
    convert(write(tmp_path / "y.mrc", np.ones((40, 40, 40), np.float32)), tmp_path / ".x.zarr.part", chunks=(8, 8, 8))
    convert(path, tmp_path / "x.zarr")
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "x.zarr", mode="r")[:], volume())


def test_ingest_twice_into_a_group(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mrc", volume())
    for _ in range(2):
        ingest(path, tmp_path / "work.zarr")
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "work.zarr", mode="r")["tomogram"][:], volume())


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mrc", volume())
    with pytest.raises(OutputError, match=r"must be writable; found .*\. "):
        convert(path, path / "x.zarr")


FULL_DISK = """
import resource, signal, sys
from cryosiam_dask.errors import OutputError
from cryosiam_dask.stages.ingest import convert

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    convert(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(20, 30, 40)).astype(np.float32)
    path = write(tmp_path / "x.mrc", data)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path, tmp_path / "x.zarr"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "must be writable; found File too large. Free space" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mrc"]


def test_tasks_travel_between_processes(tmp_path: Path) -> None:
    """What the executor gets can be pickled, run twice, and holds a chunk rather than the volume."""

    class Travelling:
        items: int = 0

        def map(self, function: Any, items: Any, *, name: str) -> Any:
            self.items = len(items)
            travelled = pickle.loads(pickle.dumps((function, items)))
            [travelled[0](item) for item in travelled[1]]
            return [travelled[0](item) for item in reversed(travelled[1])][::-1]

    data = volume((20, 30, 40), "f4")
    executor = Travelling()
    array, report = ingest(write(tmp_path / "x.mrc", data), tmp_path / "w.zarr", chunks=(8, 16, 8), executor=executor)
    assert executor.items == math.ceil(20 / 8) * math.ceil(30 / 16)
    np.testing.assert_array_equal(array[:], data)
    assert report.statistics.mean == pytest.approx(data.mean())


BYTES: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], bool | None]] = {
    # What a volume of these values, written as bytes, is to be taken for; None where both readings are the same.
    "unsigned, around the middle": (lambda rng: rng.normal(128, 30, 50_000).clip(0, 255), True),
    "unsigned, wide and clipped": (lambda rng: rng.normal(128, 90, 50_000).clip(0, 255), True),
    "unsigned, dark": (lambda rng: rng.exponential(40, 50_000).clip(0, 255), True),
    "unsigned, bright": (lambda rng: rng.normal(220, 10, 50_000).clip(0, 255), True),
    "unsigned, a mask": (lambda rng: 255 * (rng.random(50_000) < 0.3), True),
    "signed, around zero": (lambda rng: rng.normal(0, 30, 50_000).clip(-128, 127), False),
    "signed, wide and clipped": (lambda rng: rng.normal(0, 90, 50_000).clip(-128, 127), False),
    "signed, skewed": (lambda rng: (rng.exponential(20, 50_000) - 30).clip(-128, 127), False),
    "small": (lambda rng: rng.integers(0, 100, 50_000), None),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", BYTES)
def test_bytes_of_mode_0_without_statistics_are_looked_at(tmp_path: Path, kind: str, compressed: bool) -> None:
    make, unsigned = BYTES[kind]
    path = tmp_path / "a.mrc"
    values = np.round(make(np.random.default_rng(0))).astype(np.int16).reshape(20, 50, 50)
    with mrcfile.new(path) as mrc:
        mrc.set_data(values.astype(np.uint8).view(np.int8))
        mrc.voxel_size = 10
        mrc.header.dmin, mrc.header.dmax = 0, -1
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    for key in (None, True, False):
        header = read_header(path, unsigned=key)
        as_unsigned = bool(unsigned) if key is None else key
        assert header.dtype == (np.uint8 if as_unsigned else np.int8)
        said = [warning for warning in header.warnings if "mode 0" in warning]
        assert len(said) == (key is None and unsigned is not None)
        assert all(f"read as {'un' * as_unsigned}signed bytes" in warning for warning in said)
        assert all(f"Set mrc_unsigned to {not as_unsigned} if that is wrong" in warning for warning in said)


def test_statistics_of_the_header_rule_over_how_bytes_look(tmp_path: Path) -> None:
    for lowest, highest, dtype, warned in ((-128, 127, np.int8, True), (0, 255, np.uint8, False)):
        with mrcfile.new(tmp_path / "a.mrc", overwrite=True) as mrc:
            mrc.set_data(np.random.default_rng(0).normal(128, 30, (20, 50, 50)).astype(np.uint8).view(np.int8))
            mrc.header.dmin, mrc.header.dmax = lowest, highest
        header = read_header(tmp_path / "a.mrc")
        assert header.dtype == dtype and any("look unsigned" in w for w in header.warnings) == warned
