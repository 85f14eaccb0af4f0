"""Find the tomograms, masks and predictions of a configuration."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from cryosiam_dask.config import Configuration
from cryosiam_dask.core.endings import denoised_ending
from cryosiam_dask.core.executor import with_retries
from cryosiam_dask.errors import (
    CheckpointError,
    ConfigurationError,
    CryosiamDaskError,
    MaskError,
    OutputError,
    Problems,
    TomogramError,
    is_transient,
    not_there,
)
from cryosiam_dask.files.folders import left_out, unusable, visible


def require_paths(configurations: Mapping[str, Configuration], filename: str | None = None) -> None:
    """Check the paths of configurations before slow imports.

    Parameters
    ----------
    configurations
        Configuration of each model, in order; see `cryosiam_dask.config.read_models`.
    filename
        See `cryosiam_dask.runs.plan.plan_run`, which finds the same problems and more.

    Raises
    ------
    Problems
        If paths are wrong, with all problems together.
    """
    from cryosiam_dask.model.checkpoint import open_checkpoint

    problems: list[CryosiamDaskError] = []
    for number, configuration in enumerate(configurations.values()):
        try:
            sources = all_tomograms(configuration, filename, problems)
            if number == 0:  # later models use the masks that the first one makes
                find_masks(configuration, sources, (), problems)
            check_prediction_folder(configuration, problems)
            if isinstance(configuration.trained_model, Path):
                open_checkpoint(configuration.trained_model).close()
        except CheckpointError as error:
            problems.append(error)
        except OSError:  # perhaps transient: `plan_run` tries again
            pass
    if problems:
        raise Problems(
            {str(problem): problem for problem in problems}.values()
        )  # each once: models share their tomograms


#: Bytes by which the names of outputs and temporary files are longer than the name of their tomogram.
_LONGER = 60


def refused_names(configuration: Configuration, sources: Sequence[Path]) -> dict[Path, TomogramError]:
    """Find the tomograms whose names cannot be used for outputs, and return them with the error.

    Names are text in every table, list and report; a file system limits their length, and may ignore their case.
    """
    folder = next((each for each in _upwards(configuration.prediction_folder) if each.is_dir()), Path("/"))
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX") - _LONGER
    except (OSError, ValueError, AttributeError):
        longest = 255 - _LONGER
    ignores_case = _ignores_case(folder)
    found: dict[Path, TomogramError] = {}
    taken: dict[str, Path] = {}
    for source in sources:
        stem, rule = source.name.removesuffix(configuration.file_extension), ""
        same = taken.setdefault(unicodedata.normalize("NFC", stem).casefold(), source) if ignores_case else source
        if shown(stem) != stem:
            rule = "its name must be UTF-8 text without control characters, because lists and tables contain it"
        elif len(os.fsencode(stem)) > longest:
            rule = (
                f"its name must have at most {longest} bytes without its extension, because names of outputs are longer"
            )
        elif same != source:
            rule = f"its outputs must not be those of {same.name}, but {folder} ignores upper and lower case"
        if rule:
            found[source] = TomogramError(rule, place=shown(str(source)), remedy="Rename it, or make a link to it")
    return found


def shown(name: str) -> str:
    """Return a file name as text, with invalid bytes and control characters escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if unicodedata.category(c) not in ("Cc", "Zl", "Zp") else ascii(c)[1:-1] for c in text)


def _upwards(folder: Path) -> tuple[Path, ...]:
    whole = folder.absolute()
    return whole, *whole.parents


def _ignores_case(folder: Path) -> bool:
    """Whether a file system ignores upper and lower case; tested without writing."""
    for each in _upwards(folder):
        if each.name.swapcase() != each.name:
            other = each.with_name(each.name.swapcase())
            return other.exists() and each.samefile(other)
    return False


def find_sources(configuration: Configuration) -> list[Path]:
    """Find the tomogram files of a configuration.

    Raises
    ------
    Problems
        If there are none, or a named one is missing.
    """
    problems: list[CryosiamDaskError] = []
    sources = all_tomograms(configuration, None, problems)
    if problems:
        raise Problems(problems)
    return sources


def find_tomograms(configuration: Configuration, filename: str | None = None) -> list[Path]:
    """Find the tomograms of a configuration that exist; `plan_run` reports those that do not."""
    return all_tomograms(configuration, filename, [])


def all_tomograms(configuration: Configuration, filename: str | None, problems: list[CryosiamDaskError]) -> list[Path]:
    try:
        return _tomograms(configuration, filename, problems)
    except OSError as error:
        if is_transient(error):
            raise
        problems.append(unreadable_folder("data_folder", configuration.data_folder, error))
        return []


def name_in_data_folder(configuration: Configuration, name: str, place: str) -> str:
    """Return the name of a tomogram in `data_folder`, given a path relative to that or to the current folder.

    Raises
    ------
    ConfigurationError
        If the path is elsewhere.
    """
    folder, path = configuration.data_folder, Path(name)
    if path.name == name:
        return name
    for parent in ((folder / path).parent, path.parent):
        if parent.is_dir() and parent.resolve().is_relative_to(folder.resolve()):
            return str(parent.resolve().relative_to(folder.resolve()) / path.name)
    raise ConfigurationError(
        f"the tomogram must be a file in data_folder, which is {folder}",
        place=place,
        value=name,
        remedy="Name a file there, or change data_folder",
    )


def find_predictions(configuration: Configuration, filename: str | None = None, *, sizes: bool = False) -> list[Path]:
    """Find the existing predictions of a configuration.

    Parameters
    ----------
    configuration
        The YAML file.
    filename
        Name of a single tomogram; takes precedence over ``test_files``.
    sizes
        Whether the key ``postprocessing_sizes`` is required.

    Raises
    ------
    Problems
        If there are none, one is missing, or the configuration lacks ``postprocessing_sizes``.
    ConfigurationError
        If the folder cannot be read, or the model is a denoiser.
    """
    try:
        return with_retries(partial(_find_predictions, configuration, filename, sizes))
    except OSError as error:
        raise unreadable_folder("prediction_folder", configuration.prediction_folder, error) from None


def _find_predictions(configuration: Configuration, filename: str | None, sizes: bool) -> list[Path]:
    if configuration.denoises:
        raise ConfigurationError(
            "this command needs a model that gives labels", place=configuration.place, value="a denoiser",
            remedy="Name another model of a pipeline with --model, or give the file of another model",
        )  # fmt: skip
    folder = configuration.prediction_folder
    names = (filename,) if filename is not None else configuration.test_files
    if names is None:
        predictions = visible(folder, "_preds.h5") if folder.is_dir() else []
    else:
        place = "--filename" if filename is not None else "key test_files"
        predictions = [folder / f"{_stem(configuration, name, place)}_preds.h5" for name in names]
    problems: list[CryosiamDaskError] = [
        OutputError(
            not_there(path), place="key prediction_folder", remedy="Run semantic-predict first, or correct the name"
        )
        for path in predictions or [folder / "*_preds.h5"]
        if not path.is_file()
    ]
    if sizes and configuration.parameters.network.postprocessing_sizes is None:
        key, rule = "parameters.network.postprocessing_sizes", "this key is required to remove small components"
        remedy = "Add a list with one entry per label, such as [ -1, 5000, -1, -1, -1 ]"
        problems.append(ConfigurationError(rule, place=f"key {key}", remedy=remedy))
    if problems:
        raise Problems(problems)
    return predictions


def _stem(configuration: Configuration, name: str, place: str) -> str:
    """Return the stem of a tomogram, given the name of its file in `data_folder` or, in a pipeline, of the raw file."""
    known = [each for each in (configuration, configuration.denoiser) if each and name.endswith(each.file_extension)]
    for each in known[:-1]:
        with suppress(ConfigurationError):  # it may be a path to the raw file
            return Path(name_in_data_folder(each, name, place)).name.removesuffix(each.file_extension)
    last = known[-1] if known else configuration
    return Path(name_in_data_folder(last, name, place)).name.removesuffix(last.file_extension)


def unreadable_folder(key: str, folder: Path, error: OSError) -> ConfigurationError:
    """Return the error to raise if a folder cannot be read."""
    return ConfigurationError(
        "must be a readable folder",
        place=f"key {key}",
        value=f"{error.filename or folder}: {error.strerror}",
        remedy=f"Change the permissions of the folder, or change {key}",
    )


def denoised_file(denoiser: Configuration, source: Path) -> Path:
    """Return the MRC file that a denoiser makes from a tomogram, which has the same name if that suits an MRC file."""
    stem, ending = source.name.removesuffix(denoiser.file_extension), denoised_ending(denoiser.file_extension)
    return denoiser.prediction_folder / f"{stem}{ending}"


def made_of(configuration: Configuration, filename: str | None = None) -> dict[Path, Path]:
    """Return the tomograms that a pipeline's denoiser makes for a model, each with its raw tomogram."""
    denoiser = configuration.denoiser
    sources = [] if denoiser is None else find_tomograms(denoiser, filename)
    return {denoised_file(denoiser, source): source for source in sources if denoiser is not None}


def _tomograms(configuration: Configuration, filename: str | None, problems: list[CryosiamDaskError]) -> list[Path]:
    if configuration.denoiser is not None:
        denoiser = configuration.denoiser
        return [denoised_file(denoiser, source) for source in _tomograms(denoiser, filename, problems)]
    folder, extension = configuration.data_folder, configuration.file_extension
    if not folder.is_dir():
        problems.append(not_found("data_folder", folder))
        return []
    if filename is not None or configuration.test_files is not None:
        place = "--filename" if filename is not None else "key test_files"
        names = (filename,) if filename is not None else configuration.test_files or ()
        sources = []
        for name in names:
            try:
                name = name_in_data_folder(configuration, name, place)
            except ConfigurationError as error:
                problems.append(error)
                continue
            if not _is_tomogram(folder / name) and _is_tomogram(folder / f"{name}{extension}"):
                name += extension
            if not name.endswith(extension):
                rule = f"the names of tomograms must end with file_extension, which is {extension}"
                remedy = "Change the name or file_extension"
                problems.append(ConfigurationError(rule, place=place, value=name, remedy=remedy))
            elif why := _why_no_tomogram(folder / name):
                near = difflib.get_close_matches(name, [path.name for path in folder.iterdir()], 1, 0.7)
                rule = f"the tomogram must be a file in data_folder, which is {folder}"
                remedy = f"Did you mean {near[0]}?" if near and near[0] != name else "Check the name"
                problems.append(ConfigurationError(rule, place=place, value=f"{name} ({why})", remedy=remedy))
            else:
                sources.append(folder / name)
        if not names:
            problems.append(
                ConfigurationError("must name at least one tomogram, or be null", place=place, remedy="Set it to null")
            )
        return list(dict.fromkeys(sources))
    sources = sorted(path for path in folder.iterdir() if path.name.endswith(extension) and _is_tomogram(path))
    if folder.resolve() == configuration.prediction_folder.resolve():
        sources = [path for path in sources if not _is_output(path)]
    if not sources:
        found = sorted({"".join(path.suffixes[-1:]) for path in folder.iterdir() if _is_tomogram(path)} - {""})
        others = "; ".join(left_out_tomograms(configuration))
        value = others or (f"files ending with {', '.join(found[:8])}" if found else "no file at all")
        rule = f"there must be at least one file whose name ends with file_extension, which is {extension}"
        place, remedy = f"key data_folder, {folder}", "Check data_folder and file_extension"
        problems.append(ConfigurationError(rule, place=place, value=value, remedy=remedy))
    return sources


def left_out_tomograms(configuration: Configuration) -> list[str]:
    """Describe the files in `data_folder` that look like tomograms but are not used, in one sentence or none."""
    folder = configuration.data_folder
    with suppress(OSError):
        if configuration.test_files is None and folder.is_dir():
            found = left_out(folder, configuration.file_extension, _why_no_tomogram)
            return [found] if found else []
    return []


def _is_tomogram(path: Path) -> bool:
    return not _why_no_tomogram(path)


def _why_no_tomogram(path: Path) -> str:
    """Return why a path cannot be a tomogram; empty for files and zarr folders.

    A zarr folder without metadata fails later, with an error that names it.
    """
    why = unusable(path)
    try:
        if why or path.is_file():
            return why
        from cryosiam_dask.files.zarr import is_zarr

        return "" if path.is_dir() and (path.suffix == ".zarr" or is_zarr(path)) else "no file"
    except OSError as error:
        return "" if is_transient(error) else str(error.strerror)


def _is_output(path: Path) -> bool:
    """Whether a path is an output of a run; outputs may be in the same folder as the tomograms."""
    if path.name.endswith(("_preds.h5", "_components.h5", ".work.zarr")):
        return True
    from cryosiam_dask.stages.export import read_mrc_fingerprint
    from cryosiam_dask.stages.ome_zarr import SEGMENTATION, read_own_attributes

    if path.name.endswith("_labels.mrc"):
        return read_mrc_fingerprint(path) is not None
    return (path / "labels" / SEGMENTATION).is_dir() and bool(read_own_attributes(path))


def find_masks(
    configuration: Configuration,
    sources: Sequence[Path],
    pending: Collection[str],
    problems: list[CryosiamDaskError],
) -> list[Path | None]:
    folder = configuration.mask_folder
    if folder is None:
        return [None] * len(sources)
    if not folder.is_dir() and not pending:
        problems.append(not_found("mask_folder", folder))
        return [None] * len(sources)
    masks = [folder / f"{s.name.removesuffix(configuration.file_extension)}_preds.h5" for s in sources]
    missing = [
        missing_mask(source, mask)
        for source, mask in zip(sources, masks, strict=True)
        if not mask.is_file() and mask.name.removesuffix("_preds.h5") not in pending
    ]
    if len(missing) == len(sources):  # otherwise only the tomograms without a mask fail
        problems += missing if len(missing) <= _FEW else [_without_masks(folder, masks[0], len(missing))]
    return list(masks)


_FEW = 3  # missing masks that are reported one by one


def _without_masks(folder: Path, first: Path, count: int) -> MaskError:
    return MaskError(
        "must hold a lamella mask for each tomogram",
        place=f"key mask_folder, {folder}",
        value=f"none of {count}, such as {first.name}",
        remedy="Run the lamella prediction first, or correct mask_folder",
    )


def missing_mask(source: Path, mask: Path) -> MaskError:
    return MaskError(
        f"there must be a lamella mask for {source.name}",
        place="key mask_folder",
        value=f"no file {mask}",
        remedy="Run the lamella prediction first, or leave it out with test_files",
    )


def not_readable(source: Path, mask: Path | None, error: OSError) -> CryosiamDaskError:
    of_mask = mask is not None and str(error.filename) == str(mask)
    return (MaskError if of_mask else TomogramError)(
        f"the {'lamella mask' if of_mask else 'tomogram'} must be readable",
        place=error.filename or source,
        value=error.strerror or error,
        remedy="Change its permissions, copy it again, or leave it out with test_files",
    )


def not_found(key: str, path: Path) -> ConfigurationError:
    rule = f"must be a folder, but {path} is not" if path.exists() else not_there(path)
    remedy = f"Run the lamella prediction first, or correct {key}" if key == "mask_folder" else f"Correct {key}"
    return ConfigurationError(rule, place=f"key {key}", remedy=remedy)


def check_prediction_folder(configuration: Configuration, problems: list[CryosiamDaskError]) -> None:
    for key in ("prediction_folder", "work_folder"):
        path = getattr(configuration, key)
        if path is None:
            continue
        existing = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            what = "read-only" if existing.is_dir() else "a file" if existing.exists() else "a broken link"
            rule, value = "must be a folder that can be written or created", f"{path} ({existing} is {what})"
            remedy = f"Set {key} to another folder, change its permissions, or mount the disk"
            problems.append(OutputError(rule, place=f"key {key}", value=value, remedy=remedy))
