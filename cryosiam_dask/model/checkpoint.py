"""A ``.ckpt`` file to an architecture and its weights, without executing anything that stands in the file.

A checkpoint is a pickle, and a pickle can name any function to be called while it is loaded. It is read with torch's
restricted unpickler, which knows tensors and plain containers. The few other names that training programs leave in
their checkpoints are replaced by inert stand-ins here, so that nothing the file names is ever imported or called; a
file with any other name in it is refused.

The architecture comes from the file's own description (``hyper_parameters``), the widths of the heads from the weights.
The weights must then fit that architecture exactly, in the parts that prediction uses; what else is in the file
(optimizer, callbacks, projectors and predictors of the training) is ignored.

torch takes seconds to load. `look_at_checkpoint`, for those who need no weights, therefore reads the file's pickle with
stand-ins for the few names that such a file holds, and refuses all others; `read_checkpoint` judges whatever it cannot.
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
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What prediction needs of a checkpoint.

    Attributes
    ----------
    architecture
        The network's shapes.
    patch_size
        Patch that it was trained with, in voxels, (z, y, x) or (y, x).
    state
        Weights for `load_state_dict` of the network that `build_network` makes of the architecture; float32. Empty
        where they were only looked at.
    sha256
        Hash of the file, hexadecimal.
    path
        The file.
    """

    architecture: Architecture
    patch_size: tuple[int, ...]
    state: Mapping[str, Tensor] = field(repr=False, compare=False)
    sha256: str
    path: Path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that CryoSiam's training wrote for semantic or lamella segmentation.

    Parameters
    ----------
    path
        The ``.ckpt`` file.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, not a checkpoint of CryoSiam, or would execute something; if its architecture
        cannot be used here, or its weights do not fit it.
    """
    content, sha256 = _load(path)
    architecture, patch_size, state = _described(path, content)
    return Checkpoint(architecture, patch_size, _fit(path, architecture, state), sha256, Path(path))


def look_at_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a checkpoint is, and judge it as `read_checkpoint` does, without its weights and mostly without torch.

    Parameters
    ----------
    path
        See `read_checkpoint`, also for what it raises.
    """
    sha256 = _hash(path)
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (each for each in archive.infolist() if each.filename.endswith("/data.pkl"))
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError  # torch compresses nothing, and what is packed may be of any size
            content = _Outline(BytesIO(archive.read(entry))).load()
            architecture, patch_size, state = _described(path, content)
            if _misfits(architecture, state) or not all(_is_finite(archive, state[name]) for name in state):
                raise ValueError
    except Exception:  # whatever it is, the other reader finds and says it
        return replace(read_checkpoint(path), state={})
    return Checkpoint(architecture, patch_size, {}, sha256, Path(path))


def _described(path: str | Path, content: Any) -> tuple[Architecture, tuple[int, ...], dict[str, Any]]:
    """Architecture, patch and weights of what a file holds, the latter by their names in the network."""
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


#: What torch puts into the names of weights where a network was compiled or wrapped for training.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _unwrapped(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """The weights by the names that they have in a network that is not wrapped; one that has its name already rules."""
    plain = {str(name): ".".join(p for p in str(name).split(".") if p not in _WRAPPERS) for name in weights}
    ordered = sorted(weights, key=lambda name: plain[str(name)] != str(name))
    found: dict[str, Any] = {}
    for name in ordered:
        found.setdefault(plain[str(name)], weights[name])
    return found


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of its training, as far as it is plain data: numbers, text, lists and mappings of them.

    Parameters
    ----------
    path
        The ``.ckpt`` file.

    Returns
    -------
    dict
        ``epoch``, ``global_step`` and ``hyper_parameters``, as far as they are there. Anything else is left out, as is
        what lies deeper than any settings do.

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
        if depth > 12 or next(left, None) is None:  # a file may hold a list that holds itself
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
    """Stands in for an object of no use here, whatever it is made of."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _NumpyDtype:
    """Stands in for a NumPy dtype: its own unpickling trusts the file with memory layouts."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = f"{state[1]}{self.code}"


def _numpy_scalar(dtype: _NumpyDtype, data: bytes = b"") -> object:
    """A NumPy number as a Python number, and nothing else."""
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

# The stand-ins are known to torch's unpickler for the whole process while a file is read.
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
            remedy=_REMEDY_PATH + (f", or to {model}, which is fetched then" if model else ""),
        ) from None


def _hash(path: str | Path) -> str:
    with open_checkpoint(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: str | Path) -> tuple[Any, str]:
    """Content and hash of a file."""
    import torch

    sha256 = _hash(path)
    try:
        with Path(path).open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
        with _UNPICKLER, torch.serialization.safe_globals([*_NAMED]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A training's optimizer state can be twice the weights: mapped, it is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # Whatever damaged bytes make the unpickler or the archive reader stumble over.
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or "an unexpected end"
        if named := re.search(r"GLOBAL (\S+)", reason):
            raise CheckpointError(
                "loading a checkpoint must not execute anything, and this one asks for a function or class that is "
                "neither a tensor nor a plain value",
                place=path,
                value=named[1],
                remedy="If you trust its source, load it there with torch and save only its state_dict and "
                "hyper_parameters to a new file",
            ) from None
        raise CheckpointError(
            "the checkpoint must be a complete file written by torch.save, with its own protocol",
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
    """The file's description of itself; values come from YAML files of all ages."""

    path: str | Path
    tree: Any

    def get(self, config: str, key: str, default: object = ...) -> Any:
        """``hyper_parameters[config]["parameters"]`` at `key`, whose levels are separated by dots."""
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
            remedy="Use a checkpoint of a network that this program knows",
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
    """Architecture that a checkpoint describes."""
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
            backbone, "network.no_max_pool", "must be true: a network that pools at its start labels at half resolution"
        )
    out_channels = parameters.integer(config, "network.out_channels")
    if out_channels > 256:
        parameters.refuse(config, "network.out_channels", "must be at most 256, because labels are stored in one byte")
    kernel_size = parameters.integers(config, "network.kernel_size", dims, 3)
    padding = parameters.integers(config, "network.padding", dims, 1, least=0)
    if any(kernel != 2 * pad + 1 for kernel, pad in zip(kernel_size, padding, strict=True)):
        parameters.refuse(config, "network.padding", f"must be half of the kernel size {list(kernel_size)}")
    if not any(name.startswith("semantic_head.") for name in state):
        raise CheckpointError(
            "the checkpoint must hold a semantic head",
            place=path,
            value="no weights named _model.semantic_head",
            remedy="Use a checkpoint trained for semantic or lamella segmentation, not for another task",
        )
    is_fpn = parameters.get(backbone, "network.decoder_type", "fpn") == "fpn"
    has_distances = any(name.startswith("distance_head.") for name in state)
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
        semantic_widths=_hidden_widths(state, "semantic_head"),
        distance_widths=_hidden_widths(state, "distance_head") if has_distances else None,
        kernel_size=kernel_size,
    )


def _hidden_widths(state: Mapping[str, Tensor], head: str) -> tuple[int, ...]:
    """Output channels of a head's convolutions but the last; batch norms lie between them."""
    widths, index = [], 0
    while shape := getattr(state.get(f"{head}.{3 * index}.weight"), "shape", None):
        widths.append(shape[0])
        index += 1
    return tuple(widths[:-1])


#: Counted in training alone, and left out by programs that convert weights.
_COUNTED = ".num_batches_tracked"


def _misfits(architecture: Architecture, state: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names and shapes of weights."""
    expected = architecture.weights()
    problems = {
        "missing": [_full(name) for name in expected if name not in state and not name.endswith(_COUNTED)],
        "left over": [_full(name) for name in state if name not in expected],
        "of another kind": [
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
    """The weights as float32, if they are exactly those of the architecture."""
    import torch

    if found := _misfits(architecture, state):
        raise CheckpointError(
            "the weights must be exactly those of the network that the checkpoint describes in its hyper_parameters",
            place=path,
            value="; ".join(found),
            remedy="Use the checkpoint as CryoSiam's training wrote it",
        )
    # A copy, so that nothing stays mapped to a file that somebody may replace.
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
    """A weight's name in the file."""
    return _PREFIXES[name.partition(".")[0]] + name


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__


# ------------------------------------------------------------------------------------------------------- without torch


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor as a file describes it.

    Attributes
    ----------
    kind, key, count
        Of the storage that holds its numbers: torch's name of their type, the file's of the storage, and how many.
    shape
        Of the tensor.
    end
        Place in the storage behind the tensor's last number.
    """

    kind: str
    key: str
    count: int
    shape: tuple[int, ...]
    end: int


#: The types of numbers in torch's storages, as NumPy has them; it has none for bfloat16.
_NUMBERS = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8", "Int": "<i4"}


class _Mapping(dict[Any, Any]):
    """Stands in for mappings that carry attributes of their own."""

    def __setstate__(self, _: object) -> None:
        pass


def _weight(
    storage: tuple[str, str, str, str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Weight:
    """Stands in for the function that makes a tensor."""
    kind, key, count = storage[1], storage[2], storage[4]
    end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return _Weight(kind, key, count, shape, end)


class _Outline(pickle.Unpickler):
    """Reads what a file holds, with a `_Weight` for each tensor. Any name but those of stand-ins is refused."""

    names: Mapping[str, Any] = {
        **{name: _Mapping if kind is dict else kind for kind, name in _NAMED},
        **{f"torch.{number}Storage": number for number in _NUMBERS},
        "collections.OrderedDict": _Mapping,
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, as protocol 2 has them
        "torch._utils._rebuild_tensor_v2": _weight,
        "torch._utils._rebuild_parameter": lambda weight, *_: weight,
    }

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`: the documented way to keep a pickle from anything else."""
        return self.names[f"{module}.{name}"]

    def persistent_load(self, storage: Any) -> Any:
        """The description of a storage as it stands."""
        return storage


def _is_finite(archive: zipfile.ZipFile, weight: _Weight) -> bool:
    """Whether all numbers of the storage of a weight are finite ones."""
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
