"""Run by Python in each process that has this folder in PYTHONPATH: replaces what needs a GPU when it is imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_FAKES = {"cupy": "fake_cupy", "cupyx": "fake_cupy", "cucim": "fake_cupy", "pynvml": "fake_pynvml"}
# The real dask-cuda, where it is installed, is strictest.
_REAL = importlib.machinery.PathFinder.find_spec("dask_cuda") is not None
_FAKES |= {"cuda": "context"} if _REAL else {"dask_cuda": "fake_dask_cuda"}


class _Made(importlib.abc.Loader):
    """Loads a module that is faked as a whole."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fake := _FAKES.get(name.partition(".")[0]):
            made = dict(importlib.import_module(f"support.gpus.{fake}").modules()).get(name)
            return None if made is None else importlib.machinery.ModuleSpec(name, _Made(made), is_package=True)
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            from support.gpus import fake_torch

            fake_torch.install(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FAKE_GPUS" in os.environ:
    sys.meta_path.insert(0, _Finder())
