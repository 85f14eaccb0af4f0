"""What workers are told when they start, and what they are asked."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import pkgutil
import platform
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
)
from cryosiam_dask.model.predictor import name_of_gpu

T = TypeVar("T")
R = TypeVar("R")


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


#: What must be the same in every worker as here, since results or messages depend on it.
_SAME = ("python", "cryosiam_dask", "dask", "distributed", "numpy", "torch", "zarr")


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


def log_workers(client: Client, device: str) -> None:
    """Write down where the work is done."""
    gpus = ask(client, name_of_gpu) if device == "cuda" else {}
    for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
        name = gpus.get(address) or device
        LOG.debug("worker %s: %s, %d threads, on %s", address, name, worker["nthreads"], worker["host"])
