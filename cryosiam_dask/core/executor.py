"""Executors, which run the tasks of a stage. Every stage takes one as an argument.

A stage knows nothing about Dask. It gives an executor a plain function and a list of items (block indices, slabs). Each
item is a task; the results come back in the order of the items. `SerialExecutor` runs the tasks in this process, one
after the other. It is the default of every stage, so that a stage can be called from a notebook.
`cryosiam_dask.runs.dask_executor.DaskExecutor` runs the tasks on the workers of a Dask cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import CryosiamDaskError, DeviceError, StorageError, is_transient

T = TypeVar("T")
R = TypeVar("R")

#: Called with a name such as ``"predict"``, the number of finished tasks and the number of all tasks.
Progress = Callable[[str, int, int], None]


#: Seconds to wait before each retry after a transient error, usually of a disk: a file server that restarts, or its
#: replacement, usually responds within half a minute.
RETRY_PAUSES = (1.0, 5.0, 25.0)


class Interrupted(Exception):
    """The run is ending: no new task starts, and the results of finished tasks are kept."""


class TakenOver(Interrupted):
    """Another run has taken over the tomogram, because this one was silent for too long, as when a laptop sleeps."""


def with_retries(work: Callable[[], R], check: Callable[[], None] = lambda: None) -> R:
    """Return ``work()``, retried after each of `RETRY_PAUSES` if it fails with a transient error.

    Parameters
    ----------
    work
        A function that can be called repeatedly.
    check
        Called several times a second during a pause; an exception that it raises ends the pause.

    Raises
    ------
    StorageError
        If the last retry fails too.
    """
    for pause in RETRY_PAUSES:
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            LOG.warning("%s: retry in %g s", error, pause)
        wait(pause, check)
    try:
        return work()
    except Exception as error:
        last = retries_exhausted(error)
        if last is error:
            raise
        raise last from error


def wait(seconds: float, check: Callable[[], None]) -> None:
    """Wait, and call `check` several times a second; an exception that it raises ends the wait."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.2))


def retries_exhausted(error: Exception) -> Exception:
    """Return the error to raise after the last retry failed with `error`."""
    if not is_transient(error):
        return error
    if not isinstance(error, CryosiamDaskError):
        error = StorageError(
            "the disk must respond",
            place=getattr(error, "filename", None) or "",
            value=f"{getattr(error, 'strerror', None) or error}, {len(RETRY_PAUSES) + 1} times in "
            f"{sum(RETRY_PAUSES):.0f} s",
        )
    if not isinstance(error, DeviceError):
        error.remedy = "Check the disk, then repeat the command: it resumes after the finished blocks"
    error.transient = False
    return error


class Executor(Protocol):
    """Runs one function over many items."""

    @property
    def workers(self) -> int:
        """How many tasks run at the same time."""
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
            A picklable function, often a `functools.partial`. It may run more than once for an item, so its only side
            effects are idempotent writes of whole chunks.
        items
            Its arguments, one for each task.
        name
            Name of the tasks in the dashboard and in the progress display, for example ``"smooth"``.
        overlap
            Whether a worker may run several of these tasks at the same time, so that one reads or writes while another
            computes. The function must do its own locking. These tasks keep the devices busy; all other tasks run
            next to them.
        done
            Called in this process with each item and its result, in the order of arrival.

        Raises
        ------
        Interrupted
            If the run ends before all tasks have started.
        """
        ...


class SharedExecutor(Executor, Protocol):
    """Runs the tasks of several tomograms at the same time."""

    def share(self, tomogram: str, order: int, progress: Progress) -> Executor:
        """Return an executor for one tomogram; pending tasks with the lowest `order` run first."""
        ...

    @property
    def tasks_wanted(self) -> int:
        """How many more pending tasks would keep all devices busy; 0 until a first task has succeeded."""
        ...

    def drain(self) -> None:
        """Start no more tasks; those in flight finish."""
        ...

    def abandon(self) -> None:
        """Start no more tasks, and do not wait for those in flight."""
        ...


class SerialExecutor:
    """Runs every task in this process, in order."""

    workers = 1
    tasks_wanted = 0

    def __init__(self) -> None:
        self._drained = False

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        done: Callable[[T, R], None] | None = None,
        **unused: Any,
    ) -> list[R]:
        """See `Executor`."""
        results = []
        for item in items:
            if self._drained:
                raise Interrupted
            results.append(with_retries(partial(function, item)))
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
    """An executor for one of several models, whose name it puts before the names of tasks.

    Attributes
    ----------
    executor
        Runs the tasks.
    model
        Name of the model: with ``"lamella"``, ``"predict"`` becomes ``"lamella predict"``.
    """

    executor: Executor
    model: str

    @property
    def workers(self) -> int:
        """See `Executor`."""
        return self.executor.workers

    def map(self, function: Callable[[T], R], items: Sequence[T], *, name: str, **options: Any) -> list[R]:
        """See `Executor`."""
        return self.executor.map(function, items, name=f"{self.model} {name}", **options)


@dataclass(frozen=True, slots=True)
class GuardedExecutor:
    """An executor for a tomogram that another run may take over.

    Attributes
    ----------
    executor
        Runs the tasks.
    guard
        Raises `TakenOver` if that has happened; called before the tasks, when they fail, and before a result is
        recorded.
    share
        Returns the number of runs that share the workers.
    """

    executor: Executor
    guard: Callable[[], None]
    share: Callable[[], int] = lambda: 1

    @property
    def workers(self) -> int:
        """See `Executor`."""
        return -(-self.executor.workers // max(1, self.share()))

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        done: Callable[[T, R], None] | None = None,
        **options: Any,
    ) -> list[R]:
        """See `Executor`."""

        def record(item: T, result: R) -> None:
            self.guard()
            if done:
                done(item, result)

        self.guard()
        try:
            return self.executor.map(function, items, done=record, **options)
        except Exception:
            self.guard()  # a takeover by another run is the likely cause of the failure
            raise


def all_workers(executor: Executor) -> int:
    """Return how many tasks of all tomograms and models together run at the same time."""
    while isinstance(executor, NamedExecutor | GuardedExecutor):
        executor = executor.executor
    return executor.workers


SERIAL = SerialExecutor()
