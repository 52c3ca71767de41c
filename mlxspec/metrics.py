"""The events, counts and times of a generation: plain numbers, no arrays, no clock.

The events that a session yields and the summary that every consumer prints are defined here, so
that a display or a server needs neither MLX nor the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mlxspec.conversations import ToolCall
from mlxspec.params import SamplingParams
from mlxspec.parked import Parked

FinishReason = Literal["stop", "length", "interrupted", "error"]
Place = Literal["text", "reasoning", "call"]  # in an answer
TARGET = "target"  # in place of a drafter's name: the author of tokens that no drafter proposed

Tell = Callable[[str], None]  # called with one line for people


def silent(line: str) -> None:
    """A `Tell` that nobody hears."""


@dataclass(frozen=True)
class RoundStats:
    """One round of one sequence.

    `drafted` tokens were proposed by `drafter` and `accepted` of them kept, in order from the
    first. A round that the end of the text cut short is not `full` and does not count towards
    acceptance. `parked` says why nothing was proposed, where a controller decided so.
    """

    drafted: int
    accepted: int
    full: bool = True
    drafter: str = ""
    parked: Parked | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of text and who wrote it: the draft, with the target's consent, or the target.

    `reasoning` tells the model's thinking from its answer. `upstream` says that another host wrote
    it, which was asked beside the target.
    """

    text: str
    from_draft: bool
    reasoning: bool = False
    upstream: bool = False


class Progress(NamedTuple):
    """`done` of `total` steps of a part of a measurement are over.

    what: the part, in words. left_s: seconds until the whole measurement is likely to be over;
        None where that is not known yet. detail: what else is known at this moment.
    """

    what: str
    done: int
    total: int
    left_s: float | None = None
    detail: str = ""


class PrefillProgress(NamedTuple):
    """`read` of a prompt's `total` tokens are read."""

    read: int
    total: int


@dataclass(frozen=True)
class Logprob:
    """How likely the target found a token where it stands: a natural logarithm, at most 0.

    It is the target's own, before biases, penalties, filters and temperature. `top` holds the
    likeliest tokens in that place with theirs, the likeliest first. `place` is where in the answer
    the token stands; a mark belongs to what it begins or ends.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    place: Place = "text"


@dataclass(frozen=True)
class Event:
    """The tokens that one round committed; or, with `prefill` set, the progress of prefill.

    `tokens` are the round's token ids, without an end-of-text token, and `from_draft` says of
    each whether it was proposed. `pieces` is the text that became final: it may lag behind the
    tokens while a stop string or a character is incomplete. `finish_reason` is set on the last
    event only. `notes` are lines for people about anything else that happened. `logprobs` has one
    for each token, where the request asks for them. `tool_calls` ended with this text, where
    an empty piece, a `Called`, stands for them.
    """

    tokens: tuple[int, ...] = ()
    from_draft: tuple[bool, ...] = ()
    pieces: tuple[Piece, ...] = ()
    round: RoundStats | None = None
    finish_reason: FinishReason | None = None
    notes: tuple[str, ...] = ()
    prefill: PrefillProgress | None = None
    logprobs: tuple[Logprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The answer's part."""
        return "".join(piece.text for piece in self.pieces if not piece.reasoning)

    @property
    def reasoning(self) -> str:
        return "".join(piece.text for piece in self.pieces if piece.reasoning)


@dataclass
class Timing:
    """Seconds of wall-clock time. `decode_s` runs from the end of prefill to the last token."""

    load_s: float = 0.0
    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where a round's time goes, as fractions that add up to 1."""

    draft: float
    verify: float
    host: float


class Visit(NamedTuple):
    """From round `round` on, counted from 0, `drafter` proposed `draft_tokens` tokens in each."""

    round: int
    drafter: str
    draft_tokens: int


@dataclass
class Source:
    """The counts of one drafter over its own full rounds."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, stats: RoundStats) -> None:
        self.rounds += 1
        self.drafted += stats.drafted
        self.accepted += stats.accepted

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted


@dataclass
class SpeculationStats:
    """Acceptance over the rounds so far. Rates are None until there is a full round.

    draft_tokens: K, or the largest where it is chosen round by round (`auto`).
    drafted_by_position, accepted_by_position: the number of full rounds that proposed a token at
        each position, and that kept it; K numbers, or with `auto` as many as the longest proposal.
    by_source: the counts of each drafter, by name.
    history: an entry for every change of drafter or K.
    """

    draft_tokens: int
    enabled: bool = True
    rule: str = "greedy"
    auto: bool = False
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    full_rounds: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    by_source: dict[str, Source] = field(default_factory=dict)
    history: list[Visit] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.auto:
            self._reach(self.draft_tokens)

    def add(self, stats: RoundStats) -> None:
        doing = stats.drafter, stats.drafted
        if not self.history or self.history[-1][1:] != doing:
            self.history.append(Visit(self.rounds, *doing))
        self.rounds += 1
        if not stats.full:
            return
        self.full_rounds += 1
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        if stats.drafted:
            self.by_source.setdefault(stats.drafter, Source()).add(stats)
        self._reach(stats.drafted)
        for position in range(stats.drafted):
            self.drafted_by_position[position] += 1
            self.accepted_by_position[position] += position < stats.accepted

    def _reach(self, position: int) -> None:
        missing = [0] * (position - len(self.drafted_by_position))
        self.drafted_by_position += missing
        self.accepted_by_position += missing

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted over full rounds."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """The mean number of tokens that a full round commits, the target's own included."""
        return 1 + self.accepted / self.full_rounds if self.full_rounds else None

    @property
    def is_exact(self) -> bool:
        """Whether the text is distributed as the target's own: not under the relaxed rule."""
        return not self.enabled or self.rule != "relaxed"

    def as_dict(self) -> dict[str, Any]:
        return {
            "enabled": self.enabled,
            "draft_tokens": "auto" if self.auto else self.draft_tokens,
            "verify": self.rule,
            "exact": self.is_exact,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": _rounded(self.acceptance_rate),
            "tokens_per_round": _rounded(self.tokens_per_round),
            "drafted_by_position": self.drafted_by_position,
            "accepted_by_position": self.accepted_by_position,
            "by_source": {
                name: vars(source) | {"acceptance_rate": _rounded(source.acceptance_rate)}
                for name, source in self.by_source.items()
            },
            "history": [visit._asdict() for visit in self.history],
        }


@dataclass
class Generation:
    """The whole result of one prompt; grows by `add` while the text is being written.

    `tokens` are ids without the end-of-text token. `text` is the answer; where the model marks its
    reasoning, that is in `reasoning`, and the marks are in neither. `written_by` counts tokens by
    author: the drafter that proposed one, or "target". `peak_gb` is MLX's peak memory in 10⁹ bytes.
    `cached_prompt_tokens` are those of the prompt that came from a file and were not read.
    `reasoning_tokens` are those of `tokens` that the reasoning has. `stopped_by` is the stop string
    that ended the text, where one did.
    `logprobs` has one for each token, where the request asks for them.
    """

    prompt_tokens: int
    speculation: SpeculationStats
    sampling: SamplingParams
    timing: Timing = field(default_factory=Timing)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    finish_reason: FinishReason = "interrupted"
    peak_gb: float = 0.0
    notes: list[str] = field(default_factory=list)
    cached_prompt_tokens: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)
    written_by: dict[str, int] = field(default_factory=dict)
    reasoning_tokens: int = 0
    stopped_by: str | None = None
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        """The seed of the random numbers; None where none was drawn yet."""
        return self.sampling.seed

    def add(self, event: Event) -> None:
        self.tokens.extend(event.tokens)
        self.logprobs.extend(event.logprobs)
        for proposed in event.from_draft:
            author = event.round.drafter if proposed and event.round is not None else TARGET
            self.written_by[author] = self.written_by.get(author, 0) + 1
        self.text += event.text
        self.reasoning += event.reasoning
        self.tool_calls.extend(event.tool_calls)
        self.notes.extend(event.notes)
        if event.round is not None:
            self.speculation.add(event.round)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of decoding, prefill not included."""
        return len(self.tokens) / self.timing.decode_s if self.timing.decode_s else None

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values, rates rounded to four digits, for JSON."""
        timing = {name: round(value, 6) for name, value in vars(self.timing).items()}
        timing["tokens_per_second"] = _rounded(self.tokens_per_second)
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_prompt_tokens": self.cached_prompt_tokens,
            "tokens": self.tokens,
            "text": self.text,
            "reasoning": self.reasoning,
            "reasoning_tokens": self.reasoning_tokens,
            "tool_calls": [call.as_dict() for call in self.tool_calls],
            "finish_reason": self.finish_reason,
            "stopped_by": self.stopped_by,
            "written_by": self.written_by,
            "seed": self.seed,
            "sampling": self.sampling.as_dict(),
            "notes": self.notes,
            "speculation": self.speculation.as_dict(),
            "timing": timing,
            "memory": {"peak_gb": round(self.peak_gb, 4)},
        }


def speed(tokens_per_second: float) -> str:
    """Tokens per second in digits, with a decimal where one counts: below 20."""
    return f"{tokens_per_second:.{0 if tokens_per_second >= 20 else 1}f}"


def counted(count: int, what: str) -> str:
    """A number of things in words: 1 token, 2 tokens."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
