"""What the labels of a segmentation are called and which colours they have: the same in tables, pictures and files.

Label 0 is the background; it has neither a name nor a colour.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from cryosiam_dask.config import Configuration

RGB: TypeAlias = tuple[int, int, int]

#: Okabe and Ito's colours, told apart with any common colour blindness.
OKABE_ITO: tuple[RGB, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (240, 228, 66),
)
_GOLDEN = 0.6180339887498949
_LIGHTNESS = (0.72, 0.38, 0.58, 0.28)  # neighbours differ in it, which every eye sees


def _colours() -> tuple[RGB, ...]:
    """Okabe and Ito's colours, then hues a golden section of the circle apart."""
    colours = list(OKABE_ITO)
    for n in range(255 - len(colours)):
        red, green, blue = colorsys.hls_to_rgb(n * _GOLDEN % 1, _LIGHTNESS[n % len(_LIGHTNESS)], 0.65)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colours)


#: Red, green and blue, 0 to 255, of the labels 1 to 255: ``COLOURS[label - 1]``. Okabe and Ito's come first.
COLOURS: tuple[RGB, ...] = _colours()


def class_names(configuration: Configuration, count: int) -> tuple[str, ...]:
    """Names of the labels from 1 to `count`.

    Parameters
    ----------
    configuration
        See `given_names`; without any they are called ``"class 1"``, ``"class 2"`` and so on.
    count
        Number of labels, without the background.
    """
    return named(given_names(configuration), count)


def given_names(configuration: Configuration) -> tuple[str, ...]:
    """The names that a configuration gives to the labels from 1 on: those of its key ``class_names``.

    Without that key the only label of a lamella model (``network.postprocessing``) is ``"lamella"``, and others have no
    names.
    """
    return tuple(configuration.class_names or (("lamella",) if configuration.parameters.network.postprocessing else ()))


def named(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """`names`, continued (or cut) to `count` labels: ``"class 3"`` is the third.

    >>> named(["membrane"], 3)
    ('membrane', 'class 2', 'class 3')
    """
    given = tuple(names or ())[:count]
    return (*given, *(f"class {label}" for label in range(len(given) + 1, count + 1)))


def file_names(names: Sequence[str]) -> list[str]:
    """What classes are called in the names of files, each otherwise than all others.

    Letters, digits and ``. + - _`` alone, never two underscores in a row.

    >>> file_names(["membrane", "ER / Golgi", "er__golgi", "…"])
    ['membrane', 'ER_Golgi', 'er_golgi_3', 'class_4']
    """
    found: list[str] = []
    for label, name in enumerate(names, 1):
        safe = re.sub(r"(?:[^\w.+-]|_)+", "_", name)[:40].strip("._") or f"class_{label}"
        # Some disks do not tell capital letters from small ones.
        while safe.casefold() in map(str.casefold, found):
            safe += f"_{label}"
        found.append(safe)
    return found


def counted(name: str, number: str) -> str:
    """A class with its number of something.

    >>> counted("membrane", "4"), counted("class 2", "4")
    ('membrane 4', 'class 2: 4')
    """
    return f"{name}{':' if name[-1:].isdigit() else ''} {number}"


def percentage(share: float) -> str:
    """A share in per cent with as many digits as say something; a trace of something is never 0."""
    if 0 < share < 5e-5:
        return "<0.01 %"
    return f"{100 * share:.0f} %" if share in (0, 1) or share >= 0.1 else f"{100 * share:.2g} %"


def shares(
    voxels: Sequence[int],
    names: Sequence[str] | None,
    shape: Sequence[int],
    lamella_voxels: int | None = None,
    *,
    brief: bool = False,
) -> list[str]:
    """Say how much of each class was found.

    Parameters
    ----------
    voxels
        Of each label, from 0.
    names
        Of the labels from 1 on, as far as they have any.
    shape
        (z, y, x) or (y, x) in voxels.
    lamella_voxels
        Of the lamella that the labels lie in, if they lie in one.
    brief
        Whether to tell one share of each class, of the lamella where there is one, and no voxels.

    Examples
    --------
    >>> shares([900, 84], ["membrane"], (10, 10, 10), 500)
    ['membrane 84 (8.4 % of the volume, 17 % of the lamella)']
    >>> shares([900, 100], ["membrane"], (10, 100), brief=True)
    ['membrane 10 % of the image']
    """
    total, lines = math.prod(shape), []
    for name, number in zip(named(names, len(voxels[1:])), voxels[1:], strict=True):
        told = [f"{percentage(number / total)} of the {'volume' if len(shape) == 3 else 'image'}"]
        if lamella_voxels:
            told.append(f"{percentage(number / lamella_voxels)} of the lamella")
        lines.append(counted(name, told[-1] if brief else f"{number:,} ({', '.join(told)})"))
    return lines


def are_images(shapes: Iterable[Sequence[int]]) -> bool:
    """Whether shapes in voxels, as far as they are known, are all (y, x) and not (z, y, x).

    >>> are_images([(70, 90), ()]), are_images([(5, 70, 90)]), are_images([()])
    (True, False, False)
    """
    return {len(shape) for shape in shapes if shape} == {2}


def hexadecimal(colour: RGB) -> str:
    """A colour as HTML writes it.

    >>> hexadecimal((230, 159, 0))
    '#e69f00'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)
