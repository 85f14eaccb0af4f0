"""Settings shared by all tests."""

import os

import pytest
from hypothesis import settings

from cryosiam_dask.core.machine import cores

# Examples on shared machines may take long; what they show must not depend on it.
settings.register_profile("no deadline", deadline=None, derandomize=True)
settings.load_profile("no deadline")

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others, threads that wait for one another would only take their cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

    import torch

    torch.set_num_threads(1)

#: The files of tests that take longest. They begin first, so that none is alone at the end.
SLOWEST = (
    "test_docs", "test_denoise", "test_cluster", "test_cli", "test_benchmarks", "test_collection", "test_slurm",
    "test_resume", "test_disk", "test_gpu_workers", "test_run", "test_passing_errors", "test_segment", "test_hosts",
)  # fmt: skip


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes."""
    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
