"""What a run has done, asked of the scheduler's own endpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import pytest
from distributed import Client
from prometheus_client.parser import text_string_to_metric_families

from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.metrics import Meter
from cryosiam_dask.runs.progress import Reporters
from support.runs import Listener

Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_cluster("cpu", 1, dashboard_address="127.0.0.1:0") as client:
        yield client


def asked(client: Client, label: str) -> Samples:
    """Every value of ours that Prometheus would read, by name and one label."""
    with urlopen(client.dashboard_link.replace("/status", "/metrics"), timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.get(label, "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("cryosiam_dask_")
    }


def double(number: int) -> int:
    return 2 * number


def test_what_was_done_is_counted_beside_what_dask_measures(client: Client) -> None:
    listener = Listener()
    meter = Reporters(Meter(client), listener)
    executor = DaskExecutor(client, watch=meter.watch)
    meter.begin("TS_1")
    executor.share("TS_1", 0, lambda name, done, total: meter.step("TS_1", name, done, total)).map(
        double, range(7), name="predict"
    )
    executor.map(double, range(3), name="export")
    meter.end("TS_1", "done in 3 s", voxels=1000)
    meter.end("TS_2", "FAILED", failed=True)
    meter.end("TS_3", "left as it is, to go on from here")
    meter.watch("predict", None)
    meter.close()
    assert "begin TS_1" in listener.messages  # all is passed on
    steps, ends = asked(client, "step"), asked(client, "status")
    assert steps["cryosiam_dask_piece_seconds_count", "predict"] == 7
    assert steps["cryosiam_dask_piece_seconds_count", "export"] == 3
    assert 0 < steps["cryosiam_dask_piece_seconds_sum", "predict"] < 600
    assert steps["cryosiam_dask_retries_total", "predict"] == 1
    assert ends["cryosiam_dask_tomograms_total", "done"] == ends["cryosiam_dask_tomograms_total", "failed"] == 1
    assert ends["cryosiam_dask_voxels_total", ""] == 1000
    # Another run on the same scheduler adds to it: a counter never falls.
    again = Meter(client)
    again.end("TS_2", "done in 3 s", voxels=500)
    again.close()
    ends = asked(client, "status")
    assert ends["cryosiam_dask_tomograms_total", "done"] == 2 and ends["cryosiam_dask_voxels_total", ""] == 1500


def pretend_gpu(dask_worker: Any) -> None:
    """Let a worker's monitor tell of a GPU, as it does by itself where NVML finds one."""
    told = {"gpu-memory-total": 8_000_000, "gpu_utilization": 42, "gpu_memory_used": 3_000_000}
    dask_worker.monitor.quantities |= {name: deque([value]) for name, value in told.items()}


def test_what_workers_tell_of_their_gpus_is_shown(client: Client) -> None:
    Meter(client).close()
    assert not any("gpu" in name for name, _ in asked(client, "worker"))
    client.run(pretend_gpu)
    (worker,) = client.scheduler_info(n_workers=-1)["workers"]
    for _ in range(600):
        if ("cryosiam_dask_gpu_utilisation_ratio", worker) in (found := asked(client, "worker")):
            break
        time.sleep(0.1)
    assert found["cryosiam_dask_gpu_utilisation_ratio", worker] == 0.42
    assert found["cryosiam_dask_gpu_memory_used_bytes", worker] == 3_000_000
    assert found["cryosiam_dask_gpu_memory_total_bytes", worker] == 8_000_000
    with urlopen(client.dashboard_link.replace("/status", "/individual-gpu-memory"), timeout=30) as page:
        assert page.status == 200
