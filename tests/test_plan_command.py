"""The commands `plan` and `info`: by their entry point, and what they print on terminals of any width."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
from rich.console import Console

from cryosiam_dask.commands.plan import show_files, show_plan
from cryosiam_dask.errors import Problems
from cryosiam_dask.runs.ledger import read_outcomes
from support import checkpoints
from support.command import COMMAND, invoke

STAGES = ("lamella", "semantic")

SHAPE = (24, 20, 22)
LONG = "TS_of_a_very_long_name_[with brackets]_and ümlauts_9.96Apx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tomograms, one of them scaled otherwise, a checkpoint, and ``config.yaml`` with relative paths."""
    (tmp_path / "data").mkdir()
    for stem, scale in (("TS_1", 1), (LONG, 1000)):
        with mrcfile.new(tmp_path / "data" / f"{stem}.mrc") as mrc:
            mrc.set_data(scale * np.random.default_rng(0).random(SHAPE, np.float32))
            mrc.voxel_size = 9.96
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    write_yaml(tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_yaml(path: Path, **changes: Any) -> Path:
    values = {"data_folder": "data", "prediction_folder": "out", "trained_model": "model.ckpt", **changes}
    path.write_text(yaml.safe_dump(values))
    return path


def call(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        # Neither a terminal nor a GPU, and nothing that would tell how wide lines may be.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "60", "NO_COLOR": "1"},
    )
    assert done.returncode == status and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def printed(show: Any, path: Any, width: int | None = None, **options: Any) -> str:
    file = io.StringIO()
    terminal: dict[str, Any] = {"force_terminal": True, "width": width, "color_system": None} if width else {}
    show(path, Console(file=file, **terminal), **options)
    return file.getvalue()


def test_plan_by_its_entry_point(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = call("plan", "--config_file=config.yaml", "--workers", 1)
    assert sorted(folder.rglob("*")) == before
    assert LONG in done.stdout and "24 × 20 × 22" in done.stdout and not done.stderr
    assert f"warning, {LONG}: 0 % of its voxels lie below min 0 and 99.8 % above max 1, where" in done.stdout
    assert "writes, TS_1: out/TS_1_preds.h5" in done.stdout
    values = json.loads(call("plan", "--config-file", "config.yaml", "--filename", "TS_1.mrc", "--json").stdout)
    assert [t["stem"] for t in values["tomograms"]] == ["TS_1"] and values["problems"] == []
    assert values["tomograms"][0]["outputs"] == ["out/TS_1_preds.h5"]


def test_plan_lists_all_that_stands_in_the_way(folder: Path) -> None:
    (folder / "data" / "TS_1.mrc").write_bytes(b"\0" * 2000)
    with pytest.raises(Problems) as caught:  # of a run that cannot be planned, and of a header
        printed(show_plan, write_yaml(folder / "bad.yaml", trained_model="nowhere.ckpt", mask_folder="nowhere"))
    assert [word in str(caught.value) for word in ("nowhere.ckpt", "mask_folder", "TS_1.mrc")] == [True] * 3
    assert len(caught.value.problems) == 3
    done = call("plan", "--config-file", "config.yaml", status=1)  # of single tomograms, with what is said of others
    assert done.stderr.startswith("error: data/TS_1.mrc: ") and LONG in done.stdout and "refused" in done.stdout
    values = json.loads(printed(show_plan, folder / "bad.yaml", as_json=True))
    assert len(values["problems"]) == 3


def test_plan_of_a_configuration_that_cannot_be_read(folder: Path) -> None:
    file = io.StringIO()
    assert show_plan(folder / "nowhere.yaml", Console(file=file), as_json=True) == 2
    (problem,) = json.loads(file.getvalue())["problems"]
    assert "nowhere.yaml: does not exist" in problem


@pytest.fixture
def pipeline(folder: Path) -> Path:
    """``pipeline.yaml`` of two models for the tomograms of `folder`."""
    for name, classes in (("lamella", 1), ("semantic", 3)):
        checkpoints.write(folder / f"{name}.ckpt", replace(checkpoints.SMALL, out_channels=classes), seed=3)
    stages = {name: {"prediction_folder": f"out/{name}", "trained_model": f"{name}.ckpt"} for name in STAGES}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"data_folder": "data", **stages}))
    return folder


def test_plan_of_a_pipeline(pipeline: Path) -> None:
    before = sorted(pipeline.rglob("*"))
    done = call("plan", "--config-file", "pipeline.yaml")
    assert sorted(pipeline.rglob("*")) == before
    assert "masks that this run makes first" in done.stdout and "made first" in done.stdout and not done.stderr
    assert "writes, TS_1: out/lamella/TS_1_preds.h5, out/lamella/TS_1_preview.png" in done.stdout
    assert "writes, TS_1: out/semantic/TS_1_preds.h5, out/semantic/TS_1_preview.png" in done.stdout
    assert "no mask_folder is set" not in done.stdout
    assert "lamella.ckpt, 1 class " in done.stdout and "semantic.ckpt, 2 classes" in done.stdout  # and background
    values = json.loads(printed(show_plan, pipeline / "pipeline.yaml", as_json=True))
    lamella, semantic = (values["stages"][name] for name in STAGES)
    assert (lamella["classes"], semantic["classes"]) == (1, 3) and values["problems"] == []
    assert [t["mask_to_come"] for t in lamella["tomograms"]] == [False, False]
    assert [t["mask_to_come"] for t in semantic["tomograms"]] == [True, True]
    first, second = (stage["tomograms"][0]["work_bytes"] for stage in (lamella, semantic))
    assert second == first  # the tomogram is read where it is
    # If a copy is wanted, it is made once, for both.
    keeping = yaml.safe_load((pipeline / "pipeline.yaml").read_text()) | {"keep_work": True}
    (pipeline / "keeping.yaml").write_text(yaml.safe_dump(keeping))
    kept = json.loads(printed(show_plan, pipeline / "keeping.yaml", as_json=True))["stages"]
    first, second = (kept[name]["tomograms"][0]["work_bytes"] for name in STAGES)
    assert second - first == 4 * math.prod(SHAPE)
    (disk,) = values["disks"]
    every = [t for stage in (lamella, semantic) for t in stage["tomograms"]]
    assert disk["needed_bytes"] == sum(t["work_bytes"] + t["output_bytes"] for t in every)
    assert disk["folders"] == ["out/lamella", "out/semantic"]
    # What the disk is said to take is what a run takes at most.
    invoke("run", "--config-file", "pipeline.yaml", "--workers", 1, folder=pipeline)
    for t in every:
        taken = sum(Path(path).stat().st_size for path in (*t["outputs"], t["preview"]))
        assert taken < t["output_bytes"] + 20_000  # attributes
    again = json.loads(printed(show_plan, pipeline / "pipeline.yaml", as_json=True))
    assert {t["action"] for stage in again["stages"].values() for t in stage["tomograms"]} == {"skip"}
    # And how long it takes again, is what it took.
    again = json.loads(printed(show_plan, pipeline / "pipeline.yaml", as_json=True, overwrite_all=True, workers=1))
    outcomes = {name: read_outcomes(pipeline / "out" / name).values() for name in STAGES}
    for name in STAGES:
        took = sum(outcome["ended"] - outcome["began"] for outcome in outcomes[name])
        assert 0 < again["stages"][name]["seconds"] <= took * 1.001
    assert again["seconds"] == pytest.approx(sum(again["stages"][name]["seconds"] for name in STAGES))
    text = printed(show_plan, pipeline / "pipeline.yaml", overwrite_all=True, workers=1)
    assert re.search(r"time +│ about \d+ s, as fast as in the latest run, 2 tomograms on 1 cpu worker ", text)


def test_plan_of_a_pipeline_says_nothing_twice(pipeline: Path) -> None:
    text = printed(show_plan, pipeline / "pipeline.yaml")
    lines = [line for line in text.splitlines() if line[:1].isalpha() or " │ " in line]
    assert len(lines) == len(set(lines))
    assert text.count("99.8 % above max 1") == 1 and text.count("24 × 20 × 22") == 2
    kinds = [line.split(",")[0].split(":")[0] for line in lines if line[:1].isalpha()]
    assert kinds == [*["warning"] * kinds.count("warning"), *["writes"] * 4]  # first what one has to read
    assert "unknown before the first run with this model on this kind of device" in text
    # What only one model has to say, names it.
    values = yaml.safe_load((pipeline / "pipeline.yaml").read_text())
    values["semantic"]["parameters"] = {"data": {"patch_size": [32, 32, 32]}}
    (pipeline / "pipeline.yaml").write_text(yaml.safe_dump(values))
    assert "\nwarning, semantic: patch_size is [32, 32, 32]" in printed(show_plan, pipeline / "pipeline.yaml")
    text = printed(show_plan, pipeline / "pipeline.yaml", model="lamella", filename="TS_1")
    assert "out/lamella/TS_1_preds.h5" in text and "semantic" not in text
    with pytest.raises(Problems, match=r"does not exist: out/lamella .*Run the lamella prediction first"):
        printed(show_plan, pipeline / "pipeline.yaml", model="semantic")


def test_what_many_tomograms_share_is_printed_once(folder: Path) -> None:
    (folder / "data" / f"{LONG}.mrc").unlink()
    with mrcfile.open(folder / "data" / "TS_1.mrc", mode="r+") as mrc:
        mrc.set_data((10 * mrc.data).astype(np.int8))
    for number in range(2, 23):
        shutil.copy(folder / "data" / "TS_1.mrc", folder / "data" / f"TS_{number}.mrc")
    text = printed(show_plan, folder / "config.yaml")
    assert "\nwrites, <name>: out/<name>_preds.h5, out/<name>_preview.png (22 tomograms)\n" in text
    assert text.count("writes") == 1
    assert text.count("24 × 20 × 22") == 1 and len(re.findall(r"^│ TS_\d+ +│", text, re.MULTILINE)) == 22
    assert text.count("mode 0") == 1 and "\nnote, TS_1, TS_10, TS_11 and 19 others: mode 0 " in text


def test_a_trial_tells_the_time_and_writes_nothing(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryosiam_dask.commands.forecast.TRIAL_SECONDS", 0.0)
    before = sorted(pipeline.rglob("*"))
    values = json.loads(
        printed(show_plan, pipeline / "pipeline.yaml", as_json=True, trial=True, workers=1, device="cpu")
    )
    assert sorted(pipeline.rglob("*")) == before
    assert all(values["stages"][name]["seconds"] > 0 for name in STAGES)
    assert values["stages"]["lamella"]["pace"] == "as fast as in a trial of 0 s on cpu just now"


def test_plan_of_a_pipeline_lists_all_that_stands_in_its_way_once(pipeline: Path) -> None:
    (pipeline / "data" / "TS_1.mrc").write_bytes(b"\0" * 2000)
    done = call("plan", "--config-file", "pipeline.yaml", status=1)
    assert done.stderr.count("error: ") == 1 and done.stderr.startswith("error: data/TS_1.mrc: ")
    (pipeline / "semantic.ckpt").write_bytes(b"PK nothing")
    values = yaml.safe_load((pipeline / "pipeline.yaml").read_text())
    values["lamella"]["parameters"] = {"network": {"spatial_dims": 2}}
    (pipeline / "pipeline.yaml").write_text(yaml.safe_dump(values))
    problems = json.loads(printed(show_plan, pipeline / "pipeline.yaml", as_json=True))["problems"]
    # Nothing of the masks that would have come.
    assert [word in problems[i] for i, word in enumerate(("spatial_dims", "TS_1.mrc", "semantic.ckpt"))] == [True] * 3
    assert len(problems) == 3


def test_info_by_its_entry_point(folder: Path) -> None:
    done = call("info", f"data/{LONG}.mrc")
    assert f"data/{LONG}.mrc: MRC tomogram" in done.stdout and "24 × 20 × 22" in done.stdout
    values = json.loads(call("info", "model.ckpt", "--json").stdout)
    assert values["kind"] == "CryoSiam checkpoint"
    sha256 = values["facts"]["sha256"]
    assert sha256 in printed(show_files, [folder / "model.ckpt"])
    done = call("info", "nowhere.mrc", status=2)
    assert done.stderr == "error: nowhere.mrc: does not exist. Check the path.\n"
    done = call("info", "data/TS_1.mrc", "nowhere.mrc", "model.ckpt", "--json", status=2)
    assert [each["kind"] for each in json.loads(done.stdout)] == ["MRC tomogram", "CryoSiam checkpoint"]
    assert done.stderr.startswith("error: nowhere.mrc: ")
    text = printed(show_files, [folder / "data" / "TS_1.mrc", folder / "model.ckpt"])
    assert text.index("TS_1.mrc: MRC tomogram") < text.index("model.ckpt: CryoSiam checkpoint")


@pytest.mark.parametrize("width", [None, 30, 80, 200])
def test_no_value_is_cut_short(folder: Path, width: int | None) -> None:
    """Lines may be folded on a narrow terminal, but hold all that they hold elsewhere."""

    def letters(text: str) -> str:
        return "".join(character for character in text if character.isalnum() or character in "[]_.")

    with h5py.File(folder / "a_preds.h5", "w") as file:
        file["labels"] = np.zeros((9, 9, 9), np.uint8)
        file.attrs["source"] = LONG
        file.attrs["checkpoint_sha256"] = "0123456789abcdef" * 4
    text = printed(show_files, [folder / "a_preds.h5"], width)
    plan = printed(show_plan, folder / "config.yaml", width, filename=f"{LONG}.mrc")
    assert "…" not in text + plan
    if width is None:
        assert "0123456789abcdef" * 4 in text and text.count(LONG) == 1
        assert max(map(len, text.splitlines())) < 200
    elif width == 200:
        assert letters(LONG) in letters(text) and letters(f"writes, {LONG}: out/{LONG}_preds.h5") in letters(plan)


def test_a_file_that_says_nothing_of_itself_has_no_empty_box(folder: Path) -> None:
    with h5py.File(folder / "a_preds.h5", "w") as file:
        file["labels"] = np.zeros((9, 9, 9), np.uint8)
    text = printed(show_files, [folder / "a_preds.h5"], None)
    assert "9 × 9 × 9" in text and max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("command", ["plan", "info"])
def test_help_has_examples(command: str) -> None:
    assert f"cryosiam-dask {command} " in call(command, "--help").stdout.replace("\n", " ").replace("│", "")
