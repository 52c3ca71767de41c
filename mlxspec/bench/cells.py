"""The cells of `results.json`: what was measured with each way of decoding. No MLX.

A *configuration* is a way of decoding: `none`, a K, `auto`, or a K with a drafter or a rule. A
*turn* is one prompt, decoded once with every configuration of a group, in one order, and in the
next turn in the other; speeds are compared within a turn. A *cell* is one configuration under one
set of conditions, with the samples of all its turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlxspec.bench.statistics import Interval

Question = Literal["configs", "prompts", "system", "sampling", "context", "rows"]
Ended = Literal["stop", "length", "interrupted", "error"]
BASELINE = "none"  # the configuration that all others are compared with: plain decoding


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text, or several side by side, written once.

    Args:
        turn: counted from 0 within its group; the samples of one turn have the same prompt.
        place: its place in the whole run, counted from 0, so that the order can be seen.
        at_s: seconds from the beginning of the run to the beginning of the sample.
        prompt: the prompt's id. prompt_tokens: its length.
        tokens: written; with several rows, by all of them.
        tokens_per_second: of decoding, from the first token to the last; with several rows, of all
            of them together. None where only one token was written.
        ttft_s: from the request to the first token. total_s: from the request to the end.
        gap_p50_s, gap_p95_s: between tokens, as they arrive: the tokens of a round come together,
            the first of them after the round's time and the others after none.
        peak_bytes: the peak of MLX's memory, the models included.
        ended: why the text ended.
        identical: whether the text is the one that plain decoding wrote in the same turn; None
            where the rule does not promise that, and for plain decoding itself.
    """

    turn: int
    place: int
    at_s: float
    prompt: str
    prompt_tokens: int
    tokens: int
    tokens_per_second: float | None
    ttft_s: float | None
    total_s: float
    gap_p50_s: float | None = None
    gap_p95_s: float | None = None
    peak_bytes: int | None = None
    ended: Ended = "length"
    identical: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The full rounds of one drafter."""

    rounds: int
    drafted: int
    accepted: int


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Over the full rounds of all samples.

    Args:
        rate: accepted / drafted. tokens_per_round: the target's own token included.
        drafted_by_position, accepted_by_position: rounds that proposed, and kept, a token at each
            position, from the first.
        by_source: by the drafter's name.
    """

    rounds: int
    drafted: int
    accepted: int
    rate: float | None
    tokens_per_round: float | None
    drafted_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    by_source: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Mean seconds of a round, and where they go: drafting, verifying, and the host."""

    round_s: float
    draft_s: float
    verify_s: float
    host_s: float


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is the same for all configurations that are compared.

    Args:
        prompt_type: empty where prompts of every type take turns.
        system: the name of the system prompt, `none` without one.
        context: tokens of the prompt, where they were made as long; 0 where prompts are as they
            are.
        rows: texts side by side.
    """

    prompt_type: str = ""
    system: str = "none"
    temperature: float = 0.0
    context: int = 0
    rows: int = 1

    def of(self, question: Question) -> str:
        """What a question asks about, in words; empty where it compares configurations."""
        return {
            "configs": "",
            "prompts": self.prompt_type,
            "system": self.system,
            "sampling": f"{self.temperature:g}",
            "context": str(self.context),
            "rows": str(self.rows),
        }[question]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A way of decoding.

    Args:
        name: as `--configs` spells it: none, 3, auto, history:5, block:3, cold:auto, serial:auto.
        draft_tokens: K, the most where it is chosen round by round; 0 is plain decoding.
        auto: whether the drafter and K are chosen round by round.
        drafter: the one that alone proposes; empty where the pair's own do.
        rule: of verification; empty for the one that the temperature implies.
        cold: whether each text begins with nothing learned from earlier ones.
        serial: whether texts side by side are written one after the other.
    """

    name: str
    draft_tokens: int
    auto: bool = False
    drafter: str = ""
    rule: str = ""
    cold: bool = False
    serial: bool = False

    @property
    def is_baseline(self) -> bool:
        return self.name == BASELINE


@dataclass(frozen=True, kw_only=True)
class Cell(Conditions):
    """One configuration under one set of conditions.

    Args:
        question: the table that the cell belongs to. A sample that fits several questions is in a
            cell of each.
        rule: that verified, in full, such as `greedy`. exact: whether the text is distributed as
            the target's own under it.
        speedup: over the baseline under the same conditions; None for the baseline, and where
            there is no turn of both.
        predicted: the speed-up with the same acceptance if a round took its drafting and its
            verifying, each timed alone, and nothing else.
        identical: the share of samples whose text is the one of plain decoding.
        memory_ratio: peak memory over that of the target alone with the same text.
        finished: whether its interval became narrow enough, or as narrow as these prompts allow.
    """

    question: Question
    configuration: Configuration
    rule: str = "greedy"
    exact: bool = True
    samples: tuple[Sample, ...] = ()
    acceptance: Acceptance | None = None
    round: Round | None = None
    speedup: Interval | None = None
    predicted: float | None = None
    identical: float | None = None
    memory_ratio: float | None = None
    finished: bool = False

    @property
    def row(self) -> str:
        """What tells the cell from the others of its question and configuration, in words."""
        return self.of(self.question) or self.configuration.name
