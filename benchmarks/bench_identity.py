"""What it costs to tell whether a zarr input is still the same: seconds for all of its chunk files.

    python benchmarks/bench_identity.py --chunks 100000 --output benchmarks/results/identity.json
    python benchmarks/bench_identity.py --quick            # the tests run it, so that it cannot rot

Beside it, in the same run, stands a walk through the folders alone, which looks at no file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import zarr

sys.path[:0] = [str(Path(__file__).parent)]
from bench_inference import machine  # noqa: E402

from cryosiam_dask.files.identity import source_content, source_identity  # noqa: E402


def make_chunks(folder: Path, count: int) -> int:
    """Write an array of about `count` chunk files of a few bytes each; returns how many there are."""
    edge = max(1, round(count ** (1 / 3)))
    array = zarr.create_array(folder, shape=(edge,) * 3, chunks=(1, 1, 1), dtype="u1", compressors=None)
    for z in range(edge):
        for y in range(edge):
            rows = folder / "c" / str(z) / str(y)
            rows.mkdir(parents=True)
            for x in range(edge):
                (rows / str(x)).write_bytes(b"\1")
    assert array[-1, -1, -1] == 1
    return int(edge**3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "x.zarr"
        row: dict[str, float] = {"chunks": make_chunks(folder, 1000 if options.quick else options.chunks)}
        for name, work in (
            ("walk_seconds", lambda: list(os.walk(folder))),
            ("identity_seconds", lambda: source_identity(folder)),
            ("content_seconds", lambda: source_content(folder)),
        ):
            began = time.monotonic()
            work()
            row[name] = round(time.monotonic() - began, 3)
    print(row)
    if options.output:
        options.output.write_text(json.dumps({"machine": machine("cpu"), "rows": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
