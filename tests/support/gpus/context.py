"""What a worker loads first: it makes the context of its GPU, at which a broken one fails."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any


def make_context() -> None:
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
    if gpu in os.environ.get("FAKE_BROKEN", "").split():
        raise RuntimeError("CUDA_ERROR_UNKNOWN")


def dask_setup(_: object) -> None:
    """Called by Dask in each worker that is pinned to a GPU."""
    try:
        make_context()
    except RuntimeError:
        logging.getLogger("dask_cuda.initialize").exception("Unable to start CUDA Context")


class Device:
    """A GPU as dask-cuda itself has it."""

    def set_current(self) -> None:
        make_context()


def modules() -> dict[str, ModuleType]:
    """What dask-cuda makes a context with."""
    package, core = ModuleType("cuda"), ModuleType("cuda.core")
    values: dict[str, Any] = {"Device": Device}
    core.__dict__.update(values)
    return {"cuda": package, "cuda.core": core}
