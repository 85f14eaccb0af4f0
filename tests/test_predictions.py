"""Files of labels: what readers find in them, and what is left when they cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cryosiam_dask.errors import OutputError
from cryosiam_dask.files import mrc, predictions
from cryosiam_dask.files.hdf5 import read_attributes
from cryosiam_dask.files.mrc import write_mrc
from cryosiam_dask.files.predictions import exportable_array, replace_labels, write_hdf5, write_instances_hdf5


def random_labels(shape: tuple[int, ...], classes: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, classes, shape).astype(np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------- HDF5


@pytest.mark.parametrize("shape", [(5, 7), (70, 130, 129), (64, 128, 128), (1, 300, 40)])
def test_exportable_arrays_are_copied_chunk_by_chunk(tmp_path: Path, shape: tuple[int, ...]) -> None:
    group = zarr.create_group(tmp_path / "work.zarr")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, shape, dtype=np.uint8) * (rng.random(shape) < 0.1)
    values[: shape[0] // 2] = 0  # chunks of which some hold nothing
    labels, removed = (exportable_array(group, name, shape) for name in ("labels", "removed"))
    labels[:] = values
    write_hdf5(tmp_path / "copied.h5", labels, attributes={}, removed=removed)
    write_hdf5(tmp_path / "compressed.h5", values, attributes={}, removed=np.zeros(shape, np.uint8))
    for name, expected in (("labels", values), ("removed", np.zeros(shape))):
        with h5py.File(tmp_path / "copied.h5") as file, h5py.File(tmp_path / "compressed.h5") as other:
            np.testing.assert_array_equal(file[name][:], expected)
            np.testing.assert_array_equal(other[name][:], expected)
            assert file[name].chunks == other[name].chunks == labels.chunks
            assert file[name].compression == "gzip"
    # The bytes were copied: those of a chunk are the same in both.
    chunk = next((Path(labels.store.root) / labels.path).glob("[0-9]*"))
    with h5py.File(tmp_path / "copied.h5") as file:
        corner = tuple(int(i) * c for i, c in zip(chunk.name.split("."), labels.chunks, strict=True))
        assert file["labels"].id.read_direct_chunk(corner)[1] == chunk.read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 23), min_size=2, max_size=3), st.integers(4, 24), st.integers(1, 3), st.integers(1, 3))
def test_any_reader_finds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], chunk: int, blocks: int, classes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_preds.h5"
    labels = random_labels(tuple(shape))
    scores = np.random.default_rng(1).normal(size=(classes, *shape)).astype(np.float32)
    scores.flat[0] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK", "CHUNK_OF_WIDER"):
            patch.setattr(predictions, name, {2: (chunk,) * 2, 3: (chunk,) * 3})
        patch.setattr(predictions, "BLOCK_CHUNKS", blocks)
        write_hdf5(path, labels, probabilities=scores, distances=-scores, attributes={})
    with h5py.File(path) as file:
        assert set(file) == {"labels", "probs", "distances"}
        assert [file[name].dtype for name in ("labels", "probs", "distances")] == [np.uint8, np.float32, np.float32]
        np.testing.assert_array_equal(file["labels"][:], labels)
        np.testing.assert_array_equal(file["probs"][:], scores)
        np.testing.assert_array_equal(file["distances"][:], -scores)
        assert file["labels"].compression == file["probs"].compression == "gzip"


def test_zarr_arrays_of_several_blocks(tmp_path: Path) -> None:
    labels = zarr.create_array(tmp_path / "labels.zarr", data=random_labels((70, 300, 90)), chunks=(48, 96, 90))
    scores = zarr.create_array(tmp_path / "probs.zarr", data=np.ones((2, 70, 300, 90), "f4"), chunks=(1, 48, 96, 90))
    write_hdf5(tmp_path / "x.h5", labels, probabilities=scores, attributes={})
    with h5py.File(tmp_path / "x.h5") as file:
        assert set(file) == {"labels", "probs"}
        assert file["labels"].chunks == (64, 128, 90)
        assert file["probs"].chunks == (1, 64, 64, 64)
        np.testing.assert_array_equal(file["labels"][:], labels[:])
        assert (file["probs"][:] == 1).all()


ATTRIBUTES: dict[str, Any] = {
    "voxel_size_angstrom": (None, 9.96, 9.96),
    "origin_angstrom": (0.0, -12.5, 3.0),
    "nstart": (0, 1, -2),
    "class_names": ["background", "Membran µ"],
    "checkpoint_sha256": "ab" * 32,
    "configuration": {"threshold": 0.1, "patch": [64, 64]},
    "mask": Path("folder/mask.h5"),
    "absent": None,
    "masked": True,
}


def test_attributes_come_back(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "x.h5", random_labels((4, 4, 4)), attributes=ATTRIBUTES)
    found = read_attributes(tmp_path / "x.h5")
    assert json.loads(found.pop("configuration")) == ATTRIBUTES["configuration"]
    assert found == {
        "voxel_size_angstrom": [None, 9.96, 9.96],
        "origin_angstrom": [0.0, -12.5, 3.0],
        "nstart": [0, 1, -2],
        "class_names": ["background", "Membran µ"],
        "checkpoint_sha256": "ab" * 32,
        "mask": str(Path("folder/mask.h5")),
        "masked": True,
    }
    with h5py.File(tmp_path / "x.h5") as file:
        assert set(file["labels"].attrs) == set(file.attrs)
        np.testing.assert_array_equal(file["labels"].attrs["voxel_size_angstrom"], [np.nan, 9.96, 9.96])


def test_attributes_of_other_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["labels"] = np.zeros(3)
    assert read_attributes(tmp_path / "foreign.h5") == {}
    (tmp_path / "text.h5").write_text("no HDF5")
    for name in ("text.h5", "missing.h5"):
        with pytest.raises(OutputError, match=rf"{name}: .* must be readable HDF5; found .*\. Remove the file"):
            read_attributes(tmp_path / name)


def test_replaced_labels_keep_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    labels = random_labels((30, 70, 20))
    scores = np.random.default_rng(1).random((3, 30, 70, 20)).astype(np.float32)
    write_hdf5(path, labels, probabilities=scores, removed=labels, attributes={"nstart": (1, 2, 3), "sizes": (-1, -1)})
    with h5py.File(path, "a") as file:
        file.create_group("notes")["mine"] = 7
        file["labels"].attrs["seen_by"] = "me"
        expected_bytes = file["probs"].id.get_storage_size()
    with h5py.File(path) as old:
        replace_labels(path, old["labels"], attributes={"sizes": (-1, 5000)})  # from the very file that is replaced
        assert set(h5py.File(path)) == {"labels", "probs", "notes"}  # what was removed belonged to the old labels
    replace_labels(path, labels // 2, removed=labels - labels // 2, attributes={})
    with h5py.File(path) as file:
        assert set(file) == {"labels", "probs", "notes", "removed"}
        np.testing.assert_array_equal(file["labels"][:] + file["removed"][:], labels)
        assert file["notes/mine"][()] == 7
        np.testing.assert_array_equal(file["labels"][:], labels // 2)
        np.testing.assert_array_equal(file["probs"][:], scores)
        assert file["probs"].id.get_storage_size() == expected_bytes
        assert file["labels"].attrs["seen_by"] == "me"
        assert file["labels"].attrs["sizes"].tolist() == [-1, 5000]
    assert read_attributes(path) == {"nstart": [1, 2, 3], "sizes": [-1, 5000]}
    assert names(tmp_path) == ["x.h5"]


def test_replacing_labels_needs_a_readable_file(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"no HDF5")
    with pytest.raises(OutputError, match="must be readable HDF5"):
        replace_labels(tmp_path / "x.h5", random_labels((4, 4)), attributes={})
    assert (tmp_path / "x.h5").read_bytes() == b"no HDF5"


def test_wider_labels_are_not_cut(tmp_path: Path) -> None:
    for write in (write_hdf5, write_mrc):
        with pytest.raises(TypeError, match="uint8"):
            write(tmp_path / "x", np.full((4, 4, 4), 300), **({"attributes": {}} if write is write_hdf5 else {}))
    assert names(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------- MRC


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), st.sampled_from([1, 2, 128, 256]), st.integers(1, 5))
def test_mrcfile_reads_and_approves(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], classes: int, block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.mrc"
    labels = random_labels(tuple(shape), classes)
    labels.flat[-1] = classes - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mrc, "MRC_BLOCK", block)
        write_mrc(path, labels, voxel_size_angstrom=[7.5] * len(shape), label="labels of a test")
    assert mrcfile.validate(path)
    with mrcfile.open(path) as file:
        assert file.data.dtype == (np.int8 if classes <= 128 else np.uint16)
        assert file.is_volume() == (len(shape) == 3)
        np.testing.assert_array_equal(file.data, labels)
        assert file.header.dmin == labels.min()
        assert file.header.dmax == labels.max()
        assert file.header.dmean == pytest.approx(labels.mean())
        assert file.header.rms == pytest.approx(labels.std())
        assert file.get_labels() == ["labels of a test"]


def test_mrc_keeps_the_place_of_the_volume(tmp_path: Path) -> None:
    write_mrc(
        tmp_path / "x.mrc",
        random_labels((3, 4, 5)),
        voxel_size_angstrom=(None, 9.96, 10.0),
        origin_angstrom=(1.0, -2.0, 3.0),
        nstart=(7, 8, -9),
    )
    assert mrcfile.validate(tmp_path / "x.mrc")
    with mrcfile.open(tmp_path / "x.mrc") as file:
        assert file.voxel_size.tolist() == pytest.approx((10.0, 9.96, 0.0))
        assert file.header.origin.tolist() == (3.0, -2.0, 1.0)
        assert file.nstart.tolist() == (-9, 8, 7)


# -------------------------------------------------------------------------------------------------------------- faults

FULL_DISK = """
import resource, signal, sys
import numpy as np
from cryosiam_dask.errors import OutputError
from cryosiam_dask.files.mrc import write_mrc
from cryosiam_dask.files.predictions import replace_labels, write_hdf5

writer, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
labels = np.random.default_rng(0).integers(0, 255, (64, 256, 64)).astype(np.uint8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, as on a full disk with ENOSPC
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for _ in range(2):  # a failure must not spoil the next attempt in the same process
    try:
        globals()[writer](path, labels, **({} if writer == "write_mrc" else {"attributes": {}}))
    except OutputError as error:
        print(error)
"""


@pytest.mark.parametrize("writer", ["write_hdf5", "replace_labels", "write_mrc"])
@pytest.mark.parametrize("limit", [0, 900, 5000, 600_000])
def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path, writer: str, limit: int) -> None:
    path = tmp_path / "x_preds.h5"
    write_hdf5(path, random_labels((8, 8, 8)), probabilities=np.zeros((2, 8, 8, 8), "f4"), attributes=ATTRIBUTES)
    before = path.read_bytes()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, writer, str(path), str(limit)],
        env=environment,
        capture_output=True,
        text=True,
    )
    message = f"{path}: the output must be writable; found File too large. The file system or a limit (ulimit -f) "
    assert done.stderr == ""
    assert done.returncode == 0
    assert [line.startswith(message) for line in done.stdout.splitlines()] == [True, True]
    assert path.read_bytes() == before
    assert names(tmp_path) == ["x_preds.h5"]


class Broken:
    """An array whose second block cannot be read."""

    shape = (70, 600, 70)
    reads = 0

    def __getitem__(self, region: tuple[slice, ...]) -> np.ndarray:
        self.reads += 1
        if self.reads == 2:
            raise ValueError("lost")
        return np.zeros(tuple(s.stop - s.start for s in region), np.uint8)


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4, 0), (0, 0, 0), (0, 4)])
@pytest.mark.parametrize("writer", [write_hdf5, write_instances_hdf5, replace_labels, write_mrc])
def test_an_array_without_voxels_is_refused_and_leaves_the_old_file(
    tmp_path: Path, writer: Any, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "x.out"
    path.write_bytes(b"old")
    with pytest.raises(
        OutputError, match=r"x\.out: a file must hold voxels; found shape \(.*0.*\)\. Check the tomogram"
    ):
        writer(path, np.zeros(shape, np.uint8), **({} if writer is write_mrc else {"attributes": {}}))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["x.out"]


@pytest.mark.parametrize("writer", [write_hdf5, write_mrc])
def test_an_exception_on_the_way_leaves_the_old_file(tmp_path: Path, writer: Any) -> None:
    path = tmp_path / "x.out"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="lost"):
        writer(path, Broken(), **({"attributes": {}} if writer is write_hdf5 else {}))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.out"]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.h5: .*; found No such file or directory\. Create the folder first\."):
        write_hdf5(tmp_path / "nowhere" / "x.h5", random_labels((4, 4)), attributes={})


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"found Not a directory\. Check the folder"):
        write_mrc(tmp_path / "file" / "x.mrc", random_labels((4, 4)))


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.h5").mkdir()
    with pytest.raises(OutputError, match="found Is a directory"):
        write_hdf5(tmp_path / "x.h5", random_labels((4, 4)), attributes={})
    assert names(tmp_path) == ["x.h5"]


class Overtaken:
    """Labels of which another process writes the whole file, from others, while they are read for the last time."""

    shape, dtype = (4, 256, 512), np.dtype(np.uint8)

    def __init__(self, write_other: Any, last: int) -> None:
        self.write_other, self.last, self.reads = write_other, last, 0

    def __getitem__(self, region: Any) -> np.ndarray:
        self.reads += 1
        if self.reads == self.last:
            self.write_other()
        return np.ones(self.shape, np.uint8)[region]


@pytest.mark.parametrize(("writer", "last"), [(write_hdf5, 1), (write_mrc, 4)])
def test_a_writer_that_was_overtaken_does_not_touch_the_other_ones_file(tmp_path: Path, writer: Any, last: int) -> None:
    """As a worker that hung and goes on, when another one has been given its work."""
    path, options = tmp_path / "x.out", {"attributes": {}} if writer is write_hdf5 else {}
    writer(tmp_path / "expected", random_labels(Overtaken.shape), **options)
    overtaken = Overtaken(lambda: writer(path, random_labels(Overtaken.shape), **options), last)
    with pytest.raises(OutputError, match=r"x\.out: only one process may write an output at a time"):
        writer(path, overtaken, **options)
    assert overtaken.reads >= last
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    assert names(tmp_path) == ["expected", "x.out"]
