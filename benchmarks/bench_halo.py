"""Who should read the halo of a block: Dask (map_overlap), or the block's own task from the zarr store?

Predicts a stored volume both ways with a network that does nothing, in turn, on the same worker processes, and writes
seconds, megavoxels a second and the ratio.

    python benchmarks/bench_halo.py [--size 512] [--patch 64] [--repeat 3] [--output benchmarks/results/halo.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr

from cryosiam_dask.core.grid import Patch, make_grid
from cryosiam_dask.model.predictor import PredictorSpec
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.stages import predict


class NullPredictor:
    """Stands for a network that takes no time: label 1 where the intensity lies above the middle."""

    def predict_block(
        self, window: np.ndarray, patches: Sequence[Patch], shape: tuple[int, ...], wanted: Collection[str]
    ) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
        labels = np.zeros(shape, np.uint8)
        for patch in patches:
            labels[patch.target] = window[patch.window][patch.core] > 0.5
        return {"labels": labels, "highest": np.ones(2, np.float32)}, (0.0, 0.0)


def install_null_network() -> None:
    """Replace the network in this process."""
    predict.load_predictor = lambda spec: NullPredictor()  # type: ignore[assignment]


def measure(size: int, patch: int, block_size: int, repeat: int, workers: int) -> dict[str, Any]:
    spec = PredictorSpec("none", "none", "cpu", (patch,) * 3, 2, 8, 0.0, 1.0, 0.0, 1.0, 0.1)
    seconds: dict[str, list[float]] = {"own halo from the store": [], "map_overlap": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_cluster("cpu", workers, dashboard_address="127.0.0.1:0") as client,
    ):
        client.run(install_null_network)
        grid = make_grid((size,) * 3, spec.patch, block_size)
        # Stored as a run stores it, which suits the one as well as the other.
        tomogram = zarr.create_array(
            Path(folder) / "t.zarr",
            shape=grid.shape,
            chunks=predict.tomogram_chunks(grid),
            dtype="float32",
            compressors=None,
        )
        rng = np.random.default_rng(0)
        for z in range(0, size, tomogram.chunks[0]):
            tomogram[z : z + tomogram.chunks[0]] = rng.random(
                (min(tomogram.chunks[0], size - z), size, size), np.float32
            )
        group = zarr.open_group(Path(folder) / "labels.zarr")
        for _ in range(repeat):
            outputs = predict.create_outputs(group, grid, 2, ["labels"], overwrite=True)
            began = time.perf_counter()
            stored = predict.StoredPrediction(spec, grid, tomogram, outputs)
            predict.predict_store(stored, executor=DaskExecutor(client))
            seconds["own halo from the store"].append(time.perf_counter() - began)
            first = da.from_zarr(outputs["labels"]).sum().compute()

            outputs = predict.create_outputs(group, grid, 2, ["labels"], overwrite=True)
            began = time.perf_counter()
            lazy = predict.predict(da.from_zarr(tomogram), spec, block_size=block_size)["labels"]
            stores = da.store(lazy, outputs["labels"], compute=False, lock=False)
            client.compute(stores).result()
            seconds["map_overlap"].append(time.perf_counter() - began)
            if da.from_zarr(outputs["labels"]).sum().compute() != first:
                raise SystemExit("the two ways gave different labels")
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "machine": f"{platform.machine()}, {workers} workers",
        "size": size,
        "patch": patch,
        "block": grid.largest_block,
        "blocks": len(grid.indices()),
        "seconds": seconds,
        "megavoxels_per_second": {way: size**3 / 1e6 / value for way, value in middle.items()},
        "map_overlap_over_own_halo": middle["map_overlap"] / middle["own halo from the store"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small volume once, to see that it runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.size, options.patch, options.block_size, options.repeat, options.workers = 96, 32, 48, 1, 1
    result = measure(options.size, options.patch, options.block_size, options.repeat, options.workers)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
