"""Where the work runs: worker processes of this machine, each with one GPU or one CPU core, or those of a cluster.

A worker has two threads, so that it can read a block and write another one while it computes a third. What does not say
that it can be overlapped like this runs alone in its process.

`open_cluster` starts them and gives a `DaskExecutor`, which runs the per-chunk functions of the stages on them with a
bounded number in flight, so that neither the scheduler's memory nor the workers' grows with the size of a tomogram.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import heapq
import importlib
import json
import logging
import math
import os
import pkgutil
import platform
import queue
import re
import signal
import socket
import statistics
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal, TypeVar

import dask
from dask.utils import key_split
from distributed import Client, Future, KilledWorker, LocalCluster, SchedulerPlugin, WorkerPlugin, performance_report
from distributed.comm import CommClosedError, get_address_host_port
from distributed.protocol.pickle import dumps, loads
from distributed.security import Security
from distributed.system import MEMORY_LIMIT
from distributed.utils import clean_dashboard_address

from cryosiam_dask import files, stages
from cryosiam_dask._version import __version__
from cryosiam_dask.core.executor import PAUSES, Executor, Interrupted, Progress, lasting
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import (
    ClusterError,
    CryosiamDaskError,
    DeviceError,
    LostClusterError,
    LostDeviceError,
    may_pass,
)

#: Let glibc keep what the network frees for its next layer and its next patch, in one heap for all threads. Otherwise
#: every large tensor is mapped anew, and the kernel's clearing of its pages takes a good part of a CPU's time.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 8_000_000_000, "MALLOC_MMAP_MAX_": 0, "MALLOC_ARENA_MAX": 1}

#: Dask would give a worker up whose replacement is not there within 15 s, less than its imports may take; and keep, for
#: each worker, the last 1000 messages that it was sent, each with a call. Its web servers have no password: they show,
#: and serve nothing that changes or reaches anything, whatever a configuration adds (``api`` retires workers, ``proxy``
#: passes requests on to other servers).
_SCHEDULER: dict[str, Any] = {
    "distributed.deploy.lost-worker-timeout": "10 minutes",
    "distributed.admin.low-level-log-length": 100,
    "distributed.scheduler.http.routes": [
        *(f"distributed.http.scheduler.{name}" for name in ("prometheus", "info", "json")),
        *(f"distributed.http.{name}" for name in ("health", "statics")),
    ],
    "distributed.worker.http.routes": ["distributed.http.worker.prometheus", "distributed.http.health"],
}

T = TypeVar("T")
R = TypeVar("R")

#: Calls in flight for each worker, of those that may overlap and as many of the others: one that runs, and one that
#: waits (or reads or writes) so that the worker never does. A worker has a thread for each.
IN_FLIGHT = 2
THREADS = 2 * IN_FLIGHT

#: Times that a call is tried on devices that fail or hang.
_TRIES = 3
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
    say
        Told where there is no worker for long.
    """

    def __init__(
        self,
        client: Client,
        progress: Progress = lambda name, done, total: None,
        *,
        hang_seconds: float = HANG_SECONDS,
        watch: Callable[[str, float | None], None] = lambda step, seconds: None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.client = client
        self.watch = watch
        self.say = say
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
    def hunger(self) -> int:
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
            self.say("no worker is left: what is in work goes on once another one comes to the scheduler")
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
        elif may_pass(error) and step.pauses[number] < len(PAUSES):
            pause = PAUSES[step.pauses[number]]
            LOG.warning(
                "%s, piece %d, worker %s: %s: tried again in %g s", step.prefix, number, flight.address, error, pause
            )
            step.pauses[number] += 1
            step.failed_at[number] = flight.address
            step.paused.append((time.monotonic() + pause, number))
            self.watch(step.name, None)
        else:
            self._end(step, lasting(error) if isinstance(error, Exception) else error)

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
        if step.tries[flight.number] >= _TRIES:
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


class Setup(WorkerPlugin):  # type: ignore[misc]  # untyped
    """Runs a function once in every worker process, those that replace a lost one included.

    Parameters
    ----------
    function
        For example one that loads the network, so that no block has to wait for it.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def setup(self, worker: Any) -> None:
        """See `distributed.WorkerPlugin`."""
        self.function()


def register_in_workers(client: Client, plugin: WorkerPlugin, name: str) -> None:
    """Register a plugin in all workers, those that come later included.

    Dask gives up where a worker dies while it is told of the plugin, and the workers after that one may not hear of it:
    all are then told again.

    Raises
    ------
    OSError
        If the scheduler is gone.
    """
    for seconds in (0.1, 0.5, 2.0):
        try:
            client.register_plugin(plugin, name=name)
        except CommClosedError:
            time.sleep(seconds)
        else:
            return
    client.register_plugin(plugin, name=name)


def load_tasks() -> None:
    """Import what tasks need, before a worker's threads do it at the same time.

    Of modules that import each other, as mrcfile's do, one thread would then see another's half made.
    """
    for room in (files, stages):
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            importlib.import_module(module.name)


@contextmanager
def open_cluster(
    device: Literal["cpu", "cuda"],
    workers: int,
    *,
    dashboard_address: str = "127.0.0.1:8787",
    scratch: str | None = None,
) -> Iterator[Client]:
    """Start workers on this machine and close them at the end.

    Keys that live in the memory of these processes alone keep everybody else out, other users of the machine included.

    Parameters
    ----------
    device
        ``"cuda"``: one worker for each visible GPU, pinned to it. ``"cpu"``: workers that compute in one thread.
    workers
        How many; for ``"cuda"`` at most the number of visible GPUs, 0 for all of them.
    dashboard_address
        Where the Dask dashboard listens; another port of the same host is taken if that one is in use.
    scratch
        Folder for Dask's own temporary files.

    Yields
    ------
    distributed.Client

    Raises
    ------
    DeviceError
        If GPUs were asked for and dask-cuda or enough GPUs are missing.
    ClusterError
        If workers die while they start, again and again, or cannot start at all, or the dashboard cannot listen there.
    """
    require_own_address(dashboard_address)
    settings = own_settings(scratch)
    options: dict[str, Any] = {
        "dashboard_address": dashboard_address,
        "host": "127.0.0.1",  # out of the network's reach; other users of this machine have no key
        "protocol": "tls://",
        "memory_limit": None,  # the number of workers is chosen by memory; a paused worker would only hang
        "local_directory": settings["temporary-directory"],
        "silence_logs": logging.CRITICAL,
    }
    environment = "distributed.nanny.pre-spawn-environ"
    with (
        _interrupts_are_ours(),
        warnings.catch_warnings(),
        dask.config.set({environment: dask.config.get(environment) | KEEP_MEMORY, **settings}),
    ):
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        if device == "cuda":
            cluster = _started(lambda: _cuda_cluster(workers, {"security": Security.temporary(), **options}))
        else:
            options |= {"n_workers": workers, "threads_per_worker": THREADS, "processes": True}
            cluster = _started(lambda: LocalCluster(security=Security.temporary(), **options))
    with dask.config.set(settings), cluster, Client(cluster, set_as_default=False) as client:
        register_in_workers(client, Setup(leave_at_once), "leave")
        yield client


def own_settings(scratch: str | None = None) -> dict[str, Any]:
    """What a cluster that is started here needs of Dask's configuration, whatever the user's own says.

    Parameters
    ----------
    scratch
        Folder for Dask's own temporary files; by default that of the configuration, or of the system. One that cannot
        be used is passed over, as next to nothing is written there.

    Raises
    ------
    ClusterError
        If no such folder can be used.
    """
    return _SCHEDULER | dashboard_link() | {"temporary-directory": _temporary_folder(scratch)}


def require_own_address(dashboard_address: str) -> None:
    """Refuse an address for the dashboard at which this machine cannot listen.

    Raises
    ------
    ClusterError
        With what the system says.
    """
    try:
        for each in clean_dashboard_address(dashboard_address):
            host = str(each["address"] or "")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host.strip("[]"), 0), family=family).close()
    except (OSError, ValueError, UnicodeError) as error:
        raise ClusterError(
            "must be an address of this machine and a port",
            place=f"--dashboard-address {dashboard_address}",
            value=error,
            remedy="Such as 127.0.0.1:8787",
        ) from None


def dashboard_link() -> dict[str, str]:
    """Dask's setting of the dashboard's address as users see it, where theirs names variables that are not set here."""
    try:
        dask.config.get("distributed.dashboard.link").format(**{**os.environ, "scheme": "", "host": "", "port": ""})
    except (AttributeError, LookupError, ValueError):
        return {"distributed.dashboard.link": "{scheme}://{host}:{port}/status"}
    return {}


def _temporary_folder(scratch: str | None) -> str:
    why: OSError | None = None
    for wanted in (scratch, dask.config.get("temporary-directory", None), None):
        try:
            folder = str(wanted or tempfile.gettempdir())
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder):
                return folder
        except OSError as error:
            why = error
            LOG.warning("%s cannot be used for temporary files: %s", wanted or "the system's folder", error)
    raise ClusterError(
        "a folder for temporary files must be there, and room in it",
        place="this machine",
        value=why,
        remedy="Set TMPDIR to one that can be written to",
    )


def _started(make: Callable[[], Any]) -> Any:
    """A new cluster; made again where one of its processes died while it started, which closes the others."""
    for left in reversed(range(_TRIES)):
        try:
            return make()
        except CryosiamDaskError:
            raise
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            # Of a process that dies or does not answer no more is told than that it did not start.
            died = isinstance(cause, RuntimeError | TimeoutError | CommClosedError)
            if not (died and left):
                raise ClusterError(
                    "worker processes must be able to start",
                    place="this machine",
                    value=str(cause).rstrip(".") if died else f"{type(cause).__name__}: {str(cause).rstrip('.')}",
                    remedy=_remedy(cause, died),
                ) from error


def _remedy(cause: BaseException, died: bool) -> str:
    if died or isinstance(cause, MemoryError) or getattr(cause, "errno", None) in (errno.ENOMEM, errno.EAGAIN):
        return "Look whether it has memory left for them, use fewer --workers, and repeat the command"
    return "Look into Dask's own configuration (~/.config/dask, /etc/dask, and DASK_... in the environment)"


#: Seconds in which a scheduler must answer, and in which it must have a worker.
_ANSWER_SECONDS, _WORKER_SECONDS = 10, 120.0
#: What must be the same in every worker as here, since results or messages depend on it.
_SAME = ("python", "cryosiam_dask", "dask", "distributed", "numpy", "torch", "zarr")


@contextmanager
def join_cluster(
    *,
    address: str | None = None,
    scheduler_file: Path | None = None,
    workers: int | None = None,
    seconds: float = _WORKER_SECONDS,
) -> Iterator[Client]:
    """Use workers that somebody else started, and leave them running at the end.

    Parameters
    ----------
    address
        Of the scheduler, such as ``tcp://node1:8786``; ``tls://…`` takes its certificates from Dask's configuration.
    scheduler_file
        Instead of the address, the file that ``dask scheduler --scheduler-file`` wrote.
    workers
        How many to wait for, one by default; others may come later.
    seconds
        In which they must be there.

    Yields
    ------
    distributed.Client

    Raises
    ------
    ClusterError
        If nobody answers, no worker comes, or a worker has other versions of what results depend on.
    """
    place = f"--scheduler-file {scheduler_file}" if scheduler_file else f"--scheduler {address}"
    encrypted = bool(dask.config.get("distributed.comm.require-encryption"))
    if scheduler_file is not None:
        try:
            address = str(json.loads(scheduler_file.read_text())["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClusterError(
                "must be a file that 'dask scheduler --scheduler-file' wrote",
                place=place,
                value=getattr(error, "strerror", None) or "something else",
                remedy="Start the scheduler first, on a disk that all nodes see",
            ) from None
    try:
        with _silent():
            # Asked before, as a client that meets nobody leaves half of itself behind.
            socket.create_connection(get_address_host_port(str(address)), timeout=_ANSWER_SECONDS).close()
            client = Client(address, timeout=_ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if str(address).startswith("tls://") and not Security().tls_ca_file:
            raise ClusterError(
                "a scheduler with TLS is entered with its keys",
                place=place,
                value="none in Dask's configuration",
                remedy="Set distributed.comm.tls there, as for the scheduler: ca-file, and cert and key of the client",
            ) from None
        if encrypted and str(address).startswith("tcp://"):
            raise ClusterError(
                "Dask's configuration demands encryption, and this scheduler has none",
                place=place,
                remedy="Start it with --protocol tls, or unset distributed.comm.require-encryption",
            ) from None
        raise ClusterError(
            "a Dask scheduler must answer",
            place=place,
            value=f"none within {_ANSWER_SECONDS} s ({str(error).splitlines()[0]})",
            remedy="Check the address, and that the scheduler runs and a firewall lets it be reached",
        ) from None
    with _silent(), dask.config.set(dashboard_link()), client:
        try:
            client.wait_for_workers(workers or 1, timeout=seconds)
        except TimeoutError:
            raise ClusterError(
                "the scheduler must have workers",
                place=place,
                value=f"{len(client.nthreads())} of {workers or 1} within {seconds:.0f} s",
                remedy="Start them: dask worker, or dask cuda worker, with --nthreads 4 and this scheduler",
            ) from None
        require_versions(client, place)
        yield client


def require_versions(client: Client, place: str) -> None:
    """Refuse workers whose versions are not those of this process; `place` says whose they are.

    Raises
    ------
    ClusterError
        If one has others, or lacks this package.
    """
    here = versions()
    try:
        there = ask(client, versions)
    except LostClusterError:
        raise
    except Exception as error:
        raise ClusterError(
            "every worker must be able to import cryosiam_dask",
            place=place,
            value=f"{type(error).__name__}: {error}",
            remedy="Start the workers in the environment that this command runs in",
        ) from None
    for worker, found in there.items():
        others = [f"{name} {found.get(name)} (here {here[name]})" for name in _SAME if found.get(name) != here[name]]
        if others:
            raise ClusterError(
                "workers must have the versions that this command has",
                place=f"{place}, worker {worker}",
                value=", ".join(others),
                remedy="Start the workers in the environment that this command runs in",
            )


def versions() -> dict[str, str]:
    """Versions of this process's Python and of the packages that results and messages depend on."""
    found = {name: package_version(name) for name in _SAME if name not in ("python", "cryosiam_dask")}
    return {"python": platform.python_version(), "cryosiam_dask": __version__, **found}


def is_loopback(address: str) -> bool:
    """Whether an address (``host:port``, with or without a protocol) is of this machine alone."""
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def who_else_enters(client: Client) -> str | None:
    """Who can have the workers of a scheduler run what he likes, beside its owner; ``None``: nobody."""
    address = str(client.scheduler.address)
    if address.startswith(("tls://", "wss://", "inproc://")):
        return None
    return "every user of this machine" if is_loopback(address) else "whoever reaches it"


@contextmanager
def reported(client: Client, path: Path, attend: Callable[[str], None]) -> Iterator[None]:
    """Write Dask's report of what every worker did meanwhile to an HTML file, which needs no network to be read.

    A page is no reason for a run to fail: what is wrong with it, `attend` is told.
    """
    report = performance_report(filename=str(path), mode="inline")
    with client.as_current():
        report.__enter__()
        try:
            yield
        finally:
            try:
                report.__exit__(None, None, None)
            except Exception as error:
                attend(f"{path}: the performance report could not be written: {error}")


class _LoggedWarnings(WorkerPlugin):  # type: ignore[misc]  # untyped
    """Lets every worker process log the warnings that Python's libraries raise in it, instead of printing them."""

    def setup(self, worker: Any) -> None:
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addFilter(_as_text)

    def teardown(self, worker: Any) -> None:
        logging.captureWarnings(False)
        logging.getLogger("py.warnings").removeFilter(_as_text)


def _as_text(record: logging.LogRecord) -> bool:
    """Let a record hold what a message can carry: names of files need not be UTF-8."""
    record.msg, record.args = record.getMessage().encode("utf-8", "backslashreplace").decode(), None
    return True


@contextmanager
def forwarded_warnings(client: Client) -> Iterator[None]:
    """Log here, meanwhile, the warnings that Python's libraries raise in the workers."""
    register_in_workers(client, _LoggedWarnings(), "warnings")
    client.forward_logging("py.warnings")
    try:
        yield
    finally:
        if client.status == "running":
            with suppress(Exception):  # of a cluster that is just going
                client.unforward_logging("py.warnings")
                client.unregister_worker_plugin("warnings")


@contextmanager
def _silent() -> Iterator[None]:
    """Without what distributed logs of a connection that it could not make, or lost: an error says it."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def ask(client: Client, function: Callable[..., R], *arguments: object) -> dict[str, R]:
    """What a function returns in every worker process, by its address; one that is lost meanwhile is left out.

    Raises
    ------
    LostClusterError
        If no worker answers.
    Exception
        Whatever the function raised in one of them.
    """
    answers = client.run(function, *arguments, on_error="return")
    found = {worker: answer for worker, answer in answers.items() if not isinstance(answer, OSError)}
    if not found:
        raise LostClusterError(
            "a worker must stay until the run is over",
            place=client.scheduler.address,
            value="none that answers",
            remedy="Look at what the workers said, start them again and repeat the command",
        )
    for answer in found.values():
        if isinstance(answer, Exception):
            raise answer
    return found


def describe_devices(client: Client, describe: Callable[[], str | None]) -> Literal["cpu", "cuda"]:
    """Which device the workers have: every one a GPU of its own, or none of them any.

    Parameters
    ----------
    client
        Of the cluster.
    describe
        Names the GPU that a process uses, ``None`` where it has none.

    Raises
    ------
    DeviceError
        If two workers have the same GPU, or only some have any.
    """
    found: dict[str, str | None] = ask(client, describe)
    with_gpu = {worker: gpu for worker, gpu in found.items() if gpu is not None}
    if not with_gpu:
        return "cpu"
    if len(with_gpu) < len(found):
        raise DeviceError(
            "all workers must have a GPU, or none",
            value=f"{len(with_gpu)} of {len(found)} with one, and {min(set(found) - set(with_gpu))} without",
            remedy="Start the others with 'dask cuda worker', or take them away",
        )
    for worker, gpu in with_gpu.items():
        twin = next((other for other in with_gpu if other != worker and with_gpu[other] == gpu), None)
        if twin:
            raise DeviceError(
                "every worker must have a GPU of its own",
                value=f"{gpu} used by {worker} and {twin}",
                remedy="Start the workers with 'dask cuda worker', which pins each to a GPU",
            )
    return "cuda"


def memory_of_workers(client: Client, of_gpu: Callable[[], int | None] | None) -> tuple[int, int, int | None]:
    """Bytes that the worker with the least memory may use: alone on its host, beside others there, and of its GPU.

    Parameters
    ----------
    client
        Of the cluster.
    of_gpu
        Tells the last of them in a worker; ``None``: nobody asks.
    """
    known = client.scheduler_info(n_workers=-1)["workers"]
    found = ask(client, _memory, of_gpu)
    hosts = Counter(known[worker]["host"] for worker in found if worker in known)
    alone, shared = [], []
    for worker, (memory, _) in found.items():
        limit = known.get(worker, {}).get("memory_limit") or memory
        alone.append(min(limit, memory))
        shared.append(min(limit, memory // max(1, hosts[known.get(worker, {}).get("host")])))
    gpus = [gpu for _, gpu in found.values() if gpu is not None]
    return min(alone), min(shared), min(gpus, default=None)


def _memory(of_gpu: Callable[[], int | None] | None) -> tuple[int, int | None]:
    return int(MEMORY_LIMIT), of_gpu() if of_gpu else None


def leave_at_once() -> None:
    """Let this process end without the destructors of C++ libraries.

    Those that meet a thread amid its work, as in a worker whose run was interrupted, end the process with a message of
    their own on the user's terminal.
    """
    atexit.register(os._exit, 0)


@contextmanager
def _interrupts_are_ours() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to the whole group of processes, away from the workers started meanwhile.

    They inherit the blocked signal from the thread that starts them, as do those that replace a lost one; the client
    gets it as soon as they run, and ends them in order.
    """
    # Started later, Python's tracker of semaphores would unblock the signal in the thread that starts workers. A worker
    # that is ended amid a task leaves one semaphore to it, which need not be told to anybody.
    silent = "ignore::UserWarning:multiprocessing.resource_tracker"
    warnings_before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{warnings_before},{silent}" if warnings_before else silent
    resource_tracker.ensure_running()
    if warnings_before is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = warnings_before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cuda_cluster(workers: int, options: dict[str, Any]) -> Any:
    try:
        from dask_cuda import LocalCUDACluster
        from dask_cuda.utils import get_n_gpus
    except ImportError:
        raise DeviceError(
            "running on GPUs needs dask-cuda",
            remedy="Install the extra for your CUDA version, for example pip install 'cryosiam-dask[gpu-cu12]', "
            "or use --device cpu",
        ) from None
    available = get_n_gpus()
    if available < max(1, workers):
        raise DeviceError(
            f"--workers asks for {max(1, workers)} GPUs",
            value=f"{available} visible (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            remedy="Ask for fewer, or make more GPUs visible",
        )
    return LocalCUDACluster(n_workers=workers or available, threads_per_worker=THREADS, **options)
