"""What a run tells the person who watches it: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import time
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


class Reporter(Protocol):
    """Receives what happens in a run, in order."""

    def begin(self, tomogram: str) -> None:
        """Work on a tomogram begins."""
        ...

    def step(self, name: str, done: int, total: int) -> None:
        """`done` of `total` pieces of the step `name` of the present tomogram are done."""
        ...

    def end(self, message: str) -> None:
        """Work on the present tomogram ended; `message` says how."""
        ...

    def say(self, message: str) -> None:
        """Something that a user should know."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


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
        self._console, self._total, self._interval = console, total, interval
        self._number = 0
        self._tomogram = self._step = ""
        self._began = self._told = 0.0

    def begin(self, tomogram: str) -> None:
        """See `Reporter`."""
        self._number += 1
        self._tomogram, self._step = tomogram, ""
        self.say(f"{tomogram}: begins ({self._number} of {self._total})")

    def step(self, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        now = time.monotonic()
        if name != self._step or done == 0:
            self._step, self._began, self._told = name, now, now
        elapsed = now - self._began
        if done == total:
            self.say(f"{self._tomogram}: {name} done in {_duration(elapsed)}")
        elif done and now - self._told >= self._interval:
            self._told = now
            self.say(f"{self._tomogram}: {name} {done}/{total}, {_duration(elapsed / done * (total - done))} left")

    def end(self, message: str) -> None:
        """See `Reporter`."""
        self.say(f"{self._tomogram}: {message}")

    def say(self, message: str) -> None:
        """See `Reporter`."""
        self._console.print(f"{time.strftime('%H:%M:%S')} {message}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """See `Reporter`."""


class TerminalReporter:
    """A bar for the collection and one for the present step, each with the time that is left.

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
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._all = self._progress.add_task("tomograms", total=total)
        self._task: TaskID | None = None
        self._tomogram = self._step = ""
        self._progress.start()

    def begin(self, tomogram: str) -> None:
        """See `Reporter`."""
        self._tomogram, self._step = tomogram, ""

    def step(self, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        if self._task is None or name != self._step:
            self._drop()
            self._step = name
            self._task = self._progress.add_task(f"{self._tomogram}: {name}", total=total)
        self._progress.update(self._task, completed=done, total=total)

    def end(self, message: str) -> None:
        """See `Reporter`."""
        self._drop()
        self._progress.advance(self._all)
        self.say(f"{self._tomogram}: {message}")

    def say(self, message: str) -> None:
        """See `Reporter`."""
        self._progress.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """See `Reporter`."""
        self._progress.stop()

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def make_reporter(console: Console, total: int) -> Reporter:
    """Live bars where `console` is a terminal, plain lines elsewhere."""
    return TerminalReporter(console, total) if console.is_terminal else LogReporter(console, total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
