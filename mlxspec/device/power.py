"""How this machine is powered, how hot it is, and how its memory is used, as the system tells.

None of it needs root. Who asks about another system than its own is told None.
"""

from __future__ import annotations

import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 5.0
_MODES = {"0": "automatic", "1": "low", "2": "high"}  # of pmset
_STATES = ("nominal", "fair", "serious", "critical")  # of NSProcessInfoThermalState
_THERMAL = "ObjC.import('Foundation'); $.NSProcessInfo.processInfo.thermalState"
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_SUPPLIES = Path("/sys/class/power_supply")
_MEMORY = Path("/proc/meminfo")


def on_mac() -> bool:
    return platform.system() == "Darwin"


def low_power_mode() -> bool | None:
    """Whether macOS slows the machine down to save power; None where nothing tells."""
    mode = power_mode() if on_mac() else None
    return None if mode is None else mode == "low"


def power_mode() -> str | None:
    """macOS's low, automatic or high; Linux's governor of the first processor; None if unknown."""
    if not on_mac():
        with suppress(OSError):
            return _GOVERNOR.read_text().strip()
        return None
    for line in _output("pmset", "-g").splitlines():
        name, _, value = line.strip().partition(" ")
        if name in ("lowpowermode", "powermode"):
            return _MODES.get(value.strip())
    return None


def on_battery() -> bool | None:
    """Whether the machine runs on its battery; None where nothing tells."""
    if not on_mac():
        return _on_battery_of_linux()
    said = _output("pmset", "-g", "batt")
    return "Battery Power" in said if said else None


def _on_battery_of_linux() -> bool | None:
    with suppress(OSError):
        said = [path.read_text().strip() for path in _SUPPLIES.glob("*/online")]
        return said.count("1") == 0 if said else None
    return None


def thermal_state() -> str | None:
    """nominal, fair, serious or critical, as macOS's ProcessInfo says it; None elsewhere."""
    if not on_mac():
        return None
    said = _output("osascript", "-l", "JavaScript", "-e", _THERMAL).strip()
    return _STATES[int(said)] if said in ("0", "1", "2", "3") else None


def swap_used() -> int | None:
    """Bytes that are swapped out; None where nothing tells."""
    if on_mac():
        found = re.search(r"used = ([\d.]+)M", _output("sysctl", "-n", "vm.swapusage"))
        return round(float(found[1]) * 2**20) if found else None
    with suppress(OSError):
        sizes = dict(re.findall(r"(Swap\w+): +(\d+) kB", _MEMORY.read_text()))
        if "SwapTotal" in sizes and "SwapFree" in sizes:
            return 1024 * (int(sizes["SwapTotal"]) - int(sizes["SwapFree"]))
    return None


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
