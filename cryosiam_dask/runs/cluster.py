"""Where the work runs: worker processes of this machine, each with one GPU or one CPU core, or those of a cluster.

A worker has two threads, so that it can read a block and write another one while it computes a third. What does not say
that it can be overlapped like this runs alone in its process.

`open_cluster` starts them and gives a `DaskExecutor`, which runs the per-chunk functions of the stages on them with a
bounded number in flight, so that neither the scheduler's memory nor the workers' grows with the size of a tomogram.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal

import dask
from distributed import Client, LocalCluster, performance_report
from distributed.comm import CommClosedError, get_address_host_port
from distributed.security import Security
from distributed.utils import clean_dashboard_address

from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import (
    ClusterError,
    CryosiamDaskError,
    DeviceError,
)
from cryosiam_dask.runs.dask_executor import THREADS, TRIES
from cryosiam_dask.runs.workers import Setup, leave_at_once, register_in_workers, require_versions

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
    for left in reversed(range(TRIES)):
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
def reported(client: Client, path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Write Dask's report of what every worker did meanwhile to an HTML file, which needs no network to be read.

    `warn` receives the message if the page cannot be written; the run does not fail for it.
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
                warn(f"{path}: the performance report could not be written: {error}")


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
