"""Particle lists: read back and compared with SciPy and scikit-image on whole arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import starfile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import measure

from cryosiam_dask.errors import LabelsError, OutputError
from cryosiam_dask.stages.centers import Eroded, center_table, collect_centers, remove_outdated_centers, write_centers
from cryosiam_dask.stages.components import find_components

SIZE = (8.0, 9.0, 10.0)  # Å along z, y, x


def smooth_volume(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blobs of classes 1 and 2 that touch each other, the border and the cuts."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    return np.digitize(noise, [0.05, 0.18]).astype(np.uint8)


def expected(labels: np.ndarray, label: int, erode: bool, min_voxels: int) -> list[tuple[float, ...]]:
    """What the reference does with the whole array: erode, label, keep what has more voxels."""
    mask = labels == label
    if erode:
        mask = ndimage.binary_erosion(mask)
    regions = measure.regionprops(measure.label(mask))
    return sorted((*region.centroid, region.area) for region in regions if region.area > min_voxels)


def star_of(path: Path) -> pandas.DataFrame:
    return starfile.read(path)


shapes = st.tuples(*[st.integers(1, 16)] * 3) | st.tuples(st.integers(2, 30), st.integers(2, 30))


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 999), st.integers(1, 9), st.booleans(), st.sampled_from([0, 1, 2, 5, 20]))
def test_lists_hold_what_the_reference_finds_in_the_whole_array(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...], seed: int, chunk: int, erode: bool, min_voxels: int,
) -> None:  # fmt: skip
    folder, stem, axes = tmp_path_factory.mktemp("centers"), "TS_018_9.96Apx", "zyx"[-len(shape) :]
    labels = smooth_volume(shape, seed)
    chunk = max(chunk, -(-max(shape) // 8))  # at most 8 along an axis: thousands take a minute and show nothing else
    stored = zarr.create_array(folder / "labels.zarr", data=labels, chunks=tuple(min(chunk, n) for n in shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryosiam_dask.core.blocks.BLOCK_VOXELS", 1)  # one block for each chunk
        counts = write_centers(folder, stem, stored, min_voxels=min_voxels, erode=erode, classes=(1, 2),
                               voxel_size_angstrom=SIZE[-len(shape) :])  # fmt: skip
    collect_centers(folder)
    for label in (1, 2):
        rows = expected(labels, label, erode, min_voxels)
        assert counts[label] == len(rows)
        for name in (f"{stem}_class{label}_centers", f"class{label}_centers"):
            table, star = pandas.read_csv(folder / f"{name}.csv"), star_of(folder / f"{name}.star")
            assert len(table) == len(star) == len(rows)
            if not rows:
                continue
            found = sorted(zip(*(table[axis] for axis in axes), table["voxels"], strict=True))
            np.testing.assert_allclose(found, rows, rtol=1e-9)
            np.testing.assert_allclose(star["rlnPixelSize"], 10)
            assert set(star["rlnTomoName"]) == {stem} and set(star["rlnMicrographName"]) == {"TS_018.tomostar"}
            for axis, n, size in zip(axes, shape, SIZE[-len(shape) :], strict=True):
                np.testing.assert_allclose(star[f"rlnCoordinate{axis.upper()}"], table[axis], atol=1e-6)
                np.testing.assert_allclose(table[f"{axis}_angstrom"], table[axis] * size)
                centered = (table[axis] - n / 2) * size
                np.testing.assert_allclose(star[f"rlnCenteredCoordinate{axis.upper()}Angst"], centered, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 999), st.data())
def test_erosion_is_that_of_the_whole_array_in_every_region(
    shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    labels = smooth_volume(shape, seed)
    whole = sum(ndimage.binary_erosion(labels == label) * np.uint8(label) for label in (1, 2))
    region = []
    for n in shape:
        start = data.draw(st.integers(0, n - 1))
        region.append(slice(start, data.draw(st.integers(start + 1, n))))
    part = Eroded(labels)[tuple(region)]
    assert part.dtype == labels.dtype
    np.testing.assert_array_equal(part, whole[tuple(region)])


def test_a_single_voxel_stands_at_its_index(tmp_path: Path) -> None:
    """Index 0 is the centre of the first voxel, and index n / 2 the centre of RELION's tomogram."""
    labels = np.zeros((6, 8, 10), np.uint8)
    labels[3, 4, 5] = labels[0, 0, 0] = 1
    write_centers(tmp_path, "TS", labels, voxel_size_angstrom=SIZE)
    star = star_of(tmp_path / "TS_class1_centers.star")
    assert star[[f"rlnCoordinate{axis}" for axis in "XYZ"]].to_numpy().tolist() == [[0, 0, 0], [5, 4, 3]]
    centered = star[[f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]].to_numpy().tolist()
    assert centered == [[-50, -36, -24], [0, 0, 0]]


def write(folder: Path, stem: str, labels: np.ndarray, **options: Any) -> dict[int, int]:
    return write_centers(folder, stem, labels, voxel_size_angstrom=options.pop("size", SIZE), **options)


def dots(*classes: int) -> np.ndarray:
    """One voxel of each class."""
    labels = np.zeros((5, 6, 2 * len(classes) + 1), np.uint16)
    labels[2, 3, 1::2] = classes
    return labels


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ledger")


def both(*stems: str) -> list[str]:
    """Files of these lists; of a class of all tomograms, also what RELION imports."""
    lists = [f"{stem}_centers.{ending}" for stem in stems for ending in ("csv", "star")]
    return sorted(lists + [f"{stem}_relion_import.star" for stem in stems if stem.startswith("class")])


def test_lists_of_before_are_replaced_and_those_of_others_stay(tmp_path: Path) -> None:
    assert write(tmp_path, "TS_1", dots(1, 3)) == {1: 1, 3: 1}
    assert write(tmp_path, "TS_1_b", dots(3)) == {3: 1}
    assert write(tmp_path, "001", dots(1, 1)) == {1: 2}
    collect_centers(tmp_path)
    assert names(tmp_path) == both("TS_1_class1", "TS_1_class3", "TS_1_b_class3", "001_class1", "class1", "class3")
    assert star_of(tmp_path / "class1_centers.star")["rlnTomoName"].astype(str).tolist() == ["001", "001", "TS_1"]
    assert (tmp_path / "class1_centers.csv").read_text().count("\n001,1,1,2.0,3.0,") == 2
    write(tmp_path, "TS_1", dots(2))
    write(tmp_path, "TS_1_b", dots(), classes=(1,))
    collect_centers(tmp_path)
    assert names(tmp_path) == both("TS_1_class2", "TS_1_b_class1", "001_class1", "class1", "class2")
    assert len(star_of(tmp_path / "TS_1_b_class1_centers.star")) == 0
    assert len(star_of(tmp_path / "class1_centers.star")) == 2
    write(tmp_path, "001", dots(2), classes=(1,))
    collect_centers(tmp_path)
    assert names(tmp_path) == sorted(
        {*both("TS_1_class2", "TS_1_b_class1", "001_class1", "001_class2", "class1", "class2")}
        - {"class1_relion_import.star"}  # no particles, nothing to import
    )


def test_relion_finds_each_tomograms_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What RELION 5 reads of the index: a list of the columns of the others, of the tomogram that the index names."""
    folder = tmp_path / "lists"
    folder.mkdir()
    write(folder, "001", dots(1, 1))
    write(folder, "TS_2_9.96Apx", dots(1, 2))
    write(folder, "no_particles", dots(), classes=(1, 2))
    write(folder, "no_voxel_size", dots(1), size=None)
    write(folder, "image", dots(1)[2], size=SIZE[1:])
    monkeypatch.chdir(tmp_path)  # the folder may be given relative to anything; RELION runs somewhere else
    collect_centers(Path("lists"))
    monkeypatch.chdir(folder.parent.parent)
    for label, stems in ((1, ["001", "TS_2_9.96Apx"]), (2, ["TS_2_9.96Apx"])):
        index = star_of(folder / f"class{label}_relion_import.star")
        assert list(index) == ["rlnTomoImportParticleFile", "rlnTomoName"]
        assert index["rlnTomoName"].astype(str).str.zfill(3).tolist() == stems
        columns = set()
        for stem, path in zip(stems, index["rlnTomoImportParticleFile"], strict=True):
            assert Path(path) == folder.resolve() / f"{stem}_class{label}_centers.star"
            particles = star_of(Path(path))
            assert set(particles["rlnTomoName"].astype(str).str.zfill(3)) == {stem}
            columns.add(tuple(particles))
        assert len(columns) == 1 and "rlnCenteredCoordinateZAngst" in columns.pop()


def test_relion_finds_lists_below_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 1")
    folder.mkdir()
    write(folder, "a", dots(1, 1))
    collect_centers(folder)
    path = os.fsencode(folder.resolve() / "a_class1_centers.star")
    assert b'"%s"\ta\n' % path in (folder / "class1_relion_import.star").read_bytes()


def test_without_voxel_size_there_are_voxels_only(tmp_path: Path) -> None:
    write(tmp_path, "TS_1", dots(1), size=None)
    write(tmp_path, "TS_2", dots(1), size=(10.0, None, 10.0))
    write(tmp_path, "TS_3", dots(1))
    collect_centers(tmp_path)
    voxels = ["rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnTomoName", "rlnMicrographName"]
    for name in ("TS_1_class1", "TS_2_class1", "class1"):
        assert list(star_of(tmp_path / f"{name}_centers.star")) == voxels
    assert len(list(star_of(tmp_path / "TS_3_class1_centers.star"))) == 9
    table = pandas.read_csv(tmp_path / "class1_centers.csv")
    assert table["y_angstrom"].isna().tolist() == [True, True, False]
    assert table["x"].tolist() == [1, 1, 1]


def test_lists_of_other_labels_and_of_deleted_predictions_are_not_collected(tmp_path: Path) -> None:
    for name in ("same", "other", "deleted", "unknown"):
        write(tmp_path, name, dots(1, 2), made_from="" if name == "unknown" else "old")
    now = {"same": "old", "other": "new", "unknown": "new"}.get
    assert collect_centers(tmp_path, now) == ["other", "unknown"]
    for label in (1, 2):
        assert set(pandas.read_csv(tmp_path / f"class{label}_centers.csv")["tomogram"]) == {"same"}
        assert star_of(tmp_path / f"class{label}_relion_import.star")["rlnTomoName"].tolist() == ["same"]
    left = both(*(f"{name}_class{label}" for name in ("same", "deleted", "unknown") for label in (1, 2)))
    assert names(tmp_path) == sorted(left + both("class1", "class2"))
    assert not remove_outdated_centers(tmp_path, "same", "old") and not remove_outdated_centers(tmp_path, "none", "old")
    assert remove_outdated_centers(tmp_path, "same", "new") and collect_centers(tmp_path, now) == ["unknown"]
    assert names(tmp_path) == [name for name in left if not name.startswith("same")]  # and none of all of them


def test_files_of_others_stay(tmp_path: Path) -> None:
    """A user's own lists, whatever they are called, and what macOS puts beside ours."""
    write(tmp_path, "TS_1", dots(1))
    own = ("TS_1_class2_centers.csv", "TS_1_class9_centers.star", "class7_centers.csv", "class1_relion_import.star")
    for name in own:
        (tmp_path / name).write_text("label,tomo\n1,mine\n")
    hidden = tmp_path / "._TS_1_class1_centers.csv"
    hidden.write_bytes(b"\0\5\x16\7")
    with pytest.raises(OutputError, match=r"class1_relion_import.star: an output must not replace .* Move it away"):
        collect_centers(tmp_path)
    (tmp_path / own[-1]).unlink()
    collect_centers(tmp_path)
    assert len(pandas.read_csv(tmp_path / "class1_centers.csv")) == 1
    write(tmp_path, "TS_1", dots(1, 3))
    with pytest.raises(OutputError, match=r"TS_1_class2_centers.csv: an output must not replace"):
        write(tmp_path, "TS_1", dots(1, 2))
    assert remove_outdated_centers(tmp_path, "TS_1", "other")
    collect_centers(tmp_path)
    assert names(tmp_path) == sorted([*own[:-1], hidden.name])


ODD_NAMES = (
    "_TS", "data_1", "DATA_1", "#3", "TS#3", "loop_", "save_a", ";x", "$y", "[a]", "a b", " a", "a ", "a  b", "#a b",
    "_a b", "data_ x", "?", "-x", "a,b", "ü",
)  # fmt: skip


def test_names_that_mean_something_in_a_star_file_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "data_ #1").mkdir()
    folder = tmp_path / "data_ #1"
    for name in ODD_NAMES:
        write(folder, name, dots(1, 1))
    collect_centers(folder)
    for name in ODD_NAMES:
        star = star_of(folder / f"{name}_class1_centers.star")
        assert star["rlnTomoName"].tolist() == [name] * 2 and star["rlnCoordinateX"].tolist() == [1, 3]
        assert star["rlnMicrographName"].tolist() == [f"{name}.tomostar"] * 2
    assert sorted(star_of(folder / "class1_centers.star")["rlnTomoName"]) == sorted(ODD_NAMES * 2)
    index = star_of(folder / "class1_relion_import.star")
    found = dict(zip(index["rlnTomoName"], index["rlnTomoImportParticleFile"], strict=True))
    assert found == {name: str(folder / f"{name}_class1_centers.star") for name in ODD_NAMES}


@pytest.mark.parametrize("name", ["it's", '"TS"', "a\nb", "a\tb", "b\udcff"])
def test_names_that_no_star_file_holds_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="must have printable letters and no quotation marks"):
        write(tmp_path, name, dots(1))
    assert not names(tmp_path)


@pytest.mark.parametrize("pattern", [r"^TS_\d+", r"^(.+?)_9", r"(TS_\d+)(?:_9)"])
def test_a_pattern_names_the_tilt_series(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "TS_18_9.96Apx_denoised", dots(1, 1), tilt_series_pattern=pattern)
    collect_centers(tmp_path, tilt_series_pattern=pattern)
    for name in ("TS_18_9.96Apx_denoised_class1", "class1"):
        star = star_of(tmp_path / f"{name}_centers.star")
        assert star["rlnMicrographName"].tolist() == ["TS_18.tomostar"] * 2
        assert set(star["rlnTomoName"]) == {"TS_18_9.96Apx_denoised"}
    with pytest.raises(OutputError, match="tilt_series_pattern must match the name of every tomogram"):
        write(tmp_path, "other", dots(1), tilt_series_pattern=pattern)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match="integers"):
        write(tmp_path, "TS", dots(1).astype(np.float32), erode=True)
    with pytest.raises(LabelsError, match="negative"):
        write(tmp_path, "TS", -dots(1).astype(np.int8))
    with pytest.raises(LabelsError, match="measure=True"):
        center_table(find_components(dots(1)), "TS")
    assert not names(tmp_path)
    write(tmp_path, "TS", dots(1))
    (tmp_path / "TS_class1_centers.csv").write_text("tomogram,class,voxels,z,y,x\nTS,1,1,one,2,3\n")
    with pytest.raises(OutputError, match=r"TS_class1_centers.csv: the particle list must be readable"):
        collect_centers(tmp_path)
    (tmp_path / "TS_class1_centers.csv").write_text("")
    with pytest.raises(OutputError, match="semantic-to-centers' again"):
        collect_centers(tmp_path)


# ----------------------------------------------------------------------------------------------------- names of classes


def test_lists_have_the_names_of_their_classes(tmp_path: Path) -> None:
    labels = np.zeros((8, 9, 9), np.uint8)
    labels[1:3, 1:3, 1:3], labels[5:7, 5:7, 5:7], labels[5:7, 1, 1] = 1, 2, 3
    given = ["membrane", "ER / class3 µ"]
    for stem in ("TS", "TS_1", "TS_class1_x"):
        write_centers(tmp_path, stem, labels, class_names=given, voxel_size_angstrom=(10.0,) * 3)
    collect_centers(tmp_path)
    of_classes = ("class1_membrane", "class2_ER_class-3_µ", "class3")
    stems = ("TS", "TS_1", "TS_class1_x")
    assert names(tmp_path) == both(*(f"{stem}_{name}" for stem in stems for name in of_classes), *of_classes)
    table = pandas.read_csv(tmp_path / "class2_ER_class-3_µ_centers.csv")
    assert set(table["class_name"]) == {"ER / class3 µ"} and set(table["tomogram"]) == set(stems)
    assert set(table["class"]) == {2}
    # The same lists under other names replace them.
    for stem in stems:
        write_centers(tmp_path, stem, labels, class_names=["a"], voxel_size_angstrom=(10.0,) * 3)
    collect_centers(tmp_path)
    of_classes = ("class1_a", "class2", "class3")
    assert names(tmp_path) == both(*(f"{stem}_{name}" for stem in stems for name in of_classes), *of_classes)
    assert remove_outdated_centers(tmp_path, "TS", "other") and not list(tmp_path.glob("TS_class1_a*"))
    assert (tmp_path / "TS_class1_x_class2_centers.csv").exists()
