"""The turns of one group so far, and whether it needs more of them. No MLX."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import inf

from mlxspec.bench.cells import BASELINE
from mlxspec.bench.plan import LEAST_TURNS, Group, steps_of
from mlxspec.bench.prompt_sets import Prompt, Step
from mlxspec.bench.summing import Series, error_of, is_settled, speedup_of


class GroupRun:
    """A group's turns so far.

    series: by the name of an arm; a turn is added once all of its arms are over.
    theirs: of other programs, and the errors of each. A text of theirs may be missing.
    finished: whether more turns would tell nothing more. left_out: steps that do not fit, and why.
    """

    def __init__(self, group: Group, prompts: Sequence[Prompt]) -> None:
        self.group = group
        self.steps = steps_of(group, prompts)
        self.series = {arm.name: Series() for arm in group.arms}
        self.theirs: defaultdict[str, Series] = defaultdict(Series)
        self.errors: defaultdict[str, list[str]] = defaultdict(list)
        self.turns = 0
        self.taken_s = 0.0
        self.finished = False
        self.left_out: list[str] = []
        self.why_left_out = ""

    @property
    def over(self) -> bool:
        """Whether it takes no more turns."""
        return self.finished or not self.steps

    def is_backwards(self, turn: int) -> bool:
        """Whether the last arm begins: in every other turn, and in every other one of a step.

        Whatever grows or shrinks steadily then adds as much to one arm as to another.
        """
        again, at = divmod(turn, max(len(self.steps), 1))
        return (again + at) % 2 == 1

    def settle(self, precision: float) -> None:
        """Decide whether more turns would tell more."""
        base = self.series[BASELINE].samples
        others = [arm.name for arm in self.group.arms if not arm.is_baseline]
        enough = self.turns >= LEAST_TURNS
        self.finished = enough and all(
            is_settled(self.series[name].samples, base, precision) for name in others
        )

    def turns_left(self, precision: float) -> float:
        """About how many turns are missing: an interval narrows with the root of their number."""
        if self.over:
            return 0.0
        base = self.series[BASELINE].samples
        widest = 1.0
        for arm in self.group.arms[1:]:
            samples = self.series[arm.name].samples
            found, error = speedup_of(samples, base), error_of(samples, base)
            widest = max(widest, min(found.precision if found else inf, error) / precision)
        if widest == inf or self.turns < LEAST_TURNS:
            return max(LEAST_TURNS, 2 * len(self.steps)) - self.turns
        return max(1.0, self.turns * (widest**2 - 1))

    def drop(self, step: Step, why: str) -> None:
        """Leave out a step that does not fit, and those that need its answer."""
        gone = [
            one
            for one in self.steps
            if self.group.context or (one.prompt == step.prompt and one.turn >= step.turn)
        ]
        self.left_out += [one.id for one in gone]
        self.why_left_out = why
        self.steps = [one for one in self.steps if one not in gone]

    def give_up(self, why: str) -> None:
        """Take no more turns, because a text failed."""
        self.left_out += [one.id for one in self.steps]
        self.why_left_out = why
        self.steps = []
