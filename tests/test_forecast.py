"""What `plan` says before a run, against what then happens."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cryosiam_dask.commands.forecast import Forecast, TomogramForecast, forecast, masking, pace_of_runs, unreadable
from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.core.executor import GuardedExecutor, NamedExecutor, SerialExecutor
from cryosiam_dask.core.grid import make_grid
from cryosiam_dask.files.mask import open_mask, read_mask
from cryosiam_dask.runs.collection import run
from cryosiam_dask.runs.ledger import Ledger, read_outcomes
from cryosiam_dask.runs.outcome import Outcome, record
from cryosiam_dask.runs.plan import plan_run
from cryosiam_dask.stages.ingest import convert
from support import checkpoints

SHAPE = (40, 36, 44)


class Silent:
    """A reporter that says nothing."""

    def begin(self, tomogram: str) -> None: ...
    def step(self, tomogram: str, name: str, done: int, total: int) -> None: ...
    def end(self, tomogram: str, message: str, **options: Any) -> None: ...
    def inform(self, message: str) -> None: ...
    def close(self) -> None: ...


def write_tomogram(path: Path, voxels: np.ndarray) -> None:
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(voxels)
        mrc.voxel_size = 9.96


def write_mask(path: Path, mask: np.ndarray, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("labels", data=mask, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tomograms of noise in [0, 1), masks for them, and a checkpoint."""
    for name in ("data", "masks"):
        (tmp_path / name).mkdir()
    for seed, stem in enumerate(("TS_1", "TS_2")):
        write_tomogram(tmp_path / "data" / f"{stem}.mrc", np.random.default_rng(seed).random(SHAPE, np.float32))
        mask = np.zeros(SHAPE, np.uint8)
        mask[:10] = 1
        write_mask(tmp_path / "masks" / f"{stem}_preds.h5", mask)
    checkpoints.write(tmp_path / "model.ckpt", seed=35)
    return tmp_path


def configure(folder: Path, *, data: dict[str, Any] | None = None, network: dict[str, Any] | None = None,
              **changes: Any) -> Configuration:  # fmt: skip
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
        "parameters": {"data": data or {}, "network": network or {}},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def predicted(configuration: Configuration, **options: Any) -> Forecast:
    return forecast(plan_run(configuration), **options)


def of(found: Forecast, stem: str = "TS_1") -> TomogramForecast:
    return next(tomogram for tomogram in found.tomograms if tomogram.stem == stem)


def test_the_time_of_a_run_is_told_from_the_latest_like_it(folder: Path) -> None:
    configuration = configure(folder)
    plan = plan_run(configuration)
    patches = make_grid(SHAPE, plan.patch).patch_count
    assert pace_of_runs(plan, "cpu", 2) is None

    def record(stem: str, began: float, ended: float, **changes: Any) -> None:
        known = {"status": "done", "shape": SHAPE, "model": plan.model, "device": "cpu", "workers": 2, "run": "2"}
        Ledger(folder / "out", stem).close(**{**known, "began": began, "ended": ended, **changes})

    (folder / "out").mkdir()
    record("a", 0, 1000, run="1")
    record("b", 0, 60)
    record("c", 50, 100)  # begun before the one before has ended
    record("d", 300, 400)  # after a pause
    record("e", 0, 1, status="failed")
    record("f", 0, 1, device="cuda", run="3")
    record("g", 0, 1, model=["another"], run="3")
    pace = pace_of_runs(plan, "cpu", 2)
    assert pace is not None and pace.patches_per_second == pytest.approx(3 * patches / 200)
    assert pace.source == "as fast as in the latest run, 3 tomograms on 2 cpu workers"
    twice = pace_of_runs(plan, "cpu", 4)
    assert twice is not None and twice.patches_per_second == pytest.approx(2 * pace.patches_per_second)
    assert pace_of_runs(plan, "cpu", None) == pace
    found = forecast(plan, pace=pace)
    assert found.seconds == pytest.approx(2 * patches / pace.patches_per_second) and found.pace == pace.source
    assert forecast(plan).seconds is None
    record("f", 0, 1, device="cuda", run="3", workers=8)
    of_gpus = pace_of_runs(plan, "cuda", None)
    assert of_gpus is not None and of_gpus.source.endswith("1 tomogram on 8 cuda workers")


def test_the_workers_of_a_run_count_all_however_many_tomograms_share_them(folder: Path) -> None:
    class Four(SerialExecutor):
        workers = 4

    plan = plan_run(configure(folder))
    (folder / "out").mkdir()
    shared = NamedExecutor(GuardedExecutor(Four(), lambda: None, lambda: 3), "lamella")
    assert shared.workers == 2
    record(plan, Outcome("TS_1", "done", SHAPE, 1.0), 0.0, "cpu", shared)
    assert read_outcomes(folder / "out")["TS_1"]["workers"] == 4


def test_what_a_biologist_wants_to_know(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    found = predicted(configure(folder, mask_folder=str(folder / "masks"), block_size=24), workers=2)
    assert sorted(path for path in folder.rglob("*") if path.name != "config.yaml") == before
    import torch

    assert not torch.cuda.is_initialized()
    tomogram = of(found)
    assert (tomogram.action, tomogram.shape, tomogram.dtype) == ("segment", SHAPE, "float32")
    assert tomogram.voxel_size_angstrom == pytest.approx((9.96,) * 3)
    assert tomogram.outputs == (folder / "out" / "TS_1_preds.h5",) and not tomogram.warnings
    grid = make_grid(SHAPE, (16, 16, 16), 24)
    assert tomogram.blocks == len(grid.indices()) and tomogram.patches == grid.patch_count
    shapes = [tuple(part.stop - part.start for part in block.region) for block in grid]
    assert tomogram.block_shape == tuple(map(max, zip(*shapes, strict=True)))
    assert tomogram.mask is not None and tomogram.mask.exact
    assert tomogram.mask.coverage == 10 / SHAPE[0]
    assert tomogram.mask.blocks_ruled_out == sum(block.region[0].start >= 10 for block in grid)
    assert found.workers == 2 and found.bytes_per_worker > found.block_bytes + found.network_bytes
    assert (found.classes, found.patch, found.threshold, found.scaling) == (3, (16, 16, 16), 0.1, (0, 1))
    assert not found.warnings and not found.all_problems
    assert found.as_json() == json.loads(json.dumps(found.as_json(), allow_nan=False))


@pytest.mark.parametrize(
    ("low", "high", "warned"),
    [(0, 1, ""), (0.02, 0.98, ""), (0.04, 0.97, "clipped"), (-50, 50, "next to no contrast"), (2, 3, "100 % of its")],
)
def test_how_intensities_fall_into_the_range(folder: Path, low: float, high: float, warned: str) -> None:
    found = of(predicted(configure(folder, data={"min": low, "max": high}, mask_folder=str(folder / "masks"))))
    voxels = np.random.default_rng(0).random(SHAPE, np.float32)
    assert found.intensities is not None and found.intensities.share == 1
    assert found.intensities.below == np.mean(voxels < low) and found.intensities.above == np.mean(voxels > high)
    assert warned in " ".join(found.warnings) and bool(found.warnings) == bool(warned)


def speckled(seed: int) -> np.ndarray:
    """Dark grains on bright, in what a detector counts."""
    rng = np.random.default_rng(seed)
    voxels = rng.normal(0, 0.1, (32, 48, 48)) + (rng.random((32, 48, 48)) < 0.01) * 3
    return (9000 - 2000 * voxels).astype(np.int16)


def test_dark_tomograms_that_are_not_scaled_are_said_once(folder: Path) -> None:
    for seed in (1, 2):
        write_tomogram(folder / "data" / f"TS_{seed}.mrc", speckled(seed))
    found = predicted(configure(folder))
    assert all(t.intensities is not None and t.intensities.contrast == "dark on bright" for t in found.tomograms)
    said = [warning for warning in found.warnings if "of 2 tomograms" in warning]
    assert len(said) == 2 and all(warning.startswith("2 of 2 tomograms: ") for warning in said)
    lines = re.findall("'([a-z]+: [^']+)'", " ".join(said))
    assert [line.split(":")[0] for line in lines] == ["min", "max", "invert", "invert"]
    assert all(warning.startswith(found.shared) for t in found.tomograms for warning in t.warnings)
    pasted = yaml.safe_load("\n".join(lines[:3]))
    again = predicted(configure(folder, data=pasted))
    assert not any("of 2 tomograms" in warning for warning in again.warnings)
    assert not any(t.warnings for t in again.tomograms) and again.scaling == (pasted["max"], pasted["min"])
    known = predicted(configure(folder, data={**pasted, "invert": False}))  # by whoever has another model
    assert not any("dense matter" in warning for warning in known.warnings)


def test_a_single_dark_tomogram_is_said_to_be_one(folder: Path) -> None:
    write_tomogram(folder / "data" / "TS_1.mrc", speckled(1))
    write_tomogram(folder / "data" / "TS_2.mrc", 18000 - speckled(2))
    found = predicted(configure(folder, data={"min": 0, "max": 18000}))
    assert "'invert: true'" in " ".join(of(found).warnings) and not of(found, "TS_2").warnings


def test_what_is_judged_by_the_beginning_of_a_compressed_file_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in list((folder / "data").iterdir()):
        path.with_suffix(".mrc.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr("cryosiam_dask.stages.intensities.SAMPLE_STREAM_BYTES", 4 * 4 * SHAPE[1] * SHAPE[2])
    found = of(predicted(configure(folder, file_extension=".mrc.gz", data={"max": 0.5})))
    assert found.intensities is not None and found.intensities.share == 0.1
    (warning,) = found.warnings
    assert "are clipped" in warning and "judging by the first 4 of the 40 sections of the compressed file" in warning


def test_nan_is_warned_of_and_not_in_the_json(folder: Path) -> None:
    with pytest.warns(RuntimeWarning, match="NaN"):
        write_tomogram(folder / "data" / "TS_1.mrc", np.full(SHAPE, np.nan, np.float32))
    found = predicted(configure(folder))
    assert any("NaN or infinite" in w for w in of(found).warnings)
    assert any("no voxel is a finite number" in w for w in of(found).warnings)
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("kind", ["labels", "internals", "lamella", "sizes", "components", "mrc"])
def test_disk_is_no_less_than_what_a_run_takes(folder: Path, kind: str) -> None:
    changes: dict[str, Any] = {
        "labels": {},
        "internals": {"save_internal_files": True},
        "lamella": {"network": {"postprocessing": True}},
        "sizes": {"network": {"postprocessing_sizes": [-1, 5, 5]}},
        "components": {"components": True, "network": {"postprocessing_sizes": [-1, 5, 5]}},
        "mrc": {"save_original_file_extension": True},
    }[kind]
    configuration = configure(folder, keep_work=True, work_folder=str(folder / "work"), **changes)
    found = predicted(configuration)
    assert {outcome.status for outcome in run(plan_run(configuration), Silent())} == {"done"}
    described = 20_000  # attributes, headers and tables, whatever the volume
    for stem in ("TS_1", "TS_2"):
        work = sum(path.stat().st_size for path in (folder / "work" / f"{stem}.work.zarr").rglob("*") if path.is_file())
        assert 4 * math.prod(SHAPE) // 2 < work <= of(found, stem).work_bytes + described
        outputs = [path for path in of(found, stem).outputs if path.suffix not in (".csv", ".parquet")]
        assert all(path.exists() for path in of(found, stem).outputs)
        written = sum(path.stat().st_size for path in outputs)
        assert of(found, stem).certain_output_bytes <= written <= of(found, stem).output_bytes + described
    (disk,) = found.disks
    # Both folders lie on one file system, and the work of all tomograms is kept.
    assert disk.needed_bytes == sum(t.work_bytes + t.output_bytes for t in found.tomograms)
    assert set(disk.folders) == {folder / "out", folder / "work"}


def test_a_zarr_is_read_where_it_is_and_other_formats_count(folder: Path) -> None:
    copied = of(predicted(configure(folder, work_folder=str(folder / "work"))))
    assert of(predicted(configure(folder))).work_bytes == copied.work_bytes - 4 * math.prod(SHAPE)
    convert(folder / "data" / "TS_1.mrc", folder / "data" / "TS_1.zarr")
    (found,) = predicted(configure(folder, file_extension=".zarr")).tomograms
    assert copied.work_bytes - found.work_bytes == 4 * math.prod(SHAPE) and found.certain_work_bytes == 0
    assert found.patches == copied.patches and found.intensities == copied.intensities
    formats = of(predicted(configure(folder, output_formats=["ome-zarr", "mrc"])))
    assert {path.name for path in formats.outputs} == {"TS_1_preds.h5", "TS_1.ome.zarr", "TS_1_labels.mrc"}
    # A tomogram of floats with its labels, and the labels once more.
    assert formats.output_bytes - copied.output_bytes >= (5 + 1) * math.prod(SHAPE)
    assert formats.certain_output_bytes == math.prod(SHAPE)


def test_work_that_is_removed_counts_once_for_each_tomogram_at_a_time(folder: Path) -> None:
    configuration = configure(folder)
    one, two = (predicted(configuration, concurrent=n).disks[0].needed_bytes for n in (1, 2))
    assert two - one == of(predicted(configuration), "TS_2").work_bytes


def test_a_tomogram_larger_than_the_disk_is_a_problem(folder: Path) -> None:
    """A sparse file: what it would take is not there to be taken."""
    with mrcfile.new_mmap(folder / "data" / "TS_3.mrc", (8, 8, 8), mrc_mode=2) as mrc:
        mrc.header.nx = mrc.header.mx = mrc.header.ny = mrc.header.my = 60_000
        mrc.header.nz = mrc.header.mz = 900
    with (folder / "data" / "TS_3.mrc").open("r+b") as file:
        file.truncate(1024 + 4 * 60_000 * 60_000 * 900)
    found = predicted(configure(folder, work_folder=str(folder / "work")))
    assert len(found.problems) == 1 and "there must be 13.0 TB of free disk space" in found.problems[0]
    assert found.all_problems == found.problems
    assert of(found, "TS_3").intensities.share < 1e-5  # type: ignore[union-attr]


def test_what_is_skipped_or_only_measured(folder: Path) -> None:
    run(plan_run(configure(folder), filename="TS_1.mrc"), Silent())
    found = predicted(configure(folder))
    assert [t.action for t in found.tomograms] == ["skip", "segment"]
    assert "the same input, checkpoint and settings" in of(found).reason
    found = predicted(configure(folder, components=True))
    assert [t.action for t in found.tomograms] == ["measure", "segment"]
    assert "its components are not" in of(found).reason and of(found).shape == SHAPE
    assert {path.name for path in of(found).outputs} == {f"TS_1_components.{e}" for e in ("h5", "csv", "parquet")}


def test_every_tomogram_that_cannot_be_done_is_named(folder: Path) -> None:
    whole = (folder / "data" / "TS_1.mrc").read_bytes()
    (folder / "data" / "TS_1.mrc").write_bytes(whole[:-100])
    (folder / "data" / "notes.mrc").write_text("not a tomogram")
    write_tomogram(folder / "data" / "image.mrc", np.zeros((30, 40), np.float32))
    found = predicted(configure(folder))
    assert {t.stem: t.action for t in found.tomograms} == {
        "TS_1": "refuse", "TS_2": "segment", "notes": "refuse", "image": "refuse"
    }  # fmt: skip
    assert (
        len(found.all_problems) == 3 and "as many axes as the tomogram, which has 2" in of(found, "image").problems[0]
    )
    assert len(unreadable(configure(folder))) == 2


def test_what_is_wrong_with_masks(folder: Path) -> None:
    write_mask(folder / "masks" / "TS_1_preds.h5", np.full(SHAPE, 7))
    write_mask(folder / "masks" / "TS_2_preds.h5", np.zeros(SHAPE, np.uint8))
    write_tomogram(folder / "data" / "TS_3.mrc", np.random.default_rng(3).random(SHAPE, np.float32))
    write_mask(folder / "masks" / "TS_3_preds.h5", np.ones(SHAPE, np.uint8))
    found = predicted(configure(folder, mask_folder=str(folder / "masks")))
    assert "must hold only 0 (outside) and 1 (inside)" in of(found).problems[0]
    assert "is empty: every voxel will be background" in of(found, "TS_2").warnings[0]
    assert "the mask covers 100 %" in of(found, "TS_3").warnings[0]
    assert "no mask_folder is set" in predicted(configure(folder)).warnings[0]


def test_memory_that_the_machine_does_not_have(folder: Path) -> None:
    assert not predicted(configure(folder, mask_folder=str(folder / "masks")), memory_bytes=10**12).warnings
    (warning,) = predicted(configure(folder, mask_folder=str(folder / "masks")), workers=4, memory_bytes=10**9).warnings
    assert "4 workers on CPUs need about" in warning and "has 1.0 GB" in warning


#: Intensities that no model was trained on, and one that it was.
UNFIT = {
    "fit": lambda v: v,
    "z_scored": lambda v: (v - v.mean()) / v.std(),
    "inverted": lambda v: -v,
    "bytes": lambda v: (255 * v).astype(np.uint8),
    "int16": lambda v: (2000 * v - 500).astype(np.int16),
    "sliver": lambda v: 1000 + v / 1000,
    "constant": lambda v: np.full_like(v, 0.7),
    "nan_slab": lambda v: np.where(np.arange(len(v))[:, None, None] < 8, np.float32("nan"), v),
    "all_nan": lambda v: np.full_like(v, np.nan),
    "complex": lambda v: v.astype(np.complex64),
}


@pytest.mark.filterwarnings("ignore:Data array contains NaN")  # of the library that writes it
@pytest.mark.parametrize("classes", [1, 3])
def test_a_run_says_what_was_said_before_it(folder: Path, classes: int) -> None:
    checkpoints.write(folder / "model.ckpt", replace(checkpoints.SMALL, out_channels=classes))
    for path in (folder / "data").iterdir():
        path.unlink()
    voxels = np.random.default_rng(1).random((20, 18, 17), np.float32)
    for name, change in UNFIT.items():
        write_tomogram(folder / "data" / f"{name}.mrc", change(voxels))
    planned = plan_run(configure(folder)).with_shapes()
    before = forecast(planned)
    outcomes = {outcome.stem: outcome for outcome in run(planned, Silent())}
    recorded = read_outcomes(planned.configuration.prediction_folder)
    assert len(outcomes) == len(UNFIT)
    for name, outcome in outcomes.items():
        said = of(before, name)
        expected = [warning.replace("some voxels are NaN", "") for warning in said.warnings]
        assert outcome.status == "done" and bool(said.warnings) == (name != "fit")
        assert all(any(sentence in warning for warning in outcome.warnings) for sentence in expected)
        assert outcome.notes == said.notes
        assert recorded[name]["warnings"] == list(outcome.warnings)
        with h5py.File(said.outputs[0]) as file:
            assert all(sentence in file.attrs["warnings"] for sentence in expected)
    assert "2448 voxels are NaN" in " ".join(outcomes["nan_slab"].warnings)
    assert "and 1000.00098" in " ".join(outcomes["sliver"].warnings)  # digits that tell both ends apart


def test_a_mask_of_another_shape_is_said_and_one_of_other_proportions_fails_alone(folder: Path) -> None:
    write_mask(folder / "masks" / "TS_1_preds.h5", np.ones([n // 2 for n in SHAPE], np.uint8))
    write_mask(folder / "masks" / "TS_2_preds.h5", np.ones(SHAPE[::-1], np.uint8))
    planned = plan_run(configure(folder, mask_folder=str(folder / "masks"))).with_shapes()
    found = forecast(planned)
    said = f"{folder}/masks/TS_1_preds.h5 has 20 × 18 × 22 voxels and is resized to 40 × 36 × 44"
    first, second = run(planned, Silent())
    assert any(said in warning for warning in of(found).warnings) and found.status == 1
    assert any(said in warning for warning in first.warnings) and first.status == "done"
    assert second.status == "failed" and second.kind == "MaskError" and second.error == of(found, "TS_2").problems[0]
    assert "44 × 36 × 40 voxels (z, y, x) for a tomogram of 40 × 36 × 44" in second.error
    assert "numpy.transpose(labels, (2, 1, 0))" in second.error


def test_a_patch_that_is_still_to_be_chosen(folder: Path) -> None:
    found = predicted(configure(folder, data={"patch_size": "auto"}))
    assert any("patch_size auto" in note for note in found.notes)


@settings(max_examples=30)
@given(
    st.tuples(*[st.integers(1, 30)] * 3),
    st.sampled_from([None, (4, 5, 6), (40, 40, 40)]),
    st.floats(0, 0.01),
    st.integers(0, 2**32 - 1),
)
def test_masks_are_counted_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    chunks: tuple[int, ...] | None,
    density: float,
    seed: int,
) -> None:
    """Against reading the mask of every block, as the run does."""
    voxels = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    chunks = None if chunks is None else tuple(map(min, chunks, shape))
    mask = open_mask(write_mask(tmp_path_factory.mktemp("m") / "m.h5", voxels, chunks=chunks), shape)
    grid = make_grid(shape, (8, 8, 8), 12)
    found = masking(mask, grid)
    assert found.exact and found.coverage == voxels.mean()
    assert found.blocks_ruled_out == sum(not read_mask(mask, block.region).any() for block in grid)


def test_large_or_resized_masks_are_estimated(tmp_path: Path) -> None:
    shape = (96, 96, 96)
    z, y, x = np.ogrid[:96, :96, :96]
    voxels = (np.abs(z - 40 + 0.2 * (y - 48)) < 20).astype(np.uint8) + 0 * x.astype(np.uint8)
    mask = open_mask(write_mask(tmp_path / "m.h5", voxels, chunks=(8, 8, 8)), shape)
    grid = make_grid(shape, (16, 16, 16), 24)
    whole = masking(mask, grid)
    part = masking(mask, grid, voxels=voxels.size // 4)
    assert whole.exact and not part.exact
    assert part.coverage == pytest.approx(voxels.mean(), abs=0.03)
    assert part.blocks_ruled_out == pytest.approx(whole.blocks_ruled_out, abs=0.15 * len(grid.indices()))
    half = open_mask(write_mask(tmp_path / "h.h5", voxels[::2, ::2, ::2]), shape)
    resized = masking(half, grid)
    assert not resized.exact and resized.coverage == pytest.approx(voxels.mean(), abs=0.01)
    truth = sum(not read_mask(half, block.region).any() for block in grid)
    assert resized.blocks_ruled_out == pytest.approx(truth, abs=0.1 * len(grid.indices()))
