"""Denoising against CryoSiam's procedure, and the way from a raw tomogram to labels in one pass against three runs.

    python benchmarks/bench_denoise.py --output benchmarks/results/denoise.json
    python benchmarks/bench_denoise.py --quick                # seconds; the tests run it, so that it cannot rot

`denoise` turns one volume on the disk into its denoised one, with one network, CryoSiam's default one with every width
halved (random weights: they cost what trained ones cost), on all cores:

* `plain loop`: the procedure of CryoSiam written down as it stands, with the volume and its result in memory: invert,
  stretch between two percentiles, one patch after the other through the whole network, then scale to [0, 1];
* `here`: this package, zarr to zarr on one worker a core, percentiles and scale in passes over the arrays.

`chain` goes from raw phantoms to the labels of their classes with the three models of the demo, by the real commands:

* `three runs`: `denoise-predict`, then `semantic-predict` for the lamella and for the classes, one after the other;
* `one pass`: `run` with the same keys in one file.

Ratios are to the first method of a case, in the same run. `difference` is the largest one between the denoised
intensities of two methods, or the share of voxels with other labels. `host_bytes` is the most private memory of all
processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from rich.console import Console

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from bench_inference import Peak, _warm, architecture, machine, plain_loop, write_results  # noqa: E402

from cryosiam_dask.cli import app  # noqa: E402
from cryosiam_dask.commands.demo import prepare_demo  # noqa: E402
from cryosiam_dask.core.grid import block_size_for, make_grid  # noqa: E402
from cryosiam_dask.core.phantom import make_phantom, write_phantom  # noqa: E402
from cryosiam_dask.model.checkpoint import read_checkpoint  # noqa: E402
from cryosiam_dask.model.network import Network  # noqa: E402
from cryosiam_dask.model.predictor import predictor_spec  # noqa: E402
from cryosiam_dask.runs.cluster import open_cluster  # noqa: E402
from cryosiam_dask.runs.dask_executor import DaskExecutor  # noqa: E402
from cryosiam_dask.stages.denoise import PERCENTS, Denoised, stretch_of  # noqa: E402
from cryosiam_dask.stages.predict import StoredPrediction, create_outputs, predict_store  # noqa: E402
from support.checkpoints import write  # noqa: E402  # a checkpoint of CryoSiam's format with random weights

COMMAND = Path(sys.executable).with_name("cryosiam-dask")
Row = dict[str, Any]


def procedure(network: Network, raw: np.ndarray, patch: int) -> np.ndarray:
    """CryoSiam's procedure, from the raw volume to the denoised one."""
    volume = -raw.astype(np.float32)
    low, high = np.percentile(volume, PERCENTS)
    volume = np.clip((volume - low) / (high - low), 0, 1).astype(np.float32)
    denoised = plain_loop(lambda x: network(x)[0][0, 0].numpy(), volume, patch, np.float32)
    return (denoised - denoised.min()) / (denoised.max() - denoised.min())


def measured(case: str, method: str, run: Callable[[], object], repeats: int) -> Row:
    """Run something several times; the best time counts."""
    times, peaks = [], []
    for _ in range(repeats):
        with Peak() as peak:
            run()
        times.append(peak.seconds)
        peaks.append(peak.bytes)
    seconds = {"seconds": round(min(times), 2), "all_seconds": [round(s, 2) for s in times]}
    return {"case": case, "method": method, **seconds, "host_bytes": max(peaks)}


def bench_denoise(options: argparse.Namespace, folder: Path) -> list[Row]:
    shape = tuple(options.shape)
    denoiser = replace(architecture(options.divide), denoises=True, out_channels=1, distance_widths=None)
    path = write(folder / "model.ckpt", denoiser, patch=options.patch)
    checkpoint = read_checkpoint(path)
    network = Network(checkpoint.architecture).eval()
    network.load_state_dict(checkpoint.state)
    raw = np.random.default_rng(0).normal(300, 800, shape).astype(np.int16)
    tomogram = zarr.create_array(folder / "raw.zarr", data=raw, chunks=(64,) * 3)
    results: list[np.ndarray] = []
    with torch.inference_mode():
        network(torch.zeros(1, 1, *checkpoint.patch_size))  # what the first call sets up is not the procedure's

    def loop() -> None:
        results.append(procedure(network, np.asarray(tomogram[:]), options.patch))

    rows = [measured("denoise", "plain loop", loop, options.repeats)]
    with open_cluster("cpu", options.workers, dashboard_address="127.0.0.1:0") as client:
        executor, plain = DaskExecutor(client), predictor_spec(path, device="cpu")
        grid = make_grid(shape, plain.patch, block_size_for(shape, plain.patch, 256, options.workers, plain.halo))

        def here() -> None:
            spec = replace(plain, stretch=stretch_of(tomogram, "raw.zarr", executor=executor))
            group = zarr.open_group(folder / "out.zarr", mode="w")
            outputs = create_outputs(group, grid, spec.classes, ["denoised"])
            ends: list[tuple[float, float]] = []
            predict_store(
                StoredPrediction(spec, grid, tomogram, outputs),
                done=lambda index, block: ends.append((block.lowest, block.highest[0])),
                executor=executor,
            )
            lows, highs = zip(*ends, strict=True)
            results.append(Denoised(outputs["denoised"], (min(lows), max(highs)))[:])

        client.run(_warm, plain)
        rows.append(measured("denoise", "here", here, options.repeats))
    for row, found in zip(rows, (results[0], results[-1]), strict=True):
        row["difference"] = float(np.abs(found - results[0]).max())
    return rows


def bench_chain(options: argparse.Namespace, folder: Path) -> list[Row]:
    prepare_demo(folder, Console(quiet=True))
    stems = [f"phantom_{seed}" for seed in range(1, options.tomograms + 1)]
    for each in (folder / "raw").iterdir():
        each.unlink()
    for seed, stem in enumerate(stems, 1):
        write_phantom(make_phantom(seed, tuple(options.phantom)), folder / "raw", stem, seed)
    labels: list[list[np.ndarray]] = []

    def commands(*those: tuple[str, str]) -> None:
        for name in ("denoised", "lamella", "semantic"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for command, file in those:
            words = [command, str(folder / file), "--device", "cpu", "--workers", str(options.workers), "--quiet"]
            if options.quick:  # in this process, which has loaded everything
                assert not app(words, standalone_mode=False)
            else:
                subprocess.run([COMMAND, *words], check=True)
        labels.append([])
        for stem in stems:
            with h5py.File(folder / "semantic" / f"{stem}_preds.h5") as file:
                labels[-1].append(file["labels"][()])

    methods: dict[str, list[tuple[str, str]]] = {
        "three runs": [
            ("denoise-predict", "config_denoising.yaml"),
            ("semantic-predict", "config_lamella.yaml"),
            ("semantic-predict", "config_semantic.yaml"),
        ],
        "one pass": [("run", "pipeline.yaml")],
    }
    rows = []
    for method, those in methods.items():
        row = measured("chain", method, lambda those=those: commands(*those), options.repeats)
        row["difference"] = float(np.mean([(a != b).mean() for a, b in zip(labels[-1], labels[0], strict=True)]))
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 160, 160], help="of the volume to denoise")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--divide", type=int, default=2, help="by which the widths of CryoSiam's network are divided")
    parser.add_argument("--phantom", type=int, nargs=3, default=[80, 240, 240], help="shape of a raw phantom")
    parser.add_argument("--tomograms", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small volumes and networks, once")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.patch, options.divide, options.phantom = [24, 40, 24], 16, 16, [48, 48, 48]
        options.tomograms, options.workers, options.repeats = 1, 1, 1
    described = machine("cpu")
    rows: list[Row] = []
    for bench in (bench_denoise, bench_chain):
        with tempfile.TemporaryDirectory() as folder:
            found = bench(options, Path(folder))
        for row in found:
            row["ratio"] = round(found[0]["seconds"] / row["seconds"], 2)
            print(json.dumps(row), flush=True)
        rows += found
    if options.output:
        write_results(options, described, rows)


if __name__ == "__main__":
    main()
