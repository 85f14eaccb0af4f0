"""NVIDIA's management library faked: what dask-cuda and distributed ask of it."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    def __str__(self) -> str:
        return "NVML Shared Library Not Found"


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_Unknown(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_InvalidArgument(NVMLError):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    def __str__(self) -> str:
        return "GPU is lost"


NVML_DEVICE_MIG_DISABLE, NVML_DEVICE_MIG_ENABLE = 0, 1


def modules() -> dict[str, ModuleType]:
    return {"pynvml": sys.modules[__name__]}


def nvmlInit() -> None:
    if os.environ.get("FAKE_NVML") == "missing":
        raise NVMLError_LibraryNotFound


def nvmlDeviceGetCount() -> int:
    return int(os.environ["FAKE_GPUS"])


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    if not 0 <= index < nvmlDeviceGetCount():
        raise NVMLError_InvalidArgument
    if str(index) in os.environ.get("FAKE_LOST", "").split():
        raise NVMLError_GpuIsLost
    return index


def nvmlDeviceGetIndex(handle: int) -> int:
    return handle


def nvmlDeviceIsMigDeviceHandle(handle: int) -> bool:
    return False


def nvmlDeviceGetMigMode(handle: int) -> list[int]:
    raise NVMLError_NotSupported


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:
    return []


def nvmlDeviceGetUUID(handle: int) -> str:
    return f"GPU-0000000{handle}-0000-0000-0000-000000000000"


def nvmlDeviceGetHandleByUUID(uuid: bytes) -> int:
    for handle in range(nvmlDeviceGetCount()):
        if nvmlDeviceGetUUID(handle).encode() == uuid:
            return nvmlDeviceGetHandleByIndex(handle)
    raise NVMLError_NotFound


def nvmlDeviceGetCpuAffinity(handle: int, words: int) -> list[int]:
    if os.environ.get("FAKE_AFFINITY") == "missing":
        raise NVMLError_NotSupported
    return [1] * words


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    return SimpleNamespace(total=8_000_000_000, used=1_000_000_000, free=7_000_000_000)


def nvmlDeviceGetUtilizationRates(handle: int) -> SimpleNamespace:
    return SimpleNamespace(gpu=42)


def nvmlDeviceGetName(handle: int) -> str:
    return "Fake GPU"
