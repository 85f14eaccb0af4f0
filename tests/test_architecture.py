"""Who may import whom: the house keeps its shape."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import h5py
import numpy as np
import pytest
import typer
from rich.console import Console

import cryosiam_dask
from cryosiam_dask.cli import app
from cryosiam_dask.commands.demo import prepare_demo

PACKAGE = Path(cryosiam_dask.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}

#: The rooms, from the command line down; a module uses what is in its own room and in those after it.
ROOMS = [["cli"], ["commands"], ["runs"], ["stages"], ["files"], ["model", "config"], ["core"], ["errors", "_version"]]

#: The rooms and modules that may use a library which is heavy, optional or best hidden behind functions of our own.
ONLY_IN = {
    "torch": {"model.network", "model.checkpoint", "model.device", "model.predictor"},
    "monai": set(),
    "dask": {"stages.predict", "runs", "commands.view"},
    "napari": {"commands.view"},
    "distributed": {"core.machine", "stages.predict", "runs"},
    "dask_jobqueue": {"runs.slurm"},
    "prometheus_client": {"runs.metrics"},
    "pandas": {"stages.measurements", "stages.centers"},
    "jinja2": {"commands.report"},
    "starfile": {"stages.centers"},
    "huggingface_hub": {"model.published"},
    "typer": {"cli"},
}


def imported(module: str) -> set[str]:
    """The modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def used(module: str) -> set[str]:
    return {name.removeprefix("cryosiam_dask.") for name in imported(module)} & MODULES.keys()


def rank(module: str) -> int:
    return next(i for i, rooms in enumerate(ROOMS) if module.split(".")[0] in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert [name for name in used(module) if rank(name) < rank(module)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: used(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    found = {module for module in MODULES if library in {name.split(".")[0] for name in imported(module)}}
    allowed = ONLY_IN[library]
    assert [module for module in found if not {module, module.split(".")[0]} & allowed] == []


def test_hdf5_files_are_read_in_one_way() -> None:
    """By `open_hdf5`, which does not fail where a disk knows no locks."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("h5py.File", "File"):
                writes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)] == ["w"]
                found += [] if writes else [f"{module}: {ast.unparse(node)}"]
    assert found == ["files.hdf5: h5py.File(path, 'r', locking='best-effort', **options)"]


HEAVY = {"torch", "monai", "dask", "distributed", "zarr", "h5py", "scipy", "numpy", "pandas"}
LOADED = """
import contextlib, io, json, sys
from cryosiam_dask import cli
from cryosiam_dask.core import grid
statuses = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.app(arguments)
        except SystemExit as error:
            statuses.append(error.code)
print(json.dumps([statuses, [name for name in sys.modules if "." not in name]]))
"""


def loaded(*commands: list[str], folder: Path) -> tuple[list[int], set[str]]:
    """Exit statuses of commands, and the libraries that they load."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=folder
    )
    statuses, names = json.loads(done.stdout)
    return statuses, set(names)


def test_what_was_mistyped_is_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    """And helps, and how far a run is."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "TS_1.mrc").write_bytes(b"")
    (tmp_path / "m.ckpt").write_bytes(b"")
    keys = {"data_folder": "data", "prediction_folder": "out", "trained_model": "m.ckpt", "output_formats": ["mrc"]}
    for name, changes in {
        "fine": {}, "key": {"trained_modle": "x"}, "model": {"trained_model": "none"}, "data": {"data_folder": "dat"},
        "mask": {"mask_folder": "none"}, "extension": {"file_extension": ".rec"}, "files": {"test_files": ["TS_2"]},
    }.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**keys, **changes}))
    (tmp_path / "tab.yaml").write_text("data_folder:\n\t- a\n")
    names = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    configured = [name for name, each in names.items() if any(param.name == "config_file" for param in each.params)]
    of_runs = ("model", "data", "mask", "extension", "files")
    wrong = [
        *([name, f"{file}.yaml"] for name in configured for file in ("none", "tab", "key")),
        *([name, f"{file}.yaml"] for name in ("run", "semantic-predict", "plan") for file in of_runs),
        *([name, "fine.yaml", "--filename", "TS_2"] for name in ("run", "components", "export", "plan")),
        *([name, "fine.yaml"] for name in ("report", "components", "export", "semantic-to-centers")),
        ["info", "none.mrc"],
        ["convert", "none.mrc", "x.zarr"],
        ["init", "none"],
        ["processing-invert-scale", "--input-path", "none", "--output-path", "x"],
        ["match-pixel-size", "none", "x", "--pixel-size", "10"],
        ["run", "fine.yaml", "--workers", "0"],
    ]
    right = [["status", "fine.yaml"], *([name, "--help"] for name in names)]
    statuses, libraries = loaded(*wrong, *right, folder=tmp_path)
    assert statuses == [2] * len(wrong) + [0] * len(right)
    assert not libraries & HEAVY
    assert not (tmp_path / "out").exists()


def test_a_plan_loads_nothing_that_runs_a_network(tmp_path: Path) -> None:
    prepare_demo(tmp_path / "demo", Console(quiet=True))
    statuses, libraries = loaded(["plan", "demo/pipeline.yaml", "--device", "cpu"], folder=tmp_path)
    assert statuses == [0] and "h5py" in libraries and not libraries & {"torch", "monai"}


def test_public_names_exist() -> None:
    for name in cryosiam_dask.__all__:
        assert getattr(cryosiam_dask, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cryosiam_dask.nothing  # noqa: B018


def test_commands_without_a_network_do_not_load_torch(tmp_path: Path) -> None:
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "m.ckpt").write_bytes(b"")
    keys = {"data_folder": "data", "prediction_folder": "out", "trained_model": "m.ckpt", "output_formats": ["mrc"]}
    (tmp_path / "fine.yaml").write_text(json.dumps(keys))
    with h5py.File(tmp_path / "out" / "TS_1_preds.h5", "w") as file:
        file["labels"] = np.ones((4, 5, 6), np.uint8)
    statuses, libraries = loaded(["export", "fine.yaml", "--workers", "1"], folder=tmp_path)
    assert statuses == [0] and (tmp_path / "out" / "TS_1_labels.mrc").exists() and "torch" not in libraries
