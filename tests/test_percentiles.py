"""Percentiles are those of NumPy on the whole array, whatever the dtype and however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cryosiam_dask.core.percentiles import percentiles

#: Of real numbers that a tomogram's file may hold.
DTYPES = [
    "<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "?", "i1", "u1", "<i2", ">i2", "<u2", ">u2", "<i4", "<u4", "<i8", "<u8"
]  # fmt: skip


@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=2, max_dims=3, max_side=7))
    ),
    st.lists(st.floats(0, 100), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_as_numpy_has_them(volume: np.ndarray, percents: list[float], step: int) -> None:
    with np.errstate(over="ignore"):
        numbers = volume.astype(np.float32)
    known = numbers[~np.isnan(numbers)].astype(np.float64)
    regions = [(slice(z, z + step), *[slice(None)] * (volume.ndim - 1)) for z in range(0, len(volume), step)]
    found = percentiles(lambda region: volume[region], regions, percents)
    if not known.size:
        assert np.isnan(found).all()
        return
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.percentile(known, percents)
    if np.isfinite(known).all():  # between infinities NumPy finds no number
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
    else:
        finite = np.isfinite(expected)
        np.testing.assert_allclose(np.array(found)[finite], expected[finite], rtol=1e-12, atol=0)


@pytest.mark.parametrize("percent", [0, 0.1, 50, 99.9, 100])
def test_a_large_volume_with_many_equal_voxels(percent: float) -> None:
    rng = np.random.default_rng(0)
    volume = np.round(rng.normal(size=(40, 50, 60)), 2).astype(np.float32)
    regions = [(slice(z, z + 7), slice(None), slice(x, x + 11)) for z in range(0, 40, 7) for x in range(0, 60, 11)]
    (found,) = percentiles(lambda region: volume[region], regions, [percent])
    assert found == pytest.approx(np.percentile(volume.astype(np.float64), percent), rel=1e-12)
