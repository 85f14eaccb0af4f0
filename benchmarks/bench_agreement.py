"""How much fast mode and other precisions change, with trained weights.

    python benchmarks/bench_agreement.py --output benchmarks/results/agreement.json
    python benchmarks/bench_agreement.py --quick                # seconds; the tests run it, so that it cannot rot

Predicts a phantom tomogram with the semantic model that ships with this package and compares each way with exact mode:
share of voxels with the same label, and the Dice score of every class. The yardstick is `exact, patches elsewhere`:
exact mode on the tomogram without its first voxels along each axis, so that all patches fall elsewhere, compared where
the new border is at least a halo away. That much CryoSiam's own result depends on where its patches happen to lie.
`dice_truth` compares with what the phantom was made from.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from bench_inference import machine

from cryosiam_dask.core.phantom import dice, make_phantom
from cryosiam_dask.errors import DeviceError
from cryosiam_dask.model.predictor import PredictorSpec, load_predictor, predictor_spec
from cryosiam_dask.stages.predict import predict

SEED = 11  # neither trained on nor part of the demo


def labels_of(tomogram: np.ndarray, spec: PredictorSpec) -> np.ndarray:
    labels = predict(da.from_array(tomogram), spec)["labels"]
    return np.asarray(labels.compute(scheduler="synchronous"))


def compare(checkpoint: Path, shape: tuple[int, int, int], device: str) -> list[dict[str, Any]]:
    phantom = make_phantom(SEED, shape)
    spec = predictor_spec(checkpoint, device=device)  # type: ignore[arg-type]
    classes, (patch, *_) = spec.classes, spec.patch
    exact = labels_of(phantom.tomogram, spec)
    rows: list[dict[str, Any]] = []

    def row(way: str, labels: np.ndarray, region: tuple[slice, ...] = (slice(None),) * 3) -> None:
        expected, truth = exact[region], phantom.truth[region]
        rows.append(
            {
                "way": way,
                "equal": round(float((labels == expected).mean()), 5),
                "dice_exact": [round(score, 4) for score in dice(labels, expected, classes)],
                "dice_truth": [round(score, 4) for score in dice(labels, truth, classes)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    row(f"exact, patch {patch}", exact)
    # No multiple of the distance between patches.
    offset, halo = patch // 4 + 4, patch // 4
    shifted = labels_of(phantom.tomogram[(slice(offset, None),) * 3], spec)
    row(
        f"exact, patch {patch}, patches elsewhere by {offset}",
        shifted[(slice(halo, None),) * 3],
        (slice(offset + halo, None),) * 3,
    )
    for factor, part in ((1, 5), (2, 8), (2, 4)):
        size = patch * factor
        fast = replace(spec, patch=(size,) * 3, halo=max(12, size // part))
        row(f"fast, patch {size}, halo {fast.halo}", labels_of(phantom.tomogram, fast))
    for precision in ("tf32", "bf16", "fp16"):
        other = replace(spec, precision=precision)
        try:
            load_predictor(other)
        except DeviceError:
            continue  # this machine has none
        row(f"exact, patch {patch}, {precision}", labels_of(phantom.tomogram, other))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[112, 192, 192])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small phantom")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape = [48, 64, 64]
    described = machine(options.device)
    with as_file(files("cryosiam_dask") / "data" / "models" / "demo_semantic.ckpt") as checkpoint:
        rows = compare(checkpoint, tuple(options.shape), options.device)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        head = f'"machine": {json.dumps(described)},\n  "shape": {options.shape}'
        options.output.write_text(f'{{\n  {head},\n  "rows": [\n    {lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
