"""This machine: its cores, memory, processes and boot id."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path


def is_running(process: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # the process of another user
    return True


@cache
def boot_id() -> str:
    """Return an id of the current boot, or an empty string if unknown. A reboot loses data not synced to disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: ask macOS
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def process_namespace() -> str:
    """Return the name of this process's PID namespace, or an empty string if unknown."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of_machine() -> int:
    """Return the memory that all workers together may use, in bytes."""
    from distributed.system import MEMORY_LIMIT  # respects control groups and resource limits

    return int(MEMORY_LIMIT)
