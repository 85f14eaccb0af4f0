"""Checkpoints of CryoSiam's format, of trained networks or with random weights for variants that no golden case has."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryosiam_dask.model.network import Architecture, Network

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
#: Width of the parts of CryoSiam's pretraining that no prediction uses.
HIDDEN = 8


def saved(state: Mapping[str, Tensor], architecture: Architecture, patch: int) -> dict[str, Any]:
    """What CryoSiam's training saves of a network; `state` has the names of our network, or of its pretraining."""
    dims = architecture.spatial_dims
    data = {"patch_size": [patch] * dims, "min": 0, "max": 1, "mean": 0, "std": 1}
    common = {"in_channels": architecture.in_channels, "spatial_dims": dims, "dense_dim": architecture.dense_dim}
    kernel = architecture.kernel_size
    head = {
        "n_output_channels" if architecture.denoises else "out_channels": architecture.out_channels,
        "filters": list(architecture.semantic_widths),
        # Numbers where all axes are alike, as CryoSiam's own files have them.
        "kernel_size": kernel[0] if len(set(kernel)) == 1 else list(kernel),
        "padding": kernel[0] // 2 if len(set(kernel)) == 1 else [k // 2 for k in kernel],
        **({} if architecture.denoises else {"distance_prediction": True}),
    }
    backbone = {
        "block_type": architecture.block_type,
        "num_layers": list(architecture.num_layers),
        "num_filters": list(architecture.num_filters),
        "fpn_channels": architecture.fpn_channels,
        "no_max_pool": True,
        **dict.fromkeys(("dim", "pred_dim", "dense_pred_dim"), HIDDEN),
        "include_levels_loss": False,
        "add_fpn_later_conv": architecture.later_convolutions,
        "decoder_type": architecture.decoder,
        "fpn_layers": architecture.bifpn_layers or 2,
    }
    return {
        "state_dict": {("_model." if "_head." in n else "_model_backbone.") + n: value for n, value in state.items()},
        "hyper_parameters": {
            "config": {
                "parameters": {"network": common | head, "data": data},
                "hyper_parameters": {"batch_size": 2},
            },
            "backbone_config": {"parameters": {"network": common | backbone, "data": data}},
        },
    }


def content(architecture: Architecture, patch: int = 16, seed: int = 0) -> dict[str, Any]:
    """What the training of a network would have saved."""
    torch.manual_seed(seed)
    state = {
        # Weights, statistics and shares of fusions that no default happens to equal.
        name: (torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 or name.endswith((".w1", ".w2")) else tensor).clone()
        for name, tensor in Network(architecture).state_dict().items()
    }
    for unused in ("global_projector.0", "global_predictor.0", "predictor.0", "level_projector_2.0", "encoder.fc"):
        state[f"{unused}.weight"] = torch.zeros(2, 2)
    return {
        "epoch": 3,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}],
        **saved(state, architecture, patch),
    }


def write(
    path: Path,
    architecture: Architecture = SMALL,
    edit: Callable[[dict[str, Any]], object] = lambda _: None,
    **options: Any,
) -> Path:
    """Save `content`, changed by `edit`; `options` are those of `content`."""
    made = content(architecture, **options)
    edit(made)
    torch.save(made, path)
    return path
