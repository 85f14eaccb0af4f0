"""What a run tells the person who watches it: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cryosiam_dask.run_log import LOG, TOLD


class Reporter(Protocol):
    """Receives what happens in a run, from any thread; several tomograms may be in work at the same time."""

    def begin(self, tomogram: str) -> None:
        """Work on a tomogram begins."""
        ...

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """`done` of `total` pieces of the step `name` of a tomogram are done."""
        ...

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """Work on a tomogram ended; `message` says how, `voxels` how much was segmented, `left` that more is to do."""
        ...

    def say(self, message: str) -> None:
        """Something that a user should know."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class _Totals:
    """How far a collection is.

    Parameters
    ----------
    total
        Tomograms in the run.
    """

    def __init__(self, total: int) -> None:
        self.total, self.ended, self.failed, self.voxels = total, 0, 0, 0
        self.began = time.monotonic()

    def add(self, failed: bool, voxels: int) -> None:
        self.ended += 1
        self.failed += failed
        self.voxels += voxels

    def remarks(self) -> list[str]:
        """What else there is to say of the whole."""
        words = [f"{self.failed} failed"] if self.failed else []
        if self.voxels:
            elapsed = max(1e-3, time.monotonic() - self.began)
            words.append(f"{self.voxels / elapsed / 1e6:.3g} million voxels a second")
        return words

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.began
        words = [f"{self.ended} of {self.total} done", *self.remarks()]
        if 0 < self.ended < self.total:
            words.append(f"{_duration(elapsed / self.ended * (self.total - self.ended))} left")
        return ", ".join(words)


class LogReporter:
    """Plain lines: the beginning and the end of every step, and in between at most one line in `interval` seconds.

    Parameters
    ----------
    console
        Where to print.
    total
        Tomograms in the run.
    interval
        Seconds between two lines of one step.
    """

    def __init__(self, console: Console, total: int, interval: float = 30.0) -> None:
        self._console, self._interval = console, interval
        self._totals = _Totals(total)
        self._begun: dict[str, int] = {}  # numbers of tomograms, which may begin again
        self._steps: dict[str, tuple[str, float, float]] = {}  # by tomogram: name, begun, told
        self._lock = threading.RLock()

    def begin(self, tomogram: str) -> None:
        """See `Reporter`."""
        with self._lock:
            number = self._begun.setdefault(tomogram, len(self._begun) + 1)
            self.say(f"{tomogram}: begins ({number} of {self._totals.total})")

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        with self._lock:
            now = time.monotonic()
            step, began, told = self._steps.get(tomogram, ("", now, now))
            if name != step or done == 0:
                step, began, told = name, now, now
            elapsed = now - began
            if done == total:
                self.say(f"{tomogram}: {name} done in {_duration(elapsed)}")
            elif done and now - told >= self._interval:
                told = now
                self.say(f"{tomogram}: {name} {done}/{total}, {_duration(elapsed / done * (total - done))} left")
            self._steps[tomogram] = (step, began, told)

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `Reporter`."""
        with self._lock:
            self._steps.pop(tomogram, None)
            if not left:
                self._totals.add(failed, voxels)
            self.say(f"{tomogram}: {message}" + (f" ({self._totals})" if self._totals.total > 1 else ""))

    def say(self, message: str) -> None:
        """See `Reporter`."""
        with self._lock:
            self._console.print(f"{time.strftime('%H:%M:%S')} {message}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """See `Reporter`."""


class TerminalReporter:
    """A bar for the collection and one for every tomogram in work, each with the time that is left.

    Parameters
    ----------
    console
        A terminal.
    total
        Tomograms in the run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            speed_estimate_period=math.inf,  # a tomogram, or a block on a slow device, takes longer than any window
        )
        self._totals = _Totals(total)
        self._all = self._progress.add_task("tomograms", total=total, note="")
        self._tasks: dict[str, tuple[str, TaskID]] = {}
        self._lock = threading.RLock()
        self._progress.start()

    def begin(self, tomogram: str) -> None:
        """See `Reporter`."""

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        with self._lock:
            step, task = self._tasks.get(tomogram, ("", None))
            description = f"{tomogram}: {name}"
            if task is None:
                task = self._progress.add_task(description, total=total, note="")
            elif name != step:  # the same line, so that no other one jumps
                self._progress.reset(task, description=description, total=total)
            self._tasks[tomogram] = (name, task)
            self._progress.update(task, completed=done, total=total)

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `Reporter`."""
        with self._lock:
            _, task = self._tasks.pop(tomogram, ("", None))
            if task is not None:
                self._progress.remove_task(task)
            if not left:
                self._totals.add(failed, voxels)
            self._progress.update(self._all, completed=self._totals.ended, note=", ".join(self._totals.remarks()))
            self.say(f"{tomogram}: {message}")

    def say(self, message: str) -> None:
        """See `Reporter`."""
        self._progress.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """See `Reporter`."""
        self._progress.stop()


class FileReporter(LogReporter):
    """The lines of a `LogReporter`, to the log file of the run.

    Parameters
    ----------
    total
        Tomograms in the run.
    """

    def __init__(self, total: int) -> None:
        super().__init__(Console(emoji=False, quiet=True), total, interval=60.0)

    def say(self, message: str) -> None:
        """See `Reporter`."""
        LOG.info(message, extra=TOLD)


class Reporters:
    """Tells several reporters the same.

    Parameters
    ----------
    reporters
        Whom.
    """

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters: Sequence[Reporter] = reporters

    def begin(self, tomogram: str) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.begin(tomogram)

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.step(tomogram, name, done, total)

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.end(tomogram, message, failed=failed, voxels=voxels, left=left)

    def say(self, message: str) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.say(message)

    def close(self) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.close()


def make_reporter(console: Console, total: int) -> Reporter:
    """Live bars where `console` is a terminal, plain lines elsewhere."""
    return TerminalReporter(console, total) if console.is_terminal else LogReporter(console, total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
