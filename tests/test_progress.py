"""What a person sees of a run: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from cryosiam_dask.cli import _console
from cryosiam_dask.pipeline import Outcome
from cryosiam_dask.progress import LogReporter, TerminalReporter, make_reporter
from cryosiam_dask.runner import print_table, say


def play(reporter: LogReporter | TerminalReporter) -> None:
    for tomogram in ("TS_1", "TS_2"):
        reporter.begin(tomogram)
        for done in range(5):
            reporter.step(tomogram, "predict", done, 4)
        reporter.step(tomogram, "export", 0, 1)
        reporter.step(tomogram, "export", 1, 1)
        reporter.end(tomogram, "done in 3 s [not markup]")
    reporter.close()


def test_log_has_plain_lines_with_time_left() -> None:
    file = io.StringIO()
    play(LogReporter(Console(file=file, width=40), total=2, interval=0))
    lines = file.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d TS_[12]: ", line) for line in lines)
    assert re.fullmatch(r".* TS_1: begins \(1 of 2\)", lines[0])
    assert re.fullmatch(r".* TS_1: predict 1/4, 0:00:00 left", lines[1])
    assert sum("predict done in 0:00:00" in line for line in lines) == 2
    assert sum("done in 3 s [not markup]" in line for line in lines) == 2
    assert re.search(r"\(1 of 2 done, 0:00:00 left\)$", lines[-8]) and lines[-1].endswith("(2 of 2 done)")


def test_log_is_silent_between_intervals() -> None:
    file = io.StringIO()
    play(LogReporter(Console(file=file), total=2))
    assert not re.search(r"predict \d/4", file.getvalue())


def test_terminal_shows_tomogram_step_and_time_left() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    reporter = make_reporter(console, 2)
    assert isinstance(reporter, TerminalReporter)
    reporter.begin("TS_1")
    reporter.step("TS_1", "predict", 0, 4)
    reporter.step("TS_1", "predict", 3, 4)
    reporter._progress.refresh()
    shown = file.getvalue()
    assert "TS_1: predict" in shown and "3/4" in shown and "left" in shown and "tomograms" in shown
    reporter.end("TS_1", "done in 3 s")
    reporter.close()
    assert "TS_1: done in 3 s" in file.getvalue() and "1/2" in file.getvalue()


def test_terminal_keeps_the_lines_in_order_and_tells_failures_and_speed() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    reporter = make_reporter(console, 4)
    assert isinstance(reporter, TerminalReporter)
    for tomogram in ("TS_1", "TS_2"):
        reporter.step(tomogram, "lamella predict", 1, 4)
    reporter.step("TS_1", "semantic predict", 3, 8)
    reporter.end("TS_3", "FAILED: TS_3.mrc: the file is cut short.", failed=True)
    reporter.end("TS_4", "done in 3 s", voxels=64_000_000)
    reporter.close()
    shown = Console(file=io.StringIO(), width=160, color_system=None)
    shown.print(reporter._progress.get_renderable())
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [re.split(r" +[━╸]", line)[0] for line in lines] == [
        "tomograms", "TS_1: semantic predict", "TS_2: lamella predict"
    ]  # fmt: skip
    assert re.search(r"2/4 0:00:0\d 0:00:0\d left 1 failed, [\d.e+]+ million voxels a second", lines[0])
    assert re.search(r"3/8 0:00:0\d -:--:-- left", lines[1]) or re.search(r"3/8 0:00:0\d 0:00:0\d left", lines[1])


def test_what_is_left_does_not_count_as_done_nor_what_begins_again_twice() -> None:
    file, terminal = io.StringIO(), Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    log, bars = LogReporter(Console(file=file, width=200), total=2), TerminalReporter(terminal, 2)
    for reporter in (log, bars):
        for tomogram in ("TS_1", "TS_2", "TS_1"):
            reporter.begin(tomogram)
            reporter.step(tomogram, "predict", 1, 4)
        reporter.end("TS_1", "done in 3 s")
        reporter.end("TS_2", "left as it is", left=True)
        reporter.close()
    assert file.getvalue().count("(1 of 2)") == 2 and file.getvalue().count("(2 of 2)") == 1
    assert "TS_2: left as it is (1 of 2 done" in file.getvalue()
    assert [(task.completed, task.total) for task in bars._progress.tasks] == [(1, 2)]


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = _console(False, False)
    say(console, ":x: [bold]")
    print_table(console, [Outcome(":warning:[b]", "skipped")])
    printed = capsys.readouterr().out
    assert ":x: [bold]" in printed and ":warning:[b]" in printed


def test_reporter_fits_the_console() -> None:
    assert isinstance(make_reporter(Console(file=io.StringIO()), 1), LogReporter)


def test_table_names_what_needs_attention() -> None:
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
    assert "attention, TS_1: no lamella found" in text
    assert "failed, TS_2: TS_2.mrc: the file is cut short." in text
    assert "TS_3[bin4]" in text and "skipped" in text
    file = io.StringIO()
    print_table(Console(file=file, force_terminal=True, width=80, emoji=False), outcomes)
    narrow = file.getvalue()
    assert "[b]membrane 0.09 % of the lamella" in narrow and "358,720" not in narrow
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", narrow).splitlines()[:8])) <= 80
