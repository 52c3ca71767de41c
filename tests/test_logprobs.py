"""Log-probabilities are those of plain decoding, whoever proposed a token and under every rule.

The oracle is one pass of the target alone over the finished text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cli_tools import assert_one_error, save_model
from conftest import KINDS, TOKENIZER, draft_for, model, plain_of, prompt_of
from mlx_lm.generate import generate_step

from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import NOTHING
from mlxspec.drafters.history import History
from mlxspec.errors import UsageError
from mlxspec.metrics import Logprob
from mlxspec.params import Penalties, SamplingParams
from mlxspec.sampling.logprobs import logprobs_in, with_logprobs

COUNT = 18
PROMPT = prompt_of(9)
WARM = SamplingParams(temperature=0.9, seed=3)
SAMPLINGS = {
    "greedy": SamplingParams(),
    "token": SamplingParams(temperature=0.9, seed=3, verify="token"),
    "block": SamplingParams(temperature=0.9, seed=3, verify="block"),
    "coupled": SamplingParams(temperature=0.9, seed=3, verify="coupled"),
    "relaxed": SamplingParams(temperature=0.9, seed=3, verify="relaxed", acceptance_threshold=0.2),
    "relaxed greedy": SamplingParams(verify="relaxed", acceptance_threshold=0.2),
}
# Steps that change what is sampled, and not how likely the target finds it.
ADORNED = SamplingParams(
    temperature=1.5,
    top_p=0.9,
    top_k=30,
    min_p=0.01,
    seed=5,
    penalties=Penalties(repetition=1.3, presence=0.5),
    logit_bias={3: 4.0, 5: float("-inf")},
)


def log_p_of(target: Any, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """The log-probabilities, [N, V], in the places of N tokens after a prompt."""
    logits = target(mx.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def check(
    target: Any, prompt: Sequence[int], tokens: Sequence[int], told: Sequence[Logprob], top: int
) -> None:
    assert [one.token for one in told] == list(tokens)
    for one, row in zip(told, log_p_of(target, prompt, tokens), strict=True):
        assert one.logprob == pytest.approx(row[one.token], abs=1e-5)
        assert [token for token, _ in one.top] == np.argsort(-row)[:top].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:top], abs=1e-5)


# --- the values -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_a_plain_pass(kind: str, rule: str) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, kind), compiled=False)
    for draft_tokens in {"agrees": (1, 8), "half": (0, 2, 3, 5), "never": (1, 4)}[kind]:
        result = engine.generate(
            PROMPT,
            logprobs=3,
            sampling=SAMPLINGS[rule],
            draft_tokens=draft_tokens,
            max_tokens=COUNT,
        )
        check(target, PROMPT, result.tokens, result.logprobs, 3)


@pytest.mark.parametrize("draft_tokens", range(9))
def test_asking_changes_no_text(draft_tokens: int) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    options: dict[str, Any] = {"sampling": WARM, "draft_tokens": draft_tokens, "max_tokens": COUNT}
    asked, plain = (
        engine.generate(PROMPT, logprobs=20, **options),
        engine.generate(PROMPT, **options),
    )
    assert asked.tokens == plain.tokens
    assert plain.logprobs == []
    check(target, PROMPT, asked.tokens, asked.logprobs, 20)


# Attention, windows, sinks, latents, states, and a model whose rounds wait for the host.
@pytest.mark.parametrize(
    "name",
    ["gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "mamba2", "recurrent_gemma", "llama4"],
)
def test_values_with_every_kind_of_cache(name: str) -> None:
    target = model(name)
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    result = engine.generate(
        PROMPT, logprobs=5, draft_tokens=3, sampling=ADORNED, max_tokens=2 * COUNT
    )
    check(target, PROMPT, result.tokens, result.logprobs, 5)
    assert 5 not in result.tokens  # its bias forbids it


def test_values_without_penalties_are_those_that_mlx_lm_tells() -> None:
    target = model("llama")
    result = Engine(target, draft_for(target, "half"), compiled=False).generate(
        PROMPT, logprobs=0, draft_tokens=3, max_tokens=COUNT
    )
    steps = generate_step(mx.array(PROMPT), target, max_tokens=COUNT)
    expected = [(token, log_p[token].item()) for token, log_p in steps]
    assert result.tokens == [token for token, _ in expected]
    values = [one.logprob for one in result.logprobs]
    assert values == pytest.approx([value for _, value in expected], abs=1e-5)
    assert all(one.top == () for one in result.logprobs)


def test_values_do_not_know_of_processors() -> None:
    def never_even(_: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) % 2 == 0, -mx.inf, logits)

    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    result = engine.generate(
        PROMPT, logprobs=2, draft_tokens=2, processors=[never_even], max_tokens=COUNT
    )
    assert all(token % 2 for token in result.tokens)
    check(target, PROMPT, result.tokens, result.logprobs, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_what_the_text_proposes(compiled: bool) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), texts=[History], compiled=compiled)
    expected = plain_of("llama", 9, COUNT)
    result = engine.generate(
        PROMPT, logprobs=1, draft_tokens=3, prediction=expected, max_tokens=COUNT
    )
    assert result.speculation.by_source["prediction"].accepted > 10
    check(target, PROMPT, result.tokens, result.logprobs, 1)


# --- many texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "llama4"])
def test_each_row_of_a_batch_gets_its_own(name: str) -> None:
    target = model(name)
    engine = Engine(target, draft_for(target, "half"), texts=[History], compiled=False)
    asked = [None, 0, 5, 20, 2, None, 1]
    batch = engine.batch(max_rows=3)
    rows = [
        batch.add(
            prompt_of(3 + 8 * index, index),
            max_tokens=(COUNT, 5, 2 * COUNT)[index % 3],
            draft_tokens="auto",
            sampling=(WARM, SamplingParams(), ADORNED)[index % 3],
            logprobs=top,
        )
        for index, top in enumerate(asked)
    ]
    while not batch.done:
        for _, event in batch.step():
            assert len(event.logprobs) in (0, len(event.tokens))
    for row, top in zip(rows, asked, strict=True):
        result = row.generation
        assert row.error is None
        if top is None:
            assert result.logprobs == []
        else:
            check(target, row.request.tokens, result.tokens, result.logprobs, top)


# --- where a text ends ----------------------------------------------------------------------


def test_cut_tokens_are_cut_in_both() -> None:
    target = model("llama")
    expected = plain_of("llama", 9, COUNT)
    text = TOKENIZER.decode(expected)
    engine = Engine(target, draft_for(target, "agrees"), TOKENIZER, compiled=False)
    for stop in ((), text[10], text[13:15]):
        run = engine.run(PROMPT, max_tokens=COUNT, draft_tokens=8, stop=stop, logprobs=0)
        for event in run:
            assert [one.token for one in event.logprobs] == list(event.tokens)
        result = run.generation
        check(target, PROMPT, result.tokens, result.logprobs, 0)
        assert (result.finish_reason == "stop") == bool(stop)
    request = engine.request(PROMPT, max_tokens=COUNT, draft_tokens=8, logprobs=0)
    ends = engine.generate(replace(request, ends=frozenset([expected[7]])))
    assert ends.tokens == expected[: expected.index(expected[7])]
    check(target, PROMPT, ends.tokens, ends.logprobs, 0)


def test_a_session_tells_them_round_by_round() -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    session = engine.session(PROMPT, max_tokens=10, draft_tokens=4, logprobs=1)
    told: list[Logprob] = []
    while (committed := session.step()).tokens:
        assert len(committed.logprobs) == len(committed.tokens)
        told += committed.logprobs
    check(target, PROMPT, session.text[len(PROMPT) :], told, 1)


# --- the graphs -----------------------------------------------------------------------------


def test_who_does_not_ask_gets_the_same_graphs_and_who_asks_one_more_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces: list[int] = []
    propose = FusedRound._propose

    def counted(*args: Any) -> Any:
        traces.append(1)
        return propose(*args)

    monkeypatch.setattr(FusedRound, "_propose", counted)
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=True)
    options: dict[str, Any] = {"draft_tokens": 2, "max_tokens": COUNT}

    def traced(**more: Any) -> int:
        traces.clear()
        engine.generate(PROMPT, **options, **more)
        return len(traces)

    assert traced() == 2  # the first round proposes nothing
    assert traced(logprobs=0) == 2
    assert [traced(logprobs=top) for top in (1, 5, 20, None)] == [0, 0, 0, 0]

    rounds = engine.rounds.of(engine.request(PROMPT, **options))
    outputs = {}
    for shape, graph in rounds._graphs.of_shape.items():
        state = engine.prefilled(PROMPT, draft=False, capacity=shape.length)
        if not shape.drafter:
            outputs[shape.logprobs] = len(graph(state, NOTHING))
    assert outputs == {False: 2, True: 3}


# --- from logits to values ------------------------------------------------------------------


def test_equally_likely_tokens_stand_in_the_order_of_their_ids() -> None:
    logits = mx.array([[[1.0, 3.0, 2.0, 3.0, 2.0, -mx.inf]]], mx.bfloat16)
    told = with_logprobs(mx.array([[3, 0]], mx.int32), logits, 4)
    (one,) = logprobs_in(told[0].tolist(), 0, 4)
    assert one.token == 3
    assert [token for token, _ in one.top] == [1, 3, 2, 4]
    assert one.logprob == one.top[0][1] == one.top[1][1]


def test_there_are_no_more_alternatives_than_tokens_and_none_too_many_for_a_row() -> None:
    logits = mx.random.normal((2, 2, 3))
    result = mx.array([[1, 2, 0], [0, 0, 1]], mx.int32)
    told = with_logprobs(result, logits, 20)
    assert told[:, :3].tolist() == result.tolist()
    for row, top in ((0, 20), (1, 2)):
        found = logprobs_in(told[row].tolist(), 1, top)
        expected = logits[row] - mx.logsumexp(logits[row], axis=-1, keepdims=True)
        for one, values in zip(found, np.array(expected), strict=True):
            assert one.logprob == pytest.approx(values[one.token], abs=1e-6)
            assert len(one.top) == min(top, 3)
    assert logprobs_in(told[0].tolist(), 1, None) == ()


@pytest.mark.parametrize("asked", [-1, 21, 1.5, True, "5"])
def test_what_cannot_be_asked_for(asked: Any) -> None:
    engine = Engine(model("llama"), compiled=False)
    with pytest.raises(UsageError, match="logprobs is"):
        engine.request(PROMPT, logprobs=asked)


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "letters"))


@pytest.fixture
def generate(invoke: Callable[..., Any], folder: str) -> Callable[..., Any]:
    models = ("--target", folder, "--draft", folder, "--no-compile", "--max-tokens", "6")
    return lambda *more: invoke("generate", *models, *more)


def test_json_tells_each_token(generate: Callable[..., Any], tmp_path: Path) -> None:
    result = generate("--json", "--logprobs", "2", "--no-stdin", "abc").json
    assert [one["id"] for one in result["logprobs"]] == result["tokens"]
    assert "".join(one["token"] for one in result["logprobs"]) == result["text"]
    for one in result["logprobs"]:
        assert bytes(one["bytes"]).decode() == one["token"]
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] < 0  # greedy
        assert [len(one["top_logprobs"]), one["top_logprobs"][0]["id"]] == [2, one["id"]]

    lines = tmp_path / "lines.jsonl"
    asked = [{}, {"logprobs": 2}, {"logprobs": 0}, {"logprobs": "2"}, {"logprobs": 21}]
    lines.write_text("".join(json.dumps({"prompt": "abc", **one}) + "\n" for one in asked))
    ended = generate("--batch", str(lines), "--ordered", "--quiet")
    assert ended.code == 1
    plain, two, none, *bad = map(json.loads, ended.out.splitlines())
    assert "logprobs" not in plain
    assert two["logprobs"] == result["logprobs"]
    assert [one["top_logprobs"] for one in none["logprobs"]] == [[]] * 6
    assert "its logprobs is no whole number" in bad[0]["error"]
    assert "logprobs is 21" in bad[1]["error"]
    ended = generate("--batch", str(lines), "--ordered", "--quiet", "--logprobs", "1")
    first = json.loads(ended.out.splitlines()[0])
    assert [len(one["top_logprobs"]) for one in first["logprobs"]] == [1] * 6


def test_text_has_no_place_for_them(generate: Callable[..., Any]) -> None:
    ended = generate("--logprobs", "2", "--no-stdin", "abc")
    assert_one_error(ended, 2, "--logprobs 2 says nothing")
    assert "logprobs" not in generate("--json", "--no-stdin", "abc").json
