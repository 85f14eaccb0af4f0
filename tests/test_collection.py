"""Many tomograms in one run and in several: what fails, what is left, and who does what."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client
from rich.console import Console

from cryosiam_dask.commands.forecast import forecast
from cryosiam_dask.commands.status import states
from cryosiam_dask.commands.written import report_on
from cryosiam_dask.config import read_pipeline
from cryosiam_dask.core.executor import SerialExecutor, SharedExecutor
from cryosiam_dask.core.grid import block_size_for, make_grid
from cryosiam_dask.errors import DeviceError, LostClusterError, OutputError, Problems
from cryosiam_dask.runs import collection, ledger
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.collection import run
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.ledger import VERSION, read_entries, read_outcomes
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import RunPlan, plan_run
from cryosiam_dask.stages.predict import BlockTimes
from support import checkpoints
from support.command import start
from support.inputs import configure, write_tomogram
from support.runs import Acting, Listener

STEMS = ("TS_0", "TS_1", "TS_2", "TS_3", "TS_4")
SHAPE = (16, 32, 32)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_cluster("cpu", 2, dashboard_address="127.0.0.1:0") as client:
        yield client


@pytest.fixture(params=["serial", "dask"])
def executor(request: pytest.FixtureRequest) -> SharedExecutor:
    return SerialExecutor() if request.param == "serial" else DaskExecutor(request.getfixturevalue("client"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for seed, stem in enumerate(STEMS):
        write_tomogram(tmp_path / "data" / f"{stem}.mrc", seed, SHAPE)
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    return tmp_path


class Stopper(Listener):
    """A reporter that stops the run when three blocks of a tomogram are recorded, and holds it there until it stops."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self.stop, self.stops = stop, threading.Event()

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        super().step(tomogram, name, done, total)
        if name == "predict" and done == 3:
            self.stop.set()
            assert self.stops.wait(60)

    def inform(self, text: str) -> None:
        super().inform(text)
        if text.startswith("stopping after "):
            self.stops.set()


def plan(folder: Path, **changes: Any) -> RunPlan:
    return plan_run(configure(folder, block_size=8, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    """All outputs but the report, which tells times."""
    files = (path for path in (folder / "out").iterdir() if path.is_file() and path.name != "report.html")
    return {path.name: path.read_bytes() for path in files}


def test_tomograms_begin_in_order_and_all_are_done(folder: Path, executor: SharedExecutor) -> None:
    listener = Listener()
    outcomes = run(plan(folder), listener, executor=executor)
    assert [(outcome.stem, outcome.status) for outcome in outcomes] == [(stem, "done") for stem in STEMS]
    begun = [message for message in listener.messages if message.startswith("begin ")]
    assert begun == [f"begin {stem}" for stem in STEMS]
    found = read_outcomes(folder / "out")
    assert {stem: values["status"] for stem, values in found.items()} == dict.fromkeys(STEMS, "done")
    assert {tuple(values["shape"]) for values in found.values()} == {SHAPE}
    assert [outcome.voxels for outcome in outcomes] == [tuple(found[stem]["voxels"]) for stem in STEMS]


def test_blocks_are_told_apart_by_the_address_of_their_worker(
    folder: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[BlockTimes] = []
    monkeypatch.setattr("cryosiam_dask.runs.tomogram.write_timeline", lambda path, times, title: found.extend(times))
    one = plan_run(configure(folder, block_size=8), filename="TS_0.mrc")
    run(one, Listener(), executor=DaskExecutor(client), timeline=True)
    assert found and {block.worker for block in found} <= set(client.scheduler_info(n_workers=-1)["workers"])


def renamed(folder: Path, *names: str) -> None:
    """Give the first tomograms other names, and leave no others."""
    for stem, name in zip(STEMS, names, strict=False):
        (folder / "data" / f"{stem}.mrc").rename(folder / "data" / f"{name}.mrc")
    for stem in STEMS[len(names) :]:
        (folder / "data" / f"{stem}.mrc").unlink()


LONGEST = os.pathconf("/", "PC_NAME_MAX") - 60


def test_tomograms_with_odd_names_are_done(folder: Path, client: Client) -> None:
    names = ["a::b", ":x: [bold]%s{}", "µ #?,;'\"\\", "x" * LONGEST]
    renamed(folder, *names)
    options: dict[str, Any] = {"components": True, "output_formats": ["hdf5", "ome-zarr", "mrc"]}
    found = plan(folder, **options)
    assert not found.refused
    outcomes = {outcome.stem: outcome for outcome in run(found, Listener(), executor=DaskExecutor(client))}
    assert {stem: outcome.status for stem, outcome in outcomes.items()} == dict.fromkeys(names, "done"), outcomes
    report_on(found.configuration, list(outcomes.values()), Console(quiet=True))
    assert (folder / "out" / "report.html").exists()
    assert len(plan(folder, **options).skipped) == len(names)


def test_a_name_that_no_output_can_have_fails_its_tomogram_alone(folder: Path) -> None:
    long = "y" * (LONGEST + 1)
    renamed(folder, "tab\t", os.fsdecode(b"TS_\xb5"), long, "good")
    found = plan(folder)
    refused = dict(found.refused)
    assert set(refused) == {"tab\\t", "TS_\\udcb5", long} and [job.stem for job in found.jobs] == ["good"]
    for stem in ("tab\\t", "TS_\\udcb5"):
        assert "its name must be UTF-8 text without control characters" in str(refused[stem])
    assert f"its name must have at most {LONGEST} bytes" in str(refused[long])
    problems = forecast(found).all_problems
    assert set(problems) == {str(error) for error in refused.values()}
    outcomes = {outcome.stem: outcome for outcome in run(found, Listener())}
    assert outcomes.pop("good").status == "done"
    assert {stem: (o.status, o.error) for stem, o in outcomes.items()} == {
        stem: ("failed", str(error)) for stem, error in refused.items()
    }
    assert {state.tomogram: state.state for state in states(found.configuration, "")} == {
        "good": "done", **dict.fromkeys(refused, "failed")
    }  # fmt: skip
    report_on(found.configuration, list(outcomes.values()), Console(quiet=True))
    assert long in (folder / "out" / "report.html").read_text()
    (folder / "data" / "good.mrc").unlink()
    with pytest.raises(Problems, match="its name must have"):
        plan(folder)


def test_names_that_differ_in_case_only_need_a_disk_that_tells_them_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed(folder, "TS_a", "ts_A", "other")
    assert not plan(folder).refused
    monkeypatch.setattr("cryosiam_dask.runs.find._ignores_case", lambda folder: True)
    ((stem, error),) = plan(folder).refused
    assert stem == "ts_A" and "its outputs must not be those of TS_a.mrc" in str(error)


def test_what_befalls_all_ends_the_run_at_once(folder: Path, executor: SharedExecutor) -> None:
    planned, listener = plan(folder), Listener()
    checkpoints.write(folder / "model.ckpt", seed=36)
    outcomes = {outcome.stem: outcome for outcome in run(planned, listener, executor=executor)}
    assert list(outcomes) == list(STEMS)
    assert outcomes["TS_0"].kind == "CheckpointError" and "Start the run again" in outcomes["TS_0"].error
    assert [outcomes[stem].status for stem in STEMS[1:]].count("left") >= 2
    assert {outcome.status for outcome in outcomes.values()} == {"failed", "left"}
    assert any(
        "stopping: all other tomograms would fail with the error of the first one" in text for text in listener.messages
    )


def test_files_that_are_broken_do_not_end_the_run(folder: Path, executor: SharedExecutor) -> None:
    for stem in STEMS[:4]:
        os.truncate(folder / "data" / f"{stem}.mrc", 5000)
    outcomes = run(plan(folder), Listener(), executor=executor)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 4 + ["done"]
    assert {outcome.kind for outcome in outcomes[:4]} == {"TomogramError"}


@pytest.mark.parametrize("place", [".ledger", "TS_0.work.zarr"])
def test_a_folder_that_cannot_be_written_to_is_said(folder: Path, place: str) -> None:
    """A file where a folder is needed stands for a disk that takes nothing."""
    (folder / "out").mkdir()
    (folder / "out" / place).touch()
    outcomes = run(plan(folder), Listener())
    first = [outcome for outcome in outcomes if outcome.stem == "TS_0"]
    assert [outcome.status for outcome in first] == ["failed"] and place in first[0].error
    others = {outcome.status for outcome in outcomes if outcome.stem != "TS_0"}
    assert others <= ({"done"} if place != ".ledger" else {"failed", "left"})


def test_a_stopped_run_says_what_is_left_and_goes_on(folder: Path, client: Client) -> None:
    expected = run(plan(folder), Listener(), executor=DaskExecutor(client))
    whole = contents(folder)
    shutil.rmtree(folder / "out")
    stop = threading.Event()
    outcomes = run(plan(folder), Stopper(stop), executor=DaskExecutor(client), stop=stop)
    assert [outcome.stem for outcome in outcomes] == list(STEMS)
    assert {outcome.status for outcome in outcomes} <= {"done", "left"}
    assert [outcome.status for outcome in outcomes].count("left") >= 2
    assert not list((folder / "out" / ".ledger").glob("*.claim*"))
    listener = Listener()
    again = run(plan(folder), listener, executor=DaskExecutor(client))
    assert {o.stem: o.voxels for o in again if o.status == "done"}.items() <= {
        o.stem: o.voxels for o in expected
    }.items()
    assert any("blocks are already done" in text for text in listener.messages)
    assert contents(folder) == whole and not list((folder / "out").glob("*.zarr"))


class Counter(Listener):
    """A reporter that remembers which tomograms ended, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[tuple[str, bool]] = []

    def end(self, tomogram: str, message: str, *, left: bool = False, **options: Any) -> None:
        super().end(tomogram, message)
        self.ended.append((tomogram, left))


def test_a_tomogram_ends_once_whatever_is_made_of_it(folder: Path) -> None:
    counter = Counter()
    drained = run(plan(folder, test_files=["TS_0.mrc"]), counter, executor=Acting(SerialExecutor.drain))
    assert [outcome.status for outcome in drained] == ["left"] and counter.ended == [("TS_0", True)]
    # The mask is there, without what is to be measured in it; and the model inside it has nothing yet.
    run(pipeline(folder)[:1], Listener())
    plans = pipeline(folder, components=True)
    assert plans[0].incomplete and plans[1].jobs
    counter = Counter()
    assert {outcome.status for outcome in run(plans, counter)} == {"done"}
    assert counter.ended == [("TS_0", False)]


def interrupted(folder: Path, **changes: Any) -> Path:
    """Begin TS_0 and stop; returns its ledger, where some blocks are recorded."""
    (outcome,) = run(
        plan(folder, test_files=["TS_0.mrc"], **changes), Listener(), executor=Acting(SerialExecutor.drain)
    )
    assert outcome.status == "left"
    entries, fault = read_entries(folder / "out", "TS_0")
    assert not fault and sum(entry["what"] == "block" for entry in entries) >= 3
    return folder / "out" / ".ledger" / "TS_0.jsonl"


@pytest.mark.parametrize("fault", ["nothing", "damage", "version", "no work", "other work", "checkpoint", "setting"])
def test_a_record_that_does_not_fit_is_not_believed(folder: Path, fault: str) -> None:
    changes: dict[str, Any] = {"work_folder": str(folder / "work"), "save_internal_files": True}
    path = interrupted(folder, **changes)
    work = folder / "work" / "TS_0.work.zarr"
    if fault == "damage":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "version":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(ledger._line({"what": "ledger", "version": VERSION + 1}) + b"".join(lines[1:]))
    elif fault == "no work":
        shutil.rmtree(work)
    elif fault == "other work":  # of another run, with other results in it
        shutil.rmtree(work)
        kept = path.read_bytes()
        path.unlink()
        checkpoints.write(folder / "model.ckpt", seed=36)
        interrupted(folder, **changes)
        checkpoints.write(folder / "model.ckpt", seed=35)
        path.write_bytes(kept)
    elif fault == "checkpoint":
        checkpoints.write(folder / "model.ckpt", seed=36)
    elif fault == "setting":
        changes["network"] = {"threshold": 0.45}
    listener = Listener()
    (outcome,) = run(plan(folder, test_files=["TS_0.mrc"], **changes), listener)
    assert outcome.status == "done", outcome.error
    assert any("already done" in text for text in listener.messages) == (fault == "nothing")
    found = contents(folder)
    shutil.rmtree(folder / "out")
    run(plan(folder, test_files=["TS_0.mrc"], **changes), Listener())
    assert contents(folder) == found


@pytest.mark.parametrize("error", [DeviceError("x"), LostClusterError("x")])
def test_what_was_done_before_devices_failed_is_kept(folder: Path, error: Exception) -> None:
    def fail(executor: SerialExecutor) -> None:
        raise error

    options = {"test_files": ["TS_0.mrc"]}
    if isinstance(error, LostClusterError):  # of no tomogram: the run ends with it, and records no failure
        with pytest.raises(LostClusterError):
            run(plan(folder, **options), Listener(), executor=Acting(fail))
        assert read_outcomes(folder / "out") == {}
    else:
        (outcome,) = run(plan(folder, **options), Listener(), executor=Acting(fail))
        assert outcome.status == "failed" and outcome.kind == type(error).__name__
        assert read_outcomes(folder / "out")["TS_0"]["status"] == "failed"
    listener = Listener()
    (outcome,) = run(plan(folder, **options), listener)
    assert outcome.status == "done" and "TS_0: 3 of 8 blocks are already done" in listener.messages
    assert read_outcomes(folder / "out")["TS_0"]["status"] == "done"


def pipeline(folder: Path, **common: Any) -> list[RunPlan]:
    """The plans of a lamella model and, inside its masks, of the semantic one."""
    checkpoints.write(folder / "lamella.ckpt", replace(checkpoints.SMALL, out_channels=1), seed=35)
    values = {
        "data_folder": str(folder / "data"),
        "test_files": ["TS_0.mrc"],
        **common,
        "lamella": {
            "prediction_folder": str(folder / "lamella"),
            "trained_model": str(folder / "lamella.ckpt"),
            "parameters": {"network": {"threshold": 0.4}},
        },
        "semantic": {"prediction_folder": str(folder / "out"), "trained_model": str(folder / "model.ckpt")},
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    found = read_pipeline(folder / "pipeline.yaml")
    return [plan_run(found[name], name=name, pending_inputs={"TS_0"} if name == "semantic" else ()) for name in found]


def test_both_models_of_a_pipeline_may_have_one_work_folder(folder: Path) -> None:
    outcomes = run(pipeline(folder, work_folder=str(folder / "work")), Listener())
    assert [(outcome.stage, outcome.status, outcome.error) for outcome in outcomes] == [
        ("lamella", "done", ""),
        ("semantic", "done", ""),
    ]
    assert not list((folder / "work").rglob("TS_0*"))


def test_what_is_made_of_outputs_is_stopped_shared_and_lost_like_all_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"test_files": [f"{stem}.mrc" for stem in STEMS[:4]], "preview": False}
    run(plan(folder, **options), Listener())
    missing = plan(folder, components=True, **options)
    assert [job.stem for job in missing.incomplete] == list(STEMS[:4])

    def lose(executor: SerialExecutor) -> None:
        raise LostClusterError("x")

    with pytest.raises(LostClusterError):
        run(missing, Listener(), executor=Acting(lose, step="export", count=1))
    stop = threading.Event()
    outcomes = run(missing, Listener(), executor=Acting(lambda _: stop.set(), step="export", count=1), stop=stop)
    assert [outcome.status for outcome in outcomes] == ["skipped", "done", "left", "left"]

    monkeypatch.setattr(collection, "_CLAIM_PAUSE", 0.05)
    found: list[list[Outcome]] = []
    threads = [threading.Thread(target=lambda: found.append(run(missing, Listener()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [{outcome.status for outcome in outcomes} <= {"done", "skipped"} for outcomes in found] == [True, True]
    done = sorted(outcome.stem for outcomes in found for outcome in outcomes if outcome.status == "done")
    assert done == list(STEMS[2:4])
    assert not plan(folder, components=True, **options).incomplete


def test_two_runs_at_once_share_the_tomograms(folder: Path) -> None:
    run(plan(folder, components=True), Listener())
    arguments = ("semantic-predict", "--config-file", "config.yaml", "--device", "cpu", "--workers", 1)
    whole = contents(folder)
    shutil.rmtree(folder / "out")
    processes = [start(*arguments, folder=folder) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    assert contents(folder) == whole
    assert {values["status"] for values in read_outcomes(folder / "out").values()} == {"done"}
    assert sorted(p.name for p in (folder / "out" / ".ledger").glob("*.*")) == [f"{stem}.jsonl" for stem in STEMS]
    assert not list((folder / "out").glob("*.zarr")) and not list((folder / "out").glob(".TS*"))


class Successor(Listener):
    """A reporter that gives a tomogram back which another run had taken over."""

    def __init__(self, claim: Path) -> None:
        super().__init__()
        self.claim = claim

    def inform(self, message: str) -> None:
        super().inform(message)
        if "another run took it over" in message:
            self.claim.unlink()


@pytest.mark.parametrize("fails", [False, True])
def test_a_tomogram_that_was_taken_over_is_left_to_the_other_run(folder: Path, fails: bool) -> None:
    run(plan(folder, test_files=["TS_0.mrc", "TS_1.mrc"]), Listener())
    whole = contents(folder)
    shutil.rmtree(folder / "out")
    claim = folder / "out" / ".ledger" / "TS_0.claim"

    def take_over(executor: SerialExecutor) -> None:
        other = folder / "other"
        other.write_text(json.dumps({"token": "x", "host": "elsewhere", "boot": "", "process": 1, "count": 1}))
        other.replace(claim)
        if fails:  # as a block does that finds the other's in its place
            raise OutputError("only one run may write a block")

    listener = Successor(claim)
    outcomes = run(plan(folder, test_files=["TS_0.mrc", "TS_1.mrc"]), listener, executor=Acting(take_over))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    told = [text for text in listener.messages if text.startswith(("TS_0: another run took it over", "begin TS"))]
    assert [text.split(":")[0] for text in told] == ["begin TS_0", "TS_0", "begin TS_1", "begin TS_0"]
    assert contents(folder) == whole and any("blocks are already done" in text for text in listener.messages)


class Counting(SerialExecutor):
    """Takes itself for eight workers, and remembers how many blocks each tomogram has."""

    workers = 8

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[int] = []

    def map(self, function: Any, items: Any, *, name: str, overlap: bool = False, done: Any = None) -> list[Any]:
        if name == "predict":
            self.blocks.append(len(items))
        return super().map(function, items, name=name, overlap=overlap, done=done)


def test_only_the_last_tomograms_are_cut_into_pieces_for_all_workers(folder: Path) -> None:
    shape, names = (16, 64, 64), [f"large_{i}.mrc" for i in range(3)]
    for seed, name in enumerate(names):
        write_tomogram(folder / "data" / name, seed, shape)
    planned, executor = plan_run(configure(folder, block_size=64, test_files=names)), Counting()
    outcomes = run(planned, Listener(), executor=executor)
    sizes = [block_size_for(shape, planned.patch, 64, workers) for workers in (3, 4, 8)]
    assert executor.blocks == [len(make_grid(shape, planned.patch, size).indices()) for size in sizes]
    assert executor.blocks[0] < executor.blocks[-1]
    shutil.rmtree(folder / "out")
    assert [o.voxels for o in run(plan(folder, test_files=names), Listener())] == [o.voxels for o in outcomes]
