"""Claims: only one run works on a tomogram. A claim is a file beside the ledger that its holder keeps updating."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryosiam_dask.core.machine import boot_id, is_running, process_namespace
from cryosiam_dask.files.atomic import ABANDONED_SECONDS

FOLDER = ".ledger"
#: Seconds between two updates of a claim, and seconds without an update after which its holder counts as dead. Network
#: disks show the changes of another machine with a delay, but rarely of a minute.
BEAT, PATIENCE = 10.0, 100.0


class Claims:
    """The tomograms that this process has claimed, so that no other run works on them.

    A claim is a file that only one process can create, with a counter that its holder increases. A process that finds
    the claim of another process watches it with its own clock. If the claim has not changed for `patience` seconds, or
    if its holder ran on this machine and is gone, the process takes the claim over. This needs neither file locks,
    which some network disks lack, nor synchronized clocks.

    A holder that was suspended for so long that it lost its claim notices this at its next update, and leaves the claim
    to its successor (see `keeps`).

    Parameters
    ----------
    beat, patience
        Seconds; `BEAT` and `PATIENCE` if ``None``.
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
        """Release all claims."""
        self._over.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path)

    def take(self, path: Path) -> bool:
        """Try to get the claim `path`, and return whether this process now holds it."""
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
            # Several processes may find the same claim abandoned. Only the holder of a second claim, on replacing
            # exactly this content, may replace it; so no process replaces the claim of a successor.
            takeover = path.with_name(f"{path.name}.{zlib.crc32(found):08x}")
            if not self.take(takeover):
                return False
            try:
                return path.read_bytes() == found and self._replace(path)
            except FileNotFoundError:
                return False
            finally:
                self.release(takeover)

    def holds(self, path: Path) -> bool:
        """Whether this process still holds the claim, according to the disk.

        If the disk does not respond, the result is that of the last update.
        """
        try:
            return self._is_ours(path)
        except OSError:
            return self.keeps(path)

    def keeps(self, path: Path) -> bool:
        """Whether this process held the claim at its last update, without reading the disk."""
        return path in self._held

    @contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Wait for a claim, and hold it during the ``with`` block."""
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
        """Release a claim."""
        with self._lock:
            self._held.discard(path)
            if self.holds(path):
                with suppress(OSError):  # the claim then expires like that of a dead holder
                    path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps(
            {
                "token": self._token,
                "host": socket.gethostname(),
                "boot": boot_id() + process_namespace(),
                "process": os.getpid(),
                "count": self._count,
            }
        ).encode()

    def _create(self, path: Path) -> bool:
        # A hard link to a complete file appears with its content.
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
                        except OSError:  # a full disk: show that the holder is alive
                            os.utime(path)


@contextmanager
def open_claims(beat: float | None = None, patience: float | None = None) -> Iterator[Claims]:
    """Yield `Claims` that are released at the end."""
    claims = Claims(beat, patience)
    try:
        yield claims
    finally:
        claims.close()


def sweep(prediction_folder: Path, claims: Claims) -> None:
    """Remove temporary files of claims and ledgers that killed processes left behind.

    Parameters
    ----------
    prediction_folder
        See `cryosiam_dask.runs.ledger.Ledger`.
    claims
        The claims of this process.
    """
    folder = prediction_folder / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(OSError):
            if re.search(r"\.claim(\.[0-9a-f]{8})+$", path.name):  # a claim on the takeover of another claim
                if process_is_gone(path.read_bytes()) and claims.take(path):
                    claims.release(path)
            elif re.search(r"\.claim(\.[0-9a-f]{8})*\.[0-9a-f]{32}$|^\..*\.jsonl\.[0-9a-f]{32}$", path.name) and (
                process_is_gone(path.read_bytes()) or time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            ):
                path.unlink()


def claim_path(prediction_folder: Path, stem: str) -> Path:
    """Return the path of the claim on a tomogram of a prediction folder."""
    return prediction_folder / FOLDER / f"{stem}.claim"


def collection_claim(prediction_folder: Path) -> Path:
    """Return the path of the claim on the files that cover all tomograms of a folder: tables, lists, the report."""
    return prediction_folder / FOLDER / ".collection.claim"


def process_is_gone(content: bytes) -> bool:
    """Whether a claim's holder was a process of this machine that no longer runs."""
    try:
        claim = json.loads(content)
        if claim["host"] != socket.gethostname():
            return False
        if claim["boot"] != boot_id() + process_namespace():
            return False  # another machine or container with the same name, or before a reboot
        return not is_running(claim["process"])
    except (ValueError, KeyError, TypeError):
        return False
