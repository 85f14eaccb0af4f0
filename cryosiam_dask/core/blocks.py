"""A volume cut into blocks of whole chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cryosiam_dask.core.arrays import Sliceable, WritableArray
from cryosiam_dask.errors import LabelsError

Index: TypeAlias = tuple[int, int, int]
Slices: TypeAlias = tuple[slice, slice, slice]
#: Maximum voxels of a block. Small chunks are joined up to this size, because starting a task costs time; a task needs
#: 15 bytes per voxel.
BLOCK_VOXELS = 1 << 22
_LARGEST_BLOCK = 1 << 29  # a provisional label fits 29 bits: see `_touching`


@dataclass(frozen=True, slots=True)
class Blocks:
    """A volume cut into blocks. Everything is (z, y, x).

    Attributes
    ----------
    shape
        Voxels of the volume; a 2-D image is a volume of one slice.
    block
        Voxels of the largest block.
    ndim
        Axes of the array itself, 2 or 3.
    edges
        Where the blocks begin along each axis, followed by the size of the axis; ``None`` if all blocks are equal,
        except that the last one along an axis may be smaller.
    """

    shape: Index
    block: Index
    ndim: int
    edges: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, array: Sliceable, block: Sequence[int] | None = None, *, voxels: int | None = None) -> Blocks:
        """Cut `array` into blocks of whole chunks.

        Parameters
        ----------
        array
            A volume or an image.
        block
            Shape of a block; chosen from the chunks if not given.
        voxels
            Largest size of a chosen block, `BLOCK_VOXELS` if not given.

        Raises
        ------
        LabelsError
            If the array is neither 2-D nor 3-D, or a block is too large to be labelled at once.
        """
        ndim = len(array.shape)
        if ndim not in (2, 3) or (block is not None and len(block) != ndim):
            raise LabelsError(
                "components can be found in 2-D or 3-D arrays, in blocks with the same number of axes",
                value=f"shape {tuple(array.shape)}, block {block}",
                remedy="Pass one volume or image at a time",
            )
        lead = (1,) * (3 - ndim)
        shape = (*lead, *(int(size) for size in array.shape))
        voxels = BLOCK_VOXELS if voxels is None else voxels
        edges = _grown([*lead, *chunk_shape(array)], shape, voxels) if block is None else [*lead, *block]
        if min(edges) < 1 or math.prod(map(min, edges, shape)) >= _LARGEST_BLOCK:
            raise LabelsError(
                f"a block must hold from 1 to {_LARGEST_BLOCK - 1} voxels",
                value=tuple(edges),
                remedy="Store the array in chunks of 64 to 256 voxels along each axis",
            )
        return cls((shape[0], shape[1], shape[2]), (edges[0], edges[1], edges[2]), ndim)

    @classmethod
    def between(cls, array: Sliceable, output: Sliceable) -> Blocks:
        """Cut `array` into blocks of whole chunks of `output`, so that no two tasks write to the same chunk.

        Raises
        ------
        LabelsError
            If the shapes differ, or a block is too large.
        """
        blocks = cls.of(output)
        blocks = cls.of(array, blocks.block[3 - blocks.ndim :])
        blocks.require_whole_chunks(output)
        return blocks

    @classmethod
    def within(cls, edges: Sequence[Sequence[int]], voxels: int | None = None) -> Blocks:
        """Cut every block of another division into blocks of at most `voxels` voxels, `BLOCK_VOXELS` if not given.

        Parameters
        ----------
        edges
            Where the blocks of the other division begin along each axis, followed by the size of the axis.
        """
        voxels = BLOCK_VOXELS if voxels is None else voxels
        of_axes = [(0, 1)] * (3 - len(edges)) + [tuple(axis) for axis in edges]
        largest = [max(b - a for a, b in itertools.pairwise(axis)) for axis in of_axes]
        parts = [1, 1, 1]
        # Across z first, so that rows stay whole.
        while math.prod(-(-n // p) for n, p in zip(largest, parts, strict=True)) > max(1, voxels):
            parts[max(range(3), key=lambda axis: (-(-largest[axis] // parts[axis]), -axis))] += 1
        cuts = []
        for axis, size, p in zip(of_axes, largest, parts, strict=True):
            most = -(-size // p)  # a shorter block has fewer parts
            of_block = [(a, b, -(-(b - a) // most)) for a, b in itertools.pairwise(axis)]
            cuts.append((*(a + (b - a) * i // n for a, b, n in of_block for i in range(n)), axis[-1]))
        longest = [max(b - a for a, b in itertools.pairwise(axis)) for axis in cuts]
        sizes = [axis[-1] for axis in cuts]
        return cls((sizes[0], sizes[1], sizes[2]), (longest[0], longest[1], longest[2]), len(edges), tuple(cuts))

    def inside(self, region: Sequence[slice]) -> list[Index]:
        """Return the indices of the blocks of a region that consists of whole blocks, in C order."""
        where = [slice(0, 1)] * (3 - len(region)) + [*region]
        ranges = [
            [i for i, (a, b) in enumerate(itertools.pairwise(axis)) if part.start <= a and b <= part.stop]
            for axis, part in zip(self.axis_edges, where, strict=True)
        ]
        return [(z, y, x) for z, y, x in itertools.product(*ranges)]

    @property
    def axis_edges(self) -> tuple[tuple[int, ...], ...]:
        """Where the blocks begin along each axis, followed by the size of the axis."""
        if self.edges is not None:
            return self.edges
        return tuple((0, *range(edge, size, edge), size) for edge, size in zip(self.block, self.shape, strict=True))

    @property
    def counts(self) -> Index:
        """Number of blocks along each axis; one, of no voxels, along an axis of length 0."""
        z, y, x = (len(axis) - 1 for axis in self.axis_edges)
        return z, y, x

    @property
    def indices(self) -> list[Index]:
        """The block indices in C order."""
        z, y, x = self.counts
        return list(itertools.product(range(z), range(y), range(x)))

    def slices(self, index: Index) -> Slices:
        """Return the region of block `index`."""
        z, y, x = (slice(axis[i], axis[i + 1]) for i, axis in zip(index, self.axis_edges, strict=True))
        return z, y, x

    def extent(self, index: Index) -> Index:
        """Return the shape of block `index`."""
        z, y, x = (part.stop - part.start for part in self.slices(index))
        return z, y, x

    def read(self, array: Sliceable, index: Index) -> NDArray[Any]:
        """Return block `index` of `array` as a C-contiguous (z, y, x) NumPy array in native byte order."""
        part = np.asarray(array[self.slices(index)[3 - self.ndim :]])
        # cc3d refuses read-only memory, although it does not write to it.
        return np.require(part, part.dtype.newbyteorder("="), ["C", "W"]).reshape(self.extent(index))

    def write(self, array: WritableArray, index: Index, values: NDArray[Any] | int) -> None:
        """Write block `index` of `array`; `values` is a (z, y, x) block or one number for all of it."""
        where = self.slices(index)[3 - self.ndim :]
        array[where] = values if isinstance(values, int) else values.reshape([part.stop - part.start for part in where])

    def require_whole_chunks(self, output: Sliceable) -> None:
        """Check that the output has the right shape and that no two blocks write to the same chunk.

        Raises
        ------
        LabelsError
            If the shape differs, or two blocks would write to the same chunk.
        """
        if tuple(output.shape) != self.shape[3 - self.ndim :]:
            raise LabelsError(
                f"the output must have the shape of its input, {self.shape[3 - self.ndim :]}",
                value=output.shape,
                remedy="Create the output with that shape",
            )
        for axis, chunk in enumerate(chunk_shape(output), start=3 - self.ndim):
            if any(edge % chunk for edge in self.axis_edges[axis][1:-1]):
                raise LabelsError(
                    f"output chunks of {chunk} voxels do not divide the block edge {self.block[axis]} on axis "
                    f"{axis - 3 + self.ndim}, so two tasks would write one chunk",
                    remedy=f"Create the output with chunks that divide {self.block[3 - self.ndim :]}",
                )


def _grown(edges: list[int], shape: Sequence[int], voxels: int) -> list[int]:
    """Double the shortest edge until the block would exceed `voxels` voxels or covers the volume."""
    while short := [axis for axis in range(3) if edges[axis] < shape[axis]]:
        axis = min(short, key=lambda axis: edges[axis])
        grown = [edge * 2 if other == axis else edge for other, edge in enumerate(edges)]
        if math.prod(map(min, grown, shape)) > voxels:
            break
        edges = grown
    return edges


def chunk_shape(array: Sliceable) -> tuple[int, ...]:
    """Return the unit in which `array` is written: its shards, else its chunks, else single voxels."""
    chunks = getattr(array, "shards", None) or getattr(array, "chunks", None) or (1,) * len(array.shape)
    # Dask lists every chunk along an axis. Reads need not be aligned with them, so the largest one will do.
    return tuple(int(max(edge)) if isinstance(edge, tuple) else int(edge) for edge in chunks)
