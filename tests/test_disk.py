"""Disks that are full, read-only, or others than the output's: real ones, mounted where nobody else sees them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from cryosiam_dask.errors import OutputError
from cryosiam_dask.files.mrc import write_mrc
from cryosiam_dask.files.predictions import write_hdf5
from cryosiam_dask.stages.export import remove_outdated_formats
from cryosiam_dask.stages.ome_zarr import write_ome_zarr
from cryosiam_dask.stages.preview import write_preview
from support import checkpoints
from support.command import COMMAND, contents, invoke
from support.inputs import write_tomogram, write_yaml

STEMS = ("TS_0", "TS_1", "TS_2")
RUN = ("semantic-predict", "--config-file", "config.yaml", "--device", "cpu", "--workers", "1")


class Mounts:
    """A process in a mount namespace of its own, in which an ordinary user may mount; it ends with the test."""

    def __init__(self) -> None:
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", "echo ready; exec sleep 1000"]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._holder.stdout
        said = self._holder.stdout.readline().strip()
        if said != "ready":
            self.close()
            pytest.skip(f"no mount namespaces on this machine: {said}")

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()

    def call(self, *command: object, folder: Path) -> tuple[int, str]:
        """Run a command among these mounts; returns its status and what it printed."""
        enter = [
            "nsenter",
            "--target",
            str(self._holder.pid),
            "--user",
            "--mount",
            "--preserve-credentials",
            "sh",
            "-c",
        ]
        done = subprocess.run(
            [*enter, 'cd "$0" && exec "$@"', folder, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        )
        assert "Traceback" not in done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr

    def mount(self, *options: object, folder: Path) -> None:
        status, said = self.call("mount", *options, folder=folder)
        if status:
            pytest.skip(f"nothing can be mounted on this machine: {said.strip()}")

    def seen(self, path: Path) -> Path:
        """Where this process sees what lies at `path` among these mounts."""
        return Path(f"/proc/{self._holder.pid}/root{path}")


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    try:
        mounts = Mounts()
    except FileNotFoundError as error:
        pytest.skip(f"no mount namespaces on this machine: {error}")
    yield mounts
    mounts.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tomograms, and in ``whole`` what a run makes of them where there is room."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "data").mkdir()
    for seed, stem in enumerate(STEMS):
        write_tomogram(folder / "data" / f"{stem}.mrc", seed, (24, 48, 48))
    checkpoints.write(folder / "model.ckpt", seed=35)
    values = {"data_folder": "data", "prediction_folder": "out", "trained_model": "model.ckpt", "block_size": 16}
    write_yaml(folder / "config.yaml", {**values, "components": True, "save_internal_files": True})
    invoke(*RUN, folder=folder)
    (folder / "out").rename(folder / "whole")
    for name in ("out", "work"):
        (folder / name).mkdir()
    return folder


@pytest.mark.parametrize("kilobytes", [150, 900])
def test_a_disk_that_is_full_ends_the_run_and_more_room_completes_it(
    whole: Path, mounts: Mounts, kilobytes: int
) -> None:
    """Full while the tomogram is copied, and later."""
    out = mounts.seen(whole / "out")
    mounts.mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "none", "out", folder=whole)
    status, said = mounts.call(COMMAND, *RUN, folder=whole)
    assert status == 1, said
    assert "No space left on device" in said and "Free space" in said
    # As plan says before.
    assert re.search(r"warning: out: (there must be .* of free disk space|up to .* may be needed)", said), said
    assert "stopping: all other tomograms would fail with the error of the first one" in said
    assert re.search(r"TS_2\W+left", said)
    expected = contents(whole / "whole")
    for path in out.iterdir():  # complete, or not there; but for what the same command goes on from
        if path.name not in (".ledger", "logs", "report.html", "TS_0.work.zarr"):
            assert path.read_bytes() == expected[path.name], path
    mounts.mount("-o", "remount,size=100m", "out", folder=whole)
    status, said = mounts.call(COMMAND, *RUN, folder=whole)
    assert status == 0, said
    assert contents(out) == expected and not list(out.glob(".TS*")) and not list(out.glob("*.zarr"))


def test_an_output_folder_that_is_read_only_is_said_before_anything_is_done(whole: Path, mounts: Mounts) -> None:
    mounts.mount("-t", "tmpfs", "-o", "ro", "none", "out", folder=whole)
    status, said = mounts.call(COMMAND, *RUN, folder=whole)
    assert status == 2, said
    assert "key prediction_folder" in said and "read-only" in said
    assert not list(mounts.seen(whole / "out").iterdir())


def test_a_work_folder_on_another_disk(whole: Path, mounts: Mounts) -> None:
    configuration = (whole / "config.yaml").read_text()
    (whole / "other.yaml").write_text(f"{configuration}work_folder: work\n")
    mounts.mount("-t", "tmpfs", "-o", "size=100m", "none", "work", folder=whole)
    mounts.mount("-t", "tmpfs", "-o", "size=100m", "none", "out", folder=whole)
    out, work = (mounts.seen(whole / name) for name in ("out", "work"))
    assert len({path.stat().st_dev for path in (out, work, whole)}) == 3
    status, said = mounts.call(
        COMMAND, *(name if name != "config.yaml" else "other.yaml" for name in RUN), folder=whole
    )
    assert status == 0, said
    assert not list(work.iterdir())
    found, expected = contents(out), contents(whole / "whole")
    for stem in STEMS:  # these also tell where the work was done
        del found[f"{stem}_preds.h5"], expected[f"{stem}_preds.h5"]
        with h5py.File(out / f"{stem}_preds.h5") as one, h5py.File(whole / "whole" / f"{stem}_preds.h5") as other:
            assert set(one) == set(other) >= {"labels", "probs"}
            assert all(np.array_equal(one[name][:], other[name][:]) for name in other)
    assert found == expected


def test_outputs_that_are_links_are_followed(tmp_path: Path) -> None:
    """To a larger disk: what they lead to is replaced, and the links stay."""
    out, big = tmp_path / "out", tmp_path / "big"
    out.mkdir(), big.mkdir()
    labels = np.ones((4, 5, 6), np.uint8)
    (big / "a.ome.zarr").mkdir()
    for name in ("a.ome.zarr", "a_preds.h5", "a_preview.png", "a_labels.mrc"):
        (out / name).symlink_to(big / name)
    for _ in range(2):
        write_ome_zarr(out / "a.ome.zarr", labels.astype(np.float32), labels, attributes={"fingerprint": "f"})
        write_hdf5(out / "a_preds.h5", labels, attributes={})
        write_mrc(out / "a_labels.mrc", labels)
        write_preview(out / "a_preview.png", labels, labels)
        assert sorted(path.name for path in out.iterdir() if not path.is_symlink()) == []
        names = ["a.ome.zarr", "a_labels.mrc", "a_preds.h5", "a_preview.png"]
        assert sorted(path.name for path in big.iterdir()) == names
        assert (big / "a.ome.zarr" / "labels").is_dir() and (big / "a_preds.h5").stat().st_size
    assert "ome-zarr" in remove_outdated_formats(out, "a", "other")[0]
    assert not (big / "a.ome.zarr").exists() and (out / "a.ome.zarr").is_symlink() and big.is_dir()
    for name in ("b.ome.zarr", "b_preds.h5"):
        (out / name).symlink_to(tmp_path / "not_mounted" / name)
    with pytest.raises(OutputError, match=r"b_preds.h5: an output must not be a broken link; found .*not_mo"):
        write_hdf5(out / "b_preds.h5", labels, attributes={})
    with pytest.raises(OutputError, match=r"b.ome.zarr: an output must not be a broken link"):
        write_ome_zarr(out / "b.ome.zarr", labels, labels)
    assert not (tmp_path / "not_mounted").exists()


def test_folders_that_may_not_be_looked_into_are_named(tmp_path: Path) -> None:
    """By each command, with status 2 and the key; the superuser gives the right away that he has."""
    (tmp_path / "data").mkdir(), (tmp_path / "out").mkdir(), (tmp_path / "masks").mkdir()
    write_tomogram(tmp_path / "data" / "TS_0.mrc")
    (tmp_path / "out" / "TS_0_preds.h5").touch()
    checkpoints.write(tmp_path / "model.ckpt")
    keys = {"prediction_folder": "out", "trained_model": "model.ckpt"}
    write_yaml(tmp_path / "c.yaml", {"data_folder": "data", "mask_folder": "masks", **keys})
    write_yaml(tmp_path / "home.yaml", {"data_folder": "~nobody_has_this_name/data", **keys})
    script = (
        "import io, sys; from pathlib import Path; from rich.console import Console\n"
        "from cryosiam_dask.errors import CryosiamDaskError\n"
        "from cryosiam_dask import config\n"
        "from cryosiam_dask.commands import plan, status\n"
        "from cryosiam_dask.runs import find\n"
        "from cryosiam_dask.commands import written\n"
        "console = Console(file=io.StringIO())\n"
        "for name, file, act in (\n"
        "    ('plan', 'c.yaml', lambda f: plan.show_plan(f, console)),\n"
        "    ('status', 'c.yaml', lambda f: status.print_overview(f, console)),\n"
        "    ('report', 'c.yaml', lambda f: written.report_again(config.read_configuration(f), console)),\n"
        "    ('components', 'c.yaml', lambda f: find.find_predictions(config.read_configuration(f))),\n"
        "    ('home', 'home.yaml', config.read_configuration),\n"
        "):\n"
        "    try: act(Path(file)); print(name, 'fine')\n"
        "    except CryosiamDaskError as error: print(name, str(error).replace('\\n', ' '))\n"
    )
    without = "--bounding-set=-dac_override,-dac_read_search"
    prefix = ["setpriv", without] if os.getuid() == 0 else []

    def found(closed: str) -> dict[str, str]:
        (tmp_path / closed).chmod(0)
        try:
            done = subprocess.run(
                [*prefix, sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
            )
        finally:
            (tmp_path / closed).chmod(0o755)
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())

    home = "key data_folder: must be below an existing home folder, but ~nobody_has_this_name is unknown"
    of_data, of_out = found("data"), found("out")
    for said, key, names in (
        (of_data, "data_folder", ("plan", "status")),
        (of_out, "prediction_folder", ("status", "report", "components")),
    ):
        assert home in said["home"]
        for name in names:
            assert f"key {key}: must be a readable folder" in said[name], said[name]
    assert "key prediction_folder: must be a folder that can be written or created" in of_out["plan"]
    assert "masks" in (said := found("masks"))["plan"] and said["report"] == "fine"


def test_an_output_that_may_not_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "a_preds.h5"
    write_hdf5(path, np.zeros((2, 3, 4), np.uint8), attributes={})
    script = (
        "import sys; from pathlib import Path\n"
        "from cryosiam_dask.errors import CryosiamDaskError\n"
        "from cryosiam_dask.files import hdf5, tomogram\n"
        "path = Path(sys.argv[1])\n"
        "for act in (hdf5.read_attributes, lambda path: hdf5.open_dataset(path, 'labels'),\n"
        "    tomogram.read_header):\n"
        "    try: act(path)\n"
        "    except CryosiamDaskError as error: print(error)\n"
    )
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    path.chmod(0)
    command = [*prefix, sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[:2] == [f"{path}: a prediction must be readable; found Permission denied. Change its permissions."] * 2
    assert said[2].endswith("must be a readable file; found Permission denied. Check path and permissions.")
