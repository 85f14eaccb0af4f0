"""Report the progress of a run: live bars on a terminal, plain lines in a log.

A `Pace` estimates the time left from the seconds per voxel that each kind of task has taken and the voxels left for
each model, so that the estimate covers all models from the first blocks on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partialmethod
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cryosiam_dask.core.log import LOG, SHOWN


class Reporter:
    """Receives the progress of a run from any thread; several tomograms may be in progress at the same time."""

    def begin(self, tomogram: str) -> None:
        """Report that a tomogram starts."""

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """Report that `done` of `total` tasks of the step `name` of a tomogram are done."""

    def watch(self, step: str, seconds: float | None) -> None:
        """Report that a task of a step is done, `seconds` after it was submitted, or will be retried (``None``)."""

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """Report how a tomogram ended, the `voxels` that were segmented, and whether work is `left`."""

    def inform(self, message: str) -> None:
        """Show a message."""

    def close(self) -> None:
        """End the report."""


@dataclass(slots=True)
class _Kind:
    """Totals of one kind of task, such as ``lamella predict``, in all tomograms."""

    tasks: int = 0
    seconds: float = 0.0
    voxels: float = 0.0


@dataclass(slots=True)
class _Tomogram:
    """The voxels of a tomogram by model, and the share of each step that is done."""

    voxels: Mapping[str, float]
    steps: dict[str, float] = field(default_factory=dict)


class Pace(Reporter):
    """Estimate how much of a run is done, and the time left.

    1. Each kind of task (a model's blocks, reading, writing outputs) has a rate: the seconds that workers spent,
       divided by the voxels. A model that has not started is assumed to be as fast as the others; other kinds of tasks
       count once the first one is done.
    2. Tasks in flight count as half done.
    3. Time left and elapsed time have the same ratio as worker seconds left and spent. The time left is at least that
       of the consecutive steps of any one tomogram.

    Parameters
    ----------
    total
        Number of tomograms in the run.
    voxels
        For each tomogram and model, the voxels that the network sees; a voxel counts once for every patch that contains
        it. Without them, the estimate is based on whole tomograms.
    workers
        Number of workers.
    clock
        Returns seconds.
    """

    def __init__(
        self,
        total: int,
        voxels: Mapping[str, Mapping[str, float]] | None = None,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.ended, self.failed = total, 0, 0
        self._workers, self._clock, self._began = workers, clock, clock()
        self._tomograms = {name: _Tomogram(models) for name, models in (voxels or {}).items()}
        self._models = {model for tomogram in self._tomograms.values() for model in tomogram.voxels}
        self._kinds: dict[str, _Kind] = {}
        self._lock = threading.RLock()

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        with self._lock:
            found = self._tomograms.get(tomogram)
            if found is None or not total:
                return
            before = found.steps.get(name, 0.0) if done else 0.0
            found.steps[name] = done / total
            self._kinds.setdefault(name, _Kind()).voxels += self._voxels(found, name) * (done / total - before)

    def watch(self, step: str, seconds: float | None) -> None:
        """See `Reporter`."""
        with self._lock:
            if seconds is not None:
                kind = self._kinds.setdefault(step, _Kind())
                kind.tasks += 1
                kind.seconds += seconds

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `Reporter`."""
        with self._lock:
            self._tomograms.pop(tomogram, None)
            if not left:
                self.ended += 1
                self.failed += failed

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tomograms that have not ended."""
        return tuple(self._tomograms)

    def share(self) -> float:
        """Return the share of the run that is done, 0 to 1."""
        with self._lock:
            done, left = self._seconds()
            return done / (done + left) if done else self.ended / max(1, self.total)

    def seconds_left(self) -> float | None:
        """Return the estimated time left; ``None`` while there is no estimate."""
        with self._lock:
            elapsed, (done, left) = self._clock() - self._began, self._seconds()
            if done:
                return max(elapsed * left / done, self._longest())
            return elapsed / self.ended * (self.total - self.ended) if self.ended else None

    def _seconds(self) -> tuple[float, float]:
        """Return worker seconds spent and left; the former are 0 until a block has been predicted."""
        rates = self._rates()
        left = sum(
            count * sum(seconds for _, seconds in self._work_left(tomogram, rates))
            for tomogram, count in self._groups()
        )
        done = sum(kind.seconds for kind in self._kinds.values()) if rates else 0.0
        blocks = [kind for name, kind in self._kinds.items() if kind.tasks and _is_of_network(name)]
        in_flight = self._workers / 2 * sum(k.seconds for k in blocks) / max(1, sum(k.tasks for k in blocks))
        in_flight = min(in_flight, left / 2)
        return done + in_flight, left - in_flight

    def _groups(self) -> Iterator[tuple[_Tomogram, int]]:
        """Yield the tomograms that have not ended, with a count; those that have not started are grouped by size."""
        by_size: dict[tuple[tuple[str, float], ...], tuple[_Tomogram, int]] = {}
        for tomogram in self._tomograms.values():
            if tomogram.steps:
                yield tomogram, 1
            else:
                key = tuple(tomogram.voxels.items())
                by_size[key] = tomogram, by_size.get(key, (tomogram, 0))[1] + 1
        yield from by_size.values()

    def _rates(self) -> dict[str, float]:
        """Return worker seconds per voxel by kind of task, in the order of the steps; empty until a network has run."""
        rates = {name: kind.seconds / kind.voxels for name, kind in self._kinds.items() if kind.voxels and kind.seconds}
        networks = [rate for name, rate in rates.items() if _is_of_network(name)]
        for model in self._models if networks else ():
            rates.setdefault(f"{model} predict".strip(), fmean(networks))
        return rates if networks else {}

    def _work_left(self, tomogram: _Tomogram, rates: Mapping[str, float]) -> Iterator[tuple[str, float]]:
        """Yield the kinds of tasks left for a tomogram, with their worker seconds."""
        order = {name: number for number, name in enumerate(rates) if name in self._kinds}
        at = max((order[name] for name in tomogram.steps if name in order), default=-1)
        for name, rate in rates.items():
            # Steps have an order, so a step that this tomogram has skipped will not follow.
            if name in tomogram.steps or order.get(name, at + 1) > at:
                yield name, rate * self._voxels(tomogram, name) * (1 - tomogram.steps.get(name, 0.0))

    def _longest(self) -> float:
        """Return the seconds of the consecutive steps of the slowest tomogram if all workers work on it."""
        rates, longest = self._rates(), 0.0
        for tomogram, _ in self._groups():
            path = 0.0
            for name, seconds in self._work_left(tomogram, rates):
                kind = self._kinds.get(name)
                task = kind.seconds / kind.tasks if kind and kind.tasks else 0.0
                path += max(seconds / self._workers, min(seconds, task))
            longest = max(longest, path)
        return longest

    def _voxels(self, tomogram: _Tomogram, step: str) -> float:
        model = step.split()[0]
        if model in self._models:
            return tomogram.voxels.get(model, 0.0)
        return max(tomogram.voxels.values(), default=0.0)  # a single model, or a step shared by all models

    def remarks(self) -> list[str]:
        """List the number of failures and the rate, if there are any."""
        words = [f"{self.failed} failed"] if self.failed else []
        return [*words, *([self.rate()] if self.rate() else [])]

    def rate(self) -> str:
        """Return the tomograms per hour in words; empty until a tomogram is done."""
        done, hours = self.ended - self.failed, (self._clock() - self._began) / 3600
        if done < 1 or hours <= 0 or self.total < 2:
            return ""
        number = done / hours
        return f"{number:.0f} tomograms/h" if number >= 9.95 else f"{number:.2g} tomograms/h"

    def __str__(self) -> str:
        words = [f"{self.ended} of {self.total} done", *self.remarks()]
        left = self.seconds_left()
        if left is not None and self.ended < self.total:
            words.append(f"{duration(left)} left")
        return ", ".join(words)


def _is_of_network(step: str) -> bool:
    return step.split()[-1] == "predict"


class LogReporter(Reporter):
    """Print plain lines, at most three for each tomogram: start, end, and occasionally the progress of the run.

    Parameters
    ----------
    console
        Where to print.
    pace
        Pace of the run, which must be updated before this reporter.
    interval
        Seconds between two lines of progress.
    """

    def __init__(self, console: Console, pace: Pace, interval: float = 30.0) -> None:
        self._console, self._pace, self._interval = console, pace, interval
        self._begun: dict[str, int] = {}  # numbers of the tomograms; one may start again
        self._last_line, self._lines = time.monotonic(), 0
        self._lock = threading.RLock()

    def begin(self, tomogram: str) -> None:
        """See `Reporter`."""
        with self._lock:
            if tomogram not in self._begun:
                self._begun[tomogram] = len(self._begun) + 1
                self.inform(f"{tomogram}: started ({self._begun[tomogram]} of {self._pace.total})")

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        with self._lock:
            now = time.monotonic()
            if not 0 < done < total or now - self._last_line < self._interval or self._lines >= len(self._begun):
                return
            if self._pace.seconds_left() is not None:
                self._last_line, self._lines = now, self._lines + 1
                self.inform(f"{tomogram}: {name} {done}/{total} ({self._pace})")

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `Reporter`."""
        with self._lock:
            self.inform(f"{tomogram}: {message}" + (f" ({self._pace})" if self._pace.total > 1 else ""))

    def inform(self, message: str) -> None:
        """See `Reporter`."""
        with self._lock:
            self._console.print(f"{time.strftime('%H:%M:%S')} {message}", markup=False, highlight=False, soft_wrap=True)


@dataclass(slots=True)
class _Line:
    """The current step of a tomogram on the terminal."""

    step: str
    began: float
    done: int = 0
    total: int = 1


class TerminalReporter(Reporter):
    """Show a bar for the run and one for each tomogram in progress, with the time left.

    On narrow terminals it shortens the middle of names, drops the rate, then shortens the bars.

    Parameters
    ----------
    console
        A terminal.
    pace
        Pace of the run, which must be updated before this reporter.
    """

    def __init__(self, console: Console, pace: Pace) -> None:
        self._pace, self._lines, self._console = pace, dict[str, _Line](), console
        self._lock = threading.RLock()
        self._live = Live(
            console=console, get_renderable=self.render, refresh_per_second=4, redirect_stdout=False, transient=False
        )
        self._live.start()

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        """See `Reporter`."""
        with self._lock:
            line = self._lines.setdefault(tomogram, _Line("", 0))  # kept, so that other lines do not move
            if name != line.step or done == 0:
                line.step, line.began = name, time.monotonic()
            line.done, line.total = done, total

    def end(self, tomogram: str, message: str, *, failed: bool = False, voxels: int = 0, left: bool = False) -> None:
        """See `Reporter`."""
        with self._lock:
            self._lines.pop(tomogram, None)
        self.inform(f"{tomogram}: {message}")

    def inform(self, message: str) -> None:
        """See `Reporter`."""
        self._console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """See `Reporter`."""
        self._live.stop()

    def render(self) -> Table:
        """Return the current lines."""
        with self._lock:
            pace, lines, names = self._pace, dict(self._lines), (*self._pace.names, *self._lines)
            title = f"{pace.ended} of {pace.total} tomogram{'s' * (pace.total != 1)}"
            title += f", {pace.failed} failed" if pace.failed else ""
            rows = [(title, "", pace.share(), pace.seconds_left())]
            for tomogram, line in lines.items():
                gone, share = time.monotonic() - line.began, line.done / max(1, line.total)
                rows.append((tomogram, line.step, share, gone / share * (1 - share) if share else None))
        widths = _widths(self._console.width, rows[0][0], [row[:2] for row in rows[1:]], pace.rate())
        table = Table.grid(padding=(0, 1))
        for width in (widths.text, widths.bar, 5, widths.time):
            table.add_column(width=width, no_wrap=True, overflow="crop")
        for number, (name, step, share, left) in enumerate(rows):
            label = f"{shortened(name, widths.name, names):{widths.name}} {shortened(step, widths.step)}"
            note = f"  {pace.rate()}" if number == 0 and widths.rate else ""
            table.add_row(
                Text(label if number else shortened(name, widths.text)),
                ProgressBar(total=1.0, completed=share, width=widths.bar),
                Text(f"{int(100 * share)} %".rjust(5)),
                Text(("-:--:--" if left is None else duration(left)).rjust(_TIME) + f" left{note}"),
            )
        return table


_TIME = 8  # columns of 99:59:59


@dataclass(frozen=True, slots=True)
class _Widths:
    """Widths of the columns in characters, and whether the rate is shown."""

    name: int
    step: int
    bar: int
    time: int
    rate: bool

    @property
    def text(self) -> int:
        """Width of name and step together."""
        return self.name + 1 + self.step


_NAME = 24  # minimum while the rate is shown
_STEP = 16, 22  # maximum on terminals below 100 columns, and on others
_BAR = 8, 14, 40  # minimum, usual, maximum


def _widths(width: int, title: str, lines: Sequence[tuple[str, str]], rate: str) -> _Widths:
    """Fit the columns to a terminal of `width`, given the `title` of the first line and the names and steps."""
    least, usual, longest = _BAR
    step = min(_STEP[width >= 100], max((len(step) for _, step in lines), default=0))
    name = max(len(title) - 1 - step, *(len(name) for name, _ in lines), 1)
    left = _TIME + len(" left")
    # One column stays free, because some terminals wrap a line that ends at their edge.
    room = width - 1 - 3 - 5 - left - 1 - step  # for name, bar and rate
    note = f"  {rate}" if rate else ""
    if min(name, _NAME) + usual + len(note) > room:
        note = ""
    room -= len(note)
    name = max(least, min(name, max(room - usual, min(_NAME, room - least))))
    return _Widths(name, step, max(least, min(longest, room - name)), left + len(note), bool(note))


def shortened(name: str, width: int, among: Iterable[str] = ()) -> str:
    """Shorten a long name in its middle, or elsewhere if that keeps it different from others.

    Parameters
    ----------
    name
        The name to shorten.
    width
        Maximum number of characters, including the ellipsis.
    among
        Names that should stay different from each other.

    Examples
    --------
    >>> shortened("Position_01_lamella3_TS_010_9.96Apx_denoised", 21)
    'Position_0…x_denoised'
    >>> names = ["Position_01_TS_010_denoised", "Position_01_TS_011_denoised"]
    >>> [shortened(name, 17, names) for name in names]
    ['Positi…0_denoised', 'Positi…1_denoised']
    """
    if len(name) <= width:
        return name
    return _cut(name, width, _head(width, tuple(among)))


def _cut(name: str, width: int, head: int) -> str:
    if len(name) <= width:
        return name
    tail = width - 1 - head
    return f"{name[:head]}…{name[len(name) - tail :]}" if width > 1 else "…"[:width]


@lru_cache(maxsize=64)
def _head(width: int, names: tuple[str, ...]) -> int:
    """Return how many leading characters to keep so that all names differ, or about half of the width."""
    middle, different = max(0, width - 1) // 2, len(set(names))
    places = sorted(range(max(1, width)), key=lambda head: abs(head - middle))
    return next((head for head in places if len({_cut(name, width, head) for name in names}) == different), middle)


class FileReporter(LogReporter):
    """Write the lines of a `LogReporter` to the log file of the run.

    Parameters
    ----------
    pace
        See `LogReporter`.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__(Console(emoji=False, quiet=True), pace, interval=60.0)

    def inform(self, message: str) -> None:
        """See `Reporter`."""
        LOG.info(message, extra=SHOWN)


class Reporters(Reporter):
    """Pass everything to several reporters.

    Parameters
    ----------
    reporters
        The reporters, in the order in which they are called.
    """

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def _all(self, method: Callable[..., None], *arguments: Any, **options: Any) -> None:
        for reporter in self._reporters:
            getattr(reporter, method.__name__)(*arguments, **options)

    begin = partialmethod(_all, Reporter.begin)
    step = partialmethod(_all, Reporter.step)
    watch = partialmethod(_all, Reporter.watch)
    end = partialmethod(_all, Reporter.end)
    inform = partialmethod(_all, Reporter.inform)
    close = partialmethod(_all, Reporter.close)


def make_reporter(console: Console, pace: Pace) -> Reporter:
    """Return a reporter with live bars if `console` is a terminal, else with plain lines; update `pace` before it."""
    return TerminalReporter(console, pace) if console.is_terminal else LogReporter(console, pace)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, or as days from four days on.

    Examples
    --------
    >>> duration(3723.4), duration(400_000)
    ('1:02:03', '5 days')
    """
    if seconds >= 4 * 86400:
        return f"{seconds / 86400:.0f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
