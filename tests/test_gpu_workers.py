"""Workers on faked GPUs: pinned, replaced, counted, and plain errors where they cannot be."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from cryosiam_dask.errors import DeviceError
from cryosiam_dask.runs.cluster import open_cluster
from support.command import call, invoke
from support.gpus import environment, fake_dask_cuda, fake_pynvml
from support.inputs import make_folder, write_yaml

PROGRAM = """
if __name__ == "__main__":
    import json, os, time
    from urllib.request import urlopen

    from cryosiam_dask.errors import CryosiamDaskError
    from cryosiam_dask.model.device import has_gpu
    from cryosiam_dask.model.predictor import name_of_gpu
    from cryosiam_dask.runs.cluster import open_cluster
    from cryosiam_dask.runs.dask_executor import DaskExecutor
    from cryosiam_dask.runs.metrics import Collector
    from cryosiam_dask.runs.workers import ask, describe_devices

    try:
        with open_cluster("cuda", 0, cpu_workers=1, dashboard_address="127.0.0.1:0") as client:
            client.register_plugin(Collector())
            found = {
                "devices": describe_devices(client, name_of_gpu),
                "pinned": sorted(ask(client, os.getenv, "CUDA_VISIBLE_DEVICES").values()),
            }
            executor = DaskExecutor(client, has_device=has_gpu)
            for name, overlap in (("predict", True), ("label", False)):
                used = executor.map(os.getenv, ["CUDA_VISIBLE_DEVICES"] * 20, name=name, overlap=overlap)
                found[name] = sorted(set(used))
            for _ in range(600):
                text = urlopen(client.dashboard_link.replace("/status", "/metrics"), timeout=30).read().decode()
                found["metrics"] = [line for line in text.splitlines() if line.startswith("cryosiam_dask_gpu")]
                if len(found["metrics"]) == 6:
                    break
                time.sleep(0.1)
            print(json.dumps(found))
    except CryosiamDaskError as error:
        print(type(error).__name__, error)
"""


def opened(folder: Path, count: int, **variables: object) -> str:
    """What a program prints that opens a cluster for all GPUs."""
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, folder / "program.py"],
        env=environment(count, **variables),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not done.stderr and not done.returncode, done.stderr
    return done.stdout


def test_each_gpu_has_a_worker_and_tells_of_itself_and_a_cpu_worker_helps(tmp_path: Path) -> None:
    """Also where one died while it started, and where the driver does not know which cores are near them."""
    found = json.loads(opened(tmp_path, 2, FAKE_AFFINITY="missing", FAKE_DIE_ONCE=tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert found["devices"] == "cuda" and found["pinned"] == ["", "0,1", "1,0"]
    assert found["predict"] == ["0,1", "1,0"] and found["label"] == [""]
    values = {re.sub(r"\{.*\}", "", line) for line in found["metrics"]}
    assert len(found["metrics"]) == 6 and values == {
        "cryosiam_dask_gpu_memory_used_bytes 1e+09",
        "cryosiam_dask_gpu_memory_total_bytes 8e+09",
        "cryosiam_dask_gpu_utilisation_ratio 0.42",
    }


def test_a_gpu_whose_workers_always_die_is_named(tmp_path: Path) -> None:
    told = opened(tmp_path, 1, FAKE_DIE="0")
    assert "ClusterError this machine: worker processes must be able to start; found 1 of 1 died" in told
    assert "on GPU 0. Check nvidia-smi and dmesg, exclude a broken GPU with CUDA_VISIBLE_DEVICES" in told


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": "0,7"},
            r"found 0,7, where '7' is not one of the 2 GPUs of this machine.*0,1 for exam",
        ),
        ({"CUDA_VISIBLE_DEVICES": "0,1,"}, "found 0,1,, where '' is not one of the 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "0,-1"}, "found 0,-1, where '-1' is not one of the 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, "found 1,1, where '1' is listed twice"),
        ({"CUDA_VISIBLE_DEVICES": "one"}, "found one, where 'one' is not one of"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-12"}, "found GPU-12, where 'GPU-12' is not one of"),
        ({"CUDA_VISIBLE_DEVICES": f"0,{fake_pynvml.nvmlDeviceGetUUID(1)}"}, "is of another kind than the first"),
        ({"CUDA_VISIBLE_DEVICES": ""}, r"requests 1 GPUs; found 0 visible \(CUDA_VISIBLE_DEVICES=\)"),
        (
            {"CUDA_VISIBLE_DEVICES": fake_pynvml.nvmlDeviceGetUUID(1), "FAKE_AFFINITY": "missing"},
            "must list GPUs by their numbers if the driver does not know",
        ),
        (
            {"FAKE_LOST": "1"},
            r"^GPU 1: each visible GPU must work; found GPU is lost\. Check nvidia-smi and dmesg, ex",
        ),
        (
            {"FAKE_LOST": "1", "CUDA_VISIBLE_DEVICES": fake_pynvml.nvmlDeviceGetUUID(1)},
            "^GPU GPU-00000001-0000-0000-0000-000000000000: each visible GPU must work; found GPU is lost",
        ),
        ({"FAKE_GPUS": "0"}, r"requests 1 GPUs; found 0 visible \(CUDA_VISIBLE_DEVICES=not set\)"),
        ({"FAKE_NVML": "missing"}, "management library, NVML; found NVML Shared Library Not Found. Install the driver"),
    ],
)
def test_gpus_that_cannot_be_used_are_a_plain_error(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in (fake_dask_cuda.modules(), fake_pynvml.modules()):
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"FAKE_GPUS": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=message), open_cluster("cuda", 0, dashboard_address="127.0.0.1:0"):
        pass


def test_more_cpu_workers_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (fake_dask_cuda.modules(), fake_pynvml.modules()):
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FAKE_GPUS", "1")
    wanted = r"requests 99999 workers of about 1.5 GB each; found \d+ GB of memory. Request at most \d+"
    with pytest.raises(DeviceError, match=wanted), open_cluster("cuda", 0, cpu_workers=99999):
        pass


def test_what_dask_cuda_lacks_is_told_to_who_has_installed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "dask_cuda":
                raise ImportError("cuda-bindings must be installed")

    monkeypatch.delitem(sys.modules, "dask_cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with (
        pytest.raises(DeviceError, match=r"found cuda-bindings must be installed\. .*\[gpu-cu13\]"),
        open_cluster("cuda", 1),
    ):
        pass


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs for every command."""
    for name, value in environment(2).items():
        monkeypatch.setenv(name, value)


def labels(folder: Path) -> list[NDArray[np.uint8]]:
    found = []
    for path in sorted(folder.glob("*_preds.h5")):
        with h5py.File(path) as file:
            found.append(file["labels"][:])
    return found


def test_a_run_on_gpus_with_little_memory_gives_the_labels_of_a_cpu(
    tmp_path: Path, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest patch is that for which cuDNN finds an engine, with batches of two instead of four."""
    folder = make_folder(tmp_path)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    parameters = {"data": {"patch_size": "auto"}, "network": {"postprocessing_sizes": [-1, 5, 5]}}
    more = {"parameters": parameters, "hyper_parameters": {"batch_size": 4}}
    write_yaml(folder / "config.yaml", {**values, **more})
    monkeypatch.setenv("FAKE_VOXELS", str(2 * 16**3))
    monkeypatch.setenv("FAKE_ERROR", "GET was unable to find an engine to execute this computation")
    output = call("semantic-predict", "--config-file", "config.yaml", "--device", "cuda", folder=folder)
    assert "patch_size [16, 16, 16] is the largest that fits" in output
    assert "on 2 cuda workers" in output and output.count(" done ") >= 3
    found = labels(folder / "out")
    shutil.rmtree(folder / "out")
    del parameters["data"]
    write_yaml(folder / "config.yaml", {**values, "parameters": parameters})
    invoke("semantic-predict", "--config-file", "config.yaml", "--device", "cpu", folder=folder)
    right = labels(folder / "out")
    assert len(found) == len(right) == 3
    # The batches change the last bits of what the CPU below the faked GPU computes.
    assert all((one != other).mean() < 1e-3 for one, other in zip(found, right, strict=True))


def test_gpus_that_cannot_compute_leave_everything_to_one_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU 0 kills its process at each block, PyTorch cannot use 1, no network fits into 2, and 3 works."""
    for name, value in environment(
        4, FAKE_KILLS=0, FAKE_BROKEN=1, FAKE_NO_ROOM=2, FAKE_MEMORY="8 8 0.001 8", CUDA_VISIBLE_DEVICES="0,1,2,3"
    ).items():
        monkeypatch.setenv(name, value)
    folder = make_folder(tmp_path)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    write_yaml(folder / "config.yaml", {**values, "block_size": 16, "hyper_parameters": {"batch_size": 2}})
    output = call(
        "semantic-predict", "--config-file", "config.yaml", "--device", "cuda", "--cpu-workers", 0, folder=folder
    )
    assert "warning: the run continues without GPU 1, which PyTorch cannot use" in output
    assert "CUDA Context" not in output  # which dask-cuda logs
    assert "the network must fit into the GPU's memory" in output and "The other GPUs compute what this one" in output
    assert "warning: 1 of 3 GPUs have too little free memory, at least 0.0 GB: " in output
    assert "3 tomograms on 3 cuda workers" in output and output.count(" done ") >= 3
