"""Runs that were killed: the same command goes on, and its outputs are those of a run that was left alone."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cryosiam_dask.core.grid import make_grid
from cryosiam_dask.files.claims import process_is_gone
from cryosiam_dask.runs.ledger import read_entries
from support import checkpoints
from support.command import call, children, contents, invoke, start
from support.inputs import write_tomogram, write_yaml

STEMS = ("TS_0", "TS_1")
SHAPE = (24, 40, 40)
PATCH, BLOCK_SIZE = (16, 16, 16), 8
BLOCKS = len(make_grid(SHAPE, PATCH, BLOCK_SIZE).indices())
RUN = ("semantic-predict", "--config-file", "config.yaml", "--device", "cpu", "--workers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tomograms of many blocks, and in ``whole`` what a run makes of them that nothing happens to."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "data").mkdir()
    for seed, stem in enumerate(STEMS):
        write_tomogram(folder / "data" / f"{stem}.mrc", seed, SHAPE)
    checkpoints.write(folder / "model.ckpt", seed=35)
    values = {
        "data_folder": "data",
        "prediction_folder": "out",
        "trained_model": "model.ckpt",
        "block_size": BLOCK_SIZE,
    }
    write_yaml(folder / "config.yaml", {**values, "components": True, "save_internal_files": True})
    invoke(*RUN, 1, folder=folder)
    (folder / "out").rename(folder / "whole")
    return folder


@pytest.fixture
def folder(whole: Path) -> Path:
    shutil.rmtree(whole / "out", ignore_errors=True)
    shutil.rmtree(whole / "work", ignore_errors=True)
    return whole


def blocks(folder: Path, stem: str) -> int:
    """How many are recorded."""
    return sum(entry["what"] == "block" for entry in read_entries(folder / "out", stem)[0])


def change(folder: Path, **values: Any) -> None:
    write_yaml(folder / "config.yaml", {**yaml.safe_load((folder / "config.yaml").read_text()), **values})


def start_until(folder: Path, stem: str, count: int) -> subprocess.Popen[str]:
    """A run in which so many blocks of a tomogram are recorded."""
    process = start(*RUN, 1, folder=folder, start_new_session=True)
    while blocks(folder, stem) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Wait until a run and its workers, which hold its output too, are gone."""
    process.communicate(timeout=120)


def progress(folder: Path) -> int:
    """Blocks recorded, of both tomograms; all of those that are finished."""
    entries = [read_entries(folder / "out", stem)[0] for stem in STEMS]
    return sum(
        BLOCKS if found and found[-1]["what"] == "outcome" else sum(entry["what"] == "block" for entry in found)
        for found in entries
    )


def tidy(folder: Path) -> None:
    """Only outputs and what became of the tomograms are left, and claims of the dead, which nobody heeds."""
    assert not list((folder / "out").glob("*.work.zarr")) and not list((folder / "out").glob(".TS*"))
    assert all(process_is_gone(path.read_bytes()) for path in (folder / "out" / ".ledger").glob("*.claim"))


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_runs_killed_at_any_moment_end_with_the_bytes_of_one_that_was_not(folder: Path, kills: int) -> None:
    """The client, with or without its workers, or one worker: several times, then a run that is let alone."""
    moments, expected = random.Random(20), contents(folder / "whole")
    killed = 0
    while killed < kills:
        for _ in range(moments.randint(1, 2)):
            what = ("group", "client", "worker")[killed % 3]
            process = start(*RUN, 2, folder=folder, start_new_session=True)
            goal = moments.randint(progress(folder), 2 * BLOCKS)
            while process.poll() is None and (progress(folder) < goal or not children(process.pid)):
                time.sleep(0.01)
            time.sleep(moments.random() / 4)
            if process.poll() is not None:
                pass  # it was faster
            elif what == "group":
                os.killpg(process.pid, signal.SIGKILL)
            elif what == "client":
                os.kill(process.pid, signal.SIGKILL)
            elif found := children(process.pid):
                os.kill(moments.choice(found), signal.SIGKILL)
            out, err = process.communicate(timeout=120)
            assert process.returncode == (0 if what == "worker" else -signal.SIGKILL) or process.returncode == 0, err
            assert "Traceback" not in out + err
            killed += 1
            if process.returncode == 0:
                break
        if process.returncode:
            call(*RUN, 1, folder=folder)
        assert contents(folder / "out") == expected
        tidy(folder)
        shutil.rmtree(folder / "out")


def test_blocks_that_are_recorded_are_not_predicted_again(folder: Path) -> None:
    configuration = (folder / "config.yaml").read_text()
    change(folder, keep_work=True)
    process = start_until(folder, "TS_1", 5)
    os.killpg(process.pid, signal.SIGKILL)
    end(process)
    chunks = {}
    for stem in STEMS:
        entries = read_entries(folder / "out", stem)[0]
        sizes = [entry["block_size"] for entry in entries if entry["what"] == "blocks"]
        if sizes:
            grid = make_grid(SHAPE, PATCH, sizes[0])
            for entry in entries:
                if entry["what"] == "block":
                    corner = [s.start // c for s, c in zip(grid.block(entry["index"]).region, grid.chunks, strict=True)]
                    path = folder / "out" / f"{stem}.work.zarr" / "labels" / "c" / "/".join(map(str, corner))
                    chunks[path] = path.stat().st_mtime_ns if path.exists() else None
    assert len(chunks) >= 5 and any(chunks.values())
    # Of one whose output was just written, nothing is resumed.
    recorded = {stem: blocks(folder, stem) for stem in STEMS if not (folder / "out" / f"{stem}_preds.h5").exists()}
    output = invoke(*RUN, 1, folder=folder)
    (folder / "config.yaml").write_text(configuration)
    for stem, count in recorded.items():
        if count:
            assert re.search(rf"{stem}: {count} of {BLOCKS} blocks are already done", output)
    assert {path: path.stat().st_mtime_ns if path.exists() else None for path in chunks} == chunks
