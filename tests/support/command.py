"""The program as a user starts it, and the same in this process where the process is not the point."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner

from cryosiam_dask.cli import app

COMMAND = Path(sys.executable).with_name("cryosiam-dask")


def start(*arguments: object, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """A command that runs in a folder."""
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        **options,
    )


def children(process: int) -> list[int]:
    """The worker processes of a run."""
    try:
        found = psutil.Process(process).children()
        return [child.pid for child in found if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def call(*arguments: object, folder: Path, status: int = 0, **options: Any) -> str:
    """Run a command to its end; returns what it printed."""
    process = start(*arguments, folder=folder, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, out + err
    assert "Traceback" not in out + err, out + err
    return out + err


def invoke(*arguments: object, folder: Path, status: int = 0) -> str:
    """What `call` does, in this process: nothing has to be loaded."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    with contextlib.chdir(folder):
        result = runner.invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output, result.output
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    """All outputs but the report, which tells times, and is there."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert found.pop("report.html")
    return found
