"""The golden cases: what CryoSiam itself wrote for small inputs (see ``tests/data/golden/README.md``)."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

FOLDER = Path(__file__).parents[1] / "data" / "golden"

#: Cases of one model each; ``lamella_then_semantic`` is made otherwise.
CASES = sorted(path.parent.name for path in FOLDER.glob("*/config.yaml"))


def expected(case: str) -> dict[str, np.ndarray]:
    """Everything that CryoSiam wrote for a case."""
    result: dict[str, np.ndarray] = {}
    for path in FOLDER.joinpath(case).glob("expected*.npz"):
        with np.load(path) as archive:
            result.update(archive)
    return result


def configuration(case: str, name: str = "config.yaml") -> dict[str, Any]:
    """The case's YAML file, as a plain dict."""
    return yaml.safe_load(FOLDER.joinpath(case, name).read_text())
