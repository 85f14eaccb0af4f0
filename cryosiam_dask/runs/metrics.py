"""Export a run's counts in the Prometheus format at ``/metrics`` of the scheduler's dashboard.

A `Meter` counts in this process and sends its totals to the scheduler every few seconds. A plugin of the scheduler
exports them together with Dask's own metrics and the state of each worker's GPU.
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


class Meter(Reporter):
    """A reporter that counts tasks, retries, tomograms and voxels.

    Parameters
    ----------
    client
        Client of the cluster whose scheduler exports the counts.
    """

    def __init__(self, client: Client) -> None:
        self._client, self._run = client, uuid.uuid4().hex
        self._lock = threading.Lock()
        self._tasks: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._retries: Counter[str] = Counter()
        self._tomograms: Counter[str] = Counter()
        self._voxels = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        with suppress(Exception):  # with a scheduler of another environment, the run continues without metrics
            client.register_plugin(Collector())
            self._thread = threading.Thread(target=self._send_often, daemon=True, name="metrics")
            self._thread.start()

    def watch(self, step: str, seconds: float | None) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        with self._lock:
            if seconds is None:
                self._retries[step] += 1
            else:
                self._tasks[step] += 1
                self._seconds[step] += seconds

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        with self._lock:
            self._voxels += voxels
            if failed or voxels:
                self._tomograms[_OUTCOMES[failed]] += 1

    def close(self) -> None:
        """See `cryosiam_dask.runs.progress.Reporter`."""
        self._over.set()
        if self._thread:
            self._thread.join()

    def _totals(self) -> dict[str, Any]:
        with self._lock:
            return {
                "run": self._run,
                "tasks": dict(self._tasks),
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
                with suppress(Exception):  # a lost scheduler is noticed elsewhere
                    self._client.log_event(_TOPIC, totals)
                    sent = totals
            if over:
                return


class Collector(SchedulerPlugin):  # type: ignore[misc]  # untyped
    """Export the counts of all runs on a scheduler and the state of its GPUs; see `distributed.SchedulerPlugin`."""

    name = "cryosiam-dask metrics"
    idempotent = True

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Any]] = {}
        self._scheduler: Any = None

    async def start(self, scheduler: Any) -> None:
        """Start exporting."""
        self._scheduler = scheduler
        REGISTRY.register(self)

    async def close(self) -> None:
        """Stop exporting."""
        with suppress(KeyError):
            REGISTRY.unregister(self)

    def log_event(self, topic: str, msg: Any) -> None:
        """Receive the totals of a run."""
        if topic == _TOPIC:
            self._runs[msg["run"]] = msg

    def _sum(self, name: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for run in self._runs.values():
            total.update(run[name])
        return total

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, for prometheus_client."""
        tasks, seconds = self._sum("tasks"), self._sum("seconds")
        times = SummaryMetricFamily(
            "cryosiam_dask_piece_seconds",
            "Seconds from the submission of a task to its result, by step",
            labels=["step"],
        )
        for step, count in sorted(tasks.items()):
            times.add_metric([step], count, seconds[step])
        yield times
        retries = CounterMetricFamily(
            "cryosiam_dask_retries",
            "Tasks that were retried after a worker died, hung or lost its device, or a disk failed",
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
            "cryosiam_dask_voxels", "Voxels of finished tomograms, summed over models",
            value=sum(run["voxels"] for run in self._runs.values()),
        )  # fmt: skip
        yield from self._gpus()

    def _gpus(self) -> Iterator[Metric]:
        families = [
            GaugeMetricFamily(f"cryosiam_dask_gpu_{name}", text, labels=["worker"])
            for name, text in (
                ("memory_used_bytes", "Memory in use on a worker's GPU"),
                ("memory_total_bytes", "Memory of a worker's GPU"),
                ("utilisation_ratio", "Share of the last second in which a worker's GPU was busy"),
            )
        ]
        for worker in list(self._scheduler.workers.values()):
            # From Dask's system monitor. The metrics named "gpu" only exist if NVML was loaded before Dask.
            busy = worker.metrics.get("gpu_utilization")
            used, total = worker.metrics.get("gpu_memory_used"), worker.metrics.get("gpu-memory-total")
            for family, value in zip(families, (used, total, None if busy is None else busy / 100), strict=True):
                if value is not None:
                    family.add_metric([worker.address], value)
        yield from (family for family in families if family.samples)
