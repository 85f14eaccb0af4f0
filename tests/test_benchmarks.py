"""The benchmarks run, and find what they compare to be equal."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository's folder, and with that of the scripts on the path, as if one of them ran."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def script(name: str, *arguments: object) -> None:
    """Run a benchmark's script in this process, which has loaded what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")


def rows(name: str, output: Path, *options: str) -> list[dict[str, Any]]:
    script(name, *options, "--output", output)
    found: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return found


def test_components(tmp_path: Path) -> None:
    found = rows("bench_components", tmp_path / "rows.json", "--quick")
    assert [row["agrees"] for row in found if row["method"].startswith("here")] == [True] * 3


def test_node(tmp_path: Path) -> None:
    (row,) = rows("bench_node", tmp_path / "rows.json", "--quick")
    assert row["helpers"] == 1 and row["blocks"] == 16 and 0 < row["busy"] <= 1 and row["mvoxel_per_s"] > 0


def test_lamella(tmp_path: Path) -> None:
    (row,) = rows("bench_lamella", tmp_path / "rows.json", "--quick")
    assert row["lamella_voxels"] > 0.05 * 128**3 and {"smooth", "label", "find hulls"} <= row["steps"].keys()


def test_inference(tmp_path: Path) -> None:
    found = rows("bench_inference", tmp_path / "rows.json", "--quick")
    # The plain loop is CryoSiam's procedure written down once more: exact mode gives its labels.
    assert [row["agreement"] for row in found if row["method"] == "exact"] == [1.0, 1.0]
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size[0] > 500


def test_denoise(tmp_path: Path) -> None:
    found = rows("bench_denoise", tmp_path / "rows.json", "--quick")
    assert [row["method"] for row in found] == ["plain loop", "here", "three runs", "one pass"]
    # The plain loop is CryoSiam's procedure written down once more, and one pass gives the labels of three runs.
    assert found[1]["difference"] < 1e-4 and found[3]["difference"] == 0


def test_overhead(tmp_path: Path) -> None:
    found = rows("bench_overhead", tmp_path / "rows.json", "--quick")
    assert [row["method"] for row in found] == ["one process", "whole path", "whole path, slow network"]
    assert 0 < found[-1]["busy"] <= 1 and (tmp_path / "rows.png").exists()


def test_identity(tmp_path: Path) -> None:
    (row,) = rows("bench_identity", tmp_path / "rows.json", "--quick")
    assert row["chunks"] == 1000 and row["identity_seconds"] > 0


def test_agreement(tmp_path: Path) -> None:
    exact, elsewhere, *others = rows("bench_agreement", tmp_path / "rows.json", "--quick")
    assert exact["equal"] == 1 and 0.5 < elsewhere["equal"] < 1
    assert others and all(0.5 < row["equal"] <= 1 for row in others)


def test_scaling(tmp_path: Path) -> None:
    found = rows("bench_scaling", tmp_path / "rows.json", "--quick")
    assert [row["times"] for row in found] == [1, 2, 4, 8] and [row["speedup"] for row in found] == [1] * 4
    assert found[-1]["shape"] == [48, 48, 48] and (tmp_path / "rows.png").exists()


def test_collection(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench_collection.py", "--quick", "--output", tmp_path / "rows.json"]
    subprocess.run(command, check=True, capture_output=True)  # a process of its own, whose memory is measured
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["blocks"] == 48 <= row["blocks_computed"] and row["killed"] == 1
    assert 0 < row["busy"] <= row["busy_while_up"] <= 1 and 0 < row["seconds"] < 100
    assert 0 < row["scheduler_mb"][1] < row["client_mb"][1]  # which has imported PyTorch
    assert min(row["client_ms"], row["scheduler_ms"], row["workers_ms"]) > 0
    assert (tmp_path / "rows.png").exists()


def checked(output: Path, *options: str, status: int = 0, **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--output", output, "--fake", *options],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    path = output / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_the_checks_of_a_gpu(tmp_path: Path) -> None:
    """On faked ones; with them the tests that a GPU is needed for."""
    correct = ("--part", "correct", "--only", "machine", "tests of a gpu")
    (tmp_path / "file").touch()
    assert checked(tmp_path / "file" / "output", *correct, status=2) == []
    assert checked(tmp_path, *correct, "--seconds", "0", status=3) == []
    found = checked(tmp_path, *correct)
    assert [row["status"] for row in found if "status" in row] == ["ok", "ok"] and found[0]["gpu"] == "Fake GPU"
    assert checked(tmp_path, *correct) == found  # what is done is not done again
    harm = ("--part", "harm", "--only", "little memory")
    *_, row = checked(tmp_path, *harm, status=1, FAKE_VOXELS="1")
    assert row["status"] == "failed" and "must fit into the GPU's memory" in row["why"] and row["fake"] is True
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": ')  # a kill cut it off
    *_, first, _, row = checked(tmp_path, *harm)
    assert first["case"] == "10%" and row["status"] == "ok"


def test_the_page_on_scale_says_what_was_measured(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    (result,) = set(re.findall(r"benchmarks/results/[\w.-]+\.json", page)) - {"benchmarks/results/scaling-2-cores.json"}
    (tmp_path / "scale.md").write_text(re.sub(r"\| [\d.]+ m?s \|", "| ? |", page))
    script("bench_collection", "--page", tmp_path / "scale.md", result)
    tables = re.compile(r"(?<=<!-- tables -->).*(?=<!-- end of tables -->)", re.DOTALL)
    assert tables.findall((tmp_path / "scale.md").read_text()) == tables.findall(page) != []


def test_report(tmp_path: Path) -> None:
    (row,) = rows("bench_report", tmp_path / "rows.json", "--quick")
    assert row["tomograms"] == 4 and 0 < row["megabytes"] < 20


def test_halo(tmp_path: Path) -> None:
    script("bench_halo", "--quick", "--output", tmp_path / "halo.json")
    assert json.loads((tmp_path / "halo.json").read_text())


def test_outputs(tmp_path: Path) -> None:
    preview, image, run = rows("bench_outputs", tmp_path / "rows.json", "--quick")
    assert (preview["method"], image["method"], run["method"]) == ("preview", "ome-zarr", "run")
    # The voxels do not compress: their two levels at the least.
    assert image["written_bytes"] > 150**3 * (1 + 1 / 8) and preview["files"] == 1
    assert 0 < run["preview_share"] < 1
