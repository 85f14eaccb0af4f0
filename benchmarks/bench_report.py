"""What the page of a large collection costs: seconds to make it, its size, and seconds in a browser.

Three times: `read_seconds` where every output has to be looked into, `seconds` after a run of one tomogram, where what
the page needs of the others is kept, and `nothing_seconds` after a run that did nothing.

    python benchmarks/bench_report.py --count 500 --output benchmarks/results/report.json
    python benchmarks/bench_report.py --count 200 --folder /tmp/collection   # and keep it, to be looked at
    python benchmarks/bench_report.py --quick              # seconds; the tests run it, so that it cannot rot

The tomograms are noise, their labels blobs, with the files and the pictures that a run writes. Of more than 500, those
from the 501st on have the files of the others. Some stand out: with
much or little of a class, with warnings, without preview, failed. In Chromium, where Playwright finds one, it is opened
(`open_seconds`, until its script has run), sorted by the first class, searched for one tomogram and searched for all
again; each of these ends with the picture that the browser has drawn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from rich.console import Console
from scipy import ndimage

sys.path[:0] = [str(Path(__file__).parent)]
from bench_inference import machine  # noqa: E402

from cryosiam_dask.commands.written import report_on  # noqa: E402
from cryosiam_dask.config import Configuration, read_configuration  # noqa: E402
from cryosiam_dask.files.claims import FOLDER  # noqa: E402
from cryosiam_dask.files.predictions import write_hdf5  # noqa: E402
from cryosiam_dask.runs.ledger import Ledger  # noqa: E402
from cryosiam_dask.runs.outcome import Outcome  # noqa: E402
from cryosiam_dask.stages.measurements import write_components  # noqa: E402
from cryosiam_dask.stages.preview import preview_file, write_preview  # noqa: E402

DIFFERENT = 500
NAMES = ("membrane", "ribosome", "microtubule", "actin")


def make_collection(
    folder: Path, count: int, *, shape: tuple[int, ...] = (40, 100, 90), components: bool = True
) -> tuple[Configuration, dict[str, dict[str, Any]]]:
    """Write the outputs of `count` made-up tomograms; returns their configuration and what became of each."""
    for part in ("data", "masks", "semantic"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    values = {
        "data_folder": str(folder / "data"),
        "mask_folder": str(folder / "masks"),
        "prediction_folder": str(folder / "semantic"),
        "trained_model": str(folder / "semantic.ckpt"),
        "class_names": list(NAMES),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    configuration = read_configuration(folder / "config.yaml")
    outcomes = {}
    for each in range(count):
        number = each % DIFFERENT
        rng = np.random.default_rng(number)
        name = f"TS_{each + 1}_9.96Apx"
        outcome: dict[str, Any] = {"status": "done", "seconds": float(rng.gamma(20, 9)), "warnings": (), "error": ""}
        outcomes[name] = outcome
        if number % 67 == 41:
            outcome |= {"status": "failed", "error": f"{name}.mrc: a tomogram must be complete; found 5000 bytes."}
            continue
        if number % 29 == 13:
            outcome["warnings"] = ("3 voxels are NaN or infinite and were treated as the minimum",)
        if number % 83 == 60:
            outcome["warnings"] = ("every voxel is background",)
        predictions = configuration.prediction_folder / f"{name}_preds.h5"
        if each >= DIFFERENT:
            link(folder, f"TS_{number + 1}_9.96Apx", name)
            continue
        if predictions.exists():  # a folder that was kept is measured again
            continue
        smooth = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), 4)
        smooth /= smooth.std()
        z, half = np.indices(shape)[0], shape[0] * rng.normal(0.3, 0.03)
        lamella = np.abs(z - shape[0] / 2) < half
        labels = np.zeros(shape, np.uint8)
        # Each class between two levels of the noise, wide apart in a few tomograms.
        for label, low in enumerate((0.8, 1.3, -1.2, -2.0), 1):
            wide = rng.normal(0.25, 0.03) * (2.2 if number % 47 == 10 * label else 1)
            labels[(smooth > low) & (smooth < low + wide) & lamella] = label
        if number % 83 == 60:
            labels[:] = 0
        tomogram = 0.5 + 0.1 * ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), 1) - 0.05 * (labels > 0)
        attributes = {
            "voxel_size_angstrom": (9.96,) * len(shape),
            "voxels": np.bincount(labels.ravel(), minlength=len(NAMES) + 1).tolist(),
            "warnings": "\n".join(outcome["warnings"]),
            "fingerprint": name,
        }
        write_hdf5(predictions, labels, attributes=attributes)
        inside = np.bincount(lamella.ravel()).tolist()
        write_hdf5(folder / "masks" / f"{name}_preds.h5", lamella.view(np.uint8), attributes={"voxels": inside})
        if components:
            work = zarr.create_group({})
            write_components(configuration.prediction_folder, name, labels, work=work, attributes=attributes)
        if number % 31 != 30:
            write_preview(
                preview_file(configuration.prediction_folder, name),
                tomogram,
                labels,
                voxel_size_angstrom=9.96,
                class_names=("", *NAMES),
                lamella=lamella,
                title=name,
                fingerprint=name,
            )
    for name, outcome in outcomes.items():
        if not (configuration.prediction_folder / FOLDER / f"{name}.jsonl").exists():
            Ledger(configuration.prediction_folder, name).close(**outcome)
    return configuration, outcomes


def link(folder: Path, like: str, name: str) -> None:
    """Give a tomogram the files of another one."""
    endings = ("preds.h5", "components.h5", "components.csv", "components.parquet", "preview.png")
    for part in (folder / "masks", folder / "semantic"):
        for ending in endings:
            with suppress(FileNotFoundError, FileExistsError):
                os.link(part / f"{like}_{ending}", part / f"{name}_{ending}")


#: An action on the page, until two frames later what came of it is on the screen; in seconds.
_MEASURE = """async (action) => {
  const began = performance.now();
  new Function(action)();
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return (performance.now() - began) / 1000;
}"""
_FIND = "const f = document.getElementById('find'); f.value = '%s'; f.dispatchEvent(new Event('input'));"


def in_browser(page: Path) -> dict[str, float]:
    """Seconds that a browser takes; empty without one."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    with sync_playwright() as driver:
        candidates = ("chromium", "chromium-browser", "google-chrome", driver.chromium.executable_path)
        found = next(filter(None, map(shutil.which, candidates)), None)
        if not found:
            return {}
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        # The page allows no script but its own, and these measure it.
        context = browser.new_context(viewport={"width": 1400, "height": 900}, bypass_csp=True)
        opened = context.new_page()
        began = time.perf_counter()
        opened.goto(page.as_uri())
        seconds = {"open_seconds": time.perf_counter() - began}
        actions = {
            "sort_seconds": "document.querySelectorAll('thead tr:nth-child(2) button')[0].click()",
            "filter_seconds": _FIND % "TS_1_9",
            "unfilter_seconds": _FIND % "",
        }
        for name, action in actions.items():
            seconds[name] = opened.evaluate(_MEASURE, action)
        browser.close()
    return {name: round(value, 3) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        count = 4 if options.quick else options.count
        configuration, outcomes = make_collection(folder, count)
        path, row = configuration.prediction_folder / "report.html", dict[str, float]()
        shutil.rmtree(configuration.prediction_folder / ".ledger" / "report", ignore_errors=True)
        path.unlink(missing_ok=True)
        one = [Outcome(next(iter(outcomes)), "done")]
        row["tomograms"] = count
        for name, of_run in (("read_seconds", one), ("seconds", one), ("nothing_seconds", [])):
            began = time.monotonic()
            report_on(configuration, of_run, Console(file=io.StringIO()))
            row[name] = round(time.monotonic() - began, 2)
        row["megabytes"] = round(path.stat().st_size / 1e6, 2)
        row |= in_browser(path)
    print(row)
    if options.output:
        options.output.write_text(json.dumps({"machine": machine("cpu"), "rows": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
