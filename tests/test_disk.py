"""Disks that are full, read-only, or others than the output's: real ones, mounted where nobody else sees them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import h5py
import numpy as np
import pytest
from test_cli import COMMAND, call, write_tomogram, write_yaml
from test_resume import contents

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
    call(*RUN, folder=folder)
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
    assert "stopping: the first tomogram failed of what would befall all others" in said
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
