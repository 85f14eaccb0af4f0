"""Train the three small models of the demo on phantoms and write them as checkpoints in CryoSiam's format::

    python training/train_demo_models.py denoise     # 500 steps, about 8 minutes on one core
    python training/train_demo_models.py lamella     # 400 steps, about 8 minutes on one core
    python training/train_demo_models.py semantic    # 1000 steps, about 20 minutes on one core

1. Random patches of phantoms whose seeds are far from the demo's; patches for the semantic model are centred near a
   voxel of a class drawn at random, so that thin filaments count as much as large vesicles.
2. Cross entropy plus the soft Dice loss train everything but the distance head.
3. The distance head then learns how deep inside its class each voxel lies, while the rest stands still.
4. The denoiser learns, with the mean squared error, what a phantom was before noise was added, from patches that are
   prepared as `cryosiam_dask.stages.denoise` prepares them.
5. Batch norms take their means and variances over whole patches of the size that prediction uses.

The same machine and library versions give the same file: seeds are fixed and torch runs on one thread.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cryosiam_dask.core.phantom import CLASS_NAMES, make_phantom, make_raw
from cryosiam_dask.model.network import Architecture, Network
from cryosiam_dask.stages.denoise import PERCENTS
from support.checkpoints import HIDDEN, saved

MODELS = Path(__file__).parents[1] / "cryosiam_dask" / "data" / "models"
FIRST_SEED, PHANTOMS = 1000, 60
PATCH, TRAINING_PATCH, BATCH = 64, 48, 2
LEARNING_RATE = 5e-3
DISTANCE_STEPS = 100
DEPTH = 5  # voxels; deeper inside counts as this deep


@dataclass(frozen=True, slots=True)
class Task:
    """What a model learns: one weight in the cross entropy for each class, a single one for the lamella."""

    name: str
    steps: int
    weights: tuple[float, ...]


TASKS = {
    "denoise": Task("denoise", 500, ()),
    "lamella": Task("lamella", 400, (1.0,)),
    "semantic": Task("semantic", 1000, (1.0, 2.0, 2.0, 4.0, 2.0)),
}


class NoisyPatches:
    """An endless supply of random patches (n, 1, z, y, x) of raw phantoms with what they were before."""

    def __init__(self, task: Task) -> None:
        self.rng = np.random.default_rng(FIRST_SEED)
        self.volumes = []
        for seed in range(FIRST_SEED, FIRST_SEED + PHANTOMS):
            phantom = make_phantom(seed)
            noisy = make_raw(phantom, seed).astype(np.float32)
            low, high = np.percentile(noisy, PERCENTS)
            self.volumes.append((np.clip((high - noisy) / (high - low), 0, 1), phantom.tomogram))

    def draw(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Random patches of `size` voxels along each axis."""
        pairs = []
        for _ in range(count):
            noisy, clean = self.volumes[self.rng.integers(len(self.volumes))]
            start = self.rng.integers(0, [s - size // 4 for s in clean.shape])
            index = np.ix_(*((np.arange(at, at + size) % s) for at, s in zip(start, clean.shape, strict=True)))
            mirrored = tuple(axis for axis in range(3) if self.rng.random() < 0.5)
            pairs.append([np.flip(each[index], mirrored).astype(np.float32) for each in (noisy, clean)])
        x, y = (torch.from_numpy(np.stack(each)[:, None]) for each in zip(*pairs, strict=True))
        return x.contiguous(memory_format=torch.channels_last_3d), y


class Patches:
    """An endless supply of random patches (n, 1, z, y, x) with their labels (n, z, y, x)."""

    def __init__(self, task: Task) -> None:
        self.rng = np.random.default_rng(FIRST_SEED)
        self.volumes: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = []
        for seed in range(FIRST_SEED, FIRST_SEED + PHANTOMS):
            phantom = make_phantom(seed)
            if task.name == "lamella":
                self.volumes.append((phantom.tomogram, phantom.lamella, []))
            else:
                labels = np.where(phantom.lamella, phantom.truth, 255).ravel()
                inside = [np.flatnonzero(labels == n).astype(np.int32) for n in range(len(CLASS_NAMES))]
                self.volumes.append((phantom.tomogram, phantom.truth, [voxels for voxels in inside if len(voxels)]))

    def draw(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Random patches of `size` voxels along each axis."""
        images, labels = zip(*(self._patch(size) for _ in range(count)), strict=True)
        x = torch.from_numpy(np.stack(images)[:, None])
        return x.contiguous(memory_format=torch.channels_last_3d), torch.from_numpy(np.stack(labels))

    def _patch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        tomogram, truth, by_class = self.volumes[self.rng.integers(len(self.volumes))]
        if by_class:
            voxels = by_class[self.rng.integers(len(by_class))]
            centre = np.array(np.unravel_index(voxels[self.rng.integers(len(voxels))], truth.shape))
            start = centre - size // 2 + self.rng.integers(-size // 3, size // 3 + 1, 3)
            start[0] = np.clip(start[0], 0, truth.shape[0] - size)
        else:
            start = self.rng.integers(0, [s - size // 4 for s in truth.shape])
        # Patches reach around the far edges, as they do in prediction.
        index = np.ix_(*((np.arange(at, at + size) % s) for at, s in zip(start, truth.shape, strict=True)))
        # The missing wedge looks the same in all mirror images.
        mirrored = tuple(axis for axis in range(3) if self.rng.random() < 0.5)
        image = np.flip(tomogram[index], mirrored) * self.rng.normal(1, 0.05) + self.rng.normal(0, 0.02)
        return image.astype(np.float32), np.flip(truth[index], mirrored).astype(np.int64)


def semantic_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy plus soft Dice loss of the classes but background, of scores (n, class, z, y, x)."""
    if len(weights) == 1:
        entropy = functional.binary_cross_entropy_with_logits(scores[:, 0], labels.float())
        probabilities, truth = torch.sigmoid(scores), labels[:, None].float()
    else:
        entropy = functional.cross_entropy(scores, labels, weights)
        probabilities = functional.softmax(scores, dim=1)[:, 1:]
        truth = functional.one_hot(labels, len(weights)).movedim(-1, 1)[:, 1:].float()
    voxels = (0, 2, 3, 4)
    overlap, total = (probabilities * truth).sum(voxels), probabilities.sum(voxels) + truth.sum(voxels)
    return entropy + 1 - ((2 * overlap + 1) / (total + 1)).mean()


def depths(labels: Tensor, classes: list[int]) -> Tensor:
    """Distance (n, class, z, y, x) of each voxel of a class from where the class ends: 0 outside, 1 from `DEPTH` on."""
    inside = [[ndimage.distance_transform_edt(patch == n) for n in classes] for patch in labels.numpy()]
    return torch.from_numpy(np.minimum(np.array(inside, np.float32) / DEPTH, 1))


def learning_rates(steps: int) -> Iterator[float]:
    """A short rise, then half a cosine down to 0."""
    for step in range(steps):
        yield LEARNING_RATE * min(1, 20 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def optimise(parameters: Iterator[nn.Parameter], steps: int, loss_of_a_step: Any, title: str) -> None:
    """Run AdamW; print the smoothed loss now and then."""
    optimiser = torch.optim.AdamW(parameters, weight_decay=1e-3)
    smoothed = math.nan
    for step, rate in enumerate(learning_rates(steps)):
        optimiser.param_groups[0]["lr"] = rate
        loss = loss_of_a_step()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        smoothed = loss.item() if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * loss.item()
        if step % 20 == 19:
            print(f"{title} {step + 1}/{steps}: loss {smoothed:.3f}", flush=True)


def train(task: Task) -> Network:
    """Train one model."""
    torch.manual_seed(0)
    if not task.weights:
        return train_denoiser(task)
    patches, weights = Patches(task), torch.tensor(task.weights)
    network = Network(architecture(task))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def semantic_step() -> Tensor:
        x, labels = patches.draw(BATCH, TRAINING_PATCH)
        with torch.autocast("cpu", torch.bfloat16):
            scores, _ = network(x)
        return semantic_loss(scores.float(), labels, weights)

    def distance_step() -> Tensor:
        x, labels = patches.draw(BATCH, TRAINING_PATCH)
        classes = [1] if len(weights) == 1 else list(range(len(weights)))
        with torch.autocast("cpu", torch.bfloat16):
            _, distances = network(x, distances=True)
        return functional.mse_loss(distances.float(), depths(labels, classes))

    learns_first = (p for name, p in network.named_parameters() if not name.startswith("distance_head."))
    optimise(learns_first, task.steps, semantic_step, task.name)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("distance_head."))
    optimise(network.distance_head.parameters(), DISTANCE_STEPS, distance_step, f"{task.name} distances")
    settle_batch_norms(network, patches)
    return network


def train_denoiser(task: Task) -> Network:
    """Train the denoiser."""
    patches, network = NoisyPatches(task), Network(architecture(task))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def step() -> Tensor:
        x, clean = patches.draw(BATCH, TRAINING_PATCH)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = network(x)
        return functional.mse_loss(found.float(), clean)

    optimise(network.parameters(), task.steps, step, task.name)
    settle_batch_norms(network, patches)
    return network


def settle_batch_norms(network: Network, patches: Patches | NoisyPatches) -> None:
    """Let batch norms take the plain average over patches of the size that prediction uses."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for _ in range(30):
            network(patches.draw(1, PATCH)[0], distances=isinstance(patches, Patches))


def architecture(task: Task) -> Architecture:
    """A network small enough to ship; the heads have the widths that CryoSiam builds."""
    return Architecture(
        spatial_dims=3,
        in_channels=1,
        block_type="basic",
        num_layers=(1, 1, 1, 1),
        num_filters=(8, 16, 24, 24),
        fpn_channels=16,
        decoder="fpn",
        later_convolutions=False,
        bifpn_layers=0,
        dense_dim=8 if task.weights else 16,
        out_channels=len(task.weights) or 1,
        semantic_widths=(32, 64) if task.weights else (16, 16),
        distance_widths=(32, 64) if task.weights else None,
        kernel_size=(3, 3, 3),
        denoises=not task.weights,
    )


def checkpoint(network: Network, task: Task) -> dict[str, Any]:
    """The content of a CryoSiam checkpoint; convolutions are stored in half precision, which loads into single."""
    shape = architecture(task)
    width, dense, hidden = shape.level_channels[-1], shape.dense_dim, HIDDEN
    # No prediction uses these parts of CryoSiam's pretraining, but a strict reader misses them.
    pretraining = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"fc": nn.Linear(width, hidden)}),
            "global_projector": nn.Sequential(
                nn.Linear(width, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, hidden),
                nn.BatchNorm1d(hidden, affine=False),
            ),
            "global_predictor": nn.Sequential(
                nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden)
            ),
            "predictor": nn.Sequential(
                nn.Conv3d(dense, hidden, 1, bias=False), nn.BatchNorm3d(hidden), nn.ReLU(), nn.Conv3d(hidden, dense, 1)
            ),
        }
    )
    everything = network.state_dict() | pretraining.state_dict()
    state = {name: tensor.half().contiguous() if tensor.ndim > 1 else tensor for name, tensor in everything.items()}
    return {
        "epoch": 0,
        "global_step": task.steps,
        "pytorch-lightning_version": "2.1.3",
        **saved(state, shape, PATCH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model of the demo.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int, help="optimisation steps, to try something quickly")
    parser.add_argument("--output", type=Path, help="the checkpoint; default: where the package keeps it")
    options = parser.parse_args()
    task = TASKS[options.task]
    task = Task(task.name, options.steps or task.steps, task.weights)
    torch.set_num_threads(1)
    network = train(task)
    path = options.output or MODELS / f"demo_{task.name}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint(network, task), path)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
