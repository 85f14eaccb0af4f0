"""CUDA faked for PyTorch: tensors stay on the CPU, and what is asked of the device is remembered."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

#: Calls of functions that do nothing.
CALLS: Counter[str] = Counter()
STREAMS: list[Stream] = []
_here = threading.local()
_DEVICE = [0]


class Event:
    pass


class Stream:
    """Remembers what was done on it, in order."""

    cuda_stream = 0

    def __init__(self) -> None:
        self.done: list[str] = []
        STREAMS.append(self)

    def record_event(self) -> Event:
        self.done.append("record")
        return Event()

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)
        self.done.append("wait")

    def synchronize(self) -> None:
        self.done.append("synchronize")


def current() -> Stream | None:
    return getattr(_here, "stream", None)


@contextmanager
def stream(chosen: Stream) -> Any:
    before, _here.stream = current(), chosen
    try:
        yield
    finally:
        _here.stream = before


def visible(count: int) -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if named is None else [name for name in named.split(",") if name]


def gpu(device: int | None = None) -> str:
    """The name of a GPU, by default of the one that this process uses."""
    names = visible(int(os.environ.get("FAKE_GPUS", 1)))
    return names[_DEVICE[0] if device is None else device] if names else ""


def chosen(variable: str, device: int | None = None) -> bool:
    """Whether a variable names a GPU."""
    return gpu(device) in os.environ.get(variable, "").split()


def install(torch: Any, patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Fake GPUs; `patch` sets an attribute, as `pytest.MonkeyPatch.setattr` does."""
    CALLS.clear()
    STREAMS.clear()
    _DEVICE[0] = 0

    def on_cpu(value: Any) -> Any:
        device = value.type if isinstance(value, torch.device) else value
        return "cpu" if isinstance(device, str) and device.startswith("cuda") else value

    def redirected(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            return function(*map(on_cpu, arguments), **{name: on_cpu(value) for name, value in options.items()})

        return call

    def counted(name: str) -> Callable[..., None]:
        return lambda *_, **__: CALLS.update([name])

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if (there := current()) is not None:
                there.done.append(name)
            return function(*arguments, **options)

        return call

    def sized(function: Callable[..., Any]) -> Callable[..., Any]:
        """A batch of more voxels than FAKE_VOXELS does not fit."""

        def call(*shape: Any, **options: Any) -> Any:
            most, batch = int(os.environ.get("FAKE_VOXELS", 0)), shape if len(shape) > 3 else ()
            voxels = 1
            for size in batch:
                voxels *= size
            if batch and chosen("FAKE_KILLS"):
                os.kill(os.getpid(), signal.SIGKILL)
            if most and voxels > most and batch:
                kind = torch.OutOfMemoryError if os.environ.get("FAKE_ERROR") is None else RuntimeError
                raise kind(os.environ.get("FAKE_ERROR", "CUDA out of memory. Tried to allocate 9 GiB"))
            return function(*shape, **options)

        return call

    def properties() -> list[SimpleNamespace]:
        """Of the GPUs that are visible by now: a worker is pinned after it has loaded PyTorch."""
        return [
            SimpleNamespace(name="Fake GPU", uuid=f"GPU-0000000{name}-0000-0000-0000-000000000000")
            for name in visible(int(os.environ.get("FAKE_GPUS", 1)))
        ]

    def working(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(device: int | None = None) -> Any:
            if chosen("FAKE_BROKEN", device):
                raise torch.AcceleratorError("CUDA error: unknown error")
            return function(device)

        return call

    def memory(device: int | None = None) -> tuple[int, int]:
        sizes = os.environ.get("FAKE_MEMORY", "").split() or ["8"]
        number = int(gpu(device)) if gpu(device).isdecimal() else 0
        total = int(float(sizes[number % len(sizes)]) * 1e9)
        return total * 7 // 8, total

    def load(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(network: Any, device: Any = None, *arguments: Any, **options: Any) -> Any:
            if device == "cuda" and chosen("FAKE_NO_ROOM"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
            return function(network, *(() if device is None else (device,)), *arguments, **options)

        return call

    for name, value in {
        "Stream": Stream,
        "stream": stream,
        "is_available": lambda: bool(properties()),
        "device_count": lambda: len(properties()),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "Fake GPU",
        "set_device": lambda device: _DEVICE.__setitem__(0, device),
        "get_device_properties": working(lambda device: properties()[device or 0]),
        "mem_get_info": working(memory),
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": counted("reset_peak_memory_stats"),
        "init": counted("init"),
        "empty_cache": counted("empty_cache"),
        "set_per_process_memory_fraction": counted("set_per_process_memory_fraction"),
    }.items():
        patch(torch.cuda, name, value)
    patch(torch.version, "cuda", "13.0")
    patch(torch.backends.cudnn, "version", lambda: 92000)
    patch(torch.Tensor, "pin_memory", lambda self: self.clone())
    patch(torch.Tensor, "record_stream", lambda self, _: None)
    patch(torch.Tensor, "to", noted("to", redirected(torch.Tensor.to)))
    patch(torch.Tensor, "cpu", noted("cpu", torch.Tensor.cpu))
    patch(torch.nn.Module, "to", load(redirected(torch.nn.Module.to)))
    # At its first use, `torch.device` as a context remembers the functions that it affects: the real ones.
    with torch.device("meta"):
        torch.empty(0)
    for name in ("empty", "tensor", "ones", "full", "zeros"):
        function = redirected(getattr(torch, name))
        patch(torch, name, noted(name, sized(function)))
