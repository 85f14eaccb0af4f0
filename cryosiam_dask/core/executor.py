"""How a stage runs its per-chunk functions: an executor is an argument of every stage.

A stage knows nothing of Dask. It hands a plain function and a list of items (chunk indices, slabs) to an executor and
receives the results in the order of the items. `SerialExecutor` runs them here, one after the other, and is the default
of every stage, so that each can be called from a notebook; `cryosiam_dask.runs.dask_executor.DaskExecutor` runs them
on the workers of a Dask cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import CryosiamDaskError, StorageError, is_transient

T = TypeVar("T")
R = TypeVar("R")

#: Called with the name of the running step, the calls done and the calls in all.
Progress = Callable[[str, int, int], None]


#: Seconds before what met an error of the disk that may pass is tried again: a server that restarts, or another one
#: that takes its place, is there within about half a minute.
RETRY_PAUSES = (1.0, 5.0, 25.0)


class Interrupted(Exception):
    """No more calls are begun: the run is to end, and what has been done stays done."""


class TakenOver(Interrupted):
    """Another run works on the tomogram, which this one left alone for too long, as a laptop does that slept."""


def with_retries(work: Callable[[], R], check: Callable[[], None] = lambda: None) -> R:
    """Return ``work()``, tried again after each of `RETRY_PAUSES` where an error of the disk ends it that may pass.

    Parameters
    ----------
    work
        May be repeated.
    check
        Called several times a second during a pause; what it raises ends it.

    Raises
    ------
    StorageError
        If the disk fails for longer.
    """
    for pause in RETRY_PAUSES:
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            LOG.warning("%s: tried again in %g s", error, pause)
        wait(pause, check)
    try:
        return work()
    except Exception as error:
        last = retries_exhausted(error)
        if last is error:
            raise
        raise last from error


def wait(seconds: float, check: Callable[[], None]) -> None:
    """Wait, and call `check` several times a second; what it raises ends it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.2))


def retries_exhausted(error: Exception) -> Exception:
    """What to raise of an error that was to pass and has not."""
    if not is_transient(error):
        return error
    if not isinstance(error, CryosiamDaskError):
        error = StorageError(
            "the disk must answer",
            place=getattr(error, "filename", None) or "",
            value=f"{getattr(error, 'strerror', None) or error}, {len(RETRY_PAUSES) + 1} times in "
            f"{sum(RETRY_PAUSES):.0f} s",
        )
    error.remedy = "Look at the disk, then repeat the command: it goes on from the blocks that are done"
    error.transient = False
    return error


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
    def tasks_wanted(self) -> int:
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
    tasks_wanted = 0

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


@dataclass(frozen=True, slots=True)
class GuardedExecutor:
    """An executor for work that another run may take over.

    Attributes
    ----------
    executor
        Runs the calls.
    guard
        Raises `TakenOver` where it has been; asked before and after calls, and before a result is recorded.
    share
        Of how many workers there are, one in so many is to be kept busy.
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
        name: str,
        overlap: bool = False,
        done: Callable[[T, R], None] | None = None,
    ) -> list[R]:
        """See `Executor`."""

        def record(item: T, result: R) -> None:
            self.guard()
            if done:
                done(item, result)

        self.guard()
        try:
            return self.executor.map(function, items, name=name, overlap=overlap, done=record)
        except Exception:
            self.guard()  # most likely it failed of what the other run does
            raise


def all_workers(executor: Executor) -> int:
    """How many calls run at the same time, for whatever executors of several tomograms or models share them."""
    while isinstance(executor, NamedExecutor | GuardedExecutor):
        executor = executor.executor
    return executor.workers


SERIAL = SerialExecutor()
