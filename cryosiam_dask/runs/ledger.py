"""What is done of a tomogram, so that a run that was killed goes on where it stopped; and who works on it.

For every tomogram of a prediction folder there is, in the folder's ``.ledger``, a file of lines that are only ever
appended to, each a JSON object behind its checksum::

    7b1f02c4 {"what": "ledger", "version": 1}
    90c1d3aa {"what": "blocks", "key": "5d41…", "block_size": 320, "token": "a1b2…"}
    1c22b07e {"what": "block", "index": [0, 0, 1]}

A line stands for something that is on the disk already. A last line that was cut off is as if it had never been
written; any other damage, or a ledger of another version, costs the work that it stands for and nothing else.

Beside it lies, while somebody works on the tomogram, a claim, in which its holder counts on while it lives.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from cryosiam_dask.errors import may_pass

VERSION = 1
FOLDER = ".ledger"

#: Seconds between two counts of a claim's holder, and without a count after which it is taken for gone. Network disks
#: show a file of another machine late, but hardly by a minute.
BEAT, PATIENCE = 10.0, 100.0
#: Seconds after which a file that was to take another's place is nobody's any more.
_OLD = 3600.0


class Ledger:
    """The record of one tomogram; see the module.

    Parameters
    ----------
    prediction_folder
        Where the outputs go.
    stem
        The tomogram's name.

    Attributes
    ----------
    fault
        Why what the file said before cannot be used; empty if it can.

    Raises
    ------
    OSError
        If the disk does not answer, which may pass: what is recorded stays.
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
        """The latest entry of a kind."""
        return next((entry for entry in reversed(self.entries) if entry["what"] == what), None)

    def since(self, what: str, other: str) -> list[dict[str, Any]]:
        """The entries `what` behind the latest entry `other`."""
        first = max((i for i, entry in enumerate(self.entries) if entry["what"] == other), default=len(self.entries))
        return [entry for entry in self.entries[first:] if entry["what"] == what]

    def append(self, what: str, **values: Any) -> None:
        """Record something that is on the disk already."""
        entry = {"what": what, **values}
        with self._lock, self.path.open("ab") as file:
            file.write(_line(entry))
            self.entries.append(entry)
            # What is lost with the machine is worked on again: not worth waiting for the disk at every block.
            if time.monotonic() - self._synced > 1:
                file.flush()
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def close(self, **outcome: Any) -> None:
        """Replace everything by what became of the tomogram; which file it was made from stays."""
        with self._lock:
            source = self.last("source")
            self._replace([*([source] if source else ()), {"what": "outcome", **outcome}])

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
    """The entries of a tomogram's ledger, none where there is none, and what is wrong with it.

    Parameters
    ----------
    prediction_folder, stem
        As of `Ledger`.
    """
    entries, fault, _ = _read(prediction_folder / FOLDER / f"{stem}.jsonl")
    return entries, fault


def read_outcomes(prediction_folder: Path) -> dict[str, dict[str, Any]]:
    """What became of the tomograms of a prediction folder, by name, as far as runs have recorded it.

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
    """Entries, fault, and bytes of the whole lines; where `patient`, an error that may pass is raised."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], "", 0
    except OSError as error:
        if patient and may_pass(error):
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
                break  # cut off as it was written
            return [], "is damaged", 0
        whole += len(line)
    if entries and entries[0] != {"what": "ledger", "version": VERSION}:
        return [], "was written by another version of this program", 0
    return entries, "", whole


# --------------------------------------------------------------------------------------------------------------- claims


class Claims:
    """The tomograms that this process works on, held against other runs on the same folders.

    A claim is a file that is made only if it is not there, and in which its holder counts on. Whoever finds one of
    another process watches it, by his own clock: a claim that has not changed for `patience` seconds, or whose process
    ran on this machine and is gone, is taken away. Neither locks, which some network disks do not have, nor clocks that
    agree are needed.

    A holder that slept for so long that its claim was taken away finds that out with its next count, and leaves the
    claim to its successor: see `keeps`.

    Parameters
    ----------
    beat, patience
        Seconds; ``None``: `BEAT` and `PATIENCE`.
    """

    def __init__(self, beat: float | None = None, patience: float | None = None) -> None:
        self._patience = PATIENCE if patience is None else patience
        self._token = uuid.uuid4().hex
        self._count = 0
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[tuple[bytes, int], float]] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(BEAT if beat is None else beat,), daemon=True, name="claims"
        )
        self._thread.start()

    def close(self) -> None:
        """Give everything back."""
        self._over.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path)

    def take(self, path: Path) -> bool:
        """Claim; returns whether this process now holds the claim `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._create(path):
                return True
            try:
                found = path.read_bytes()
            except FileNotFoundError:
                return self._create(path)
            if not self._abandoned(path, found):
                return False
            # Several may have found it abandoned: only who holds the right to this very content puts his own there, and
            # nobody who looked earlier takes that away.
            right = path.with_name(f"{path.name}.{zlib.crc32(found):08x}")
            if not self.take(right):
                return False
            try:
                return path.read_bytes() == found and self._replace(path)
            except FileNotFoundError:
                return False
            finally:
                self.release(right)

    def holds(self, path: Path) -> bool:
        """Whether the claim is still this process's: one that slept too long has lost it.

        Where the disk does not tell, it is as it was when the holder last counted.
        """
        try:
            return self._is_ours(path)
        except OSError:
            return self.keeps(path)

    def keeps(self, path: Path) -> bool:
        """Whether the claim was taken, and was still this process's when it last counted; asks no disk."""
        return path in self._held

    @contextmanager
    def holding(self, path: Path) -> Iterator[None]:
        """Wait for a claim, and hold it for the time being."""
        while not self.take(path):
            time.sleep(0.2)
        try:
            yield
        finally:
            self.release(path)

    def _is_ours(self, path: Path) -> bool:
        try:
            return bool(json.loads(path.read_bytes())["token"] == self._token)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def release(self, path: Path) -> None:
        """Give a claim back."""
        with self._lock:
            self._held.discard(path)
            if self.holds(path):
                with suppress(OSError):  # then it runs out, as that of a holder that is gone does
                    path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps(
            {
                "token": self._token,
                "host": socket.gethostname(),
                "boot": boot_id() + _processes(),
                "process": os.getpid(),
                "count": self._count,
            }
        ).encode()

    def _create(self, path: Path) -> bool:
        # Linked from a whole file, so that nobody ever sees one without its content.
        temporary = path.with_name(f"{path.name}.{self._token}")
        try:
            temporary.write_bytes(self._content())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                try:
                    with path.open("xb") as file:
                        file.write(self._content())
                except FileExistsError:
                    return False
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._held.add(path)
        return True

    def _replace(self, path: Path) -> bool:
        temporary = path.with_name(f"{path.name}.{self._token}")
        temporary.write_bytes(self._content())
        temporary.replace(path)
        self._held.add(path)
        return True

    def _abandoned(self, path: Path, content: bytes) -> bool:
        if process_is_gone(content):
            return True
        try:
            now = content, path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        before, since = self._seen.get(path, (None, 0.0))
        if before != now:
            self._seen[path] = (now, time.monotonic())
            return False
        return time.monotonic() - since > self._patience

    def _beat(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            self._count += 1
            with self._lock:
                for path in list(self._held):
                    with suppress(OSError):
                        if not self._is_ours(path):
                            self._held.discard(path)
                            continue
                        try:
                            self._replace(path)
                        except OSError:  # a full disk: the holder lives all the same
                            os.utime(path)


@contextmanager
def open_claims(beat: float | None = None, patience: float | None = None) -> Iterator[Claims]:
    """Claims that are given back at the end."""
    claims = Claims(beat, patience)
    try:
        yield claims
    finally:
        claims.close()


def sweep(prediction_folder: Path, claims: Claims) -> None:
    """Remove what processes that were killed left of files that they were about to put in their places.

    Parameters
    ----------
    prediction_folder
        As of `Ledger`.
    claims
        Of this process.
    """
    folder = prediction_folder / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(OSError):
            if re.search(r"\.claim(\.[0-9a-f]{8})+$", path.name):  # the right to take a claim away
                if process_is_gone(path.read_bytes()) and claims.take(path):
                    claims.release(path)
            elif re.search(r"\.claim(\.[0-9a-f]{8})*\.[0-9a-f]{32}$|^\..*\.jsonl\.[0-9a-f]{32}$", path.name) and (
                process_is_gone(path.read_bytes()) or time.time() - path.stat().st_mtime > _OLD
            ):
                path.unlink()


def claim_path(prediction_folder: Path, stem: str) -> Path:
    """The claim on a tomogram of a prediction folder."""
    return prediction_folder / FOLDER / f"{stem}.claim"


def collection_claim(prediction_folder: Path) -> Path:
    """The claim on the files that tell of all tomograms of a prediction folder: tables, lists, the report."""
    return prediction_folder / FOLDER / ".collection.claim"


def part_name(name: str) -> str:
    """A hidden name under which a file or folder `name` grows, which tells the process that writes it."""
    return f".{name}.{_machine()}-{os.getpid()}-{next(_PARTS)}.part"


def sweep_parts(folder: Path, *, own: bool = False) -> None:
    """Remove what processes that were killed left of the outputs that they wrote.

    What a process of this machine writes is its own while it lives; what one of another machine does, until it has not
    changed for an hour. Where a folder was about to take the place of an earlier one, that one is put back.

    Parameters
    ----------
    folder
        Of the outputs.
    own
        Whether to remove what this process left as well, as it does where its workers ended amid a folder.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, told) for entry in entries if (told := _PART.match(entry.name))]
    for name, told in found:
        with suppress(OSError):
            path, target = folder / name, folder / told["name"]
            if told["machine"] == _machine():
                process = int(told["process"])
                if is_running(process) and not (own and process == os.getpid()):
                    continue
            elif time.time() - path.lstat().st_mtime < _OLD:
                continue
            if told["kind"] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


_PARTS = itertools.count()
_PART = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-\d+\.(?P<kind>part|old)$", re.DOTALL)


@cache
def _machine() -> str:
    return f"{zlib.crc32(f'{socket.gethostname()} {boot_id()} {_processes()}'.encode()):08x}"


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # of another user
    return True


def process_is_gone(content: bytes) -> bool:
    """Whether a claim's holder was a process of this machine that runs no more."""
    try:
        claim = json.loads(content)
        if claim["host"] != socket.gethostname():
            return False
        if claim["boot"] != boot_id() + _processes():
            return False  # of another machine or container of the same name, or of before it was started again
        return not is_running(claim["process"])
    except (ValueError, KeyError, TypeError):
        return False


@cache
def boot_id() -> str:
    """A name of this start of this machine, or none; what was not forced to its disk survives no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux; macOS has one of its own
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processes() -> str:
    """The kernel's name for the set of processes among which this one has its number."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
