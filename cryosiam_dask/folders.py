"""Folders that appear complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def part_of(target: Path) -> Path:
    """The hidden folder in which `target` grows."""
    return target.with_name(f".{target.name}.part")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Give the hidden folder ``.<target>.part``, which takes the place of `target` when the block has ended well.

    An earlier folder stays as it is until then. The one that is given does not exist yet; it vanishes if the block
    ends otherwise.
    """
    part, old = part_of(target), target.with_name(f".{target.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.replace(old)
        part.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
