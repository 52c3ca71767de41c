"""What the trial of a model costs, and what is left for the moment when it is needed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import build, plain, prompt_of

from mlxspec.decode.engine import Engine
from mlxspec.errors import UnsupportedModel
from mlxspec.models import cached_model
from mlxspec.models.cached_model import (
    PLAIN,
    SPECULATING,
    FusedModel,
    Oracle,
    agrees,
    cached_model_of,
    is_exact,
)


class Counted(nn.Module):
    """A model that counts the rows that it is fed; `spoils` changes the logits of wide passes."""

    def __init__(self, inner: Any, *, spoils: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.rows = 0
        self.spoils = spoils

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.rows += tokens.shape[1]
        logits = self.inner(tokens, cache=cache)
        return -logits if self.spoils and tokens.shape[1] in (2, 3) else logits

    def make_cache(self) -> Any:
        return cached_model.fresh_cache(self.inner, None)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parts that models are tried with, as they are tried."""
    seen: list[Any] = []

    def noted(cached: Any, oracle: Oracle, parts: Any) -> bool:
        seen.append(parts)
        return agrees(cached, oracle, parts)

    monkeypatch.setattr(cached_model, "agrees", noted)
    return seen


@pytest.mark.parametrize(("parts", "rows"), [(SPECULATING, 15), (PLAIN, 6)])
def test_a_trial_feeds_few_rows(parts: Any, rows: int) -> None:
    model = Counted(build("llama"))
    cached, oracle = FusedModel(model), Oracle(model, None)
    model.rows = 0
    assert agrees(cached, oracle, parts)
    assert model.rows == rows


def test_a_trial_ends_with_the_first_part_that_differs() -> None:
    model = Counted(build("llama"), spoils=True)
    cached, oracle = FusedModel(model), Oracle(model, None)
    model.rows = 0
    assert not agrees(cached, oracle, SPECULATING)
    assert model.rows == 6


def test_plain_decoding_is_tried_with_less(trials: list[Any]) -> None:
    engine = Engine(build("llama"), compiled=False)
    assert trials == [PLAIN]
    (cached,) = engine.models
    assert cached.exact is None
    assert is_exact(cached)
    assert is_exact(cached)
    assert trials == [PLAIN, SPECULATING]
    Engine(engine.target, engine.target, compiled=False)
    assert trials[2:] == [SPECULATING, SPECULATING]


def test_a_model_that_waits_is_tried_when_it_speculates(trials: list[Any]) -> None:
    model = build("dbrx")
    assert cached_model_of(model, speculates=False).exact is None
    assert trials == []
    assert cached_model_of(model).exact
    assert trials == [SPECULATING]


def test_a_model_that_is_wrong_about_several_rows_decodes_plainly_and_refuses_the_rest() -> None:
    model = Counted(build("llama"), spoils=True)
    engine = Engine(model, compiled=False)
    prompt = prompt_of(9)
    assert engine.models[0].fused
    made = engine.generate(prompt, max_tokens=20)
    assert made.tokens == plain(model, prompt, 20)
    with pytest.raises(UnsupportedModel, match="several tokens at once"):
        engine.generate(prompt, max_tokens=20, prediction=made.tokens)
    with pytest.raises(UnsupportedModel, match="several tokens at once"):
        Engine(model, build("llama"))
