"""Report the state of every tomogram from the ledgers, during a run and after it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cryosiam_dask.config import Configuration, read_models
from cryosiam_dask.core.log import latest_log
from cryosiam_dask.files.claims import claim_path, process_is_gone
from cryosiam_dask.runs.find import find_sources, left_out_tomograms, refused_names, shown, unreadable_folder
from cryosiam_dask.runs.fingerprint import removal_of
from cryosiam_dask.runs.ledger import read_entries


@dataclass(frozen=True, slots=True)
class State:
    """The state of one tomogram with one model.

    Attributes
    ----------
    tomogram
        Name of the tomogram.
    stage
        Name of the model if the file has several, otherwise empty.
    state
        ``"done"``, ``"running"``, ``"stopped"`` (started, but no run works on it), ``"failed"`` or ``"left"`` (not
        started).
    blocks
        Number of finished blocks, if it is running or stopped.
    detail
        Why it failed, or which process works on it.
    seconds
        Duration in seconds; 0 if it has not ended.
    ended
        End in seconds since the epoch, by the clock of the run's machine; 0 if it has not ended.
    run
        Id of the run that recorded the outcome; empty without one.
    """

    tomogram: str
    stage: str
    state: str
    blocks: int = 0
    detail: str = ""
    seconds: float = 0.0
    ended: float = 0.0
    run: str = ""


def states(configuration: Configuration, stage: str = "") -> list[State]:
    """Return the state of every tomogram of a configuration.

    Parameters
    ----------
    configuration
        The YAML file.
    stage
        Name of the model if the file has several.

    Raises
    ------
    Problems
        If the tomograms cannot be found.
    """
    found, sources = [], find_sources(configuration)
    refused = refused_names(configuration, sources)
    for source in sources:
        stem = source.name.removesuffix(configuration.file_extension)
        if source in refused:
            found.append(State(shown(stem), stage, "failed", detail=str(refused[source])))
        else:
            found.append(_state(configuration, stem, stage))
    return found


def _state(configuration: Configuration, stem: str, stage: str) -> State:
    folder = configuration.prediction_folder
    entries, fault = read_entries(folder, stem)
    try:
        claim = claim_path(folder, stem).read_bytes()
        holder = json.loads(claim)
        who = f"process {int(holder['process'])} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        claim, who = b"", ""
    # Blocks recorded before the last entry "blocks" belong to other settings.
    first = max((i for i, entry in enumerate(entries) if entry["what"] == "blocks"), default=0)
    blocks = sum(entry["what"] == "block" for entry in entries[first:])
    if claim and not process_is_gone(claim):
        return State(stem, stage, "running", blocks, who)
    if fault:
        return State(stem, stage, "left", detail=f"its ledger {fault}")
    last = entries[-1] if entries else {"what": ""}
    if last["what"] == "outcome":
        state = str(last.get("status"))
        removed = configuration.denoises and removal_of(configuration, stem) is not None
        if state == "done" and not removed and not _output_exists(configuration, stem):
            return State(stem, stage, "left", detail="its output was removed")
        return State(
            stem, stage, state, detail=str(last.get("error", "")), seconds=float(last.get("seconds", 0)),
            ended=float(last.get("ended", 0)), run=str(last.get("run", "")),
        )  # fmt: skip
    if any(entry["what"] == "store" for entry in entries):
        return State(stem, stage, "stopped", blocks)
    return State(stem, stage, "done" if _output_exists(configuration, stem) else "left")


def _output_exists(configuration: Configuration, stem: str) -> bool:
    folder = configuration.prediction_folder
    names = (f"{stem}_preds.h5", f"{stem}{configuration.file_extension.removesuffix('.gz')}", f"{stem}.mrc")
    return any((folder / name).exists() for name in names)


def seconds_left(found: Sequence[State]) -> float | None:
    """Estimate the time left in seconds from the tomograms that the latest run finished; ``None`` if there are none."""
    runs = sorted({state.run for state in found if state.state == "done" and state.run})
    if not runs:
        return None
    done = [state for state in found if state.run == runs[-1] and state.state == "done"]
    left = sum(state.state in ("left", "running", "stopped") for state in found)
    elapsed = max(state.ended for state in done) - min(state.ended - state.seconds for state in done)
    return elapsed / len(done) * left


def print_overview(config_file: Path, console: Console, *, model: str | None = None, as_json: bool = False) -> None:
    """Print the state of every tomogram.

    Parameters
    ----------
    config_file
        The YAML file of one model or of a pipeline.
    console
        Where to print.
    model
        The only model of a pipeline to report; ``None``: all.
    as_json
        Whether to print JSON instead of a table.
    """
    found, logs, notes = list[State](), list[Path](), list[str]()
    for stage, configuration in read_models(config_file, model).items():
        try:
            found += states(configuration, stage)
            log = latest_log(configuration.prediction_folder)
        except OSError as error:
            raise unreadable_folder("prediction_folder", configuration.prediction_folder, error) from None
        notes += [note for note in left_out_tomograms(configuration) if note not in notes]
        logs += [log] if log else []
    counts, left = Counter(state.state for state in found), seconds_left(found)
    if as_json:
        document: dict[str, Any] = {
            "counts": counts, "seconds_left": left, "tomograms": [asdict(state) for state in found],
            "logs": [str(log) for log in logs], "notes": notes,
        }  # fmt: skip
        console.file.write(json.dumps(document, indent=2) + "\n")
        return
    shown = [state for state in found if state.state != "done"]
    columns = {
        "tomogram": [escape(state.tomogram) for state in shown],
        "model": [state.stage for state in shown],
        "state": [state.state for state in shown],
        "blocks": [str(state.blocks or "") for state in shown],
        "detail": [escape(state.detail) for state in shown],
    }
    filled = {title: values for title, values in columns.items() if any(values)}
    table = Table(*filled)
    for row in zip(*filled.values(), strict=True):
        table.add_row(*row)
    if shown:
        wide = console if console.is_terminal else Console(emoji=False, file=console.file, width=160)
        wide.print(table)
    words = [f"{counts[state]} {state}" for state in ("done", "running", "stopped", "failed", "left") if counts[state]]
    line = ", ".join(words) or "no tomogram"
    if models := {state.stage for state in found if state.stage}:
        count = len({state.tomogram for state in found})
        line = f"{count} tomogram{'s' * (count != 1)}, {len(models)} model{'s' * (len(models) != 1)}: {line}"
    if left:
        days = f"{left // 86400:.0f} days and " if left >= 86400 else ""
        rest = time.strftime("%H:%M:%S", time.gmtime(left % 86400))
        line += f"; about {days}{rest} left at the pace of the latest run"
    # The logs only matter if something is not done.
    for text in (
        line,
        *(f"note: {note}" for note in notes),
        *(f"log of the latest run: {log}" for log in logs if shown),
    ):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
