"""The script that tries every architecture, on a representative dozen; and that it can fail."""

from __future__ import annotations

from typing import Any

import architectures
import mlx.core as mx
import pytest
from architectures import PAGE, TABLE, Result, attempt, names, page

from mlxspec.models import cached_model
from mlxspec.models.cached_model import FusedModel

DOZEN = {
    "qwen3_5": "fused",  # gated deltas beside attention
    "nemotron_h": "fused",  # state spaces, attention and experts
    "falcon_h1": "fused",  # both in one layer
    "granitemoehybrid": "fused",
    "kimi_linear": "fused",  # several convolutions in a layer
    "baichuan_m1": "fused",  # lists of caches
    "longcat_flash": "fused",
    "gemma4": "fused",  # windows, and keys shared between layers
    "glm_moe_dsa": "fused",  # an indexer with a cache of its own
    "minimax_m3_vl": "hosted",
    "longcat_flash_ngram": "hosted",
    "phi3small": "refused",
}


@pytest.mark.parametrize("name", DOZEN)
def test_it_is_exact(name: str) -> None:
    result = attempt(name, tokens=48)
    assert (result.path, result.differs) == (DOZEN[name], "")
    assert bool(result.why) == (result.path != "fused")


def test_every_architecture_has_a_configuration() -> None:
    assert set(names()) == set(TABLE)


def test_what_is_silently_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its masks are wrong for passes of several rows, and nobody tries it first.
    def untried(model: Any, kv: None, *, speculates: bool) -> FusedModel:
        return FusedModel(model, kv)

    monkeypatch.setattr("mlxspec.decode.engine.cached_model_of", untried)
    result = attempt("phi3small", tokens=24)
    assert "no draft" in result.differs
    monkeypatch.setattr(architectures, "_attempted", lambda *_: result)
    assert "| no: no draft" in page([result])


def test_the_page_says_what_came_out() -> None:
    results = [
        Result("a", ("KVCache",), "fused"),
        Result("b", ("KVCache", "ArraysCache"), "hosted", "it is odd"),
        Result("c", ("KVCache",), "refused", "it is worse"),
        Result("d", (), "mlx-lm cannot", "it is not there"),
    ]
    text = page(results)
    assert "**2 of 3**" in text
    assert "| b | `KVCache`, `ArraysCache` | yes | hosted: it is odd |" in text
    assert "| c | `KVCache` | alone | refused: it is worse |" in text
    assert "- d: it is not there" in text


def test_the_page_is_of_this_table() -> None:
    written = PAGE.read_text()
    for name, entry in TABLE.items():
        assert (f"\n| {name} |" in written) != ("cannot" in entry)


@pytest.mark.parametrize(("wrong", "accepted"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_trial_forgives_rounding_in_a_minority_of_rows(wrong: int, accepted: bool) -> None:
    expected = mx.random.normal((1, 3, 50), key=mx.random.key(1))
    off = mx.where(mx.arange(3)[:, None] < wrong, 0.5 * mx.sin(mx.arange(50)), 1e-5)
    assert cached_model._close(expected + off, expected) == accepted
