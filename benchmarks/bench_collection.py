"""A large collection on many GPUs, simulated: how busy they are, and what client and scheduler cost.

    python benchmarks/bench_collection.py --output benchmarks/results/collection.json  # 64 GPUs, 1000 tomograms
    python benchmarks/bench_collection.py --workers 16 --tomograms 100 --seconds 1      # less of everything
    python benchmarks/bench_collection.py --quick          # seconds; the tests run it, so that it cannot rot
    python benchmarks/bench_collection.py --page docs/scale.md benchmarks/results/collection-2-cores.json  # its tables

A run as the command line makes it, on a cluster that stands ready: scheduler, nannies and workers are processes of
their own. Only two things are not what they are with real GPUs. The network sleeps, for `--seconds` a block and up to a
fifth more or less; a device is given one block at a time. And the tomograms are small, a patch to a block, so that one
machine can carry the reading and writing of all workers. Plan, ledger, claims, admission, dispatch, ingest, block
files, HDF5 export and previews are real. Meanwhile a share of the workers is killed, with SIGKILL, one after the other.

* `busy`: share of the devices' time from the beginning of the first block to the end of the last one for which they
  slept as long as they were told to, for blocks that were finished. `busy_while_up` leaves out the time from each kill
  until the replacement was ready. `gap_ms` is between two blocks of a device.
* `client_ms`, `scheduler_ms`, `nannies_ms`, `workers_ms`: CPU time of these processes for a block, everything that its
  tomogram costs besides included. All of it has to fit into the cores of this machine (`cores_busy`).
* `client_mb`, `scheduler_mb`: resident memory when half of the blocks was done, and at the end; `growth_kb`
  is what that difference is for a tomogram. `plan_kb` is what the plan holds of each, `plan_ms` what it takes to make,
  and `done_ms` what it takes to find out that all is done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from bench_inference import machine  # noqa: E402
from bench_overhead import make_tomogram  # noqa: E402

from cryosiam_dask.config import read_configuration  # noqa: E402
from cryosiam_dask.core.grid import Patch, make_grid  # noqa: E402
from cryosiam_dask.runs import collection  # noqa: E402
from cryosiam_dask.runs.cluster import join_cluster  # noqa: E402
from cryosiam_dask.runs.dask_executor import THREADS, DaskExecutor  # noqa: E402
from cryosiam_dask.runs.plan import RunPlan, plan_run  # noqa: E402
from cryosiam_dask.runs.progress import LogReporter, Pace  # noqa: E402
from cryosiam_dask.runs.workers import Setup  # noqa: E402
from cryosiam_dask.stages import predict  # noqa: E402
from support.checkpoints import SMALL, write  # noqa: E402  # a checkpoint of CryoSiam's format with random weights

PATCH, BLOCK_SIZE = 16, 8  # the smallest blocks that there are: of one patch, almost all of them


# ---------------------------------------------------------------------------------------------------------- the devices


class SimulatedPredictor:
    """Stands for a GPU with its network: takes its time for a block, and writes down when.

    Parameters
    ----------
    seconds
        For a block, on average.
    folder
        Where the record goes, a file for each process: ``up TIME``, then ``begin TIME SECONDS`` and ``end TIME``.
    """

    def __init__(self, seconds: float, folder: Path) -> None:
        self.seconds, self.turn, self.random = seconds, threading.Lock(), random.Random(os.getpid())
        self.file = (folder / f"{os.getpid()}.txt").open("a", buffering=1)
        self.file.write(f"up {time.time()}\n")

    def predict_block(
        self, window: np.ndarray, patches: Sequence[Patch], shape: tuple[int, ...], wanted: Collection[str]
    ) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
        labels = np.zeros(shape, np.uint8)
        for patch in patches:
            labels[patch.target] = window[patch.window][patch.core] > 0.5
        with self.turn:
            seconds, began = self.seconds * self.random.uniform(0.8, 1.2), time.time()
            self.file.write(f"begin {began} {seconds}\n")
            time.sleep(seconds)
            ended = time.time()
            self.file.write(f"end {ended}\n")
        return {"labels": labels, "highest": np.ones(2, np.float32)}, (began, ended)


def install(seconds: float, folder: Path) -> None:
    """Replace the network in this process."""
    predictor = SimulatedPredictor(seconds, folder)
    predict.load_predictor = lambda spec: predictor  # type: ignore[assignment]


def serve(address: str, workers: int) -> None:
    """Workers of a scheduler, each behind a nanny, until this process is ended.

    They are forked from a process that has imported everything: otherwise every one of them would import PyTorch, which
    takes a core for seconds, and hold 300 MB of its own.
    """
    from distributed import Nanny
    from distributed.utils import get_mp_context

    get_mp_context().set_forkserver_preload(
        ["distributed", "cryosiam_dask.runs.cluster", "cryosiam_dask.runs.tomogram"]
    )

    async def nannies() -> None:
        started = [
            Nanny(address, nthreads=THREADS, memory_limit=None, host="127.0.0.1", dashboard_address=None)
            for _ in range(workers)
        ]
        await asyncio.gather(*started)
        await asyncio.gather(*(nanny.finished() for nanny in started))

    asyncio.run(nannies())


# ---------------------------------------------------------------------------------------------------------- the cluster


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """Scheduler and nannies as processes of their own; gives these two."""
    environment = {
        **os.environ,
        "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver",
        # To be watched by Dask costs a hundredth of a core: little of a worker, and a core for all of them together.
        "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
        "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "500ms",
        "DASK_TEMPORARY_DIRECTORY": str(folder),
    }
    file = folder / "scheduler.json"
    with (folder / "cluster.log").open("w") as log:
        start = partial(subprocess.Popen, env=environment, stdout=log, stderr=log)
        command = "distributed.cli.dask_scheduler --host 127.0.0.1 --port 0 --dashboard-address 127.0.0.1:0"
        arguments = [sys.executable, "-m", *command.split(), "--scheduler-file", str(file)]
        # As the page on scale says.
        scheduler = start(arguments, env={**os.environ, "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100"})
        try:
            while not file.exists() or not file.read_text():
                assert scheduler.poll() is None, (folder / "cluster.log").read_text()
                time.sleep(0.1)
            address = json.loads(file.read_text())["address"]
            nannies = start([sys.executable, __file__, "--serve", address, "--workers", str(workers)])
            try:
                yield psutil.Process(scheduler.pid), psutil.Process(nannies.pid)
            finally:
                family = psutil.Process(nannies.pid).children(recursive=True)
                nannies.terminate()
                nannies.wait()
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
        finally:
            scheduler.terminate()
            scheduler.wait()


class Watch(LogReporter):
    """Counts blocks, kills workers on the way, and takes down memory and CPU time of all processes.

    Parameters
    ----------
    folder
        Of the simulated devices' records.
    processes
        Scheduler and nannies.
    tomograms, blocks
        In all.
    kills
        Workers to kill, at even distances.
    """

    def __init__(
        self, folder: Path, processes: tuple[psutil.Process, psutil.Process], tomograms: int, blocks: int, kills: int
    ) -> None:
        super().__init__(Console(file=(folder.parent / "run.log").open("w")), Pace(tomograms))
        self.folder, self.processes, self.done = folder, processes, 0
        self.running = (psutil.Process(), *processes)
        self.moments = [blocks * (i + 1) // (kills + 1) for i in range(kills)]
        self.killed: list[tuple[int, float]] = []
        self.samples: list[dict[str, float]] = []
        self.workers: dict[int, float] = {}
        self.random, self.over = random.Random(0), threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self.began = time.time()
        self._look_at_workers()
        self._sample()
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self._look_at_workers()
        self._sample()

    def step(self, tomogram: str, name: str, done: int, total: int) -> None:
        super().step(tomogram, name, done, total)
        with self._lock:
            self.done += name == "predict" and done > 0

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            if self.moments and self.done >= self.moments[0]:
                self.moments.pop(0)
                self._look_at_workers()
                victim = self.random.choice(sorted(set(self._devices()) - {number for number, _ in self.killed}))
                self.killed.append((victim, time.time()))
                os.kill(victim, signal.SIGKILL)
            if time.time() - self.began - self.samples[-1]["seconds"] > 1:
                self._sample()

    def _devices(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.txt")]

    def _look_at_workers(self) -> None:
        """Take down the CPU time of every worker; what those that are killed have used stays."""
        for process in self.processes[1].children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                self.workers[process.pid] = _cpu_seconds(process)

    def _sample(self) -> None:
        sample = {"seconds": time.time() - self.began, "blocks": float(self.done)}
        for name, process in zip(("client", "scheduler", "nannies"), self.running, strict=True):
            sample |= {f"{name}_cpu": _cpu_seconds(process), f"{name}_mb": process.memory_info().rss / 1e6}
        sample |= {"workers_cpu": sum(self.workers.values()), "threads": threading.active_count()}
        self.samples.append(sample)


def _cpu_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


# ------------------------------------------------------------------------------------------------------- what they tell


def records(folder: Path) -> dict[int, tuple[float, list[tuple[float, float, float]], list[float]]]:
    """By process: when it was up, its blocks as (began, ended, seconds asked for), and beginnings without an end."""
    found = {}
    for path in folder.glob("*.txt"):
        up, blocks, pending = math.nan, list[tuple[float, float, float]](), list[tuple[float, float]]()
        for line in path.read_text().splitlines():
            what, *values = line.split()
            if what == "up":
                up = float(values[0])
            elif what == "begin":
                pending.append((float(values[0]), float(values[1])))
            else:
                began, seconds = pending.pop()
                blocks.append((began, float(values[0]), seconds))
        found[int(path.stem)] = (up, blocks, [began for began, _ in pending])
    return found


def devices(folder: Path, workers: int, killed: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """How busy the simulated GPUs were."""
    found = records(folder)
    blocks = [block for _, blocks, _ in found.values() for block in blocks]
    first, last = min(began for began, _, _ in blocks), max(ended for _, ended, _ in blocks)
    used = sum(seconds for _, _, seconds in blocks)
    replaced = sorted(up for up, _, _ in found.values() if up > first)
    dead, vain = 0.0, 0.0
    for number, moment in killed:
        later = [up for up in replaced if up > moment]
        if later:
            replaced.remove(later[0])
        dead += max(0.0, min(later[0] if later else last, last) - moment)
        vain += sum(moment - began for began in found[number][2])
    gaps = sorted(b[0] - a[1] for _, blocks, _ in found.values() for a, b in pairwise(sorted(blocks)))
    bins = np.zeros(100)
    edges = np.linspace(first, last, len(bins) + 1)
    for began, ended, seconds in blocks:
        overlap = np.minimum(edges[1:], ended) - np.maximum(edges[:-1], began)
        bins += np.maximum(overlap, 0) * seconds / (ended - began)
    return {
        "busy": round(used / (workers * (last - first)), 4),
        "busy_while_up": round(used / (workers * (last - first) - dead), 4),
        "seconds": round(last - first, 1),
        "blocks": len(blocks),
        "killed": len(killed),
        "dead_seconds": round(dead, 1),
        "seconds_in_vain": round(vain, 1),
        "gap_ms": {
            name: round(1000 * gaps[min(len(gaps) - 1, int(share * len(gaps)))], 1) if gaps else None
            for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
        },
        "busy_over_time": np.round(bins / (workers * (last - first) / len(bins)), 3).tolist(),
        "_first": first,
    }


def make_plan(folder: Path, tomograms: int, blocks: int) -> RunPlan:
    """Small tomograms of so many blocks each; all of them are one file with many names."""
    power = round(math.log2(blocks))
    counts = [2 ** ((power + axis) // 3) for axis in range(3)]
    sizes = [
        next(n for n in range(4, 10000, 4) if make_grid((n,) * 3, (PATCH,) * 3, BLOCK_SIZE).block_counts[0] == count)
        for count in counts
    ]
    assert math.prod(make_grid(tuple(sizes), (PATCH,) * 3, BLOCK_SIZE).block_counts) == blocks, "not a power of two"
    (folder / "data").mkdir()
    first = folder / "data" / "tomogram_00000.mrc"
    make_tomogram(first, tuple(sizes))
    for number in range(1, tomograms):
        os.link(first, first.with_name(f"tomogram_{number:05}.mrc"))
    write(folder / "model.ckpt", SMALL, patch=PATCH)
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
        "block_size": BLOCK_SIZE,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return plan_run(read_configuration(folder / "config.yaml"))


def bench(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    make_plan(folder, options.tomograms, options.blocks)
    configuration = read_configuration(folder / "config.yaml")
    plan_seconds = -time.perf_counter()
    plan_run(configuration)
    plan_seconds += time.perf_counter()
    tracemalloc.start()
    plan = plan_run(configuration)
    plan_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    times = folder / "times"
    times.mkdir()
    kills = round(options.killed * options.workers)
    total = options.tomograms * options.blocks
    with (
        cluster(folder, options.workers) as processes,
        join_cluster(scheduler_file=folder / "scheduler.json", workers=options.workers) as client,
    ):
        client.register_plugin(Setup(partial(install, options.seconds, times)), name="device")
        with Watch(times, processes, options.tomograms, total, kills) as watch:
            outcomes = collection.run(plan, watch, executor=DaskExecutor(client))
    wrong = [outcome for outcome in outcomes if outcome.status != "done"]
    assert not wrong and len(outcomes) == options.tomograms, wrong[:3]
    done_seconds = -time.perf_counter()
    again = plan_run(configuration)
    done_seconds += time.perf_counter()
    assert len(again.skipped) == options.tomograms
    row: dict[str, Any] = {"workers": options.workers, "tomograms": options.tomograms, "blocks": total}
    told = devices(times, options.workers, watch.killed)
    begin = told.pop("_first")
    row |= {"blocks_computed": told.pop("blocks"), **told}
    first, last = watch.samples[0], watch.samples[-1]
    early = next(sample for sample in watch.samples if sample["blocks"] >= total // 2)
    for name in ("client", "scheduler", "nannies", "workers"):
        row[f"{name}_ms"] = round(1000 * (last[f"{name}_cpu"] - first[f"{name}_cpu"]) / total, 2)
    spent = sum(row[f"{name}_ms"] for name in ("client", "scheduler", "nannies", "workers")) * total / 1000
    row["cores_busy"] = round(spent / (last["seconds"] - first["seconds"]), 2)
    for name in ("client", "scheduler"):
        row[f"{name}_mb"] = [round(early[f"{name}_mb"], 1), round(last[f"{name}_mb"], 1)]
        passed = (last["blocks"] - early["blocks"]) / options.blocks
        row[f"{name}_growth_kb"] = round((last[f"{name}_mb"] - early[f"{name}_mb"]) * 1000 / max(1, passed), 1)
    row["most_threads"] = max(sample["threads"] for sample in watch.samples)
    row["plan_kb"] = round(plan_bytes / options.tomograms / 1000, 2)
    row["plan_ms"] = round(1000 * plan_seconds / options.tomograms, 2)
    row["done_ms"] = round(1000 * done_seconds / options.tomograms, 2)
    row["kills"] = [round(moment - begin, 1) for _, moment in watch.killed]
    thinned = watch.samples[:: max(1, len(watch.samples) // 200)]
    samples = [
        {name: round(sample[name], 1) for name in ("seconds", "blocks", "client_mb", "scheduler_mb", "threads")}
        | {"seconds": round(sample["seconds"] + watch.began - begin, 1)}
        for sample in thinned
    ]
    return row, samples


# ------------------------------------------------------------------------------------------------------------- the page


def tables(row: dict[str, Any], gpus: int = 1000, tomograms: int = 100_000) -> str:
    """What was measured, and what follows for so many GPUs and tomograms, in Markdown; formulae are in the page."""
    client, scheduler = row["client_ms"], row["scheduler_ms"]
    seconds = row["seconds"] * row["busy"] * row["workers"] / row["blocks"]
    measured = {
        "simulated GPUs, tomograms, blocks": f"{row['workers']}, {row['tomograms']}, {row['blocks']:,}",
        "computing a block takes": f"{seconds:.1f} s",
        "workers killed on the way": f"{row['killed']}",
        "devices busy, from the first block to the last": f"{row['busy']:.1%}",
        "the same without the time in which a killed worker was replaced": f"{row['busy_while_up']:.1%}",
        "between two blocks of a device: median, 99th percentile": (
            f"{row['gap_ms']['median']:.1f} ms, {row['gap_ms']['p99']:.1f} ms"
        ),
        "client, CPU time for a block (*c*)": f"{client:.1f} ms",
        "scheduler, CPU time for a block (*s*)": f"{scheduler:.1f} ms",
        "all workers, CPU time for a block": f"{row['workers_ms']:.1f} ms",
        "client, memory at half of the blocks and at the end": "{:.0f} MB, {:.0f} MB".format(*row["client_mb"]),
        "scheduler, memory at half of the blocks and at the end": "{:.0f} MB, {:.0f} MB".format(*row["scheduler_mb"]),
        "plan, memory for a tomogram (*m*)": f"{row['plan_kb']:.1f} kB",
        "plan, time for a tomogram (*p*)": f"{row['plan_ms']:.1f} ms",
        "plan, time for a tomogram that is done (*d*)": f"{row['done_ms']:.1f} ms",
    }
    lines = ["| measured | |", "|:--|--:|", *(f"| {name} | {value} |" for name, value in measured.items()), ""]
    lines += ["| a block computes for | client's core is full with | scheduler's core is full with |", "|--:|--:|--:|"]
    lines += [
        f"| {t} s | {1000 * t / client:,.0f} GPUs | {1000 * t / scheduler:,.0f} GPUs |" for t in (1, 2, 5, 10, 20, 60)
    ]
    slowest = max(client, scheduler) / 1000
    growth = {name: max(0.0, row[f"{name}_growth_kb"]) for name in ("client", "scheduler")}
    lines += [
        "",
        f"| {gpus:,} GPUs and {tomograms:,} tomograms | |",
        "|:--|--:|",
        f"| a block must compute for at least | {gpus * slowest:.1f} s |",
        f"| and, with the slower of the two idle for half of the time, | {2 * gpus * slowest:.1f} s |",
        f"| memory of the plan | {tomograms * row['plan_kb'] / 1e6:.2f} GB |",
        # Logs of bounded length fill during the first thousands of blocks, which says nothing of what comes later.
        *(
            f"| {name}, {growth[name]:.1f} kB for a tomogram | {growth[name] * tomograms / 1e6:.2f} GB |"
            for name in growth
            if row["blocks"] >= 20_000
        ),
        f"| time until the first block, nothing being done | {tomograms * row['plan_ms'] / 60e3:.1f} min |",
        f"| time until the first block, all but one being done | {tomograms * row['done_ms'] / 60e3:.1f} min |",
    ]
    return "\n".join(lines)


def fill(page: Path, result: Path) -> str:
    """The page with the tables of a result between its two marks."""
    before, mark, rest = page.read_text().partition("<!-- tables -->")
    _, end, after = rest.partition("<!-- end of tables -->")
    assert mark and end, f"{page} has no place for tables"
    (row,) = json.loads(result.read_text())["rows"]
    return f"{before}{mark}\n\n{tables(row)}\n\n{end}{after}"


# ------------------------------------------------------------------------------------------------- the picture


def draw(row: dict[str, Any], samples: list[dict[str, float]], path: Path) -> None:
    """Above, how busy the devices were, and when workers were killed; below, memory of client and scheduler."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    left, width, height = 80, 800, 220
    top, below = 60, 60 + height + 60
    picture = Image.new("RGB", (left + width + 130, below + height + 60), "white")
    pen = ImageDraw.Draw(picture)
    seconds = row["seconds"]
    grey, blue, red, green = (225, 225, 225), (0, 114, 178), (213, 94, 0), (0, 158, 115)

    def x(moment: float) -> float:
        return left + width * min(max(moment / seconds, 0), 1)

    title = (
        f"{row['workers']} simulated GPUs, {row['tomograms']} tomograms, {row['blocks']:,} blocks: "
        f"busy {row['busy']:.1%} of the time"
    )
    pen.text((10, 12), title, "black", font)
    pen.text((10, 36), "devices busy; marks where workers were killed", "black", small)
    for tenth in range(0, 11, 2):
        y = top + height * (1 - tenth / 10)
        pen.line((left, y, left + width, y), grey)
        pen.text((left - 8, y), f"{tenth * 10} %", "black", small, anchor="rm")
    for moment in row["kills"]:
        pen.line((x(moment), top, x(moment), top + height), (240, 190, 160))
        pen.polygon([(x(moment) - 5, top - 8), (x(moment) + 5, top - 8), (x(moment), top)], red)
    step = seconds / len(row["busy_over_time"])
    line = []
    for number, share in enumerate(row["busy_over_time"]):
        y = top + height * (1 - min(share, 1))
        line += [(x(number * step), y), (x((number + 1) * step), y)]
    pen.line(line, blue, 2)
    pen.text((10, below - 24), "resident memory", "black", small)
    most = max(max(sample["client_mb"], sample["scheduler_mb"]) for sample in samples)
    unit = next(u for u in (20, 50, 100, 200, 500, 1000) if most <= 6 * u or u == 1000)
    highest = unit * math.ceil(most / unit)
    for value in range(0, highest + 1, unit):
        y = below + height * (1 - value / highest)
        pen.line((left, y, left + width, y), grey)
        pen.text((left - 8, y), f"{value} MB", "black", small, anchor="rm")
    for name, colour in (("client", blue), ("scheduler", green)):
        points = [(x(s["seconds"]), below + height * (1 - s[f"{name}_mb"] / highest)) for s in samples]
        pen.line(points, colour, 2)
        pen.text((left + width + 10, points[-1][1]), name, colour, small, anchor="lm")
    for tenth in range(0, 11, 2):
        pen.text((x(seconds * tenth / 10), below + height + 14), f"{seconds * tenth / 10:.0f}", "black", small, "mm")
    pen.text((left + width / 2, below + height + 36), "seconds since the first block began", "black", small, "mm")
    picture.save(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write row and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64, help="simulated GPUs")
    parser.add_argument("--tomograms", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=32, help="of each tomogram, a power of two")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a GPU computes for a block")
    parser.add_argument("--killed", type=float, default=0.1, help="share of the workers that are killed on the way")
    parser.add_argument("--folder", type=Path, help="where to work; must not be there yet, and is kept")
    parser.add_argument("--quick", action="store_true", help="a few small tomograms on two workers")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a picture is drawn beside it")
    parser.add_argument(
        "--page", nargs=2, type=Path, metavar=("PAGE", "RESULT"), help="bring a page's tables up to date, and no more"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.page:
        page, result = options.page
        page.write_text(fill(page, result))
        return
    if options.serve:
        serve(options.serve, options.workers)
        return
    if options.quick:
        options.workers, options.tomograms, options.blocks, options.seconds, options.killed = 2, 3, 16, 0.05, 0.5
    described = machine("cpu")
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=options.folder is None)
    try:
        row, samples = bench(options, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(row, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "quick", "folder", "page", "serve")}
        lines = ",\n    ".join(json.dumps(sample) for sample in samples)
        options.output.write_text(
            f'{{\n  "machine": {json.dumps(described)},\n  "settings": {json.dumps(settings)},\n'
            f'  "rows": [\n    {json.dumps(row)}\n  ],\n  "samples": [\n    {lines}\n  ]\n}}\n'
        )
        draw(row, samples, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
