"""Prepared tomograms are CryoSiam's where it is right, and what a formula says on the whole array elsewhere."""

from __future__ import annotations

import gzip
import shutil
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cryosiam_dask.cli import app
from cryosiam_dask.commands import processing
from cryosiam_dask.commands.processing import invert_scale, match_pixel_size, plan_resampling
from cryosiam_dask.errors import OutputError, TomogramError

GOLDEN = Path(__file__).parent / "data" / "processing"


def write(path: Path, volume: np.ndarray, voxel_size: float = 7.0) -> Path:
    with mrcfile.new(path, overwrite=True) as mrc:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NaN
            mrc.set_data(volume)
        mrc.voxel_size = voxel_size
        mrc.header.origin.x, mrc.header.nxstart = 12.5, 3
    return path


def expected(case: str) -> np.ndarray:
    with np.load(GOLDEN / case / "expected.npz") as archive:
        return np.asarray(archive["data"])


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("invert_int16", {"invert": True}),
        ("invert_scale_percentiles", {"invert": True, "lower": 0.1, "upper": 99.9}),
        ("scale_lower_only", {"lower": 2.5}),
    ],
)
@pytest.mark.parametrize("piece", [7, 256])
def test_inverted_and_scaled_as_by_cryosiam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, options: dict[str, float], piece: int
) -> None:
    monkeypatch.setattr(processing, "_PART", piece)
    source = GOLDEN / case / "data" / "tomo.mrc"
    invert_scale(source, tmp_path / "out.mrc", **options)  # type: ignore[arg-type]
    with mrcfile.open(source) as before, mrcfile.open(tmp_path / "out.mrc") as after:
        np.testing.assert_allclose(after.data, expected(case), rtol=0, atol=2e-7)
        assert after.data.dtype == np.float32
        for field in ("cella", "origin", "nxstart", "nystart", "nzstart"):  # which CryoSiam loses but for the first
            assert after.header[field] == before.header[field]
        assert after.header.dmax == after.data.max() and after.header.rms == pytest.approx(after.data.std(), rel=1e-4)
    assert mrcfile.validate(tmp_path / "out.mrc")
    assert [path.name for path in tmp_path.iterdir()] == ["out.mrc"]


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        ("match_pixel_size_coarser", 6.8, 10),
        ("match_pixel_size_coarser_int16", 5.0, 11.3),
        ("match_pixel_size_finer", 13.48, 10),
    ],
)
@pytest.mark.parametrize("lines", [3, 1 << 18])
def test_resampled_as_by_cryosiam_but_for_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, before: float, after: float, lines: int
) -> None:
    monkeypatch.setattr(processing, "_tile", lambda _: lines)
    found = plan_resampling(GOLDEN / case / "data" / "tomo.mrc", after, before)
    match_pixel_size(found, tmp_path / "out.mrc")
    wanted = expected(case) * (np.prod(found.shape) / np.prod(found.header.shape))
    with mrcfile.open(tmp_path / "out.mrc") as mrc:
        np.testing.assert_allclose(mrc.data, wanted, rtol=0, atol=2e-7 * np.abs(wanted).max())
        lengths = np.array(found.header.shape) * before  # of the box, which stays the same
        np.testing.assert_allclose([mrc.header.cella[axis] for axis in "zyx"], lengths, rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mrc"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.integers(2, 24), min_size=2, max_size=3), st.floats(0.35, 2.8), st.integers(0, 1000))
def test_what_both_grids_can_show_is_kept(tmp_path: Path, shape: list[int], ratio: float, seed: int) -> None:
    """A wave of a few periods in the box is the same wave on the new grid, with its mean; odd axes and images too."""
    rng = np.random.default_rng(seed)
    source = tmp_path / "in.mrc"
    write(source, np.ones(shape, np.float32))
    found = plan_resampling(source, 7 / ratio)
    waves = [int(rng.integers(0, max(1, (min(n, m) - 1) // 2) + 1)) if min(n, m) > 2 else 0
             for n, m in zip(shape, found.shape, strict=True)]  # fmt: skip

    def wave(sizes: tuple[int, ...]) -> np.ndarray:
        phase = sum(w * np.arange(n).reshape([-1 if i == axis else 1 for i in range(len(sizes))]) / n
                    for axis, (w, n) in enumerate(zip(waves, sizes, strict=True)))  # fmt: skip
        return np.broadcast_to(5 + np.cos(2 * np.pi * phase), sizes).astype(np.float32)

    write(source, wave(tuple(shape)))
    match_pixel_size(found, tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as mrc:
        np.testing.assert_allclose(mrc.data, wave(found.shape), atol=2e-5)
    for size, new in zip(shape, found.shape, strict=True):
        assert abs(new - size * ratio) <= 2 and (new <= size if ratio < 1 else new >= size)


def test_an_axis_that_would_round_beyond_its_length_stays(tmp_path: Path) -> None:
    """Where CryoSiam writes a single voxel: 33 voxels of 9.9 Å, brought to 10 Å."""
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(33, 34, 5)).astype(np.float32)
    found = plan_resampling(write(tmp_path / "in.mrc", volume, 9.9), 10)
    assert found.shape == (33, 34, 5)
    match_pixel_size(found, tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as mrc:
        np.testing.assert_allclose(mrc.data, volume, atol=1e-5)


@pytest.mark.parametrize("kind", ["gz", "zarr"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    volume = np.random.default_rng(1).normal(size=(9, 10, 11)).astype(np.float32)
    if kind == "gz":
        write(tmp_path / "plain.mrc", volume)
        source = tmp_path / "in.mrc.gz"
        source.write_bytes(gzip.compress((tmp_path / "plain.mrc").read_bytes()))
    else:
        source = tmp_path / "in.zarr"
        zarr.create_array(source, data=volume)
    (tmp_path / "out").mkdir()
    invert_scale(source, tmp_path / "out" / "a.mrc", invert=True, lower=0, upper=100)
    match_pixel_size(plan_resampling(source, 14, 7), tmp_path / "out" / "b.mrc")
    with mrcfile.open(tmp_path / "out" / "a.mrc") as mrc:
        wanted = (volume.max() - volume.astype(np.float64)) / (volume.max() - volume.min())
        np.testing.assert_allclose(mrc.data, wanted, atol=1e-6)
    with mrcfile.open(tmp_path / "out" / "b.mrc") as mrc:
        assert mrc.data.mean() == pytest.approx(volume.mean(), abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mrc", "b.mrc"]


def test_nan_is_the_lowest_intensity_and_infinity_the_highest(tmp_path: Path) -> None:
    volume = np.linspace(1, 2, 1000, dtype=np.float32).reshape(10, 10, 10)
    volume[0, 0, 0], volume[9, 9, 9] = np.nan, np.inf
    assert invert_scale(write(tmp_path / "in.mrc", volume), tmp_path / "out.mrc", lower=1, upper=99) is not None
    with mrcfile.open(tmp_path / "out.mrc") as mrc:
        assert mrc.data[0, 0, 0] == 0 and mrc.data[9, 9, 9] == 1 and np.isfinite(mrc.data).all()


def test_what_cannot_be_done_leaves_what_was_there(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mrc", np.ones((4, 5, 6), np.float32))
    (tmp_path / "out.mrc").write_text("mine")
    with pytest.raises(TomogramError, match="two percentiles must be different"):
        invert_scale(source, tmp_path / "out.mrc", lower=1, upper=99)
    with pytest.raises(OutputError, match="must not replace its own input"):
        invert_scale(source, source, invert=True)
    with pytest.raises(OutputError, match="must not replace its own input"):
        match_pixel_size(plan_resampling(source, 14), source)
    with pytest.raises(TomogramError, match=r"voxel size must be known.*--input-pixel-size"):
        plan_resampling(write(tmp_path / "unknown.mrc", np.ones((4, 5, 6), np.float32), 0), 10)
    bad = write(tmp_path / "nan.mrc", np.full((4, 5, 6), np.nan, np.float32))
    with pytest.raises(TomogramError, match="finite numbers"):
        match_pixel_size(plan_resampling(bad, 14), tmp_path / "out.mrc")
    for target in (tmp_path / "nowhere" / "out.mrc",):
        with pytest.raises(OutputError):
            invert_scale(source, target)
        with pytest.raises(OutputError):
            match_pixel_size(plan_resampling(source, 14), target)
    assert (tmp_path / "out.mrc").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mrc", "nan.mrc", "out.mrc", "unknown.mrc"]


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.mrc", np.ones((40, 50, 60), np.float32))
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(processing.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OutputError, match="space for intermediate results"):
        match_pixel_size(plan_resampling(source, 14), tmp_path / "out.mrc")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mrc"]


def test_the_commands_take_files_and_folders_and_cryosiams_spelling(tmp_path: Path) -> None:
    volume = np.random.default_rng(1).normal(size=(8, 10, 12)).astype(np.float32)
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / "a.mrc", volume)
    write(tmp_path / "raw" / "b.rec", -volume)
    (tmp_path / "raw" / "notes.txt").write_text("no tomogram")

    def call(*arguments: object, status: int = 0) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == status, result.output
        return result.output

    raw, out = tmp_path / "raw", tmp_path / "out"
    said = call("processing_invert_scale", f"--input_path={raw}", f"--output_path={out}", "--invert",
                "--lower_end_percentage=0", "--upper_end_percentage=100")  # fmt: skip
    assert f"a.mrc: inverted, {volume.max():g} became 0 and {volume.min():g} became 1" in said
    with mrcfile.open(out / "a.mrc") as a, mrcfile.open(out / "b.rec") as b:
        np.testing.assert_allclose(a.data, 1 - b.data, atol=1e-6)
    said = call("match-pixel-size", raw / "a.mrc", tmp_path / "a14.mrc", "--pixel-size", 14)
    assert "8 × 10 × 12 to 4 × 6 × 6 voxels" in said and "GB of memory" in said
    with mrcfile.open(tmp_path / "a14.mrc") as mrc:
        assert mrc.data.shape == (4, 6, 6)
    assert "does not exist" in call("match-pixel-size", tmp_path / "none", out, "--pixel-size", 14, status=2)
    (tmp_path / "empty").mkdir()
    assert "must hold tomograms" in call(
        "processing-invert-scale", "--input-path", tmp_path / "empty", "--output-path", tmp_path / "new", status=2
    )
    assert not (tmp_path / "new").exists()
    shutil.copy(raw / "a.mrc", raw / "a.mrc.gz")
    assert "same output" in call("match-pixel-size", raw, out, "--pixel-size", 14, status=2)


def test_a_bad_tomogram_does_not_keep_the_others_from_being_prepared(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("a.mrc", "c.mrc"):
        write(tmp_path / "raw" / name, np.random.default_rng(1).normal(size=(8, 10, 12)).astype(np.float32))
    (tmp_path / "raw" / "b.mrc").write_bytes(b"no tomogram")
    for words in (
        ["processing-invert-scale", "--input-path", "raw", "--output-path", "out", "--invert"],
        ["match-pixel-size", "raw", "out", "--pixel-size", "1000"],
    ):
        words = [str(tmp_path / word) if word in ("raw", "out") else word for word in words]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1 and "b.mrc" in result.stderr
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mrc", "c.mrc"]
        shutil.rmtree(tmp_path / "out")
    assert "not the requested 1000 Å" in result.output
