"""Calls on the workers of a Dask cluster: few in flight, of the tomogram begun first, again where a worker is lost."""

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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from dask.utils import key_split
from distributed import Client, Future, KilledWorker, SchedulerPlugin
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

#: Calls in flight for each worker, of those that may overlap and as many of the others: one that runs, and one that
#: waits (or reads or writes) so that the worker never does. A worker has a thread for each.
IN_FLIGHT = 2
THREADS = 2 * IN_FLIGHT
#: Times that a call is tried on devices that fail or hang.
TRIES = 3
#: A call hangs that takes longer than so many seconds and so many times as long as calls of its step usually do.
HANG_SECONDS, _HANG_TIMES = 900.0, 20.0
#: A worker that died is replaced sooner than this, if it is by Dask.
_ALONE_SECONDS = 60.0
#: As many times longer may one take that does not keep a device busy: it may write a file of hundreds of gigabytes.
_FILE_TIMES = 24.0


class DaskExecutor:
    """Runs calls on the workers of a Dask cluster (see `cryosiam_dask.core.executor.SharedExecutor`).

    Calls wait here and not in the scheduler: each worker is given a few, of the tomogram that was begun first, and
    another one when one of them is done. What keeps a device busy and what does not are counted apart, so that neither
    waits for the other.

    Parameters
    ----------
    client
        The cluster's client.
    progress
        Told of every call that is done.
    hang_seconds
        See `HANG_SECONDS`.
    watch
        Told the step of every call that is done, and the seconds from when a worker had been given it; ``None`` where
        another one is given it instead.
    inform
        Told where there is no worker for long.
    """

    def __init__(
        self,
        client: Client,
        progress: Progress = lambda name, done, total: None,
        *,
        hang_seconds: float = HANG_SECONDS,
        watch: Callable[[str, float | None], None] = lambda step, seconds: None,
        inform: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.client = client
        self.watch = watch
        self.inform = inform
        self.progress = progress
        self.hang_seconds = hang_seconds
        self._steps: list[_Step] = []
        self._flying: dict[Future, _Flight] = {}
        self._durations: dict[str, deque[float]] = {}
        self._addresses: dict[str, int] = {}
        self._given_up: set[str] = set()
        self._seen = math.inf  # when there was a worker last; infinite once it has been said that there is none
        self._lock = threading.RLock()
        self._events: queue.SimpleQueue[_Outcome | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._drained = False
        self._proved = False
        client.register_plugin(_Forgetting())
        register_in_workers(client, Setup(load_tasks), "tasks")

    @property
    def workers(self) -> int:
        """Worker processes of the cluster."""
        return max(1, len(self._addresses or self.client.nthreads()))

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
            If workers died of a call again and again, or their devices failed.
        ClusterError
            If the scheduler is gone.
        Interrupted
            If `drain` was called and calls are left.
        Exception
            Whatever the first failing call raised; calls that have not started are cancelled.
        """
        return self._run(_Step(function, items, name, "", 0, overlap, self.progress, done))

    def share(self, tomogram: str, order: int, progress: Progress) -> Executor:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        return _Share(self, tomogram, order, progress)

    @property
    def tasks_wanted(self) -> int:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        with self._lock:
            waiting = sum(len(step.waiting) for step in self._steps if step.overlap)
            return max(0, 2 * IN_FLIGHT * len(self._addresses) - waiting) if self._proved else 0

    def drain(self) -> None:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        self._drained = True
        self._events.put(None)

    def abandon(self) -> None:
        """See `cryosiam_dask.core.executor.SharedExecutor`."""
        self._drained = True
        with self._lock:
            for step in list(self._steps):
                self._end(step, Interrupted())

    def _run(self, step: _Step) -> list[Any]:
        step.progress(step.name, 0, step.total)
        with self._lock:
            self._steps.append(step)
            self._steps.sort(key=lambda s: s.order)
            if self._thread is None:
                self._thread = threading.Thread(target=self._dispatch, daemon=True, name="dispatch")
                self._thread.start()
        self._events.put(None)
        results: dict[int, Any] = {}
        try:
            # Recorded here and not where calls are dispatched: no worker waits for another tomogram's disk.
            while arrived := step.arrived.get():
                number, result = arrived
                results[number] = result
                if step.done:
                    step.done(step.items[number], result)
                step.progress(step.name, len(results), step.total)
        except BaseException as error:  # what cannot be recorded does not count as done; an interruption
            with self._lock:
                self._end(step, error if isinstance(error, Exception) else Interrupted())
            raise
        if step.error:
            raise step.error
        return [results[i] for i in range(step.total)]

    # What follows runs in the dispatching thread, which lives as long as there are steps.

    def _dispatch(self) -> None:
        looked = -math.inf
        try:
            while True:
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    self._look_around()
                with self._lock:
                    self._launch()
                    for step in [s for s in self._steps if not s.flying and (self._drained or not s.left)]:
                        self._end(step, Interrupted() if step.left else None)
                    if not self._steps:
                        self._thread = None
                        return
                self._collect()
        except BaseException as raised:
            gone = isinstance(raised, CommClosedError) or self.client.status not in ("running", "connecting")
            error = _scheduler_is_gone(self.client) if gone and not isinstance(raised, LostClusterError) else raised
            with self._lock:
                self._thread = None
                for step in list(self._steps):
                    self._end(step, error)

    def _look_around(self) -> None:
        """Find out which workers there are, and which calls hang."""
        if self.client.status not in ("running", "connecting"):
            raise _scheduler_is_gone(self.client)
        if self.client.status == "running":
            with suppress(OSError, CommClosedError):
                try:
                    found = self.client.sync(self.client.scheduler.ncores, callback_timeout=self.hang_seconds)
                except TimeoutError:
                    raise _scheduler_is_gone(self.client, f"no answer within {self.hang_seconds:.0f} s") from None
                # One that hangs takes long to be replaced, and would be given the same work again meanwhile.
                self._given_up &= set(found)  # another one may come at the same address
                self._addresses = {address: n for address, n in found.items() if address not in self._given_up}
        now = time.monotonic()
        if self._addresses:
            self._seen = now
        elif now - self._seen > _ALONE_SECONDS:
            self._seen = math.inf
            self.inform("no worker is left: what is in work goes on once another one comes to the scheduler")
        usual = {name: statistics.median(times) for name, times in self._durations.items()}
        with self._lock:
            for future, flight in list(self._flying.items()):
                if future not in self._flying:
                    continue  # of a step that has just ended
                if flight.address not in self._addresses:
                    self._retry(future, flight, _died(flight.step.name), restart=False)
                    continue
                seconds = self.hang_seconds * (1 if flight.step.overlap else _FILE_TIMES)
                if now - flight.began > max(seconds, _HANG_TIMES * usual.get(flight.step.name, 0.0)):
                    self._retry(future, flight, _hangs(flight, now))

    def _launch(self) -> None:
        """Give every worker what it can take, of the steps that come first."""
        for step in self._steps:
            step.waiting.extendleft(number for since, number in step.paused if since <= time.monotonic())
            step.paused = [entry for entry in step.paused if entry[0] > time.monotonic()]
        if self._drained or self.client.status != "running":
            return
        for overlap in (True, False):
            steps = [step for step in self._steps if step.overlap == overlap and step.waiting]
            if not steps:
                continue
            load = dict.fromkeys(self._addresses, 0)
            for flight in self._flying.values():
                if flight.step.overlap == overlap and flight.address in load:
                    load[flight.address] += 1
            heap = [(count, address) for address, count in load.items() if count < IN_FLIGHT]
            heapq.heapify(heap)
            for step in steps:
                passed_over = []
                while step.waiting and heap:
                    count, address = heapq.heappop(heap)
                    number = self._next(step, address)
                    if number is None:
                        passed_over.append((count, address))
                        continue
                    self._submit(step, number, address)
                    if count + 1 < IN_FLIGHT:
                        heapq.heappush(heap, (count + 1, address))
                for entry in passed_over:
                    heapq.heappush(heap, entry)

    def _next(self, step: _Step, address: str) -> int | None:
        """Take the next call for a worker: none whose disk failed there, where there is another worker."""
        alone = len(self._addresses) == 1
        for place, number in enumerate(step.waiting):
            if alone or step.failed_at.get(number) != address:
                del step.waiting[place]
                return number
        return None

    def _submit(self, step: _Step, number: int, address: str) -> None:
        future = self.client.submit(
            step.call,
            dumps(step.items[number]),
            key=(step.prefix, number, step.tries[number] + step.pauses[number]),
            pure=False,
            workers=[address],
        )
        step.flying += 1
        self._flying[future] = _Flight(step, number, address, time.monotonic())
        self.client.loop.add_callback(self._wait_for, future)

    async def _wait_for(self, future: Future) -> None:
        """Tell the dispatching thread what comes of a call, which must not wait for it itself.

        A result that is lost with its worker, after the scheduler has told of it, never comes.
        """
        try:
            self._events.put(_Outcome(future, result=await future))
        except (Exception, asyncio.CancelledError) as error:
            self._events.put(_Outcome(future, error=error))

    def _collect(self) -> None:
        """Wait for something to happen, then take all results that have arrived, at once."""
        arrived = []
        with suppress(queue.Empty):
            arrived.append(self._events.get(timeout=1))
            while True:
                arrived.append(self._events.get_nowait())
        with self._lock:
            for outcome in arrived:
                flight = self._flying.pop(outcome.future, None) if outcome else None
                if outcome and flight:
                    flight.step.flying -= 1
                    self._settle(outcome, flight)

    def _settle(self, outcome: _Outcome, flight: _Flight) -> None:
        step, number = flight.step, flight.number
        if step not in self._steps:
            return
        error = outcome.error
        if error is None:
            self._durations.setdefault(step.name, deque(maxlen=99)).append(time.monotonic() - flight.began)
            self._proved |= step.overlap
            self.watch(step.name, time.monotonic() - flight.began)
            step.arrived.put((number, outcome.result))
        elif isinstance(error, LostDeviceError):
            self._retry(outcome.future, flight, error)
        elif isinstance(error, CancelledError | asyncio.CancelledError | CommClosedError | KilledWorker):
            # The scheduler forgot it, as one does that was started anew, or gave it up.
            self._retry(outcome.future, flight, _died(step.name), restart=False)
        elif is_transient(error) and step.pauses[number] < len(RETRY_PAUSES):
            pause = RETRY_PAUSES[step.pauses[number]]
            LOG.warning(
                "%s, piece %d, worker %s: %s: tried again in %g s", step.prefix, number, flight.address, error, pause
            )
            step.pauses[number] += 1
            step.failed_at[number] = flight.address
            step.paused.append((time.monotonic() + pause, number))
            self.watch(step.name, None)
        else:
            self._end(step, retries_exhausted(error) if isinstance(error, Exception) else error)

    def _retry(self, future: Future, flight: _Flight, error: CryosiamDaskError, restart: bool = True) -> None:
        """Let another process do a call that failed by no fault of its own; `error` if it has too often."""
        step = flight.step
        if self._flying.pop(future, None):
            step.flying -= 1
            with suppress(CommClosedError):
                self.client.cancel([future], force=True)
        if restart and flight.address in self._addresses:
            del self._addresses[flight.address]
            self._given_up.add(flight.address)
            threading.Thread(target=_restart, args=(self.client, flight.address), daemon=True).start()
        step.tries[flight.number] += 1
        LOG.warning("%s, piece %d, worker %s: %s", step.prefix, flight.number, flight.address, error)
        if step.tries[flight.number] >= TRIES:
            self._end(step, error)
        else:
            self.watch(step.name, None)
            step.waiting.appendleft(flight.number)

    def _end(self, step: _Step, error: BaseException | None) -> None:
        """Let the caller of a step go on."""
        if step in self._steps:
            self._steps.remove(step)
        step.error = error
        step.waiting.clear()
        step.paused.clear()
        left = [future for future, flight in self._flying.items() if flight.step is step] if step.flying else []
        for future in left:
            del self._flying[future]
        step.arrived.put(None)
        if left and self.client.status == "running":
            with suppress(CommClosedError):
                self.client.cancel(left, force=True)


@dataclass(eq=False, slots=True)
class _Step:
    """One `map`: what waits, what flies, and what came of it."""

    function: Callable[[Any], Any]
    items: Sequence[Any]
    name: str
    tomogram: str
    order: int
    overlap: bool
    progress: Progress
    done: Callable[[Any, Any], None] | None
    waiting: deque[int] = field(init=False)
    tries: list[int] = field(init=False)
    flying: int = 0
    #: Calls that met an error of the disk that may pass: when each is to be tried again, and how often it has been.
    paused: list[tuple[float, int]] = field(default_factory=list)
    pauses: Counter[int] = field(default_factory=Counter)
    failed_at: dict[int, str] = field(default_factory=dict)
    #: Numbers with results, in the order in which they came; ``None`` when that is all.
    arrived: queue.SimpleQueue[tuple[int, Any] | None] = field(default_factory=queue.SimpleQueue)
    error: BaseException | None = None
    prefix: str = field(init=False)
    call: _Call = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = deque(range(len(self.items)))
        self.tries = [0] * len(self.items)
        # The dashboard groups tasks by the first word, and within it by all of this. Keys are ASCII: a file name may be
        # what no message can carry.
        tomogram = re.sub(r"[^A-Za-z0-9_.+-]", "_", self.tomogram)
        self.prefix = "-".join(filter(None, (self.name, tomogram, uuid.uuid4().hex)))
        self.call = _Call(dumps(self.function), not self.overlap)

    @property
    def total(self) -> int:
        return len(self.items)

    @property
    def left(self) -> bool:
        """Whether calls are yet to be given to workers."""
        return bool(self.waiting or self.paused)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A call that a worker has."""

    step: _Step
    number: int
    address: str
    began: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a call."""

    future: Future
    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Share:
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
        step = _Step(function, items, name, self.tomogram, self.order, overlap, self.progress, done)
        return self.executor._run(step)


def _restart(client: Client, address: str) -> None:
    """Replace a worker process; where nobody watches over it, it is given up."""
    try:
        client.restart_workers([address], timeout=10, raise_for_error=False)
    except Exception:
        with suppress(Exception):
            client.retire_workers([address])


def _died(step: str) -> DeviceError:
    return DeviceError(
        "a worker process died several times of the same piece of work",
        place=f"step '{step}'",
        remedy="Most likely the machine ran out of memory: use fewer --workers, or a smaller batch_size, patch_size or "
        "block_size",
    )


def _hangs(flight: _Flight, now: float) -> DeviceError:
    return DeviceError(
        "a piece of work must end",
        place=f"step '{flight.step.name}'",
        value=f"no result after {now - flight.began:.0f} s, on one worker after the other",
        remedy="Look at the workers' devices and disks, then repeat the command: what is done is kept",
    )


def _scheduler_is_gone(client: Client, found: str = "a connection that was closed") -> LostClusterError:
    return LostClusterError(
        "the scheduler must stay until the run is over",
        place=getattr(client.scheduler, "address", None) or "the Dask cluster",
        value=found,
        remedy="Start it again and repeat the command: what is done is kept",
    )


_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Call:
    """Calls a function with an item, both pickled.

    The scheduler looks into what it is given: it would import all that the function needs, PyTorch included, and take
    arguments apart for every call.
    """

    function: bytes
    alone: bool  # no two such calls run at the same time in a process

    def __call__(self, item: bytes) -> Any:
        with _ALONE if self.alone else nullcontext():
            return loads(self.function)(loads(item))


class _Forgetting(SchedulerPlugin):  # type: ignore[misc]  # untyped
    """Lets the scheduler forget calls that are over.

    `distributed.spans` keeps every group of calls that there ever was and a note of every call, and looks through all
    groups whenever a new one comes; `dask.utils.key_split` keeps the last hundred thousand names. Together that is tens
    of kilobytes for a tomogram.
    """

    name = "forget calls that are over"
    idempotent = True
    _EVERY, _SPANS = 100, 100  # calls between two looks; spans to keep, as workers may still tell of the latest ones

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
