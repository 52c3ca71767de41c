"""What a report says before its chapters and after them: the verdict, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from mlxspec.bench.judging import times
from mlxspec.bench.report import figures
from mlxspec.bench.report.figures import duration, in_ratio, in_share, in_speed, in_time
from mlxspec.bench.results import Results
from mlxspec.bench.summing import speed_of
from mlxspec.bench.targets import chosen

Pairs = list[tuple[str, str]]


def title(results: Results) -> str:
    return str(results.pair.get("name") or " and ".join(one.target for one in results.shape) or "?")


def verdict(results: Results) -> str:
    """The one sentence that a reader takes away."""
    if results.recommendation is not None:
        return results.recommendation.words
    if not any(cell.samples for cell in results.cells):
        return "No measurement was finished." if not results.shape else "Measured without a model."
    if not results.of("configs"):
        return "Settings were compared under other conditions alone, so none is recommended."
    return "There is no recommendation: too little was measured."


def facts(results: Results) -> Pairs:
    """Where, when, and with what."""
    machine = results.machine
    versions = [
        f"{name} {machine[name]}" for name in ("mlxspec", "mlx", "mlx-lm") if name in machine
    ]
    took = duration(results.seconds) + ("" if results.finished else ", not finished")
    found = [
        ("machine", _told([machine.get("processor"), machine.get("system")])),
        ("date", date(results.created)),
        ("took", took),
        ("versions", ", ".join(versions)),
    ]
    return [(name, text) for name, text in found if text]


def date(created: str) -> str:
    """ISO 8601 as people write it, with its zone; as it is where it is something else."""
    with suppress(ValueError):
        at = datetime.fromisoformat(created)
        return f"{at.day} {at:%B %Y, %H:%M} {at.tzname() or ''}".strip()
    return created


def headline(results: Results) -> Pairs:
    """The figures of the configuration that is `chosen`; the name and the figure of each."""
    cell = chosen(results) if results.recommendation else None
    if cell is None:
        return []
    found = [
        (
            "speed-up over plain decoding",
            times(cell.speedup) if cell.speedup else figures.MISSING,
        ),
        ("tokens per second", in_speed(speed_of(cell.samples))),
        ("first token after", in_time(figures.first_token_s(cell))),
        ("proposals accepted", in_share(figures.rate(cell))),
        ("memory, x the target alone", in_ratio(cell.memory_ratio)),
    ]
    return [(name, text) for name, text in found if text != figures.MISSING]


def conditions(results: Results) -> Pairs:
    """All that a figure depends on: the pair, the machine, the settings, and the prompts."""
    parts = [("pair", results.pair), ("machine", results.machine), ("setting", results.settings)]
    told = [
        (f"{what}: {name.replace('_', ' ')}", said)
        for what, one in parts
        for name, value in one.items()
        if (said := _told(value))
    ]
    return [*told, ("prompts: SHA-256", results.prompts_hash)]


def _told(value: Any) -> str:
    """A plain value in words; nothing for what is not there."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said}" for key, one in value.items() if (said := _told(one)))
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_told, value)))
    return str(value)
