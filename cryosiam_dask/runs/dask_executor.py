"""Run tasks on the workers of a Dask cluster: few in flight, in the order of tomograms, retried if a worker is lost."""

from __future__ import annotations

import asyncio
import heapq
import math
import queue
import re
import statistics
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from dask.utils import key_split
from distributed import Client, Future, KilledWorker, LocalCluster, SchedulerPlugin
from distributed.comm import CommClosedError
from distributed.protocol.pickle import dumps, loads

from cryosiam_dask.core.executor import RETRY_PAUSES, Executor, Interrupted, Progress, retries_exhausted
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import (
    CryosiamDaskError,
    DeviceError,
    LostClusterError,
    LostDeviceError,
    is_transient,
)
from cryosiam_dask.runs.workers import R, Setup, T, load_tasks, register_in_workers

#: Tasks in flight for each worker, for tasks that may overlap and again for the others: while one runs, the other one
#: waits, reads or writes, so that the worker is never idle. A worker has a thread for each task.
IN_FLIGHT = 2
#: The same for a worker with a GPU: while it computes one block, it writes another one and reads a third.
IN_FLIGHT_ON_DEVICE = 3
THREADS = 2 * IN_FLIGHT
#: Attempts at a task whose workers die, hang or lose their devices.
TRIES = 3
#: A task hangs if it takes longer than this many seconds and this many times the median of its step.
HANG_SECONDS, _HANG_FACTOR = 900.0, 20.0
#: Seconds without workers until the user is informed; Dask replaces a dead worker sooner.
_NO_WORKER_SECONDS = 60.0
#: Factor on `HANG_SECONDS` for tasks that do not use the device, because one may write hundreds of gigabytes.
_FILE_FACTOR = 24.0


def _restart(client: Client, address: str) -> None:
    """Restart a worker process, or retire it if it has no nanny to restart it."""
    try:
        client.restart_workers([address], timeout=10, raise_for_error=False)
    except Exception:
        _retire(client, address)


def _retire(client: Client, address: str) -> None:
    with suppress(Exception):
        client.retire_workers([address])


class DaskExecutor:
    """Run tasks on the workers of a Dask cluster (see `cryosiam_dask.core.executor.SharedExecutor`).

    Pending tasks wait in this process, not in the scheduler. Each worker receives a few of them, those of the tomogram
    that started first, and another one whenever one is done. Tasks that use the device and tasks that do not are
    counted separately, so that neither kind waits for the other. If only some workers have a device, tasks that use it
    run on these, and all others on the helpers, the workers without one.

    Parameters
    ----------
    client
        Client of the cluster.
    progress
        Called after every finished task.
    hang_seconds
        See `HANG_SECONDS`.
    watch
        Called with the step of every finished task and the seconds since it was submitted; ``None`` if it is retried.
    inform
        Receives messages for the user, such as that there has been no worker for long.
    has_device
        Called in every worker process; returns whether it has a device, or the name of its device, which stays the
        same when the worker is replaced. ``None`` if all workers have one.
    """

    def __init__(
        self,
        client: Client,
        progress: Progress = lambda name, done, total: None,
        *,
        hang_seconds: float = HANG_SECONDS,
        watch: Callable[[str, float | None], None] = lambda step, seconds: None,
        inform: Callable[[str], None] = lambda message: None,
        has_device: Callable[[], bool | str | None] | None = None,
    ) -> None:
        self.client = client
        self.has_device = has_device
        self.watch = watch
        self.inform = inform
        self.progress = progress
        self.hang_seconds = hang_seconds
        self._groups: list[_TaskGroup] = []
        self._in_flight: dict[Future, _Task] = {}
        self._durations: dict[str, deque[float]] = {}
        self._addresses: set[str] = set(client.nthreads())
        self._abandoned: set[str] = set()
        self._has_device: dict[str, bool | str | None] = {}  # by address, of the workers that have answered
        self._reported: set[str] = set()  # devices whose failure was reported to the user
        self._most_devices = 0  # workers with a device at the same time
        self._asked: set[str] = set()
        self._last_worker = math.inf  # when a worker was last seen; infinite once the user knows of it
        self._last_device = math.inf  # when a worker with a device was last seen
        self._lock = threading.RLock()
        self._events: queue.SimpleQueue[_Finished | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._drained = False
        self._any_succeeded = False
        self._have_computed: set[str] = set()  # workers that have finished a task that uses the device
        client.register_plugin(_ForgetFinished())
        register_in_workers(client, Setup(load_tasks), "tasks")
        if has_device is not None:
            self._asked = set(self._addresses)
            self._ask(*self._asked)

    @property
    def workers(self) -> int:
        """Worker processes that have a device."""
        with self._lock:
            return max(1, len(self._with_device))

    @property
    def _with_device(self) -> list[str]:
        return [address for address in self._addresses if self.has_device is None or self._has_device.get(address)]

    def _place(self, address: str) -> str:
        """Return what identifies a worker and the one that replaces it: its device's name, or else its address."""
        name = self._has_device.get(address)
        return name if isinstance(name, str) else address

    @property
    def _helpers(self) -> list[str]:
        """Workers without a device; if there are none, all."""
        return [*self._addresses.difference(self._with_device)] or [*self._addresses]

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        name: str,
        overlap: bool = False,
        done: Callable[[T, R], None] | None = None,
    ) -> list[R]:
        """Return ``[function(item) for item in items]``, computed by the workers.

        Raises
        ------
        DeviceError
            If the workers of a task died, hung or lost their devices `TRIES` times.
        ClusterError
            If the connection to the scheduler is lost.
        Interrupted
            If `drain` was called and tasks are left.
        Exception
            The error of the first task that fails; pending tasks are cancelled.
        """
        return self._run(_TaskGroup(function, items, name, "", 0, overlap, self.progress, done))

    def share(self, tomogram: str, order: int, progress: Progress) -> Executor:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        return _TomogramExecutor(self, tomogram, order, progress)

    @property
    def tasks_wanted(self) -> int:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        with self._lock:
            pending = sum(len(group.pending) for group in self._groups if group.overlap)
            wanted = 2 * self._in_flight_on_device * len(self._with_device)
            return max(0, wanted - pending) if self._any_succeeded else 0

    @property
    def _in_flight_on_device(self) -> int:
        """Tasks that use the device in flight for each worker."""
        return IN_FLIGHT if self.has_device is None else IN_FLIGHT_ON_DEVICE

    def drain(self) -> None:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        self._drained = True
        self._events.put(None)

    def abandon(self) -> None:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        self._drained = True
        with self._lock:
            for group in list(self._groups):
                self._finish(group, Interrupted())

    def _run(self, group: _TaskGroup) -> list[Any]:
        group.progress(group.name, 0, group.total)
        with self._lock:
            self._groups.append(group)
            self._groups.sort(key=lambda group: group.order)
            if self._thread is None:
                self._thread = threading.Thread(target=self._dispatch, daemon=True, name="dispatch")
                self._thread.start()
        self._events.put(None)
        results: dict[int, Any] = {}
        try:
            # Recorded here and not in the dispatching thread, so that no worker waits for another tomogram's disk.
            while arrived := group.results.get():
                number, result = arrived
                results[number] = result
                if group.done:
                    group.done(group.items[number], result)
                group.progress(group.name, len(results), group.total)
        except BaseException as error:  # a result could not be recorded, or an interrupt
            with self._lock:
                self._finish(group, error if isinstance(error, Exception) else Interrupted())
            raise
        if group.error:
            raise group.error
        return [results[i] for i in range(group.total)]

    # The methods below run in the dispatching thread, which lives as long as there are task groups.

    def _dispatch(self) -> None:
        checked, self._last_device = -math.inf, time.monotonic()
        try:
            while True:
                if time.monotonic() - checked > 1:
                    checked = time.monotonic()
                    self._check_workers()
                with self._lock:
                    self._submit_pending()
                    for group in [s for s in self._groups if not s.in_flight and (self._drained or not s.left)]:
                        self._finish(group, Interrupted() if group.left else None)
                    if not self._groups:
                        self._thread = None
                        return
                self._collect_results()
        except BaseException as raised:
            gone = isinstance(raised, CommClosedError) or self.client.status not in ("running", "connecting")
            error = _scheduler_is_gone(self.client) if gone and not isinstance(raised, LostClusterError) else raised
            with self._lock:
                self._thread = None
                for group in list(self._groups):
                    self._finish(group, error)

    def _check_workers(self) -> None:
        """Update the list of workers, and retry tasks that hang or whose worker is lost."""
        if self.client.status not in ("running", "connecting"):
            raise _scheduler_is_gone(self.client)
        if self.client.status == "running":
            with suppress(OSError, CommClosedError):
                try:
                    found = self.client.sync(self.client.scheduler.ncores, callback_timeout=self.hang_seconds)
                except TimeoutError:
                    raise _scheduler_is_gone(self.client, f"no answer within {self.hang_seconds:.0f} s") from None
                # Replacing a hanging worker takes a while, in which it must not receive the same task again.
                self._abandoned &= set(found)  # a new worker may have the same address
                self._addresses = {a for a in found if a not in self._abandoned and self._knows(a)}
                self._ask_new(set(found))
        now = time.monotonic()
        # A cluster of this run gets no other workers, except from Slurm, whose jobs may all be pending.
        local = isinstance(self.client.cluster, LocalCluster)
        if self._with_device or not (self._addresses or local):
            self._last_device = now
        elif self.client.cluster is not None and now - self._last_device > self.hang_seconds:
            gone = _devices_are_gone if self._addresses else _workers_are_gone
            raise gone(now - self._last_device)
        self._most_devices = max(self._most_devices, len(self._with_device))
        if self._with_device:
            self._last_worker = now
        elif now - self._last_worker > _NO_WORKER_SECONDS:
            self._last_worker = math.inf
            which = " with a GPU" if self._addresses else ""
            self.inform(f"no worker{which} is left: the run continues once a new one joins the scheduler")
        usual = {name: statistics.median(times) for name, times in self._durations.items()}
        with self._lock:
            for future, task in list(self._in_flight.items()):
                if future not in self._in_flight:
                    continue  # its group has just ended
                if task.address not in self._addresses:
                    self._retry(future, task, self._worker_died(task.group), None)
                    continue
                seconds = self.hang_seconds * (1 if task.group.overlap else _FILE_FACTOR)
                if now - task.began > max(seconds, _HANG_FACTOR * usual.get(task.group.name, 0.0)):
                    self._retry(future, task, _task_hangs(task, now))

    def _knows(self, address: str) -> bool:
        return self.has_device is None or address in self._has_device

    def _ask_new(self, found: set[str]) -> None:
        """Ask new workers whether they have a device, without waiting for the answers."""
        if self.has_device is None:
            return
        with self._lock:
            self._asked &= found
            self._has_device = {address: has for address, has in self._has_device.items() if address in found}
            new = found - self._asked
            self._asked |= new
        for address in new:  # each in its own thread, because one may never respond
            threading.Thread(target=self._ask, args=(address,), daemon=True, name="ask a worker").start()

    def _ask(self, *addresses: str) -> None:
        answers: dict[str, Any] = {}
        with suppress(Exception):  # asked again in a second
            answers = self.client.run(self.has_device, workers=[*addresses], on_error="return")
        with self._lock:
            for address in addresses:
                if isinstance(answer := answers.get(address, KeyError()), bool | str | None):
                    self._has_device[address] = answer
                else:
                    self._asked.discard(address)
        self._events.put(None)

    def _submit_pending(self) -> None:
        """Submit pending tasks, those of the first groups first, to workers with fewer tasks in flight than allowed."""
        for group in self._groups:
            group.pending.extendleft(number for since, number in group.delayed if since <= time.monotonic())
            group.delayed = [entry for entry in group.delayed if entry[0] > time.monotonic()]
        if self._drained or self.client.status != "running":
            return
        for overlap in (True, False):
            groups = [group for group in self._groups if group.overlap == overlap and group.pending]
            if not groups:
                continue
            load = dict.fromkeys(self._with_device if overlap else self._helpers, 0)
            most = self._in_flight_on_device if overlap else IN_FLIGHT
            for task in self._in_flight.values():
                if task.group.overlap == overlap and task.address in load:
                    load[task.address] += 1
            heap = [(count, address) for address, count in load.items() if count < most]
            heapq.heapify(heap)
            for group in groups:
                passed_over = []
                while group.pending and heap:
                    count, address = heapq.heappop(heap)
                    number = self._next_task(group, address, load)
                    if number is None:
                        passed_over.append((count, address))
                        continue
                    self._submit(group, number, address)
                    if count + 1 < most:
                        heapq.heappush(heap, (count + 1, address))
                for entry in passed_over:
                    heapq.heappush(heap, entry)

    def _next_task(self, group: _TaskGroup, address: str, workers: Collection[str]) -> int | None:
        """Take the next task for a worker; skip those that failed there and have not failed on all `workers`."""
        if not group.failed_at and not group.refused:
            return group.pending.popleft()
        place, places = self._place(address), set(map(self._place, workers))
        if place in group.refused and places - group.refused:
            return None
        for i, number in enumerate(group.pending):
            failed = group.failed_at.get(number, ())
            if place not in failed or not places.difference(failed, group.refused):
                del group.pending[i]
                return number
        return None

    def _submit(self, group: _TaskGroup, number: int, address: str) -> None:
        group.submitted += 1
        future = self.client.submit(
            group.pickled,
            dumps(group.items[number]),
            key=(group.prefix, number, group.submitted),
            pure=False,
            workers=[address],
        )
        group.in_flight += 1
        self._in_flight[future] = _Task(group, number, address, time.monotonic(), self._place(address))
        self.client.loop.add_callback(self._wait_for, future)

    async def _wait_for(self, future: Future) -> None:
        """Pass the result of a task to the dispatching thread, which must not wait for a single result.

        A result never arrives if its worker is lost after the scheduler has announced it.
        """
        try:
            self._events.put(_Finished(future, result=await future))
        except (Exception, asyncio.CancelledError) as error:
            self._events.put(_Finished(future, error=error))

    def _collect_results(self) -> None:
        """Wait for an event, then handle all results that have arrived."""
        arrived = []
        with suppress(queue.Empty):
            arrived.append(self._events.get(timeout=1))
            while True:
                arrived.append(self._events.get_nowait())
        with self._lock:
            for finished in arrived:
                task = self._in_flight.pop(finished.future, None) if finished else None
                if finished and task:
                    task.group.in_flight -= 1
                    self._handle(finished, task)

    def _handle(self, finished: _Finished, task: _Task) -> None:
        group, number = task.group, task.number
        if group not in self._groups:
            return
        error = finished.error
        if error is None:
            self._durations.setdefault(group.name, deque(maxlen=99)).append(time.monotonic() - task.began)
            if group.overlap:
                self._any_succeeded = True
                self._have_computed.add(task.address)
            self.watch(group.name, time.monotonic() - task.began)
            group.results.put((number, finished.result))
        elif isinstance(error, LostDeviceError):
            # A device that has never worked, while others do, is broken. A worker restarted on it would use up the
            # attempts at a task.
            broken = task.address not in self._have_computed and not self._have_computed.isdisjoint(self._with_device)
            self._report(task.place, error)
            self._retry(finished.future, task, error, _retire if broken else _restart)
        elif isinstance(error, CancelledError | asyncio.CancelledError | CommClosedError | KilledWorker):
            # The scheduler was restarted and lost the task, or gave it up.
            self._retry(finished.future, task, self._worker_died(group), None)
        elif isinstance(error, DeviceError) and is_transient(error) and self._another_device_is_left(task, error):
            group.pending.appendleft(number)
            self.watch(group.name, None)
        elif self._may_go_away(error, group) and group.transient_failures[number] < len(RETRY_PAUSES):
            pause = RETRY_PAUSES[group.transient_failures[number]]
            LOG.warning(
                "%s, task %d, worker %s: %s: trying again in %g s", group.prefix, number, task.address, error, pause
            )
            group.transient_failures[number] += 1
            group.failed_at[number].add(task.place)
            group.refused.clear()
            group.delayed.append((time.monotonic() + pause, number))
            self.watch(group.name, None)
        else:
            self._finish(group, retries_exhausted(error) if isinstance(error, Exception) else error)

    def _another_device_is_left(self, task: _Task, error: DeviceError) -> bool:
        """Record that a task's device is too small for its step, and return whether another device may suffice."""
        refused = task.group.refused
        if task.place not in refused:
            refused.add(task.place)
            LOG.warning("%s, task %d, worker %s: %s", task.group.prefix, task.number, task.address, error)
            self._report(task.place, error)
        return not refused.issuperset(map(self._place, self._with_device))

    def _report(self, place: str, error: Exception) -> None:
        """Inform the user, once for each device, why others take over its tasks."""
        if place not in self._reported:
            self._reported.add(place)
            self.inform(f"warning: {place}: {error}")

    def _may_go_away(self, error: BaseException, group: _TaskGroup) -> bool:
        """Whether a retry may succeed: after transient errors, but not if all devices are too small from the start."""
        all_refuse = group.name not in self._durations and len(self._with_device) >= self._most_devices
        return is_transient(error) and not (isinstance(error, DeviceError) and all_refuse)

    def _retry(
        self,
        future: Future,
        task: _Task,
        error: CryosiamDaskError,
        end: Callable[[Client, str], None] | None = _restart,
    ) -> None:
        """Retry a task, whose worker has failed, in another process; after `TRIES` attempts, fail with `error`.

        `end` ends the worker's process; ``None`` if it has already ended.
        """
        group = task.group
        if self._in_flight.pop(future, None):
            group.in_flight -= 1
            with suppress(CommClosedError):
                self.client.cancel([future], force=True)
        if end and task.address in self._addresses:
            self._addresses.remove(task.address)
            self._abandoned.add(task.address)
            threading.Thread(target=end, args=(self.client, task.address), daemon=True).start()
        group.tries[task.number] += 1
        group.failed_at[task.number].add(task.place)
        LOG.warning("%s, task %d, worker %s: %s", group.prefix, task.number, task.address, error)
        if group.tries[task.number] >= TRIES:
            self._finish(group, error)
        else:
            self.watch(group.name, None)
            group.pending.appendleft(task.number)

    def _worker_died(self, group: _TaskGroup) -> DeviceError:
        smaller = "a smaller batch_size, patch_size or block_size"
        if self.has_device is None:
            cause = f"The machine probably ran out of memory: use fewer --workers, or {smaller}"
        elif group.overlap:
            cause = f"Check nvidia-smi and dmesg. If memory ran out, use fewer --cpu-workers, or {smaller}"
        else:
            cause = "The machine probably ran out of memory: use fewer --cpu-workers"
        return DeviceError(
            "a worker process died several times during the same task", place=f"step '{group.name}'", remedy=cause
        )

    def _finish(self, group: _TaskGroup, error: BaseException | None) -> None:
        """Remove a group, and let its caller continue."""
        if group in self._groups:
            self._groups.remove(group)
        group.error = error
        group.pending.clear()
        group.delayed.clear()
        left = [future for future, task in self._in_flight.items() if task.group is group] if group.in_flight else []
        for future in left:
            del self._in_flight[future]
        group.results.put(None)
        if left and self.client.status == "running":
            with suppress(CommClosedError):
                self.client.cancel(left, force=True)


@dataclass(eq=False, slots=True)
class _TaskGroup:
    """The tasks of one `map`: pending, in flight, and finished."""

    function: Callable[[Any], Any]
    items: Sequence[Any]
    name: str
    tomogram: str
    order: int
    overlap: bool
    progress: Progress
    done: Callable[[Any, Any], None] | None
    pending: deque[int] = field(init=False)
    tries: list[int] = field(init=False)
    in_flight: int = 0
    submitted: int = 0
    #: Tasks to retry after a transient error, each with the time of the retry, and the number of such errors of each.
    delayed: list[tuple[float, int]] = field(default_factory=list)
    transient_failures: Counter[int] = field(default_factory=Counter)
    #: Where each task failed, and where any task lacked memory (see `DaskExecutor._place`).
    failed_at: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    refused: set[str] = field(default_factory=set)
    #: Task numbers with their results, in order of arrival; ``None`` at the end.
    results: queue.SimpleQueue[tuple[int, Any] | None] = field(default_factory=queue.SimpleQueue)
    error: BaseException | None = None
    prefix: str = field(init=False)
    pickled: _Pickled = field(init=False)

    def __post_init__(self) -> None:
        self.pending = deque(range(len(self.items)))
        self.tries = [0] * len(self.items)
        # The dashboard groups tasks by the first word of their keys, then by the whole prefix. Keys are ASCII, because
        # messages cannot carry all bytes of file names.
        tomogram = re.sub(r"[^A-Za-z0-9_.+-]", "_", self.tomogram)
        self.prefix = "-".join(filter(None, (self.name, tomogram, uuid.uuid4().hex)))
        self.pickled = _Pickled(dumps(self.function), not self.overlap)

    @property
    def total(self) -> int:
        return len(self.items)

    @property
    def left(self) -> bool:
        """Whether tasks have not been submitted yet."""
        return bool(self.pending or self.delayed)


@dataclass(frozen=True, slots=True)
class _Task:
    """A task in flight on a worker."""

    group: _TaskGroup
    number: int
    address: str
    began: float
    place: str = ""


@dataclass(frozen=True, slots=True)
class _Finished:
    """The result or error of a task."""

    future: Future
    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _TomogramExecutor:
    """A `DaskExecutor` for one tomogram."""

    executor: DaskExecutor
    tomogram: str
    order: int
    progress: Progress

    @property
    def workers(self) -> int:
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
        group = _TaskGroup(function, items, name, self.tomogram, self.order, overlap, self.progress, done)
        return self.executor._run(group)


def _task_hangs(task: _Task, now: float) -> DeviceError:
    return DeviceError(
        "a task must end",
        place=f"step '{task.group.name}'",
        value=f"no result after {now - task.began:.0f} s, on several workers in turn",
        remedy="Check the workers' devices and disks, then repeat the command: finished work is kept",
    )


def _devices_are_gone(seconds: float) -> DeviceError:
    return DeviceError(
        "a worker must have a GPU until the run ends",
        value=f"none for {seconds:.0f} s",
        remedy="Check the GPUs with nvidia-smi, then repeat the command: finished work is kept",
    )


def _workers_are_gone(seconds: float) -> LostClusterError:
    return LostClusterError(
        "a worker must keep running until the run ends",
        place="this machine",
        value=f"none for {seconds:.0f} s",
        remedy="Check the machine with free, nvidia-smi and dmesg, then repeat the command: finished work is kept",
    )


def _scheduler_is_gone(client: Client, found: str = "a closed connection") -> LostClusterError:
    return LostClusterError(
        "the scheduler must keep running until the run ends",
        place=getattr(client.scheduler, "address", None) or "the Dask cluster",
        value=found,
        remedy="Start it again and repeat the command: finished work is kept",
    )


_EXCLUSIVE = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Pickled:
    """Call a function with an item, both pickled.

    If they were not pickled here, the scheduler would import everything that the function needs, including PyTorch, and
    traverse the arguments of every task.
    """

    function: bytes
    exclusive: bool  # a process runs only one such task at a time

    def __call__(self, item: bytes) -> Any:
        with _EXCLUSIVE if self.exclusive else nullcontext():
            return loads(self.function)(loads(item))


class _ForgetFinished(SchedulerPlugin):  # type: ignore[misc]  # untyped
    """Let the scheduler forget finished tasks.

    `distributed.spans` keeps every task group and an entry for every task, and iterates over all groups whenever a new
    one arrives; `dask.utils.key_split` caches a hundred thousand names. Together they take tens of kilobytes for each
    tomogram.
    """

    name = "forget finished tasks"
    idempotent = True
    #: Finished tasks between two clean-ups; spans to keep, because workers may still report on the latest ones.
    _EVERY, _SPANS = 50, 100

    async def start(self, scheduler: Any) -> None:
        """See `distributed.SchedulerPlugin`."""
        self.scheduler, self.forgotten = scheduler, 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **options: Any) -> None:
        """See `distributed.SchedulerPlugin`."""
        self.forgotten += finish == "forgotten"
        if finish == "forgotten" and self.forgotten % self._EVERY == 0:
            with suppress(AttributeError, KeyError):  # another version of Dask may have other spans, or none
                key_split.cache_clear()
                self._forget(self.scheduler.extensions["spans"])

    def _forget(self, spans: Any) -> None:
        alive = set(self.scheduler.task_groups.values())
        for span in spans.spans.values():
            span.groups.intersection_update(alive)
            span._metadata_seen.clear()
            if span._metadata:
                span._metadata["collections"].clear()
        for span in [span for span in spans.root_spans[: -self._SPANS] if not span.groups and not span.children]:
            del spans.spans[span.id]
            for found in (spans.root_spans, spans.spans_search_by_name[span.name]):
                found.remove(span)
            for tag in span.name:
                spans.spans_search_by_tag[tag].remove(span)
