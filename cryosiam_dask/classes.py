"""What the labels of a segmentation are called and which colours they have: the same in tables, pictures and files.

Label 0 is the background; it has neither a name nor a colour.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
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


def counted(name: str, number: str) -> str:
    """A class with its number of something.

    >>> counted("membrane", "4"), counted("class 2", "4")
    ('membrane 4', 'class 2: 4')
    """
    return f"{name}{':' if name[-1:].isdigit() else ''} {number}"


def hexadecimal(colour: RGB) -> str:
    """A colour as HTML writes it.

    >>> hexadecimal((230, 159, 0))
    '#e69f00'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)
