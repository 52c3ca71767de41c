"""How this machine is powered, and the memory that its GPU may keep wired: what `doctor` tells."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress

PATIENCE_S = 5.0


def on_mac() -> bool:
    return platform.system() == "Darwin"


def low_power_mode() -> bool | None:
    """Whether macOS slows the machine down to save power; None where nothing tells."""
    if not on_mac():
        return None
    for line in _output("pmset", "-g").splitlines():
        name, _, value = line.strip().partition(" ")
        if name in ("lowpowermode", "powermode"):
            return value.strip() == "1"
    return None


def on_battery() -> bool | None:
    """Whether a Mac runs on its battery; None where nothing tells."""
    if not on_mac():
        return None
    said = _output("pmset", "-g", "batt")
    return "Battery Power" in said if said else None


def wired_limit_mb() -> int | None:
    """What iogpu.wired_limit_mb was raised to; 0 is the system's own; None elsewhere."""
    if not on_mac():
        return None
    with suppress(ValueError):
        return int(_output("sysctl", "-n", "iogpu.wired_limit_mb"))
    return None


def _output(*command: str) -> str:
    """What a command of the system prints; nothing where it fails or is missing."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=PATIENCE_S,
            check=True,
            text=True,
            errors="replace",
        )
        return done.stdout
    return ""
