"""Work on real worker processes: the same results, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from distributed import Client

from cryosiam_dask.cluster import DaskExecutor, Setup, open_cluster
from cryosiam_dask.errors import CryosiamDaskError, DeviceError, TomogramError


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


def test_errors_arrive_as_they_were_raised_and_end_the_step(client: Client) -> None:
    with pytest.raises(TomogramError, match=r"^x\.mrc: must be whole; found half of it\. Copy it again\.$"):
        DaskExecutor(client).map(refuse, range(1000), name="refuse")
    assert DaskExecutor(client).map(square, [3], name="square") == [9]  # the cluster is still of use


def test_work_of_a_worker_that_dies_goes_elsewhere(client: Client, tmp_path: Path) -> None:
    found = DaskExecutor(client).map(partial(die_once, tmp_path / "died"), range(20), name="die once")
    assert found == list(range(20)) and (tmp_path / "died").exists()


def test_work_that_kills_every_worker_ends_with_a_remedy(client: Client) -> None:
    with pytest.raises(DeviceError, match=r"step 'die'.*died several times.*fewer --workers"):
        DaskExecutor(client).map(die, [1], name="die")


def test_every_process_is_set_up_once(client: Client, tmp_path: Path) -> None:
    client.register_plugin(Setup(partial(mark_process, tmp_path)), name="mark")
    client.wait_for_workers(2)
    processes = {str(pid) for pid in DaskExecutor(client).map(process, range(40), name="process")}
    assert processes <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("name", "value"), [("OMP_NUM_THREADS", "1"), ("MALLOC_TRIM_THRESHOLD_", "8000000000")])
def test_workers_compute_in_one_thread_and_keep_their_memory(client: Client, name: str, value: str) -> None:
    assert set(DaskExecutor(client).map(partial(environment, name), range(4), name="env")) == {value}


def test_gpus_that_are_not_there_are_an_error() -> None:
    with pytest.raises(CryosiamDaskError, match=r"dask-cuda|asks for \d+ GPUs"), open_cluster("cuda", 99):
        pass
