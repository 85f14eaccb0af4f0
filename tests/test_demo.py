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
from PIL import Image

from cryosiam_dask.core.phantom import SHAPE

COMMAND = Path(sys.executable).with_name("cryosiam-dask")


def test_demo_finds_what_the_phantoms_hold(tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, "demo", "--output", tmp_path / "demo"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "demo" / "dice.json").read_text())
    assert set(scores) == {"phantom_1", "phantom_2"}
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
            assert file.attrs["voxel_size_angstrom"][0] == pytest.approx(14)


def test_demo_needs_a_folder_that_it_can_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [COMMAND, "demo", "--output", tmp_path / "file" / "demo"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "error: " in done.stderr and "--output" in done.stderr and "Traceback" not in done.stderr
