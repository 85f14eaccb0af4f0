"""From files to files in this process: outputs, what is kept, and what a fault leaves behind."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pandas
import pytest
import starfile
import zarr
from PIL import Image
from rich.console import Console
from skimage.measure import label as label_whole
from skimage.measure import regionprops

from cryosiam_dask import __version__
from cryosiam_dask.commands import segment as segment_command
from cryosiam_dask.config import Configuration
from cryosiam_dask.core.executor import Interrupted, SerialExecutor
from cryosiam_dask.errors import Problems
from cryosiam_dask.files.claims import Claims, claim_path, open_claims
from cryosiam_dask.model.classes import percentage
from cryosiam_dask.runs.collection import make_folders, run
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.runs.ledger import Ledger, read_outcomes
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import plan_run
from cryosiam_dask.runs.tomogram import segment_tomogram as segment_one
from cryosiam_dask.runs.workspace import work_group
from cryosiam_dask.runs.written import export, list_centers, measure
from cryosiam_dask.runs.written import postprocess as postprocess_files
from cryosiam_dask.stages.preview import preview_file, read_fingerprint, write_preview
from support import checkpoints, golden
from support.inputs import SHAPE, configure, write_tomogram
from support.runs import Acting, Listener, segment

LEDGER = [".ledger", *(f".ledger/{stem}.jsonl" for stem in ("TS_1", "TS_2_9.96Apx", "TS_3"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for seed, stem in enumerate(("TS_1", "TS_2_9.96Apx", "TS_3")):
        write_tomogram(tmp_path / "data" / f"{stem}.mrc", seed)
    checkpoints.write(tmp_path / "model.ckpt", seed=35)  # all three labels occur
    return tmp_path


def postprocess(configuration: Configuration, filename: str | None = None) -> list[Outcome]:
    return postprocess_files(configuration, find_predictions(configuration, filename, sizes=True), Listener())


def labels(folder: Path, stem: str = "TS_1") -> np.ndarray:
    with h5py.File(folder / "out" / f"{stem}_preds.h5") as file:
        return file["labels"][:]


def files(folder: Path) -> list[str]:
    """All but what is kept for the report."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return sorted(name for name in found if not name.startswith(".ledger/report"))


def test_outputs_as_the_viewer_opens_them(folder: Path) -> None:
    outcomes = segment(configure(folder, save_internal_files=True))
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 3
    assert files(folder / "out") == [*LEDGER, *outputs(*STEMS, components=False)]
    with h5py.File(folder / "out" / "TS_2_9.96Apx_preds.h5") as file:
        assert set(file) == {"labels", "probs", "distances"}
        assert file["labels"].shape == SHAPE and file["labels"].dtype == np.uint8
        assert file["probs"].shape == file["distances"].shape == (3, *SHAPE)
        assert file["probs"].dtype == file["distances"].dtype == np.float32
        assert file["labels"].chunks and file["labels"].compression == "gzip"
        np.testing.assert_allclose(file["probs"][:].sum(axis=0), 1, atol=1e-5)
        np.testing.assert_array_equal(file["labels"][:], file["probs"][:].argmax(axis=0))
        attributes = dict(file.attrs)
        counts = np.bincount(file["labels"][:].ravel(), minlength=3)
    assert outcomes["TS_2_9.96Apx"].voxels == tuple(counts)
    np.testing.assert_allclose(attributes["voxel_size_angstrom"], 9.96, rtol=1e-5)
    np.testing.assert_array_equal(attributes["origin_angstrom"], (30, 20, 10))  # (z, y, x)
    np.testing.assert_array_equal(attributes["nstart"], (3, 2, 1))
    assert attributes["software"] == f"cryosiam_dask {__version__}"
    assert json.loads(attributes["configuration"])["parameters"]["network"]["spatial_dims"] == 3
    assert len(attributes["checkpoint_sha256"]) == 64 and "torch" in attributes["versions"]


def test_done_is_skipped_and_made_otherwise_needs_overwrite(folder: Path) -> None:
    segment(configure(folder))
    before = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}
    assert {outcome.status for outcome in segment(configure(folder)).values()} == {"skipped"}
    (folder / "out" / "TS_3_preds.h5").unlink()
    assert [outcome.status for outcome in segment(configure(folder)).values()] == ["skipped", "skipped", "done"]
    after = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}
    assert after == before  # the same bytes again
    with pytest.raises(Problems, match="--overwrite"):
        plan_run(configure(folder, {"threshold": 0.5}))
    outcomes = segment(configure(folder, {"threshold": 0.5}), filename="TS_2_9.96Apx.mrc", overwrite=True)
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    # As after a run that was stopped: what is up to date by now stays.
    outcomes = segment(configure(folder, {"threshold": 0.5}), overwrite=True)
    assert [outcome.status for outcome in outcomes.values()] == ["skipped", "done", "done"]
    assert {outcome.stem for outcome in outcomes.values() if outcome.status == "skipped"} == {"TS_2_9.96Apx"}
    assert {o.status for o in segment(configure(folder, {"threshold": 0.5}), overwrite=True).values()} == {"skipped"}
    assert {o.status for o in segment(configure(folder, {"threshold": 0.5}), overwrite_all=True).values()} == {"done"}


def test_bytes_depend_on_no_block_size(folder: Path) -> None:
    segment(configure(folder, save_internal_files=True, block_size=24))
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        small = {name: file[name][:] for name in file}
    segment(configure(folder, save_internal_files=True), overwrite_all=True)
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        for name, values in small.items():
            np.testing.assert_array_equal(file[name][:], values)


def test_inverted_tomograms_give_the_same_labels(folder: Path) -> None:
    """With blocks of any size; and labels from before, or of the tomograms as they are, are not taken for theirs."""
    rng = np.random.default_rng(0)
    voxels = {stem: rng.integers(0, 256, SHAPE).astype(np.int16) for stem in ("TS_1", "TS_2_9.96Apx", "TS_3")}
    for stem, values in voxels.items():
        with mrcfile.new(folder / "data" / f"{stem}.mrc", overwrite=True) as mrc:
            mrc.set_data(values)
    scaled = {"min": 20, "max": 230}
    segment(configure(folder, parameters={"data": scaled}, save_internal_files=True))
    expected = {stem: labels(folder, stem) for stem in voxels}
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        probabilities = file["probs"][:]
    assert len(np.unique(expected["TS_1"])) > 1
    for stem, values in voxels.items():
        with mrcfile.open(folder / "data" / f"{stem}.mrc", "r+") as mrc:
            mrc.data[:] = 250 - values
    for block_size in (16, None):
        inverted = {"data": {**scaled, "invert": True}}
        settings = configure(folder, parameters=inverted, save_internal_files=True, block_size=block_size)
        outcomes = segment(settings, overwrite_all=True)
        assert {outcome.status for outcome in outcomes.values()} == {"done"}
        for stem, values in expected.items():
            np.testing.assert_array_equal(labels(folder, stem), values)
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        np.testing.assert_array_equal(file["probs"][:], probabilities)
    assert not plan_run(settings).jobs
    with pytest.raises(Problems, match="overwrite"):
        plan_run(configure(folder, parameters={"data": scaled}, save_internal_files=True))


def test_mrc_output_has_the_inputs_name_place_and_size(folder: Path) -> None:
    segment(configure(folder))
    outcomes = segment(configure(folder, save_original_file_extension=True))
    assert outcomes["TS_2_9.96Apx"].status == "done"
    path = folder / "out" / "TS_2_9.96Apx.mrc"
    assert mrcfile.validate(path)
    with mrcfile.open(path) as mrc:
        assert mrc.data.dtype == np.int8
        np.testing.assert_array_equal(mrc.data, labels(folder, "TS_2_9.96Apx"))
        assert mrc.voxel_size.x == pytest.approx(9.96)
        assert mrc.header.origin.tolist() == (10, 20, 30)
        assert mrc.nstart.tolist() == (1, 2, 3)
    assert {o.status for o in segment(configure(folder, save_original_file_extension=True)).values()} == {"skipped"}


def test_broken_files_fail_alone(folder: Path) -> None:
    whole = (folder / "data" / "TS_2_9.96Apx.mrc").read_bytes()
    (folder / "data" / "TS_2_9.96Apx.mrc").write_bytes(whole[:-100])
    (folder / "data" / "notes.mrc").write_text("not a tomogram")
    write_tomogram(folder / "data" / "image.mrc", 0, (30, 40))
    outcomes = segment(configure(folder))
    assert {stem for stem, o in outcomes.items() if o.status == "done"} == {"TS_1", "TS_3"}
    assert "TS_2_9.96Apx.mrc" in outcomes["TS_2_9.96Apx"].error
    assert "notes.mrc" in outcomes["notes"].error
    assert "as many axes as the tomogram, which has 2" in outcomes["image"].error
    assert not any(o.details for o in outcomes.values())  # each was foreseen
    ledger = sorted([*LEDGER, ".ledger/image.jsonl", ".ledger/notes.jsonl"])
    assert files(folder / "out") == [*ledger, *outputs("TS_1", "TS_3", components=False)]


def test_unreadable_masks_fail_alone(folder: Path) -> None:
    (folder / "masks").mkdir()
    for stem, values in (("TS_1", np.ones(SHAPE, np.uint8)), ("TS_3", np.full(SHAPE, 7, np.uint8))):
        with h5py.File(folder / "masks" / f"{stem}_preds.h5", "w") as file:
            file["labels"] = values
    (folder / "masks" / "TS_2_9.96Apx_preds.h5").write_bytes(b"not HDF5")
    outcomes = segment(configure(folder, mask_folder=str(folder / "masks")))
    assert [outcomes[s].status for s in ("TS_1", "TS_2_9.96Apx", "TS_3")] == ["done", "failed", "failed"]
    assert "TS_2_9.96Apx_preds.h5" in outcomes["TS_2_9.96Apx"].error
    assert "7" in outcomes["TS_3"].error
    assert files(folder / "out") == [*LEDGER, *outputs("TS_1", components=False)]


def test_failure_while_writing_keeps_the_earlier_output(folder: Path) -> None:
    segment(configure(folder))
    before = labels(folder)
    (folder / "data" / "TS_1.mrc").write_bytes(b"")
    outcomes = segment(configure(folder), overwrite_all=True)
    assert outcomes["TS_1"].status == "failed"
    np.testing.assert_array_equal(labels(folder), before)


def test_nans_and_blank_results_are_warned_of(folder: Path) -> None:
    voxels = np.random.default_rng(0).random(SHAPE, np.float32)
    voxels[3, 4, 5:8] = np.nan
    with (
        pytest.warns(RuntimeWarning, match="NaN"),
        mrcfile.new(folder / "data" / "TS_1.mrc", overwrite=True) as mrc,
    ):
        mrc.set_data(voxels)
    outcomes = segment(configure(folder, {"threshold": 1.0}))
    nans, blank = (next(w for w in outcomes["TS_1"].warnings if word in w) for word in ("NaN", "background"))
    assert "3 voxels" in nans
    assert "every voxel is background" in blank and "parameters.data.min" in blank and "network.threshold" in blank
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        assert "NaN" in file.attrs["warnings"]


def test_why_a_result_is_blank(folder: Path) -> None:
    def why(network: dict[str, Any], data: dict[str, Any]) -> str:
        parameters = {"network": network, "data": data}
        outcome = segment(configure(folder, parameters=parameters), filename="TS_1.mrc", overwrite_all=True)["TS_1"]
        assert outcome.voxels[1:] == (0, 0)
        return next(warning for warning in outcome.warnings if "background" in warning)

    voxels = np.random.default_rng(0).random(SHAPE, np.float32)
    with mrcfile.open(folder / "data" / "TS_1.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, voxels)
    text = why({"threshold": 1.0}, {"min": 0.25, "max": 0.5})
    below, above = (f"{100 * share:.1f} %" for share in (np.mean(voxels < 0.25), np.mean(voxels > 0.5)))
    assert f"{below} of the voxels are clipped below and {above} above. Set parameters.data.min and max to" in text
    assert "Check that model.ckpt is the right trained_model" in text and "mask_folder" not in text
    text = why({"threshold": 1.0}, {})
    segment(configure(folder, save_internal_files=True), filename="TS_1.mrc", overwrite_all=True)
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        highest = file["probs"][:].max(axis=(1, 2, 3))[1:]
    listed = ", ".join(f"{p:.3g} for class {label}" for label, p in enumerate(highest, start=1))
    assert f"The highest probability is {listed}, and network.threshold is 1: lower it to less than" in text
    assert "max are right" in text
    found = np.count_nonzero(labels_of_a_run(folder))
    text = why({"postprocessing_sizes": [-1, 10**6, 10**6]}, {})
    assert text.startswith(f"every voxel is background: postprocessing_sizes removed all {found:,} voxels")


def test_masks_that_cover_nothing_or_everything_are_said(folder: Path) -> None:
    (folder / "masks").mkdir()
    for stem, inside in (("TS_1", 0), ("TS_2_9.96Apx", SHAPE[0]), ("TS_3", 12)):
        mask = np.zeros(SHAPE, np.uint8)
        mask[:inside] = 1
        with h5py.File(folder / "masks" / f"{stem}_preds.h5", "w") as file:
            file["labels"] = mask
    outcomes = segment(configure(folder, mask_folder=str(folder / "masks")))
    assert outcomes["TS_1"].warnings[0].startswith("every voxel is background: its mask is empty")
    assert outcomes["TS_2_9.96Apx"].warnings[0].startswith("the mask covers 100 % of the tomogram")
    assert not outcomes["TS_3"].warnings


class StopsBeforeTheLastBlock(SerialExecutor):
    """Is interrupted when one block is left to be predicted."""

    def map(self, function: Any, items: Any, *, name: str, **options: Any) -> list[Any]:
        if name == "predict":
            super().map(function, items[:-1], name=name, **options)
            raise Interrupted
        return super().map(function, items, name=name, **options)


def test_what_a_stopped_run_saw_is_remembered(folder: Path) -> None:
    """Share of the mask and highest probabilities are of all blocks, also of those that are not predicted again."""
    (folder / "masks").mkdir()
    with h5py.File(folder / "masks" / "TS_1_preds.h5", "w") as file:
        file["labels"] = np.ones(SHAPE, np.uint8)
    for network, words in (({}, "the mask covers 100 % of"), ({"threshold": 1.0}, "The highest probability is")):
        keys = {"mask_folder": str(folder / "masks"), "block_size": 8}
        whole = segment(
            configure(folder, network, **keys, prediction_folder=str(folder / "whole")), filename="TS_1.mrc"
        )
        configuration = configure(folder, network, **keys, prediction_folder=str(folder / f"out{len(network)}"))
        plan = plan_run(configuration, filename="TS_1.mrc")
        make_folders(plan)
        jobs, said = [(plan, job) for job in plan.jobs], list[str]()
        with pytest.raises(Interrupted):
            list(segment_one(jobs, executor=StopsBeforeTheLastBlock()))
        (outcome,) = segment_one(jobs, executor=SerialExecutor(), inform=said.append)
        assert outcome.warnings == whole["TS_1"].warnings and words in outcome.warnings[0]
        (message,) = [text for text in said if "blocks are already done" in text]
        count, all_blocks = (int(word) for word in message.split() if word.isdigit())
        assert count == all_blocks - 1 > 0
        shutil.rmtree(folder / "whole")


def labels_of_a_run(folder: Path) -> np.ndarray:
    segment(configure(folder), filename="TS_1.mrc", overwrite_all=True)
    return labels(folder)


def test_no_lamella_keeps_the_thresholded_labels_and_warns(folder: Path) -> None:
    segment(configure(folder, {"threshold": 0.999}))
    thresholded = labels(folder)
    outcomes = segment(configure(folder, {"threshold": 0.999, "postprocessing": True}), overwrite_all=True)
    assert any("no lamella found" in warning for warning in outcomes["TS_1"].warnings)
    assert any("The labels are those of the network" in warning for warning in outcomes["TS_1"].warnings)
    np.testing.assert_array_equal(labels(folder), thresholded)


def test_a_lamella_is_called_so_and_its_thickness_is_told(folder: Path) -> None:
    outcomes = segment(configure(folder, {"threshold": 0.3, "postprocessing": True}))
    outcome, found = outcomes["TS_2_9.96Apx"], labels(folder, "TS_2_9.96Apx")
    assert outcome.class_names[0] == "lamella"
    held = np.count_nonzero(found, axis=0)
    held = held[held > 0]
    assert [outcome.thickness[key] for key in ("mean", "lowest", "highest")] == pytest.approx(
        [0.996 * n for n in (held.mean(), held.min(), held.max())], rel=1e-5
    )
    assert outcome.thickness["unit"] == "nm" and "mean thickness" in " ".join(outcome.found())
    with h5py.File(folder / "out" / "TS_2_9.96Apx_preds.h5") as file:
        np.testing.assert_allclose(file.attrs["thickness_voxels"], [held.mean(), held.min(), held.max()])


@pytest.mark.parametrize("work", [None, "work"])
def test_work_store_is_removed_or_kept(folder: Path, work: str | None) -> None:
    place = folder / (work or "out")
    where = {"work_folder": str(place)} if work else {}
    segment(configure(folder, **where))
    assert not list(place.glob("*.work.zarr"))
    segment(configure(folder, {"threshold": 0.2}, keep_work=True, **where), overwrite_all=True)
    group = zarr.open_group(place / "TS_1.work.zarr", mode="r")
    assert group["tomogram"].attrs["axes"] == ["z", "y", "x"]
    np.testing.assert_array_equal(group["labels"][:], labels(folder))


@pytest.mark.parametrize("dtype", ["i1", "<i2", "<f4", ">f4", "<f2"])
def test_an_mrc_file_is_read_where_it_is_with_the_same_results_as_a_copy(folder: Path, dtype: str) -> None:
    voxels = np.random.default_rng(3).integers(-100, 100, SHAPE)
    with mrcfile.new(folder / "data" / "TS_1.mrc", overwrite=True) as mrc:
        mrc.set_data((voxels / (1 if dtype[-2] == "i" else 100)).astype(dtype))
    results = []
    for work in (None, str(folder / "work")):
        found = segment(
            configure(folder, work_folder=work, parameters={"data": {"min": -50.0, "max": 90.0}}),
            filename="TS_1.mrc",
            overwrite_all=True,
        )
        results.append((found["TS_1"].voxels, labels(folder).tobytes(), found["TS_1"].warnings))
    assert results[0] == results[1]


@pytest.mark.parametrize("removed", [False, True])
def test_a_tomogram_that_is_replaced_while_it_is_read_gets_no_output(folder: Path, removed: bool) -> None:
    path = folder / "data" / "TS_1.mrc"

    def replace(executor: SerialExecutor) -> None:
        path.unlink()
        if not removed:
            write_tomogram(path, 7)

    plan = plan_run(configure(folder), filename="TS_1.mrc")
    make_folders(plan)
    jobs = [(plan, job) for job in plan.jobs]
    (outcome,) = segment_one(jobs, executor=Acting(replace, count=len(plan.blocks(SHAPE).indices())))
    assert outcome.status == "failed" and not (folder / "out" / "TS_1_preds.h5").exists()
    if removed:
        assert outcome.error.startswith(f"{path}: does not exist")
        return
    assert "a tomogram must not change while it is segmented" in outcome.error
    # The next run sees another tomogram, and uses nothing of the blocks before.
    assert segment(configure(folder), filename="TS_1.mrc")["TS_1"].status == "done"
    again = labels(folder)
    shutil.rmtree(folder / "out")
    assert np.array_equal(labels_of_a_run(folder), again)


def test_no_block_of_a_file_that_was_there_for_a_while_is_kept(folder: Path) -> None:
    """Such as of one that is copied again over itself, and holds zeros until that is done."""
    path, configuration = (
        folder / "data" / "TS_1.mrc",
        configure(folder, block_size=16, save_internal_files=True, preview=False),
    )
    whole = path.read_bytes()

    def probabilities() -> np.ndarray:
        assert segment(configuration, filename="TS_1.mrc")["TS_1"].status == "done"
        with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
            return file["probs"][:]

    executor = Acting(lambda _: path.write_bytes(whole[:1024].ljust(len(whole), b"\0")))
    (outcome,) = run(plan_run(configuration, filename="TS_1.mrc"), Listener(), executor=executor)
    assert "a tomogram must not change while it is segmented" in outcome.error
    assert Ledger(folder / "out", "TS_1").last("block")
    path.write_bytes(whole)
    resumed = probabilities()
    shutil.rmtree(folder / "out")
    np.testing.assert_array_equal(resumed, probabilities())


def test_a_copy_of_an_earlier_file_is_not_taken_for_one_that_was_read_where_it_is(folder: Path) -> None:
    path, scale = folder / "data" / "TS_1.mrc", {"parameters": {"data": {"min": -50.0, "max": 90.0}}}
    for number, keep in enumerate((True, False, True)):
        if number < 2:
            voxels = np.random.default_rng(number).integers(-100, 100, SHAPE).astype("i2")
            with mrcfile.new(path, overwrite=True) as mrc:
                mrc.set_data(voxels)
        plan = plan_run(configure(folder, keep_work=keep, block_size=8, **scale), filename="TS_1.mrc")
        run(plan, Listener(), executor=Acting(SerialExecutor.drain) if number < 2 else SerialExecutor())
    stored = zarr.open_group(folder / "out" / "TS_1.work.zarr", mode="r")["tomogram"]
    np.testing.assert_array_equal(stored[:], voxels)


class Waiting(Listener):
    """A reporter that lets another run go on when it is told that this one waits for it."""

    def __init__(self, other: Claims, claim: Path) -> None:
        super().__init__()
        self.other, self.claim = other, claim

    def inform(self, message: str) -> None:
        super().inform(message)
        if "another run is working on it" in message:
            self.other.release(self.claim)


@pytest.mark.parametrize("command", [postprocess_files, measure, list_centers, partial(export, formats=["mrc"])])
def test_no_command_touches_a_prediction_that_another_run_works_on(folder: Path, command: Any) -> None:
    configuration = configure(folder, network={"postprocessing_sizes": [-1, 5]})
    segment(configuration)
    claim = claim_path(folder / "out", "TS_1")
    with open_claims() as other:
        assert other.take(claim)
        reporter = Waiting(other, claim)
        outcomes = command(configuration, find_predictions(configuration), reporter)
    assert {outcome.stem: outcome.status for outcome in outcomes} == dict.fromkeys(STEMS, "done")
    begun = [message for message in reporter.messages if message.startswith(("begin", "TS_1: another"))]
    waits = "TS_1: another run is working on it; waiting"
    assert begun == [waits, *(f"begin {stem}" for stem in (*STEMS[1:], "TS_1"))] and not claim.exists()


def kept(folder: Path) -> np.ndarray:
    stored = zarr.open_array(folder / "tomogram", mode="r")
    return np.asarray(stored[:])


def test_a_kept_work_store_outlives_commands_and_other_data_sets(folder: Path) -> None:
    """Commands on predictions, and another data set with tomograms of the same names in the same work_folder."""
    where = {"work_folder": str(folder / "work"), "keep_work": True, "components": True}
    configuration = configure(folder, {"postprocessing_sizes": [-1, 5]}, **where)
    segment(configuration)
    store = folder / "work" / "TS_1.work.zarr"
    before, whole = sorted(store.rglob("*")), kept(store)
    predictions = find_predictions(configuration)
    for command in (postprocess_files, measure, partial(export, formats=["mrc", "ome-zarr"])):
        assert {outcome.status for outcome in command(configuration, predictions, Listener())} == {"done"}
    assert sorted(store.rglob("*")) == before and not list((folder / "work").glob("*scratch*"))
    other = folder / "other"
    (other / "data").mkdir(parents=True)
    write_tomogram(other / "data" / "TS_1.mrc", 77)
    shutil.copy(folder / "model.ckpt", other)
    assert segment(configure(other, **where))["TS_1"].status == "done"
    np.testing.assert_array_equal(kept(store), whole)
    (others,) = set((folder / "work").glob("TS_1.*.work.zarr"))
    assert not np.array_equal(kept(others), whole)
    # Its own store is found again, and replaced where the settings are others.
    assert segment(configure(other, {"threshold": 0.4}, **where), overwrite=True)["TS_1"].status == "done"
    assert set((folder / "work").glob("TS_1.*.work.zarr")) == {others} and sorted(store.rglob("*")) == before


@pytest.mark.parametrize("work", [None, "work"])
def test_what_a_command_left_that_was_killed_is_removed(folder: Path, work: str | None) -> None:
    configuration = configure(folder, **({"work_folder": str(folder / work)} if work else {}))
    segment(configuration)
    group = work_group(configuration, "TS_1")
    group.__enter__()  # and nothing more of it
    left = list((folder / (work or "out")).glob("TS_1.*.scratch.zarr"))
    assert len(left) == 1
    assert segment(configuration)["TS_1"].status == "skipped" and not left[0].exists()


def test_blocks_of_a_stopped_run_outlive_an_export(folder: Path) -> None:
    segment(configure(folder))
    configuration = configure(folder, {"threshold": 0.4}, block_size=8, test_files=["TS_1.mrc"])

    class Stopping(SerialExecutor):
        def map(self, function: Any, items: Any, *, name: str, done: Any = None, **options: Any) -> list[Any]:
            def count(item: Any, result: Any) -> None:
                done(item, result)
                self.drain()

            return super().map(function, items, name=name, done=count if name == "predict" else done, **options)

    outcomes = run(plan_run(configuration, overwrite=True), Listener(), executor=Stopping())
    assert [outcome.status for outcome in outcomes] == ["left"]
    export(configuration, find_predictions(configuration), Listener(), formats=["mrc"])
    listener = Listener()
    assert [outcome.status for outcome in run(plan_run(configuration, overwrite=True), listener)] == ["done"]
    assert any("TS_1: 1 of " in message and "are already done" in message for message in listener.messages)


# ------------------------------------------------------------------------------------------------------------ pictures


def fingerprints(folder: Path, stem: str = "TS_1") -> tuple[str | None, str]:
    """Of a tomogram's picture and of its labels."""
    with h5py.File(folder / "out" / f"{stem}_preds.h5") as file:
        return read_fingerprint(preview_file(folder / "out", stem)), file.attrs["fingerprint"]


def test_pictures_show_tomogram_labels_and_mask(folder: Path) -> None:
    (folder / "masks").mkdir()
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:18, :, :10] = 1
    for stem in STEMS:
        with h5py.File(folder / "masks" / f"{stem}_preds.h5", "w") as file:
            file["labels"] = mask
    outcome = segment(configure(folder, mask_folder=str(folder / "masks"), class_names=["membrane", "actin"]))["TS_1"]
    membrane = np.count_nonzero(labels(folder) == 1)
    assert outcome.lamella_voxels == mask.sum() and outcome.class_names == ("membrane", "actin")
    shares = [
        f"{percentage(membrane / n)} of the {what}" for n, what in ((mask.size, "volume"), (mask.sum(), "lamella"))
    ]
    assert outcome.found()[0] == f"membrane {membrane:,} ({', '.join(shares)})"
    assert outcome.found(brief=True)[0] == f"membrane {shares[1]}"
    with mrcfile.open(folder / "data" / "TS_2_9.96Apx.mrc") as mrc:
        write_preview(
            folder / "expected.png",
            mrc.data,
            labels(folder, "TS_2_9.96Apx"),
            voxel_size_angstrom=9.96,
            class_names=("", "membrane", "actin"),
            lamella=mask,
            title="TS_2_9.96Apx",
        )
    with (
        Image.open(folder / "expected.png") as expected,
        Image.open(folder / "out" / "TS_2_9.96Apx_preview.png") as found,
    ):
        np.testing.assert_array_equal(np.asarray(expected), np.asarray(found))
    with h5py.File(folder / "out" / "TS_2_9.96Apx_preds.h5") as file:
        assert file.attrs["voxels"].tolist() == np.bincount(file["labels"][:].ravel(), minlength=3).tolist()
        assert file.attrs["lamella_voxels"] == mask.sum() and "thickness_voxels" not in file.attrs
    assert len(set(fingerprints(folder))) == 1


def test_pictures_are_made_where_they_are_wanted_and_missing(folder: Path) -> None:
    segment(configure(folder, preview=False))
    assert files(folder / "out") == [*LEDGER, *(f"{stem}_preds.h5" for stem in STEMS)]
    modified = (folder / "out" / "TS_1_preds.h5").stat().st_mtime_ns
    assert {outcome.status for outcome in segment(configure(folder)).values()} == {"done"}
    assert files(folder / "out") == [*LEDGER, *outputs(*STEMS, components=False)]
    assert (folder / "out" / "TS_1_preds.h5").stat().st_mtime_ns == modified and len(set(fingerprints(folder))) == 1
    (folder / "out" / "TS_1_preview.png").write_bytes(b"damaged")
    outcomes = segment(configure(folder))
    assert [outcomes[stem].status for stem in STEMS] == ["done", "skipped", "skipped"]
    # New labels, but no picture of them is wanted: that of the old ones goes.
    segment(configure(folder, {"threshold": 0.45}, preview=False), filename="TS_1.mrc", overwrite_all=True)
    assert not (folder / "out" / "TS_1_preview.png").exists() and (folder / "out" / "TS_3_preview.png").exists()


def test_pictures_follow_the_labels(folder: Path) -> None:
    segment(configure(folder))
    before = (folder / "out" / "TS_1_preview.png").read_bytes()
    (folder / "data" / "TS_3.mrc").unlink()
    outcomes = {o.stem: o for o in postprocess(configure(folder, {"postprocessing_sizes": [-1, 10**6, -1]}))}
    assert (folder / "out" / "TS_1_preview.png").read_bytes() != before and len(set(fingerprints(folder))) == 1
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        assert np.trim_zeros(file.attrs["voxels"], "b").tolist() == np.bincount(file["labels"][:].ravel()).tolist()
    assert outcomes["TS_1"].warnings == ()
    # That of a tomogram which is no longer there would show other labels.
    assert not (folder / "out" / "TS_3_preview.png").exists() and outcomes["TS_3"].status == "done"
    assert "TS_3_preview.png cannot be drawn" in outcomes["TS_3"].warnings[0]
    outcomes = {o.stem: o for o in postprocess(configure(folder, {"postprocessing_sizes": [-1, 10**6, -1]}))}
    assert not any(outcome.warnings for outcome in outcomes.values())


def test_no_file_elsewhere_is_read_because_a_prediction_names_it(folder: Path) -> None:
    segment(configure(folder), filename="TS_1.mrc")
    (folder / "TS_1.mrc").write_bytes(b"no tomogram")
    for path in ("../TS_1.mrc", str(folder / "TS_1.mrc")):
        with h5py.File(folder / "out" / "TS_1_preds.h5", "r+") as file:
            file.attrs["source"] = path
        sizes = [-1, 10**6 + len(path), -1]
        (outcome,) = postprocess(configure(folder, {"postprocessing_sizes": sizes}), "TS_1.mrc")
        assert (outcome.warnings, len(set(fingerprints(folder)))) == ((), 1)


def test_a_picture_that_cannot_be_written_fails_no_tomogram(folder: Path) -> None:
    (folder / "out" / "TS_1_preview.png").mkdir(parents=True)
    outcomes = segment(configure(folder))
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    assert "TS_1_preview.png could not be drawn" in outcomes["TS_1"].warnings[0] and not outcomes["TS_3"].warnings


# ------------------------------------------------------------------------------------------- removing small components


def sizes_of(sizes: list[int]) -> dict[str, Any]:
    return {"postprocessing_sizes": sizes}


def test_sizes_can_be_changed_again_and_again(folder: Path) -> None:
    segment(configure(folder, save_internal_files=True))
    unfiltered = labels(folder)
    with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
        probabilities = file["probs"][:]
    results = {}
    for sizes in ([-1, -1, 10**6], [-1, 10**6, -1], [-1, -1, 10**6], [-1, -1, -1]):
        outcomes = postprocess(configure(folder, sizes_of(sizes), save_internal_files=True))
        assert [outcome.status for outcome in outcomes] == ["done"] * 3
        found = labels(folder)
        np.testing.assert_array_equal(results.setdefault(tuple(sizes), found), found)
        with h5py.File(folder / "out" / "TS_1_preds.h5") as file:
            np.testing.assert_array_equal(file["probs"][:], probabilities)
            np.testing.assert_array_equal(found + file["removed"][:], unfiltered)
            assert file.attrs["voxel_size_angstrom"][0] == pytest.approx(9.96)
    assert (unfiltered == 1).any() and not (results[-1, 10**6, -1] == 1).any()
    np.testing.assert_array_equal(results[-1, -1, -1], unfiltered)


def test_a_chunk_that_was_changed_in_place_is_another_input_and_a_copy_is_not(folder: Path) -> None:
    source, voxels = folder / "data" / "a.zarr", np.random.default_rng(0).random(SHAPE, np.float32)
    zarr.create_array(source, data=voxels, chunks=(12, 20, 22), compressors=None)
    configuration = configure(folder, file_extension=".zarr")
    segment(configuration)
    shutil.copytree(source, folder / "data" / "b.zarr", copy_function=shutil.copy)
    shutil.rmtree(source)
    (folder / "data" / "b.zarr").rename(source)
    assert [job.stem for job in plan_run(configuration).skipped] == ["a"]
    zarr.open_array(source)[4, 3, 3] = 9
    with pytest.raises(Problems, match="made from another input"):
        plan_run(configuration)
    segment(configuration, overwrite=True)
    assert [job.stem for job in plan_run(configuration).skipped] == ["a"]


def test_what_failed_once_is_done_when_its_outputs_are_there(folder: Path) -> None:
    """Such as a tomogram that could not be read for an hour, or one that was replaced and put back."""
    configuration = configure(folder, test_files=["TS_1.mrc"])
    segment(configuration)
    before = read_outcomes(folder / "out")["TS_1"]
    Ledger(folder / "out", "TS_1").append("outcome", **{**before, "status": "failed", "error": "x", "kind": "y"})
    segment_command.segment({"": configuration}, Console(quiet=True), device="cpu")
    assert read_outcomes(folder / "out")["TS_1"] == before


def test_sizes_in_the_run_and_after_it_are_the_same(folder: Path) -> None:
    configuration = configure(folder, sizes_of([-1, 5, 5]))
    segment(configuration)
    in_the_run = labels(folder)
    segment(configure(folder), overwrite_all=True)
    postprocess(configuration)
    np.testing.assert_array_equal(labels(folder), in_the_run)
    # A run with these sizes takes the post-processed outputs for its own.
    assert {outcome.status for outcome in segment(configuration).values()} == {"skipped"}


def test_predictions_of_cryosiam_can_be_postprocessed(folder: Path) -> None:
    """CryoSiam's files hold nothing but the datasets."""
    expected = golden.expected("lamella_then_semantic")
    sizes = golden.configuration("lamella_then_semantic", "config_semantic.yaml")["parameters"]["network"]
    (folder / "out").mkdir()
    with h5py.File(folder / "out" / "TS_a_preds.h5", "w") as file:
        file["labels"] = expected["semantic_before_sizes"]
    configuration = configure(folder, sizes_of(sizes["postprocessing_sizes"]))
    (outcome,) = postprocess(configuration)
    np.testing.assert_array_equal(labels(folder, "TS_a"), expected["semantic"])
    assert outcome.voxels == tuple(np.bincount(expected["semantic"].ravel(), minlength=4))


def test_postprocessing_needs_predictions_and_sizes(folder: Path) -> None:
    with pytest.raises(Problems) as caught:
        postprocess(configure(folder, test_files=["TS_1.mrc", "TS_9.mrc"]))
    text = str(caught.value)
    assert "TS_9_preds.h5" in text and "Run semantic-predict first" in text and "postprocessing_sizes" in text
    with pytest.raises(Problems, match=r"does not exist: .*_preds.h5"):
        postprocess(configure(folder, sizes_of([-1, 1])), filename="TS_1.mrc")


def test_broken_predictions_fail_alone(folder: Path) -> None:
    segment(configure(folder))
    (folder / "out" / "TS_1_preds.h5").write_bytes(b"not HDF5")
    with h5py.File(folder / "out" / "TS_3_preds.h5", "w") as file:
        file["probs"] = np.zeros((2, 2, 2))
    with h5py.File(folder / "out" / "TS_4_preds.h5", "w") as file:
        file["labels"] = np.full((4, 4, 4), -3)
    with h5py.File(folder / "out" / "TS_5_preds.h5", "w") as file:
        file["labels"] = np.zeros((4, 4, 4))
    outcomes = {o.stem: o for o in postprocess(configure(folder, sizes_of([-1, 5])))}
    assert [o.stem for o in outcomes.values() if o.status == "done"] == ["TS_2_9.96Apx"]
    for stem, words in {"TS_1": "must be an HDF5 file", "TS_3": "dataset 'labels'", "TS_4": "between 0 and 255",
                        "TS_5": "whole numbers"}.items():  # fmt: skip
        assert words in outcomes[stem].error and f"{stem}_preds.h5" in outcomes[stem].error
    assert (folder / "out" / "TS_1_preds.h5").read_bytes() == b"not HDF5"


# ----------------------------------------------------------------------------------------------------------- components


def instances(folder: Path, stem: str = "TS_1") -> np.ndarray:
    with h5py.File(folder / "out" / f"{stem}_components.h5") as file:
        return file["instances"][:]


def outputs(*stems: str, components: bool = True) -> list[str]:
    collection = ["components.csv", "components.parquet"] if components else []
    endings = ["preds.h5", "preview.png"]
    endings += ["components.csv", "components.h5", "components.parquet"] if components else []
    return sorted(collection + [f"{stem}_{ending}" for stem in stems for ending in endings])


STEMS = ("TS_1", "TS_2_9.96Apx", "TS_3")


def test_components_in_the_run_and_after_it_are_the_same(folder: Path) -> None:
    outcomes = segment(configure(folder, sizes_of([-1, 5, 5]), components=True, save_internal_files=True))
    assert {outcome.status for outcome in outcomes.values()} == {"done"} and files(folder / "out") == [
        *LEDGER,
        *outputs(*STEMS),
    ]
    found = instances(folder, "TS_2_9.96Apx")
    table = pandas.read_parquet(folder / "out" / "components.parquet")
    counts = table[table["tomogram"] == "TS_1"]["class_name"].value_counts()
    assert outcomes["TS_1"].components == counts.to_dict() and outcomes["TS_1"].found()[-1].startswith("components: ")
    own = table[table["tomogram"] == "TS_2_9.96Apx"]
    assert set(table["tomogram"]) == set(STEMS) and len(own) == found.max() and (own["voxels"] > 5).all()
    np.testing.assert_array_equal(found > 0, labels(folder, "TS_2_9.96Apx") > 0)
    with h5py.File(folder / "out" / "TS_2_9.96Apx_preds.h5") as file:
        predicted, probabilities = dict(file.attrs), file["probs"][:]
    row = own.loc[own["voxels"].idxmax()]
    inside = found == row["label"]
    np.testing.assert_allclose(row["mean_probability"], probabilities[row["class"]][inside].mean(), rtol=1e-5)
    np.testing.assert_allclose(row["volume_nm3"], row["voxels"] * 0.996**3, rtol=1e-5)
    with h5py.File(folder / "out" / "TS_2_9.96Apx_components.h5") as file:
        attributes = dict(file.attrs)
    for name in ("fingerprint", "source", "voxel_size_angstrom", "origin_angstrom", "nstart"):
        np.testing.assert_array_equal(attributes[name], predicted[name])
    assert attributes["software"] == f"cryosiam_dask {__version__}"
    before = {path: path.read_bytes() for path in (folder / "out").glob("*components.csv")}
    for path in (folder / "out").glob("*components.*"):
        path.unlink()
    configuration = configure(folder)
    outcomes = {o.stem: o for o in measure(configuration, find_predictions(configuration), Listener())}
    assert {o.status for o in outcomes.values()} == {"done"} and outcomes["TS_1"].shape == SHAPE
    assert outcomes["TS_1"].components == counts.to_dict()
    assert [line.split()[0] for line in outcomes["TS_1"].found()] == ["components:"]
    assert {path: path.read_bytes() for path in before} == before
    np.testing.assert_array_equal(instances(folder, "TS_2_9.96Apx"), found)


def test_only_missing_components_are_made(folder: Path) -> None:
    first = segment(configure(folder))
    written = labels(folder)
    outcomes = segment(configure(folder, components=True))
    assert first["TS_1"].voxels
    assert [outcomes[stem].voxels for stem in STEMS] == [first[stem].voxels for stem in STEMS]
    assert {outcome.status for outcome in outcomes.values()} == {"done"} and files(folder / "out") == [
        *LEDGER,
        *outputs(*STEMS),
    ]
    table = (folder / "out" / "components.csv").read_bytes()
    (folder / "out" / "TS_1_components.csv").unlink()
    modified = (folder / "out" / "TS_1_preds.h5").stat().st_mtime_ns
    outcomes = segment(configure(folder, components=True))
    assert [outcomes[stem].status for stem in STEMS] == ["done", "skipped", "skipped"]
    assert (folder / "out" / "TS_1_preds.h5").stat().st_mtime_ns == modified
    assert (folder / "out" / "components.csv").read_bytes() == table
    np.testing.assert_array_equal(instances(folder) > 0, written > 0)
    # A run over a single tomogram leaves the others in the collection.
    segment(configure(folder, {"threshold": 0.45}, components=True), filename="TS_1.mrc", overwrite_all=True)
    assert set(pandas.read_csv(folder / "out" / "components.csv")["tomogram"]) == set(STEMS)


def test_components_follow_the_labels(folder: Path) -> None:
    segment(configure(folder, components=True))
    before = instances(folder)
    postprocess(configure(folder, sizes_of([-1, 10**6, -1]), components=True))
    assert instances(folder).max() < before.max() and files(folder / "out") == [*LEDGER, *outputs(*STEMS)]
    np.testing.assert_array_equal(instances(folder) > 0, labels(folder) > 0)
    assert not (pandas.read_csv(folder / "out" / "components.csv")["class"] == 1).any()
    # The same sizes again change nothing, so that nothing has to go; other sizes remove what they make untrue.
    assert not any(o.warnings for o in postprocess(configure(folder, sizes_of([-1, 10**6, -1]))))
    assert files(folder / "out") == [*LEDGER, *outputs(*STEMS)]
    outcomes = postprocess(configure(folder, sizes_of([-1, -1, 5])))
    assert all("have been removed" in o.warnings[0] for o in outcomes)
    assert files(folder / "out") == [*LEDGER, *outputs(*STEMS, components=False)]


def test_unknown_voxel_sizes_and_mrc_outputs(folder: Path) -> None:
    with mrcfile.open(folder / "data" / "TS_1.mrc", "r+") as mrc:
        mrc.voxel_size = 0
    outcomes = segment(configure(folder, components=True, save_original_file_extension=True))
    assert ["in the tomogram's header" in " ".join(outcomes[stem].warnings) for stem in STEMS] == [True, False, False]
    table = pandas.read_parquet(folder / "out" / "components.parquet")
    assert (table["volume_nm3"].isna() == (table["tomogram"] == "TS_1")).all()
    outcomes = segment(configure(folder, components=True, save_original_file_extension=True))
    assert {outcome.status for outcome in outcomes.values()} == {"skipped"}


def test_components_of_broken_predictions_fail_alone(folder: Path) -> None:
    segment(configure(folder))
    (folder / "out" / "TS_1_preds.h5").write_bytes(b"not HDF5")
    with h5py.File(folder / "out" / "TS_3_preds.h5", "r+") as file:
        file["probs"] = np.zeros((3, 4, 4, 4), np.float32)
    with h5py.File(folder / "out" / "TS_4_preds.h5", "w") as file:
        file["labels"] = np.zeros((4, 4, 4))
    with h5py.File(folder / "out" / "TS_5_preds.h5", "w") as file:
        file["labels"] = np.zeros((0, 4, 4), np.uint8)
    with h5py.File(folder / "out" / "TS_6_preds.h5", "w") as file:  # as other programs write it: nothing but labels
        file["labels"] = np.arange(27, dtype=np.int64).reshape(3, 3, 3) % 2 * 300
    with h5py.File(folder / "out" / "TS_7_preds.h5", "w") as file:
        file["labels"] = np.full((3, 3, 3), -1)
    configuration = configure(folder)
    outcomes = {o.stem: o for o in measure(configuration, find_predictions(configuration), Listener())}
    assert [o.stem for o in outcomes.values() if o.status == "done"] == ["TS_2_9.96Apx", "TS_6"]
    for stem, words in {"TS_1": "must be an HDF5 file", "TS_3": "shape of the labels", "TS_4": "whole numbers",
                        "TS_5": "must hold voxels", "TS_7": "must not be negative"}.items():  # fmt: skip
        assert words in outcomes[stem].error and not outcomes[stem].details
    assert set(pandas.read_csv(folder / "out" / "components.csv")["tomogram"]) == {"TS_2_9.96Apx", "TS_6"}
    (folder / "out" / "TS_6_components.parquet").write_bytes(b"damaged")
    *_, collection = measure(configuration, find_predictions(configuration, "TS_2_9.96Apx"), Listener())
    assert collection.status == "failed" and "TS_6_components.parquet" in collection.error


# ------------------------------------------------------------------------------------------------------- particle lists


def test_particle_lists_of_written_predictions(folder: Path) -> None:
    segment(configure(folder))
    written = labels(folder, "TS_2_9.96Apx")
    regions = regionprops(label_whole(written == 1))
    three = {"min_voxels": 3}
    for network, options, smallest in (({}, {}, 0), (three, {}, 3), (three, {"min_voxels": 1}, 1)):
        configuration = configure(folder, network)
        outcomes = list_centers(configuration, find_predictions(configuration), Listener(), **options)
        assert [outcome.status for outcome in outcomes] == ["done"] * 3
        star = starfile.read(folder / "out" / "TS_2_9.96Apx_class1_centers.star")
        found = sorted(star[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy().tolist())
        np.testing.assert_allclose(found, sorted(r.centroid for r in regions if r.area > smallest), atol=1e-6)
        assert set(star["rlnTomoName"]) == {"TS_2_9.96Apx"}
    together = starfile.read(folder / "out" / "class1_centers.star")
    assert set(together["rlnTomoName"]) == set(STEMS)
    for path in (folder / "out").glob("*_centers.*"):
        path.unlink()
    list_centers(configuration, find_predictions(configuration, "TS_1.mrc"), Listener(), erode=True)
    assert {path.name.partition("class")[0] for path in (folder / "out").glob("*centers*")} == {"TS_1_", ""}


def test_particle_lists_follow_the_labels(folder: Path) -> None:
    """New labels and deleted predictions: what is listed is what is there."""
    out, sizes = folder / "out", {"postprocessing_sizes": [-1, 10**6, -1]}
    segment(configure(folder))
    configuration = configure(folder, sizes)
    list_centers(configuration, find_predictions(configuration), Listener())
    first, *others = STEMS
    outcomes = postprocess(configuration, f"{first}.mrc")
    assert "its particle lists belong to earlier labels" in outcomes[0].warnings[0]
    assert not list(out.glob(f"{first}_class*"))
    assert set(starfile.read(out / "class1_centers.star")["rlnTomoName"]) == set(others)
    (out / f"{others[0]}_preds.h5").unlink()
    measure(configuration, find_predictions(configuration, f"{first}.mrc"), Listener())
    assert set(starfile.read(out / "class1_centers.star")["rlnTomoName"]) == set(others[1:])
    assert not list(out.glob(f"{first}_class*")) and list(out.glob(f"{others[0]}_class*"))


def test_particle_lists_of_broken_predictions_fail_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "TS_1_preds.h5").write_bytes(b"not HDF5")
    with h5py.File(folder / "out" / "TS_2_preds.h5", "w") as file:  # nothing found, and no voxel size known
        file["labels"] = np.zeros((4, 4, 4), np.uint8)
    with h5py.File(folder / "out" / "TS_3_preds.h5", "w") as file:
        file["labels"] = np.zeros((4, 4, 4), np.uint8)
        file["probs"] = np.zeros((4, 4, 4, 4), np.float32)
    configuration, listener = configure(folder), Listener()
    outcomes = list_centers(configuration, find_predictions(configuration), listener)
    assert [outcome.status for outcome in outcomes] == ["failed", "done", "done"]
    assert (
        "must be an HDF5 file" in outcomes[0].error
        and "data_folder holds no readable tomogram" in outcomes[1].warnings[0]
    )
    assert outcomes[2].found() == ["particles: class 1: 0, class 2: 0, class 3: 0"]
    written = sorted(path.name for path in (folder / "out").glob("*.star"))
    assert written == ["TS_2_class1_centers.star", *(f"TS_3_class{k}_centers.star" for k in (1, 2, 3)),
                       *(f"class{k}_centers.star" for k in (1, 2, 3))]  # fmt: skip
