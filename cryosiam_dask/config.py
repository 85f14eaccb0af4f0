"""The YAML files of CryoSiam as frozen, typed models.

`read_configuration` reads either of CryoSiam's two files (lamella prediction, semantic segmentation) as it stands, and
`read_pipeline` one file for both models.
Everything that is wrong with a file is reported at once, each problem with its key, the value found and the remedy.
Keys that CryoSiam's own files may carry but that mean nothing here are accepted and listed in `Configuration.unused`.

Relative paths are taken from the current folder, as CryoSiam and its viewer take them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, Problems
from cryosiam_dask.grid import DEFAULT_BLOCK_SIZE

#: Keys of CryoSiam's files that have no meaning here: devices are chosen by ``--device`` and ``--workers``, the
#: number of classes is read from the checkpoint, and training and evaluation are not part of this program.
UNUSED_KEYS: Mapping[str, frozenset[str]] = {
    "": frozenset({"log_dir", "temp_dir", "labels_folder", "eval_skip_prediction"}),
    "parameters": frozenset({"gpu_devices"}),
    "parameters.network": frozenset({"out_channels"}),
    "hyper_parameters": frozenset(),
}

_Path = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]


def _scientific(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for text; everybody else for a number."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) else value


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"must not hold a name twice: {twice[0]}")
    return names


_Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_scientific)]


def _printable(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("a name must be a line of printable text")
    return name


_Name = Annotated[str, AfterValidator(_printable)]

OutputFormat = Literal["hdf5", "ome-zarr", "mrc"]

# Told apart before they are looked at, so that a fault is reported once and not for either kind.
_PatchSize = Annotated[
    Annotated[tuple[Annotated[int, Field(ge=4)], ...], Field(strict=False), Tag("tag-list")]
    | Annotated[Literal["auto"], Tag("tag-auto")],
    Discriminator(lambda value: "tag-auto" if value == "auto" else "tag-list"),
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Data(_Model):
    """``parameters.data``: how intensities are scaled and how large the network's patch is.

    Attributes
    ----------
    patch_size
        Patch shape in voxels, (z, y, x) or (y, x); the checkpoint's own where it is not given; ``"auto"`` for the
        largest that fits into the device's memory.
    halo
        Voxels at each side of a patch that are not kept; a quarter of the patch, as in CryoSiam, where it is not given.
    min, max
        Intensities mapped to 0 and 1; what lies outside is clipped.
    mean, std
        Subtracted from, and dividing, the scaled intensities.
    """

    patch_size: _PatchSize | None = None
    halo: Annotated[int, Field(ge=1)] | None = None
    min: _Number = 0.0
    max: _Number = 1.0
    mean: _Number = 0.0
    std: Annotated[_Number, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max <= self.min:
            raise ValueError(f"max must be larger than min: no intensity lies between {self.min:g} and {self.max:g}")
        return self


class Network(_Model):
    """``parameters.network``: what becomes of the network's probabilities.

    Attributes
    ----------
    in_channels, spatial_dims
        Must agree with the checkpoint.
    threshold
        Probability threshold. Not given: 0.9 for a model of one class (lamella), 0.1 for several.
    postprocessing
        Lamella: keep the largest smoothed component and fill it to its convex hull.
    hull_3d
        YAML key ``3d_postprocessing``: one 3-D hull instead of one for each z-slice.
    postprocessing_sizes
        One entry per label, the first for label 0: components of that label with at most so many voxels are removed;
        -1 leaves the label alone.
    min_voxels
        Particle lists: components with at most so many voxels are left out.
    """

    in_channels: Annotated[int, Field(ge=1)] = 1
    spatial_dims: Annotated[int, Field(ge=2, le=3)] = 3
    threshold: Annotated[_Number, Field(ge=0, le=1)] | None = None
    postprocessing: bool = False
    hull_3d: bool = Field(default=False, alias="3d_postprocessing")
    postprocessing_sizes: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(strict=False)] | None = None
    min_voxels: Annotated[int, Field(ge=0)] = 0


class Parameters(_Model):
    """``parameters``."""

    data: Data = Data()
    network: Network = Network()


class HyperParameters(_Model):
    """``hyper_parameters``.

    Attributes
    ----------
    batch_size
        Patches in one forward pass on a GPU; a CPU takes one at a time, so that no result depends on it.
    precision
        Of the network's products: fp32, or where the device has instructions for them tf32, bf16 or fp16.
    """

    batch_size: Annotated[int, Field(ge=1)] = 2
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"


class Configuration(_Model):
    """One YAML file.

    Attributes
    ----------
    data_folder
        Folder of the tomograms.
    prediction_folder
        Folder of the outputs; made if it is missing.
    trained_model
        Checkpoint (``.ckpt``).
    mask_folder
        Folder of the lamella masks ``<stem>_preds.h5``; ``None`` predicts everywhere.
    file_extension
        Ending of the tomograms' names, with its dot.
    test_files
        Names of single tomograms; ``None`` takes every file with the extension.
    save_internal_files
        Also write probabilities and distances.
    components
        Also write the instances of each class and tables of their measurements.
    preview
        Also draw a picture of each tomogram with its labels.
    save_original_file_extension
        Write an MRC file of the input's name instead of HDF5 (not with `save_internal_files`).
    work_folder
        Folder of the temporary zarr stores; ``None`` puts them beside the outputs.
    keep_work
        Keep a tomogram's zarr store once its output is complete.
    block_size
        Edge in voxels of the blocks that are read, predicted and written at once; never changes a result.
    class_names
        Names of the labels from 1 on; ``None``: ``"class 1"`` and so on.
    output_formats
        Also write the labels so, beside the HDF5 file that is always written: ``"ome-zarr"``, ``"mrc"``.
    ome_zarr_level
        Which level of an OME-Zarr image to segment; 0 is full resolution.
    hdf5_dataset
        Which dataset of HDF5 tomograms to segment; ``None``: the only one that can be a tomogram.
    """

    data_folder: _Path
    prediction_folder: _Path
    trained_model: _Path
    mask_folder: Annotated[_Path | None, BeforeValidator(lambda value: value or None)] = None
    file_extension: Annotated[str, Field(pattern=r"^\.[^/]*[^/.]$")] = ".mrc"
    test_files: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    save_internal_files: bool = False
    components: bool = False
    preview: bool = True
    save_original_file_extension: bool = False
    work_folder: _Path | None = None
    keep_work: bool = False
    block_size: Annotated[int, Field(ge=4)] = DEFAULT_BLOCK_SIZE
    class_names: Annotated[tuple[_Name, ...], Field(strict=False), AfterValidator(_once)] | None = None
    output_formats: Annotated[tuple[OutputFormat, ...], Field(strict=False)] = ("hdf5",)
    ome_zarr_level: Annotated[int, Field(ge=0)] = 0
    hdf5_dataset: Annotated[str, Field(min_length=1)] | None = None
    parameters: Parameters = Parameters()
    hyper_parameters: HyperParameters = HyperParameters()

    _unused: tuple[str, ...] = PrivateAttr(default=())

    def absolute(self) -> Configuration:
        """The same with absolute paths, for processes that run in other folders."""
        paths = {name: value.absolute() for name, value in self if isinstance(value, Path)}
        found = self.model_copy(update=paths)
        found._unused = self._unused
        return found

    @property
    def reading(self) -> dict[str, Any]:
        """Which part of a tomogram file is meant: keywords of `cryosiam_dask.mrc_to_zarr.read_header`."""
        return {"level": self.ome_zarr_level, "dataset": self.hdf5_dataset}

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of CryoSiam that the file holds and that have no effect here."""
        return self._unused


#: What pydantic calls a value of the wrong kind, in the words of a YAML file.
_RULES: Mapping[str, str] = {
    "string_pattern_mismatch": "must begin with a dot, such as .mrc, .rec or .mrc.gz",
    "path_type": "must be a path, written as text",
    "tuple_type": "must be a list, such as [ 128, 128, 128 ] or [ 'a.mrc' ], or null",
    "model_type": "must hold keys of its own, indented below it",
    "bool_type": "must be True or False, without quotes",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
}

_SECTIONS: Mapping[str, type[_Model]] = {
    "": Configuration,
    "parameters": Parameters,
    "parameters.data": Data,
    "parameters.network": Network,
    "hyper_parameters": HyperParameters,
}


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: otherwise the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_configuration(path: Path | str) -> Configuration:
    """Read a YAML file of CryoSiam.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ConfigurationError
        If the file cannot be read or is not YAML.
    Problems
        All keys and values that are wrong.
    """
    path = Path(path)
    return _configuration(_read_yaml(path), str(path))


#: The models of a pipeline, in the order in which every tomogram needs them.
STAGES = ("lamella", "semantic")
#: Keys that a pipeline's models have in common, since they are about the same tomograms.
_SHARED_KEYS = ("data_folder", "file_extension", "test_files", "ome_zarr_level", "hdf5_dataset")


def read_pipeline(path: Path | str) -> dict[str, Configuration]:
    """Read a YAML file of two models for the same tomograms.

    Below each of the keys ``lamella`` and ``semantic`` stand the keys of that model's own file. A key above them is
    meant for both. The semantic model's ``mask_folder`` is the lamella's ``prediction_folder``. In a ``work_folder`` of
    both, each has a folder of its own name.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict
        By the names of `STAGES`, in their order.

    Raises
    ------
    ConfigurationError
        If the file cannot be read or is not YAML.
    Problems
        All keys and values that are wrong.
    """
    path = Path(path)
    values = _read_yaml(path)
    common = {key: value for key, value in values.items() if key not in STAGES}
    problems: list[CryosiamDaskError] = [
        ConfigurationError(
            "a pipeline needs the keys of this model, indented below its name",
            place=f"{path}, key {name}",
            value=None if name not in values else repr(values[name]),
            remedy="Compare it with configs/pipeline.yaml, or run semantic-predict with the file of a single model",
        )
        for name in STAGES
        if not isinstance(values.get(name), dict)
    ]
    if problems:
        raise Problems(problems)
    found: dict[str, Configuration] = {}
    for name in STAGES:
        own = {**common, **values[name]}
        if name == "semantic" and "lamella" in found:
            own.setdefault("mask_folder", str(found["lamella"].prediction_folder))
        try:
            found[name] = _configuration(own, f"{path}, {name}")
        except Problems as error:
            problems += error.problems
    if not problems:
        lamella, semantic = (found[name] for name in STAGES)
        for key, one, other in (
            *((key, getattr(lamella, key), getattr(semantic, key)) for key in _SHARED_KEYS),
            ("mask_folder", lamella.prediction_folder, semantic.mask_folder),
        ):
            if one != other:
                problems.append(
                    ConfigurationError(
                        "must be the lamella's prediction_folder"
                        if key == "mask_folder"
                        else "must be the same for both models, which segment the same tomograms",
                        place=f"{path}, key semantic.{key}",
                        value=f"{other}, and not {one}",
                        remedy="Leave it out" if key == "mask_folder" else "Write it once, above lamella and semantic",
                    )
                )
        if lamella.prediction_folder == semantic.prediction_folder:
            problems.append(
                ConfigurationError(
                    "must be another folder than the lamella's, whose files have the same names",
                    place=f"{path}, key semantic.prediction_folder",
                    value=semantic.prediction_folder,
                    remedy="Set it to another folder",
                )
            )
        if lamella.save_original_file_extension:
            problems.append(
                ConfigurationError(
                    "must be False: the semantic model reads the mask from HDF5",
                    place=f"{path}, key lamella.save_original_file_extension",
                    remedy="Leave it out",
                )
            )
    if problems:
        raise Problems(problems)
    if lamella.work_folder is not None and lamella.work_folder == semantic.work_folder:
        # Both models are at work on a tomogram at the same time, under its name.
        return {name: one.model_copy(update={"work_folder": lamella.work_folder / name}) for name, one in found.items()}
    return found


def read_pipeline_or_configuration(path: Path | str) -> dict[str, Configuration]:
    """Read a YAML file of either kind; a single model has the name ``""``.

    Raises
    ------
    ConfigurationError, Problems
        See `read_configuration`.
    """
    values = _read_yaml(Path(path))
    return read_pipeline(path) if any(name in values for name in STAGES) else {"": read_configuration(path)}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigurationError(
            "the configuration file must be readable", place=path, value=error.strerror, remedy="Check --config-file"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        raise ConfigurationError(
            "the configuration must be a YAML file",
            place=f"{path}, line {mark.line + 1}" if mark else path,
            value=getattr(error, "problem", None) or _unread(error),
            remedy="Compare it with configs/config_semantic.yaml",
        ) from None
    if not isinstance(values, dict):
        raise ConfigurationError(
            "the configuration must be a mapping of keys to values",
            place=path,
            value="an empty file" if values is None else type(values).__name__,
            remedy="Compare it with configs/config_semantic.yaml",
        )
    return values


def _unread(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are not UTF-8 text"
    return "lists within lists without end" if isinstance(error, RecursionError) else f"a date that is none ({error})"


def _configuration(values: dict[str, Any], place: str) -> Configuration:
    """The model of what a file, or a part of it that `place` names, says."""
    values, unused = _without_unused(values)
    try:
        configuration = Configuration.model_validate(values)
    except ValidationError as error:
        problems = [_explain(place, e) for e in error.errors(include_url=False)]
        raise Problems([*problems, *_missing_paths(place, values)]) from None
    configuration._unused = unused
    return configuration


def _missing_paths(path: str, values: dict[str, Any]) -> Iterator[ConfigurationError]:
    """What the planning of a run would find next, so that a user mends it together with the rest."""
    for key in ("data_folder", "mask_folder", "trained_model"):
        value = values.get(key)
        if isinstance(value, str) and value and not Path(value).expanduser().exists():
            yield ConfigurationError("must exist", place=f"{path}, key {key}", value=value, remedy=f"Correct {key}")


def _without_unused(values: dict[str, Any], section: str = "") -> tuple[dict[str, Any], tuple[str, ...]]:
    kept, unused = {}, []
    for key, value in values.items():
        name = f"{section}.{key}" if section else str(key)
        if key in UNUSED_KEYS.get(section, ()):
            unused.append(name)
        elif name in _SECTIONS and isinstance(value, dict):
            kept[key], below = _without_unused(value, name)
            unused.extend(below)
        elif name in _SECTIONS and value is None:
            pass  # "parameters:" with nothing below it means the defaults
        else:
            kept[key] = value
    return kept, tuple(unused)


def _keys(section: str) -> Iterator[str]:
    for name, field in _SECTIONS[section].model_fields.items():
        yield field.alias or name


def _explain(path: str, error: Any) -> ConfigurationError:
    """One problem that pydantic found, in the words of the configuration."""
    location = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-", "tag-"))]
    key, kind, value = ".".join(location), error["type"], error["input"]
    place = f"{path}, key {key}" if key else f"{path}"
    section, name = ".".join(location[:-1]), location[-1] if location else ""
    if kind in ("extra_forbidden", "invalid_key"):
        everywhere = {k: f"{s}.{k}" if s else k for s in _SECTIONS for k in _keys(s)}
        near = difflib.get_close_matches(name, [*_keys(section)], 1, 0.5) or [
            everywhere[k] for k in difflib.get_close_matches(name, everywhere, 1, 0.7)
        ]
        known = ", ".join(_keys(section))
        remedy = f"Did you mean {near[0]}?" if near else f"The keys known here are {known}"
        return ConfigurationError("this key is not known", place=place, remedy=remedy)
    if kind == "missing":
        return ConfigurationError("this key is required", place=place, remedy=f"Add a line '{name}: …'")
    rule = _RULES.get(kind) or error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return ConfigurationError(
        rule,
        place=place,
        value=None if isinstance(value, dict) else repr(value),
        remedy="configs/config_all_keys.yaml explains every key",
    )
