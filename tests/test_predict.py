"""Predictions of whole tomograms: against what CryoSiam wrote, and the same bytes whichever way they are computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import dask
import dask.array as da
import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cryosiam_dask.core.grid import Patch, make_grid
from cryosiam_dask.errors import ConfigurationError
from cryosiam_dask.files.mask import open_mask
from cryosiam_dask.model.checkpoint import read_checkpoint
from cryosiam_dask.model.predictor import PredictorSpec, load_predictor, normalise
from cryosiam_dask.stages.ingest import ingest
from cryosiam_dask.stages.predict import (
    StoredPrediction,
    create_outputs,
    labels_of,
    predict,
    predict_store,
    predict_stored_block,
)
from support import golden

NAMES = ("labels", "probabilities", "distances")


def specification(case: str, batch_size: int = 2) -> PredictorSpec:
    path = golden.FOLDER / case / "model.ckpt"
    checkpoint, parameters = read_checkpoint(path), golden.configuration(case)["parameters"]
    data = parameters["data"]
    return PredictorSpec(
        checkpoint=str(path),
        sha256=checkpoint.sha256,
        device="cpu",
        patch=checkpoint.patch_size,
        classes=checkpoint.architecture.out_channels,
        batch_size=batch_size,
        minimum=data["min"],
        maximum=data["max"],
        mean=data["mean"],
        std=data["std"],
        threshold=parameters["network"]["threshold"],
    )


def stored(
    case: str, store: zarr.storage.MemoryStore, block_size: int, batch_size: int = 2, halo: int = 0
) -> StoredPrediction:
    (source,) = (golden.FOLDER / case / "data").iterdir()
    tomogram, _ = ingest(source, store, chunks=(13,) * len(golden.expected(case)["labels"].shape))
    spec = replace(specification(case, batch_size), halo=halo)
    grid = make_grid(tomogram.shape, spec.patch, block_size, halo)
    mask = golden.FOLDER / case / "mask" / "tomo_preds.h5"
    return StoredPrediction(
        spec,
        grid,
        tomogram,
        create_outputs(zarr.open_group(store), grid, spec.classes, NAMES),
        open_mask(mask, tomogram.shape) if mask.exists() else None,
    )


def predicted(case: str, block_size: int, batch_size: int = 2, halo: int = 0) -> dict[str, np.ndarray]:
    prediction = stored(case, zarr.storage.MemoryStore(), block_size, batch_size, halo)
    predict_store(prediction)
    return {name: array[:] for name, array in prediction.outputs.items()}


@pytest.mark.parametrize("case", golden.CASES)
def test_equals_cryosiam(case: str) -> None:
    expected = golden.expected(case)
    found = predicted(case, block_size=1)
    np.testing.assert_allclose(found["probabilities"], expected["probs"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["distances"], expected["distances"], atol=1e-4, rtol=0)
    if len(expected["probs"]) == 1:
        undecided = np.abs(expected["probs"][0] - specification(case).threshold) < 1e-4
    else:
        best = np.sort(expected["probs"], axis=0)
        undecided = (best[-1] - best[-2] < 1e-4) & (best[-1] > 0)  # outside a mask everything is 0
    assert undecided.mean() < 1e-3
    np.testing.assert_array_equal(found["labels"][~undecided], expected["labels"][~undecided])


@pytest.mark.parametrize("case", ["high_threshold", "smaller_than_patch", "two_dimensional", "masked_other_shape"])
def test_bytes_depend_neither_on_blocks_nor_on_batches(case: str) -> None:
    expected = predicted(case, block_size=10_000, batch_size=1)
    for block_size, batch_size in ((1, 7), (40, 2)):
        found = predicted(case, block_size, batch_size)
        for name in NAMES:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("case", ["high_threshold", "one_class", "smaller_than_patch", "two_dimensional"])
def test_map_overlap_gives_the_same_bytes_as_stored_blocks(case: str) -> None:
    expected = predicted(case, block_size=1)
    prediction = stored(case, zarr.storage.MemoryStore(), 1)
    spec = prediction.spec
    tomogram = da.from_array(prediction.tomogram[:], chunks=17)
    lazy = predict(tomogram, spec, outputs=NAMES, block_size=1)
    labels = predict(tomogram, spec, block_size=30)["labels"]
    distances = predict(tomogram, spec, outputs=("distances",), block_size=30)["distances"]
    assert {name: values.dtype for name, values in lazy.items()} == {
        "labels": np.uint8, "probabilities": np.float32, "distances": np.float32,
    }  # fmt: skip
    found, labels, distances = dask.compute(lazy, labels, distances, scheduler="synchronous")
    for name in NAMES:
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_array_equal(labels, expected["labels"])
    np.testing.assert_array_equal(distances, expected["distances"])


@pytest.mark.parametrize("halo", [3, 5])
def test_another_halo_gives_the_values_of_its_patches(halo: int) -> None:
    found = predicted("high_threshold", 1, halo=halo)
    prediction = stored("high_threshold", zarr.storage.MemoryStore(), 1, halo=halo)
    spec, axes = prediction.spec, [a.axis for a in prediction.grid.axes]
    assert min(a.count for a in axes) > 1
    voxels = normalise(prediction.tomogram[:], spec)
    whole = tuple(slice(0, p) for p in spec.patch)
    for numbers in product(*(range(a.count) for a in axes)):
        starts = [a.start(n) for a, n in zip(axes, numbers, strict=True)]
        # The tomogram goes on from its beginning behind its end.
        window = np.take(voxels, np.arange(starts[0], starts[0] + spec.patch[0]), 0, mode="wrap")
        window = np.take(window, np.arange(starts[1], starts[1] + spec.patch[1]), 1, mode="wrap")
        window = np.take(window, np.arange(starts[2], starts[2] + spec.patch[2]), 2, mode="wrap")
        patch, _ = load_predictor(spec).predict_block(window, [Patch(whole, whole, whole)], spec.patch, NAMES)
        cores = [a.core(n) for a, n in zip(axes, numbers, strict=True)]
        target = tuple(slice(*core) for core in cores)
        core = tuple(slice(a - s, b - s) for (a, b), s in zip(cores, starts, strict=True))
        np.testing.assert_allclose(
            found["probabilities"][(..., *target)], patch["probabilities"][(..., *core)], rtol=0, atol=1e-6
        )
        np.testing.assert_array_equal(found["labels"][target], patch["labels"][core])
    other = predicted("high_threshold", 40, 3, halo)
    for name in NAMES:
        np.testing.assert_array_equal(other[name], found[name])
    tomogram = da.from_array(prediction.tomogram[:], chunks=17)
    for block_size in (1, 30):
        (labels,) = dask.compute(predict(tomogram, spec, block_size=block_size)["labels"], scheduler="synchronous")
        np.testing.assert_array_equal(labels, found["labels"])


def test_mask_of_a_dask_array() -> None:
    prediction = stored("masked", zarr.storage.MemoryStore(), 1)
    predict_store(prediction)
    mask = da.from_array(np.asarray(golden.expected("masked")["labels"] > 0), chunks=11)
    tomogram = da.from_zarr(prediction.tomogram)
    found = predict(tomogram, prediction.spec, outputs=("labels", "probabilities"), mask=mask, block_size=1)
    labels, probabilities = dask.compute(found["labels"], found["probabilities"], scheduler="synchronous")
    np.testing.assert_array_equal(labels, prediction.outputs["labels"][:] * mask.compute())
    assert (probabilities[:, ~mask.compute()] == 0).all()


def test_block_outside_the_mask_reads_and_writes_nothing(tmp_path: Path) -> None:
    prediction = stored("high_threshold", zarr.storage.MemoryStore(), 1)
    mask = np.zeros(prediction.grid.shape, np.uint8)
    inside = prediction.grid.block((1, 1, 1)).region
    mask[inside] = 1
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["labels"] = mask
    # A tomogram that raises wherever it is read shows that skipped blocks leave it alone.
    unreadable = StoredPrediction(
        prediction.spec, prediction.grid, None, prediction.outputs, open_mask(tmp_path / "m.h5", mask.shape)
    )
    assert not predict_stored_block(unreadable, (0, 0, 0))
    with pytest.raises(TypeError):
        predict_stored_block(unreadable, (1, 1, 1))
    masked = StoredPrediction(
        prediction.spec, prediction.grid, prediction.tomogram, prediction.outputs, unreadable.mask
    )
    (times,) = predict_store(masked)
    steps = (*times.read, *times.compute, *times.write)
    assert list(steps) == sorted(steps)
    expected = predicted("high_threshold", 1)
    assert times.inside == np.count_nonzero(mask)
    np.testing.assert_array_equal(times.highest, expected["probabilities"][(..., *inside)].max(axis=(1, 2, 3)))
    for name in NAMES:
        np.testing.assert_array_equal(prediction.outputs[name][:], expected[name] * mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_count_as_the_minimum(bad: float) -> None:
    prediction = stored("high_threshold", zarr.storage.MemoryStore(), 10_000)
    voxels = prediction.tomogram[:]
    holes = np.random.default_rng(0).random(voxels.shape) < 0.01
    found, expected = (
        predict(da.from_array(np.where(holes, value, voxels)), prediction.spec, outputs=("probabilities",))
        for value in (bad, prediction.spec.minimum)
    )
    found, expected = dask.compute(found, expected, scheduler="synchronous")
    np.testing.assert_array_equal(found["probabilities"], expected["probabilities"])


def test_patch_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="as many axes as the tomogram, which has 2"):
        predict(da.zeros((64, 64)), specification("fpn_bottleneck"))


@given(st.integers(2, 6), st.floats(0, 1, width=32), st.integers(0, 2**32 - 1))
def test_labels_follow_from_probabilities(classes: int, threshold: float, seed: int) -> None:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(classes), 50).T.astype(np.float32)
    found = labels_of(probabilities, threshold)
    for column, label in zip(probabilities.T, found, strict=True):
        kept = [value if value >= np.float32(threshold) else 0 for value in column]
        assert label == kept.index(max(kept))
    one = labels_of(probabilities[:1], threshold)
    np.testing.assert_array_equal(one, probabilities[0] > np.float32(threshold))
