"""The ledger of a tomogram: a record of finished work, from which the next run resumes after a killed one.

The folder ``.ledger`` of a prediction folder holds a file for each tomogram. Lines are only appended; each consists of
a checksum and a JSON object::

    7b1f02c4 {"what": "ledger", "version": 1}
    90c1d3aa {"what": "blocks", "key": "5d41…", "block_size": 320, "token": "a1b2…"}
    1c22b07e {"what": "block", "index": [0, 0, 1]}

A line is written after its result is on disk. A truncated last line is ignored; if a ledger is otherwise damaged or of
another version, the recorded work is done again.

While a run works on the tomogram, its claim is beside the ledger (`cryosiam_dask.files.claims`).
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryosiam_dask.errors import is_transient
from cryosiam_dask.files.claims import FOLDER

VERSION = 1


class Ledger:
    """The ledger of one tomogram.

    Parameters
    ----------
    prediction_folder
        Folder of the outputs.
    stem
        Name of the tomogram.

    Attributes
    ----------
    fault
        Why earlier entries cannot be used; empty if they can.

    Raises
    ------
    OSError
        After a transient disk error; recorded entries are kept.
    """

    def __init__(self, prediction_folder: Path, stem: str) -> None:
        self.path = prediction_folder / FOLDER / f"{stem}.jsonl"
        self._lock = threading.Lock()
        self._synced = 0.0
        self.entries, self.fault, whole = _read(self.path, patient=True)
        if self.fault:
            self.entries = []
        if not self.entries:
            self._replace([])
        elif whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def last(self, what: str) -> dict[str, Any] | None:
        """Return the last entry of a kind, or ``None``."""
        return next((entry for entry in reversed(self.entries) if entry["what"] == what), None)

    def since(self, what: str, other: str) -> list[dict[str, Any]]:
        """Return the entries `what` after the last entry `other`."""
        first = max((i for i, entry in enumerate(self.entries) if entry["what"] == other), default=len(self.entries))
        return [entry for entry in self.entries[first:] if entry["what"] == what]

    def append(self, what: str, **values: Any) -> None:
        """Record a result that is on disk."""
        entry = {"what": what, **values}
        with self._lock, self.path.open("ab") as file:
            file.write(_line(entry))
            self.entries.append(entry)
            # Work whose entry is lost in a crash is only done again, so not every block waits for the disk.
            if time.monotonic() - self._synced > 1:
                file.flush()
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def close(self, **outcome: Any) -> None:
        """Replace all entries by the tomogram's outcome, except its source and the removal of its denoised file."""
        with self._lock:
            kept = filter(None, map(self.last, ("source", "removed")))
            self._replace([*kept, {"what": "outcome", **outcome}])

    def _replace(self, entries: list[dict[str, Any]]) -> None:
        self.entries = [{"what": "ledger", "version": VERSION}, *entries]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.writelines(map(_line, self.entries))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def read_entries(prediction_folder: Path, stem: str) -> tuple[list[dict[str, Any]], str]:
    """Return the entries of a tomogram's ledger (empty if there is none), and what is wrong with it.

    Parameters
    ----------
    prediction_folder, stem
        See `Ledger`.
    """
    entries, fault, _ = _read(prediction_folder / FOLDER / f"{stem}.jsonl")
    return entries, fault


def read_outcomes(prediction_folder: Path) -> dict[str, dict[str, Any]]:
    """Return the recorded outcomes of the tomograms of a prediction folder, by name.

    Returns
    -------
    dict
        By stem: ``status``, ``shape`` (z, y, x), ``seconds``, ``voxels`` of each label, ``warnings``, ``error``,
        ``run``, ``began`` and ``ended`` (seconds since the epoch), ``device``, number of ``workers``, and the ``model``
        as in `cryosiam_dask.runs.plan.RunPlan.model`.
    """
    found = {}
    for path in sorted((prediction_folder / FOLDER).glob("[!.]*.jsonl")):
        entries, fault = read_entries(prediction_folder, path.name.removesuffix(".jsonl"))
        if not fault and entries and entries[-1]["what"] == "outcome":
            found[path.name.removesuffix(".jsonl")] = {k: v for k, v in entries[-1].items() if k != "what"}
    return found


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path, patient: bool = False) -> tuple[list[dict[str, Any]], str, int]:
    """Return entries, fault, and number of bytes in complete lines; if `patient`, raise transient errors."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], "", 0
    except OSError as error:
        if patient and is_transient(error):
            raise
        return [], f"cannot be read ({error.strerror})", 0
    entries, whole = [], 0
    for line in content.splitlines(keepends=True):
        text = line[9:-1]
        try:
            if not line.endswith(b"\n") or int(line[:8], 16) != zlib.crc32(text):
                raise ValueError
            entries.append(json.loads(text))
        except ValueError:
            if whole + len(line) == len(content):
                break  # truncated while it was written
            return [], "is damaged", 0
        whole += len(line)
    if entries and entries[0] != {"what": "ledger", "version": VERSION}:
        return [], "was written by another version of this program", 0
    return entries, "", whole
