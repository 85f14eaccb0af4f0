"""Start worker processes on this machine, each with one GPU or one CPU core, or join a running cluster.

A worker has several threads, so that it can read one block and write another while it predicts a third. Tasks that may
not overlap like this run one at a time in their process.

`open_cluster` and `join_cluster` yield a Dask client. `cryosiam_dask.runs.dask_executor.DaskExecutor` runs the tasks of
all stages on its workers with a bounded number in flight, so that neither the memory of the scheduler nor that of the
workers grows with the size of a tomogram.
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import dask
from distributed import Client, LocalCluster, Status, performance_report
from distributed.comm import CommClosedError, get_address_host_port
from distributed.security import Security
from distributed.utils import clean_dashboard_address

from cryosiam_dask.core.log import LOG
from cryosiam_dask.core.machine import cores, memory_of_machine
from cryosiam_dask.errors import (
    ClusterError,
    CryosiamDaskError,
    DeviceError,
)
from cryosiam_dask.runs.dask_executor import THREADS, TRIES
from cryosiam_dask.runs.workers import (
    HELPER_BYTES,
    R,
    Setup,
    ask,
    leave_at_once,
    register_in_workers,
    require_versions,
    wait_for_gpu,
    workers_of,
)

#: Make glibc keep freed memory in one heap for all threads, for the network's next layer and patch. Otherwise every
#: large tensor is mapped anew, and the kernel spends much CPU time clearing its pages.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 8_000_000_000, "MALLOC_MMAP_MAX_": 0, "MALLOC_ARENA_MAX": 1}
#: Number GPUs like nvidia-smi, NVML and dask-cuda. By default, CUDA's numbers begin with the fastest GPU.
GPU_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
#: By default Dask gives up a worker whose replacement takes more than 15 s, which its imports alone may take, and keeps
#: the last 1000 messages to each worker, each with a task. The web servers have no password, so they are read-only:
#: routes that change or forward anything (``api`` retires workers, ``proxy`` forwards requests) are left out, whatever
#: the user's configuration adds.
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
    cpu_workers: int | None = None,
    dashboard_address: str = "127.0.0.1:8787",
    scratch: str | None = None,
) -> Iterator[Client]:
    """Start workers on this machine and close them at the end.

    The TLS keys exist only in the memory of these processes, and exclude everybody else, including other users of the
    machine.

    Parameters
    ----------
    device
        ``"cuda"``: one worker for each visible GPU, pinned to it. ``"cpu"``: workers that compute in one thread.
    workers
        Number of workers; for ``"cuda"`` at most the number of visible GPUs, 0 for all of them.
    cpu_workers
        Number of additional workers without a GPU for ``"cuda"``; ``None``: see `default_cpu_workers`.
    dashboard_address
        Where the Dask dashboard listens; if its port is in use, another port of the same host is used.
    scratch
        Folder for Dask's own temporary files.

    Yields
    ------
    distributed.Client

    Raises
    ------
    DeviceError
        If GPUs were requested, but dask-cuda or enough GPUs are missing, or there is not enough memory for
        `cpu_workers`.
    ClusterError
        If workers cannot start or repeatedly die while starting, or the dashboard cannot listen at the address.
    """
    require_local_address(dashboard_address)
    silence_dask()
    # Otherwise a worker without a GPU would report the metrics of the machine's first GPU.
    settings = cluster_settings(scratch) | {"distributed.diagnostics.nvml": device == "cuda"}
    options: dict[str, Any] = {
        "dashboard_address": dashboard_address,
        "host": "127.0.0.1",  # unreachable from the network; other users of this machine have no key
        "protocol": "tls://",
        "memory_limit": None,  # the number of workers is chosen by memory; a paused worker would hang
        "local_directory": settings["temporary-directory"],
        "silence_logs": logging.CRITICAL,
    }
    environment = "distributed.nanny.pre-spawn-environ"
    settings[environment] = dask.config.get(environment) | KEEP_MEMORY
    if device == "cuda":
        # Without tracebacks of a GPU that does not work: the run reports it.
        settings[environment] |= {**GPU_ORDER, "DASK_DISTRIBUTED__LOGGING__DASK_CUDA": "critical"}
    others = {*multiprocessing.active_children()}
    with _interrupts_blocked(), warnings.catch_warnings(), dask.config.set(settings):
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        warnings.filterwarnings("ignore", message="Cannot get CPU affinity")  # the workers may use all cores then
        if device == "cuda":
            make = partial(_cuda_cluster, workers, cpu_workers, options)
        else:
            make = partial(LocalCluster, n_workers=workers, threads_per_worker=THREADS, processes=True, **options)
        cluster = _start(lambda: _within(_START_SECONDS, others, lambda: make(security=Security.temporary())))
    over = threading.Event()
    with dask.config.set(settings):
        try:
            threading.Thread(target=_replace, args=(cluster, over), daemon=True, name="replace").start()
            with Client(cluster, set_as_default=False) as client:
                register_in_workers(client, Setup(_leave_silently), "leave")
                yield client
        finally:
            over.set()
            _within(_CLOSE_SECONDS, others, cluster.close)


def _leave_silently() -> None:
    """See `leave_at_once`; this also keeps a retiring worker from logging closed connections to the user's terminal."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    leave_at_once()


#: Seconds after which workers are killed if they have not started, or have not ended.
_START_SECONDS, _CLOSE_SECONDS = 600.0, 20.0
#: Seconds between two checks for workers that Dask has given up, at first and at most.
_REPLACE_SECONDS = 15.0, 600.0


def _within(seconds: float, others: Collection[BaseProcess], call: Callable[[], R]) -> R:
    """Return ``call()``; if it takes longer or fails, kill the processes that were started since there were `others`.

    An interrupt kills them, too. If a process hangs while it starts, Dask would wait for it forever, even to close its
    cluster.
    """

    def kill() -> None:
        for process in {*multiprocessing.active_children()}.difference(others):
            process.kill()

    called: Future[R] = Future()

    def run() -> None:
        try:
            called.set_result(call())
        except BaseException as error:
            called.set_exception(error)

    # In a thread, because an interrupt within Dask would leave a cluster that nobody can close.
    thread, end = threading.Thread(target=run, daemon=True, name="within"), time.monotonic() + seconds
    try:
        thread.start()
        while not wait([called], 0.5).done:  # a blocked signal does not end a longer wait
            if time.monotonic() > end:
                kill()
        return called.result()
    except BaseException:
        kill()
        while thread.is_alive():
            thread.join(0.5)
            kill()
        raise


def _replace(cluster: Any, over: threading.Event) -> None:
    """Replace workers that died while they replaced others, which Dask itself does not."""
    pause, longest = _REPLACE_SECONDS
    while not over.wait(pause):
        with suppress(Exception):  # the next one may start
            for name, worker in list(cluster.workers.items()):
                if worker.status in (Status.closed, Status.failed):
                    del cluster.workers[name]
            if cluster.worker_spec.keys() - cluster.workers.keys():
                pause = min(2 * pause, longest)
                cluster.sync(cluster._correct_state)


def cluster_settings(scratch: str | None = None) -> dict[str, Any]:
    """Return the Dask settings of a cluster that is started here, which override the user's own.

    Parameters
    ----------
    scratch
        Folder for Dask's own temporary files; by default that of Dask's configuration, then that of the system. A
        folder that cannot be used is skipped, because almost nothing is written there.

    Raises
    ------
    ClusterError
        If no such folder can be used.
    """
    return _SCHEDULER | dashboard_link() | {"temporary-directory": _temporary_folder(scratch)}


def require_local_address(dashboard_address: str) -> None:
    """Check that this machine can listen at a dashboard address.

    Raises
    ------
    ClusterError
        If it cannot, with the system's reason.
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
            remedy="Use for example 127.0.0.1:8787",
        ) from None


def dashboard_link() -> dict[str, str]:
    """Return Dask's default dashboard link if the user's link contains variables that are not set here."""
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
        "there must be a writable folder for temporary files, with free space",
        place="this machine",
        value=why,
        remedy="Set TMPDIR to a writable folder",
    )


def _start(make: Callable[[], Any]) -> Any:
    """Start a cluster, and try again if one of its processes dies while starting, which closes the others."""
    for left in reversed(range(TRIES)):
        try:
            return make()
        except CryosiamDaskError:
            raise
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            # Dask only reports that a process did not start, not whether it died or did not respond.
            died = isinstance(cause, RuntimeError | TimeoutError | CommClosedError)
            if not (died and left):
                raise ClusterError(
                    "worker processes must be able to start",
                    place="this machine",
                    value=str(cause).rstrip(".") if died else f"{type(cause).__name__}: {str(cause).rstrip('.')}",
                    remedy=_remedy(cause, died),
                ) from error


def _remedy(cause: BaseException, died: bool) -> str:
    if isinstance(cause, _DeadWorkersError):
        return f"Check nvidia-smi and dmesg, exclude a broken GPU with CUDA_VISIBLE_DEVICES, {_WITHOUT_GPUS}"
    if died or isinstance(cause, MemoryError) or getattr(cause, "errno", None) in (errno.ENOMEM, errno.EAGAIN):
        return "Check that it has enough free memory, use fewer --workers, and repeat the command"
    return "Check Dask's own configuration (~/.config/dask, /etc/dask, and DASK_... in the environment)"


#: Seconds to wait for a scheduler to respond, and for it to have a worker.
_ANSWER_SECONDS, _WORKER_SECONDS = 10, 120.0


@contextmanager
def join_cluster(
    *,
    address: str | None = None,
    scheduler_file: Path | None = None,
    workers: int | None = None,
    seconds: float = _WORKER_SECONDS,
) -> Iterator[Client]:
    """Use workers that were started elsewhere, and leave them running at the end.

    Parameters
    ----------
    address
        Address of the scheduler, such as ``tcp://node1:8786``; for ``tls://…`` the certificates of Dask's configuration
        are used.
    scheduler_file
        File that ``dask scheduler --scheduler-file`` wrote, instead of the address.
    workers
        Number of workers to wait for, one by default; others may join later.
    seconds
        Maximum seconds to wait for them.

    Yields
    ------
    distributed.Client

    Raises
    ------
    ClusterError
        If the scheduler does not respond, has no worker in time, or a worker has other versions of packages that
        results depend on.
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
    silence_dask()
    try:
        # Checked first, because a client that finds no scheduler leaves threads behind.
        socket.create_connection(get_address_host_port(str(address)), timeout=_ANSWER_SECONDS).close()
        client = Client(address, timeout=_ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if str(address).startswith("tls://") and not Security().tls_ca_file:
            raise ClusterError(
                "a scheduler with TLS needs its certificates",
                place=place,
                value="none in Dask's configuration",
                remedy="Set distributed.comm.tls there, as for the scheduler: ca-file, and the client's cert and key",
            ) from None
        if encrypted and str(address).startswith("tcp://"):
            raise ClusterError(
                "Dask's configuration requires encryption, but this scheduler has none",
                place=place,
                remedy="Start it with --protocol tls, or unset distributed.comm.require-encryption",
            ) from None
        raise ClusterError(
            "a Dask scheduler must respond",
            place=place,
            value=f"none within {_ANSWER_SECONDS} s ({str(error).splitlines()[0]})",
            remedy="Check the address, whether the scheduler is running, and whether a firewall blocks it",
        ) from None
    with dask.config.set(dashboard_link()), client:
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
    """Whether an address (``host:port``, with or without a protocol) can only be reached from this machine."""
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def who_else_has_access(client: Client) -> str | None:
    """Return who, besides its owner, can run code on the workers of a scheduler; ``None`` for nobody."""
    address = str(client.scheduler.address)
    if address.startswith(("tls://", "wss://", "inproc://")):
        return None
    return "every user of this machine" if is_loopback(address) else "anyone who can reach it"


@contextmanager
def write_performance_report(client: Client, path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Write Dask's performance report of the ``with`` block to a self-contained HTML file.

    If the file cannot be written, `warn` receives a message, and the run does not fail.
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


def silence_dask() -> None:
    """Hide Dask's log messages about lost connections and workers that do not start; our errors report them.

    The messages are hidden until the process ends, because a connection may be lost while its cluster closes or after
    that, when the cluster's `silence_logs` no longer has an effect.
    """
    for handler in logging.getLogger("distributed").handlers:  # also those of "tornado"
        handler.setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tracebacks of Dask's tasks that were never awaited


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to the whole process group, from workers that are started within the context.

    They inherit the blocked signal from the thread that starts them, as do those that replace a lost one. The client
    receives it as soon as they run, and stops them in order.
    """
    # If Python's resource tracker were started later, it would unblock the signal in the thread that starts workers.
    # Its warning about the semaphore of a worker that was stopped during a task does not matter.
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


#: What to do if GPUs cannot be named, counted or used.
_WITHOUT_GPUS = "or use --device cpu"


def usable_gpus(client: Client, describe: Callable[[], str | None]) -> tuple[int, list[str]]:
    """Count the workers that can use their GPU after they have loaded the network, and name what cannot be used.

    Parameters
    ----------
    client
        Client of the cluster. If `open_cluster` did not start it, only workers are named, not GPUs.
    describe
        Returns the name of the GPU that a process uses; ``None`` if it has none.

    Raises
    ------
    DeviceError
        If no worker can use a GPU.
    LostClusterError
        If no worker responds.
    """
    wait_for_gpu(client, describe, 60)  # workers that died while they loaded the network are replaced
    named = ask(client, describe)
    able = {address for address, gpu in named.items() if gpu is not None}
    if not able:
        raise DeviceError(
            "a worker with a GPU must keep running when it has loaded the network",
            value="none",
            remedy="Check nvidia-smi, dmesg and the free memory of the machine, or use --device cpu",
        )
    names = {address: str(worker["name"]) for address, worker in workers_of(client).items()}
    if not isinstance(client.cluster, LocalCluster):
        return len(able), [f"worker {name}" for address, name in names.items() if address not in named]
    # dask-cuda names workers like their GPUs.
    expected = [name for name in map(str, client.cluster.worker_spec) if not name.startswith(_HELPER)]
    working = {names.get(address) for address in able}
    return len(able), [f"GPU {name}" for name in expected if name not in working]


#: Prefix of the names of workers without a GPU in a cluster with GPUs.
_HELPER = "cpu-"


def default_cpu_workers(gpus: int) -> int:
    """Return the number of workers without a GPU: one for each remaining core, if half of the memory allows."""
    return max(0, min(cores() - gpus, memory_of_machine() // 2 // HELPER_BYTES))


def _cuda_cluster(workers: int, cpu_workers: int | None, options: dict[str, Any], security: Security) -> Any:
    visible = _visible_gpus()
    if len(visible) < max(1, workers):
        raise DeviceError(
            f"--workers requests {max(1, workers)} GPUs",
            value=f"{len(visible)} visible (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            remedy="Request fewer, or make more GPUs visible",
        )
    count = workers or len(visible)
    if cpu_workers is None:
        cpu_workers = default_cpu_workers(count)
    elif cpu_workers * HELPER_BYTES > memory_of_machine():
        raise DeviceError(
            f"--cpu-workers requests {cpu_workers} workers of about {HELPER_BYTES / 1e9:g} GB each",
            value=f"{memory_of_machine() / 1e9:.0f} GB of memory",
            remedy=f"Request at most {default_cpu_workers(count)}, or leave out the option",
        )
    from dask_cuda import LocalCUDACluster

    cluster = LocalCUDACluster(visible[:count], threads_per_worker=THREADS, security=security, **options)
    # It opens even if workers have died while they started, and does not replace them.
    started = {worker.name for worker in cluster.scheduler.workers.values()}
    if dead := [str(name) for name in cluster.worker_spec if name not in started]:
        cluster.close()
        raise _DeadWorkersError(f"{len(dead)} of {count} died while starting, on GPU {', '.join(sorted(dead))}")
    helper = {
        **{name: value for name, value in cluster.new_spec["options"].items() if not name.startswith("preload")},
        "env": {"CUDA_VISIBLE_DEVICES": ""},
        # Otherwise it would report the metrics of the machine's first GPU.
        "config": dask.config.merge(dask.config.config, {"distributed": {"diagnostics": {"nvml": False}}}),
    }
    for number in range(cpu_workers):
        cluster.worker_spec[f"{_HELPER}{number}"] = {"cls": cluster.new_spec["cls"], "options": helper}
    try:
        cluster.sync(cluster._correct_state)
    except BaseException:
        cluster.close()  # its GPUs must be free for another attempt
        raise
    return cluster


class _DeadWorkersError(RuntimeError):
    """Workers with GPUs died while they started."""


def _visible_gpus() -> list[int | str]:
    """Return the numbers or ids of the GPUs that this process may use, as dask-cuda names them.

    Raises
    ------
    DeviceError
        If dask-cuda, NVIDIA's driver or a GPU named in CUDA_VISIBLE_DEVICES is missing.
    """
    try:
        import dask_cuda  # noqa: F401  # because its parts can be imported even if it cannot
        import pynvml
        from dask_cuda.utils import get_cpu_affinity, get_gpu_count, get_gpu_handle, parse_cuda_visible_device
    except ImportError as error:
        raise DeviceError(
            "running on GPUs needs dask-cuda and its dependencies",
            value=error,
            remedy=f"Install the extra, pip install 'cryosiam-dask[gpu-cu13]', {_WITHOUT_GPUS}",
        ) from None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        count = int(get_gpu_count())
    except pynvml.NVMLError as error:
        raise DeviceError(
            "GPUs need NVIDIA's driver and its management library, NVML",
            value=error,
            remedy=f"Install the driver, make it visible in the container (--gpus all, --nv), {_WITHOUT_GPUS}",
        ) from None
    visible = list[int | str]()
    for name in [*map(str, range(count))] if named is None else named.split(",") if named else []:
        wrong = None
        try:
            gpu = parse_cuda_visible_device(name)
            if isinstance(gpu, int) and not 0 <= gpu < count:
                raise ValueError
            wrong = "is listed twice" if gpu in visible else None
            with suppress(pynvml.NVMLError_NotSupported):  # its memory may be the machine's
                pynvml.nvmlDeviceGetMemoryInfo(get_gpu_handle(gpu))
        except (ValueError, pynvml.NVMLError) as error:
            wrong, refused = f"is not one of the {count} GPUs of this machine", error.__context__ or error
            unknown = ValueError | pynvml.NVMLError_InvalidArgument | pynvml.NVMLError_NotFound
            if not isinstance(refused, unknown):
                raise DeviceError(
                    "each visible GPU must work",
                    place=f"GPU {name}",
                    value=refused,
                    remedy=f"Check nvidia-smi and dmesg, exclude it with CUDA_VISIBLE_DEVICES, {_WITHOUT_GPUS}",
                ) from None
        if wrong or (visible and type(visible[0]) is not type(gpu)):
            raise DeviceError(
                "must list GPUs of this machine, by their numbers or by their full ids",
                place="CUDA_VISIBLE_DEVICES in the environment",
                value=f"{named}, where {name!r} {wrong or 'is of another kind than the first'}",
                remedy=f"Set it to {','.join(map(str, range(min(count, 2))))} for example ('nvidia-smi -L' lists them)",
            )
        visible.append(gpu)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if visible:
                get_cpu_affinity(visible[0])
    except TypeError:  # from dask-cuda's own warning, which expects a number
        raise DeviceError(
            "must list GPUs by their numbers if the driver does not know which CPU cores are near them",
            place="CUDA_VISIBLE_DEVICES in the environment",
            value=named,
            remedy="'nvidia-smi -L' lists them",
        ) from None
    return visible
