"""Workers of a cluster. Nothing is imported here that the scheduler must not import."""

from __future__ import annotations

import time

from distributed import Client


def wait_for_workers(client: Client, count: int) -> None:
    """Wait until a cluster has so many workers.

    `Client.wait_for_workers` gives its cluster a list of workers that may lack one that has just joined, and then the
    cluster cannot be closed once this one has died.
    """
    while len(client.nthreads()) < count:
        time.sleep(0.02)
