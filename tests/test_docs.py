"""What README and the pages of ``docs`` say is done here, with the real program on real files.

1. Every block of shell or Python on a page is run, in order, in a fresh folder: the tutorial's begins empty, those of
   the others as the tutorial leaves it. One that stands on several pages is run on the first. A block that cannot run
   here follows a comment, ``<!-- not run: reason -->``; what a reader has done already stands in another,
   ``<!-- first: command -->``. The tutorial is followed by the real entry point; on other pages, commands of the
   program and Python run in this process, which has loaded everything.
2. Every command and option that is written anywhere, also in ``configs``, is one that the program has.
3. Every YAML block holds keys and values that the program takes.
4. What ``docs/reference.py`` makes is up to date, links lead somewhere, and what `docs/viewers.md` says of the files
   holds when they are read back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import typer
import yaml
import zarr
from markdown_it import MarkdownIt
from PIL import Image

from cryosiam_dask.cli import app
from cryosiam_dask.commands.demo import SEEDS
from cryosiam_dask.config import STAGES, read_configuration, read_models
from cryosiam_dask.core.phantom import SHAPE, dice, make_phantom
from cryosiam_dask.model.classes import COLOURS
from support.command import call, invoke
from support.inputs import write_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
EXAMPLES = ROOT / "docs" / "command-line.md"  # each of these commands stands on another page, too
LABELS = ROOT / "tests" / "data" / "demo" / "labels.npz"
SHELL, PYTHON, YAML = "bash", "python", "yaml"
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->", re.DOTALL)
FIRST = re.compile(r"<!-- first: (?P<command>.+?) -->")


@dataclass(frozen=True)
class Block:
    """Code on a page: its language, its text, its line, and why it is not run."""

    language: str
    text: str
    line: int
    reason: str = ""


def blocks(page: Path) -> Iterator[Block]:
    reason = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            # Indented code is a command in README, where .ci/run looks for it.
            language = token.info.strip() if token.type == "fence" else SHELL
            yield Block(language, token.content, token.map[0] + 1, reason)
        comment = token.content.strip() if token.type == "html_block" else ""
        if first := FIRST.fullmatch(comment):
            yield Block(SHELL, first["command"], token.map[0] + 1)
        note = NOT_RUN.fullmatch(comment)
        reason = note["reason"] if note else ""


def to_run(page: Path) -> list[Block]:
    """Blocks of a page that are run and stand on no page before it."""
    here = [block for block in blocks(page) if block.language in (SHELL, PYTHON) and not block.reason]
    before = {block.text for each in ORDER[: ORDER.index(page)] for block in blocks(each)}
    return [block for block in here if block.text not in before]


def run_page(page: Path, folder: Path, *, here: bool = False) -> None:
    """Run the blocks of a page; `here`: in this process, where it is Python or only commands of the program."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    for block in to_run(page):
        lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
        if here and block.language == PYTHON:
            with contextlib.chdir(folder):
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), {"__name__": "__main__"})
        elif here and all(line[:1] in ([], ["cryosiam-dask"]) for line in lines):
            for _, *arguments in filter(None, lines):
                invoke(*arguments, folder=folder)
        else:
            command = ["bash", "-euo", "pipefail", "-c"] if block.language == SHELL else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{page.name}:{block.line}\n{block.text}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stdout + done.stderr


ORDER = [TUTORIAL, *(page for page in PAGES if page not in (TUTORIAL, EXAMPLES))]


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """As on a machine with one core: most of a command's time is the start of its workers."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})  # of this thread and of what it starts
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def finished(one_core: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tutorial was followed, word for word."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_page(TUTORIAL, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_the_tutorial_leads_to_its_figure(finished: Path) -> None:
    for name in (
        "semantic/report.html",
        "semantic/class2_particle_centers.star",
        "semantic/components.csv",
        "figure.png",
    ):
        assert (finished / "tutorial" / name).stat().st_size > 1000


@pytest.mark.parametrize("page", list(filter(to_run, ORDER[1:])), ids=lambda page: page.name)
def test_what_a_page_says_can_be_done(page: Path, folder: Path) -> None:
    run_page(page, folder, here=True)


# ------------------------------------------------------------------------------------------------------------ the demo


def test_demo_finds_what_the_phantoms_hold(folder: Path) -> None:
    """By its real entry point, in the tutorial's folder: it does what is missing there, and takes the rest as done."""
    demo = folder / "tutorial"
    for path in (demo / "semantic").glob("phantom_2*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = call("demo", "--output", "tutorial", folder=folder)
    scores = json.loads((demo / "dice.json").read_text())
    assert set(scores) == {"phantom_1", "phantom_2"}
    with np.load(LABELS) as stored:
        labels = dict(stored)
    for stem, found in scores.items():
        assert all(f"{score:.3f}" in said for score in found.values())
        assert found["lamella"] >= 0.9
        assert min(found["membrane"], found["particle"], found["microtubule"]) >= 0.7
        assert found["filament"] >= 0.6
        with Image.open(demo / f"{stem}.png") as picture:
            assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 100
        with mrcfile.open(demo / "raw" / f"{stem}.mrc") as raw:
            assert raw.data.dtype == np.int16 and raw.data.max() == 30000  # a hot voxel
        with h5py.File(demo / "semantic" / f"{stem}_preds.h5") as file:
            assert file["labels"].shape == SHAPE
            assert np.mean(file["labels"][()] == labels[stem]) > 0.999
            assert file.attrs["voxel_size_angstrom"][0] == pytest.approx(14)


def test_models_of_the_demo_find_what_phantoms_without_the_noise_of_raw_ones_hold(folder: Path) -> None:
    """The demo's models for lamella and classes on phantoms such as they were trained on."""
    pipeline = yaml.safe_load((folder / "tutorial" / "pipeline.yaml").read_text())
    del pipeline["denoise"]
    pipeline["data_folder"] = str(folder / "phantoms")
    for model in ("lamella", "semantic"):
        pipeline[model]["prediction_folder"] = str(folder / model)
    write_yaml(folder / "phantoms.yaml", pipeline)
    (folder / "phantoms").mkdir()
    phantoms = {stem: make_phantom(seed) for stem, seed in SEEDS.items()}
    for stem, phantom in phantoms.items():
        with mrcfile.new(folder / "phantoms" / f"{stem}.mrc") as mrc:
            mrc.set_data(phantom.tomogram)
    invoke("run", "phantoms.yaml", folder=folder)
    for stem, phantom in phantoms.items():
        found = {}
        for model in ("lamella", "semantic"):
            with h5py.File(folder / model / f"{stem}_preds.h5") as file:
                found[model] = file["labels"][:]
        membrane, particle, filament, microtubule = dice(found["semantic"], phantom.truth, 5)[1:]
        assert min(dice(found["lamella"], phantom.lamella, 2)[1], membrane, particle) >= 0.8
        assert min(filament, microtubule) >= 0.6


def test_demo_needs_a_folder_that_it_can_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = call("demo", "--output", tmp_path / "file" / "demo", folder=tmp_path, status=2)
    assert "error: " in said and "--output" in said


def test_the_examples_of_the_reference_are_run_on_other_pages() -> None:
    """Or it is said there why they are not."""

    def called(page: Path) -> set[str]:
        text = "".join(b.text for b in blocks(page) if b.language == SHELL)
        return {words[1].replace("_", "-") for words in commands(text) if len(words) > 1}

    assert called(EXAMPLES) <= set().union(*map(called, ORDER))


# ----------------------------------------------------------------------------------------------- commands and options


def click_commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def commands(text: str) -> Iterator[list[str]]:
    """Each call of the program in a text, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        for match in re.finditer(r"(?:^|[\s/`\"'(])cryosiam-dask (?P<rest>[^`\n]*)", line):
            rest = re.split(r"\s(?:[|;>&]|&&|#)|[;)]", " " + match["rest"])[0]
            yield ["cryosiam-dask", *shlex.split(rest.replace("'", "").replace('"', ""))]


def known_options(name: str) -> set[str]:
    found = {option for parameter in click_commands()[name].params for option in parameter.opts}
    return found | {"--help"}


WRITTEN = [*PAGES, *sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file())]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        name = words[1].replace("_", "-") if len(words) > 1 else ""
        if name in ("--version", "--help", "--install-completion", "--show-completion") or not re.match(r"[a-z]", name):
            continue  # of the program itself, or prose
        if name not in click_commands():
            assert not any(word.startswith("--") for word in words), f"{path.name}: no such command: {' '.join(words)}"
            continue
        for word in words[2:]:
            option = word.partition("=")[0].replace("_", "-").rstrip(".,:")
            assert not option.startswith("--") or option in known_options(name), f"{path.name}: {' '.join(words)}"


#: Of other programs.
FOREIGN = {
    "--input_star", "--coords_angpix", "--nthreads", "--nworkers", "--protocol", "--signal", "--requeue", "--plugin",
    "--scheduler-file", "--config_file", "--filename", "--gres",
    "--seconds", "--only", "--fake",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    everywhere = set().union(*map(known_options, click_commands())) | {"--version"}
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in everywhere | FOREIGN, f"{page.name}: {code}"


def test_shell_scripts_can_be_parsed() -> None:
    for path in (ROOT / "configs").glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)
    for page in PAGES:
        for block in blocks(page):
            if block.language == SHELL:
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


# ---------------------------------------------------------------------------------------------------------- YAML, words


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_can_be_read(page: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    for block in blocks(page):
        if block.language == YAML:
            minimal = {"data_folder": ".", "prediction_folder": "out", "trained_model": "model.ckpt"}
            values, path = yaml.safe_load(block.text) or {}, tmp_path / "config.yaml"
            if values.keys() & set(STAGES):
                path.write_text(block.text)
                assert read_models(path)
            else:
                path.write_text(yaml.safe_dump(_merge(minimal, values)))
                read_configuration(path)


def test_configurations_can_be_read() -> None:
    ours = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "data_folder:" in path.read_text()]
    assert len(ours) >= 4
    for path in ours:
        assert read_models(path)


def test_languages_and_reasons_are_given() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in (SHELL, PYTHON, YAML, "text"), f"{page.name}:{block.line}"
        assert page.read_text().count("<!-- not run") == sum(bool(block.reason) for block in blocks(page)), page.name


def test_the_program_says_what_the_table_of_troubles_says_it_does() -> None:
    source = " ".join(path.read_text() for path in (ROOT / "cryosiam_dask").rglob("*.py"))
    joined = re.sub(r'"\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page.split("## CryoSiam's table")[1].split("\n## ")[0]
    said = [code for row in table.splitlines() for code in re.findall(r"`([^`]+)` \|$", row)]
    said += re.findall(r"^\| `([a-z ,]{15,})` \|", page, re.MULTILINE)
    assert len(said) >= 9
    for sentence in said:
        assert sentence in joined, sentence


# ------------------------------------------------------------------------------------------------------------ the site


def reference() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_program_has() -> None:
    for name, text in reference().generated().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} is outdated: run python docs/reference.py"


def test_every_key_is_explained() -> None:
    for section, model, keys in reference()._sections():
        for key in keys:
            assert len(reference()._field(model, key).description) > 15, f"{section}.{key}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as the site and forges make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists() and path.is_relative_to(ROOT), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size < 300_000 for path in (ROOT / "docs" / "images").iterdir())


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES[1:]:
        html = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', html), "fetches from a network"


# ------------------------------------------------------------------------------------------- what viewers find in files


def test_files_are_as_the_page_of_the_viewers_has_them(finished: Path) -> None:
    stem = finished / "tutorial" / "semantic" / "phantom_1"
    with h5py.File(f"{stem}_preds.h5") as file:
        labels, names = file["labels"][()], list(file["labels"].file.attrs["class_names"])
        assert labels.dtype == np.uint8 and labels.max() == len(names) == 4
    with (
        mrcfile.open(f"{stem}_labels.mrc") as written,
        mrcfile.open(finished / "tutorial" / "denoised" / "phantom_1.mrc") as tomogram,
    ):
        np.testing.assert_array_equal(written.data, labels)
        assert written.data.dtype == np.int8 and written.header.mode == 0
        assert written.voxel_size == tomogram.voxel_size and written.header.origin == tomogram.header.origin
        assert written.nstart == tomogram.nstart
        assert (written.header.mapc, written.header.mapr, written.header.maps) == (1, 2, 3)
        image = zarr.open_group(f"{stem}.ome.zarr", mode="r")
        np.testing.assert_array_equal(image["0"][:], tomogram.data)
    np.testing.assert_array_equal(image["labels/segmentation/0"][:], labels)
    multiscale = image.attrs["ome"]["multiscales"][0]
    assert [(axis["name"], axis["unit"]) for axis in multiscale["axes"]] == [(axis, "angstrom") for axis in "zyx"]
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [14, 14, 14]
    described = image["labels/segmentation"].attrs["ome"]["image-label"]
    colours = {each["label-value"]: tuple(each["rgba"][:3]) for each in described["colors"]}
    assert all(colours[label] == COLOURS[label - 1] for label in range(1, 5))
    # What cryosiam_vis opens: the keys of the YAML file, and names made of them.
    values = yaml.safe_load((finished / "tutorial" / "config_semantic.yaml").read_text())
    name = "phantom_1.mrc".split(values["file_extension"])[0] + "_preds.h5"
    assert (finished / values["data_folder"] / "phantom_1.mrc").exists()
    with h5py.File(finished / values["prediction_folder"] / name) as file:
        assert file["labels"].shape == (80, 112, 112)


def test_the_next_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]["fallback_version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    (first, *_) = re.findall("^## (.*)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert first.split()[0] == version
