"""The YAML files of CryoSiam, as they stand and with everything that can be wrong in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cryosiam_dask.config import Configuration, Data, HyperParameters, Network, Parameters, read_configuration
from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, Problems

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = "data_folder: .\nprediction_folder: p\ntrained_model: .\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(CryosiamDaskError) as caught:
        read_configuration(write(tmp_path, text))
    error = caught.value
    return [str(p) for p in error.problems] if isinstance(error, Problems) else [str(error)]


def test_lamella_file_as_it_stands() -> None:
    c = read_configuration(CONFIGS / "config_lamella.yaml")
    assert c.data_folder == Path("/scratch/stojanov/dataset1/predictions/denoised")
    assert c.parameters.data.patch_size == (128, 128, 128)
    assert c.parameters.network.threshold == 0.9
    assert c.parameters.network.postprocessing and not c.parameters.network.hull_3d
    assert c.mask_folder is None and c.test_files is None and not c.save_internal_files
    assert c.hyper_parameters.batch_size == 2


def test_semantic_file_as_it_stands() -> None:
    c = read_configuration(CONFIGS / "config_semantic.yaml")
    assert c.mask_folder == Path("/scratch/stojanov/dataset1/predictions/lamella")
    assert c.parameters.network.threshold == 0.1
    assert c.parameters.network.postprocessing_sizes == (-1, 5000, -1, -1, -1)
    assert not c.parameters.network.postprocessing


def test_particle_file_as_it_stands() -> None:
    network = read_configuration(CONFIGS / "config_semantic_particle.yaml").parameters.network
    assert (network.out_channels, network.threshold, network.min_voxels) == (14, 0.7, 10)


def test_file_with_every_key_shows_the_defaults(tmp_path: Path) -> None:
    shown = read_configuration(CONFIGS / "config_all_keys.yaml")
    defaults = read_configuration(write(tmp_path, MINIMAL))
    required = {"data_folder", "prediction_folder", "trained_model"}
    assert shown.model_dump(exclude=required) == defaults.model_dump(exclude=required)
    text = (CONFIGS / "config_all_keys.yaml").read_text()
    for model in (Configuration, Parameters, Data, Network, HyperParameters):
        for name, field in model.model_fields.items():
            assert f"{field.alias or name}:" in text


def test_models_are_frozen(tmp_path: Path) -> None:
    c = read_configuration(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        c.file_extension = ".rec"  # type: ignore[misc]


def test_keys_of_cryosiam_without_meaning_here_are_accepted_and_named(tmp_path: Path) -> None:
    text = MINIMAL + "log_dir: x\nparameters:\n  gpu_devices: 1\n"
    c = read_configuration(write(tmp_path, text))
    assert c.unused == ("log_dir", "parameters.gpu_devices")


def test_empty_sections_and_an_empty_mask_folder_mean_the_defaults(tmp_path: Path) -> None:
    c = read_configuration(write(tmp_path, MINIMAL + "mask_folder: ''\nparameters:\n  data:\nhyper_parameters:\n"))
    assert c.mask_folder is None and c.parameters.data.max == 1 and c.hyper_parameters.batch_size == 2


def test_home_folder_is_expanded(tmp_path: Path) -> None:
    c = read_configuration(write(tmp_path, MINIMAL.replace("data_folder: .", "data_folder: ~/d")))
    assert c.data_folder == Path.home() / "d"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trained_modell: x", r"key trained_modell: this key is not known. Did you mean trained_model\?"),
        ("threshold: 0.2", r"key threshold: .*not known. Did you mean parameters.network.threshold\?"),
        ("zebra: 1", r"key zebra: .*not known. The keys known here are data_folder, "),
        ("parameters: {network: {treshold: 1}}", r"key parameters.network.treshold: .*Did you mean threshold\?"),
        ("parameters: {network: {3d_postprocesing: no}}", r"Did you mean 3d_postprocessing\?"),
        ("test_files: a.mrc", r"key test_files: must be a list.*found 'a.mrc'"),
        ("file_extension: mrc", r"key file_extension: must begin with a dot.*found 'mrc'"),
        ("save_internal_files: 'no'", r"key save_internal_files: must be True or False.*found 'no'"),
        ("parameters: 3", r"key parameters: must hold keys of its own.*found 3"),
        ("parameters: {data: {patch_size: 128}}", r"key parameters.data.patch_size: must be a list.*found 128"),
        ("parameters: {data: {patch_size: [128, 1.5]}}", r"patch_size.1: must be a whole number; found 1.5"),
        ("parameters: {data: {min: 1, max: 1}}", r"parameters.data: max must be larger than min"),
        ("parameters: {data: {std: 0}}", r"parameters.data.std: must be greater than 0; found 0"),
        ("parameters: {data: {mean: .nan}}", r"parameters.data.mean: must be a finite number; found nan"),
        ("parameters: {data: {mean: true}}", r"parameters.data.mean: must be a number; found True"),
        ("parameters: {data: {patch_size: large}}", r"key parameters.data.patch_size: must be a list.*found 'large'"),
        ("parameters: {data: {halo: 0}}", r"data.halo: must be greater than or equal to 1; found 0"),
        ("hyper_parameters: {precision: fp64}", r"precision: must be 'fp32', 'tf32', 'bf16' or 'fp16'; found 'fp64'"),
        ("parameters: {network: {threshold: 3}}", r"network.threshold: must be less than or equal to 1; found 3"),
        ("parameters: {network: {spatial_dims: 4}}", r"spatial_dims: must be less than or equal to 3; found 4"),
        ("parameters: {network: {postprocessing_sizes: [-2]}}", r"sizes.0: must be greater than or equal to -1"),
        ("parameters: {network: {min_voxels: -1}}", r"min_voxels: must be greater than or equal to 0; found -1"),
        ("components: 26", r"key components: must be True or False.*found 26"),
        ("hyper_parameters: {batch_size: 0}", r"batch_size: must be greater than or equal to 1; found 0"),
        ("hyper_parameters: {batch_size: 2.0}", r"batch_size: must be a whole number; found 2.0"),
    ],
)
def test_each_fault_is_named_with_key_value_and_remedy(tmp_path: Path, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, MINIMAL + line)
    assert re.search(expected, problem), problem
    assert str(tmp_path / "config.yaml") in problem


def test_numbers_as_everybody_writes_them(tmp_path: Path) -> None:
    """YAML takes 1e-3 for text."""
    data = read_configuration(write(tmp_path, MINIMAL + "parameters: {data: {min: 1e-3, max: 2E3}}")).parameters.data
    assert (data.min, data.max) == (0.001, 2000)


def test_missing_paths_are_reported_with_the_rest(tmp_path: Path) -> None:
    found = problems(tmp_path, "data_folder: nowhere\nprediction_folder: p\ntrained_model: m.ckpt\nzebra: 1\n2: 3\n")
    assert len(found) == 4
    assert any("key data_folder: does not exist: nowhere (relative to /" in problem for problem in found)
    assert any("key 2: this key is not known" in problem for problem in found)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "data_folder: 3\nzebra: 1\nhyper_parameters: {batch_size: -1}\n")
    assert len(found) == 5  # data_folder, two missing keys, the unknown one, batch_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "line 1: the configuration must be a YAML file"),
        ("", "found an empty file"),
        ("- a\n- b", "must be a mapping of keys to values; found list"),
        (MINIMAL + "data_folder: again", "line 4: .*the key 'data_folder' twice"),
        ("? [a, b]\n: c", "YAML"),
        ("data_folder: 2024-13-45", "must be a YAML file; found an invalid date"),
        ("[" * 5000, "must be a YAML file; found too many nested lists"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert re.search(expected, problem), problem


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        ("a: x\nb:\n\tc: 0\n", 3, "Indent with spaces, not tabs"),
        ("a: x\nb:\n  c: 0\n  \td: 1\n", 4, "Indent with spaces, not tabs"),
        ("a: x\n b: y\n", 2, "Indent the keys of a section equally"),
        ("b:\n  c: 0\n d: 1\n", 3, "Indent the keys of a section equally"),
        ('a: "C:\\data"\n', 1, "Put paths with backslashes into single quotes"),
        ("a: x\nb\nc: y\n", 3, "Write a colon and a space after each key"),
        ("a: [1, 2\nb: 3\n", 2, "Close the bracket"),
        ("a: 'x\nb: 3\n", 3, "Close the quotes"),
    ],
)
def test_mistakes_of_yaml_are_told_with_their_line_and_remedy(
    tmp_path: Path, text: str, line: int, remedy: str
) -> None:
    (problem,) = problems(tmp_path, text)
    assert f"config.yaml, line {line}: " in problem and remedy in problem and "found found" not in problem


def test_another_file_in_the_place_of_a_configuration(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(ConfigurationError, match=r"confg.yml: does not exist\. Did you mean .*/config.yaml\?"):
        read_configuration(tmp_path / "confg.yml")
    with pytest.raises(ConfigurationError, match=r"found Is a directory\. Did you mean .*/config.yaml\?"):
        read_configuration(tmp_path)
    (tmp_path / "TS_1.mrc").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigurationError, match=r"found bytes that are not UTF-8 text\. .*'cryosiam-dask info'"):
        read_configuration(tmp_path / "TS_1.mrc")
    (problem,) = problems(tmp_path, "data_folder:x\ntrained_model:y\n")
    assert "Write a space after the colon of each key" in problem


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing.yaml: does not exist\. Check the name"):
        read_configuration(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match="must be readable; found Is a directory"):
        read_configuration(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigurationError, match="must be a YAML file; found bytes that are not UTF-8"):
        read_configuration(tmp_path / "binary.yaml")


def test_class_names_and_formats(tmp_path: Path) -> None:
    c = read_configuration(write(tmp_path, MINIMAL + "class_names: [ 'Membran µ', actin ]\noutput_formats: [ mrc ]\n"))
    assert (c.class_names, c.output_formats) == (("Membran µ", "actin"), ("mrc",))
    (problem,) = problems(tmp_path, MINIMAL + "class_names: [ a, b, a ]\n")
    assert "key class_names: must not contain a name twice: a; found" in problem
    (problem,) = problems(tmp_path, MINIMAL + 'class_names: [ a, "b\\n" ]\n')
    assert "key class_names.1: a name must be one line of printable text" in problem
    (problem,) = problems(tmp_path, MINIMAL + "output_formats: [ hdf5, tiff ]\n")
    assert "key output_formats.1: must be 'hdf5', 'ome-zarr' or 'mrc'; found 'tiff'" in problem
    (problem,) = problems(tmp_path, MINIMAL + "output_formats: mrc\n")
    assert "key output_formats: must be a list" in problem


@pytest.mark.parametrize("pattern", ["[", "(a+)+$", "(a|aa)*b", "(x*)*", "(a+)\\1*", ".*.*.*.*x"])
def test_a_pattern_that_takes_for_ever_is_refused(tmp_path: Path, pattern: str) -> None:
    keys = {"data_folder": "d", "prediction_folder": "p", "trained_model": "m.ckpt"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**keys, "tilt_series_pattern": pattern}))
    rule = r"key tilt_series_pattern: must (be a regular expression|have at most three repetitions)"
    with pytest.raises(Problems, match=rule):
        read_configuration(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**keys, "tilt_series_pattern": r"^(TS_\d+|Pos_\d+)"}))
    assert read_configuration(tmp_path / "c.yaml").tilt_series_pattern
