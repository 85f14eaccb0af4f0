"""Classify the errors of a GPU: out of memory, where a retry may succeed, or a GPU that this process has lost.

PyTorch, cuDNN, cuBLAS and cupy report both in their own ways. This module recognises their errors without importing
them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cryosiam_dask.errors import LostDeviceError

#: Parts of the messages of PyTorch, cuDNN, cuBLAS and CUDA for too little memory. cuDNN finds no engine for a
#: convolution if each of them needs more workspace than there is.
_MEMORY = (
    "out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
)  # fmt: skip
#: Parts of the messages of other errors of the device, which PyTorch and cupy raise as a plain `RuntimeError`.
_DEVICE = ("CUDA error", "CUDA driver error", "cuDNN error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "CuPy failed to load")


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error means that a GPU ran out of memory.

    >>> memory_ran_out(RuntimeError("GET was unable to find an engine to execute this computation"))
    True
    >>> memory_ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))
    False
    """
    if _is(error, "torch", "OutOfMemoryError") or _is(error, "cupy", "OutOfMemoryError"):
        return True
    # Thrust, which sorts for cupy, raises a `MemoryError`.
    return isinstance(error, RuntimeError | MemoryError) and any(part in str(error) for part in _MEMORY)


def device_failed(error: BaseException) -> bool:
    """Whether an error, which must not be `memory_ran_out`, means that this process can no longer use its GPU.

    >>> device_failed(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")), device_failed(RuntimeError("no"))
    (True, False)
    """
    if _is(error, "torch", "AcceleratorError") or _is(error, "cupy"):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _DEVICE)


def _is(error: BaseException, library: str, name: str = "") -> bool:
    """Whether an error's class belongs to a library and, if `name` is given, has that name."""
    return any(kind.__module__.startswith(library) and name in kind.__name__ for kind in type(error).__mro__)


@contextmanager
def lost_device_reported() -> Iterator[None]:
    """Raise a `LostDeviceError` instead of an error after which this process can no longer use its GPU."""
    try:
        yield
    except Exception as error:
        if memory_ran_out(error) or not device_failed(error):
            raise
        raise LostDeviceError(
            "the GPU must work until the end of the run",
            place=f"process {os.getpid()} on {socket.gethostname()}",
            value=_first_line(error),
            remedy="Check the GPU with nvidia-smi and dmesg",
        ) from None


@contextmanager
def out_of_memory_caught() -> Iterator[list[str]]:
    """Suppress an out-of-memory error of a GPU, and append its first line to the yielded list.

    The caller frees memory and tries again after the ``with`` block, because the error keeps the arrays of the failed
    attempt alive. Other errors of the GPU become `LostDeviceError`, as in `lost_device_reported`.
    """
    refused: list[str] = []
    try:
        with lost_device_reported():
            yield refused
    except Exception as error:
        if not memory_ran_out(error):
            raise
        refused.append(_first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def has_gpu() -> bool:
    """Whether this process can use a GPU."""
    import torch

    return torch.cuda.is_available()


def free_memory() -> None:
    """Release the GPU memory that PyTorch caches; cupy allocates through PyTorch and caches none."""
    import torch

    torch.cuda.empty_cache()


def share_memory(cupy: Any) -> None:
    """Let cupy allocate through PyTorch, because each library would cache freed memory that the other one needs."""
    import torch

    def allocate(size: int, device: int) -> int:
        return int(torch.cuda.caching_allocator_alloc(size, device, cupy.cuda.get_current_stream().ptr))

    def free(pointer: int, _: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)  # type: ignore[no-untyped-call]

    torch.cuda.init()  # type: ignore[no-untyped-call]
    cupy.cuda.set_allocator(cupy.cuda.PythonFunctionAllocator(allocate, free).malloc)
