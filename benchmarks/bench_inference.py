"""Inference end to end: this package against CryoSiam's procedure and against MONAI's sliding window.

    python benchmarks/bench_inference.py --output benchmarks/results/inference.json   # also draws inference.png
    python benchmarks/bench_inference.py --quick                # seconds; the tests run it, so that it cannot rot

All of it predicts the labels of one volume in memory with one network, CryoSiam's default one with every width halved
(random weights: they cost what trained ones cost), on all cores:

* `plain loop`: the procedure of CryoSiam written down as it stands, one patch after the other through the whole network
  with both heads;
* `MONAI`: `sliding_window_inference` of the same network without its distance head, overlap 0.5, constant and gaussian;
  left out where it is not installed (extra `bench`);
* `exact`: this package, zarr to zarr on one worker a core, which gives the labels of the plain loop;
* `fast`: the same with a larger patch and a smaller halo.

The last two also inside a lamella mask. The first two know no masks: they predict everything, and multiply. Ratios are
to the plain loop in the same run. `agreement` is the share of voxels with the label of the plain loop: where weights
are random it says that exact mode is exact, and nothing about the quality of the others. `tflop` are the network's
products and sums, counted by PyTorch. `host_bytes` is the most private memory of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import torch
import zarr
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cryosiam_dask.core.grid import Grid, block_size_for, make_grid
from cryosiam_dask.files.mask import Mask, open_mask
from cryosiam_dask.model.checkpoint import read_checkpoint
from cryosiam_dask.model.network import Architecture, Network
from cryosiam_dask.model.predictor import PredictorSpec, predictor_spec
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.stages.predict import StoredPrediction, create_outputs, predict_store
from support.checkpoints import write  # a checkpoint of CryoSiam's format with random weights

THRESHOLD = 0.1


def architecture(divide: int) -> Architecture:
    """CryoSiam's default network, every width divided."""
    return Architecture(
        spatial_dims=3,
        in_channels=1,
        block_type="bottleneck",
        num_layers=(1, 1, 1, 1),
        num_filters=tuple(width // divide for width in (64, 128, 256, 512)),
        fpn_channels=128 // divide,
        decoder="fpn",
        later_convolutions=False,
        bifpn_layers=0,
        dense_dim=64 // divide,
        out_channels=6,
        semantic_widths=(32 // divide, 64 // divide),
        distance_widths=(32 // divide, 64 // divide),
        kernel_size=(3, 3, 3),
    )


def labels_of(scores: torch.Tensor) -> torch.Tensor:
    probabilities = scores.softmax(dim=1)
    return probabilities.masked_fill(probabilities < THRESHOLD, 0).argmax(dim=1).to(torch.uint8)


def plain_loop(
    predict: Callable[[torch.Tensor], np.ndarray], volume: np.ndarray, patch: int, dtype: type[np.generic] = np.uint8
) -> np.ndarray:
    """CryoSiam's procedure: every patch through everything, and the middle of each is kept."""
    quarter = patch // 4
    axes = [[start for start in range(0, size, patch // 2) if start < size - quarter] for size in volume.shape]
    result = np.zeros(volume.shape, dtype)
    with torch.inference_mode():
        for starts in product(*axes):
            where = np.ix_(*[(np.arange(patch) + s) % n for s, n in zip(starts, volume.shape, strict=True)])
            found = predict(torch.from_numpy(volume[where])[None, None])
            core, target = [], []
            for start, size in zip(starts, volume.shape, strict=True):
                low = 0 if start == 0 else quarter
                high = size - start if start + patch >= size else patch - quarter
                core.append(slice(low, high))
                target.append(slice(start + low, start + high))
            result[tuple(target)] = found[tuple(core)]
    return result


def monai(network: Network, volume: np.ndarray, patch: int, mode: str) -> np.ndarray:
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        scores = sliding_window_inference(
            torch.from_numpy(volume)[None, None], (patch,) * 3, 1, lambda x: network(x)[0], overlap=0.5, mode=mode
        )
        return labels_of(scores)[0].numpy()


class Peak:
    """The most private memory of this process and its children."""

    def __enter__(self) -> Peak:
        self.bytes, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.05):
            total = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    info = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                total += info.rss - info.shared
            self.bytes = max(self.bytes, total)


def flop(spec: PredictorSpec, mask: np.ndarray | None, shape: tuple[int, ...]) -> float:
    """What the network computes in this package's run."""
    with torch.device("meta"):
        network = Network(read_checkpoint(spec.checkpoint).architecture).eval()
        patch = torch.zeros(1, 1, *spec.patch)
    known: dict[str, int] = {}
    total = 0
    for block in make_grid(shape, spec.patch, 256, spec.halo):
        for p in block.patches:
            if mask is None or mask[block.region][p.target].any():
                if str(p.core) not in known:
                    with FlopCounterMode(display=False) as counter:
                        network(patch, core=p.core)
                    known[str(p.core)] = counter.get_total_flops()
                total += known[str(p.core)]
    return total


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_results(options: argparse.Namespace, described: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what was measured, on which machine and with which options, to the file of the option ``--output``."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "quick")}
    options.output.write_text(
        f'{{\n  "machine": {json.dumps(described)},\n  "settings": {json.dumps(settings)},\n'
        f'  "rows": [\n    {lines}\n  ]\n}}\n'
    )


def bench(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    shape = tuple(options.shape)
    checkpoint = write(folder / "model.ckpt", architecture(options.divide), patch=options.patch)
    network = Network(read_checkpoint(checkpoint).architecture).eval()
    network.load_state_dict(read_checkpoint(checkpoint).state)
    volume = rng.random(shape, np.float32)  # which scaling from [0, 1] to [0, 1] leaves alone
    tomogram = zarr.create_array(folder / "t.zarr", data=volume, chunks=(64,) * 3)
    rows: list[dict[str, Any]] = []

    # A lamella: a slab across z that holds the share of the volume.
    slab = np.zeros(shape, np.uint8)
    thick = round(shape[0] * options.mask_share)
    slab[(shape[0] - thick) // 2 :][:thick] = 1
    with h5py.File(folder / "mask.h5", "w") as file:
        file.create_dataset("labels", data=slab, chunks=True, compression="gzip", compression_opts=1)

    reference: np.ndarray | None = None
    baseline = 0.0

    def row(method: str, run: Callable[[], np.ndarray], tflop: float, mask: np.ndarray | None = None) -> None:
        nonlocal reference, baseline
        times, peaks = [], []
        for _ in range(options.repeats):
            with Peak() as peak:
                result = run()
            times.append(peak.seconds)
            peaks.append(peak.bytes)
        seconds = min(times)
        if reference is None:
            reference, baseline = result, seconds
        expected = reference if mask is None else reference * mask
        rows.append(
            {
                "case": "whole" if mask is None else f"mask of {options.mask_share:.0%}",
                "method": method,
                "seconds": round(seconds, 2),
                "all_seconds": [round(s, 2) for s in times],
                "ratio": round(baseline / seconds, 2),
                "tflop": round(tflop / 1e12, 3),
                "agreement": round(float((result == expected).mean()), 6),
                "host_bytes": max(peaks),
            }
        )
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)

    starts = [range(0, n - options.patch // 4, options.patch // 2) for n in shape]
    count = int(np.prod([len(axis) for axis in starts]))
    with torch.device("meta"):
        on_meta = Network(read_checkpoint(checkpoint).architecture).eval()
        whole = torch.zeros(1, 1, *(options.patch,) * 3)
    with FlopCounterMode(display=False) as both:
        on_meta(whole, distances=True)
    with FlopCounterMode(display=False) as one:
        on_meta(whole)

    def everything(patch: torch.Tensor) -> np.ndarray:
        return labels_of(network(patch, distances=True)[0])[0].numpy()

    row("plain loop", lambda: plain_loop(everything, volume, options.patch), count * both.get_total_flops())
    windows = int(np.prod([-(-(n - options.patch) // (options.patch // 2)) + 1 for n in shape]))
    for mode in ("constant", "gaussian") if find_spec("monai") else ():
        row(
            f"MONAI, {mode}",
            lambda mode=mode: monai(network, volume, options.patch, mode),
            windows * one.get_total_flops(),
        )
    with open_cluster("cpu", options.workers, dashboard_address="127.0.0.1:0") as client:
        executor = DaskExecutor(client)
        for mask in (None, slab):
            stored_mask = None if mask is None else open_mask(folder / "mask.h5", shape)
            for method, patch, halo in (
                ("exact", options.patch, 0),
                (f"fast, patch {options.fast_patch}, halo {options.fast_halo}", options.fast_patch, options.fast_halo),
            ):
                spec = predictor_spec(checkpoint, patch_size=(patch,) * 3, device="cpu", threshold=THRESHOLD, halo=halo)
                grid = make_grid(shape, spec.patch, block_size_for(shape, spec.patch, 256, options.workers, halo), halo)

                def run(spec: PredictorSpec = spec, grid: Grid = grid, mask: Mask | None = stored_mask) -> np.ndarray:
                    group = zarr.open_group(folder / "out.zarr", mode="w")
                    outputs = create_outputs(group, grid, spec.classes, ["labels"])
                    predict_store(StoredPrediction(spec, grid, tomogram, outputs, mask), executor=executor)
                    return np.asarray(outputs["labels"][:])

                client.run(_warm, spec)
                row(method, run, flop(spec, mask, shape), mask)
    return rows


def _warm(spec: PredictorSpec) -> None:
    """Load the network, as a run does before its first block."""
    from cryosiam_dask.model.predictor import load_predictor

    load_predictor(spec)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios to the plain loop."""
    height, left, right = 22, 330, 420
    picture = Image.new("RGB", (left + right + 90, height * len(rows) + 50), "white")
    pen = ImageDraw.Draw(picture)
    pen.text(
        (10, 8), "How many times faster than CryoSiam's procedure (plain loop), same network, same run", fill="black"
    )
    most = max(row["ratio"] for row in rows)
    for i, row in enumerate(rows):
        y = 36 + i * height
        pen.text((10, y), f"{row['case']}: {row['method']}", fill="black")
        length = right * row["ratio"] / most
        colour = "#4477aa" if row["method"].startswith(("exact", "fast")) else "#bbbbbb"
        pen.rectangle((left, y, left + length, y + height - 6), fill=colour)
        pen.text((left + length + 6, y), f"{row['ratio']:.2f} x, {row['seconds']:.1f} s", fill="black")
    picture.save(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write rows and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 192, 192])
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--fast-patch", type=int, default=128)
    parser.add_argument("--fast-halo", type=int, default=16)
    parser.add_argument("--mask-share", type=float, default=0.4)
    parser.add_argument("--divide", type=int, default=2, help="by which the widths of CryoSiam's network are divided")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small volume and network, once")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a picture is drawn beside it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.patch, options.fast_patch, options.fast_halo = [40, 48, 40], 32, 40, 12
        options.divide, options.workers, options.repeats = 16, 1, 1
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = bench(options, Path(folder))
    if options.output:
        write_results(options, described, rows)
        draw(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
