"""Python values as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def as_json(value: Any) -> Any:
    """Convert a value to JSON values.

    Parameters
    ----------
    value
        Numbers, text, and mappings, sequences and dataclasses of them.

    Returns
    -------
    None, bool, int, float, str, list or dict
        Dataclasses as mappings of their fields, NaN and infinity as ``None``, anything else as text.

    Examples
    --------
    >>> as_json({"shape": (4, 5), "mean": float("nan")})
    {'shape': [4, 5], 'mean': None}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value)
