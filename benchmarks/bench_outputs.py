"""What pictures and OME-Zarr images cost: seconds and memory for volumes of any size, and their share of a run.

    python benchmarks/bench_outputs.py --output benchmarks/results/outputs.json   # 512³ and 1600³ voxels, and a run
    python benchmarks/bench_outputs.py --quick             # seconds; the tests run it, so that it cannot rot

* `preview`, `ome-zarr`: one of each by a process that does nothing else. Voxels (uint8 noise, which does not compress)
  and labels are computed where they are read, so that they take neither memory nor disk. `peak_bytes` is the most
  resident memory of that process, `base_bytes` what it had before.
* `run`: a tomogram from MRC to its outputs by one process, with CryoSiam's default network, every width halved (random
  weights: they cost what trained ones cost). `preview_share` is the share of the time for which the picture was drawn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from bench_inference import architecture, machine  # noqa: E402
from bench_overhead import Quiet  # noqa: E402

from cryosiam_dask.config import read_configuration  # noqa: E402
from cryosiam_dask.runs import collection, outputs  # noqa: E402
from cryosiam_dask.runs.plan import plan_run  # noqa: E402
from cryosiam_dask.stages.ome_zarr import write_ome_zarr  # noqa: E402
from cryosiam_dask.stages.preview import write_preview  # noqa: E402
from support.checkpoints import write  # noqa: E402  # a checkpoint of CryoSiam's format with random weights

TILE = 128


@dataclass(frozen=True)
class Endless:
    """A volume that repeats a tile and is nowhere stored.

    Attributes
    ----------
    shape
        (z, y, x) in voxels.
    levels
        0 for noise, otherwise how many labels.
    """

    shape: tuple[int, ...]
    levels: int

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def chunks(self) -> tuple[int, ...]:
        return tuple(min(TILE, size) for size in self.shape)

    def __getitem__(self, region: Any, /) -> np.ndarray:
        given = region if isinstance(region, tuple) else (region,)
        parts = (*given, *[slice(None)] * (self.ndim - len(given)))
        axes = [np.atleast_1d(np.arange(size)[part]) % TILE for part, size in zip(parts, self.shape, strict=True)]
        return np.squeeze(tile(self.levels)[np.ix_(*axes)], tuple(a for a, p in enumerate(parts) if isinstance(p, int)))


_TILES: dict[int, np.ndarray] = {}


def tile(levels: int) -> np.ndarray:
    """Noise, or balls of labels on background."""
    if levels not in _TILES:
        if levels:
            z, y, x = np.ogrid[:TILE, :TILE, :TILE]
            centre = (z // 32 + y // 32 + x // 32) % (levels + 1)
            ball = sum((axis % 32 - 16) ** 2 for axis in (z, y, x)) < 100
            _TILES[levels] = np.where(ball, centre, 0).astype(np.uint8)
        else:
            _TILES[levels] = np.random.default_rng(0).integers(0, 256, (TILE,) * 3, np.uint8)
    return _TILES[levels]


def alone(method: str, size: int, folder: str) -> dict[str, Any]:
    """One output of one volume; returns what it took."""
    tomogram, labels = Endless((size,) * 3, 0), Endless((size,) * 3, 4)
    tile(0), tile(4)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    if method == "preview":
        write_preview(Path(folder) / "x.png", tomogram, labels, voxel_size_angstrom=10)
    else:
        write_ome_zarr(Path(folder) / "x.ome.zarr", tomogram, labels, voxel_size_angstrom=(10, 10, 10))
    seconds = time.perf_counter() - began
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {
        "method": method,
        "size": size,
        "seconds": round(seconds, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "base_bytes": base,
        "written_bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
    }


def apart(method: str, size: int, folder: str) -> dict[str, Any]:
    """The same in a process of its own, as memory is not given back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(alone, method, size, folder).result()


def run(shape: tuple[int, ...], divide: int, patch: int, folder: Path) -> dict[str, Any]:
    """A run, and for how long of it the picture was drawn."""
    (folder / "data").mkdir()
    with mrcfile.new(folder / "data" / "t.mrc") as mrc:
        mrc.set_data(np.random.default_rng(0).random(shape, np.float32))
        mrc.voxel_size = 10
    write(folder / "model.ckpt", architecture(divide), patch=patch)
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    spent = [0.0]

    def timed(*arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        write_preview(*arguments, **options)
        spent[0] += time.perf_counter() - began

    outputs.write_preview = timed
    try:
        plan = plan_run(read_configuration(folder / "config.yaml"))
        began = time.perf_counter()
        (outcome,) = collection.run(plan, Quiet())
        seconds = time.perf_counter() - began
    finally:
        outputs.write_preview = write_preview
    assert outcome.status == "done", outcome.error
    return {
        "method": "run",
        "shape": list(shape),
        "seconds": round(seconds, 2),
        "preview_seconds": round(spent[0], 2),
        "preview_share": round(spent[0] / seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1600])
    parser.add_argument("--run", type=int, nargs=3, default=[160, 192, 192])
    parser.add_argument("--divide", type=int, default=2)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, help="Where to write; the system's folder for temporary files otherwise."
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.run, options.divide, options.patch = [150], [24, 40, 36], 16, 16
    rows = []
    for size in options.sizes:
        for method in ("preview", "ome-zarr"):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                rows.append(alone(method, size, folder) if options.quick else apart(method, size, folder))
            print(json.dumps(rows[-1]), flush=True)
    if options.run:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(run(tuple(options.run), options.divide, options.patch, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        settings = {"sizes": options.sizes, "run": options.run, "divide": options.divide, "patch": options.patch}
        document = {"machine": machine("cpu"), "settings": settings, "rows": rows}
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
