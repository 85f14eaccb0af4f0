"""What only a real GPU shows: ``pytest -m gpu``. Most of it runs on faked ones as well, so that the tests are right.

FAKE_GPUS=1 PYTHONPATH=tests/support/gpus/start:tests pytest -m gpu
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import zarr

from cryosiam_dask.core.grid import Patch
from cryosiam_dask.errors import DeviceError
from cryosiam_dask.model.architecture import required_halo, widest
from cryosiam_dask.model.device import has_gpu, lost_device_reported
from cryosiam_dask.model.predictor import (
    Predictor,
    PredictorSpec,
    count_of_gpus,
    largest_patch,
    load_predictor,
    memory_of_gpu,
    name_of_gpu,
)
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.metrics import Collector
from cryosiam_dask.runs.workers import ask, describe_devices
from cryosiam_dask.stages.lamella import postprocess_lamella
from support import checkpoints, golden
from support.checkpoints import SMALL
from test_components import REACH, blobs, instances
from test_predictor import EVERYTHING, golden_spec, make_spec, predict_patches, some_patches

pytestmark = pytest.mark.gpu
#: Without memory, speed, precisions and faults of its own.
FAKED = "FAKE_GPUS" in os.environ
real = pytest.mark.skipif(FAKED, reason="shows memory, precisions or faults, which no faked GPU has")


@pytest.fixture
def spec(tmp_path: Path) -> PredictorSpec:
    return make_spec(checkpoints.write(tmp_path / "model.ckpt"), device="cuda", batch_size=3)


@pytest.fixture
def limit() -> Iterator[object]:
    """A function that limits the memory of this process, in bytes."""
    _, total = torch.cuda.mem_get_info()
    yield lambda size: torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


# ---- the network ----


@pytest.mark.parametrize("decoder", ["fpn", "bifpn"])
def test_it_agrees_with_the_cpu_and_each_patch_gets_the_same_bytes_wherever_it_is(tmp_path: Path, decoder: str) -> None:
    architecture = replace(SMALL, decoder=decoder, bifpn_layers=2 * (decoder == "bifpn"))
    spec = make_spec(checkpoints.write(tmp_path / "model.ckpt", architecture), batch_size=3)
    patches = some_patches(7, spec)
    on_cpu = predict_patches(load_predictor(spec), patches, EVERYTHING)
    predictor = load_predictor(replace(spec, device="cuda"))
    on_gpu = predict_patches(predictor, patches, EVERYTHING)
    for name in ("probabilities", "distances"):
        np.testing.assert_allclose(on_gpu[name], on_cpu[name], rtol=0, atol=1e-4)
    for order in (slice(None), slice(None, None, -1)):
        again = predict_patches(predictor, patches[order], EVERYTHING)
        assert all(again[name][order].tobytes() == values.tobytes() for name, values in on_gpu.items())
    for i, patch in enumerate(patches):
        for name, values in predict_patches(predictor, patch[None], EVERYTHING).items():
            np.testing.assert_array_equal(values[0], on_gpu[name][i])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_other_batches_change_no_more_than_the_last_digits(spec: PredictorSpec, batch_size: int) -> None:
    patches = some_patches(9, spec)
    expected = predict_patches(load_predictor(spec), patches, EVERYTHING)
    found = predict_patches(load_predictor(replace(spec, batch_size=batch_size)), patches, EVERYTHING)
    for name in ("probabilities", "distances"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_batches_on_top_of_occupied_memory_give_the_same_bytes(spec: PredictorSpec) -> None:
    patches = some_patches(9, spec)
    expected = predict_patches(load_predictor(spec), patches, EVERYTHING)
    torch.cuda.empty_cache()
    ballast = torch.ones((memory_of_gpu() or 0) // 2 if not FAKED else 1, dtype=torch.uint8, device="cuda")
    found = predict_patches(load_predictor(spec), patches, EVERYTHING)
    assert ballast.numel() and all(found[name].tobytes() == values.tobytes() for name, values in expected.items())


@real
@pytest.mark.parametrize(("precision", "share"), [("tf32", 0.99), ("bf16", 0.9), ("fp16", 0.95)])
def test_precisions_are_used_and_change_few_labels(precision: str, share: float) -> None:
    spec = replace(golden_spec("fpn_bottleneck"), device="cuda")
    patches = some_patches(4, spec)
    expected = predict_patches(load_predictor(spec), patches, EVERYTHING)
    found = predict_patches(load_predictor(replace(spec, precision=precision)), patches, EVERYTHING)
    assert 1e-6 < np.abs(found["probabilities"] - expected["probabilities"]).max() < 0.1
    assert (found["labels"] == expected["labels"]).mean() > share


def test_two_models_of_one_process_keep_their_precisions(tmp_path: Path, spec: PredictorSpec) -> None:
    other = make_spec(checkpoints.write(tmp_path / "other.ckpt", seed=1), device="cuda", precision="tf32")
    patches = some_patches(4, spec)
    alone = [predict_patches(Predictor(each), patches, EVERYTHING) for each in (spec, other)]
    predictors = [Predictor(each) for each in (spec, other)]
    for _ in range(2):
        for predictor, expected in zip(predictors, alone, strict=True):
            found = predict_patches(predictor, patches, EVERYTHING)
            assert all(found[name].tobytes() == values.tobytes() for name, values in expected.items())


@real
def test_batches_are_halved_where_memory_runs_out(spec: PredictorSpec, limit) -> None:  # type: ignore[no-untyped-def]
    spec = replace(spec, patch=(96, 96, 96), batch_size=1)
    patches = some_patches(16, spec)
    torch.cuda.reset_peak_memory_stats()
    expected = predict_patches(Predictor(spec), patches, ("probabilities",))
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    limit(2 * needed)
    predictor = Predictor(replace(spec, batch_size=16))
    found = predict_patches(predictor, patches, ("probabilities",))
    assert predictor._batch_size < 16
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], rtol=0, atol=1e-4)
    torch.cuda.empty_cache()
    limit(torch.cuda.memory_reserved() + needed // 8)
    with pytest.raises(DeviceError, match=r"even a batch of 1 without another block does not fit \(CUDA out of memory"):
        predict_patches(predictor, patches, ("probabilities",))


@real
def test_streams_leave_no_memory_behind(spec: PredictorSpec) -> None:
    predictor, patches = (
        load_predictor(replace(spec, patch=(64, 64, 64))),
        some_patches(3, replace(spec, patch=(64,) * 3)),
    )
    for _ in range(2):
        predict_patches(predictor, patches, ("labels",))
    before = torch.cuda.memory_reserved()
    for _ in range(40):
        predict_patches(predictor, patches, ("labels",))
    assert torch.cuda.memory_reserved() == before


def test_the_largest_patch_can_be_used(spec: PredictorSpec) -> None:
    memory = int(0.5 * (memory_of_gpu() or 0))
    patch = largest_patch(spec, (64, 64, 64), memory)
    assert patch == (64, 64, 64)
    assert largest_patch(spec, (64, 64, 64), memory, lambda patch: memory) == spec.patch


@real
def test_a_patch_of_more_than_2_to_the_31_values_is_right(tmp_path: Path) -> None:
    architecture = replace(SMALL, num_filters=(64, 2, 2, 2), fpn_channels=2)
    spec = make_spec(checkpoints.write(tmp_path / "model.ckpt", architecture), device="cuda", batch_size=1)
    halo, edge = -(-required_halo(architecture) // 16) * 16, 208
    assert widest(architecture) * edge**3 > 2**31
    if (memory_of_gpu() or 0) < 64e9:
        pytest.skip("needs 64 GB of memory on the GPU")
    window = np.random.default_rng(0).random((edge,) * 3, np.float32)
    inner = slice(edge - halo - 16, edge - halo)
    seen = slice(inner.start - halo, edge)
    kept = (slice(0, 16),) * 3
    large = [Patch((slice(0, edge),) * 3, (inner,) * 3, kept)]
    found, _ = Predictor(replace(spec, patch=window.shape)).predict_block(window, large, (16,) * 3, ["probabilities"])
    part = np.ascontiguousarray(window[seen, seen, seen])
    core = slice(halo, halo + 16)
    small = [Patch((slice(0, len(part)),) * 3, (core,) * 3, kept)]
    right, _ = Predictor(replace(spec, patch=part.shape)).predict_block(part, small, (16,) * 3, ["probabilities"])
    np.testing.assert_allclose(found["probabilities"], right["probabilities"], rtol=0, atol=1e-4)


# ---- labelling ----


@pytest.mark.parametrize("connectivity", REACH)
def test_components_are_the_same_bytes(connectivity: int) -> None:
    labels = blobs((50, 60, 70))
    on_cpu, on_gpu = (
        instances(labels, block=(20, 30, 70), connectivity=connectivity, measure=True, array_module=array_module)
        for array_module in ("numpy", "cupy")
    )
    assert on_cpu[1].tobytes() == on_gpu[1].tobytes()
    np.testing.assert_array_equal(on_cpu[0].measurements.centroids, on_gpu[0].measurements.centroids)


@real
def test_components_are_the_same_bytes_without_memory(limit) -> None:  # type: ignore[no-untyped-def]
    labels = blobs((50, 60, 70))
    _, expected = instances(labels, array_module="numpy")
    torch.cuda.empty_cache()
    limit(1)
    with pytest.warns(UserWarning, match="labelled on the CPU"):
        _, found = instances(labels, array_module="cupy")
    assert found.tobytes() == expected.tobytes()


def test_the_golden_lamella_is_found() -> None:
    right = golden.expected("lamella_then_semantic")
    group = zarr.group({})
    output = group.create_array("output", shape=(72, 88, 80), chunks=(40, 40, 40), dtype="uint8")
    postprocess_lamella(
        right["lamella_probs"], right["lamella_none"], output, threshold=0.9, hull="slices", work=group,
        array_module="cupy",
    )  # fmt: skip
    np.testing.assert_array_equal(output[:], right["lamella_slicewise"])


# ---- workers ----


def predicted(mark: Path, spec: PredictorSpec, how: str, number: int) -> bytes:
    """Predict a patch; the first call with 2 fails in the given way."""
    if number == 2:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            with lost_device_reported():
                values = torch.zeros(1, device="cuda")
                values[torch.tensor([5], device="cuda")].cpu()
            raise AssertionError
    found = predict_patches(load_predictor(spec), some_patches(1, spec, seed=number), ("labels",))
    return found["labels"].tobytes()


@pytest.mark.parametrize("how", ["killed", pytest.param("lost", marks=real)])
def test_each_worker_has_its_gpu_and_work_of_a_lost_one_goes_on(tmp_path: Path, spec: PredictorSpec, how: str) -> None:
    expected = [predicted(tmp_path / "none", spec, how, number) for number in (0, 1, 3)]
    with open_cluster("cuda", 0, dashboard_address="127.0.0.1:0") as client:
        client.register_plugin(Collector())
        assert describe_devices(client, name_of_gpu) == "cuda"
        call = partial(predicted, tmp_path / "mark", spec, how)
        executor = DaskExecutor(client, has_device=has_gpu)
        found = executor.map(call, range(6), name="predict", overlap=True)
        assert (tmp_path / "mark").exists()
        assert [found[number] for number in (0, 1, 3)] == expected
        names = [name for name in ask(client, name_of_gpu).values() if name is not None]
        assert len(names) == len(set(names)) == count_of_gpus()
        for _ in range(600):
            text = urlopen(client.dashboard_link.replace("/status", "/metrics"), timeout=30).read().decode()
            if text.count("\ncryosiam_dask_gpu_") == 3 * count_of_gpus():
                break
            time.sleep(0.1)
        assert text.count("\ncryosiam_dask_gpu_memory_used_bytes{") == count_of_gpus()
