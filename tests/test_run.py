"""Both models in one pass, on a cluster that was there before; and how far a collection is."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cryosiam_dask.cli import app
from cryosiam_dask.commands.console import print_table
from cryosiam_dask.commands.segment import _warn_about_intensities
from cryosiam_dask.commands.status import print_overview, seconds_left, states
from cryosiam_dask.config import Configuration, read_configuration, read_model, read_models, read_pipeline
from cryosiam_dask.errors import ConfigurationError, Problems
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import plan_run
from support import checkpoints, golden
from support.command import call, invoke
from support.inputs import PIPELINE_CASE as CASE
from support.inputs import pipeline_of_case

STAGES = ("lamella", "semantic")

BIN = Path(sys.executable).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    shutil.copytree(golden.FOLDER / CASE, folder)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline_of_case()))
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A scheduler and two workers as a user starts them; gives the scheduler's file and its process."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    options: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    where = ("--host", "127.0.0.1", "--no-dashboard")
    scheduler = subprocess.Popen(
        [BIN / "dask", "scheduler", *where, "--port", "0", "--scheduler-file", file], **options
    )
    while not file.exists():
        assert scheduler.poll() is None
        time.sleep(0.05)
    command = [BIN / "dask", "worker", "--scheduler-file", file, "--nworkers", "2", "--nthreads", "4", *where]
    workers = subprocess.Popen(command, **options)
    yield file, scheduler
    for process in (workers, scheduler):
        process.send_signal(signal.SIGCONT)
        process.terminate()
    for process in (workers, scheduler):
        process.wait(30)


def test_one_pass_on_a_cluster_gives_what_cryosiam_gave(folder: Path, cluster: tuple[Path, Any]) -> None:
    output = call(
        "run", "--config-file", "pipeline.yaml", "--scheduler-file", cluster[0], "--workers", 2, "--performance-report",
        "performance.html", folder=folder,
    )  # fmt: skip
    assert "loading the networks" in output and "1 tomogram on 2 cpu workers" in output
    lines = [line for line in output.splitlines() if re.match(r"\d\d:\d\d:\d\d TS_a_6.80Apx: ", line)]
    assert len(lines) <= 3 and re.search(r": lamella: done in .*; semantic: done in ", lines[-1])
    expected = golden.expected(CASE)
    for name, key in (("lamella", "lamella_slicewise"), ("semantic", "semantic")):
        with h5py.File(folder / "out" / name / "TS_a_6.80Apx_preds.h5") as file:
            np.testing.assert_array_equal(file["labels"][:], expected[key])
        assert not list((folder / "out" / name).glob("*.work.zarr"))
    page = (folder / "performance.html").read_text()
    assert "predict" in page and not re.search(r"<script[^>]* src=", page)  # nothing that is elsewhere
    # Whoever runs the models one by one finds them done.
    values = yaml.safe_load((folder / "pipeline.yaml").read_text())
    single = {**{key: values[key] for key in ("data_folder", "file_extension")}, **values["semantic"]}
    (folder / "single.yaml").write_text(yaml.safe_dump({**single, "mask_folder": "out/lamella"}))
    assert "skipped" in invoke("semantic-predict", "--config-file", "single.yaml", folder=folder)
    # The lamella made again is the same, and so what was made inside it stays.
    (folder / "out" / "lamella" / "TS_a_6.80Apx_preds.h5").unlink()
    before = (folder / "out" / "semantic" / "TS_a_6.80Apx_preds.h5").stat().st_mtime_ns
    output = call("run", "--config-file", "pipeline.yaml", "--scheduler-file", cluster[0], folder=folder)
    assert "lamella: done" in output and "semantic: already done" in output
    assert "warning: tcp://127.0.0.1:" in output and "has no TLS: every user of this machine can run" in output
    assert (folder / "out" / "semantic" / "TS_a_6.80Apx_preds.h5").stat().st_mtime_ns == before
    assert invoke("status", "--config-file", "pipeline.yaml", folder=folder).strip() == "1 tomogram, 2 models: 2 done"


def test_a_cluster_that_does_not_fit_is_an_error(folder: Path, cluster: tuple[Path, Any], tmp_path: Path) -> None:
    def fails(*options: object) -> str:
        return " ".join(invoke("run", "--config-file", "pipeline.yaml", *options, folder=folder, status=2).split())

    assert "a Dask scheduler must respond; found none" in fails("--scheduler", "tcp://127.0.0.1:1")
    assert "a Dask scheduler must respond" in fails("--scheduler", "nonsense://x")
    assert "must be a file that 'dask scheduler --scheduler-file' wrote" in fails("--scheduler-file", "none.json")
    (tmp_path / "other.json").write_text("[]")
    assert "must be a file that 'dask scheduler" in fails("--scheduler-file", tmp_path / "other.json")
    message = fails("--scheduler-file", cluster[0], "--device", "cuda", "--worker-timeout", 0.02)
    assert "device cuda was requested" in message and "workers without GPUs" in message
    assert not list(folder.glob("out/*/*.h5"))


def test_a_scheduler_that_goes_away_leaves_what_was_done(tmp_path: Path, cluster: tuple[Path, Any]) -> None:
    """Last, as it takes the cluster with it."""
    (tmp_path / "data").mkdir()
    with mrcfile.new(tmp_path / "data" / "TS.mrc") as mrc:
        mrc.set_data(np.random.default_rng(0).random((40, 60, 60), np.float32))
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    values = {"data_folder": "data", "prediction_folder": "out", "trained_model": "model.ckpt", "block_size": 24}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    file, scheduler = cluster
    command = [BIN / "cryosiam-dask", "semantic-predict", "--config-file", "config.yaml", "--scheduler-file", file]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ledger = tmp_path / "out" / ".ledger" / "TS.jsonl"
    while not (ledger.exists() and b'"block"' in ledger.read_bytes()):
        assert process.poll() is None
        time.sleep(0.01)
    scheduler.kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    assert (
        "the scheduler must keep running until the run ends" in " ".join(output.split()) and "Traceback" not in output
    )
    found = states(read_configuration(tmp_path / "config.yaml").model_copy(
        update={key: tmp_path / values[key] for key in ("data_folder", "prediction_folder")}
    ))  # fmt: skip
    assert [(state.state, state.blocks > 0) for state in found] == [("stopped", True)]
    output = invoke("semantic-predict", "--config-file", "config.yaml", "--workers", 1, folder=tmp_path)
    assert " blocks are already done" in output and (tmp_path / "out" / "TS_preds.h5").exists()


# ------------------------------------------------------------------------------------------------------------- the file


def test_every_fault_of_a_pipeline_at_once(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("lamella: {}\nsemantic:\n")
    with pytest.raises(Problems, match=r"key semantic: a pipeline needs the keys of this model"):
        read_pipeline(tmp_path / "p.yaml")
    one = {"prediction_folder": "a", "trained_model": "m.ckpt", "data_folder": "d"}
    faulty = {"lamella": {**one, "thresold": 1}, "semantic": {**one, "parameters": {"network": {"threshold": 7}}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(faulty))
    with pytest.raises(Problems) as error:
        read_pipeline(tmp_path / "p.yaml")
    text = str(error.value)
    assert "p.yaml, lamella, key thresold" in text and "p.yaml, semantic, key parameters.network.threshold" in text
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({"lamella": one, "semantic": {**one, "data_folder": "other", "mask_folder": "elsewhere"}})
    )
    with pytest.raises(Problems) as error:
        read_pipeline(tmp_path / "p.yaml")
    text = str(error.value)
    assert all(f"key semantic.{key}:" in text for key in ("data_folder", "mask_folder", "prediction_folder"))
    above = {"data_folder": "d", "file_extension": "mrc", "lamela": {}}
    models = {name: {"prediction_folder": name, "trained_model": f"{name}.ckpt"} for name in STAGES}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**above, **models}))
    with pytest.raises(Problems) as error:  # each once, where it stands
        read_pipeline(tmp_path / "p.yaml")
    assert [problem.place.removeprefix(f"{tmp_path}/p.yaml, ") for problem in error.value.problems] == [
        "key file_extension", "key lamela", "key data_folder", "lamella, key trained_model",
        "semantic, key trained_model",
    ]  # fmt: skip
    assert "Did you mean lamella?" in str(error.value)


def test_the_example_is_read() -> None:
    found = read_pipeline(Path(__file__).parents[1] / "configs" / "pipeline.yaml")
    assert list(found) == ["lamella", "semantic"]
    assert found["semantic"].mask_folder == found["lamella"].prediction_folder
    assert found["lamella"].parameters.network.postprocessing


def test_a_model_of_a_file_of_either_kind(tmp_path: Path) -> None:
    stages = {name: {"prediction_folder": name, "trained_model": "m", "work_folder": "w"} for name in STAGES}
    file = tmp_path / "p.yaml"

    def write(*names: str) -> None:
        file.write_text(yaml.safe_dump({"data_folder": "d", **{name: stages[name] for name in names}}))

    write(*STAGES)
    assert list(read_models(file)) == list(STAGES) and list(read_models(file, "lamella")) == [""]
    last = read_model(file)
    assert last == read_model(file, "semantic") == read_pipeline(file)["semantic"]
    assert (last.mask_folder, last.work_folder, last.place) == (
        Path("lamella"),
        Path("w/semantic"),
        f"{file}, semantic",
    )
    for name, remedy in (
        ("Lamela", "Did you mean lamella"),
        ("SEMANTIC", "Did you mean semantic"),
        ("x", "Correct it"),
    ):
        with pytest.raises(ConfigurationError, match=rf"p.yaml, lamella or semantic; found {name}\. {remedy}"):
            read_model(file, name)
    for name in STAGES:  # of which one has been left out
        write(name)
        assert list(read_models(file)) == [""]
        assert read_model(file).prediction_folder == read_model(file, name).prediction_folder == Path(name)
        assert read_model(file).mask_folder is None
    with pytest.raises(
        ConfigurationError, match=r"one of the models in .*p.yaml, semantic; found lamella\. Correct it"
    ):
        read_model(file, "lamella")
    file.write_text(yaml.safe_dump({"data_folder": "d", **stages["lamella"]}))
    assert read_model(file).work_folder == Path("w")
    with pytest.raises(ConfigurationError, match=r"option --model: is for files of several .*found lamella\. Leave it"):
        read_model(file, "lamella")


WITH_CONFIGURATION = [
    name for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if {"config_file", "model"} <= {param.name for param in command.params}
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_CONFIGURATION)
def test_every_command_takes_the_file_of_a_pipeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {each: {"prediction_folder": f"out/{each}", "trained_model": "m"} for each in STAGES}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"data_folder": "nowhere", "output_formats": ["mrc"], **models}))
    monkeypatch.chdir(tmp_path)

    def fails(*arguments: str) -> str:
        result = CliRunner().invoke(app, [name, *arguments])
        assert result.exit_code == 2 and not result.stdout, result.output
        return result.stderr

    assert "Did you mean lamella?" in fails("p.yaml", "--model", "lamela")
    assert fails("p.yaml") == fails("--config-file", "p.yaml") == fails("--config_file=p.yaml")
    if name != "view":  # which asks for napari before it looks at the files
        assert "nowhere" in fails("p.yaml") or "out/semantic" in fails("p.yaml")
        assert "nowhere" in fails("p.yaml", "--model=lamella") or "out/lamella" in fails("p.yaml", "--model=lamella")
    for arguments in (("p.yaml", "q.yaml"), ("p.yaml", "--config-file", "q.yaml")):
        assert "takes one configuration file; also found" in " ".join(fails(*arguments).split())
    assert "--config-file" in fails()


# ----------------------------------------------------------------------------------------------------------- the status


def test_status_tells_states_and_time_left(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    names = ("a", "b", "c", "d", "e", "f", "g")
    for name in names:
        (tmp_path / "data" / f"{name}.mrc").write_bytes(b"")
    out = tmp_path / "out"
    for i, name in enumerate("ab"):
        (out / f"{name}_preds.h5").write_bytes(b"")
        Ledger(out, name).close(status="done", seconds=10.0, began=100.0 + 5 * i, ended=110.0 + 5 * i, run="r")
    Ledger(out, "c").close(status="failed", seconds=1.0, error="c.mrc: is broken.", run="r")
    running = Ledger(out, "d")
    running.append("store", token="t")
    for key, count in (("of other settings", 3), ("now", 1)):
        running.append("blocks", key=key)
        for i in range(count):
            running.append("block", index=[0, 0, i])
    (out / ".ledger" / "d.claim").write_text(json.dumps({"host": "node7", "boot": "x", "process": 12, "token": "t"}))
    stopped = Ledger(out, "e")
    stopped.append("store", token="t")
    (out / ".ledger" / "f.jsonl").write_text("rubbish\nrubbish\n")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"data_folder": f"{tmp_path}/data", "prediction_folder": str(out), "trained_model": "m.ckpt"})
    )
    found = states(read_configuration(tmp_path / "c.yaml"))
    assert [state.state for state in found] == ["done", "done", "failed", "running", "stopped", "left", "left"]
    assert found[2].detail == "c.mrc: is broken." and found[3].detail == "process 12 on node7" and found[3].blocks == 1
    assert "damaged" in found[5].detail
    assert seconds_left(found) == pytest.approx(15 / 2 * 4)
    output = invoke("status", "--config-file", "c.yaml", folder=tmp_path)
    assert "2 done, 1 running, 1 stopped, 1 failed, 2 left; about 00:00:30 left" in output
    assert "c.mrc: is broken." in output and "process 12 on node7" in output
    document = json.loads(invoke("status", "--config-file", "c.yaml", "--json", folder=tmp_path))
    assert document["counts"]["done"] == 2 and len(document["tomograms"]) == len(names)
    values = yaml.safe_load((tmp_path / "c.yaml").read_text()) | {"test_files": ["a.mrc", "g.mrc"]}
    (tmp_path / "left.yaml").write_text(yaml.safe_dump(values))
    console = Console(file=io.StringIO(), width=80)
    print_overview(tmp_path / "left.yaml", console)
    heads = [head.strip() for head in console.file.getvalue().splitlines()[1].split("┃")]
    assert heads == ["", "tomogram", "state", ""]  # no column is empty


def test_what_the_models_cannot_see_is_said_before_the_run(tmp_path: Path) -> None:
    """Of three of many tomograms, and of a pipeline's models once; afterwards of those that nothing was said of."""
    (tmp_path / "data").mkdir()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        grains = rng.normal(0, 0.1, (32, 48, 48)) + 3 * (rng.random((32, 48, 48)) < 0.01)
        with mrcfile.new(tmp_path / "data" / f"TS_{seed}.mrc") as mrc:
            mrc.set_data((9000 - 2000 * grains).astype(np.int16))
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    common = {"data_folder": str(tmp_path / "data"), "trained_model": str(tmp_path / "model.ckpt")}
    models = {name: {**common, "prediction_folder": str(tmp_path / name)} for name in ("lamella", "semantic")}
    plans = [plan_run(Configuration.model_validate(values), name=name) for name, values in models.items()]
    console = Console(file=io.StringIO(), width=80)
    shown = _warn_about_intensities(plans, console)
    said = console.file.getvalue().splitlines()
    beginning = "warning: 3 of 5 tomograms, checked before the run: "
    assert len(said) == 2 and all(line.startswith(beginning) for line in said)
    assert "'min: " in said[0] and "'invert: true'" in said[1]
    assert {stem for stem, _ in shown} == {"TS_0", "TS_2", "TS_4"}
    (sentence,) = {sentence for _, sentence in shown if "invert" in sentence}
    outcomes = [Outcome(f"TS_{seed}", "done", warnings=(sentence,)) for seed in range(5)]
    console = Console(file=io.StringIO(), width=80)
    print_table(console, outcomes, shown)
    assert f"warning, TS_1 and TS_3: {sentence}\n" in console.file.getvalue()
    assert console.file.getvalue().count("warning") == 1
    plans[0] = plan_run(Configuration.model_validate(models["lamella"] | {"test_files": ["TS_1.mrc"]}), name="lamella")
    console = Console(file=io.StringIO(), width=80)
    _warn_about_intensities(plans, console)
    assert console.file.getvalue().count("warning, lamella, TS_1: ") == 2
    assert console.file.getvalue().count("warning, semantic: 3 of 5 tomograms, ") == 2
