"""cupy and cucim faked with numpy: as strict about arrays of the host as they are, and with errors on demand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import cc3d
import numpy as np

CALLS: Counter[str] = Counter()
#: Raised by the next calls of `label` and `gaussian_filter1d`, one each; ``None`` lets a call pass.
ERRORS: list[Exception | None] = []


class OutOfMemoryError(MemoryError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


OutOfMemoryError.__module__ = "cupy.cuda.memory"
CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


class Array:
    """An array on the device."""

    __array_priority__ = 1000
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return call(getattr(ufunc, method), *inputs, **options)

    def __getitem__(self, key: Any) -> Any:
        return wrap(self.values[tuple(map(host, key)) if isinstance(key, tuple) else host(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.values[tuple(map(host, key)) if isinstance(key, tuple) else host(key)] = host(value)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __int__(self) -> int:
        return int(self.values)

    def __len__(self) -> int:
        return len(self.values)


def host(value: Any) -> Any:
    """The values of an array on the device; one of the host is refused, as cupy does."""
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value.values if isinstance(value, Array) else value


def wrap(value: Any) -> Any:
    return Array(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return wrap(function(*map(host, arguments), **{name: host(value) for name, value in options.items()}))


for name in ("shape", "dtype", "ndim", "size", "nbytes"):
    setattr(Array, name, property(lambda self, name=name: getattr(self.values, name)))
for name in ("reshape", "astype", "any", "all", "take", "copy", "ravel", "sum", "max", "min"):
    setattr(Array, name, lambda self, *a, name=name, **k: call(getattr(self.values, name), *a, **k))
for name in ("gt", "lt", "ge", "le", "eq", "ne", "add", "sub", "mul", "radd", "rsub", "rmul", "and", "or"):
    setattr(Array, f"__{name}__", lambda self, other, name=name: call(getattr(self.values, f"__{name}__"), other))


def fail() -> None:
    error = ERRORS.pop(0) if ERRORS else None
    if error is not None:
        raise error


def label(label_image: Array, background: Any = None, return_num: bool = False, connectivity: Any = None) -> Any:
    CALLS["label"] += 1
    fail()
    assert label_image.values.flags.c_contiguous and background == 0 and return_num
    labels, count = cc3d.connected_components(
        label_image.values, connectivity={1: 6, 2: 18, 3: 26}[connectivity], return_N=True
    )
    return Array(labels.astype(np.int32)), count


def gaussian_filter1d(
    input: Array, sigma: float, axis: int = -1, order: int = 0, output: Any = None, mode: str = "reflect",
    cval: float = 0.0, truncate: float = 4.0,
) -> Array:  # fmt: skip
    """Sums in the precision of the input, as cupyx does."""
    CALLS["gaussian"] += 1
    fail()
    assert mode == "constant" and not order and not cval
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 / sigma**2 * np.arange(-radius, radius + 1) ** 2)
    weights = (weights / weights.sum()).astype(np.promote_types(input.values.dtype, np.float32))
    values = np.moveaxis(input.values.astype(weights.dtype), axis, 0)
    padded = np.pad(values, [(radius, radius), *[(0, 0)] * (values.ndim - 1)])
    total = np.zeros_like(values)
    for i, weight in enumerate(weights):
        total += padded[i : i + len(values)] * weight
    return Array(np.ascontiguousarray(np.moveaxis(total, 0, axis)).astype(output or input.values.dtype))


class PythonFunctionAllocator:
    def __init__(self, malloc_func: Callable[[int, int], int], free_func: Callable[[int, int], None]) -> None:
        self.functions = malloc_func, free_func

    def malloc(self, size: int) -> None:
        raise AssertionError


def modules() -> dict[str, ModuleType]:
    """The modules by name, made anew."""
    names = ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.ndimage", "cucim", "cucim.skimage", "cucim.skimage.measure")
    made = {name: ModuleType(name) for name in names}
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    cupy: Any = made["cupy"]
    cupy.cuda = SimpleNamespace(
        PythonFunctionAllocator=PythonFunctionAllocator,
        set_allocator=lambda _: CALLS.update(["set_allocator"]),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
        runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 0),
    )
    cupy.ndarray = Array
    cupy.asarray = lambda values, *a, **k: Array(np.array(getattr(values, "values", values), *a, **k))
    cupy.asnumpy = lambda values: np.array(host(values))
    for name in ("empty", "flatnonzero", "diff", "not_equal"):
        setattr(cupy, name, lambda *a, name=name, **k: call(getattr(np, name), *a, **k))
    made["cupyx.scipy.ndimage"].gaussian_filter1d = gaussian_filter1d  # type: ignore[attr-defined]
    made["cucim.skimage.measure"].label = label  # type: ignore[attr-defined]
    return made


def install(set_module: Callable[[str, ModuleType], object] = sys.modules.__setitem__) -> None:
    CALLS.clear()
    ERRORS.clear()
    for name, module in modules().items():
        set_module(name, module)
