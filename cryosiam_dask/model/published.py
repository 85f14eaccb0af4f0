"""CryoSiam's published models: what is known about them, and how to download one by its name.

`trained_model` of a configuration is a path, the name of a published model, or ``hf://owner/repository/file`` for a
file on the Hugging Face Hub. `huggingface_hub` downloads the latter two once to its cache. They are never executed:
`cryosiam_dask.model.checkpoint` reads them like every other checkpoint.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cryosiam_dask.errors import CheckpointError

REPOSITORY = "frosinastojanovska/cryosiam_v1.0"
_SCHEME = "hf://"
_URI = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+?))?/(?P<file>[^/@].*)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository of the Hugging Face Hub.

    Attributes
    ----------
    repository
        ``owner/repository``.
    file
        Path in the repository.
    revision
        Branch, tag or commit.
    """

    repository: str
    file: str
    revision: str = "main"

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        return self.file.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Address from which a browser downloads the file."""
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.repository}/resolve/{self.revision}/{self.file}"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{_SCHEME}{self.repository}{revision}/{self.file}"


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """What CryoSiam's documentation says about one of its models; ``None`` for values that it does not give.

    Attributes
    ----------
    file
        File in `REPOSITORY`.
    task
        Kind of model.
    about
        Purpose, as a sentence.
    class_names
        Names of the labels from 1 on.
    patch
        Patch of the training, (z, y, x) in voxels.
    scaling
        Intensities that become 0 and 1.
    contrast
        Expected contrast of dense matter.
    voxel_size_angstrom
        Approximate voxel size of the tomograms that the model was made for, in Å.
    """

    file: str
    task: Literal["denoising", "lamella", "semantic"]
    about: str
    class_names: tuple[str, ...] | None = None
    patch: tuple[int, int, int] = (128, 128, 128)
    scaling: tuple[float, float] = (0.0, 1.0)
    contrast: Literal["bright on dark", "dark on bright"] = "bright on dark"
    voxel_size_angstrom: float = 6.8

    @property
    def source(self) -> HubFile:
        """File on the Hugging Face Hub."""
        return HubFile(REPOSITORY, self.file)


#: CryoSiam's published models by the names of their files. Sources: CryoSiam's pages "Trained models", "Semantic
#: segmentation", "Semantic segmentation training" (range and contrast) and "Particle identification" with their example
#: files (patch), and its notebook for denoising (voxel size). The pages list the classes of the semantic model in two
#: different orders, and do not list those of the particle model, so these labels have no names here.
PUBLISHED: Mapping[str, PublishedModel] = {
    "cryosiam_denoising": PublishedModel(
        "cryosiam_denoising.ckpt",
        "denoising",
        "Denoises tomograms reconstructed by weighted back-projection, with 'denoise-predict'.",
        contrast="dark on bright",
    ),
    "cryosiam_lamella": PublishedModel(
        "cryosiam_lamella.ckpt", "lamella", "Finds the lamella.", class_names=("lamella",)
    ),
    "cryosiam_semantic_segmentation": PublishedModel(
        "cryosiam_semantic_segmentation.ckpt",
        "semantic",
        "Membranes, particles, filaments (DNA, RNA), microtubules and actin.",
    ),
    "cryosiam_ribosome_segmentation": PublishedModel("cryosiam_ribosome_segmentation.ckpt", "semantic", "Ribosomes."),
    "cryosiam_semantic_myco_candidates": PublishedModel(
        "cryosiam_semantic_myco_candidates.ckpt",
        "semantic",
        "Candidates of 13 complexes, whose centres semantic-to-centers lists.",
    ),
}


def find(name: str) -> PublishedModel:
    """Return the published model with this name.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    near = nearest(name)
    remedy = f"Did you mean {near}?" if near else f"The published models are {', '.join(PUBLISHED)}"
    raise CheckpointError("no published model has this name", place=name, remedy=remedy)


def parse(text: str) -> Path | HubFile:
    """Interpret the value of ``trained_model``.

    Parameters
    ----------
    text
        A path, the name of a published model, or ``hf://owner/repository[@revision]/file``. An existing path takes
        precedence.

    Raises
    ------
    ValueError
        If it is an invalid address of the Hub, or a word that is almost the name of a published model.

    Examples
    --------
    >>> str(parse("cryosiam_lamella"))
    'hf://frosinastojanovska/cryosiam_v1.0/cryosiam_lamella.ckpt'
    """
    if text.lower().startswith(_SCHEME):
        found = _URI.fullmatch(_SCHEME + text[len(_SCHEME) :])
        if not found or ".." in found["file"].split("/"):
            raise ValueError("must be written hf://owner/repository/file")
        return HubFile(found["repository"], found["file"], found["revision"] or "main")
    path = Path(text)
    if not re.fullmatch(r"[\w-]+", text) or path.exists():
        return path
    if text in PUBLISHED:
        return PUBLISHED[text].source
    if (name := nearest(text)) is not None:
        raise ValueError(f"must be a file, or the name of a published model, such as {name}")
    return path


def nearest(name: str) -> str | None:
    """Return the published model whose name is closest to `name`, which may be a path; ``None`` if none is similar."""
    found = difflib.get_close_matches(Path(name).name.lower().removesuffix(".ckpt"), PUBLISHED, 1, 0.7)
    return found[0] if found else None


def cached(source: HubFile) -> Path | None:
    """Return the path of a file in the cache; ``None`` if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repository, source.file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def fetch(source: HubFile) -> Path:
    """Download a file from the Hub, unless it is in the cache.

    Returns
    -------
    Path
        The complete file in the cache.

    Raises
    ------
    CheckpointError
        If the file does not exist, or cannot be downloaded or stored.
    """
    if (found := cached(source)) is not None:
        return found
    import huggingface_hub
    from huggingface_hub import constants, errors

    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()  # they would fill a log with lines
    by_hand = (
        f"Download it elsewhere from {source.url}, copy it to a folder that this machine reads, and set trained_model "
        "to its path"
    )
    try:
        # Without a network this fails immediately, whereas the download would retry for minutes.
        metadata = huggingface_hub.get_hf_file_metadata(source.url)
        path = Path(huggingface_hub.hf_hub_download(source.repository, source.file, revision=source.revision))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        what = "file" if isinstance(error, errors.EntryNotFoundError) else "repository or revision"
        raise CheckpointError(
            f"the Hugging Face Hub must have this {what}, and let you read it", place=source,
            remedy="Check its spelling; log in with 'hf auth login' if it is private",
        ) from None  # fmt: skip
    except errors.OfflineModeIsEnabled:
        raise CheckpointError(
            "the model must be in the cache while HF_HUB_OFFLINE is set",
            place=source,
            value=f"nothing in {constants.HF_HUB_CACHE}",
            remedy=f"Unset HF_HUB_OFFLINE, or: {by_hand[0].lower()}{by_hand[1:]}",
        ) from None
    except Exception as error:
        # The libraries raise errors of many types for problems of the disk, the network or the server.
        of_disk = isinstance(error, OSError) and error.errno is not None and error.filename is not None
        raise CheckpointError(
            f"the model's file must fit into the cache {constants.HF_HUB_CACHE}" if of_disk
            else "the model's file must be downloaded completely from the Hugging Face Hub",
            place=source,
            value=error.strerror if of_disk and isinstance(error, OSError) else _first_line(error),
            remedy="Set HF_HOME to a writable folder with enough space" if of_disk else by_hand,
        ) from None  # fmt: skip
    _verify(path, metadata.etag or "", source)
    return path


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _verify(path: Path, etag: str, source: HubFile) -> None:
    """Compare a downloaded file with the SHA-256 hash that the Hub keeps for each large file."""
    if not _SHA256.fullmatch(etag):
        return  # a small file, for which the Hub keeps only Git's hash
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != etag:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise CheckpointError(
            "the model's file must be the one that the Hugging Face Hub describes",
            place=source,
            value=f"SHA-256 {found} instead of {etag}",
            remedy="It was removed from the cache; try again",
        )


def locate(model: Path | HubFile) -> Path:
    """Return the path of a checkpoint, downloading it if necessary.

    Raises
    ------
    CheckpointError
        See `fetch`.
    """
    return fetch(model) if isinstance(model, HubFile) else model


def describe(name: str) -> dict[str, Any]:
    """Return what is known about a published model as plain values; ``None`` where CryoSiam's pages say nothing.

    Returns
    -------
    dict
        The attributes of `PublishedModel`, `name`, `source` (for ``trained_model``), `url`, and `path` in the cache.
    """
    model = find(name)
    where = {"source": str(model.source), "url": model.source.url, "path": cached(model.source)}
    return {"name": name, **asdict(model), **where}


def in_words(name: str) -> str:
    """Return what is known about a published model as lines of text."""
    about = describe(name)
    names, voxels = about["class_names"], " × ".join(map(str, about["patch"]))
    lines = [f"{about['task']}: {about['about']}"]
    made_for = f"voxels of about {about['voxel_size_angstrom']:g} Å, {about['contrast']}"
    if about["task"] != "denoising":
        lines.append(f"classes: {', '.join(names) if names else 'CryoSiam does not document which label is which'}")
        made_for += ", intensities {:g} to {:g}".format(*about["scaling"])
    lines += [
        f"made for: {made_for}; patches of {voxels} voxels",
        f"in the cache: {about['path'] or 'no'}",
        f"download: {about['url']}",
    ]
    return "\n".join((name, *(f"    {line}" for line in lines)))
