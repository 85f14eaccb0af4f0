"""Workers as Slurm jobs. Slurm is three small programs that start a job's script as a group of processes of its own."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from cryosiam_dask.errors import ClusterError, ConfigurationError, LostClusterError
from cryosiam_dask.runs import slurm
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.runs.slurm import open_slurm, read_jobs, with_helpers
from support import checkpoints, golden
from support.command import call, start
from support.inputs import PIPELINE_CASE as CASE
from support.inputs import pipeline_of_case, write_tomogram, write_yaml
from support.workers import wait_for_workers

COMMANDS = {
    "sbatch": """
        script=$FAKE_SLURM/$$.sh
        cp "${@: -1}" "$script"
        setsid bash "$script" > "$FAKE_SLURM/$$.out" 2>&1 < /dev/null &
        cp "$script" "$FAKE_SLURM/$!.job"
        echo "Submitted batch job $!"
    """,
    "scancel": """
        [ -f "$FAKE_SLURM/$1.job" ] || exit 1  # never a group of processes that is not a job of its own
        echo "$1" >> "$FAKE_SLURM/cancelled"
        kill -TERM -- "-$1" || exit 1
    """,
    "squeue": """
        for script in "$FAKE_SLURM"/*.job; do
            job=$(basename "$script" .job)
            kill -0 -- "-$job" 2> /dev/null && echo "$job"
        done
        exit 0
    """,
}
JOB = {"cores": 2, "processes": 1, "memory": "2 GB", "walltime": "01:00:00", "interface": "lo"}


class FakeSlurm:
    """What was submitted and cancelled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir()
        (folder / "bin").mkdir()
        self.started: list[subprocess.Popen[str]] = []
        for name, script in COMMANDS.items():
            self.command(name, script)

    def predict(self, folder: Path, workers: int, **changes: Any) -> subprocess.Popen[str]:
        """Start a run, which ends with the test at the latest."""
        arguments = ("--config-file", "config.yaml", "--slurm", self.describe(**changes), "--workers", workers)
        self.started.append(start("semantic-predict", *arguments, folder=folder))
        return self.started[-1]

    def command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}")
        path.chmod(0o755)

    def jobs(self) -> set[int]:
        return {int(path.stem) for path in self.state.glob("*.job")}

    def running(self) -> set[int]:
        return {job for job in self.jobs() if alive(job)}

    def scripts(self) -> list[str]:
        return [path.read_text() for path in self.state.glob("*.job")]

    def all_cancelled(self) -> bool:
        """Whether every job was cancelled, and soon none runs."""
        until(lambda: not self.running())
        return set(map(int, (self.state / "cancelled").read_text().split())) >= self.jobs() != set()

    def describe(self, **changes: Any) -> Path:
        path = self.folder / "slurm.yaml"
        path.write_text(yaml.safe_dump({"jobqueue": {"slurm": JOB | changes}}))
        return path


def alive(group: int) -> bool:
    try:
        kill_group(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_group(group: int, number: int = signal.SIGKILL) -> None:
    assert group > 1  # which would be everybody
    os.killpg(group, number)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 500
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    (tmp_path / "fake").mkdir()
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("FAKE_SLURM", str(fake.state))
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}:{os.environ['PATH']}")
    yield fake
    for process in fake.started:
        process.kill()
        process.communicate()
    for job in fake.running():  # of a test that failed
        kill_group(job)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tomogram of many blocks."""
    folder = tmp_path / "case"
    (folder / "data").mkdir(parents=True)
    write_tomogram(folder / "data" / "TS_0.mrc", 0, (40, 60, 60))
    checkpoints.write(folder / "model.ckpt", seed=35)
    values = {"data_folder": "data", "prediction_folder": "out", "trained_model": "model.ckpt", "block_size": 8}
    write_yaml(folder / "config.yaml", values)
    return folder


def test_both_models_on_jobs_give_what_cryosiam_gave(tmp_path: Path, fake: FakeSlurm) -> None:
    folder = tmp_path / "case"
    shutil.copytree(golden.FOLDER / CASE, folder)
    write_yaml(folder / "pipeline.yaml", pipeline_of_case())
    jobs = fake.describe(queue="long", account="me", job_script_prologue=["export MARK=1"], log_directory="logs")
    output = call("run", "--config-file", "pipeline.yaml", "--slurm", jobs, "--workers", 2, folder=folder)
    expected = golden.expected(CASE)
    for name, key in (("lamella", "lamella_slicewise"), ("semantic", "semantic")):
        with h5py.File(folder / "out" / name / "TS_a_6.80Apx_preds.h5") as file:
            np.testing.assert_array_equal(file["labels"][:], expected[key])
        assert not list((folder / "out" / name).glob(".cryosiam*")) + list((folder / "out" / name).glob("*.zarr"))
    assert "2 Slurm jobs submitted" in output and "warning: tls" not in output and "has no TLS" not in output
    assert len(fake.jobs()) == 2 and fake.all_cancelled()
    for script in fake.scripts():
        lines = script.splitlines()
        assert {"#SBATCH -p long", "#SBATCH -A me", "#SBATCH -t 01:00:00", "#SBATCH --cpus-per-task=2"} <= set(lines)
        assert "export MARK=1" in lines and "export DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION=3300s" in lines
        assert "-m distributed.cli.dask_worker tls://127.0.0.1:" in script and "--nthreads 4" in script


def test_a_run_that_is_interrupted_cancels_its_jobs(folder: Path, fake: FakeSlurm) -> None:
    process = fake.predict(folder, 2)
    ledger = folder / "out" / ".ledger" / "TS_0.jsonl"
    until(lambda: process.poll() is not None or (ledger.exists() and b'"block"' in ledger.read_bytes()))
    for number in (signal.SIGTERM, signal.SIGINT):  # the second one does not wait for what is in flight
        process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err and fake.all_cancelled()


def test_a_run_that_is_killed_leaves_no_jobs(folder: Path, fake: FakeSlurm) -> None:
    process = fake.predict(folder, 1, death_timeout=5)
    until(lambda: process.poll() is not None or (folder / "out" / "TS_0.work.zarr").exists())
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not fake.running())
    assert len(fake.jobs()) == 1


def test_an_error_cancels_the_jobs(folder: Path, fake: FakeSlurm) -> None:
    arguments = ("--config-file", "config.yaml", "--slurm", fake.describe(), "--workers", 1, "--device", "cuda")
    message = " ".join(call("semantic-predict", *arguments, folder=folder, status=2).split())
    assert "device cuda was requested" in message and "workers without GPUs" in message
    assert fake.all_cancelled() and not list(folder.glob("out/*.h5"))


def test_what_slurm_or_the_environment_lacks_is_said(folder: Path, fake: FakeSlurm, tmp_path: Path) -> None:
    def fails(match: str, **changes: Any) -> None:
        options = {"folder": tmp_path, "dashboard_address": "127.0.0.1:0", "seconds": 0.5}
        with pytest.raises(ClusterError, match=match), open_slurm(str(fake.describe(**changes)), 1, **options):
            pass

    fake.command("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    fails(r"sbatch must accept the job; found sbatch: error: invalid partition specified: gpu\. Correct")
    fake.command("sbatch", "echo 'Submitted batch job 4194305'\n")
    fails(r"the jobs must start a worker; found none within 0 min\. 'squeue --me'")
    fails("a scheduler must be able to start on this node.*nothing0", interface="nothing0")
    arguments = ("semantic-predict", "--config-file", "config.yaml", "--slurm", fake.describe())
    assert "to request from Slurm" in call(*arguments, folder=folder, status=2)
    (fake.folder / "bin" / "sbatch").unlink()
    if shutil.which("sbatch") is None:  # and whatever else is wrong, at once
        (folder / "model.ckpt").unlink()
        message = call(*arguments, "--workers", 1, folder=folder, status=2)
        assert "Slurm's commands must be available; found no sbatch" in message and "Set trained_model" in message


def test_jobs_that_end_without_a_worker_are_not_waited_for(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_CHECK_SECONDS", 0.5)
    jobs = str(fake.describe(job_script_prologue=["exit 1"]))
    with (
        pytest.raises(ClusterError, match="jobs that ended without one"),
        open_slurm(jobs, 1, folder=tmp_path, dashboard_address="127.0.0.1:0"),
    ):
        pass
    stop = threading.Event()
    stop.set()
    with (
        pytest.raises(LostClusterError, match="a job must start before the run is stopped"),
        open_slurm(jobs, 1, folder=tmp_path, dashboard_address="127.0.0.1:0", stop=stop),
    ):
        pass
    assert not list(tmp_path.glob(".cryosiam*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_ends_is_submitted_again(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(slurm, "_CHECK_SECONDS", 0.5)
    told: list[str] = []
    folder = tmp_path / "out put"
    folder.mkdir()
    jobs = str(fake.describe(processes=processes))
    with open_slurm(
        jobs, 2 * processes, folder=tmp_path, dashboard_address="127.0.0.1:0", inform=told.append
    ) as client:
        wait_for_workers(client, 2 * processes)
        first = fake.jobs()
        assert len(first) == 2
        assert set(DaskExecutor(client).map(os.getpgid, [0] * 40, name="group", overlap=True)) == first
        time.sleep(2)  # both have been seen
        victim = min(first)
        kill_group(victim)
        until(lambda: len(fake.jobs()) == 3 and len(client.nthreads()) == 2 * processes)
        groups = set(DaskExecutor(client).map(os.getpgid, [0] * 40, name="group", overlap=True))
        assert groups == fake.jobs() - {victim}
    assert any("1 Slurm job has ended" in text for text in told)
    until(lambda: not fake.running())


# ------------------------------------------------------------------------------------------------------------- the file


def script(section: dict[str, Any]) -> list[str]:
    """The job that dask-jobqueue makes of a section."""
    import dask
    from dask_jobqueue.slurm import SLURMJob

    with dask.config.set({"jobqueue.test": section}):
        return SLURMJob("tls://10.0.0.1:8786", name="x", config_name="test").job_script().splitlines()


@pytest.mark.parametrize(
    ("directive", "workers"),
    [("--gres=gpu:1", 1), ("--gres=gpu", 1), ("--gres=gpu:a100:4", 4), ("--gres=craynetwork:0,gpu:2", 2),
     ("--gpus=2", 2), ("--gpus-per-node=h100:4", 4), ("-G 3", 3), ("-G1", 1), ("--gres gpu:a100", 1)],
)  # fmt: skip
def test_a_job_with_gpus_has_a_pinned_worker_for_each(fake: FakeSlurm, directive: str, workers: int) -> None:
    section = read_jobs(str(fake.describe(processes=None, cores=8, job_extra_directives=[directive])))
    assert section["processes"] == workers
    lines = script(section)
    assert f"#SBATCH {directive}" in lines and "#SBATCH --cpus-per-task=8" in lines
    command = next(line for line in lines if "-m dask_cuda.cli tls://10.0.0.1:8786" in line)
    assert command.rpartition("--nthreads")[2].split()[0] == "4" and "--memory-limit 0" in command


def test_the_cores_that_gpus_leave_get_workers_too(fake: FakeSlurm) -> None:
    from distributed.cli.dask_worker import main

    job = {"processes": None, "cores": 8, "job_extra_directives": ["--gres=gpu:2"]}
    section = read_jobs(str(fake.describe(**job, memory="64 GB", local_directory="/tmp/a b")))
    (command,) = [line for line in script(section) if "-m dask_cuda.cli" in line]
    helpers, same = with_helpers(command, section).splitlines()
    assert same == command and helpers.startswith("CUDA_VISIBLE_DEVICES= ") and helpers.endswith(" &")
    words = shlex.split(helpers.removesuffix(" &").partition(" -m distributed.cli.dask_worker ")[2])
    found = main.make_context("dask worker", words).params  # all of them are options that it knows
    assert found["n_workers"] == "6" and found["name"] == "x-helper" and found["nthreads"] == 4
    # Half of the memory is for them.
    few = read_jobs(str(fake.describe(**job, memory="7 GB")))
    assert "--nworkers 2 " in with_helpers(command, few)
    assert with_helpers(command, read_jobs(str(fake.describe(**job | {"cores": 2})))) == command
    plain = "python -m distributed.cli.dask_worker tls://10.0.0.1:8786"
    assert with_helpers(plain, section) == plain


@pytest.mark.parametrize("directive", ["--gres=craynetwork:1", "--exclude=gpu1", "--mail-type=END", "--constraint=gpu"])
def test_other_jobs_have_a_worker_for_each_core(fake: FakeSlurm, directive: str) -> None:
    section = read_jobs(str(fake.describe(processes=None, cores=6, job_extra_directives=[directive])))
    assert section["processes"] == 6
    assert any("-m distributed.cli.dask_worker" in line and "--nworkers 6" in line for line in script(section))


@pytest.mark.parametrize(
    ("walltime", "lifetime"),
    [("60", 3300), ("10:00", 450), ("04:00:00", 14100), ("1-0", 86100), ("2-01:30:00", 177900), ("1-00:30", 87900)],
)
def test_workers_leave_before_the_walltime(fake: FakeSlurm, walltime: str, lifetime: int) -> None:
    lines = script(read_jobs(str(fake.describe(walltime=walltime))))
    assert f"#SBATCH -t {walltime}" in lines
    assert f"export DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION={lifetime}s" in lines


def test_what_is_wrong_with_a_file_is_said(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigurationError, match=match):
            read_jobs(str(fake.describe(**changes)))

    refuses("slurm.yaml, key quee: dask-jobqueue does not know this key. Did you mean queue?", quee="x")
    refuses("key memory: this key is required", memory=None)
    refuses("key cores: must be a whole number above 0; found 'many'", cores="many")
    refuses("key walltime: must be a time in Slurm's format, in quotes.*found 5400", walltime=5400)
    refuses("key job-extra-directives: must be a list", job_extra_directives="--gres=gpu:1")
    for content in ("", "[]", "jobqueue: {}", "jobqueue: {slurm: 3}", "a: [", "\0"):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ConfigurationError, match=r"x\.yaml: must be YAML with the keys of a job"):
            read_jobs(str(tmp_path / "x.yaml"))
    with pytest.raises(ConfigurationError, match=r"none\.yaml: does not exist"):
        read_jobs("none.yaml")
    with pytest.raises(ConfigurationError, match=r"or a section of jobqueue in Dask's configuration"):
        read_jobs("nothing")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dask_jobqueue" else find(name))
    with pytest.raises(ClusterError, match=r"found no dask_jobqueue\. Install the extra.*hpc"):
        read_jobs(str(fake.describe()))


def test_the_section_may_stand_in_dasks_own_configuration(fake: FakeSlurm) -> None:
    import dask

    with dask.config.set({"jobqueue.h100": JOB | {"queue": "fast"}}):
        section = read_jobs("h100")
    assert section["queue"] == "fast" and section["shebang"] == "#!/usr/bin/env bash"


def test_the_example_is_read(fake: FakeSlurm) -> None:
    section = read_jobs(str(Path(__file__).parents[1] / "configs" / "slurm.yaml"))
    assert section["processes"] == 1 and section["queue"] == "gpu"
    lines = script(section)
    assert "#SBATCH --gres=gpu:1" in lines and any("dask_cuda.cli" in line for line in lines)
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)


#: What runs on the nodes of an allocation, without Slurm, Dask and this program.
NODES = {
    "srun": """
        echo "$@" >> srun
    """,
    "dask": """
        [ -z "${REFUSE:-}" ] || exit 1
        echo begun > "$5"  # the scheduler's file
    """,
    "scontrol": """
        echo "$@" >> scontrol
    """,
    "cryosiam-dask": """
        cat "$5" > joined
        exit 75
    """,
}


@pytest.mark.parametrize(
    ("variables", "helpers"),
    [
        ({"SLURM_MEM_PER_NODE": "400000"}, 28),
        ({"SLURM_MEM_PER_NODE": "30000"}, 10),
        ({"SLURM_MEM_PER_CPU": "1000"}, 10),
        ({"SLURM_MEM_PER_NODE": "2000"}, 0),
        ({"SLURM_MEM_PER_NODE": "400000", "SLURM_CPUS_PER_TASK": "4"}, 0),
        ({"REFUSE": "1"}, None),
    ],
)
def test_an_allocation_of_nodes_has_workers_for_its_gpus_and_for_the_cores_and_memory_left(
    fake: FakeSlurm, tmp_path: Path, variables: dict[str, str], helpers: int | None
) -> None:
    """Also if it begins again after a node failed, which leaves the scheduler's old file there."""
    for name, script in {**NODES, "python": "exit 0"}.items():
        fake.command(name, script)
    (tmp_path / "scheduler-7.json").write_text("old")
    given = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4"}
    script = Path(__file__).parents[1] / "configs" / "slurm_nodes.sh"
    done = subprocess.run(
        ["bash", script, "pipeline.yaml"], cwd=tmp_path, env={**os.environ, **given, **variables}, timeout=60
    )
    assert not list(tmp_path.glob("*.json"))
    if helpers is None:  # the scheduler could not start
        assert done.returncode == 1 and not (tmp_path / "joined").exists()
        return
    assert done.returncode == 75 and (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert (tmp_path / "joined").read_text() == "begun\n"
    until(lambda: len((tmp_path / "srun").read_text().splitlines()) == 1 + bool(helpers))
    steps = sorted((tmp_path / "srun").read_text().splitlines())
    assert steps[0].startswith("--overlap dask cuda worker ") and all("--memory-limit 0 " in step for step in steps)
    assert [step.partition("--nworkers ")[2] for step in steps[1:]] == [str(helpers)] * bool(helpers)
