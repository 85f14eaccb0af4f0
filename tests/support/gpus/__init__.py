"""GPUs faked on machines without any, in a test's process and in those that it starts.

They show wrong calls, wrong pinning and wrong recovery; nothing about numbers, memory or speed of a GPU. dask-cuda is
faked only where it is not installed. Variables of the environment say what is there and what fails:

FAKE_GPUS
    Number of GPUs.
FAKE_NVML, FAKE_AFFINITY
    ``missing``: the driver has no such function.
FAKE_DIE
    Names of the GPUs whose workers die while they start, separated by spaces.
FAKE_DIE_ONCE
    A file: the first worker for which it does not exist makes it and dies while it starts.
FAKE_LOST
    Names of the GPUs that the driver has lost.
FAKE_MEMORY
    Gigabytes of the GPUs, separated by spaces.
FAKE_BROKEN, FAKE_NO_ROOM, FAKE_KILLS
    Names of the GPUs that PyTorch finds but cannot use, on which no network fits, and that kill each process that
    computes a batch.
FAKE_VOXELS, FAKE_ERROR
    Voxels of the largest batch that fits, and PyTorch's message if a larger one does not.
"""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent


def environment(count: int, **variables: object) -> dict[str, str]:
    """The environment of a process with so many faked GPUs."""
    path = os.pathsep.join(map(str, (HERE / "start", HERE.parents[1])))
    return {**os.environ, "PYTHONPATH": path, "FAKE_GPUS": str(count), **{k: str(v) for k, v in variables.items()}}
