"""The network against arithmetic done by hand; `test_predictor` compares it with CryoSiam's own results."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cryosiam_dask.model.architecture import peak_bytes, required_divisor, required_halo
from cryosiam_dask.model.network import BiFPN, Network, fold_batch_norms
from support.checkpoints import SMALL

VARIANTS = {
    "fpn": SMALL,
    "basic, later": replace(SMALL, block_type="basic", later_convolutions=True, num_layers=(1, 2, 1, 1)),
    "bifpn": replace(SMALL, decoder="bifpn", bifpn_layers=2),
    "2-D": replace(SMALL, spatial_dims=2, kernel_size=(3, 3)),
    "2-D bifpn": replace(SMALL, spatial_dims=2, kernel_size=(5, 1), decoder="bifpn", bifpn_layers=1),
    "one class, three widths": replace(SMALL, out_channels=1, semantic_widths=(4, 3, 2), distance_widths=(4, 3, 2)),
}


def run(network, *arguments, **keywords):
    with torch.inference_mode():
        return network.eval()(*arguments, **keywords)


def constant_levels(values, dims=3, size=16):
    """One channel a level, constant, at strides 1, 2, 4, …"""
    return [torch.full((1, 1, *(size >> i,) * dims), float(value)) for i, value in enumerate(values)]


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_and_distances_have_the_shape_of_the_patch(name):
    architecture = VARIANTS[name]
    network = Network(architecture)
    shape = (16, 32, 16)[: architecture.spatial_dims]
    scores, distances = run(network, torch.rand(2, 1, *shape), distances=True)
    assert scores.shape == distances.shape == (2, architecture.out_channels, *shape)
    assert scores.dtype == distances.dtype == torch.float32
    assert run(network, torch.rand(1, 1, *shape))[1] is None


def randomised(architecture):
    """A network whose batch norms and fusions do something."""
    torch.manual_seed(1)
    network = Network(architecture)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 or name.endswith((".w1", ".w2")):
            tensor.copy_(torch.rand_like(tensor, dtype=torch.float32) + 0.5)
    return network


@pytest.mark.parametrize("name", VARIANTS)
def test_a_core_is_evaluated_as_in_its_whole_patch(name):
    architecture = VARIANTS[name]
    network, dims = randomised(architecture).double(), architecture.spatial_dims
    patch = torch.rand(2, 1, *(48, 48, 48)[:dims], dtype=torch.float64)
    scores, distances = run(network, patch, distances=True)
    sides = [(0, 24), (12, 36), (29, 48)], [(8, 24), (0, 24), (47, 48)], [(9, 10), (0, 48), (17, 25)]
    for core in (*zip(*sides[:dims], strict=True), *zip(*sides[dims - 1 :: -1], strict=True)):
        region = tuple(slice(*side) for side in core)
        for whole, part in zip((scores, distances), run(network, patch, distances=True, core=region), strict=True):
            torch.testing.assert_close(part, whole[(..., *region)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_core_takes_less_work_than_its_patch(name):
    architecture = VARIANTS[name]
    network, patch = Network(architecture), torch.rand(1, 1, *(64,) * architecture.spatial_dims)
    voxels = []
    network.semantic_head.register_forward_hook(lambda _, given, __: voxels.append(math.prod(given[0].shape[2:])))
    run(network, patch, core=(slice(16, 48),) * architecture.spatial_dims)
    assert voxels == [math.prod(32 + 2 * margin for margin in network.margin)]


@pytest.mark.parametrize("name", VARIANTS)
def test_folding_batch_norms_changes_nothing(name):
    architecture = VARIANTS[name]
    network = randomised(architecture).double()
    patch = torch.rand(1, 1, *(32,) * architecture.spatial_dims, dtype=torch.float64)
    expected = run(network, patch, distances=True)
    fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in network.modules())
    for found, whole in zip(run(network, patch, distances=True), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_no_numbers_are_drawn_for_weights_that_a_checkpoint_replaces():
    """PyTorch would load compilers for that, in every worker."""
    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.add(str(function))
            return function(*arguments, **(options or {}))

    with torch.device("meta"), Recorder():
        Network(SMALL)
    assert "aten.empty.memory_format" in called and not any("normal" in name for name in called), called


def test_a_halo_covers_what_the_heads_and_the_coarsest_level_reach():
    assert required_halo(SMALL) == 3 + 8
    assert required_halo(VARIANTS["basic, later"]) == 3 + 1 + 8
    assert required_halo(VARIANTS["bifpn"]) == 3 + 16
    assert required_halo(VARIANTS["2-D bifpn"]) == 3 * 2 + 16
    assert required_halo(VARIANTS["one class, three widths"]) == 4 + 8


@pytest.mark.parametrize("size", [8, 16, 24, 40])
def test_every_multiple_of_the_divisor_is_a_patch(size):
    assert required_divisor(SMALL) == 8 and required_divisor(VARIANTS["bifpn"]) == 16
    assert run(Network(SMALL), torch.rand(1, 1, size, size, size))[0].shape[2:] == (size,) * 3


@pytest.mark.parametrize("name", ["basic, later", "bifpn"])
def test_what_prediction_does_not_use_is_not_evaluated(name):
    network = Network(VARIANTS[name])
    evaluated = set()
    for path, module in network.named_modules():
        module.register_forward_hook(lambda *_, path=path: evaluated.add(path))
    run(network, torch.rand(1, 1, 16, 16, 16))
    unused = {path for path, module in network.named_modules() if not any(module.children())} - evaluated
    # The other head, and what feeds only coarser levels of the result.
    expected = {path for path in unused if path.startswith("distance_head.")}
    if name == "bifpn":
        expected |= {path for path in unused if path.startswith("decoder.bifpn.1.p") and "_out." in path}
    else:
        expected |= {f"decoder.later_conv{number}" for number in (1, 2, 3)}
    assert unused == expected


def test_the_pyramid_adds_enlarged_levels():
    decoder = Network(replace(SMALL, fpn_channels=1, num_filters=(1, 1, 1, 1), block_type="basic")).decoder
    for number in (1, 2, 3, 4):
        nn.init.constant_(decoder.get_submodule(f"layer{number}").weight, 10.0**number)
        nn.init.constant_(decoder.get_submodule(f"layer{number}").bias, 0)
    merged = run(decoder, constant_levels([1, 2, 3, 4]), (slice(0, 16),) * 3)
    torch.testing.assert_close(merged, torch.full_like(merged, 1e4 * 1 + 1e3 * 2 + 1e2 * 3 + 1e1 * 4))


def test_levels_are_enlarged_linearly_between_voxel_centres():
    decoder = Network(replace(SMALL, fpn_channels=1, num_filters=(1, 1, 1, 1), block_type="basic")).decoder
    for number in (1, 2, 3, 4):
        nn.init.constant_(decoder.get_submodule(f"layer{number}").weight, 1)
        nn.init.constant_(decoder.get_submodule(f"layer{number}").bias, 0)
    levels = constant_levels([0, 0, 0, 0], size=8)
    levels[1][0, 0, :, :, 1] = 1  # one bright plane of four: voxel centres at 0.5, 2.5, 4.5 and 6.5 of the finer level
    merged = run(decoder, levels, (slice(0, 8),) * 3)
    expected = torch.tensor([0, 0.25, 0.75, 0.75, 0.25, 0, 0, 0])
    torch.testing.assert_close(merged[0, 0, 3, 5], expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_bidirectional_pyramid_on_constant_levels(dims, layers):
    # With units that pass on what they get, constant levels are plain numbers.
    architecture = replace(
        SMALL, spatial_dims=dims, block_type="basic", num_filters=(1,) * 4, fpn_channels=1, bifpn_layers=layers
    )
    torch.manual_seed(layers)
    decoder = BiFPN(architecture)
    for name, parameter in decoder.named_parameters():
        if name.endswith((".w1", ".w2")):
            nn.init.uniform_(parameter, -0.2, 1)  # negative shares count as none
        else:
            nn.init.constant_(parameter, 0 if name.endswith("bias") else 1)
    nn.init.zeros_(decoder.p6.conv.weight)
    nn.init.constant_(decoder.p6.conv.bias, 5.0)
    unit = 1 / math.sqrt(1 + 4e-5)  # a fresh batch norm

    def fuse(weights, column, values):
        shares = [max(0.0, float(w)) for w in weights[:, column]]
        return unit * sum(s * v for s, v in zip(shares, values, strict=True)) / (sum(shares) + 1e-4)

    levels = [1.0, 2.0, 3.0, 4.0, 5.0 * unit]
    for exchange in decoder.bifpn:
        w1, w2 = exchange.w1.detach(), exchange.w2.detach()
        down = dict(enumerate(levels))
        for column, i in enumerate((3, 2, 1, 0)):
            down[i] = fuse(w1, column, (levels[i], down[i + 1]))
        up = [down[0]]
        for column, i in enumerate((1, 2, 3, 4)):
            up.append(fuse(w2, column, (levels[i], down[i], up[-1])))
        levels = up
    merged = run(decoder, constant_levels([1, 2, 3, 4], dims), (slice(0, 16),) * dims)
    torch.testing.assert_close(merged, torch.full_like(merged, levels[0]))


def test_memory_estimate_grows_with_voxels_and_batch():
    weights = sum(tensor.nbytes for tensor in Network(SMALL).state_dict().values())
    one, two = (peak_bytes(SMALL, (16, 16, 16), batch_size) for batch_size in (1, 2))
    assert two - weights == 2 * (one - weights) == peak_bytes(SMALL, (16, 32, 16)) - weights
    assert one - weights > 4 * 16**3 * 4 * SMALL.level_channels[0]
