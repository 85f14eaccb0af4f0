"""Predictions: equal to CryoSiam's, and the same bytes however patches are grouped."""

import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from itertools import product

import h5py
import mrcfile
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.transform import resize

from cryosiam_dask.core.grid import Patch
from cryosiam_dask.errors import CheckpointError, DeviceError, LostDeviceError
from cryosiam_dask.model.architecture import peak_bytes
from cryosiam_dask.model.checkpoint import read_checkpoint
from cryosiam_dask.model.predictor import (
    Predictor,
    PredictorSpec,
    largest_patch,
    load_predictor,
    normalise,
    predictor_spec,
)
from support import checkpoints, golden
from support.checkpoints import SMALL

EVERYTHING = ("labels", "probabilities", "distances")


def make_spec(path, **changes) -> PredictorSpec:
    checkpoint = read_checkpoint(path)
    spec = PredictorSpec(
        checkpoint=str(path),
        sha256=checkpoint.sha256,
        device="cpu",
        patch=checkpoint.patch_size,
        classes=checkpoint.architecture.out_channels,
        batch_size=2,
        minimum=0,
        maximum=1,
        mean=0,
        std=1,
        threshold=0.1,
    )
    return replace(spec, **changes)


def golden_spec(case, model="model.ckpt", yaml="config.yaml") -> PredictorSpec:
    parameters = golden.configuration(case, yaml)["parameters"]
    data = parameters["data"]
    return make_spec(
        golden.FOLDER / case / model,
        patch=tuple(data["patch_size"]),
        minimum=data["min"],
        maximum=data["max"],
        mean=data["mean"],
        std=data["std"],
        threshold=parameters["network"]["threshold"],
    )


def predict_patches(predictor, patches, wanted, core=None):
    """The network on patches (n, z, y, x), laid one behind the other along z; outputs begin with the axis n."""
    count, *patch = patches.shape
    core = core or tuple(slice(0, size) for size in patch)
    kept = [part.stop - part.start for part in core]

    def behind(i, sizes):
        return (slice(i * sizes[0], (i + 1) * sizes[0]), *(slice(0, size) for size in sizes[1:]))

    tiles = [Patch(behind(i, patch), core, behind(i, kept)) for i in range(count)]
    window = patches.reshape(count * patch[0], *patch[1:])
    result, (began, ended) = predictor.predict_block(window, tiles, (count * kept[0], *kept[1:]), wanted)
    assert began <= ended
    return {
        name: np.moveaxis(values.reshape(*values.shape[: -len(kept)], count, *kept), -len(kept) - 1, 0)
        for name, values in result.items()
    }


def sliding_window(voxels, spec, every=1, mask=1):
    """CryoSiam's sliding window, voxel by voxel; with `every` only each so many patches.

    Returns the outputs, multiplied by the mask, and which voxels were predicted.
    """
    predictor = load_predictor(spec)
    padded = np.zeros([max(s, p) for s, p in zip(voxels.shape, spec.patch, strict=True)], np.float32)
    padded[tuple(slice(s) for s in voxels.shape)] = normalise(voxels, spec)
    kept = {
        name: np.zeros((() if name == "labels" else (spec.classes,)) + padded.shape, np.float32) for name in EVERYTHING
    }
    done = np.zeros(padded.shape, bool)
    axes = [
        [start for start in range(0, size, p // 2) if start < size - p // 4]
        for size, p in zip(padded.shape, spec.patch, strict=True)
    ]
    for start in list(product(*axes))[::every]:
        seen = np.ix_(*[(np.arange(p) + s) % n for s, p, n in zip(start, spec.patch, padded.shape, strict=True)])
        result = predict_patches(predictor, padded[seen][None], EVERYTHING)
        core, target = [], []
        for s, p, n, starts in zip(start, spec.patch, padded.shape, axes, strict=True):
            first = 0 if s == 0 else p // 4
            last = n - s if s == starts[-1] else 3 * p // 4
            core.append(slice(first, last))
            target.append(slice(s + first, s + last))
        for name, values in kept.items():
            values[(..., *target)] = result[name][0][(..., *core)]
        done[tuple(target)] = True
    crop = (..., *(slice(s) for s in voxels.shape))
    return {name: values[crop] * mask for name, values in kept.items()}, done[crop]


def undecided(probabilities, threshold):
    """Voxels whose label may flip: the two best values, of which none counts below the threshold, are within 1e-4."""
    near = (np.abs(probabilities - threshold) < 1e-4).any(0)
    if len(probabilities) > 1:
        best = np.sort(probabilities, axis=0)
        near |= best[-1] - best[-2] < 1e-4
    return near


def read_mask(case, shape):
    with h5py.File(golden.FOLDER / case / "mask" / "tomo_preds.h5") as file:
        mask = file["labels"][:].astype(np.int8)
    if mask.shape != shape:
        mask = resize(mask, shape, mode="constant", preserve_range=True).astype(np.int8)
    return mask


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", golden.CASES)
def test_predictions_equal_those_of_cryosiam(case, device):
    expected, spec = golden.expected(case), replace(golden_spec(case), device=device)
    voxels = mrcfile.read(golden.FOLDER / case / "data" / "tomo.mrc")
    mask = read_mask(case, voxels.shape) if case.startswith("masked") else np.ones(voxels.shape, np.int8)
    # Of the larger volumes every third patch, which takes in all positions along every axis.
    result, done = sliding_window(voxels, spec, every=1 if voxels.size < 30_000 else 3, mask=mask)
    assert done.mean() > 0.3
    np.testing.assert_allclose(result["probabilities"][:, done], expected["probs"][:, done], rtol=0, atol=1e-4)
    np.testing.assert_allclose(result["distances"][:, done], expected["distances"][:, done], rtol=1e-3, atol=1e-4)
    sure = done & ~(undecided(result["probabilities"], spec.threshold) & (mask > 0))
    assert sure.sum() > 0.99 * done.sum()
    np.testing.assert_array_equal(result["labels"][sure], expected["labels"][sure])


@pytest.mark.parametrize(
    "model, yaml, labels, probabilities, tolerance",
    [
        ("lamella.ckpt", "config_lamella_none.yaml", "lamella_none", "lamella_probs", 1e-4),
        ("semantic.ckpt", "config_semantic.yaml", "semantic_before_sizes", "semantic_probs", 1e-3),  # kept as float16
    ],
)
def test_predictions_equal_those_of_cryosiam_in_the_main_job(model, yaml, labels, probabilities, tolerance):
    case = "lamella_then_semantic"
    expected, spec = golden.expected(case), golden_spec(case, model, yaml)
    voxels = mrcfile.read(golden.FOLDER / case / "data" / "TS_a_6.80Apx.mrc")
    mask = expected["lamella_slicewise"] if model == "semantic.ckpt" else np.ones(voxels.shape, np.uint8)
    result, done = sliding_window(voxels, spec, every=11, mask=mask)
    assert done.mean() > 0.05
    np.testing.assert_allclose(
        result["probabilities"][:, done], expected[probabilities][:, done], rtol=0, atol=tolerance
    )
    sure = done & ~(undecided(result["probabilities"], spec.threshold) & (mask > 0))
    assert sure.sum() > 0.99 * done.sum()
    np.testing.assert_array_equal(result["labels"][sure], expected[labels][sure])


BLANK = PredictorSpec("", "", "cpu", (16, 16, 16), 3, 2, 0, 1, 0, 1, 0.1)
intensities = st.floats(-1e4, 1e4, width=32)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=intensities),
    st.sampled_from(["<f4", ">f4", "f8", "<i2", ">i2"]),
    intensities,
    st.floats(0.125, 1e4, width=32),
    st.floats(-2, 2, width=32),
    st.floats(0.125, 8, width=32),
)
def test_intensities_are_clipped_and_scaled(voxels, dtype, minimum, width, mean, std):
    """As CryoSiam's transforms do: [min, max] becomes [0, 1], clipped, then the mean is subtracted, by std divided."""
    voxels = voxels.astype(dtype)
    before = voxels.copy()
    scaled = normalise(voxels, replace(BLANK, minimum=minimum, maximum=minimum + width, mean=mean, std=std))
    within = np.clip((voxels.astype(np.float64) - minimum) / width, 0, 1)
    np.testing.assert_allclose(scaled, (within - mean) / std, rtol=1e-5, atol=1e-5)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(voxels, before)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "f4"])
def test_inverted_intensities_are_those_of_the_mirrored_tomogram(tmp_path, dtype):
    """Mirrored at the middle of the range: v becomes min + max - v."""
    voxels = np.arange(-20, 60, dtype=dtype) if dtype[0] != "u" else np.arange(80, dtype=dtype)
    mirrored = (10 + 40 - voxels.astype(int)).astype("f4")
    path = checkpoints.write(tmp_path / "model.ckpt", seed=1)
    options = {"minimum": 10, "maximum": 40, "mean": 0.3, "std": 0.7, "device": "cpu"}
    as_it_is, inverted = predictor_spec(path, **options), predictor_spec(path, **options, invert=True)
    np.testing.assert_array_equal(normalise(voxels, inverted), normalise(mirrored, as_it_is))
    np.testing.assert_array_equal(normalise(np.array([np.nan, 99]), inverted), normalise(np.zeros(2), as_it_is))


def test_voxels_that_are_no_numbers_count_as_the_minimum():
    voxels = np.array([np.nan, np.inf, -np.inf, 1e300, -3e38, 3e38, 5, 15])
    spec = replace(BLANK, minimum=5, maximum=25, mean=0.25, std=0.5)
    np.testing.assert_array_equal(normalise(voxels, spec), [-0.5, -0.5, -0.5, -0.5, -0.5, 1.5, -0.5, 0.5])


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> PredictorSpec:
    return make_spec(checkpoints.write(tmp_path_factory.mktemp("model") / "model.ckpt"))


def some_patches(count, spec, seed=0):
    return np.random.default_rng(seed).random((count, *spec.patch), np.float32)


@pytest.mark.parametrize("decoder", ["fpn", "bifpn"])
def test_bytes_do_not_depend_on_batches_or_threads(tmp_path, decoder):
    architecture = replace(SMALL, decoder=decoder, bifpn_layers=2 * (decoder == "bifpn"))
    spec = make_spec(checkpoints.write(tmp_path / "model.ckpt", architecture))
    patches = some_patches(5, spec)
    expected = predict_patches(load_predictor(spec), patches, EVERYTHING)
    threads = torch.get_num_threads()
    try:
        for batch_size, number in product((1, 2, 3, 8), (1, 2)):
            torch.set_num_threads(number)
            predictor = load_predictor(replace(spec, batch_size=batch_size))
            whole = predict_patches(predictor, patches, EVERYTHING)
            single = [predict_patches(predictor, patches[[i]], EVERYTHING) for i in (4, 2, 0, 3, 1)]
            for name, values in expected.items():
                np.testing.assert_array_equal(whole[name], values)
                np.testing.assert_array_equal(np.concatenate([part[name] for part in single])[[2, 4, 1, 3, 0]], values)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0, 0.1, 0.5, 0.9, 1])
def test_labels_follow_from_probabilities(tmp_path, classes, threshold):
    path = checkpoints.write(tmp_path / "model.ckpt", replace(SMALL, out_channels=classes))
    spec = make_spec(path, threshold=threshold)
    result = predict_patches(load_predictor(spec), some_patches(2, spec), EVERYTHING)
    probabilities = result["probabilities"]
    assert result["labels"].shape == (2, *spec.patch) and result["labels"].dtype == np.uint8
    assert probabilities.shape == result["distances"].shape == (2, classes, *spec.patch)
    assert probabilities.dtype == result["distances"].dtype == np.float32
    if classes == 1:
        expected = probabilities[:, 0] > np.float32(threshold)
    else:
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
        expected = np.where(probabilities < np.float32(threshold), 0, probabilities).argmax(axis=1)
    np.testing.assert_array_equal(result["labels"], expected)


def blind(value):
    """Makes a checkpoint's scores the same everywhere: `value` for each class."""

    def edit(saved):
        saved["state_dict"]["_model.semantic_head.6.weight"].zero_()
        saved["state_dict"]["_model.semantic_head.6.bias"][:] = torch.tensor(value)

    return edit


@pytest.mark.parametrize(
    "scores, threshold, label",
    [
        ([0.0, 1.0, 1.0], 0.1, 1),  # the first of equals
        ([1.0, 1.0, 0.0], 0.1, 0),
        ([0.0, 1.0, 1.0], 0.5, 0),  # none reaches the threshold
        ([0.0, 0.0, 9.0], 0.9, 2),
        ([0.0], 0.5, 0),  # one class must exceed it
        ([0.0], 0.4999, 1),
        ([0.0, 0.0], 0.5, 0),
        ([-1e4, 0.0], 1.0, 1),  # several classes need only reach it
    ],
)
def test_ties_and_thresholds(tmp_path, scores, threshold, label):
    path = checkpoints.write(tmp_path / "model.ckpt", replace(SMALL, out_channels=len(scores)), blind(scores))
    spec = make_spec(path, threshold=threshold)
    assert (predict_patches(load_predictor(spec), some_patches(1, spec), {"labels"})["labels"] == label).all()


@pytest.mark.parametrize("wanted", [{"labels"}, {"probabilities"}, {"labels", "distances"}])
def test_only_what_is_wanted_is_returned(spec, wanted):
    predictor, patches = load_predictor(spec), some_patches(2, spec)
    everything, result = predict_patches(predictor, patches, EVERYTHING), predict_patches(predictor, patches, wanted)
    assert result.keys() == wanted
    for name, values in result.items():
        np.testing.assert_array_equal(values, everything[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_highest_probability_of_each_class_is_that_of_the_cores(tmp_path, classes, device):
    path = checkpoints.write(tmp_path / "model.ckpt", replace(SMALL, out_channels=classes))
    spec = make_spec(path, batch_size=4, device=device)
    window, core = some_patches(1, spec)[0], (slice(4, 12), slice(0, 12), slice(13, 16))
    far = (slice(8, 16), slice(12, 16), slice(0, 3))  # a hole is left between both, and no batch is full
    tiles = [Patch((slice(0, 16),) * 3, part, part) for part in (core, far)]
    result, _ = load_predictor(spec).predict_block(window, tiles, (16,) * 3, {"probabilities", "highest"})
    np.testing.assert_array_equal(result["highest"], result["probabilities"].max(axis=(1, 2, 3)))
    assert result["highest"].shape == (classes,) and result["highest"].dtype == np.float32


def test_a_core_is_predicted_as_in_its_whole_patch(spec):
    patches = some_patches(3, spec)
    whole = predict_patches(load_predictor(spec), patches, EVERYTHING)
    core = (slice(4, 12), slice(0, 12), slice(13, 16))
    found = predict_patches(load_predictor(spec), patches, EVERYTHING, core)
    for name in ("probabilities", "distances"):
        np.testing.assert_allclose(found[name], whole[name][(..., *core)], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["labels"], whole["labels"][(..., *core)])


def test_patches_with_different_cores_go_where_they_belong(spec):
    (patch,) = some_patches(1, spec)
    whole = predict_patches(load_predictor(spec), patch[None], {"probabilities"})["probabilities"][0]
    seen = (slice(0, 16),) * 3
    cores = [(slice(0, 5), *seen[1:]), (slice(9, 16), *seen[1:]), (slice(5, 9), slice(0, 8), slice(0, 16))]
    tiles = [Patch(seen, core, core) for core in cores]
    result, _ = load_predictor(spec).predict_block(patch, tiles, patch.shape, {"probabilities"})
    expected = np.zeros_like(whole)
    for core in cores:
        expected[(slice(None), *core)] = whole[(slice(None), *core)]
    np.testing.assert_allclose(result["probabilities"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_precision_is_used_or_refused(spec, precision):
    features = torch.cpu.get_capabilities()
    if precision != "tf32" and (features.get(f"avx512_{precision}") or features.get(f"amx_{precision}")):
        patches = some_patches(2, spec)
        found = predict_patches(Predictor(replace(spec, precision=precision)), patches, {"probabilities"})
        expected = predict_patches(load_predictor(spec), patches, {"probabilities"})
        assert found["probabilities"].dtype == np.float32
        difference = np.abs(found["probabilities"] - expected["probabilities"]).max()
        assert 1e-6 < difference < 0.1  # rounded, and no more than that
    else:
        with pytest.raises(DeviceError, match=f"for precision {precision}.*which has .*fp32.*Set it to fp32"):
            Predictor(replace(spec, precision=precision))


def test_arrays_of_any_layout(spec):
    patches = some_patches(2, spec)
    expected = predict_patches(load_predictor(spec), patches, {"probabilities"})["probabilities"]
    read_only = patches.copy()
    read_only.setflags(write=False)
    for same in (
        read_only,
        np.asfortranarray(patches),
        patches.astype(">f4"),
        np.flip(patches)[::-1, ::-1, ::-1, ::-1],
    ):
        result = predict_patches(load_predictor(spec), same, {"probabilities"})
        np.testing.assert_array_equal(result["probabilities"], expected)


def test_a_checkpoint_without_distances(tmp_path):
    spec = make_spec(checkpoints.write(tmp_path / "model.ckpt", replace(SMALL, distance_widths=None)))
    predictor = load_predictor(spec)
    assert predict_patches(predictor, some_patches(1, spec), {"labels"}).keys() == {"labels"}
    with pytest.raises(CheckpointError, match="must have a distance head"):
        predict_patches(predictor, some_patches(1, spec), {"distances"})


def test_the_specification_travels_and_is_loaded_once(spec):
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec and hash(copy) == hash(spec)
    found: list[Predictor] = []
    threads = [threading.Thread(target=lambda: found.append(load_predictor(copy))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {id(predictor) for predictor in found} == {id(load_predictor(spec))}


def test_threads_of_one_process_do_not_disturb_each_other(spec):
    patches = some_patches(6, spec)
    expected = predict_patches(load_predictor(spec), patches, EVERYTHING)
    found = {}

    def predict(i):
        found[i] = predict_patches(load_predictor(spec), patches[[i]], EVERYTHING)

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.concatenate([found[i][name] for i in range(6)]), values)


def test_two_networks_of_one_process_take_turns(tmp_path, spec):
    """As in a pipeline, whose workers have memory and a core for one of them at a time."""
    other = make_spec(checkpoints.write(tmp_path / "lamella.ckpt", replace(SMALL, out_channels=1)))
    predictors, together, worked = [Predictor(spec), Predictor(other)], threading.Barrier(2), []
    whole = tuple(slice(0, size) for size in spec.patch)
    window = np.zeros(spec.patch, np.float32)

    def predict(predictor):
        together.wait()
        worked.append(predictor.predict_block(window, [Patch(whole, whole, whole)] * 64, spec.patch, ["labels"])[1])

    threads = [threading.Thread(target=predict, args=(predictor,)) for predictor in predictors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(worked)
    assert first[1] <= second[0]


def test_a_checkpoint_that_changed_is_refused(tmp_path):
    path = checkpoints.write(tmp_path / "model.ckpt")
    spec = make_spec(path)
    checkpoints.write(path, seed=1)
    with pytest.raises(CheckpointError, match="must not change during a run"):
        load_predictor(spec)


def test_a_gpu_that_is_not_there_is_an_error_and_auto_is_the_cpu():
    program = """
from cryosiam_dask.errors import DeviceError
from cryosiam_dask.model.predictor import resolve_device
print(resolve_device("auto"), resolve_device("cpu"))
try:
    resolve_device("cuda")
except DeviceError as error:
    print(error)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith("cpu cpu\ndevice cuda was requested and must be usable; found ")
    assert "--device cpu" in output


def test_the_largest_patch_is_bounded_by_tomogram_and_memory(spec):
    assert largest_patch(spec, (16, 30, 20), 10**12) == (16, 32, 24)
    assert largest_patch(spec, (100, 100, 100), 1) == spec.patch
    enough = peak_bytes(SMALL, (40, 40, 40))
    assert largest_patch(spec, (72, 72, 72), enough) == (40, 40, 40)


class Small(torch.nn.Module):
    """A network on a device that has memory for so many patches at a time."""

    def __init__(self, network, most, error=torch.OutOfMemoryError, message="device error: at 0x7f\nmore of it"):
        super().__init__()
        self.network, self.most, self.error, self.tried = network, most, partial(error, message), []

    def forward(self, batch, **options):
        self.tried.append(len(batch))
        if len(batch) > self.most:
            raise self.error()
        return self.network(batch, **options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "device error: at 0x7f"),
        (torch.AcceleratorError, "CUDA error: out of memory"),
        (RuntimeError, "GET was unable to find an engine to execute this computation"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_batches_that_do_not_fit_are_halved_and_that_is_remembered(spec, error, message):
    patches = np.random.default_rng(5).random((9, 16, 16, 16), np.float32)
    expected = predict_patches(Predictor(spec), patches, EVERYTHING)
    predictor = Predictor(replace(spec, batch_size=8))
    predictor._batch_size = 8  # as on a GPU
    predictor._network = network = Small(predictor._network, 2, error, message)
    for tried in ([8, 4] + [2] * 5, [2] * 5):
        result = predict_patches(predictor, patches, EVERYTHING)
        assert network.tried == tried
        network.tried.clear()
        for name, values in expected.items():
            np.testing.assert_array_equal(result[name], values) if name == "labels" else np.testing.assert_allclose(
                result[name], values, atol=1e-5
            )


def test_a_patch_that_does_not_fit_alone_is_an_error_with_numbers(spec):
    predictor = Predictor(replace(spec, batch_size=4))
    predictor._batch_size = 4
    predictor._network = network = Small(predictor._network, 0)
    message = (
        r"found batch_size 4 and patch_size \[16, 16, 16\], and a block of \[16, 16, 16\]; even a batch of 1 "
        r"without another block does not fit \(device error: at 0x7f\)"
    )
    with pytest.raises(DeviceError, match=message):
        predict_patches(predictor, np.zeros((1, 16, 16, 16), np.float32), EVERYTHING)
    assert network.tried == [4, 2, 1, 1]


def test_the_patch_that_an_error_recommends_suits_the_network():
    """The bidirectional decoder needs multiples of 16."""
    predictor = Predictor(make_spec(golden.FOLDER / "bifpn" / "model.ckpt", patch=(32, 32, 32)))
    predictor._network = Small(predictor._network, 0)
    with pytest.raises(DeviceError, match=r"Set parameters.data.patch_size to \[16, 16, 16\]"):
        predict_patches(predictor, np.zeros((1, 32, 32, 32), np.float32), ("labels",))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.AcceleratorError, "device error: at 0x7f"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"),
    ],
)
def test_a_device_that_failed_is_lost(spec, error, message):
    predictor = Predictor(spec)
    predictor._network = Small(predictor._network, 0, error, message)
    with pytest.raises(LostDeviceError, match=rf"process {os.getpid()} on .*{message}\. Check the GPU"):
        predict_patches(predictor, np.zeros((1, 16, 16, 16), np.float32), EVERYTHING)


def test_a_device_that_fails_in_the_last_try_of_a_block_is_lost(spec):
    """Its memory did not suffice for one patch beside others, and alone it failed otherwise."""

    def fail(batch, **options):
        network.tried.append(len(batch))
        raise (torch.OutOfMemoryError if len(network.tried) < 2 else torch.AcceleratorError)("device error: at 0x7f")

    predictor = Predictor(spec)
    predictor._network = network = Small(predictor._network, 0)
    network.forward = fail
    with pytest.raises(LostDeviceError, match=r"device error: at 0x7f\. Check the GPU"):
        predict_patches(predictor, np.zeros((1, 16, 16, 16), np.float32), EVERYTHING)
    assert network.tried == [1, 1]
