"""What a figure depends on besides models and prompts: versions, chip, power, heat, other programs.

Read before a run, so that a person hears in time what would spoil it, and again behind it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mlxspec.device import machine, memory, power

BUSY = 0.5  # programs that want to run, over processors, from which on others disturb
SWAPPED = 64 * 2**20  # bytes of swap that come during a run, from which on it was disturbed


def environment() -> dict[str, Any]:
    """Plain values; those that the system does not tell are missing."""
    told = {
        "power_mode": power.power_mode(),
        "on_battery": power.on_battery(),
        "thermal_state": power.thermal_state(),
        "swap_bytes": power.swap_used(),
        "load": _load(),
        "processors": os.cpu_count(),
        "memory_bytes": memory.system_memory(),
    }
    return machine.about() | {name: value for name, value in told.items() if value is not None}


def concerns(before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> list[str]:
    """What makes figures worth less, one sentence each.

    Args:
        before: the environment before the run. after: and behind it, where that is over.
    """
    found = []
    if before.get("power_mode") in ("low", "powersave"):
        found.append("The machine saves power: every figure is lower than it could be.")
    if before.get("on_battery"):
        found.append("The machine runs on its battery, which may slow it down.")
    for when, one in (("", before), (" behind the run", after or {})):
        heat = one.get("thermal_state")
        if heat in ("serious", "critical"):
            found.append(f"The machine is hot{when} ({heat}), and slows itself down.")
    load, processors = before.get("load"), before.get("processors") or 1
    if load is not None and load / processors > BUSY:
        found.append(
            f"Other programs keep the machine busy: {load:.1f} of them run at a time on "
            f"{processors} processors."
        )
    grown = (after or {}).get("swap_bytes", 0) - before.get("swap_bytes", 0)
    if after is not None and grown > SWAPPED:
        found.append(f"The machine swapped {grown / 1e6:.0f} MB out during the run.")
    return found


def _load() -> float | None:
    """Programs that ran at a time in the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
