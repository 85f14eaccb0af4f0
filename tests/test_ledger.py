"""The record of what is done, whatever is left of its file; and claims, of which one is given at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryosiam_dask.core import machine
from cryosiam_dask.files import claims
from cryosiam_dask.files.atomic import part_name, replacing, sweep_parts
from cryosiam_dask.files.claims import Claims, claim_path, open_claims, process_is_gone, sweep
from cryosiam_dask.runs.ledger import VERSION, Ledger, read_entries, read_outcomes

FIRST = {"what": "ledger", "version": VERSION}
WRITTEN = [
    FIRST,
    {"what": "blocks", "key": "5d\u00e9\n\r", "block_size": 32},
    *({"what": "block", "index": [0, i, 10 * i]} for i in range(3)),
]


def write(folder: Path, stem: str = "TS_1") -> Path:
    ledger = Ledger(folder, stem)
    for entry in WRITTEN[1:]:
        ledger.append(**entry)
    return ledger.path


def test_a_start_of_a_machine_has_a_name_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise FileNotFoundError(path)

    assert machine.boot_id.__wrapped__()
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.boot_id.__wrapped__() == ""
    (tmp_path / "sysctl").write_bytes(b"#!/bin/sh\n[ $2 = kern.bootsessionuuid ] && echo 5D41-$1\n")
    (tmp_path / "sysctl").chmod(0o755)
    assert machine.boot_id.__wrapped__() == "5D41--n"


def test_what_is_appended_is_read_by_the_next(tmp_path: Path) -> None:
    assert read_entries(tmp_path, "TS_1") == ([], "")
    assert Ledger(tmp_path, "TS_1").entries == [FIRST]
    write(tmp_path)
    ledger = Ledger(tmp_path, "TS_1")
    assert (ledger.entries, ledger.fault) == (WRITTEN, "") and read_entries(tmp_path, "TS_1") == (WRITTEN, "")
    assert ledger.last("block") == WRITTEN[-1] and ledger.last("store") is None
    assert ledger.since("block", "blocks") == WRITTEN[2:] and ledger.since("block", "store") == []
    ledger.append("blocks", key="other", block_size=8)
    ledger.append("block", index=(1, 2, 3))
    assert Ledger(tmp_path, "TS_1").since("block", "blocks") == [{"what": "block", "index": [1, 2, 3]}]


def test_a_ledger_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    write(tmp_path).unlink()
    (tmp_path / ".ledger" / "TS_1.jsonl").mkdir()
    assert read_entries(tmp_path, "TS_1") == ([], "cannot be read (Is a directory)")
    assert read_outcomes(tmp_path) == {}


def test_a_disk_that_does_not_answer_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)

    def stale(_: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        with pytest.raises(OSError, match="Stale"):
            Ledger(tmp_path, "TS_1")
        assert read_entries(tmp_path, "TS_1") == ([], "cannot be read (Stale file handle)")
    assert Ledger(tmp_path, "TS_1").entries == WRITTEN and path.exists()


def test_whatever_was_cut_off_the_rest_counts_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    counts = []
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = WRITTEN[: content[:size].count(b"\n")]
        assert read_entries(tmp_path, "TS_1") == (whole, "")
        ledger = Ledger(tmp_path, "TS_1")
        assert (ledger.entries, ledger.fault) == (whole or [FIRST], "")
        ledger.append("block", index=[7])
        assert read_entries(tmp_path, "TS_1") == ([*(whole or [FIRST]), {"what": "block", "index": [7]}], "")
        counts.append(len(whole))
    assert set(counts) == set(range(len(WRITTEN) + 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_makes_up_an_entry(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    entries, fault = read_entries(tmp_path, "TS_1")
    assert fault in ("", "is damaged") and entries == WRITTEN[: len(entries)]
    assert not (fault and entries)
    ledger = Ledger(tmp_path, "TS_1")
    assert ledger.fault == fault and ledger.entries == (entries or [FIRST])
    path.unlink()


def test_damage_amid_the_file_and_other_versions_cost_everything(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"block_size":32', b'"block_size":33'))
    assert read_entries(tmp_path, "TS_1") == ([], "is damaged")
    assert Ledger(tmp_path, "TS_1").entries == [FIRST] and read_entries(tmp_path, "TS_1") == ([FIRST], "")
    other = Ledger(tmp_path, "TS_2")
    other.append("block", index=[1])
    lines = other.path.read_bytes().splitlines(keepends=True)
    other.path.write_bytes(lines[1])  # whole lines, the first of which is not that of this version
    assert read_entries(tmp_path, "TS_2") == ([], "was written by another version of this program")


def test_outcomes_replace_everything_at_once(tmp_path: Path) -> None:
    path = write(tmp_path)
    inode = path.stat().st_ino
    with path.open("rb") as before:  # who reads meanwhile reads the old file to its end
        Ledger(tmp_path, "TS_1").close(status="done", shape=(1, 2, 3), voxels=[6])
        assert before.read().count(b"\n") == len(WRITTEN)
    assert path.stat().st_ino != inode and [p.name for p in path.parent.iterdir()] == [path.name]
    assert read_entries(tmp_path, "TS_1")[0][0] == FIRST
    write(tmp_path, "TS_2")
    Ledger(tmp_path, "TS_3.4").close(status="failed", error="x")
    (path.parent / "TS_4.jsonl").write_bytes(b"\0" * 100 + b"\n" + path.read_bytes())
    assert read_outcomes(tmp_path) == {
        "TS_1": {"status": "done", "shape": [1, 2, 3], "voxels": [6]},
        "TS_3.4": {"status": "failed", "error": "x"},
    }
    assert read_outcomes(tmp_path / "none") == {}


# ------------------------------------------------------------------------------------------ what grows, and is swept


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_what_nobody_writes_any_more_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that is gone, of one that lives, and of another machine, young and old."""
    gone, other = dead_process(), "0" * 8

    def name(machine: str, process: int, kind: str = "part") -> Path:
        return tmp_path / f".TS_1.x.{machine}-{process}-0.{kind}"

    ours = part_name("TS_1.x").split(".")[-2].split("-")[0]
    kept = [name(ours, os.getpid()), name(ours, os.getppid()), name(other, gone), tmp_path / ".TS_1.x.part"]
    removed = [name(ours, gone), tmp_path / f".TS_2.{ours}-{gone}-3.part", name(other, gone + 1)]
    for path in (*kept, *removed):
        path.mkdir() if "TS_2" in path.name else path.touch()
    os.utime(removed[-1], (time.time() - 4000,) * 2)
    # A run that was killed between the two renames: the earlier folder is put back; a later one is not replaced.
    (name(ours, gone, "old") / "0").mkdir(parents=True)
    (tmp_path / "TS_3.x").mkdir()
    (tmp_path / f".TS_3.x.{ours}-{gone}-0.old" / "0").mkdir(parents=True)
    sweep_parts(tmp_path)
    assert {path for path in (*kept, *removed) if path.exists()} == set(kept)
    assert (tmp_path / "TS_1.x" / "0").is_dir() and not (tmp_path / "TS_3.x" / "0").exists()
    sweep_parts(tmp_path, own=True)
    assert not kept[0].exists() and kept[1].exists()


def test_two_writers_of_a_file_leave_each_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == [path.name]


# --------------------------------------------------------------------------------------------------------------- claims


def edit(path: Path, **changes: Any) -> None:
    """Write what another process would have."""
    path.with_suffix(".new").write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    path.with_suffix(".new").replace(path)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Clock:
    """Takes the place of the module `time` for claims: it goes as the test says, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(claims, "time", clock)
    return clock


def test_one_holds_a_claim_and_gives_it_back(tmp_path: Path, clock: Clock) -> None:
    path = claim_path(tmp_path, "TS_1")
    with open_claims(0.02, 100) as one, open_claims(0.02, 100) as other:
        assert one.take(path) and not other.take(path)
        assert one.holds(path) and not other.holds(path)
        other.release(path)  # what is not one's own
        assert one.holds(path)
        for _ in range(5):  # longer than the patience, for it counts
            content = path.read_bytes()
            until(lambda content=content: path.read_bytes() != content)
            clock.now += 99
            assert not other.take(path)
        one.release(path)
        assert other.take(path) and not one.take(path)
    assert list(path.parent.iterdir()) == []


def test_a_claim_of_a_process_that_was_killed_is_taken_at_once(tmp_path: Path) -> None:
    path = claim_path(tmp_path, "TS_1")
    code = (
        "import sys, time; from pathlib import Path; from cryosiam_dask.files.claims import Claims\n"
        "assert Claims().take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "taken\n"
    with open_claims() as claims:
        assert not process_is_gone(path.read_bytes()) and not claims.take(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert process_is_gone(path.read_bytes()) and claims.take(path)
        assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("drift", [-1e6, 0.0, 1e6])
def test_another_machines_claim_is_taken_once_it_counts_no_more(tmp_path: Path, drift: float, clock: Clock) -> None:
    path = claim_path(tmp_path, "TS_1")
    with open_claims(1000) as holder:
        holder.take(path)
        # A process number that is free here says nothing of another machine.
        edit(path, host="elsewhere", process=2**22 - 1)
        assert not process_is_gone(path.read_bytes())
        with open_claims(1000, patience=100) as watcher:
            for count in range(20):
                edit(path, count=count)
                os.utime(path, (time.time() + drift,) * 2)  # clocks need not agree
                assert not watcher.take(path)
                clock.now += 99
                assert not watcher.take(path)
            clock.now += 2
            assert watcher.take(path) and watcher.holds(path) and not holder.holds(path)
            holder.release(path)
            assert watcher.holds(path)


def test_claims_that_say_nothing_are_waited_for_and_taken(tmp_path: Path) -> None:
    path = claim_path(tmp_path, "TS_1")
    path.parent.mkdir()
    for content in (b"", b"\xff", b"[]", b'"x"', b'{"host": 3}'):
        path.write_bytes(content)
        with open_claims(1000, patience=0.05) as claims:
            assert not process_is_gone(content) and not claims.holds(path) and not claims.take(path)
            until(lambda claims=claims: claims.take(path))


def race(path: Path, rounds: int, number: int, barrier: Barrier, results: Any) -> None:
    claims = Claims(0.001, 1000)
    for i in range(rounds):
        barrier.wait()
        results[i * barrier.parties + number] = claims.take(path.with_name(f"{i}.claim"))
    barrier.wait()  # who has a claim keeps it until all have tried
    claims.close()


def test_of_many_one_gets_what_was_abandoned(tmp_path: Path) -> None:
    many, rounds, path = 6, 60, claim_path(tmp_path, "TS_1")
    context = multiprocessing.get_context("fork")
    dead = context.Process(target=time.sleep, args=(0,))
    dead.start()
    dead.join()
    with open_claims() as claims:
        assert claims.take(path)
        edit(path, process=dead.pid)
        for i in range(rounds):
            os.link(path, path.with_name(f"{i}.claim"))
        path.unlink()
    barrier, results = context.Barrier(many), context.Array("b", [-1] * many * rounds)
    processes = [context.Process(target=race, args=(path, rounds, i, barrier, results)) for i in range(many)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    won = [sum(results[i * many : (i + 1) * many]) for i in range(rounds)]
    assert won == [1] * rounds
    assert list(path.parent.iterdir()) == []


def hold(path: Path, connection: Any) -> None:
    """Take a claim, and tell at every question whether it is still kept."""
    claims = Claims(0.05, 1000)
    connection.send(claims.take(path))
    while connection.recv():
        connection.send((claims.keeps(path), claims.holds(path)))
    claims.close()


def test_a_holder_that_stood_still_leaves_its_claim_to_its_successor(tmp_path: Path) -> None:
    path, context = claim_path(tmp_path, "TS_1"), multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(path, theirs))
    process.start()
    assert ours.recv()
    ours.send(True)
    assert ours.recv() == (True, True)
    os.kill(process.pid or 0, signal.SIGSTOP)
    with open_claims(0.05, 0.5) as claims:
        until(lambda: claims.take(path))
        os.kill(process.pid or 0, signal.SIGCONT)

        def answer() -> tuple[bool, bool]:
            ours.send(True)
            found: tuple[bool, bool] = ours.recv()
            return found

        until(lambda: answer() == (False, False))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:  # ten of its counts
            assert claims.holds(path) and claims.keeps(path)
            time.sleep(0.02)
        ours.send(False)
        process.join()
        assert process.exitcode == 0 and claims.holds(path)
    assert list(path.parent.iterdir()) == []


def write_for_ever(folder: Path) -> None:
    """Count on in a claim, and replace a ledger."""
    claims, ledger = Claims(1e-5), Ledger(folder, "TS_1")
    claims.take(claim_path(folder, "TS_1"))
    while True:
        ledger.close(status="done")


def test_what_processes_left_that_were_killed_amid_a_replacement_is_removed(tmp_path: Path) -> None:
    context, found = multiprocessing.get_context("fork"), set[Path]()
    while not (any("claim." in path.name for path in found) and any(".jsonl." in path.name for path in found)):
        process = context.Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        until((tmp_path / ".ledger" / "TS_1.claim").exists)
        time.sleep(0.02)
        process.kill()
        process.join()
        found = {p for p in (tmp_path / ".ledger").iterdir() if p.name not in ("TS_1.claim", "TS_1.jsonl")}
    whole = (tmp_path / ".ledger" / "TS_1.jsonl").read_bytes()
    with open_claims() as claims:
        # A living process may be about to put such a file in its place.
        fresh = tmp_path / ".ledger" / f"TS_2.claim.{'0' * 32}"
        fresh.write_bytes(claims._content())
        for path in found:  # an hour old are those that say nothing of their process
            if not process_is_gone(path.read_bytes()):
                os.utime(path, (time.time() - 4000,) * 2)
        right = tmp_path / ".ledger" / "TS_3.claim.0123abcd"
        os.link(tmp_path / ".ledger" / "TS_1.claim", right)
        sweep(tmp_path, claims)
        assert sorted(p.name for p in fresh.parent.iterdir()) == ["TS_1.claim", "TS_1.jsonl", fresh.name]
        (fresh.parent / f".TS_2.jsonl.{'0' * 32}").touch()
        sweep(tmp_path, claims)
        assert len(list(fresh.parent.iterdir())) == 4  # it is young
    assert (tmp_path / ".ledger" / "TS_1.jsonl").read_bytes() == whole
    sweep(tmp_path / "none", claims)
