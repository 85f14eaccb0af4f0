"""Patches, cores and blocks: the integer geometry of a run. No arrays, no Dask, no torch.

Two grids are kept apart. The *patch* grid decides the numbers: what the network sees at once and which voxels it is
believed for. The *block* grid decides speed and memory and never a value: what is read, scheduled, retried and written
at once. Along one axis of ``size`` voxels with patches of ``patch`` voxels:

1. An axis shorter than the patch counts as ``patch`` voxels long (``padded``); what is missing is zeros at its end.
2. Patches start at 0, patch/2, patch, … as long as the start lies before ``padded - patch/4``.
3. A patch that reaches past the end sees the axis wrapped around: voxel ``padded + k`` is voxel ``k``.
4. Of each patch only the *core* is kept: the first patch keeps [0, 3/4 patch), every other one the half in its middle,
   and the last one everything up to the end. So every voxel is owned by exactly one patch.
5. All inner core edges are odd multiples of patch/4. A block owns a whole number of cores. With an odd number ``d`` of
   cores to a block, block edges at ``c, 3c, 5c, …`` with ``c = d * patch/4`` are core edges and also multiples of
   ``c``: arrays with chunks of ``c`` voxels never have a chunk that two blocks write.

>>> axis = PatchAxis(size=300, patch=128)
>>> axis.starts
(0, 64, 128, 192, 256)
>>> [axis.core(i) for i in range(axis.count)]
[(0, 96), (96, 160), (160, 224), (224, 288), (288, 300)]
>>> BlockAxis(axis, cores=3).edges
(0, 96, 288, 300)

These are CryoSiam's own patches. With another *halo* than patch/4 they are laid so that all cores but the last have
``patch - 2 * halo`` voxels and begin at multiples of that, the first patch starts with the axis, and the last one keeps
everything up to the end. Rules 1 and 3 hold as before; blocks are simply multiples of the core.

>>> axis = PatchAxis(size=300, patch=128, halo=16)
>>> axis.starts
(0, 80, 176)
>>> [axis.core(i) for i in range(axis.count)]
[(0, 96), (96, 192), (192, 300)]
>>> BlockAxis(axis, cores=1).edges
(0, 96, 192, 300)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from cryosiam_dask.errors import ConfigurationError

#: Block edge in voxels when none is asked for: large against the halo, small against the memory of a worker.
DEFAULT_BLOCK_SIZE = 320


#: Chunks of about so many voxels along an axis, where the patches do not decide.
_CHUNK = 160


@dataclass(frozen=True, slots=True)
class PatchAxis:
    """The patches along one axis.

    Parameters
    ----------
    size
        Voxels along the axis, at least 1.
    patch
        Voxels of a patch along it, a positive multiple of 4.
    halo
        Voxels on either side of a core that the network sees and nobody keeps, less than half of a patch;
        patch/4, as CryoSiam has it, if 0.

    Raises
    ------
    ConfigurationError
        If the size is not positive, the patch not a positive multiple of 4, or the halo too large.
    """

    size: int
    patch: int
    halo: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigurationError("an axis must have at least one voxel", value=self.size)
        if self.patch < 4 or self.patch % 4:
            raise ConfigurationError(
                "a patch must be a positive multiple of 4 voxels, because a quarter of it is its halo",
                place="parameters.data.patch_size",
                value=self.patch,
                remedy=f"Set it to {max(4, round(self.patch / 4) * 4)}",
            )
        if not 0 <= 2 * self.halo < self.patch:
            raise ConfigurationError(
                f"a halo must leave something of its patch, which has {self.patch} voxels",
                place="parameters.data.halo",
                value=self.halo,
                remedy=f"Set it to {self.patch // 4} or less, or patch_size to more",
            )
        if not self.halo:
            object.__setattr__(self, "halo", self.patch // 4)

    @property
    def exact(self) -> bool:
        """Whether the patches are CryoSiam's own."""
        return 4 * self.halo == self.patch

    @property
    def padded(self) -> int:
        """Voxels along the axis after padding with zeros to at least one patch."""
        return max(self.size, self.patch)

    @property
    def stride(self) -> int:
        """Voxels between neighbouring cores."""
        return self.patch - 2 * self.halo

    @property
    def count(self) -> int:
        """Number of patches; CryoSiam has at least 2."""
        if self.exact:
            return math.ceil((self.padded - self.halo) / self.stride)
        return 1 if self.size <= self.patch else 1 + math.ceil((self.size - self.patch + self.halo) / self.stride)

    @property
    def starts(self) -> tuple[int, ...]:
        """First voxel of every patch."""
        return tuple(self.start(i) for i in range(self.count))

    @property
    def extent(self) -> int:
        """Voxels from the first patch's start to the last one's end: the padded axis and what is wrapped around."""
        return self.start(self.count - 1) + self.patch

    def start(self, i: int) -> int:
        """First voxel of patch `i`."""
        return max(0, self._core_start(i) - self.halo)

    def core(self, i: int) -> tuple[int, int]:
        """Voxels [start, stop) that patch `i` owns; empty if they all lie in the padding."""
        stop = self.padded if i == self.count - 1 else self._core_start(i + 1)
        return min(self._core_start(i), self.size), min(stop, self.size)

    def _core_start(self, i: int) -> int:
        # CryoSiam's first core lacks the halo on its left side and has these voxels more.
        return 0 if i == 0 else i * self.stride + (self.halo if self.exact else 0)


@dataclass(frozen=True, slots=True)
class BlockAxis:
    """The blocks along one axis.

    Parameters
    ----------
    axis
        Its patches.
    cores
        Patch cores in a block, at least 1. With CryoSiam's patches an odd number of at least 3, of which the first
        block owns the half.
    """

    axis: PatchAxis
    cores: int

    def __post_init__(self) -> None:
        if self.cores < 1 or (self.axis.exact and (self.cores < 3 or self.cores % 2 == 0)):
            raise ValueError(f"a block must own an odd number of at least 3 cores along an axis; found {self.cores}")

    @property
    def chunk(self) -> int:
        """Voxels of an output chunk, which divide every inner block edge: half a block with CryoSiam's patches."""
        if self.axis.exact:
            return self.cores * self.axis.halo
        stride = self.axis.stride
        return max(part for part in range(1, min(stride, _CHUNK) + 1) if stride % part == 0)

    @property
    def edges(self) -> tuple[int, ...]:
        """Block edges in voxels, from 0 to the size of the axis."""
        step = self.cores * self.axis.stride
        first = self.chunk if self.axis.exact else step
        # The last core may be longer than the others: no edge may cut it.
        last = self.axis.size - 1 if self.axis.exact else self.axis.core(self.axis.count - 1)[0]
        return (0, *range(first, last + 1, step), self.axis.size)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.edges) - 1

    def patches(self, block: int) -> range:
        """Numbers of the patches whose cores block `block` owns."""
        start, stop = self.edges[block], self.edges[block + 1]
        last = self.axis.count if stop == self.axis.size else self._owner(stop)
        return range(self._owner(start), last)

    def _owner(self, edge: int) -> int:
        """Number of the patch whose core begins at an inner block edge, or at 0."""
        return (edge - self.axis.halo) // self.axis.stride if self.axis.exact and edge else edge // self.axis.stride


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch of a block.

    Attributes
    ----------
    window
        Where it stands in the block's window, a slice an axis.
    core
        What is kept of the patch, in the patch's own voxels.
    target
        Where the core stands in the block, in the block's own voxels.
    """

    window: tuple[slice, ...]
    core: tuple[slice, ...]
    target: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One unit of work.

    Attributes
    ----------
    index
        Its place in the block grid.
    region
        The voxels that it owns, a slice an axis: whole output chunks.
    window
        (start, stop) an axis of the voxels that its patches see. Never before 0, but past the end of the tomogram
        where the tomogram is padded and wrapped around (see `wrapped_segments`).
    patches
        Its patches in raster order; each owns at least one voxel.
    """

    index: tuple[int, ...]
    region: tuple[slice, ...]
    window: tuple[tuple[int, int], ...]
    patches: tuple[Patch, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels owned along each axis."""
        return tuple(s.stop - s.start for s in self.region)

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Voxels seen along each axis."""
        return tuple(stop - start for start, stop in self.window)


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches and blocks of a tomogram.

    Parameters
    ----------
    axes
        One `BlockAxis` an axis, in array order (z, y, x).
    """

    axes: tuple[BlockAxis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tomogram, (z, y, x)."""
        return tuple(a.axis.size for a in self.axes)

    @property
    def patch(self) -> tuple[int, ...]:
        """Shape of a patch, (z, y, x)."""
        return tuple(a.axis.patch for a in self.axes)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunk shape for arrays that blocks write; none larger than the tomogram."""
        return tuple(min(a.chunk, a.axis.size) for a in self.axes)

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(a.count for a in self.axes)

    @property
    def patch_count(self) -> int:
        """Patches of the whole tomogram."""
        return math.prod(a.axis.count for a in self.axes)

    @property
    def largest_window(self) -> tuple[int, ...]:
        """Shape that no block's window exceeds."""
        return tuple(min((a.cores - 1) * a.axis.stride + a.axis.patch, a.axis.extent) for a in self.axes)

    @property
    def largest_block(self) -> tuple[int, ...]:
        """Shape that no block exceeds."""
        # Without CryoSiam's rules the last core lacks a halo behind it, and where it is the only one before it too.
        return tuple(
            min(a.cores * a.axis.stride + (0 if a.axis.exact else 2 * a.axis.halo), a.axis.size) for a in self.axes
        )

    def indices(self) -> list[tuple[int, ...]]:
        """Indices of all blocks in raster order."""
        return list(product(*map(range, self.block_counts)))

    def block(self, index: tuple[int, ...]) -> Block:
        """The block at `index` of the block grid."""
        edges = [(a.edges[i], a.edges[i + 1]) for a, i in zip(self.axes, index, strict=True)]
        # A core that lies in the padding owns nothing and its patch need not be evaluated.
        numbers = [
            [p for p in a.patches(i) if a.axis.core(p)[0] < a.axis.core(p)[1]]
            for a, i in zip(self.axes, index, strict=True)
        ]
        window = tuple(
            (a.axis.start(p[0]), a.axis.start(p[-1]) + a.axis.patch) for a, p in zip(self.axes, numbers, strict=True)
        )
        patches = []
        for number in product(*numbers):
            starts = [a.axis.start(n) for a, n in zip(self.axes, number, strict=True)]
            cores = [a.axis.core(n) for a, n in zip(self.axes, number, strict=True)]
            patches.append(
                Patch(
                    tuple(slice(s - w, s - w + p) for s, (w, _), p in zip(starts, window, self.patch, strict=True)),
                    tuple(slice(c - s, d - s) for s, (c, d) in zip(starts, cores, strict=True)),
                    tuple(slice(c - e, d - e) for (e, _), (c, d) in zip(edges, cores, strict=True)),
                )
            )
        return Block(index, tuple(slice(*e) for e in edges), window, tuple(patches))

    def __iter__(self) -> Iterator[Block]:
        return (self.block(index) for index in self.indices())


def make_grid(
    shape: tuple[int, ...], patch: tuple[int, ...], block_size: int = DEFAULT_BLOCK_SIZE, halo: int = 0
) -> Grid:
    """Lay patches and blocks over a tomogram.

    Parameters
    ----------
    shape
        Shape of the tomogram, (z, y, x) or (y, x).
    patch
        Shape of a patch, in the same order.
    block_size
        Block edge in voxels to aim for; along each axis the largest number of cores that fits. With CryoSiam's patches
        an odd number, at least 3.
    halo
        See `PatchAxis`.

    Raises
    ------
    ConfigurationError
        If patch and tomogram differ in their number of axes, a patch is not a positive multiple of 4, or the halo too
        large.
    """
    if len(shape) != len(patch):
        raise ConfigurationError(
            f"the patch must have as many axes as the tomogram, which has {len(shape)}",
            place="parameters.data.patch_size",
            value=list(patch),
            remedy="Use a model and a patch size for 2-D images or for 3-D tomograms, whichever this is",
        )
    axes = [PatchAxis(size, p, halo) for size, p in zip(shape, patch, strict=True)]
    cores = [
        max(3, (block_size // axis.stride - 1) // 2 * 2 + 1)
        if axis.exact
        # Wide enough that a block's halo never reaches past its neighbour.
        else max(math.ceil(2 * axis.halo / axis.stride), block_size // axis.stride, 1)
        for axis in axes
    ]
    return Grid(tuple(BlockAxis(axis, d) for axis, d in zip(axes, cores, strict=True)))


def block_size_for(
    shape: tuple[int, ...],
    patch: tuple[int, ...],
    largest: int,
    workers: int,
    halo: int = 0,
    fits: Callable[[Grid], bool] = lambda grid: True,
) -> int:
    """Largest block size up to `largest` that `fits` and gives every worker at least two blocks, if there is one.

    Parameters
    ----------
    shape, patch, halo
        See `make_grid`.
    largest
        Block edge in voxels that must not be exceeded.
    workers
        Number of workers.
    fits
        Whether the blocks of a grid are small enough.
    """
    axis = PatchAxis(1, min(patch), halo)
    # One or two more cores to a block, whichever makes a difference.
    step, smallest = (2 * axis.stride, 3 * axis.stride) if axis.exact else (axis.stride, axis.stride)
    size = largest
    while size > smallest:
        grid = make_grid(shape, patch, size, halo)
        if fits(grid) and math.prod(grid.block_counts) >= 2 * workers:
            break
        size -= step
    return max(size, min(smallest, largest))


def wrapped_segments(start: int, stop: int, size: int, padded: int) -> list[tuple[slice, slice]]:
    """Where the voxels of a window come from.

    Parameters
    ----------
    start, stop
        The window along one axis; `stop` may lie past `padded`.
    size, padded
        Voxels of the axis, and of the axis padded with zeros to at least one patch.

    Returns
    -------
    list of (source, target)
        Slices of the axis and of the window. What no target covers is padding.

    Examples
    --------
    >>> wrapped_segments(2, 9, size=5, padded=6)
    [(slice(2, 5, None), slice(0, 3, None)), (slice(0, 3, None), slice(4, 7, None))]
    """
    segments = []
    for turn in range(start // padded, -(-stop // padded)):
        first, last = max(start, turn * padded), min(stop, turn * padded + size)
        if first < last:
            segments.append((slice(first - turn * padded, last - turn * padded), slice(first - start, last - start)))
    return segments
