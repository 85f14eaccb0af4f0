"""What the lamella's post-processing costs: smoothing, the largest component, and its hull.

    python benchmarks/bench_lamella.py --sizes 512 1024 1600 --output benchmarks/results/lamella.json
    python benchmarks/bench_lamella.py --quick            # seconds; the tests run it, so that it cannot rot

Each volume is a cube whose probabilities are those of a tilted lamella with ragged faces, and specks beside it.
`mvoxel_per_s` counts the voxels of the cube; `steps` are the seconds of each step, for which all workers were at work;
`worker_bytes` is the most resident memory of any worker.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

sys.path[:0] = [str(Path(__file__).parent)]
from bench_inference import machine, write_results  # noqa: E402
from bench_overhead import Resident  # noqa: E402

from cryosiam_dask.core.blocks import Blocks  # noqa: E402
from cryosiam_dask.core.local_store import AnyDiskStore  # noqa: E402
from cryosiam_dask.runs.cluster import open_cluster  # noqa: E402
from cryosiam_dask.runs.dask_executor import DaskExecutor  # noqa: E402
from cryosiam_dask.stages.lamella import postprocess_lamella  # noqa: E402

_CHUNK = 96  # voxels; half a block of CryoSiam's patches of 128
_THRESHOLD = 0.9


def fill(blocks: Blocks, probabilities: zarr.Array[Any], labels: zarr.Array[Any], index: tuple[int, int, int]) -> None:
    """Make a block of the lamella's probabilities, and its labels."""
    where = blocks.slices(index)
    z, y, x = np.ogrid[where]
    edge = probabilities.shape[-1]
    middle = edge / 2 + 0.1 * (y - edge / 2) + 0.02 * edge * np.sin(x / 37.0)
    block = np.clip(1.5 - np.abs(z - middle) / (0.15 * edge), 0, 1).astype(np.float32)
    specks = np.random.default_rng(hash(index) % 2**32).random(block.shape, np.float32) > 0.999
    block[specks] = 1
    probabilities[(0, *where)] = block
    labels[where] = (block > _THRESHOLD).astype(np.uint8)


class Stepwise(DaskExecutor):
    """Also says how long each step takes."""

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self.steps: dict[str, float] = {}

    def map(self, function: Any, items: Any, *, name: str, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return super().map(function, items, name=name, **options)
        finally:
            self.steps[name] = round(self.steps.get(name, 0) + time.perf_counter() - began, 2)


def bench(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    compressed = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
    with open_cluster("cpu", options.workers, dashboard_address="127.0.0.1:0") as client:
        for size in options.sizes:
            group = zarr.create_group(AnyDiskStore(folder / f"{size}.zarr"))
            shape, chunks = (size,) * 3, (min(size, _CHUNK),) * 3
            make = partial(group.create_array, compressors=compressed, fill_value=0)
            probabilities = make("probabilities", shape=(1, *shape), chunks=(1, *chunks), dtype="float32")
            labels, output = (make(name, shape=shape, chunks=chunks, dtype="uint8") for name in ("labels", "lamella"))
            blocks = Blocks.of(labels)
            DaskExecutor(client).map(partial(fill, blocks, probabilities, labels), blocks.indices, name="make")
            executor = Stepwise(client)
            with Resident(list(client.run(os.getpid).values())) as workers:
                began = time.perf_counter()
                report = postprocess_lamella(
                    probabilities,
                    labels,
                    output,
                    threshold=_THRESHOLD,
                    hull=options.hull,
                    work=group,
                    executor=executor,
                )
                seconds = time.perf_counter() - began
            assert report.found and report.voxels > 0.05 * size**3
            rows.append(
                {
                    "size": size,
                    "hull": options.hull,
                    "workers": options.workers,
                    "seconds": round(seconds, 2),
                    "mvoxel_per_s": round(size**3 / seconds / 1e6, 1),
                    "steps": executor.steps,
                    "worker_bytes": workers.bytes,
                    "lamella_voxels": report.voxels,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 1600], help="edges of the cubes in voxels")
    parser.add_argument("--hull", choices=["slices", "volume"], default="slices")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a small volume")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.workers = [128], 1
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = bench(options, Path(folder))
    if options.output:
        write_results(options, described, rows)


if __name__ == "__main__":
    main()
