"""What `mlxspec bench` leaves: the schema of `results.json`, version 1. No MLX.

Every value is a plain one: seconds, tokens per second, bytes, shares between 0 and 1, and ratios.
A value that could not be measured is null. Whoever reads a file of another version, or one with a
field that is missing, unknown or of another type, gets one `UsageError` that names the place.

A *configuration* is a way of decoding: `none`, a K, `auto`, or a K with a drafter or a rule. A
*turn* is one prompt, decoded once with every configuration of a group, forwards in even turns and
backwards in odd ones; speeds are compared within a turn. A *cell* is one configuration under one
set of conditions, with the samples of all its turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal

from mlxspec.bench.strict import WrongValue, decoded
from mlxspec.errors import UsageError
from mlxspec.files import replacing

SCHEMA = 1

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
class Speedup:
    """A ratio of tokens per second over the baseline's, paired by turn: median and interval."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval over the median: what `--precision` asks for."""
        return (self.high - self.low) / 2 / self.median


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
class Configuration:
    """A way of decoding.

    Args:
        name: as `--configs` spells it: none, 3, auto, history:5, block:3.
        draft_tokens: K, the most where it is chosen round by round; 0 is plain decoding.
        auto: whether the drafter and K are chosen round by round.
        drafter: the one that alone proposes; empty where the pair's own do.
        rule: of verification; empty for the one that the temperature implies.
    """

    name: str
    draft_tokens: int
    auto: bool = False
    drafter: str = ""
    rule: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.name == BASELINE


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration under one set of conditions.

    Args:
        question: the table that the cell belongs to. A sample that fits several questions is in a
            cell of each.
        prompt_type: empty where prompts of every type take turns.
        system: the name of the system prompt, `none` without one.
        context: tokens of the prompt, where they were made as long; 0 where prompts are as they
            are.
        rows: texts side by side.
        rule: that verified, in full, such as `greedy`. exact: whether the text is distributed as
            the target's own under it.
        speedup: over the baseline under the same conditions; None for the baseline, and where
            there is no turn of both.
        predicted: the speed-up that the parts of a round and the acceptance give.
        identical: the share of samples whose text is the one of plain decoding.
        memory_ratio: peak memory over that of the target alone with the same text.
        finished: whether its interval became narrow enough, or it needs none.
    """

    question: Question
    configuration: Configuration
    prompt_type: str = ""
    system: str = "none"
    temperature: float = 0.0
    context: int = 0
    rows: int = 1
    rule: str = "greedy"
    exact: bool = True
    samples: tuple[Sample, ...] = ()
    acceptance: Acceptance | None = None
    round: Round | None = None
    speedup: Speedup | None = None
    predicted: float | None = None
    identical: float | None = None
    memory_ratio: float | None = None
    finished: bool = False

    @property
    def row(self) -> str:
        """What tells the cell from the others of its question and configuration, in words."""
        return {
            "configs": self.configuration.name,
            "prompts": self.prompt_type,
            "system": self.system,
            "sampling": f"{self.temperature:g}",
            "context": str(self.context),
            "rows": str(self.rows),
        }[self.question]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The machine's own: the same text decoded plainly again and again during the run.

    Args:
        at_s, tokens_per_second: of each time.
        spread: half of the middle 90% of the speeds over their median.
        trend: the median speed of the last third over that of the first.
        noisy: whether the machine is too noisy to tell what `precision` asks for.
        words: what that means, one sentence.
    """

    at_s: tuple[float, ...] = ()
    tokens_per_second: tuple[float, ...] = ()
    spread: float | None = None
    trend: float | None = None
    noisy: bool = False
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another program on the same prompts.

    Args:
        name: such as `mlx-lm`, `LM Studio`. url: of a server; empty in the same process.
        status: measured, or why it was not. words: what there is to say, one sentence.
        model: as the server names it.
        configuration: how it decodes, as far as it is known: `none`, `3`; empty where not.
        counted_by: what counted the tokens: the server's `usage`, or our tokenizer.
        samples: paired with ours by turn.
        over: its tokens per second over those of our baseline. ours_over: those of our
            configuration of that name, or the recommended one, over its own.
    """

    name: str
    status: Literal["measured", "running", "refused", "absent", "failed"]
    words: str = ""
    url: str = ""
    model: str = ""
    configuration: str = ""
    counted_by: Literal["", "usage", "tokenizer", "tokens"] = ""
    samples: tuple[Sample, ...] = ()
    acceptance: Acceptance | None = None
    over: Speedup | None = None
    ours_over: Speedup | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A round of one K, or a pass of K + 1 rows.

    Args:
        round_s: of the whole round; None where nothing drafts.
        verify_s: of the target's pass over K + 1 rows. draft_s: of K draft steps.
        over_plain: verify_s over that of K = 0, T(K + 1)/T(1).
        round_over_plain: round_s over a plain round.
        pays_above: the acceptance rate at which K begins to pay; None where it never does.
    """

    draft_tokens: int
    verify_s: float
    over_plain: float
    draft_s: float | None = None
    host_s: float | None = None
    round_s: float | None = None
    round_over_plain: float | None = None
    pays_above: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What does not depend on the values of weights, measured with random ones.

    Args:
        target, draft: as `--shape` spells them; an empty draft drafts nothing.
        plain_s: of a plain round. costs: one for each K, from 0 on.
        target_bytes, draft_bytes: of the weights. peak_bytes: of MLX's memory in all.
    """

    target: str
    draft: str = ""
    context: int = 0
    plain_s: float
    costs: tuple[Cost, ...] = ()
    target_bytes: int = 0
    draft_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The configuration to use here.

    Args:
        words: one sentence with the reason.
        best, worst: the prompt types that gain most and least; empty where none was compared.
    """

    configuration: Configuration
    speedup: Speedup | None
    words: str
    best: str = ""
    worst: str = ""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something to be wary of, and why.

    Args:
        kind: slower than the baseline; under 10 tokens/s; high acceptance without a gain; the
            texts of an exact rule differ; the machine drifts; its power or heat; not finished.
    """

    kind: Literal["slower", "slow", "no_gain", "different", "drift", "machine", "unfinished"]
    words: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole run.

    Args:
        created: when it began, ISO 8601 with the zone. finished: whether it was not interrupted.
        seconds: that it took.
        machine: system, processor, device, versions of python, mlxspec, mlx and mlx-lm; on a Mac
            also power_mode, on_battery and thermal_state.
        settings: every option by name, and what follows from it.
        prompts_hash: SHA-256 of the prompts, in order, with their types.
        pair: its name, target, drafts, quantisation and bytes of each.
    """

    schema: int = SCHEMA
    created: str
    finished: bool
    seconds: float
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    prompts_hash: str
    pair: Mapping[str, Any]
    drift: Drift = Drift()
    cells: tuple[Cell, ...] = ()
    peers: tuple[Peer, ...] = ()
    shape: tuple[Shape, ...] = ()
    recommendation: Recommendation | None = None
    warnings: tuple[Remark, ...] = ()

    def of(self, question: Question) -> tuple[Cell, ...]:
        """The cells of one question, in order."""
        return tuple(cell for cell in self.cells if cell.question == question)

    def as_json(self) -> str:
        """The file, as `--json` and `--report` write it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file whole, in place of an older one."""
        with replacing(path) as file:
            file.write(self.as_json().encode())


def of_json(text: str, where: str = "The results") -> Results:
    """What `as_json` wrote.

    Args:
        where: the file's name, for the error.

    Raises:
        UsageError: it is no JSON, of another version, or has a value of another type.
    """
    try:
        value = json.loads(text)
    except (JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}.", hint=_HINT) from None
    version = value.get("schema") if isinstance(value, dict) else None
    if version != SCHEMA:
        said = "names no schema" if version is None else f"has schema {version!r}"
        raise UsageError(f"{where} {said}; this version reads schema {SCHEMA}.", hint=_HINT)
    try:
        return decoded(Results, value)
    except WrongValue as error:
        raise UsageError(f"{where}: {error}.", hint=_HINT) from None


def read(path: Path) -> Results:
    """The results in a file; raises UsageError as `of_json` does, and OSError."""
    return of_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


_HINT = "Give a results.json that `mlxspec bench` of this version wrote."
