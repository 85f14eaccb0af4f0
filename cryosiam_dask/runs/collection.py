"""Run many tomograms: in order, some at the same time, and with failures and other runs taken into account.

Tomograms start in order, and each finishes as early as possible: pending tasks of the tomogram that started first run
first. The next tomogram starts early enough that no device waits for it to be read, and late enough that few tomograms
are in progress. Tasks that do not need the devices run at the same time as those that do.

If a tomogram fails, that is recorded and the run continues, unless all others would fail with the same error. Several
runs on the same folders share the tomograms (`cryosiam_dask.files.claims.Claims`).
"""

from __future__ import annotations

import math
import queue
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from cryosiam_dask.core.executor import (
    GuardedExecutor,
    Interrupted,
    SerialExecutor,
    SharedExecutor,
    TakenOver,
    with_retries,
)
from cryosiam_dask.errors import LostClusterError, OutputError, is_transient
from cryosiam_dask.files.atomic import sweep_parts
from cryosiam_dask.files.claims import Claims, claim_path, open_claims, sweep
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.runs.fingerprint import known_identity, read_fingerprint
from cryosiam_dask.runs.ledger import Ledger, read_entries
from cryosiam_dask.runs.outcome import NOTE, Outcome, failed
from cryosiam_dask.runs.outputs import collect
from cryosiam_dask.runs.plan import Job, RunPlan
from cryosiam_dask.runs.progress import Reporter
from cryosiam_dask.runs.tomogram import segment_tomogram
from cryosiam_dask.runs.workspace import forget_failure, has_work_stores, work_stores
from cryosiam_dask.runs.written import complete

#: Errors that concern single tomograms, even if many tomograms have them.
_TOMOGRAM_ERRORS = {"TomogramError", "MaskError"}
#: Errors that concern all tomograms: a single one stops the run if nothing has succeeded yet.
_RUN_ERRORS = {"CheckpointError", "ClusterError", "DeviceError", "LostDeviceError", "DiskError"}
#: Number of consecutive failures of the same kind, of any other error, that stop the run.
_SAME_FAILURES = 3
#: Failed attempts to claim a tomogram on a disk that does not respond; after them it starts without a claim and reports
#: the disk's error.
_CLAIM_ATTEMPTS = 15
#: Seconds between two attempts to claim tomograms that other runs hold.
_CLAIM_PAUSE = 2.0


def run(
    plans: RunPlan | Sequence[RunPlan],
    reporter: Reporter,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    executor: SharedExecutor | None = None,
    timeline: bool = False,
    stop: threading.Event | None = None,
) -> list[Outcome]:
    """Segment the tomograms of a plan, or of several plans for the same tomograms.

    Parameters
    ----------
    plans
        From `plan_run`, in the order in which each tomogram needs them.
    reporter
        Receives the progress.
    device
        The device that the workers run the networks on.
    executor
        Runs the tasks of every stage; by default in this process.
    timeline
        Whether to draw ``<stem>_timeline.png``, which shows when each worker read, computed and wrote each block.
    stop
        Once set, no more tasks start; those in flight are finished and recorded.

    Returns
    -------
    list of Outcome
        One for each tomogram and plan, including those that were already done. Failures are outcomes, not exceptions.

    Raises
    ------
    LostClusterError
        If the workers are lost; the same command resumes.
    """
    plans = [plans] if isinstance(plans, RunPlan) else list(plans)
    for plan in plans:
        make_folders(plan)
        _sweep_parts(plan)
    executor = executor or SerialExecutor()
    with open_claims() as claims:
        for folder in {plan.configuration.prediction_folder for plan in plans}:
            with suppress(OSError):
                sweep(folder, claims)
        for plan in plans:
            _tidy(plan, claims)
        for path in (claim_path(plan.configuration.prediction_folder, j.stem) for plan in plans for j in plan.skipped):
            with suppress(OSError):  # a claim left by a run that was killed just after the tomogram was done
                if path.exists() and claims.take(path):
                    claims.release(path)
        collection = _Collection(plans, reporter, device, executor, timeline, stop or threading.Event(), claims)
        outcomes = collection.work()
    for plan in plans:
        collect(plan.configuration, outcomes)
    return outcomes


def outcomes_before(plans: Sequence[RunPlan]) -> list[Outcome]:
    """Return the outcomes known before the run: skipped tomograms, and those whose names cannot be used."""
    refused: dict[str, Outcome] = {}
    for plan in plans:
        for stem, error in plan.refused:
            kind = type(error).__name__
            refused.setdefault(stem, Outcome(stem, "failed", error=str(error), kind=kind, stage=plan.name))
    return [
        *refused.values(),
        *(Outcome(job.stem, "skipped", stage=plan.name) for plan in plans for job in plan.skipped),
    ]


def forget_failures(plans: Sequence[RunPlan]) -> None:
    """Record as done the tomograms whose outputs are up to date although their last run failed."""
    with open_claims() as claims:
        for plan in plans:
            folder = plan.configuration.prediction_folder
            for job in plan.skipped:
                entries, _ = read_entries(folder, job.stem)
                claim = claim_path(folder, job.stem)
                with suppress(OSError):  # the run does not fail for a record
                    if entries and entries[-1].get("status") == "failed" and claims.take(claim):
                        try:
                            forget_failure(Ledger(folder, job.stem))
                        finally:
                            claims.release(claim)


def remove_denoised(plans: Sequence[RunPlan]) -> None:
    """Remove denoised tomograms once all models of a pipeline are done with them, unless they are to be kept."""
    if not plans[0].removes_denoised:
        return
    left = {job.stem for plan in plans for job in (*plan.jobs, *plan.incomplete)}
    with open_claims() as claims:
        for job in plans[0].skipped:
            if job.stem not in left:
                _remove_denoised(plans, job.stem, claims)


def _remove_denoised(plans: Sequence[RunPlan], stem: str, claims: Claims) -> None:
    first, *others = plans
    jobs = {job.stem: job for job in (*first.jobs, *first.skipped)} if first.removes_denoised and others else {}
    if stem not in jobs or not (path := jobs[stem].output).exists():
        return
    folder = first.configuration.prediction_folder
    claim = claim_path(folder, stem)
    with suppress(OutputError, OSError):  # the next run removes it
        if (made := read_fingerprint(path)) is not None and claims.take(claim):
            try:
                ledger, size = Ledger(folder, stem), read_header(path).voxel_size_angstrom
                before = ledger.last("outcome") or {"status": "done"}
                identity = known_identity(others[0].configuration, path, stem)
                ledger.append("removed", fingerprint=made, identity=identity, voxel_size_angstrom=size)
                ledger.close(**{name: value for name, value in before.items() if name != "what"})
                path.unlink()
            finally:
                claims.release(claim)


def make_folders(plan: RunPlan) -> None:
    """Create the folders that a run writes to.

    Raises
    ------
    OutputError, StorageError
        If a folder cannot be created.
    """
    for key in ("prediction_folder", "work_folder"):
        folder: Path | None = getattr(plan.configuration, key)
        try:
            if folder:
                with_retries(partial(folder.mkdir, parents=True, exist_ok=True))
        except OSError as error:
            raise OutputError(
                "must be a folder that can be created",
                place=f"key {key}",
                value=f"{folder}: {error.strerror}",
                remedy=f"Set {key} to another folder, or change the permissions",
            ) from None


def remove_left_overs(plan: RunPlan) -> None:
    """Remove what tasks wrote after their tomogram had failed; call it after the workers have ended."""
    _sweep_parts(plan, own=True)
    with open_claims() as claims:
        for job in () if plan.configuration.keep_work else (*plan.jobs, *plan.incomplete):
            _remove_work(plan, job, claims, only=lambda ledger: ledger.last("store") is None)


def _sweep_parts(plan: RunPlan, own: bool = False) -> None:
    """Remove unfinished outputs and work stores."""
    configuration = plan.configuration
    for folder in filter(None, (configuration.prediction_folder, configuration.work_folder)):
        with suppress(OSError):
            sweep_parts(folder, own=own)


def _tidy(plan: RunPlan, claims: Claims) -> None:
    """Remove work stores of finished tomograms that a killed run left behind."""
    with suppress(OSError):
        if plan.configuration.keep_work or not has_work_stores(plan.configuration):
            return
        for job in plan.skipped:
            _remove_work(plan, job, claims, only=lambda ledger: True)


def _remove_work(plan: RunPlan, job: Job, claims: Claims, only: Callable[[Ledger], bool]) -> None:
    claim = claim_path(plan.configuration.prediction_folder, job.stem)
    with suppress(OutputError, OSError):
        stores = work_stores(plan.configuration, job.stem)
        if stores and claims.take(claim):
            try:
                if only(Ledger(plan.configuration.prediction_folder, job.stem)):
                    for folder in stores:
                        shutil.rmtree(folder)
            finally:
                claims.release(claim)


@dataclass(eq=False, slots=True)
class _Work:
    """A pending or running tomogram; if `predicted`, only files made from its labels are missing."""

    order: int
    stem: str
    jobs: list[tuple[RunPlan, Job]]
    claims: list[Path]
    predicted: bool = False
    thread: threading.Thread | None = None
    preparing: bool = True
    taken_over: bool = False
    claim_failures: int = 0  # attempts to claim it at which the disk did not respond
    outcomes: list[Outcome] = field(default_factory=list)


class _Collection:
    """The state of a run over many tomograms."""

    def __init__(
        self,
        plans: Sequence[RunPlan],
        reporter: Reporter,
        device: Literal["cpu", "cuda"],
        executor: SharedExecutor,
        timeline: bool,
        stop: threading.Event,
        claims: Claims,
    ) -> None:
        self.reporter, self.device, self.executor, self.timeline = reporter, device, executor, timeline
        self.stop, self.claims, self.plans = stop, claims, plans
        self.skipped = outcomes_before(plans)
        works: dict[str, _Work] = {}
        for plan in plans:
            for job in plan.jobs:
                work = works.setdefault(job.stem, _Work(0, job.stem, [], []))
                work.jobs.append((plan, job))
                work.claims.append(claim_path(plan.configuration.prediction_folder, job.stem))
        self.waiting = deque(sorted(works.values(), key=lambda work: work.stem))
        for plan in plans:
            for job in plan.incomplete:
                claim = claim_path(plan.configuration.prediction_folder, job.stem)
                self.waiting.append(_Work(0, job.stem, [(plan, job)], [claim], predicted=True))
        for order, work in enumerate(self.waiting):
            work.order = order
        self.elsewhere: deque[_Work] = deque()
        self.active: list[_Work] = []
        self.unfinished: dict[str, tuple[bool, int]] = {}  # (failed, voxels) of tomograms with another `_Work` left
        self.ended: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self.blocks = 1  # number of blocks of the latest tomogram
        self.over = False
        self.lost: LostClusterError | None = None
        self.failures: list[str] = []
        self.noted = set[str]()
        self.succeeded = False  # whether a block has been predicted
        self.written = False  # whether an output has been written

    def work(self) -> list[Outcome]:
        """Run all tomograms."""
        everything = sorted([*self.waiting], key=lambda work: work.order)
        looked = 0.0
        try:
            while self.waiting or self.active or self.elsewhere:
                if self.stop.is_set() and not self.over:
                    self.over = True
                    self.executor.drain()
                    self.reporter.inform("stopping after the tasks in flight; repeat the command to resume")
                if self.over and not self.active:
                    break
                if not self.waiting and self.elsewhere and time.monotonic() - looked > _CLAIM_PAUSE:
                    looked = time.monotonic()
                    self.waiting, self.elsewhere = self.elsewhere, deque()
                if not self.over and self.waiting and self._should_start_another():
                    self._begin(self.waiting.popleft())
                    continue
                with suppress(queue.Empty):
                    self._end(self.ended.get(timeout=0.2))
        except BaseException:
            self.over = True
            self.executor.abandon()
            for work in self.active:
                if work.thread:
                    work.thread.join(timeout=30)
            raise
        if self.lost:
            raise self.lost
        return [*self.skipped, *self._outcomes(everything)]

    def _should_start_another(self) -> bool:
        """Whether another tomogram should start."""
        if not self.active:
            return True
        preparing = sum(work.preparing for work in self.active) * self.blocks
        return len(self.active) < 4 + self.executor.workers and preparing < self.executor.tasks_wanted

    def _begin(self, work: _Work) -> None:
        taken: list[Path] = []
        for path in work.claims:
            try:
                claimed_now = self.claims.take(path)
            except OSError as error:
                work.claim_failures += 1
                if not is_transient(error) or work.claim_failures > _CLAIM_ATTEMPTS:
                    break  # the tomogram starts without a claim and reports the disk's error
                claimed_now = False
            if not claimed_now:
                for other in taken:
                    self.claims.release(other)
                self.elsewhere.append(work)
                return
            taken.append(path)
        self.active.append(work)
        work.preparing, work.taken_over = True, False
        work.outcomes.clear()
        self.reporter.begin(work.stem)
        work.thread = threading.Thread(target=self._segment, args=(work,), daemon=True, name=work.stem)
        work.thread.start()

    def _segment(self, work: _Work) -> None:
        """Run a tomogram, in its own thread."""

        def progress(name: str, done: int, total: int) -> None:
            predicts = name.split()[-1] == "predict"
            if predicts and done == 0:
                work.preparing, self.blocks = False, max(1, total)
            if predicts and done:
                self.succeeded = True
            self.reporter.step(work.stem, name, done, total)

        began = time.time()
        shared = self.executor.share(work.stem, work.order, progress)
        # Claims that could not be written to the disk are not checked.
        claims = tuple(filter(self.claims.keeps, work.claims))

        def guard() -> None:
            if not all(map(self.claims.holds, claims)):
                raise TakenOver

        # While other tomograms are left, one tomogram need not have enough blocks for all workers.
        executor = GuardedExecutor(shared, guard, lambda: len(self.waiting) + len(self.active))
        try:
            if work.predicted:
                work.outcomes.append(complete(*work.jobs[0], executor))
                return
            outcomes = segment_tomogram(
                work.jobs,
                device=self.device,
                executor=executor,
                timeline=self.timeline,
                inform=lambda message: self._inform(work.stem, message),
                guard=guard,
            )
            for outcome in outcomes:
                work.outcomes.append(outcome)
        except LostClusterError as error:
            self.lost, self.over = error, True
        except TakenOver:
            work.taken_over = True
        except Interrupted:
            pass  # models without an outcome get the status "left"
        except BaseException as error:  # including errors in the error handling
            plan, job = work.jobs[min(len(work.outcomes), len(work.jobs) - 1)]
            work.outcomes = [*work.outcomes[: len(work.jobs) - 1], failed(plan, job, began, error)]
        finally:
            self.ended.put(work)

    def _inform(self, stem: str, message: str) -> None:
        """Inform the user; of several notes that differ only in numbers, only the first one is shown."""
        note = re.sub(r"\d+", "0", message)
        if not message.startswith(NOTE) or note not in self.noted:
            self.noted.add(note)
            self.reporter.inform(f"{stem}: {message}")

    def _end(self, work: _Work) -> None:
        self.active.remove(work)
        work.thread = None
        for path in work.claims:
            self.claims.release(path)
        if work.taken_over:
            self.reporter.inform(f"{work.stem}: another run took it over while this one was suspended")
            self.elsewhere.append(work)
            return
        failed, voxels = self.unfinished.pop(work.stem, (False, 0))
        parts, left = list[str](), len(work.outcomes) < len(work.jobs)
        for outcome, (_, job) in zip(work.outcomes, work.jobs, strict=False):
            stage = f"{outcome.stage}: " if outcome.stage else ""
            if outcome.status == "failed":
                parts.append(f"{stage}FAILED: {outcome.error}")
                failed, left = True, False
                self._stop_if_hopeless(outcome)
            elif outcome.status == "done":
                self.failures.clear()
                self.written = True
                voxels += 0 if work.predicted else math.prod(outcome.shape)
                parts.append(f"{stage}done in {outcome.seconds:.0f} s, {job.output}")
            else:
                parts.append(f"{stage}already done, {job.output}")
        if left:
            parts.append("stopped, can be resumed")
        message = "; ".join(parts)
        if any(other.stem == work.stem for other in (*self.waiting, *self.active, *self.elsewhere)):
            self.unfinished[work.stem] = failed, voxels  # another model is still to run on it
            self.reporter.inform(f"{work.stem}: {message}")
        elif left:
            self.reporter.end(work.stem, message, left=True)
        else:
            if not failed:
                _remove_denoised(self.plans, work.stem, self.claims)
            self.reporter.end(work.stem, message, failed=failed, voxels=voxels)

    def _stop_if_hopeless(self, outcome: Outcome) -> None:
        """Stop the run if all other tomograms would fail with the error of a failed one."""
        if outcome.kind in _TOMOGRAM_ERRORS or self.over:
            return
        self.failures = [kind for kind in self.failures if kind == outcome.kind] + [outcome.kind]
        has_worked = self.written if outcome.kind == "DiskError" else self.succeeded
        concerns_all = not has_worked and outcome.kind in _RUN_ERRORS
        if (concerns_all or len(self.failures) >= _SAME_FAILURES) and (self.waiting or self.active):
            self.over = True
            self.executor.drain()
            self.reporter.inform(
                "stopping: all other tomograms would fail with the error of the first one"
                if concerns_all
                else f"stopping: {_SAME_FAILURES} tomograms in a row failed with the same kind of error"
            )

    def _outcomes(self, works: Iterable[_Work]) -> list[Outcome]:
        found = []
        for work in works:
            found += work.outcomes
            if len(work.outcomes) < len(work.jobs) and not any(o.status == "failed" for o in work.outcomes):
                found += [Outcome(work.stem, "left", stage=plan.name) for plan, _ in work.jobs[len(work.outcomes) :]]
        return found
