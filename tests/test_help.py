"""What helps at the keyboard: examples that are commands, and completion in a shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cryosiam_dask.cli import _plain_errors, app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RUNS = {
    "denoise-predict",
    "semantic-predict",
    "run",
    "semantic-postprocess",
    "components",
    "semantic-to-centers",
    "export",
}
COMPLETE = """
eval "$(cryosiam-dask --show-completion bash)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_cryosiam_dask_completion cryosiam-dask
printf '%s\\n' "${COMPREPLY[@]}"
complete -p cryosiam-dask
"""


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_examples_that_are_commands(name: str) -> None:
    examples = re.findall(r"^\s*Example: cryosiam-dask (.*)$", COMMANDS[name].help, re.MULTILINE)
    assert examples
    for example in examples:
        first, *arguments = shlex.split(example.split(" > ")[0])
        assert first == name
        COMMANDS[name].make_context(name, arguments)  # fails of whatever the command does not know


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("lamella_predict", "semantic-predict"),
        ("instance_predict", "components"),
        ("instance-filter", "'cryosiam instance_filter'"),
        ("simsiam_embeddings_from_centers_predict", "'cryosiam simsiam_embeddings_from_centers_predict'"),
        ("simsiam_visualize_embeddings", "'cryosiam simsiam_visualize_embeddings'"),
        ("semantic_filter_ground_truth", "training"),
        ("semantic_train_create_patches", "'cryosiam semantic_train_create_patches'"),
        ("semantic_train", "training"),
        ("processing_create_masks", "'cryosiam processing_create_masks'"),
        ("visualize_semantic", "'cryosiam_vis visualize_semantic'"),
    ],
)
def test_a_command_of_cryosiam_that_is_not_here_says_what_to_use(name: str, instead: str) -> None:
    for arguments in (["--config_file=config.yaml", "--filename", "TS_01.mrc"], [], ["--help"]):
        result = CliRunner().invoke(app, [name, *arguments])
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and not result.stdout
        assert line.startswith(f"error: cryosiam-dask has no command {name.replace('-', '_')}: ") and instead in line


@pytest.mark.parametrize("name", ["semantic_postprocessing", "semantic-postprocessing", "semantic_to_centers"])
def test_a_command_of_cryosiam_works_under_its_own_name(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--config_file=config.yaml", "--help"])
    own = name.replace("_", "-").replace("processing", "process")
    assert result.exit_code == 0 and f"{own} [OPTIONS]" in result.stdout


def test_what_runs_can_be_quiet_and_what_tells_can_be_json() -> None:
    options = {name: {o for p in command.params for o in p.opts} for name, command in COMMANDS.items()}
    assert {name for name, found in options.items() if {"--quiet", "--verbose"} <= found} == RUNS | {"demo"}
    assert {name for name, found in options.items() if "--json" in found} == RUNS | {
        "models",
        "plan",
        "status",
        "info",
        "convert",
    }


@pytest.mark.parametrize(("writes", "kept"), [(True, "; repeat the command to resume"), (False, "interrupted")])
def test_an_interruption_says_how_to_go_on(writes: bool, kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, _plain_errors(writes=writes):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130 and capsys.readouterr().err.endswith(f"{kept}\n")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_fits_and_says_which_numbers(name: str) -> None:
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80 and "range" not in text and "…..." not in text
    if "--workers" in text:
        assert "--workers <int ≥ 1>" in text
    assert "..." not in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["run", "x.yaml", "--workers", "0"], "'--workers': must be a whole number of at least 1; found 0"),
        (["run", "x.yaml", "--workers", "two"], "must be a whole number of at least 1; found two"),
        (["run", "x.yaml", "--worker-timeout", "nan"], "must be a number of at least 0; found nan"),
        (["match-pixel-size", "a", "b", "--pixel-size", "inf"], "must be a number of at least 0.01; found inf"),
        (["semantic-to-centers", "x.yaml", "--min-voxels", "-1"], "must be a whole number of at least 0; found -1"),
        (["run", "x.yaml", "--device", "gpu"], "'--device': must be auto, cpu or cuda; found gpu. Choose one of them"),
        (
            ["export", "x.yaml", "--format", "tiff"],
            "'--format': must be ome-zarr or mrc; found tiff. Choose one of them",
        ),
    ],
)
def test_numbers_out_of_range_are_refused_with_what_they_must_be(arguments: list[str], rule: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and rule in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["semantic-"], {"semantic-predict", "semantic-postprocess", "semantic-to-centers"}),
        (["run", "--dev"], {"--device"}),
        (["run", "--device", "c"], {"cpu", "cuda"}),
        (["export", "--format", "o"], {"ome-zarr"}),
        (["plan", "--config-file", "conf"], set()),  # bash completes names of files then
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", "cryosiam-dask", *words], capture_output=True, text=True, env=environment
    )
    *found, registered = done.stdout.splitlines()
    assert set(found) - {""} == expected, done.stderr
    assert registered == "complete -o default -F _cryosiam_dask_completion cryosiam-dask"
