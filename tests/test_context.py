"""How many tokens a model can read, and that neither a target nor a draft is read beyond it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from cli_tools import save_model
from conftest import build, plain, prompt_of
from mlx_lm.models import gpt2

from mlxspec.decode.alone import alone
from mlxspec.decode.engine import Engine
from mlxspec.defaults import MODEL
from mlxspec.errors import PromptError
from mlxspec.models.context import context_of, guard_tables, position_tables
from mlxspec.pairs.loading import load
from mlxspec.pairs.table import Pair

POSITIONS = 64


def said(**config: Any) -> int | None:
    return context_of(SimpleNamespace(), config)


def rope(kind: str, factor: float, original: int | None = None, **more: Any) -> dict[str, Any]:
    known = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": factor, **known, **more}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({"max_sequence_length": 2048}, 2048),
        ({"seq_length": 8192}, 8192),
        ({"model_max_length": 10**30}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True}, None),
        # A window is how far a layer sees, and no length of the text.
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
        ({"sliding_window": 4096}, None),
    ],
)
def test_the_length_goes_by_several_names(config, length):
    assert said(**config) == length


@pytest.mark.parametrize(
    ("length", "scaling", "whole"),
    [
        (32768, rope("yarn", 4.0, 32768), 131072),  # Qwen 2.5
        (40960, rope("yarn", 4.0, 32768), 131072),  # Qwen 3
        (163840, rope("yarn", 40, 4096), 163840),  # DeepSeek 3, which counts it already
        (131072, rope("llama3", 8.0, 8192), 131072),  # Llama 3.1
        (8192, rope("llama3", 8.0, 8192), 65536),
        (131072, rope("llama3", 32.0), 131072),
        (4096, rope("linear", 4.0), 16384),
        (4096, {"type": "linear", "factor": 2}, 8192),
        (4096, rope("dynamic", 2.0), 8192),
        (131072, rope("longrope", 32.0, 4096), 131072),  # Phi 3
        (4096, rope("default", 2.0), 4096),
        (4096, rope("yarn", 0.5), 4096),
        (4096, {"rope_type": "yarn", "factor": "4"}, 4096),
        (4096, rope("yarn", float("inf")), 4096),
        (4096, {"full_attention": rope("yarn", 2.0, 4096), "sliding_attention": {}}, 8192),
        (4096, None, 4096),
    ],
)
def test_scaled_positions_are_counted_once(length, scaling, whole):
    for key in ("rope_scaling", "rope_parameters"):
        assert said(max_position_embeddings=length, **{key: scaling}) == whole


def test_the_text_part_of_a_configuration_comes_first():
    text = {"max_position_embeddings": 512}
    assert said(text_config=text, max_position_embeddings=64) == 512
    assert said(thinker_config={"text_config": text}) == 512
    assert said(text_config={"hidden_size": 8}, max_position_embeddings=64) == 64
    assert said(vision_config=text) is None


def test_what_a_file_says_comes_before_what_arguments_assume():
    args = SimpleNamespace(max_position_embeddings=2048)
    assert context_of(SimpleNamespace(args=args)) == 2048
    assert context_of(SimpleNamespace(args=args), {"max_seq_len": 512}) == 512
    inside = SimpleNamespace(language_model=SimpleNamespace(args=args), args=SimpleNamespace())
    assert context_of(inside) == 2048


def test_gemma_3_gives_the_whole_length():
    linear = rope("linear", 8.0)
    kind = {"model_type": "gemma3_text", "rope_scaling": linear}
    assert said(max_position_embeddings=131072, **kind) == 131072


# --- learned positions ------------------------------------------------------------------


def with_table(positions: int = POSITIONS, **changes: Any) -> gpt2.Model:
    """A random GPT-2 with a table of positions."""
    values = {"n_ctx": positions, "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 64}
    values |= {"n_positions": positions, "layer_norm_epsilon": 1e-5, "model_type": "gpt2"}
    mx.random.seed(5)
    made = gpt2.Model(gpt2.ModelArgs.from_dict(values | changes))
    mx.eval(made.parameters())
    return made


def test_a_table_of_positions_is_the_length_whatever_is_said():
    model = with_table()
    assert [name for name, _ in position_tables(model)] == ["model.wpe"]
    assert context_of(model) == POSITIONS
    assert context_of(model, {"n_positions": 1024}) == POSITIONS
    nn.quantize(model, group_size=16 * 2, bits=4, class_predicate=lambda *_: False)
    assert context_of(model) == POSITIONS


def test_a_table_is_not_read_behind_its_end():
    model = with_table()
    table, last = model.model.wpe, model.model.wpe.weight[-1]
    guard_tables(model)
    guard_tables(model)
    assert mx.array_equal(table(mx.array([POSITIONS - 1, POSITIONS, 10**6])), mx.stack([last] * 3))
    assert mx.array_equal(table(mx.array([3])), table.weight[3:4])


@pytest.mark.parametrize("draft_tokens", [0, 3, 8])
def test_a_text_ends_with_its_table(draft_tokens):
    model = with_table()
    engine = Engine(model, with_table(), compiled=False)
    made = engine.generate([5] * 10, max_tokens=100, draft_tokens=draft_tokens)
    assert len(made.tokens) == POSITIONS - 10
    assert made.tokens == plain(model, [5] * 10, POSITIONS - 10)
    with pytest.raises(PromptError, match="context is 64"):
        engine.generate([5] * POSITIONS)


# --- a draft with a shorter context -----------------------------------------------------


def positions_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The end of every pass of a GPT-2 whose positions are counted on the host."""
    ends: list[int] = []
    table = type(model.model.wpe)

    def seen(self: Any, positions: mx.array) -> mx.array:
        ends.append(int(positions.max()) + 1)
        return table.__call__(self, positions)

    model.model.wpe.__class__ = type("Seen", (table,), {"__call__": seen})
    return ends


@pytest.mark.parametrize("length", [10, 100])
def test_a_draft_is_read_within_its_context(length, monkeypatch):
    target = build("llama")
    draft = with_table(vocab_size=target.args.vocab_size)
    engine = Engine(target, draft, compiled=False)
    assert engine.context > 2 * POSITIONS
    ends = positions_read(draft, monkeypatch)
    made = engine.generate(prompt_of(length), max_tokens=150, draft_tokens=3)
    assert made.tokens == plain(target, prompt_of(length), 150)
    assert made.speculation.rounds > 0
    assert POSITIONS // 4 < max(ends) <= POSITIONS


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_draft_is_read_within_the_context_of_its_file(is_alone, tmp_path, monkeypatch):
    """A Gemma 2, whose arguments in mlx-lm have no length."""
    target, folder = save_model(tmp_path / "target"), save_model(tmp_path / "draft", name="gemma2")
    config = json.loads((folder / "config.json").read_text())
    assert context_of(SimpleNamespace(args=SimpleNamespace(**config))) is None
    config["max_position_embeddings"] = POSITIONS
    (folder / "config.json").write_text(json.dumps(config))
    engine = load(Pair("mine", str(target), str(folder)), compiled=False)
    cached, ends = engine.models[1], []
    forward = cached.forward

    def seen(tokens: mx.array, layers: Any, offset: mx.array, length: int) -> Any:
        ends.append(int(offset.max()) + tokens.shape[1])
        return forward(tokens, layers, offset, length)

    monkeypatch.setattr(cached, "forward", seen)
    asked = alone(engine, MODEL) if is_alone else engine
    asked.generate([1, 2, 3] * 33, max_tokens=150, draft_tokens=3)
    assert POSITIONS // 4 < max(ends) <= POSITIONS
