"""What a worker loads first: it makes the context of its GPU, at which a broken one fails."""

from __future__ import annotations

import os
from pathlib import Path


def dask_setup(_: object) -> None:
    """Called by Dask in each worker that is pinned to a GPU."""
    gpu = os.environ["CUDA_VISIBLE_DEVICES"].partition(",")[0]
    dies = gpu in os.environ.get("FAKE_DIE", "").split()
    if mark := os.environ.get("FAKE_DIE_ONCE"):
        try:
            Path(mark).touch(exist_ok=False)
            dies = True
        except FileExistsError:
            pass
    if dies:
        os._exit(3)
