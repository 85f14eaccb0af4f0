"""Folders: what in them counts, and those that appear complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryosiam_dask.ledger import part_name


def visible(folder: Path, ending: str = "") -> list[Path]:
    """What a folder holds whose name ends so, sorted.

    Hidden names are left out: they are of files that are still growing, or ``._TS_01.mrc``, which macOS puts beside
    every file on a disk that is not its own.
    """
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder that takes the place of `target` when the block has ended well.

    An earlier folder stays as it is until then. The one that is given does not exist yet; it vanishes if the block
    ends otherwise. See `cryosiam_dask.ledger.sweep_parts` for what is left by a process that was killed.
    """
    part = target.with_name(part_name(target.name))
    old = part.with_suffix(".old")
    try:
        yield part
        if target.exists():
            target.replace(old)
        try:
            part.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
