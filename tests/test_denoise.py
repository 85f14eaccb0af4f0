"""Denoising against what CryoSiam itself wrote, alone and as the first model of a pipeline."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import warnings
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
from hypothesis.extra.numpy import array_shapes, arrays
from rich.console import Console

from cryosiam_dask.commands.forecast import forecast_pipeline
from cryosiam_dask.commands.plan import show_plan
from cryosiam_dask.commands.report import write_report
from cryosiam_dask.config import read_configuration, read_denoiser, read_models
from cryosiam_dask.core.executor import SerialExecutor
from cryosiam_dask.errors import ConfigurationError, Problems, TomogramError
from cryosiam_dask.files.tomogram import read_header
from cryosiam_dask.runs.collection import remove_denoised, run
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.runs.ledger import read_entries
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import RunPlan, masks_made_before, plan_run, with_denoising
from cryosiam_dask.stages.denoise import stretch_of, with_own_moments
from cryosiam_dask.stages.intensities import intensities, sample_file
from support import checkpoints
from support.command import call, children, invoke, start
from support.runs import Acting, Listener, segment

GOLDEN = Path(__file__).parent / "data" / "denoise"
CHAIN = GOLDEN / "denoise_lamella_semantic"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.yaml"))
STEM = "TS_a_6.80Apx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(folder: Path, case: str, **changes: Any) -> dict[str, Any]:
    """A case as CryoSiam has it; returns its YAML file."""
    shutil.copytree(GOLDEN / case, folder, dirs_exist_ok=True)
    values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text()) | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return values


def written(path: Path) -> np.ndarray:
    with mrcfile.open(path) as mrc:
        assert mrc.data.dtype == np.float32
        return np.array(mrc.data)


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("case", CASES)
def test_equals_cryosiam(case: str, block_size: int | None, folder: Path) -> None:
    values = prepare(folder, case, block_size=block_size)
    outcomes = segment(read_configuration(folder / "config.yaml"))
    with np.load(folder / "expected.npz") as expected:
        names = [name for name in expected if name.endswith("denoised")]
        assert len(names) == len(outcomes)
        for name in names:
            of_one = name.removesuffix("denoised")
            stem = of_one.strip("/") or "tomo"
            assert outcomes[stem].status == "done", outcomes[stem].error
            path = folder / "out" / f"{stem}{values['file_extension']}"
            np.testing.assert_allclose(written(path), expected[name], atol=1e-4)
            with mrcfile.open(path) as mrc, mrcfile.open(folder / "data" / path.name, permissive=True) as raw:
                assert mrc.voxel_size.tolist() == pytest.approx(tuple(expected[f"{of_one}voxel_size"]))
                assert mrc.header.origin == raw.header.origin  # which CryoSiam loses
                assert mrc.nstart == raw.nstart and mrc.is_image_stack() == raw.is_image_stack()
            if values["save_raw_predictions"]:
                with h5py.File(folder / "out" / f"{stem}_preds.h5") as file:
                    np.testing.assert_allclose(file["preds"][:], expected[f"{of_one}preds"], atol=1e-4)
            else:
                assert not (folder / "out" / f"{stem}_preds.h5").exists()


def test_bytes_do_not_depend_on_blocks_or_batches(folder: Path) -> None:
    prepare(folder, "two_channels_scaled_raw", preview=False)
    found = []
    for changes in ({}, {"block_size": 8}, {"hyper_parameters": {"batch_size": 5}}):
        prepare(folder, "two_channels_scaled_raw", prediction_folder=f"out{len(found)}", **changes)
        segment(read_configuration(folder / "config.yaml"))
        with h5py.File(folder / f"out{len(found)}" / "tomo_preds.h5") as file:
            found.append((folder / f"out{len(found)}" / "tomo.mrc").read_bytes() + file["preds"][:].tobytes())
    assert found[1:] == found[:1] * 2


# ------------------------------------------------------------------------------------------------------------ pipeline


def chain(folder: Path, **common: Any) -> Path:
    """CryoSiam's three files for the same tomogram, as one."""
    shutil.copytree(CHAIN, folder, dirs_exist_ok=True)
    values: dict[str, Any] = {"data_folder": "data", **common}
    for name in ("denoise", "lamella", "semantic"):
        keys = yaml.safe_load((folder / f"config_{name}.yaml").read_text())
        for key in ("data_folder", "mask_folder", "test_files", "file_extension"):
            keys.pop(key, None)
        values[name] = keys
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    return folder / "pipeline.yaml"


def plans_of(pipeline: Path) -> list[RunPlan]:
    plans: list[RunPlan] = []
    for name, configuration in read_models(pipeline).items():
        pending = masks_made_before(plans, configuration) if plans else set()
        plans.append(plan_run(configuration, name=name, pending_inputs=pending))
    return with_denoising(plans)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outputs of a chain in many blocks, without pictures, to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        run_chain(chain(folder, block_size=16, preview=False))
        require_cryosiams(folder)
    return outputs(folder)


def run_chain(pipeline: Path, executor: SerialExecutor | None = None) -> list[Outcome]:
    return run(plans_of(pipeline), Listener(), executor=executor)


def require_cryosiams(folder: Path) -> None:
    with np.load(CHAIN / "expected.npz") as expected:
        np.testing.assert_allclose(written(folder / "denoised" / f"{STEM}.mrc"), expected["denoised"], atol=1e-4)
        for name in ("lamella", "semantic"):
            with h5py.File(folder / name / f"{STEM}_preds.h5") as file:
                np.testing.assert_array_equal(file["labels"][:], expected[name])


FOLDERS = ("denoised", "lamella", "semantic")


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in FOLDERS
        for path in sorted((folder / name).iterdir())
        if path.is_file()
    }


def test_one_command_goes_from_the_raw_tomogram_to_labels(folder: Path) -> None:
    """And reads no tomogram that it has written."""
    chain(folder)
    told = call("run", "pipeline.yaml", "--workers", 1, "--verbose", folder=folder)
    require_cryosiams(folder)
    assert not list(folder.rglob("*.work.zarr")) and told.count("done in") == 3
    assert call("run", "pipeline.yaml", "--workers", 1, folder=folder).count("skipped, ") == 3
    assert "3 done" in call("status", "pipeline.yaml", folder=folder)


def test_three_commands_equal_one(folder: Path) -> None:
    chain(folder)
    run_chain(folder / "pipeline.yaml")
    together = outputs(folder)
    for name in FOLDERS:
        shutil.rmtree(folder / name)
    for name in ("denoise", "lamella", "semantic"):
        assert segment(read_configuration(folder / f"config_{name}.yaml"))[STEM].status == "done"
    require_cryosiams(folder)
    assert outputs(folder).keys() == together.keys()
    # What three files made, the pipeline takes for its own.
    assert [plan.jobs for plan in plans_of(folder / "pipeline.yaml")[:1]] == [()]


STEPS = [
    ("denoise percentiles", 1), ("denoise predict", 5), ("denoise export", 1), ("lamella predict", 3),
    ("semantic predict", 3),
]  # fmt: skip


def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bytes(folder: Path, whole: dict[str, bytes]) -> None:
    pipeline = chain(folder, block_size=16, preview=False)
    for step, count in STEPS:
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        acting = Acting(lambda executor: executor.drain(), step, count)
        assert "left" in {outcome.status for outcome in run_chain(pipeline, acting)}, step
        assert {outcome.status for outcome in run_chain(pipeline)} <= {"done", "skipped"}
        assert outputs(folder) == whole, step
        assert not list(folder.rglob("*.work.zarr"))


def test_runs_that_are_killed_in_every_model_end_with_the_same_bytes(folder: Path, whole: dict[str, bytes]) -> None:
    """First the worker, which is replaced, and then all processes of the run."""
    pipeline = chain(folder, block_size=16, preview=False)
    for name in FOLDERS:
        process = start(
            "run", "pipeline.yaml", "--workers", 1, "--device", "cpu", folder=folder, start_new_session=True
        )
        before = 0
        for kill in (os.kill, os.killpg):
            while (found := blocks(folder / name)) <= before:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            kill(process.pid if kill is os.killpg else children(process.pid)[0], signal.SIGKILL)
            before = found
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and blocks(folder / name)
    assert [outcome.status for outcome in run_chain(pipeline)] == ["skipped", "skipped", "done"]
    assert outputs(folder) == whole


def blocks(prediction_folder: Path) -> int:
    """How many are recorded."""
    return sum(entry["what"] == "block" for entry in read_entries(prediction_folder, STEM)[0])


def without_denoised(folder: Path, **changes: Any) -> Path:
    pipeline = chain(folder, preview=False)
    values = yaml.safe_load(pipeline.read_text())
    values["denoise"] |= {"keep_denoised": False, **changes}
    pipeline.write_text(yaml.safe_dump(values))
    return pipeline


def test_a_denoised_file_that_is_not_kept_is_removed_in_the_end(folder: Path) -> None:
    """And what is done stays done, for every command."""
    pipeline = without_denoised(folder)
    path = folder / "denoised" / f"{STEM}.mrc"
    with np.load(CHAIN / "expected.npz") as expected:
        invoke("run", pipeline, "--workers", 1, folder=folder)
        for name in ("lamella", "semantic"):
            with h5py.File(folder / name / f"{STEM}_preds.h5") as file:
                np.testing.assert_array_equal(file["labels"][:], expected[name])
    assert not path.exists()
    page = folder / "denoised" / "report.html"
    before, pages = outputs(folder), [page.read_text()]
    assert invoke("run", pipeline, "--workers", 1, folder=folder).count("skipped, ") == 3
    assert invoke("semantic-predict", pipeline, "--workers", 1, folder=folder).count("skipped, ") == 1
    assert outputs(folder).keys() == before.keys()
    assert "3 done" in invoke("status", pipeline, folder=folder)
    planned = invoke("plan", pipeline, folder=folder)
    assert (
        f"{STEM}.mrc was made from the same input, checkpoint and settings, and removed because all models" in planned
    )
    assert "no masks" not in planned
    assert "Make it again with denoise-predict, or" in invoke(
        "export", pipeline, "--format", "ome-zarr", status=1, folder=folder
    )
    for name in ("denoise", "lamella", "semantic"):
        invoke("report", pipeline, "--model", name, folder=folder)
    for text in (*pages, page.read_text()):
        assert STEM in text and "60 × 64 × 56" in text and ">done<" in text and "6.8 (0.68)" in text


def test_a_denoised_file_that_is_not_kept_is_made_again_where_it_is_needed(folder: Path) -> None:
    pipeline = without_denoised(folder)
    path, labels = folder / "denoised" / f"{STEM}.mrc", folder / "semantic" / f"{STEM}_preds.h5"
    run_chain(pipeline)
    whole = labels.read_bytes()
    labels.unlink()
    with pytest.raises(Problems, match=f"{STEM}.mrc must be denoised first"):
        plan_run(read_models(pipeline, "semantic")[""])
    assert [len(plan.jobs) for plan in plans_of(pipeline)] == [1, 0, 1]
    assert {outcome.stage: outcome.status for outcome in run_chain(pipeline)} == {
        "denoise": "done", "lamella": "skipped", "semantic": "done"
    }  # fmt: skip
    assert labels.read_bytes() == whole and not path.exists()
    # Alone, the denoiser makes it for a look; the next run of all removes it.
    assert segment(read_denoiser(pipeline))[STEM].status == "done" and path.exists()
    assert [len(plan.skipped) for plan in plans_of(pipeline)] == [1, 1, 1]
    remove_denoised(plans_of(pipeline))
    assert not path.exists() and [len(plan.skipped) for plan in plans_of(pipeline)] == [1, 1, 1]
    # That the file is gone is no problem beside others.
    with pytest.raises(Problems) as raised, Path(os.devnull).open("w") as null:
        values = yaml.safe_load(pipeline.read_text())
        values["semantic"]["parameters"]["network"]["threshold"] = 0.3
        pipeline.write_text(yaml.safe_dump(values))
        show_plan(pipeline, Console(file=null), workers=1)
    assert len(raised.value.problems) == 1 and "made from another input" in str(raised.value)
    # A changed denoiser is told before anything is computed.
    without_denoised(folder, scale_prediction=False)
    with pytest.raises(Problems, match="made from another input or checkpoint, or with other settings"):
        plans_of(pipeline)


def test_a_run_beside_another_one_finds_what_that_has_done_and_removed(folder: Path) -> None:
    pipeline = without_denoised(folder)
    planned_before = plans_of(pipeline)
    run_chain(pipeline)
    before, executor = outputs(folder), Acting(lambda executor: executor.drain(), "denoise predict", 1)
    outcomes = run(planned_before, Listener(), executor=executor)
    assert [outcome.status for outcome in outcomes] == ["skipped"] * 3 and not executor.done
    assert outputs(folder) == before


def test_a_denoised_file_stays_until_all_models_are_done(folder: Path) -> None:
    pipeline = without_denoised(folder)
    path = folder / "denoised" / f"{STEM}.mrc"
    for stage in ("lamella", "semantic"):
        run_chain(pipeline, Acting(lambda executor: executor.drain(), f"{stage} predict", 1))
        assert path.exists()
    assert {outcome.status for outcome in run_chain(pipeline)} <= {"done", "skipped"} and not path.exists()
    pipeline = chain(folder, preview=False)  # which keeps it
    assert [len(plan.jobs) for plan in plans_of(pipeline)] == [1, 1, 1]


def test_the_plan_knows_that_denoised_files_go(folder: Path) -> None:
    """Of ten, there are only those of the tomograms in progress."""
    needed = []
    for make in (chain, without_denoised):
        pipeline = make(folder, preview=False)
        for n in range(9):
            shutil.copy(folder / "data" / f"{STEM}.mrc", folder / "data" / f"TS_{n}.mrc")
        (disk,) = forecast_pipeline(plans_of(pipeline), concurrent=3).disks
        needed.append((disk.needed_bytes, disk.certain_bytes))
    of_one = 4 * 60 * 64 * 56
    assert (needed[0][0] - needed[1][0], needed[0][1] - needed[1][1]) == (7 * of_one, 9 * of_one)


def test_a_model_with_a_pending_mask_reads_what_is_denoised_already(folder: Path) -> None:
    pipeline = chain(folder, preview=False)
    run_chain(pipeline, Acting(lambda executor: executor.drain(), "lamella predict", 1))
    _, lamella, semantic = plans_of(pipeline)
    assert [job.raw for job in (*lamella.jobs, *semantic.jobs)] == [None, None]


def test_blocks_of_a_model_that_is_done_are_not_said_to_be_kept_if_the_next_one_fails(folder: Path) -> None:
    def fail(executor: SerialExecutor) -> None:
        raise RuntimeError

    listener = Listener()
    run(plans_of(chain(folder, block_size=16, preview=False)), listener, executor=Acting(fail, "lamella predict"))
    (kept,) = (message for message in listener.messages if "kept in" in message)
    assert "predicted blocks are kept in lamella" in kept and not list((folder / "denoised").glob("*.zarr"))


def test_a_changed_denoiser_makes_all_again(folder: Path) -> None:
    pipeline = chain(folder, preview=False)
    run_chain(pipeline)
    values = yaml.safe_load(pipeline.read_text())
    values["denoise"]["scale_prediction"] = False
    pipeline.write_text(yaml.safe_dump(values))
    with pytest.raises(Problems, match="made from another input or checkpoint, or with other settings"):
        plans_of(pipeline)


def test_the_plan_of_a_pipeline_knows_what_is_to_come(folder: Path) -> None:
    pipeline = chain(folder)
    with (folder / "plan.txt").open("w") as file:
        show_plan(pipeline, Console(file=file, width=240), workers=1)
    text = (folder / "plan.txt").read_text()
    assert "denoise.ckpt, a denoiser" in text and "tomograms that this run denoises first" in text
    assert not (folder / "denoised").exists()
    # A denoiser has neither a threshold nor classes, and its range is not one of intensities.
    assert "clipped below, above, denoise" not in text


@pytest.mark.parametrize(
    ("ending", "made"), [(".mrc.gz", ".mrc"), (".rec", ".rec"), (".zarr", ".mrc"), (".mrc", ".mrc")]
)
def test_the_other_models_look_for_what_the_denoiser_makes(folder: Path, ending: str, made: str) -> None:
    pipeline = chain(folder, file_extension=ending, test_files=[f"TS_b{ending}"])
    (folder / "data" / f"TS_b{ending}").mkdir() if ending == ".zarr" else (folder / "data" / f"TS_b{ending}").touch()
    models = read_models(pipeline)
    assert [model.data_folder for model in models.values()] == [Path("data"), Path("denoised"), Path("denoised")]
    assert {models[name].file_extension for name in ("lamella", "semantic")} == {made}
    assert models["semantic"].test_files == (f"TS_b{made}",)


@pytest.mark.parametrize("name", ["TS_b.mrc.gz", "data/TS_b.mrc.gz", "TS_b.mrc", "denoised/TS_b.mrc", "TS_b"])
def test_predictions_are_found_by_the_name_of_the_raw_tomogram_too(folder: Path, name: str) -> None:
    model = read_models(chain(folder, file_extension=".mrc.gz"), "semantic")[""]
    for made in ("data/TS_b.mrc.gz", "denoised/TS_b.mrc", "semantic/TS_b_preds.h5"):
        (folder / made).parent.mkdir(exist_ok=True)
        (folder / made).touch()
    assert find_predictions(model, name) == [Path("semantic/TS_b_preds.h5")]


@pytest.mark.parametrize(
    ("model", "changes", "rule"),
    [
        ("lamella", {"data_folder": "data"}, "must be the folder that the denoiser writes to, its prediction_folder"),
        ("semantic", {"file_extension": ".rec"}, "must be the ending of the files that the denoiser writes"),
        ("lamella", {"prediction_folder": "denoised"}, "must not be the denoiser's folder"),
    ],
)
def test_models_at_odds_with_the_denoiser(folder: Path, model: str, changes: dict[str, str], rule: str) -> None:
    pipeline = chain(folder)
    values = yaml.safe_load(pipeline.read_text())
    values[model] |= changes
    pipeline.write_text(yaml.safe_dump(values))
    with pytest.raises(Problems, match=rule):
        read_models(pipeline)


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_a_checkpoint_of_the_other_kind_is_named_for_what_it_is(folder: Path) -> None:
    chain(folder)
    for name, other, found in (("denoise", "lamella", "a model that segments"), ("lamella", "denoise", "a denoiser")):
        values = yaml.safe_load((folder / f"config_{name}.yaml").read_text())
        values |= {"trained_model": f"{other}.ckpt", "data_folder": "data"}
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(Problems, match=f"{other}.ckpt, {found}"):
            plan_run(read_configuration(folder / "config.yaml"))


@pytest.mark.parametrize("command", ["components", "semantic-to-centers", "view"])
def test_commands_on_labels_want_no_denoiser(folder: Path, command: str) -> None:
    said = invoke(command, chain(folder), "--model", "denoise", folder=folder, status=2)
    assert "pipeline.yaml, denoise: this command needs a model that gives labels; found a denoiser" in said


def test_documented_defaults_take_the_place_of_missing_keys(folder: Path) -> None:
    prepare(folder, "scaled")
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["scale_prediction"], values["save_raw_predictions"]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    segment(read_denoiser(folder / "config.yaml"))
    with np.load(folder / "expected.npz") as expected:
        np.testing.assert_allclose(written(folder / "out" / "tomo.mrc"), expected["denoised"], atol=1e-4)
    assert not (folder / "out" / "tomo_preds.h5").exists()


def test_keys_about_labels_have_no_effect_and_that_is_said(folder: Path) -> None:
    prepare(folder, "scaled", components=True, mask_folder="nowhere", output_formats=["mrc"])
    plan = plan_run(read_configuration(folder / "config.yaml"))
    assert {f"the key {key} has no effect here" for key in ("components", "mask_folder", "output_formats")} <= {
        *plan.notes
    }
    assert plan.jobs[0].components is None and plan.jobs[0].mask is None


def test_keys_about_denoising_have_no_effect_on_other_models_and_that_is_said(folder: Path) -> None:
    pipeline = chain(folder)
    values = yaml.safe_load(pipeline.read_text())
    values["lamella"]["keep_denoised"] = False
    pipeline.write_text(yaml.safe_dump(values))
    assert [one.unused for one in read_models(pipeline).values()] == [(), ("keep_denoised",), ()]


def test_raw_tomograms_are_not_overwritten(folder: Path) -> None:
    prepare(folder, "scaled", prediction_folder="data")
    with pytest.raises(Problems, match="an output must not replace its own input"):
        plan_run(read_configuration(folder / "config.yaml"))


def replace_voxels(path: Path, voxels: np.ndarray) -> None:
    with warnings.catch_warnings(action="ignore"), mrcfile.new(path, voxels.astype(np.float32), overwrite=True):
        pass  # which warns of NaN


@pytest.mark.parametrize("kind", ["constant", "mostly zero", "all NaN"])
def test_percentiles_that_coincide_fail_their_tomogram_alone(folder: Path, kind: str) -> None:
    prepare(folder, "scaled")
    voxels = np.full((20, 20, 20), np.nan if kind == "all NaN" else 3.0)
    if kind == "mostly zero":
        voxels[:] = 0
        voxels[0, 0, :4] = range(1, 5)
    replace_voxels(folder / "data" / "tomo.mrc", voxels)
    shutil.copy(GOLDEN / "scaled" / "data" / "tomo.mrc", folder / "data" / "fine.mrc")
    outcomes = segment(read_configuration(folder / "config.yaml"))
    assert outcomes["fine"].status == "done" and outcomes["tomo"].status == "failed"
    assert "percentiles must differ" in outcomes["tomo"].error
    assert not (folder / "out" / "tomo.mrc").exists()


def test_nan_counts_as_background_and_spoils_nothing_else(folder: Path) -> None:
    prepare(folder, "fpn_bottleneck")
    path = folder / "data" / "tomo.mrc"
    with mrcfile.open(path) as mrc:
        voxels = np.array(mrc.data, np.float32)
    whole = voxels.copy()
    voxels[3, 4, 5] = np.nan
    whole[3, 4, 5] = voxels[~np.isnan(voxels)].max()  # bright matter is background in raw tomograms
    found = []
    for each in (voxels, whole):
        replace_voxels(path, each)
        segment(read_configuration(folder / "config.yaml"), overwrite=True)
        found.append(written(folder / "out" / "tomo.mrc"))
    np.testing.assert_allclose(*found, atol=0.01)  # of whose percentiles one is of a voxel less
    assert np.isfinite(found[0]).all()


def test_tomograms_that_are_bright_on_dark_already(folder: Path) -> None:
    """Turned round and with `invert: false` they give what the raw ones give."""
    values = prepare(folder, "fpn_bottleneck")
    path = folder / "data" / "tomo.mrc"
    with mrcfile.open(path) as mrc:
        voxels = np.array(mrc.data, np.float32)
    replace_voxels(path, -voxels)
    values["parameters"]["data"]["invert"] = False
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    segment(read_configuration(folder / "config.yaml"))
    with np.load(folder / "expected.npz") as expected:
        np.testing.assert_allclose(written(folder / "out" / "tomo.mrc"), expected["denoised"], atol=1e-4)


def test_the_denoiser_is_named_if_what_it_made_is_dark_on_bright(folder: Path) -> None:
    denoise, lamella, _ = plans_of(chain(folder))
    header = read_header(denoise.jobs[0].source)
    dark = replace(intensities(sample_file(header), 0, 1), contrast="dark on bright")
    for said in (
        lamella.intensity_warnings(header, dark),
        [each for each, _ in lamella.shared_warnings([dark] * 2)[0]],
    ):
        assert any("'invert: false' below parameters.data of denoise" in each for each in said)
        assert not any("'invert: true'" in each for each in said)
    flat = replace(dark, central=(3.0, 3.0))
    assert denoise.intensity_warnings(header, flat) == [
        "almost all voxels are 3: there is nothing to see. Check the file"
    ]


def test_several_channels_of_a_smaller_volume_than_the_patch(folder: Path) -> None:
    prepare(folder, "two_channels_raw")
    replace_voxels(folder / "data" / "tomo.mrc", np.random.default_rng(1).normal(size=(5, 6, 7)))
    assert segment(read_configuration(folder / "config.yaml"))["tomo"].status == "done"
    with h5py.File(folder / "out" / "tomo_preds.h5") as file:
        assert file["preds"].shape == (2, 5, 6, 7)
        np.testing.assert_array_equal(file["preds"][0], written(folder / "out" / "tomo.mrc"))


def test_an_mrc_of_unknown_voxel_size_keeps_it_unknown(folder: Path) -> None:
    prepare(folder, "scaled")
    with mrcfile.open(folder / "data" / "tomo.mrc", "r+") as mrc:
        mrc.header.cella = (0, 0, 0)
    assert segment(read_configuration(folder / "config.yaml"))["tomo"].status == "done"
    with mrcfile.open(folder / "out" / "tomo.mrc") as mrc:
        assert mrc.voxel_size.tolist() == (0, 0, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["bool", "u1", "i1", ">i2", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", ">f4", "f8"]).flatmap(
        lambda dtype: arrays(np.dtype(dtype), array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=12))
    ),
    st.booleans(),
)
def test_the_stretch_is_that_of_all_voxels(voxels: np.ndarray, invert: bool) -> None:
    with np.errstate(over="ignore"):
        numbers = voxels.astype(np.float32).astype(np.float64)
    wanted = np.percentile(numbers, [0.1, 99.9]) if np.isfinite(numbers).all() else None
    if wanted is None or not np.float32(wanted[0]) < np.float32(wanted[1]) or not np.isfinite(wanted[1] - wanted[0]):
        return
    zero, one = stretch_of(voxels, "x", invert=invert)
    np.testing.assert_allclose(sorted((zero, one)), wanted, rtol=1e-6, atol=1e-30)
    assert (zero > one) == invert


def test_a_stretch_of_nothing_is_refused() -> None:
    with pytest.raises(TomogramError, match="percentiles must differ"):
        stretch_of(np.zeros((3, 4, 5), np.int16), "x")


def test_own_moments_are_those_of_all_voxels(tmp_path: Path) -> None:
    from dataclasses import replace

    from cryosiam_dask import predictor_spec
    from cryosiam_dask.model.predictor import normalise

    checkpoints.write(tmp_path / "model.ckpt")
    voxels = np.random.default_rng(0).normal(5, 3, (70, 40, 30)).astype(np.float32)
    spec = replace(predictor_spec(tmp_path / "model.ckpt", device="cpu"), stretch=(12.0, 1.0))
    plain = normalise(voxels, spec).astype(np.float64)
    own = with_own_moments(spec, voxels, mean=True, std=True)
    assert (own.mean, own.std) == pytest.approx((plain.mean(), plain.std()))
    assert with_own_moments(spec, voxels, mean=False, std=True).mean == spec.mean
    assert with_own_moments(spec, np.full((2, 2, 2), 4.0), mean=False, std=True).std == 1


def test_a_pipeline_without_a_denoiser_has_none(folder: Path) -> None:
    pipeline = chain(folder)
    values = yaml.safe_load(pipeline.read_text())
    del values["denoise"]
    pipeline.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigurationError, match="needs the keys of a denoiser"):
        read_denoiser(pipeline)


@pytest.mark.parametrize(("size", "told"), [(6.8, False), (7.9, False), (10.0, True), (0.0, False)])
def test_a_voxel_size_far_from_the_models_is_said(folder: Path, size: float, told: bool) -> None:
    prepare(folder, "scaled", trained_model="cryosiam_denoising.ckpt")
    (folder / "model.ckpt").rename(folder / "cryosiam_denoising.ckpt")
    with mrcfile.open(folder / "data" / "tomo.mrc", "r+") as mrc:
        mrc.voxel_size = size
    warnings = segment(read_configuration(folder / "config.yaml"))["tomo"].warnings
    assert any("this model was trained with about 6.8 Å" in warning for warning in warnings) == told


def test_the_report_shows_denoised_tomograms(folder: Path) -> None:
    prepare(folder, "two_channels_scaled_raw")
    configuration = read_configuration(folder / "config.yaml")
    segment(configuration)
    page = write_report(configuration).read_text()
    assert (
        "tomo" in page and "26 × 30 × 11" in page and "Shares of classes" not in page and page.count("data:image") >= 1
    )
    assert '<span class="status done">' in page or ">done<" in page


def test_a_model_alone_says_that_its_tomograms_must_be_denoised_first(folder: Path) -> None:
    models = read_models(chain(folder))
    with pytest.raises(Problems, match=f"{STEM}.mrc must be denoised first"):
        plan_run(models["semantic"].model_copy(update={"mask_folder": None}))


def test_no_tomogram_is_denoised_again_for_a_picture(folder: Path) -> None:
    prepare(folder, "scaled")
    configuration = read_configuration(folder / "config.yaml")
    segment(configuration)
    (folder / "out" / "tomo_preview.png").unlink()
    assert [job.stem for job in plan_run(configuration).skipped] == ["tomo"]


def test_raw_predictions_that_are_missing_are_made_and_outdated_ones_go(folder: Path) -> None:
    values = prepare(folder, "two_channels_raw")
    path = folder / "out" / "tomo_preds.h5"
    segment(read_configuration(folder / "config.yaml"))
    before = path.read_bytes()
    path.unlink()
    assert segment(read_configuration(folder / "config.yaml"))["tomo"].status == "done"
    assert path.read_bytes() == before
    (folder / "config.yaml").write_text(yaml.safe_dump(values | {"save_raw_predictions": False}))
    segment(read_configuration(folder / "config.yaml"), overwrite=True)
    assert not path.exists()
