"""Checkpoints: every variant is read, everything else refused with a message, and nothing is ever executed."""

import argparse
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cryosiam_dask.errors import CheckpointError
from cryosiam_dask.model import checkpoint as module
from cryosiam_dask.model.checkpoint import look_at_checkpoint, read_checkpoint
from cryosiam_dask.model.network import Network
from support import checkpoints
from support.checkpoints import SMALL
from support.golden import CASES, FOLDER, configuration

VARIANTS = {
    "small": SMALL,
    "basic blocks": replace(SMALL, block_type="basic"),
    "several blocks a layer": replace(SMALL, num_layers=(2, 1, 3, 2), block_type="basic"),
    "later convolutions": replace(SMALL, later_convolutions=True),
    "bifpn": replace(SMALL, decoder="bifpn", bifpn_layers=1),
    "deep bifpn": replace(SMALL, decoder="bifpn", bifpn_layers=3),
    "2-D": replace(SMALL, spatial_dims=2, kernel_size=(3, 3)),
    "2-D bifpn": replace(SMALL, spatial_dims=2, kernel_size=(3, 3), decoder="bifpn", bifpn_layers=2),
    "three hidden widths": replace(SMALL, semantic_widths=(16, 24, 8), distance_widths=(16, 24, 8)),
    "one hidden width": replace(SMALL, semantic_widths=(7,), distance_widths=(9,)),
    "no hidden widths": replace(SMALL, semantic_widths=(), distance_widths=()),
    "no distance head": replace(SMALL, distance_widths=None),
    "one class": replace(SMALL, out_channels=1),
    "256 classes": replace(SMALL, out_channels=256),
    "wide kernels": replace(SMALL, kernel_size=(5, 3, 1)),
}


def networks(saved):
    """The two descriptions of the network in a checkpoint."""
    return [saved["hyper_parameters"][key]["parameters"]["network"] for key in ("config", "backbone_config")]


def message(path: Path) -> str:
    """What is said against a file, read or only looked at; always names the file and a remedy."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert caught.value.place == str(path) and caught.value.remedy
    with pytest.raises(CheckpointError) as looked:
        look_at_checkpoint(path)
    assert str(looked.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_read_as_they_were_written(tmp_path, name):
    architecture = VARIANTS[name]
    path = checkpoints.write(tmp_path / "model.ckpt", architecture, patch=32)
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture == architecture
    assert checkpoint.architecture.has_distance_head == (architecture.distance_widths is not None)
    assert checkpoint.patch_size == (32,) * architecture.spatial_dims
    network = Network(architecture)
    network.load_state_dict(checkpoint.state, strict=True)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == architecture.weights()
    saved = torch.load(path, weights_only=True)["state_dict"]
    for key, value in checkpoint.state.items():
        assert torch.equal(value, next(v for k, v in saved.items() if k.split(".", 1)[1] == key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_looked_at_without_torch(tmp_path, name, dtype, monkeypatch):
    def edit(saved):
        saved["state_dict"] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in saved["state_dict"].items()}
        saved["callbacks"] = {"path": tmp_path, "best": np.float64(3.5), "arguments": argparse.Namespace(a=1)}

    path = checkpoints.write(tmp_path / "model.ckpt", VARIANTS[name], edit, patch=32)
    whole = read_checkpoint(path)
    monkeypatch.setattr(module, "_load", None)
    assert look_at_checkpoint(path) == whole


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.bfloat16, torch.inf), (torch.float64, 1e300)]
)
def test_weights_that_are_no_numbers_are_seen_without_torch(tmp_path, dtype, value):
    def edit(saved):
        name = "_model.semantic_head.0.bias"
        saved["state_dict"][name] = torch.full_like(saved["state_dict"][name], value, dtype=dtype)

    path = checkpoints.write(tmp_path / "model.ckpt", edit=edit)
    with pytest.raises(CheckpointError, match="must be finite"):
        look_at_checkpoint(path)


@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoints_are_read(case):
    checkpoint = read_checkpoint(FOLDER / case / "model.ckpt")
    assert look_at_checkpoint(FOLDER / case / "model.ckpt") == checkpoint
    assert list(checkpoint.patch_size) == configuration(case)["parameters"]["data"]["patch_size"]
    assert checkpoint.architecture.semantic_widths == checkpoint.architecture.distance_widths == (32, 64)
    assert checkpoint.architecture.decoder == ("bifpn" if case == "bifpn" else "fpn")


def test_absent_optional_keys_have_the_defaults_of_the_training(tmp_path):
    def edit(saved):
        config, backbone = networks(saved)
        for key in ("kernel_size", "padding", "spatial_dims", "dense_dim"):
            del config[key]
        for key in ("add_fpn_later_conv", "decoder_type", "fpn_layers"):
            del backbone[key]

    assert read_checkpoint(checkpoints.write(tmp_path / "fpn.ckpt", edit=edit)).architecture == SMALL
    bifpn = replace(SMALL, decoder="bifpn", bifpn_layers=2)
    path = checkpoints.write(tmp_path / "b.ckpt", bifpn, edit=lambda saved: networks(saved)[1].pop("fpn_layers"))
    assert read_checkpoint(path).architecture == bifpn


def test_numbers_of_other_types(tmp_path):
    def edit(saved):
        config, backbone = networks(saved)
        config |= {"kernel_size": 3, "padding": 1.0, "out_channels": np.int64(3), "dense_dim": np.float32(3)}
        backbone |= {"num_filters": (2, 3.0, np.uint8(4), np.int16(5)), "spatial_dims": np.float64(3)}
        saved["hyper_parameters"]["config"]["parameters"]["data"]["patch_size"] = np.int32(16)

    checkpoint = read_checkpoint(checkpoints.write(tmp_path / "model.ckpt", edit=edit))
    assert checkpoint.architecture == SMALL and checkpoint.patch_size == (16, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_become_float32(tmp_path, dtype):
    def edit(saved):
        saved["state_dict"] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in saved["state_dict"].items()}

    state = read_checkpoint(checkpoints.write(tmp_path / "model.ckpt", edit=edit)).state
    assert {t.dtype for n, t in state.items() if not n.endswith("num_batches_tracked")} == {torch.float32}
    exact = checkpoints.content(SMALL)["state_dict"]["_model.semantic_head.0.weight"].to(dtype).float()
    assert torch.equal(state["semantic_head.0.weight"], exact)


def test_nothing_stays_mapped_to_the_file(tmp_path):
    path = checkpoints.write(tmp_path / "model.ckpt")
    checkpoint = read_checkpoint(path)
    os.truncate(path, 0)
    assert all(tensor.isfinite().all() for tensor in checkpoint.state.values())


def test_harmless_leftovers_of_training_are_ignored(tmp_path):
    def edit(saved):
        saved["callbacks"] = [
            np.float64(3.5), np.int64(3), np.bool_(True), np.datetime64("2020-01-01"), np.dtype("f4,i4"), np.arange(3),
            np.array([{}], object), tmp_path, argparse.Namespace(a=1), torch.float16, {1, 2}, 1j, b"bytes",
        ]  # fmt: skip

    assert read_checkpoint(checkpoints.write(tmp_path / "model.ckpt", edit=edit)).architecture == SMALL


def test_files_of_older_torch(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(checkpoints.content(SMALL), path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path).architecture == SMALL


class Call:
    """Pickled as a call that unpickling would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("way", ["torch", "old torch", "new protocol", "pickle"])
@pytest.mark.parametrize(
    "function, argument",
    [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (exec, "open('{}', 'w')"), (Path.touch, Path("{}"))],
)
def test_a_file_that_would_execute_something_is_refused(tmp_path, function, argument, way):
    mark, path = tmp_path / "executed", tmp_path / "model.ckpt"
    saved = checkpoints.content(SMALL) | {"callbacks": Call(function, type(argument)(str(argument).format(mark)))}
    if way == "pickle":
        path.write_bytes(pickle.dumps(saved))
    else:
        torch.save(
            saved,
            path,
            _use_new_zipfile_serialization=way != "old torch",
            pickle_protocol=4 if way == "new protocol" else 2,
        )
    text = message(path)
    assert not mark.exists()
    if "torch" in way:
        assert "must contain only tensors and plain values" in text and (function.__name__ in text or "getattr" in text)
        assert "save only its state_dict and hyper_parameters" in text


def test_stand_ins_are_forgotten_after_loading(tmp_path):
    read_checkpoint(checkpoints.write(tmp_path / "model.ckpt"))
    torch.save(argparse.Namespace(a=1), tmp_path / "other.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "other.pt", weights_only=True)


@pytest.mark.parametrize(
    "saved, found",
    [
        (torch.zeros(3), "no state_dict"),
        ([1, 2], "no state_dict"),
        ({"model": {}}, "no state_dict"),
        ({"state_dict": {}}, "no hyper_parameters.backbone_config"),
        ({"state_dict": {}, "hyper_parameters": {"lr": 1}}, "no hyper_parameters.backbone_config"),
        (
            {"state_dict": {}, "hyper_parameters": {"backbone_config": {"parameters": {}}}},
            "no hyper_parameters.backbone_config.parameters.network",
        ),
    ],
)
def test_checkpoints_of_other_programs(tmp_path, saved, found):
    torch.save(saved, tmp_path / "model.ckpt")
    assert found in message(tmp_path / "model.ckpt")


def test_paths_that_are_no_file(tmp_path):
    assert "does not exist" in message(tmp_path / "none.ckpt")
    assert "Is a directory" in message(tmp_path)


@pytest.mark.parametrize("data", [b"", b"text\n", b"PK\x03\x04 and no archive", b"\x80\x02.", bytes(5000)])
def test_files_of_another_kind(tmp_path, data):
    (tmp_path / "model.ckpt").write_bytes(data)
    assert "must be" in message(tmp_path / "model.ckpt")


@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_breaks_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "model.ckpt"
    intact = checkpoints.write(path).read_bytes()
    if data.draw(st.booleans(), "truncated"):
        path.write_bytes(intact[: data.draw(st.integers(0, len(intact) - 1))])
        assert "must be a complete file" in message(path)
    else:
        start = data.draw(st.integers(0, 20_000))
        path.write_bytes(intact[:start] + data.draw(st.binary(min_size=1, max_size=40)) + intact[start + 40 :])
        for read in (read_checkpoint, look_at_checkpoint):
            try:
                read(path)
            except CheckpointError as error:
                assert error.remedy


@pytest.mark.parametrize(
    "which, key, value, rule",
    [
        (1, "no_max_pool", False, "must be true"),
        (1, "spatial_dims", 4, "must be 2 or 3"),
        (1, "in_channels", 2, "must be 1"),
        (1, "block_type", "bottle", "must be 'basic' or 'bottleneck'"),
        (1, "num_layers", [1, 1, 1], "must be 4 whole numbers of at least 1"),
        (1, "num_layers", [1, 1, 0, 1], "must be 4 whole numbers of at least 1"),
        (1, "num_filters", "wide", "must be 4 whole numbers of at least 1"),
        (1, "fpn_channels", 2.5, "must be 1 whole number of at least 1"),
        (1, "fpn_channels", float("inf"), "must be 1 whole number of at least 1"),
        (0, "out_channels", 257, "must be at most 256"),
        (0, "out_channels", None, "must be 1 whole number of at least 1"),
        (0, "dense_dim", 4, "must be 3, as for the backbone"),
        (0, "padding", -1, "must be 3 whole numbers of at least 0"),
        (0, "padding", 0, "must be half of the kernel size [3, 3, 3]"),
        (0, "kernel_size", 4, "must be half of the kernel size [4, 4, 4]"),
    ],
)
def test_architectures_that_cannot_run_here(tmp_path, which, key, value, rule):
    path = checkpoints.write(tmp_path / "model.ckpt", edit=lambda saved: networks(saved)[which].update({key: value}))
    text = message(path)
    assert f"network.{key}" in text or key == "kernel_size"
    assert rule in text


def test_weights_that_are_missing_left_over_or_of_another_shape_are_named(tmp_path):
    def edit(saved):
        state = saved["state_dict"]
        for name in ("weight", "bias"):
            del state[f"_model_backbone.decoder.layer1.{name}"]
        state["_model_backbone.projector.9.weight"] = torch.zeros(1)
        state["_model.semantic_head.6.bias"] = torch.zeros(7)
        state["_model.distance_head.6.bias"] = "no tensor"

    text = message(checkpoints.write(tmp_path / "model.ckpt", edit=edit))
    assert "2 missing (_model_backbone.decoder.layer1.weight, _model_backbone.decoder.layer1.bias)" in text
    assert "1 unexpected (_model_backbone.projector.9.weight)" in text
    assert "2 of another shape (_model.semantic_head.6.bias (7,) instead of (3,)" in text
    assert "_model.distance_head.6.bias str instead of (3,)" in text


@pytest.mark.parametrize(
    "architecture, key, value, named",
    [
        (SMALL, "num_filters", [64, 3, 4, 5], "_model_backbone.encoder.conv1.weight (2, 1, 7, 7, 7) instead of (64, "),
        (SMALL, "num_layers", [1, 1, 1, 2], "missing (_model_backbone.encoder.layer4.1."),
        (SMALL, "fpn_channels", 9, "_model_backbone.decoder.layer4.weight"),
        (SMALL, "block_type", "basic", "_model_backbone.encoder.layer1.0.conv1.weight"),
        (SMALL, "add_fpn_later_conv", True, "missing (_model_backbone.decoder.later_conv4.weight"),
        (SMALL, "decoder_type", "bifpn", "missing (_model_backbone.decoder.p2.weight"),
        (
            VARIANTS["later convolutions"],
            "add_fpn_later_conv",
            False,
            "unexpected (_model_backbone.decoder.later_conv4",
        ),
        (VARIANTS["deep bifpn"], "fpn_layers", 2, "unexpected (_model_backbone.decoder.bifpn.2.w1"),
        (VARIANTS["bifpn"], "fpn_layers", 2, "missing (_model_backbone.decoder.bifpn.1.w1"),
        (VARIANTS["2-D"], "spatial_dims", 3, "config.parameters.network.spatial_dims must be 3"),
    ],
)
def test_descriptions_that_do_not_fit_the_weights(tmp_path, architecture, key, value, named):
    edit = lambda saved: networks(saved)[1].update({key: value})  # noqa: E731
    assert named in message(checkpoints.write(tmp_path / "model.ckpt", architecture, edit))


def test_checkpoints_of_other_tasks(tmp_path):
    def edit(saved):
        saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if k.startswith("_model_backbone.")}

    assert "must hold a semantic head" in message(checkpoints.write(tmp_path / "model.ckpt", edit=edit))


def test_weights_that_are_no_numbers(tmp_path):
    edit = lambda saved: saved["state_dict"]["_model.semantic_head.0.bias"].fill_(torch.nan)  # noqa: E731
    text = message(checkpoints.write(tmp_path / "model.ckpt", edit=edit))
    assert "must be finite" in text and "_model.semantic_head.0.bias" in text


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: name.replace("_model.", "_model._orig_mod.").replace("kbone.", "kbone._orig_mod."),
    "compiled as a whole": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "deep inside": lambda name: name.replace("encoder.", "encoder._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("counted", [True, False])
def test_weights_of_a_wrapped_network(tmp_path: Path, kind: str, counted: bool) -> None:
    def wrap(content: dict[str, Any]) -> None:
        content["state_dict"] = {
            WRAPPED[kind](name): tensor
            for name, tensor in content["state_dict"].items()
            if counted or not name.endswith("num_batches_tracked")
        }

    plain = read_checkpoint(checkpoints.write(tmp_path / "plain.ckpt"))
    found = read_checkpoint(checkpoints.write(tmp_path / "wrapped.ckpt", edit=wrap))
    assert found.architecture == plain.architecture and found.state.keys() == plain.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in plain.state.items())
