"""What `mlxspec bench` leaves: the schema of `results.json`, version 1. No MLX.

Every value is a plain one: seconds, tokens per second, bytes, shares between 0 and 1, and ratios.
A value that could not be measured is null. Whoever reads a file of another version, or one with a
field that is missing, unknown or of another type, gets one `UsageError` that names the place.

The cells, with the samples, are in `mlxspec.bench.cells`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal

from mlxspec.bench.cells import Acceptance, Cell, Configuration, Question, Sample
from mlxspec.bench.statistics import Interval
from mlxspec.bench.strict import WrongValue, decoded
from mlxspec.errors import UsageError
from mlxspec.measure.forecast import TOO_NOISY

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The machine's own: the same text decoded plainly again and again during the run.

    Args:
        at_s, tokens_per_second: of each time.
        spread: the standard deviation of one speed, as a fraction. None where too few were taken.
        trend: what a steady change comes to from the first to the last: 0.9 is 10% slower.
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
        question, row: the conditions; `configs` are the prompts of every type.
        ours: the tokens per second of each of our configurations over its own.
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
    over: Interval | None = None
    ours_over: Interval | None = None
    question: Question = "configs"
    row: str = ""
    ours: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A round of one K, or a pass of K + 1 rows.

    Args:
        round_s: of the whole round; None where nothing drafts.
        verify_s: of the target's pass over K + 1 rows. draft_s: of K draft steps.
        over_plain: verify_s over that of K = 0, T(K + 1)/T(1).
        expected_s: what the parts of a round come to. round_over_plain: round_s over a plain round.
        pays_above: the acceptance rate at which K begins to pay; None where it never does.
            text_pays_above: the same of proposals from the text, which take no drafting.
        mlx_lm_s: of a round of mlx-lm's with the same K; None where it was not measured.
    """

    draft_tokens: int
    verify_s: float
    over_plain: float
    draft_s: float | None = None
    host_s: float | None = None
    round_s: float | None = None
    expected_s: float | None = None
    round_over_plain: float | None = None
    pays_above: float | None = None
    text_pays_above: float | None = None
    mlx_lm_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What does not depend on the values of weights, measured with random ones.

    Args:
        target, draft: as `--shape` spells them; an empty draft drafts nothing.
        context: tokens before the passes. plain_s: of a plain round. costs: one for each K, from 0.
        target_bytes, draft_bytes: of the weights. peak_bytes: of MLX's memory in all; 0 where only
            a few layers were there.
        layers: of the target. measured_layers: of the targets that were there, from which the whole
            follows; words: why it was not there itself.
        noise: the usual spread of what was measured repeatedly, as a fraction of the median.
    """

    target: str
    draft: str = ""
    context: int = 0
    plain_s: float
    costs: tuple[Cost, ...] = ()
    target_bytes: int = 0
    draft_bytes: int = 0
    peak_bytes: int = 0
    layers: int = 0
    measured_layers: tuple[int, ...] = ()
    noise: float = 0.0
    words: str = ""

    @property
    def is_noisy(self) -> bool:
        return self.noise > TOO_NOISY


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The configuration to use here.

    Args:
        words: one sentence with the reason.
        best, worst: the prompt types that gain most and least; empty where none was compared.
    """

    configuration: Configuration
    speedup: Interval | None
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
