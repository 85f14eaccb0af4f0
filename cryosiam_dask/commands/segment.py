"""Plan and run one model or a pipeline, from configurations to a finished run, with all messages for the user."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from rich.console import Console

from cryosiam_dask.commands.console import counted, inform, open_logs, print_always, print_table, warn
from cryosiam_dask.commands.forecast import disk_warnings
from cryosiam_dask.commands.written import report_on
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.diagnosis import Intensities, merged_warnings
from cryosiam_dask.core.log import LOG, SHOWN, logged
from cryosiam_dask.core.machine import cores, memory_of_machine
from cryosiam_dask.errors import ClusterError, ConfigurationError, CryosiamDaskError, DeviceError, Problems
from cryosiam_dask.files.header import TomogramHeader
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.model.predictor import (
    can_load,
    largest_patch,
    load_predictor,
    memories_of_gpus,
    memory_of_gpu,
    name_of_gpu,
    on_device,
    require_precision,
    resolve_device,
    unused_gpu,
)
from cryosiam_dask.runs.cluster import (
    is_loopback,
    join_cluster,
    open_cluster,
    usable_gpus,
    who_else_has_access,
    write_performance_report,
)
from cryosiam_dask.runs.collection import (
    forget_failures,
    make_folders,
    outcomes_before,
    remove_denoised,
    remove_left_overs,
    run,
)
from cryosiam_dask.runs.dask_executor import IN_FLIGHT, IN_FLIGHT_ON_DEVICE, DaskExecutor
from cryosiam_dask.runs.metrics import Meter
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import (
    USABLE,
    RunPlan,
    masks_made_before,
    memory_to_use,
    on_this_machine,
    plan_run,
    require_memory,
    up_to_date,
    with_denoising,
)
from cryosiam_dask.runs.progress import FileReporter, Pace, Reporters, make_reporter
from cryosiam_dask.runs.slurm import open_slurm, read_jobs
from cryosiam_dask.runs.workers import (
    Setup,
    ask,
    describe_devices,
    forwarded_warnings,
    log_workers,
    memory_of_workers,
    register_in_workers,
    wait_for_gpu,
)
from cryosiam_dask.stages.intensities import Sample, intensities, sample_file

Device = Literal["auto", "cpu", "cuda"]


@logged
def segment(
    configurations: Mapping[str, Configuration],
    console: Console,
    *,
    filename: str | None = None,
    device: Device = "auto",
    workers: int | None = None,
    cpu_workers: int | None = None,
    scheduler: str | None = None,
    scheduler_file: Path | None = None,
    slurm: str | None = None,
    worker_timeout: float | None = None,
    overwrite: bool = False,
    overwrite_all: bool = False,
    dashboard_address: str = "127.0.0.1:8787",
    performance_report: Path | None = None,
    timeline: bool = False,
    stop: threading.Event | None = None,
    warned: list[str] | None = None,
) -> list[Outcome]:
    """Plan and run one model, or a pipeline of several, and print the outcomes.

    Parameters
    ----------
    configurations
        Configuration of each model; see `cryosiam_dask.config.read_models`.
    console
        Where to print.
    filename, overwrite, overwrite_all
        See `cryosiam_dask.runs.plan.plan_run`.
    device
        ``"auto"``: CUDA where it can be used, else the CPU.
    workers
        Number of worker processes; ``None``: one for each visible GPU, or as many as cores and memory allow. For a
        running cluster: how many workers to wait for.
    cpu_workers
        Number of additional workers without a GPU; see `cryosiam_dask.runs.cluster.open_cluster`.
    scheduler, scheduler_file
        See `cryosiam_dask.runs.cluster.join_cluster`; ``None``: workers are started on this machine.
    slurm
        See `cryosiam_dask.runs.slurm.open_slurm`; replaces workers on this machine.
    worker_timeout
        Minutes to wait for the workers of a scheduler (``None``: 2), or for the first worker from Slurm (``None``: 60).
    dashboard_address
        Where the Dask dashboard listens.
    performance_report
        HTML file for Dask's performance report.
    timeline, stop
        See `cryosiam_dask.runs.collection.run`.
    warned
        Receives the warnings about the run as a whole.

    Raises
    ------
    Problems, ConfigurationError, DeviceError, ClusterError
        If the run cannot start.
    """
    joins = scheduler is not None or scheduler_file is not None
    elsewhere = joins or slurm is not None  # only the workers know their devices and memory
    if joins and slurm is not None:
        raise ConfigurationError(
            "must not be given together, because workers are either submitted or already running",
            place="options --slurm and --scheduler",
            remedy="Remove one of them",
        )
    if slurm is not None and workers is None:
        raise ConfigurationError(
            "must give the number of GPUs or CPU workers to request from Slurm",
            place="option --workers",
            remedy="Add it",
        )
    problems: list[CryosiamDaskError] = []
    plans: list[RunPlan] = []
    chosen: Literal["cpu", "cuda"] = "cpu"
    if not elsewhere:
        try:
            chosen = resolve_device(device)
            if device == "auto" and (unused := unused_gpu()):
                warn(console, unused)
        except DeviceError as error:
            problems.append(error)
    if slurm is not None:
        try:
            read_jobs(slurm)
        except (ConfigurationError, ClusterError) as error:
            problems.append(error)
    try:
        for name, configuration in configurations.items():
            configuration = configuration.absolute() if elsewhere else configuration
            first = name == next(iter(configurations))
            before = set[str]() if first else masks_made_before(plans, configuration, filename)
            try:
                if not problems and not elsewhere:
                    require_precision(configuration.hyper_parameters.precision, chosen)
                plan = _planned(
                    configuration, name, filename, overwrite, overwrite_all, before,
                    None if elsewhere or problems else chosen, workers, console,
                )  # fmt: skip
                plans.append(plan)
            except Problems as found:
                problems.extend(found.problems)
            except DeviceError as error:
                problems.append(error)
    except Problems as found:
        problems.extend(found.problems)
    if problems:
        raise Problems(problems)
    plans = with_denoising(plans)
    count = 0  # all GPUs
    if elsewhere or chosen == "cuda":
        plans = [plan.with_shapes() for plan in plans]
    else:
        plans, count = on_this_machine(plans, workers)
    _require_any(plans)
    if cpu_workers is not None and (elsewhere or chosen == "cpu"):
        warn(console, "--cpu-workers has no effect: it adds CPU workers to GPU workers started on this machine")
    for plan in plans:
        make_folders(plan)
    open_logs(_command(plans), [plan.configuration for plan in plans], console)
    for plan in plans:
        LOG.debug(
            "model%s: %s (SHA-256 %s), patch %s, halo %d, threshold %g; %d to segment, %d to measure, %d skipped",
            f" {plan.name}".rstrip(), plan.configuration.trained_model, plan.checkpoint.sha256, plan.patch, plan.halo,
            plan.threshold,
            len(plan.jobs), len(plan.incomplete), len(plan.skipped),
        )  # fmt: skip
        for note in plan.notes:
            inform(console, f"note: {note}")
        for stem, why in plan.refused:
            LOG.error("%s: %s", stem, why, extra=SHOWN)
        for job in plan.skipped:
            inform(console, f"{job.stem}: skipped, {job.output} was {up_to_date(job)}")
        for job in plan.incomplete:
            inform(console, f"{job.stem}: {job.output} is up to date, {plan.outdated(job)}")
    forget_failures(plans)
    remove_denoised(plans)
    if not any(plan.jobs or plan.incomplete for plan in plans):
        outcomes = outcomes_before(plans)
        print_table(console, outcomes)
        for plan in plans:
            report_on(plan.configuration, _of_stage(outcomes, plan), console)
        return outcomes
    total = len({job.stem for plan in plans for job in (*plan.jobs, *plan.incomplete)})
    for sentence in disk_warnings(plans):
        warn(console, sentence)
        if warned is not None:
            warned.append(sentence)
    shown = _warn_about_intensities(plans, console)
    if not is_loopback(dashboard_address):
        warn(console, f"anyone who can reach {dashboard_address} can watch this run without a password")
    try:
        with ExitStack() as stack:
            if joins:
                client = stack.enter_context(
                    join_cluster(
                        address=scheduler, scheduler_file=scheduler_file, workers=workers,
                        seconds=60 * (worker_timeout or 2),
                    )
                )  # fmt: skip
                if others := who_else_has_access(client):
                    warn(
                        console,
                        f"{client.scheduler.address} has no TLS: {others} can run any code as you. Dask's "
                        "documentation of TLS explains how to prevent that",
                    )
            elif slurm is not None:
                client = stack.enter_context(
                    open_slurm(
                        slurm, workers or 1, folder=plans[0].configuration.prediction_folder,
                        dashboard_address=dashboard_address, seconds=60 * (worker_timeout or 60), stop=stop,
                        inform=partial(inform, console),
                    )
                )  # fmt: skip
            else:
                wanted = count or workers
                inform(console, f"starting {counted(wanted, 'worker')}" if wanted else "starting a worker for each GPU")
                client = stack.enter_context(
                    open_cluster(
                        chosen, count or workers or 0, cpu_workers=cpu_workers, dashboard_address=dashboard_address
                    )
                )
            if joins and device == "cuda":
                wait_for_gpu(client, name_of_gpu, 60 * (worker_timeout or 2))
            found_device = describe_devices(client, name_of_gpu) if elsewhere or chosen == "cuda" else chosen
            if elsewhere or chosen == "cuda":
                chosen = _device_of(found_device, device if elsewhere else chosen, elsewhere)
            if elsewhere:
                for plan in plans:
                    precision = plan.configuration.hyper_parameters.precision
                    ask(client, on_device, chosen, require_precision, precision, chosen)
            if elsewhere or chosen == "cuda":
                alone, shared, gpus = memory_of_workers(client, memory_of_gpu if chosen == "cuda" else None)
                of_gpu = memory_to_use(plans, alone, gpus)
                require_memory(plans, alone, of_gpu)
                if small := sum(memory < of_gpu for memory in gpus if of_gpu is not None):
                    warn(
                        console,
                        f"{small} of {len(gpus)} GPUs have too little free memory, at least {min(gpus) / 1e9:.1f} GB: "
                        "the others compute what does not fit. Stop other programs on them, or lower patch_size",
                    )
                plans = [plan.with_memory(int(USABLE * shared), of_gpu) for plan in plans]
            stack.enter_context(forwarded_warnings(client))
            log_workers(client, found_device)
            if performance_report is not None:
                stack.enter_context(write_performance_report(client, performance_report, partial(warn, console)))
            if any(plan.jobs for plan in plans):
                inform(console, f"loading the network{'s' * (len([plan for plan in plans if plan.jobs]) > 1)}")
            for plan in plans:
                if plan.jobs:
                    setup = Setup(partial(on_device, chosen, load_predictor, plan.spec(chosen)))
                    try:
                        register_in_workers(client, setup, f"model {plan.name}")
                    except DeviceError as error:
                        ask(client, on_device, chosen, can_load, plan.spec(chosen))  # fails if no other GPU can
                        warn(console, f"{error} The other GPUs compute what this one cannot")
            running = computing = len(client.nthreads())
            if chosen == "cuda":
                computing, broken = usable_gpus(client, name_of_gpu)
                if broken:
                    warn(
                        console,
                        f"the run continues without {', '.join(broken)}, which PyTorch cannot use. Check nvidia-smi "
                        "and dmesg",
                    )
            others = f" and {counted(running - computing, 'worker')} without a GPU" if running > computing else ""
            inform(
                console,
                f"{counted(total, 'tomogram')} on {counted(computing, f'{chosen} worker')}{others}; "
                f"dashboard {client.dashboard_link}",
            )
            largest = max(plans, key=lambda plan: plan.bytes_per_worker)
            in_flight = IN_FLIGHT if chosen == "cpu" else IN_FLIGHT_ON_DEVICE
            inform(
                console,
                f"memory of a worker: about {math.ceil(largest.block_bytes * in_flight / 2e8) / 10} GB for "
                f"{in_flight} blocks, "
                f"{math.ceil(largest.network_bytes / 1e8) / 10} GB for the network"
                + (
                    f" and for each of {largest.configuration.hyper_parameters.batch_size} patches on its GPU"
                    if chosen == "cuda"
                    else ""
                ),
            )
            pace = Pace(total, _network_voxels(plans), computing)
            reporter = Reporters(Meter(client), pace, make_reporter(console, pace), FileReporter(pace))
            of_device = name_of_gpu if chosen == "cuda" else None
            executor = DaskExecutor(client, watch=reporter.watch, inform=reporter.inform, has_device=of_device)
            try:
                outcomes = run(plans, reporter, device=chosen, executor=executor, timeline=timeline, stop=stop)
            finally:
                reporter.close()
    finally:
        if not joins:  # on a cluster that keeps running, tasks may still be in flight
            for plan in plans:
                remove_left_overs(plan)
    print_table(console, outcomes, shown)
    for plan in plans:
        sentences = plan.warnings(count or None, memory_of_machine())
        for sentence in sentences:
            warn(console, sentence)
            if warned is not None:
                warned.append(sentence)
        report_on(plan.configuration, _of_stage(outcomes, plan), console, sentences if plan.jobs else None)
    return outcomes


def _network_voxels(plans: Sequence[RunPlan]) -> dict[str, dict[str, float]]:
    """Count the voxels that the networks see, by tomogram and model."""
    found: dict[str, dict[str, float]] = {}
    for plan in plans:
        by_shape: dict[tuple[int, ...], float] = {}
        for job in plan.jobs:
            if job.shape and job.problem is None:
                if job.shape not in by_shape:
                    by_shape[job.shape] = float(plan.blocks(job.shape).patch_count * math.prod(plan.patch))
                found.setdefault(job.stem, {})[plan.name] = by_shape[job.shape]
    return found


def _of_stage(outcomes: Sequence[Outcome], plan: RunPlan) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.stage == plan.name]


def _planned(
    configuration: Configuration,
    name: str,
    filename: str | None,
    overwrite: bool,
    overwrite_all: bool,
    pending_inputs: Collection[str],
    device: Literal["cpu", "cuda"] | None,
    workers: int | None,
    console: Console,
) -> RunPlan:
    """Plan one model; `device` is ``None`` if only the workers know it."""
    automatic = configuration.parameters.data.patch_size == "auto"
    if automatic and device is None:
        raise Problems(
            [
                ConfigurationError(
                    "must be given in numbers if the workers run on other machines",
                    place="key parameters.data.patch_size",
                    value="auto",
                    remedy="Segment a single tomogram on such a machine, and set the patch_size that it prints",
                )
            ]
        )
    make = partial(plan_run, filename=filename, name=name, pending_inputs=pending_inputs)
    # With an automatic patch, outputs are compared after the patch has been chosen.
    plan = make(configuration, overwrite=overwrite, overwrite_all=overwrite_all or automatic)
    if automatic and device is not None:
        plan = make(
            _with_largest_patch(plan, device, workers, console), overwrite=overwrite, overwrite_all=overwrite_all
        )
    return plan


def _command(plans: Sequence[RunPlan]) -> str:
    return "run" if len(plans) > 1 else "denoise-predict" if plans[0].denoises else "semantic-predict"


def _require_any(plans: Sequence[RunPlan]) -> None:
    """Refuse a run in which no tomogram can be segmented."""
    first: dict[str, tuple[str, CryosiamDaskError | None]] = {}
    for plan in plans:
        for job in plan.jobs:
            first.setdefault(job.stem, (plan.name, job.problem))
    found = {stem: (name, problem) for stem, (name, problem) in first.items() if problem is not None}
    if found and len(found) == len(first) and not any(plan.skipped or plan.incomplete for plan in plans):
        raise Problems(
            [problem for _, problem in found.values()],
            [
                Outcome(stem, "failed", error=str(problem), kind=type(problem).__name__, stage=name)
                for stem, (name, problem) in found.items()
            ],
        )


def _device_of(found: Literal["cpu", "cuda"], wanted: Device, elsewhere: bool) -> Literal["cpu", "cuda"]:
    """Return the device of a running cluster, if it is the requested one; `elsewhere`: it was not started here."""
    if wanted == "cuda" and found == "cpu":
        raise DeviceError(
            "device cuda was requested and must be usable",
            value="workers without GPUs" if elsewhere else "no GPU that PyTorch can use in a worker process",
            remedy="Start them with 'dask cuda worker' on nodes with GPUs, or use --device cpu"
            if elsewhere
            else "Check nvidia-smi and dmesg, or use --device cpu",
        )
    return "cpu" if wanted == "cpu" else found


#: Number of tomograms whose intensities are checked before a run, which takes about a second.
_CHECKED_FIRST = 3


def _warn_about_intensities(plans: Sequence[RunPlan], console: Console) -> set[tuple[str, str]]:
    """Warn before a run if the models cannot see the contrast of some of its tomograms.

    Returns
    -------
    set of tuple of str
        Names of tomograms with the warnings that were shown.
    """
    shown: set[tuple[str, str]] = set()
    models: dict[str, list[str]] = {}  # by warning
    samples: dict[Path, tuple[TomogramHeader, Sample]] = {}
    for plan in plans:
        data, found = plan.configuration.parameters.data, dict[str, Intensities]()
        count, single = len(plan.jobs), list[tuple[str, str]]()
        for i in sorted({0, count // 2, count - 1} if count else ())[:_CHECKED_FIRST]:
            job = plan.jobs[i]
            with suppress(CryosiamDaskError):  # the tomogram fails later
                if job.source not in samples:
                    header = read_header(job.source, **plan.configuration.reading)
                    samples[job.source] = header, sample_file(header)
                header, sample = samples[job.source]
                found[job.stem] = intensities(sample, data.min, data.max)
                single += [(job.stem, s) for s in plan.intensity_warnings(header, found[job.stem])]
        shown.update(single)
        sentences, replaced = plan.shared_warnings(list(found.values()))
        where = "" if len(found) == count else ", checked before the run"
        lines = [f": {number} of {count} tomograms{where}: {sentence}" for sentence, number in sentences]
        single = [(stem, sentence) for stem, sentence in single if not sentence.startswith(tuple(replaced))]
        for line in (*lines, *(f", {stems}: {sentence}" for stems, sentence in merged_warnings(single))):
            models.setdefault(line, []).append(plan.name)
    for line, names in models.items():
        line = f"warning{line}" if len(names) == len(plans) else f"warning, {' and '.join(names)}{line}"
        LOG.warning("%s", line, extra=SHOWN)
        print_always(console, line)
    return shown


def _with_largest_patch(
    plan: RunPlan, device: Literal["cpu", "cuda"], workers: int | None, console: Console
) -> Configuration:
    """Return the configuration of a plan with the largest patch that fits into the device's memory."""
    plan = plan.with_shapes()
    extent = tuple(max(sizes) for sizes in zip(plan.patch, *plan.shapes, strict=True))
    if device == "cuda":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # this process does not use the GPU
            gpus = pool.submit(memories_of_gpus).result()

        def beside(patch: tuple[int, ...]) -> int:
            return replace(plan, patch=patch, room=0).block_bytes

        def largest_on(gpu: int, memory: int) -> tuple[int, ...]:
            return largest_patch(plan.spec(device), extent, int(USABLE * memory), beside, gpu)

        *smaller, last = gpus
        for each in smaller:
            with suppress(DeviceError):  # larger GPUs will compute blocks that do not fit
                patch = largest_on(*each)
                break
        else:
            patch = largest_on(*last)
    else:
        memory = int(USABLE * memory_of_machine() / (workers or cores()))
        patch = largest_patch(plan.spec(device), extent, memory)
    inform(console, f"patch_size {list(patch)} is the largest that fits; results depend on it, so set it in the file")
    configuration = plan.configuration
    data = configuration.parameters.data.model_copy(update={"patch_size": patch})
    parameters = configuration.parameters.model_copy(update={"data": data})
    return configuration.model_copy(update={"parameters": parameters})
