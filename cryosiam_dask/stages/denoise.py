"""Denoising: scale a raw tomogram for the network, and read the network's result.

1. Two percentiles of the whole tomogram become 0 and 1. The higher one becomes 0, because structures are dark in raw
   tomograms and must be bright for the networks that follow (`stretch_of`).
2. The network predicts block by block, like every network (`cryosiam_dask.stages.predict`).
3. The lowest and the highest value of all blocks become 0 and 1 whenever a region is read (`Denoised`). So nothing is
   stored twice, and the next model reads exactly the values that are in the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cryosiam_dask.core.arrays import Region, Sliceable, regions_of
from cryosiam_dask.core.executor import SERIAL, Executor
from cryosiam_dask.core.percentiles import percentiles
from cryosiam_dask.errors import TomogramError
from cryosiam_dask.model.predictor import PredictorSpec, normalise

#: Percentiles between which CryoSiam stretches intensities before it denoises.
PERCENTS = (0.1, 99.9)


def stretch_of(
    tomogram: Sliceable, place: str | Path, *, invert: bool = True, executor: Executor = SERIAL
) -> tuple[float, float]:
    """Find the intensities that become 0 and 1 before denoising: the exact percentiles of all voxels.

    Parameters
    ----------
    tomogram : (z, y, x) or (y, x), real numbers
        Stored intensities. NaN is ignored.
    place
        Place to name in an error.
    invert
        Whether the higher percentile becomes 0, and the lower one 1.
    executor
        Runs the tasks, which read the tomogram twice.

    Raises
    ------
    TomogramError
        If the percentiles are equal, as in a constant tomogram.
    """
    read = partial(_read, tomogram=tomogram)
    low, high = percentiles(read, _regions(tomogram), PERCENTS, executor=executor)
    if not np.float32(low) < np.float32(high) or not math.isfinite(high - low):
        raise TomogramError(
            f"its {PERCENTS[0]} and {PERCENTS[1]} percentiles must differ, because denoising scales them to 0 and 1",
            place=place,
            value="nothing but NaN" if math.isnan(low) else f"{low:g} and {high:g}",
            remedy="Check the file with 'cryosiam-dask info', or leave it out with test_files",
        )
    return (high, low) if invert else (low, high)


def with_own_moments(
    spec: PredictorSpec, tomogram: Sliceable, *, mean: bool, std: bool, executor: Executor = SERIAL
) -> PredictorSpec:
    """Return `spec` with the mean, the standard deviation or both of the tomogram's scaled intensities.

    Parameters
    ----------
    spec
        How intensities are scaled first.
    tomogram : (z, y, x) or (y, x), real numbers
        Stored intensities.
    mean, std
        Whether to use the tomogram's own mean and standard deviation; a standard deviation of 0 counts as 1.
    executor
        Runs the tasks, which read the tomogram once.
    """
    if not mean and not std:
        return spec
    scaled = replace(spec, mean=0.0, std=1.0)
    parts = executor.map(partial(_sums, tomogram=tomogram, spec=scaled), _regions(tomogram), name="percentiles")
    count, total, squares = (math.fsum(each) for each in zip(*parts, strict=True))
    average = total / count
    deviation = math.sqrt(max(0.0, squares / count - average**2)) or 1.0
    return replace(spec, mean=average if mean else spec.mean, std=deviation if std else spec.std)


def _regions(tomogram: Sliceable) -> list[Region]:
    """Return regions of whole chunks and whole rows, some tens of megabytes each."""
    *leading, _ = getattr(tomogram, "chunks", None) or (64,) * len(tomogram.shape)
    steps = [edge * max(1, 64 // edge) for edge in leading[:-1]] + [edge * max(1, 256 // edge) for edge in leading[-1:]]
    return list(regions_of(tomogram.shape, (*steps, tomogram.shape[-1])))


def _read(region: Region, *, tomogram: Sliceable) -> NDArray[Any]:
    return np.asarray(tomogram[region])


def _sums(region: Region, *, tomogram: Sliceable, spec: PredictorSpec) -> tuple[int, float, float]:
    values = normalise(np.asarray(tomogram[region]), spec).astype(np.float64).reshape(-1)
    return values.size, float(values.sum()), float(values @ values)


@dataclass(frozen=True, slots=True)
class Denoised:
    """The result of a denoiser, scaled when a region is read.

    Attributes
    ----------
    prediction
        The network's result, (channel, z, y, x) or (channel, y, x), float32.
    scale
        The values that become 0 and 1; ``None`` leaves the result unscaled.
    channel
        The channel to return; ``None`` returns all, with the channel axis.
    """

    prediction: zarr.Array[Any]
    scale: tuple[float, float] | None
    channel: int | None = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in voxels."""
        return self.prediction.shape[self._dropped :]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """Single precision."""
        return np.dtype(np.float32)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunk shape in voxels."""
        return self.prediction.chunks[self._dropped :]

    @property
    def attrs(self) -> Any:
        """Attributes of the array."""
        return self.prediction.attrs

    @property
    def _dropped(self) -> int:
        return 0 if self.channel is None else 1

    def __getitem__(self, region: Any, /) -> NDArray[np.float32]:
        index = region if isinstance(region, tuple) else (region,)
        return self.scaled(self.prediction[index if self.channel is None else (self.channel, *index)])

    def scaled(self, values: Any) -> NDArray[np.float32]:
        """Scale values of the network's result; all become 0 if the result is constant."""
        found = np.asarray(values, np.float32)
        if self.scale is None:
            return found
        low, high = map(np.float32, self.scale)
        return np.asarray((found - low) / (high - low) if high > low else np.zeros_like(found))
