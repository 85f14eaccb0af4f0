"""Published models are fetched once, whole and checked; what goes wrong says what to do and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryosiam_dask.errors import CheckpointError
from cryosiam_dask.model.checkpoint import read_checkpoint
from cryosiam_dask.model.published import PUBLISHED, REPOSITORY, HubFile, nearest, parse
from support import checkpoints
from support.hub import Hub, serve
from support.inputs import write_tomogram, write_yaml

FILE = f"{REPOSITORY}/cryosiam_lamella.ckpt"
CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub({FILE: CONTENT})) as hub:
        yield hub


def fetch(hub: Hub, cache: Path, source: str = "cryosiam_lamella", **environment: str) -> tuple[str, str]:
    """What `fetch` returns and what it raises, in a process whose environment names the server and the cache."""
    code = """if True:
        import sys
        from cryosiam_dask.errors import CheckpointError
        from cryosiam_dask.model.published import locate, parse
        try:
            print(locate(parse(sys.argv[1])))
        except CheckpointError as error:
            print(f"ERROR {error}")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, source],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\r" not in done.stderr and "Traceback" not in done.stderr  # no bar is drawn where nobody watches
    said = done.stdout.strip()
    return ("", said) if said.startswith("ERROR") else (said, "")


def files(cache: Path) -> list[Path]:
    """What a user of the cache would find in it: the models."""
    return [path for path in cache.rglob("*") if path.name == "cryosiam_lamella.ckpt"]


def test_a_model_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    path, _ = fetch(hub, tmp_path)
    assert Path(path).read_bytes() == CONTENT and Path(path).name == "cryosiam_lamella.ckpt"
    asked = len(hub.asked)
    assert asked > 0
    assert fetch(hub, tmp_path)[0] == path
    assert len(hub.asked) == asked
    hub.fault = "error"
    assert fetch(hub, tmp_path, "hf://" + FILE)[0] == path  # without the server as well


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "must be downloaded completely from the Hugging Face Hub; found "),
        ("half", "must be downloaded completely from the Hugging Face Hub; found "),
        ("wrong", "must be the one that the Hugging Face Hub describes; found SHA-256 "),
    ],
)
def test_a_hub_that_fails_leaves_nothing_that_is_taken_for_the_model(
    hub: Hub, tmp_path: Path, fault: str, message: str
) -> None:
    hub.fault = fault
    path, error = fetch(hub, tmp_path)
    assert path == "" and message in error and error.startswith(f"ERROR hf://{FILE}: ")
    if fault != "wrong":
        assert f"from {hub.url}/{REPOSITORY}/resolve/main/cryosiam_lamella.ckpt" in error and "trained_model" in error
    assert files(tmp_path) == []
    hub.fault = ""
    assert Path(fetch(hub, tmp_path)[0]).read_bytes() == CONTENT


def test_without_a_network(tmp_path: Path) -> None:
    with serve(Hub()) as gone:
        pass  # nobody listens there any more
    _, error = fetch(gone, tmp_path)
    assert "must be downloaded completely from the Hugging Face Hub; found " in error
    assert f"{gone.url}/{REPOSITORY}/resolve/main/cryosiam_lamella.ckpt" in error
    _, error = fetch(gone, tmp_path, HF_HUB_OFFLINE="1")
    assert "while HF_HUB_OFFLINE is set" in error and str(tmp_path) in error


def test_files_and_repositories_that_are_not_there(hub: Hub, tmp_path: Path) -> None:
    _, error = fetch(hub, tmp_path, f"hf://{REPOSITORY}/other.ckpt")
    assert "must have this file" in error
    _, error = fetch(hub, tmp_path, "hf://nobody/nothing/other.ckpt")
    assert "must have this repository" in error and "hf auth login" in error


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    _, error = fetch(hub, tmp_path / "file")
    assert "must fit into the cache" in error and "HF_HOME" in error and "Traceback" not in error
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cryosiam_lamella", HubFile(REPOSITORY, "cryosiam_lamella.ckpt")),
        ("hf://a/b/c/d.ckpt", HubFile("a/b", "c/d.ckpt")),
        ("HF://a.b/c-d@v1.0/e.ckpt", HubFile("a.b/c-d", "e.ckpt", "v1.0")),
        ("cryosiam_lamella.ckpt", Path("cryosiam_lamella.ckpt")),
        ("models/cryosiam_lamella", Path("models/cryosiam_lamella")),
        ("model", Path("model")),
    ],
)
def test_what_a_value_means(text: str, found: Path | HubFile) -> None:
    assert parse(text) == found
    if isinstance(found, HubFile):
        assert parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a", "hf://a/b", "hf://a/b/", "hf://a/b/../c", "hf:///a/b", "hf://a/b@/c"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be written hf://owner/repository/file"):
        parse(text)


def test_a_file_of_a_models_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cryosiam_lamella").touch()
    assert parse("cryosiam_lamella") == Path("cryosiam_lamella")


def test_the_nearest_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"such as cryosiam_lamella$"):
        parse("cryosiam_lamela")
    assert nearest("/scratch/models/cryosiam_semantic.ckpt") == "cryosiam_semantic_segmentation"
    assert nearest("model.ckpt") is None
    with pytest.raises(CheckpointError, match="or to cryosiam_lamella, which is then downloaded"):
        read_checkpoint(tmp_path / "cryosiam_lamella.ckpt")


def test_the_table_names_files_as_they_are_published() -> None:
    assert all(model.file == f"{name}.ckpt" for name, model in PUBLISHED.items())


def test_the_command_lists_and_fetches(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    command = [Path(sys.executable).with_name("cryosiam-dask"), "models"]

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)

    assert call().stdout.count("in the cache: no") == len(PUBLISHED)
    assert hub.asked == []
    done = call("--fetch", "cryosiam_lamella", "--json")
    found = {model["name"]: model for model in json.loads(done.stdout)}
    assert [name for name, model in found.items() if model["path"]] == ["cryosiam_lamella"]
    assert Path(found["cryosiam_lamella"]["path"]).read_bytes() == CONTENT
    assert found["cryosiam_semantic_segmentation"]["class_names"] is None  # not documented
    done = call("--fetch", "cryosiam_semantic")
    assert done.returncode == 2 and "Did you mean cryosiam_semantic_segmentation?" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_a_plan_with_a_model_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    """The configuration names the model; what workers are told to read is the file in the cache."""
    hub.files[FILE] = checkpoints.write(tmp_path / "made.ckpt").read_bytes()
    (tmp_path / "data").mkdir()
    write_tomogram(tmp_path / "data" / "TS_1.mrc", 0, (16, 16, 16))
    config = tmp_path / "config.yaml"
    write_yaml(config, {"data_folder": str(tmp_path / "data"), "prediction_folder": str(tmp_path / "out"),
                        "trained_model": "cryosiam_lamella"})  # fmt: skip
    code = """if True:
        import sys
        from cryosiam_dask.config import read_configuration
        from cryosiam_dask.runs.plan import plan_run
        plan = plan_run(read_configuration(sys.argv[1]).absolute())
        print(plan.spec("cpu").checkpoint, plan.configuration.trained_model, sep="\\n")
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    read, named = done.stdout.split()
    assert Path(read).is_relative_to(tmp_path / "cache") and Path(read).read_bytes() == hub.files[FILE]
    assert named == f"hf://{FILE}"
