"""Where the work runs: worker processes of this machine, each with one GPU or one CPU core.

A worker has two threads, so that it can read a block and write another one while it computes a third. What does not say
that it can be overlapped like this runs alone in its process.

`open_cluster` starts them and gives a `DaskExecutor`, which runs the per-chunk functions of the stages on them with a
bounded number in flight, so that neither the scheduler's memory nor the workers' grows with the size of a tomogram.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Generic, Literal, TypeVar

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, WorkerPlugin, as_completed

from cryosiam_dask.errors import DeviceError

#: Let glibc keep what the network frees for its next layer and its next patch, in one heap for all threads. Otherwise
#: every large tensor is mapped anew, and the kernel's clearing of its pages takes a good part of a CPU's time.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 8_000_000_000, "MALLOC_MMAP_MAX_": 0, "MALLOC_ARENA_MAX": 1}

T = TypeVar("T")
R = TypeVar("R")

#: Called with the name of the running step, the calls done and the calls in all.
Progress = Callable[[str, int, int], None]


class DaskExecutor:
    """Runs calls on the workers of a Dask cluster (see `cryosiam_dask.executor.Executor`).

    Parameters
    ----------
    client
        The cluster's client.
    progress
        Told of every call that is done.
    """

    #: Calls in flight for each worker: one that runs, and one that waits (or, with `overlap`, reads or writes) so that
    #: the worker never does.
    IN_FLIGHT = 2

    def __init__(self, client: Client, progress: Progress = lambda name, done, total: None) -> None:
        self.client = client
        self.progress = progress

    @property
    def workers(self) -> int:
        """Worker processes of the cluster."""
        return max(1, len(self.client.nthreads()))

    def map(self, function: Callable[[T], R], items: Sequence[T], *, name: str, overlap: bool = False) -> list[R]:
        """Return ``[function(item) for item in items]``, computed by the workers.

        Raises
        ------
        DeviceError
            If workers died of a call again and again.
        Exception
            Whatever the first failing call raised; calls that have not started are cancelled.
        """
        call = function if overlap else _Alone(function)
        results: dict[int, R] = {}
        prefix = f"{name}-{uuid.uuid4().hex}"
        waiting = iter(enumerate(items))
        flying: dict[Future, int] = {}
        done = as_completed(loop=self.client.loop)

        def launch() -> None:
            for i, item in waiting:
                future = self.client.submit(call, item, key=(prefix, i), pure=False)
                flying[future] = i
                done.add(future)
                return

        self.progress(name, 0, len(items))
        try:
            for _ in range(self.IN_FLIGHT * self.workers):
                launch()
            for future in done:
                results[flying.pop(future)] = future.result()
                launch()
                self.progress(name, len(results), len(items))
        except KilledWorker as error:
            raise DeviceError(
                "a worker process died several times of the same piece of work",
                place=f"step '{name}'",
                value=str(error).split(".")[0],
                remedy="Most likely the machine ran out of memory: use fewer --workers, or a smaller batch_size, "
                "patch_size or block_size",
            ) from None
        finally:
            if flying:
                self.client.cancel(list(flying), force=True)
        return [results[i] for i in range(len(items))]


_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Alone(Generic[T, R]):
    """`function`, of which no two calls run at the same time in a process."""

    function: Callable[[T], R]

    def __call__(self, item: T) -> R:
        with _ALONE:
            return self.function(item)


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


@contextmanager
def open_cluster(
    device: Literal["cpu", "cuda"],
    workers: int,
    *,
    dashboard_address: str = "127.0.0.1:8787",
    scratch: str | None = None,
) -> Iterator[Client]:
    """Start workers on this machine and close them at the end.

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
    """
    options: dict[str, Any] = {
        "dashboard_address": dashboard_address,
        "host": "127.0.0.1",  # nobody else on the network may submit work
        "memory_limit": None,  # the number of workers is chosen by memory; a paused worker would only hang
        "local_directory": scratch,
        "silence_logs": logging.CRITICAL,
    }
    environment = "distributed.nanny.pre-spawn-environ"
    with (
        _interrupts_are_ours(),
        warnings.catch_warnings(),
        dask.config.set({environment: dask.config.get(environment) | _KEEP_MEMORY}),
    ):
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        if device == "cuda":
            cluster = _cuda_cluster(workers, options)
        else:
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=DaskExecutor.IN_FLIGHT, processes=True, **options
            )
    with cluster, Client(cluster, set_as_default=False) as client:
        client.register_plugin(Setup(_leave_at_once), name="leave")
        yield client


def _leave_at_once() -> None:
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
    return LocalCUDACluster(n_workers=workers or available, threads_per_worker=DaskExecutor.IN_FLIGHT, **options)
