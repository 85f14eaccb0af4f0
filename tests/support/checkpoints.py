"""Checkpoints of CryoSiam's format with random weights, for variants that the golden cases lack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cryosiam_dask.model.network import Architecture, build_network

#: A network small enough for every test.
SMALL = Architecture(
    spatial_dims=3,
    in_channels=1,
    block_type="bottleneck",
    num_layers=(1, 1, 1, 1),
    num_filters=(2, 3, 4, 5),
    fpn_channels=4,
    decoder="fpn",
    later_convolutions=False,
    bifpn_layers=0,
    dense_dim=3,
    out_channels=3,
    semantic_widths=(6, 5),
    distance_widths=(6, 5),
    kernel_size=(3, 3, 3),
)


def content(architecture: Architecture, patch: int = 16, seed: int = 0) -> dict[str, Any]:
    """What the training of a network would have saved."""
    torch.manual_seed(seed)
    network = build_network(architecture)
    state = {
        ("_model." if "_head." in name else "_model_backbone.") + name: (
            # Weights, statistics and shares of fusions that no default happens to equal.
            torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 or name.endswith((".w1", ".w2")) else tensor
        ).clone()
        for name, tensor in network.state_dict().items()
    }
    for unused in ("global_projector.0", "global_predictor.0", "predictor.0", "level_projector_2.0", "encoder.fc"):
        state[f"_model_backbone.{unused}.weight"] = torch.zeros(2, 2)
    dims = architecture.spatial_dims
    return {
        "epoch": 3,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}],
        "state_dict": state,
        "hyper_parameters": {
            "config": {
                "parameters": {
                    "data": {"patch_size": [patch] * dims},
                    "network": {
                        "spatial_dims": dims,
                        "n_output_channels" if architecture.denoises else "out_channels": architecture.out_channels,
                        "filters": list(architecture.semantic_widths),
                        "dense_dim": architecture.dense_dim,
                        "kernel_size": list(architecture.kernel_size),
                        "padding": [k // 2 for k in architecture.kernel_size],
                    },
                }
            },
            "backbone_config": {
                "parameters": {
                    "network": {
                        "block_type": architecture.block_type,
                        "spatial_dims": dims,
                        "in_channels": architecture.in_channels,
                        "num_layers": list(architecture.num_layers),
                        "num_filters": list(architecture.num_filters),
                        "fpn_channels": architecture.fpn_channels,
                        "no_max_pool": True,
                        "dim": 8,
                        "dense_dim": architecture.dense_dim,
                        "add_fpn_later_conv": architecture.later_convolutions,
                        "decoder_type": architecture.decoder,
                        "fpn_layers": architecture.bifpn_layers or 2,
                    }
                }
            },
        },
    }


def write(
    path: Path,
    architecture: Architecture = SMALL,
    edit: Callable[[dict[str, Any]], object] = lambda _: None,
    **options: Any,
) -> Path:
    """Save `content`, changed by `edit`; `options` are those of `content`."""
    saved = content(architecture, **options)
    edit(saved)
    torch.save(saved, path)
    return path
