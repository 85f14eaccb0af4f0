"""Phantoms are reproducible, show what their truth says, and have the missing wedge they claim."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cryosiam_dask.core.phantom import CLASS_NAMES, HOT, SHAPE, Phantom, dice, make_phantom, make_raw, write_phantom
from cryosiam_dask.model.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(3)


def test_same_seed_same_phantom_other_seed_another(phantom: Phantom) -> None:
    again, other = make_phantom(3), make_phantom(4)
    for name in ("tomogram", "truth", "lamella"):
        assert np.array_equal(getattr(phantom, name), getattr(again, name))
        assert not np.array_equal(getattr(phantom, name), getattr(other, name))


@pytest.mark.parametrize("shape", [SHAPE, (70, 64, 96)])
def test_shape_types_and_range(shape: tuple[int, int, int]) -> None:
    phantom = make_phantom(5, shape)
    assert phantom.tomogram.shape == phantom.truth.shape == phantom.lamella.shape == shape
    assert (phantom.tomogram.dtype, phantom.truth.dtype, phantom.lamella.dtype) == (np.float32, np.uint8, np.uint8)
    assert phantom.tomogram.min() >= 0 and phantom.tomogram.max() <= 1
    # min: 0 and max: 1 of the configuration cut nothing off that matters.
    assert np.mean((phantom.tomogram == 0) | (phantom.tomogram == 1)) < 0.02


def test_every_class_is_there_and_only_inside_the_lamella(phantom: Phantom) -> None:
    voxels = np.bincount(phantom.truth.ravel(), minlength=len(CLASS_NAMES))
    assert len(voxels) == len(CLASS_NAMES)
    assert (voxels > 2000).all()
    assert set(np.unique(phantom.lamella)) == {0, 1}
    assert not phantom.truth[phantom.lamella == 0].any()


def test_lamella_is_a_tilted_slab_with_vacuum_on_both_sides(phantom: Phantom) -> None:
    """Its middle is a plane that slopes, its thickness is everywhere the same."""
    thickness = phantom.lamella.sum(axis=0)
    assert thickness.min() >= 49 and np.ptp(thickness) <= 1
    assert not phantom.lamella[0].any() and not phantom.lamella[-1].any()
    middle = np.argmax(phantom.lamella, axis=0) + thickness / 2
    y, x = np.indices(middle.shape)
    plane = np.stack([np.ones(middle.size), y.ravel(), x.ravel()], axis=1)
    fit, *_ = np.linalg.lstsq(plane, middle.ravel())
    assert np.abs(plane @ fit - middle.ravel()).max() <= 1.01
    assert (np.abs(fit[1:]) > 0.02).all() and (np.abs(fit[1:]) < 0.1).all()


def test_structures_are_brighter_than_what_surrounds_them(phantom: Phantom) -> None:
    means = [phantom.tomogram[(phantom.truth == n) & (phantom.lamella == 1)].mean() for n in range(len(CLASS_NAMES))]
    assert all(mean > means[0] + 0.03 for mean in means[1:])
    # What tells the lamella from the noise is its texture.
    background = phantom.truth == 0
    inside, outside = (phantom.tomogram[background & (phantom.lamella == n)].std() for n in (1, 0))
    assert inside > 1.3 * outside


@pytest.mark.parametrize("raw", [False, True])
def test_the_wedge_is_missing(phantom: Phantom, raw: bool) -> None:
    """Seen along y, hardly any power, of noise too, lies more than 60° from the plane of zero tilt."""
    voxels = np.clip(make_raw(phantom, 3), -5000, 5000).astype(np.float32) if raw else phantom.tomogram
    windows = [np.hanning(s).astype(np.float32) for s in voxels.shape]
    cut = voxels - voxels.mean()
    for axis, window in enumerate(windows):
        cut = cut * np.moveaxis(window[:, None, None], 0, axis)
    power = np.abs(np.fft.fftn(cut)) ** 2
    kz, _, kx = np.meshgrid(*(np.fft.fftfreq(s) for s in cut.shape), indexing="ij")
    angle = np.degrees(np.arctan2(np.abs(kz), np.abs(kx)))
    beyond_low_frequencies = np.hypot(kz, kx) > 0.05
    wedge, rest = (power[beyond_low_frequencies & part].mean() for part in (angle > 63, angle < 57))
    assert wedge < 0.02 * rest


def test_a_raw_phantom_is_noisy_and_dark_on_bright(phantom: Phantom) -> None:
    raw = make_raw(phantom, 3)
    assert raw.shape == phantom.tomogram.shape and raw.dtype == np.int16
    assert np.array_equal(raw, make_raw(phantom, 3)) and not np.array_equal(raw, make_raw(phantom, 4))
    hot = np.abs(raw) == 30000
    assert 0 < np.mean(hot) < 3 * HOT
    similarity = np.corrcoef(raw[~hot], phantom.tomogram[~hot])[0, 1]
    assert -0.6 < similarity < -0.2


def test_written_files_hold_the_phantom(tmp_path: Path, phantom: Phantom) -> None:
    path = write_phantom(phantom, tmp_path, "p_1.5", seed=3)
    assert path == tmp_path / "p_1.5.mrc"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p_1.5.mrc", "p_1.5_truth.npz"]
    assert mrcfile.validate(path)
    with mrcfile.open(path) as mrc:
        assert np.array_equal(mrc.data, make_raw(phantom, 3))
        assert mrc.is_volume()
        assert mrc.voxel_size.tolist() == (14.0, 14.0, 14.0)
    with np.load(tmp_path / "p_1.5_truth.npz") as truth:
        assert np.array_equal(truth["labels"], phantom.truth)
        assert np.array_equal(truth["lamella"], phantom.lamella)


def test_dice_of_a_known_overlap() -> None:
    truth = np.array([0, 0, 1, 1, 1, 2], np.uint8)
    prediction = np.array([0, 1, 1, 1, 0, 0], np.uint8)
    assert dice(prediction, truth, 4) == (2 * 1 / 5, 2 * 2 / 6, 0.0, 1.0)


@given(arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3)), arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3)))
def test_dice_against_the_definition(prediction: np.ndarray, truth: np.ndarray) -> None:
    for label, score in enumerate(dice(prediction, truth, 4)):
        a, b = prediction == label, truth == label
        assert score == (2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1)


def test_the_models_of_the_demo_ship_with_the_package() -> None:
    models = files("cryosiam_dask") / "data" / "models"
    classes = {"demo_lamella.ckpt": 1, "demo_semantic.ckpt": len(CLASS_NAMES)}
    with as_file(models) as folder:
        assert sum((folder / name).stat().st_size for name in classes) < 1_000_000
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
        assert read_checkpoint(folder / "demo_denoise.ckpt").architecture.denoises
        for name, count in classes.items():
            checkpoint = read_checkpoint(folder / name)
            assert checkpoint.architecture.out_channels == count
            # The widths that CryoSiam's own program builds.
            assert checkpoint.architecture.semantic_widths == checkpoint.architecture.distance_widths == (32, 64)
