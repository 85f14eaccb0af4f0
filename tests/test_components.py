"""Components across chunk borders against the same volume labelled as one array."""

import itertools
import os
import pickle
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import cc3d
import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from cryosiam_dask.core import blocks
from cryosiam_dask.core.blocks import Blocks
from cryosiam_dask.errors import LabelsError
from cryosiam_dask.runs.cluster import open_cluster
from cryosiam_dask.runs.dask_executor import DaskExecutor
from cryosiam_dask.stages import components as module
from cryosiam_dask.stages.components import (
    backend,
    describe_block,
    find_components,
    instances_dtype,
    largest_component,
    relabel_block,
    removal_labelling,
    remove_small,
    write_instances,
)
from support.golden import configuration, expected

REACH = {6: 1, 18: 2, 26: 3}


def whole(labels, connectivity=26):
    """The oracle: instances of the volume as one array, numbered by first voxel, and their count."""
    return cc3d.connected_components(np.ascontiguousarray(labels), connectivity=connectivity, return_N=True)


def instances(labels, **options):
    """Labels cut into blocks, found, and written."""
    components = find_components(labels, **options)
    output = np.full(labels.shape, 7, dtype=np.uint32)
    write_instances(components, labels, output)
    return components, output


def store(values, chunks, group=None, name="labels"):
    group = zarr.group({}) if group is None else group
    return group.create_array(name, data=np.asarray(values), chunks=chunks)


def blobs(shape, classes=4, density=0.16, seed=0, sigma=1.5):
    """Smooth blobs of several classes that touch each other."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    kinds = ndimage.gaussian_filter(rng.standard_normal(shape), 2 * sigma)
    cuts = np.quantile(kinds, np.arange(1, classes) / classes)
    return ((noise > np.quantile(noise, 1 - density)) * (1 + np.digitize(kinds, cuts))).astype(np.uint8)


class Backwards:
    """Runs the calls in reverse and each of them twice, as a cluster that lost a worker would."""

    def map(self, function, items, *, name):
        results = [(function(item), function(item))[1] for item in reversed(items)]
        return results[::-1]


@pytest.fixture(scope="module")
def processes():
    """Runs the calls in two other processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:

        class Processes:
            def map(self, function, items, *, name):
                return list(pool.map(function, items))

        yield Processes()


@st.composite
def cases(draw, dtypes=("uint8", "int16", "uint32", "int64", "bool")):
    """A random volume, a block shape and a connectivity."""
    shape = draw(st.tuples(*[st.integers(1, 8)] * 3))
    block = draw(st.tuples(*[st.integers(1, 5)] * 3))
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes = 1 if dtype == "bool" else draw(st.integers(1, 4))
    labels = rng.integers(1, classes, shape, endpoint=True) * (rng.random(shape) < draw(st.floats(0, 1)))
    return labels.astype(dtype), block, draw(st.sampled_from([6, 18, 26]))


# ---- equal to the whole array ----


@given(cases())
def test_equal_to_the_whole_array_with_its_numbers(case):
    labels, block, connectivity = case
    components, output = instances(labels, block=block, connectivity=connectivity)
    reference, count = whole(labels, connectivity)
    np.testing.assert_array_equal(output, reference)
    other = skimage_label(labels, background=0, connectivity=REACH[connectivity])  # in an order of its own
    pairs = np.unique(np.stack([output.reshape(-1), other.reshape(-1)]), axis=1)
    assert all(len(np.unique(side)) == pairs.shape[1] for side in pairs)
    assert len(components) == count
    assert np.all(np.diff(components.first) > 0)
    assert components.voxels.sum() == np.count_nonzero(labels)
    np.testing.assert_array_equal(components.voxels, np.bincount(reference.ravel(), minlength=count + 1)[1:])
    np.testing.assert_array_equal(components.first, [np.argmax(reference == k) for k in range(1, count + 1)])
    np.testing.assert_array_equal(components.classes, labels.reshape(-1)[components.first])


@given(cases(dtypes=["uint8"]), st.integers(0, 2**32))
def test_measurements_equal_those_of_the_whole_array(case, seed):
    labels, block, connectivity = case
    probabilities = np.random.default_rng(seed).random((5, *labels.shape), dtype=np.float32)
    components = find_components(labels, block=block, connectivity=connectivity, probabilities=probabilities)
    own = np.take_along_axis(probabilities, labels[None].astype(int), axis=0)[0].astype(float)
    reference, _ = whole(labels, connectivity)
    measured = components.measurements
    for k, region in enumerate(regionprops(reference, intensity_image=own)):
        assert components.voxels[k] == region.area
        np.testing.assert_allclose(measured.centroids[k], region.centroid, rtol=1e-14)
        assert (*measured.lower[k], *measured.upper[k]) == region.bbox
        assert measured.max_probability[k] == region.intensity_max
        np.testing.assert_allclose(measured.mean_probability[k], region.intensity_mean, rtol=0, atol=1e-9)
        assert measured.touches_border[k] == (0 in measured.lower[k] or any(measured.upper[k] == labels.shape))


def test_measurements_do_not_depend_on_the_blocks_in_any_bit():
    labels = blobs((20, 24, 28))
    probabilities = np.random.default_rng(1).random((5, *labels.shape), dtype=np.float32)
    first, *others = (
        find_components(labels, block=block, probabilities=probabilities).measurements
        for block in [(20, 24, 28), (7, 5, 9), (1, 24, 3)]
    )
    for other in others:
        for name in ("centroids", "lower", "upper", "touches_border", "mean_probability", "max_probability"):
            assert getattr(first, name).tobytes() == getattr(other, name).tobytes(), name


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 3)))
def test_an_image_is_labelled_as_one_slice(image):
    for connectivity, reach in ((6, 1), (18, 2), (26, 2)):
        components, output = instances(image, block=(4, 3), connectivity=connectivity, measure=True)
        reference, count = skimage_label(image, background=0, connectivity=reach, return_num=True)
        np.testing.assert_array_equal(output, reference)
        border = {*reference[0], *reference[-1], *reference[:, 0], *reference[:, -1]} - {0}
        assert set(np.flatnonzero(components.measurements.touches_border) + 1) == border
        assert len(components) == count


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (0, 0, 0), (0, 4), (5, 6, 7), (5, 6)])
def test_nothing_in_the_volume(shape):
    labels = np.zeros(shape, dtype=np.uint8)
    components, output = instances(labels, block=(2, 2, 2)[: len(shape)], measure=True)
    assert len(components) == 0 and not output.any()
    assert components.measurements.centroids.shape == (0, 3)
    assert components.select(np.zeros(0, dtype=bool)).voxels.size == 0
    assert largest_component(labels)[1] == 0
    stored, filtered = (store(labels, (1,) * len(shape)) for _ in range(2))
    assert remove_small(stored, filtered, [-1, 5]).found == (0, 0) and not filtered[:].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 8), (9, 1, 8), (9, 8, 1), (1, 1, 20), (20, 1, 1), (1, 20)])
@pytest.mark.parametrize("connectivity", REACH)
def test_axes_of_length_one(shape, connectivity):
    labels = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    labels.flat[-1] = 1
    reference, count = whole(labels.reshape((1,) * (3 - len(shape)) + shape), connectivity)
    for edge in (1, 2, 3, 100):
        components, output = instances(labels, block=(edge,) * len(shape), connectivity=connectivity)
        np.testing.assert_array_equal(output, reference.reshape(shape))
        assert len(components) == count


@pytest.mark.parametrize("dtype", ["int8", ">i2", "<u4", ">u8", "bool"])
def test_any_integers_in_any_byte_order_and_read_only(dtype):
    labels = blobs((9, 10, 11), classes=1 if dtype == "bool" else 4).astype(dtype)
    labels.flags.writeable = False
    for view in (labels, np.asfortranarray(labels), labels[::-1, :, ::-1]):
        components, output = instances(view, block=(9, 10, 11))
        native = view.astype(np.uint8 if dtype == "bool" else np.dtype(dtype).newbyteorder("="), order="C")
        np.testing.assert_array_equal(output, whole(native)[0])
        np.testing.assert_array_equal(components.classes, native.reshape(-1)[components.first])


def test_a_full_volume_is_one_component():
    labels = np.ones((5, 6, 7), dtype=np.uint8)
    for block in [(1, 1, 1), (2, 3, 4), (5, 6, 7), (1, 6, 7)]:
        components, output = instances(labels, block=block, measure=True)
        assert components.voxels.tolist() == [210] and (output == 1).all()
        assert components.measurements.centroids.tolist() == [[2, 2.5, 3]]


# ---- structures that are hard to merge ----


@pytest.mark.parametrize("connectivity", REACH)
@pytest.mark.parametrize("step", [s for s in itertools.product((-1, 0, 1), repeat=3) if any(s)])
def test_two_voxels_across_every_face_edge_and_corner(step, connectivity):
    one = np.array([2 if move < 0 else 1 for move in step])
    labels = np.zeros((4, 4, 4), dtype=np.uint8)
    labels[tuple(one)] = labels[tuple(one + step)] = 1
    touching = np.count_nonzero(step) <= REACH[connectivity]
    components, _ = instances(labels, block=(2, 2, 2), connectivity=connectivity)
    assert components.voxels.tolist() == ([2] if touching else [1, 1])
    labels[tuple(one)] = 2  # touching classes never merge
    assert len(find_components(labels, block=(2, 2, 2), connectivity=connectivity)) == 2


def spiral(size=21):
    """One path that winds inwards and enters every chunk many times."""
    image = np.zeros((size, size), dtype=np.uint8)
    position, direction = np.array([0, 0]), np.array([0, 1])
    image[0, 0] = 1
    while True:
        for _ in range(2):
            ahead, beyond = position + direction, position + 2 * direction
            inside = all(0 <= i < size for i in ahead)
            if inside and not (all(0 <= i < size for i in beyond) and image[tuple(beyond)]) and not image[tuple(ahead)]:
                break
            direction = np.array([direction[1], -direction[0]])
        else:
            return np.stack([image, np.zeros_like(image), image])
        position = ahead
        image[tuple(position)] = 1


def comb():
    """Teeth that meet only at the last slice, and a second comb of another class between them."""
    labels = np.zeros((12, 9, 16), dtype=np.uint8)
    labels[:, :, ::4], labels[-1, 0, :] = 1, 1
    labels[:, :, 2::4], labels[0, -1, 1:-1] = 2, 2
    return labels


def u_shape():
    """Leaves the first chunk and comes back to it."""
    labels = np.zeros((4, 10, 10), dtype=np.uint8)
    labels[1, 1, 1:9] = labels[1, 3, 1:9] = labels[1, 1:4, 8] = 1
    return labels


def checkerboard():
    """As many components as there can be at 6-connectivity, one at 18."""
    return (np.indices((9, 10, 11)).sum(axis=0) % 2).astype(np.uint8)


def checkerboard_of_classes():
    """Eight classes, so that no two equal voxels touch: one component a voxel at any connectivity."""
    z, y, x = np.indices((9, 10, 11)) % 2
    return (1 + 4 * z + 2 * y + x).astype(np.uint8)


@pytest.mark.parametrize("make", [spiral, comb, u_shape, checkerboard, checkerboard_of_classes])
@pytest.mark.parametrize("connectivity", REACH)
def test_structures_that_cross_chunks_again_and_again(make, connectivity):
    labels = make()
    reference, count = whole(labels, connectivity)
    for block in [(1, 1, 1), (2, 3, 4), (5, 5, 5), (1, 4, 100), (100, 1, 3)]:
        components, output = instances(labels, block=block, connectivity=connectivity)
        assert len(components) == count
        np.testing.assert_array_equal(output, reference)


# ---- independent of chunks, workers, order, retries; bounded ----


def test_the_result_does_not_depend_on_chunks_workers_order_or_retries(tmp_path, processes):
    labels = blobs((30, 34, 38))
    reference, count = whole(labels)
    group = zarr.open_group(tmp_path / "work.zarr", mode="w")
    for i, (chunks, block, executor) in enumerate(
        [
            ((30, 34, 38), None, module.SERIAL),
            ((8, 8, 8), (8, 16, 24), Backwards()),
            ((7, 11, 13), (7, 11, 13), processes),
            ((16, 16, 16), None, processes),
        ]
    ):
        stored = store(labels, chunks, group, f"labels{i}")
        output = group.create_array(f"output{i}", shape=labels.shape, chunks=chunks, dtype=instances_dtype(count))
        components = find_components(stored, block=block, executor=executor)
        write_instances(components, stored, output, executor=executor)
        assert output[:].tobytes() == reference.astype(instances_dtype(count)).tobytes()


def test_killed_between_or_within_the_passes_and_started_again():
    labels = blobs((20, 20, 20))
    stored = store(labels, (8, 8, 8))
    output = zarr.group({}).create_array("output", shape=labels.shape, chunks=(8, 8, 8), dtype="uint16")

    class Dies:
        def map(self, function, items, *, name):
            for item in items[:5]:
                function(item)
            raise KeyboardInterrupt

    components = find_components(stored, block=(8, 8, 8))
    with pytest.raises(KeyboardInterrupt):
        write_instances(components, stored, output, executor=Dies())
    write_instances(find_components(stored, block=(8, 8, 8)), stored, output)
    np.testing.assert_array_equal(output[:], whole(labels)[0])


@pytest.fixture(scope="module")
def client():
    with open_cluster("cpu", 2, dashboard_address="127.0.0.1:0") as client:
        yield client


def die_once(function, mark, numbered):
    """Do the work on the fourth item and then die, once, before anybody has been told."""
    number, item = numbered
    result = function(item)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result


class Unlucky(DaskExecutor):
    """Loses a worker process amid one step, or just before it."""

    def __init__(self, client, step, mark, amid):
        super().__init__(client)
        self.step, self.mark, self.amid = step, mark, amid

    def map(self, function, items, *, name):
        if name == self.step and self.amid:
            function, items = partial(die_once, function, self.mark), list(enumerate(items))
        elif name == self.step:
            os.kill(next(iter(self.client.run(os.getpid).values())), signal.SIGKILL)
            self.mark.touch()
        return super().map(function, items, name=name)


@pytest.mark.parametrize(
    ("step", "amid"),
    [("label", True), ("number", False), ("number", True), ("remove small", False), ("remove small", True)],
)
def test_a_worker_that_is_killed_changes_nothing(client, step, amid, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_VOXELS", 1)  # one block for each chunk
    labels, sizes = blobs((24, 26, 28)), [-1, 5, 9, -1, 20]
    group = zarr.open_group(tmp_path / "work.zarr", mode="w")
    stored = store(labels, (8, 8, 8), group)
    output, filtered = (
        group.create_array(name, shape=labels.shape, chunks=(8, 8, 8), dtype=dtype, fill_value=7)
        for name, dtype in (("output", "uint16"), ("filtered", "uint8"))
    )
    executor = Unlucky(client, step, tmp_path / "died", amid)
    components = find_components(stored, executor=executor)
    assert len(components.labelling.blocks.indices) == 3 * 4 * 4
    write_instances(components, stored, output, executor=executor)
    remove_small(stored, filtered, sizes, executor=executor)
    assert (tmp_path / "died").exists()
    np.testing.assert_array_equal(output[:], whole(labels)[0])
    np.testing.assert_array_equal(filtered[:], removed(labels, sizes))


@pytest.mark.parametrize("make", [da.from_array, lambda labels, chunks: store(labels, chunks)])
def test_no_chunk_is_labelled_more_than_twice(make, monkeypatch):
    calls = []
    kernel = cc3d.connected_components
    labels = blobs((24, 24, 24))
    labels[:8] = 0  # nine of 27 blocks need not be labelled at all
    reference, count = whole(labels)
    monkeypatch.setattr(cc3d, "connected_components", lambda *args, **named: calls.append(1) or kernel(*args, **named))
    components, output = instances(make(labels, chunks=(8, 8, 8)), block=(8, 8, 8))
    assert len(calls) == 2 * 18
    np.testing.assert_array_equal(output, reference)
    assert len(components) == count


def test_small_chunks_are_labelled_together_and_large_ones_alone():
    def block(shape, chunks):
        return Blocks.of(zarr.group({}).create_array("a", shape=shape, chunks=chunks, dtype="u1")).block

    assert block((512, 512, 512), (64, 64, 64)) == (256, 128, 128)
    assert block((512, 512, 512), (256, 256, 256)) == (256, 256, 256)
    assert block((5, 500, 500), (1, 100, 100)) == (8, 800, 800)
    assert block((4000, 4000), (100, 100)) == (1, 1600, 1600)
    assert block((312, 928, 960), (96, 96, 96)) == (192, 192, 96)
    assert Blocks.of(np.zeros((30, 20, 10))).block == (32, 32, 16)
    assert Blocks.of(da.zeros((30, 20, 10), chunks=((7, 3, 20), 20, 10)), voxels=1).block == (20, 20, 10)


def test_what_the_caller_holds_of_a_block_is_small():
    labels = blobs((128, 128, 128), sigma=2)
    components = find_components(labels, block=(64, 128, 128))
    tables = [components.numbers, components.voxels, components.classes, components.first]
    assert sum(table.nbytes for table in tables) < 0.1 * labels.size
    described = describe_block(labels, (0, 0, 0), labelling=module.Labelling(Blocks.of(labels, (128, 128, 128))))
    assert len(pickle.dumps(described)) < 0.05 * labels.size


def test_counts_beyond_32_bits():
    counts = [2**33, 2**34, 0, 5]
    offsets = module._offsets(counts)
    assert offsets.tolist() == [0, 2**33, 2**33 + 2**34, 2**33 + 2**34, 2**33 + 2**34 + 5]
    assert module._offsets(np.array([2**31, 2**31, 2**31], dtype=np.uint32)).tolist() == [0, 2**31, 2**32, 3 * 2**31]
    assert instances_dtype(2**32 - 1) == np.uint32 and instances_dtype(2**32) == np.uint64

    labels = np.ones((2, 2, 4), dtype=np.uint8)
    labels[:, :, 2:] = [[[0, 1]], [[1, 0]]]
    labelling = module.Labelling(Blocks.of(labels, (2, 2, 2)), connectivity=26)
    described = [
        describe_block(labelling.blocks.read(labels, index), index, labelling=labelling)
        for index in labelling.blocks.indices
    ]
    # As if thousands of millions of labels came before; nothing that large is made.
    pairs = list(module._touching(labelling, described, np.array([2**40, 2**41]), np.broadcast_to(np.uint8(1), 2**42)))
    assert np.concatenate(pairs).tolist() == [[2**40, 2**41]]


# ---- choosing components ----


def test_select_numbers_the_chosen_in_order():
    labels = blobs((20, 20, 20))
    components = find_components(labels, block=(8, 8, 8), probabilities=np.ones((1, 20, 20, 20)))
    keep = components.voxels > np.median(components.voxels)
    chosen = components.select(keep)
    output = np.zeros(labels.shape, dtype=np.uint16)
    write_instances(chosen, labels, output)
    reference, _ = whole(labels)
    np.testing.assert_array_equal(output > 0, np.append(False, keep)[reference])
    assert np.unique(output).tolist() == list(range(keep.sum() + 1))
    np.testing.assert_array_equal(chosen.voxels, np.bincount(output.ravel())[1:])
    np.testing.assert_array_equal(chosen.measurements.centroids, components.measurements.centroids[keep])
    np.testing.assert_array_equal(chosen.measurements.max_probability, 1)


@given(cases(dtypes=["uint8"]), st.sets(st.integers(1, 4)))
def test_only_some_classes(case, wanted):
    labels, block, connectivity = case
    _, output = instances(labels, block=block, connectivity=connectivity, classes=sorted(wanted))
    np.testing.assert_array_equal(output, whole(np.where(np.isin(labels, list(wanted)), labels, 0), connectivity)[0])


@given(cases(["uint8", "int16", "uint32"]))
def test_the_labels_of_a_block_are_numbered_by_their_first_voxel(case):
    """As cucim numbers them, so that a block may be labelled on a CPU and a GPU in turn."""
    block, _, connectivity = case
    labels, count = backend("numpy").label(block, connectivity)
    numbers, first = np.unique(labels[labels > 0], return_index=True)
    assert numbers.tolist() == list(range(1, count + 1)) and (np.diff(first) > 0).all()


def test_the_largest_component_and_the_first_of_equals():
    mask = np.zeros((3, 8, 20), dtype=np.uint8)
    mask[0, 0, 0:3] = mask[1, 3, 3:9] = mask[1, 6, 0:6] = 1
    components, number = largest_component(mask, block=(2, 4, 4))
    assert number == 2 and components.voxels.tolist() == [3, 6, 6]
    found = np.zeros(mask.shape, dtype=bool)
    for index, inside in components.per_block(components.numbers == number):
        found[components.labelling.blocks.slices(index)] = relabel_block(mask, components.labelling, index, inside)
    assert np.argwhere(found).tolist() == [[1, 3, x] for x in range(3, 9)]
    assert largest_component(np.zeros((4, 4, 4), dtype=bool))[1] == 0


# ---- removing what is small ----


def removed(labels, sizes):
    """The oracle: reference-behaviour of each class on its own."""
    result = labels.copy()
    for label, size in enumerate(sizes):
        if label and size >= 0:
            parts, count = ndimage.label(labels == label, np.ones((3,) * labels.ndim))
            small = np.flatnonzero(np.bincount(parts.ravel(), minlength=count + 1) <= size)
            result[np.isin(parts, small[small > 0])] = 0
    return result


@given(cases(dtypes=["uint8", "int16"]), st.lists(st.integers(-1, 12), min_size=5, max_size=5))
def test_removal_equals_labelling_each_class_of_the_whole_array(case, sizes):
    labels, chunks, _ = case
    stored = store(labels, chunks)
    output = zarr.group({}).create_array("output", shape=labels.shape, chunks=chunks, dtype=labels.dtype, fill_value=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_VOXELS", 1)  # one block for each chunk
        summary = remove_small(stored, output, sizes, n_classes=5)
    reference = removed(labels, sizes)
    np.testing.assert_array_equal(output[:], reference)
    gone = np.bincount(labels[reference != labels], minlength=5)
    assert summary.removed_voxels == tuple(gone)
    for label in range(5):
        looked_at = label > 0 and sizes[label] > 0
        assert summary.found[label] == (ndimage.label(labels == label, np.ones((3, 3, 3)))[1] if looked_at else 0)
        left = ndimage.label(reference == label, np.ones((3, 3, 3)))[1]
        assert not looked_at or summary.found[label] - summary.removed[label] == left


@given(
    cases(dtypes=["uint8"]),
    st.lists(st.integers(-1, 12), min_size=5, max_size=5),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_removal_after_blocks_of_any_edges_were_described_elsewhere(case, sizes, voxels, seed):
    labels, chunks, _ = case
    random = np.random.default_rng(seed)
    edges = [sorted({0, size, *random.integers(1, size + 1, 2).tolist()}) for size in labels.shape if size]
    assume(len(edges) == labels.ndim)
    divided = Blocks.within(edges, voxels)
    assert [divided.axis_edges[axis - labels.ndim] for axis in range(labels.ndim)] == [
        tuple(sorted({*axis, *cuts})) for axis, cuts in zip(edges, divided.axis_edges[-labels.ndim :], strict=True)
    ]
    assert np.prod(divided.block) <= voxels
    labelling = removal_labelling(divided, sizes)
    every = [slice(0, size) for size in labels.shape]
    assert divided.inside(every) == divided.indices
    known = [
        index for index in divided.indices if random.random() < 0.7
    ]  # the others are described when they are needed
    described = {index: describe_block(divided.read(labels, index), index, labelling=labelling) for index in known}
    output, removal = (
        zarr.group({}).create_array("output", shape=labels.shape, chunks=chunks, dtype="uint8", fill_value=3)
        for _ in range(2)
    )
    summary = remove_small(
        store(labels, chunks), output, sizes, removed=removal, labelling=labelling, described=described
    )
    reference = removed(labels, sizes)
    np.testing.assert_array_equal(output[:], reference)
    np.testing.assert_array_equal(removal[:], labels - reference)
    kept = np.empty_like(labels)
    assert summary == remove_small(labels, kept, sizes)
    np.testing.assert_array_equal(kept, reference)


@pytest.mark.parametrize("chunks", [None, (5, 9, 7), (2, 3, 7)])
def test_arrays_in_memory_stay_as_they_are(chunks):
    labels = np.random.default_rng(5).integers(0, 4, (5, 9, 7), dtype=np.uint8)
    before, sizes = labels.copy(), [-1, 20, -1, 6]
    given = labels if chunks is None else da.from_array(labels, chunks=chunks)
    output = np.empty_like(labels)
    remove_small(given, output, sizes)
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(output, removed(before, sizes))


@pytest.mark.parametrize("block", [(8, 8, 8), (4, 8, 8), (4, 4, 8), (4, 4, 4)])
def test_more_than_the_size_stays_however_many_chunks_cut_it(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_VOXELS", 1)
    labels = np.zeros((8, 24, 8), dtype=np.uint8)
    for i, voxels in enumerate((63, 64, 65)):  # around the centre of 8 x 8 x 8 voxels: cut by 1, 2, 4 or 8 chunks
        cube = np.zeros((8, 8, 8), dtype=np.uint8)
        cube[2:6, 2:6, 2:6] = 1
        cube[2, 2, 2] = voxels > 63
        cube[1, 4, 4] = voxels > 64
        labels[:, 8 * i : 8 * i + 8] = cube
    output = zarr.group({}).create_array("output", shape=labels.shape, chunks=block, dtype="uint8")
    stored = store(labels, block)
    assert len(Blocks.between(stored, output).indices) == labels.size // np.prod(block)
    summary = remove_small(stored, output, [-1, 64], n_classes=2)
    assert (summary.found, summary.removed, summary.removed_voxels) == ((0, 3), (0, 2), (0, 127))
    np.testing.assert_array_equal(output[:, :16], 0)
    np.testing.assert_array_equal(output[:, 16:], labels[:, 16:])


@pytest.mark.parametrize("chunks", [(72, 88, 80), (32, 32, 32), (9, 50, 21)])
def test_removal_gives_what_cryosiam_wrote(chunks):
    golden = expected("lamella_then_semantic")
    network = configuration("lamella_then_semantic", "config_semantic.yaml")["parameters"]["network"]
    sizes = network["postprocessing_sizes"]
    stored = store(golden["semantic_before_sizes"], chunks)
    output = zarr.group({}).create_array("output", shape=stored.shape, chunks=chunks, dtype="uint8")
    remove_small(stored, output, sizes, n_classes=4)
    np.testing.assert_array_equal(output[:], golden["semantic"])
    again = zarr.group({}).create_array("again", shape=stored.shape, chunks=chunks, dtype="uint8")
    remove_small(output, again, sizes)
    np.testing.assert_array_equal(again[:], golden["semantic"])


def test_removal_in_an_image_and_in_shards():
    labels = blobs((40, 50))
    output = zarr.group({}).create_array("output", shape=labels.shape, chunks=(5, 5), shards=(10, 15), dtype="uint8")
    remove_small(store(labels, (7, 9)), output, [-1, 5, -1, 9, 3])
    np.testing.assert_array_equal(output[:], removed(labels, [-1, 5, -1, 9, 3]))


# ---- refusals ----

FEW = np.array([[[0, 1, 2, 0, 1]]], dtype=np.int16)


def output_of(shape=FEW.shape, chunks=(1, 1, 2), dtype="int16"):
    return zarr.group({}).create_array("output", shape=shape, chunks=chunks, dtype=dtype)


def written(output, block=(1, 1, 3)):
    write_instances(find_components(FEW, block=block), FEW, output)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_components(FEW.astype(float)), "labels must be integers; found float64"),
        (lambda: find_components(-FEW), r"labels\[0:1, 0:1, 0:5\]: labels must not be negative; found -2"),
        (lambda: find_components(FEW, connectivity=8), "connectivity must be 6, 18 or 26; found 8"),
        (lambda: find_components(FEW[0, 0]), r"2-D or 3-D arrays.*shape \(5,\)"),
        (lambda: find_components(FEW, block=(1, 1)), r"same number of axes; found shape \(1, 1, 5\), block \(1, 1\)"),
        (lambda: find_components(FEW, block=(1, 1, 0)), r"a block must hold from 1 to .* voxels; found \(1, 1, 0\)"),
        (lambda: Blocks.of(da.zeros((1024,) * 3, chunks=1024)), r"a block must hold .* Store the array in chunks"),
        (lambda: find_components(FEW, probabilities=np.ones((3, 1, 1, 4))), "must have a class axis and then"),
        (
            lambda: find_components(FEW, probabilities=np.ones((2, *FEW.shape))),
            "its own channel.*; found label 2 and 2 channels",
        ),
        (lambda: written(output_of(), block=(1, 1, 3)), "chunks of 2 voxels do not divide the block edge 3 on axis 2"),
        (lambda: written(output_of((1, 1, 4))), r"the output must have the shape of its input, \(1, 1, 5\)"),
        (lambda: written(output_of(chunks=(1, 1, 1), dtype="float32")), "must hold 3 components; found float32"),
        (lambda: written(output_of(chunks=(1, 1, 1), dtype="bool")), "found bool. Create the output as uint8"),
        (lambda: remove_small(FEW, output_of(), [-1, 3]), r"0:5\]: labels must be below .* 2; found 2"),
        (lambda: remove_small(FEW, output_of(), [-1, 3, 4, 5], n_classes=3), "each of the 3 labels.*found 4 entries"),
        (lambda: remove_small(FEW, output_of(), [-1, 3], n_classes=3), "each of the 3 labels.*found 2 entries"),
        (lambda: remove_small(FEW, output_of(), [-1, 3, -2]), "number of voxels; .*Write -1"),
        (lambda: remove_small(FEW, output_of(dtype="uint8"), [-1, 3, 3]), "must hold labels of int16; found uint8"),
        (
            lambda: remove_small(FEW, output_of(), [-1, 3, 3], removed=output_of(dtype="uint8")),
            "must hold labels of int16; found uint8",
        ),
        (
            lambda: remove_small(FEW, output_of(), [-1, 3, 3], labelling=removal_labelling(Blocks.of(FEW), [-1, 1, 1])),
            r"sizes: blocks must have been described for .*; found \[-1, 3, 3\] and \[-1, 1, 1\]",
        ),
        (lambda: remove_small(FEW, output_of((1, 2, 5)), [-1, 3, 3]), r"the shape of its input, \(1, 1, 5\)"),
        (lambda: remove_small(FEW, FEW, [-1, 3, 3]), "must not be the array of labels"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(LabelsError, match=message) as caught:
        call()
    assert caught.value.remedy


def test_too_many_components_for_the_dtype():
    labels = checkerboard()
    with pytest.raises(LabelsError, match=r"must hold 495 components; found uint8. Create the output as uint16"):
        write_instances(find_components(labels, connectivity=6), labels, np.zeros(labels.shape, dtype=np.uint8))


def test_the_same_stored_array_is_refused_as_output():
    stored = store(FEW, (1, 1, 2))
    with pytest.raises(LabelsError, match="must not be the array of labels"):
        remove_small(stored, zarr.open_array(stored.store_path.store, path="labels"), [-1, 3, 3])


def test_errors_travel_from_the_workers(processes):
    with pytest.raises(LabelsError, match="must not be negative"):
        find_components(-FEW, executor=processes)
    assert pickle.loads(pickle.dumps(partial(module.describe_block, measure=False))).keywords == {"measure": False}
