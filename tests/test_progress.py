"""What a person sees of a run: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import heapq
import io
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyte
import pytest
from rich.console import Console

from cryosiam_dask.cli import _console
from cryosiam_dask.commands.console import inform, print_table
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.progress import LogReporter, Pace, Reporter, Reporters, TerminalReporter, make_reporter

NAME = "Position_01_lamella3_TS_010_9.96Apx_denoised"


def play(reporter: Reporter) -> None:
    for tomogram in ("TS_1", "TS_2"):
        reporter.begin(tomogram)
        for name in ("lamella predict", "semantic predict", "semantic export"):
            for done in range(5):
                reporter.step(tomogram, name, done, 4)
        reporter.end(tomogram, "done in 3 s [not markup]")
    reporter.close()


def lines_of(total: int, interval: float, **options: Any) -> list[str]:
    file, pace = io.StringIO(), Pace(total, **options)
    play(Reporters(pace, LogReporter(Console(file=file, width=40), pace, interval=interval)))
    return file.getvalue().splitlines()


def test_a_log_has_plain_lines_and_at_most_three_for_a_tomogram() -> None:
    lines = lines_of(2, 0, voxels={"TS_1": {"lamella": 8.0}, "TS_2": {"lamella": 8.0}})
    assert all(re.match(r"\d\d:\d\d:\d\d TS_[12]: ", line) for line in lines)
    assert re.fullmatch(r".* TS_1: started \(1 of 2\)", lines[0])
    assert sum("done in 3 s [not markup]" in line for line in lines) == 2
    assert re.search(r"\(1 of 2 done, \d+ tomograms/h, 0:00:00 left\)$", lines[1])
    assert re.search(r"\(2 of 2 done, \d+ tomograms/h\)$", lines[-1]) and len(lines) <= 6


def test_a_log_tells_in_between_how_far_the_run_is() -> None:
    file, now = io.StringIO(), [0.0]
    pace = Pace(1, {NAME: {"lamella": 64.0, "semantic": 64.0}}, clock=lambda: now[0])
    log = Reporters(pace, LogReporter(Console(file=file, width=40), pace, interval=0))
    log.begin(NAME)
    for done in range(9):
        log.step(NAME, "lamella predict", done, 16)
        now[0] += 10
        pace.watch("lamella predict", 10)
    log.step(NAME, "lamella predict", 9, 16)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and re.search(r"lamella predict \d+/16 \(0 of 1 done, 0:0\d:\d\d left\)$", lines[1])


def test_log_is_silent_between_intervals() -> None:
    assert len(lines_of(2, 30)) == 4


def screen_of(width: int, pace: Pace, play: Callable[[Reporter], None]) -> list[str]:
    """What a terminal of so many columns shows at the end."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=24, color_system="truecolor")
    terminal = make_reporter(console, pace)
    assert isinstance(terminal, TerminalReporter)
    play(Reporters(pace, terminal))
    terminal._live.refresh()
    terminal.close()
    screen = pyte.Screen(width, 24)
    pyte.Stream(screen).feed(file.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display if line.strip()]


@pytest.mark.parametrize("width", [70, 80, 120, 200])
def test_a_terminal_shows_bar_share_and_time_left_of_names_of_any_length(width: int) -> None:
    names = [NAME.replace("010", f"{n:03d}") for n in range(120)]
    now = [0.0]
    pace = Pace(120, {name: {"lamella": 1e6, "semantic": 1e6} for name in names}, 2, clock=lambda: now[0])

    def play(reporter: Reporter) -> None:
        for name in names[:3]:
            for step in ("lamella predict", "semantic predict"):
                for done in range(9):
                    reporter.step(name, step, done, 8)
                    now[0] += 5
                    pace.watch(step, 10)
            reporter.end(name, "done", failed=name == names[2])
        reporter.step(names[10], "semantic predict", 3, 8)
        reporter.step(names[11], "lamella predict", 1, 8)
        reporter.step(names[12], "semantic remove small", 1, 2)

    *said, whole, first, second, third = screen_of(width, pace, play)
    assert said == [f"{name}: done" for name in names[:3]]
    assert whole.startswith("3 of 120 tomograms, 1 failed ") and "━" * 8 in whole
    assert re.search(r" 2 % +2:\d\d:\d\d left", whole) and ("tomograms/h" in whole) == (width >= 120)
    for line, number, step, share in (
        (first, "010", "semantic predict", 37), (second, "011", "lamella predict", 12), (third, "012", "semanti", 50),
    ):  # fmt: skip
        assert re.search(rf"[━╺╸]{{8,}} +{share} % +\d+:\d\d:\d\d left$", line), line
        name = line.split()[0]
        assert number in name and name.endswith("denoised") and step in line
        assert ("…" in name) == (width < 120) and name.startswith("Po")
    assert len({line.index("━") for line in (whole, first, second, third)}) == 1


def test_a_terminal_shows_short_names_whole_and_says_when_nothing_tells_the_time() -> None:
    def play(reporter: Reporter) -> None:
        reporter.begin("TS_1")
        reporter.step("TS_1", "predict", 0, 4)

    whole, line = screen_of(80, Pace(1, {"TS_1": {"": 1.0}}), play)
    assert whole.startswith("0 of 1 tomogram ") and line.startswith("TS_1") and " predict " in line
    assert re.search(r" 0 % +-:--:-- left$", whole) and re.search(r" 0 % +-:--:-- left$", line)


def test_terminal_keeps_the_lines_in_order() -> None:
    def play(reporter: Reporter) -> None:
        for tomogram in ("TS_1", "TS_2"):
            reporter.step(tomogram, "lamella predict", 1, 4)
        reporter.step("TS_1", "semantic predict", 3, 8)
        reporter.end("TS_3", "FAILED: TS_3.mrc: the file is cut short.", failed=True)

    *said, whole, first, second = screen_of(160, Pace(4), play)
    assert said == ["TS_3: FAILED: TS_3.mrc: the file is cut short."] and whole.startswith("1 of 4 tomograms, 1 failed")
    assert re.match(r"TS_1 +semantic predict ", first) and re.match(r"TS_2 +lamella predict ", second)


def test_what_is_left_does_not_count_as_done_nor_what_begins_again_twice() -> None:
    file, pace = io.StringIO(), Pace(2)
    log = Reporters(pace, LogReporter(Console(file=file, width=200), pace))
    for tomogram in ("TS_1", "TS_2", "TS_1"):
        log.begin(tomogram)
        log.step(tomogram, "predict", 1, 4)
    log.end("TS_1", "done in 3 s")
    log.end("TS_2", "left as it is", left=True)
    log.close()
    assert file.getvalue().count("(1 of 2)") == 1 and file.getvalue().count("(2 of 2)") == 1
    assert "TS_2: left as it is (1 of 2 done" in file.getvalue() and (pace.ended, pace.total) == (1, 2)


def simulated(sizes: dict[str, dict[str, float]], costs: dict[str, tuple[float, int]], workers: int) -> Iterator[Any]:
    """A run on `workers` that take a step's pieces, one tomogram after the other, three at a time.

    `costs` are seconds for a voxel, and pieces. Yields the time, the share that is done and what the pace says is left.
    """
    now, rng = [0.0], random.Random(0)
    pace = Pace(len(sizes), sizes, workers, clock=lambda: now[0])
    queues = {}
    for name, models in sizes.items():
        cost = {step: models.get(step.split()[0], 0 if step != "ingest" else 1.0) for step in costs}
        queues[name] = [(step, n, seconds * cost[step] / n) for step, (seconds, n) in costs.items() if cost[step]]
    given, done = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    flying: list[tuple[float, str, float]] = []
    while queues or flying:
        for name in list(queues)[:3]:
            step, pieces, seconds = queues[name][0]
            while len(flying) < workers and given[name] < pieces:
                pace.step(name, step, given[name] and done[name], pieces)
                took = seconds * rng.uniform(0.7, 1.3)
                heapq.heappush(flying, (now[0] + took, name, took))
                given[name] += 1
        now[0], name, took = heapq.heappop(flying)
        step, pieces, _ = queues[name][0]
        pace.watch(step, took)
        done[name] += 1
        pace.step(name, step, done[name], pieces)
        if done[name] == pieces:
            given[name] = done[name] = 0
            queues[name].pop(0)
            if not queues[name]:
                del queues[name]
                pace.end(name, "done")
        yield now[0], pace.share(), pace.seconds_left()


BOTH = {"ingest": (2, 8), "lamella predict": (1, 30), "lamella smooth": (0.1, 8), "semantic predict": (1, 30),
        "semantic export": (0.03, 1)}  # fmt: skip


def tomograms(count: int, size: Callable[[int], float] = lambda n: 64, models: str = "lamella semantic") -> Any:
    return {f"TS_{n}": dict.fromkeys(models.split(), size(n)) for n in range(count)}


@pytest.mark.parametrize(
    ("sizes", "costs", "workers"),
    [
        (tomograms(10), BOTH, 2),
        (tomograms(12), BOTH | {"semantic predict": (4, 30)}, 2),
        (tomograms(12), BOTH | {"lamella predict": (4, 30)}, 2),
        (tomograms(12, lambda n: [64, 400, 16][n % 3]), BOTH | {"semantic predict": (2, 30)}, 4),
        (tomograms(12, lambda n: 50 * (1 + n)), BOTH, 2),
        (tomograms(12, lambda n: 6 if n < 2 else 300), BOTH, 2),
        (tomograms(1), BOTH, 2),
        (tomograms(3, models="lamella"), BOTH, 1),
        ({**tomograms(8), **{f"X_{n}": {"semantic": 64.0} for n in range(8)}}, BOTH, 2),  # half the lamellae are there
        (tomograms(40), BOTH, 16),
    ],
    ids=["even", "slow classes", "slow lamella", "sizes", "growing", "small first", "one", "one model", "half", "many"],
)  # fmt: skip
def test_time_left_counts_everything_from_the_first_blocks_on(sizes: Any, costs: Any, workers: int) -> None:
    told = list(simulated(sizes, costs, workers))
    end = told[-1][0]
    first = next(now for now, _, left in told if left is not None)
    assert first <= 0.05 * end  # while the first tomogram is still in its first model
    for now, share, left in told:
        if 0.1 * end <= now <= 0.9 * end:
            assert left is not None and (end - now) / 1.5 <= left <= 1.5 * (end - now), (now / end, left, end - now)
            assert abs(share - now / end) < 0.2
    assert told[-1][1:] == (1.0, 0.0)


def test_tomograms_an_hour() -> None:
    now = [0.0]
    pace = Pace(40, clock=lambda: now[0])
    assert pace.rate() == "" and pace.seconds_left() is None and str(pace) == "0 of 40 done"
    for n in range(2):
        now[0] += 3600 * 3
        pace.end(f"TS_{n}", "done", failed=n == 0)
    assert pace.rate() == "0.17 tomograms/h" and pace.seconds_left() == 38 * 3 * 3600
    assert str(pace) == "2 of 40 done, 1 failed, 0.17 tomograms/h, 5 days left"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = _console(False, False)
    inform(console, ":x: [bold]")
    print_table(console, [Outcome(":warning:[b]", "skipped")])
    printed = capsys.readouterr().out
    assert ":x: [bold]" in printed and ":warning:[b]" in printed
    assert "shape (z, y, x)" in printed
    assert "found" not in printed  # a column of what nothing is known of
    print_table(console, [Outcome("a", "done"), Outcome("b", "done", particles={"ribosome": 1234, "class 2": 5})])
    assert "particles: ribosome 1,234, class 2: 5" in capsys.readouterr().out
    print_table(console, [Outcome("a", "done", (70, 90)), Outcome("b", "failed")])
    assert "shape (y, x)" in capsys.readouterr().out


def test_reporter_fits_the_console() -> None:
    assert isinstance(make_reporter(Console(file=io.StringIO()), Pace(1)), LogReporter)


def test_table_is_followed_by_warnings() -> None:
    file = io.StringIO()
    outcomes = [
        Outcome(
            "TS_1",
            "done",
            (464, 960, 928),
            12.34,
            (413_000_000, 358_720, 5),
            ("no lamella found",),
            class_names=("[b]membrane",),
            lamella_voxels=400_000_000,
            components={"[b]membrane": 1234, "class 2": 1},
            thickness={"mean": 150.04, "lowest": 3, "highest": 180.5, "unit": "nm"},
        ),
        Outcome("TS_2", "failed", error="TS_2.mrc: the file is cut short."),
        Outcome("TS_3[bin4]", "skipped"),
    ]
    print_table(Console(file=file), outcomes)
    text = file.getvalue()
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if "TS_1" in line)
    assert re.search(r"TS_1\W+done\W+464 × 960 × 928\W+12\.3\W+\[b\]membrane", lines[first])
    for line, found in zip(
        lines[first:],
        (
            "[b]membrane 358,720 (0.087 % of the volume, 0.09 % of the lamella)",
            "class 2: 5 (<0.01 % of the volume, <0.01 % of the lamella)",
            "mean thickness 150 nm (3 to 180)",
            "components: [b]membrane 1,234, class 2: 1",
        ),
        strict=False,
    ):
        assert found in line
    assert "warning, TS_1: no lamella found" in text
    assert "failed, TS_2: TS_2.mrc: the file is cut short." in text
    assert "TS_3[bin4]" in text and "skipped" in text
    file = io.StringIO()
    print_table(Console(file=file, force_terminal=True, width=80, emoji=False), outcomes)
    narrow = file.getvalue()
    assert "[b]membrane 0.09 % of the lamella" in narrow and "358,720" not in narrow
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", narrow).splitlines()[:8])) <= 80
