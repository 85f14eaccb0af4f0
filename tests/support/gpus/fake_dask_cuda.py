"""dask-cuda faked: it pins a worker to each GPU, and opens with fewer workers if some die, as the real one does."""

from __future__ import annotations

import copy
import os
import warnings
from types import ModuleType
from typing import Any

from distributed import LocalCluster

from support.gpus import fake_pynvml as nvml


def parse_cuda_visible_device(name: Any) -> int | str:
    try:
        return int(name)
    except ValueError:
        if name.startswith(("GPU-", "MIG-")):
            return str(name)
        raise ValueError("Devices in CUDA_VISIBLE_DEVICES must be comma-separated integers or strings …") from None


def get_gpu_handle(device: int | str) -> int:
    nvml.nvmlInit()
    try:
        if device and not str(device).isnumeric():
            assert isinstance(device, str), "descriptor 'encode' for 'str' objects doesn't apply"
            return nvml.nvmlDeviceGetHandleByUUID(device.encode())
        return nvml.nvmlDeviceGetHandleByIndex(device)
    except nvml.NVMLError:
        raise ValueError(f"Invalid device index or UUID: {device}") from None


def get_gpu_count() -> int:
    nvml.nvmlInit()
    return nvml.nvmlDeviceGetCount()


def get_cpu_affinity(device: int | str) -> list[int]:
    try:
        nvml.nvmlDeviceGetCpuAffinity(get_gpu_handle(device), 1)
    except (nvml.NVMLError, ValueError):
        warnings.warn("Cannot get CPU affinity for device with index %d" % device, stacklevel=2)  # noqa: UP031
    return list(os.sched_getaffinity(0))


class LocalCUDACluster(LocalCluster):  # type: ignore[misc]
    def __init__(self, CUDA_VISIBLE_DEVICES: list[Any], threads_per_worker: int, **options: Any) -> None:
        self.cuda_visible_devices = [parse_cuda_visible_device(name) for name in CUDA_VISIBLE_DEVICES]
        nvml.nvmlDeviceGetMemoryInfo(get_gpu_handle(self.cuda_visible_devices[0]))
        super().__init__(n_workers=0, threads_per_worker=threads_per_worker, processes=True, **options)
        self.new_spec["options"]["preload"] = ["support.gpus.context"]
        self.scale(len(self.cuda_visible_devices))  # in the background, where nobody sees the error of a worker
        self.sync(self._correct_state)

    def new_worker_spec(self) -> dict[Any, Any]:
        try:
            name = min(set(self.cuda_visible_devices) - set(self.worker_spec))
        except ValueError:
            raise ValueError("Can not scale beyond visible devices", self.cuda_visible_devices) from None
        nvml.nvmlDeviceGetMemoryInfo(get_gpu_handle(name))
        get_cpu_affinity(name)
        first = self.cuda_visible_devices.index(name)
        spec = copy.deepcopy(self.new_spec)
        in_turn = self.cuda_visible_devices[first:] + self.cuda_visible_devices[:first]
        spec["options"]["env"] = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, in_turn))}
        return {name: spec}


def modules() -> dict[str, ModuleType]:
    package: Any = ModuleType("dask_cuda")
    utils: Any = ModuleType("dask_cuda.utils")
    package.utils, package.LocalCUDACluster = utils, LocalCUDACluster
    for function in (parse_cuda_visible_device, get_gpu_handle, get_gpu_count, get_cpu_affinity):
        setattr(utils, function.__name__, function)
    return {"dask_cuda": package, "dask_cuda.utils": utils}
