"""CryoSiam's network for prediction: voxels of patches in, class scores and distances out.

1. **Encoder**, a `ResNet` without pooling in its stem: four levels at strides 1, 2, 4 and 8.
2. **Decoder**, a feature pyramid (`FPN`) or a bidirectional one (`BiFPN`): the four levels merged into one at stride 1.
3. **Projector**, three pointwise convolutions: a dense embedding of `dense_dim` channels.
4. **Heads** on the embedding: class scores (`semantic_head`) and distances (`distance_head`), or denoised intensities
   (`cnn_head`).

The modules have the names that the weights have in a checkpoint. The parts that only training uses (global projections,
predictors, projections of single levels) are left out.

Only the core of a patch is kept, an eighth of it inside a tomogram. The encoder must see the whole patch, but all later
layers are evaluated only on the core and the margin that their convolutions need. That changes no value of the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cryosiam_dask.core.arrays import Region
from cryosiam_dask.model.architecture import EXPANSION, Architecture

_CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


class ResNet(nn.Module):
    """Encoder: a residual network without pooling and classification.

    It follows He et al., Deep Residual Learning for Image Recognition (2015), with the settings of MONAI's `ResNet` in
    CryoSiam: a first convolution of kernel 7 at stride 1, and shortcuts with a bias.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dims, stem = architecture.spatial_dims, architecture.num_filters[0]
        self.conv1 = _CONVOLUTION[dims](architecture.in_channels, stem, 7, padding=3, bias=False)
        self.bn1 = _BATCH_NORM[dims](stem)
        block = _BottleneckBlock if architecture.block_type == "bottleneck" else _BasicBlock
        channels = stem
        for number, (count, width) in enumerate(zip(architecture.num_layers, architecture.num_filters, strict=True), 1):
            blocks = []
            for n in range(count):
                blocks.append(block(dims, channels, width, 2 if number > 1 and n == 0 else 1))
                channels = width * EXPANSION[architecture.block_type]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        for module in self.modules():
            # On the meta device, which stores no values, this would only make PyTorch load its compilers.
            if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the levels of `x` (n, c, *spatial) at strides 1, 2, 4 and 8, finest first."""
        x = functional.relu_(self.bn1(self.conv1(x)))
        levels = []
        for number in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{number}")(x)
            levels.append(x)
        return levels


def _shortcut(dims: int, channels: int, width: int, stride: int) -> nn.Sequential | None:
    """Return the module that gives a block's input the shape of its output; None if the shapes are equal."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(_CONVOLUTION[dims](channels, width, 1, stride=stride), _BATCH_NORM[dims](width))


class _BasicBlock(nn.Module):
    """Two convolutions of kernel 3 beside a shortcut."""

    def __init__(self, dims: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        shortcut = _shortcut(dims, channels, width, stride)
        self.conv1 = _CONVOLUTION[dims](channels, width, 3, padding=1, stride=stride, bias=False)
        self.bn1 = _BATCH_NORM[dims](width)
        self.conv2 = _CONVOLUTION[dims](width, width, 3, padding=1, bias=False)
        self.bn2 = _BATCH_NORM[dims](width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(functional.relu_(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu_(y)


class _BottleneckBlock(nn.Module):
    """Convolutions of kernel 1, 3 and 1 beside a shortcut; the output has four times their width."""

    def __init__(self, dims: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        whole = width * EXPANSION["bottleneck"]
        shortcut = _shortcut(dims, channels, whole, stride)
        self.conv1 = _CONVOLUTION[dims](channels, width, 1, bias=False)
        self.bn1 = _BATCH_NORM[dims](width)
        self.conv2 = _CONVOLUTION[dims](width, width, 3, padding=1, stride=stride, bias=False)
        self.bn2 = _BATCH_NORM[dims](width)
        self.conv3 = _CONVOLUTION[dims](width, whole, 1, bias=False)
        self.bn3 = _BATCH_NORM[dims](whole)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional.relu_(self.bn1(self.conv1(x)))
        y = functional.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu_(y)


class FPN(nn.Module):
    """Feature pyramid: the coarser levels are enlarged linearly and added to the finer ones."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        convolution, width = _CONVOLUTION[architecture.spatial_dims], architecture.fpn_channels
        self.mode = _LINEAR[architecture.spatial_dims]
        self.later_convolutions = architecture.later_convolutions
        # The names count from the coarsest level (1) to the finest (4), unlike those of the encoder.
        for number, channels in zip((4, 3, 2, 1), architecture.level_channels, strict=True):
            self.add_module(f"layer{number}", convolution(channels, width, 1))
            if self.later_convolutions:
                self.add_module(f"later_conv{number}", convolution(width, width, 3, padding=1))

    def forward(self, levels: list[Tensor], region: Region) -> Tensor:
        """Merge `levels`, finest first, into (n, fpn_channels, *region). Empties the list, to free memory early."""
        sizes = [level.shape[2:] for level in levels]
        regions = [_grown(region, (1,) * len(region), sizes[0]) if self.later_convolutions else region]
        doubles = all(tuple(2 * n for n in coarse) == tuple(fine) for fine, coarse in pairwise(sizes))
        if doubles:
            for size in sizes[1:]:
                regions.append(_read_by_enlarging(regions[-1], size))
        else:  # with odd sizes, enlarging mixes voxels in a way that depends on the whole level
            regions = [tuple(slice(0, n) for n in size) for size in sizes]
        x: Tensor = self.get_submodule("layer1")(_part(levels.pop(), regions[-1]))
        for number, coarser, finer in zip((2, 3, 4), regions[:0:-1], regions[-2::-1], strict=True):
            x = functional.interpolate(
                x,
                size=None if doubles else [part.stop for part in finer],
                scale_factor=2 if doubles else None,
                mode=self.mode,
                align_corners=False,
            )
            if doubles:
                x = _part(x, _within(finer, tuple(slice(2 * c.start, 2 * c.stop) for c in coarser)))
            x = self.get_submodule(f"layer{number}")(_part(levels.pop(), finer)).add_(x)
        # Only training uses the later convolutions of the coarser levels.
        x = self.get_submodule("later_conv4")(x) if self.later_convolutions else x
        return _part(x, _within(region, finer))


class BiFPN(nn.Module):
    """Bidirectional feature pyramid over five levels p2 (stride 1) to p6 (stride 16)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dims, width = architecture.spatial_dims, architecture.fpn_channels
        for level, channels in zip((2, 3, 4, 5), architecture.level_channels, strict=True):
            self.add_module(f"p{level}", _CONVOLUTION[dims](channels, width, 1))
        self.p6 = _HalvingUnit(dims, width)
        self.bifpn = nn.ModuleList(_Exchange(dims, width) for _ in range(architecture.bifpn_layers))

    def forward(self, levels: list[Tensor], region: Region) -> Tensor:
        """Merge `levels`, finest first, into (n, fpn_channels, *region). Empties the list, to free memory early."""
        # All kernels below are one voxel wide, so whole voxels of the coarsest level suffice around the region.
        whole = tuple(slice(r.start // 16 * 16, -(-r.stop // 16) * 16) for r in region)
        coarsest = self.get_submodule("p5")(levels.pop())
        at = {level: tuple(slice(r.start >> level - 2, r.stop >> level - 2) for r in whole) for level in range(2, 7)}
        pyramid = [self.get_submodule(f"p{level}")(_part(levels.pop(0), at[level])) for level in (2, 3, 4)]
        pyramid += [_part(coarsest, at[5]), _part(self.p6(coarsest), at[6])]
        for number, exchange in enumerate(self.bifpn, start=1):
            pyramid = exchange(pyramid, finest_only=number == len(self.bifpn))
        return _part(pyramid[0], _within(region, whole))


class _Exchange(nn.Module):
    """One block of the bidirectional pyramid: from coarse to fine, then from fine to coarse."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.ones(2, 4))
        self.w2 = nn.Parameter(torch.ones(3, 4))
        for level in (2, 3, 4, 5):
            self.add_module(f"p{level}_td", _SeparableUnit(dims, width))
        for level in (3, 4, 5, 6):
            self.add_module(f"p{level}_out", _SeparableUnit(dims, width))

    def forward(self, levels: list[Tensor], finest_only: bool) -> list[Tensor]:
        """Exchange between `levels`, finest first; `finest_only` computes and returns only the finest."""
        # Each column holds the weights of one fusion, in the order of the fusions.
        w1, w2 = (weight / (weight.sum(dim=0) + 1e-4) for weight in (self.w1.relu(), self.w2.relu()))
        down = levels[4:]
        for column, level in enumerate((5, 4, 3, 2)):
            coarser = functional.interpolate(down[0], scale_factor=2)
            fused = w1[0, column] * levels[level - 2] + w1[1, column] * coarser
            down.insert(0, self.get_submodule(f"p{level}_td")(fused))
        if finest_only:
            return down[:1]
        up = down[:1]
        for column, level in enumerate((3, 4, 5, 6)):
            finer = functional.interpolate(up[-1], scale_factor=0.5)
            fused = w2[0, column] * levels[level - 2] + w2[1, column] * down[level - 2] + w2[2, column] * finer
            up.append(self.get_submodule(f"p{level}_out")(fused))
        return up


class _SeparableUnit(nn.Module):
    """Depthwise and pointwise convolution, both of kernel 1, batch norm, ReLU."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.depthwise = _CONVOLUTION[dims](width, width, 1, groups=width, bias=False)
        self.pointwise = _CONVOLUTION[dims](width, width, 1, bias=False)
        self.bn = _BATCH_NORM[dims](width, eps=4e-5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.bn(self.pointwise(self.depthwise(x))))


class _HalvingUnit(nn.Module):
    """Convolution of kernel 3 and stride 2, batch norm, ReLU."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.conv = _CONVOLUTION[dims](width, width, 3, stride=2, padding=1)
        self.bn = _BATCH_NORM[dims](width, eps=4e-5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.bn(self.conv(x)))


class Network(nn.Module):
    """Encoder, decoder, projector and heads, with random weights, in training mode.

    Parameters
    ----------
    architecture
        The shapes of its weights.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dims, width, dense = architecture.spatial_dims, architecture.fpn_channels, architecture.dense_dim
        self.encoder = ResNet(architecture)
        self.decoder = FPN(architecture) if architecture.decoder == "fpn" else BiFPN(architecture)
        self.projector = nn.Sequential(
            _CONVOLUTION[dims](width, width, 1, bias=False),
            _BATCH_NORM[dims](width),
            nn.ReLU(inplace=True),
            _CONVOLUTION[dims](width, width, 1, bias=False),
            _BATCH_NORM[dims](width),
            nn.ReLU(inplace=True),
            _CONVOLUTION[dims](width, dense, 1),
            _BATCH_NORM[dims](dense, affine=False),
        )
        for name, widths in architecture.heads.items():
            self.add_module(name, _head(architecture, widths))
        self.first_head = next(iter(architecture.heads))
        self.margin = architecture.head_margin

    def forward(self, x: Tensor, distances: bool = False, core: Region | None = None) -> tuple[Tensor, Tensor | None]:
        """Evaluate patches.

        Parameters
        ----------
        x
            Normalised voxels, float32, (n, in_channels, *spatial).
        distances
            Whether to evaluate the distance head too.
        core
            Region of the patch to return; the whole patch by default.

        Returns
        -------
        scores
            Class scores before softmax or sigmoid, or denoised intensities, float32, (n, out_channels, *core).
        distances
            Output of the distance head, float32, of the same shape; None unless requested.
        """
        size = x.shape[2:]
        core = tuple(slice(0, n) for n in size) if core is None else core
        seen = _grown(core, self.margin, size)
        embedding = self.projector(self.decoder(self.encoder(x), seen))
        inner = _within(core, seen)
        scores = _part(self.get_submodule(self.first_head)(embedding), inner)
        return scores, _part(self.get_submodule("distance_head")(embedding), inner) if distances else None


def _part(x: Tensor, region: Region) -> Tensor:
    where: Any = (..., *region)
    return x[where]


def _grown(region: Region, margin: Sequence[int], size: Sequence[int]) -> Region:
    """Add a margin to `region`, but stay inside `size`; beyond it, the convolutions' padding is correct."""
    return tuple(slice(max(0, r.start - m), min(r.stop + m, n)) for r, m, n in zip(region, margin, size, strict=True))


def _within(region: Region, outer: Region) -> Region:
    """Return `region` relative to the start of `outer`."""
    return tuple(slice(r.start - o.start, r.stop - o.start) for r, o in zip(region, outer, strict=True))


def _read_by_enlarging(region: Region, size: Sequence[int]) -> Region:
    """Return the region of a level of `size` that linear enlargement by 2 needs for `region` of the finer level.

    >>> _read_by_enlarging((slice(4, 9),), (8,))
    (slice(1, 5, None),)
    """
    return tuple(slice(max(0, (r.start - 1) // 2), min(r.stop // 2 + 1, n)) for r, n in zip(region, size, strict=True))


def _head(architecture: Architecture, widths: tuple[int, ...]) -> nn.Sequential:
    dims, kernel = architecture.spatial_dims, architecture.kernel_size
    padding = tuple(k // 2 for k in kernel)
    modules: list[nn.Module] = []
    channels = architecture.dense_dim
    for width in widths:
        modules.append(_CONVOLUTION[dims](channels, width, kernel, padding=padding))  # type: ignore[arg-type]
        modules += [_BATCH_NORM[dims](width), nn.ReLU(inplace=True)]
        channels = width
    modules.append(_CONVOLUTION[dims](channels, architecture.out_channels, kernel, padding=padding))  # type: ignore[arg-type]
    return nn.Sequential(*modules)


def fold_batch_norms(module: nn.Module) -> None:
    """Merge each batch norm of a network in evaluation mode into the convolution before it, in place.

    This saves one pass over the voxels, and changes results only by rounding.
    """
    before: tuple[str, nn.Module] = ("", module)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d) and isinstance(before[1], nn.Conv2d | nn.Conv3d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norms(child)
        before = name, child


class _OneDNNConvolution(nn.Module):
    """A convolution that always uses oneDNN.

    With one patch per batch, PyTorch uses its own code for kernels of one voxel and for coarse levels, which is slower
    and copies tensors in the channels-last format.
    """

    def __init__(self, of: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = of.weight, of.bias
        self.settings = list(of.padding), list(of.stride), list(of.dilation), of.groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.mkldnn_convolution(x, self.weight, self.bias, *self.settings)  # type: ignore[no-any-return]


def convolve_with_onednn(module: nn.Module) -> None:
    """Let every convolution of a network on a CPU use oneDNN, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d | nn.Conv3d):
            setattr(module, name, _OneDNNConvolution(child))
        else:
            convolve_with_onednn(child)
