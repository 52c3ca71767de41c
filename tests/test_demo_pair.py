"""The embedded pair against mlx-lm on the same weights, and what its figures rest on."""

from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlxspec import SamplingParams, load
from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.acceptance import Task, measure
from mlxspec.bench.questions.loops import loops, parses, sense, whole_functions
from mlxspec.control.replay import along_model, rounds
from mlxspec.decode.request import GREEDY
from mlxspec.defaults import AUTO
from mlxspec.device import kernels
from mlxspec.measure.acceptance import agreement
from mlxspec.pairs.table import find_pair

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = beginnings("python")
COUNT = 8
TOKENS = 40
K = 5


@pytest.fixture(scope="module")
def engine():
    """With compiled rounds: what building their kernels costs is soon won back."""
    engine = load("demo")
    if kernels.can_compile():
        engine.build_kernels(GREEDY, AUTO)
    return engine


@pytest.fixture(scope="module")
def plain(engine):
    """mlx-lm's own text after a prompt, computed once for all K."""

    @cache
    def decode(index):
        prompt = mx.array(engine.encode(PROMPTS[index]))
        steps = generate_step(prompt, engine.target, max_tokens=TOKENS)
        return [int(token) for token, _ in steps]

    return decode


@pytest.fixture(scope="module")
def greedy(engine):
    """Runs of the first prompts with K = 5; several tests look at them."""
    options = {"draft_tokens": K, "max_tokens": 128, "ignore_eos": True}
    return [engine.generate(prompt, **options) for prompt in PROMPTS[:COUNT]]


def test_greedy_text_is_plain_decoding(greedy, plain):
    for index, run in enumerate(greedy):
        assert run.tokens[:TOKENS] == plain(index)


# Every K writes after two of the prompts, and after every prompt some K does.
@pytest.mark.parametrize(("place", "draft_tokens"), [(0, 0), (1, 1), (2, 2), (3, 8)])
def test_greedy_text_is_plain_decoding_at_any_k(engine, plain, place, draft_tokens):
    for index in range(place, COUNT, 4):
        run = engine.generate(
            PROMPTS[index], draft_tokens=draft_tokens, max_tokens=TOKENS, ignore_eos=True
        )
        assert run.tokens == plain(index)


def test_weights_are_float32_and_small(engine):
    assert all(w.dtype == mx.float32 for w in (engine.target.model.norm.weight,))
    files = (ROOT / "mlxspec" / "demo").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) <= 12e6


def test_acceptance_on_files_that_training_never_saw(engine, greedy):
    # `scripts/bench_round` counts it over more prompts, at every K.
    accepted = sum(run.speculation.accepted for run in greedy)
    drafted = sum(run.speculation.drafted for run in greedy)
    assert accepted / drafted >= 0.64
    # What another K would have kept can be read off the draft's choices along the text.
    texts = [
        (engine.encode(prompt), run.tokens) for prompt, run in zip(PROMPTS, greedy, strict=False)
    ]
    along = [along_model(agreement(engine.models[1], text), K) for text in texts]

    def rate(count):
        replayed = [one for places in along for one in rounds(places, [count])]
        return sum(one.right for one in replayed) / (count * len(replayed))

    assert rate(K) == pytest.approx(accepted / drafted, abs=0.02)
    assert rate(3) >= 0.72


def test_acceptance_is_counted_by_kind_and_drafter(engine):
    prompt = PROMPTS[0]
    text = engine.generate(prompt, draft_tokens=0, max_tokens=40).text
    tasks = {"code": [Task(prompt)] * 2, "edit": [Task(prompt, expected=text)]}
    found = measure(engine, tasks, 40)
    assert found["code"]["tokens"] == 2 * found["edit"]["tokens"] == 80
    assert set(found["code"]) == {"tokens", "model", "history"}
    # What is expected is the text itself, so every proposal is right.
    predicted = found["edit"]["prediction"]["3"]
    assert predicted["drafted"] == predicted["accepted"] > 20
    assert predicted["tokens_per_round"] > 3
    for count, figures in found["code"]["model"].items():
        assert figures["drafted"] == int(count) * figures["rounds"]
        assert figures == {
            name: value * 2 if name in ("rounds", "drafted", "accepted") else value
            for name, value in found["edit"]["model"][count].items()
        }


def test_texts_do_not_loop_with_the_pairs_own_sampling(engine, greedy):
    # Of these, half loop greedily; `python -m mlxspec.bench loops` counts all 64.
    found = sense(engine, PROMPTS[:COUNT], dict(find_pair("demo").sampling))
    assert len(found.looping) <= 1
    assert found.parsed >= 0.6 * found.functions
    assert sum(loops(one.tokens[:120], one.text) for one in greedy) >= 3


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        ([1, 2, 3, 4, 5] * 4, "", True),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4, 6], "", False),
        ([7] * 20, "", True),
        ([], "a\n" * 4, True),
        ([], " a\n\n" * 3 + "b\na\n", False),
    ],
)
def test_a_loop_is_a_line_or_a_phrase_more_than_three_times_in_a_row(tokens, text, expected):
    assert loops(tokens, text) == expected


def test_a_function_is_whole_where_a_line_of_its_indentation_follows():
    first = "x\n    def f(\n        a,\n    ):\n        return (\n    def g():\n        pass\n"
    text = first + "\ny = 1\ndef h():\n"
    functions = list(whole_functions(text))
    assert functions == ["def f(\n    a,\n):\n    return (", "def g():\n    pass\n"]
    assert [parses(one) for one in functions] == [False, True]


@pytest.mark.parametrize(
    "prompt", ["    def __init__(self, items):", "class Queue(list):\n    def push(self, item):"]
)
def test_writes_something_like_python(engine, prompt):
    text = engine.generate(prompt, max_tokens=120).text
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) >= 4
    assert any(line.startswith("    ") for line in lines)
    assert any(word in text for word in ("return", "self.", "def ", "if ", "raise "))


def test_a_seed_repeats_its_text_and_another_writes_another(engine):
    sampled = [
        engine.generate("class Queue:", max_tokens=40, sampling=SamplingParams(1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert sampled[0].tokens == sampled[1].tokens
    assert sampled[0].tokens != sampled[2].tokens
    assert sampled[0].seed == 1
