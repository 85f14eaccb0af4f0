"""The network on a device: voxels of patches in, labels, probabilities and distances out.

The last bits of the libraries' sums depend on the batch size and on the number of threads. Therefore patches are
evaluated

* on a CPU one at a time, in one thread (more worker processes use more cores);
* on a GPU with deterministic algorithms, in batches of constant size; the last batch is filled up with zeros. Only if a
  batch does not fit into the GPU's memory, the batches become smaller, which may change the last bits. So may another
  cuDNN engine, which cuDNN chooses by the workspace that is available.

Single precision is the default. Other precisions are optional, and an error on devices without instructions for them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cryosiam_dask.core.diagnosis import with_a_smaller_patch
from cryosiam_dask.core.grid import Patch
from cryosiam_dask.errors import CheckpointError, DeviceError, LostDeviceError
from cryosiam_dask.model.architecture import default_threshold, peak_bytes, required_divisor, widest
from cryosiam_dask.model.checkpoint import read_checkpoint
from cryosiam_dask.model.device import free_memory, has_gpu, lost_device_reported, out_of_memory_caught
from cryosiam_dask.model.network import Network, convolve_with_onednn, fold_batch_norms

_CACHED = 1 << 16  # voxels that fit into a processor's cache
#: Held while computing: a worker of a pipeline has several networks, but memory and a core for only one at a time.
_TURN = threading.Lock()

R = TypeVar("R")
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class PredictorSpec:
    """How to predict; sent to the workers instead of the network.

    Attributes
    ----------
    checkpoint, sha256
        The file and its hash; a file that has changed in the meantime is refused.
    device
        Where the network runs.
    patch
        Shape of a patch in voxels, (z, y, x) or (y, x).
    classes
        Channels of probabilities and distances.
    batch_size
        Patches per batch on a GPU; may change the last bits of probabilities.
    minimum, maximum
        Intensities that become 0 and 1; those beyond are clipped. If intensities are inverted, the minimum is larger
        than the maximum.
    mean, std
        The scaled intensities become (intensity - mean) / std.
    threshold
        Probability that a class must reach to become a label.
    halo
        Voxels on each side of a patch that are discarded; 0 for CryoSiam's patches (see `cryosiam_dask.core.grid`).
    precision
        Precision of the multiplications in convolutions; sums, probabilities and labels use single precision.
    stretch
        Intensities that are scaled to 0 and 1 first; values outside them are clipped. ``None`` to skip this step. For
        denoisers, these are percentiles of the tomogram, the higher one first, which inverts the contrast.
    """

    checkpoint: str
    sha256: str
    device: Literal["cpu", "cuda"]
    patch: tuple[int, ...]
    classes: int
    batch_size: int
    minimum: float
    maximum: float
    mean: float
    std: float
    threshold: float
    halo: int = 0
    precision: Precision = "fp32"
    stretch: tuple[float, float] | None = None


def predictor_spec(
    checkpoint: str | Path,
    *,
    patch_size: tuple[int, ...] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int = 2,
    minimum: float = 0.0,
    maximum: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
    invert: bool = False,
    threshold: float | None = None,
    halo: int = 0,
    precision: Precision = "fp32",
) -> PredictorSpec:
    """Return a specification for predicting with a checkpoint; the defaults are those that CryoSiam documents.

    Parameters
    ----------
    checkpoint
        CryoSiam's ``.ckpt``.
    patch_size
        Voxels, (z, y, x) or (y, x); the checkpoint's own by default.
    device
        See `resolve_device`.
    batch_size, minimum, maximum, mean, std
        See `PredictorSpec`.
    invert
        Whether `maximum` becomes 0 and `minimum` becomes 1, for tomograms that are dark on bright.
    threshold
        See `PredictorSpec` and `default_threshold`.
    halo, precision
        See `PredictorSpec`.

    Raises
    ------
    CheckpointError, DeviceError
        If the checkpoint or the device cannot be used.
    """
    found = read_checkpoint(checkpoint)
    classes = found.architecture.out_channels
    return PredictorSpec(
        checkpoint=str(checkpoint),
        sha256=found.sha256,
        device=resolve_device(device),
        patch=tuple(patch_size or found.patch_size),
        classes=classes,
        batch_size=batch_size,
        minimum=maximum if invert else minimum,
        maximum=minimum if invert else maximum,
        mean=mean,
        std=std,
        threshold=default_threshold(classes) if threshold is None else threshold,
        halo=halo,
        precision=precision,
    )


def normalise(
    voxels: npt.NDArray[Any], spec: PredictorSpec, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Scale intensities like those that the network was trained with.

    Parameters
    ----------
    voxels
        Stored intensities of any shape and real dtype. NaN and infinity count as the minimum. With a stretch, NaN
        counts as its first value, and infinity is clipped.
    spec
        Has ``stretch``, ``minimum``, ``maximum``, ``mean`` and ``std``.
    out
        A C-contiguous array of the same shape for the result; a new one if not given.

    Returns
    -------
    ndarray
        ``(clip((v - minimum) / (maximum - minimum), 0, 1) - mean) / std``, float32. With a stretch, v is
        ``clip((v - stretch[0]) / (stretch[1] - stretch[0]), 0, 1)``.
    """
    given = np.ascontiguousarray(voxels).reshape(-1)
    scaled = np.empty(given.shape, np.float32) if out is None else out.reshape(-1)
    width = spec.maximum - spec.minimum
    with np.errstate(over="ignore"):  # values that overflow are infinite, or clipped
        # In sections that fit into the processor's cache during all operations.
        for first in range(0, given.size, _CACHED):
            section = scaled[first : first + _CACHED]
            section[:] = given[first : first + _CACHED]
            if spec.stretch is not None:
                zero, one = spec.stretch
                section[np.isnan(section)] = zero
                section -= zero
                section /= one - zero
                section.clip(0, 1, out=section)
            finite = np.isfinite(section)
            if not finite.all():
                section[~finite] = spec.minimum
            # Steps that change nothing, as with the defaults, are left out.
            if spec.minimum:
                section -= spec.minimum
            if width != 1:
                section /= width
            section.clip(0, 1, out=section)
            if spec.mean:
                section -= spec.mean
            if spec.std != 1:
                section /= spec.std
    return scaled.reshape(voxels.shape)


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return the device to use.

    Parameters
    ----------
    device
        ``"auto"`` means CUDA if it can be used, else the CPU.

    Raises
    ------
    DeviceError
        If CUDA was requested and cannot be used: a run never falls back to the CPU silently.
    """
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise DeviceError(
        "device cuda was requested and must be usable",
        value=_without_cuda(),
        remedy="Install PyTorch for CUDA and its driver, or use --device cpu",
    )


def _without_cuda() -> str:
    """Return why PyTorch finds no GPU."""
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__}, which was built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
    return f"no GPU that PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, can use{where}"


#: Where Linux lists NVIDIA's GPUs.
_DEVICES = Path("/dev")


def unused_gpu() -> str | None:
    """Return why a visible GPU of this machine cannot be used; ``None`` if there is no such GPU."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if not any(_DEVICES.glob("nvidia[0-9]*")):
        return None
    return (
        f"this machine has an NVIDIA GPU, but the run uses the CPU: found {_without_cuda()}. Install PyTorch for the "
        "CUDA version of the driver (nvidia-smi shows it), or set --device cpu"
    )


@lost_device_reported()
def name_of_gpu() -> str | None:
    """Return a unique name of the GPU that this process uses; ``None`` if it uses none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    part = visible if visible.startswith("MIG-") else ""  # all instances of a GPU may report its id
    return f"{properties.name} {getattr(properties, 'uuid', '')} {part}".strip()


def on_device(device: Literal["cpu", "cuda"], function: Callable[..., R], *arguments: object) -> R | None:
    """Call a function, unless `device` is ``"cuda"`` and this process has no GPU."""
    return function(*arguments) if device == "cpu" or has_gpu() else None


def count_of_gpus() -> int:
    """Return the number of GPUs that this process can see."""
    return torch.cuda.device_count()


@lost_device_reported()
def memory_of_gpu() -> int | None:
    """Return the bytes of GPU memory that this process may use; ``None`` if it has no GPU."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved())


def memories_of_gpus() -> list[tuple[int, int]]:
    """Return the number and the free memory, in bytes, of each GPU that this process can use; the smallest first.

    Raises
    ------
    DeviceError
        If there is no GPU, or none works.
    """
    resolve_device("cuda")
    found, errors = list[tuple[int, int]](), list[LostDeviceError]()
    for gpu in range(count_of_gpus()):
        try:
            with lost_device_reported():
                found.append((gpu, torch.cuda.mem_get_info(gpu)[0]))
        except LostDeviceError as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    return sorted(found, key=itemgetter(1))


#: From 9.8 on, cuDNN's convolutions in 3-D were wrong or slow in reduced precision, on some GPUs, up to this version.
_CUDNN = 91600


def _require_cudnn(precision: Precision) -> None:
    def written(number: int) -> str:
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"

    try:
        number = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found = f"cuDNN {written(number)}, with wrong or slow convolutions in 3-D" if number else "none"
    except RuntimeError as error:  # another one than PyTorch was built with, or one that does not know the GPU
        number, found = 0, str(error).splitlines()[0]
    if not number or number < _CUDNN:
        raise DeviceError(
            f"precision {precision} needs cuDNN {written(_CUDNN)} or newer",
            place="hyper_parameters.precision",
            value=found,
            remedy="Install a newer PyTorch, or set it to fp32",
        )


@lost_device_reported()
def require_precision(precision: Precision, device: Literal["cpu", "cuda"]) -> str:
    """Check that the device has instructions for a precision, which would otherwise be slower than single precision.

    Returns
    -------
    str
        The device's name.

    Raises
    ------
    DeviceError
        If it does not, or its cuDNN is too old; the message lists the precisions that it supports.
    """
    if device == "cuda":
        if precision != "fp32":
            _require_cudnn(precision)
        capability = torch.cuda.get_device_capability()
        # Tensor cores: fp16 since Volta, bf16 and tf32 since Ampere.
        able = {"fp32"} | ({"fp16"} if capability >= (7, 0) else set())
        able |= {"bf16", "tf32"} if capability >= (8, 0) else set()
        name = f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]})"
    else:
        features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        able = {"fp32"} | {
            p for p in ("bf16", "fp16") if features.get(f"avx512_{p}", False) or features.get(f"amx_{p}", False)
        }
        name = features.get("cpu_name", "this CPU")
    if precision not in able:
        raise DeviceError(
            f"the device must have instructions for precision {precision}",
            place="hyper_parameters.precision",
            value=f"{name}, which has {', '.join(sorted(able))}",
            remedy="Set it to fp32, or use another device",
        )
    return str(name)


#: Longest patch edge, in voxels, that `largest_patch` tries; a CPU would take minutes for a longer one.
_LONGEST_PATCH = {"cuda": 448, "cpu": 256}
#: Maximum number of values in an array of one patch on a GPU. For more, CUDA's libraries use other kernels.
_MOST_VALUES = 2**31 - 1


def largest_patch(
    spec: PredictorSpec,
    extent: tuple[int, ...],
    memory: int,
    beside: Callable[[tuple[int, ...]], int] = lambda patch: 0,
    gpu: int = 0,
) -> tuple[int, ...]:
    """Find the largest patch that fits into the device's memory by running forward passes.

    Parameters
    ----------
    spec
        How to predict; its patch is the smallest that is tried.
    extent
        Shape of the largest tomogram in voxels; no longer patch is tried.
    memory
        Memory of the device that network and blocks may use, in bytes.
    beside
        Returns the bytes that the smallest blocks for a patch need in addition to the network.
    gpu
        Number of the GPU, among those that this process can see.

    Raises
    ------
    DeviceError
        If not even the patch of `spec` fits.
    """
    architecture = read_checkpoint(spec.checkpoint).architecture
    divisor = required_divisor(architecture)
    longest = max(min(_LONGEST_PATCH[spec.device], -(-max(extent) // divisor) * divisor), *spec.patch)
    batch_size = 1 if spec.device == "cpu" else spec.batch_size
    tried: set[tuple[int, ...]] = set()
    for edge in (*range(longest, max(spec.patch), -32), 0):
        patch = tuple(max(p, min(edge, -(-n // divisor) * divisor)) for p, n in zip(spec.patch, extent, strict=True))
        if patch in tried or (edge and peak_bytes(architecture, patch, batch_size) + beside(patch) > memory):
            continue
        if edge and spec.device == "cuda" and widest(architecture) * math.prod(patch) > _MOST_VALUES:
            continue
        tried.add(patch)
        # In a separate process, because running out of memory may kill it or leave GPU memory occupied.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                pool.submit(partial(_try_patch, gpu=gpu), replace(spec, patch=patch), memory - beside(patch)).result()
                return patch
            except (DeviceError, BrokenProcessPool):
                pass
    raise DeviceError(
        "the checkpoint's patch must fit into the memory",
        place=spec.checkpoint,
        value=f"patch_size {list(spec.patch)}",
        remedy="Set parameters.data.patch_size to a smaller patch, or use another device",
    )


def _try_patch(spec: PredictorSpec, memory: int, *, gpu: int) -> None:
    """Predict a batch of empty patches, using at most `memory` bytes of a GPU."""
    if spec.device == "cuda":
        torch.cuda.set_device(gpu)
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, memory / total)))
    whole = tuple(slice(0, size) for size in spec.patch)
    core = tuple(slice(spec.halo or size // 4, size - (spec.halo or size // 4)) for size in spec.patch)
    window = np.zeros(spec.patch, np.float32)
    Predictor(spec).predict_block(window, [Patch(whole, core, core)], spec.patch, ["labels"])


def measured_pace(
    spec: PredictorSpec, window: npt.NDArray[np.float32], patches: Sequence[Patch], shape: tuple[int, ...], least: float
) -> float:
    """Measure how many patches this process predicts per second.

    Parameters
    ----------
    spec
        How to predict.
    window, patches, shape
        A block; see `Predictor.predict_block`.
    least
        Minimum duration of the measurement in seconds, after a first batch.
    """
    predictor, size = load_predictor(spec), 1 if spec.device == "cpu" else spec.batch_size
    batches = cycle([patches[first : first + size] for first in range(0, len(patches), size)])
    predictor.predict_block(window, next(batches), shape, ["labels"])
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < least:
        batch = next(batches)
        predictor.predict_block(window, batch, shape, ["labels"])
        count += len(batch)
    return count / (time.perf_counter() - began)


class Predictor:
    """A network in the memory of its device; `load_predictor` creates one per process.

    Parameters
    ----------
    spec
        How to predict.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be used, or has changed since the specification was made.
    DeviceError
        If the device cannot be used.
    """

    def __init__(self, spec: PredictorSpec) -> None:
        device = resolve_device(spec.device)
        require_precision(spec.precision, device)
        checkpoint = read_checkpoint(spec.checkpoint)
        if checkpoint.sha256 != spec.sha256:
            raise CheckpointError(
                "the checkpoint must not change during a run",
                place=spec.checkpoint,
                value="a different file than at the start",
                remedy="Start the run again",
            )
        with torch.device("meta"):  # no random weights, because they come from the checkpoint
            network = Network(checkpoint.architecture)
        network.load_state_dict(checkpoint.state, assign=True)
        self.spec = spec
        self.has_distance_head = checkpoint.architecture.has_distance_head
        self._divisor = required_divisor(checkpoint.architecture)
        network.eval()
        fold_batch_norms(network)
        # Convolutions are fastest with channels last, on CPUs and GPUs.
        self._layout = torch.channels_last if len(spec.patch) == 2 else torch.channels_last_3d
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.precision, torch.float32)
        self._streams = _streams() if device == "cuda" else None
        for _ in range(2):
            with (
                out_of_memory_caught() as refused,
                torch.cuda.stream(self._streams.compute) if self._streams else nullcontext(),
            ):
                self._network = network.to(device, self._dtype).to(memory_format=self._layout)  # type: ignore[call-overload]
                if self._streams:
                    self._streams.compute.synchronize()
                break
            free_memory()
        else:
            raise _does_not_fit(
                "the network must fit into the GPU's memory",
                place=spec.checkpoint,
                value=refused[0],
                remedy="Stop other programs on the GPU, or use another one",
            )
        if device == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            convolve_with_onednn(network)
        self._turn = _TURN
        # Becomes smaller when the GPU runs out of memory, and does not grow again in this process.
        self._batch_size = 1 if device == "cpu" else spec.batch_size

    def predict_block(
        self,
        window: npt.NDArray[np.float32],
        patches: Sequence[Patch],
        shape: tuple[int, ...],
        wanted: Collection[str],
    ) -> tuple[dict[str, npt.NDArray[Any]], tuple[float, float]]:
        """Predict the patches of a block.

        Threads of one process take turns on the device; one may copy its voxels there while another computes.

        Parameters
        ----------
        window
            Normalised voxels that the patches see, (z, y, x), float32.
        patches
            The patches, with the regions of their cores in the result.
        shape
            Shape of the result in voxels.
        wanted
            Which of ``"labels"``, ``"probabilities"``, ``"distances"`` and ``"highest"`` to return; for a denoiser,
            ``"denoised"``.

        Returns
        -------
        dict
            ``labels`` uint8 (z, y, x): with one class, 1 where its probability exceeds the threshold; with several, the
            most probable class (the first of equals), or 0 where none reaches the threshold. ``probabilities`` and
            ``distances`` float32 (class, z, y, x), before any threshold. All are 0 outside the cores of the patches.
            ``highest`` float32 (class,): the highest probability of each class in any core. ``denoised`` float32
            (channel, z, y, x).
        tuple of float
            When the device started and finished, in seconds since 1970.

        Raises
        ------
        CheckpointError
            If distances are wanted and the checkpoint has no distance head.
        DeviceError
            If not even one patch fits into the GPU's memory.
        LostDeviceError
            If this process can no longer use the device.
        """
        if "distances" in wanted and not self.has_distance_head:
            raise CheckpointError(
                "the checkpoint must have a distance head to predict distances",
                place=self.spec.checkpoint,
                value="no weights named _model.distance_head",
                remedy="Request only labels and probabilities",
            )
        while True:
            batch_size = self._batch_size
            with out_of_memory_caught():
                return self._predict_block(window, patches, shape, wanted, batch_size)
            with self._turn, out_of_memory_caught() as refused:
                free_memory()
                if batch_size > 1:
                    self._batch_size = min(self._batch_size, batch_size // 2)
                    continue
                # Retry while no other block uses the device.
                return self._predict_block(window, patches, shape, wanted, 1, alone=True)
            tried = f"batch_size {self.spec.batch_size} and patch_size {list(self.spec.patch)}"
            remedy = with_a_smaller_patch(self.spec.patch, self._divisor)
            raise _does_not_fit(
                "a patch and its block must fit into the GPU's memory",
                value=f"{tried}, and a block of {list(shape)}; even a batch of 1 without another block does not fit "
                f"({refused[0]})",
                remedy=f"{remedy}. Or lower block_size, or stop other programs on the GPU",
            )

    def _predict_block(
        self,
        window: npt.NDArray[np.float32],
        patches: Sequence[Patch],
        shape: tuple[int, ...],
        wanted: Collection[str],
        batch_size: int,
        alone: bool = False,
    ) -> tuple[dict[str, npt.NDArray[Any]], tuple[float, float]]:
        """See `predict_block`; `alone` means that this thread already holds the lock."""
        device, streams = self.spec.device, self._streams
        with torch.inference_mode(), _one_thread():
            # Copied only if torch cannot use it, because it is read-only, flipped, or has a foreign byte order.
            voxels = torch.from_numpy(np.require(window, np.float32, ["C", "W"]))
            if streams:
                with torch.cuda.stream(streams.upload):
                    voxels = voxels.pin_memory().to(device, non_blocking=True)
                    voxels.record_stream(streams.compute)
                    arrived = streams.upload.record_event()
            with nullcontext() if alone else self._turn:
                _set_precision(self.spec)
                with torch.cuda.stream(streams.compute) if streams else nullcontext():
                    if streams:
                        streams.compute.wait_event(arrived)
                    began = time.time()
                    result = {
                        name: torch.zeros(
                            shape if name == "labels" else (self.spec.classes, *(() if name == "highest" else shape)),
                            dtype=torch.uint8 if name == "labels" else torch.float32,
                            device=device,
                        )
                        for name in wanted
                    }
                    for batch in _batches(patches, batch_size):
                        self._evaluate(voxels, batch, result, batch_size)
                    if streams:
                        streams.compute.synchronize()
                    ended = time.time()
            with torch.cuda.stream(streams.download) if streams else nullcontext():
                return {name: values.cpu().numpy() for name, values in result.items()}, (began, ended)

    def _evaluate(
        self, voxels: torch.Tensor, patches: Sequence[Patch], result: dict[str, torch.Tensor], size: int
    ) -> None:
        """Predict a batch of at most `size` patches with equal cores, and store it in the result."""
        batch = torch.zeros(size, 1, *self.spec.patch, device=self.spec.device, dtype=self._dtype)
        for i, patch in enumerate(patches):
            batch[i, 0] = voxels[patch.window]
        batch = batch.to(memory_format=self._layout)
        scores, distances = self._network(batch, distances="distances" in result, core=patches[0].core)
        scores = scores.float()
        found = {"denoised": scores, "distances": distances}
        if result.keys() & {"labels", "probabilities", "highest"}:
            found["probabilities"] = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(dim=1)
        if "labels" in result:
            # In single precision, like the probabilities. A tensor would make the device wait for a copy.
            threshold = float(np.float32(self.spec.threshold))
            if scores.shape[1] == 1:
                found["labels"] = found["probabilities"][:, 0] > threshold
            else:
                found["labels"] = (
                    found["probabilities"].masked_fill(found["probabilities"] < threshold, 0).argmax(dim=1)
                )
        if "highest" in result:
            seen = found["probabilities"][: len(patches)].amax(dim=(0, *range(2, scores.ndim)))
            torch.maximum(result["highest"], seen, out=result["highest"])
        for name, values in result.items():
            for i, patch in enumerate(patches if name != "highest" else ()):
                target: Any = (..., *patch.target)
                values[target] = found[name][i]


def _does_not_fit(rule: str, **details: Any) -> DeviceError:
    """Return an error that is retried, on another GPU or later, because another program may be using the memory."""
    error = DeviceError(rule, **details)
    error.transient = True
    return error


def _batches(patches: Sequence[Patch], size: int) -> Iterator[list[Patch]]:
    """Yield batches of up to `size` patches with equal cores, because the network evaluates one core per batch."""
    by_core: dict[tuple[tuple[int, int], ...], list[Patch]] = {}
    for patch in patches:
        by_core.setdefault(tuple((s.start, s.stop) for s in patch.core), []).append(patch)
    for group in by_core.values():
        yield from (group[i : i + size] for i in range(0, len(group), size))


@dataclass(frozen=True, slots=True)
class _Streams:
    """The CUDA streams of a process: one for computing, and one for copies in each direction."""

    compute: torch.cuda.Stream
    upload: torch.cuda.Stream
    download: torch.cuda.Stream


@cache
def _streams() -> _Streams:
    """Return this process's streams, which are few because PyTorch caches freed memory for each stream."""
    return _Streams(*(torch.cuda.Stream() for _ in range(3)))  # type: ignore[no-untyped-call]


def _set_precision(spec: PredictorSpec) -> None:
    """Choose the GPU's algorithms for the next block; it is global, and models of a process may differ."""
    if spec.device == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = spec.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in this thread only. The setting is per thread, so every call needs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_LOADING = threading.Lock()


def load_predictor(spec: PredictorSpec) -> Predictor:
    """Return the predictor for `spec`, which is loaded at the first call in a process; the last three are kept.

    Raises
    ------
    CheckpointError, DeviceError
        See `Predictor`.
    """
    with _LOADING:  # other threads wait for the loading one
        # The scaling of intensities is not part of the network, and a denoiser scales every tomogram differently.
        return _load(replace(spec, minimum=0.0, maximum=1.0, mean=0.0, std=1.0, stretch=None))


_load = lru_cache(maxsize=3)(Predictor)


def can_load(spec: PredictorSpec) -> bool:
    """Load a predictor in this process, and return True; see `load_predictor` for errors."""
    load_predictor(spec)
    return True
