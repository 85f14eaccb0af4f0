"""A folder of tomograms becomes a pipeline that the program takes; what is no such folder leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest
from typer.testing import CliRunner

from cryosiam_dask.cli import app
from cryosiam_dask.commands.init import MARK, read_folder, write_pipeline
from cryosiam_dask.config import read_pipeline
from cryosiam_dask.core.phantom import make_phantom
from cryosiam_dask.errors import ConfigurationError, OutputError, Problems
from cryosiam_dask.model.network import Architecture
from cryosiam_dask.model.published import PUBLISHED
from cryosiam_dask.runs.plan import plan_run
from support import checkpoints

BRIGHT = make_phantom(7, (60, 72, 72)).tomogram


def write(path: Path, volume: np.ndarray, voxel_size: float = 6.8) -> None:
    path.parent.mkdir(exist_ok=True)
    with mrcfile.new(path) as mrc:
        mrc.set_data(volume)
        mrc.voxel_size = voxel_size


@pytest.mark.parametrize(
    ("volume", "scaling", "invert"),
    [
        (BRIGHT, (0, 1), False),
        (1 - BRIGHT, (0, 1), True),
        ((BRIGHT - BRIGHT.mean()) / BRIGHT.std(), None, False),
        (np.round(2000 - 1500 * BRIGHT).astype(np.int16), None, True),
        (300 * BRIGHT, None, False),
    ],
    ids=["as wanted", "inverted", "z-scored", "int16", "0 to 300"],
)
def test_range_and_contrast_are_those_of_the_tomograms(
    tmp_path: Path, volume: np.ndarray, scaling: tuple[float, float] | None, invert: bool
) -> None:
    for name in ("TS_1.mrc", "TS_2.mrc"):
        write(tmp_path / "data" / name, volume)
    found, text = write_pipeline(tmp_path / "data", tmp_path / "pipeline.yaml")
    for configuration in read_pipeline(tmp_path / "pipeline.yaml").values():
        data = configuration.parameters.data
        if scaling is None:
            scaling = tuple(np.quantile(volume, (0.001, 0.999)))  # type: ignore[assignment]
        assert (data.min, data.max) == pytest.approx(scaling, rel=0.01, abs=0.01)
        assert data.invert is (invert or None)  # False would keep a run from judging the contrast
    assert (len(found.headers), found.ending, found.doubts) == (2, ".mrc", ())
    assert text == (tmp_path / "pipeline.yaml").read_text()
    assert "the voxel size" not in text


def test_a_narrow_range_far_from_zero_is_written_with_enough_digits(tmp_path: Path) -> None:
    volume = (1e6 + 50 * BRIGHT).astype(np.float32)
    write(tmp_path / "TS_1.mrc", volume)
    write_pipeline(tmp_path, tmp_path / "pipeline.yaml")
    data = read_pipeline(tmp_path / "pipeline.yaml")["semantic"].parameters.data
    assert (data.min, data.max) == pytest.approx(tuple(np.quantile(volume, (0.001, 0.999))), rel=1e-6, abs=0)


def test_models_nearby_are_taken_and_the_plan_accepts_the_file(tmp_path: Path) -> None:
    write(tmp_path / "data" / "it's TS 1.mrc", BRIGHT, voxel_size=14)
    one = Architecture(**{**{n: getattr(checkpoints.SMALL, n) for n in checkpoints.SMALL.__slots__}, "out_channels": 1})
    (tmp_path / "models").mkdir()
    checkpoints.write(tmp_path / "models" / "a.ckpt", one)
    checkpoints.write(tmp_path / "models" / "b.ckpt")
    (tmp_path / "models" / "damaged.ckpt").write_bytes(b"PK")
    _, text = write_pipeline(tmp_path / "data", tmp_path / "pipeline.yaml")
    pipeline = read_pipeline(tmp_path / "pipeline.yaml")
    assert [c.trained_model for c in pipeline.values()] == [tmp_path / "models" / f"{name}.ckpt" for name in "ab"]
    plan = plan_run(pipeline["lamella"], name="lamella")
    assert [job.source.name for job in plan.jobs] == ["it's TS 1.mrc"]
    assert f"{MARK} the voxel size, 14 Å: the published models were made for about 6.8 Å" in text
    # Which of two is meant, nobody can tell.
    checkpoints.write(tmp_path / "models" / "c.ckpt")
    _, text = write_pipeline(tmp_path / "data", tmp_path / "other.yaml")
    assert f"{MARK} which model is meant for semantic: " in text
    assert read_pipeline(tmp_path / "other.yaml")["semantic"].trained_model == (
        PUBLISHED["cryosiam_semantic_segmentation"].source
    )


def test_what_differs_or_is_not_known_is_marked(tmp_path: Path) -> None:
    write(tmp_path / "TS_1.mrc", BRIGHT, 0)
    write(tmp_path / "TS_2.mrc", 1 - BRIGHT, 0)
    write(tmp_path / "TS_3.mrc", 1000 * BRIGHT[:, :-2], 0)
    write(tmp_path / "TS_3.rec", BRIGHT, 0)
    (tmp_path / "TS_4.mrc").write_bytes(b"no tomogram")
    found, text = write_pipeline(tmp_path, tmp_path / "pipeline.yaml")
    assert found.contrast is None and len(found.headers) == 3 and found.others == {".rec": 1}
    for doubt in ("dark on bright and some bright on dark", "differ in the range", "which no header gives"):
        assert any(line.startswith(f"# {MARK}") and doubt in line for line in text.splitlines())
    assert "cannot be read: 1, such as" in text and "2 other" not in text and "1 other shape" in text
    read_pipeline(tmp_path / "pipeline.yaml")


def test_a_folder_without_tomograms(tmp_path: Path) -> None:
    for made in (tmp_path / "missing", tmp_path, tmp_path / "file"):
        if made.name == "file":
            made.touch()
        with pytest.raises(ConfigurationError, match="Give the folder that holds the tomograms"):
            write_pipeline(made, tmp_path / "pipeline.yaml")
    write(tmp_path / "below" / "TS_1.mrc", BRIGHT)
    with pytest.raises(ConfigurationError, match=r"none, but some in .*below"):
        read_folder(tmp_path)
    (tmp_path / "TS_1.mrc").write_bytes(b"no tomogram")
    with pytest.raises(Problems):
        read_folder(tmp_path)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_nothing_is_replaced_and_nothing_half_made(tmp_path: Path) -> None:
    write(tmp_path / "TS_1.mrc", BRIGHT)
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(OutputError, match="an existing file is not replaced"):
        write_pipeline(tmp_path, tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    with pytest.raises(OutputError, match="must be writable; found No such file"):
        write_pipeline(tmp_path, tmp_path / "nowhere" / "pipeline.yaml")
    with pytest.raises(Problems, match="cryosiam_lamella"):
        write_pipeline(tmp_path, tmp_path / "pipeline.yaml", lamella="cryosiam_lamela")
    with pytest.raises(ConfigurationError, match=r"option --semantic: does not exist: nowhere\.ckpt"):
        write_pipeline(tmp_path, tmp_path / "pipeline.yaml", semantic="nowhere.ckpt")
    assert not (tmp_path / "pipeline.yaml").exists()


def test_outputs_among_the_tomograms_are_left_out(tmp_path: Path) -> None:
    for name in ("TS_1.mrc", "TS_2__a.mrc", "TS_1_labels.mrc", "TS_1__membrane.mrc", "TS_2__a__lamella.mrc"):
        write(tmp_path / name, BRIGHT)
    found, _ = write_pipeline(tmp_path, tmp_path / "pipeline.yaml")
    assert found.outputs == ("TS_1__membrane.mrc", "TS_1_labels.mrc", "TS_2__a__lamella.mrc")
    for configuration in read_pipeline(tmp_path / "pipeline.yaml").values():
        assert configuration.test_files == ("TS_1.mrc", "TS_2__a.mrc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "TS_1_preds.h5").touch()
    write(tmp_path / "out" / "TS_1__membrane.mrc", BRIGHT)
    with pytest.raises(ConfigurationError, match="must hold tomograms"):
        read_folder(tmp_path / "out")


def test_of_hdf5_files_with_several_volumes_one_is_chosen(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "TS_1.h5", "w") as file:
        file["raw"], file["it's denoised"] = 1 - BRIGHT, BRIGHT
    with pytest.raises(Problems, match=r"or the option --dataset, to its name"):
        write_pipeline(tmp_path, tmp_path / "pipeline.yaml")
    found, _ = write_pipeline(tmp_path, tmp_path / "pipeline.yaml", dataset="it's denoised")
    assert found.contrast == "bright on dark"
    assert {c.hdf5_dataset for c in read_pipeline(tmp_path / "pipeline.yaml").values()} == {"it's denoised"}


def test_the_command_says_what_it_found_and_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "TS_1.mrc", 1 - BRIGHT)
    result = CliRunner().invoke(app, ["init"])
    assert result.exit_code == 0, result.output
    assert f"1 .mrc tomogram in {tmp_path}" in result.output and "contrast: dark on bright" in result.output
    assert "next: cryosiam-dask plan pipeline.yaml" in result.output
    (tmp_path / "model.ckpt").touch()
    result = CliRunner().invoke(app, ["init", "--output", "my file.yaml", "--lamella", "model.ckpt"])
    assert "next: cryosiam-dask plan 'my file.yaml'" in result.output
    assert read_pipeline(tmp_path / "my file.yaml")["lamella"].trained_model == tmp_path / "model.ckpt"
    result = CliRunner().invoke(app, ["init"])
    assert result.exit_code == 2 and "error: pipeline.yaml: an existing file is not replaced" in result.stderr
