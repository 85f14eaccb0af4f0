"""Tomograms, configurations and folders of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import yaml

from cryosiam_dask.config import Configuration, read_configuration
from support import checkpoints, golden

SHAPE = (24, 20, 22)
LARGE, BLOCK_SIZE = (40, 80, 80), 32  # in many blocks, so that there is time to stop a run among them
PIPELINE_CASE = "lamella_then_semantic"


def write_tomogram(path: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> None:
    """An MRC file of noise between 0 and 1, with a place of its own in space."""
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.random.default_rng(seed).random(shape, np.float32))
        mrc.voxel_size = 9.96
        mrc.header.origin = (10, 20, 30)
        mrc.nstart = (1, 2, 3)


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def make_folder(folder: Path) -> Path:
    """Three tomograms, a checkpoint, and ``config.yaml`` with relative paths."""
    (folder / "data").mkdir()
    for seed in range(3):
        write_tomogram(folder / "data" / f"TS_{seed}.mrc", seed)
    checkpoints.write(folder / "model.ckpt", seed=35)
    write_yaml(
        folder / "config.yaml", {"data_folder": "data", "prediction_folder": "out", "trained_model": "model.ckpt"}
    )
    return folder


def configure(folder: Path, network: dict[str, Any] | None = None, **changes: Any) -> Configuration:
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
        "parameters": {"network": network or {}},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def pipeline_of_case() -> dict[str, Any]:
    """The golden case's two files as one."""
    lamella = golden.configuration(PIPELINE_CASE, "config_lamella_slicewise.yaml")
    semantic = golden.configuration(PIPELINE_CASE, "config_semantic.yaml")
    del semantic["mask_folder"]
    common = {key: lamella.pop(key) for key in ("data_folder", "file_extension", "test_files")}
    for values, name in ((lamella, "lamella"), (semantic, "semantic")):
        values.update(prediction_folder=f"out/{name}", save_internal_files=False)
    for key in common:
        del semantic[key]
    return {**common, "lamella": lamella, "semantic": semantic}
