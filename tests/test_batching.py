"""The controller of several texts, on machines where the gain rises and falls with their number.

T(M)/T(1) is what a pass over M rows costs. A round that was never run has to be built first, which
takes as long as several rounds. Texts are short, so there is little time to find out anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import exp, inf


from mlxspec.control.policies import Controllers
from mlxspec.control.estimates import Learned
from mlxspec.control.policy import FixedPolicy, Outlook, Policy
from mlxspec.device.lengths import attended
from mlxspec.drafters.proposals import PLAIN, Choice, Offer

MOST = 8
ROWS = (1, 2, 4, 8, 16, 32)
BUILDING = 5.0  # plain rounds

M3_MAX = {1: 1.0, 2: 1.0, 4: 1.28, 6: 2.04, 8: 2.5, 10: 3.9, 32: 3.9}
CPU = {1: 1.0, 2: 1.35, 4: 2.2, 8: 3.1, 16: 5.2, 32: 9.0, 64: 17.0}


def between(points: dict[int, float], rows: int) -> float:
    """Along lines between what was measured, and beyond it."""
    if rows == 1:
        return points[1]
    known = sorted(points.items())
    (a, low), (b, high) = next((two for two in pairwise(known) if rows <= two[1][0]), known[-2:])
    return low + (high - low) * (rows - a) / (b - a)


def tiled(rows: int) -> float:
    """A tile of the quantised product holds 32 rows, and more rows take more tiles."""
    whole, rest = divmod(rows, 32)
    return whole * M3_MAX[32] + (between(M3_MAX, rest) if rest else 0)


MACHINES: dict[str, Callable[[int], float]] = {
    "tiles of 32 rows": tiled,
    "every row costs": lambda rows: between(CPU, rows),
    "rows are free": lambda rows: 1 + 0.004 * rows,
    "a row costs a pass": float,
}
KINDS = {"mixed": (0.2, 0.5, 0.8), "good": (0.8,), "poor": (0.1, 0.2)}


@dataclass
class Text:
    """A text to write: how often its proposals are right, a model's and its own."""

    left: int
    rate: float
    copies: float | None
    length: int = 60


def texts_of(kind: str, count: int, seed: int) -> list[Text]:
    rng = random.Random(seed)
    return [
        Text(
            rng.randint(32, 128),
            rng.choice(KINDS[kind]),
            0.9 if kind == "mixed" and rng.random() < 0.1 else None,
            rng.randint(30, 120),
        )
        for _ in range(count)
    ]


@dataclass
class Machine:
    """Writes texts, a round at a time; `graphs` are those that it has built."""

    curve: Callable[[int], float]
    rng: random.Random
    graphs: set[tuple[object, ...]] = field(default_factory=set)
    seconds: float = 0.0
    tokens: int = 0

    def cost(self, rows: int, choice: Choice) -> float:
        steps = choice.draft_tokens if choice.drafter == "model" else 0
        pass_s = self.curve(rows * (choice.draft_tokens + 1))
        return 0.02 + pass_s + steps * 0.1 * self.curve(rows)

    def shape(self, rows: int, choice: Choice, texts: Iterable[Text]) -> tuple[object, ...]:
        longest = max(text.length for text in texts)
        drafter = choice.drafter if choice.drafter in ("model", "") else "text"
        return rows, drafter, choice.draft_tokens, attended(longest + choice.draft_tokens + 1)

    def round(self, policy: Policy, rows: int, texts: list[Text], left: float) -> None:
        def is_new(choice: Choice) -> bool:
            return self.shape(rows, choice, texts) not in self.graphs

        offers = [
            [Offer("history", 31, 4)]
            if one.copies and one.left // 16 % 2 and not isinstance(policy, FixedPolicy)
            else []
            for one in texts
        ]
        longest = max(text.length for text in texts)
        if rows == 1:
            choice = policy.choose(longest, offers[0])
            whole, choices = choice, (choice,)
        else:
            whole, choices = policy.plan(longest, offers, Outlook(left, is_new))
        took = self.cost(rows, whole) * exp(self.rng.gauss(0, 0.04))
        plain = self.cost(rows, PLAIN)
        shape = self.shape(rows, whole, texts)
        if shape in self.graphs:
            policy.took(whole, took)
        else:
            self.graphs.add(shape)
            self.seconds += BUILDING * plain
            policy.built(BUILDING * plain)
        self.seconds += took
        for text, one in zip(texts, choices, strict=True):
            rate = text.rate if one.drafter == "model" else text.copies or 0.0
            accepted = 0
            while accepted < one.draft_tokens and self.rng.random() < rate:
                accepted += 1
            policy.kept(one, accepted)
            brought = min(accepted + 1, text.left)
            text.left -= brought
            text.length += brought
            self.tokens += brought

    def write(self, policy_of: Callable[[int], Policy], most: int, texts: list[Text]) -> float:
        """Write all texts, `most` at a time, one joining a round; returns the speed."""
        seconds, tokens, waiting = self.seconds, self.tokens, list(texts)
        writing: list[Text] = []
        rows, idle = 0, 0
        while waiting or writing:
            if waiting and len(writing) < most:
                writing.append(waiting.pop(0))
            needed = next(one for one in ROWS if one >= len(writing))
            idle = idle + 1 if needed < rows else 0
            if needed > rows or idle > 4:
                rows, idle = needed if needed > rows else rows // 2, 0
                policy = policy_of(rows)
            lefts = sorted((text.left for text in writing), reverse=True)
            left = inf if waiting else lefts[min(rows // 2, len(lefts) - 1)]
            self.round(
                policy, rows, writing, 0 if waiting and len(writing) == rows < most else left
            )
            writing = [text for text in writing if text.left]
        return (self.tokens - tokens) / (self.seconds - seconds)


SEED = 7


@cache
def fixed(machine: str, kind: str, rows: int, count: int, draft_tokens: int) -> float:
    policy = FixedPolicy(["model"], draft_tokens)
    one = Machine(MACHINES[machine], random.Random(SEED))
    return one.write(lambda _: policy, rows, texts_of(kind, count, SEED))


def best(machine: str, kind: str, rows: int, count: int) -> float:
    return max(fixed(machine, kind, rows, count, k) for k in range(MOST + 1))


def learned_from(machine: str, kind: str, rows: int, count: int) -> tuple[Learned, Machine]:
    learned = Learned()
    one = Machine(MACHINES[machine], random.Random(SEED + 1))
    policies = Controllers({"model": MOST}, learned, 100)
    one.write(policies, rows, texts_of(kind, count, SEED + 1))
    for number, policy in policies._made.items():
        learned.learn(100, policy.knowledge(), number)
    return learned, one


def auto(machine: str, kind: str, rows: int, count: int, learned: Learned) -> float:
    one = Machine(MACHINES[machine], random.Random(SEED))
    return one.write(Controllers({"model": MOST}, learned, 100), rows, texts_of(kind, count, SEED))


if __name__ == "__main__":
    import sys
    import time

    for machine in MACHINES:
        for kind in KINDS:
            for rows in ROWS if len(sys.argv) < 2 else map(int, sys.argv[1:]):
                n = 24 * rows
                t = time.perf_counter()
                cold = auto(machine, kind, rows, n, Learned())
                t = time.perf_counter() - t
                learned, _ = learned_from(machine, kind, rows, n)
                warm = auto(machine, kind, rows, n, learned)
                short = auto(machine, kind, rows, 2 * rows, learned)
                b, p = best(machine, kind, rows, n), fixed(machine, kind, rows, n, 0)
                bs, ps = (
                    best(machine, kind, rows, 2 * rows),
                    fixed(machine, kind, rows, 2 * rows, 0),
                )
                print(
                    f"{machine:20} {kind:6} {rows:3} best/plain {b / p:.2f} cold {cold / b:.3f} {cold / p:.3f} warm {warm / b:.3f} {warm / p:.3f} short({bs / ps:.2f}) {short / bs:.3f} {short / ps:.3f}  {t:.1f}s",
                    flush=True,
                )
