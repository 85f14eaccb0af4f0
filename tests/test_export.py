"""Tomograms of any format in, labels in any set of formats out: all at the same place, all or nothing, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pandas
import pytest
import yaml
import zarr
from ome_zarr_models import open_ome_zarr
from rich.console import Console
from zarr.storage import MemoryStore

from cryosiam_dask.commands.convert import convert_file
from cryosiam_dask.commands.written import export_predictions
from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, Problems
from cryosiam_dask.files.atomic import part_name
from cryosiam_dask.runs.collection import remove_left_overs, run
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.runs.ledger import read_outcomes
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.plan import plan_run
from cryosiam_dask.runs.written import export, measure, postprocess
from cryosiam_dask.stages import ome_zarr
from cryosiam_dask.stages.export import convert_to_ome_zarr, formats_done, read_mrc_fingerprint, remove_outdated_formats
from cryosiam_dask.stages.ingest import convert, ingest
from cryosiam_dask.stages.ome_zarr import read_own_attributes, write_ome_zarr
from support import checkpoints
from support.command import invoke
from support.runs import Listener

SHAPE = (24, 20, 22)
STEM = "TS 01 µ_9.96Apx"
SIZE, ORIGIN, START = (10.5, 9.96, 9.96), (30.0, 20.0, 10.0), (3, 2, 1)
BOTH = ["hdf5", "ome-zarr", "mrc"]


@pytest.fixture(autouse=True)
def several_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ome_zarr, "COARSEST", 12)


def voxels() -> np.ndarray:
    ramp = np.linspace(0, 1, SHAPE[0])[:, None, None]
    return (np.random.default_rng(0).random(SHAPE) * ramp).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One tomogram and a checkpoint that finds all of three labels in it."""
    (tmp_path / "data").mkdir()
    with mrcfile.new(tmp_path / "data" / f"{STEM}.mrc") as mrc:
        mrc.set_data(voxels())
        mrc.voxel_size = SIZE[::-1]
        mrc.header.origin = ORIGIN[::-1]
        mrc.nstart = START[::-1]
    checkpoints.write(tmp_path / "model.ckpt", seed=33)
    return tmp_path


def configure(folder: Path, **changes: Any) -> Configuration:
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return read_configuration(folder / "config.yaml")


def segment(configuration: Configuration, **options: Any) -> list[Outcome]:
    return run(plan_run(configuration, **options), Listener())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stored_labels(folder: Path, stem: str = STEM) -> np.ndarray:
    with h5py.File(folder / "out" / f"{stem}_preds.h5") as file:
        return file["labels"][:]


def segmentation(path: Path) -> np.ndarray:
    return zarr.open_group(path, mode="r")["labels/segmentation/0"][:]


def place(path: Path) -> tuple[Any, Any]:
    dataset = open_ome_zarr(zarr.open_group(path, mode="r")).attributes.ome.multiscales[0].datasets[0]
    scale, translation = dataset.coordinateTransformations
    return scale.scale, translation.translation


# --------------------------------------------------------------------------------------------------------- what goes in


def as_hdf5(folder: Path, source: Path, stem: str) -> None:
    with h5py.File(folder / f"{stem}.h5", "w") as file:
        file["volume"] = voxels()


def as_zarr(folder: Path, source: Path, stem: str) -> None:
    convert(source, folder / f"{stem}.zarr", chunks=(7, 8, 9))


def as_ome_zarr(folder: Path, source: Path, stem: str) -> None:
    convert_to_ome_zarr(source, folder / f"{stem}.ome.zarr")


def as_level_one(folder: Path, source: Path, stem: str) -> None:
    """What is to be segmented is the second level, with axes for time and channel, in format 2."""
    group = zarr.create_group(folder / f"{stem}.zarr", zarr_format=2)
    group.create_array("full", shape=(1, 1, 48, 40, 44), dtype="f4", chunks=(1, 1, 20, 24, 22))
    group.create_array("half", shape=(1, 1, *SHAPE), dtype="f4", chunks=(1, 1, 9, 9, 9))[:] = voxels()[None, None]
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    scales = {"full": 0.5, "half": 1.1}
    datasets = [
        {"path": name, "coordinateTransformations": [{"type": "scale", "scale": [1, 1, s, s, s]}]}
        for name, s in scales.items()
    ]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (as_hdf5, {"file_extension": ".h5"}),
        (as_hdf5, {"file_extension": ".h5", "hdf5_dataset": "volume"}),
        (as_zarr, {"file_extension": ".zarr"}),
        (as_ome_zarr, {"file_extension": ".ome.zarr"}),
        (as_level_one, {"file_extension": ".zarr", "ome_zarr_level": 1}),
    ],
)
def test_labels_do_not_depend_on_the_format_of_the_tomogram(folder: Path, make: Any, keys: dict[str, Any]) -> None:
    segment(configure(folder))
    expected = stored_labels(folder)
    (folder / "other").mkdir()
    make(folder / "other", folder / "data" / f"{STEM}.mrc", STEM)
    configuration = configure(folder, data_folder=str(folder / "other"), prediction_folder=str(folder / "out2"), **keys)
    (outcome,) = segment(configuration)
    assert (outcome.status, outcome.stem, outcome.shape) == ("done", STEM, SHAPE)
    assert names(folder / "out2") == [".ledger", f"{STEM}_preds.h5", f"{STEM}_preview.png"]
    with h5py.File(folder / "out2" / f"{STEM}_preds.h5") as file:
        np.testing.assert_array_equal(file["labels"][:], expected)
        size = file.attrs["voxel_size_angstrom"]
    sizes = {as_hdf5: (np.nan,) * 3, as_level_one: (11, 11, 11)}.get(make, SIZE)
    np.testing.assert_allclose(size, sizes, rtol=1e-6)
    assert {outcome.status for outcome in segment(configuration)} == {"skipped"}
    if "ome_zarr_level" in keys:  # another level is another input
        with pytest.raises(Problems, match="made from another input"):
            plan_run(configuration.model_copy(update={"ome_zarr_level": 0}))


def test_a_mask_for_each_class(folder: Path) -> None:
    configuration = configure(folder, class_names=["membrane", "ER / Golgi"])
    segment(configuration)
    out, labels = folder / "out", stored_labels(folder)
    predictions = find_predictions(configuration)
    (outcome,) = export(configuration, predictions, Listener(), formats=["mrc"], per_class=True)
    assert outcome.status == "done"
    masks = [out / f"{STEM}__{name}.mrc" for name in ("membrane", "ER_Golgi")]
    assert sorted(out.glob("*.mrc")) == sorted(masks)
    for label, path in enumerate(masks, 1):
        with mrcfile.open(path) as mask:
            np.testing.assert_array_equal(mask.data, labels == label)
            assert mask.data.dtype == np.int8 and mask.header.mode == 0
            assert mask.voxel_size.tolist() == pytest.approx(SIZE[::-1])
            assert mask.header.origin.tolist() == ORIGIN[::-1] and mask.nstart.tolist() == START[::-1]
        assert mrcfile.validate(path)
    other = out / f"{STEM}__2__membrane.mrc"  # of the tomogram TS 01 µ_9.96Apx__2
    shutil.copy(masks[0], other)
    # Renamed classes take their masks along; other labels have none.
    configuration = configure(folder, class_names=["membrane", "actin"])
    export(configuration, predictions, Listener(), formats=["mrc"], per_class=True)
    assert sorted(out.glob("*.mrc")) == sorted([other, masks[0], out / f"{STEM}__actin.mrc"])
    configuration = configure(
        folder, class_names=["membrane", "actin"], parameters={"network": {"postprocessing_sizes": [-1, 40, -1]}}
    )
    (outcome,) = postprocess(configuration, predictions, Listener())
    assert list(out.glob("*.mrc")) == [other] and any("__actin.mrc" in warning for warning in outcome.warnings)


def test_masks_are_written_all_or_none_and_replace_no_other_file(folder: Path) -> None:
    configuration = configure(folder, class_names=["membrane", "actin"])
    segment(configuration)
    foreign = folder / "out" / f"{STEM}__actin.mrc"
    with mrcfile.new(foreign) as mrc:
        mrc.set_data(np.ones((2, 2, 2), np.int8))
    before = foreign.read_bytes()
    (outcome,) = export(configuration, find_predictions(configuration), Listener(), formats=["mrc"], per_class=True)
    assert outcome.status == "failed" and "must not replace" in outcome.error
    assert foreign.read_bytes() == before and len(list((folder / "out").glob("*.mrc"))) == 1
    with pytest.raises(ConfigurationError, match="Add --format mrc"):
        export_predictions(configuration, Console(file=None, quiet=True), formats=["ome-zarr"], per_class=True)


def test_a_changed_chunk_is_another_input(folder: Path) -> None:
    as_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    configuration = configure(folder, file_extension=".zarr")
    segment(configuration)
    zarr.open_array(folder / "data" / f"{STEM}.zarr")[:7, :8, :9] = 0
    with pytest.raises(Problems, match="made from another input"):
        plan_run(configuration)


def test_folders_are_tomograms_only_if_they_are_zarr(folder: Path) -> None:
    (folder / "data" / "notes.mrc").mkdir()
    assert [job.stem for job in plan_run(configure(folder)).jobs] == [STEM]
    message = r"ends with file_extension, which is \.ome\.zarr; found files ending with \.mrc"
    with pytest.raises(Problems, match=message):
        plan_run(configure(folder, file_extension=".ome.zarr"))
    as_ome_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    (folder / "data" / ".x.ome.zarr").mkdir()
    configuration = configure(folder, file_extension=".ome.zarr")
    assert [job.stem for job in plan_run(configuration).jobs] == [STEM]
    for name in (STEM, f"{STEM}.ome.zarr"):
        assert [job.stem for job in plan_run(configuration, filename=name).jobs] == [STEM]


def test_a_copy_of_a_zarr_that_is_not_complete_is_named(folder: Path) -> None:
    (folder / "data" / "TS_2.zarr" / "0").mkdir(parents=True)
    as_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    outcomes = {outcome.stem: outcome for outcome in segment(configure(folder, file_extension=".zarr"))}
    assert outcomes[STEM].status == "done" and outcomes["TS_2"].status == "failed"
    assert "found none. Check that it was copied as a whole" in outcomes["TS_2"].error and not outcomes["TS_2"].details


def test_outputs_are_no_tomograms_of_the_next_run(folder: Path) -> None:
    """All in one folder: what comes out carries the endings of what goes in."""
    as_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    for extension in (".mrc", ".zarr"):
        keys = {"prediction_folder": str(folder / "data"), "output_formats": BOTH, "file_extension": extension}
        segment(configure(folder, **keys), overwrite_all=True)
        assert len(names(folder / "data")) == 7  # with the ledger and the picture
        assert [job.stem for job in plan_run(configure(folder, **keys)).skipped] == [STEM]
    shutil.rmtree(folder / "data" / f"{STEM}.ome.zarr")
    as_ome_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    with pytest.raises(Problems, match="an output must not replace its own input"):
        plan_run(configure(folder, **{**keys, "file_extension": ".ome.zarr"}))


# ------------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("extension", [".mrc", ".zarr"])
def test_every_format_holds_the_labels_at_the_same_place(folder: Path, extension: str) -> None:
    if extension == ".zarr":
        as_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    classes = ["Membran µ", "actin"]
    configuration = configure(folder, output_formats=BOTH, class_names=classes, file_extension=extension)
    (outcome,) = segment(configuration)
    assert outcome.status == "done"
    assert names(folder / "out") == [
        ".ledger", f"{STEM}.ome.zarr", f"{STEM}_labels.mrc", f"{STEM}_preds.h5", f"{STEM}_preview.png",
    ]  # fmt: skip
    labels = stored_labels(folder)
    assert set(np.unique(labels)) == {0, 1, 2}
    with mrcfile.open(folder / "out" / f"{STEM}_labels.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, labels)
        assert mrc.data.dtype == np.int8
        np.testing.assert_allclose(mrc.voxel_size.tolist(), SIZE[::-1], rtol=1e-6)
        assert mrc.header.origin.tolist() == ORIGIN[::-1] and mrc.nstart.tolist() == START[::-1]
        assert mrcfile.validate(folder / "out" / f"{STEM}_labels.mrc")
    path = folder / "out" / f"{STEM}.ome.zarr"
    np.testing.assert_array_equal(segmentation(path), labels)
    image = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(image["0"][:], voxels())
    assert [image[str(n)].shape for n in range(2)] == [SHAPE, (12, 10, 11)]
    scale, translation = place(path)
    np.testing.assert_allclose((scale, translation), (SIZE, ORIGIN), rtol=1e-6)
    own = read_own_attributes(path)
    assert own["class_names"] == classes and own["nstart"] == list(START) and len(own["checkpoint_sha256"]) == 64
    with h5py.File(folder / "out" / f"{STEM}_preds.h5") as file:
        assert file.attrs["class_names"].tolist() == classes
        assert (
            file.attrs["fingerprint"]
            == own["fingerprint"]
            == read_mrc_fingerprint(folder / "out" / f"{STEM}_labels.mrc")
        )
    assert {outcome.status for outcome in segment(configuration)} == {"skipped"}


def test_start_places_an_image_where_mrc_viewers_do_without_an_origin(folder: Path) -> None:
    with mrcfile.open(folder / "data" / f"{STEM}.mrc", "r+") as mrc:
        mrc.header.origin = (0, 0, 0)
    segment(configure(folder, output_formats=["ome-zarr"]))
    _, translation = place(folder / "out" / f"{STEM}.ome.zarr")
    np.testing.assert_allclose(translation, np.multiply(SIZE, START), rtol=1e-6)


def test_formats_that_are_missing_or_outdated_are_made_without_inference(folder: Path) -> None:
    segment(configure(folder))
    model = folder / "model.ckpt"
    configuration = configure(folder, output_formats=BOTH)
    plan = plan_run(configuration)
    assert not plan.jobs and not plan.skipped and [job.stem for job in plan.incomplete] == [STEM]
    written = (folder / "out" / f"{STEM}_preds.h5").stat().st_mtime_ns
    (outcome,) = segment(configuration)
    assert (outcome.status, outcome.shape) == ("done", SHAPE)
    assert (folder / "out" / f"{STEM}_preds.h5").stat().st_mtime_ns == written
    image, mrc = folder / "out" / f"{STEM}.ome.zarr", folder / "out" / f"{STEM}_labels.mrc"
    np.testing.assert_array_equal(segmentation(image), stored_labels(folder))
    assert {outcome.status for outcome in segment(configuration)} == {"skipped"}

    mrc.unlink()
    assert len(plan_run(configuration).incomplete) == 1
    segment(configuration)
    group = zarr.open_group(image)
    group.attrs["cryosiam_dask"] = {**group.attrs["cryosiam_dask"], "fingerprint": "of another prediction"}
    assert len(plan_run(configuration).incomplete) == 1
    segment(configuration)
    assert {outcome.status for outcome in segment(configuration)} == {"skipped"}
    renamed = configure(folder, output_formats=BOTH, class_names=["one", "two"])
    segment(renamed)
    assert read_own_attributes(image)["class_names"] == ["one", "two"]
    assert {outcome.status for outcome in segment(renamed)} == {"skipped"}

    # Other settings without these formats: what was made of the earlier labels does not stay beside the new ones.
    (outcome,) = segment(configure(folder, parameters={"network": {"threshold": 0.5}}), overwrite_all=True)
    assert names(folder / "out") == [".ledger", f"{STEM}_preds.h5", f"{STEM}_preview.png"]
    assert [w.split(" had ")[0] for w in outcome.warnings if " had outdated" in w] == [image.name, mrc.name]
    assert model.exists()


def test_other_sizes_are_applied_to_all_formats(folder: Path) -> None:
    segment(configure(folder, output_formats=BOTH))
    sizes = {"network": {"postprocessing_sizes": [-1, 50, 10**6]}}
    configuration = configure(folder, output_formats=BOTH, parameters=sizes)
    predictions = find_predictions(configuration, sizes=True)
    assert [outcome.status for outcome in postprocess(configuration, predictions, Listener())] == ["done"]
    labels = stored_labels(folder)
    assert not (labels == 2).any()
    np.testing.assert_array_equal(segmentation(folder / "out" / f"{STEM}.ome.zarr"), labels)
    with mrcfile.open(folder / "out" / f"{STEM}_labels.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, labels)
    assert {outcome.status for outcome in segment(configuration)} == {"skipped"}

    (folder / "data" / f"{STEM}.mrc").rename(folder / "elsewhere.mrc")
    sizes = {"network": {"postprocessing_sizes": [-1, -1, 10**6]}}
    configuration = configure(folder, output_formats=BOTH, parameters=sizes)
    (outcome,) = postprocess(configuration, predictions, Listener())
    assert "the tomogram must exist, because an OME-Zarr image holds it together with its labels" in outcome.error
    assert names(folder / "out") == [".ledger", f"{STEM}_preds.h5"]  # no earlier labels beside the new ones


def test_a_failure_leaves_the_prediction_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    configuration = configure(folder, output_formats=["ome-zarr"])
    with monkeypatch.context() as patch:
        patch.setattr(ome_zarr, "mode_of_pairs", full)
        (outcome,) = segment(configuration)
    assert outcome.status == "failed" and "No space left on device" in outcome.error
    left = [f"{STEM}.work.zarr", f"{STEM}_preds.h5", f"{STEM}_preview.png"]
    assert names(folder / "out") == [".ledger", *left]
    assert read_outcomes(folder / "out")[STEM]["status"] == "failed"
    assert [job.stem for job in plan_run(configuration).incomplete] == [STEM]
    segment(configuration)
    assert names(folder / "out") == [".ledger", f"{STEM}.ome.zarr", f"{STEM}_preds.h5", f"{STEM}_preview.png"]
    outcome = read_outcomes(folder / "out")[STEM]
    assert (outcome["status"], outcome["error"]) == ("done", "")


def test_what_tasks_wrote_after_a_failure_is_removed(folder: Path) -> None:
    plan = plan_run(configure(folder, output_formats=["ome-zarr"]))
    (folder / "out" / part_name(f"{STEM}.ome.zarr") / "0").mkdir(parents=True)
    remove_left_overs(plan)
    assert names(folder / "out") == []


def test_mrc_instead_of_hdf5_keeps_its_meaning(folder: Path) -> None:
    as_zarr(folder / "data", folder / "data" / f"{STEM}.mrc", STEM)
    keys = {"save_original_file_extension": True, "output_formats": ["ome-zarr"], "file_extension": ".zarr"}
    segment(configure(folder, **keys))
    assert names(folder / "out") == [".ledger", f"{STEM}.mrc", f"{STEM}.ome.zarr", f"{STEM}_preview.png"]
    assert {outcome.status for outcome in segment(configure(folder, **keys))} == {"skipped"}
    with mrcfile.open(folder / "out" / f"{STEM}.mrc") as mrc:
        np.testing.assert_array_equal(segmentation(folder / "out" / f"{STEM}.ome.zarr"), mrc.data)


# ------------------------------------------------------------------------------------------------ what is there already


def of_cryosiam(folder: Path, labels: np.ndarray, **datasets: np.ndarray) -> None:
    (folder / "out").mkdir(exist_ok=True)
    with h5py.File(folder / "out" / f"{STEM}_preds.h5", "w") as file:
        for name, values in {"labels": labels, **datasets}.items():
            file[name] = values


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64"])
def test_predictions_of_cryosiam_itself_are_exported(folder: Path, dtype: str) -> None:
    labels = np.random.default_rng(3).integers(0, 5, SHAPE).astype(dtype)
    of_cryosiam(folder, labels)
    configuration = configure(folder, class_names=["one", "two"])
    predictions = find_predictions(configuration)
    (outcome,) = export(configuration, predictions, Listener(), formats=["ome-zarr", "mrc"])
    assert (outcome.status, outcome.error) == ("done", "")
    path = folder / "out" / f"{STEM}.ome.zarr"
    np.testing.assert_array_equal(segmentation(path), labels)
    np.testing.assert_allclose(place(path), (SIZE, ORIGIN), rtol=1e-6)
    assert read_own_attributes(path)["class_names"] == ["one", "two", "class 3", "class 4"]
    with mrcfile.open(folder / "out" / f"{STEM}_labels.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, labels)
        np.testing.assert_allclose(mrc.voxel_size.tolist(), SIZE[::-1], rtol=1e-6)


def test_formats_of_cryosiams_own_predictions_follow_their_labels(folder: Path) -> None:
    """Without a fingerprint nothing tells one set of labels from another: what was just made is not outdated."""
    of_cryosiam(folder, np.random.default_rng(3).integers(0, 3, SHAPE).astype(np.uint8))
    sizes = {"network": {"postprocessing_sizes": [-1, 10**6, -1]}}
    configuration = configure(folder, output_formats=BOTH, parameters=sizes)
    (outcome,) = postprocess(configuration, find_predictions(configuration, sizes=True), Listener())
    assert outcome.status == "done" and not any("removed" in warning for warning in outcome.warnings)
    labels = stored_labels(folder)
    assert set(np.unique(labels)) == {0, 2}
    np.testing.assert_array_equal(segmentation(folder / "out" / f"{STEM}.ome.zarr"), labels)
    with mrcfile.open(folder / "out" / f"{STEM}_labels.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, labels)


def failure(folder: Path, **keys: Any) -> str:
    configuration = configure(folder, **keys)
    (outcome,) = export(configuration, find_predictions(configuration), Listener(), formats=["ome-zarr"])
    assert outcome.status == "failed" and not outcome.details
    assert names(folder / "out") == [".ledger", f"{STEM}_preds.h5"]
    return outcome.error


def test_exports_that_cannot_be(folder: Path) -> None:
    of_cryosiam(folder, np.zeros((24, 20, 21), np.uint8))
    message = f"must have the shape of their tomogram {folder / 'data' / STEM}.mrc, (24, 20, 22); found (24, 20, 21)"
    assert message in failure(folder)
    of_cryosiam(folder, np.full(SHAPE, 300))
    assert "labels must lie between 0 and 255; found 300 to 300" in failure(folder)
    of_cryosiam(folder, np.zeros(SHAPE, np.float32))
    assert "labels must be whole numbers; found float32" in failure(folder)
    of_cryosiam(folder, np.zeros(SHAPE, np.uint8))
    missing = failure(folder, file_extension=".rec")
    assert "the tomogram must exist, because an OME-Zarr image holds it together with its labels" in missing
    assert f"; found no {STEM}.rec in " in missing
    (folder / "data" / f"{STEM}.mrc").write_bytes(b"")
    assert "it is empty or truncated" in failure(folder)


def test_outputs_of_other_programs_are_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    shutil.copy(folder / "data" / f"{STEM}.mrc", folder / "out" / f"{STEM}_labels.mrc")
    zarr.create_group(folder / "out" / f"{STEM}.ome.zarr")
    assert remove_outdated_formats(folder / "out", STEM, "any") == []
    assert len(names(folder / "out")) == 2
    configuration = configure(folder, output_formats=BOTH)
    assert not formats_done(configuration, STEM, "any", ())
    (folder / "out" / f"{STEM}_labels.mrc").write_bytes(b"no MRC")
    assert read_mrc_fingerprint(folder / "out" / f"{STEM}_labels.mrc") is None


@pytest.mark.parametrize("made_by", ["another program", "convert"])
def test_what_is_no_prediction_is_neither_replaced_nor_removed(folder: Path, made_by: str) -> None:
    (folder / "out").mkdir()
    image, manual = folder / "out" / f"{STEM}.ome.zarr", folder / "out" / f"{STEM}_labels.mrc"
    if made_by == "convert":
        as_ome_zarr(folder / "out", folder / "data" / f"{STEM}.mrc", STEM)
    else:
        zarr.create_group(image).create_array("0", data=voxels())
    shutil.copy(folder / "data" / f"{STEM}.mrc", manual)
    before = {path: path.read_bytes() for path in (*image.rglob("*"), manual) if path.is_file()}
    with pytest.raises(Problems) as error:
        plan_run(configure(folder, output_formats=BOTH))
    assert [problem.place for problem in error.value.problems] == [str(image), str(manual)]
    assert "--overwrite" in str(error.value)
    (outcome,) = segment(configure(folder))
    assert (outcome.status, outcome.error) == ("done", "")
    configuration = configure(folder)
    (outcome,) = export(configuration, find_predictions(configuration), Listener(), formats=["mrc"])
    assert f"{manual}: an export must not replace a file that this program did not make" in outcome.error
    assert {path: path.read_bytes() for path in before} == before
    (outcome,) = segment(configure(folder, output_formats=BOTH), overwrite_all=True)
    assert (outcome.status, outcome.error) == ("done", "")
    np.testing.assert_array_equal(segmentation(image), stored_labels(folder))


# ---------------------------------------------------------------------------------------------------------- class names


def test_names_of_classes_reach_the_tables(folder: Path) -> None:
    configuration = configure(folder, components=True)
    segment(configuration)
    table = pandas.read_csv(folder / "out" / "components.csv")
    assert list(table.columns[:4]) == ["tomogram", "class", "class_name", "label"]
    assert set(zip(table["class"], table["class_name"], strict=True)) == {(1, "class 1"), (2, "class 2")}
    renamed = configure(folder, components=True, class_names=["Membran µ", "actin"])
    assert len(plan_run(renamed).incomplete) == 1
    segment(renamed)
    assert {outcome.status for outcome in segment(renamed)} == {"skipped"}
    for read, ending in ((pandas.read_csv, "csv"), (pandas.read_parquet, "parquet")):
        table = read(folder / "out" / f"{STEM}_components.{ending}")
        assert set(zip(table["class"], table["class_name"], strict=True)) == {(1, "Membran µ"), (2, "actin")}
    measure(configure(folder, class_names=["a", "b"]), find_predictions(renamed), Listener())
    assert set(pandas.read_csv(folder / "out" / "components.csv")["class_name"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("given", "remedy"), [(["one"], "Correct it"), (["background", "one", "two"], "Remove the background, label 0")]
)
def test_names_must_fit_the_model(folder: Path, given: list[str], remedy: str) -> None:
    message = rf"key class_names: must name the model's labels from 1 on, which are 2.*{remedy}"
    with pytest.raises(Problems, match=message):
        plan_run(configure(folder, class_names=given))


# ----------------------------------------------------------------------------------------------------- the command line


def test_export_command(folder: Path) -> None:
    of_cryosiam(folder, np.ones(SHAPE, np.uint8))
    with pytest.raises(ConfigurationError, match=r"a format other than HDF5; found \['hdf5'\]\. Add 'ome-zarr'"):
        export_predictions(configure(folder), Console(quiet=True))
    invoke("export", "--config-file", "config.yaml", "--format", "mrc", "--format", "ome-zarr", folder=folder)
    assert names(folder / "out") == [".ledger", f"{STEM}.ome.zarr", f"{STEM}_labels.mrc", f"{STEM}_preds.h5", "logs"]


def test_convert_command(folder: Path) -> None:
    source = folder / "data" / f"{STEM}.mrc"
    invoke("convert", source, "a.ome.zarr", folder=folder)
    np.testing.assert_allclose(place(folder / "a.ome.zarr"), (SIZE, ORIGIN), rtol=1e-6)
    convert(folder / "a.ome.zarr", folder / "a.zarr")
    stored, report = ingest(folder / "a.zarr", MemoryStore())
    np.testing.assert_array_equal(stored[:], voxels())
    np.testing.assert_allclose(report.header.voxel_size_angstrom, SIZE, rtol=1e-6)
    np.testing.assert_allclose(report.header.origin_angstrom, ORIGIN, rtol=1e-6)
    for target, level, message in (("a.ome.zarr", 0, "must not replace anything"), ("b.zarr", 9, "level 9, which")):
        with pytest.raises(CryosiamDaskError, match=message):
            convert_file(folder / "a.ome.zarr", folder / target, Console(quiet=True), level=level)
    assert names(folder) == ["a.ome.zarr", "a.zarr", "data", "model.ckpt"]


def test_conversion_of_what_is_not_finite(tmp_path: Path) -> None:
    data = voxels()
    data[0, 0, 0] = np.nan
    with mrcfile.new_mmap(tmp_path / "x.mrc", SHAPE, mrc_mode=2) as mrc:
        mrc.data[:] = data
    report = convert_to_ome_zarr(tmp_path / "x.mrc", tmp_path / "x.ome.zarr")
    assert report.statistics.non_finite == 1
    assert zarr.open_group(tmp_path / "x.ome.zarr", mode="r")["0"][0, 0, 0] == np.nanmin(data)
    assert names(tmp_path) == ["x.mrc", "x.ome.zarr"]


def test_an_image_of_two_axes(tmp_path: Path) -> None:
    write_ome_zarr(tmp_path / "x.ome.zarr", voxels()[0], np.ones(SHAPE[1:], np.uint8), class_names=["one"])
    array, report = ingest(tmp_path / "x.ome.zarr", MemoryStore())
    np.testing.assert_array_equal(array[:], voxels()[0])
    assert report.header.shape == SHAPE[1:]
