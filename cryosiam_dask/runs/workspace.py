"""Open, check and remove the work store of a tomogram: the zarr group of its intermediate arrays."""

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
from cryosiam_dask.core.executor import Interrupted
from cryosiam_dask.core.grid import make_grid
from cryosiam_dask.core.local_store import AnyDiskStore
from cryosiam_dask.core.log import LOG
from cryosiam_dask.errors import CryosiamDaskError, OutputError, is_transient
from cryosiam_dask.files.atomic import part_name
from cryosiam_dask.files.identity import is_newer_in_part, newest_chunk, source_content, source_identity
from cryosiam_dask.runs.ledger import Ledger
from cryosiam_dask.runs.outcome import RESUMABLE, has_blocks
from cryosiam_dask.runs.plan import RunPlan


@dataclass(frozen=True, slots=True)
class Workspace:
    """The work store of a tomogram, and the ledger that records what is in it."""

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
    """Open the work store of a tomogram and its ledger; an earlier run's store is used if it belongs to the ledger.

    Predicted blocks are kept, whatever error follows.
    """
    ledger = Ledger(configuration.prediction_folder, stem)
    if ledger.fault:
        inform(f"its ledger {ledger.fault}: the tomogram starts from the beginning")
    folder, group = _open_store(configuration, stem, ledger)
    try:
        yield Workspace(folder, group, ledger)
    except Exception as error:
        resumable = isinstance(error, RESUMABLE) or is_transient(error) or has_blocks(ledger)
        if resumable and not _is_done(configuration, stem):
            count = len(ledger.since("block", "blocks"))
            if count and not isinstance(error, Interrupted):
                inform(f"its {count} predicted block{'s are' if count > 1 else ' is'} kept in {folder}")
        elif not (resumable and configuration.keep_work):
            guard()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not configuration.keep_work:
        guard()
        shutil.rmtree(folder, ignore_errors=True)


def _is_done(configuration: Configuration, stem: str) -> bool:
    """Whether a model is done, so that its outcome has replaced all ledger entries and an error is a later model's."""
    ledger = Ledger(configuration.prediction_folder, stem)
    return (ledger.last("outcome") or {}).get("status") == "done" and ledger.last("store") is None


def record_source(ledger: Ledger, source: Path) -> None:
    """Record the identity of the tomogram's file, so that a copy of it is recognized."""
    found, identity = ledger.last("source"), source_identity(source)
    if found is None or found["identity"] != identity:
        content, newest = source_content(source), newest_chunk(source)
        if found is None or found["content"] != content or is_newer_in_part(source, found.get("newest", 0)):
            ledger.append("source", identity=identity, content=content, newest=newest)


def _open_store(configuration: Configuration, stem: str, ledger: Ledger) -> tuple[Path, zarr.Group]:
    """Open the work store that a ledger names, or create an empty one."""
    store = ledger.last("store")
    if store:
        folder = _work_root(configuration) / store.get("name", f"{stem}{_WORK}")
        try:
            group = zarr.open_group(AnyDiskStore(folder), mode="r+", zarr_format=3)
            if group.attrs.get("store") == store["token"]:
                return folder, group
        except Exception as error:  # a store that cannot be opened is replaced
            if is_transient(error):
                raise
    token = uuid.uuid4().hex
    for name in _work_names(configuration, stem):
        folder = _work_root(configuration) / name
        if not _is_own_store(configuration, folder):
            continue
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        # Renamed after it names its owner, so that no other run mistakes it for its own.
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
            continue  # a run with another prediction_folder has just taken the name
        ledger.append("store", token=token, name=name)
        return folder, zarr.open_group(AnyDiskStore(folder), mode="r+", zarr_format=3)
    raise OutputError(
        "the work store must belong to this prediction_folder",
        place=folder,
        value="one of another prediction_folder",
        remedy="Set work_folder to another folder",
    )


_WORK, _SCRATCH = ".work.zarr", ".scratch.zarr"


def has_work_stores(configuration: Configuration) -> bool:
    """Whether there is a work store of any tomogram."""
    with os.scandir(_work_root(configuration)) as entries:
        return any(entry.name.endswith((_WORK, _SCRATCH)) for entry in entries)


def _work_root(configuration: Configuration) -> Path:
    return configuration.work_folder or configuration.prediction_folder


def _own_name(configuration: Configuration, stem: str) -> str:
    """Return a name that is unique to this prediction folder."""
    return f"{stem}.{hashlib.sha256(os.fsencode(configuration.prediction_folder.resolve())).hexdigest()[:8]}"


def _work_names(configuration: Configuration, stem: str) -> tuple[str, str]:
    """Return the possible names of a tomogram's work store; the second if another prediction folder uses the first."""
    return f"{stem}{_WORK}", f"{_own_name(configuration, stem)}{_WORK}"


def _is_own_store(configuration: Configuration, folder: Path) -> bool:
    """Whether a work store belongs to this prediction folder, or does not exist."""
    own = _own_name(configuration, "")
    if folder.parent == configuration.prediction_folder or folder.name.endswith((own + _WORK, own + _SCRATCH)):
        return True
    try:
        owner = json.loads((folder / "zarr.json").read_bytes())["attributes"]["prediction_folder"]
    except FileNotFoundError:
        return not folder.exists()
    except (NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    return bool(owner == str(configuration.prediction_folder.resolve()))


def work_stores(configuration: Configuration, stem: str) -> list[Path]:
    """List the work stores of a tomogram, including those of commands on its predictions."""
    names = (*_work_names(configuration, stem), f"{_own_name(configuration, stem)}{_SCRATCH}")
    folders = [_work_root(configuration) / name for name in names]
    return [folder for folder in folders if folder.exists() and _is_own_store(configuration, folder)]


@contextmanager
def forgetting_damaged(plan: RunPlan, shape: tuple[int, ...], space: Workspace) -> Iterator[None]:
    """After an unexpected error, forget intermediate arrays that cannot be read, because they may be its cause."""
    try:
        yield
    except (OSError, CryosiamDaskError):
        raise
    except Exception:
        _forget_damaged(plan, shape, space)
        raise


def _forget_damaged(plan: RunPlan, shape: tuple[int, ...], space: Workspace) -> None:
    """Remove ledger entries of arrays and blocks that cannot be read, so that the next run makes them again."""
    work, ledger, found = space.group, space.ledger, space.ledger.last("blocks")
    if "tomogram" in work:
        tomogram = work_array(work, "tomogram")
        blocks = Blocks.of(tomogram)
        if not all(_is_readable(tomogram, blocks.slices(index)[3 - blocks.ndim :]) for index in blocks.indices):
            ledger.append("ingested", key="", boot="")
            LOG.warning("%s: the copy cannot be read and will be made again", tomogram.path)
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
    """Whether a region of every class can be read; also true if the disk does not respond."""
    for leading in np.ndindex(array.shape[: -len(region)]):
        try:
            array[(*leading, *region)]
        except OSError:
            return True
        except Exception:  # a codec may raise anything on damaged bytes
            return False
    return True


@contextmanager
def work_group(configuration: Configuration, stem: str) -> Iterator[zarr.Group]:
    """Yield an empty zarr group for a command on a written prediction, whose claim the command holds."""
    folder = _work_root(configuration) / f"{_own_name(configuration, stem)}{_SCRATCH}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield zarr.create_group(AnyDiskStore(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forget_failure(ledger: Ledger) -> None:
    """Record as done a tomogram that was recorded as failed."""
    before = ledger.last("outcome")
    if before and before["status"] == "failed":
        ledger.append(**before | {"status": "done", "error": "", "kind": ""})
