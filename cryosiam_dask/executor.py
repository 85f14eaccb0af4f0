"""How a stage runs its per-chunk functions: an executor is an argument of every stage.

A stage knows nothing of Dask. It hands a plain function and a list of items (chunk indices, slabs) to an executor and
receives the results in the order of the items. `SerialExecutor` runs them here, one after the other, and is the default
of every stage, so that each can be called from a notebook; `cryosiam_dask.cluster.DaskExecutor` runs them on the
workers of a Dask cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """Runs one function over many items."""

    @property
    def workers(self) -> int:
        """How many calls run at the same time."""
        ...

    def map(self, function: Callable[[T], R], items: Sequence[T], *, name: str, overlap: bool = False) -> list[R]:
        """Return ``[function(item) for item in items]``.

        Parameters
        ----------
        function
            A picklable function (often a `functools.partial`) without side effects other than idempotent writes of
            whole chunks: it may run more than once for an item.
        items
            Its arguments, one call for each.
        name
            What the calls are called in the dashboard and in the progress display, for example ``"smooth"``.
        overlap
            Whether a worker may begin a call while it still works on another one, so that one reads or writes while
            the other computes. The function itself sees to it that they take turns where they must.
        """
        ...


class SerialExecutor:
    """Runs every call in this process, in order."""

    workers = 1

    def map(self, function: Callable[[T], R], items: Sequence[T], *, name: str, overlap: bool = False) -> list[R]:
        """Return ``[function(item) for item in items]``; `name` and `overlap` are not used."""
        return [function(item) for item in items]


SERIAL = SerialExecutor()
