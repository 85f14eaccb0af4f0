"""Set up workers when they start, and query them."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import pkgutil
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version as package_version
from typing import Any, Literal, TypeVar

from distributed import Client, WorkerPlugin
from distributed.comm import CommClosedError
from distributed.system import MEMORY_LIMIT

from cryosiam_dask import files, stages
from cryosiam_dask._version import __version__
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import (
    ClusterError,
    DeviceError,
    LostClusterError,
    may_be_done_elsewhere,
)

T = TypeVar("T")
R = TypeVar("R")


class Setup(WorkerPlugin):  # type: ignore[misc]  # untyped
    """Run a function once in every worker process, including those that replace a lost one.

    Parameters
    ----------
    function
        For example one that loads the network, so that no task has to wait for it.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def setup(self, worker: Any) -> None:
        """See `distributed.WorkerPlugin`."""
        self.function()


def register_in_workers(client: Client, plugin: WorkerPlugin, name: str) -> None:
    """Register a plugin in all workers, including those that join later.

    If a worker dies during the registration, Dask gives up and other workers may lack the plugin, so it is registered
    again.

    Raises
    ------
    OSError
        If the connection to the scheduler is lost.
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
    """Import the modules that tasks need before several threads of a worker import them at the same time.

    A thread could otherwise see half-initialized modules that import each other, such as those of mrcfile.
    """
    for package in (files, stages):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


#: Packages whose versions must be the same in every worker as here, because results or messages depend on them.
_SAME = ("python", "cryosiam_dask", "dask", "distributed", "numpy", "torch", "zarr")


def require_versions(client: Client, place: str) -> None:
    """Check that all workers have the same versions as this process; `place` names the cluster in errors.

    Raises
    ------
    ClusterError
        If a worker has other versions, or lacks this package.
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
                "workers must have the same versions as this command",
                place=f"{place}, worker {worker}",
                value=", ".join(others),
                remedy="Start the workers in the environment that this command runs in",
            )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results and messages depend on, in this process."""
    found = {name: package_version(name) for name in _SAME if name not in ("python", "cryosiam_dask")}
    return {"python": platform.python_version(), "cryosiam_dask": __version__, **found}


class _LoggedWarnings(WorkerPlugin):  # type: ignore[misc]  # untyped
    """Make worker processes log the warnings of Python's libraries instead of printing them."""

    def setup(self, worker: Any) -> None:
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addFilter(_as_text)

    def teardown(self, worker: Any) -> None:
        logging.captureWarnings(False)
        logging.getLogger("py.warnings").removeFilter(_as_text)


def _as_text(record: logging.LogRecord) -> bool:
    """Make a record's text valid UTF-8, so that it can be sent even if it contains a file name that is not."""
    record.msg, record.args = record.getMessage().encode("utf-8", "backslashreplace").decode(), None
    return True


@contextmanager
def forwarded_warnings(client: Client) -> Iterator[None]:
    """Log the workers' Python warnings in this process during the ``with`` block."""
    register_in_workers(client, _LoggedWarnings(), "warnings")
    client.forward_logging("py.warnings")
    try:
        yield
    finally:
        # In a thread, because an unresponsive worker would keep this process waiting.
        thread = threading.Thread(target=_forget_warnings, args=(client,), daemon=True, name="forget warnings")
        thread.start()
        thread.join(_FORGET_SECONDS)


#: Seconds for all workers to stop logging warnings.
_FORGET_SECONDS = 5.0


def _forget_warnings(client: Client) -> None:
    if client.status == "running":
        with suppress(Exception):  # the cluster may be closing
            client.unforward_logging("py.warnings")
            client.unregister_worker_plugin("warnings")


def ask(client: Client, function: Callable[..., R], *arguments: object) -> dict[str, R]:
    """Return the results of a function in every worker process, by address, without workers lost meanwhile.

    Workers whose GPU does not work or is too small are left out, too, if another worker returns more than ``None``: it
    takes over their work.

    Raises
    ------
    LostClusterError
        If no worker responds.
    Exception
        Whatever the function raised in a worker.
    """
    answers = client.run(function, *arguments, on_error="return")
    found = {worker: answer for worker, answer in answers.items() if not isinstance(answer, OSError)}
    if not found:
        raise _workers_are_gone(client)
    refused = {worker: answer for worker, answer in found.items() if may_be_done_elsewhere(answer)}
    if any(answer is not None for worker, answer in found.items() if worker not in refused):
        for worker in refused:
            LOG.warning("worker %s: %s", worker, found.pop(worker))
    for answer in found.values():
        if isinstance(answer, Exception):
            raise answer
    return found


def workers_of(client: Client) -> dict[str, Any]:
    """Return what the scheduler knows about every worker, by address."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def wait_for_gpu(client: Client, describe: Callable[[], str | None], seconds: float) -> None:
    """Wait until a worker with a GPU has joined, because workers without one may start sooner.

    Parameters
    ----------
    client, describe
        See `describe_devices`.
    seconds
        Maximum seconds to wait.
    """
    end = time.monotonic() + seconds
    while describe_devices(client, describe) == "cpu" and time.monotonic() < end:
        time.sleep(0.5)


def describe_devices(client: Client, describe: Callable[[], str | None]) -> Literal["cpu", "cuda"]:
    """Return the device of the workers: ``"cuda"`` if any worker has a GPU. No two workers may share a GPU.

    Parameters
    ----------
    client
        Client of the cluster.
    describe
        Returns the name of the GPU that a process uses; ``None`` if it has none.

    Raises
    ------
    DeviceError
        If two workers share a GPU.
    """
    found: dict[str, str | None] = ask(client, describe)
    with_gpu = {worker: gpu for worker, gpu in found.items() if gpu is not None}
    if not with_gpu:
        return "cpu"
    for worker, gpu in with_gpu.items():
        twin = next((other for other in with_gpu if other != worker and with_gpu[other] == gpu), None)
        if twin:
            raise DeviceError(
                "every worker must have its own GPU",
                value=f"{gpu} used by {worker} and {twin}",
                remedy="Start workers with 'dask cuda worker', which pins each to a GPU, and those without a GPU with "
                "'dask worker' and an empty CUDA_VISIBLE_DEVICES",
            )
    return "cuda"


def _workers_are_gone(client: Client, kind: str = "") -> LostClusterError:
    return LostClusterError(
        f"a worker{kind} must keep running until the run ends",
        place=client.scheduler.address,
        value="none that responds",
        remedy="Check the workers' output, start them again and repeat the command",
    )


#: Memory of a worker without a GPU that helps workers with one, in bytes: libraries, and the largest of its tasks.
HELPER_BYTES = 1_500_000_000


def memory_of_workers(client: Client, of_gpu: Callable[[], int | None] | None) -> tuple[int, int, list[int]]:
    """Return the memory of workers and GPUs, in bytes.

    With `of_gpu`, workers without a GPU matter only for what they take from the others on their host.

    Parameters
    ----------
    client
        Client of the cluster.
    of_gpu
        Returns a worker's GPU memory, or ``None`` if it has no GPU; ``None`` to ignore GPUs.

    Returns
    -------
    alone, shared : int
        Smallest memory of a worker that has its host to itself, and that shares it with the other workers there.
    gpus : list of int
        Memory of each GPU.
    """
    known = workers_of(client)
    found = ask(client, _memory, of_gpu)
    computing = {worker: memory for worker, (memory, gpu) in found.items() if of_gpu is None or gpu is not None}
    if not computing:
        raise _workers_are_gone(client, " with a GPU")
    hosts, helpers = (
        Counter(known[worker]["host"] for worker in workers if worker in known)
        for workers in (computing, found.keys() - computing.keys())
    )
    alone, shared = [], []
    for worker, memory in computing.items():
        limit, host = known.get(worker, {}).get("memory_limit") or memory, known.get(worker, {}).get("host")
        alone.append(min(limit, memory))
        shared.append(min(limit, max(0, memory - helpers[host] * HELPER_BYTES) // max(1, hosts[host])))
    return min(alone), min(shared), [gpu for _, gpu in found.values() if gpu is not None]


def _memory(of_gpu: Callable[[], int | None] | None) -> tuple[int, int | None]:
    return int(MEMORY_LIMIT), of_gpu() if of_gpu else None


def leave_at_once() -> None:
    """Make this process exit without running the destructors of C++ libraries.

    If a thread is still working, as in a worker whose run was interrupted, the destructors would abort with a message
    on the user's terminal.
    """
    atexit.register(os._exit, 0)


def log_workers(client: Client, device: str) -> None:
    """Log the address, device and host of every worker."""
    gpus: dict[str, str | None] = {}
    if device == "cuda":
        from cryosiam_dask.model.predictor import name_of_gpu  # with torch, which the rest of this module does not need

        gpus = ask(client, name_of_gpu)
    for address, worker in workers_of(client).items():
        name = gpus.get(address) or device
        LOG.debug("worker %s: %s, %d threads, on %s", address, name, worker["nthreads"], worker["host"])
