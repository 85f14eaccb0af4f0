"""Who works on a tomogram: a file beside its ledger, in which its holder counts on while it lives."""

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
#: Seconds between two counts of a claim's holder, and without a count after which it is taken for gone. Network disks
#: show a file of another machine late, but hardly by a minute.
BEAT, PATIENCE = 10.0, 100.0


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
                "boot": boot_id() + process_namespace(),
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
                process_is_gone(path.read_bytes()) or time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            ):
                path.unlink()


def claim_path(prediction_folder: Path, stem: str) -> Path:
    """The claim on a tomogram of a prediction folder."""
    return prediction_folder / FOLDER / f"{stem}.claim"


def collection_claim(prediction_folder: Path) -> Path:
    """The claim on the files that tell of all tomograms of a prediction folder: tables, lists, the report."""
    return prediction_folder / FOLDER / ".collection.claim"


def process_is_gone(content: bytes) -> bool:
    """Whether a claim's holder was a process of this machine that runs no more."""
    try:
        claim = json.loads(content)
        if claim["host"] != socket.gethostname():
            return False
        if claim["boot"] != boot_id() + process_namespace():
            return False  # of another machine or container of the same name, or of before it was started again
        return not is_running(claim["process"])
    except (ValueError, KeyError, TypeError):
        return False
