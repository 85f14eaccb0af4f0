"""Explain in words why a result probably looks wrong: numbers in, sentences out.

The rules are those of CryoSiam's troubleshooting table, with thresholds that tell the causes apart:

=============================== ====================================================================================
A segmentation is blank         Intensities outside [min, max] are clipped, so with the wrong scaling the network
                                sees nothing; or no probability reaches the threshold; or it is the wrong model.
It finds the wrong things       The models expect dense matter bright on dark; many programs write it dark on bright.
It finds things outside the     The models were not trained on what surrounds a lamella, and there is no mask, or the
lamella                         mask covers everything.
A GPU runs out of memory        A batch of patches is too large.
=============================== ====================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: Whether dense matter is bright or dark. CryoSiam's models expect it bright.
Contrast: TypeAlias = Literal["bright on dark", "dark on bright"]

#: Warn if more than this share of the voxels lies outside [min, max]: the tails of a scaled tomogram are thinner.
CLIPPED = 0.05
#: Warn if the central 99 % of the intensities span less than this share of [min, max].
SLIVER = 0.05
#: Warn if a mask excludes less than this share of the tomogram.
UNMASKED = 0.001
_APART = (
    "their intensities do not fit min and max, and the tomograms differ so much that no min and max suit all. Scale "
    "them to the same range with 'cryosiam-dask processing-invert-scale', or use a separate YAML file for each range"
)
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Intensities:
    """The intensities of a tomogram relative to [min, max], estimated from a sample.

    Attributes
    ----------
    share, where
        See `cryosiam_dask.stages.intensities.Sample`.
    lowest, highest, median
        Intensities of the finite voxels; ``None`` if there are none.
    central
        The range of the central 99 % of the finite voxels; ``None`` if there are none.
    below, above
        Shares of the voxels below min and above max, which are clipped; 0 to 1.
    non_finite
        Share of the voxels that are NaN or infinite.
    contrast
        See `cryosiam_dask.stages.intensities.contrast`.
    """

    share: float
    where: str
    lowest: float | None
    highest: float | None
    median: float | None
    central: tuple[float, float] | None
    below: float
    above: float
    non_finite: float
    contrast: Contrast | None = None


def scaling(
    below: float,
    above: float,
    central: tuple[float, float] | None,
    minimum: float,
    maximum: float,
    whose: str = "its",
) -> tuple[str, ...]:
    """Explain what is wrong with the scaling of the intensities.

    Parameters
    ----------
    below, above
        Shares of the voxels below `minimum` and above `maximum`, 0 to 1.
    central
        The range of the central 99 % of the voxels; ``None`` if no voxel is finite.
    minimum, maximum
        ``parameters.data.min`` and ``max``.
    whose
        ``"their"`` if the numbers describe several tomograms.

    Returns
    -------
    tuple of str
        Empty if at least `SLIVER` of the range is used and at most `CLIPPED` of the voxels are clipped.

    Examples
    --------
    >>> scaling(0.0, 0.01, (0.1, 0.9), 0, 1)
    ()
    >>> print(*scaling(0.0, 0.0, (0.48, 0.51), 0, 1))
    the central 99 % of its intensities lie between 0.48 and 0.51, 3.0 % of the range from min 0 to max 1: the network \
sees next to no contrast. Set 'min: 0.48' and 'max: 0.51' below parameters.data
    """
    if central is None:
        return ("no voxel is a finite number: all of them count as the minimum",)
    low, high = central
    if low == high:
        return (f"almost all voxels are {low:g}: there is nothing to see. Check the file",)
    between = " and ".join(distinct_digits(low, high))
    lines = " and ".join(f"'{line}'" for line in to_write(central, None))
    remedy = f"Set {lines} below parameters.data"
    if below + above > CLIPPED:
        return (
            f"{percent(below)} of {whose} voxels lie below min {minimum:g} and {percent(above)} above max {maximum:g}, "
            f"where they are clipped; the central 99 % lie between {between}. {remedy}",
        )
    share = (min(high, maximum) - max(low, minimum)) / (maximum - minimum)
    if share < SLIVER:
        return (
            f"the central 99 % of {whose} intensities lie between {between}, {percent(share)} of the range "
            f"from min {minimum:g} to max {maximum:g}: the network sees next to no contrast. {remedy}",
        )
    return ()


def contrast(found: str | None, invert: bool | None, denoised: bool = False) -> tuple[str, ...]:
    """Warn if the contrast of a tomogram is not the one that CryoSiam's models expect.

    Parameters
    ----------
    found
        See `cryosiam_dask.stages.intensities.contrast`.
    invert
        ``parameters.data.invert``. ``False`` silences the warning about dark on bright, because the user has decided.
    denoised
        Whether a denoiser of the same pipeline made the tomogram, so that the denoiser's ``invert`` is the cause.

    Examples
    --------
    >>> contrast("dark on bright", False)
    ()
    >>> print(*contrast("dark on bright", None))
    dense matter looks dark on bright, but CryoSiam's models expect it bright on dark: set 'invert: true' below \
parameters.data, or 'invert: false' if this model was trained on such tomograms
    """
    if found == "dark on bright" and invert is None:
        if denoised:
            return (
                "dense matter looks dark on bright, but CryoSiam's models expect it bright on dark: if the raw "
                "tomogram is already bright on dark, set 'invert: false' below parameters.data of denoise, not of "
                "this model",
            )
        return (
            "dense matter looks dark on bright, but CryoSiam's models expect it bright on dark: set 'invert: true' "
            "below parameters.data, or 'invert: false' if this model was trained on such tomograms",
        )
    if found == "bright on dark" and invert:
        return (
            "dense matter looks bright on dark, as CryoSiam's models expect it, but 'invert: true' reverses that: "
            "remove it unless this model was trained on tomograms that are dark on bright",
        )
    return ()


def contrast_of_raw(found: str | None, invert: bool | None) -> tuple[str, ...]:
    """Warn if the contrast of a raw tomogram is not the one that denoising expects.

    Parameters
    ----------
    found, invert
        See `contrast`. Denoising inverts unless `invert` is ``False``.

    Examples
    --------
    >>> contrast_of_raw("dark on bright", None)
    ()
    >>> print(*contrast_of_raw("bright on dark", None))
    dense matter already looks bright on dark, but denoising inverts it: set 'invert: false' below parameters.data, or \
'invert: true' to confirm the inversion
    """
    if found == "bright on dark" and invert is None:
        return (
            "dense matter already looks bright on dark, but denoising inverts it: set 'invert: false' below "
            "parameters.data, or 'invert: true' to confirm the inversion",
        )
    if found == "dark on bright" and invert is False:
        return (
            "dense matter looks dark on bright, as in raw tomograms, but 'invert: false' keeps it that way: remove it "
            "unless this denoiser was trained on such tomograms",
        )
    return ()


def to_write(central: tuple[float, float] | None, found: str | None) -> tuple[str, ...]:
    """Return the lines to write below ``parameters.data`` for a model that expects [0, 1] and bright on dark.

    Parameters
    ----------
    central
        The range of the central 99 % of the voxels; ``None`` if no voxel is finite.
    found
        See `cryosiam_dask.stages.intensities.contrast`.

    Examples
    --------
    >>> to_write((-3.1234, 41.5), "dark on bright")
    ('min: -3.12', 'max: 41.5', 'invert: true')
    """
    lines: tuple[str, ...] = ()
    if central is not None and central[0] < central[1]:
        low, high = distinct_digits(*central)
        lines = (f"min: {low}", f"max: {high}")
    return (*lines, "invert: true") if found == "dark on bright" else lines


def distinct_digits(low: float, high: float) -> tuple[str, str]:
    """Round two numbers, keeping enough digits to distinguish them.

    Examples
    --------
    >>> distinct_digits(-9996.3, 7653.2), distinct_digits(0.123456, 0.123589)
    (('-10000', '7650'), ('0.12346', '0.12359'))
    """
    digits = max(3, 2 - math.floor(math.log10((high - low) / max(abs(low), abs(high)))))
    low, high = (float(f"{number:.{digits}g}") for number in (low, high))
    return f"{low:.12g}", f"{high:.12g}"


def shared_warnings(
    found: Sequence[Intensities], minimum: float, maximum: float, invert: bool | None, denoised: bool = False
) -> tuple[list[tuple[str, int]], set[str]]:
    """Return the warnings that apply to all tomograms of a collection, so that each is shown once.

    Parameters
    ----------
    found
        The intensities of each tomogram.
    minimum, maximum, invert
        The keys of ``parameters.data``.
    denoised
        See `contrast`.

    Returns
    -------
    sentences
        Warnings, each with the number of tomograms that it applies to.
    replaced
        Warnings of `scaling` and `contrast` about single tomograms, which these replace.
    """
    sentences: list[tuple[str, int]] = []
    replaced: set[str] = set()
    if len(found) < 2:
        return sentences, replaced
    count = len(found)
    single = [scaling(f.below, f.above, f.central, minimum, maximum) for f in found]
    ranges = [f.central for f in found if f.central is not None and f.central[0] < f.central[1]]
    low, high = min((a for a, _ in ranges), default=0.0), max((b for _, b in ranges), default=0.0)
    one_range = all(b - a > SLIVER * (high - low) for a, b in ranges)  # one min and max suit all
    if one_range and all(single) and len(ranges) == count:
        below, above = sum(f.below for f in found) / count, sum(f.above for f in found) / count
        together = scaling(below, above, (low, high), minimum, maximum, "their")
        sentences += [(sentence, count) for sentence in together]
        replaced.update(*single if together else ())
    elif not one_range and any(single):
        sentences.append((_APART, sum(map(bool, single))))
    known = [f.contrast for f in found if f.contrast is not None]
    if len(set(known)) == 1 and 2 * len(known) >= count:
        about_contrast = contrast(known[0], invert, denoised)
        sentences += [(sentence, len(known)) for sentence in about_contrast]
        replaced.update(about_contrast)
    return sentences, replaced


def merged_warnings(warnings: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merge warnings about several tomograms that differ only in their numbers.

    Parameters
    ----------
    warnings
        Pairs of a tomogram's name and a sentence about it.

    Returns
    -------
    list of tuple of str
        Pairs of the tomograms, as text, and a sentence about them.

    Examples
    --------
    >>> merged_warnings([("a", "3 voxels are NaN"), ("b", "no mask"), ("c", "7 voxels are NaN"), ("d", "no mask")])
    [('a and c (the numbers are those of a)', '3 voxels are NaN'), ('b and d', 'no mask')]
    """
    groups: dict[str, dict[str, str]] = {}
    for name, sentence in warnings:
        groups.setdefault(_NUMBER.sub("0", sentence.replace(f"/{name}", "/")), {}).setdefault(name, sentence)
    found = []
    for group in groups.values():
        names, sentence = list(group), next(iter(group.values()))
        listed = ", ".join(names[:-1] if len(names) <= 4 else names[:3])
        last = names[-1] if len(names) <= 4 else f"{len(names) - 3} others"
        listed = f"{listed} and {last}" if listed else last
        if len(set(group.values())) > 1:
            listed += f" (the {'numbers' if '0' in _NUMBER.sub('0', sentence) else 'names'} are those of {names[0]})"
        found.append((listed, sentence))
    return found


def beyond_lamella(classes: int, coverage: float | None) -> tuple[str, ...]:
    """Warn if a model may find things outside the lamella, and explain why.

    Parameters
    ----------
    classes
        Channels of the model's probabilities: 1 for a lamella model, which needs no mask.
    coverage
        Share of the tomogram inside the mask, 0 to 1; ``None`` without a mask.
    """
    if classes == 1:
        return ()
    if coverage is None:
        return (
            "no mask_folder is set: expect false positives outside the lamella, which the model was not trained on. "
            "Run the lamella prediction, and set mask_folder to its output",
        )
    if coverage > 1 - UNMASKED:
        return (
            f"the mask covers {percent(coverage)} of the tomogram: it excludes no false positives outside the lamella. "
            "Look at the lamella prediction, and raise its network.threshold if everything is labelled as lamella",
        )
    return ()


def blank(
    *,
    lowest: float | None,
    highest: float | None,
    clipped: tuple[float, float] | None,
    scale: tuple[float, float],
    threshold: float,
    probabilities: Sequence[float] | None,
    checkpoint: str,
    coverage: float | None = None,
    masked: bool = False,
    removed_voxels: int = 0,
    class_names: Sequence[str] = (),
) -> str:
    """Explain why every voxel of a segmentation is background.

    Parameters
    ----------
    lowest, highest
        Intensities of the tomogram; ``None`` if no voxel is finite.
    clipped
        Shares of its voxels below and above `scale`, 0 to 1; ``None`` if unknown.
    scale
        ``parameters.data.min`` and ``max``.
    threshold
        The ``network.threshold`` that was used.
    probabilities
        The highest probability of each class in the tomogram; ``None`` if unknown.
    checkpoint
        Name of the model's file.
    coverage
        Share of the tomogram inside the mask, 0 to 1; ``None`` if unknown.
    masked
        Whether there is a mask.
    removed_voxels
        Number of voxels that ``postprocessing_sizes`` removed.
    class_names
        Names of the labels from 1 on; the last labels may be without one.
    """
    start = "every voxel is background"
    if removed_voxels:
        return (
            f"{start}: postprocessing_sizes removed all {removed_voxels:,} voxels that the network had found. "
            "Lower its entries and run semantic-postprocess"
        )
    if coverage == 0:
        return f"{start}: its mask is empty. Run the lamella prediction again, or lower its network.threshold"
    if clipped is not None and (lowest is None or highest is None):
        return f"{start}: no voxel is a finite number. Check the file"
    if lowest is not None and lowest == highest:
        return f"{start}: every voxel is {lowest:g}, so there is nothing to see. Check the file"
    minimum, maximum = scale
    causes = [start]
    range_ = "are not finite" if lowest is None or highest is None else f"run from {lowest:g} to {highest:g}"
    seen = f"Its intensities {range_}, and the network sees the range from min {minimum:g} to max {maximum:g}"
    fits = clipped is not None and sum(clipped) <= CLIPPED
    if clipped is not None:
        seen += f": {percent(clipped[0])} of the voxels are clipped below and {percent(clipped[1])} above"
    if fits:
        causes.append(f"{seen}, so parameters.data.min and max are right")
    else:
        causes.append(f"{seen}. Set parameters.data.min and max to the range of the tomogram")
    causes.append(_probabilities(threshold, probabilities, masked, class_names))
    causes.append(f"Check that {checkpoint} is the right trained_model")
    if masked:
        causes.append("Check that the masks in mask_folder are not empty")
    return ". ".join(causes)


def _probabilities(threshold: float, highest: Sequence[float] | None, masked: bool, names: Sequence[str]) -> str:
    """Explain what the highest probability of each class means for the threshold."""
    if highest is None:
        return f"Lower network.threshold (now {threshold:g})"
    # A single class is the lamella; of several classes, the first is the background.
    classes = [(1, highest[0])] if len(highest) == 1 else list(enumerate(highest))[1:]
    called = [*names[: len(classes)], *(f"class {label}" for label, _ in classes[len(names) :])]
    listed = ", ".join(f"{p:.3g} for {name}" for name, (_, p) in zip(called, classes, strict=True))
    most = max(p for _, p in classes)
    text = f"The highest probability is {listed}, and network.threshold is {threshold:g}"
    if most <= threshold:
        return f"{text}: lower it to less than {most:.3g}"
    if len(highest) == 1:
        return f"{text}: the voxels above it " + ("lie outside the mask" if masked else "have been removed")
    outside = ", or the voxels above it lie outside the mask" if masked else ""
    return f"{text}, but the background is more probable everywhere{outside}: a lower threshold does not help"


def with_a_smaller_patch(patch: Sequence[int], divisor: int) -> str:
    """Return the remedy for a patch that does not fit into a GPU's memory.

    Parameters
    ----------
    patch
        Shape of the patch in voxels, (z, y, x) or (y, x).
    divisor
        Number that must divide every axis of a patch.

    Examples
    --------
    >>> with_a_smaller_patch((128, 128, 128), 8)
    'Set parameters.data.patch_size to [96, 96, 96], which changes the labels slightly, or use a GPU with more memory'
    """
    smaller = [max(divisor, 3 * size // 4 // divisor * divisor) for size in patch]
    return (
        f"Set parameters.data.patch_size to {smaller}, which changes the labels slightly, or use a GPU with more memory"
    )


def percent(share: float) -> str:
    """Write a share from 0 to 1 as per cent; only exactly 0 and 1 become 0 % and 100 %.

    Examples
    --------
    >>> percent(0.05), percent(0.00001), percent(0.99999), percent(1)
    ('5.0 %', 'less than 0.1 %', 'more than 99.9 %', '100 %')
    """
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if share < 0.001:
        return "less than 0.1 %"
    return "more than 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"
