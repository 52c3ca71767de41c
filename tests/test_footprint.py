"""Memory sums before a model is loaded, held against MLX's peak memory of real runs."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest
from architectures import TABLE, build
from conftest import prompt_of
from mlx.utils import tree_flatten

from mlxspec.decode import reader
from mlxspec.decode.engine import Engine
from mlxspec.models.footprint import Footprint, footprint
from mlxspec.pairs.memory import MemorySum, memory_sum

WITHIN = 0.1
PROMPT, TEXT, K = 700, 6, 3
# Wide enough that weights and past are most of the memory, as in models that people run.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 100_000,
    "vocabulary": 8192,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, **HEADS, "num_hidden_layers": 6},
    "gemma3_text": {**WIDE, **HEADS, "num_hidden_layers": 6, "sliding_window": 128},
    "qwen3_next": {**WIDE, "vocabulary": 32_768},
    "mamba2": {"hidden_size": 256, "vocabulary": 32_768},
    "deepseek_v3": {**WIDE, "vocabulary": 16_384},
    "llama4": {
        "vocabulary": 32_768,
        "text_config": {
            **TABLE["llama4"]["config"]["text_config"],
            "hidden_size": 256,
            "intermediate_size": 512,
        },
    },
}


def weights_of(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def described(name: str, model: Any, **changes: Any) -> Footprint:
    vocabulary = changes.pop("vocabulary", 64)
    config = {"model_type": name, **TABLE[name]["config"], "dtype": "float32", **changes}
    parts = [config, *(one for one in config.values() if isinstance(one, dict))]
    for part in parts:
        part |= {"vocab_size": vocabulary} if "vocab_size" in part else {}
    return footprint(config, weights_of(model))


def peak_of(engine: Engine, **options: Any) -> int:
    """The peak of a run, less what other tests have left behind."""
    own = sum(weights_of(one.model) for one in engine.models)
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - own
    mx.reset_peak_memory()
    prompt = [token % 60 for token in prompt_of(PROMPT)]
    engine.generate(prompt, max_tokens=TEXT, ignore_eos=True, **options)
    return int(mx.get_peak_memory()) - others


def require_close(expected: MemorySum, peak: int) -> None:
    assert expected.needed == pytest.approx(peak, rel=WITHIN), dict(expected.rows())


@pytest.fixture(autouse=True)
def whole_pieces(monkeypatch):
    """The prompt is read in pieces of one size, as on a GPU: their time does not decide it."""
    monkeypatch.setattr(reader, "alone_s", lambda: None)


@pytest.mark.parametrize("drafts", [False, True], ids=["alone", "with a draft"])
@pytest.mark.parametrize("name", KINDS)
def test_a_sum_is_within_a_tenth_of_a_real_run(name, drafts):
    target = build(name, **KINDS[name])
    draft = build(name, seed=1, **KINDS[name]) if drafts else None
    one = described(name, target, **KINDS[name])
    found = memory_sum(
        one, {"draft": one} if drafts else {}, 0, context=PROMPT + TEXT, draft_tokens=K
    )
    engine = Engine(target, draft, draft_tokens=K if drafts else 0, compiled=False)
    require_close(found, peak_of(engine))
