"""The shapes of CryoSiam's network, without importing torch; a plan needs nothing else of a model.

`cryosiam_dask.model.network` builds the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

#: How many times wider the output of a residual block is than its inner convolutions.
EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The hyperparameters that determine the shapes of the network's weights.

    Attributes
    ----------
    spatial_dims
        2 for images, 3 for tomograms.
    in_channels
        Channels of the input.
    block_type
        Kind of residual block in the encoder.
    num_layers, num_filters
        Number of blocks and width of each of the encoder's four levels, finest first.
    fpn_channels
        Channels of the decoder.
    decoder
        Feature pyramid, or bidirectional feature pyramid.
    later_convolutions
        Whether each level of the feature pyramid has one more convolution.
    bifpn_layers
        Number of blocks of the bidirectional feature pyramid; 0 for the other decoder.
    dense_dim
        Channels of the dense embedding.
    out_channels
        Number of classes, and of channels of the distances; for a denoiser, number of channels of its result.
    semantic_widths, distance_widths
        Channels of the hidden convolutions of the heads; None without a distance head. A denoiser's only head uses
        `semantic_widths`.
    kernel_size
        Kernel of the heads' convolutions, one odd number per axis.
    denoises
        Whether the network predicts denoised intensities instead of class scores.
    """

    spatial_dims: int
    in_channels: int
    block_type: Literal["basic", "bottleneck"]
    num_layers: tuple[int, ...]
    num_filters: tuple[int, ...]
    fpn_channels: int
    decoder: Literal["fpn", "bifpn"]
    later_convolutions: bool
    bifpn_layers: int
    dense_dim: int
    out_channels: int
    semantic_widths: tuple[int, ...]
    distance_widths: tuple[int, ...] | None
    kernel_size: tuple[int, ...]
    denoises: bool = False

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Channels of the hidden convolutions of each head, by its name in a checkpoint."""
        if self.denoises:
            return {"cnn_head": self.semantic_widths}
        distances = {} if self.distance_widths is None else {"distance_head": self.distance_widths}
        return {"semantic_head": self.semantic_widths, **distances}

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of the encoder's four levels, finest first."""
        return tuple(width * EXPANSION[self.block_type] for width in self.num_filters)

    @property
    def head_margin(self) -> tuple[int, ...]:
        """Voxels along each axis that the heads' convolutions see beyond their output."""
        convolutions = 1 + max(map(len, self.heads.values()))
        return tuple(convolutions * (kernel // 2) for kernel in self.kernel_size)

    @property
    def has_distance_head(self) -> bool:
        """Whether distances can be predicted."""
        return self.distance_widths is not None

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's weights by their names in its ``state_dict``."""
        return dict(_weights(self))


def _weights(of: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    dims, width = of.spatial_dims, of.fpn_channels

    def convolution(
        name: str, inputs: int, outputs: int, kernel: int | tuple[int, ...] = 1, bias: bool = True
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs, *((kernel,) * dims if isinstance(kernel, int) else kernel))
        if bias:
            yield f"{name}.bias", (outputs,)

    def batch_norm(name: str, channels: int, affine: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in (*(("weight", "bias") if affine else ()), "running_mean", "running_var"):
            yield f"{name}.{part}", (channels,)
        yield f"{name}.num_batches_tracked", ()

    yield from convolution("encoder.conv1", of.in_channels, of.num_filters[0], 7, bias=False)
    yield from batch_norm("encoder.bn1", of.num_filters[0])
    inputs = of.num_filters[0]
    for level, (blocks, inner, outputs) in enumerate(
        zip(of.num_layers, of.num_filters, of.level_channels, strict=True), start=1
    ):
        for block in range(blocks):
            name = f"encoder.layer{level}.{block}"
            kernels = (1, 3, 1) if of.block_type == "bottleneck" else (3, 3)
            channels = (inputs, *(inner for _ in kernels[1:]), outputs)
            for number, kernel in enumerate(kernels, start=1):
                before, after = channels[number - 1 : number + 1]
                yield from convolution(f"{name}.conv{number}", before, after, kernel, bias=False)
                yield from batch_norm(f"{name}.bn{number}", after)
            if block == 0 and (level > 1 or inputs != outputs):
                yield from convolution(f"{name}.downsample.0", inputs, outputs)
                yield from batch_norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    if of.decoder == "fpn":
        for number, channels_of in zip((4, 3, 2, 1), of.level_channels, strict=True):
            yield from convolution(f"decoder.layer{number}", channels_of, width)
            if of.later_convolutions:
                yield from convolution(f"decoder.later_conv{number}", width, width, 3)
    else:
        for level, channels_of in zip((2, 3, 4, 5), of.level_channels, strict=True):
            yield from convolution(f"decoder.p{level}", channels_of, width)
        yield from convolution("decoder.p6.conv", width, width, 3)
        yield from batch_norm("decoder.p6.bn", width)
        for block in range(of.bifpn_layers):
            name = f"decoder.bifpn.{block}"
            yield from ((f"{name}.w1", (2, 4)), (f"{name}.w2", (3, 4)))
            for unit in (
                *(f"{name}.p{level}_td" for level in (2, 3, 4, 5)),
                *(f"{name}.p{i}_out" for i in (3, 4, 5, 6)),
            ):
                yield from convolution(f"{unit}.depthwise", 1, width, bias=False)
                yield from convolution(f"{unit}.pointwise", width, width, bias=False)
                yield from batch_norm(f"{unit}.bn", width)
    for number in (0, 3):
        yield from convolution(f"projector.{number}", width, width, bias=False)
        yield from batch_norm(f"projector.{number + 1}", width)
    yield from convolution("projector.6", width, of.dense_dim)
    yield from batch_norm("projector.7", of.dense_dim, affine=False)
    for head, widths in of.heads.items():
        for number, (inner, outer) in enumerate(zip((of.dense_dim, *widths), (*widths, of.out_channels), strict=True)):
            yield from convolution(f"{head}.{3 * number}", inner, outer, of.kernel_size)
            if number < len(widths):
                yield from batch_norm(f"{head}.{3 * number + 1}", outer)


def default_threshold(classes: int) -> float:
    """Return CryoSiam's documented threshold: 0.9 for a lamella (one class), 0.1 for several classes."""
    return 0.9 if classes == 1 else 0.1


def required_halo(architecture: Architecture) -> int:
    """Return the smallest halo, in voxels, with which the values of a core can be right.

    The heads' convolutions, the decoder's last one, and the voxel of the coarsest level next to the core must not touch
    the padding at a patch's border.
    """
    return max(architecture.head_margin) + architecture.later_convolutions + required_divisor(architecture)


def required_divisor(architecture: Architecture) -> int:
    """Return the number that must divide every axis of a patch.

    It is the stride of the coarsest level: 16 for the bidirectional pyramid, 8 for the other decoder. Denoisers with
    the latter accept multiples of 4, as in CryoSiam.
    """
    return 16 if architecture.decoder == "bifpn" else 4 if architecture.denoises else 8


def widest(architecture: Architecture) -> int:
    """Return the largest number of channels of an array with all voxels of a patch."""
    heads = (width for widths in architecture.heads.values() for width in widths)
    levels = (architecture.num_filters[0], *architecture.level_channels[:1], architecture.fpn_channels)
    return max(*levels, architecture.dense_dim, architecture.out_channels, *heads)


def peak_bytes(architecture: Architecture, patch: tuple[int, ...], batch_size: int = 1) -> int:
    """Estimate an upper bound of the memory for one batch, weights included, in bytes.

    The estimate counts the float32 channels at stride 1 that are in memory at the peak, and adds half of that for the
    coarser levels, which have at most a quarter of the voxels, and for the libraries' workspace.

    Parameters
    ----------
    architecture
        The network.
    patch
        Shape of a patch in voxels.
    batch_size
        Patches evaluated at once.
    """
    finest, width = architecture.level_channels[0], architecture.fpn_channels
    alive = max(
        4 * finest + architecture.num_filters[0],  # a residual block's input, its branch, and its shortcut twice
        finest + 2 * architecture.num_filters[1] + width,  # the second level starts at stride 1
        finest + 3 * width if architecture.decoder == "fpn" else 6 * width,
        architecture.dense_dim
        + architecture.out_channels
        + max(3 * w for widths in architecture.heads.values() for w in (0, *widths)),
    )
    weights = sum(4 * math.prod(shape) if shape else 8 for shape in architecture.weights().values())
    return weights + 6 * alive * math.prod(patch) * batch_size  # 4 bytes and the margin
