"""The page of a collection: its numbers are those of the files, its words cannot become markup, and it works."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import h5py
import numpy as np
import pandas
import pytest
import yaml
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from rich.console import Console
from scipy.stats import median_abs_deviation

from cryosiam_dask.commands.report import is_current, outliers, write_report
from cryosiam_dask.commands.written import report_again, report_on
from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.errors import OutputError
from cryosiam_dask.files.mrc import write_mrc
from cryosiam_dask.files.predictions import write_hdf5
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.outcome import Outcome
from cryosiam_dask.stages.measurements import write_components
from cryosiam_dask.stages.preview import preview_file, write_preview

SHAPE = (6, 16, 18)


def configure(folder: Path, **changes: Any) -> Configuration:
    values = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
        **changes,
    }
    (folder / "out").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def make_labels(seed: int, classes: int = 2, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.7, 0, rng.integers(1, classes + 1, shape)).astype(np.uint8)


def write(folder: Path, name: str, labels: np.ndarray, *, components: bool = False, **attributes: Any) -> None:
    voxels = np.bincount(labels.ravel(), minlength=3).tolist()
    attributes = {"voxel_size_angstrom": (10.0,) * labels.ndim, "voxels": voxels, "fingerprint": name, **attributes}
    write_hdf5(folder / "out" / f"{name}_preds.h5", labels, attributes=attributes)
    if components:
        write_components(folder / "out", name, labels, work=zarr.create_group({}), attributes=attributes)


def draw(folder: Path, name: str, labels: np.ndarray, fingerprint: str | None = None) -> None:
    fingerprint = name if fingerprint is None else fingerprint
    write_preview(preview_file(folder / "out", name), labels, labels, title=name, fingerprint=fingerprint)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.heads: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.text = ""
        self._open: list[str] = []
        self._cells: list[str] = []
        self._row_picture: bytes | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("meta", "link", "img", "input", "br"):
            if tag == "img" and "tbody" in self._open:
                self._row_picture = base64.b64decode(str(dict(attributes)["src"]).partition("base64,")[2])
            return
        self._open.append(tag)
        if tag == "tr":
            self._cells, self._row_picture = [], None
        if tag in ("td", "th"):
            self._cells.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "tr" and "tbody" in self._open:
            name = self._cells[1].strip()
            self.rows[name] = [" ".join(cell.split()) for cell in self._cells]
            if self._row_picture:
                self.pictures[name] = self._row_picture
        if tag == "tr" and "thead" in self._open:
            self.heads += [" ".join(cell.split()) for cell in self._cells]

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._open[-1:] != ["style"]:
            self.text += data
            if self._cells and {"td", "th"} & set(self._open):
                self._cells[-1] += data


# ------------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    configuration = configure(tmp_path, class_names=["membrane", "actin"], mask_folder=str(tmp_path / "masks"))
    (tmp_path / "masks").mkdir()
    stored = {f"TS_{n}": make_labels(n) for n in (1, 2, 10)}
    for name, labels in stored.items():
        write(tmp_path, name, labels, components=True)
        mask = np.zeros((3, 8, 9), np.uint8)
        mask[: int(name[3:]) % 4] = 1
        thick = mask.sum(axis=0).max()
        counts = {"voxels": np.bincount(mask.ravel(), minlength=2).tolist(), "thickness_voxels": [thick] * 3}
        counts = {"voxel_size_angstrom": (10.0,) * 3} | ({} if name == "TS_2" else counts)  # or they are counted
        write_hdf5(tmp_path / "masks" / f"{name}_preds.h5", mask, attributes=counts)
    page = Page(write_report(configuration, {"TS_2": {"status": "done", "seconds": 3725.0}}))
    assert list(page.rows) == ["TS_1", "TS_2", "TS_10"]  # as people count
    assert [page.rows[name][5] for name in stored] == ["33 %", "67 %", "67 %"]
    assert page.heads[page.heads.index("lamella") + 1] == "thickness, nm"
    assert [page.rows[name][6] for name in stored] == ["1 (1 to 1)", "2 (2 to 2)", "2 (2 to 2)"]
    table = pandas.concat(pandas.read_csv(path) for path in (tmp_path / "out").glob("*_components.csv"))
    for name, labels in stored.items():
        cells = page.rows[name]
        assert cells[1:5] == [name, "done", "6 × 16 × 18", "10 (1)"]
        for label, first in ((1, 7), (2, 11)):
            own = table[(table["tomogram"] == name) & (table["class"] == label)]
            of_lamella = (labels == label).mean() / (1 / 3 if name == "TS_1" else 2 / 3)
            assert cells[first] == f"{100 * of_lamella:.0f} %"
            assert int(cells[first + 1]) == len(own) > 3
            assert float(cells[first + 2]) == pytest.approx(own["volume_nm3"].median(), rel=0.005)
            assert float(cells[first + 3].replace(",", "")) == pytest.approx(own["volume_nm3"].max(), rel=0.005)
    assert [page.rows[name][-1] for name in stored] == ["", "1 h 02 min", ""]
    assert "membrane" in page.heads and "actin" in page.heads and "median size, nm³" in page.heads


def test_sizes_are_in_voxels_where_a_voxel_size_is_unknown(tmp_path: Path) -> None:
    labels = make_labels(0)
    configuration = configure(tmp_path)
    write(tmp_path, "a", labels, components=True)
    write(tmp_path, "b", labels, components=True, voxel_size_angstrom=(None, 10.0, 10.0), class_names=["ribosome"])
    page = Page(write_report(configuration))
    assert "median size, voxels" in page.heads and page.rows["a"][5:] == page.rows["b"][5:]
    assert page.rows["b"][4] == "? × 10 × 10 (? × 1 × 1)" and "ribosome" in page.heads and "class 2" in page.heads


def test_predictions_of_other_programs_are_counted(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    labels = make_labels(3, classes=4)
    for name, values in (("a", labels), ("b", labels.astype(np.int64)), ("c", labels.astype(float)),
                         ("d", labels.astype(int) - 1), ("e", labels[0])):  # fmt: skip
        with h5py.File(tmp_path / "out" / f"{name}_preds.h5", "w") as file:
            file["labels"] = values
    (tmp_path / "out" / "f_preds.h5").write_bytes(b"damaged")
    page = Page(write_report(configuration))
    shares = [f"{100 * (labels == label).mean():.2g} %" for label in range(1, 5)]
    assert page.rows["a"][5:] == page.rows["b"][5:] == shares
    assert page.rows["e"][3] == "16 × 18" and page.rows["e"][4] == ""
    for name, words in {"c": "whole numbers", "d": "between 0 and 255", "f": "readable HDF5"}.items():
        assert "failed" in page.rows[name][2] and words in page.rows[name][2]


@pytest.mark.parametrize(
    "attributes",
    [
        {"voxel_size_angstrom": 5.0},
        {"voxel_size_angstrom": "ten"},
        {"voxel_size_angstrom": ["a", "b", "c"]},
        {"voxel_size_angstrom": [1.5, 2.5]},
        {"class_names": 7},
        {"class_names": "actin"},
        {"warnings": [1, 2]},
        {"voxels": [0.5, 2.5]},
    ],
)
def test_what_other_programs_mean_by_our_words_spoils_no_page(tmp_path: Path, attributes: dict[str, Any]) -> None:
    configuration, labels = configure(tmp_path), make_labels(3)
    write(tmp_path, "a", labels)
    with h5py.File(tmp_path / "out" / "a_preds.h5", "r+") as file:
        file.attrs.update(attributes)
    page = Page(write_report(configuration))
    assert page.rows["a"][5:7] == [f"{100 * (labels == label).mean():.2g} %" for label in (1, 2)]


def test_what_the_run_knows_is_put_to_what_the_files_tell(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    write(tmp_path, "warned", make_labels(0), warnings="3 voxels are NaN\nlook here")
    write(tmp_path, "again", make_labels(1))
    write(tmp_path, "damaged", make_labels(1), components=True)
    (tmp_path / "out" / "damaged_components.parquet").write_bytes(b"damaged")
    outcomes = {
        "warned": {"status": "done", "seconds": 4.25, "warnings": ("3 voxels are NaN", "another"), "notes": ["<b>"]},
        "again": {"status": "skipped", "shape": (), "seconds": 0.0, "voxels": (), "warnings": (), "error": ""},
        "gone": {"status": "failed", "error": "gone.mrc: must be complete"},
        "odd": {},
    }
    page = Page(write_report(configuration, outcomes))
    assert page.rows["warned"][2] == "done 3 warnings 3 voxels are NaNanotherlook here 1 note <b>"
    assert page.rows["warned"][-1] == "4.2 s" and page.rows["again"][2] == "up to date"
    assert page.rows["again"][5] == f"{100 * (make_labels(1) == 1).mean():.0f} %"
    assert page.rows["gone"][2] == "failed gone.mrc: must be complete" and page.rows["odd"][2] == "no output"
    assert "table of components must be readable" in page.rows["damaged"][2]
    looks = [a.get("id") for tag, a in page.elements if tag == "tr" and "data-look" in a]
    assert len(looks) == 4  # all but "again"
    assert "5 tomograms" in " ".join(page.text.split()) and "2 failed" in " ".join(page.text.split())


def test_names_that_are_too_long_for_the_disk_spoil_no_page(tmp_path: Path) -> None:
    outcomes = {"x" * length: {"status": "failed", "error": "its name is too long"} for length in (220, 240, 260)}
    assert set(Page(write_report(configure(tmp_path), outcomes)).rows) == set(outcomes)


def test_warnings_about_a_whole_run_stand_on_this_page_and_later_ones(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    write(tmp_path, "run", make_labels(0))
    sentence = "patch_size is [<b>32</b>], but the model was trained with 16"
    assert sentence in Page(write_report(configuration, warnings=[sentence])).text
    assert sentence in Page(write_report(configuration)).text
    assert sentence not in Page(write_report(configuration, warnings=[])).text
    assert "trained" not in Page(write_report(configuration)).text


def test_title_outliers_and_histograms(tmp_path: Path) -> None:
    """Of a data set and a model; an outlier says how far it lies from the others; few tomograms make no histogram."""
    names = ["membrane", "actin", "ribosome", "filament", "microtubule"]
    configuration = configure(tmp_path, class_names=names, data_folder=str(tmp_path / "EMPIAR-1" / "denoised"))
    for n in range(4):
        labels = np.zeros((10, 10, 10), np.uint8)
        labels[0, : 8 if n else 4] = 1  # 8 % of the volume
        write(tmp_path, f"t{n}", labels, voxels=np.bincount(labels.ravel(), minlength=6).tolist())
    few = write_report(configuration)
    assert "<title>EMPIAR-1/denoised, model: 4 tomograms</title>" in few.read_text()
    page = Page(few)
    assert "EMPIAR-1/denoised, model" in page.text and "svg" not in {tag for tag, _ in page.elements}
    for n, share in enumerate((8, 8, 76), 4):
        labels = np.zeros((10, 10, 20), np.uint8)
        labels[0 : 10 if share > 10 else 1, :8] = 1
        write(tmp_path, f"t{n}", labels, voxels=np.bincount(labels.ravel(), minlength=6).tolist())
    page = Page(write_report(configuration))
    assert page.rows["t6"][2] == "done membrane unusually high: 80 % (median 8 %)"
    assert sum(tag == "svg" for tag, _ in page.elements) == 1  # there is nothing of the other classes


def test_a_lamella_model_tells_the_thickness(tmp_path: Path) -> None:
    parameters = {"network": {"postprocessing": True}}
    configuration = configure(tmp_path, parameters=parameters)
    labels = np.zeros((10, 10, 20), np.uint8)
    labels[2:8, :5], labels[3:5, 5:] = 1, 1
    told = {"thickness_voxels": (4.0, 2, 6)}
    for name, attributes in {"counted": {"voxels": None}, "told": told, "earlier version": {}}.items():
        write(tmp_path, name, labels, **attributes)
    write(tmp_path, "unknown", labels, voxel_size_angstrom=(None, 10.0, 10.0), **told)
    page = Page(write_report(configuration))
    assert page.rows["earlier version"][5:7] == ["", "40 %"]
    assert "thickness, nm" in page.heads and "lamella" in page.heads
    assert page.rows["counted"][5:7] == page.rows["told"][5:7] == ["4 (2 to 6)", "40 %"]
    # Of a mask of CryoSiam's, which tells nothing of itself.
    (tmp_path / "masks").mkdir()
    with h5py.File(tmp_path / "masks" / "told_preds.h5", "w") as file:
        file["labels"] = labels
    of_semantic = Page(write_report(configure(tmp_path, mask_folder=str(tmp_path / "masks"))))
    assert of_semantic.rows["told"][5:7] == ["40 %", "4 (2 to 6)"]
    assert page.rows["unknown"][5:7] == ["4 (2 to 6) voxels", "40 %"]


def test_mrc_outputs(tmp_path: Path) -> None:
    configuration = configure(tmp_path, save_original_file_extension=True, file_extension=".mrc.gz")
    write_mrc(tmp_path / "out" / "TS_1.mrc", make_labels(0), voxel_size_angstrom=(10.0,) * 3)
    page = Page(write_report(configuration, {"TS_1": {"status": "done", "voxels": (75, 25), "seconds": 90.0}}))
    assert page.rows["TS_1"][2:] == ["done", "6 × 16 × 18", "10 (1)", "25 %", "2 min"]


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Run semantic-predict first"):
        write_report(configure(tmp_path))
    assert not (tmp_path / "out" / "report.html").exists()


def test_pictures_are_those_of_the_labels(tmp_path: Path) -> None:
    configuration, labels = configure(tmp_path), make_labels(0)
    for name in ("drawn", "outdated", "none"):
        write(tmp_path, name, labels)
    draw(tmp_path, "drawn", labels)
    draw(tmp_path, "outdated", labels, fingerprint="other")
    page = Page(write_report(configuration))
    assert set(page.pictures) == {"drawn"} and page.rows["none"][0] == page.rows["outdated"][0] == "no preview"
    (link,) = (a for tag, a in page.elements if tag == "a" and a.get("href") == "drawn_preview.png")
    assert (tmp_path / "out" / str(link["href"])).exists()
    (image,) = (a for tag, a in page.elements if tag == "img" and a.get("loading") == "lazy")
    assert "drawn" in str(image["alt"])
    (tmp_path / "out" / "picture.webp").write_bytes(page.pictures["drawn"])
    with Image.open(tmp_path / "out" / "picture.webp") as picture:
        assert picture.format == "WEBP" and picture.width == pytest.approx(2 * picture.height * 18 / 16, abs=3)


def test_what_was_read_once_is_kept_until_an_output_changes(tmp_path: Path) -> None:
    configuration, labels = configure(tmp_path, class_names=["membrane", "actin"]), make_labels(0)
    for name in ("a", "b", "c"):
        write(tmp_path, name, labels, components=name != "c", warnings="look")
    draw(tmp_path, "a", labels)
    before = Page(write_report(configuration))
    for name in ("a", "b"):  # nobody looks into them again
        path = tmp_path / "out" / f"{name}_preds.h5"
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = Page(write_report(configuration))
    assert (after.rows, after.pictures) == (before.rows, before.pictures) and before.pictures
    (tmp_path / "out" / "b_preds.h5").touch()
    (tmp_path / "out" / ".ledger" / "report" / "a.json").write_bytes(b"damaged")
    write(tmp_path, "c", labels, warnings="other")
    page = Page(write_report(configuration))
    assert [page.rows[name][2].split()[0] for name in "abc"] == ["failed", "failed", "done"]
    assert "other" in page.rows["c"][2]


def test_a_page_of_what_is_there_is_left_alone(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    for name in ("a", "b"):
        write(tmp_path, name, make_labels(0))

    def is_written(configuration: Configuration = configuration) -> bool:
        current = is_current(configuration)
        if not current:
            write_report(configuration)
        return not current

    assert [is_written(), is_written()] == [True, False]
    (tmp_path / "out" / "a_preds.h5").touch()
    assert [is_written(), is_written()] == [True, False]
    (tmp_path / "out" / "b_preds.h5").unlink()
    assert [is_written(), is_written()] == [True, False]
    assert is_written(configure(tmp_path, class_names=["x", "y"]))


def test_a_page_tells_of_tomograms_without_a_mask_and_of_the_time_of_the_prediction(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    configuration = configure(tmp_path, mask_folder=str(masks))
    (tmp_path / "data").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "data" / f"{name}.mrc").touch()
    write(tmp_path, "a", make_labels(0))
    Ledger(tmp_path / "out", "a").close(status="done", seconds=3725.0, shape=SHAPE)
    for name in ("b", "elsewhere"):
        Ledger(masks, name).close(status="failed", error=f"{name}.mrc is damaged", seconds=1.0, shape=())
    console = Console(file=io.StringIO())
    report_on(configuration, [Outcome("a", "done", SHAPE, 1.5)], console)  # of semantic-postprocess
    page = Page(tmp_path / "out" / "report.html")
    assert page.rows["a"][-1] == "1 h 02 min"
    assert page.rows["b"][2] == "failed it has no lamella mask: b.mrc is damaged" and set(page.rows) == {"a", "b"}
    (tmp_path / "out" / "report.html").unlink()
    report_again(configuration, console)
    assert Page(tmp_path / "out" / "report.html").rows == page.rows


def test_a_page_of_500_tomograms_is_below_20_megabytes(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    noise = np.random.default_rng(0).random((200, 200, 200), np.float32)
    write_preview(preview_file(tmp_path / "out", "t0"), noise, (noise * 9).astype(np.uint8))
    for n in range(1, 500):
        os.link(preview_file(tmp_path / "out", "t0"), preview_file(tmp_path / "out", f"t{n}"))
    path = write_report(configuration, {f"t{n}": {"status": "done", "warnings": ["w" * 200] * 5} for n in range(500)})
    assert path.stat().st_size < 20e6 and len(Page(path).pictures) == 500


# ------------------------------------------------------------------------------------------------------------ outliers


def test_outliers_are_far_from_the_median() -> None:
    assert outliers([1.0] * 9 + [1.3]) == [""] * 9 + ["high"]  # the median deviation is 0
    assert outliers([0.042] * 9 + [0.04]) == [""] * 10  # all are nearly the same
    assert outliers([0.5] * 6) == [""] * 6 and outliers([]) == [] and outliers([0, 0, 0, 9]) == [""] * 4
    assert outliers([None, 5, 5.1, 4.9, 5, 0.1, 5.2, None]) == ["", "", "", "", "", "low", "", ""]


@given(values=arrays(np.float64, st.integers(5, 60), elements=st.integers(0, 1000).map(lambda n: n / 1000)))
def test_outliers_are_those_of_scipy(values: np.ndarray) -> None:
    deviation = median_abs_deviation(values, scale="normal")
    found = np.array([bool(outlier) for outlier in outliers(values.tolist())])
    if deviation:
        median = np.median(values)
        distance, effect = np.abs(values - median) / deviation, np.abs(values - median) - median / 4
        clear = (np.abs(distance - 3.5) > 1e-3) & (np.abs(effect) > 1e-6)
        np.testing.assert_array_equal(found[clear], ((distance > 3.5) & (effect > 0))[clear])
    assert found.sum() < len(values) / 2


# --------------------------------------------------------------------------------------------------------------- words

EVIL = '"><img src=x onerror="window.pwned=1"><script>window.pwned=1<\\script>\'{{ 7*7 }}{% raw %}&lt;‮'
WORSE = "</style></script><script>window.pwned=1</script><a href='javascript:window.pwned=1'>x</a><!-- ]]>"


def evil_collection(folder: Path) -> Configuration:
    out = folder / EVIL[:60]
    out.mkdir()
    (folder / "out").symlink_to(out)
    configuration = configure(folder, prediction_folder=str(out)).model_copy(
        update={"class_names": (WORSE, EVIL), "trained_model": folder / EVIL}
    )
    write(folder, EVIL, make_labels(0), warnings=WORSE, components=True)
    draw(folder, EVIL, make_labels(0))
    write(folder, "javascript:alert(1)#?%41", make_labels(1))
    draw(folder, "javascript:alert(1)#?%41", make_labels(1))
    return configuration


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    configuration = evil_collection(tmp_path)
    outcomes = {WORSE: {"status": WORSE, "error": WORSE, "warnings": [EVIL]}, "b\udcff": {"error": "\udcff \x00"}}
    page = Page(write_report(configuration, outcomes))
    assert len(page.scripts) == 1 and "pwned" not in page.scripts[0]
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "p", "ul", "li", "b", "main",
        "section", "div", "figure", "figcaption", "i", "bdi", "svg", "rect", "line", "text", "circle", "label", "input",
        "output", "table", "caption", "thead", "tbody", "tr", "th", "td", "button", "span", "img", "details", "summary",
        "dialog", "script",
    }  # fmt: skip
    links = [str(a["href"]) for tag, a in page.elements if tag == "a" and "href" in a]
    previews = {link for link in links if not link.startswith("#")}
    names = {os.fsdecode(unquote_to_bytes(link)) for link in previews}
    assert names == {f"{EVIL}_preview.png", "javascript:alert(1)#?%41_preview.png"}
    assert all(link.replace("%", "").replace("_preview.png", "").isascii() and ":" not in link for link in previews)
    assert EVIL in page.rows and WORSE in page.rows and "b?" in page.rows
    assert " ".join(WORSE.split()) in page.rows[WORSE][2] and page.text.count("{{ 7*7 }}") >= 4
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy) and "script-src 'sha256-" in str(policy)
    assert not any("http" in str(a.get(key, "")) for _, a in page.elements for key in ("src", "href"))


# ----------------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    with playwright.sync_playwright() as driver:
        candidates = ["chromium", "chromium-browser", "google-chrome", driver.chromium.executable_path]
        found = next(filter(None, map(shutil.which, candidates)), None)
        if not found:
            pytest.skip("no Chromium: install one, or run 'playwright install chromium'")
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A page of 200 tomograms, of which the first 4 have previews, TS_7 has much of a class, and TS_150 failed."""
    folder = tmp_path_factory.mktemp("collection")
    configuration = configure(folder, class_names=["membrane", "Träger <b>"])
    stored = {}
    for n in range(1, 201):
        if n == 150:
            continue
        labels = make_labels(n)
        if n == 7:
            labels[:, :8] = 2
        stored[f"TS_{n}"] = labels
        warnings = "every voxel is background" if n == 42 else ""
        write(folder, f"TS_{n}", labels, components=n < 20, warnings=warnings)
        if n < 5:
            draw(folder, f"TS_{n}", labels)
    return write_report(configuration, {"TS_150": {"status": "failed", "error": "TS_150.mrc: truncated"}}), stored


@pytest.fixture
def page(browser: Any, collection: tuple[Path, Any]) -> Iterator[Any]:
    """The page of the collection; nothing may fail in it, and nothing be asked of a network."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else faults.append(r.url))
    page.goto(collection[0].as_uri())
    yield page
    context.close()
    assert faults == []


def until(page: Any, condition: str) -> None:
    """Wait for something; the page's policy forbids the browser to do it."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"waited in vain: {condition}")


def names(page: Any) -> list[str]:
    found: list[str] = page.locator("tbody tr:visible th").all_inner_texts()
    return found


def test_browser_sorts(page: Any, collection: tuple[Path, dict[str, np.ndarray]]) -> None:
    stored = collection[1]
    share = {name: (labels == 1).mean() for name, labels in stored.items()}
    head = page.get_by_role("button", name="membrane: share")
    head.click()
    found = names(page)
    assert found[-1] == "TS_150" and set(found[:-1]) == set(stored)  # a failed one has no share
    assert [share[name] for name in found[:-1]] == sorted(share.values())
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    head.focus()
    page.keyboard.press("Enter")
    found = names(page)
    assert found[-1] == "TS_150" and [share[name] for name in found[:-1]] == sorted(share.values(), reverse=True)
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="name", exact=True).click()
    assert names(page) == [f"TS_{n}" for n in range(1, 201)]
    page.get_by_role("button", name="status", exact=True).click()
    page.get_by_role("button", name="status", exact=True).click()
    assert names(page)[:2] == ["TS_150", "TS_42"] and "TS_7" in names(page)[:6]  # the worst first
    assert page.locator("[aria-sort]").count() == 1


def test_browser_filters(page: Any) -> None:
    shown, find, look = page.locator("#shown"), page.get_by_role("searchbox"), page.get_by_label("only those that need")
    assert shown.inner_text() == "200 of 200"
    find.fill("ts_1 ")
    assert len(names(page)) == 111 and shown.inner_text() == "111 of 200"
    find.fill("BACKGROUND every")
    assert names(page) == ["TS_42"]
    find.fill("nowhere")
    assert names(page) == [] and page.get_by_text("No tomogram matches").is_visible()
    find.fill("")
    look.check()
    assert {"TS_7", "TS_42", "TS_150"} <= set(names(page)) and len(names(page)) < 10
    # A dot of a histogram leads to its row, also where the filter had hidden it.
    find.fill("TS_42")
    page.get_by_role("link", name=re.compile("^TS_7: ")).last.click()
    until(page, "document.querySelector(':target th').innerText === 'TS_7'")
    assert page.locator(":target").is_visible() and shown.inner_text() == "200 of 200"


def test_browser_shows_the_previews(page: Any) -> None:
    first = page.get_by_role("link", name="Preview of TS_2:")
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="TS_2")
    assert dialog.is_visible()
    until(page, "document.getElementById('large').naturalWidth > 1000")
    assert page.locator("#alone").get_attribute("href").endswith("/TS_2_preview.png")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("dialog", name="TS_3").is_visible()
    for _ in range(2):
        page.get_by_role("button", name="Next tomogram").click()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("dialog", name="TS_4").is_visible()  # after the last comes the first
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    # The focus goes back to the picture that was opened.
    assert "TS_2:" in page.evaluate("document.activeElement.firstElementChild.alt")


def test_browser_layouts(page: Any) -> None:
    head = page.get_by_role("button", name="Träger <b>: number")
    assert head.count() == 0  # hidden at first
    page.get_by_label("numbers and sizes").check()
    assert head.is_visible()
    page.get_by_label("contact sheet").check()
    boxes = [page.locator("tbody tr").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side
    for width in (360, 900):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_label("contact sheet").uncheck()
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # only the table itself scrolls


@pytest.fixture(scope="module")
def wide_collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of five classes and a lamella, with long names and a tall picture."""
    folder = tmp_path_factory.mktemp("wide")
    names = ["membrane", "ribosome", "actin filament", "microtubule", "energy-rich particle"]
    configuration = configure(folder, class_names=names, mask_folder=str(folder / "masks"))
    (folder / "masks").mkdir()
    outcomes: dict[str, Any] = {"Position_02_TS_099": {"status": "failed", "error": "its header is damaged " * 9}}
    for n in range(1, 8):
        name = f"Position_01_lamella3_TS_{n:03d}_9.96Apx_denoised"
        labels = make_labels(n, classes=5)
        write(
            folder,
            name,
            labels,
            warnings="look at this tomogram\n" * 9 if n == 2 else "",
            voxel_size_angstrom=(9.96,) * 3,
        )
        told = {"voxels": [50, 50], "thickness_voxels": (101.5, 90, 123), "voxel_size_angstrom": (9.96,) * 3}
        write_hdf5(folder / "masks" / f"{name}_preds.h5", labels, attributes=told)
        outcomes[name] = {"status": "done", "seconds": 3725.0, "shape": (400, 1024, 1440)}
        if n < 3:
            draw(folder, name, make_labels(n, shape=(90, 40, 16)), fingerprint=name)
    return write_report(configuration, outcomes)


@pytest.fixture
def wide(browser: Any, wide_collection: Path) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.goto(wide_collection.as_uri())
    yield page
    context.close()


SCROLLS = "(({scrollWidth, clientWidth}) => scrollWidth - clientWidth)(document.querySelector('.scroller'))"


def test_browser_shows_all_columns_of_five_classes(wide: Any) -> None:
    assert wide.locator("thead th.group").count() == 5 and wide.evaluate(SCROLLS) == 0


def test_browser_keeps_name_and_status_on_a_narrow_screen(wide: Any) -> None:
    wide.set_viewport_size({"width": 420, "height": 800})
    wide.evaluate("document.querySelector('.scroller').scrollLeft = 9999")
    assert wide.evaluate(SCROLLS) > 300
    box = wide.get_by_role("rowheader", name="Position_02_TS_099").bounding_box()
    assert box["x"] < 20 and box["x"] + box["width"] < 250
    assert wide.evaluate("getComputedStyle(document.querySelector('.name.failed'), '::after').display") == "block"


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (420, 800)])
def test_browser_fits_the_dialog_to_the_window(wide: Any, width: int, height: int) -> None:
    wide.set_viewport_size({"width": width, "height": height})
    wide.get_by_role("link", name=re.compile("TS_002")).click()
    dialog = wide.get_by_role("dialog", name=re.compile("TS_002"))
    until(wide, "document.getElementById('large').naturalWidth > 500")
    assert dialog.get_by_text("look at this tomogram").first.is_visible()  # without another click
    window, bar, picture = (each.bounding_box() for each in (dialog, dialog.locator(".bar"), dialog.locator("img")))
    assert 0 <= window["y"] and window["y"] + window["height"] <= height and window["width"] <= width
    assert picture["y"] >= bar["y"] + bar["height"] and picture["height"] > 150
    assert picture["y"] + picture["height"] <= window["y"] + window["height"] + 1
    assert wide.evaluate(
        "(({scrollHeight, clientHeight}) => scrollHeight <= clientHeight)(document.getElementById('viewer'))"
    )


def test_browser_prints_the_whole_page(wide: Any) -> None:
    """In dark colours as well, with warnings opened, and each row on one page of A4."""
    wide.emulate_media(color_scheme="dark", media="print")
    wide.set_viewport_size({"width": 1047, "height": 700})  # 277 mm
    assert wide.evaluate("document.documentElement.scrollWidth") <= 1047 and wide.evaluate(SCROLLS) <= 0
    assert wide.evaluate("getComputedStyle(document.body).color") == "rgb(28, 29, 34)"
    assert wide.evaluate("getComputedStyle(document.querySelector('.scroller')).maxHeight") == "none"
    wide.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert wide.locator("tbody details:not([open])").count() == 0
    wide.evaluate("dispatchEvent(new Event('afterprint'))")
    assert wide.locator("tbody details[open]").count() == 0


CONTRAST = """
() => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/rgba\\(.*, 0\\)/.test(c)) return c;
    }
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest("script, .unseen, td:nth-child(n+6)")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest("svg") ? style.fill : style.color), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim()]);
  }
  return found;
}
"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_words_can_be_read(page: Any, scheme: str) -> None:
    """4.5 to 1 is what WCAG 2 asks of text."""
    page.emulate_media(color_scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert len(found) > 500
    assert [words for contrast, words in found if contrast < 4.5] == []


def test_browser_is_not_led_astray(browser: Any, tmp_path: Path) -> None:
    configuration = evil_collection(tmp_path)
    path = write_report(configuration, {WORSE: {"status": WORSE, "error": WORSE, "warnings": [EVIL]}})
    page = browser.new_page()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.goto(path.as_uri())
    for link in page.locator("td.picture a").all():
        link.click()
        until(page, "document.getElementById('large').naturalWidth > 1000")  # it is found under its name
        page.keyboard.press("Escape")
    page.get_by_label("contact sheet").check()
    page.get_by_role("searchbox").fill("<script>")
    assert page.locator("tbody tr:visible").count() == 2
    assert page.evaluate("window.pwned") is None
    # A script that someone wrote into the page would not run.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 1'}))")
    assert page.evaluate("window.pwned") is None
    page.close()


def test_shares_of_images_are_not_those_of_a_volume(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    write(tmp_path, "image", make_labels(0, shape=(20, 30)))
    page = Page(write_report(configuration))
    assert "those of the image" in page.text and "shape (y, x)" in " ".join(page.heads)
    write(tmp_path, "volume", make_labels(0))
    page = Page(write_report(configuration))
    assert "those of the volume" in page.text and "shape (z, y, x)" in " ".join(page.heads)
