"""Particle lists in CryoSiam's own form are, row by row, those that CryoSiam wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import pandas
import pytest
import starfile
import yaml
import zarr

from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.runs.find import find_predictions
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.runs.written import list_centers
from cryosiam_dask.stages.centers import cryosiam_centers
from support.command import invoke

GOLDEN = Path(__file__).parent / "data" / "centers"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


class Reporter:
    """Takes what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def inform(self, message: str) -> None:
        self.said.append(message)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def prepare(folder: Path, case: str, **network: Any) -> Configuration:
    """A case's files as CryoSiam has them, and what its YAML file says."""
    shutil.copytree(GOLDEN / case / "preds", folder / "preds")
    (folder / "data").mkdir()
    for path in (folder / "preds").glob("*_preds.h5"):
        (folder / "data" / f"{path.name.removesuffix('_preds.h5')}.mrc").touch()
    (folder / "model.ckpt").touch()
    values = yaml.safe_load((GOLDEN / case / "config.yaml").read_text())
    values["parameters"]["network"] |= network
    values |= {
        "data_folder": str(folder / "data"), "prediction_folder": str(folder / "preds"), "mask_folder": None,
        "trained_model": str(folder / "model.ckpt"),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def listed(configuration: Configuration, filename: str | None = None) -> list[Outcome]:
    return list_centers(configuration, find_predictions(configuration, filename), Reporter(), form="cryosiam")  # type: ignore[arg-type]


def same(found: pandas.DataFrame, expected: pandas.DataFrame) -> None:
    """The same rows, in whatever order of the tomograms."""
    assert list(found) == list(expected)
    if not len(expected):
        assert not len(found)
        return
    name = list(expected)[-1]
    first = next(iter(expected))
    found, expected = (table.sort_values([name, first], ignore_index=True) for table in (found, expected))
    pandas.testing.assert_frame_equal(found, expected, check_exact=False, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_cryosiam(tmp_path: Path, case: str) -> None:
    configuration = prepare(tmp_path, case)
    assert {outcome.status for outcome in listed(configuration)} == {"done"}
    expected = sorted((GOLDEN / case / "expected").iterdir())
    assert expected
    for path in expected:
        found = tmp_path / "preds" / path.name
        if path.suffix == ".csv":
            same(pandas.read_csv(found), pandas.read_csv(path))
        else:
            stars = [starfile.read(each, parse_as_string=["rlnMicrographName"]) for each in (found, path)]
            if len(stars[1]):
                same(*(pandas.DataFrame(star) for star in stars))
            else:
                assert not len(stars[0])
    assert {path.name for path in (tmp_path / "preds").glob("labels_*")} == {path.name for path in expected}


def test_labels_in_chunks_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(GOLDEN / "scalar_minimum" / "preds" / "TS_1_6.80Apx_preds.h5") as file:
        labels = file["labels"][()]
    whole = cryosiam_centers("TS", labels, min_voxels=3)
    monkeypatch.setattr("cryosiam_dask.core.blocks.BLOCK_VOXELS", 1)
    stored = zarr.create_array(tmp_path / "labels.zarr", data=labels, chunks=(5, 7, 6))
    pandas.testing.assert_frame_equal(
        cryosiam_centers("TS", stored, min_voxels=3), whole, check_exact=False, rtol=1e-12
    )
    assert len(whole) > 10


def test_one_tomogram_is_listed_beside_the_others_and_one_that_is_gone_no_more(tmp_path: Path) -> None:
    configuration = prepare(tmp_path, "scalar_minimum")
    listed(configuration)
    before = pandas.read_csv(tmp_path / "preds" / "labels_1.csv")
    listed(configuration, "TS_2_6.80Apx.mrc")
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "preds" / "labels_1.csv"), before)
    (tmp_path / "preds" / "TS_1_6.80Apx_preds.h5").unlink()
    (tmp_path / "data" / "TS_1_6.80Apx.mrc").unlink()
    listed(configuration)
    assert set(pandas.read_csv(tmp_path / "preds" / "labels_1.csv")["tomo"]) == {"TS_2_6.80Apx"}


def test_what_is_no_such_list_is_not_replaced(tmp_path: Path) -> None:
    configuration = prepare(tmp_path, "scalar_minimum")
    (tmp_path / "preds" / "labels_2.csv").write_text("mine,yours\n1,2\n")
    *_, last = listed(configuration)
    assert last.status == "failed" and "must be a particle list in CryoSiam's format" in last.error
    assert (tmp_path / "preds" / "labels_2.csv").read_text() == "mine,yours\n1,2\n"
    assert not (tmp_path / "preds" / "labels_1.csv").exists()


def test_a_class_without_a_number(tmp_path: Path) -> None:
    outcomes = listed(prepare(tmp_path, "scalar_minimum", min_voxels=[10]))
    assert all("one number for each class" in outcome.error for outcome in outcomes if outcome.stem.startswith("TS"))


def test_the_command_takes_cryosiams_file(tmp_path: Path) -> None:
    prepare(tmp_path, "minimum_per_class")
    said = invoke(
        "semantic_to_centers", "--config_file=config.yaml", "--format=cryosiam", "--workers=1", folder=tmp_path
    )
    path = GOLDEN / "minimum_per_class" / "expected" / "labels_1.csv"
    same(pandas.read_csv(tmp_path / "preds" / path.name), pandas.read_csv(path))
    assert "particles: class 1: " in said
