"""CUDA faked for PyTorch: tensors stay on the CPU, and what is asked of the device is remembered."""

from __future__ import annotations

import os
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


def install(torch: Any, patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Fake GPUs; `patch` sets an attribute, as `pytest.MonkeyPatch.setattr` does."""
    CALLS.clear()
    STREAMS.clear()

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

    for name, value in {
        "Stream": Stream,
        "stream": stream,
        "is_available": lambda: bool(properties()),
        "device_count": lambda: len(properties()),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "Fake GPU",
        "get_device_properties": lambda device: properties()[device],
        "mem_get_info": lambda *_: (7 * 10**9, 8 * 10**9),
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
    patch(torch.nn.Module, "to", redirected(torch.nn.Module.to))
    for name in ("empty", "tensor", "ones", "full", "zeros"):
        function = redirected(getattr(torch, name))
        patch(torch, name, noted(name, sized(function)))
