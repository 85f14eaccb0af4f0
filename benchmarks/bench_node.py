"""How busy a GPU is kept by a worker of its own and by CPU workers beside it, with a device that is simulated.

    python benchmarks/bench_node.py --rate 10 20 --output benchmarks/results/node.json   # four tomograms of 320³ voxels
    python benchmarks/bench_node.py --rate 10 20 --helpers 0     # the worker with the device does everything
    python benchmarks/bench_node.py --quick                      # seconds; the tests run it, so that it cannot rot

The network is replaced by one that takes as long as a device of `rate` Mvoxel/s and needs no core meanwhile. Everything
else is a run as the command line makes it, with `postprocessing_sizes`. `busy` is the share of the time from the first
block's start to the last one's end for which the device computed; `mvoxel_per_s` counts the whole run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from bench_inference import machine, write_results  # noqa: E402
from bench_overhead import Quiet, make_tomogram  # noqa: E402

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


class SimulatedDevice:
    """Labels what is above the middle of the intensities, in the time of a device of `rate` Mvoxel/s."""

    def __init__(self, rate: float) -> None:
        self.rate, self.turn = rate, threading.Lock()

    def predict_block(
        self, window: np.ndarray, patches: Sequence[Patch], shape: tuple[int, ...], wanted: Collection[str]
    ) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
        with self.turn:
            began = time.time()
            labels = np.zeros(shape, np.uint8)
            for patch in patches:
                np.greater(window[patch.window][patch.core], 0.5, out=labels[patch.target].view(bool))
            time.sleep(max(0.0, began + labels.size / self.rate / 1e6 - time.time()))
            return {"labels": labels, "highest": np.ones(2, np.float32)}, (began, time.time())


def install_device(rate: float) -> None:
    """Replace the network in this process."""
    device = SimulatedDevice(rate)
    predict.load_predictor = lambda spec: device  # type: ignore[assignment]


def has_device(dask_worker: Any) -> bool:
    return bool(dask_worker.name == 0)


def bench(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    shape = (options.size,) * 3
    (folder / "data").mkdir()
    for number in range(options.tomograms):
        make_tomogram(folder / "data" / f"t{number}.mrc", shape)
    write(folder / "model.ckpt", SMALL, patch=options.patch)
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "preview": False,
        "trained_model": str(folder / "model.ckpt"),
        "parameters": {"network": {"postprocessing_sizes": [-1, 50, 50]}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    plan = plan_run(read_configuration(folder / "config.yaml")).with_shapes()
    blocks: list[Any] = []
    predict_store = one_tomogram.predict_store

    def watched(*arguments: Any, **named: Any) -> Any:
        found = predict_store(*arguments, **named)
        blocks.extend(found)
        return found

    one_tomogram.predict_store = watched
    rows = []
    try:
        with open_cluster("cpu", 1 + options.helpers, dashboard_address="127.0.0.1:0") as client:
            for rate in options.rate:
                client.run(install_device, rate)
                blocks.clear()
                shutil.rmtree(folder / "out", ignore_errors=True)
                executor = DaskExecutor(client, has_device=has_device if options.helpers else None)
                began = time.perf_counter()
                outcomes = collection.run(plan, Quiet(), executor=executor)
                seconds = time.perf_counter() - began
                assert all(outcome.status == "done" for outcome in outcomes), outcomes
                rows.append(
                    {
                        "rate": rate,
                        "helpers": options.helpers,
                        "busy": round(busy_share(blocks), 3),
                        "mvoxel_per_s": round(options.tomograms * options.size**3 / seconds / 1e6, 1),
                        "seconds": round(seconds, 2),
                        "blocks": len(blocks),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    finally:
        one_tomogram.predict_store = predict_store
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, nargs="+", default=[10.0, 20.0], help="Mvoxel/s of the simulated device")
    parser.add_argument("--helpers", type=int, default=2, help="CPU workers beside the one with the device")
    parser.add_argument("--tomograms", type=int, default=4)
    parser.add_argument("--size", type=int, default=320, help="edge of the cubes in voxels")
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="small volumes")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rate, options.helpers, options.tomograms, options.size, options.patch = [10.0], 1, 2, 64, 32
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = bench(options, Path(folder))
    if options.output:
        write_results(options, described, rows)


if __name__ == "__main__":
    main()
