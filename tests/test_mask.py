"""Lamella masks: equal to skimage's resizing of the whole mask, however the tomogram is divided."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import resize

from cryosiam_dask.errors import MaskError
from cryosiam_dask.files import mask as mask_module
from cryosiam_dask.files.mask import Mask, open_mask, read_mask, require_aspect


def write(path: Path, labels: np.ndarray, **options: object) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("labels", data=labels, **options)
    return path


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def reference(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return resize(labels.astype(np.int8), shape, mode="constant", preserve_range=True).astype(np.int8)


@st.composite
def resizings(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], tuple[slice, ...]]:
    """A mask, the shape of its tomogram and a block of that."""
    ndim = draw(st.sampled_from([2, 3]))
    stored = tuple(draw(st.integers(1, 24)) for _ in range(ndim))
    shape = tuple(draw(st.integers(1, 30)) for _ in range(ndim))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "slab", "ones", "zeros", "hole"]))
    if kind == "noise":
        labels = random.integers(0, 2, stored)
    elif kind == "hole":
        labels = np.ones(stored, int)
        labels[tuple(random.integers(0, n) for n in stored)] = 0
    else:
        labels = np.full(stored, kind == "ones", int)
        if kind == "slab":
            labels[stored[0] // 4 : stored[0] - stored[0] // 4] = 1
    region = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        region.append(slice(start, draw(st.integers(start + 1, size))))
    return labels.astype(np.uint8), shape, tuple(region)


@settings(max_examples=300, deadline=None)
@given(resizings(), st.sampled_from([1, 3000, 2**26]))
def test_equals_skimage_on_every_block_with_any_budget(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[np.ndarray, tuple[int, ...], tuple[slice, ...]],
    budget: int,
) -> None:
    labels, shape, region = case
    path = write(tmp_path_factory.getbasetemp() / "mask_preds.h5", labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_module, "WORKING_BYTES", budget)
        found = read_mask(open_mask(path, shape), region)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference(labels, shape)[region])


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ((50, 60, 70), (100, 120, 140)),
        ((61, 90, 97), (31, 45, 49)),
        ((40, 90, 33), (77, 30, 33)),
        ((80, 200), (200, 80)),
    ],
)
def test_larger_masks_in_blocks(tmp_path: Path, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    labels = (random.random(stored) < 0.02).astype(np.uint8)
    labels[stored[0] // 3 : -stored[0] // 4] = 1
    mask = open_mask(write(tmp_path / "m.h5", labels, chunks=True, compression="gzip"), shape)
    expected = reference(labels, shape)
    for start in range(0, shape[0], 37):
        region = (slice(start, min(start + 37, shape[0])), *whole(shape[1:]))
        np.testing.assert_array_equal(read_mask(mask, region), expected[region])


def test_doubling_leaves_the_rim_out(tmp_path: Path) -> None:
    """The voxels of a doubled mask that lie half a voxel outside the centres of its outermost voxels are not inside."""
    labels = np.zeros((8, 8), np.uint8)
    labels[2:6, 2:6] = 1
    found = read_mask(open_mask(write(tmp_path / "m.h5", labels), (16, 16)), whole((16, 16)))
    expected = np.zeros((16, 16), np.uint8)
    expected[5:11, 5:11] = 1
    np.testing.assert_array_equal(found, expected)


def test_same_shape_is_read_as_it_is(tmp_path: Path) -> None:
    labels = np.random.default_rng(2).integers(0, 2, (9, 10, 11)).astype(np.int8)
    mask = pickle.loads(pickle.dumps(open_mask(write(tmp_path / "m.h5", labels), (9, 10, 11))))
    region = (slice(2, 7), slice(0, 10), slice(10, 11))
    np.testing.assert_array_equal(read_mask(mask, region), labels[region])


@pytest.mark.parametrize("dtype", ["bool", "float32", "int16", ">u2"])
def test_any_number_type(tmp_path: Path, dtype: str) -> None:
    labels = np.eye(6).astype(dtype)
    found = read_mask(open_mask(write(tmp_path / "m.h5", labels), (6, 6)), whole((6, 6)))
    np.testing.assert_array_equal(found, np.eye(6, dtype=np.uint8))


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [(2, "u1", (4, 4, 4)), (-1, "i1", (5, 4, 4)), (0.5, "f4", (4, 4, 4)), (255, "u1", (8, 8, 8))],
)
def test_other_values_are_refused(tmp_path: Path, value: float, dtype: str, shape: tuple[int, ...]) -> None:
    labels = np.zeros((4, 4, 4), dtype)
    labels[3, 3, 3] = value
    path = write(tmp_path / "m.h5", labels)
    with pytest.raises(MaskError, match=rf"m\.h5, dataset labels: .* only 0 .* and 1 .*; found {value:g}\. ."):
        read_mask(open_mask(path, shape), whole(shape))


def test_errors_name_the_file_and_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["probs"] = np.zeros(3)
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("labels")
    truncated = write(tmp_path / "cut.h5", np.zeros((64, 64, 64), np.uint8))
    truncated.write_bytes(truncated.read_bytes()[:5000])
    cases = {
        "missing.h5": "does not exist. Run the lamella prediction first",
        "text.h5": "must be a readable HDF5 file; found",
        "cut.h5": "must be a readable HDF5 file; found",
        "other.h5": "must hold the dataset labels; found probs",
        "group.h5": "must hold the dataset labels; found labels",
    }
    for name, message in cases.items():
        with pytest.raises(MaskError) as error:
            open_mask(tmp_path / name, (4, 4, 4))
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert message in str(error.value)


@pytest.mark.parametrize(
    "labels", [np.zeros((4, 4)), np.zeros((1, 4, 4, 4)), np.zeros((4, 0, 4)), np.full((4, 4, 4), b"a")]
)
def test_foreign_arrays_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    with pytest.raises(MaskError, match=r"with 3 axes.*; found shape \("):
        open_mask(write(tmp_path / "m.h5", labels), (4, 4, 4))


def test_a_mask_that_vanishes_after_opening(tmp_path: Path) -> None:
    mask = open_mask(write(tmp_path / "m.h5", np.zeros((4, 4), np.uint8)), (4, 4))
    mask.path.unlink()
    with pytest.raises(MaskError, match="does not exist"):
        read_mask(mask, whole((4, 4)))


@pytest.mark.parametrize(
    ("stored", "shape", "fits"),
    [
        ((18, 20, 20), (36, 40, 40), True),
        ((125, 240, 232), (500, 959, 927), True),  # binned by 4, and rounded
        ((501, 959, 927), (125, 239, 231), True),  # made before binning
        ((40, 64, 72), (40, 64, 72), True),
        ((40, 64, 72), (40, 72, 64), False),
        ((72, 64, 40), (40, 64, 72), False),
        ((100, 448, 448), (100, 464, 464), False),
    ],
)
def test_a_mask_of_other_proportions_is_refused(
    tmp_path: Path, stored: tuple[int, ...], shape: tuple[int, ...], fits: bool
) -> None:
    mask = Mask(tmp_path / "a_preds.h5", shape, stored)
    if fits:
        require_aspect(mask)
        return
    with pytest.raises(MaskError, match="proportions") as caught:
        require_aspect(mask)
    order = re.search(r"numpy.transpose\(labels, (\(.*?\))\)", str(caught.value))
    assert (order is not None) == (sorted(stored) == sorted(shape))
    if order is not None:
        axes = [int(n) for n in re.findall(r"\d", order[1])]
        assert tuple(stored[i] for i in axes) == shape
