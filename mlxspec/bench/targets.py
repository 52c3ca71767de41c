"""The aims of speculation, each held against what was measured. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

from mlxspec.bench.cells import Cell
from mlxspec.bench.compare import by_prompt
from mlxspec.bench.judging import times
from mlxspec.bench.results import Results
from mlxspec.bench.statistics import Interval, interval_of_ratio

ACCEPTANCE, SPEEDUP, LATER, MEMORY = 0.70, 2.0, 0.10, 2.0


@dataclass(frozen=True)
class Target:
    """An aim.

    Args:
        measured: in words. is_met: None where it was not measured.
    """

    name: str
    wanted: str
    measured: str
    is_met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "fail", None: "not measured"}[self.is_met]


def chosen(results: Results) -> Cell | None:
    """The recommended configuration over all prompts; in place of plain decoding the fastest."""
    compared = [cell for cell in results.of("configs") if cell.speedup]
    best = results.recommendation
    for cell in compared:
        if best is not None and cell.configuration == best.configuration:
            return cell
    return max(compared, key=lambda cell: cell.speedup.median if cell.speedup else 0, default=None)


def targets(results: Results) -> tuple[Target, ...]:
    """The four aims, for the configuration that is `chosen`."""
    cell = chosen(results)
    rate = cell.acceptance.rate if cell and cell.acceptance else None
    gain = cell.speedup if cell else None
    memory = cell.memory_ratio if cell else None
    later = _later(results, cell) if cell else None
    return (
        Target(
            "acceptance",
            f"above {ACCEPTANCE:.0%}",
            "" if rate is None else f"{rate:.1%}",
            None if rate is None else rate > ACCEPTANCE,
        ),
        Target(
            "speed-up over plain decoding",
            f"above {SPEEDUP:g} x",
            "" if gain is None else times(gain),
            None if gain is None else gain.median > SPEEDUP,
        ),
        Target(
            "time to the first token, over plain decoding",
            f"below {LATER:+.0%}",
            "" if later is None else _in_words(later),
            None if later is None else later.median - 1 < LATER,
        ),
        Target(
            "memory, over the target alone",
            f"below {MEMORY:g} x",
            "" if memory is None else f"{memory:.2f} x",
            None if memory is None else memory < MEMORY,
        ),
    )


def _later(results: Results, cell: Cell) -> Interval | None:
    """The ratio of times to the first token, prompt by prompt."""
    plain = next((one for one in results.of("configs") if one.configuration.is_baseline), None)
    if plain is None:
        return None
    ours, theirs = (by_prompt(one.samples, lambda each: each.ttft_s) for one in (cell, plain))
    common = [prompt for prompt in ours if theirs.get(prompt) and ours[prompt]]
    if not common:
        return None
    return interval_of_ratio([ours[one] for one in common], [theirs[one] for one in common])


def _in_words(later: Interval) -> str:
    limits = f" ({later.low - 1:+.1%} to {later.high - 1:+.1%})" if later.is_known else ""
    return f"{later.median - 1:+.1%}{limits}"
