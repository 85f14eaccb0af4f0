"""The zarr store of a tomogram in the work folder: where it lies, what of it is usable, and when it goes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.blocks import Blocks
from cryosiam_dask.core.executor import (
    Interrupted,
)
from cryosiam_dask.core.grid import make_grid
from cryosiam_dask.core.local_store import AnyDiskStore
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import (
    OutputError,
    is_transient,
)
from cryosiam_dask.files.atomic import part_name
from cryosiam_dask.files.identity import is_newer_in_part, newest_chunk, source_content, source_identity
from cryosiam_dask.runs.find import find_predictions as find_predictions
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.outcome import RESUMABLE, has_blocks
from cryosiam_dask.runs.plan import RunPlan


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the intermediate arrays of a tomogram are, and the record of what is in them."""

    folder: Path
    group: zarr.Group
    ledger: Ledger


def work_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found


@contextmanager
def open_workspace(
    configuration: Configuration, stem: str, inform: Callable[[str], None], guard: Callable[[], None]
) -> Iterator[Workspace]:
    """A zarr group for a tomogram's intermediate arrays with its ledger, of an earlier run if they fit together.

    Whatever the tomogram fails of, blocks that have been predicted stay.
    """
    ledger = Ledger(configuration.prediction_folder, stem)
    if ledger.fault:
        inform(f"its ledger {ledger.fault}, so that it is begun anew")
    folder, group = _open_store(configuration, stem, ledger)
    try:
        yield Workspace(folder, group, ledger)
    except Exception as error:
        if isinstance(error, RESUMABLE) or is_transient(error) or has_blocks(ledger):
            count = len(ledger.since("block", "blocks"))
            if count and not isinstance(error, Interrupted):
                inform(f"its {count} predicted blocks are kept in {folder}")
        else:
            guard()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not configuration.keep_work:
        guard()
        shutil.rmtree(folder, ignore_errors=True)


def record_source(ledger: Ledger, source: Path) -> None:
    """Record which file the tomogram is made from, so that a copy of it is known for the same."""
    found, identity = ledger.last("source"), source_identity(source)
    if found is None or found["identity"] != identity:
        content, newest = source_content(source), newest_chunk(source)
        if found is None or found["content"] != content or is_newer_in_part(source, found.get("newest", 0)):
            ledger.append("source", identity=identity, content=content, newest=newest)


def _open_store(configuration: Configuration, stem: str, ledger: Ledger) -> tuple[Path, zarr.Group]:
    """The folder and zarr group that a ledger speaks of, or an empty one where that is not there."""
    store = ledger.last("store")
    if store:
        folder = _work_root(configuration) / store.get("name", f"{stem}{_WORK}")
        try:
            group = zarr.open_group(AnyDiskStore(folder), mode="r+", zarr_format=3)
            if group.attrs.get("store") == store["token"]:
                return folder, group
        except Exception as error:  # whatever is wrong with it, it is not the one
            if is_transient(error):
                raise
    token = uuid.uuid4().hex
    for name in _work_names(configuration, stem):
        folder = _work_root(configuration) / name
        if not _is_own_store(configuration, folder):
            continue
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        # Renamed when it says whose it is, so that nobody takes it for his own meanwhile.
        part = folder.with_name(part_name(folder.name))
        part.parent.mkdir(parents=True, exist_ok=True)
        attributes = {"store": token, "prediction_folder": str(configuration.prediction_folder.resolve())}
        zarr.create_group(AnyDiskStore(part), attributes=attributes)
        try:
            part.rename(folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue  # another data set has just taken the name
        ledger.append("store", token=token, name=name)
        return folder, zarr.open_group(AnyDiskStore(folder), mode="r+", zarr_format=3)
    raise OutputError(
        "the work store must be this data set's own",
        place=folder,
        value="one of another prediction_folder",
        remedy="Set work_folder to another folder",
    )


_WORK, _SCRATCH = ".work.zarr", ".scratch.zarr"


def has_work_stores(configuration: Configuration) -> bool:
    """Whether there are intermediate arrays of any tomogram."""
    with os.scandir(_work_root(configuration)) as entries:
        return any(entry.name.endswith((_WORK, _SCRATCH)) for entry in entries)


def _work_root(configuration: Configuration) -> Path:
    return configuration.work_folder or configuration.prediction_folder


def _own_name(configuration: Configuration, stem: str) -> str:
    """A name that no tomogram of another prediction folder has."""
    return f"{stem}.{hashlib.sha256(os.fsencode(configuration.prediction_folder.resolve())).hexdigest()[:8]}"


def _work_names(configuration: Configuration, stem: str) -> tuple[str, str]:
    """What a tomogram's work store may be called; the second where another data set has one of the first name."""
    return f"{stem}{_WORK}", f"{_own_name(configuration, stem)}{_WORK}"


def _is_own_store(configuration: Configuration, folder: Path) -> bool:
    """Whether a work store is this prediction folder's, or not there."""
    own = _own_name(configuration, "")
    if folder.parent == configuration.prediction_folder or folder.name.endswith((own + _WORK, own + _SCRATCH)):
        return True
    try:
        told = json.loads((folder / "zarr.json").read_bytes())["attributes"]["prediction_folder"]
    except FileNotFoundError:
        return not folder.exists()
    except (NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    return bool(told == str(configuration.prediction_folder.resolve()))


def work_stores(configuration: Configuration, stem: str) -> list[Path]:
    """Where intermediate arrays of a tomogram are, those that a command on its prediction left included."""
    names = (*_work_names(configuration, stem), f"{_own_name(configuration, stem)}{_SCRATCH}")
    folders = [_work_root(configuration) / name for name in names]
    return [folder for folder in folders if folder.exists() and _is_own_store(configuration, folder)]


def forget_damaged(plan: RunPlan, shape: tuple[int, ...], space: Workspace) -> None:
    """Take back the record of what cannot be read from a work store, so that the next run makes it again."""
    work, ledger, found = space.group, space.ledger, space.ledger.last("blocks")
    if "tomogram" in work:
        tomogram = work_array(work, "tomogram")
        blocks = Blocks.of(tomogram)
        if not all(_is_readable(tomogram, blocks.slices(index)[3 - blocks.ndim :]) for index in blocks.indices):
            ledger.append("ingested", key="", boot="")
            LOG.warning("%s: cannot be read, so that it will be made again", tomogram.path)
    if found:
        grid = make_grid(shape, plan.patch, found["block_size"], plan.halo)
        arrays = [work_array(work, name) for name in plan.wanted if name in work]
        recorded = ledger.since("block", "blocks")
        whole = [
            entry
            for entry in recorded
            if all(_is_readable(array, grid.block(tuple(entry["index"])).region) for array in arrays)
        ]
        if len(whole) < len(recorded):
            LOG.warning("%d of %d predicted blocks cannot be read", len(recorded) - len(whole), len(recorded))
            ledger.append("blocks", key=found["key"], block_size=found["block_size"])
            for entry in whole:
                ledger.append(**entry)


def _is_readable(array: zarr.Array[Any], region: tuple[slice, ...]) -> bool:
    """Whether a region, of each class where there are several, can be read; a disk that does not answer is no no."""
    for leading in np.ndindex(array.shape[: -len(region)]):
        try:
            array[(*leading, *region)]
        except OSError:
            return True
        except Exception:  # whatever a codec says of bytes that are not its own
            return False
    return True


@contextmanager
def work_group(configuration: Configuration, stem: str) -> Iterator[zarr.Group]:
    """An empty zarr group for the intermediate arrays of a command on a written prediction, which holds its claim."""
    folder = _work_root(configuration) / f"{_own_name(configuration, stem)}{_SCRATCH}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield zarr.create_group(AnyDiskStore(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def array_like(work: zarr.Group, name: str, labels: zarr.Array[Any]) -> zarr.Array[Any]:
    return work.create_array(
        name, shape=labels.shape, chunks=labels.chunks, dtype=labels.dtype, fill_value=0, compressors=labels.compressors
    )


def forget_failure(ledger: Ledger) -> None:
    """Record that all outputs of a tomogram are there, where it was said to have failed."""
    before = ledger.last("outcome")
    if before and before["status"] == "failed":
        ledger.append(**before | {"status": "done", "error": "", "kind": ""})
