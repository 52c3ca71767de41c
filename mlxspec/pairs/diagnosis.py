"""What `mlxspec doctor` looks at: the machine, its software, its disk, its tables, its servers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token

from mlxspec._version import __version__
from mlxspec.control import places, records
from mlxspec.device import machine, memory, power
from mlxspec.device.kernels import on_cpu
from mlxspec.errors import MlxspecError
from mlxspec.metrics import counted
from mlxspec.pairs import servers
from mlxspec.pairs.pull import free_space, gigabytes
from mlxspec.pairs.table import default_pair, load_pairs, user_table

Mark = Literal["✓", "!", "✗"]

# The versions that the tests run with; others of the same minor release are expected to do.
TESTED = {"mlx": "0.32", "mlx-lm": "0.32", "huggingface-hub": "2"}
LITTLE_DISK = 10e9  # bytes: less than a small pair
LITTLE_MEMORY = 7e9
_BLAS = re.compile("blas|blis|mkl")


@dataclass(frozen=True)
class Line:
    """One line of the diagnosis: ✓ in order, ! worth knowing, ✗ keeps mlxspec from working."""

    mark: Mark
    what: str
    words: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"mark": self.mark, "what": self.what, "words": self.words, "hint": self.hint}


def diagnosis() -> list[Line]:
    """Everything that is looked at. A check that fails is a line, and ends nothing."""
    checks: tuple[tuple[str, Callable[[], Iterator[Line]]], ...] = (
        ("machine", _machine),
        ("memory", _memory),
        ("software", _software),
        ("compiler", _compiler),
        ("disk", _disk),
        ("hugging face", _hub),
        ("power", _power),
        ("table", _table),
        ("tuning", _tuning),
        ("prefixes", _prefixes),
        ("servers", _servers),
    )
    return [line for what, check in checks for line in _guarded(what, check)]


def _guarded(what: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    try:
        yield from check()
    except MlxspecError as error:
        yield Line("✗", what, error.message, error.hint)
    except Exception as error:  # what a system says in a way that nobody has seen yet
        yield Line("!", what, f"cannot be looked at: {type(error).__name__}: {error}")


def _machine() -> Iterator[Line]:
    system = f"macOS {platform.mac_ver()[0]}" if power.on_mac() else platform.system()
    python = f"Python {platform.python_version()} ({platform.machine()})"
    yield Line("✓", "machine", f"{machine.chip()}, {system}, {python}")
    if power.on_mac() and platform.machine() != "arm64":
        words = "this Python is not native: MLX has no GPU under Rosetta"
        yield Line("✗", "python", words, "Install Python for arm64.")


def _memory() -> Iterator[Line]:
    total, limit = memory.system_memory(), memory.limit()
    words = f"{gigabytes(limit)} for models, of {gigabytes(total)}"
    mark: Mark = "!" if limit < LITTLE_MEMORY else "✓"
    hint = "`mlxspec pairs list --fits` shows the pairs that fit."
    yield Line(mark, "memory", words, hint if mark == "!" else "")
    wired = power.wired_limit_mb()
    if wired:
        words = f"iogpu.wired_limit_mb is raised to {wired:,}"
        hint = "Some Macs end in a kernel panic so; `sudo sysctl iogpu.wired_limit_mb=0` undoes it."
        yield Line("!", "wired limit", words, hint)
    elif wired == 0:
        yield Line("✓", "wired limit", "the system's own")


def _software() -> Iterator[Line]:
    yield Line("✓", "mlxspec", f"{__version__}, MLX's backend is {machine.backend()}")
    for name, tested in TESTED.items():
        found = version(name)
        if found == tested or found.startswith(f"{tested}."):
            yield Line("✓", name, found)
        else:
            hint = f"pip install '{name}=={tested}.*' takes the release that was tested."
            yield Line("!", name, f"{found}, and {tested} is what was tested", hint)


def _compiler() -> Iterator[Line]:
    if not on_cpu():
        return
    name = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
    found = shutil.which(name) or shutil.which("c++") or shutil.which("clang++")
    if found:
        yield Line("✓", "compiler", found)
    else:
        hint = "Install g++; until then --no-compile runs rounds without kernels of their own."
        yield Line(
            "✗", "compiler", "rounds on a CPU are compiled, and there is no C++ compiler", hint
        )
    if sys.platform == "linux":
        yield Line("✓", "BLAS", _blas(Path("/proc/self/maps").read_text()))


def _blas(maps: str) -> str:
    """The library that multiplies, by the files that Linux says are loaded here.

    MLX's wheel brings one, as numpy's does for itself; one that is preloaded comes before it.
    """
    files = {Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines()}
    others = sorted(
        one.name
        for one in files
        if _BLAS.search(one.name) and not one.parent.name.endswith(".libs")
    )
    return ", ".join(others) or "the reference library of MLX's wheel"


def _disk() -> Iterator[Line]:
    free = free_space()
    words = f"{gigabytes(free)} free in {constants.HF_HUB_CACHE}"
    mark: Mark = "!" if free < LITTLE_DISK else "✓"
    hint = "`mlxspec pairs rm NAME` deletes models, HF_HOME names another disk."
    yield Line(mark, "disk", words, hint if mark == "!" else "")


def _hub() -> Iterator[Line]:
    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(cache.glob("models--*"))
    parts = [path for one in models for path in (one / "blobs").glob("*.incomplete")]
    yield Line("✓", "cache", f"{len(models)} repositories of models")
    if parts:
        size = sum(path.stat().st_size for path in parts)
        hint = "`mlxspec pairs pull NAME` goes on with them, `hf cache prune` deletes them."
        yield Line(
            "!", "cache", f"{len(parts)} downloads are not complete, {gigabytes(size)}", hint
        )
    if constants.HF_HUB_OFFLINE:
        yield Line("!", "hub", "HF_HUB_OFFLINE keeps it from being asked", "Unset HF_HUB_OFFLINE.")
    words = "there is one" if get_token() else "none: enough for models that are open to everybody"
    yield Line("✓", "token", words)


def _power() -> Iterator[Line]:
    low, battery = power.low_power_mode(), power.on_battery()
    if low:
        words = "low power mode is on: everything takes longer, and tuning measures that"
        yield Line("!", "power", words, "Turn it off in System Settings, Battery.")
    elif low is not None:
        yield Line("✓", "power", "on battery" if battery else "plugged in, full power")


def _table() -> Iterator[Line]:
    pairs, path = load_pairs(), user_table()
    own = f"with {path}" if path.exists() else "shipped alone"
    yield Line("✓", "table", f"{len(pairs)} pairs, {own}; {default_pair()} is the default")


def _tuning() -> Iterator[Line]:
    told: list[str] = []
    kept = records.load_all(told.append)
    if told:
        yield Line("!", "tuning", told[0], f"Remove {records.file()}.")
        return
    current = {name: version(name) for name in ("mlx", "mlx-lm")}
    old = [one for one in kept if {"mlx": one.setting.mlx, "mlx-lm": one.setting.mlx_lm} != current]
    words = (
        f"{counted(len(kept), 'record')} in {records.file()}" if kept else "nothing was learned yet"
    )
    if old:
        hint = "`mlxspec tune --pair NAME` measures anew."
        yield Line("!", "tuning", f"{words}, {len(old)} of another MLX", hint)
    else:
        yield Line("✓", "tuning", words)


def _prefixes() -> Iterator[Line]:
    """The pasts of prompts that servers have kept on disk."""
    for place in places.known():
        held = sum(path.stat().st_size for path in place.files)
        cap = gigabytes(place.max_bytes)
        words = f"{gigabytes(held)} of at most {cap} in {place.folder}"
        over = held > place.max_bytes
        hint = "The next server that uses it removes what is too much; it may be deleted as well."
        yield Line("!" if over else "✓", "prefix cache", words, hint if over else "")


def _servers() -> Iterator[Line]:
    for one in servers.known():
        if one.state != "absent":
            mark: Mark = "✓" if one.state == "running" else "!"
            yield Line(mark, f"port {urlsplit(one.url).port}", str(one))


def sound(lines: list[Line]) -> bool:
    """Whether nothing keeps mlxspec from working."""
    return all(line.mark != "✗" for line in lines)
