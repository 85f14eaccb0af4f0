"""Several hosts: network namespaces, joined by a bridge, that share the disk and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cryosiam_dask.runs.ledger import read_entries
from support import golden
from support.inputs import PIPELINE_CASE as CASE
from support.inputs import pipeline_of_case, write_yaml

BIN = Path(sys.executable).parent
HOSTS = ("scheduler", "worker1", "worker2", "client")


class Hosts:
    """Machines with an address each, as far as processes can tell.

    They live in a network namespace of their own, with the bridge, so that nothing is left behind: the namespaces go
    with the processes that hold them.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self._hold("bridge")
        self._ip("bridge", "link add br0 type bridge")
        self._ip("bridge", "link set br0 up")
        for number, name in enumerate(HOSTS, 1):
            self._hold(name)
            self._ip("bridge", f"link add v{number} type veth peer name eth0 netns {self._holders[name].pid}")
            self._ip("bridge", f"link set v{number} master br0 up")
            self._ip(name, "link set lo up")
            self._ip(name, f"addr add {self.address(name)}/24 dev eth0")
            self._ip(name, "link set eth0 up")

    @staticmethod
    def address(name: str) -> str:
        return f"10.77.0.{1 + HOSTS.index(name)}"

    def cut_off(self, name: str) -> None:
        """Take a host's cable out."""
        self._ip("bridge", f"link set v{1 + HOSTS.index(name)} down")

    def start(self, name: str, *command: object, **options: Any) -> subprocess.Popen[str]:
        enter = ["nsenter", "--target", str(self._holders[name].pid), "--net"]
        process = subprocess.Popen([*enter, *map(str, command)], text=True, **options)
        self._stack.callback(process.wait, 60)
        self._stack.callback(process.kill)
        return process

    def _hold(self, name: str) -> None:
        command = ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 1000"]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._stack.callback(holder.communicate)
        self._stack.callback(holder.kill)
        assert holder.stdout
        if (said := holder.stdout.readline().strip()) != "ready":
            pytest.skip(f"no network namespaces on this machine: {said}")
        self._holders[name] = holder

    def _ip(self, name: str, arguments: str) -> None:
        enter = ["nsenter", "--target", str(self._holders[name].pid), "--net", "ip"]
        done = subprocess.run([*enter, *arguments.split()], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {arguments}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}, of util-linux and iproute2")
    with ExitStack() as stack:
        yield Hosts(stack)


def until(condition: Any, *processes: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if condition():
            return
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError


def test_work_of_a_host_that_is_cut_off_goes_elsewhere(hosts: Hosts, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    shutil.copytree(golden.FOLDER / CASE, folder)
    values = pipeline_of_case()
    for model in ("lamella", "semantic"):
        values[model]["block_size"] = 4  # many blocks
    write_yaml(folder / "pipeline.yaml", values)
    # A host that is cut off says nothing: it is missed when what was sent to it has not arrived for so long.
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12 s"}
    quiet: dict[str, Any] = {
        "cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
    }  # fmt: skip
    file = folder / "scheduler.json"
    scheduler = hosts.start(
        "scheduler", BIN / "dask", "scheduler", "--host", hosts.address("scheduler"), "--no-dashboard",
        "--scheduler-file", file, **quiet,
    )  # fmt: skip
    until(file.exists, scheduler)
    for name in ("worker1", "worker2"):
        hosts.start(
            name, BIN / "dask", "worker", "--scheduler-file", file, "--nthreads", "4", "--no-dashboard", "--host",
            hosts.address(name), **quiet,
        )  # fmt: skip
    run = hosts.start(
        "client", BIN / "cryosiam-dask", "run", "--config-file", "pipeline.yaml", "--scheduler",
        f"tcp://{hosts.address('scheduler')}:8786", "--workers", "2", **quiet | {"stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT},
    )  # fmt: skip

    def begun() -> bool:
        entries, _ = read_entries(folder / "out" / "lamella", "TS_a_6.80Apx")
        return sum(entry["what"] == "block" for entry in entries) >= 3

    until(begun, run)
    hosts.cut_off("worker1")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "Traceback" not in output, output
    assert f"warning: tcp://{hosts.address('scheduler')}:8786 has no TLS" in output
    assert "1 tomogram on 2 cpu workers" in output
    expected = golden.expected(CASE)
    for name, key in (("lamella", "lamella_slicewise"), ("semantic", "semantic")):
        with h5py.File(folder / "out" / name / "TS_a_6.80Apx_preds.h5") as result:
            np.testing.assert_array_equal(result["labels"][:], expected[key])
