"""Instances and tables: against scikit-image on whole arrays, and what is left when something is wrong."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pyarrow
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure

from cryosiam_dask.errors import LabelsError, OutputError
from cryosiam_dask.stages.components import find_components
from cryosiam_dask.stages.measurements import (
    collect_tables,
    component_files,
    component_table,
    remove_outdated,
    write_components,
)


def volume(shape: tuple[int, ...], classes: int, density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, classes + 1, shape) * (rng.random(shape) < density)).astype(np.uint8)


def expected(labels: np.ndarray, probabilities: np.ndarray | None) -> list[dict[str, Any]]:
    """Rows of the table by scikit-image on the whole volume, in the order of the first voxels."""
    rows = []
    for label in range(1, int(labels.max(initial=0)) + 1):
        own = None if probabilities is None else probabilities[label if len(probabilities) > 1 else 0]
        for region in measure.regionprops(measure.label(labels == label, connectivity=labels.ndim), own):
            lead = (0,) * (3 - labels.ndim)
            low = (*lead, *region.bbox[: labels.ndim])
            high = (*(1,) * (3 - labels.ndim), *region.bbox[labels.ndim :])
            ends = zip(region.bbox, region.bbox[labels.ndim :], labels.shape, strict=False)
            row = {
                "class": label,
                "voxels": int(region.area),
                "first": np.ravel_multi_index(region.coords[0], labels.shape),
                "touches_border": any(a == 0 or b == n for a, b, n in ends),
            }
            row |= dict(zip("zyx", (*lead, *region.centroid), strict=True))
            row |= {f"{axis}_min": a for axis, a in zip("zyx", low, strict=True)}
            row |= {f"{axis}_max": b for axis, b in zip("zyx", high, strict=True)}
            if own is not None:
                row |= {"mean_probability": region.intensity_mean, "max_probability": region.intensity_max}
            rows.append(row)
    return sorted(rows, key=lambda row: row["first"])


shapes = st.tuples(st.integers(1, 9), st.integers(2, 12), st.integers(2, 12)) | st.tuples(
    st.integers(2, 20), st.integers(2, 20)
)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.integers(0, 999), st.integers(1, 7),
       st.booleans())  # fmt: skip
def test_files_hold_what_scikit_image_measures(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...], classes: int, density: float, seed: int, chunk: int, with_probabilities: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("components")
    labels = volume(shape, classes, density, seed)
    probabilities = None
    if with_probabilities:
        probabilities = np.random.default_rng(seed).random((1 if classes == 1 else classes + 1, *shape), np.float32)
    stored = zarr.create_array(folder / "labels.zarr", data=labels, chunks=tuple(min(chunk, n) for n in shape))
    components = write_components(
        folder, "TS_1.5", stored, work=zarr.create_group(folder / "work.zarr"), probabilities=probabilities,
        attributes={"voxel_size_angstrom": (2.0, 3.0, 4.0)[-len(shape) :], "fingerprint": "f"},
    )  # fmt: skip
    hdf5, csv, parquet = component_files(folder, "TS_1.5")
    table = pandas.read_parquet(parquet)
    pandas.testing.assert_frame_equal(pandas.read_csv(csv), table, check_dtype=bool(len(table)))
    rows = expected(labels, probabilities)
    assert len(table) == len(rows) == len(components)
    for column in rows[0] if rows else ():
        if column != "first":
            np.testing.assert_allclose(table[column], [row[column] for row in rows], rtol=1e-6, err_msg=column)
    np.testing.assert_array_equal(table["label"], np.arange(1, len(rows) + 1))
    assert set(table["tomogram"]) <= {"TS_1.5"}
    np.testing.assert_allclose(table["x_angstrom"], table["x"] * 4)
    if len(shape) == 3:
        np.testing.assert_allclose(table["z_angstrom"], table["z"] * 2)
        np.testing.assert_allclose(table["volume_nm3"], table["voxels"] * 24 / 1000)
    else:
        assert table["volume_nm3"].isna().all() and table["z_angstrom"].isna().all()
    if not with_probabilities:
        assert table["mean_probability"].isna().all() and table["max_probability"].isna().all()
    with h5py.File(hdf5) as file:
        instances = file["instances"][:]
        assert file["instances"].dtype == np.min_scalar_type(len(rows)) and file["instances"].compression == "gzip"
        assert file.attrs["connectivity"] == 26 and file["instances"].attrs["fingerprint"] == "f"
    np.testing.assert_array_equal(instances > 0, labels > 0)
    for number, row in enumerate(rows, 1):
        assert (instances == number).sum() == row["voxels"] and instances.flat[row["first"]] == number


@pytest.mark.parametrize(("count", "dtype"), [(255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4")])
def test_smallest_dtype_that_holds_the_count(tmp_path: Path, count: int, dtype: str) -> None:
    labels = np.zeros((2, 512, 1025), np.uint8)
    isolated = np.zeros((256, 513), np.uint8)
    isolated.flat[:count] = 1
    labels[0, ::2, ::2] = isolated
    write_components(tmp_path, "TS", labels, work=zarr.create_group(tmp_path / "w.zarr"), attributes={})
    with h5py.File(tmp_path / "TS_components.h5") as file:
        assert file["instances"].dtype == dtype
        assert file["instances"].chunks == ((2, 128, 128) if dtype == "u1" else (2, 64, 64))
        np.testing.assert_array_equal(file["instances"][:][labels > 0], np.arange(1, count + 1))
        assert "voxel_size_angstrom" not in file.attrs
    table = pandas.read_csv(tmp_path / "TS_components.csv")
    assert table["x_angstrom"].isna().all() and table["volume_nm3"].isna().all() and len(table) == count


def write(folder: Path, stem: str, labels: np.ndarray, fingerprint: str | None = None, **options: Any) -> None:
    work = zarr.create_group(folder / f"{stem}.work.zarr")
    write_components(folder, stem, labels, work=work, attributes={"fingerprint": fingerprint}, **options)


def test_the_collection_holds_all_tables_of_the_folder(tmp_path: Path) -> None:
    for stem, density in (("TS_2", 0.2), ("001", 0.3), ("NA", 0.2), ("empty", 0.0)):
        write(tmp_path, stem, volume((5, 6, 7), 2, density, 0))
    collect_tables(tmp_path)
    table = pandas.read_parquet(tmp_path / "components.parquet")
    assert set(table["tomogram"]) == {"TS_2", "001", "NA"}
    parts = [pandas.read_parquet(tmp_path / f"{s}_components.parquet") for s in ("001", "NA", "TS_2")]
    pandas.testing.assert_frame_equal(table, pandas.concat(parts, ignore_index=True))
    text = pandas.read_csv(tmp_path / "components.csv", dtype={"tomogram": "str"}, keep_default_na=False)
    assert text["tomogram"].tolist() == table["tomogram"].tolist()
    before = (tmp_path / "components.csv").read_bytes()
    collect_tables(tmp_path)
    assert (tmp_path / "components.csv").read_bytes() == before
    for stem in ("TS_2", "001", "NA", "empty"):
        assert remove_outdated(tmp_path, stem, "other") and not remove_outdated(tmp_path, stem, "other")
    collect_tables(tmp_path)
    assert not list(tmp_path.glob("*components.*"))


def test_tables_are_collected_one_after_the_other(tmp_path: Path) -> None:
    """The memory that it takes is that of a table, and not of the collection."""

    def peak(count: int) -> int:
        for i in range(count):
            table.to_parquet(tmp_path / f"TS_{i}_components.parquet", index=False)
        tracemalloc.start()
        before = pyarrow.total_allocated_bytes()
        collect_tables(tmp_path)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest + pyarrow.total_allocated_bytes() - before

    table = pandas.DataFrame(
        {name: np.random.default_rng(i).random(3000) for i, name in enumerate(("tomogram", "class", "voxels"))}
    )
    peak(1)  # imports
    few = peak(2)
    assert peak(24) < 1.5 * few
    pandas.testing.assert_frame_equal(
        pandas.read_csv(tmp_path / "components.csv"), pandas.concat([table] * 24, ignore_index=True)
    )


def test_a_table_of_another_version_is_collected_with_the_others(tmp_path: Path) -> None:
    write(tmp_path, "a", volume((5, 6, 7), 2, 0.2, 0))
    write(tmp_path, "b", volume((5, 6, 7), 2, 0.2, 0))
    old = pandas.read_parquet(tmp_path / "a_components.parquet").drop(columns="class_name")
    old.to_parquet(tmp_path / "a_components.parquet", index=False)
    collect_tables(tmp_path)
    for table in (pandas.read_parquet(tmp_path / "components.parquet"), pandas.read_csv(tmp_path / "components.csv")):
        assert table.groupby("tomogram")["class_name"].count().tolist() == [0, len(old)]
        assert table["voxels"].tolist() == old["voxels"].tolist() * 2


def test_components_of_the_same_labels_stay(tmp_path: Path) -> None:
    write(tmp_path, "TS", volume((5, 6, 7), 2, 0.2, 0), fingerprint="same")
    assert not remove_outdated(tmp_path, "TS", "same") and component_files(tmp_path, "TS")[0].exists()
    assert remove_outdated(tmp_path, "TS", None)


def test_tables_of_deleted_predictions_are_not_collected_and_files_of_others_stay(tmp_path: Path) -> None:
    for stem in ("here", "deleted"):
        write(tmp_path, stem, volume((5, 6, 7), 2, 0.2, 0))
    (tmp_path / "._here_components.parquet").write_bytes(b"\0\5\x16\7")
    collect_tables(tmp_path, {"here"}.__contains__)
    assert set(pandas.read_csv(tmp_path / "components.csv")["tomogram"]) == {"here"}
    collect_tables(tmp_path, set[str]().__contains__)
    assert not list(tmp_path.glob("components.*")) and component_files(tmp_path, "deleted")[0].exists()
    for name in ("components.csv", "TS_components.csv"):
        (tmp_path / name).write_text("mine\n")
    collect_tables(tmp_path, set[str]().__contains__)
    assert not remove_outdated(tmp_path, "TS", None) and (tmp_path / "TS_components.csv").exists()
    for work in (lambda: collect_tables(tmp_path), lambda: write(tmp_path, "TS", volume((5, 6, 7), 2, 0.2, 0))):
        with pytest.raises(OutputError, match=r"components.csv: an output must not replace a file that this program"):
            work()
    assert (tmp_path / "components.csv").read_text() == "mine\n"


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    write(tmp_path, "TS", volume((5, 6, 7), 2, 0.2, 0))
    (tmp_path / "TS_components.parquet").write_bytes(b"nothing")
    with pytest.raises(OutputError, match=r"TS_components.parquet: the table of components must be.*components' again"):
        collect_tables(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    labels = volume((4, 5, 6), 2, 0.5, 0)
    with pytest.raises(LabelsError, match="the shape of the labels"):
        write(tmp_path, "a", labels, probabilities=np.zeros((3, 4, 5, 7), np.float32))
    with pytest.raises(LabelsError, match="its own channel of probabilities"):
        write(tmp_path, "b", labels, probabilities=np.zeros((2, 4, 5, 6), np.float32))
    with pytest.raises(LabelsError, match="integers"):
        write(tmp_path, "c", labels.astype(np.float32))
    with pytest.raises(LabelsError, match="negative"):
        write(tmp_path, "d", -labels.astype(np.int8))
    with pytest.raises(OutputError, match=r"f_components.h5: a file must hold voxels; found shape \(0, 4, 4\)"):
        write(tmp_path, "f", np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(LabelsError, match="measure=True"):
        component_table(find_components(labels), "TS")
    assert not list(tmp_path.glob("*_components.*"))
    (tmp_path / "e_components.csv").mkdir()
    with pytest.raises(OutputError, match="e_components"):
        write(tmp_path, "e", labels)
