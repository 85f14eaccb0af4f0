"""Disks that fail for a moment cost nothing, and those that fail for good no predicted block."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
from rich.console import Console

from cryosiam_dask.commands.written import report_on
from cryosiam_dask.config import read_configuration
from cryosiam_dask.core import executor
from cryosiam_dask.core.executor import SerialExecutor, with_retries
from cryosiam_dask.core.grid import make_grid
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import OutputError, Problems, StorageError, TomogramError, is_transient
from cryosiam_dask.files.claims import claim_path
from cryosiam_dask.runs import dask_executor, ledger, outputs, tomogram, workspace
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.collection import run
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.runs.ledger import Ledger, read_entries, read_outcomes
from cryosiam_dask.runs.plan import plan_run
from cryosiam_dask.runs.written import list_centers
from cryosiam_dask.stages import ingest
from cryosiam_dask.stages.export import convert_to_ome_zarr
from support import checkpoints
from support.inputs import configure, write_tomogram, write_yaml
from support.runs import Acting, Listener, segment

STEM, SHAPE = "TS_1", (24, 32, 32)
BLOCKS = len(make_grid(SHAPE, (16, 16, 16), 8).indices())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (executor, dask_executor, tomogram):
        monkeypatch.setattr(module, "RETRY_PAUSES", (0.01, 0.02, 0.03))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    write_tomogram(tmp_path / "data" / f"{STEM}.mrc", 1, SHAPE)
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    return tmp_path


def stale(*_: object, **__: object) -> Any:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/disk/file")


def failing(function: Callable[..., Any], calls: range, error: int = errno.ESTALE) -> Callable[..., Any]:
    """A function some of whose calls, counted from 1, meet an error of the disk."""
    count = 0

    def sometimes(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise OSError(error, os.strerror(error), "/disk/file")
        return function(*arguments, **options)

    return sometimes


def predicted(folder: Path) -> int:
    return sum(entry["what"] == "block" for entry in read_entries(folder / "out", STEM)[0])


def labels(folder: Path) -> bytes:
    with h5py.File(folder / "out" / f"{STEM}_preds.h5") as file:
        return bytes(file["labels"][:])


class Counting(SerialExecutor):
    """Counts the blocks that are predicted."""

    blocks = 0

    def map(self, function: Any, items: Any, *, name: str, **options: Any) -> list[Any]:
        self.blocks += len(items) if name == "predict" else 0
        return super().map(function, items, name=name, **options)


# -------------------------------------------------------------------------------- which errors pass


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENETDOWN", "EBUSY", "ENOTCONN"])
def test_what_passes_is_known_wherever_it_is_told(name: str) -> None:
    number = getattr(errno, name)
    raised = OSError(number, os.strerror(number), "x")
    assert is_transient(raised)
    assert is_transient(
        OSError(f"Can't synchronously read data (file read failed: time = x, errno = {number}, error ...)")
    )
    try:
        try:
            raise raised
        except OSError:
            raise TomogramError("must be readable", place="x") from None
    except TomogramError as error:
        assert is_transient(error) and is_transient(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        OSError("Unable to open file (file signature not found)"),
        ValueError("errno = 5"),
        OutputError("x"),
        None,
    ],
)
def test_what_stays_is_not_tried_again(error: Exception | None) -> None:
    assert not is_transient(error)
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        if error:
            raise error

    if error:
        with pytest.raises(type(error)):
            with_retries(work)
    assert calls == (error is not None)


def test_a_disk_that_fails_for_good_is_said_with_a_remedy() -> None:
    with pytest.raises(StorageError, match=r"^/disk/file: the disk must respond; found Stale file handle, 4 times in"):
        with_retries(stale)
    with pytest.raises(StorageError) as raised:
        SerialExecutor().map(stale, [1], name="x")
    assert "resumes after the finished blocks" in str(raised.value) and not is_transient(raised.value)


# -------------------------------------------------------------------------------- the workers


def fail_at_first_worker(marks: Path, number: int) -> int:
    """The process that is asked first for a number never gets it done."""
    mark = marks / str(number)
    try:
        with mark.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        pass
    if mark.read_text() == str(os.getpid()):
        stale()
    return os.getpid()


def fail_so_often(marks: Path, times: int, number: int) -> int:
    count = len(list(marks.glob(f"{number}.*")))
    if count < times:
        (marks / f"{number}.{count}").touch()
        stale()
    return number


def test_a_block_whose_disk_fails_is_done_by_another_worker(tmp_path: Path) -> None:
    with open_cluster("cpu", 2, dashboard_address="127.0.0.1:0") as client:
        workers = DaskExecutor(client)
        found = workers.map(partial(fail_at_first_worker, tmp_path), range(6), name="block")
        assert all(str(pid) != (tmp_path / str(number)).read_text() for number, pid in enumerate(found))
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        assert workers.map(partial(fail_so_often, tmp_path / "a", 3), [1, 2], name="block") == [1, 2]
        with pytest.raises(StorageError, match="4 times in"):
            workers.map(partial(fail_so_often, tmp_path / "b", 99), [1], name="block")
        assert len(list((tmp_path / "b").iterdir())) == 4
        workers.drain()


# -------------------------------------------------------------------------------- one tomogram


@pytest.mark.parametrize("call", [1, 3, 40])
@pytest.mark.parametrize(
    ("module", "name"),
    [(workspace, "Ledger"), (ledger.Ledger, "append"), (tomogram, "make_grid"), (tomogram, "write_hdf5")],
)
def test_one_failure_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int
) -> None:
    """Of the ledger, of what the client does between the blocks, of an output."""
    monkeypatch.setattr(module, name, failing(getattr(module, name), range(call, call + 1)))
    counting = Counting()
    (outcome,) = run(plan_run(configure(folder, block_size=8)), Listener(), executor=counting)
    assert outcome.status == "done", outcome.error
    assert read_outcomes(folder / "out")[STEM]["status"] == "done" and not list((folder / "out").glob("*.zarr"))
    # Begun again from the blocks that are recorded: at most the one is predicted twice that could not be.
    assert counting.blocks <= 2 * BLOCKS and labels(folder)


def test_a_read_of_the_tomogram_that_fails_once_costs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_copy_row", failing(ingest._copy_row, range(1, 2), errno.EIO))
    assert segment(configure(folder))[STEM].status == "done"


def ail(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, name: str, times: int = 1) -> None:
    """Let the first calls of a function of the system fail for a path with this in it; ``$`` is its end."""
    working, left = getattr(module, function), [times]

    def ailing(path: Any, *arguments: Any, **options: Any) -> Any:
        if name in f"{path}$" and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return working(path, *arguments, **options)

    monkeypatch.setattr(module, function, ailing)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (io, "open", "config.yaml"),
        (os, "stat", f"{STEM}.mrc"),
        (io, "open", "model.ckpt"),
        (os, "mkdir", "out"),
        (os, "replace", "_preview.png."),
        (os, "unlink", ".claim$"),
        (os, "stat", "out/components.csv"),
        (os, "scandir", "out/.ledger"),
    ],
)
def test_wherever_a_disk_fails_once_a_run_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, name: str
) -> None:
    configure(folder)
    ail(monkeypatch, module, function, name)
    plan = plan_run(read_configuration(folder / "config.yaml"))
    outcomes = run(plan, Listener())
    console = Console(file=io.StringIO(), width=500)
    report_on(plan.configuration, outcomes, console)
    assert [(outcome.stem, outcome.status, outcome.warnings) for outcome in outcomes] == [(STEM, "done", ())]
    assert (folder / "out" / f"{STEM}_preview.png").exists()
    assert (folder / "out" / "report.html").exists(), console.file.getvalue()  # type: ignore[attr-defined]


def test_a_tomogram_whose_disk_fails_for_good_is_not_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tomogram(folder / "data" / "TS_2.mrc", 2, SHAPE)
    configuration = configure(folder)
    ail(monkeypatch, os, "stat", f"{STEM}.mrc", times=9999)
    ail(monkeypatch, io, "open", f"{STEM}.mrc", times=9999)
    failed, done = run(plan_run(configuration), Listener())
    assert (failed.stem, failed.kind, done.status) == (STEM, "TomogramError", "done")
    assert "found Stale file handle. Check the disk, then" in failed.error


def test_a_disk_that_fails_once_leaves_no_number_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prediction of CryoSiam itself, whose tomogram alone tells the voxel size."""
    configuration = configure(folder)
    (folder / "out").mkdir()
    with h5py.File(folder / "out" / f"{STEM}_preds.h5", "w") as file:
        file["labels"] = np.pad(np.ones((4, 4, 4), np.uint8), [(0, n - 4) for n in SHAPE])
    predictions = find_predictions(configuration)
    list_centers(configuration, predictions, Listener())
    ail(monkeypatch, io, "open", f"{STEM}.mrc")
    (outcome,) = list_centers(configuration, predictions, Listener())
    assert (outcome.status, outcome.warnings) == ("done", ())
    # Nor does it take a list out of the collection.
    ail(monkeypatch, outputs, "read_attributes", f"{STEM}_preds.h5")
    outputs.collect(configuration, [])
    assert len(pandas.read_csv(folder / "out" / "class1_centers.csv")) == 1


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), RuntimeError("of nobody's doing")])
@pytest.mark.parametrize("at", ["write_hdf5", "without_small"])
def test_predicted_blocks_outlive_whatever_comes_after_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    configuration = configure(folder, {"postprocessing_sizes": [-1, 5]}, block_size=8)
    listener = Listener()
    with monkeypatch.context() as patch:
        patch.setattr(tomogram, at, fail)
        (outcome,) = run(plan_run(configuration), listener)
    assert outcome.status == "failed" and str(error.args[-1]) in outcome.error
    assert predicted(folder) == BLOCKS and any(
        f"its {BLOCKS} predicted blocks are kept in" in m for m in listener.messages
    )
    counting = Counting()
    (outcome,) = run(plan_run(configuration), Listener(), executor=counting)
    assert (outcome.status, counting.blocks) == ("done", 0)
    assert not list((folder / "out").glob("*.zarr"))


def test_a_failure_amid_the_blocks_costs_those_in_flight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryosiam_dask.stages import predict

    with monkeypatch.context() as patch:
        patch.setattr(predict, "_force_to_disk", failing(predict._force_to_disk, range(5, 9999)))
        assert segment(configure(folder, block_size=8))[STEM].kind == "StorageError"
    assert predicted(folder) == 4
    counting = Counting()
    (outcome,) = run(plan_run(configure(folder, block_size=8)), Listener(), executor=counting)
    assert (outcome.status, counting.blocks) == ("done", BLOCKS - 4)


def test_only_what_is_damaged_of_a_work_store_is_made_again(folder: Path) -> None:
    configuration = configure(folder, block_size=8)
    segment(configuration)
    whole = labels(folder)
    (folder / "out" / f"{STEM}_preds.h5").unlink()

    def damage(_: SerialExecutor) -> None:
        chunks = sorted(path for path in (folder / "out").glob("*.work.zarr/labels/c/*/*/*"))
        chunks[0].write_bytes(b"\1\2\3")

    (outcome,) = run(plan_run(configuration), Listener(), executor=Acting(damage, count=BLOCKS))
    assert outcome.status == "failed" and outcome.details
    left = predicted(folder)
    assert 0 < len(Ledger(folder / "out", STEM).since("block", "blocks")) < BLOCKS < left
    counting = Counting()
    (outcome,) = run(plan_run(configuration), Listener(), executor=counting)
    assert outcome.status == "done" and 0 < counting.blocks < BLOCKS and labels(folder) == whole


def test_a_tomogram_that_was_copied_or_touched_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks as well as its output; one that was changed is another one."""
    configuration, source = configure(folder, block_size=8), folder / "data" / f"{STEM}.mrc"

    def touch() -> None:
        other = source.with_suffix(".new")
        other.write_bytes(source.read_bytes())
        other.replace(source)

    with monkeypatch.context() as patch:
        patch.setattr(tomogram, "write_hdf5", stale)
        run(plan_run(configuration), Listener())
    touch()
    counting = Counting()
    (outcome,) = run(plan_run(configuration), Listener(), executor=counting)
    assert (outcome.status, counting.blocks) == ("done", 0)
    for _ in range(2):
        touch()
        assert [job.stem for job in plan_run(configuration).skipped] == [STEM]
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    with pytest.raises(Problems, match="made from another input"):
        plan_run(configuration)
    (outcome,) = run(plan_run(configuration, overwrite=True), Listener(), executor=counting)
    assert (outcome.status, counting.blocks) == ("done", BLOCKS)
    touch()
    assert [job.stem for job in plan_run(configuration).skipped] == [STEM]


def test_an_error_of_what_handles_errors_is_a_failure_that_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]

    def broken(*_: object, **__: object) -> None:
        raise ValueError("the handler's own")

    monkeypatch.setattr(tomogram, "_run_model", stale_for_good)
    monkeypatch.setattr(tomogram, "record", broken)
    LOG.addHandler(handler)
    try:
        (outcome,) = run(plan_run(configure(folder)), Listener())
    finally:
        LOG.removeHandler(handler)
    assert outcome.status == "failed" and "unexpected ValueError: the handler's own" in outcome.error
    assert any("the handler's own" in message for message in logged)


def stale_for_good(*_: object, **__: object) -> None:
    raise OutputError("must be writable", place="x")


# -------------------------------------------------------------------------------- other disks


def test_file_systems_without_hard_links_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (outcome,) = run(plan_run(configure(folder, output_formats=["hdf5", "ome-zarr"])), Listener())
    assert outcome.status == "done", outcome.error
    ingest.convert(folder / "data" / f"{STEM}.mrc", folder / "x.zarr")
    convert_to_ome_zarr(folder / "data" / f"{STEM}.mrc", folder / "x.ome.zarr")


# -------------------------------------------------------------------------------- a run that stops

#: The command, with claims that are given up after two seconds.
SHORT = (
    "from cryosiam_dask import cli\n"
    "from cryosiam_dask.files import claims\n"
    "if __name__ == '__main__':\n    claims.BEAT, claims.PATIENCE = 0.2, 2.0\n    cli.main()"
)


def test_a_run_that_stands_still_is_taken_over_and_leaves_the_tomogram_when_it_wakes(folder: Path) -> None:
    """Two real runs: the first one with its workers is stopped amid the blocks, and goes on when the other is done."""
    configuration = {"data_folder": "data", "prediction_folder": "out", "trained_model": "model.ckpt", "block_size": 8}
    write_yaml(folder / "config.yaml", configuration)
    arguments = ["semantic-predict", "--config-file", "config.yaml", "--device", "cpu", "--workers", "1"]
    command = [sys.executable, "-c", SHORT, *arguments, "--dashboard-address", "127.0.0.1:0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
    first = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        while predicted(folder) < 3:
            assert first.poll() is None, first.communicate()
            time.sleep(0.005)
        os.killpg(first.pid, signal.SIGSTOP)
        before = predicted(folder)
        assert before < BLOCKS
        second = subprocess.run(command, timeout=120, check=False, **{**pipes, "stdout": subprocess.PIPE})
        assert second.returncode == 0, second.stdout
        assert f"{before} of {BLOCKS} blocks are already done" in second.stdout
        written = (folder / "out" / f"{STEM}_preds.h5").stat()
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "another run took it over" in said and "Traceback" not in said, said
    assert (folder / "out" / f"{STEM}_preds.h5").stat() == written
    assert read_outcomes(folder / "out")[STEM]["status"] == "done" and not claim_path(folder / "out", STEM).exists()
    assert not list((folder / "out").glob("*.zarr"))
