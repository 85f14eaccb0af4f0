"""Connected components of chunked volumes against one-array labelling, scikit-image and dask-image.

    python benchmarks/bench_components.py                       # 256³ and 512³, 1 and 2 workers
    python benchmarks/bench_components.py --sizes 512 1024 --output results.json
    python benchmarks/bench_components.py --quick               # seconds; the tests run it, so that it cannot rot

Volumes are made here: `blobs`, n³ voxels of 5 classes, 16 % foreground, many small components; and `membranes`, of the
shape of a real label volume, 312 x 928 x 960, 3 classes, a few components that run through everything. Both are
periodic tiles set side by side, so that a volume of any size takes little memory to make.

Every row is the best of some runs in warm processes, and what this package gives is compared with cc3d's labels of the
whole array, number for number. `cpu_seconds` is what the caller and its workers computed in that run (on a machine that
does other work as well, the steadier figure), `grown_bytes` how much private memory they took at most above what they
held before. dask-image is optional, labels without regard to classes, and is stopped at a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import psutil
import zarr
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.stages.components import find_components, instances_dtype, remove_small, write_instances

MEMBRANES = (312, 928, 960)
SIZES = [-1, 50, 200, -1, 1000, 20]  # for the size filter: one for each class


@dataclass(frozen=True)
class SharedArray:
    """An array in shared memory that worker processes open by name."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] = (128, 128, 128)

    def __getitem__(self, key: Any) -> Any:
        return _mapped(self)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        _mapped(self)[key] = value


@cache
def _mapped(array: SharedArray) -> np.memmap[Any, Any]:
    mode = "r+" if Path(array.path).exists() else "w+"
    return np.memmap(array.path, dtype=array.dtype, mode=mode, shape=array.shape)


def volume(name: str, shape: tuple[int, ...], edge: int = 256) -> np.ndarray:
    """Labels, (z, y, x) uint8."""
    rng = np.random.default_rng(0)
    edge = min(edge, *shape)

    def noise(sigma: float) -> np.ndarray:
        return ndimage.gaussian_filter(rng.standard_normal((edge,) * 3, dtype=np.float32), sigma, mode="wrap")

    if name == "blobs":
        surface, kinds = noise(2), noise(4)
        inside, classes = surface > np.quantile(surface, 0.84), 5
    else:
        surface, kinds = noise(8), noise(16)
        inside, classes = np.abs(surface) < np.quantile(np.abs(surface), 0.05), 3
    cuts = np.quantile(kinds, np.arange(1, classes) / classes)
    tile = (inside * (1 + np.digitize(kinds, cuts))).astype(np.uint8)
    return np.tile(tile, [-(-size // edge) for size in shape])[tuple(slice(size) for size in shape)].copy()


class Watch:
    """CPU time and private memory of this process and its children while it is entered."""

    def __enter__(self) -> Watch:
        self.processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        self.before = self.highest = self._private()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.cpu_before = self._cpu()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.cpu_seconds = self._cpu() - self.cpu_before
        self.stop.set()
        self.thread.join()
        self.grown_bytes = self.highest - self.before

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.highest = max(self.highest, self._private())

    def _private(self) -> int:
        info = [process.memory_info() for process in self.processes]
        return sum(one.rss - one.shared for one in info)

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self.processes]
        return sum(one.user + one.system for one in times)


class Report:
    """Gathers the rows and prints each as it comes."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def measure(
        self,
        case: str,
        voxels: int,
        method: str,
        workers: int,
        run: Callable[[], Any],
        agrees: Callable[[Any], bool] | None = None,
    ) -> None:
        """Run a few times and keep the fastest."""
        watches = []
        result = None
        for _ in range(self.repeats):
            result = None  # so that two results are never held
            with Watch() as watch:
                result = run()
            watches.append(watch)
        best = min(watches, key=lambda watch: watch.seconds)
        self.add(
            case,
            voxels,
            method,
            workers,
            best.seconds,
            cpu_seconds=round(best.cpu_seconds, 3),
            grown_bytes=max(watch.grown_bytes for watch in watches),
            **({} if agrees is None else {"agrees": agrees(result)}),
        )

    def add(self, case: str, voxels: int, method: str, workers: int, seconds: float | None, **more: Any) -> None:
        speed = None if seconds is None else round(voxels / seconds / 1e6, 1)
        row = {"case": case, "method": method, "workers": workers, "seconds": seconds and round(seconds, 3)}
        self.rows.append({**row, "mvoxel_per_s": speed, **more})
        print(json.dumps(self.rows[-1], ensure_ascii=False), flush=True)


def one_array_filter(labels: np.ndarray) -> np.ndarray:
    """The size filter on one array, class by class as CryoSiam goes about it: label, measure each region, keep."""
    result = labels.copy()
    for label, size in enumerate(SIZES):
        if label and size >= 0:
            parts = skimage_label(labels == label, connectivity=3)
            large = [region.label for region in regionprops(parts) if region.area > size]
            result[(parts > 0) & ~np.isin(parts, large)] = 0
    return result


def bench(case: str, labels: np.ndarray, workers: list[int], report: Report, folder: Path, options: Any) -> None:
    """Measure everything on one volume."""
    voxels, shape = labels.size, labels.shape
    reference, count = cc3d.connected_components(labels, connectivity=26, return_N=True)
    print(f"{case}: {count} components, {np.count_nonzero(labels) / voxels:.0%} foreground", flush=True)
    dtype = instances_dtype(count)

    def equal(result: Any) -> bool:
        return all(np.array_equal(result[z : z + 64], reference[z : z + 64]) for z in range(0, shape[0], 64))

    report.measure(
        case, voxels, "cc3d, one array", 1, lambda: cc3d.connected_components(labels, connectivity=26), equal
    )
    filtered = None
    if voxels <= options.one_array_limit:
        report.measure(case, voxels, "scikit-image, one array", 1, lambda: skimage_label(labels, connectivity=3))
        filtered = one_array_filter(labels)
        report.measure(case, voxels, "size filter, scikit-image, one array", 1, lambda: one_array_filter(labels))

    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else folder
    shared = SharedArray(str(memory / f"bench-{os.getpid()}-labels"), shape, labels.dtype)
    numbered = SharedArray(str(memory / f"bench-{os.getpid()}-{dtype}"), shape, dtype)
    shared[:] = labels
    group = zarr.open_group(folder / f"{case}.zarr", mode="w")
    chunks = tuple(min(128, size) for size in shape)
    stored = group.create_array("labels", data=labels, chunks=chunks)
    instances = group.create_array("instances", shape=shape, chunks=chunks, dtype=dtype)
    kept = group.create_array("kept", shape=shape, chunks=chunks, dtype=labels.dtype)

    try:
        for number in workers:
            with open_cluster("cuda" if options.array_module == "cupy" else "cpu", number) as client:
                executor = DaskExecutor(client)

                def label(source: Any, target: Any, executor: DaskExecutor = executor) -> Any:
                    components = find_components(source, executor=executor, array_module=options.array_module)
                    write_instances(components, source, target, executor=executor)
                    return target

                def drop(executor: DaskExecutor = executor) -> Any:
                    remove_small(stored, kept, SIZES, executor=executor, array_module=options.array_module)
                    return kept

                small = group.create_array("small", data=np.eye(64, dtype="u1")[None], chunks=(1, 8, 8), overwrite=True)
                find_components(small, block=(1, 8, 8), executor=executor)  # workers import what they need
                report.measure(case, voxels, "here, array to array", number, lambda: label(shared, numbered), equal)
                report.measure(case, voxels, "here, zarr to zarr", number, lambda: label(stored, instances), equal)
                report.measure(
                    case,
                    voxels,
                    "here, size filter, zarr to zarr",
                    number,
                    drop,
                    None if filtered is None else lambda result: np.array_equal(result[:], filtered),
                )
        if options.dask_image_limit:
            dask_image(case, voxels, shared, report, options.dask_image_limit)
    finally:
        for array in (shared, numbered):
            Path(array.path).unlink(missing_ok=True)
        _mapped.cache_clear()


DASK_IMAGE = """
import sys, time
import dask.array as da
import numpy as np
from dask_image.ndmeasure import label
path, *shape = sys.argv[1:]
array = np.memmap(path, dtype="u1", mode="r", shape=tuple(map(int, shape)))
began = time.perf_counter()
labels, count = label(da.from_array(array, chunks=128) > 0, structure=np.ones((3, 3, 3)))
da.compute(labels, count)
print(time.perf_counter() - began)
"""


def dask_image(case: str, voxels: int, labels: SharedArray, report: Report, limit: float) -> None:
    """Time dask-image in a process of its own."""
    command = [sys.executable, "-c", DASK_IMAGE, labels.path, *map(str, labels.shape)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        report.add(case, voxels, "dask-image, 128³ chunks, all threads", 1, None, stopped_after_seconds=limit)
        return
    if done.returncode:
        print(f"dask-image was not measured: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    else:
        report.add(case, voxels, "dask-image, 128³ chunks, all threads", 1, float(done.stdout))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "zarr": zarr.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512], help="edges of the cubes of blobs, voxels")
    parser.add_argument("--membranes", action="store_true", help=f"also a volume of {MEMBRANES} voxels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-array-limit", type=float, default=3e8, help="voxels up to which scikit-image is run")
    parser.add_argument("--dask-image-limit", type=float, default=0, help="seconds; 0 leaves dask-image out")
    parser.add_argument("--array-module", choices=["numpy", "cupy"], default="numpy")
    parser.add_argument("--quick", action="store_true", help="a volume of 48³ voxels, once")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.workers, options.repeats, options.membranes = [48], [1], 1, False
    report, described = Report(options.repeats), machine()
    cases = [(f"blobs {size}³", "blobs", (size,) * 3) for size in options.sizes]
    if options.membranes:
        cases.append(("membranes " + " x ".join(map(str, MEMBRANES)), "membranes", MEMBRANES))
    with tempfile.TemporaryDirectory() as folder:
        for case, name, shape in cases:
            bench(case, volume(name, shape), options.workers, report, Path(folder), options)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in report.rows)
        options.output.write_text(f'{{\n  "machine": {json.dumps(described)},\n  "rows": [\n    {rows}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
