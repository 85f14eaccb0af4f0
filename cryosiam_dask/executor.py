"""How a stage runs its per-chunk functions: an executor is an argument of every stage.

A stage knows nothing of Dask. It hands a plain function and a list of items (chunk indices, slabs) to an executor and
receives the results in the order of the items. `SerialExecutor` runs them here, one after the other, and is the default
of every stage, so that each can be called from a notebook; `cryosiam_dask.cluster.DaskExecutor` runs them on the
workers of a Dask cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Called with the name of the running step, the calls done and the calls in all.
Progress = Callable[[str, int, int], None]


class Interrupted(Exception):
    """No more calls are begun: the run is to end, and what has been done stays done."""


class Executor(Protocol):
    """Runs one function over many items."""

    @property
    def workers(self) -> int:
        """How many calls run at the same time."""
        ...

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        name: str,
        overlap: bool = False,
        done: Callable[[T, R], None] | None = None,
    ) -> list[R]:
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
            the other computes. The function itself sees to it that they take turns where they must. These calls are
            the ones that keep the devices busy; all others are done beside them.
        done
            Called here with each item and its result, in the order in which they arrive.

        Raises
        ------
        Interrupted
            If the run is to end and calls are left.
        """
        ...


class SharedExecutor(Executor, Protocol):
    """Runs the calls of several tomograms at the same time."""

    def share(self, tomogram: str, order: int, progress: Progress) -> Executor:
        """An executor for one tomogram; of calls that wait, those of the lowest `order` are run first."""
        ...

    @property
    def hunger(self) -> int:
        """How many more calls should wait so that no device soon has nothing to do; 0 until a first one succeeded."""
        ...

    def drain(self) -> None:
        """Begin no more calls; what runs is finished."""
        ...

    def abandon(self) -> None:
        """Begin no more calls, and wait for none."""
        ...


class SerialExecutor:
    """Runs every call in this process, in order."""

    workers = 1
    hunger = 0

    def __init__(self) -> None:
        self._drained = False

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        name: str,
        overlap: bool = False,
        done: Callable[[T, R], None] | None = None,
    ) -> list[R]:
        """Return ``[function(item) for item in items]``; `name` and `overlap` are not used."""
        results = []
        for item in items:
            if self._drained:
                raise Interrupted
            results.append(function(item))
            if done:
                done(item, results[-1])
        return results

    def share(self, tomogram: str, order: int, progress: Progress) -> Executor:
        """See `SharedExecutor`."""
        return self

    def drain(self) -> None:
        """See `SharedExecutor`."""
        self._drained = True

    abandon = drain


@dataclass(frozen=True, slots=True)
class NamedExecutor:
    """An executor for one of several models, whose steps bear its name.

    Attributes
    ----------
    executor
        Runs the calls.
    model
        Such as ``"lamella"``: the step ``"predict"`` becomes ``"lamella predict"``.
    """

    executor: Executor
    model: str

    @property
    def workers(self) -> int:
        """See `Executor`."""
        return self.executor.workers

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        name: str,
        overlap: bool = False,
        done: Callable[[T, R], None] | None = None,
    ) -> list[R]:
        """See `Executor`."""
        return self.executor.map(function, items, name=f"{self.model} {name}", overlap=overlap, done=done)


SERIAL = SerialExecutor()
