"""The demo, by its real entry point: raw phantoms in, denoised ones, segmentations, scores and pictures out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
from PIL import Image

from cryosiam_dask.commands.demo import SEEDS
from cryosiam_dask.core.phantom import SHAPE, dice, make_phantom
from support.command import call
from support.inputs import write_yaml

COMMAND = Path(sys.executable).with_name("cryosiam-dask")
LABELS = Path(__file__).parent / "data" / "demo" / "labels.npz"


def test_demo_finds_what_the_phantoms_hold(tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, "demo", "--output", tmp_path / "demo"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "demo" / "dice.json").read_text())
    assert set(scores) == {"phantom_1", "phantom_2"}
    with np.load(LABELS) as stored:
        labels = dict(stored)
    for stem, found in scores.items():
        assert all(f"{score:.3f}" in done.stdout for score in found.values())
        assert found["lamella"] >= 0.9
        assert min(found["membrane"], found["particle"], found["microtubule"]) >= 0.7
        assert found["filament"] >= 0.6
        with Image.open(tmp_path / "demo" / f"{stem}.png") as picture:
            assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 100
        with mrcfile.open(tmp_path / "demo" / "raw" / f"{stem}.mrc") as raw:
            assert raw.data.dtype == np.int16 and raw.data.max() == 30000  # a hot voxel
        with h5py.File(tmp_path / "demo" / "semantic" / f"{stem}_preds.h5") as file:
            assert file["labels"].shape == SHAPE
            assert np.mean(file["labels"][()] == labels[stem]) > 0.999
            assert file.attrs["voxel_size_angstrom"][0] == pytest.approx(14)
    find_what_phantoms_without_the_noise_of_raw_ones_hold(tmp_path)


def find_what_phantoms_without_the_noise_of_raw_ones_hold(folder: Path) -> None:
    """The demo's models for lamella and classes on phantoms such as they were trained on."""
    pipeline = yaml.safe_load((folder / "demo" / "pipeline.yaml").read_text())
    del pipeline["denoise"]
    pipeline["data_folder"] = str(folder / "phantoms")
    for model in ("lamella", "semantic"):
        pipeline[model]["prediction_folder"] = str(folder / model)
    write_yaml(folder / "phantoms.yaml", pipeline)
    (folder / "phantoms").mkdir()
    for stem, seed in SEEDS.items():
        with mrcfile.new(folder / "phantoms" / f"{stem}.mrc") as mrc:
            mrc.set_data(make_phantom(seed).tomogram)
    call("run", "phantoms.yaml", folder=folder)
    for stem, seed in SEEDS.items():
        phantom, found = make_phantom(seed), {}
        for model in ("lamella", "semantic"):
            with h5py.File(folder / model / f"{stem}_preds.h5") as file:
                found[model] = file["labels"][:]
        membrane, particle, filament, microtubule = dice(found["semantic"], phantom.truth, 5)[1:]
        assert min(dice(found["lamella"], phantom.lamella, 2)[1], membrane, particle) >= 0.8
        assert min(filament, microtubule) >= 0.6


def test_demo_needs_a_folder_that_it_can_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [COMMAND, "demo", "--output", tmp_path / "file" / "demo"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "error: " in done.stderr and "--output" in done.stderr and "Traceback" not in done.stderr
