"""Patches, cores and blocks: the integer geometry of a run. No arrays, no Dask, no torch.

There are two grids. The *patch* grid determines the results: which voxels the network sees at once, and for which of
them its output is kept. The *block* grid determines speed and memory, but never a result: which voxels one task reads,
predicts and writes. Along one axis of ``size`` voxels with patches of ``patch`` voxels:

1. An axis shorter than the patch is padded with zeros at its end, to ``patch`` voxels (``padded``).
2. Patches start at 0, patch/2, patch, … while the start lies before ``padded - patch/4``.
3. A patch that reaches past the end sees the axis wrapped around: voxel ``padded + k`` is voxel ``k``.
4. Only the *core* of each patch is kept: [0, 3/4 patch) of the first one, the middle half of every other one, and
   everything up to the end of the last one. So exactly one patch owns each voxel.
5. All inner core edges are odd multiples of patch/4. A block owns a whole number of cores. With an odd number ``d`` of
   cores per block, block edges at ``c, 3c, 5c, …`` with ``c = d * patch/4`` are core edges and multiples of ``c``. So
   in arrays with chunks of ``c`` voxels, no two blocks write to the same chunk.

>>> axis = PatchAxis(size=300, patch=128)
>>> axis.starts
(0, 64, 128, 192, 256)
>>> [axis.core(i) for i in range(axis.count)]
[(0, 96), (96, 160), (160, 224), (224, 288), (288, 300)]
>>> BlockAxis(axis, cores=3).edges
(0, 96, 288, 300)

These are CryoSiam's own patches. With a *halo* other than patch/4, all cores but the last have ``patch - 2 * halo``
voxels and begin at multiples of that, the first patch starts with the axis, and the last one keeps everything up to
the end. Rules 1 and 3 still hold; blocks are multiples of the core.

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

#: Default block edge in voxels: large compared with the halo, small compared with a worker's memory.
DEFAULT_BLOCK_SIZE = 320


#: Largest chunk along an axis, in voxels, with patches other than CryoSiam's.
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
        Voxels on either side of a core that the network sees but that are not kept; less than half a patch. 0 means
        patch/4, as in CryoSiam.

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
                f"a halo must be less than half of its patch, which has {self.patch} voxels",
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
        """Voxels from the first patch's start to the last one's end, wrapped ones included."""
        return self.start(self.count - 1) + self.patch

    def start(self, i: int) -> int:
        """First voxel of patch `i`."""
        return max(0, self._core_start(i) - self.halo)

    def core(self, i: int) -> tuple[int, int]:
        """Return the voxels [start, stop) that patch `i` owns; empty if they are all padding."""
        stop = self.padded if i == self.count - 1 else self._core_start(i + 1)
        return min(self._core_start(i), self.size), min(stop, self.size)

    def _core_start(self, i: int) -> int:
        # CryoSiam's first core also keeps the voxels that are the left halo of other patches.
        return 0 if i == 0 else i * self.stride + (self.halo if self.exact else 0)


@dataclass(frozen=True, slots=True)
class BlockAxis:
    """The blocks along one axis.

    Parameters
    ----------
    axis
        Its patches.
    cores
        Patch cores per block, at least 1. With CryoSiam's patches this is an odd number of at least 3, and the first
        block is half as long as the others.
    """

    axis: PatchAxis
    cores: int

    def __post_init__(self) -> None:
        if self.cores < 1 or (self.axis.exact and (self.cores < 3 or self.cores % 2 == 0)):
            raise ValueError(f"a block must own an odd number of at least 3 cores along an axis; found {self.cores}")

    @property
    def chunk(self) -> int:
        """Voxels of an output chunk, which divides every inner block edge; half a block with CryoSiam's patches."""
        if self.axis.exact:
            return self.cores * self.axis.halo
        stride = self.axis.stride
        return max(part for part in range(1, min(stride, _CHUNK) + 1) if stride % part == 0)

    @property
    def edges(self) -> tuple[int, ...]:
        """Block edges in voxels, from 0 to the size of the axis."""
        return (0, *self._inner_edges, self.axis.size)

    @property
    def _inner_edges(self) -> range:
        step = self.cores * self.axis.stride
        first = self.chunk if self.axis.exact else step
        # No edge may cut the last core, which may be longer than the others.
        last = self.axis.size - 1 if self.axis.exact else self.axis.core(self.axis.count - 1)[0]
        return range(first, last + 1, step)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._inner_edges) + 1

    def patches(self, block: int) -> range:
        """Return the numbers of the patches whose cores block `block` owns."""
        start, stop = self.edges[block], self.edges[block + 1]
        last = self.axis.count if stop == self.axis.size else self._owner(stop)
        return range(self._owner(start), last)

    def _owner(self, edge: int) -> int:
        """Return the number of the patch whose core begins at `edge`, an inner block edge or 0."""
        return (edge - self.axis.halo) // self.axis.stride if self.axis.exact and edge else edge // self.axis.stride


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch of a block.

    Attributes
    ----------
    window
        Region of the patch in the block's window.
    core
        Region of the core in the patch.
    target
        Region of the core in the block.
    """

    window: tuple[slice, ...]
    core: tuple[slice, ...]
    target: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The voxels that one task predicts.

    Attributes
    ----------
    index
        Its place in the block grid.
    region
        The voxels that it owns, one slice per axis: whole output chunks.
    window
        The voxels that its patches see, (start, stop) per axis. It never starts before 0, but may end past the
        tomogram, which is then padded and wrapped around (see `wrapped_segments`).
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
        One `BlockAxis` per axis, in array order (z, y, x).
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
        """Chunk shape of the arrays that blocks write, no larger than the tomogram."""
        return tuple(min(a.chunk, a.axis.size) for a in self.axes)

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(a.count for a in self.axes)

    @property
    def patch_count(self) -> int:
        """Number of patches of the whole tomogram."""
        return math.prod(a.axis.count for a in self.axes)

    @property
    def largest_window(self) -> tuple[int, ...]:
        """Upper bound of the shapes of the blocks' windows."""
        return tuple(min((a.cores - 1) * a.axis.stride + a.axis.patch, a.axis.extent) for a in self.axes)

    @property
    def largest_block(self) -> tuple[int, ...]:
        """Upper bound of the shapes of the blocks."""
        # With other patches the last core has no halo behind it, nor in front of it if it is the only core.
        return tuple(
            min(a.cores * a.axis.stride + (0 if a.axis.exact else 2 * a.axis.halo), a.axis.size) for a in self.axes
        )

    def indices(self) -> list[tuple[int, ...]]:
        """Return the indices of all blocks in raster order."""
        return list(product(*map(range, self.block_counts)))

    def block(self, index: tuple[int, ...]) -> Block:
        """Return the block at `index` of the block grid."""
        edges = [(a.edges[i], a.edges[i + 1]) for a, i in zip(self.axes, index, strict=True)]
        # A core in the padding owns no voxel of the tomogram, so its patch is skipped.
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
    """Divide a tomogram into patches and blocks.

    Parameters
    ----------
    shape
        Shape of the tomogram, (z, y, x) or (y, x).
    patch
        Shape of a patch, in the same order.
    block_size
        Wanted block edge in voxels. Along each axis a block gets as many cores as fit into it; with CryoSiam's patches,
        an odd number of at least 3.
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
        # Large enough that a block's halo never reaches past its neighbour.
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
    """Return the largest block size that `fits` and gives every worker at least two blocks, else the smallest one.

    Parameters
    ----------
    shape, patch, halo
        See `make_grid`.
    largest
        Largest allowed block edge in voxels.
    workers
        Number of workers.
    fits
        Whether the blocks of a grid are small enough.
    """
    axis = PatchAxis(1, min(patch), halo)
    # The number of cores per block goes up by two with CryoSiam's patches, else by one.
    step, smallest = (2 * axis.stride, 3 * axis.stride) if axis.exact else (axis.stride, axis.stride)
    size = largest
    while size > smallest:
        grid = make_grid(shape, patch, size, halo)
        if fits(grid) and math.prod(grid.block_counts) >= 2 * workers:
            break
        size -= step
    return max(size, min(smallest, largest))


def wrapped_segments(start: int, stop: int, size: int, padded: int) -> list[tuple[slice, slice]]:
    """Return where the voxels of a window come from.

    Parameters
    ----------
    start, stop
        The window along one axis; `stop` may lie past `padded`.
    size, padded
        Voxels of the axis, and of the axis padded with zeros to at least one patch.

    Returns
    -------
    list of (source, target)
        Slices of the axis and of the window. Voxels of the window that no target covers are padding.

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
