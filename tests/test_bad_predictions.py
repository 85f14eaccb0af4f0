"""Prediction files that do not fit together: each command says so and leaves the file as it is, or is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pandas
import pytest
import yaml
from scipy import ndimage

from cryosiam_dask.commands.report import write_report
from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.written import export, list_centers, measure, postprocess

SHAPE = (6, 7, 8)


class Silent:
    """A reporter that says nothing."""

    def begin(self, tomogram: str) -> None: ...
    def step(self, tomogram: str, name: str, done: int, total: int) -> None: ...
    def end(self, tomogram: str, message: str, **options: Any) -> None: ...
    def inform(self, message: str) -> None: ...
    def close(self) -> None: ...


COMMANDS = {"components": measure, "semantic-postprocess": postprocess, "semantic-to-centers": list_centers}
command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


def two_classes() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 1:3, 1:3], labels[5, 5, 5] = 1, 2
    return labels


def configure(folder: Path, sizes: list[int]) -> Configuration:
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder),
        "trained_model": str(folder / "model.ckpt"),
        "parameters": {"network": {"postprocessing_sizes": sizes}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def run(command: Callable[..., list[Outcome]], folder: Path, *sizes: int, **datasets: Any) -> Outcome:
    with h5py.File(folder / "TS_preds.h5", "w") as file:
        for name, values in datasets.items():
            file[name] = values
    configuration = configure(folder, list(sizes) or [-1, 3, 0])
    (outcome,) = command(configuration, find_predictions(configuration), Silent())
    return outcome


def written(folder: Path) -> np.ndarray:
    with h5py.File(folder / "TS_preds.h5") as file:
        return file["labels"][:]


def probabilities(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "other probabilities": (
        {"probs": probabilities(3, 6, 7, 9)},
        r"'probs'.*shape of the labels, \(6, 7, 8\); found \(3,",
    ),
    "no class axis": ({"probs": probabilities(*SHAPE)}, r"'probs' must have a class axis.*found \(6, 7, 8\)"),
    "one probability": ({"probs": np.float32(0.5)}, r"'probs' must have a class axis.*found \(\)"),
    "more removed": ({"removed": np.zeros((6, 7, 9), np.uint8)}, r"'removed' must have the shape.*found \(6, 7, 9\)"),
    "less removed": ({"removed": np.zeros((3, 7, 8), np.uint8)}, r"'removed' must have the shape.*found \(3, 7, 8\)"),
    "floats removed": (
        {"removed": np.zeros(SHAPE, np.float32)},
        "'removed' must hold integer labels; found float32",
    ),
    "floats": ({"labels": two_classes().astype(np.float32)}, "labels must be whole numbers; found float32"),
    "no voxels": ({"labels": np.zeros((6, 0, 8), np.uint8)}, r"must hold voxels; found \(6, 0, 8\)"),
}


@command
@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_does_not_fit_together_is_refused_and_kept(
    tmp_path: Path, command: Callable[..., list[Outcome]], kind: str
) -> None:
    datasets, words = BAD[kind]
    folder = tmp_path / "out"
    folder.mkdir()
    outcome = run(command, folder, **{"labels": two_classes(), **datasets})
    assert outcome.status == "failed" and not outcome.details
    assert re.search(words, outcome.error), outcome.error
    assert outcome.error.startswith(str(folder / "TS_preds.h5")) and outcome.error.endswith(
        "Run semantic-predict again."
    )
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["TS_preds.h5", "config.yaml"]
    with h5py.File(folder / "TS_preds.h5") as file:
        assert set(file) == {"labels", *datasets}


def test_a_sum_of_labels_and_removed_that_no_byte_holds(tmp_path: Path) -> None:
    labels = two_classes()
    outcome = run(postprocess, tmp_path, labels=labels, removed=np.full(SHAPE, 255, np.uint8))
    assert outcome.status == "failed" and "must lie between 0 and 255; found 255 to 257" in outcome.error
    np.testing.assert_array_equal(written(tmp_path), labels)
    # Other programs' dtypes are no obstacle.
    removed = (labels == 0).astype(np.int64)
    assert run(postprocess, tmp_path, -1, labels=labels.astype(np.uint64), removed=removed).status == "done"
    np.testing.assert_array_equal(written(tmp_path), labels + removed)


@command
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), ()])
def test_neither_a_volume_nor_an_image(
    tmp_path: Path, command: Callable[..., list[Outcome]], shape: tuple[int, ...]
) -> None:
    outcome = run(command, tmp_path, labels=np.ones(shape, np.uint8))
    assert outcome.status == "failed" and not outcome.details and "2-D or 3-D arrays" in outcome.error


@command
def test_negative_labels(tmp_path: Path, command: Callable[..., list[Outcome]]) -> None:
    outcome = run(command, tmp_path, labels=-two_classes().astype(np.int16))
    assert outcome.status == "failed" and not outcome.details
    assert "must not be negative; found -2" in outcome.error or "must lie between 0 and 255" in outcome.error


def test_labels_without_their_channel_of_probabilities(tmp_path: Path) -> None:
    outcome = run(measure, tmp_path, labels=two_classes(), probs=probabilities(2, *SHAPE))
    assert outcome.status == "failed" and "found label 2 and 2 channels. Use labels and" in outcome.error
    assert not list(tmp_path.glob("*components*"))


def test_labels_are_not_replaced_where_their_components_cannot_be_measured(tmp_path: Path) -> None:
    def with_components(configuration: Configuration, *arguments: Any) -> list[Outcome]:
        return postprocess(configuration.model_copy(update={"components": True}), *arguments)

    datasets = {"labels": two_classes(), "probs": probabilities(2, *SHAPE)}
    outcome = run(with_components, tmp_path, -1, 10, 0, **datasets)  # these sizes would remove label 1
    assert outcome.status == "failed" and not outcome.details and "found label 2 and 2 channels" in outcome.error
    np.testing.assert_array_equal(written(tmp_path), two_classes())
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["TS_preds.h5", "config.yaml"]
    # Without label 2 there is nothing to measure with a channel that is missing.
    assert run(with_components, tmp_path, -1, 3, 5, **datasets).status == "done"
    assert set(pandas.read_csv(tmp_path / "TS_components.csv")["class"]) == {1}


def test_instances_get_no_particle_list_for_each_number(tmp_path: Path) -> None:
    instances = np.zeros((9, 9, 9), np.uint32)
    instances[::2, ::2, ::2] = np.arange(200, 325).reshape(5, 5, 5)
    outcome = run(list_centers, tmp_path, labels=instances)
    assert outcome.status == "failed" and not outcome.details
    assert "labels that are classes, from 0 to 255; found 125 different labels, up to 324" in outcome.error
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["TS_preds.h5", "config.yaml"]
    # A wide dtype alone is no fault: other programs write classes so.
    assert run(list_centers, tmp_path, labels=two_classes().astype(np.int64)).status == "done"
    assert len(list(tmp_path.glob("TS_class*.star"))) == 2


@command
@pytest.mark.parametrize("shape", [(6, 7, 8), (1, 1, 1), (6, 7)])
def test_background_alone_is_a_result(
    tmp_path: Path, command: Callable[..., list[Outcome]], shape: tuple[int, ...]
) -> None:
    outcome = run(command, tmp_path, labels=np.zeros(shape, np.uint8))
    assert (outcome.status, outcome.shape) == ("done", shape)
    assert not written(tmp_path).any()
    for table in tmp_path.glob("*.csv"):
        assert len(pandas.read_csv(table)) == 0


@pytest.mark.parametrize("sizes", [[-1], [-1, 3], [-1, 7, 0], [-1, 8, 1], [-1, 8, 1, 5, 5], [-1, -1, 1, *[9] * 300]])
def test_sizes_for_fewer_or_more_classes_than_there_are(tmp_path: Path, sizes: list[int]) -> None:
    """Classes without a size are left alone; sizes without a class have nothing to remove."""
    labels = two_classes()
    outcome = run(postprocess, tmp_path, *sizes, labels=labels)
    expected = labels.copy()
    for label, size in zip((1, 2), sizes[1:], strict=False):
        parts, count = ndimage.label(labels == label, np.ones((3, 3, 3)))
        for part in range(1, count + 1):
            if size >= 0 and np.count_nonzero(parts == part) <= size:
                expected[parts == part] = 0
    np.testing.assert_array_equal(written(tmp_path), expected)
    assert outcome.status == "done" and outcome.voxels[:1] == (np.count_nonzero(expected == 0),)


@command
def test_a_tomogram_that_has_been_replaced_is_not_looked_at(
    tmp_path: Path, command: Callable[..., list[Outcome]]
) -> None:
    """What is written tells of the prediction, its shape and voxel size; only a run compares it with its tomogram."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "TS.mrc").write_bytes(b"a tomogram of another shape, or none")
    outcome = run(command, tmp_path, labels=two_classes())
    assert (outcome.status, outcome.shape) == ("done", SHAPE)
    for table in tmp_path.glob("TS_*.csv"):
        rows = pandas.read_csv(table).set_index("class")
        for label, row in rows.iterrows():
            inside = np.argwhere(two_classes() == label)
            assert row["voxels"] == len(inside) and row[["z", "y", "x"]].tolist() == inside.mean(axis=0).tolist()


def test_what_other_programs_leave_out_is_read_from_the_tomogram(tmp_path: Path) -> None:
    """Of CryoSiam's own predictions, which hold labels and nothing else, everywhere; and only if the shapes agree."""
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir(), data.mkdir()
    for stem, shape in (("TS", SHAPE), ("other", (3, 4, 5))):
        with mrcfile.new(data / f"{stem}.mrc") as mrc:
            mrc.set_data(np.random.default_rng(0).random(shape, np.float32))
            mrc.voxel_size, mrc.header.origin = 9.96, (50.0, 60.0, 70.0)
        with h5py.File(out / f"{stem}_preds.h5", "w") as file:
            file["labels"] = two_classes()
    configuration = configure(tmp_path, [-1, -1, -1]).model_copy(update={"prediction_folder": out})
    predictions = find_predictions(configuration)
    for command in (measure, list_centers, postprocess):
        ours, other = command(configuration, predictions, Silent())
        assert ours.status == other.status == "done"
        assert not re.search("voxel size|picture", " ".join(ours.warnings))
        assert ("voxel size is unknown" in " ".join(other.warnings)) == (command is not postprocess)
    measure(configuration, predictions, Silent())
    table = pandas.read_csv(out / "components.csv").set_index("tomogram")
    np.testing.assert_allclose(table.loc["TS", "x_angstrom"], table.loc["TS", "x"] * 9.96, rtol=1e-6)
    assert table.loc["other", "x_angstrom"].isna().all()
    list_centers(configuration, predictions, Silent())  # of the labels that were written again
    assert "TS" in (out / "class1_relion_import.star").read_text()
    assert [path.name for path in out.glob("*_preview.png")] == ["TS_preview.png"]
    export(configuration, predictions[:1], Silent(), formats=["mrc"])
    with mrcfile.open(out / "TS_labels.mrc") as mrc:
        assert mrc.voxel_size.x == pytest.approx(9.96) and mrc.header.origin.z == 70.0
    assert re.search(r"<td[^>]*>\s*9.96 \(0.996\)\s*<", write_report(configuration).read_text())
