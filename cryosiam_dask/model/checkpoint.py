"""Read the architecture and the weights from a ``.ckpt`` file, without executing anything in the file.

A checkpoint is a pickle, and a pickle can call any function while it is loaded. Therefore it is read with torch's
restricted unpickler, which allows only tensors and plain containers. The few other classes and functions that training
programs leave in checkpoints are replaced by inert stand-ins, so nothing that the file names is imported or called. A
file that names anything else is refused.

The architecture comes from the file's ``hyper_parameters``, and the widths of the heads from the weights. The weights
that prediction uses must fit that architecture exactly. Everything else in the file (optimizer, callbacks, projectors
and predictors of the training) is ignored.

Importing torch takes seconds. `look_at_checkpoint` needs no weights, so it reads the pickle without torch, with
stand-ins for the few allowed names. If that fails, it calls `read_checkpoint`.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cryosiam_dask.errors import CheckpointError, why_unreadable
from cryosiam_dask.model.architecture import Architecture
from cryosiam_dask.model.published import nearest

if TYPE_CHECKING:
    from torch import Tensor

#: The parts of the network that prediction uses, and the prefix of each in a checkpoint.
_PREFIXES = {
    "encoder": "_model_backbone.",
    "decoder": "_model_backbone.",
    "projector": "_model_backbone.",
    "semantic_head": "_model.",
    "distance_head": "_model.",
    "cnn_head": "_model.",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The parts of a checkpoint that prediction needs.

    Attributes
    ----------
    architecture
        The network's shapes.
    patch_size
        Patch of the training in voxels, (z, y, x) or (y, x).
    state
        Weights for `load_state_dict` of `cryosiam_dask.model.network.Network`; float32. Empty after
        `look_at_checkpoint`.
    sha256
        SHA-256 hash of the file, hexadecimal.
    path
        The file.
    """

    architecture: Architecture
    patch_size: tuple[int, ...]
    state: Mapping[str, Tensor] = field(repr=False, compare=False)
    sha256: str
    path: Path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that CryoSiam's training wrote for denoising, or for lamella or semantic segmentation.

    Parameters
    ----------
    path
        The ``.ckpt`` file.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, not a checkpoint of CryoSiam, or would execute something; if its architecture
        is not supported, or its weights do not fit the architecture.
    """
    content, sha256 = _load(path)
    architecture, patch_size, state = _described(path, content)
    return Checkpoint(architecture, patch_size, _fit(path, architecture, state), sha256, Path(path))


def look_at_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint like `read_checkpoint`, but without keeping its weights, and usually without torch.

    Parameters
    ----------
    path
        See `read_checkpoint`, also for the errors.
    """
    sha256 = _hash(path)
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (each for each in archive.infolist() if each.filename.endswith("/data.pkl"))
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError  # torch does not compress, and compressed data may expand to any size
            content = _Outline(BytesIO(archive.read(entry))).load()
            architecture, patch_size, state = _described(path, content)
            if _misfits(architecture, state) or not all(_is_finite(archive, state[name]) for name in state):
                raise ValueError
    except Exception:  # `read_checkpoint` raises the right error
        return replace(read_checkpoint(path), state={})
    return Checkpoint(architecture, patch_size, {}, sha256, Path(path))


def _described(path: str | Path, content: Any) -> tuple[Architecture, tuple[int, ...], dict[str, Any]]:
    """Return the architecture, the patch and the weights, by their names in the network, from a file's content."""
    weights = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        _refuse_foreign(path, "no state_dict")
    parameters = _Parameters(path, content.get("hyper_parameters"))
    weights = _unwrapped(weights)
    state = {
        name.removeprefix(prefix): tensor
        for part, prefix in _PREFIXES.items()
        for name, tensor in weights.items()
        if name.startswith(f"{prefix}{part}.") and not name.startswith("_model_backbone.encoder.fc.")
    }
    architecture = _architecture(path, parameters, state)
    return architecture, parameters.integers("config", "data.patch_size", architecture.spatial_dims), state


#: Prefixes that torch puts into the names of weights if a network was compiled or wrapped for training.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _unwrapped(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Remove wrappers from the names of weights; a weight whose name has none takes precedence."""
    plain = {str(name): ".".join(p for p in str(name).split(".") if p not in _WRAPPERS) for name in weights}
    ordered = sorted(weights, key=lambda name: plain[str(name)] != str(name))
    found: dict[str, Any] = {}
    for name in ordered:
        found.setdefault(plain[str(name)], weights[name])
    return found


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the training settings of a checkpoint: those that are numbers, text, lists and mappings.

    Parameters
    ----------
    path
        The ``.ckpt`` file.

    Returns
    -------
    dict
        ``epoch``, ``global_step`` and ``hyper_parameters``, if the file has them. Other objects, and anything nested
        too deeply, are left out.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or would execute something.
    """
    content, _ = _load(path)
    left = iter(range(_MOST_SETTINGS))

    def plain(value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if depth > 12 or next(left, None) is None:  # a file may contain a list that contains itself
            return ...
        if isinstance(value, Mapping):
            kept = {str(key): plain(item, depth + 1) for key, item in value.items() if isinstance(key, str | int)}
            return {key: item for key, item in kept.items() if item is not ...}
        if isinstance(value, list | tuple):
            items = [plain(item, depth + 1) for item in value]
            return [item for item in items if item is not ...]
        return ...

    content = content if isinstance(content, Mapping) else {}
    settings: dict[str, Any] = plain(
        {key: content[key] for key in ("epoch", "global_step", "hyper_parameters") if key in content}
    )
    return settings


_MOST_SETTINGS = 10_000  # lists and mappings


class _Ignored:
    """Stands in for an object that is not needed."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _NumpyDtype:
    """Stands in for a NumPy dtype, because unpickling a real one trusts the file with memory layouts."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = f"{state[1]}{self.code}"


def _numpy_scalar(dtype: _NumpyDtype, data: bytes = b"") -> object:
    """Stand in for NumPy's scalar constructor: return a Python number."""
    import numpy as np

    return np.frombuffer(data, dtype.code)[0].item() if re.fullmatch("[<>|][biuf][1248]", dtype.code) else _Ignored()


_NAMED: list[tuple[Callable[..., Any], str]] = [
    *((_Ignored, f"pathlib.{local}{name}") for local in ("", "_local.") for name in ("PosixPath", "WindowsPath")),
    *((_Ignored, f"pathlib.{local}Pure{name}") for local in ("", "_local.") for name in ("PosixPath", "WindowsPath")),
    (_Ignored, "argparse.Namespace"),
    (_Ignored, "numpy.ndarray"),
    (_NumpyDtype, "numpy.dtype"),
    *((_Ignored, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((dict, f"{module}.AttributeDict") for module in (
        "lightning.fabric.utilities.data",
        "lightning_fabric.utilities.data",
        "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    )),
]  # fmt: skip

# torch registers the stand-ins for the whole process while a file is read.
_UNPICKLER = threading.Lock()


def open_checkpoint(path: str | Path) -> BufferedReader:
    """Open the file of a checkpoint.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    try:
        return Path(path).open("rb")
    except OSError as error:
        model = nearest(str(path)) if isinstance(error, FileNotFoundError) else None
        rule, value = why_unreadable(error, "the checkpoint must be a file that can be read")
        raise CheckpointError(
            rule,
            place=path,
            value=value,
            remedy=_REMEDY_PATH + (f", or to {model}, which is then downloaded" if model else ""),
        ) from None


def _hash(path: str | Path) -> str:
    with open_checkpoint(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: str | Path) -> tuple[Any, str]:
    """Return the content and the hash of a file."""
    import torch

    sha256 = _hash(path)
    try:
        with Path(path).open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
        with _UNPICKLER, torch.serialization.safe_globals([*_NAMED]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The optimizer state can be twice as large as the weights. With a memory map, it is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # damaged bytes cause errors of many types
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or "an unexpected end"
        if named := re.search(r"GLOBAL (\S+)", reason):
            raise CheckpointError(
                "a checkpoint must contain only tensors and plain values, but this one would call a function or class "
                "while it is loaded",
                place=path,
                value=named[1],
                remedy="If you trust its source, load it with torch in a safe place, and save only its state_dict and "
                "hyper_parameters to a new file",
            ) from None
        raise CheckpointError(
            "the checkpoint must be a complete file written by torch.save with its default protocol",
            place=path,
            value="another kind of file" if "operand" in reason else re.split(r"\.\s|\n", reason)[0][:200],
            remedy="Copy or download it again, and check that it is CryoSiam's .ckpt file",
        ) from None
    return content, sha256


_REMEDY_PATH = "Set trained_model to the path of CryoSiam's .ckpt file"


def _refuse_foreign(path: str | Path, found: str) -> NoReturn:
    raise CheckpointError(
        "the checkpoint must be one that CryoSiam's training wrote, with state_dict and hyper_parameters",
        place=path,
        value=found,
        remedy=_REMEDY_PATH,
    )


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The ``hyper_parameters`` of a file, which come from the YAML files of some version of CryoSiam."""

    path: str | Path
    tree: Any

    def get(self, config: str, key: str, default: object = ...) -> Any:
        """Return ``hyper_parameters[config]["parameters"]`` at `key`, whose levels are separated by dots."""
        value, trail = self.tree, "hyper_parameters"
        for level in (config, "parameters", *key.split(".")):
            if not isinstance(value, Mapping) or level not in value:
                if default is not ...:
                    return default
                _refuse_foreign(self.path, f"no {trail}.{level}")
            value, trail = value[level], f"{trail}.{level}"
        return value

    def refuse(self, config: str, key: str, rule: str) -> NoReturn:
        raise CheckpointError(
            f"hyper_parameters.{config}.parameters.{key} {rule}",
            place=self.path,
            value=self.get(config, key, None),
            remedy="Use a checkpoint of a network that this program supports",
        )

    def integers(self, config: str, key: str, count: int, default: object = ..., least: int = 1) -> tuple[int, ...]:
        value = self.get(config, key, default)
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count or not all(isinstance(v, int | float) and v >= least and v % 1 == 0 for v in values):
            self.refuse(config, key, f"must be {count} whole number{'s' if count > 1 else ''} of at least {least}")
        return tuple(int(v) for v in values)

    def integer(self, config: str, key: str, default: object = ...) -> int:
        return self.integers(config, key, 1, default)[0]


def _architecture(path: str | Path, parameters: _Parameters, state: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture that a checkpoint describes."""
    backbone, config = "backbone_config", "config"
    dims = parameters.integer(backbone, "network.spatial_dims")
    if dims not in (2, 3):
        parameters.refuse(backbone, "network.spatial_dims", "must be 2 or 3")
    dense_dim = parameters.integer(backbone, "network.dense_dim")
    for key, value in (("network.spatial_dims", dims), ("network.dense_dim", dense_dim)):
        if parameters.integer(config, key, value) != value:
            parameters.refuse(config, key, f"must be {value}, as for the backbone")
    in_channels = parameters.integer(backbone, "network.in_channels")
    if in_channels != 1:
        parameters.refuse(backbone, "network.in_channels", "must be 1, because tomograms have one channel")
    block_type = parameters.get(backbone, "network.block_type")
    if block_type not in ("basic", "bottleneck"):
        parameters.refuse(backbone, "network.block_type", "must be 'basic' or 'bottleneck'")
    if not parameters.get(backbone, "network.no_max_pool"):
        parameters.refuse(
            backbone, "network.no_max_pool", "must be true, because initial pooling would halve the labels' resolution"
        )
    denoises = parameters.get(config, "network.n_output_channels", None) is not None
    out_channels = parameters.integer(config, f"network.{'n_output' if denoises else 'out'}_channels")
    if out_channels > 256 and not denoises:
        parameters.refuse(config, "network.out_channels", "must be at most 256, because labels are stored in one byte")
    kernel_size = parameters.integers(config, "network.kernel_size", dims, 3)
    padding = parameters.integers(config, "network.padding", dims, 1, least=0)
    if any(kernel != 2 * pad + 1 for kernel, pad in zip(kernel_size, padding, strict=True)):
        parameters.refuse(config, "network.padding", f"must be half of the kernel size {list(kernel_size)}")
    head = "cnn_head" if denoises else "semantic_head"
    if not any(name.startswith(f"{head}.") for name in state):
        raise CheckpointError(
            f"the checkpoint must hold a {'denoising' if denoises else 'semantic'} head",
            place=path,
            value=f"no weights named _model.{head}",
            remedy="Use a checkpoint trained for denoising, or for lamella or semantic segmentation",
        )
    is_fpn = parameters.get(backbone, "network.decoder_type", "fpn") == "fpn"
    has_distances = not denoises and any(name.startswith("distance_head.") for name in state)
    return Architecture(
        spatial_dims=dims,
        in_channels=in_channels,
        block_type=block_type,
        num_layers=parameters.integers(backbone, "network.num_layers", 4),
        num_filters=parameters.integers(backbone, "network.num_filters", 4),
        fpn_channels=parameters.integer(backbone, "network.fpn_channels"),
        decoder="fpn" if is_fpn else "bifpn",
        later_convolutions=is_fpn and bool(parameters.get(backbone, "network.add_fpn_later_conv", False)),
        bifpn_layers=0 if is_fpn else parameters.integer(backbone, "network.fpn_layers", 2),
        dense_dim=dense_dim,
        out_channels=out_channels,
        semantic_widths=_hidden_widths(state, head),
        distance_widths=_hidden_widths(state, "distance_head") if has_distances else None,
        kernel_size=kernel_size,
        denoises=denoises,
    )


def _hidden_widths(state: Mapping[str, Tensor], head: str) -> tuple[int, ...]:
    """Return the output channels of a head's convolutions except the last; batch norms are between them."""
    widths, index = [], 0
    while shape := getattr(state.get(f"{head}.{3 * index}.weight"), "shape", None):
        widths.append(shape[0])
        index += 1
    return tuple(widths[:-1])


#: Only training uses this counter, and programs that convert weights may leave it out.
_COUNTED = ".num_batches_tracked"


def _misfits(architecture: Architecture, state: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the names and shapes of weights."""
    expected = architecture.weights()
    problems = {
        "missing": [_full(name) for name in expected if name not in state and not name.endswith(_COUNTED)],
        "unexpected": [_full(name) for name in state if name not in expected],
        "of another shape": [
            f"{_full(name)} {_shape(state[name])} instead of {shape}"
            for name, shape in expected.items()
            if name in state and _shape(state[name]) != str(shape)
        ],
    }
    return [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]


def _fit(path: str | Path, architecture: Architecture, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as float32 after checking that they are exactly those of the architecture."""
    import torch

    if found := _misfits(architecture, state):
        raise CheckpointError(
            "the weights must be exactly those of the network that the checkpoint's hyper_parameters describe",
            place=path,
            value="; ".join(found),
            remedy="Use the checkpoint as CryoSiam's training wrote it",
        )
    # A copy, because the file is memory-mapped and may be replaced.
    fitted = {
        name: state.get(name, torch.tensor(0))
        .detach()
        .to(
            torch.int64 if name.endswith(_COUNTED) else torch.float32,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name in architecture.weights()
    }
    if broken := [_full(name) for name, tensor in fitted.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            "the weights must be finite numbers",
            place=path,
            value=f"NaN or infinity in {len(broken)} of them ({', '.join(broken[:3])})",
            remedy="Use a checkpoint from before the training diverged",
        )
    return fitted


def _full(name: str) -> str:
    """Return a weight's name in the file."""
    return _PREFIXES[name.partition(".")[0]] + name


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__


# ------------------------------------------------------------------------------------------------------- without torch


@dataclass(frozen=True, slots=True)
class _Weight:
    """The description of a tensor in a file.

    Attributes
    ----------
    kind, key, count
        Type of the numbers, name in the file, and length of the storage that holds the tensor.
    shape
        Shape of the tensor.
    end
        Position in the storage after the tensor's last number.
    """

    kind: str
    key: str
    count: int
    shape: tuple[int, ...]
    end: int


#: NumPy's names for the types of torch's storages. NumPy has no bfloat16.
_NUMBERS = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8", "Int": "<i4"}


class _Mapping(dict[Any, Any]):
    """Stands in for mappings with attributes."""

    def __setstate__(self, _: object) -> None:
        pass


def _weight(
    storage: tuple[str, str, str, str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Weight:
    """Stand in for the function that creates a tensor."""
    kind, key, count = storage[1], storage[2], storage[4]
    end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return _Weight(kind, key, count, shape, end)


class _Outline(pickle.Unpickler):
    """Unpickle a file to a `_Weight` for each tensor; only the names of stand-ins are allowed."""

    names: Mapping[str, Any] = {
        **{name: _Mapping if kind is dict else kind for kind, name in _NAMED},
        **{f"torch.{number}Storage": number for number in _NUMBERS},
        "collections.OrderedDict": _Mapping,
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes in pickle protocol 2
        "torch._utils._rebuild_tensor_v2": _weight,
        "torch._utils._rebuild_parameter": lambda weight, *_: weight,
    }

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`; this is the documented way to restrict a pickle."""
        return self.names[f"{module}.{name}"]

    def persistent_load(self, storage: Any) -> Any:
        """Return the description of a storage unchanged."""
        return storage


def _is_finite(archive: zipfile.ZipFile, weight: _Weight) -> bool:
    """Whether all numbers in the storage of a weight are finite."""
    import numpy as np

    (root,) = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        return False
    values = np.frombuffer(archive.read(f"{root}data/{weight.key}"), _NUMBERS[weight.kind])
    if len(values) != weight.count or weight.end > weight.count:
        return False
    if weight.kind == "BFloat16":
        return bool((values & 0x7F80 != 0x7F80).all())
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32, copy=False)).all())
