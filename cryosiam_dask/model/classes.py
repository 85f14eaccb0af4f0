"""Names and colours of the labels, the same in tables, pictures and files.

Label 0 is the background; it has neither a name nor a colour.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from cryosiam_dask.config import Configuration

RGB: TypeAlias = tuple[int, int, int]

#: Okabe and Ito's colours, which people with any common colour blindness can distinguish.
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
_LIGHTNESS = (0.72, 0.38, 0.58, 0.28)  # consecutive colours also differ in lightness


def _colours() -> tuple[RGB, ...]:
    """Return Okabe and Ito's colours, followed by hues a golden section of the circle apart."""
    colours = list(OKABE_ITO)
    for n in range(255 - len(colours)):
        red, green, blue = colorsys.hls_to_rgb(n * _GOLDEN % 1, _LIGHTNESS[n % len(_LIGHTNESS)], 0.65)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colours)


#: Red, green and blue, 0 to 255, of the labels 1 to 255: ``COLOURS[label - 1]``. Okabe and Ito's come first.
COLOURS: tuple[RGB, ...] = _colours()


def class_names(configuration: Configuration, count: int) -> tuple[str, ...]:
    """Return the names of the labels from 1 to `count`.

    Parameters
    ----------
    configuration
        See `given_names`. Labels without a name are called ``"class 1"``, ``"class 2"`` and so on.
    count
        Number of labels, without the background.
    """
    return named(given_names(configuration), count)


def given_names(configuration: Configuration) -> tuple[str, ...]:
    """Return the names that a configuration gives to the labels from 1 on, in its key ``class_names``.

    Without that key, the label of a lamella model (``network.postprocessing``) is ``"lamella"``, and others have none.
    """
    return tuple(configuration.class_names or (("lamella",) if configuration.parameters.network.postprocessing else ()))


def names_in(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names in the attributes of a prediction."""
    names = attributes.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def named(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Extend (or cut) `names` to `count` labels; ``"class 3"`` is the third.

    >>> named(["membrane"], 3)
    ('membrane', 'class 2', 'class 3')
    """
    given = tuple(names or ())[:count]
    return (*given, *(f"class {label}" for label in range(len(given) + 1, count + 1)))


def file_names(names: Sequence[str]) -> list[str]:
    """Return unique names of classes for file names.

    They contain only letters, digits and ``. + - _``, and never two underscores in a row.

    >>> file_names(["membrane", "ER / Golgi", "er__golgi", "…"])
    ['membrane', 'ER_Golgi', 'er_golgi_3', 'class_4']
    """
    found: list[str] = []
    for label, name in enumerate(names, 1):
        safe = re.sub(r"(?:[^\w.+-]|_)+", "_", name)[:40].strip("._") or f"class_{label}"
        # Some file systems ignore the case of letters.
        while safe.casefold() in map(str.casefold, found):
            safe += f"_{label}"
        found.append(safe)
    return found


def counted(name: str, number: str) -> str:
    """Join the name of a class and a number.

    >>> counted("membrane", "4"), counted("class 2", "4")
    ('membrane 4', 'class 2: 4')
    """
    return f"{name}{':' if name[-1:].isdigit() else ''} {number}"


def percentage(share: float) -> str:
    """Format a share as a percentage with two significant digits; only exactly 0 becomes 0 %."""
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
    """Describe how much of each class was found.

    Parameters
    ----------
    voxels
        Number of voxels of each label, from 0.
    names
        Names of the labels from 1 on; the last labels may be without one.
    shape
        (z, y, x) or (y, x) in voxels.
    lamella_voxels
        Number of voxels of the lamella that contains the labels, if there is one.
    brief
        Whether to give only one share per class (of the lamella, if there is one) and no number of voxels.

    Examples
    --------
    >>> shares([900, 84], ["membrane"], (10, 10, 10), 500)
    ['membrane 84 (8.4 % of the volume, 17 % of the lamella)']
    >>> shares([900, 100], ["membrane"], (10, 100), brief=True)
    ['membrane 10 % of the image']
    """
    total, lines = math.prod(shape), []
    for name, number in zip(named(names, len(voxels[1:])), voxels[1:], strict=True):
        parts = [f"{percentage(number / total)} of the {'volume' if len(shape) == 3 else 'image'}"]
        if lamella_voxels:
            parts.append(f"{percentage(number / lamella_voxels)} of the lamella")
        lines.append(counted(name, parts[-1] if brief else f"{number:,} ({', '.join(parts)})"))
    return lines


def are_images(shapes: Iterable[Sequence[int]]) -> bool:
    """Whether all known shapes are (y, x), not (z, y, x).

    >>> are_images([(70, 90), ()]), are_images([(5, 70, 90)]), are_images([()])
    (True, False, False)
    """
    return {len(shape) for shape in shapes if shape} == {2}


def hexadecimal(colour: RGB) -> str:
    """Format a colour for HTML.

    >>> hexadecimal((230, 159, 0))
    '#e69f00'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)
