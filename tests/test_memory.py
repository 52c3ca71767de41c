"""Memory that runs out: less is read or proposed at a time, and the text goes on unchanged.

`Limited` stands for an allocator with a limit: a pass of more rows than that fails the way MLX's
allocators fail on Metal and CUDA, while the graph is built or when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import draft_for, model, plain, prompt_of
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.decode import lane
from mlxspec.decode.engine import Engine
from mlxspec.device.memory import watched
from mlxspec.errors import OutOfMemory
from mlxspec.models import prefill
from mlxspec.params import SamplingParams

MESSAGE = "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than ..."


class Limited(nn.Module):
    """A model whose passes may have so many rows."""

    def __init__(self, inner: Any, rows: int) -> None:
        super().__init__()
        self.inner = inner
        self.rows = rows
        self.largest = 0

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[1] > self.rows:
            raise RuntimeError(MESSAGE)
        self.largest = max(self.largest, tokens.shape[1])
        return self.inner(tokens, cache=cache)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


LLAMA = "llama"
PROMPT = prompt_of(300)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return plain(model(LLAMA), PROMPT, 40)


def engine_of(rows: int, draft_rows: int = 10**6, kind: str = "half") -> Engine:
    target = model(LLAMA)
    draft = Limited(draft_for(target, kind), 10**6)
    engine = Engine(Limited(target, 10**6), draft, compiled=False)
    for one, limit in ((engine.target, rows), (engine.draft, draft_rows)):
        one.rows, one.largest = limit, 0
    for cached in engine.models:  # known to be fast, so that only memory limits a piece
        cached.pace.took(512, 1e-3)
        cached.pace.took(512, 1e-3)
    return engine


@pytest.mark.parametrize(("rows", "chunk"), [(1000, 512), (298, 256), (100, 64), (17, 16)])
def test_the_prompt_is_read_in_smaller_chunks(rows: int, chunk: int, expected: list[int]) -> None:
    engine = engine_of(rows)
    result = engine.generate(PROMPT, max_tokens=40, draft_tokens=3)
    assert result.tokens == expected
    assert engine.target.largest == min(chunk, 299)
    said = [note for note in result.notes if "reading the prompt" in note]
    assert bool(said) == (chunk < 512)
    if said:
        assert said[-1].endswith(f"reading {chunk} tokens at a time")


@pytest.mark.parametrize(("rows", "left"), [(8, 4), (3, 2), (2, 1), (1, 0)])
def test_fewer_tokens_are_proposed(
    rows: int, left: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The prompt fits: only the passes of the rounds are limited.
    monkeypatch.setattr(prefill, "SMALLEST_CHUNK", 1)
    engine = engine_of(rows)
    run = engine.run(PROMPT, max_tokens=40, draft_tokens=8)
    events = list(run)
    assert [token for event in events for token in event.tokens] == expected
    assert run.session is not None
    assert run.session.draft_tokens == left
    notes = [note for note in run.generation.notes if "going on with" in note]
    counts = [8 >> power for power in range(1, 5) if 8 >> power >= left]
    assert len(notes) == len(counts)
    assert notes[-1].endswith(f"{left} draft tokens" if left else "no draft")


def test_a_draft_that_does_not_fit_is_left_out(expected: list[int]) -> None:
    result = engine_of(10**6, draft_rows=4).generate(PROMPT, max_tokens=40, draft_tokens=3)
    assert result.tokens == expected
    assert result.speculation.drafted == 0
    assert "going on without the draft" in result.notes[-1]


def test_a_prompt_that_never_fits_is_a_clear_error() -> None:
    with pytest.raises(OutOfMemory, match="while reading the prompt"):
        engine_of(4).generate(PROMPT, max_tokens=4)


def failing(times: set[int]) -> Callable[..., None]:
    """`mx.async_eval`, out of memory at these calls."""
    calls = iter(range(10**6))

    def evaluate(*arrays: Any) -> None:
        if next(calls) in times:
            raise RuntimeError(MESSAGE)
        mx.eval(*arrays)

    return evaluate


@pytest.mark.parametrize("rule", ["greedy", "coupled"])
@pytest.mark.parametrize("times", [{0}, {5}, {6, 7}, {4, 9, 20}], ids=str)
def test_text_is_neither_lost_nor_repeated(
    times: set[int], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(verify="coupled", temperature=1.0, seed=3)
    if rule == "greedy":
        sampling = SamplingParams(seed=3)
    engine = engine_of(10**6)
    whole = engine.generate(PROMPT, max_tokens=40, draft_tokens=8, sampling=sampling)
    monkeypatch.setattr(lane.mx, "async_eval", failing(times))
    result = engine.generate(PROMPT, max_tokens=40, draft_tokens=8, sampling=sampling)
    assert result.tokens == whole.tokens
    assert len(result.notes) == len(times)


def test_what_was_written_before_the_error_stays(
    expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane.mx, "async_eval", failing(set(range(6, 100))))
    engine = engine_of(10**6)
    run = engine.run(PROMPT, max_tokens=40, draft_tokens=2)
    with pytest.raises(OutOfMemory, match="while writing text"):
        list(run)
    written = run.generation.tokens
    assert 0 < len(written) < 40
    assert written == expected[: len(written)]
    monkeypatch.undo()
    assert engine.generate(PROMPT, max_tokens=40).tokens == expected


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(MESSAGE),
        RuntimeError("[malloc] Unable to allocate 123 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
        MemoryError(),
    ],
    ids=str,
)
def test_what_counts_as_running_out(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as caught, watched("testing"):
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_come_through() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), watched("testing"):
        raise RuntimeError("shapes do not match")
