"""Run the demo: segment two raw phantom tomograms as a user would, and compare the result with the ground truth.

It writes tomograms and YAML files to a folder, runs the denoiser, the lamella and the semantic model on them in one
pass with the small models that ship with the package, prints the Dice score of every class and draws a picture of every
tomogram.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mrcfile
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from cryosiam_dask.config import STAGES, read_models
from cryosiam_dask.core.phantom import CLASS_NAMES, dice, make_phantom, write_phantom
from cryosiam_dask.errors import OutputError
from cryosiam_dask.files.hdf5 import open_hdf5
from cryosiam_dask.stages.preview import write_preview

if TYPE_CHECKING:  # imported where they are used: the network's libraries take seconds
    from cryosiam_dask.commands.segment import Device
    from cryosiam_dask.runs.outcome import Outcome

SEEDS: Mapping[str, int] = {"phantom_1": 1, "phantom_2": 2}


def run_demo(folder: Path, console: Console, *, device: Device = "auto", workers: int | None = None) -> list[Outcome]:
    """Run the demo.

    Parameters
    ----------
    folder
        Where to work; created if it does not exist.
    console
        Where to print.
    device, workers
        See `cryosiam_dask.commands.segment.segment`.

    Raises
    ------
    OutputError
        If the folder cannot be written to.
    """
    from cryosiam_dask.commands.console import inform
    from cryosiam_dask.commands.segment import segment

    pipeline = prepare_demo(folder, console)
    inform(console, f"\ncryosiam-dask run {pipeline}")
    outcomes = segment(read_models(pipeline), console, device=device, workers=workers, overwrite=True)
    if all(outcome.status != "failed" for outcome in outcomes):
        _compare(folder, console)
    return outcomes


def prepare_demo(folder: Path, console: Console) -> Path:
    """Write the files of the demo without running it.

    These are ``raw/``, ``models/``, ``pipeline.yaml`` and a file for each of its models, ``config_denoising.yaml``,
    ``config_lamella.yaml`` and ``config_semantic.yaml``. Paths in the YAML files are relative to the current folder if
    `folder` is.

    Parameters
    ----------
    folder, console
        See `run_demo`, also for what it raises.

    Returns
    -------
    Path
        ``pipeline.yaml``.
    """
    raw, models, denoised, masks = (folder / name for name in ("raw", "models", "denoised", "lamella"))
    try:
        for each in (raw, models):
            each.mkdir(parents=True, exist_ok=True)
        for stem, seed in SEEDS.items():
            if not (raw / f"{stem}_truth.npz").exists():  # a repeated demo finds its outputs done
                write_phantom(make_phantom(seed), raw, stem, seed)
        for name in STAGES:
            checkpoint = files("cryosiam_dask") / "data" / "models" / f"demo_{name}.ckpt"
            (models / f"{name}.ckpt").write_bytes(checkpoint.read_bytes())
        of_raw, of_denoised = (
            {"data_folder": str(data), "file_extension": ".mrc", "test_files": None} for data in (raw, denoised)
        )
        denoise = _denoise(denoised, models / "denoise.ckpt")
        lamella = _lamella(masks, models / "lamella.ckpt")
        semantic = _semantic(folder / "semantic", models / "semantic.ckpt")
        written = {
            "pipeline": {**of_raw, "denoise": denoise, "lamella": lamella, "semantic": semantic},
            "config_denoising": {**of_raw, **denoise},
            "config_lamella": {**of_denoised, **lamella},
            "config_semantic": {**of_denoised, "mask_folder": str(masks), **semantic},
        }
        for name, values in written.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            "the demo needs a writable folder", place=folder, value=error.strerror,
            remedy="Choose another one with --output",
        ) from None  # fmt: skip
    console.print(
        f"wrote {len(SEEDS)} raw phantom tomograms to {raw}, models to {models}, and YAML files to {folder}: "
        "pipeline.yaml for all models; config_denoising.yaml, config_lamella.yaml and config_semantic.yaml for one "
        "model each",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return folder / "pipeline.yaml"


def _denoise(output: Path, model: Path) -> dict[str, Any]:
    return {
        "prediction_folder": str(output),
        "trained_model": str(model),
        "save_raw_predictions": False,
        "scale_prediction": False,  # the denoiser and the models after it were trained on phantoms from 0 to 1
        "parameters": {
            "data": {"min": 0, "max": 1, "mean": 0, "std": 1},
            "network": {"in_channels": 1, "spatial_dims": 3},
        },
        "hyper_parameters": {"batch_size": 3},
    }


def _lamella(output: Path, model: Path) -> dict[str, Any]:
    return {
        "prediction_folder": str(output),
        "trained_model": str(model),
        "save_internal_files": False,
        "parameters": {
            "data": {"min": 0, "max": 1, "mean": 0, "std": 1},
            "network": {
                "in_channels": 1,
                "spatial_dims": 3,
                # The default, 0.9, removes a rim of 7 voxels where a lamella leaves the field of view: little of a
                # tomogram of 960 voxels, but much of these phantoms of 112.
                "threshold": 0.5,
                "postprocessing": True,
                "3d_postprocessing": False,
            },
        },
        "hyper_parameters": {"batch_size": 2},
    }


def _semantic(output: Path, model: Path) -> dict[str, Any]:
    return {
        "prediction_folder": str(output),
        "trained_model": str(model),
        "class_names": list(CLASS_NAMES[1:]),
        "parameters": {
            "data": {"min": 0, "max": 1, "mean": 0, "std": 1},
            "network": {
                "in_channels": 1,
                "spatial_dims": 3,
                "threshold": 0.1,
                "postprocessing_sizes": [-1, 500, 50, 50, 200],
            },
        },
        "hyper_parameters": {"batch_size": 2},
    }


def _compare(folder: Path, console: Console) -> None:
    """Print the Dice scores and draw the pictures."""
    table = Table("Dice score", "lamella", *CLASS_NAMES[1:])
    scores = {}
    for stem in SEEDS:
        with (
            np.load(folder / "raw" / f"{stem}_truth.npz") as truth,
            open_hdf5(folder / "lamella" / f"{stem}_preds.h5") as lamella,
            open_hdf5(folder / "semantic" / f"{stem}_preds.h5") as semantic,
            mrcfile.open(folder / "raw" / f"{stem}.mrc") as raw,
            mrcfile.open(folder / "denoised" / f"{stem}.mrc") as denoised,
        ):
            inside = dice(lamella["labels"][()], truth["lamella"], 2)[1]
            classes = dice(semantic["labels"][()], truth["labels"], len(CLASS_NAMES))[1:]
            scores[stem] = dict(zip(("lamella", *CLASS_NAMES[1:]), (inside, *classes), strict=True))
            table.add_row(stem, *(f"{score:.3f}" for score in scores[stem].values()))
            write_preview(
                folder / f"{stem}.png",
                denoised.data,
                semantic["labels"],
                voxel_size_angstrom=float(semantic.attrs["voxel_size_angstrom"][-1]),
                class_names=CLASS_NAMES,
                lamella=lamella["labels"],
                truth=truth["labels"],
                raw=raw.data,
                title=stem,
            )
    (folder / "dice.json").write_text(json.dumps(scores, indent=2) + "\n")
    console.print(table)
    pictures = ", ".join(str(folder / f"{stem}.png") for stem in SEEDS)
    console.print(f"pictures: {pictures}", markup=False, highlight=False, soft_wrap=True)
