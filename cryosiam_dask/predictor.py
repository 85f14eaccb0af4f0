"""The network on one device: voxels of patches to labels, probabilities and distances.

The only module that knows a device. A result must not depend on how patches are grouped, and the libraries' sums do
depend on the size of a batch and on the number of threads, in their last bits. Therefore patches are evaluated

* on the CPU one at a time, in one thread (more cores are used by more worker processes);
* on a GPU in batches of always the same size, the last one filled up with zeros, with deterministic algorithms in full
  single precision.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from cryosiam_dask.checkpoint import read_checkpoint
from cryosiam_dask.errors import CheckpointError, DeviceError
from cryosiam_dask.network import build_network


@dataclass(frozen=True, slots=True)
class PredictorSpec:
    """How to predict; travels to the workers instead of the network.

    Attributes
    ----------
    checkpoint, sha256
        The file and its hash: a file that changed meanwhile is refused.
    device
        Where the network runs.
    patch
        Shape of a patch in voxels, (z, y, x) or (y, x).
    classes
        Channels of probabilities and distances.
    batch_size
        Patches evaluated at once on a GPU; never changes a result.
    minimum, maximum
        Intensities that become 0 and 1; what lies outside is clipped.
    mean, std
        Subtracted from the clipped intensities, and divided by.
    threshold
        Probability that a class must reach to become a label.
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
    threshold: float | None = None,
) -> PredictorSpec:
    """Say how to predict with a checkpoint; what is not given is CryoSiam's documented default.

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
    threshold
        See `PredictorSpec` and `default_threshold`.

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
        minimum=minimum,
        maximum=maximum,
        mean=mean,
        std=std,
        threshold=default_threshold(classes) if threshold is None else threshold,
    )


def default_threshold(classes: int) -> float:
    """CryoSiam's documented threshold: 0.9 for a lamella (one class), 0.1 for several classes."""
    return 0.9 if classes == 1 else 0.1


def normalise(voxels: npt.NDArray[Any], spec: PredictorSpec) -> npt.NDArray[np.float32]:
    """Scale intensities as the network was trained to see them.

    Parameters
    ----------
    voxels
        Intensities as stored, any shape and real dtype. NaN and infinity count as the minimum.
    spec
        Gives ``minimum``, ``maximum``, ``mean`` and ``std``.

    Returns
    -------
    ndarray
        ``(clip((v - minimum) / (maximum - minimum), 0, 1) - mean) / std``, float32; a new array.
    """
    with np.errstate(over="ignore"):  # What overflows is infinite, or far outside the range and clipped.
        scaled = voxels.astype(np.float32)
        scaled[~np.isfinite(scaled)] = spec.minimum
        scaled -= spec.minimum
        scaled /= spec.maximum - spec.minimum
    scaled.clip(0, 1, out=scaled)
    scaled -= spec.mean
    scaled /= spec.std
    return scaled


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device that is used.

    Parameters
    ----------
    device
        ``"auto"``: CUDA where it can be used, else the CPU.

    Raises
    ------
    DeviceError
        If CUDA was asked for and cannot be used: a run never falls back to the CPU silently.
    """
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise DeviceError(
        "device cuda was asked for and must be usable",
        value=(
            "no GPU that PyTorch can use" + (f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "")
            if torch.version.cuda
            else f"PyTorch {torch.__version__}, which was built without CUDA"
        ),
        remedy="Install PyTorch for CUDA and its driver, or use --device cpu",
    )


class Predictor:
    """A network in the memory of its device; `load_predictor` makes one per process.

    Parameters
    ----------
    spec
        How to predict.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be used or is not the one that the specification names.
    DeviceError
        If the device cannot be used.
    """

    def __init__(self, spec: PredictorSpec) -> None:
        device = resolve_device(spec.device)
        checkpoint = read_checkpoint(spec.checkpoint)
        if checkpoint.sha256 != spec.sha256:
            raise CheckpointError(
                "the checkpoint must stay as it is during a run",
                place=spec.checkpoint,
                value="another file than at the start",
                remedy="Start the run again",
            )
        if device == "cuda":
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        with torch.device("meta"):  # The weights come from the checkpoint: none need be made up.
            network = build_network(checkpoint.architecture)
        network.load_state_dict(checkpoint.state, assign=True)
        self.spec = spec
        self.has_distance_head = checkpoint.architecture.has_distance_head
        self._network = network.eval().to(device)

    def predict_patches(
        self, voxels: npt.NDArray[np.float32], wanted: Collection[str]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Predict patches.

        Parameters
        ----------
        voxels
            Normalised, (n, *patch), float32; one patch or more, whatever the batch size.
        wanted
            Which of ``"labels"``, ``"probabilities"`` and ``"distances"`` to return.

        Returns
        -------
        dict
            ``labels`` uint8 (n, *patch): with one class 1 where its probability exceeds the threshold; with several the
            most probable one (the first of equals), or 0 where none reaches the threshold. ``probabilities`` and
            ``distances`` float32 (n, class, *patch), before any threshold.

        Raises
        ------
        CheckpointError
            If distances are wanted and the checkpoint has no distance head.
        DeviceError
            If the GPU's memory does not suffice.
        """
        if "distances" in wanted and not self.has_distance_head:
            raise CheckpointError(
                "the checkpoint must hold a distance head where distances are asked for",
                place=self.spec.checkpoint,
                value="no weights named _model.distance_head",
                remedy="Ask for labels and probabilities only",
            )
        size = 1 if self.spec.device == "cpu" else self.spec.batch_size
        try:
            with torch.inference_mode(), _one_thread():
                parts = [self._evaluate(voxels[i : i + size], size, wanted) for i in range(0, len(voxels), size)]
        except torch.OutOfMemoryError:
            raise DeviceError(
                "a batch of patches must fit into the GPU's memory",
                value=f"batch_size {self.spec.batch_size} and patch_size {list(self.spec.patch)}",
                remedy="Lower hyper_parameters.batch_size, or parameters.data.patch_size if it is 1 already",
            ) from None
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}

    def _evaluate(
        self, voxels: npt.NDArray[np.float32], size: int, wanted: Collection[str]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Predict one batch of at most `size` patches."""
        batch = torch.zeros(size, 1, *voxels.shape[1:], device=self.spec.device)
        # A copy, as torch takes no read-only, foreign-endian or flipped arrays.
        batch[: len(voxels), 0] = torch.from_numpy(np.array(voxels, np.float32, order="C"))
        scores, distances = self._network(batch, distances="distances" in wanted)
        probabilities = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(dim=1)
        result = {"probabilities": probabilities, "distances": distances}
        if "labels" in wanted:
            # Compared in single precision, as the probabilities are.
            threshold = torch.tensor(self.spec.threshold, dtype=torch.float32, device=self.spec.device)
            if scores.shape[1] == 1:
                labels = probabilities[:, 0] > threshold
            else:
                labels = probabilities.masked_fill(probabilities < threshold, 0).argmax(dim=1)
            result["labels"] = labels.to(torch.uint8)
        return {name: result[name][: len(voxels)].cpu().numpy() for name in wanted}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone. The setting belongs to the calling thread, hence anew for every call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_LOADING = threading.Lock()


def load_predictor(spec: PredictorSpec) -> Predictor:
    """The predictor for `spec`, loaded at the first call in a process; the last two are kept.

    Raises
    ------
    CheckpointError, DeviceError
        See `Predictor`.
    """
    with _LOADING:  # Threads that come meanwhile wait for the one that loads.
        return _load(spec)


_load = lru_cache(maxsize=2)(Predictor)
