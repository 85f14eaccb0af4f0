"""Fingerprints show whether an output was made from the same input with the same settings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryosiam_dask.config import Configuration
from cryosiam_dask.errors import OutputError, TomogramError, is_transient
from cryosiam_dask.model.classes import named
from cryosiam_dask.runs.ledger import read_entries

# Imported where it is used, because it takes seconds and wrong paths should be reported immediately.
if TYPE_CHECKING:
    from cryosiam_dask.model.checkpoint import Checkpoint


#: Increase this whenever a change of the code changes results, so that earlier outputs do not count as done.
NUMBERS_VERSION = 2


def settings_of(
    configuration: Configuration, checkpoint: Checkpoint, patch: tuple[int, ...], threshold: float
) -> dict[str, Any]:
    """Return everything that an output depends on, except its input."""
    network, data = configuration.parameters.network, configuration.parameters.data
    common = {
        "numbers_version": NUMBERS_VERSION,
        "checkpoint_sha256": checkpoint.sha256,
        "patch_size": list(patch),
        "halo": data.halo,
        "precision": configuration.hyper_parameters.precision,
        "scaling": [data.min, data.max, data.mean, data.std],
        # Only if set, so that earlier outputs remain valid.
        **{name: value for name, value in configuration.reading.items() if value or value is False},
    }
    if configuration.denoises:
        return common | {
            "invert": data.invert is not False,
            "scale_prediction": configuration.scale_prediction,
            "save_raw_predictions": configuration.save_raw_predictions,
        }
    return common | {
        "threshold": threshold,
        "hull": ("volume" if network.hull_3d else "slices") if network.postprocessing else None,
        "save_internal_files": configuration.save_internal_files,
        **({"invert": True} if data.invert else {}),
    }


def removal_sizes(configuration: Configuration) -> list[int]:
    """Return ``postprocessing_sizes`` without trailing entries that have no effect."""
    sizes = list(configuration.parameters.network.postprocessing_sizes or ())
    while sizes and sizes[-1] == -1:
        sizes.pop()
    return sizes


def known_identity(configuration: Configuration, source: Path, stem: str) -> list[Any]:
    """Return the identity of a tomogram's file: the recorded one if only the file's times have changed since then.

    Parameters
    ----------
    configuration
        The configuration whose ``prediction_folder`` holds the record.
    source, stem
        The tomogram and its name.
    """
    from cryosiam_dask.files.identity import is_newer_in_part, source_content, source_identity

    made = _made_here(source)
    if made or not source.exists():
        removed = removal_of(configuration.denoiser, stem)
        if removed and made in (None, removed["fingerprint"]):
            return list(removed["identity"])
    if made:
        return [made, source_content(source)]
    identity = source_identity(source)
    entries, _ = read_entries(configuration.prediction_folder, stem)
    found = next((entry for entry in reversed(entries) if entry["what"] == "source"), None)
    if (
        found
        and found["identity"] != identity
        and not is_newer_in_part(source, found.get("newest", 0))
        and found["content"] == source_content(source)
    ):
        return list(found["identity"])
    return identity


def removal_of(denoiser: Configuration | None, stem: str) -> dict[str, Any] | None:
    """Return what is known of a denoised tomogram that was removed; ``None`` if it was not removed or is to be kept.

    Returns
    -------
    dict or None
        Its ``fingerprint``, its ``identity`` for the models that read it, and its ``voxel_size_angstrom``.
    """
    if denoiser is None or denoiser.keep_denoised:
        return None
    entries, _ = read_entries(denoiser.prediction_folder, stem)
    return next((entry for entry in reversed(entries) if entry["what"] == "removed"), None)


def _made_here(source: Path) -> str | None:
    """Return the fingerprint of a tomogram that this program denoised, which a repeated run gives it again."""
    from cryosiam_dask.core.endings import MRC_ENDINGS
    from cryosiam_dask.stages.export import read_mrc_fingerprint

    return read_mrc_fingerprint(source) if source.suffix in MRC_ENDINGS and source.is_file() else None


def fingerprint_of(
    configuration: Configuration, source: Path, stem: str, mask: Path | None, settings: Mapping[str, Any]
) -> str:
    from cryosiam_dask.files.tomogram import read_header

    files = [known_identity(configuration, source, stem), _mask_identity(mask) if mask else None]
    decided = ""
    if not source.is_dir():
        try:
            decided = read_header(source, **configuration.reading).decided
        except TomogramError as error:  # this tomogram alone will fail later
            if is_transient(error) and isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
    # Only if set, so that earlier outputs remain valid.
    settings = {**settings, **({"decided": decided} if decided else {})}
    return hashlib.sha256(json.dumps([files, settings], sort_keys=True).encode()).hexdigest()


def made_otherwise(output: Path) -> OutputError:
    if output.exists() and not os.access(output, os.R_OK):
        return OutputError(
            "an existing output must be readable",
            place=output,
            value=os.strerror(errno.EACCES),
            remedy="Change its permissions, or set another prediction_folder",
        )
    return OutputError(
        "this output was made from another input or checkpoint, or with other settings",
        place=output,
        remedy="Replace it with --overwrite, or set another prediction_folder",
    )


def identity_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _mask_identity(path: Path) -> list[Any]:
    """Identify a mask by its content, which is small, and the same if the mask is made again."""
    with path.open("rb") as file:
        return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]


def read_fingerprint(output: Path) -> str | None:
    """Return the fingerprint of an output; ``None`` if another program wrote it or it cannot be read."""
    from cryosiam_dask.files.hdf5 import read_attributes
    from cryosiam_dask.stages.export import read_mrc_fingerprint

    try:
        if output.suffix == ".h5":
            return read_attributes(output).get("fingerprint")
        return read_mrc_fingerprint(output)
    except OutputError:
        return None


def components_done(path: Path | None, fingerprint: str, names: Sequence[str]) -> bool:
    """Whether a tomogram's components, if wanted, belong to its output and have the right class names.

    Parameters
    ----------
    path
        HDF5 file of the components; ``None`` if they are not wanted.
    fingerprint
        Fingerprint of the output.
    names
        Names of the labels from 1 on.
    """
    from cryosiam_dask.files.hdf5 import read_attributes

    if path is None:
        return True
    tables = [path.with_suffix(ending) for ending in (".csv", ".parquet")]
    if not all(table.is_file() for table in tables) or read_fingerprint(path) != fingerprint:
        return False
    return named(read_attributes(path).get("class_names"), len(names)) == tuple(names)


def with_sizes(prediction_fingerprint: str, sizes: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([prediction_fingerprint, list(sizes)]).encode()).hexdigest()
