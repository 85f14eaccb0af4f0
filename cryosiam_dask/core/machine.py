"""This machine: its cores, its memory, its processes and its start."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

# What reads files is imported where it is used: a path that is wrong is to be told at once.
if TYPE_CHECKING:
    pass


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # of another user
    return True


@cache
def boot_id() -> str:
    """A name of this start of this machine, or none; what was not forced to its disk survives no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux; macOS has one of its own
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def process_namespace() -> str:
    """The kernel's name for the set of processes among which this one has its number."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of_machine() -> int:
    """Bytes of memory that all workers together may use."""
    from distributed.system import MEMORY_LIMIT  # what control groups and limits leave

    return int(MEMORY_LIMIT)
