"""Runs in this process, and what they report to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.executor import SerialExecutor
from cryosiam_dask.runs.collection import run
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import plan_run
from cryosiam_dask.runs.progress import Reporter


class Listener(Reporter):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def begin(self, tomogram: str) -> None:
        self.messages.append(f"begin {tomogram}")

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        self.messages.append(name)

    def end(self, tomogram: str, message: str, **options: Any) -> None:
        self.messages.append(message)

    def inform(self, message: str) -> None:
        self.messages.append(message)

    def close(self) -> None:
        self.messages.append("close")


class Acting(SerialExecutor):
    """Does something when three blocks have been predicted and recorded, or so many calls of another step."""

    def __init__(self, act: Callable[[SerialExecutor], object], step: str = "predict", count: int = 3) -> None:
        super().__init__()
        self.act, self.step, self.count, self.done = act, step, count, 0

    def map(self, function: Any, items: Any, *, name: str, overlap: bool = False, done: Any = None) -> list[Any]:
        def count(item: Any, result: Any) -> None:
            if done:
                done(item, result)
            self.done += name == self.step
            if name == self.step and self.done == self.count:
                self.act(self)

        return super().map(function, items, name=name, overlap=overlap, done=count)


def segment(configuration: Configuration, **options: Any) -> dict[str, Outcome]:
    return {outcome.stem: outcome for outcome in run(plan_run(configuration, **options), Listener())}
