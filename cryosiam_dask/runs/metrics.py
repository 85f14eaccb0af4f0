"""What a run has done, in Prometheus form, on the ``/metrics`` of the scheduler's own dashboard.

A `Meter` counts here, beside whatever else is told of a run, and sends its totals to the scheduler every few seconds; a
plugin of the scheduler shows them together with what Dask measures itself, and what each worker's GPU is doing.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from distributed import Client, SchedulerPlugin
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from cryosiam_dask.runs.progress import Reporter

_TOPIC = "cryosiam-dask"
#: Seconds between two messages to the scheduler.
_INTERVAL = 2.0
_OUTCOMES = ("done", "failed")


class Meter:
    """A reporter that counts what it passes on.

    Parameters
    ----------
    reporter
        Told the same.
    client
        Of the cluster whose scheduler shows the counts.
    """

    def __init__(self, reporter: Reporter, client: Client) -> None:
        self._reporter, self._client = reporter, client
        self._run = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._pieces: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._retries: Counter[str] = Counter()
        self._tomograms: Counter[str] = Counter()
        self._voxels = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        with suppress(Exception):  # a scheduler of another environment: the run goes on without
            client.register_plugin(Collector())
            self._thread = threading.Thread(target=self._send_often, daemon=True, name="metrics")
            self._thread.start()

    def watch(self, step: str, seconds: float | None) -> None:
        """A piece of a step came back, `seconds` after a worker had been given it; ``None``: it is tried again."""
        with self._lock:
            if seconds is None:
                self._retries[step] += 1
            else:
                self._pieces[step] += 1
                self._seconds[step] += seconds

    def begin(self, tomogram: str) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        self._reporter.begin(tomogram)

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        self._reporter.step(tomogram, name, done, total)

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        with self._lock:
            self._voxels += voxels
            if failed or voxels:
                self._tomograms[_OUTCOMES[failed]] += 1
        self._reporter.end(tomogram, message, failed=failed, voxels=voxels, left=left)

    def inform(self, message: str) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        self._reporter.inform(message)

    def close(self) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        self._over.set()
        if self._thread:
            self._thread.join()
        self._reporter.close()

    def _totals(self) -> dict[str, Any]:
        with self._lock:
            return {
                "run": self._run,
                "pieces": dict(self._pieces),
                "seconds": dict(self._seconds),
                "retries": dict(self._retries),
                "tomograms": dict(self._tomograms),
                "voxels": self._voxels,
            }

    def _send_often(self) -> None:
        sent: dict[str, Any] = {}
        while True:
            over = self._over.wait(_INTERVAL)
            totals = self._totals()
            if totals != sent:
                with suppress(Exception):  # of a scheduler that is gone, which the run finds out itself
                    self._client.log_event(_TOPIC, totals)
                    sent = totals
            if over:
                return


class Collector(SchedulerPlugin):  # type: ignore[misc]  # untyped
    """Shows what the runs on a scheduler have told, and its workers' GPUs; see `distributed.SchedulerPlugin`."""

    name = "cryosiam-dask metrics"
    idempotent = True

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Any]] = {}
        self._scheduler: Any = None

    async def start(self, scheduler: Any) -> None:
        """Begin to be shown."""
        self._scheduler = scheduler
        REGISTRY.register(self)

    async def close(self) -> None:
        """Be shown no more."""
        with suppress(KeyError):
            REGISTRY.unregister(self)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take the totals of a run."""
        if topic == _TOPIC:
            self._runs[msg["run"]] = msg

    def _sum(self, name: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for run in self._runs.values():
            total.update(run[name])
        return total

    def collect(self) -> Iterator[Metric]:
        """The families of metrics, for prometheus_client."""
        pieces, seconds = self._sum("pieces"), self._sum("seconds")
        times = SummaryMetricFamily(
            "cryosiam_dask_piece_seconds",
            "Seconds from when a worker was given a piece of a step (a block, a slab, a file) to its result",
            labels=["step"],
        )
        for step, count in sorted(pieces.items()):
            times.add_metric([step], count, seconds[step])
        yield times
        retries = CounterMetricFamily(
            "cryosiam_dask_retries", "Pieces given to another worker, as theirs had died, hung or lost its device",
            labels=["step"],
        )  # fmt: skip
        for step, count in sorted(self._sum("retries").items()):
            retries.add_metric([step], count)
        yield retries
        tomograms = CounterMetricFamily("cryosiam_dask_tomograms", "Tomograms that ended", labels=["status"])
        ended = self._sum("tomograms")
        for status in _OUTCOMES:
            tomograms.add_metric([status], ended[status])
        yield tomograms
        yield CounterMetricFamily(
            "cryosiam_dask_voxels", "Voxels of tomograms that were done, for each model",
            value=sum(run["voxels"] for run in self._runs.values()),
        )  # fmt: skip
        yield from self._gpus()

    def _gpus(self) -> Iterator[Metric]:
        families = [
            GaugeMetricFamily(f"cryosiam_dask_gpu_{name}", text, labels=["worker", "gpu"])
            for name, text in (
                ("memory_used_bytes", "Memory in use on a worker's GPU"),
                ("memory_total_bytes", "Memory of a worker's GPU"),
                ("utilisation_ratio", "Share of the latest second in which a worker's GPU computed"),
            )
        ]
        for worker in list(self._scheduler.workers.values()):
            now, fixed = worker.metrics.get("gpu") or {}, worker.extra.get("gpu") or {}
            busy = now.get("utilization")
            values = now.get("memory-used"), fixed.get("memory-total"), None if busy is None else busy / 100
            for family, value in zip(families, values, strict=True):
                if value is not None:
                    family.add_metric([worker.address, str(fixed.get("name") or "")], value)
        yield from (family for family in families if family.samples)
