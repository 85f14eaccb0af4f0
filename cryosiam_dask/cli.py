"""The command line: parse, call, print. No work happens here.

Every command and option may also be spelled as CryoSiam spells it, with underscores (``semantic_predict
--config_file=…``). Exit status: 0 all done, 1 some tomograms failed and the others are done, 2 wrong usage or
configuration, 130 interrupted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cryosiam_dask._version import __version__
from cryosiam_dask.errors import CryosiamDaskError

if TYPE_CHECKING:
    from cryosiam_dask.pipeline import Outcome

app = typer.Typer(
    name="cryosiam-dask",
    help="Segment cryo-electron tomograms with CryoSiam's models: lamella, then membranes, particles and filaments.",
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Device(StrEnum):
    """Where the network runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ConfigFile = Annotated[Path, typer.Option(help="CryoSiam's YAML file, for example configs/config_semantic.yaml.")]
Filename = Annotated[str | None, typer.Option(help="Name of a single tomogram in data_folder.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes. Default: every GPU, or what cores and memory allow.")
]
DeviceOption = Annotated[Device, typer.Option(help="What to run the network on; auto takes GPUs where there are any.")]


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


@app.command()
def semantic_predict(
    config_file: ConfigFile,
    filename: Filename = None,
    device: DeviceOption = Device.auto,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs made otherwise.")] = False,
    dashboard_address: Annotated[
        str, typer.Option(help="Where the Dask dashboard listens; it runs whatever it is sent, so keep it local.")
    ] = "127.0.0.1:8787",
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Draw when each worker read, computed and wrote each block.")
    ] = False,
) -> None:
    """Predict the lamella or the semantic classes of every tomogram.

    Example: cryosiam-dask semantic-predict --config-file configs/config_lamella.yaml
    """
    with _plain_errors():
        from cryosiam_dask.runner import segment

        outcomes = segment(
            config_file,
            Console(),
            filename=filename,
            device=device.value,
            workers=workers,
            overwrite=overwrite,
            dashboard_address=dashboard_address,
            timeline=timeline,
        )
        _exit(outcomes)


@app.command()
def semantic_postprocess(config_file: ConfigFile, filename: Filename = None, workers: Workers = None) -> None:
    """Apply postprocessing_sizes to predictions that are written already, without inference.

    Example: cryosiam-dask semantic-postprocess --config-file configs/config_semantic.yaml
    """
    with _plain_errors():
        from cryosiam_dask.runner import postprocess_again

        _exit(postprocess_again(config_file, Console(), filename=filename, workers=workers))


@app.command()
def components(config_file: ConfigFile, filename: Filename = None, workers: Workers = None) -> None:
    """Number and measure the connected components of predictions that are written already.

    Example: cryosiam-dask components --config-file configs/config_semantic.yaml
    """
    with _plain_errors():
        from cryosiam_dask.runner import measure_predictions

        _exit(measure_predictions(config_file, Console(), filename=filename, workers=workers))


@app.command()
def semantic_to_centers(
    config_file: ConfigFile,
    filename: Filename = None,
    min_voxels: Annotated[
        int | None,
        typer.Option(
            min=0, help="Leave out components of so many voxels or fewer. Default: the key of this name, or 0."
        ),
    ] = None,
    erode: Annotated[bool, typer.Option("--erode", help="Erode each class once before, to part what touches.")] = False,
    workers: Workers = None,
) -> None:
    """List the centres of each class's components in STAR files for RELION 5 and Warp, and in CSV files.

    Example: cryosiam-dask semantic-to-centers --config-file configs/config_semantic.yaml --min-voxels 10
    """
    with _plain_errors():
        from cryosiam_dask.runner import list_particles

        _exit(
            list_particles(
                config_file, Console(), filename=filename, min_voxels=min_voxels, erode=erode, workers=workers
            )
        )


@app.command()
def report(config_file: ConfigFile) -> None:
    """Show the predictions of a configuration on one page, report.html beside them: pictures, numbers, outliers.

    Example: cryosiam-dask report --config-file configs/config_semantic.yaml
    """
    with _plain_errors():
        from cryosiam_dask.runner import report_again

        report_again(config_file, Console())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A tomogram: .mrc, .rec, .map or .st, also .gz.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="The zarr v3 array to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.zarr.")] = False,
    workers: Workers = None,
) -> None:
    """Convert a tomogram to a chunked zarr array in (z, y, x) order.

    Example: cryosiam-dask convert TS_01.mrc TS_01.zarr
    """
    with _plain_errors():
        from cryosiam_dask.runner import convert_file

        convert_file(source, target, Console(), overwrite=overwrite, workers=workers)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to work in; made if it is missing.")] = Path(
        "cryosiam_dask_demo"
    ),
    device: DeviceOption = Device.auto,
    workers: Workers = None,
) -> None:
    """Make two phantom tomograms, segment them, and compare the result with the truth."""
    with _plain_errors():
        from cryosiam_dask.demo import run_demo

        _exit(run_demo(output, Console(), device=device.value, workers=workers))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a user got wrong is printed as it is, with status 2; an interruption leaves with status 130."""

    signals = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a batch system's way to say it

    def stop(number: int, frame: Any) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # a second one must not disturb the tidying up
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, stop)
    try:
        yield
    except CryosiamDaskError as error:
        for line in str(error).splitlines():
            Console(stderr=True).print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: complete outputs were kept, nothing is half-written")
        raise typer.Exit(130) from None


def _exit(outcomes: Sequence[Outcome]) -> None:
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``cryosiam-dask`` command."""
    app()
