"""The log of a run: by the command itself, killed and not, and the file alone."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer

from cryosiam_dask import __version__
from cryosiam_dask.cli import _plain_errors
from cryosiam_dask.core import log as log_module
from cryosiam_dask.core.log import LOG, LogFile, begin_logs, latest_log, logged, traceback_file
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.workers import forwarded_warnings
from support.command import invoke, start
from support.inputs import LARGE, make_folder, write_tomogram

ENTRY = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|WARNING|ERROR) |    ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def logs(folder: Path) -> list[Path]:
    return sorted((folder / "logs").iterdir())


def test_a_run_is_logged_with_what_the_user_does_not_see(folder: Path) -> None:
    (folder / "data" / "TS_0.mrc").write_bytes(b"\0" * 3000)
    command = ("semantic-predict", "--config-file", "config.yaml", "--workers", 1)
    process = start(*command, "--quiet", "--json", folder=folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    found = {each["stem"]: each for each in json.loads(out)["tomograms"]}
    assert {stem: each["status"] for stem, each in found.items()} == {"TS_0": "failed", "TS_1": "done", "TS_2": "done"}
    assert found["TS_1"]["shape"] == [24, 20, 22] and "MRC header" in found["TS_0"]["error"]
    # Only failures and warnings, and no traceback.
    assert [line.split(":")[0] for line in err.splitlines()] == ["failed, TS_0", "warning"]
    (log,) = logs(folder / "out")
    text = log.read_text()
    assert all(map(ENTRY.match, text.splitlines()))
    assert f"cryosiam_dask {__version__}" in text and "--quiet --json" in text and '"prediction_folder": "out"' in text
    assert re.search(r"DEBUG worker tls://\S+: cpu, \d+ threads", text)
    assert re.search(r"ERROR TS_0: .*MRC header.*\n    Traceback \(most recent call last\):\n(    .*\n)+", text)
    assert "WARNING no mask_folder is set" in text and re.search(r"INFO TS_2: done in", text)
    # The next run has one of its own, and says the rest where it is asked to.
    output = invoke(*command, "--filename=TS_1", "--verbose", folder=folder)
    assert log.read_text() == text and len(logs(folder / "out")) == 2
    assert [type(handler) for handler in LOG.handlers] == [logging.NullHandler]  # both ended with the command
    assert "versions: python" in output and "TS_1: skipped" in output and output.count("report: ") == 1
    latest = next(path for path in logs(folder / "out") if path != log)
    assert latest_log(folder / "out") == latest
    assert f"log of the latest run: out/logs/{latest.name}" in invoke(
        "status", "--config-file=config.yaml", folder=folder
    )
    assert f'href="logs/{latest.name}"' in (folder / "out" / "report.html").read_text()


def test_a_run_that_is_killed_leaves_its_log(folder: Path) -> None:
    (folder / "data" / "TS_2.mrc").unlink()
    write_tomogram(folder / "data" / "TS_2.mrc", 1, LARGE)
    command = ("semantic-predict", "--config-file", "config.yaml", "--workers", 1)
    process = start(*command, folder=folder, start_new_session=True)
    ledger = folder / "out" / ".ledger" / "TS_2.jsonl"
    while not (ledger.exists() and b'"what":"block"' in ledger.read_bytes()):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (log,) = logs(folder / "out")
    text = log.read_text()
    assert text.endswith("\n") and all(map(ENTRY.match, text.splitlines()))
    assert "versions: python" in text and "INFO TS_2: started" in text and "TS_2: done" not in text


def _shows_warnings() -> str:
    return warnings.showwarning.__module__


def test_warnings_of_workers_arrive(tmp_path: Path) -> None:
    @logged
    def work() -> None:
        begin_logs([tmp_path], "test")
        with open_cluster("cpu", 1, dashboard_address=":0") as client:
            before = client.run(_shows_warnings)
            with forwarded_warnings(client):
                assert client.run(_shows_warnings) != before
                client.submit(warnings.warn, "a chunk looks odd", RuntimeWarning).result()
                deadline = time.monotonic() + 60
                while "a chunk looks odd" not in logs(tmp_path)[0].read_text() and time.monotonic() < deadline:
                    time.sleep(0.05)
            assert client.run(_shows_warnings) == before  # workers that stay are as they were

    work()
    assert re.search(r"WARNING .*RuntimeWarning: a chunk looks odd", logs(tmp_path)[0].read_text())


def test_logs_end_with_what_they_are_of(tmp_path: Path) -> None:
    @logged
    def work(error: Exception | None = None) -> None:
        begin_logs([tmp_path, tmp_path], "test")
        LOG.debug("begun")
        if error:
            raise error

    work()
    LOG.error("of nobody's log")
    with pytest.raises(TomogramError, match="rule") as foreseen:
        work(TomogramError("rule"))
    with pytest.raises(RuntimeError, match="nobody") as unforeseen:
        work(RuntimeError("nobody thought of this"))
    texts = [path.read_text() for path in logs(tmp_path)]  # three of the same second, and none was overwritten
    assert len(texts) == 3 and all("begun" in text and "nobody's" not in text for text in texts)
    assert sum("Traceback" in text for text in texts) == 2
    assert traceback_file(foreseen.value) is None
    path = traceback_file(unforeseen.value)
    assert path is not None and "RuntimeError: nobody thought of this" in Path(path).read_text()


def test_a_fault_of_the_program_has_its_traceback_in_the_log_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @logged
    def work() -> None:
        begin_logs([tmp_path], "test")
        raise ZeroDivisionError("a fault")

    with pytest.raises(typer.Exit) as left, _plain_errors():
        work()
    assert left.value.exit_code == 70
    said = capsys.readouterr().err
    assert (
        "unexpected ZeroDivisionError: a fault" in said and str(logs(tmp_path)[0]) in said and "Traceback" not in said
    )


def records(path: Path, **options: Any) -> tuple[logging.Logger, LogFile]:
    handler = LogFile(path, **options)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger, handler


def test_a_log_is_bounded_and_keeps_room_for_errors(tmp_path: Path) -> None:
    logger, handler = records(tmp_path / "x.log", largest=20_000, reserved=8_000)
    for number in range(500):
        logger.info("step %d of many", number)
    logger.error("an error")
    for number in range(500):
        logger.error("error %d of many", number)
    handler.close()
    text = (tmp_path / "x.log").read_text()
    assert 19_000 < len(text) < 20_200
    assert text.count("this log is full") == 1 and text.index("is full") < text.index("an error\n")
    assert "step 0 of many" in text and "step 499 of many" not in text and "error 499" not in text
    with pytest.raises(FileExistsError):
        LogFile(tmp_path / "x.log")


def test_entries_stay_entries(tmp_path: Path) -> None:
    """Names come from strangers: no terminal obeys them, no line is forged, none is endless."""
    logger, handler = records(tmp_path / "x.log")
    logger.warning("TS_\x1b[2J\r\udcff\n2026-11-23T00:00:00+0000 INFO forged %s", "n" * 10**6)
    handler.close()
    raw = (tmp_path / "x.log").read_bytes()
    assert len(raw) < 70_000 and rb"TS_\x1b[2J\x0d\udcff" in raw
    assert all(map(ENTRY.match, raw.decode().splitlines())) and raw.decode().splitlines()[1].startswith("    2026")


def test_a_disk_without_room_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, handler = records(tmp_path / "x.log")
    handler._file.close()  # every write fails
    logger.error("not written")
    (tmp_path / "logs").write_text("no folder")
    assert begin_logs([tmp_path], "test") == []

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log_module, "LogFile", full)
    (tmp_path / "other").mkdir()
    assert begin_logs([tmp_path / "other"], "test") == []
