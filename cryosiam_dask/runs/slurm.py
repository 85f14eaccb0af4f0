"""Run workers as Slurm jobs, submitted through dask-jobqueue for the duration of a run.

A file in dask-jobqueue's format, or a section of Dask's configuration, describes a job. From that, this module derives:

* a worker for each GPU, pinned to it by dask-cuda, and for each remaining core; without GPUs, a worker for each core;
* threads that read and write while one computes;
* an end of the workers before the walltime, so that their tasks move to other workers in an orderly way;
* TLS keys that only this user can read, without which nobody can connect to the scheduler.

A job that ends, at its walltime or with its node, is submitted again.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import math
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask
import yaml
from dask.utils import parse_bytes
from distributed import Client, Status
from distributed.security import Security

from cryosiam_dask.errors import ClusterError, ConfigurationError, LostClusterError, why_unreadable
from cryosiam_dask.runs.cluster import GPU_ORDER, KEEP_MEMORY, cluster_settings, require_local_address, silence_dask
from cryosiam_dask.runs.dask_executor import THREADS
from cryosiam_dask.runs.workers import (
    HELPER_BYTES,
    Setup,
    leave_at_once,
    register_in_workers,
    require_versions,
    workers_of,
)

#: Seconds between two checks for jobs that have ended.
_CHECK_SECONDS = 15.0
#: Name of the section that this module adds to ``jobqueue`` in Dask's configuration.
_NAME = "cryosiam-dask"


@contextmanager
def open_slurm(
    jobs: str,
    workers: int,
    *,
    folder: Path,
    dashboard_address: str = "127.0.0.1:8787",
    seconds: float = 3600.0,
    stop: threading.Event | None = None,
    inform: Callable[[str], None] = lambda message: None,
) -> Iterator[Client]:
    """Submit jobs whose workers join a scheduler in this process, and cancel them at the end.

    Parameters
    ----------
    jobs
        Description of a job: a YAML file in dask-jobqueue's format (``jobqueue: slurm: …``), or the name of such a
        section in Dask's configuration.
    workers
        Number of GPUs if the jobs request any, else of CPU workers. As many jobs as necessary are submitted, and the
        run starts with the first worker.
    folder
        Folder on a disk that all nodes can read; it holds the TLS keys during the run.
    dashboard_address
        Where the Dask dashboard listens.
    seconds
        Seconds to wait for the first worker.
    stop
        Once set, the wait for a worker ends.
    inform
        Receives messages for the user.

    Yields
    ------
    distributed.Client

    Raises
    ------
    ConfigurationError
        If the file or section cannot be used.
    ClusterError
        If dask-jobqueue or Slurm is missing, a job is refused, no worker joins, or a worker has other versions.
    """
    section = read_jobs(jobs)
    require_local_address(dashboard_address)
    from dask_jobqueue.slurm import SLURMCluster, SLURMJob

    refused: list[str] = []

    class _Job(SLURMJob):  # type: ignore[misc]  # untyped
        """A job that keeps the reason for its refusal for the waiting thread."""

        def __init__(self, *args: Any, security: Security, **options: Any) -> None:
            super().__init__(*args, security=_quoted(security), **options)
            self._command_template: str = with_helpers(self._command_template, section)

        async def start(self) -> None:
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:
                refused.append(_reason(error))
                self.status = Status.running  # its cluster expects this

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        silence_dask()
        keys = stack.enter_context(TemporaryDirectory(prefix=".cryosiam-dask-tls-", dir=folder))
        stack.enter_context(dask.config.set({f"jobqueue.{_NAME}": section, **cluster_settings()}))
        try:
            cluster = SLURMCluster(
                config_name=_NAME,
                job_cls=_Job,
                processes=section["processes"],  # it does not read this from the configuration
                security=_security(Path(keys)),
                protocol="tls://",
                silence_logs="critical",
                scheduler_options={
                    "dashboard_address": dashboard_address,
                    **section["scheduler-options"],
                    "jupyter": False,  # it would run code for anyone who can reach the dashboard's port
                },
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ClusterError(
                "a scheduler must be able to start on this node",
                place=f"--slurm {jobs}",
                value=str(error),
                remedy="Correct interface or scheduler-options; 'ip address' lists the interfaces",
            ) from None
        stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster, set_as_default=False))
        register_in_workers(client, Setup(leave_at_once), "leave")
        count = math.ceil(workers / section["processes"])
        cluster.scale(jobs=count)
        inform(f"{count} Slurm {'jobs' if count > 1 else 'job'} submitted; the run starts with the first worker")
        _wait_for_worker(cluster, client, refused, seconds, stop or threading.Event(), f"--slurm {jobs}")
        require_versions(client, f"--slurm {jobs}")
        over = threading.Event()
        keeper = threading.Thread(
            target=_resubmit, args=(cluster, client, count, refused, over, inform), daemon=True, name="slurm"
        )
        keeper.start()
        try:
            yield client
        finally:
            over.set()
            keeper.join()


def read_jobs(jobs: str) -> dict[str, Any]:
    """Read the description of a job, and complete it for dask-jobqueue, without submitting anything.

    Parameters
    ----------
    jobs
        See `open_slurm`.

    Returns
    -------
    dict
        Keys of dask-jobqueue's configuration; ``processes`` is the number of workers in a job.

    Raises
    ------
    ConfigurationError
        At the first key that cannot be used.
    ClusterError
        If dask-jobqueue or Slurm is missing.
    """
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise ClusterError(
            "running as Slurm jobs needs dask-jobqueue",
            place=f"--slurm {jobs}",
            value="no dask_jobqueue",
            remedy="Install the extra, for example pip install 'cryosiam-dask[gpu-cu13,hpc]'",
        )
    if missing := [name for name in ("sbatch", "scancel") if shutil.which(name) is None]:
        raise ClusterError(
            "Slurm's commands must be available",
            place=f"--slurm {jobs}",
            value=f"no {' and no '.join(missing)}",
            remedy="Run this command on a node that can submit jobs",
        )
    _load_dask_jobqueue()
    defaults: dict[str, Any] = dask.config.get("jobqueue.slurm")
    given, place = _user_keys(jobs)
    for key, value in given.items():
        wrong = partial(ConfigurationError, place=f"{place}, key {key}")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1, 0.5)
            remedy = f"Did you mean {near[0]}?" if near else f"It knows {', '.join(sorted(defaults))}"
            raise wrong("dask-jobqueue does not know this key", remedy=remedy)
        if isinstance(defaults[key], list) and not isinstance(value, list):
            remedy = "Write each value on its own line, after a hyphen"
            raise wrong("must be a list", value=repr(value), remedy=remedy)
        if key in ("cores", "processes") and value is not None and not (isinstance(value, int) and value > 0):
            raise wrong("must be a whole number above 0", value=repr(value))
    section = {**defaults, **given}
    for key, example in (("cores", "8, the CPU cores of a job"), ("memory", "'64 GB', of a job")):
        if not section[key]:
            raise ConfigurationError("this key is required", place=f"{place}, key {key}", remedy=f"Set it to {example}")
    gpus = [_number_of_gpus(directive) for directive in section["job-extra-directives"]]
    on_gpus = any(gpus) or "dask_cuda" in section["worker-command"]
    if on_gpus and section["worker-command"] == "distributed.cli.dask_worker":
        section["worker-command"] = "dask_cuda.cli"
    section["processes"] = section["processes"] or max(1, *gpus, 1 if on_gpus else section["cores"])
    # Before the user's own arguments, which take precedence. No memory limit: a paused worker would hang.
    section["worker-extra-args"] = [
        "--nthreads",
        THREADS,
        "--memory-limit",
        0,
        "--no-dashboard",
        *section["worker-extra-args"],
    ]
    environment: dict[str, object] = {**KEEP_MEMORY, **(GPU_ORDER if on_gpus else {})}
    if section["walltime"]:
        # The tasks of a retiring worker move immediately, those of a killed one only when its loss is noticed.
        lifetime = _seconds(section["walltime"], place)
        environment["DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION"] = f"{lifetime - min(300, lifetime // 4)}s"
    exports = [f"export {name}={value}" for name, value in environment.items()]
    section["job-script-prologue"] = [*exports, *section["job-script-prologue"]]
    return section


#: Suffix of the names of workers without a GPU in a job with GPUs.
_HELPER = "-helper"
#: Options that a worker with a GPU and one without have in common.
_COMMON = {
    "--name", "--nthreads", "--memory-limit", "--death-timeout", "--local-directory", "--protocol", "--interface",
    "--tls-ca-file", "--tls-cert", "--tls-key",
}  # fmt: skip


def with_helpers(command: str, section: Mapping[str, Any]) -> str:
    """Add workers without a GPU to the command of a job, for the cores that its GPU workers leave free.

    Parameters
    ----------
    command
        The command that starts the workers of a job.
    section
        See `read_jobs`. These workers take up to half of the memory.
    """
    python, gpus, rest = command.partition(" -m dask_cuda.cli ")
    room = int(parse_bytes(section["memory"])) // 2 // HELPER_BYTES
    count = min(section["cores"] - section["processes"], room)
    if not gpus or count < 1:
        return command
    address, *words = shlex.split(rest)
    common = [word for pair in itertools.pairwise(words) if pair[0] in _COMMON for word in pair]
    common[common.index("--name") + 1] += _HELPER
    helpers = shlex.join([address, *common, "--nworkers", str(count), "--no-dashboard"])
    return f"CUDA_VISIBLE_DEVICES= {python} -m distributed.cli.dask_worker {helpers} &\n{command}"


def _load_dask_jobqueue() -> None:
    """Load dask-jobqueue's defaults into Dask's configuration, and restore the handler of Ctrl-C that it replaces."""
    handler = signal.getsignal(signal.SIGINT)
    importlib.import_module("dask_jobqueue")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def _user_keys(jobs: str) -> tuple[dict[str, Any], str]:
    """Return the user's keys, with hyphens as in dask-jobqueue's documentation, and their place for errors."""
    path = Path(jobs).expanduser()
    if not path.exists() and "/" not in jobs and not jobs.endswith((".yaml", ".yml")):
        found = dask.config.get(f"jobqueue.{jobs}", None)
        known = ", ".join(dask.config.get("jobqueue"))
        place = f"--slurm {jobs}"
        if not isinstance(found, Mapping):
            raise ConfigurationError(
                "must be a YAML file, or a section of jobqueue in Dask's configuration",
                place=place,
                remedy=f"Compare it with configs/slurm.yaml; the known sections are {known}",
            )
    else:
        place = str(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            sections = content["jobqueue"]
            found = sections["slurm"] if "slurm" in sections else next(iter(sections.values()))
        except OSError as error:
            rule, value = why_unreadable(error, "must be readable")
            raise ConfigurationError(rule, place=place, value=value, remedy="Check --slurm") from None
        except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError, StopIteration):
            found = None
        if not isinstance(found, Mapping):
            raise ConfigurationError(
                "must be YAML with the keys of a job below jobqueue and slurm",
                place=place,
                remedy="Compare it with configs/slurm.yaml",
            )
    return {str(key).replace("_", "-"): value for key, value in found.items()}, place


def _number_of_gpus(directive: str) -> int:
    """Return how many GPUs a directive of sbatch requests; 0 for other directives."""
    if not re.match(r"(--gres[= ](.*,)?gpu|--gpus|-G)", directive):
        return 0
    number = re.search(r"(?:[:= ]|^-G)(\d+)$", directive.strip())
    return int(number[1]) if number else 1


def _seconds(walltime: object, place: str) -> int:
    """Parse a walltime: minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", walltime if isinstance(walltime, str) else "")
    if not found:
        raise ConfigurationError(
            "must be a time in Slurm's format, in quotes, because YAML may otherwise read it as a number",
            place=f"{place}, key walltime",
            value=repr(walltime),
            remedy="Write for example '04:00:00'",
        )
    days, first, second, third = (int(value) if value else 0 for value in found.groups())
    if found[1] is not None or found[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def _security(folder: Path) -> Security:
    """Return the certificates of this run: those of Dask's configuration, or new ones, written into `folder`."""
    configured = Security()
    if configured.tls_ca_file:
        return configured
    role = Security.temporary().get_tls_config_for_role("worker")
    paths = {}
    for name in ("ca_file", "cert", "key"):
        paths[name] = str((folder / f"{name}.pem").absolute())
        Path(paths[name]).write_text(role[name])
    return Security(
        require_encryption=True,
        tls_ca_file=paths["ca_file"],
        **{f"tls_{who}_{what}": paths[what] for who in ("client", "scheduler", "worker") for what in ("cert", "key")},
    )


def _quoted(security: Security) -> Security:
    """Return the same certificates with paths quoted for the job script, to which dask-jobqueue copies them."""
    role = security.get_tls_config_for_role("worker")
    paths = {name: shlex.quote(role[name]) for name in ("ca_file", "cert", "key") if role[name]}
    return Security(tls_ca_file=paths["ca_file"], tls_worker_cert=paths.get("cert"), tls_worker_key=paths.get("key"))


def _reason(error: Exception) -> str:
    """Extract sbatch's own message from an error of dask-jobqueue."""
    text = str(error)
    return " ".join((text.partition("stderr:\n")[2].strip() or text).split())


def _refusal(place: str, reason: str) -> ClusterError:
    return ClusterError(
        "sbatch must accept the job",
        place=place,
        value=reason,
        remedy="Correct the file or section: queue, account, walltime, cores, memory and job-extra-directives",
    )


def _wait_for_worker(
    cluster: Any, client: Client, refused: list[str], seconds: float, stop: threading.Event, place: str
) -> None:
    began = looked = time.monotonic()
    while not any(_HELPER not in str(worker["name"]) for worker in workers_of(client).values()):
        now = time.monotonic()
        if refused:
            raise _refusal(place, refused[0])
        if stop.wait(0.2):
            raise LostClusterError(
                "a job must start before the run is stopped", place=place, remedy="Repeat the command"
            )
        value = f"none within {seconds / 60:.0f} min"
        if now - looked > _CHECK_SECONDS:
            looked = now
            jobs = {str(job.job_id) for job in list(cluster.workers.values()) if job.job_id}
            if jobs and not jobs & _in_queue(jobs):
                value, seconds = "jobs that ended without one", 0.0
        if now - began > seconds:
            raise ClusterError(
                "the jobs must start a worker",
                place=place,
                value=value,
                remedy="'squeue --me' shows why jobs are pending, and slurm-<job>.out or log-directory hold their "
                "output; --worker-timeout waits longer",
            )


def _in_queue(jobs: set[str]) -> set[str]:
    """Return the jobs that are pending or running; all of them if Slurm does not respond."""
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%i"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return jobs
    return jobs if done.returncode else jobs & set(done.stdout.split())


def _resubmit(
    cluster: Any, client: Client, count: int, refused: list[str], over: threading.Event, inform: Callable[[str], None]
) -> None:
    """Resubmit jobs that have lost all their workers, as seen in two consecutive checks."""
    seen: set[Any] = set()
    missing: set[Any] = set()
    while not over.wait(_CHECK_SECONDS):
        with suppress(Exception):  # a lost scheduler is noticed elsewhere
            there = {str(worker["name"]) for worker in workers_of(client).values()}
            alive = {
                name
                for name, spec in list(cluster.worker_spec.items())
                if there & ({f"{name}{suffix}" for suffix in spec["group"]} if "group" in spec else {str(name)})
            }
            seen |= alive
            gone = (seen - alive) & missing
            missing = seen - alive
            if gone:
                seen -= gone
                cluster.sync(cluster.scale_down, gone)
                cluster.scale(jobs=count)
                inform(f"{len(gone)} Slurm {'jobs have' if len(gone) > 1 else 'job has'} ended and been resubmitted")
            if refused:
                inform(f"warning: a job was not accepted: {refused.pop()}")
