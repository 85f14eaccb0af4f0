"""How the time of inference grows with the volume, and how it falls with the workers.

    python benchmarks/bench_scaling.py --output benchmarks/results/scaling.json   # also draws scaling.png
    python benchmarks/bench_scaling.py --quick                # seconds; the tests run it, so that it cannot rot

Predicts volumes of 1, 2, 4 and 8 times a base shape with CryoSiam's default network, every width divided (random
weights: they cost what trained ones cost), in exact mode, zarr to zarr, on one worker up to one a core. The network is
loaded before the clock runs. `per_voxel` is the time per voxel against that of the largest volume on as many workers;
`speedup` is the time of one worker against this one's for the same volume.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_inference import THRESHOLD, _warm, architecture, machine, write_results

from cryosiam_dask.core.grid import block_size_for, make_grid
from cryosiam_dask.model.predictor import predictor_spec
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.stages.predict import StoredPrediction, create_outputs, predict_store
from support.checkpoints import write


def grown(base: tuple[int, ...], times: int) -> tuple[int, ...]:
    """`base` with one axis after the other doubled, the last first, until it holds so many times the voxels."""
    shape, axis = list(base), len(base) - 1
    while times > 1:
        shape[axis % len(base)] *= 2
        axis, times = axis - 1, times // 2
    return tuple(shape)


def bench(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    checkpoint = write(folder / "model.ckpt", architecture(options.divide), patch=options.patch)
    spec = predictor_spec(checkpoint, patch_size=(options.patch,) * 3, device="cpu", threshold=THRESHOLD)
    volumes = {}
    for times in (1, 2, 4, 8):
        volume = rng.random(grown(tuple(options.shape), times), np.float32)
        volumes[times] = zarr.create_array(folder / f"{times}.zarr", data=volume, chunks=(64,) * 3)
    rows: list[dict[str, Any]] = []
    for workers in options.workers:
        with open_cluster("cpu", workers, dashboard_address="127.0.0.1:0") as client:
            client.run(_warm, spec)
            for times, tomogram in volumes.items():
                grid = make_grid(tomogram.shape, spec.patch, block_size_for(tomogram.shape, spec.patch, 256, workers))
                seconds = []
                for _ in range(options.repeats):
                    outputs = create_outputs(zarr.open_group(folder / "out.zarr", mode="w"), grid, 6, ["labels"])
                    began = time.perf_counter()
                    predict_store(StoredPrediction(spec, grid, tomogram, outputs), executor=DaskExecutor(client))
                    seconds.append(time.perf_counter() - began)
                rows.append(
                    {
                        "workers": workers,
                        "times": times,
                        "shape": list(tomogram.shape),
                        "blocks": len(grid.indices()),
                        "patches": sum(len(block.patches) for block in grid),
                        "seconds": round(min(seconds), 2),
                        "all_seconds": [round(s, 2) for s in seconds],
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        largest = next(r for r in rows if (r["workers"], r["times"]) == (row["workers"], 8))
        alone = next(r for r in rows if (r["workers"], r["times"]) == (options.workers[0], row["times"]))
        row["per_voxel"] = round(row["seconds"] / row["times"] / (largest["seconds"] / 8), 2)
        row["speedup"] = round(alone["seconds"] / row["seconds"], 2)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over volume, both in steps of a factor of two, a line for each number of workers."""
    font = ImageFont.load_default(13)
    colours = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233)]
    left, top, width, height = 80, 50, 480, 320
    seconds = [row["seconds"] for row in rows]
    low, high = np.floor(np.log2(min(seconds))), np.ceil(np.log2(max(seconds)))
    picture = Image.new("RGB", (left + width + 160, top + height + 60), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((10, 10), "Seconds for the labels, exact mode, against the volume (dashed: in proportion)", "black", font)

    def at(times: float, value: float) -> tuple[float, float]:
        return left + width * np.log2(times) / 3, top + height * (1 - (np.log2(value) - low) / (high - low))

    for power in range(int(low), int(high) + 1):
        pen.line((at(1, 2.0**power), at(8, 2.0**power)), (225, 225, 225))
        pen.text((10, at(1, 2.0**power)[1] - 8), f"{2.0**power:g} s", "black", font)
    for times in (1, 2, 4, 8):
        shape = next(row["shape"] for row in rows if row["times"] == times)
        pen.text((at(times, 2.0**low)[0] - 36, top + height + 10), " x ".join(map(str, shape)), "black", font)
    for workers, colour in zip(dict.fromkeys(row["workers"] for row in rows), colours, strict=False):
        line = [row for row in rows if row["workers"] == workers]
        last = line[-1]["seconds"]
        for k in range(30):  # dashes of the line that ends in the last point and goes in proportion
            a, b = 2 ** (3 * k / 30), 2 ** (3 * (k + 0.5) / 30)
            if last * a / 8 >= 2.0**low:
                pen.line((at(a, last * a / 8), at(b, last * b / 8)), tuple((c + 510) // 3 for c in colour))
        pen.line([at(row["times"], row["seconds"]) for row in line], colour, 2)
        for row in line:
            x, y = at(row["times"], row["seconds"])
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        x, y = at(8, last)
        pen.text((x + 12, y - 8), f"{workers} worker{'s' * (workers != 1)}", colour, font)
    picture.save(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write rows and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--divide", type=int, default=2, help="by which the widths of CryoSiam's network are divided")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2**k for k in range((os.cpu_count() or 1).bit_length())]
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small volumes and network, once")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a picture is drawn beside it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.patch, options.divide, options.workers = [24, 24, 24], 16, 16, [1]
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = bench(options, Path(folder))
    if options.output:
        write_results(options, described, rows)
        draw(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
