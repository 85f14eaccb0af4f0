"""Lamella post-processing block by block against scikit-image on the whole array, voxel for voxel."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.filters import gaussian
from skimage.measure import label as skimage_label
from skimage.morphology import convex_hull_image

from cryosiam_dask.core.blocks import Blocks
from cryosiam_dask.core.executor import SERIAL
from cryosiam_dask.errors import LabelsError
from cryosiam_dask.stages import lamella as module
from cryosiam_dask.stages.lamella import (
    Thickness,
    count_columns,
    half_spaces,
    postprocess_lamella,
    stored_thickness,
    thickness_words,
)
from support.golden import expected


@pytest.fixture
def small_blocks(monkeypatch):
    """One chunk to a block, so that small volumes have many blocks and every halo crosses some."""
    monkeypatch.setattr(module, "_SMOOTHED_VOXELS", 1)
    monkeypatch.setattr("cryosiam_dask.core.blocks.BLOCK_VOXELS", 1)


def processed(probabilities, labels, threshold, hull, chunks, group=None, executor=SERIAL):
    group = zarr.group({}) if group is None else group
    lead = (1,) * (probabilities.ndim - 3)
    stored = group.create_array("probabilities", data=probabilities, chunks=lead + chunks)
    before = group.create_array("labels", data=labels, chunks=chunks)
    output = group.create_array("output", shape=labels.shape, chunks=chunks, dtype="uint8", fill_value=9)
    report = postprocess_lamella(stored, before, output, threshold=threshold, hull=hull, work=group, executor=executor)
    assert report.voxels == np.count_nonzero(output[:])
    return report, output[:]


def largest(probabilities, threshold):
    """The oracle's component, (z, y, x) bool."""
    above = gaussian(probabilities, (10, 5, 5), mode="constant") > threshold
    parts = skimage_label(above, connectivity=3)
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    return parts == np.argmax(sizes)


def slice_hulls(component, labels):
    result = labels.copy()
    for z in range(len(component)):
        if component[z].any():
            result[z] = convex_hull_image(component[z])
    return result


def probability_volume(shape, seed, sigma):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return ((smooth - smooth.min()) / max(np.ptp(smooth), 1e-9)).astype(np.float32)


@pytest.mark.parametrize("chunks", [(72, 88, 80), (32, 32, 32), (24, 40, 16), (7, 88, 33)])
def test_golden_case(chunks, small_blocks):
    golden = expected("lamella_then_semantic")
    component = golden["lamella_component"]
    for hull, name in (("slices", "lamella_slicewise"), ("volume", "lamella_3d")):
        report, output = processed(golden["lamella_probs"], golden["lamella_none"], 0.9, hull, chunks)
        np.testing.assert_array_equal(output, golden[name])
        touched = np.flatnonzero(component.any(axis=(1, 2)))
        assert report.found and report.component_voxels == component.sum()
        assert report.z_slices == (touched[0], touched[-1] + 1)


@given(
    shape=st.tuples(st.integers(3, 50), st.integers(3, 50), st.integers(3, 50)),
    chunks=st.tuples(st.integers(5, 50), st.integers(5, 50), st.integers(5, 50)),
    seed=st.integers(0, 2**32),
    sigma=st.floats(1, 9),
    quantile=st.floats(0.2, 0.99),
)
@settings(max_examples=15)
def test_equal_to_the_whole_array(shape, chunks, seed, sigma, quantile):
    probabilities = probability_volume(shape, seed, sigma)
    threshold = float(np.quantile(gaussian(probabilities, (10, 5, 5), mode="constant"), quantile))
    labels = (probabilities > threshold).astype(np.uint8)
    component = largest(probabilities, threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SMOOTHED_VOXELS", 1)
        patch.setattr("cryosiam_dask.core.blocks.BLOCK_VOXELS", 1)
        report, output = processed(probabilities, labels, threshold, "slices", chunks)
        np.testing.assert_array_equal(output, slice_hulls(component, labels))
        assert report.component_voxels == component.sum()
        if not all(np.ptp(axis) for axis in np.nonzero(component)):
            return  # flat: scikit-image gives up in three dimensions
        _, output = processed(probabilities, labels, threshold, "volume", chunks)
        np.testing.assert_array_equal(output, convex_hull_image(component))


@pytest.mark.parametrize("chunks", [(30, 25, 35), (13, 8, 35), (1, 24, 20)])
def test_smoothing_has_the_bits_of_the_whole_array(chunks):
    probabilities = probability_volume((30, 25, 35), seed=3, sigma=1)
    smooth = gaussian(probabilities, (10, 5, 5), mode="constant")
    blocks = Blocks.of(probabilities, chunks)
    output = np.empty(smooth.shape, dtype=np.uint8)
    for voxel in [(0, 0, 0), (15, 12, 17), (29, 3, 34), (12, 24, 20), (13, 8, 8)]:
        # The very value of a voxel as the threshold: one unit in the last place would show.
        for threshold in (smooth[voxel], np.nextafter(smooth[voxel], np.float32(0))):
            for index in blocks.indices:
                module._threshold_block(
                    index,
                    probabilities=probabilities,
                    output=output,
                    blocks=blocks,
                    threshold=threshold,
                    array_module="numpy",
                )
            np.testing.assert_array_equal(output, smooth > threshold)


def test_workers_give_the_same_bytes(tmp_path, small_blocks):
    golden = expected("lamella_then_semantic")

    class Processes:
        def map(self, function, items, *, name):
            return list(pool.map(function, items))

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        _, output = processed(
            golden["lamella_probs"],
            golden["lamella_none"],
            0.9,
            "slices",
            (40, 40, 40),
            zarr.open_group(tmp_path / "work.zarr", mode="w"),
            Processes(),
        )
    np.testing.assert_array_equal(output, golden["lamella_slicewise"])


def test_started_again_in_the_same_work_group():
    golden = expected("lamella_then_semantic")
    group = zarr.group({})
    processed(golden["lamella_probs"][:, ::-1], golden["lamella_none"], 0.9, "slices", (40, 40, 40), group)
    group["output"][:] = 9
    postprocess_lamella(
        golden["lamella_probs"], group["labels"], group["output"], threshold=0.9, hull="slices", work=group
    )
    np.testing.assert_array_equal(group["output"][:], golden["lamella_slicewise"])


@pytest.mark.parametrize("hull", ["slices", "volume"])
def test_nothing_above_the_threshold_leaves_the_labels(hull, small_blocks):
    probabilities = probability_volume((2, 20, 25, 30), seed=1, sigma=2)
    labels = (probabilities[0] > 0.8).astype(np.uint8)
    report, output = processed(probabilities, labels, 0.99, hull, (8, 8, 8))
    assert not report.found and report.component_voxels == 0
    np.testing.assert_array_equal(output, labels)
    assert not processed(0 * probabilities, labels, 0.0, hull, (8, 8, 8))[0].found


def test_only_class_0_counts_and_slices_not_touched_keep_their_labels(small_blocks):
    probabilities = np.zeros((2, 50, 30, 30), dtype=np.float32)
    probabilities[0, 25:, 8:22, 5:25] = 1
    probabilities[1] = 1
    labels = np.zeros((50, 30, 30), dtype=np.uint8)
    labels[:, 3, 3] = 1
    report, output = processed(probabilities, labels, 0.5, "slices", (16, 16, 16))
    first, last = report.z_slices
    assert 0 < first < last <= 50
    np.testing.assert_array_equal(output[:first], labels[:first])
    np.testing.assert_array_equal(output[last:], labels[last:])
    assert not output[first:last, 3, 3].any()


@pytest.mark.parametrize(
    ("voxels", "hull_voxels"),
    [
        ([[3, 4]], [[3, 4]]),
        ([[0, 0], [0, 4]], [[0, x] for x in range(5)]),
        ([[0, 0], [3, 3]], [[i, i] for i in range(4)]),
        ([[0, 0], [1, 2]], [[0, 0], [0, 1], [1, 1], [1, 2]]),
        ([[2, 3, 4]], [[2, 3, 4]]),
        ([[0, 0, 0], [0, 0, 3]], [[0, 0, x] for x in range(4)]),
        ([[1, 0, 0], [1, 0, 2], [1, 2, 0]], [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 2, 0]]),
    ],
)
def test_flat_bodies_have_hulls(voxels, hull_voxels):
    assert filled(np.array(voxels), (6,) * len(voxels[0])).tolist() == hull_voxels


def filled(voxels, shape):
    """The voxels of a volume in the hull of some."""
    lines = np.argwhere(np.ones(shape[:-1], dtype=bool))
    inside = module._inside(half_spaces(voxels), lines, slice(0, shape[-1]))
    return np.argwhere(inside.reshape(shape))


@given(st.integers(0, 2**32), st.integers(2, 3), st.integers(4, 40))
def test_hulls_of_random_voxels(seed, axes, count):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 24 if axes == 3 else 60, axes))
    image = np.zeros(shape, dtype=bool)
    image[tuple(rng.integers(0, shape, (count, axes)).T)] = True
    voxels = np.argwhere(image)
    if axes == 3 and np.linalg.matrix_rank(voxels - voxels[0]) < 3:
        return
    np.testing.assert_array_equal(filled(voxels, shape), np.argwhere(convex_hull_image(image)))


@pytest.mark.parametrize(
    ("probabilities", "labels", "output", "message"),
    [
        ((1, 9, 9), (9, 9), (9, 9), r"needs \(z, y, x\) labels.*labels \(9, 9\).*postprocessing to False for 2-D"),
        ((1, 9, 9, 8), (9, 9, 9), (9, 9, 9), r"of the same shape.*probabilities \(1, 9, 9, 8\)"),
        ((9, 9, 9), (9, 9, 9), (9, 9, 8), r"the output must have the shape of its input, \(9, 9, 9\)"),
    ],
)
def test_bad_input_is_refused_in_words(probabilities, labels, output, message):
    group = zarr.group({})
    arrays = [
        group.create_array(name, shape=shape, chunks=(4,) * len(shape), dtype=dtype)
        for name, shape, dtype in (("p", probabilities, "f4"), ("l", labels, "u1"), ("o", output, "u1"))
    ]
    with pytest.raises(LabelsError, match=message):
        postprocess_lamella(*arrays, threshold=0.5, hull="slices", work=group)
    assert sorted(group) == ["l", "o", "p"]


# ------------------------------------------------------------------------------------------------------------ thickness


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3), chunks=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 99),
    density=st.floats(0, 1),
)  # fmt: skip
def test_the_thickness_is_that_of_the_whole_volume(
    shape: tuple[int, int, int], chunks: tuple[int, int, int], seed: int, density: float
) -> None:
    labels = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    stored = zarr.create_array({}, shape=shape, chunks=chunks, dtype="u1")
    stored[:] = labels
    voxels, columns = count_columns(stored)
    assert voxels.tolist() == np.bincount(labels.ravel(), minlength=256).tolist()
    held = np.count_nonzero(labels, axis=0)
    held = held[held > 0]
    found = Thickness.of(columns)
    if not held.size:
        assert found is None
    else:
        assert found == Thickness(pytest.approx(held.mean()), held.min(), held.max())


def test_thickness_in_attributes() -> None:
    assert stored_thickness({"thickness_voxels": [50.0, 7, 57], "voxel_size_angstrom": [20, 10, 10]}) == {
        "mean": 100.0, "lowest": 14.0, "highest": 114.0, "unit": "nm",
    }  # fmt: skip
    for size in (None, [None, 10, 10], "ten", 10.0):
        found = stored_thickness({"thickness_voxels": [50.5, 7, 57], "voxel_size_angstrom": size})
        assert thickness_words(found) == "mean thickness 50.5 voxels (7 to 57)"
    for odd in (None, 5, [1, 2], ["a", "b", "c"]):
        assert stored_thickness({"thickness_voxels": odd}) == {}
