"""Several generations at once: on one engine and on two, in one thread and in several.

MLX's streams belong to their thread, which ends them with `mx.clear_streams()`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import mlx.core as mx
import pytest
from conftest import draft_for, model, plain_of, prompt_of

from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.params import SamplingParams
from mlxspec.sampling.sampler import Sampler

WARM = SamplingParams(temperature=1.0, seed=7)


def engine_of(name: str, kind: str = "half", *, compiled: bool = False) -> Engine:
    return Engine(model(name), draft_for(model(name), kind), compiled=compiled)


def written(engine: Engine, length: int, sampling: SamplingParams) -> list[int]:
    options = {"max_tokens": 40, "draft_tokens": 3, "sampling": sampling}
    return engine.generate(prompt_of(length), **options).tokens


def in_threads(jobs: list[Callable[[], list[int]]]) -> list[list[int]]:
    def run(job: Callable[[], list[int]]) -> list[int]:
        try:
            return job()
        finally:
            mx.clear_streams()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_engine_from_several_threads(compiled: bool) -> None:
    engine = engine_of("llama", compiled=compiled)
    alone = [written(engine, length, WARM) for length in (5, 9, 70)]
    jobs = [lambda length=length: written(engine, length, WARM) for length in (5, 9, 70)]
    for _ in range(3):
        assert in_threads(jobs) == alone
    assert written(engine, 5, SamplingParams()) == plain_of("llama", 5, 40)


def test_rounds_that_are_gone_leave_nothing_for_later_ones_in_any_thread() -> None:
    engine, top = engine_of("llama", compiled=True), 3
    sampler = Sampler(SamplingParams().method(), engine.models[0].vocabulary)

    def width(rounds: FusedRound, told: bool) -> int:
        shape = rounds.shape(0, 64)._replace(logprobs=told)
        _, result = rounds.run(engine.prefilled(prompt_of(9)), shape, top=top)
        return int(result.shape[1])

    with ThreadPoolExecutor(1) as pool:
        # A few turns until Python puts a function where another one was.
        for told in [False, True] * 7:
            rounds = engine.rounds.with_sampler(sampler, compiled=True)
            found = [width(rounds, told), pool.submit(width, rounds, told).result()]
            assert found == [2 + told * (1 + 2 * top)] * 2
            del rounds
            gc.collect()
        pool.submit(mx.clear_streams).result()


def test_two_engines_from_two_threads() -> None:
    engines = {name: engine_of(name) for name in ("llama", "qwen3")}
    jobs = [lambda e=engine: written(e, 9, SamplingParams()) for engine in engines.values()]
    assert in_threads(jobs) == [plain_of(name, 9, 40) for name in engines]


def test_generations_of_one_thread_may_be_interleaved() -> None:
    engines = [engine_of("llama"), engine_of("llama", "never"), engine_of("qwen3")]
    engines.append(engines[0])
    expected = [written(engine, 9, SamplingParams()) for engine in engines]
    texts: list[list[int]] = [[] for _ in engines]
    streams = [engine.stream(prompt_of(9), max_tokens=40, draft_tokens=3) for engine in engines]
    for events in zip_longest(*streams):
        for text, event in zip(texts, events, strict=True):
            text += event.tokens if event is not None else ()
    assert texts == expected


def test_a_stream_that_is_dropped_leaves_the_engine_as_it_was() -> None:
    engine = engine_of("llama")
    for taken in range(4):
        stream = engine.stream(prompt_of(9), max_tokens=40, draft_tokens=3)
        for _ in range(taken):
            next(stream)
        del stream
        assert written(engine, 9, SamplingParams()) == plain_of("llama", 9, 40)
