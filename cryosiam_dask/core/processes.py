"""Processes, and the start of the machine that they belong to."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path


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
