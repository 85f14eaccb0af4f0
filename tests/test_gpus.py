"""The path of a GPU, on faked ones: what is asked of it, and what happens when it refuses."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from scipy import ndimage

from cryosiam_dask.core.executor import retries_exhausted
from cryosiam_dask.core.grid import Patch
from cryosiam_dask.errors import DeviceError, LostDeviceError, is_transient
from cryosiam_dask.model import predictor as module
from cryosiam_dask.model.architecture import peak_bytes, widest
from cryosiam_dask.model.network import Network
from cryosiam_dask.model.predictor import (
    Predictor,
    PredictorSpec,
    largest_patch,
    memories_of_gpus,
    memory_of_gpu,
    name_of_gpu,
    predictor_spec,
    require_precision,
    unused_gpu,
)
from cryosiam_dask.stages.components import backend, find_components, remove_small, write_instances
from cryosiam_dask.stages.lamella import postprocess_lamella
from support import checkpoints
from support.checkpoints import SMALL
from support.gpus import fake_cupy, fake_torch


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One GPU for PyTorch."""
    module._streams.cache_clear()
    fake_torch.install(torch, monkeypatch.setattr)
    yield
    module._streams.cache_clear()


@pytest.fixture
def cupy(cuda: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same for cupy."""
    backend.cache_clear()
    fake_cupy.install(lambda name, value: monkeypatch.setitem(sys.modules, name, value))
    yield
    backend.cache_clear()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PredictorSpec:
    checkpoint = checkpoints.write(tmp_path_factory.mktemp("model") / "model.ckpt")
    return replace(predictor_spec(checkpoint, device="cpu", batch_size=2), device="cuda")


def predicted(predictor: Predictor, patches: int = 1, wanted: tuple[str, ...] = ("labels",)) -> dict[str, NDArray[Any]]:
    shape = predictor.spec.patch
    window = np.random.default_rng(1).random((shape[0] * patches, *shape[1:]), np.float32)
    whole = tuple(slice(0, size) for size in shape)
    placed = [(slice(shape[0] * i, shape[0] * (i + 1)), *whole[1:]) for i in range(patches)]
    return predictor.predict_block(window, [Patch(at, whole, at) for at in placed], window.shape, wanted)[0]


# ---- the network ----


def test_a_process_has_one_stream_that_computes_and_two_that_copy(cuda: None, spec: PredictorSpec) -> None:
    """PyTorch keeps the memory of a block for the stream that allocated it."""
    predictors = [Predictor(spec), Predictor(replace(spec, precision="tf32"))]
    threads = [threading.Thread(target=predicted, args=(predictor,)) for predictor in predictors * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_torch.STREAMS) == 3


def test_no_stream_uses_what_another_one_has_not_finished(cuda: None, spec: PredictorSpec) -> None:
    predictor = Predictor(spec)
    compute, upload, download = fake_torch.STREAMS
    assert compute.done[-1] == "synchronize" and set(compute.done[:-1]) == {"to"}  # the weights
    compute.done.clear()
    predicted(predictor, wanted=("labels", "probabilities"))
    assert upload.done == ["to", "record"]
    assert compute.done[0] == "wait" and compute.done[-1] == "synchronize" and "zeros" in compute.done
    assert download.done == ["cpu", "cpu"]


def test_a_block_is_computed_in_the_precision_of_its_own_model(cuda: None, spec: PredictorSpec) -> None:
    """The switch for TF32 is the process's, and a worker of a pipeline has several models."""
    seen = []
    predictors = [Predictor(replace(spec, precision=precision)) for precision in ("tf32", "fp32")]
    for predictor in predictors:
        predictor._network.register_forward_pre_hook(
            lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        )
    for predictor in (*predictors, *predictors):
        predicted(predictor)
    assert seen == 2 * [(True, True), (False, False)]


def test_a_network_that_does_not_fit_is_tried_again_and_then_an_error(
    cuda: None, spec: PredictorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = []
    load = torch.nn.Module.to

    def refuse(self: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        if refusals:
            raise refusals.pop()
        return load(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    refusals[:] = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")]
    Predictor(spec)
    assert fake_torch.CALLS["empty_cache"] == 1
    refusals[:] = 2 * [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")]
    with pytest.raises(
        DeviceError, match=r"network must fit into the GPU's memory; found CUDA out of memory.*other pro"
    ) as raised:
        Predictor(spec)
    assert is_transient(raised.value)  # another GPU may have the memory
    assert "Stop other programs on the GPU" in str(retries_exhausted(raised.value)) and not is_transient(raised.value)
    refusals[:] = [torch.AcceleratorError("CUDA error: unspecified launch failure")]
    with pytest.raises(LostDeviceError, match="unspecified launch failure"):
        Predictor(spec)


# ---- labelling ----

MEMORY = [
    fake_cupy.OutOfMemoryError("Out of memory allocating 1,024 bytes"),
    fake_cupy.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
    MemoryError("std::bad_alloc: cudaErrorMemoryAllocation: out of memory"),
]


def made(array_module: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = (ndimage.gaussian_filter(np.random.default_rng(3).random((30, 40, 50)), 1.5) * 40).astype(np.uint8) % 4
    components = find_components(labels, block=(16, 20, 50), measure=True, array_module=array_module)
    numbers, kept = np.zeros(labels.shape, np.uint32), np.zeros_like(labels)
    write_instances(components, labels, numbers)
    remove_small(labels, kept, [-1, 50, 100, 200], array_module=array_module)
    return numbers, kept


@pytest.mark.filterwarnings("ignore:a block that does not fit")
@pytest.mark.parametrize(
    "errors",
    [
        [],
        *([error] for error in MEMORY),
        [None, *MEMORY],  # the second block is labelled on the CPU in the first pass, and on the GPU in the second
        [*[None] * 7, *MEMORY[:2], None, *MEMORY[:2]],
        MEMORY * 100,
    ],
)
def test_blocks_that_do_not_fit_are_labelled_on_the_cpu_with_the_same_bytes(
    cupy: None, errors: list[Exception | None]
) -> None:
    expected = made("numpy")
    fake_cupy.ERRORS[:] = errors
    for found, right in zip(made("cupy"), expected, strict=True):
        assert found.tobytes() == right.tobytes()
    assert fake_cupy.CALLS["label"]
    refused = sum(error is not None for error in errors) - sum(error is not None for error in fake_cupy.ERRORS)
    # PyTorch returns the memory that it keeps, from which cupy takes its own, too.
    assert fake_torch.CALLS["empty_cache"] == refused
    assert fake_cupy.CALLS["set_allocator"] == fake_torch.CALLS["init"] == 1


def test_it_is_said_that_the_cpu_labels(cupy: None) -> None:
    fake_cupy.ERRORS[:] = MEMORY[:2]
    with pytest.warns(UserWarning, match="does not fit into the GPU's memory is labelled on the CPU"):
        made("cupy")


def test_other_errors_of_cupy_are_those_of_a_lost_device(cupy: None) -> None:
    fake_cupy.ERRORS[:] = [fake_cupy.CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access")]
    with pytest.raises(LostDeviceError, match=r"must work until the end of the run; found cudaErrorIllegalAddress"):
        made("cupy")
    fake_cupy.ERRORS[:] = [ValueError("a fault of the program")]
    with pytest.raises(ValueError, match="a fault of the program"):
        made("cupy")


def test_a_gpu_smooths_in_double_precision_as_a_cpu_does(cupy: None) -> None:
    block = np.random.default_rng(2).random((60, 20, 20), np.float32)
    on_cpu, on_gpu = (backend(name).gaussian for name in ("numpy", "cupy"))
    options = {"mode": "constant", "truncate": 4.0}
    found = on_gpu(fake_cupy.Array(block), 10.0, 0, **options).values
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, on_cpu(block, 10.0, 0, **options), rtol=1.2e-7)  # one in the last bit


@pytest.mark.filterwarnings("ignore:a block that does not fit")
def test_the_lamella_is_found_where_there_is_memory(cupy: None) -> None:
    probability = np.zeros((40, 48, 48), np.float32)
    probability[10:30, 8:40, 8:40] = 1
    masks = []
    for name, errors in (("numpy", []), ("cupy", []), ("cupy", MEMORY * 9)):
        fake_cupy.ERRORS[:] = errors
        group = zarr.group({})
        output = group.create_array("output", shape=probability.shape, chunks=(40, 24, 24), dtype="uint8")
        postprocess_lamella(
            probability, (probability > 0).astype(np.uint8), output, threshold=0.5, hull="slices", work=group,
            array_module=name,
        )  # fmt: skip
        masks.append(output[:])
    assert masks[0].any() and (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()


def test_cucim_leaves_no_file_in_the_working_directory(
    cupy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "cucim/__init__.py": "try:\n    from . import clara\nexcept ImportError:\n    pass\n",
        "cucim/clara.py": "open('cufile.log', 'w').close()\n",
        "cucim/skimage/__init__.py": "",
        "cucim/skimage/measure.py": "label = None\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in [name for name in fake_cupy.modules() if name.startswith("cucim")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    backend("cupy")
    assert [path.name for path in tmp_path.iterdir()] == ["cucim"]
    for name in [name for name in fake_cupy.modules() if name.startswith("cucim")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_faked_functions_take_what_the_real_ones_take() -> None:
    pytest.importorskip("cupy", reason="compares with cupy, which is not installed")
    import cupy
    from cucim.skimage import measure
    from cupyx.scipy import ndimage as real

    for fake, function in ((fake_cupy.label, measure.label), (fake_cupy.gaussian_filter1d, real.gaussian_filter1d)):
        assert list(inspect.signature(fake).parameters) == list(inspect.signature(function).parameters)
    assert all(hasattr(cupy.cuda, name) for name in ("PythonFunctionAllocator", "set_allocator", "get_current_stream"))
    errors = (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError)
    for fake, error in zip((fake_cupy.OutOfMemoryError, fake_cupy.CUDARuntimeError), errors, strict=True):
        assert (fake.__module__, fake.__name__, fake.__base__) == (error.__module__, error.__name__, error.__base__)


# ---- the device ----


@pytest.mark.parametrize("version", [91002, 91501])
def test_reduced_precision_needs_a_cudnn_that_has_it(
    cuda: None, spec: PredictorSpec, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Predictor(replace(spec, precision="bf16"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    Predictor(spec)
    found = f"9.{version // 100 % 100}.{version % 100}"
    with pytest.raises(DeviceError, match=rf"precision bf16 needs cuDNN 9\.16\.0 or newer; found cuDNN {found}.*fp32"):
        Predictor(replace(spec, precision="bf16"))

    def refuse() -> None:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against (9, 20, 0)\nmore of it")

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    Predictor(spec)
    with pytest.raises(DeviceError, match=r"needs cuDNN 9\.16\.0 or newer; found cuDNN version incompatibility.*fp32"):
        Predictor(replace(spec, precision="tf32"))


def test_gpus_are_told_apart_and_the_smallest_comes_first(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also parts of a GPU, and beside one that does not work."""
    monkeypatch.setenv("FAKE_GPUS", "3")
    monkeypatch.setenv("FAKE_MEMORY", "16 8 2")
    assert memories_of_gpus() == [(2, 1_750_000_000), (1, 7_000_000_000), (0, 14_000_000_000)]
    monkeypatch.setenv("FAKE_BROKEN", "1")
    assert memories_of_gpus() == [(2, 1_750_000_000), (0, 14_000_000_000)]
    monkeypatch.setenv("FAKE_BROKEN", "0 1 2")
    with pytest.raises(LostDeviceError, match="unknown error"):
        memories_of_gpus()
    uuid, names = SimpleNamespace(name="GPU", uuid="GPU-1"), set()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: uuid)
    for visible in ("0", "MIG-1", "MIG-2", "MIG-2,MIG-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        names.add(name_of_gpu())
    assert names == {"GPU GPU-1", "GPU GPU-1 MIG-1", "GPU GPU-1 MIG-2"}


@pytest.mark.parametrize(
    ("ask", "asked"),
    [
        (name_of_gpu, "get_device_properties"),
        (memory_of_gpu, "mem_get_info"),
        (partial(require_precision, "fp32", "cuda"), "get_device_capability"),
    ],
)
def test_a_gpu_that_fails_when_it_is_asked_is_lost(
    cuda: None, ask: Callable[[], object], asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unknown error\nmore of it")

    ask()
    monkeypatch.setattr(torch.cuda, asked, fail)
    with pytest.raises(LostDeviceError, match=r"found CUDA error: unknown error\. Check the GPU"):
        ask()


def test_a_gpu_that_is_not_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert unused_gpu() is None
    (tmp_path / "nvidia0").touch()
    assert f"found PyTorch {torch.__version__}, which was built without CUDA. Install" in str(unused_gpu())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert f"found no GPU that PyTorch {torch.__version__}, built for CUDA 13.0, can use. Install" in str(unused_gpu())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpu() is None


def test_the_largest_patch_leaves_room_on_a_gpu(
    cuda: None, spec: PredictorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    class Here:
        """Instead of a process for each try."""

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def submit(self, function: Any, spec: PredictorSpec, memory: int) -> Any:
            tried.append((spec.patch, memory))
            return SimpleNamespace(result=lambda: function(spec, memory))

    monkeypatch.setattr(module, "ProcessPoolExecutor", Here)
    needed = peak_bytes(SMALL, (40, 40, 40), 2)
    assert largest_patch(spec, (72, 72, 72), needed) == (40, 40, 40)
    assert fake_torch.CALLS["set_per_process_memory_fraction"] == 1
    tried.clear()
    assert largest_patch(spec, (72, 72, 72), needed, lambda patch: 10) == (16, 16, 16)
    assert tried == [((16, 16, 16), needed - 10)]
    # A patch for which cuDNN finds no engine does not fit.
    monkeypatch.setenv("FAKE_VOXELS", str(2 * 48**3))
    monkeypatch.setenv("FAKE_ERROR", "GET was unable to find an engine to execute this computation")
    tried.clear()
    assert largest_patch(spec, (72, 72, 72), 10**12) == (40, 40, 40)
    assert [patch[0] for patch, _ in tried] == [72, 40]
    # Larger arrays than CUDA's libraries count with 32 bits.
    monkeypatch.delenv("FAKE_VOXELS")
    monkeypatch.setattr(module, "_MOST_VALUES", widest(SMALL) * 40**3)
    tried.clear()
    assert largest_patch(spec, (72, 72, 72), 10**12) == (40, 40, 40)
    assert len(tried) == 1


def test_the_widest_array_of_a_patch_is_known() -> None:
    """Counted in the network itself."""
    network = Network(SMALL).eval()
    with torch.inference_mode():
        for part in network.modules():
            part.register_forward_hook(
                lambda _, __, out: seen.append(out.shape) if isinstance(out, torch.Tensor) else None
            )
        seen: list[Any] = []
        whole = (slice(0, 16),) * 3
        network(torch.zeros(1, 1, 16, 16, 16), distances=True, core=whole)
    most = max(shape[1] for shape in seen if len(shape) == 5 and shape[2:] == (16, 16, 16))
    assert widest(SMALL) == most
