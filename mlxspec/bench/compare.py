"""Two results of the same work: what changed beyond noise. No MLX."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from mlxspec.bench import statistics
from mlxspec.bench.cells import Cell, Question, Sample
from mlxspec.bench.results import Results
from mlxspec.bench.statistics import Change, Verdict, change

What = Literal["tokens/s", "first token"]
# What must be the same for a figure to mean the same, and how a person calls it.
MACHINE = {"processor": "processor", "device": "device", "system": "system"}
POWER = {"power_mode": "power mode", "on_battery": "running on a battery"}
PAIR = {"target": "target", "draft": "draft", "quantisation": "quantisation"}
SETTINGS = {"max_tokens": "length of the texts"}
VERSIONS = ("mlxspec", "mlx", "mlx-lm", "python")

Key = tuple[Question, str, str, str, float, int, int]


@dataclass(frozen=True)
class Compared:
    """One cell before and after.

    Args:
        before, after: medians: tokens per second, or seconds to the first token.
        change: of the speed, by prompt; more is better for both, as the first token's is inverted.
    """

    cell: Cell
    what: What
    before: float
    after: float
    change: Change

    @property
    def is_called(self) -> bool:
        return self.change.verdict in (Verdict.FASTER, Verdict.SLOWER)

    @property
    def percent(self) -> str:
        """How much faster, in words; less than 0 is slower."""
        return f"{self.change.ratio.median - 1:+.1%}"

    def as_dict(self) -> dict[str, Any]:
        found = self.change.ratio
        return {
            "question": self.cell.question,
            "row": self.cell.row,
            "configuration": self.cell.configuration.name,
            "what": self.what,
            "before": self.before,
            "after": self.after,
            "speed_ratio": found.median,
            "low": found.low,
            "high": found.high if found.is_known else None,
            "verdict": str(self.change.verdict),
        }


@dataclass(frozen=True)
class Comparison:
    """Two results.

    Args:
        versions: that differ, in words. beside: what is counted rather than timed, and differs.
        unsteady: the drift of the less steady of the two runs, as a fraction.
    """

    compared: tuple[Compared, ...]
    versions: tuple[str, ...]
    beside: tuple[str, ...]
    unsteady: float

    def regressions(self, threshold: float) -> tuple[Compared, ...]:
        """What is slower beyond noise, and by more than `threshold`, a fraction."""
        return tuple(one for one in self.compared if one.change.is_regression(threshold))

    def count(self, verdict: Verdict) -> int:
        return sum(one.change.verdict is verdict for one in self.compared)


def differences(before: Results, after: Results) -> list[str]:
    """Why the figures of two results do not mean the same, each in words; none where they do."""
    found = [
        *_differing(MACHINE, before.machine, after.machine),
        *_differing(POWER, before.machine, after.machine),
        *_differing(PAIR, before.pair, after.pair),
        *_differing(SETTINGS, before.settings, after.settings),
    ]
    if before.prompts_hash != after.prompts_hash:
        found.append("the prompts are not the same")
    return found


def _differing(names: dict[str, str], before: Any, after: Any) -> Iterator[str]:
    for key, name in names.items():
        one, other = before.get(key), after.get(key)
        if one != other:
            yield f"{name}: {_said(one)}, then {_said(other)}"


def _said(value: object) -> str:
    if value is None:
        return "unknown"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def compare(before: Results, after: Results) -> Comparison:
    """What became of each cell that both results have.

    The median of a prompt's turns stands for the prompt, and prompts are paired. All comparisons
    share 5% of false alarms.
    """
    earlier = {_key(cell): cell for cell in before.cells}
    both = [(earlier[key], cell) for cell in after.cells if (key := _key(cell)) in earlier]
    paired = [found for one, other in both for found in _paired(one, other)]
    judged = sum(len(old) >= statistics.FEWEST for _, _, old, _ in paired)
    unsteady = max(unsteadiness(before), unsteadiness(after))
    compared = tuple(
        Compared(
            cell,
            what,
            median(old) if what == "tokens/s" else 1 / median(old),
            median(new) if what == "tokens/s" else 1 / median(new),
            change(old, new, comparisons=max(judged, 1), unsteady=unsteady),
        )
        for cell, what, old, new in paired
    )
    versions = tuple(
        f"{name} {_said(before.machine.get(name))}, then {_said(after.machine.get(name))}"
        for name in VERSIONS
        if before.machine.get(name) != after.machine.get(name)
    )
    return Comparison(compared, versions, tuple(_beside(both)), unsteady)


def unsteadiness(results: Results) -> float:
    """By how much the machine drifted during a run, as a fraction; 0 without a trend."""
    both = zip(results.drift.at_s, results.drift.tokens_per_second, strict=False)
    known = [(at, speed) for at, speed in both if speed > 0]
    if not known:
        return 0.0
    drift = statistics.drift(*zip(*known, strict=True))
    return abs(drift.change) if drift.is_trend else 0.0


def _key(cell: Cell) -> Key:
    return (
        cell.question,
        cell.configuration.name,
        cell.prompt_type,
        cell.system,
        cell.temperature,
        cell.context,
        cell.rows,
    )


def _paired(before: Cell, after: Cell) -> Iterator[tuple[Cell, What, list[float], list[float]]]:
    """Speeds of the prompts that both have: of writing, and of reading up to the first token."""
    kinds: tuple[tuple[What, Callable[[Sample], float | None]], ...] = (
        ("tokens/s", lambda one: one.tokens_per_second),
        ("first token", lambda one: 1 / one.ttft_s if one.ttft_s else None),
    )
    for what, speed in kinds:
        one, other = by_prompt(before.samples, speed), by_prompt(after.samples, speed)
        common = [prompt for prompt in one if prompt in other]
        if common:
            yield after, what, [one[p] for p in common], [other[p] for p in common]


def by_prompt(
    samples: Iterable[Sample], value: Callable[[Sample], float | None]
) -> dict[str, float]:
    """The median of each prompt's turns, for those with a value."""
    found: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if (one := value(sample)) is not None and one > 0:
            found[sample.prompt].append(one)
    return {prompt: median(some) for prompt, some in found.items()}


def _beside(both: Sequence[tuple[Cell, Cell]]) -> Iterator[str]:
    """Counts that differ over all prompts: acceptance, memory, and texts of plain decoding."""
    for before, after in both:
        if before.question != "configs":
            continue
        name = after.configuration.name
        one, other = before.acceptance, after.acceptance
        if one and other and one.rate and other.rate and abs(one.rate - other.rate) >= 0.01:
            yield f"{name} had {one.rate:.1%} of its proposals accepted, and now {other.rate:.1%}"
        least, most = before.memory_ratio, after.memory_ratio
        if least and most and abs(most / least - 1) >= 0.02:
            yield (
                f"{name} took {least:.2f} x the memory of the target alone, and now {most:.2f} x"
            )
        if None not in (before.identical, after.identical) and before.identical != after.identical:
            yield (
                f"{name} wrote the text of plain decoding in {before.identical:.1%} of all turns, "
                f"and now in {after.identical:.1%}"
            )
