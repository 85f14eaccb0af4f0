"""The command line: parse arguments, call functions, print results. No work happens here.

Every command and option also has CryoSiam's spelling with underscores (``semantic_predict --config_file=…``). Exit
status: 0 all done, 1 some tomograms failed and the others are done, 2 wrong usage or configuration, 70 an internal
error, 75 stopped by a signal (the same command resumes), 130 interrupted.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from cryosiam_dask._version import __version__
from cryosiam_dask.errors import ClusterError, CryosiamDaskError, DiskError

if TYPE_CHECKING:
    from cryosiam_dask.runs.outcome import Outcome

#: CryoSiam's commands that have a different name here.
_RENAMED = {"semantic-postprocessing": "semantic-postprocess"}
#: Alternatives to the commands of CryoSiam and its viewer that do not exist here, by the beginning of their names.
_MISSING = {
    "lamella": "'cryosiam-dask semantic-predict' also accepts the YAML file of a lamella model",
    "instance": "'cryosiam-dask components' numbers the connected components of a semantic segmentation; for instance "
    "models use 'cryosiam {name}'",
    "simsiam": "for embeddings use 'cryosiam {name}'",
    "semantic-filter": "for training use 'cryosiam {name}'",
    "semantic-train": "for training use 'cryosiam {name}'",
    "processing": "prepare files with 'cryosiam {name}'",
    "visualize": "'cryosiam_vis {name}' opens these predictions with the same YAML file; report.html shows all "
    "tomograms",
}


class _Commands(TyperGroup):
    """Also accepts the names of CryoSiam's commands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """See `click.Group`; help texts are not truncated."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, (each.help or "").partition("\n\n")[0]) for name, each in self.commands.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See `click.Group`."""
        name = args[0].lower().replace("_", "-")
        name = _RENAMED.get(name, name)
        if name in self.commands:
            return super().resolve_command(ctx, [name, *args[1:]])
        for beginning, instead in _MISSING.items():
            if name.startswith(beginning):
                name = name.replace("-", "_")
                _complain(f"error: cryosiam-dask has no command {name}: {instead.format(name=name)}.")
                raise typer.Exit(2)
        return super().resolve_command(ctx, args)


class Configured(TyperCommand):
    """A command whose first word may be its configuration file, without ``--config-file``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command`."""
        given, words, _ = self.make_parser(ctx).parse_args(args=list(args))
        if len(words) == 1 and "config_file" not in given:
            args, ctx.allow_extra_args = [f"--config-file={words[0]}", *args], True
        elif words and not ctx.resilient_parsing:
            ctx.fail(f"takes one configuration file; also found {' '.join(words['config_file' not in given :])}")
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """See `click.Command`."""
        return [*super().collect_usage_pieces(ctx), "CONFIG_FILE"]


app = typer.Typer(
    name="cryosiam-dask",
    cls=_Commands,
    help="Segment cryo-electron tomograms with CryoSiam's models: lamella, then membranes, particles and filaments.",
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half as long on a terminal of 80 columns, and faster
)


#: EX_TEMPFAIL of sysexits.h; batch systems can be configured to requeue a job with this status.
TEMPORARY = 75
#: EX_SOFTWARE of sysexits.h: an internal error of this program.
_SOFTWARE = 70


def _numbers(kind: type[int] | type[float], least: float, most: float = math.inf) -> dict[str, Any]:
    """Return arguments of `typer.Option` for numbers from `least` to `most`."""
    limits = f"≥ {least}" if most == math.inf else f"{least} to {most}"

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(least - 1)
        if not least <= number <= most or number == math.inf:
            rule = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
            raise typer.BadParameter(f"must be a {'whole ' * (kind is int)}number {rule}; found {text}")
        return number

    return {"parser": parse, "metavar": f"<{kind.__name__} {limits}>"}


def _choices(kind: type[StrEnum]) -> dict[str, Any]:
    """Return arguments of `typer.Option` for the values of an enumeration."""
    values = [each.value for each in kind]

    def parse(text: str) -> StrEnum:
        try:
            return kind(text.replace("_", "-"))
        except ValueError:
            rule = f"must be {', '.join(values[:-1])} or {values[-1]}"
            raise typer.BadParameter(f"{rule}; found {text}. Choose one of them") from None

    return {"parser": parse, "metavar": f"[{'|'.join(values)}]", "autocompletion": lambda: values}


class ListForm(StrEnum):
    """Format of the particle lists."""

    relion = "relion"
    cryosiam = "cryosiam"


class Device(StrEnum):
    """Device that the network runs on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Format(StrEnum):
    """Formats of labels other than HDF5."""

    ome_zarr = "ome-zarr"
    mrc = "mrc"


ConfigFile = Annotated[
    Path,
    typer.Option(
        help="YAML file of one model, such as CryoSiam's, or of a pipeline, such as configs/pipeline.yaml; the name of "
        "this option may be omitted."
    ),
]
#: For commands that use one model.
Model = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which model of a pipeline: denoise, lamella or semantic. Default: the last."),
]
#: For commands that use all models.
OnlyModel = Annotated[str | None, typer.Option(metavar="NAME", help="Use only this model of a pipeline. Default: all.")]
Filename = Annotated[str | None, typer.Option(help="Name of a single tomogram in data_folder.")]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Number of worker processes. Default: one for each GPU, or as many as cores and memory allow.",
        **_numbers(int, 1),
    ),
]
DeviceOption = Annotated[
    Device, typer.Option(help="Device for the network; auto uses GPUs if there are any.", **_choices(Device))
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
OutcomesAsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the outcome of each tomogram as JSON, and everything else to standard error."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and failures.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print what the log contains: versions, settings, tracebacks.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace outputs made from other inputs or settings; keep those that are up to date."
    ),
]
OverwriteAll = Annotated[
    bool, typer.Option("--overwrite-all", help="Make all outputs again, even those that are up to date.")
]
Dashboard = Annotated[
    str,
    typer.Option(help="Address of the Dask dashboard. Anyone who can reach it can watch the run, so keep it local."),
]
Timeline = Annotated[
    bool,
    typer.Option("--timeline", help="Draw <stem>_timeline.png: when each worker read, computed and wrote each block."),
]
Scheduler = Annotated[str | None, typer.Option(help="Use the workers of a running Dask scheduler, tcp://… or tls://….")]
SchedulerFile = Annotated[
    Path | None,
    typer.Option(help="Like --scheduler, with the file that 'dask scheduler --scheduler-file' wrote."),
]
Slurm = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Submit the workers as Slurm jobs, described by this YAML file or this section of Dask's jobqueue "
        "configuration.",
    ),
]
WorkerTimeout = Annotated[
    float | None,
    typer.Option(
        help="Minutes to wait for workers. Default: 2 with --scheduler, and 60 for the first one with --slurm.",
        **_numbers(float, 0),
    ),
]
CpuWorkers = Annotated[
    int | None,
    typer.Option(
        help="Number of additional worker processes without a GPU, for the tasks that need none. "
        "Default: one for each remaining core, if half of the memory allows.",
        **_numbers(int, 0),
    ),
]
PerformanceReport = Annotated[Path | None, typer.Option(help="Write Dask's performance report to this HTML file.")]


def _of_run(
    config_file: ConfigFile,
    model: OnlyModel = None,
    filename: Filename = None,
    device: DeviceOption = Device.auto,
    workers: Workers = None,
    cpu_workers: CpuWorkers = None,
    overwrite: Overwrite = False,
    overwrite_all: OverwriteAll = False,
    dashboard_address: Dashboard = "127.0.0.1:8787",
    timeline: Timeline = False,
    scheduler: Scheduler = None,
    scheduler_file: SchedulerFile = None,
    slurm: Slurm = None,
    worker_timeout: WorkerTimeout = None,
    performance_report: PerformanceReport = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: OutcomesAsJson = False,
) -> None:
    """Declare the options of the commands that run models."""


def _of_predictions(
    config_file: ConfigFile,
    model: Model = None,
    filename: Filename = None,
    workers: Workers = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: OutcomesAsJson = False,
) -> None:
    """Declare the options of the commands on existing predictions; a command's own options precede ``--workers``."""


def _options(declared: Callable[..., None], **others: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a declaration; it receives their values as keyword arguments.

    `others` replace declared annotations; ``None`` leaves an option out.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        *own, _ = signature(command, eval_str=True).parameters.values()
        shared = [
            each.replace(annotation=others.get(name, each.annotation))
            for name, each in signature(declared, eval_str=True).parameters.items()
            if others.get(name, each) is not None
        ]
        where = [each.name for each in shared].index("workers")
        command.__signature__ = Signature([*shared[:where], *own, *shared[where:]])  # type: ignore[attr-defined]
        return command

    return add


@app.command(cls=Configured)
@_options(_of_run, model=None)
def denoise_predict(**options: Any) -> None:
    """Denoise every raw tomogram: the first step before lamella and semantic segmentation.

    Example: cryosiam-dask denoise-predict --config-file configs/config_denoising.yaml
    """
    _segment("denoise", **options)


@app.command(cls=Configured)
@_options(_of_run, model=Model)
def semantic_predict(**options: Any) -> None:
    """Predict the lamella or the semantic classes of every tomogram with one model (the last one of a pipeline).

    Example: cryosiam-dask semantic-predict --config-file configs/config_lamella.yaml
    """
    _segment("segment", **options)


@app.command(cls=Configured)
@_options(_of_run)
def run(**options: Any) -> None:
    """Run all models of a file: denoise every tomogram, predict its lamella and, inside it, the semantic classes.

    Example: cryosiam-dask run configs/pipeline.yaml
    """
    _segment("all", **options)


def _segment(
    which: Literal["denoise", "segment", "all"],
    config_file: Path,
    device: Device,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    model: str | None = None,
    **options: Any,
) -> None:
    with _plain_errors(drains=True) as stop:
        # Slow imports come after the checks for typing errors.
        from cryosiam_dask.config import read_denoiser, read_model, read_models
        from cryosiam_dask.runs.find import require_paths

        console = _console(quiet, verbose, as_json)
        warned: list[str] = []
        try:
            if which == "all":
                models = read_models(config_file, model)
            elif which == "segment":
                models = {"": read_model(config_file, model)}
            else:
                models = {"": read_denoiser(config_file)}
            if options["slurm"] is None:  # otherwise reported together with problems of --slurm
                require_paths(models, options["filename"])
            from cryosiam_dask.commands.segment import segment

            outcomes = segment(models, console, device=device.value, stop=stop, warned=warned, **options)
        except CryosiamDaskError as error:
            if as_json:
                each = getattr(error, "problems", (error,))
                _print_outcomes(getattr(error, "outcomes", ()), problems=[str(problem) for problem in each])
            raise
        _exit(outcomes, stop, as_json, warned)


@app.command(cls=Configured)
def status(
    config_file: ConfigFile,
    model: OnlyModel = None,
    as_json: AsJson = False,
) -> None:
    """Show which tomograms are done, running, failed (and why) or left to do, and how long the rest will take.

    Example: cryosiam-dask status --config-file configs/pipeline.yaml

    Example: cryosiam-dask status --config-file configs/pipeline.yaml --json
    """
    with _plain_errors(writes=False):
        from cryosiam_dask.commands.status import print_overview

        print_overview(config_file, Console(emoji=False), model=model, as_json=as_json)


def _on_predictions(
    action: str,
    config_file: Path,
    model: str | None,
    filename: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    sizes: bool = False,
    **options: Any,
) -> None:
    """Call a function of `cryosiam_dask.commands.written` after checking that its configuration and inputs exist."""
    with _plain_errors():
        # Slow imports come after the checks for typing errors.
        from cryosiam_dask.config import read_model
        from cryosiam_dask.runs.find import find_predictions

        configuration = read_model(config_file, model)
        find_predictions(configuration, filename, sizes=sizes)
        from cryosiam_dask.commands import written

        console = _console(quiet, verbose, as_json)
        _exit(getattr(written, action)(configuration, console, filename=filename, **options), as_json=as_json)


@app.command(cls=Configured)
@_options(_of_predictions)
def semantic_postprocess(**options: Any) -> None:
    """Apply postprocessing_sizes to existing predictions, without inference.

    Example: cryosiam-dask semantic-postprocess --config-file configs/config_semantic.yaml
    """
    _on_predictions("postprocess_again", sizes=True, **options)


@app.command(cls=Configured)
@_options(_of_predictions)
def components(**options: Any) -> None:
    """Number and measure the connected components of existing predictions.

    Example: cryosiam-dask components --config-file configs/config_semantic.yaml
    """
    _on_predictions("measure_predictions", **options)


@app.command(cls=Configured)
@_options(_of_predictions)
def semantic_to_centers(
    min_voxels: Annotated[
        int | None,
        typer.Option(
            help="Leave out components with at most this many voxels. Default: the key min_voxels.", **_numbers(int, 0)
        ),
    ] = None,
    erode: Annotated[
        bool, typer.Option("--erode", help="Erode each class once first, to separate particles that touch.")
    ] = False,
    form: Annotated[
        ListForm,
        typer.Option(
            "--format",
            help="Lists for RELION and Warp, or in CryoSiam's format, which always erodes.",
            **_choices(ListForm),
        ),
    ] = ListForm.relion,
    **options: Any,
) -> None:
    """List the component centres of each class in STAR files for RELION 5 and Warp, and in CSV files.

    Example: cryosiam-dask semantic-to-centers --config-file configs/config_semantic.yaml --min-voxels 10
    """
    _on_predictions("list_particles", min_voxels=min_voxels, erode=erode, form=form.value, **options)


@app.command(cls=Configured)
def report(config_file: ConfigFile, model: Model = None) -> None:
    """Write report.html beside the predictions: one page with pictures, numbers and outliers.

    Example: cryosiam-dask report --config-file configs/config_semantic.yaml
    """
    with _plain_errors():
        from cryosiam_dask.config import read_model
        from cryosiam_dask.files.folders import without_predictions

        configuration = read_model(config_file, model)
        if not configuration.prediction_folder.exists():
            raise without_predictions(configuration.prediction_folder)
        from cryosiam_dask.commands.written import report_again

        report_again(configuration, Console(emoji=False))


@app.command(cls=Configured)
@_options(_of_predictions)
def export(
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--format", help="May be given twice. Default: those of the key output_formats.", **_choices(Format)
        ),
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Write one MRC mask for each class, <stem>__<class>.mrc.")
    ] = False,
    **options: Any,
) -> None:
    """Write existing predictions as OME-Zarr (with their tomograms) or MRC, without inference.

    Example: cryosiam-dask export --config-file configs/config_semantic.yaml --format ome-zarr --format mrc

    Example: cryosiam-dask export --config-file configs/config_semantic.yaml --format mrc --per-class
    """
    names = [each.value for each in formats or ()]
    _on_predictions("export_predictions", formats=names, per_class=per_class, **options)


@app.command(cls=Configured)
def view(
    config_file: ConfigFile,
    model: Model = None,
    filename: Annotated[str | None, typer.Option(help="Name of the tomogram. Default: the first that is done.")] = None,
) -> None:
    """Open a tomogram with its labels in napari, with the names and colours of the classes.

    Needs a screen, and napari: pip install 'napari[pyqt6]'.

    Example: cryosiam-dask view --config-file configs/config_semantic.yaml --filename TS_01.mrc
    """
    with _plain_errors():
        from cryosiam_dask.config import read_model

        configuration = read_model(config_file, model)
        from cryosiam_dask.commands.view import view

        view(configuration, print, lambda message: _complain(f"warning: {message}"), filename=filename)


@app.command(cls=Configured)
def plan(
    config_file: ConfigFile,
    model: OnlyModel = None,
    filename: Filename = None,
    device: Annotated[
        Device, typer.Option(help="Device of the planned run; cuda needs no GPU here.", **_choices(Device))
    ] = Device.auto,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Plan a run with --overwrite.")] = False,
    overwrite_all: Annotated[bool, typer.Option("--overwrite-all", help="Plan a run with --overwrite-all.")] = False,
    trial: Annotated[
        bool, typer.Option("--trial", help="Predict some patches of a tomogram, to estimate how long the run takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what semantic-predict or run would read, compute and write, and how much time, memory and disk space it
    would need; write nothing.

    The exit status is the expected one of the run: 1 if some tomograms cannot be segmented, 2 if none can.

    The time is estimated from the latest run with the same model on the same kind of device, or from a --trial.

    Example: cryosiam-dask plan configs/pipeline.yaml

    Example: cryosiam-dask plan --config-file configs/config_semantic.yaml --json > plan.json
    """
    with _plain_errors(writes=False):
        from cryosiam_dask.commands.plan import show_plan
        from cryosiam_dask.config import read_models
        from cryosiam_dask.runs.find import require_paths

        if not as_json:  # with JSON all problems are printed, however long it takes
            require_paths(read_models(config_file, model), filename)
        found = show_plan(
            config_file, Console(emoji=False), model=model, filename=filename, workers=workers, overwrite=overwrite,
            overwrite_all=overwrite_all, as_json=as_json, device=device.value, trial=trial,
        )  # fmt: skip
        if found:
            raise typer.Exit(found)


@app.command()
def info(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Tomograms, zarr stores, predictions, checkpoints.")
    ],
    as_json: AsJson = False,
) -> None:
    """Describe tomograms, zarr stores, _preds.h5 and _components.h5 files, and checkpoints.

    Example: cryosiam-dask info TS_01.mrc predictions/TS_01_preds.h5

    Example: cryosiam-dask info TS_01.mrc --json
    """
    with _plain_errors(writes=False):
        from cryosiam_dask.commands.plan import show_files

        show_files(paths, Console(emoji=False), as_json=as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the tomograms.")] = Path(),
    output: Annotated[Path, typer.Option(help="The file to write; an existing one is not replaced.")] = Path(
        "pipeline.yaml"
    ),
    lamella: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Lamella model. Default: a single checkpoint nearby, or CryoSiam's."),
    ] = None,
    semantic: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Semantic model. Default: a single checkpoint nearby, or CryoSiam's."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Dataset of HDF5 files with more than one volume.")] = None,
) -> None:
    """Inspect a folder of tomograms and write a pipeline.yaml for them, with comments.

    Example: cryosiam-dask init /data/dataset1/denoised

    Example: cryosiam-dask init /data/dataset1/denoised --semantic models/semantic.ckpt --output dataset1.yaml
    """
    with _plain_errors():
        from cryosiam_dask.files.folders import require_there

        require_there(folder)
        from cryosiam_dask.commands.init import MARK, summary, write_pipeline

        found, text = write_pipeline(folder, output, lamella=lamella, semantic=semantic, dataset=dataset)
        marks = text.count(MARK)
        lines = (
            *summary(found),
            f"wrote {output}: check the {marks} lines marked {MARK}, which no file could answer",
            f"next: cryosiam-dask plan {shlex.quote(str(output))}",
        )
        for line in lines:
            Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def models(
    fetch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Download this model to the cache, for machines without a network; may be repeated."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List CryoSiam's published models, which trained_model accepts by name, and show which are in the cache.

    Example: cryosiam-dask models

    Example: cryosiam-dask models --fetch cryosiam_lamella --fetch cryosiam_semantic_segmentation
    """
    with _plain_errors():
        from cryosiam_dask.model import published

        for model in [published.find(name.replace("-", "_")) for name in fetch or ()]:
            published.fetch(model.source)
        if as_json:
            print(json.dumps([published.describe(name) for name in published.PUBLISHED], default=str, indent=1))
        else:
            print("\n".join(published.in_words(name) for name in published.PUBLISHED))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A tomogram: MRC (.mrc, .rec, .map, .st, .ali, also .gz), HDF5, zarr or OME-Zarr."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.zarr", help="The zarr v3 array to write; with .ome.zarr an OME-Zarr image.")
    ],
    level: Annotated[
        int,
        typer.Option(help="Level of an OME-Zarr image; 0 is full resolution.", **_numbers(int, 0)),
    ] = 0,
    dataset: Annotated[str | None, typer.Option(help="Dataset of an HDF5 file with more than one volume.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.zarr.")] = False,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a tomogram to a chunked zarr array in (z, y, x) order, or to an OME-Zarr image of several levels.

    Example: cryosiam-dask convert TS_01.mrc TS_01.ome.zarr

    Example: cryosiam-dask convert run.ome.zarr TS_01.zarr --level 1 --json
    """
    with _plain_errors():
        from cryosiam_dask.files.folders import require_there

        require_there(source)
        from cryosiam_dask.commands.convert import convert_file

        report = convert_file(
            source, target, _console(quiet, False, as_json), level=level, dataset=dataset, overwrite=overwrite,
            workers=workers,
        )  # fmt: skip
        if as_json:
            print(json.dumps(report, indent=2, allow_nan=False))


_FAR_OFF = 0.1  # of the requested voxel size

InputPath = Annotated[Path, typer.Option(help="Tomogram of any supported format, or a folder of them.")]
OutputPath = Annotated[Path, typer.Option(help="MRC file to write, or folder for files with the same names.")]


@app.command()
def processing_invert_scale(
    input_path: InputPath,
    output_path: OutputPath,
    invert: Annotated[bool, typer.Option("--invert", help="Change the sign: dark becomes bright.")] = False,
    lower_end_percentage: Annotated[
        float | None,
        typer.Option(help="Percentile of the (inverted) intensities that becomes 0.", **_numbers(float, 0, 100)),
    ] = None,
    upper_end_percentage: Annotated[
        float | None,
        typer.Option(help="Percentile of the (inverted) intensities that becomes 1.", **_numbers(float, 0, 100)),
    ] = None,
) -> None:
    """Invert the intensities of tomograms and scale them to 0 to 1, as float32 MRC files.

    Example: cryosiam-dask processing-invert-scale --input-path raw --output-path scaled --invert
    --lower-end-percentage 0.1 --upper-end-percentage 99.9
    """
    with _plain_errors():
        from cryosiam_dask.files.folders import require_there

        require_there(input_path)
        from cryosiam_dask.commands.processing import files, invert_scale

        console = Console(emoji=False)

        def prepare(source: Path, target: Path) -> None:
            bounds = invert_scale(source, target, invert=invert, lower=lower_end_percentage, upper=upper_end_percentage)
            words = ["inverted"] * invert
            if bounds is not None:  # of the file, whose low intensities become high if they are inverted
                zero, one = (bound * (-1 if invert else 1) + 0.0 for bound in bounds)  # no -0
                words.append(f"{zero:g} became 0 and {one:g} became 1")
            _inform(console, f"{target}: {', '.join(words) or 'intensities unchanged'}")

        _each(files(input_path, output_path), prepare)


@app.command()
def match_pixel_size(
    input_path: Annotated[Path, typer.Argument(metavar="IN", help="Tomogram, or folder of tomograms.")],
    output_path: Annotated[Path, typer.Argument(metavar="OUT", help="MRC file to write, or folder for them.")],
    pixel_size: Annotated[
        float,
        typer.Option(help="Voxel size of the result in Å.", **_numbers(float, 0.01)),
    ],
    input_pixel_size: Annotated[
        float | None,
        typer.Option(help="Voxel size of the input in Å. Default: that of its header.", **_numbers(float, 0.01)),
    ] = None,
) -> None:
    """Resample tomograms to another voxel size by cropping or padding their Fourier transforms; intensities keep their
    scale.

    Example: cryosiam-dask match-pixel-size raw/TS_01.mrc TS_01_10A.mrc --pixel-size 10
    """
    with _plain_errors():
        from cryosiam_dask.files.folders import require_there

        require_there(input_path)
        from cryosiam_dask.commands.processing import files, match_pixel_size, plan_resampling

        console = Console(emoji=False)

        def prepare(source: Path, target: Path) -> None:
            found = plan_resampling(source, pixel_size, input_pixel_size)
            shapes = " to ".join(" × ".join(map(str, shape)) for shape in (found.header.shape, found.shape))
            memory, disk = (math.ceil(number / 1e8) / 10 for number in (found.memory_bytes, found.disk_bytes))
            _inform(
                console,
                f"{source}: {shapes} voxels; needs about {memory} GB of memory and {disk} GB of disk beside the output",
            )
            match_pixel_size(found, target)
            _inform(console, f"{target}: voxels of {' × '.join(f'{size:.3f}' for size in found.after)} Å (z, y, x)")
            if any(abs(size / pixel_size - 1) > _FAR_OFF for size in found.after):
                _inform(
                    console,
                    f"warning: this is not the requested {pixel_size:g} Å, because an axis has too few voxels",
                )

        _each(files(input_path, output_path), prepare)


def _each(pairs: Sequence[tuple[Path, Path]], prepare: Callable[[Path, Path], None]) -> None:
    """Prepare tomograms one by one, and continue after one that fails."""
    failed = 0
    for pair in pairs:
        try:
            prepare(*pair)
        except CryosiamDaskError as error:
            if isinstance(error, DiskError):
                raise
            for line in str(error).splitlines():
                _complain(f"error: {line}")
            failed += 1
    if failed:
        raise typer.Exit(1 if failed < len(pairs) else 2)


def _inform(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to work in; created if it does not exist.")] = Path(
        "cryosiam_dask_demo"
    ),
    device: DeviceOption = Device.auto,
    workers: Workers = None,
    prepare_only: Annotated[
        bool,
        typer.Option(
            "--prepare-only", help="Only write the tomograms, models and YAML files, without running anything."
        ),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make two raw phantom tomograms, denoise and segment them, and compare the result with the ground truth.

    Example: cryosiam-dask demo --output demo --device cpu
    """
    with _plain_errors():
        from cryosiam_dask.commands.demo import prepare_demo, run_demo

        console = _console(quiet, verbose)
        if prepare_only:
            prepare_demo(output, console)
        else:
            _exit(run_demo(output, console, device=device.value, workers=workers))


def _console(quiet: bool, verbose: bool, as_json: bool = False) -> Console:
    """Return the console for messages."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose contradict each other")
    console = Console(emoji=False, quiet=quiet, stderr=as_json)
    if verbose:
        from cryosiam_dask.core.log import print_log

        print_log(console)
    return console


@contextmanager
def _plain_errors(drains: bool = False, writes: bool = True) -> Iterator[threading.Event]:
    """Print errors that a user can fix as plain text and exit with status 2; after an interrupt exit with status 130.

    With `drains`, the first signal only sets the yielded event, so that the command can finish its tasks in flight, and
    the loss of the cluster exits with status 75, because the same command resumes once the cluster is back. Without
    `writes`, an interrupt says nothing about outputs.
    """
    from cryosiam_dask.core.log import own_handlers, traceback_file

    stop = threading.Event()
    # Ctrl-C, a batch system's end of a job, and Slurm's warning before it (--signal=B:USR1@300).
    signals = (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1,) if drains else ()))

    def interrupt(number: int, frame: Any) -> None:
        if drains and not stop.is_set():
            stop.set()
            return
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # another signal must not disturb the clean-up
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, interrupt)
    try:
        with own_handlers():  # --verbose ends with the command, even if the process runs others
            yield stop
    except CryosiamDaskError as error:
        for line in str(error).splitlines():
            _complain(f"error: {line}")
        raise typer.Exit(TEMPORARY if drains and isinstance(error, ClusterError) and error.temporary else 2) from None
    except Exception as error:
        path = traceback_file(error)
        if path is None:
            raise
        _complain(
            f"error: unexpected {type(error).__name__}: {error}. This is a bug in the program; details are in {path}."
        )
        raise typer.Exit(_SOFTWARE) from None
    except KeyboardInterrupt:
        kept = ": complete outputs are kept, nothing is half-written; repeat the command to resume"
        _complain(f"interrupted{kept if writes else ''}")
        raise typer.Exit(130) from None


def _complain(message: str) -> None:
    """Print a line to standard error, without markup or wrapping."""
    Console(emoji=False, stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


def _exit(
    outcomes: Sequence[Outcome],
    stop: threading.Event | None = None,
    as_json: bool = False,
    warnings: Sequence[str] = (),
) -> None:
    if as_json:
        _print_outcomes(outcomes, warnings=list(warnings))
    left = any(outcome.status == "left" for outcome in outcomes)
    if left and stop is not None and stop.is_set():
        _complain("stopped: repeat the command to resume")
        raise typer.Exit(TEMPORARY)
    if left or any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _print_outcomes(outcomes: Sequence[Outcome], **others: list[str]) -> None:
    values = [{name: value for name, value in asdict(each).items() if name != "details"} for each in outcomes]
    print(json.dumps({"tomograms": values, **others}, indent=2, allow_nan=False))


class _Forgiving(io.FileIO):
    """A stream that drops what it cannot write, if its reader is gone or its disk is full."""

    def write(self, data: Any) -> int:
        """See `io.RawIOBase`."""
        try:
            while (taken := super().write(data)) is None:  # a non-blocking stream that is full
                select.select((), (self,), ())
            return taken
        except OSError:
            return memoryview(data).nbytes


#: Replacements for streams that only support ASCII; other characters are escaped as in Python.
_PLAIN = str.maketrans(
    dict.fromkeys("├┡╇┩┏┳┓└┴┘┌┬┐┼┤╭╮╰╯", "+")
    | dict.fromkeys("│┃", "|")
    | dict.fromkeys("─━╸╺–−", "-")
    | {"×": "x", "Å": "A", "µ": "u", "…": "...", "≤": "<=", "≥": ">="}
)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handle encoding errors of our streams."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text, position = codecs.backslashreplace_errors(error)
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return (plain, error.end) if plain.isascii() else (text, position)


def _forgive_streams() -> None:
    """Make sure that a closed terminal, pipe or full disk behind our output neither ends a command nor fails it."""
    codecs.register_error("cryosiam-dask", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file to be opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
            continue
        with suppress(OSError):  # it is not a file
            raw = _Forgiving(stream.fileno(), "w", closefd=False)
            stream.flush()
            buffer = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "cryosiam-dask", line_buffering=True))


def main() -> None:
    """Entry point of the ``cryosiam-dask`` command."""
    _forgive_streams()
    app()
