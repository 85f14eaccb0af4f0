"""Work on real worker processes: the same results, whatever happens to a worker."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from _thread import interrupt_main
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import dask
import psutil
import pytest
from dask.utils import key_split
from distributed import Client, get_worker
from distributed.comm import connect
from tornado.web import RequestHandler

import cryosiam_dask
from cryosiam_dask.core.executor import Interrupted
from cryosiam_dask.errors import (
    ClusterError,
    CryosiamDaskError,
    DeviceError,
    LostClusterError,
    LostDeviceError,
    TomogramError,
)
from cryosiam_dask.runs import cluster, dask_executor, workers
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.workers import (
    Setup,
    ask,
    describe_devices,
    forwarded_warnings,
    memory_of_workers,
    register_in_workers,
)
from support.workers import wait_for_workers


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_cluster("cpu", 2, dashboard_address="127.0.0.1:0") as client:
        yield client


def square(number: int) -> int:
    return number * number


def process(_: int) -> int:
    return os.getpid()


def refuse(number: int) -> int:
    if number == 3:
        raise TomogramError("must be whole", place="x.mrc", value="half of it", remedy="Copy it again")
    return number


def die_once(mark: Path, number: int) -> int:
    """Kill this worker process at the first call with 5."""
    if number == 5:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return number
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def loaded() -> set[str]:
    return {name for name in sys.modules if name.startswith("cryosiam_dask.")}


def test_workers_have_loaded_what_tasks_need_before_the_first(client: Client) -> None:
    """Threads of a worker that import the same modules at the same time see each other's half made."""
    DaskExecutor(client)
    for found in client.run(loaded).values():
        rooms = [Path(cryosiam_dask.__file__).parent / room for room in ("files", "stages")]
        names = {f"cryosiam_dask.{room.name}.{path.stem}" for room in rooms for path in room.glob("[a-z]*.py")}
        assert names <= found


class Fatal:
    """A result that kills its worker process when it is first fetched, after the call itself has ended well."""

    def __init__(self, mark: Path, number: int) -> None:
        self.mark, self.number = mark, number

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return int, (self.number,)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def fatal(mark: Path, number: int) -> int | Fatal:
    return Fatal(mark, number) if number == 5 else number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def environment(name: str, _: int) -> str | None:
    return os.environ.get(name)


def mark_process(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def test_results_come_in_the_order_of_the_items(client: Client) -> None:
    told: list[tuple[str, int, int]] = []
    executor = DaskExecutor(client, lambda *progress: told.append(progress))
    assert executor.workers == 2
    assert executor.map(square, range(100), name="square") == [n * n for n in range(100)]
    assert told[0] == ("square", 0, 100) and told[-1] == ("square", 100, 100) and len(told) == 101
    assert executor.map(square, [], name="nothing") == []


def test_every_worker_takes_part_and_listens_to_this_machine_alone(client: Client) -> None:
    assert len(set(DaskExecutor(client).map(process, range(40), name="process"))) == 2
    addresses = [client.scheduler.address, *client.scheduler_info(n_workers=-1)["workers"], client.dashboard_link]
    assert all("127.0.0.1" in address for address in addresses)


STRANGER = """
import asyncio, distributed.comm.tcp, os, sys
from distributed.comm import connect, listen
from distributed.security import Security
from distributed.security import Security
keys = Security.temporary().get_connection_args("client")
connections = [(a, k) for address in sys.argv[1:] for a, k in (
    (address, {}), (address, keys), (address.replace("tls://", "tcp://"), {}))]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
async def enter():
    tries = [connect(address, timeout=2, **arguments) for address, arguments in connections]
    print(len(tries), *[repr(each) for each in await asyncio.gather(*tries, return_exceptions=True)
                        if not isinstance(each, Exception)])
asyncio.run(enter())
"""


def test_nobody_else_on_this_machine_gets_in(client: Client) -> None:
    """Neither without keys nor with others; as another user, where this one may become one."""
    wait_for_workers(client, 2)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    servers = [client.scheduler.address, *workers, *(worker["nanny"] for worker in workers.values())]
    assert len(servers) == 5
    command = [sys.executable, "-c", STRANGER, *servers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "15\n", done
    # As the owner, with the keys of the cluster, each of them is entered.
    keys = client.security.get_connection_args("client")
    for address in servers:
        client.sync(connect, address, timeout=5, **keys).abort()


def changing(dask_scheduler: Any) -> list[str]:
    """Handlers of the scheduler's web server that do more than show."""
    applications = [dask_scheduler.http_application, *dask_scheduler.http_application.applications]
    routers = [router for each in applications for router in (each.default_router, each.wildcard_router)]
    found, methods = [], [name.lower() for name in RequestHandler.SUPPORTED_METHODS if name not in ("GET", "HEAD")]
    while routers:
        for rule in routers.pop().rules:
            if isinstance(rule.target, type):
                own = [name for name in methods if getattr(rule.target, name) is not getattr(RequestHandler, name)]
                found += [rule.target.__name__] * bool(own)
            else:
                routers.append(rule.target)
    return found


def test_the_dashboard_changes_nothing_whatever_is_configured() -> None:
    routes = dask.config.get("distributed.scheduler.http.routes")
    with (
        dask.config.set({"distributed.scheduler.http.routes": [*routes, "distributed.http.scheduler.api"]}),
        open_cluster("cpu", 0, dashboard_address="127.0.0.1:0") as client,
    ):
        # Bokeh's tells browsers what they may ask for: GET.
        assert set(client.run_on_scheduler(changing)) == {"AutoloadJsHandler"}
        for path in ("api/v1/retire_workers", "proxy/1/127.0.0.1/status"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(client.dashboard_link.replace("status", path), b"{}", timeout=30)


def test_the_tomogram_that_was_begun_first_comes_first(client: Client, tmp_path: Path) -> None:
    executor, path, go = DaskExecutor(client), tmp_path / "calls", tmp_path / "go"
    shares = {name: executor.share(name, order, lambda *_: None) for name, order in (("a", 0), ("b", 1), ("c", 2))}
    threads = []

    def begin(name: str, function: Any, items: Sequence[Any]) -> None:
        threads.append(threading.Thread(target=shares[name].map, args=(function, items), kwargs={"name": "note"}))
        threads[-1].start()
        waiting = {"c": 1, "b": 2, "a": 3}[name]
        while len(executor._groups) < waiting:
            time.sleep(0.01)

    begin("c", partial(wait_for, go), range(8))  # takes all places, for as long as others come
    while len(executor._in_flight) < 4:
        time.sleep(0.01)
    begin("b", partial(note, path), [("b", i) for i in range(12)])
    begin("a", partial(note, path), [("a", i) for i in range(12)])
    go.touch()
    for thread in threads:
        thread.join()
    order = path.read_text().split()
    assert order.count("a") == order.count("b") == 12
    assert order[:8].count("a") == 8 and "b" in order[-3:]


def test_what_needs_no_device_runs_beside_calls_that_fill_the_devices(client: Client, tmp_path: Path) -> None:
    executor, path, results = DaskExecutor(client), tmp_path / "mark", []
    calls = partial(wait_for, path)
    device = threading.Thread(target=lambda: results.extend(executor.map(calls, range(9), name="x", overlap=True)))
    device.start()
    executor.share("x", 5, lambda *_: None).map(touch, [path], name="host")
    device.join()
    assert results == [True] * 9


def is_first(dask_worker: Any) -> bool:
    """Whether a worker, or one that replaces it, is the first one of the cluster."""
    return bool(dask_worker.name == 0)


def kinds(client: Client) -> dict[int, bool]:
    """Whether each worker process is the first one."""
    return dict(client.run(lambda dask_worker: (os.getpid(), dask_worker.name == 0)).values())


def test_blocks_go_to_the_workers_with_a_device_and_the_rest_to_the_others(client: Client, tmp_path: Path) -> None:
    executor = DaskExecutor(client, has_device=is_first)
    assert executor.workers == 1
    for name, overlap in (("label", False), ("predict", True)):
        used = set(executor.map(process, range(40), name=name, overlap=overlap))
        assert {kinds(client)[pid] for pid in used} == {overlap}
        # A worker that dies is replaced by one of its kind.
        died = partial(die_once, tmp_path / f"died {name}")
        assert executor.map(died, range(20), name=name, overlap=overlap) == list(range(20))


def answer_or_hang(folder: Path, dask_worker: Any) -> bool:
    """Whether a worker is the first one; another one answers only when there is a file ``done`` (or after long)."""
    if dask_worker.name == 0:
        return True
    for _ in range(1000):
        if (folder / "done").exists():
            return False
        time.sleep(0.01)
    (folder / "given up").touch()
    return False


def test_a_new_worker_that_does_not_answer_keeps_no_other_one_waiting(client: Client, tmp_path: Path) -> None:
    wait_for_workers(client, 2)
    executor = DaskExecutor(client, has_device=is_first)
    executor.has_device = partial(answer_or_hang, tmp_path)
    executor._ask_new(set())  # all workers are new again
    try:
        assert executor.map(square, range(4), name="predict", overlap=True) == [0, 1, 4, 9]
        assert not (tmp_path / "given up").exists()
    finally:
        (tmp_path / "done").touch()
    assert executor.map(square, range(4), name="label") == [0, 1, 4, 9]


def test_a_cluster_whose_devices_do_not_come_back_ends_the_run(client: Client) -> None:
    executor = DaskExecutor(client, has_device=is_first, hang_seconds=5)
    assert executor.map(square, [3], name="predict", overlap=True) == [9]
    executor.has_device = partial(bool, 0)
    executor._ask_new(set())  # as if all workers were new
    with pytest.raises(DeviceError, match=r"^a worker must have a GPU until the run ends; found none for \d+ s"):
        executor.map(square, [3], name="predict", overlap=True)


def test_a_cluster_of_this_run_whose_workers_do_not_come_back_ends_the_run(client: Client) -> None:
    executor = DaskExecutor(client, hang_seconds=1)
    executor._knows = lambda address: False  # type: ignore[method-assign]  # as if there were none
    with pytest.raises(
        LostClusterError, match=r"^this machine: a worker must keep running until the run ends; found none for "
    ):
        executor.map(square, [3], name="predict", overlap=True)


def test_a_broken_device_is_not_started_again_at_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_workers(client, 2)
    ended: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for name in ("_retire", "_restart"):
        monkeypatch.setattr(dask_executor, name, lambda _, address, name=name: ended.put((name, address)))
    executor = DaskExecutor(client, has_device=partial(bool, 1))
    broken, works = executor._addresses
    group = dask_executor._TaskGroup(square, [1], "lose", "", 0, True, lambda *_: None, None)
    executor._groups.append(group)

    def lose() -> None:
        future = client.submit(square, 1)
        task = dask_executor._Task(group, 0, broken, 0.0)
        executor._handle(dask_executor._Finished(future, error=LostDeviceError("the device must work")), task)

    executor._have_computed.add(works)
    lose()
    assert group.error is None and group.pending and ended.get(timeout=60) == ("_retire", broken)
    executor._have_computed.clear()  # no other device works either
    executor._addresses.add(broken)
    lose()
    assert group.error is None and ended.get(timeout=60) == ("_restart", broken)
    lose()
    assert isinstance(group.error, LostDeviceError)


def device(dask_worker: Any) -> str:
    """A name that the worker that replaces this one has, too."""
    return f"device {dask_worker.name}"


def die_at_first(number: int) -> int:
    """Kill the first worker of the cluster, and each that replaces it."""
    if get_worker().name == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_device_that_kills_its_worker_at_each_task_leaves_them_to_another_one(client: Client) -> None:
    """More often than there are attempts at a task."""
    wait_for_workers(client, 2)
    executor = DaskExecutor(client, has_device=device)
    assert executor.map(die_at_first, range(40), name="die", overlap=True) == list(range(40))
    wait_for_workers(client, 2)


def refuse_memory(folder: Path, refusing: int, number: int) -> int:
    """Say that the memory does not suffice, as the first workers of the cluster do."""
    if get_worker().name < refusing:
        (folder / f"{get_worker().name} {time.time_ns()}").touch()
        error = DeviceError("it must fit into the GPU's memory")
        error.transient = True
        raise error
    time.sleep(0.05)
    return number


def test_what_one_device_has_no_memory_for_another_one_does_at_once(client: Client, tmp_path: Path) -> None:
    wait_for_workers(client, 2)
    executor = DaskExecutor(client, has_device=device)
    assert executor.map(partial(refuse_memory, tmp_path, 1), range(30), name="x", overlap=True) == list(range(30))
    assert 1 <= len(list(tmp_path.iterdir())) <= dask_executor.IN_FLIGHT_ON_DEVICE  # it is asked for no more


def test_what_no_device_has_memory_for_is_not_tried_again(client: Client, tmp_path: Path) -> None:
    wait_for_workers(client, 2)
    executor = DaskExecutor(client, has_device=device)
    with pytest.raises(DeviceError, match="must fit into the GPU's memory"):
        executor.map(partial(refuse_memory, tmp_path, 2), range(30), name="y", overlap=True)
    found = Counter(path.name.split()[0] for path in tmp_path.iterdir())
    assert found.keys() == {"0", "1"} and found.total() <= 2 * dask_executor.IN_FLIGHT_ON_DEVICE


def test_workers_that_all_have_a_device_do_everything(client: Client) -> None:
    executor = DaskExecutor(client, has_device=partial(bool, 1))
    assert executor.workers == 2
    assert executor.map(square, range(20), name="label") == [n * n for n in range(20)]


def test_errors_arrive_as_they_were_raised_and_end_the_step(client: Client) -> None:
    with pytest.raises(TomogramError, match=r"^x\.mrc: must be whole; found half of it\. Copy it again\.$"):
        DaskExecutor(client).map(refuse, range(1000), name="refuse")
    assert DaskExecutor(client).map(square, [3], name="square") == [9]  # the cluster is still of use


def test_work_of_a_worker_that_dies_goes_elsewhere(client: Client, tmp_path: Path) -> None:
    found = DaskExecutor(client).map(partial(die_once, tmp_path / "died"), range(20), name="die once")
    assert found == list(range(20)) and (tmp_path / "died").exists()


def test_a_result_that_is_lost_with_its_worker_is_computed_again(client: Client, tmp_path: Path) -> None:
    found = DaskExecutor(client).map(partial(fatal, tmp_path / "died"), range(20), name="fatal")
    assert found == list(range(20)) and (tmp_path / "died").exists()


def test_work_that_kills_every_worker_ends_with_a_remedy(client: Client) -> None:
    with pytest.raises(DeviceError, match=r"step 'die'.*died several times.*fewer --workers"):
        DaskExecutor(client).map(die, [1], name="die")


def test_every_process_is_set_up_once(client: Client, tmp_path: Path) -> None:
    client.register_plugin(Setup(partial(mark_process, tmp_path)), name="mark")
    wait_for_workers(client, 2)
    processes = {str(pid) for pid in DaskExecutor(client).map(process, range(40), name="process")}
    assert processes <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("name", "value"), [("OMP_NUM_THREADS", "1"), ("MALLOC_TRIM_THRESHOLD_", "8000000000")])
def test_workers_compute_in_one_thread_and_keep_their_memory(client: Client, name: str, value: str) -> None:
    assert set(DaskExecutor(client).map(partial(environment, name), range(4), name="env")) == {value}


def test_gpus_that_are_not_there_are_an_error() -> None:
    with (
        pytest.raises(CryosiamDaskError, match=r"dask-cuda|requests \d+ GPUs|NVIDIA's driver"),
        open_cluster("cuda", 99),
    ):
        pass


def drawn(folder: Path, names: Sequence[str | None]) -> str | None:
    """The next of the names, each of which is given to one process."""
    for number, name in enumerate(names):
        try:
            (folder / str(number)).touch(exist_ok=False)
            return name
        except FileExistsError:
            pass
    raise AssertionError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((None, None), "cpu"),
        (("GPU-1", "GPU-2"), "cuda"),
        (("GPU-1", None), "cuda"),  # the other one helps
        (("GPU-1", "GPU-1"), "every worker must have its own GPU; found GPU-1 used by"),
    ],
)
def test_no_two_workers_share_a_gpu(
    client: Client, tmp_path: Path, names: tuple[str | None, ...], expected: str
) -> None:
    describe = partial(drawn, tmp_path, names)
    if expected in ("cpu", "cuda"):
        assert describe_devices(client, describe) == expected
    else:
        with pytest.raises(DeviceError, match=expected):
            describe_devices(client, describe)


def test_gpus_that_are_gone_when_their_memory_is_asked_for_are_a_plain_error(client: Client) -> None:
    with pytest.raises(LostClusterError, match="a worker with a GPU must keep running until the run ends"):
        memory_of_workers(client, type(None))


def answer_or_leave(mark: Path) -> int:
    """Kill the first of the worker processes that are asked."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return 1
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_is_lost_while_it_is_asked_is_left_out(client: Client, tmp_path: Path) -> None:
    assert list(ask(client, answer_or_leave, tmp_path / "left").values()) == [1]
    wait_for_workers(client, 2)
    with pytest.raises(TomogramError, match="must be whole"):
        ask(client, refuse, 3)


def hang_once(mark: Path, number: int) -> int:
    """Stop this worker process, as the kernel would at a dead disk, at the first call with 5."""
    if number == 5:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return number
        os.kill(os.getpid(), signal.SIGSTOP)
    return number


def lose_device(folder: Path, times: int, number: int) -> int:
    """Fail as often as `times`, each time leaving behind which process did."""
    if number == 2 and len(list(folder.iterdir())) < times:
        (folder / f"{time.time_ns()}-{os.getpid()}").touch()
        raise LostDeviceError("the device must work", place=f"process {os.getpid()}")
    return number


def note(path: Path, item: tuple[str, int]) -> None:
    with path.open("a") as file:
        file.write(f"{item[0]}\n")
    time.sleep(0.02)


def wait_for(path: Path, _: int) -> bool:
    """Whether a file appears; a deadlock would end here."""
    for _ in range(3000):
        if path.exists():
            return True
        time.sleep(0.01)
    return False


def touch(path: Path) -> None:
    path.touch()


def test_a_call_that_hangs_is_done_elsewhere(client: Client, tmp_path: Path) -> None:
    before = set(client.nthreads())
    executor = DaskExecutor(client, hang_seconds=10)  # longer than a new process takes to load what it needs
    executor.map(process, range(4), name="warm", overlap=True)
    found = executor.map(partial(hang_once, tmp_path / "hung"), range(8), name="hang", overlap=True)
    assert found == list(range(8)) and (tmp_path / "hung").exists()
    while before <= set(client.nthreads()):  # until the process is gone
        time.sleep(0.1)
    wait_for_workers(client, 2)


def write_slowly(path: Path, number: int) -> None:
    with path.open("a") as file:
        file.write("begun\n")
    time.sleep(4)


def test_a_large_file_may_take_longer_than_a_block(client: Client, tmp_path: Path) -> None:
    DaskExecutor(client, hang_seconds=1).map(partial(write_slowly, tmp_path / "calls"), [0], name="export")
    assert (tmp_path / "calls").read_text() == "begun\n"


def test_a_lost_device_costs_its_process_and_three_end_the_step(client: Client, tmp_path: Path) -> None:
    wait_for_workers(client, 2)
    executor = DaskExecutor(client)
    (tmp_path / "two").mkdir()
    found = executor.map(partial(lose_device, tmp_path / "two", 2), range(5), name="lose", overlap=True)
    assert found == list(range(5))
    failed = [int(path.name.split("-")[1]) for path in sorted((tmp_path / "two").iterdir())]
    assert len(set(failed)) == 2  # each of them was given up
    (tmp_path / "many").mkdir()
    with pytest.raises(LostDeviceError, match="the device must work"):
        executor.map(partial(lose_device, tmp_path / "many", 99), range(5), name="lose", overlap=True)
    assert len(list((tmp_path / "many").iterdir())) == 3
    wait_for_workers(client, 2)


def test_a_drained_run_finishes_what_it_began(client: Client, tmp_path: Path) -> None:
    executor = DaskExecutor(client)
    arrived: list[int] = []

    def done(item: tuple[str, int], _: None) -> None:
        arrived.append(item[1])
        if len(arrived) == 3:
            executor.drain()

    path = tmp_path / "calls"
    with pytest.raises(Interrupted):
        executor.map(partial(note, path), [("x", i) for i in range(200)], name="note", done=done)
    assert 3 <= len(arrived) < 200 and path.read_text().count("x") == len(arrived)
    with pytest.raises(Interrupted):
        executor.map(square, [1], name="square")


def test_a_worker_whose_replacement_takes_long_is_not_given_up() -> None:
    # As if it took longer than Dask waits.
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10 ms"}),
        open_cluster("cpu", 1, dashboard_address="127.0.0.1:0") as client,
    ):
        (before,) = client.run(os.getpid).values()
        os.kill(before, signal.SIGKILL)
        assert set(DaskExecutor(client).map(process, range(4), name="process")) != {before}


def mark_process_or_die(folder: Path) -> None:
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        mark_process(folder)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_of_a_plugin_does_not_keep_it_from_the_others(tmp_path: Path) -> None:
    with open_cluster("cpu", 2, dashboard_address="127.0.0.1:0") as client:
        register_in_workers(client, Setup(partial(mark_process_or_die, tmp_path)), "mark")
        wait_for_workers(client, 2)
        running = {str(process) for process in client.run(os.getpid).values()}
        assert {path.name for path in tmp_path.iterdir()} == running | {"died"}


def test_what_cannot_be_recorded_ends_its_step_alone(client: Client) -> None:
    def refuse_record(item: int, result: int) -> None:
        raise OSError("disk full")

    executor = DaskExecutor(client)
    with pytest.raises(OSError, match="disk full"):
        executor.map(square, range(1000), name="square", done=refuse_record)
    assert executor.map(square, [3], name="square") == [9]
    while executor._thread:  # which ends when nothing is left
        time.sleep(0.01)
    assert not executor._groups and not executor._in_flight


def test_a_record_that_takes_long_keeps_no_other_tomogram_waiting(client: Client) -> None:
    """One that waits for the other's calls to end would wait for ever if they were recorded where it is dispatched."""
    executor, other = DaskExecutor(client), threading.Event()

    def wait(item: int, result: int) -> None:
        assert other.wait(60)

    slow = threading.Thread(target=executor.map, args=(square, [1]), kwargs={"name": "slow", "done": wait})
    slow.start()
    assert executor.map(square, range(20), name="square") == [n * n for n in range(20)]
    other.set()
    slow.join()


def modules(_: int) -> list[str]:
    return sorted(sys.modules)


@contextmanager
def scheduler_and_worker(folder: Path, path: str = "") -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """A scheduler and a worker, which alone looks for modules in `path`, as processes of their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    file, quiet = folder / "scheduler.json", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(file)]
    start += ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    scheduler = subprocess.Popen(start, env=environment, **quiet)
    start = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--no-dashboard"]
    environment["PYTHONPATH"] += os.pathsep + path
    worker = subprocess.Popen(start, env=environment, **quiet)
    try:
        while not file.exists() or not file.read_text():
            assert scheduler.poll() is None
            time.sleep(0.05)
        with Client(scheduler_file=str(file), set_as_default=False, timeout=60) as joined:
            joined.wait_for_workers(1, timeout=60)
            yield joined, scheduler
    finally:
        for running in (worker, scheduler):
            running.terminate()
            running.wait()


def test_the_scheduler_imports_nothing_of_what_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class Item: pass\ndef call(item): return type(item).__name__\n"
    (tmp_path / "far_away.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    far_away = importlib.import_module("far_away")
    monkeypatch.undo()
    with scheduler_and_worker(tmp_path, str(tmp_path)) as (joined, _):
        assert DaskExecutor(joined).map(far_away.call, [far_away.Item()], name="call") == ["Item"]
        assert not {"far_away", "torch", "zarr"} & set(joined.run_on_scheduler(modules, 0))


def test_a_scheduler_that_answers_no_more_ends_the_run(tmp_path: Path) -> None:
    with scheduler_and_worker(tmp_path) as (joined, scheduler):
        executor = DaskExecutor(joined, hang_seconds=2)
        assert executor.map(square, range(4), name="square") == [0, 1, 4, 9]
        scheduler.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(
                LostClusterError, match=r"tcp://127.*must keep running.*no answer within 2 s.*finished work is kept"
            ):
                executor.map(square, range(4), name="square")
        finally:
            scheduler.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("times", [1, 3])
def test_a_worker_that_dies_while_it_starts_is_started_again(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_REPLACE_SECONDS", (0.1, 0.1))

    def workers() -> set[int]:
        found = set()
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # it is just ending
                found |= {child.pid} if "spawn_main" in " ".join(child.cmdline()) else set()
        return found

    def kill() -> None:
        for _ in range(times):
            while not (found := workers() - before):
                time.sleep(0.01)
            os.kill(killed := found.pop(), signal.SIGKILL)
            while killed in workers():  # the next one may be there already
                time.sleep(0.01)

    before = workers()
    killing = threading.Thread(target=kill)
    killing.start()
    opened = open_cluster("cpu", 1, dashboard_address="127.0.0.1:0")
    if times == 1:
        with opened as client:
            assert DaskExecutor(client).map(square, [2], name="square") == [4]
            times = 2  # and the one that replaces it
            kill()
            assert DaskExecutor(client).map(square, [2], name="square") == [4]
    else:
        with pytest.raises(ClusterError, match=r"must be able to start.*failed to start.*fewer --workers"), opened:
            pass
    killing.join()


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_hangs_while_it_starts_is_killed(interrupted: bool, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    hanging = get_context("spawn").Process(target=time.sleep, args=(3000,))

    def start() -> None:
        hanging.start()
        if interrupted:
            interrupt_main()
        hanging.join()

    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        cluster._within(3000 if interrupted else 0.1, {*active_children()}, start)
    # Not its exit code, which may be in the hands of another thread that waited for it.
    assert wait([hanging.sentinel], timeout=60)


def test_connections_that_end_with_their_scheduler_are_not_shown() -> None:
    def shown(*arguments: str) -> str:
        command = [sys.executable, Path(__file__).parent / "support" / "lost_connections.py", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stderr

    assert shown("--silent") == ""
    loud = shown()
    assert "non-started TCPListener" in loud
    assert "Batched Comm Closed" in loud


def test_the_users_own_dask_configuration_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a site with JupyterHub, of one that demands encryption, with a folder that is not there any more."""
    (tmp_path / "file").touch()
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
    settings = {
        "distributed.dashboard.link": "{JUPYTERHUB_SERVICE_PREFIX}/proxy/{port}/status",
        "distributed.comm.require-encryption": True,
        "temporary-directory": str(tmp_path / "file" / "x"),
    }
    with dask.config.set(settings):
        with open_cluster("cpu", 1, dashboard_address="127.0.0.1:0") as client:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", client.dashboard_link)
            assert DaskExecutor(client).map(square, [2], name="square") == [4]
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/x")
        assert cluster.dashboard_link() == {}  # where it can be used, it is
        with pytest.raises(ClusterError, match=r"requires encryption.*Start it with --protocol tls"):
            cluster.join_cluster(address="tcp://127.0.0.1:1").__enter__()
        with pytest.raises(ClusterError, match=r"needs its certificates; found none in Dask's configuration"):
            cluster.join_cluster(address="tls://127.0.0.1:1").__enter__()


@pytest.mark.parametrize(
    ("settings", "address", "match"),
    [
        ({"distributed.worker.preload": ["no_such_module"]}, "127.0.0.1:0", "No module named .*Check Dask's own"),
        ({"distributed.comm.tls.min-version": 1}, "127.0.0.1:0", "min-version=1 is not.*Check Dask's own"),
        (
            {},
            "203.0.113.77:80",
            "--dashboard-address 203.0.113.77:80: must be an address of this machine.*requested address",
        ),
        ({}, "127.0.0.1:http", "must be an address of this machine and a port; found invalid literal"),
    ],
)
def test_what_keeps_workers_from_starting_is_not_taken_for_memory(
    settings: dict[str, Any], address: str, match: str
) -> None:
    with dask.config.set(settings), pytest.raises(ClusterError, match=match) as raised:
        open_cluster("cpu", 1, dashboard_address=address).__enter__()
    assert "memory" not in str(raised.value)


def warn_of(path: str) -> int:
    warnings.warn(f"{path} is odd", stacklevel=1)
    return os.getpid()


def test_a_warning_of_a_name_that_is_not_utf8_costs_no_worker(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    wait_for_workers(client, 2)
    odd = os.fsdecode(b"/data/\xb5 dir/x.mrc")
    with forwarded_warnings(client), caplog.at_level(logging.WARNING, "py.warnings"):
        before = set(client.run(os.getpid).values())
        executor = DaskExecutor(client)
        assert set(executor.share(odd, 0, lambda *_: None).map(warn_of, [odd] * 4, name="warn")) <= before
        while "is odd" not in caplog.text:
            time.sleep(0.01)
        assert set(client.run(os.getpid).values()) == before
    assert "/data/\\udcb5 dir/x.mrc is odd" in caplog.text


@pytest.mark.parametrize("joined", [False, True])
def test_the_end_does_not_wait_for_a_worker_that_does_not_answer(
    client: Client, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_FORGET_SECONDS", 0.1)
    wait_for_workers(client, 2)
    before = client.run(os.getpid)
    stopped = min(before.values())
    other = Client(client.scheduler.address, security=client.security, set_as_default=False)
    try:
        with other, forwarded_warnings(other if joined else client):
            os.kill(stopped, signal.SIGSTOP)
        assert client.nthreads().keys() == before.keys()  # it was not given up, which takes five minutes
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_it_is_said_that_no_worker_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_executor, "_NO_WORKER_SECONDS", 1.5)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with scheduler_and_worker(tmp_path) as (joined, _):
        executor = DaskExecutor(joined, inform=said.put)
        assert executor.map(square, range(4), name="square") == [0, 1, 4, 9]
        assert said.empty()
        (nanny,) = joined.run(os.getppid).values()
        os.kill(nanny, signal.SIGTERM)
        while joined.nthreads():
            time.sleep(0.05)

        def abandon() -> None:
            assert "no worker is left" in said.get(timeout=60)
            executor.abandon()

        waiting = threading.Thread(target=abandon)
        waiting.start()
        with pytest.raises(Interrupted):
            executor.map(square, [2], name="square")
        waiting.join()


def remembered(dask_scheduler: Any) -> tuple[int, int, int, int]:
    """Spans of the scheduler, groups of calls and notes of single ones that they hold, and names of calls."""
    spans = dask_scheduler.extensions["spans"]
    assert len(spans.spans) == len(spans.root_spans) == len(spans.spans_search_by_tag["default"])
    groups = sum(len(span.groups) for span in spans.spans.values())
    notes = sum(len(span._metadata["collections"]) for span in spans.spans.values() if span._metadata)
    seen = set().union(*(span._metadata_seen for span in spans.spans.values()))  # one set for all
    return len(spans.spans), groups, notes + len(seen), key_split.cache_info().currsize


def test_the_scheduler_forgets_calls_that_are_over(client: Client) -> None:
    executor = DaskExecutor(client)
    for _ in range(150):
        assert executor.map(square, range(4), name="square") == [0, 1, 4, 9]
    spans, groups, notes, names = client.run_on_scheduler(remembered)
    assert spans <= 125 and groups <= 40 and notes <= 250 and names <= 250
