"""What everything around the network costs: from MRC file to HDF5 file with a network that does nothing.

    python benchmarks/bench_overhead.py --output benchmarks/results/overhead.json   # 512³ voxels
    python benchmarks/bench_overhead.py --size 1600 --repeats 1 --sleep 0           # memory of four gigavoxels
    python benchmarks/bench_overhead.py --quick            # seconds; the tests run it, so that it cannot rot

* `one process`: reads the MRC file through a memory map, slab by slab, thresholds it, and writes the labels with h5py
  (gzip 1): the least that anybody has to do.
* `whole path`: a run as the command line makes it, with `postprocessing_sizes`: statistics, blocks with halos, labels,
  components, HDF5, on worker processes that stand ready. Only the network is replaced: a voxel above the middle of the
  intensities gets label 1. No picture is drawn; `bench_outputs.py` tells what that takes.
* `whole path, slow network`: the same with a network that sleeps for so long that it is what limits a run;
  `busy` is the share of the time for which the workers were in it.

`worker_bytes` is the most resident memory of any worker, `client_bytes` that of the process that leads, and
`cpu_ns_per_voxel` the least time of a run that all of them together spent on a core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import psutil
import yaml
from scipy import ndimage

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from bench_inference import machine, write_results  # noqa: E402

from cryosiam_dask.config import read_configuration  # noqa: E402
from cryosiam_dask.core.grid import Patch  # noqa: E402
from cryosiam_dask.runs import collection  # noqa: E402
from cryosiam_dask.runs import tomogram as one_tomogram  # noqa: E402
from cryosiam_dask.runs.cluster import open_cluster  # noqa: E402
from cryosiam_dask.runs.dask_executor import DaskExecutor  # noqa: E402
from cryosiam_dask.runs.plan import plan_run  # noqa: E402
from cryosiam_dask.stages import predict  # noqa: E402
from cryosiam_dask.stages.timeline import busy_share  # noqa: E402
from support.checkpoints import SMALL, write  # noqa: E402  # a checkpoint of CryoSiam's format with random weights


class NullPredictor:
    """Stands for a network that takes no time, or only time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.turn = threading.Lock()

    def predict_block(
        self, window: np.ndarray, patches: Sequence[Patch], shape: tuple[int, ...], wanted: Collection[str]
    ) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
        labels = np.zeros(shape, np.uint8)
        with self.turn:
            began = time.time()
            for patch in patches:
                labels[patch.target] = window[patch.window][patch.core] > 0.5
                time.sleep(self.seconds)
            return {"labels": labels, "highest": np.ones(2, np.float32)}, (began, time.time())


def install_null_network(seconds: float) -> None:
    """Replace the network in this process."""
    predictor = NullPredictor(seconds)
    predict.load_predictor = lambda spec: predictor  # type: ignore[assignment]


class Quiet:
    """A reporter that says nothing."""

    def begin(self, name: str) -> None: ...
    def step(self, tomogram: str, name: str, done: int, total: int) -> None: ...
    def inform(self, text: str) -> None: ...
    def end(self, tomogram: str, message: str, **options: Any) -> None: ...
    def close(self) -> None: ...


class Resident:
    """The most resident memory of processes while it is entered."""

    def __init__(self, processes: Sequence[int]) -> None:
        self.processes = [psutil.Process(number) for number in processes]
        self.bytes, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Resident:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.05):
            self.bytes = max(self.bytes, *(process.memory_info().rss for process in self.processes))


def cpu_seconds(processes: Sequence[int]) -> float:
    """What processes have spent on a core so far."""
    return sum(sum(psutil.Process(number).cpu_times()[:2]) for number in processes)


def one_process(source: Path, target: Path) -> None:
    with mrcfile.mmap(source) as mrc, h5py.File(target, "w") as file:
        labels = file.create_dataset(
            "labels", shape=mrc.data.shape, dtype="u1", chunks=(64,) * 3, compression="gzip", compression_opts=1
        )
        for z in range(0, mrc.data.shape[0], 64):
            labels[z : z + 64] = mrc.data[z : z + 64] > 0.5


def make_tomogram(path: Path, shape: tuple[int, ...]) -> None:
    """Smooth noise of one tile, repeated: float32, a tenth of it above 0.5."""
    edge = min(128, *shape)
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((edge,) * 3, np.float32), 2, mode="wrap")
    tile = (noise - np.quantile(noise, 0.9)) / noise.std() * 0.1 + 0.5
    with mrcfile.new_mmap(path, shape, mrc_mode=2, overwrite=True) as mrc:
        across = [-(-size // edge) for size in shape[1:]]
        for z in range(0, shape[0], edge):
            slab = np.tile(tile, (1, *across))[: shape[0] - z, : shape[1], : shape[2]]
            # Real intensities do not compress: noise that moves no voxel across the threshold.
            slab = slab + np.random.default_rng(z).random(slab.shape, np.float32) * 1e-4 * np.sign(slab - 0.5)
            mrc.data[z : z + edge] = slab
        mrc.voxel_size = 10


def bench(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    shape = (options.size,) * 3
    (folder / "data").mkdir()
    make_tomogram(folder / "data" / "t.mrc", shape)
    write(folder / "model.ckpt", SMALL, patch=options.patch)
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "preview": False,
        "trained_model": str(folder / "model.ckpt"),
        "parameters": {"network": {"postprocessing_sizes": [-1, 50, 50]}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    plan = plan_run(read_configuration(folder / "config.yaml"))
    voxels, rows = int(np.prod(shape)), []

    def row(method: str, seconds: list[float], **more: Any) -> None:
        best = min(seconds)
        rows.append({"method": method, "seconds": round(best, 2), "all_seconds": [round(s, 2) for s in seconds]})
        rows[-1] |= {"mvoxel_per_s": round(voxels / best / 1e6, 1), **more}
        print(json.dumps(rows[-1]), flush=True)

    steps: dict[str, float] = {}

    class Stepwise(DaskExecutor):
        """Also says how long each step takes."""

        def share(self, tomogram: str, order: int, progress: Any) -> Any:
            return self

        def map(self, function: Any, items: Any, *, name: str, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return super().map(function, items, name=name, **options)
            finally:
                steps[name] = round(steps.get(name, 0) + time.perf_counter() - began, 2)

    with open_cluster("cpu", options.workers, dashboard_address="127.0.0.1:0") as client:
        # In turn, so that whatever else the machine does falls on both.
        times: dict[str, list[float]] = {"one process": [], "whole path": []}
        worker_bytes = client_bytes = 0
        spent: list[float] = []
        client.run(install_null_network, 0.0)
        processes = list(client.run(os.getpid).values())
        for _ in range(options.repeats):
            began = time.perf_counter()
            one_process(folder / "data" / "t.mrc", folder / "plain.h5")
            times["one process"].append(time.perf_counter() - began)
            steps.clear()
            shutil.rmtree(folder / "out", ignore_errors=True)  # what is there would not be made again
            with Resident(processes) as workers, Resident([os.getpid()]) as leader:
                began, before = time.perf_counter(), cpu_seconds([*processes, os.getpid()])
                (outcome,) = collection.run(plan, Quiet(), executor=Stepwise(client))
                times["whole path"].append(time.perf_counter() - began)
                spent.append(cpu_seconds([*processes, os.getpid()]) - before)
            assert outcome.status == "done", outcome.error
            worker_bytes, client_bytes = max(worker_bytes, workers.bytes), max(client_bytes, leader.bytes)
        row("one process", times["one process"])
        row(
            "whole path",
            times["whole path"],
            ratio=round(min(times["whole path"]) / min(times["one process"]), 2),
            workers=options.workers,
            worker_bytes=worker_bytes,
            client_bytes=client_bytes,
            cpu_ns_per_voxel=round(1e9 * min(spent) / voxels, 1),
            seconds_of_steps=dict(steps),
        )
        with h5py.File(folder / "plain.h5") as plain, h5py.File(folder / "out" / "t_preds.h5") as ours:
            same = all(
                np.array_equal(plain["labels"][z : z + 64], ours["labels"][z : z + 64] + ours["removed"][z : z + 64])
                for z in range(0, shape[0], 64)
            )
        assert same, "the labels differ"
        if not options.sleep:
            return rows
        client.run(install_null_network, options.sleep)
        blocks: list[Any] = []
        watched = one_tomogram.predict_store
        one_tomogram.predict_store = lambda *a, **k: blocks.extend(watched(*a, **k)) or blocks  # type: ignore[assignment]
        shutil.rmtree(folder / "out")
        began = time.perf_counter()
        timeline = options.output is not None
        collection.run(plan, Quiet(), executor=DaskExecutor(client), timeline=timeline)
        row(
            "whole path, slow network",
            [time.perf_counter() - began],
            blocks=len(blocks),
            busy=round(busy_share(blocks), 3),
        )
        if timeline:
            picture = folder / "out" / "t_timeline.png"
            options.output.with_suffix(".png").write_bytes(picture.read_bytes())
        one_tomogram.predict_store = watched
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="edge of the cube in voxels")
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sleep", type=float, default=0.05, help="seconds for a patch of the slow network; 0: without")
    parser.add_argument("--quick", action="store_true", help="a small volume, once")
    parser.add_argument("--output", type=Path, help="JSON file for the results; the timeline is drawn beside it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.patch, options.workers, options.repeats, options.sleep = 64, 32, 1, 1, 0.001
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)  # for the timeline
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = bench(options, Path(folder))
    if options.output:
        write_results(options, described, rows)


if __name__ == "__main__":
    main()
