"""Prove on a GPU what is claimed of GPUs: right, fast, and unharmed by what goes wrong.

    python benchmarks/gpu_check.py --part correct --seconds 540 --output checks     # first
    python benchmarks/gpu_check.py --part fast --output checks
    python benchmarks/gpu_check.py --part harm --output checks
    python benchmarks/gpu_check.py --part harm --output checks --fake  # on faked GPUs: whether the checks work

Every check runs in a process of its own and adds a row to ``rows.jsonl`` in the folder when it ends, a check of speed
one for each case. The same command goes on after the last row; failed checks are done again. No check begins after
`--seconds`, and one that is running then is stopped. A table of the part comes last. The exit status is 0 if all its
checks are done and none failed, 1 if one failed, 3 if some are left.

No row of faked GPUs says anything about a GPU. What each figure is compared with is in docs/gpus.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
FAKED = "FAKE_GPUS" in os.environ
Row = dict[str, Any]
CHECKS: dict[str, dict[str, Callable[[Path], None]]] = {"correct": {}, "fast": {}, "harm": {}}
COMMAND = [str(Path(sys.executable).with_name("cryosiam-dask"))]


def check(part: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Make a function a check, by its name. It fails by an error, and tells rows."""

    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[part][function.__name__.replace("_", " ")] = function
        return function

    return add


def tell(**values: Any) -> None:
    """Hand a row to the process that writes it."""
    print(json.dumps(values), flush=True)


def known(output: Path) -> list[Row]:
    path = output / "rows.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # a row that a kill cut off
            rows.append(json.loads(line))
    return rows


# ---- what the checks share ----


def specification(output: Path, small: bool = False, **changes: Any) -> Any:
    """CryoSiam's default network with random weights, or a small one."""
    from bench_inference import architecture

    from cryosiam_dask.model.predictor import predictor_spec
    from support import checkpoints

    small = small or FAKED
    path = output / ("small.ckpt" if small else "default.ckpt")
    if not path.exists():
        checkpoints.write(path, *([] if small else [architecture(1)]), patch=16 if small else 64)
    return replace(predictor_spec(path, device="cpu"), **{"device": "cuda", **changes})


def patches_of(spec: Any, count: int) -> tuple[Any, list[Any], tuple[int, ...]]:
    """A window of patches one behind the other, of each of which the middle is kept; the patches; the shape kept."""
    import numpy as np

    from cryosiam_dask.core.grid import Patch

    size, margin = spec.patch[0], spec.halo or spec.patch[0] // 4
    kept = size - 2 * margin
    window = np.random.default_rng(0).random((count * size, size, size), np.float32)
    core, whole = (slice(margin, size - margin),) * 3, (slice(0, size), slice(0, size))
    placed = [
        Patch(
            (slice(i * size, (i + 1) * size), *whole), core, (slice(i * kept, (i + 1) * kept), *(slice(0, kept),) * 2)
        )
        for i in range(count)
    ]
    return window, placed, (count * kept, kept, kept)


def predicted(spec: Any, count: int = 8) -> Any:
    from cryosiam_dask.model.predictor import Predictor

    return Predictor(spec).predict_block(*patches_of(spec, count), ("labels", "probabilities"))[0]


def digest(found: Any) -> str:
    return hashlib.sha256(b"".join(found[name].tobytes() for name in sorted(found))).hexdigest()[:16]


def command(*arguments: object, folder: Path, status: int | None = 0, **options: Any) -> str:
    """Run a command to its end, and return what it printed."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}, **options,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert status is None or done.returncode == status, text[-2000:]
    assert "Traceback" not in text, text[-2000:]
    return text


def labels_in(folder: Path) -> dict[str, Any]:
    import h5py

    found = {}
    for path in sorted(folder.glob("*_preds.h5")):
        with h5py.File(path) as file:
            found[path.name] = file["labels"][:]
    return found


def tomograms(folder: Path, edge: int, count: int, parameters: Row | None = None, **values: Any) -> Path:
    """A folder with tomograms of noise, the network and its configuration."""
    from support.inputs import write_tomogram, write_yaml

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for seed in range(count):
        write_tomogram(folder / "data" / f"TS_{seed}.mrc", seed, (edge,) * 3)
    keys = {"data_folder": "data", "prediction_folder": "out", "trained_model": specification(folder.parent).checkpoint}
    network = {"postprocessing_sizes": [-1] + [5] * (2 if FAKED else 5)}
    write_yaml(folder / "config.yaml", {**keys, "parameters": {"network": network, **(parameters or {})}, **values})
    return folder


def edge_of(real: int) -> int:
    return 24 if FAKED else real


def compute_processes() -> set[int]:
    """The processes that use a GPU of this machine."""
    import pynvml

    if FAKED:
        return set()
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return {process.pid for handle in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}


def memory_in_use() -> int:
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


@contextmanager
def busy() -> Iterator[Row]:
    """Fill in the mean share of time in which the first GPU was busy, by NVML, within the context."""
    import pynvml

    pynvml.nvmlInit()
    handle, over, samples, found = pynvml.nvmlDeviceGetHandleByIndex(0), threading.Event(), [], Row()

    def watch() -> None:
        while not over.wait(0.2):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found["busy"] = round(sum(samples) / max(1, len(samples)) / 100, 3)


def seconds_of(call: Callable[[], object], least: float = 1.0) -> float:
    """Seconds of a call, without its first one."""
    import torch

    def wait() -> None:
        None if FAKED else torch.cuda.synchronize()

    call()
    wait()
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < (0 if FAKED else least):
        call()
        count += 1
        wait()
    return (time.perf_counter() - began) / count


# ---- correct ----


@check("correct")
def machine(output: Path) -> None:
    """Versions, and the ceilings that speeds are compared with."""
    import torch
    from bench_inference import machine as described

    from cryosiam_dask.runs.workers import versions

    row: Row = {**described("cuda"), **versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        row["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    size = 64 if FAKED else 8192
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False), ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False), ("fp16", torch.float16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        left = torch.ones(size, size, device="cuda", dtype=dtype)
        row[f"tflop_per_s_{name}"] = round(2 * size**3 / seconds_of(lambda left=left: left @ left) / 1e12, 1)
    host = torch.zeros(1 << (10 if FAKED else 28)).pin_memory()
    there = host.to("cuda")
    for name, copy in {
        "up": lambda: there.copy_(host), "down": lambda: host.copy_(there), "within": lambda: there.clone(),
    }.items():  # fmt: skip
        row[f"copy_gb_per_s_{name}"] = round(4 * host.numel() / seconds_of(copy) / 1e9, 1)
    tell(**row)


def tests(names: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", *names], cwd=ROOT, capture_output=True, text=True
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    tell(summary=last, failed=failed)
    assert done.returncode == 0, f"{last}: {failed[:3]}"


@check("correct")
def golden_cases(output: Path) -> None:
    """What CryoSiam itself wrote: probabilities within 1e-4, labels equal where they are decided."""
    tests(["tests/test_predictor.py"])


@check("correct")
def tests_of_a_gpu(output: Path) -> None:
    """Batches, precisions, memory, labelling, lost workers, large patches, metrics."""
    tests(["tests/test_on_gpu.py"])


@check("correct")
def golden_cases_in_other_precisions(output: Path) -> None:
    """The share of equal labels."""
    import mrcfile

    from support import golden
    from test_predictor import golden_spec, sliding_window

    for precision in ("tf32", "bf16", "fp16"):
        shares = {}
        for case in ("fpn_bottleneck", "bifpn"):
            voxels = mrcfile.read(golden.FOLDER / case / "data" / "tomo.mrc")
            spec = replace(golden_spec(case), device="cuda", precision="fp32" if FAKED else precision)
            found, done = sliding_window(voxels, spec, every=3)
            shares[case] = round(float((found["labels"] == golden.expected(case)["labels"])[done].mean()), 6)
        tell(case=precision, **shares)
        assert min(shares.values()) > 0.9, shares


@check("correct")
def equal_bytes(output: Path) -> None:
    """Of another process, and beside occupied memory; other batches change the last digits at most."""
    import numpy as np
    import torch

    spec = specification(output, batch_size=2)
    right = predicted(spec)
    again = subprocess.run(
        [sys.executable, __file__, "--part", "correct", "--child", "digest", "--output", str(output)],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.ones(1 if FAKED else free // 2, dtype=torch.uint8, device="cuda")
    beside = digest(predicted(spec))
    del ballast
    batches = {}
    for size in (1, 4, 8):
        other = predicted(replace(spec, batch_size=size))
        batches[str(size)] = float(np.abs(other["probabilities"] - right["probabilities"]).max())
    tell(digest=digest(right), other_process=again, beside=beside, differences_of_batches=batches)
    assert digest(right) == again == beside and max(batches.values()) < 1e-4


def print_digest(output: Path) -> None:
    print(digest(predicted(specification(output, batch_size=2))))


@check("correct")
def demo(output: Path) -> None:
    """The labels of the demo beside stored ones of a CPU."""
    if FAKED:
        tell(skipped="takes too long on a faked GPU")
        return
    import numpy as np

    shutil.rmtree(output / "demo", ignore_errors=True)
    command("demo", "--output", output / "demo", "--device", "cuda", folder=output)
    found = labels_in(output / "demo" / "semantic")
    with np.load(ROOT / "tests" / "data" / "demo" / "labels.npz") as stored:
        shares = {name: float((found[f"{name}_preds.h5"] == labels).mean()) for name, labels in stored.items()}
    tell(**{name: round(share, 6) for name, share in shares.items()})
    assert len(shares) == 2 and min(shares.values()) > 0.999


# ---- fast ----

#: Patch and halo: as in CryoSiam, and larger with less overlap.
MODES = {"exact": (64, 0), "fast": (160, 24)}
LAYOUTS = ("channels last", "contiguous")


def measured(spec: Any, layout: str = LAYOUTS[0], benchmark: bool = False, compiled: str = "") -> Row:
    """Speed and memory of a predictor, with settings that the program does not have."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cryosiam_dask.model import predictor as module

    predictor = module.Predictor(spec)
    if layout != LAYOUTS[0]:
        predictor._layout = torch.contiguous_format
        predictor._network.to(memory_format=torch.contiguous_format)
    set_precision = module._set_precision

    def chosen(spec: Any) -> None:
        set_precision(spec)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, not benchmark

    module._set_precision = chosen
    count = max(spec.batch_size, 4)
    window, patches, shape = patches_of(spec, count)
    run = partial(predictor.predict_block, window, patches, shape, ("labels",))
    with FlopCounterMode(display=False) as counter:
        run()
    if compiled:
        predictor._network = torch.compile(predictor._network, mode=compiled)
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(run)
    stats = torch.cuda.memory_stats()
    module._set_precision = set_precision
    return {
        "mvoxel_per_s": round(shape[0] * shape[1] * shape[2] / seconds / 1e6, 3),
        "tflop_per_s": round(counter.get_total_flops() / seconds / 1e12, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "retries": stats.get("num_alloc_retries", 0),
    }


def cases(output: Path, name: str, wanted: dict[str, Callable[[], Row]]) -> None:
    """Tell a row for each case that has none yet; one that fails is told, and the others follow."""
    import torch

    failed = []
    done = {row["case"] for row in known(output) if row["check"] == name and "case" in row and "error" not in row}
    for case, run in wanted.items():
        if case not in done:
            try:
                tell(case=case, **run())
            except Exception as error:
                tell(case=case, error=f"{type(error).__name__}: {str(error)[:300]}")
                failed.append(case)
            torch.cuda.empty_cache()
    assert not failed, f"failed: {'; '.join(failed)}"


def in_mode(output: Path, mode: str, **changes: Any) -> Any:
    patch, halo = (16, 4 if mode == "fast" else 0) if FAKED else MODES[mode]
    return specification(output, patch=(patch,) * 3, halo=halo, **changes)


@check("fast")
def network(output: Path) -> None:
    """Mode × precision × layout × batch × cudnn.benchmark."""
    precisions = ("fp32",) if FAKED else ("fp32", "tf32", "bf16", "fp16")
    cases(
        output, "network",
        {
            f"{mode}, {precision}, {layout}, batch {batch}{', benchmark' * benchmark}": partial(
                measured, in_mode(output, mode, precision=precision, batch_size=batch), layout, benchmark
            )
            for benchmark in (False, True) for layout in LAYOUTS for mode in MODES for precision in precisions
            for batch in (1, 2, 4)
        },
    )  # fmt: skip


@check("fast")
def compiled(output: Path) -> None:
    """torch.compile, and CUDA graphs with it."""
    if FAKED:
        tell(skipped="needs a real GPU")
        return
    cases(output, "compiled", {
        f"{mode}, bf16, {how}": partial(measured, in_mode(output, mode, precision="bf16"), compiled=how)
        for mode in MODES for how in ("default", "reduce-overhead")
    })  # fmt: skip


@check("fast")
def plain_loop_and_monai(output: Path) -> None:
    """The same network as CryoSiam and MONAI use it, on the same GPU."""
    import numpy as np
    import torch
    from bench_inference import labels_of, plain_loop

    from cryosiam_dask.model.checkpoint import read_checkpoint
    from cryosiam_dask.model.network import Network

    spec, edge = in_mode(output, "exact"), edge_of(192)
    checkpoint = read_checkpoint(spec.checkpoint)
    net = Network(checkpoint.architecture)
    net.load_state_dict(checkpoint.state)
    net = net.eval().to("cuda")
    volume = np.random.default_rng(0).random((edge,) * 3, np.float32)

    def loop() -> Row:
        def everything(patch: torch.Tensor) -> np.ndarray:
            scores, _ = net(patch.to("cuda"), distances=True)
            return labels_of(scores)[0].cpu().numpy()

        return {
            "mvoxel_per_s": round(edge**3 / seconds_of(lambda: plain_loop(everything, volume, spec.patch[0])) / 1e6, 3)
        }

    def sliding() -> Row:
        from monai.inferers import sliding_window_inference

        def run() -> None:
            with torch.inference_mode():
                given = torch.from_numpy(volume)[None, None].to("cuda")
                labels_of(sliding_window_inference(given, spec.patch, 4, lambda x: net(x)[0], overlap=0.5)).cpu()

        return {"mvoxel_per_s": round(edge**3 / seconds_of(run) / 1e6, 3)}

    cases(output, "plain loop and monai", {"plain loop": loop, "MONAI": sliding})


@check("fast")
def kernels(output: Path) -> None:
    """Where the device's time goes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from cryosiam_dask.model.predictor import Predictor

    for mode in MODES:
        spec = in_mode(output, mode)
        predictor, (window, patches, shape) = Predictor(spec), patches_of(spec, 4)
        predictor.predict_block(window, patches, shape, ("labels",))
        with profile(activities=[ProfilerActivity.CPU if FAKED else ProfilerActivity.CUDA]) as profiler:
            predictor.predict_block(window, patches, shape, ("labels",))
            None if FAKED else torch.cuda.synchronize()
        found = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:8]
        total = sum(event.self_device_time_total for event in profiler.key_averages()) or 1
        tell(case=mode, kernels={event.key[:80]: round(event.self_device_time_total / total, 3) for event in found})


@check("fast")
def labelling(output: Path) -> None:
    """cupy and cucim beside cc3d, with what a task reads and writes."""
    import numpy as np
    from scipy import ndimage

    from cryosiam_dask.stages.components import find_components

    edge = edge_of(320)
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((edge,) * 3, np.float32), 2)
    labels = (noise > np.quantile(noise, 0.8)).astype(np.uint8)
    for name in ("numpy", "cupy"):
        seconds = seconds_of(lambda name=name: find_components(labels, block=labels.shape, array_module=name))
        tell(case=name, mvoxel_per_s=round(labels.size / seconds / 1e6, 1))


@check("fast")
def whole_command(output: Path) -> None:
    """Three tomograms, with and without CPU workers beside the GPUs."""
    for extra in ([], ["--cpu-workers", "0"]):
        folder = tomograms(output / "command", edge_of(320), 3)
        began = time.perf_counter()
        with busy() as row:
            text = command("semantic-predict", "--config-file", "config.yaml", "--device", "cuda", *extra,
                           folder=folder, status=None)  # fmt: skip
        if "No such option" in text:
            continue
        assert text.count(" done ") >= 3, text[-2000:]
        seconds = time.perf_counter() - began
        tell(case=" ".join(extra) or "as it is", seconds=round(seconds, 1),
             mvoxel_per_s=round(3 * edge_of(320) ** 3 / seconds / 1e6, 2), **row)  # fmt: skip


# ---- harm ----


@check("harm")
def little_memory(output: Path) -> None:
    """A tenth and three per cent of the memory: smaller batches, or a plain error."""
    import numpy as np
    import torch

    from cryosiam_dask.errors import DeviceError

    spec = specification(output, batch_size=8)
    right = predicted(spec)
    for share in (0.1, 0.03):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            found = predicted(spec)
            row = {"difference": float(np.abs(found["probabilities"] - right["probabilities"]).max())}
        except DeviceError as error:
            row = {"told": str(error)}
        torch.cuda.set_per_process_memory_fraction(1.0)
        tell(case=f"{share:.0%}", **row)
        assert row.get("difference", 0) < 1e-4


@check("harm")
def memory_taken_by_another(output: Path) -> None:
    """A run beside a program that holds almost all memory ends well or says why not."""
    import torch

    folder = tomograms(output / "beside", edge_of(96), 1)
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.ones(1 if FAKED else int(0.95 * free), dtype=torch.uint8, device="cuda")
    text = command("semantic-predict", "--config-file", "config.yaml", "--device", "cuda", folder=folder, status=None)
    del ballast
    told = [line for line in text.splitlines() if "error" in line or "FAILED" in line][:3]
    tell(done=" done " in text, told=told)
    assert " done " in text or told, text[-2000:]


@check("harm")
def largest_patch(output: Path) -> None:
    """`patch_size: auto` ends with labels."""
    folder = tomograms(output / "auto", edge_of(256), 1, {"data": {"patch_size": "auto"}})
    text = command("semantic-predict", "--config-file", "config.yaml", "--device", "cuda", folder=folder)
    (line,) = [line for line in text.splitlines() if "is the largest that fits" in line]
    tell(told=line.strip())


def run_disturbed(output: Path, name: str, disturb: Callable[[subprocess.Popen[str], Path], object]) -> None:
    """Compare the labels of a run that is disturbed, and gone on with if it stopped, to those of another one."""
    folder = tomograms(output / name, edge_of(256), 2, block_size=16 if FAKED else 64)
    arguments = ["semantic-predict", "--config-file", "config.yaml", "--device", "cuda"]
    command(*arguments, folder=folder)
    right = labels_in(folder / "out")
    shutil.rmtree(folder / "out")
    began = subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    what = disturb(began, folder)
    text, _ = began.communicate()
    assert "Traceback" not in text, text[-2000:]
    first = began.returncode
    command(*arguments, folder=folder)
    found = labels_in(folder / "out")
    shares = [float((found[key] == values).mean()) for key, values in right.items()]
    tell(disturbed=what, status=first, equal=shares)
    assert what, "the run ended before it was disturbed"
    assert len(shares) == 2 and min(shares) == 1


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    import psutil

    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                found += [child.pid] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


def until(process: subprocess.Popen[str], happened: Callable[[], object]) -> Any:
    """Wait for something while a command runs; ``None`` if it ended before."""
    while process.poll() is None:
        if found := happened():
            return found
        time.sleep(0.02)
    return None


@check("harm")
def killed_while_it_starts(output: Path) -> None:
    def kill(process: subprocess.Popen[str], folder: Path) -> str | None:
        if found := until(process, lambda: workers_of(process)):
            os.kill(found[0], signal.SIGKILL)
            return "SIGKILL"
        return None

    run_disturbed(output, "start", kill)


def predicting(folder: Path) -> bool:
    return any((folder / "out").glob("*.work.zarr/**/c/**/0"))


@check("harm")
def killed_in_a_block(output: Path) -> None:
    def kill(process: subprocess.Popen[str], folder: Path) -> str | None:
        if until(process, lambda: predicting(folder)) and (found := workers_of(process)):
            os.kill(found[0], signal.SIGKILL)
            return "SIGKILL"
        return None

    run_disturbed(output, "killed", kill)


@check("harm")
def interrupted_and_resumed(output: Path) -> None:
    def interrupt(process: subprocess.Popen[str], folder: Path) -> str | None:
        if until(process, lambda: predicting(folder)):
            process.send_signal(signal.SIGINT)
            return "SIGINT"
        return None

    run_disturbed(output, "resumed", interrupt)


@check("harm")
def an_assertion_on_the_device(output: Path) -> None:
    """And metrics of the GPU."""
    tests(["tests/test_on_gpu.py", "-k", "each_worker_has_its_gpu"])


def hang_once(mark: Path, number: int) -> int:
    with suppress(FileExistsError):
        mark.touch(exist_ok=False)
        time.sleep(600)
    return number


@check("harm")
def a_hang(output: Path) -> None:
    """A call that does not end is done again in another process."""
    from cryosiam_dask.runs.cluster import open_cluster
    from cryosiam_dask.runs.dask_executor import DaskExecutor

    (output / "hung").unlink(missing_ok=True)
    with open_cluster("cuda", 0, dashboard_address="127.0.0.1:0") as client:
        executor = DaskExecutor(client, hang_seconds=2)
        assert executor.map(partial(hang_once, output / "hung"), range(4), name="hang") == [0, 1, 2, 3]
    tell(hung=(output / "hung").exists())


@check("harm")
def nothing_is_left(output: Path) -> None:
    """While a run works, only its workers use the GPU; afterwards nobody does, and its memory is free."""
    folder = tomograms(output / "left", edge_of(256), 1)
    others, before = compute_processes(), memory_in_use()
    process = subprocess.Popen(
        [*COMMAND, "semantic-predict", "--config-file", "config.yaml", "--device", "cuda"], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    seen: set[int] = set()
    children: set[int] = set()
    while process.poll() is None:
        children |= set(workers_of(process))
        seen |= compute_processes() - others
        time.sleep(0.1)
    time.sleep(0 if FAKED else 2)
    after = memory_in_use()
    left = len(compute_processes() - others)
    tell(processes=len(seen), of_workers=len(seen & children), left=left, bytes=after - before)
    # In a container NVML tells the numbers that processes have outside it.
    assert process.returncode == 0 and not left and after - before < 64 * 2**20


# ---- running them ----


def run(part: str, name: str, output: Path, seconds: float, write: Callable[[Row], None]) -> str:
    """Run a check in a process group of its own; returns its status."""
    began = time.monotonic()
    log = output / f"{part} {name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, "--part", part, "--child", name, "--output", str(output)],
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def stop() -> None:
            late.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(1.0, seconds), stop)
        timer.start()
        status = "ok"
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                values = json.loads(line)
                status = "skipped" if "skipped" in values else status
                write({"part": part, "check": name, **values})
        process.wait()
        timer.cancel()
    if late.is_set():
        status = "out of time"
    elif process.returncode:
        status = "failed"
    last = log.read_text().strip().splitlines()[-1:] if status == "failed" else []
    write({"part": part, "check": name, "status": status, "seconds": round(time.monotonic() - began, 1), "fake": FAKED,
           **({"why": last[0][:500]} if last else {})})  # fmt: skip
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(CHECKS), required=True)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--output", type=Path, required=True, help="folder of rows.jsonl, logs and what checks write")
    parser.add_argument("--only", nargs="*", help="names of checks; all of the part by default")
    parser.add_argument("--fake", action="store_true", help="run on faked GPUs, which shows whether the checks work")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    output = options.output.absolute()
    if options.child:
        CHECKS[options.part].get(options.child, print_digest)(output)
        return 0
    if options.fake and not FAKED:
        from support.gpus import environment

        return subprocess.run([sys.executable, __file__, *(arguments or sys.argv[1:])], env=environment(1)).returncode
    path = output / "rows.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("\n" if path.read_bytes()[-1:] not in (b"", b"\n") else "")  # after a row that a kill cut off
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror}")
    names = [name for name in CHECKS[options.part] if not options.only or name in options.only]
    if unknown := set(options.only or ()) - set(names):
        parser.error(
            f"no check of this part: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS[options.part])}"
        )
    end = time.monotonic() + options.seconds

    def write(row: Row) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def statuses() -> dict[str, Row]:
        return {row["check"]: row for row in known(output) if row["part"] == options.part and "status" in row}

    for name in names:
        if statuses().get(name, {}).get("status") in ("ok", "skipped"):
            continue
        left = end - time.monotonic()
        if left <= 0:
            break
        print(f"{name} …", flush=True)
        run(options.part, name, output, left, write)
    found = statuses()
    print(f"\n{options.part}{' on faked GPUs, which says nothing about a GPU' * FAKED}")
    for name in names:
        row = found.get(name, {"status": "not begun"})
        print(f"  {name:36}{row['status']:12}{row.get('seconds', ''):>8}  {row.get('why', '')[:100]}")
    ended = {found.get(name, {"status": ""})["status"] for name in names}
    return 1 if "failed" in ended else 0 if ended <= {"ok", "skipped"} else 3


if __name__ == "__main__":
    sys.exit(main())
