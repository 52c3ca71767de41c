"""A recommendation as keys of the table of pairs, which is where `generate` and `serve` look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxspec.bench.cells import Configuration
from mlxspec.bench.compare import MACHINE
from mlxspec.bench.results import Results
from mlxspec.defaults import AUTO
from mlxspec.errors import UsageError
from mlxspec.pairs.folders import named
from mlxspec.pairs.table import Pair


def keys(results: Results, pair: Pair) -> dict[str, Any]:
    """The keys of a pair's entry that make it decode as is recommended.

    Raises:
        UsageError: nothing is recommended, it was measured with another target, or the table has
            no key for it.
    """
    best, target = results.recommendation, results.pair.get("target")
    if best is None:
        raise UsageError(
            "These results recommend nothing.",
            hint="Measure for longer: `mlxspec bench --minutes 20`.",
        )
    if target != pair.target_name:
        raise UsageError(
            f"The results are of the target {target}, and {pair.name} has {pair.target_name}.",
            hint="Measure that pair, or name the one that was measured with --pair.",
        )
    chosen = best.configuration
    if chosen.rule:
        raise UsageError(
            f"{chosen.name} is recommended, and the table of pairs has no key for a rule.",
            hint=f"Give it with each command: `mlxspec generate --verify {chosen.rule}`.",
        )
    found: dict[str, Any] = {"draft_tokens": AUTO if chosen.auto else chosen.draft_tokens}
    drafts = _drafts(chosen, results, pair)
    return found if drafts == pair.drafts else found | {"draft": _plainly(drafts)}


def _drafts(chosen: Configuration, results: Results, pair: Pair) -> tuple[str, ...]:
    """What drafts: one drafter where the configuration names it, else what was measured."""
    listed = str(results.pair.get("draft") or "")
    if listed != (pair.draft_name or ""):  # --draft was given
        pair = replace(pair, draft=tuple(listed.split(" + ")) if listed else None)
    if not chosen.drafter:
        return pair.drafts
    return (named(pair).get(chosen.drafter, chosen.drafter),)


def _plainly(drafts: tuple[str, ...]) -> str | list[str]:
    return drafts[0] if len(drafts) == 1 else list(drafts)


def elsewhere(results: Results, here: Mapping[str, Any]) -> list[str]:
    """How this machine differs from the one that was measured, in words."""
    return [
        f"{name} {results.machine.get(key)}, and here {here.get(key)}"
        for key, name in MACHINE.items()
        if results.machine.get(key) != here.get(key)
    ]
