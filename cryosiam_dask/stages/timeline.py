"""Draw when each worker read, computed and wrote, to show whether reading and writing kept the network waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cryosiam_dask.stages.predict import BlockTimes

_WIDTH, _LANE, _LEFT, _TOP = 1200, 22, 96, 60
# Colours of Okabe and Ito, which people with any common colour blindness can distinguish.
_COLOURS = {"read": (86, 180, 233), "compute": (213, 94, 0), "write": (0, 158, 115)}


def busy_share(times: Sequence[BlockTimes]) -> float:
    """Return the share of the time in which the workers' devices computed, from the first block to the last one.

    Parameters
    ----------
    times
        Times of all blocks of a tomogram, at least one.
    """
    began = min(block.compute[0] for block in times)
    ended = max(block.compute[1] for block in times)
    workers = len({block.worker for block in times})
    return sum(block.compute[1] - block.compute[0] for block in times) / max(1e-9, workers * (ended - began))


def _marks(seconds: float) -> list[float]:
    """Return 6 to 16 round numbers from 0 to `seconds`, evenly apart."""
    power = 10.0 ** math.floor(math.log10(seconds))
    step = next(part * power for part in (0.1, 0.2, 0.5, 1) if seconds / (part * power) <= 15)
    return [round(number * step, 12) for number in range(int(seconds / step) + 1)]


def write_timeline(path: Path, times: Sequence[BlockTimes], title: str) -> None:
    """Draw lanes for reading, computing and writing of each worker, with time from left to right.

    Parameters
    ----------
    path
        PNG file; an earlier one is replaced.
    times
        Times of all blocks of a tomogram, at least one.
    title
        Title of the picture.
    """
    font = ImageFont.load_default(13)
    workers = sorted({block.worker for block in times})
    began = min(block.read[0] for block in times)
    seconds = max(1e-9, max(block.write[1] for block in times) - began)
    height = _TOP + len(workers) * (4 * _LANE) + 40
    picture = Image.new("RGB", (_LEFT + _WIDTH + 30, height), "white")
    pen = ImageDraw.Draw(picture)
    blocks = "1 block" if len(times) == 1 else f"{len(times)} blocks"
    text = f"{title}: {blocks} in {seconds:.1f} s, devices busy {busy_share(times):.0%} of the time"
    pen.text((10, 10), text, fill="black", font=font)

    def across(time: float) -> float:
        return _LEFT + _WIDTH * (time - began) / seconds

    for number, worker in enumerate(workers):
        for lane, (step, colour) in enumerate(_COLOURS.items()):
            y = _TOP + number * 4 * _LANE + lane * _LANE
            pen.text((10, y), f"{number + 1}: {step}", fill="black", font=font)
            pen.line((_LEFT, y + _LANE - 4, _LEFT + _WIDTH, y + _LANE - 4), fill=(225, 225, 225))
            for block in times:
                if block.worker == worker:
                    start, stop = getattr(block, step)
                    # At least a pixel each, and a gap between neighbours.
                    pen.rectangle(
                        (across(start), y, max(across(start) + 1, across(stop) - 2), y + _LANE - 5), fill=colour
                    )
    bottom = height - 30
    for mark in _marks(seconds):
        x = across(began + mark)
        pen.line((x, bottom - 4, x, bottom), fill="black")
        pen.text((x, bottom + 4), f"{mark:g}", fill="black", font=font, anchor="ma")
    pen.text((10, bottom + 4), "seconds", fill="black", font=font)
    picture.save(path)
