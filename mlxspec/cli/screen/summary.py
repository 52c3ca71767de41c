"""A generation in words: the live line while it is written, and the summary after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlxspec.metrics import (
    TARGET,
    FinishReason,
    Generation,
    RoundStats,
    SpeculationStats,
    Split,
    counted,
    speed,
)

STATUS_EVERY_S = 0.1  # faster than this, nobody can read the numbers

_STOPPED: dict[FinishReason, str] = {
    "stop": "end of text",
    "length": "length limit",
    "interrupted": "interrupted",
    "error": "ended by an error",
}


class Both(NamedTuple):
    """One request, decoded with speculation and without."""

    speculating: Generation
    plain: Generation


def speculates(generation: Generation) -> bool:
    return generation.speculation.enabled and generation.speculation.draft_tokens > 0


def live_parts(generation: Generation, latest: RoundStats | None, elapsed_s: float) -> list[str]:
    """The live line, the most important part first.

    Args:
        latest: the round that was committed last. elapsed_s: seconds since prefill ended.
    """
    tokens, stats = len(generation.tokens), generation.speculation
    # The first token is there when decoding begins: at once, it would look like a rate.
    parts = [f"{speed(tokens / elapsed_s)} tok/s"] if elapsed_s >= STATUS_EVERY_S else []
    if speculates(generation) and stats.acceptance_rate is not None:
        parts.append(f"acceptance {stats.acceptance_rate:.0%}")
        parts.append(f"{stats.tokens_per_round:.1f} tokens/round")
        parts += [] if stats.is_exact else ["not exact"]
    if stats.auto and latest is not None:
        parts.append(_doing(latest))
    return [*parts, f"{elapsed_s:.1f} s"]


def summary(
    generation: Generation,
    split: Split | None,
    both: Both | None = None,
    *,
    left_out: bool = False,
) -> list[tuple[str, list[str]]]:
    """Labels, each with the parts of its line.

    Args:
        split: of a round's time. both: the same request again, if it was compared.
        left_out: whether stdout has the answer alone, which a person may not expect.
    """
    rows = [("output", _output(generation))]
    if left_out and generation.reasoning:
        rows.append(("reasoning", ["left out: --show-reasoning writes it before the answer"]))
    if speculates(generation) and generation.written_by:
        rows.append(("written", _written(generation)))
        rows.append(("rounds", _rounds(generation.speculation)))
    if generation.sampling.as_dict() or generation.sampling.logit_bias:
        rows.append(("sampling", generation.sampling.in_words()))
    if both is not None:
        rows.append(("compared", _compared(generation, both)))
    cost = []
    if split is not None:
        cost += [f"draft {split.draft:.0%}", f"verify {split.verify:.0%}"]
        cost += [f"host {split.host:.0%} of a round"]
    if generation.peak_gb:
        cost.append(f"peak memory {generation.peak_gb:.2f} GB")
    return [*rows, ("cost", cost)] if cost else rows


def in_short(generation: Generation) -> list[str]:
    """The parts of one line behind an answer."""
    stats, rate = generation.speculation, generation.tokens_per_second
    parts = [f"{speed(rate)} tok/s"] if rate else []
    if speculates(generation) and stats.acceptance_rate is not None:
        parts.append(f"acceptance {stats.acceptance_rate:.0%}")
        parts += [] if stats.is_exact else ["not exact"]
    read = generation.prompt_tokens - generation.cached_prompt_tokens
    parts.append(f"read {read:,} of {generation.prompt_tokens:,} prompt tokens")
    ended = generation.finish_reason
    return [*parts, _STOPPED[ended]] if ended != "stop" else parts


def _doing(latest: RoundStats) -> str:
    """The policy's choice for a round."""
    if latest.drafted:
        return f"{latest.drafter} drafts {latest.drafted}"
    if latest.parked is None:
        return "nothing drafted"
    return f"parked: {latest.parked.why}, retry in {latest.parked.retry_in} rounds"


def _output(generation: Generation) -> list[str]:
    timing, count = generation.timing, len(generation.tokens)
    tokens = counted(count, "token")
    parts = [f"{tokens} in {timing.decode_s:.2f} s" if timing.decode_s else tokens]
    if generation.tokens_per_second:
        parts.append(f"{speed(generation.tokens_per_second)} tok/s")
    if count and timing.time_to_first_token_s:
        parts.append(f"first after {timing.time_to_first_token_s:.2f} s")
    return [*parts, _STOPPED[generation.finish_reason]]


def _written(generation: Generation) -> list[str]:
    """Each author's share of the tokens, the drafters' first."""
    authors = sorted(generation.written_by.items(), key=lambda one: (one[0] == TARGET, -one[1]))
    shares = _percents([tokens for _, tokens in authors])
    return [f"{name} {share}%" for (name, _), share in zip(authors, shares, strict=True)]


def _percents(counts: Sequence[int]) -> list[int]:
    """Shares in whole percents that add up to 100."""
    exact = [100 * count / sum(counts) for count in counts]
    shares = [int(one) for one in exact]
    # What is left goes to those that rounding down took most from.
    by_loss = sorted(range(len(counts)), key=lambda at: shares[at] - exact[at])
    for at in by_loss[: 100 - sum(shares)]:
        shares[at] += 1
    return shares


def _rounds(stats: SpeculationStats) -> list[str]:
    # A round that the end cut short has written tokens, and is not in the rates that follow.
    cut = ", the last cut short" if 1 < stats.rounds != stats.full_rounds else ""
    parts = [f"{counted(stats.rounds, 'round')}{cut}"]
    if stats.tokens_per_round is not None:
        parts.append(f"{stats.tokens_per_round:.2f} tokens per round")
    if stats.acceptance_rate is not None:
        parts.append(f"{stats.acceptance_rate:.0%} of {stats.drafted} proposals accepted")
    return parts if stats.is_exact else [*parts, f"not exact: {stats.rule} verification"]


def _compared(generation: Generation, both: Both) -> list[str]:
    """The two speeds, and whether plain decoding wrote the same text."""
    fast, slow = (one.tokens_per_second for one in both)
    if not fast or not slow:
        return ["too short to compare"]
    text = "the same text" if both.plain.tokens == generation.tokens else "another text"
    return [
        f"{speed(fast)} tok/s with speculation",
        f"{speed(slow)} tok/s without",
        f"{fast / slow:.2f} x",
        text,
    ]
