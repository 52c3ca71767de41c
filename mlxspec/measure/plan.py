"""How much is measured, so that it fits into a budget of seconds. No MLX, no clock.

A model of which one pass takes a second is measured with fewer rows, texts and repeats than one of
which it takes a hundredth. The plans stand in an order, from all that is worth measuring down to
the least that tells anything, and the first that fits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from mlxspec.measure.forecast import LEFT_TO_AUTO, PLAIN_DECODING, Contender, pass_seconds

DRAFTED = 4  # proposals in the round whose draft steps and host's share are measured
# The share of the budget that measuring the parts may take, and the rest is for the trial; and the
# share that it may take where nothing less tells anything.
PARTS_SHARE, LEAST_SHARE = 0.5, 0.9
AUTO_COST = 1.3  # of a token of `auto`, in plain ones, for a trial that must not take too long
UNLIMITED = 2**31 - 1
BUILDING_SHARE = 0.05  # of a text's time, for building a round in a trial without a warm-up
WHOLE_REPEATS = 3  # of a trial
LEAST_TOKENS = 12  # of a text that is decoded in a trial

# The parts of a measurement, in words that leave room for a bar.
LOOK = "timing a pass of each model"
FIRST_PASSES = "timing first passes"
PASSES = "timing passes"
TEXTS = "writing plain texts"
RUNNING = "timing rounds"
STEPS = "timing draft steps"
TRIAL = "trying on texts"


@dataclass(frozen=True)
class Plan:
    """How much of each part is measured.

    rows: of the passes that are timed. repeats: of each pass, and of each draft step.
    turns, rounds: texts whose rounds are timed, and rounds of each.
    texts: prompts on which acceptance is counted, at least. tokens: of each text, and prompt: the
        most tokens of each prompt that are read, the last ones.
    warm_up: whether a turn goes before that does not count, because it traces.
    """

    rows: tuple[int, ...]
    repeats: int
    turns: int
    rounds: int
    texts: int
    tokens: int
    prompt: int = UNLIMITED
    warm_up: bool = True


PLANS = (
    Plan((*range(1, 17), 32), repeats=7, turns=3, rounds=30, texts=4, tokens=96),
    Plan((*range(1, 10), 16, 32), repeats=4, turns=2, rounds=16, texts=3, tokens=64, prompt=1024),
    Plan((1, 2, 3, 5, 9, 16, 32), repeats=3, turns=2, rounds=8, texts=2, tokens=48, prompt=256),
    Plan((1, 2, 3, 5, 9, 32), repeats=2, turns=1, rounds=6, texts=1, tokens=32, prompt=64),
    Plan((1, 2, 3, 5), 1, turns=1, rounds=3, texts=1, tokens=16, prompt=16, warm_up=False),
)
ALL = PLANS[0]


@dataclass(frozen=True)
class Pace:
    """Times in seconds that are known before a plan is made.

    pass_s: T(M). draft_s: one-row passes of all drafts, and passes of heads, added up. drafts: how
        many there are, and heads: how many of them.
    building_s: what the first pass of a number of rows takes more than the next ones.
    start: tokens before the passes that are timed.
    """

    pass_s: Mapping[int, float]
    draft_s: float
    drafts: int
    building_s: float
    start: int
    heads: int = 0

    def rows_s(self, rows: int) -> float:
        return pass_seconds(self.pass_s, rows)

    def reading_s(self, tokens: int) -> float:
        """Seconds in which the target reads a prompt, at the pace of its longest pass."""
        longest = max(self.pass_s)
        return tokens * self.pass_s[longest] / longest

    def expected(self, plan: Plan, prompts: Sequence[int]) -> dict[str, float]:
        """Seconds of each part.

        Args:
            prompts: their lengths in tokens.
        """
        read = sum(min(length, plan.prompt) for length in prompts)
        written = len(prompts) * plan.tokens
        passes = sum(map(self.rows_s, plan.rows))
        plain, begun = self.rows_s(1), self.reading_s(self.start)
        drafting = self.rows_s(DRAFTED + 1) + (DRAFTED + 1) * self.draft_s
        # Two rounds go before those that count, and one is in flight behind them.
        rounds = plan.rounds + 3
        running = begun + rounds * plain + self.drafts * (begun + rounds * drafting)
        steps = begun + plain + 2 * drafting
        steps += (plan.repeats + 1) * (drafting + self.rows_s(2) + 2 * self.draft_s)
        new_shapes = 2 * (1 + self.drafts) * self.building_s
        return {
            PASSES: (plan.repeats + plan.warm_up) * passes + len(plan.rows) * self.building_s,
            TEXTS: self.reading_s(read) + written * plain,
            RUNNING: (plan.turns + plan.warm_up) * running + new_shapes,
            STEPS: self.drafts * steps
            + (read + written) * self.draft_s
            + self.heads * (self.reading_s(read) + written * plain)  # they propose along it
            + new_shapes,
        }


class Chosen(NamedTuple):
    """A plan, the prompts that are taken, by their places, and the seconds of each part."""

    plan: Plan
    prompts: list[int]
    parts: dict[str, float]


def chosen(pace: Pace, prompts: Sequence[int], budget_s: float) -> Chosen | None:
    """The first plan that fits, with as many of the prompts as fit; None where none does.

    Args:
        prompts: their lengths in tokens.
    """
    for plan in PLANS:
        places = list(range(len(prompts)))
        if plan != ALL:  # short ones take the least time
            places.sort(key=lambda at: prompts[at])
        fits = None
        least = min(plan.texts, len(places))
        for count in range(least, len(places) + 1):
            share = LEAST_SHARE if plan == PLANS[-1] and count == least else PARTS_SHARE
            parts = pace.expected(plan, [prompts[at] for at in places[:count]])
            if sum(parts.values()) > share * budget_s:
                break
            fits = Chosen(plan, sorted(places[:count]), parts)
        if fits is not None:
            return fits
    return None


def least_s(pace: Pace, prompts: Sequence[int]) -> float:
    """The seconds in which `chosen` would take the last of the plans."""
    parts = pace.expected(PLANS[-1], [min(prompts)])
    return sum(parts.values()) / LEAST_SHARE


def enough(seconds: float) -> int:
    """A budget in which that fits, although a larger one lets the first passes take longer."""
    return ceil(seconds * 1.25 / 10) * 10


@dataclass(frozen=True)
class Trial:
    """What is decoded to see how fast it is: texts of `tokens` tokens, `repeats` times.

    texts: how many of the prompts. warm_up: whether a turn goes before that does not count.
    """

    contenders: tuple[Contender, ...]
    texts: int
    tokens: int
    repeats: int
    warm_up: bool = True

    def seconds(self, reading_s: Sequence[float], per_token: Mapping[Contender, float]) -> float:
        """Seconds that it takes.

        Args:
            reading_s: of each prompt. per_token: seconds by contender.
        """
        turns = self.repeats + self.warm_up
        reading = len(self.contenders) * sum(reading_s[: self.texts])
        written = self.texts * self.tokens
        return turns * (reading + written * sum(per_token[one] for one in self.contenders))

    def bears(self, building_s: float, plain_s: float) -> bool:
        """Whether building a round, once, does not change what is measured.

        Args:
            building_s: seconds of that. plain_s: of a plain round.
        """
        return self.warm_up or building_s <= BUILDING_SHARE * self.tokens * plain_s


def trials(contenders: Sequence[Contender], texts: int, tokens: int) -> Iterator[Trial]:
    """Trials from the best to the least.

    Args:
        contenders: plain decoding, the numbers of draft tokens that promise most, and `auto`.
    """
    plain, *some, auto = contenders
    most = len(some)
    whole = Trial(tuple(contenders), texts, tokens, WHOLE_REPEATS)
    for count, repeats in ((most, 3), (most, 2), (2, 2), (most, 1), (2, 1), (1, 1)):
        yield replace(whole, contenders=(plain, *some[:count], auto), repeats=repeats)
    while tokens >= LEAST_TOKENS:
        for fewer in dict.fromkeys((texts, (texts + 1) // 2, 1)):
            few = replace(whole, texts=fewer, tokens=tokens, repeats=1, warm_up=False)
            yield replace(few, contenders=(plain, *some[:1], auto))
        tokens //= 2


def left_out(taken: Chosen, trial: Trial | None, whole: Trial | None, prompts: int) -> list[str]:
    """What is measured in place of all, in words.

    Args:
        trial: None where nothing is tried. whole: the best of the trials; None before they are
            known.
        prompts: how many there are.
    """
    plan, words = taken.plan, []
    if plan.rows != ALL.rows:
        words.append(f"passes over {', '.join(map(str, plan.rows))} rows")
    if len(taken.prompts) < prompts:
        words.append(f"{len(taken.prompts)} of {prompts} prompts")
    if plan.prompt < UNLIMITED:
        words.append(f"at most {plan.prompt} tokens of a prompt")
    if plan.tokens < ALL.tokens:
        words.append(f"{plan.tokens} tokens of each text")
    if whole is None or trial == whole:
        return words
    if trial is None:
        return [*words, "no trial"]
    how = [{1: "once", 2: "twice"}[trial.repeats]] if trial.repeats < WHOLE_REPEATS else []
    if len(trial.contenders) < len(whole.contenders):
        how.append(f"{len(trial.contenders)} of {len(whole.contenders)} ways to decode")
    if trial.texts < whole.texts:
        how.append(f"{trial.texts} of {whole.texts} texts")
    if trial.tokens < whole.tokens:
        how.append(f"{trial.tokens} tokens of each")
    return [*words, f"a trial of {', '.join(how)}".replace("trial of once", "trial, once")]


def per_token(options: Mapping[Contender, float], plain_s: float) -> dict[Contender, float]:
    """Seconds of a token by contender.

    `auto` may take longer than plain decoding, because it tries what does not pay.

    Args:
        options: the expected speed-ups.
    """
    return {PLAIN_DECODING: plain_s, LEFT_TO_AUTO: AUTO_COST * plain_s} | {
        one: plain_s / speed_up for one, speed_up in options.items() if one.draft_tokens
    }
