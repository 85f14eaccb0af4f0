"""Geometry against a plain restatement of the rules, by exhaustion on small axes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryosiam_dask.core.grid import BlockAxis, PatchAxis, block_size_for, make_grid, wrapped_segments
from cryosiam_dask.errors import ConfigurationError


def owner_by_writing_in_order(size: int, patch: int) -> np.ndarray:
    """Which patch start owns each voxel, found by writing the patches over each other as the rules say."""
    padded = max(size, patch)
    owner = np.full(padded, -1)
    start = 0
    while start < padded:
        if start < padded - patch // 4:
            stop = start + patch
            if start == 0:
                owner[0 : 3 * patch // 4] = start
            elif stop >= padded:
                owner[start + patch // 4 : padded] = start
            else:
                owner[start + patch // 4 : stop - patch // 4] = start
        start += patch // 2
    return owner[:size]


@pytest.mark.parametrize("patch", [4, 8, 12, 16, 32])
def test_cores_are_the_owners_of_every_voxel(patch: int) -> None:
    for size in range(1, 5 * patch):
        axis = PatchAxis(size, patch)
        owner = np.full(size, -1)
        for i, start in enumerate(axis.starts):
            a, b = axis.core(i)
            assert (owner[a:b] == -1).all()
            owner[a:b] = start
            assert a == b or (start <= a and b <= start + patch)
        np.testing.assert_array_equal(owner, owner_by_writing_in_order(size, patch))
        assert axis.extent == axis.starts[-1] + patch


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("cores", [3, 5, 7])
def test_blocks_own_whole_cores_and_whole_chunks(patch: int, cores: int) -> None:
    for size in range(1, 6 * patch):
        blocks = BlockAxis(PatchAxis(size, patch), cores)
        edges = blocks.edges
        assert edges[0] == 0 and edges[-1] == size and all(a < b for a, b in pairwise(edges))
        assert all(edge % blocks.chunk == 0 for edge in edges[:-1])
        numbers = [n for b in range(blocks.count) for n in blocks.patches(b)]
        assert numbers == list(range(blocks.axis.count))
        for b in range(blocks.count):
            cores_of_block = [blocks.axis.core(n) for n in blocks.patches(b)]
            assert cores_of_block[0][0] == edges[b] and cores_of_block[-1][1] == edges[b + 1]


@pytest.mark.parametrize(("patch", "halo"), [(8, 1), (8, 3), (16, 3), (16, 6), (16, 7), (32, 4)])
def test_patches_with_another_halo_keep_it_on_all_sides(patch: int, halo: int) -> None:
    for size in range(1, 6 * patch):
        axis = PatchAxis(size, patch, halo)
        cores = [axis.core(i) for i in range(axis.count)]
        assert cores[0][0] == 0 and cores[-1][1] == size
        assert all(a < b for a, b in cores) and all(left[1] == right[0] for left, right in pairwise(cores))
        for (a, b), start in zip(cores, axis.starts, strict=True):
            assert start == 0 or a - start == halo
            assert b == size or start + patch - b >= halo
            assert b <= start + patch
        # No patch too many: without the last one, the end of the axis would not be seen.
        assert axis.count == 1 or axis.starts[-2] + patch < size
        assert axis.count > 1 or size <= patch
        for number in range(1, 4):
            blocks = BlockAxis(axis, number)
            assert all(edge % blocks.chunk == 0 for edge in blocks.edges[:-1])
            assert [n for b in range(blocks.count) for n in blocks.patches(b)] == list(range(axis.count))
            assert all(blocks.edges[b] == axis.core(blocks.patches(b)[0])[0] for b in range(blocks.count))


def test_a_halo_of_a_quarter_is_that_of_cryosiam() -> None:
    assert PatchAxis(300, 128, 32) == PatchAxis(300, 128)
    assert make_grid((300, 200), (64, 64), 128, halo=16) == make_grid((300, 200), (64, 64), 128)


@given(
    st.lists(st.tuples(st.integers(1, 70), st.sampled_from([4, 8, 16])), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 7),
)
def test_patches_fill_every_block_once(axes: list[tuple[int, int]], block_size: int, halo: int) -> None:
    shape, patch = tuple(s for s, _ in axes), tuple(p for _, p in axes)
    grid = make_grid(shape, patch, block_size, halo=min(halo, min(patch) // 2 - 1))
    written = np.zeros(shape, int)
    for block in grid:
        view = written[block.region]
        assert view.shape == block.shape
        assert all(a <= b for a, b in zip(block.shape, grid.largest_block, strict=True))
        assert all(a <= b for a, b in zip(block.window_shape, grid.largest_window, strict=True))
        for p in block.patches:
            view[p.target] += 1
            assert tuple(s.stop - s.start for s in p.window) == patch
            for window, core, target, (start, stop), region in zip(
                p.window, p.core, p.target, block.window, block.region, strict=True
            ):
                assert 0 <= window.start and window.stop <= stop - start
                # The same voxel of the tomogram, seen from the window and from the region.
                assert start + window.start + core.start == region.start + target.start
                assert core.stop - core.start == target.stop - target.start > 0
    assert (written == 1).all()


def test_every_voxel_stands_in_the_middle_of_its_patch() -> None:
    axis = PatchAxis(300, 128)
    for i in range(1, axis.count - 1):
        start, stop = axis.core(i)
        assert (start - axis.starts[i], stop - axis.starts[i]) == (32, 96)


@given(st.integers(0, 200), st.integers(1, 200), st.integers(1, 40), st.integers(0, 30))
def test_wrapped_segments_are_a_modulo(start: int, length: int, size: int, padding: int) -> None:
    padded = size + padding
    expected = np.array([v % padded if v % padded < size else -1 for v in range(start, start + length)])
    found = np.full(length, -1)
    for source, target in wrapped_segments(start, start + length, size, padded):
        found[target] = np.arange(size)[source]
    np.testing.assert_array_equal(found, expected)


def test_block_size_is_what_was_asked_for_where_it_fits() -> None:
    assert make_grid((900,), (128,), 200).largest_block == (192,)
    assert make_grid((900,), (128,), 320).largest_block == (320,)
    assert make_grid((900,), (128,), 1).largest_block == (192,)
    assert make_grid((900,), (128,), 319).chunks == (96,)


def test_refusals_name_rule_value_place_and_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r"patch_size.*multiple of 4.*found 30.*Set it to 3[02]|Set it to 28"):
        PatchAxis(100, 30)
    with pytest.raises(ConfigurationError, match="as many axes as the tomogram, which has 2"):
        make_grid((100, 100), (32, 32, 32))
    with pytest.raises(ConfigurationError, match="at least one voxel"):
        PatchAxis(0, 32)
    with pytest.raises(ConfigurationError, match=r"halo: a halo must be less than half.*found 16.*Set it to 8 or less"):
        PatchAxis(100, 32, 16)
    with pytest.raises(ValueError, match="odd number"):
        BlockAxis(PatchAxis(100, 32), 4)


@given(
    st.integers(1, 400),
    st.sampled_from([8, 16, 32]),
    st.integers(4, 300),
    st.integers(1, 20),
    st.sampled_from([0, 1, 3]),
)
def test_blocks_shrink_until_every_worker_has_two(size: int, patch: int, largest: int, workers: int, halo: int) -> None:
    shape, patches = (size, size), (patch, patch)

    def count(block_size: int) -> int:
        return int(np.prod(make_grid(shape, patches, block_size, halo).block_counts))

    chosen = block_size_for(shape, patches, largest, workers, halo)
    assert chosen <= largest
    assert count(chosen) >= min(2 * workers, count(1))
    step = patch - 2 * halo if halo else patch
    assert chosen == largest or count(chosen + step) < 2 * workers
