"""Which cause is named for which numbers."""

from __future__ import annotations

import pytest

from cryosiam_dask.core.diagnosis import (
    CLIPPED,
    SLIVER,
    Intensities,
    beyond_lamella,
    blank,
    contrast,
    merged_warnings,
    percent,
    scaling,
    shared_warnings,
    with_a_smaller_patch,
)


@pytest.mark.parametrize(
    ("below", "above", "central", "words"),
    [
        (0.0, 0.0, (0.1, 0.9), None),
        (0.02, 0.03, (-0.1, 1.1), None),  # 5 % in all, no more
        (0.02, 0.031, (-0.1, 1.1), "2.0 % of its voxels lie below min 0 and 3.1 % above max 1"),
        (1.0, 0.0, (-9.0, -3.0), "100 % of its voxels lie below min 0"),
        (0.0, 0.0, (0.0, SLIVER), None),
        (0.0, 0.0, (0.5, 0.549), "4.9 % of the range from min 0 to max 1: the network sees next to no contrast"),
        (0.04, 0.0, (-50.0, 0.01), "1.0 % of the range"),  # what is clipped is no contrast
        (0.0, 0.0, (0.5, 0.5), "almost all voxels are 0.5"),
        (0.0, 0.0, None, "no voxel is a finite number"),
    ],
)
def test_scaling(below: float, above: float, central: tuple[float, float] | None, words: str | None) -> None:
    found = scaling(below, above, central, 0, 1)
    assert (words is None and not found) or (words is not None and len(found) == 1 and words in found[0])


def test_scaling_says_what_to_set() -> None:
    (found,) = scaling(0.5, 0.4, (-120.4, 88.2), 0, 1)
    assert found.endswith("Set 'min: -120' and 'max: 88.2' below parameters.data")
    assert CLIPPED == 0.05


@pytest.mark.parametrize(
    ("classes", "coverage", "words"),
    [
        (1, None, None),
        (1, 1.0, None),
        (5, None, "no mask_folder is set"),
        (5, 1.0, "the mask covers 100 %"),
        (5, 0.9995, "the mask covers more than 99.9 %"),
        (5, 0.99, None),
        (5, 0.0, None),
    ],
)
def test_what_lets_a_model_find_things_beyond_the_lamella(
    classes: int, coverage: float | None, words: str | None
) -> None:
    found = beyond_lamella(classes, coverage)
    assert (words is None and not found) or (words is not None and words in found[0])


BLANK = {"lowest": 0.0, "highest": 1.0, "clipped": (0.0, 0.0), "scale": (0, 1), "threshold": 0.9,
         "probabilities": (0.42,), "checkpoint": "lamella.ckpt"}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words", "others"),
    [
        ({}, ["highest probability is 0.42 for class 1", "lower it to less than 0.42", "lamella.ckpt"], ["Set param"]),
        ({"clipped": (0.6, 0.3)}, ["60.0 % of the voxels are clipped below and 30.0 % above", "Set parameters.data"],
         ["max are right"]),
        ({"clipped": None, "lowest": None}, ["intensities are not finite", "Set parameters.data.min and max"], []),
        ({"lowest": None, "highest": None}, ["no voxel is a finite number. Check"],
         ["max are right", "right trained_model"]),
        ({"lowest": 3.0, "highest": 3.0}, ["every voxel is 3", "Check the file"],
         ["max are right", "right trained_model"]),
        ({"probabilities": None}, ["Lower network.threshold (now 0.9)"], ["highest"]),
        ({"probabilities": (0.99, 0.05, 0.02), "threshold": 0.1},
         ["0.05 for class 1, 0.02 for class 2", "lower it to less than 0.05"], ["0.99"]),
        ({"probabilities": (0.99, 0.05, 0.02), "threshold": 0.1, "class_names": ("ER / Golgi",)},
         ["0.05 for ER / Golgi, 0.02 for class 2"], ["class 1"]),
        ({"probabilities": (1.0, 0.3, 0.02), "threshold": 0.1},
         ["background is more probable everywhere", "a lower threshold does not help"], ["lower it"]),
        ({"probabilities": (0.95,), "masked": True}, ["lie outside the mask", "masks in mask_folder"], ["lower it"]),
        ({"coverage": 0.0, "masked": True}, ["its mask is empty"], ["threshold (", "right trained_model"]),
        ({"removed_voxels": 1234}, ["postprocessing_sizes removed all 1,234 voxels"], ["right trained_model", "min"]),
    ],
)  # fmt: skip
def test_blank(given: dict[str, object], words: list[str], others: list[str]) -> None:
    text = blank(**{**BLANK, **given})  # type: ignore[arg-type]
    assert text.startswith("every voxel is background")
    assert all(word in text for word in words), text
    assert not any(word in text for word in others), text


@pytest.mark.parametrize("divisor", [8, 16])
def test_the_patch_is_reduced_until_nothing_is_left(divisor: int) -> None:
    patch = (128, 64, divisor)
    for _ in range(30):
        remedy = with_a_smaller_patch(patch, divisor)
        smaller = tuple(map(int, remedy[remedy.index("[") + 1 : remedy.index("]")].split(",")))
        assert all(s % divisor == 0 and s >= divisor for s in smaller)
        assert all(s < p or s == p == divisor for s, p in zip(smaller, patch, strict=True))
        patch = smaller
    assert patch == (divisor,) * 3
    assert "another GPU" not in remedy and "more memory" in remedy


def test_shares_in_words_are_never_rounded_to_none_or_all() -> None:
    assert [percent(share) for share in (0, 1e-9, 0.0004, 0.5, 0.9996, 1)] == [
        "0 %", "less than 0.1 %", "less than 0.1 %", "50.0 %", "more than 99.9 %", "100 %",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "invert", "words"),
    [
        ("dark on bright", None, "'invert: true'"),
        ("dark on bright", True, None),
        ("dark on bright", False, None),  # somebody knows it
        ("bright on dark", None, None),
        ("bright on dark", False, None),
        ("bright on dark", True, "remove it"),
        (None, None, None),
        (None, True, None),
    ],
)
def test_contrast(found: str | None, invert: bool | None, words: str | None) -> None:
    said = contrast(found, invert)
    assert (words is None and not said) or (words is not None and len(said) == 1 and words in said[0])


def looked(low: float, high: float, told: str | None, below: float = 0.5, above: float = 0.2) -> Intensities:
    return Intensities(1, "all voxels", low, high, 0, (low, high), below, above, 0, told)  # type: ignore[arg-type]


DARK, BRIGHT = "dark on bright", "bright on dark"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([looked(-3, 3, DARK), looked(-4, 3, None), looked(-3, 5, DARK)],  # one line for all, one range for all
         [(3, "of their voxels"), (3, "'min: -4' and 'max: 5'"), (2, "'invert: true'")]),
        ([looked(0, 1, DARK, 0, 0), looked(0, 1, DARK, 0, 0)], [(2, "'invert: true'")]),
        ([looked(0, 1, BRIGHT, 0, 0), looked(-3, 3, DARK)], []),  # they do not agree
        ([looked(0, 1, None, 0, 0), looked(5, 5, None, 0, 1)], []),  # nothing is in one of them
        ([looked(0, 1, DARK, 0, 0), looked(0, 1, None, 0, 0), looked(0, 1, None, 0, 0)], []),  # too few can be told
        ([looked(-3, 3, DARK)], []),
        ([], []),
    ],
)  # fmt: skip
def test_what_all_tomograms_share_is_said_once(found: list[Intensities], words: list[tuple[int, str]]) -> None:
    sentences, instead = shared_warnings(found, 0, 1, None)
    for count, word in words:
        assert any(word in sentence and number == count for sentence, number in sentences), sentences
    assert bool(sentences) == bool(words) == bool(instead)
    singles = {s for f in found for s in (*scaling(f.below, f.above, f.central, 0, 1), *contrast(f.contrast, None))}
    assert instead == (singles if words else set())


@pytest.mark.parametrize("fitting", [0, 2])
def test_where_no_one_range_suits_all_that_is_said_beside_their_own(fitting: int) -> None:
    found = [looked(-3, 3, None), looked(-3000, 3000, None), *[looked(0, 1, None, 0, 0)] * fitting]
    ((sentence, count),), instead = shared_warnings(found, 0, 1, None)
    assert count == 2 and "no min and max suit all" in sentence and "processing-invert-scale" in sentence
    assert not instead


def test_the_same_is_said_once_of_many() -> None:
    said = [(f"TS_{i}", f"its mask /m/TS_{i}.h5 has {i} voxels") for i in range(1, 9)]
    said += [("a", "no voxel size"), ("TS_1", "no voxel size"), ("a", "no voxel size"), ("b", "another thing")]
    assert merged_warnings(said) == [
        ("TS_1, TS_2, TS_3 and 5 others (the numbers are those of TS_1)", "its mask /m/TS_1.h5 has 1 voxels"),
        ("a and TS_1", "no voxel size"),
        ("b", "another thing"),
    ]
