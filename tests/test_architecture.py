"""Who may import whom: the house keeps its shape."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cryosiam_dask

PACKAGE = Path(cryosiam_dask.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

#: Everybody may use these; they use nothing of the package but each other.
FOUNDATION = {"_version", "errors", "executor", "grid", "config", "ledger", "diagnosis", "json_values", "classes",
              "folders", "run_log", "local_store", "published"}  # fmt: skip
STAGES = {"mrc_to_zarr", "zarr_to_labels", "lamella", "components", "measurements", "centers", "labels_to_hdf5", "mask",
          "preview", "phantom", "timeline", "intensities", "tomogram_files",
          "ome_zarr", "formats"}  # fmt: skip
#: From the command line down to the foundation; imports go one way.
LAYERS = [{"cli"}, {"demo", "look"}, {"runner", "overview"}, {"collection", "slurm", "metrics"},
          {"pipeline", "forecast"}, {"plan", "progress", "cluster", "inspect_file", "report"}, STAGES, {"predictor"},
          {"checkpoint"}, {"network"}, FOUNDATION]  # fmt: skip
#: What a stage may use of another: the lamella is the largest component, and a block is predicted inside its mask.
BETWEEN_STAGES = {("mrc_to_zarr", "tomogram_files"), ("zarr_to_labels", "tomogram_files"), ("lamella", "components"),
                  ("zarr_to_labels", "mask"), ("timeline", "zarr_to_labels"),
                  ("intensities", "mrc_to_zarr"), ("intensities", "tomogram_files"), ("measurements", "components"),
                  ("preview", "components"), ("preview", "lamella"),
                  ("measurements", "labels_to_hdf5"), ("centers", "components"), ("centers", "measurements"),
                  ("centers", "labels_to_hdf5"), ("formats", "labels_to_hdf5"), ("formats", "mrc_to_zarr"),
                  ("formats", "ome_zarr"), ("tomogram_files", "labels_to_hdf5"),
                  ("mask", "labels_to_hdf5")}  # fmt: skip

ONLY_IN = {
    "torch": {"network", "checkpoint", "predictor"},
    "monai": set(),
    "dask": {"zarr_to_labels", "cluster", "slurm"},
    "distributed": {"cluster", "runner", "slurm", "metrics", "zarr_to_labels"},
    "dask_jobqueue": {"slurm"},
    "prometheus_client": {"metrics"},
    "pandas": {"measurements", "centers"},
    "jinja2": {"report"},
    "starfile": {"centers"},
    "huggingface_hub": {"published"},
    "typer": {"cli"},
}


def imported(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def used(module: str) -> set[str]:
    return {name.split(".")[1] for name in imported(module) if name.startswith("cryosiam_dask.")}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_go_one_way(module: str) -> None:
    layer = next((i for i, names in enumerate(LAYERS) if module in names), None)
    assert layer is not None, f"{module} has no place in the house yet"
    below = set().union(*LAYERS[layer + 1 :])
    allowed = below | {b for a, b in BETWEEN_STAGES if a == module} | (FOUNDATION if module in FOUNDATION else set())
    assert used(module) <= allowed


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    found = {module for module in MODULES if library in {name.split(".")[0] for name in imported(module)}}
    assert found <= ONLY_IN[library]


def test_hdf5_files_are_read_in_one_way() -> None:
    """By `open_hdf5`, which does not fail where a disk knows no locks."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("h5py.File", "File"):
                writes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)] == ["w"]
                found += [] if writes else [f"{module}: {ast.unparse(node)}"]
    assert found == ["labels_to_hdf5: h5py.File(path, 'r', locking='best-effort', **options)"]


def test_geometry_and_the_command_line_load_nothing_heavy() -> None:
    heavy = "{'torch', 'dask', 'zarr', 'numpy'}"
    code = f"import sys, cryosiam_dask.cli, cryosiam_dask.grid; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_exist() -> None:
    for name in cryosiam_dask.__all__:
        assert getattr(cryosiam_dask, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cryosiam_dask.nothing  # noqa: B018
