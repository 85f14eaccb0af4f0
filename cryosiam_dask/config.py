"""CryoSiam's YAML files as immutable, typed models.

`read_configuration` reads either of CryoSiam's two files (lamella prediction, semantic segmentation) unchanged, and
`read_pipeline` reads one file for both models. All problems of a file are reported at once, each with its key, the
value and the remedy. Keys of CryoSiam that have no meaning here are accepted, and listed in `Configuration.unused`.

Relative paths are relative to the current folder, as in CryoSiam and its viewer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
    PlainSerializer,
    PrivateAttr,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from cryosiam_dask.core.endings import denoised_ending
from cryosiam_dask.core.executor import with_retries
from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, Problems, not_there, why_unreadable
from cryosiam_dask.model.published import HubFile, parse

#: Keys of CryoSiam's files that have no meaning here: ``--device`` and ``--workers`` choose the devices, and training
#: and evaluation are not part of this program.
UNUSED_KEYS: Mapping[str, frozenset[str]] = {
    "": frozenset({"log_dir", "temp_dir", "labels_folder", "eval_skip_prediction"}),
    "parameters": frozenset({"gpu_devices"}),
    "parameters.network": frozenset(),
    "hyper_parameters": frozenset(),
}


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"must be below an existing home folder, but {path.parts[0]} is unknown") from None


_Path = Annotated[Path, Field(strict=False), AfterValidator(_expanded)]


def _model(value: Any) -> Path | HubFile:
    found = parse(value) if isinstance(value, str) else value
    if not isinstance(found, Path | HubFile):
        raise ValueError("must be a path, or the name of a published model, written as text")
    return _expanded(found) if isinstance(found, Path) else found


_TrainedModel = Annotated[
    Path | HubFile, BeforeValidator(_model), PlainSerializer(str), WithJsonSchema({"type": "string", "format": "path"})
]


def _scientific(value: Any) -> Any:
    """Convert numbers such as 1e-3, which YAML reads as text for lack of a point."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) else value


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"must not contain a name twice: {twice[0]}")
    return names


def _pattern(text: str) -> str:
    """Check a regular expression, and refuse one that may take exponential time."""
    import warnings

    try:
        with warnings.catch_warnings(action="ignore"):
            parsed = re._parser.parse(text)  # type: ignore[attr-defined]
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression, such as ^TS_[0-9]+: {error}") from None
    if _repeats(parsed) > 3:
        raise ValueError("must have at most three repetitions, none inside another, or matching could take forever")
    return text


def _repeats(parsed: Any, inside: bool = False) -> int:
    """Count the repetitions in a parsed regular expression; a nested one counts as 1000."""
    count = 0
    for kind, value in parsed:
        name, parts = str(kind), value if isinstance(value, list | tuple) else ()
        repeats = (name.endswith("REPEAT") and parts[1] != parts[0]) or (name in ("GROUPREF", "BRANCH") and inside)
        count += 1000 if repeats and inside else repeats
        for part in parts:
            for each in part if isinstance(part, list) else (part,):
                if isinstance(each, re._parser.SubPattern):  # type: ignore[attr-defined]
                    count += _repeats(each, inside or bool(repeats))
    return count


_Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_scientific)]


def _printable(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("a name must be one line of printable text")
    return name


_Name = Annotated[str, AfterValidator(_printable)]

OutputFormat = Literal["hdf5", "ome-zarr", "mrc"]

# A discriminated union reports a wrong value once instead of once for each alternative.
_PatchSize = Annotated[
    Annotated[tuple[Annotated[int, Field(ge=4)], ...], Field(strict=False), Tag("tag-list")]
    | Annotated[Literal["auto"], Tag("tag-auto")],
    Discriminator(lambda value: "tag-auto" if value == "auto" else "tag-list"),
]


_MinVoxels = Annotated[
    Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False), Tag("tag-list")]
    | Annotated[int, Field(ge=0), Tag("tag-number")],
    Discriminator(lambda value: "tag-list" if isinstance(value, list | tuple) else "tag-number"),
]


@dataclass(frozen=True, slots=True)
class About:
    """Facts about a key for the documentation, besides its type, default and docstring.

    ``docs/reference.py`` generates the reference, the file with every key, and the schema for editors from these.

    Attributes
    ----------
    example
        A value in YAML.
    unit
        Unit of the value, or of the entries of a list.
    model
        The model that uses the key: ``"denoise"``, ``"lamella"``, ``"semantic"``, or ``""`` for all.
    own
        Whether the key does not exist in CryoSiam.
    """

    example: str = ""
    unit: str = ""
    model: Literal["", "denoise", "lamella", "semantic"] = ""
    own: bool = False


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, use_attribute_docstrings=True
    )


class Data(_Model):
    """How intensities are scaled, and how large the network's patches are."""

    patch_size: Annotated[_PatchSize | None, About("[ 128, 128, 128 ]", "voxels")] = None
    """Size of the patches that the network sees, (z, y, x), or (y, x) for images: multiples of 8, or of 16 for BiFPN
    models. `null`: the patch size of the model's training; `auto`: the largest that fits into the device's memory."""
    halo: Annotated[Annotated[int, Field(ge=1)] | None, About("32", "voxels", own=True)] = None
    """Margin on each side of a patch in which predictions are discarded. `null`: a quarter of the patch, as in
    CryoSiam. A larger `patch_size` with a smaller halo, such as `[ 256, 256, 256 ]` and `32`, is faster, but changes
    the labels slightly."""
    min: Annotated[_Number, About(unit="intensity")] = 0.0
    """Intensity that becomes 0; lower ones are clipped to it."""
    max: Annotated[_Number, About(unit="intensity")] = 1.0
    """Intensity that becomes 1; higher ones are clipped to it."""
    invert: Annotated[bool | None, About("true", own=True)] = None
    """Invert the contrast of tomograms that are dark on bright: each intensity v becomes min + max - v, before `mean`
    and `std` are applied. `null`: do not invert, but warn if that looks necessary; `false`: do not invert. Denoising
    inverts unless this is `false`, which is for tomograms that are already bright on dark."""
    mean: Annotated[_Number | None, About(unit="scaled intensity")] = 0.0
    """Subtracted from the scaled intensities. `null` (denoising): their own mean."""
    std: Annotated[Annotated[_Number, Field(gt=0)] | None, About(unit="scaled intensity")] = 1.0
    """Divides the scaled intensities after `mean` is subtracted. `null` (denoising): their own standard deviation."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max <= self.min:
            raise ValueError(f"max must be larger than min: no intensity lies between {self.min:g} and {self.max:g}")
        return self


class Network(_Model):
    """How the network's probabilities become labels."""

    in_channels: Annotated[int, Field(ge=1)] = 1
    """Channels of the input; must agree with the checkpoint."""
    spatial_dims: Annotated[int, Field(ge=2, le=3)] = 3
    """3 for tomograms, 2 for images; must agree with the checkpoint."""
    threshold: Annotated[Annotated[_Number, Field(ge=0, le=1)] | None, About("0.1", "probability")] = None
    """Lamella: voxels with a higher probability belong to it. Several classes: a voxel is background if no class
    reaches this probability. `null`: 0.9 for models of one class, 0.1 for others."""
    postprocessing: Annotated[bool, About(model="lamella")] = False
    """Smooth the lamella mask, and keep the convex hull of its largest component."""
    hull_3d: Annotated[bool, Field(alias="3d_postprocessing"), About(model="lamella")] = False
    """Use one convex hull in 3-D instead of one in each z-slice."""
    postprocessing_sizes: Annotated[
        Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(strict=False)] | None,
        About("[ -1, 5000, -1, -1, -1 ]", "voxels", "semantic"),
    ] = None
    """One entry per label, the first for label 0: components of the label with at most this many voxels are removed;
    -1 keeps all."""
    min_voxels: Annotated[_MinVoxels | None, About("10", "voxels", "semantic")] = None
    """Particle lists (`semantic-to-centers`) leave out components of at most this many voxels: one number, or a list
    with one for each class. `null`: 0; 100 for lists in CryoSiam's format."""
    out_channels: Annotated[Annotated[int, Field(ge=1)] | None, About("14", model="semantic")] = None
    """Number of classes, background included, for particle lists in CryoSiam's format. `null`: that of the prediction.
    Predictions use the number in the checkpoint."""


class Parameters(_Model):
    """Parameters of the data and of the network."""

    data: Data = Data()
    network: Network = Network()


class HyperParameters(_Model):
    """How the network is run."""

    batch_size: Annotated[int, Field(ge=1), About(unit="patches")] = 2
    """Patches per forward pass on a GPU; a CPU predicts one at a time. A different size may change the last digits of
    the probabilities."""
    precision: Annotated[Literal["fp32", "tf32", "bf16", "fp16"], About("bf16", own=True)] = "fp32"
    """Precision of the network's multiplications: `fp32` or, on devices that support it, `tf32`, `bf16` or `fp16`."""


class Configuration(_Model):
    """One YAML file, for one model."""

    data_folder: Annotated[_Path, About("/data/dataset1/denoised")]
    """Folder of the tomograms. Lamella and semantic models expect denoised ones."""
    prediction_folder: Annotated[_Path, About("/data/dataset1/semantic")]
    """Folder of the outputs; created if it is missing."""
    trained_model: Annotated[_TrainedModel, About("/data/models/semantic.ckpt")]
    """Checkpoint of CryoSiam: a path (`.ckpt`); the name of a published model, such as `cryosiam_lamella` (the command
    `models` lists them); or `hf://owner/repository/file`. The latter two are downloaded once from the Hugging Face
    Hub."""
    mask_folder: Annotated[
        _Path | None, BeforeValidator(lambda value: value or None), About("/data/dataset1/lamella", model="semantic")
    ] = None
    """Folder of the lamella masks `<stem>_preds.h5`: the lamella's `prediction_folder`. `null`: predict everywhere."""
    file_extension: Annotated[str, Field(pattern=r"^\.[^/]*[^/.]$"), About(".ome.zarr")] = ".mrc"
    """Ending of the tomograms' names, with its dot: `.mrc`, `.rec`, `.map`, `.st`, each also with `.gz`; `.zarr`,
    `.ome.zarr` (read in place); `.h5`, `.hdf5`. The content of a file decides how it is read."""
    test_files: Annotated[
        Annotated[tuple[str, ...], Field(strict=False)] | None, About("[ 'TS_01.mrc', 'TS_02.mrc' ]")
    ] = None
    """Names of single tomograms. `null`: all of `data_folder`."""
    ome_zarr_level: Annotated[int, Field(ge=0), About("1", own=True)] = 0
    """Level of OME-Zarr images to segment; 0 is full resolution."""
    hdf5_dataset: Annotated[Annotated[str, Field(min_length=1)] | None, About("volume", own=True)] = None
    """Dataset to segment in HDF5 tomograms. `null`: the only one that can be a tomogram."""
    mrc_unsigned: Annotated[bool | None, About("True", own=True)] = None
    """Whether the bytes of MRC files of mode 0 are unsigned (0 to 255). `null`: decide by the header or, if the header
    does not tell, by the voxels, with a warning."""
    tilt_series_pattern: Annotated[
        Annotated[str, AfterValidator(_pattern)] | None, About(r"'^TS_\d+'", model="semantic", own=True)
    ] = None
    """Particle lists: regular expression that finds the name of the tilt series in a tomogram name such as
    `TS_018_9.96Apx_denoised`: its match or, if it has a group, the first group. `null`: the tomogram's name without
    Warp's `_9.96Apx` at its end."""
    class_names: Annotated[
        Annotated[tuple[_Name, ...], Field(strict=False), AfterValidator(_once)] | None,
        About("[ 'membrane', 'actin' ]", own=True),
    ] = None
    """Names of the labels from 1 on (without the background) for tables, pictures and files. `null`: "class 1",
    "class 2" and so on."""
    output_formats: Annotated[
        tuple[OutputFormat, ...], Field(strict=False), About("[ 'ome-zarr', 'mrc' ]", own=True)
    ] = ("hdf5",)
    """What to write: `hdf5` (always), `ome-zarr` (`<stem>.ome.zarr`: tomogram and labels in several resolutions),
    `mrc` (`<stem>_labels.mrc`)."""
    scale_prediction: Annotated[bool, About(model="denoise")] = True
    """Scale the denoised intensities of each tomogram to 0 to 1."""
    save_raw_predictions: Annotated[bool, About(model="denoise")] = False
    """Also write all channels of the denoiser's output to `<stem>_preds.h5`, dataset `preds`."""
    keep_denoised: Annotated[bool, About(model="denoise", own=True)] = True
    """Keep the denoised MRC file. `false`, in a pipeline: remove it once all models of the tomogram are done."""
    save_internal_files: bool = False
    """Also write probabilities (`probs`) and distances (`distances`) to the HDF5 file."""
    components: Annotated[bool, About(own=True)] = False
    """Also number the connected components of each class, and write tables of their measurements."""
    preview: Annotated[bool, About(own=True)] = True
    """Also draw each tomogram with its labels, `<stem>_preview.png`."""
    save_original_file_extension: bool = False
    """Write an MRC file with the input's name instead of HDF5; has no effect with `save_internal_files`."""
    work_folder: Annotated[_Path | None, About("/local_ssd/work", own=True)] = None
    """Folder of the temporary zarr stores. If it is set, MRC files are copied there first. `null`: beside the
    outputs."""
    keep_work: Annotated[bool, About(own=True)] = False
    """Keep each tomogram's zarr store (tomogram and labels) after its output is complete."""
    block_size: Annotated[Annotated[int, Field(ge=4)] | None, About("256", "voxels", own=True)] = None
    """Edge of the blocks, each of which one task reads, predicts and writes. It changes memory and speed, but no
    result. `null`: the largest edge up to 320 for which two blocks fit into the memory of a worker; for workers with a
    GPU, two blocks into the memory of the GPU and three into that of the worker."""
    parameters: Parameters = Parameters()
    hyper_parameters: HyperParameters = HyperParameters()

    _unused: tuple[str, ...] = PrivateAttr(default=())
    _place: str = PrivateAttr(default="")
    _denoises: bool = PrivateAttr(default=False)
    _denoiser: Configuration | None = PrivateAttr(default=None)

    @property
    def denoises(self) -> bool:
        """Whether the model denoises, instead of segmenting."""
        return self._denoises

    @property
    def denoiser(self) -> Configuration | None:
        """Configuration of the denoiser that makes this model's tomograms in a pipeline; ``None`` without one."""
        return self._denoiser

    def for_denoising(self) -> Configuration:
        """Return the same configuration for a denoiser, without the keys about labels."""
        set_here = [name for name in _ABOUT_LABELS if getattr(self, name) != Configuration.model_fields[name].default]
        plain = self.model_copy(update={name: Configuration.model_fields[name].default for name in _ABOUT_LABELS})
        if self.parameters.network != Network():
            network = self.parameters.network
            kept = Network(in_channels=network.in_channels, spatial_dims=network.spatial_dims)
            plain = plain.model_copy(update={"parameters": self.parameters.model_copy(update={"network": kept})})
            ours = (f.alias or name for name, f in Network.model_fields.items() if getattr(network, name) != f.default)
            set_here += [f"parameters.network.{name}" for name in ours if name not in ("in_channels", "spatial_dims")]
        plain._unused, plain._denoises = (*self._unused, *set_here), True
        return plain

    def absolute(self) -> Configuration:
        """Return a copy with absolute paths, for processes that run in other folders."""
        paths = {name: value.absolute() for name, value in self if isinstance(value, Path)}
        absolute = self.model_copy(update=paths)
        absolute._denoiser = self._denoiser and self._denoiser.absolute()
        return absolute

    @property
    def reading(self) -> dict[str, Any]:
        """Keyword arguments for `cryosiam_dask.files.tomogram.read_header`."""
        return {"level": self.ome_zarr_level, "dataset": self.hdf5_dataset, "unsigned": self.mrc_unsigned}

    @property
    def place(self) -> str:
        """The file that the configuration was read from, and the name of the model if the file has several."""
        return self._place

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys in the file that have no effect here."""
        return self._unused


#: Keys about labels, which have no effect on a denoiser.
_ABOUT_LABELS = (
    "mask_folder", "class_names", "output_formats", "save_internal_files", "components", "tilt_series_pattern",
    "save_original_file_extension",
)  # fmt: skip
#: Keys that only a denoiser's file has.
_ABOUT_DENOISING = ("scale_prediction", "save_raw_predictions", "keep_denoised")

#: pydantic's errors in the terms of a YAML file.
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
    """Load YAML and refuse duplicate keys, of which PyYAML silently keeps only the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} twice", key.start_mark)
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
        If keys or values are wrong.
    """
    path = Path(path)
    return _configuration(_read_yaml(path), str(path))


#: The models of a pipeline, in the order in which they run.
STAGES = ("denoise", "lamella", "semantic")
#: Keys that must be equal for all models of a pipeline, because they describe the tomograms.
_SHARED_KEYS = ("data_folder", "file_extension", "test_files", "ome_zarr_level", "hdf5_dataset", "mrc_unsigned")


def read_pipeline(path: Path | str) -> dict[str, Configuration]:
    """Read a YAML file of a pipeline: one or more models that process the same tomograms.

    The keys of each model are indented below ``denoise``, ``lamella`` or ``semantic``. A key outside these sections
    applies to all models. The denoiser's ``prediction_folder`` is the ``data_folder`` of the other models, and the
    semantic model's ``mask_folder`` is the lamella's ``prediction_folder``. In a common ``work_folder``, each model
    uses a subfolder.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict
        The models of the file by name, in the order of `STAGES`.

    Raises
    ------
    ConfigurationError
        If the file cannot be read or is not YAML, or has none of the models.
    Problems
        If keys or values are wrong.
    """
    path = Path(path)
    return _pipeline(_read_yaml(path), path)


def _pipeline(values: dict[str, Any], path: Path) -> dict[str, Configuration]:
    common = {key: value for key, value in values.items() if key not in STAGES}
    names = [name for name in STAGES if name in values]
    if not names:
        raise ConfigurationError(
            "a pipeline needs the keys of at least one model, indented below its name",
            place=f"{path}, keys {' and '.join(STAGES)}",
            remedy="Compare it with configs/pipeline.yaml",
        )
    problems: list[CryosiamDaskError] = []
    found: dict[str, Configuration] = {}
    for name in names:
        if not isinstance(values[name], dict):
            rule, place = "a pipeline needs the keys of this model, indented below its name", f"{path}, key {name}"
            remedy = "Compare it with configs/pipeline.yaml, or leave this model out"
            problems.append(ConfigurationError(rule, place=place, value=repr(values[name]), remedy=remedy))
            continue
        denoiser = found.get("denoise")
        # The shared keys that describe raw tomograms apply to the denoiser alone.
        left_out = {*(_SHARED_KEYS if denoiser else ()), *(_ABOUT_DENOISING if name != "denoise" else ())}
        shared = common.keys() - left_out
        own = {**{key: common[key] for key in shared}, **values[name]}
        if name == "semantic" and "lamella" in found:
            own.setdefault("mask_folder", str(found["lamella"].prediction_folder))
        if denoiser is not None:
            own = _denoised_by(denoiser) | own
        try:
            found[name] = _configuration(
                own,
                f"{path}, {name}",
                str(path),
                shared - values[name].keys(),
                name,
                {"data_folder"} if denoiser else (),
            )
            found[name]._denoiser = denoiser
        except Problems as error:
            problems += error.problems
    if not problems:
        problems += _contradictions(path, found)
    if problems:
        raise Problems({str(problem): problem for problem in problems}.values())  # a common key is reported once
    folders = {one.work_folder for one in found.values()}
    if len(found) > 1 and len(folders) == 1 and (folder := folders.pop()) is not None:
        # The models may work on a tomogram at the same time, in folders with its name.
        return {name: one.model_copy(update={"work_folder": folder / name}) for name, one in found.items()}
    return found


def _denoised_by(denoiser: Configuration) -> dict[str, Any]:
    """Return the keys of the models that read the output of a denoiser."""
    before, ending = denoiser.file_extension, denoised_ending(denoiser.file_extension)
    files = denoiser.test_files and [f"{name.removesuffix(before)}{ending}" for name in denoiser.test_files]
    return {"data_folder": str(denoiser.prediction_folder), "file_extension": ending, "test_files": files}


_MADE_BY_A_DENOISER = {
    "data_folder": "must be the folder that the denoiser writes to, its prediction_folder",
    "file_extension": "must be the ending of the files that the denoiser writes",
}


def _contradictions(path: Path, found: Mapping[str, Configuration]) -> Iterator[ConfigurationError]:
    """Yield contradictions between the models of a pipeline."""

    def wrong(key: str, rule: str, value: object, remedy: str = "Leave it out") -> ConfigurationError:
        return ConfigurationError(rule, place=f"{path}, key {key}", value=value, remedy=remedy)

    denoiser, lamella, semantic = (found.get(name) for name in STAGES)
    for name, one in found.items():
        if denoiser is None or one is denoiser:
            continue
        made = _denoised_by(denoiser)
        for key, rule in _MADE_BY_A_DENOISER.items():
            if (given := str(getattr(one, key))) != made[key]:
                yield wrong(f"{name}.{key}", rule, f"{given} instead of {made[key]}")
        if one.prediction_folder == denoiser.prediction_folder:
            rule = "must not be the denoiser's folder"
            yield wrong(f"{name}.prediction_folder", rule, one.prediction_folder, "Set it to another folder")
    if lamella is None or semantic is None:
        return
    for key in _SHARED_KEYS:
        if (first := getattr(lamella, key)) != (other := getattr(semantic, key)):
            rule = "must be the same for both models, because they segment the same tomograms"
            remedy = "Write it once, above lamella and semantic"
            yield wrong(f"semantic.{key}", rule, f"{other} instead of {first}", remedy)
    if semantic.mask_folder != lamella.prediction_folder:
        value = f"{semantic.mask_folder} instead of {lamella.prediction_folder}"
        yield wrong("semantic.mask_folder", "must be the lamella's prediction_folder", value)
    if lamella.prediction_folder == semantic.prediction_folder:
        rule = "must not be the lamella's folder, because its files have the same names"
        yield wrong("semantic.prediction_folder", rule, semantic.prediction_folder, "Set it to another folder")
    if lamella.save_original_file_extension:
        rule = "must be False, because the semantic model reads the mask from HDF5"
        yield wrong("lamella.save_original_file_extension", rule, None)


def read_models(path: Path | str, model: str | None = None) -> dict[str, Configuration]:
    """Read a YAML file of one model or of a pipeline.

    Parameters
    ----------
    path
        The file.
    model
        The wanted model of a pipeline; all if ``None``.

    Returns
    -------
    dict
        The models by name, in the order in which they run; a single one has the name ``""``.

    Raises
    ------
    ConfigurationError, Problems
        See `read_configuration`; also if there is no such model.
    """
    path = Path(path)
    values = _read_yaml(path)
    names = [name for name in STAGES if name in values]
    if model is not None and model not in names:
        near = difflib.get_close_matches(model.lower(), names, 1, 0.5)
        raise ConfigurationError(
            f"must name one of the models in {path}, {' or '.join(names)}"
            if names
            else f"is for files of several models, but {path} holds the keys of a single one",
            place="option --model",
            value=model,
            remedy=f"Did you mean {near[0]}?" if near else "Correct it, or leave it out" if names else "Leave it out",
        )
    if not names:
        return {"": _configuration(values, str(path))}
    found = _pipeline(values, path)
    return found if model is None and len(found) > 1 else {"": found[model or names[-1]]}


def read_model(path: Path | str, model: str | None = None) -> Configuration:
    """Read one model of a YAML file: `model` or, if it is ``None``, the last one of the file.

    Parameters
    ----------
    path, model
        See `read_models`, also for the errors.
    """
    *_, found = read_models(path, model).values()
    return found


def read_denoiser(path: Path | str) -> Configuration:
    """Read the denoiser's configuration from its own file or from that of a pipeline.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ConfigurationError, Problems
        See `read_models`; also if a pipeline has no denoiser.
    """
    found = read_models(path, STAGES[0]) if STAGES[0] in (models := read_models(path)) else models
    if "" not in found:
        raise ConfigurationError(
            "a pipeline that begins with raw tomograms needs the keys of a denoiser, indented below its name",
            place=f"{path}, key {STAGES[0]}",
            remedy="Compare it with configs/pipeline.yaml, or name the file of a denoiser",
        )
    return found[""] if found[""].denoises else found[""].for_denoising()


def _read_yaml(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = with_retries(partial(path.read_text, encoding="utf-8"))
        values = yaml.load(text, _UniqueKeys)
    except OSError as error:
        rule, value = why_unreadable(error, "the configuration file must be readable")
        files = _yaml_files(path if path.is_dir() else path.parent)
        near = files[:1] if path.is_dir() else difflib.get_close_matches(str(path), files, 1, 0.5)
        remedy = f"Did you mean {near[0]}?" if near else "Check the name of the configuration file"
        raise ConfigurationError(rule, place=path, value=value, remedy=remedy) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date like 2024-13-45
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        remedy = next((remedy for part, remedy in _YAML_REMEDIES.items() if part in (problem or "")), _COMPARE)
        if mark and re.match(r" *\t", "".join(text.splitlines()[mark.line : mark.line + 1])):
            remedy = "Indent with spaces, not tabs"
        raise ConfigurationError(
            "the configuration must be a YAML file",
            place=f"{path}, line {mark.line + 1}" if mark else path,
            value=problem.removeprefix("found ") if problem else _yaml_problem(error),
            remedy=_NOT_YAML if isinstance(error, UnicodeDecodeError) else remedy,
        ) from None
    if not isinstance(values, dict):
        raise ConfigurationError(
            "the configuration must be a mapping of keys to values",
            place=path,
            value="an empty file" if values is None else type(values).__name__,
            remedy="Write a space after the colon of each key" if isinstance(values, str) else _COMPARE,
        )
    return values


def _yaml_files(folder: Path) -> list[str]:
    try:
        return sorted(str(path) for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    except OSError:
        return []


_COMPARE = "Compare it with configs/config_semantic.yaml"
_NOT_YAML = "Give the YAML file of a model or a pipeline; 'cryosiam-dask info' shows what a data file holds"
#: Remedies for the most common mistakes, by parts of the parser's messages.
_YAML_REMEDIES: Mapping[str, str] = {
    r"'\t'": "Indent with spaces, not tabs",
    "mapping values are not allowed": "Indent the keys of a section equally, and put text with ': ' into quotes",
    "unknown escape character": "Put paths with backslashes into single quotes",
    "could not find expected ':'": "Write a colon and a space after each key",
    "expected <block end>": "Indent the keys of a section equally, and close brackets and quotes before this line",
    "expected ',' or": "Close the bracket of the list, and put commas between its entries",
    "found unexpected end of stream": "Close the quotes or the bracket",
    "cannot start any token": "Put this text into single quotes",
    "undefined alias": "Put text that begins with * into single quotes",
}


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are not UTF-8 text"
    return "too many nested lists" if isinstance(error, RecursionError) else f"an invalid date ({error})"


def _configuration(
    values: dict[str, Any],
    place: str,
    above: str = "",
    of_above: Collection[str] = (),
    stage: str = "",
    pending: Collection[str] = (),
) -> Configuration:
    """Validate the keys of a file or of one of its sections.

    Errors name `place` or, for the keys in `of_above`, `above`. Paths of the keys in `pending` may not exist yet,
    because the same run makes them.
    """
    values, unused = _without_unused(values)

    def where(key: object) -> str:
        return above if key in of_above else place

    try:
        configuration = Configuration.model_validate(values)
    except ValidationError as error:
        problems = [_explain(where(next(iter(e["loc"]), "")), e) for e in error.errors(include_url=False)]
        there = {key: value for key, value in values.items() if key not in pending}
        raise Problems([*problems, *_missing_paths(where, there)]) from None
    about_denoising = tuple(key for key in _ABOUT_DENOISING if key in values)
    denoises = stage == STAGES[0] or (not stage and bool(about_denoising))
    configuration._unused, configuration._place = (*unused, *(() if denoises else about_denoising)), place
    return configuration.for_denoising() if denoises else configuration


def _missing_paths(where: Callable[[str], str], values: dict[str, Any]) -> Iterator[ConfigurationError]:
    """Yield errors about paths that do not exist, so that they are reported together with wrong keys."""
    for key in ("data_folder", "mask_folder", "trained_model"):
        value = values.get(key)
        if not isinstance(value, str) or not value:
            continue
        try:
            there = (key == "trained_model" and isinstance(parse(value), HubFile)) or Path(value).expanduser().exists()
        except (OSError, RuntimeError, ValueError):  # reported elsewhere
            there = True
        if not there:
            remedy = "Run the lamella prediction first, or correct it" if key == "mask_folder" else f"Correct {key}"
            yield ConfigurationError(not_there(Path(value)), place=f"{where(key)}, key {key}", remedy=remedy)


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
    """Convert an error of pydantic to one in the terms of the YAML file."""
    location = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-", "tag-"))]
    key, kind, value = ".".join(location), error["type"], error["input"]
    place = f"{path}, key {key}" if key else f"{path}"
    section, name = ".".join(location[:-1]), location[-1] if location else ""
    if kind in ("extra_forbidden", "invalid_key"):
        everywhere = {k: f"{s}.{k}" if s else k for s in _SECTIONS for k in _keys(s)}
        keys = [*_keys(section), *(STAGES if not section else ())]
        near = difflib.get_close_matches(name.lower(), keys, 1, 0.5) or [
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
