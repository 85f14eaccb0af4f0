"""Names and colours of the labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2lab

from cryosiam_dask.config import Configuration
from cryosiam_dask.model.classes import COLOURS, OKABE_ITO, class_names


def configuration(**keys: object) -> Configuration:
    return Configuration(data_folder=Path(), prediction_folder=Path(), trained_model=Path(), **keys)  # type: ignore[arg-type]


def test_names_of_the_configuration_come_first_and_the_rest_is_numbered() -> None:
    assert class_names(configuration(), 3) == ("class 1", "class 2", "class 3")
    assert class_names(configuration(class_names=("Membran µ", "actin")), 2) == ("Membran µ", "actin")
    assert class_names(configuration(class_names=("membrane",)), 2) == ("membrane", "class 2")
    assert class_names(configuration(), 0) == ()


def test_every_label_has_a_colour_of_its_own() -> None:
    assert len(COLOURS) == len(set(COLOURS)) == 255
    assert COLOURS[:7] == OKABE_ITO
    assert np.min(COLOURS) >= 0 and np.max(COLOURS) <= 255
    assert (0, 0, 0) not in COLOURS and (255, 255, 255) not in COLOURS


@pytest.mark.parametrize("count", [7, 20])
def test_the_first_colours_lie_apart(count: int) -> None:
    lab = rgb2lab(np.array(COLOURS[:count])[None] / 255)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(count)
    assert distance.min() > (20 if count == 7 else 10)  # 2.3 is a just noticeable difference
