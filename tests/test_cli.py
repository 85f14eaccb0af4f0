"""The command line: by its real entry point, in processes of its own, where these matter."""

from __future__ import annotations

import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
import zarr

from cryosiam_dask import __version__
from cryosiam_dask.core.grid import block_size_for, make_grid
from support import golden
from support.command import COMMAND, call, invoke, start
from support.inputs import BLOCK_SIZE, LARGE, make_folder, write_tomogram, write_yaml

LAMELLA = golden.FOLDER / "lamella_then_semantic"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def predicted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a larger third tomogram, and in ``whole`` what a run makes of all of them."""
    folder = make_folder(tmp_path_factory.mktemp("predicted"))
    values = yaml.safe_load((folder / "config.yaml").read_text())
    write_yaml(folder / "config.yaml", {**values, "block_size": BLOCK_SIZE})
    (folder / "data" / "TS_2.mrc").unlink()
    write_tomogram(folder / "data" / "TS_2.mrc", 1, LARGE)
    # In a batch job without UTF-8 whose log is on a full disk.
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with Path("/dev/full").open("w") as full:
        subprocess.run(
            [COMMAND, "semantic-predict", "--config-file", "config.yaml", "--workers", "1"],
            cwd=folder, env=environment, stdout=full, stderr=full, check=True,
        )  # fmt: skip
    assert (folder / "out" / "report.html").exists()
    (folder / "out").rename(folder / "whole")
    return folder


@pytest.fixture
def predicted(predicted_once: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test; times of files, by which a run knows its input, are copied as well."""
    return shutil.copytree(predicted_once, tmp_path, dirs_exist_ok=True)


#: What Linux has and macOS has not.
WITHOUT_LINUX = """
import os, pathlib
for name in ("sched_getaffinity", "sched_setaffinity", "pidfd_open", "posix_fadvise", "posix_fallocate", "fdatasync",
             "memfd_create", "copy_file_range", "splice", "getxattr", "setxattr", "listxattr"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("read_text", "read_bytes", "readlink", "open"):
    def refuse(self, *arguments, _method=getattr(pathlib.Path, name), **options):
        if str(self).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return _method(self, *arguments, **options)
    setattr(pathlib.Path, name, refuse)
"""


def test_what_cannot_be_printed_ends_no_command(folder: Path) -> None:
    def tell(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        found = subprocess.run([COMMAND, *command], cwd=folder, stderr=subprocess.PIPE, text=True, **options)
        assert found.returncode == 0 and not found.stderr, found
        return found

    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    text = tell("info", "data/TS_0.mrc", env=ascii_only, stdout=subprocess.PIPE).stdout
    assert "24 x 20 x 22" in text and "voxel size (A)" in text and "\\" not in text
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    tell("plan", "--config-file", "config.yaml", stdout=writer)
    os.close(writer)
    with Path("/dev/full").open("w") as full:
        tell("status", "--config-file", "config.yaml", stdout=full)
    tell("status", "--config-file", "config.yaml", "--json", preexec_fn=lambda: os.close(1))


def test_the_main_job_with_cryosiams_own_files_and_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lamella, then semantic model inside it, on two workers: what CryoSiam wrote, voxel for voxel; as on macOS."""
    folder = tmp_path / "case"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_LINUX)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    shutil.copytree(LAMELLA, folder)
    expected = golden.expected(LAMELLA.name)
    # Distances are compared elsewhere and would double the time here.
    for name in ("config_lamella_slicewise.yaml", "config_semantic.yaml"):
        values = golden.configuration(LAMELLA.name, name)
        write_yaml(folder / name, {**values, "save_internal_files": False})
    output = call("semantic_predict", "--config_file=config_lamella_slicewise.yaml", "--workers=2", folder=folder)
    assert re.search(r"TS_a_6.80Apx\W+done\W+72 × 88 × 80", output)
    output = call(
        "semantic_predict", "--config_file", "config_semantic.yaml", "--workers", 1, "--device", "cpu", folder=folder
    )
    counts = np.bincount(expected["semantic"].ravel(), minlength=4)
    assert all(f" {n:,} (" in output for n in counts[1:] if n)
    found = {}
    for stage in ("lamella_slicewise", "semantic"):
        with h5py.File(folder / stage / "TS_a_6.80Apx_preds.h5") as file:
            found[stage] = {name: file[name][:] for name in file}
        assert sorted(path.name for path in (folder / stage).iterdir()) == [
            ".ledger", "TS_a_6.80Apx_preds.h5", "TS_a_6.80Apx_preview.png", "logs", "report.html",
        ]  # fmt: skip
    np.testing.assert_array_equal(found["lamella_slicewise"]["labels"], expected["lamella_slicewise"])
    np.testing.assert_array_equal(found["semantic"]["labels"], expected["semantic"])
    before = found["semantic"]["labels"] + found["semantic"]["removed"]
    np.testing.assert_array_equal(before, expected["semantic_before_sizes"])


def test_run_skip_overwrite_and_postprocess(folder: Path) -> None:
    one = ("--config-file", "config.yaml", "--filename", "TS_1.mrc", "--timeline")
    output = call("semantic-predict", *one, "--workers", 1, folder=folder)
    assert "dashboard http://127.0.0.1:" in output and "1 tomogram on " in output
    assert output.count("warning: no mask_folder is set: expect false positives outside the lamella") == 1
    assert "expect false positives outside the lamella" in (folder / "out" / "report.html").read_text()
    of_one = {".ledger", "TS_1_preds.h5", "TS_1_preview.png", "TS_1_timeline.png", "logs", "report.html"}
    assert {path.name for path in (folder / "out").iterdir()} == of_one
    before = (folder / "out" / "TS_1_preds.h5").read_bytes()
    output = invoke("semantic-predict", "--config-file", "config.yaml", "--workers", 1, folder=folder)
    assert "TS_1: skipped, out/TS_1_preds.h5 was made from the same input" in output
    outputs = of_one | {f"TS_{i}_{ending}" for i in (0, 2) for ending in ("preds.h5", "preview.png")}
    assert {path.name for path in (folder / "out").iterdir()} == outputs
    values = yaml.safe_load((folder / "config.yaml").read_text())
    write_yaml(folder / "other.yaml", {**values, "parameters": {"network": {"threshold": 0.45}}})
    output = invoke("semantic-predict", "--config-file", "other.yaml", folder=folder, status=2)
    assert output.count("Replace it with --overwrite") == 3
    assert (folder / "out" / "TS_1_preds.h5").read_bytes() == before
    sizes = {"parameters": {"network": {"postprocessing_sizes": [-1, 10**6, -1]}}}
    write_yaml(folder / "sizes.yaml", {**values, **sizes})
    output = invoke("semantic_postprocess", "--config_file=sizes.yaml", "--workers=1", folder=folder)
    assert output.count(" done ") >= 3
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        assert not (file["labels"][:] == 1).any() and (file["removed"][:] == 1).any()
    assert invoke("semantic-predict", "--config-file", "sizes.yaml", folder=folder).count("skipped, ") == 3
    (folder / "out" / "report.html").unlink()
    assert "report: out/report.html" in invoke("report", "--config-file", "sizes.yaml", folder=folder)
    text = (folder / "out" / "report.html").read_text()
    assert all(f"<bdi>TS_{i}</bdi>" in text for i in range(3)) and text.count("data:image/webp;base64,") == 3


def test_the_largest_patch_is_chosen_by_trying(folder: Path) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    write_yaml(folder / "auto.yaml", {**values, "parameters": {"data": {"patch_size": "auto"}}})
    arguments = ("--config-file", "auto.yaml", "--filename", "TS_1.mrc", "--workers", 1)
    output = invoke("semantic-predict", *arguments, folder=folder)
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        patch = file.attrs["patch_size"].tolist()
        # As long as the tomogram needs it, since that fits into any memory.
        assert patch == [max(16, -(-size // 8) * 8) for size in file["labels"].shape]
    assert f"patch_size {patch} is the largest that fits" in output
    # With the same patch written down, that is the same result.
    write_yaml(folder / "same.yaml", {**values, "parameters": {"data": {"patch_size": patch}}})
    assert "skipped, " in invoke("semantic-predict", "--config-file", "same.yaml", "--filename", "TS_1", folder=folder)


def test_a_report_needs_predictions(folder: Path) -> None:
    output = invoke("report", "--config-file", "config.yaml", folder=folder, status=2)
    assert "error: key prediction_folder: there must be predictions to report" in output
    assert not (folder / "out").exists()


def test_a_patch_larger_than_the_memory_is_refused_with_numbers(folder: Path) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    write_yaml(folder / "large.yaml", {**values, "parameters": {"data": {"patch_size": [8192, 8192, 8192]}}})
    output = invoke("semantic-predict", "--config-file", "large.yaml", "--device", "cpu", folder=folder, status=2)
    message = " ".join(output.split())
    assert re.search(r"must fit into the memory.*about \d+ GB for patch_size \[8192, 8192, 8192\].*of \d+ GB", message)
    assert not (folder / "out").exists()


def test_failed_tomograms_give_status_1_and_the_others_are_done(folder: Path) -> None:
    (folder / "data" / "TS_0.mrc").write_bytes(b"\0" * 3000)
    with (folder / "data" / "TS_2.mrc").open("r+b") as file:
        file.truncate(5000)
    output = invoke("semantic-predict", "--config-file", "config.yaml", "--workers", 1, folder=folder, status=1)
    assert "failed, TS_0: " in output and "failed, TS_2: " in output and "5000" in output
    written = sorted(path.name for path in (folder / "out").iterdir())
    assert written == [".ledger", "TS_1_preds.h5", "TS_1_preview.png", "logs", "report.html"]


def test_every_fault_of_a_configuration_at_once_and_nothing_made(folder: Path) -> None:
    write_yaml(folder / "bad.yaml", {"data_folder": "nowhere", "prediction_folder": "out", "trained_modell": "m.ckpt"})
    output = invoke("semantic-predict", "--config-file", "bad.yaml", folder=folder, status=2)
    assert output.count("error: ") == 3 and "Did you mean trained_model?" in output
    write_yaml(folder / "bad.yaml", {"data_folder": "nowhere", "prediction_folder": "out", "trained_model": "m.ckpt"})
    output = invoke("semantic-predict", "--config-file", "bad.yaml", folder=folder, status=2)
    assert output.count("error: ") == 2 and "does not exist: nowhere (relative to" in output and "m.ckpt" in output
    assert not (folder / "out").exists()


def test_a_gpu_that_is_not_there_is_an_error(folder: Path) -> None:
    options = {"env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}
    process = subprocess.run(
        [COMMAND, "semantic-predict", "--config-file", "config.yaml", "--device", "cuda"],
        cwd=folder, capture_output=True, text=True, **options,
    )  # fmt: skip
    assert process.returncode == 2
    assert "error: device cuda was requested" in process.stderr and "--device cpu" in process.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_leaves_nothing_half_written_and_goes_on(predicted: Path, number: signal.Signals) -> None:
    folder = predicted
    command = ("semantic-predict", "--config-file", "config.yaml", "--workers", 1)
    process = start(*command, folder=folder, start_new_session=True)
    ledger, others = (
        folder / "out" / ".ledger" / "TS_2.jsonl",
        [folder / "out" / f"TS_{i}_{ending}" for i in (0, 1) for ending in ("preds.h5", "preview.png")],
    )
    # until only the last one is left, and is being predicted
    while not (ledger.exists() and b'"what":"block"' in ledger.read_bytes() and all(map(Path.exists, others))):
        assert process.poll() is None
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends Ctrl-C to the whole group, workers included,
        time.sleep(0.1)
        os.killpg(process.pid, number)  # and people press it twice
    else:
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=200)
    if number == signal.SIGINT:
        assert process.returncode == 130, out + err
        kept = "complete outputs are kept, nothing is half-written"
        assert err.strip() == f"interrupted: {kept}; repeat the command to resume"
    else:
        assert process.returncode == 75, out + err
        assert err.strip() == "stopped: repeat the command to resume"
        assert re.search(r"TS_2\W+left", out)
    left = sorted(path.name for path in (folder / "out").iterdir())
    report = ["report.html"] * (number != signal.SIGINT)
    assert left == [".ledger", *(path.name for path in sorted(others)), "TS_2.work.zarr", "logs", *report]
    ledgers = [*(f"TS_{i}.jsonl" for i in range(3)), "report"]
    assert sorted(path.name for path in (folder / "out" / ".ledger").iterdir()) == ledgers
    done = ledger.read_bytes().count(b'"what":"block"')
    output = invoke(*command, folder=folder)
    assert "TS_0: skipped" in output and "TS_1: skipped" in output
    size = block_size_for(LARGE, (16, 16, 16), BLOCK_SIZE, 1)
    blocks = len(make_grid(LARGE, (16, 16, 16), size).indices())
    assert f"TS_2: {done} of {blocks} blocks are already done" in output
    outputs = [f"TS_{i}_{ending}" for i in range(3) for ending in ("preds.h5", "preview.png")]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [".ledger", *outputs, "logs", "report.html"]
    for name in outputs:
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_disk_that_is_full_is_said_and_leaves_nothing(folder: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses the write in either case."""
    write_tomogram(folder / "data" / "TS_3.mrc", 3, (60, 60, 60))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    arguments = ("--config-file", "copied.yaml", "--workers", 1)
    (folder / "copied.yaml").write_text((folder / "config.yaml").read_text() + "\nwork_folder: work\n")
    output = call("semantic-predict", *arguments, folder=folder, status=1, preexec_fn=limit)
    assert "failed, TS_3: " in output and "File too large" in output
    # Pictures are larger here, and no reason for a tomogram to fail.
    assert re.search(r"warning, .*TS_1.*: its picture TS_0_preview.png could not be drawn: .*File too large", output)
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        ".ledger", *(f"TS_{i}_preds.h5" for i in range(3)), "logs", "report.html",
    ]  # fmt: skip
    assert not list((folder / "work").iterdir())


def test_components_and_particle_lists(predicted: Path) -> None:
    folder = predicted
    (folder / "whole").rename(folder / "out")
    output = invoke("components", "--config-file", "config.yaml", "--workers", 1, folder=folder)
    assert output.count(" done ") >= 3
    with (folder / "out" / "components.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["tomogram"] for row in rows} == {"TS_0", "TS_1", "TS_2"}
    with h5py.File(folder / "out" / "TS_1_components.h5") as file:
        assert file["instances"][:].max() == sum(row["tomogram"] == "TS_1" for row in rows)
    arguments = ("--config_file=config.yaml", "--min_voxels=2", "--erode", "--workers=1", "--filename=TS_1.mrc")
    assert "particles: class 1: " in invoke("semantic_to_centers", *arguments, folder=folder)
    names = {path.name for path in (folder / "out").glob("*.star")}
    assert {"TS_1_class1_centers.star", "class1_centers.star"} <= names and not any("TS_0" in name for name in names)
    output = invoke("components", "--config-file", "config.yaml", "--filename", "TS_9.mrc", folder=folder, status=2)
    assert "Run semantic-predict first" in output


def test_convert(folder: Path) -> None:
    output = invoke("convert", "data/TS_0.mrc", "TS_0.zarr", "--workers", 1, folder=folder)
    assert "24 × 20 × 22 (z, y, x), float32" in output and "intensities " in output
    with mrcfile.open(folder / "data" / "TS_0.mrc") as mrc:
        np.testing.assert_array_equal(zarr.open_array(folder / "TS_0.zarr", mode="r")[:], mrc.data)
    output = invoke("convert", "data/TS_0.mrc", "TS_0.zarr", folder=folder, status=2)
    assert "error: " in output and "--overwrite" in output
    for name in ("x.mrc", "x.zarr.zip", "x.ome.zarr.gz"):
        output = invoke("convert", "data/TS_0.mrc", name, folder=folder, status=2)
        assert f"{name}: the name of a converted tomogram must end with .zarr" in output
        assert "Use x.zarr, or x.ome.zarr" in output
        assert not (folder / name).exists()
    assert "TS_9.mrc" in invoke("convert", "TS_9.mrc", "x.zarr", folder=folder, status=2)
    assert not (folder / "x.zarr").exists()


def test_version_help_and_wrong_usage(tmp_path: Path) -> None:
    assert call("--version", folder=tmp_path).strip() == __version__
    output = call("--help", folder=tmp_path)
    assert all(
        name in output
        for name in (
            "semantic-predict",
            "semantic-postprocess",
            "components",
            "semantic-to-centers",
            "export",
            "report",
            "convert",
            "demo",
        )
    )
    assert "--config-file" in invoke("semantic_predict", "--help", folder=tmp_path)
    assert "No such command" in invoke("semantic-predicd", folder=tmp_path, status=2)
    assert "--config-file" in invoke("semantic-predict", folder=tmp_path, status=2)
    output = invoke("semantic-predict", "--config-file", "none.yaml", folder=tmp_path, status=2)
    assert "error: none.yaml: does not exist. Check the name" in output
