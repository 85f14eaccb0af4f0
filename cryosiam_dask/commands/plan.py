"""Commands that change nothing: show what a run would do (``plan``) and what a file holds (``info``)."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

from cryosiam_dask.core.diagnosis import merged_warnings, percent
from cryosiam_dask.errors import CryosiamDaskError, Problems
from cryosiam_dask.files.folders import require_there
from cryosiam_dask.model.classes import are_images, shares

if TYPE_CHECKING:  # imported where they are used: the network's libraries take seconds
    from cryosiam_dask.commands.forecast import Disk, Forecast, TomogramForecast
    from cryosiam_dask.commands.info import Information, Part


def show_plan(
    config_file: Path,
    console: Console,
    *,
    model: str | None = None,
    filename: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    overwrite_all: bool = False,
    as_json: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trial: bool = False,
) -> int:
    """Print what a run would do and need; return its expected exit status.

    Parameters
    ----------
    config_file
        The YAML file of one model or of a pipeline.
    console
        Where to print.
    model
        The only model of a pipeline to plan for; ``None``: all.
    filename, overwrite, overwrite_all
        See `cryosiam_dask.runs.plan.plan_run`.
    workers
        Number of CPU workers; ``None``: as many as cores and memory allow.
    as_json
        Whether to print only JSON, including the problems.
    device
        Where the network will run; ``"cuda"`` needs a GPU here only for a trial.
    trial
        Whether to predict a few patches with each model, to estimate how long a run takes.

    Raises
    ------
    Problems
        All problems of the run and of the tomograms' headers; not with `as_json`.
    """
    from cryosiam_dask.commands.forecast import (
        USUALLY_AT_ONCE,
        Pace,
        PipelineForecast,
        forecast,
        forecast_pipeline,
        pace_of_runs,
        pace_of_trial,
        unreadable,
    )
    from cryosiam_dask.config import read_models
    from cryosiam_dask.core.machine import memory_of_machine
    from cryosiam_dask.runs.plan import RunPlan, masks_made_before, on_this_machine, plan_run, with_denoising

    problems: list[CryosiamDaskError] = []
    plans: list[RunPlan] = []
    paces: list[Pace | None] = []
    try:
        configurations = read_models(config_file, model)
        for name, configuration in configurations.items():
            pending = masks_made_before(plans, configuration, filename) if name != next(iter(configurations)) else set()
            automatic = configuration.parameters.data.patch_size == "auto"
            try:
                plans.append(
                    plan_run(
                        configuration, filename=filename, overwrite=overwrite,
                        overwrite_all=overwrite_all or automatic, name=name, pending_inputs=pending,
                    )
                )  # fmt: skip
            except CryosiamDaskError as error:
                problems += [*_single(error), *unreadable(configuration, filename)]
        if not problems:
            plans = with_denoising(plans)
            chosen: Literal["cpu", "cuda"] = "cuda" if device == "cuda" or (device == "auto" and _has_gpu()) else "cpu"
            if chosen == "cpu":
                plans, workers = on_this_machine(plans, workers)
            else:
                plans = [plan.with_shapes() for plan in plans]
            paces = [(pace_of_trial if trial else pace_of_runs)(plan, chosen, workers) for plan in plans]
    except CryosiamDaskError as error:
        problems += _single(error)
    if problems:
        problems = list({str(problem): problem for problem in problems}.values())  # models share their tomograms
        if not as_json:
            raise Problems(problems)
        _print_json(console, {"problems": [str(problem) for problem in problems]})
        return 2
    options: dict[str, Any] = {
        "workers": workers or 1,
        "concurrent": USUALLY_AT_ONCE,
        "memory_bytes": memory_of_machine(),
    }
    found: Forecast | PipelineForecast
    if len(plans) > 1:
        found = forecast_pipeline(plans, paces=paces, **options)
    else:
        found = forecast(plans[0], pace=paces[0], **options)
    if as_json:
        _print_json(console, found.as_json())
        return found.status
    if isinstance(found, PipelineForecast):
        _print_plan(console, found.stages, found.disks, found.seconds, found.warnings)
    else:
        _print_plan(console, {"": found}, found.disks, found.seconds)
    _print_problems(found.all_problems)
    return found.status


def _has_gpu() -> bool:
    """Whether the network would run on a GPU here; torch, which takes seconds, is only imported if there may be one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    from cryosiam_dask.model.predictor import resolve_device

    return resolve_device("auto") == "cuda"


def _single(error: CryosiamDaskError) -> Sequence[CryosiamDaskError]:
    return error.problems if isinstance(error, Problems) else (error,)


def show_files(paths: Sequence[Path], console: Console, *, as_json: bool = False) -> None:
    """Print what files hold, and continue after those that cannot be read.

    Parameters
    ----------
    paths
        See `cryosiam_dask.commands.info.inspect`.
    console
        Where to print.
    as_json
        Whether to print only JSON: an object, or a list of objects for several files.

    Raises
    ------
    Problems
        If files cannot be read, with the errors of all of them.
    """
    if len(paths) == 1:
        require_there(paths[0])  # checked before slow imports
    from cryosiam_dask.commands.info import inspect

    problems, values = list[CryosiamDaskError](), list[Any]()
    for number, path in enumerate(paths):
        try:
            found = inspect(path)
        except CryosiamDaskError as error:
            problems += _single(error)
            continue
        values.append(found.as_json())
        if not as_json:
            if number:
                console.print()
            _print_information(console, found)
    if as_json and values:
        _print_json(console, values if len(paths) > 1 else values[0])
    if problems:
        raise Problems(problems)


def _print_json(console: Console, values: Any) -> None:
    # Not with rich, which would wrap long lines.
    print(json.dumps(values, indent=2, allow_nan=False), file=console.file)


# ----------------------------------------------------------------------------------------------------------- forecasts


def _print_plan(
    console: Console,
    stages: Mapping[str, Forecast],
    disks: Sequence[Disk],
    seconds: float | None,
    warnings: Sequence[str] = (),
) -> None:
    """Print the forecasts of all models, with what they share only once; notes, warnings and outputs come last."""
    console = _unbroken(console)
    facts = {name: _facts(found) for name, found in stages.items()}
    shared = _in_common(facts.values())
    pace = next((found.pace for found in stages.values() if found.pace), "")
    if any(t.action == "segment" for found in stages.values() for t in found.tomograms):
        shared["time"] = (
            "unknown before the first run with this model on this kind of device; --trial estimates it"
            if seconds is None
            else f"about {_time(seconds)}, {pace}"
        )
    _print_facts(console, [*((name, value) for name, value in shared.items() if value), *_of_disks(disks)])
    own = [name for name in facts[next(iter(facts))] if name not in shared]
    if own:
        table = _table("", *stages)
        for name in own:
            table.add_row(name, *(escape(each.get(name, "")) for each in facts.values()))
        console.print(table)
    _print_tomograms(console, stages)
    notes = [(stage, f": {note}") for stage, found in stages.items() for note in found.notes]
    notes += [
        (stage, f", {stems}: {note}")
        for stage, found in stages.items()
        for stems, note in merged_warnings((t.stem, note) for t in found.tomograms for note in t.notes)
    ]
    for note, of in _each_once(notes, stages):
        _inform(console, f"note{of}{note}")
    found_warnings = [
        *((stage, f": {warning}") for stage, found in stages.items() for warning in found.warnings),
        *(
            (stage, f", {stems}: {warning}")
            for stage, found in stages.items()
            for stems, warning in merged_warnings(
                (t.stem, warning)
                for t in found.tomograms
                for warning in t.warnings
                if not warning.startswith(found.shared)
            )
        ),
    ]
    for sentence, of in [*_each_once(found_warnings, stages), *((f": {warning}", "") for warning in warnings)]:
        _inform(console, f"warning{of}{sentence}")
    for line in _outputs([t for found in stages.values() for t in found.tomograms]):
        _inform(console, line)


def _facts(found: Forecast) -> dict[str, str]:
    low, high = found.scaling
    classes = max(1, found.classes - 1)  # without the background, which models of several classes also predict
    todo = [t for t in found.tomograms if t.action == "segment"]
    masks = sorted({str(t.mask.path.parent) for t in found.tomograms if t.mask})
    return {
        "reads": "tomograms that this run denoises first"
        if todo and all(t.denoised_first for t in todo)
        else f"{decimal(sum(t.file_bytes for t in todo))} in "
        + ", ".join(sorted({str(t.source.parent) for t in found.tomograms})),
        "lamella": ""
        if found.denoises
        else "masks that this run makes first"
        if any(t.mask_to_come for t in todo)
        else f"masks in {', '.join(masks)}"
        if masks
        else "no masks"
        if todo
        else "",
        "model": f"{found.model}, "
        + ("a denoiser" if found.denoises else f"{classes} {'classes' if classes > 1 else 'class'}"),
        "patch": f"{_shape(found.patch)} voxels, halo {found.halo or 'a quarter of the patch'}, {found.precision}",
        "threshold": "" if found.denoises else f"{found.threshold:g}",
        "intensities": "the 0.1 and 99.9 percentiles of each tomogram become 0 and 1"
        if found.denoises
        else f"{low:g} to {high:g} become 0 to 1" + (", inverted" if low > high else ""),
        "tomograms": ", ".join(
            f"{sum(t.action == action for t in found.tomograms)} {words}"
            for action, words in _ACTIONS.items()
            if any(t.action == action for t in found.tomograms)
        ),
        "patches to compute": f"{sum(t.patches for t in todo):,} at most",
        "memory on CPUs": f"{decimal(found.bytes_per_worker)} for each of {found.workers} "
        f"worker{'s' * (found.workers != 1)}"
        + (f"; this machine has {decimal(found.memory_bytes)}" if found.memory_bytes is not None else ""),
        "memory on GPUs": f"{decimal(found.network_bytes)} on the GPU for each of {found.batch_size} patches, "
        f"{decimal(found.block_bytes * 3 // 2)} of main memory",
    }


def _in_common(each: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the entries that all mappings share."""
    first, *others = each
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _each_once(sentences: Iterable[tuple[str, str]], stages: Collection[str]) -> list[tuple[str, str]]:
    """List each sentence once, with the name of its model unless all models share it."""
    by: dict[str, list[str]] = {}
    for stage, sentence in sentences:
        by.setdefault(sentence, []).append(stage)
    return [(sentence, "" if len(set(of)) == len(stages) else f", {of[0]}") for sentence, of in by.items()]


#: Up to this many tomograms are listed one by one, with all values and outputs of each.
_LISTED = 20


def _outputs(tomograms: Sequence[TomogramForecast]) -> list[str]:
    """List the files that will be written or are up to date; with many tomograms, list patterns of names."""
    lines: dict[str, int] = {}
    many = len({t.stem for t in tomograms}) > _LISTED
    for t in tomograms:
        files = [*t.outputs, *([t.preview] if t.preview else [])]
        line = ""
        if t.action in ("segment", "measure"):
            line = f"writes, {t.stem}: {', '.join(map(str, files))}" + (f" ({t.reason})" if t.reason else "")
        elif t.action == "skip":
            line = f"skipped, {t.stem}: {t.outputs[0]} was {t.reason}"
        if line:
            line = line.replace(t.stem, "<name>") if many else line
            lines[line] = lines.get(line, 0) + 1
    return [f"{line} ({count} tomograms)" if many else line for line, count in lines.items()]


def _time(seconds: float) -> str:
    """Format seconds in readable units."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def _of_disks(disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [
        (
            f"disk of {' and '.join(map(str, disk.folders))}",
            f"up to {decimal(disk.needed_bytes)} needed, {decimal(disk.free_bytes)} free",
        )
        for disk in disks
    ]


def _print_problems(problems: Sequence[str]) -> None:
    errors = Console(emoji=False, stderr=True)
    for problem in problems:
        _inform(errors, f"error: {problem}")


_ACTIONS = {"segment": "to segment", "measure": "to measure", "skip": "skipped", "refuse": "refused"}


def _print_tomograms(console: Console, stages: Mapping[str, Forecast]) -> None:
    """Print the tomograms as a table or, if it is too wide, one below the other.

    Values that all models share are printed once, as are those that many tomograms share.
    """
    axes = "y, x" if are_images(t.shape for found in stages.values() for t in found.tomograms) else "z, y, x"
    by_stage = {
        stage: {t.stem: _row(t, axes, found.denoises) for t in found.tomograms} for stage, found in stages.items()
    }
    stems = list(dict.fromkeys(stem for rows in by_stage.values() for stem in rows))
    names = list(next(iter(next(iter(by_stage.values())).values())))
    several = [
        name
        for name in names
        if any(len({rows.get(stem, {}).get(name, "") for rows in by_stage.values()}) > 1 for stem in stems)
    ]
    rows = []
    for stem in stems:
        row = {}
        for name in names:
            for stage, each in by_stage.items():
                row[f"{name}, {stage}" if name in several else name] = each.get(stem, {}).get(name, "")
        rows.append(row)
    shared = _in_common(rows) if len(rows) > _LISTED else {}
    if any(shared.values()):
        _print_facts(console, [("all tomograms", ""), *((name, value) for name, value in shared.items() if value)])
    used = [name for name in rows[0] if name not in shared and any(row[name] for row in rows)]
    table = _table(*used)
    for row in rows:
        table.add_row(*(escape(row[name]) for name in used))
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= 1.2 * console.width:
        console.print(table)
    else:
        for row in rows:
            _print_facts(console, [(name, row[name]) for name in used if row[name]])


def _row(t: TomogramForecast, axes: str, denoises: bool) -> dict[str, str]:
    central = t.intensities.central if t.intensities else None
    row = {
        "tomogram": t.stem,
        "action": _ACTIONS[t.action],
        f"shape ({axes})": _shape(t.shape),
        "voxel size (Å)": _voxel_size(t.voxel_size_angstrom) if t.shape else "",
        "central 99 %": "" if central is None else f"{central[0]:.4g} to {central[1]:.4g}",
        "contrast": (t.intensities and t.intensities.contrast) or "",
        "clipped below, above": "",
        "blocks": f"{t.blocks} (≤ {_shape(t.block_shape)})" if t.blocks else "",
        "in the mask": "",
        "ruled out": "",
        "outputs": decimal(t.output_bytes) if t.output_bytes else "",
        "work": decimal(t.work_bytes) if t.work_bytes else "",
    }
    if t.intensities is not None and not denoises:
        row["clipped below, above"] = f"{percent(t.intensities.below)}, {percent(t.intensities.above)}"
    if t.mask_to_come:
        row["in the mask"] = "made first"
    if t.mask is not None:
        about = "" if t.mask.exact else "about "
        row["in the mask"] = about + percent(t.mask.coverage)
        row["ruled out"] = f"{about}{t.mask.blocks_ruled_out}"
    return row


# --------------------------------------------------------------------------------------------------------------- files


def _print_information(console: Console, found: Information) -> None:
    console = _unbroken(console)
    _inform(console, f"{found.path}: {found.kind}")
    _print_facts(console, list(_flat(found.facts)))
    if found.parts:
        _print_parts(console, found.parts, found.facts)
    for note in found.notes:
        _inform(console, f"note: {note}")
    for warning in found.warnings:
        _inform(console, f"warning: {warning}")


def _print_parts(console: Console, parts: Sequence[Part], facts: Mapping[str, Any]) -> None:
    names, inside = facts.get("class_names"), facts.get("lamella_voxels")
    names, inside = names if isinstance(names, list) else (), inside if isinstance(inside, int) else None
    columns = {
        "dataset": [part.name for part in parts],
        "shape": [_shape(part.shape) or "one value" for part in parts],
        "dtype": [part.dtype for part in parts],
        "chunks": [_shape(part.chunks) for part in parts],
        "compression": [part.compression for part in parts],
        "stored": ["" if part.stored_bytes is None else decimal(part.stored_bytes) for part in parts],
        "voxels of each class": ["\n".join(shares(part.voxels, names, part.shape, inside)) for part in parts],
    }
    filled = {name: values for name, values in columns.items() if any(values)}
    table = _table(*filled)
    for row in zip(*filled.values(), strict=True):
        table.add_row(*map(escape, row))
    console.print(table)


#: Labels of facts; for others, underscores are replaced.
_WORDS = {
    "voxel_size_angstrom": "voxel size (Å)",
    "origin_angstrom": "origin (Å)",
    "nstart": "start (voxels)",
    "central_99_percent": "central 99 % of intensities",
    "sha256": "SHA-256",
    "checkpoint_sha256": "checkpoint SHA-256",
    "ngff_version": "NGFF version",
    "classes": "output channels",
}


def _flat(facts: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the facts as rows of a table, lower levels indented."""
    for name, value in facts.items():
        # Names below the first level are keys of a configuration, and are not changed.
        title = f"{'  ' * depth}{name if depth else _WORDS.get(name, name.replace('_', ' '))}"
        if isinstance(value, Mapping) and value:
            yield title, ""
            yield from _flat(value, depth + 1)
        else:
            yield title, _text(name, value)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "unknown" if name in ("", "voxel_size_angstrom", "contrast") else "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value:,} ({decimal(value)})"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "none"
    if isinstance(value, list | tuple):
        if name in ("shape", "patch_size") and all(isinstance(item, int) for item in value):
            return _shape(value)
        return ", ".join(_text("", item) for item in value) or "none"
    return str(value)


# --------------------------------------------------------------------------------------------------------------- words


def _print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    if not facts:
        return  # an empty table would be as wide as the console
    table = _table("", "")
    table.show_header = False
    for name, value in facts:
        table.add_row(escape(name), escape(value))
    console.print(table)


def _table(*headings: str) -> Table:
    """Make a table that folds long values and omits nothing."""
    return Table(*(Column(heading, overflow="fold") for heading in headings))


def _unbroken(console: Console) -> Console:
    """Return a console that does not wrap lines unless it is a terminal, so that scripts find every value whole."""
    return console if console.is_terminal else Console(emoji=False, file=console.file, width=10_000)


def _inform(console: Console, message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _voxel_size(sizes: Sequence[float | None]) -> str:
    texts = ["unknown" if size is None else f"{size:.4g}" for size in sizes]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)
